"""The way from scoring with tensors to compiled loops: `kernels` on the CPU, `triton_kernels` on a GPU, imported when first needed."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from pathlm.models import native, rows
from pathlm.models.brillm.graph import Arrivals, Graph

# Shapes: N positions, M some of them, K slabs, V nodes, D width of the signal, O rows of bias gradients, X rows of all gradients

FEW = 32
"""Positions at one source up to which compiled loops are faster than matrix products, which write out everything between them."""

WIDEST = 512
"""Bytes of a signal up to which an edge fits into what a GPU's program has at hand."""


class Outcome(NamedTuple):
    """What scoring finds for each of N positions."""

    loss_N: Tensor
    sure_N: Tensor
    """Probability of the target"""
    slope_N: Tensor
    """Gradient of the shared energy"""
    dsignal_ND: Tensor


class OwnEdges(NamedTuple):
    """Room for the gradients of the edges that leave some sources."""

    begin_N: Tensor
    """Where those of each position's source begin"""
    weight_XDD: Tensor
    bias_XD: Tensor


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Say whether Triton is installed, without importing it."""
    return find_spec("triton") is not None


def on_gpu(graph: Graph, signal_ND: Tensor) -> bool:
    """Say whether Triton's kernels can score: on CUDA, not too wide, contiguous edges, and all numbers float32 or all float64."""
    tensors = (graph.weight_EDD, graph.bias_ED, signal_ND)
    kinds = {t.dtype for t in tensors}
    plain = all(t.device.type == "cuda" for t in tensors) and graph.weight_EDD.is_contiguous() and graph.bias_ED.is_contiguous()
    if not plain or len(kinds) > 1 or not kinds <= {torch.float32, torch.float64}:
        return False
    return signal_ND.shape[1] * signal_ND.element_size() <= WIDEST and has_triton()


