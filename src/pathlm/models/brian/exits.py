"""What staying in the pool is worth: the loss after every step of a few tokens, the regression that learns it, the thresholds it moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pathlm.models.brian.codes import is_reader
from pathlm.models.brian.pool import Records
from pathlm.models.brian.routing import BUDGETS, RoutePool
from pathlm.models.brian.table import code_mask
from pathlm.models.layers import matrix_of, rotate

# Shapes: w watched tokens, R route steps, B rows, T tokens, H heads, G key/value heads, K head width, V vocabulary

PIECE = 2**22
"""Scores of the vocabulary made at a time."""


def losses_by_step(model: Any, journey: Any, watched: Tensor, target_w: Tensor, *, expected: bool = False) -> Tensor:
    """Return the cross-entropy (R, w) of each watched token if it had left the pool after 1 … R steps, and everybody else as they did.

    `watched` are the tokens' places, `target_w` what follows them. A token that leaves earlier enters the blocks after the pool with an
    earlier state; what it sees of others there stays. With `expected` any token may follow, as probably as the model says after the last
    step: the same on average where the model is calibrated, and free of the luck of the one draw that the text is.
    """
    records, config, rotary = journey.records, model.config, journey.rotary
    mask = journey.sight.within(config.attention_window, config.attention_sinks)
    h = torch.stack([model.pool.leave(h, p) for h, p in records.watched])  # (R, w, D)
    post = list(model.blocks)[model.config.pre_blocks + model.config.pool_blocks :]
    for block, h_BTD in zip(post, journey.after_pool, strict=True):
        if is_reader(block):
            read = _read_codes_as_another(block, h, watched, model.codes, journey)
        else:
            read = _read_as_another(block, h, h_BTD, watched, mask, rotary)
        h = block.finish(h, read)
    h = model.norm(h)
    weight = matrix_of(model.lm_head)
    at_once = max(1, PIECE // (weight.shape[0] * len(h)))
    pieces = [
        _cross_entropies(some_RwD.to(weight.dtype) @ weight.T, targets, expected=expected)
        for some_RwD, targets in zip(h.split(at_once, dim=1), target_w.split(at_once), strict=True)
    ]
    return torch.cat(pieces, dim=1)


def _cross_entropies(score_RwV: Tensor, target_w: Tensor, *, expected: bool) -> Tensor:
    """Return the cross-entropy (R, w) of what is said after every step with the target, or with what is said after the last step."""
    log_share_RwV = score_RwV.float().log_softmax(-1)
    if expected:
        return -(log_share_RwV[-1:].detach().exp() * log_share_RwV).sum(-1)
    return -log_share_RwV.gather(-1, target_w.expand(len(score_RwV), -1)[..., None])[..., 0]


def _read_as_another(
    block: Any, h_RwD: Tensor, h_BTD: Tensor, watched: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor]
) -> Tensor:
    """Return what tokens in other states `h_RwD` read (R, w, H · K): earlier tokens' rows as they are, their own as it would be."""
    batch, tokens = h_BTD.shape[:2]
    heads, groups = block.heads, block.groups
    row, slot = watched // tokens, watched % tokens
    _, key, value = block.turn(block.project(h_BTD), rotary)
    own = block.project(h_RwD)  # (R, w, H + 2G, K)
    cos, sin = (table.expand(batch, -1, -1, -1).flatten(0, 1)[watched][None] for table in rotary)
    both = rotate(own[:, :, : heads + groups], cos, sin)
    query, own_key, own_value = both[:, :, :heads], both[:, :, heads:], own[:, :, heads + groups :]
    query = query.unflatten(2, (groups, -1))  # (R, w, G, H / G, K)
    before = torch.arange(tokens, device=slot.device) < slot[:, None]
    if mask is not None:
        before = before & mask.expand(batch, -1, -1, -1)[row, 0, slot]
    result = torch.empty_like(query)
    for b in row.unique().tolist():  # row by row: the rows' keys are never copied
        mine = (row == b).nonzero()[:, 0]
        q = query[:, mine] * block.width**-0.5
        others = torch.einsum("rwghk,gsk->rwghs", q, key[b]).masked_fill(~before[mine][None, :, None, None], -torch.inf)
        self_ = torch.einsum("rwghk,rwgk->rwgh", q, own_key[:, mine])[..., None]
        weight = torch.cat((others, self_), dim=-1).softmax(-1)
        read = torch.einsum("rwghs,gsk->rwghk", weight[..., :-1], value[b]) + weight[..., -1:] * own_value[:, mine, :, None]
        result[:, mine] = read.to(result.dtype)  # autocast computes in a narrower one
    return result.flatten(2)


def _read_codes_as_another(block: Any, h_RwD: Tensor, watched: Tensor, codes: Any, journey: Any) -> Tensor:
    """Return what tokens in other states `h_RwD` read of the codes (R, w, H · K): these are the same in whatever state tokens leave."""
    sight, (cos, sin) = journey.sight, journey.rotary
    rows, mask = journey.code_rows, code_mask(codes, journey.code_rows, sight)
    batch = rows.rows_B1SW.shape[0]
    row, slot = watched // sight.tokens, watched % sight.tokens
    query = block.project(h_RwD)  # (R, w, H, K)
    result = torch.empty_like(query).flatten(2)
    for b in row.unique().tolist():
        mine = (row == b).nonzero()[:, 0]
        if mask is None:
            seen = torch.arange(rows.rows_B1SW.shape[2], device=slot.device) <= slot[mine][:, None]
        else:
            seen = mask.expand(batch, -1, -1, -1)[b, 0, slot[mine]]
        turns = tuple(table.expand(batch, -1, -1, -1)[b, slot[mine]].repeat(len(query), 1, 1)[None] for table in (cos, sin))
        heard = block.heard(
            codes, query[:, mine].flatten(0, 1)[None], turns, rows.rows_B1SW[b : b + 1], seen.repeat(len(query), 1)[None, None]
        )
        result[:, mine] = heard[0].unflatten(0, (len(query), -1))
    return result


