"""What was measured of routes: where tokens go and how often, when they leave, and what that is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pathlm.report import pool
from pathlm.report.charts import Dot, Line, columns, dots, lines
from pathlm.report.figure import Figure, Missing, Section, number, percent, signed, table, told
from pathlm.report.passages import shade
from pathlm.report.read import Run
from pathlm.report.svg import LETTER, Drawing, both, fit

MEASURE = "pathlm eval {run} --routes --against PLAIN"
TRACE = 'pathlm trace {run} "a sentence" --keep'
WAYS = {
    "any": "blocks of the pool, as often as it wants to",
    "recur": "the blocks of the pool in their order, each as often as it wants to",
    "skip": "blocks of the pool in their order, each once at most",
}
"""What a way leads through, by the moves that routers may make"""
CORRELATIONS = {
    "spearman": "Spearman",
    "pearson": "Pearson",
    "partial_spearman": "partial Spearman (1)",
    "partial_spearman_following": "partial Spearman (2)",
}
CONTROLS = {
    "random": "steps dealt out at random",
    "static": "the mean for everybody",
    "rare_deep": "rare tokens deep",
    "frequent_deep": "frequent tokens deep",
    "hard_deep": "hard places deep",
    "easy_deep": "easy places deep",
}


def measured(run: Run) -> tuple[str, dict[str, Any]]:
    """Return the split whose routes were measured last, and what was measured; empty where nothing was."""
    found = {name: entry for name, entry in run.routes.items() if isinstance(entry, dict)}
    split = max(found, key=lambda name: str(found[name].get("date", "")), default="")
    return split, found.get(split, {})


def has_pool(run: Run) -> bool:
    """Tell whether the run's model has a pool, so that there are routes."""
    return run.family == "brian" and bool(run.pool)


def where(run: Run) -> tuple[Section | None, list[Missing]]:
    """Return the graph of the pool, the share of each block, and when tokens leave."""
    if not has_pool(run):
        return None, []
    split, entry = measured(run)
    figures: list[Figure] = []
    missing: list[Missing] = []
    if (found := _map(run, split, entry)) is not None:
        nodes, counts, source = found
        figures += [pool.graph(nodes, counts, source=source), _load(run, nodes, counts, source)]
        by_step = entry.get("map", {}).get("by_step")
        if by_step:
            figures.append(_by_step([*nodes[1:]], by_step, source))
    else:
        missing.append(Missing("the graph of the pool and the load of its blocks", MEASURE if run.has_text else TRACE))
    if (histogram := _histogram(run, split, entry)) is not None:
        figures.insert(1 if figures else 0, _exits(*histogram))
    if not figures:
        return None, missing
    way = WAYS.get(str(run.model.get("route_moves")), WAYS["any"])
    lead = f"Every token finds its own way: from IN through {way}, to OUT."
    return Section("pool", "The pool", lead, figures), missing


def _map(run: Run, split: str, entry: dict[str, Any]) -> tuple[list[str], list[list[float]], str] | None:
    """Return places, counts of transitions and what they were counted over: an evaluation, else the traced sentences."""
    given = entry.get("map")
    if given:
        counts = [[float(many) for many in row] for row in given["transitions"]]
        return _named(run, given["nodes"]), counts, f"all tokens of the {split} text"
    if not run.transitions:
        return None
    nodes = ["IN", *run.pool, "OUT"]
    counts = [[float(run.transitions[u, v]) for v in nodes] for u in nodes]
    return nodes, counts, f"the {sum(run.transitions[u, 'OUT'] for u in nodes):,} tokens of the traced sentences only"


def _named(run: Run, nodes: Sequence[str]) -> list[str]:
    """Return the places by the names that paths use: blocks are counted from 1 over the whole model, not within the pool."""
    own = run.pool
    return ["IN", *own, "OUT"] if len(own) == len(nodes) - 2 else [str(node) for node in nodes]


