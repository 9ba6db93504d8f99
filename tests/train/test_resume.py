import itertools
import os
import shutil
import signal
from pathlib import Path
from time import sleep

import pytest
import torch
from fake_family import FakeConfig, FakeRows, config, go
from reading import assert_same_end, metrics
from rich.console import Console

from pathlm.config import RunError
from pathlm.models.stages import Stage
from pathlm.train import checkpoint, loop, sinks
from pathlm.train.state import State


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it, so nothing is tidied up."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    return go(config(tmp_path_factory.mktemp("whole"))).folder


def kill_at_disk_operation(patch: pytest.MonkeyPatch, number: int) -> itertools.count:
    """Die just before the `number`-th operation that makes something durable or visible, and just after every second one."""
    counter = itertools.count()

    def deadly(real):
        def call(*args, **kwargs):
            at = next(counter)
            if at == number:
                if at % 2:
                    real(*args, **kwargs)
                raise Killed
            return real(*args, **kwargs)

        return call

    for place, name in (
        (os, "replace"),
        (os, "fsync"),
        (shutil, "rmtree"),
        (shutil, "copyfile"),
        (Path, "symlink_to"),
        (Path, "mkdir"),
        (torch, "save"),
    ):
        patch.setattr(place, name, deadly(getattr(place, name)))
    return counter


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_disk_operation_resumes_to_the_same_end(tmp_path, whole, every):
    for number in itertools.count(step=every):
        folder = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            kill_at_disk_operation(patch, number)
            try:
                go(config(folder))
            except Killed:
                pass
            else:
                break
        go(config(folder), resume=True)
        assert_same_end(folder / "run", whole)
        leftovers = [p.name for p in (folder / "run" / "checkpoints").iterdir() if p.name.startswith(".")]
        assert not leftovers
        shutil.rmtree(folder)
    assert number > 40  # the run really was that long


@pytest.mark.parametrize("at", range(1, 9))
def test_a_run_killed_between_steps_resumes_to_the_same_end(tmp_path, whole, at, monkeypatch):
    real = sinks.wanted

    def deadly(run, state, row):
        if state.step == at and "validation/loss" not in row:
            raise Killed
        return real(run, state, row)

    monkeypatch.setattr(sinks, "wanted", deadly)
    with pytest.raises(Killed):
        go(config(tmp_path))
    monkeypatch.undo()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as out:
        out.write('{"step": 9, "loss')  # a line the kill tore
    result = go(config(tmp_path), resume=True)
    assert result.step == 8
    assert_same_end(tmp_path / "run", whole)


def test_a_run_may_be_killed_again_and_again(tmp_path, whole):
    for number in (9, 30, 21, 44, 15):
        with pytest.MonkeyPatch.context() as patch:
            kill_at_disk_operation(patch, number)
            try:
                go(config(tmp_path), resume=(tmp_path / "run").exists())
            except Killed:
                continue
    go(config(tmp_path), resume=True)
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("harm", ["missing", "dangling", "behind"])
def test_the_newest_checkpoint_counts_whatever_latest_points_to(tmp_path, whole, harm):
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "latest").unlink()
    shutil.rmtree(folder / "step-00000008")
    if harm != "missing":
        (folder / "latest").symlink_to("step-00000008" if harm == "dangling" else "step-00000004")
    result = go(config(tmp_path), resume=True)
    assert result.step == 8 and not result.finished_before
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["step", "validation", "save"])
def test_a_signal_saves_at_the_end_of_the_step_and_the_run_resumes_to_the_same_end(tmp_path, whole, number, moment, monkeypatch):
    rows, validation = FakeRows(), FakeRows(seed=10_000)
    before = signal.getsignal(number)

    def signalling(real, condition):
        sent = []

        def call(*args, **kwargs):
            if condition(*args) and not sent:
                sent.append(number)
                os.kill(os.getpid(), number)
            return real(*args, **kwargs)

        return call

    if moment == "save":
        monkeypatch.setattr(torch, "save", signalling(torch.save, lambda content, file: content["state"]["step"] == 3))
    elif moment == "validation":
        calls = itertools.count()
        validation.batch = signalling(validation.batch, lambda *a: next(calls) == 2)
    else:
        real = sinks.wanted
        monkeypatch.setattr(sinks, "wanted", signalling(real, lambda run, state, row: state.step == 5))
    said = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    result = go(config(tmp_path), rows=rows, validation=validation, console=said)
    said.file.close()
    assert result.interrupted == number and result.exit_code == 128 + number
    assert 0 < result.step < 8
    assert "--resume" in said.export_text()
    assert signal.getsignal(number) is before
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") == result.step
    monkeypatch.undo()
    go(config(tmp_path), resume=True)
    assert_same_end(tmp_path / "run", whole)


