"""The path of a signal: what a traced forward pass records, and the `Path` records made of it.

What arrives at a node before GELU is `W E + b + PE`, and the signal `E` is a sum of earlier outputs with known weights: so it is a sum of
what each earlier step sent there. With GELU's factor Φ(z) of the whole held, the node's energy is a sum over the same terms, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pathlm.models.brillm import wirings
from pathlm.models.brillm.edges import SHARED
from pathlm.models.brillm.graph import Graph
from pathlm.models.brillm.positions import Places
from pathlm.models.tokens import token_text
from pathlm.path import Path, Step

# Shapes: B rows, T tokens, K nodes that are compared, P parts of a signal, V nodes, D width of the signal,
# M running signals

KEPT = 8
"""Nodes recorded per step: the most energetic ones."""
NEAR = 32
"""Steps whose parts stand in a path by themselves; what came before them is one part."""


class Walk(NamedTuple):
    """What the signals of some rows did on their way along a text."""

    places: Places
    row_BT: Tensor
    """Row of the edge that led to each token, 0 for the shared one and where a text begins"""
    signal_BTD: Tensor
    """The signal as it leaves each token"""
    outputs: list[Tensor]
    """What entered the signal at each token over its edge, T times (B, D); anything where a text begins"""
    first_BTD: Tensor
    """The signal that leaves each token if a text begins there"""
    share_BTMD: Tensor
    """The share (D or 1 numbers) that it has in each of the running signals that leave; 0 where nothing did"""
    before_BMD: Tensor
    """The running signals before the first of these tokens"""
    mix_MD: Tensor
    """The weights (D or 1 numbers) with which the running signals are added"""


@dataclass(frozen=True)
class Trace:
    """Which edges the signal took, where else it would have arrived how strongly, and what it was the sum of."""

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
    """Nodes at which the signal would arrive with the most energy after each token, best first, ties to the lowest number. Of all nodes
    that share an edge, and so their energy, only the first is here."""
    many_BTK: Tensor
    """How many nodes each of them stands for; 0 where there are no more"""
    energy_BTK: Tensor
    """Their energies"""
    arrival_BT: Tensor
    """Energy with which the signal arrived at each token; NaN where a text begins and where it came from an earlier pass"""
    log_total_BT: Tensor
    """Logarithm of the sum of exp(energy) over all nodes"""
    output_BTD: Tensor
    """What each token added to the signal: what arrived there, as it enters, or the first signal of a text"""
    gain_BTMD: Tensor
    """With which weight: `running ← (1 − gain) · running + gain · output`; 1 where a text begins, 0 at padding"""
    before_BMD: Tensor
    """The running signals before the first of these tokens; zeros where there were none"""
    mix_MD: Tensor
    """With which weights the running signals are the signal"""
    place_BTD: Tensor
    """The positional vector that is added on every edge that leaves each token"""
    next_BV: Tensor
    """Energy of every node after the newest token"""
    graph: Graph
    """The edges that the signal takes"""

    def row(self, number: int) -> Trace:
        """Return the trace of one row."""
        kept = {f.name: getattr(self, f.name) for f in fields(self)}
        by_row: dict[str, Any] = {name: value[number : number + 1] for name, value in kept.items() if name not in ("mix_MD", "graph")}
        return replace(self, **by_row)

    def after(self, earlier: Trace) -> Trace:
        """Return the trace of a text whose beginning another pass has read."""
        continued_BT = self.arrival_BT.isnan() & self.present & ~self.starts
        arrival_BT = torch.where(continued_BT, earlier.next_BV.gather(1, self.input_ids), self.arrival_BT)
        mine = replace(self, arrival_BT=arrival_BT)
        by_token = (f.name for f in fields(self) if f.name not in ("before_BMD", "next_BV", "mix_MD", "graph"))
        joined: dict[str, Any] = {name: torch.cat((getattr(earlier, name), getattr(mine, name)), dim=1) for name in by_token}
        return replace(self, before_BMD=earlier.before_BMD, **joined)

    @classmethod
    def of(cls, graph: Graph, token_BT: Tensor, walk: Walk, place_BTD: Tensor, energy_BTV: Tensor | None) -> Trace:
        """Record a pass whose energies (B, T, V) are at hand."""
        if energy_BTV is None:
            raise ValueError("trace=True needs the energies of all nodes; leave skip_logits out")
        energy_BTV, places = energy_BTV.detach(), walk.places
        best = [_best(graph, *row) for row in zip(token_BT, energy_BTV, strict=True)]
        node_BTK, many_BTK, energy_BTK = (torch.stack(found) for found in zip(*best, strict=True))
        column_BT = torch.where(places.present_BT, torch.arange(token_BT.shape[1], device=token_BT.device), -1).cummax(dim=1).values
        from_BT = torch.cat((torch.full_like(column_BT[:, :1], -1), column_BT[:, :-1]), dim=1)
        row_B1 = torch.arange(token_BT.shape[0], device=token_BT.device)[:, None]
        arrival_BT = energy_BTV[row_B1, from_BT.clamp(min=0), token_BT]
        arrival_BT = arrival_BT.masked_fill(places.starts_BT | ~places.present_BT | (from_BT < 0), torch.nan)
        output_BTD = torch.where(places.starts_BT[..., None], walk.first_BTD, torch.stack(walk.outputs, dim=1)).detach()
        gain_BTMD = torch.where(places.starts_BT[..., None, None], 1.0, walk.share_BTMD).detach()
        return cls(
            token_BT, places.present_BT, places.starts_BT, walk.row_BT, walk.signal_BTD.detach(), node_BTK, many_BTK, energy_BTK,
            arrival_BT, energy_BTV.logsumexp(-1), output_BTD, gain_BTMD, walk.before_BMD.detach(), walk.mix_MD.detach(),
            place_BTD, energy_BTV[row_B1[:, 0], column_BT[:, -1].clamp(min=0)].clone(), graph,
        )  # fmt: skip


def _best(graph: Graph, token_T: Tensor, energy_TV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the most energetic nodes after each token of one row, how many nodes each stands for, and their energies (T, K)."""
    nodes = energy_TV.shape[1]
    target_TV = torch.arange(nodes, device=token_T.device).expand(len(token_T), nodes)
    # A node that decoding does not offer is not among those that share, either.
    shares_TV = (graph.edges.lookup(token_T[:, None].expand_as(target_TV), target_TV) == SHARED) & (energy_TV > -torch.inf)
    many_T = shares_TV.sum(1)
    first_T = shares_TV.int().argmax(1)
    others_TV = shares_TV.scatter(1, first_T[:, None], False)
    best = energy_TV.masked_fill(others_TV, -torch.inf).sort(dim=1, descending=True, stable=True)
    node_TK, energy_TK = best.indices[:, :KEPT].clone(), best.values[:, :KEPT].clone()
    stands_TK = torch.where((node_TK == first_T[:, None]) & (many_T > 0)[:, None], many_T[:, None], 1)
    return node_TK, stands_TK * (energy_TK > -torch.inf), energy_TK


