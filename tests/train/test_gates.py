"""The end of a stage: measured, judged, written and saved, whatever happens in between."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
from fake_family import FakeKnobs, config, curriculum, go
from reading import assert_same_end, metrics
from rich.console import Console
from test_resume import Killed, kill_at_disk_operation

from pathlm.config import RunError
from pathlm.models.stages import Curriculum, Gate, Stage
from pathlm.train import checkpoint, gates, loop, sinks
from pathlm.train.state import State

LEARNS = Gate("validation/loss", "<=", 3.0, "it learns")
HOT = Gate("validation/fake/heat", ">=", 1.0, "the last step of the stage has the final knobs")
HARD = Gate("validation/loss", "<=", 2.0, "it learns much", advice="Try more steps.")
STEADY = Gate("validation/loss", "<=", 0.01, "the loss does not collapse", relative=True)
ALL = {"warm": (LEARNS, HARD, HOT, STEADY), "hot": (STEADY, Gate("validation/none", ">=", 1.0, "nobody measures it"))}


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "gates.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nobody interrupted, with a failing gate that only warns."""
    return go(config(tmp_path_factory.mktemp("whole"), gates="warn", save_every=100, keep_last=9), gates=ALL).folder


def test_the_end_of_a_stage_is_measured_judged_and_saved(whole):
    assert [row["step"] for row in metrics(whole) if "validation/loss" in row] == [2, 3, 4, 6, 8]
    assert {3, 8} <= set(checkpoint.steps(whole / "checkpoints"))
    loss = {row["step"]: row["validation/loss"] for row in metrics(whole) if "validation/loss" in row}
    shown = [(r["step"], r["stage"], r["metric"], r["value"], r["comparison"], r["bound"], r["passed"]) for r in rows(whole)]
    assert shown == [
        (3, "warm", "validation/loss", loss[3], "<=", 3.0, True),
        (3, "warm", "validation/loss", loss[3], "<=", 2.0, False),
        (3, "warm", "validation/fake/heat", 1.0, ">=", 1.0, True),
        (3, "warm", "validation/loss", loss[3], "<=", rows(whole)[3]["bound"], True),
        (8, "hot", "validation/loss", loss[8], "<=", loss[3] + 0.01, True),
        (8, "hot", "validation/none", None, ">=", 1.0, None),
    ]
    assert [row["reason"] for row in rows(whole)][:2] == ["it learns", "it learns much"]


def measured_losses(monkeypatch) -> list[float]:
    """What every validation finds, in order, whether it is written or not."""
    found: list[float] = []
    real = loop.validate

    def watched(*args, **kwargs):
        numbers = real(*args, **kwargs)
        found.append(numbers["validation/loss"])
        return numbers

    monkeypatch.setattr(loop, "validate", watched)
    return found


def test_a_relative_gate_of_the_first_stage_compares_with_the_untrained_run(tmp_path, monkeypatch):
    found = measured_losses(monkeypatch)
    run = go(config(tmp_path), gates={"warm": (STEADY,)}).folder
    assert len(found) == len([row for row in metrics(run) if "validation/loss" in row]) + 1
    assert rows(run)[0]["bound"] == found[0] + 0.01 != found[2] + 0.01


@pytest.mark.parametrize("heat", [0.1, 1.6])
def test_a_relative_gate_compares_with_the_better_of_the_stage_before_and_its_own_first_knobs(tmp_path, monkeypatch, heat):
    found = measured_losses(monkeypatch)
    options = {"gates": "warn", "save_every": 100, "eval_every": 100, "knobs": {"hot.heat": heat}}
    run = go(config(tmp_path, **options), gates={"hot": (STEADY,)}).folder
    before, begun, _ = found
    assert before != begun and rows(run)[0]["bound"] == min(before, begun) + 0.01


def test_a_stage_that_was_begun_before_a_kill_compares_with_the_same_number(tmp_path, monkeypatch):
    options = {"gates": {"warm": (STEADY,), "hot": (STEADY,)}}
    whole = go(config(tmp_path / "whole", save_every=1), **options).folder
    real = State.advance

    def dies(state, *args):
        real(state, *args)
        if state.step == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(State, "advance", dies)
        with pytest.raises(Killed):
            go(config(tmp_path, save_every=1), **options)
    again = go(config(tmp_path, save_every=1), resume=True, **options).folder
    assert rows(again) == rows(whole)


