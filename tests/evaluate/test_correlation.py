"""Correlations equal slow ones made pair by pair, and intervals hold the truth about as often as they say."""

import math
import tracemalloc
from itertools import islice

import numpy as np
import pytest

from pathlm.evaluate.bootstrap import Draws, Estimate, Mean, mean_with_interval
from pathlm.evaluate.correlation import BINS, Correlations, Pair, bin_starts, equal_parts, which_bin


def resampled(documents, **options):
    """How often each document is drawn, a row per draw."""
    return Draws(documents, **options).take(documents)[:, 1:].T.astype(int)


def correlations(columns, pairs, document, *, draws, seed=0, bins=BINS):
    """What comes of columns that are there at once; with as many bins as tokens nothing is rounded."""
    found = Correlations(pairs, {name: bin_starts(column, bins=bins) for name, column in columns.items()}, draws=draws)
    for block in Draws(len(np.unique(document)), draws=draws, seed=seed).blocks(document):
        found.add({name: column[block.rows] for name, column in columns.items()}, block)
    return found.estimates()


def slow_ranks(values):
    """The mean rank of each value among all: how many are smaller, plus half of the others that are equal."""
    return np.array([sum(other < value for other in values) + 0.5 * (sum(other == value for other in values) - 1) for value in values])


def slow_correlation(one, other, fixed=()):
    """Correlation of the residuals of two least-squares fits."""
    design = np.column_stack([np.ones(len(one)), *fixed])
    left = [column - design @ np.linalg.lstsq(design, column, rcond=None)[0] for column in (one, other)]
    left = [column - column.mean() for column in left]
    return (left[0] @ left[1]) / math.sqrt((left[0] @ left[0]) * (left[1] @ left[1]))


def some_columns(tokens=120, documents=7, seed=0):
    draw = np.random.default_rng(seed)
    hard = draw.normal(size=tokens)
    columns = {
        "steps": np.clip(np.round(2 + hard + draw.normal(size=tokens)), 1, 4),
        "loss": np.exp(hard + draw.normal(size=tokens)),
        "frequency": np.round(hard + 2 * draw.normal(size=tokens)),
        "position": np.arange(tokens) % 17.0,
    }
    return columns, np.sort(draw.integers(0, documents, size=tokens))


PAIRS = {
    "spearman": Pair("steps", "loss"),
    "pearson": Pair("steps", "loss", ranks=False),
    "partial": Pair("steps", "loss", ("frequency", "position")),
    "partial pearson": Pair("steps", "loss", ("frequency",), ranks=False),
}


def slowly(columns, pair):
    of = (lambda name: slow_ranks(columns[name])) if pair.ranks else (lambda name: columns[name])
    return slow_correlation(of(pair.one), of(pair.other), [of(name) for name in pair.fixed])


def test_values_equal_slow_ones():
    columns, document = some_columns()
    for name, found in correlations(columns, PAIRS, document, draws=5, bins=120).items():
        assert found.value == pytest.approx(slowly(columns, PAIRS[name]), abs=1e-12), name


def test_draws_equal_slow_ones_on_the_documents_drawn():
    columns, document = some_columns()
    found = correlations(columns, PAIRS, document, draws=30, seed=3, bins=120)
    every = {name: [] for name in PAIRS}
    for times in resampled(7, draws=30, seed=3):
        rows = np.concatenate([np.flatnonzero(document == number) for number, often in enumerate(times) for _ in range(often)])
        for name, pair in PAIRS.items():
            every[name].append(slowly({key: column[rows] for key, column in columns.items()}, pair))
    for name, values in every.items():
        assert (found[name].low, found[name].high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-12), name


