"""Tokens that take several ways at once: equal to the slow model, never more ways than allowed, and with one way the greedy route."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BRANCHED, LENGTH, ROUTED, Case, ids
from checks import counting, routes
from test_reference import precise
from test_routing_reference import DOCUMENTS, LABELS, ROW, SMALL, gradients, quickly, routes_of

from pathlm.evaluate.checkpoint import open_model
from pathlm.models.brian import reference
from pathlm.models.brian.beam import BeamRun
from pathlm.models.brian.curriculum import Knobs
from pathlm.models.brian.reference_beam import read

TINY = [replace(case, options=case.options | SMALL) for case in BRANCHED]
GREEDY = [case for case in ROUTED if case.options.get("route_top_k", 1) == 1]


@pytest.mark.parametrize("case", TINY, ids=str)
def test_values_gradients_and_the_best_routes_equal_those_of_the_reference(case: Case) -> None:
    model = precise(case.build())
    fast = quickly(model)
    slow = read(model, ROW, DOCUMENTS, beams=model.config.route_beams, budget=case.call.get("budget"))
    torch.testing.assert_close(fast.logits[0], slow.logits_TV, rtol=0, atol=1e-10)
    assert routes_of(model, fast.trace) == [branches[0].route for branches in slow.branches]
    assert all(1 <= len(branches) <= model.config.route_beams for branches in slow.branches)
    assert fast.metrics["route/branches"].item() == pytest.approx(sum(map(len, slow.branches)) / len(ROW))
    assert fast.trace.visits_BT.sum().item() == slow.visits
    ordinary = model.config.pre_blocks + model.config.post_blocks
    assert fast.metrics["route/block_evaluations"].item() == pytest.approx(ordinary + slow.visits / len(ROW))
    loss = reference.cross_entropy(slow.logits_TV, LABELS)
    expected, found = gradients(model, loss), gradients(model, fast.loss)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    merged = model.config.beam_merge == "softmax"
    assert (found["pool.router.from_hidden.weight"].abs().max() > 1e-9) == merged, "branches that are mixed teach the router"


@torch.no_grad()
@pytest.mark.parametrize("case", GREEDY, ids=str)
def test_one_branch_takes_the_greedy_route(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = case.build(), ids(3)
    greedy = model(tokens, trace=True)
    runs = []

    def one_branch(pool: Any, blocks: Any, around: Any, plan: Any) -> BeamRun:
        runs.append(BeamRun(pool, blocks, around, plan, beams=1))
        return runs[-1]

    monkeypatch.setattr("pathlm.models.brian.travel.PoolRun", one_branch)
    alone = model(tokens, trace=True)
    assert runs and torch.equal(routes(alone), routes(greedy))
    torch.testing.assert_close(alone.logits, greedy.logits, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2, 3, 4])
def test_the_branches_are_never_more_than_allowed(beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, most = BRANCHED[1].build(), []
    visit = BeamRun._visit_all

    def spy(self: BeamRun, state: Any, action_Nb: Any, step: int) -> Any:
        most.append(int((~state.score.isneginf()).sum(-1).max()))
        return visit(self, state, action_Nb, step)

    monkeypatch.setattr(BeamRun, "_visit_all", spy)
    with counting(model) as counts:
        model(ids(4), route_beams=beams)
    assert all(count <= beams for count in most) and max(most, default=1) == beams
    in_pool = sum(counts[model.config.pre_blocks : -model.config.post_blocks])
    assert in_pool <= 4 * LENGTH * beams * model.config.max_route_steps


def test_in_a_share_of_training_passes_tokens_take_one_way_and_are_measured() -> None:
    model, found = BRANCHED[0].build().train(), []
    knobs = Knobs(route_beams=2, beam_share=0.5, probe_share=0.5, exit=0.1, budget=0.7)
    torch.manual_seed(3)
    for _ in range(12):
        metrics = model(ids(2), labels=ids(2), knobs=knobs).metrics
        found.append(("route/branches" in metrics, "loss/exit" in metrics))
    assert set(found) == {(True, False), (False, True)}
    model.eval()
    assert all("route/branches" in model(ids(2), labels=ids(2), knobs=knobs).metrics for _ in range(4))


@torch.no_grad()
def test_the_number_of_branches_is_the_calls_or_the_knobs_or_the_configurations() -> None:
    model, tokens = BRANCHED[0].build(), ids(2)
    two = model(tokens).logits
    one, four = (model(tokens, route_beams=n).logits for n in (1, 4))
    assert not torch.allclose(one, two) and not torch.allclose(four, two)
    assert torch.equal(model(tokens, knobs=Knobs(route_beams=4)).logits, four)
    with pytest.raises(ValueError, match="route_beams=0: must be at least 1"):
        model(tokens, route_beams=0)
    with pytest.raises(ValueError, match="route_beams=2: a plain decoder has no pool"):
        Case("", "brian").build()(tokens, route_beams=2)
    with pytest.raises(ValueError, match="route_beams=2: needs route_top_k=1"):
        Case("", "brian", {"pool_blocks": 2, "max_route_steps": 2, "route_top_k": 2}).build()(tokens, route_beams=2)
    with pytest.raises(ValueError, match=r"depths: .*branches"):
        model(tokens, depths=torch.ones_like(tokens))


def test_branches_can_be_asked_for_where_a_saved_model_is_opened(tmp_path: Path) -> None:
    model = Case("", "brian", {"pool_blocks": 2, "max_route_steps": 2}).build()
    model.save_pretrained(tmp_path / "routed")
    opened, _ = open_model(tmp_path / "routed", branches=3)
    assert opened.config.route_beams == 3
    Case("", "brillm").build().save_pretrained(tmp_path / "graph")
    with pytest.raises(ValueError, match="branches=2: a BrillmForCausalLM has no pool"):
        open_model(tmp_path / "graph", branches=2)


@pytest.mark.parametrize(
    "memory", [{}, {"left_rows": "refreshed"}, {"memory": "canonical"}, {"memory": "local+canonical", "local_window": 2}], ids=str
)
def test_branches_train_and_are_remembered_in_mixed_precision(memory: dict[str, Any]) -> None:
    case = Case("", "brian", BRANCHED[0].options | {"max_route_steps": 4, "route_beams": 2} | memory)
    model, tokens = case.build().float(), ids(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(tokens, labels=tokens).loss
        loss.backward()
        with torch.no_grad():
            for beams in (1, 2):
                whole = model.eval()(tokens, route_beams=beams).logits
                first = model(tokens[:, :-1], route_beams=beams, use_cache=True)
                last = model(tokens[:, -1:], route_beams=beams, past_key_values=first.past_key_values).logits
                torch.testing.assert_close(last.float(), whole[:, -1:].float(), rtol=0.1, atol=0.1)
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
