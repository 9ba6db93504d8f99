"""The pool's thresholds, budgets and tables are numbers, not weights: they stay exact whatever precision the model is in."""

from copy import deepcopy

import pytest
import torch
from cases import scatter
from transformers import AutoModelForCausalLM

import pathlm
from pathlm.models.brian.routing import NUMBERS, RoutePool
from pathlm.models.brian.steering import MOST_SEEN, difficulty_class, note_difficulty

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 40}
LOW = [torch.bfloat16, torch.float16]


def routed():
    torch.manual_seed(0)
    model = pathlm.build(pathlm.preset("brian-tiny", **SIZES)).eval()
    scatter(model)
    pool = model.pool
    pool.budgets_trained.copy_(torch.tensor([0.3001, 1.0]))
    pool.budget_default.fill_(0.6501)
    pool.gain_scale.fill_(0.123456)
    pool.difficulty_count.uniform_(1000, 2000)
    pool.difficulty_sum.uniform_(1000, 2000)
    return model


def numbers(model):
    return {name: getattr(model.pool, name).clone() for name in NUMBERS}


def assert_same(found, expected):
    for name, value in expected.items():
        assert found[name].dtype == torch.float32, name
        assert torch.equal(found[name], value), name


def test_every_stored_number_of_the_pool_is_meant():
    pool = routed().pool
    assert set(NUMBERS) == {name for name, _ in pool.named_buffers()} - {"position"}


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    "cast", [lambda m, t: m.to(t), lambda m, t: m.half().to(t), lambda m, t: m.to("cpu", t)], ids=["to", "half", "device"]
)
def test_casting_weights_leaves_the_numbers_as_they_are(cast, dtype):
    model = routed()
    expected = numbers(model)
    model = cast(model, dtype)
    assert model.lm_head.weight.dtype == dtype and model.pool.router.from_hidden.weight.dtype == dtype
    assert_same(numbers(model), expected)
    assert torch.isfinite(model(torch.arange(10)[None], budget=0.3001).logits).all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("through", ["a cast checkpoint", "a cast while loading"])
def test_numbers_pass_through_checkpoints_of_lower_precision(dtype, through, tmp_path):
    model = routed()
    expected = numbers(model)
    (model.to(dtype) if through == "a cast checkpoint" else model).save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert found.dtype == dtype
    assert_same(numbers(found), expected)
    assert_same(numbers(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)  # the precision that the checkpoint names


def test_a_fresh_model_of_lower_precision_has_exact_numbers():
    with torch.random.fork_rng():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            pool = pathlm.build(pathlm.preset("brian-tiny", **SIZES)).pool
        finally:
            torch.set_default_dtype(before)
    assert {getattr(pool, name).dtype for name in NUMBERS} == {torch.float32}
    wrapped = pathlm.wrap(pathlm.build(pathlm.preset("plain-tiny", **SIZES)).bfloat16(), pre_blocks=1, pool_blocks=4, post_blocks=1)
    assert wrapped.dtype == torch.bfloat16 and {getattr(wrapped.pool, name).dtype for name in NUMBERS} == {torch.float32}


def test_double_precision_goes_through_and_comes_back():
    model = routed()
    expected = numbers(model)
    model.double()
    assert {getattr(model.pool, name).dtype for name in NUMBERS} == {torch.float64}
    assert_same(numbers(deepcopy(model).half()), expected)


def test_the_smallest_trained_budget_is_allowed_and_nothing_below_it():
    model = routed().bfloat16()
    model.check_budget(0.3001)
    with pytest.raises(ValueError, match=r"budget=0\.3: must lie between 0\.3 and 1"):
        model.check_budget(0.3)


def table(count: float, mean: float) -> RoutePool:
    pool = pathlm.build(pathlm.preset("brian-tiny", **SIZES)).pool
    pool.difficulty_count.fill_(1.0)
    pool.difficulty_sum.fill_(5.0)
    pool.difficulty_count[3], pool.difficulty_sum[3] = count, count * mean
    return pool


@pytest.mark.parametrize("rate", [0.0, 1e-9])
def test_a_table_that_never_forgets_goes_on_learning(rate):
    pool = table(2.0**24, 2.0)
    ids = torch.full((1, 4096), 3)
    for _ in range(500):  # as many tokens as an eighth of those seen: the mean moves from 2 to at least 4
        note_difficulty(pool, ids, torch.ones_like(ids), torch.full((4096,), 6.0), rate=rate)
    assert pool.difficulty_count.max() <= MOST_SEEN + 4096
    assert (pool.difficulty_sum[3] / pool.difficulty_count[3]) > 4
    assert (pool.difficulty_sum[5] / pool.difficulty_count[5]).item() == pytest.approx(5.0, rel=1e-3)
    assert torch.isfinite(pool.difficulty_sum).all() and difficulty_class(pool)[3] >= 0


def test_scaling_a_full_table_changes_no_mean_and_no_class():
    pool = table(4.0 * MOST_SEEN, 2.0)
    kinds, mean = difficulty_class(pool), pool.difficulty_sum / pool.difficulty_count
    none = torch.zeros(1, 0, dtype=torch.long)
    note_difficulty(pool, none, none, torch.zeros(0), rate=0.0)
    assert pool.difficulty_count.max() == MOST_SEEN
    torch.testing.assert_close(pool.difficulty_sum / pool.difficulty_count, mean)
    assert torch.equal(difficulty_class(pool), kinds)
