"""Whatever the wiring, the signal is the sum of what entered it: each earlier output with a weight that no signal changes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from test_brillm_reference import NODES, OPTIONS, PAIRS, ROW
from test_brillm_reference import model as built_of
from torch import Tensor

from pathlm.models.brillm import positions, reference, wirings
from pathlm.models.brillm.configuration import BrillmConfig
from pathlm.models.brillm.edges import Edges
from pathlm.models.brillm.modeling import BrillmForCausalLM

WIRED = {name: options for name, options in OPTIONS.items() if "arithmetic" not in options}


def shares_of(model: BrillmForCausalLM, tokens: Tensor) -> Tensor:
    """Return (T, M, D or 1) of one text from its beginning; what enters at the first token is all there is."""
    places = positions.locate(tokens, torch.zeros_like(tokens), None)
    share_TMD = wirings.shares(model.graph, tokens, places, model.config)[0]
    return torch.cat((torch.ones_like(share_TMD[:1]), share_TMD[1:]))


def came_of(model: BrillmForCausalLM, tokens: list[int]) -> list[Tensor]:
    """Return what entered the signal at each token, by the equations."""
    level = torch.full((model.config.signal_size,), model.config.initial_signal or 1 / model.config.signal_size, dtype=torch.float64)
    first = level + model.graph.node_bias[tokens[0]] + reference.position(model, 0)
    came = [reference.entering(model, reference.gelu(first))]
    for i, (source, target) in enumerate(pairwise(tokens)):
        signal = reference.joined(model, tokens[: i + 1], came[0], came[1:])
        came.append(reference.entering(model, reference.outcome(model, signal, source, target, reference.position(model, i + 1))))
    return came


@torch.no_grad()
@pytest.mark.parametrize("options", WIRED.values(), ids=WIRED.keys())
def test_the_signal_is_the_weighted_sum_of_all_that_entered_it(options: dict[str, Any]) -> None:
    model = built_of(**options)
    came, share_TMD = came_of(model, ROW), shares_of(model, torch.tensor([ROW]))
    trace = model(torch.tensor([ROW]), trace=True).trace
    for t in range(len(ROW)):
        weight_TD, before_MD = wirings.weights(share_TMD[: t + 1], wirings.weights_of(model.graph))
        assert (before_MD == 0).all(), "a text begins with nothing"
        parts = weight_TD * torch.stack(came[: t + 1])
        torch.testing.assert_close(parts.sum(0), trace.signal_BTD[0, t], rtol=0, atol=1e-12)
    kept = model.config.keep_initial and model.config.context != "chain"
    assert bool((weight_TD[0] != 0).any()) == kept, "the first signal stays where it is to be kept"


@torch.no_grad()
@pytest.mark.parametrize("context", ["pooled", "decay+gated", "timescales"])
def test_a_signal_from_before_is_one_more_part_of_the_sum(context: str) -> None:
    model, tokens = built_of(context=context, normalise=True), torch.tensor([ROW])
    out = model(tokens[:, :4], use_cache=True)
    state_MD = out.past_key_values.memory.last()[0][0].view(-1, 4)
    later = model(tokens[:, 4:], past_key_values=out.past_key_values, trace=True).trace
    weight_TD, left_MD = wirings.weights(shares_of(model, tokens)[4:], wirings.weights_of(model.graph))
    came = torch.stack(came_of(model, ROW)[4:])
    torch.testing.assert_close((left_MD * state_MD).sum(0) + (weight_TD * came).sum(0), later.signal_BTD[0, -1], rtol=0, atol=1e-12)


@torch.no_grad()
def test_what_enters_a_normalised_signal_has_a_root_mean_square_of_one_and_energies_have_their_own() -> None:
    model = built_of(normalise=True, context="chain")
    signals = model(torch.tensor([ROW]), trace=True).trace.signal_BTD[0]
    torch.testing.assert_close(signals.square().mean(-1), torch.ones(len(ROW), dtype=torch.float64), rtol=0, atol=1e-2)
    assert model(torch.tensor([ROW])).logits.std() > 0.1
    model.graph.weight.zero_(), model.graph.bias.zero_()
    quiet = BrillmForCausalLM.from_edges(
        BrillmConfig(vocab_size=NODES, signal_size=4, positions="none", normalise=True), Edges.from_pairs(torch.tensor(PAIRS), NODES)
    ).double()
    quiet.graph.weight.zero_(), quiet.graph.bias.zero_()
    assert (quiet(torch.tensor([ROW])).logits == 0).all(), "nothing, normalised, is nothing and no NaN"


@torch.no_grad()
def test_learned_means_begin_with_dimensions_that_forget_at_different_rates() -> None:
    config = BrillmConfig(vocab_size=NODES, signal_size=8, context="decay+decay+gated")
    graph = BrillmForCausalLM(config).graph
    share = torch.sigmoid(-graph.decay).flatten()
    torch.testing.assert_close(share, torch.linspace(0.9, 0.1, 16))
    torch.testing.assert_close(torch.sigmoid(graph.gate), torch.linspace(0.9, 0.1, 8).expand(NODES, 8))
    torch.testing.assert_close(graph.mix, torch.full((3, 8), 1 / 3))
