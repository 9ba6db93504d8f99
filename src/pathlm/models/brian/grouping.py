"""Moving tokens into groups and back, and the gate that gives the router a gradient: steps whose gradients are written out by hand.

The automatic gradient of picking rows adds into zeros one by one; these know that no row is picked twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Shapes: N rows of a table, n single rows, C copies, X any width


class Arrange(torch.autograd.Function):
    """Rows (n, X), each `copies` times, in another order (copies · n, X). `inverse` undoes `order`."""

    @staticmethod
    def forward(ctx: Any, x_nX: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        """Return row `order[i] % n` at place i."""
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x_nX.index_select(0, order if copies == 1 else order % x_nX.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Put the gradients back and add up those of copies."""
        (inverse,) = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        return grad if ctx.copies == 1 else grad.unflatten(0, (ctx.copies, -1)).sum(0), None, None, None


class Pick(torch.autograd.Function):
    """Some different rows (n, X) of a table (N, X)."""

    @staticmethod
    def forward(ctx: Any, x_NX: Tensor, place_n: Tensor) -> Tensor:
        """Return the rows `place_n`."""
        ctx.save_for_backward(place_n)
        ctx.rows = x_NX.shape[0]
        return x_NX.index_select(0, place_n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Put the gradients back among zeros."""
        (place_n,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.rows, *grads[0].shape[1:]).index_copy_(0, place_n, grads[0]), None


def spread(x_nX: Tensor, place_n: Tensor, rows: int) -> Tensor:
    """Return a table (rows, X) with row i of `x_nX` at `place_n[i]`, zeros elsewhere."""
    return x_nX.new_zeros(rows, *x_nX.shape[1:]).index_copy(0, place_n, x_nX)


class UnitGate(torch.autograd.Function):
    """A gate whose value is exactly 1: `h_new` unchanged, and the gradient of a gate for the probability π of its block.

    The gradient of π is strength · ⟨∂L/∂h_new, h_new - h_old⟩, as for h_old + (1 + strength · (π - stopgrad(π))) · (h_new - h_old),
    except that the gradient of h passes the gate as if there were none.
    """

    @staticmethod
    def forward(ctx: Any, h_new: Tensor, h_old: Tensor, probability_n: Tensor, strength: float) -> Tensor:
        """Return `h_new` (n, D)."""
        ctx.save_for_backward(h_new, h_old)
        ctx.strength, ctx.dtype = strength, probability_n.dtype
        return h_new.view_as(h_new)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, None]:
        """Return the gradient of `h_new`, passed on, and of the probability."""
        h_new, h_old = ctx.saved_tensors
        slope_n = ((h_new - h_old) * grads[0]).sum(-1, dtype=ctx.dtype) * ctx.strength
        return grads[0], None, slope_n, None
