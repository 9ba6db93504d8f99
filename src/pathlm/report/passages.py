"""Sentences to click through: every token with its path, as spans of a page and as the JSON that its script reads."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from pathlm.path import Path, Step
from pathlm.report.figure import Section, Table, signed, table, told
from pathlm.report.read import Run
from pathlm.words import Spelling, dotted, label, spelled, visible

LONGEST = 60
"""Characters of a token that are shown at most."""
DEEP = 6
"""Shades from the fewest route steps to the most."""
RIVALS = 5
PARTS = "◌ is a part of the character after it."
_OUTSIDE = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


@dataclass(frozen=True)
class Token:
    """A token of a sentence: what is shown, the class of its colour, and what a screen reader says."""

    text: str
    kind: str
    said: str
    ends_line: bool = False


@dataclass(frozen=True)
class Passages:
    """Sentences of one kind, what their colours mean, all tokens as a table, and the same as JSON for the page's script."""

    kind: str
    sentences: Sequence[Sequence[Token]]
    legend: Sequence[tuple[str, str]]
    numbers: Sequence[Table]
    data: Markup
    note: str


def section(run: Run) -> Section | None:
    """Return the traced sentences of a run; None where none were traced."""
    if not run.texts:
        return None
    signals = run.family == "brillm"
    passages = _signals(run) if signals else _routes(run)
    hint = "Choose a token, with the mouse or with Tab and the arrow keys, to see "
    hint += (
        "the energies, the rivals and what they are made of." if signals else "its path, how sure the router was, and what almost happened."
    )
    lead = "Each node in the colour of its margin: " if signals else "Each token in the colour of its route steps: "
    lead += "did most energy really arrive there? " if signals else "faint ones left early, strong ones went deep. "
    return Section("sentences", "Sentences", lead + hint, passages=passages)


def shown(text: str) -> str:
    """Return a token's text as it can stand in a page: nothing in it acts, and a very long one is cut, with its length."""
    cut = visible(text[: LONGEST + 1])
    return cut if len(text) <= LONGEST else f"{visible(text[:LONGEST])}… ({len(text):,} characters)"


def named(text: str) -> str:
    """Return a token's text as a name, outside of its sentence: spaces at its ends are dots."""
    return dotted(shown(text))


def as_json(value: Any) -> Markup:
    """Return JSON that can stand inside a script element: only ASCII, and nothing that could end the element."""
    return Markup(json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_OUTSIDE))


def _routes(run: Run) -> Passages:
    counts = [len(path.route) for paths in run.texts for path in paths]
    low, high = min(counts), max(counts)

    def colour(path: Path) -> str:
        return f"d{shade(len(path.route), low, high)}"

    spelling = [spelled([path.text for path in paths]) for paths in run.texts]
    texts = [[replace(path, text=it.name) for path, it in zip(*both, strict=True)] for both in zip(run.texts, spelling, strict=True)]
    sentences = [
        [Token(shown(it.text), colour(p), f"{shown(it.name)}, {_steps(len(p.route))}", "\n" in p.text) for p, it in zip(*both, strict=True)]
        for both in zip(run.texts, spelling, strict=True)
    ]
    legend = [(f"swatch d{shade(count, low, high)}", _steps(count)) for count in sorted(set(counts))]
    columns = ("token", "route steps", "blocks run", "path", "probability", "almost")
    numbers = [table(columns, [_row(path) for path in paths], f"Sentence {i}", rows_at_most=200) for i, paths in enumerate(texts, start=1)]
    data = [[_routed(path) for path in paths] for paths in texts]
    kept = sum(map(len, run.texts))
    note = "" if kept == run.traced else f"The first {kept:,} of {run.traced:,} traced tokens are shown."
    return Passages("routes", sentences, legend, numbers, as_json(data), f"{note} {_about_parts(spelling)}".strip())


def shade(count: int, low: int, high: int) -> int:
    """Return which of the shades stands for a number of route steps between the fewest and the most."""
    return round((count - low) / (high - low) * (DEEP - 1)) if high > low else 0


def _steps(count: int) -> str:
    return f"{count} route step{'' if count == 1 else 's'}"


