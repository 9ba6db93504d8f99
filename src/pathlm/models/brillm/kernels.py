"""Compiled loops that score: energies of all edges of a node, their softmax, and its gradients, one slab of edges at a time.

A slab is read once from memory. Its outputs are not kept: what is, is the gradient of each pre-activation, from which a row's gradient
can be made when the row is updated. `energy._CrossEntropy` does the same with torch; `reference` in a plain loop.
"""

from __future__ import annotations

import math
from typing import no_type_check

import numba
import numpy as np
from numba.extending import overload

from pathlm.models.row_kernels import OPTIONS

# Shapes: K slabs, N positions sorted by slab, D width of the signal, E rows, R edges of a slab, n positions at a slab

f32 = np.float32
# exp(r) = 1 + r + r² · Σ r^i · EXP[i] for |r| ≤ log 2 / 2, and Φ(-a) = exp(-a² / 2) · Σ u^i · TAIL[i], i ≥ 1, for u = 1 / (1 + 0.35 a):
# both fitted by weighted least squares to equal ripples, relative errors below 4e-9 and 4e-8.
EXP = tuple(f32(c) for c in (0.49999994, 0.16666520, 0.041668393, 0.008368781, 0.0013814465))
TAIL = tuple(
    f32(c)
    for c in (
        0.13962140679, 0.13986189663, 0.11983270943, 0.10550865531, -0.02311139926,
        0.15917646885, -0.25571629405, 0.14397269487, -0.02914613672,
    )
)  # fmt: skip
E2, E3, E4, E5, E6 = EXP
T1, T2, T3, T4, T5, T6, T7, T8, T9 = TAIL


@no_type_check
def gelu(x):
    """Return x · Φ(x) and its slope, exactly as far as the numbers go."""
    raise NotImplementedError


@overload(gelu, jit_options={"fastmath": OPTIONS["fastmath"], "error_model": "numpy"})
@no_type_check
def _gelu(x):
    return _gelu32 if x == numba.float32 else _gelu64


@no_type_check
def _gelu64(x):
    phi = 0.5 * math.erfc(-x * math.sqrt(0.5))
    return x * phi, phi + x * math.exp(-0.5 * x * x) * 0.3989422804014327


@no_type_check
def _gelu32(x):
    a = min(abs(x), f32(13.0))  # beyond, Φ(-a) is no longer a number of 32 bits
    h = f32(-0.5) * a * a
    k = np.floor(h * f32(1.4426950408889634) + f32(0.5))
    r = h - k * f32(0.693359375)
    r = r + k * f32(2.12194440e-4)  # log 2 in two parts
    p = ((((E6 * r + E5) * r + E4) * r + E3) * r + E2) * r * r + r + f32(1)
    e = p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)
    u = f32(1) / (f32(1) + f32(0.35) * a)
    tail = e * (((((((((T9 * u + T8) * u + T7) * u + T6) * u + T5) * u + T4) * u + T3) * u + T2) * u + T1) * u)
    phi = tail if x < f32(0) else f32(1) - tail
    return x * phi, phi + x * e * f32(0.3989422804014327)


@numba.njit(**OPTIONS)
@no_type_check
def _dots(out, weight_DD, s):
    """Set `out` to weight · s, eight rows at a time: one pass over `s` feeds eight sums, which a compiler keeps in registers."""
    width = s.size
    kind = weight_DD.dtype.type
    whole = width - width % 8
    for i in range(0, whole, 8):
        block = weight_DD[i : i + 8]
        a0, a1, a2, a3, a4, a5, a6, a7 = kind(0), kind(0), kind(0), kind(0), kind(0), kind(0), kind(0), kind(0)
        for j in range(width):
            x = s[j]
            a0 += block[0, j] * x
            a1 += block[1, j] * x
            a2 += block[2, j] * x
            a3 += block[3, j] * x
            a4 += block[4, j] * x
            a5 += block[5, j] * x
            a6 += block[6, j] * x
            a7 += block[7, j] * x
        out[i], out[i + 1], out[i + 2], out[i + 3] = a0, a1, a2, a3
        out[i + 4], out[i + 5], out[i + 6], out[i + 7] = a4, a5, a6, a7
    for i in range(whole, width):
        total = kind(0)
        for j in range(width):
            total += weight_DD[i, j] * s[j]
        out[i] = total


@numba.njit(**OPTIONS)
@no_type_check
def _add_back(ds, dz, weight_DD):
    """Add dz · weight to `ds`, eight rows at a time."""
    width = ds.size
    whole = width - width % 8
    for i in range(0, whole, 8):
        block = weight_DD[i : i + 8]
        a0, a1, a2, a3, a4, a5, a6, a7 = dz[i], dz[i + 1], dz[i + 2], dz[i + 3], dz[i + 4], dz[i + 5], dz[i + 6], dz[i + 7]
        for j in range(width):
            ds[j] += (
                (a0 * block[0, j] + a1 * block[1, j])
                + (a2 * block[2, j] + a3 * block[3, j])
                + (a4 * block[4, j] + a5 * block[5, j])
                + (a6 * block[6, j] + a7 * block[7, j])
            )
    for i in range(whole, width):
        for j in range(width):
            ds[j] += dz[i] * weight_DD[i, j]


