"""Exact-match accuracy on synthetic tasks, per task and number of steps k, on samples that were held out of training."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import sqrt
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pathlm.evaluate.checkpoint import evaluating
from pathlm.evaluate.subject import Measure, Subject, at_once
from pathlm.text.synthetic import SampleStream, Task, open_task
from pathlm.text.synthetic.words import EncodedSample, SampleEncoder


@dataclass(frozen=True, slots=True)
class TaskScore:
    """How many answers of one task at one k were right in every token."""

    task: str
    """Name with the options that differ from the defaults."""
    k: int
    correct: int
    samples: int
    """Answers that were scored; a sample has several where its task asks several questions."""
    accuracy: float
    low: float
    """Lower end of the 95 % interval of the accuracy (Wilson, 1927)."""
    high: float
    token_accuracy: float
    """Share of answer tokens that were right."""
    held_out: bool
    """Whether no sample was ever trained on; False where a task at this k has so few prompts that training meets all of them."""

    def row(self) -> dict[str, Any]:
        """Return the fields as plain values, ready for a table or JSON."""
        return asdict(self)


@torch.inference_mode()
def score_tasks(
    model: Any,
    tasks: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 200,
    ks: Iterable[int] | None = None,
    split: str = "test",
    seed: int = 0,
    batch_size: int = 64,
) -> list[TaskScore]:
    """Score a causal language model on `samples` samples of every task and k; `tasks` are names with options.

    The answer is given to the model token by token and each of its tokens must be the likeliest where it is due (teacher-forced greedy):
    the whole answer is right exactly when greedy decoding would have written it. `ks` limits the numbers of steps. Where a task asks
    several questions a sample, every question counts for its own k, and the answers before it are the right ones. The model's mode is left
    as it was. Raises `ValueError` for a task that the tokenizer cannot write, and for a sample that does not fit into the model.
    """
    _require_counts(samples, batch_size)
    opened = [open_task(spec) for spec in tasks]
    encode = SampleEncoder(tokenizer, opened)
    asked = None if ks is None else set(ks)
    scores = []
    with evaluating(model):
        for task in opened:
            stream = SampleStream(task, split, seed=seed)
            wanted = [k for k in task.ks if asked is None or k in asked]
            hits: dict[int, list[Tensor]] = {k: [] for k in task.ks}
            drawn = [stream.sample(index, k=k) for k in wanted for index in range(samples)]
            for start in range(0, len(drawn), batch_size):
                batch = drawn[start : start + batch_size]
                encoded = [encode(sample) for sample in batch]
                _check_fit(model, task, encoded)
                found = answer_hits(model, encoded, pad_id=encode.pad_id)
                for question, hit in zip((q for sample in batch for q in sample.questions), found, strict=True):
                    hits[question.k].append(hit)
            scores += [_score(task, k, hits[k]) for k in wanted]
    return scores


def _score(task: Task, k: int, hits: list[Tensor]) -> TaskScore:
    exact, total = sum(bool(hit.all()) for hit in hits), len(hits)
    share = float(torch.cat(hits).double().mean())
    return TaskScore(task.spec, k, exact, total, exact / total, *interval(exact, total), share, task.held_out(k))


def answer_hits(model: Any, encoded: list[EncodedSample], *, pad_id: int) -> list[Tensor]:
    """Return, for each answer of each sample in order, which of its tokens are the model's likeliest: boolean, (answer tokens,)."""
    lengths = [sample.answers[-1][1] for sample in encoded]
    longest = max(lengths)
    device = next(model.parameters()).device
    input_ids = torch.full((len(encoded), longest), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, (sample, length) in enumerate(zip(encoded, lengths, strict=True)):
        input_ids[i, :length] = torch.tensor(sample.ids[:length])
        attention_mask[i, :length] = 1
    best = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)).logits.argmax(dim=-1).cpu()
    rows = zip(encoded, best, input_ids, strict=True)
    return [likeliest[start - 1 : stop - 1] == ids[start:stop] for s, likeliest, ids in rows for start, stop in s.answers]


