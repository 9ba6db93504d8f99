"""`depths` decide when tokens leave the pool, and nothing else."""

import pytest
import torch
from cases import COMMON

from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.brian.curriculum import Knobs
from pathlm.models.brian.modeling import BrianForCausalLM

ROUTES = {"pool_blocks": 3, "max_route_steps": 5, "min_route_steps": 2, "block_position_dim": 8}


def made(**options):
    """A model whose routes depend on the token: all weights of the router are drawn."""
    torch.manual_seed(0)
    model = BrianForCausalLM(BrianConfig(**COMMON["brian"] | ROUTES | options)).double().eval()
    for parameter in model.pool.router.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def some_ids(rows=3, tokens=9):
    return torch.randint(1, 61, (rows, tokens), generator=torch.Generator().manual_seed(1))


def some_depths(shape, low=2, high=5):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(2))


def steps_of(output):
    first = output.trace.first_route_step
    return (output.trace.block_BTS[:, :, first : first + 5] > 0).sum(-1)


@pytest.mark.parametrize("top_k", [1, 2])
def test_tokens_take_as_many_steps_as_they_are_told(top_k):
    model, ids = made(route_top_k=top_k), some_ids()
    depths = some_depths(ids.shape)
    output = model(ids, depths=depths, trace=True, labels=ids)
    assert torch.equal(steps_of(output), depths)
    ordinary = model.config.pre_blocks + model.config.post_blocks
    assert output.metrics["route/block_evaluations"].item() == pytest.approx(ordinary + top_k * depths.double().mean().item())


def test_the_depths_that_the_router_chose_itself_change_nothing():
    model, ids = made(), some_ids()
    free = model(ids, trace=True)
    chosen = steps_of(free)
    assert len(chosen.unique()) > 1, "the router must leave at different steps for this to mean anything"
    assert torch.equal(model(ids, depths=chosen).logits, free.logits)
    assert not torch.allclose(model(ids, depths=some_depths(ids.shape)).logits, free.logits)


@pytest.mark.parametrize("rows", [1, 3])
def test_decoding_with_depths_equals_one_forward_pass_with_them(rows):
    model, ids = made(), some_ids(rows)
    depths, memory, pieces = some_depths(ids.shape), None, []
    with torch.inference_mode():
        for t in range(ids.shape[1]):
            output = model(ids[:, t : t + 1], depths=depths[:, t : t + 1], past_key_values=memory, use_cache=True)
            memory = output.past_key_values
            pieces.append(output.logits)
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids, depths=depths).logits, rtol=0, atol=1e-10)


def test_training_follows_depths_even_where_nobody_else_may_leave():
    model, ids = made().train(), some_ids()
    depths = some_depths(ids.shape)
    output = model(ids, depths=depths, labels=ids, trace=True, knobs=Knobs(random_share=1.0, exit_share=0.0, random_depth=1.0))
    assert torch.equal(steps_of(output), depths)


def test_what_is_measured_stays_to_the_end_whatever_the_depths():
    model, ids = made().train(), some_ids()
    output = model(ids, depths=torch.full_like(ids, 2), labels=ids, trace=True, knobs=Knobs(probe_share=1.0, exit=1.0))
    assert (steps_of(output)[:, :-1] == 5).all() and (steps_of(output)[:, -1] == 2).all()


@pytest.mark.parametrize(
    ("depths", "options", "message"),
    [
        (torch.full((3, 8), 2), {}, r"must be whole numbers \(3, 9\)"),
        (torch.full((3, 9), 2.0), {}, "torch.float32"),
        (torch.full((3, 9), 1), {}, "go from 1 to 1: must lie in 2 … 5"),
        (torch.full((3, 9), 6), {}, "go from 6 to 6"),
        (torch.full((3, 9), 3), {"knobs": Knobs(router_share=0.5)}, "router_share=0.5"),
    ],
)
def test_depths_that_cannot_be_are_refused(depths, options, message):
    with pytest.raises(ValueError, match=message):
        made()(some_ids(), depths=depths, **options)


def test_a_plain_decoder_has_no_depths():
    model = BrianForCausalLM(BrianConfig(**COMMON["brian"]))
    with pytest.raises(ValueError, match="plain decoder"):
        model(some_ids(), depths=some_depths((3, 9)))
