"""How the next token is drawn from a model's logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Shapes: B rows, V vocabulary, K candidates

SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn: `temperature` 0 takes the likeliest; `top_k` and `top_p` keep the head of the distribution."""

    temperature: float | int = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that describe no distribution."""
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or positive")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: must be at least 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p}: must lie in (0, 1]")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative")

    def pick(self, logits_BV: Float[Tensor, "B V"], uniform_B: Float[Tensor, " B"] | None) -> Int[Tensor, " B"]:
        """Choose one token per row: the likeliest, or the one where the row's uniform number falls into the cumulative distribution."""
        if self.temperature == 0 or uniform_B is None:
            return logits_BV.argmax(dim=-1)
        logits_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
        # What is smaller than a float32 would be zero there, and zero divided by zero is no number.
        scaled_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / max(self.temperature, SMALLEST)
        keep = min(self.top_k or scaled_BV.shape[-1], scaled_BV.shape[-1])
        top_p = 1.0 if self.top_p is None else self.top_p
        if keep == scaled_BV.shape[-1] and top_p == 1.0:
            return _fall(scaled_BV.softmax(dim=-1), uniform_B)
        scaled_BK, token_BK = scaled_BV.topk(keep, dim=-1) if keep < scaled_BV.shape[-1] else scaled_BV.sort(dim=-1, descending=True)
        weight_BK = scaled_BK.softmax(dim=-1)
        if top_p < 1.0:
            weight_BK = weight_BK * ((weight_BK.cumsum(dim=-1) - weight_BK) < max(top_p, SMALLEST))
        return token_BK.gather(1, _fall(weight_BK, uniform_B)[:, None]).squeeze(1)


def _fall(weight_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """Return per row the first column whose cumulative weight exceeds the row's uniform share of the total."""
    cumulative_BK = weight_BK.double().cumsum(dim=-1)
    target_B1 = uniform_B[:, None] * cumulative_BK[:, -1:]
    return torch.searchsorted(cumulative_BK, target_B1, right=True).squeeze(1).clamp_(max=weight_BK.shape[-1] - 1)
