"""Signals on a terminal: a line per node that the signal went to, how strongly it arrived, out of what, and where else it nearly went."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pathlm.path import Path, Step
from pathlm.words import fitted, readable, spelled

SURE, CLOSE, BEATEN = "#b7e4c7", "#ffe066", "#ff8a80"
"""Colours of a node that most energy arrived at, one that shares the first place, and one that others were ahead of."""
BAR = 6
"""Cells of the bar of the strongest arrival."""
MADE_OF = 3
"""Parts of an energy that are named, the largest first."""
RIVALS = 3


def show(found: Sequence[Sequence[Path]], console: Console) -> None:
    """Print the paths of some texts: a line per node, and the text in the colours of its margins."""
    paths = [path for paths in found for path in paths]
    for number, path in enumerate(paths, start=1):
        if len(paths) > 1:
            console.print(f"[{number}/{len(paths)}]", style="bold cyan", markup=False, highlight=False)
        console.print(table(path))
        console.print()
        console.print(sentence(path, coloured=console.color_system is not None and not console.no_color))
        console.print()
    console.print(summary([step for path in paths for step in path.steps[1:]]))


def table(path: Path) -> Table:
    """Return a table with a line per step: its number, the node, the energy and its margin, what the energy is made of, the rivals."""
    shown = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    shown.add_column("step", justify="right", style="dim", no_wrap=True)
    shown.add_column("node", no_wrap=True)
    shown.add_column("energy", no_wrap=True)
    shown.add_column("margin", justify="right", no_wrap=True)
    shown.add_column("made of", overflow="fold")
    shown.add_column("rivals", overflow="fold")
    highest = max((step.score for step in path.steps), default=0.0)
    names = [spelling.name for spelling in spelled([step.node for step in path.steps])]
    for number, step in enumerate(path.steps):
        if number == 0:
            shown.add_row("0", Text(fitted(names[0])), Text("–", "dim"), "", Text("the initial signal starts here", "dim"), "")
            continue
        cells = max(round(step.score / highest * BAR), 0) if highest else 0
        energy = Text.assemble(("█" * cells, _colour(step)), " " * (BAR - cells), f" {step.score:.3f}")
        margin = Text("" if step.margin is None else f"{step.margin:+.3f}", _colour(step))
        rivals = Text("  ".join(f"{_named(name)} {energy:.3f}" for name, energy in step.rivals[:RIVALS]), "dim")
        shown.add_row(str(number), Text(fitted(names[number])), energy, margin, _made_of(step, names), rivals)
    return shown


def sentence(path: Path, *, coloured: bool = True) -> Text:
    """Return the text, each node in the colour of its margin; without colours, the nodes that others were ahead of in brackets."""
    text = Text()
    for number, (step, spelling) in enumerate(zip(path.steps, spelled([step.node for step in path.steps]), strict=True)):
        word = readable(spelling.text)
        if coloured:
            text.append(word, Style(color="#1a1a1a", bgcolor=_colour(step)) if number else None)
        else:
            text.append(f"[{word}]" if _colour(step) == BEATEN and number else word)
        if "\n" in step.node:
            text.append("\n")
    return text


def summary(steps: Sequence[Step]) -> Text:
    """Return what the colours mean, and how often each of them came."""
    shown = Text()
    for colour, meaning in ((SURE, "most energy"), (CLOSE, "as much as another"), (BEATEN, "others had more")):
        if many := sum(_colour(step) == colour for step in steps):
            shown.append(f" {many} ", Style(color="#1a1a1a", bgcolor=colour)).append(f" {meaning}  ", "dim")
    margins = [step.margin for step in steps if step.margin is not None]
    mean = sum(margins) / max(len(margins), 1)
    return shown.append(f"of {len(steps):,} steps; margin {mean:+.3f} on average; parts are shares of the energy", "dim")


def _colour(step: Step) -> str:
    margin = step.margin
    return SURE if margin is None or margin > 0 else CLOSE if margin == 0 else BEATEN


def _made_of(step: Step, names: Sequence[str]) -> Text:
    """Return the largest parts of an energy in percent, and the sum of the others."""
    if not step.score or not step.parts:
        return Text()
    largest = sorted(step.parts, key=lambda part: -abs(part[1]))
    shown, others = largest[:MADE_OF], largest[MADE_OF:]
    text = Text("  ").join(_part(_source(name, names), number / step.score) for name, number in shown)
    if others:
        text.append(f"  {len(others)} other{'s' * (len(others) > 1)} {_percent(sum(number for _, number in others) / step.score)}", "dim")
    return text


def _percent(share: float) -> str:
    return f"{round(100 * share)}%"


def _part(name: str, share: float) -> Text:
    return Text.assemble(name, (f" {_percent(share)}", "bold" if share > 0 else "red"))


def _source(name: str, names: Sequence[str]) -> str:
    """Return the node of a step that a part comes from, with its number; other parts by their names."""
    place = 0 if name == "signal" else int(name.removeprefix("step:")) if name.startswith("step:") else None
    return name if place is None else f"{fitted(names[place], 12)}({place})"


def _named(node: str) -> str:
    return fitted(node, 40)
