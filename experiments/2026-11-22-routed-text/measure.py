"""Measure the runs of run.sh on the test split and write results.json: losses, budgets, controls, difficulty and depth, by seed."""

import json
import statistics
import sys
from pathlib import Path

import torch

import pathlm
from pathlm.evaluate.lm import score
from pathlm.evaluate.routing import run
from pathlm.text.corpus import Corpus

BUDGETS = (0.5, 0.625, 0.75, 0.875, 1.0)


def main(runs: Path, corpus: Path, tokens: int) -> None:
    """Measure each seed's routed model beside plain models of 6 and 4 blocks; difficulty comes from the 6 blocks of another seed."""
    torch.set_num_threads(1)
    found, data = [], Corpus.open(corpus)
    for seed in (0, 1, 2):
        routed = run(
            runs / f"routed-{seed}",
            corpus,
            "test",
            against=runs / f"plain6-{(seed + 1) % 3}",
            budget=0.625,
            budgets=BUDGETS,
            max_tokens=tokens,
        )
        one = {"seed": seed} | {name: routed[name] for name in ("routed", "budgets", "controls", "difficulty")}
        for name in ("plain6", "plain4"):
            model, _ = pathlm.load(runs / f"{name}-{seed}" / "checkpoints" / "best")
            one[name] = score(model, data, "test", context=256, stride=128, max_tokens=tokens).loss
        found.append(one)
        print(f"seed {seed}: routed {one['routed']['loss']:.4f} at {one['routed']['block_evaluations']:.2f} blocks, "
              f"plain 6 {one['plain6']:.4f}, plain 4 {one['plain4']:.4f}", flush=True)  # fmt: skip
    for name in ("plain6", "plain4"):
        values = [one["routed"]["loss"] / one[name] for one in found]
        print(f"routed ÷ {name}: {statistics.mean(values):.4f}, {min(values):.4f} to {max(values):.4f}")
    (Path(__file__).parent / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
