"""What the contract is run on: every family with every option, one row each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pathlm.models import family

VOCABULARY = 61
LENGTH = 12
COMMON: dict[str, dict[str, Any]] = {
    # Weights are drawn large, so that every token matters to every later one.
    "brian": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "pre_blocks": 2,
        "post_blocks": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}


@dataclass(frozen=True)
class Case:
    """One family with one set of options."""

    name: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        return family(self.model_type).Config(**COMMON[self.model_type] | self.options)

    def build(self, dtype: torch.dtype = torch.float64, model: type[PreTrainedModel] | None = None) -> PreTrainedModel:
        """The same model every time, ready for evaluation; `model` replaces the family's class."""
        torch.manual_seed(0)
        return (model or family(self.model_type).Model)(self.config()).to(dtype).eval()

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("plain", "brian"),
    Case("one block", "brian", {"pre_blocks": 1, "post_blocks": 0}),
    Case("post blocks only", "brian", {"pre_blocks": 0, "post_blocks": 3}),
    Case("grouped queries", "brian", {"num_key_value_heads": 2}),
    Case("one key head, wide heads", "brian", {"num_key_value_heads": 1, "head_dim": 16}),
    Case("tied head", "brian", {"tie_word_embeddings": True}),
    Case("biases", "brian", {"attention_bias": True, "mlp_bias": True}),
    Case("linear rotary", "brian", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}}),
    Case("llama3 rotary", "brian", {"rope_parameters": LLAMA3}),
    Case("yarn rotary", "brian", {"rope_parameters": YARN}),
)


def ids(rows: int, tokens: int = LENGTH, *, seed: int = 1) -> Tensor:
    """Random tokens (rows, tokens), none of them padding."""
    return torch.randint(1, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
