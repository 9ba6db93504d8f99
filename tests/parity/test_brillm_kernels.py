"""The compiled loops of signal graphs compute what the tensors compute: losses, gradients however they are handed out, steps, decoding."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from pathlm.config import OptimConfig
from pathlm.generate import generate
from pathlm.models import native, rows
from pathlm.models.brillm import fused
from pathlm.models.brillm.configuration import BrillmConfig
from pathlm.models.brillm.edges import Edges
from pathlm.models.brillm.modeling import BrillmForCausalLM
from pathlm.models.brillm.optim import param_groups
from pathlm.train import parallel
from pathlm.train.optim import RowAdamW, adamw

NODES = 23
OPTIM = OptimConfig(lr=0.02, weight_decay=0.1)


def model(kind: torch.dtype = torch.float64, **options: Any) -> BrillmForCausalLM:
    """A graph whose node 0 has no edges of its own, and others between a few and all."""
    torch.manual_seed(1)
    config = BrillmConfig(**{"vocab_size": NODES, "signal_size": 12, "trained_positions": 6} | options)
    pairs = [(u, v) for u in range(1, NODES) for v in range(NODES) if u == 3 or (u * v + u) % 4 == 0]
    return BrillmForCausalLM.from_edges(config, Edges.from_pairs(torch.tensor(pairs), NODES)).to(kind).train()


def batch(seed: int = 0, length: int = 14) -> Tensor:
    """Rows of tokens; token 5 comes often."""
    ids = torch.randint(0, NODES, (6, length), generator=torch.Generator().manual_seed(seed))
    ids[:, ::3] = 5
    return ids


def stepped(built: BrillmForCausalLM, micro: list[list[Tensor]], limit: float = 0.5) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and clipped norms of some optimizer steps, and the weights and moments after them."""
    optimizer = adamw(param_groups(built, OPTIM), OPTIM)
    assert isinstance(optimizer, RowAdamW)
    told = []
    for parts in micro:
        optimizer.zero_grad()
        for ids in parts:
            loss = built(ids, labels=ids, skip_logits=True, generator=torch.Generator().manual_seed(3)).loss / len(parts)
            loss.backward()
            told.append(float(loss.detach()))
        told.append(float(parallel.clip(built, limit)))
        optimizer.step()
    state = dict(built.named_parameters())
    for name in ("graph.weight", "graph.bias"):
        state |= {f"{name} {key}": value for key, value in optimizer.state[state[name]].items()}
    return told, state


@pytest.fixture
def by_tensors(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A call that runs something as if Numba were not installed."""

    def run(call: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(native, "available", lambda: False)
            return call()

    return run


@pytest.mark.parametrize("kind", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"context": "chain"}, {"train_shared": False}, {"rivals": 4}, {"signal_size": 6}], ids=str)
@pytest.mark.parametrize("accumulate", [False, True], ids=["one batch", "two micro-batches"])
@pytest.mark.parametrize("few", [2, 1000], ids=["frequent nodes apart", "all nodes together"])
def test_steps_with_compiled_loops_are_those_with_tensors(
    kind: torch.dtype, options: dict[str, Any], accumulate: bool, few: int, by_tensors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "FEW", few)
    micro = [[batch(2 * step), batch(2 * step + 1)] if accumulate else [batch(step)] for step in range(3)]
    mine, found = stepped(model(kind, **options), micro)
    theirs, expected = by_tensors(lambda: stepped(model(kind, **options), micro))
    tolerance = 1e-10 if kind == torch.float64 else 2e-4
    assert mine == pytest.approx(theirs, rel=tolerance)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_wait_as_outer_products_and_never_as_matrices() -> None:
    built = model()
    optimizer = adamw(param_groups(built, OPTIM), OPTIM)
    built(batch(), labels=batch(), skip_logits=True).loss.backward()
    weight = built.graph.weight
    waiting = rows.pending(weight)
    assert weight.grad is None and waiting is not None
    whole = rows.as_sparse(waiting, weight).to_dense()
    torch.testing.assert_close(waiting.norm(), whole.norm())
    plain = model()
    plain.row_gradients = True
    plain(batch(), labels=batch(), skip_logits=True).loss.backward()
    torch.testing.assert_close(whole, plain.graph.weight.grad.to_dense())
    kept = waiting.slabs.left
    optimizer.zero_grad()
    assert rows.pending(weight) is None
    built(batch(), labels=batch(), skip_logits=True).loss.backward()
    again = rows.pending(weight)
    assert again is not None and again.slabs.left.data_ptr() == kept.data_ptr(), "memory is used again"
    torch.testing.assert_close(rows.as_sparse(again, weight).to_dense(), whole)


def test_gradients_are_handed_out_once() -> None:
    built = model()
    loss = built(batch(), labels=batch(), skip_logits=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"called on this loss of a signal graph before: .* Run the forward pass again"):
        loss.backward()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(stepped(model(torch.float32, rivals=3), [[batch(1)], [batch(2)]]))
    finally:
        torch.set_num_threads(before)
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


@torch.no_grad()
def test_energies_of_32_bits_are_as_good_as_those_of_tensors(by_tensors: Any) -> None:
    exact = model(torch.float64).eval()(batch()).logits
    mine = model(torch.float32).eval()(batch()).logits
    theirs = by_tensors(lambda: model(torch.float32).eval()(batch()).logits)
    assert (mine - exact).abs().max() < 2 * (theirs - exact).abs().max() + 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"context": "chain"},
        {"positions": "none"},
        {"beyond": "continue"},
        {"positions": "multiplied", "arithmetic": "released"},
        {"initializer_range": 2.0, "position_scale": 0.5},
    ],
    ids=str,
)
def test_decoding_writes_the_same_tokens(options: dict[str, Any], by_tensors: Any) -> None:
    prompts = [[5, 9], [1], [3, 3, 7, 0, 2]]
    built = model(**options).eval()
    torch.nn.init.normal_(getattr(built.graph, "position_weight", torch.empty(1)))
    mine = generate(built, prompts, max_new_tokens=80, temperature=0)
    assert mine == by_tensors(lambda: generate(built, prompts, max_new_tokens=80, temperature=0))
    assert mine[1] == generate(built, prompts[1:2], max_new_tokens=80, temperature=0)[0]


@torch.no_grad()
def test_one_more_token_has_the_energies_of_the_whole_text() -> None:
    built, ids = model(beyond="hold").eval(), batch(length=40)
    memory = built(ids[:, :3], use_cache=True).past_key_values
    steps = [built(ids[:, t : t + 1], past_key_values=memory).logits for t in range(3, 40)]
    torch.testing.assert_close(torch.cat(steps, dim=1), built(ids).logits[:, 3:], rtol=0, atol=1e-10)
    assert memory.memory.state[0].shape[1] == 33


def test_nothing_imports_the_compiler_before_a_graph_is_used() -> None:
    code = "import sys, pathlm, pathlm.models.brillm.modeling, pathlm.train.optim; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
