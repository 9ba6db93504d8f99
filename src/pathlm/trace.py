"""`pathlm trace`: the path of every token of a text, on a terminal and as JSON lines, for models of every family."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path as File
from typing import Any

import torch
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pathlm.evaluate.checkpoint import check_budget, check_share, evaluating, open_model
from pathlm.generate import context_of, encode_prompt
from pathlm.path import Path, Step, write_paths

COLOURS = ("#8ecae6", "#b7e4c7", "#e9f5a5", "#ffe066", "#ffb870", "#ff8a80")
"""From few steps to many; dark text is readable on all of them."""
BAR = 8
"""Cells of the bar of the longest path."""
TOKEN = 24
"""Cells of a token at most, in the table."""
_MARKS = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\x1b": "␛", "\x00": "␀"}


def run(
    folder: File | str,
    texts: Sequence[str] = ("",),
    *,
    budget: float | None = None,
    out: File | str | None = None,
    device: str | None = None,
    console: Console | None = None,
) -> list[list[Path]]:
    """Read texts with the model of a run, checkpoint or Hugging Face folder; return the paths of each text's tokens.

    A text's first path is that of the start token before it. `budget` is the share of its route steps that a routed model may take. With a
    console the paths are printed on it, a line per token; `out` names a file for them, a `Path` record a line, one text after the other.
    Raises `ValueError` for a model that tells no paths, a text longer than its context, and a budget that it was not trained for.
    """
    check_share(budget)
    if out is not None and not File(out).parent.is_dir():
        raise FileNotFoundError(f"out={str(out)!r}: the folder {str(File(out).parent)!r} does not exist")
    model, tokenizer = open_model(folder, device=device)
    if tokenizer is None:
        raise ValueError(f"model folder {str(folder)!r} has no tokenizer; text cannot be turned into tokens")
    found = trace(model, tokenizer, texts, budget=budget)
    if out is not None:
        write_paths(out, (path for paths in found for path in paths))
    if console is not None:
        show(found, console)
        if out is not None:
            console.print(f"{sum(map(len, found)):,} paths written to {out}", style="dim", highlight=False, soft_wrap=True)
    return found


def trace(model: Any, tokenizer: Any, texts: Sequence[str], *, budget: float | None = None) -> list[list[Path]]:
    """Return, per text, the path of every token, its start token first. Raises `ValueError` as `run` does."""
    from pathlm.models import family

    kind = model.config.model_type
    if kind == "llama":
        raise ValueError("a Llama model tells no paths; `pathlm convert FOLDER OUT` makes a plain decoder of it, --wrap a routed one")
    package = family(kind)
    options = check_budget(model, budget)
    context, rows = context_of(model), [encode_prompt(tokenizer, text) for text in texts]
    for number, row in enumerate(rows, start=1):
        if not row:
            raise ValueError(f"text {number} is empty, and the tokenizer has no start token")
        if context is not None and len(row) > context:
            raise ValueError(f"text {number} has {len(row):,} tokens: the model reads at most max_position_embeddings={context:,}; cut it")
    found = []
    with evaluating(model), torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row], device=model.device)
            found.append(package.paths(model(input_ids=ids, use_cache=False, trace=True, **options), tokenizer))
    return found


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
        return shown.append(f"route steps; {mean:.2f} on average over {len(self.counts):,} tokens", "dim")


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
    for path in paths:
        probability = 1.0
        for step in path.steps:
            probability *= step.score
        rivals = [rival for step in path.steps for rival in step.rivals]
        node, score = max(rivals, key=lambda rival: rival[1], default=("", 0.0))
        almost = f"{label(node)} {score:.2f}" if node else ""
        numbers = (scale.bar(steps(path)), str(path.evaluations or "–"), _shaded(path), f"{probability:.3f}")
        shown.add_row(Text(_fitted(path.text)), *numbers, Text(almost, style="dim"))
    return shown


def sentence(paths: Sequence[Path], scale: Scale | None = None, *, coloured: bool = True) -> Text:
    """Return the text of some tokens, each in the colour of its route steps, or with their number behind it."""
    scale = scale or Scale([steps(path) for path in paths])
    text = Text()
    for path in paths:
        count = steps(path)
        text.append(readable(path.text), scale.style(count) if coloured else None)
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


def label(node: str) -> str:
    """Return a node's name in short: `B3` for `block:3`, `OUT` for `exit`, a word as it can be read."""
    if node == "exit":
        return "OUT"
    if node.startswith("block:"):
        return "+".join(f"B{part.removeprefix('block:')}" for part in node.split("+"))
    return readable(node)


def readable(text: str) -> str:
    """Return a text that does nothing to a terminal: control characters, line ends and invisible ones are shown as signs.

    Right-to-left text is closed by a mark, so that what stands behind it stays in its place.
    """
    shown = "".join(_MARKS.get(c) or (c if _is_visible(c) else f"\\u{{{ord(c):x}}}") for c in text)
    if shown and unicodedata.combining(shown[0]):
        shown = "◌" + shown
    return shown + "\u200e" if any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in shown) else shown


def _is_visible(c: str) -> bool:
    return c == " " or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _fitted(text: str) -> str:
    """Return a readable text of at most `TOKEN` cells, with its spaces shown at both ends."""
    shown = readable(text)
    inner = shown.strip(" ")
    begun = len(shown) - len(shown.lstrip(" "))
    shown = "·" * begun + inner + "·" * (len(shown) - begun - len(inner))
    return shown if cell_len(shown) <= TOKEN else set_cell_size(shown, TOKEN - 1) + "…"
