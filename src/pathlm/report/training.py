"""Training over time: loss, depth and how evenly blocks are used, with the stages and what their gates said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pathlm.report.charts import Band, Line, Mark, Timeline, lines
from pathlm.report.figure import Figure, Missing, Section, Table, number, table, told
from pathlm.report.read import Run

VERDICTS: dict[bool | None, tuple[str, str]] = {
    True: ("passed", "✓\N{NO-BREAK SPACE}passed"),
    False: ("failed", "✗\N{NO-BREAK SPACE}failed"),
    None: ("unmeasured", "○\N{NO-BREAK SPACE}not\N{NO-BREAK SPACE}measured"),
}
SIGNS = {"<=": "≤", ">=": "≥"}
Points = list[tuple[float, float]]


def section(run: Run) -> tuple[Section | None, list[Missing]]:
    """Return the figures of a run's training."""
    steps = [row for row in run.metrics if number(row.get("step")) is not None]
    if not steps:
        return None, [Missing("loss and depth over training", "pathlm train RECIPE")]
    found = [
        figure
        for figure in (
            _loss(run),
            _pair(run, "route/steps_mean", "Depth: route steps per token", "route steps", _DEPTH),
            _evenness(run),
            _pair(run, "energy/target_probability", "Probability of the right node", "probability", _RIGHT),
        )
        if figure is not None
    ]
    tables = [_gates(run.gates, "Gates, judged at the end of each stage")] if run.gates else []
    tables += [_gates(run.judged, "What pathlm gates said last, from everything that was recorded")] if run.judged else []
    lead = "How the run learned. Shaded parts are the stages of its curriculum"
    lead += ", signs at the upper border what its gates said." if run.gates else "." if len(_bands(run)) > 1 else ""
    if len(_bands(run)) < 2 and not run.gates:
        lead = "How the run learned."
    return Section("training", "Training", lead, found, tables), []


_DEPTH = (
    "How many blocks of the pool a token visits before it leaves. Flat at the top: every token goes through everything; falling: tokens "
    "learn to leave."
)
_RIGHT = "The probability that the graph gives to the node that really comes next, averaged over the text."


def series(run: Run, name: str) -> Points:
    """Return a metric by step, from the rows that have it."""
    return [
        (step, value)
        for row in run.metrics
        if (step := number(row.get("step"))) is not None and (value := number(row.get(name))) is not None
    ]


def validation(run: Run) -> Points:
    """Return the validation loss by step."""
    return series(run, "validation/loss")


def _loss(run: Run) -> Figure | None:
    trained = series(run, "loss/lm") or series(run, "loss/total")
    measured = validation(run)
    if not trained and not measured:
        return None
    limits, clipped = _limits(trained, measured)
    caption = "The loss in nats per token (lower is better): faint while training, with dots on text that is never trained on."
    if clipped:
        caption += f" The first steps began higher, at {max(y for _, y in trained):.2f}; they are cut off so that the rest can be read."
    last = measured[-1][1] if measured else trained[-1][1]
    picture = lines(
        [Line(trained, "thin"), Line(measured, "s0", dots=True)], label=f"Loss over training steps; at the end {last:.3f} nats per token.",
        across="training steps", up="nats per token", limits=limits, timeline=Timeline(_bands(run), _marks(run)),
    )  # fmt: skip
    legend = [("line thin", "training")] * bool(trained) + [("line s0", "validation")] * bool(measured)
    return Figure("Loss", picture, caption, _beside(run, {"training loss": trained, "validation loss": measured}), [*legend, *_signs(run)])


def _limits(trained: Points, measured: Points) -> tuple[tuple[float, float] | None, bool]:
    """Return limits without the first steep steps, where these would take most of the picture, and whether anything is cut off."""
    settled = [y for x, y in trained if x >= 0.05 * trained[-1][0]] + [y for _, y in measured]
    every = [y for _, y in trained] + [y for _, y in measured]
    if not settled or max(every) - min(every) < 1.6 * (max(settled) - min(settled)):
        return None, False
    room = 0.06 * (max(settled) - min(settled)) or 0.1
    return (min(settled) - room, max(settled) + room), True


def _pair(run: Run, name: str, title: str, up: str, caption: str) -> Figure | None:
    """Return a metric while training and on validation text."""
    trained, measured = series(run, name), series(run, f"validation/{name}")
    if not trained and not measured:
        return None
    last = (measured or trained)[-1][1]
    picture = lines(
        [Line(trained, "thin"), Line(measured, "s0", dots=True)], label=f"{title} over training steps; at the end {last:.3f}.",
        across="training steps", up=up, timeline=Timeline(_bands(run), _marks(run)),
    )  # fmt: skip
    legend = [("line thin", "training")] * bool(trained) + [("line s0", "validation")] * bool(measured)
    return Figure(title, picture, caption, _beside(run, {"training": trained, "validation": measured}), [*legend, *_signs(run)])


