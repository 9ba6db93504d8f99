"""What a signal graph can be asked: energies of any nodes at any step, from any start and signal, over nodes of any names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_signal_graph import tiny

from pathlm.models.brillm import recall as recall_module
from pathlm.models.brillm import reference
from pathlm.models.brillm.recall import Nodes, energies_at, graph_of, neighbours, recall
from pathlm.models.brillm.tracing import paths
from pathlm.path import Neighbours, read_neighbours

TEXT = [1, 2, 3, 1, 1, 5, 0]


@pytest.mark.parametrize("at_once", [1, 2**22])
@torch.no_grad()
def test_energies_of_some_nodes_are_those_among_all(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall_module, "AT_ONCE", at_once)
    model = tiny().double()
    found = energies_at(model, TEXT, [5, 0, 2, 2])
    torch.testing.assert_close(found, reference.energies(model, TEXT)[:, [5, 0, 2, 2]], rtol=0, atol=1e-10)
    # Any node may begin, and any signal enter it.
    signal = torch.linspace(-1, 2, 4, dtype=torch.float64)
    for start in range(6):
        mine = energies_at(model, [start, 2], [1, 4], initial_signal=signal)
        theirs = reference.energies(model, [start, 2], initial_signal=signal)[:, [1, 4]]
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
        assert not torch.allclose(mine, energies_at(model, [start, 2], [1, 4]))


def test_part_of_a_path_recalls_the_nodes_of_most_energy() -> None:
    model = tiny().double()
    energies = reference.energies(model, TEXT)[-1].tolist()
    order = sorted(range(6), key=lambda node: (-energies[node], node))
    found = recall(model, TEXT, top_k=4)
    assert [node for node, _ in found] == order[:4] and [e for _, e in found] == pytest.approx([energies[n] for n in order[:4]])
    assert [node for node, _ in recall(model, TEXT, among=[4, 2, 3])] == [node for node in order if node in (4, 2, 3)]
    released = tiny(arithmetic="released", positions="multiplied")
    assert len(recall(released, TEXT)) == 6, "what training computes; decoding does not offer the node it stands on"


def test_nodes_may_be_anything_and_learn_their_paths() -> None:
    walks = [[("patch", 0), "dark", 7], [("patch", 1), "bright", 9]]
    torch.manual_seed(0)
    model, nodes = graph_of(walks, signal_size=8)
    assert nodes.names == (("patch", 0), "dark", 7, ("patch", 1), "bright", 9) and model.config.edges == 4
    ids = torch.tensor([nodes.ids(walk) for walk in walks])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(40):
        loss = model(ids, labels=ids, skip_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for walk in walks:
        assert nodes.names[recall(model, nodes.ids(walk[:2]), among=nodes.ids([7, 9]))[0][0]] == walk[2]
    with torch.no_grad():
        (path,) = paths(model(ids[:1], trace=True), nodes)
    assert [step.node for step in path.steps] == ["('patch', 0)", "dark", "7"]
    wider, same = graph_of(walks[:1], nodes=nodes, signal_size=8, min_count=2)
    assert same is nodes and (wider.config.vocab_size, wider.config.edges) == (6, 0)
    assert graph_of([[1], [2, 3]], signal_size=2)[0].config.edges == 1


def test_what_does_not_exist_is_named() -> None:
    model = tiny()
    for wrong, message in (([], "must be at least one"), ([6], r"tokens=\[6\]: must be"), ([-1], "must be")):
        with pytest.raises(ValueError, match=message):
            energies_at(model, wrong, [1])
    with pytest.raises(ValueError, match=r"nodes=\[9\]: must be at least one number from 0 to vocab_size - 1 = 5"):
        recall(model, [1], among=[9])
    with pytest.raises(ValueError, match="top_k=0: must be at least 1"):
        recall(model, [1], top_k=0)
    with pytest.raises(ValueError, match="node 'c': is not among the 2 nodes"):
        Nodes(("a", "b")).ids(["a", "c"])
    with pytest.raises(ValueError, match="names: 'a' stands there twice"):
        Nodes(("a", "b", "a"))
    with pytest.raises(ValueError, match="edges=5: follows from the paths; leave it out"):
        graph_of(["ab"], edges=5)
    with pytest.raises(ValueError, match="BrillmConfig has no option width"):
        graph_of([["a", "b"]], width=3)
    with pytest.raises(ValueError, match="initial_signal has shape"):
        energies_at(model, [1], [2], initial_signal=torch.ones(3))


def test_neighbours_are_the_edges_of_a_node_with_the_energies_of_texts_that_begin_there() -> None:
    walks = [["a", "b", "c"], ["a", "c", "b"], ["d", "b", "b"]]
    torch.manual_seed(0)
    model, nodes = graph_of(walks, signal_size=8)
    b, first = nodes.ids(["b"])[0], nodes.ids(["a"])[0]
    found, other = neighbours(model, nodes, [b, first, b])
    assert (found.node, found.leads, found.comes, other.node, other.comes) == ("b", 2, 4, "a", 0)
    energies = [reference.energies(model, [node])[-1] for node in range(4)]
    assert dict(found.leads_to) == pytest.approx({nodes.names[v]: energies[b][v].item() for v in nodes.ids(["b", "c"])})
    assert dict(found.comes_from) == pytest.approx({name: energies[u][b].item() for u, name in enumerate(nodes.names)})
    assert found.shared == pytest.approx(energies[b][first].item())
    for best in (found.leads_to, found.comes_from):
        assert [energy for _, energy in best] == sorted((energy for _, energy in best), reverse=True)
    assert neighbours(model, nodes, [b], top_k=1)[0].comes_from == found.comes_from[:1]
    assert Neighbours.from_json(found.to_json()) == found
    with pytest.raises(ValueError, match="nodes=\\[9\\]"):
        neighbours(model, nodes, [9])


def test_a_line_that_is_no_record_of_neighbours_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "neighbours.jsonl").write_text('{"node": "a"}\n')
    with pytest.raises(ValueError, match=r"neighbours\.jsonl, line 1: not a record of neighbours"):
        list(read_neighbours(tmp_path / "neighbours.jsonl"))
