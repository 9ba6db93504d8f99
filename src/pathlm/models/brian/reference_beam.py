"""Parallel latent passing once more, slowly: one token, one branch and one action at a time. Only tests import it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pathlm.models.brian import reference_codes
from pathlm.models.brian.modeling import BrianForCausalLM
from pathlm.models.brian.reference import Heads, attend, count, finish, head, ordinary, project, visible
from pathlm.models.brian.reference_pool import block_of, legal, matrix, pool_of, scores, told_place

# Shapes: D width, P width of block positions, V vocabulary

OUT = 0


@dataclass
class Branch:
    """One of the ways that a token takes at once."""

    h_D: Tensor
    p_P: Tensor | None
    score: Tensor
    route: list[tuple[int, ...]] = field(default_factory=list)
    row: tuple[Heads, Heads] | None = None
    left: bool = False
    refreshed: int = 0

    def twin(self, **changes: object) -> Branch:
        """Return a branch that goes on from here by itself."""
        return replace(self, route=list(self.route), **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class BeamReading:
    """What one row of tokens came to."""

    logits_TV: Tensor
    branches: list[list[Branch]]
    """Of each token, the best first"""
    visits: int


def read(model: BrianForCausalLM, input_ids: list[int], documents: list[int], *, beams: int, budget: float | None = None) -> BeamReading:
    """Read one row with up to `beams` branches for each token."""
    config, visits = model.config, 0
    hidden = ordinary(model, model.blocks[: config.pre_blocks], [model.embed_tokens.weight[token] for token in input_ids], documents)
    start = None if config.block_position == "none" else pool_of(model).position[0]
    tokens = [[Branch(h_D, start, h_D.new_zeros(()))] for h_D in hidden]
    positions = count(documents)
    codes = [reference_codes.write(model, h_D, at) for h_D, at in zip(hidden, positions, strict=True)] if config.remembers_codes else []
    for step in range(config.max_route_steps):
        for t, branches in enumerate(tokens):
            for branch in branches:
                branch.left = branch.left or not legal(model, branch.route)
            if not all(branch.left for branch in branches):
                tokens[t] = _chosen(model, branches, step, beams=beams, budget=budget)
        visits += sum(not branch.left for branches in tokens for branch in branches)
        _visit(model, tokens, documents, positions, codes)
    hidden = [_merged(model, branches) for branches in tokens]
    if config.post_memory == "canonical":
        hidden = reference_codes.post(model, hidden, codes, documents, positions)
    else:
        hidden = ordinary(model, model.blocks[config.pre_blocks + config.pool_blocks :], hidden, documents)
    return BeamReading(head(model, hidden), tokens, visits)


def _chosen(model: BrianForCausalLM, branches: list[Branch], step: int, *, beams: int, budget: float | None) -> list[Branch]:
    """Return a token's best branches after each of those before has chosen; what they visit now stands last in their routes."""
    config = model.config
    found: list[tuple[Tensor, Branch, int | None]] = []
    for parent in branches:
        if parent.left:
            found.append((parent.score, parent, None))
            continue
        options = _options(model, parent, step, budget)[: min(config.beam_expansion, beams)]
        found += [(config.beam_decay * parent.score + gained, parent, action) for gained, action in options]
    best = max(found, key=lambda one: one[0].item())
    if config.beam_exit == "first":
        if best[2] == OUT:
            return [parent.twin(left=True) for parent in branches]
        found = [one for one in found if one[2] != OUT]
    found.sort(key=lambda one: -one[0].item())
    found = found[:beams]
    if config.beam_margin:
        found = [one for one in found if one[0] >= found[0][0] - config.beam_margin]
    if config.beam_exit == "any" and any(action == OUT for _, _, action in found):
        return [parent.twin(left=True) for parent in branches]
    kept = []
    for score, parent, action in found:
        branch = parent.twin(score=score)
        if action == OUT:
            branch.left = True
        elif action is not None:
            branch.route.append((action,))
        kept.append(branch)
    return kept


def _options(model: BrianForCausalLM, branch: Branch, step: int, budget: float | None) -> list[tuple[Tensor, int]]:
    """Return what each action adds to a branch's score, first what the greedy route does, then the best first."""
    pool, config = pool_of(model), model.config
    score_M, gain = scores(model, branch.h_D, branch.p_P, step)
    score_M = score_M + pool.load_bias.to(score_M.dtype)
    allowed = legal(model, branch.route)
    highest = max(score_M[block - 1] for block in allowed)
    over = (gain.detach() - pool.threshold(budget).to(gain.dtype)) / pool.gain_scale
    free = step >= (config.min_route_steps or 1)
    stay = -torch.log1p(torch.exp(-over)) if free else torch.zeros_like(gain)
    blocks = [(stay + score_M[block - 1] - highest - config.beam_cost, block) for block in allowed]
    blocks.sort(key=lambda one: -one[0].item())
    if not free:
        return blocks
    out = (-torch.log1p(torch.exp(over)), OUT)
    if over < 0:
        return [out, *blocks]
    rest = [*blocks[1:], out]
    rest.sort(key=lambda one: -one[0].item())
    return [blocks[0], *rest]


def _visit(
    model: BrianForCausalLM, tokens: list[list[Branch]], documents: list[int], positions: list[int], codes: list[reference_codes.Code]
) -> None:
    """Let all branches write their rows, and only then read those of the best branches of earlier tokens, and their own."""
    config = model.config
    inputs: dict[int, tuple[Tensor, Heads]] = {}
    for branches, at in zip(tokens, positions, strict=True):
        for branch in branches:
            number = branch.route[-1][0]
            if branch.left and config.left_rows == "refreshed":
                branch.refreshed += 1
                number = min(number + branch.refreshed, config.pool_blocks)
            elif branch.left:
                continue
            h_D = told_place(model, number, branch.h_D, branch.p_P)
            query, key, value = project(model, block_of(model, number), h_D, at)
            inputs[id(branch)] = (h_D, query)
            branch.row = (key, value) if config.remembers_rows else None
    shared = [branches[0].row for branches in tokens]
    window, share = (config.local_window, 1.0) if model.codes is None else model.codes.reach
    for t, branches in enumerate(tokens):
        for branch in branches:
            if branch.left:
                continue
            number = branch.route[-1][0]
            block, (h_D, query) = block_of(model, number), inputs[id(branch)]
            mine = [*shared[:t], branch.row, *shared[t + 1 :]]
            if config.remembers_codes:
                seen = reference_codes.seen_from(t, documents, model, mine, codes, window=window, share=share)
                heard = reference_codes.read(model, block, number - 1, h_D, positions[t], seen)
            else:
                heard = attend(query, [row for s in visible(t, documents, window) if (row := mine[s]) is not None], model)
            branch.h_D = finish(model, block, h_D if config.block_position_to == "state" else branch.h_D, heard)
            branch.p_P = None if branch.p_P is None else pool_of(model).position[number]


def _merged(model: BrianForCausalLM, branches: list[Branch]) -> Tensor:
    """Return the state that goes on: of the best branch, or of all, weighted by the softmax of their scores."""
    out, left = pool_of(model).out, []
    for branch in branches:
        left.append(branch.h_D if out is None or branch.p_P is None else branch.h_D + matrix(out) @ branch.p_P)
    if model.config.beam_merge == "winner":
        return left[0]
    weights = [branch.score.exp() for branch in branches]
    total = sum(weights, torch.zeros_like(weights[0]))
    return sum((weight / total * h_D for weight, h_D in zip(weights, left, strict=True)), torch.zeros_like(left[0]))
