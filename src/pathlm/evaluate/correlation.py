"""How two things known of every token go together: rank correlations, others held fixed, with intervals over whole documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement

import numpy as np

from pathlm.evaluate.bootstrap import Block, Estimate

# Shapes: N tokens, D documents, R = 1 + draws (see `bootstrap`), I and J bins of two columns, X columns

BINS = 64
"""Bins of a column. Of many values without ties, ranks in equal bins take less than 1/4000 from a correlation; of 300 up to 1/450."""
NEGLIGIBLE = 1e-12
"""A variance below this, of variables scaled to 1, is none."""
ROWS_AT_ONCE = 64
"""Draws whose counts are held in double precision at a time."""


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


def bin_starts(value_N: np.ndarray, weight_N: np.ndarray | None = None, *, bins: int = BINS) -> np.ndarray:
    """Return where bins but the first begin, so that each holds about the same weight; equal values stay together.

    Where there are no more than `bins` different values, each has a bin of its own, and nothing is lost.
    """
    kinds, kind_N = np.unique(value_N, return_inverse=True)
    if len(kinds) <= bins:
        return np.asarray(kinds[1:])
    return np.asarray(kinds[1:][np.diff(equal_parts(np.bincount(kind_N, weights=weight_N), bins)) > 0])


def equal_parts(size_K: np.ndarray, parts: int) -> np.ndarray:
    """Return which of equal parts (0 … `parts` − 1) of all each kind lies in, by its middle; kinds come smallest first."""
    middle_K = np.cumsum(size_K) - size_K / 2
    return np.asarray((parts * middle_K / max(float(size_K.sum()), 1.0)).astype(int)).clip(max=parts - 1)


def which_bin(value_N: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the number of the bin that each value lies in."""
    return np.searchsorted(starts, value_N, side="right")


class Correlations:
    """Correlations of columns that come block by block; every value has an interval over documents.

    Kept are, for every draw, how many tokens lie in each two bins of each two columns (for ranks), and sums of products (for the numbers
    themselves): memory grows with draws and bins, not with tokens. Values of one bin share their mean rank, and in every draw the ranks
    are made anew. A column held fixed takes away from both what a linear function of it (of its rank) says about them. A constant column
    correlates with nothing: NaN.

    Args:
        pairs: What to correlate, by name.
        starts: Of every column whose ranks are needed, where its bins begin (see `bin_starts`).
        draws: Number of draws of the blocks.
    """

    def __init__(self, pairs: Mapping[str, Pair], starts: Mapping[str, np.ndarray], *, draws: int) -> None:
        self._pairs, self._starts = dict(pairs), dict(starts)
        both = {two for pair in pairs.values() if pair.ranks for two in combinations(sorted(set(pair.names)), 2)}
        # Whole numbers in single precision: exact up to 16 million tokens in two bins, and rounded by less than one in 10 million beyond.
        self._count_RIJ = {
            (one, other): np.zeros((1 + draws, len(starts[one]) + 1, len(starts[other]) + 1), dtype=np.float32)
            for one, other in sorted(both)
        }
        self._numbers = sorted({name for pair in pairs.values() if not pair.ranks for name in pair.names})
        self._scale: list[tuple[float, float]] = []
        self._product_RXX = np.zeros((1 + draws, len(self._numbers) + 1, len(self._numbers) + 1))

    def add(self, columns: Mapping[str, np.ndarray], block: Block) -> None:
        """Add the tokens of a block; the columns are of its rows alone."""
        bin_N = {name: which_bin(columns[name], starts) for name, starts in self._starts.items()}
        times_DR = block.times_DR.astype(np.float32)
        for (one, other), count_RIJ in self._count_RIJ.items():
            _, i, j = count_RIJ.shape
            cell_N = (block.place_N * i + bin_N[one]) * j + bin_N[other]
            count_DIJ = np.bincount(cell_N, minlength=len(times_DR) * i * j).reshape(len(times_DR), i * j).astype(np.float32)
            count_RIJ += (times_DR.T @ count_DIJ).reshape(count_RIJ.shape)
        if self._numbers:
            self._add_numbers(columns, block)

    def _add_numbers(self, columns: Mapping[str, np.ndarray], block: Block) -> None:
        """Add products of the numbers themselves, scaled as the first block asks for so that nothing cancels."""
        if not self._scale:
            self._scale = [(float(columns[name].mean()), float(columns[name].std()) or 1.0) for name in self._numbers]
        x_XN = [np.ones(len(block.place_N))]
        x_XN += [(columns[name] - mean) / spread for name, (mean, spread) in zip(self._numbers, self._scale, strict=True)]
        for a, b in combinations_with_replacement(range(len(x_XN)), 2):
            product_R = np.bincount(block.place_N, weights=x_XN[a] * x_XN[b]) @ block.times_DR
            self._product_RXX[:, a, b] += product_R
            if a != b:
                self._product_RXX[:, b, a] += product_R

    def estimates(self) -> dict[str, Estimate]:
        """Return every correlation of what was added."""
        ranks, numbers = self._of_ranks(), self._of_numbers()
        found = {}
        for name, pair in self._pairs.items():
            names, covariance_RXX = ranks if pair.ranks else numbers
            chosen = [names.index(column) for column in pair.names]
            drawn = np.array([_partial(covariance_XX, chosen) for covariance_XX in covariance_RXX])
            found[name] = Estimate.of(float(drawn[0]), drawn[1:])
        return found

    def _of_ranks(self) -> tuple[list[str], np.ndarray]:
        """Return the names of the ranked columns, and the covariances of their ranks (scaled to 0 … 1) in every draw."""
        names = sorted(self._starts)
        rank_RI: dict[str, np.ndarray] = {}
        covariance_RXX = np.full((len(self._product_RXX), len(names), len(names)), math.nan)
        for (one, other), count_RIJ in self._count_RIJ.items():
            for name, axis in ((one, 2), (other, 1)):
                if name not in rank_RI:
                    size_RI = count_RIJ.sum(axis, dtype=np.float64)
                    total_R1 = size_RI.sum(1, keepdims=True)
                    rank_RI[name] = (np.cumsum(size_RI, axis=1) - size_RI / 2) / total_R1 - 0.5  # the mean rank is the middle
                    x = names.index(name)
                    covariance_RXX[:, x, x] = (size_RI * rank_RI[name] ** 2).sum(1) / total_R1[:, 0]
            x, y = names.index(one), names.index(other)
            for first in range(0, len(count_RIJ), ROWS_AT_ONCE):
                rows = slice(first, first + ROWS_AT_ONCE)
                some_RIJ = count_RIJ[rows].astype(np.float64)
                both_R = ((some_RIJ @ rank_RI[other][rows, :, None])[..., 0] * rank_RI[one][rows]).sum(1) / some_RIJ.sum((1, 2))
                covariance_RXX[rows, x, y] = covariance_RXX[rows, y, x] = both_R
        return names, covariance_RXX

    def _of_numbers(self) -> tuple[list[str], np.ndarray]:
        mean_RXX = self._product_RXX / np.maximum(self._product_RXX[:, :1, :1], 1.0)
        return self._numbers, mean_RXX[:, 1:, 1:] - mean_RXX[:, 1:, :1] * mean_RXX[:, :1, 1:]


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
