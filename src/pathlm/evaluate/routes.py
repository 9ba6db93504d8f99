"""The route of every token of some documents: the steps it took, the blocks run for it, and the loss after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathlm.evaluate.checkpoint import check_budget
from pathlm.evaluate.lm import LanguageScore, Window, choose, groups, reach, token_losses
from pathlm.evaluate.records import FORMAT, TokenLosses
from pathlm.evaluate.route_map import RouteMap

# Shapes: N tokens that a next token was predicted for, B windows, T tokens of a window

COLUMNS = {
    "document": np.int32, "position": np.int32, "token": np.int32, "following": np.int32,
    "loss": np.float32, "steps": np.int16, "evaluations": np.int16,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class RouteRecords:
    """Every token of some documents that a next token was predicted for, in the order of the corpus.

    Row i is about a token and the loss after it; the same row of `TokenLosses` is about the token that follows, with the same loss.
    """

    document: np.ndarray
    """int32: the document's number in its split"""
    position: np.ndarray
    """int32: the token's place in its document, from 0"""
    token: np.ndarray
    """int32: the token itself"""
    following: np.ndarray
    """int32: the token after it"""
    loss: np.ndarray
    """float32: −ln p(the token after it), in nats"""
    steps: np.ndarray
    """int16: route steps it took in the pool, 0 for a plain decoder"""
    evaluations: np.ndarray
    """int16: blocks run for it, before, in and after the pool"""
    header: dict[str, Any]
    """What was measured: split, context, stride, budget, most route steps, blocks of the model, bytes of the documents."""

    def __len__(self) -> int:
        return len(self.loss)

    def score(self) -> RouteScore:
        """Sum up."""
        whole = RouteTotals(self.header)
        whole.add(self)
        return whole.score()

    def losses(self) -> TokenLosses:
        """Return the losses as records of the tokens that were predicted."""
        header = {"format": FORMAT, "unit": "nats"} | self.header
        return TokenLosses(self.document, self.position + 1, self.following, self.loss, header)


@dataclass(frozen=True)
class RouteScore:
    """What a model lost on whole documents and what it computed for that."""

    budget: float | None
    loss: float
    """Nats per token"""
    bits_per_byte: float
    steps_mean: float
    steps_share: float
    """Mean route steps as a share of the most that are possible"""
    block_evaluations: float
    """Blocks run per token, before, in and after the pool"""
    histogram: list[float]
    """Share of tokens that took 0, 1, 2 … route steps"""
    tokens: int
    documents: int
    blocks_share: float
    """Blocks run per token as a share of the blocks that the model holds; more than 1 where they are visited again and again"""


class RouteTotals:
    """Sums over the tokens of records that come one after the other; `header` is theirs."""

    def __init__(self, header: dict[str, Any]) -> None:
        self.header = header
        self.left_S = np.zeros(header["max_route_steps"] + 1, dtype=np.int64)
        """How many tokens took 0, 1, 2 … route steps"""
        self.nats, self.evaluations, self.documents = 0.0, 0, 0

    def add(self, records: RouteRecords) -> None:
        """Add whole documents."""
        self.nats += float(records.loss.sum(dtype=np.float64))
        self.evaluations += int(records.evaluations.sum(dtype=np.int64))
        self.left_S += np.bincount(records.steps, minlength=len(self.left_S))
        self.documents += len(np.unique(records.document))

    @property
    def tokens(self) -> int:
        """How many tokens were added."""
        return int(self.left_S.sum())

    @property
    def steps_mean(self) -> float:
        """Route steps of a token."""
        return float(self.left_S @ np.arange(len(self.left_S)) / self.tokens)

    def score(self) -> RouteScore:
        """Sum up."""
        whole, mean, most = self.language(), self.steps_mean, self.header["max_route_steps"]
        evaluations = self.evaluations / self.tokens
        return RouteScore(
            self.header["budget"], whole.loss, whole.bits_per_byte, mean, mean / most if most else 0.0, evaluations,
            (self.left_S / self.tokens).tolist(), self.tokens, self.documents, evaluations / self.header["blocks"],
        )  # fmt: skip

    def language(self, **others: Any) -> LanguageScore:
        """Sum up the losses alone, as `evaluate.lm.score` does; `others` are fields of the score that are not known here."""
        where = {name: self.header[name] for name in ("context", "stride")}
        return LanguageScore.of(self.nats, tokens=self.tokens, size=self.header["bytes"], documents=self.documents, **where | others)