def test_the_second_ctrl_c_leaves_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)

    class Impatient(FakeRows):
        def batch(self, start, count):
            if self.seed == 10_000:
                os.kill(os.getpid(), signal.SIGINT)
                while signal.getsignal(signal.SIGINT) is not before:  # two signals that wait at once would be one
                    sleep(0.01)
                os.kill(os.getpid(), signal.SIGINT)
            return super().batch(start, count)

    with pytest.raises(KeyboardInterrupt):
        go(config(tmp_path), validation=Impatient(seed=10_000))
    assert go(config(tmp_path), resume=True).step == 8


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("operation", [(torch, "save"), (os, "fsync"), (os, "replace"), (shutil, "copyfile")])
def test_a_full_disk_leaves_the_earlier_checkpoint_loadable_and_says_so(tmp_path, whole, operation, monkeypatch):
    state_seen = []
    real = sinks.wanted

    def fill_up(run, state, row):
        if state.step == 5 and not state_seen:
            state_seen.append(5)
            monkeypatch.setattr(*operation, full_disk)
        return real(run, state, row)

    monkeypatch.setattr(sinks, "wanted", fill_up)
    with pytest.raises(RunError, match=r"No space left on device.*step 4 is intact.*--resume"):
        go(config(tmp_path, eval_every=4))
    monkeypatch.undo()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [3, 4]
    go(config(tmp_path, eval_every=4), resume=True)
    assert [row["step"] for row in metrics(tmp_path / "run") if "validation/loss" in row] == [3, 4, 8]  # a stage ends at 3
    assert [r for r in metrics(tmp_path / "run") if "loss/lm" in r] == [r for r in metrics(whole) if "loss/lm" in r]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_log_stops_the_run_with_advice(tmp_path):
    stage = Stage("only", None, None)
    with pytest.raises(RunError, match=r"full could not be written at step 1.*No space left.*--resume"):  # noqa: SIM117
        with sinks.jsonl(Path("/dev/full"), config(tmp_path)) as sink:
            sink(State(step=1), stage, {"loss/lm": 1.0}, None)


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "other format"])
def test_a_damaged_training_state_is_named(tmp_path, whole, damage):
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    file = tmp_path / "run" / "checkpoints" / "step-00000006" / "training_state.pt"
    content = file.read_bytes()
    if damage == "other format":
        torch.save({"format": 99}, file)
    else:
        file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "garbage": b"x" * 100}[damage])
    with pytest.raises(RunError, match=r"step-00000006/training_state\.pt"):
        go(config(tmp_path), resume=True)


def test_damaged_weights_are_named(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    file = tmp_path / "run" / "checkpoints" / "step-00000006" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(RunError, match=r"step-00000006/model\.safetensors"):
        go(config(tmp_path), resume=True)


def test_starting_over_a_run_is_refused_with_advice(tmp_path, whole):
    with pytest.raises(ValueError, match=r"already holds a run; continue it with --resume"):
        go(config(whole.parent))


def test_resuming_a_finished_run_says_so_and_changes_nothing(whole):
    before = (whole / "metrics.jsonl").read_bytes()
    said = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    result = go(config(whole.parent), resume=True, console=said)
    said.file.close()
    assert result.finished_before and result.step == 8 and result.best_validation is not None
    assert "finished" in said.export_text()
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_resuming_where_there_is_no_run_begins_one(tmp_path, whole):
    go(config(tmp_path), resume=True)
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 1}, "seed=1 .the run has 0."),
        ({"batch_tokens": 48}, "batch_tokens=48"),
        ({"precision": "bf16"}, "precision='bf16'"),
        ({"curriculum": "another"}, "curriculum='another'"),
        ({"eval_rows": 7}, "eval_rows=7"),
        ({"data": {"tasks": {"reverse": 1}}}, "data.tasks="),
        ({"data": {"length": 6}}, "data.length=6"),
        ({"optim": {"lr": 3e-3}}, "optim.lr=0.003"),
        ({"steps": 9}, "steps=9 .*learning rates"),
        ({"steps": 7}, "steps=7 .*past it"),
    ],
)
def test_resuming_with_something_else_is_refused_by_name(whole, options, named):
    with pytest.raises(ValueError, match=named):
        go(config(whole.parent, **options), resume=True)