class Parts(NamedTuple):
    """What a signal brings to some nodes, by where it comes from; in float64."""

    column_P: list[int | str]
    """The token whose output each part is of; `"earlier"` for what an earlier pass read, and at the end `"bias"` and `"position"`"""
    term_KPD: Tensor
    """Their sum over P is what arrives at each node before GELU"""
    energy_KP: Tensor
    """Their sum over P is each node's energy"""


def parts(trace: Trace, row: int, column: int, node_K: Sequence[int]) -> Parts:
    """Take apart what the signal that leaves a token would bring to some nodes: a term for every earlier step that still is part of it.

    The energy ‖y‖ of y = z Φ(z) is Σ z · (Φ(z) y / ‖y‖): linear in the terms of z, where the factor in brackets is that of their sum.
    """
    graph, many = trace.graph, column + 1
    weight_TD, left_MD = wirings.weights(trace.gain_BTMD[row, :many].to(torch.float64), trace.mix_MD.to(torch.float64))
    kept = weight_TD.any(dim=1).nonzero().flatten()
    sent_PD = weight_TD[kept] * trace.output_BTD[row, kept].to(torch.float64)
    column_P: list[int | str] = kept.tolist()
    if bool(left_MD.any()):
        sent_PD = torch.cat((sent_PD, (left_MD * trace.before_BMD[row].to(torch.float64)).sum(0, keepdim=True)))
        column_P.append("earlier")
    target_K = torch.as_tensor(node_K, device=trace.input_ids.device)
    edge_K = graph.edges.lookup(trace.input_ids[row, column].expand_as(target_K), target_K)
    weight_KDD, bias_KD = graph.weight_EDD[edge_K].detach().to(torch.float64), graph.bias_ED[edge_K].detach().to(torch.float64)
    place_KD = trace.place_BTD[row, column].to(torch.float64).expand_as(bias_KD)
    term_KPD = torch.cat((torch.einsum("koi,pi->kpo", weight_KDD, sent_PD), bias_KD[:, None], place_KD[:, None]), dim=1)
    z_KD = term_KPD.sum(1)
    factor_KD = torch.special.ndtr(z_KD)
    y_KD = z_KD * factor_KD
    energy_K = torch.linalg.vector_norm(y_KD, dim=1)
    along_KD = torch.where(energy_K[:, None] > 0, factor_KD * y_KD / energy_K[:, None], 0.0)
    return Parts([*column_P, "bias", "position"], term_KPD, torch.einsum("kpd,kd->kp", term_KPD, along_KD))


