"""Signal graphs: training steps beside the plain tensor path and the memory's bandwidth, growth with the graph, and decoding.

    pathlm bench brillm                all of it: 1,000 nodes at 10 %, 0.1 to 1.0 billion parameters, decoding at 4,000 nodes at 2 %
    pathlm bench brillm --only train
    pathlm bench brillm --only grow    4,000 nodes, a process per size; the largest needs 14 GB

A training step is forward, backward, clipping and row-wise AdamW on a batch of 32 × 32 tokens drawn evenly, so that nearly every position
reads a slab of its own (text repeats its nodes, and costs less per position). The bound is the traffic that no order of work avoids: the
touched slabs are read once to score, and weights and both moments are read and written once, at the bandwidth of reading and writing a
large array in place, measured in turns with the steps. "Tensors" is the same step without compiled loops.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Ratio, arguments, interleaved, ratio, show
from pathlm.config import OptimConfig
from pathlm.generate import generate
from pathlm.models import native
from pathlm.models.brillm.configuration import BrillmConfig
from pathlm.models.brillm.modeling import BrillmForCausalLM
from pathlm.models.brillm.optim import param_groups
from pathlm.train import parallel
from pathlm.train.optim import adamw

PASSES = 7
"""Times that a touched slab must cross the bus: one read to score, and a read and a write of weights, means and squares to update."""


@dataclass(frozen=True)
class Size:
    """How large the graphs are: nodes, edges, width, and numbers of a large array."""

    train: tuple[int, int, int]
    grow: tuple[tuple[int, int, int], ...]
    decode: tuple[int, int, int]
    array: int
    batch: int = 32
    length: int = 32


FULL = Size(
    train=(1_000, 100_000, 32),
    grow=((4_000, 91_000, 32), (4_000, 273_000, 32), (4_000, 906_997, 32)),
    decode=(4_000, 320_000, 32),
    array=2**26,
)
TINY = Size(train=(40, 160, 8), grow=((50, 100, 8), (50, 500, 8)), decode=(40, 160, 8), array=2**12, batch=4, length=6)
Measured = tuple[list[dict[str, Any]], dict[str, Ratio]]


def main(argv: list[str]) -> dict:
    """Measure and show. Ratios say how many times as fast as the tensors, and which share of the bandwidth's bound is reached."""
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("train", "grow", "decode"), default=None)
    parser.add_argument("--new", type=int, default=300, help="tokens to decode")
    parser.add_argument("--tiny", action="store_true", help="graphs too small to mean anything, to try the program itself")
    parser.add_argument("--grown", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    size = TINY if options.tiny else FULL
    if options.grown is not None:
        print(json.dumps(grown(size, size.grow[options.grown], options.repeats)))
        return {}
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    for name, measure in {"train": training, "grow": growing, "decode": decoding}.items():
        if options.only in (None, name):
            added, found = measure(size, options)
            rows += added
            ratios |= found
    return show("signal graphs, float32, exact softmax", rows, ratios, options=options)


def training(size: Size, options: Any) -> Measured:
    """Time training steps with compiled loops and with tensors alone, and the bus."""
    (fast, touched), (slow, _) = stepper(size, size.train), stepper(size, size.train)
    large = torch.ones(size.array)
    cases = {"compiled loops": fast, "bandwidth": lambda: large.mul_(1.0), "tensors": tensors_alone(slow)}
    seconds = interleaved(cases, repeats=options.repeats, warmup=2)
    positions = size.batch * (size.length - 1)
    bandwidth = 2 * large.nbytes / statistics.median(seconds["bandwidth"])
    bound = [PASSES * touched / (2 * large.nbytes) * s for s in seconds["bandwidth"]]
    rows = [row(f"training step, {name}", seconds[name], unit="ms", scale=1e3, per_s=positions) for name in ("compiled loops", "tensors")]
    rows.append(
        row(f"bound, {PASSES} × {touched / 1e6:,.0f} MB at {bandwidth / 1e9:.1f} GB/s", bound, unit="ms", scale=1e3, per_s=positions)
    )
    return rows, {
        "training, tensors ÷ compiled loops, seconds": ratio(seconds["tensors"], seconds["compiled loops"]),
        "training, share of the bandwidth's bound": ratio(bound, seconds["compiled loops"]),
    }


def growing(size: Size, options: Any) -> Measured:
    """Train graphs of several sizes, each in a process of its own, all moments filled before."""
    rows = []
    for number, (nodes, edges, width) in enumerate(size.grow):
        command = [sys.executable, "-m", "benchmarks.brillm", "--grown", str(number), "--threads", str(options.threads)]
        command += ["--repeats", str(options.repeats), *(["--tiny"] if options.tiny else [])]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=os.environ)
        told = json.loads(done.stdout.splitlines()[-1])
        name = f"{edges * width * (width + 1) / 1e9:.2f}B parameters, {edges / nodes**2:.1%} of {nodes:,} nodes' pairs"
        rows.append(row(f"step, {name}", told["seconds"], unit="ms", scale=1e3, per_s=size.batch * (size.length - 1)))
        rows.append(row(f"step, {name}: touched", [told["touched"]], unit="MB", scale=1e-6))
        rows.append(row(f"step, {name}: peak memory", [told["peak"]], unit="GB", scale=1e-9))
    return rows, {}


