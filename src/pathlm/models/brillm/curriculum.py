"""The stages of a BriLLM's training: one, as nothing about the computation changes on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pathlm.models.brillm.configuration import BrillmConfig
from pathlm.models.stages import Curriculum, Stage


@dataclass(frozen=True)
class Knobs:
    """The values that a stage sets for each step: none yet."""


def curriculum(
    name: str,
    steps: int,
    *,
    knobs: Mapping[str, Any] | None = None,
    stages: Mapping[str, float] | None = None,
    config: BrillmConfig | None = None,
    length: int | None = None,
) -> Curriculum:
    """Return the curriculum `default`; texts of any `length` have the same.

    Raises `ValueError` for another name, and for knobs and stages that there are not.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1")
    if name != "default":
        raise ValueError(f"curriculum={name!r}: a signal graph has default")
    if stages:
        raise ValueError(f"stages.{next(iter(stages))}={next(iter(stages.values()))}: the curriculum of a signal graph is one stage")
    return Curriculum((Stage("graph", None, Knobs()),)).with_knobs(knobs or {})
