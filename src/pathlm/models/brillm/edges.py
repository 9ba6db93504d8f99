"""Which pairs of nodes have an edge of their own: a sparse matrix, counted from text, sorted by source and target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

# Shapes: V nodes, E edges, N queries or pairs

SHARED = 0
"""The row of the edge that all pairs without one of their own share."""
CHUNK = 2**22
"""Pairs that are sorted at a time while counting."""
IGNORE = -100


@dataclass(frozen=True)
class Edges:
    """The edges of a graph in rows 1 … E, sorted by source and then by target: those of one source lie beside each other."""

    key_E: Tensor
    """source · V + target of every edge, int64, rising"""
    start_V1: Tensor
    """How many edges the nodes before each one have, and at the end how many there are: node u has the rows start[u] + 1 … start[u + 1]"""

    @classmethod
    def from_keys(cls, key_E: Tensor, nodes: int) -> Edges:
        """Make a graph of the numbers source · V + target, which must rise. Raises `ValueError` where they do not, or are no pair."""
        key_E = torch.as_tensor(key_E, dtype=torch.int64)
        if key_E.numel() and (int(key_E[0]) < 0 or int(key_E[-1]) >= nodes**2 or bool((key_E[1:] <= key_E[:-1]).any())):
            raise ValueError(f"key_E: must rise strictly and lie in 0 … {nodes**2 - 1} for {nodes} nodes")
        return cls(key_E, torch.searchsorted(key_E, torch.arange(nodes + 1, device=key_E.device) * nodes))

    @classmethod
    def from_pairs(cls, pairs: Int[Any, "n 2"], nodes: int) -> Edges:
        """Make a graph of a list of (source, target), in any order, repeated or not. Raises `ValueError` for nodes that do not exist."""
        return cls.from_counts(count([np.asarray(pairs)], nodes), nodes)

    @classmethod
    def from_counts(cls, counted: tuple[np.ndarray, np.ndarray], nodes: int, *, min_count: int = 1) -> Edges:
        """Make a graph of the pairs that were seen at least `min_count` times, as `count` returns them."""
        key, times = counted
        return cls.from_keys(torch.from_numpy(key[times >= min_count]), nodes)

    @classmethod
    def even(cls, count: int, nodes: int) -> Edges:
        """Make a graph of `count` edges spread evenly over all pairs: for measuring, and until a graph is loaded."""
        step = np.arange(count, dtype=np.int64)
        # Whole numbers without overflow: count ≤ nodes², and nodes² · count may exceed 64 bits.
        whole, rest = divmod(nodes**2, max(count, 1))
        return cls.from_keys(torch.from_numpy(step * whole + step * rest // max(count, 1)), nodes)

    def lookup(self, source_N: Int[Tensor, ...], target_N: Int[Tensor, ...]) -> Int[Tensor, ...]:
        """Return the row of every pair: its own, or that of the shared edge."""
        if not self.key_E.numel():
            return torch.zeros_like(source_N)
        wanted = source_N * (self.start_V1.numel() - 1) + target_N
        place = torch.searchsorted(self.key_E, wanted).clamp_(max=self.key_E.numel() - 1)
        return torch.where(self.key_E[place] == wanted, place + 1, SHARED)

    def targets(self, source: int) -> Tensor:
        """Return the targets of a node's own edges, in the order of their rows."""
        first, stop = self.start_V1[source : source + 2].tolist()
        return self.key_E[first:stop] - source * (self.start_V1.numel() - 1)


def count(chunks: Iterable[np.ndarray], nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Count pairs that come in arrays (N, 2) of source and target; return the keys source · V + target, rising, and how often each came.

    Memory is that of the different pairs and of one chunk. Raises `ValueError` for a node that does not exist.
    """
    key, times = np.empty(0, np.int64), np.empty(0, np.int64)
    for pairs in _gathered(chunks):
        if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
            raise ValueError(f"pairs are {pairs.dtype} {pairs.shape}: must be whole numbers (N, 2), source and target")
        if pairs.size and not 0 <= pairs.min() <= pairs.max() < nodes:
            raise ValueError(f"pairs hold nodes from {pairs.min()} to {pairs.max()}: must lie in 0 … vocab_size - 1 = {nodes - 1}")
        fresh, seen = np.unique(pairs[:, 0].astype(np.int64) * nodes + pairs[:, 1], return_counts=True)
        merged, place = np.unique(np.concatenate((key, fresh)), return_inverse=True)
        total = np.zeros(len(merged), np.int64)
        total[place[: len(key)]] = times
        total[place[len(key) :]] += seen
        key, times = merged, total
    return key, times


def count_rows(rows: Any, nodes: int, *, limit: int = 2**17) -> tuple[np.ndarray, np.ndarray]:
    """Count the neighbours in what a run is trained on: the documents of a corpus, or an epoch of rows, at most `limit` where none ends.

    Pairs of different documents do not count. Keys are those of a graph of `nodes` nodes, which may have more than the text's tokenizer.
    """
    corpus = getattr(rows, "corpus", None)
    if corpus is not None:
        return count(_corpus_pairs(corpus, rows.split), nodes)
    return count(_row_pairs(rows, getattr(rows, "rows_per_epoch", limit)), nodes)


def _corpus_pairs(corpus: Any, split: str) -> Iterator[np.ndarray]:
    tokens, starts = corpus.tokens(split), corpus.documents(split).starts
    for first in range(0, len(tokens) - 1, CHUNK):
        part = tokens[first : min(first + CHUNK + 1, len(tokens))]
        within = np.ones(len(part) - 1, dtype=bool)
        borders = starts[np.searchsorted(starts, first + 1) : np.searchsorted(starts, first + len(part))]
        within[borders - first - 1] = False
        yield np.stack((part[:-1], part[1:]), axis=1)[within]


def _row_pairs(rows: Any, stop: int, *, at_once: int = 1024) -> Iterator[np.ndarray]:
    for first in range(0, stop, at_once):
        batch = rows.batch(first, min(at_once, stop - first))
        ids, documents = batch["input_ids"], batch["document_ids"]
        together = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
        yield np.stack((ids[:, :-1][together], ids[:, 1:][together]), axis=1)


def _gathered(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Join small arrays, and cut large ones, to about `CHUNK` pairs each."""
    held: list[np.ndarray] = []
    size = 0
    for chunk in chunks:
        for first in range(0, max(len(chunk), 1), CHUNK):
            part = chunk[first : first + CHUNK]
            held.append(part)
            size += len(part)
            if size >= CHUNK:
                yield held[0] if len(held) == 1 else np.concatenate(held)
                held, size = [], 0
    if held:
        yield held[0] if len(held) == 1 else np.concatenate(held)
