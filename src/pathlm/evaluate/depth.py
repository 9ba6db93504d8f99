"""What goes with the depth that tokens take: the measured gain of depth, a plain model's loss, and slices, over texts of any length."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pathlm.evaluate.bootstrap import DRAWS, Draws, Mean
from pathlm.evaluate.correlation import Correlations, Pair, bin_starts
from pathlm.evaluate.records import LossFile, TokenLosses
from pathlm.evaluate.route_map import RouteMap
from pathlm.evaluate.routes import RouteRecords, RouteTotals, all_take, route_groups
from pathlm.evaluate.slices import DIFFICULTIES, Slices

# Shapes: N tokens of some whole documents, V vocabulary


@dataclass(frozen=True, eq=False)
class Reading:
    """Some whole documents, read in several ways: one row per predicted token in each."""

    own: RouteRecords
    """What the routed model did."""
    early: RouteRecords
    """What it did where all tokens leave as early as they may."""
    late: RouteRecords
    """What it did where all take every step."""
    plain_N: np.ndarray | None = None
    """What a plain model lost."""
    seconds: float = 0.0
    """What the first of these readings took."""

    @property
    def gain_N(self) -> np.ndarray:
        """What depth is worth at each token."""
        return self.early.loss - self.late.loss

    @property
    def difficulty_N(self) -> np.ndarray:
        """How hard each place is: for the plain model where there is one, else for the model itself."""
        return self.own.loss if self.plain_N is None else self.plain_N


def readings(
    model: Any,
    corpus: Any,
    split: str,
    *,
    losses: LossFile | None = None,
    budget: float | None = None,
    route_map: RouteMap | None = None,
    **options: Any,
) -> Iterator[Reading]:
    """Read each group of documents with the model's own routes, with the fewest steps and with all of them; join a plain model's losses.

    `options` are those of `route_groups`. Raises `ValueError` where the losses are of other tokens.
    """
    own = route_groups(model, corpus, split, budget=budget, route_map=route_map, **options)
    early, late = (route_groups(model, corpus, split, depths=all_take(steps), **options) for steps in model.pool.steps_possible)
    done = 0
    while True:
        begun = time.perf_counter()
        if (records := next(own, None)) is None:
            return
        seconds = time.perf_counter() - begun
        plain_N = None if losses is None else aligned(records, losses.rows(done, done + len(records)))
        yield Reading(records, next(early), next(late), plain_N, seconds)
        done += len(records)


def aligned(records: RouteRecords, plain: TokenLosses) -> np.ndarray:
    """Return the losses of another model, one per row of `records`, or raise `ValueError` where they are of other tokens."""
    ours = (records.document, records.position + 1, records.following)
    theirs = (plain.document, plain.position, plain.token)
    if len(plain) != len(records) or any((a != b).any() for a, b in zip(ours, theirs, strict=True)):
        raise ValueError(f"token losses: {len(plain)} of other tokens than the {len(records)} whose routes were measured")
    return plain.loss


class Depth:
    """Adds up readings, in memory that grows with draws, bins and the vocabulary, but not with the text.

    The steps of tokens are correlated with the *gain* of depth, the loss if all leave as early as they may minus that if all take every
    step, and with the plain model's loss, where there is one. Depth is taught by gain, not by loss: a token may be hard and yet have
    nothing to gain. This gain is of all steps for everybody at once, while training measures one token's own and leaves the others as they
    were.

    Args:
        first: The first reading, which says where the bins of gains and losses begin; it is to be added like the others.
        chosen: The documents that will be added, as the corpus lists them.
        frequency_V: How often each token occurs in the training split.
        tokenizer: The corpus's, for what a token is in its word.
        draws: Times that as many documents are drawn; `seed` is that of the draws.
    """

    def __init__(
        self, first: Reading, chosen: Sequence[Any], frequency_V: np.ndarray, tokenizer: Any, *, draws: int = DRAWS, seed: int = 0
    ) -> None:
        self.routed, self.early, self.late = (RouteTotals(first.own.header) for _ in range(3))
        self.loss, self.gain = Mean(draws), Mean(draws)
        self.excess = None if first.plain_N is None else Mean(draws)
        self.seconds = 0.0
        self.slices = Slices(tokenizer, frequency_V, bin_starts(first.difficulty_N, bins=DIFFICULTIES))
        self._drawn = Draws(len(chosen), draws=draws, seed=seed)
        self._rarity_V = np.log1p(frequency_V)
        by_rarity = bin_starts(self._rarity_V, frequency_V)
        starts = {"frequency": by_rarity, "following": by_rarity, "position": _place_starts([record.tokens - 1 for record in chosen])}
        starts |= {"steps": np.arange(1, first.own.header["max_route_steps"] + 1), "gain": bin_starts(first.gain_N)}
        if first.plain_N is not None:
            starts["loss"] = bin_starts(first.plain_N)
        self._of = ("gain",) if first.plain_N is None else ("gain", "loss")
        pairs = {f"{of} {kind}": pair for of in self._of for kind, pair in _pairs(of).items()}
        self._correlations = Correlations(pairs, starts, draws=draws)

    def add(self, reading: Reading) -> None:
        """Add the next documents."""
        own, gain_N, plain_N = reading.own, reading.gain_N, reading.plain_N
        for totals, records in ((self.routed, own), (self.early, reading.early), (self.late, reading.late)):
            totals.add(records)
        self.seconds += reading.seconds
        self.slices.add(own, difficulty_N=reading.difficulty_N, gain_N=gain_N)
        columns = {
            "steps": own.steps.astype(float),
            "gain": gain_N.astype(float),
            "frequency": self._rarity_V[own.token],
            "following": self._rarity_V[own.following],
            "position": own.position,
        }
        if plain_N is not None:
            columns["loss"] = plain_N.astype(float)
        for block in self._drawn.blocks(own.document):
            self._correlations.add({name: column[block.rows] for name, column in columns.items()}, block)
            self.loss.add(own.loss[block.rows], block)
            self.gain.add(gain_N[block.rows], block)
            if self.excess is not None and plain_N is not None:
                self.excess.add((own.loss - plain_N)[block.rows], block)

    def correlations(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Return what the steps of tokens have to do with the `gain`, and with the plain `loss` where there is one.

        Each is told as Spearman, Pearson, and Spearman with these held fixed: how frequent the token is (logarithm of 1 + its count) and
        its position in the document (`partial_spearman`); besides how frequent the token is that follows (`partial_spearman_following`),
        which takes away a good part of what makes a place hard. Intervals come from documents drawn anew.
        """
        found = self._correlations.estimates()
        return {of: {kind: found[f"{of} {kind}"].to_dict() for kind in _pairs(of)} for of in self._of}


def _pairs(of: str) -> dict[str, Pair]:
    return {
        "spearman": Pair("steps", of),
        "pearson": Pair("steps", of, ranks=False),
        "partial_spearman": Pair("steps", of, ("frequency", "position")),
        "partial_spearman_following": Pair("steps", of, ("frequency", "position", "following")),
    }


def _place_starts(sizes: Sequence[int]) -> np.ndarray:
    """Return where bins of places in documents of these sizes begin."""
    ending = np.bincount(sizes)
    return bin_starts(np.arange(len(ending) - 1), len(sizes) - np.cumsum(ending)[:-1])
