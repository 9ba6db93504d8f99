"""What a run's folder alone tells: how far it came, how it ended, what was measured. Imports no torch."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pathlm.config import EXECUTION, RHYTHM, RunConfig
from pathlm.experiment.manifest import Experiment, Run

FILE = "experiment.json"
FORMAT = 1
OPEN = ("model.", "knobs.", "stages.", "data.tasks.")
"""Sections of a configuration that hold what a recipe names and nothing else."""
Number = float | int
State = Literal["finished", "not measured", "unfinished", "not begun", "stopped", "refused", "changed"]
End = Literal["finished", "stopped", "refused"]


@dataclass(frozen=True)
class Progress:
    """How far a run is, and its numbers where it is finished."""

    state: State
    step: int = 0
    why: str = ""
    metrics: dict[str, Number] = field(default_factory=dict)
    failed_gates: tuple[dict[str, Any], ...] = ()


def write(run: Run, experiment: Experiment, end: End, *, why: str = "", measured: Mapping[str, Any] | None = None) -> None:
    """Leave in a run's folder how it ended and what was measured, for which configuration and evaluation."""
    note = {
        "format": FORMAT,
        "state": end,
        "why": why,
        "config": run.config.to_dict(),
        "evaluation": _evaluation(experiment),
        "measured": measured,
    }
    replace(run.config.folder / FILE, json.dumps(note, indent=1, ensure_ascii=False) + "\n")


def forget(run: Run) -> None:
    """Remove the note of a run that goes on."""
    (run.config.folder / FILE).unlink(missing_ok=True)


def progress(run: Run, experiment: Experiment) -> Progress:
    """Return how far a run is, for this experiment's evaluation and metrics."""
    folder = run.config.folder
    note, record = _json(folder / FILE), _json(folder / "run.json")
    if note.get("format") != FORMAT or _differences(note["config"], run, besides=("steps",)):
        note = {}
    if not record:
        return Progress(note["state"], why=note["why"]) if note else Progress("not begun")
    log = tuple(_rows(folder / "metrics.jsonl"))
    step = log[-1]["step"] if log else 0
    if changed := _differences(record["config"], run):
        return Progress("changed", step, why=f"the folder holds a run with another {', '.join(changed)}")
    gates = tuple(row for row in _rows(folder / "gates.jsonl") if row["passed"] is False)
    if not note:
        trained = (folder / "checkpoints" / f"step-{run.config.steps:08d}").is_dir()
        return Progress("not measured" if trained else "unfinished", step, failed_gates=gates)
    if note["state"] != "finished":
        return Progress(note["state"], step, note["why"], failed_gates=gates)
    measured = note["measured"] if note["evaluation"] == _evaluation(experiment) else None
    if measured is None:
        return Progress("not measured", step, failed_gates=gates)
    found = {name: _metric(name, run, measured, log) for name in experiment.columns}
    return Progress("finished", step, metrics={n: v for n, v in found.items() if v is not None}, failed_gates=gates)


def replace(file: Path, text: str) -> None:
    """Write a file so that it is there whole or as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, file)


def _evaluation(experiment: Experiment) -> dict[str, Any] | None:
    return asdict(experiment.evaluation) if experiment.evaluates else None


def _metric(name: str, run: Run, measured: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> Number | None:
    """Return one number of a finished run; of those that are logged again and again the last, of speeds the median."""
    if name == "tokens_per_s":
        speeds = [row["time/tokens_per_s"] for row in log if row.get("time/tokens_per_s") is not None]
        return statistics.median(speeds) if speeds else None
    if name == "tokens":
        return measured["step"] * run.config.batch_tokens + _tokens_before(run)
    if "/" in name:
        return next((row[name] for row in reversed(log) if row.get(name) is not None), None)
    return measured.get(name)


def _tokens_before(run: Run) -> int:
    """Return the tokens that had been read for the weights with which a run begins."""
    if run.before is None:
        return 0
    place = (_json(run.config.folder / "run.json").get("init") or {}).get("checkpoint", "")
    step = re.search(r"step-(\d+)$", place)
    return (int(step[1]) if step else 0) * run.before.config.batch_tokens + _tokens_before(run.before)


def _differences(config: Mapping[str, Any], run: Run, *, besides: Sequence[str] = ()) -> list[str]:
    """Return the fields in which a recorded configuration is another one than the run's now, as far as numbers depend on them.

    Those `besides` count too, though a run may be continued with others. A preset counts here, where no model is built to compare.
    """
    ignored = (RHYTHM | EXECUTION) - {"preset", *besides}
    one, other = (dict(_flat({k: v for k, v in table.items() if k not in ignored})) for table in (config, _plain(run.config)))
    if run.before is not None:  # the folder of all runs may have moved
        one, other = ({**table, "init": Path(str(table.get("init"))).name} for table in (one, other))
    # Of the fields that every configuration has, one that only one of them names is an option that another version of the library lacks.
    named = {name for name in one.keys() ^ other.keys() if name.startswith(OPEN)}
    return sorted(named | {name for name in one.keys() & other.keys() if one[name] != other[name]})


def _plain(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as a JSON file holds it."""
    found: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return found


def _flat(table: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{where}{name}.")
        else:
            yield where + name, value


def _json(file: Path) -> dict[str, Any]:
    """Read a JSON file that is replaced as a whole; empty where there is none."""
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Read the whole lines of a JSON-lines file; the last one may be torn."""
    with suppress(OSError, ValueError):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)
