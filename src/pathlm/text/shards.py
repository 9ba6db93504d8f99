"""Token shards on disk: little-endian integers that are memory-mapped and read as one long stream."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def dtype_for(vocab_size: int, wanted: str = "auto") -> str:
    """Return the name of the integer type for ids below `vocab_size`. Raises `ValueError` when the wanted one is too small."""
    name = wanted if wanted != "auto" else ("uint16" if vocab_size <= 1 << 16 else "uint32")
    if name not in DTYPES:
        raise ValueError(f"dtype={wanted!r}: must be auto, {' or '.join(DTYPES)}")
    largest = int(np.iinfo(DTYPES[name]).max)
    if vocab_size - 1 > largest:
        raise ValueError(f"dtype={name!r} holds ids up to {largest}, but the vocabulary has {vocab_size} tokens; use uint32 or auto")
    return name


def file_sha256(file: Path) -> str:
    """Return the sha256 of a file's bytes, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_file(file: Path, *, size: int, sha256: str | None) -> None:
    """Raise `ValueError` naming the file unless it has the size, and the hash where one is given, that the manifest says."""
    if not file.is_file():
        raise ValueError(f"{file} is missing; prepare the corpus again")
    if (found := file.stat().st_size) != size:
        raise ValueError(
            f"{file} has {found} bytes, but the manifest says {size}: it is truncated or was changed; prepare the corpus again"
        )
    if sha256 is not None and (digest := file_sha256(file)) != sha256:
        raise ValueError(f"{file} has sha256 {digest}, but the manifest says {sha256}: its content changed; prepare the corpus again")


class TokenStream:
    """The tokens of one split as one long sequence over memory-mapped shards. `stream[a:b]` is an int64 array."""

    def __init__(self, folder: Path, shards: Sequence[Mapping[str, Any]], dtype: str) -> None:
        """Map `shards` (records with `file` and `tokens`) that lie under `folder`."""
        maps = (np.memmap(folder / s["file"], dtype=DTYPES[dtype], mode="r", shape=(s["tokens"],)) for s in shards)
        self._maps = [np.asarray(mapped) for mapped in maps]
        self._starts = list(accumulate((s["tokens"] for s in shards), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError(f"step={step}: tokens are read in order, without a step")
        out = np.empty(max(stop - start, 0), dtype=np.int64)
        self.read_into(out, start)
        return out

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill the one-dimensional array `out` with the tokens from position `start` on."""
        done = 0
        shard = bisect_right(self._starts, start) - 1
        while done < len(out):
            begin = start + done - self._starts[shard]
            piece = self._maps[shard][begin : begin + len(out) - done]
            assert len(piece), "read past the end of the stream"
            out[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1
