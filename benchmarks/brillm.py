"""Signal graphs: training steps beside the plain tensor path and the memory's bandwidth, growth with the graph, and decoding.

    pathlm bench brillm                all of it: 1,000 nodes at 10 %, 0.1 to 1.0 billion parameters, decoding at 4,000 nodes at 2 %
    pathlm bench brillm --only train
    pathlm bench brillm --only score   energies alone
    pathlm bench brillm --only grow    4,000 nodes, a process per size; the largest needs 14 GB
    pathlm bench brillm --device cuda  all of it on a GPU, with Triton's kernels where Triton is installed

A training step is forward, backward, clipping and row-wise AdamW on a batch of 32 × 32 tokens drawn evenly, so that nearly every position
reads a slab of its own (text repeats its nodes, and costs less per position). The bound is the traffic that no order of work avoids: the
touched slabs are read once to score, and weights and both moments are read and written once, at the bandwidth of reading and writing a
large array in place on the same device, measured in turns with the steps. "Tensors" is the same step without compiled loops or kernels.
Scoring alone must read the touched slabs and write the energies; greedy decoding must read a slab per token.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Ratio, arguments, interleaved, ratio, show
from pathlm.config import OptimConfig
from pathlm.generate import generate
from pathlm.models import native
from pathlm.models.brillm import fused
from pathlm.models.brillm.configuration import BrillmConfig
from pathlm.models.brillm.energy import energies
from pathlm.models.brillm.graph import Arrivals
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
LARGE_ARRAY = 2**28
"""Numbers of the large array on a GPU, whose caches are larger and whose calls cost more beside it."""
TINY = Size(train=(40, 160, 8), grow=((50, 100, 8), (50, 500, 8)), decode=(40, 160, 8), array=2**12, batch=4, length=6)
FAST = {"cpu": "compiled loops", "cuda": "Triton kernels"}
Measured = tuple[list[dict[str, Any]], dict[str, Ratio]]


def main(argv: list[str]) -> dict:
    """Measure and show. Ratios say how many times as fast as the tensors, and which share of the bandwidth's bound is reached."""
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=("train", "score", "grow", "decode"), default=None)
    parser.add_argument("--new", type=int, default=300, help="tokens to decode")
    parser.add_argument("--tiny", action="store_true", help="graphs too small to mean anything, to try the program itself")
    parser.add_argument("--grown", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; nothing measured")
        return {}
    options.fast = FAST[options.device] if options.device == "cpu" or fused.has_triton() else "tensors, no Triton here"
    torch.set_num_threads(options.threads)
    size = TINY if options.tiny else FULL if options.device == "cpu" else replace(FULL, array=LARGE_ARRAY)
    if options.grown is not None:
        print(json.dumps(grown(size, size.grow[options.grown], options)))
        return {}
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    for name, measure in {"train": training, "score": scoring, "grow": growing, "decode": decoding}.items():
        if options.only in (None, name):
            added, found = measure(size, options)
            rows += added
            ratios |= found
    return show("signal graphs, float32, exact softmax", rows, ratios, options=options)


def training(size: Size, options: Any) -> Measured:
    """Time training steps with compiled loops or kernels and with tensors alone, and the bus."""
    (fast, touched), (slow, _) = (stepper(size, size.train, options.device) for _ in range(2))
    cases = {options.fast: fast, "bandwidth": traffic(size, options), "tensors": tensors_alone(slow)}
    return compared("training step", cases, PASSES * touched, size, options)


def scoring(size: Size, options: Any) -> Measured:
    """Time the energies of all next nodes at the positions of a batch, with the signals at hand."""
    model, nodes = build(size.train, options.device), size.train[0]
    positions = size.batch * (size.length - 1)
    source_N = torch.randint(0, nodes, (positions,), generator=torch.Generator().manual_seed(1)).to(options.device)
    signal_ND, place_ND = torch.randn(2, positions, size.train[2], device=options.device).unbind(0)
    arrivals = Arrivals(signal_ND, source_N, place_ND)

    @torch.no_grad()
    def score() -> None:
        energies(model.signal_graph, arrivals)

    least = slabs(model, [source_N]) + positions * nodes * model.graph.weight.itemsize
    cases = {options.fast: score, "bandwidth": traffic(size, options), "tensors": tensors_alone(score)}
    return compared("scoring", cases, least, size, options)


def compared(what: str, cases: dict[str, Callable[[], Any]], least: float, size: Size, options: Any) -> Measured:
    """Time a case beside tensors and beside moving as many bytes as it cannot avoid."""
    seconds = interleaved(cases, repeats=options.repeats, warmup=2)
    positions, moved = size.batch * (size.length - 1), 2 * size.array * 4
    bound = [least / moved * s for s in seconds["bandwidth"]]
    bandwidth = moved / statistics.median(seconds["bandwidth"])
    rows = [row(f"{what}, {name}", seconds[name], unit="ms", scale=1e3, per_s=positions) for name in (options.fast, "tensors")]
    name = f"{what}, bound, {least / 1e6:,.0f} MB at {bandwidth / 1e9:,.1f} GB/s"
    rows.append(row(name, bound, unit="ms", scale=1e3, per_s=positions))
    return rows, {
        f"{what}, tensors ÷ {options.fast}, seconds": ratio(seconds["tensors"], seconds[options.fast]),
        f"{what}, share of the bandwidth's bound": ratio(bound, seconds[options.fast]),
    }


def traffic(size: Size, options: Any) -> Callable[[], Any]:
    """A function that reads and writes a large array in place."""
    large = torch.ones(size.array, device=options.device)
    return lambda: large.mul_(1.0)


def growing(size: Size, options: Any) -> Measured:
    """Train graphs of several sizes, each in a process of its own, all moments filled before."""
    rows = []
    for number, (nodes, edges, width) in enumerate(size.grow):
        command = [sys.executable, "-m", "benchmarks.brillm", "--grown", str(number), "--threads", str(options.threads)]
        command += ["--device", options.device, "--repeats", str(options.repeats), *(["--tiny"] if options.tiny else [])]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=os.environ)
        told = json.loads(done.stdout.splitlines()[-1])
        name = f"{edges * width * (width + 1) / 1e9:.2f}B parameters, {edges / nodes**2:.1%} of {nodes:,} nodes' pairs"
        rows.append(row(f"step, {name}", told["seconds"], unit="ms", scale=1e3, per_s=size.batch * (size.length - 1)))
        rows.append(row(f"step, {name}: touched", [told["touched"]], unit="MB", scale=1e-6))
        rows.append(row(f"step, {name}: peak memory", [told["peak"]], unit="GB", scale=1e-9))
    return rows, {}


