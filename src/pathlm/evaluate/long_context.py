"""Questions whose answer lies far back: exact match and teacher-forced accuracy by length, beside the bytes that the cache took for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from pathlm.evaluate.bootstrap import mean_with_interval
from pathlm.evaluate.cached import forced_hits, write_greedily
from pathlm.evaluate.checkpoint import evaluating
from pathlm.evaluate.recorded import check_file
from pathlm.evaluate.subject import Measure, Subject, at_once, bar
from pathlm.text.synthetic import LONG_TASKS, LongTask, SampleStream, open_task
from pathlm.text.synthetic.words import SampleEncoder

FORMAT = 1
Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered to one question of one sample."""

    task: str
    """Name with the options that differ from the defaults."""
    length: int
    index: int
    """The sample's number in its stream."""
    question: int
    """0, or the place among the questions of a sample that asks several."""
    k: int
    tokens: int
    """Tokens of the prompt."""
    expected: str
    written: str
    """What greedy decoding wrote through the cache, as many tokens as were expected."""
    exact: bool
    forced: float
    """Share of the answer's tokens that were the likeliest after the right ones before them."""
    cache_bytes: float
    """Bytes that the cache held for this sequence when prompt and answer had been read."""
    cache_allocated: float
    """Most bytes that it kept alive on the way."""
    cache_tokens: int
    """Tokens that had been read, padding included."""

    @property
    def key(self) -> tuple[str, int, int]:
        """Which question of which sample this is."""
        return self.task, self.index, self.question


class _Item(NamedTuple):
    """A question as tokens; where a sample asks several, those before it stand in the prompt with their right answers."""

    sample: int
    question: int
    k: int
    prompt: list[int]
    answer: list[int]


def long_tasks(specs: Iterable[str], lengths: Iterable[int] | None = None) -> list[LongTask]:
    """Open tasks with filler, each at every one of `lengths` (by default at its own), shortest first.

    Raises `ValueError` naming a task without filler, or a length that does not hold what a task states.
    """
    wanted = None if lengths is None else sorted(set(lengths))
    opened: list[LongTask] = []
    for spec in specs:
        name, _, options = spec.partition(":")
        if name not in LONG_TASKS:
            raise ValueError(f"task {spec!r}: has no filler and no length; tasks that have are {', '.join(LONG_TASKS)}")
        others = [option for option in options.split(",") if option and not option.strip().startswith("length=")]
        of_lengths = [spec] if wanted is None else [f"{name}:{','.join([*others, f'length={length}'])}" for length in wanted]
        opened += [task for text in of_lengths if isinstance(task := open_task(text), LongTask)]
    if not opened:
        raise ValueError("specs=[]: name at least one task" if wanted is None else f"lengths={wanted}: name at least one, and one task")
    return opened


def answers(
    model: Any,
    tasks: Iterable[LongTask],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 100,
    split: str = "validation",
    seed: int = 0,
    batch: int = 8,
    known: Iterable[tuple[str, int, int]] = (),
    progress: Progress | None = None,
) -> Iterator[list[Answer]]:
    """Ask a causal language model `samples` samples of each task and yield its answers as they come, at most `batch` at a time.

    Samples are drawn when they are asked, `batch` at a time. Questions whose `Answer.key` is in `known` are left out. `progress` is told
    how many more tokens have been asked about, known ones too. The model's mode is left as it was.
    """
    tasks, known = list(tasks), set(known)
    _require_counts(samples=samples, batch=batch)
    encode = SampleEncoder(tokenizer, tasks)
    with evaluating(model), torch.inference_mode():
        for task in tasks:
            stream = SampleStream(task, split, seed=seed)
            for first in range(0, samples, batch):
                drawn = [_items(stream, encode, index) for index in range(first, min(first + batch, samples))]
                for together in zip(*drawn, strict=True):  # the same question of several samples: prompts of one length, mostly
                    items = [item for item in together if (task.spec, item.sample, item.question) not in known]
                    if items:
                        yield _asked(model, task, items, tokenizer, encode.pad_id)
                    if progress is not None:
                        progress(sum(len(item.prompt) for item in together))


