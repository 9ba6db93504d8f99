"""What the contract is run on: every family with every option, one row each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pathlm.models import family
from pathlm.models.brian.curriculum import Knobs

VOCABULARY = 61
LENGTH = 12
COMMON: dict[str, dict[str, Any]] = {
    # Weights are drawn large, so that every token matters to every later one.
    "brian": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "pre_blocks": 2,
        "post_blocks": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    },
    "brillm": {
        "vocab_size": VOCABULARY,
        "signal_size": 8,
        "edges": 1_500,
        "trained_positions": 16,
        "pad_token_id": 0,
    },
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}


@dataclass(frozen=True)
class Case:
    """One family with one set of options."""

    name: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    """What every forward pass is given besides: `budget`, or the names and values of `knobs`."""
    local_share: float = 1.0
    """Share of the weight of a pool's rows that counts beside its codes"""
    fresh: bool = False
    """Whether routers stay as they were made, preferring the original route, instead of being drawn at random."""

    def config(self) -> Any:
        return family(self.model_type).Config(**COMMON[self.model_type] | self.options)

    def build(self, dtype: torch.dtype = torch.float64, model: type[PreTrainedModel] | None = None) -> PreTrainedModel:
        """The same model every time, ready for evaluation; `model` replaces the family's class."""
        torch.manual_seed(0)
        built = (model or family(self.model_type).Model)(self.config())
        if self.model_type == "brillm":
            unequal(built)
        elif built.config.pool_blocks and not self.fresh:
            scatter(built)
        if getattr(built, "codes", None) is not None:
            built.codes.set_reach(None, self.local_share)
        return self.prepare(built.to(dtype).eval())

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """Let every forward pass of `model` have this case's options, also those that `generate` and trainers make."""
        options = dict(self.call)
        if "knobs" in options:
            options["knobs"] = Knobs(**options["knobs"])
        if options:
            model.register_forward_pre_hook(lambda _, args, given: (args, given | options), with_kwargs=True)
        model.prepared_by = self
        return model

    def __str__(self) -> str:
        return self.name


@torch.no_grad()
def scatter(model: Any) -> None:
    """Draw everything that routing adds, so that tokens take different routes, leave at different steps, and positions matter."""
    pool = model.pool
    for name, p in pool.named_parameters():
        # What a token is weighs more than where it is, or all would take one route.
        p.normal_(std=0.5 if "router" in name else 1.0)
    pool.load_bias.normal_(std=0.5)
    # A larger budget asks for less gain, hence for longer routes; outside routes nothing is learned here.
    pool.exit_threshold.copy_(torch.linspace(1.5, -1.5, len(pool.exit_threshold)))
    pool.budgets_trained.copy_(torch.tensor([pool.lowest_budget, 1.0]))
    pool.budget_default.fill_(pool.lowest_budget / 2 + 0.5)


@torch.no_grad()
def unequal(model: Any) -> None:
    """Let positions, nodes and running signals differ in their weights, many of which start alike."""
    for name, parameter in model.graph.named_parameters():
        if name not in ("weight", "bias", "node_bias"):
            parameter.normal_()


