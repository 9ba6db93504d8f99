"""Routes of every token, budgets, and controls: equal to one traced forward pass per document, and to histograms counted by hand."""

import dataclasses
import io
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from arrays import ArrayCorpus, Letters, make_llama, random_documents

from pathlm import build, preset
from pathlm.evaluate import routing, suites
from pathlm.evaluate.bootstrap import mean_with_interval
from pathlm.evaluate.controls import PASSES, Deal, Order, controls, random_depths, static_depths, token_frequency
from pathlm.evaluate.depth import Depth, Reading, aligned, readings
from pathlm.evaluate.lm import Text, score, token_losses
from pathlm.evaluate.plot import budget_svg
from pathlm.evaluate.records import LossFile, TokenLosses
from pathlm.evaluate.routes import all_take, budget_curve, route_table, route_totals

VOCABULARY = 40
STEPS = 4


def make_routed(top_k=1, context=16):
    """A model whose tokens leave at different steps, by a threshold that asks for less gain the larger the budget."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "block_position_dim": 8, "initializer_range": 0.3}
    model = build(preset("brian-tiny", vocab_size=VOCABULARY, max_position_embeddings=context, route_top_k=top_k, **sizes))
    pool = model.pool
    with torch.no_grad():
        for parameter in pool.router.parameters():
            parameter.normal_(std=0.5)
        pool.exit_threshold.copy_(torch.linspace(4, -4, len(pool.exit_threshold)))
        pool.budgets_trained.copy_(torch.tensor([0.4, 1.0]))
        pool.budget_default.fill_(0.6)
    return model.double().eval()


def make_plain(context=16):
    torch.manual_seed(1)
    return build(preset("plain-tiny", vocab_size=VOCABULARY, max_position_embeddings=context, initializer_range=0.3)).double().eval()


@pytest.fixture(scope="module")
def model():
    return make_routed()


@pytest.fixture(scope="module")
def corpus():
    return ArrayCorpus(validation=random_documents([4, 14, 9, 33, 1, 15, 40]), train=random_documents([200, 100], seed=5))


@pytest.fixture(scope="module")
def records(model, corpus):
    return route_table(model, corpus, context=16)


@torch.no_grad()
def traced(model, tokens, **options):
    """Steps in the pool and blocks run for every token of a row, counted in its paths."""
    trace = model(input_ids=torch.tensor([list(tokens)]), trace=True, **options).trace
    first, pre_and_post = trace.first_route_step, model.config.pre_blocks + model.config.post_blocks
    steps = [sum(block > 0 for block in route[first : first + STEPS]) for route in trace.block_BTS[0].tolist()]
    both = [sum(block > 0 for block in route) for route in trace.second_BTR[0].tolist()]
    return steps, [pre_and_post + a + b for a, b in zip(steps, both, strict=True)]


@pytest.mark.parametrize("top_k", [1, 2])
def test_steps_and_blocks_equal_those_of_one_traced_pass_per_document(corpus, top_k):
    model = make_routed(top_k, context=64)
    found = route_table(model, corpus)
    expected = [traced(model, document[:-1]) for document in corpus.data["validation"]]
    assert found.steps.tolist() == [n for steps, _ in expected for n in steps]
    assert found.evaluations.tolist() == [n for _, evaluations in expected for n in evaluations]
    assert len(np.unique(found.steps)) > 2


def test_long_documents_tell_of_each_token_as_in_the_window_that_counted_it(model, corpus):
    found = route_table(model, corpus, context=10, stride=4)
    document = corpus.data["validation"][3]
    expected = []
    for place in range(len(document) - 1):
        moves = 0 if place < 10 else math.ceil((place + 1 - 10) / 4)
        expected.append(traced(model, document[4 * moves : place + 1])[0][-1])
    assert found.steps[found.document == 3].tolist() == expected


def test_rows_say_which_token_and_what_its_successor_cost(model, corpus, records, tmp_path):
    assert score(model, corpus, context=16, records=tmp_path / "own").loss == pytest.approx(records.score().loss)
    assert records.token.tolist() == [t for d in corpus.data["validation"] for t in d[:-1]]
    assert records.following.tolist() == [t for d in corpus.data["validation"] for t in d[1:]]
    assert records.position.tolist() == [p for d in corpus.data["validation"] for p in range(len(d) - 1)]
    losses = token_losses(model, corpus.data["validation"], context=16, stride=8)
    np.testing.assert_allclose(records.loss, np.concatenate(losses), rtol=1e-6)


def test_a_score_sums_up_rows(records, corpus):
    found = records.score()
    assert found.steps_mean == pytest.approx(records.steps.mean()) and found.steps_share == pytest.approx(records.steps.mean() / STEPS)
    assert found.block_evaluations == pytest.approx(2 + records.steps.mean())
    assert [share * len(records) for share in found.histogram] == pytest.approx([(records.steps == n).sum() for n in range(STEPS + 1)])
    bytes_ = 3 * sum(len(document) for document in corpus.data["validation"])
    assert found.bits_per_byte == pytest.approx(records.loss.sum() / math.log(2) / bytes_)


def test_a_plain_decoder_takes_no_steps_and_runs_all_its_blocks(corpus):
    found = route_table(make_plain(), corpus)
    assert not found.steps.any() and (found.evaluations == make_plain().config.num_hidden_layers).all()
    assert found.score().steps_share == 0


def test_a_model_without_traces_is_refused(corpus):
    with pytest.raises(ValueError, match="LlamaForCausalLM keeps no traces"):
        route_table(make_llama(), corpus)


def test_larger_budgets_take_more_steps_and_the_whole_one_takes_all(model, corpus):
    curve = budget_curve(model, corpus, "validation", [1.0, 0.4, 0.7], context=16)
    assert [point.budget for point in curve] == [0.4, 0.7, 1.0]
    means = [point.steps_mean for point in curve]
    assert means == sorted(means) and means[0] < means[1] < means[2] == STEPS
    assert curve[0].loss == pytest.approx(route_table(model, corpus, budget=0.4, context=16).score().loss)


def test_budgets_that_were_not_trained_are_refused_before_any_work(model, corpus):
    with pytest.raises(ValueError, match=r"budget=0.3: must lie between 0.4 and 1"):
        budget_curve(model, corpus, "no such split", [0.5, 0.3])
    with pytest.raises(ValueError, match="no pool"):
        budget_curve(make_plain(), corpus, "validation", [0.5])


def test_depths_are_the_steps_taken_in_every_window(model, corpus, records):
    depth = at_random(records.steps, seed=1)
    found = route_table(model, corpus, context=10, stride=3, depths=depth)
    assert found.steps.tolist() == depth.tolist()
    same = route_table(model, corpus, context=16, depths=records.steps)
    # Tokens of the history of a later window may have left at another step there, so only first windows must agree.
    first = np.isin(records.document, [0, 1, 2, 4, 5])
    np.testing.assert_allclose(same.loss[first], records.loss[first], rtol=1e-6)
    with pytest.raises(ValueError, match="one per predicted token"):
        route_table(model, corpus, depths=depth[1:])


def dealt(depths, tokens, piece=37):
    """What a rule deals out to tokens that come piece by piece."""
    pieces = [slice(first, min(first + piece, tokens)) for first in range(0, tokens, piece)]
    return np.concatenate([depths((), rows) for rows in pieces])


def by(value):
    """Tokens in the order of a column."""
    _, kind, count = np.unique(value, return_inverse=True, return_counts=True)
    return Order(count, lambda _, rows: kind[rows])


def at_random(steps, seed=0):
    return dealt(random_depths(np.bincount(steps), seed=seed), len(steps))


def by_frequency(steps, frequency, *, rare_deep, seed=0):
    return dealt(Deal(np.bincount(steps), by(frequency), downwards=rare_deep, seed=seed), len(steps))


def drawn_steps(tokens=500, seed=0):
    draw = np.random.default_rng(seed)
    return draw.integers(1, 7, size=tokens).astype(np.int16), draw.integers(0, 12, size=tokens) ** 2


@pytest.mark.parametrize("rare_deep", [True, False])
def test_controls_have_exactly_the_histogram_asked_for(rare_deep):
    steps, frequency = drawn_steps()
    for depth in (at_random(steps), by_frequency(steps, frequency, rare_deep=rare_deep)):
        assert np.bincount(depth).tolist() == np.bincount(steps).tolist()
        assert not np.array_equal(depth, steps)


def test_depths_by_frequency_never_put_a_rarer_token_below_a_more_frequent_one():
    steps, frequency = drawn_steps()
    for rare_deep in (True, False):
        depth = by_frequency(steps, frequency, rare_deep=rare_deep)
        order = np.argsort(-frequency if rare_deep else frequency)
        by_kind = [depth[order][frequency[order] == kind] for kind in dict.fromkeys(frequency[order].tolist())]
        assert all(before.max() <= after.min() for before, after in pairwise(by_kind))
        assert any(len(np.unique(kind)) > 1 for kind in by_kind), "ties across a boundary must occur in this test"


def test_random_depths_know_nothing_of_steps_or_frequency():
    steps, frequency = drawn_steps(20_000)
    depth = at_random(steps)
    assert abs(np.corrcoef(depth, steps)[0, 1]) < 0.03 and abs(np.corrcoef(depth, frequency)[0, 1]) < 0.03


@pytest.mark.parametrize(
    "steps", [drawn_steps()[0], np.array([3, 3, 3]), np.array([1, 2]), np.array([1, 1, 1, 2, 8, 8, 8], dtype=np.int16)]
)
def test_static_depths_keep_the_mean_with_two_neighbouring_numbers(steps):
    depth = dealt(static_depths(np.bincount(steps)), len(steps))
    assert depth.sum() == steps.sum() and depth.dtype == np.int16
    assert set(depth.tolist()) <= {math.floor(steps.mean()), math.ceil(steps.mean())}
    assert np.abs(np.cumsum(depth) - np.arange(1, len(steps) + 1) * steps.mean()).max() < 1


def controlled(model, corpus, records, frequency, losses=None):
    """What controls of the same text measure; no gain is needed for that."""
    reading = Reading(records, records, records, None if losses is None else losses.rows(0, len(records)).loss)
    depth = Depth(reading, corpus.documents("validation"), frequency, Letters(), draws=50)
    depth.add(reading)
    text = Text(corpus, "validation", corpus.documents("validation"), {"context": 16})
    return controls(model, text, depth, losses, draws=50)


def test_controls_measure_the_rules_on_the_same_tokens(model, corpus, records):
    frequency = token_frequency(corpus, vocabulary=VOCABULARY)
    found = controlled(model, corpus, records, frequency)
    assert set(found) == {"random", "static", "rare_deep", "frequent_deep", "frequency"}
    routed = records.score()
    for name in ("random", "rare_deep", "frequent_deep"):
        assert found[name]["histogram"] == pytest.approx(routed.histogram)
    assert found["static"]["steps_mean"] == pytest.approx(routed.steps_mean)
    depth = dealt(Deal(np.bincount(records.steps), by(frequency[records.token]), downwards=True), len(records), piece=len(records))
    by_hand = route_table(model, corpus, context=16, depths=depth)
    assert found["rare_deep"]["loss"] == pytest.approx(by_hand.loss.mean(dtype=np.float64))
    assert found["rare_deep"]["excess"]["value"] == pytest.approx(float(by_hand.loss.mean(dtype=np.float64)) - routed.loss, abs=1e-6)
    expected = mean_with_interval(by_hand.loss - records.loss, records.document, draws=50).to_dict()
    assert found["rare_deep"]["excess"] == pytest.approx(expected, abs=1e-6)
    assert found["frequency"]["loss"] == min(found["rare_deep"]["loss"], found["frequent_deep"]["loss"])
    assert found[found["frequency"]["rule"]]["loss"] == found["frequency"]["loss"]


def test_depth_may_be_dealt_by_difficulty_either_way(model, corpus, records, tmp_path):
    frequency = token_frequency(corpus, vocabulary=VOCABULARY)
    difficulty = np.random.default_rng(3).exponential(size=len(records)).astype(np.float32)
    dataclasses.replace(records.losses(), loss=difficulty).write(tmp_path / "losses")
    found = controlled(model, corpus, records, frequency, LossFile(tmp_path / "losses"))
    for name, way in (("hard_deep", 1), ("easy_deep", -1)):
        depth = np.empty_like(records.steps)
        depth[np.argsort(way * difficulty)] = np.sort(records.steps)
        assert found[name]["loss"] == pytest.approx(route_table(model, corpus, context=16, depths=depth).loss.mean(dtype=np.float64))


def test_frequencies_are_those_of_the_training_split(corpus):
    count = token_frequency(corpus, vocabulary=VOCABULARY)
    every = np.concatenate(corpus.data["train"]).tolist()
    assert count.tolist() == [every.count(token) for token in range(VOCABULARY)]


def depth_of(reading, corpus, frequency):
    found = Depth(reading, corpus.documents("validation"), frequency, Letters(), draws=100)
    found.add(reading)
    return found


def with_steps(records, steps):
    return dataclasses.replace(records, steps=steps)


def test_depth_that_follows_difficulty_is_found_and_depth_by_frequency_is_not(corpus, records):
    draw = np.random.default_rng(0)
    frequency = np.arange(VOCABULARY) + 1
    hard = draw.normal(size=len(records))
    rank = np.argsort(np.argsort(hard))
    follows = with_steps(records, np.sort(records.steps)[rank])
    by_token = with_steps(records, by_frequency(records.steps, frequency[records.token], rare_deep=True))
    loss = hard - 2 * np.log1p(frequency[records.token]) / np.log1p(frequency).std()
    found = depth_of(Reading(follows, records, records, loss), corpus, frequency).correlations()["loss"]
    assert all(estimate["low"] > 0 for estimate in found.values())
    assert set(found) == {"spearman", "pearson", "partial_spearman", "partial_spearman_following"}
    found = depth_of(Reading(by_token, records, records, loss), corpus, frequency).correlations()["loss"]
    assert found["spearman"]["low"] > 0 and found["partial_spearman"]["low"] < 0.1


def test_losses_of_other_tokens_are_refused(corpus, records):
    numbers, documents = list(range(7)), corpus.data["validation"]
    losses = [np.arange(len(document) - 1.0) for document in documents]
    same = TokenLosses.of(numbers, documents, losses, {})
    assert aligned(records, same).tolist() == np.concatenate(losses).tolist()
    with pytest.raises(ValueError, match="other tokens"):
        aligned(records, TokenLosses.of(numbers[1:], documents[1:], losses[1:], {}))
    with pytest.raises(ValueError, match="other tokens"):
        aligned(records, TokenLosses.of(numbers, [document[::-1] for document in documents], losses, {}))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A small prepared corpus, and a routed and a plain model that share its tokenizer, saved."""
    from pathlm.text.corpus import Corpus
    from pathlm.text.prepare import prepare, prepare_config

    folder = tmp_path_factory.mktemp("routing")
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(["night", "day", "rain", "stone", "river"], size=20)) + "." for _ in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(prepare_config({"out": str(folder / "corpus"), "sources": [str(folder / "text.jsonl")], "vocab_size": 270}))
    corpus = Corpus.open(folder / "corpus")
    for name, model in (("routed", make_routed), ("plain", make_plain)):
        made = model(context=32)
        made.resize_token_embeddings(corpus.vocab_size)
        made.config.vocab_size = corpus.vocab_size
        if made.pool is not None:
            for table in ("difficulty_sum", "difficulty_count"):
                setattr(made.pool, table, torch.zeros(corpus.vocab_size))
        made.float().save_pretrained(folder / name)
        corpus.tokenizer().save_pretrained(folder / name)
    return folder


