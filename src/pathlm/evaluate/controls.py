"""Rules for leaving the pool that know nothing of the text: what the same number of steps is worth where no router deals them out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pathlm.evaluate.bootstrap import DRAWS, Draws, Mean
from pathlm.evaluate.correlation import which_bin
from pathlm.evaluate.depth import Depth
from pathlm.evaluate.lm import GROUP_TOKENS, LanguageScore, Text
from pathlm.evaluate.records import LossFile
from pathlm.evaluate.routes import Depths, RouteRecords, RouteTotals, route_groups

# Shapes: N tokens whose routes are dealt out, K kinds of tokens, S numbers of route steps from 0, V vocabulary

RANDOM_DEALS = 3
"""How often random steps are dealt, to take the mean."""
PASSES = RANDOM_DEALS + 3
"""Times that `controls` reads the documents; twice more with a difficulty."""


@dataclass(frozen=True, eq=False)
class Order:
    """What tokens are put in order by: kinds, smallest first."""

    count_K: np.ndarray
    """How many of all tokens are of each kind"""
    kinds: Depths
    """The kind of each token, asked for as depths are"""


class Deal:
    """Deals steps out to tokens as they come, the larger numbers to the later kinds of an order; within a kind the lot decides.

    `left_S` says how many tokens take 0, 1, 2 … steps. Kept is how many tokens of each kind take how many, so memory does not grow with
    the text.
    """

    def __init__(self, left_S: np.ndarray, order: Order, *, downwards: bool = False, seed: int = 0) -> None:
        count_K = order.count_K[::-1] if downwards else order.count_K
        end_K, end_S = np.cumsum(count_K), np.cumsum(left_S)
        shared_KS = np.minimum.outer(end_K, end_S) - np.maximum.outer(end_K - count_K, end_S - left_S)
        shared_KS = np.maximum(shared_KS, 0).astype(np.int64)
        self._left_KS = shared_KS[::-1].copy() if downwards else shared_KS
        self._kinds, self._random = order.kinds, np.random.default_rng(seed)

    def __call__(self, documents: Sequence[np.ndarray], rows: slice) -> np.ndarray:
        """Return the steps of the next tokens."""
        kind_N = self._kinds(documents, rows)
        depth_N = self._left_KS.argmax(1)[kind_N].astype(np.int16)
        mixed_K = (self._left_KS > 0).sum(1) > 1
        for kind in np.unique(kind_N[mixed_K[kind_N]]).tolist():
            here = np.flatnonzero(kind_N == kind)
            dealt_S = self._random.multivariate_hypergeometric(self._left_KS[kind], len(here))
            depth_N[here] = self._random.permutation(np.repeat(np.arange(len(dealt_S)), dealt_S))
            self._left_KS[kind] -= dealt_S
        return depth_N


def random_depths(left_S: np.ndarray, *, seed: int = 0) -> Deal:
    """Deal the same steps out to the tokens anew, at random: all are of one kind."""
    every = Order(left_S.sum(keepdims=True), lambda documents, rows: np.zeros(rows.stop - rows.start, dtype=np.int64))
    return Deal(left_S, every, seed=seed)


def static_depths(left_S: np.ndarray) -> Depths:
    """Give every token the mean number of steps: the whole numbers around it in turns, so that the mean is kept to a step in all."""
    mean = float(left_S @ np.arange(len(left_S)) / left_S.sum())

    def deal(documents: Sequence[np.ndarray], rows: slice) -> np.ndarray:
        return np.diff(np.floor(np.arange(rows.start, rows.stop + 1) * mean + 1e-9)).astype(np.int16)

    return deal


def controls(
    model: Any, text: Text, depth: Depth, losses: LossFile | None = None, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Let the same model leave the pool by rules that know nothing of the text, with the steps that `depth` tells of.

    `random` deals the same steps out at random (the mean of several deals), `static` gives everybody the mean, `rare_deep` and
    `frequent_deep` go by how frequent a token is; `frequency` repeats the better of these two on this very split, which flatters it.
    With `losses`, those of the independent model that `depth` knows, `hard_deep` and `easy_deep` go by these: they know what follows, so
    they are no rules for use, but they say whether depth belongs to what is hard. Each has its score and `excess`: its loss minus the
    routed model's, with the interval over documents, drawn as they were for `depth`. The blocks stay the router's choice.
    """
    routed, slices, left_S = depth.routed, depth.slices, depth.routed.left_S
    frequency = Order(slices.count("frequency"), lambda documents, _: slices.frequency_V[np.concatenate([t[:-1] for t in documents])])
    rules: dict[str, list[Depths]] = {
        "random": [random_depths(left_S, seed=seed + i) for i in range(RANDOM_DEALS)],
        "static": [static_depths(left_S)],
        "rare_deep": [Deal(left_S, frequency, downwards=True, seed=seed)],
        "frequent_deep": [Deal(left_S, frequency, seed=seed)],
    }
    if losses is not None:
        difficulty = Order(
            slices.count("difficulty"), lambda _, rows: which_bin(losses.rows(rows.start, rows.stop).loss, slices.difficulty_starts)
        )
        rules["hard_deep"] = [Deal(left_S, difficulty, seed=seed)]
        rules["easy_deep"] = [Deal(left_S, difficulty, downwards=True, seed=seed)]
    results: dict[str, dict[str, Any]] = {}
    for name, deals in rules.items():
        mean, parts = Mean(draws), []
        for depths in deals:
            drawn = Draws(len(text.chosen), draws=draws, seed=seed)
            parts.append(_totals(route_groups(model, text.corpus, text.split, depths=depths, **text.options), mean, drawn))
        whole = LanguageScore.of(
            sum(part.nats for part in parts) / len(parts), tokens=routed.tokens, size=routed.header["bytes"], documents=routed.documents
        )
        found = replace(parts[0].score(), loss=whole.loss, bits_per_byte=whole.bits_per_byte)
        results[name] = asdict(found) | {"excess": mean.estimate(minus=depth.loss).to_dict()}
    better = min(("rare_deep", "frequent_deep"), key=lambda name: results[name]["loss"])
    return results | {"frequency": results[better] | {"rule": better}}


def _totals(groups: Iterable[RouteRecords], mean: Mean, drawn: Draws) -> RouteTotals:
    """Sum up records, and add their losses to a mean."""
    totals: RouteTotals | None = None
    for records in groups:
        totals = totals or RouteTotals(records.header)
        totals.add(records)
        for block in drawn.blocks(records.document):
            mean.add(records.loss[block.rows], block)
    assert totals is not None, "there are as many documents as were drawn"
    return totals


def token_frequency(corpus: Any, *, split: str = "train", vocabulary: int | None = None) -> np.ndarray:
    """Return how often every token of the vocabulary (V,) occurs in a split."""
    tokens = corpus.tokens(split)
    count_V = np.zeros(vocabulary or corpus.vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), GROUP_TOKENS):
        count_V += np.bincount(tokens[start : start + GROUP_TOKENS], minlength=len(count_V))
    return count_V
