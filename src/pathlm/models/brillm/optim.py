"""How the optimizer treats the parameters of a BriLLM model."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from pathlm.config import OptimConfig


def param_groups(model: Any, optim: OptimConfig) -> list[dict[str, Any]]:
    """Return the parameter groups for AdamW: edges are updated row by row (`rows`), only edges' matrices decay.

    From here on the model gives edges sparse gradients, of the rows that a batch touches. Several processes exchange dense ones.
    """
    model.row_gradients = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    graph = model.graph
    others = [p for name, p in graph.named_parameters() if name not in ("weight", "bias")]
    return [
        {"params": [graph.weight], "weight_decay": optim.weight_decay, "rows": True},
        {"params": [graph.bias], "weight_decay": 0.0, "rows": True},
        {"params": others, "weight_decay": 0.0},
    ]
