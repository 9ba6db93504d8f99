"""What routes are worth: the steps each token takes beside how hard it is, the loss at every budget, and controls with the same steps."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pathlm.evaluate.bootstrap import DRAWS, Draws
from pathlm.evaluate.checkpoint import check_share, find_checkpoint, open_model
from pathlm.evaluate.controls import PASSES, controls, token_frequency
from pathlm.evaluate.depth import Depth, readings
from pathlm.evaluate.lm import GROUP_TOKENS, LanguageScore, Text, choose, score
from pathlm.evaluate.plot import budget_svg
from pathlm.evaluate.recorded import check_file
from pathlm.evaluate.records import LossFile
from pathlm.evaluate.route_map import RouteMap
from pathlm.evaluate.routes import RouteTotals, budget_curve, check_budgets
from pathlm.evaluate.subject import Measure, Subject, at_once, bar, check_vocabulary

# Shapes: N tokens that a next token was predicted for, B windows, T tokens of a window, V vocabulary

BUDGETS = 5
"""Budgets measured where none are named, evenly from the smallest trained one to 1."""


def prepare(
    subject: Subject,
    corpus: Path | str | None = None,
    split: str = "validation",
    *,
    against: Path | str | None = None,
    budgets: Sequence[float] | None = None,
    context: int | None = None,
    stride: int | None = None,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    plot: Path | str | None = None,
) -> Measure:
    """Make ready to measure routes: loss and steps, the budget curve, controls, and how depth goes with difficulty.

    Args:
        subject: The routed model. Its budget is that at which routes, controls and difficulty are measured; by default the one the model
            was trained for last.
        corpus: This, `split`, `context`, `stride`, `max_documents` and `max_tokens` as in `evaluate.compare.prepare`.
        against: An independent plain model to take the difficulty from, with the same tokenizer: a run or model folder, or a file that
            `pathlm eval --records` wrote.
        budgets: Budgets of the curve; by default five, evenly from the smallest one trained to 1, or none where none was trained.
        draws: Times that documents are drawn anew for an interval; `seed` is that of these draws and of the random controls.
        plot: File for the budget curve as an SVG picture.

    Measuring returns the content that is also written to `routes.json` of the run (or model) folder under the split's name.

    Raises `ValueError` for options out of range, branches, a plain model in the place of the routed one, another tokenizer than the
    corpus's, and a single document, which gives no intervals.
    """
    if subject.branches is not None:
        raise ValueError(f"branches={subject.branches}: routes are measured with as many as the model was trained with")
    for budget in budgets or ():
        check_share(budget)
    check_file("plot", plot)
    if plot is not None and not Path(plot).parent.is_dir():
        raise FileNotFoundError(f"plot={str(plot)!r}: the folder {str(Path(plot).parent)!r} does not exist")
    place, data = subject.place, subject.corpus(corpus)
    model, tokenizer = subject.as_saved
    check_vocabulary(model, tokenizer, data, place)
    if getattr(model, "pool", None) is None:
        raise ValueError(f"the model in {place} has no pool: there are no routes to measure")
    chosen = choose(data, split, max_documents=max_documents, max_tokens=max_tokens)
    Draws(len(chosen), draws=draws)
    curve = _curve_budgets(model, budgets, also=subject.budget)
    context, stride = subject.reach(model, context, stride)
    limits = {"max_documents": max_documents, "max_tokens": max_tokens}
    text = Text(data, split, chosen, {"context": context, "stride": stride} | limits)
    plain = None if against is None else Plain(against, text, device=subject.device)
    return lambda: _measured(subject, text, plain, curve, draws=draws, seed=seed, plot=plot)


run = at_once(prepare)


def _measured(
    subject: Subject, text: Text, plain: Plain | None, curve: Sequence[float], *, draws: int, seed: int, plot: Path | str | None
) -> dict[str, Any]:
    corpus = {"folder": str(text.corpus.folder), "digest": text.corpus.manifest["digest"]}
    options = text.options
    settings = {"context": options["context"], "stride": options["stride"], "draws": draws, "seed": seed}
    with tempfile.TemporaryDirectory() as scratch:
        losses, beside = (None, None) if plain is None else plain.losses(Path(scratch), console=subject.console)
        passes = len(curve) + 3 + PASSES + 2 * (losses is not None)
        with bar(subject.console, "routes", total=passes * text.tokens) as advance:
            read = dataclasses.replace(text, options=options | {"progress": advance})
            found = of_routes(subject.as_saved[0], read, curve, budget=subject.budget, losses=losses, draws=draws, seed=seed)
    if beside is not None:
        found["plain"] = beside | found["plain"]
    about = {
        "split": text.split,
        "checkpoint": str(subject.place),
        "corpus": corpus,
    }
    result = about | {"date": datetime.now(UTC).isoformat(timespec="seconds"), "settings": settings} | found
    file = subject.note("routes.json", text.split, result)
    if plot is not None:
        Path(plot).write_text(budget_svg(result), encoding="utf-8")
    written = f"{file}, the curve to {plot}" if plot is not None else str(file)
    parts = [part for shown in tables(result) for part in (shown, "")]
    subject.print(*parts, note=f"context {settings['context']}, stride {settings['stride']}; written to {written}")
    return result


def _curve_budgets(model: Any, budgets: Sequence[float] | None, *, also: float | None) -> list[float]:
    """Return the budgets of the curve: those given, else some between the smallest trained one and 1; `also` is one more to check."""
    if budgets is None:
        low, high = model.pool.budgets_trained.tolist()
        budgets = [] if low > high else np.linspace(max(low, model.pool.lowest_budget), 1, BUDGETS).tolist()
    check_budgets(model, [*budgets, *([] if also is None else [also])])
    return list(budgets)


class Plain:
    """An independent model whose losses say how hard places are: one to measure, or records of an earlier evaluation.

    Raises `ValueError` for another tokenizer than the corpus's, and for records of another text.
    """

    def __init__(self, place: Path | str, text: Text, *, device: str | None) -> None:
        self._place, self._text, corpus = place, text, text.corpus
        if not Path(place).is_file():
            self._checkpoint = find_checkpoint(place)
            self._model, tokenizer = open_model(self._checkpoint, device=device)
            check_vocabulary(self._model, tokenizer, corpus, self._checkpoint)
            return
        self._model, self._records = None, LossFile(place)
        if self._records.header.get("corpus") != corpus.manifest["digest"] or self._records.header.get("split") != text.split:
            raise ValueError(f"against={str(place)!r}: holds losses of another corpus or split than {corpus.folder}, {text.split!r}")
        if len(self._records) != text.tokens:
            raise ValueError(
                f"against={str(place)!r}: holds losses of {len(self._records):,} tokens, routes are measured on {text.tokens:,}"
            )

    def losses(self, scratch: Path, *, console: Console | None) -> tuple[LossFile, dict[str, Any]]:
        """Return its losses, if need be measured and written to a scratch folder, and what is told of it."""
        text = self._text
        if self._model is not None:
            file = scratch / "plain.safetensors"
            with bar(console, "plain model", total=text.tokens) as advance:
                found = score(self._model, text.corpus, text.split, records=file, progress=advance, **text.options)
            return LossFile(file), {"checkpoint": str(self._checkpoint), "loss": found.loss, "bits_per_byte": found.bits_per_byte}
        starts = range(0, text.tokens, GROUP_TOKENS)
        nats = sum(float(self._records.rows(start, start + GROUP_TOKENS).loss.sum(dtype=np.float64)) for start in starts)
        size = sum(record.bytes for record in text.chosen)
        whole = LanguageScore.of(nats, tokens=text.tokens, size=size, documents=len(text.chosen))
        return self._records, {"file": str(self._place), "loss": whole.loss, "bits_per_byte": whole.bits_per_byte}


def of_routes(
    model: Any, text: Text, curve: Sequence[float], *, budget: float | None, losses: LossFile | None, draws: int, seed: int
) -> dict[str, Any]:
    """Return everything that is measured of routes; `losses` are a plain model's, where there is one."""
    corpus, split, options = text.corpus, text.split, text.options
    frequency_V = token_frequency(corpus, vocabulary=model.config.vocab_size)
    moves = RouteMap(model)
    parts = readings(model, corpus, split, losses=losses, budget=budget, route_map=moves, **options)
    first = next(parts)
    depth = Depth(first, text.chosen, frequency_V, corpus.tokenizer(), draws=draws, seed=seed)
    for reading in chain([first], parts):
        depth.add(reading)
    correlations = depth.correlations()
    scores = {"shortest": asdict(depth.early.score()), "deepest": asdict(depth.late.score())}
    speed = {"time/tokens_per_s": depth.routed.tokens / depth.seconds}
    result: dict[str, Any] = {
        "routed": asdict(depth.routed.score()),
        "metrics": of_steps(depth.routed) | moves.metrics() | of_costs(model, depth.routed) | speed,
        "map": moves.to_dict(),
        "slices": depth.slices.rows(),
        "difficulty_of": "the model itself" if losses is None else "the plain model",
        "budgets": [asdict(point) for point in budget_curve(model, corpus, split, curve, **options)],
        "controls": controls(model, text, depth, losses, draws=draws, seed=seed),
        "gain": scores | {"mean": depth.gain.estimate().to_dict(), "correlations": correlations["gain"]},
    }
    excess = None if depth.excess is None else {"routed_excess": depth.excess.estimate().to_dict()}
    return result | {"difficulty": correlations.get("loss"), "plain": excess}


