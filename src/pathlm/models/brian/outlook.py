"""What one new token per row reads on its way through the pool: rows, codes, or both. Nothing that is remembered is copied for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathlm.models.brian.memory import NewestRows
from pathlm.models.brian.table import Surroundings, code_mask, mixed_masks, row_mask
from pathlm.models.layers import attend, turned

# Shapes: B rows of one token each, n of them still in the pool in the order of rows, D width, H heads, G key/value heads, h = H / G heads
# that share keys, K head width, C numbers in a code, W of what is remembered as one, X = K where only rows are read, W where only codes
# are, W + K where both are, S codes, S' rows


class Outlook:
    """What the tokens still in the pool see, and how they read it."""

    def __init__(self, around: Surroundings, block: Any, batch: int, like: Tensor) -> None:
        self.batch, self.heads, self.rotary, self.codes = batch, block.heads, around.rotary, around.codes
        self.asks = None if around.codes is None else around.codes.asks_of().to(like.dtype)
        self.rows: NewestRows | None = None
        if around.memory is not None:
            self.rows = around.memory.newest(like.new_empty(()).expand(batch, block.groups, 1, block.width))
        self.writes = block.groups > 0
        self.table_B1SW = None if around.code_rows is None else around.code_rows.rows_B1SW
        self.mask = self._mask(around, like)
        self.index_n: Tensor | None = None
        """Rows of the tokens in the batch; None while these are all"""
        self.cuts: list[int] = []
        """How many neighbouring rows have left, are still here, have left, …"""

    def _mask(self, around: Surroundings, like: Tensor) -> Tensor | None:
        """Return what is added to scores, made once for all steps: (B, 1, 1, S), both kinds side by side; None where all is seen."""
        if around.codes is None:
            return row_mask(around)
        if self.writes:
            seen: Tensor | None = torch.cat(mixed_masks(around, like.dtype), dim=-1)
        else:
            seen = code_mask(around.codes, around.code_rows, around.sight)
        if seen is None or seen.dtype != torch.bool:
            return seen
        return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -torch.inf)

    def keep(self, index: Tensor, row_n: np.ndarray) -> None:
        """Let only those at `index` go on, whose rows in the batch are `row_n`."""
        cos, sin = self.rotary
        if cos.shape[0] > 1:
            self.rotary = cos.index_select(0, index), sin.index_select(0, index)
        if self.mask is not None and self.mask.shape[0] > 1:
            self.mask = self.mask.index_select(0, index)
        self.index_n = torch.from_numpy(row_n).to(index.device)
        here = np.zeros(self.batch + 2, dtype=bool)
        here[row_n + 1] = True
        edge = np.flatnonzero(here[1:] != here[:-1])
        self.cuts = np.diff(edge, prepend=0, append=self.batch).tolist()

    def project(self, number: int, block: Any, x_nD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a block's queries, keys and values, not turned (n, H + 2G, K), and what it asks codes for (n, H, W), if it does."""
        qkv = block.project(x_nD)
        if self.asks is None:
            return qkv, None
        return qkv, torch.bmm(qkv[:, : self.heads].transpose(0, 1), self.asks[number]).transpose(0, 1)

    def heard(self, number: int, read_nX: Tensor) -> Tensor:
        """Return what a block's heads make of what they have read (n, H · X), as mixtures of values (n, H · K)."""
        if self.codes is None:
            return read_nX
        return self.codes.heard(number, read_nX.unflatten(1, (self.heads, -1)), with_rows=self.writes)

    def read(self, qkv_nXK: Tensor, asked_nHW: Tensor | None, step: int) -> Tensor:
        """Write the keys and values among `qkv_nXK`, if there are any, and return what the queries read (n, H · X)."""
        tables: list[Tensor] = [] if self.codes is None or self.table_B1SW is None else [self.table_B1SW]
        if self.writes:
            query, key, value = turned(qkv_nXK[:, None], self.rotary, self.heads)
            if self.rows is None:
                return attend(query, key, value, self.mask).flatten(1)
            self.rows.write(step, self.index_n, key, value)
            tables += [self.rows.keys[step], self.rows.values[step]]
        if asked_nHW is not None:
            assert self.codes is not None
            row_query = query.transpose(1, 2) if self.writes else None
            query = self.codes.question(asked_nHW[:, None], self.rotary, row_query).transpose(1, 2)
        if self.index_n is None:
            return self._attended(query, tables, self.mask)
        # Neighbours attend together: that copies nothing of the memory.
        sizes = self.cuts[1::2]
        here = zip(*(table.split(self.cuts)[1::2] for table in tables), strict=True)
        masks = [self.mask] * len(sizes) if self.mask is None or self.mask.shape[0] == 1 else self.mask.split(sizes)
        read = [self._attended(q, mine, mask) for q, mine, mask in zip(query.split(sizes), here, masks, strict=True)]
        return read[0] if len(read) == 1 else torch.cat(read)

    def _attended(self, query_nH1X: Tensor, tables: Any, mask: Tensor | None) -> Tensor:
        if self.codes is None:
            return attend(query_nH1X, tables[0], tables[1], mask).flatten(1)
        if self.writes:
            return self._mixed(query_nH1X[:, :, 0], tables[0], tables[1], tables[2], mask).flatten(1)
        # Only the first C numbers of what is remembered are told, so only these are mixed.
        query_nHW, codes_nSW = query_nH1X[:, :, 0], tables[0][:, 0]
        score = torch.bmm(query_nHW * query_nHW.shape[-1] ** -0.5, codes_nSW.mT)
        weight = (score if mask is None else score.add_(mask[:, 0])).softmax(-1)
        return torch.bmm(weight, codes_nSW[..., : self.codes.width]).flatten(1)

    def _mixed(self, query_nHX: Tensor, table_n1SW: Tensor, keys_nGSK: Tensor, values_nGSK: Tensor, mask: Tensor | None) -> Tensor:
        """Return mixtures of codes and of rows side by side (n, H, C + K), whose weights are one softmax."""
        assert self.codes is not None and mask is not None
        groups, code, codes_nSW = keys_nGSK.shape[1], self.codes.width, table_n1SW[:, 0]
        far_nHW, near_nHK = (query_nHX * query_nHX.shape[-1] ** -0.5).split((codes_nSW.shape[-1], keys_nGSK.shape[-1]), dim=-1)
        far = torch.bmm(far_nHW, codes_nSW.mT)
        near = _products(near_nHK.unflatten(1, (groups, -1)), keys_nGSK.mT).flatten(1, 2)
        weight = torch.cat((far, near), dim=-1).add_(mask[:, 0]).softmax(-1)
        far, near = weight.split((far.shape[-1], near.shape[-1]), dim=-1)
        told = _products(near.unflatten(1, (groups, -1)), values_nGSK).flatten(1, 2)
        return torch.cat((torch.bmm(far, codes_nSW[..., :code]), told), dim=-1)


def _products(a_nGhX: Tensor, b_nGXY: Tensor) -> Tensor:
    """Return the matrix products (n, G, h, Y). No stride goes through rows and groups of a memory, so the fewer of them are looped over."""
    rows, groups = a_nGhX.shape[:2]
    across = 0 if rows <= groups else 1
    parts = [torch.bmm(a, b) for a, b in zip(a_nGhX.unbind(across), b_nGXY.unbind(across), strict=True)]
    return parts[0].unsqueeze(across) if len(parts) == 1 else torch.stack(parts, across)
