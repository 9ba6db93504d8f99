"""`pathlm bench brillm` runs, and says what a step touches."""

import json

import pytest
import torch

from pathlm.bench import bench


def told(*arguments):
    """The record of a run, and its rows by case."""
    found = bench("brillm", ["--tiny", "--repeats", "2", "--threads", "1", "--new", "4", *arguments])
    return found, {row["case"]: row for row in found["rows"]}


def test_steps_are_timed_beside_tensors_and_the_bound(tmp_path):
    found, rows = told("--only", "train", "--json", str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert {"training step, compiled loops", "training step, tensors"} < rows.keys() and len(rows) == 3
    assert all(row["tokens/s"] > 0 for row in rows.values()) and len(found["ratios"]) == 2


def test_scoring_is_timed_beside_tensors_and_the_bound():
    found, rows = told("--only", "score")
    assert len(rows) == 3 and all(row["tokens/s"] > 0 for row in rows.values())
    assert "scoring, share of the bandwidth's bound" in found["ratios"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_measured_on_one(capsys):
    assert bench("brillm", ["--tiny", "--device", "cuda"]) == {}
    assert "no CUDA device here; nothing measured" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_of_it_runs_on_a_gpu():
    found, _ = told("--device", "cuda")
    assert len(found["rows"]) == 3 + 3 + 6 + 4


def test_decoding_is_timed_for_every_batch():
    _, rows = told("--only", "decode")
    assert [case.removeprefix("greedy decoding, ") for case in rows] == ["batch 1", "batch 8", "batch 32", "batch 1, tensors"]


@pytest.mark.slow
def test_growth_is_measured_in_processes_of_their_own():
    _, rows = told("--only", "grow")
    assert sum(case.endswith("peak memory") for case in rows) == 2 and all(row["median"] > 0 for row in rows.values())
