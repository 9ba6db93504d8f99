"""Several runs beside each other: how their losses fell, where they ended, and what their budgets cost."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pathlm.report import answers
from pathlm.report.charts import LINES, Dot, Line, dots, lines
from pathlm.report.figure import Figure, Missing, Section, number, table, told
from pathlm.report.read import OTHER_FORM, Run
from pathlm.report.routes import measured
from pathlm.report.training import validation


def beside(runs: Sequence[Run]) -> list[Section]:
    """Return figures with a line for each run; none for a single run."""
    if len(runs) < 2:
        return []
    drawn = runs[:LINES]
    figures = [figure for figure in (_losses(drawn), _budgets(drawn)) if figure is not None] + answers.beside(runs)
    rows = [(run.name, *(value for _, value in ends(run))) for run in runs]
    heads = ("run", *(name for name, _ in ends(runs[0])))
    lead = "The same numbers for every run. Losses compare only between runs with the same tokenizer and the same text."
    if len(runs) > LINES:
        lead += f" Pictures show the first {LINES} of {len(runs)} runs."
    return [Section("beside", "Side by side", lead, figures, [table(heads, rows, "Where the runs ended")])]


def ends(run: Run) -> list[tuple[str, str]]:
    """Return how a run ended, as names and numbers that are the same for every run."""
    loss = run.latest("validation/loss")
    steps = run.latest("validation/route/steps_mean")
    step, tokens = run.latest("step"), run.latest("tokens")
    return [
        ("training steps", told(step, 0)),
        ("tokens read", told(tokens, 0)),
        ("validation loss", told(loss, 4)),
        ("route steps", told(steps, 2)),
        ("tokens/s", told(run.latest("time/tokens_per_s"), 0)),
    ]


def results(run: Run) -> tuple[Section | None, list[Missing]]:
    """Return what `pathlm eval` measured on whole documents, beside n-grams."""
    entries = {name: entry for name, entry in run.evaluations.items() if isinstance(entry, dict) and entry.get("model")}
    if not entries:
        return None, [Missing("the loss on whole documents, beside n-grams", "pathlm eval {run}")] * run.has_text
    figures = [_evaluation(name, entry) for name, entry in entries.items()]
    lead = "Measured on whole documents that the run was not trained on. Bits per byte do not depend on the tokenizer: less is better."
    return Section("results", "Beside n-grams", lead, figures), []


def _evaluation(name: str, entry: dict[str, Any]) -> Figure:
    found = [(f"{order}-gram", score) for order, score in (entry.get("ngrams") or {}).get("orders", {}).items()]
    found = [*sorted(found, key=lambda row: row[0]), ("this model", entry["model"])]
    given = [
        Dot(title, value, None, None, "s0" if title == "this model" else "s1", told(value))
        for title, score in found
        if (value := number(score["bits_per_byte"])) is not None
    ]
    rows = [
        (title, *(told(score.get(key), 4) for key in ("loss", "perplexity", "bits_per_byte")), told(score.get("tokens"), 0))
        for title, score in found
    ]
    numbers = table(("", "nats per token", "perplexity", "bits per byte", "tokens"), rows, f"On the {name} text")
    caption = (
        f"Bits per byte on the {name} text: farther left is better. N-grams only count which tokens follow each other in the training text."
    )
    picture = dots(given, label=f"Bits per byte on {name}: this model {given[-1].told}.", across="bits per byte")
    return Figure(f"On the {name} text", picture, caption, numbers)


def _losses(runs: Sequence[Run]) -> Figure | None:
    curves = [(run, _by_tokens(run)) for run in runs]
    curves = [(run, points) for run, points in curves if points]
    if not curves:
        return None
    given = [Line(points, f"s{i}", dots=True, hints=[f"{run.name}: {y:.4f}" for _, y in points]) for i, (run, points) in enumerate(curves)]
    lowest = min(curves, key=lambda curve: curve[1][-1][1])
    label = f"Validation loss of {len(curves)} runs over tokens read; {lowest[0].name} ends lowest, at {lowest[1][-1][1]:.3f}."
    picture = lines(given, label=label, across="tokens read", up="nats per token")
    rows = [(run.name, f"{x:,.0f}", told(y, 4)) for run, points in curves for x, y in points]
    numbers = table(("run", "tokens read", "validation loss"), rows, "Validation losses", rows_at_most=120)
    caption = "Loss on text that no run was trained on, by how much text each had read. Lower is better."
    return Figure("Validation loss", picture, caption, numbers, [(f"line s{i}", run.name) for i, (run, _) in enumerate(curves)])


def _by_tokens(run: Run) -> list[tuple[float, float]]:
    if not validation(run):
        return []
    rows = ((number(row.get("tokens")), number(row.get("validation/loss"))) for row in run.metrics)
    return [(tokens, loss) for tokens, loss in rows if tokens is not None and loss is not None]


def _budgets(runs: Sequence[Run]) -> Figure | None:
    curves = []
    for run in runs:
        with suppress(*OTHER_FORM):  # its own chapter has a note of that
            split, entry = measured(run)
            points = sorted((float(point["block_evaluations"]), float(point["loss"])) for point in entry.get("budgets") or ())
            if points:
                curves.append((run, split, points))
    if len(curves) < 2:
        return None
    given = [Line(points, f"s{i}", dots=True) for i, (_, _, points) in enumerate(curves)]
    picture = lines(given, label="Loss over blocks run per token for several runs.", across="blocks run per token", up="nats per token")
    rows = [(run.name, split, told(x, 2), told(y, 4)) for run, split, points in curves for x, y in points]
    numbers = table(("run", "split", "blocks per token", "nats per token"), rows, "Budgets of the runs")
    legend = [(f"line s{i}", f"{run.name} ({split})") for i, (run, split, _) in enumerate(curves)]
    caption = "Every dot is a budget. A curve that lies lower and farther left loses less for less computation."
    return Figure("Budgets", picture, caption, numbers, legend)
