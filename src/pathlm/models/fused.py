"""Steps of a block whose gradients are written out by hand, because the automatic ones pass over memory several times more often."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Shapes: N tokens of all rows, B rows, T tokens, D width, H query heads, G key/value heads, K head width


def by_hand(x: Tensor) -> bool:
    """Whether the hand-written gradients are the faster ones: on the CPU, where neither a fused kernel nor a compiler does as well."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


class RootMeanSquare(torch.autograd.Function):
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Return the normalised `x` (..., D)."""
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        return (x * scale).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of `x` and of the weight."""
        (grad,) = grads
        x, weight_D, scale = ctx.saved_tensors
        product_ND = (grad * x).flatten(0, -2)
        slope = (product_ND @ weight_D).view_as(scale) * scale.pow(3) / -x.shape[-1]
        return (grad * weight_D).mul_(scale).addcmul_(x, slope), scale.flatten() @ product_ND, None


class SplitAndTurn(torch.autograd.Function):
    """Queries and keys, turned by their positions, and values, out of one projection (B, T, H + 2G, K)."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, T, K), keys and values (B, G, T, K)."""
        groups = (joined.shape[2] - heads) // 2
        turned, value = joined.split((heads + groups, groups), dim=2)
        turned = torch.addcmul(turned * cos, turned.roll(turned.shape[-1] // 2, -1), sin)
        ctx.save_for_backward(cos, sin)
        query, key = turned.split((heads, groups), dim=2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Write the three gradients into one, turned back."""
        cos, sin = ctx.saved_tensors
        query, key, value = (grad.transpose(1, 2) for grad in grads)
        heads, groups = query.shape[2], key.shape[2]
        result = query.new_empty(*query.shape[:2], heads + 2 * groups, query.shape[3])
        for part, start in ((query, 0), (key, heads)):
            place = result[:, :, start : start + part.shape[2]]
            half = part.shape[-1] // 2
            torch.mul(part, cos, out=place)
            place[..., :half].addcmul_(part[..., half:], sin[..., half:])
            place[..., half:].addcmul_(part[..., :half], sin[..., :half])
        result[:, :, heads + groups :] = value
        return result, None, None, None
