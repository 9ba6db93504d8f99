"""The configuration of BRIAN models: the architecture's fields, each checked when it is set."""

# No postponed annotations here: with them, `strict` would check no types.

import math
from typing import Any, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
MOVES = ("any", "recur", "skip")
POSITIONS = ("arc", "circle", "random", "none")
READERS = ("router", "blocks", "both", "state")
MEMORIES = ("local", "canonical", "local+canonical")
LEFT_ROWS = ("kept", "refreshed")
ADAPTERS = ("shared", "block")
POST_MEMORIES = ("own", "canonical")
EXITS = ("branch", "first", "any")
MERGES = ("softmax", "winner")


@no_type_check  # strict checks types itself, and a second checker around it loses the keywords it lets through
@strict
class BrianConfig(PreTrainedConfig):
    """Architecture of a BRIAN model: ordinary blocks before and after a routed pool. With an empty pool it is a plain decoder.

    Names follow `transformers.LlamaConfig` where it has one. The number of blocks is `pre_blocks + pool_blocks + post_blocks`.
    """

    model_type = "brian"
    keys_to_ignore_at_inference = ("past_key_values", "metrics", "trace")

    vocab_size: int = 32_000
    hidden_size: int = 768
    intermediate_size: int = 2_048
    pre_blocks: int = 2
    """Ordinary blocks that every token visits first."""
    pool_blocks: int = 0
    """Blocks the router chooses from; 0 is a plain decoder."""
    post_blocks: int = 2
    """Ordinary blocks that every token visits last."""
    max_route_steps: int = 0
    """How many pool blocks a token may visit; 0 exactly when the pool is empty."""
    min_route_steps: int | None = None
    """How many it must visit: at least 1, since its keys and values in the pool come from a visit. None means 1 where there is a pool."""
    route_top_k: int = 1
    """Blocks visited in one route step: 1, or 2 whose results are mixed by the router's weights. (`top_k` is sampling's.)"""
    route_moves: str = "any"
    """Which block may come next: `any`; `recur`, the same again or the next in order; `skip`, any further on, so that a route ends in the
    last block. From the entrance `recur` leads to the first block, `skip` to any."""
    max_repeats: int = 0
    """How often in a row a token may visit the same block; 0 is no limit."""
    block_position: str = "arc"
    """How places in the pool are written as vectors: `arc`, `circle`, `random` or `none`."""
    block_position_dim: int = 64
    block_position_to: str = "both"
    """Who reads a token's position in the pool: the `router`, the `blocks`, or `both`. With `state` a block adds what it would read to the
    hidden state itself, where it stays; the router sees it there."""
    location_bias: float = 0.0
    """Added to a block's score times the similarity of its position to the token's."""
    router_hidden: int = 0
    """Width of a second, non-linear layer of the router; 0 is a linear router."""
    memory: str = "local"
    """What tokens in the pool remember: `local` is one row of keys and values per token, rewritten by every block it visits; `canonical`
    one code per token for the whole pool, written once on entering it; `local+canonical` rows of the newest tokens, codes of the others."""
    local_window: int = 0
    """How many newest tokens, itself included, a token reads as rows; 0 is all. With `local+canonical` it reads the others as codes, and
    what training last set counts."""
    code_dim: int | None = None
    """Numbers in a code; None is half of `hidden_size`, 0 the normalised state as it is. Beside them `head_dim` of each key that knows its
    position."""
    code_keys: int = 4
    """How many keys of a code know its position. Every head of every block mixes them in its own way, frequency by frequency."""
    code_adapter: str = "block"
    """What makes keys and values of a code: one adapter for each `block`, or one `shared` by all."""
    code_delta_rank: int = 0
    """Rank of what each head of each block adds to its adapter; 0 is none."""
    code_window: int = 0
    """How many newest tokens, itself included, a token reads as codes; 0 is all."""
    code_sinks: int = 0
    """How many first tokens of its document it reads besides, however old."""
    post_memory: str = "own"
    """What blocks after the pool read: each its `own` keys and values, or the pool's codes (`canonical`)."""
    attention_window: int = 0
    """How many newest tokens, itself included, a token sees in blocks outside the pool; 0 is all."""
    attention_sinks: int = 0
    """How many first tokens of its document it sees there besides."""
    left_rows: str = "kept"
    """What that row of a token is after it has left: `kept` is its last one; `refreshed` is, at every later step, what the block that would
    come next in order makes of the state the token left with. That costs a key and a value projection, not a block."""
    route_beams: int = 1
    """Most branches of a token that are in the pool at once; 1 is the greedy route."""
    beam_expansion: int = 2
    """Actions that a branch tries in a step, at most as many as there may be branches."""
    beam_decay: float = 1.0
    """What a branch's score is multiplied by in each further step."""
    beam_cost: float = 0.0
    """What each visit takes from a branch's score, in nats."""
    beam_margin: float = 0.0
    """Branches whose score is lower than the best by more than this are dropped; 0 drops none."""
    beam_exit: str = "branch"
    """Who leaves where leaving is chosen: that `branch`; all of them, if it is the `first` choice of all, or if `any` that is kept does."""
    beam_merge: str = "softmax"
    """What leaves the pool: the branches' states weighted by the `softmax` of their scores, or the `winner`'s."""
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    """Heads that keys and values have; None means as many as queries have."""
    head_dim: int | None = None
    """Width of one head; None means `hidden_size / num_attention_heads`."""
    hidden_act: str = "silu"
    max_position_embeddings: int = 2_048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    """`{"rope_type": ..., "rope_theta": ...}` and the scaling's own numbers, as in transformers; None is base 10,000 without scaling."""
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what depends on other fields."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.min_route_steps is None:
            self.min_route_steps = min(self.max_route_steps, 1)
        super().__post_init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """How many blocks the model holds."""
        return self.pre_blocks + self.pool_blocks + self.post_blocks

    @property
    def router_sees_position(self) -> bool:
        """Whether the router is told a token's position in the pool; otherwise it knows the number of the step."""
        return self.block_position != "none" and self.block_position_to in ("router", "both")

    @property
    def blocks_see_position(self) -> bool:
        """Whether blocks read a token's position in the pool, beside the hidden state or in it."""
        return self.block_position != "none" and self.block_position_to != "router"

    @property
    def remembers_rows(self) -> bool:
        """Whether the pool keeps rows of keys and values."""
        return self.pool_blocks > 0 and self.memory != "canonical"

    @property
    def remembers_codes(self) -> bool:
        """Whether the pool keeps codes."""
        return self.pool_blocks > 0 and self.memory != "local"

    @property
    def code_width(self) -> int:
        """Numbers in a code, without the key that knows its position."""
        return self.hidden_size // 2 if self.code_dim is None else self.code_dim or self.hidden_size

    @property
    def code_row_width(self) -> int:
        """Numbers that are remembered of a token as a code: the code and its keys that know its position."""
        assert self.head_dim is not None
        return self.code_width + self.code_keys * self.head_dim

    def validate_architecture(self) -> None:
        """Refuse an architecture that cannot be built, naming the field, its value and the rule."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("pre_blocks", "pool_blocks", "post_blocks", "max_route_steps", "max_repeats", "router_hidden"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        self._validate_pool()
        self._validate_memory()
        _require(self.num_hidden_layers >= 1, "pre_blocks", self.pre_blocks, "the model needs at least one block")
        self._validate_attention()
        _require(self.hidden_act == "silu", "hidden_act", self.hidden_act, 'blocks are SwiGLU, so it must be "silu"')
        _require(0 < self.initializer_range < 1, "initializer_range", self.initializer_range, "must lie between 0 and 1")
        _require(self.rms_norm_eps > 0, "rms_norm_eps", self.rms_norm_eps, "must be positive")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            given = getattr(self, name)
            known = all(0 <= token < self.vocab_size for token in (given if isinstance(given, list) else [given]) if token is not None)
            _require(known, name, given, f"must lie in 0 … vocab_size - 1 = {self.vocab_size - 1}")

    def _validate_pool(self) -> None:
        """Check what is said about routes."""
        blocks, longest, shortest = self.pool_blocks, self.max_route_steps, self.min_route_steps
        rule = f"pool_blocks={blocks} needs at least 1" if blocks else "there are no pool blocks to visit; set pool_blocks, or 0"
        _require((longest >= 1) == (blocks >= 1), "max_route_steps", longest, rule)
        assert shortest is not None
        rule = f"must lie in {min(longest, 1)} … max_route_steps={longest}"
        _require(min(longest, 1) <= shortest <= longest, "min_route_steps", shortest, rule)
        rule = f"must be 1, or 2 where pool_blocks={blocks} is at least 2"
        _require(self.route_top_k == 1 or (self.route_top_k == 2 and blocks >= 2), "route_top_k", self.route_top_k, rule)
        rule = f"needs more than route_top_k={self.route_top_k} pool blocks"
        _require(not self.max_repeats or blocks > self.route_top_k, "max_repeats", self.max_repeats, rule)
        self._validate_moves()
        for name, known in (
            ("block_position", POSITIONS),
            ("block_position_to", READERS),
            ("memory", MEMORIES),
            ("left_rows", LEFT_ROWS),
            ("code_adapter", ADAPTERS),
            ("post_memory", POST_MEMORIES),
            ("beam_exit", EXITS),
            ("beam_merge", MERGES),
        ):
            _require(getattr(self, name) in known, name, getattr(self, name), f"must be one of {', '.join(known)}")
        _require(self.beam_expansion >= 1, "beam_expansion", self.beam_expansion, "must be at least 1")
        self.check_branches(self.route_beams)
        for name in ("beam_decay", "beam_cost", "beam_margin"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, value, "must be a finite number and not negative")
        _require(0 < self.beam_decay <= 1, "beam_decay", self.beam_decay, "must lie above 0 and at most at 1")
        dim = self.block_position_dim
        _require(dim >= 2 and dim % 2 == 0, "block_position_dim", dim, "must be even and at least 2")
        _require(math.isfinite(self.location_bias), "location_bias", self.location_bias, "must be a finite number")
        _require(not self.location_bias or self.block_position != "none", "location_bias", self.location_bias, "needs a block_position")

    def _validate_moves(self) -> None:
        """Check which moves are made, and refuse what would leave a token without any."""
        moves, blocks = self.route_moves, self.pool_blocks
        _require(moves in MOVES, "route_moves", moves, f"must be one of {', '.join(MOVES)}")
        if moves == "any":
            return
        _require(blocks > 0, "route_moves", moves, "there are no pool blocks to move between: pool_blocks=0")
        rule = f"needs route_top_k=1, not {self.route_top_k}: a token that visits two blocks at once does not come from one"
        _require(self.route_top_k == 1, "route_moves", moves, rule)
        why = "in the last block no move would be left" if moves == "recur" else "no block is visited twice"
        _require(not self.max_repeats, "route_moves", moves, f"needs max_repeats=0, not {self.max_repeats}: {why}")
        rule = f'with route_moves="skip" must be at most pool_blocks={blocks}, since every step leads further on'
        _require(moves == "recur" or self.max_route_steps <= blocks, "max_route_steps", self.max_route_steps, rule)

    def check_branches(self, branches: int, name: str = "route_beams") -> None:
        """Raise `ValueError`, saying `name`, for a number of branches that tokens of this model cannot have."""
        _require(branches >= 1, name, branches, "must be at least 1")
        if branches > 1:
            _require(self.pool_blocks > 0, name, branches, "a plain decoder has no pool to branch in")
            _require(self.route_top_k == 1, name, branches, "needs route_top_k=1, since a branch visits one block in each step")
            _require(self.beam_expansion > 1, name, branches, "needs beam_expansion above 1, since one action makes no second branch")

    def _validate_memory(self) -> None:
        """Check what is said about codes and windows."""
        windows = ("local_window", "code_window", "code_sinks", "attention_window", "attention_sinks", "code_delta_rank")
        for name in windows:
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        _require(self.code_dim is None or self.code_dim >= 0, "code_dim", self.code_dim, "must not be negative")
        wide = f"must be at most hidden_size={self.hidden_size}: a code is made of the state that enters, and no wider one holds more of it"
        _require(self.code_dim is None or self.code_dim <= self.hidden_size, "code_dim", self.code_dim, wide)
        _require(self.code_keys >= 1, "code_keys", self.code_keys, "must be at least 1: without one a code does not know where it stands")
        for of in ("code", "attention"):
            sinks, window = getattr(self, f"{of}_sinks"), getattr(self, f"{of}_window")
            _require(not sinks or window > 0, f"{of}_sinks", sinks, f"needs {of}_window: without one every token is seen anyway")
        rows = f"there are no rows: memory={self.memory!r}, pool_blocks={self.pool_blocks}"
        _require(not self.local_window or self.remembers_rows, "local_window", self.local_window, rows)
        kept = 'needs rows to keep: memory must be "local" or "local+canonical"'
        _require(self.left_rows == "kept" or self.memory != "canonical", "left_rows", self.left_rows, kept)
        if self.remembers_codes:
            return
        without = f"there are no codes: memory={self.memory!r}, pool_blocks={self.pool_blocks}"
        _require(self.memory == "local", "memory", self.memory, "there is no pool to remember anything: pool_blocks=0")
        for name, nothing in (
            ("code_dim", None),
            ("code_keys", 4),
            ("code_delta_rank", 0),
            ("code_window", 0),
            ("post_memory", "own"),
        ):
            _require(getattr(self, name) == nothing, name, getattr(self, name), without)

    def _validate_attention(self) -> None:
        """Check heads and rotary positions."""
        heads, groups, width = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        assert groups is not None and width is not None
        split = self.hidden_size % heads == 0 or width != self.hidden_size // heads
        _require(split, "hidden_size", self.hidden_size, f"must be a multiple of num_attention_heads={heads}, or head_dim be given")
        _require(groups >= 1 and heads % groups == 0, "num_key_value_heads", groups, f"must divide num_attention_heads={heads}")
        _require(width >= 2 and width % 2 == 0, "head_dim", width, "must be even and at least 2, since rotary positions turn pairs")
        rope = self.rope_parameters or {}
        kind = rope.get("rope_type", "default")
        rule = f"rope_type must be one of {', '.join(ROPE_TYPES)}"
        if kind in ("dynamic", "longrope"):
            rule += f"; {kind} turns earlier positions differently once a row grows, so cached decoding could not equal one forward pass"
        _require(kind in ROPE_TYPES, "rope_parameters", rope, rule)
        for name in ("rope_theta", "factor"):
            number = rope.get(name, 1.0)
            positive = isinstance(number, int | float) and 0 < number < math.inf
            _require(positive, "rope_parameters", rope, f"{name} must be a positive number")
        _require(rope.get("partial_rotary_factor", 1.0) == 1.0, "rope_parameters", rope, "partial_rotary_factor must be 1, as in Llama")


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: {rule}")
