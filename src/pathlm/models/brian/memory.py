"""What a model remembers of the tokens it has read: key and value rows, in buffers that grow by half instead of one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.brian.sight import needed

# Shapes: B rows, H key/value heads, T new tokens, S tokens remembered, P tokens read before, C capacity, K head width, W width of codes
# In a pool: G heads of one version, R versions, n single tokens

SMALLEST = 64
"""Tokens a new buffer has room for at least."""
SPARE = 24
"""Tokens kept beyond a window, so that `crop` can take back what was read last."""


class BlockMemory(DynamicLayer):
    """Keys and values (B, H, S, K) of one block. `keys` and `values` are views of buffers with spare room.

    With a `window`, tokens that neither it nor the first `sinks` of their document hold are forgotten, many at a time.
    """

    def __init__(self, window: int = 0, sinks: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.window, self.sinks = window, sinks
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._length = self._forgotten = 0
        self._slots: Tensor | None = None

    def slots(self, tokens: int) -> Tensor | None:
        """Return which tokens (S + T,) the remembered ones and `tokens` new ones are; None where nothing has been forgotten."""
        if self._slots is None:
            return None
        past = self.get_seq_length()
        return torch.cat((self._slots, torch.arange(past, past + tokens, device=self._slots.device)))

    def forget(self, segment_BS: Tensor | None) -> None:
        """Forget what later tokens will not see, when that is more than what they may see. `segment_BS` are the documents' numbers.

        That is done when a quarter more than these has come, so that few rows are moved for each token read.
        """
        seen = self.window + self.sinks
        limit = seen + SPARE + max(SPARE, seen // 4)
        if not self.window or self._buffers is None or self._length < limit:
            return
        past = self.get_seq_length()
        slots = self.slots(0)
        if slots is None:
            slots = torch.arange(past, device=self._buffers[0].device)
        index = needed(past, segment_BS, slots, window=self.window + SPARE, sinks=self.sinks)
        shape = self._buffers[0].shape
        room = max(limit, len(index))
        fresh = [buffer.new_empty(*shape[:2], room, buffer.shape[-1]) for buffer in self._buffers]
        for buffer, target in zip(self._buffers, fresh, strict=True):
            target[:, :, : len(index)] = buffer.index_select(2, index)
        self._buffers, self._slots, self._forgotten = (fresh[0], fresh[1]), slots[index], past - len(index)
        self._show(len(index))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values (B, H, T, K) and return all of them (B, H, S, K)."""
        start, stop = self._length, self._length + key_states.shape[2]
        self._slots = self.slots(key_states.shape[2])
        keys, values = self._room_for(key_states, value_states, stop)
        keys[:, :, start:stop] = key_states
        values[:, :, start:stop] = value_states
        return self._show(stop)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember where the tensors live; buffers are made by the first update."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Return P, the number of tokens read, forgotten ones included."""
        return self._length + self._forgotten

    @property
    def held(self) -> int:
        """S, the number of tokens remembered."""
        return self._length

    @property
    def capacity(self) -> int:
        """How many tokens the buffers have room for."""
        return 0 if self._buffers is None else self._buffers[0].shape[2]

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self._buffers = None
        self._length, self._forgotten, self._slots, self.is_initialized = 0, 0, None, False

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the last `-tokens_to_remove` tokens (a tensor in some versions of transformers)."""
        self.check_crop(int(tokens_to_remove))
        if self._buffers is None:
            return
        length = max(self._length + int(tokens_to_remove), 0)
        self._slots = None if self._slots is None else self._slots[:length]
        self._show(length)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise `ValueError` where `crop` cannot take back so many tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: give the number of tokens to forget as a negative number")
        if self._slots is None:
            return
        past = self.get_seq_length() + tokens_to_remove
        needs = torch.arange(max(past - self.window, 0), max(past, 0), device=self._slots.device)
        if past < self.window or not torch.isin(needs, self._slots[: max(self._length + tokens_to_remove, 0)]).all():
            rule = f"a window of {self.window} has forgotten what a text of {max(past, 0)} tokens needs"
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: {rule}")

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

    def join(self, other: BlockMemory) -> None:
        """Take in the rows of `other`, after the own ones; rows of which less was read are padded on the left."""
        assert self._buffers is not None and other._buffers is not None
        past = max(self.get_seq_length(), other.get_seq_length())
        places = [memory._places() + (past - memory.get_seq_length()) for memory in (self, other)]
        slots = torch.cat(places).unique()
        columns = [torch.searchsorted(slots, place) for place in places]
        capacity = max(SMALLEST, len(slots) + len(slots) // 2)
        fresh = []
        for mine, theirs in zip(self._buffers, other._buffers, strict=True):
            # What is not read must be a number all the same: a weight of zero makes none of what is none.
            buffer = mine.new_zeros(mine.shape[0] + theirs.shape[0], mine.shape[1], capacity, mine.shape[3])
            buffer[: mine.shape[0], :, columns[0]] = mine[:, :, : self._length]
            buffer[mine.shape[0] :, :, columns[1]] = theirs[:, :, : other._length]
            fresh.append(buffer)
        self._buffers, self._slots = (fresh[0], fresh[1]), None if len(slots) == past else slots
        self._forgotten = past - len(slots)
        self._show(len(slots))

    def trim(self, tokens: int) -> None:
        """Take away the first `tokens` tokens, which are padding in every row."""
        if self._buffers is None:
            return
        kept, past = self._places() >= tokens, self.get_seq_length() - tokens
        slots = self._places()[kept] - tokens
        first = self._length - len(slots)
        self._buffers = (self._buffers[0][:, :, first:].clone(), self._buffers[1][:, :, first:].clone())
        self._slots, self._forgotten = None if len(slots) == past else slots, past - len(slots)
        self._show(len(slots))

    def _places(self) -> Tensor:
        """Return which of the tokens read (S,) are remembered."""
        assert self._buffers is not None
        return torch.arange(self._length, device=self._buffers[0].device) if self._slots is None else self._slots

    def offload(self) -> None:
        """Refuse: the memory stays where the model is."""
        raise ValueError("cache offloading is not available for this model's memory; generate without it")

    def _room_for(self, keys_BHTK: Tensor, values_BHTK: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return buffers (B, H, C, K) with C ≥ `length`, moving what they hold into larger ones where needed."""
        if not self.is_initialized:
            self.lazy_initialization(keys_BHTK, values_BHTK)
        if self._buffers is None or self._buffers[0].shape[2] < length:
            capacity = max(SMALLEST, length + length // 2)
            fresh = tuple(t.new_empty(*t.shape[:2], capacity, t.shape[3]) for t in (keys_BHTK, values_BHTK))
            if self._buffers is not None:
                for old, new in zip(self._buffers, fresh, strict=True):
                    new[:, :, : self._length] = old[:, :, : self._length]
            self._buffers = (fresh[0], fresh[1])
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

    def __init__(self, versions: int, window: int = 0) -> None:
        super().__init__(window)
        self.versions = versions

    def extend(self, key_BGTK: Tensor) -> None:
        """Make room for T more tokens, whose rows the steps then write; `key_BGTK` says how rows look."""
        batch, groups, tokens, width = key_BGTK.shape
        stop = self._length + tokens
        self._slots = self.slots(tokens)
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
            buffer[row_n, step:, :, slot_n] = rows[:, None].to(buffer.dtype)  # values stay narrow under autocast

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


class CodeMemory(BlockMemory):
    """Codes and the keys that know their place (B, 1, S, W), one row per token for all blocks that read them."""

    def add(self, rows_B1TW: Tensor) -> Tensor:
        """Append what is remembered of T new tokens and return the rows of all."""
        return self.update(rows_B1TW, rows_B1TW[..., :0])[0]


class BrianCache(Cache):
    """The memory of every block, as transformers' `Cache`: `model(..., use_cache=True)` makes one when it is given none.

    The layers are those of the blocks before the pool, of the pool's rows and of its codes as far as it has them, and of the blocks after
    it unless they read codes.
    """

    def __init__(self, config: BrianConfig, *, local_window: int = 0) -> None:
        pool: list[BlockMemory] = [PoolMemory(config.max_route_steps, local_window)] if config.remembers_rows else []
        pool += [CodeMemory(config.code_window, config.code_sinks)] if config.remembers_codes else []
        count = 0 if config.post_memory == "canonical" else config.post_blocks
        before, after = (
            [BlockMemory(config.attention_window, config.attention_sinks) for _ in range(n)] for n in (config.pre_blocks, count)
        )
        super().__init__(layers=[*before, *pool, *after])

    def forget(self, segment_BS: Tensor | None) -> None:
        """Forget what no later token will see; documents (B, P) are numbered as in a forward pass."""
        for layer in self.layers:
            layer.forget(segment_BS)  # type: ignore[union-attr]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens in every layer, or, where one cannot, in none."""
        for layer in self.layers:
            layer.check_crop(int(tokens_to_remove))  # type: ignore[union-attr]
        super().crop(tokens_to_remove)

    def bytes(self) -> int:
        """Return how many bytes the remembered keys, values and codes take, without spare room."""
        held = [t for layer in self.layers for t in (layer.keys, layer.values) if t is not None]  # type: ignore[union-attr]
        return sum(t.numel() * t.element_size() for t in held)
