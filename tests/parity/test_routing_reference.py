"""The routed model equals the slow one that takes one token, one step and one block at a time: routes, values and gradients in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import FRESH, ROUTED, Case, routed
from test_reference import precise
from torch import Tensor

from pathlm.models.brian import reference
from pathlm.models.brian.curriculum import Knobs
from pathlm.models.brian.pool import PoolRun
from pathlm.models.brian.reference_pool import Reading, read

# Shapes: T tokens, D width, R route steps, A actions (blocks, then OUT)

SMALL = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 20, "initializer_range": 0.4}
ROW = [5, 3, 9, 9, 1, 12, 7, 2]
LABELS = [5, 3, -100, 9, 1, 12, 7, 2]
DOCUMENTS = [4, 4, 4, 2, 2, 2, 2, 2]
BOTH = pytest.mark.parametrize("case", [replace(case, options=case.options | SMALL) for case in ROUTED], ids=str)
LONG = {"steps": "1…4 steps", "pool": "4 blocks", "position": "arc", "reader": "to both"}
LESSONS = "imitation balance selected_balance coverage cost location diversity exit exit_boundary z"
USUAL = {factor: LONG.get(factor, "") for factor in ("bias", "repeats", "router", "budget", "attention", "ends")} | LONG


def built(case: Case, dtype: torch.dtype = torch.float64) -> Any:
    """A model whose norms do not round to float32."""
    return precise(case.build(dtype))


def slowly(case: Case, model: Any, **options: Any) -> Reading:
    top_k = case.call.get("knobs", {}).get("top_k")
    return read(model, ROW, DOCUMENTS, **{"budget": case.call.get("budget"), "top_k": top_k} | options)


def quickly(model: Any, **options: Any) -> Any:
    return model(torch.tensor([ROW]), labels=torch.tensor([LABELS]), document_ids=torch.tensor([DOCUMENTS]), trace=True, **options)


def gradients(model: Any, value: Tensor) -> dict[str, Tensor]:
    """Of every parameter, zeros for those that `value` does not depend on."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found, strict=True)}


def routes_of(model: Any, trace: Any) -> list[list[tuple[int, ...]]]:
    """The trace's routes through the pool, as the slow model tells them."""
    config = model.config
    first = trace.block_BTS[0, :, config.pre_blocks : config.pre_blocks + config.max_route_steps]
    blocks = torch.stack((first - config.pre_blocks * (first > 0), trace.second_BTR[0] - config.pre_blocks * (trace.second_BTR[0] > 0)), -1)
    return [[tuple(b for b in step if b) for step in token if step[0]] for token in blocks.tolist()]


def agree(model: Any, fast: Any, slow: Reading) -> None:
    assert routes_of(model, fast.trace) == slow.routes
    torch.testing.assert_close(fast.logits[0], slow.logits_TV, rtol=0, atol=1e-10)
    loss = reference.cross_entropy(slow.logits_TV, LABELS)
    torch.testing.assert_close(fast.loss, loss, rtol=0, atol=1e-10)
    expected = gradients(model, loss)
    for name, grad in gradients(model, fast.loss).items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@BOTH
def test_routes_values_and_gradients_equal_those_of_the_reference(case: Case) -> None:
    model = built(case)
    fast, slow = quickly(model), slowly(case, model)
    agree(model, fast, slow)
    reached = {name for name, grad in gradients(model, fast.loss).items() if grad.abs().max() > 1e-9}
    counted = [route for route, label in zip(slow.routes, LABELS[1:], strict=False) if label != -100]
    used = {f"blocks.{model.config.pre_blocks + block - 1}." for route in counted for blocks in route for block in blocks}
    assert all(any(name.startswith(block) for name in reached) for block in used)
    two = model.config.route_top_k == 2 and "knobs" not in case.call
    assert ("pool.router.from_hidden.weight" in reached) == two, "two mixed blocks teach the router, one does not"
    if model.config.block_position != "none":
        assert "pool.out.weight" in reached
        assert any("adapters" in name for name in reached) == (model.config.block_position_to != "router")