def exit_loss(
    records: Records, watched: Tensor, loss_Rw: Tensor, *, shortest: int, best: bool, price: float = 0.0, delta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the Huber loss (with `delta`) of the predicted gain, and the predictions (R - shortest, w) it was made of.

    The gain of staying after r steps is the loss after r steps minus the loss after the last one: what the remaining steps still remove.
    With `best` it is measured against the smallest loss after any later step, which may flatter it. Each step costs `price` more. Where a
    route had ended there was nothing to stay for, and nothing is learned.
    """
    predicted = predicted_gains(records, watched, shortest=shortest)
    stayed = ~predicted.isneginf()
    if not bool(stayed.any()):
        return predicted[stayed].sum(), predicted
    paid_Rw = _paid(loss_Rw, price)
    last_w = shortest - 1 + stayed.sum(0)
    later_Rw = paid_Rw.flip(0).cummin(0).values.flip(0)[shortest:] if best else paid_Rw.gather(0, last_w[None])
    gain = paid_Rw[shortest - 1 : -1] - later_Rw
    return F.huber_loss(predicted[stayed], gain[stayed].to(predicted.dtype), delta=delta), predicted


def hindsight_loss(loss_Rw: Tensor, *, shortest: int, price: float) -> Tensor:
    """Return the sum of the watched tokens' losses, each after the step that was best for it when every step costs `price`."""
    best_w = _paid(loss_Rw.detach(), price)[shortest - 1 :].argmin(0) + shortest - 1
    return loss_Rw.gather(0, best_w[None]).sum()


def idle_loss(gain_L: Tensor, price: float) -> Tensor:
    """Return the Huber loss of gains predicted for tokens without a target: the next step costs `price` and removes nothing."""
    return F.huber_loss(gain_L, torch.full_like(gain_L, -price), reduction="sum") / max(len(gain_L), 1)


def _paid(loss_Rw: Tensor, price: float) -> Tensor:
    return loss_Rw + price * torch.arange(len(loss_Rw), device=loss_Rw.device, dtype=loss_Rw.dtype)[:, None]


def predicted_gains(records: Records, watched: Tensor, *, shortest: int) -> Tensor:
    """Return what the router predicted for the watched tokens at every step at which they might have left (R - shortest, w).

    -inf at steps before which their route had ended.
    """
    rows = []
    for step in records.steps[shortest:]:
        index = torch.searchsorted(step.place_n, watched).clamp(max=len(step.place_n) - 1)
        rows.append(step.gain_n[index].masked_fill(step.place_n[index] != watched, -torch.inf))
    return torch.stack(rows) if rows else torch.zeros(0, len(watched), device=watched.device)


@torch.no_grad()
def move_thresholds(pool: RoutePool, predicted_Sw: Tensor, *, budget: float, spread: float, rate: float) -> None:
    """Move every budget's threshold towards the one that would have given these tokens the budget's mean number of steps.

    A token takes another step after r steps while the smallest gain predicted so far is at least the threshold. Over all tokens and r, the
    share of these smallest gains that lie above a threshold is the share of the free steps taken, so thresholds are their quantiles. Steps
    that routes were too short for are never taken; a budget that asks for them has the smallest gain of all as its threshold.
    """
    known = predicted_Sw.detach().float()
    known = known[~known.isneginf()]
    if not known.numel():
        return
    fewest, most = pool.steps_possible
    smallest_Sw = predicted_Sw.detach().float().cummin(0).values
    smallest_Sw = F.pad(smallest_Sw, (0, 0, 0, most - fewest - len(smallest_Sw)), value=-torch.inf).clamp(min=known.min())
    smallest = smallest_Sw.flatten().sort().values
    free_share = torch.linspace(0, 1, BUDGETS, device=smallest.device)
    wanted = torch.quantile(smallest[-(2**24) :], 1 - free_share).to(pool.exit_threshold.dtype)
    scale = known.std().clamp(min=1e-4) if known.numel() > 1 else pool.gain_scale
    fresh = pool.budgets_trained[0] > pool.budgets_trained[1]
    pool.exit_threshold.copy_(torch.where(fresh, wanted, torch.lerp(pool.exit_threshold, wanted, rate)))
    pool.gain_scale.copy_(torch.where(fresh, scale, torch.lerp(pool.gain_scale.float(), scale.float(), rate)))
    ends = torch.tensor([max(budget - spread, pool.lowest_budget), min(budget + spread, 1.0)], device=smallest.device)
    low, high = pool.budgets_trained[0].minimum(ends[0]), pool.budgets_trained[1].maximum(ends[1])
    pool.budgets_trained.copy_(torch.stack((low, high)))
    pool.budget_default.fill_(max(budget, pool.lowest_budget))
