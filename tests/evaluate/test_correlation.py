"""Correlations equal slow ones made pair by pair, and intervals hold the truth about as often as they say."""

import math

import numpy as np
import pytest

from pathlm.evaluate.correlation import Estimate, Pair, correlations, mean_with_interval, resampled


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
    for name, found in correlations(columns, PAIRS, document, draws=5).items():
        assert found.value == pytest.approx(slowly(columns, PAIRS[name]), abs=1e-12), name


def test_draws_equal_slow_ones_on_the_documents_drawn():
    columns, document = some_columns()
    found = correlations(columns, PAIRS, document, draws=30, seed=3)
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
