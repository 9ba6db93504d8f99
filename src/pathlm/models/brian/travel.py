"""A batch's way through the pool, and what is learned and measured on it: the seam between the model and its pool."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from pathlm.models.brian import exits, losses
from pathlm.models.brian.beam import BeamRun
from pathlm.models.brian.codes import CodeRows
from pathlm.models.brian.curriculum import Knobs
from pathlm.models.brian.entering import begin
from pathlm.models.brian.memory import CodeMemory, PoolMemory
from pathlm.models.brian.pool import Plan, PoolRun, Records
from pathlm.models.brian.reads import Reads
from pathlm.models.brian.sight import Sight
from pathlm.models.brian.steering import TAUGHT, note_difficulty, steer
from pathlm.models.brian.table import Surroundings
from pathlm.models.brian.walk import suits, walk
from pathlm.models.losses import IGNORE

# Shapes: B rows, T tokens, N = B · T, D width, S tokens attended, w watched tokens


ROWS_ONLY = (0, 1.0)
"""How far rows reach where no code is read: over every token, with their whole weight."""


@dataclass
class Journey:
    """What one forward pass asks of the pool, and what came of it."""

    knobs: Knobs | None
    budget: float | None
    input_ids: Tensor | None
    target_BT: Tensor | None
    segment_BS: Tensor | None
    trace: bool
    depths: Tensor | None = None
    """Route steps of every token (B, T), where these are not the router's choice"""
    beams: int | None = None
    """Branches a token may have at once, where that is not the model's own number"""
    records: Records = field(default_factory=Records)
    plan: Plan | None = None
    entered: Tensor | None = None
    """Hidden states (B, T, D) that entered the pool"""
    after_pool: list[Tensor] = field(default_factory=list)
    """Hidden states (B, T, D) that entered each block after the pool"""
    sight: Sight | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    code_rows: CodeRows | None = None
    keep: int = 0
    """How many last tokens the caller asks for; 0 is all. The others need not pass the pool where nothing later reads what they do there"""
    reads: Reads | None = None
    """Where it is asked for, what was read of codes"""

    @property
    def seen(self) -> tuple[Sight, tuple[Tensor, Tensor]]:
        """What tokens may look at, and the cosines and sines of their places."""
        assert self.sight is not None
        assert self.rotary is not None
        return self.sight, self.rotary

    @property
    def threshold(self) -> Tensor:
        """The gain below which tokens left, () or (N,)."""
        assert self.plan is not None
        return self.plan.threshold

    def without_leaving(self) -> Journey:
        """Return the same journey, not begun, of tokens that the router lets leave only in the end; nothing is taught or measured on it."""
        knobs = replace(self.knobs or Knobs(), exit_share=0.0, random_depth=0.0, probe_share=0.0, budget=None, route_beams=1)
        found = Journey(knobs, None, self.input_ids, None, self.segment_BS, False, None, None, Records())
        found.sight, found.rotary = self.sight, self.rotary
        return found

    def judged_now(self, target_N: Tensor) -> Tensor:
        """Return the targets without those of tokens that are judged in hindsight."""
        if self.plan is None or not self.plan.attached or self.plan.watched is None:
            return target_N
        return target_N.index_fill(0, self.plan.watched, IGNORE)

    def lessons(self, model: Any, loss_N: Tensor, count: Tensor | int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of what the router is taught, and the metrics; in training also move biases, thresholds and tables.

        `count` is what the summed loss of the text is divided by.
        """
        pool, knobs, plan = model.pool, self.knobs or Knobs(), self.plan
        assert plan is not None and self.target_BT is not None
        batch, tokens = self.target_BT.shape
        present_N = torch.ones_like(loss_N, dtype=torch.bool)
        if self.segment_BS is not None:
            present_N = (self.segment_BS[:, -tokens:] >= 0).expand(batch, -1).flatten()
        ordinary = model.config.pre_blocks + model.config.post_blocks
        metrics: dict[str, Tensor] = {"route/block_evaluations": loss_N.new_tensor(ordinary + self.records.evaluations / len(loss_N))}
        total = loss_N.new_zeros(())
        if self.reads is not None:
            metrics |= self.reads.metrics()
        if self.records.branches is not None:
            metrics["route/branches"] = loss_N.new_tensor(self.records.branches / len(loss_N))
        if plan.other_share:
            metrics["route/other_evaluations"] = loss_N.new_tensor(self.records.other_evaluations / len(loss_N))
        if self.records.steps:
            found = losses.Decisions.of(self.records, plan, present_N)
            wished = knobs.budget if self.budget is None else self.budget
            budget = pool.budget_default if wished is None else loss_N.new_tensor(wished)
            for name, value in losses.taught(pool, found, plan, knobs).items():
                total = total + getattr(knobs, name) * value
                metrics[f"loss/{name}"] = value.detach().float()
            metrics |= losses.measured(pool, found, self.records, plan, present_N=present_N, budget=budget)
            if self.input_ids is not None:
                correlation = losses.difficulty_correlation(pool, self.records, self.input_ids, present_N)
                metrics["route/difficulty_correlation"] = correlation
            if model.training and knobs.load_bias_rate:
                losses.move_load_bias(pool, found, rate=knobs.load_bias_rate)
            if model.training and knobs.idle:
                idle_L = (self.target_BT.flatten()[found.place_L] < 0) & (found.step_L >= model.config.min_route_steps)
                idle = exits.idle_loss(found.gain_L[idle_L], knobs.price)
                total = total + knobs.idle * idle
                metrics["loss/idle"] = idle.detach().float()
        if plan.watched is not None:
            value, predicted, hindsight = self._gain(model, plan.watched, knobs)
            total = total + knobs.exit * value + hindsight / count
            metrics["loss/exit"] = value.detach().float()
            if knobs.budget is not None:
                exits.move_thresholds(pool, predicted, budget=knobs.budget, spread=knobs.budget_spread, rate=knobs.threshold_rate)
        if model.training and knobs.difficulty_rate and self.input_ids is not None:
            note_difficulty(
                pool, self.input_ids, self.judged_now(self.target_BT.flatten()).view_as(self.target_BT), loss_N, rate=knobs.difficulty_rate
            )
        return total + _touch(model), metrics

    def _gain(self, model: Any, watched: Tensor, knobs: Knobs) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of the predicted gains of the watched tokens, the predictions, and the tokens' summed loss in hindsight."""
        assert self.target_BT is not None and self.rotary is not None
        if not len(watched):
            zero = self.target_BT.new_zeros((), dtype=torch.float32)
            return zero, torch.zeros(0, 0, device=watched.device), zero
        target_w = self.target_BT.flatten()[watched]
        shortest = model.config.min_route_steps
        with torch.set_grad_enabled(knobs.hindsight and torch.is_grad_enabled()):
            loss_Rw = exits.losses_by_step(model, self, watched, target_w, expected=knobs.expected_gain)
        hindsight = exits.hindsight_loss(loss_Rw, shortest=shortest, price=knobs.price) if knobs.hindsight else loss_Rw.new_zeros(())
        lesson = exits.exit_loss(
            self.records, watched, loss_Rw.detach(), shortest=shortest, best=knobs.best_gain, price=knobs.price, delta=knobs.gain_delta
        )
        return *lesson, hindsight


def travel(
    model: Any,
    h_BTD: Tensor,
    journey: Journey,
    rotary: tuple[Tensor, Tensor],
    memory: Cache | None,
    *,
    recompute: bool,
) -> Tensor:
    """Send the tokens through the pool and return their hidden states (B, T, D); the journey keeps what happened."""
    pool, knobs = model.pool, journey.knobs
    rows, code_memory = _layers(model.config, memory)
    reads_codes = _remember(model, h_BTD, journey, rotary, code_memory)
    if journey.keep and model.config.memory == model.config.post_memory == "canonical":
        h_BTD, rotary = _last(journey, h_BTD, rotary)
    sight = journey.sight
    assert sight is not None
    beams = _beams(model, journey)
    if not model.training and (h_BTD.shape[1] > 1 or not sight.past):
        # A text begins or goes on: versions do not tell of weights that were written through `.data`.
        pool.signposts = None
        if model.codes is not None:
            model.codes.asks = None
    window = model.config.local_window if model.codes is None else 0
    codes = model.codes if reads_codes else None
    around = Surroundings(rotary, sight, rows, codes, journey.code_rows, journey.reads, window, recompute)
    if beams == 1 and (memory is not None or not reads_codes) and suits(model, h_BTD, journey):
        h_BTD, journey.records.evaluations = walk(pool, model.pool_blocks, h_BTD, around, journey.budget)
        return h_BTD
    if beams > 1 and knobs is not None:
        knobs = replace(knobs, probe_share=0.0)  # what a branch gains is not measured
    learns = journey.target_BT is not None and (model.training or knobs is None or knobs.router_share > 0 or knobs.imitation > 0)
    journey.plan = steer(
        pool, knobs, shape=(h_BTD.shape[0], h_BTD.shape[1]), input_ids=journey.input_ids,
        target_N=None if journey.target_BT is None else journey.target_BT.flatten(), budget=journey.budget, training=model.training,
        depths=journey.depths, record=journey.trace or (learns and _routed(knobs)),
    )  # fmt: skip
    run = PoolRun(pool, model.pool_blocks, around, journey.plan)
    if beams > 1:
        run = BeamRun(pool, model.pool_blocks, around, journey.plan, beams=beams)
    h_BTD, p_BTP = run.run(h_BTD)
    journey.records = run.records
    return pool.leave(h_BTD, p_BTP)


def _beams(model: Any, journey: Journey) -> int:
    """Return how many branches tokens may have: what the call says, else the knobs, else the configuration."""
    found: int = model.config.route_beams
    if journey.knobs is not None and journey.knobs.route_beams is not None:
        found = journey.knobs.route_beams
        if model.training and found > 1 and journey.knobs.beam_share < 1 and torch.rand(()) >= journey.knobs.beam_share:
            found = 1
    return found if journey.beams is None else journey.beams


def _layers(config: Any, memory: Cache | None) -> tuple[PoolMemory | None, CodeMemory | None]:
    """Return the parts of a memory that hold the pool's rows and its codes."""
    if memory is None:
        return None, None
    kinds = [PoolMemory] * config.remembers_rows + [CodeMemory] * config.remembers_codes
    found = memory.layers[config.pre_blocks : config.pre_blocks + len(kinds)]
    if len(found) < len(kinds) or not all(isinstance(layer, kind) for layer, kind in zip(found, kinds, strict=True)):
        raise ValueError(f"past_key_values is a {type(memory).__name__}: a model with a pool needs the cache that it returns itself")
    rows = next((layer for layer in found if isinstance(layer, PoolMemory)), None)
    return rows, next((layer for layer in found if isinstance(layer, CodeMemory)), None)


def _remember(model: Any, h_BTD: Tensor, journey: Journey, rotary: tuple[Tensor, Tensor], memory: CodeMemory | None) -> bool:
    """Write the codes of the tokens that enter the pool, if anybody reads codes, and return whether blocks of the pool do."""
    codes = model.codes
    if codes is None:
        return False
    if model.training and journey.knobs is not None:
        unread = _rows_alone(codes.reach, h_BTD.shape[1]) and model.config.post_memory == "own"
        codes.set_reach(journey.knobs.local_window, journey.knobs.local_share)
        if unread and not _rows_alone(codes.reach, h_BTD.shape[1]):
            begin(model)
    # What is remembered may be read once the text has outgrown the window.
    in_pool = codes.reach != ROWS_ONLY if memory is not None else not _rows_alone(codes.reach, h_BTD.shape[1])
    if in_pool or model.config.post_memory == "canonical":
        rows = codes.write(h_BTD, rotary)
        journey.code_rows = CodeRows(rows) if memory is None else CodeRows(memory.add(rows), memory.slots(0))
    return in_pool


def _rows_alone(reach: tuple[int, float], tokens: int) -> bool:
    """Whether a text of so many tokens is read as rows alone."""
    window, share = reach
    return share == 1 and (not window or window >= tokens)


def _last(journey: Journey, h_BTD: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Let only the last tokens go on, now that all have left their codes: nothing else of the others is read from here on."""
    assert journey.sight is not None
    journey.sight, (cos, sin) = journey.sight.last(journey.keep), rotary
    journey.rotary = cos[:, -journey.keep :], sin[:, -journey.keep :]
    return h_BTD[:, -journey.keep :], journey.rotary


def _routed(knobs: Knobs | None) -> bool:
    """Whether the router drives or is taught; otherwise it need not run."""
    return knobs is None or knobs.router_share > 0 or any(getattr(knobs, name) for name in TAUGHT)


def _touch(model: Any) -> Tensor:
    """Return 0, made of every parameter of the pool where several processes train: they exchange the gradients of all, visited or not."""
    pool = torch.distributed.is_available() and torch.distributed.is_initialized() and model.training
    if not pool:
        return torch.zeros((), device=model.pool.load_bias.device)
    first, last = model.config.pre_blocks, model.config.pre_blocks + model.config.pool_blocks
    owners = [*model.blocks[first:last], model.pool, *([] if model.codes is None else [model.codes])]
    return torch.stack([parameter.sum() * 0.0 for owner in owners for parameter in owner.parameters()]).sum()
