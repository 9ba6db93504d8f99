"""What a table of runs looks like while it is made: a bar over all runs, a line for each, and the plan of a dry run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from pathlm.experiment import notes
from pathlm.experiment.manifest import Run
from pathlm.experiment.table import heading, number

if TYPE_CHECKING:
    from pathlm.experiment.check import Plan


class Display:
    """A bar over the tokens of all runs on a terminal; everywhere a line when a run begins and when it ends."""

    def __init__(self, console: Console, todo: Sequence[Run], *, finished: int) -> None:
        self.console, self.runs = console, len(todo) + finished
        self.number, self.before, self.began = finished, 0, 0.0
        self.run: Run | None = None
        columns = (
            TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True)),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("", total=sum(_tokens(run) for run in todo), numbers="")
        if finished:
            console.print(f"{finished} of {self.runs} runs are finished already", style="dim", highlight=False)

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def begin(self, run: Run) -> None:
        """Say which run comes next."""
        self.run, self.began = run, time.monotonic()
        self.number += 1
        origin = f", from {run.before.row.name}" if run.before is not None else ""
        self._say(f"{self.number}/{self.runs}  {run.title}{origin}: {run.config.steps:,} steps of {run.config.batch_tokens:,} tokens")
        self.progress.update(self.task, description=f"{self.number}/{self.runs} {run.config.name}", numbers="")

    def watch(self, state: Any, stage: Any, metrics: Mapping[str, float], model: Any) -> None:
        """Move the bar on: a sink of the run that is trained."""
        assert self.run is not None
        if "loss/total" in metrics:  # a step, not an evaluation
            loss = metrics.get("loss/lm", metrics["loss/total"])
            numbers = f"{stage.name} · step {state.step}/{self.run.config.steps}  loss {loss:.4f}"
            self.progress.update(self.task, completed=self.before + state.tokens, numbers=numbers)

    def measuring(self, run: Run) -> None:
        """Say that the run is trained and now measured."""
        self.progress.update(self.task, completed=self.before + _tokens(run), numbers="measuring")

    def end(self, run: Run, found: notes.Progress) -> None:
        """Say how a run ended, with its first numbers."""
        self._past(run)
        numbers = ", ".join(f"{number(value)} {heading(name)}" for name, value in list(found.metrics.items())[:3])
        how = f"finished: {numbers}" if found.state == "finished" else f"{found.state} at step {found.step}: {found.why}"
        failed = f"; {len(found.failed_gates)} gates did not hold" if found.failed_gates else ""
        self._say(f"    {how}{failed} ({time.monotonic() - self.began:.0f} s)")

    def skip(self, run: Run, why: str) -> None:
        """Say that a run cannot begin."""
        self.number += 1
        self._past(run)
        self._say(f"{self.number}/{self.runs}  {run.title}: {why}")

    def _past(self, run: Run) -> None:
        self.before += _tokens(run)
        self.progress.update(self.task, completed=self.before)

    def _say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def plan(plans: Sequence[Plan]) -> Table:
    """Return what a dry run shows: every run, where it begins, its steps and size, and how far it is."""
    grid = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("run", "from", "steps", "tokens a step", "parameters", "state"):
        grid.add_column(name, justify="right" if name in ("steps", "tokens a step", "parameters") else "left")
    for one in plans:
        config, before = one.run.config, one.run.before
        size = "as counted" if one.parameters is None else f"{one.parameters:,}"
        far = f"{one.progress.state}, step {one.progress.step}" if one.progress.step else one.progress.state
        grid.add_row(config.name, before.config.name if before else "", f"{config.steps:,}", f"{config.batch_tokens:,}", size, far)
    left = [one for one in plans if one.progress.state != "finished"]
    tokens = sum(_tokens(one.run) - one.progress.step * one.run.config.batch_tokens for one in left)
    grid.add_section()
    grid.add_row(f"{len(left)} of {len(plans)} to train", "", "", f"{max(tokens, 0):,} in all", "", "")
    return grid


def _tokens(run: Run) -> int:
    return run.config.steps * run.config.batch_tokens
