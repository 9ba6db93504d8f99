"""Where the places of the pool lie: one vector for IN, for every block and for OUT."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

IN = 0
"""Index of the place where every token starts. Block b of the pool, counted from 0, is at 1 + b; OUT comes last."""


def position_table(kind: str, blocks: int, width: int) -> Float[Tensor, "places width"]:
    """Return unit vectors (blocks + 2, width) in float32: IN, B1 … Bm, OUT.

    `arc` spreads them over half a circle, so that IN and OUT are as far apart as can be; `circle` over a whole one, where OUT is IN's
    neighbour; both are read at the frequencies 1, 2, 3 …. `random` draws them once and for all; `none` has no vectors.
    """
    places = blocks + 2
    with torch.device("cpu"):
        if kind == "none":
            return torch.zeros(places, 0)
        if kind == "random":
            table = torch.randn(places, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        else:
            turn = math.pi / (blocks + 1) if kind == "arc" else 2 * math.pi / places
            angle = torch.arange(places, dtype=torch.float64)[:, None] * turn * torch.arange(1, width // 2 + 1, dtype=torch.float64)
            table = torch.cat((angle.cos(), angle.sin()), dim=-1)
        return (table / table.norm(dim=-1, keepdim=True)).float()
