"""New tokens' ways through the pool, one token per row, for writing token by token: choices read off small arrays, nothing run in vain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pathlm.models.brian.departed import block_in_turn
from pathlm.models.brian.memory import NewestRows, PoolMemory
from pathlm.models.brian.positions import IN
from pathlm.models.brian.routing import RoutePool
from pathlm.models.layers import attend, rotate, turned

# Shapes: B rows of one token each, n of them still in the pool in the order of rows, D width, P width of positions, M pool blocks,
# A = M + 1 outputs of the router, L places in the pool (IN, blocks, OUT), H heads, G key/value heads, K head width, S tokens attended


@dataclass(frozen=True)
class Signposts:
    """What the router and the blocks make of a position, computed once for every place in the pool."""

    from_hidden: Tensor
    """(A, D), below it the rows (n, D) of a second layer where the router has one"""
    by_place: np.ndarray
    """What is added to the router's outputs at each place (L, A); at each step where the router knows steps, not places"""
    by_step: bool
    second: tuple[Tensor, Tensor] | None
    """What each place adds to the second layer's input (L, n), and its output weights (n, A)"""
    adapted: Tensor | None
    """What each block adds to its input at each place (M · L, D)"""


def suits(model: Any, h_BTD: Tensor, journey: Any) -> bool:
    """Whether a pass is one token per row that its router alone sends to one block at a time, and nobody asks how."""
    alone = h_BTD.shape[1] == 1 and h_BTD.shape[0] > 0 and not torch.is_grad_enabled() and not model.training
    asked = journey.knobs is not None or journey.trace or journey.target_BT is not None or journey.depths is not None
    config = model.config
    tabled = config.router_sees_position or not config.location_bias
    return alone and not asked and tabled and config.route_top_k == 1 and h_BTD.dtype in (torch.float32, torch.float64)


