"""Routes by kind of token: by place in the document, by how frequent a token is, by what it is in its word, by how hard its place is."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pathlm.evaluate.correlation import equal_parts, which_bin
from pathlm.evaluate.routes import RouteRecords

# Shapes: N tokens whose routes were measured, V vocabulary, K kinds of tokens, X sums of a kind: tokens, then what means are taken of

CLASSES = ("word start", "inside word", "ideograph", "digit", "punctuation", "other")
PLACES = 16 << np.arange(40)
"""Where slices by position begin: the first has 16 places, and each ends at twice the place that the one before it did."""
PARTS = 10
MEANS = ("loss", "steps_mean", "block_evaluations", "gain")
DIFFICULTIES = 4096
"""Bins that difficulties are told apart by."""


class Slices:
    """Means over tokens by kind, of records that come one after the other: memory grows with the vocabulary, not with the text.

    `position` doubles from slice to slice, `frequency` (in the training split, `frequency_V`) and `difficulty` (a loss at the same place)
    are tenths of the tokens, equals together; `class` says what the token is in its word. Difficulties are told apart as far as
    `difficulty_starts` go, where their bins begin.
    """

    def __init__(self, tokenizer: Any, frequency_V: np.ndarray, difficulty_starts: np.ndarray) -> None:
        kinds, self.frequency_V = np.unique(frequency_V, return_inverse=True)
        """Of every token of the vocabulary: its frequency's number among all different ones, rarest first"""
        self.difficulty_starts = difficulty_starts
        self._tokenizer = tokenizer
        sizes = {"position": 1 + len(PLACES), "frequency": len(kinds), "class": len(CLASSES), "difficulty": 1 + len(difficulty_starts)}
        self._sums = {name: np.zeros((1 + len(MEANS), size)) for name, size in sizes.items()}

    def add(self, records: RouteRecords, *, difficulty_N: np.ndarray, gain_N: np.ndarray) -> None:
        """Add whole documents; `gain_N` is what depth is worth at each token."""
        kinds = {
            "position": which_bin(records.position, PLACES),
            "frequency": self.frequency_V[records.token],
            "class": token_class(records, self._tokenizer),
            "difficulty": which_bin(difficulty_N, self.difficulty_starts),
        }
        values = (None, records.loss, records.steps, records.evaluations, gain_N)
        for name, kind_N in kinds.items():
            size = self._sums[name].shape[1]
            self._sums[name] += [np.bincount(kind_N, weights=value_N, minlength=size) for value_N in values]

    def count(self, name: str) -> np.ndarray:
        """Return how many tokens were added of each kind; of `frequency` and `difficulty` before they are made tenths."""
        return self._sums[name][0].astype(np.int64)

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Return rows of means: loss after the token, route steps, blocks run, gain. Slices without a token are left out."""
        places = [f"{low}–{high - 1}" for low, high in pairwise([0, *PLACES.tolist(), 2 * PLACES[-1]])]
        return {
            "position": _rows(self._sums["position"], places),
            "frequency": _rows(_tenths(self._sums["frequency"]), _numbered("rarest", "most frequent")),
            "class": _rows(self._sums["class"], CLASSES),
            "difficulty": _rows(_tenths(self._sums["difficulty"]), _numbered("easiest", "hardest")),
        }


def _tenths(sum_XK: np.ndarray) -> np.ndarray:
    """Add up sums of kinds, smallest first, by the tenth of the tokens that each kind lies in."""
    part_K = equal_parts(sum_XK[0], PARTS)
    return np.stack([np.bincount(part_K, weights=sum_K, minlength=PARTS) for sum_K in sum_XK])


def token_class(records: RouteRecords, tokenizer: Any) -> np.ndarray:
    """Return the number in `CLASSES` of each token. Whether one begins a word is seen from the token before it."""
    kinds, kind_N = np.unique(records.token, return_inverse=True)
    special = set(tokenizer.all_special_ids)
    texts = ["" if token in special else _text(tokenizer, token) for token in kinds.tolist()]
    own = np.array([CLASSES.index(_class(text)) for text in texts])[kind_N]
    spaced, ends = (np.array(found)[kind_N] for found in zip(*((text[:1].isspace(), text[-1:].isalnum()) for text in texts), strict=True))
    follows = np.zeros(len(own), dtype=bool)  # directly on a word's letter
    follows[1:] = ends[:-1] & (records.position[1:] == records.position[:-1] + 1)  # a document's first token is at 0
    inside = (own == CLASSES.index("word start")) & follows & ~spaced
    return np.where(inside, CLASSES.index("inside word"), own)


def _text(tokenizer: Any, token: int) -> str:
    """Return a token's text with the space before it, which some tokenizers write as a sign of their own."""
    symbol, text = tokenizer.convert_ids_to_tokens(token), str(tokenizer.decode([token]))
    return " " + text.lstrip() if isinstance(symbol, str) and symbol.startswith("\N{LOWER ONE EIGHTH BLOCK}") else text


def _class(text: str) -> str:
    """Return what a token is by its text alone: what has letters is the start of a word here."""
    bare = text.strip()
    if not bare or "\N{REPLACEMENT CHARACTER}" in bare:
        return "other"
    if bare.isdigit():
        return "digit"
    if not any(letter.isalnum() for letter in bare):
        return "punctuation"
    wide = all(unicodedata.east_asian_width(letter) in "WF" for letter in bare)
    return "ideograph" if wide else "word start"


def _numbered(first: str, last: str) -> list[str]:
    return [f"1 ({first})", *map(str, range(2, PARTS)), f"{PARTS} ({last})"]


def _rows(sum_XK: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"label": label, "tokens": int(count)} | {name: float(total / count) for name, total in zip(MEANS, totals, strict=True)}
        for label, count, *totals in zip(labels, *sum_XK, strict=True)
        if count
    ]
