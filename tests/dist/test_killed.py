"""One real process, killed with SIGKILL at random times, stopped by signals, and cut off by a file-size limit."""

import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_two_processes import kill_session, wait_for_growth
from two import begin, finish, rows

OPTIONS = ("steps=80", "save_every=1", "eval_every=5")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    finish(begin(folder, *OPTIONS))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_times_and_resumed_the_metrics_are_those_of_an_uninterrupted_run(tmp_path, whole, seed):
    draw = random.Random(seed)
    log = tmp_path / "run" / "metrics.jsonl"
    for _ in range(5):
        process = begin(tmp_path, *OPTIONS, resume=True)
        wait_for_growth(process, log)
        time.sleep(draw.uniform(0.0, 0.4))
        kill_session(process)
    finish(begin(tmp_path, *OPTIONS, resume=True))
    assert rows(tmp_path) == rows(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves_with_its_code(tmp_path, whole, number, code):
    process = begin(tmp_path, *OPTIONS)
    wait_for_growth(process, tmp_path / "run" / "metrics.jsonl", lines=5)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert f"{number.name}: stopped and saved at step" in said
    finish(begin(tmp_path, *OPTIONS, resume=True))
    assert rows(tmp_path) == rows(whole)


@pytest.mark.slow
def test_a_real_limit_in_the_middle_of_a_checkpoint_leaves_the_earlier_one(tmp_path):
    """A file may not grow past a limit (as on a full disk, the write fails), so that the optimizer's state no longer fits."""
    finish(begin(tmp_path, "optim.schedule=constant", "steps=4"))
    size = (tmp_path / "run" / "checkpoints" / "latest" / "training_state.pt").stat().st_size
    process = begin(tmp_path, "optim.schedule=constant", "steps=8", resume=True)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size - 100, size - 100))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "could not be written" in said and "step 4 is intact" in said and "--resume" in said
    finish(begin(tmp_path, "optim.schedule=constant", "steps=8", resume=True))
    assert [row["step"] for row in rows(tmp_path) if "loss/lm" in row] == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_leaves_the_earlier_checkpoint_loadable(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        process = begin(disk, "keep_last=100", *OPTIONS)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 1, said
        assert "No space left" in said or "could not be written" in said
        assert "is intact" in said and "--resume" in said
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        finish(begin(disk, "keep_last=1", *OPTIONS, resume=True))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
