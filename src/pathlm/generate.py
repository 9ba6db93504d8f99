"""Continue prompts with any causal language model: greedy or sampled, in batches, whole or as a stream of text."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import TextIOBase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor

from pathlm.evaluate.checkpoint import evaluating, open_model, start_token

# Shapes: B rows, P prompt tokens (left-padded), V vocabulary, K candidates, N new tokens

Reason = Literal["end", "length", "context"]
"""Why a row stopped: it wrote end-of-text, it has `max_new_tokens`, or the model's context is full."""
CHUNK = 16
"""Tokens decoded between two looks at them, where looking stalls an accelerator or nothing is looked for; else every token is looked at."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn: `temperature` 0 takes the likeliest; `top_k` and `top_p` keep the head of the distribution."""

    temperature: float | int = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that describe no distribution."""
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or positive")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: must be at least 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p}: must lie in (0, 1]")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative")

    def pick(self, logits_BV: Float[Tensor, "B V"], uniform_B: Float[Tensor, " B"] | None) -> Int[Tensor, " B"]:
        """Choose one token per row: the likeliest, or the one where the row's uniform number falls into the cumulative distribution."""
        if self.temperature == 0 or uniform_B is None:
            return logits_BV.argmax(dim=-1)
        logits_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
        scaled_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / self.temperature
        keep = min(self.top_k or scaled_BV.shape[-1], scaled_BV.shape[-1])
        top_p = 1.0 if self.top_p is None else self.top_p
        if keep == scaled_BV.shape[-1] and top_p == 1.0:
            return _fall(scaled_BV.softmax(dim=-1), uniform_B)
        scaled_BK, token_BK = scaled_BV.topk(keep, dim=-1) if keep < scaled_BV.shape[-1] else scaled_BV.sort(dim=-1, descending=True)
        weight_BK = scaled_BK.softmax(dim=-1)
        if top_p < 1.0:
            weight_BK = weight_BK * ((weight_BK.cumsum(dim=-1) - weight_BK) < top_p)
        return token_BK.gather(1, _fall(weight_BK, uniform_B)[:, None]).squeeze(1)