def _load(run: Run, nodes: Sequence[str], counts: Sequence[Sequence[float]], source: str) -> Figure:
    visits = [sum(row[v] for row in counts) for v in range(1, len(nodes) - 1)]
    total = sum(visits) or 1.0
    shares = [(name, many / total) for name, many in zip(nodes[1:-1], visits, strict=True)]
    entropy = number(run.latest("validation/route/load_entropy"))
    caption = f"Of all visits to blocks of the pool, the share that each block gets, over {source}. "
    caption += f"Even shares would be {percent(1 / len(shares), 0)} each."
    if entropy is not None:
        caption += f" The entropy of these shares, at most 1, was {entropy:.2f} at the last validation."
    busiest = max(shares, key=lambda share: share[1])
    label = f"Load of the {len(shares)} blocks; {busiest[0]} has the most, {percent(busiest[1], 0)}."
    picture = columns(shares, label=label, across="block", up="share of visits")
    rows = [(name, f"{many:,.0f}", percent(many / total)) for name, many in zip(nodes[1:-1], visits, strict=True)]
    return Figure("How the blocks share the work", picture, caption, table(("block", "visits", "share"), rows, "Visits of each block"))


def _by_step(places: Sequence[str], by_step: Sequence[Sequence[float]], source: str) -> Figure:
    """Return where tokens are at each route step, as a grid of shades."""
    shares = [[float(share) for share in row] for row in by_step]
    if any(len(row) != len(places) for row in shares):
        raise ValueError(f"by_step: every row must be {len(places)} shares, for {', '.join(places)}")
    label = f"Where tokens are at each of {len(shares)} route steps."

    def draw(width: float) -> Drawing:
        left, top, height = 44.0, 24.0, 26.0
        pitch = min((width - left - 4) / len(places), 84.0)
        drawing = Drawing(width, top + height * len(shares) + 8, label)
        every = math.ceil(4 * LETTER / pitch)  # a name needs so many columns
        for j, name in list(enumerate(places))[::every]:
            drawing.text(left + pitch * (j + 0.5), 14.0, fit(name, pitch * every + 4), anchor="middle")
        for i, row in enumerate(shares):
            drawing.text(left - 8, top + height * (i + 0.5) + 4, str(i + 1), anchor="end")
            for j, share in enumerate(row):
                x, y = left + pitch * j, top + height * i
                hint = f"step {i + 1}, {places[j]}: {percent(share)}"
                drawing.cell(x, y, (pitch, height), 0.04 + 0.8 * share, kind="cell", hint=hint)
                if pitch > 34 and share >= 0.005:
                    drawing.text(
                        x + pitch / 2, y + height / 2 + 4, f"{100 * share:.0f}%", anchor="middle", kind="strong" if share > 0.6 else ""
                    )
        return drawing

    caption = "A row is a route step: the stronger a cell, the more of the tokens still in the pool choose that block, or leave (OUT)."
    caption += f" Over {source}."
    rows = [(str(i + 1), *(percent(share) for share in row)) for i, row in enumerate(shares)]
    return Figure("Step by step", both(draw), caption, table(("step", *places), rows, "Share of tokens at each route step"))


def _histogram(run: Run, split: str, entry: dict[str, Any]) -> tuple[list[float], str] | None:
    """Return the share of tokens that leave after 0, 1, 2 … steps, and over what it was measured."""
    if entry:
        return [float(share) for share in entry["routed"]["histogram"]], f"the {split} text"
    for name, found in reversed(run.evaluations.items()):
        if isinstance(found, dict) and found.get("routes"):
            return [float(share) for share in found["routes"]["histogram"]], f"the {name} text"
    prefix = "validation/route/left_after_"
    rows = [row for row in run.metrics if any(name.startswith(prefix) for name in row)]
    if not rows:
        return None
    left = {int(name.removeprefix(prefix)): number(value) or 0.0 for name, value in rows[-1].items() if name.startswith(prefix)}
    return [left.get(steps, 0.0) for steps in range(max(left) + 1)], "the rows of the last validation"


def _exits(histogram: Sequence[float], source: str) -> Figure:
    first = 1 if histogram and not histogram[0] else 0
    shares = [(str(steps), share) for steps, share in enumerate(histogram)][first:]
    mean = sum(steps * share for steps, share in enumerate(histogram))
    label = f"Tokens by the number of route steps they take; {mean:.2f} on average."
    caption = (
        f"How many blocks of the pool tokens visit before they leave, over {source}. On average {mean:.2f} of at most {len(histogram) - 1}."
    )
    rows = [(name, percent(share)) for name, share in shares]
    kinds = [f"d{shade(steps, first, len(histogram) - 1)}" for steps in range(first, len(histogram))]
    picture = columns(shares, label=label, across="route steps taken before OUT", up="share of tokens", kinds=kinds)
    return Figure("When tokens leave", picture, caption, table(("route steps", "share of tokens"), rows, "Tokens by route steps"))


