"""Loops compiled for the processor: whether they can be had here, and how they share its cores."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

PARTS = 4
"""Parts per thread that work is cut into, so that a thread that is held up does not hold up the rest."""


@lru_cache(maxsize=1)
def available() -> bool:
    """Say whether Numba is installed. It is imported here, when a model first asks, and never by the command line."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def fits(*tensors: Tensor) -> bool:
    """Say whether compiled loops can work on these tensors: on the CPU, whole, and all of them float32 or all float64."""
    kinds = {t.dtype for t in tensors}
    plain = all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    return plain and len(kinds) == 1 and kinds <= {torch.float32, torch.float64} and available()


def array(tensor: Tensor) -> np.ndarray:
    """Return the numbers of a tensor, not copied."""
    return tensor.detach().numpy()


def in_parts(kernel: Callable[..., None], cost_K: Tensor, *given: Any) -> None:
    """Call `kernel(first, stop, *given)` for stretches of 0 … K of about the same cost, on as many threads as torch uses.

    What a kernel does for one of the K must depend on no other: then results do not depend on the number of threads.
    """
    count, threads = cost_K.numel(), torch.get_num_threads()
    arrays = [array(g) if isinstance(g, Tensor) else g for g in given]
    if threads == 1 or count < 2:
        kernel(0, count, *arrays)
        return
    done_K = cost_K.cumsum(0)
    goals = torch.arange(1, threads * PARTS) * (int(done_K[-1]) / (threads * PARTS))
    cuts = [0, *torch.searchsorted(done_K.double(), goals.double()).tolist(), count]
    parts = [(a, b) for a, b in itertools.pairwise(cuts) if b > a]
    list(_pool(threads).map(lambda part: kernel(*part, *arrays), parts))


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="pathlm")


# A forked process inherits no threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