WINDOW = {"attention_window": 3, "attention_sinks": 2}
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "choice": {
        "top-1": {},
        "top-2": {"route_top_k": 2},
        "top-2 read as top-1": {"route_top_k": 2, "knobs": {"top_k": 1}},
    },
    "steps": {
        "1…4 steps": {"max_route_steps": 4},
        "2…5 steps": {"max_route_steps": 5, "min_route_steps": 2},
        "3 steps": {"max_route_steps": 3, "min_route_steps": 3},
    },
    "pool": {"4 blocks": {"pool_blocks": 4}, "3 blocks": {"pool_blocks": 3}},
    "position": {kind: {"block_position": kind} for kind in ("arc", "circle", "random", "none")},
    "reader": {f"to {reader}": {"block_position_to": reader} for reader in ("both", "router", "state", "blocks")},
    "bias": {"": {}, "near": {"location_bias": 1.5}},
    "repeats": {"": {}, "no repeats": {"max_repeats": 1}, "one repeat": {"max_repeats": 2}},
    "left": {"": {}, "refreshed": {"left_rows": "refreshed"}},
    "router": {"": {}, "deep router": {"router_hidden": 8}},
    "memory": {
        "": {},
        "codes": {"memory": "canonical", "code_dim": 0, "code_adapter": "shared"},
        "small codes everywhere": {"memory": "canonical", "code_dim": 6, "code_keys": 1, "post_memory": "canonical"},
        "newest codes": {
            "memory": "canonical",
            "code_dim": 6,
            "code_keys": 2,
            "code_delta_rank": 2,
            "code_window": 4,
            "code_sinks": 1,
            "attention_window": 4,
        },
        "fading rows": {"memory": "local+canonical", "code_dim": 12, "code_keys": 3, "code_delta_rank": 1, "local_share": 0.4},
        "few rows and codes": {
            "memory": "local+canonical",
            "code_adapter": "shared",
            "local_window": 2,
            "code_window": 5,
            "code_sinks": 2,
            "attention_window": 3,
            "attention_sinks": 2,
        },
    },
    "budget": {"": {}, "budget 0.4": {"budget": 0.4}, "budget 0.8": {"budget": 0.8}, "whole budget": {"budget": 1.0}},
    "attention": {"": {}, "grouped": {"num_key_value_heads": 2}, "biased": {"attention_bias": True, "mlp_bias": True}},
    "ends": {
        "": {"pre_blocks": 1, "post_blocks": 1},
        "no pre": {"pre_blocks": 0, "post_blocks": 1},
        "no post, tied": {"pre_blocks": 1, "post_blocks": 0, "tie_word_embeddings": True},
    },
    "moves": {"": {}, "recur": {"route_moves": "recur"}, "skip": {"route_moves": "skip"}},
}
"""What routing may be combined of. The first level of a factor is the usual one."""


def possible(levels: dict[str, str]) -> bool:
    """Whether the configuration allows these levels together (of some factors, or of all)."""
    settings = {key: value for factor, level in levels.items() for key, value in FACTORS[factor][level].items()}
    least = settings.get("min_route_steps", 1) / settings.get("max_route_steps", 9)
    placed = settings.get("block_position") != "none"
    moves = settings.get("route_moves")
    if moves and (settings.get("route_top_k") or settings.get("max_repeats")):
        return False
    # Of three blocks, a router that skips has less to choose than these numbers of steps ask for.
    if moves == "skip" and (settings.get("max_route_steps", 4) > 4 or settings.get("pool_blocks", 4) < 4):
        return False
    if settings.get("left_rows") == "refreshed" and settings.get("memory") == "canonical":
        return False
    return (placed or not settings.get("location_bias")) and settings.get("budget", 1.0) >= least


def pairs() -> Iterator[frozenset[tuple[str, str]]]:
    """Every two levels of different factors that may meet."""
    for (one, ones), (other, others) in combinations(FACTORS.items(), 2):
        for a, b in product(ones, others):
            if possible({one: a, other: b}):
                yield frozenset({(one, a), (other, b)})


def covering() -> list[dict[str, str]]:
    """Rows of levels in which every pair of levels that may meet does, found greedily; where none is due, the rarest level so far."""
    open_pairs, rows, used = dict.fromkeys(pairs()), [], Counter[tuple[str, str]]()
    while open_pairs:
        row = dict(next(iter(open_pairs)))
        for factor in sorted(FACTORS.keys() - row.keys(), key=list(FACTORS).index):
            fitting = [level for level in FACTORS[factor] if possible(row | {factor: level})]
            gain = {level: sum(frozenset({(factor, level), item}) in open_pairs for item in row.items()) for level in fitting}
            row[factor] = max(fitting, key=lambda level: (gain[level], -used[factor, level]))
        for pair in combinations(row.items(), 2):
            open_pairs.pop(frozenset(pair), None)
        used.update(row.items())
        rows.append(row)
    return rows


