"""Steps of a block whose gradients are written out by hand, because the automatic ones pass over memory several times more often."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Shapes: N tokens of all rows, B rows, T tokens, D width, H query heads, G key/value heads, K head width, F hidden width of the MLP,
# X any width


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
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight_D, scale)
        return (x * scale).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of `x` and of the weight."""
        x, weight_D, scale = ctx.saved_tensors
        return *_norm_backward(grads[0], x, weight_D, scale), None


class NormedLinear(torch.autograd.Function):
    """A linear layer of a normalised input that keeps the input only: the backward pass normalises it again."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, norm_D: Tensor, eps: float, weight_XD: Tensor, bias_X: Tensor | None) -> Tensor:
        """Return `linear(norm(x))` (N, X)."""
        scale_N1 = _scale(x_ND, eps)
        ctx.save_for_backward(x_ND, norm_D, scale_N1, weight_XD)
        ctx.biased = bias_X is not None
        return F.linear((x_ND * scale_N1).mul_(norm_D), weight_XD, bias_X)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the input, the norm's weight, the layer's weight and bias."""
        x_ND, norm_D, scale_N1, weight_XD = ctx.saved_tensors
        dweight_XD = grads[0].T @ (x_ND * scale_N1).mul_(norm_D)
        dx_ND, dnorm_D = _norm_backward(grads[0] @ weight_XD, x_ND, norm_D, scale_N1)
        return dx_ND, dnorm_D, None, dweight_XD, grads[0].sum(0) if ctx.biased else None


class NormedMlp(torch.autograd.Function):
    """A SwiGLU of a normalised input that keeps the input and the gates: what they gate is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, norm_D: Tensor, eps: float,
        in_XD: Tensor, in_bias_X: Tensor | None, out_DF: Tensor, out_bias_D: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Return `down(silu(gate) · up)` (N, D), with gate and up the halves of `gate_up(norm(x))`."""
        scale_N1 = _scale(x_ND, eps)
        normed_ND, width = (x_ND * scale_N1).mul_(norm_D), out_DF.shape[1]
        gate_NF = F.linear(normed_ND, in_XD[:width], None if in_bias_X is None else in_bias_X[:width])
        up_NF = F.linear(normed_ND, in_XD[width:], None if in_bias_X is None else in_bias_X[width:])
        ctx.save_for_backward(x_ND, norm_D, scale_N1, in_XD, in_bias_X, gate_NF, out_DF)
        ctx.out_biased = out_bias_D is not None
        return F.linear(up_NF.mul_(F.silu(gate_NF)), out_DF, out_bias_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the input, the norm's weight, and the weights and biases of both layers."""
        (grad_ND,) = grads
        x_ND, norm_D, scale_N1, in_XD, in_bias_X, gate_NF, out_DF = ctx.saved_tensors
        normed_ND, width = (x_ND * scale_N1).mul_(norm_D), out_DF.shape[1]
        up_NF = F.linear(normed_ND, in_XD[width:], None if in_bias_X is None else in_bias_X[width:])
        silu_NF = F.silu(gate_NF)
        dout_DF = grad_ND.T @ (silu_NF * up_NF)
        dproduct_NF = grad_ND @ out_DF
        dboth_NX = gate_NF.new_empty(len(gate_NF), 2 * width)
        dgate_NF, dup_NF = dboth_NX.chunk(2, dim=-1)
        torch.mul(dproduct_NF, silu_NF, out=dup_NF)
        del silu_NF
        dgate_NF.copy_(torch.ops.aten.silu_backward(dproduct_NF.mul_(up_NF), gate_NF))
        del dproduct_NF
        din_XD = dboth_NX.T @ normed_ND
        dx_ND, dnorm_D = _norm_backward(dboth_NX @ in_XD, x_ND, norm_D, scale_N1)
        din_X = None if in_bias_X is None else dboth_NX.sum(0)
        dout_D = grad_ND.sum(0) if ctx.out_biased else None
        return dx_ND, dnorm_D, None, din_XD, din_X, dout_DF, dout_D


def _scale(x: Tensor, eps: float) -> Tensor:
    """Return what divides `x` (..., D) by its root mean square (..., 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm_backward(grad: Tensor, x: Tensor, weight_D: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `x` and of the norm's weight."""
    product_ND = (grad * x).flatten(0, -2)
    slope = (product_ND @ weight_D).view_as(scale) * scale.pow(3) / -x.shape[-1]
    return (grad * weight_D).mul_(scale).addcmul_(x, slope), scale.flatten() @ product_ND


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
