"""What a chapter of the page is made of: sections, figures, tables, and things that are not there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

ROWS = 60
"""Rows of a table at most; a longer one is thinned evenly, and says so."""


@dataclass(frozen=True)
class Table:
    """Numbers beside a picture. The first cell of every row is its heading."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture with its legend, a caption in plain words, and its numbers."""

    title: str
    picture: Markup
    caption: str
    table: Table
    legend: Sequence[tuple[str, str]] = ()
    """Kind of mark and what it stands for"""


@dataclass(frozen=True)
class Section:
    """A question and its answer: figures, or texts to click through."""

    key: str
    title: str
    lead: str
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    """Tables that are the answer themselves"""
    passages: Any = None


@dataclass(frozen=True)
class Missing:
    """Something that this page would show, and the command that would add it."""

    what: str
    command: str


@dataclass
class Chapter:
    """Everything about one run."""

    key: str
    name: str
    facts: Sequence[tuple[str, str]]
    sections: list[Section] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str, *, rows_at_most: int = ROWS) -> Table:
    """Return a table, thinned evenly where it has more rows than can be read; its first and last row stay."""
    given = list(rows)
    if len(given) <= rows_at_most:
        return Table(columns, given, caption)
    kept = [given[round(i * (len(given) - 1) / (rows_at_most - 1))] for i in range(rows_at_most)]
    return Table(columns, kept, caption, f"{rows_at_most} of {len(given):,} rows, evenly spaced.")


def number(value: Any) -> float | None:
    """Return a finite number, or None for anything else: what was not measured, and what no number can be read from."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def told(value: Any, digits: int = 3) -> str:
    """Return a number with so many digits after the point, or a dash."""
    found = number(value)
    return "–" if found is None else f"{found:,.{digits}f}"


def signed(value: Any, digits: int = 2) -> str:
    """Return a number with its sign, or a dash; what rounds to nothing has none."""
    found = number(value)
    if found is None:
        return "–"
    if not round(found, digits):
        return f"{0:.{digits}f}"
    return f"{'+' if found > 0 else '−'}{abs(found):,.{digits}f}"


def percent(value: Any, digits: int = 1) -> str:
    """Return a share as a percentage, or a dash."""
    found = number(value)
    return "–" if found is None else f"{100 * found:.{digits}f} %"
