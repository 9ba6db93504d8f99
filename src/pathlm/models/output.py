"""What every model returns: the fields of a causal language model's output, plus metrics by name and a trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class PathOutput(CausalLMOutputWithPast):
    """Loss, logits (B, T, V) and cache as in transformers; `metrics` holds detached scalars under slash names."""

    # Declared anew, as some versions of transformers promise float32 here.
    loss: Tensor | None = None
    logits: Tensor | None = None
    metrics: dict[str, Tensor] | None = None
    trace: Any = None
