"""How strongly a signal arrives at every node: energies of all next nodes, and their exact softmax at the cost of the edges that exist.

All pairs without an edge of their own share one edge, so from one source they all have one energy, and the softmax over V nodes is
`Z = Σ_own exp(energy) + (V − own) · exp(energy_shared)`. Positions are grouped by their source, whose edges are one contiguous slab.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pathlm.models.brillm.edges import SHARED, Edges

# Shapes: N positions, V nodes, D width of the signal, E rows (shared edge first), R edges of one source, n positions at one source

PIECE = 2**22
"""Numbers of one slab's outputs at a time, at most."""


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


def read_edges(graph: Graph, row_N: Tensor) -> tuple[Tensor, Tensor, Ledger]:
    """Return weights (…, D, D) and biases (…, D) of single edges given by their rows (…), and the ledger for their gradients.

    Hand it to `cross_entropy` of the same forward pass, which leaves its part in it: touched rows get one gradient, not a sum of two.
    """
    ledger = Ledger(graph.row_gradients, graph.train_shared)
    weight_NDD, bias_ND, ledger.anchor = _ReadEdges.apply(graph.weight_EDD, graph.bias_ED, row_N.flatten(), ledger)
    return weight_NDD.unflatten(0, row_N.shape), bias_ND.unflatten(0, row_N.shape), ledger