Depths = Callable[[Sequence[np.ndarray], slice], np.ndarray]
"""From documents, as tokens, and the rows of their predicted tokens among all, to the number of route steps that each is to take."""


def all_take(depth: int) -> Depths:
    """Give every token one number of steps."""
    return lambda documents, rows: np.full(rows.stop - rows.start, depth, dtype=np.int16)


def route_groups(
    model: Any,
    corpus: Any,
    split: str = "validation",
    *,
    context: int | None = None,
    stride: int | None = None,
    budget: float | None = None,
    depths: Depths | None = None,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
    route_map: RouteMap | None = None,
) -> Iterator[RouteRecords]:
    """Read whole documents of a split and yield, for each group of them, every token's route steps and the loss after it.

    Documents, groups, windows, `context`, `stride`, `max_documents` and `max_tokens` are those of `evaluate.lm.score`. A token of several
    windows is told of as it was in the one that counted it. `budget` is the model's; `depths` give every token its number of route steps
    instead of the router's choice to leave. `route_map` counts where the tokens go. A plain decoder may be measured, too.

    Raises `ValueError` for a model that keeps no traces, for numbers out of range, and for a loss that is not finite.
    """
    context, stride = reach(model, context, stride)
    chosen = choose(corpus, split, max_documents=max_documents, max_tokens=max_tokens)
    check_budgets(model, () if budget is None else (budget,))
    header = {"split": split, "corpus": corpus.manifest["digest"], "context": context, "stride": stride, "budget": budget}
    header |= {"max_route_steps": getattr(model.config, "max_route_steps", 0), "bytes": sum(record.bytes for record in chosen)}
    header |= {"blocks": model.config.num_hidden_layers, "model": model.config.name_or_path}
    done = 0
    for group in groups(chosen):
        documents = [corpus.document_tokens(split, record.number) for record in group]
        sizes = [len(tokens) - 1 for tokens in documents]
        rows = slice(done, done := done + sum(sizes))
        given = None if depths is None else np.split(depths(documents, rows), np.cumsum(sizes)[:-1])
        watch = _Watch(model, documents, budget, given, route_map)
        losses = token_losses(model, documents, context=context, stride=stride, progress=progress, call=watch)
        for record, loss in zip(group, losses, strict=True):
            if not np.isfinite(loss).all():
                raise ValueError(f"the loss of document {record.id!r} is not finite: the model is broken or its precision is too low")
        numbers = np.repeat([record.number for record in group], sizes)
        places = [np.arange(size) for size in sizes]
        ends = [[tokens[:-1] for tokens in documents], [tokens[1:] for tokens in documents]]
        columns = [numbers, *map(np.concatenate, (places, *ends, losses, watch.steps, watch.evaluations))]
        typed = {name: column.astype(kind) for (name, kind), column in zip(COLUMNS.items(), columns, strict=True)}
        yield RouteRecords(**typed, header=header)


def route_table(model: Any, corpus: Any, split: str = "validation", *, depths: np.ndarray | None = None, **options: Any) -> RouteRecords:
    """Return what `route_groups` yields as one table, 24 bytes per token; `depths` (N,) give every token its number of route steps."""
    if depths is not None:
        limits = {name: options.get(name) for name in ("max_documents", "max_tokens")}
        total = sum(record.tokens - 1 for record in choose(corpus, split, **limits))
        if depths.shape != (total,):
            raise ValueError(f"depths: has shape {depths.shape}, must be ({total},), one per predicted token")
    dealt = None if depths is None else lambda _, rows: depths[rows]
    parts = list(route_groups(model, corpus, split, depths=dealt, **options))
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
    return RouteRecords(**columns, header=parts[0].header)