def interval(successes: int, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's interval for a binomial proportion, 95 % by default."""
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    margin = z / (1 + z * z / trials) * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return 0.0 if successes == 0 else centre - margin, 1.0 if successes == trials else centre + margin


def prepare(
    subject: Subject, specs: Sequence[str] | None = None, *, samples: int = 200, split: str = "validation", seed: int = 0, batch: int = 64
) -> Measure:
    """Make ready to measure how many answers to synthetic tasks are right, by task and number of steps k.

    Args:
        subject: The model.
        specs: Tasks by name with options; by default those the run was trained on.
        samples: Samples of every task at every k.
        split: Of the tasks: train, validation or test.
        seed: Of the samples.
        batch: Sequences that run at once.

    Measuring returns the content that is also written to `synthetic.json` of the run (or model) folder under the split's name, behind it
    the budget and the branches where they are given: `rows`, the fields of `TaskScore`.

    Raises `ValueError` for tasks that do not exist or do not fit into the model, and for a run without tasks where none are named.
    """
    _require_counts(samples, batch)
    tasks = list(specs or subject.trained_on.get("tasks", {}))
    if not tasks:
        raise ValueError(f"task: {subject.folder} was not trained on synthetic tasks; name one or more, such as copy")
    streams = [SampleStream(open_task(spec), split, seed=seed) for spec in tasks]
    model, tokenizer = subject.with_tokenizer()
    encode = SampleEncoder(tokenizer, [stream.task for stream in streams])
    for stream in streams:
        drawn = (stream.sample(index, k=k) for k in stream.task.ks for index in range(samples))
        _check_fit(model, stream.task, map(encode, drawn))
    return lambda: _measured(subject, tasks, samples=samples, split=split, seed=seed, batch=batch)


run = at_once(prepare)


def _measured(subject: Subject, tasks: Sequence[str], *, samples: int, split: str, seed: int, batch: int) -> dict[str, Any]:
    model, tokenizer = subject.opened
    begun = time.perf_counter()
    with nullcontext() if subject.console is None else subject.console.status("synthetic tasks"):
        scores = score_tasks(model, tasks, tokenizer, samples=samples, split=split, seed=seed, batch_size=batch)
    about = {"suite": "synthetic", "checkpoint": str(subject.place), "split": split, "seed": seed}
    about |= {"budget": subject.budget, "branches": subject.branches, "samples": samples}
    about |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": time.perf_counter() - begun}
    result = about | {"rows": [score.row() for score in scores]}
    file = subject.note("synthetic.json", split + subject.asked, result)
    subject.print(table(result), note=f"{result['seconds']:.1f} s; written to {file}")
    return result


def table(result: Mapping[str, Any]) -> Table:
    """Return a result of `run` as a table, a row per task and k."""
    caption = "*: so few prompts that training may have met them" if any(not row["held_out"] for row in result["rows"]) else None
    shown = Table(title=f"synthetic tasks, {result['split']}, {result['samples']} samples each", caption=caption)
    for heading in ("task", "k", "answers right", "(95 %)", "tokens right"):
        shown.add_column(heading, justify="left" if heading == "task" else "right", no_wrap=heading != "task")
    for row in result["rows"]:
        right = f"{row['accuracy']:.3f}" + "*" * (not row["held_out"])
        shown.add_row(row["task"], str(row["k"]), right, f"{row['low']:.3f}–{row['high']:.3f}", f"{row['token_accuracy']:.3f}")
    return shown


def _check_fit(model: Any, task: Task, encoded: Iterable[EncodedSample]) -> None:
    """Refuse samples longer than a model's context, and tokens that it has no embedding for."""
    config = getattr(model, "config", None)
    context, vocabulary = (getattr(config, name, None) for name in ("max_position_embeddings", "vocab_size"))
    for sample in encoded:
        needed = sample.answers[-1][1]
        if context is not None and needed > context:
            raise ValueError(f"task {task.spec!r}: a sample takes {needed} tokens, the model's max_position_embeddings={context} are fewer")
        if vocabulary is not None and max(sample.ids) >= vocabulary:
            raise ValueError(f"task {task.spec!r}: its tokenizer writes token {max(sample.ids)}, the model has vocab_size={vocabulary}")


def _require_counts(samples: int, batch: int) -> None:
    for name, count in (("samples", samples), ("batch", batch)):
        if count < 1:
            raise ValueError(f"{name}={count}: must be at least 1")
