"""What probes teach: the price of a step, hindsight, and tokens that have nothing to gain."""

from dataclasses import replace

import pytest
import torch

from pathlm.models.brian import exits
from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.brian.curriculum import Knobs
from pathlm.models.brian.modeling import BrianForCausalLM

PROBES = Knobs(probe_share=1.0, exit=1.0, best_gain=True)


def small_model(**options: object) -> BrianForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "initializer_range": 0.3}
    return BrianForCausalLM(BrianConfig(**sizes, pre_blocks=0, pool_blocks=2, post_blocks=0, max_route_steps=4, **options)).train()


def test_a_price_is_taken_off_the_gain_for_every_step_to_the_best_one():
    loss_Rw = torch.tensor([[2.0, 1.0], [0.5, 1.0], [0.0, 1.0]])
    paid_Rw = exits._paid(loss_Rw, 0.6)
    assert torch.allclose(paid_Rw, loss_Rw + torch.tensor([[0.0], [0.6], [1.2]]))
    # The first token is best off after two steps (0.5 + 0.6 < 0.0 + 1.2), the second after one.
    assert exits.hindsight_loss(loss_Rw, shortest=1, price=0.6).item() == pytest.approx(0.5 + 1.0)
    assert exits.hindsight_loss(loss_Rw, shortest=3, price=0.6).item() == pytest.approx(0.0 + 1.0)


def test_tokens_with_nothing_to_gain_are_told_the_price():
    assert exits.idle_loss(torch.tensor([-0.3, -0.3]), 0.3).item() == 0
    assert exits.idle_loss(torch.tensor([]), 0.3).item() == 0
    assert exits.idle_loss(torch.tensor([0.7]), 0.3).item() == pytest.approx(0.5)


def test_idle_teaches_tokens_without_a_target_only():
    model, ids = small_model(), torch.randint(23, (2, 9))
    torch.nn.init.normal_(model.pool.router.from_hidden.weight)
    alone = replace(PROBES, probe_share=0.0, exit_share=0.0, idle=1.0)
    labels = ids.clone()
    labels[:, 5:] = -100
    few = model(ids, labels=labels, knobs=alone).metrics["loss/idle"]
    none = model(ids, labels=torch.full_like(ids, -100), knobs=alone).metrics["loss/idle"]
    last = model(ids, labels=ids, knobs=alone).metrics["loss/idle"]  # the last token of a row never has a target
    assert len({few.item(), none.item(), last.item()}) == 3


def test_hindsight_replaces_the_last_step_by_the_best_one():
    model = small_model()
    ids = torch.randint(23, (3, 11))
    plain = model(ids, labels=ids, knobs=replace(PROBES, exit=0.0))
    best = model(ids, labels=ids, knobs=replace(PROBES, exit=0.0, hindsight=True))
    dear = model(ids, labels=ids, knobs=replace(PROBES, exit=0.0, hindsight=True, price=1e6))
    first = model(ids, labels=ids, knobs=Knobs(), depths=torch.ones_like(ids))
    assert best.loss < plain.loss
    assert best.loss <= first.loss
    assert torch.allclose(dear.loss, first.metrics["loss/lm"], atol=1e-5)  # a step too dear to take


def test_hindsight_trains_the_step_it_chose():
    model = small_model()
    ids = torch.randint(23, (2, 7))
    model(ids, labels=ids, knobs=replace(PROBES, exit=0.0, hindsight=True, price=1e6)).loss.backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(ids, labels=ids, knobs=Knobs(), depths=torch.ones_like(ids)).loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None and "pool" not in name:
            # Rows that others read are those of the last step in one pass, of the first in the other; the first step reads first rows.
            assert torch.allclose(mine[name], p.grad, atol=1e-5), name


def test_the_router_moves_hidden_states_only_where_it_is_listened_to():
    ids = torch.randint(23, (2, 7))
    found = []
    for listen in (0.0, 0.5, 1.0):
        model = small_model()
        torch.nn.init.normal_(model.pool.router.from_hidden.weight)
        labels = torch.full_like(ids, -100)
        model(ids, labels=labels, knobs=Knobs(idle=1.0, listen=listen), depths=torch.full_like(ids, 3)).loss.backward()
        found.append(model.embed_tokens.weight.grad)
    assert found[0] is None or not found[0].any()
    assert found[2].any()
    assert torch.allclose(found[1] * 2, found[2], rtol=1e-4, atol=1e-6)
