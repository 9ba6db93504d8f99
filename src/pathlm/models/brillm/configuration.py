"""The configuration of BriLLM models: the graph's size, how signals are joined, and which arithmetic is meant."""

# No postponed annotations here: with them, `strict` would check no types.

import math
from typing import no_type_check

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

CONTEXTS = ("pooled", "chain", "decay", "node-decay", "gated", "timescales")
REPEATABLE = ("decay",)
"""Contexts that may be named more than once, to have several of their kind."""
TIMESCALES = [1.0, 4.0, 16.0]
ARITHMETICS = ("published", "released")
POSITIONS = ("divided", "multiplied", "none")
BEYOND = ("continue", "hold")
INITIAL_ENERGIES = ("even", "counts")


@no_type_check  # strict checks types itself, and a second checker around it loses the keywords it lets through
@strict
class BrillmConfig(PreTrainedConfig):
    """Architecture of a BriLLM model: a graph whose nodes are the tokens; one signal walks it along the sentence.

    A pair of nodes that was counted often enough has an edge of its own, `signal_size`² weights and `signal_size` biases; all other pairs
    share one edge. `edges` says how many have their own; which ones, is saved with the weights.
    """

    model_type = "brillm"
    keys_to_ignore_at_inference = ("past_key_values", "metrics", "trace")

    vocab_size: int = 4_000
    """Nodes."""
    signal_size: int = 32
    """Width of the signal, `d` in the equations."""
    edges: int = 0
    """Pairs of nodes with an edge of their own. A model made from data counts them; one made of a bare number spreads them evenly."""
    min_count: int = 1
    """How often a pair must have been seen in the training data to get an edge of its own."""
    context: str = "pooled"
    """What the signal on an edge is. Published: `pooled` is the mean of all earlier outputs, weighted by position; `chain` is the last one.
    Beyond: `decay` is a mean that forgets, s ← s·σ(δ) + h·(1 − σ(δ)), with a learned δ per dimension; `node-decay` has a δ per node that
    the signal arrives at; `gated` has a vector per node, of which the sigmoid is h's share; `timescales` are means that forget at fixed
    rates. Several, as in `chain+pooled` or `decay+decay`, are kept side by side and added with learned weights per dimension. All are
    sums of outputs with weights that no signal changes, and their state is `signals` · signal_size numbers however long the text is."""
    timescales: list[float | int] | None = None
    """Tokens after which the `timescales` have forgotten most: each new output's share is 1 ÷ timescale. None is 1, 4 and 16."""
    normalise: bool = False
    """Divide each output by its root mean square before it enters the signal, and the first signal too. Energies are those before."""
    keep_initial: bool = False
    """Let the first signal stay in the mean, as an output before the first one, instead of leaving with the first edge."""
    arithmetic: str = "published"
    """`released` computes what the released checkpoints were trained and decoded with: positions of another index in decoding."""
    positions: str = "divided"
    """Frequencies of the sinusoidal positions: `divided` by 10000^(2j/d) as usual, `multiplied` as released, or `none`."""
    position_scale: float | int = 1.0
    """Factor of the positional vectors."""
    trained_positions: int = 30
    """Positions that have numbers of their own; rows of T tokens train T - 2 of them. What later ones do is said by `beyond`; there is no
    longest text. Contexts other than `pooled` treat all outputs alike, so that of them only the positional vector is concerned."""
    beyond: str = "hold"
    """After the trained positions, `hold`: the positional vector and the share of the newest output in the mean both stay as they were at
    the last position. `continue`: sinusoids go on, an output's weight stays the last one, so the mean gets ever slower; trained weights
    rise steeply, and texts beyond them are then read badly."""
    initial_signal: float | int | None = None
    """Every number of the signal that enters the first node; None is 1 / signal_size."""
    rivals: int | None = None
    """Nodes, drawn anew for every position, that the right one is compared with in training; None is all of them, exactly."""
    signal_dropout: float | int = 0.0
    """Probability with which training leaves out each number of a signal where it is scored; the others grow by 1 ÷ (1 - this)."""
    train_shared: bool = True
    """Whether the edge that all other pairs share is trained."""
    initializer_range: float | int = 0.5
    """Weights, biases and node biases start evenly distributed between minus this and this."""
    initial_energies: str = "even"
    """Where edges' biases start. `even`: as just said. `counts`: a model made from data starts as a bigram model of it, each bias of such a
    length that its energy stands for the pair's discounted count. A model made of a bare number of edges has no counts, and is even."""
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    @property
    def hidden_size(self) -> int:
        """The signal's width, by the name that transformers uses."""
        return self.signal_size

    @property
    def num_hidden_layers(self) -> int:
        """One: every token runs one edge."""
        return 1

    @property
    def contexts(self) -> list[str]:
        """What the signal is made of, each by its name."""
        return self.context.split("+")

    @property
    def signals(self) -> int:
        """How many running signals a text has, of `signal_size` numbers each: its whole state."""
        return sum(len(self.timescales or TIMESCALES) if name == "timescales" else 1 for name in self.contexts)

    def validate_architecture(self) -> None:
        """Refuse an architecture that cannot be built, naming the field, its value and the rule."""
        for name in ("vocab_size", "trained_positions", "min_count"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        size, nodes = self.signal_size, self.vocab_size
        _require(size >= 2 and size % 2 == 0, "signal_size", size, "must be even and at least 2, for pairs of sine and cosine")
        rule = f"must lie in 0 … vocab_size² = {nodes**2}; set both, as a preset's edges go with its nodes"
        _require(0 <= self.edges <= nodes**2, "edges", self.edges, rule)
        for name, known in (
            ("arithmetic", ARITHMETICS),
            ("positions", POSITIONS),
            ("beyond", BEYOND),
            ("initial_energies", INITIAL_ENERGIES),
        ):
            _require(getattr(self, name) in known, name, getattr(self, name), f"must be one of {', '.join(known)}")
        self._validate_context()
        if self.arithmetic == "released":
            for name, only in (("context", "pooled"), ("positions", "multiplied"), ("normalise", False), ("keep_initial", False)):
                _require(getattr(self, name) == only, name, getattr(self, name), f'arithmetic="released" was made with {only!r} only')
        _require(self.position_scale > 0, "position_scale", self.position_scale, 'must be positive; positions="none" leaves them out')
        rule = f"must lie in 1 … vocab_size - 1 = {nodes - 1}, or be None for all"
        _require(self.rivals is None or 1 <= self.rivals < nodes, "rivals", self.rivals, rule)
        for name in ("position_scale", "initializer_range", "initial_signal"):
            value = getattr(self, name)
            _require(value is None or math.isfinite(value), name, value, "must be a finite number")
        _require(0 <= self.signal_dropout < 1, "signal_dropout", self.signal_dropout, "must be at least 0 and below 1")
        _require(self.initializer_range > 0, "initializer_range", self.initializer_range, "must be positive")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            given = getattr(self, name)
            inside = all(0 <= token < nodes for token in (given if isinstance(given, list) else [given]) if token is not None)
            _require(inside, name, given, f"must lie in 0 … vocab_size - 1 = {nodes - 1}")

    def _validate_context(self) -> None:
        parts = self.contexts
        rule = f"must be one of {', '.join(CONTEXTS)}, or several of them joined by +"
        _require(all(name in CONTEXTS for name in parts), "context", self.context, rule)
        twice = [name for name in parts if name not in REPEATABLE and parts.count(name) > 1]
        _require(not twice, "context", self.context, f"only {', '.join(REPEATABLE)} may come more than once")
        _require(
            not self.keep_initial or parts != ["chain"], "keep_initial", self.keep_initial, 'context="chain" keeps the last output alone'
        )
        if self.timescales is not None:
            _require("timescales" in parts, "timescales", self.timescales, f"context={self.context!r} has none; add timescales to it")
            rule = "must be numbers of at least 1, not an empty list"
            _require(bool(self.timescales) and all(1 <= scale < math.inf for scale in self.timescales), "timescales", self.timescales, rule)


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: {rule}")
