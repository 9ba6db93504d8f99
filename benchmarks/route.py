"""Routes beside plain decoders: training steps, greedy decoding, memory, and how much of the blocks saved is saved in time.

    pathlm bench route                       all of it, on the CPU: D 192, 12 layers 2/8/2, rows of 256 tokens, 8 at a time
    pathlm bench route --only decode
    pathlm bench route --only decode --wide  D 512
    pathlm bench route --device cuda         brian-r125 beside plain-125m in bfloat16, at all and at 66 % of the route steps

A training step is forward, loss, backward, clipping and AdamW. Random routes draw every visit evenly from the 8 blocks, 8 steps long. With
fewer steps tokens leave after different numbers of them. What a block costs is measured in the same run, as the difference of two plain
decoders, of 12 and 8 layers: the ideal saving is that cost times the block evaluations saved. Evaluations are told by the model (its metric
`route/block_evaluations`) and counted by hooks; both must agree. Decoding is `pathlm.generate` from prompts of one token, so that every
pass reads one token per row. Tokens leave together, at one place of the pool, or at batch 32 also at different steps ("on average").
What that could save at best is told by a plain decoder whose blocks run on as many rows ("rows as in"), with nothing to choose or move.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoder import trainer
from benchmarks.routed import (
    ENDS,
    POOL,
    SIZES,
    Case,
    Size,
    cache_bytes,
    cases,
    counting,
    decoded_calls,
    decoded_rows,
    leave_after,
    leave_unevenly,
    narrow,
    parameters,
)
from benchmarks.timing import Ratio, arguments, interleaved, ratio, show
from pathlm.generate import generate
from pathlm.models.brian.presets import cache_numbers_per_token

LAYERS = POOL + sum(ENDS)
FEWER = 4
"""Layers that the smaller plain decoder lacks."""
PLAIN_FEWER = "plain, 4 layers fewer"
HALF = "half the rows, {}"
REACHABLE = "plain, rows as in {} steps on average"
ALL, TOGETHER, APART = "routed, all steps", "routed, {} steps", "routed, {} steps on average"
Measured = tuple[list[dict[str, Any]], dict[str, Ratio]]


def main(argv: list[str]) -> dict:
    """Measure and show. Ratios of times are below 1 where routes are faster; shares of a saving are at best 1."""
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("train", "decode", "memory"), default=None)
    parser.add_argument("--new", type=int, default=128, help="tokens to decode")
    parser.add_argument("--wide", action="store_true", help="D 512 instead of 192 on the CPU: blocks weigh more beside everything else")
    parser.add_argument("--tiny", action="store_true", help="models too small to mean anything, to try the program itself")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; nothing measured")
        return {}
    torch.set_num_threads(options.threads)
    options.size = "tiny" if options.tiny else "wide" if options.wide else options.device
    size = SIZES[options.size]
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    for name, measure in {"train": training, "decode": decoding, "memory": memory}.items():
        if options.only in (None, name):
            added, found = measure(size, options)
            rows += added
            ratios |= found
    title = f"routes and plain decoders, {'bfloat16' if options.device == 'cuda' else 'float32'}"
    return show(title, rows, ratios, options=options)


def training(size: Size, options: Any) -> Measured:
    """Time training steps of every case."""
    told: dict[str, tuple[Any, float]] = {}
    steps: dict[str, Callable[[], float]] = {}
    tokens = torch.empty(0)
    for name, case in cases(size).items():
        model = case.build(size, options.device)
        tokens = torch.randint(0, model.config.vocab_size, (size.rows, size.length), device=options.device)
        steps[name] = trainer(model, tokens, compiled=False, **case.options(tokens))
        told[name] = evaluations(model, case, tokens)
    seconds = interleaved(steps, repeats=options.repeats, warmup=2)
    rows = [
        _row(f"training step, {name}", times, scale=1e3, unit="ms", tokens=tokens.numel(), blocks=told[name])
        for name, times in seconds.items()
    ]
    shallow = next(name for name in seconds if name.endswith("of the steps"))
    ratios = {f"training step, {name} ÷ plain": ratio(seconds[name], seconds["plain"]) for name in seconds if not name.startswith("plain")}
    saved = told["routed, random"][1] - told[shallow][1]
    block = _block(seconds, "plain", PLAIN_FEWER)
    ratios[f"training step, {shallow}: saving ÷ cost of the {saved:.2f} blocks/token saved"] = ratio(
        _minus(seconds["routed, random"], seconds[shallow]), [saved * cost for cost in block]
    )
    return rows, ratios


@torch.no_grad()
def evaluations(model: Any, case: Case, tokens: torch.Tensor) -> tuple[Any, float]:
    """Block evaluations per token of a training step: what the model says (None for a plain decoder) and what hooks count."""
    with counting(model) as rows, torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=tokens.is_cuda):
        output = model(input_ids=tokens, labels=tokens, use_cache=False, **case.options(tokens))
    counted = sum(rows) / tokens.numel()
    told = output.metrics.get("route/block_evaluations")
    assert told is None or abs(float(told) - counted) < 1e-4, (told, counted)
    return None if told is None else float(told), counted


def decoding(size: Size, options: Any) -> Measured:
    """Time greedy decoding at batch 1 and 32, with all route steps and with the size's share of them."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    some = round(size.share * POOL)
    for batch in (1, 32):
        models = {name: case.build(size, options.device) for name, case in _decoders(batch, some).items()}
        models = {name: (model.bfloat16() if options.device == "cuda" else model).eval() for name, model in models.items()}
        prompt = torch.randint(0, models["plain"].config.vocab_size, (batch, 1), generator=torch.Generator().manual_seed(2))
        prompt = prompt.to(options.device)
        leave_after(models[TOGETHER.format(some)], some)
        if batch > 1:
            leave_unevenly(models[ALL], prompt, new=options.new, mean=POOL)
            leave_unevenly(models[APART.format(some)], prompt, new=options.new, mean=some)
            narrow(models[REACHABLE.format(some)], decoded_rows(models[APART.format(some)], prompt, new=options.new))
        prompts = {name: prompt[: batch // 2] if name.startswith("half the rows") else prompt for name in models}
        calls = {name: _writer(model, prompts[name], options.new) for name, model in models.items()}
        ran = {name: decoded_calls(model, prompts[name], new=options.new) for name, model in models.items()}
        seconds = interleaved(calls, repeats=options.repeats)
        what = f"decoding, batch {batch}"
        for name in models:
            tokens = len(prompts[name]) * options.new
            blocks = (None, sum(ran[name]) / tokens)
            rows.append(_row(f"{what}, {name}", seconds[name], scale=1e6 / tokens, unit="µs/token", tokens=tokens, blocks=blocks))
        ratios |= {f"{what}, {name} ÷ plain": ratio(seconds[name], seconds["plain"]) for name in models if name.startswith("routed")}
        for name in [name for name in models if name.startswith(f"routed, {some} steps")]:
            for base in (ALL, "plain"):
                ratios |= _saving(what, seconds, ran, base, name, batch=batch)
        ratios |= _saving(what, seconds, ran, "plain", PLAIN_FEWER, batch=batch)
        if batch > 1:
            ratios |= _reached(what, seconds, ran, apart=APART.format(some), reachable=REACHABLE.format(some), batch=batch)
    return rows, ratios


def _decoders(batch: int, some: int) -> dict[str, Case]:
    """What decodes; with several rows also the plain decoders on half of them, which tell what a block costs beside its rows."""
    fewer = Case(layers=LAYERS - FEWER)
    found = {"plain": Case(), PLAIN_FEWER: fewer}
    if batch > 1:
        found |= {HALF.format("plain"): Case(), HALF.format(PLAIN_FEWER): fewer, APART.format(some): Case(routed=True)}
        found[REACHABLE.format(some)] = Case()
    return found | {ALL: Case(routed=True), TOGETHER.format(some): Case(routed=True)}


def _saving(
    what: str, seconds: Mapping[str, list[float]], ran: Mapping[str, list[int]], base: str, other: str, *, batch: int
) -> dict[str, Ratio]:
    """How much of the blocks that are not run appears in the time: by their share, by their cost, and by the cost of the calls that ran.

    A call of a block on half the rows costs more than half; where the cost of a call was measured at two numbers of rows, the third number
    takes a + b · rows for it.
    """
    share, saving = 1 - sum(ran[other]) / sum(ran[base]), _minus(seconds[base], seconds[other])
    name = f"{what}, {other} beside {base}"
    by_share = ratio(saving, [share * second for second in seconds[base]])
    found = {f"{name}: share of time saved ÷ share of blocks saved ({share:.1%})": by_share}
    if other == PLAIN_FEWER:
        return found
    passes = len(ran["plain"]) / LAYERS
    cost = [block / passes for block in _block(seconds, "plain", PLAIN_FEWER)]
    saved = (sum(ran[base]) - sum(ran[other])) / batch
    found[f"{name}: saving ÷ cost of the blocks saved"] = ratio(saving, [saved * one for one in cost])
    if HALF.format("plain") in seconds and len(set(ran[other])) > 1:
        cost_half = [block / passes for block in _block(seconds, HALF.format("plain"), HALF.format(PLAIN_FEWER))]
        calls = len(ran[base]) - len(ran[other])
        # cost(rows) = cost_half + (rows - batch / 2) · (cost - cost_half) / (batch / 2)
        ideal = [calls * (2 * half - one) + saved * 2 * (one - half) for one, half in zip(cost, cost_half, strict=True)]
        found[f"{name}: saving ÷ cost saved where a call costs a + b · rows"] = ratio(saving, ideal)
    return found


def _reached(
    what: str, seconds: Mapping[str, list[float]], ran: Mapping[str, list[int]], *, apart: str, reachable: str, batch: int
) -> dict[str, Ratio]:
    """How much of the blocks not run could appear in the time, by a plain decoder that runs as few rows, and how much of that does."""
    possible = _minus(seconds["plain"], seconds[reachable])
    passes = len(ran["plain"]) / LAYERS
    saved = (sum(ran["plain"]) - sum(ran[reachable])) / batch / passes
    found = {
        f"{what}, {reachable}: saving ÷ cost of the blocks saved": ratio(
            possible, [saved * c for c in _block(seconds, "plain", PLAIN_FEWER)]
        )
    }
    for base in (ALL, "plain"):
        name = f"{what}, {apart} beside {base}: saving ÷ what the plain decoder with as many rows saves"
        found[name] = ratio(_minus(seconds[base], seconds[apart]), possible)
    return found


def memory(size: Size, options: Any) -> Measured:
    """Measure the peak memory of training, a process for each case, and the bytes that decoding keeps per token."""
    rows: list[dict[str, Any]] = []
    peaks: dict[str, list[float]] = {name: [] for name in cases(size) if name != PLAIN_FEWER}
    for _ in range(min(options.repeats, 3)):
        for name, found in peaks.items():
            asked = {"size": options.size, "case": name, "device": options.device, "threads": options.threads}
            command = [sys.executable, "-m", "benchmarks.routed", json.dumps(asked)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=os.environ)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    rows += [_row(f"training, peak memory, {name}", found, unit="MB") for name, found in peaks.items()]
    ratios = {f"training, peak memory, {name} ÷ plain": ratio(found, peaks["plain"]) for name, found in peaks.items() if name != "plain"}
    kept: dict[str, float] = {}
    for name, case in (("plain", Case()), ("routed", Case(routed=True))):
        model = case.build(size, options.device).eval()
        model = model.bfloat16() if options.device == "cuda" else model
        tokens = torch.randint(0, model.config.vocab_size, (2, size.length), device=options.device)
        kept[name] = cache_bytes(model, tokens)
        stated = cache_numbers_per_token(model.config) * model.dtype.itemsize
        assert kept[name] == stated, (kept[name], stated)
        rows.append(_row(f"decoding memory, {name}, {parameters(model):,} parameters", [kept[name]], unit="bytes/token"))
    ratios["decoding memory per token, routed ÷ plain"] = ratio([kept["routed"]], [kept["plain"]])
    return rows, ratios


def _row(
    case: str, values: Sequence[float], *, unit: str, scale: float = 1.0, tokens: int = 0, blocks: tuple[Any, Any] = (None, None)
) -> dict[str, Any]:
    """One line of the table; None where there is nothing to tell."""
    middle = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [middle] * 3
    return {
        "case": case,
        "blocks/token": blocks[0],
        "by hooks": blocks[1],
        "median": middle * scale,
        "quartiles": f"{low * scale:,.4g} to {high * scale:,.4g}",
        "unit": unit,
        "tokens/s": tokens / middle if tokens else None,
    }


def _writer(model: Any, prompt: torch.Tensor, new: int) -> Callable[[], Any]:
    return lambda: generate(model, prompt, max_new_tokens=new, temperature=0)


def _minus(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def _block(seconds: Mapping[str, list[float]], larger: str, smaller: str) -> list[float]:
    """What one block costs in each round, run on every token."""
    return [difference / FEWER for difference in _minus(seconds[larger], seconds[smaller])]
