"""What changes while a BRIAN model trains: the knobs, and the stages 0 to 4 as rows of knobs with the gates they must pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.stages import Curriculum, Gate, Stage

SHARES_OF_ALL = (
    "router_share", "pseudo", "exit_share", "random_depth", "other_share", "random_share", "probe_share", "listen", "threshold_rate",
    "difficulty_rate", "beam_share", "whole",
)  # fmt: skip
"""Knobs that are shares of something."""


@dataclass(frozen=True)
class Knobs:
    """The values that a stage sets for each step. As they stand here, the router is in charge and nothing is taught beside the text.

    Weights of losses are 0 where the loss is off; it is then not computed either.
    """

    router_share: float = 1.0
    """Share of tokens that the router drives; the others follow the teacher. In evaluation any share above 0 means all."""
    pseudo: float = 0.0
    """Share of rows whose teacher is a pseudo route (skip, recur or straight, by the token's difficulty); elsewhere it is B1 … Bm, OUT."""
    exit_share: float = 1.0
    """Share of rows in which the router may let tokens leave before the last step. In evaluation any share above 0 means all."""
    budget: float | None = None
    """Route steps that tokens are to take on average, as a share of `max_route_steps`; None leaves the thresholds as they are."""
    budget_spread: float = 0.0
    """Rows draw their budget evenly from `budget` ± this, so that one model learns them all."""
    random_depth: float = 0.0
    """Share of tokens that leave after a number of steps drawn evenly instead, in training, so that every depth is trained."""
    best_gain: bool = False
    """Whether the gain of staying is measured against the best later step; otherwise against the last one."""
    expected_gain: bool = False
    """Whether the gain is the one to be expected by what the model says after the token's last step, whatever token followed."""
    gain_delta: float = 1.0
    """Nats beyond which an error of the predicted gain counts linearly (Huber's δ). Few tokens gain much; with a small value those near a
    threshold count for as much as they do."""
    whole: float = 0.0
    """Weight of the text's loss in a second pass in which the router lets nobody leave, in training; the first pass has the rest of it."""
    price: float = 0.0
    """Nats that every further step costs in the measured gain, so that tokens leave where nothing is left to remove."""
    idle: float = 0.0
    """Weight of the regression that tells tokens without a target that the next step gains them nothing."""
    hindsight: bool = False
    """Whether the text's loss of tokens that stay to be measured is the one after their best step; otherwise the one after the last."""
    listen: float = 0.0
    """Share of the router's gradient that reaches hidden states, in training; with 0 what the model says never bends to the router."""
    local_window: float | None = None
    """Newest tokens that are read as rows in a pool that has codes besides, rounded; 0 is all, None leaves what is."""
    local_share: float | None = None
    """Share of the weight of these rows that counts; the rest is that of the same tokens' codes. None leaves what is."""
    route_beams: int | None = None
    """Branches a token may have at once; None is the configuration's number."""
    beam_share: float = 1.0
    """Share of passes, in training, in which tokens may have several; in the others they have one, and what it gains is measured."""
    top_k: int | None = None
    """Blocks per step, at most the configuration's `route_top_k`, which None means."""
    gate: float = 0.0
    """Strength of the gradient that a visited block's probability gets from the unit-forward gate."""
    other_share: float = 0.0
    """Share of visits beside which another legal block is run as well, for its probability's gradient."""
    noise: float = 0.0
    """Standard deviation of the noise on scores, in training."""
    random_share: float = 0.0
    """Share of choices that are drawn evenly instead, in training."""
    probe_share: float = 0.0
    """Share of tokens that stay to the end in training, so that the loss after each of their steps can be measured."""
    threshold_rate: float = 0.05
    """How fast the exit's thresholds follow the quantiles of the newest batch."""
    difficulty_rate: float = 0.0
    """How much of the table of losses by token is forgotten in each batch; 0 leaves the table as it is."""
    load_bias_rate: float = 0.0
    """How far a block's load bias moves per batch towards an even load."""
    imitation: float = 0.0
    """Weight of the cross-entropy between the router and the teacher, on tokens that follow the teacher."""
    balance: float = 0.0
    selected_balance: float = 0.0
    coverage: float = 0.0
    cost: float = 0.0
    location: float = 0.0
    diversity: float = 0.0
    exit: float = 0.0
    """Weight of the regression of the measured gain."""

    def check_branches(self, name: str, branches: int) -> None:
        """Raise `ValueError`, saying `name`, where tokens cannot have several branches while these knobs hold."""
        if self.router_share < 1 or self.random_depth:
            given = f"these are {self.router_share:g} and {self.random_depth:g}"
            rule = f"needs router_share=1 and random_depth=0 ({given}): branches follow no teacher and leave when they choose to"
            raise ValueError(f"{name}={branches}: {rule}")

    exit_boundary: float = 0.0
    exit_min_step: int = 2
    """The exit-boundary loss holds p(OUT) down before this step."""
    z: float = 0.0

    def __post_init__(self) -> None:
        """Refuse shares and budgets that are none, and negative weights, widths and prices."""
        for name, value in vars(self).items():
            if isinstance(value, float) and not 0.0 <= value < math.inf:
                rule = "must lie between 0 and 1" if name in SHARES_OF_ALL else "must be a finite number and not negative"
                raise ValueError(f"{name}={value}: {rule}")
        for name in SHARES_OF_ALL:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: must lie between 0 and 1")
        if not self.gain_delta:
            raise ValueError("gain_delta=0.0: must be above 0, nats up to which an error of the predicted gain counts squared")
        if self.hindsight and (self.whole or self.expected_gain):
            given = f"whole={self.whole:g}" if self.whole else "expected_gain=True"
            raise ValueError(f"hindsight=True: the text's loss is judged after each token's best step, which does not go with {given}")
        if self.local_share is not None and self.local_share > 1.0:
            raise ValueError(f"local_share={self.local_share}: must lie between 0 and 1")
        if self.budget is not None and not 0.0 < self.budget <= 1.0:
            raise ValueError(f"budget={self.budget}: must lie above 0 and at most at 1, a share of max_route_steps")


BASELINE = Knobs(router_share=0.0, exit_share=0.0, difficulty_rate=0.01)
# Weights are small: AdamW does not mind, and the router must not use up the norm to which all gradients together are clipped.
WRAPPED = replace(BASELINE, imitation=0.1)
PSEUDO = replace(WRAPPED, pseudo=1.0, difficulty_rate=0.002)  # slowly: the table is the teacher here
# No imitation here: to hold the router to the old path while it takes over costs the text's loss and a third of the paths' diversity.
EXPLORING = Knobs(router_share=0.1, exit_share=0.0, gate=0.1, noise=0.5, random_share=0.05, load_bias_rate=0.001, z=1e-5)
FREE = replace(EXPLORING, router_share=1.0, gate=1.0, noise=0.0, random_share=0.0)
LEAVING = Knobs(exit_share=0.5, budget=0.65, budget_spread=0.35, gate=1.0, probe_share=0.1, exit=0.1, z=1e-5)
LEFT = replace(LEAVING, exit_share=1.0)

LEARNED = "give the stage more steps, or a larger optim.lr"
STAGES = (
    Stage("baseline", None, BASELINE),
    Stage(
        "wrapped",
        None,
        WRAPPED,
        gates=(Gate("validation/route/imitation", ">=", 0.98, "the router must know the original path before it may follow it", LEARNED),),
    ),
    Stage(
        "pseudo-routes",
        None,
        PSEUDO,
        gates=(
            Gate("validation/route/imitation", ">=", 0.95, "the router must be able to follow any path it is shown", LEARNED),
            Gate("validation/route/load_min", ">=", 0.2, "no block may starve", "lower knobs.pseudo"),
        ),
    ),
    Stage(
        "hand-over",
        None,
        EXPLORING,
        FREE,
        gates=(
            Gate(
                "validation/loss",
                "<=",
                # Short runs fall by 0.04 to 0.18 nats here; one that has nothing left to learn may waver by less than this.
                0.02,
                "free routes must not cost the loss",
                "give the stage more steps, or less noise (knobs hand-over.noise, hand-over.random_share)",
                relative=True,
            ),
            Gate(
                "validation/route/load_entropy", ">=", 0.6, "the blocks must share the work", "raise knobs.load_bias_rate or knobs.balance"
            ),
        ),
    ),
    Stage(
        "exit",
        None,
        LEAVING,
        LEFT,
        gates=(
            Gate("validation/route/steps_error", "<=", 0.15, "tokens must take as many steps as the budget says", LEARNED),
            Gate("validation/route/leave_first", "<=", 0.95, "leaving must not always happen at once", "raise knobs.budget"),
            Gate(
                "validation/route/load_entropy", ">=", 0.6, "the blocks must share the work", "raise knobs.load_bias_rate or knobs.balance"
            ),
            Gate(
                "validation/route/difficulty_correlation",
                ">=",
                0.01,
                "harder tokens must go deeper",
                "raise knobs.budget_spread or knobs.exit",
            ),
        ),
    ),
)
"""One row per stage. How long each lasts is the curriculum's matter."""
DROPPING = Knobs(random_depth=0.3, difficulty_rate=0.01)
SHEDDING = replace(DROPPING, probe_share=0.05, exit=0.03, budget=1.0)
SHED = replace(SHEDDING, random_depth=0.0, budget=0.625)
JOINT = (
    Stage("random-depth", None, DROPPING),
    Stage("shedding", None, SHEDDING, SHED),
    Stage("settled", None, SHED, gates=STAGES[-1].gates),
)
"""From nothing to a model that leaves early, without a wrap: three in ten tokens leave at random first, so that blocks bear it; then the
router takes over while the budget falls from the whole route, and the last part is spent at the budget."""
USED = Gate("validation/memory/code_mass", ">=", 0.01, "codes must be read", "give the stage more steps, or a smaller model.local_window")
CHEAP = "codes in the place of rows must not cost more than this"
REMEMBERED = Gate("validation/loss", "<=", 0.03, CHEAP, "give the stage more steps, or larger codes (model.code_dim)", relative=True)
BOUNDED = "a token must not have more branches than allowed"
BETTER = Gate("validation/loss", "<=", 0.0, "branches must pay", "give the stage more steps, or leave route_beams at 1", relative=True)
CURRICULA = {
    "default": (STAGES, (0.35, 0.05, 0.1, 0.15, 0.35)),
    "route": (STAGES, (0.0, 0.08, 0.12, 0.3, 0.5)),
    "joint": (JOINT, (0.5, 0.4, 0.1)),
}
"""Curricula of several stages, and the parts of a run's steps that each stage gets."""


def curriculum(
    name: str,
    steps: int,
    *,
    knobs: Mapping[str, Any] | None = None,
    config: BrianConfig | None = None,
    stages: Mapping[str, float] | None = None,
    length: int | None = None,
) -> Curriculum:
    """Return the curriculum `name` for a run of `steps` optimizer steps with texts of `length` tokens (by default the model's context).

    A model that reads the newest tokens as rows and the others as codes gets two stages more: in `narrowing` the rows' window shrinks from
    the whole text to `local_window`, or, where that is 0, their weight fades to nothing; in `codes` it stays so. One with several
    `route_beams` gets `parallel` last, and one branch before. Alone these are `stage-5` and `stage-6`.

    A plain decoder has `default` alone, also called `plain`. A model with a pool has `default` (stages 0 to 4), `route` (1 to 4, for one
    that was wrapped), `joint` (exits from the start), `fixed` (the original path for ever) and `stage-0` … `stage-4`. `knobs` replace
    values in every stage (`"noise"`), or in one (`"hand-over.noise"`); `stages` the parts of the run that stages get. Raises `ValueError`
    for names that do not exist.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: must be at least 1")
    pool = config is not None and config.pool_blocks > 0
    if stages and (not pool or name not in CURRICULA):
        rule = f"curriculum={name!r} is one stage; {', '.join(CURRICULA)} of a model with a pool have several"
        raise ValueError(f"stages.{next(iter(stages))}={next(iter(stages.values()))}: {rule}")
    if not pool:
        if name not in ("default", "plain"):
            raise ValueError(f"curriculum={name!r}: a plain decoder has only default (also called plain)")
        rows: tuple[Stage, ...] = (Stage("plain", steps=None, start=Knobs()),)
    elif name in CURRICULA:
        every, usual = _extended(*CURRICULA[name], config, length)
        parts = dict(zip((stage.name for stage in every), usual, strict=True))
        rows = _timed(every, parts | dict(_known_stages(stages or {}, parts)), steps)
    elif name == "fixed":
        rows = (replace(STAGES[0], name="fixed"),)
    elif name == f"stage-{len(STAGES)}" and config is not None and config.memory == "local+canonical":
        rows = _timed(_memory_stages(config, LEFT, length), {"narrowing": 0.6, "codes": 0.4}, steps)
    elif name == f"stage-{len(STAGES) + 1}" and config is not None and config.route_beams > 1:
        rows = (_parallel_stage(config, LEFT),)
    elif name in (known := [f"stage-{i}" for i in range(len(STAGES))]):
        rows = (STAGES[known.index(name)],)
    else:
        missing = {"stage-5": 'model.memory="local+canonical"', "stage-6": "model.route_beams above 1"}
        rule = f"needs {missing[name]}" if name in missing else f"there are {', '.join([*CURRICULA, 'fixed', *known, *missing])}"
        raise ValueError(f"curriculum={name!r}: {rule}")
    found = Curriculum(rows).with_knobs(knobs or {})
    if pool and config is not None:
        _check_fit(found, config)
    return found


def _extended(
    stages: tuple[Stage, ...], parts: tuple[float, ...], config: BrianConfig | None, length: int | None
) -> tuple[tuple[Stage, ...], tuple[float, ...]]:
    """Add the stages that a model's memory and branches ask for; before them, tokens are rows, and take one way."""
    if config is None:
        return stages, parts
    for wanted, name, before, more in (
        (config.memory == "local+canonical", "memory", {"local_window": 0.0, "local_share": 1.0}, (0.18, 0.12)),
        (config.route_beams > 1, "parallel", {"route_beams": 1}, (0.15,)),
    ):
        if wanted:
            last = stages[-1].end or stages[-1].start
            added = _memory_stages(config, last, length) if name == "memory" else (_parallel_stage(config, last),)
            stages = (*(_with(stage, before) for stage in stages), *added)
            parts = (*(part * (1 - sum(more)) for part in parts), *more)
    return stages, parts


def _with(stage: Stage, values: dict[str, Any]) -> Stage:
    return replace(stage, start=replace(stage.start, **values), end=stage.end and replace(stage.end, **values))


def _parallel_stage(config: BrianConfig, knobs: Knobs) -> Stage:
    """Return the stage in which tokens take several ways at once. In every second pass they take one, so that exits are still measured."""
    gates = (Gate("validation/route/branches", "<=", float(config.route_beams), BOUNDED), BETTER)
    return Stage("parallel", None, replace(knobs, route_beams=config.route_beams, beam_share=0.5), gates=gates)


def _memory_stages(config: BrianConfig, knobs: Knobs, length: int | None) -> tuple[Stage, ...]:
    """Return the stage in which a pool's rows make way for codes, and the one after it."""
    if config.local_window:
        whole = max(length or config.max_position_embeddings, config.local_window)  # a window as wide as the text is none
        start = replace(knobs, local_window=float(whole), local_share=1.0)
        end = replace(start, local_window=float(config.local_window))
    else:
        start = replace(knobs, local_window=0.0, local_share=1.0)
        end = replace(start, local_share=0.0)
    return Stage("narrowing", None, start, end, gates=(USED, REMEMBERED)), Stage("codes", None, end, gates=(USED,))


def _check_fit(found: Curriculum, config: BrianConfig) -> None:
    """Refuse knobs that this model cannot follow."""
    assert config.min_route_steps is not None
    lowest = config.min_route_steps / config.max_route_steps
    for stage in found.stages:
        for knobs in (stage.start, stage.end or stage.start):
            if knobs.budget is not None and knobs.budget < lowest:
                rule = f"no less than min_route_steps / max_route_steps = {lowest:g} is possible"
                raise ValueError(f"knobs.{stage.name}.budget={knobs.budget}: {rule}")
            if knobs.top_k is not None and not 1 <= knobs.top_k <= config.route_top_k:
                raise ValueError(f"knobs.{stage.name}.top_k={knobs.top_k}: must lie in 1 … model.route_top_k={config.route_top_k}")
            for name in ("local_window", "local_share"):
                if getattr(knobs, name) is not None and config.memory != "local+canonical":
                    rule = f'needs model.memory="local+canonical", this is {config.memory!r}'
                    raise ValueError(f"knobs.{stage.name}.{name}={getattr(knobs, name)}: {rule}")
            beams = config.route_beams if knobs.route_beams is None else knobs.route_beams
            config.check_branches(beams, where := f"knobs.{stage.name}.route_beams")
            if beams > 1:
                knobs.check_branches(where, beams)


def _known_stages(parts: Mapping[str, float], names: Mapping[str, float]) -> Mapping[str, float]:
    for name, part in parts.items():
        if name not in names or not 0 <= part < math.inf:
            raise ValueError(f"stages.{name}={part}: stages are {', '.join(names)}, their parts finite and not negative")
    return parts


def _timed(stages: tuple[Stage, ...], parts: dict[str, float], steps: int) -> tuple[Stage, ...]:
    """Give each stage its part of the run, leaving out those that have none; the last is open-ended."""
    kept = [stage for stage in stages if parts[stage.name] > 0]
    total = sum(parts[stage.name] for stage in kept)
    if not kept:
        raise ValueError(f"stages: every part of the curriculum is 0, so there is nothing to train; it has {', '.join(parts)}")
    if steps < len(kept):
        raise ValueError(f"steps={steps}: {len(kept)} stages need a step each")
    edges, done = [0], 0.0
    for number, stage in enumerate(kept, start=1):
        done += parts[stage.name]
        edges.append(min(max(round(steps * done / total), edges[-1] + 1), steps - len(kept) + number))
    spans = [b - a for a, b in pairwise(edges)]
    return (*(replace(stage, steps=span) for stage, span in zip(kept[:-1], spans, strict=False)), replace(kept[-1], steps=spans[-1]))
