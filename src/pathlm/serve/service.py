"""The models of a server by name, and what a client's words mean for each."""

from __future__ import annotations

import inspect
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as Folder
from typing import Any, cast

import torch

from pathlm.evaluate.checkpoint import check_branches, check_budget, find_checkpoint, open_model, start_token
from pathlm.generate import Sampling, context_of, encode_prompt
from pathlm.models import FAMILIES, family
from pathlm.models.output import PathOutput
from pathlm.path import Path
from pathlm.serve.engine import Engine, Request
from pathlm.serve.errors import Refusal
from pathlm.serve.limits import Limits
from pathlm.serve.schema import Asked, CompletionAsked, Texts
from pathlm.serve.writing import Piece, Writer

DEFAULT_NEW_TOKENS = 16
"""As OpenAI's interface has it."""


@dataclass(frozen=True)
class Prompt:
    """A text as it is read."""

    tokens: tuple[int, ...]
    text: str
    unsaid: int = 0
    """Tokens at its beginning that the client's text did not have: the start token"""


class Served:
    """A model with its tokenizer and its engine."""

    def __init__(self, name: str, model: Any, tokenizer: Any, limits: Limits):
        self.name, self.model, self.tokenizer, self.limits = name, model, tokenizer, limits
        self.engine = Engine(model, rows=limits.rows)
        self.created = int(time.time())
        kind = model.config.model_type
        self.package = family(kind) if kind in FAMILIES else None
        """The model's family; None where it tells no paths"""

    def about(self) -> dict[str, Any]:
        """What `/v1/models` says."""
        config, pool = self.model.config, cast(Any, getattr(self.model, "pool", None))
        low, high = (2.0, -1.0) if pool is None else pool.budgets_trained.tolist()
        can_branch = pool is not None and config.route_top_k == 1 and config.beam_expansion != 1
        known = {
            "family": config.model_type,
            "kind": "graph" if config.model_type == "brillm" else "routed" if pool is not None else "plain",
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "vocab_size": config.vocab_size,
            "context": context_of(self.model),
            "paths": self.package is not None,
            "budgets": [round(low, 3), round(high, 3)] if low <= high else None,
            "budget": round(float(pool.budget_default), 3) if low <= high else None,
            "branches": self.limits.max_branches if can_branch else 1,
            "blocks": getattr(config, "num_hidden_layers", None) if config.model_type != "brillm" else None,
            "pool": [config.pre_blocks + 1, config.pre_blocks + config.pool_blocks] if pool is not None else None,
            "route_steps": [config.min_route_steps, config.max_route_steps] if pool is not None else None,
            "signal_size": config.signal_size if config.model_type == "brillm" else None,
            "start_token": start_token(self.tokenizer) is not None,
        }
        limits = {"prompt_tokens": self._most_prompt_tokens(), "new_tokens": self.limits.max_new_tokens}
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "pathlm", "pathlm": known | {"limits": limits},
        }  # fmt: skip

    def prompts(self, field: str, given: Texts, *, start: bool) -> list[Prompt]:
        """Return the texts of a request as tokens. Raises `Refusal` for those that the model cannot read."""
        many: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        if not many:
            raise Refusal(400, f"{field}=[]: holds no text", param=field)
        return [self._prompt(field, one, start=start) for one in many]

    def options(self, asked: Asked) -> tuple[tuple[str, Any], ...]:
        """Return what every forward pass is to be told. Raises `ValueError` for what the model cannot do."""
        told: dict[str, Any] = {}
        if asked.budget is not None:
            # Rows of one budget run together, and whoever wants another one runs beside them: there are not to be many.
            told |= check_budget(self.model, round(asked.budget, 3))
        if asked.branches is not None:
            if asked.branches > self.limits.max_branches:
                raise Refusal(400, f"branches={asked.branches}: must be at most {self.limits.max_branches}", param="branches")
            told |= check_branches(self.model, asked.branches)
        return tuple(told.items())

    def opening(self, asked: Asked) -> dict[str, Any]:
        """Return what the pass that begins a text is to be told besides."""
        given = asked.initial_signal
        if given is None:
            return {}
        if "initial_signal" not in inspect.signature(self.model.forward).parameters:
            raise Refusal(400, f"initial_signal: a {type(self.model).__name__} has no signal to begin with", param="initial_signal")
        width = self.model.config.signal_size
        if isinstance(given, list) and len(given) != width:
            raise Refusal(400, f"initial_signal: has {len(given)} numbers, must have {width}, or be one number", param="initial_signal")
        signal = torch.tensor(given if isinstance(given, list) else [given] * width, dtype=self.model.dtype, device=self.model.device)
        if not bool(signal.isfinite().all()):
            raise Refusal(400, "initial_signal: holds numbers too large for this model's precision", param="initial_signal")
        return {"initial_signal": signal}

    def require_paths(self) -> None:
        """Raise `Refusal` where the model tells no paths."""
        if self.package is None:
            rule = "tells no paths; `pathlm convert FOLDER OUT` makes a plain decoder of a Llama model, --wrap a routed one"
            raise Refusal(400, f"paths: a {type(self.model).__name__} {rule}", param="paths")

    @torch.inference_mode()
    def paths(self, trace: Any, newest: int | None = None) -> list[Path]:
        """Return the paths of a traced text's tokens, or of its `newest`."""
        assert self.package is not None
        found: list[Path] = self.package.paths(PathOutput(trace=trace), self.tokenizer, newest=newest)
        return found

    def _prompt(self, field: str, given: str | Sequence[int], *, start: bool) -> Prompt:
        if isinstance(given, str):
            if len(given) > 64 * self._most_prompt_tokens():
                self._too_long(field, f"{len(given):,} characters")
            first = start_token(self.tokenizer)
            try:
                tokens = encode_prompt(self.tokenizer, given)
            except ValueError as error:
                raise Refusal(400, f"{field}: {error}", param=field) from error
            unsaid = int(first is not None)
            if not start and unsaid:
                tokens, unsaid = tokens[1:], 0
            prompt = Prompt(tuple(tokens), given, unsaid)
        else:
            outside = next((token for token in given if not 0 <= token < self.model.config.vocab_size), None)
            if outside is not None:
                rule = f"must lie between 0 and {self.model.config.vocab_size - 1}"
                raise Refusal(400, f"{field}: holds the token id {outside}, which {rule}"[:200], param=field)
            prompt = Prompt(tuple(given), self.tokenizer.decode(list(given), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        if not prompt.tokens:
            raise Refusal(400, f"{field}: is empty, and there is no start token to begin with", param=field)
        if len(prompt.tokens) > self._most_prompt_tokens():
            self._too_long(field, f"{len(prompt.tokens):,} tokens")
        return prompt

    def _most_prompt_tokens(self) -> int:
        return min(self.limits.max_prompt_tokens, context_of(self.model) or self.limits.max_prompt_tokens)

    def _too_long(self, field: str, length: str) -> None:
        rule = f"must be at most {self._most_prompt_tokens():,} tokens, the limit of this model or server"
        raise Refusal(400, f"{field}: has {length}; {rule}", param=field, code="context_length_exceeded")


@dataclass(frozen=True)
class Order:
    """Rows that answer a request, in the order of their choices, and what their answer says of itself."""

    rows: list[tuple[Request, Writer]]
    prompt_tokens: int
    seed: int


def completion(served: Served, asked: CompletionAsked, send: Callable[[Piece], None]) -> Order:
    """Return the rows that write what a client asked for. Raises `Refusal` or `ValueError` naming what is wrong."""
    if asked.refused:
        raise Refusal(400, asked.refused[1], param=asked.refused[0])
    if asked.paths:
        served.require_paths()
    wanted = DEFAULT_NEW_TOKENS if asked.max_tokens is None else asked.max_tokens
    if wanted > served.limits.max_new_tokens:
        raise Refusal(400, f"max_tokens={wanted}: must be at most {served.limits.max_new_tokens}", param="max_tokens")
    prompts, choices = served.prompts("prompt", asked.prompt, start=asked.start_token), asked.n or 1
    if asked.paths and len(prompts) * choices * wanted > served.limits.max_prompt_tokens:
        rule = f"the paths of {len(prompts) * choices} answers of {wanted} tokens are more than {served.limits.max_prompt_tokens:,}"
        raise Refusal(400, f"paths: {rule}, the most that are told at once", param="paths")
    if len(prompts) * choices > served.limits.queue:
        raise Refusal(400, f"n={choices}: {len(prompts)} prompts and n make more than {served.limits.queue} answers", param="n")
    context = context_of(served.model)
    if context is not None and wanted and max(len(prompt.tokens) for prompt in prompts) >= context:
        rule = f"a prompt must be shorter than the model's context of {context} tokens to be continued"
        raise Refusal(400, f"prompt: {rule}", param="prompt", code="context_length_exceeded")
    seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
    sampling = Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature, top_k=asked.top_k, top_p=asked.top_p, seed=seed
    )
    options, opening, stop = served.options(asked), served.opening(asked), [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    deadline, echo, scores = served.engine.clock() + served.limits.max_seconds, bool(asked.echo), asked.logprobs
    seen: Counter[tuple[int, ...]] = Counter()
    rows: list[tuple[Request, Writer]] = []
    for prompt in prompts:
        for _ in range(choices):
            request = Request(
                prompt=prompt.tokens, max_new_tokens=wanted, sampling=sampling, again=seen[prompt.tokens],
                eos_token_id=served.tokenizer.eos_token_id, options=options, opening=opening, trace=asked.paths, scores=scores,
                score_prompt=echo and scores is not None, deadline=deadline,
            )  # fmt: skip
            seen[prompt.tokens] += 1
            writer = Writer(
                served.tokenizer, prompt.tokens, send, choice=len(rows), stop=stop, logprobs=scores is not None,
                echo=prompt.text if echo else None, unsaid=prompt.unsaid,
            )  # fmt: skip
            rows.append((request, writer))
    return Order(rows, sum(len(prompt.tokens) for prompt in prompts), seed)


def reading(served: Served, prompts: Sequence[Prompt], asked: Asked, send: Callable[[Piece], None]) -> Order:
    """Return the rows that read texts and tell their paths."""
    served.require_paths()
    if len(prompts) > served.limits.queue:
        raise Refusal(400, f"input: {len(prompts)} texts are more than {served.limits.queue}", param="input")
    if (tokens := sum(len(prompt.tokens) for prompt in prompts)) > served.limits.max_prompt_tokens:
        rule = f"the paths of {tokens:,} tokens are more than {served.limits.max_prompt_tokens:,}, the most that are told at once"
        raise Refusal(400, f"input: {rule}", param="input", code="context_length_exceeded")
    options, opening, deadline = served.options(asked), served.opening(asked), served.engine.clock() + served.limits.max_seconds
    rows: list[tuple[Request, Writer]] = []
    for number, prompt in enumerate(prompts):
        request = Request(prompt=prompt.tokens, max_new_tokens=0, options=options, opening=opening, trace=True, deadline=deadline)
        rows.append((request, Writer(served.tokenizer, prompt.tokens, send, choice=number)))
    return Order(rows, sum(len(prompt.tokens) for prompt in prompts), 0)


def open_all(folders: Sequence[Folder | str], limits: Limits, *, device: str | None = None, mmap: bool = False) -> dict[str, Served]:
    """Open the models in some folders; each is called as its folder.

    Raises `ValueError` for two folders of the same name, none at all, and models without a tokenizer, before any is opened where possible.
    """
    if not folders:
        raise ValueError("folders: give at least one run, checkpoint or Hugging Face folder")
    places = [Folder(os.path.abspath(folder)) for folder in folders]  # a link's name is its own
    twice = [name for name, count in Counter(place.name for place in places).items() if count > 1]
    if twice:
        both = ", ".join(str(folder) for folder, place in zip(folders, places, strict=True) if place.name == twice[0])
        raise ValueError(f"folders {both}: a model is called as its folder, and these are both called {twice[0]!r}; rename or link one")
    for folder in folders:
        find_checkpoint(folder)
    found = {}
    for folder, place in zip(folders, places, strict=True):
        model, tokenizer = open_model(folder, device=device, mmap=mmap)
        if tokenizer is None:
            raise ValueError(f"model folder {str(folder)!r} has no tokenizer; text cannot be turned into tokens")
        found[place.name] = Served(place.name, model, tokenizer, limits)
    return found
