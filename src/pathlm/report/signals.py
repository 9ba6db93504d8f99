"""Signal graphs: where the energy was at every step, which earlier node it came from, and the neighbours of a node."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pathlm.path import Neighbours, Path
from pathlm.report.figure import Figure, Missing, Section, percent, table, told
from pathlm.report.passages import named, source, state, whole
from pathlm.report.read import Run
from pathlm.report.svg import NARROW, Drawing, Scale, both, breadth, fit

STEPS = 24
"""Steps of a sentence that a picture shows at most."""
SENTENCES = 4
NODES = 6
"""Nodes whose neighbours are drawn at most: those that the sentences visit most."""
EITHER_SIDE = 8
"""Neighbours drawn on each side of a node."""


def section(run: Run, command: str) -> tuple[list[Section], list[Missing]]:
    """Return the pictures of the traced signals of a run, and of the neighbours of their nodes."""
    if run.family != "brillm":
        return [], []
    paths = [path for paths in run.texts for path in paths if len(path.steps) > 1]
    sections: list[Section] = []
    if paths:
        figures = [figure for number, path in enumerate(paths[:SENTENCES], start=1) for figure in _figures(whole(path), number)]
        lead = "The next node is the one where most energy would arrive, and every energy is a sum of what earlier nodes sent."
        if len(paths) > SENTENCES:
            lead += f" The first {SENTENCES} of {len(paths)} sentences are drawn."
        sections.append(Section("signal", "The signal, step by step", lead, figures))
    if run.neighbours:
        chosen = _most_visited(run.neighbours, paths)
        lead = (
            "On the right of a node, where most energy arrives if a text begins at it; on the left, the nodes from which most energy "
            "would arrive at it. The wider a line, the more energy."
        )
        if len(chosen) < len(run.neighbours):
            lead += f" {len(chosen)} of {len(run.neighbours)} recorded nodes are drawn, those that the sentences visit most."
        sections.append(Section("neighbours", "Neighbours in the graph", lead, [_neighbourhood(record) for record in chosen]))
    return sections, [] if run.neighbours else [Missing("the neighbours of nodes in the graph", command)]


def _figures(path: Path, number: int) -> list[Figure]:
    figures = [_energies(path, number)]
    if any(step.parts for step in path.steps):
        figures.append(_shares(path, number))
    return figures


def _energies(path: Path, number: int) -> Figure:
    """Return energies of a sentence's nodes beside that of their best rival, a line per step."""
    steps = list(enumerate(path.steps))[1 : STEPS + 1]
    numbers = [energy for _, step in steps for energy in (step.score, *(score for _, score in step.rivals[:1])) if math.isfinite(energy)]
    names = 18 + max((breadth(named(step.node)) for _, step in steps), default=0.0)
    others = 22 + max((breadth(named(step.rivals[0][0])) for _, step in steps if step.rivals), default=0.0)
    won = sum(state(step) == "sure" for _, step in steps)
    label = f"Energies of {len(steps)} steps beside their best rival; at {won} of them most energy arrived at the node that the text took."

    def draw(width: float) -> Drawing:
        narrow, pitch, top = width == NARROW, 24.0, 10.0
        drawing = Drawing(width, top + pitch * len(steps) + 44, label)
        left, right = min(names, 76.0 if narrow else 150.0), width - min(others, 84.0 if narrow else 150.0)
        bottom = top + pitch * len(steps)
        scale = Scale(0.0, max(numbers, default=1.0), left, right, ticks=4 if narrow else 6)
        for tick in scale.ticks:
            drawing.line([(scale.at(tick), top), (scale.at(tick), bottom)], "grid")
            drawing.text(scale.at(tick), bottom + 16, scale.told(tick), anchor="middle")
        for i, (place, step) in enumerate(steps):
            y, kind = top + pitch * (i + 0.5), state(step)
            drawing.text(left - 10, y + 4, fit(named(step.node), left - 16), anchor="end")
            if step.rivals and math.isfinite(step.rivals[0][1]):
                name, energy = step.rivals[0]
                drawing.line([(scale.at(step.score), y), (scale.at(energy), y)], f"whisker {kind}")
                hint = f"best rival {named(name)}: {energy:.3f}"
                drawing.add("circle", hint=hint, cx=scale.at(energy), cy=y, r=4.5, class_="dot rival")
                drawing.text(right + 12, y + 4, fit(named(name), width - right - 14), kind="faint")
            drawing.add("circle", hint=f"step {place}: {step.score:.3f}", cx=scale.at(step.score), cy=y, r=5.0, class_=f"dot {kind}")
        drawing.text((left + right) / 2, bottom + 36, "energy", anchor="middle", kind="faint")
        return drawing

    caption = (
        "From top to bottom the nodes of the sentence. The full dot is the energy with which the signal arrived, the ring the best "
        "other node, named on the right. Where the full dot is ahead, the graph would have gone the same way as the text."
    )
    caption += f" The first {STEPS} of {len(path.steps) - 1} steps." if len(path.steps) - 1 > STEPS else ""
    rows = [
        (
            str(place),
            named(step.node),
            told(step.score),
            "; ".join(f"{named(name)} {told(energy)}" for name, energy in step.rivals[:5]) or "–",
        )
        for place, step in enumerate(path.steps)
        if place
    ]
    numbers_ = table(("step", "node", "energy", "rivals"), rows, "Energies and rivals")
    meanings = {"sure": "ahead of all others", "close": "level with another", "beaten": "behind"}
    legend = [(f"dot {kind}", meaning) for kind, meaning in meanings.items() if any(state(step) == kind for _, step in steps)]
    return Figure(f"Sentence {number}: energies", both(draw), caption, numbers_, [*legend, ("dot rival", "best rival")])


