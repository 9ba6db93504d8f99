"""Does larger k need more layers? Plain decoders of several depths, trained alike on a task that is asked in order of k.

    OMP_NUM_THREADS=1 python layers.py runs/known-depth --layers 1 2 3 4 6 8 --seeds 0 --largest 6 --rows-per-k 40000

Every run and its scores are kept in the folder; `results.json` is written beside this file. A run that is finished is not repeated.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

import pathlm
from pathlm.config import DataConfig, OptimConfig, RunConfig
from pathlm.evaluate.synthetic import score_tasks
from pathlm.text.mixture import TaskRows
from pathlm.train.run import carry_out, resolve

HERE = Path(__file__).parent
BATCH_ROWS = 64


def spec(nodes: int, questions: int, largest: int) -> str:
    """Return the task with k up to `largest`."""
    return f"pointer:max_k={largest},nodes={nodes},alphabet={nodes},encoding=pair,questions={questions}"


class InOrder:
    """Rows of one task in order of k: the largest k grows by one every `rows_per_k` rows, and half of the samples ask it only."""

    def __init__(self, whole: TaskRows, levels: list[TaskRows], rows_per_k: int) -> None:
        self.whole, self.levels, self.rows_per_k = whole, levels, rows_per_k
        self.length, self.vocab_size, self.tokenizer = whole.length, whole.vocab_size, whole.tokenizer

    def batch(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Return rows `start` … `start + count − 1`; a batch lies in one level."""
        return self._level(start).batch(start, count)

    def describe(self, batch: dict[str, np.ndarray]) -> list[str]:
        """Return the samples in a batch."""
        return self.whole.describe(batch)

    def _level(self, row: int) -> TaskRows:
        return self.levels[min(row // self.rows_per_k, len(self.levels) - 1)]


def run(layers: int, seed: int, options: argparse.Namespace) -> dict:
    """Train one decoder and score it on held-out samples."""
    task = spec(options.nodes, options.questions, options.largest)
    length = options.nodes + 4 + 3 * options.questions
    config = RunConfig(
        name=f"layers-{layers}-seed-{seed}",
        preset="plain-tiny",
        out=options.folder,
        seed=seed,
        steps=options.rows_per_k * (options.largest + options.extra) // BATCH_ROWS,
        batch_tokens=BATCH_ROWS * length,
        micro_rows=BATCH_ROWS,
        eval_every=10**6,
        save_every=10**6,
        keep_last=1,
        log_every=50,
        model={
            "hidden_size": options.width,
            "intermediate_size": options.width * 11 // 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "pre_blocks": layers,
            "post_blocks": 0,
            # With the preset's 0.02 nothing was learned in the same time.
            "initializer_range": options.width**-0.5,
        },
        data=DataConfig(length=length, task_share=1.0, tasks={task: 1.0}),
        optim=OptimConfig(
            lr=options.lr, schedule="wsd", warmup_steps=50, decay_steps=options.rows_per_k * options.extra // BATCH_ROWS // 2
        ),
    )
    kept = config.folder / "scores.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    job = resolve(config)
    tokenizer = job.rows.tokenizer()
    levels = []
    for top in range(1, options.largest + 1):
        upto = spec(options.nodes, options.questions, top)
        only = upto.replace(f"max_k={top}", f"min_k={top},max_k={top}")
        levels.append(TaskRows({upto: 1.0} | ({only: 1.0} if top > 1 else {}), "train", length=length, seed=seed, tokenizer=tokenizer))
    whole = TaskRows({task: 1.0}, "train", length=length, seed=seed, tokenizer=tokenizer)
    began = perf_counter()
    rows = InOrder(whole, [*levels, whole], options.rows_per_k)
    result = carry_out(config, replace(job, rows=rows), resume=(config.folder / "run.json").is_file())
    if result.interrupted:
        raise SystemExit(result.exit_code)
    seconds = perf_counter() - began
    model, tokenizer = pathlm.load(config.folder / "checkpoints" / "best")
    scores = [score.row() for score in score_tasks(model, [task], tokenizer, samples=50)]
    found = {
        "layers": layers,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": result.tokens,
        "seconds": seconds,
        "scores": scores,
    }
    kept.write_text(json.dumps(found, indent=1))
    return found


def main() -> None:
    """Train what is asked for, and print accuracy by layers and k."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    for name, value in {"largest": 6, "nodes": 13, "questions": 16, "width": 64, "rows-per-k": 40_000, "extra": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=2e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for seed in options.seeds:
        for layers in options.layers:
            found.append(run(layers, seed, options))
            row = found[-1]
            accuracies = "  ".join(f"{score['accuracy']:.3f}" for score in row["scores"])
            print(f"layers {layers} seed {seed}: {accuracies}   ({row['tokens'] / row['seconds']:,.0f} tokens/s)", flush=True)
            (HERE / "results.json").write_text(json.dumps({"options": vars(options), "runs": found}, indent=1))


if __name__ == "__main__":
    main()
