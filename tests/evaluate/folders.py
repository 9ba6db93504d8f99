"""Run folders made of files alone, as training and evaluation would have left them."""

import json
from pathlib import Path

PLAIN = {"model_type": "brian", "pre_blocks": 5, "pool_blocks": 0, "post_blocks": 1}
ROUTED = {
    "model_type": "brian", "pre_blocks": 1, "pool_blocks": 4, "post_blocks": 1, "max_route_steps": 4, "min_route_steps": 1,
    "route_top_k": 1, "memory": "local", "block_position": "arc",
}  # fmt: skip
GRAPH = {"model_type": "brillm", "signal_size": 16}
COSTS = {"parameters": 1000, "flops_per_token": 600.0, "flops_per_visit": 0.0, "cache_bytes_per_token": 96}


def evaluated(loss, *, split="test", bits=None, documents=3, context=64, ngram=4.0, visits=None, checkpoint="here"):
    """An entry of eval.json."""
    model = {"loss": loss, "bits_per_byte": loss / 2 if bits is None else bits, "tokens": 90, "bytes": 200, "documents": documents}
    entry = {"split": split, "checkpoint": checkpoint, "corpus": {"digest": "d"}, "model": model | {"context": context, "stride": 32}}
    entry["routes"] = None if visits is None else {"block_evaluations": visits}
    return entry | {"ngrams": {"orders": {"1": {"loss": ngram}}}}


def make_run(place, name, model=PLAIN, *, loss=3.0, steps=20, visits=None, gates=(), costs=COSTS, seen="corpus", **more):
    """Write a run that logged two rows and was evaluated twice; `more` are its evaluations, its `record` and fields of its `config`."""
    folder = Path(place) / name
    folder.mkdir(parents=True)
    data = {"corpus": seen, "length": 64, "task_share": 0.0, "tasks": {}}
    config = {"name": name, "preset": "tiny", "curriculum": "default", "batch_tokens": 100, "eval_rows": 4, "data": data}
    record = {"format": 1, "config": config | more.pop("config", {}), "model": model, "corpus_sha256": seen, "init": None, "resumed": []}
    record |= {"device": "cpu", "processes": 1, "threads": 1}
    (folder / "run.json").write_text(json.dumps(record | (costs or {}) | more.pop("record", {})))
    ran = {} if visits is None else {"route/block_evaluations": visits}
    rows = [{"step": step, "tokens": 100 * step, "stage": "s", "time/tokens_per_s": 50.0, **ran} for step in (1, steps)]
    rows.append(
        {"step": steps, "tokens": 100 * steps, "stage": "s", "validation/loss": loss} | {f"validation/{n}": v for n, v in ran.items()}
    )
    write_lines(folder / "metrics.jsonl", rows)
    if gates:
        write_lines(folder / "gates.jsonl", gates)
    for evaluation, entries in more.items():
        (folder / f"{evaluation.replace('_', '-')}.json").write_text(json.dumps(entries))
    return folder


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def verdict(stage, metric, value, *, comparison=">=", bound=0.5, passed=True, step=20):
    return {
        "step": step,
        "stage": stage,
        "metric": metric,
        "value": value,
        "comparison": comparison,
        "bound": bound,
        "passed": passed,
        "reason": "r",
    }
