"""AdamW, also for tables of which a step touches few rows, and its learning rate, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pathlm.config import OptimConfig
from pathlm.models import native, rows

# Shapes: R rows of a table, K rows with a gradient

FUSED_DEVICES = ("cuda", "cpu", "xpu", "mps")
AT_ONCE = 2**22
"""Numbers of a table that are updated at a time, at most."""


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0) in a run of `steps`.

    Warm-up is linear and reaches the peak at its last step. After it, `cosine` falls to `final_lr_share` of the peak at the last step,
    `wsd` stays at the peak and falls linearly over its last `decay_steps`, and `constant` stays.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    low = optim.final_lr_share
    if optim.schedule == "cosine":
        done = min((step - optim.warmup_steps + 1) / max(steps - optim.warmup_steps, 1), 1.0)
        return optim.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))
    if optim.schedule == "wsd":
        done = min(max((step - (steps - optim.decay_steps) + 1) / optim.decay_steps, 0.0), 1.0)
        return optim.lr * (1 - (1 - low) * done)
    return optim.lr


def adamw(groups: Iterable[dict[str, Any]], optim: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW over a family's parameter groups, fused where the parameters' device has a fused kernel.

    A group may carry `lr_scale`, a constant that multiplies the schedule's learning rate, and `rows`: its parameters are tables whose rows
    are updated by `RowAdamW`, each only in the steps that touch it.
    """
    groups = [{"lr_scale": 1.0, **group} for group in groups]
    devices = {p.device.type for group in groups for p in group["params"]}
    kind = RowAdamW if any(group.get("rows") for group in groups) else torch.optim.AdamW
    return kind(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=devices <= set(FUSED_DEVICES))


class RowAdamW(torch.optim.AdamW):
    """AdamW whose groups with `rows` are lazy: a row lives in steps of its own.

    Only rows whose gradient holds a number that is not 0 move, decay, and age their moments, and a row's bias corrections count its own
    steps. So a row becomes what `torch.optim.AdamW` would make of it, had it seen the steps that touch the row and no others; a single
    gradient moves a weight by at most `lr`, once, whenever it comes. Gradients may be sparse in the first dimension, or dense.
    Gradients of matrices may also be left as outer products (`pathlm.models.rows`), of which each row's is made when the row is updated.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the tables of one with `rows` may from now on leave their gradients as outer products."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"] if param_group.get("rows") else ():
            rows.take_slabs(p)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        super().zero_grad(set_to_none)
        for _, p in self._tables():
            rows.forget(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        tables = [(group, p, p.grad) for group, p in self._tables() if p.grad is not None]
        for _, p, _ in tables:
            p.grad = None  # not for the dense update
        loss = super().step(closure)
        for group, p, grad in tables:
            p.grad = grad
            self._update(group, p, grad)
        for group, p in self._tables():
            if (found := rows.pending(p)) is not None:
                state = self._state(p)
                found.update(p, state["exp_avg"], state["exp_avg_sq"], state["step"], _rates(group))
        return loss

    def _tables(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(group, p) for group in self.param_groups if group.get("rows") for p in group["params"]]

    def _state(self, table: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[table]
        if not state:
            state["step"] = torch.zeros(table.shape[0], dtype=torch.float32, device=table.device)  # exact up to 16 million steps of a row
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
        return state

    def _update(self, group: dict[str, Any], table: Tensor, grad: Tensor) -> None:
        state = self._state(table)
        row_K, grad = touched(grad)
        if native.fits(table, grad, state["exp_avg"], state["exp_avg_sq"]):
            whole = [t.view(t.shape[0], -1) for t in (table, state["exp_avg"], state["exp_avg_sq"])]
            rows.update_rows(row_K, grad.flatten(1), 1.0, (*whole, state["step"]), _rates(group))  # type: ignore[arg-type]
            return
        at_once = max(1, AT_ONCE // max(grad[0].numel(), 1)) if row_K.numel() else 1
        for row, part in zip(row_K.split(at_once), grad.split(at_once), strict=True):
            moved = part.flatten(1).any(dim=1)
            if not moved.all():
                row, part = row[moved], part[moved]
            _update_rows(table, state, row, part, group)


def _rates(group: dict[str, Any]) -> tuple[float, ...]:
    return tuple(float(x) for x in (group["lr"], group["weight_decay"], *group["betas"], group["eps"]))


def _update_rows(table: Tensor, state: dict[str, Tensor], row_K: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
    """Take one step of AdamW with some rows of a table."""
    beta1, beta2 = group["betas"]
    step_K = state["step"][row_K] + 1
    mean = state["exp_avg"][row_K].lerp_(grad, 1 - beta1)
    square = state["exp_avg_sq"][row_K].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    for name, value in (("step", step_K), ("exp_avg", mean), ("exp_avg_sq", square)):
        state[name].index_copy_(0, row_K, value)
    shape = (-1,) + (1,) * (table.ndim - 1)
    age = step_K.double().view(shape)
    size = (group["lr"] / (1 - beta1**age)).to(table.dtype)
    spread = square.sqrt_().div_((1 - beta2**age).sqrt().to(table.dtype)).add_(group["eps"])
    weight = table[row_K].mul_(1 - group["lr"] * group["weight_decay"])
    table.index_copy_(0, row_K, weight.sub_(mean.mul_(size).div_(spread)))


def settled(grad: Tensor) -> Tensor:
    """Return a sparse gradient in which each row comes once; a sum of several micro-batches may name rows more than once."""
    row_K = grad._indices()[0]
    # Autograd forgets that its rows rise; to look is cheaper than to sort and copy.
    return grad if bool((row_K[1:] > row_K[:-1]).all()) else grad.coalesce()


def touched(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows (K,) of a table that its gradient names, and their gradients (K, …). A dense one names those that are not 0."""
    if grad.is_sparse:
        grad = settled(grad)
        return grad._indices()[0], grad._values()
    row_K = grad.flatten(1).any(dim=1).nonzero()[:, 0]
    return row_K, grad[row_K]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the schedule's learning rate times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def first_difference(old: Callable[[int], Any], new: Callable[[int], Any], *, steps: int) -> int | None:
    """Return the first step below `steps` at which two pure functions of the step disagree, or None.

    A run may be prolonged exactly when its learning rates and its curriculum so far are those that the longer run would have used.
    """
    return next((step for step in range(steps) if old(step) != new(step)), None)
