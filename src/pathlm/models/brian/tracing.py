"""The paths of tokens: what a traced forward pass records, and the `Path` records made of it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.brian.pool import Records
from pathlm.models.tokens import token_text
from pathlm.path import Path, Step

# Shapes: B rows, T tokens, S blocks on the longest path, R route steps, A = pool blocks and OUT


@dataclass(frozen=True)
class Trace:
    """Which blocks every token visited, and in the pool what else it might have done."""

    input_ids: Tensor
    """(B, T)"""
    present: Tensor
    """(B, T), False for padding"""
    block_BTS: Tensor
    """Block of each step, counted from 1; 0 where there is none, once the token has left the pool"""
    score_BTS: Tensor
    """Probability of that choice, 1 outside the pool"""
    first_route_step: int = 0
    """Which of the S steps is the first in the pool"""
    second_BTR: Tensor | None = None
    """The other block of each route step where two are visited, 0 for none"""
    visits_BT: Tensor | None = None
    """Blocks of the pool run for each token where it could take several ways at once; the others tell of the best one"""
    probability_BTRA: Tensor | None = None
    """Probability of every block of the pool and of OUT, 0 in steps before which the token had left"""

    @classmethod
    def fixed(cls, input_ids: Tensor, present: Tensor, blocks: int) -> Trace:
        """Return the trace of a model without choices: every token visits all blocks in order."""
        block_BTS = torch.arange(1, blocks + 1, device=input_ids.device).expand(*input_ids.shape, blocks)
        return cls(input_ids, present, block_BTS, torch.ones((), device=input_ids.device).expand(block_BTS.shape))

    @classmethod
    def routed(cls, input_ids: Tensor, present: Tensor, config: BrianConfig, records: Records, threshold: Tensor, scale: Tensor) -> Trace:
        """Return the trace of a pass through a pool, from what was recorded there; `threshold` and `scale` make p(OUT) of a gain."""
        tokens, longest, pool = input_ids.numel(), config.max_route_steps, config.pool_blocks
        first, last = config.pre_blocks, config.pre_blocks + longest
        block_NS = torch.zeros(tokens, last + config.post_blocks, dtype=torch.long, device=input_ids.device)
        score_NS = torch.ones(block_NS.shape, device=input_ids.device)
        block_NS[:, :first] = torch.arange(1, first + 1, device=input_ids.device)
        block_NS[:, last:] = torch.arange(1, config.post_blocks + 1, device=input_ids.device) + first + pool
        second_NR = torch.zeros(tokens, longest, dtype=torch.long, device=input_ids.device)
        probability_NRA = torch.zeros(tokens, longest, pool + 1, device=input_ids.device)
        for step, it in enumerate(records.steps):
            place, stays = it.place_n, ~it.leaves_n
            bound = threshold if threshold.ndim == 0 else threshold[place]
            out = torch.sigmoid((bound - it.gain_n) / scale).float()
            assert config.min_route_steps is not None
            out = torch.zeros_like(out) if step < config.min_route_steps else out
            probability_NRA[place, step, :pool] = (1 - out)[:, None] * it.score_nM.softmax(-1).float()
            probability_NRA[place, step, pool] = out
            block_NS[place, first + step] = (it.block_nk[:, 0] + 1 + first) * stays
            score_NS[place, first + step] = probability_NRA[place, step].gather(-1, it.block_nk[:, :1])[:, 0]
            if it.block_nk.shape[1] > 1:
                second_NR[place, step] = (it.block_nk[:, 1] + 1 + first) * stays
        shape = tuple(input_ids.shape)
        return cls(
            input_ids, present, block_NS.unflatten(0, shape), score_NS.unflatten(0, shape), first,
            second_NR.unflatten(0, shape), None if records.visits_N is None else records.visits_N.unflatten(0, shape),
            probability_NRA.unflatten(0, shape),
        )  # fmt: skip

    def row(self, number: int) -> Trace:
        """Return the trace of one row."""
        kept = {f.name: getattr(self, f.name) for f in fields(self)}
        mine: dict[str, Any] = {name: value[number : number + 1] for name, value in kept.items() if isinstance(value, Tensor)}
        return replace(self, **mine)

    def after(self, earlier: Trace) -> Trace:
        """Return the trace of a text whose beginning another pass has read."""
        both = {f.name: (getattr(earlier, f.name), getattr(self, f.name)) for f in fields(self)}
        joined: dict[str, Any] = {name: torch.cat(pair, dim=1) for name, pair in both.items() if isinstance(pair[1], Tensor)}
        return replace(self, **joined)


def paths(output: Any, tokenizer: Any, *, newest: int | None = None) -> list[Path]:
    """Return one path per token that is not padding, row by row. `output` is a forward pass with `trace=True`.

    With `newest` the output is that of one row, and only its last so many tokens are told.

    Steps stand in the order of the computation: blocks before the pool, the route, `exit`, blocks after the pool. The score of `exit` is
    p(OUT) where the token left by choice, and 1 where its steps were used up. Where two blocks were visited in one step, the step is named
    `block:3+block:5`, the better one first. A plain decoder has no pool to leave: its paths are its blocks, none of them chosen.
    """
    trace: Trace | None = output.trace
    if trace is None:
        raise ValueError("trace=None: run the model with trace=True to have paths")
    told = trace.present
    if newest is not None:
        told = told & (told.flip(1).cumsum(1).flip(1) <= newest)
    ids = trace.input_ids[told].tolist()
    texts = {token: token_text(tokenizer, token) for token in set(ids)}
    blocks, scores = trace.block_BTS[told].tolist(), trace.score_BTS[told].tolist()
    if trace.probability_BTRA is None:
        steps = [[Step(f"block:{b}", s) for b, s in zip(route, sure, strict=True)] for route, sure in zip(blocks, scores, strict=True)]
        return [Path("brian", texts[token], tuple(route), first=len(route)) for token, route in zip(ids, steps, strict=True)]
    assert trace.second_BTR is not None
    seconds, chances = trace.second_BTR[told].tolist(), trace.probability_BTRA[told].tolist()
    return [
        Path("brian", texts[token], tuple(_steps(route, sure, second, chance, trace.first_route_step)), first=trace.first_route_step)
        for token, route, sure, second, chance in zip(ids, blocks, scores, seconds, chances, strict=True)
    ]


def _steps(blocks: list[int], scores: list[float], seconds: list[int], chances: list[list[float]], first: int) -> list[Step]:
    """Return one token's steps in the order of its computation; leaving the pool stands between the route and the blocks after it."""
    last = first + len(chances)
    ordinary = [Step(f"block:{b}", s) for b, s in zip(blocks, scores, strict=True)]
    steps, out = ordinary[:first], Step("exit", 1.0)
    for i, chance in enumerate(chances):
        block, second = blocks[first + i], seconds[i]
        names = [*(f"block:{first + 1 + b}" for b in range(len(chance) - 1)), "exit"]
        taken = {f"block:{block}", f"block:{second}"} if block else {"exit"}
        rivals = tuple(sorted(((n, c) for n, c in zip(names, chance, strict=True) if c > 0 and n not in taken), key=lambda r: -r[1]))
        if not block:
            out = Step("exit", chance[-1], rivals) if any(chance) else out
            break
        both = chance[block - first - 1] + (chance[second - first - 1] if second else 0.0)
        steps.append(Step(f"block:{block}+block:{second}" if second else f"block:{block}", both, rivals))
    return [*steps, out, *ordinary[last:]]
