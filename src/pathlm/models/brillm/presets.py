"""Named sizes of BriLLM models, and what a size costs in parameters, operations and memory."""

from __future__ import annotations

from typing import Any

from pathlm.models.brillm.configuration import BrillmConfig

PRESETS: dict[str, dict[str, Any]] = {
    # Minutes on two CPU cores. The number of edges is that of an even graph; a run counts its own.
    "brillm-tiny": {"vocab_size": 1_024, "signal_size": 16, "edges": 60_000},
    # The published models: byte-level BPE, and Chinese characters; 5.7 % and about 13 % of all pairs.
    "brillm-en": {"vocab_size": 4_000, "signal_size": 32, "edges": 906_997, "trained_positions": 32},
    "brillm-zh": {"vocab_size": 4_001, "signal_size": 32, "edges": 2_072_000, "trained_positions": 32},
}
FROM_DATA: dict[str, Any] = {"edges": 0}
"""Fields that are not a preset's matter once there is data: edges are counted from it."""
FRESH = ("min_count", "initial_energies", "initializer_range")
"""Fields that say how a model is made, and nothing once it has weights."""


def flops_per_token(config: BrillmConfig, length: int) -> float:
    """Return the operations (two per multiply-add) of a forward pass per token; the length of the text does not matter.

    Counts matrix products: the edge that is taken, the shared edge, and the edges that leave a node, on average over nodes. Frequent
    tokens have more of them.
    """
    return 2 * config.signal_size**2 * (2 + config.edges / config.vocab_size)


def cache_numbers_per_token(config: BrillmConfig) -> int:
    """Return how many numbers the memory keeps for each token: none, as the whole text is one signal of `signal_size` numbers."""
    return 0
