"""The pool at work: in every route step the tokens that are still in it choose a block, and each block runs on the tokens that chose it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pathlm.models.brian.departed import Departed, by_last_block, refreshed
from pathlm.models.brian.grouping import Arrange, Pick, UnitGate
from pathlm.models.brian.routing import best_blocks, legal_scores, route_ends
from pathlm.models.brian.table import Surroundings, Table
from pathlm.models.layers import rotate, turned

# Shapes: B rows, T tokens, N = B · T, n tokens still in the pool in the order of their places, k blocks each visits in one step,
# e = k · n visits grouped by block, M blocks, R route steps, H heads, G key/value heads, K head width, S tokens attended, Q queries per row


@dataclass(frozen=True)
class Plan:
    """What decides about routes in one forward pass. The defaults are those of a trained model at work."""

    threshold: Tensor
    """Gain below which a token leaves; () or (N,)"""
    top_k: int = 1
    guided: bool = True
    """Whether the router runs at all. Without it the teacher decides for every token."""
    teacher_NR: Tensor | None = None
    """The teacher's block in every step, M to leave"""
    driven_N: Tensor | None = None
    """Tokens that the router drives; the others follow the teacher. None: all"""
    stays_N: Tensor | None = None
    """Tokens that the router cannot let leave before the last step, or before their route ends"""
    depth_N: Tensor | None = None
    """Steps after which tokens leave whatever the router says; more than there are for those it decides about"""
    noise: float = 0.0
    random_share: float = 0.0
    gate: float = 0.0
    other_share: float = 0.0
    watched: Tensor | None = None
    """Places (w,) of tokens whose state is kept after every step; they must stay in the pool to the end of their routes"""
    attached: bool = False
    """Whether these states are kept with their graph"""
    record: bool = False
    listen: float = 0.0


@dataclass
class StepRecord:
    """What happened in one route step, for the n tokens that were in the pool."""

    place_n: Tensor
    score_nM: Tensor
    """Biases included, -inf for blocks that were not legal"""
    gain_n: Tensor
    leaves_n: Tensor
    block_nk: Tensor
    """Blocks chosen, also for those that leave"""
    at_n: Tensor
    """Block visited last, -1 at the start"""
    position_nP: Tensor


