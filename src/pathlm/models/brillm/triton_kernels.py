"""Triton kernels that score on a GPU: energies of all edges of the nodes that signals stand at, and their gradients.

Nothing of size positions × edges × width is written to memory. Positions are sorted by source; the program of a source's first position, or
of every `POSITIONS`-th, goes through the source's slab of edges, which it shares with the programs beside it. No program waits for the host
and none adds to what another one adds to, so results do not depend on the order in which they run.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from pathlm.models.brillm.graph import Arrivals, Graph

# Shapes: N positions, V nodes, E edges, D width of the signal, S programs that share a slab; in kernels, R edges and n positions at a time,
# M = R · W outputs, W the width rounded up to a power of 2

POSITIONS = 16
"""Positions that a program takes at a time, the fewest that a matrix product has room for."""
ALONE = 64
"""Positions up to which each is taken by itself, without matrix products: a decoded token reads its slab once, however it is computed."""
NUMBERS = 2**12
"""Numbers of weights that a program takes at a time, at least one edge."""
PROGRAMS = 2**12
"""Programs that a call is cut into, at least."""


@triton.jit
@no_type_check
def _signals(table, at_n, here_n, D: tl.constexpr, W: tl.constexpr):
    """Return the vectors (W, n) of some positions, 0 where there are none."""
    d = tl.arange(0, W)
    return tl.load(table + at_n[None, :] * D + d[:, None], mask=here_n[None, :] & (d < D)[:, None], other=0.0)


@triton.jit
@no_type_check
def _edges(weight, bias, edge, stop, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr):
    """Return the weights (M, W) and biases (M) of the edges from `edge` on, 0 beyond `stop`."""
    m, d = tl.arange(0, R * W), tl.arange(0, W)
    row = edge + 1 + m // W
    out = m % W
    inside = (row <= stop) & (out < D)
    weight_MW = tl.load(weight + (row * D + out)[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    return weight_MW, tl.load(bias + row * D + out, mask=inside, other=0.0)


@triton.jit
@no_type_check
def _before_gelu(weight_MW, bias_M, signal_Wn, place_Wn, W: tl.constexpr, R: tl.constexpr, n: tl.constexpr):
    """Return pre-activations (R, W, n)."""
    if n == 1:
        z_Mn = tl.sum(weight_MW * tl.reshape(signal_Wn, (1, W)), axis=1)[:, None]
    else:
        z_Mn = tl.dot(weight_MW, signal_Wn, input_precision="ieee", out_dtype=weight_MW.dtype)
    return tl.reshape(z_Mn + bias_M[:, None], (R, W, n)) + place_Wn[None]


@triton.jit
@no_type_check
def _energies(
    weight, bias, signal, place, order, source, rank, start, key, energy, positions, nodes,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, n: tl.constexpr,
):  # fmt: skip
    """Set the energies of all edges of up to n positions, in the rows of the table (N, V) where they stood before they were sorted."""
    first = tl.program_id(0)
    if tl.load(rank + first) % n == 0:
        node = tl.load(source + first)
        stop = tl.load(start + node + 1)
        sorted_n = first + tl.arange(0, n)
        here_n = tl.load(source + sorted_n, mask=sorted_n < positions, other=-1) == node
        at_n = tl.load(order + sorted_n, mask=here_n, other=0)
        signal_Wn, place_Wn = _signals(signal, at_n, here_n, D, W), _signals(place, at_n, here_n, D, W)
        for edge in range(tl.load(start + node) + tl.program_id(1) * R, stop, tl.num_programs(1) * R):
            weight_MW, bias_M = _edges(weight, bias, edge, stop, D, W, R)
            z_RWn = _before_gelu(weight_MW, bias_M, signal_Wn, place_Wn, W, R, n)
            y_RWn = z_RWn * (0.5 + 0.5 * tl.erf(z_RWn * 0.7071067811865476))
            edge_R = edge + tl.arange(0, R)
            target_R = tl.load(key + edge_R, mask=edge_R < stop, other=0) - node * nodes
            place_Rn = energy + at_n[None, :] * nodes + target_R[:, None]
            tl.store(place_Rn, tl.sqrt(tl.sum(y_RWn * y_RWn, axis=1)), mask=(edge_R < stop)[:, None] & here_n[None, :])


@triton.jit
@no_type_check
def _gradients(
    weight, bias, signal, place, order, source, rank, many, start, key, energy, slope, begin, dsignal, dweight, dbias, positions, nodes,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, n: tl.constexpr,
):  # fmt: skip
    """Set the gradients of all edges of a source, and add those of its positions' signals to the part of `dsignal` (S, N, D) that is ours.

    `slope` are the gradients of energies (N, V), of which those of own edges become 0. `begin` says where the source's edges begin among
    the gradients. Positions of `dsignal` are sorted.
    """
    first = tl.program_id(0).to(tl.int64)
    if tl.load(rank + first) == 0:
        node = tl.load(source + first)
        begin_row = tl.load(begin + first) - tl.load(start + node)
        last = first + tl.load(many + first)
        stop = tl.load(start + node + 1)
        m, d = tl.arange(0, R * W), tl.arange(0, W)
        for edge in range(tl.load(start + node) + tl.program_id(1) * R, stop, tl.num_programs(1) * R):
            weight_MW, bias_M = _edges(weight, bias, edge, stop, D, W, R)
            edge_R = edge + tl.arange(0, R)
            target_R = tl.load(key + edge_R, mask=edge_R < stop, other=0) - node * nodes
            dweight_MW, dbias_M = tl.zeros_like(weight_MW), tl.zeros_like(bias_M)
            for at in range(first, last, n):
                sorted_n = at + tl.arange(0, n)
                here_n = sorted_n < last
                at_n = tl.load(order + sorted_n, mask=here_n, other=0)
                signal_Wn = _signals(signal, at_n, here_n, D, W)
                z_RWn = _before_gelu(weight_MW, bias_M, signal_Wn, _signals(place, at_n, here_n, D, W), W, R, n)
                here_Rn = (edge_R < stop)[:, None] & here_n[None, :]
                place_Rn = at_n[None, :] * nodes + target_R[:, None]
                energy_Rn = tl.load(energy + place_Rn, mask=here_Rn, other=0.0)
                slope_Rn = tl.load(slope + place_Rn, mask=here_Rn, other=0.0)
                ours = dsignal + ((tl.program_id(1) * positions + sorted_n)[:, None] * D + d[None, :])
                here_nW = here_n[:, None] & (d < D)[None, :]
                before_nW = tl.load(ours, mask=here_nW, other=0.0)
                tl.debug_barrier()  # several threads may hold a number: all have loaded it before one of them stores
                tl.store(slope + place_Rn, tl.zeros_like(slope_Rn), mask=here_Rn)
                # A signal of no energy has no gradient.
                scale_Rn = tl.where(energy_Rn > 0, slope_Rn / tl.where(energy_Rn > 0, energy_Rn, 1.0), 0.0)
                phi_RWn = 0.5 + 0.5 * tl.erf(z_RWn * 0.7071067811865476)
                turn_RWn = phi_RWn + z_RWn * tl.exp(-0.5 * z_RWn * z_RWn) * 0.3989422804014327
                dz_Mn = tl.reshape(scale_Rn[:, None, :] * (z_RWn * phi_RWn) * turn_RWn, (R * W, n))
                dweight_MW += tl.dot(dz_Mn, tl.trans(signal_Wn), input_precision="ieee", out_dtype=dz_Mn.dtype)
                dbias_M += tl.sum(dz_Mn, axis=1)
                dsignal_nW = tl.dot(tl.trans(dz_Mn), weight_MW, input_precision="ieee", out_dtype=dz_Mn.dtype)
                tl.store(ours, before_nW + dsignal_nW, mask=here_nW)
                tl.debug_barrier()  # what was stored is loaded with the next edges
            row, out = begin_row + edge + m // W, m % W
            inside = (edge + m // W < stop) & (out < D)
            tl.store(dweight + (row * D + out)[:, None] * D + d[None, :], dweight_MW, mask=inside[:, None] & (d < D)[None, :])
            tl.store(dbias + row * D + out, dbias_M, mask=inside)


class _Sorted(NamedTuple):
    """Positions sorted by source."""

    order_N: Tensor
    source_N: Tensor
    rank_N: Tensor
    """How many positions at the same source come before each"""


def energies(graph: Graph, arrivals: Arrivals, energy_NV: Tensor) -> None:
    """Write the energies of all own edges of all positions to where their targets stand."""
    by_source = _sorted(arrivals.source_N)
    positions = arrivals.source_N.numel()
    many = 1 if positions <= ALONE else POSITIONS
    _launch(_energies, graph, arrivals, by_source, (energy_NV,), many=many, share=_share(positions))


def gradients(
    graph: Graph, arrivals: Arrivals, energy_NV: Tensor, slope_NV: Tensor, begin_N: Tensor, weight_XDD: Tensor, bias_XD: Tensor
) -> Tensor:
    """Return the gradients (N, D) of signals and write those of own edges, given those of energies (N, V).

    The own edges' part of `slope_NV` becomes 0: what is left of a row is the shared edge's. `begin_N` says where the edges of each
    position's source begin in `weight_XDD` and `bias_XD`.
    """
    by_source, positions = _sorted(arrivals.source_N), arrivals.source_N.numel()
    share = min(_share(positions), 8)  # each has its own part of the signals' gradients
    dsignal_SND = arrivals.signal_ND.new_zeros(share, *arrivals.signal_ND.shape)
    nodes = graph.edges.start_V1.numel() - 1
    many_N = torch.bincount(by_source.source_N, minlength=nodes)[by_source.source_N]
    given = (energy_NV, slope_NV, begin_N[by_source.order_N], dsignal_SND, weight_XDD, bias_XD)
    _launch(_gradients, graph, arrivals, (*by_source, many_N), given, many=POSITIONS, share=share)
    return torch.empty_like(arrivals.signal_ND).index_copy_(0, by_source.order_N, dsignal_SND.sum(0))


def _launch(
    kernel: Any, graph: Graph, arrivals: Arrivals, by_source: tuple[Tensor, ...], given: tuple[Tensor, ...], *, many: int, share: int
) -> None:
    positions, width = arrivals.signal_ND.shape
    if not positions or not graph.edges.key_E.numel():
        return
    rounded = max(16, triton.next_power_of_2(width))
    at_once = max(1, NUMBERS // rounded**2)
    read = (graph.weight_EDD, graph.bias_ED, arrivals.signal_ND.contiguous(), arrivals.place_ND.contiguous())
    nodes = graph.edges.start_V1.numel() - 1
    sizes = {"D": width, "W": rounded, "R": at_once, "n": many}
    kernel[(positions, share)](*read, *by_source, graph.edges.start_V1, graph.edges.key_E, *given, positions, nodes, **sizes)


def _share(positions: int) -> int:
    """Return among how many programs the edges of a source are divided."""
    return max(8, min(256, triton.cdiv(PROGRAMS, max(positions, 1))))


def _sorted(source_N: Tensor) -> _Sorted:
    order_N = torch.argsort(source_N, stable=True)
    source_N = source_N[order_N]
    place_N = torch.arange(source_N.numel(), device=source_N.device)
    return _Sorted(order_N, source_N, place_N - torch.searchsorted(source_N, source_N))
