"""Canonical memory: one code per token for the whole pool, written once, and what the blocks read of codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.layers import Block, RMSNorm, rotate

# Shapes: B rows, T tokens, S tokens remembered, n any tokens, D width, C numbers in a code, H heads, G key/value heads, K head width,
# J keys that know their place, A adapters, Z readers, W = C + J · K width of what is remembered of a token as a code, or W + K where rows
# are read besides


@dataclass(frozen=True)
class CodeRows:
    """What is remembered of all tokens read so far, as codes."""

    rows_B1SW: Tensor
    slots: Tensor | None = None
    """Which tokens (S,) these are; None where they are all"""


class Codes(nn.Module):
    """Writes codes, and is the adapters through which blocks read them.

    A head with query q at place t scores the code c of place s with `(q · K c + Σ_j turn(a_j ∘ q, t) · turn(U_j c, s)) / √width` and reads
    `V c`. K and V are those of its block, or of all; the keys U_j c, which are turned by the token's place, are the same for all heads and
    blocks, and each mixes them with complex numbers a_j of its own, one for each frequency: those commute with turning. Since
    q · K c = Kᵀq · c, a block asks for codes in their own space and translates what it gets: nothing is made of a code for any block, and
    all blocks read one table.
    """

    local_window: Tensor
    local_share: Tensor

    def __init__(self, config: BrianConfig) -> None:
        super().__init__()
        self.config = config
        # What training last set, so that a model is used as it was trained.
        self.register_buffer("local_window", torch.tensor(config.local_window))
        self.register_buffer("local_share", torch.tensor(1.0))
        width, code, head = config.hidden_size, config.code_width, config.head_dim
        heads, groups, rank = config.num_attention_heads, config.num_key_value_heads, config.code_delta_rank
        self.width, self.rank, self.heads, self.keys = code, rank, heads, config.code_keys  # a configuration's attributes answer slowly
        assert head is not None and groups is not None
        readers = config.pool_blocks + (config.post_blocks if config.post_memory == "canonical" else 0)
        self.asks: tuple[list[int], Tensor] | None = None
        """The versions of the weights that `asks_of` was made of last, and what it was."""
        self.norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.down = None if config.code_dim == 0 else nn.Linear(width, code, bias=False)
        self.turned_keys = nn.Linear(code, self.keys * head, bias=False)
        self.mix = nn.Parameter(torch.empty(readers, heads, self.keys, head))
        adapters = 1 if config.code_adapter == "shared" else readers
        self.key = nn.Parameter(torch.empty(adapters, groups, head, code))
        self.value = nn.Parameter(torch.empty(adapters, groups, head, code))
        if rank:
            self.key_wide = nn.Parameter(torch.empty(readers, heads, head, rank))
            self.key_narrow = nn.Parameter(torch.empty(readers, heads, rank, code))
            self.value_wide = nn.Parameter(torch.empty(readers, heads, head, rank))
            self.value_narrow = nn.Parameter(torch.empty(readers, heads, rank, code))

    def _apply(self, fn: Any, recurse: bool = True) -> Codes:
        """Move or convert, and forget what was derived from the weights as they were."""
        self.asks = None
        super()._apply(fn, recurse)
        return self

    @property
    def reach(self) -> tuple[int, float]:
        """How many newest tokens are read as rows (0 is all), and what share of their weight counts; the rest is that of their codes."""
        if self.config.memory == "canonical":
            return 0, 0.0
        return int(self.local_window), float(self.local_share)

    @torch.no_grad()
    def set_reach(self, window: float | None, share: float | None) -> None:
        """Let this many newest tokens, and this share of their weight, be read as rows from now on; None leaves what is."""
        if window is not None:
            self.local_window.fill_(round(window))
        if share is not None:
            self.local_share.fill_(share)

    @torch.no_grad()
    def reset(self) -> None:
        """Draw codes and adapters so that what is made of a code varies as a block's own keys and values; what heads add starts at zero."""
        for buffer, start in ((self.local_window, self.config.local_window), (self.local_share, 1.0)):
            init.copy_(buffer, torch.tensor(start, dtype=buffer.dtype, device=buffer.device))
        width, code = self.config.hidden_size, self.config.code_width
        if self.down is not None:
            init.normal_(self.down.weight, std=width**-0.5)
        std = self.config.initializer_range * (width / code) ** 0.5
        for parameter in (self.turned_keys.weight, self.key, self.value):
            init.normal_(parameter, std=std)
        mix_HJK = torch.zeros_like(self.mix[0])
        head_H = torch.arange(self.heads)
        mix_HJK[head_H, head_H % self.keys, : mix_HJK.shape[-1] // 2] = 1.0  # heads begin with a key each
        init.copy_(self.mix, mix_HJK.expand_as(self.mix))
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_wide"):
                init.zeros_(parameter)
            elif name.endswith("_narrow"):
                init.normal_(parameter, std=code**-0.5)

    def write(self, h_BTD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Return what is remembered of tokens that enter the pool in states `h_BTD`: codes, and keys turned by their place (B, 1, T, W)."""
        code_BTC = self.norm(h_BTD)
        if self.down is not None:
            code_BTC = self.down(code_BTC)
        keys = rotate(self.turned_keys(code_BTC).unflatten(-1, (self.keys, -1)), *rotary).flatten(2)
        return torch.cat((code_BTC, keys), dim=-1)[:, None]

    def ask(self, reader: int, query_nHK: Tensor) -> Tensor:
        """Return the queries of a block as questions to codes and their keys, not turned (n, H, C + J · K)."""
        asked = _by_group(query_nHK, self.key[reader if len(self.key) > 1 else 0])
        if self.rank:
            asked = asked + _by_group(_by_group(query_nHK, self.key_wide[reader]), self.key_narrow[reader])
        real_HJk, imaginary_HJk = self.mix[reader].to(query_nHK.dtype).chunk(2, dim=-1)
        query_nH1K = query_nHK[:, :, None]
        across = query_nH1K.roll(query_nHK.shape[-1] // 2, -1) * torch.cat((-imaginary_HJk, imaginary_HJk), dim=-1)
        mixed = torch.addcmul(across, query_nH1K, torch.cat((real_HJk, real_HJk), dim=-1))
        return torch.cat((asked, mixed.flatten(2)), dim=-1)

    @torch.no_grad()
    def asks_of(self) -> Tensor:
        """Return what every reader's queries are multiplied with to be asked (Z, H, K, C + J · K), made anew when weights have changed."""
        versions = [weight._version for weight in self.parameters(recurse=False) if not weight.is_inference()]
        if self.asks is None or self.asks[0] != versions:
            one_K1K = torch.eye(self.mix.shape[-1], dtype=self.mix.dtype, device=self.mix.device)[:, None]
            every = [self.ask(reader, one_K1K.expand(-1, self.heads, -1)).transpose(0, 1) for reader in range(len(self.mix))]
            self.asks = versions, torch.stack(every)
        return self.asks[1]

    def question(self, asked_BTHX: Tensor, rotary: tuple[Tensor, Tensor], row_query_BTHK: Tensor | None = None) -> Tensor:
        """Return what heads look for (B, T, H, W): what they ask codes for, turned, and rows, if these are read besides.

        Scaled so that `F.scaled_dot_product_attention` divides by √K in the end.
        """
        code, keys = asked_BTHX.split((self.width, asked_BTHX.shape[-1] - self.width), dim=-1)
        keys = rotate(keys.unflatten(-1, (self.keys, -1)).flatten(2, 3), *rotary)
        width = keys.shape[-1]
        parts = (code, keys.unflatten(2, (-1, self.keys)).flatten(3))
        query = torch.cat(parts if row_query_BTHK is None else (*parts, row_query_BTHK), dim=-1)
        return query * (query.shape[-1] / width) ** 0.5

    def answer(self, reader: int, read_nHC: Tensor) -> Tensor:
        """Return mixtures of codes as mixtures of a block's values (n, H, K)."""
        told = _by_group(read_nHC, self.value[reader if len(self.value) > 1 else 0].mT)
        if not self.rank:
            return told
        return told + _by_group(_by_group(read_nHC, self.value_narrow[reader].mT), self.value_wide[reader].mT)

    def heard(self, reader: int, read_nHW: Tensor, *, with_rows: bool) -> Tensor:
        """Return what a block's heads make of what they have read (n, H · K): mixtures of codes, and those of rows, if any were read."""
        told = self.answer(reader, read_nHW[..., : self.width])
        return (told + read_nHW[..., -told.shape[-1] :] if with_rows else told).flatten(1)


def _by_group(x_nHX: Tensor, matrix_GXY: Tensor) -> Tensor:
    """Multiply what heads hold with the matrix of their group (n, H, Y)."""
    n, heads, _ = x_nHX.shape
    groups, matrix_GXY = len(matrix_GXY), matrix_GXY.to(x_nHX.dtype)
    if n == 1:  # a row alone is in the order of groups already
        return torch.bmm(x_nHX.view(groups, heads // groups, -1), matrix_GXY).view(1, heads, -1)
    return torch.einsum("nghx,gxy->nghy", x_nHX.unflatten(1, (groups, -1)), matrix_GXY).flatten(1, 2)


def read_codes(query_BHTW: Tensor, rows_B1SW: Tensor, mask: Tensor | None) -> Tensor:
    """Return mixtures of rows (B, H, T, W), whose first C numbers are mixtures of codes. Without a mask as `layers.attend`."""
    if query_BHTW.shape[2] == 1:  # the heads of one token are as good as the tokens of one head
        read = F.scaled_dot_product_attention(query_BHTW.transpose(1, 2), rows_B1SW, rows_B1SW, attn_mask=mask)
        return read.transpose(1, 2)
    return F.scaled_dot_product_attention(query_BHTW, rows_B1SW, rows_B1SW, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


def joined_rows(rows_B1SW: Tensor, keys_BGSK: Tensor, values_BGSK: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and rows as one table of keys and values (B, G, S + S', W + K): a row has no code, and a code no row."""
    code, row = rows_B1SW.shape[-1], keys_BGSK.shape[-1]
    codes = F.pad(rows_B1SW, (0, row)).expand(-1, keys_BGSK.shape[1], -1, -1)
    keys, values = (torch.cat((codes, F.pad(rows, (code, 0))), dim=2) for rows in (keys_BGSK, values_BGSK))
    return keys, values


class CodeReader(Block):
    """A block after the pool that remembers nothing of its own: it reads the codes of the pool."""

    def __init__(self, config: BrianConfig, number: int) -> None:
        super().__init__(config, remembers=False)
        self.number = number
        """Which reader of codes it is"""

    def read(self, codes: Codes, h_BTD: Tensor, rotary: tuple[Tensor, Tensor], rows_B1SW: Tensor, mask: Tensor | None) -> Tensor:
        """Return the next hidden state (B, T, D)."""
        return self.finish(h_BTD, self.heard(codes, self.project(h_BTD), rotary, rows_B1SW, mask))

    def heard(self, codes: Codes, query_BTHK: Tensor, rotary: tuple[Tensor, Tensor], rows_B1SW: Tensor, mask: Tensor | None) -> Tensor:
        """Return what the queries, not yet turned, read (B, T, H · K)."""
        shape = query_BTHK.shape[:2]
        asked = codes.ask(self.number, query_BTHK.flatten(0, 1)).unflatten(0, shape)
        query = codes.question(asked, rotary).transpose(1, 2)
        read = read_codes(query, rows_B1SW, mask).transpose(1, 2)[..., : codes.config.code_width]
        return codes.answer(self.number, read.flatten(0, 1)).unflatten(0, shape).flatten(2)


def is_reader(block: Any) -> bool:
    """Whether a block reads codes instead of keys and values of its own."""
    return isinstance(block, CodeReader)
