import itertools

import pytest
import torch

from pathlm.config import OptimConfig, with_options
from pathlm.train.optim import adamw, first_difference, learning_rate, set_learning_rate


def rates(steps, **options):
    optim = with_options(OptimConfig, {"lr": 1.0, "warmup_steps": 4, **options})
    return [learning_rate(optim, step, steps) for step in range(steps)]


@pytest.mark.parametrize("options", [{}, {"schedule": "wsd", "decay_steps": 5}, {"schedule": "constant"}])
def test_warm_up_is_linear_and_reaches_the_peak_at_its_last_step(options):
    assert rates(20, **options)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert max(rates(20, **options)) == 1.0


def test_cosine_falls_to_its_share_at_the_last_step_and_is_half_way_in_the_middle():
    found = rates(24, final_lr_share=0.1)
    assert found[-1] == pytest.approx(0.1)
    assert found[13] == pytest.approx(0.55)
    assert all(a > b for a, b in itertools.pairwise(found[4:]))


def test_wsd_stays_at_the_peak_and_then_falls_in_a_line():
    found = rates(20, schedule="wsd", decay_steps=5, final_lr_share=0.0)
    assert found[4:15] == [1.0] * 11
    assert found[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_constant_stays():
    assert rates(9, schedule="constant")[3:] == [1.0] * 6


def test_no_warm_up_begins_at_the_peak():
    assert rates(5, warmup_steps=0, schedule="constant") == [1.0] * 5


@pytest.mark.parametrize(
    ("options", "longest"),
    [({}, 4), ({"schedule": "wsd", "decay_steps": 5}, 15), ({"schedule": "constant"}, None)],
)
def test_two_lengths_of_a_run_agree_until_the_schedule_knows_the_end(options, longest):
    optim = with_options(OptimConfig, {"warmup_steps": 4, **options})
    found = first_difference(lambda s: learning_rate(optim, s, 20), lambda s: learning_rate(optim, s, 30), steps=20)
    assert found == longest


def test_adamw_is_fused_and_scales_each_group():
    weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = adamw([{"params": [weight], "weight_decay": 0.5}, {"params": [bias], "weight_decay": 0.0, "lr_scale": 0.25}], OptimConfig())
    assert all(group["fused"] for group in optimizer.param_groups)
    set_learning_rate(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.025]
    weight.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 1 - 0.1 * 0.5))
    torch.testing.assert_close(bias.detach(), torch.ones(2))
