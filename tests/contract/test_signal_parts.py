"""What an energy is the sum of: exact parts of every earlier step, and how they stand in path records."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
from test_signal_graph import PAIRS, Letters, tiny

from pathlm.models.brillm import reference
from pathlm.models.brillm import tracing as tracing_module
from pathlm.models.brillm.tracing import parts, paths
from pathlm.path import Path, Step, read_paths, write_paths

OPTIONS: list[dict[str, Any]] = [
    {},
    {"context": "chain"},
    {"trained_positions": 4},
    {"trained_positions": 4, "beyond": "continue"},
    {"positions": "none"},
    {"arithmetic": "released", "positions": "multiplied"},
    {"context": "decay", "normalise": True, "keep_initial": True},
    {"context": "node-decay"},
    {"context": "chain+pooled+gated+timescales", "normalise": True},
]
TEXT = [0, 1, 2, 3, 1, 1, 5, 0, 4, 0]


def made(dtype: torch.dtype, **options: Any) -> Any:
    model = tiny(**options).to(dtype)
    with torch.no_grad():
        for name, p in model.graph.named_parameters():
            if name not in ("weight", "bias", "node_bias"):
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
    return model


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@torch.no_grad()
def test_parts_sum_to_the_whole(options: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    """Before GELU to what the reference sends to a node, and behind it to the energies of the model."""
    model = made(dtype, **options)
    out = model(torch.tensor([TEXT]), trace=True, use_cache=False)
    for column, node in enumerate(TEXT):
        found = parts(out.trace, 0, column, range(6))
        torch.testing.assert_close(found.energy_KP.sum(1), out.logits[0, column].double(), rtol=0, atol=tolerance)
        z_KD = found.term_KPD.sum(1)
        signal, place = out.trace.signal_BTD[0, column], reference.position(model, column + 1)
        for target in range(6):
            row = reference.edge(model, node, target)
            whole = model.graph.weight[row] @ signal + model.graph.bias[row] + place
            torch.testing.assert_close(z_KD[target], whole.double(), rtol=0, atol=tolerance)
            assert torch.equal(found.term_KPD[target, -2], model.graph.bias[row].double())
            assert torch.equal(found.term_KPD[target, -1], place.double())


@torch.no_grad()
def test_each_part_is_what_an_earlier_output_sends_there() -> None:
    """The signal is the weighted mean of earlier outputs; a part is the edge's matrix times one of them with its weight."""
    model = made(torch.float64)
    out = model(torch.tensor([TEXT]), trace=True)
    softmax = model.graph.position_weight[:5].softmax(0)
    found = parts(out.trace, 0, 5, [1, 3])
    assert found.column_P == [1, 2, 3, 4, 5, "bias", "position"], "the first signal feeds the first edge only"
    signal, outputs = reference.gelu(torch.full((4,), 0.25) + model.graph.node_bias[0] + reference.position(model, 0)), []
    for i, (source, target) in enumerate(pairwise(TEXT[:6])):
        outputs.append(reference.outcome(model, signal, source, target, reference.position(model, i + 1)))
        signal = reference.pooled(model, outputs)
    for k, output in enumerate(outputs):
        for place, target in enumerate([1, 3]):
            sent = model.graph.weight[reference.edge(model, TEXT[5], target)] @ (softmax[k] * output)
            torch.testing.assert_close(found.term_KPD[place, k], sent, rtol=0, atol=1e-10)
    assert parts(out.trace, 0, 0, [1]).column_P == [0, "bias", "position"]
    chain = made(torch.float64, context="chain")(torch.tensor([TEXT]), trace=True)
    assert parts(chain.trace, 0, 5, [1]).column_P == [5, "bias", "position"]


@pytest.mark.parametrize("options", [{}, {"context": "pooled+decay", "normalise": True}], ids=str)
@torch.no_grad()
def test_what_an_earlier_pass_read_is_one_part(options: dict[str, Any]) -> None:
    model, ids = made(torch.float64, **options), torch.tensor([TEXT])
    whole = model(ids, trace=True)
    memory = model(ids[:, :4], use_cache=True).past_key_values
    later = model(ids[:, 4:], past_key_values=memory, trace=True)
    mine, theirs = parts(later.trace, 0, 3, range(6)), parts(whole.trace, 0, 7, range(6))
    assert mine.column_P == [0, 1, 2, 3, "earlier", "bias", "position"] and theirs.column_P == [*range(1, 8), "bias", "position"]
    torch.testing.assert_close(mine.energy_KP[:, 4], theirs.energy_KP[:, :3].sum(1), rtol=0, atol=1e-10)
    torch.testing.assert_close(mine.energy_KP[:, :4], theirs.energy_KP[:, 3:7], rtol=0, atol=1e-10)