def _evenness(run: Run) -> Figure | None:
    names = {"route/load_entropy": ("s0", "how evenly blocks share the work"), "route/entropy": ("s1", "how undecided the router is")}
    found = {name: max(series(run, f"validation/{name}"), series(run, name), key=len) for name in names}
    most = math.log(max(len(run.pool), 2))  # the router's entropy is logged in nats, that of the load as a share already
    found["route/entropy"] = [(step, value / most) for step, value in found["route/entropy"]]
    found = {name: points for name, points in found.items() if points}
    if not found:
        return None
    told_last = ", ".join(f"{names[name][1]} {points[-1][1]:.2f}" for name, points in found.items())
    picture = lines(
        [Line(points, names[name][0], dots=len(points) < 40) for name, points in found.items()],
        label=f"Entropies over training steps; at the end: {told_last}.", across="training steps", up="entropy, 1 is the most there can be",
        limits=(0.0, 1.05), timeline=Timeline(_bands(run), _marks(run)),
    )  # fmt: skip
    caption = (
        "Block load near 1: all blocks are visited alike; near 0: one block does everything. Choice near 1: the router could as well "
        "roll dice; near 0: it knows where each token goes."
    )
    numbers = _beside(run, {names[name][1]: points for name, points in found.items()})
    return Figure("Load and choice", picture, caption, numbers, [*((f"line {names[n][0]}", names[n][1]) for n in found), *_signs(run)])


def _beside(run: Run, columns: dict[str, Points]) -> Table:
    """Return the numbers of some lines, a row per step."""
    stage_at = {number(row.get("step")): str(row.get("stage", "")) for row in run.metrics}
    given = {name: dict(points) for name, points in columns.items() if points}
    steps = sorted(set().union(*given.values()))
    rows = [(f"{step:,.0f}", stage_at.get(step, ""), *(told(values.get(step), 4) for values in given.values())) for step in steps]
    return table(("step", "stage", *given), rows, "Numbers by training step")


def _bands(run: Run) -> list[Band]:
    """Return the stages in the order in which they came."""
    bands: list[Band] = []
    for row in run.metrics:
        step, name = number(row.get("step")), str(row.get("stage", ""))
        if step is None:
            continue
        if not bands or bands[-1].name != name:
            bands.append(Band(name, bands[-1].end if bands else step, step))
        bands[-1] = Band(name, bands[-1].start, step)
    return bands if len(bands) > 1 else []


def _judged(run: Run) -> Sequence[tuple[dict[str, Any], float]]:
    return [(row, step) for row in run.gates if (step := number(row.get("step"))) is not None]


def _marks(run: Run) -> list[Mark]:
    """Return a sign for every step with gates: failed where one did, not measured where none could be."""
    steps = sorted({step for _, step in _judged(run)})
    marks = []
    for step in steps:
        rows = [row for row, at in _judged(run) if at == step]
        verdicts = [verdict(row) for row in rows]
        worst = False if False in verdicts else True if True in verdicts else None
        hint = "; ".join(f"{row.get('metric')} {VERDICTS[verdict(row)][0]}" for row in rows)
        marks.append(Mark(step, VERDICTS[worst][0], f"step {step:,.0f}: {hint}"))
    return marks


def verdict(row: dict[str, Any]) -> bool | None:
    """Return whether a gate passed, None where it was not measured."""
    passed = row.get("passed")
    return passed if isinstance(passed, bool) else None


def _signs(run: Run) -> list[tuple[str, str]]:
    names: dict[str, str] = {"passed": "gates passed", "failed": "a gate failed", "unmeasured": "gates not measured"}
    return [(f"sign {kind}", names[kind]) for kind in dict.fromkeys(mark.kind for mark in _marks(run))]


def _gates(gates: Sequence[dict[str, Any]], caption: str) -> Table:
    def tell(value: Any) -> str:
        return "–" if (found := number(value)) is None else f"{found:.4g}"

    rows = [
        (
            str(row.get("reason") or row.get("metric", "")),
            VERDICTS[verdict(row)][1],
            tell(row.get("value")),
            f"{SIGNS.get(str(row.get('comparison')), row.get('comparison', ''))} {tell(row.get('bound'))}",
            str(row.get("stage", "")),
            str(row.get("metric", "")),
        )
        for row in gates
    ]
    return table(("what must hold", "verdict", "value", "must be", "stage", "metric"), rows, caption)
