"""A model beside n-grams: what `pathlm eval` measures, prints and writes."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from pathlm.evaluate.checkpoint import find_checkpoint, open_model, run_folder, run_record
from pathlm.evaluate.lm import LanguageScore, choose, groups, reach, score
from pathlm.evaluate.ngram import KneserNey
from pathlm.evaluate.recorded import replace
from pathlm.evaluate.records import LossWriter
from pathlm.evaluate.routes import RouteTotals, route_groups

NGRAM_TOKENS = 20_000_000
"""Training tokens the n-grams are counted on at most, the first whole documents: counting takes about 300 bytes of memory a token."""
NGRAM_CACHE = Path("evaluation") / "ngrams.json"
NGRAM_FORMAT = 1
"""Raised when the scores of the same n-grams would change, so that cached ones are not used."""


def run(
    model_folder: Path | str,
    corpus: Path | str | None = None,
    *,
    split: str = "validation",
    context: int | None = None,
    stride: int | None = None,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    order: int = 5,
    records: Path | str | None = None,
    budget: float | None = None,
    branches: int | None = None,
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure a saved model on a prepared corpus beside n-grams of order 1 … `order` counted on the same training split (0: none).

    Args:
        model_folder: A run (its best, else its latest checkpoint), a checkpoint, or any Hugging Face causal language model.
        corpus: A prepared corpus; by default the one the run was trained on.
        split: Which of its splits.
        context: Tokens the model sees at most; by default the length of the rows it was trained on, else its `max_position_embeddings`.
        stride: Tokens that a window moves on in longer documents; by default half the context.
        max_documents: Measure the first so many documents only.
        max_tokens: Measure the first whole documents that hold at most so many predicted tokens.
        order: Highest n-gram order.
        records: File for the loss of every token, see `evaluate.records`.
        budget: Share of its route steps that a routed model may take on average.
        branches: Ways that a token may take at once through a pool, instead of the model's own number.
        device: Where the model runs; by default a GPU where there is one.
        console: Where progress and the table appear; nothing is printed without one.

    Returns the content that is also written to `eval.json` of the run (or model) folder under the split's name, behind it the budget and
    the branches where they are given. For a model with a pool `routes` tells what it computed: route steps, blocks run, and their shares.

    Raises `ValueError` for options out of range, for a folder without a model, a missing corpus, a tokenizer other than the corpus's, and
    a budget that the model was not trained for.
    """
    from pathlm.text.corpus import Corpus

    place = find_checkpoint(model_folder)
    trained_on = run_record(model_folder).get("config", {}).get("data", {})
    data = Corpus.open(corpus_folder(corpus, trained_on, model_folder), verify=False)
    chosen = choose(data, split, max_documents=max_documents, max_tokens=max_tokens)
    if order < 0:
        raise ValueError(f"order={order}: must be at least 1, or 0 for no n-grams")
    model, tokenizer = open_model(place, device=device, budget=budget, branches=branches)
    check_vocabulary(model, tokenizer, data, place)
    if context is None and trained_on.get("length"):
        context = min(trained_on["length"], getattr(model.config, "max_position_embeddings", None) or trained_on["length"])
    context, stride = reach(model, context, stride)

    result: dict[str, Any] = {
        "split": split,
        "checkpoint": str(place),
        "budget": budget,
        "branches": branches,
        "corpus": {"folder": str(data.folder), "digest": data.manifest["digest"]},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "ngrams": _ngrams(data, split, chosen, order=order, console=console),
    }
    options = {"context": context, "stride": stride, "max_documents": max_documents, "max_tokens": max_tokens}
    tokens = sum(record.tokens - 1 for record in chosen)
    with bar(console, "model", total=tokens) as advance:
        mine, routes = _measured(model, data, split, tokens=tokens, budget=budget, records=records, progress=advance, **options)
    result |= {"model": mine.to_dict(), "routes": routes}
    asked = asked_for(budget, branches)
    file = note_result(run_folder(model_folder) / "eval.json", split + asked, result)
    if console is not None:
        console.print(table(result, name=_name(model_folder, place) + asked))
        if routes is not None:
            console.print(computed(routes), highlight=False, soft_wrap=True)
        console.print(
            f"context {context}, stride {stride}, {mine.seconds:.1f} s; written to {file}", style="dim", highlight=False, soft_wrap=True
        )
    return result


