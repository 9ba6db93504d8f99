"""Named sizes of BRIAN models, and what a size costs in parameters, operations and memory."""

from __future__ import annotations

from typing import Any

from pathlm.models.brian.configuration import BrianConfig

PLAIN = {"pool_blocks": 0, "max_route_steps": 0}
"""No routing. The blocks stand in pre and post as around the pool of the routed model of that size, which a pool would take its blocks from."""

PRESETS: dict[str, dict[str, Any]] = {
    # Minutes on two CPU cores.
    "plain-tiny": PLAIN
    | dict(
        vocab_size=4_096,
        hidden_size=128,
        intermediate_size=352,
        pre_blocks=2,
        post_blocks=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
    # The baselines of the routed models of 125, 350 and 1,000 million parameters.
    "plain-125m": PLAIN
    | dict(vocab_size=32_000, hidden_size=768, intermediate_size=2_048, pre_blocks=10, post_blocks=2, num_attention_heads=12),
    "plain-350m": PLAIN
    | dict(vocab_size=32_000, hidden_size=960, intermediate_size=2_560, pre_blocks=20, post_blocks=4, num_attention_heads=16),
    "plain-1b": PLAIN
    | dict(vocab_size=32_000, hidden_size=1_536, intermediate_size=4_096, pre_blocks=28, post_blocks=4, num_attention_heads=24),
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
