"""Parallel latent passing: a token takes several ways through the pool at once, of which the best are kept in every step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pathlm.models.brian.departed import Departed, by_last_block, refreshed
from pathlm.models.brian.pool import Groups, Plan, PoolRun, StepRecord, Travellers
from pathlm.models.brian.routing import legal_scores, route_ends
from pathlm.models.brian.table import Surroundings
from pathlm.models.layers import rotate, turned

# Shapes: N tokens, b branches of each, the best first, m branches that are still moving, first all best ones, then all second ones, …;
# k actions tried by a branch, c = b · k candidates of a token, M blocks, D width, P width of positions, G key/value heads, K head width

STAYS_OUT = -1
"""The action of a branch that has left before."""


@dataclass(frozen=True)
class Branches:
    """The branches of every token."""

    h: Tensor
    """(N, b, D)"""
    p: Tensor
    """(N, b, P)"""
    score: Tensor
    """(N, b), -inf where there is no branch"""
    left: Tensor
    """(N, b), after how many steps it left, 0 while it moves"""
    at: Tensor
    """(N, b), block visited last, -1 at the start"""
    repeats: Tensor
    rows: Tensor
    """(N, b, 2G, K), the branch's own keys, then values, turned; what later tokens see of a token is the row of its best branch"""

    def of(self, parent_Nb: Tensor) -> Branches:
        """Return the branches that go on from these parents."""
        token = torch.arange(len(parent_Nb), device=parent_Nb.device)[:, None]
        fields = {name: table[token, parent_Nb] for name, table in vars(self).items()}
        return Branches(**fields)

    @property
    def moving(self) -> tuple[Tensor, Tensor]:
        """Tokens (m,) and slots (m,) of the branches still in the pool, slot by slot."""
        slot, token = ((self.left == 0) & ~self.score.isneginf()).T.nonzero(as_tuple=True)
        return token, slot


@dataclass(frozen=True)
class _Choice:
    """What was chosen in one step."""

    parent_Nb: Tensor
    visit_Nb: Tensor
    """Which of the m visits was the parent's, -1 where it had left"""
    action_Nb: Tensor
    """Block, M to leave"""
    score_mM: Tensor
    gain_m: Tensor
    at_m: Tensor
    position_mP: Tensor