@dataclass
class Records:
    """What happened in the pool in one forward pass."""

    steps: list[StepRecord] = field(default_factory=list)
    left_N: Tensor | None = None
    """Steps that each token took"""
    evaluations: int = 0
    """Blocks run, summed over tokens"""
    other_evaluations: int = 0
    """Blocks run only for the router's gradient"""
    visits_N: Tensor | None = None
    """Blocks of the pool run for each token, where it could have several branches"""
    branches: int | None = None
    """Branches with which tokens left, summed over tokens, where they could have several"""
    watched: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Hidden states (w, D) and positions (w, P) of the watched tokens after each step, detached unless the plan says otherwise; after the
    end of a route they stay as they were"""


@dataclass
class Travellers:
    """The tokens still in the pool. `place_n` is None while these are all N tokens."""

    h: Tensor
    p: Tensor
    at: Tensor
    repeats: Tensor
    place: Tensor | None

    def kept(self, stay_n: Tensor) -> Travellers:
        """Return those at the indices `stay_n`."""
        place = stay_n if self.place is None else self.place[stay_n]
        return Travellers(Pick.apply(self.h, stay_n), self.p[stay_n], self.at[stay_n], self.repeats[stay_n], place)


class PoolRun:
    """One pass of N tokens through a pool. `pool` is the model's `RoutePool`, `blocks` the pool's blocks."""

    def __init__(self, pool: Any, blocks: list[Any], surroundings: Surroundings, plan: Plan) -> None:
        self.pool, self.blocks, self.around, self.plan = pool, blocks, surroundings, plan
        self.records = Records()
        self._left: list[Departed] = []

    def run(self, h_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens' hidden states (B, T, D) and the positions (B, T, P) from which they left."""
        config, count = self.pool.config, h_BTD.shape[0] * h_BTD.shape[1]
        self.open(h_BTD)
        start = torch.full((count,), -1, device=h_BTD.device)
        state = Travellers(h_BTD.flatten(0, 1), self.pool.starting_position(count, h_BTD.dtype), start, torch.zeros_like(start), None)
        for step in range(config.max_route_steps):
            stay = self._decide(state, step)
            if stay is None:
                self._refresh_all_from(step)
                break
            state, block_nk, score_nM = stay
            state = self._visit(state, block_nk, score_nM, step)
            if self.plan.watched is not None:
                self._watch(state, self.plan.watched)
        else:
            self._leave(state, config.max_route_steps)
        return self._gathered(h_BTD)

    def open(self, h_BTD: Tensor) -> None:
        """Make room for what tokens in these states remember."""
        self.rows, self.tokens = h_BTD.shape[:2]
        self.table = Table(self.around, h_BTD, groups=self.blocks[0].groups, width=self.blocks[0].width)

    def _watch(self, state: Travellers, watched_w: Tensor) -> None:
        """Keep the states of the watched tokens."""
        h, p = state.h if self.plan.attached else state.h.detach(), state.p.detach()
        if state.place is None:
            self.records.watched.append((h[watched_w], p[watched_w]))
            return
        index = torch.searchsorted(state.place, watched_w).clamp(max=len(state.place) - 1)
        here_w1 = (state.place[index] == watched_w)[:, None]
        h_w, p_w = (torch.where(here_w1, now[index], then) for now, then in zip((h, p), self.records.watched[-1], strict=True))
        self.records.watched.append((h_w, p_w))

    def _owed(self, state: Travellers, step: int) -> int | Tensor:
        """Return how many visits tokens must make after this step's: (n,) where some have a number of steps to take."""
        fewest: int = self.pool.config.min_route_steps
        if self.plan.depth_N is None:
            return fewest - step - 1
        depth_n = _at(self.plan.depth_N, state.place)
        return torch.where(depth_n <= self.pool.config.max_route_steps, depth_n, fewest) - step - 1

    def _decide(self, state: Travellers, step: int) -> tuple[Travellers, Tensor, Tensor] | None:
        """Let every token choose; those that leave are put aside. Returns the others with their blocks, None where nobody is left."""
        plan, config = self.plan, self.pool.config
        ends_n = route_ends(config.route_moves, state.at, blocks=len(self.blocks))
        if ends_n is not False and bool(ends_n.any()):  # they leave as all do after the last step: there is nothing to choose
            self._leave(state.kept(ends_n.nonzero()[:, 0]), step)
            state = state.kept((~ends_n).nonzero()[:, 0])
            if not len(state.h):
                return None
        if plan.guided:
            score_nM, gain_n = self.pool.scores(state.h, state.p, step, listen=plan.listen)
            score_nM = legal_scores(score_nM, config, state.at, state.repeats, owed=self._owed(state, step))
            block_nk = best_blocks(_explored(score_nM.detach(), plan), plan.top_k)
            leaves_n = self._wants_to_leave(gain_n.detach(), state, step)
        else:
            assert plan.teacher_NR is not None
            score_nM = gain_n = torch.empty(0)
            block_nk = torch.empty(0)
            leaves_n = torch.empty(0)
        if plan.teacher_NR is not None:
            taught_n = _at(plan.teacher_NR[:, step], state.place)
            driven_n = None if not plan.guided else _at(plan.driven_N, state.place)
            ends_n, taught_nk = taught_n == len(self.blocks), taught_n.clamp(max=len(self.blocks) - 1)[:, None]
            if driven_n is None:
                leaves_n, block_nk = ends_n, taught_nk
            else:
                leaves_n = torch.where(driven_n, leaves_n, ends_n)
                others_nk = torch.where(block_nk[:, 1:] == taught_nk, block_nk[:, :1], block_nk[:, 1:])
                block_nk = torch.where(driven_n[:, None], block_nk, torch.cat((taught_nk, others_nk), dim=1))
        if plan.record and plan.guided:
            place_n = torch.arange(len(state.h), device=state.h.device) if state.place is None else state.place
            self.records.steps.append(StepRecord(place_n, score_nM, gain_n, leaves_n, block_nk, state.at, state.p.detach()))
        if step and bool(leaves_n.any()):
            going = leaves_n.nonzero()[:, 0]
            stay = (~leaves_n).nonzero()[:, 0]
            self._leave(state.kept(going), step)
            if not len(stay):
                return None
            state, block_nk = state.kept(stay), block_nk[stay]
            score_nM = score_nM[stay] if plan.guided else score_nM
        return state, block_nk, score_nM

    def _wants_to_leave(self, gain_n: Tensor, state: Travellers, step: int) -> Tensor:
        if step < self.pool.config.min_route_steps:
            return torch.zeros_like(gain_n, dtype=torch.bool)
        threshold = self.plan.threshold if self.plan.threshold.ndim == 0 else _at(self.plan.threshold, state.place)
        leaves_n = gain_n < threshold
        if self.plan.depth_N is not None:
            depth_n = _at(self.plan.depth_N, state.place)
            leaves_n = torch.where(depth_n <= self.pool.config.max_route_steps, depth_n <= step, leaves_n)
        return leaves_n if self.plan.stays_N is None else leaves_n & ~_at(self.plan.stays_N, state.place)

    def _visit(self, state: Travellers, block_nk: Tensor, score_nM: Tensor, step: int) -> Travellers:
        """Run the chosen blocks: all write their rows into the table, then all read it."""
        n, k = block_nk.shape
        self.records.evaluations += n * k
        weight_nk = score_nM.gather(-1, block_nk).softmax(-1) if k > 1 else None
        groups = Groups.of(block_nk, len(self.blocks))
        qkv, asked, h_in = self._project(groups, state)
        read = self._read(step, qkv, asked, state.place, weight_nk)
        h = self._finish(groups, state, h_in, read, weight_nk)
        if self.plan.gate and k == 1 and torch.is_grad_enabled():
            probability_n = score_nM.softmax(-1).gather(-1, block_nk)[:, 0]
            h = UnitGate.apply(h, state.h, probability_n, self.plan.gate)
            h = self._tried(h, state, block_nk, score_nM) if self.plan.other_share else h
        first_n = block_nk[:, 0]
        repeats = torch.where(first_n == state.at, state.repeats + 1, 1)
        p = self.pool.position[1 + block_nk].to(h.dtype)
        if weight_nk is None:
            p = p[:, 0]
        else:
            p = (p * weight_nk[..., None].to(h.dtype)).sum(1)
            p = p / torch.linalg.vector_norm(p, dim=-1, keepdim=True)
        return Travellers(h, p, first_n, repeats, state.place)

    def _read(self, step: int, qkv: Tensor, asked: Tensor | None, place: Tensor | None, weight_nk: Tensor | None) -> list[Tensor]:
        """Let the visits (k, n, H + 2G, K) write their rows, and return what each of the k then reads (n, H · X)."""
        table, heads, kv_heads = self.table, self.blocks[0].heads, self.blocks[0].groups
        query, kv = qkv[..., :heads, :], qkv[..., heads:, :]  # (k, n, heads, K)
        queries: list[Tensor] = []
        if weight_nk is not None:
            # Copies of parts: what the backward pass keeps is then no longer than it needs.
            kv = (kv.contiguous() * weight_nk.T[..., None, None].to(kv.dtype)).sum(0, keepdim=True)
        if place is not None:
            rotary = self._rotary_at(place)
            if kv_heads:
                turned_kn = [turned(torch.cat((q, kv[0]), dim=1)[None], rotary, heads) for q in query]
                self._rewrite_some(step, turned_kn[0][1], turned_kn[0][2], place)
                queries = [q[0].transpose(0, 1) for q, _, _ in turned_kn]
            if asked is not None:
                queries = self._questions(asked[:, None], rotary, [q[None] for q in queries] if kv_heads else None)
                queries = [q[0] for q in queries]
            keys, values = table.now()
            return [table.read_some(q, keys, values, place) for q in queries]
        shape = (self.rows, self.tokens)
        if kv_heads:
            first = qkv[0] if weight_nk is None else torch.cat((query[0], kv[0]), dim=1)
            q, key, value = turned(first.unflatten(0, shape), self.around.rotary, heads)
            if weight_nk is not None:
                value = value.clone(memory_format=torch.contiguous_format)
            table.rewrite(step, key, value)
            queries = [q] + [
                turned(torch.cat((other, kv[0]), dim=1).unflatten(0, shape), self.around.rotary, heads)[0].clone() for other in query[1:]
            ]
        if asked is not None:
            row_queries = [q.transpose(1, 2) for q in queries] if kv_heads else None
            queries = [q.transpose(1, 2) for q in self._questions(asked.unflatten(1, shape), self.around.rotary, row_queries)]
        keys, values = table.now()
        return [table.read(q, keys, values) for q in queries]

    def _questions(self, asked_kBTHX: Tensor, rotary: tuple[Tensor, Tensor], row_queries: list[Tensor] | None) -> list[Tensor]:
        """Return what each of k visits looks for (B, T, H, W): codes, and rows where it has queries for them (B, T, H, K)."""
        codes = self.table.codes
        assert codes is not None
        return [codes.question(asked, rotary, None if row_queries is None else row_queries[i]) for i, asked in enumerate(asked_kBTHX)]

    def _tried(self, h: Tensor, state: Travellers, block_nk: Tensor, score_nM: Tensor) -> Tensor:
        """Run another legal block for a few tokens, for its probability's gradient only: `h` (n, D) comes back with the same values."""
        other_nM = (~score_nM.isneginf()).to(h.dtype).scatter(1, block_nk, 0.0)
        drawn_n = (torch.rand(len(h), device=h.device) < self.plan.other_share) & (other_nM.sum(-1) > 0)
        tried = drawn_n.nonzero()[:, 0]
        if not len(tried):
            return h
        block = torch.multinomial(other_nM[tried], 1)
        place = tried if state.place is None else state.place[tried]
        with torch.no_grad():
            some = Travellers(state.h[tried], state.p[tried], state.at[tried], state.repeats[tried], place)
            groups = Groups.of(block, len(self.blocks))
            qkv, asked, h_in = self._project(groups, some)
            rotary, query = self._rotary_at(place), None
            if self.blocks[0].groups:
                query = rotate(qkv[:, :, : self.blocks[0].heads], *rotary)
            if asked is not None:
                query = self._questions(asked[:, None], rotary, None if query is None else [query])[0]
            assert query is not None
            read = self.table.read_some(query[0], *self.table.now(), place)
            found = self._finish(groups, some, h_in, [read], None)
        self.records.other_evaluations += len(tried)
        probability = score_nM[tried].softmax(-1).gather(-1, block)
        slope = self.plan.gate * (probability - probability.detach())
        return h.index_add(0, tried, slope.to(h.dtype) * (found - some.h))

    def _project(self, groups: Groups, state: Travellers) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Return queries, keys and values of every visit (k, n, H + 2G, K), what it asks codes for, and each group's hidden states.

        What is asked is (k, n, H, W); None where no codes are read. The hidden states are those that blocks add to.
        """
        h_in = groups.split(state.h)
        p_in = groups.split(state.p) if len(self.pool.adapters) else [None] * len(h_in)
        parts, asked, x_in = [], [], []
        for block, h, p in zip(groups.blocks, h_in, p_in, strict=True):
            x = h if p is None else h + self.pool.adapters[block](p)
            x_in.append(x)
            part = self._call(self.blocks[block].project_frugally if groups.copies > 1 else self.blocks[block].project, x)
            parts.append(part)
            if self.table.codes is not None:
                asked.append(self.table.codes.ask(block, part[:, : self.blocks[block].heads]))
        stays = self.pool.config.block_position_to == "state"
        return groups.joined(parts), groups.joined(asked) if asked else None, x_in if stays else h_in

    def _finish(self, groups: Groups, state: Travellers, h_in: list[Tensor], read: list[Tensor], weight_nk: Tensor | None) -> Tensor:
        """Return the next hidden states (n, D)."""
        read_in = groups.split(torch.cat(read), copied=True)
        heard = [self.table.heard(block, part) for block, part in zip(groups.blocks, read_in, strict=True)]
        halves = [self.blocks[b].finish_frugally if groups.copies > 1 else self.blocks[b].finish for b in groups.blocks]
        parts = [self._call(half, h, r) for half, h, r in zip(halves, h_in, heard, strict=True)]
        h_knD = groups.joined(parts)
        return h_knD[0] if weight_nk is None else (h_knD * weight_nk.T[..., None].to(h_knD.dtype)).sum(0)

    def _call(self, half: Any, *inputs: Tensor) -> Tensor:
        return checkpoint(half, *inputs, use_reentrant=False) if self.around.recompute else half(*inputs)

    def _rewrite_some(self, step: int, key: Tensor, value: Tensor, place: Tensor) -> None:
        """Rewrite the rows (1, G, n, K) of the tokens at `place`, and where it is so, of those that have left."""
        key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)  # (n, G, K)
        if self.pool.config.left_rows == "refreshed":
            left, kv = self._refreshed(step)
            old = kv.tensor_split(2, dim=1)
            place, key, value = torch.cat((place, left)), torch.cat((key, old[0])), torch.cat((value, old[1]))
        self.table.rewrite_some(step, key, value, place)

    def _rotary_at(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (1, n, 1, K) of the tokens at `place`."""
        cos, sin = self.around.rotary
        index = place % self.tokens if cos.shape[0] == 1 else place
        return cos.flatten(0, 1)[index][None], sin.flatten(0, 1)[index][None]

    def _leave(self, state: Travellers, steps: int) -> None:
        place = torch.arange(len(state.h), device=state.h.device) if state.place is None else state.place
        left = Departed(place, state.h, state.p, steps)
        self._left += by_last_block(left, state.at) if self.pool.config.left_rows == "refreshed" else [left]

    def _refresh_all_from(self, step: int) -> None:
        """Write the rows of the steps that nobody takes: later tokens may take them."""
        memory = self.around.memory
        if memory is None or self.pool.config.left_rows == "kept":
            return
        for later in range(step, self.pool.config.max_route_steps):
            place, kv = self._refreshed(later)
            key, value = kv.tensor_split(2, dim=1)
            memory.write_some(later, place // self.tokens, self.table.slot(place), key, value)

    def _refreshed(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the places (n,) of the tokens that have left and their turned keys, then values, at `step` (n, 2G, K)."""
        place, kv = refreshed(self.pool, self.blocks, self._left, step)
        key, value = kv.tensor_split(2, dim=1)
        key = rotate(key[None], *self._rotary_at(place))[0]
        return place, torch.cat((key, value), dim=1)

    def _gathered(self, h_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Put everybody back at their places."""
        self.records.left_N = torch.zeros(self.rows * self.tokens, dtype=torch.long, device=h_BTD.device)
        for left in self._left:
            self.records.left_N[left.place] = left.steps
        if len(self._left) == 1:
            h, p = self._left[0].h, self._left[0].p
        else:
            order = torch.cat([left.place for left in self._left])
            h = Arrange.apply(torch.cat([left.h for left in self._left]), order.argsort(), order, 1)
            p = torch.cat([left.p for left in self._left])[order.argsort()]
        return h.view_as(h_BTD), p.unflatten(0, h_BTD.shape[:2])


@dataclass(frozen=True)
class Groups:
    """Visits sorted by block. `order` is None where one block is visited by everybody."""

    blocks: list[int]
    counts: list[int]
    order: Tensor | None
    inverse: Tensor | None
    copies: int

    @classmethod
    def of(cls, block_nk: Tensor, blocks: int) -> Groups:
        """Group k · n visits: first all first choices, then all second ones."""
        visits = block_nk.T.flatten()
        counts = torch.bincount(visits, minlength=blocks).tolist()
        taken = [block for block, count in enumerate(counts) if count]
        sizes = [counts[block] for block in taken]
        if len(taken) == 1:
            return cls(taken, sizes, None, None, 1)
        order = visits.argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return cls(taken, sizes, order, inverse, block_nk.shape[1])

    def split(self, x: Tensor, *, copied: bool = False) -> list[Tensor]:
        """Return the rows of each group. `copied`: `x` holds a row per visit already, else one per token."""
        if self.order is None:
            return [x]
        return list(Arrange.apply(x, self.order, self.inverse, 1 if copied else self.copies).split(self.counts))

    def joined(self, parts: list[Tensor]) -> Tensor:
        """Undo `split`: return (k, n, …)."""
        if self.order is None:
            return parts[0][None]
        flat = Arrange.apply(torch.cat(parts), self.inverse, self.order, 1)
        return flat.unflatten(0, (self.copies, -1))


def _at(values_N: Tensor | None, place: Tensor | None) -> Any:
    return values_N if values_N is None or place is None else values_N[place]


def _explored(score_nM: Tensor, plan: Plan) -> Tensor:
    """Return the scores that are compared: with noise, and for a few tokens drawn at random."""
    if plan.noise:
        score_nM = score_nM + plan.noise * torch.randn_like(score_nM)
    if plan.random_share:
        chance = torch.rand_like(score_nM).masked_fill(score_nM.isneginf(), -torch.inf)
        score_nM = torch.where(torch.rand_like(score_nM[:, :1]) < plan.random_share, chance, score_nM)
    return score_nM
