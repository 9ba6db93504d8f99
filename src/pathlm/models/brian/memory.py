"""What a model remembers of the tokens it has read: key and value rows, in buffers that grow by half instead of one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from pathlm.models.brian.configuration import BrianConfig

# Shapes: B rows, H key/value heads, T new tokens, S tokens in all, C capacity, K head width
# In a pool: G heads of one version, R versions, n single tokens

SMALLEST = 64
"""Tokens a new buffer has room for at least."""


class BlockMemory(DynamicLayer):
    """Keys and values (B, H, S, K) of one block. `keys` and `values` are views of buffers with spare room."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values (B, H, T, K) and return all of them (B, H, S, K)."""
        start, stop = self._length, self._length + key_states.shape[2]
        keys, values = self._room_for(key_states, value_states, stop)
        keys[:, :, start:stop] = key_states
        values[:, :, start:stop] = value_states
        return self._show(stop)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember where the tensors live; buffers are made by the first update."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Return S, the number of tokens remembered."""
        return self._length

    @property
    def capacity(self) -> int:
        """How many tokens the buffers have room for."""
        return 0 if self._buffers is None else self._buffers[0].shape[2]

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self._buffers = None
        self._length, self.is_initialized = 0, False

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the last `-tokens_to_remove` tokens (a tensor in some versions of transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: give the number of tokens to forget as a negative number")
        if self._buffers is not None:
            self._show(max(self._length + int(tokens_to_remove), 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows in the order `beam_idx` (B',)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies beside each other."""
        if self._buffers is not None:
            rows = torch.arange(self._buffers[0].shape[0], device=self._buffers[0].device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (B',), in that order, repeated where the index is."""
        if self._buffers is None:
            return
        indices = torch.as_tensor(indices, device=self._buffers[0].device)
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        fresh = [buffer.new_empty(rows.numel(), *buffer.shape[1:]) for buffer in self._buffers]
        for buffer, target in zip(self._buffers, fresh, strict=True):
            target[:, :, : self._length] = buffer[:, :, : self._length].index_select(0, rows)
        self._buffers = (fresh[0], fresh[1])
        self._show(self._length)

    def offload(self) -> None:
        """Refuse: the memory stays where the model is."""
        raise ValueError("cache offloading is not available for this model's memory; generate without it")

    def _room_for(self, keys_BHTK: Tensor, values_BHTK: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return buffers (B, H, C, K) with C ≥ `length`, moving what they hold into larger ones where needed."""
        if not self.is_initialized:
            self.lazy_initialization(keys_BHTK, values_BHTK)
        if self._buffers is None or self._buffers[0].shape[2] < length:
            batch, heads, _, width = keys_BHTK.shape
            capacity = max(SMALLEST, length + length // 2)
            fresh = (keys_BHTK.new_empty(batch, heads, capacity, width), values_BHTK.new_empty(batch, heads, capacity, width))
            if self._buffers is not None:
                for old, new in zip(self._buffers, fresh, strict=True):
                    new[:, :, : self._length] = old[:, :, : self._length]
            self._buffers = fresh
        return self._buffers

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        """Let `keys` and `values` be the first `length` tokens of the buffers."""
        assert self._buffers is not None
        keys, values = self._buffers
        self._length, self.keys, self.values = length, keys.narrow(2, 0, length), values.narrow(2, 0, length)
        return self.keys, self.values


@dataclass(frozen=True)
class NewestRows:
    """The rows of the newest token of every batch row, to be written step by step, and the tables in which they are read."""

    key_BRG1K: Tensor
    value_BRG1K: Tensor
    keys: Sequence[Tensor]
    """For every version (B, G, S, K)"""
    values: Sequence[Tensor]

    def write(self, step: int, row_n: Tensor | None, key_nG1K: Tensor, value_nG1K: Tensor) -> None:
        """Write version `step`: of these batch rows (n,), None for all, the new rows, of the others those of the version before."""
        for version_BRG1K, rows in ((self.key_BRG1K, key_nG1K), (self.value_BRG1K, value_nG1K)):
            if row_n is not None:
                rows = version_BRG1K[:, step - 1].index_copy(0, row_n, rows)
            version_BRG1K.select(1, step).copy_(rows)

    def settle(self, steps: int) -> None:
        """Let the versions after the last of all steps be as that one."""
        later = self.key_BRG1K.shape[1] - steps
        if later:
            for now_BRG1K in (self.key_BRG1K, self.value_BRG1K):
                now_BRG1K.narrow(1, steps, later).copy_(now_BRG1K.narrow(1, steps - 1, 1))


class PoolMemory(BlockMemory):
    """The table of a pool: for every token one row of keys and values per route step, as it was after that step.

    A visit at step r writes the versions r and later, so a token that leaves is seen by later steps with its last row. Version r lies in
    the heads r · G … (r + 1) · G - 1 of `keys` and `values` (B, R · G, S, K).
    """

    def __init__(self, versions: int) -> None:
        super().__init__()
        self.versions = versions

    def extend(self, key_BGTK: Tensor) -> None:
        """Make room for T more tokens, whose rows the steps then write; `key_BGTK` says how rows look."""
        batch, groups, tokens, width = key_BGTK.shape
        stop = self._length + tokens
        if self.capacity < stop:
            like = key_BGTK.new_empty(()).expand(batch, self.versions * groups, tokens, width)
            self._room_for(like, like, stop)
        self._show(stop)

    def write(self, step: int, key_BGTK: Tensor, value_BGTK: Tensor) -> None:
        """Write the rows of the newest T tokens."""
        tokens = key_BGTK.shape[2]
        for buffer, rows in zip(self._by_version(key_BGTK.shape[1]), (key_BGTK, value_BGTK), strict=True):
            buffer[:, step:, :, self._length - tokens : self._length] = rows[:, None]

    def write_some(self, step: int, row_n: Tensor, slot_n: Tensor, key_nGK: Tensor, value_nGK: Tensor) -> None:
        """Write the rows of single tokens, each given by its place (batch row, token)."""
        for buffer, rows in zip(self._by_version(key_nGK.shape[1]), (key_nGK, value_nGK), strict=True):
            buffer[row_n, step:, :, slot_n] = rows[:, None]

    def version(self, step: int, groups: int) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, G, S, K) as they are after step `step`."""
        assert self.keys is not None and self.values is not None
        heads = slice(step * groups, (step + 1) * groups)
        return self.keys[:, heads], self.values[:, heads]

    def newest(self, key_BGTK: Tensor) -> NewestRows:
        """Make room for one more token per row, and return its rows beside those of all tokens; `key_BGTK` says how they look."""
        self.extend(key_BGTK)
        stop, views = self._length, []
        for buffer in self._by_version(key_BGTK.shape[1]):
            views.append((buffer.narrow(3, stop - 1, 1), buffer.narrow(3, 0, stop).unbind(1)))
        (key_now, keys), (value_now, values) = views
        return NewestRows(key_now, value_now, keys, values)

    def _by_version(self, groups: int) -> tuple[Tensor, ...]:
        assert self._buffers is not None
        batch, _, capacity, width = self._buffers[0].shape
        return tuple(buffer.view(batch, self.versions, groups, capacity, width) for buffer in self._buffers)


class BrianCache(Cache):
    """The memory of every block, as transformers' `Cache`: `model(..., use_cache=True)` makes one when it is given none.

    The layers are those of the blocks before the pool, of the pool where there is one, and of the blocks after it.
    """

    def __init__(self, config: BrianConfig) -> None:
        pool = [PoolMemory(config.max_route_steps)] if config.pool_blocks else []
        before, after = ([BlockMemory() for _ in range(count)] for count in (config.pre_blocks, config.post_blocks))
        super().__init__(layers=[*before, *pool, *after])

    def bytes(self) -> int:
        """Return how many bytes the remembered keys and values take, without spare room."""
        held = [t for layer in self.layers for t in (layer.keys, layer.values) if t is not None]  # type: ignore[union-attr]
        return sum(t.numel() * t.element_size() for t in held)
