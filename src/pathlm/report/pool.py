"""The pool as a graph: IN, its blocks and OUT on an arc, and between them lines as wide as they are travelled."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pathlm.report.figure import Figure, percent, table
from pathlm.report.svg import LETTER, NARROW, Drawing, both

RARE = 0.004
"""Share of all transitions below which a line is left out of the picture."""
KINDS = {
    "advance": "to the next block",
    "skip": "over blocks",
    "recur": "to the same block again, or back",
    "leave": "out of the pool",
}


def graph(nodes: Sequence[str], counts: Sequence[Sequence[float]], *, source: str) -> Figure:
    """Return the graph of a pool.

    Args:
        nodes: IN, the blocks, OUT.
        counts: How often a token went from each of them (row) to each (column).
        source: Which tokens were counted, for the caption.

    Raises `ValueError` where counts and nodes do not fit, or nobody went anywhere.
    """
    if len(counts) != len(nodes) or any(len(row) != len(nodes) for row in counts):
        raise ValueError(f"transitions: must be {len(nodes)} rows of {len(nodes)} numbers, one for each of {', '.join(nodes)}")
    total = sum(map(sum, counts))
    if not total > 0:
        raise ValueError("transitions: nobody went anywhere")
    taken = sorted(
        ((counts[u][v], u, v) for u in range(len(nodes)) for v in range(len(nodes)) if counts[u][v] > 0), key=lambda edge: -edge[0]
    )
    shown = [edge for edge in taken if edge[0] / total >= RARE]
    widest = taken[0][0]
    load = [sum(counts[u][v] for u in range(len(nodes))) for v in range(len(nodes))]
    busiest = f"{nodes[taken[0][1]]} → {nodes[taken[0][2]]}"
    label = f"The pool as a graph with {len(nodes) - 2} blocks; the line travelled most is {busiest}, {percent(widest / total)} of all."

    def draw(width: float) -> Drawing:
        return _draw(width, nodes, [(many / widest, many / total, u, v) for many, u, v in shown], load, label)

    left_out = (
        f" {len(taken) - len(shown)} lines below {percent(RARE)} of all transitions are left out here." if len(taken) > len(shown) else ""
    )
    caption = (
        "Tokens enter the pool at IN and leave it at OUT. A line is as wide as it is travelled: lines inside the arc lead forward, "
        f"those outside lead back or to the same block again. The stronger the colour of a block, the more visits it gets.{left_out} "
        f"Counted over {source}."
    )
    rows = [(f"{nodes[u]} → {nodes[v]}", KINDS[kind(u, v, len(nodes))], f"{many:,.0f}", percent(many / total)) for many, u, v in taken]
    numbers = table(("transition", "kind", "times", "share"), rows, "Transitions, the most frequent first")
    used = {kind(u, v, len(nodes)) for _, u, v in shown}
    legend = [(f"stroke {name}", meaning) for name, meaning in KINDS.items() if name in used]
    return Figure("Where tokens go", both(draw), caption, numbers, legend)


def kind(u: int, v: int, places: int) -> str:
    """Return what a transition from place `u` to place `v` is: `advance`, `skip`, `recur` or `leave`."""
    return "leave" if v == places - 1 else "recur" if v <= u else "advance" if v == u + 1 else "skip"


def _draw(width: float, nodes: Sequence[str], edges: Sequence[tuple[float, float, int, int]], load: Sequence[float], label: str) -> Drawing:
    narrow, last = width == NARROW, len(nodes) - 1
    radius = min(19.0 if not narrow else 15.0, math.pi * width * 0.36 / len(nodes) / 2)
    across, down = width / 2 - (58 if not narrow else 30), width * (0.34 if not narrow else 0.5)
    middle, base = (width / 2, down + 56), down + 56
    drawing = Drawing(width, base + 34, label)

    def place(i: float, stretch: float = 1.0) -> tuple[float, float]:
        angle = math.pi * (1 - i / last)
        return middle[0] + across * stretch * math.cos(angle), base - down * stretch * math.sin(angle)

    drawing.line([place(i / 8) for i in range(8 * last + 1)], "grid")
    for share_of_widest, share, u, v in reversed(edges):
        stroke = max(share_of_widest * (15 if not narrow else 9), 0.8)
        hint = f"{nodes[u]} → {nodes[v]}: {percent(share)} of all transitions"
        name = kind(u, v, len(nodes))
        if u == v:
            x, y = place(float(u), 1 + (radius + 9) / down)
            drawing.add("circle", hint=hint, cx=x, cy=y, r=radius * 0.8, class_=f"edge {name}", stroke_width=stroke)
            continue
        start, end = place(float(u)), place(float(v))
        # Forward lines bend into the arc, the more the farther they lead; those that lead back bend out of it.
        inward = 1 - 0.5 * (abs(v - u) - 1) / last if v > u else 1.1 + 0.4 / abs(u - v)
        control = place((u + v) / 2, inward * (0.97 if v == u + 1 else 0.86 if v > u else 1.0))
        d = f"M{start[0]:.1f} {start[1]:.1f}Q{control[0]:.1f} {control[1]:.1f} {end[0]:.1f} {end[1]:.1f}"
        drawing.add("path", hint=hint, d=d, class_=f"edge {name}", stroke_width=stroke)
        _arrow(drawing, start, control, end, f"tip {name}", (3.0 if narrow else 4.0) + stroke * 0.45)
    most = max(load[1:last], default=0) or 1
    every = 1 if radius > 12 else math.ceil(4 * LETTER * last / (math.pi * across))
    for i, name in enumerate(nodes):
        x, y = place(float(i))
        ends = i in (0, last)
        drawing.add("circle", cx=x, cy=y, r=radius, class_="place")
        drawing.add("circle", cx=x, cy=y, r=radius, class_="place end" if ends else "place load",
                    fill_opacity=None if ends else f"{0.1 + 0.45 * load[i] / most:.2f}")  # fmt: skip
        if radius > 12:
            drawing.text(x, y + 4, name, anchor="middle", kind="name")
        elif ends or i % every == 0:
            away = place(float(i), 1 + (radius + 12) / down)
            drawing.text(away[0], away[1] + 4, name, anchor="middle", kind="name")
    return drawing


def _arrow(
    drawing: Drawing, start: tuple[float, float], control: tuple[float, float], end: tuple[float, float], kind: str, size: float
) -> None:
    """Draw a tip a little behind the middle of a curve."""
    t = 0.56
    x, y = ((1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c for a, b, c in zip(start, control, end, strict=True))
    dx, dy = (2 * (1 - t) * (b - a) + 2 * t * (c - b) for a, b, c in zip(start, control, end, strict=True))
    length = math.hypot(dx, dy) or 1.0
    dx, dy = dx / length * size, dy / length * size
    points = [(x + dx, y + dy), (x - dx - dy * 0.9, y - dy + dx * 0.9), (x - dx + dy * 0.9, y - dy - dx * 0.9)]
    drawing.add("polygon", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in points), class_=kind)
