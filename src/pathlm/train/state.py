"""What a run knows about itself between two steps, and the state of the random generators."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class State:
    """Progress of a run: everything that a later step needs besides weights, optimizer and random generators."""

    step: int = 0
    """Optimizer steps finished."""
    tokens: int = 0
    """Positions read so far, padding included: rows × row length."""
    next_row: int = 0
    """Where the endless order of rows continues; the loader's whole state."""
    best_validation: float | None = None
    best_step: int | None = None
    last_validation: float | None = None
    measured: dict[str, float] = field(default_factory=dict)
    """What was measured when the present stage began; its relative gates compare with it."""
    failed: list[str] = field(default_factory=list)
    """What the gates said that failed at the end of a stage, if one ended with this very step."""

    def advance(self, rows: int, tokens: int) -> None:
        """Count one finished step."""
        self.step += 1
        self.next_row += rows
        self.tokens += tokens
        self.failed = []

    def note_validation(self, loss: float, *, comparable: bool = True) -> bool:
        """Remember a validation loss; return whether it is the best so far. One that is not a number never is.

        When it is not `comparable` with the best before, because it was measured with other knobs, the search for the best begins anew.
        """
        self.last_validation = loss
        if not math.isfinite(loss) or (comparable and self.best_validation is not None and loss >= self.best_validation):
            return False
        self.best_validation, self.best_step = loss, self.step
        return True


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed every global random generator, differently in each process."""
    mixed = int(np.random.SeedSequence((seed, rank)).generate_state(1, np.uint32)[0])
    random.seed(mixed)
    np.random.seed(mixed)  # noqa: NPY002 - models may use the global generator
    torch.manual_seed(mixed)


def random_state() -> dict[str, Any]:
    """Return the state of every global random generator as plain values and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(saved: dict[str, Any]) -> None:
    """Put every global random generator back to what `random_state` returned."""
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
