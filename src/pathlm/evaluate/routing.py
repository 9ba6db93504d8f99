"""What routes are worth: the steps each token takes beside how hard it is, the loss at every budget, and controls with the same steps."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pathlm.evaluate.bootstrap import DRAWS, Draws
from pathlm.evaluate.checkpoint import check_share, find_checkpoint, open_model, run_folder, run_record
from pathlm.evaluate.compare import bar, check_vocabulary, corpus_folder, note_result
from pathlm.evaluate.controls import PASSES, Order, controls, token_frequency
from pathlm.evaluate.correlation import which_bin
from pathlm.evaluate.depth import Depth, readings
from pathlm.evaluate.lm import GROUP_TOKENS, LanguageScore, choose, reach, score
from pathlm.evaluate.plot import budget_svg
from pathlm.evaluate.records import LossFile
from pathlm.evaluate.route_map import RouteMap
from pathlm.evaluate.routes import RouteTotals, budget_curve, check_budgets

# Shapes: N tokens that a next token was predicted for, B windows, T tokens of a window, V vocabulary

BUDGETS = 5
"""Budgets measured where none are named, evenly from the smallest trained one to 1."""


def run(
    folder: Path | str,
    corpus: Path | str | None = None,
    split: str = "validation",
    *,
    against: Path | str | None = None,
    budget: float | None = None,
    budgets: Sequence[float] | None = None,
    context: int | None = None,
    stride: int | None = None,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    plot: Path | str | None = None,
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure a routed model's routes on a prepared corpus: loss and steps, the budget curve, controls, and how depth goes with difficulty.

    Args:
        folder: The routed model: a run (its best, else its latest checkpoint), a checkpoint, or a folder with a model.
        corpus: This, `split`, `context`, `stride`, `max_documents`, `max_tokens`, `device` and `console` as in `evaluate.compare.run`.
        against: An independent plain model to take the difficulty from, with the same tokenizer: a run or model folder, or a file that
            `pathlm eval --records` wrote.
        budget: Budget at which routes, controls and difficulty are measured; by default the one the model was trained for last.
        budgets: Budgets of the curve; by default five, evenly from the smallest one trained to 1, or none where none was trained.
        draws: Times that documents are drawn anew for an interval; `seed` is that of these draws and of the random controls.
        plot: File for the budget curve as an SVG picture.

    Returns the content that is also written to `routes.json` of the run (or model) folder under the split's name.

    Raises `ValueError`, before anything is measured, for options out of range, a plain model in the place of the routed one, another
    tokenizer than the corpus's, and a single document, which gives no intervals.
    """
    _check(plot, (budget, *(budgets or ())))
    place, model, data = _opened(folder, corpus, device=device)
    chosen = choose(data, split, max_documents=max_documents, max_tokens=max_tokens)
    Draws(len(chosen), draws=draws)
    budgets = _curve_budgets(model, budgets, also=budget)
    context, stride = _reach(folder, model, context, stride)
    options: dict[str, Any] = {"context": context, "stride": stride, "max_documents": max_documents, "max_tokens": max_tokens}
    settings = {"context": context, "stride": stride, "draws": draws, "seed": seed}
    with tempfile.TemporaryDirectory() as scratch:
        losses, beside = _plain_losses(against, data, split, Path(scratch), chosen=chosen, device=device, console=console, **options)
        passes = len(budgets) + 3 + PASSES + 2 * (losses is not None)
        with bar(console, "routes", total=passes * sum(record.tokens - 1 for record in chosen)) as advance:
            options |= {"chosen": chosen, "draws": draws, "seed": seed, "progress": advance}
            found = _measured(model, data, split, budget=budget, budgets=budgets, losses=losses, beside=beside, **options)
    about = {"split": split, "checkpoint": str(place), "corpus": {"folder": str(data.folder), "digest": data.manifest["digest"]}}
    result = about | {"date": datetime.now(UTC).isoformat(timespec="seconds"), "settings": settings} | found
    file = note_result(run_folder(folder) / "routes.json", split, result)
    _finish(result, file, plot=plot, console=console)
    return result


def _finish(result: dict[str, Any], file: Path, *, plot: Path | str | None, console: Console | None) -> None:
    """Draw the curve and print the tables where they are asked for."""
    if plot is not None:
        Path(plot).write_text(budget_svg(result), encoding="utf-8")
    if console is not None:
        console.print(*(part for shown in tables(result) for part in (shown, "")))
        written = f"{file}, the curve to {plot}" if plot is not None else str(file)
        settings = f"context {result['settings']['context']}, stride {result['settings']['stride']}"
        console.print(f"{settings}; written to {written}", style="dim", highlight=False, soft_wrap=True)


def _check(plot: Path | str | None, budgets: Sequence[float | None]) -> None:
    """Refuse what is wrong whatever the model is."""
    for budget in budgets:
        check_share(budget)
    if plot is not None and not Path(plot).parent.is_dir():
        raise FileNotFoundError(f"plot={str(plot)!r}: the folder {str(Path(plot).parent)!r} does not exist")


def _opened(folder: Path | str, corpus: Path | str | None, *, device: str | None) -> tuple[Path, Any, Any]:
    """Return where the routed model lies, the model, and the corpus that fits it."""
    from pathlm.text.corpus import Corpus

    place = find_checkpoint(folder)
    data = Corpus.open(corpus_folder(corpus, _trained_on(folder), folder), verify=False)
    model, tokenizer = open_model(place, device=device)
    check_vocabulary(model, tokenizer, data, place)
    if getattr(model, "pool", None) is None:
        raise ValueError(f"the model in {place} has no pool: there are no routes to measure")
    return place, model, data


