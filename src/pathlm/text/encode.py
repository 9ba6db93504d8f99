"""The second pass of `prepare`: turn the spooled text into tokens on several threads, in order, a bounded amount at a time."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from pathlm.text.collect import COMMIT_BYTES, COMMIT_DOCUMENTS, Report
from pathlm.text.journal import Encoded, Journal, Seen
from pathlm.text.shards import DTYPES
from pathlm.text.tokenizers import Encoder, cut

TASK_BYTES = 256 << 10
PART_CHARACTERS = 256 << 10
"""Longer texts are encoded in parts, where the tokenizer allows it."""
_READ = 1 << 20
_AHEAD = 6
"""Tasks a thread that may be read ahead: threads differ in speed, and results are used in order."""


class Part(NamedTuple):
    """A document, or a part of a long one, on its way to the tokenizer."""

    number: int
    text: str
    bytes: int
    first: bool
    last: bool


class Result(NamedTuple):
    """The tokens of a task's parts, back to back, as bytes of the shard dtype; `digests` holds the hashes of whole documents."""

    parts: list[tuple[int, int, bool, bool]]
    tokens: np.ndarray
    digests: list[bytes]
    bytes: int


def spooled_text(spool: IO[bytes], document: Seen, *, limit: int | None = None) -> Iterator[str]:
    """Yield the text of a document in pieces, at most `limit` bytes of it."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")()
    left = document.bytes if limit is None else min(limit, document.bytes)
    whole = left == document.bytes
    position = document.offset
    while left:
        spool.seek(position)
        piece = spool.read(min(left, _READ))
        assert piece, "the spool is shorter than the journal says"
        position += len(piece)
        left -= len(piece)
        yield decoder.decode(piece, final=whole and not left)


def encode(journal: Journal, spool: Path, tokens: Path, encoder: Encoder, *, dtype: str, workers: int, report: Report) -> None:
    """Append the tokens of all documents that are not yet encoded to the file `tokens`."""
    if journal.get("encoded_all"):
        return
    last, length = journal.last_encoded()
    width = DTYPES[dtype].itemsize
    total = journal.get("collected")["bytes"]
    done = journal.get("encoded_bytes", 0)
    with tokens.open("r+b" if tokens.exists() else "w+b") as out, spool.open("rb") as text:
        out.truncate(length * width)
        out.seek(length * width)
        writer = _Writer(out, journal, length)
        tasks = _tasks(journal.documents(after=last), text, encoder)
        for result in _in_order(tasks, encoder, dtype, workers):
            done += result.bytes
            writer.write(result)
            if writer.due:
                writer.commit(done)
            report("encode", done, total)
        writer.commit(done)
    journal.set(encoded_all=True)
    journal.commit()


def _tasks(documents: Iterator[Seen], spool: IO[bytes], encoder: Encoder) -> Iterator[list[Part]]:
    """Group documents, or parts of long ones, into tasks of about equal size."""
    task: list[Part] = []
    size = 0
    for document in documents:
        for part in _parts(document, spool, encoder):
            task.append(part)
            size += part.bytes
            if size >= TASK_BYTES:
                yield task
                task, size = [], 0
    if task:
        yield task


def _parts(document: Seen, spool: IO[bytes], encoder: Encoder) -> Iterator[Part]:
    text = spooled_text(spool, document)
    if document.bytes <= PART_CHARACTERS or not encoder.splits_long_text:
        yield Part(document.number, "".join(text), document.bytes, True, True)
        return
    first, held = True, ""
    for part in cut(text, PART_CHARACTERS, anywhere=encoder.kind == "characters"):
        if held:
            yield Part(document.number, held, len(held.encode()), first, False)
            first = False
        held = part
    yield Part(document.number, held, len(held.encode()), first, True)


def _run(task: list[Part], encoder: Encoder, dtype: str) -> Result:
    """Encode one task: the begin token, the text's tokens and the end token of every document."""
    ids, counts = encoder.encode([part.text for part in task])
    ends = np.cumsum(counts)
    opened = np.array([part.first for part in task])
    closed = np.array([part.last for part in task])
    flat = np.insert(ids.astype(DTYPES[dtype]), *_borders(ends, counts, opened, closed, encoder))
    sizes = counts + opened + closed
    parts, digests, start = [], [], 0
    for part, size in zip(task, sizes.tolist(), strict=True):
        if part.first and part.last:
            digests.append(hashlib.sha256(flat[start : start + size].data).digest())
        start += size
        parts.append((part.number, size, part.first, part.last))
    return Result(parts, flat, digests, sum(part.bytes for part in task))


def _borders(
    ends: np.ndarray, counts: np.ndarray, opened: np.ndarray, closed: np.ndarray, encoder: Encoder
) -> tuple[np.ndarray, np.ndarray]:
    """Return where in the flat ids the begin and end tokens go, and which they are, in the order in which they appear."""
    places = np.stack([ends - counts, ends], axis=1)[np.stack([opened, closed], axis=1)]
    values = np.tile(np.array([encoder.bos, encoder.eos]), (len(ends), 1))[np.stack([opened, closed], axis=1)]
    return places, values


def _in_order(tasks: Iterator[list[Part]], encoder: Encoder, dtype: str, workers: int) -> Iterator[Result]:
    """Run tasks on threads and yield their results in order. Each thread encodes serially, so `workers` is the number of cores used."""
    waiting: deque[Future[Result]] = deque()
    with _serial_backend(), ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(_run, task, encoder, dtype))
                if len(waiting) > _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _serial_backend() -> Iterator[None]:
    """Keep the tokenizers library from starting threads of its own below ours."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class _Writer:
    """Appends results to the token spool and remembers whole documents in the journal."""

    def __init__(self, out: IO[bytes], journal: Journal, length: int) -> None:
        self._out, self._journal, self._length = out, journal, length
        self._rows: list[Encoded] = []
        self._open = (0, hashlib.sha256())
        self._inside = False
        self._bytes = 0

    @property
    def due(self) -> bool:
        """Whether enough was written to commit; never inside a document."""
        return not self._inside and (self._bytes >= COMMIT_BYTES or len(self._rows) >= COMMIT_DOCUMENTS)

    def write(self, result: Result) -> None:
        """Append one result."""
        self._out.write(result.tokens.data)
        digests = iter(result.digests)
        start = 0
        for number, size, first, last in result.parts:
            if first and last:
                self._rows.append(Encoded(number, size, next(digests), self._length))
                self._length += size
            else:
                self._partial(number, result.tokens[start : start + size], first, last)
            start += size
        self._bytes += result.tokens.nbytes

    def _partial(self, number: int, tokens: np.ndarray, first: bool, last: bool) -> None:
        count, digest = (0, hashlib.sha256()) if first else self._open
        digest.update(tokens.data)
        count += len(tokens)
        self._open, self._inside = (count, digest), not last
        if last:
            self._rows.append(Encoded(number, count, digest.digest(), self._length))
            self._length += count

    def commit(self, done: int) -> None:
        """Make the tokens and then the journal durable."""
        self._out.flush()
        os.fsync(self._out.fileno())
        self._journal.add_encoded(self._rows)
        self._journal.set(encoded_bytes=done)
        self._journal.commit()
        self._rows, self._bytes = [], 0
