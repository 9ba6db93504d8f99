"""Questions with known answers: how many were right, by length, by size of the cache, by steps, and among choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from pathlm.report.charts import LINES, Dot, Line, dots, lines
from pathlm.report.figure import Figure, Missing, Section, table, told
from pathlm.report.read import OTHER_FORM, Run

Rows = Sequence[Mapping[str, Any]]
KIB = 1024
INTERVALS = "Bars hold 95 % of the values found in samples drawn anew."


def long_contexts(run: Run) -> tuple[Section | None, list[Missing]]:
    """Return how many answers that lie far back were right, by length and by what the cache took."""
    if not run.long_contexts:
        asks = "pathlm eval {run} --suite long-context"
        return None, [Missing("right answers by length and size of the cache", asks)] * _trained_on_filler(run)
    lead = "Answers that lie far back in a text. Right is what was written, word for word, by greedy decoding through the cache."
    figures = [figure for name, entry in run.long_contexts.items() for figure in _long(name, entry)]
    return Section("long", "Long contexts", lead, figures), []


def synthetic(run: Run) -> tuple[Section | None, list[Missing]]:
    """Return how many answers to synthetic tasks were right, by the steps they need."""
    if not run.synthetic:
        return None, [Missing("right answers to the tasks", "pathlm eval {run} --suite synthetic")] * bool(_trained_on(run))
    lead = "Tasks made by rule, each with a number of steps that its answer needs. Right is an answer with every token right."
    return Section("synthetic", "Synthetic tasks", lead, [_steps(name, entry["rows"]) for name, entry in run.synthetic.items()]), []


def choices(run: Run) -> tuple[Section | None, list[Missing]]:
    """Return how often the right continuation was the likeliest, beside guessing."""
    if not run.choices:
        return None, [Missing("choices among continuations", "pathlm eval {run} --suite choices")] * bool(_data(run).get("corpus"))
    lead = "Which of several continuations the model finds likeliest: by the likelihood as it is, or per byte or token of the choice."
    return Section("choices", "Multiple choice", lead, [_choices(name, entry["rows"]) for name, entry in run.choices.items()]), []


def beside(runs: Sequence[Run]) -> list[Figure]:
    """Return runs that were asked the same questions, by the bytes that their caches took; nothing where fewer than two were."""
    same: dict[tuple[str, frozenset[str]], list[tuple[str, Rows]]] = {}
    for run in runs:
        with suppress(*OTHER_FORM):  # its own chapter has a note of that
            long_contexts(run)
            for name, entry in run.long_contexts.items():
                if rows := _with_cache(entry):
                    same.setdefault((name, frozenset(map(_task, entry["rows"]))), []).append((run.name, rows))
    return [_compared(name, asked) for (name, _), asked in same.items() if len(asked) > 1]


def _long(name: str, entry: Mapping[str, Any]) -> list[Figure]:
    tasks = _grouped([(_task(row), row) for row in entry["rows"]])
    label = (
        f"Share of right answers by length for {len(tasks)} tasks; " + "; ".join(_ends(task, rows) for task, rows in tasks.items()) + "."
    )
    picture = _curves([_points(rows, "length") for rows in tasks.values()], label, "tokens of the text")
    cells = [
        (_task(row), told(row["length"], 0), *_right(row), _kib(row), told(row["cache_bytes_per_token"], 0), told(row["answers"], 0))
        for row in entry["rows"]
    ]
    columns = ("task", "length", "exact match", "teacher-forced", "cache, KiB", "cache, bytes a token", "answers")
    caption = f"Share of answers that are right in every token, by length of the text. {INTERVALS}"
    by_length = Figure(
        f"Right answers by length, {name}", picture, caption, table(columns, cells, f"Long contexts, {name}"), _legend([*tasks])
    )
    if not (rows := _with_cache(entry)):
        return [by_length]
    label = f"Share of right answers by size of the cache: {_ends('all tasks', rows)}."
    picture = _curves([_points(rows, "cache_bytes", KIB)], label, "KiB of the cache of one sequence")
    caption = f"All tasks together, by the bytes that the cache held when text and answer had been read; a dot for each length. {INTERVALS}"
    smallest = [(_kib(row), told(row["length"], 0), *_right(row), told(row["answers"], 0)) for row in rows]
    heads = ("cache, KiB", "length", "exact match", "teacher-forced", "answers")
    numbers = table(heads, smallest, f"All tasks by size of the cache, {name}")
    return [by_length, Figure(f"Right answers by size of the cache, {name}", picture, caption, numbers)]


def _compared(name: str, asked: Sequence[tuple[str, Rows]]) -> Figure:
    label = f"Share of right answers by size of the cache for {len(asked)} runs; " + "; ".join(_ends(*run) for run in asked) + "."
    picture = _curves([_points(rows, "cache_bytes", KIB) for _, rows in asked], label, "KiB of the cache of one sequence")
    cells = [(run, told(row["length"], 0), _kib(row), *_right(row)) for run, rows in asked for row in rows]
    numbers = table(("run", "length", "cache, KiB", "exact match", "teacher-forced"), cells, f"Runs by size of the cache, {name}")
    caption = f"The same questions to every run, a dot for each length: farther left remembers in less, higher answers better. {INTERVALS}"
    legend = _legend([run for run, _ in asked])
    return Figure(f"Long contexts by size of the cache, {name}", picture, caption, numbers, legend)


def _steps(name: str, scores: Rows) -> Figure:
    tasks = _grouped([(_spaced(row["task"]), row) for row in scores])
    label = f"Share of right answers by steps for {len(tasks)} tasks; "
    label += "; ".join(f"{task}: {told(rows[-1]['accuracy'])} at {rows[-1]['k']}" for task, rows in tasks.items()) + "."
    if legend := _legend([*tasks]) if len(scores) > len(tasks) else []:
        points = [[(float(row["k"]), row["accuracy"], row["low"], row["high"]) for row in rows] for rows in tasks.values()]
        picture = _curves(points, label, "steps k")
    else:  # a line of one point is none
        given = [Dot(task, row["accuracy"], row["low"], row["high"], "s0", told(row["accuracy"])) for task, (row,) in tasks.items()]
        picture = dots(given, label=label, across="share of right answers")
    cells = []
    for row in scores:
        right = f"{told(row['accuracy'])}{'*' * (not row['held_out'])} ({told(row['low'])}–{told(row['high'])})"
        cells.append((_spaced(row["task"]), told(row["k"], 0), right, told(row["token_accuracy"]), told(row["samples"], 0)))
    caption = "Share of answers that are right in every token, by the steps that they need, with 95 % intervals."
    if not all(row["held_out"] for row in scores):
        caption += " In the table, * marks steps with so few prompts that training may have met them."
    numbers = table(("task", "steps", "answers right", "tokens right", "answers"), cells, f"Synthetic tasks, {name}")
    return Figure(f"Right answers by steps, {name}", picture, caption, numbers, legend)


def _choices(name: str, scores: Rows) -> Figure:
    given, cells = [], []
    for set_, rows in _grouped([(str(row["set"]), row) for row in scores]).items():
        for row in rows:
            way = str(row["normalisation"]).replace("_", " ")
            given.append(Dot(f"{set_}, {way}", row["accuracy"], row["low"], row["high"], "s0", told(row["accuracy"])))
            between = f"{told(row['accuracy'])} ({told(row['low'])}–{told(row['high'])})"
            cells.append((set_, way, between, told(row["chance"]), told(row["questions"], 0)))
        given.append(Dot(f"{set_}, guessing", rows[0]["chance"], None, None, "rival", told(rows[0]["chance"])))
    label = "Share of right choices: " + "; ".join(f"{dot.name} {dot.told}" for dot in given) + "."
    caption = "How often the right continuation was the likeliest, with 95 % intervals; a ring is what guessing would have."
    numbers = table(("questions", "likelihood", "right", "guessing", "asked"), cells, f"Multiple choice, {name}")
    legend = [("dot s0", "this model"), ("dot rival", "guessing")]
    return Figure(f"Right choices, {name}", dots(given, label=label, across="share of right choices"), caption, numbers, legend)


Point = tuple[float, float, float, float]


def _points(rows: Rows, name: str, unit: int = 1) -> list[Point]:
    """Return where rows stand and what their share of exact answers is, with its interval."""
    return sorted((row[name] / unit, row["exact"]["value"], row["exact"]["low"], row["exact"]["high"]) for row in rows)


def _curves(curves: Sequence[Sequence[Point]], label: str, across: str) -> Any:
    given = [
        Line([(x, y) for x, y, _, _ in points], f"s{i}", dots=True, between=[(low, high) for _, _, low, high in points])
        for i, points in enumerate(curves[:LINES])
    ]
    return lines(given, label=label, across=across, up="share of right answers", limits=(0.0, 1.0), doubling=True)


def _legend(names: Sequence[str]) -> list[tuple[str, str]]:
    shown = [(f"line s{i}", name) for i, name in enumerate(names[:LINES])]
    hidden = len(names) - len(shown)
    return shown + ([("", f"{hidden} more in the table")] if hidden else [])


def _grouped(named: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, row in named:
        groups.setdefault(name, []).append(row)
    return groups


def _ends(name: str, rows: Rows) -> str:
    """Say how many answers were right in the shortest and the longest texts."""
    first, last = (edge(rows, key=lambda row: row["length"]) for edge in (min, max))
    return f"{name}: {told(first['exact']['value'])} at {first['length']:,} tokens, {told(last['exact']['value'])} at {last['length']:,}"


def _right(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the shares of exact and of teacher-forced answers with their intervals."""
    exact, forced = (f"{told(it['value'])} ({told(it['low'])}–{told(it['high'])})" for it in (row["exact"], row["forced"]))
    return exact, forced