def _fall(weight_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """Return per row the first column whose cumulative weight exceeds the row's uniform share of the total."""
    cumulative_BK = weight_BK.double().cumsum(dim=-1)
    target_B1 = uniform_B[:, None] * cumulative_BK[:, -1:]
    return torch.searchsorted(cumulative_BK, target_B1, right=True).squeeze(1).clamp_(max=weight_BK.shape[-1] - 1)


def generate(
    model: Any,
    input_ids: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | None = None,
    bos_token_id: int | None = None,
    pad_token_id: int = 0,
    batch: int | None = None,
) -> list[list[int]]:
    """Continue each row of token ids and return the new tokens of each row, in order.

    A row ends after `eos_token_id` (which it then includes; None never ends a row), after `max_new_tokens`, or when the model's context
    (`max_position_embeddings`) is full. `temperature=0` is greedy. An empty row starts from `bos_token_id` (default: the model's own).
    `batch` rows run at once, all by default. What a row draws depends on `seed`, on its own tokens and on how often the same row came
    before it, never on its neighbours or its place: a row gives the same alone and in any batch, and equal rows give different samples.

    Raises `ValueError` naming the field, the value and the rule for options out of range, for tokens outside the vocabulary, and for
    prompts that fill the context.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    given = input_ids.tolist() if isinstance(input_ids, Tensor) else input_ids
    prompts = _checked_prompts(model, given, max_new_tokens=max_new_tokens, bos_token_id=bos_token_id)
    _require_batch(batch)
    new: list[list[int]] = [[] for _ in prompts]
    chunk = 1 if model.device.type == "cpu" and eos_token_id is not None else CHUNK
    for part in _batches(prompts, sampling, batch=batch, max_new_tokens=max_new_tokens, context=context_of(model)):
        for pieces in _decode(model, part, sampling, eos_token_id=eos_token_id, pad_token_id=pad_token_id, chunk=chunk):
            for row, tokens, _ in pieces:
                new[row].extend(tokens)
    return new


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
) -> Iterator[Piece]:
    """Continue texts and yield pieces of text as they are written, the rows of a batch in turns.

    The pieces of one prompt, joined, are exactly the decoding of its new tokens after the prompt, without special tokens; no piece ends
    inside a UTF-8 character. Tokens are the same as `generate`'s. Bad input is refused when `stream` is called, not at the first piece.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    _require_batch(batch)
    start = start_token(tokenizer)
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    rows = _checked_prompts(model, ids, max_new_tokens=max_new_tokens, bos_token_id=start)
    eos = tokenizer.eos_token_id if stop_at_end else None
    return _stream(model, tokenizer, rows, sampling, eos_token_id=eos, batch=batch, max_new_tokens=max_new_tokens)


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Return a prompt's tokens as documents have them: the start token, then the text."""
    start = start_token(tokenizer)
    return ([] if start is None else [start]) + tokenizer.encode(text, add_special_tokens=False)


def _stream(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    eos_token_id: int | None,
    batch: int | None,
    max_new_tokens: int,
) -> Iterator[Piece]:
    for part in _batches(prompts, sampling, batch=batch, max_new_tokens=max_new_tokens, context=context_of(model)):
        writers = {row: Detokenizer(tokenizer, prompts[row]) for row in part.rows}
        for pieces in _decode(model, part, sampling, eos_token_id=eos_token_id, pad_token_id=0, chunk=1):
            for row, tokens, stopped in pieces:
                text = writers[row].push(tokens) + (writers[row].flush() if stopped else "")
                yield Piece(row, text, tuple(tokens), stopped)


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


@dataclass(frozen=True)
class _Part:
    """Prompts that run together: their numbers among all prompts, their tokens, and a uniform number for each token to draw."""

    rows: list[int]
    prompts: list[list[int]]
    limits: list[int]
    """New tokens each row may write."""
    at_limit: list[Reason]
    """Why each row ends at its limit."""
    uniform_BN: np.ndarray | None


def _batches(
    prompts: list[list[int]], sampling: Sampling, *, batch: int | None, max_new_tokens: int, context: int | None
) -> Iterator[_Part]:
    """Cut the prompts into batches, in order. A row's random stream comes from the seed, its tokens and how often they came before."""
    seen: Counter[bytes] = Counter()
    size = batch or len(prompts) or 1
    for first in range(0, len(prompts), size):
        part = prompts[first : first + size]
        limits = [max_new_tokens if context is None else min(max_new_tokens, context - len(prompt)) for prompt in part]
        uniform = np.empty((len(part), max(limits))) if sampling.temperature > 0 else None
        for row, prompt in enumerate(part):
            digest = hashlib.sha256(np.asarray(prompt, dtype="<i8").tobytes()).digest()
            if uniform is not None:
                entropy = [sampling.seed, seen[digest], *np.frombuffer(digest, dtype="<u4").tolist()]
                uniform[row] = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy))).random(uniform.shape[1])
            seen[digest] += 1
        at_limit: list[Reason] = ["length" if limit == max_new_tokens else "context" for limit in limits]
        yield _Part(list(range(first, first + len(part))), part, limits, at_limit, uniform)