def divided(graph: Graph, signal_ND: Tensor, source_N: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the positions for compiled loops, sorted by source, and those for matrix products; None twice where there are no loops."""
    if not native.fits(graph.weight_EDD, graph.bias_ED, signal_ND):
        return None, None
    order_N = torch.argsort(source_N, stable=True)
    _, kind_N, many_K = torch.unique_consecutive(source_N[order_N], return_inverse=True, return_counts=True)
    few_N = (many_K <= FEW)[kind_N]
    if not bool(few_N.any()):
        return None, None
    return order_N[few_N], order_N[~few_N]


def score(
    graph: Graph,
    arrivals: Arrivals,
    few_M: Tensor,
    row_N: Tensor,
    shared_N: Tensor,
    rivals_NV: Tensor | None,
    out: Outcome,
    into: tuple[dict[int, int], Tensor] | None,
) -> rows.Slabs | None:
    """Score the positions `few_M` and set their places in `out`; return the gradients of weights as outer products.

    `row_N` are the targets' rows and `shared_N` the shared energies of all positions. `into` are the gradients of biases and where each
    source's begin; without it there are no gradients.
    """
    from pathlm.models.brillm import kernels

    weight_EDD, bias_ED = graph.weight_EDD, graph.bias_ED
    source_K, row_K, many_K, begin_K1 = _slabs(graph, arrivals.source_N[few_M])
    signal_MD, width = arrivals.signal_ND[few_M].contiguous(), bias_ED.shape[1]
    left_K1 = _bounds(begin_K1.diff() * many_K * width)
    left = rows.room(weight_EDD, int(left_K1[-1])) if into is not None else weight_EDD.new_empty(0)
    base_K, bias_OD = source_K, bias_ED.new_empty(0, width)
    if into is not None:
        begin, bias_OD = into
        base_K = torch.tensor([begin[source] for source in source_K.tolist()], dtype=torch.int64)
    own_M = row_N[few_M] - row_K.repeat_interleave(begin_K1.diff())
    nodes = graph.edges.start_V1.numel() - 1
    allowed_MV = torch.empty(0, nodes, dtype=torch.bool) if rivals_NV is None else rivals_NV[few_M]
    others_M = torch.full((few_M.numel(),), nodes) if rivals_NV is None else allowed_MV.sum(1)
    here = Outcome(*(torch.empty_like(t[few_M]) for t in out))
    cost_K = (1 + many_K) * (4 + begin_K1.diff())
    slabs = (source_K, row_K, many_K, begin_K1, left_K1, base_K)
    given = (weight_EDD, bias_ED, signal_MD, arrivals.place_ND[few_M].contiguous(), own_M, shared_N[few_M], others_M)
    native.in_parts(kernels.score, cost_K, *slabs, *given, graph.edges.key_E, allowed_MV, left, *here, bias_OD)
    for whole, part in zip(out, here, strict=True):
        whole[few_M] = part
    return None if into is None else rows.Slabs(row_K, many_K, begin_K1, left_K1, left, signal_MD)


def energies(graph: Graph, arrivals: Arrivals, few_M: Tensor, energy_NV: Tensor) -> None:
    """Write the energies of all own edges of the positions `few_M` to where their targets stand."""
    from pathlm.models.brillm import kernels

    source_K, row_K, many_K, begin_K1 = _slabs(graph, arrivals.source_N[few_M])
    signal_MD, place_MD = arrivals.signal_ND[few_M].contiguous(), arrivals.place_ND[few_M].contiguous()
    slabs = (source_K, row_K, many_K, begin_K1)
    given = (graph.weight_EDD, graph.bias_ED, signal_MD, place_MD, graph.edges.key_E, few_M, energy_NV)
    native.in_parts(kernels.energies, (1 + many_K) * (4 + begin_K1.diff()), *slabs, *given)


def energies_on_gpu(graph: Graph, arrivals: Arrivals, shared_N: Tensor) -> Tensor:
    """Return the energy (N, V) of every next node, given that over the shared edge."""
    from pathlm.models.brillm import triton_kernels

    energy_NV = shared_N[:, None].repeat(1, graph.edges.start_V1.numel() - 1)
    triton_kernels.energies(graph, arrivals, energy_NV)
    return energy_NV


def score_on_gpu(
    graph: Graph, arrivals: Arrivals, target_N: Tensor, shared_N: Tensor, rivals_NV: Tensor | None, out: Outcome, into: OwnEdges | None
) -> None:
    """Score all positions and set `out`, and with `into` the gradients of own edges. Needs a few tables (N, V) of numbers."""
    from pathlm.models.brillm import triton_kernels

    energy_NV = energies_on_gpu(graph, arrivals, shared_N)
    score_NV = energy_NV if rivals_NV is None else energy_NV.masked_fill(~rivals_NV, -torch.inf)
    log_z_N = score_NV.logsumexp(1)
    hit_N = energy_NV.gather(1, target_N[:, None])[:, 0]
    torch.sub(log_z_N, hit_N, out=out.loss_N)
    torch.exp(hit_N - log_z_N, out=out.sure_N)
    if into is None:
        return
    slope_NV = (score_NV - log_z_N[:, None]).exp_()
    slope_NV.scatter_add_(1, target_N[:, None], slope_NV.new_full((target_N.numel(), 1), -1))
    out.dsignal_ND.copy_(triton_kernels.gradients(graph, arrivals, energy_NV, slope_NV, *into))
    out.slope_N.copy_(slope_NV.sum(1))


def _slabs(graph: Graph, source_M: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return of each source its number, its first row, how many edges it has and (K + 1) where its positions begin."""
    start_V1 = graph.edges.start_V1
    source_K, count_K = torch.unique_consecutive(source_M, return_counts=True)
    first_K = start_V1[source_K]
    return source_K, first_K + 1, start_V1[source_K + 1] - first_K, _bounds(count_K)


def _bounds(count_K: Tensor) -> Tensor:
    return torch.cat((count_K.new_zeros(1), count_K.cumsum(0)))