def _with_cache(entry: Mapping[str, Any]) -> Rows:
    """Return an entry's rows by size of the cache, without those of models that keep none."""
    return [row for row in entry["by_cache"] if row["cache_bytes"] > 0]


def _kib(row: Mapping[str, Any]) -> str:
    return told(row["cache_bytes"] / KIB, 1)


def _task(row: Mapping[str, Any]) -> str:
    """Return a row's task and its options without the length, which has a column of its own."""
    name, _, options = str(row["task"]).partition(":")
    return _spaced(":".join(part for part in (name, ",".join(o for o in options.split(",") if not o.startswith("length="))) if part))


def _spaced(spec: str) -> str:
    return spec.replace(":", ": ").replace(",", ", ")


def _data(run: Run) -> Mapping[str, Any]:
    """Return what the run's recipe says of its data."""
    config = run.record.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    return data if isinstance(data, dict) else {}


def _trained_on(run: Run) -> list[str]:
    """Return the synthetic tasks that the run was trained on."""
    return list(_data(run).get("tasks") or ())


def _trained_on_filler(run: Run) -> bool:
    """Say whether some of these tasks have filler, and so a length."""
    if not _trained_on(run):
        return False
    from pathlm.text.synthetic import LONG_TASKS  # imports NumPy, which no other part of a page needs

    return any(spec.partition(":")[0] in LONG_TASKS for spec in _trained_on(run))