def test_what_a_third_thing_explains_is_taken_away():
    draw = np.random.default_rng(0)
    third = draw.normal(size=4000)
    columns = {"a": third + draw.normal(size=4000), "b": third + draw.normal(size=4000), "third": third}
    pairs = {"whole": Pair("a", "b"), "left": Pair("a", "b", ("third",))}
    found = correlations(columns, pairs, np.arange(4000) // 20, draws=100)
    assert found["whole"].low > 0.4 and found["left"].low < 0 < found["left"].high and abs(found["left"].value) < 0.1


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    # Tokens of a document share a part of both variables, so intervals over single tokens would be too narrow.
    truth, held, draw = 6 / math.pi * math.asin(0.5 / 2), 0, np.random.default_rng(0)
    for number in range(60):
        document = np.repeat(np.arange(60), 10)
        shared = draw.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], size=60)[document]
        own = draw.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], size=600)
        found = correlations(dict(zip("ab", (shared + own).T, strict=True)), {"it": Pair("a", "b")}, document, draws=200, seed=number)["it"]
        held += found.low <= truth <= found.high
    assert 52 <= held <= 60, held


def test_a_constant_column_correlates_with_nothing():
    columns, document = some_columns()
    columns["steps"] = np.full(len(document), 3.0)
    for found in correlations(columns, PAIRS, document, draws=5).values():
        assert math.isnan(found.value)
        assert found.to_dict() == {"value": None, "low": None, "high": None}


def test_a_column_that_the_fixed_ones_explain_wholly_correlates_with_nothing():
    columns, document = some_columns()
    columns["steps"] = columns["frequency"]
    assert math.isnan(correlations(columns, {"it": Pair("steps", "loss", ("frequency",))}, document, draws=3)["it"].value)


def test_a_constant_column_held_fixed_takes_nothing_away():
    columns, document = some_columns()
    columns["position"] = np.zeros(len(document))
    pairs = {"with": Pair("steps", "loss", ("frequency", "position")), "without": Pair("steps", "loss", ("frequency",))}
    found = correlations(columns, pairs, document, draws=3)
    assert found["with"].value == pytest.approx(found["without"].value, abs=1e-12)


def test_means_have_intervals_of_documents_of_their_own_length():
    document = np.array([5, 5, 5, 9, 2, 2])
    value = np.array([1.0, 2.0, 3.0, 10.0, 0.0, 0.0])
    found = mean_with_interval(value, document, draws=500, seed=1)
    means = []
    for times in resampled(3, draws=500, seed=1):  # documents in the order of their numbers: 2, 5, 9
        rows = np.concatenate([np.flatnonzero(document == number) for number, often in zip((2, 5, 9), times) for _ in range(often)])
        means.append(value[rows].mean())
    assert found.value == pytest.approx(value.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_draws_take_as_many_documents_as_there_are_and_repeat_with_their_seed():
    times = resampled(5, draws=50, seed=7)
    assert (times.sum(1) == 5).all() and (times > 1).any()
    assert (times == resampled(5, draws=50, seed=7)).all() and (times != resampled(5, draws=50, seed=8)).any()


@pytest.mark.parametrize(("documents", "draws", "message"), [(1, 10, "documents=1"), (3, 0, "draws=0")])
def test_too_few_documents_or_draws_are_refused(documents, draws, message):
    with pytest.raises(ValueError, match=message):
        resampled(documents, draws=draws)


def test_values_that_do_not_exist_are_left_out_of_an_interval():
    assert Estimate.of(0.5, np.array([math.nan, 0.1, 0.1])) == Estimate(0.5, 0.1, 0.1)


def a_text(documents, seed=0, tokens=60):
    """Columns like those of routes, document by document: harder documents go deeper, and frequent tokens are easy."""
    draw = np.random.default_rng(seed)
    for number in range(documents):
        size = int(draw.integers(2, 2 * tokens))
        frequency = np.floor(40 * draw.random(size) ** 3)
        hard = draw.normal(size=size) + draw.normal() - frequency / 20
        yield (
            number,
            {
                "steps": np.clip(np.round(3 + hard + draw.normal(size=size)), 1, 8),
                "loss": np.exp(hard + draw.normal(size=size)),
                "frequency": frequency,
                "position": np.arange(size, dtype=float),
            },
        )


def stream(documents, *, draws, group=100):
    """Correlations and a mean of a text that is there only piece by piece."""
    starts = {"steps": np.arange(2, 9), "frequency": np.arange(1, 40), "position": np.arange(1, 120, 2)}
    drawn, found, mean, text = Draws(documents, draws=draws), None, Mean(draws), a_text(documents)
    while some := list(islice(text, group)):
        columns = {name: np.concatenate([one[name] for _, one in some]) for name in some[0][1]}
        document = np.repeat([number for number, _ in some], [len(one["loss"]) for _, one in some])
        found = found or Correlations(PAIRS, starts | {"loss": bin_starts(columns["loss"])}, draws=draws)
        for block in drawn.blocks(document):
            part = {name: column[block.rows] for name, column in columns.items()}
            found.add(part, block)
            mean.add(part["loss"], block)
    return found.estimates() | {"mean": mean.estimate()}


def test_a_text_in_pieces_gives_what_its_whole_columns_give():
    draws, documents = 60, 400
    found = stream(documents, draws=draws)
    whole = [one for _, one in a_text(documents)]
    columns = {name: np.concatenate([one[name] for one in whole]) for name in whole[0]}
    document = np.repeat(np.arange(documents), [len(one["loss"]) for one in whole])
    values, mean = {name: [] for name in PAIRS}, []
    for often in (np.ones(documents, dtype=int), *resampled(documents, draws=draws)):
        rows = np.repeat(np.arange(len(document)), often[document])
        ranks = {name: mean_ranks(column[rows]) for name, column in columns.items()}
        mean.append(columns["loss"][rows].mean())
        for name, pair in PAIRS.items():
            of = ranks if pair.ranks else {name: column[rows] for name, column in columns.items()}
            values[name].append(slow_correlation(of[pair.one], of[pair.other], [of[fixed] for fixed in pair.fixed]))
    for name, exact in (values | {"mean": mean}).items():
        bound = 1e-9 if name in ("pearson", "partial pearson", "mean") else 5e-4  # losses of one bin share their rank
        low, high = np.quantile(exact[1:], [0.025, 0.975])
        assert found[name].value == pytest.approx(exact[0], abs=bound), name
        assert (found[name].low, found[name].high) == pytest.approx((low, high), abs=bound), name


def mean_ranks(values):
    _, kind, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - count / 2)[kind]


