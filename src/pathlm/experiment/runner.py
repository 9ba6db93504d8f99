"""`pathlm experiment`: trains what a manifest describes, run after run, measures it, and keeps the table up to date."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from pathlm.config import RunError
from pathlm.experiment import notes, table
from pathlm.experiment.display import Display, plan
from pathlm.experiment.manifest import Experiment, Run, read

# torch is imported where something is checked, trained or measured, so that a table alone is there at once.

LOG = "train.log"
"""What `pathlm train` would have printed, in the run's folder."""


@dataclass(frozen=True)
class ExperimentResult:
    """The table as it is now, and where it was written."""

    table: dict[str, Any]
    files: tuple[Path, ...] = ()
    interrupted: int = 0
    """The signal that ended the work early, 0 if none did."""
    stopped: tuple[str, ...] = field(default=())
    """Runs that had to stop, by their titles."""

    @property
    def exit_code(self) -> int:
        """What a command should exit with: 0, 1 where a run had to stop, 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.interrupted if self.interrupted else int(bool(self.stopped))


def run(
    manifest: Experiment | Path | str,
    *,
    rows: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    dry_run: bool = False,
    table_only: bool = False,
    console: Console | None = None,
) -> ExperimentResult:
    """Train every row of a manifest with every seed, measure it, and write the table after each.

    What an earlier call has finished is skipped, what it left half done is continued. A run that has to stop, for instance at a gate, is
    told of in the table, and the others go on.

    Args:
        manifest: A manifest's file, or what it says.
        rows: Train these only, and those they begin from.
        seeds: Train these only.
        dry_run: Check everything and print what would be trained; write nothing.
        table_only: Train and measure nothing; make the table of what is there.
        console: Where progress and the table appear; nothing is printed without one.

    Raises `ValueError` naming file, row, field, value and rule, before anything is trained, where a row cannot be trained or its folder
    holds a run that it cannot continue.
    """
    experiment = manifest if isinstance(manifest, Experiment) else read(manifest)
    console = console or Console(quiet=True)
    chosen = experiment.chosen(rows, seeds)
    if dry_run and table_only:
        raise ValueError("dry_run=True: makes no table; give it or table_only")
    if table_only:
        return _ended(experiment, console)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("pathlm experiment trains its rows in one process; share them out with --rows or --seeds instead")
    from pathlm.experiment.check import check

    plans = check(experiment, chosen)
    if dry_run:
        console.print(plan(plans))
        return ExperimentResult(table.tabulate(experiment))
    return _carry_out(experiment, chosen, console)


def _carry_out(experiment: Experiment, chosen: Sequence[Run], console: Console) -> ExperimentResult:
    """Train and measure the chosen runs that are not finished."""
    todo = [one for one in chosen if notes.progress(one, experiment).state != "finished"]
    ends: dict[str, str] = {}
    with Display(console, todo, finished=len(chosen) - len(todo)) as display:
        table.write(experiment)
        for one in todo:
            if one.before is not None and (end := ends.get(one.before.title)):
                display.skip(one, f"not begun, since {one.before.title} was {end}")
                continue
            display.begin(one)
            signal = _train_and_measure(one, experiment, display)
            if signal:
                return _ended(experiment, console, interrupted=signal)
            found = notes.progress(one, experiment)
            if found.state != "finished":
                ends[one.title] = found.state
            display.end(one, found)
            table.write(experiment)
    return _ended(experiment, console, stopped=tuple(ends))


def _ended(experiment: Experiment, console: Console, **how: Any) -> ExperimentResult:
    """Write and print the table."""
    found, files = table.write(experiment)
    console.print(table.shown(found, console))
    for line in table.missing(found):
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if how.get("interrupted"):
        console.print("Stopped and saved. Give the same command again to continue.", style="yellow")
    console.print(f"written to {files[1]} and {files[0].name}", style="dim", highlight=False, soft_wrap=True)
    return ExperimentResult(found, files, **how)


def _train_and_measure(one: Run, experiment: Experiment, display: Display) -> int:
    """Bring one run to its end; return the signal that came in between, or 0."""
    from pathlm.experiment.measure import measured
    from pathlm.train import start

    notes.forget(one)
    one.config.folder.mkdir(parents=True, exist_ok=True)
    with (one.config.folder / LOG).open("a", encoding="utf-8") as log:
        try:
            trained = start(one.config, resume=True, console=Console(file=log, width=160), watch=display.watch)
            if trained.interrupted:
                return trained.interrupted
            display.measuring(one)
            notes.write(one, experiment, "finished", measured=measured(one, experiment))
        except (RunError, ValueError) as error:
            traceback.print_exc(file=log)
            notes.write(one, experiment, "stopped" if isinstance(error, RunError) else "refused", why=" ".join(str(error).split()))
    return 0
