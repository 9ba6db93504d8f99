"""The table of gates, stage by stage, then the decisions to train a larger model: bounds, reasons, and what measures them."""

from __future__ import annotations

from dataclasses import dataclass

from pathlm.evaluate.gate_readings import (
    Read,
    above_frequencies,
    at_equal_blocks,
    at_equal_training,
    budget_error,
    busiest,
    easiest,
    fixed_share,
    leaving,
    measured_twice,
    not_recorded,
    of_routes,
    positions,
    ratio,
    rows_out_of_order,
    steps_of_tasks,
    time_of_tokens,
    under_one_cache,
    wrapping,
)
from pathlm.evaluate.recorded import LOSS
from pathlm.models.stages import Gate


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