@torch.no_grad()
def test_parts_of_packed_and_padded_texts_are_those_of_the_texts_alone() -> None:
    model = made(torch.float64)
    ids, documents = torch.tensor([[3, 3, 0, 1, 2, 5, 4, 0]]), torch.tensor([[-1, 1, 1, -1, 2, 2, 2, 2]])
    packed = paths(model(ids, document_ids=documents, trace=True), Letters())
    alone = [paths(model(torch.tensor([text]), trace=True), Letters())[0] for text in ([3, 0], [2, 5, 4, 0])]
    for mine, theirs in zip(packed, alone, strict=True):
        for a, b in zip(mine.steps, theirs.steps, strict=True):
            assert [name for name, _ in a.parts] == [name for name, _ in b.parts]
            assert [x for _, x in a.parts] == pytest.approx([x for _, x in b.parts])


@torch.no_grad()
def test_a_path_names_its_parts_and_sums_those_far_back(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(torch.float64)
    (path,) = paths(model(torch.tensor([TEXT]), trace=True), Letters())
    assert path.steps[0] == Step("a", 0.0)
    assert [[name for name, _ in step.parts] for step in path.steps[1:4]] == [
        ["signal", "bias", "position"],
        ["step:1", "bias", "position"],
        ["step:1", "step:2", "bias", "position"],
    ]
    for step in path.steps[1:]:
        assert sum(number for _, number in step.parts) == pytest.approx(step.score, abs=1e-10)
        assert len(step.rivals) == len(step.rival_parts) > 0
        for (_, energy), numbers in zip(step.rivals, step.rival_parts, strict=True):
            assert sum(numbers) == pytest.approx(energy, abs=1e-10) and len(numbers) == len(step.parts)
    monkeypatch.setattr(tracing_module, "NEAR", 2)
    (short,) = paths(model(torch.tensor([TEXT]), trace=True), Letters())
    assert [name for name, _ in short.steps[6].parts] == ["earlier", "step:4", "step:5", "bias", "position"]
    assert short.steps[6].parts[0][1] == pytest.approx(sum(number for _, number in path.steps[6].parts[:3]))
    write_paths(tmp_path / "paths.jsonl", [path])
    assert list(read_paths(tmp_path / "paths.jsonl")) == [path]
    assert "parts" not in Path("brian", "x", (Step("block:1", 1.0),)).to_json(), "where there are none, records are as before"
    with pytest.raises(ValueError, match="rival_parts of 'b' must be 3 numbers for each of 1 rivals"):
        Path.from_json(Path("brillm", "ab", (replace(path.steps[1], rivals=path.steps[1].rivals[:2], rival_parts=((1.0,),)),)).to_json())


@torch.no_grad()
def test_nodes_that_share_an_edge_are_one_rival_that_the_node_taken_is_not_among() -> None:
    model = made(torch.float64)
    text = torch.tensor([[1, 5, 1, 2]])  # b → f shares with a, d, e; b → b and b → c are edges of their own
    out = model(text, trace=True)
    (path,) = paths(out, Letters())
    energies = {
        "b": float(out.logits[0, 0, 1]),
        "c": float(out.logits[0, 0, 2]),
        "3 nodes without an edge of their own": path.steps[1].score,
    }
    assert dict(path.steps[1].rivals) == pytest.approx(energies)
    assert [e for _, e in path.steps[1].rivals] == sorted(energies.values(), reverse=True)
    assert {name for name, _ in path.steps[3].rivals} == {"b", "4 nodes without an edge of their own"}
    assert out.trace.many_BTK[0, 0].tolist().count(0) == 3 and out.trace.many_BTK[0, 0].sum() == 6
    # f has no edges at all: six nodes share, and the first stands for them.
    assert path.steps[2].rivals[0][0] == "5 nodes without an edge of their own" and path.steps[2].margin == pytest.approx(0)
    two = type(model).from_edges(model.config, tracing_edges()).double().eval()
    (path,) = paths(two(torch.tensor([[0, 5], [0, 4]]), trace=True), Letters())[:1]
    assert "e" in dict(path.steps[1].rivals), "of two that share, the other has its name"
    assert "1 node without an edge of its own" in dict(paths(two(torch.tensor([[0, 4]]), trace=True), Letters())[0].steps[1].rivals)


def tracing_edges() -> Any:
    from pathlm.models.brillm.edges import Edges

    return Edges.from_pairs(np.array([(0, 0), (0, 1), (0, 2), (0, 3), *PAIRS[1:]]), 6)
