"""What a BriLLM remembers of a text: its signal, one vector of numbers however long the text was, and where it stands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

# Shapes: B rows, H tokens that can be taken back, S numbers of all running signals

UNDO = 32
"""Tokens that can be forgotten again, as assisted decoding does. The state itself is that of the last one."""


State = tuple[Tensor, Tensor, Tensor, Tensor]
"""Signals (B, H, D), tokens, positions and document numbers (B, H)."""


class BrillmCache(Cache):
    """The state after the newest token of every row, and after the few before it; its size does not grow with the text."""

    def __init__(self) -> None:
        super().__init__(layers=[SignalMemory()])

    @property
    def memory(self) -> SignalMemory:
        """The one layer."""
        layer = self.layers[0]
        assert isinstance(layer, SignalMemory)
        return layer

    def bytes(self) -> int:
        """Return how many bytes the state of the newest token takes: the signal, the token, its position and its document."""
        state = self.memory.state
        return 0 if state is None else sum(t[:, -1].numel() * t.element_size() for t in state)


class SignalMemory(DynamicLayer):
    """Running signals (B, H, S), tokens, positions and document numbers (B, H) after each of the newest H tokens."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Newest last. Joined only when asked for: to join after every token would take longer than the token.
        self._parts: list[State] = []
        self._held = 0
        self._length = 0

    @property
    def state(self) -> State | None:
        """What is remembered, None where nothing was read."""
        if len(self._parts) > 1:
            self._parts = [tuple(torch.cat(old, dim=1) for old in zip(*self._parts, strict=True))]  # type: ignore[list-item]
        return self._trimmed() if self._parts else None

    @state.setter
    def state(self, state: State | None) -> None:
        self._parts = [] if state is None else [state]
        self._held = 0 if state is None else state[0].shape[1]

    def _trimmed(self) -> State:
        if self._held > UNDO + 1:
            # Copied, so that a long prompt's states do not live on behind a view of the last few.
            self.state = tuple(t[:, -UNDO - 1 :].clone() for t in self._parts[0])  # type: ignore[assignment]
        return self._parts[0]

    def write(self, signal_BTS: Tensor, token_BT: Tensor, number_BT: Tensor, document_BT: Tensor) -> None:
        """Remember what the rows' states were after each of T more tokens."""
        self._parts.append((signal_BTS, token_BT, number_BT, document_BT))
        self._held += token_BT.shape[1]
        if self._held > 2 * UNDO:
            _ = self.state
        self._length += token_BT.shape[1]
        self.is_initialized = True

    def last(self) -> State | None:
        """Return signals (B, S), token, position and document (B,) after the newest token; None where nothing was read."""
        return tuple(t[:, -1] for t in self._parts[-1]) if self._parts else None  # type: ignore[return-value]

    def get_seq_length(self) -> int:
        """Return how many tokens were read, padding included."""
        return self._length

    def reset(self) -> None:
        """Forget everything."""
        self.state, self._length, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the last `-tokens_to_remove` tokens. Raises `ValueError` for more of them than are kept to be taken back."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: give the number of tokens to forget as a negative number")
        remove = min(-int(tokens_to_remove), self._length)
        if self.state is None or not remove:
            return
        if remove == self._length:
            self.reset()
        elif remove >= self.state[0].shape[1]:
            raise ValueError(f"tokens_to_remove={-remove}: a signal's state remembers how to take back {self.state[0].shape[1] - 1} tokens")
        else:
            self.state = tuple(t[:, :-remove] for t in self.state)  # type: ignore[assignment]
            self._length -= remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows in the order `beam_idx` (B',)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies beside each other."""
        if self.state is not None:
            self.state = tuple(t.repeat_interleave(repeats, dim=0) for t in self.state)  # type: ignore[assignment]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (B',), in that order, repeated where the index is."""
        if self.state is not None:
            self.state = tuple(t[torch.as_tensor(indices, device=t.device)] for t in self.state)  # type: ignore[assignment]

    def join(self, other: SignalMemory) -> None:
        """Take in the rows of `other`, after the own ones; as many tokens can be taken back as in both."""
        mine, theirs = self.state, other.state
        assert mine is not None and theirs is not None
        held = min(mine[0].shape[1], theirs[0].shape[1])
        self.state = tuple(torch.cat((a[:, -held:], b[:, -held:])) for a, b in zip(mine, theirs, strict=True))  # type: ignore[assignment]
        self._length = max(self._length, other._length)

    def trim(self, tokens: int) -> None:
        """Take away the first `tokens` tokens, which are padding in every row: a signal does not know of them."""
        self._length -= tokens

    def lazy_initialization(self, *args: Any) -> None:
        """Nothing: the first `write` makes the tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: there are no keys and values."""
        raise ValueError("a signal's memory has no keys and values")

    def offload(self) -> None:
        """Refuse: the memory stays where the model is."""
        raise ValueError("cache offloading is not available for this model's memory; generate without it")
