"""The decoding loop: rows of token ids in batches, each row independent of its neighbours."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pathlm.evaluate.checkpoint import check_budget, evaluating
from pathlm.generate.batch import Batch, context_of
from pathlm.generate.sampling import Sampling

# Shapes: B rows, P prompt tokens (left-padded), V vocabulary, N new tokens

Reason = Literal["end", "length", "context"]
"""Why a row stopped: it wrote end-of-text, it has `max_new_tokens`, or the model's context is full."""
CHUNK = 16
"""Tokens decoded between two looks at them, where looking stalls an accelerator or nothing is looked for; else every token is looked at."""


def generate(
    model: Any,
    input_ids: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | None = None,
    bos_token_id: int | None = None,
    pad_token_id: int = 0,
    batch: int | None = None,
    budget: float | None = None,
) -> list[list[int]]:
    """Continue each row of token ids and return the new tokens of each row, in order.

    A row ends after `eos_token_id` (which it then includes; None never ends a row), after `max_new_tokens`, or when the model's context
    (`max_position_embeddings`) is full. `temperature=0` is greedy. An empty row starts from `bos_token_id` (default: the model's own).
    `batch` rows run at once, all by default. What a row draws depends on `seed`, on its own tokens and on how often the same row came
    before it, never on its neighbours or its place: a row gives the same alone and in any batch, and equal rows give different samples.
    `budget` is the share of its route steps that a routed model may take on average: less is faster and worse.

    Raises `ValueError` naming the field, the value and the rule for options out of range, for tokens outside the vocabulary, for
    prompts that fill the context, for a budget that the model was not trained for, and where the model's logits are not finite.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    given = input_ids.tolist() if isinstance(input_ids, Tensor) else input_ids
    prompts = checked_prompts(model, given, max_new_tokens=max_new_tokens, bos_token_id=bos_token_id)
    require_batch(batch)
    check_budget(model, budget)
    new: list[list[int]] = [[] for _ in prompts]
    chunk = 1 if model.device.type == "cpu" and eos_token_id is not None else CHUNK
    for part in batches(prompts, sampling, batch=batch, max_new_tokens=max_new_tokens, context=context_of(model)):
        for pieces in decode(model, part, sampling, eos_token_id=eos_token_id, pad_token_id=pad_token_id, chunk=chunk, budget=budget):
            for row, tokens, _ in pieces:
                new[row].extend(tokens)
    return new


@dataclass(frozen=True)
class Part:
    """Prompts that run together: their numbers among all prompts, their tokens, and a uniform number for each token to draw."""

    rows: list[int]
    prompts: list[list[int]]
    limits: list[int]
    """New tokens each row may write."""
    at_limit: list[Reason]
    """Why each row ends at its limit."""
    uniform_BN: np.ndarray | None


def batches(prompts: list[list[int]], sampling: Sampling, *, batch: int | None, max_new_tokens: int, context: int | None) -> Iterator[Part]:
    """Cut the prompts into batches, in order. A row's random stream comes from the seed, its tokens and how often they came before."""
    seen: Counter[bytes] = Counter()
    size = batch or len(prompts) or 1
    for first in range(0, len(prompts), size):
        part = prompts[first : first + size]
        limits = [max_new_tokens if context is None else min(max_new_tokens, context - len(prompt)) for prompt in part]
        uniform = np.empty((len(part), max(limits))) if sampling.temperature > 0 else None
        for row, prompt in enumerate(part):
            again = seen[digest := _digest(prompt)]
            seen[digest] += 1
            if uniform is not None:
                uniform[row] = random_stream(sampling.seed, prompt, again, length=uniform.shape[1])
        at_limit: list[Reason] = ["length" if limit == max_new_tokens else "context" for limit in limits]
        yield Part(list(range(first, first + len(part))), part, limits, at_limit, uniform)


def random_stream(seed: int, prompt: Sequence[int], again: int, *, length: int) -> np.ndarray:
    """Return the uniform number of each new token of a row: from the seed, the prompt, and how often the same prompt came before it."""
    entropy = [seed, again, *np.frombuffer(_digest(prompt), dtype="<u4").tolist()]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy))).random(length)