def _items(stream: SampleStream, encode: SampleEncoder, index: int) -> list[_Item]:
    sample = stream.sample(index)
    encoded = encode(sample)
    return [
        _Item(index, number, question.k, encoded.ids[:start], encoded.ids[start:stop])
        for number, (question, (start, stop)) in enumerate(zip(sample.questions, encoded.answers, strict=True))
    ]


def _asked(model: Any, task: LongTask, items: list[_Item], tokenizer: PreTrainedTokenizerBase, pad_id: int) -> list[Answer]:
    prompts, right = [item.prompt for item in items], [item.answer for item in items]
    written, cache = write_greedily(model, prompts, [len(answer) for answer in right], pad_id=pad_id)
    forced = forced_hits(model, prompts, right, pad_id=pad_id)
    return [
        Answer(
            task=task.spec,
            length=task.length,
            index=item.sample,
            question=item.question,
            k=item.k,
            tokens=len(item.prompt),
            expected=str(tokenizer.decode(item.answer)),
            written=str(tokenizer.decode(found)),
            exact=found == item.answer,
            forced=sum(hits) / len(hits),
            cache_bytes=cache.held,
            cache_allocated=cache.allocated,
            cache_tokens=cache.tokens,
        )
        for item, found, hits in zip(items, written, forced, strict=True)
    ]


