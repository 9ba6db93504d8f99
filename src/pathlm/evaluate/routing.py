"""What routes are worth: the steps each token takes beside how hard it is, the loss at every budget, and controls with the same steps."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pathlm.evaluate.checkpoint import find_checkpoint, open_model, run_folder, run_record
from pathlm.evaluate.compare import bar, check_vocabulary, corpus_folder, note_result
from pathlm.evaluate.controls import PASSES, controls, token_frequency
from pathlm.evaluate.correlation import DRAWS, Estimate, Pair, correlations, mean_with_interval
from pathlm.evaluate.lm import LanguageScore, choose, reach, score
from pathlm.evaluate.records import TokenLosses, read_token_losses
from pathlm.evaluate.routes import RouteRecords, budget_curve, check_budgets, route_table

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


def run(
    folder: Path | str,
    corpus: Path | str | None = None,
    split: str = "validation",
    *,
    plain: Path | str | None = None,
    budget: float | None = None,
    budgets: Sequence[float] | None = None,
    context: int | None = None,
    stride: int | None = None,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure a routed model's routes on a prepared corpus: loss and steps, the budget curve, controls, and how depth goes with difficulty.

    Args:
        folder: The routed model: a run (its best, else its latest checkpoint), a checkpoint, or a folder with a model.
        corpus: A prepared corpus; by default the one the run was trained on.
        split: Which of its splits.
        plain: An independent plain model to take the difficulty from, with the same tokenizer: a run or model folder, or a file that
            `pathlm eval --records` wrote.
        budget: Budget at which routes, controls and difficulty are measured; by default the one the model was trained for last.
        budgets: Budgets of the curve; by default five, evenly from the smallest one trained to 1, or none where none was trained.
        context: Tokens the model sees at most; by default the length of the rows it was trained on.
        stride: Tokens that a window moves on in longer documents; by default half the context.
        max_documents: Measure the first so many documents only.
        max_tokens: Measure the first whole documents that hold at most so many predicted tokens.
        draws: Times that documents are drawn anew for an interval.
        seed: Of these draws and of the random controls.
        device: Where the models run; by default a GPU where there is one.
        console: Where progress and tables appear; nothing is printed without one.

    Returns the content that is also written to `routes.json` of the run (or model) folder under the split's name.

    Raises `ValueError` for options out of range, a plain model in the place of the routed one, and another tokenizer than the corpus's.
    """
    from pathlm.text.corpus import Corpus

    place = find_checkpoint(folder)
    trained_on = run_record(folder).get("config", {}).get("data", {})
    data = Corpus.open(corpus_folder(corpus, trained_on, folder), verify=False)
    chosen = choose(data, split, max_documents=max_documents, max_tokens=max_tokens)
    model, tokenizer = open_model(place, device=device)
    check_vocabulary(model, tokenizer, data, place)
    pool = getattr(model, "pool", None)
    if pool is None:
        raise ValueError(f"the model in {place} has no pool: there are no routes to measure")
    if budgets is None:
        low, high = pool.budgets_trained.tolist()
        budgets = () if low > high else np.linspace(max(low, pool.lowest_budget), 1, BUDGETS).tolist()
    check_budgets(model, (*budgets, *(() if budget is None else (budget,))))
    if context is None and trained_on.get("length"):
        context = min(trained_on["length"], model.config.max_position_embeddings)
    context, stride = reach(model, context, stride)
    options: dict[str, Any] = {"context": context, "stride": stride, "max_documents": max_documents, "max_tokens": max_tokens}

    passes = 1 + len(budgets) + PASSES
    frequency_V = token_frequency(data, vocabulary=model.config.vocab_size)
    with bar(console, "routes", total=passes * sum(record.tokens - 1 for record in chosen)) as advance:
        records = route_table(model, data, split, budget=budget, progress=advance, **options)
        curve = budget_curve(model, data, split, budgets, progress=advance, **options)
        ruled = controls(model, data, split, records, frequency_V, draws=draws, seed=seed, progress=advance, **options)
    result: dict[str, Any] = {
        "split": split,
        "checkpoint": str(place),
        "corpus": {"folder": str(data.folder), "digest": data.manifest["digest"]},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {"context": context, "stride": stride, "draws": draws, "seed": seed},
        "routed": asdict(records.score()),
        "budgets": [asdict(point) for point in curve],
        "controls": ruled,
        "plain": None,
        "difficulty": None,
    }
    if plain is not None:
        losses, result["plain"] = _plain_losses(plain, data, split, device=device, console=console, **options)
        excess = mean_with_interval(records.loss - aligned(records, losses), records.document, draws=draws, seed=seed)
        result["plain"]["routed_excess"] = excess.to_dict()
        found = difficulty_depth(records, losses, frequency_V, draws=draws, seed=seed)
        result["difficulty"] = {name: estimate.to_dict() for name, estimate in found.items()}
    file = note_result(run_folder(folder) / "routes.json", split, result)
    if console is not None:
        for shown in tables(result):
            console.print(shown)
        console.print(f"context {context}, stride {stride}; written to {file}", style="dim", highlight=False, soft_wrap=True)
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    """Return a result of `run` as tables: losses and computation, then correlations where there was a plain model."""
    routed = result["routed"]
    scores = Table(title=f"{result['split']}: routes over {routed['documents']:,} documents, {routed['tokens']:,} tokens")
    scores.add_column("")
    for heading in ("loss, nats/token", "bits/byte", "steps", "blocks/token", "above the routed model (95 %)"):
        scores.add_column(heading, justify="right", no_wrap=True)
    rows = [("routed", routed, "bold"), *((f"budget {point['budget']:.3g}", point, None) for point in result["budgets"])]
    rows += [(name.replace("_", " "), found, None) for name, found in result["controls"].items() if name != "frequency"]
    for name, found, style in rows:
        numbers = (
            f"{found['loss']:.4f}",
            f"{found['bits_per_byte']:.4f}",
            f"{found['steps_mean']:.2f}",
            f"{found['block_evaluations']:.2f}",
        )
        scores.add_row(name, *numbers, _told(found["excess"]) if "excess" in found else "", style=style)
    if result["plain"] is None:
        return [scores]
    found = result["plain"]
    scores.add_row("plain model", f"{found['loss']:.4f}", f"{found['bits_per_byte']:.4f}", "", "", "")
    depth = Table(title="steps beside the plain model's loss at the same place", caption="95 % intervals over documents")
    depth.add_column("")
    depth.add_column("correlation", justify="right", no_wrap=True)
    for name, estimate in result["difficulty"].items():
        depth.add_row(name.replace("_", " "), _told(estimate))
    return [scores, depth]


def _told(estimate: dict[str, float | None]) -> str:
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    if value is None:
        return "not defined"
    return f"{value:+.4f}" if low is None or high is None else f"{value:+.4f} ({low:+.4f} to {high:+.4f})"


def _plain_losses(
    plain: Path | str, corpus: Any, split: str, *, device: str | None, console: Console | None, **options: Any
) -> tuple[TokenLosses, dict[str, Any]]:
    """Return an independent model's losses and its score, from a file of records or by measuring it."""
    if Path(plain).is_file():
        losses = read_token_losses(plain)
        if losses.header.get("corpus") != corpus.manifest["digest"] or losses.header.get("split") != split:
            raise ValueError(f"{plain} holds losses of another corpus or split than {corpus.folder}, {split!r}")
        chosen = choose(corpus, split, max_documents=options["max_documents"], max_tokens=options["max_tokens"])
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
