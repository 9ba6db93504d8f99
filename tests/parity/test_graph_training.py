"""How a graph is trained: energies counted before the first step, positions that rows train, numbers of the signal that are dropped."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from pathlm.generate import generate
from pathlm.models import open_whole
from pathlm.models.brillm.configuration import BrillmConfig
from pathlm.models.brillm.counted import SHARED_ENERGY, before_gelu
from pathlm.models.brillm.edges import Edges, count
from pathlm.models.brillm.modeling import BrillmForCausalLM, from_rows
from pathlm.models.brillm.recall import graph_of

NODES = 12


def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Node 0 is followed by many, node 1 by one, and node 11 by none."""
    draw = np.random.default_rng(0)
    source = draw.integers(0, 11, 400)
    target = np.where(source == 1, 3, np.minimum(draw.geometric(0.2, 400) + source // 2, NODES - 1))
    return count([np.stack((source, target), axis=1)], NODES)


def made(**options: Any) -> tuple[BrillmForCausalLM, np.ndarray, np.ndarray]:
    torch.manual_seed(0)
    config = BrillmConfig(vocab_size=NODES, signal_size=8, positions="none", initial_energies="counts", **options)
    key, times = pairs()
    return BrillmForCausalLM.from_counts(config, key, times).double(), key, times


def discounted(key: np.ndarray, times: np.ndarray, min_count: int) -> np.ndarray:
    """Return the bigram's probabilities (V, V), by the book."""
    once, twice = (times == 1).sum(), (times == 2).sum()
    discount = once / (once + 2 * twice)
    table = np.zeros((NODES, NODES))
    table[key // NODES, key % NODES] = times
    result = np.empty_like(table)
    for u in range(NODES):
        own = table[u] >= min_count
        left = np.where(own, table[u] - discount, 0.0)
        rest = table[u].sum() - left.sum()
        if table[u].sum() == 0:
            result[u] = 1 / NODES
            continue
        result[u] = left + max(rest, 0.5) / NODES
        result[u] /= result[u].sum()
    return result


@pytest.mark.parametrize("min_count", [1, 2])
@torch.no_grad()
def test_a_fresh_model_is_the_bigram_model_of_its_counts(min_count: int) -> None:
    model, key, times = made(min_count=min_count)
    model.graph.weight.zero_()
    ids = torch.arange(NODES)[:, None]
    found = model(ids, use_cache=False).logits[:, 0].softmax(-1)
    expected = torch.from_numpy(discounted(key, times, min_count))
    assert expected[0].max() > 3 * expected[0].min()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_the_shared_edge_starts_with_its_energy() -> None:
    model, _, _ = made()
    y = torch.nn.functional.gelu(model.graph.bias[0])
    assert torch.linalg.vector_norm(y).item() == pytest.approx(SHARED_ENERGY, abs=1e-6)


def test_directions_of_edges_differ_so_that_outputs_tell_where_they_came_from() -> None:
    model, _, _ = made()
    y = torch.nn.functional.normalize(torch.nn.functional.gelu(model.graph.bias[1:]), dim=1)
    like = y @ y.T - torch.eye(len(y), dtype=y.dtype)
    assert like.max() < 0.9999
    assert (y > 0.01).double().mean() < 0.75


def test_bare_edges_start_evenly_whatever_is_said() -> None:
    config = BrillmConfig(vocab_size=NODES, signal_size=8, initial_energies="counts")
    model = BrillmForCausalLM.from_edges(config, Edges.even(20, NODES))
    assert model.graph.bias.abs().max() <= config.initializer_range


def test_the_inverse_of_gelu_is_one() -> None:
    y = torch.cat((torch.zeros(1, dtype=torch.float64), torch.logspace(-6, 2, 200, dtype=torch.float64)))
    torch.testing.assert_close(torch.nn.functional.gelu(before_gelu(y)), y, rtol=1e-9, atol=1e-12)


def test_an_unknown_start_is_refused_by_name() -> None:
    with pytest.raises(StrictDataclassError, match="initial_energies='bigram': must be one of even, counts"):
        BrillmConfig(vocab_size=NODES, initial_energies="bigram")


def test_position_weights_that_no_row_trains_are_told() -> None:
    rows = SimpleNamespace(corpus=None, vocab_size=NODES, length=8, rows_per_epoch=4, batch=rows_of_8)
    with pytest.warns(UserWarning, match="trained_positions=7: rows of 8 tokens train 6"):
        from_rows(BrillmConfig(vocab_size=NODES, signal_size=8, trained_positions=7), rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_rows(BrillmConfig(vocab_size=NODES, signal_size=8, trained_positions=6), rows)
        from_rows(BrillmConfig(vocab_size=NODES, signal_size=8, trained_positions=7, context="decay"), rows)


def rows_of_8(first: int, count: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(first).integers(0, NODES, (count, 8))
    return {"input_ids": ids, "labels": ids, "document_ids": np.zeros_like(ids)}


def test_numbers_of_a_signal_are_dropped_in_training_alone() -> None:
    model, _, _ = made(signal_dropout=0.5)
    ids = torch.arange(NODES).view(2, -1)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model(ids, labels=ids).loss.item()

    model.eval()
    whole = loss(0)
    assert whole == loss(1)
    model.train()
    assert loss(0) != loss(1)
    assert loss(0) != whole
    model.config.signal_dropout = 0.0
    assert loss(0) == whole


def test_a_vocabulary_larger_than_the_texts_changes_no_pair() -> None:
    rows = SimpleNamespace(corpus=None, vocab_size=NODES, length=8, rows_per_epoch=4, batch=rows_of_8)
    small, large = (from_rows(BrillmConfig(vocab_size=size, signal_size=8, context="chain"), rows) for size in (NODES, NODES + 5))
    pairs = [torch.stack((m.graph.key // m.config.vocab_size, m.graph.key % m.config.vocab_size)) for m in (small, large)]
    assert small.config.edges > 10
    assert torch.equal(*pairs)


def test_a_graph_without_edges_is_refused() -> None:
    rows = SimpleNamespace(corpus=None, vocab_size=NODES, length=8, rows_per_epoch=4, batch=rows_of_8)
    with pytest.raises(ValueError, match=r"min_count=1000: no pair came so often \(at most \d+ times\)"):
        from_rows(BrillmConfig(vocab_size=NODES, signal_size=8, context="chain", min_count=1000), rows)


@pytest.mark.parametrize("label", [NODES, -5])
def test_labels_that_are_no_tokens_are_refused(label: int) -> None:
    model, _, _ = made()
    ids = torch.arange(NODES).view(2, -1)
    with pytest.raises(ValueError, match=f"labels holds {label}: must lie in 0 … vocab_size - 1 = {NODES - 1}, or be -100"):
        model(ids, labels=torch.full_like(ids, label))


def test_a_graph_of_walks_may_start_from_its_counts() -> None:
    walks = ["abc", "abc", "ab", "ab", "ac"]
    graph, nodes = graph_of(walks, initial_energies="counts", initializer_range=1e-6, positions="none", signal_size=8)
    from_a, b, c = graph(torch.tensor([nodes.ids("a")]), use_cache=False).logits[0, 0], *nodes.ids("bc")
    assert from_a[b] > from_a[c] > from_a[nodes.ids("a")[0]] + 0.1


def test_weights_of_another_wiring_are_refused(tmp_path: Path) -> None:
    made()[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"context": "decay+pooled"}))
    with pytest.raises(
        ValueError, match=r"missing weights graph\.decay, graph\.mix; the weights must be those that its config.json asks for"
    ):
        open_whole(tmp_path)


@pytest.mark.parametrize(
    "options", [{"initial_signal": float("nan")}, {"position_scale": float("inf")}, {"initializer_range": float("inf")}]
)
def test_numbers_without_end_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(StrictDataclassError, match=f"{next(iter(options))}=(nan|inf): must be a finite number"):
        BrillmConfig(vocab_size=NODES, **options)


@torch.no_grad()
def test_logits_of_single_places_come_in_the_order_that_was_asked() -> None:
    model, _, _ = made()
    ids = torch.arange(NODES).view(2, -1)
    whole, places = model(ids, use_cache=False).logits, torch.tensor([3, 1, -1, 3])
    assert torch.equal(model(ids, use_cache=False, logits_to_keep=places).logits, whole[:, places])


def test_the_processor_never_asks_for_the_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pathlm.models.brillm.triton_kernels", None)  # importing it is an error now
    model, _, _ = made()
    ids = torch.arange(NODES).view(2, -1)
    model(ids, labels=ids).loss.backward()
    assert model.graph.bias.grad is not None
    assert len(generate(model.eval(), [[1, 2]], max_new_tokens=3, temperature=0)[0]) == 3
