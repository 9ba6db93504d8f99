"""From the folders of an experiment's runs to one table: means and spreads over seeds, differences to a baseline. Imports no torch."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from pathlm.experiment import notes
from pathlm.experiment.manifest import MEASURES, Experiment, Run

FORMAT = 1


def tabulate(experiment: Experiment) -> dict[str, Any]:
    """Read every run's folder; return the table as it is written to `<name>.json`."""
    found = {(run.row.name, run.seed): (run, notes.progress(run, experiment)) for run in experiment.runs}
    rows = []
    for row in experiment.rows:
        runs = [_run(*found[row.name, seed], found) for seed in experiment.seeds]
        base = [found[experiment.baseline, seed][1].metrics for seed in experiment.seeds] if experiment.baseline else []
        summary = {name: _over_seeds(name, runs, [] if row.name == experiment.baseline else base) for name in experiment.columns}
        rows.append({"name": row.name, "about": row.about, "from": row.origin, "set": row.set, "metrics": summary, "runs": runs})
    return {
        "format": FORMAT,
        "name": experiment.name,
        "recipe": Path(experiment.recipe).name,
        "set": experiment.set,
        "seeds": experiment.seeds,
        "baseline": experiment.baseline,
        "evaluation": vars(experiment.evaluation) if experiment.evaluates else None,
        "columns": list(experiment.columns),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }


def write(experiment: Experiment) -> tuple[dict[str, Any], tuple[Path, Path]]:
    """Write `<out>/<name>.json` and `<out>/<name>.md`, each whole or not at all; return the table and the two files."""
    found = tabulate(experiment)
    files = (experiment.folder / f"{experiment.name}.json", experiment.folder / f"{experiment.name}.md")
    notes.replace(files[0], json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    notes.replace(files[1], markdown(found))
    return found, files


def markdown(table: Mapping[str, Any]) -> str:
    """Return the table as Markdown: the means, the differences to the baseline, what is missing, and gates that did not hold."""
    rows, columns = table["rows"], table["columns"]
    headings = [heading(name) for name in columns]
    parts = [f"# {table['name']}", _about(table)]
    digits = _digits(table)
    parts.append(_grid(["row", "", "seeds", *headings], [[r["name"], r["about"], _seeds(r), *_cells(r, digits)] for r in rows]))
    if table["baseline"] is not None:
        others = [row for row in rows if row["name"] != table["baseline"]]
        parts.append(f"**Minus {table['baseline']}**, seed by seed:")
        parts.append(_grid(["row", "seeds", *headings], [[r["name"], _paired(r), *_cells(r, digits, less=True)] for r in others]))
    for title, lines in (("Not finished", missing(table)), ("Gates that did not hold", failed_gates(table))):
        if lines:
            parts.append(f"**{title}**:")
            parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"


def shown(table: Mapping[str, Any], console: Console) -> Table:
    """Return the table for a terminal: the differences of the first column, and the means of as many columns as there is room for."""
    for count in range(len(table["columns"]), 0, -1):
        grid = _narrow(table, table["columns"][:count])
        if Measurement.get(console, console.options.update(max_width=1000), grid).maximum <= console.width:
            break
    return grid


def _narrow(table: Mapping[str, Any], columns: Sequence[str]) -> Table:
    baseline, first, digits = table["baseline"], columns[0], _digits(table)
    grid = Table(box=None, padding=(0, 2, 0, 0))
    names = ["row", "seeds", *map(heading, columns)]
    if baseline is not None:
        names.insert(3, f"− {baseline}")
    for name in names:
        grid.add_column(name, justify="left" if name in ("row", "seeds") else "right", no_wrap=True)
    for row in table["rows"]:
        cells = [row["name"], _seeds(row), *(_cell(row["metrics"][name], digits[name], narrow=True) for name in columns)]
        if baseline is not None:
            cells.insert(3, _cell(row["metrics"][first]["difference"], digits[first], less=True, narrow=True))
        grid.add_row(*cells)
    return grid


def missing(table: Mapping[str, Any]) -> list[str]:
    """Return a line for every run that has no numbers: how far it is, and why."""
    lines = []
    for row in table["rows"]:
        for run in row["runs"]:
            if run["state"] != "finished":
                far = f" at step {run['step']} of {run['steps']}" if run["step"] else ""
                why = f": {run['why']}" if run["why"] else ""
                lines.append(f"{row['name']}, seed {run['seed']}: {run['state']}{far}{why}")
    return lines


def failed_gates(table: Mapping[str, Any]) -> list[str]:
    """Return a line for every gate that did not hold."""
    lines = []
    for row in table["rows"]:
        for run in row["runs"]:
            for gate in run["failed_gates"]:
                value, bound = (("none" if gate[name] is None else number(gate[name])) for name in ("value", "bound"))
                said = f"{gate['metric']} is {value}, must be {gate['comparison']} {bound}"
                lines.append(f"{row['name']}, seed {run['seed']}, stage {gate['stage']}: {said}")
    return lines


def heading(name: str) -> str:
    """Return what stands over a column."""
    return MEASURES.get(name, name)


def number(value: notes.Number, digits: int | None = None) -> str:
    """Write a number with so many digits behind the point, by default as many as its own size asks for."""
    digits = _digits_of([value]) if digits is None else digits
    return f"{round(value, digits) + 0:,.{digits}f}"  # + 0: never a minus nought


def _run(run: Run, far: notes.Progress, found: Mapping[tuple[str, int], tuple[Run, notes.Progress]]) -> dict[str, Any]:
    why = far.why
    if far.state == "not begun" and run.before is not None:
        before = found[run.before.row.name, run.seed][1].state
        why = why or (f"row {run.before.row.name} is {before}" if before in ("stopped", "refused", "changed") else "")
    return {
        "seed": run.seed,
        "folder": run.config.name,
        "state": far.state,
        "step": far.step,
        "steps": run.config.steps,
        "why": why,
        "metrics": far.metrics,
        "failed_gates": list(far.failed_gates),
    }


def _over_seeds(name: str, runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, notes.Number]]) -> dict[str, Any]:
    """Sum up one metric of a row, and its differences to the baseline in seeds that both have finished."""
    values = {run["seed"]: run["metrics"][name] for run in runs if name in run["metrics"]}
    pairs = {r["seed"]: values[r["seed"]] - b[name] for r, b in zip(runs, base, strict=False) if r["seed"] in values and name in b}
    return _summary(values) | {"difference": _summary(pairs)}