def scores(found: Iterable[Answer], *, draws: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """Return a row for every task at every length: both accuracies with intervals over samples drawn anew, and what the cache took.

    `cache_bytes` and `cache_allocated` are of one sequence, `cache_bytes_per_token` of one token of it. Rows are plain values, ready for
    JSON. Raises `ValueError` where there is one sample only, which gives no interval.
    """
    groups: dict[tuple[str, int], list[Answer]] = {}
    for answer in found:
        groups.setdefault((answer.task, answer.length), []).append(answer)
    return [{"task": task, "length": length} | _score(group, draws, seed) for (task, length), group in groups.items()]


def by_cache(found: Iterable[Answer], *, draws: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """Return a row for every length, all tasks together, those with the smallest cache first.

    Columns are those of `scores`, without a task. Where the cache does not grow with the text, lengths that share one size stand together.
    """
    groups: dict[int, list[Answer]] = {}
    for answer in found:
        groups.setdefault(answer.length, []).append(answer)
    rows = [{"length": length} | _score(group, draws, seed) for length, group in groups.items()]
    return sorted(rows, key=lambda row: (row["cache_bytes"], row["length"]))


def beside(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of several models' results (see `run`), each with its `model`: by task and length, the smallest cache first."""
    rows = [{"model": result["model"], **row} for result in results for row in result["rows"]]
    places = {spec: place for place, spec in enumerate(dict.fromkeys(_without_length(row["task"]) for row in rows))}
    return sorted(rows, key=lambda row: (places[_without_length(row["task"])], row["length"], row["cache_bytes"]))


def _score(group: list[Answer], draws: int, seed: int) -> dict[str, Any]:
    numbers = {key: number for number, key in enumerate(dict.fromkeys((a.task, a.index) for a in group))}
    sample_N = np.array([numbers[a.task, a.index] for a in group])
    exact, forced = (
        mean_with_interval(np.array(column, dtype=float), sample_N, draws=draws, seed=seed).to_dict()
        for column in ([a.exact for a in group], [a.forced for a in group])
    )
    return {
        "samples": len(numbers),
        "answers": len(group),
        "tokens": float(np.mean([a.tokens for a in group])),
        "exact": exact,
        "forced": forced,
        "cache_bytes": float(np.mean([a.cache_bytes for a in group])),
        "cache_bytes_per_token": float(np.mean([a.cache_bytes / a.cache_tokens for a in group])),
        "cache_allocated": float(np.mean([a.cache_allocated for a in group])),
    }


def prepare(
    subject: Subject,
    specs: Sequence[str] | None = None,
    *,
    lengths: Sequence[int] | None = None,
    samples: int = 100,
    split: str = "validation",
    seed: int = 0,
    batch: int = 8,
    records: Path | str | None = None,
) -> Measure:
    """Make ready to measure how well a model answers questions about long contexts, and what its cache takes for that.

    Args:
        subject: The model.
        specs: Tasks with filler, by name with options; by default those the run was trained on, else all with their defaults.
        lengths: Lengths to ask at, in the place of the tasks' own.
        samples: Samples of every task at every length.
        split: Of the tasks: train, validation or test.
        seed: Of the samples.
        batch: Sequences that run at once.
        records: File of JSON lines, one per answer. An evaluation that was cut off goes on from the answers in it.

    Measuring returns the content that is also written to `long-context.json` of the run (or model) folder under the split's name, behind it
    the budget and the branches where they are given: `rows` by task and length, and `by_cache`, all tasks together by the bytes of the
    cache.

    Raises `ValueError` for tasks and lengths that cannot be, samples longer than the model's context, a tokenizer that cannot write the
    tasks, and records of another evaluation.
    """
    _require_counts(samples=samples, batch=batch)
    about = {"checkpoint": str(subject.place), "split": split, "seed": seed, "budget": subject.budget, "branches": subject.branches}
    tasks = long_tasks(specs or _trained_on(subject) or LONG_TASKS, lengths)
    for task in tasks:
        SampleStream(task, split, seed=seed)
    check_file("records", records)
    journal = Journal(records, about) if records is not None else None
    model, tokenizer = subject.with_tokenizer()
    options: dict[str, Any] = {"samples": samples, "split": split, "seed": seed}
    total = _check_reach(model, tasks, tokenizer, **options)

    def measure() -> dict[str, Any]:
        begun = time.perf_counter()
        found = _all_answers(subject, tasks, journal, total=total, batch=batch, **options)
        result = {"suite": "long-context", **about, "model": str(subject.folder), "samples": samples}
        result |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": time.perf_counter() - begun}
        result |= {"rows": scores(found), "by_cache": by_cache(found)}
        file = subject.note("long-context.json", split + subject.asked, result)
        parts = [part for shown in tables(result) for part in (shown, "")]
        subject.print(*parts, note=f"{result['seconds']:.1f} s; written to {file}")
        return result

    return measure


run = at_once(prepare)


def _all_answers(subject: Subject, tasks: Sequence[LongTask], journal: Journal | None, *, total: int, **options: Any) -> list[Answer]:
    """Return every answer, those of the journal as they stand there, by task and sample; the others are written into it."""
    model, tokenizer = subject.opened
    order = {task.spec: number for number, task in enumerate(tasks)}
    found = [] if journal is None else [a for a in journal.read() if a.task in order and a.index < options["samples"]]
    with bar(subject.console, "long context", total=total) as advance, journal or nullcontext():
        for some in answers(model, tasks, tokenizer, progress=advance, known=[a.key for a in found], **options):
            found += some
            if journal is not None:
                journal.write(some)
    return sorted(found, key=lambda answer: (order[answer.task], answer.index, answer.question))


class Journal:
    """A file of JSON lines: what is measured, then an answer a line. A line that was cut off in writing is dropped."""

    def __init__(self, file: Path | str, about: Mapping[str, Any]) -> None:
        self._file = Path(file)
        self._header = {"suite": "long-context", "format": FORMAT} | dict(about)
        self._whole = 0
        self._known: list[Answer] = []
        if not self._file.parent.is_dir():
            raise FileNotFoundError(f"records={str(file)!r}: the folder {str(self._file.parent)!r} does not exist")
        lines = self._file.read_bytes().splitlines(keepends=True) if self._file.exists() else []
        lines = [line for line in lines if line.endswith(b"\n")]
        try:
            there, *rows = map(json.loads, lines) if lines else (self._header,)
            if there != self._header:
                raise ValueError(f"they are of {there}, this is {self._header}")
            self._known = [Answer(**row) for row in rows]
        except (TypeError, ValueError) as error:
            raise ValueError(f"records={str(file)!r}: holds no records of this evaluation ({error}); name another file") from error
        self._whole = sum(map(len, lines))

    def read(self) -> list[Answer]:
        """Return the answers that were there."""
        return list(self._known)

    def __enter__(self) -> Journal:
        self._out = self._file.open("ab")
        self._out.truncate(self._whole)
        if not self._whole:
            self._line(self._header)
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()

    def write(self, found: Iterable[Answer]) -> None:
        """Add answers; they are in the file when this returns."""
        for answer in found:
            self._line(asdict(answer))
        self._out.flush()

    def _line(self, row: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Return a result of `run` as tables: by task and length, and by bytes of the cache where several tasks share them."""
    shown = [_table(f"long context, {result['split']}, {result['samples']} samples each", result["rows"], "task")]
    if len({row["task"].partition(":")[0] for row in result["rows"]}) > 1:
        shown.append(_table("all tasks, by size of the cache", result["by_cache"], None))
    return shown


def _table(title: str, rows: Sequence[Mapping[str, Any]], label: str | None) -> Table:
    table = Table(title=title, caption="intervals hold 95 % of the values found in samples drawn anew; bytes are those of one sequence")
    if label is not None:
        table.add_column(label)
    for heading in ("length", "exact match", "teacher-forced", "cache\nKiB", "cache\nB/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    named = None
    for row in rows:
        name = None if label is None else _without_length(row[label]).replace(",", ", ").replace(":", ": ")  # so that it can be folded
        numbers = (f"{row['length']:,}", *(_percent(row[name]) for name in ("exact", "forced")))
        bytes_ = (f"{row['cache_bytes'] / 1024:,.1f}", f"{row['cache_bytes_per_token']:,.0f}")
        table.add_row(*([] if name is None else ["" if name == named else name]), *numbers, *bytes_)
        named = name
    return table


def _percent(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.3f} ({estimate['low']:.2f}–{estimate['high']:.2f})"


def _without_length(spec: str) -> str:
    """Return a task's name and options without its length, which has a column."""
    name, _, options = spec.partition(":")
    others = ",".join(option for option in options.split(",") if not option.startswith("length="))
    return f"{name}:{others}" if others else name


def _trained_on(subject: Subject) -> list[str]:
    """Return the tasks with filler that a run was trained on."""
    return [spec for spec in subject.trained_on.get("tasks", {}) if spec.partition(":")[0] in LONG_TASKS]


def _check_reach(model: Any, tasks: Iterable[LongTask], tokenizer: Any, *, samples: int, split: str, seed: int) -> int:
    """Return the tokens of all prompts, or raise `ValueError` for a task of which a sample does not fit into the model's context."""
    tasks = list(tasks)
    encode = SampleEncoder(tokenizer, tasks)
    context, vocabulary = getattr(model.config, "max_position_embeddings", None), model.config.vocab_size
    total = 0
    for task in tasks:
        stream = SampleStream(task, split, seed=seed)
        for index in range(samples):
            items = _items(stream, encode, index)
            total += sum(len(item.prompt) for item in items)
            last = items[-1].prompt + items[-1].answer
            if max(last) >= vocabulary:
                raise ValueError(
                    f"the model's vocab_size={vocabulary}: its tokenizer writes token {max(last)} in a sample of {task.spec!r}"
                )
            if context is not None and len(last) > context:
                raise ValueError(
                    f"length={task.length}: a sample of task {task.spec!r} takes {len(last)} tokens, "
                    f"which must not be above the model's max_position_embeddings={context}"
                )
    return total


def _require_counts(**counts: int) -> None:
    for name, count in counts.items():
        least = 2 if name == "samples" else 1
        if count < least:
            raise ValueError(f"{name}={count}: must be at least {least}{', for an interval' if least > 1 else ''}")
