"""Drawings as SVG text: elements that are escaped, scales with round ticks, and two widths of every picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup, escape

from pathlm.words import visible

WIDE, NARROW = 720.0, 340.0
"""Widths of a picture on a screen and on a phone. The page shows one of the two, so that letters keep their size."""
LETTER = 6.4
"""About how wide a letter of a picture is."""


class Drawing:
    """A picture of a given size that grows element by element. `label` says to a screen reader what can be seen."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self._parts: list[Markup] = []

    def add(self, name: str, content: str | None = None, *, hint: str | None = None, **attributes: Any) -> None:
        """Append an element. `content` is its text, `hint` is shown where a mouse rests on it."""
        inside = Markup("") if content is None else escape(visible(content))
        if hint is not None:
            inside += Markup("<title>{}</title>").format(visible(hint))
        self._parts.append(Markup("<{0}{1}>{2}</{0}>").format(Markup(name), _attributes(attributes), inside))

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", kind: str = "", **attributes: Any) -> None:
        """Write a line of text."""
        self.add("text", text, x=x, y=y, text_anchor=anchor, class_=kind or None, **attributes)

    def line(self, points: Sequence[tuple[float, float]], kind: str, **attributes: Any) -> None:
        """Draw a line through some points."""
        self.add("polyline", points=" ".join(f"{_short(x)},{_short(y)}" for x, y in points), class_=kind, **attributes)

    def cell(self, x: float, y: float, size: tuple[float, float], shade: float, *, kind: str, hint: str) -> None:
        """Draw a cell of a grid, the stronger, the nearer `shade` is to 1; `size` is the distance to the next ones."""
        opacity = f"{min(max(shade, 0.0), 1.0):.2f}"
        self.add("rect", hint=hint, x=x + 1, y=y + 1, width=size[0] - 2, height=size[1] - 2, rx=2.0, class_=kind, fill_opacity=opacity)

    def __html__(self) -> Markup:
        """Return the picture as it stands in a page."""
        head = Markup('<svg viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-label="{2}">')
        return head.format(_short(self.width), _short(self.height), visible(self.label)) + Markup("").join(self._parts) + Markup("</svg>")


def both(draw: Callable[[float], Drawing]) -> Markup:
    """Return a picture in both widths; a style sheet shows the one that fits."""
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(draw(WIDE), draw(NARROW))


class Scale:
    """From numbers between `low` and `high` to places between `start` and `end`, with about `ticks` round numbers."""

    def __init__(self, low: float, high: float, start: float, end: float, *, ticks: int = 5) -> None:
        if high <= low:
            high = low + (abs(low) * 0.1 or 1.0)
        self.low, self.high, self.start, self.end = low, high, start, end
        raw = (high - low) / ticks
        power = 10.0 ** math.floor(math.log10(raw))
        self._step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
        first, last = math.ceil(low / self._step - 1e-9), math.floor(high / self._step + 1e-9)
        self.ticks = [number * self._step for number in range(first, last + 1)]

    def at(self, value: float) -> float:
        """Return the place of a number; numbers outside stand at the border."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def told(self, tick: float) -> str:
        """Return a tick's number with the digits that its distance to the next one needs."""
        if self._step >= 1:
            return compact(tick)
        return f"{tick:.{max(-math.floor(math.log10(self._step) + 1e-9), 0)}f}"


class Doublings(Scale):
    """From numbers above 0 to places, equally far for every doubling. Its ticks are the numbers themselves, as far as they have room."""

    def __init__(self, numbers: Sequence[float], start: float, end: float) -> None:
        super().__init__(math.log2(min(numbers)), math.log2(max(numbers)), start + 2 * LETTER, end - 2 * LETTER)
        self.ticks = []
        for number in sorted(set(numbers)):
            if not self.ticks or self.at(number) - self.at(self.ticks[-1]) > 7 * LETTER:
                self.ticks.append(number)

    def at(self, value: float) -> float:
        """Return the place of a number above 0."""
        return super().at(math.log2(value))

    def told(self, tick: float) -> str:
        """Return a number in few letters."""
        return compact(tick)


def compact(number: float) -> str:
    """Return a count in few letters: 1,500 as 1,500, 25,000 as 25k, 1,200,000 as 1.2M."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            return f"{number / (1e3 if sign == 'k' else size):.3g}{sign}"
    return f"{number:,.0f}"


def fit(text: str, width: float, letter: float = LETTER) -> str:
    """Return a visible text cut to about `width`; wide letters, such as Chinese ones, count double."""
    shown = visible(text)
    if breadth(shown, letter) <= width:
        return shown
    while shown and breadth(shown + "…", letter) > width:
        shown = shown[:-1]
    return shown + "…"


def breadth(text: str, letter: float = LETTER) -> float:
    """Return about how wide a visible text is."""
    return sum((letter * (2 if ord(c) > 0x2E7F else 1) for c in visible(text)), 0.0)


def _attributes(attributes: dict[str, Any]) -> Markup:
    given = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None)
    return Markup("").join(Markup(' {}="{}"').format(Markup(name), _short(v) if isinstance(v, float) else v) for name, v in given)


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
