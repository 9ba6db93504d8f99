"""How well a model predicts text: loss, perplexity and bits per byte on whole documents, every token counted exactly once."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pathlm.evaluate.checkpoint import evaluating
from pathlm.evaluate.records import LossWriter, TokenLosses

# Shapes: B windows, T tokens of a window, K places whose predictions count, V vocabulary

GROUP_TOKENS = 1 << 20
"""Tokens of documents whose windows are sorted together, to bound memory."""
IGNORE = -100


@dataclass(frozen=True)
class LanguageScore:
    """What a model lost on whole documents. `loss` is in nats per token, over every token but the documents' start tokens."""

    loss: float
    perplexity: float
    bits_per_byte: float
    """Nats of all tokens / (ln 2 · bytes of the documents' text in UTF-8): does not depend on the tokenizer."""
    tokens: int
    bytes: int
    documents: int
    context: int = 0
    """Tokens the model sees at most; 0 where that is no window (n-grams)."""
    stride: int = 0
    """Tokens that a window moves on in longer documents: every token has at least context − stride tokens of history there."""
    seconds: float = 0.0

    @classmethod
    def of(cls, nats: float, *, tokens: int, size: int, documents: int, **others: Any) -> LanguageScore:
        """Divide the nats of `tokens` tokens from documents of `size` bytes."""
        loss = nats / tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return cls(loss, perplexity, nats / (math.log(2) * size), tokens, size, documents, **others)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Window:
    """Some tokens of a document to feed, `start` … `stop` − 1, and the first of the tokens to count, `first` … `stop`."""

    start: int
    stop: int
    first: int


def windows(length: int, *, context: int, stride: int) -> list[Window]:
    """Cover a document of `length` tokens so that every token but its first is counted once.

    Windows begin every `stride` tokens and feed at most `context`. A token is counted in the first window that reaches it, so in every
    window but the first it has more than `context` − `stride` tokens of history.
    """
    result = []
    counted, start = 0, 0
    while counted < length - 1:
        stop = min(start + context, length - 1)
        result.append(Window(start, stop, counted + 1))
        counted, start = stop, start + stride
    return result


@dataclass(frozen=True)
class Text:
    """Documents to measure a model on, and how they are read."""

    corpus: Any
    split: str
    chosen: Sequence[Any]
    options: dict[str, Any]
    """Context, stride and limits, as `score` takes them."""

    @property
    def tokens(self) -> int:
        """How many are predicted."""
        return sum(record.tokens - 1 for record in self.chosen)


def score(
    model: Any,
    corpus: Any,
    split: str = "validation",
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_tokens: int | None = None,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    records: Path | str | None = None,
    progress: Callable[[int], object] | None = None,
) -> LanguageScore:
    """Measure a causal language model on the documents of a corpus's split, each scored from its own start token to its end token.

    Documents longer than `context` (default: the model's `max_position_embeddings`) are read in windows that move by `stride` (default:
    half the context); see `windows`. `max_documents` and `max_tokens` keep the first whole documents that fit. `records` names a file for
    the loss of every token (`evaluate.records`). `progress` is told how many more tokens have been counted.

    Raises `ValueError` for numbers out of range, and naming the document whose loss is not finite.
    """
    context, stride = reach(model, context, stride)
    chosen = choose(corpus, split, max_documents=max_documents, max_tokens=max_tokens)
    header = {"split": split, "corpus": corpus.manifest["digest"], "model": model.config.name_or_path, "unit": "nats"}
    header |= {"context": context, "stride": stride}
    tokens, size = sum(record.tokens - 1 for record in chosen), sum(record.bytes for record in chosen)
    begun, nats = time.perf_counter(), 0.0
    with nullcontext() if records is None else LossWriter(records, header, tokens=tokens) as out:
        for group in groups(chosen):
            documents = [corpus.document_tokens(split, record.number) for record in group]
            losses = token_losses(model, documents, context=context, stride=stride, batch_tokens=batch_tokens, progress=progress)
            for record, loss in zip(group, losses, strict=True):
                if not math.isfinite(total := float(loss.sum(dtype=np.float64))):
                    raise ValueError(f"the loss of document {record.id!r} is {total}: the model is broken or its precision is too low")
                nats += total
            if out is not None:
                out.add(TokenLosses.of([record.number for record in group], documents, losses, header))
    seconds = time.perf_counter() - begun
    return LanguageScore.of(nats, tokens=tokens, size=size, documents=len(chosen), context=context, stride=stride, seconds=seconds)