def of_steps(routed: RouteTotals) -> dict[str, float]:
    """Return how many steps tokens took and how many blocks ran for them, by the names that training logs them under."""
    up_to_S, tokens = np.cumsum(routed.left_S), routed.tokens
    middle = np.searchsorted(up_to_S, [(tokens - 1) // 2, tokens // 2], side="right")
    return {
        "route/steps_mean": routed.steps_mean,
        "route/steps_median": float(middle.mean()),
        "route/steps_max": float(np.flatnonzero(routed.left_S)[-1]),
        **{f"route/left_after_{steps}": float(count / tokens) for steps, count in enumerate(routed.left_S)},
        "route/block_evaluations": routed.evaluations / tokens,
    }


def of_costs(model: Any, routed: RouteTotals) -> dict[str, float]:
    """Return what a token costs: bytes of cache that remain of it, and operations of the blocks that ran, as estimated from the sizes."""
    config, costs = model.config, model.costs(routed.header["context"])
    most = config.pre_blocks + config.post_blocks + config.max_route_steps * config.route_top_k
    saved = costs["flops_per_visit"] * (most - routed.evaluations / routed.tokens)
    return {
        "memory/cache_bytes_per_token": float(costs["cache_bytes_per_token"]),
        "compute/flops_per_token": costs["flops_per_token"] - saved,
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """Return a result of `run` as tables: losses and computation, then how steps go with gain and with a plain model's loss."""
    routed = result["routed"]
    title = f"{result['split']}: routes over {routed['documents']:,} documents, {routed['tokens']:,} tokens"
    scores = Table(title=title, box=None, padding=(0, 1, 0, 0), title_justify="left")
    scores.add_column("", no_wrap=True)
    for heading in (
        "nats\n/token",
        "bits\n/byte",
        "route\nsteps",
        "blocks\n/token",
        "of all\nblocks",
        "above the routed model\n(95 %)",
    ):
        scores.add_column(heading, justify="right", no_wrap=True)
    rows = [("routed", routed, "bold"), *((f"budget {point['budget']:.3g}", point, None) for point in result["budgets"])]
    rows += [(name.replace("_", " "), found, None) for name, found in result["controls"].items() if name != "frequency"]
    for name, found, style in rows:
        numbers = (
            f"{found['loss']:.4f}",
            f"{found['bits_per_byte']:.4f}",
            f"{found['steps_mean']:.2f}",
            f"{found['block_evaluations']:.2f}",
            f"{found['blocks_share']:.0%}",
        )
        scores.add_row(name, *numbers, _told(found["excess"]) if "excess" in found else "", style=style)
    if (found := result["plain"]) is not None:
        below = {name: None if value is None else -value for name, value in found["routed_excess"].items()}
        below["low"], below["high"] = below["high"], below["low"]
        scores.add_row("plain model", f"{found['loss']:.4f}", f"{found['bits_per_byte']:.4f}", "", "", "", _told(below))
    gain = result["gain"]
    caption = (
        "1: token frequency and position held fixed; 2: the frequency of the token that follows, too. 95 % intervals over documents. Gain: "
        f"the loss if all leave as early as they may minus that at full depth, {_told(gain['mean'])} nats on average."
    )
    title = "correlation of a token's route steps, which are taught by gain"
    depth = Table(title=title, caption=caption, box=None, padding=(0, 1, 0, 0), title_justify="left", caption_justify="left")
    depth.add_column("", no_wrap=True)
    columns = {"with the measured\ngain": gain["correlations"], "with the plain\nmodel's loss": result["difficulty"]}
    columns = {heading: found for heading, found in columns.items() if found is not None}
    for heading in columns:
        depth.add_column(heading, justify="right", no_wrap=True)
    for name in gain["correlations"]:
        depth.add_row(_NAMES[name], *(_told(found[name], digits=3) for found in columns.values()))
    return [scores, by_class(result["slices"]["class"]), depth]


def by_class(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the slices by what a token is in its word as a table."""
    table = Table(title="by kind of token", box=None, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("tokens", "nats\n/token", "route\nsteps", "blocks\n/token", "gain of\ndepth"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        numbers = (f"{row['loss']:.4f}", f"{row['steps_mean']:.2f}", f"{row['block_evaluations']:.2f}", f"{row['gain']:+.4f}")
        table.add_row(row["label"], f"{row['tokens']:,}", *numbers)
    return table


_NAMES = {
    "spearman": "Spearman",
    "pearson": "Pearson",
    "partial_spearman": "partial Spearman (1)",
    "partial_spearman_following": "partial Spearman (2)",
}


def _told(estimate: dict[str, float | None], *, digits: int = 4) -> str:
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    if value is None:
        return "not defined"
    return f"{value:+.{digits}f}" + ("" if low is None or high is None else f" ({low:+.{digits}f} to {high:+.{digits}f})")
