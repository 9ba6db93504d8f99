"""Rules for leaving the pool that know nothing of the text: what the same number of steps is worth where no router deals them out."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from pathlm.evaluate.correlation import DRAWS, mean_with_interval
from pathlm.evaluate.lm import GROUP_TOKENS
from pathlm.evaluate.routes import RouteRecords, route_table

# Shapes: N tokens whose routes are dealt out, V vocabulary

RANDOM_DEALS = 3
"""How often random steps are dealt, to take the mean."""
PASSES = RANDOM_DEALS + 3
"""Times that `controls` reads the documents."""


def random_depths(steps_N: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Deal the same steps out to the tokens anew, at random."""
    return np.random.default_rng(seed).permutation(steps_N)


def static_depths(steps_N: np.ndarray) -> np.ndarray:
    """Give every token the mean number of steps: the whole numbers around it in turns, so that the mean is kept to a step in all."""
    reached = np.floor(np.arange(len(steps_N) + 1) * (steps_N.sum(dtype=np.int64) / len(steps_N)) + 1e-9)
    return np.diff(reached).astype(steps_N.dtype)


def frequency_depths(steps_N: np.ndarray, frequency_N: np.ndarray, *, rare_deep: bool, seed: int = 0) -> np.ndarray:
    """Deal the same steps out by how frequent tokens are: the largest to the rarest, or to the most frequent. Equals are drawn by lot."""
    lot_N = np.random.default_rng(seed).permutation(len(steps_N))
    order = np.lexsort((lot_N, -frequency_N if rare_deep else frequency_N))
    depth_N = np.empty_like(steps_N)
    depth_N[order] = np.sort(steps_N)
    return depth_N


def controls(
    model: Any,
    corpus: Any,
    split: str,
    records: RouteRecords,
    frequency_V: np.ndarray,
    *,
    difficulty_N: np.ndarray | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Let the same model leave the pool by rules that know nothing of the text, with the steps that `records` tell of.

    `random` deals the same steps out at random (the mean of several deals), `static` gives everybody the mean, `rare_deep` and
    `frequent_deep` go by how frequent a token is; `frequency` repeats the better of these two on this very split, which flatters it.
    With `difficulty_N`, an independent model's losses, `hard_deep` and `easy_deep` go by these: they know what follows, so they are no
    rules for use, but they say whether depth belongs to what is hard. Each has its score and `excess`: its loss minus the routed model's,
    with the interval over documents. The blocks stay the router's choice. `options` are those of `route_table`, as they were for `records`.
    """
    steps_N, frequency_N = records.steps, frequency_V[records.token]
    rules = {
        "random": [random_depths(steps_N, seed=seed + i) for i in range(RANDOM_DEALS)],
        "static": [static_depths(steps_N)],
        "rare_deep": [frequency_depths(steps_N, frequency_N, rare_deep=True, seed=seed)],
        "frequent_deep": [frequency_depths(steps_N, frequency_N, rare_deep=False, seed=seed)],
    }
    if difficulty_N is not None:
        rules["hard_deep"] = [frequency_depths(steps_N, -difficulty_N, rare_deep=True, seed=seed)]
        rules["easy_deep"] = [frequency_depths(steps_N, -difficulty_N, rare_deep=False, seed=seed)]
    results: dict[str, dict[str, Any]] = {}
    for name, deals in rules.items():
        tables = [route_table(model, corpus, split, depths=depth_N, **options) for depth_N in deals]
        loss_N = np.mean([table.loss for table in tables], axis=0, dtype=np.float64)
        excess = mean_with_interval(loss_N - records.loss, records.document, draws=draws, seed=seed)
        found = asdict(tables[0].score())
        bits = float(loss_N.sum()) / (math.log(2) * records.header["bytes"])
        results[name] = found | {"loss": float(loss_N.mean()), "bits_per_byte": bits, "excess": excess.to_dict()}
    better = min(("rare_deep", "frequent_deep"), key=lambda name: results[name]["loss"])
    return results | {"frequency": results[better] | {"rule": better}}


def token_frequency(corpus: Any, *, split: str = "train", vocabulary: int | None = None) -> np.ndarray:
    """Return how often every token of the vocabulary (V,) occurs in a split."""
    tokens = corpus.tokens(split)
    count_V = np.zeros(vocabulary or corpus.vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), GROUP_TOKENS):
        count_V += np.bincount(tokens[start : start + GROUP_TOKENS], minlength=len(count_V))
    return count_V
