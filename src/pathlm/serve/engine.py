"""Continuous batching: rows join and leave a running batch between two tokens, and each gives what it gives alone."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pathlm.generate.batch import Batch, context_of
from pathlm.generate.decoding import random_stream
from pathlm.generate.sampling import Sampling

# Shapes: B rows, T tokens, V vocabulary

CHUNK = 256
"""Tokens of prompts that are read between two written tokens: a long prompt does not keep running rows waiting for longer."""
UNLIKELY = -9999.0
"""Logarithm of a probability of zero, as JSON knows no infinity."""
_LOG = logging.getLogger(__name__)

Reason = Literal["end", "length", "context", "time", "failed"]
"""Why a row ended unless its listener wished so: end-of-text, `max_new_tokens`, a full context, its deadline, or an error."""
Scores = tuple[float, tuple[tuple[int, float], ...]]
"""Log-probability of a token, and the likeliest tokens with theirs, best first."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one row is to write."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0))
    again: int = 0
    """How many rows with the same prompt and seed come before this one: each draws differently"""
    eos_token_id: int | None = None
    options: tuple[tuple[str, Hashable], ...] = ()
    """Names and values that every forward pass is told. Only rows with the same ones run together"""
    opening: dict[str, Any] = field(default_factory=dict)
    """What the pass that begins the text is told besides"""
    trace: bool = False
    """Whether events carry traces. Such rows run beside the others, as a pass that is traced takes longer"""
    scores: int | None = None
    """Tell log-probabilities, and those of this many likeliest tokens"""
    score_prompt: bool = False
    deadline: float = math.inf
    """In the engine's time"""


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to a row: the prompt was scored, a token was written, or the row ended, with its last token or without one."""

    token: int | None = None
    stopped: Reason | None = None
    scores: Scores | None = None
    prompt_scores: tuple[Scores | None, ...] | None = None
    """Of each token of the prompt, None for the first"""
    trace: Any = None
    """One row's trace of all tokens up to this one, as the model's family reads it"""
    error: str = ""


Listener = Callable[[Event], bool]
"""Is told of every event in the engine's thread; says whether the row is to end."""


class Row:
    """A request at work."""

    def __init__(self, request: Request, listener: Listener, *, context: int | None, owner: Hashable = None):
        self.request, self._listener = request, listener
        self.owner: Hashable = self if owner is None else owner
        wanted, room = request.max_new_tokens, math.inf if context is None else context - len(request.prompt)
        self.limit = int(min(wanted, room))
        self.at_limit: Reason = "length" if wanted <= room else "context"
        sampling = request.sampling
        self.uniform: np.ndarray | None = None
        if sampling.temperature > 0:
            self.uniform = random_stream(sampling.seed, request.prompt, request.again, length=self.limit)
        self.manner = (sampling.temperature, sampling.top_k, sampling.top_p)
        self.written = 0
        self.trace: Any = None
        self.prompt_scores: list[Scores | None] = [None]
        self.done = False

    def leave(self) -> None:
        """End without another word, from any thread."""
        self.done = True

    def tell(self, event: Event) -> None:
        """Let the listener know. What goes wrong there ends this row alone."""
        try:
            asked = self._listener(event)
        except Exception:
            _LOG.exception("the listener of a row failed; the row ends")
            asked = True
        self.done = self.done or asked or event.stopped is not None

    def write(self, token: int, scores: Scores | None) -> None:
        """Tell of a new token, and whether it is the last."""
        self.written += 1
        stopped: Reason | None = None
        if token == self.request.eos_token_id:
            stopped = "end"
        elif self.written >= self.limit:
            stopped = self.at_limit
        self.tell(Event(token, stopped, scores, trace=self.trace))


@dataclass
class _Group:
    """Rows that share a memory: those that write, whose next logits are there, or those whose prompts are still being read."""

    rows: list[Row]
    batch: Batch
    logits_BV: Tensor | None = None
    read: int = 0
    """Tokens of its prompt that a single row has read"""


