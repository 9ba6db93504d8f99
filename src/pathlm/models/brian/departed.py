"""Tokens that have left a pool, and the rows that the pool's table goes on holding of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pathlm.models.brian.grouping import Pick

# Shapes: n tokens that have left, D width, P width of positions, G key/value heads, K head width


@dataclass(frozen=True)
class Departed:
    """Tokens that left together, after `steps` route steps."""

    place: Tensor
    """Their places (n,)"""
    h: Tensor
    """The hidden states (n, D) they left with"""
    p: Tensor
    """The positions (n, P) they left from"""
    steps: int
    last: int | None = None
    """The block that all of them visited last, where they are told apart by it: `by_last_block`"""


def by_last_block(left: Departed, at_n: Tensor) -> list[Departed]:
    """Tell tokens apart by the block (n,) that they visited last: what is made of them later depends on it."""
    found = at_n.unique().tolist()
    if len(found) == 1:
        return [replace(left, last=found[0])]
    mine = [(at_n == last).nonzero()[:, 0] for last in found]
    return [
        Departed(left.place[index], Pick.apply(left.h, index), left.p[index], left.steps, last)
        for last, index in zip(found, mine, strict=True)
    ]


def refreshed(pool: Any, blocks: list[Any], departed: list[Departed], step: int) -> tuple[Tensor, Tensor]:
    """Return the places (n,) of tokens that have left, and the keys and values of their rows at `step` (n, 2G, K), not yet turned.

    A row is made by the block in turn: from the one visited last on in order, and the last one for ever. That depends on the token alone,
    so that its rows are the same whoever is still in the pool.
    """
    by_block: dict[int, list[Departed]] = {}
    for left in departed:
        assert left.last is not None
        by_block.setdefault(min(left.last + 1 + step - left.steps, len(blocks) - 1), []).append(left)
    rows = []
    for number, group in sorted(by_block.items()):
        h = joined([left.h for left in group])
        if len(pool.adapters):
            h = h + pool.adapters[number](joined([left.p for left in group]))
        rows.append(blocks[number].remember(h))
    return joined([left.place for _, group in sorted(by_block.items()) for left in group]), joined(rows)


def joined(parts: list[Tensor]) -> Tensor:
    """Return the parts below each other; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
