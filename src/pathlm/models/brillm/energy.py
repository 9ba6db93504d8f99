"""How strongly a signal arrives at every node: energies of all next nodes, and their exact softmax at the cost of the edges that exist.

All pairs without an edge of their own share one edge, so from one source they all have one energy, and the softmax over V nodes is
`Z = Σ_own exp(energy) + (V − own) · exp(energy_shared)`. Positions are grouped by their source, whose edges are one contiguous slab.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pathlm.models import rows
from pathlm.models.brillm import fused
from pathlm.models.brillm.edges import SHARED, Edges
from pathlm.models.brillm.graph import Arrivals, Graph

# Shapes: N positions, V nodes, D width of the signal, E rows (shared edge first), R edges of one source, n positions at one source

PIECE = 2**22
"""Numbers of one slab's outputs at a time, at most."""
HANDED_OUT = (
    "backward has been called on this loss of a signal graph before: its gradients are computed together with it and handed out once, "
    "with retain_graph=True, too. Run the forward pass again, or ask for all gradients in one call"
)


def read_edges(graph: Graph, row_N: Tensor) -> tuple[Tensor, Tensor, Ledger]:
    """Return weights (…, D, D) and biases (…, D) of single edges given by their rows (…), and the ledger for their gradients.

    Hand it to `cross_entropy` of the same forward pass, which leaves its part in it: touched rows get one gradient, not a sum of two.
    """
    ledger = Ledger(graph)
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


class Scored(NamedTuple):
    """Gradients of touched edges: their rows (K, rising) with their biases, weights of some of them (X), outer products of the others."""

    row_K: Tensor
    bias_KD: Tensor
    dense_X: Tensor
    weight_XDD: Tensor
    slabs: rows.Slabs | None


class Ledger:
    """Gradients of the edges that one forward pass touches, on their way from scoring to where the edges were read."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.anchor: Any = None
        """Ties scoring to the reading: autograd then asks for the reading's gradient last."""
        self.scored: Scored | None = None
        """What scoring found, already times the gradient of the loss"""
        self.scale = 1.0
        """What outer products still are to be multiplied by"""

    def add(self, row_N: Tensor, weight_NDD: Tensor, bias_ND: Tensor) -> None:
        """Add gradients of single edges, some of them perhaps the same."""
        if self.scored is None:
            none = torch.unique(row_N)
            self.scored = Scored(none, bias_ND.new_zeros(none.numel(), bias_ND.shape[1]), none[:0], weight_NDD[:0], None)
        row_K, bias_KD, dense_X, weight_XDD, slabs = self.scored
        dense_X, weight_XDD = _added(dense_X, weight_XDD, row_N, weight_NDD)
        self.scored = Scored(*_added(row_K, bias_KD, row_N, bias_ND), dense_X, weight_XDD, slabs)

    def take(self) -> tuple[Tensor | None, Tensor]:
        """Return the gradients of all rows, sparse or dense, without those of a shared edge that is not trained.

        None stands for weights' gradients that are left for an optimizer to take as outer products.
        """
        assert self.scored is not None
        row_K, bias_KD, dense_X, weight_XDD, slabs = self.scored
        self.scored = None
        graph = self._graph
        if not graph.train_shared and row_K.numel() and int(row_K[0]) == SHARED:
            row_K, bias_KD = row_K[1:], bias_KD[1:]
            dense_X, weight_XDD = dense_X[dense_X != SHARED], weight_XDD[dense_X != SHARED]
        bias = _whole(row_K, bias_KD, graph.bias_ED, graph.row_gradients)
        if slabs is None:
            return _whole(row_K, weight_XDD, graph.weight_EDD, graph.row_gradients), bias
        found = rows.SlabGradient(slabs, self.scale, dense_X, weight_XDD)
        if graph.row_gradients and rows.takes_slabs(graph.weight_EDD):
            return rows.leave(graph.weight_EDD, found), bias
        return _whole(row_K, found.values(row_K), graph.weight_EDD, graph.row_gradients), bias


def _added(row_K: Tensor, value_K: Tensor, row_N: Tensor, value_N: Tensor) -> tuple[Tensor, Tensor]:
    """Add values at some rows, perhaps repeated, to a list of rows that rise and their values."""
    missing = ~torch.isin(row_N, row_K)
    if bool(missing.any()):
        old, row_K = row_K, torch.unique(torch.cat((row_K, row_N[missing])))
        more = value_K.new_zeros(row_K.numel(), *value_K.shape[1:])
        value_K = more.index_copy_(0, torch.searchsorted(row_K, old), value_K)
    return row_K, value_K.index_add_(0, torch.searchsorted(row_K, row_N), value_N)


def _whole(row_K: Tensor, value_K: Tensor, table: Tensor, as_rows: bool) -> Tensor:
    if as_rows:
        return torch.sparse_coo_tensor(row_K[None], value_K, table.shape, is_coalesced=True, check_invariants=False)
    return torch.zeros_like(table).index_copy_(0, row_K, value_K)


