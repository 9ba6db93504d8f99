"""Rows of fixed length cut from a split's token stream, in a seeded order that can be entered anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from pathlm.text.corpus import Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""Label of a position that no loss counts."""
PADDING = -1
"""Document number of padding."""

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK = 4096
"""Rows whose order is worked out at once."""


@runtime_checkable
class Rows(Protocol):
    """What a trainer reads: an endless sequence of rows, each a pure function of its place, so that resuming is one integer."""

    length: int
    vocab_size: int

    def batch(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Return `input_ids`, `labels` and `document_ids` of rows start … start + count − 1, each (count, length) int64."""
        ...

    def describe(self, batch: dict[str, np.ndarray]) -> list[str]:
        """Return the ids of the documents in a batch, for error messages."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Open the tokenizer of the rows."""
        ...


class PackedRows:
    """The rows of one split: documents back to back, every token in exactly one row per epoch, the last row padded."""

    def __init__(self, corpus: Corpus, split: str, *, length: int, seed: int, shuffle: bool = True) -> None:
        """Cut `split` into rows of `length` tokens. Without `shuffle`, every epoch runs in the order of the stream.

        Raises `ValueError` when the split is unknown or holds nothing, or the length is below 2.
        """
        if length < 2:
            raise ValueError(f"length={length}: a row needs at least 2 tokens")
        self.corpus, self.split, self.length, self.seed, self.shuffle = corpus, split, length, seed, shuffle
        self._tokens = corpus.tokens(split)
        if not len(self._tokens):
            raise ValueError(f"split={split!r} of {corpus.folder} has no documents; prepare more text or a larger share for it")
        self._starts = corpus.documents(split).starts
        self.rows_per_epoch = -(-len(self._tokens) // length)
        self.vocab_size = corpus.vocab_size
        ids = corpus.record.tokenizer
        self._kept: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty(0, np.int64))
        self._pad = int(ids["pad"] if ids["pad"] is not None else ids["eos"])

    def batch(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Return rows start … start + count − 1 of the endless order, each (count, length) int64; a pure function of its arguments.

        `labels[t]` is token t itself, and -100 for padding and for the first token of each document in the row: the model shifts.
        `document_ids` numbers the documents of the split; -1 is padding.
        """
        if start < 0 or count < 1:
            raise ValueError(f"rows {start} to {start + count - 1}: start must not be negative and count must be at least 1")
        first_N = self._order(np.arange(start, start + count)) * self.length
        last_N = np.minimum(first_N + self.length, len(self._tokens))
        input_ids = np.full((count, self.length), self._pad, dtype=np.int64)
        for row, (a, b) in enumerate(zip(first_N.tolist(), last_N.tolist(), strict=True)):
            self._tokens.read_into(input_ids[row, : b - a], a)
        # Documents that begin inside a row, after its first token, are the steps of a staircase that starts at the row's first document.
        document_N = np.searchsorted(self._starts, first_N, side="right") - 1
        steps_N = np.searchsorted(self._starts, last_N, side="left") - 1 - document_N
        row_S = np.repeat(np.arange(count), steps_N)
        step_S = np.arange(len(row_S)) - np.repeat(np.cumsum(steps_N) - steps_N, steps_N)
        column_S = self._starts[document_N[row_S] + 1 + step_S] - first_N[row_S]
        document_ids = np.zeros((count, self.length), dtype=np.int64)
        document_ids[row_S, column_S] = 1
        document_ids[:, 0] = document_N
        np.cumsum(document_ids, axis=1, out=document_ids)
        labels = input_ids.copy()
        labels[:, 0] = IGNORE
        labels[row_S, column_S] = IGNORE
        for row in np.flatnonzero(last_N - first_N < self.length).tolist():
            labels[row, last_N[row] - first_N[row] :] = IGNORE
            document_ids[row, last_N[row] - first_N[row] :] = PADDING
        return {"input_ids": input_ids, "labels": labels, "document_ids": document_ids}

    def describe(self, batch: dict[str, np.ndarray]) -> list[str]:
        """Return the ids of the documents in a batch."""
        numbers = np.unique(batch["document_ids"])
        documents = self.corpus.documents(self.split)
        return [documents[int(number)].id for number in numbers[numbers != PADDING]]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Open the corpus's tokenizer."""
        return self.corpus.tokenizer()

    def _order(self, place_N: np.ndarray) -> np.ndarray:
        """Map places of the endless order to rows of the stream."""
        epoch_N, inside_N = np.divmod(place_N, self.rows_per_epoch)
        if not self.shuffle:
            return inside_N
        row_N = np.empty_like(inside_N)
        for epoch in np.unique(epoch_N).tolist():
            for block in np.unique(inside_N[epoch_N == epoch] // _BLOCK).tolist():
                here = (epoch_N == epoch) & (inside_N // _BLOCK == block)
                row_N[here] = self._block(epoch, block)[inside_N[here] - block * _BLOCK]
        return row_N

    def _block(self, epoch: int, block: int) -> np.ndarray:
        """Return the rows at places block · _BLOCK … of an epoch; the last such block is kept."""
        if self._kept[0] != (epoch, block):
            place = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self.rows_per_epoch))
            self._kept = ((epoch, block), permute(place, self.rows_per_epoch, key=(self.seed << 32) + epoch))
        return self._kept[1]


def permute(place: np.ndarray, size: int, *, key: int) -> np.ndarray:
    """Apply a pseudo-random permutation of 0 … size − 1, a different one for every key, without holding it in memory.

    A Feistel network over the next power of two; values that fall outside are sent through again until they fall inside
    (Black and Rogaway, 2002, "Ciphers with arbitrary finite domains").
    """
    bits = max((size - 1).bit_length(), 1)
    widths = (np.uint64(bits // 2), np.uint64(bits - bits // 2))
    keys = [_mix(np.array([(key * _ROUNDS + turn) * _GOLDEN % 2**64], dtype=np.uint64)) for turn in range(_ROUNDS)]
    value = place.astype(np.uint64)
    outside = np.ones(place.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> widths[1], value[outside] & ((np.uint64(1) << widths[1]) - np.uint64(1))
        for turn in range(_ROUNDS):
            mask = (np.uint64(1) << widths[turn % 2]) - np.uint64(1)
            left, right = right, left ^ (_mix(right ^ keys[turn]) & mask)
        value[outside] = (left << widths[1]) | right
        outside = value >= np.uint64(size)
    return value.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64 bits (the finaliser of SplitMix64); arithmetic is modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
