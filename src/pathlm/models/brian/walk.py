"""New tokens' ways through the pool, one token per row, for writing token by token: choices read off small arrays, nothing run in vain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pathlm.models.brian.departed import Departed, by_last_block, refreshed
from pathlm.models.brian.memory import NewestRows
from pathlm.models.brian.outlook import Outlook
from pathlm.models.brian.positions import IN
from pathlm.models.brian.routing import RoutePool, leads, route_ends
from pathlm.models.brian.table import Surroundings
from pathlm.models.layers import matrix_of, rotate

# Shapes: B rows of one token each, n of them still in the pool in the order of rows, D width, P width of positions, M pool blocks,
# A = M + 1 outputs of the router, L places in the pool (IN, blocks, OUT)


@dataclass(frozen=True)
class Signposts:
    """What the router, the blocks and the exit make of a position, computed once for every place in the pool."""

    from_hidden: Tensor
    """(A, D), below it the rows (n, D) of a second layer where the router has one"""
    by_place: np.ndarray
    """What is added to the router's outputs at each place (L, A); at each step where the router knows steps, not places"""
    by_step: bool
    second: tuple[Tensor, Tensor] | None
    """What each place adds to the second layer's input (L, n), and its output weights (n, A)"""
    adapted: Tensor | None
    """What each block adds to its input at each place (M · L, D)"""
    leaving: Tensor | None
    """What is added to a token that leaves from each place (L, D)"""
    thresholds: dict[float | None, float]
    """The gain below which a token leaves, for every budget asked for so far"""

    def threshold(self, pool: RoutePool, budget: float | None) -> float:
        """Return the gain below which a token leaves, as a number."""
        if budget not in self.thresholds:
            self.thresholds[budget] = float(pool.threshold(budget))
        return self.thresholds[budget]


@dataclass(frozen=True)
class _Left:
    """Tokens that left the pool together."""

    row_n: Any
    """Their rows in the batch (n,); None for all"""
    h_nD: Tensor
    place_n: Any
    """Where they left from: places (n,), or one number where they are a single token"""
    steps: int


def suits(model: Any, h_BTD: Tensor, journey: Any) -> bool:
    """Whether a pass is one token per row that its router alone sends to one block at a time, and nobody asks how."""
    alone = h_BTD.shape[1] == 1 and h_BTD.shape[0] > 0 and not torch.is_grad_enabled() and not model.training
    asked = journey.knobs is not None or journey.trace or journey.target_BT is not None or journey.depths is not None
    rounded = h_BTD.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(h_BTD.device.type)
    if not alone or asked or rounded:
        return False
    config = model.config
    tabled = not config.location_bias or config.router_sees_position
    return tabled and config.route_top_k == 1


def walk(pool: RoutePool, blocks: list[Any], h_BTD: Tensor, around: Surroundings, budget: float | None) -> tuple[Tensor, int]:
    """Send one token per row (B, 1, D) through the pool.

    Returns the hidden states as they leave it, and how many blocks were run, summed over tokens. The same choices as `PoolRun` makes, read
    off one small array per step.
    """
    posts, config = signposts_of(pool), vars(pool.config)  # a configuration's attributes answer slowly
    threshold, outlook = posts.threshold(pool, budget), Outlook(around, blocks[0], len(h_BTD), h_BTD)
    band, rows = _Band(h_BTD[:, 0], outlook, stays=config["block_position_to"] == "state"), outlook.rows
    if len(h_BTD) == 1 and h_BTD.device.type == "cpu":
        left = [_alone(posts, config, blocks, band, threshold)]
    else:
        left = _together(posts, config, blocks, band, threshold)
    if rows is not None:
        rows.settle(left[-1].steps)
        if config["left_rows"] == "refreshed":
            _refresh(rows, pool, blocks, around.rotary, left)
    h_BD, place_B = left[0].h_nD, left[0].place_n
    if len(left) > 1:
        order = np.argsort(np.concatenate([group.row_n for group in left]))
        h_BD = torch.cat([group.h_nD for group in left]).index_select(0, _index(order, h_BD))
        place_B = np.concatenate([group.place_n for group in left])[order]
    if posts.leaving is not None:
        h_BD = h_BD + _at(posts.leaving, place_B)
    return h_BD[:, None], sum(len(group.h_nD) * group.steps for group in left)


