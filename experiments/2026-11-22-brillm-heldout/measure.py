"""Held-out bits per byte of trained signal graphs beside Kneser–Ney n-grams on the same tokens and a plain decoder of equal training cost.

`measure.py table RUNS CORPUS [TOKENS]` measures every run in RUNS on the test split and writes results-<name of RUNS>.json. `measure.py
match RUN RECIPE` prints how many steps the plain decoder of RECIPE may train for the operations that RUN took.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import pathlm
from pathlm.config import load
from pathlm.evaluate.compare import ngram_scores
from pathlm.evaluate.lm import choose, score
from pathlm.models.brillm.edges import count_rows
from pathlm.text.corpus import Corpus

CONTEXTS = (32, 128)
"""Tokens a model sees at most when it is measured; what it was trained with is one of them."""
TEST_TOKENS = 60_000


def training_cost(run: Path, corpus: Corpus) -> dict[str, float]:
    """Return the tokens that a run read, its operations for each, forward and backward, and the parameters of its model."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]
    model, _ = pathlm.load(run / "checkpoints" / "latest")
    per_token = model.flops_per_token(record["data"]["length"])
    if model.config.model_type == "brillm":
        per_token = graph_cost(model.config, corpus)
    parameters = sum(p.numel() for p in model.parameters())
    return {"tokens": record["steps"] * record["batch_tokens"], "flops_per_token": 3 * per_token, "parameters": parameters}


def graph_cost(config: Any, corpus: Corpus) -> float:
    """Return the operations of a forward pass per token of real text: each node scores its own edges, and frequent nodes have more."""
    key, times = count_rows(SimpleNamespace(corpus=corpus, split="train"), corpus.vocab_size)
    source = key // corpus.vocab_size
    degree = np.bincount(source[times >= config.min_count], minlength=config.vocab_size)
    visits = np.bincount(source, weights=times, minlength=config.vocab_size)
    return 2 * config.signal_size**2 * (2 + float(degree @ visits / visits.sum()))


def match(run: Path, recipe: Path) -> int:
    """Return the steps in which a plain decoder takes as many operations as a run took."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]
    corpus, plain = Corpus.open(record["data"]["corpus"], verify=False), load(recipe)
    model = pathlm.build(pathlm.preset(plain.preset, **plain.model | {"vocab_size": corpus.vocab_size}))
    spent = training_cost(run, corpus)
    return round(spent["tokens"] * spent["flops_per_token"] / (3 * model.flops_per_token(plain.data.length) * plain.batch_tokens))


def measured(run: Path, corpus: Corpus, tokens: int) -> dict[str, Any]:
    """Return what a run cost and its losses on the first whole documents of the test split."""
    model, _ = pathlm.load(run / "checkpoints" / "best")
    one: dict[str, Any] = {"run": run.name} | training_cost(run, corpus)
    for context in CONTEXTS:
        found = score(model, corpus, "test", context=context, stride=context // 2, max_tokens=tokens)
        one[str(context)] = {"loss": found.loss, "bits_per_byte": found.bits_per_byte}
    return one


def table(runs: Path, folder: Path, tokens: int) -> None:
    """Measure all runs and print them by name, seeds together."""
    corpus = Corpus.open(folder, verify=False)
    chosen = choose(corpus, "test", max_tokens=tokens)
    found: dict[str, list[dict[str, Any]]] = {}
    for run in sorted(runs.iterdir()):
        if not (run / "checkpoints" / "best").exists():
            continue
        kept = run / f"heldout-{tokens}.json"
        if not kept.exists():
            kept.write_text(json.dumps(measured(run, corpus, tokens)) + "\n", encoding="utf-8")
        one = json.loads(kept.read_text(encoding="utf-8"))
        found.setdefault(run.name.rpartition("-")[0], []).append(one)
        print(json.dumps(one), flush=True)
    read = max((int(one["tokens"]) for ones in found.values() for one in ones), default=0)
    counted = {
        "whole training split": ngram_scores(corpus, "test", chosen, order=5),
        "as many tokens as the models read": ngram_scores(corpus, "test", chosen, order=5, train_tokens=read),
    }
    print(shown(found, counted))
    result = {"test_tokens": sum(record.tokens - 1 for record in chosen), "runs": found, "ngrams": counted}
    (Path(__file__).parent / f"results-{runs.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def shown(found: dict[str, list[dict[str, Any]]], counted: dict[str, Any]) -> str:
    """Return the table in Markdown: n-grams, then models, the best last."""
    heads = [
        "",
        "tokens read",
        "operations",
        "parameters",
        *(f"bits per byte, {c} tokens" for c in CONTEXTS),
        f"seeds, {CONTEXTS[0]} tokens",
    ]
    rows = [heads, ["---"] * len(heads)]
    for label, scores in counted.items():
        for order in ("2", "3", "5"):
            bits = f"{scores['orders'][order]['bits_per_byte']:.3f}"
            rows.append([f"Kneser–Ney {order}, {label}", f"{scores['train_tokens']:,}", "", "", bits, bits, ""])
    mean = {name: statistics.mean(one[str(CONTEXTS[0])]["bits_per_byte"] for one in ones) for name, ones in found.items()}
    for name in sorted(found, key=lambda name: -mean[name]):
        ones = found[name]
        each = [[one[str(c)]["bits_per_byte"] for one in ones] for c in CONTEXTS]
        spent = [f"{ones[0]['tokens']:,}", f"{ones[0]['tokens'] * ones[0]['flops_per_token']:.2g}", f"{ones[0]['parameters']:,}"]
        rows.append([name, *spent, *(f"{statistics.mean(b):.3f}" for b in each), ", ".join(f"{b:.3f}" for b in each[0])])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "match":
        print(match(Path(sys.argv[2]), Path(sys.argv[3])))
    else:
        table(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else TEST_TOKENS)
