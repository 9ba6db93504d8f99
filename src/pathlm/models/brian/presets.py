"""Named sizes of BRIAN models, and what a size costs in parameters, operations and memory."""

from __future__ import annotations

from typing import Any

from pathlm.models.brian.configuration import BrianConfig


def _plain(width: int, *, blocks: tuple[int, int], heads: int, hidden: int, **others: Any) -> dict[str, Any]:
    """Return the fields of a plain decoder. Its blocks stand before and after the place where the routed model of its size has a pool."""
    sizes = {"hidden_size": width, "intermediate_size": hidden, "num_attention_heads": heads, "vocab_size": 32_000}
    return sizes | {"pre_blocks": blocks[0], "pool_blocks": 0, "post_blocks": blocks[1], "max_route_steps": 0} | others


def _routed(
    width: int, *, blocks: tuple[int, int, int], heads: int, hidden: int, steps: int, position: int, **others: Any
) -> dict[str, Any]:
    """Return the fields of a routed model, whose plain baseline has as many blocks."""
    pre, pool, post = blocks
    pool_fields = {"pool_blocks": pool, "max_route_steps": steps, "block_position_dim": position}
    return _plain(width, blocks=(pre, post), heads=heads, hidden=hidden, **others) | pool_fields


PRESETS: dict[str, dict[str, Any]] = {
    # Minutes on two CPU cores.
    "plain-tiny": _plain(128, blocks=(5, 1), heads=4, hidden=352, vocab_size=4_096, max_position_embeddings=512, tie_word_embeddings=True),
    # The baselines of the routed models of 125, 350 and 1,000 million parameters.
    "plain-125m": _plain(768, blocks=(10, 2), heads=12, hidden=2_048),
    "plain-350m": _plain(960, blocks=(20, 4), heads=16, hidden=2_560),
    "plain-1b": _plain(1_536, blocks=(28, 4), heads=24, hidden=4_096),
    # Each with as many blocks as its plain baseline, some of them in a pool.
    "brian-tiny": _routed(
        128,
        blocks=(1, 4, 1),
        heads=4,
        hidden=352,
        steps=4,
        position=16,
        vocab_size=4_096,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
    "brian-r125": _routed(768, blocks=(2, 8, 2), heads=12, hidden=2_048, steps=8, position=64),
    "brian-r350": _routed(960, blocks=(4, 16, 4), heads=16, hidden=2_560, steps=16, position=128),
    "brian-r1b": _routed(1_536, blocks=(4, 24, 4), heads=24, hidden=4_096, steps=24, position=128),
}

FROM_DATA: dict[str, Any] = {}
"""Fields of the configuration that data decide, besides the vocabulary: none."""
FRESH: tuple[str, ...] = ()
"""Fields that say nothing once there are weights: none, as parts that earlier ones lack are drawn by `initializer_range`."""


def flops_per_token(config: BrianConfig, length: int) -> float:
    """Return the operations (two per multiply-add) of a forward pass per token, averaged over rows of `length` tokens.

    Counts matrix products: projections, causal attention over (length + 1) / 2 tokens on average, the router, and the head. The embedding
    is a look-up. In a pool every token is taken to use all its route steps; one that leaves early costs less.
    """
    own, code_reader = _block(config, length, config.attention_window), _code_reader(config, length)
    posts = config.post_blocks * (code_reader if config.post_memory == "canonical" else own)
    pool: float = 0
    if config.pool_blocks:
        seen, hidden = config.block_position_dim, config.router_hidden
        router = (config.hidden_size + seen) * (hidden or config.pool_blocks + 1) + hidden * (config.pool_blocks + 1)
        pool = config.max_route_steps * (config.route_top_k * flops_per_visit(config, length) / 2 + router)
    return 2 * (config.pre_blocks * own + posts + pool + config.hidden_size * config.vocab_size)


def flops_per_visit(config: BrianConfig, length: int) -> float:
    """Return the operations of one token's visit to one block of the pool, averaged over rows of `length` tokens."""
    visit = _code_reader(config, length) if config.memory == "canonical" else _block(config, length, config.local_window)
    if config.memory == "local+canonical" and config.local_window:
        far = max(_seen(config.code_window, (length + 1) / 2) - config.local_window, 0)
        visit += _asking(config) + config.num_attention_heads * (config.code_width + config.code_row_width) * far
    return 2 * (visit + config.block_position_dim * config.hidden_size * config.blocks_see_position)


def _block(config: BrianConfig, length: int, window: int) -> float:
    """Return the multiply-adds of a block that reads rows of the newest `window` tokens; 0 is all."""
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert groups is not None and width is not None
    read = 2 * heads * width * _seen(window, (length + 1) / 2)
    return config.hidden_size * (2 * heads + 2 * groups) * width + read + 3 * config.hidden_size * config.intermediate_size


def _code_reader(config: BrianConfig, length: int) -> float:
    """Return the multiply-adds of a block that reads codes: it makes queries only."""
    heads, width = config.num_attention_heads, config.head_dim
    assert width is not None
    read = heads * (config.code_width + config.code_row_width) * _seen(config.code_window, (length + 1) / 2)
    return config.hidden_size * 2 * heads * width + 3 * config.hidden_size * config.intermediate_size + _asking(config) + read


def _asking(config: BrianConfig) -> float:
    """Return the multiply-adds of asking in the codes' space, and of translating what was read."""
    heads, width = config.num_attention_heads, config.head_dim
    assert width is not None
    translating = config.code_width * width * (1 + (config.code_delta_rank > 0) * config.code_delta_rank / width)
    return 2 * heads * (translating + config.code_keys * width)


def _seen(window: int, whole: float) -> float:
    return min(float(window), whole) if window else whole


def cache_numbers_per_token(config: BrianConfig) -> int:
    """Return how many numbers the memory keeps for each token of a long text.

    Keys and values per block outside the pool, per route step of the pool's rows, and a code; nothing where a window lets old tokens go.
    """
    assert config.num_key_value_heads is not None and config.head_dim is not None
    tables = 0 if config.attention_window else config.pre_blocks + (config.post_blocks if config.post_memory == "own" else 0)
    if config.remembers_rows and not config.local_window:
        tables += config.max_route_steps
    codes = config.code_row_width if config.remembers_codes and not config.code_window else 0
    return 2 * tables * config.num_key_value_heads * config.head_dim + codes
