"""Steps beside gain and difficulty, added up group by group: near what whole columns say, in memory that does not grow with them."""

import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from arrays import Letters

from pathlm.evaluate.bootstrap import Draws
from pathlm.evaluate.controls import Deal, Order
from pathlm.evaluate.correlation import which_bin
from pathlm.evaluate.depth import Depth, Reading
from pathlm.evaluate.records import LossFile, LossWriter
from pathlm.evaluate.routes import COLUMNS, RouteRecords

HEADER = {"max_route_steps": 6, "context": 64, "stride": 32, "budget": None, "bytes": 1000, "blocks": 8}
VOCABULARY = 300
FREQUENCY = (1e6 / (1 + np.arange(VOCABULARY)) ** 1.1).astype(int)


def a_reading(draw, documents, first, *, size=250, shift=0.0):
    """Some documents of a text in which rare tokens are hard, hard documents stay hard, and depth follows difficulty a little."""
    count = size * documents
    token, following = (draw.choice(VOCABULARY, p=FREQUENCY / FREQUENCY.sum(), size=count) for _ in range(2))
    hard = shift + np.repeat(draw.normal(scale=0.4, size=documents), size) + 0.5 * np.log1p(following) + draw.normal(size=count)
    steps = np.clip(np.round(3 + 0.4 * hard + draw.normal(size=count)), 1, 6)
    loss = np.logaddexp(0, hard + 0.5 * draw.normal(size=count))
    places = (np.repeat(np.arange(first, first + documents), size), np.tile(np.arange(size), documents))

    def records(loss, steps):
        columns = (*places, token, following, loss, steps, steps + 2)
        return RouteRecords(
            **{name: column.astype(kind) for (name, kind), column in zip(COLUMNS.items(), columns, strict=True)}, header=HEADER
        )

    gain = 0.1 * hard + draw.normal(size=count)
    return Reading(
        records(loss, steps), records(loss + gain, steps), records(loss, steps), (loss + 0.1 * draw.normal(size=count)).astype("f4")
    )


def a_text(documents, *, group=20, seed=0, drift=0.0):
    """The readings of a text; with a `drift` it grows harder and harder."""
    draw = np.random.default_rng(seed)
    for first in range(0, documents, group):
        yield a_reading(draw, group, first, shift=drift * first / documents)


def added(documents, *, draws=20, **options):
    chosen = [SimpleNamespace(tokens=251)] * documents
    depth = None
    for reading in a_text(documents, **options):
        depth = depth or Depth(reading, chosen, FREQUENCY, Letters(), draws=draws)
        depth.add(reading)
    return depth


def whole(documents, **options):
    """The same text as one reading."""
    parts = list(a_text(documents, **options))

    def one(of):
        columns = {name: np.concatenate([getattr(getattr(part, of), name) for part in parts]) for name in COLUMNS}
        return RouteRecords(**columns, header=HEADER)

    return Reading(one("own"), one("early"), one("late"), np.concatenate([part.plain_N for part in parts]))


def mean_ranks(values):
    _, kind, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - count / 2)[kind]


def partial_correlation(one, other, fixed):
    design = np.column_stack([np.ones(len(one)), *fixed])
    left = [column - design @ np.linalg.lstsq(design, column, rcond=None)[0] for column in (one, other)]
    return np.corrcoef(*left)[0, 1]


def by_columns(reading, rows):
    """Correlations of some rows, of whole columns."""
    own = reading.own
    columns = {
        "steps": own.steps, "gain": reading.gain_N, "loss": reading.plain_N, "frequency": FREQUENCY[own.token],
        "following": FREQUENCY[own.following], "position": own.position,
    }  # fmt: skip
    columns = {name: column[rows].astype(float) for name, column in columns.items()}
    rank = {name: mean_ranks(column) for name, column in columns.items()}
    easy = [rank["frequency"], rank["position"]]
    return {
        of: {
            "spearman": np.corrcoef(rank["steps"], rank[of])[0, 1],
            "pearson": np.corrcoef(columns["steps"], columns[of])[0, 1],
            "partial_spearman": partial_correlation(rank["steps"], rank[of], easy),
            "partial_spearman_following": partial_correlation(rank["steps"], rank[of], [*easy, rank["following"]]),
        }
        for of in ("gain", "loss")
    }


@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_correlations_of_a_text_in_groups_are_those_of_its_columns(drift):
    documents, draws = 100, 40
    found, reading = added(documents, draws=draws, drift=drift).correlations(), whole(documents, drift=drift)
    times = Draws(documents, draws=draws).take(documents).T.astype(int)
    every = [by_columns(reading, np.repeat(np.arange(250 * documents), np.repeat(often, 250))) for often in times]
    for of in ("gain", "loss"):
        for kind, estimate in found[of].items():
            values = [one[of][kind] for one in every]
            expected = {"value": values[0], **dict(zip(("low", "high"), np.quantile(values[1:], [0.025, 0.975]), strict=True))}
            assert estimate == pytest.approx(expected, abs=1e-5 if kind == "pearson" else 5e-4), (of, kind)


def test_tenths_of_difficulty_are_those_of_its_column_but_for_few_tokens():
    reading, tokens = whole(100, drift=1.0), 25_000
    rows = added(100, drift=1.0).slices.rows()["difficulty"]
    tenth = np.empty(tokens, dtype=int)
    tenth[np.argsort(reading.plain_N)] = np.arange(tokens) * 10 // tokens
    for number, row in enumerate(rows):
        assert row["tokens"] == pytest.approx(tokens / 10, rel=0.01)
        assert row["steps_mean"] == pytest.approx(reading.own.steps[tenth == number].mean(), abs=5e-3)
        assert row["loss"] == pytest.approx(reading.own.loss[tenth == number].mean(), abs=5e-3)


def test_memory_does_not_grow_with_the_text(tmp_path):
    def peak(documents):
        tracemalloc.start()
        tokens = 250 * documents
        with LossWriter(tmp_path / "losses", {}, tokens=tokens) as out:
            for reading in a_text(documents):
                out.add(replace(reading.own.losses(), loss=reading.plain_N))
        depth = added(documents)
        losses = LossFile(tmp_path / "losses")
        starts = depth.slices.difficulty_starts
        order = Order(depth.slices.count("difficulty"), lambda _, rows: which_bin(losses.rows(rows.start, rows.stop).loss, starts))
        deal = Deal(depth.routed.left_S, order)
        dealt = sum(np.bincount(deal((), slice(first, first + 5000)), minlength=7) for first in range(0, tokens, 5000))
        assert depth.correlations() and dealt.sum() == tokens
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(40)  # what is imported on the way
    assert peak(400) < 1.02 * peak(40)
