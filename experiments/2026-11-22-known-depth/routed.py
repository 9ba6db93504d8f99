"""Can a router learn how many hops a question needs? One pool block, visited once for every hop.

    OMP_NUM_THREADS=1 python routed.py runs/known-depth-routed.json --seed 0

First every token takes as many steps as it needs (k for a question, 1 elsewhere; `off` of the questions a drawn number), in order of k and
on small maps first. Then the router takes over, from a growing share of the tokens to all of them. The gain is measured from the start.
"""

import argparse
import json
from pathlib import Path
from time import perf_counter

import torch
from scipy.stats import spearmanr

from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.brian.curriculum import Knobs
from pathlm.models.brian.modeling import BrianForCausalLM
from pathlm.text.mixture import TaskRows

LARGEST, NODES, QUESTIONS, STEPS = 6, 13, 16, 8
LENGTH = NODES + 4 + 3 * QUESTIONS


def rows(split: str, seed: int, largest: int, tokenizer=None) -> TaskRows:
    """Return rows with k up to `largest` on the smallest maps of at least 7 nodes, in training half of them about the largest k."""
    nodes = NODES if split == "validation" else max(7, 2 * largest + 1)
    spec = f"pointer:min_k={{}},max_k={largest},nodes={nodes},alphabet={NODES},encoding=pair,questions={QUESTIONS}"
    tasks = {spec.format(1): 1.0} | ({spec.format(largest): 0.5} if split == "train" else {})
    return TaskRows(tasks, split, length=LENGTH, seed=seed, tokenizer=tokenizer)


def tensors(batch: dict) -> dict[str, torch.Tensor]:
    """Return a batch as the model takes it."""
    return {name: torch.from_numpy(array) for name, array in batch.items()}


class Questions:
    """Finds the tokens that predict an answer, and their k: the word before a start names it."""

    def __init__(self, tokenizer) -> None:
        self.number = torch.zeros(len(tokenizer), dtype=torch.long)
        for k in range(1, LARGEST + 1):
            self.number[tokenizer.convert_tokens_to_ids(str(k))] = k

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return k (B, T) where the next token is an answer, 0 elsewhere."""
        before = self.number[batch["input_ids"].roll(1, 1)]
        return before * (batch["labels"].roll(-1, 1) >= 0)


@torch.no_grad()
def measure(model: BrianForCausalLM, batch: dict[str, torch.Tensor], questions: Questions) -> dict:
    """Return accuracy and steps by k, with the router alone in charge."""
    model.eval()
    output = model(**batch, trace=True)
    k, first = questions(batch), output.trace.first_route_step
    right = output.logits.argmax(-1) == batch["labels"].roll(-1, 1)
    steps = (output.trace.block_BTS[:, :, first : first + STEPS] > 0).sum(-1)
    asked, present = k > 0, batch["document_ids"] >= 0
    model.train()
    return {
        "accuracy": right[asked].float().mean().item(),
        "accuracy_by_k": [right[k == n].float().mean().item() for n in range(1, LARGEST + 1)],
        "steps_by_k": [steps[k == n].float().mean().item() for n in range(1, LARGEST + 1)],
        "spearman": float(spearmanr(steps[asked].numpy(), k[asked].numpy()).statistic),
        "steps_share": steps[asked].float().mean().item() / STEPS,
        "steps_share_all": steps[present].float().mean().item() / STEPS,
        "left": torch.bincount(steps[asked], minlength=STEPS + 1).div(asked.sum()).tolist(),
        "questions": int(asked.sum()),
    }


def main() -> None:
    """Train one model and write what was measured on the way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    for name, value in {"seed": 0, "width": 64, "rows": 32, "told": 500, "handing": 150, "free": 350, "every": 100}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"lr": 3e-3, "off": 0.1, "price": 0.4}.items():
        parser.add_argument(f"--{name}", type=float, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    whole = rows("validation", options.seed, LARGEST)
    tokenizer = whole.tokenizer()
    test, questions = tensors(whole.batch(0, 100)), Questions(tokenizer)
    model = BrianForCausalLM(
        BrianConfig(
            vocab_size=len(tokenizer), hidden_size=options.width, intermediate_size=options.width * 11 // 4, num_attention_heads=2,
            pre_blocks=0, pool_blocks=1, post_blocks=0, max_route_steps=STEPS, block_position="none", router_hidden=32,
            tie_word_embeddings=True, initializer_range=options.width**-0.5,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.pool.router.by_step[:, -1] = -1.0  # leave at once until something is known to be gained
    router = {id(p) for p in model.pool.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in router and p.ndim > 1], "weight_decay": 0.1, "scale": 1.0},
        {"params": [p for p in model.parameters() if id(p) not in router and p.ndim < 2], "weight_decay": 0.0, "scale": 1.0},
        {"params": [p for p in model.parameters() if id(p) in router], "weight_decay": 0.0, "scale": 4.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    largest, mastery, at, opened, history, began = 2, 0.0, 0, None, [], perf_counter()
    train = rows("train", options.seed, largest, tokenizer)
    total = options.told + options.handing + options.free
    step = 0
    while opened is None or step < opened + total:
        since = -1 if opened is None else step - opened
        batch = tensors(train.batch(at, options.rows))
        at += options.rows
        k = questions(batch)
        depth = torch.where((torch.rand(k.shape) < options.off) & (k > 0), torch.randint(1, STEPS + 1, k.shape), k.clamp(min=1))
        share = 0.02 if since < 50 else 0.4
        knobs = Knobs(probe_share=share, exit=0.5, best_gain=True, hindsight=True, price=options.price, idle=0.5, listen=1.0)
        free = (since - options.told) / max(options.handing, 1)
        told = torch.rand(()).item() >= free
        output = model(**batch, knobs=knobs, depths=depth if told else None)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        decay = 1.0 if opened is None else min(1.0, max(0.03, (opened + total - step) / (0.6 * total)))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * group["scale"] * min(1.0, (step + 1) / 50) * decay
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if opened is None:
            with torch.no_grad():
                logits = model(**batch, knobs=Knobs(), depths=k.clamp(min=1)).logits if step % 10 == 0 else None
            if logits is not None:
                right = (logits.argmax(-1) == batch["labels"].roll(-1, 1))[k == largest].float().mean().item()
                mastery = 0.5 * mastery + 0.5 * right
            if mastery > 0.8:
                largest, mastery, at = largest + 1, 0.0, 0
                train = rows("train", options.seed, largest, tokenizer)
                opened = step if largest == LARGEST else None
        if step % options.every == 0:
            history.append(
                {"step": step, "largest": largest, "opened": opened, "seconds": perf_counter() - began} | measure(model, test, questions)
            )
            print(json.dumps({name: value for name, value in history[-1].items() if name != "left"}), flush=True)
            options.file.parent.mkdir(parents=True, exist_ok=True)
            options.file.write_text(json.dumps({"options": vars(options) | {"file": str(options.file)}, "history": history}, indent=1))


if __name__ == "__main__":
    main()