def test_a_failing_gate_that_only_warns_says_number_bound_and_what_to_try_once(tmp_path):
    with (tmp_path / "said").open("w+") as file:
        go(config(tmp_path, gates="warn"), gates={"warm": (LEARNS, HARD)}, console=Console(file=file, width=300, color_system=None))
        file.seek(0)
        (line,) = [line for line in file.read().splitlines() if "Try more steps" in line]
    value = rows(tmp_path / "run")[1]["value"]
    assert line == f"  FAILED: validation/loss is {value:.5g}, must be <= 2 (it learns much). To try: Try more steps."


def test_a_failing_gate_stops_with_everything_a_person_needs_once_its_checkpoint_is_saved(tmp_path):
    with pytest.raises(RunError) as caught:
        go(config(tmp_path), gates={"warm": (LEARNS, HARD)})
    value = rows(tmp_path / "run")[1]["value"]
    said = str(caught.value)
    for part in (
        "step 3",
        "stage 'warm'",
        f"validation/loss is {value:.5g}, must be <= 2 ",
        "it learns much",
        "Try more steps.",
        "gates=warn",
    ):
        assert part in said
    assert "<= 3" not in said  # the one that passed
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") == 3
    assert metrics(tmp_path / "run")[-1]["step"] == 3


def test_a_failing_gate_is_met_again_on_resume_until_it_only_warns(tmp_path, whole):
    run = config(tmp_path, save_every=100)
    for resume in (False, True, True):
        with pytest.raises(RunError, match="Try more steps"):
            go(run, gates=ALL, resume=resume)
        assert len(rows(run.folder)) == 4
    go(config(tmp_path, save_every=100, gates="warn"), gates=ALL, resume=True)
    assert_same_end(run.folder, whole)
    assert (run.folder / "gates.jsonl").read_bytes() == (whole / "gates.jsonl").read_bytes()


def test_the_last_stage_fails_again_on_resume_too_and_may_be_prolonged(tmp_path):
    options = {"save_every": 100, "optim": {"schedule": "constant"}}
    failing = {"hot": (HARD,)}
    run = config(tmp_path, **options)
    for resume in (False, True):
        with pytest.raises(RunError, match="stage 'hot': validation/loss"):
            go(run, gates=failing, resume=resume)
    assert checkpoint.newest(run.folder / "checkpoints") == 8
    assert go(config(tmp_path, gates="warn", **options), gates=failing, resume=True).finished_before
    with pytest.raises(RunError, match="step 12"):
        go(config(tmp_path, steps=12, **options), gates=failing, resume=True)
    assert [row["step"] for row in rows(run.folder)] == [8, 12]


def test_a_prolonged_run_compares_with_the_stage_before_and_not_with_its_former_end(tmp_path):
    relative = {"hot": (STEADY,)}
    optim = {"schedule": "constant"}
    long = go(config(tmp_path / "long", steps=12, optim=optim), gates=relative).folder
    go(config(tmp_path / "short", optim=optim), gates=relative)
    short = go(config(tmp_path / "short", steps=12, optim=optim), gates=relative, resume=True).folder
    assert rows(short)[-1] == rows(long)[-1]
    assert_same_end(short, long)


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_disk_operation_a_staged_run_resumes_to_the_same_end(tmp_path, whole, every):
    for number in itertools.count(step=every):
        folder = tmp_path / str(number)
        run = config(folder, gates="warn", save_every=100)
        with pytest.MonkeyPatch.context() as patch:
            kill_at_disk_operation(patch, number)
            try:
                go(run, gates=ALL)
            except Killed:
                pass
            else:
                break
        go(run, gates=ALL, resume=True)
        assert_same_end(run.folder, whole)
        assert (run.folder / "gates.jsonl").read_bytes() == (whole / "gates.jsonl").read_bytes()
    assert number > 30  # the run really was that long