def routed(row: dict[str, str], **options: Any) -> Case:
    """The case of one row of levels."""
    settings = {key: value for factor, level in row.items() for key, value in FACTORS[factor][level].items()}
    call = {key: settings.pop(key) for key in ("knobs", "budget") if key in settings}
    share = settings.pop("local_share", 1.0)
    name = ", ".join(level for factor in FACTORS if (level := row.get(factor)))
    return Case(name, "brian", {"block_position_dim": 6} | settings | options, call, share)


ROUTED = (
    *(routed(row) for row in covering()),
    Case("1 block", "brian", {"pool_blocks": 1, "max_route_steps": 3}),
    Case(
        "rows as wide as the text",
        "brian",
        {"pool_blocks": 3, "max_route_steps": 4, "memory": "local+canonical", "code_dim": 6, "post_memory": "canonical"},
    ),
    Case("1 step", "brian", {"pool_blocks": 3, "max_route_steps": 1}),
    Case("1 block, 1 step, no other", "brian", {"pool_blocks": 1, "max_route_steps": 1, "pre_blocks": 0, "post_blocks": 0}),
    Case(
        "few rows and codes, one block at a time",
        "brian",
        FACTORS["memory"]["few rows and codes"] | {"pool_blocks": 4, "max_route_steps": 4, "code_dim": 6, "num_key_value_heads": 2},
    ),
    Case(
        "few rows",
        "brian",
        {
            "pool_blocks": 4,
            "max_route_steps": 4,
            "local_window": 3,
            "attention_window": 4,
            "left_rows": "refreshed",
            "num_key_value_heads": 2,
        },
    ),
    Case("2 of 2 blocks", "brian", {"pool_blocks": 2, "max_route_steps": 3, "route_top_k": 2}, {"budget": 0.7}),
    Case(
        "skip, 2…4 steps of 6 blocks",
        "brian",
        {"pool_blocks": 6, "max_route_steps": 4, "min_route_steps": 2, "route_moves": "skip", "left_rows": "refreshed"},
    ),
)


def branched(name: str, branches: int, *, share: float = 1.0, budget: float | None = None, **options: Any) -> Case:
    """A case whose tokens take several ways at once."""
    usual = {"pool_blocks": 4, "max_route_steps": 4, "block_position_dim": 6, "pre_blocks": 1, "route_beams": branches}
    return Case(f"{branches} branches{name}", "brian", usual | options, {} if budget is None else {"budget": budget}, share)


MIXED = {"memory": "local+canonical", "code_dim": 6, "code_keys": 2}
BRANCHED = (
    branched("", 2),
    branched(", the winner leaves", 4, beam_expansion=3, beam_merge="winner", beam_decay=0.9),
    branched(" leave together, rows refreshed", 2, beam_exit="any", left_rows="refreshed"),
    branched(" leave with the first, grouped", 4, beam_exit="first", num_key_value_heads=2),
    branched(", refreshed, few are kept", 4, left_rows="refreshed", beam_margin=1.0),
    branched(" over codes", 2, memory="canonical", post_memory="canonical"),
    branched(" over newest codes", 4, memory="canonical", code_window=4, min_route_steps=2),
    branched(" over few rows", 2, local_window=3),
    branched(" over rows and codes", 2, local_window=3, beam_cost=0.2, **MIXED),
    branched(" over fading rows", 4, share=0.4, max_repeats=1, **MIXED),
    branched(" recur, positions in the state", 2, route_moves="recur", max_route_steps=5, block_position_to="state"),
    branched(" skip, rows refreshed", 4, route_moves="skip", left_rows="refreshed", min_route_steps=2),
    branched(", budget 0.5, a window", 4, budget=0.5, block_position="none", attention_window=4),
)
"""Parallel ways through the pool."""

