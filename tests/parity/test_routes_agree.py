"""In float32, every token takes the same route whether its row is read at once, in chunks, or token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, routed
from checks import routes
from test_routing_reference import USUAL

# Shapes: B rows, T tokens, R route steps, A actions (blocks, then OUT), L decisions

LENGTH = 256
SIZES = {"vocab_size": 500, "max_position_embeddings": LENGTH, "initializer_range": 0.08, "hidden_size": 64, "intermediate_size": 96}
CASES = {
    "top-1": routed(USUAL | {"choice": "top-1", "budget": "budget 0.8"}, **SIZES),
    "top-2": routed(USUAL | {"choice": "top-2", "budget": "budget 0.8", "attention": "grouped"}, **SIZES),
    "no position, no repeats, deep router": routed(
        USUAL | {"choice": "top-1", "position": "none", "repeats": "no repeats", "router": "deep router", "steps": "2…5 steps"}, **SIZES
    ),
}


def margins(trace: Any, wanted: int) -> torch.Tensor:
    """How far every decision was from another one, in units of the router's outputs (L,)."""
    probability_LA = trace.probability_BTRA[trace.probability_BTRA.sum(-1) > 0].double()
    exits = probability_LA[:, -1]
    free = (exits > 0) & (exits < 1)
    leaving = (exits[free].log() - (1 - exits[free]).log()).abs()
    stayed = probability_LA[exits < 0.5][:, :-1]
    ranked = stayed.sort(dim=-1, descending=True).values[:, : wanted + 1].clamp(min=1e-30).log()
    return torch.cat((leaving, (ranked[:, :-1] - ranked[:, 1:]).flatten()))


@torch.no_grad()
def disagreements(case: Case, rows: int) -> tuple[int, int, float]:
    """Tokens read, how many of them took another route in some way of reading, and the smallest margin of a decision."""
    model = case.build(torch.float32)
    tokens = torch.randint(1, SIZES["vocab_size"], (rows, LENGTH), generator=torch.Generator().manual_seed(3))
    whole = model(tokens, trace=True, use_cache=False)
    expected, wrong = routes(whole), torch.zeros(tokens.shape, dtype=torch.bool)
    lengths = (expected[..., 1 : 1 + model.config.max_route_steps] > 0).sum(-1)
    assert len(lengths.unique()) >= 3 and len(expected.flatten(0, 1).unique(dim=0)) >= 30, "routes worth comparing"
    for size in (1, 50):
        memory = None
        for start in range(0, LENGTH, size):
            out = model(tokens[:, start : start + size], past_key_values=memory, use_cache=True, trace=True)
            memory = out.past_key_values
            wrong[:, start : start + size] |= (routes(out) != expected[:, start : start + size]).any(-1)
    return tokens.numel(), int(wrong.sum()), float(margins(whole.trace, model.config.route_top_k).min())


@pytest.mark.parametrize("name", CASES)
def test_routes_agree_on_five_thousand_tokens(name: str) -> None:
    tokens, wrong, margin = disagreements(CASES[name], 20)
    assert tokens >= 5_000
    assert wrong == 0, f"{wrong} of {tokens} tokens; smallest margin {margin:.1e}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CASES)
def test_routes_agree_on_a_hundred_thousand_tokens(name: str, record_property: Any) -> None:
    tokens, wrong, margin = disagreements(CASES[name], 400)
    record_property("smallest margin", margin)
    print(f"{name}: {tokens} tokens, {wrong} on another route, smallest margin {margin:.1e}")
    assert tokens >= 100_000
    assert wrong == 0, f"{wrong} of {tokens} tokens; smallest margin {margin:.1e}"


def test_a_route_that_differs_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlm.models.brian.routing import RoutePool

    sound = RoutePool.scores

    def rough(self: Any, h_ND: torch.Tensor, p_NP: torch.Tensor, step: int, **options: Any) -> Any:
        return sound(self, h_ND.bfloat16().float() if len(h_ND) < 100 else h_ND, p_NP, step, **options)

    monkeypatch.setattr(RoutePool, "scores", rough)
    assert disagreements(CASES["top-1"], 20)[1] > 0


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_single_tokens_are_read_in_mixed_precision_too(rows: int) -> None:
    model, tokens = CASES["top-1"].build(torch.float32), torch.arange(1, 1 + rows)[:, None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        told, traced = model(tokens), model(tokens, trace=True)
    torch.testing.assert_close(told.logits, traced.logits)
