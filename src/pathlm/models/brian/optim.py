"""How the optimizer treats the parameters of a BRIAN model."""

from __future__ import annotations

from typing import Any

from torch import nn

from pathlm.config import OptimConfig


def param_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Return the parameter groups for AdamW: matrices decay, norms and biases do not. Tied parameters appear once."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, others = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    return [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
