"""How two things known of every token go together: rank correlations, others held fixed, with intervals over whole documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

DRAWS = 1_000
SHARE = 0.95
NEGLIGIBLE = 1e-12
"""A variance below this, of variables scaled to 1, is none."""


@dataclass(frozen=True)
class Estimate:
    """A value and the interval that holds 95 % of the values found in documents drawn anew; NaN where there is no such value."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, drawn: np.ndarray) -> Estimate:
        """Summarise the values of resampled data; those that do not exist (a constant variable) are left out."""
        known = drawn[np.isfinite(drawn)]
        if not len(known):
            return cls(float(value), math.nan, math.nan)
        low, high = np.quantile(known, [(1 - SHARE) / 2, (1 + SHARE) / 2])
        return cls(float(value), float(low), float(high))

    def to_dict(self) -> dict[str, float | None]:
        """Return plain values, ready for JSON: None for NaN."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


def resampled(documents: int, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Return how often each document is drawn (draws, documents), when as many as there are are drawn with replacement."""
    for name, value, least in (("documents", documents, 2), ("draws", draws, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: an interval over documents needs at least {least}")
    return np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), size=draws)


def mean_with_interval(value_N: np.ndarray, document_N: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Return the mean over tokens, with the interval that documents drawn anew give."""
    _, place_N = np.unique(document_N, return_inverse=True)
    sum_D, size_D = np.bincount(place_N, weights=value_N), np.bincount(place_N).astype(float)
    times = resampled(len(size_D), draws=draws, seed=seed)
    return Estimate.of(float(sum_D.sum() / size_D.sum()), times @ sum_D / (times @ size_D))


@dataclass(frozen=True)
class Pair:
    """Two columns to correlate, those held fixed, and whether their ranks are correlated (Spearman) or the numbers themselves (Pearson)."""

    one: str
    other: str
    fixed: Sequence[str] = ()
    ranks: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """All columns it needs."""
        return (self.one, self.other, *self.fixed)


def correlations(
    columns: dict[str, np.ndarray],
    pairs: dict[str, Pair],
    document_N: np.ndarray,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Correlate columns of N numbers; every value comes with an interval over documents, drawn in the same way for all of them.

    Ties share their mean rank, and in every draw the ranks are made anew. A column held fixed takes away from both what a linear function
    of it (of its rank) says about them. A constant column correlates with nothing: NaN.
    """
    _, place_N = np.unique(document_N, return_inverse=True)
    times = resampled(int(place_N.max()) + 1, draws=draws, seed=seed).astype(float)
    needed = sorted({(name, pair.ranks) for pair in pairs.values() for name in pair.names})
    index = {key: i for i, key in enumerate(needed)}
    x_XN = np.stack([_scaled(columns[name]) for name, _ in needed])
    rank_of = {i: _ranker(columns[name]) for (name, ranks), i in index.items() if ranks}

    def all_of(weight_N: np.ndarray) -> list[float]:
        for i, ranks in rank_of.items():
            x_XN[i] = ranks(weight_N)
        covariance = _covariance(x_XN, weight_N)
        return [_partial(covariance, [index[name, pair.ranks] for name in pair.names]) for pair in pairs.values()]

    values = all_of(np.ones(len(place_N)))
    drawn = np.array([all_of(times_D[place_N]) for times_D in times])
    return {name: Estimate.of(values[i], drawn[:, i]) for i, name in enumerate(pairs)}


def _ranker(values_N: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from how often each token counts to the tokens' ranks, scaled to 0 … 1."""
    _, group_N = np.unique(values_N, return_inverse=True)

    def ranks(weight_N: np.ndarray) -> np.ndarray:
        size_G = np.bincount(group_N, weights=weight_N)
        middle_G = np.cumsum(size_G) - size_G / 2
        return np.asarray(middle_G[group_N] / size_G.sum())

    return ranks


def _scaled(values_N: np.ndarray) -> np.ndarray:
    values_N = np.asarray(values_N, dtype=float)
    spread = values_N.std()
    return (values_N - values_N.mean()) / (spread if spread > 0 else 1.0)


def _covariance(x_XN: np.ndarray, weight_N: np.ndarray) -> np.ndarray:
    total = weight_N.sum()
    weighted_XN = x_XN * weight_N
    mean_X = weighted_XN.sum(1) / total
    return np.asarray(weighted_XN @ x_XN.T / total - np.outer(mean_X, mean_X))


def _partial(covariance_XX: np.ndarray, variables: list[int]) -> float:
    """Return the correlation of what is left of the first two variables when the best linear function of the others is taken away."""
    pair, fixed = variables[:2], variables[2:]
    left = covariance_XX[np.ix_(pair, pair)]
    before = left.diagonal().copy()
    if fixed:
        among, between = covariance_XX[np.ix_(fixed, fixed)], covariance_XX[np.ix_(fixed, pair)]
        left = left - between.T @ np.linalg.pinv(among, rcond=NEGLIGIBLE, hermitian=True) @ between
    if (left.diagonal() <= NEGLIGIBLE * np.maximum(before, NEGLIGIBLE)).any() or (before <= NEGLIGIBLE).any():
        return math.nan
    return float(np.clip(left[0, 1] / math.sqrt(left[0, 0] * left[1, 1]), -1, 1))
