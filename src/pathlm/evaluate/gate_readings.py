"""What gates are judged by: numbers of a run that its folder, and those of the runs beside it, record. None: not recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pathlm.evaluate.recorded import LOSS, Recorded, at, dig, listed, number

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
