"""How the outputs of earlier edges are joined into the signal: running means, each with its own rule of how fast it forgets.

Every wiring is `S_m ← (1 − share_m) · S_m + share_m · output` and `E = Σ_m mix_m · S_m`, with shares that depend on tokens, positions and
parameters, never on a signal. So the state is M · D numbers, all shares are known before the walk begins, and the signal is exactly
`E = Σ_k weight_k · output_k` with the weights that `weights` returns: what each earlier step has in it can be told by adding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from pathlm.models.brillm.configuration import TIMESCALES, BrillmConfig
from pathlm.models.brillm.positions import Places, position_shares

# Shapes: B rows, T tokens, M running signals, D width of a signal (or 1, where all its numbers share alike), P trained positions, V nodes

NORM_EPS = 1e-6
"""What is added to the mean square of an output that is normalised."""
NEWEST, OLDEST = 0.9, 0.1
"""Shares of a new output with which learned means begin: from the first dimension, which forgets fast, to the last."""


def add_parameters(graph: nn.Module, config: BrillmConfig) -> None:
    """Give `graph` the parameters that its wiring learns, empty."""
    width, nodes, parts = config.signal_size, config.vocab_size, config.contexts
    if "pooled" in parts:
        graph.position_weight = nn.Parameter(torch.empty(config.trained_positions))
    if "decay" in parts:
        graph.decay = nn.Parameter(torch.empty(parts.count("decay"), width))
    if "node-decay" in parts:
        graph.node_decay = nn.Parameter(torch.empty(nodes))
    if "gated" in parts:
        graph.gate = nn.Parameter(torch.empty(nodes, width))
    if config.signals > 1:
        graph.mix = nn.Parameter(torch.empty(config.signals, width))


@torch.no_grad()
def initialise(graph: Any, config: BrillmConfig) -> None:
    """Let all positions weigh alike, all nodes halve the signal, dimensions forget at different rates, and several signals be averaged."""
    parts, width = config.contexts, config.signal_size
    if "pooled" in parts:
        init.ones_(graph.position_weight)
    if "decay" in parts:
        # All dimensions of all decays, one after the other: the first decay is the fastest.
        share = torch.linspace(NEWEST, OLDEST, parts.count("decay") * width)
        init.copy_(graph.decay, torch.logit(1 - share).view(-1, width))
    if "node-decay" in parts:
        init.zeros_(graph.node_decay)
    if "gated" in parts:
        init.copy_(graph.gate, torch.logit(torch.linspace(NEWEST, OLDEST, width)).expand(config.vocab_size, width))
    if config.signals > 1:
        init.constant_(graph.mix, 1 / config.signals)


def shares(graph: Any, token_BT: Tensor, places: Places, config: BrillmConfig) -> Tensor:
    """Return the share (B, T, M, D or 1) that what arrives at each token has in each running signal; 0 where nothing arrives."""
    along_BT = places.present_BT & ~places.starts_BT
    edge_BT = (places.number_BT - 1).clamp(min=0)
    found: list[Tensor] = []
    decays = iter(graph.decay) if "decay" in config.contexts else iter(())
    for name in config.contexts:
        if name == "pooled":
            # The first signal, where it is kept, is what comes before output 0.
            found.append(position_shares(edge_BT + int(config.keep_initial), graph.position_weight, config)[..., None])
            continue
        if name == "chain":
            rules = [graph.bias.new_ones(1)]
        elif name == "decay":
            rules = [torch.sigmoid(-next(decays))]
        elif name == "node-decay":
            rules = [torch.sigmoid(-graph.node_decay[token_BT])[..., None]]
        elif name == "gated":
            rules = [torch.sigmoid(F.embedding(token_BT, graph.gate))]
        else:
            rules = [graph.bias.new_full((1,), 1 / scale) for scale in config.timescales or TIMESCALES]
        # Without the first signal, there is nothing yet that output 0 could share with.
        alone_BT1 = ((edge_BT == 0) & (not config.keep_initial))[..., None]
        found += [torch.where(alone_BT1, 1.0, rule) for rule in rules]
    if len(found) == 1:
        return found[0][:, :, None] * along_BT[..., None, None]
    width = config.signal_size
    return torch.stack([share.expand(*token_BT.shape, width) for share in found], dim=2) * along_BT[..., None, None]


def entering(output: Tensor, config: BrillmConfig) -> Tensor:
    """Return what enters the signal of outputs (…, D): themselves, or normalised to a root mean square of 1."""
    return F.rms_norm(output, output.shape[-1:], eps=NORM_EPS) if config.normalise else output


def mixed(state_BMD: Tensor, graph: Any) -> Tensor:
    """Return the signal (B, D) of running signals: their sum with the learned weights."""
    return state_BMD[:, 0] if state_BMD.shape[1] == 1 else (state_BMD * graph.mix).sum(1)


def weights_of(graph: Any) -> Tensor:
    """Return the weights (M, D or 1) with which running signals are added: 1 for a single one."""
    return graph.mix if hasattr(graph, "mix") else graph.bias.new_ones(1, 1)


def weights(share_TMD: Tensor, mix_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Return with which weights the signal that leaves the last of T tokens is the sum of what entered it, and of what was before.

    `share_TMD` is one row of `shares`, with 1 where a text begins. The result is (T, D or 1), a weight for what entered at each token, and
    (M, D or 1) for each running signal before the first of them.
    """
    # What is left of each output after the tokens behind it have added theirs.
    left_SMD = torch.cat((1 - share_TMD, torch.ones_like(share_TMD[:1]))).flip(0).cumprod(0).flip(0) * mix_MD
    return (share_TMD * left_SMD[1:]).sum(1), left_SMD[0]
