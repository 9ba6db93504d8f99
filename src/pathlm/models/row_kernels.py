"""Compiled loops over rows of a table: AdamW on some of them, and gradients that are sums of outer products."""

from __future__ import annotations

from typing import Any, no_type_check

import numba
import numpy as np

# Every loop here works on rows `first` … `stop` of its lists, each for itself: results do not depend on how work is divided.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc", "nsz", "arcp"},  # sums may be reordered; what is not a number stays so
}


@numba.njit(**OPTIONS)
@no_type_check
def _move(weight, mean, square, grad, age, rates):
    """Take one step of AdamW with one row, its own `age`-th. `rates` are lr, decay, beta1, beta2, eps."""
    lr, decay, beta1, beta2, eps = rates
    kind = weight.dtype.type
    keep1, keep2, fresh1, fresh2 = kind(beta1), kind(beta2), kind(1 - beta1), kind(1 - beta2)
    size, spread = kind(lr / (1 - beta1**age)), kind(1 / np.sqrt(1 - beta2**age))
    rest, small = kind(1 - lr * decay), kind(eps)
    for i in range(weight.size):
        g = grad[i]
        m = keep1 * mean[i] + fresh1 * g
        v = keep2 * square[i] + fresh2 * g * g
        mean[i], square[i] = m, v
        weight[i] = rest * weight[i] - size * m / (np.sqrt(v) * spread + small)


@numba.njit(**OPTIONS)
@no_type_check
def _any(grad):
    total = grad.dtype.type(0)
    for i in range(grad.size):
        total += abs(grad[i])
    return total != 0


@numba.njit(**OPTIONS)
@no_type_check
def move_rows(first, stop, row_K, grad_KW, scale, table_RW, mean_RW, square_RW, step_R, rates):
    """Take one step of AdamW with the rows whose gradient, times `scale`, is not all 0."""
    grad = np.empty(grad_KW.shape[1], grad_KW.dtype)
    factor = grad_KW.dtype.type(scale)
    for k in range(first, stop):
        for i in range(grad.size):
            grad[i] = factor * grad_KW[k, i]
        if _any(grad):
            row = row_K[k]
            step_R[row] += 1
            _move(table_RW[row], mean_RW[row], square_RW[row], grad, np.float64(step_R[row]), rates)


@numba.njit(**OPTIONS)
@no_type_check
def _outer(out, left, right, factor):
    """Set `out` (D · D) to factor · Σ_n left[n] ⊗ right[n]; both come flat."""
    width = right.shape[1]
    for i in range(width):
        target = out[i * width : (i + 1) * width]
        x = factor * left[i]
        for j in range(width):
            target[j] = x * right[0, j]
        for n in range(1, right.shape[0]):
            x = factor * left[n * width + i]
            for j in range(width):
                target[j] += x * right[n, j]


@numba.njit(**OPTIONS)
@no_type_check
def move_slabs(
    first, stop, row_K, many_K, begin_K1, left_K1, left, right_ND, scale, extra_X, extra_XW, factor, table_RW, mean_RW,
    square_RW, step_R, rates,
):  # fmt: skip
    """Take one step of AdamW with all rows of some slabs, each row's gradient made when its turn comes.

    Slab k has the rows row_K[k] … + many_K[k]; the gradient of each is scale · Σ_n left ⊗ right over its positions, and factor · extra
    where the row is one of `extra_X` (rising).
    """
    width = right_ND.shape[1]
    grad = np.empty(width * width, right_ND.dtype)
    kind = right_ND.dtype.type
    scale, factor = kind(scale), kind(factor)
    for k in range(first, stop):
        right = right_ND[begin_K1[k] : begin_K1[k + 1]]
        block = right.size
        x = np.searchsorted(extra_X, row_K[k])
        for r in range(many_K[k]):
            row = row_K[k] + r
            at = left_K1[k] + r * block
            _outer(grad, left[at : at + block], right, scale)
            if x < extra_X.size and extra_X[x] == row:
                for i in range(grad.size):
                    grad[i] += factor * extra_XW[x, i]
                x += 1
            if _any(grad):
                step_R[row] += 1
                _move(table_RW[row], mean_RW[row], square_RW[row], grad, np.float64(step_R[row]), rates)


@numba.njit(**OPTIONS)
@no_type_check
def write_slabs(first, stop, row_K, many_K, begin_K1, left_K1, left, right_ND, scale, row_O, out_OW):
    """Add the gradients of all rows of some slabs to `out`, whose rows are `row_O`, rising."""
    width = right_ND.shape[1]
    grad = np.empty(width * width, right_ND.dtype)
    scale = right_ND.dtype.type(scale)
    for k in range(first, stop):
        right = right_ND[begin_K1[k] : begin_K1[k + 1]]
        block = right.size
        place = np.searchsorted(row_O, row_K[k])
        for r in range(many_K[k]):
            at = left_K1[k] + r * block
            _outer(grad, left[at : at + block], right, scale)
            out = out_OW[place + r]
            for i in range(grad.size):
                out[i] += grad[i]


@numba.njit(**OPTIONS)
@no_type_check
def square_slabs(first, stop, row_K, many_K, begin_K1, left_K1, left, right_ND, scale, extra_X, extra_XW, square_K):
    """Set `square_K` to the sum of squares of each slab's gradients, extra ones added."""
    width = right_ND.shape[1]
    grad = np.empty(width * width, right_ND.dtype)
    scale = right_ND.dtype.type(scale)
    for k in range(first, stop):
        right = right_ND[begin_K1[k] : begin_K1[k + 1]]
        block = right.size
        many = right.shape[0]
        x = np.searchsorted(extra_X, row_K[k])
        total = 0.0
        for r in range(many_K[k]):
            at = left_K1[k] + r * block
            part = right_ND.dtype.type(0)
            if x < extra_X.size and extra_X[x] == row_K[k] + r:
                _outer(grad, left[at : at + block], right, scale)
                for i in range(grad.size):
                    g = grad[i] + extra_XW[x, i]
                    part += g * g
                x += 1
            else:
                # ‖Σ a_n ⊗ b_n‖² = Σ (a_n · a_m) (b_n · b_m), without the matrix
                for n in range(many):
                    for m in range(n + 1):
                        a, b = right_ND.dtype.type(0), right_ND.dtype.type(0)
                        for i in range(width):
                            a += left[at + n * width + i] * left[at + m * width + i]
                            b += right[n, i] * right[m, i]
                        part += a * b if n == m else 2 * a * b
                part *= scale * scale
            total += part
        square_K[k] = total