def _trained_on(folder: Path | str) -> dict[str, Any]:
    found: dict[str, Any] = run_record(folder).get("config", {}).get("data", {})
    return found


def _curve_budgets(model: Any, budgets: Sequence[float] | None, *, also: float | None) -> list[float]:
    """Return the budgets of the curve: those given, else some between the smallest trained one and 1; `also` is one more to check."""
    if budgets is None:
        low, high = model.pool.budgets_trained.tolist()
        budgets = [] if low > high else np.linspace(max(low, model.pool.lowest_budget), 1, BUDGETS).tolist()
    check_budgets(model, [*budgets, *([] if also is None else [also])])
    return list(budgets)


def _reach(folder: Path | str, model: Any, context: int | None, stride: int | None) -> tuple[int, int]:
    if context is None and (length := _trained_on(folder).get("length")):
        context = min(length, model.config.max_position_embeddings)
    return reach(model, context, stride)


def _measured(
    model: Any, corpus: Any, split: str, *, budget: float | None, budgets: Sequence[float], losses: LossFile | None,
    beside: dict[str, Any] | None, chosen: Sequence[Any], draws: int, seed: int, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return everything that is measured of routes; `losses` are a plain model's and `beside` what is told of it, where there is one."""
    frequency_V = token_frequency(corpus, vocabulary=model.config.vocab_size)
    moves = RouteMap(model)
    parts = readings(model, corpus, split, losses=losses, budget=budget, route_map=moves, **options)
    first = next(parts)
    depth = Depth(first, chosen, frequency_V, corpus.tokenizer(), draws=draws, seed=seed)
    depth.add(first)
    for reading in parts:
        depth.add(reading)
    by_frequency = Order(depth.slices.count("frequency"), lambda documents, _: depth.slices.frequency_V[_read(documents)])
    by_difficulty = None
    if losses is not None:
        starts = depth.slices.difficulty_starts
        by_difficulty = Order(depth.slices.count("difficulty"), lambda _, rows: which_bin(losses.rows(rows.start, rows.stop).loss, starts))
    correlations = depth.correlations()
    scores = {"shortest": asdict(depth.early.score()), "deepest": asdict(depth.late.score())}
    return {
        "routed": asdict(depth.routed.score()),
        "metrics": of_steps(depth.routed)
        | moves.metrics()
        | of_costs(model, depth.routed)
        | {"time/tokens_per_s": depth.routed.tokens / depth.seconds},
        "map": moves.to_dict(),
        "slices": depth.slices.rows(),
        "difficulty_of": "the model itself" if losses is None else "the plain model",
        "budgets": [asdict(point) for point in budget_curve(model, corpus, split, budgets, **options)],
        "controls": controls(
            model, corpus, split, routed=depth.routed, loss=depth.loss, frequency=by_frequency, difficulty=by_difficulty,
            draws=partial(Draws, len(chosen), draws=draws, seed=seed), seed=seed, **options,
        ),
        "gain": scores | {"mean": depth.gain.estimate().to_dict(), "correlations": correlations["gain"]},
        "difficulty": correlations.get("loss"),
        "plain": None if beside is None or depth.excess is None else beside | {"routed_excess": depth.excess.estimate().to_dict()},
    }  # fmt: skip


def _read(documents: Sequence[np.ndarray]) -> np.ndarray:
    """Return the tokens that a next one is predicted for."""
    return np.concatenate([tokens[:-1] for tokens in documents])


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


def _plain_losses(
    plain: Path | str | None, corpus: Any, split: str, scratch: Path, *, chosen: Sequence[Any], device: str | None,
    console: Console | None, **options: Any,
) -> tuple[LossFile | None, dict[str, Any] | None]:  # fmt: skip
    """Return an independent model's losses and its score, from a file of records or by measuring it; None where there is none."""
    if plain is None:
        return None, None
    tokens, size = sum(record.tokens - 1 for record in chosen), sum(record.bytes for record in chosen)
    if Path(plain).is_file():
        losses = LossFile(plain)
        if losses.header.get("corpus") != corpus.manifest["digest"] or losses.header.get("split") != split:
            raise ValueError(f"against={str(plain)!r}: holds losses of another corpus or split than {corpus.folder}, {split!r}")
        if len(losses) != tokens:
            raise ValueError(f"against={str(plain)!r}: holds losses of {len(losses):,} tokens, routes are measured on {tokens:,}")
        nats = sum(float(losses.rows(start, start + GROUP_TOKENS).loss.sum(dtype=np.float64)) for start in range(0, tokens, GROUP_TOKENS))
        whole = LanguageScore.of(nats, tokens=tokens, size=size, documents=len(chosen))
        return losses, {"file": str(plain), "loss": whole.loss, "bits_per_byte": whole.bits_per_byte}
    place = find_checkpoint(plain)
    model, tokenizer = open_model(place, device=device)
    check_vocabulary(model, tokenizer, corpus, place)
    with bar(console, "plain model", total=tokens) as advance:
        found = score(model, corpus, split, records=scratch / "plain.safetensors", progress=advance, **options)
    return LossFile(scratch / "plain.safetensors"), {"checkpoint": str(place), "loss": found.loss, "bits_per_byte": found.bits_per_byte}