def walk(
    pool: RoutePool, blocks: list[Any], h_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, memory: PoolMemory | None,
    threshold: float,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """Send one token per row (B, 1, D) through the pool.

    Returns the hidden states, the positions (B, 1, P) they left from, and how many blocks were run, summed over tokens. The same choices
    as `PoolRun` makes, read off one small array per step.
    """
    config, posts = pool.config, signposts_of(pool)
    # Read once: a configuration answers slowly.
    shortest, longest, cap = config.min_route_steps, config.max_route_steps, config.max_repeats
    eps, groups = config.rms_norm_eps, config.num_key_value_heads
    assert shortest is not None and groups is not None
    batch = h_BTD.shape[0]
    rows = None if memory is None else memory.newest(h_BTD.new_empty(()).expand(batch, groups, 1, blocks[0].width))
    band = _Band(h_BTD[:, 0], rotary, mask, rows, blocks[0].heads)
    place_n, repeats_n = np.full(batch, IN), np.zeros(batch, dtype=np.int64)
    place_B, steps_B = np.empty(batch, dtype=np.int64), np.full(batch, longest)
    left: list[tuple[np.ndarray, Tensor]] = []
    for step in range(longest):
        out_nA = _outputs(posts, band.h_nD, place_n, eps=eps, step=step)
        leaves_n = out_nA[:, -1] < threshold
        if step >= shortest and leaves_n.any():
            going = np.flatnonzero(leaves_n)
            gone = going if band.row_n is None else band.row_n[going]
            place_B[gone], steps_B[gone] = place_n[going], step
            stay = np.flatnonzero(~leaves_n)
            left.append((gone, band.h_nD.index_select(0, _index(going, h_BTD)) if len(stay) else band.h_nD))
            place_n, repeats_n, out_nA = place_n[stay], repeats_n[stay], out_nA[stay]
            if not len(stay):
                break
            band.keep(stay)
        score_nM = out_nA[:, :-1]
        if cap and step:
            spent = np.flatnonzero(repeats_n >= cap)
            score_nM[spent, place_n[spent] - 1] = -np.inf
        best_n = score_nM.argmax(-1)
        band.visit(blocks, best_n, place_n, step, posts.adapted)
        repeats_n = np.where(place_n == best_n + 1, repeats_n + 1, 1) if cap else repeats_n
        place_n = best_n + 1
    else:
        gone = np.arange(batch) if band.row_n is None else band.row_n
        place_B[gone] = place_n
        left.append((gone, band.h_nD))
    if rows is not None:
        rows.settle(int(steps_B.max()))
        if config.left_rows == "refreshed":
            for gone, h_nD in left:
                _refresh(rows, blocks, rotary, gone, h_nD, place_n=place_B[gone], steps=int(steps_B[gone[0]]), adapted=posts.adapted)
    h_BD = left[0][1]
    if len(left) > 1:
        order = np.argsort(np.concatenate([gone for gone, _ in left]))
        h_BD = torch.cat([h for _, h in left]).index_select(0, _index(order, h_BTD))
    return h_BD[:, None], pool.position.index_select(0, _index(place_B, h_BTD)).to(h_BTD.dtype)[:, None], int(steps_B.sum())


def _refresh(
    rows: NewestRows, blocks: list[Any], rotary: tuple[Tensor, Tensor], row_n: np.ndarray, h_nD: Tensor, *,
    place_n: np.ndarray, steps: int, adapted: Tensor | None,
) -> None:  # fmt: skip
    """Make the rows of tokens that left together after `steps` anew for every step they did not take."""
    for step in range(steps, rows.key_BRGK.shape[1]):
        block_n = block_in_turn(place_n - 1, steps, step, len(blocks))
        for number in np.unique(block_n).tolist():
            mine = np.flatnonzero(block_n == number)
            x_nD, row = h_nD.index_select(0, _index(mine, h_nD)), _index(row_n[mine], h_nD)
            if adapted is not None:
                x_nD = x_nD + adapted.index_select(0, _index(number * (len(adapted) // len(blocks)) + place_n[mine], h_nD))
            key, value = blocks[number].remember(x_nD).tensor_split(2, dim=1)
            cos, sin = (table if table.shape[0] == 1 else table.index_select(0, row) for table in rotary)
            rows.key_BRGK[row, step] = rotate(key[:, None], cos, sin)[:, 0]
            rows.value_BRGK[row, step] = value


class _Band:
    """The tokens still in the pool, and what they see."""

    def __init__(self, h_nD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, rows: NewestRows | None, heads: int) -> None:
        self.h_nD, self.batch = h_nD, len(h_nD)
        self.row_n: np.ndarray | None = None
        """Their rows in the batch; None while these are all"""
        self.rotary, self.mask, self.rows, self.heads = rotary, mask, rows, heads
        self.index_n: Tensor | None = None
        self.cuts: list[int] = []
        """How many neighbouring rows have left, are still here, have left, …"""

    def keep(self, stay: np.ndarray) -> None:
        """Let only those at the indices `stay` go on."""
        index = _index(stay, self.h_nD)
        self.h_nD = self.h_nD.index_select(0, index)
        cos, sin = self.rotary
        if cos.shape[0] > 1:
            self.rotary = cos.index_select(0, index), sin.index_select(0, index)
        if self.mask is not None and self.mask.shape[0] > 1:
            self.mask = self.mask.index_select(0, index)
        self.row_n = stay if self.row_n is None else self.row_n[stay]
        self.index_n = _index(self.row_n, self.h_nD)
        here = np.zeros(self.batch + 2, dtype=bool)
        here[self.row_n + 1] = True
        edge = np.flatnonzero(here[1:] != here[:-1])
        self.cuts = np.diff(edge, prepend=0, append=self.batch).tolist()

    def visit(self, blocks: list[Any], best_n: np.ndarray, place_n: np.ndarray, step: int, adapted: Tensor | None) -> None:
        """Run the chosen blocks: all write their rows, then all read."""
        h_nD = x_nD = self.h_nD
        if adapted is not None:
            x_nD = h_nD + adapted.index_select(0, _index(best_n * (len(adapted) // len(blocks)) + place_n, h_nD))
        first = int(best_n[0])
        if (best_n == first).all():
            block = blocks[first]
            self.h_nD = block.finish(h_nD, self._attended(block.project(x_nD), step))
            return
        order = np.argsort(best_n, kind="stable")
        counts = np.bincount(best_n)
        chosen = [blocks[i] for i in np.flatnonzero(counts)]
        sizes = counts[counts > 0].tolist()
        there, back = _index(order, h_nD), _index(np.argsort(order), h_nD)
        parts = x_nD.index_select(0, there).split(sizes)
        qkv = torch.cat([block.project(x) for block, x in zip(chosen, parts, strict=True)]).index_select(0, back)
        read = self._attended(qkv, step).index_select(0, there).split(sizes)
        parts = h_nD.index_select(0, there).split(sizes)
        parts = [block.finish(h, r) for block, h, r in zip(chosen, parts, read, strict=True)]
        self.h_nD = torch.cat(parts).index_select(0, back)

    def _attended(self, qkv_nXK: Tensor, step: int) -> Tensor:
        """Write the keys and values among `qkv_nXK` (n, H + 2G, K) and return what the queries read of the table (n, H · K)."""
        query, key, value = turned(qkv_nXK[:, None], self.rotary, self.heads)
        if self.rows is None:
            return attend(query, key, value, self.mask).flatten(1)
        self.rows.write(step, self.index_n, key[:, :, 0], value[:, :, 0])
        keys, values = self.rows.keys[step], self.rows.values[step]
        if self.index_n is None:
            return attend(query, keys, values, self.mask).flatten(1)
        # Neighbours attend together: that copies nothing of the memory.
        sizes = self.cuts[1::2]
        table = zip(keys.split(self.cuts)[1::2], values.split(self.cuts)[1::2], strict=True)
        masks = [self.mask] * len(sizes) if self.mask is None or self.mask.shape[0] == 1 else self.mask.split(sizes)
        read = [attend(q, k, v, mask) for q, (k, v), mask in zip(query.split(sizes), table, masks, strict=True)]
        return (read[0] if len(read) == 1 else torch.cat(read)).flatten(1)


def _outputs(posts: Signposts, h_nD: Tensor, place_n: np.ndarray, *, eps: float, step: int) -> np.ndarray:
    """Return the router's outputs (n, A) as it would compute them from hidden states and positions."""
    seen_nX, length_n = F.linear(h_nD, posts.from_hidden), torch.linalg.vector_norm(h_nD, dim=-1)
    # The norm is one number, so it scales the few outputs instead of the whole state.
    scale_n1 = (_host(length_n)[:, None] ** 2 / h_nD.shape[1] + eps) ** -0.5
    told = posts.by_place[step] if posts.by_step else posts.by_place[place_n]
    actions = told.shape[-1]
    out_nA = told + scale_n1 * _host(seen_nX)[:, :actions]
    if posts.second is not None:
        added, weight = posts.second
        inner = torch.addcmul(
            added.index_select(0, _index(place_n, h_nD)), seen_nX[:, actions:], torch.from_numpy(scale_n1).to(h_nD.device)
        )
        out_nA = out_nA + _host(torch.mm(F.gelu(inner), weight))
    return out_nA


def _host(x: Tensor) -> np.ndarray:
    return x.cpu().numpy()


def _index(numbers: np.ndarray, like: Tensor) -> Tensor:
    """Return `numbers` as an index where `like` is."""
    return torch.from_numpy(numbers).to(like.device)


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
        adapted = torch.cat([position.to(layer.weight.dtype) @ layer.weight.T for layer in layers])
    weight, second = router.from_hidden.weight.to(dtype), None
    if config.router_hidden:
        width = config.hidden_size
        inner = router.hidden_in.weight.to(dtype)
        added = router.hidden_in.bias.to(dtype) + (position @ inner[:, width:].T if inner.shape[1] > width else 0.0)
        second = (added.expand(len(position), -1).contiguous(), router.hidden_out.weight.to(dtype).T.contiguous())
        weight = torch.cat((weight, inner[:, :width]))
    return Signposts(weight, table.cpu().numpy(), by_step, second, adapted)
