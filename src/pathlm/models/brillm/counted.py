"""Edges that begin where a bigram model ends: biases whose energies are what the counts of the training data say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathlm.models.brillm.edges import SHARED

# Shapes: E edges (of their own), V nodes, D width of the signal

SHARED_ENERGY = 2.0
"""Energy of a node over the shared edge, before training: the least of all."""
LEAST_GIVEN_UP = 0.5
"""Counts that are given up at least, so that nothing is impossible."""


def energies(key: np.ndarray, times: np.ndarray, nodes: int, *, min_count: int = 1) -> Tensor:
    """Return the energy (E,) at which each own edge stands for its bigram's probability, that of the shared edge being `SHARED_ENERGY`.

    `key` and `times` are all pairs and how often they came, as `edges.count` returns them. Probabilities are those of interpolated absolute
    discounting: every pair gives up a part of one count, and pairs that came less than `min_count` times give up all; what a node's pairs
    give up is divided evenly among all nodes. The part is n₁ ÷ (n₁ + 2 n₂), for n₁ pairs that came once and n₂ that came twice (Ney,
    Essen & Kneser 1994).
    """
    once, twice = int((times == 1).sum()), int((times == 2).sum())
    discount = once / max(once + 2 * twice, 1)
    all_source, kept = key // nodes, times >= min_count
    source, left = all_source[kept], times[kept] - discount
    given_up = np.bincount(all_source, weights=times, minlength=nodes) - np.bincount(source, weights=left, minlength=nodes)
    each = np.maximum(given_up, LEAST_GIVEN_UP) / nodes
    return torch.from_numpy(SHARED_ENERGY + np.log1p(left / each[source]))


@torch.no_grad()
def set_energies(graph: Any, key: np.ndarray, times: np.ndarray, *, min_count: int = 1) -> None:
    """Give all edges of `graph` biases whose outputs have these energies where the signal is 0: half of each one's numbers, drawn evenly.

    The directions are drawn anew for every edge, so that what arrives tells where it came from. Weights stay as they are.
    """
    nodes, width = graph.start.numel() - 1, graph.bias.shape[1]
    energy_E = energies(key, times, nodes, min_count=min_count).to(graph.bias)
    draw_ED = torch.rand_like(graph.bias[1:])
    # At least one number of each, so that there is a direction.
    draw_ED *= (draw_ED.roll(1, dims=1) < 0.5) | (draw_ED == draw_ED.amax(dim=1, keepdim=True))
    graph.bias[1:] = before_gelu(draw_ED * (energy_E / torch.linalg.vector_norm(draw_ED, dim=1))[:, None])
    graph.bias[SHARED] = before_gelu(graph.bias.new_full((width,), SHARED_ENERGY / math.sqrt(width)))


def before_gelu(y: Tensor) -> Tensor:
    """Return the x ≥ 0 with GELU(x) = y, for y ≥ 0."""
    # GELU is convex here, and x ≤ y + 0.17: Newton's steps from there come down to the root and never pass it.
    x = y + 0.17
    for _ in range(8):
        phi = 0.5 * torch.erfc(-x * math.sqrt(0.5))
        x -= (x * phi - y) / (phi + x * torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi)))
    return x