def _alone(posts: Signposts, config: dict[str, Any], blocks: list[Any], band: _Band, threshold: float) -> _Left:
    """Send a single token. Its choices are a handful of numbers each: whatever gathers and compares rows would cost more than they."""
    shortest, longest, cap, eps = (config[name] for name in ("min_route_steps", "max_route_steps", "max_repeats", "rms_norm_eps"))
    place, repeats, width, moves, number = IN, 0, band.h_nD.shape[1], config["route_moves"], np.arange(len(blocks))
    for step in range(longest):
        if route_ends(moves, place - 1, blocks=len(blocks)):
            return _Left(None, band.h_nD, place, step)
        h_D = band.h_nD[0]
        seen_X, told_A = torch.mv(posts.from_hidden, h_D), posts.by_place[step if posts.by_step else place]
        scale = (torch.dot(h_D, h_D).item() / width + eps) ** -0.5
        out_A = told_A + scale * seen_X.numpy()[: len(told_A)]
        if posts.second is not None:
            added, weight = posts.second
            out_A += (F.gelu(torch.add(added[place], seen_X[len(told_A) :], alpha=scale)) @ weight).numpy()
        if step >= shortest and out_A[-1] < threshold:
            return _Left(None, band.h_nD, place, step)
        score_M = out_A[:-1]
        if cap and repeats >= cap:
            score_M[place - 1] = -np.inf
        if moves != "any":
            score_M[~leads(moves, place - 1, number, blocks=len(blocks), owed=shortest - step - 1)] = -np.inf
        best = int(score_M.argmax())
        band.visit_one(best, blocks[best], None if posts.adapted is None else posts.adapted[best * (len(blocks) + 2) + place], step)
        repeats = repeats + 1 if place == best + 1 else 1
        place = best + 1
    return _Left(None, band.h_nD, place, longest)


def _together(posts: Signposts, config: dict[str, Any], blocks: list[Any], band: _Band, threshold: float) -> list[_Left]:
    """Send a token of every row; return them in groups that left after the same step, first those that left first."""
    shortest, longest, cap, eps = (config[name] for name in ("min_route_steps", "max_route_steps", "max_repeats", "rms_norm_eps"))
    place_n, repeats_n = np.full(band.batch, IN), np.zeros(band.batch, dtype=np.int64)
    moves, number, left = config["route_moves"], np.arange(len(blocks)), list[_Left]()
    for step in range(longest):
        out_nA = _outputs(posts, band.h_nD, place_n, eps=eps, step=step)
        leaves_n = (out_nA[:, -1] < threshold) | route_ends(moves, place_n - 1, blocks=len(blocks))
        if step >= shortest and leaves_n.any():
            going, stay = np.flatnonzero(leaves_n), np.flatnonzero(~leaves_n)
            if not len(stay):
                left.append(_Left(band.row_n, band.h_nD, place_n, step))
                return left
            gone = going if band.row_n is None else band.row_n[going]
            left.append(_Left(gone, band.h_nD.index_select(0, _index(going, band.h_nD)), place_n[going], step))
            place_n, repeats_n, out_nA = place_n[stay], repeats_n[stay], out_nA[stay]
            band.keep(stay)
        score_nM = out_nA[:, :-1]
        if cap and step:
            spent = np.flatnonzero(repeats_n >= cap)
            score_nM[spent, place_n[spent] - 1] = -np.inf
        if moves != "any":
            score_nM[~leads(moves, place_n[:, None] - 1, number, blocks=len(blocks), owed=shortest - step - 1)] = -np.inf
        best_n = score_nM.argmax(-1)
        band.visit(blocks, best_n, place_n, step, posts.adapted)
        repeats_n = np.where(place_n == best_n + 1, repeats_n + 1, 1) if cap else repeats_n
        place_n = best_n + 1
    left.append(_Left(band.row_n, band.h_nD, place_n, longest))
    return left


def _refresh(rows: NewestRows, pool: RoutePool, blocks: list[Any], rotary: tuple[Tensor, Tensor], left: list[_Left]) -> None:
    """Make the rows of the tokens anew for every step that they did not take."""
    departed: list[Departed] = []
    for group in left:
        place_n = np.atleast_1d(group.place_n)
        row_n = np.arange(len(place_n)) if group.row_n is None else group.row_n
        p_nP = _at(pool.position, place_n).to(group.h_nD.dtype)
        gone = Departed(_index(row_n, p_nP), group.h_nD, p_nP, group.steps)
        departed += by_last_block(gone, _index(place_n - 1, p_nP))
    for step in range(departed[0].steps, rows.key_BRG1K.shape[1]):
        row_n, kv = refreshed(pool, blocks, [group for group in departed if group.steps <= step], step)
        key, value = kv[:, None].tensor_split(2, dim=2)
        cos, sin = (table if table.shape[0] == 1 else table.index_select(0, row_n) for table in rotary)
        rows.key_BRG1K[row_n, step] = rotate(key, cos, sin).transpose(1, 2)
        rows.value_BRG1K[row_n, step] = value.transpose(1, 2)


