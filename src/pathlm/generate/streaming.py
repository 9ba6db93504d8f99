"""Continuations as a stream of text that never breaks inside a character."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pathlm.evaluate.checkpoint import check_budget, start_token
from pathlm.generate.batch import context_of
from pathlm.generate.decoding import Reason, batches, checked_prompts, decode, require_batch
from pathlm.generate.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more text of one prompt's continuation; `stopped` is set on the last piece of a prompt and says why it ended."""

    prompt: int
    text: str
    tokens: tuple[int, ...]
    stopped: Reason | None = None


def stream(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch: int | None = None,
    stop_at_end: bool = True,
    budget: float | None = None,
) -> Iterator[Piece]:
    """Continue texts and yield pieces of text as they are written, the rows of a batch in turns.

    The pieces of one prompt, joined, are exactly the decoding of its new tokens after the prompt, without special tokens; no piece ends
    inside a UTF-8 character. Tokens are the same as `generate`'s. Bad input is refused when `stream` is called, not at the first piece.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    require_batch(batch)
    check_budget(model, budget)
    start = start_token(tokenizer)
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    rows = checked_prompts(model, ids, max_new_tokens=max_new_tokens, bos_token_id=start)
    eos = tokenizer.eos_token_id if stop_at_end else None
    return _stream(model, tokenizer, rows, sampling, eos_token_id=eos, batch=batch, max_new_tokens=max_new_tokens, budget=budget)


def _stream(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    eos_token_id: int | None,
    batch: int | None,
    max_new_tokens: int,
    budget: float | None,
) -> Iterator[Piece]:
    for part in batches(prompts, sampling, batch=batch, max_new_tokens=max_new_tokens, context=context_of(model)):
        writers = {row: Detokenizer(tokenizer, prompts[row]) for row in part.rows}
        for pieces in decode(model, part, sampling, eos_token_id=eos_token_id, pad_token_id=0, chunk=1, budget=budget):
            for row, tokens, stopped in pieces:
                text = writers[row].push(tokens) + (writers[row].flush() if stopped else "")
                yield Piece(row, text, tuple(tokens), stopped)


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Return a prompt's tokens as documents have them: the start token, then the text.

    Raises `ValueError` for bytes that are no text, and for words that no token stands for.
    """
    try:
        text.encode("utf-8")  # an argument of a command that is not UTF-8 comes as half a surrogate pair
    except UnicodeEncodeError as error:
        raise ValueError(f"text {text[:40]!r} is not UTF-8: character {error.start} cannot be read") from error
    start = start_token(tokenizer)
    try:
        tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"text {text[:40]!r} cannot be turned into tokens of this model: {error}") from error
    return ([] if start is None else [start]) + tokens


class Detokenizer:
    """Turns tokens into text as they come, holding back what the next token may still change (an unfinished character)."""

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._tokens = list(context)[-16:]
        self._shown = self._decode()

    def push(self, tokens: Sequence[int]) -> str:
        """Take the next tokens and return the text that is certain now."""
        self._tokens.extend(tokens)
        text = self._decode()
        # Bytes that are not a whole character yet decode to U+FFFD: only a tail of those can still change.
        return self._show(text.rstrip("\ufffd"), text)

    def flush(self) -> str:
        """Return what was held back, as it decodes without anything after it."""
        text = self._decode()
        return self._show(text, text)

    def _show(self, certain: str, text: str) -> str:
        """Return what `certain` adds to the text shown, and forget old tokens once everything up to here has been shown."""
        new = certain[len(self._shown) :]
        self._shown += new
        if new and self._shown == text and len(self._tokens) > 64:
            # Some tokens stay as context: decoders treat the first token of a text (its leading space) in a way of their own.
            self._tokens = self._tokens[-16:]
            self._shown = self._decode()
        return new

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
