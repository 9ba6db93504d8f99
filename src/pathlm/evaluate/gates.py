"""Gates: what must hold for a stage of training to have succeeded and a larger model to be worth training, judged by recorded numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pathlm.evaluate.recorded import LOSS, Recorded, at, dig, listed, number, read_runs, replace
from pathlm.models.stages import Gate

FILE = "gates.json"
ABOUT_EQUAL = 0.1
"""Largest share in which two costs may differ to be called equal here."""


@dataclass(frozen=True)
class Case:
    """A run to judge, and all runs that it may be compared with."""

    run: Recorded
    runs: Sequence[Recorded] = ()

    def beside(self, *kinds: str) -> list[Recorded]:
        """Return the other runs of some kinds on the same text. A model that was wrapped and not trained names no text."""
        mine = self.run.record.get("corpus_sha256")
        near = [other for other in self.runs if other.kind in kinds and other.folder != self.run.folder]
        return [other for other in near if other.kind == "wrapped" or other.record.get("corpus_sha256") == mine]

    @property
    def plain(self) -> Recorded | None:
        """The plain baseline with most nearly as many blocks."""
        return min(self.beside("plain"), key=lambda other: abs((other.blocks or 0) - (self.run.blocks or 0)), default=None)

    def equal(self, cost: Callable[[Recorded], float | None]) -> Recorded | None:
        """Return the plain baseline whose cost is most nearly the run's, if they are about equal."""
        mine = cost(self.run)
        known = [
            (abs(its / mine - 1), n, other) for n, other in enumerate(self.beside("plain")) if mine and (its := cost(other)) is not None
        ]
        return min(known)[2] if known and min(known)[0] <= ABOUT_EQUAL else None


Read = Callable[[Case], float | None]


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


def rows_out_of_order(case: Case) -> float | None:
    """Count the logged rows of a resumed run that do not come after the one before them."""
    if not case.run.record.get("resumed"):
        return None
    return float(sum(two <= one for one, two in pairwise((row["step"], LOSS in row) for row in case.run.log)))


def measured_twice(case: Case) -> float | None:
    """Return the largest difference between losses that several passes found of one checkpoint, on the same text in the same windows."""
    found = []
    for split, text in case.run.texts().items():
        mine, checkpoint = at(text, "model"), text.get("checkpoint")
        for other in case.runs:  # a plain model is measured again where routes are measured against it
            again = at(other.evaluations, "routes", split)
            same = all(at(again, "settings", name) == at(mine, name) for name in ("context", "stride"))
            if same and at(again, "routed", "tokens") == at(mine, "tokens"):
                if at(again, "checkpoint") == checkpoint and at(again, "routed", "budget") is None:
                    found.append((dig(mine, "loss"), dig(again, "routed", "loss")))
                if at(again, "plain", "checkpoint") == checkpoint:
                    found.append((dig(mine, "loss"), dig(again, "plain", "loss")))
    for routes in case.run.evaluations.get("routes", {}).values():
        once, budget = dig(routes, "routed", "loss"), dig(routes, "routed", "budget")
        found += [
            (once, dig(point, "loss")) for point in listed(routes, "budgets") if budget is not None and dig(point, "budget") == budget
        ]
    return max((abs(a - b) for a, b in found if a is not None and b is not None), default=None)


def above_frequencies(case: Case) -> float | None:
    """Return how much more is lost than by the frequencies of tokens alone."""
    text = next(iter(case.run.texts().values()), {})
    mine, theirs = dig(text, "model", "loss"), dig(text, "ngrams", "orders", "1", "loss")
    return None if mine is None or theirs is None else mine - theirs


def excess(run: Recorded | None, other: Recorded | None, *, name: str = "loss", share: bool = False) -> float | None:
    """Return how much more one run loses than another on the first text that both were measured on alike; of its loss with `share`."""
    theirs = other.losses() if other is not None else {}
    for split, mine in (run.losses() if run is not None else {}).items():
        its = theirs.get(split)
        if its is not None and its["of"] == mine["of"] and mine[name] is not None and its[name] is not None:
            return float((mine[name] - its[name]) / (its[name] if share else 1))
    return None


def wrapping(case: Case) -> float | None:
    """Return by how much the loss of a plain model changed when it was wrapped."""
    found = [abs(more) for wrapped in case.beside("wrapped") if (more := excess(wrapped, case.plain)) is not None]
    return min(found, default=None)


def fixed_share(case: Case) -> float | None:
    """Return what a fixed route loses more than the plain baseline, as a share of the baseline's loss."""
    found = (excess(fixed, case.plain, share=True) for fixed in case.beside("fixed"))
    return next((more for more in found if more is not None), None)


def at_equal_blocks(case: Case) -> float | None:
    """Return how much more is lost than by the plain baseline that runs about as many blocks per token."""
    return excess(case.run, case.equal(Recorded.active_blocks))


def at_equal_training(case: Case) -> float | None:
    """Return the bits per byte above those of the plain baseline that was trained with about as many operations."""
    return excess(case.run, case.equal(lambda run: run.training_flops), name="bits_per_byte")


