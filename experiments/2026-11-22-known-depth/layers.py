"""Does larger k need more layers? Plain decoders of several depths, trained alike on a task that is asked in order of k.

    OMP_NUM_THREADS=1 python layers.py runs/known-depth-layers.json --layers 1 2 3 4 --steps 2000 --patience 600 --largest 3

With `--shared` all layers have the same weights, so that models of every depth have equally many parameters. The next k is asked when four
of five questions about the largest are answered, or after `--patience` steps; every model reads the same number of tokens.
"""

import argparse
import json
from pathlib import Path
from time import perf_counter

import torch

from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.brian.modeling import BrianForCausalLM
from routed import Task, optimizer_of, tensors


def build(layers: int, width: int, vocabulary: int, *, shared: bool) -> BrianForCausalLM:
    """Return a plain decoder; with `shared` its layers are one layer."""
    model = BrianForCausalLM(
        BrianConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4, num_attention_heads=2, pre_blocks=layers,
            post_blocks=0, tie_word_embeddings=True, initializer_range=width**-0.5,
        )
    )  # fmt: skip
    for layer in range(1, layers if shared else 1):
        model.blocks[layer] = model.blocks[0]
    return model


def train(layers: int, options: argparse.Namespace) -> dict:
    """Train one decoder and score it on held-out maps."""
    torch.manual_seed(options.seed)
    task = Task(options.largest, options.seed)
    model = build(layers, options.width, len(task.tokenizer), shared=options.shared)
    optimizer = optimizer_of(model, [])
    largest, opened, mastery, at, began = 1, [0], 0.0, 0, perf_counter()
    rows = task.rows(largest)
    for step in range(options.steps):
        batch = tensors(rows.batch(at, options.rows))
        at += options.rows
        output = model(**batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / 50, 0.03 + (options.steps - step) / (0.3 * options.steps))
        optimizer.step()
        optimizer.zero_grad()
        k = task.asked(batch)
        mastery = 0.9 * mastery + 0.1 * task.right(output.logits, batch)[k == largest].float().mean().item()
        if largest < options.largest and (mastery > 0.8 or step - opened[-1] >= options.patience):
            largest, mastery, at = largest + 1, 0.0, 0
            opened.append(step + 1)
            rows = task.rows(largest)
        if (step + 1) % options.every == 0:
            print(f"  layers {layers} step {step + 1} k <= {largest}: loss {output.loss.item():.3f}, largest k {mastery:.2f}", flush=True)
    model.eval()
    test = tensors(task.held_out().batch(0, 200))
    with torch.no_grad():
        right, k = task.right(model(**test).logits, test), task.asked(test)
    return {
        "layers": layers,
        "seed": options.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": options.steps * options.rows * task.length,
        "seconds": perf_counter() - began,
        "opened": opened,
        "questions": [int((k == n).sum()) for n in range(1, options.largest + 1)],
        "accuracy": [right[k == n].float().mean().item() for n in range(1, options.largest + 1)],
    }


def main() -> None:
    """Train what is asked for, and print accuracy by layers and k."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--shared", action="store_true")
    counts = {"seed": 0, "largest": 6, "width": 64, "rows": 32, "steps": 600, "patience": 80, "every": 100}
    for name, value in counts.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for layers in options.layers:
        found.append(train(layers, options))
        print(json.dumps(found[-1]), flush=True)
        options.file.write_text(json.dumps({"options": vars(options) | {"file": str(options.file)}, "runs": found}, indent=1))


if __name__ == "__main__":
    main()