@torch.inference_mode()
def _decode(
    model: Any, part: _Part, sampling: Sampling, *, eos_token_id: int | None, pad_token_id: int, chunk: int
) -> Iterator[list[tuple[int, list[int], Reason | None]]]:
    """Run one batch and yield, every `chunk` tokens, (prompt, its new tokens, why it stopped or None) for the rows that still write."""
    with evaluating(model):
        state = _State(model, part, pad_token_id)
        logits_BV = state.prefill()
        uniform_BN = None if part.uniform_BN is None else torch.from_numpy(part.uniform_BN).to(logits_BV.device)
        active = list(range(len(part.prompts)))  # which row of the part each row of the running batch is
        stopped: list[Reason | None] = [None] * len(active)
        token_B = torch.empty(0)
        written = 0
        while True:
            columns: list[Tensor] = []
            for step in range(written, min(written + chunk, min(part.limits[row] for row in active if not stopped[row]))):
                if step:
                    logits_BV = state.advance(token_B)
                token_B = sampling.pick(logits_BV, None if uniform_BN is None else uniform_BN[:, step])
                columns.append(token_B)
            written += len(columns)
            pieces = []
            for row, new in zip(active, torch.stack(columns, dim=1).tolist(), strict=True):
                if stopped[row]:
                    continue
                if eos_token_id is not None and eos_token_id in new:
                    new, stopped[row] = new[: new.index(eos_token_id) + 1], "end"
                elif written >= part.limits[row]:
                    stopped[row] = part.at_limit[row]
                pieces.append((part.rows[row], new, stopped[row]))
            yield pieces
            if all(stopped):
                return
            keep = [place for place, row in enumerate(active) if not stopped[row]]
            if len(keep) < len(active) and state.can_select:
                active = [active[place] for place in keep]
                index = torch.tensor(keep, device=token_B.device)
                state.select(index)
                token_B = token_B[index]
                uniform_BN = None if uniform_BN is None else uniform_BN[index]


class _State:
    """The cache of a running batch, and the mask and positions that left padding needs; rows of equal length need neither."""

    def __init__(self, model: Any, part: _Part, pad_token_id: int):
        self._model = model
        accepted = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in accepted else {})
        self._cache: Any = None
        self._length = max(map(len, part.prompts))
        self._mask: Tensor | None = None
        self._position: Tensor | None = None
        padding = [self._length - len(prompt) for prompt in part.prompts]
        rows_BP = [[pad_token_id] * empty + list(prompt) for empty, prompt in zip(padding, part.prompts, strict=True)]
        self._prompt_BP = torch.tensor(rows_BP, device=model.device)
        if any(padding):
            place_N = torch.arange(self._length + max(part.limits), device=model.device)
            start_B1 = torch.tensor(padding, device=model.device)[:, None]
            self._mask = (place_N >= start_B1).long()
            if "position_ids" in accepted:
                self._position = (place_N - start_B1).clamp_(min=0, max=(context_of(model) or len(place_N)) - 1)

    @property
    def can_select(self) -> bool:
        """Say whether rows may leave the batch."""
        return hasattr(self._cache, "batch_select_indices")

    def prefill(self) -> Tensor:
        """Read the prompts and return the logits after their last tokens."""
        return self._forward(self._prompt_BP, 0)

    def advance(self, token_B: Tensor) -> Tensor:
        """Read one more token per row and return the logits after it."""
        self._length += 1
        return self._forward(token_B[:, None], self._length - 1)

    def select(self, index: Tensor) -> None:
        """Keep only these rows of the batch."""
        self._cache.batch_select_indices(index)
        self._mask = None if self._mask is None else self._mask[index]
        self._position = None if self._position is None else self._position[index]

    def _forward(self, ids_BT: Tensor, start: int) -> Tensor:
        padding: dict[str, Tensor] = {}
        if self._mask is not None:
            padding["attention_mask"] = self._mask[:, : self._length]
        if self._position is not None:
            padding["position_ids"] = self._position[:, start : self._length]
        output = self._model(input_ids=ids_BT, past_key_values=self._cache, **padding, **self._options)
        self._cache = output.past_key_values
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV


def _checked_prompts(model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, bos_token_id: int | None) -> list[list[int]]:
    """Return the prompts as lists, empty ones started, or raise `ValueError` for the first that cannot be continued."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    vocabulary, context = model.config.vocab_size, context_of(model)
    start = getattr(model.config, "bos_token_id", None) if bos_token_id is None else bos_token_id
    rows = []
    for number, prompt in enumerate(prompts):
        row = list(prompt) or ([] if start is None else [start])
        if not row:
            raise ValueError(f"prompt {number} is empty and the model has no bos_token_id to start from")
        if not 0 <= min(row) <= max(row) < vocabulary:
            raise ValueError(f"prompt {number} holds token ids from {min(row)} to {max(row)}: the model's vocab_size is {vocabulary}")
        if context is not None and len(row) >= context:
            raise ValueError(
                f"prompt {number} has {len(row)} tokens: it must be shorter than the model's max_position_embeddings={context}"
            )
        rows.append(row)
    return rows


def context_of(model: Any) -> int | None:
    """Return how many tokens the model can hold, `max_position_embeddings`; None where its configuration names no limit."""
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    return limit


def read_prompts(
    arguments: Sequence[str] = (), files: Sequence[Path | str] = (), *, whole: bool = False, stdin: TextIOBase | None = None
) -> list[str]:
    """Collect prompts: the arguments, then one per non-empty line of each file (the whole file when `whole`; `-` is standard input).

    With neither arguments nor files, standard input is read unless it is a terminal; if that gives nothing, there is one empty prompt,
    which starts from the model's start token.
    """
    source = sys.stdin if stdin is None else stdin
    names = list(files) if arguments or files or source.isatty() else ["-"]
    prompts = list(arguments)
    for name in names:
        try:
            text = source.read() if str(name) == "-" else Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"prompt file {str(name)!r} is not UTF-8: byte {error.start} cannot be read") from error
        prompts += [text.removesuffix("\n")] if whole and text else [line for line in text.splitlines() if line.strip()]
    return prompts or [""]


def run(
    folder: Path | str,
    prompts: Sequence[str] = ("",),
    *,
    max_new_tokens: int = 128,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch: int = 8,
    stop_at_end: bool = True,
    device: str | None = None,
    console: Console | None = None,
) -> list[str]:
    """Continue texts with the model of a run, checkpoint or Hugging Face folder; return the continuations, in order.

    With a console, text appears on it as it is written: the prompt, then its continuation. Of several prompts each is labelled with its
    number; they run together but are shown one after the other.
    """
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)  # refuse bad values before the model is loaded
    model, tokenizer = open_model(folder, device=device)
    if tokenizer is None:
        raise ValueError(f"model folder {str(folder)!r} has no tokenizer; text cannot be turned into tokens")
    pieces = stream(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        seed=seed, batch=batch, stop_at_end=stop_at_end,
    )  # fmt: skip
    texts = [""] * len(prompts)
    show = _show(prompts, console)
    for piece in pieces:
        texts[piece.prompt] += piece.text
        show(piece)
    return texts


def _show(prompts: Sequence[str], console: Console | None) -> Callable[[Piece], None]:
    """Return a function that prints pieces so that each prompt's text stays together, the first unfinished one live."""
    if console is None:
        return lambda piece: None
    waiting = [""] * len(prompts)
    done = [False] * len(prompts)
    current = -1

    def write(text: str) -> None:
        console.file.write(text)
        console.file.flush()

    def begin(number: int) -> None:
        if len(prompts) > 1:
            console.print(f"[{number + 1}/{len(prompts)}]", style="bold cyan", markup=False, highlight=False)
        console.print(prompts[number], style="bold", end="", markup=False, highlight=False, soft_wrap=True)

    def show(piece: Piece) -> None:
        nonlocal current
        if current < 0:
            current = 0
            begin(0)
        waiting[piece.prompt] += piece.text
        done[piece.prompt] = piece.stopped is not None
        while current < len(prompts):
            write(waiting[current])
            waiting[current] = ""
            if not done[current]:
                break
            write("\n" if current + 1 == len(prompts) else "\n\n")
            current += 1
            if current < len(prompts):
                begin(current)

    return show


def _require_batch(batch: int | None) -> None:
    if batch is not None and batch < 1:
        raise ValueError(f"batch={batch}: must be at least 1")
