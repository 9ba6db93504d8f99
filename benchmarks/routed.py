"""What `pathlm bench route` measures: routed models and plain decoders of one size, depths, hooks that count, and memory of one process.

Run as a program it measures the memory of one case: `python -m benchmarks.routed '{"case": "plain", …}'`, see `peak`.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pathlm.generate import generate
from pathlm.models.brian.curriculum import Knobs
from pathlm.models.library import build, preset

POOL, ENDS = 8, (2, 2)
"""Blocks in the pool, as many route steps, and blocks before and after it."""
RANDOM = Knobs(random_share=1.0, exit_share=0.0)
"""Every choice of a block is drawn evenly, nobody leaves by choice."""
IN_ORDER = Knobs(exit_share=0.0)


@dataclass(frozen=True)
class Size:
    """What models are measured on: presets, what replaces their fields, rows and length of a training batch, share of route steps taken."""

    plain: str
    routed: str
    fields: dict[str, Any]
    rows: int
    length: int
    share: float


_D192 = {"vocab_size": 8_192, "hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6}
_D512 = {"vocab_size": 8_192, "hidden_size": 512, "intermediate_size": 1_344, "num_attention_heads": 8}
_TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
SIZES = {
    "cpu": Size("plain-tiny", "brian-tiny", _D192, rows=8, length=256, share=0.5),
    "wide": Size("plain-tiny", "brian-tiny", _D512, rows=8, length=256, share=0.5),
    "cuda": Size("plain-125m", "brian-r125", {}, rows=8, length=2_048, share=0.66),
    "tiny": Size("plain-tiny", "brian-tiny", _TINY, rows=2, length=16, share=0.5),
}


@dataclass(frozen=True)
class Case:
    """A model, and what its training steps are asked for."""

    layers: int = POOL + sum(ENDS)
    """Of a plain decoder"""
    routed: bool = False
    knobs: Knobs | None = None
    share: float | None = None
    """Mean route steps as a share of all, where tokens leave after different numbers of steps"""
    fields: dict[str, Any] = field(default_factory=dict)

    def build(self, size: Size, device: str) -> Any:
        """The model, with weights that depend on the case only."""
        torch.manual_seed(0)
        if not self.routed:
            config = preset(size.plain, **size.fields, pre_blocks=self.layers - ENDS[1], post_blocks=ENDS[1])
        else:
            pool = {"pre_blocks": ENDS[0], "pool_blocks": POOL, "post_blocks": ENDS[1], "max_route_steps": POOL, "block_position_dim": 64}
            config = preset(size.routed, **size.fields | pool | self.fields)
        return build(config).to(device)

    def options(self, tokens: torch.Tensor) -> dict[str, Any]:
        """What the forward pass of a training step is given beside the tokens."""
        options: dict[str, Any] = {"skip_logits": True}
        if self.knobs is not None:
            options["knobs"] = self.knobs
        if self.share is not None:
            options["depths"] = depths(self.share * POOL, tokens.shape).to(tokens.device)
        return options


def cases(size: Size) -> dict[str, Case]:
    """What is trained."""
    return {
        "plain": Case(),
        "plain, 4 layers fewer": Case(layers=POOL + sum(ENDS) - 4),
        "routed, in order": Case(routed=True, knobs=IN_ORDER),
        "routed, random": Case(routed=True, knobs=RANDOM),
        f"routed, random, {size.share:.0%} of the steps": Case(routed=True, knobs=RANDOM, share=size.share),
        "top-2, random": Case(routed=True, knobs=RANDOM, fields={"route_top_k": 2}),
    }


def depths(mean: float, shape: torch.Size) -> torch.Tensor:
    """Numbers of route steps, 1 … POOL, spread evenly and as widely as their mean allows (4 of 8: 1 … 7), in a random order."""
    half = min(mean - 1, POOL - mean) + 0.5
    even = torch.linspace(mean - half, mean + half, 2 * shape.numel() + 1)[1::2]  # the middles of equal parts
    mixed = even.round().long().clamp(1, POOL)[torch.randperm(shape.numel(), generator=torch.Generator().manual_seed(0))]
    return mixed.view(shape)


@contextmanager
def counting(model: Any) -> Iterator[list[int]]:
    """Count, from outside, the tokens that go through blocks: one entry per call of a block's last layer."""
    first: list[int] = []
    last: list[int] = []

    def counter(rows: list[int]) -> Any:
        return lambda module, inputs, output: rows.append(output.numel() // output.shape[-1])

    handles = [block.qkv_proj.register_forward_hook(counter(first)) for block in model.blocks]
    handles += [block.down_proj.register_forward_hook(counter(last)) for block in model.blocks]
    try:
        yield last
    finally:
        for handle in handles:
            handle.remove()
    assert sum(first) == sum(last), "a block that begins must end"


@torch.no_grad()
def steer_gain(model: Any, at_place: torch.Tensor, *, by_token: float = 0.0) -> None:
    """Let the router expect this gain at every place of the pool (POOL + 2,), and so much more or less by what the token is."""
    router, generator = model.pool.router, torch.Generator().manual_seed(1)
    table = model.pool.position.double().cpu()
    router.from_position.weight[POOL] = (torch.linalg.pinv(table) @ at_place.double()).to(router.from_position.weight)
    drawn = torch.randn(model.config.hidden_size, generator=generator) * by_token / model.config.hidden_size**0.5
    router.from_hidden.weight[POOL] = drawn.to(router.from_hidden.weight)


def leave_after(model: Any, steps: int) -> None:
    """Let every token leave at one place: after so many of the blocks in their order."""
    gain = torch.full((POOL + 2,), 5.0)
    gain[steps:] = -5.0
    steer_gain(model, gain)


def leave_unevenly(model: Any, prompt: torch.Tensor, *, new: int, mean: float) -> None:
    """Let rows leave after different numbers of steps, `mean` on average over what `generate` writes after the prompt.

    The gain falls from place to place and differs by token; its height is found by halving an interval. `mean` = POOL: nobody leaves.
    """
    falls = torch.linspace(4, -4, POOL + 2)
    low, high = -12.0, 12.0
    for _ in range(10 if mean < POOL else 0):
        middle = (low + high) / 2
        steer_gain(model, falls + middle, by_token=3.0)
        taken = decoded_blocks(model, prompt, new=new) - sum(ENDS)
        low, high = (middle, high) if taken < mean else (low, middle)
    steer_gain(model, falls + (low + high) / 2 if mean < POOL else falls + 100, by_token=3.0)


def decoded_blocks(model: Any, prompt: torch.Tensor, *, new: int) -> float:
    """Blocks run per token while `generate` continues a prompt of one token, counted by hooks."""
    return sum(decoded_calls(model, prompt, new=new)) / (prompt.shape[0] * new)


def decoded_calls(model: Any, prompt: torch.Tensor, *, new: int) -> list[int]:
    """The rows of every call of a block in the meantime."""
    assert prompt.shape[1] == 1
    with counting(model) as rows:
        generate(model, prompt, max_new_tokens=new, temperature=0)
    return rows


def decoded_rows(model: Any, prompt: torch.Tensor, *, new: int) -> list[int]:
    """The rows that each block runs per pass, on average, while `generate` continues a prompt of one token."""
    counts = [0] * len(model.blocks)

    def counter(number: int) -> Any:
        def count(module: Any, inputs: Any, output: torch.Tensor) -> None:
            counts[number] += output.numel() // output.shape[-1]

        return count

    handles = [block.down_proj.register_forward_hook(counter(number)) for number, block in enumerate(model.blocks)]
    generate(model, prompt, max_new_tokens=new, temperature=0)
    for handle in handles:
        handle.remove()
    return [round(count / new) for count in counts]


def narrow(model: Any, rows: list[int]) -> None:
    """Let each block of a plain decoder run on its first so many rows only: what routes could cost if choosing and moving were free.

    The others pass it by. For decoding token by token, where nobody asks what the tokens mean.
    """

    def narrowed(forward: Any, count: int) -> Any:
        def run(h_BTD: torch.Tensor, *rest: Any) -> torch.Tensor:
            if count == len(h_BTD):
                return forward(h_BTD, *rest)
            h_BTD = h_BTD.clone()
            if count:
                h_BTD[:count] = forward(h_BTD[:count], *rest)
            return h_BTD

        return run

    for block, count in zip(model.blocks, rows, strict=True):
        block.forward = narrowed(block.forward, count)


def peak(size: Size, case: Case, device: str, *, steps: int = 3) -> float:
    """Megabytes that a model with its optimizer and training steps adds to what a process holds before: the peak, weights included."""
    from benchmarks.decoder import trainer

    tokens = torch.randint(0, preset(size.plain, **size.fields).vocab_size, (size.rows, size.length), device=device)
    before = 0 if device == "cuda" else resident("VmRSS")
    model = case.build(size, device)
    step = trainer(model, tokens, compiled=False, **case.options(tokens))
    for _ in range(steps):
        step()
    return (torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM") - before) / 1e6


def resident(field_: str) -> int:
    """Bytes in memory now (VmRSS) or at most since this program began (VmHWM). `ru_maxrss` would begin with the parent's peak."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == field_:
            return int(value.split()[0]) * 1024
    raise ValueError(f"/proc/self/status does not tell {field_}")


def cache_bytes(model: Any, tokens: torch.Tensor) -> float:
    """Bytes of memory per token that decoding keeps, from the tensors themselves."""
    with torch.inference_mode():
        held = model(tokens, use_cache=True).past_key_values.bytes()
    return held / tokens.numel()


def parameters(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    chosen = SIZES[asked["size"]]
    print(json.dumps(peak(chosen, cases(chosen)[asked["case"]], asked["device"])))
