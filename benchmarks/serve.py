"""Served answers per second: 1, 8 and 32 clients at once, batched, beside a server that writes one answer at a time.

Two servers of the same models run as processes of their own, one with `--rows 1`. In turns, so many clients send each the same prompts
at once (tokens drawn at random, 8 to 64 of them) and read the streams of drawn answers of 64 tokens. Latencies are those of all answers
of all repeats: of the first token, and of the whole answer.
"""

import argparse
import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from benchmarks.timing import arguments, ratio, show

ROWS = {"batched": 32, "one at a time": 1}


def main(argv: list[str]) -> dict[str, Any]:
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("folders", nargs="+", help="runs or checkpoints")
    parser.add_argument("--clients", default="1,8,32", help="clients at once")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each answer, if it does not end earlier")
    parser.add_argument("--paths", action="store_true", help="ask for every token's path, too")
    options = parser.parse_args(argv)
    rows, ratios = [], {}
    with serving(options.folders, ROWS["batched"]) as batched, serving(options.folders, ROWS["one at a time"]) as single:
        urls = dict(zip(ROWS, (batched, single), strict=True))
        for model in httpx.get(f"{batched}/v1/models").json()["data"]:
            for clients in map(int, options.clients.split(",")):
                runs = measured(urls, model, clients, options)
                rates = {name: [run.tokens / run.seconds for run in found] for name, found in runs.items()}
                rows += [row(f"{model['id']}, {clients} clients, {name}", rates[name], found) for name, found in runs.items()]
                ratios[f"{model['id']}, {clients} clients, batched ÷ one at a time, tokens/s"] = ratio(*rates.values())
    return show("serving", rows, ratios, options=options)


class Run:
    """What some clients saw: answers' latencies in seconds, of the first token and of the last, tokens, and how long all took."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.whole: list[float] = []
        self.tokens = 0
        self.seconds = 0.0


def measured(urls: dict[str, str], model: dict[str, Any], clients: int, options: argparse.Namespace) -> dict[str, list[Run]]:
    """Let clients ask the servers in turns."""
    found: dict[str, list[Run]] = {name: [] for name in urls}
    for turn in range(-1, options.repeats):
        draw = random.Random(turn)
        vocabulary = model["pathlm"]["vocab_size"]
        bodies = [
            {
                "model": model["id"], "prompt": [draw.randrange(vocabulary) for _ in range(draw.randrange(8, 65))], "seed": number,
                "max_tokens": options.tokens, "stream": True, "stream_options": {"include_usage": True}, "paths": options.paths,
            }
            for number in range(clients)
        ]  # fmt: skip
        for name in urls if turn % 2 else reversed(urls):
            run = asyncio.run(asked(urls[name], bodies))
            if turn >= 0:  # the first turn is a warm-up
                found[name].append(run)
    return found


async def asked(url: str, bodies: Sequence[dict[str, Any]]) -> Run:
    """Send all requests at once and read their streams to the end."""
    run = Run()
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        began = time.perf_counter()
        await asyncio.gather(*(answer(client, body, run) for body in bodies))
        run.seconds = time.perf_counter() - began
    return run


async def answer(client: httpx.AsyncClient, body: dict[str, Any], run: Run) -> None:
    began, first = time.perf_counter(), 0.0
    async with client.stream("POST", "/v1/completions", json=body) as stream:
        async for line in stream.aiter_lines():
            first = first or time.perf_counter() - began
            if '"error"' in line[:20]:
                raise RuntimeError(line)
            if '"usage": {' in line:
                run.tokens += json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
    run.first.append(first)
    run.whole.append(time.perf_counter() - began)


def row(case: str, rates: Sequence[float], runs: Sequence[Run]) -> dict[str, Any]:
    first, whole = ([second for run in runs for second in getattr(run, name)] for name in ("first", "whole"))
    percentiles = {"first p50 s": (first, 50), "first p99 s": (first, 99), "answer p50 s": (whole, 50), "answer p99 s": (whole, 99)}
    return {"case": case, "tokens/s": statistics.median(rates)} | {name: quantile(*of) for name, of in percentiles.items()}


def quantile(values: Sequence[float], percent: int) -> float:
    """Return the smallest value that so many percent do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


@contextmanager
def serving(folders: Sequence[str], rows: int) -> Iterator[str]:
    """Run a server in a process of its own; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pathlm", "serve", *folders, "--port", str(port), "--rows", str(rows), "--max-seconds", "600"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {process.returncode}")
            try:
                httpx.get(f"{url}/health")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()
