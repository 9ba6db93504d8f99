"""Rows that are read and written together: their memory, and the mask and positions that rows of different length need."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

# Shapes: B rows, T new tokens, S tokens read so far (padding on the left included), V vocabulary

IDLE = 8
"""Columns that are padding in every row are taken away once they are one in so many."""


class Batch:
    """Rows of one model at work. Rows may leave (`select`) and, where the memory allows it, those of another batch may join.

    Shorter rows are padded on the left; what a row gives does not depend on its padding or its neighbours. `options` go to every forward
    pass.
    """

    def __init__(self, model: Any, options: dict[str, Any] | None = None, *, pad_token_id: int = 0):
        self._model, self._pad = model, pad_token_id
        self._accepted = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"use_cache": True} | (options or {})
        self._context = context_of(model)
        self._cache: Any = None
        self._length = 0
        self._start_B1 = torch.empty(0, 1, dtype=torch.long)
        self._padded = False

    @property
    def length(self) -> int:
        """S, the columns read so far: the longest row and what pads the others."""
        return self._length

    @property
    def can_select(self) -> bool:
        """Say whether rows may leave the batch."""
        return hasattr(self._cache, "batch_select_indices")

    @property
    def can_join(self) -> bool:
        """Say whether rows of another batch may join this one; a memory must know how, or hold keys and values of all tokens."""
        layers = getattr(self._cache, "layers", None) or [None]
        return all(hasattr(layer, "join") or type(layer) is DynamicLayer for layer in layers)

    def begin(self, prompts: Sequence[Sequence[int]], *, every: bool = False, **told: Any) -> Any:
        """Read the first tokens of every row; see `read`."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        rows = [[self._pad] * empty + list(prompt) for empty, prompt in zip(padding, prompts, strict=True)]
        self._start_B1 = torch.tensor(padding, device=self._model.device)[:, None]
        self._padded = any(padding)
        return self.read(torch.tensor(rows, device=self._model.device), every=every, **told)

    def advance(self, token_B: Tensor) -> Tensor:
        """Read one more token per row and return the logits (B, V) after it."""
        logits_BV: Tensor = self.read(token_B[:, None]).logits[:, -1]
        return logits_BV

    def read(self, ids_BT: Tensor, *, every: bool = False, **told: Any) -> Any:
        """Read more tokens of every row; return the model's output, its logits those of the last token or of `every` one.

        `told` goes to this one pass besides the batch's options.
        """
        self._length += ids_BT.shape[1]
        given: dict[str, Any] = self._options | told
        if "logits_to_keep" in self._accepted and not every:
            given["logits_to_keep"] = 1
        if self._padded:
            column_S = torch.arange(self._length, device=ids_BT.device)
            given["attention_mask"] = (column_S >= self._start_B1).long()
            if "position_ids" in self._accepted:
                # A row that has ended may still stand in the batch: its places mean nothing, but must exist.
                last = (self._context or self._length) - 1
                given["position_ids"] = (column_S[-ids_BT.shape[1] :] - self._start_B1).clamp_(min=0, max=last)
        output = self._model(input_ids=ids_BT, past_key_values=self._cache, **given)
        self._cache = output.past_key_values
        return output

    def select(self, index: Tensor) -> None:
        """Keep only these rows."""
        self._cache.batch_select_indices(index)
        self._start_B1 = self._start_B1[index]
        self._trim()

    def join(self, other: Batch) -> None:
        """Take the rows of `other` in, after the own ones; `other` is used up. Both read the same model with the same options."""
        length = max(self._length, other._length)
        for mine, theirs in zip(self._cache.layers, other._cache.layers, strict=True):
            if hasattr(mine, "join"):
                mine.join(theirs)
            else:
                mine.keys, mine.values = (_below(*both) for both in ((mine.keys, theirs.keys), (mine.values, theirs.values)))
        starts = [batch._start_B1 + (length - batch._length) for batch in (self, other)]
        self._start_B1, self._length = torch.cat(starts), length
        self._padded = bool(self._start_B1.any())
        self._trim()

    def _trim(self) -> None:
        """Take away columns that are padding in every row, where they are many: rows that join go on without end."""
        if not self._padded or not self.can_join:
            return
        idle = int(self._start_B1.min()) if len(self._start_B1) else 0
        if idle * IDLE < self._length:
            return
        for layer in self._cache.layers:
            if hasattr(layer, "trim"):
                layer.trim(idle)
            else:
                layer.keys, layer.values = layer.keys[..., idle:, :], layer.values[..., idle:, :]
        self._length -= idle
        self._start_B1 = self._start_B1 - idle
        self._padded = bool(self._start_B1.any())


def context_of(model: Any) -> int | None:
    """Return how many tokens the model can hold, `max_position_embeddings`; None where its configuration names no limit."""
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    return limit


def _below(mine: Tensor, theirs: Tensor) -> Tensor:
    """Return the keys or values (B, H, S, K) of two batches as those of one, the shorter ones padded on the left."""
    columns = max(mine.shape[-2], theirs.shape[-2])
    return torch.cat([F.pad(rows, (0, 0, columns - rows.shape[-2], 0)) for rows in (mine, theirs)])
