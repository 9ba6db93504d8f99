"""Twelve training losses per model, written down: numbers change by decision only. On a mismatch the message holds the new losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pathlm.config import OptimConfig
from pathlm.models import family
from pathlm.models.layers import RMSNorm
from pathlm.models.library import build, preset

GOLDEN = {
    "brian-plain": (
        "plain-tiny",
        {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2, "pre_blocks": 2, "post_blocks": 2},
    ),
}


def losses(name: str, overrides: dict[str, int]) -> list[float]:
    """Train twelve steps in float64 on packed rows with two documents each."""
    torch.manual_seed(0)
    model = build(preset(name, **overrides)).double().train()
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.statistics = torch.float64
    optimizer = torch.optim.AdamW(family(model.config.model_type).param_groups(model, OptimConfig()), lr=3e-3, betas=(0.9, 0.95))
    result = []
    for step in range(12):
        rows = torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(step))
        rows[:, 1::2] = rows[:, ::2] // 2  # something to learn
        documents = torch.arange(24).expand(4, 24) // torch.tensor([[24], [9], [17], [20]])
        labels = rows.masked_fill(torch.cat((torch.ones(4, 1), documents.diff(dim=1)), 1).bool(), -100)
        loss = model(rows, labels=labels, document_ids=documents, skip_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        result.append(loss.item())
    return result


@pytest.mark.parametrize("name", GOLDEN)
def test_twelve_training_losses_are_what_they_were(name: str) -> None:
    written = (Path(__file__).parent / f"{name}.txt").read_text().split()
    assert [f"{loss:.6f}" for loss in losses(*GOLDEN[name])] == written