class Engine:
    """Writes for many rows at once with one model, one token each per round. All but `submit` and `Row.leave` belong to one thread."""

    def __init__(self, model: Any, *, rows: int = 32, clock: Callable[[], float] = time.monotonic):
        if rows < 1:
            raise ValueError(f"rows={rows}: must be at least 1")
        self.model, self.most_rows, self.clock = model.eval(), rows, clock
        self.most_of_one = max(rows // 2, 1)
        """Rows of one owner that work at once: the others are left for others, who would wait until an answer ends"""
        self.context = context_of(model)
        self.waiting: deque[Row] = deque()
        self._reading: deque[_Group] = deque()
        self._writing: dict[tuple[Hashable, ...], list[_Group]] = {}
        with torch.inference_mode():
            probe = Batch(model)
            probe.begin([[0]])
        self.joins = probe.can_join and probe.can_select
        """Whether the model's memory lets rows share it; where it does not, each row has its own, and runs by itself"""

    def submit(self, request: Request, listener: Listener, *, owner: Hashable = None) -> Row:
        """Let a row wait for its turn; from any thread. Its listener hears of it in the engine's thread.

        Rows of one `owner` share its turns; without one a row is its own.
        """
        row = Row(request, listener, context=self.context, owner=owner)
        self.waiting.append(row)
        return row

    @property
    def rows(self) -> list[Row]:
        """The rows that are read or written now."""
        groups = [*self._reading, *(group for groups in list(self._writing.values()) for group in groups)]
        return [row for group in groups for row in group.rows]

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self._reading or self._writing)

    @torch.inference_mode()
    def round(self) -> None:
        """Read a chunk of a prompt, and let every row that has read its own write one token."""
        self._expire()
        self._admit()
        if self._reading:
            group = self._reading.popleft()
            if any(not row.done for row in group.rows):
                if self._guarded(self._read_chunk, group):
                    self._join(group)
                elif group.rows:
                    self._reading.append(group)  # shorter prompts get their turn before its next chunk
        for lane, groups in list(self._writing.items()):
            for group in groups:
                self._guarded(self._write, group)
            self._writing[lane] = [group for group in groups if group.rows]
            if not self._writing[lane]:
                del self._writing[lane]

    def fail(self, error: str) -> None:
        """End every row, also those that wait."""
        failed = self.rows
        self._reading.clear()
        self._writing.clear()
        while self.waiting:  # one by one: others may be added meanwhile, and none is to be forgotten
            failed.append(self.waiting.popleft())
        for row in failed:
            if not row.done:
                row.tell(Event(stopped="failed", error=error))

    def _expire(self) -> None:
        """Tell rows whose time is up, and forget those that wait no more."""
        now = self.clock()
        for row in [*self.waiting, *self.rows]:
            if not row.done and row.request.deadline < now:
                row.tell(Event(stopped="time"))
        if any(row.done for row in list(self.waiting)):
            for _ in range(len(self.waiting)):  # others may be added meanwhile, at the end
                row = self.waiting.popleft()
                if not row.done:
                    self.waiting.append(row)

    def _admit(self) -> None:
        """Begin with rows that wait, in turn: several short prompts of a lane are read together, a long one in chunks."""
        at_work = Counter(row.owner for row in self.rows)
        free = self.most_rows - at_work.total()
        while free > 0 and (first := self._next(at_work)):
            rows, longest = [self._take(first, at_work)], len(first.request.prompt)
            while len(rows) < free and self.joins and _plain(first) and (another := self._next(at_work)) and _plain(another):
                longest = max(longest, len(another.request.prompt))
                if _lane(another) != _lane(first) or (len(rows) + 1) * longest > CHUNK:
                    break
                rows.append(self._take(another, at_work))
            free -= len(rows)
            options = dict(first.request.options) | ({"trace": True} if first.request.trace else {})
            self._reading.append(_Group(rows, Batch(self.model, options)))

    def _next(self, at_work: Counter[Hashable]) -> Row | None:
        """Return the first row that waits of the owner with the fewest at work, None where all have as many as they may."""
        allowed = [row for row in list(self.waiting) if at_work[row.owner] < self.most_of_one]
        return min(allowed, key=lambda row: at_work[row.owner], default=None)

    def _take(self, row: Row, at_work: Counter[Hashable]) -> Row:
        """Let a row wait no more."""
        self.waiting.remove(row)
        at_work[row.owner] += 1
        return row

    def _read_chunk(self, group: _Group) -> bool:
        """Read the next chunk of prompts; say whether they have been read."""
        request = group.rows[0].request
        if len(group.rows) > 1:
            output = group.batch.begin([row.request.prompt for row in group.rows])
        else:
            part = request.prompt[group.read : group.read + CHUNK]
            if group.read:
                output = group.batch.read(torch.tensor([part], device=self.model.device), every=request.score_prompt)
            else:
                output = group.batch.begin([part], every=request.score_prompt, **request.opening)
            if request.score_prompt:
                self._score_prompt(group, output.logits[0])
            group.read += len(part)
        self._note_traces(group, output)
        group.logits_BV = output.logits[:, -1]
        if len(group.rows) == 1 and group.read < len(request.prompt):
            return False
        for row in group.rows:
            if row.request.score_prompt:
                row.tell(Event(prompt_scores=tuple(row.prompt_scores[:-1])))
            if row.limit < 1:
                row.tell(Event(stopped=row.at_limit, trace=row.trace))
        return True

    def _score_prompt(self, group: _Group, logits_TV: Tensor) -> None:
        """Keep what the model thinks of the tokens that follow those just read; of the one after the prompt there is nothing to say."""
        row = group.rows[0]
        after = row.request.prompt[group.read + 1 : group.read + 1 + len(logits_TV)]
        tokens = [*after, *[0] * (len(logits_TV) - len(after))]
        row.prompt_scores += scored(logits_TV, tokens, row.request.scores or 0)

    def _join(self, group: _Group) -> None:
        """Let rows that have read their prompts write with those of their lane."""
        self._drop_done(group)
        if not group.rows:
            return
        groups = self._writing.setdefault(_lane(group.rows[0]), [])
        if not groups or not self.joins:
            groups.append(group)
            return
        running = groups[0]
        assert running.logits_BV is not None and group.logits_BV is not None
        running.batch.join(group.batch)
        running.rows += group.rows
        running.logits_BV = torch.cat((running.logits_BV, group.logits_BV))

    def _write(self, group: _Group) -> None:
        """Let every row of a group write a token, and read it unless the row ends."""
        self._drop_done(group)
        if not group.rows:
            return
        assert group.logits_BV is not None
        for row, peak in zip(group.rows, group.logits_BV.amax(-1).tolist(), strict=True):
            if not math.isfinite(peak):
                rule = "the model's weights are broken or its precision is too low"
                row.tell(Event(stopped="failed", error=f"the highest logit is {peak}, which is no number to go on with: {rule}"))
        self._drop_done(group)
        if not group.rows:
            return
        token_B = picked(group.rows, group.logits_BV)
        tokens, scores = token_B.tolist(), self._scores(group, token_B)
        if traced := group.rows[0].request.trace:  # a token's trace is there when it has been read
            output = group.batch.read(token_B[:, None])
            self._note_traces(group, output)
            group.logits_BV = output.logits[:, -1]
        for row, token, score in zip(group.rows, tokens, scores, strict=True):
            row.write(token, score)
        kept = self._drop_done(group)
        if group.rows and not traced:
            group.logits_BV = group.batch.advance(token_B if kept is None else token_B[kept])

    def _scores(self, group: _Group, token_B: Tensor) -> list[Scores | None]:
        found: list[Scores | None] = [None] * len(group.rows)
        assert group.logits_BV is not None
        for place, row in enumerate(group.rows):
            if row.request.scores is not None:
                found[place] = scored(group.logits_BV[place : place + 1], [int(token_B[place])], row.request.scores)[0]
        return found

    def _note_traces(self, group: _Group, output: Any) -> None:
        if not group.rows[0].request.trace:
            return
        for place, row in enumerate(group.rows):
            new = output.trace.row(place)
            row.trace = new if row.trace is None else new.after(row.trace)

    def _drop_done(self, group: _Group) -> Tensor | None:
        """Let rows that have ended leave the memory; return the index of those that stay, None where all do."""
        if not any(row.done for row in group.rows):
            return None
        assert group.logits_BV is not None
        keep = [place for place, row in enumerate(group.rows) if not row.done]
        group.rows = [group.rows[place] for place in keep]
        index = torch.tensor(keep, dtype=torch.long, device=group.logits_BV.device)
        if keep:
            group.batch.select(index)
            group.logits_BV = group.logits_BV[index]
        return index

    def _guarded(self, work: Callable[[_Group], Any], group: _Group) -> Any:
        """Do a group's work; what goes wrong in the model ends its rows and nobody else's."""
        try:
            return work(group)
        except Exception as error:
            _LOG.exception("a forward pass failed; %d rows end", len(group.rows))
            for row in group.rows:
                if not row.done:
                    row.tell(Event(stopped="failed", error=f"the model failed: {type(error).__name__}"))
            group.rows = []
            return False


