"""What `pathlm bench memory` measures: models with each memory, the bytes that a cache has allocated, and a stream in one process.

Run as a program it reads one stream: `python -m benchmarks.remembered '{"size": "cpu", …}'`, see `streamed`.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.routed import ENDS, POOL, SIZES, Case, resident
from pathlm.models.library import build, preset

PLAIN, LOCAL, CANONICAL, EVERYWHERE = "plain", "local", "canonical", "canonical, post blocks too"
MIXED, MIXED_EVERYWHERE = "local+canonical, window {}", "local+canonical, window {}, post blocks too"
REPLACED = {"vocab_size": 64, "intermediate_size": 16}
"""Fields of a model on which its cache does not depend, smaller than they are, so that counting takes seconds."""


@dataclass(frozen=True)
class Extent:
    """How much is read and written. The bytes of a cache and prefill are those of `counted`; training and decoding those of `trained`."""

    counted: tuple[str, str]
    """Presets: a plain decoder and a routed model of its size"""
    fields: dict[str, Any]
    """What replaces fields of both"""
    trained: str
    """A size of `routed.SIZES`"""
    text: int
    """Tokens of which a cache's bytes are counted"""
    prompt: int
    """Tokens of a prefill"""
    contexts: tuple[int, ...]
    """Tokens before those that are decoded"""
    stream: tuple[int, ...]
    """Tokens after which a stream's memory is looked at"""
    narrow: dict[str, Any]
    """What replaces fields of the model that is trained where it reads a stream"""
    chunk: int
    """Tokens that a stream reads at once"""
    window: int
    """Of rows, in `local+canonical`; in a stream, and of codes and in all other blocks there, four times as many"""


_TINY = SIZES["tiny"].fields
_NARROW = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 2}
_STREAM = (10_000, 50_000, 100_000)
EXTENTS = {
    "cpu": Extent(("plain-125m", "brian-r125"), {}, "cpu", 2_048, 4_096, (512, 4_096), _STREAM, _NARROW, 500, 64),
    "cuda": Extent(("plain-125m", "brian-r125"), {}, "cuda", 2_048, 4_096, (512, 4_096), _STREAM, {}, 500, 64),
    "tiny": Extent(("plain-tiny", "brian-tiny"), _TINY, "tiny", 768, 24, (5, 70), (300, 600, 900), {}, 50, 64),
}
_SHAPE = {"pre_blocks": ENDS[0], "pool_blocks": POOL, "post_blocks": ENDS[1], "max_route_steps": POOL, "block_position_dim": 64}


def memories(window: int) -> dict[str, dict[str, Any]]:
    """The fields of routed models with each memory, with the default compression of codes."""
    mixed = {"memory": "local+canonical", "local_window": window}
    return {
        LOCAL: {},
        CANONICAL: {"memory": "canonical"},
        EVERYWHERE: {"memory": "canonical", "post_memory": "canonical"},
        MIXED.format(window): mixed,
        MIXED_EVERYWHERE.format(window): mixed | {"post_memory": "canonical"},
    }


def of_size(extent: Extent, name: str, **fields: Any) -> Any:
    """A model of the size whose cache is counted, ready to read."""
    plain, routed = extent.counted
    torch.manual_seed(0)
    if name == PLAIN:
        ends = {} if extent.fields == {} else {"pre_blocks": POOL + ENDS[0], "post_blocks": ENDS[1]}
        return build(preset(plain, **extent.fields | ends | fields)).eval()
    shape = {} if extent.fields == {} else _SHAPE
    return build(preset(routed, **extent.fields | shape | memories(extent.window)[name] | fields)).eval()


def as_trained(extent: Extent, name: str, device: str, **fields: Any) -> Any:
    """A model of the size that `pathlm bench route` trains."""
    case = Case() if name == PLAIN else Case(routed=True, fields=memories(extent.window)[name] | fields)
    return case.build(SIZES[extent.trained], device)


def allocated(memory: Any) -> int:
    """Bytes of all tensors that a cache holds, spare room of buffers included: each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for layer in memory.layers for t in _tensors(vars(layer))}
    return sum(storages.values())


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from _tensors(part)


@torch.inference_mode()
def read(model: Any, tokens: Tensor, chunk: int) -> Iterator[Any]:
    """Read tokens (B, T) in chunks; yields the memory after each."""
    memory = None
    for part in tokens.split(chunk, dim=1):
        memory = model(part, past_key_values=memory, use_cache=True, logits_to_keep=1).past_key_values
        yield memory


def counted(extent: Extent, name: str) -> dict[str, float]:
    """Count the bytes per token of one row's cache, of a text of `extent.text` tokens, from the tensors themselves.

    `held` are those remembered, `spare room` what buffers have allocated besides, `lasting` what a further token adds for good: the growth
    between two places of the text's second half at which windows hold as much.
    """
    model = of_size(extent, name, **{field: value for field, value in REPLACED.items() if field not in extent.fields})
    tokens, marks = torch.zeros(1, extent.text, dtype=torch.long), []
    for memory in read(model, tokens, extent.window):
        marks.append((memory.get_seq_length(), memory.bytes(), [layer.held for layer in memory.layers]))
    length, held, rows = marks[-1]
    alike = (
        (length - before, held - less)
        for before, less, fewer in marks[len(marks) // 2 :]
        if all(more - few in (0, length - before) for more, few in zip(rows, fewer, strict=True))
    )
    grown, added = next(alike)
    return {"held": held / length, "spare room": (allocated(memory) - held) / length, "lasting": added / grown}


def windowed(extent: Extent, name: str) -> dict[str, Any]:
    """Fields that give everything that a model remembers a window."""
    window = 4 * extent.window
    everywhere = {"code_window": window, "code_sinks": 4, "attention_window": window, "attention_sinks": 4}
    return everywhere | ({"local_window": window} if name.startswith("local+") else {})


def streamed(extent: Extent, name: str, device: str) -> list[dict[str, float]]:
    """Read one long row in chunks; after so many tokens tell the peak memory of the process so far, above that before the stream began.

    In bytes, with those of the cache beside them, and the tokens read per second.
    """
    model = as_trained(extent, name, device, **extent.narrow | windowed(extent, name)).eval()
    model = model.bfloat16() if device == "cuda" else model
    tokens = torch.randint(0, model.config.vocab_size, (1, extent.stream[-1]), generator=torch.Generator().manual_seed(0)).to(device)
    before = torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")
    start, found = time.perf_counter(), []
    for index, memory in enumerate(read(model, tokens, extent.chunk), start=1):
        if index * extent.chunk in extent.stream:
            peak = (torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")) - before
            seconds = time.perf_counter() - start
            held = {"held": memory.bytes(), "allocated": allocated(memory)}
            found.append({"tokens": index * extent.chunk, "peak": peak, "tokens/s": index * extent.chunk / seconds} | held)
    return found


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    print(json.dumps(streamed(EXTENTS[asked["size"]], asked["case"], asked["device"])))
