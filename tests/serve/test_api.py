"""The interface, as OpenAI's own client and plain HTTP see it: answers are those of `generate` and `trace`."""

import json

import openai
import pytest
import torch
from served import wait_for

from pathlm import Path
from pathlm.evaluate.checkpoint import open_model
from pathlm.generate import encode_prompt, generate
from pathlm.models import family
from pathlm.trace import trace

PROMPT = "The state of the"


@pytest.fixture(scope="module")
def models(folders):
    return {name: open_model(folder) for name, folder in folders.items()}


@pytest.fixture
def ai(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def expected(models, name, prompts, *, stop_at_end=True, **options):
    """What `generate` writes, as tokens and as text."""
    model, tokenizer = models[name]
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    tokens = generate(model, ids, eos_token_id=tokenizer.eos_token_id if stop_at_end else None, **options)
    texts = []
    for before, new in zip(ids, tokens, strict=True):
        whole, read = (
            tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in (before + new, before)
        )
        texts.append(whole[len(read) :])
    return tokens, texts


def paths_of(told):
    return [Path.from_json(json.dumps(row)) for row in told]


@pytest.mark.parametrize("name", ["routed", "graph", "llama"])
def test_answers_are_those_of_generate(ai, models, name):
    _, greedy = expected(models, name, [PROMPT], max_new_tokens=20, temperature=0)
    answer = ai.completions.create(model=name, prompt=PROMPT, max_tokens=20, temperature=0)
    assert answer.choices[0].text == greedy[0]
    prompts = [PROMPT, "春", PROMPT]
    tokens, drawn = expected(models, name, [p for p in prompts for _ in range(2)], max_new_tokens=16, seed=7, top_p=0.9)
    answer = ai.completions.create(model=name, prompt=prompts, seed=7, n=2, top_p=0.9)
    assert [choice.text for choice in answer.choices] == drawn
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.completion_tokens == sum(map(len, tokens))
    assert answer.object == "text_completion" and answer.model == name


@pytest.mark.parametrize("name", ["routed", "graph", "llama"])
def test_a_stream_joined_is_the_whole_answer(ai, name):
    given = {"model": name, "prompt": [PROMPT, "é"], "max_tokens": 24, "seed": 3, "n": 2}
    whole = ai.completions.create(**given)
    texts, ends, usage = [""] * 4, [None] * 4, None
    for chunk in ai.completions.create(**given, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            assert ends[choice.index] is None
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason
        usage = chunk.usage or usage
    assert texts == [choice.text for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_a_seed_that_was_drawn_is_told_and_repeats_the_answer(ai):
    first = ai.completions.create(model="routed", prompt=PROMPT)
    again = ai.completions.create(model="routed", prompt=PROMPT, seed=first.model_extra["seed"])
    other = ai.completions.create(model="routed", prompt=PROMPT)
    assert again.choices[0].text == first.choices[0].text != other.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_string_wherever_tokens_end(ai, models, stream):
    _, (text,) = expected(models, "routed", [PROMPT], max_new_tokens=60, seed=1)
    for start, length in ((5, 1), (11, 3), (20, 6)):
        stop = text[start : start + length]
        answer = ai.completions.create(model="routed", prompt=PROMPT, seed=1, max_tokens=60, stop=[stop, "never there"], stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_a_prompt_may_be_tokens(ai, models):
    tokens = encode_prompt(models["routed"][1], PROMPT)
    texts = [ai.completions.create(model="routed", prompt=prompt, seed=1).choices[0].text for prompt in (PROMPT, tokens, [tokens])]
    assert len(set(texts)) == 1


def test_log_probabilities_are_those_of_the_model(ai, models):
    model, tokenizer = models["routed"]
    answer = ai.completions.create(model="routed", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3, echo=True).choices[0]
    told = answer.logprobs
    ids = encode_prompt(tokenizer, PROMPT)
    new = generate(model, [ids], max_new_tokens=6, temperature=0)[0]
    with torch.inference_mode():
        sure = model(torch.tensor([ids + new])).logits[0].log_softmax(-1)
    own = [float(sure[place, token]) for place, token in enumerate((ids + new)[1:])]
    assert told.token_logprobs == pytest.approx(own, abs=1e-9)
    assert [max(best.values()) for best in told.top_logprobs] == pytest.approx(sure[:-1].amax(-1).tolist(), abs=1e-9)
    assert all(len(best) == 3 for best in told.top_logprobs)
    assert answer.text.startswith(PROMPT)
    assert told.text_offset == sorted(told.text_offset) and told.text_offset[-1] <= len(answer.text)
    for token, offset in list(zip(told.tokens, told.text_offset, strict=True))[: len(ids) - 1]:
        assert answer.text[offset:].startswith(token)


def test_a_prompt_can_be_scored_without_writing(ai):
    whole = ai.completions.create(model="graph", prompt=PROMPT, max_tokens=3, logprobs=0, echo=True, seed=1).choices[0]
    alone = ai.completions.create(model="graph", prompt=PROMPT, max_tokens=0, logprobs=0, echo=True).choices[0]
    assert alone.text == PROMPT
    assert alone.logprobs.token_logprobs == pytest.approx(whole.logprobs.token_logprobs[:-3], abs=1e-9)
    assert alone.finish_reason == "length"


@pytest.mark.parametrize("name", ["routed", "graph"])
@pytest.mark.parametrize("stream", [False, True])
def test_every_new_token_comes_with_its_path(ai, folders, name, stream):
    extra = {"budget": 0.8, "branches": 2} if name == "routed" else {}
    model, tokenizer = open_model(folders[name], **extra)
    ids = encode_prompt(tokenizer, PROMPT)
    new = generate(model, [ids], max_new_tokens=12, seed=5)[0]
    extra_body = {"paths": True, **extra}
    answer = ai.completions.create(model=name, prompt=PROMPT, max_tokens=12, seed=5, stream=stream, extra_body=extra_body)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    mine = paths_of(path for choice in choices for path in choice.model_extra.get("paths", []))
    theirs = trace_of(model, tokenizer, ids + new)
    if name == "graph":  # one path of the whole text, told in parts
        same([step for path in mine for step in path.steps], theirs[0].steps[len(ids) :])
        assert "".join(path.text for path in mine) == "".join(choice.text for choice in choices)
    else:
        assert [path.text for path in mine] == [path.text for path in theirs[len(ids) :]]
        for one, other in zip(mine, theirs[len(ids) :], strict=True):
            same(one.steps, other.steps)


def trace_of(model, tokenizer, ids):
    with torch.inference_mode():
        return family(model.config.model_type).paths(model(torch.tensor([ids]), trace=True, use_cache=False), tokenizer)


def same(mine, theirs):
    assert [step.node for step in mine] == [step.node for step in theirs]
    for one, other in zip(mine, theirs, strict=True):
        assert [name for name, _ in (*one.rivals, *one.parts)] == [name for name, _ in (*other.rivals, *other.parts)]
        numbers = ([step.score, *(n for _, n in (*step.rivals, *step.parts))] for step in (one, other))
        assert next(numbers) == pytest.approx(next(numbers), abs=1e-6)


@pytest.mark.parametrize("name", ["routed", "graph"])
def test_paths_of_a_text_are_those_of_trace(client, models, name):
    texts = [PROMPT, "春眠不觉晓，" * 4]
    answer = client.post("/v1/paths", json={"model": name, "input": texts}).json()
    for told, found in zip(answer["data"], trace(*models[name], texts), strict=True):
        mine = paths_of(told["paths"])
        assert [path.text for path in mine] == [path.text for path in found]
        for one, other in zip(mine, found, strict=True):
            same(one.steps, other.steps)


def test_a_signal_may_begin_at_any_node_with_any_strength(client, models):
    model, tokenizer = models["graph"]
    ids = encode_prompt(tokenizer, "The state")[1:]
    signal = [0.5] * 7 + [-1.0]
    for given in ({"input": "The state", "start_token": False}, {"input": ids}):
        answer = client.post("/v1/paths", json={"model": "graph", "initial_signal": signal, **given}).json()["data"][0]
        assert answer["tokens"] == ids
        with torch.inference_mode():
            output = model(torch.tensor([ids]), trace=True, use_cache=False, initial_signal=torch.tensor(signal, dtype=torch.float64))
        same(paths_of(answer["paths"])[0].steps, family("brillm").paths(output, tokenizer)[0].steps)
    body = {"model": "graph", "prompt": "The state", "max_tokens": 12, "temperature": 0}
    texts = [client.post("/v1/completions", json=body | extra).json()["choices"][0]["text"] for extra in ({}, {"initial_signal": 40.0})]
    assert texts[0] != texts[1]


def test_models_say_what_they_can_do(ai):
    listed = {model.id: model.model_extra["pathlm"] for model in ai.models.list()}
    assert {name: about["kind"] for name, about in listed.items()} == {"routed": "routed", "graph": "graph", "llama": "plain"}
    assert listed["routed"]["budgets"] == [0.25, 1.0] and listed["routed"]["branches"] == 8
    assert listed["graph"]["signal_size"] == 8 and listed["graph"]["context"] is None
    assert not listed["llama"]["paths"]
    assert ai.models.retrieve("graph").id == "graph"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 201}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"n": 33}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": "a " * 101}, "prompt"),
        ({"extra_body": {"budget": 0.1}}, "budget"),
        ({"extra_body": {"branches": 9}}, "branches"),
        ({"extra_body": {"initial_signal": 1}}, "initial_signal"),
        ({"extra_body": {"colour": 1}}, "colour"),
        ({"model": "llama", "extra_body": {"paths": True}}, "paths"),
        ({"model": "llama", "extra_body": {"budget": 0.5}}, "budget"),
        ({"model": "graph", "extra_body": {"initial_signal": [1, 2]}}, "initial_signal"),
    ],
    ids=lambda given: str(given)[:40],
)
def test_a_mistake_is_answered_with_its_field_before_any_work(ai, given, field):
    with pytest.raises(openai.BadRequestError) as caught:
        ai.completions.create(**{"model": "routed", "prompt": PROMPT, "stream": True} | given)
    assert caught.value.param == field
    assert caught.value.type == "invalid_request_error"
    assert field in caught.value.message


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (b"{nope", "application/json", "at character 1"),
        (b"[]", "application/json", "must be a JSON object"),
        (b'{"model": "routed", "prompt": "a"}', "application/x-www-form-urlencoded", "Content-Type: application/json"),
    ],
)
def test_a_body_that_is_no_json_object_is_told_so(client, body, kind, said):
    answer = client.post("/v1/completions", content=body, headers={"content-type": kind})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] is None and said in error["message"], error


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/v1/completions", "POST"), ("PUT", "/v1/paths", "POST"), ("POST", "/v1/models", "GET"), ("DELETE", "/health", "GET")],
)
def test_who_asks_with_another_method_is_told_the_right_one(client, method, path, allowed):
    answer = client.request(method, path)
    assert answer.status_code == 405 and answer.headers["allow"] == allowed
    assert answer.json()["error"]["message"] == f"{method} {path}: use {allowed}"
    assert client.post("/nothing").status_code == 404
    assert client.head("/").status_code == client.head("/health").status_code == 200