class _ReadEdges(torch.autograd.Function):
    """Rows of the graph, whose gradient is handed out together with what scoring left in the ledger."""

    @staticmethod
    def forward(ctx: Any, weight_EDD: Tensor, bias_ED: Tensor, row_N: Tensor, ledger: Ledger) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(row_N)
        ctx.ledger = ledger
        return weight_EDD[row_N], bias_ED[row_N], weight_EDD.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.ledger.add(ctx.saved_tensors[0], grads[0], grads[1])
        return *ctx.ledger.take(), None, None


class _Slab(NamedTuple):
    """The positions at one source, some of them at a time, and the source's edges."""

    place_n: Tensor
    source: int
    first: int
    stop: int
    """Its edges are the rows first … stop − 1"""


def _slabs(edges: Edges, source_N: Tensor, width: int, only_M: Tensor | None = None) -> Iterator[_Slab]:
    """Group positions (all, or `only` some) by source, rising, in pieces whose outputs fit. Sources without edges come, too."""
    order_N = torch.argsort(source_N, stable=True) if only_M is None else only_M[torch.argsort(source_N[only_M], stable=True)]
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
    """Gradients of all edges that leave some sources, and of the shared edge: filled slab by slab.

    Biases have room for the edges of all `source_N`; weights for those of the sources at `dense_M` (None is all), the others being left to
    outer products.
    """

    def __init__(self, graph: Graph, source_N: Tensor, dense_M: Tensor | None = None) -> None:
        self.row_K, self.begin = _rows_of(graph.edges, source_N)
        self.dense_X, self._dense_begin = (self.row_K, self.begin) if dense_M is None else _rows_of(graph.edges, source_N[dense_M])
        self.weight_XDD = graph.weight_EDD.new_zeros(self.dense_X.numel(), *graph.weight_EDD.shape[1:])
        self.bias_KD = graph.bias_ED.new_zeros(self.row_K.numel(), graph.bias_ED.shape[1])

    def add(self, slab: _Slab, dz_nRD: Tensor, signal_nD: Tensor) -> None:
        """Add what the positions of a slab say about its edges, given the gradient of their pre-activations."""
        many, at, dense = slab.stop - slab.first, self.begin[slab.source], self._dense_begin[slab.source]
        self.weight_XDD[dense : dense + many].view(-1, signal_nD.shape[1]).addmm_(dz_nRD.flatten(1).T, signal_nD)
        self.bias_KD[at : at + many] += dz_nRD.sum(0)

    def own(self, source_N: Tensor) -> fused.OwnEdges:
        """Return the room for edges of their own, and where each position's source has its part."""
        # The order of `begin` is that of the sources, which rise.
        found_K, place_N = torch.unique(source_N, return_inverse=True)
        begin_K = torch.tensor(list(self.begin.values()), device=found_K.device)
        return fused.OwnEdges(begin_K[place_N], self.weight_XDD, self.bias_KD)

    def add_shared(self, dz_ND: Tensor, signal_ND: Tensor) -> None:
        """Add what all positions say about the shared edge."""
        self.weight_XDD[SHARED].addmm_(dz_ND.T, signal_ND)
        self.bias_KD[SHARED] += dz_ND.sum(0)


