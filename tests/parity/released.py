"""The small model in the layout of the released checkpoints, and what the released code computes for it."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pathlm.models.brillm.configuration import BrillmConfig
from pathlm.models.brillm.edges import Edges
from pathlm.models.brillm.modeling import BrillmForCausalLM

SHARED = Path(os.environ.get("PATHLM_FIXTURES", Path(__file__).parents[2].parent / "shared" / "fixtures"))
FOLDER = SHARED / "brillm" / "released-tiny"

needs_fixture = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"the released fixture is not at {FOLDER}; name the folder that holds brillm/ in PATHLM_FIXTURES"
)


@cache
def expected() -> dict[str, Any]:
    return torch.load(FOLDER / "expected.pt", weights_only=True)


def model() -> BrillmForCausalLM:
    """The fixture's weights in a model of ours: edges are transposed, as ours are out × in."""
    weights = torch.load(FOLDER / "model.bin", weights_only=True)
    vocab = json.loads((FOLDER / "vocab.json").read_text(encoding="utf-8"))
    counts = json.loads((FOLDER / "word_frequency.json").read_text(encoding="utf-8"))
    pairs = [(vocab[a], vocab[b]) for a in vocab for b in vocab if counts[a][b] > 0]
    config = BrillmConfig(
        vocab_size=len(vocab), signal_size=8, arithmetic="released", positions="multiplied", trained_positions=weights["positions"].numel()
    )
    built = BrillmForCausalLM.from_edges(config, Edges.from_pairs(torch.tensor(pairs), len(vocab)))
    built.load_state_dict(
        {
            "graph.weight": weights["weights"].transpose(1, 2),
            "graph.bias": weights["biases"][:, 0],
            "graph.node_bias": weights["node_bias"][:, 0],
            "graph.position_weight": weights["positions"].flatten(),
            "graph.key": built.graph.key,
            "graph.start": built.graph.start,
        }
    )
    assert built.graph.edges.lookup(*torch.tensor(pairs).T).tolist() == list(range(1, len(pairs) + 1)), (
        "our order of rows is the released one"
    )
    return built.eval()