def worth(run: Run) -> tuple[Section | None, list[Missing]]:
    """Return what depth is worth: how it goes with difficulty and gain, and the loss at every budget."""
    if not has_pool(run):
        return None, []
    split, entry = measured(run)
    if not entry:
        return None, [Missing("depth against difficulty, the budget curve, controls", MEASURE)] * run.has_text
    missing = [] if entry.get("difficulty") else [Missing("depth against the difficulty for an independent plain model", MEASURE)]
    figures = [_correlations(entry, split), *_slices(entry, split)]
    if entry.get("budgets"):
        figures.append(_budgets(entry, split))
    else:
        missing.append(
            Missing("the budget curve; this model was not trained for several budgets", "pathlm train RECIPE  (with a stage of exits)")
        )
    if entry.get("controls"):
        figures.append(_controls(entry, split))
    tokens, documents = entry["routed"]["tokens"], entry["routed"]["documents"]
    lead = f"Do tokens go deep where it helps? Measured on the {split} text: {documents:,} documents, {tokens:,} tokens."
    return Section("worth", "What depth is worth", lead, figures), missing


def _correlations(entry: dict[str, Any], split: str) -> Figure:
    groups = {"gain": ("s0", "with the measured gain", entry["gain"]["correlations"])}
    if entry.get("difficulty"):
        groups["loss"] = ("s1", "with an independent plain model's loss", entry["difficulty"])
    rows, given = [], []
    for name, title in CORRELATIONS.items():
        for kind, meaning, found in groups.values():
            estimate = found.get(name) or {}
            value, low, high = (number(estimate.get(key)) for key in ("value", "low", "high"))
            rows.append((f"{title}, {meaning}", told(value), told(low), told(high)))
            if value is not None:
                given.append(Dot(title, value, low, high, kind, _signed(value, low, high)))
    first = entry["gain"]["correlations"]["spearman"]
    told_first = _signed(*(number(first.get(key)) for key in ("value", "low", "high")))
    caption = (
        "The correlation of a token's route steps with what is gained by depth there (its loss if all leave as early as they may, minus "
        "that at full depth)"
    )
    caption += ", and with how hard the place is for a model that knows nothing of routes" if "loss" in groups else ""
    caption += (
        ". Right of zero: deeper where there is more of it. Lines are 95 % intervals over documents drawn anew. A place can be hard and "
        "have nothing to gain, so the two need not agree. (1): the token's frequency and position held fixed; (2): the frequency of the "
        "token that follows, too."
    )
    label = f"Correlations of depth; Spearman with the measured gain {told_first}."
    picture = dots(given, label=label, across="correlation", zero=True)
    numbers = table(("correlation", "value", "from", "to"), rows, f"Correlations of route steps, {split}")
    return Figure("Depth against difficulty", picture, caption, numbers, [(f"dot {kind}", meaning) for kind, meaning, _ in groups.values()])


def _signed(value: float | None, low: float | None, high: float | None) -> str:
    return signed(value) + ("" if low is None or high is None else f" ({signed(low)} to {signed(high)})")


SLICES = {
    "difficulty": ("Depth by difficulty", "tenths of all places, the easiest first", "A tenth of all places each, the easiest first."),
    "frequency": (
        "Depth by frequency",
        "tenths by how frequent the token is",
        "A tenth of all tokens each, by how often they occur in training.",
    ),
    "class": ("Depth by kind of token", "kind of token", "Tokens by what they are."),
    "position": ("Depth by position", "place in the document", "Tokens by how far from the beginning of their document they stand."),
}


def _slices(entry: dict[str, Any], split: str) -> list[Figure]:
    """Return depth by kinds of tokens, for the kinds that were measured."""
    found = entry.get("slices") or {}
    whose = f" Difficulty is the loss of {entry['difficulty_of']}." if entry.get("difficulty_of") else ""
    return [
        _slice(found[name], title, across, caption + (whose if name == "difficulty" else ""), split)
        for name, (title, across, caption) in SLICES.items()
        if found.get(name)
    ]


