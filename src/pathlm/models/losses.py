"""The labels of next tokens, and a linear head's cross-entropy: the vocabulary's scores are made, used and dropped piece by piece."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# Shapes: B rows, T tokens of a row, N tokens, D width, V vocabulary

IGNORE = -100
"""The label of tokens that are not counted."""

PIECE = 2**20
"""Scores made at a time on the CPU, at most: what its caches hold. Elsewhere, and compiled, 64 times as many."""


def next_labels(labels_BT: Tensor, shape: torch.Size, nodes: int | None = None) -> Tensor:
    """Return the label of every token's successor; the last has none.

    Raises `ValueError` where there is not one label per token, or, given `nodes`, where one is neither a token nor -100.
    """
    if nodes is not None and bool((wrong := (labels_BT != IGNORE) & ((labels_BT < 0) | (labels_BT >= nodes))).any()):
        raise ValueError(f"labels holds {int(labels_BT[wrong][0])}: must lie in 0 … vocab_size - 1 = {nodes - 1}, or be {IGNORE} for none")
    if labels_BT.shape != shape:
        raise ValueError(f"labels has shape {tuple(labels_BT.shape)}: must be {tuple(shape)}, one label per token")
    return torch.cat((labels_BT[:, 1:], labels_BT.new_full((labels_BT.shape[0], 1), IGNORE)), dim=1)


def linear_cross_entropy(h_ND: Float[Tensor, "n d"], weight_VD: Float[Tensor, "v d"], target_N: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Return the cross-entropy of `h @ weight.T` with the targets, summed over those that are not `IGNORE`, in at least float32."""
    return _LinearCrossEntropy.apply(h_ND, weight_VD, target_N)[0]


def linear_cross_entropies(
    h_ND: Float[Tensor, "n d"], weight_VD: Float[Tensor, "v d"], target_N: Int[Tensor, " n"]
) -> tuple[Float[Tensor, ""], Float[Tensor, " n"]]:
    """Return the sum as `linear_cross_entropy` does, and each token's part of it, which carries no gradient."""
    return _LinearCrossEntropy.apply(h_ND, weight_VD, target_N)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients together with the loss, while a piece of the scores is at hand."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        device = h_ND.device.type
        working = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
        precise = torch.promote_types(working, torch.float32)
        weight = weight_VD.to(working)
        dh_ND = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=precise) if ctx.needs_input_grad[1] else None
        loss_N = torch.empty(h_ND.shape[0], dtype=precise, device=h_ND.device)
        piece_size = PIECE if device == "cpu" and not torch.compiler.is_compiling() else 64 * PIECE
        rows = max(1, piece_size // weight.shape[0])
        with torch.autocast(device, enabled=False):
            for start in range(0, h_ND.shape[0], rows):
                piece = slice(start, start + rows)
                h, target = h_ND[piece].to(working), target_N[piece]
                counted = (target != IGNORE)[:, None]
                index = target[:, None].masked_fill(~counted, 0)  # any other negative label is an error of gather's
                score = (h @ weight.T).to(precise)
                score = score.log_softmax(-1)
                loss_N[piece] = -(score.gather(-1, index) * counted)[:, 0]
                if dh_ND is None and dweight_VD is None:
                    continue
                slope = score.exp_().scatter_add_(-1, index, -torch.ones_like(score[:, :1])).to(working)
                if dh_ND is not None:
                    dh_ND[piece] = (slope @ weight).mul_(counted)
                if dweight_VD is not None:
                    dweight_VD += slope.T @ (h * counted)
        ctx.save_for_backward(dh_ND, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(loss_N)
        return loss_N.sum(), loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad = grads[0]
        dh_ND, dweight_VD = ctx.saved_tensors
        return (
            None if dh_ND is None else dh_ND * grad.to(dh_ND.dtype),
            None if dweight_VD is None else (dweight_VD * grad).to(ctx.weight_dtype),
            None,
        )