@BOTH
def test_probabilities_equal_those_of_the_reference(case: Case) -> None:
    model = built(case)
    with torch.no_grad():
        trace, slow = quickly(model).trace, slowly(case, model)
    assert trace.probability_BTRA.shape == (1, len(ROW), model.config.max_route_steps, model.config.pool_blocks + 1)
    for mine_RA, traveller in zip(trace.probability_BTRA[0], slow.travellers, strict=True):
        steps = len(traveller.probability)
        torch.testing.assert_close(mine_RA[:steps].double(), torch.stack(traveller.probability), rtol=0, atol=1e-6)
        assert (mine_RA[steps:] == 0).all()


@BOTH
def test_tokens_leave_the_pool_as_they_do_in_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, run = [], PoolRun.run

    def spy(self: PoolRun, h_BTD: Tensor) -> Any:
        h_BTD, p_BTP = run(self, h_BTD)
        seen.append((h_BTD[0], p_BTP[0], self.records.left_N))
        return h_BTD, p_BTP

    monkeypatch.setattr(PoolRun, "run", spy)
    model = built(case)
    with torch.no_grad():
        quickly(model)
        slow = slowly(case, model)
    ((h_TD, p_TP, left_T),) = seen
    assert left_T.tolist() == [len(route) for route in slow.routes]
    torch.testing.assert_close(h_TD, torch.stack([t.h_D for t in slow.travellers]), rtol=0, atol=1e-10)
    if model.config.block_position != "none":
        torch.testing.assert_close(p_TP, torch.stack([t.p_P for t in slow.travellers]), rtol=0, atol=1e-10)


@BOTH
def test_the_gate_changes_no_value_and_gives_the_router_its_gradient(case: Case) -> None:
    model = built(case)
    without = quickly(model).logits
    knobs = replace(Knobs(**case.call.get("knobs", {})), gate=1.0)
    model._forward_pre_hooks.clear()
    model.train()
    fast = quickly(model, knobs=knobs, **_budget(case))
    assert torch.equal(fast.logits, without)
    agree(model, fast, slowly(case, model, gate=1.0))
    slope = gradients(model, fast.loss)["pool.router.from_hidden.weight"]
    assert slope.abs().max() > 1e-6 or model.config.pool_blocks == 1
    if (knobs.top_k or model.config.route_top_k) == 1:
        doubled = gradients(model, quickly(model, knobs=replace(knobs, gate=2.0), **_budget(case)).loss)
        for name in ("pool.router.from_hidden.weight", "blocks.0.down_proj.weight"):
            rate = 2 if "router" in name else 1
            torch.testing.assert_close(doubled[name], rate * gradients(model, quickly(model, knobs=knobs, **_budget(case)).loss)[name])


def _budget(case: Case) -> dict[str, float]:
    return {"budget": case.call["budget"]} if "budget" in case.call else {}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("position", ["arc", "none"])
def test_the_forced_path_is_that_of_the_reference_and_visits_every_block_once(position: str, training: bool) -> None:
    case = routed(USUAL | {"choice": "top-1", "position": position}, max_route_steps=5, **SMALL)
    model = built(case).train(training)
    fast, slow = quickly(model, knobs=Knobs(router_share=0.0)), slowly(case, model, forced=True)
    assert slow.routes == [[(1,), (2,), (3,), (4,)]] * len(ROW)
    agree(model, fast, slow)
    torch.testing.assert_close(fast.metrics["route/block_evaluations"].double(), torch.tensor(6.0, dtype=torch.float64))


@pytest.mark.parametrize("case", FRESH, ids=str)
@pytest.mark.parametrize("reader", ["router", "blocks", "state"])
@pytest.mark.parametrize("position", ["arc", "circle", "random", "none"])
def test_a_fresh_router_takes_the_original_path_and_positions_change_nothing(case: Case, position: str, reader: str) -> None:
    case = replace(case, options=case.options | SMALL | {"block_position": position, "block_position_to": reader, "block_position_dim": 8})
    model = built(case)
    fast, slow = quickly(model), slowly(case, model)
    agree(model, fast, slow)
    blocks, least = model.config.pool_blocks, model.config.min_route_steps
    assert all([visit[0] for visit in route][:blocks] == list(range(1, blocks + 1)) for route in slow.routes)
    assert all(len(route) == max(blocks, least) for route in slow.routes)


