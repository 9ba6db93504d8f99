"""Where tokens stand in their documents, and what a position adds: a sinusoidal vector, and the weight of an output in the mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pathlm.models.brillm.configuration import BrillmConfig

# Shapes: B rows, T new tokens, D width of the signal, P trained positions


class Places(NamedTuple):
    """What reading a token means for the signal of its row."""

    present_BT: Tensor
    """False for padding, which changes nothing"""
    starts_BT: Tensor
    """True for the first token of a document"""
    number_BT: Tensor
    """The token's position: how many tokens of its document are before it"""
    before_BT: Tensor
    """The token that its edge comes from; itself where there is none"""
    document_BT: Tensor
    """Number of the row's newest document, -1 before the first"""


def locate(token_BT: Int[Tensor, "b t"], document_BT: Int[Tensor, "b t"], last: tuple[Tensor, Tensor, Tensor] | None) -> Places:
    """Find each token's predecessor and position. `document_BT` is -1 for padding.

    `last` is the newest token, its position and its document (B,) of what was read before; the document is -1 where there is nothing. A
    document begins where its number differs from that of the token before, padding left out.
    """
    rows, tokens = token_BT.shape
    if last is None:
        none = token_BT.new_zeros(rows)
        last = (none, none, none - 1)
    present_BT = document_BT >= 0
    # Column 0 is what was read before; each column's newest present one at or before it.
    column_BS = torch.arange(1, tokens + 1, device=token_BT.device).expand(rows, tokens) * present_BT
    newest_BS = torch.cat((column_BS.new_zeros(rows, 1), column_BS), dim=1).cummax(dim=1).values
    token_BS = torch.cat((last[0][:, None], token_BT), dim=1)
    document_BS = torch.cat((last[2][:, None], document_BT), dim=1).gather(1, newest_BS)
    before_BT = token_BS.gather(1, newest_BS[:, :-1])
    starts_BT = present_BT & (document_BT != document_BS[:, :-1])
    count_BS = torch.cat((last[1].new_zeros(rows, 1), present_BT), dim=1).cumsum(1)
    # The count of tokens at the newest start, or, where there is none, what makes positions go on from the last one.
    at_start_BT = torch.where(starts_BT, count_BS[:, 1:], torch.iinfo(torch.int64).min)
    base_BT = torch.cat(((-last[1])[:, None], at_start_BT), dim=1).cummax(dim=1).values[:, 1:]
    number_BT = count_BS[:, 1:] - base_BT
    return Places(present_BT, starts_BT, number_BT, torch.where(starts_BT, token_BT, before_BT), document_BS[:, 1:])


def vectors(number: Int[Tensor, "*n"], config: BrillmConfig, dtype: torch.dtype) -> Float[Tensor, "*n d"]:
    """Return positional vectors: sine and cosine of the position at frequencies that fall (or, as released, rise)."""
    width = config.signal_size
    if config.positions == "none":
        return torch.zeros(*number.shape, width, dtype=dtype, device=number.device)
    if config.beyond == "hold":
        number = number.clamp(max=config.trained_positions - 1)
    rate = 10_000.0 ** (torch.arange(0, width, 2, dtype=torch.float64, device=number.device) / width)
    # In float64: the released frequencies rise so far that angles of a float32 would be off by more than their sines may be.
    place = number[..., None].to(torch.float64)
    angle = place * rate if config.positions == "multiplied" else place / rate
    return (torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2) * config.position_scale).to(dtype)


def position_shares(number: Int[Tensor, "*n"], weight_P: Float[Tensor, " p"], config: BrillmConfig) -> Float[Tensor, "*n"]:
    """Return the share that the output of edge i (from position i to i + 1) has in the pooled mean of outputs 0 … i, as a softmax.

    A mean weighted by the softmax of a prefix is a running mean, `E ← (1 − share) · E + share · h`: the state needs no history.
    """
    last = config.trained_positions - 1
    log_sum_P = weight_P.logcumsumexp(0)
    inside = number.clamp(max=last)
    if config.beyond == "continue":
        # Every later output has the last one's weight.
        more = (number - last).clamp(min=0).to(weight_P.dtype)
        total = torch.logaddexp(log_sum_P[inside], weight_P[last] + more.log())
    else:
        total = log_sum_P[inside]
    return (weight_P[inside] - total).exp()
