"""Gates: what must hold for a stage of training to have succeeded and a larger model to be worth training, judged by recorded numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pathlm.evaluate.gate_readings import (
    Case,
    Read,
    above_frequencies,
    at_equal_blocks,
    at_equal_training,
    budget_error,
    busiest,
    easiest,
    fixed_share,
    leaving,
    measured_twice,
    not_recorded,
    of_routes,
    positions,
    ratio,
    rows_out_of_order,
    steps_of_tasks,
    time_of_tokens,
    under_one_cache,
    wrapping,
)
from pathlm.evaluate.recorded import LOSS, Recorded, check_file, number, read_runs, replace
from pathlm.models.stages import Gate

FILE = "gates.json"


@dataclass(frozen=True)
class Row:
    """A gate, where its number is recorded, and what records it."""

    stage: str
    gate: Gate
    read: Read
    source: str
    command: str
    """RUN, PLAIN … stand for folders."""
    kinds: tuple[str, ...] = ("routed",)
    """What runs it concerns"""
    one_of: bool = False
    """One of these must hold for a decision, and not all."""
    optional: bool = False
    """A decision does not wait for it."""


@dataclass(frozen=True)
class Told:
    """A gate that the curriculum has, with its threshold there: training judges it and writes the verdict."""

    stage: str
    ends: tuple[str, ...]
    """Stages of the curricula that end with it"""
    metric: str
    reason: str
    kinds = ("routed",)


DECODERS = ("plain", "fixed", "routed")
ROUTES = "pathlm eval RUN --suite routing"
BOTH = "pathlm eval RUN and PLAIN, then pathlm gates RUN PLAIN"
TASKS = "pathlm eval RUN --suite synthetic, and PLAIN, then pathlm gates RUN PLAIN"
CODES = "pathlm eval RUN --suite long-context with model.memory=canonical, and PLAIN, then pathlm gates RUN PLAIN"
FIRST, SECOND, THIRD = "R125 → R350", "R350 → R1B", "R1B succeeds"
TABLE: tuple[Row | Told, ...] = (
    Row("stage 0", Gate("log/out_of_order", "<=", 0.0, "a resumed run goes on where it stopped"), rows_out_of_order,
        "metrics.jsonl", "stop pathlm train with Ctrl-C, and repeat it with --resume", kinds=(*DECODERS, "graph")),
    Row("stage 0", Gate("eval/difference", "<=", 1e-6, "evaluation is deterministic"), measured_twice,
        "eval.json, routes.json", "pathlm eval RUN --suite lm,routing; for a plain run, pathlm eval ROUTED --suite routing --against RUN",
        kinds=DECODERS),
    Row("stage 0", Gate("eval/above_unigram", "<=", 0.0, "more is learned than frequencies"), above_frequencies,
        "eval.json", "pathlm eval RUN", kinds=(*DECODERS, "graph")),
    Row("stage 1", Gate("eval/wrapping", "<=", 1e-5, "wrapping changes nothing"), wrapping,
        "eval.json", "pathlm convert PLAIN WRAPPED --wrap PRE/POOL/POST, pathlm eval WRAPPED --corpus CORPUS and PLAIN, "
        "then pathlm gates RUN PLAIN WRAPPED"),
    Told("stage 1", ("wrapped",), "validation/route/imitation", "the router must know the original path before it may follow it"),
    Told("stage 2", ("pseudo-routes",), "validation/route/imitation", "the router must be able to follow any path it is shown"),
    Told("stage 2", ("pseudo-routes",), "validation/route/load_min", "no block may starve"),
    Told("stage 3", ("hand-over",), LOSS, "free routes must not cost the loss"),
    Told("stage 3", ("hand-over",), "validation/route/load_entropy", "the blocks must share the work"),
    Told("stage 4", ("exit", "settled"), "validation/route/steps_error", "tokens must take as many steps as the budget says"),
    Told("stage 4", ("exit", "settled"), "validation/route/leave_first", "leaving must not always happen at once"),
    Row("stage 4", Gate("routes/stay", "<=", 0.95, "leaving must happen"), leaving("last"), "routes.json", ROUTES),
    Told("stage 4", ("exit", "settled"), "validation/route/load_entropy", "the blocks must share the work"),
    Told("stage 4", ("exit", "settled"), "validation/route/difficulty_correlation", "harder tokens must go deeper"),
    Told("stage 5", ("narrowing",), "validation/memory/code_mass", "codes must be read"),
    Told("stage 5", ("narrowing",), LOSS, "codes in the place of rows must not cost more than this"),
    Told("stage 5", ("codes",), "validation/memory/code_mass", "codes must be read"),
    Row("stage 5", Gate("cache/ratio", "<=", 0.95, "the cache must be smaller"), ratio("cache_bytes_per_token", codes=True),
        "run.json", "pathlm train with model.memory=canonical, then pathlm gates RUN PLAIN"),
    Told("stage 6", ("parallel",), "validation/route/branches", "a token must not have more branches than allowed"),
    Told("stage 6", ("parallel",), LOSS, "branches must pay"),
    Row(FIRST, Gate("fixed/excess", "<=", 0.03, "the fixed wrapper is within 3 % of the baseline's loss"), fixed_share,
        "eval.json, metrics.jsonl", "pathlm train RECIPE --set curriculum=fixed, then pathlm gates RUN PLAIN FIXED"),
    Told(FIRST, ("pseudo-routes",), "validation/route/imitation", "the router can imitate"),
    Told(FIRST, ("hand-over",), LOSS, "free routing does not collapse the loss"),
    Row(FIRST, Gate("routes/budget_error", "<=", 0.15, "mean steps follow what a step costs"), budget_error, "routes.json", ROUTES),
    Row(FIRST, Gate("routes/load_max", "<=", 0.5, "the load is not on one block"), busiest, "routes.json", ROUTES),
    Row(FIRST, Gate("position/difference", ">=", 0.01, "block positions matter measurably"), positions,
        "eval.json, metrics.jsonl", "pathlm train RECIPE --set model.block_position=none, then pathlm gates RUN NOPOSITION"),
    Row(FIRST, Gate("routes/leave_first", "<=", 0.95, "OUT is not always early"), leaving("first"), "routes.json", ROUTES),
    Row(FIRST, Gate("routes/stay", "<=", 0.95, "OUT is not never"), leaving("last"), "routes.json", ROUTES),
    Row(SECOND, Gate("equal_blocks/excess", "<=", 0.0, "not worse than a plain decoder with as many active blocks"), at_equal_blocks,
        "eval.json, metrics.jsonl", BOTH),
    Row(SECOND, Gate("synthetic/gain", ">=", 0.01, "tasks of several steps improve"), steps_of_tasks, "synthetic.json", TASKS),
    Row(SECOND, Gate("routes/difficulty_low", ">=", 0.05, "depth goes with difficulty, frequency and position held fixed"),
        of_routes("difficulty", "partial_spearman", "low"), "routes.json", f"{ROUTES} --against PLAIN"),
    Row(SECOND, Gate("routes/easy_blocks", "<=", 0.95, "OUT saves on easy tokens"), easiest, "routes.json", f"{ROUTES} --against PLAIN"),
    Row(SECOND, Gate("cache/accuracy_gain", ">=", 0.0, "memory, if tested, helps under a limit"), under_one_cache,
        "long-context.json", CODES, optional=True),
    Row(THIRD, Gate("equal_flops/excess", "<=", -0.005, "better bits per byte at equal training FLOPs"), at_equal_training,
        "eval.json, run.json", BOTH, one_of=True),
    Row(THIRD, Gate("synthetic/gain", ">=", 0.01, "better reasoning"), steps_of_tasks, "synthetic.json", TASKS, one_of=True),
    Row(THIRD, Gate("cache/accuracy_gain", ">=", 0.01, "better long contexts for their cache"), under_one_cache,
        "long-context.json", CODES, one_of=True),
    Row(THIRD, Gate("text/visible_steps", "<=", 0.9, "less visible chain of thought for the same accuracy"), not_recorded,
        "no file yet", "nothing measures it yet", one_of=True),
    Row(THIRD, Gate("routes/load_entropy", ">=", 0.6, "routing has not collapsed"), of_routes("map", "load_entropy"),
        "routes.json", ROUTES),
    Row(THIRD, Gate("cache/ratio", "<=", 1.0, "the cache stays bounded"), ratio("cache_bytes_per_token"), "run.json", BOTH),
    Row(THIRD, Gate("time/ratio", "<=", 1.25, "a token of training takes no longer"), time_of_tokens, "metrics.jsonl", BOTH),
)  # fmt: skip
"""What is judged, stage by stage, then the decisions to train a larger model."""
LEADS_TO = dict.fromkeys(("wrapped", "pseudo-routes", "hand-over", "exit"), "pathlm train RECIPE --set curriculum=route --set init=PLAIN")
LEADS_TO |= dict.fromkeys(("narrowing", "codes"), "pathlm train RECIPE --set model.memory=local+canonical --set model.local_window=64")
LEADS_TO |= {"parallel": "pathlm train RECIPE --set model.route_beams=2"}
"""What trains a stage of the curriculum."""
DECISIONS = (FIRST, SECOND, THIRD)


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
    check_file("json", json_file)
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