def not_recorded(case: Case) -> float | None:
    """Return None: no evaluation records this."""
    return None


def of_routes(*names: str) -> Read:
    """Return what reads a number of `routes.json`, of the test split where that was measured."""
    return lambda case: dig(entry(case.run, "routes"), *names)


def entry(run: Recorded | None, evaluation: str) -> Mapping[str, Any]:
    """Return one split of an evaluation, `test` before the others; empty where there is none."""
    entries = {} if run is None else run.evaluations.get(evaluation, {})
    found: Mapping[str, Any] = entries.get("test") or next(iter(entries.values()), {})
    return found


def numbers(values: Any) -> list[float]:
    """Return the values of a list that are numbers."""
    return [found for value in (values if isinstance(values, list) else ()) if (found := number(value)) is not None]


def budget_error(case: Case) -> float | None:
    """Return the largest distance between a budget and the share of the steps that is taken with it."""
    pairs = [(dig(point, "steps_share"), dig(point, "budget")) for point in listed(entry(case.run, "routes"), "budgets")]
    return max((abs(share - budget) for share, budget in pairs if share is not None and budget is not None), default=None)


def leaving(place: str) -> Read:
    """Return what reads the share of tokens that leave as soon as they may (`first`), or take every step (`last`)."""

    def read(case: Case) -> float | None:
        found = numbers(at(entry(case.run, "routes"), "routed", "histogram"))
        first = int(case.run.model.get("min_route_steps") or 0)
        return found[first if place == "first" else -1] if len(found) > first + 1 else None

    return read


def busiest(case: Case) -> float | None:
    """Return the share of one block in all visits, the largest of them."""
    return max(numbers(at(entry(case.run, "routes"), "map", "load")), default=None)


def easiest(case: Case) -> float | None:
    """Return the blocks run for the easiest tenth of the tokens, as a share of those run on average."""
    found = entry(case.run, "routes")
    ran = next((dig(row, "block_evaluations") for row in listed(found, "slices", "difficulty")), None)
    mean = dig(found, "routed", "block_evaluations")
    return ran / mean if ran is not None and mean else None


def positions(case: Case) -> float | None:
    """Return how far apart the losses of two routed runs are of which one knows no block positions."""
    ours = case.run.model.get("block_position") == "none"
    others = (other for other in case.beside("routed") if (other.model.get("block_position") == "none") != ours)
    return next((abs(found) for other in others if (found := excess(case.run, other)) is not None), None)


def steps_of_tasks(case: Case) -> float | None:
    """Return the accuracy on tasks of two steps and more, minus the plain baseline's: a mean over the tasks and k that both were asked."""
    ours, theirs = (
        {(row.get("task"), k): dig(row, "accuracy") for row in listed(entry(run, "synthetic"), "rows") if (k := dig(row, "k")) and k > 1}
        for run in (case.run, case.plain)
    )
    both = [a - b for key, a in ours.items() if a is not None and (b := theirs.get(key)) is not None]
    return sum(both) / len(both) if both else None


def under_one_cache(case: Case) -> float | None:
    """Return the exact match of a run with codes beyond that of one with rows, where no cache may be larger than the first one's largest.

    The mean over the lengths that the first was asked at; a length whose cache the second cannot hold counts as answered wrong.
    """
    if case.run.model.get("memory") in (None, "local"):
        return None
    ours = {row.get("length"): row for row in listed(entry(case.run, "long-context"), "by_cache")}
    limit = max(numbers([row.get("cache_bytes") for row in ours.values()]), default=None)
    for other in case.beside("plain", "routed"):
        theirs = {row.get("length"): row for row in listed(entry(other, "long-context"), "by_cache")}
        pairs = [
            (dig(ours[n], "exact", "value"), dig(theirs[n], "exact", "value"), dig(theirs[n], "cache_bytes")) for n in ours.keys() & theirs
        ]
        known = [(a, b if held <= limit else 0.0) for a, b, held in pairs if limit and a is not None and b is not None and held is not None]
        if known and other.model.get("memory") in (None, "local"):
            return sum(a - b for a, b in known) / len(known)
    return None


def ratio(name: str, *, codes: bool = False) -> Read:
    """Return what divides a recorded cost by the plain baseline's; with `codes` only for a run that has codes."""

    def read(case: Case) -> float | None:
        if case.plain is None or (codes and case.run.model.get("memory") in (None, "local")):
            return None
        ours, theirs = (number(run.record.get(name)) for run in (case.run, case.plain))
        return ours / theirs if ours is not None and theirs else None

    return read


def time_of_tokens(case: Case) -> float | None:
    """Return how long a token of training takes beside one of the plain baseline, both on the same machine as far as is recorded."""
    if case.plain is None or any(case.run.record.get(name) != case.plain.record.get(name) for name in ("device", "processes", "threads")):
        return None
    ours, theirs = case.run.tokens_per_s, case.plain.tokens_per_s
    return theirs / ours if ours and theirs else None


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
