"""Routers that may only recur or only skip: what ends a route, who teaches, what is measured. Routes and values: see the contract."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, ids
from checks import routes

from pathlm.models.brian import exits
from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.brian.curriculum import Knobs
from pathlm.models.brian.modeling import BrianForCausalLM
from pathlm.models.brian.pool import PoolRun, Records, StepRecord
from pathlm.models.brian.steering import pseudo_routes
from pathlm.models.brian.tracing import paths

# Shapes: R route steps, w watched tokens

MOVES = {"recur": {0, 1}, "skip": {1, 2, 3, 4, 5}}


def built(moves: str, **options: Any) -> Any:
    return Case("", "brian", {"pool_blocks": 5, "max_route_steps": 4, "route_moves": moves} | options).build()


def in_pool(model: Any, output: Any) -> list[list[int]]:
    """Every token's blocks of the pool, counted from 1."""
    start = model.config.pre_blocks
    first = routes(output)[..., start : start + model.config.max_route_steps].flatten(0, 1)
    return [[block - start for block in path if block] for path in first.tolist()]


class Letters:
    def decode(self, numbers: list[int]) -> str:
        return str(numbers[0])


@torch.no_grad()
def test_a_route_that_skips_ends_after_the_last_block_and_nobody_chose_that() -> None:
    model = built("skip")
    found = paths(model(ids(4), trace=True, budget=1.0), Letters())
    lengths = {len(path.route) for path in found}
    assert len(lengths) >= 3 and max(lengths) == model.config.max_route_steps
    for path in found:
        assert path.route[-1].node == f"block:{model.config.pre_blocks + 5}" or len(path.route) == model.config.max_route_steps
        out = path.steps[path.first + len(path.route)]
        assert (out.node, out.score, out.rivals) == ("exit", 1.0, ())


@torch.no_grad()
@pytest.mark.parametrize("moves", MOVES)
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_token_takes_as_many_steps_as_it_is_told(moves: str, depth: int) -> None:
    model, tokens = built(moves), ids(4)
    found = in_pool(model, model(tokens, trace=True, depths=torch.full_like(tokens, depth)))
    assert {len(path) for path in found} == {depth}
    assert {b - a for path in found for a, b in pairwise((0, *path))} <= MOVES[moves]


def test_depths_drawn_in_training_are_kept_and_other_tokens_follow_their_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, run = built("skip").train(), [], PoolRun.run

    def spy(self: PoolRun, h_BTD: Any) -> Any:
        result = run(self, h_BTD)
        seen.append((self.plan, self.records.left_N))
        return result

    monkeypatch.setattr(PoolRun, "run", spy)
    torch.manual_seed(0)
    model(ids(8), labels=ids(8), knobs=Knobs(random_depth=0.5, router_share=0.7, probe_share=0.2, budget=0.8, imitation=1.0, exit=1.0))
    ((plan, left_N),) = seen
    told = plan.depth_N <= 4
    assert torch.equal(left_N[told], plan.depth_N[told]) and len(plan.depth_N[told].unique()) == 4
    assert not (told & ~plan.driven_N).any() and not told[plan.watched].any()
    assert (left_N[~plan.driven_N] == 4).all(), "the old path is five blocks long, and cut after four steps"


@pytest.mark.parametrize("moves", MOVES)
def test_teachers_show_moves_that_are_made(moves: str) -> None:
    for blocks, steps in product(range(1, 7), range(1, 9)):
        if moves == "skip" and steps > blocks:
            continue
        for shortest in range(1, steps + 1):
            sizes = {"pool_blocks": blocks, "max_route_steps": steps, "min_route_steps": shortest}
            taught = pseudo_routes(Case("", "brian", sizes | {"route_moves": moves}).config()).tolist()
            shown = [[block for block in route if block < blocks] for route in taught]
            for route, path in zip(taught, shown, strict=True):
                assert path == route[: len(path)] and len(path) >= shortest, f"{route} of {sizes}"
                assert {b - a for a, b in pairwise((-1, *path))} <= MOVES[moves] | {6}, f"{path} of {sizes}"
            assert shown[1][:blocks] == list(range(min(blocks, steps))), "ordinary tokens keep to the old path"


def test_easy_and_hard_tokens_are_taught_other_routes_where_the_moves_allow_it() -> None:
    options = {"pool_blocks": 4, "max_route_steps": 4}
    taught = {moves: pseudo_routes(Case("", "brian", options | {"route_moves": moves}).config()).tolist() for moves in ("any", *MOVES)}
    assert taught == {
        "any": [[0, 2, 4, 4], [0, 1, 2, 3], [0, 1, 1, 2]],
        "recur": [[0, 1, 4, 4], [0, 1, 2, 3], [0, 1, 1, 2]],
        "skip": [[0, 2, 4, 4], [0, 1, 2, 3], [0, 1, 2, 3]],
    }


