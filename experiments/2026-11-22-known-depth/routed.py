"""Can a router learn how many hops a question needs? Pool blocks, visited once for every hop.

    OMP_NUM_THREADS=1 python routed.py runs/known-depth-two-0.json --seed 0

First every token takes as many steps as it needs (k for a question, 1 elsewhere; `off` of the questions a drawn number), in order of k and
on small maps first. When the router alone answers most questions right it takes over, from a growing share of the batches to all of them.
The gain is measured from the start. Blocks are equal until all k are asked.
"""

import argparse
import json
import math
from pathlib import Path
from time import perf_counter

import torch
from scipy.stats import spearmanr

from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.brian.curriculum import Knobs
from pathlm.models.brian.modeling import BrianForCausalLM
from pathlm.text.mixture import TaskRows

LARGEST, QUESTIONS, STEPS = 6, 16, 8


class Task:
    """Questions about one map with k up to `largest`, one token per pair; every third token is an answer."""

    def __init__(self, largest: int, seed: int) -> None:
        self.largest, self.seed, self.nodes = largest, seed, 2 * largest + 1
        self.length = self.nodes + 4 + 3 * QUESTIONS
        self.tokenizer = None
        self.tokenizer = self.held_out().tokenizer()
        self.number = torch.zeros(len(self.tokenizer), dtype=torch.long)
        for k in range(1, largest + 1):
            self.number[self.tokenizer.convert_tokens_to_ids(str(k))] = k

    def rows(self, largest: int) -> TaskRows:
        """Return rows to train on: k up to `largest`, half of them about it alone, on the smallest maps of at least 7 nodes."""
        nodes = max(7, 2 * largest + 1)
        return self._rows("train", {self._spec(1, largest, nodes): 1.0, self._spec(largest, largest, nodes): 0.5 if largest > 1 else 1.0})

    def held_out(self) -> TaskRows:
        """Return rows about maps that no training row is about, all k evenly."""
        return self._rows("validation", {self._spec(1, self.largest, self.nodes): 1.0})

    def asked(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return k (B, T) where the next token is an answer, 0 elsewhere: the word before a start names it."""
        return self.number[batch["input_ids"].roll(1, 1)] * (batch["labels"].roll(-1, 1) >= 0)

    def right(self, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return where the likeliest next token is the right one (B, T)."""
        return logits.argmax(-1) == batch["labels"].roll(-1, 1)

    def _spec(self, smallest: int, largest: int, nodes: int) -> str:
        return f"pointer:min_k={smallest},max_k={largest},nodes={nodes},alphabet={self.nodes},encoding=pair,questions={QUESTIONS}"

    def _rows(self, split: str, tasks: dict[str, float]) -> TaskRows:
        return TaskRows(tasks, split, length=self.length, seed=self.seed, tokenizer=self.tokenizer)


def tensors(batch: dict) -> dict[str, torch.Tensor]:
    """Return a batch as the model takes it."""
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def optimizer_of(model: BrianForCausalLM, router: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    """Return AdamW whose groups tell by `scale` how much faster they learn: the router four times."""
    apart = {id(p) for p in router}
    rest = [p for p in model.parameters() if id(p) not in apart]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.1, "scale": 1.0},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "scale": 1.0},
        {"params": router, "weight_decay": 0.0, "scale": 4.0},
    ]
    return torch.optim.AdamW(groups if router else groups[:2], betas=(0.9, 0.95))


def build(blocks: int, width: int, vocabulary: int) -> BrianForCausalLM:
    """Return a model of equal pool blocks and no others; its router prefers none and lets tokens leave until something is to be gained."""
    model = BrianForCausalLM(
        BrianConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4, num_attention_heads=2, pre_blocks=0,
            pool_blocks=blocks, post_blocks=0, max_route_steps=STEPS, block_position="none", router_hidden=32, tie_word_embeddings=True,
            initializer_range=width**-0.5,
        )
    )  # fmt: skip
    for block in model.pool_blocks[1:]:
        block.load_state_dict(model.pool_blocks[0].state_dict())
    with torch.no_grad():
        model.pool.router.by_step.zero_()[:, -1] = -1.0
    return model


@torch.no_grad()
def measure(model: BrianForCausalLM, batch: dict[str, torch.Tensor], task: Task) -> dict:
    """Return accuracy, steps and loads, with the router alone in charge."""
    k = task.asked(batch)
    model.eval()
    output, told = model(**batch, trace=True), model(**batch, depths=k.clamp(min=1))
    model.train()
    right = task.right(output.logits, batch)
    block = output.trace.block_BTS
    steps = (block > 0).sum(-1)
    asked, present = k > 0, batch["document_ids"] >= 0
    blocks = model.config.pool_blocks
    load = torch.bincount(block[present].flatten(), minlength=blocks + 1)[1:].double()
    load = load / load.sum()
    return {
        "accuracy": right[asked].float().mean().item(),
        "accuracy_told": task.right(told.logits, batch)[asked].float().mean().item(),
        "accuracy_by_k": [right[k == n].float().mean().item() for n in range(1, task.largest + 1)],
        "steps_by_k": [steps[k == n].float().mean().item() for n in range(1, task.largest + 1)],
        "spearman": float(spearmanr(steps[asked].numpy(), k[asked].numpy()).statistic),
        "steps_share": steps[asked].float().mean().item() / STEPS,
        "steps_share_all": steps[present].float().mean().item() / STEPS,
        "left": torch.bincount(steps[asked], minlength=STEPS + 1).div(asked.sum()).tolist(),
        "load": load.tolist(),
        "load_entropy": 1.0 if blocks == 1 else (-torch.special.xlogy(load, load).sum() / math.log(blocks)).item(),
        "load_by_step": [(block[:, :, r][block[:, :, r] > 0] == 1).float().mean().item() for r in range(LARGEST)],
        "questions": int(asked.sum()),
    }


