"""What a model writes through its cache, what it would write after the right answer so far, and how many bytes the cache takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Shapes: B rows, T tokens, left-padded, V vocabulary


PIECE = 512
"""Tokens of a prompt that are read at once."""


class CacheSize(NamedTuple):
    """What a cache took for one sequence."""

    held: float
    """Bytes of what is remembered when all has been read, as the model counts it; those of all tensors where it does not count."""
    allocated: float
    """Most bytes of tensors that the cache kept alive on the way, with room that is spare."""
    tokens: int
    """Tokens that have been read, padding included."""


def write_greedily(
    model: Any, prompts: Sequence[Sequence[int]], counts: Sequence[int], *, pad_id: int = 0, piece: int = PIECE
) -> tuple[list[list[int]], CacheSize]:
    """Continue each prompt by its number of tokens, always the likeliest, and say what the cache took.

    Prompts are read in pieces, so that a cache with a window never holds a whole one, then tokens one at a time, the last one too. Rows of
    one length need no padding, and the sizes are then those of a row alone.
    """
    longest, new = max(map(len, prompts)), max(counts)
    given = _padded(model, prompts, pad_id, more=new)
    reader = _Reader(model, given)
    stop = max(piece, longest - min(map(len, prompts)) + 1)  # the first piece has a token of every row
    while reader.read < longest:
        best_B = reader(given["input_ids"][:, reader.read : stop])
        stop += piece
    columns = []
    for _ in range(new):
        columns.append(best_B)
        best_B = reader(best_B[:, None])
    written = torch.stack(columns, dim=1).tolist()
    held = reader.cache.bytes() if hasattr(reader.cache, "bytes") else allocated_bytes(reader.cache)
    size = CacheSize(held / len(prompts), reader.allocated / len(prompts), reader.read)
    return [row[:count] for row, count in zip(written, counts, strict=True)], size


class _Reader:
    """Reads rows piece by piece with one cache, and watches how large that becomes."""

    def __init__(self, model: Any, given: dict[str, Tensor]) -> None:
        self._model, self._given, self._options = model, given, {"use_cache": True} | _kept(model, 1)
        self.cache: Any = None
        self.read = self.allocated = 0

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Read on, and return the likeliest next token of every row (B,)."""
        start, self.read = self.read, self.read + ids_BT.shape[1]
        part = {"input_ids": ids_BT}
        if "attention_mask" in self._given:
            part["attention_mask"] = self._given["attention_mask"][:, : self.read]
        if "position_ids" in self._given:
            part["position_ids"] = self._given["position_ids"][:, start : self.read]
        output = self._model(**part, past_key_values=self.cache, **self._options)
        self.cache = output.past_key_values
        self.allocated = max(self.allocated, allocated_bytes(self.cache))
        best_B: Tensor = output.logits[:, -1].argmax(dim=-1)
        return best_B


def forced_hits(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, pad_id: int = 0) -> list[list[bool]]:
    """Return, for each answer, which of its tokens are the likeliest after the right ones before them, in one forward pass."""
    most = max(map(len, answers))
    fed = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    best_BT = model(**_padded(model, fed, pad_id), **_kept(model, most)).logits[:, -most:].argmax(dim=-1).cpu()
    return [(best[most - len(answer) :] == torch.tensor(list(answer))).tolist() for best, answer in zip(best_BT, answers, strict=True)]


def allocated_bytes(cache: Any) -> int:
    """Return the bytes of all memory that a cache's tensors keep alive, memory that they share counted once."""
    storages: dict[tuple[str, int], int] = {}
    seen: set[int] = set()
    waiting = [cache]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (nn.Module, type)):  # a model that is referred to is no part of its cache
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[str(thing.device), storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, (list, tuple, set)):
            waiting += thing
        elif hasattr(thing, "__dict__"):
            waiting += vars(thing).values()
    return sum(storages.values())


def _kept(model: Any, count: int) -> dict[str, int]:
    """Ask for the logits of the last places only, where a model can be asked."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _padded(model: Any, rows: Sequence[Sequence[int]], pad_id: int, *, more: int = 0) -> dict[str, Tensor]:
    """Return rows padded on their left, and where they are, the mask and positions of their tokens and of `more` that will follow."""
    device = next(model.parameters()).device
    width = max(map(len, rows))
    padding = [width - len(row) for row in rows]
    ids_BT = torch.tensor([[pad_id] * empty + list(row) for empty, row in zip(padding, rows, strict=True)], device=device)
    if not any(padding):
        return {"input_ids": ids_BT}
    place_BT = torch.arange(width + more, device=device) - torch.tensor(padding, device=device)[:, None]
    given = {"input_ids": ids_BT, "attention_mask": (place_BT >= 0).long()}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = place_BT.clamp(min=0)
    return given
