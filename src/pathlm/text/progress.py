"""A progress bar for `prepare`: what is being done, megabytes a second, and how long it will take."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from pathlm.text.collect import Report
from pathlm.text.manifest import Manifest

TITLES = {"read": "Reading text", "tokenizer": "Training tokenizer", "encode": "Encoding", "write": "Writing shards"}
_EVERY = 0.1


def bar(console: Console) -> Progress:
    """Return a bar to be used as `with bar(console) as progress: prepare(config, progress=progress)`."""
    columns = (TextColumn("{task.description:<18}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def rich_reporter(progress: Progress) -> Report:
    """Return a callable that moves one task of the bar per phase, at most ten times a second."""
    tasks: dict[str, TaskID] = {}
    last = {"time": 0.0, "done": 0}

    def report(phase: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if phase not in tasks:
            for task in tasks.values():
                progress.update(task, total=progress.tasks[task].completed)
            tasks[phase] = progress.add_task(TITLES.get(phase, phase), total=total)
        elif now - last["time"] < _EVERY and done != total:
            return
        last["time"] = now
        progress.update(tasks[phase], completed=done, total=total)

    return report


def summary(manifest: Manifest) -> Table:
    """Return a prepared corpus as a table: documents, tokens and bytes of each split, then where it lies."""
    kind, size = manifest.tokenizer["kind"], manifest.vocab_size
    shown = Table(title=f"{manifest.folder}: {kind} tokenizer, {size:,} tokens", title_justify="left", box=None, padding=(0, 2, 0, 0))
    shown.add_column("split")
    for name in ("documents", "tokens", "bytes"):
        shown.add_column(name, justify="right")
    usual = [name for name in ("train", "validation", "test") if name in manifest.splits]
    for name in [*usual, *sorted(manifest.splits.keys() - set(usual))]:
        split = manifest.splits[name]
        shown.add_row(name, *(f"{split[field]:,}" for field in ("documents", "tokens", "bytes")))
    return shown
