"""Interpolated Kneser–Ney n-grams, the reference that every model is printed beside.

The model is Chen & Goodman's (1998, §4.1.6) interpolated Kneser–Ney, with their modified discounts by default:

    p_m(w | h) = max(a(hw) − D(a(hw)), 0) / A(h) + Σ_v D(a(hv)) / A(h) · p_{m−1}(w | h′)

with A(h) = Σ_v a(hv) and h′ = h without its first token, down to the uniform distribution, p_0 = 1/V. `a` is the plain count at the highest
order; below it, the number of distinct tokens that stand before the n-gram. Nothing stands before a document's first token, so an n-gram
that begins there keeps its plain count (as in KenLM). A history that never occurred hands over to the next lower order unchanged. Histories
never reach back across the start of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Discounting = Literal["modified", "single"]
FALLBACK = (0.5, 1.0, 1.5)
"""Discounts for data too small or too regular to estimate them: some count of counts is zero, or an estimate leaves [0, count]."""
SCORE_TOKENS = 1 << 20
"""Tokens scored at once, to bound memory."""


@dataclass(frozen=True)
class _Counts:
    """One kind of count at one order: per n-gram, and per history its total and the mass its discounts set free."""

    count: np.ndarray
    """uint32, one per distinct n-gram of this order."""
    total: np.ndarray
    """A(h), uint32, one per distinct history, that is per n-gram of the order below."""
    freed: np.ndarray
    """Σ_v D(a(hv)), float64, per history."""
    discounts: np.ndarray
    """D of a count of 0, 1, 2, and 3 or more."""

    @classmethod
    def of(cls, count: np.ndarray, history: np.ndarray, *, histories: int, discounting: Discounting) -> _Counts:
        """Add up the counts of all n-grams over their histories."""
        discounts = estimate_discounts(count, discounting)
        freed = np.bincount(history, weights=discounts[np.minimum(count, 3)], minlength=histories)
        total = np.bincount(history, weights=count, minlength=histories)
        return cls(count.astype(np.uint32), total.astype(np.uint32), freed.astype(np.float64), discounts)

    def interpolate(self, gram: np.ndarray, history: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Return p(w | h) for n-grams and histories by number (−1: never seen), given the order below's probabilities."""
        if not len(self.count):
            return lower
        total = np.where(history >= 0, self.total[history], 0)
        count = np.where(gram >= 0, self.count[gram], 0).astype(np.int64)
        kept = np.maximum(count - self.discounts[np.minimum(count, 3)], 0.0)
        return np.where(total > 0, (kept + self.freed[history] * lower) / np.maximum(total, 1), lower)