class Lessons:
    """What is asked and how: k in order until all are, then told depth until the router answers well alone, then a hand-over to it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.largest, self.mastery, self.opened, self.handed = 2, 0.0, None, None

    def over(self, step: int) -> bool:
        """Whether the run ends."""
        return self.handed is not None and step >= self.handed + self.options.handing + self.options.free

    def note(self, step: int, right: float) -> bool:
        """Take notice of a share of right answers: about the largest k, later of the router alone. Return whether the next k is due."""
        self.mastery = 0.5 * self.mastery + 0.5 * right
        if self.opened is not None:
            if self.mastery > 0.8 or step >= self.opened + self.options.told:
                self.handed = step
            return False
        if self.mastery <= 0.8:
            return False
        self.largest, self.mastery = self.largest + 1, 0.0
        self.opened = step if self.largest == LARGEST else None
        return True

    def knobs(self, step: int) -> Knobs:
        """Return the model's knobs: few tokens are measured before all k are known, many later; what moves the choice of blocks fades."""
        asked, routes = self.options, {}
        if asked.blocks > 1:
            # Every block keeps meeting every kind of visit: a choice that tips over later then costs nothing.
            cooled = self.rate(step) / asked.lr if step > 50 else 1.0
            routes = {"noise": asked.noise * cooled, "random_share": asked.random * cooled, "load_bias_rate": asked.load_rate}
            fade = 1.0 if self.handed is None else max(0.0, 1 - (step - self.handed) / asked.handing)
            routes["gate"] = 0.0 if self.opened is None else asked.gate * fade
        share = 0.02 if self.opened is None or step < self.opened + 50 else 0.4
        return Knobs(probe_share=share, exit=0.5, best_gain=True, hindsight=True, price=asked.price, idle=0.5, listen=1.0, **routes)

    def depths(self, step: int, k: torch.Tensor) -> torch.Tensor | None:
        """Return the steps (B, T) that tokens are told to take, None where the router says it."""
        if self.handed is not None and torch.rand(()).item() < (step - self.handed) / self.options.handing:
            return None
        off = (torch.rand(k.shape) < self.options.off) & (k > 0)
        return torch.where(off, torch.randint(1, STEPS + 1, k.shape), k.clamp(min=1))

    def rate(self, step: int) -> float:
        """Return the learning rate: warm-up, then level, then linear to 3 % from the hand-over on."""
        last = self.options.handing + self.options.free
        left = 1.0 if self.handed is None else (self.handed + last - step) / last
        return self.options.lr * min(1.0, (step + 1) / 50, max(0.03, left))


def share_gradients(blocks: list[torch.nn.Module]) -> None:
    """Give every block the sum of all blocks' gradients, so that equal blocks stay equal."""
    for parameters in zip(*(block.parameters() for block in blocks), strict=True):
        total = sum(p.grad for p in parameters if p.grad is not None)
        for p in parameters:
            p.grad = total.clone()


def main() -> None:
    """Train one model and write what was measured on the way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    counts = {"seed": 0, "blocks": 2, "width": 64, "rows": 32, "told": 800, "handing": 150, "free": 400, "every": 50}
    for name, value in counts.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"lr": 3e-3, "off": 0.1, "price": 0.4, "noise": 0.5, "random": 0.2, "load-rate": 0.02, "gate": 0.1}.items():
        parser.add_argument(f"--{name}", type=float, default=value)
    parser.add_argument("--save", type=Path, help="folder for the weights when the router takes over, and at the end")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    task, lessons = Task(LARGEST, options.seed), Lessons(options)
    test = tensors(task.held_out().batch(0, 100))
    model = build(options.blocks, options.width, len(task.tokenizer))
    optimizer = optimizer_of(model, list(model.pool.parameters()))
    rows, at, step, history, began = task.rows(lessons.largest), 0, 0, [], perf_counter()
    while not lessons.over(step):
        batch = tensors(rows.batch(at, options.rows))
        k = task.asked(batch)
        output = model(**batch, knobs=lessons.knobs(step), depths=lessons.depths(step, k))
        output.loss.backward()
        if lessons.opened is None:
            share_gradients(model.pool_blocks)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lessons.rate(step) * group["scale"]
        optimizer.step()
        optimizer.zero_grad()
        step, at = step + 1, at + options.rows
        if lessons.handed is None and step % 10 == 0:
            with torch.no_grad():
                logits = model(**batch, knobs=Knobs(), depths=k.clamp(min=1) if lessons.opened is None else None).logits
            judged = k == lessons.largest if lessons.opened is None else k > 0
            if lessons.note(step, task.right(logits, batch)[judged].float().mean().item()):
                rows, at = task.rows(lessons.largest), 0
        if step % options.every == 0 or lessons.over(step):
            known = {"step": step, "largest": lessons.largest, "opened": lessons.opened, "handed": lessons.handed}
            history.append(known | {"seconds": perf_counter() - began} | measure(model, test, task))
            print(json.dumps({name: value for name, value in history[-1].items() if name != "left"}), flush=True)
            told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
            options.file.write_text(json.dumps({"options": told, "history": history}, indent=1))
        alone = lessons.handed is not None and step == lessons.handed + options.handing
        if options.save and (alone or lessons.over(step)):
            model.save_pretrained(options.save / ("taken-over" if alone else "end"))


if __name__ == "__main__":
    main()
