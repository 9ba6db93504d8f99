"""Measuring models: text beside n-grams (`run`), routes, synthetic tasks, multiple choice; and what runs recorded, judged and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlm.evaluate.compare import run

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    """Import `run` on first use: what only reads folders (`recorded`, `gates`, `lineup`) needs no torch."""
    if name != "run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pathlm.evaluate.compare import run

    globals()[name] = run
    return run
