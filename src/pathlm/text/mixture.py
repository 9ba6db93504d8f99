"""What a run reads: rows of a corpus, rows of synthetic tasks, or both mixed by share, each row a pure function of its number."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from fractions import Fraction
from itertools import accumulate
from threading import Lock
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from pathlm.config import DataConfig
from pathlm.text.corpus import Corpus
from pathlm.text.rows import IGNORE, PADDING, PackedRows, Rows
from pathlm.text.synthetic import SampleStream, open_task
from pathlm.text.synthetic.draws import Draws
from pathlm.text.synthetic.words import SampleEncoder, task_tokenizer

NAMES = ("input_ids", "labels", "document_ids")
TASK_DOCUMENTS = 1 << 40
"""Document ids of samples start here; a corpus has fewer documents."""

_BLOCK = 16  # rows that are packed together, so that only one sample in a block is cut off by the end of the last row
_PER_BLOCK = 1 << 20  # sample numbers reserved for a block
_KEPT_BLOCKS = 4

Labels = Literal["answer", "answer-end", "all"]


def open_rows(data: DataConfig, split: str, *, seed: int, verify: bool = True) -> Rows:
    """Open the rows that `data` describes, for one split.

    Rows of a mixture are text or samples, never both: row i is a row of samples when ⌊(i + 1)·share⌋ > ⌊i·share⌋, so that any first n rows
    hold ⌊n·share⌋ rows of samples. `verify` compares the corpus with its hashes, which reads it once.

    Raises `ValueError` naming the field when the tasks or the corpus cannot be read.
    """
    if data.task_share == 1.0 and data.corpus is None:
        return TaskRows(data.tasks, split, length=data.length, seed=seed, labels=data.task_labels)
    assert data.corpus is not None
    corpus = Corpus.open(data.corpus, verify=verify)
    if data.task_share == 0.0:
        return PackedRows(corpus, split, length=data.length, seed=seed)
    tasks = TaskRows(data.tasks, split, length=data.length, seed=seed, labels=data.task_labels, tokenizer=corpus.tokenizer())
    if data.task_share == 1.0:
        return tasks
    return MixedRows(PackedRows(corpus, split, length=data.length, seed=seed), tasks, share=data.task_share)


class TaskRows:
    """Endless rows of samples, several to a row and each a document of its own; no sample is split.

    `tasks` maps names with options to weights; a weight is a share of the samples. Labels are the answers only (`"answer"`), the answers
    and the end of the document (`"answer-end"`), or every token (`"all"`). Without a tokenizer the tasks get one with a token for every
    word.
    """

    def __init__(
        self,
        tasks: Mapping[str, float],
        split: str,
        *,
        length: int,
        seed: int,
        labels: Labels = "answer",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if not tasks:
            raise ValueError("data.tasks={}: name at least one task")
        if labels not in ("answer", "answer-end", "all"):
            raise ValueError(f"data.task_labels={labels!r}: must be answer, answer-end or all")
        opened = [open_task(spec) for spec in tasks]
        self.length = length
        self._labels = labels
        self._tokenizer = tokenizer if tokenizer is not None else task_tokenizer(opened)
        self.vocab_size = len(self._tokenizer)
        self._encode = SampleEncoder(self._tokenizer, opened)
        for task in opened:
            if (longest := self._encode.longest(task)) > length:
                raise ValueError(
                    f"data.length={length}: a sample of task {task.spec!r} may take {longest} tokens, and samples are never split"
                )
        self._streams = [SampleStream(task, split, seed=seed) for task in opened]
        total = sum(tasks.values())
        self._bounds = [int(bound / total * 2**53) for bound in accumulate(tasks.values())][:-1]
        self._choices = Draws("pathlm task of a sample", split, seed, *(task.spec for task in opened), *tasks.values())
        self._blocks: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        self._lock = Lock()  # rows are read ahead in one thread while another may describe a batch

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of these rows."""
        return self._tokenizer

    def batch(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Return rows `start` … `start + count − 1`: `input_ids`, `labels` and `document_ids`, each (count, length) int64."""
        _require_rows(start, count)
        with self._lock:
            blocks = [(self._block(row // _BLOCK), row % _BLOCK) for row in range(start, start + count)]
        batch = {name: np.empty((count, self.length), dtype=np.int64) for name in NAMES}
        for name, array in batch.items():
            for i, (block, row) in enumerate(blocks):
                array[i] = block[name][row]
        return batch

    def describe(self, batch: dict[str, np.ndarray]) -> list[str]:
        """Return the samples in a batch, as `task:options#number k=steps`."""
        numbers = np.unique(np.asarray(batch["document_ids"]))
        with self._lock:
            return [self._describe(int(number) - TASK_DOCUMENTS) for number in numbers if number >= TASK_DOCUMENTS]

    def _describe(self, number: int) -> str:
        block, place = divmod(number, _PER_BLOCK)
        self._choices.seek(block)
        for _ in range(place + 1):
            stream = self._choose()
        return f"{stream.task.spec}#{number} k={stream.sample(number).k}"

    def _choose(self) -> SampleStream:
        return self._streams[bisect_right(self._bounds, self._choices.below(2**53))]

    def _block(self, number: int) -> dict[str, np.ndarray]:
        if number in self._blocks:
            self._blocks.move_to_end(number)
        else:
            self._blocks[number] = self._pack(number)
            if len(self._blocks) > _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[number]

    def _pack(self, number: int) -> dict[str, np.ndarray]:
        """Fill the rows of a block with samples in order, each row until the next sample does not fit."""
        shape = (_BLOCK, self.length)
        ids, labels, documents = np.full(shape, self._encode.pad_id), np.full(shape, IGNORE), np.full(shape, PADDING)
        self._choices.seek(number)
        row = at = 0
        for index in range(number * _PER_BLOCK, (number + 1) * _PER_BLOCK):
            stream = self._choose()
            encoded = self._encode(stream.sample(index))
            size = len(encoded.ids)
            if size > self.length:
                raise ValueError(f"data.length={self.length}: sample {index} of task {stream.task.spec!r} takes {size} tokens")
            if at + size > self.length:
                row, at = row + 1, 0
                if row == _BLOCK:
                    break
            ids[row, at : at + size] = encoded.ids
            documents[row, at : at + size] = TASK_DOCUMENTS + index
            end = (size - 1, size)
            for first, last in {"answer": encoded.answers, "answer-end": (*encoded.answers, end), "all": ((1, size),)}[self._labels]:
                labels[row, at + first : at + last] = encoded.ids[first:last]
            at += size
        return {"input_ids": ids, "labels": labels, "document_ids": documents}


class MixedRows:
    """Rows of text and rows of samples in a fixed share of the rows, spread as evenly as whole rows allow."""

    def __init__(self, text: Rows, tasks: TaskRows, *, share: float) -> None:
        if not 0.0 < share < 1.0:
            raise ValueError(f"data.task_share={share}: must lie between 0 and 1 to mix text and tasks")
        assert text.length == tasks.length, "rows of one mixture have one length"
        self.length = text.length
        self.vocab_size = max(text.vocab_size, tasks.vocab_size)
        self._text = text
        self._tasks = tasks
        self._share = Fraction(str(share))  # 0.1 means one row in ten, not the nearest binary fraction

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the corpus's tokenizer, which writes the samples too."""
        return self._text.tokenizer()

    def task_rows_before(self, row: int) -> int:
        """Return how many of the first `row` rows hold samples."""
        return int(row * self._share)

    def batch(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Return rows `start` … `start + count − 1`: `input_ids`, `labels` and `document_ids`, each (count, length) int64."""
        _require_rows(start, count)
        before = [self.task_rows_before(row) for row in range(start, start + count + 1)]
        is_task = np.diff(before).astype(bool)
        mixed = {name: np.empty((count, self.length), dtype=np.int64) for name in NAMES}
        for rows, first, mine in ((self._tasks, before[0], is_task), (self._text, start - before[0], ~is_task)):
            if mine.any():
                part = rows.batch(first, int(mine.sum()))
                for name in NAMES:
                    mixed[name][mine] = part[name]
        return mixed

    def describe(self, batch: dict[str, np.ndarray]) -> list[str]:
        """Return the documents and samples in a batch."""
        documents = np.asarray(batch["document_ids"])
        only_text = {**batch, "document_ids": np.where(documents >= TASK_DOCUMENTS, PADDING, documents)}
        return [*self._text.describe(only_text), *self._tasks.describe(batch)]


def _require_rows(start: int, count: int) -> None:
    if start < 0 or count < 1:
        raise ValueError(f"rows {start} to {start + count - 1}: start must not be negative and count must be at least 1")
