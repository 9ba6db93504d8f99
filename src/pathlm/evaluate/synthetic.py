"""Exact-match accuracy on synthetic tasks, per task and number of steps k, on samples that were held out of training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pathlm.evaluate.checkpoint import evaluating
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
    as it was.
    """
    if samples < 1:
        raise ValueError(f"samples={samples}: must be at least 1")
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
                found = answer_hits(model, [encode(sample) for sample in batch], pad_id=encode.pad_id)
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