@pytest.mark.parametrize(
    ("place", "name", "first"),
    [(loop, "validate", True), (loop, "validate", False), (gates, "close", True), (gates, "append", False), (gates, "check", True)],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.parametrize("step", [3, 8])
def test_killed_around_the_end_of_a_stage_a_run_does_the_same_again(tmp_path, whole, place, name, first, step, monkeypatch):
    """Killed before (`first`) or after the call that belongs to the end of a stage."""
    real, steps = getattr(place, name), []
    note = State.advance

    def advance(state, *args):
        note(state, *args)
        steps.append(state.step)

    def deadly(*args, **kwargs):
        if steps and steps[-1] == step and not first:
            real(*args, **kwargs)
        if steps and steps[-1] == step:
            raise Killed
        return real(*args, **kwargs)

    run = config(tmp_path, gates="warn", save_every=100)
    monkeypatch.setattr(State, "advance", advance)
    monkeypatch.setattr(place, name, deadly)
    with pytest.raises(Killed):
        go(run, gates=ALL)
    monkeypatch.undo()
    with (tmp_path / "run" / "gates.jsonl").open("a") as out:
        out.write('{"step": 9, "sta')  # a line the kill tore
    if step == 3:
        with pytest.raises(RunError, match="Try more steps"):
            go(config(tmp_path, save_every=100), gates=ALL, resume=True)
    go(run, gates=ALL, resume=True)
    assert_same_end(run.folder, whole)
    assert (run.folder / "gates.jsonl").read_bytes() == (whole / "gates.jsonl").read_bytes()


def test_without_a_validation_split_gates_are_not_measured_and_stop_nothing(tmp_path):
    run = go(config(tmp_path), gates={"warm": (HARD,)}, validation=None).folder
    assert [(row["value"], row["bound"], row["passed"]) for row in rows(run)] == [(None, 2.0, None)]


def test_a_number_that_is_not_finite_passes_no_gate(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "validate", lambda *a, **k: {"validation/loss": float("nan")})
    with pytest.raises(RunError, match="validation/loss is nan, must be <= 3"):
        go(config(tmp_path), gates={"warm": (LEARNS,)})
    assert [(row["value"], row["passed"]) for row in rows(tmp_path / "run")] == [(None, False)]


def test_a_curriculum_without_gates_writes_no_gates(tmp_path):
    assert not (go(config(tmp_path)).folder / "gates.jsonl").exists()


def test_the_terminal_shows_the_end_of_each_stage_and_what_its_gates_said(tmp_path):
    for terminal in (False, True):
        with (tmp_path / "said").open("w+") as file:
            console = Console(file=file, width=200, force_terminal=terminal, color_system=None)
            go(config(tmp_path / str(terminal), gates="warn"), gates={"warm": (LEARNS, HARD)}, console=console)
            file.seek(0)
            said = file.read()
        assert said.count("stage warm ended at step 3: 1 of 2 gates passed") == 1
        assert "passed: validation/loss is" in said and "must be <= 3 (it learns)" in said
        assert "FAILED: validation/loss is" in said
        assert "stage hot ended" not in said  # the run's own last line says so


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_gates_stops_the_run_with_advice(tmp_path):
    (tmp_path / "gates.jsonl").symlink_to("/dev/full")
    tell = gates.reporter(tmp_path, print, steps=8, advise=False)
    verdict = gates.Verdict(3, "warm", LEARNS, 2.5, 3.0)
    with pytest.raises(RunError, match=r"gates\.jsonl could not be written at step 3.*--resume"):
        tell(State(step=3), Stage("warm", 3, None), [verdict])


def test_gates_are_made_durable_with_the_checkpoint(tmp_path, monkeypatch):
    flushed = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda file, *a, **k: flushed.append(Path(file).name) or real(file, *a, **k))
    go(config(tmp_path), gates={"warm": (LEARNS,)})
    assert "gates.jsonl" in flushed and "metrics.jsonl" in flushed


def test_a_checkpoint_written_before_there_were_gates_can_be_continued(tmp_path, whole):
    import torch

    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    (tmp_path / "run" / "gates.jsonl").unlink()
    file = checkpoint.path(tmp_path / "run" / "checkpoints", checkpoint.newest(tmp_path / "run" / "checkpoints")) / "training_state.pt"
    content = torch.load(file, weights_only=True)
    for name in ("measured", "failed"):
        del content["state"][name]
    torch.save(content, file)
    assert go(config(tmp_path, gates="warn", save_every=100), gates=ALL, resume=True).step == 8
    assert [row["passed"] for row in rows(tmp_path / "run")] == [None, None]


