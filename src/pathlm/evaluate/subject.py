"""What every suite of `pathlm eval` shares: the model that is measured, how it runs, and where its result is written."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pathlm.evaluate.checkpoint import check_share, find_checkpoint, open_model, run_folder, run_record
from pathlm.evaluate.lm import reach
from pathlm.evaluate.recorded import replace

Measure = Callable[[], dict[str, Any]]
"""Measures what was prepared, writes it, prints it, and returns it."""


@dataclass(frozen=True)
class Subject:
    """A saved model to measure; it is opened once, on first use.

    Raises `ValueError` for a budget that is no share, and on first use what `find_checkpoint` and `open_model` raise.
    """

    folder: Path | str
    """A run (its best, else its latest checkpoint), a checkpoint, or any Hugging Face causal language model."""
    budget: float | None = None
    """Share of its route steps that a routed model may take on average."""
    branches: int | None = None
    """Ways that a token may take at once through a pool, instead of the model's own number."""
    device: str | None = None
    """Where the model runs; by default a GPU where there is one."""
    console: Console | None = None
    """Where progress and tables appear; nothing is printed without one."""

    def __post_init__(self) -> None:
        """Refuse what needs no model to be seen."""
        check_share(self.budget)

    @cached_property
    def place(self) -> Path:
        """The folder that holds the weights."""
        return find_checkpoint(self.folder)

    @cached_property
    def trained_on(self) -> dict[str, Any]:
        """The `data` of the run's configuration; empty for a model that is no run."""
        found: dict[str, Any] = run_record(self.place).get("config", {}).get("data", {})
        return found

    @cached_property
    def opened(self) -> tuple[Any, Any]:
        """The model, which is told of budget and branches in every pass, and its tokenizer, None where there is none."""
        return open_model(self.place, device=self.device, budget=self.budget, branches=self.branches)

    @cached_property
    def as_saved(self) -> tuple[Any, Any]:
        """The model that is told of nothing, and its tokenizer."""
        return self.opened if self.budget is None and self.branches is None else open_model(self.place, device=self.device)

    def with_tokenizer(self) -> tuple[Any, Any]:
        """Return `opened`, or raise `ValueError` where there is no tokenizer."""
        if self.opened[1] is None:
            raise ValueError(f"model folder {str(self.folder)!r} holds no tokenizer")
        return self.opened

    def corpus(self, folder: Path | str | None) -> Any:
        """Open a prepared corpus, by default the one the run was trained on; raise where there is none."""
        from pathlm.text.corpus import Corpus

        folder = folder or self.trained_on.get("corpus")
        if folder is None:
            raise ValueError(f"corpus: {self.folder} does not say which corpus it was trained on; name one")
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"corpus folder {str(folder)!r} does not exist")
        return Corpus.open(folder, verify=False)

    def reach(self, model: Any, context: int | None, stride: int | None) -> tuple[int, int]:
        """Return context and stride, by default those of the rows it was trained on (see `evaluate.lm.reach`)."""
        if context is None and (length := self.trained_on.get("length")):
            context = min(length, getattr(model.config, "max_position_embeddings", None) or length)
        return reach(model, context, stride)

    @property
    def asked(self) -> str:
        """What stands behind a split's name where another budget or other branches than the model's own were asked for."""
        asked = "" if self.budget is None else f", budget {self.budget:g}"
        return asked + ("" if self.branches is None else f", {self.branches} branch{'es' * (self.branches != 1)}")

    def note(self, file: str, name: str, result: dict[str, Any]) -> Path:
        """Put a result under a name, such as its split, into a file of the run (or model) folder, keeping the others there."""
        place = run_folder(self.folder) / file
        results: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            results = json.loads(place.read_text(encoding="utf-8"))
        try:
            replace(place, results | {name: result})
        except OSError as error:
            warnings.warn(f"{place} could not be written: {error}", stacklevel=3)
        return place

    def print(self, *parts: Any, note: str) -> None:
        """Show tables and lines where that is asked for, and how they came about."""
        if self.console is not None:
            for part in parts:
                self.console.print(part, highlight=False, soft_wrap=isinstance(part, str))
            self.console.print(note, style="dim", highlight=False, soft_wrap=True)


def at_once(prepare: Callable[..., Measure]) -> Callable[..., dict[str, Any]]:
    """Return a function of a model folder that makes a suite ready and measures it; the fields of `Subject` are among its options."""
    shared = {name: it.replace(kind=it.KEYWORD_ONLY) for name, it in signature(Subject).parameters.items() if name != "folder"}
    own = list(signature(prepare).parameters.values())[1:]

    def run(model_folder: Path | str, *arguments: Any, **options: Any) -> dict[str, Any]:
        subject = Subject(model_folder, **{name: options.pop(name) for name in shared if name in options})
        return prepare(subject, *arguments, **options)()

    folder = Parameter("model_folder", Parameter.POSITIONAL_OR_KEYWORD, annotation=Path | str)
    run.__signature__ = Signature([folder, *own, *shared.values()], return_annotation=dict[str, Any])  # type: ignore[attr-defined]
    run.__doc__ = f"Prepare and measure at once; options of `Subject` are among these.\n\n{prepare.__doc__}"
    return run


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