def test_a_run_writes_everything_beside_its_evaluation(prepared):
    options = {"against": prepared / "plain", "draws": 20, "max_documents": 6, "device": "cpu"}
    result = routing.run(prepared / "routed", prepared / "corpus", "train", **options)
    assert result == json.loads((prepared / "routed" / "routes.json").read_text())["train"]
    assert [point["budget"] for point in result["budgets"]] == pytest.approx([0.4, 0.55, 0.7, 0.85, 1.0])
    assert result["routed"]["tokens"] == result["budgets"][0]["tokens"] and result["routed"]["documents"] == 6
    assert result["plain"]["routed_excess"]["value"] == pytest.approx(result["routed"]["loss"] - result["plain"]["loss"], abs=1e-5)
    assert all(-1 <= found["low"] <= found["value"] <= found["high"] <= 1 for found in result["difficulty"].values())
    told, tokens = result["metrics"], result["routed"]["tokens"]
    assert sum(result["map"]["transitions"][0]) == tokens and told["route/steps_mean"] == result["routed"]["steps_mean"]
    assert [told[f"route/left_after_{n}"] for n in range(STEPS + 1)] == result["routed"]["histogram"] and told["time/tokens_per_s"] > 0
    assert {name: sum(row["tokens"] for row in rows) for name, rows in result["slices"].items()} == dict.fromkeys(result["slices"], tokens)
    hardest, easiest = result["slices"]["difficulty"][-1], result["slices"]["difficulty"][0]
    assert result["difficulty_of"] == "the plain model" and hardest["loss"] != easiest["loss"]
    gains = sum(row["gain"] * row["tokens"] for row in result["slices"]["position"]) / tokens
    assert gains == pytest.approx(result["gain"]["mean"]["value"], abs=1e-6)


