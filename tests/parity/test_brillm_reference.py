"""The fast signal graph equals the slow one: energies, losses and every gradient, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pathlm.models.brillm import energy, reference
from pathlm.models.brillm.configuration import BrillmConfig
from pathlm.models.brillm.edges import Edges
from pathlm.models.brillm.energy import draw_rivals
from pathlm.models.brillm.modeling import BrillmForCausalLM
from pathlm.models.losses import IGNORE

NODES = 11
# Node 0 has no edges of its own, node 1 all of them; 5 → 9 and 9 → 9 have one, 9 → 1 and 12 … share row 0.
PAIRS = [(1, v) for v in range(NODES)] + [(5, 3), (5, 9), (5, 5), (9, 9), (9, 2), (3, 0), (3, 9), (3, 4), (2, 6), (7, 1)]
ROW = [5, 9, 9, 1, 3, 0, 7, 3, 9]
OPTIONS: dict[str, dict[str, Any]] = {
    "pooled": {},
    "chain": {"context": "chain"},
    "no positions": {"positions": "none"},
    "released positions": {"positions": "multiplied"},
    "released": {"positions": "multiplied", "arithmetic": "released"},
    "beyond, continued": {"trained_positions": 4, "beyond": "continue"},
    "beyond, held": {"trained_positions": 4},
    "small positions, own signal": {"position_scale": 0.25, "initial_signal": 1.0},
    "shared edge frozen": {"train_shared": False},
    "normalised": {"normalise": True},
    "first signal kept": {"keep_initial": True},
    "first signal kept, held": {"keep_initial": True, "trained_positions": 4, "beyond": "hold", "normalise": True},
    "decay": {"context": "decay"},
    "decay, normalised, kept": {"context": "decay", "normalise": True, "keep_initial": True},
    "decay per node": {"context": "node-decay"},
    "decay per node, kept": {"context": "node-decay", "keep_initial": True},
    "gated": {"context": "gated", "normalise": True},
    "timescales": {"context": "timescales", "timescales": [1, 2.5, 8]},
    "last output and mean": {"context": "chain+pooled", "trained_positions": 4},
    "two decays": {"context": "decay+decay", "normalise": True},
    "all at once": {"context": "chain+pooled+decay+gated+timescales+node-decay+decay", "normalise": True, "keep_initial": True},
}


def model(**options: Any) -> BrillmForCausalLM:
    torch.manual_seed(0)
    config = BrillmConfig(**{"vocab_size": NODES, "signal_size": 4} | options)
    built = BrillmForCausalLM.from_edges(config, Edges.from_pairs(torch.tensor(PAIRS), NODES)).double()
    for name, parameter in built.graph.named_parameters():
        if name not in ("weight", "bias", "node_bias"):
            torch.nn.init.normal_(parameter)
    return built


def gradients(built: BrillmForCausalLM, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*built.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g.to_dense() for name, p, g in zip(names, parameters, found, strict=True)}


@pytest.mark.parametrize("as_rows", [False, True], ids=["dense gradients", "gradients of rows"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_energies_loss_and_gradients_are_those_of_the_equations(options: dict[str, Any], as_rows: bool) -> None:
    built = model(**options)
    built.row_gradients = as_rows
    labels = [*ROW]
    labels[2] = IGNORE
    fast = built(torch.tensor([ROW]), labels=torch.tensor([labels]))
    slow = reference.energies(built, ROW)
    torch.testing.assert_close(fast.logits[0], slow, rtol=0, atol=1e-10)
    wanted = reference.loss(slow, labels)
    torch.testing.assert_close(fast.loss, wanted, rtol=0, atol=1e-10)
    expected = gradients(built, wanted)
    if not built.config.train_shared:
        for name in ("graph.weight", "graph.bias"):
            assert expected[name][0].abs().max() > 1e-3
            expected[name][0] = 0
    for name, grad in gradients(built, fast.loss).items():
        assert expected[name].abs().max() > 1e-6 or (name, built.config.trained_positions) == ("graph.position_weight", 1), name
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("piece", [1, 2**22], ids=["a position at a time", "at once"])
@pytest.mark.parametrize("as_rows", [False, True], ids=["dense gradients", "gradients of rows"])
def test_a_batch_of_packed_and_padded_rows_has_the_gradients_of_its_texts(
    piece: int, as_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "PIECE", piece)
    built = model()
    built.row_gradients = as_rows
    tokens = torch.tensor([ROW, [2, 6, 4, 1, 1, 0, 9, 2, 0]])
    documents = torch.tensor([[4, 4, 4, 4, 2, 2, 2, 2, 2], [-1, 0, 0, 0, 0, 0, -1, -1, 0]])
    labels = tokens.clone()
    labels[0, 0] = labels[0, 4] = labels[1, 0:2] = labels[1, 6:9] = IGNORE
    fast = built(tokens, labels=labels, document_ids=documents, skip_logits=True).loss
    texts = [ROW[:4], ROW[4:], [6, 4, 1, 1, 0]]
    energies = [reference.energies(built, text) for text in texts]
    terms = [reference.cross_entropy(e[t - 1], text[t]) for e, text in zip(energies, texts, strict=True) for t in range(1, len(text))]
    slow = torch.stack(terms).mean()
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    expected = gradients(built, slow)
    for name, grad in gradients(built, fast).items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("as_rows", [False, True], ids=["dense gradients", "gradients of rows"])
@pytest.mark.parametrize("options", [{}, {"context": "chain"}], ids=str)
def test_gradients_through_the_logits_are_the_automatic_ones(options: dict[str, Any], as_rows: bool) -> None:
    built = model(**options)
    built.row_gradients = as_rows
    slopes = torch.randn(len(ROW), NODES, dtype=torch.float64)
    expected = gradients(built, (reference.energies(built, ROW) * slopes).sum())
    for name, grad in gradients(built, (built(torch.tensor([ROW])).logits[0] * slopes).sum()).items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-10)


def test_loss_and_logits_of_one_pass_share_their_gradients() -> None:
    built, ids = model(), torch.tensor([ROW])
    built.row_gradients = True
    out = built(ids, labels=ids)
    slow = reference.energies(built, ROW)
    expected = gradients(built, reference.loss(slow, ROW) + slow.pow(2).sum())
    for name, grad in gradients(built, out.loss + out.logits.pow(2).sum()).items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-10)


def test_gradients_of_rows_are_rising_and_only_of_rows_that_were_touched() -> None:
    built, ids = model(), torch.tensor([[5, 9, 2, 0]])
    built.row_gradients = True
    built(ids, labels=ids, skip_logits=True).loss.backward()
    rows = built.graph.weight.grad._indices()[0]
    sources = [source for source, _ in sorted(PAIRS)]
    assert rows.tolist() == [0, *(row for row, source in enumerate(sources, start=1) if source in (5, 9, 2))]
    assert built.graph.bias.grad._indices()[0].tolist() == rows.tolist()


def test_a_signal_of_no_energy_has_no_gradient_and_makes_no_nan() -> None:
    built, ids = model(positions="none"), torch.tensor([ROW])
    with torch.no_grad():
        built.graph.weight[0] = 0
        built.graph.bias[0] = 0
    fast = built(ids, labels=ids)
    assert (fast.logits == 0).any()
    expected = gradients(built, reference.loss(reference.energies(built, ROW), ROW))
    for name, grad in gradients(built, fast.loss).items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("count", [1, 4, NODES - 1])
def test_sampled_rivals_are_compared_with_the_target_alone(count: int) -> None:
    built, ids = model(rivals=count).train(), torch.tensor([ROW])
    fast = built(ids, labels=ids, skip_logits=True, generator=torch.Generator().manual_seed(5)).loss
    target = torch.tensor(ROW[1:])
    drawn = draw_rivals(target, NODES, count, torch.Generator().manual_seed(5))
    assert (drawn.sum(1) == count + 1).all() and drawn.gather(1, target[:, None]).all()
    energies = reference.energies(built, ROW)
    terms = [reference.cross_entropy(energies[t], ROW[t + 1], drawn[t].nonzero().flatten().tolist()) for t in range(len(ROW) - 1)]
    slow = torch.stack(terms).mean()
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    expected = gradients(built, slow)
    for name, grad in gradients(built, fast).items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-10)
    exact = built.eval()(ids, labels=ids).loss
    assert (exact - reference.loss(energies, ROW)).abs() < 1e-10, "evaluation compares with all nodes"


def test_rivals_are_drawn_evenly_and_again_for_every_position() -> None:
    target = torch.full((4000,), 3)
    drawn = draw_rivals(target, NODES, 4, torch.Generator().manual_seed(1))
    share = drawn.double().mean(0)
    assert share[3] == 1 and (share[torch.arange(NODES) != 3] - 0.4).abs().max() < 0.03
    assert len({tuple(row) for row in drawn[:50].tolist()}) > 20


@torch.no_grad()
def test_greedy_continuations_are_those_of_the_reference_and_may_repeat_a_token() -> None:
    built = model(context="chain").eval()
    found = built.generate(torch.tensor([[5, 9]]), max_new_tokens=6, do_sample=False)[0, 2:].tolist()
    assert found == reference.greedy(built, [5, 9], 6)
    built.graph.bias[built.graph.edges.lookup(torch.tensor(9), torch.tensor(9))] += 30
    assert built.generate(torch.tensor([[5, 9]]), max_new_tokens=3, do_sample=False)[0].tolist() == [5, 9, 9, 9, 9]
    stopped = built.generate(torch.tensor([[5, 9]]), max_new_tokens=3, do_sample=False, eos_token_id=9)[0].tolist()
    assert stopped == [5, 9, 9]


def test_a_micro_batch_without_labels_costs_nothing_and_moves_nothing() -> None:
    for as_rows in (False, True):
        built = model()
        built.row_gradients = as_rows
        out = built(torch.tensor([ROW]), labels=torch.full((1, len(ROW)), IGNORE))
        assert out.loss == 0 and out.logits.isfinite().all()
        out.loss.backward()
        assert all((p.grad.to_dense() == 0).all() for p in built.parameters())


@torch.no_grad()
def test_the_user_may_set_the_signal_that_enters_the_first_node() -> None:
    built, signal = model(), torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    slow = reference.energies(built, ROW, initial_signal=signal)
    torch.testing.assert_close(built(torch.tensor([ROW]), initial_signal=signal).logits[0], slow)
    both = built(torch.tensor([ROW, ROW]), initial_signal=torch.stack((signal, 0 * signal + 0.25))).logits
    torch.testing.assert_close(both[0], slow)
    torch.testing.assert_close(both[1], built(torch.tensor([ROW])).logits[0])
    with pytest.raises(ValueError, match=r"initial_signal has shape \(3,\): must be \(4,\)"):
        built(torch.tensor([ROW]), initial_signal=signal[:3])
