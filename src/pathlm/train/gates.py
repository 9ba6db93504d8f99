"""The end of a stage: its gates are judged, told and written; one that does not hold stops the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathlm.config import RunConfig, RunError
from pathlm.models.stages import Gate, Stage
from pathlm.train.sinks import append
from pathlm.train.state import State

FILE = "gates.jsonl"


@dataclass(frozen=True)
class Verdict:
    """What one gate said. `value` and `bound` are None where nothing was measured or there is nothing to compare with."""

    step: int
    stage: str
    gate: Gate
    value: float | None
    bound: float | None

    @property
    def passed(self) -> bool | None:
        """Whether the gate holds; None when it was not measured."""
        if self.value is None or self.bound is None:
            return None
        return self.gate.holds(self.value, self.bound)

    def row(self) -> dict[str, Any]:
        """Return the row of `gates.jsonl`."""
        gate = self.gate
        return {
            "step": self.step,
            "stage": self.stage,
            "metric": gate.metric,
            "value": _finite(self.value),
            "comparison": gate.comparison,
            "bound": _finite(self.bound),
            "passed": self.passed,
            "reason": gate.reason,
        }

    def __str__(self) -> str:
        """Return the number, its bound and the reason, for a person."""
        value = "not measured" if self.value is None else f"{self.value:.5g}"
        bound = "" if self.bound is None else f"{self.bound:.5g}"
        if self.gate.relative:
            since = f"{self.gate.threshold:+.5g} since the stage began"
            bound = f"{bound}, {since}" if bound else f"{since}, where nothing was measured"
        return f"{self.gate.metric} is {value}, must be {self.gate.comparison} {bound} ({self.gate.reason})"


Tell = Callable[[State, Stage, Sequence[Verdict]], None]


def begin(stage: Stage, measured: Mapping[str, float], state: State) -> None:
    """Note in `state` what was measured before the first step of `stage` with that step's knobs: its relative gates compare with it."""
    for gate in stage.gates:
        if gate.relative and (value := gate.better(state.measured.get(gate.metric), measured.get(gate.metric))) is not None:
            state.measured[gate.metric] = value


def close(stage: Stage, measured: Mapping[str, float], state: State, *, more: bool, tell: Tell | None) -> None:
    """End `stage`: judge its gates by what was `measured`, tell the verdicts, and note in `state` what later steps need.

    `more` says whether another stage follows. Comes before the checkpoint of this step, so that a run killed in between does it again.
    """
    verdicts = [
        Verdict(state.step, stage.name, gate, measured.get(gate.metric), gate.bound(state.measured.get(gate.metric)))
        for gate in stage.gates
    ]
    if tell is not None:
        tell(state, stage, verdicts)
    state.failed = [f"stage {stage.name!r}: {v}. {v.gate.advice}".strip() for v in verdicts if v.passed is False]
    if more:  # the end of a run is not the end of a stage when the run is prolonged
        state.measured = {name: value for name, value in measured.items() if not name.startswith("time/")}


def stage_ends(curriculum: Any, state: State, config: RunConfig) -> bool:
    """Tell whether a stage ended with the last finished step; the last stage ends with the run."""
    return state.step == config.steps or curriculum.ends(state.step - 1)


def check(state: State, curriculum: Any, config: RunConfig) -> None:
    """Raise `RunError` when the stage that ended with this step failed a gate, unless failures only warn. Its checkpoint is there.

    The last stage of a run that is now prolonged has not ended, whatever its gates said then.
    """
    if config.gates == "stop" and state.failed and stage_ends(curriculum, state, config):
        advice = (
            "To go on in spite of it: --resume --set gates=warn. To try again: another run that begins from earlier weights (init) "
            "with other knobs or more steps."
        )
        said = " ".join(state.failed)
        raise RunError(
            f"a gate failed at step {state.step}. {said} The checkpoint of this step is in {config.folder / 'checkpoints'}. {advice}"
        )


def reporter(run: Path, say: Callable[[str], None], *, steps: int, advise: bool) -> Tell:
    """Return what says verdicts and appends them to `gates.jsonl` in the folder `run`, for a run of `steps`.

    `advise` says what to try where a gate failed; a run that stops for it says so itself.
    """

    def tell(state: State, stage: Stage, verdicts: Sequence[Verdict]) -> None:
        if verdicts:
            file = run / FILE
            with file.open("ab", buffering=0) as out:
                append(out, file, [verdict.row() for verdict in verdicts])
        if verdicts or state.step < steps:
            passed = sum(verdict.passed is True for verdict in verdicts)
            say(f"stage {stage.name} ended at step {state.step}" + (f": {passed} of {len(verdicts)} gates passed" if verdicts else ""))
        for verdict in verdicts:
            word = {True: "passed", False: "FAILED", None: "not measured"}[verdict.passed]
            said = f"  {word}: {verdict}"
            if advise and verdict.passed is False and verdict.gate.advice:
                said += f". To try: {verdict.gate.advice.rstrip('.')}."
            say(said)

    return tell


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
