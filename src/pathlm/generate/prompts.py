"""The body of `pathlm generate`: prompts from anywhere, continuations on a console."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from io import TextIOBase
from pathlib import Path

from rich.console import Console

from pathlm.evaluate.checkpoint import check_share, open_model
from pathlm.generate.sampling import Sampling
from pathlm.generate.streaming import Piece, stream


def read_prompts(
    arguments: Sequence[str] = (), files: Sequence[Path | str] = (), *, whole: bool = False, stdin: TextIOBase | None = None
) -> list[str]:
    """Collect prompts: the arguments, then one per non-empty line of each file (the whole file when `whole`; `-` is standard input).

    With neither arguments nor files, standard input is read unless it is a terminal; if that gives nothing, there is one empty prompt,
    which starts from the model's start token.
    """
    source = sys.stdin if stdin is None else stdin
    names = list(files) if arguments or files or source.isatty() else ["-"]
    prompts = list(arguments)
    for name in names:
        try:
            text = source.read() if str(name) == "-" else Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"prompt file {str(name)!r} is not UTF-8: byte {error.start} cannot be read") from error
        prompts += [text.removesuffix("\n")] if whole and text else [line for line in text.splitlines() if line.strip()]
    return prompts or [""]


def run(
    folder: Path | str,
    prompts: Sequence[str] = ("",),
    *,
    max_new_tokens: int = 128,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch: int = 8,
    stop_at_end: bool = True,
    budget: float | None = None,
    branches: int | None = None,
    mmap: bool = False,
    device: str | None = None,
    console: Console | None = None,
) -> list[str]:
    """Continue texts with the model of a run, checkpoint or Hugging Face folder; return the continuations, in order.

    With a console, text appears on it as it is written: the prompt, then its continuation. Of several prompts each is labelled with its
    number; they run together but are shown one after the other. `budget` is the share of its route steps that a routed model may take,
    `branches` the number of ways a token may take at once.
    `mmap` leaves the weights of a signal graph on disk.
    """
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)  # refuse bad values before the model is loaded
    check_share(budget)
    model, tokenizer = open_model(folder, device=device, branches=branches, mmap=mmap)
    if tokenizer is None:
        raise ValueError(f"model folder {str(folder)!r} has no tokenizer; text cannot be turned into tokens")
    pieces = stream(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        seed=seed, batch=batch, stop_at_end=stop_at_end, budget=budget,
    )  # fmt: skip
    texts = [""] * len(prompts)
    show = _show(prompts, console)
    for piece in pieces:
        texts[piece.prompt] += piece.text
        show(piece)
    return texts


def _show(prompts: Sequence[str], console: Console | None) -> Callable[[Piece], None]:
    """Return a function that prints pieces so that each prompt's text stays together, the first unfinished one live."""
    if console is None:
        return lambda piece: None
    waiting = [""] * len(prompts)
    done = [False] * len(prompts)
    current = -1

    def write(text: str) -> None:
        console.file.write(text)
        console.file.flush()

    def begin(number: int) -> None:
        if len(prompts) > 1:
            console.print(f"[{number + 1}/{len(prompts)}]", style="bold cyan", markup=False, highlight=False)
        console.print(prompts[number], style="bold", end="", markup=False, highlight=False, soft_wrap=True)

    def show(piece: Piece) -> None:
        nonlocal current
        if current < 0:
            current = 0
            begin(0)
        waiting[piece.prompt] += piece.text
        done[piece.prompt] = piece.stopped is not None
        while current < len(prompts):
            write(waiting[current])
            waiting[current] = ""
            if not done[current]:
                break
            write("\n" if current + 1 == len(prompts) else "\n\n")
            current += 1
            if current < len(prompts):
                begin(current)

    return show
