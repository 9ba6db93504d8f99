"""What changes while a BRIAN model trains. A plain decoder has one stage and nothing to change."""

from __future__ import annotations

from dataclasses import dataclass

from pathlm.models.stages import Curriculum, Stage


@dataclass(frozen=True)
class Knobs:
    """The values that a stage sets for each step."""


def curriculum(name: str, steps: int) -> Curriculum:
    """Return the curriculum `name` for a run of `steps` optimizer steps. Raises `ValueError` for a name that does not exist."""
    if steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1")
    if name not in ("default", "plain"):
        raise ValueError(f"curriculum={name!r}: a plain decoder has only default (also called plain)")
    return Curriculum((Stage("plain", steps=None, start=Knobs()),))