def _summary(values: Mapping[int, notes.Number]) -> dict[str, Any]:
    """Return mean, sample standard deviation (None for fewer than two) and range."""
    known = list(values.values())
    if not known or not all(math.isfinite(value) for value in known):
        return {"mean": None, "sd": None, "min": None, "max": None, "seeds": list(values)}
    sd = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "sd": sd, "min": min(known), "max": max(known), "seeds": list(values)}


def _about(table: Mapping[str, Any]) -> str:
    parts = [f"recipe `{table['recipe']}`", f"seeds {', '.join(map(str, table['seeds']))}"]
    if table["evaluation"]:
        limits = [f"{name.replace('_', ' ')} {value:,}" for name, value in table["evaluation"].items() if name != "split" and value]
        parts.append(", ".join([f"split {table['evaluation']['split']}", *limits]))
    return f"{'; '.join(parts)}; {table['date'][:10]}. Mean ± standard deviation (smallest … largest) over seeds."


def _seeds(row: Mapping[str, Any]) -> str:
    """Tell how many of a row's seeds are finished, or what the row is."""
    states = [run["state"] for run in row["runs"]]
    done = states.count("finished")
    if done == len(states):
        return str(done)
    if done:
        return f"{done} of {len(states)}"
    return "; ".join(dict.fromkeys(_far(run) for run in row["runs"]))


def _far(run: Mapping[str, Any]) -> str:
    return f"{run['state']}, {run['step']}/{run['steps']}" if run["step"] else run["state"]


def _paired(row: Mapping[str, Any]) -> str:
    return str(max((len(summary["difference"]["seeds"]) for summary in row["metrics"].values()), default=0))


def _digits(table: Mapping[str, Any]) -> dict[str, int]:
    """Return how many digits behind the point each column has, in all its rows and differences."""
    every = {name: [run["metrics"].get(name, 0) for row in table["rows"] for run in row["runs"]] for name in table["columns"]}
    return {name: _digits_of(values) for name, values in every.items()}


def _digits_of(values: Sequence[notes.Number]) -> int:
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0)
    if largest >= 1000 or all(float(value).is_integer() for value in values):
        return 0
    if largest >= 100:
        return 1
    return 4 if largest >= 0.01 else 7


def _cells(row: Mapping[str, Any], digits: Mapping[str, int], *, less: bool = False) -> list[str]:
    found = ((row["metrics"][name], places) for name, places in digits.items())
    return [_cell(summary["difference"] if less else summary, places, less=less) for summary, places in found]


def _cell(summary: Mapping[str, Any], digits: int, *, less: bool = False, narrow: bool = False) -> str:
    """Write a summary: mean ± sd (min … max), the mean alone where there is no spread."""
    if summary["mean"] is None:
        return "–"

    def signed(value: notes.Number) -> str:
        return ("+" if less and value > 0 else "") + number(value, digits).replace("-", "−")

    if summary["sd"] is None or summary["min"] == summary["max"]:
        return signed(summary["mean"])
    spread = "" if narrow else f" ({signed(summary['min'])} … {signed(summary['max'])})"
    return f"{signed(summary['mean'])} ± {number(summary['sd'], digits)}{spread}"


def _grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
