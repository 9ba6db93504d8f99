"""Run folders made by hand, after the forms that docs/run-folder.md and docs/evaluation.md promise."""

import json
from pathlib import Path as File

from pathlm.path import Neighbours, Path, Step, write_neighbours, write_paths

POOL = ["B2", "B3", "B4"]
SENTENCE = ["<|endoftext|>", "We", " will", " not", " for", "get", ".\n"]
CHINESE = ["<s>", "春", "风", "不", "似", "旧", "时", "人", "。"]


def write(file: File, value) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def lines(file: File, rows) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def estimate(value):
    return {"value": value, "low": value - 0.02, "high": value + 0.02}


def routed_path(text: str, blocks: list[int], document: int = 0) -> Path:
    """A token's path: block 1, some blocks of a pool of three, out, block 5."""
    route = [Step(f"block:{b}", 0.75, (("block:2", 0.125), ("exit", 0.125))) for b in blocks]
    return Path("brian", text, (Step("block:1", 1.0), *route, Step("exit", 0.5, (("block:3", 0.5),)), Step("block:5", 1.0)), 1, document)


def routed_run(folder: File, *, texts=(SENTENCE,), whole: bool = True) -> File:
    """A run of a routed model that was trained in two stages; with `whole`, measured and traced."""
    folder.mkdir(parents=True)
    model = {"model_type": "brian", "pre_blocks": 1, "pool_blocks": 3, "post_blocks": 1, "max_route_steps": 3, "vocab_size": 512}
    write(
        folder / "run.json", {"format": 1, "name": "x", "config": {"preset": "brian-tiny"}, "model": model, "started": "2026-11-22T08:00"}
    )
    lines(folder / "metrics.jsonl", metrics())
    gate = {
        "metric": "validation/route/load_entropy",
        "value": 0.9,
        "comparison": ">=",
        "bound": 0.6,
        "reason": "blocks must share the work",
    }
    failed = gate | {"metric": "validation/route/difficulty_correlation", "value": 0.0, "reason": "harder tokens must go deeper"}
    ends = [{"step": 20, "stage": "hand-over", "passed": True} | gate, {"step": 40, "stage": "exit", "passed": False} | failed]
    lines(folder / "gates.jsonl", ends)
    if whole:
        write(folder / "routes.json", {"validation": routes()})
        write(folder / "eval.json", {"validation": evaluation()})
        write(folder / "gates.json", {"rows": [{"stage": 4, "passed": None, "source": "routes.json"} | gate | {"value": None}]})
        paths = [
            routed_path(text, [2, 3, 4][: 1 + place % 3], number)
            for number, tokens in enumerate(texts)
            for place, text in enumerate(tokens)
        ]
        write_paths(folder / "paths.jsonl", paths)
    return folder


def metrics():
    for step in (1, *range(4, 41, 4)):
        stage, loss = "hand-over" if step <= 20 else "exit", 2 + 3 / step
        row = {"step": step, "tokens": 512 * step, "stage": stage}
        yield row | {
            "loss/lm": loss,
            "route/steps_mean": 3 - step / 40,
            "route/load_entropy": 0.9,
            "route/entropy": 0.3,
            "time/tokens_per_s": 100.0,
        }
        if step % 20 == 0:
            left = {f"validation/route/left_after_{r}": share for r, share in enumerate((0.25, 0.5, 0.25), start=1)}
            yield row | {"validation/loss": loss + 0.1, "validation/route/steps_mean": 2.0, "validation/route/load_entropy": 0.9} | left


def measured(budget, loss, steps, **more):
    score = {"budget": budget, "loss": loss, "bits_per_byte": loss / 2, "steps_mean": steps, "steps_share": steps / 3, "tokens": 1000}
    return (
        score
        | {"block_evaluations": steps + 2, "blocks_share": (steps + 2) / 5, "histogram": [0.0, 0.25, 0.5, 0.25], "documents": 4}
        | more
    )


def routes():
    """What `pathlm eval --routes --against` writes of a split."""
    correlations = {name: estimate(0.3) for name in ("spearman", "pearson", "partial_spearman", "partial_spearman_following")}
    difficulty = {name: estimate(-0.1) for name in correlations}
    row = {"tokens": 100, "loss": 2.0, "steps_mean": 2.0, "block_evaluations": 4.0, "gain": None}
    slices = {name: [row | {"label": f"{name} {i}"} for i in range(3)] for name in ("position", "frequency", "class", "difficulty")}
    places = ["IN", "B1", "B2", "B3", "OUT"]
    transitions = [[0, 900, 100, 0, 0], [0, 50, 600, 0, 250], [0, 0, 0, 300, 400], [0, 0, 0, 20, 300], [0, 0, 0, 0, 0]]
    by_step = [[0.9, 0.1, 0.0, 0.0], [0.05, 0.6, 0.1, 0.25], [0.0, 0.1, 0.3, 0.6]]
    load = {"load": [0.44, 0.36, 0.2], "by_step": by_step, "entropy": 0.3, "load_entropy": 0.95}
    return {
        "split": "validation",
        "date": "2026-11-22T09:00",
        "routed": measured(0.6, 2.2, 2.0),
        "budgets": [measured(0.4, 2.4, 1.2), measured(0.7, 2.15, 2.1), measured(1.0, 2.1, 3.0)],
        "controls": {name: measured(None, 2.25, 2.0, excess=estimate(0.05)) for name in ("random", "static", "rare_deep")},
        "gain": {"mean": estimate(0.3), "correlations": correlations},
        "difficulty": difficulty,
        "plain": {"loss": 2.12, "bits_per_byte": 1.06},
        "map": {"nodes": places, "transitions": transitions} | load,
        "slices": slices,
    }


