"""The cases themselves: they cover what can be combined, and their routes are worth comparing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from cases import BRANCHED, CASES, FACTORS, FRESH, GRAPHS, PLAIN, ROUTED, Case, covering, ids, pairs, possible
from checks import routes


def test_every_two_options_that_may_meet_do() -> None:
    met = {frozenset(pair) for row in covering() for pair in ((a, b) for a in row.items() for b in row.items() if a[0] < b[0])}
    assert set(pairs()) <= met
    assert len(met) > 300 and all(possible(row) and row.keys() == FACTORS.keys() for row in covering())
    assert len({str(case) for case in CASES}) == len(CASES) == sum(map(len, (PLAIN, ROUTED, BRANCHED, FRESH, GRAPHS)))


MOVING = [case for case in ROUTED if case.config().route_moves != "any"]
FREE = [case for case in ROUTED if case not in MOVING]


@torch.no_grad()
def taken(case: Case) -> list[list[int]]:
    """The blocks of the pool that tokens visited first, step by step."""
    model = case.build()
    start = model.config.pre_blocks
    paths = routes(model(ids(6), trace=True))[..., start : start + model.config.max_route_steps]
    return [[block - start for block in path if block] for path in paths.flatten(0, 1).tolist()]


@pytest.mark.parametrize("case", FREE, ids=str)
def test_tokens_of_a_case_take_different_routes_of_different_length(case: Case) -> None:
    config, paths = case.config(), taken(case)
    lengths = {len(path) for path in paths}
    assert min(lengths) >= config.min_route_steps and max(lengths) <= config.max_route_steps
    assert all(1 <= block <= config.pool_blocks for path in paths for block in path)
    if config.min_route_steps < config.max_route_steps and case.call.get("budget", 0) < 1:
        assert len(lengths) >= 2 and config.max_route_steps in lengths
    else:
        assert lengths == {config.max_route_steps}
    if config.pool_blocks > 1 and config.max_route_steps > 1:
        assert len({tuple(path) for path in paths}) >= 6
        assert len({block for path in paths for block in path}) >= min(3, config.pool_blocks)
    cap = config.max_repeats
    runs = [longest_run(path) for path in paths]
    assert not cap or max(runs) <= cap


@pytest.mark.parametrize("case", MOVING, ids=str)
def test_tokens_make_the_moves_that_are_made_and_no_others(case: Case) -> None:
    found, possible_paths = {tuple(path) for path in taken(case)}, set(every_path(case.config()))
    assert found <= possible_paths
    assert len(found) >= min(3, len(possible_paths)), f"{found} of {len(possible_paths)} paths: the case shows too little"


def every_path(config: Any) -> Iterator[tuple[int, ...]]:
    """All paths that a router which only recurs or only skips may take, told by looking at whole paths."""
    last, fewest = config.pool_blocks, config.min_route_steps
    for length in range(fewest, config.max_route_steps + 1):
        for path in product(range(1, last + 1), repeat=length):
            moves = [b - a for a, b in pairwise((0, *path))]
            if min(moves) >= 1 if config.route_moves == "skip" else moves[0] == 1 and {0, 1} >= set(moves):
                yield path


def longest_run(path: list[int]) -> int:
    longest = run = 1
    for before, after in pairwise(path):
        run = run + 1 if before == after else 1
        longest = max(longest, run)
    return longest


def test_blocks_are_repeated_where_that_is_allowed_and_caps_are_met() -> None:
    longest = {0: 0, 1: 0, 2: 0}
    for case in ROUTED:
        cap = case.config().max_repeats
        if case.config().pool_blocks > 1:
            longest[cap] = max(longest[cap], *(longest_run(path) for path in taken(case)))
    assert longest[0] >= 3 and longest[1] == 1 and longest[2] == 2


@torch.no_grad()
def test_a_budget_moves_the_length_of_routes() -> None:
    case = next(case for case in ROUTED if case.config().max_route_steps == 4 and case.config().route_top_k == 1 and not case.call)
    model = case.build()
    length = [float((model(ids(6), trace=True, budget=b).trace.block_BTS > 0).sum()) for b in (0.25, 0.4, 0.6, 0.8, 1.0)]
    assert length == sorted(length) and length[0] < length[2] < length[-1]


@pytest.mark.parametrize("case", FRESH, ids=str)
def test_a_fresh_case_takes_the_original_route(case: Case) -> None:
    blocks = list(range(1, case.config().pool_blocks + 1))
    assert all(path[: len(blocks)] == blocks for path in taken(case))
