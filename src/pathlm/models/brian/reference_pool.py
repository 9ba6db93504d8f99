"""The routed BRIAN model once more, slowly: one token, one route step and one block at a time. Only tests import it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pathlm.models.brian import reference_codes
from pathlm.models.brian.modeling import BrianForCausalLM
from pathlm.models.brian.reference import Heads, attend, count, finish, head, linear, ordinary, project, visible
from pathlm.models.brian.routing import RoutePool
from pathlm.models.layers import Block

# Shapes: T tokens, D width, P width of block positions, V vocabulary, M pool blocks, A = M + 1 actions (blocks, then OUT)


@dataclass
class Traveller:
    """One token on its way through the pool."""

    h_D: Tensor
    p_P: Tensor | None
    rotary: int
    """Its position for rotary angles."""
    route: list[tuple[int, ...]] = field(default_factory=list)
    """Blocks visited at each step, counted from 1, the better one first."""
    weights: list[list[Tensor]] = field(default_factory=list)
    """What share each visited block had."""
    probability: list[Tensor] = field(default_factory=list)
    """Of each action (A,), at each step at which the token was still in the pool."""
    gain: list[Tensor] = field(default_factory=list)
    share: Tensor | None = None
    """The router's probability of the block it visits now, among those it may visit."""
    row: tuple[Heads, Heads] | None = None
    """Its key and value in the shared table."""
    left: bool = False
    refreshed: int = 0
    """How often its row was made anew after it had left."""
    code: reference_codes.Code | None = None
    """What the pool remembers of it for all its blocks."""


@dataclass(frozen=True)
class Reading:
    """What one row of tokens came to."""

    logits_TV: Tensor
    travellers: list[Traveller]
    """The tokens as they left the pool, before `out`."""
    evaluations: int
    """How often a block worked on a token, before, in and after the pool."""

    @property
    def routes(self) -> list[list[tuple[int, ...]]]:
        """The blocks every token visited."""
        return [traveller.route for traveller in self.travellers]


def read(
    model: BrianForCausalLM,
    input_ids: list[int],
    document_ids: list[int] | None = None,
    *,
    budget: float | None = None,
    top_k: int | None = None,
    gate: float = 0.0,
    forced: bool = False,
) -> Reading:
    """Read one row by the equations.

    Args:
        model: The fast model, whose parameters are used.
        input_ids: T tokens.
        document_ids: Their documents; by default one.
        budget: The share of the route steps wished for.
        top_k: Blocks a token visits at each step; by default the configuration's word.
        gate: τ of the gradient that the router has through a chosen block; nothing of it is seen in values.
        forced: Whether every token takes the original path B1 … Bm OUT, whatever the router says.
    """
    config = model.config
    documents = document_ids or [0] * len(input_ids)
    window, local_share = (config.local_window, 1.0) if model.codes is None else model.codes.reach
    first_post = config.pre_blocks + config.pool_blocks
    hidden = ordinary(model, model.blocks[: config.pre_blocks], [model.embed_tokens.weight[token] for token in input_ids], documents)
    table = pool_of(model).position if config.block_position != "none" else None
    start = None if table is None else table[0]
    positions = count(documents)
    travellers = [Traveller(h_D, start, rotary) for h_D, rotary in zip(hidden, positions, strict=True)]
    if config.remembers_codes:
        for traveller in travellers:
            traveller.code = reference_codes.write(model, traveller.h_D, traveller.rotary)
    for step in range(config.max_route_steps):
        for traveller in travellers:
            if not traveller.left:
                _choose(model, traveller, step, budget=budget, top_k=config.route_top_k if top_k is None else top_k, forced=forced)
        moving = [None if traveller.left else traveller for traveller in travellers]
        _visit(model, moving, travellers, documents, gate=gate, window=window, share=local_share)
    hidden = [_leave(model, traveller) for traveller in travellers]
    if config.post_memory == "canonical":
        hidden = reference_codes.post(model, hidden, _codes(travellers), documents, positions)
    else:
        hidden = ordinary(model, model.blocks[first_post:], hidden, documents)
    visits = sum(len(blocks) for traveller in travellers for blocks in traveller.route)
    return Reading(head(model, hidden), travellers, visits + len(input_ids) * (config.pre_blocks + config.post_blocks))