@numba.njit(**OPTIONS)
@no_type_check
def _product(out_nD, weight_DD, turned_DD, signal_nD):
    """Set `out` to the signals times one matrix; with many signals the matrix is turned first, so that sums run along rows."""
    many, width = signal_nD.shape
    if many < 4:
        for n in range(many):
            _dots(out_nD[n], weight_DD, signal_nD[n])
        return
    for i in range(width):
        for j in range(width):
            turned_DD[j, i] = weight_DD[i, j]
    for n in range(many):
        out = out_nD[n]
        s = signal_nD[n]
        for i in range(width):
            out[i] = s[0] * turned_DD[0, i]
        for j in range(1, width):
            for i in range(width):
                out[i] += s[j] * turned_DD[j, i]


@numba.njit(**OPTIONS)
@no_type_check
def _arrive(z_nD, slope_nD, weight_DD, turned_DD, bias_D, signal_nD, place_nD, energy_n):
    """Send the signals of a slab over one edge: set their energies, and y · gelu′ of each number."""
    many, width = signal_nD.shape
    _product(z_nD, weight_DD, turned_DD, signal_nD)
    for n in range(many):
        total = z_nD.dtype.type(0)
        z, place, slope = z_nD[n], place_nD[n], slope_nD[n]
        for i in range(width):
            y, d = gelu(z[i] + (bias_D[i] + place[i]))
            slope[i] = y * d
            total += y * y
        energy_n[n] = np.sqrt(total)


@numba.njit(**OPTIONS)
@no_type_check
def _compare(score_Rn, n, shared, others, own, key_R, base, allowed_V):
    """Replace the energies of position n by the gradients of log Z − target; return log Z, the target's energy, the shared gradient."""
    edges, sampled = score_Rn.shape[0], allowed_V.size > 0
    top = -np.inf
    for r in range(edges):
        if not sampled or allowed_V[key_R[r] - base]:
            top = max(top, score_Rn[r, n])
            others -= 1
    if others > 0:
        top = max(top, shared)
    rest = others * math.exp(shared - top)
    total = rest
    for r in range(edges):
        if not sampled or allowed_V[key_R[r] - base]:
            total += math.exp(score_Rn[r, n] - top)
    log_z = top + math.log(total)
    hit = shared if own < 0 else score_Rn[own, n]
    for r in range(edges):
        score_Rn[r, n] = math.exp(score_Rn[r, n] - log_z) if not sampled or allowed_V[key_R[r] - base] else 0.0
    if own >= 0:
        score_Rn[own, n] -= 1
    return log_z, hit, rest / total - (1 if own < 0 else 0)


@numba.njit(**OPTIONS)
@no_type_check
def score(
    first, stop, source_K, row_K, many_K, begin_K1, left_K1, base_K, weight_EDD, bias_ED, signal_ND, place_ND, own_N, shared_N, others_N,
    key_E, allowed_NV, left, loss_N, sure_N, slope_N, dsignal_ND, bias_grad_OD,
):  # fmt: skip
    """Compute slabs' losses and gradients. Where `left` has no room, the losses alone.

    Slab k has the edges row_K[k] … + many_K[k] and the positions begin_K1[k] … begin_K1[k + 1]. `own_N` is each target's place among the
    slab's edges, negative where it shares, `others_N` how many nodes are compared. Sets losses, probabilities of the targets, gradients of
    the shared energies and of the signals; of biases, from row base_K[k] on; and of pre-activations, (R, n, D) from left_K1[k] on.
    """
    width, nodes, learn = bias_ED.shape[1], allowed_NV.shape[1], bias_grad_OD.shape[0] > 0
    kind = weight_EDD.dtype
    turned = np.empty((width, width), kind)
    for k in range(first, stop):
        here, edges, row = slice(begin_K1[k], begin_K1[k + 1]), many_K[k], row_K[k]
        signal, place, dsignal, key = signal_ND[here], place_ND[here], dsignal_ND[here], key_E[row - 1 : row - 1 + edges]
        many = signal.shape[0]
        energy, z = np.empty((edges, many), kind), np.empty((many, width), kind)
        kept = left[left_K1[k] : left_K1[k + 1]] if learn else np.empty(many * width, kind)
        slope = kept.reshape(edges if learn else 1, many, width)
        for r in range(edges):
            _arrive(z, slope[r if learn else 0], weight_EDD[row + r], turned, bias_ED[row + r], signal, place, energy[r])
        scale = energy.copy()
        for n in range(many):
            p = begin_K1[k] + n
            allowed = allowed_NV[p if allowed_NV.shape[0] else 0 : p + 1 if allowed_NV.shape[0] else 0].reshape(-1)
            log_z, hit, slope_N[p] = _compare(scale, n, shared_N[p], others_N[p], own_N[p], key, source_K[k] * nodes, allowed)
            loss_N[p], sure_N[p] = log_z - hit, math.exp(hit - log_z)
        dsignal[:] = 0
        for r in range(edges if learn else 0):
            weight, bias = weight_EDD[row + r], bias_grad_OD[base_K[k] + r]
            for n in range(many):
                x = scale[r, n] / energy[r, n] if energy[r, n] > 0 else kind.type(0)
                dz = slope[r, n]
                for i in range(width):
                    dz[i] *= x
                    bias[i] += dz[i]
                _add_back(dsignal[n], dz, weight)


