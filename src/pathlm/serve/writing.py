"""One answer as it grows: tokens become text that never breaks inside a character and ends before a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pathlm.generate import Detokenizer
from pathlm.models.tokens import token_text
from pathlm.serve.engine import Event, Reason, Scores


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more of an answer: text, its tokens with their log-probabilities where asked for, and why it ended."""

    choice: int
    text: str = ""
    tokens: int = 0
    logprobs: dict[str, list[Any]] | None = None
    trace: Any = None
    """Of the whole text so far, where it is asked for"""
    finish_reason: str | None = None
    failed: Reason | None = None
    error: str = ""


class Writer:
    """Listens to a row and sends pieces of its answer on, in the engine's thread. It ends the row where a stop string begins."""

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], send: Callable[[Piece], None], *, choice: int, stop: Sequence[str] = (),
        logprobs: bool = False, echo: str | None = None, unsaid: int = 0,
    ):  # fmt: skip
        self._tokenizer, self._prompt, self._send, self._choice = tokenizer, prompt, send, choice
        self._stop, self._logprobs, self._echo, self._unsaid = tuple(stop), logprobs, echo, unsaid
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._offset = 0
        self._held = ""

    def __call__(self, event: Event) -> bool:
        """Send on what an event brings; say whether the row is to end."""
        if event.prompt_scores is not None:
            self._say_prompt(event.prompt_scores)
            return False
        if self._echo is not None and not self._logprobs:
            self._say(self._echo)
        self._echo = None
        if event.stopped in ("time", "failed"):
            self._send(Piece(self._choice, failed=event.stopped, error=event.error))
            return True
        if event.token is None:
            self._send(Piece(self._choice, trace=event.trace, finish_reason=_REASONS.get(event.stopped)))
            return True
        new = "" if event.stopped == "end" else self._detokenizer.push([event.token])
        if event.stopped:
            new += self._detokenizer.flush()
        logprobs = None
        if self._logprobs and event.scores is not None:
            logprobs = self._as_lists([event.token], [event.scores], [self._offset + len(self._held)])
        text, found = self._until_stop(new, ended=event.stopped is not None)
        reason = "stop" if found else _REASONS.get(event.stopped)
        self._say(text, tokens=1, logprobs=logprobs, trace=event.trace, finish_reason=reason)
        return found

    def _until_stop(self, new: str, *, ended: bool) -> tuple[str, bool]:
        """Return what may be said now, and whether a stop string has come; what may be the beginning of one is held back."""
        text = self._held + new
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self._held = ""
            return text[: min(places)], True
        longest = 0 if ended else max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest], False

    def _say(self, text: str, **more: Any) -> None:
        self._offset += len(text)
        self._send(Piece(self._choice, text, **more))

    def _say_prompt(self, scores: Sequence[Scores | None]) -> None:
        """Send the prompt with the log-probabilities of its tokens, but for a start token that the text did not have."""
        if self._echo is None:
            return
        tokens, offsets, length = list(self._prompt[self._unsaid :]), [], 0
        reader = Detokenizer(self._tokenizer, self._prompt[: self._unsaid])
        for token in tokens:
            offsets.append(length)
            length += len(reader.push([token]))
        self._say(self._echo, logprobs=self._as_lists(tokens, scores[self._unsaid :], offsets))

    def _as_lists(self, tokens: Sequence[int], scores: Sequence[Scores | None], offsets: list[int]) -> dict[str, list[Any]]:
        return {
            "tokens": [self._name(token) for token in tokens],
            "token_logprobs": [score and score[0] for score in scores],
            "top_logprobs": [score and {self._name(token): number for token, number in score[1]} for score in scores],
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        """Return a token's text; of one that is no whole character, its bytes, as OpenAI names it."""
        broken = "\ufffd" in self._tokenizer.decode([token])
        return f"bytes:{token_text(self._tokenizer, token)}" if broken else token_text(self._tokenizer, token)


_REASONS: dict[str | None, str] = {"end": "stop", "length": "length", "context": "length"}


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    return next((many for many in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-many:])), 0)