def route_totals(model: Any, corpus: Any, split: str = "validation", **options: Any) -> RouteTotals:
    """Return sums over what `route_groups` yields."""
    totals: RouteTotals | None = None
    for records in route_groups(model, corpus, split, **options):
        totals = totals or RouteTotals(records.header)
        totals.add(records)
    assert totals is not None, "`choose` refuses a split without documents"
    return totals


class _Watch:
    """Runs the model on windows and notes what their tokens did."""

    def __init__(
        self,
        model: Any,
        documents: Sequence[np.ndarray],
        budget: float | None,
        depths: Sequence[np.ndarray] | None,
        route_map: RouteMap | None,
    ) -> None:
        self.model, self.budget, self.depths, self.route_map = model, budget, depths, route_map
        self.steps = [np.zeros(len(tokens) - 1, dtype=np.int16) for tokens in documents]
        self.evaluations = [np.zeros(len(tokens) - 1, dtype=np.int16) for tokens in documents]

    def __call__(self, batch: Sequence[tuple[int, Window]], inputs: dict[str, Any]) -> Any:
        ids_BT: Tensor = inputs["input_ids"]
        if self.budget is not None:
            inputs["budget"] = self.budget
        if self.depths is not None:
            depth_BT = np.full(ids_BT.shape, self.model.config.min_route_steps, dtype=np.int64)
            for row, (number, window) in enumerate(batch):
                depth_BT[row, : window.stop - window.start] = self.depths[number][window.start : window.stop]
            inputs["depths"] = torch.from_numpy(depth_BT).to(ids_BT.device)
        output = self.model(**inputs, trace=True)
        trace = getattr(output, "trace", None)
        if trace is None:
            raise ValueError(f"a {type(self.model).__name__} keeps no traces: routes are measured on models of this package")
        visited_BTS = trace.block_BTS > 0
        pool = slice(trace.first_route_step, trace.first_route_step + self.model.config.max_route_steps)
        evaluated_BT = visited_BTS.sum(-1)
        if trace.second_BTR is not None:
            evaluated_BT = evaluated_BT + (trace.second_BTR > 0).sum(-1)
        if getattr(trace, "visits_BT", None) is not None:
            evaluated_BT = trace.visits_BT + evaluated_BT - visited_BTS[..., pool].sum(-1)
        steps_BT, evaluated_BT = visited_BTS[..., pool].sum(-1).cpu().numpy(), evaluated_BT.cpu().numpy()
        counted_BT = torch.zeros(ids_BT.shape, dtype=torch.bool, device=ids_BT.device)
        for row, (number, window) in enumerate(batch):
            # The loss of the token at place p was predicted at place p − 1.
            counted, here = slice(window.first - 1, window.stop), slice(window.first - 1 - window.start, window.stop - window.start)
            self.steps[number][counted], self.evaluations[number][counted] = steps_BT[row, here], evaluated_BT[row, here]
            counted_BT[row, here] = True
        if self.route_map is not None:
            self.route_map.add(trace, counted_BT)
        return output


def check_budgets(model: Any, budgets: Sequence[float]) -> None:
    """Raise `ValueError` for the first budget that the model has not been trained for."""
    for budget in budgets:
        check_budget(model, budget)


def budget_curve(model: Any, corpus: Any, split: str, budgets: Sequence[float], **options: Any) -> list[RouteScore]:
    """Measure one model at several budgets, smallest first; `options` are those of `route_groups`."""
    check_budgets(model, budgets)
    return [route_totals(model, corpus, split, budget=budget, **options).score() for budget in sorted(budgets)]