@numba.njit(**OPTIONS)
@no_type_check
def energies(
    first, stop, source_K, row_K, many_K, begin_K1, weight_EDD, bias_ED, signal_ND, place_ND, key_E, order_N, energy_NV
):  # fmt: skip
    """Write the energies of the edges of some slabs to where their targets stand, in rows `order_N`."""
    width = bias_ED.shape[1]
    kind = weight_EDD.dtype
    turned = np.empty((width, width), kind)
    for k in range(first, stop):
        here, row, base = slice(begin_K1[k], begin_K1[k + 1]), row_K[k], source_K[k] * energy_NV.shape[1]
        signal, place, order = signal_ND[here], place_ND[here], order_N[here]
        many = signal.shape[0]
        z, slope, energy = np.empty((many, width), kind), np.empty((many, width), kind), np.empty(many, kind)
        for r in range(many_K[k]):
            _arrive(z, slope, weight_EDD[row + r], turned, bias_ED[row + r], signal, place, energy)
            for n in range(many):
                energy_NV[order[n], key_E[row - 1 + r] - base] = energy[n]


@numba.njit(**OPTIONS)
@no_type_check
def _position(out, number, rate_J, scale, multiplied, last):
    """Set `out` to the positional vector of a position, or to 0 where there are no frequencies."""
    number = min(number, last) if last >= 0 else number
    out[:] = 0
    for j in range(rate_J.size):
        angle = number * rate_J[j] if multiplied else number / rate_J[j]
        out[2 * j], out[2 * j + 1] = scale * math.sin(angle), scale * math.cos(angle)


@numba.njit(**OPTIONS)
@no_type_check
def _share(number, weight_P, goes_on):
    """Return the share of the output of edge `number` in the mean; a chain has no weights, and its newest output is all."""
    if weight_P.size == 0:
        return 1.0
    last = weight_P.size - 1
    top, total = -np.inf, 0.0
    for p in range(min(number, last) + 1):
        top = max(top, weight_P[p])
    for p in range(min(number, last) + 1):
        total += math.exp(weight_P[p] - top)
    if goes_on and number > last:
        total += (number - last) * math.exp(weight_P[last] - top)
    return math.exp(weight_P[min(number, last)] - top) / total


@numba.njit(**OPTIONS)
@no_type_check
def advance(
    first, stop, token_B, before_B, number_B, state_BD, weight_P, weight_EDD, bias_ED, start_V1, key_E, rate_J, scale, rule,
    signal_BD, energy_BV
):  # fmt: skip
    """Take one more token in every row: set the signals after it and the energies of all next nodes. Reads one slab of edges a row.

    `rule` says whether positions' frequencies are multiplied, at which position they are held (-1: at none), whether the mean gets ever
    slower, and whether positions are those of the released decoding.
    """
    multiplied, last, goes_on, released = rule
    width, nodes, kind = state_BD.shape[1], energy_BV.shape[1], weight_EDD.dtype
    z, slope, place = np.empty((1, width), kind), np.empty((1, width), kind), np.empty((1, width), kind)
    turned, energy = np.empty((1, 1), kind), np.empty(1, kind)
    for b in range(first, stop):
        begin, end = start_V1[before_B[b]], start_V1[before_B[b] + 1]
        wanted = before_B[b] * nodes + token_B[b]
        at = begin + np.searchsorted(key_E[begin:end], wanted)
        row = at + 1 if at < end and key_E[at] == wanted else 0
        _position(place[0], number_B[b] - released, rate_J, scale, multiplied, last)
        _dots(z[0], weight_EDD[row], state_BD[b])
        share = kind.type(_share(number_B[b] - 1, weight_P, goes_on))
        signal = signal_BD[b : b + 1]
        for i in range(width):
            h, _ = gelu(z[0, i] + (bias_ED[row, i] + place[0, i]))
            signal[0, i] = state_BD[b, i] + share * (h - state_BD[b, i])
        _position(place[0], number_B[b] + 1 - released, rate_J, scale, multiplied, last)
        _arrive(z, slope, weight_EDD[0], turned, bias_ED[0], signal, place, energy)
        energy_BV[b] = energy[0]
        for e in range(start_V1[token_B[b]], start_V1[token_B[b] + 1]):
            _arrive(z, slope, weight_EDD[e + 1], turned, bias_ED[e + 1], signal, place, energy)
            energy_BV[b, key_E[e] - token_B[b] * nodes] = energy[0]
        if released:
            energy_BV[b, token_B[b]] = -np.inf
