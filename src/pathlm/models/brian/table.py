"""What tokens in a pool read: rows of keys and values that visits rewrite, codes that are written once, or newest rows and older codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pathlm.models.brian.codes import CodeRows, Codes, joined_rows, read_codes
from pathlm.models.brian.grouping import Pick, spread
from pathlm.models.brian.memory import PoolMemory
from pathlm.models.brian.reads import Reads
from pathlm.models.brian.sight import Sight
from pathlm.models.layers import attend

# Shapes: B rows, T tokens, N = B · T, n tokens still in the pool in the order of their places, H heads, G key/value heads, K head width,
# W numbers remembered as a code, X = K where only rows are read, W where only codes are, W + K where both are, S tokens attended, Q queries
# per row


@dataclass(frozen=True)
class Surroundings:
    """What the blocks of a pool see beside the tokens themselves."""

    rotary: tuple[Tensor, Tensor]
    sight: Sight
    memory: PoolMemory | None = None
    codes: Codes | None = None
    """What reads codes, where the pool does"""
    code_rows: CodeRows | None = None
    reads: Reads | None = None
    """What counts how much is read of codes"""
    window: int = 0
    """How many newest tokens are read where there are rows and no codes; 0 is all"""
    recompute: bool = False
    """Compute the inside of blocks again in the backward pass."""


class Table:
    """The rows and codes of B · T new tokens and of those before them, as they are after the step at hand."""

    def __init__(self, around: Surroundings, h_BTD: Tensor, *, groups: int, width: int) -> None:
        self.around, (self.rows, self.tokens) = around, h_BTD.shape[:2]
        self.width, self.codes = width, around.codes
        self._local: tuple[Tensor, Tensor] | None = None
        if around.memory is not None:
            around.memory.extend(h_BTD.new_empty(()).expand(self.rows, groups, self.tokens, width))
        if self.codes is None:
            self.mask = row_mask(around)
        elif groups:
            self.mask = torch.cat(mixed_masks(around, h_BTD.dtype), dim=-1)
        else:
            self.mask = code_mask(self.codes, around.code_rows, around.sight)

    def rewrite(self, step: int, key: Tensor, value: Tensor) -> None:
        """Rewrite the rows of all new tokens (B, G, T, K)."""
        if self.around.memory is None:
            self._local = (key, value)
            return
        self.around.memory.write(step, key, value)
        self._local = self.around.memory.version(step, key.shape[1])

    def rewrite_some(self, step: int, key_nGK: Tensor, value_nGK: Tensor, place: Tensor) -> None:
        """Rewrite the rows of the tokens at `place` (n,)."""
        if self.around.memory is not None:
            self.around.memory.write_some(step, place // self.tokens, self.slot(place), key_nGK, value_nGK)
            self._local = self.around.memory.version(step, key_nGK.shape[1])
            return
        assert self._local is not None  # everybody visits a block in the first step
        shape = (self.rows, self.tokens)
        flat = [
            table.transpose(1, 2).flatten(0, 1).index_copy(0, place, rows)
            for table, rows in zip(self._local, (key_nGK, value_nGK), strict=True)
        ]
        self._local = (flat[0].unflatten(0, shape).transpose(1, 2), flat[1].unflatten(0, shape).transpose(1, 2))

    def now(self) -> tuple[Tensor, Tensor]:
        """Return what can be read at this step: keys and values (B, G, S, X)."""
        if self.codes is None:
            assert self._local is not None
            return self._local
        assert self.around.code_rows is not None
        rows = self.around.code_rows.rows_B1SW
        return (rows, rows) if self._local is None else joined_rows(rows, *self._local)

    def read(self, query_BHTX: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return what all new tokens read (N, H · X)."""
        return self._attend(query_BHTX, keys, values, self.mask).transpose(1, 2).flatten(2).flatten(0, 1)

    def read_some(self, query_nHX: Tensor, keys: Tensor, values: Tensor, place: Tensor) -> Tensor:
        """Return what the tokens at `place` read (n, H · X)."""
        n, heads, width = query_nHX.shape
        flat_nX, mask = query_nHX.flatten(1), self.mask
        if self.tokens == 1:
            return self._read_rows(query_nHX, keys, values, place.tolist())
        if 2 * n > self.rows * self.tokens:
            # Queries of tokens that have left are zeros: cheaper than leaving the order in which no mask is needed.
            per_row, slot = self.tokens, place
        else:
            per_row, slot, when_BQ = self._compacted(place)
            if mask is None:
                past = keys.shape[2] - self.tokens
                mask = (torch.arange(keys.shape[2], device=place.device) <= past + when_BQ[..., None])[:, None]
            else:
                index = when_BQ[..., None].expand(-1, -1, mask.shape[-1])
                mask = mask[:, 0].expand(self.rows, -1, -1).gather(1, index)[:, None]
        query = spread(flat_nX, slot, self.rows * per_row).view(self.rows, per_row, heads, width).transpose(1, 2)
        read = self._attend(query, keys, values, mask).transpose(1, 2).flatten(2).flatten(0, 1)
        return Pick.apply(read, slot)

    def read_with_own(
        self, query_nHX: Tensor, keys: Tensor, values: Tensor, place: Tensor, own_key_nGK: Tensor, own_value_nGK: Tensor
    ) -> Tensor:
        """Return what the tokens at `place` read of a table in which their own rows are these instead (n, H · X)."""
        heads, width = query_nHX.shape[1:]
        groups, code = keys.shape[1], width - self.width
        own_key, own_value = (F.pad(own, (code, 0)).repeat_interleave(heads // groups, 1) for own in (own_key_nGK, own_value_nGK))
        flat = spread(query_nHX.flatten(1), place, self.rows * self.tokens)
        query = flat.view(self.rows, self.tokens, groups, heads // groups, width).permute(0, 2, 3, 1, 4)
        score = torch.einsum("bghtx,bgsx->bghts", query, keys) * width**-0.5
        mask = self.mask
        if mask is None:
            seen = keys.shape[2] - self.tokens + torch.arange(self.tokens, device=place.device)[:, None]
            mask = (torch.arange(keys.shape[2], device=place.device) <= seen)[None, None]
        score = score.masked_fill(~mask[:, :, None], -torch.inf) if mask.dtype == torch.bool else score + mask[:, :, None]
        score = score.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)[place]  # (n, H, S)
        held = self.tokens if self.around.memory is None else self.around.memory.held
        column = keys.shape[2] - held + (self.slot(place) if self.around.memory is not None else place % self.tokens)
        row = place // self.tokens
        bias = score.new_zeros(len(place))
        if mask.dtype != torch.bool:
            bias = mask.expand(self.rows, -1, -1, -1)[row, 0, place % self.tokens, column]
        at = column[:, None, None].expand(-1, heads, 1)
        own_score = (query_nHX * own_key).sum(-1) * width**-0.5 + bias[:, None]
        # Autocast makes products narrow and sums wide.
        weight = score.to(own_score.dtype).scatter(-1, at, own_score[..., None]).softmax(-1)
        grid = weight.new_zeros(self.rows * self.tokens, *weight.shape[1:]).index_copy(0, place, weight)
        grid = grid.view(self.rows, self.tokens, groups, heads // groups, -1).permute(0, 2, 3, 1, 4)
        read = torch.einsum("bghts,bgsx->bghtx", grid, values).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)[place]
        shared = values.transpose(1, 2)[row, column].repeat_interleave(heads // groups, 1)
        return (read + weight.gather(-1, at) * (own_value - shared)).flatten(1)

    def heard(self, reader: int, read_nX: Tensor) -> Tensor:
        """Return what a block's heads make of what they have read (n, H · X), as mixtures of values (n, H · K)."""
        if self.codes is None:
            return read_nX
        return self.codes.heard(reader, read_nX.unflatten(1, (self.codes.heads, -1)), with_rows=self._local is not None)

    def slot(self, place: Tensor) -> Tensor:
        """Return the columns of the memory in which the tokens at `place` stand."""
        assert self.around.memory is not None
        return place % self.tokens + self.around.memory.held - self.tokens

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        if self.around.reads is not None and self.codes is not None:
            assert self.around.code_rows is not None
            self.around.reads.count(query, keys, mask, codes=self.around.code_rows.rows_B1SW.shape[2])
        return read_codes(query, keys, mask) if self._local is None else attend(query, keys, values, mask)

    def _read_rows(self, query_nHX: Tensor, keys: Tensor, values: Tensor, rows: list[int]) -> Tensor:
        """Read for one new token in each of some batch rows, without copying their memory: neighbouring rows together."""
        parts, start = [], 0
        for i in range(1, len(rows) + 1):
            if i == len(rows) or rows[i] != rows[i - 1] + 1:
                run = slice(rows[start], rows[i - 1] + 1)
                seen = self.mask if self.mask is None or self.mask.shape[0] == 1 else self.mask[run]
                parts.append(self._attend(query_nHX[start:i, :, None], keys[run], values[run], seen)[:, :, 0].flatten(1))
                start = i
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _compacted(self, place: Tensor) -> tuple[int, Tensor, Tensor]:
        """Push each row's tokens together: returns the longest row Q, slots (n,) among B · Q, and the time of each slot (B, Q)."""
        present = torch.zeros(self.rows * self.tokens, dtype=torch.long, device=place.device)
        present[place] = 1
        present_BT = present.view(self.rows, self.tokens)
        rank = (present_BT.cumsum(1) - 1).flatten()[place]
        per_row = int(present_BT.sum(1).max())
        slot = place // self.tokens * per_row + rank
        when = torch.zeros(self.rows * per_row, dtype=torch.long, device=place.device)
        when[slot] = place % self.tokens
        return per_row, slot, when.view(self.rows, per_row)


def row_mask(around: Surroundings) -> Tensor | None:
    """Return which rows tokens see that read nothing else (B, 1, T, S); None where they see those of all tokens up to them."""
    return around.sight.within(around.window, 0, None if around.memory is None else around.memory.slots(0))


def code_mask(codes: Codes, rows: CodeRows | None, sight: Sight) -> Tensor | None:
    """Return which codes tokens see that read nothing else (B, 1, T, S); None where they see those of all tokens up to them."""
    return sight.within(codes.config.code_window, codes.config.code_sinks, None if rows is None else rows.slots)


def mixed_masks(around: Surroundings, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return who reads which codes (B, 1, T, S) and which rows (B, 1, T, S'): as bools, or where rows fade, as what is added to scores."""
    sight, codes, code_rows = around.sight, around.codes, around.code_rows
    assert codes is not None and code_rows is not None
    config, (window, share), every = codes.config, codes.reach, sight.past + sight.tokens
    slots, row_slots = code_rows.slots, None if around.memory is None else around.memory.slots(0)
    as_codes = sight.within(config.code_window or every, config.code_sinks, slots)
    near = sight.within(window or every, 0, slots)
    as_rows = near if row_slots is slots else sight.within(window or every, 0, row_slots)
    assert as_codes is not None and near is not None and as_rows is not None
    if share == 1:
        return as_codes & ~near, as_rows
    code, row = torch.tensor([1 - share, share], dtype=dtype, device=sight.device).log()
    never = torch.full_like(code, -torch.inf)
    return torch.where(as_codes, torch.where(near, code, 0.0), never), torch.where(as_rows, row, never)