def test_a_token_that_leaves_early_saves_the_operations_of_the_blocks_it_does_not_visit(model, corpus):
    def flops(depth):
        return routing.of_costs(model, route_totals(model, corpus, context=16, depths=all_take(depth)))["compute/flops_per_token"]

    assert flops(STEPS) == model.flops_per_token(16)
    assert flops(STEPS) - flops(1) == pytest.approx(3 * model.costs(16)["flops_per_visit"])


def test_a_run_takes_records_of_an_earlier_evaluation_and_prints_its_tables(prepared, capsys):
    from rich.console import Console

    from pathlm.evaluate import run as evaluate

    corpus, losses = prepared / "corpus", prepared / "losses.safetensors"
    evaluate(prepared / "plain", corpus, split="train", max_documents=6, order=0, records=losses, device="cpu")
    options = {"draws": 20, "max_documents": 6, "budgets": (0.5,), "device": "cpu"}
    from_file = routing.run(prepared / "routed", corpus, "train", against=losses, console=Console(width=200), **options)
    from_model = routing.run(prepared / "routed", corpus, "train", against=prepared / "plain", **options)
    assert from_file["difficulty"] == from_model["difficulty"]
    shown = capsys.readouterr().out
    for part in ("with the measured", "with the plain", "position held fixed", "frequent deep", "budget 0.5", "of all"):
        assert part in shown
    for table in routing.tables(from_model):
        screen = Console(width=80, file=io.StringIO())
        screen.print(table)
        assert "…" not in screen.file.getvalue(), "readable on a narrow terminal"
    with pytest.raises(ValueError, match="another corpus or split"):
        routing.run(prepared / "routed", corpus, "validation", against=losses, **options)