def _row(path: Path) -> tuple[str, ...]:
    rivals = [rival for step in path.steps for rival in step.rivals]
    node, score = max(rivals, key=lambda rival: rival[1], default=("", 0.0))
    route = " → ".join(label(step.node) for step in path.steps)
    chance = math.prod(step.score for step in path.steps)
    almost = f"{label(node)} {told(score, 2)}" if node else "–"
    return named(path.text), str(len(path.route)), str(path.evaluations), route, told(chance), almost


def _routed(path: Path) -> dict[str, Any]:
    """Return a token's path for the script; the steps that nobody chose are told apart by their place."""
    chosen = len(path.route) + (path.first + len(path.route) < len(path.steps))
    return {
        "t": named(path.text),
        "first": path.first,
        "chosen": chosen,
        "blocks": path.evaluations,
        "steps": [[named(label(step.node)), _number(step.score), _rivals(step)] for step in path.steps],
    }


def _rivals(step: Step) -> list[list[Any]]:
    return [[named(label(name)), _number(score)] for name, score in step.rivals[:RIVALS]]


def _number(value: float) -> float | None:
    """Return a number with five digits; JSON has none that are not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def state(step: Step) -> str:
    """Return how a node stands beside its rivals: `sure`, `close` or `beaten`."""
    margin = step.margin
    return "sure" if margin is None or margin > 0 else "close" if margin == 0 else "beaten"


MEANING = {
    "sure": "most energy arrived here",
    "close": "as much as at another",
    "beaten": "others had more",
    "start": "where the signal starts",
}


def _signals(run: Run) -> Passages:
    paths = [path for paths in run.texts for path in paths]
    spelling = [spelled([step.node for step in path.steps]) for path in paths]
    sentences = [
        [_node(step, it, place) for place, (step, it) in enumerate(zip(path.steps, spells, strict=True))]
        for path, spells in zip(paths, spelling, strict=True)
    ]
    paths = [whole(path) for path in paths]
    used = {token.kind for sentence in sentences for token in sentence}
    legend = [(f"swatch {kind}", meaning) for kind, meaning in MEANING.items() if kind in used]
    columns = ("step", "node", "energy", "margin", "first rival", "its energy")
    numbers = [
        table(columns, [_signal_row(step, place) for place, step in enumerate(path.steps)], f"Sentence {i}", rows_at_most=200)
        for i, path in enumerate(paths, start=1)
    ]
    data = [[_signal(step, path) for step in path.steps] for path in paths]
    note = "" if len(paths) == run.traced else f"The first {len(paths):,} of {run.traced:,} traced sentences are shown."
    return Passages("signals", sentences, legend, numbers, as_json(data), f"{note} {_about_parts(spelling)}".strip())


def whole(path: Path) -> Path:
    """Return a signal's path whose nodes are named after the characters that they are parts of."""
    names = [it.name for it in spelled([step.node for step in path.steps])]
    return replace(path, steps=tuple(replace(step, node=name) for step, name in zip(path.steps, names, strict=True)))


def _about_parts(spelling: Sequence[Sequence[Spelling]]) -> str:
    """Say what stands for parts of characters, where there are some."""
    return PARTS if any(it.text != it.name for spells in spelling for it in spells) else ""


def _node(step: Step, spelling: Spelling, place: int) -> Token:
    kind = state(step) if place else "start"
    return Token(shown(spelling.text), kind, f"{shown(spelling.name)}, {MEANING[kind]}", "\n" in step.node)


def _signal_row(step: Step, place: int) -> tuple[str, ...]:
    name, energy = step.rivals[0] if step.rivals else ("–", None)
    return str(place), named(step.node), told(step.score) if place else "–", signed(step.margin, 3), named(name), told(energy)


def _signal(step: Step, path: Path) -> dict[str, Any]:
    return {
        "t": named(step.node),
        "e": _number(step.score),
        "rivals": [[named(name), _number(energy)] for name, energy in step.rivals],
        "parts": [[source(name, path), _number(value)] for name, value in step.parts],
        "theirs": [[_number(value) for value in values] for values in step.rival_parts],
    }


def source(name: str, path: Path) -> str:
    """Return where a part of an energy comes from, for a reader: the node of a step with its number, or the part's own name."""
    place = 0 if name == "signal" else None
    if name.startswith("step:") and name.removeprefix("step:").isdecimal():
        place = int(name.removeprefix("step:"))
    if place is None or place >= len(path.steps):
        return {"bias": "the edge's own", "position": "the position", "earlier": "all before"}.get(name, named(name))
    return f"{named(path.steps[place].node)} ({place})"
