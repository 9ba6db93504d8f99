"""One token's way through the pool, for writing one token at a time: no groups, no tensors of choices, nothing run in vain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pathlm.models.brian.memory import PoolMemory
from pathlm.models.brian.positions import IN
from pathlm.models.brian.routing import RoutePool
from pathlm.models.layers import attend

# Shapes: D width, P width of positions, M pool blocks, A = M + 1 outputs of the router, K head width, G key/value heads, S tokens attended


@dataclass(frozen=True)
class Signposts:
    """What the router and the blocks make of a position, computed once for every place in the pool."""

    from_hidden: Tensor
    """(A, D), below it the rows (n, D) of a second layer where the router has one"""
    by_place: list[list[float]]
    """What is added to the router's outputs (A,) at each place; at each step where the router knows steps, not places"""
    by_step: bool
    second: tuple[list[Tensor], Tensor] | None
    """What each place adds to the second layer's input (n,), and its output weights (A, n)"""
    adapted: list[list[Tensor]] | None
    """What each block adds to its input (D,) at each place"""


def suits(model: Any, h_BTD: Tensor, journey: Any) -> bool:
    """Whether a pass is one token that its router alone sends to one block at a time, and nobody asks how."""
    alone = h_BTD.shape[:2] == (1, 1) and not torch.is_grad_enabled() and not model.training
    asked = journey.knobs is not None or journey.trace or journey.target_BT is not None or journey.depths is not None
    config = model.config
    tabled = config.router_sees_position or not config.location_bias
    return alone and not asked and tabled and config.route_top_k == 1 and h_BTD.dtype in (torch.float32, torch.float64)


def walk(
    pool: RoutePool, blocks: list[Any], h_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, memory: PoolMemory | None,
    threshold: float,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """Send one token (1, 1, D) through the pool; return its hidden state, the position (1, 1, P) it left from, and its steps.

    The same choices as `PoolRun` makes, read off one small list per step.
    """
    config, posts = pool.config, signposts_of(pool)
    # Read once: a configuration answers slowly.
    blocks_count, groups, width, config_eps = config.pool_blocks, config.num_key_value_heads, config.hidden_size, config.rms_norm_eps
    shortest, longest, cap = config.min_route_steps, config.max_route_steps, config.max_repeats
    assert groups is not None and shortest is not None
    if memory is not None:
        memory.extend(h_BTD.new_empty(()).expand(1, groups, 1, blocks[0].width))
    place, repeats = IN, 0
    step = 0
    while step < longest:
        # The norm is one number, so it scales the few outputs instead of the whole state.
        h_D = h_BTD.view(-1)
        scale = (torch.dot(h_D, h_D).item() / width + config_eps) ** -0.5
        seen = torch.mv(posts.from_hidden, h_D)
        told = posts.by_place[step if posts.by_step else place]
        if posts.second is not None:
            inner = F.gelu(torch.add(posts.second[0][place], seen[blocks_count + 1 :], alpha=scale))
            told = [t + s for t, s in zip(told, torch.mv(posts.second[1], inner).tolist(), strict=True)]
        out = [t + scale * s for t, s in zip(told, seen.tolist(), strict=False)]
        if step >= shortest and out[blocks_count] < threshold:
            break
        scores = out[:blocks_count]
        if cap and repeats >= cap:
            scores[place - 1] = -float("inf")
        best = scores.index(max(scores))
        block = blocks[best]
        x_BTD = h_BTD if posts.adapted is None else h_BTD + posts.adapted[best][place]
        query, key, value = block.turn(block.project(x_BTD), rotary)
        if memory is not None:
            memory.write(step, key, value)
            key, value = memory.version(step, groups)
        h_BTD = block.finish(h_BTD, attend(query, key, value, mask).transpose(1, 2).flatten(2))
        repeats = repeats + 1 if place == best + 1 else 1
        place = best + 1
        step += 1
    return h_BTD, pool.position[place].to(h_BTD.dtype).view(1, 1, -1), step


def signposts_of(pool: RoutePool) -> Signposts:
    """Return the pool's signposts, made anew when a weight has changed."""
    known = pool.signposts
    if known is None or known[1] != [_version(t) for t in known[0]]:
        tensors = [*pool.parameters(), pool.load_bias]
        known = pool.signposts = (tensors, [_version(t) for t in tensors], make_signposts(pool))
    return known[2]


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written to; those made in inference mode do not count, and are not trained either."""
    return 0 if tensor.is_inference() else tensor._version


def threshold_of(pool: RoutePool, budget: float | None) -> float:
    """Return the gain below which a token leaves as a number, looked up again only when a threshold has moved."""
    key = (budget, *(_version(t) for t in (pool.exit_threshold, pool.budgets_trained, pool.budget_default)))
    if pool.known_threshold is None or pool.known_threshold[0] != key:
        pool.known_threshold = (key, float(pool.threshold(budget)))
    return pool.known_threshold[1]


@torch.no_grad()
def make_signposts(pool: RoutePool) -> Signposts:
    """Compute what positions add, in the precision of the router's weights and at least float32."""
    router: Any = pool.router
    config = pool.config
    dtype = torch.promote_types(router.from_hidden.weight.dtype, torch.float32)
    position = pool.position.to(dtype)
    seen: Any = router.from_position.weight if config.router_sees_position else router.by_step
    table = position @ seen.to(dtype).T if config.router_sees_position else seen.detach().to(dtype).clone()
    table[:, :-1] += pool.load_bias.to(dtype)
    by_step = not config.router_sees_position
    if config.location_bias:
        table[:, :-1] += config.location_bias * (position @ position[1:-1].T)
    adapted = None
    if len(pool.adapters):
        layers: Any = pool.adapters
        adapted = [list((position.to(layer.weight.dtype) @ layer.weight.T).unbind()) for layer in layers]
    weight, second = router.from_hidden.weight.to(dtype), None
    if config.router_hidden:
        width = config.hidden_size
        inner = router.hidden_in.weight.to(dtype)
        added = router.hidden_in.bias.to(dtype) + (position @ inner[:, width:].T if inner.shape[1] > width else 0.0)
        second = (list(added.expand(len(position), -1).unbind()), router.hidden_out.weight.to(dtype))
        weight = torch.cat((weight, inner[:, :width]))
    return Signposts(weight, table.tolist(), by_step, second, adapted)
