"""What scoring reads: the graph, and the signals that are about to leave a node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pathlm.models.brillm.edges import Edges

# Shapes: N positions, D width of the signal, E rows (shared edge first)


@dataclass
class Graph:
    """Everything that scoring reads: which edges there are, their weights (out × in, so that a slab is one matrix) and biases."""

    edges: Edges
    weight_EDD: Tensor
    bias_ED: Tensor
    train_shared: bool = True
    row_gradients: bool = False
    """Whether gradients of weights and biases are sparse, the touched rows only; otherwise they are dense."""


class Arrivals(NamedTuple):
    """Signals that stand at a node and are about to leave it."""

    signal_ND: Tensor
    source_N: Tensor
    place_ND: Tensor
    """The positional vector that is added on the edge"""
