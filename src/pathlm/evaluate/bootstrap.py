"""Values with intervals over whole documents, drawn anew as the documents come, in memory that does not grow with the text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

# Shapes: N tokens, D documents, R = 1 + draws: first every document once, then each draw

DRAWS = 1_000
SHARE = 0.95
AT_ONCE = 512
"""Documents whose draws are held at a time."""


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


@dataclass(frozen=True, eq=False)
class Block:
    """Some whole documents: where their tokens lie among those given, whose each token is, and how often each document counts."""

    rows: slice
    place_N: np.ndarray
    """The token's document, numbered from 0 in this block"""
    times_DR: np.ndarray
    """1 in the first column, then the number of times that each draw holds the document"""


class Draws:
    """Draws of as many documents as there are, with replacement, told for one document after the other.

    Together the numbers are those of a multinomial distribution: how often a document is drawn is binomial in what is left for it and those
    after it. Equal seeds give equal draws, however the documents are cut into blocks.
    """

    def __init__(self, documents: int, *, draws: int = DRAWS, seed: int = 0) -> None:
        for name, value, least in (("documents", documents, 2), ("draws", draws, 1)):
            if value < least:
                raise ValueError(f"{name}={value}: an interval over documents needs at least {least}")
        self._random = np.random.default_rng(seed)
        self._documents = documents
        self._left = np.full(draws, documents)

    def take(self, documents: int) -> np.ndarray:
        """Return how often the next documents count (documents, R)."""
        times_DR = np.ones((documents, 1 + len(self._left)))
        for number in range(documents):
            drawn = self._random.binomial(self._left, 1 / self._documents)
            times_DR[number, 1:] = drawn
            self._left -= drawn
            self._documents -= 1
        return times_DR

    def blocks(self, document_N: np.ndarray) -> Iterator[Block]:
        """Cut the tokens of whole documents, one after the other, into blocks, and draw these documents."""
        starts = np.flatnonzero(np.diff(document_N, prepend=-1))
        ends = [*starts[AT_ONCE::AT_ONCE].tolist(), len(document_N)]
        for first, end in zip(range(0, len(starts), AT_ONCE), ends, strict=True):
            here = starts[first : first + AT_ONCE]
            rows = slice(int(here[0]), end)
            yield Block(rows, np.searchsorted(here, np.arange(rows.start, end), side="right") - 1, self.take(len(here)))


class Mean:
    """A mean over tokens, of all documents and of every draw."""

    def __init__(self, draws: int) -> None:
        self._sum_R, self._size_R = np.zeros(1 + draws), np.zeros(1 + draws)

    def add(self, value_N: np.ndarray, block: Block) -> None:
        """Add the tokens of a block; `value_N` are of its rows alone."""
        self._sum_R += np.bincount(block.place_N, weights=value_N) @ block.times_DR
        self._size_R += np.bincount(block.place_N) @ block.times_DR

    def estimate(self, minus: Mean | None = None) -> Estimate:
        """Return the mean with its interval, less another one of the same documents and draws where it is given."""
        mean_R = self._sum_R / self._size_R
        if minus is not None:
            mean_R = mean_R - minus._sum_R / minus._size_R
        return Estimate.of(float(mean_R[0]), mean_R[1:])


def mean_with_interval(value_N: np.ndarray, document_N: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Return the mean over tokens, in any order, with the interval that documents drawn anew give."""
    order = np.argsort(document_N, kind="stable")
    _, place_N = np.unique(document_N[order], return_inverse=True)
    found = Mean(draws)
    for block in Draws(int(place_N[-1]) + 1, draws=draws, seed=seed).blocks(place_N):
        found.add(value_N[order][block.rows], block)
    return found.estimate()
