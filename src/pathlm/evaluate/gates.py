"""Gates: what must hold for a stage of training to have succeeded and a larger model to be worth training, judged by recorded numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pathlm.evaluate.gate_readings import Case
from pathlm.evaluate.gate_table import DECISIONS, LEADS_TO, TABLE, Row, Told
from pathlm.evaluate.recorded import Recorded, number, read_runs, replace

FILE = "gates.json"


def judge(case: Case) -> list[dict[str, Any]]:
    """Return a row for every gate that concerns the run, as `gates.json` holds them."""
    return [_verdict(row, case) for row in TABLE if case.run.kind in row.kinds]


def _verdict(row: Row | Told, case: Case) -> dict[str, Any]:
    if isinstance(row, Told):
        found = _told(row, case.run)
        passed = found.get("passed") if isinstance(found.get("passed"), bool) else None
        told = {"metric": row.metric, "value": number(found.get("value")), "comparison": found.get("comparison")}
        told |= {"bound": number(found.get("bound")), "passed": passed, "reason": row.reason, "source": "gates.jsonl"}
        return {"stage": row.stage, **told, "command": LEADS_TO[row.ends[0]]}
    value, gate = row.read(case), row.gate
    told = {"metric": gate.metric, "value": value, "comparison": gate.comparison, "bound": gate.threshold}
    passed = None if value is None else gate.holds(value, gate.threshold)
    marks = {name: True for name in ("one_of", "optional") if getattr(row, name)}
    return {"stage": row.stage, **told, "passed": passed, "reason": gate.reason, "source": row.source, "command": row.command, **marks}


def _told(row: Told, run: Recorded | None) -> Mapping[str, Any]:
    """Return the last verdict on a gate of the curriculum, of this run or of one that its weights went through before."""
    while run is not None:
        for verdict in reversed(run.verdicts):
            if verdict.get("stage") in row.ends and verdict.get("metric") == row.metric:
                return verdict
        run = run.before
    return {}


def decide(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool | None]:
    """Return for every decision whether its gates allow it: True, False, or None while something is not measured."""
    found: dict[str, bool | None] = {}
    for name in DECISIONS:
        mine = [row for row in rows if row["stage"] == name]
        needed = [row["passed"] for row in mine if not row.get("one_of") and not (row.get("optional") and row["passed"] is None)]
        choice = [row["passed"] for row in mine if row.get("one_of")]
        needed += [True if True in choice else None if None in choice else False] if choice else []
        if needed:
            found[name] = False if False in needed else None if None in needed else True
    return found


def run(folders: Sequence[Path | str], *, json_file: Path | str | None = None, console: Console | None = None) -> dict[str, dict[str, Any]]:
    """Judge runs by what is recorded in their folders; nothing is computed anew.

    Args:
        folders: Runs; each is judged, and compared with the others by what they are: a plain baseline on the same corpus, a fixed route,
            a routed model without block positions. A model folder that was wrapped and evaluated is compared with only.
        json_file: Write everything to this file, too.
        console: Where tables appear; nothing is printed without one.

    Returns, by folder, the content of `gates.json` that is written there: `rows`, and for a routed run `decisions`.

    Raises `FileNotFoundError` and `ValueError` for folders that are missing, hold no run, or are damaged, before anything is written.
    """
    runs = read_runs(folders)
    results: dict[str, dict[str, Any]] = {}
    for one in runs:
        if one.kind == "wrapped":
            continue
        case = Case(one, runs)
        rows = judge(case)
        about: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "run": one.name, "kind": one.kind}
        about |= {"preset": one.config.get("preset"), "beside": [other.name for other in runs if other is not one]}
        results[str(one.folder)] = about | {"rows": rows, "decisions": decide(rows)}
    if not results:
        raise ValueError("runs: all are models that were wrapped and not trained; name the run that continues one of them")
    if json_file is not None:
        replace(Path(json_file), results)
    for folder, result in results.items():
        try:
            replace(Path(folder) / FILE, result)
        except OSError as error:
            warnings.warn(f"{Path(folder) / FILE} could not be written: {error}", stacklevel=2)
        if console is not None:
            for part in (*shown(result), ""):
                console.print(part, highlight=False)
    return results


def shown(result: Mapping[str, Any]) -> Iterator[Table | str]:
    """Yield what was judged of one run for a terminal: a table of gates, then what measures those that were not measured."""
    beside = "beside " + ", ".join(result["beside"]) if result["beside"] else ""
    about = ", ".join(filter(None, (result["kind"], result["preset"], beside)))
    table = Table(
        title=f"[bold]{escape(result['run'])}[/] ({escape(about)})", box=None, padding=(0, 2, 0, 0), title_justify="left", title_style=""
    )
    for name in ("verdict", "gate", "why"):
        table.add_column(name, no_wrap=name == "verdict")
    missing: dict[str, list[str]] = {}
    stage = None
    for row in result["rows"]:
        metric = row["metric"].removeprefix("validation/")
        if row["stage"] != stage:
            stage = row["stage"]
            table.add_row(f"[bold]{stage}[/]", "", _WORDS[result["decisions"][stage]] if stage in result["decisions"] else "")
        if row["passed"] is None:
            missing.setdefault(row["command"], []).append(f"{stage} {metric}")
        numbers_ = " ".join(filter(None, (_written(row["value"]), _SIGNS.get(row["comparison"], ""), _written(row["bound"]))))
        marks = ", or another of these" if row.get("one_of") else ""
        table.add_row(f"  {_WORDS[row['passed']]}", f"{metric}\n{numbers_}" if numbers_ else metric, row["reason"] + marks)
    yield table
    if missing:
        yield "\n[bold]what measures the others[/]"
        for command, gates in missing.items():
            yield f"  {escape(command)}\n    [dim]{escape(', '.join(dict.fromkeys(gates)))}[/]"


def _written(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


_WORDS = {True: "[green]pass[/]", False: "[bold red]FAIL[/]", None: "[yellow]not measured[/]"}
_SIGNS = {"<=": "≤", ">=": "≥"}