def paths(output: Any, tokenizer: Any, *, newest: int | None = None) -> list[Path]:
    """Return one path per text, row by row: a step per token. `output` is a forward pass with `trace=True`.

    With `newest` only a text's last so many steps are told, and the path is named after their tokens.

    A step's score is the energy with which the signal arrived at its token; the first token's is 0, as no edge leads there. Its rivals are
    the most energetic other nodes with their energies, so that the margin is the score minus the first rival's; its parts are what each
    earlier step has in that energy, and those of the rivals in theirs.
    """
    trace: Trace | None = output.trace
    if trace is None:
        raise ValueError("trace=None: run the model with trace=True to have paths")
    names: dict[int, str] = {}

    def name(node: int) -> str:
        if node not in names:
            names[node] = token_text(tokenizer, node)
        return names[node]

    found = []
    for row in range(trace.input_ids.shape[0]):
        columns: list[int] = []
        starts = trace.starts[row].tolist()  # at once: to ask a tensor place by place costs as much as the rest
        for t in trace.present[row].nonzero().flatten().tolist():
            if starts[t] and columns:
                found.append(_path(trace, row, columns, name, tokenizer, newest))
                columns = []
            columns.append(t)
        if columns:
            found.append(_path(trace, row, columns, name, tokenizer, newest))
    return found


def _path(trace: Trace, row: int, columns: list[int], name: Callable[[int], str], tokenizer: Any, newest: int | None) -> Path:
    """Return the path of one text, whose tokens are in these columns, or its last steps."""
    first = 0 if newest is None else max(len(columns) - newest, 0)
    ids = trace.input_ids[row, columns[first:]].tolist()
    steps = [] if first else [Step(name(ids[0]), 0.0)]
    # The part of a column is called after its step; that of a text's first token is its first signal.
    starts = trace.starts[row].tolist()
    called = {t: "signal" if starts[t] else f"step:{place}" for place, t in enumerate(columns)}
    for place in range(max(first, 1), len(columns)):
        steps.append(_step(trace, row, columns[place - 1 : place + 1], name, called))
    return Path("brillm", tokenizer.decode(ids), tuple(steps))


def _step(trace: Trace, row: int, columns: list[int], name: Callable[[int], str], called: dict[int, str]) -> Step:
    """Return the step from the token at the first column to that at the second."""
    column, t = columns
    node = int(trace.input_ids[row, t])
    shares = int(trace.row_BT[row, t]) == SHARED
    seen = zip(*(kept[row, column].tolist() for kept in (trace.node_BTK, trace.many_BTK, trace.energy_BTK)), strict=True)
    rivals, compared = [], [node]
    for other, many, energy in seen:
        # Of the nodes that share an edge, the one that the text took is no rival of itself.
        alike = shares and (many > 1 or other == node)
        left = many - int(alike or other == node)
        if left > 0:
            rivals.append((name(other) if left == 1 and other != node else _folded(left), energy))
            compared.append(other)
    found = parts(trace, row, column, compared)
    # Terms of the same name are one: those of all tokens further back than there are names for.
    near = {of: label for of, label in called.items() if column - of < NEAR}
    labels = [of if isinstance(of, str) else near.get(of, "earlier") for of in found.column_P]
    order = list(dict.fromkeys(labels))
    place_P = torch.tensor([order.index(label) for label in labels], device=found.energy_KP.device)
    summed_KQ = found.energy_KP.new_zeros(len(compared), len(order)).index_add_(1, place_P, found.energy_KP)
    own, *others = summed_KQ.tolist()
    score = float(trace.arrival_BT[row, t])
    return Step(name(node), score, tuple(rivals), tuple(zip(order, own, strict=True)), tuple(tuple(numbers) for numbers in others))


def _folded(many: int) -> str:
    return f"{many:,} nodes without an edge of their own" if many > 1 else "1 node without an edge of its own"
