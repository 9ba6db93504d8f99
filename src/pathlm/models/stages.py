"""Curricula as data: a list of stages whose knobs change linearly inside a stage, each ending with a gate. Knows no family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints


@dataclass(frozen=True)
class Gate:
    """What must hold for a stage to have succeeded: `metric comparison bound`, and why. `bound` is `threshold` unless `relative`."""

    metric: str
    """As an evaluation row names it, for instance `validation/loss`."""
    comparison: Literal["<=", ">="]
    threshold: float
    reason: str
    advice: str = ""
    """What to try when it does not hold."""
    relative: bool = False
    """The bound is `threshold` above what the same metric was when the stage began: as the stage before left it, or with the knobs of this
    stage's first step, whichever is better."""

    def bound(self, before: float | None) -> float | None:
        """Return the number to compare with, given the metric `before` this stage; None where a relative gate has none to start from."""
        if not self.relative:
            return self.threshold
        return None if before is None else before + self.threshold

    def better(self, one: float | None, other: float | None) -> float | None:
        """Return the value that is harder to live up to; what was not measured, or is no number, is no value."""
        known = [value for value in (one, other) if value is not None and math.isfinite(value)]
        return (min if self.comparison == "<=" else max)(known, default=None)

    def holds(self, value: float, bound: float) -> bool:
        """Compare one measured value with the bound. What is not a number never holds."""
        return value <= bound if self.comparison == "<=" else value >= bound


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

    def ends(self, step: int) -> bool:
        """Tell whether optimizer step `step` (from 0) is the last one of a stage. The last stage ends with the run, whenever that is."""
        for stage in self.stages[:-1]:
            assert stage.steps is not None
            step -= stage.steps
            if step == -1:
                return True
        return False

    def with_knobs(self, knobs: Mapping[str, Any]) -> Curriculum:
        """Return this curriculum with the values of some knobs replaced, for the whole length of the stages concerned.

        `{"noise": 0.5}` means every stage, `{"hand over.noise": 0.5}` and `{"hand over": {"noise": 0.5}}` that one, which wins.
        Raises `ValueError` naming a knob or a stage that does not exist, or a value of the wrong kind.
        """
        everywhere: dict[str, Any] = {}
        single: dict[str, dict[str, Any]] = {}
        for name, value in knobs.items():
            stage, dot, knob = name.rpartition(".")
            if isinstance(value, Mapping):
                single.setdefault(name, {}).update(value)
            elif dot:
                single.setdefault(stage, {})[knob] = value
            else:
                everywhere[name] = value
        names = [stage.name for stage in self.stages]
        if unknown := sorted(single.keys() - set(names)):
            raise ValueError(f"knobs: there is no stage {unknown[0]!r}; this curriculum has {', '.join(names)}")
        return Curriculum(tuple(_replaced(stage, everywhere | single.get(stage.name, {})) for stage in self.stages))


def _replaced(stage: Stage, values: Mapping[str, Any]) -> Stage:
    if not values:
        return stage
    known = get_type_hints(type(stage.start)) if stage.start is not None else {}
    fitting = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"knobs: there is no knob {name!r}; stage {stage.name!r} has {', '.join(sorted(known)) or 'none'}")
        kinds = get_args(known[name]) or (known[name],)
        if float in kinds and type(value) is int and int not in kinds:
            value = float(value)
        if type(value) not in kinds:
            allowed = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds if kind is not type(None))
            raise ValueError(f"knobs: {name}={value!r} must be of type {allowed}")
        fitting[name] = value
    try:
        end = stage.end if stage.end is None else replace(stage.end, **fitting)
        return replace(stage, start=replace(stage.start, **fitting), end=end)
    except ValueError as error:
        raise ValueError(f"knobs: {error}") from error
