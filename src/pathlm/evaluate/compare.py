"""A model beside n-grams: what `pathlm eval` measures, prints and writes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pathlm.evaluate.checkpoint import run_folder
from pathlm.evaluate.lm import LanguageScore, Text, choose, groups, score
from pathlm.evaluate.ngram import KneserNey
from pathlm.evaluate.recorded import check_file, replace
from pathlm.evaluate.records import LossWriter
from pathlm.evaluate.routes import RouteTotals, route_groups
from pathlm.evaluate.subject import Measure, Subject, at_once, bar, check_vocabulary

NGRAM_TOKENS = 20_000_000
"""Training tokens the n-grams are counted on at most, the first whole documents: counting takes about 300 bytes of memory a token."""
NGRAM_CACHE = Path("evaluation") / "ngrams.json"
NGRAM_FORMAT = 1
"""Raised when the scores of the same n-grams would change, so that cached ones are not used."""


def prepare(
    subject: Subject,
    corpus: Path | str | None = None,
    *,
    split: str = "validation",
    context: int | None = None,
    stride: int | None = None,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    order: int = 5,
    records: Path | str | None = None,
) -> Measure:
    """Make ready to measure a model beside n-grams of order 1 … `order` counted on the same training split (0: none).

    Args:
        subject: The model.
        corpus: A prepared corpus; by default the one the run was trained on.
        split: Which of its splits.
        context: Tokens the model sees at most; by default the length of the rows it was trained on, else its `max_position_embeddings`.
        stride: Tokens that a window moves on in longer documents; by default half the context.
        max_documents: Measure the first so many documents only.
        max_tokens: Measure the first whole documents that hold at most so many predicted tokens.
        order: Highest n-gram order.
        records: File for the loss of every token, see `evaluate.records`.

    Measuring returns the content that is also written to `eval.json` of the run (or model) folder under the split's name, behind it the
    budget and the branches where they are given. For a model with a pool `routes` tells what it computed: route steps, blocks run, and
    their shares.

    Raises `ValueError` for options out of range, for a folder without a model, a missing corpus, a tokenizer other than the corpus's, and
    a budget that the model was not trained for.
    """
    place, data = subject.place, subject.corpus(corpus)
    chosen = choose(data, split, max_documents=max_documents, max_tokens=max_tokens)
    if order < 0:
        raise ValueError(f"order={order}: must be at least 1, or 0 for no n-grams")
    check_file("records", records)
    model, tokenizer = subject.opened
    check_vocabulary(model, tokenizer, data, place)
    context, stride = subject.reach(model, context, stride)
    limits = {"max_documents": max_documents, "max_tokens": max_tokens}
    text = Text(data, split, chosen, {"context": context, "stride": stride} | limits)
    return lambda: _measured(subject, text, order=order, records=records)


run = at_once(prepare)


def _measured(subject: Subject, text: Text, *, order: int, records: Path | str | None) -> dict[str, Any]:
    data = text.corpus
    result: dict[str, Any] = {
        "split": text.split,
        "checkpoint": str(subject.place),
        "budget": subject.budget,
        "branches": subject.branches,
        "corpus": {"folder": str(data.folder), "digest": data.manifest["digest"]},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "ngrams": _ngrams(text, order=order, console=subject.console),
    }
    with bar(subject.console, "model", total=text.tokens) as advance:
        mine, routes = _of_model(subject, text, records=records, progress=advance)
    result |= {"model": mine.to_dict(), "routes": routes}
    file = subject.note("eval.json", text.split + subject.asked, result)
    shown = [table(result, name=_name(subject.folder, subject.place) + subject.asked)]
    read = f"context {mine.context}, stride {mine.stride}, {mine.seconds:.1f} s"
    subject.print(*shown, *([] if routes is None else [computed(routes)]), note=f"{read}; written to {file}")
    return result


def _of_model(
    subject: Subject, text: Text, *, records: Path | str | None, progress: Callable[[int], object] | None
) -> tuple[LanguageScore, dict[str, Any] | None]:
    """Return what the model lost, and for one with a pool what it computed for that."""
    model, options = subject.opened[0], text.options | {"progress": progress}
    if getattr(model, "pool", None) is None:
        return score(model, text.corpus, text.split, records=records, **options), None
    begun, totals, out = time.perf_counter(), None, None
    with ExitStack() as files:
        for part in route_groups(model, text.corpus, text.split, budget=subject.budget, **options):
            if totals is None:
                totals = RouteTotals(part.header)
                if records is not None:
                    out = files.enter_context(LossWriter(records, part.losses().header, tokens=text.tokens))
            totals.add(part)
            if out is not None:
                out.add(part.losses())
    assert totals is not None, "`choose` refuses a split without documents"
    whole, most = asdict(totals.score()), {"max_route_steps": model.config.max_route_steps, "blocks": model.config.num_hidden_layers}
    routes = most | {name: whole[name] for name in ("steps_mean", "steps_share", "block_evaluations", "blocks_share", "histogram")}
    return totals.language(seconds=time.perf_counter() - begun), routes


def computed(routes: dict[str, Any]) -> str:
    """Return in a line what a routed model computed: route steps, blocks, and their shares."""
    return (
        f"route steps {routes['steps_mean']:.2f} of {routes['max_route_steps']} ({routes['steps_share']:.0%}), "
        f"{routes['block_evaluations']:.2f} blocks run per token, {routes['blocks_share']:.0%} of the model's {routes['blocks']}"
    )


def table(result: dict[str, Any], *, name: str = "model") -> Table:
    """Return a result of `run` as a table: n-grams by order, then the model."""
    mine, ngrams = result["model"], result["ngrams"]
    title = f"{result['split']}: {mine['documents']:,} documents, {mine['bytes']:,} bytes"
    caption = f"n-grams: interpolated Kneser–Ney, counted on {ngrams['train_tokens']:,} training tokens" if ngrams["orders"] else None
    shown = Table(title=title, caption=caption)
    shown.add_column("")
    for heading in ("loss, nats/token", "perplexity", "bits/byte", "tokens"):
        shown.add_column(heading, justify="right", no_wrap=True)
    rows = [(f"{order}-gram", found, None) for order, found in ngrams["orders"].items()] + [(name, mine, "bold")]
    for label, found, style in rows:
        numbers = (f"{found['loss']:.4f}", f"{found['perplexity']:,.2f}", f"{found['bits_per_byte']:.4f}", f"{found['tokens']:,}")
        shown.add_row(label, *numbers, style=style)
    return shown


def ngram_scores(corpus: Any, split: str, chosen: Sequence[Any], *, order: int, train_tokens: int = NGRAM_TOKENS) -> dict[str, Any]:
    """Score documents under n-grams counted on the corpus's training split, from the corpus folder's cache where they were scored before.

    Returns `train_tokens`, the number counted, and `orders`, a score per order. The cache is keyed by the corpus's digest and everything
    else that decides the scores; a folder that cannot be written to is left without one.
    """
    identity = [NGRAM_FORMAT, corpus.manifest["digest"], split, len(chosen), order, train_tokens]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    file = corpus.folder / NGRAM_CACHE
    cache: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        cache = json.loads(file.read_text(encoding="utf-8"))
    if key not in cache:
        known, nats = _count_and_score(corpus, split, chosen, order=order, train_tokens=train_tokens)
        cache[key] = {"split": split, "documents": len(chosen), "train_tokens": known, "nats": nats}
        with suppress(OSError):
            replace(file, cache)
    found = cache[key]
    tokens, size = sum(record.tokens - 1 for record in chosen), sum(record.bytes for record in chosen)
    scores = [LanguageScore.of(nats, tokens=tokens, size=size, documents=len(chosen)) for nats in found["nats"]]
    orders = {
        str(n): {k: v for k, v in s.to_dict().items() if k not in ("context", "stride", "seconds")} for n, s in enumerate(scores, start=1)
    }
    return {"train_tokens": found["train_tokens"], "orders": orders}


def _count_and_score(corpus: Any, split: str, chosen: Sequence[Any], *, order: int, train_tokens: int) -> tuple[int, list[float]]:
    starts: list[int] = []
    end = 0
    for record in corpus.documents("train"):
        if starts and end + record.tokens > train_tokens:
            break
        starts.append(end)
        end += record.tokens
    reference = KneserNey(corpus.tokens("train")[0:end], np.array(starts), vocab_size=corpus.vocab_size, order=order)
    nats, first = np.zeros(order), 0
    for group in groups(chosen):
        # The chosen documents are the split's first, so a group lies together in its tokens, from `first` on.
        sizes = np.cumsum([0, *(record.tokens for record in group)])
        nats += reference.losses(corpus.tokens(split)[first : first + int(sizes[-1])], sizes[:-1]).sum(axis=1)
        first += int(sizes[-1])
    return end, nats.tolist()


def _ngrams(text: Text, *, order: int, console: Console | None) -> dict[str, Any]:
    if order == 0:
        return {"train_tokens": 0, "orders": {}}
    with nullcontext() if console is None else console.status("counting n-grams"):
        return ngram_scores(text.corpus, text.split, text.chosen, order=order)


def _name(model_folder: Path | str, place: Path) -> str:
    """Return how a model is called in the table: its run and checkpoint, or its folder."""
    run_place = run_folder(place)
    return place.name if run_place == place else f"{run_place.name}, {place.name}"
