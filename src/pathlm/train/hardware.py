"""How fast the machine could be, and how much memory is in use."""

from __future__ import annotations

import time
from collections import deque
from functools import cache
from typing import Any

import psutil
import torch

from pathlm.config import RunConfig

# Dense peak of one device in TFLOP/s from the makers' data sheets: (bf16 tensor cores, fp32 without them).
# The first name that occurs in the device's name wins.
KNOWN_GPUS = (
    ("B200", 2250.0, 75.0),
    ("GH200", 989.0, 67.0),
    ("H200", 989.0, 67.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100 NVL", 835.0, 60.0),
    ("H100", 989.0, 67.0),
    ("A100", 312.0, 19.5),
    ("A10G", 70.0, 31.5),
    ("A40", 149.7, 37.4),
    ("L40S", 362.0, 91.6),
    ("L4", 121.0, 30.3),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
)


@cache
def peak_flops(device: torch.device, precision: str) -> float:
    """Return the FLOP/s one process could reach: from the table for known GPUs, else measured with a short matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, bf16, fp32 in KNOWN_GPUS:
            if known in name:
                return (bf16 if precision == "bf16" else fp32) * 1e12
    return _measure(device, torch.bfloat16 if precision == "bf16" else torch.float32)


def _measure(device: torch.device, dtype: torch.dtype, *, size: int = 768, seconds: float = 0.15) -> float:
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        del product
    return 2.0 * size**3 / best


class Clock:
    """Measures the speed of the last few steps, without what happens between them (evaluation, checkpoints)."""

    def __init__(self, model: Any, config: RunConfig, *, device: torch.device, processes: int) -> None:
        """`processes` is how many share the work, or 0 where nobody reads the clock, which then measures no peak."""
        self.device = device
        self.tokens = config.batch_tokens
        self.flops = train_flops_per_token(model, config.data.length)
        self.peak = peak_flops(device, config.precision) * processes if processes else float("inf")
        self.seconds: deque[float] = deque(maxlen=config.log_every)
        self.began = 0.0

    def start(self) -> None:
        """Begin a step, before its batch is asked for."""
        self.began = time.perf_counter()

    def stop(self) -> dict[str, float]:
        """End a step whose numbers have reached the host; return speed, utilisation and memory."""
        self.seconds.append(time.perf_counter() - self.began)
        mean = sum(self.seconds) / len(self.seconds)
        speed = self.tokens / mean
        self.peak = max(self.peak, speed * self.flops)  # a peak measured on a busy machine is too low
        return {
            "time/step_s": mean,
            "time/tokens_per_s": speed,
            "time/flops_utilisation": speed * self.flops / self.peak,
            "memory/gib": memory_gib(self.device),
        }


def memory_gib(device: torch.device) -> float:
    """Return the peak memory the tensors took on a GPU, or the resident memory of this process elsewhere, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def train_flops_per_token(model: Any, length: int) -> float:
    """Return the model FLOPs of one training token: forward and a backward pass of twice its cost, at rows of `length`.

    A family answers with `flops_per_token(length)`; otherwise every parameter counts as one multiply-add.
    """
    forward = model.flops_per_token(length) if hasattr(model, "flops_per_token") else 2.0 * sum(p.numel() for p in model.parameters())
    return 3.0 * forward