def test_a_gate_compares_with_its_bound():
    assert Gate("x", "<=", 1.0, "").holds(1.0, 1.0) and not Gate("x", "<=", 1.0, "").holds(1.1, 1.0)
    assert Gate("x", ">=", 1.0, "").holds(1.0, 1.0) and not Gate("x", ">=", 1.0, "").holds(0.9, 1.0)
    assert not Gate("x", ">=", 1.0, "").holds(float("nan"), 1.0)
    assert Gate("x", "<=", 0.5, "").bound(2.0) == 0.5
    relative = Gate("x", "<=", 0.5, "", relative=True)
    assert (relative.bound(2.0), relative.bound(None)) == (2.5, None)
    assert relative.better(2.0, 1.0) == relative.better(None, 1.0) == relative.better(float("nan"), 1.0) == 1.0
    assert Gate("x", ">=", 0.5, "", relative=True).better(2.0, 1.0) == 2.0 and relative.better(None, None) is None


def test_a_relative_gate_says_that_it_compares_with_the_start_of_the_stage():
    assert str(gates.Verdict(8, "hot", STEADY, 2.5, 2.0)).startswith("validation/loss is 2.5, must be <= 2, +0.01 since the stage began (")
    assert "must be <= +0.01 since the stage began, where nothing was measured" in str(gates.Verdict(8, "hot", STEADY, 2.5, None))


def test_taking_over_may_cost_the_loss_next_to_nothing():
    from pathlm.models.brian.curriculum import STAGES

    (gate,) = [gate for stage in STAGES if stage.name == "hand-over" for gate in stage.gates if gate.metric == "validation/loss"]
    assert gate.relative and gate.comparison == "<=" and 0 < gate.threshold <= 0.02


def test_the_router_imitates_before_it_takes_over_and_not_while_it_does():
    from pathlm.models.brian.curriculum import STAGES

    weights = {stage.name: {stage.start.imitation, (stage.end or stage.start).imitation} for stage in STAGES}
    assert {name for name, weight in weights.items() if weight != {0.0}} == {"wrapped", "pseudo-routes"}


def test_a_curriculum_knows_the_last_step_of_each_stage_but_the_last():
    three = Curriculum((Stage("a", 2, None), Stage("b", 1, None), Stage("c", 4, None)))
    assert [step for step in range(-1, 12) if three.ends(step)] == [1, 2]
    assert not any(Curriculum((Stage("a", None, None),)).ends(step) for step in range(5))


def test_knobs_are_replaced_everywhere_or_in_one_stage():
    def heats(knobs):
        changed = curriculum(8, knobs=knobs)
        return [changed.at(step)[1].heat for step in range(5)]

    assert heats({}) == [0.5, 0.75, 1.0, 1.0, 1.0]
    assert heats({"heat": 2}) == [2.0] * 5
    assert heats({"warm.heat": 2.0}) == heats({"warm": {"heat": 2.0}}) == [2.0, 2.0, 2.0, 1.0, 1.0]
    assert heats({"warm.heat": 2.0, "heat": 3.0}) == heats({"heat": 3.0, "warm.heat": 2.0}) == [2.0, 2.0, 2.0, 3.0, 3.0]
    assert isinstance(curriculum(8, knobs={"heat": 2}).at(0)[1], FakeKnobs) and isinstance(heats({"heat": 2})[0], float)


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"heet": 1.0}, "no knob 'heet'; stage 'warm' has heat"),
        ({"hot.heet": 1.0}, "no knob 'heet'; stage 'hot' has heat"),
        ({"cold.heat": 1.0}, "no stage 'cold'; this curriculum has warm, hot"),
        ({"heat": "much"}, "heat='much' must be of type float"),
        ({"heat": True}, "heat=True must be of type float"),
    ],
)
def test_a_wrong_knob_is_named_before_anything_is_written(tmp_path, knobs, named):
    with pytest.raises(ValueError, match=named):
        go(config(tmp_path, knobs=knobs))
    assert not (tmp_path / "run").exists()


def test_other_knobs_cannot_continue_a_run(tmp_path):
    go(config(tmp_path, steps=3))
    with pytest.raises(ValueError, match=r"knobs=\{'heat': 2\.0\} .the run has \{\}"):
        go(config(tmp_path, steps=3, knobs={"heat": 2.0}), resume=True)


def test_rows_of_gates_later_than_a_checkpoint_are_forgotten(tmp_path):
    file = tmp_path / "gates.jsonl"
    file.write_text('{"step": 3}\n{"step": 3}\n{"step": 8}\n')
    sinks.truncate(file, 3)
    assert file.read_text() == '{"step": 3}\n{"step": 3}\n'
