"""The Triton kernels of signal graphs compute what the equations say: on a GPU where there is one, elsewhere interpreted."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is imported
pytest.importorskip("triton", reason="Triton is not installed")

from pathlm.config import OptimConfig
from pathlm.generate import generate
from pathlm.models import native
from pathlm.models.brillm import fused, reference
from pathlm.models.brillm.configuration import BrillmConfig
from pathlm.models.brillm.edges import Edges
from pathlm.models.brillm.modeling import BrillmForCausalLM
from pathlm.models.brillm.optim import param_groups
from pathlm.train import parallel
from pathlm.train.optim import adamw

NODES = 13
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for the GPU here")
compiled = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WHERE = [pytest.param("cpu", marks=interpreted, id="interpreted"), pytest.param("cuda", marks=compiled, id="compiled")]


@pytest.fixture(params=WHERE)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels run. The interpreter runs one program after the other, so there are fewer of them."""
    if request.param == "cpu":
        from pathlm.models.brillm import triton_kernels

        monkeypatch.setattr(triton_kernels, "_share", lambda positions: 2)
        monkeypatch.setattr(native, "available", lambda: False)
        monkeypatch.setattr(fused, "on_gpu", lambda *_: True)
    where: str = request.param
    return where


def model(kind: torch.dtype = torch.float64, **options: Any) -> BrillmForCausalLM:
    """A graph whose node 0 has no edges of its own, node 3 all, and the others a few."""
    torch.manual_seed(1)
    config = BrillmConfig(**{"vocab_size": NODES, "signal_size": 12, "trained_positions": 6} | options)
    pairs = [(u, v) for u in range(1, NODES) for v in range(NODES) if u == 3 or (u * v + u) % 4 == 0]
    return BrillmForCausalLM.from_edges(config, Edges.from_pairs(torch.tensor(pairs), NODES)).to(kind).train()


def batch(seed: int = 0) -> Tensor:
    """Rows of tokens; token 5 stands at more positions than a program takes at a time."""
    ids = torch.randint(0, NODES, (3, 13), generator=torch.Generator().manual_seed(seed))
    ids[:, ::2] = 5
    return ids


def without(call: Any) -> Any:
    """The call by tensors alone."""
    real, fused.on_gpu = fused.on_gpu, lambda *_: False
    try:
        return call()
    finally:
        fused.on_gpu = real


@torch.no_grad()
@pytest.mark.parametrize(("kind", "width"), [(torch.float64, 12), (torch.float64, 16), (torch.float32, 12)], ids=str)
@pytest.mark.parametrize("alone", [0, 1000], ids=["by products", "one by one"])
def test_energies_are_those_of_the_equations(
    device: str, kind: torch.dtype, width: int, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pathlm.models.brillm import triton_kernels

    monkeypatch.setattr(triton_kernels, "ALONE", alone)
    built, ids = model(kind, signal_size=width).eval(), batch()
    expected = torch.stack([reference.energies(built, row.tolist()) for row in ids])
    found = built.to(device)(ids.to(device)).logits.cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCES[kind])


@torch.no_grad()
@pytest.mark.parametrize("pairs", [[], [(0, 0)]], ids=["no edges", "one edge"])
def test_graphs_of_hardly_any_edges_have_energies(device: str, pairs: list[tuple[int, int]]) -> None:
    torch.manual_seed(1)
    edges = Edges.from_pairs(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2), 3)
    built = BrillmForCausalLM.from_edges(BrillmConfig(vocab_size=3, signal_size=4), edges).double().eval()
    expected = reference.energies(built, [0, 0, 2])
    torch.testing.assert_close(built.to(device)(torch.tensor([[0, 0, 2]], device=device)).logits[0].cpu(), expected)


def stepped(kind: torch.dtype, device: str, options: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """The loss and clipped norm of a training step, and the weights and moments after it."""
    built, optim = model(kind, **options).to(device), OptimConfig(lr=0.02, weight_decay=0.1)
    optimizer = adamw(param_groups(built, optim), optim)
    ids = batch().to(device)
    output = built(ids, labels=ids, skip_logits=True, generator=torch.Generator(device).manual_seed(3))
    output.loss.backward()
    told = [float(output.loss.detach()), float(output.metrics["energy/target_probability"]), float(parallel.clip(built, 0.5))]
    optimizer.step()
    state = dict(built.named_parameters())
    for name in ("graph.weight", "graph.bias"):
        state |= {f"{name} {key}": value for key, value in optimizer.state[state[name]].items()}
    return told, state


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.float64, {}),
        (torch.float64, {"train_shared": False}),
        (torch.float64, {"rivals": 4}),
        (torch.float64, {"signal_size": 16, "context": "chain"}),
        (torch.float32, {}),
    ],
    ids=str,
)
def test_training_steps_are_those_of_tensors(device: str, kind: torch.dtype, options: dict[str, Any]) -> None:
    mine, found = stepped(kind, device, options)
    theirs, expected = without(lambda: stepped(kind, device, options))
    tolerance = 1e-10 if kind == torch.float64 else 2e-4
    assert mine == pytest.approx(theirs, rel=tolerance)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_decoding_writes_the_same_tokens(device: str) -> None:
    built, prompts = model().eval().to(device), [[5, 9], [1], [3, 3, 7, 0, 2]]
    mine = generate(built, prompts, max_new_tokens=4, temperature=0)
    assert mine == without(lambda: generate(built, prompts, max_new_tokens=4, temperature=0))