def _slice(rows: Sequence[dict[str, Any]], title: str, across: str, caption: str, split: str) -> Figure:
    kept = [row for row in rows if number(row.get("steps_mean")) is not None]
    given = [Dot(str(row["label"]), float(row["steps_mean"]), None, None, "s0", f"{row['steps_mean']:.2f} steps") for row in kept]
    ends = f": {given[0].name} {given[0].told}, {given[-1].name} {given[-1].told}" if given else ""
    picture = dots(given, label=f"Mean route steps by {across}{ends}.", across="mean route steps")
    columns_ = ("", "tokens", "loss", "route steps", "blocks run", "gain of full depth")
    numbers = [
        (
            str(row["label"]),
            f"{row.get('tokens', 0):,}",
            *(told(row.get(key)) for key in ("loss", "steps_mean", "block_evaluations", "gain")),
        )
        for row in rows
    ]
    return Figure(title, picture, f"{caption} Farther right: more route steps.", table(columns_, numbers, f"By {across}, {split}"))


def _budgets(entry: dict[str, Any], split: str) -> Figure:
    curve = sorted(entry["budgets"], key=lambda point: point["block_evaluations"])
    points = [(float(point["block_evaluations"]), float(point["loss"])) for point in curve]
    hints = [f"budget {point['budget']:.2f}: {x:.2f} blocks, {y:.4f} nats" for point, (x, y) in zip(curve, points, strict=True)]
    routed = entry["routed"]
    given = [Line(points, "s0", dots=True, hints=hints)]
    legend = [("line s0", "at each budget")]
    for name, kind in (("random", "s1"), ("static", "s2")):
        if name in (entry.get("controls") or {}):
            control = entry["controls"][name]
            given.append(
                Line(
                    [(float(control["block_evaluations"]), float(control["loss"]))],
                    kind,
                    dots=True,
                    hints=[f"{CONTROLS[name]}: {control['loss']:.4f}"],
                )
            )
            legend.append((f"dot {kind}", CONTROLS[name]))
    plain = number((entry.get("plain") or {}).get("loss"))
    if plain is not None:
        legend.append(("line plain", f"plain model: {plain:.3f}"))
    (least, worst), (most, best) = points[0], points[-1]
    label = f"Loss over blocks run per token, from {worst:.3f} nats at {least:.2f} blocks to {best:.3f} at {most:.2f}."
    picture = lines(
        given, label=label, across="blocks run per token", up="nats per token", level=None if plain is None else (plain, "plain")
    )
    caption = (
        "One model, asked to spend more or less: each dot is a budget, the share of its route steps that tokens may take on average. "
        "Down is better, left is cheaper. Single dots take as many steps as the model at the budget it was trained for, without a "
        "router that decides who takes them."
    )
    rows = [
        (told(point["budget"], 2), told(point["steps_mean"], 2), told(point["block_evaluations"], 2), percent(point["blocks_share"], 0),
         told(point["loss"], 4), told(point["bits_per_byte"], 4))
        for point in (*curve, routed | {"budget": None})
    ]  # fmt: skip
    heads = ("budget", "route steps", "blocks per token", "of all blocks", "nats per token", "bits per byte")
    numbers = table(heads, rows, f"Loss and computation by budget, {split}; the last row is the model as trained")
    return Figure("Loss at every budget", picture, caption, numbers, legend)


def _controls(entry: dict[str, Any], split: str) -> Figure:
    given, rows = [], []
    for name, found in entry["controls"].items():
        if name not in CONTROLS:
            continue
        value, low, high = (number(found["excess"].get(key)) for key in ("value", "low", "high"))
        rows.append((CONTROLS[name], told(found["loss"], 4), told(value, 4), told(low, 4), told(high, 4)))
        if value is not None:
            given.append(Dot(CONTROLS[name], value, low, high, "s1", signed(value, 3)))
    label = (
        f"What other rules lose beyond the router, from {given[0].told} to {given[-1].told} nats."
        if given
        else "No control could be compared."
    )
    caption = (
        "The same model with the same number of steps in all, dealt out by other rules than its router. Right of zero: that rule loses "
        "more than the router does, so the router's choice is worth something. Lines are 95 % intervals over documents."
    )
    picture = dots(given, label=label, across="nats per token above the routed model", zero=True)
    numbers = table(("rule", "nats per token", "above the router", "from", "to"), rows, f"Other rules with the same steps, {split}")
    return Figure("Is it the router's choice?", picture, caption, numbers)
