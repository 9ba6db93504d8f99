"""Requests that a program has made up: whatever is sent, nobody's answer is the server's failure, and nothing of it stays."""

import gc
import json
import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from served import wait_for

ODD = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), "", "a", "\x00",
    "é" * 50, "\ud800", "春眠不觉晓", "<|endoftext|>", "a" * 3_000, [], [[]], [None], [0], [299], [300], [-1], [True], [2**70], ["a", 1],
    [[1], ["a"]], [[[1]]], {}, {"a": 1}, {"include_usage": 1}, [1.5], ["\udfff"], [["a"]],
]  # fmt: skip
HEADERS = [{}, {"content-type": "text/plain"}, {"content-type": "application/json; charset=utf-16"}, {"content-encoding": "gzip"}]


class Inventor:
    """Makes requests up from the server's own schema, most of them wrong somewhere."""

    def __init__(self, schema, seed):
        self.schema, self.draw = schema, random.Random(seed)
        self.bodies = schema["components"]["schemas"]

    def request(self):
        """A method, a path, a body and headers."""
        draw = self.draw
        path, operations = draw.choice([item for item in self.schema["paths"].items() for _ in range(6 if "post" in item[1] else 1)])
        method = draw.choice([*operations] * 8 + ["get", "post", "put", "delete", "head", "options"])
        path = path.replace("{name}", draw.choice(["graph", "nothing", "%00", "../../etc/passwd", "é"]))
        content = self.raw(path)
        headers = draw.choice(HEADERS) if draw.random() < 0.05 else {"content-type": "application/json"}
        return method, path if draw.random() < 0.97 else path + draw.choice(["/", "x", "?a=b", "/%2e%2e/", "//"]), content, headers

    def raw(self, path):
        """The bytes of a body; some are no JSON."""
        draw = self.draw
        text = json.dumps(self.body("PathsAsked" if "paths" in path else "CompletionAsked"))
        if draw.random() < 0.12:
            at = draw.randrange(len(text) + 1)
            broken = [
                text[:at],
                text[:at] + draw.choice('{}[]",:\\\x00') + text[at:],
                "[" * 5_000,
                "",
                "null",
                '"' * 9,
                text * 2,
                text + "x",
            ]
            return draw.choice(
                [*(one.encode() for one in broken), bytes(draw.randrange(256) for _ in range(40)), b"\xff\xfe" + text.encode()]
            )
        return text.encode()

    def body(self, name):
        """An object with the fields of a schema, a few of them odd."""
        draw, fields = self.draw, self.bodies[name]["properties"]
        body = {
            "model": draw.choice(["routed", "graph", "llama"]),
            "prompt": "The state",
            "input": "The state",
            "max_tokens": draw.randrange(1, 6),
        }
        body = {key: value for key, value in body.items() if key in fields}
        for field in draw.sample(list(fields), draw.randrange(1, 7)):
            body[field] = draw.choice(ODD) if draw.random() < 0.5 else self.value(fields[field])
        if draw.random() < 0.1:
            body.pop(draw.choice(list(body)))
        if draw.random() < 0.05:
            body[draw.choice(["colour", "", "__proto__", "é"])] = draw.choice(ODD)
        return body

    def value(self, schema):
        """A value as a schema describes it, with small numbers."""
        draw = self.draw
        if "anyOf" in schema:
            return self.value(draw.choice(schema["anyOf"]))
        if "$ref" in schema:
            return {"include_usage": draw.random() < 0.5}
        kind = schema.get("type")
        if kind == "array":
            return [self.value(schema["items"]) for _ in range(draw.randrange(0, 4))]
        return {
            "integer": draw.randrange(0, 6), "number": draw.choice([0, 0.3, 0.7, 1, 2.5]), "boolean": draw.random() < 0.5, "null": None,
            "string": draw.choice(["routed", "graph", "The", " of", "春", "\n"]),
        }.get(kind, {"1": 1})  # fmt: skip


def send(client, inventor, many):
    """Send requests and return how often each status came; every error must be in OpenAI's shape."""
    asked = [inventor.request() for _ in range(many)]

    def one(request):
        method, path, content, headers = request
        answer = client.request(method, path, content=content, headers=headers)
        if answer.status_code >= 400 and method != "head":
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, request
        assert answer.status_code < 500, (request, answer.text)
        return answer.status_code

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one, asked))
    return {status: found.count(status) for status in sorted(set(found))}


def test_requests_made_up_from_the_schema_are_never_the_servers_failure(running, client):
    found = send(client, Inventor(client.get("/openapi.json").json(), seed=1), 300)
    assert found[200] > 20 and found[400] > 100
    wait_for(lambda: not running.rows())
    assert client.get("/health").status_code == 200


@pytest.mark.slow
def test_ten_thousand_of_them_leave_nothing_behind(running, client):
    inventor, process = Inventor(client.get("/openapi.json").json(), seed=2), psutil.Process()
    sizes = []
    for _ in range(10):
        send(client, inventor, 1_000)
        wait_for(lambda: not running.rows())
        gc.collect()
        sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[2] < 30 * 2**20, sizes
    assert len(httpx.get(f"{running.url}/metrics").text) < 30_000
