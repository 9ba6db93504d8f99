"""The plain decoder beside `LlamaForCausalLM` with the same weights: training steps, and greedy decoding at batch 1 and 8.

A training step is forward, loss, backward, clipping and AdamW, with the same optimizer for both. Decoding is `pathlm.generate` beside
`LlamaForCausalLM.generate`; both must write the same tokens. On CUDA (`--device cuda`) the model is plain-125m in bfloat16.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.timing import Ratio, arguments, interleaved, ratio, show
from pathlm.config import OptimConfig
from pathlm.generate import generate
from pathlm.models.brian.convert import to_llama
from pathlm.models.brian.modeling import BrianForCausalLM
from pathlm.models.library import build, family, preset

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "plain-tiny": {},
        "12 layers, D 192": {
            "vocab_size": 8_192,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_attention_heads": 6,
            "pre_blocks": 10,
            "post_blocks": 2,
        },
    },
    "cuda": {"plain-125m": {}},
}
ROWS, LENGTH = 8, 256
PROMPT = 32


def pair(name: str, device: str) -> tuple[BrianForCausalLM, LlamaForCausalLM]:
    """Our model and Llama with the same weights."""
    torch.manual_seed(0)
    base = name if name.startswith("plain-") else "plain-tiny"
    ours = build(preset(base, **SIZES[device][name])).to(device)
    theirs = to_llama(ours)
    assert theirs.config._attn_implementation == "sdpa"
    return ours, theirs


def trainer(model: Any, tokens: torch.Tensor, *, compiled: bool, **options: Any) -> Callable[[], float]:
    """A function that takes one optimizer step on `tokens` and returns the loss."""
    model.train()
    groups = family("brian").param_groups(model, OptimConfig())
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    call = torch.compile(model) if compiled else model
    device = tokens.device.type

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = call(input_ids=tokens, labels=tokens, use_cache=False, **options).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def training(name: str, device: str, *, compiled: bool, repeats: int) -> tuple[list[dict[str, Any]], Ratio]:
    """Time training steps; both sides must report the same losses."""
    ours, theirs = pair(name, device)
    length = LENGTH if device == "cpu" else ours.config.max_position_embeddings
    tokens = torch.randint(0, ours.config.vocab_size, (ROWS, length), device=device)
    losses: dict[str, list[float]] = {"pathlm": [], "transformers": []}
    steps = {
        "pathlm": trainer(ours, tokens, compiled=compiled, skip_logits=True),
        "transformers": trainer(theirs, tokens, compiled=compiled),
    }
    seconds = interleaved({side: lambda side=side: losses[side].append(steps[side]()) for side in steps}, repeats=repeats, warmup=2)
    tolerance = 1e-3 if device == "cpu" else 3e-2
    assert all(abs(a - b) < tolerance for a, b in zip(*losses.values(), strict=True)), losses
    what = f"train {name}" + (", compiled" if compiled else "")
    rows = [
        {"what": what, "side": side, "median s": statistics.median(times), "tokens/s": tokens.numel() / statistics.median(times)}
        for side, times in seconds.items()
    ]
    return rows, ratio(seconds["pathlm"], seconds["transformers"])


def decoding(name: str, device: str, batch: int, *, new: int, repeats: int) -> tuple[list[dict[str, Any]], Ratio]:
    """Time greedy decoding; both sides must write the same tokens."""
    ours, theirs = pair(name, device)
    if device == "cuda":
        ours, theirs = ours.bfloat16(), theirs.bfloat16()
    ours.eval(), theirs.eval()
    prompt = torch.randint(0, ours.config.vocab_size, (batch, PROMPT), device=device)
    written: dict[str, list[list[int]]] = {}

    def pathlm_writes() -> None:
        written["pathlm"] = generate(ours, prompt, max_new_tokens=new, temperature=0)

    def transformers_writes() -> None:
        mask = torch.ones_like(prompt)
        result = theirs.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None)
        written["transformers"] = result[:, PROMPT:].tolist()

    seconds = interleaved({"pathlm": pathlm_writes, "transformers": transformers_writes}, repeats=repeats)
    same = sum(a == b for a, b in zip(written["pathlm"], written["transformers"], strict=True))
    assert device == "cuda" or same == batch, "greedy tokens differ"
    rows = [
        {
            "what": f"decode {name}, batch {batch}",
            "side": side,
            "median s": statistics.median(times),
            "tokens/s": batch * new / statistics.median(times),
        }
        for side, times in seconds.items()
    ]
    return rows, ratio(seconds["transformers"], seconds["pathlm"])


def main(argv: list[str]) -> dict:
    """Run the comparisons. Training ratios are of times (below 1 is faster), decoding ratios of speeds (above 1 is faster)."""
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("train", "decode"), default=None)
    parser.add_argument("--new", type=int, default=128, help="tokens to decode")
    parser.add_argument("--compile", action="store_true", help="also time both models under torch.compile")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; nothing measured")
        return {}
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    for name in SIZES[options.device]:
        for compiled in (False, True) if options.compile else (False,):
            if options.only != "decode":
                added, value = training(name, options.device, compiled=compiled, repeats=options.repeats)
                rows += added
                ratios[f"training step, {name}{', compiled' if compiled else ''}: pathlm ÷ Llama, seconds"] = value
        for batch in (1, 8) if options.only != "train" else ():
            added, value = decoding(name, options.device, batch, new=options.new, repeats=options.repeats)
            rows += added
            ratios[f"greedy decoding, {name}, batch {batch}: pathlm ÷ Llama, tokens/s"] = value
    return show("plain decoder and LlamaForCausalLM", rows, ratios, options=options)
