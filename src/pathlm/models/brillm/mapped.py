"""Models that stay on disk: weights are mapped into memory, and a step reads the edges that leave one node."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathlm.models.brillm.configuration import BrillmConfig
from pathlm.models.brillm.modeling import BrillmForCausalLM

KEPT = 2**25
"""Bytes of read weights after which all are given back to the system, which mostly still has them when they are read again."""
SAFE_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
"""Types of numbers by their names in safetensors files."""


class Mapped:
    """The tensors of a saved model, as files in memory: nothing is read before it is used, and nothing written back."""

    def __init__(self, folder: Path | str) -> None:
        """Map the safetensors files of a folder. Raises `ValueError` where there are none, or where one is damaged."""
        self.tensors: dict[str, Tensor] = {}
        self._maps: list[mmap.mmap] = []
        for file in _files(Path(folder)):
            with file.open("rb") as data:
                # A copy is made of what is written to; nothing is, but torch wants to be able to.
                self._maps.append(mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_COPY))
            self.tensors |= dict(_tensors(self._maps[-1], file))

    def release(self) -> None:
        """Give the memory of what was read back to the system."""
        for held in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                held.madvise(mmap.MADV_DONTNEED)

    def __enter__(self) -> Mapped:
        return self

    def __exit__(self, *_: Any) -> None:
        self.tensors.clear()
        self.release()


def open_mapped(folder: Path | str) -> BrillmForCausalLM:
    """Open a model whose weights stay on disk: in no time, and of any size. It is for reading only; it cannot be trained.

    Raises `ValueError` where the folder's weights are not those of its configuration.
    """
    config = BrillmConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = BrillmForCausalLM(config)
    mapped = Mapped(folder)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in mapped.tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(f"folder={str(folder)!r}: {name} has shape {found.get(name)}, must be {expected.get(name)} by its config.json")
    # Which edges there are is looked at in every step, so that is read at once.
    small = {name: tensor.clone() for name, tensor in mapped.tensors.items() if tensor.dtype == torch.int64}
    model.load_state_dict(mapped.tensors | small, assign=True)
    model.requires_grad_(False)
    model.config.dtype = model.dtype
    model.register_forward_hook(_Releasing(mapped), with_kwargs=True)
    return model.eval()


class _Releasing:
    """Counts the weights that forward passes read, and releases them before they are too many."""

    def __init__(self, mapped: Mapped) -> None:
        self.mapped, self.read = mapped, 0

    def __call__(self, model: BrillmForCausalLM, arguments: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        token_N = torch.unique(given["input_ids"] if "input_ids" in given else arguments[0])
        weight, start = model.graph.weight, model.graph.start
        edges = int((start[token_N + 1] - start[token_N]).sum()) + token_N.numel()
        self.read += edges * weight[0].numel() * weight.element_size()
        if self.read > KEPT:
            self.mapped.release()
            self.read = 0


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"folder={str(folder)!r}: holds no model.safetensors, and only such a file can stay on disk")
    return [folder / "model.safetensors"]


def _tensors(held: mmap.mmap, file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a mapped safetensors file: 8 bytes for the header's size, the header as JSON, the numbers."""
    try:
        size = int.from_bytes(held[:8], "little")
        header = json.loads(held[8 : 8 + size])
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            (begin, end), dtype, shape = entry["data_offsets"], SAFE_TYPES[entry["dtype"]], torch.Size(entry["shape"])
            if not 0 <= begin <= end <= len(held) - 8 - size or end - begin != shape.numel() * dtype.itemsize:
                raise ValueError(f"{name} does not fit into it")
            if not shape.numel():
                yield name, torch.empty(shape, dtype=dtype)
                continue
            yield name, torch.frombuffer(held, dtype=dtype, count=shape.numel(), offset=8 + size + begin).view(shape)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the weights in {file} are damaged ({error}); use another checkpoint") from None
