"""What routes are worth: the steps each token takes beside how hard it is, the loss at every budget, and controls with the same steps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pathlm.evaluate.checkpoint import check_share, find_checkpoint, open_model, run_folder, run_record
from pathlm.evaluate.compare import bar, check_vocabulary, corpus_folder, note_result
from pathlm.evaluate.controls import PASSES, controls, token_frequency
from pathlm.evaluate.correlation import DRAWS, Estimate, Pair, correlations, mean_with_interval, resampled
from pathlm.evaluate.lm import LanguageScore, choose, reach, score
from pathlm.evaluate.plot import budget_svg
from pathlm.evaluate.records import TokenLosses, read_token_losses
from pathlm.evaluate.route_map import RouteMap
from pathlm.evaluate.routes import RouteRecords, budget_curve, check_budgets, route_table
from pathlm.evaluate.slices import slices

# Shapes: N tokens that a next token was predicted for, B windows, T tokens of a window, V vocabulary

BUDGETS = 5
"""Budgets measured where none are named, evenly from the smallest trained one to 1."""


def difficulty_depth(
    records: RouteRecords, plain: TokenLosses | np.ndarray, frequency_V: np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Estimate]:
    """Correlate the steps of tokens with the loss of an independent plain model at the same places.

    Spearman, Pearson, and Spearman with these held fixed: how frequent the token is (logarithm of 1 + its count) and its position in the
    document (`partial_spearman`); besides how frequent the token is that follows (`partial_spearman_following`), which takes away a good
    part of what makes a place hard. Intervals come from documents drawn anew.

    Args:
        records: What the routed model did.
        plain: The plain model's losses of the same tokens, as records or as a column (N,).
        frequency_V: How often each token occurs in the training split.
        draws: Times that as many documents are drawn.
        seed: Of the draws.

    Raises `ValueError` where the losses are of other tokens, or there is one document only.
    """
    columns = {
        "steps": records.steps.astype(float),
        "loss": aligned(records, plain).astype(float),
        "frequency": np.log1p(frequency_V[records.token]),
        "following": np.log1p(frequency_V[records.following]),
        "position": records.position.astype(float),
    }
    easy = ("frequency", "position")
    pairs = {
        "spearman": Pair("steps", "loss"),
        "pearson": Pair("steps", "loss", ranks=False),
        "partial_spearman": Pair("steps", "loss", easy),
        "partial_spearman_following": Pair("steps", "loss", (*easy, "following")),
    }
    return correlations(columns, pairs, records.document, draws=draws, seed=seed)


def aligned(records: RouteRecords, plain: TokenLosses | np.ndarray) -> np.ndarray:
    """Return the losses of another model, one per row of `records`, or raise `ValueError` where they are of other tokens."""
    if isinstance(plain, TokenLosses):
        ours = (records.document, records.position + 1, records.following)
        theirs = (plain.document, plain.position, plain.token)
        if len(plain) != len(records) or any((a != b).any() for a, b in zip(ours, theirs, strict=True)):
            raise ValueError(f"token losses: {len(plain)} of other tokens than the {len(records)} whose routes were measured")
        return plain.loss
    if plain.shape != records.loss.shape:
        raise ValueError(f"losses: has shape {plain.shape}, must be {records.loss.shape}, one per token whose route was measured")
    return plain


def extremes(model: Any, corpus: Any, split: str, records: RouteRecords, **options: Any) -> tuple[RouteRecords, RouteRecords]:
    """Measure the same tokens when all leave as early as they may, and when all take every step; `options` are those of `route_table`."""
    fewest, most = model.pool.steps_possible
    early, late = (route_table(model, corpus, split, depths=np.full_like(records.steps, depth), **options) for depth in (fewest, most))
    return early, late


def measured_gain(
    records: RouteRecords, early: RouteRecords, late: RouteRecords, frequency_V: np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Any]:
    """Correlate the steps of tokens with what depth is worth there: the loss if all leave `early` minus that if all leave `late`.

    Depth is taught by gain, not by loss: a token may be hard and yet have nothing to gain. This gain is of all steps for everybody at once,
    in two passes, while training measures one token's own and leaves the others as they were. Correlations are those of `difficulty_depth`.
    """
    gain_N = early.loss - late.loss
    found = difficulty_depth(records, gain_N, frequency_V, draws=draws, seed=seed)
    return {
        "shortest": asdict(early.score()),
        "deepest": asdict(late.score()),
        "mean": mean_with_interval(gain_N, records.document, draws=draws, seed=seed).to_dict(),
        "correlations": {name: estimate.to_dict() for name, estimate in found.items()},
    }


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
    resampled(len(chosen), draws=draws)
    budgets = _curve_budgets(model, budgets, also=budget)
    context, stride = _reach(folder, model, context, stride)
    options: dict[str, Any] = {"context": context, "stride": stride, "max_documents": max_documents, "max_tokens": max_tokens}
    settings = {"context": context, "stride": stride, "draws": draws, "seed": seed}
    losses, beside = _plain_losses(against, data, split, device=device, console=console, **options)
    passes = len(budgets) + 3 + PASSES + 2 * (losses is not None)
    with bar(console, "routes", total=passes * sum(record.tokens - 1 for record in chosen)) as advance:
        options |= {"draws": draws, "seed": seed, "progress": advance}
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
    model: Any, corpus: Any, split: str, *, budget: float | None, budgets: Sequence[float], losses: TokenLosses | None,
    beside: dict[str, Any] | None, draws: int, seed: int, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return everything that is measured of routes; `losses` are a plain model's and `beside` what is told of it, where there is one."""
    drawn: dict[str, Any] = {"draws": draws, "seed": seed}
    frequency_V = token_frequency(corpus, vocabulary=model.config.vocab_size)
    moves, begun = RouteMap(model), time.perf_counter()
    records = route_table(model, corpus, split, budget=budget, route_map=moves, **options)
    taken = time.perf_counter() - begun
    plain_N = None if losses is None else aligned(records, losses)  # refused before the longer part
    early, late = extremes(model, corpus, split, records, **options)
    hard_N = records.loss if plain_N is None else plain_N
    result: dict[str, Any] = {
        "routed": asdict(records.score()),
        "metrics": of_steps(records) | moves.metrics() | of_costs(model, records) | {"time/tokens_per_s": len(records) / taken},
        "map": moves.to_dict(),
        "slices": slices(records, corpus.tokenizer(), frequency_V, difficulty_N=hard_N, gain_N=early.loss - late.loss),
        "difficulty_of": "the model itself" if plain_N is None else "the plain model",
        "budgets": [asdict(point) for point in budget_curve(model, corpus, split, budgets, **options)],
        "controls": controls(model, corpus, split, records, frequency_V, difficulty_N=plain_N, **drawn, **options),
        "gain": measured_gain(records, early, late, frequency_V, **drawn),
    }
    if plain_N is None or beside is None:
        return result | {"difficulty": None, "plain": None}
    found = difficulty_depth(records, plain_N, frequency_V, **drawn)
    more = mean_with_interval(records.loss - plain_N, records.document, **drawn).to_dict()
    return result | {
        "difficulty": {name: estimate.to_dict() for name, estimate in found.items()},
        "plain": beside | {"routed_excess": more},
    }


