"""Where tokens go: every move between the blocks of a pool, counted as batches are read, and what these counts say of the routes."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Shapes: B rows, T tokens, N tokens that count, R route steps, M pool blocks, A = M + 1 (blocks, OUT), K = M + 2 nodes (IN, blocks, OUT)


class RouteMap:
    """Counts over all tokens of an evaluation in constant memory, except for a number per different path."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.blocks, self.most, self.pre = config.pool_blocks, config.max_route_steps, config.pre_blocks
        self.fewest = int(config.min_route_steps or 0)
        self.position_KP = model.pool.position.detach().double().cpu().numpy()
        self.moves_KK = np.zeros((self.blocks + 2, self.blocks + 2))
        self.step_RA = np.zeros((self.most, self.blocks + 1))
        self.visits_M = np.zeros(self.blocks)
        self.paths: Counter[bytes] = Counter()
        self.entropy = self.decisions = self.leaving = self.free = 0.0

    def add(self, trace: Any, counted_BT: Tensor) -> None:
        """Count the tokens of a traced pass that `counted_BT` marks. Of tokens with several branches the trace tells of the best one."""
        block_NR = trace.block_BTS[counted_BT][:, self.pre : self.pre + self.most]
        block_NR = torch.where(block_NR > 0, block_NR - self.pre, 0)
        chance_NRA = trace.probability_BTRA[counted_BT].double()
        second_NR = torch.where(trace.second_BTR[counted_BT] > 0, trace.second_BTR[counted_BT] - self.pre, 0)
        node_NRK = self._nodes(block_NR, second_NR, chance_NRA)
        inside_N = torch.ones(len(node_NRK), dtype=torch.bool, device=node_NRK.device)
        before_NK = torch.zeros_like(node_NRK[:, 0])
        before_NK[:, 0] = 1.0
        for step in range(self.most + 1):
            after_NK = node_NRK[:, step] if step < self.most else torch.zeros_like(before_NK).index_fill(1, _last(before_NK), 1.0)
            self.moves_KK += (before_NK[inside_N].T @ after_NK[inside_N]).cpu().numpy()
            if step < self.most:
                self.step_RA[step] += after_NK[inside_N, 1:].sum(0).cpu().numpy()
                self._decisions(chance_NRA[inside_N, step], stays_N=block_NR[inside_N, step] > 0, free=step >= self.fewest)
                inside_N = inside_N & (block_NR[:, step] > 0)
            before_NK = after_NK
        for visited_NR in (block_NR, second_NR):
            self.visits_M += torch.bincount(visited_NR.flatten(), minlength=self.blocks + 1)[1:].cpu().numpy()
        taken_NX = torch.cat([block_NR, second_NR], dim=1).to(torch.int16).cpu().numpy()
        rows, counts = np.unique(taken_NX, axis=0, return_counts=True)
        self.paths.update({row.tobytes(): int(count) for row, count in zip(rows, counts, strict=True)})

    def _nodes(self, block_NR: Tensor, second_NR: Tensor, chance_NRA: Tensor) -> Tensor:
        """Return where each token is in each step (N, R, K): shares of one or two blocks, or OUT."""
        node_NRK = chance_NRA.new_zeros(*block_NR.shape, self.blocks + 2)
        likely_NR, other_NR = (
            chance_NRA.gather(-1, (of_NR - 1).clamp(min=0)[..., None])[..., 0] * (of_NR > 0) for of_NR in (block_NR, second_NR)
        )
        share_NR = torch.where(other_NR > 0, other_NR / (likely_NR + other_NR).clamp(min=1e-300), 0.0)
        out = self.blocks + 1
        node_NRK.scatter_(-1, torch.where(block_NR > 0, block_NR, out)[..., None], (1.0 - share_NR)[..., None])
        return node_NRK.scatter_add_(-1, torch.where(second_NR > 0, second_NR, out)[..., None], share_NR[..., None])

    def _decisions(self, chance_NA: Tensor, *, stays_N: Tensor, free: bool) -> None:
        """Add up the router's uncertainty about the next block where a token stays, and p(OUT) where it may leave."""
        among_NM = chance_NA[stays_N, :-1]
        among_NM = among_NM / among_NM.sum(-1, keepdim=True).clamp(min=1e-300)
        self.entropy -= float(torch.special.xlogy(among_NM, among_NM).sum())
        self.decisions += len(among_NM)
        if free:
            self.leaving += float(chance_NA[:, -1].sum())
            self.free += len(chance_NA)

    def to_dict(self) -> dict[str, Any]:
        """Return the map as `routes.json` holds it: nodes, transitions (row = from, column = to), load, choices by step, entropies."""
        moves = [[int(count) if count == int(count) else round(count, 3) for count in row] for row in self.moves_KK.tolist()]
        deciding_R = self.step_RA.sum(1, keepdims=True)
        return {
            "nodes": ["IN", *(f"B{block}" for block in range(1, self.blocks + 1)), "OUT"],
            "transitions": moves,
            "load": self._load().tolist(),
            "by_step": (self.step_RA / np.maximum(deciding_R, 1)).tolist(),
            "deciding": (deciding_R[:, 0] / max(float(deciding_R[0, 0]), 1.0)).tolist(),
            "entropy": self.entropy / max(self.decisions, 1),
            "load_entropy": self._load_entropy(),
        }

    def metrics(self) -> dict[str, float]:
        """Return the numbers that training logs of its batches, over all tokens."""
        moved_MM = self.moves_KK[1:-1, 1:-1]
        apart_MM = np.subtract.outer(np.arange(self.blocks), np.arange(self.blocks)).T  # to − from
        moves = max(float(moved_MM.sum()), 1.0)
        into_KM = self.moves_KK[:-1, 1:-1]
        distance_KM = 1 - self.position_KP[:-1] @ self.position_KP[1:-1].T
        share = np.array(list(self.paths.values()), dtype=float) / max(self.paths.total(), 1)
        return {
            "route/entropy": self.entropy / max(self.decisions, 1),
            "route/load_entropy": self._load_entropy(),
            "route/load_min": float(self._load().min() * self.blocks),
            "route/advance": float(moved_MM[apart_MM == 1].sum() / moves),
            "route/recur": float(moved_MM[apart_MM == 0].sum() / moves),
            "route/skip": float(moved_MM[apart_MM > 1].sum() / moves),
            "route/back": float(moved_MM[apart_MM < 0].sum() / moves),
            "route/location_distance": self._mean_distance(into_KM, distance_KM),
            "route/exit_probability": self.leaving / max(self.free, 1.0),
            "route/path_diversity": float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0,
        }

    def _mean_distance(self, into_KM: np.ndarray, distance_KM: np.ndarray) -> float:
        """Return how far a visited block is from where the token was, on average; 0 where blocks have no positions."""
        return float((into_KM * distance_KM).sum() / max(into_KM.sum(), 1.0)) if self.position_KP.shape[1] else 0.0

    def _load(self) -> np.ndarray:
        return np.asarray(self.visits_M / max(float(self.visits_M.sum()), 1.0))

    def _load_entropy(self) -> float:
        load_M = self._load()
        taken = load_M[load_M > 0]
        return float(-(taken * np.log(taken)).sum() / math.log(self.blocks)) if self.blocks > 1 else 1.0


def _last(node_NK: Tensor) -> Tensor:
    return torch.tensor([node_NK.shape[1] - 1], device=node_NK.device)
