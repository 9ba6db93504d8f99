"""The engine: whoever runs beside a row, and whenever it came, it writes what it writes alone, and its paths are those of its text."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from cases import CASES, RELEASED, VOCABULARY

from pathlm.generate import Sampling, generate
from pathlm.models import family
from pathlm.models.output import PathOutput
from pathlm.serve import engine as module
from pathlm.serve.engine import Engine, Request


@dataclass
class Heard:
    """A listener that keeps what it was told, and wishes to stop after some tokens."""

    wish: int = 1_000
    tokens: list = field(default_factory=list)
    scores: list = field(default_factory=list)
    stopped: str | None = None
    prompt_scores: tuple | None = None
    trace: object = None
    error: str = ""

    def __call__(self, event):
        assert self.stopped is None, "nothing is told after the end"
        if event.token is not None:
            self.tokens.append(event.token)
            self.scores.append(event.scores)
        self.prompt_scores = event.prompt_scores or self.prompt_scores
        self.trace, self.stopped, self.error = event.trace, event.stopped, event.error
        if len(self.tokens) >= self.wish:
            self.stopped = "wish"
        return self.stopped == "wish"


class Numbers:
    """A tokenizer whose words are numbers."""

    def decode(self, tokens, **options):
        return "".join(f"<{token}>" for token in ([tokens] if isinstance(tokens, int) else tokens))

    def convert_ids_to_tokens(self, token):
        return f"<{token}>"


def requests_for(model, draw, *, count, longest=24, new=16):
    """Random requests, some of them twice; budgets and branches where the model has a choice."""
    options = [()]
    pool = getattr(model, "pool", None)
    if pool is not None and not getattr(model.prepared_by, "call", None):
        if model.pool.budgets_trained[0] < 1:
            options.append((("budget", 1.0),))
        if model.config.route_top_k == 1 and model.config.beam_expansion != 1 and pool.lowest_budget < 1:
            options.append((("route_beams", 2),))
    made = []
    for _ in range(count):
        prompt = tuple(draw.randrange(1, VOCABULARY) for _ in range(draw.choice([1, 2, 5, 9, draw.randrange(1, longest)])))
        manner = draw.choice([{"temperature": 0}, {"temperature": 0.8}, {"temperature": 1.3, "top_k": 7}, {"top_p": 0.8}])
        made.append(
            Request(
                prompt=prompt, max_new_tokens=draw.randrange(1, new), sampling=Sampling(seed=draw.randrange(4), **manner),
                eos_token_id=draw.choice([None, 3]), options=draw.choice(options), trace=draw.random() < 0.4,
            )
        )  # fmt: skip
    return made


def alone(model, request):
    options = dict(request.options)
    handle = model.register_forward_pre_hook(lambda _, args, given: (args, given | options), with_kwargs=True)
    sampling = request.sampling
    found = generate(
        model, [request.prompt], max_new_tokens=request.max_new_tokens, temperature=sampling.temperature, top_k=sampling.top_k,
        top_p=sampling.top_p, seed=sampling.seed, eos_token_id=request.eos_token_id,
    )[0]  # fmt: skip
    handle.remove()
    return found


def run(engine, requests, draw, *, rate=0.6, wishes=None):
    """Let requests arrive at random rounds and return what each listener heard."""
    heard = [Heard(*([] if wishes is None else [wishes[number]])) for number in range(len(requests))]
    due = list(zip(requests, heard, strict=True))
    for _ in range(2_000):
        while due and draw.random() < rate:
            engine.submit(*due.pop(0))
        engine.round()
        if not due and engine.idle:
            return heard
    raise AssertionError("rows are stuck")


def steps_of(paths):
    """All steps of some paths, in order: a token's path each, or a text's."""
    return [step for path in paths for step in path.steps]


def check_paths(model, request, heard):
    """The new tokens' paths are those that one pass over the whole text tells."""
    paths = family(model.config.model_type).paths
    ids = torch.tensor([[*request.prompt, *heard.tokens]])
    with torch.inference_mode():
        whole = model(ids, trace=True, use_cache=model.config.model_type == "brillm", **dict(request.options), **request.opening)
    newest = len(heard.tokens) if model.config.model_type == "brillm" else 1
    wanted = steps_of(paths(whole, Numbers(), newest=newest))
    found = steps_of(paths(PathOutput(trace=heard.trace), Numbers(), newest=newest))
    assert [step.node for step in found] == [step.node for step in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.score == pytest.approx(theirs.score, abs=1e-6)
        assert [name for name, _ in mine.rivals] == [name for name, _ in theirs.rivals]
        assert [number for _, number in mine.rivals + mine.parts] == pytest.approx([n for _, n in theirs.rivals + theirs.parts], abs=1e-6)


@pytest.mark.parametrize("case", [*CASES, RELEASED], ids=str)
def test_every_row_writes_what_it_writes_alone(case, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)  # longer prompts are read in pieces
    model, draw = case.build(), random.Random(str(case))
    requests = requests_for(model, draw, count=12)
    requests += requests[:2]
    heard = run(Engine(model, rows=6), requests, draw)
    assert [row.tokens for row in heard] == [alone(model, request) for request in requests]
    for request, row in zip(requests, heard, strict=True):
        ended = request.eos_token_id is not None and row.tokens[-1] == request.eos_token_id
        assert row.stopped == ("end" if ended else "length")
        if request.trace:
            check_paths(model, request, row)
