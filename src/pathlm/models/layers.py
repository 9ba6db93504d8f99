"""The parts a decoder block is made of: normalisation, rotary positions, attention, and the block itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pathlm.models.fused import NormedLinear, NormedMlp, RootMeanSquare, SplitAndTurn, by_hand

# Shapes: B rows, T new tokens, S tokens attended, D model width, H query heads, G key/value heads, K head width, F hidden width of the MLP


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last dimension and scales."""

    statistics: torch.dtype = torch.float32
    """Precision a float64 input is normalised in. Llama rounds to float32 even there; float64 is the equation without that rounding."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised `x` (..., D)."""
        if x.dtype == torch.float64 and self.statistics == torch.float32:
            x32 = x.float()
            return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).double()
        if by_hand(x):
            return RootMeanSquare.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Rotary(nn.Module):
    """Angles of rotary positions under a `rope_parameters` scaling. Holds no weights."""

    frequency: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        frequency, self.scale = rotary_frequencies(config)
        self.register_buffer("frequency", frequency, persistent=False)

    def refresh(self) -> None:
        """Compute the frequencies anew: a buffer that is not saved comes back empty from the meta device."""
        init.copy_(self.frequency, rotary_frequencies(self.config)[0].to(self.frequency.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Move with the model, but keep float32 frequencies: rounding them to bfloat16 would turn far positions by whole radians."""
        super()._apply(fn, recurse)
        if self.frequency.device.type != "meta":
            self.frequency = rotary_frequencies(self.config)[0].to(self.frequency.device)
        return self

    def forward(self, position_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines (B, T, 1, K) for `rotate`."""
        angle = position_BT[..., None, None].float() * self.frequency
        cos, sin = angle.cos() * self.scale, angle.sin() * self.scale
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotary_frequencies(config: Any) -> tuple[Tensor, float]:
    """Return the angle per position of each pair of dimensions (K/2,) in float32 on the CPU, and the scale of cosines and sines."""
    rope = config.rope_parameters
    with torch.device("cpu"):
        if rope["rope_type"] != "default":
            frequency, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device=torch.device("cpu"))
            return frequency, float(scale)
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (rope["rope_theta"] ** exponent), 1.0


def rotate(
    x: Float[Tensor, "b t heads width"], cos: Float[Tensor, "b_or_1 t 1 width"], sin: Float[Tensor, "b_or_1 t 1 width"]
) -> Float[Tensor, "b t heads width"]:
    """Turn every pair (i, i + K/2) of `x` by its position's angle. `sin` carries the sign of the rotation."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class ResidualLinear(nn.Linear):
    """A linear layer that adds to the residual stream, and therefore starts smaller the more of them there are."""


class Block(nn.Module):
    """A Llama block: RMSNorm, rotary grouped-query attention, RMSNorm, SwiGLU, with residual connections.

    `project` and `finish` are the two halves around attention, so that a caller may decide what is attended; `turn` belongs to both.
    One that does not remember makes queries only, and reads what others have remembered.
    """

    def __init__(self, config: Any, *, remembers: bool = True) -> None:
        super().__init__()
        width, heads = config.head_dim, config.num_attention_heads
        groups = config.num_key_value_heads if remembers else 0
        self.heads, self.groups, self.width = heads, groups, width
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.qkv_proj = nn.Linear(config.hidden_size, (heads + 2 * groups) * width, bias=config.attention_bias)
        self.out_proj = ResidualLinear(heads * width, config.hidden_size, bias=config.attention_bias)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = ResidualLinear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, h_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, memory: Cache | None, index: int) -> Tensor:
        """Return the next hidden state (B, T, D). Appends keys and values to `memory` under this block's `index`."""
        query, key, value = self.turn(self.project(h_BTD), rotary)
        if memory is not None:
            key, value = memory.update(key, value, index)
        return self.finish(h_BTD, attend(query, key, value, mask).transpose(1, 2).flatten(2))

    def project(self, h: Tensor) -> Tensor:
        """Return queries, keys and values of `h` (..., D) side by side, not yet turned (..., H + 2G, K)."""
        return self.qkv_proj(self.attention_norm(h)).unflatten(-1, (-1, self.width))

    def remember(self, h: Tensor) -> Tensor:
        """Return the keys and values of `h` (..., D) alone, side by side, not yet turned (..., 2G, K)."""
        if not _own(self.qkv_proj):
            return self.project(h)[..., self.heads :, :]
        first = self.heads * self.width
        bias = None if self.qkv_proj.bias is None else self.qkv_proj.bias[first:]
        return F.linear(self.attention_norm(h), self.qkv_proj.weight[first:], bias).unflatten(-1, (-1, self.width))

    def turn(self, qkv: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return turned queries (B, H, T, K) and keys (B, G, T, K), and values (B, G, T, K), of `qkv` (B, T, H + 2G, K)."""
        return turned(qkv, rotary, self.heads)

    def finish(self, h: Tensor, read: Tensor) -> Tensor:
        """Add what attention `read` (..., H · K) and what the MLP makes of it to `h` (..., D)."""
        h = h + self.out_proj(read)
        gate, up = self.gate_up_proj(self.mlp_norm(h)).chunk(2, dim=-1)
        return h + self.down_proj(F.silu(gate) * up)


class PoolBlock(Block):
    """A block that tokens visit when their router says so. Its two halves are called, never the whole.

    The frugal halves keep less for the backward pass and compute norms and gates again in it.
    """

    def project_frugally(self, h_ND: Tensor) -> Tensor:
        """Do as `project`."""
        if not _plain(h_ND, self.attention_norm, self.qkv_proj):
            return self.project(h_ND)
        norm, linear = self.attention_norm, self.qkv_proj
        qkv = NormedLinear.apply(h_ND, norm.weight, norm.eps, linear.weight, linear.bias)
        return qkv.unflatten(-1, (-1, self.width))

    def finish_frugally(self, h_ND: Tensor, read: Tensor) -> Tensor:
        """Do as `finish`."""
        if not _plain(h_ND, self.mlp_norm, self.gate_up_proj, self.down_proj):
            return self.finish(h_ND, read)
        norm, wide, narrow = self.mlp_norm, self.gate_up_proj, self.down_proj
        h_ND = h_ND + self.out_proj(read)
        return h_ND + NormedMlp.apply(h_ND, norm.weight, norm.eps, wide.weight, wide.bias, narrow.weight, narrow.bias)


def _plain(h: Tensor, norm: RMSNorm, *layers: nn.Module) -> bool:
    """Whether gradients by hand are those of these modules: nobody has replaced a layer, and the norm rounds nothing."""
    rounds = h.dtype == torch.float64 and norm.statistics == torch.float32
    return by_hand(h) and not rounds and _own(*layers)


def _own(*layers: nn.Module) -> bool:
    """Whether these layers are ours: libraries of adapters put their own in the place of a linear layer."""
    return all(type(layer) in (nn.Linear, ResidualLinear) for layer in layers)


def matrix_of(layer: Any) -> Tensor:
    """Return the matrix (out, in) of a linear layer, or of what another library has put in its place, found by asking it."""
    if _own(layer):
        found: Tensor = layer.weight
        return found
    columns = layer(torch.eye(layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device))
    return (columns if layer.bias is None else columns - layer.bias).T


def turned(qkv: Tensor, rotary: tuple[Tensor, Tensor], heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split `qkv` (B, T, H + 2G, K) and turn queries and keys by their positions; returns (B, H, T, K), (B, G, T, K), (B, G, T, K)."""
    if by_hand(qkv):
        return SplitAndTurn.apply(qkv, *rotary, heads)
    groups = (qkv.shape[2] - heads) // 2
    both = rotate(qkv[:, :, : heads + groups], *rotary).transpose(1, 2)
    return both[:, :heads], both[:, heads:], qkv[:, :, heads + groups :].transpose(1, 2)


def attend(
    query: Float[Tensor, "b h t k"],
    key: Float[Tensor, "b g s k"],
    value: Float[Tensor, "b g s k"],
    mask: Bool[Tensor, "b_or_1 1 t s"] | Float[Tensor, "b_or_1 1 t s"] | None,
) -> Float[Tensor, "b h t k"]:
    """Return softmax attention over what `mask` lets each query see; a mask of numbers is added to the scores.

    Without a mask the queries must be all S tokens, each seeing those up to itself, or the last one alone.
    """
    causal = mask is None and query.shape[2] > 1
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1])


def causal_mask(tokens: int, segment_BS: Int[Tensor, "b s"]) -> Bool[Tensor, "b 1 {tokens} s"]:
    """Let each of the last `tokens` tokens see the tokens up to itself that have its segment number.

    Padding has its own number (-1), so that every token sees at least itself and no row of the softmax is empty.
    """
    slot = torch.arange(segment_BS.shape[1], device=segment_BS.device)
    same = segment_BS[:, -tokens:, None] == segment_BS[:, None, :]
    return (same & (slot <= slot[-tokens:, None]))[:, None]
