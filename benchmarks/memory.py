"""Canonical memory beside rows and plain decoders: bytes per token, prefill, a stream's memory, training steps, decoding.

    pathlm bench memory                  all of it, on the CPU
    pathlm bench memory --only cache     bytes per token of brian-r125 and plain-125m
    pathlm bench memory --device cuda    training, decoding and streams of brian-r125 and plain-125m in bfloat16

*cache*: the model reads a text of 2,048 tokens in float32 and the tensors of its cache are counted: what is remembered (`held`), what
buffers have allocated besides (`spare room`), and what one more token adds for good (`lasting`; what a window holds does not grow). Only
the vocabulary and the MLPs, which no cache depends on, are smaller than they are in the presets.
*prefill*: one row of 4,096 tokens in one pass, of which the last one's logits are asked for, as before writing; models of whole size.
*stream*: a process of its own reads 100,000 tokens in chunks, with windows in all blocks (12 of width 64); the peak of its memory above
what it held before.
*train*, *decode*: the models of `pathlm bench route`. A training step is forward, loss, backward, clipping and AdamW, with routes drawn
evenly; decoding goes on greedily after 512 and 4,096 tokens, all route steps, each time from the same memory.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoder import trainer
from benchmarks.remembered import CANONICAL, EVERYWHERE, EXTENTS, LOCAL, MIXED, PLAIN, Extent, as_trained, counted, memories, of_size
from benchmarks.routed import RANDOM, SIZES
from benchmarks.timing import Ratio, arguments, interleaved, ratio, show
from pathlm.models.brian.memory import SPARE

Measured = tuple[list[dict[str, Any]], dict[str, Ratio]]


def main(argv: list[str]) -> dict:
    """Measure and show. Ratios are of bytes, times or speeds, as their names say."""
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("cache", "prefill", "stream", "train", "decode"), default=None)
    parser.add_argument("--new", type=int, default=SPARE, help=f"tokens to decode, at most the {SPARE} that a window can take back")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=(1,), help="rows that decode together; more take minutes to read their prompts"
    )
    parser.add_argument("--tiny", action="store_true", help="models too small to mean anything, to try the program itself")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; nothing measured")
        return {}
    torch.set_num_threads(options.threads)
    options.size = "tiny" if options.tiny else options.device
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    for name, measure in {"cache": cache, "prefill": prefill, "stream": stream, "train": training, "decode": decoding}.items():
        if options.only in (None, name):
            added, found = measure(EXTENTS[options.size], options)
            rows += added
            ratios |= found
    title = f"canonical memory, rows and plain decoders, {'bfloat16' if options.device == 'cuda' else 'float32'}"
    return show(title, rows, ratios, options=options)


def cache(extent: Extent, options: Any) -> Measured:
    """Count the bytes per token of caches, from what they have allocated."""
    found = {name: counted(extent, name) for name in (PLAIN, *memories(extent.window))}
    rows = [
        _row(f"cache of {extent.text:,} tokens, {name}, {kind}", [value], unit="bytes/token")
        for name, values in found.items()
        for kind, value in values.items()
    ]
    ratios = {
        f"cache of {extent.text:,} tokens, {name}, {kind} ÷ plain": ratio([values[kind]], [found[PLAIN][kind]])
        for name, values in found.items()
        for kind in ("held", "lasting")
        if name != PLAIN
    }
    return rows, ratios


def prefill(extent: Extent, options: Any) -> Measured:
    """Time the reading of a prompt of which the next token is asked for, at most three times."""
    models = {name: of_size(extent, name).to(options.device) for name in (PLAIN, EVERYWHERE)}
    models = {name: model.bfloat16() if options.device == "cuda" else model for name, model in models.items()}
    tokens = torch.randint(0, models[PLAIN].config.vocab_size, (1, extent.prompt), generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(options.device)
    for model in models.values():
        _reader(model, tokens[:, :64])()  # a pass of whole length takes long on two cores
    seconds = interleaved({name: _reader(model, tokens) for name, model in models.items()}, repeats=min(options.repeats, 3), warmup=0)
    what = f"prefill of {extent.prompt:,} tokens"
    rows = [_row(f"{what}, {name}", times, unit="s", tokens=tokens.numel()) for name, times in seconds.items()]
    return rows, {f"{what}, speed, {EVERYWHERE} ÷ plain": ratio(seconds[PLAIN], seconds[EVERYWHERE])}


def _reader(model: Any, tokens: torch.Tensor) -> Callable[[], Any]:
    def read() -> Any:
        with torch.inference_mode():
            return model(tokens, use_cache=True, logits_to_keep=1).past_key_values

    return read


def stream(extent: Extent, options: Any) -> Measured:
    """Measure the memory along a stream, a process for each case."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    for name in (CANONICAL, MIXED.format(extent.window)):
        asked = {"size": options.size, "case": name, "device": options.device, "threads": options.threads}
        command = [sys.executable, "-m", "benchmarks.remembered", json.dumps(asked)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=os.environ)
        found = json.loads(done.stdout.splitlines()[-1])
        what = f"stream with windows, {name.partition(',')[0]}"
        for mark in found:
            for kind, of in (("peak", "peak of the process"), ("held", "cache, held"), ("allocated", "cache with spare room")):
                row = _row(f"{what}, {mark['tokens']:,} tokens: {of}", [mark[kind]], unit="MB", scale=1e-6)
                rows.append(row | {"tokens/s": mark["tokens/s"] if kind == "peak" else None})
        first, last = found[0], found[-1]
        for kind in ("peak", "allocated"):
            ratios[f"{what}, {kind}, {last['tokens']:,} ÷ {first['tokens']:,} tokens"] = ratio([last[kind]], [first[kind]])
    return rows, ratios