class KneserNey:
    """Interpolated Kneser–Ney models of every order from 1 to `order`, over integer tokens, kept as sorted arrays.

    An n-gram is numbered by the rank of its key, (number of its first n−1 tokens) · V + last token, among the distinct keys of its order.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, *, vocab_size: int, order: int = 5, discounting: Discounting = "modified"):
        """Count the n-grams of `tokens` (n,), documents one after the other, each with its start and its end token.

        `starts` (d,) holds the position of each document's first token, which is history only, never predicted. Costs one sort of n 64-bit
        integers per order. Raises `ValueError` for input that cannot be counted.
        """
        _check(tokens, starts, vocab_size)
        if order < 1:
            raise ValueError(f"order={order}: must be at least 1")
        if discounting not in ("modified", "single"):
            raise ValueError(f"discounting={discounting!r}: must be 'modified' or 'single'")
        self.vocab_size, self.order, self.discounting = vocab_size, order, discounting
        self._keys: list[np.ndarray] = [np.arange(vocab_size, dtype=np.int64)]
        self._plain: list[_Counts] = []
        self._continuation: list[_Counts] = []
        self._train(np.asarray(tokens, dtype=np.int64), _place(len(tokens), starts))

    def _train(self, tokens: np.ndarray, place: np.ndarray) -> None:
        below = np.zeros(len(tokens), dtype=np.int32)  # number of the (m−1)-gram that ends at each token
        gram = tokens.astype(np.int32)  # number of the m-gram that ends at each token, where it fits into the document
        event = np.flatnonzero(place >= 1)
        for m in range(1, self.order + 1):
            if m > 1:
                event = np.flatnonzero(place >= m - 1)
                keys, inverse = np.unique(below[event - 1] * np.int64(self.vocab_size) + tokens[event], return_inverse=True)
                gram = np.full(len(tokens), -1, dtype=np.int32)
                gram[event] = inverse
                self._keys.append(keys)
                self._add_continuation(keys, gram, below, event, place == m - 2)
            self._plain.append(self._counts(m, np.bincount(gram[event], minlength=len(self._keys[m - 1]))))
            below = gram

    def _add_continuation(self, keys: np.ndarray, gram: np.ndarray, below: np.ndarray, event: np.ndarray, first: np.ndarray) -> None:
        """Count, one order below, the distinct tokens on the left, from one occurrence of each longer n-gram, and the document starts."""
        occurrence = np.empty(len(keys), dtype=np.int64)
        occurrence[gram[event]] = event
        m = len(self._continuation) + 1
        grams = len(self._keys[m - 1])
        count = np.bincount(below[occurrence], minlength=grams)
        if m > 1:  # a document's first token is never predicted, so it is no unigram to count
            count += np.bincount(below[first], minlength=grams)
        self._continuation.append(self._counts(m, count))

    def _counts(self, m: int, count: np.ndarray) -> _Counts:
        history = np.zeros(len(count), dtype=np.int64) if m == 1 else self._keys[m - 1] // self.vocab_size
        histories = 1 if m == 1 else len(self._keys[m - 2])
        return _Counts.of(count, history, histories=histories, discounting=self.discounting)

    @property
    def discounts(self) -> list[tuple[float, float, float]]:
        """D1, D2 and D3+ of the plain counts of each order."""
        return [tuple(counts.discounts[1:].tolist()) for counts in self._plain]

    def losses(self, tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Return −ln p of every token but the documents' first, in order, under the models of order 1 … `order`: (order, n − d) float64."""
        _check(tokens, starts, self.vocab_size)
        tokens, place = np.asarray(tokens, dtype=np.int64), _place(len(tokens), starts)
        parts = []
        for begin in range(0, len(tokens), SCORE_TOKENS):
            reach = max(begin - self.order + 1, 0)
            window = slice(reach, begin + SCORE_TOKENS)
            parts.append(self._score(tokens[window], place[window])[:, begin - reach :])
        return -np.log(np.concatenate(parts, axis=1)[:, place > 0])

    def probabilities(self, history: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return p(w | history) of every token w under the models of order 1 … `order`: (order, V) float64."""
        history = np.asarray(history, dtype=np.int64)[-self.order :]
        width = len(history) + 1
        tokens = np.tile(np.append(history, 0), (self.vocab_size, 1))
        tokens[:, -1] = np.arange(self.vocab_size)
        _check(tokens.ravel(), np.arange(0, tokens.size, width), self.vocab_size)
        place = np.tile(np.arange(width), self.vocab_size)
        return self._score(tokens.ravel(), place)[:, len(history) :: width]

    def _score(self, tokens: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Return p of each token by order (order, n). What stands at place 0, or reaches left of the first token given, is meaningless."""
        result = np.empty((self.order, len(tokens)))
        lower = np.full(len(tokens), 1.0 / self.vocab_size)
        below = np.zeros(len(tokens), dtype=np.int64)
        for m in range(1, self.order + 1):
            history = np.where(place >= m - 1, np.append(0 if m == 1 else -1, below[:-1]), -1)
            gram = tokens if m == 1 else self._find(m, history, tokens)
            result[m - 1] = self._plain[m - 1].interpolate(gram, history, lower)
            if m < self.order:
                lower = self._continuation[m - 1].interpolate(gram, history, lower)
            below = gram
        return result

    def _find(self, m: int, history: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the numbers of m-grams given their histories' numbers and last tokens; −1 for those never seen."""
        keys = self._keys[m - 1]
        if not len(keys):
            return np.full(len(tokens), -1, dtype=np.int64)
        wanted = history * self.vocab_size + tokens
        rank = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where((history >= 0) & (keys[rank] == wanted), rank, -1)


def estimate_discounts(count: np.ndarray, discounting: Discounting) -> np.ndarray:
    """Return D(0), D(1), D(2), D(3+) from how many n-grams have each count (Chen & Goodman 1998, eq. 17 for one, §4.1.6 for three)."""
    n1, n2, n3, n4 = (int((count == c).sum()) for c in range(1, 5))
    if discounting == "single":
        d = n1 / (n1 + 2 * n2) if n1 and n2 else FALLBACK[0]
        return np.array([0.0, d, d, d])
    if n1 and n2 and n3 and n4:
        y = n1 / (n1 + 2 * n2)
        estimates = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if all(0.0 < d <= i for i, d in enumerate(estimates, start=1)):
            return np.array([0.0, *estimates])
    return np.array([0.0, *FALLBACK])


def _place(size: int, starts: np.ndarray) -> np.ndarray:
    """Return each token's place in its document, from 0."""
    starts = np.asarray(starts, dtype=np.int64)
    return np.arange(size) - np.repeat(starts, np.diff(np.append(starts, size)))


def _check(tokens: np.ndarray, starts: np.ndarray, vocab_size: int) -> None:
    if not np.ndim(tokens) == np.ndim(starts) == 1 or not len(tokens) or not len(starts):
        raise ValueError(
            f"tokens of shape {np.shape(tokens)} and starts of shape {np.shape(starts)}: both must be lists that are not empty"
        )
    if starts[0] != 0 or np.any(np.diff(starts) < 1) or starts[-1] >= len(tokens):
        raise ValueError(f"starts must rise from 0 and end below the number of tokens, {len(tokens)}")
    if np.min(tokens) < 0 or np.max(tokens) >= vocab_size:
        raise ValueError(f"tokens lie in {np.min(tokens)} … {np.max(tokens)}: vocab_size={vocab_size} asks for 0 … {vocab_size - 1}")
