"""Where numbers go: a JSON-lines file, the terminal, TensorBoard. A sink is a callable `(state, stage, metrics, model)`.

Sinks are called after every step with everything that was measured in it, and after every evaluation; each decides what it keeps.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from pathlm.config import RunConfig, RunError
from pathlm.train.state import State

Sink = Callable[[State, Any, Mapping[str, float], Any], None]
VALIDATION = "validation/loss"


def wanted(config: RunConfig, state: State, metrics: Mapping[str, float]) -> bool:
    """Tell whether the rhythm of the log asks for this row: first, last and every `log_every` steps, and all evaluations."""
    return VALIDATION in metrics or state.step in (1, config.steps) or state.step % config.log_every == 0


@contextmanager
def jsonl(file: Path, config: RunConfig) -> Iterator[Sink]:
    """Append rows to a JSON-lines file; numbers that are not finite become null."""
    # Unbuffered: a row is in the file as soon as it is told, and nothing is left to be written by a full disk's close.
    with file.open("ab", buffering=0) as out:

        def sink(state: State, stage: Any, metrics: Mapping[str, float], model: Any) -> None:
            if not wanted(config, state, metrics):
                return
            row = {"step": state.step, "tokens": state.tokens, "stage": stage.name}
            append(out, file, [row | {name: value if math.isfinite(value) else None for name, value in metrics.items()}])

        yield sink


def append(out: IO[bytes], file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows, which have a `step`, to a JSON-lines file that is open without a buffer. Raises `RunError` on a full disk."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    try:
        if out.write(lines) != len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        advice = "make room and continue with --resume"
        raise RunError(f"{file} could not be written at step {rows[0]['step']}: {error.strerror}; {advice}") from error


def truncate(file: Path, step: int) -> None:
    """Forget the rows of a JSON-lines file that are later than `step`, and a torn last line; the rest stays byte for byte."""
    if not file.is_file():
        return
    keep = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
                if not line.endswith(b"\n") or row["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            keep += len(line)
    with file.open("r+b") as out:
        out.truncate(keep)
        os.fsync(out.fileno())


@contextmanager
def tensorboard(folder: Path, config: RunConfig, *, start: int) -> Iterator[Sink]:
    """Write scalars that TensorBoard shows; `start` is the step a resumed run continues from."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard = true needs the extra: pip install 'pathlm[tensorboard]'") from error
    with SummaryWriter(str(folder), purge_step=start + 1) as writer:

        def sink(state: State, stage: Any, metrics: Mapping[str, float], model: Any) -> None:
            if wanted(config, state, metrics):
                for name, value in metrics.items():
                    writer.add_scalar(name, value, state.step)

        yield sink


@contextmanager
def screen(console: Console, config: RunConfig, *, start: int) -> Iterator[Sink]:
    """Show a run: a live bar with time left, loss, speed and memory on a terminal, one plain line per logged row elsewhere."""
    if not console.is_terminal:
        yield _lines(console, config)
        return
    columns = (
        TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(config.name, total=config.steps, completed=start, numbers="")

        def sink(state: State, stage: Any, metrics: Mapping[str, float], model: Any) -> None:
            if VALIDATION in metrics:
                best = " [green]best[/]" if state.best_step == state.step else ""
                bar.console.print(f"step {state.step:>6}  {_numbers(state, metrics)}{best}", highlight=False)
                return
            title = f"{config.name} · {stage.name}"
            # A narrow terminal drops numbers from the end, never the bar or the time left; the log has them all.
            room = console.width - len(title) - 2 * len(str(config.steps)) - 48
            bar.update(task, completed=state.step, description=title, numbers=_numbers(state, metrics, room=room))

        yield sink


def _lines(console: Console, config: RunConfig) -> Sink:
    def sink(state: State, stage: Any, metrics: Mapping[str, float], model: Any) -> None:
        if wanted(config, state, metrics):
            text = f"step {state.step}/{config.steps}  {stage.name}  {_numbers(state, metrics)}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    return sink


def _numbers(state: State, metrics: Mapping[str, float], *, room: int = 1000) -> str:
    """Put the numbers a person watches into one line, the first of them that fit into `room` characters."""
    if VALIDATION in metrics:
        return f"validation {metrics[VALIDATION]:.4f}"
    parts = [f"loss {metrics.get('loss/lm', metrics['loss/total']):.4f}"]
    parts.append(f"{metrics['time/tokens_per_s']:,.0f} tok/s")
    if state.last_validation is not None:
        parts.append(f"val {state.last_validation:.4f}")
    parts.append(f"lr {metrics['optim/lr']:.2e}")
    parts.append(f"{metrics['time/flops_utilisation']:.0%} of peak")
    parts.append(f"{metrics['memory/gib']:.2f} GiB")
    while len(parts) > 1 and len("  ".join(parts)) > room:
        parts.pop()
    return "  ".join(parts)
