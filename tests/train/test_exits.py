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
    places = {"pre_blocks": 0, "pool_blocks": 2, "post_blocks": 0, "max_route_steps": 4}
    return BrianForCausalLM(BrianConfig(**sizes | places | options)).train()


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


def test_the_expected_gain_is_the_distance_to_what_is_said_after_the_last_step():
    score_RwV = torch.randn(3, 5, 11)
    expected = exits._cross_entropies(score_RwV, torch.zeros(5, dtype=torch.long), expected=True)
    log_share_RwV = score_RwV.log_softmax(-1)
    distance_Rw = torch.nn.functional.kl_div(
        log_share_RwV, log_share_RwV[-1:].expand_as(log_share_RwV), log_target=True, reduction="none"
    ).sum(-1)
    assert torch.allclose(expected - expected[-1], distance_Rw, atol=1e-6)
    assert distance_Rw[:-1].min() > 0


def test_the_expected_gain_is_the_mean_of_the_gains_over_all_tokens_that_may_follow():
    score_RwV = torch.randn(3, 5, 11)
    every = torch.stack([exits._cross_entropies(score_RwV, torch.full((5,), token), expected=False) for token in range(11)], dim=-1)
    expected = exits._cross_entropies(score_RwV, torch.zeros(5, dtype=torch.long), expected=True)
    assert torch.allclose((every * score_RwV[-1].softmax(-1)).sum(-1), expected, atol=1e-6)


@pytest.mark.parametrize("piece", [1, 2**22])
def test_losses_by_step_do_not_depend_on_how_many_are_made_at_a_time(piece, monkeypatch):
    model, ids = small_model(), torch.randint(23, (3, 11))
    whole = [model(ids, labels=ids, knobs=replace(PROBES, expected_gain=expected)).metrics["loss/exit"] for expected in (False, True)]
    monkeypatch.setattr(exits, "PIECE", piece)
    parts = [model(ids, labels=ids, knobs=replace(PROBES, expected_gain=expected)).metrics["loss/exit"] for expected in (False, True)]
    assert torch.allclose(torch.stack(parts), torch.stack(whole), rtol=1e-5)
    assert whole[0] != whole[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pre_blocks": 1, "post_blocks": 2, "left_rows": "refreshed"},
        {"pre_blocks": 2, "post_blocks": 1, "memory": "local+canonical", "local_window": 4, "post_memory": "canonical"},
    ],
    ids=["pool-alone", "blocks-around", "codes"],
)
def test_the_second_pass_is_the_whole_model_and_has_its_share_of_the_loss_and_the_gradient(options):
    model, ids = small_model(**options), torch.randint(23, (3, 11))
    torch.nn.init.normal_(model.pool.router.from_hidden.weight)
    leaving, staying = Knobs(), Knobs(exit_share=0.0)
    wanted: dict[str, torch.Tensor] = {}
    losses = []
    for knobs, share in ((leaving, 0.7), (staying, 0.3)):
        model.zero_grad()
        out = model(ids, labels=ids, knobs=knobs)
        out.loss.backward()
        losses.append(out.loss.item())
        wanted |= {n: wanted.get(n, 0) + share * p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert losses[0] != losses[1]
    model.zero_grad()
    both = model(ids, labels=ids, knobs=replace(leaving, whole=0.3))
    both.loss.backward()
    assert both.loss.item() == pytest.approx(0.7 * losses[0] + 0.3 * losses[1], rel=1e-6)
    assert both.metrics["loss/lm"].item() == pytest.approx(losses[0], rel=1e-6)
    assert both.metrics["loss/whole"].item() == pytest.approx(losses[1], rel=1e-6)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, wanted[name], atol=1e-6), name


def test_the_second_pass_is_for_training_only_and_moves_no_threshold():
    model, ids = small_model(), torch.randint(23, (3, 11))
    knobs = replace(PROBES, budget=0.5)
    model(ids, labels=ids, knobs=knobs)
    before = model.pool.exit_threshold.clone(), model.pool.difficulty_count.clone()
    model(ids, labels=ids, knobs=replace(Knobs(), whole=1.0))
    assert torch.equal(model.pool.exit_threshold, before[0])
    assert torch.equal(model.pool.difficulty_count, before[1])
    assert "loss/whole" not in model.eval()(ids, labels=ids, knobs=replace(knobs, whole=0.5)).metrics


@pytest.mark.parametrize(("other", "named"), [({"whole": 0.5}, "whole=0.5"), ({"expected_gain": True}, "expected_gain=True")])
def test_hindsight_is_refused_beside_what_needs_the_last_step(other, named):
    with pytest.raises(ValueError, match=f"hindsight=True: .* {named}"):
        Knobs(hindsight=True, **other)


def test_beyond_gain_delta_errors_count_linearly():
    model, ids = small_model(), torch.randint(23, (3, 11))
    found = [
        model(ids, labels=ids, knobs=replace(PROBES, gain_delta=delta)).metrics["loss/exit"].item() for delta in (1e-4, 2e-4, 1e6, 2e6)
    ]
    assert found[1] == pytest.approx(2 * found[0], rel=1e-2)
    assert found[3] == pytest.approx(found[2])
    with pytest.raises(ValueError, match=r"gain_delta=0\.0: must be above 0"):
        Knobs(gain_delta=0.0)


@pytest.mark.parametrize("post_memory", ["own", "canonical"])
def test_probes_are_measured_under_autocast(post_memory):
    ids = torch.randint(23, (2, 9))
    found = []
    for narrow in (False, True):
        model = small_model(post_blocks=1, memory="local" if post_memory == "own" else "canonical", post_memory=post_memory)
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            out = model(ids, labels=ids, knobs=replace(PROBES, expected_gain=True, whole=0.5))
        out.loss.backward()
        found.append(out.loss.item())
    assert found[0] == pytest.approx(found[1], rel=0.05)


@pytest.mark.parametrize("knobs", [Knobs(router_share=0.0, gate=0.5), Knobs(router_share=0.0, gate=0.5, imitation=0.1, whole=0.5)])
def test_a_gate_does_nothing_in_a_pass_that_the_teacher_alone_drives(knobs):
    ids = torch.randint(23, (2, 9))
    gated, ungated = (small_model()(ids, labels=ids, knobs=k).loss for k in (knobs, replace(knobs, gate=0.0)))
    assert gated == ungated


@pytest.mark.parametrize("name", ["whole", "probe_share"])
def test_a_text_that_goes_on_is_not_read_again(name):
    model, ids = small_model(), torch.randint(23, (2, 9))
    knobs = replace(Knobs(), **{name: 0.5})
    model(ids, labels=ids, knobs=knobs, use_cache=True)  # a memory that is new holds nothing yet
    memory = model(ids, use_cache=True, knobs=knobs).past_key_values
    with pytest.raises(ValueError, match=f"past_key_values: {name}=0.5 reads the text again"):
        model(ids, labels=ids, past_key_values=memory, knobs=knobs)
    assert memory.get_seq_length() == 9
    model(ids, past_key_values=memory, knobs=knobs)
