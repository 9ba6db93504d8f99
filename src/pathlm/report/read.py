"""Reading a run folder: what must be right is refused with file and line, what may be missing becomes a note. Imports no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any, TypeVar

from pathlm.path import NEIGHBOURS, PATHS, Neighbours, Path, read_neighbours, read_paths

T = TypeVar("T")
ANSWERS = ("long-context.json", "synthetic.json", "choices.json")
FILES = ("run.json", "metrics.jsonl", "gates.jsonl", "gates.json", "eval.json", "routes.json", *ANSWERS, PATHS, NEIGHBOURS)
"""Files of a run folder that a page is made of; any of them may be absent, but not all."""
OTHER_FORM = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
"""What goes wrong where a file is JSON but not of the form that is expected"""
TOKENS, NODES = 600, 400
"""Tokens of routed texts, and nodes of signals, that are shown at most; all are counted."""
TRAVELS = 50_000
"""Paths whose transitions are counted at most where nobody else counted them."""


@dataclass
class Run:
    """What a run folder says. Fields of files that are absent are empty."""

    folder: File
    record: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    gates: list[dict[str, Any]] = field(default_factory=list)
    judged: list[dict[str, Any]] = field(default_factory=list)
    """What `pathlm gates` said last"""
    evaluations: dict[str, Any] = field(default_factory=dict)
    routes: dict[str, Any] = field(default_factory=dict)
    long_contexts: dict[str, Any] = field(default_factory=dict)
    synthetic: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)
    texts: list[list[Path]] = field(default_factory=list)
    """The first traced texts, a path per token (BRIAN) or one path each (BriLLM)"""
    traced: int = 0
    """How many paths there are in all"""
    transitions: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often the traced tokens went from one place of the pool to another"""
    neighbours: list[Neighbours] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What could not be read"""

    @property
    def name(self) -> str:
        """The run's name: that of its folder, under which its owner knows it."""
        return self.folder.resolve().name

    @property
    def model(self) -> dict[str, Any]:
        """The model's configuration."""
        return _mapping(self.record.get("model"))

    @property
    def family(self) -> str:
        """`brian`, `brillm` or what else the configuration or the paths say."""
        return str(self.model.get("model_type") or (self.texts[0][0].family if self.texts else ""))

    @property
    def has_text(self) -> bool:
        """Whether there is text to measure the run on: not for one that was trained on tasks alone."""
        data = _mapping(_mapping(self.record.get("config")).get("data"))
        return bool(data.get("corpus")) or not data.get("tasks")

    @property
    def pool(self) -> list[str]:
        """The blocks of the pool by name, counted from 1 over the whole model; empty for a model without one."""
        first, many = (self.model.get(name) for name in ("pre_blocks", "pool_blocks"))
        if isinstance(first, int) and isinstance(many, int):
            return [f"B{block}" for block in range(first + 1, first + many + 1)]
        seen = {place for pair in self.transitions for place in pair} - {"IN", "OUT"}
        return sorted(seen, key=lambda place: int(place.removeprefix("B")))

    def latest(self, name: str) -> float | int | None:
        """Return the last value of a metric, None where it was never logged."""
        return next((row[name] for row in reversed(self.metrics) if row.get(name) is not None), None)


def require(folder: File | str) -> None:
    """Raise `FileNotFoundError` where there is no such folder, and `ValueError` where it holds nothing to show."""
    place = File(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"run folder {str(folder)!r} {'is a file' if place.exists() else 'does not exist'}")
    if not any((place / name).is_file() for name in FILES):
        raise ValueError(f"run folder {str(folder)!r} holds nothing to show: expected one of {', '.join(FILES)}")


def read(folder: File | str) -> Run:
    """Read a run folder.

    Raises `FileNotFoundError` where there is none, and `ValueError` for one that holds nothing to show and for a damaged `run.json` or
    `metrics.jsonl`, naming file and line. Other files that are damaged are left out, with a note.
    """
    require(folder)
    place = File(folder)
    run = Run(place)
    if (place / "run.json").is_file():
        run.record = _object(place / "run.json")
    if (place / "metrics.jsonl").is_file():
        run.metrics = list(_rows(place / "metrics.jsonl", torn=True))
    run.gates = _optional(run, "gates.jsonl", lambda file: list(_rows(file, torn=True))) or []
    run.judged = _optional(run, "gates.json", lambda file: [_mapping(row) for row in _object(file)["rows"]]) or []
    run.evaluations = _optional(run, "eval.json", _object) or {}
    run.routes = _optional(run, "routes.json", _object) or {}
    run.long_contexts, run.synthetic, run.choices = (_optional(run, name, _object) or {} for name in ANSWERS)
    _optional(run, PATHS, lambda file: _take_paths(run, read_paths(file)))
    run.neighbours = _optional(run, NEIGHBOURS, lambda file: list(read_neighbours(file))) or []
    return run


def _take_paths(run: Run, paths: Iterable[Path]) -> None:
    """Keep the first texts whole, as far as they can be shown, and count the transitions of all of them."""
    shown = 0
    texts: list[list[Path]] = []
    for path in paths:
        run.traced += 1
        if run.traced <= TRAVELS:
            run.transitions.update(travel(path))
        signal = path.family == "brillm"
        fresh = not texts or signal or path.document != texts[-1][-1].document
        size = len(path.steps) if signal else 1
        if shown + size <= (NODES if signal else TOKENS) or not texts:
            if fresh:
                texts.append([])
            texts[-1].append(path)
            shown += size
        else:
            shown = NODES + TOKENS  # what comes later is not shown, however short it is
    run.texts = texts


def travel(path: Path) -> Iterator[tuple[str, str]]:
    """Yield a routed token's transitions through the pool, from IN over its blocks to OUT; of two blocks in a step the better one."""
    if not any(step.node == "exit" for step in path.steps):
        return
    before = "IN"
    for step in path.route:
        place = "B" + step.node.split("+")[0].removeprefix("block:")
        yield before, place
        before = place
    yield before, "OUT"


def _optional(run: Run, name: str, reader: Callable[[File], T]) -> T | None:
    """Return what a file says; None where there is none, and with a note where it is damaged."""
    file = run.folder / name
    if not file.is_file():
        return None
    try:
        return reader(file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = str(error) if str(file) in str(error) else f"{file}: {error!r}"
        run.notes.append(f"{said}; what it holds is not shown")
        return None


def _object(file: File) -> dict[str, Any]:
    """Read a JSON object. Raises `ValueError` naming the file and the line."""
    try:
        found = json.loads(file.read_bytes().decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # bytes that are no text, a number of thousands of digits, brackets without end
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}, line 1: must be a JSON object, is {type(found).__name__}")
    return found


def _rows(file: File, *, torn: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file. Raises `ValueError` naming the file and the line.

    A last line without its end is being written, or was torn by a kill: with `torn` it is left out.
    """
    with file.open("rb") as lines:
        for place, line in enumerate(lines, start=1):
            if not line.strip() or (torn and not line.endswith(b"\n")):
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {place}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {place}: must be a JSON object, is {type(row).__name__}")
            yield row


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
