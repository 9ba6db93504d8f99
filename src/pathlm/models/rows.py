"""Gradients of tables of which a step touches few rows, kept as the outer products they are sums of until the rows are updated.

A matrix-valued row that few positions touch has a gradient Σ_n left_n ⊗ right_n of low rank. To write it out costs more memory traffic than
everything else that is done with it; an optimizer that takes such gradients (`take_slabs`) makes each row's when it updates the row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pathlm.models import native

# Shapes: K slabs, N positions sorted by slab, D width, X rows held as matrices, O rows asked for


@dataclass(frozen=True)
class Slabs:
    """Stretches of rows of a table (E, D, D), and for every row as many outer products as its slab has positions."""

    row_K: Tensor
    """First row of each slab, rising"""
    many_K: Tensor
    """Rows of each slab"""
    begin_K1: Tensor
    """Slab k has the positions begin[k] … begin[k + 1]"""
    left_K1: Tensor
    """Where the left factors (rows, positions, D) of each slab begin"""
    left: Tensor
    right_ND: Tensor

    def lists(self) -> tuple[Tensor, ...]:
        """Return what the compiled loops take, in their order."""
        return self.row_K, self.many_K, self.begin_K1, self.left_K1, self.left, self.right_ND

    def cost(self) -> Tensor:
        """Return about how much work each slab is (K)."""
        return self.many_K * (4 + self.begin_K1.diff())

    def add_to(self, row_O: Tensor, out_ODD: Tensor, scale: float) -> None:
        """Add the gradients, times `scale`, to a list of matrices whose rows `row_O` rise and hold every row of every slab."""
        from pathlm.models import row_kernels

        native.in_parts(row_kernels.write_slabs, self.cost(), *self.lists(), scale, row_O, out_ODD.flatten(1))


class SlabGradient:
    """The gradient of a table: outer products of slabs times `scale`, and some rows' matrices times `factor`."""

    def __init__(self, slabs: Slabs, scale: float, extra_X: Tensor, extra_XDD: Tensor) -> None:
        self.slabs, self.scale, self.factor = slabs, scale, 1.0
        self.extra_X, self.extra_XDD = extra_X, extra_XDD
        place = (torch.searchsorted(slabs.row_K, extra_X, right=True) - 1).clamp(min=0)
        inside_X = (extra_X >= slabs.row_K[place]) & (extra_X < slabs.row_K[place] + slabs.many_K[place])
        self.outside_X = (~inside_X).nonzero()[:, 0]
        """Which of the extra rows lie in no slab"""

    def norm(self) -> Tensor:
        """Return the square root of the sum of all squares."""
        from pathlm.models import row_kernels

        square_K = self.slabs.row_K.new_zeros(self.slabs.row_K.numel(), dtype=torch.float64)
        extra_XW = (self.extra_XDD * self.factor).flatten(1)
        native.in_parts(
            row_kernels.square_slabs, self.slabs.cost(), *self.slabs.lists(), self.scale, self.extra_X, extra_XW, square_K
        )  # fmt: skip
        total = square_K.sum() + extra_XW[self.outside_X].double().square().sum()
        return total.sqrt().to(self.extra_XDD.dtype)

    def multiply(self, by: float) -> None:
        """Multiply the gradient by a number."""
        self.scale *= by
        self.factor *= by

    def values(self, row_O: Tensor) -> Tensor:
        """Return the gradients (O, D, D) of rows that rise and hold all touched ones."""
        out_ODD = self.extra_XDD.new_zeros(row_O.numel(), *self.extra_XDD.shape[1:])
        out_ODD.index_copy_(0, torch.searchsorted(row_O, self.extra_X), self.extra_XDD * self.factor)
        self.slabs.add_to(row_O, out_ODD, self.scale)
        return out_ODD

    def rows(self) -> Tensor:
        """Return all touched rows, rising."""
        many = self.slabs.many_K
        begin = many.cumsum(0) - many
        inside = torch.arange(int(many.sum())) + torch.repeat_interleave(self.slabs.row_K - begin, many)
        return torch.cat((self.extra_X[self.outside_X], inside)).sort().values

    @torch.no_grad()
    def update(self, table: Tensor, mean: Tensor, square: Tensor, step_R: Tensor, rates: tuple[float, ...]) -> None:
        """Take one step of AdamW with the touched rows of a table; `rates` are lr, decay, beta1, beta2, eps."""
        from pathlm.models import row_kernels

        whole = [t.view(t.shape[0], -1) for t in (table, mean, square)]
        extra_XW = self.extra_XDD.flatten(1)
        given = (self.scale, self.extra_X, extra_XW, self.factor, *whole, step_R, rates)
        native.in_parts(row_kernels.move_slabs, self.slabs.cost(), *self.slabs.lists(), *given)
        update_rows(self.extra_X[self.outside_X], extra_XW[self.outside_X], self.factor, (*whole, step_R), rates)  # type: ignore[arg-type]


def update_rows(
    row_K: Tensor, grad_KW: Tensor, scale: float, state: tuple[Tensor, Tensor, Tensor, Tensor], rates: tuple[float, ...]
) -> None:
    """Take one step of AdamW with some rows of a table; `state` is table, mean, square (R, W) and steps (R)."""
    from pathlm.models import row_kernels

    native.in_parts(row_kernels.move_rows, torch.ones_like(row_K), row_K, grad_KW, scale, *state, rates)


def take_slabs(table: Tensor) -> None:
    """Say that the optimizer of this table reads `pending(table)`: a model may then leave its gradient there instead of in `.grad`."""
    setattr(table, _TAKES, True)


def takes_slabs(table: Tensor) -> bool:
    """Say whether the table's optimizer takes gradients as outer products."""
    return getattr(table, _TAKES, False)


def pending(table: Tensor) -> SlabGradient | None:
    """Return the gradient that was left for a table's optimizer, None where there is none or it is in `.grad`."""
    return getattr(table, _PENDING, None)


def leave(table: Tensor, gradient: SlabGradient) -> Tensor | None:
    """Leave a gradient for the table's optimizer. A second one before the first is taken is returned, as sparse rows that autograd adds."""
    before = pending(table)
    if before is None and table.grad is None:
        setattr(table, _PENDING, gradient)
        return None
    if before is not None:
        forget(table)
        table.grad = as_sparse(before, table)
    return as_sparse(gradient, table)


def as_sparse(gradient: SlabGradient, table: Tensor) -> Tensor:
    """Write a gradient out, as rows that rise."""
    row_K = gradient.rows()
    return torch.sparse_coo_tensor(
        row_K[None], gradient.values(row_K), table.shape, is_coalesced=True, check_invariants=False
    )  # fmt: skip


def forget(table: Tensor) -> None:
    """Drop the gradient that was left for a table; its memory waits for the next one, since fresh memory costs more than the work in it."""
    gradient = pending(table)
    if gradient is not None:
        setattr(table, _ROOM, gradient.slabs.left)
        setattr(table, _PENDING, None)


def room(table: Tensor, numbers: int) -> Tensor:
    """Return memory for left factors, with anything in it: what the last gradient had, where that is enough."""
    kept: Any = getattr(table, _ROOM, None)
    setattr(table, _ROOM, None)
    if kept is None or kept.numel() < numbers or kept.dtype != table.dtype:
        kept = table.new_empty(math.ceil(numbers * 1.25), requires_grad=False)
    return kept


_TAKES, _PENDING, _ROOM = "_pathlm_takes_slabs", "_pathlm_slab_gradient", "_pathlm_slab_room"
