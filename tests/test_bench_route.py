"""`pathlm bench route` runs, counts what it says it counts, and its models leave where they are told."""

import json
import sys
from pathlib import Path

import pytest
import torch

from pathlm.bench import bench
from pathlm.models.brian.presets import cache_numbers_per_token

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import routed
from benchmarks.route import _saving, evaluations

TINY = routed.SIZES["tiny"]


def told(*arguments):
    """The record of a run, and its rows by case."""
    found = bench("route", ["--tiny", "--repeats", "1", "--threads", "1", *arguments])
    return found, {row["case"]: row for row in found["rows"]}


def test_training_steps_run_as_many_blocks_as_they_say(tmp_path, capsys):
    found, rows = told("--only", "train", "--json", str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text()) == found
    counted = {case.removeprefix("training step, "): row["by hooks"] for case, row in rows.items()}
    assert counted["plain"] == 12 and counted["plain, 4 layers fewer"] == 8
    assert counted["routed, random"] == counted["routed, in order"] == 12 and counted["top-2, random"] == 20
    assert counted["routed, random, 50% of the steps"] == pytest.approx(8, abs=0.1)
    for row in rows.values():
        assert row["blocks/token"] is None or row["blocks/token"] == pytest.approx(row["by hooks"])
    assert "saving ÷ cost" in capsys.readouterr().out


def test_decoding_leaves_blocks_out():
    found, rows = told("--only", "decode", "--new", "3")
    assert rows["decoding, batch 1, routed, 4 steps"]["by hooks"] == rows["decoding, batch 32, routed, 4 steps"]["by hooks"] == 8
    assert rows["decoding, batch 32, routed, all steps"]["by hooks"] == rows["decoding, batch 32, plain"]["by hooks"] == 12
    assert rows["decoding, batch 32, routed, 4 steps on average"]["by hooks"] == pytest.approx(8, abs=1)
    assert rows["decoding, batch 32, plain, rows as in 4 steps on average"]["by hooks"] == pytest.approx(
        rows["decoding, batch 32, routed, 4 steps on average"]["by hooks"], abs=0.2
    )
    assert sum("with as many rows" in name for name in found["ratios"]) == 2
    assert sum("a + b" in name for name in found["ratios"]) == 2


def test_memory_is_that_of_tensors_that_exist():
    case = routed.cases(TINY)["routed, random"]
    assert routed.peak(TINY, case, "cpu", steps=1) > 0
    model = case.build(TINY, "cpu").eval()
    assert routed.cache_bytes(model, torch.zeros(2, 7, dtype=torch.long)) == cache_numbers_per_token(model.config) * 4 == 12 * 2 * 32 * 4


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own():
    found, rows = told("--only", "memory")
    assert rows["training, peak memory, routed, random"]["median"] > 0
    assert found["ratios"]["decoding memory per token, routed ÷ plain"]["median"] == 1


@pytest.mark.parametrize(("mean", "shape"), [(4.0, (8, 256)), (5.28, (8, 256)), (4.0, (3, 5)), (8.0, (2, 3)), (1.0, (2, 3))])
def test_depths_have_their_mean_and_spread(mean, shape):
    found = routed.depths(mean, torch.Size(shape))
    assert found.shape == shape and found.min() >= 1 and found.max() <= routed.POOL
    assert found.float().mean().item() == pytest.approx(mean, abs=0.1)
    if shape == (8, 256):
        assert found.unique().tolist() == (list(range(1, 8)) if mean == 4 else list(range(2, 9)))


def test_hooks_disagreeing_with_the_model_are_noticed():
    case = routed.cases(TINY)["routed, random"]
    model = case.build(TINY, "cpu").train()
    tokens = torch.randint(0, 64, (2, 16))
    assert evaluations(model, case, tokens) == (12, 12)
    model.blocks[3].down_proj = model.blocks[4].down_proj  # counted twice from now on
    with pytest.raises(AssertionError):
        evaluations(model, case, tokens)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_tokens_leave_together_after_the_steps_they_are_told(steps):
    model = routed.Case(routed=True).build(TINY, "cpu").eval()
    routed.leave_after(model, steps)
    for batch in (1, 3):
        assert routed.decoded_blocks(model, torch.arange(batch)[:, None], new=5) == 4 + steps


def test_savings_of_times_that_follow_the_model_of_costs_are_whole():
    # 3 passes of 32 rows: overhead 1, and every call of a block costs 0.02 + 0.001 · rows.
    plain, routed_all, apart = [32] * 36, [32] * 36, ([32] * 4 + [30, 26, 22, 18, 14, 10, 6, 2]) * 3
    fewer, half, half_fewer = [32] * 24, [16] * 36, [16] * 24
    ran = {"plain": plain, "routed, all steps": routed_all, "apart": apart, "plain, 4 layers fewer": fewer}
    ran |= {"half the rows, plain": half, "half the rows, plain, 4 layers fewer": half_fewer}
    seconds = {name: [1 + sum(0.02 + 0.001 * rows for rows in calls)] * 2 for name, calls in ran.items()}
    found = _saving("decoding", seconds, ran, "plain", "apart", batch=32)
    by_calls = next(value for name, value in found.items() if "a + b" in name)
    assert by_calls.median == pytest.approx(1)
    by_cost = next(value for name, value in found.items() if "cost of the blocks" in name)
    assert by_cost.median == pytest.approx(0.001 * 32 / (0.02 + 0.001 * 32))