def training(extent: Extent, options: Any) -> Measured:
    """Time training steps with routes drawn evenly, beside the same model with rows only."""
    size, steps = SIZES[extent.trained], {}
    for name in (PLAIN, LOCAL, CANONICAL, EVERYWHERE, MIXED.format(extent.window)):
        model = as_trained(extent, name, options.device)
        tokens = torch.randint(0, model.config.vocab_size, (size.rows, size.length), device=options.device)
        knobs = {} if name == PLAIN else {"knobs": RANDOM}
        steps[name] = trainer(model, tokens, compiled=False, skip_logits=True, **knobs)
    seconds = interleaved(steps, repeats=options.repeats, warmup=2)
    rows = [_row(f"training step, {name}", times, scale=1e3, unit="ms", tokens=size.rows * size.length) for name, times in seconds.items()]
    return rows, {f"training step, {name} ÷ local": ratio(times, seconds[LOCAL]) for name, times in seconds.items() if name != LOCAL}


def decoding(extent: Extent, options: Any) -> Measured:
    """Time greedy decoding after prompts, each time from the same memory."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    models = {name: as_trained(extent, name, options.device).eval() for name in (PLAIN, *memories(extent.window))}
    models = {name: model.bfloat16() if options.device == "cuda" else model for name, model in models.items()}
    for context in extent.contexts:
        for batch in options.batch:
            prompt = torch.randint(0, models[PLAIN].config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(2))
            calls = {name: writer(model, prompt.to(options.device), options.new) for name, model in models.items()}
            seconds = interleaved(calls, repeats=options.repeats)
            what, tokens = f"decoding after {context:,} tokens, batch {batch}", batch * options.new
            rows += [_row(f"{what}, {name}", times, unit="µs/token", scale=1e6 / tokens, tokens=tokens) for name, times in seconds.items()]
            for name in models:
                for base in (PLAIN, LOCAL):
                    if name not in (PLAIN, base):
                        ratios[f"{what}, speed, {name} ÷ {base}"] = ratio(seconds[base], seconds[name])
    return rows, ratios


def writer(model: Any, prompt: torch.Tensor, new: int) -> Callable[[], torch.Tensor]:
    """A function that reads the prompt (B, T) once, and then goes on greedily from what it remembers: `new` tokens after its last one."""
    memory = None
    with torch.inference_mode():
        for part in prompt[:, :-1].split(1_024, dim=1):
            memory = model(part, past_key_values=memory, use_cache=True, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def write() -> torch.Tensor:
        token, told = prompt[:, -1:], []
        for _ in range(new):
            logits = model(token, past_key_values=memory, use_cache=True).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            told.append(token)
        memory.crop(-new)
        return torch.cat(told, dim=1)

    return write


def _row(case: str, values: Sequence[float], *, unit: str, scale: float = 1.0, tokens: int = 0) -> dict[str, Any]:
    """One line of the table; None where there is nothing to tell."""
    middle = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [middle] * 3
    spread = f"{low * scale:,.4g} to {high * scale:,.4g}" if len(values) > 1 else None
    return {
        "case": case,
        "median": middle * scale,
        "quartiles": spread,
        "unit": unit,
        "tokens/s": tokens / middle if tokens else None,
    }