class _Band:
    """The tokens still in the pool, and what they see."""

    def __init__(self, h_nD: Tensor, outlook: Outlook, *, stays: bool) -> None:
        self.h_nD, self.batch, self.outlook = h_nD, len(h_nD), outlook
        self.stays = stays
        """Whether what places add to a block's input stays in the hidden state"""
        self.row_n: np.ndarray | None = None
        """Their rows in the batch; None while these are all"""

    def keep(self, stay: np.ndarray) -> None:
        """Let only those at the indices `stay` go on."""
        index = _index(stay, self.h_nD)
        self.h_nD = self.h_nD.index_select(0, index)
        self.row_n = stay if self.row_n is None else self.row_n[stay]
        self.outlook.keep(index, self.row_n)

    def visit_one(self, number: int, block: Any, added: Tensor | None, step: int) -> None:
        """Run one block on all of them. `added` (n, D) or (D,) is what their places add to its input."""
        x_nD, outlook = self.h_nD if added is None else self.h_nD + added, self.outlook
        onto_nD = x_nD if self.stays else self.h_nD
        self.h_nD = block.finish(onto_nD, outlook.heard(number, outlook.read(*outlook.project(number, block, x_nD), step)))

    def visit(self, blocks: list[Any], best_n: np.ndarray, place_n: np.ndarray, step: int, adapted: Tensor | None) -> None:
        """Run the chosen blocks: all write their rows, then all read."""
        added = None if adapted is None else _at(adapted, best_n * (len(blocks) + 2) + place_n)
        first = int(best_n[0])
        if (best_n == first).all():
            self.visit_one(first, blocks[first], added, step)
            return
        h_nD, outlook = self.h_nD, self.outlook
        x_nD = h_nD if added is None else h_nD + added
        order = np.argsort(best_n, kind="stable")
        counts = np.bincount(best_n)
        chosen = np.flatnonzero(counts).tolist()
        sizes = counts[counts > 0].tolist()
        there, back = _index(order, h_nD), _index(np.argsort(order), h_nD)
        parts = x_nD.index_select(0, there).split(sizes)
        qkv, asked = zip(*(outlook.project(i, blocks[i], x) for i, x in zip(chosen, parts, strict=True)), strict=True)
        asks = None if asked[0] is None else torch.cat(asked).index_select(0, back)
        read = outlook.read(torch.cat(qkv).index_select(0, back), asks, step).index_select(0, there).split(sizes)
        parts = (x_nD if self.stays else h_nD).index_select(0, there).split(sizes)
        parts = [blocks[i].finish(h, outlook.heard(i, r)) for i, h, r in zip(chosen, parts, read, strict=True)]
        self.h_nD = torch.cat(parts).index_select(0, back)


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


def _at(table_LX: Tensor, place_n: Any) -> Tensor:
    """Return the rows of a table for places (n,), or the row (X,) of one place that is a number."""
    return table_LX[place_n] if isinstance(place_n, int) else table_LX.index_select(0, _index(place_n, table_LX))


def _index(numbers: np.ndarray, like: Tensor) -> Tensor:
    """Return `numbers` as an index where `like` is."""
    return torch.from_numpy(numbers).to(like.device)


def signposts_of(pool: RoutePool) -> Signposts:
    """Return the pool's signposts, made anew when a weight or a threshold has changed."""
    known = pool.signposts
    if known is None or known[1] != [t._version for t in known[0]]:
        # Tensors made in inference mode do not count how often they were written to, and are not trained either.
        numbers = (pool.load_bias, pool.exit_threshold, pool.budgets_trained, pool.budget_default)
        tensors = [t for t in (*pool.parameters(), *numbers) if not t.is_inference()]
        known = pool.signposts = (tensors, [t._version for t in tensors], make_signposts(pool))
    return known[2]


@torch.no_grad()
def make_signposts(pool: RoutePool) -> Signposts:
    """Compute what positions add, in the precision of the router's weights and at least float32."""
    router: Any = pool.router
    config = pool.config
    dtype = torch.promote_types(router.from_hidden.weight.dtype, torch.float32)
    position = pool.position.to(dtype)
    seen: Any = matrix_of(router.from_position) if config.router_sees_position else router.by_step
    table = position @ seen.to(dtype).T if config.router_sees_position else seen.detach().to(dtype).clone()
    table[:, :-1] += pool.load_bias.to(dtype)
    by_step = not config.router_sees_position
    if config.location_bias:
        table[:, :-1] += config.location_bias * (position @ position[1:-1].T)
    adapted = None
    if len(pool.adapters):
        matrices = [matrix_of(layer) for layer in pool.adapters]
        adapted = torch.cat([position.to(matrix.dtype) @ matrix.T for matrix in matrices])
    out = None if pool.out is None else matrix_of(pool.out)
    leaving = None if out is None else position.to(out.dtype) @ out.T
    weight, second = matrix_of(router.from_hidden).to(dtype), None
    if config.router_hidden:
        width = config.hidden_size
        inner = matrix_of(router.hidden_in).to(dtype)
        added = router.hidden_in.bias.to(dtype) + (position @ inner[:, width:].T if inner.shape[1] > width else 0.0)
        second = (added.expand(len(position), -1).contiguous(), matrix_of(router.hidden_out).to(dtype).T.contiguous())
        weight = torch.cat((weight, inner[:, :width]))
    return Signposts(weight, table.cpu().numpy(), by_step, second, adapted, leaving, {})