def test_memory_does_not_grow_with_the_text():
    def peak(documents):
        tracemalloc.start()
        stream(documents, draws=20)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(200)  # what is imported on the way
    assert peak(2000) < 1.02 * peak(200)


def test_draws_do_not_depend_on_how_documents_are_cut_into_blocks(monkeypatch):
    document = np.repeat(np.arange(7), [3, 1, 4, 1, 5, 9, 2])
    whole = Draws(7, draws=9).take(7)
    monkeypatch.setattr("pathlm.evaluate.bootstrap.AT_ONCE", 2)
    drawn = Draws(7, draws=9)
    blocks = [*drawn.blocks(document[:8]), *drawn.blocks(document[8:])]
    assert np.concatenate([block.times_DR for block in blocks]).tolist() == whole.tolist()
    assert [len(block.times_DR) for block in blocks] == [2, 1, 2, 2]
    assert np.concatenate([block.place_N for block in blocks]).tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, *[1] * 5, *[0] * 9, 1, 1]


def test_bins_hold_equal_shares_and_equals_stay_together():
    values = np.random.default_rng(0).normal(size=6400)
    assert np.bincount(which_bin(values, bin_starts(values, bins=64))).tolist() == pytest.approx([100] * 64, abs=1)
    assert bin_starts(np.array([3, 1, 1, 2]), bins=3).tolist() == [2, 3]
    tied = np.repeat([0, 1, 2, 3], [1, 96, 2, 1])
    assert which_bin(tied, bin_starts(tied, bins=2)).tolist() == [0] * 97 + [1] * 3
    weighted = bin_starts(np.arange(10), np.array([0, 0, 0, 0, 5, 5, 0, 0, 0, 0]), bins=2)
    assert which_bin(np.array([4, 5]), weighted).tolist() == [0, 1]
    assert equal_parts(np.array([0, 3, 0]), 10).tolist() == [0, 5, 9]
