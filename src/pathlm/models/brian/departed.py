"""Tokens that have left a pool, and the rows that the pool's table goes on holding of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pathlm.models.brian.grouping import Pick

# Shapes: n tokens that have left, D width, P width of positions, M pool blocks, G key/value heads, K head width


@dataclass(frozen=True)
class Departed:
    """Tokens that left together, after `steps` route steps."""

    place: Tensor
    """Their places (n,)"""
    h: Tensor
    """The hidden states (n, D) they left with"""
    p: Tensor
    """The positions (n, P) they left from"""
    at: Tensor
    """The blocks (n,) they visited last"""
    steps: int


def block_in_turn(last_n: Any, steps: int, step: int, blocks: int) -> Any:
    """Return the blocks that make the rows of tokens at `step` that left after `steps` from `last_n`: in order, the last one for ever.

    Takes and returns a tensor or an array. It depends on the token alone, so that its rows are the same whoever is still in the pool.
    """
    return (last_n + 1 + step - steps).clip(max=blocks - 1)


def refreshed(pool: Any, blocks: list[Any], departed: list[Departed], step: int) -> tuple[Tensor, Tensor]:
    """Return the places (n,) of all tokens that have left, and the keys and values of their rows at `step` (n, 2G, K), not yet turned."""
    block_n = torch.cat([block_in_turn(d.at, d.steps, step, len(blocks)) for d in departed])
    place_n, h_nD = torch.cat([d.place for d in departed]), torch.cat([d.h for d in departed])
    p_nP = torch.cat([d.p for d in departed]) if len(pool.adapters) else None
    places, rows = [], []
    for number in block_n.unique().tolist():
        mine = (block_n == number).nonzero()[:, 0]
        h = Pick.apply(h_nD, mine)
        places.append(place_n[mine])
        rows.append(blocks[number].remember(h if p_nP is None else h + pool.adapters[number](p_nP[mine])))
    return torch.cat(places), torch.cat(rows)