def _measured(
    model: Any, corpus: Any, split: str, *, tokens: int, budget: float | None, records: Path | str | None, **options: Any
) -> tuple[LanguageScore, dict[str, Any] | None]:
    """Return what the model lost, and for one with a pool what it computed for that."""
    if getattr(model, "pool", None) is None:
        return score(model, corpus, split, records=records, **options), None
    begun, totals, out = time.perf_counter(), None, None
    with ExitStack() as files:
        for part in route_groups(model, corpus, split, budget=budget, **options):
            if totals is None:
                totals = RouteTotals(part.header)
                if records is not None:
                    out = files.enter_context(LossWriter(records, part.losses().header, tokens=tokens))
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


def check_vocabulary(model: Any, tokenizer: Any, corpus: Any, place: Path) -> None:
    """Raise `ValueError` unless the model reads the corpus's tokens: its own tokenizer, or without one its vocabulary size, must agree."""
    needed = corpus.vocab_size
    has = model.config.vocab_size
    if has < needed or (tokenizer is None and has != needed):
        raise ValueError(
            f"the model in {place} has vocab_size={has}, the tokenizer of {corpus.folder} has {needed} tokens: they do not match"
        )
    if tokenizer is not None and _identity(tokenizer) != _identity(corpus.tokenizer()):
        raise ValueError(
            f"the model in {place} was trained with another tokenizer than that of {corpus.folder}: their tokens mean different things"
        )


def _identity(tokenizer: Any) -> list[Any]:
    """Return what decides how a tokenizer splits text and numbers its tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    return [tokenizer.get_vocab(), *(backend.get(part) for part in ("model", "pre_tokenizer", "normalizer"))]


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


def _ngrams(corpus: Any, split: str, chosen: Sequence[Any], *, order: int, console: Console | None) -> dict[str, Any]:
    if order == 0:
        return {"train_tokens": 0, "orders": {}}
    if console is None:
        return ngram_scores(corpus, split, chosen, order=order)
    with console.status("counting n-grams"):
        return ngram_scores(corpus, split, chosen, order=order)


def corpus_folder(corpus: Path | str | None, trained_on: dict[str, Any], model_folder: Path | str) -> Path:
    """Return the folder of the named corpus, or of the one a run was trained on; refuses where there is neither."""
    folder = corpus or trained_on.get("corpus")
    if folder is None:
        raise ValueError(f"corpus: {model_folder} does not say which corpus it was trained on; name one")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"corpus folder {str(folder)!r} does not exist")
    return Path(folder)


def _name(model_folder: Path | str, place: Path) -> str:
    """Return how a model is called in the table: its run and checkpoint, or its folder."""
    run_place = run_folder(place)
    return place.name if run_place == place else f"{run_place.name}, {place.name}"


@contextmanager
def bar(console: Console | None, label: str, *, total: int) -> Iterator[Callable[[int], object] | None]:
    """Show a progress bar over `total` tokens and yield the function that moves it on."""
    if console is None:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,} tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda tokens: progress.advance(task, tokens)


def asked_for(budget: float | None, branches: int | None) -> str:
    """Return what stands behind a split's name where a model was asked for another budget or other branches than its own."""
    asked = "" if budget is None else f", budget {budget:g}"
    return asked + ("" if branches is None else f", {branches} branch{'es' * (branches != 1)}")


def note_result(file: Path, name: str, result: dict[str, Any]) -> Path:
    """Put a result under a name, such as its split, into `eval.json`, keeping the others."""
    results: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        results = json.loads(file.read_text(encoding="utf-8"))
    try:
        replace(file, results | {name: result})
    except OSError as error:
        warnings.warn(f"{file} could not be written: {error}", stacklevel=3)
    return file
