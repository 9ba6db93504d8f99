"""What each new token sees: the tokens of its document up to itself, all of them, the newest, or the first and the newest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pathlm.models.layers import causal_mask

# Shapes: B rows (1 where all are alike), T new tokens, S tokens in all, C columns of a memory


@dataclass(frozen=True)
class Sight:
    """Which of S tokens each of the last T sees."""

    tokens: int
    past: int
    device: torch.device
    mask: Tensor | None
    """(B, 1, T, S); None where tokens see all before them: then no table of all of them is made that a window does not need"""

    @classmethod
    def of(cls, tokens: int, past: int, segment_BS: Tensor | None, device: torch.device) -> Sight:
        """Return what tokens see whose documents have these numbers (B, S), -1 for padding; None where a row is one document."""
        return cls(tokens, past, device, None if segment_BS is None else causal_mask(tokens, segment_BS))

    def positions(self) -> Tensor:
        """Return each new token's position (B, T): the number of tokens before it that it sees."""
        if self.mask is None:
            return torch.arange(self.past, self.past + self.tokens, device=self.device)[None]
        return self.mask[:, 0].sum(-1) - 1

    def last(self, tokens: int) -> Sight:
        """Return what the last `tokens` of these see."""
        if tokens >= self.tokens:
            return self
        past = self.past + self.tokens - tokens
        return Sight(tokens, past, self.device, None if self.mask is None else self.mask[:, :, -tokens:])

    def within(self, window: int, sinks: int = 0, slots: Tensor | None = None) -> Tensor | None:
        """Return which tokens (B, 1, T, C) are seen in a window over the newest and over the first ones; a window of 0 is over all.

        `slots` (C,) are the tokens that are still remembered, None for all S. None is returned where everybody sees all before it and no
        mask is needed to say so: all S tokens are new, or one is.
        """
        if self.mask is None and not window:
            if not self.past or self.tokens == 1:
                return None
            window = self.past + self.tokens
        if not window:
            return self.mask
        if self.mask is None:
            now = torch.arange(self.past, self.past + self.tokens, device=self.device)[:, None]
            slot = torch.arange(self.past + self.tokens, device=self.device) if slots is None else slots
            return ((slot <= now) & ((now - slot < window) | (slot < sinks)))[None, None]
        order = self.mask.cumsum(-1)
        seen = self.mask & ((order[..., -1:] - order < window) | (order <= sinks))
        return seen if slots is None else seen[..., slots]


def needed(past: int, segment_BS: Tensor | None, slots: Tensor, *, window: int, sinks: int) -> Tensor:
    """Return which of the tokens in `slots` (C,) later tokens may still see, as their index among the slots.

    Documents come one after the other: one that has ended in every row is never seen again.
    """
    if segment_BS is None:
        return ((slots < sinks) | (slots > past - window)).nonzero()[:, 0]
    segment_BP = segment_BS[:, :past]
    place = torch.arange(past, device=segment_BS.device)
    last_B = torch.where(segment_BP >= 0, place, 0).amax(-1)
    same = segment_BP == segment_BP.gather(1, last_B[:, None])
    order = same.cumsum(-1)
    seen = same & ((order <= sinks) | (order > order[:, -1:] + 1 - window))
    return seen.any(0)[slots].nonzero()[:, 0]
