"""The paths of tokens: what a traced forward pass records, and the `Path` records made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pathlm.path import Path, Step

# Shapes: B rows, T tokens, S steps


@dataclass(frozen=True)
class Trace:
    """Which blocks every token visited."""

    input_ids: Tensor
    """(B, T)"""
    present: Tensor
    """(B, T), False for padding"""
    block_BTS: Tensor
    """Block of each step, counted from 1; 0 once the token has left"""
    score_BTS: Tensor
    """How sure the choice was, 0 to 1"""

    @classmethod
    def fixed(cls, input_ids: Tensor, present: Tensor, blocks: int) -> Trace:
        """Return the trace of a model without choices: every token visits all blocks in order."""
        block_BTS = torch.arange(1, blocks + 1, device=input_ids.device).expand(*input_ids.shape, blocks)
        return cls(input_ids, present, block_BTS, torch.ones((), device=input_ids.device).expand(block_BTS.shape))


def paths(output: Any, tokenizer: Any) -> list[Path]:
    """Return one path per token that is not padding, row by row. `output` is a forward pass with `trace=True`."""
    trace = output.trace
    if trace is None:
        raise ValueError("trace=None: run the model with trace=True to have paths")
    ids, blocks, scores = (t[trace.present].tolist() for t in (trace.input_ids, trace.block_BTS, trace.score_BTS))
    texts = {token: tokenizer.decode([token]) for token in set(ids)}
    return [
        Path("brian", texts[token], (*(Step(f"block:{b}", s) for b, s in zip(route, sure, strict=True) if b), Step("exit", 1.0)))
        for token, route, sure in zip(ids, blocks, scores, strict=True)
    ]
