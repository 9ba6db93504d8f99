"""One more token per row without gradients, in one compiled call: what decoding spends its time on."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pathlm.models import native
from pathlm.models.brillm.configuration import BrillmConfig
from pathlm.models.brillm.graph import Graph
from pathlm.models.brillm.memory import SignalMemory

# Shapes: B rows, V nodes, E rows of edges, D width of the signal, P trained positions


def knows(config: BrillmConfig) -> bool:
    """Say whether the compiled call knows this wiring: the published ones."""
    return config.context in ("pooled", "chain") and not config.normalise and not config.keep_initial


def possible(memory: SignalMemory, graph: Graph, token_BT: Tensor, attention_mask: Tensor | None) -> bool:
    """Say whether this is one more token of texts that have begun, and can go the short way."""
    last = memory.last()
    if torch.is_grad_enabled() or last is None or token_BT.shape[1] != 1 or not native.fits(graph.weight_EDD, graph.bias_ED, last[0]):
        return False
    if attention_mask is not None and (attention_mask.shape[1] != memory.get_seq_length() + 1 or not bool(attention_mask[:, -1].all())):
        return False
    return token_BT.shape[0] == last[0].shape[0] and not bool(last[3].any())


def advance(
    memory: SignalMemory, graph: Graph, config: BrillmConfig, token_B1: Tensor, position_weight: Tensor, *, released: bool
) -> Tensor:
    """Read one token per row into `memory`; return the energy (B, 1, V) of every next node. Touches one slab of edges per row."""
    from pathlm.models.brillm import kernels

    last = memory.last()
    assert last is not None
    state_BD, before_B, number_B, document_B = last
    token_B, number_B = token_B1[:, 0].contiguous(), number_B + 1
    signal_BD = torch.empty_like(state_BD)
    energy_BV = state_BD.new_empty(token_B.numel(), graph.edges.start_V1.numel() - 1)
    hold = config.trained_positions - 1 if config.beyond == "hold" else -1
    rule = (config.positions == "multiplied", hold, config.beyond == "continue", int(released))
    rate_J = _rates(0 if config.positions == "none" else config.signal_size)
    given = (token_B, before_B.contiguous(), number_B, state_BD.contiguous(), position_weight, graph.weight_EDD, graph.bias_ED)
    edges = (graph.edges.start_V1, graph.edges.key_E, rate_J, config.position_scale, rule)
    if token_B.numel() == 1:
        kernels.advance(
            0, 1, *(native.array(t) for t in (*given, *edges[:3])), *edges[3:], native.array(signal_BD), native.array(energy_BV)
        )
    else:
        native.in_parts(kernels.advance, torch.ones_like(token_B), *given, *edges, signal_BD, energy_BV)
    memory.write(signal_BD[:, None], token_B1, number_B[:, None], document_B[:, None])
    return energy_BV[:, None]


@lru_cache(maxsize=8)
def _rates(width: int) -> Tensor:
    return 10_000.0 ** (torch.arange(0, width, 2, dtype=torch.float64) / max(width, 1))