def scores(model: BrianForCausalLM, h_D: Tensor, p_P: Tensor | None, step: int) -> tuple[Tensor, Tensor]:
    """Return the scores of the blocks (M,) and the predicted gain of staying, in nats. No gradient reaches `h_D`."""
    config, router = model.config, pool_of(model).router
    x_D = h_D.detach()
    x_D = x_D / torch.sqrt((x_D * x_D).sum() / len(x_D) + config.rms_norm_eps)
    known_P = p_P if config.block_position_to in ("router", "both") else None
    result_A = router.from_hidden.weight @ x_D
    result_A = result_A + (router.by_step[step] if known_P is None else router.from_position.weight @ known_P)
    if config.router_hidden:
        inside = linear(router.hidden_in, x_D if known_P is None else torch.cat((x_D, known_P)))
        result_A = result_A + router.hidden_out.weight @ (inside * (1 + torch.erf(inside / math.sqrt(2))) / 2)
    if p_P is None:
        return result_A[:-1], result_A[-1]
    near_M = torch.stack([p_P @ pool_of(model).position[block] for block in range(1, config.pool_blocks + 1)])
    return result_A[:-1] + config.location_bias * near_M, result_A[-1]


def legal(model: BrianForCausalLM, route: list[tuple[int, ...]]) -> list[int]:
    """Return the blocks that may come next, none where a route has ended.

    Not one that came first at each of the last `max_repeats` steps, nor one that the router's moves do not lead to: a step further at most,
    or a step at least and not so far that too few blocks are left for the steps that must be made.
    """
    config = model.config
    cap, every = config.max_repeats, list(range(1, config.pool_blocks + 1))
    here = route[-1][0] if route else 0
    if config.route_moves == "recur":
        return [block for block in every if block in (here, here + 1)]
    if config.route_moves == "skip":
        after = max((config.min_route_steps or 1) - len(route) - 1, 0)
        return [block for block in every if block > here and len(every) - block >= after]
    latest = [blocks[0] for blocks in route[-cap:]] if cap else []
    tired = latest[0] if cap and len(latest) == cap and len(set(latest)) == 1 else None
    return [block for block in every if block != tired]


def _choose(model: BrianForCausalLM, traveller: Traveller, step: int, *, budget: float | None, top_k: int, forced: bool) -> None:
    """Let one token choose its blocks, or leave."""
    score_M, gain = scores(model, traveller.h_D, traveller.p_P, step)
    score_M = score_M + pool_of(model).load_bias.to(score_M.dtype)
    allowed = legal(model, traveller.route)
    if not allowed:
        traveller.left = True
        return
    threshold = pool_of(model).threshold(budget).to(score_M.dtype)
    total = sum(score_M[block - 1].exp() for block in allowed)
    free = step >= (model.config.min_route_steps or 1)
    stays = 1 / (1 + torch.exp((threshold - gain) / pool_of(model).gain_scale)) if free else torch.ones_like(gain)
    share = [score_M[block - 1].exp() / total if block in allowed else torch.zeros_like(gain) for block in range(1, len(score_M) + 1)]
    traveller.probability.append(torch.stack([*(stays * s for s in share), 1 - stays]))
    traveller.gain.append(gain)
    if forced:
        traveller.left = step >= len(score_M)
        chosen = [step + 1]
    else:
        traveller.left = free and bool(gain < threshold)
        chosen = []
        for _ in range(top_k):
            best = None
            for block in allowed:
                if block not in chosen and (best is None or score_M[block - 1] > score_M[best - 1]):
                    best = block
            assert best is not None
            chosen.append(best)
    if traveller.left:
        return
    among = sum(score_M[block - 1].exp() for block in chosen)
    traveller.route.append(tuple(chosen))
    traveller.weights.append([score_M[block - 1].exp() / among for block in chosen])
    traveller.share = share[chosen[0] - 1]


