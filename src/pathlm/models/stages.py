"""Curricula as data: a list of stages whose knobs change linearly inside a stage, each ending with a gate. Knows no family."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Gate:
    """What must hold for a stage to have succeeded: `metric comparison threshold`, and why."""

    metric: str
    comparison: Literal["<=", ">="]
    threshold: float
    reason: str

    def holds(self, value: float) -> bool:
        """Compare one measured value with the bound."""
        return value <= self.threshold if self.comparison == "<=" else value >= self.threshold


@dataclass(frozen=True)
class Stage:
    """A stretch of training. Float knobs move linearly from `start` to `end`; all others keep the value of `start`."""

    name: str
    steps: int | None
    """Number of optimizer steps; None in the last stage means "until the run ends"."""
    start: Any
    end: Any = None
    gates: tuple[Gate, ...] = ()

    def knobs(self, step: int) -> Any:
        """Return the knobs at `step`, counted from the start of the stage."""
        if self.end is None or not self.steps or self.steps < 2:
            return self.start
        share = min(max(step / (self.steps - 1), 0.0), 1.0)
        floats = {f.name: (getattr(self.start, f.name), getattr(self.end, f.name)) for f in fields(self.start)}
        moved = {name: (1 - share) * a + share * b for name, (a, b) in floats.items() if isinstance(a, float)}
        return replace(self.start, **moved)


@dataclass(frozen=True)
class Curriculum:
    """Stages in order. `at(step)` answers which one a step belongs to and with which knobs."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        """Refuse a curriculum that has no stage or that never leaves one before the last."""
        if not self.stages:
            raise ValueError("a curriculum needs at least one stage")
        for stage in self.stages[:-1]:
            if not stage.steps or stage.steps < 1:
                raise ValueError(f"stage {stage.name!r} has steps={stage.steps}: only the last stage may be open-ended")

    def at(self, step: int) -> tuple[Stage, Any]:
        """Return the stage of optimizer step `step` (from 0) and its knobs there; the last stage's after the end."""
        for stage in self.stages[:-1]:
            assert stage.steps is not None
            if step < stage.steps:
                return stage, stage.knobs(step)
            step -= stage.steps
        return self.stages[-1], self.stages[-1].knobs(step)
