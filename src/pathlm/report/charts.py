"""Charts that every section uses: lines over training, columns, dots with intervals, lines of points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from pathlm.report.svg import LETTER, NARROW, Doublings, Drawing, Scale, both, breadth, compact, fit

POINTS = 300
"""Points of a line at most; a longer one is drawn through means of neighbours."""

LINES = 6
"""Lines of a chart that are told apart at most; what further ones would show is in the tables."""


@dataclass(frozen=True)
class Line:
    """A line of a chart; `kind` is its class in the style sheet, `dots` marks every point, where a mouse rests on one its hint is shown."""

    points: Sequence[tuple[float, float]]
    kind: str
    dots: bool = False
    hints: Sequence[str] = ()
    between: Sequence[tuple[float, float]] = ()
    """An interval around each point of a line with dots"""


@dataclass(frozen=True)
class Band:
    """A stage of training: a part of the picture with a name."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Mark:
    """A sign at the upper border: what a gate said at some step."""

    at: float
    kind: str
    hint: str


@dataclass(frozen=True)
class Timeline:
    """What happened along the horizontal axis: stages, and what gates said."""

    bands: Sequence[Band] = ()
    marks: Sequence[Mark] = ()


def lines(
    given: Sequence[Line],
    *,
    label: str,
    across: str,
    up: str,
    limits: tuple[float, float] | None = None,
    timeline: Timeline | None = None,
    level: tuple[float, str] | None = None,
    doubling: bool = False,
) -> Markup:
    """Return a chart of lines.

    Args:
        given: The lines; of a long one, means of neighbours are drawn.
        label: What can be seen, for a screen reader.
        across: What the horizontal axis counts; `up` the vertical one.
        limits: Lowest and highest number of the vertical axis; by default those of the lines.
        timeline: Stages in the background, and signs at the upper border.
        level: A dashed line across, and its kind.
        doubling: Whether the horizontal axis goes equally far for every doubling; its numbers are those of the points.
    """
    bands, marks = (timeline.bands, timeline.marks) if timeline is not None else ((), ())
    thin = [replace(line, points=_thinned(line.points)) for line in given if line.points]
    xs = [x for line in thin for x, _ in line.points] + [x for band in bands for x in (band.start, band.end)]
    ys = [y for line in thin for _, y in line.points] + ([] if level is None else [level[0]])
    low, high = limits or _room(ys)

    def draw(width: float) -> Drawing:
        drawing, top, bottom, left = Drawing(width, 274.0, label), 36.0, 232.0, 50.0
        right = width - 14.0
        horizontal = Doublings(xs, left, right) if doubling else Scale(min(xs), max(xs), left, right, ticks=4 if width == NARROW else 7)
        vertical = Scale(low, high, bottom, top + (18 if bands else 0))  # stages have their names above the lines
        for i, band in enumerate(bands):
            begin, end = horizontal.at(band.start), horizontal.at(band.end)
            drawing.add("rect", hint=band.name, x=begin, y=top, width=max(end - begin, 0.0), height=bottom - top, class_=f"band b{i % 2}")
            if end - begin > 5 * LETTER:
                drawing.text((begin + end) / 2, top + 15, fit(band.name, end - begin - 4), anchor="middle", kind="faint")
        _axes(drawing, horizontal, vertical, (across, up), (left, right, bottom))
        if level is not None:
            drawing.line([(left, vertical.at(level[0])), (right, vertical.at(level[0]))], f"line {level[1]}")
        for line in thin:
            drawing.line([(horizontal.at(x), vertical.at(y)) for x, y in line.points], f"line {line.kind}")
            for (x, _), (least, most) in zip(line.points, line.between, strict=False):
                drawing.line([(horizontal.at(x), vertical.at(least)), (horizontal.at(x), vertical.at(most))], f"whisker {line.kind}")
            for place, (x, y) in enumerate(line.points if line.dots else ()):
                hint = line.hints[place] if line.hints else f"{compact(x)}: {y:.3f}"
                drawing.add("circle", hint=hint, cx=horizontal.at(x), cy=vertical.at(y), r=3.4, class_=f"dot {line.kind}")
        for mark in marks:
            _sign(drawing, horizontal.at(mark.at), top - 6, mark.kind, mark.hint)
        return drawing

    return both(draw)


