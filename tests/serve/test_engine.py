"""The engine: whoever runs beside a row, and whenever it came, it writes what it writes alone, and its paths are those of its text."""

import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from cases import BRANCHED, CASES, FACTORS, FRESH, GRAPHS, PLAIN, RELEASED, ROUTED, VOCABULARY, Case
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

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


KINDS = (*CASES, RELEASED)
QUICK = {str(case) for case in (PLAIN[0], *ROUTED[4::18], BRANCHED[2], FRESH[0], *GRAPHS[::8], RELEASED)}


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if str(c) in QUICK else pytest.mark.slow) for c in KINDS], ids=str)
def test_every_row_writes_what_it_writes_alone(case, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)  # longer prompts are read in pieces
    model, draw = case.build(), random.Random(str(case))
    requests = requests_for(model, draw, count=10)
    requests += requests[:2]
    heard = run(Engine(model, rows=6), requests, draw)
    assert [row.tokens for row in heard] == [alone(model, request) for request in requests]
    for request, row in zip(requests, heard, strict=True):
        ended = request.eos_token_id is not None and row.tokens[-1] == request.eos_token_id
        assert row.stopped == ("end" if ended else "length")
        if request.trace:
            check_paths(model, request, row)


LONG = {"max_position_embeddings": 300}
FORGETFUL = (
    Case("window and sinks", "brian", {"attention_window": 3, "attention_sinks": 2} | LONG),
    Case("few rows and codes", "brian", FACTORS["memory"]["few rows and codes"] | {"pool_blocks": 3, "max_route_steps": 3} | LONG),
    Case("newest codes", "brian", FACTORS["memory"]["newest codes"] | {"pool_blocks": 3, "max_route_steps": 3} | LONG),
)


@pytest.mark.parametrize("case", FORGETFUL, ids=str)
def test_rows_join_memories_that_have_forgotten(case):
    model, draw = case.build(), random.Random(3)
    lengths = ((3, 160), (150, 30), (9, 50), (145, 5))
    requests = [
        Request(prompt=tuple(draw.randrange(1, VOCABULARY) for _ in range(length)), max_new_tokens=new, sampling=Sampling(seed=1))
        for length, new in lengths
    ]
    heard = run(Engine(model), requests, draw, rate=0.03)
    assert [row.tokens for row in heard] == [alone(model, request) for request in requests]


def foreign(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    common = {"vocab_size": VOCABULARY, "initializer_range": 0.3}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common)).double().eval()
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**sizes, **common, max_position_embeddings=64, sliding_window=5)).double().eval()
    return LlamaForCausalLM(LlamaConfig(**sizes, **common, max_position_embeddings=64)).double().eval()


@pytest.mark.parametrize(("kind", "joins"), [("llama", True), ("gpt2", True), ("mistral", False)])
def test_models_of_other_makers_write_what_they_write_alone(kind, joins):
    model, draw = foreign(kind), random.Random(1)
    requests = [replace(request, trace=False) for request in requests_for(model, draw, count=10, new=40)]
    engine = Engine(model, rows=5)
    assert engine.joins == joins
    assert [row.tokens for row in run(engine, requests, draw, rate=0.3)] == [alone(model, request) for request in requests]


@pytest.fixture(scope="module")
def plain():
    return PLAIN[0].build()


def some(count, *, length=4, new=12, **more):
    draw = random.Random(5)
    return [Request(prompt=tuple(draw.randrange(1, VOCABULARY) for _ in range(length)), max_new_tokens=new, **more) for _ in range(count)]


def test_rows_that_leave_disturb_nobody(plain):
    requests, draw = some(9), random.Random(2)
    engine, heard = Engine(plain, rows=4), []
    for number, request in enumerate(requests):
        listener = Heard(wish=3) if number % 3 == 0 else Heard()
        heard.append((engine.submit(request, listener), listener))
    for number in range(1, 9, 3):
        heard[number][0].leave() if draw.random() < 0.5 else engine.round()
    while not engine.idle:
        engine.round()
    for (row, listener), request in zip(heard, requests, strict=True):
        wanted = alone(plain, request)
        assert listener.tokens == wanted[: len(listener.tokens)]
        assert listener.tokens == wanted or listener.stopped == "wish" or row.done
    assert [len(listener.tokens) for _, listener in heard[::3]] == [3, 3, 3]