def evaluation():
    score = {"loss": 2.2, "perplexity": 9.0, "bits_per_byte": 1.1, "tokens": 1000, "documents": 4, "bytes": 3000}
    return {
        "split": "validation",
        "model": score,
        "routes": None,
        "ngrams": {"train_tokens": 9, "orders": {"1": score | {"bits_per_byte": 2.0}}},
    }


def signal_path(tokens) -> Path:
    """A signal's path: at every second step most energy arrived elsewhere; every energy is a sum of three parts."""
    steps = [Step(tokens[0], 0.0)]
    for place in range(1, len(tokens)):
        before = "signal" if place == 1 else f"step:{place - 1}"
        rivals = ((tokens[0], 3.5 if place % 2 else 1.5), ("rival", 1.0))
        parts, theirs = ((before, 1.0), ("bias", 1.25), ("position", -0.25)), ((1.5, 0.0, rivals[0][1] - 1.5), (0.5, 0.25, 0.25))
        steps.append(Step(tokens[place], 2.0, rivals, parts, theirs))
    return Path("brillm", "".join(tokens), tuple(steps), 0, 0)


def signal_run(folder: File, *, tokens=CHINESE) -> File:
    """A run of a signal graph that was traced."""
    folder.mkdir(parents=True)
    write(folder / "run.json", {"config": {"preset": "brillm-tiny"}, "model": {"model_type": "brillm", "vocab_size": 512}})
    rows = [
        {"step": s, "tokens": 64 * s, "stage": "graph", "loss/lm": 5 - s / 10, "energy/target_probability": s / 50} for s in (1, 10, 20)
    ]
    lines(folder / "metrics.jsonl", [*rows, {"step": 20, "tokens": 1280, "stage": "graph", "validation/loss": 3.5}])
    write_paths(folder / "paths.jsonl", [signal_path(tokens)])
    neighbours = [Neighbours(node, (("人", 3.0), ("时", 2.5)), (("春", 1.5),), 40, 30, 0.01) for node in tokens[:3]]
    write_neighbours(folder / "neighbours.jsonl", neighbours)
    return folder


def plain_run(folder: File) -> File:
    """A run of a plain decoder of which nothing is known but its training."""
    folder.mkdir(parents=True)
    write(folder / "run.json", {"config": {}, "model": {"model_type": "brian", "pre_blocks": 5, "pool_blocks": 0, "post_blocks": 1}})
    rows = [{"step": s, "tokens": 64 * s, "stage": "plain", "loss/lm": 4 - s / 10} for s in (1, 10)]
    lines(folder / "metrics.jsonl", [*rows, {"step": 10, "tokens": 640, "stage": "plain", "validation/loss": 3.1}])
    return folder


def asked_run(folder: File, *, right: float = 0.5) -> File:
    """A plain run that was trained on tasks, and asked questions with known answers; `right` of the nearest needles are found."""
    plain_run(folder)
    tasks = {"needle:length=64,keys=1": 1.0, "copy": 1.0}
    model = {"model_type": "brian", "pre_blocks": 5, "pool_blocks": 0, "post_blocks": 1}
    write(folder / "run.json", {"config": {"data": {"corpus": "text", "tasks": tasks}}, "model": model})
    rows = [
        {"task": f"{task}:length={length},keys=1", "length": length, "answers": 100, "tokens": length - 3.0} | _answered(share, length)
        for task, share in (("needle", right), ("hops", 0.25))
        for length in (64, 256, 1024)
    ]
    by_cache = [{"length": length, "answers": 200} | _answered(right, length) for length in (64, 256, 1024)]
    write(folder / "long-context.json", {"test": {"split": "test", "samples": 100, "rows": rows, "by_cache": by_cache}})
    scores = [
        {
            "task": "copy",
            "k": k,
            "accuracy": 1 / k,
            "low": 1 / k - 0.05,
            "high": 1 / k,
            "token_accuracy": 0.9,
            "samples": 100,
            "held_out": k > 1,
        }
        for k in (1, 2, 4)
    ]
    write(
        folder / "synthetic.json",
        {"validation": {"samples": 100, "rows": scores}, "test, budget 0.5": {"samples": 100, "rows": scores[:1]}},
    )
    choice = {"set": "next sentence", "correct": 12, "questions": 40, "accuracy": 0.3, "low": 0.18, "high": 0.45, "chance": 0.25}
    ways = [choice | {"normalisation": way} for way in ("raw", "per_byte", "per_token")]
    write(folder / "choices.json", {"validation": {"rows": ways}})
    return folder


def _answered(share: float, length: int):
    cache = {"cache_bytes": 2048.0 * length, "cache_bytes_per_token": 2048.0, "cache_allocated": 4096.0 * length}
    return {"samples": 100, "exact": estimate(share), "forced": estimate(share / 2)} | cache
