"""The router: who decides, for one token, which block of the pool comes next or that it is time to leave."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.brian.positions import IN, position_table
from pathlm.models.layers import matrix_of

# Shapes: N tokens in the pool, D model width, P width of positions, M pool blocks, A = M + 1 outputs of the router, G budgets

PREFERENCE = 5.0
"""How strongly a fresh router prefers the next block, in units of its scores."""
GAIN = 0.5
"""What a fresh router expects of staying before the last block, in nats, and the opposite after it: little, to be unlearned soon."""
GAIN_SCALE = 0.1
"""Nats of gain that multiply the odds of leaving by e, until measured gains say otherwise."""
BUDGETS = 33
"""Budgets for which a threshold is kept; between them it is interpolated."""
NUMBERS = ("load_bias", "exit_threshold", "budgets_trained", "budget_default", "gain_scale", "difficulty_sum", "difficulty_count")
"""Buffers of a pool that stay in at least float32, whatever the weights' precision: rounded, they would send tokens other ways."""


class Router(nn.Module):
    """Scores of the pool's blocks, and the loss that staying in the pool is expected to remove, from one token's own state.

    Output columns 0 … M - 1 are scores; column M is the gain in nats. Computed in at least float32, whatever the model's precision.
    """

    def __init__(self, config: BrianConfig) -> None:
        super().__init__()
        self.config = config
        width, actions = config.hidden_size, config.pool_blocks + 1
        seen = config.block_position_dim if config.router_sees_position else 0
        self.from_hidden = nn.Linear(width, actions, bias=False)
        if seen:
            self.from_position = nn.Linear(seen, actions, bias=False)
        else:
            self.by_step = nn.Parameter(torch.zeros(config.max_route_steps, actions))
        if config.router_hidden:
            self.hidden_in = nn.Linear(width + seen, config.router_hidden)
            self.hidden_out = nn.Linear(config.router_hidden, actions, bias=False)

    def forward(self, h_ND: Tensor, p_NP: Tensor, step: int, *, listen: float = 0.0) -> Tensor:
        """Return the outputs (N, A). A share `listen` of the gradient reaches `h_ND`.

        None does by default: what the model says must not bend to what the router finds easy.
        """
        with torch.autocast(h_ND.device.type, enabled=False):
            x_ND = self.read(h_ND, listen=listen)
            p_NP = p_NP.to(x_ND.dtype)
            out_NA = _linear(x_ND, self.from_hidden)
            if self.config.router_sees_position:
                out_NA = out_NA + _linear(p_NP, self.from_position)
                x_ND = torch.cat((x_ND, p_NP), dim=-1) if self.config.router_hidden else x_ND
            else:
                out_NA = out_NA + self.by_step[step].to(x_ND.dtype)
            if self.config.router_hidden:
                out_NA = out_NA + _linear(F.gelu(_linear(x_ND, self.hidden_in)), self.hidden_out)
            return out_NA

    def read(self, h_ND: Tensor, *, listen: float = 0.0) -> Tensor:
        """Return the hidden state as the router sees it: normalised, and cut off from the graph but for a share `listen`."""
        if listen:
            h_ND = h_ND.detach().lerp(h_ND, listen)
        else:
            h_ND = h_ND.detach()
        x_ND = h_ND.to(torch.promote_types(h_ND.dtype, torch.float32))
        return F.rms_norm(x_ND, x_ND.shape[-1:], eps=self.config.rms_norm_eps)

    @torch.no_grad()
    def reset(self, position: Tensor) -> None:
        """Prefer the blocks in their order and leaving after the last one, whatever the hidden state."""
        init.zeros_(self.from_hidden.weight)
        blocks, actions = self.config.pool_blocks, self.config.pool_blocks + 1
        wanted = torch.zeros(blocks + 2, actions, dtype=torch.float64)
        wanted[:blocks, :blocks] = PREFERENCE * torch.eye(blocks, dtype=torch.float64)
        # The others are told apart by more than rounding, or second choices would depend on how many tokens are looked at together.
        wanted[:, :blocks] -= 0.01 * torch.arange(blocks)
        wanted[:, blocks] = -GAIN
        wanted[:blocks, blocks] = GAIN
        if self.config.router_sees_position:
            found = torch.linalg.pinv(position.detach().cpu().double()) @ wanted
            init.copy_(self.from_position.weight, found.T.to(self.from_position.weight))
        else:
            place = torch.arange(self.config.max_route_steps).clamp(max=blocks)
            init.copy_(self.by_step, wanted[place].to(self.by_step))
        if self.config.router_hidden:
            init.normal_(self.hidden_in.weight, std=self.config.hidden_size**-0.5)
            init.zeros_(self.hidden_in.bias)
            init.zeros_(self.hidden_out.weight)