def test_never_more_rows_run_than_are_allowed_and_nobody_is_passed_over(plain):
    engine, order = Engine(plain, rows=3), []
    for number, request in enumerate(some(8)):
        engine.submit(request, lambda event, number=number: order.append(number) if event.stopped else None)
    while not engine.idle:
        engine.round()
        assert len(engine.rows) <= 3
    assert order == sorted(order)


def test_one_request_takes_half_of_the_rows_at_most_and_the_next_place_is_for_who_has_the_fewest(plain):
    engine, ended = Engine(plain, rows=4), []

    def submit(owner, count, new):
        for request in some(count, new=new):
            engine.submit(request, lambda event: ended.append(owner) if event.stopped else None, owner=owner)

    def at_work():
        return sorted(row.owner for row in engine.rows)

    submit("many", 6, 12)
    engine.round()
    assert at_work() == ["many"] * 2, "half of the rows are left for others"
    submit("late", 1, 2)
    engine.round()
    assert at_work() == ["late", "many", "many"]
    submit("more", 6, 20)
    engine.round()
    assert ended == ["late"] and at_work() == ["many", "many", "more"]
    engine.round()
    assert at_work() == ["many", "many", "more", "more"]
    submit("last", 1, 2)
    while "last" not in ended:
        engine.round()
        assert len(engine.rows) <= 4
    assert ended == ["late", "many", "many", "last"], "a request that has none at work comes before those that waited longer"
    while not engine.idle:
        engine.round()
    assert len(ended) == 14


def test_a_long_prompt_does_not_keep_the_others_waiting(plain, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 8)
    engine, running, late = Engine(plain), Heard(), Heard()
    engine.submit(some(1, new=30)[0], running)
    engine.round()
    engine.submit(some(1, length=40)[0], late)
    for written in range(2, 6):
        engine.round()
        assert len(running.tokens) == written and not late.tokens
    short = Heard()
    engine.submit(some(1, length=3)[0], short)
    engine.round()
    engine.round()
    assert short.tokens


def test_a_row_whose_time_is_up_ends_wherever_it_is(plain):
    now = [0.0]
    engine = Engine(plain, rows=1, clock=lambda: now[0])
    running, waiting, patient = Heard(), Heard(), Heard()
    for listener, deadline in ((running, 5.0), (waiting, 5.0), (patient, 50.0)):
        engine.submit(replace(some(1)[0], deadline=deadline), listener)
    for _ in range(3):
        engine.round()
    now[0] = 6.0
    while not engine.idle:
        engine.round()
    assert (running.stopped, waiting.stopped, patient.stopped) == ("time", "time", "length")
    assert len(running.tokens) == 3 and not waiting.tokens


def test_what_goes_wrong_ends_the_rows_it_hits_and_no_other(plain, caplog):
    engine, good, listless = Engine(plain), Heard(), []
    engine.submit(some(1, options=(("budget", 0.5),))[0], bad := Heard())  # a plain decoder has none: its pass fails
    engine.submit(some(1)[0], good)
    engine.submit(some(1)[0], lambda event: listless.append(event) or 1 / 0)
    while not engine.idle:
        engine.round()
    assert bad.stopped == "failed" and "ValueError" in bad.error
    assert good.tokens == alone(plain, some(1)[0])
    assert len(listless) == 1
    assert "listener" in caplog.text and "forward pass" in caplog.text


def test_logits_that_are_no_number_end_a_row(plain):
    broken = PLAIN[0].build()
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    engine = Engine(broken)
    engine.submit(some(1)[0], heard := Heard())
    engine.round()
    assert heard.stopped == "failed" and "weights are broken" in heard.error and engine.idle


def test_scores_are_log_probabilities_of_prompt_and_answer(plain, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    request = replace(some(1, length=11)[0], scores=2, score_prompt=True)
    [heard] = run(Engine(plain), [request], random.Random(1))
    ids = [*request.prompt, *heard.tokens]
    with torch.inference_mode():
        sure = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert heard.prompt_scores[0] is None
    told = [*heard.prompt_scores[1:], *heard.scores]
    for place, (own, best) in enumerate(told):
        assert own == pytest.approx(float(sure[place, ids[place + 1]]), abs=1e-9)
        assert [n for _, n in best] == pytest.approx(sure[place].topk(2).values.tolist(), abs=1e-9)