def grown(size: Size, graph: tuple[int, int, int], options: Any) -> dict[str, Any]:
    """What the steps of one graph take, and the peak memory of this process, or of its device."""
    step, touched = stepper(size, graph, options.device, fill=True)
    seconds = interleaved({"step": step}, repeats=options.repeats)["step"]
    on_gpu = options.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "touched": touched, "peak": peak}


def decoding(size: Size, options: Any) -> Measured:
    """Time greedy decoding of `pathlm.generate` from prompts of one token, and the bus."""
    model = build(size.decode, options.device).eval()
    calls: dict[str, Callable[[], Any]] = {}
    for batch in (1, 8, 32):
        prompt = torch.randint(0, size.decode[0], (batch, 1), device=options.device)
        calls[f"batch {batch}"] = lambda prompt=prompt: generate(model, prompt, max_new_tokens=options.new, temperature=0)
    calls["batch 1, tensors"] = tensors_alone(calls["batch 1"])
    seconds = interleaved(calls | {"bandwidth": traffic(size, options)}, repeats=options.repeats)
    bus = seconds.pop("bandwidth")
    rows, ratios = [], {f"decoding, batch 1, tensors ÷ {options.fast}, seconds": ratio(seconds["batch 1, tensors"], seconds["batch 1"])}
    slab = size.decode[1] / size.decode[0] * model.graph.weight[0].nbytes
    for name, times in seconds.items():
        tokens = int(name.split()[1].rstrip(",")) * options.new
        rows.append(row(f"greedy decoding, {name}", times, unit="µs/token", scale=1e6 / tokens, per_s=tokens))
        share = ratio([tokens * slab / (2 * size.array * 4) * s for s in bus], times)
        ratios[f"decoding, {name}, share of the bandwidth's bound, a slab of {slab / 1e6:.2f} MB a token"] = share
    return rows, ratios


def build(graph: tuple[int, int, int], device: str) -> BrillmForCausalLM:
    """A graph of edges spread evenly over all pairs."""
    torch.manual_seed(0)
    nodes, edges, width = graph
    return BrillmForCausalLM(BrillmConfig(vocab_size=nodes, edges=edges, signal_size=width, initializer_range=0.1)).to(device)


def stepper(size: Size, graph: tuple[int, int, int], device: str, *, fill: bool = False) -> tuple[Callable[[], None], float]:
    """A function that takes one training step on fresh tokens, and how many bytes of edges a step touches on average.

    `fill` makes both moments of every row exist before the first step, as they do late in a run.
    """
    model, optim = build(graph, device).train(), OptimConfig(lr=1e-3)
    optimizer = adamw(param_groups(model, optim), optim)
    if fill:
        for table in (model.graph.weight, model.graph.bias):
            state = {
                "step": torch.ones(table.shape[0], device=device),
                "exp_avg": torch.full_like(table, 1e-9),
                "exp_avg_sq": torch.full_like(table, 1e-9),
            }
            optimizer.state[table] = {name: value.detach() for name, value in state.items()}
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, graph[0], (size.batch, size.length), generator=generator).to(device) for _ in range(16)]
    touched = slabs(model, [ids[:, :-1] for ids in batches])
    turn = iter(range(10**9))

    def step() -> None:
        optimizer.zero_grad()
        ids = batches[next(turn) % len(batches)]
        model(ids, labels=ids, skip_logits=True).loss.backward()
        parallel.clip(model, 1.0)
        optimizer.step()

    return step, touched


def slabs(model: BrillmForCausalLM, sources: list[torch.Tensor]) -> float:
    """How many bytes of weights leave these nodes, each counted once; the mean over some lists of them."""
    many = model.graph.start.diff()
    return statistics.mean(float(many[nodes.unique()].sum()) for nodes in sources) * model.graph.weight[0].nbytes


def tensors_alone(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as it runs where neither compiled loops nor kernels can be had."""

    def without() -> Any:
        loops, native.available = native.available, lambda: False
        kernels, fused.on_gpu = fused.on_gpu, lambda *_: False
        try:
            return call()
        finally:
            native.available, fused.on_gpu = loops, kernels

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