class RoutePool(nn.Module):
    """What routing adds to the blocks: the router, positions, what blocks and the exit read of them, and the exit's thresholds.

    `exit_threshold` (G,) holds, for budgets from `min_route_steps / max_route_steps` to 1, the gain below which a token leaves.
    """

    position: Tensor
    load_bias: Tensor
    exit_threshold: Tensor
    budgets_trained: Tensor
    budget_default: Tensor
    gain_scale: Tensor
    difficulty_sum: Tensor
    difficulty_count: Tensor

    def __init__(self, config: BrianConfig) -> None:
        super().__init__()
        self.config = config
        width, seen = config.hidden_size, config.block_position_dim if config.block_position != "none" else 0
        self.router = Router(config)
        self.adapters = nn.ModuleList(
            nn.Linear(seen, width, bias=False) for _ in range(config.pool_blocks if config.blocks_see_position else 0)
        )
        self.out = nn.Linear(seen, width, bias=False) if seen else None
        table = position_table(config.block_position, config.pool_blocks, config.block_position_dim)
        self.register_buffer("position", table, persistent=False)
        # What decoding token by token looks up instead of computing; derived from weights and made anew when they change.
        self.signposts: tuple[list[Tensor], list[int], Any] | None = None
        for name, start in self._buffers_at_start().items():
            self.register_buffer(name, start)

    def _apply(self, fn: Any, recurse: bool = True) -> RoutePool:
        """Move or convert, numbers to no less than float32, and forget what was derived from the tensors as they were."""
        self.signposts = None
        before = {name: getattr(self, name) for name in NUMBERS}
        super()._apply(fn, recurse)
        for name, number in before.items():
            now = getattr(self, name)
            if now.dtype != (kept := torch.promote_types(now.dtype, torch.float32)):
                setattr(self, name, number.to(now.device, kept))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load weights, as part of a whole model's too, and forget what was derived from those before."""
        self.signposts = None
        super()._load_from_state_dict(*args, **kwargs)

    def _buffers_at_start(self) -> dict[str, Tensor]:
        vocabulary, exact = self.config.vocab_size, torch.promote_types(torch.get_default_dtype(), torch.float32)
        return {
            "load_bias": torch.zeros(self.config.pool_blocks, dtype=exact),
            "exit_threshold": torch.zeros(BUDGETS, dtype=exact),
            # Low and high end of the budgets trained so far; none while low > high.
            "budgets_trained": torch.tensor([2.0, -1.0], dtype=exact),
            "budget_default": torch.tensor(1.0, dtype=exact),
            "gain_scale": torch.tensor(GAIN_SCALE, dtype=exact),
            "difficulty_sum": torch.zeros(vocabulary, dtype=exact),
            "difficulty_count": torch.zeros(vocabulary, dtype=exact),
        }

    @torch.no_grad()
    def reset(self) -> None:
        """Give every weight and buffer its first value: a token then visits the blocks in order, unchanged by its position."""
        with torch.device("cpu"):
            table = position_table(self.config.block_position, self.config.pool_blocks, self.config.block_position_dim)
            init.copy_(self.position, table.to(self.position.device))
            for name, start in self._buffers_at_start().items():
                init.copy_(getattr(self, name), start.to(getattr(self, name).device))
        for layer in (*self.adapters, *([self.out] if self.out is not None else [])):
            init.zeros_(layer.weight)
        self.router.reset(table)

    def scores(self, h_ND: Tensor, p_NP: Tensor, step: int, *, listen: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the blocks' scores (N, M), location and load biases included, and the gain (N,)."""
        out_NA = self.router(h_ND, p_NP, step, listen=listen)
        score_NM, gain_N = out_NA[:, :-1], out_NA[:, -1]
        if self.config.location_bias:
            score_NM = score_NM + self.config.location_bias * (p_NP @ self.position[1:-1].T.to(p_NP.dtype)).to(score_NM.dtype)
        return score_NM + self.load_bias.to(score_NM.dtype), gain_N

    def starting_position(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """Return IN's vector for every token (N, P)."""
        return self.position[IN].to(dtype).expand(tokens, -1)

    def leave(self, h: Tensor, p: Tensor) -> Tensor:
        """Return what leaves the pool with hidden state `h` (..., D) from position `p` (..., P)."""
        return h if self.out is None else h + F.linear(p.to(h.dtype), matrix_of(self.out))

    def threshold(self, budget: float | Tensor | None) -> Tensor:
        """Return the gain below which a token leaves, for a budget: the share of `max_route_steps` that tokens are to take on average.

        None is the budget the model was last trained with, or, before that, the gain 0. A tensor of budgets gives one threshold each.
        """
        trained = self.budgets_trained[0] <= self.budgets_trained[1]
        if budget is None:
            return torch.where(trained, self._interpolated(self.budget_default), 0.0)
        return self._interpolated(torch.as_tensor(budget, dtype=torch.float32, device=self.exit_threshold.device))

    def _interpolated(self, budget: Tensor) -> Tensor:
        lowest = self.lowest_budget
        place = ((budget - lowest) / max(1 - lowest, 1e-9) * (BUDGETS - 1)).clamp(0, BUDGETS - 1)
        left = place.floor().long().clamp(max=BUDGETS - 2)
        value = torch.lerp(self.exit_threshold[left], self.exit_threshold[left + 1], (place - left).to(self.exit_threshold.dtype))
        # The whole budget means that nobody leaves early, whatever was measured.
        return torch.where(budget >= 1, -torch.inf, value)

    @property
    def steps_possible(self) -> tuple[int, int]:
        """The smallest and the largest number of route steps that a token may take."""
        assert self.config.min_route_steps is not None
        return self.config.min_route_steps, self.config.max_route_steps

    @property
    def lowest_budget(self) -> float:
        """The smallest share of route steps that is possible."""
        fewest, most = self.steps_possible
        return fewest / most

    def check_budget(self, budget: float) -> None:
        """Raise `ValueError` for a budget that is no share, or that the model was not trained for."""
        low, high = self.budgets_trained.tolist()
        if low > high:
            raise ValueError(f"budget={budget}: this model has not been trained to leave the pool early, so it has one budget only")
        if not low - 1e-6 <= budget <= 1:  # float32 rounds what was trained
            raise ValueError(f"budget={budget}: must lie between {low:.3g} and 1, the budgets this model was trained for")


def legal_scores(
    score_NM: Float[Tensor, "n m"], config: BrianConfig, at_N: Int[Tensor, " n"], repeats_N: Int[Tensor, " n"], *, owed: int | Tensor
) -> Float[Tensor, "n m"]:
    """Return the scores, -inf for blocks that tokens may not visit: too often in a row, or by a move that is not made.

    `at_N` are the blocks they come from (-1: none yet), `repeats_N` how often in a row these were visited, `owed`, a number or one for each
    token, how many visits must at least follow this one. Some block is left to every token whose route has not ended (`route_ends`).
    """
    if config.max_repeats:
        spent_N = (repeats_N >= config.max_repeats) & (at_N >= 0)
        tired_NM = F.one_hot(at_N.clamp(min=0), score_NM.shape[1]).bool() & spent_N[:, None]
        score_NM = score_NM.masked_fill(tired_NM, -torch.inf)
    if config.route_moves != "any":
        block_M = torch.arange(score_NM.shape[1], device=at_N.device)
        owed_N1 = owed[:, None] if isinstance(owed, Tensor) else owed
        score_NM = score_NM.masked_fill(~leads(config.route_moves, at_N[:, None], block_M, blocks=len(block_M), owed=owed_N1), -torch.inf)
    return score_NM


def leads(moves: str, at: Any, block: Any, *, blocks: int, owed: Any) -> Any:
    """Whether one of the `moves` `recur` or `skip` leads from block `at` (-1: the entrance) to `block`. Tensors or arrays, broadcast.

    A skip goes no further than leaves a block for each visit that is still `owed` after it.
    """
    if moves == "recur":
        return (block == at) | (block == at + 1)
    return (block > at) & (block < blocks - owed)


def route_ends(moves: str, at: Any, *, blocks: int) -> Any:
    """Whether no move leads on from block `at`: of tensors or arrays element by element, False where that never happens."""
    return at == blocks - 1 if moves == "skip" else False


def best_blocks(score_NM: Float[Tensor, "n m"], k: int) -> Int[Tensor, "n {k}"]:
    """Return the `k` blocks with the highest scores, best first, ties to the lowest number."""
    first_N = score_NM.argmax(-1)
    if k == 1:
        return first_N[:, None]
    rest_NM = score_NM.scatter(-1, first_N[:, None], -torch.inf)
    return torch.stack((first_N, rest_NM.argmax(-1)), dim=-1)


def _linear(x: Tensor, layer: Any) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, matrix_of(layer).to(x.dtype), bias)
