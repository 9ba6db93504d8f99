"""What the router is taught beside the text, and what is measured of the routes; both over all tokens that are not padding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pathlm.models.brian.curriculum import Knobs
from pathlm.models.brian.pool import Plan, Records
from pathlm.models.brian.routing import GAIN_SCALE, RoutePool

# Shapes: L decisions of all tokens in all steps, M pool blocks, R route steps, N tokens


@dataclass(frozen=True)
class Decisions:
    """Every decision of a pass, one row each."""

    place_L: Tensor
    step_L: Tensor
    score_LM: Tensor
    gain_L: Tensor
    leaves_L: Tensor
    block_L: Tensor
    second_L: Tensor | None
    at_L: Tensor
    position_LP: Tensor
    threshold_L: Tensor

    @classmethod
    def of(cls, records: Records, plan: Plan, present_N: Tensor) -> Decisions:
        """Join the steps' records, without padding."""
        steps = records.steps
        place = torch.cat([s.place_n for s in steps])
        kept = present_N[place].nonzero()[:, 0]
        whole = bool(len(kept) == len(place))

        def joined(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts) if whole else torch.cat(parts)[kept]

        place = place if whole else place[kept]
        blocks = joined([s.block_nk for s in steps])
        threshold = plan.threshold if plan.threshold.ndim else plan.threshold.expand(len(present_N))
        return cls(
            place_L=place,
            step_L=joined([torch.full_like(s.place_n, r) for r, s in enumerate(steps)]),
            score_LM=joined([s.score_nM for s in steps]),
            gain_L=joined([s.gain_n for s in steps]),
            leaves_L=joined([s.leaves_n for s in steps]),
            block_L=blocks[:, 0],
            second_L=blocks[:, 1] if blocks.shape[1] > 1 else None,
            at_L=joined([s.at_n for s in steps]),
            position_LP=joined([s.position_nP for s in steps]),
            threshold_L=threshold[place].to(steps[0].gain_n.dtype),
        )


def taught(pool: RoutePool, found: Decisions, plan: Plan, knobs: Knobs) -> dict[str, Tensor]:
    """Return the losses of the router whose weight is not 0, each a mean over decisions or tokens."""
    losses: dict[str, Tensor] = {}
    blocks, shortest = pool.config.pool_blocks, pool.config.min_route_steps
    assert shortest is not None
    stay_L = (~found.leaves_L).to(found.score_LM.dtype)
    share_LM = found.score_LM.softmax(-1)
    staying = stay_L.sum().clamp(min=1)
    mean_M = (share_LM * stay_L[:, None]).sum(0) / staying
    scale = pool.gain_scale.clone()  # moved before the gradients are computed
    out_L = torch.sigmoid((found.threshold_L - found.gain_L) / scale) * (found.step_L >= shortest)
    if knobs.imitation:
        losses["imitation"] = imitation(found, plan, blocks, shortest)[0]
    if knobs.balance:
        losses["balance"] = math.log(blocks) + _plogp(mean_M).sum()
    if knobs.selected_balance:
        losses["selected_balance"] = blocks * (load(found, blocks) * mean_M).sum() - 1
    if knobs.coverage:
        losses["coverage"] = F.relu(1 - 2 * blocks * mean_M).mean()
    if knobs.cost:
        losses["cost"] = (1 - out_L).sum() / (found.step_L == 0).sum().clamp(min=1) / pool.config.max_route_steps
    if knobs.location:
        nearness_LM = found.position_LP.to(share_LM.dtype) @ pool.position[1:-1].T.to(share_LM.dtype)
        losses["location"] = ((share_LM * (1 - nearness_LM)).sum(-1) * stay_L).sum() / staying
    if knobs.diversity:
        joint = torch.zeros(blocks + 1, blocks, dtype=share_LM.dtype, device=share_LM.device)
        joint = joint.index_add(0, found.at_L + 1, share_LM * stay_L[:, None]) / staying
        losses["diversity"] = 1 + _plogp(joint).sum() / math.log(joint.numel())
    if knobs.exit_boundary:
        early_L = (found.step_L < knobs.exit_min_step) & (found.step_L >= shortest)
        losses["exit_boundary"] = (out_L * early_L).sum() / early_L.sum().clamp(min=1)
    if knobs.z:
        losses["z"] = found.score_LM.logsumexp(-1).square().mean()
    return losses