def test_resuming_with_another_architecture_is_refused_by_name(whole):
    with pytest.raises(ValueError, match=r"model\.hidden_size=16 .the run has 8."):
        go(config(whole.parent), resume=True, model=FakeConfig(hidden_size=16))


def test_what_changes_no_number_may_change_on_resume(tmp_path, whole):
    with pytest.MonkeyPatch.context() as patch:
        kill_at_disk_operation(patch, 40)
        with pytest.raises(Killed):
            go(config(tmp_path))
    go(config(tmp_path, keep_last=1, save_every=2), resume=True)
    assert metrics(tmp_path / "run") == metrics(whole)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") == 8


@pytest.mark.parametrize(("schedule", "fine"), [("constant", True), ("wsd", False)])
def test_a_run_is_prolonged_when_its_schedule_so_far_is_that_of_the_longer_run(tmp_path, schedule, fine):
    optim = {"schedule": schedule, "decay_steps": 2}
    long = go(config(tmp_path / "long", steps=12, optim=optim))
    short = config(tmp_path / "short", optim=optim)
    go(short)
    longer = config(tmp_path / "short", steps=12, optim=optim)
    if not fine:
        with pytest.raises(ValueError, match='schedule = "wsd" would have used other learning rates'):
            go(longer, resume=True)
        shutil.rmtree(short.folder / "checkpoints" / "step-00000008")  # step 6 is the last before the decay
    go(longer, resume=True)
    assert_same_end(short.folder, long.folder)


def test_only_latest_best_and_the_last_are_kept(tmp_path):
    go(config(tmp_path, keep_last=1, eval_every=100, save_every=1))
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoint.steps(folder) == [8]
    assert {p.name for p in folder.iterdir()} == {"step-00000008", "latest", "best"}


def test_the_best_checkpoint_outlives_the_last_ones(tmp_path, monkeypatch):
    losses = {2: 3.0, 3: 2.9, 4: 1.0, 6: 2.0, 8: 2.5}  # a stage ends at 3
    seen = iter(losses.values())
    monkeypatch.setattr(loop, "validate", lambda *a, **k: {"validation/loss": next(seen)})
    result = go(config(tmp_path, keep_last=1))
    folder = tmp_path / "run" / "checkpoints"
    assert os.readlink(folder / "best") == "step-00000004"
    assert os.readlink(folder / "latest") == "step-00000008"
    assert checkpoint.steps(folder) == [4, 8]
    assert (result.best_validation, result.last_validation) == (1.0, 2.5)


def test_checkpoints_without_a_record_are_left_alone(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"without run\.json"):
        go(config(tmp_path), resume=True)


def test_best_points_to_the_best_checkpoint_again_after_a_kill_before_the_link(tmp_path, whole):
    shutil.copytree(whole, tmp_path / whole.name, symlinks=True)
    checkpoints = tmp_path / whole.name / "checkpoints"
    right, other = os.readlink(checkpoints / "best"), checkpoint.path(checkpoints, checkpoint.steps(checkpoints)[0]).name
    if other == right:
        other = checkpoint.path(checkpoints, checkpoint.steps(checkpoints)[-1]).name
    assert other != right, "the run keeps two checkpoints"
    (checkpoints / "best").unlink()
    (checkpoints / "best").symlink_to(other)
    checkpoint.clean(checkpoints)
    assert os.readlink(checkpoints / "best") == right