def cross_entropy(
    graph: Graph, arrivals: Arrivals, target_N: Tensor, ledger: Ledger, *, rivals_NV: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed cross-entropy of the next nodes, each position's part of it, and each position's probability of its target.

    Only the sum carries a gradient. `rivals_NV` says which nodes each position's target is compared with (it is one of them); None is all.
    Gradients are computed slab by slab together with the loss; `reference.cross_entropy` is the same in a plain loop.
    """
    signal_ND, source_N, place_ND = arrivals
    return _CrossEntropy.apply(signal_ND, ledger.anchor, graph, source_N, place_ND, target_N, ledger, rivals_NV)


def energies(graph: Graph, arrivals: Arrivals) -> Tensor:
    """Return the energy (N, V) of every next node, in at least float32."""
    return _Energies.apply(arrivals.signal_ND, graph.weight_EDD, graph.bias_ED, graph, arrivals.source_N, arrivals.place_ND)


def draw_rivals(target_N: Tensor, nodes: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Return (N, V) booleans: the target and `count` other nodes of each position, drawn evenly and without repetition."""
    key_NV = torch.rand(target_N.numel(), nodes, device=target_N.device, generator=generator)
    key_NV.scatter_(1, target_N[:, None], -1.0)  # the target first
    chosen = key_NV.topk(count + 1, dim=1, largest=False).indices
    return torch.zeros_like(key_NV, dtype=torch.bool).scatter_(1, chosen, True)


class Ledger:
    """Gradients of the edges that one forward pass touches, on their way from scoring to where the edges were read."""

    def __init__(self, as_rows: bool, train_shared: bool) -> None:
        self.as_rows, self.train_shared = as_rows, train_shared
        self.anchor: Any = None
        """Ties scoring to the reading: autograd then asks for the reading's gradient last."""
        self.row_K: Tensor | None = None
        """Rows that scoring touched, rising"""
        self.weight_KDD: Tensor | None = None
        self.bias_KD: Tensor | None = None

    def add(self, row_N: Tensor, weight_NDD: Tensor, bias_ND: Tensor) -> None:
        """Add gradients of single edges, some of them perhaps the same."""
        if self.row_K is None or self.weight_KDD is None or self.bias_KD is None:
            self.row_K, place_N = torch.unique(row_N, return_inverse=True)
            self.weight_KDD = weight_NDD.new_zeros(self.row_K.numel(), *weight_NDD.shape[1:])
            self.bias_KD = bias_ND.new_zeros(self.row_K.numel(), bias_ND.shape[1])
        else:
            missing = ~torch.isin(row_N, self.row_K)
            if bool(missing.any()):  # a target that no loss counts may lie beyond the slabs that were scored
                old = self.row_K
                self.row_K = torch.unique(torch.cat((old, row_N[missing])))
                place_K = torch.searchsorted(self.row_K, old)
                shape = (self.row_K.numel(), *self.weight_KDD.shape[1:])
                self.weight_KDD = self.weight_KDD.new_zeros(shape).index_copy_(0, place_K, self.weight_KDD)
                self.bias_KD = self.bias_KD.new_zeros(shape[:2]).index_copy_(0, place_K, self.bias_KD)
            place_N = torch.searchsorted(self.row_K, row_N)
        self.weight_KDD.index_add_(0, place_N, weight_NDD)
        self.bias_KD.index_add_(0, place_N, bias_ND)

    def take(self, weight_EDD: Tensor, bias_ED: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of all rows, sparse or dense, without those of a shared edge that is not trained."""
        assert self.row_K is not None and self.weight_KDD is not None and self.bias_KD is not None
        row_K, weight_KDD, bias_KD = self.row_K, self.weight_KDD, self.bias_KD
        self.row_K = self.weight_KDD = self.bias_KD = None
        if not self.train_shared and row_K.numel() and int(row_K[0]) == SHARED:
            row_K, weight_KDD, bias_KD = row_K[1:], weight_KDD[1:], bias_KD[1:]
        if self.as_rows:
            found = [
                torch.sparse_coo_tensor(row_K[None], values, whole.shape, is_coalesced=True, check_invariants=False)
                for values, whole in ((weight_KDD, weight_EDD), (bias_KD, bias_ED))
            ]
        else:
            found = [torch.zeros_like(w).index_copy_(0, row_K, v) for v, w in ((weight_KDD, weight_EDD), (bias_KD, bias_ED))]
        return found[0], found[1]


class _ReadEdges(torch.autograd.Function):
    """Rows of the graph, whose gradient is handed out together with what scoring left in the ledger."""

    @staticmethod
    def forward(ctx: Any, weight_EDD: Tensor, bias_ED: Tensor, row_N: Tensor, ledger: Ledger) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(row_N, weight_EDD, bias_ED)
        ctx.ledger = ledger
        return weight_EDD[row_N], bias_ED[row_N], weight_EDD.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        row_N, weight_EDD, bias_ED = ctx.saved_tensors
        ctx.ledger.add(row_N, grads[0], grads[1])
        return *ctx.ledger.take(weight_EDD, bias_ED), None, None


class _Slab(NamedTuple):
    """The positions at one source, some of them at a time, and the source's edges."""

    place_n: Tensor
    source: int
    first: int
    stop: int
    """Its edges are the rows first … stop − 1"""


def _slabs(edges: Edges, source_N: Tensor, width: int) -> Iterator[_Slab]:
    """Group positions by source, rising, in pieces whose outputs are few enough to hold. Sources without edges come, too."""
    order_N = torch.argsort(source_N, stable=True)
    found, many = torch.unique_consecutive(source_N[order_N], return_counts=True)
    bounds = torch.stack((edges.start_V1[found] + 1, edges.start_V1[found + 1] + 1), dim=1).tolist()
    at = 0
    for source, size, (first, stop) in zip(found.tolist(), many.tolist(), bounds, strict=True):
        step = max(1, PIECE // max((stop - first) * width, 1))
        for begin in range(at, at + size, step):
            yield _Slab(order_N[begin : min(begin + step, at + size)], source, first, stop)
        at += size


def _arrive(signal_nD: Tensor, weight_RDD: Tensor, bias_RD: Tensor, place_nD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return pre-activations and outputs (n, R, D) of edges and their energies (n, R)."""
    edges, width = bias_RD.shape
    z_nRD = (signal_nD @ weight_RDD.reshape(edges * width, width).T).view(signal_nD.shape[0], edges, width)
    z_nRD = (z_nRD + bias_RD).add_(place_nD[:, None])
    y_nRD = F.gelu(z_nRD)
    return z_nRD, y_nRD, torch.linalg.vector_norm(y_nRD, dim=-1, dtype=torch.promote_types(y_nRD.dtype, torch.float32))


def _leave(slope_nR: Tensor, z_nRD: Tensor, y_nRD: Tensor, energy_nR: Tensor) -> Tensor:
    """Return the gradient (n, R, D) of pre-activations, given that of energies; a signal of no energy has none."""
    scale_nR = torch.where(energy_nR > 0, slope_nR / energy_nR, 0.0).to(y_nRD.dtype)
    return torch.ops.aten.gelu_backward(y_nRD.mul_(scale_nR[..., None]), z_nRD)


class _Gradients:
    """Gradients of all edges that leave some sources, and of the shared edge: filled slab by slab."""

    def __init__(self, graph: Graph, source_N: Tensor) -> None:
        source_K = torch.unique(source_N)
        first_K, stop_K = graph.edges.start_V1[source_K], graph.edges.start_V1[source_K + 1]
        many_K = stop_K - first_K
        begin_K = many_K.cumsum(0) - many_K + 1
        row = torch.arange(1, int(many_K.sum()) + 1, device=source_N.device) + torch.repeat_interleave(first_K + 1 - begin_K, many_K)
        self.row_K = torch.cat((row.new_zeros(1), row))
        self.weight_KDD = graph.weight_EDD.new_zeros(self.row_K.numel(), *graph.weight_EDD.shape[1:])
        self.bias_KD = graph.bias_ED.new_zeros(self.row_K.numel(), graph.bias_ED.shape[1])
        self._begin = dict(zip(source_K.tolist(), begin_K.tolist(), strict=True))

    def add(self, slab: _Slab, dz_nRD: Tensor, signal_nD: Tensor) -> None:
        """Add what the positions of a slab say about its edges, given the gradient of their pre-activations."""
        begin = self._begin[slab.source]
        rows = slice(begin, begin + slab.stop - slab.first)
        self.weight_KDD[rows].view(-1, signal_nD.shape[1]).addmm_(dz_nRD.flatten(1).T, signal_nD)
        self.bias_KD[rows] += dz_nRD.sum(0)

    def add_shared(self, dz_ND: Tensor, signal_ND: Tensor) -> None:
        """Add what all positions say about the shared edge."""
        self.weight_KDD[SHARED].addmm_(dz_ND.T, signal_ND)
        self.bias_KD[SHARED] += dz_ND.sum(0)


def _compare(
    energy_nR: Tensor, shared_n: Tensor, own_n: Tensor, others_n: Tensor, mine_nR: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log Z and the energy of the target (n), and the gradients of log Z − target by own (n, R) and by shared energies (n).

    `own_n` is the target's place among the own edges, negative where it shares; `others_n` how many nodes share; `mine_nR` which own edges
    are compared at all.
    """
    score_nR = energy_nR if mine_nR is None else energy_nR.masked_fill(~mine_nR, -torch.inf)
    score_nA = torch.cat((score_nR, (shared_n + others_n.log())[:, None]), dim=1)
    log_z_n = score_nA.logsumexp(1)
    shares_n, hit_n = own_n < 0, shared_n
    slope_nA = (score_nA - log_z_n[:, None]).exp_()
    if energy_nR.shape[1]:
        place_n1 = own_n.clamp(min=0)[:, None]
        hit_n = torch.where(shares_n, shared_n, energy_nR.gather(1, place_n1)[:, 0])
        slope_nA.scatter_add_(1, place_n1, -(~shares_n).to(slope_nA.dtype)[:, None])
    # The target counts once: among the nodes that share where it is one of them, else among the own edges.
    return log_z_n, hit_n, slope_nA[:, :-1], slope_nA[:, -1] - shares_n.to(slope_nA.dtype)


class _CrossEntropy(torch.autograd.Function):
    """Scores one slab after the other and computes its part of all gradients at once, while its outputs are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        signal_ND: Tensor,
        anchor: Tensor,
        graph: Graph,
        source_N: Tensor,
        place_ND: Tensor,
        target_N: Tensor,
        ledger: Ledger,
        rivals_NV: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight_EDD, bias_ED, edges = graph.weight_EDD, graph.bias_ED, graph.edges
        nodes, row_N = edges.start_V1.numel() - 1, edges.lookup(source_N, target_N)
        found = _Gradients(graph, source_N) if any(ctx.needs_input_grad) else None
        z_N1D, y_N1D, energy_N1 = _arrive(signal_ND, weight_EDD[:1], bias_ED[:1], place_ND)
        loss_N, sure_N, slope_N1 = torch.empty_like(energy_N1[:, 0]), torch.empty_like(energy_N1[:, 0]), torch.empty_like(energy_N1)
        dsignal_ND = torch.zeros_like(signal_ND)
        for slab in _slabs(edges, source_N, bias_ED.shape[1]):
            at, rows, many = slab.place_n, slice(slab.first, slab.stop), slab.stop - slab.first
            z, y, energy = _arrive(signal_ND[at], weight_EDD[rows], bias_ED[rows], place_ND[at])
            mine, others = None, energy.new_full((at.numel(),), nodes - many)
            if rivals_NV is not None:
                mine = rivals_NV[at][:, edges.targets(slab.source)]
                others = (rivals_NV[at].sum(1) - mine.sum(1)).to(energy.dtype)
            log_z, hit, slope, slope_N1[at, 0] = _compare(energy, energy_N1[at, 0], row_N[at] - slab.first, others, mine)
            loss_N[at], sure_N[at] = log_z - hit, (hit - log_z).exp()
            if found is not None and many:
                dz = _leave(slope, z, y, energy)
                dsignal_ND[at] = dz.flatten(1) @ weight_EDD[rows].flatten(0, 1)
                found.add(slab, dz, signal_ND[at])
        if found is not None:
            dz_ND = _leave(slope_N1, z_N1D, y_N1D, energy_N1)[:, 0]
            dsignal_ND += dz_ND @ weight_EDD[SHARED]
            found.add_shared(dz_ND, signal_ND)
            ctx.save_for_backward(dsignal_ND, found.row_K, found.weight_KDD, found.bias_KD)
        ctx.ledger = ledger
        ctx.mark_non_differentiable(loss_N, sure_N)
        return loss_N.sum(), loss_N, sure_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dsignal_ND, row_K, weight_KDD, bias_KD = ctx.saved_tensors
        grad = grads[0].to(dsignal_ND.dtype)
        ledger: Ledger = ctx.ledger
        if ctx.needs_input_grad[1]:
            assert ledger.row_K is None, "one ledger takes one loss"
            ledger.row_K, ledger.weight_KDD, ledger.bias_KD = row_K, weight_KDD * grad, bias_KD * grad
        return dsignal_ND * grad, torch.zeros_like(grad), None, None, None, None, None, None


class _Energies(torch.autograd.Function):
    """Energies of all next nodes; the backward pass computes each slab once more instead of keeping its outputs."""

    @staticmethod
    def forward(
        ctx: Any, signal_ND: Tensor, weight_EDD: Tensor, bias_ED: Tensor, graph: Graph, source_N: Tensor, place_ND: Tensor
    ) -> Tensor:
        edges = graph.edges
        shared_N1 = _arrive(signal_ND, weight_EDD[:1], bias_ED[:1], place_ND)[2]
        energy_NV = shared_N1.expand(-1, edges.start_V1.numel() - 1).clone()
        for slab in _slabs(edges, source_N, bias_ED.shape[1]):
            at, rows = slab.place_n, slice(slab.first, slab.stop)
            energy = _arrive(signal_ND[at], weight_EDD[rows], bias_ED[rows], place_ND[at])[2]
            energy_NV[at[:, None], edges.targets(slab.source)[None]] = energy
        ctx.save_for_backward(signal_ND, weight_EDD, bias_ED, source_N, place_ND)
        ctx.graph = graph
        return energy_NV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope_NV = grads[0]
        signal_ND, weight_EDD, bias_ED, source_N, place_ND = ctx.saved_tensors
        graph: Graph = ctx.graph
        found = _Gradients(graph, source_N)
        dsignal_ND, shared_N = torch.zeros_like(signal_ND), slope_NV.sum(1)
        for slab in _slabs(graph.edges, source_N, bias_ED.shape[1]):
            if slab.stop == slab.first:
                continue
            at, rows = slab.place_n, slice(slab.first, slab.stop)
            slope = slope_NV[at][:, graph.edges.targets(slab.source)]
            shared_N[at] -= slope.sum(1)
            dz = _leave(slope, *_arrive(signal_ND[at], weight_EDD[rows], bias_ED[rows], place_ND[at]))
            dsignal_ND[at] = dz.flatten(1) @ weight_EDD[rows].flatten(0, 1)
            found.add(slab, dz, signal_ND[at])
        dz_ND = _leave(shared_N[:, None], *_arrive(signal_ND, weight_EDD[:1], bias_ED[:1], place_ND))[:, 0]
        dsignal_ND += dz_ND @ weight_EDD[SHARED]
        found.add_shared(dz_ND, signal_ND)
        ledger = Ledger(graph.row_gradients, graph.train_shared)
        ledger.row_K, ledger.weight_KDD, ledger.bias_KD = found.row_K, found.weight_KDD, found.bias_KD
        return dsignal_ND, *ledger.take(weight_EDD, bias_ED), None, None, None