def imitation(found: Decisions, plan: Plan, blocks: int, shortest: int) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy with the teacher, and the share of decisions that agree, over tokens that follow the teacher.

    Staying and the block are one decision: the first is right when the gain has the right sign, the second when its score is the highest.
    """
    if plan.teacher_NR is None:
        return found.gain_L.sum() * 0.0, found.gain_L.new_full((), torch.nan)  # nothing to agree with
    wanted_L = plan.teacher_NR[found.place_L, found.step_L]
    follows_L = torch.ones_like(found.leaves_L) if plan.driven_N is None else ~plan.driven_N[found.place_L]
    ends_L, free_L = wanted_L == blocks, found.step_L >= shortest
    count = follows_L.sum().clamp(min=1)
    block_L = F.cross_entropy(found.score_LM, wanted_L.clamp(max=blocks - 1), reduction="none")
    block_L = torch.where(ends_L | ~follows_L, 0.0, block_L)  # infinite where a route of its own has made the teacher's block illegal
    exit_L = F.binary_cross_entropy_with_logits(-found.gain_L / GAIN_SCALE, ends_L.to(found.gain_L.dtype), reduction="none") * free_L
    out_L = (found.gain_L < 0) & free_L
    right_L = (out_L == ends_L) & (ends_L | (found.score_LM.argmax(-1) == wanted_L))
    return ((block_L + exit_L) * follows_L).sum() / count, (right_L & follows_L).sum() / count


def load(found: Decisions, blocks: int) -> Tensor:
    """Return the share of visits that each block gets (M,)."""
    stays = ~found.leaves_L
    visits = found.block_L[stays] if found.second_L is None else torch.cat((found.block_L[stays], found.second_L[stays]))
    counts = torch.bincount(visits, minlength=blocks).to(found.score_LM.dtype)
    return counts / counts.sum().clamp(min=1)


@torch.no_grad()
def move_load_bias(pool: RoutePool, found: Decisions, *, rate: float) -> None:
    """Raise the bias of blocks visited less than evenly, lower the others'; even means by the decisions in which they were legal."""
    stays = ~found.leaves_L
    legal_M = (~found.score_LM[stays].isneginf()).to(torch.float32).mean(0)
    even_M = legal_M / legal_M.sum().clamp(min=1e-6)
    pool.load_bias.add_(rate * (even_M - load(found, len(even_M))).sign().to(pool.load_bias.dtype))