def step_record(place: list[int], gain: list[float]) -> StepRecord:
    nothing = torch.zeros(len(place), 1)
    return StepRecord(torch.tensor(place), nothing, torch.tensor(gain), nothing, nothing, nothing, nothing)


def test_the_gain_of_staying_is_learned_where_there_was_a_choice_and_against_the_last_step_of_the_route() -> None:
    """Token 3 takes three steps, token 8 two, so that nothing is decided of it after its second."""
    records = Records([step_record([3, 8], [9.0, 9.0]), step_record([3, 8], [0.5, -0.25]), step_record([3], [0.0])])
    loss_Rw = torch.tensor([[3.0, 2.0], [2.0, 1.5], [1.0, 1.5]])
    watched = torch.tensor([3, 8])
    gains = torch.tensor([3.0 - 1.0 - 0.2, 2.0 - 1.5 - 0.1, 2.0 - 1.0 - 0.1])  # each further step costs 0.1
    expected = torch.nn.functional.huber_loss(torch.tensor([0.5, -0.25, 0.0]), gains)
    for best in (False, True):
        value, predicted = exits.exit_loss(records, watched, loss_Rw, shortest=1, best=best, price=0.1)
        torch.testing.assert_close(value, expected)
        assert predicted.tolist() == [[0.5, -0.25], [0.0, -torch.inf]]
    ended = Records([step_record([3, 8], [9.0, 9.0]), step_record([5], [1.0])])
    value, _ = exits.exit_loss(ended, watched, loss_Rw[:2], shortest=1, best=False)
    assert value.item() == 0.0, "nothing was decided, nothing is learned"


def test_thresholds_hit_the_mean_number_of_steps_where_routes_end_early() -> None:
    """Half of the probes end after two of four steps: no threshold makes them take more, so the others' must be lower."""
    pool = built("skip").pool
    predicted_Sw = torch.randn(3, 4_000, generator=torch.Generator().manual_seed(0)).float()
    predicted_Sw[1:, ::2] = -torch.inf
    exits.move_thresholds(pool, predicted_Sw, budget=0.5, spread=0.0, rate=1.0)
    taken = (predicted_Sw.cummin(0).values >= pool.threshold(0.5)).float().sum(0) + 1
    assert taken.mean().item() == pytest.approx(0.5 * 4, abs=0.03)
    assert pool.exit_threshold.isfinite().all() and pool.gain_scale.item() == pytest.approx(1.0, abs=0.05)
    for _ in range(2):  # all routes over before the first choice: thresholds stay
        before = pool.exit_threshold.clone()
        exits.move_thresholds(pool, torch.full((1, 3), -torch.inf), budget=0.5, spread=0.0, rate=1.0)
        assert torch.equal(pool.exit_threshold, before)


def test_measured_tokens_whose_route_has_ended_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, run = built("skip").train(), [], PoolRun.run

    def spy(self: PoolRun, h_BTD: Any) -> Any:
        result = run(self, h_BTD)
        seen.append((self.plan.watched, self.records, result[0].flatten(0, 1)))
        return result

    monkeypatch.setattr(PoolRun, "run", spy)
    out = model(ids(4), labels=ids(4), knobs=Knobs(probe_share=1.0, exit=1.0, budget=0.7, exit_share=0.5, hindsight=True))
    out.loss.backward()
    ((watched, records, left_ND),) = seen
    lengths = records.left_N[watched]
    assert len(lengths.unique()) >= 2 and len(records.watched) == lengths.max()
    for step, (h_wD, _) in enumerate(records.watched, start=1):
        same = (h_wD == left_ND[watched]).all(-1)
        assert torch.equal(same, step >= lengths)
    assert out.loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_metrics_count_the_moves() -> None:
    found = {moves: built(moves)(ids(4), labels=ids(4)).metrics for moves in ("any", *MOVES)}
    share = {moves: {kind: metrics[f"route/{kind}"].item() for kind in ("advance", "recur", "skip")} for moves, metrics in found.items()}
    assert share["recur"]["skip"] == 0 < share["recur"]["recur"] and share["recur"]["advance"] + share["recur"]["recur"] == pytest.approx(1)
    assert share["skip"]["recur"] == 0 < share["skip"]["skip"] and share["skip"]["advance"] + share["skip"]["skip"] == pytest.approx(1)
    assert sum(share["any"].values()) < 1, "without limits some moves lead back"
    assert all(metrics["route/margin"].isfinite() for metrics in found.values()), "a single legal block is ahead of nothing"


@torch.no_grad()
def test_a_checkpoint_from_before_there_was_a_choice_of_moves_loads_as_it_was(tmp_path: Path) -> None:
    model = built("any")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("route_moves") == "any"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(BrianForCausalLM.from_pretrained(tmp_path).eval()(ids(2)).logits, model(ids(2)).logits)
    assert BrianConfig.from_pretrained(tmp_path).route_moves == "any"
