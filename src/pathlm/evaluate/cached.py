"""What a model writes through its cache, what it would write after the right answer so far, and how many bytes the cache takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Shapes: B rows, T tokens, left-padded, V vocabulary


class CacheSize(NamedTuple):
    """What a cache took for one sequence at its largest."""

    held: float
    """Bytes of what is remembered, as the model counts it; those of all tensors where it does not count."""
    allocated: float
    """Bytes of all tensors that the cache keeps alive, with room that is spare."""
    tokens: int
    """Tokens that had been read by then, padding included."""


def write_greedily(
    model: Any, prompts: Sequence[Sequence[int]], counts: Sequence[int], *, pad_id: int = 0
) -> tuple[list[list[int]], CacheSize]:
    """Continue each prompt by its number of tokens, always the likeliest, read one at a time with the cache; also say what the cache took.

    Rows of one length need no padding, and the sizes are then those of a row alone.
    """
    device = next(model.parameters()).device
    rest, longest = max(counts) - 1, max(map(len, prompts))
    options = {"use_cache": True} | _kept(model, 1)
    output = model(**_padded(model, prompts, pad_id, device), **options)
    columns = [output.logits[:, -1].argmax(dim=-1)]
    sizes = [cache_size(output.past_key_values, rows=len(prompts), tokens=longest)]
    for step in range(1, rest + 1):
        later = _padded(model, prompts, pad_id, device, more=step) | {"input_ids": columns[-1][:, None]}
        output = model(**later, past_key_values=output.past_key_values, **options)
        columns.append(output.logits[:, -1].argmax(dim=-1))
    if rest:
        sizes.append(cache_size(output.past_key_values, rows=len(prompts), tokens=longest + rest))
    written = torch.stack(columns, dim=1).tolist()
    return [row[:count] for row, count in zip(written, counts, strict=True)], max(sizes)


def forced_hits(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, pad_id: int = 0) -> list[list[bool]]:
    """Return, for each answer, which of its tokens are the likeliest after the right ones before them, in one forward pass."""
    device = next(model.parameters()).device
    most = max(map(len, answers))
    fed = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    best_BT = model(**_padded(model, fed, pad_id, device), **_kept(model, most)).logits[:, -most:].argmax(dim=-1).cpu()
    return [(best[most - len(answer) :] == torch.tensor(list(answer))).tolist() for best, answer in zip(best_BT, answers, strict=True)]


def cache_size(cache: Any, *, rows: int, tokens: int) -> CacheSize:
    """Count the bytes of a cache, a row's share of them."""
    allocated = allocated_bytes(cache)
    held = cache.bytes() if hasattr(cache, "bytes") else allocated
    return CacheSize(held / rows, allocated / rows, tokens)


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


def _padded(model: Any, rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, *, more: int = 0) -> dict[str, Tensor]:
    """Return rows padded on their left, and the mask and the positions that padding needs.

    With `more` tokens that follow, the mask is that of all tokens and the positions are those of the newest one.
    """
    width = max(map(len, rows))
    padding = [width - len(row) for row in rows]
    if not any(padding):
        return {"input_ids": torch.tensor([list(row) for row in rows], device=device)}
    ids_BT = torch.tensor([[pad_id] * empty + list(row) for empty, row in zip(padding, rows, strict=True)], device=device)
    place_BT = torch.arange(width + more, device=device) - torch.tensor(padding, device=device)[:, None]
    given = {"input_ids": ids_BT, "attention_mask": (place_BT >= 0).long()}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (place_BT[:, -1:] if more else place_BT).clamp(min=0)
    return given