@torch.no_grad()
def measured(pool: RoutePool, found: Decisions, records: Records, plan: Plan, *, present_N: Tensor, budget: Tensor) -> dict[str, Tensor]:
    """Return the metrics of the routes, by name."""
    config, blocks = pool.config, pool.config.pool_blocks
    longest, shortest = config.max_route_steps, config.min_route_steps
    assert records.left_N is not None and shortest is not None
    steps_N = records.left_N[present_N].float()
    stays_L = ~found.leaves_L
    share_LM = found.score_LM.softmax(-1)
    load_M = load(found, blocks)
    moved_L = (found.block_L - found.at_L)[stays_L & (found.at_L >= 0)]
    moves = max(len(moved_L), 1)
    free_L = found.step_L >= shortest
    out_L = torch.sigmoid((found.threshold_L - found.gain_L) / pool.gain_scale)
    ahead_LM = found.score_LM.topk(min(2, blocks), dim=-1).values
    margin_L = ahead_LM[:, 0] - ahead_LM[:, -1]
    margin_L = margin_L[margin_L.isfinite()]  # where there was a choice
    zero = steps_N.new_zeros(())
    metrics = {
        "route/imitation": imitation(found, plan, blocks, shortest)[1],
        "route/entropy": -torch.special.xlogy(share_LM, share_LM).sum(-1)[stays_L].mean() if bool(stays_L.any()) else zero,
        "route/load_entropy": -torch.special.xlogy(load_M, load_M).sum() / math.log(blocks) if blocks > 1 else zero + 1,
        "route/load_min": load_M.min() * blocks,
        "route/steps_mean": steps_N.mean(),
        "route/steps_median": steps_N.median(),
        "route/steps_max": steps_N.max(),
        "route/steps_error": (steps_N.mean() / longest - budget).abs(),
        "route/advance": (moved_L == 1).sum() / moves,
        "route/recur": (moved_L == 0).sum() / moves,
        "route/skip": (moved_L > 1).sum() / moves,
        "route/location_distance": _distance(pool, found, stays_L),
        "route/exit_probability": out_L[free_L].mean() if bool(free_L.any()) else zero,
        "route/margin": margin_L.median() if len(margin_L) else zero,
        "route/path_diversity": _path_diversity(found, longest, blocks),
    }
    left = torch.bincount(records.left_N[present_N], minlength=longest + 1).float() / max(len(steps_N), 1)
    metrics |= {f"route/left_after_{r}": left[r] for r in range(shortest, longest + 1)}
    metrics["route/leave_first"] = left[shortest] if longest > shortest else zero
    return {name: value.detach().float() for name, value in metrics.items()}


@torch.no_grad()
def difficulty_correlation(pool: RoutePool, records: Records, input_ids: Tensor, present_N: Tensor) -> Tensor:
    """Return Pearson's correlation of a token's steps with the mean loss after tokens like it; 0 where either does not vary."""
    assert records.left_N is not None
    table = pool.difficulty_sum / pool.difficulty_count.clamp(min=1e-6)
    known = present_N & (pool.difficulty_count[input_ids.flatten()] > 0)
    x, y = records.left_N[known].float(), table[input_ids.flatten()[known]].float()
    if len(x) < 2:
        return torch.zeros((), device=table.device)
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return torch.where(scale > 0, (x * y).sum() / scale.clamp(min=1e-12), 0.0)


def _plogp(share: Tensor) -> Tensor:
    """Return p · log p, whose slope at 0 is infinite and here merely large: a block that was never legal has no share."""
    return share * share.clamp(min=1e-12).log()


def _distance(pool: RoutePool, found: Decisions, stays_L: Tensor) -> Tensor:
    """Return how far a visit is from where the token was: 1 minus the similarity of the two positions, on average."""
    if not pool.position.shape[1] or not bool(stays_L.any()):
        return torch.zeros((), device=pool.position.device)
    to = pool.position[1 + found.block_L[stays_L]]
    return 1 - (found.position_LP[stays_L].to(to.dtype) * to).sum(-1).mean()


def _path_diversity(found: Decisions, longest: int, blocks: int) -> Tensor:
    """Return the exponential of the entropy of whole paths: as many equally frequent paths would be as diverse."""
    code = torch.zeros(int(found.place_L.max()) + 1 if len(found.place_L) else 1, dtype=torch.double, device=found.place_L.device)
    stays = ~found.leaves_L
    # A number per path: digits are blocks. Doubles hold it exactly for all but the longest paths, whose ends then count less.
    digit = (found.block_L[stays] + 1).double() * (blocks + 1.0) ** -found.step_L[stays].double()
    code.index_add_(0, found.place_L[stays], digit)
    _, counts = code[found.place_L[found.step_L == 0]].unique(return_counts=True)
    share = counts.double() / counts.sum().clamp(min=1)
    return (-torch.special.xlogy(share, share).sum()).exp()
