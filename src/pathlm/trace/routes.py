"""Routes on a terminal: a line per token, in the colours of its route steps."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pathlm.path import Path, Step
from pathlm.words import fitted, label, readable, spelled

COLOURS = ("#8ecae6", "#b7e4c7", "#e9f5a5", "#ffe066", "#ffb870", "#ff8a80")
"""From few steps to many; dark text is readable on all of them."""
BAR = 8
"""Cells of the bar of the longest path."""


def show(found: Sequence[Sequence[Path]], console: Console) -> None:
    """Print the paths of some texts: a line per token, and the text in the colours of its tokens' route steps."""
    scale = Scale([steps(path) for paths in found for path in paths])
    for number, paths in enumerate(found, start=1):
        if len(found) > 1:
            console.print(f"[{number}/{len(found)}]", style="bold cyan", markup=False, highlight=False)
        console.print(table(paths, scale))
        console.print()
        console.print(sentence(paths, scale, coloured=console.color_system is not None and not console.no_color))
        console.print()
    console.print(scale.legend())
    if told := cost([path for paths in found for path in paths]):
        console.print(Text(told, "dim"))


class Scale:
    """Colours and bars for numbers of route steps, from the fewest to the most of those given."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = counts
        self.low, self.high = min(counts, default=0), max(counts, default=0)

    def style(self, count: int) -> Style:
        """Return dark text on the colour of this number of steps."""
        share = (count - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return Style(color="#1a1a1a", bgcolor=COLOURS[round(share * (len(COLOURS) - 1))])

    def bar(self, count: int) -> Text:
        """Return a bar and the number."""
        cells = round(count / self.high * min(self.high, BAR)) if self.high else 0
        return Text.assemble(("█" * cells, Style(color=self.style(count).bgcolor)), " " * (min(self.high, BAR) - cells), f" {count}")

    def legend(self) -> Text:
        """Return what the colours mean, and the mean."""
        shown = Text()
        for count in sorted(set(self.counts)):
            share = sum(c == count for c in self.counts) / len(self.counts)
            shown.append(f" {count} ", self.style(count)).append(f" {share:.0%}  ")
        mean = sum(self.counts) / max(len(self.counts), 1)
        return shown.append(f"route steps; {mean:.2f} on average over {len(self.counts):,} token{'s' * (len(self.counts) != 1)}", "dim")


def cost(paths: Sequence[Path]) -> str:
    """Return how many blocks were run per token, those before and after the pool included."""
    evaluations = [path.evaluations for path in paths]
    if not any(evaluations):
        return ""
    fixed = [path.evaluations - sum(step.node.count("block:") for step in path.route) for path in paths]
    mean, around = (sum(numbers) / len(paths) for numbers in (evaluations, fixed))
    return f"{mean:.2f} blocks run per token: {around:.2f} that nobody chooses, {mean - around:.2f} on routes"


def table(paths: Sequence[Path], scale: Scale | None = None) -> Table:
    """Return a table with a line per token: text, route steps, blocks run, path, how likely that was, and what almost happened.

    Blocks that nobody chose, before and after the route, are dim.
    """
    scale = scale or Scale([steps(path) for path in paths])
    shown = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    shown.add_column("token", no_wrap=True)
    shown.add_column("steps", no_wrap=True)
    shown.add_column("blocks", justify="right", no_wrap=True)
    shown.add_column("path", overflow="fold")
    shown.add_column("p", justify="right", no_wrap=True)
    shown.add_column("almost", no_wrap=True)
    for path, spelling in zip(paths, spelled([path.text for path in paths]), strict=True):
        probability = 1.0
        for step in path.steps:
            probability *= step.score
        rivals = [rival for step in path.steps for rival in step.rivals]
        node, score = max(rivals, key=lambda rival: rival[1], default=("", 0.0))
        almost = f"{label(node)} {score:.2f}" if node else ""
        numbers = (scale.bar(steps(path)), str(path.evaluations or "–"), _shaded(path), f"{probability:.3f}")
        shown.add_row(Text(fitted(spelling.name)), *numbers, Text(almost, style="dim"))
    return shown


def sentence(paths: Sequence[Path], scale: Scale | None = None, *, coloured: bool = True) -> Text:
    """Return the text of some tokens, each in the colour of its route steps, or with their number behind it."""
    scale = scale or Scale([steps(path) for path in paths])
    text = Text()
    for path, spelling in zip(paths, spelled([path.text for path in paths]), strict=True):
        count = steps(path)
        text.append(readable(spelling.text), scale.style(count) if coloured else None)
        if not coloured:
            text.append(str(count).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")))
        if "\n" in path.text:
            text.append("\n")
    return text


def steps(path: Path) -> int:
    """Return how many route steps a path has: those that a budget counts, without the blocks before and after the pool."""
    return len(path.route)


def route(path: Path) -> str:
    """Return a whole path in short, such as `B1 → B3 → B3 → OUT → B8`; four and more neighbours in a row as `B1 … B4`."""
    return " → ".join(part for part in _parts(path) if part)


def _parts(path: Path) -> tuple[str, str, str]:
    """Return what is before the route, the route with its exit, and what comes after."""
    end = path.first + len(path.route)
    end += end < len(path.steps) and path.steps[end].node == "exit"
    before, chosen, after = path.steps[: path.first], path.steps[path.first : end], path.steps[end:]
    return _shortened(before), _shortened(chosen), _shortened(after)


def _shaded(path: Path) -> Text:
    """Return a whole path in short, dim where nobody chose."""
    styles = ("dim", "", "dim")
    return Text(" → ").join(Text(part, style) for part, style in zip(_parts(path), styles, strict=True) if part)


def _shortened(steps: Sequence[Step]) -> str:
    names = [label(step.node) for step in steps]
    numbers = [int(name[1:]) if name[1:].isdigit() and name.startswith("B") else None for name in names]
    parts, place = [], 0
    while place < len(names):
        end, start = place + 1, numbers[place]
        while start is not None and end < len(names) and numbers[end] == start + end - place:
            end += 1
        parts.append(f"{names[place]} … {names[end - 1]}" if end - place >= 4 else " → ".join(names[place:end]))
        place = end
    return " → ".join(parts)
