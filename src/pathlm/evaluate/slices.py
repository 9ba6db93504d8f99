"""Routes by kind of token: by place in the document, by how frequent a token is, by what it is in its word, by how hard its place is."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pathlm.evaluate.routes import RouteRecords

# Shapes: N tokens whose routes were measured, V vocabulary

CLASSES = ("word start", "inside word", "ideograph", "digit", "punctuation", "other")
FIRST_PLACES = 16
"""Places of the first slice by position; each further one holds twice as many."""
PARTS = 10


def slices(
    records: RouteRecords, tokenizer: Any, frequency_V: np.ndarray, *, difficulty_N: np.ndarray, gain_N: np.ndarray
) -> dict[str, list[dict[str, Any]]]:
    """Return rows of means over tokens: loss after the token, route steps, blocks run, and `gain_N`, what depth is worth there.

    `position` doubles from slice to slice, `frequency` (in the training split, `frequency_V`) and `difficulty` (`difficulty_N`, a loss at
    the same place) are tenths of the tokens, equals together; `class` says what the token is in its word. Slices without a token are left
    out.
    """
    furthest = int(records.position.max())
    edges = [FIRST_PLACES << n for n in range((furthest // FIRST_PLACES).bit_length() + 1)]
    places = [f"{low}–{high - 1}" for low, high in pairwise([0, *edges])]
    return {
        "position": _rows(records, np.digitize(records.position, edges), places, gain_N),
        "frequency": _rows(records, tenths(frequency_V[records.token]), _numbered("rarest", "most frequent"), gain_N),
        "class": _rows(records, token_class(records, tokenizer), CLASSES, gain_N),
        "difficulty": _rows(records, tenths(difficulty_N), _numbered("easiest", "hardest"), gain_N),
    }


def tenths(value_N: np.ndarray) -> np.ndarray:
    """Return the tenth (0 … 9) that each value lies in; equal values lie together, in the tenth of their middle."""
    _, kind_N, count = np.unique(value_N, return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - count / 2
    return np.asarray((PARTS * middle / len(value_N)).astype(int)[kind_N])


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


def _rows(records: RouteRecords, slice_N: np.ndarray, labels: Sequence[str], gain_N: np.ndarray) -> list[dict[str, Any]]:
    count = np.bincount(slice_N, minlength=len(labels))
    columns = {"loss": records.loss, "steps_mean": records.steps, "block_evaluations": records.evaluations, "gain": gain_N}
    sums = {name: np.bincount(slice_N, weights=column, minlength=len(labels)) for name, column in columns.items()}
    return [
        {"label": label, "tokens": int(count[i])} | {name: float(total[i] / count[i]) for name, total in sums.items()}
        for i, label in enumerate(labels)
        if count[i]
    ]