@pytest.fixture(scope="module")
def extremes(model, corpus, records):
    """The same tokens where all leave after one step, and where all take every step."""
    return [route_table(model, corpus, context=16, depths=np.full_like(records.steps, depth)) for depth in (1, STEPS)]


def test_gain_is_the_loss_at_the_fewest_steps_minus_that_at_all_of_them(model, corpus, records, extremes):
    early, late = extremes
    (reading,) = readings(model, corpus, "validation", context=16)
    assert (reading.early.score().steps_mean, reading.late.score().steps_mean) == (1, STEPS)
    found = depth_of(reading, corpus, token_frequency(corpus, vocabulary=VOCABULARY))
    assert found.gain.estimate().value == pytest.approx(float((early.loss - late.loss).mean(dtype=np.float64)), abs=1e-6)
    spearman = found.correlations()["gain"]["spearman"]
    assert spearman["low"] <= spearman["value"] <= spearman["high"]


def test_steps_dealt_out_by_gain_correlate_with_it_where_those_by_loss_need_not(corpus, records, extremes):
    early, late = extremes
    by_gain = np.empty_like(records.steps)
    by_gain[np.argsort(early.loss - late.loss)] = np.sort(records.steps)
    reading = Reading(with_steps(records, by_gain), early, late)
    found = depth_of(reading, corpus, token_frequency(corpus, vocabulary=VOCABULARY)).correlations()
    assert found["gain"]["spearman"]["low"] > 0.5 and "loss" not in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": (0.5, 0.2)}, r"budget=0\.2: must lie between 0\.4 and 1"),
        ({"budgets": (0.5, 3.0)}, r"budget=3\.0: must lie above 0 and at most at 1"),
        ({"branches": 2}, "branches=2: routes are measured with as many as"),
        ({"budget": 0.1}, r"budget=0\.1: must lie between 0\.4 and 1"),
        ({"max_documents": 1}, "documents=1: an interval over documents needs at least 2"),
        ({"draws": 0}, "draws=0"),
        ({"context": 99}, "context=99: must lie between 1 and"),
        ({"split": "nowhere"}, "split='nowhere'"),
        ({"against": "no/such/model"}, "'no/such/model' does not exist"),
        ({"plot": "no/such/folder/curve.svg"}, "the folder 'no/such/folder' does not exist"),
        ({"plot": "/"}, "plot='/': is a folder, must be the name of a file"),
        ({"against": "losses of fewer"}, r"against=.*holds losses of \d+ tokens, routes are measured on \d+"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused_before_any_work(prepared, options, message, monkeypatch):
    from pathlm.evaluate import run as evaluate

    if options.get("against") == "losses of fewer":
        options = {"against": prepared / "fewer.safetensors"}
        evaluate(prepared / "plain", prepared / "corpus", split="train", max_documents=2, order=0, records=options["against"], device="cpu")
    for measures in ("readings", "score"):
        monkeypatch.setattr(routing, measures, None)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        routing.run(prepared / "routed", prepared / "corpus", **{"split": "train", "device": "cpu"} | options)


def test_one_document_is_refused_before_another_suite_is_measured(prepared, monkeypatch):
    monkeypatch.setattr("pathlm.evaluate.compare.route_groups", None)
    with pytest.raises(ValueError, match="documents=1: an interval over documents needs at least 2"):
        suites.run(prepared / "routed", prepared / "corpus", suite="lm,routing", order=0, max_documents=1, device="cpu")


def test_the_command_measures_routes_and_draws_the_curve(prepared, tmp_path):
    from typer.testing import CliRunner

    from pathlm.cli import app

    def command(*arguments):
        return CliRunner().invoke(app, ["eval", *map(str, arguments)], prog_name="pathlm")

    file = tmp_path / "curve.svg"
    text = ("--corpus", prepared / "corpus", "--split", "train", "--max-documents", 3, "--device", "cpu")
    done = command(prepared / "routed", *text, "--routes", "--against", prepared / "plain", "--budgets", "0.4,1", "--plot", file)
    assert done.exit_code == 0, done.stderr
    result = json.loads((prepared / "routed" / "routes.json").read_text())["train"]
    assert [point["budget"] for point in result["budgets"]] == [0.4, 1.0] and result["plain"]["checkpoint"] == str(prepared / "plain")
    for number in (result["routed"]["loss"], result["budgets"][0]["loss"], result["controls"]["random"]["loss"], result["plain"]["loss"]):
        assert f"{number:.4f}" in done.stdout
    assert file.read_text() == budget_svg(result)
    for arguments, message in (
        ((prepared / "routed", *text, "--plot", file), "needs --routes"),
        ((prepared / "routed", *text, "--budgets", "0.4"), "--budgets 0.4: needs --routes"),
        ((prepared / "routed", *text, "--routes", "--budgets", "0.4;1"), "budgets='0.4;1': must be numbers with commas between"),
        ((prepared / "routed", *text, "--routes", "--records", file), "does not go with --routes"),
        ((prepared / "routed", *text, "--routes", "--lm-eval", "hellaswag"), "--lm-eval hellaswag"),
    ):
        refused = command(*arguments)
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split())


