"""Measure the runs of run.sh, run-joint.sh or run-text.sh on the test split: losses, budgets, controls, difficulty and depth, by seed."""

import argparse
import json
import statistics
from pathlib import Path

import torch

import pathlm
from pathlm.evaluate.lm import score
from pathlm.evaluate.routing import run
from pathlm.text.corpus import Corpus


def _routed(options: argparse.Namespace, seed: int, other: int) -> dict:
    """Return what is measured of one seed's routes; what `routes.json` holds already is not measured again."""
    folder = options.runs / f"routed-{seed}"
    kept = folder / "routes.json"
    if kept.is_file() and "test" in (known := json.loads(kept.read_text(encoding="utf-8"))):
        return known["test"]
    return run(
        folder,
        options.corpus,
        "test",
        against=options.runs / f"plain6-{other}",
        budget=options.budget,
        budgets=options.budgets,
        max_tokens=options.tokens,
        plot=options.results.with_name(f"{options.results.stem}-{seed}.svg"),
    )


def main() -> None:
    """Measure each seed's routed model beside plain models of other depths; difficulty comes from the 6 blocks of another seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokens", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 4])
    parser.add_argument("--budget", type=float, default=0.625)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.625, 0.75, 0.875, 1.0])
    parser.add_argument("--results", type=Path, default=Path("results.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, data = [], Corpus.open(options.corpus)
    plain = [f"plain{blocks}" for blocks in options.blocks]
    for place, seed in enumerate(options.seeds):
        routed = _routed(options, seed, options.seeds[(place + 1) % len(options.seeds)])
        one = {"seed": seed} | {name: routed[name] for name in ("routed", "budgets", "controls", "gain", "difficulty")}
        for name in plain:
            if not (options.runs / f"{name}-{seed}" / "run.json").is_file():
                continue
            model, _ = pathlm.load(options.runs / f"{name}-{seed}" / "checkpoints" / "best")
            one[name] = score(model, data, "test", context=256, stride=128, max_tokens=options.tokens).loss
        found.append(one)
        beside = ", ".join(f"{name} {one[name]:.4f}" for name in plain if name in one)
        print(f"seed {seed}: routed {one['routed']['loss']:.4f} at {one['routed']['block_evaluations']:.2f} blocks, {beside}", flush=True)
    for name in plain:
        values = [one["routed"]["loss"] / one[name] for one in found if name in one]
        print(f"routed ÷ {name}: {statistics.mean(values):.4f}, {min(values):.4f} to {max(values):.4f}")
    options.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
