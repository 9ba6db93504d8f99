"""`pathlm demo`: the whole way on real text, from nothing to a trained, measured, writing model; repeated, it continues."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from pathlm.config import RunConfig, load

TEXT = "data-sotu"
RECIPE = "plain-tiny"
PROMPT = "My fellow citizens,"
SPLIT = "test"
"""The checkpoint was chosen on the validation split, so it is judged on another one."""


def demo(folder: Path | str = Path("runs/demo"), overrides: Sequence[str] = (), *, console: Console | None = None) -> dict[str, Any]:
    """Prepare the State of the Union addresses, train the recipe `plain-tiny` into `folder`, measure it beside n-grams, let it write.

    Every phase is skipped or continued where an earlier call, finished or stopped, has left something. `overrides` change fields of the
    recipe, for example `steps=50`.

    Returns the run's `folder`, the `corpus`, how the `training` ended, the `evaluation`, the `sample`, the `seconds` of each phase, and
    `exit_code`: 0, or 128 + the signal that stopped the training (evaluation and sample are then missing). Raises `ValueError` where
    `folder` or the corpus folder hold something that other settings made.
    """
    console = console or Console()
    folder = Path(folder)
    config = load(RECIPE, [*overrides, f"out={json.dumps(str(folder.parent))}", f"name={json.dumps(folder.name)}"])
    corpus = Path(str(config.data.corpus))
    seconds: dict[str, float] = {}
    result: dict[str, Any] = {"folder": folder, "corpus": corpus, "seconds": seconds, "exit_code": 0}
    with _phase(console, seconds, "1/4 text", f"fetch the State of the Union addresses, train a tokenizer, pack tokens into {corpus}"):
        _prepare(config, corpus, console)
    with _phase(console, seconds, "2/4 training", f"the recipe {RECIPE!r} into {folder}"):
        result["training"] = _train(config, console)
    if result["training"].interrupted:
        console.print("Stopped. The demo needs no --resume: repeat the command that began it.", style="yellow")
        return result | {"exit_code": result["training"].exit_code}
    with _phase(console, seconds, "3/4 evaluation", f"on the {SPLIT} split, beside n-grams counted on the same training text"):
        result["evaluation"] = _evaluate(folder, console)
    with _phase(console, seconds, "4/4 sample", "what the model writes"):
        result["sample"] = _sample(folder, console)
    _farewell(folder, corpus, result, console)
    return result


@contextmanager
def _phase(console: Console, seconds: dict[str, float], name: str, what: str) -> Iterator[None]:
    """Print a heading, and afterwards how long the phase took."""
    console.print(f"\n[bold cyan]{name}[/]  {what}", highlight=False, soft_wrap=True)
    start = time.perf_counter()
    yield
    seconds[name.split()[1]] = time.perf_counter() - start
    console.print(f"{seconds[name.split()[1]]:.1f} s", style="dim", highlight=False)


def _prepare(config: RunConfig, corpus: Path, console: Console) -> None:
    from pathlm.models.library import preset
    from pathlm.text.prepare import from_arguments, prepare
    from pathlm.text.progress import bar, summary

    vocab_size = preset(config.preset, **config.model).vocab_size
    job = from_arguments([TEXT], out=str(corpus), vocab_size=vocab_size)
    if (corpus / "manifest.json").exists():
        console.print("already prepared", style="dim")
        manifest = prepare(job)
    else:
        with bar(console) as progress:
            manifest = prepare(job, progress=progress)
    console.print(summary(manifest))


def _train(config: RunConfig, console: Console) -> Any:
    from pathlm.train import start

    return start(config, resume=(config.folder / "run.json").is_file(), console=console)


def _evaluate(folder: Path, console: Console) -> dict[str, Any]:
    """Measure, unless this very checkpoint has been measured; print the table either way."""
    from pathlm.evaluate import run
    from pathlm.evaluate.checkpoint import find_checkpoint
    from pathlm.evaluate.compare import table

    file = folder / "eval.json"
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")).get(SPLIT, {}) if file.is_file() else {}
    if known.get("checkpoint") == str(find_checkpoint(folder)):
        console.print("already measured", style="dim")
        console.print(table(known, name=folder.name))
        return known
    return run(folder, split=SPLIT, console=console)


def _sample(folder: Path, console: Console) -> str:
    from pathlm.generate import run

    return run(folder, [PROMPT], max_new_tokens=120, temperature=0.8, top_p=0.95, console=console)[0]


def _farewell(folder: Path, corpus: Path, result: dict[str, Any], console: Console) -> None:
    """Print the verdict, where everything is, and what to type next."""
    measured = result["evaluation"]
    ours, theirs = measured["model"]["bits_per_byte"], measured["ngrams"]["orders"]["3"]["bits_per_byte"]
    verdict = "better than" if ours < theirs else "not better than"
    console.print(f"\n[bold]{ours:.4f} bits per byte, {verdict} the 3-gram's {theirs:.4f}[/] ({ours - theirs:+.4f})", highlight=False)
    places = {"run": folder, "weights": folder / "checkpoints" / "best", "log": folder / "metrics.jsonl", "text": corpus}
    for name, place in places.items():
        console.print(f"  {name:<8} {place}", highlight=False, soft_wrap=True)
    console.print("\nWhat to type next (after [bold]source .venv/bin/activate[/], or with .venv/bin/ in front):", highlight=False)
    for command in (
        f'pathlm generate {folder} "The state of the Union is"',
        f"pathlm eval {folder} --split shift",
        f"pathlm train {RECIPE} --set name=wider --set model.hidden_size=192 --set model.intermediate_size=512",
        "pathlm presets",
    ):
        console.print(f"  {command}", style="bold", highlight=False, soft_wrap=True)