@torch.no_grad()
@pytest.mark.parametrize("reader", ["blocks", "state"])
def test_places_that_are_added_to_the_state_stay_there(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that add nothing show what else was added on the way B1 … B4: nothing, or what each adapter made of the place before."""
    model, seen, run = built(routed(USUAL | {"choice": "top-1", "reader": f"to {reader}"}, **SMALL)), [], PoolRun.run
    for block in model.blocks:
        block.out_proj.weight.zero_()
        block.down_proj.weight.zero_()

    def spy(self: PoolRun, h_BTD: Tensor) -> Any:
        seen.append((h_BTD, *run(self, h_BTD)))
        return seen[-1][1:]

    monkeypatch.setattr(PoolRun, "run", spy)
    quickly(model, knobs=Knobs(router_share=0.0))
    ((before_BTD, after_BTD, _),) = seen
    added_D = sum(adapter(place_P.double()) for adapter, place_P in zip(model.pool.adapters, model.pool.position[:4], strict=True))
    expected = before_BTD + added_D if reader == "state" else before_BTD
    torch.testing.assert_close(after_BTD, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("choice", ["top-1", "top-2"])
def test_ties_go_to_the_lowest_number(choice: str) -> None:
    """Where all scores are equal, so are all probabilities; the fast and the slow model must choose alike."""
    case = routed(USUAL | {"choice": choice, "repeats": "no repeats"}, **SMALL)
    model = built(case)
    with torch.no_grad():
        for p in model.pool.router.parameters():
            p.zero_()
        model.pool.load_bias.copy_(torch.tensor([0.0, 1.0, 1.0, 0.0]))
        model.pool.exit_threshold.fill_(-1.0)
    fast, slow = quickly(model), slowly(case, model)
    agree(model, fast, slow)
    expected = {"top-1": [(2,), (3,), (2,), (3,)], "top-2": [(2, 3), (3, 1), (2, 1), (3, 1)]}
    assert slow.routes == [expected[choice]] * len(ROW)


@BOTH
def test_the_metric_counts_the_blocks_that_ran(case: Case) -> None:
    """Counted three ways: by the fast model, by watching the parts of its blocks, and by the slow model."""
    model, ran = built(case), {"qkv_proj": 0, "down_proj": 0}

    def count(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...], __: Tensor) -> None:
            assert inputs[0].numel(), "a block ran for nobody"
            ran[name] += inputs[0][..., 0].numel()

        return hook

    for block in model.blocks:
        for name in ran:
            getattr(block, name).register_forward_hook(count(name))
    with torch.no_grad():
        metrics, slow = quickly(model).metrics, slowly(case, model)
    assert ran == dict.fromkeys(ran, slow.evaluations)
    assert metrics["route/block_evaluations"].item() == pytest.approx(slow.evaluations / len(ROW), rel=1e-6)
    steps = sum(map(len, slow.routes)) / len(ROW)
    assert metrics["route/steps_mean"].item() == pytest.approx(steps, rel=1e-6)


@BOTH
def test_all_that_can_be_taught_at_once_is_finite_whatever_is_legal(case: Case) -> None:
    """Half of the tokens follow a teacher, whose blocks the routes of the others may have made illegal."""
    model = case.build().train()
    model._forward_pre_hooks.clear()
    tokens = torch.tensor([ROW, ROW[::-1]])
    knobs = Knobs(
        router_share=0.5,
        pseudo=0.5,
        exit_share=0.5,
        budget=0.9,
        budget_spread=0.1,
        probe_share=0.3,
        noise=0.5,
        gate=1.0,
        **dict.fromkeys(LESSONS.split(), 1.0),
    )
    for _ in range(3):
        out = model(tokens, labels=tokens, knobs=knobs, trace=True)
        out.loss.backward()
        assert out.loss.isfinite() and all(value.isfinite() for value in out.metrics.values()), out.metrics
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        start = model.config.pre_blocks
        first = out.trace.block_BTS[..., start : start + model.config.max_route_steps]
        assert not ((first == out.trace.second_BTR) & (first > 0)).any(), "a token visits two different blocks"


@BOTH
def test_a_router_that_is_taught_changes_nothing_about_the_path_it_watches(case: Case) -> None:
    model = built(case)
    model._forward_pre_hooks.clear()
    with torch.no_grad():
        for training in (False, True):
            watched = quickly(model.train(training), knobs=Knobs(router_share=0.0, imitation=1.0))
            assert (watched.trace.second_BTR == 0).all()
            without = quickly(model, knobs=Knobs(router_share=0.0))
            assert torch.equal(watched.logits, without.logits)
