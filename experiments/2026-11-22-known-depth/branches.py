"""Do several branches help where depth is known? Switched on in trained models, and trained on with, beside greedy steps.

First `python routed.py runs/known-depth/0.json --seed 0 --save runs/known-depth/0`, then
`OMP_NUM_THREADS=1 python branches.py runs/known-depth/0 branches-0.json --seed 0`.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from pathlm.models.brian.curriculum import Knobs
from pathlm.models.brian.modeling import BrianForCausalLM
from routed import LARGEST, STEPS, Task, optimizer_of, tensors

TRAINED, RATE, ROWS = 200, 3e-4, 32
FREE = Knobs(probe_share=0.4, exit=0.5, best_gain=True, hindsight=True, price=0.4, idle=0.5, listen=1.0, load_bias_rate=0.02)


@torch.no_grad()
def measure(model: BrianForCausalLM, batch: dict[str, torch.Tensor], task: Task, branches: int, *, repeats: int = 3) -> dict:
    """Return accuracy, by k as well, visits to blocks per token and the median seconds of a pass with `branches`."""
    model.eval()
    seconds = []
    for _ in range(repeats):
        began = perf_counter()
        output = model(**batch, route_beams=branches, trace=True)
        seconds.append(perf_counter() - began)
    k, right = task.asked(batch), task.right(output.logits, batch)
    return {
        "branches": branches,
        "accuracy": right[k > 0].float().mean().item(),
        "accuracy_by_k": [right[k == n].float().mean().item() for n in range(1, LARGEST + 1)],
        "visits": output.metrics["route/block_evaluations"].item(),
        "seconds": median(seconds),
    }


def all_branches(model: BrianForCausalLM, batch: dict[str, torch.Tensor], task: Task) -> list[dict]:
    """Return what is measured with one, two and four branches."""
    return [measure(model, batch, task, branches) for branches in (1, 2, 4)]


def deeper(model: BrianForCausalLM, batch: dict[str, torch.Tensor], task: Task) -> list[dict]:
    """Return what is measured with one branch that leaves only below other expected gains: the greedy route with more steps."""
    pool, found = model.pool, []
    kept = {name: getattr(pool, name).clone() for name in ("exit_threshold", "budgets_trained", "budget_default")}
    for gain in (-0.1, -0.2, -0.3, -0.4):
        pool.exit_threshold.fill_(gain)
        pool.budgets_trained.copy_(torch.tensor([1 / STEPS, 1.0]))
        pool.budget_default.fill_(0.5)
        found.append({"gain": gain} | measure(model, batch, task, 1))
    for name, value in kept.items():
        getattr(pool, name).copy_(value)
    return found


def train(model: BrianForCausalLM, task: Task, branches: int) -> float:
    """Train on all k with `branches` in every second pass, as stage 6 does. Returns seconds."""
    model.train()
    rows, optimizer, began = task.rows(LARGEST), optimizer_of(model, list(model.pool.parameters())), perf_counter()
    for step in range(TRAINED):
        batch = tensors(rows.batch(1_000_000 + step * ROWS, ROWS))
        beams = branches if step % 2 else 1
        model(**batch, knobs=FREE, route_beams=beams).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / TRAINED) * group["scale"]
        optimizer.step()
        optimizer.zero_grad()
    return perf_counter() - began


def main() -> None:
    """Measure one seed's two models and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = Task(LARGEST, options.seed)
    test = tensors(task.held_out().batch(0, 100))
    found: dict[str, dict] = {}
    for name in ("taken-over", "end"):
        open_it = lambda name=name: BrianForCausalLM.from_pretrained(options.folder / name)  # noqa: E731
        model = open_it()
        found[name] = {"as it was": all_branches(model, test, task), "greedy, other thresholds": deeper(model, test, task)}
        for branches in (1, 2):
            torch.manual_seed(options.seed)
            model = open_it()
            seconds = train(model, task, branches)
            found[name][f"trained on, {branches}"] = [{"training_seconds": seconds}, *all_branches(model, test, task)]
        print(json.dumps(found[name]), flush=True)
        options.file.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