def token_losses(
    model: Any,
    documents: Sequence[np.ndarray],
    *,
    context: int,
    stride: int,
    batch_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
    call: Callable[[Sequence[tuple[int, Window]], dict[str, Any]], Any] | None = None,
) -> list[np.ndarray]:
    """Return, per document, −ln p in nats of its tokens from place 1 on, each given the tokens before it that its window holds.

    Windows of similar length run together, at most `batch_tokens` tokens a batch (default: 2048 on the CPU, 16384 elsewhere). float32, or
    float64 for a float64 model. `call(batch, inputs)` runs the model on a batch of (document, window) instead of `model(**inputs)`, to ask
    for more or to look at what comes back.
    """
    call = call or (lambda _, inputs: model(**inputs))
    batch_tokens = batch_tokens or (2048 if model.device.type == "cpu" else 16384)
    losses = [np.full(len(tokens) - 1, np.nan, dtype=np.float64 if model.dtype == torch.float64 else np.float32) for tokens in documents]
    jobs = [(number, window) for number, tokens in enumerate(documents) for window in windows(len(tokens), context=context, stride=stride)]
    # Windows that skip as many leading places share a batch, so that only the places that count are multiplied with the vocabulary.
    jobs.sort(key=lambda job: (job[1].first - job[1].start, job[1].start - job[1].stop))
    with evaluating(model), torch.inference_mode():
        for batch in _batches(jobs, batch_tokens):
            found_BK = _forward(model, documents, batch, call).cpu().numpy()
            counted = 0
            for (number, window), row in zip(batch, found_BK, strict=True):
                size = window.stop - window.first + 1
                losses[number][window.first - 1 : window.stop] = row[:size]
                counted += size
            if progress is not None:
                progress(counted)
    return losses


def _forward(model: Any, documents: Sequence[np.ndarray], batch: Sequence[tuple[int, Window]], call: Callable[..., Any]) -> Tensor:
    """Feed windows, padded on the right, and return the loss of each place that counts (B, K), rubbish after a window's end."""
    skip = batch[0][1].first - batch[0][1].start - 1
    width = max(window.stop - window.start for _, window in batch)
    ids_BT = np.zeros((len(batch), width), dtype=np.int64)
    mask_BT = np.zeros((len(batch), width), dtype=np.int64)
    target_BK = np.full((len(batch), width - skip), IGNORE, dtype=np.int64)
    for row, (number, window) in enumerate(batch):
        tokens, size = documents[number], window.stop - window.start
        ids_BT[row, :size] = tokens[window.start : window.stop]
        mask_BT[row, :size] = 1
        target_BK[row, : size - skip] = tokens[window.first : window.stop + 1]
    options: dict[str, Any] = {"use_cache": False}
    if not mask_BT.all():
        options["attention_mask"] = torch.from_numpy(mask_BT).to(model.device)
    if keeps := "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = width - skip
    logits_BKV = call(batch, {"input_ids": torch.from_numpy(ids_BT).to(model.device)} | options).logits
    logits_BKV = logits_BKV if keeps else logits_BKV[:, skip:]
    logits_BKV = logits_BKV if logits_BKV.dtype == torch.float64 else logits_BKV.float()
    target = torch.from_numpy(target_BK).to(logits_BKV.device)
    return F.cross_entropy(logits_BKV.flatten(0, 1), target.flatten(), reduction="none", ignore_index=IGNORE).view(target.shape)


def _batches(jobs: list[tuple[int, Window]], batch_tokens: int) -> Iterator[list[tuple[int, Window]]]:
    """Cut sorted windows (longest first within one kind) into batches of one kind and at most `batch_tokens` tokens with padding."""
    batch: list[tuple[int, Window]] = []
    for job in jobs:
        if batch:
            head = batch[0][1]
            other_kind = job[1].first - job[1].start != head.first - head.start
            if other_kind or (len(batch) + 1) * (head.stop - head.start) > batch_tokens:
                yield batch
                batch = []
        batch.append(job)
    if batch:
        yield batch


def choose(corpus: Any, split: str, *, max_documents: int | None = None, max_tokens: int | None = None) -> list[Any]:
    """Return the records of a split's first whole documents, at most so many documents and predicted tokens, but at least one."""
    for name, value in (("max_documents", max_documents), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    chosen: list[Any] = []
    tokens = 0
    for record in corpus.documents(split):
        tokens += record.tokens - 1
        if chosen and (len(chosen) == max_documents or (max_tokens is not None and tokens > max_tokens)):
            break
        chosen.append(record)
    if not chosen:
        raise ValueError(f"split={split!r} of {corpus.folder} has no documents to measure")
    return chosen


def reach(model: Any, context: int | None = None, stride: int | None = None) -> tuple[int, int]:
    """Return context and stride, with their defaults, or raise `ValueError` where the model cannot see so far."""
    limit = getattr(model.config, "max_position_embeddings", None)
    context = limit if context is None else context
    if context is None:
        raise ValueError("context: the model names no max_position_embeddings, so say how many tokens it is to see")
    if context < 1 or (limit is not None and context > limit):
        raise ValueError(f"context={context}: must lie between 1 and the model's max_position_embeddings={limit}")
    stride = max(context // 2, 1) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride}: must lie between 1 and context={context}")
    return context, stride


def groups(records: Sequence[Any]) -> Iterator[list[Any]]:
    """Cut document records into lists of about `GROUP_TOKENS` tokens."""
    group: list[Any] = []
    size = 0
    for record in records:
        group.append(record)
        size += record.tokens
        if size >= GROUP_TOKENS:
            yield group
            group, size = [], 0
    if group:
        yield group
