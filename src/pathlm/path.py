"""Steps and paths: the records that every family's computation is read as, and their JSON-lines form."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path as File
from typing import Any, TypeVar

PATHS, NEIGHBOURS = "paths.jsonl", "neighbours.jsonl"
"""Files of a run folder that hold such records."""
T = TypeVar("T")
_WRONG = (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError)
"""What a line of JSON that is no record of ours may raise."""


@dataclass(frozen=True, slots=True)
class Step:
    """One choice on a path: where the computation went, how sure it was, and what almost happened."""

    node: str
    """`"block:3"`, `"block:3+block:5"` where two were visited at once, `"exit"`, or the token `"cat"`."""
    score: float
    """Router probability, 1 where there was no choice (BRIAN); energy with which the signal arrived, 0 at the first node (BriLLM)."""
    rivals: tuple[tuple[str, float], ...] = ()
    """Other nodes with their scores, best first. Nodes that are tied because no edge of their own leads there are one line (BriLLM)."""
    parts: tuple[tuple[str, float], ...] = ()
    """What the score is the sum of, exactly (BriLLM): `"signal"` is what the first node sent out, `"step:3"` what arrived at the path's
    step 3, `"earlier"` what came before those, `"bias"` the edge's own, `"position"` the position's."""
    rival_parts: tuple[tuple[float, ...], ...] = ()
    """The same of each rival's score, in the order of `rivals` and of `parts`."""

    @property
    def margin(self) -> float | None:
        """By how much the score exceeds that of the first rival, negative where it does not; None where there is none."""
        return self.score - self.rivals[0][1] if self.rivals else None


@dataclass(frozen=True, slots=True)
class Path:
    """The steps one token (BRIAN) or one sentence (BriLLM) took, in the order of the computation.

    A BRIAN token visits the blocks before the pool, which nobody chooses, then those of its route, leaves the pool (`exit`), and visits the
    blocks after the pool, which nobody chooses either. A plain decoder has no pool to leave: no `exit`, and an empty route.
    """

    family: str
    text: str
    steps: tuple[Step, ...]
    first: int = 0
    """How many steps come before the route, so which one is its first."""
    document: int | None = None
    """Which text the token is part of, counted from 0; None where nobody said."""

    @property
    def route(self) -> tuple[Step, ...]:
        """The steps that were chosen: from `first` up to `exit`, or up to the end where there is none."""
        nodes = [step.node for step in self.steps]
        return self.steps[self.first : nodes.index("exit", self.first) if "exit" in nodes[self.first :] else None]

    @property
    def evaluations(self) -> int:
        """How many blocks were run, before, in and after the route."""
        return sum(part.startswith("block:") for step in self.steps for part in step.node.split("+"))

    def to_dict(self) -> dict[str, Any]:
        """Return the path as what JSON is made of."""
        row = asdict(self)
        if self.document is None:
            del row["document"]
        for step in row["steps"]:
            for name in ("parts", "rival_parts"):
                if not step[name]:
                    del step[name]
        return row

    def to_json(self) -> str:
        """Return the path as one line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Path:
        """Read what `to_json` wrote. Raises `ValueError` naming what is wrong with the line."""
        try:
            row = json.loads(line)
            steps = tuple(_step(step) for step in row["steps"])
            document = row.get("document")
            path = cls(str(row["family"]), str(row["text"]), steps, int(row.get("first", 0)), None if document is None else int(document))
            if not 0 <= path.first <= len(steps):
                raise ValueError(f"first={path.first} of {len(steps)} steps")
            return path
        except _WRONG as error:
            raise ValueError(f"not a path record ({error!r}): {line[:80]!r}") from error


def _step(row: dict[str, Any]) -> Step:
    rivals, parts = _pairs(row.get("rivals", ())), _pairs(row.get("parts", ()))
    of_rivals = tuple(tuple(map(float, numbers)) for numbers in row.get("rival_parts", ()))
    if of_rivals and [len(numbers) for numbers in of_rivals] != [len(parts)] * len(rivals):
        raise ValueError(f"rival_parts of {row['node']!r} must be {len(parts)} numbers for each of {len(rivals)} rivals")
    return Step(str(row["node"]), float(row["score"]), rivals, parts, of_rivals)


def write_paths(file: File | str, paths: Iterable[Path]) -> None:
    """Write paths to `file`, one JSON object a line."""
    with open(file, "w", encoding="utf-8") as out:
        out.writelines(path.to_json() + "\n" for path in paths)


def read_paths(file: File | str) -> Iterator[Path]:
    """Yield the paths that `write_paths` wrote. Raises `ValueError` naming the file, the line and what is wrong with it."""
    yield from _read(file, Path.from_json)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The edges of one node of a signal graph, with the energy that a signal which starts on one side has on the other."""

    node: str
    leads_to: tuple[tuple[str, float], ...]
    """Nodes that it has an edge of its own to, with their energies if a text began at it, best first; the first of them only."""
    comes_from: tuple[tuple[str, float], ...]
    """Nodes that have an edge of their own to it, with its energy if a text began at them, best first; the first of them only."""
    leads: int
    """How many edges of its own leave it."""
    comes: int
    """How many lead to it."""
    shared: float | None
    """The energy of every node to which it has no edge of its own; None where there is none."""

    def to_json(self) -> str:
        """Return the record as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Neighbours:
        """Read what `to_json` wrote. Raises `ValueError` naming what is wrong with the line."""
        try:
            row = json.loads(line)
            shared = row["shared"]
            return cls(
                str(row["node"]), _pairs(row["leads_to"]), _pairs(row["comes_from"]), int(row["leads"]), int(row["comes"]),
                None if shared is None else float(shared),
            )  # fmt: skip
        except _WRONG as error:
            raise ValueError(f"not a record of neighbours ({error!r}): {line[:80]!r}") from error


def write_neighbours(file: File | str, records: Iterable[Neighbours]) -> None:
    """Write neighbours to `file`, one JSON object a line."""
    with open(file, "w", encoding="utf-8") as out:
        out.writelines(record.to_json() + "\n" for record in records)


def read_neighbours(file: File | str) -> Iterator[Neighbours]:
    """Yield what `write_neighbours` wrote. Raises `ValueError` naming the file, the line and what is wrong with it."""
    yield from _read(file, Neighbours.from_json)


def _pairs(rows: Iterable[Any]) -> tuple[tuple[str, float], ...]:
    return tuple((str(name), float(number)) for name, number in rows)


def _read(file: File | str, record: Callable[[str], T]) -> Iterator[T]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield record(line.decode("utf-8"))
                except ValueError as error:
                    raise ValueError(f"{file}, line {number}: {error}") from error