PLAIN = (
    Case("plain", "brian"),
    Case("one block", "brian", {"pre_blocks": 1, "post_blocks": 0}),
    Case("post blocks only", "brian", {"pre_blocks": 0, "post_blocks": 3}),
    Case("grouped queries", "brian", {"num_key_value_heads": 2}),
    Case("window and sinks", "brian", WINDOW),
    Case("one key head, wide heads", "brian", {"num_key_value_heads": 1, "head_dim": 16}),
    Case("tied head", "brian", {"tie_word_embeddings": True}),
    Case("biases", "brian", {"attention_bias": True, "mlp_bias": True}),
    Case("linear rotary", "brian", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}}),
    Case("llama3 rotary", "brian", {"rope_parameters": LLAMA3}),
    Case("yarn rotary", "brian", {"rope_parameters": YARN}),
)
# A wrapped model before any training: the original route, whatever noise there is in its scores.
FRESH = (
    Case("fresh", "brian", {"pool_blocks": 3, "max_route_steps": 4}, fresh=True),
    Case("fresh, top-2", "brian", {"pool_blocks": 3, "max_route_steps": 4, "route_top_k": 2}, fresh=True),
    Case("fresh, top-2 of 8", "brian", {"pool_blocks": 8, "max_route_steps": 8, "route_top_k": 2, "block_position_dim": 64}, fresh=True),
    Case("fresh, recur", "brian", {"pool_blocks": 3, "max_route_steps": 4, "route_moves": "recur"}, fresh=True),
    Case("fresh, skip", "brian", {"pool_blocks": 3, "max_route_steps": 3, "route_moves": "skip"}, fresh=True),
    Case("fresh, longer than the pool", "brian", {"pool_blocks": 2, "max_route_steps": 4, "min_route_steps": 4}, fresh=True),
)
GRAPHS = (
    Case("signal", "brillm"),
    Case("chain", "brillm", {"context": "chain"}),
    Case("held beyond 4", "brillm", {"trained_positions": 4, "beyond": "hold"}),
    Case("continued beyond 4", "brillm", {"trained_positions": 4, "beyond": "continue"}),
    Case("chain, no positions", "brillm", {"context": "chain", "positions": "none"}),
    Case("released positions", "brillm", {"positions": "multiplied"}),
    Case("small positions, own signal", "brillm", {"position_scale": 0.25, "initial_signal": 1.0}),
    Case("few edges", "brillm", {"edges": 300}),
    Case("every pair has an edge", "brillm", {"edges": VOCABULARY**2}),
    Case("frozen shared edge", "brillm", {"train_shared": False}),
    Case("decay, normalised", "brillm", {"context": "decay", "normalise": True}),
    Case("decay per node, first signal kept", "brillm", {"context": "node-decay", "keep_initial": True}),
    Case("last output and mean, gated", "brillm", {"context": "chain+pooled+gated", "trained_positions": 4, "beyond": "hold"}),
    Case("timescales, first signal kept", "brillm", {"context": "timescales", "timescales": [2, 8.5], "keep_initial": True}),
    Case("two decays and mean", "brillm", {"context": "decay+decay+pooled", "normalise": True, "keep_initial": True}),
    Case("sampled rivals, all of them", "brillm", {"rivals": VOCABULARY - 1}),
)
RELEASED = Case("released", "brillm", {"arithmetic": "released", "positions": "multiplied"})
"""Exempt from "stepwise = full", and from nothing else: the released code decodes with another position than it trains with."""
CASES = PLAIN + ROUTED + BRANCHED + FRESH + GRAPHS


def ids(rows: int, tokens: int = LENGTH, *, seed: int = 1) -> Tensor:
    """Random tokens (rows, tokens), none of them padding."""
    return torch.randint(1, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