def _shares(path: Path, number: int) -> Figure:
    """Return what each earlier node has in the energy of each step, as a grid of shades."""
    steps = list(enumerate(path.steps))[1 : STEPS + 1]
    shares = {
        (place, name): value / step.score
        for place, step in steps
        for name, value in step.parts
        if step.score and math.isfinite(value / step.score)
    }
    names = sorted({name for _, name in shares}, key=_order)
    largest = max(((share, place, name) for (place, name), share in shares.items() if _order(name)[0] == 0), default=None)
    label = "What each earlier node has in the energy of each step."
    if largest is not None:
        label += f" The largest share of an earlier node is {percent(largest[0], 0)}, of {source(largest[2], path)} at step {largest[1]}."

    def draw(width: float) -> Drawing:
        narrow, height = width == NARROW, 22.0
        left, top = min(18 + max((breadth(named(step.node)) for _, step in steps), default=0.0), 76.0 if narrow else 150.0), 76.0
        pitch = min((width - left - 34) / max(len(names), 1), 44.0)
        drawing = Drawing(width, top + height * len(steps) + 8, label)
        for j, name in enumerate(names):
            x = left + pitch * (j + 0.6)
            drawing.text(x, top - 8, fit(_column(name, path), 84.0), transform=f"rotate(-58 {x:.1f} {top - 8:.1f})")
        for i, (place, step) in enumerate(steps):
            y = top + height * i
            drawing.text(left - 10, y + 15, fit(named(step.node), left - 16), anchor="end")
            for j, name in enumerate(names):
                if (share := shares.get((place, name))) is None:
                    continue
                x, sign = left + pitch * j, "less" if share < 0 else "more"
                hint = f"{named(step.node)} ({place}), from {source(name, path)}: {percent(share)}"
                drawing.cell(x, y, (pitch, height), 0.06 + abs(share), kind=f"share {sign}", hint=hint)
                if pitch >= 30 and abs(share) >= 0.01:
                    drawing.text(
                        x + pitch / 2, y + 15, f"{100 * share:.0f}", anchor="middle", kind="strong" if abs(share) > 0.62 else "small"
                    )
        return drawing

    caption = (
        "A row is a step, a column an earlier node of the sentence: the stronger a cell, the more of the row's energy that node sent, "
        "in per cent. Energies are exact sums, so a row adds up to 100. Nodes that send less than nothing, those that speak against it, "
        "have the other colour. The last columns are the edge's own bias and the position."
    )
    rows = [
        (
            str(place),
            named(step.node),
            "; ".join(f"{source(name, path)} {percent(value / step.score)}" for name, value in step.parts) or "–",
        )
        for place, step in enumerate(path.steps)
        if place and step.score
    ]
    legend = [("cellmark more", "adds energy")] + [("cellmark less", "takes energy away")] * any(share < 0 for share in shares.values())
    return Figure(
        f"Sentence {number}: who sent it", both(draw), caption, table(("step", "node", "shares"), rows, "Shares of each energy"), legend
    )