def grown(size: Size, graph: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """What the steps of one graph take, and the peak memory of this process."""
    step, touched = stepper(size, graph, fill=True)
    seconds = interleaved({"step": step}, repeats=repeats)["step"]
    return {"seconds": seconds, "touched": touched, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def decoding(size: Size, options: Any) -> Measured:
    """Time greedy decoding of `pathlm.generate` from prompts of one token."""
    model = build(size.decode).eval()
    calls: dict[str, Callable[[], Any]] = {}
    for batch in (1, 8, 32):
        prompt = torch.randint(0, size.decode[0], (batch, 1))
        calls[f"batch {batch}"] = lambda prompt=prompt: generate(model, prompt, max_new_tokens=options.new, temperature=0)
    calls["batch 1, tensors"] = tensors_alone(calls["batch 1"])
    seconds = interleaved(calls, repeats=options.repeats)
    rows = []
    for name, times in seconds.items():
        tokens = int(name.split()[1].rstrip(",")) * options.new
        rows.append(row(f"greedy decoding, {name}", times, unit="µs/token", scale=1e6 / tokens, per_s=tokens))
    return rows, {"decoding, batch 1, tensors ÷ compiled loops, seconds": ratio(seconds["batch 1, tensors"], seconds["batch 1"])}


def build(graph: tuple[int, int, int]) -> BrillmForCausalLM:
    """A graph of edges spread evenly over all pairs."""
    torch.manual_seed(0)
    nodes, edges, width = graph
    return BrillmForCausalLM(BrillmConfig(vocab_size=nodes, edges=edges, signal_size=width, initializer_range=0.1))


def stepper(size: Size, graph: tuple[int, int, int], *, fill: bool = False) -> tuple[Callable[[], None], float]:
    """A function that takes one training step on fresh tokens, and how many bytes of edges a step touches on average.

    `fill` makes both moments of every row exist before the first step, as they do late in a run.
    """
    model, optim = build(graph).train(), OptimConfig(lr=1e-3)
    optimizer = adamw(param_groups(model, optim), optim)
    if fill:
        for table in (model.graph.weight, model.graph.bias):
            state = {
                "step": torch.ones(table.shape[0]),
                "exp_avg": torch.full_like(table, 1e-9),
                "exp_avg_sq": torch.full_like(table, 1e-9),
            }
            optimizer.state[table] = {name: value.detach() for name, value in state.items()}
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, graph[0], (size.batch, size.length), generator=generator) for _ in range(16)]
    start = model.graph.start
    touched = statistics.mean(float((start.diff()[ids[:, :-1].unique()]).sum()) for ids in batches) * model.graph.weight[0].nbytes
    turn = iter(range(10**9))

    def step() -> None:
        optimizer.zero_grad()
        ids = batches[next(turn) % len(batches)]
        model(ids, labels=ids, skip_logits=True).loss.backward()
        parallel.clip(model, 1.0)
        optimizer.step()

    return step, touched


def tensors_alone(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as it runs where no compiled loops can be had."""

    def without() -> Any:
        real, native.available = native.available, lambda: False
        try:
            return call()
        finally:
            native.available = real

    return without


def row(case: str, values: list[float], *, unit: str, scale: float = 1.0, per_s: int = 0) -> dict[str, Any]:
    """One line of the table; None where there is nothing to tell."""
    middle = statistics.median(values)
    return {
        "case": case,
        "median": middle * scale,
        "best": min(values) * scale,
        "unit": unit,
        "tokens/s": per_s / middle if per_s else None,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
