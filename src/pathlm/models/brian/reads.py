"""How much the pool reads of codes and of rows: counted in evaluation, from the same queries and keys, by a softmax written out."""

from __future__ import annotations

import torch
from torch import Tensor

from pathlm.models.brian.configuration import BrianConfig

# Shapes: B rows, H heads, G key/value heads, Q queries, S codes, S' rows, W width of a query

COUNTED = 256
"""Queries of a batch's first row that are counted in each call."""


class Reads:
    """Sums over what tokens read, of the first row of each batch."""

    def __init__(self, config: BrianConfig) -> None:
        self.sinks = max(config.code_sinks, 1)
        self.window = config.code_window
        self._sums: dict[str, Tensor] = {}
        self._heads = 0

    @torch.no_grad()
    def count(self, query_BHQW: Tensor, keys_BGSW: Tensor, mask: Tensor | None, *, codes: int) -> None:
        """Count what queries read of keys of which the first `codes` are those of codes."""
        query, keys = query_BHQW[0, :, :COUNTED], keys_BGSW[0]
        seen = torch.ones(query_BHQW.shape[2], keys.shape[1], dtype=torch.bool, device=query.device).tril() if mask is None else mask[0, 0]
        seen = seen[:COUNTED]
        asks = (query != 0).any(-1).all(0)  # zeros stand for tokens that are not there
        score = query @ keys.repeat_interleave(len(query) // len(keys), 0).mT * query.shape[-1] ** -0.5
        if seen.dtype == torch.bool:
            visible, score = seen, score.masked_fill(~seen, -torch.inf)
        else:
            visible, score = ~seen.isneginf(), score + seen
        weight, visible = score.softmax(-1)[:, asks].double(), visible[asks, :codes]
        of_codes = weight[..., :codes]
        mass = of_codes.sum(-1)
        first = of_codes[..., : self.sinks].sum(-1)
        share = of_codes / mass[..., None].clamp(min=1e-12)
        spread = (-(share * share.clamp(min=1e-12).log()).sum(-1)).exp() / visible.sum(-1).clamp(min=1)
        some = visible.any(-1).expand_as(mass)
        found = {"mass": mass.sum(), "sinks": first.sum(), "spread": spread[some].sum(), "some": some.sum().double()}
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._heads += mass.numel()

    def metrics(self) -> dict[str, Tensor]:
        """Return the share of attention that goes to codes, the part of it that goes to the first ones, and how many are used.

        `memory/utilisation` is the number of codes over which a head spreads what it reads of codes (e to the entropy), as a share of
        those that it sees; `memory/local_ratio` the share that goes to rows divided by that of codes.
        """
        if not self._heads:
            return {}
        mass = self._sums["mass"] / self._heads
        sinks = self._sums["sinks"] / self._sums["mass"].clamp(min=1e-12)
        found = {
            "memory/code_mass": mass,
            "memory/sink_share": sinks,
            "memory/window_share": 1 - sinks,
            "memory/utilisation": self._sums["spread"] / self._sums["some"].clamp(min=1),
            "memory/local_ratio": (1 - mass) / mass.clamp(min=1e-12),
        }
        return {name: value.float() for name, value in found.items()}