def of_steps(records: RouteRecords) -> dict[str, float]:
    """Return how many steps tokens took and how many blocks ran for them, by the names that training logs them under."""
    left = np.bincount(records.steps, minlength=records.header["max_route_steps"] + 1) / len(records)
    return {
        "route/steps_mean": float(records.steps.mean()),
        "route/steps_median": float(np.median(records.steps)),
        "route/steps_max": float(records.steps.max()),
        **{f"route/left_after_{steps}": float(share) for steps, share in enumerate(left)},
        "route/block_evaluations": float(records.evaluations.mean()),
    }


def of_costs(model: Any, records: RouteRecords) -> dict[str, float]:
    """Return what a token costs: bytes of cache that remain of it, and operations of the blocks that ran, as estimated from the sizes."""
    config, costs = model.config, model.costs(records.header["context"])
    most = config.pre_blocks + config.post_blocks + config.max_route_steps * config.route_top_k
    saved = costs["flops_per_visit"] * (most - float(records.evaluations.mean()))
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
    plain: Path | str | None, corpus: Any, split: str, *, device: str | None, console: Console | None, **options: Any
) -> tuple[TokenLosses | None, dict[str, Any] | None]:
    """Return an independent model's losses and its score, from a file of records or by measuring it; None where there is none."""
    if plain is None:
        return None, None
    if Path(plain).is_file():
        losses = read_token_losses(plain)
        if losses.header.get("corpus") != corpus.manifest["digest"] or losses.header.get("split") != split:
            raise ValueError(f"against={str(plain)!r}: holds losses of another corpus or split than {corpus.folder}, {split!r}")
        chosen = choose(corpus, split, max_documents=options["max_documents"], max_tokens=options["max_tokens"])
        if len(losses) != (wanted := sum(record.tokens - 1 for record in chosen)):
            raise ValueError(f"against={str(plain)!r}: holds losses of {len(losses):,} tokens, routes are measured on {wanted:,}")
        nats, size = float(losses.loss.sum(dtype=np.float64)), sum(record.bytes for record in chosen)
        whole = LanguageScore.of(nats, tokens=len(losses), size=size, documents=len(chosen))
        return losses, {"file": str(plain), "loss": whole.loss, "bits_per_byte": whole.bits_per_byte}
    place = find_checkpoint(plain)
    model, tokenizer = open_model(place, device=device)
    check_vocabulary(model, tokenizer, corpus, place)
    total = sum(r.tokens - 1 for r in choose(corpus, split, max_documents=options["max_documents"], max_tokens=options["max_tokens"]))
    with tempfile.TemporaryDirectory() as scratch, bar(console, "plain model", total=total) as advance:
        found = score(model, corpus, split, records=Path(scratch) / "plain.safetensors", progress=advance, **options)
        losses = read_token_losses(Path(scratch) / "plain.safetensors")
    return losses, {"checkpoint": str(place), "loss": found.loss, "bits_per_byte": found.bits_per_byte}
