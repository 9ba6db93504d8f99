"""From knobs to a plan: which tokens follow the router, which a teacher, who may leave and who stays to be measured."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.brian.curriculum import Knobs
from pathlm.models.brian.pool import Plan
from pathlm.models.brian.routing import RoutePool

# Shapes: B rows, T tokens, N = B · T, M pool blocks, R route steps, V vocabulary

EASY, STRAIGHT, HARD = range(3)
MOST_SEEN = 2.0**20
"""Largest count in the table of losses by token: float32 adds single losses to sums of more than about 2²⁴ badly, or not at all."""
TAUGHT = ("imitation", "balance", "selected_balance", "coverage", "cost", "location", "diversity", "exit", "exit_boundary", "z")
"""Losses beside that of the text."""
_KNOWN = {field.name for field in fields(Knobs)}
assert set(TAUGHT) <= _KNOWN


def steer(
    pool: RoutePool, knobs: Knobs | None, *, shape: tuple[int, int], input_ids: Tensor | None, target_N: Tensor | None,
    budget: float | None, training: bool, record: bool, depths: Tensor | None = None,
) -> Plan:  # fmt: skip
    """Return the plan for a pass of B rows of T tokens.

    Without knobs the router drives every token and may let it leave. In training, shares of tokens and rows are drawn; in evaluation any
    share above 0 means all, so that nothing is left to chance. `target_N` are the labels of the next tokens, where there are any. `depths`
    (B, T) say after how many steps tokens leave, all but those that are measured.
    """
    knobs = knobs or Knobs()
    config, device = pool.config, pool.exit_threshold.device
    rows, tokens = shape
    # A teacher names one block, and the original path of a model that visits two must still be the original model.
    top_k = min(config.route_top_k, knobs.top_k or config.route_top_k) if knobs.router_share > 0 else 1
    guided = knobs.router_share > 0 or record
    depth_N = None if depths is None else depths.to(device).flatten()
    threshold = pool.threshold(budget if budget is not None else (None if training else knobs.budget))
    if not training:
        driven = knobs.router_share > 0
        stays = None if knobs.exit_share > 0 or depth_N is not None else torch.ones(rows * tokens, dtype=torch.bool, device=device)
        teacher = None if driven else teacher_routes(pool, knobs, shape, input_ids, training=False)
        driven_N = None if driven else torch.zeros(rows * tokens, dtype=torch.bool, device=device)
        return Plan(threshold, top_k, guided, teacher_NR=teacher, driven_N=driven_N, stays_N=stays, depth_N=depth_N, record=record)
    teacher = driven_N = watched = None
    if knobs.router_share < 1:
        teacher = teacher_routes(pool, knobs, shape, input_ids, training=True)
        driven_N = torch.rand(rows * tokens, device=device) < knobs.router_share
    stays_N = None
    if knobs.exit_share < 1 and depth_N is None:
        stays_N = (torch.rand(rows, 1, device=device) >= knobs.exit_share).expand(rows, tokens).flatten()
    if knobs.budget is not None:
        drawn = knobs.budget + knobs.budget_spread * (2 * torch.rand(rows, 1, device=device) - 1)
        threshold = pool.threshold(drawn.clamp(pool.lowest_budget, 1.0)).expand(rows, tokens).flatten()
        untrained = pool.budgets_trained[0] > pool.budgets_trained[1]
        threshold = torch.where(untrained, 0.0, threshold)
    if knobs.probe_share and target_N is not None:
        probe_N = (torch.rand(rows * tokens, device=device) < knobs.probe_share) & (target_N >= 0)
        watched = probe_N.nonzero()[:, 0]
        stays_N = probe_N if stays_N is None else stays_N | probe_N
        driven_N = None if driven_N is None else driven_N | probe_N
    if knobs.random_depth and depth_N is None:
        longest, shortest = config.max_route_steps, pool.config.min_route_steps
        assert shortest is not None
        depth_N = torch.randint(shortest, longest + 1, (rows * tokens,), device=device)
        depth_N[torch.rand(rows * tokens, device=device) >= knobs.random_depth] = longest + 1
    if depth_N is not None:  # it is no word on tokens that follow a teacher or stay to be measured
        for others_N in (None if driven_N is None else ~driven_N, stays_N):
            depth_N = depth_N if others_N is None else depth_N.masked_fill(others_N, config.max_route_steps + 1)
    return Plan(
        threshold, top_k, guided, teacher_NR=teacher, driven_N=driven_N, stays_N=stays_N, depth_N=depth_N, noise=knobs.noise,
        random_share=knobs.random_share, gate=knobs.gate if guided else 0.0, other_share=knobs.other_share, watched=watched,
        attached=knobs.hindsight, listen=knobs.listen, record=record,
    )  # fmt: skip


def teacher_routes(pool: RoutePool, knobs: Knobs, shape: tuple[int, int], input_ids: Tensor | None, *, training: bool) -> Tensor:
    """Return the block that the teacher names for every token and step (N, R), M to leave.

    The teacher's route is the original path. In a share `pseudo` of the rows, all of them in evaluation, easy tokens skip blocks and leave
    early and hard ones visit blocks twice. How hard a token is says the mean loss after it, in thirds of all tokens read.
    """
    rows, tokens = shape
    table = pseudo_routes(pool.config).to(pool.exit_threshold.device)
    if not knobs.pseudo or input_ids is None:
        return table[STRAIGHT].expand(rows * tokens, -1)
    kind_BT = difficulty_class(pool)[input_ids]
    if training and knobs.pseudo < 1:
        kind_BT = torch.where(torch.rand(rows, 1, device=table.device) < knobs.pseudo, kind_BT, STRAIGHT)
    return table[kind_BT.flatten()]


def pseudo_routes(config: BrianConfig) -> Tensor:
    """Return the routes (3, R) of easy, ordinary and hard tokens: every second block; every block; every block after the first twice.

    Where a router may not skip, easy tokens visit the first half of the blocks; where it may only skip, hard ones visit every block once.
    """
    blocks, steps, shortest, moves = config.pool_blocks, config.max_route_steps, config.min_route_steps, config.route_moves
    assert shortest is not None
    straight = list(range(blocks))
    easy = list(range(0, blocks, 2))
    if moves == "recur":
        easy = straight[: len(easy)]
    elif moves == "skip":
        easy = sorted([*easy, *range(1, blocks, 2)][: max(len(easy), shortest)])
    else:
        easy += straight[len(easy) : shortest]
    twice = [0] + [block for block in range(1, blocks) for _ in range(2)]
    hard = straight if config.max_repeats == 1 or moves == "skip" else twice
    routes = [(route + [blocks] * steps)[:steps] for route in (easy, straight, hard)]
    for route in routes:  # a token stays for the smallest number of steps, in the last block of its route or the one before
        for step in range(shortest):
            if route[step] == blocks:
                back = moves == "any" and (config.max_repeats or step % 2)
                route[step] = (route[step - 1] + 1) % blocks if back else route[step - 1]
    return torch.tensor(routes)


def difficulty_class(pool: RoutePool) -> Tensor:
    """Return for every token of the vocabulary (V,) whether what follows it is easy, ordinary or hard, each a third of what was read."""
    mean_V = pool.difficulty_sum / pool.difficulty_count.clamp(min=1e-6)
    order = mean_V.argsort()
    below = pool.difficulty_count[order].cumsum(0)
    share = (below - pool.difficulty_count[order] / 2) / below[-1].clamp(min=1e-6)
    kind = torch.empty_like(order)
    kind[order] = (share * 3).long().clamp(0, HARD)
    return torch.where(pool.difficulty_count > 0, kind, STRAIGHT)


@torch.no_grad()
def note_difficulty(pool: RoutePool, input_ids: Tensor, target_BT: Tensor, loss_N: Tensor, *, rate: float) -> None:
    """Let the table of mean losses by token forget a share `rate` and learn this batch.

    A table that has seen too much for its precision is scaled down as a whole: means and shares stay, the past counts less from then on.
    """
    scale = (1 - rate) * (MOST_SEEN / pool.difficulty_count.max().clamp(min=MOST_SEEN))
    counted_N = target_BT.flatten() >= 0
    ids = input_ids.flatten()[counted_N]
    for table, values in ((pool.difficulty_sum, loss_N[counted_N]), (pool.difficulty_count, torch.ones_like(loss_N[counted_N]))):
        table.mul_(scale).index_add_(0, ids, values.to(table.dtype))
