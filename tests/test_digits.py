"""The example of nodes that are no text: pictures become walks and come back, and the whole of it runs, small."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples" / "digits"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("digits", "measure", "picture"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import digits
    import measure

    yield digits, measure
    for name in ("digits", "measure", "picture"):
        sys.modules.pop(name, None)


def test_pictures_become_walks_and_come_back(modules):
    digits, _ = modules
    images = np.random.default_rng(0).integers(0, 17, (9, 8, 8)).astype(float)
    np.testing.assert_array_equal(digits.paste(digits.cut(images)), images)
    kinds = digits.Kinds(list(digits.cut(images).swapaxes(0, 1)))  # a kind for every picture
    np.testing.assert_array_equal(kinds.picture(kinds.read(images)), images)
    graph = digits.Digits(kinds, signal_size=2)
    told = np.random.default_rng(1).integers(0, 9, (3, 16))
    walk = torch.cat([graph.named(np.array([7, 0, 3])), graph.answers(told)], dim=1)
    names = [graph.nodes.names[node] for node in walk[0].tolist()]
    assert names[:4] == ["name?", "seven", ("place", 0), ("patch", 0, told[0, 0])] and len(names) == 34
    pairs = graph.model.graph.edges.lookup(walk[:, :-1], walk[:, 1:])
    assert bool((pairs > 0).all()), "every step of a walk has an edge of its own"
    back = graph.belongs[walk][:, 3::2]
    assert back[..., 0].tolist() == 3 * [list(range(16))] and back[..., 1].tolist() == told.tolist()


def test_what_is_left_out_leaves_no_gap_and_is_not_learned(modules):
    digits, _ = modules
    walk = torch.arange(1, 9).expand(2, 8)
    found = digits._closed_up(walk, torch.tensor([[True, False, True, True], [False, True, False, True]]), walk.clone())
    assert found["input_ids"].tolist() == [[1, 2, 5, 6, 7, 8, 3, 4], [3, 4, 7, 8, 1, 2, 5, 6]]
    assert found["labels"].tolist() == [[1, 2, 5, 6, 7, 8, -100, -100], [3, 4, 7, 8, -100, -100, -100, -100]]
    assert (found["labels"] != -100).equal(found["attention_mask"].bool())


def test_the_measurement_runs_small(modules, tmp_path, capsys):
    _, measure = modules
    pytest.importorskip("sklearn")
    options = ["--seeds", "1", "--epochs", "2", "--kinds", "3", "--pictures", "120", "--per-name", "2"]
    measure.main([*options, "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    (found,) = results["seeds"]
    assert found["named"].keys() == results["beside"]["named_by_regression"].keys() == {"4", "8", "12", "16"}
    assert results["beside"]["test_pictures"]["right"] > 0.7 > results["beside"]["random_pixels"]["right"]
    for name in ("drawn", "recalled"):
        assert (tmp_path / f"{name}.svg").read_text().count("<rect") > 1_000
    assert "| **signal graph**, temperature 0.5 |" in capsys.readouterr().out


def test_without_scikit_learn_the_example_says_what_to_install(modules, monkeypatch):
    digits, _ = modules
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r'needs scikit-learn.*pip install "pathlm\[examples\]"'):
        digits.pictures()
