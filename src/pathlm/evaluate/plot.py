"""The budget curve as a drawing: loss over blocks run per token, beside controls and a plain model, as SVG text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 760.0, 460.0
LEFT, RIGHT, TOP, BOTTOM = 78.0, 210.0, 48.0, 62.0
"""Margins; the legend stands in the right one."""
INK, FAINT, CURVE, ROUTED, PLAIN = "#1f2328", "#d8dee4", "#0a58ca", "#b02a37", "#57606a"
CONTROLS = {"random": "#e07b00", "static": "#2f9e44", "frequency": "#8e44ad"}
"""Rules drawn, each in its colour."""


def budget_svg(result: dict[str, Any]) -> str:
    """Return a result of `evaluate.routing.run` as an SVG picture: the loss in nats per token over the blocks run per token.

    The line joins the budgets, each with its number; single marks are the model at the budget it was measured with, and the rules that take
    the same steps without a router. A plain model is a dashed line at its loss, since its records do not say how many blocks it has.
    """
    curve, routed = result["budgets"], result["routed"]
    marks = [("routed", routed, ROUTED), *((name, result["controls"][name], colour) for name, colour in CONTROLS.items())]
    plain = None if result["plain"] is None else result["plain"]["loss"]
    points = [*curve, *(found for _, found, _ in marks)]
    across = _Axis([point["block_evaluations"] for point in points], LEFT, WIDTH - RIGHT)
    up = _Axis([*(point["loss"] for point in points), *([] if plain is None else [plain])], HEIGHT - BOTTOM, TOP)
    parts = [_text(LEFT, 24.0, f"{result['split']}: loss and computation by budget", size=16), *_grid(across, up)]
    if plain is not None:
        y = up.at(plain)
        parts.append(f'<path d="M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}" stroke="{PLAIN}" stroke-width="1.5" stroke-dasharray="6 4"/>')
    if curve:
        places = [(across.at(point["block_evaluations"]), up.at(point["loss"])) for point in curve]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{CURVE}" stroke-width="2"/>')
        for (x, y), point in zip(places, curve, strict=True):
            parts.append(_disc(x, y, CURVE, 4.0))
            parts.append(_text(x + 7, y - 8, f"{point['budget']:.2g}", size=12, colour=CURVE))
    parts += [_disc(across.at(found["block_evaluations"]), up.at(found["loss"]), colour, 5.0) for _, found, colour in reversed(marks)]
    told = [(name, colour, found["loss"]) for name, found, colour in marks] + ([] if plain is None else [("plain model", PLAIN, plain)])
    parts += _legend(told, has_curve=bool(curve))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" width="{WIDTH:g}" height="{HEIGHT:g}"'
    style = 'font-family="system-ui, sans-serif" role="img"'
    return "\n".join([f"{head} {style}>", f'<rect width="{WIDTH:g}" height="{HEIGHT:g}" fill="#ffffff"/>', *parts, "</svg>", ""])


class _Axis:
    """From numbers to places between `start` and `end`, with a margin around the numbers and round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        margin = 0.08 * (high - low) or max(abs(high), 1.0) * 0.05
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        self.step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
        first = math.ceil(self.low / self.step)
        self.ticks = [number * self.step for number in range(first, math.floor(self.high / self.step) + 1)]

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def told(self, tick: float) -> str:
        return f"{tick:.{max(-math.floor(math.log10(self.step) + 1e-9), 0)}f}"


def _grid(across: _Axis, up: _Axis) -> list[str]:
    """Return both axes: lines, numbers and what they count."""
    bottom, right, parts = HEIGHT - BOTTOM, WIDTH - RIGHT, []
    for tick in across.ticks:
        x = across.at(tick)
        parts.append(f'<path d="M{x:.1f} {TOP:g}V{bottom:g}" stroke="{FAINT}"/>')
        parts.append(_text(x, bottom + 20, across.told(tick), anchor="middle"))
    for tick in up.ticks:
        y = up.at(tick)
        parts.append(f'<path d="M{LEFT:g} {y:.1f}H{right:g}" stroke="{FAINT}"/>')
        parts.append(_text(LEFT - 8, y + 4, up.told(tick), anchor="end"))
    parts.append(f'<path d="M{LEFT:g} {TOP:g}V{bottom:g}H{right:g}" fill="none" stroke="{INK}"/>')
    parts.append(_text((LEFT + right) / 2, HEIGHT - 16, "blocks run per token", anchor="middle", size=14))
    middle = (TOP + bottom) / 2
    label = _text(20.0, middle, "loss, nats per token", anchor="middle", size=14)
    return [*parts, label.replace("<text ", f'<text transform="rotate(-90 20 {middle:.1f})" ', 1)]


def _legend(told: Sequence[tuple[str, str, float]], *, has_curve: bool) -> list[str]:
    x, y, parts = WIDTH - RIGHT + 18, TOP + 12, []
    if has_curve:
        parts += [f'<path d="M{x:g} {y:g}H{x + 18:g}" stroke="{CURVE}" stroke-width="2"/>', _disc(x + 9, y, CURVE, 4.0)]
        parts.append(_text(x + 26, y + 4, "at each budget"))
        y += 24
    for name, colour, loss in told:
        if name == "plain model":
            parts.append(f'<path d="M{x:g} {y:g}H{x + 18:g}" stroke="{colour}" stroke-width="1.5" stroke-dasharray="6 4"/>')
        else:
            parts.append(_disc(x + 9, y, colour, 5.0))
        parts.append(_text(x + 26, y + 4, f"{name}: {loss:.3f}"))
        y += 24
    return parts


def _disc(x: float, y: float, colour: str, radius: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}" stroke="#ffffff" stroke-width="1.2"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, colour: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