def _digest(prompt: Sequence[int]) -> bytes:
    return hashlib.sha256(np.asarray(prompt, dtype="<i8").tobytes()).digest()


@torch.inference_mode()
def decode(
    model: Any, part: Part, sampling: Sampling, *, eos_token_id: int | None, pad_token_id: int, chunk: int, budget: float | None = None
) -> Iterator[list[tuple[int, list[int], Reason | None]]]:
    """Run one batch and yield, every `chunk` tokens, (prompt, its new tokens, why it stopped or None) for the rows that still write."""
    with evaluating(model):
        batch = Batch(model, check_budget(model, budget), pad_token_id=pad_token_id)
        logits_BV = batch.begin(part.prompts).logits[:, -1]
        uniform_BN = None if part.uniform_BN is None else torch.from_numpy(part.uniform_BN).to(logits_BV.device)
        active = list(range(len(part.prompts)))  # which row of the part each row of the running batch is
        stopped: list[Reason | None] = [None] * len(active)
        token_B = torch.empty(0)
        written = 0
        while True:
            columns: list[Tensor] = []
            for step in range(written, min(written + chunk, min(part.limits[row] for row in active if not stopped[row]))):
                if step:
                    logits_BV = batch.advance(token_B)
                token_B = sampling.pick(logits_BV, None if uniform_BN is None else uniform_BN[:, step])
                columns.append(token_B)
            written += len(columns)
            pieces = []
            for row, new in zip(active, torch.stack(columns, dim=1).tolist(), strict=True):
                if stopped[row]:
                    continue
                if eos_token_id is not None and eos_token_id in new:
                    new, stopped[row] = new[: new.index(eos_token_id) + 1], "end"
                elif written >= part.limits[row]:
                    stopped[row] = part.at_limit[row]
                pieces.append((part.rows[row], new, stopped[row]))
            if written == len(columns) or written % CHUNK == 0 or all(stopped):  # what is no number stays so in a model's memory
                require_number(logits_BV.amax().item(), written)
            yield pieces
            if all(stopped):
                return
            keep = [place for place, row in enumerate(active) if not stopped[row]]
            if len(keep) < len(active) and batch.can_select:
                active = [active[place] for place in keep]
                index = torch.tensor(keep, device=token_B.device)
                batch.select(index)
                token_B = token_B[index]
                uniform_BN = None if uniform_BN is None else uniform_BN[index]


def require_number(peak: float, written: int) -> None:
    """Raise `ValueError` where the highest logit for the newest token is not finite: such a token means nothing."""
    if not math.isfinite(peak):
        rule = "must be finite; the model's weights are broken or its precision is too low"
        raise ValueError(f"the highest logit for new token {written} is {peak}: {rule}")


def checked_prompts(model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, bos_token_id: int | None) -> list[list[int]]:
    """Return the prompts as lists, empty ones started, or raise `ValueError` for the first that cannot be continued."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    vocabulary, context = model.config.vocab_size, context_of(model)
    start = getattr(model.config, "bos_token_id", None) if bos_token_id is None else bos_token_id
    rows = []
    for number, prompt in enumerate(prompts):
        row = list(prompt) or ([] if start is None else [start])
        if not row:
            raise ValueError(f"prompt {number} is empty and the model has no bos_token_id to start from")
        if not 0 <= min(row) <= max(row) < vocabulary:
            raise ValueError(f"prompt {number} holds token ids from {min(row)} to {max(row)}: the model's vocab_size is {vocabulary}")
        if context is not None and len(row) >= context:
            raise ValueError(
                f"prompt {number} has {len(row)} tokens: it must be shorter than the model's max_position_embeddings={context}"
            )
        rows.append(row)
    return rows


def require_batch(batch: int | None) -> None:
    """Refuse a number of rows at once that is none."""
    if batch is not None and batch < 1:
        raise ValueError(f"batch={batch}: must be at least 1")
