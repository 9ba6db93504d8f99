"""Two gloo processes are one run: the same losses, one folder, the same end after a kill."""

import contextlib
import json
import math
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM
from two import RECIPE, begin, finish, rows

from pathlm.config import load
from pathlm.train import start

NUMBERS = ("loss/total", "loss/lm", "validation/loss", "optim/grad_norm", "optim/lr", "data/target_share")


def assert_close(found, expected):
    assert [(row["step"], row["tokens"], row["stage"]) for row in found] == [(row["step"], row["tokens"], row["stage"]) for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() & set(NUMBERS):
            assert row[name] == pytest.approx(other[name], rel=2e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """One process: this one, which has imported torch already."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "recipe.toml").write_text(RECIPE)
    start(load(folder / "recipe.toml", [f'out="{folder}"']), console=Console(quiet=True))
    return folder


def test_two_processes_give_the_losses_of_one(tmp_path, alone):
    said = finish(begin(tmp_path, processes=2))
    assert "cpu × 2" in said and said.count("finished at step 12") == 1
    assert_close(rows(tmp_path), rows(alone))


@pytest.mark.slow
@pytest.mark.parametrize("options", [["micro_rows=1"], ["micro_rows=100"], ["batch_tokens=448"]], ids=str)
def test_two_processes_share_rows_that_do_not_divide(tmp_path, options):
    finish(begin(tmp_path / "one", *options))
    finish(begin(tmp_path / "two", *options, processes=2))
    assert_close(rows(tmp_path / "two"), rows(tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["micro_rows=1"], ["precision=bf16"], ["activation_checkpointing=true"]], ids=str)
def test_a_sharded_model_gives_the_losses_of_a_whole_one(tmp_path, alone, options):
    finish(begin(tmp_path / "two", "strategy=fsdp2", *options, processes=2))
    expected = alone
    if options and "precision" in options[0]:
        finish(begin(tmp_path / "two-copies", *options, processes=2))
        expected = tmp_path / "two-copies"
    assert_close(rows(tmp_path / "two"), rows(expected))
    AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "run" / "checkpoints" / "latest")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_killed_at_random_resume_to_the_same_end(tmp_path, strategy):
    options = (f"strategy={strategy}", "steps=60", "save_every=1")
    finish(begin(tmp_path / "whole", *options, processes=2))
    draw = random.Random(0)
    for attempt in range(4):
        process = begin(tmp_path / "parts", *options, processes=2, resume=True)
        log = tmp_path / "parts" / "run" / "metrics.jsonl"
        wait_for_growth(process, log)
        time.sleep(draw.uniform(0.0, 1.0))
        kill_session(process)
        assert attempt < 3 or log.exists()
    finish(begin(tmp_path / "parts", *options, processes=2, resume=True))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


POOL = ("model.pre_blocks=0", "model.pool_blocks=3", "model.post_blocks=0", "model.max_route_steps=3")


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["strategy=fsdp2"], ["strategy=fsdp2", "activation_checkpointing=true"]], ids=str)
def test_two_processes_route_through_all_stages_though_blocks_go_unvisited(tmp_path, options):
    said = finish(begin(tmp_path, *POOL, "curriculum=route", "gates=warn", *options, processes=2))
    stages = ["wrapped", "pseudo-routes", "hand-over", "exit"]
    assert [said.count(f"stage {stage} ended") for stage in stages] == [1, 1, 1, 1]
    found = rows(tmp_path)
    assert [row["step"] for row in found if "loss/total" in row] == list(range(1, 13))
    assert all(math.isfinite(row["loss/total"]) for row in found if "loss/total" in row)
    judged = [json.loads(line) for line in (tmp_path / "run" / "gates.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["stage"] for row in judged)) == stages
    assert len({(row["stage"], row["metric"]) for row in judged}) == len(judged)  # one process writes


@pytest.mark.slow
def test_a_failing_gate_stops_both_processes_and_does_so_again(tmp_path):
    options = (*POOL, "curriculum=stage-4", "knobs.exit_share=0.0", "steps=4")  # nobody may leave, and the budget says they should
    for resume in (False, True):
        process = begin(tmp_path, *options, processes=2, resume=resume)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 1, said
        assert "a gate failed at step 4" in said and "route/steps_error" in said
    assert "finished" in finish(begin(tmp_path, *options, "gates=warn", processes=2, resume=True))


@pytest.mark.slow
def test_a_sharded_run_continues_as_a_single_process(tmp_path, alone):
    process = begin(tmp_path, "strategy=fsdp2", processes=2)
    wait_for_growth(process, tmp_path / "run" / "metrics.jsonl", lines=5)
    kill_session(process)
    finish(begin(tmp_path, resume=True))
    assert_close(rows(tmp_path), rows(alone))


@pytest.mark.slow
def test_a_terminated_pair_saves_and_says_how_to_go_on(tmp_path, alone):
    process = begin(tmp_path, "steps=400", "save_every=400", "eval_every=400", processes=2)
    wait_for_growth(process, tmp_path / "run" / "metrics.jsonl", lines=5)
    process.send_signal(signal.SIGTERM)  # the launcher passes it on
    said, _ = process.communicate(timeout=120)
    assert "SIGTERM: stopped and saved at step" in said
    saved = list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(saved) == 1 and 5 <= int(saved[0].name[-8:]) < 400


def wait_for_growth(process, log: Path, *, lines: int = 1) -> None:
    """Wait until the run has logged `lines` more rows, so that the kill hits training and not an import."""
    before = log.read_text().count("\n") if log.exists() else 0
    deadline = time.monotonic() + 120
    while (log.read_text().count("\n") if log.exists() else 0) < before + lines and process.poll() is None:
        assert time.monotonic() < deadline, "the run never began"
        time.sleep(0.01)
        before = min(before, log.read_text().count("\n") if log.exists() else 0)  # resuming cuts the log


def kill_session(process) -> None:
    """Kill a run and all it started at once. torchrun gives its workers sessions of their own, so they are found by parentage."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate(timeout=30)
