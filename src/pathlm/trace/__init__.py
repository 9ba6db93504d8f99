"""`pathlm trace`: the path of every token of a text, on a terminal and as JSON lines, for models of every family."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from pathlm.evaluate.checkpoint import check_budget, check_share, evaluating, open_model, run_folder
from pathlm.generate import context_of, encode_prompt
from pathlm.models import family
from pathlm.path import NEIGHBOURS, PATHS, Path, write_neighbours, write_paths
from pathlm.trace import routes, signals
from pathlm.trace.routes import COLOURS, Scale, cost, route, sentence, steps, table
from pathlm.words import BYTE, label, readable, spelled

__all__ = ["COLOURS", "Scale", "cost", "label", "readable", "route", "run", "sentence", "show", "steps", "table", "trace"]


def run(
    folder: File | str,
    texts: Sequence[str] = ("",),
    *,
    budget: float | None = None,
    branches: int | None = None,
    out: File | str | None = None,
    keep: bool = False,
    device: str | None = None,
    mmap: bool = False,
    console: Console | None = None,
) -> list[list[Path]]:
    """Read texts with the model of a run, checkpoint or Hugging Face folder; return the paths of each text's tokens.

    A text's first path is that of the start token before it. `budget` is the share of its route steps that a routed model may take,
    `branches` the number of ways a token may take at once; its path is then the best one. With a console the paths are printed on it, a
    line per token; `out` names a file for them, a `Path` record a line, one text after the other. `keep` writes that file into the run's
    folder, where `pathlm report` looks for it, and for a signal graph the neighbours of the texts' nodes beside it.
    `mmap` leaves the weights of a signal graph on disk.
    Raises `ValueError` for a model that tells no paths, a text longer than its context, and a budget that it was not trained for.
    """
    check_share(budget)
    if out is not None and not File(out).parent.is_dir():
        raise FileNotFoundError(f"out={str(out)!r}: the folder {str(File(out).parent)!r} does not exist")
    model, tokenizer = open_model(folder, device=device, branches=branches, mmap=mmap)
    if tokenizer is None:
        raise ValueError(f"model folder {str(folder)!r} has no tokenizer; text cannot be turned into tokens")
    found = trace(model, tokenizer, texts, budget=budget)
    numbered = [replace(path, document=number) for number, paths in enumerate(found) for path in paths]
    files = [] if out is None else [File(out)]
    files += [run_folder(folder) / PATHS] if keep else []
    for file in files:
        write_paths(file, numbered)
    if keep and (package := family(model.config.model_type)) and hasattr(package, "neighbours"):
        nodes = [node for text in texts for node in encode_prompt(tokenizer, text)]
        write_neighbours(run_folder(folder) / NEIGHBOURS, package.neighbours(model, tokenizer, nodes))
    if console is not None:
        show(found, console)
        count = f"{len(numbered):,} path{'s' * (len(numbered) != 1)}"
        for file in files:
            console.print(f"{count} written to {file}", style="dim", highlight=False, soft_wrap=True)
    return found


def trace(model: Any, tokenizer: Any, texts: Sequence[str], *, budget: float | None = None) -> list[list[Path]]:
    """Return, per text, the path of every token, its start token first. Raises `ValueError` as `run` does."""
    kind = model.config.model_type
    if kind == "llama":
        raise ValueError("a Llama model tells no paths; `pathlm convert FOLDER OUT` makes a plain decoder of it, --wrap a routed one")
    package = family(kind)
    options = check_budget(model, budget)
    context, rows = context_of(model), [encode_prompt(tokenizer, text) for text in texts]
    for number, row in enumerate(rows, start=1):
        if not row:
            raise ValueError(f"text {number} is empty, and the tokenizer has no start token")
        if context is not None and len(row) > context:
            raise ValueError(f"text {number} has {len(row):,} tokens: the model reads at most max_position_embeddings={context:,}; cut it")
    found = []
    with evaluating(model), torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row], device=model.device)
            found.append(package.paths(model(input_ids=ids, use_cache=False, trace=True, **options), tokenizer))
    return found


def show(found: Sequence[Sequence[Path]], console: Console) -> None:
    """Print the paths of some texts: a line per token, and the text in colours; the families differ in what a line tells."""
    graph = any(path.family == "brillm" for paths in found for path in paths)
    (signals if graph else routes).show(found, console)
    texts = [[step.node for step in path.steps] for paths in found for path in paths] if graph else [[p.text for p in ps] for ps in found]
    rivals = [name for paths in found for path in paths for step in path.steps for name, _ in step.rivals] if graph else []
    for line in _about_bytes(texts, rivals):
        console.print(Text(line, "dim"))


def _about_bytes(texts: Sequence[Sequence[str]], rivals: Sequence[str]) -> Iterator[str]:
    """Yield what names mean that hold a part of a character, where there are some."""
    spellings = [spelling for names in texts for spelling in spelled(names)]
    if part := next((found for it in spellings if (found := re.search(r"(.) 1/([2-4])$", it.name)) and it.text.endswith("◌")), None):
        yield f"{part[0]} is the first of the {part[2]} tokens that spell {part[1]}; in the text ◌ stands for it"
    if byte := next((found for name in [*(it.name for it in spellings), *rivals] if (found := BYTE.search(name))), None):
        yield f"{byte[0]} is a byte, no whole character"