def picked(rows: Sequence[Row], logits_BV: Tensor) -> Tensor:
    """Return the next token of every row (B,), each drawn in its own manner with its own numbers."""
    manners: dict[Hashable, list[int]] = {}
    for place, row in enumerate(rows):
        manners.setdefault(row.manner, []).append(place)
    token_B = torch.empty(len(rows), dtype=torch.long, device=logits_BV.device)
    for places in manners.values():
        index = torch.tensor(places, device=logits_BV.device)
        drawn = [uniform[rows[place].written] for place in places if (uniform := rows[place].uniform) is not None]
        uniform_n = torch.tensor(drawn, dtype=torch.float64, device=logits_BV.device) if drawn else None
        token_B[index] = rows[places[0]].request.sampling.pick(logits_BV[index], uniform_n)
    return token_B


def scored(logits_TV: Tensor, tokens: Sequence[int], top: int) -> list[Scores | None]:
    """Return the log-probability of a token at each place, and the `top` likeliest ones with theirs."""
    sure_TV = (logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()).log_softmax(-1).clamp(min=UNLIKELY)
    own = sure_TV.gather(1, torch.tensor(tokens, device=sure_TV.device)[:, None])[:, 0].tolist()
    best = sure_TV.topk(min(top, sure_TV.shape[-1]), dim=-1)
    likely = [tuple(zip(*pair, strict=True)) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return list(zip(own, likely, strict=True))


def _lane(row: Row) -> tuple[Hashable, ...]:
    """Return what rows must have in common to run together."""
    return (row.request.options, row.request.trace)


def _plain(row: Row) -> bool:
    """Whether a prompt may be read together with others: nothing is told of it alone, and nothing is asked of it."""
    return not row.request.opening and not row.request.score_prompt and len(row.request.prompt) <= CHUNK