class BeamRun(PoolRun):
    """One pass of N tokens through a pool with up to `beams` branches each. With one it takes the greedy routes."""

    def __init__(self, pool: Any, blocks: list[Any], surroundings: Surroundings, plan: Plan, *, beams: int) -> None:
        super().__init__(pool, blocks, surroundings, plan)
        self.beams, self.expansion = beams, min(pool.config.beam_expansion, beams)
        self.choices: list[_Choice] = []

    def run(self, h_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden states (B, T, D) and the positions (B, T, P) with which tokens leave, merged over their branches."""
        config = self.pool.config
        self.open(h_BTD)
        count = h_BTD.shape[0] * h_BTD.shape[1]
        h = h_BTD.flatten(0, 1)[:, None]
        zero = torch.zeros(count, 1, dtype=torch.long, device=h.device)
        rows = h.new_zeros(count, 1, 2 * self.blocks[0].groups, self.blocks[0].width)
        scores = torch.zeros(count, 1, dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
        state = Branches(h, self.pool.starting_position(count, h.dtype)[:, None], scores, zero, zero - 1, zero, rows)
        self.records.visits_N = torch.zeros_like(zero[:, 0])
        for step in range(config.max_route_steps):
            ends_Nb = (state.left == 0) & route_ends(config.route_moves, state.at, blocks=len(self.blocks))
            state = replace(state, left=state.left.masked_fill(ends_Nb, step))
            token, slot = state.moving
            if not len(token):
                self._settle(state, step)
                break
            state, action_Nb = self._branch(state, token, slot, step)
            state = self._visit_all(state, action_Nb, step)
        last = torch.where(state.left > 0, state.left, config.max_route_steps)
        state = replace(state, left=last)
        if self.plan.record:
            self._record()
        self.records.left_N = last[:, 0]
        self.records.branches = int((~state.score.isneginf()).sum())
        if config.beam_merge == "winner":
            h, p = state.h[:, 0], state.p[:, 0]
        else:
            weight_Nb1 = state.score.softmax(-1)[..., None].to(h.dtype)
            h, p = (weight_Nb1 * state.h).sum(1), (weight_Nb1 * state.p).sum(1)
        return h.view_as(h_BTD), p.unflatten(0, h_BTD.shape[:2])

    def _branch(self, state: Branches, token: Tensor, slot: Tensor, step: int) -> tuple[Branches, Tensor]:
        """Let every branch try its best actions, and keep the best of each token's. Returns them and what they chose (N, b)."""
        config, blocks = self.pool.config, len(self.blocks)
        score_mM, gain_m = self.pool.scores(state.h[token, slot], state.p[token, slot], step, listen=self.plan.listen)
        owed = config.min_route_steps - step - 1
        score_mM = legal_scores(score_mM, config, state.at[token, slot], state.repeats[token, slot], owed=owed)
        gained_mk, action_mk = self._options(score_mM, gain_m, token, step)
        total_mk = config.beam_decay * state.score[token, slot][:, None] + gained_mk
        gone = state.left > 0
        value_Nbk = torch.full((*state.score.shape, self.expansion), -torch.inf, dtype=state.score.dtype, device=state.score.device)
        value_Nbk[..., 0] = torch.where(gone, state.score, -torch.inf)
        value_Nbk = value_Nbk.index_put((token, slot), total_mk)
        action_Nbk = torch.full(value_Nbk.shape, STAYS_OUT, device=token.device).index_put((token, slot), action_mk)
        value_Nc, action_Nc = value_Nbk.flatten(1), action_Nbk.flatten(1)
        everyone = torch.zeros(len(value_Nc), dtype=torch.bool, device=token.device)
        if config.beam_exit == "first":
            everyone = action_Nc.gather(1, value_Nc.argmax(-1, keepdim=True))[:, 0] == blocks
            value_Nc = value_Nc.masked_fill(action_Nc == blocks, -torch.inf)
        value_Nc, order = value_Nc.sort(dim=-1, descending=True, stable=True)
        value_Nb, order = value_Nc[:, : self.beams], order[:, : self.beams]
        if config.beam_margin:
            value_Nb = value_Nb.masked_fill(value_Nb < value_Nb[:, :1] - config.beam_margin, -torch.inf)
        action_Nb = action_Nc.gather(1, order).masked_fill(value_Nb.isneginf(), STAYS_OUT)
        if config.beam_exit == "any":
            everyone = (action_Nb == blocks).any(-1)
        # A token that leaves with all its branches keeps them as they were.
        parent_Nb = torch.where(everyone[:, None], self._same(order), order // self.expansion)
        known = parent_Nb < state.score.shape[1]
        parent_Nb = parent_Nb.clamp(max=state.score.shape[1] - 1)
        next_ = state.of(parent_Nb)
        kept = torch.where(everyone[:, None], next_.score.masked_fill(~known, -torch.inf), value_Nb)
        action_Nb = torch.where(everyone[:, None], torch.where(next_.left > 0, STAYS_OUT, blocks), action_Nb)
        visit_Nb = torch.full(state.score.shape, -1, device=token.device).index_put(
            (token, slot), torch.arange(len(token), device=token.device)
        )
        token_N = torch.arange(len(parent_Nb), device=token.device)[:, None]
        self.choices.append(
            _Choice(
                parent_Nb, visit_Nb[token_N, parent_Nb], action_Nb, score_mM, gain_m, state.at[token, slot], state.p.detach()[token, slot]
            )
        )
        left = torch.where((action_Nb == blocks) & ~kept.isneginf(), step, next_.left)
        return replace(next_, score=kept, left=left), action_Nb

    def _options(self, score_mM: Tensor, gain_m: Tensor, token: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return what the k best actions of each branch add to its score (m, k), and which these are, the greedy route's first.

        A block adds log p(stay) and how far its score is below the best block's, so that staying competes with leaving as in the greedy
        route, however many blocks there are to stay with; leaving adds log p(OUT).
        """
        config, blocks = self.pool.config, len(self.blocks)
        threshold = self.plan.threshold if self.plan.threshold.ndim == 0 else self.plan.threshold[token]
        # No gradient: what staying is worth is measured. Taught by the text's loss, it would rise until nobody leaves.
        over_m = (gain_m.detach() - threshold) / self.pool.gain_scale.to(gain_m.dtype)
        free_m = torch.full_like(token, step >= config.min_route_steps, dtype=torch.bool)
        if self.plan.stays_N is not None:
            free_m = free_m & ~self.plan.stays_N[token]
        stay_m = torch.where(free_m, F.logsigmoid(over_m), 0.0)
        # In the order of scores, ties to the lowest number; leaving comes after all blocks.
        ranked_mM, block_mM = score_mM.sort(dim=-1, descending=True, stable=True)
        block_gain = stay_m[:, None] + ranked_mM - ranked_mM[:, :1] - config.beam_cost
        out_m = torch.where(free_m, F.logsigmoid(-over_m), -torch.inf)
        gained = torch.cat((block_gain, out_m[:, None]), dim=-1)
        action = torch.cat((block_mM, torch.full_like(token, blocks)[:, None]), dim=-1)
        leaves_m = free_m & (over_m < 0)
        rank = gained.detach().clone()
        rank[:, 0].masked_fill_(~leaves_m, torch.inf)
        rank[:, -1].masked_fill_(leaves_m, torch.inf)
        best = rank.sort(dim=-1, descending=True, stable=True).indices[:, : self.expansion]
        gained, action = gained.gather(1, best), action.gather(1, best)
        short = self.expansion - gained.shape[1]
        return (F.pad(gained, (0, short), value=-torch.inf), F.pad(action, (0, short))) if short > 0 else (gained, action)

    def _visit_all(self, state: Branches, action_Nb: Tensor, step: int) -> Branches:
        """Run the chosen blocks on all moving branches: all write their rows, then each reads the best branches' and its own."""
        token, slot = state.moving
        at, repeats = state.at, state.repeats
        block_m = action_Nb[token, slot]
        self.records.evaluations += len(token)
        assert self.records.visits_N is not None
        self.records.visits_N += torch.bincount(token, minlength=len(state.h))
        places = self._same(action_Nb)[0]
        rows = state.rows
        if len(token):
            groups = Groups.of(block_m[:, None], len(self.blocks))
            moving = Travellers(state.h[token, slot], state.p[token, slot], at[token, slot], repeats[token, slot], token)
            qkv, asked, h_in = self._project(groups, moving)
            rotary = self._rotary_at(token)
            heads, kv = self.blocks[0].heads, self.blocks[0].groups
            if kv:
                query, key, value = (x[0].transpose(0, 1) for x in turned(qkv[0][None], rotary, heads))  # (m, heads, K)
                rows = rows.index_put((token, slot), torch.cat((key, value), dim=1))
            if asked is not None:
                query = self._questions(asked[:, None], rotary, [query[None]] if kv else None)[0][0]
        state = replace(state, rows=self._refreshed_rows(replace(state, rows=rows), step))
        self._share(state, step)
        if not len(token):
            return state
        read = [self._read_own(query, state, token, slot, int(number)) for number in places if (slot == number).any()]
        h_m = self._finish(groups, moving, h_in, [torch.cat(read)], None)
        repeats_m = torch.where(block_m == at[token, slot], repeats[token, slot] + 1, 1)
        where = (token, slot)
        return replace(
            state,
            h=state.h.index_put(where, h_m),
            p=state.p.index_put(where, self.pool.position[1 + block_m].to(h_m.dtype)),
            at=at.index_put(where, block_m),
            repeats=repeats.index_put(where, repeats_m),
        )

    def _read_own(self, query: Tensor, state: Branches, token: Tensor, slot: Tensor, number: int) -> Tensor:
        """Return what the branches in one slot read (n, H · X): the table, in which a token's own row is this branch's."""
        mine, table = slot == number, self.table
        query_n, place = query[mine], token[mine]
        keys, values = table.now()
        if number == 0 or not self.blocks[0].groups:
            return table.read_some(query_n, keys, values, place)
        key, value = state.rows[place, number].tensor_split(2, dim=1)
        return table.read_with_own(query_n, keys, values, place, key, value)

    def _share(self, state: Branches, step: int) -> None:
        """Let other tokens see the rows of every token's best branch."""
        if not self.blocks[0].groups:
            return
        both = state.rows[:, 0].unflatten(0, (self.rows, self.tokens)).transpose(1, 2)
        self.table.rewrite(step, *both.tensor_split(2, dim=1))

    def _refreshed_rows(self, state: Branches, step: int) -> Tensor:
        """Return the branches' rows, those of branches that have left made anew where it is so."""
        token, slot = (state.left > 0).nonzero(as_tuple=True)
        if self.pool.config.left_rows == "kept" or not len(token):
            return state.rows
        gone: list[Departed] = []
        index = torch.arange(len(token), device=token.device)
        steps = state.left[token, slot]
        for number in steps.unique().tolist():
            which = index[steps == number]
            some = Departed(which, state.h[token[which], slot[which]], state.p[token[which], slot[which]], number)
            gone += by_last_block(some, state.at[token[which], slot[which]])
        which, kv = refreshed(self.pool, self.blocks, gone, step)
        key, value = kv.tensor_split(2, dim=1)
        key = rotate(key[None], *self._rotary_at(token[which]))[0]
        return state.rows.index_put((token[which], slot[which]), torch.cat((key, value), dim=1))

    def _settle(self, state: Branches, step: int) -> None:
        """Write the rows of the steps that nobody takes: later tokens may take them."""
        if self.around.memory is None or self.pool.config.left_rows == "kept":
            return
        for later in range(step, self.pool.config.max_route_steps):
            self._share(replace(state, rows=self._refreshed_rows(state, later)), later)

    def _record(self) -> None:
        """Record the steps of the branches that came out best, from the last step back to the first."""
        slot_N = torch.zeros(self.rows * self.tokens, dtype=torch.long, device=self.choices[-1].parent_Nb.device)
        token_N = torch.arange(len(slot_N), device=slot_N.device)
        steps = []
        for it in reversed(self.choices):
            visit_N, action_N = it.visit_Nb[token_N, slot_N], it.action_Nb[token_N, slot_N]
            place_n = (visit_N >= 0).nonzero()[:, 0]
            visit_n, action_n = visit_N[place_n], action_N[place_n]
            leaves_n = action_n == len(self.blocks)
            block_nk = torch.where(leaves_n, it.score_mM[visit_n].argmax(-1), action_n)[:, None]
            steps.append(
                StepRecord(place_n, it.score_mM[visit_n], it.gain_m[visit_n], leaves_n, block_nk, it.at_m[visit_n], it.position_mP[visit_n])
            )
            slot_N = it.parent_Nb[token_N, slot_N]
        self.records.steps = steps[::-1]

    def _same(self, table_Nb: Tensor) -> Tensor:
        return torch.arange(table_Nb.shape[1], device=table_Nb.device).expand_as(table_Nb)