def _visit(
    model: BrianForCausalLM, moving: list[Traveller | None], travellers: list[Traveller], documents: list[int], *, gate: float,
    window: int, share: float,
) -> None:  # fmt: skip
    """Let the tokens that chose write their rows, and only then let each of them read those of the tokens up to itself."""
    query: list[list[Heads]] = []
    inputs: list[list[Tensor]] = []
    for traveller, arrived in zip(moving, travellers, strict=True):
        query.append([])
        inputs.append([])
        if traveller is None:
            if model.config.left_rows == "refreshed":
                _refresh(model, arrived)
            continue
        rows = []
        for number in traveller.route[-1]:
            h_D = told_place(model, number, traveller.h_D, traveller.p_P)
            q, key, value = project(model, block_of(model, number), h_D, traveller.rotary)
            query[-1].append(q)
            inputs[-1].append(h_D)
            rows.append((key, value))
        traveller.row = _mix_rows(traveller.weights[-1], rows) if model.config.remembers_rows else None
    table = [traveller.row for traveller in travellers]
    for t, traveller in enumerate(moving):
        if traveller is None:
            continue
        if model.config.remembers_codes:
            seen = reference_codes.seen_from(t, documents, model, table, _codes(travellers), window=window, share=share)
            heard = [
                reference_codes.read(model, block_of(model, number), number - 1, h_D, traveller.rotary, seen)
                for number, h_D in zip(traveller.route[-1], inputs[t], strict=True)
            ]
        else:
            near = [row for s in visible(t, documents, window) if (row := table[s]) is not None]
            heard = [attend(q, near, model) for q in query[t]]
        results = [
            finish(model, block_of(model, number), h_D if model.config.block_position_to == "state" else traveller.h_D, read)
            for number, h_D, read in zip(traveller.route[-1], inputs[t], heard, strict=True)
        ]
        new_D = _mix(traveller.weights[-1], results)
        if gate and len(results) == 1:
            assert traveller.share is not None
            new_D = new_D + gate * (traveller.share - traveller.share.detach()) * (new_D - traveller.h_D).detach()
        traveller.h_D = new_D
        traveller.p_P = _mix_positions(model, traveller)


def _refresh(model: BrianForCausalLM, traveller: Traveller) -> None:
    """Give a token that has left the row that the next block in order makes of it; after the last block, the last one again."""
    traveller.refreshed += 1
    number = min(traveller.route[-1][0] + traveller.refreshed, model.config.pool_blocks)
    h_D = told_place(model, number, traveller.h_D, traveller.p_P)
    _, key, value = project(model, block_of(model, number), h_D, traveller.rotary)
    traveller.row = (key, value)


def told_place(model: BrianForCausalLM, number: int, h_D: Tensor, p_P: Tensor | None) -> Tensor:
    """Return what a block makes queries, keys and values of: a token's state, and where blocks are told, its place."""
    if p_P is None or model.config.block_position_to == "router":
        return h_D
    return h_D + matrix(pool_of(model).adapters[number - 1]) @ p_P


def _codes(travellers: list[Traveller]) -> list[reference_codes.Code]:
    return [traveller.code for traveller in travellers if traveller.code is not None]


def pool_of(model: BrianForCausalLM) -> RoutePool:
    """Return what routing adds to the blocks."""
    assert isinstance(model.pool, RoutePool)
    return model.pool


def block_of(model: BrianForCausalLM, number: int) -> Block:
    """Return a block of the pool, counted from 1."""
    block = model.blocks[model.config.pre_blocks + number - 1]
    assert isinstance(block, Block)
    return block


def _mix(weights: list[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    return sum((a * v for a, v in zip(weights, vectors, strict=True)), torch.zeros_like(vectors[0]))


def _mix_rows(weights: list[Tensor], rows: list[tuple[Heads, Heads]]) -> tuple[Heads, Heads]:
    """Return the weighted sum of key rows and of value rows, head by head."""
    keys, values = zip(*rows, strict=True)

    def mix(parts: tuple[Heads, ...]) -> Heads:
        return [_mix(weights, vectors) for vectors in zip(*parts, strict=True)]

    return mix(keys), mix(values)


def _mix_positions(model: BrianForCausalLM, traveller: Traveller) -> Tensor | None:
    if traveller.p_P is None:
        return None
    rows = [pool_of(model).position[number] for number in traveller.route[-1]]
    if len(rows) == 1:
        return rows[0]
    p_P = _mix(traveller.weights[-1], rows)
    return p_P / torch.sqrt((p_P * p_P).sum())


def matrix(layer: nn.Module) -> Tensor:
    """Return the weights of a layer that has no bias."""
    assert isinstance(layer, nn.Linear) and layer.bias is None
    return layer.weight


def _leave(model: BrianForCausalLM, traveller: Traveller) -> Tensor:
    """Return the state that goes on to the blocks after the pool."""
    out = pool_of(model).out
    return traveller.h_D if out is None or traveller.p_P is None else traveller.h_D + matrix(out) @ traveller.p_P
