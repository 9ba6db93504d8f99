"""The released arithmetic: energies, losses and greedy continuations of the released code, by the reference and by the model."""

from __future__ import annotations

import pytest
import torch
from released import expected, model, needs_fixture
from torch import Tensor

from pathlm.models.brillm import reference

pytestmark = needs_fixture


@torch.no_grad()
def energies_of(kind: str) -> Tensor:
    built, tokens = model(), expected()["tokens"]
    if kind == "model":
        return built(tokens).logits[:, :-1]
    return torch.stack([reference.energies(built, row)[:-1] for row in tokens[:2].tolist()])


@pytest.mark.parametrize("kind", ["reference", "model"])
def test_energies_are_the_released_ones(kind: str) -> None:
    found = energies_of(kind)
    torch.testing.assert_close(found, expected()["energies"][: len(found)], rtol=0, atol=1e-5)


def test_the_reference_has_the_released_losses() -> None:
    energies, tokens = expected()["energies"], expected()["tokens"].tolist()
    terms = [reference.loss(energies[row], labels) for row, labels in enumerate(tokens)]
    assert float(torch.stack(terms).mean()) == pytest.approx(expected()["full_loss"], abs=1e-5)
    sampled = [
        reference.cross_entropy(energies[row, t], tokens[row][t + 1], pairs[:, 1].tolist())
        for row, steps in enumerate(expected()["sampled_candidates"])
        for t, pairs in enumerate(steps)
    ]
    assert float(torch.stack(sampled).mean()) == pytest.approx(expected()["sampled_loss"], abs=1e-5)


@torch.no_grad()
def test_the_model_has_the_released_losses() -> None:
    built, tokens = model(), expected()["tokens"]
    assert float(built(tokens, labels=tokens, skip_logits=True).loss) == pytest.approx(expected()["full_loss"], abs=1e-5)
    candidates = expected()["sampled_candidates"]
    assert torch.equal(candidates[..., 0, 1], tokens[:, 1:]) and torch.equal(candidates[..., 0], tokens[:, :-1, None].expand(-1, -1, 21))
    among = built(tokens).logits[:, :-1].gather(-1, candidates[..., 1])
    assert float((among.logsumexp(-1) - among[..., 0]).mean()) == pytest.approx(expected()["sampled_loss"], abs=1e-5)


@torch.no_grad()
def test_greedy_continuations_are_the_released_ones() -> None:
    built = model()
    assert len(expected()["generations"]) == 6
    for it in expected()["generations"]:
        prompt, wanted = it["prompt"], it["continuation"]
        out = built.generate(torch.tensor([prompt]), max_new_tokens=len(wanted), do_sample=False)
        assert out[0, len(prompt) :].tolist() == wanted


@torch.no_grad()
def test_the_reference_decodes_as_released() -> None:
    built = model()
    it = expected()["generations"][0]
    assert reference.greedy(built, it["prompt"], 4, decoding=True) == it["continuation"][:4]


@torch.no_grad()
def test_released_decoding_is_another_function_than_released_training_and_repeats_no_token() -> None:
    """Why `arithmetic="released"` alone is exempt from "stepwise = full": its decoding adds the vector of another position."""
    built, tokens = model(), expected()["tokens"]
    trained, decoded = built(tokens).logits, built(tokens, use_cache=True).logits
    assert (decoded.gather(-1, tokens[..., None]) == -torch.inf).all() and trained.isfinite().all()
    other = decoded.isfinite()
    assert (trained - decoded)[other].abs().max() > 0.1
    # What is decoded in pieces is what is decoded at once.
    memory, pieces = None, []
    for part in tokens.split(5, dim=1):
        out = built(part, past_key_values=memory, use_cache=True)
        memory = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), decoded, rtol=0, atol=1e-5)