def _order(name: str) -> tuple[int, int]:
    """Return where a part stands: earlier nodes by their place, then what is older, then the edge and the position."""
    if name.startswith("step:"):
        return 0, int(name.removeprefix("step:")) if name.removeprefix("step:").isdecimal() else 0
    return {"signal": (0, 0), "earlier": (1, 0), "bias": (2, 0), "position": (2, 1)}.get(name, (3, 0))


def _column(name: str, path: Path) -> str:
    return {"bias": "bias", "position": "position", "earlier": "all before"}.get(name) or source(name, path)


def _most_visited(records: Sequence[Neighbours], paths: Sequence[Path]) -> list[Neighbours]:
    """Return the nodes that sentences visit most, in the order in which they were recorded."""
    visits = [sum(step.node == record.node for path in paths for step in path.steps) for record in records]
    order = sorted(range(len(records)), key=lambda i: (-visits[i], i))[:NODES]
    return [records[i] for i in sorted(order)]


def _neighbourhood(record: Neighbours) -> Figure:
    """Return a node between those that lead to it and those it leads to, with lines as wide as energies."""
    before, after = record.comes_from[:EITHER_SIDE], record.leads_to[:EITHER_SIDE]
    most = max((energy for _, energy in (*before, *after)), default=1.0) or 1.0
    least = min((energy for _, energy in (*before, *after)), default=0.0)
    name = named(record.node)
    label = f"The node {name}: {record.comes:,} nodes lead to it, it leads to {record.leads:,}."
    label += f" Most energy arrives at {named(after[0][0])}." if after else ""

    def draw(width: float) -> Drawing:
        pitch, top = 26.0, 30.0
        height = top + pitch * max(len(before), len(after), 1) + 6
        drawing, middle = Drawing(width, height, label), ((width / 2), top + (height - top - 6) / 2)
        reach = 84.0 if width == NARROW else 190.0
        drawing.text(middle[0] - reach, 14.0, f"from {record.comes:,} node{'s' * (record.comes != 1)}", anchor="middle", kind="faint")
        drawing.text(middle[0] + reach, 14.0, f"to {record.leads:,} node{'s' * (record.leads != 1)}", anchor="middle", kind="faint")
        for side, given in ((-1, before), (1, after)):
            for i, (other, energy) in enumerate(given):
                x, y = middle[0] + side * reach, middle[1] + (i - (len(given) - 1) / 2) * pitch
                bend = middle[0] + side * reach * 0.5
                share = (energy - least) / (most - least) if most > least else 1.0
                d = f"M{middle[0]:.1f} {middle[1]:.1f}C{bend:.1f} {middle[1]:.1f} {bend:.1f} {y:.1f} {x:.1f} {y:.1f}"
                drawing.add("path", hint=f"{named(other)}: {energy:.3f}", d=d, class_="edge advance" if side > 0 else "edge skip",
                            stroke_width=1 + 6 * share)  # fmt: skip
                anchor = "start" if side > 0 else "end"
                text = f"{fit(named(other), 44.0 if width == NARROW else 110.0)} {energy:.1f}"
                drawing.text(x + side * 5, y + 4, text, anchor=anchor)
        half = max(24.0, min(len(name), 12) * 4.2 + 10)
        drawing.add("rect", x=middle[0] - half, y=middle[1] - 14, width=2 * half, height=28.0, rx=14.0, class_="place")
        drawing.text(middle[0], middle[1] + 4.5, fit(name, 2 * half - 8), anchor="middle", kind="name")
        return drawing

    others = (
        "" if record.shared is None else f" All nodes without an edge of their own from {name} share one energy, {told(record.shared)}."
    )
    caption = f"Numbers are energies; the first {EITHER_SIDE} on each side are drawn.{others}"
    rows = [(f"→ {named(other)}", told(energy)) for other, energy in record.leads_to]
    rows += [(f"{named(other)} →", told(energy)) for other, energy in record.comes_from]
    return Figure(f"“{name}”", both(draw), caption, table(("edge", "energy"), rows, f"Neighbours of {name}"))