def drawing(*, plain=True, curve=True):
    """A result with numbers that could have been measured."""
    point = {"block_evaluations": 4.0, "loss": 2.5}
    budgets = [point | {"budget": b, "loss": 2.6 - 0.2 * b, "block_evaluations": 2 + 4 * b} for b in (0.25, 0.5, 1.0)]
    rules = {name: point | {"loss": 2.55 + i / 100} for i, name in enumerate(("random", "static", "frequency"))}
    return {
        "split": "a <b> & c", "routed": point, "budgets": budgets if curve else [], "controls": rules,
        "plain": {"loss": 2.3} if plain else None,
    }  # fmt: skip


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("curve", [True, False])
def test_the_curve_is_a_well_formed_picture_with_everything_inside(plain, curve):
    from xml.etree import ElementTree

    root = ElementTree.fromstring(budget_svg(drawing(plain=plain, curve=curve)))
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a <b> & c: loss and computation by budget", "blocks run per token", "loss, nats per token", "routed: 2.500"} <= set(texts)
    assert ("plain model: 2.300" in texts) == plain and ("0.25" in texts) == curve
    circles = [(float(node.get("cx")), float(node.get("cy"))) for node in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(circles) == 4 + 4 + 4 * curve and all(0 < x < 760 and 0 < y < 460 for x, y in circles)
    if curve:
        (line,) = root.iter("{http://www.w3.org/2000/svg}polyline")
        places = [tuple(map(float, place.split(","))) for place in line.get("points").split()]
        assert places == sorted(places) and [y for _, y in places] == sorted(y for _, y in places), "right: more blocks; up: more loss"


def test_a_curve_of_equal_numbers_can_be_drawn():
    result = drawing(plain=False, curve=False)
    result["controls"] = dict.fromkeys(result["controls"], result["routed"])
    assert "nan" not in budget_svg(result)


def test_a_plain_model_in_the_place_of_the_routed_one_is_refused(prepared):
    with pytest.raises(ValueError, match="has no pool"):
        routing.run(prepared / "plain", prepared / "corpus", device="cpu")


def test_the_progress_bar_reaches_its_end(prepared, monkeypatch):
    moved, totals = [], []

    class Bar:
        def __init__(self, console, label, *, total):
            totals.append(total)

        def __enter__(self):
            return moved.append

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(routing, "bar", Bar)
    result = routing.run(prepared / "routed", prepared / "corpus", "train", budgets=(0.5, 1.0), draws=2, max_documents=3, device="cpu")
    assert sum(moved) == totals[0] == (1 + 2 + 2 + PASSES) * result["routed"]["tokens"]


def test_documents_read_in_several_groups_give_the_same_rows(model, corpus, records, monkeypatch):
    monkeypatch.setattr("pathlm.evaluate.lm.GROUP_TOKENS", 20)
    depth = at_random(records.steps)
    for options in ({}, {"depths": depth}):
        found = route_table(model, corpus, context=16, **options)
        assert found.steps.tolist() == (depth if options else records.steps).tolist()
        assert found.document.tolist() == records.document.tolist() and found.token.tolist() == records.token.tolist()
