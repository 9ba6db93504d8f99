"""Moves between blocks and slices of tokens: equal to what is counted by hand, token by token, in the paths of traced passes."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from arrays import ArrayCorpus, random_documents
from test_routing import STEPS, make_routed

from pathlm.evaluate.correlation import equal_parts
from pathlm.evaluate.route_map import RouteMap
from pathlm.evaluate.routes import COLUMNS, RouteRecords, route_table
from pathlm.evaluate.slices import CLASSES, PARTS, Slices, token_class
from pathlm.models.brian.tracing import paths


class Names:
    """A tokenizer that only tells of which token a path is."""

    def decode(self, ids):
        return str(ids[0])


@pytest.fixture(scope="module", params=[1, 2], ids=["one block a step", "two blocks a step"])
def model(request):
    return make_routed(top_k=request.param, context=64)


@pytest.fixture(scope="module")
def corpus():
    return ArrayCorpus(validation=random_documents([4, 14, 9, 33, 1]), train=random_documents([50]))


@torch.no_grad()
def routes_by_hand(model, corpus):
    """For every token the steps of its route: (names of the blocks, their shares, probabilities of all actions), and at last OUT."""
    found = []
    for tokens in corpus.data["validation"]:
        output = model(input_ids=torch.tensor([tokens[:-1].tolist()]), trace=True)
        chances = output.trace.probability_BTRA[0].tolist()
        for path, chance in zip(paths(output, Names()), chances, strict=True):
            route = path.steps[path.first : path.first + len(path.steps) - model.config.pre_blocks - model.config.post_blocks]
            steps = []
            for step, of in zip(route, [*chance, [0.0] * len(chance[0])], strict=False):
                blocks = [] if step.node == "exit" else [int(name.removeprefix("block:")) - 1 for name in step.node.split("+")]
                total = sum(of[block - 1] for block in blocks)
                steps.append((blocks, [of[block - 1] / total for block in blocks], of))
            found.append(steps)
    return found


def measured(model, corpus, **options):
    found = RouteMap(model)
    records = route_table(model, corpus, context=64, route_map=found, **options)
    return found, records


def test_moves_loads_and_choices_are_those_of_every_tokens_path(model, corpus):
    found, records = measured(model, corpus)
    blocks = model.config.pool_blocks
    moves, load, by_step = np.zeros((blocks + 2, blocks + 2)), np.zeros(blocks), np.zeros((STEPS, blocks + 1))
    routes = routes_by_hand(model, corpus)
    assert len(routes) == len(records) and len({len(route) for route in routes}) > 2, "tokens leave at different steps"
    for route in routes:
        before = {0: 1.0}
        for number, (visited, shares, _) in enumerate(route):
            after = dict(zip(visited, shares, strict=True)) or {blocks + 1: 1.0}
            for one, a in before.items():
                for two, b in after.items():
                    moves[one, two] += a * b
            for block in visited:
                load[block - 1] += 1
            if number < STEPS:
                for node, share in after.items():
                    by_step[number, node - 1] += share
            before = after
    told = found.to_dict()
    assert told["nodes"] == ["IN", "B1", "B2", "B3", "B4", "OUT"]
    np.testing.assert_allclose(told["transitions"], moves, atol=2e-3)
    np.testing.assert_allclose(found.moves_KK, moves, rtol=1e-6)
    np.testing.assert_allclose(told["load"], load / load.sum())
    np.testing.assert_allclose(told["by_step"], by_step / by_step.sum(1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(told["deciding"], by_step.sum(1) / len(routes), rtol=1e-6)
    shares = load[load > 0] / load.sum()
    assert told["load_entropy"] == pytest.approx(-(shares * np.log(shares)).sum() / math.log(blocks))
    if model.config.route_top_k == 1:
        assert all(isinstance(count, int) for row in told["transitions"] for count in row)


def test_the_numbers_of_the_routes_are_those_of_every_decision(model, corpus):
    found, _ = measured(model, corpus)
    routes, position = routes_by_hand(model, corpus), model.pool.position.double()
    entropy, out, distance, steps, diverse = [], [], [], Counter(), Counter()
    for route in routes:
        before = {0: 1.0}
        diverse[tuple(tuple(visited) for visited, _, _ in route)] += 1
        for number, (visited, shares, chance) in enumerate(route):
            if visited:
                among = np.array(chance[:-1]) / sum(chance[:-1])
                entropy.append(-(among[among > 0] * np.log(among[among > 0])).sum())
            if model.config.min_route_steps <= number < STEPS:
                out.append(chance[-1])
            after = dict(zip(visited, shares, strict=True))
            for one, a in before.items():
                for two, b in after.items():
                    distance.append((a * b, 1 - float(position[one] @ position[two])))
                    if one:
                        steps[max(min(two - one, 2), -1)] += a * b
            before = after
    told, moved = found.metrics(), sum(steps.values())
    assert told["route/entropy"] == pytest.approx(np.mean(entropy), rel=1e-6)
    assert told["route/exit_probability"] == pytest.approx(np.mean(out), rel=1e-6)
    for name, way in (("advance", 1), ("recur", 0), ("skip", 2), ("back", -1)):
        assert told[f"route/{name}"] == pytest.approx(steps[way] / moved, rel=1e-6)
    weights, far = np.array(distance).T
    assert told["route/location_distance"] == pytest.approx((weights * far).sum() / weights.sum(), rel=1e-5)
    share = np.array(list(diverse.values())) / len(routes)
    assert told["route/path_diversity"] == pytest.approx(math.exp(-(share * np.log(share)).sum()))
    assert 1 < told["route/path_diversity"] < len(routes)


def test_windows_of_a_long_document_count_every_token_once(corpus):
    model = make_routed(context=16)
    found = RouteMap(model)
    records = route_table(model, corpus, context=10, stride=3, route_map=found)
    assert found.moves_KK[0].sum() == found.moves_KK[:, -1].sum() == len(records) == found.paths.total()
    assert found.visits_M.sum() == records.steps.sum()
    np.testing.assert_allclose(found.moves_KK[:, 1:-1].sum(), records.steps.sum())


def test_several_groups_of_documents_give_the_same_map(model, corpus, monkeypatch):
    whole, _ = measured(model, corpus)
    monkeypatch.setattr("pathlm.evaluate.lm.GROUP_TOKENS", 10)
    parts, _ = measured(model, corpus)
    assert parts.metrics() == pytest.approx(whole.metrics()) and parts.paths == whole.paths
    np.testing.assert_allclose(parts.moves_KK, whole.moves_KK)


def table(tokens, *, document=None, position=None, steps=None):
    count = len(tokens)
    zeros = np.zeros(count)
    document = zeros.astype(int) if document is None else np.array(document)
    position = np.arange(count) if position is None else np.array(position)
    steps = np.arange(count) if steps is None else np.array(steps)
    return RouteRecords(document, position, np.array(tokens), zeros, np.arange(count) / 2, steps, steps + 2, {})


class Words:
    """A tokenizer of a few texts."""

    texts = ("<s>", " the", "re", "mi", "12", ".", "'s", "国", "\N{REPLACEMENT CHARACTER}", "\n", " 7", "一")
    all_special_ids = (0,)

    def decode(self, ids):
        return self.texts[ids[0]]

    def convert_ids_to_tokens(self, token):
        return "\N{LOWER ONE EIGHTH BLOCK}mi" if token == 3 else self.texts[token]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([0, 1, 2, 2], ["other", "word start", "inside word", "inside word"]),
        ([0, 2, 2, 9, 2], ["other", "word start", "inside word", "other", "word start"]),
        ([2, 3, 3], ["word start", "word start", "word start"]),
        ([1, 6, 5, 2], ["word start", "inside word", "punctuation", "word start"]),
        ([4, 10, 7, 11, 8], ["digit", "digit", "ideograph", "ideograph", "other"]),
    ],
    ids=str,
)
def test_a_token_is_what_it_is_in_its_word(tokens, expected):
    assert [CLASSES[number] for number in token_class(table(tokens), Words())] == expected


def test_a_word_does_not_go_on_in_another_document():
    found = token_class(table([1, 2, 2], document=[0, 0, 1], position=[0, 1, 0]), Words())
    assert [CLASSES[number] for number in found] == ["word start", "inside word", "word start"]


def tenths(values):
    _, kind, count = np.unique(values, return_inverse=True, return_counts=True)
    return equal_parts(count, PARTS)[kind]


def slices(records, tokenizer, frequency, *, difficulty, gain):
    """Slices of records that come a document at a time."""
    found = Slices(tokenizer, frequency, np.unique(difficulty)[1:])
    for number in np.unique(records.document):
        rows = records.document == number
        part = RouteRecords(**{name: getattr(records, name)[rows] for name in COLUMNS}, header={})
        found.add(part, difficulty_N=difficulty[rows], gain_N=gain[rows])
    return found.rows()


def test_equals_lie_in_one_tenth_and_parts_are_equal_without_them():
    assert tenths(np.arange(30)).tolist() == [n // 3 for n in range(30)]
    assert tenths(np.array([5, 5, 5, 5])).tolist() == [5] * 4
    assert tenths(np.array([1, 1, 1, 1, 1, 1, 1, 1, 2, 3])).tolist() == [4] * 8 + [8, 9]


def test_slices_are_means_over_their_tokens():
    tokens = [1, 2, 5] * 15
    records = table(tokens)
    gain = np.linspace(-1, 1, 45)
    frequency = np.array([0, 9, 5, 0, 0, 70])
    found = slices(records, Words(), frequency, difficulty=-records.loss, gain=gain)
    assert [(row["label"], row["tokens"]) for row in found["position"]] == [("0–15", 16), ("16–31", 16), ("32–63", 13)]
    assert [(row["label"], row["tokens"]) for row in found["class"]] == [("word start", 15), ("inside word", 15), ("punctuation", 15)]
    assert [row["tokens"] for row in found["frequency"]] == [15, 15, 15]
    assert [row["loss"] for row in found["frequency"]] == [row["loss"] for row in (found["class"][i] for i in (1, 0, 2))]
    assert (found["difficulty"][0]["label"], found["difficulty"][-1]["label"]) == ("1 (easiest)", "10 (hardest)")
    assert found["difficulty"][0]["loss"] > found["difficulty"][-1]["loss"], "the easiest by the other model are the hardest here"
    last = slice(32, 45)
    assert found["position"][-1] == {
        "label": "32–63", "tokens": 13, "loss": pytest.approx(records.loss[last].mean()), "steps_mean": records.steps[last].mean(),
        "block_evaluations": records.evaluations[last].mean(), "gain": pytest.approx(gain[last].mean()),
    }  # fmt: skip
    for rows in found.values():
        assert sum(row["tokens"] for row in rows) == 45
        assert sum(row["tokens"] * row["steps_mean"] for row in rows) == pytest.approx(records.steps.sum())


def test_one_token_far_back_is_sliced_too():
    records = table([1], position=[1000])
    found = slices(records, Words(), np.ones(12), difficulty=records.loss, gain=np.zeros(1))
    assert [row["label"] for row in found["position"]] == ["512–1023"]


def test_a_map_of_one_block_has_nothing_to_share():
    pool = SimpleNamespace(position=torch.zeros(3, 0))
    config = SimpleNamespace(pool_blocks=1, max_route_steps=2, pre_blocks=0, min_route_steps=0)
    found = RouteMap(SimpleNamespace(config=config, pool=pool))
    assert found.to_dict()["load_entropy"] == 1.0
    assert found.metrics()["route/path_diversity"] == 0.0 and found.metrics()["route/location_distance"] == 0.0
