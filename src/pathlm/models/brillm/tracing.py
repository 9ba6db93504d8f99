"""The path of a signal: what a traced forward pass records, and the `Path` records made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pathlm.models.brillm.positions import Places
from pathlm.path import Path, Step

# Shapes: B rows, T tokens, K rivals and the winner, V nodes, D width of the signal

KEPT = 8
"""Nodes recorded per step: the most energetic ones."""


@dataclass(frozen=True)
class Trace:
    """Which edges the signal took, and where else it would have arrived how strongly."""

    input_ids: Tensor
    """(B, T)"""
    present: Tensor
    """(B, T), False for padding"""
    starts: Tensor
    """(B, T), True for the first token of a text"""
    row_BT: Tensor
    """Row of the edge that led to each token, 0 for the shared one and where a text begins"""
    signal_BTD: Tensor
    """The signal as it leaves each token"""
    node_BTK: Tensor
    """Nodes at which the signal would arrive with the most energy after each token, best first, ties to the lowest number"""
    energy_BTK: Tensor
    """Their energies"""
    arrival_BT: Tensor
    """Energy with which the signal arrived at each token; NaN where a text begins and where it came from an earlier pass"""
    log_total_BT: Tensor
    """Logarithm of the sum of exp(energy) over all nodes"""

    @classmethod
    def of(cls, token_BT: Tensor, places: Places, row_BT: Tensor, signal_BTD: Tensor, energy_BTV: Tensor | None) -> Trace:
        """Record a pass whose energies (B, T, V) are at hand."""
        if energy_BTV is None:
            raise ValueError("trace=True needs the energies of all nodes; leave skip_logits out")
        energy_BTV = energy_BTV.detach()
        # A stable sort, as the many nodes that share an edge have exactly one energy.
        best = energy_BTV.sort(dim=-1, descending=True, stable=True)
        kept = min(KEPT, energy_BTV.shape[-1])
        column_BT = torch.where(places.present_BT, torch.arange(token_BT.shape[1], device=token_BT.device), -1).cummax(dim=1).values
        from_BT = torch.cat((torch.full_like(column_BT[:, :1], -1), column_BT[:, :-1]), dim=1)
        row_B1 = torch.arange(token_BT.shape[0], device=token_BT.device)[:, None]
        arrival_BT = energy_BTV[row_B1, from_BT.clamp(min=0), token_BT]
        arrival_BT = arrival_BT.masked_fill(places.starts_BT | ~places.present_BT | (from_BT < 0), torch.nan)
        return cls(
            token_BT, places.present_BT, places.starts_BT, row_BT, signal_BTD.detach(),
            best.indices[..., :kept].clone(), best.values[..., :kept].clone(), arrival_BT, energy_BTV.logsumexp(-1),
        )  # fmt: skip


def paths(output: Any, tokenizer: Any) -> list[Path]:
    """Return one path per text, row by row: a step per token. `output` is a forward pass with `trace=True`.

    A step's score is the energy with which the signal arrived at its token; the first token's is 0, as no edge leads there. Its rivals are
    the most energetic other nodes with their energies, so that the margin is the score minus the first rival's.
    """
    trace: Trace | None = output.trace
    if trace is None:
        raise ValueError("trace=None: run the model with trace=True to have paths")
    names: dict[int, str] = {}

    def name(node: int) -> str:
        if node not in names:
            names[node] = tokenizer.decode([node])
        return names[node]

    found = []
    for row in range(trace.input_ids.shape[0]):
        columns = trace.present[row].nonzero().flatten().tolist()
        steps: list[Step] = []
        ids: list[int] = []
        before = -1
        for t in columns:
            node = int(trace.input_ids[row, t])
            if bool(trace.starts[row, t]) and steps:
                found.append(Path("brillm", tokenizer.decode(ids), tuple(steps)))
                steps, ids = [], []
            if bool(trace.starts[row, t]) or before < 0:
                steps.append(Step(name(node), 0.0))
            else:
                steps.append(_step(trace, row, before, t, node, name))
            ids.append(node)
            before = t
        if steps:
            found.append(Path("brillm", tokenizer.decode(ids), tuple(steps)))
    return found


def _step(trace: Trace, row: int, before: int, t: int, node: int, name: Any) -> Step:
    """Return the step to `node` at column t from the token at column `before`."""
    others = zip(trace.node_BTK[row, before].tolist(), trace.energy_BTK[row, before].tolist(), strict=True)
    rivals = tuple((name(other), energy) for other, energy in others if other != node)
    return Step(name(node), float(trace.arrival_BT[row, t]), rivals)
