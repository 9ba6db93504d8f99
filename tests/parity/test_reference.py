"""The fast model equals the slow one, and every hand-written gradient the automatic one: values and gradients, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pathlm.models import layers
from pathlm.models.brian import reference
from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.brian.modeling import BrianForCausalLM
from pathlm.models.fused import NormedLinear, NormedMlp, RootMeanSquare, SplitAndTurn
from pathlm.models.losses import IGNORE, linear_cross_entropy

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries": {"num_key_value_heads": 2},
    "tied head": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3 rotary": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        }
    },
}
ROW = [5, 3, 9, 9, 1, 12, 7]
LABELS = [5, 3, IGNORE, 9, 1, 12, 7]
DOCUMENTS = [4, 4, 4, 2, 2, 2, 2]


def model(**options: Any) -> BrianForCausalLM:
    """A model whose norms do not round to float32, as Llama's do: the equation itself."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "pre_blocks": 1, "post_blocks": 1}
    return precise(BrianForCausalLM(BrianConfig(**sizes | {"initializer_range": 0.4} | options)).double())


def precise(built: Any) -> Any:
    """Let norms be computed in float64, and have weights that are not one."""
    for module in built.modules():
        if isinstance(module, layers.RMSNorm):
            module.statistics = torch.float64
            torch.nn.init.normal_(module.weight, mean=1.0, std=0.2)
    return built


def gradients(built: torch.nn.Module, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*built.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters), strict=True))


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "two documents"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_model_equals_its_reference(options: dict[str, Any], documents: list[int] | None) -> None:
    built = model(**options)
    extra = {} if documents is None else {"document_ids": torch.tensor([documents])}
    fast = built(torch.tensor([ROW]), labels=torch.tensor([LABELS]), **extra)
    torch.testing.assert_close(fast.logits[0], reference.logits(built, ROW, documents), rtol=0, atol=1e-10)
    slow = reference.loss(built, ROW, LABELS, documents)
    torch.testing.assert_close(fast.loss, slow, rtol=0, atol=1e-10)
    expected = gradients(built, slow)
    for name, grad in gradients(built, fast.loss).items():
        assert expected[name].abs().max() > 1e-6, name
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-10)


def test_recomputed_activations_and_automatic_gradients_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    built, ids = model(num_key_value_heads=2).train(), torch.tensor([ROW])
    expected = gradients(built, built(ids, labels=ids).loss)
    built.set_activation_checkpointing(True)
    recomputed = gradients(built, built(ids, labels=ids, skip_logits=True).loss)
    monkeypatch.setattr(layers, "by_hand", lambda x: False)
    automatic = gradients(built, built(ids, labels=ids).loss)
    for name, grad in expected.items():
        torch.testing.assert_close(recomputed[name], grad, rtol=0, atol=1e-12)
        torch.testing.assert_close(automatic[name], grad, rtol=0, atol=1e-12)


def test_the_norm_by_hand_has_the_automatic_gradient() -> None:
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 8), (8,)))
    torch.testing.assert_close(RootMeanSquare.apply(x, weight, 1e-3), F.rms_norm(x, (8,), weight, 1e-3))
    assert torch.autograd.gradcheck(lambda x, w: RootMeanSquare.apply(x, w, 1e-3), (x, weight))


@pytest.mark.parametrize("rows", [1, 2])
def test_turning_by_hand_has_the_automatic_gradient(rows: int) -> None:
    joined = torch.randn(2, 3, 4 + 2 * 2, 6, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(rows, 3, 1, 3, dtype=torch.float64)
    cos, sin = torch.cat((angle.cos(),) * 2, -1), torch.cat((-angle.sin(), angle.sin()), -1)
    query, key, value = SplitAndTurn.apply(joined, cos, sin, 4)
    torch.testing.assert_close(torch.cat((query, key), 1).transpose(1, 2), layers.rotate(joined[:, :, :6], cos, sin))
    torch.testing.assert_close(value.transpose(1, 2), joined[:, :, 6:])
    assert torch.autograd.gradcheck(lambda j: SplitAndTurn.apply(j, cos, sin, 4), (joined,))


@pytest.mark.parametrize("piece", [1, 40, 10_000], ids=["row by row", "three rows", "at once"])
def test_the_loss_in_pieces_has_the_automatic_gradient(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathlm.models.losses.PIECE", piece)
    h, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 4), (13, 4)))
    target = torch.tensor([0, 12, IGNORE, 5, 5, IGNORE, 1])
    fast, slow = 3 * linear_cross_entropy(h, weight, target), 3 * F.cross_entropy(h @ weight.T, target, reduction="sum")
    torch.testing.assert_close(fast, slow)
    for mine, theirs in zip(torch.autograd.grad(fast, (h, weight)), torch.autograd.grad(slow, (h, weight)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_negative_label_other_than_the_ignored_one_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        linear_cross_entropy(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([1, -1]))


def test_second_derivatives_of_hand_written_steps_are_refused_not_wrong() -> None:
    x, weight = torch.randn(2, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    (slope,) = torch.autograd.grad(RootMeanSquare.apply(x, weight, 1e-6).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_a_micro_batch_without_labels_costs_nothing_and_moves_nothing() -> None:
    mine = model()
    out = mine(torch.tensor([ROW]), labels=torch.full((1, 7), IGNORE))
    assert out.loss == 0 and out.logits.isfinite().all()
    out.loss.backward()
    assert all((p.grad == 0).all() for p in mine.parameters())


def test_the_loss_in_bfloat16_is_that_of_float32_to_its_precision() -> None:
    torch.manual_seed(0)
    h, weight, target = torch.randn(64, 32), torch.randn(97, 32) * 0.1, torch.randint(0, 97, (64,))
    exact = linear_cross_entropy(h, weight, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = linear_cross_entropy(h, weight, target)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=1e-2, atol=0)
    low = linear_cross_entropy(h.bfloat16(), weight.bfloat16(), target)
    torch.testing.assert_close(low, exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("biased", [False, True])
def test_frugal_layers_have_the_automatic_values_and_gradients(biased: bool) -> None:
    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(0)
    x, norm, wide, narrow = drawn(3, 4), drawn(4), drawn(10, 4), drawn(4, 5)
    wide_bias, narrow_bias = (drawn(10), drawn(4)) if biased else (None, None)
    joined = F.linear(F.rms_norm(x, (4,), norm, 1e-3), wide, wide_bias)
    torch.testing.assert_close(NormedLinear.apply(x, norm, 1e-3, wide, wide_bias), joined)
    gate, up = joined.chunk(2, dim=-1)
    given = (x, norm, wide, wide_bias, narrow, narrow_bias)
    torch.testing.assert_close(NormedMlp.apply(*given[:2], 1e-3, *given[2:]), F.linear(F.silu(gate) * up, narrow, narrow_bias))
    assert torch.autograd.gradcheck(lambda x, n, *rest: NormedLinear.apply(x, n, 1e-3, *rest), given[:4])
    assert torch.autograd.gradcheck(lambda x, n, *rest: NormedMlp.apply(x, n, 1e-3, *rest), given)