def test_half_a_character_is_answered_with_its_field(client):
    for path, field in (("completions", "prompt"), ("paths", "input")):
        content = b'{"model": "routed", "%s": "\\ud800"}' % field.encode()
        error = client.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"}).json()["error"]
        assert error["param"] == field and "is not UTF-8" in error["message"]


def test_a_model_that_is_not_served_is_answered_with_those_that_are(ai):
    with pytest.raises(openai.NotFoundError, match="routed, graph, llama"):
        ai.completions.create(model="gpt", prompt=PROMPT)


def test_the_page_may_load_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert answer.status_code == 200 and "text/html" in answer.headers["content-type"]
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'") and "unsafe" not in policy and "*" not in policy
    assert "access-control-allow-origin" not in client.get("/v1/models", headers={"origin": "http://elsewhere"}).headers


def test_what_is_counted_can_be_read_by_prometheus(running, client):
    client.post("/v1/completions", json={"model": "llama", "prompt": "a", "max_tokens": 3})
    wait_for(lambda: not running.rows())  # an answer may come before the round ends that wrote its last token
    text = client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['pathlm_tokens_total{model="llama",kind="completion"}']) >= 1
    assert float(lines['pathlm_answer_seconds_count{model="llama"}']) >= 1
    assert lines['pathlm_rows{model="llama",state="running"}'] == "0"
    assert text.count("# TYPE pathlm_answer_seconds histogram") == 1
    assert client.get("/health").json() == {"status": "ok"}
