"""Named sizes of BRIAN models, and what a size costs in parameters, operations and memory."""

from __future__ import annotations

from typing import Any

from pathlm.models.brian.configuration import BrianConfig


def _plain(width: int, *, blocks: tuple[int, int], heads: int, hidden: int, **others: Any) -> dict[str, Any]:
    """Return the fields of a plain decoder. Its blocks stand before and after the place where the routed model of its size has a pool."""
    sizes = {"hidden_size": width, "intermediate_size": hidden, "num_attention_heads": heads, "vocab_size": 32_000}
    return sizes | {"pre_blocks": blocks[0], "pool_blocks": 0, "post_blocks": blocks[1], "max_route_steps": 0} | others


PRESETS: dict[str, dict[str, Any]] = {
    # Minutes on two CPU cores.
    "plain-tiny": _plain(128, blocks=(2, 2), heads=4, hidden=352, vocab_size=4_096, max_position_embeddings=512, tie_word_embeddings=True),
    # The baselines of the routed models of 125, 350 and 1,000 million parameters.
    "plain-125m": _plain(768, blocks=(10, 2), heads=12, hidden=2_048),
    "plain-350m": _plain(960, blocks=(20, 4), heads=16, hidden=2_560),
    "plain-1b": _plain(1_536, blocks=(28, 4), heads=24, hidden=4_096),
}


def flops_per_token(config: BrianConfig, length: int) -> float:
    """Return the operations (two per multiply-add) of a forward pass per token, averaged over rows of `length` tokens.

    Counts matrix products: projections, causal attention over (length + 1) / 2 tokens on average, and the head. The embedding is a look-up.
    """
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert groups is not None and width is not None
    projections = config.hidden_size * (2 * heads + 2 * groups) * width + 3 * config.hidden_size * config.intermediate_size
    attention = 2 * heads * width * (length + 1) / 2
    return 2 * (config.num_hidden_layers * (projections + attention) + config.hidden_size * config.vocab_size)


def cache_numbers_per_token(config: BrianConfig) -> int:
    """Return how many numbers the memory keeps for each token."""
    assert config.num_key_value_heads is not None and config.head_dim is not None
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
