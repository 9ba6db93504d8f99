"""From rows to the micro-batches of one process, one step ahead of the model. A pure function of the position in the row order."""

from __future__ import annotations

import math
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Share:
    """Which part of every step's rows one process computes, and in how large pieces."""

    rank: int
    world: int
    micro_rows: int

    def slices(self, start: int, count: int) -> list[tuple[int, int]]:
        """Return (first row, rows) of each micro-batch of this process, for the step that reads rows `start … start+count-1`.

        Every process gets equally many micro-batches, the last of them smaller, because sharded models talk in every forward pass.
        A process with nothing left to do gets (row, 0).
        """
        first = start + count * self.rank // self.world
        end = start + count * (self.rank + 1) // self.world
        largest = math.ceil(count / self.world)
        pieces = math.ceil(largest / self.micro_rows)
        begins = [min(first + i * self.micro_rows, end) for i in range(pieces)]
        return [(begin, min(self.micro_rows, end - begin)) for begin in begins]


@dataclass(frozen=True)
class StepBatch:
    """The micro-batches of one step in one process; `counts[i]` is the number of targets in `micro[i]`."""

    micro: list[dict[str, Tensor]]
    counts: list[int]
    raw: list[dict[str, np.ndarray]]
    positions: int
    """Rows × length of the whole step, over all processes."""


def targets(labels: np.ndarray) -> int:
    """Count the labels a model is trained on: the first column has nothing before it."""
    return int((labels[:, 1:] != IGNORE).sum())


def read(rows: Any, start: int, count: int, share: Share, *, pin: bool = False) -> StepBatch:
    """Read one process's part of the rows `start … start+count-1`."""
    micro, counts, raw = [], [], []
    for begin, size in share.slices(start, count):
        batch = rows.batch(begin if size else max(begin - 1, 0), size or 1)
        counted = targets(batch["labels"]) if size else 0
        # Some models' mean over no targets is not a number: a batch that counts nothing predicts its own tokens, with weight zero.
        fed = batch if counted else batch | {"labels": batch["input_ids"]}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in fed.items()}
        micro.append({name: value.pin_memory() for name, value in tensors.items()} if pin else tensors)
        counts.append(counted)
        raw.append(batch)
    return StepBatch(micro, counts, raw, count * raw[0]["labels"].shape[1])


def stream(rows: Any, start: int, count: int, share: Share, *, steps: int, pin: bool = False) -> Generator[StepBatch, None, None]:
    """Yield the batches of `steps` consecutive steps of `count` rows from row `start`; a thread reads the next one meanwhile."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="pathlm-rows") as reader:
        ahead = None
        for i in range(steps):
            now = ahead or reader.submit(read, rows, start + i * count, count, share, pin=pin)
            batch = now.result()
            ahead = reader.submit(read, rows, start + (i + 1) * count, count, share, pin=pin) if i + 1 < steps else None
            yield batch