def _rows_of(edges: Edges, source_N: Tensor) -> tuple[Tensor, dict[int, int]]:
    """Return the shared row and the rows of all edges that leave some sources, rising, and where in this list each source's begin."""
    source_K = torch.unique(source_N)
    first_K, stop_K = edges.start_V1[source_K], edges.start_V1[source_K + 1]
    many_K = stop_K - first_K
    begin_K = many_K.cumsum(0) - many_K + 1
    row = torch.arange(1, int(many_K.sum()) + 1, device=source_N.device) + torch.repeat_interleave(first_K + 1 - begin_K, many_K)
    return torch.cat((row.new_zeros(1), row)), dict(zip(source_K.tolist(), begin_K.tolist(), strict=True))


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
        # A GPU's kernels take all. Else slabs that few positions share are left to compiled loops where there are any, the others to
        # matrix products.
        on_gpu = fused.on_gpu(graph, signal_ND)
        few_M, dense_M = (None, None) if on_gpu else fused.divided(graph, signal_ND, source_N)
        learns = any(ctx.needs_input_grad)
        found = _Gradients(graph, source_N, dense_M) if learns else None
        z_N1D, y_N1D, energy_N1 = _arrive(signal_ND, weight_EDD[:1], bias_ED[:1], place_ND)
        loss_N, sure_N, slope_N1 = torch.empty_like(energy_N1[:, 0]), torch.empty_like(energy_N1[:, 0]), torch.empty_like(energy_N1)
        dsignal_ND = torch.zeros_like(signal_ND)
        for slab in () if on_gpu else _slabs(edges, source_N, bias_ED.shape[1], dense_M):
            at, here, many = slab.place_n, slice(slab.first, slab.stop), slab.stop - slab.first
            z, y, energy = _arrive(signal_ND[at], weight_EDD[here], bias_ED[here], place_ND[at])
            mine, others = None, energy.new_full((at.numel(),), nodes - many)
            if rivals_NV is not None:
                mine = rivals_NV[at][:, edges.targets(slab.source)]
                others = (rivals_NV[at].sum(1) - mine.sum(1)).to(energy.dtype)
            log_z, hit, slope, slope_N1[at, 0] = _compare(energy, energy_N1[at, 0], row_N[at] - slab.first, others, mine)
            loss_N[at], sure_N[at] = log_z - hit, (hit - log_z).exp()
            if found is not None and many:
                dz = _leave(slope, z, y, energy)
                dsignal_ND[at] = dz.flatten(1) @ weight_EDD[here].flatten(0, 1)
                found.add(slab, dz, signal_ND[at])
        slabs, arrivals = None, Arrivals(signal_ND, source_N, place_ND)
        out = fused.Outcome(loss_N, sure_N, slope_N1[:, 0], dsignal_ND)
        if on_gpu:
            room = None if found is None else found.own(source_N)
            fused.score_on_gpu(graph, arrivals, target_N, energy_N1[:, 0], rivals_NV, out, room)
        elif few_M is not None:
            into = None if found is None else (found.begin, found.bias_KD)
            slabs = fused.score(graph, arrivals, few_M, row_N, energy_N1[:, 0], rivals_NV, out, into)
        if found is not None:
            dz_ND = _leave(slope_N1, z_N1D, y_N1D, energy_N1)[:, 0]
            dsignal_ND += dz_ND @ weight_EDD[SHARED]
            found.add_shared(dz_ND, signal_ND)
            ctx.scored = Scored(found.row_K, found.bias_KD, found.dense_X, found.weight_XDD, slabs)
        ctx.save_for_backward(dsignal_ND)
        ctx.ledger = ledger
        ctx.mark_non_differentiable(loss_N, sure_N)
        return loss_N.sum(), loss_N, sure_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.needs_input_grad[1] and ctx.scored is None:
            raise RuntimeError(HANDED_OUT)
        (dsignal_ND,) = ctx.saved_tensors
        grad = grads[0].to(dsignal_ND.dtype)
        ledger: Ledger = ctx.ledger
        if ctx.needs_input_grad[1]:
            assert ledger.scored is None, "one ledger takes one loss"
            # In place, as nobody else holds them: a copy of all touched rows would cost as much as an update of them.
            ledger.scored, ctx.scored = ctx.scored, None
            ledger.scored.bias_KD.mul_(grad)
            ledger.scored.weight_XDD.mul_(grad)
            ledger.scale = float(grad) if ledger.scored.slabs is not None else 1.0
        return dsignal_ND * grad, torch.zeros_like(grad), None, None, None, None, None, None


class _Energies(torch.autograd.Function):
    """Energies of all next nodes; the backward pass computes each slab once more instead of keeping its outputs."""

    @staticmethod
    def forward(
        ctx: Any, signal_ND: Tensor, weight_EDD: Tensor, bias_ED: Tensor, graph: Graph, source_N: Tensor, place_ND: Tensor
    ) -> Tensor:
        edges = graph.edges
        arrivals = Arrivals(signal_ND, source_N, place_ND)
        shared_N1 = _arrive(signal_ND, weight_EDD[:1], bias_ED[:1], place_ND)[2]
        on_gpu = fused.on_gpu(graph, signal_ND)
        few_M, dense_M = (None, None) if on_gpu else fused.divided(graph, signal_ND, source_N)
        if on_gpu:
            energy_NV = fused.energies_on_gpu(graph, arrivals, shared_N1[:, 0])
        else:
            energy_NV = shared_N1.expand(-1, edges.start_V1.numel() - 1).clone()
        if few_M is not None:
            fused.energies(graph, arrivals, few_M, energy_NV)
        for slab in () if on_gpu else _slabs(edges, source_N, bias_ED.shape[1], dense_M):
            at, here = slab.place_n, slice(slab.first, slab.stop)
            energy = _arrive(signal_ND[at], weight_EDD[here], bias_ED[here], place_ND[at])[2]
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
            at, here = slab.place_n, slice(slab.first, slab.stop)
            slope = slope_NV[at][:, graph.edges.targets(slab.source)]
            shared_N[at] -= slope.sum(1)
            dz = _leave(slope, *_arrive(signal_ND[at], weight_EDD[here], bias_ED[here], place_ND[at]))
            dsignal_ND[at] = dz.flatten(1) @ weight_EDD[here].flatten(0, 1)
            found.add(slab, dz, signal_ND[at])
        dz_ND = _leave(shared_N[:, None], *_arrive(signal_ND, weight_EDD[:1], bias_ED[:1], place_ND))[:, 0]
        dsignal_ND += dz_ND @ weight_EDD[SHARED]
        found.add_shared(dz_ND, signal_ND)
        ledger = Ledger(graph)
        ledger.scored = Scored(found.row_K, found.bias_KD, found.dense_X, found.weight_XDD, None)
        return dsignal_ND, *ledger.take(), None, None, None
