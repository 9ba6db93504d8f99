"""AdamW and its learning rate, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pathlm.config import OptimConfig

FUSED_DEVICES = ("cuda", "cpu", "xpu", "mps")


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

    A group may carry `lr_scale`, a constant that multiplies the schedule's learning rate.
    """
    groups = [{"lr_scale": 1.0, **group} for group in groups]
    devices = {p.device.type for group in groups for p in group["params"]}
    return torch.optim.AdamW(
        groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=devices <= set(FUSED_DEVICES)
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the schedule's learning rate times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def first_difference(old: Callable[[int], Any], new: Callable[[int], Any], *, steps: int) -> int | None:
    """Return the first step below `steps` at which two pure functions of the step disagree, or None.

    A run may be prolonged exactly when its learning rates and its curriculum so far are those that the longer run would have used.
    """
    return next((step for step in range(steps) if old(step) != new(step)), None)
