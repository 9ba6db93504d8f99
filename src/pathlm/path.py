"""Steps and paths: the records that every family's computation is read as, and their JSON-lines form."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path as File


@dataclass(frozen=True, slots=True)
class Step:
    """One choice on a path: where the computation went, how sure it was, and what almost happened."""

    node: str
    """`"block:3"`, `"exit"`, or the token `"cat"`."""
    score: float
    """Router probability, or share of the signal's energy."""
    rivals: tuple[tuple[str, float], ...] = ()
    """Other nodes with their scores, best first."""


@dataclass(frozen=True, slots=True)
class Path:
    """The steps one token (BRIAN) or one sentence (BriLLM) took."""

    family: str
    text: str
    steps: tuple[Step, ...]

    def to_json(self) -> str:
        """Return the path as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Path:
        """Read what `to_json` wrote. Raises `ValueError` naming what is wrong with the line."""
        try:
            row = json.loads(line)
            steps = tuple(Step(s["node"], float(s["score"]), tuple((str(n), float(e)) for n, e in s["rivals"])) for s in row["steps"])
            return cls(str(row["family"]), str(row["text"]), steps)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a path record ({error!r}): {line[:80]!r}") from error


def write_paths(file: File | str, paths: Iterable[Path]) -> None:
    """Write paths to `file`, one JSON object a line."""
    with open(file, "w", encoding="utf-8") as out:
        out.writelines(path.to_json() + "\n" for path in paths)


def read_paths(file: File | str) -> Iterator[Path]:
    """Yield the paths that `write_paths` wrote."""
    with open(file, encoding="utf-8") as lines:
        yield from (Path.from_json(line) for line in lines if line.strip())