def _room(numbers: Sequence[float]) -> tuple[float, float]:
    """Return limits that leave a little room around some numbers."""
    low, high = min(numbers), max(numbers)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // POINTS)
    groups = (points[first : first + size] for first in range(0, len(points), size))
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _sign(drawing: Drawing, x: float, y: float, kind: str, hint: str) -> None:
    """Draw a gate's sign: a disc that passed, a cross that failed, a ring that was not measured. Form says it as well as colour."""
    if kind == "failed":
        drawing.add("path", hint=hint, d=f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8", class_="sign failed")
    else:
        drawing.add("circle", hint=hint, cx=x, cy=y, r=4.0, class_=f"sign {kind}")


def _axes(drawing: Drawing, horizontal: Scale, vertical: Scale, names: tuple[str, str], frame: tuple[float, float, float]) -> None:
    left, right, bottom = frame
    for tick in vertical.ticks:
        y = vertical.at(tick)
        drawing.line([(left, y), (right, y)], "grid")
        drawing.text(left - 7, y + 4, vertical.told(tick), anchor="end")
    for tick in horizontal.ticks:
        x = horizontal.at(tick)
        drawing.line([(x, bottom), (x, bottom + 4)], "axis")
        drawing.text(min(x, right - 8), bottom + 18, horizontal.told(tick), anchor="middle")
    drawing.line([(left, bottom), (right, bottom)], "axis")
    across, up = names
    drawing.text((left + right) / 2, bottom + 38, across, anchor="middle", kind="faint")
    drawing.text(2.0, 12.0, up, kind="faint")


def columns(given: Sequence[tuple[str, float]], *, label: str, across: str, up: str, kinds: Sequence[str] = ()) -> Markup:
    """Return shares as columns, each with its name below and its share in per cent above; `kinds` are their classes, where they differ."""
    high = max((value for _, value in given), default=0.0) or 1.0

    def draw(width: float) -> Drawing:
        drawing, top, bottom, left = Drawing(width, 236.0, label), 40.0, 190.0, 8.0
        right = width - 8.0
        pitch = min((right - left) / max(len(given), 1), 110.0)
        start = left + ((right - left) - pitch * len(given)) / 2
        vertical = Scale(0.0, high, bottom, top)
        every = -(-int(5 * LETTER) // max(int(pitch), 1))
        for i, (name, value) in enumerate(given):
            x, y = start + i * pitch, vertical.at(value)
            drawing.add("rect", hint=f"{name}: {100 * value:.2f} %", x=x + pitch * 0.14, y=y, width=pitch * 0.72, height=bottom - y, rx=2.0,
                        class_=f"bar {kinds[i] if kinds else 's0'}")  # fmt: skip
            if i % every == 0:
                drawing.text(x + pitch / 2, y - 6, f"{100 * value:.0f}%", anchor="middle")
            if i % every == 0 or pitch > LETTER * (len(name) + 1):
                drawing.text(x + pitch / 2, bottom + 18, fit(name, max(pitch * every, 4 * LETTER)), anchor="middle")
        drawing.line([(left, bottom), (right, bottom)], "axis")
        drawing.text(2.0, 12.0, up, kind="faint")
        drawing.text((left + right) / 2, bottom + 38, across, anchor="middle", kind="faint")
        return drawing

    return both(draw)


def _nothing(width: float, label: str) -> Drawing:
    drawing = Drawing(width, 40.0, label)
    drawing.text(12.0, 24.0, "Not defined for these numbers.", kind="faint")
    return drawing


@dataclass(frozen=True)
class Dot:
    """A row of a chart of dots: a name, a number, and the interval around it where there is one."""

    name: str
    value: float
    low: float | None
    high: float | None
    kind: str
    told: str


def dots(given: Sequence[Dot], *, label: str, across: str, zero: bool = False) -> Markup:
    """Return numbers as dots on a line each, with their intervals; `zero` draws where nothing would be.

    Neighbours of the same name stand below it together.
    """
    if not given:
        return both(lambda width: _nothing(width, label))
    ends = [number for dot in given for number in (dot.value, dot.low, dot.high) if number is not None] + ([0.0] if zero else [])
    low, high = _room(ends)
    names, numbers = min(max(breadth(dot.name) for dot in given), 230.0), max(breadth(dot.told) for dot in given)
    starts = [i == 0 or given[i - 1].name != dot.name for i, dot in enumerate(given)]

    def draw(width: float) -> Drawing:
        narrow = width == NARROW
        pitch, top = (44.0 if narrow else 28.0), 14.0
        drawing = Drawing(width, top + pitch * len(given) + 46, label)
        left, right = (12.0, width - 12.0) if narrow else (28.0 + names, width - 28.0 - numbers)
        horizontal, bottom = Scale(low, high, left, right, ticks=4 if narrow else 6), top + pitch * len(given)
        for tick in horizontal.ticks:
            drawing.line([(horizontal.at(tick), top), (horizontal.at(tick), bottom)], "grid")
            drawing.text(horizontal.at(tick), bottom + 16, horizontal.told(tick), anchor="middle")
        if zero:
            drawing.line([(horizontal.at(0.0), top), (horizontal.at(0.0), bottom)], "axis")
        for i, dot in enumerate(given):
            y = top + pitch * (i + 0.5) + (9 if narrow else 0)
            if dot.low is not None and dot.high is not None:
                drawing.line([(horizontal.at(dot.low), y), (horizontal.at(dot.high), y)], f"whisker {dot.kind}")
            drawing.add("circle", hint=f"{dot.name}: {dot.told}", cx=horizontal.at(dot.value), cy=y, r=5.0, class_=f"dot {dot.kind}")
            if narrow:
                drawing.text(left, y - 14, fit(dot.name, right - left - breadth(dot.told) - 12) if starts[i] else "")
                drawing.text(right, y - 14, dot.told, anchor="end", kind="faint")
            else:
                drawing.text(left - 14, y + 4, fit(dot.name, names) if starts[i] else "", anchor="end")
                drawing.text(right + 14, y + 4, dot.told, kind="faint")
        drawing.text((left + right) / 2, bottom + 36, across, anchor="middle", kind="faint")
        return drawing

    return both(draw)
