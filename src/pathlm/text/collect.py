"""The first pass of `prepare`: read every source once, drop repeated texts, choose splits, and spool the text to one file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from pathlm.text.journal import Journal, Seen
from pathlm.text.sources import Document, SourceConfig, read

COMMIT_BYTES = 32 << 20
COMMIT_DOCUMENTS = 20_000

Report = Callable[[str, int, "int | None"], None]
"""Called with a phase, the bytes done in it, and the total where it is known."""


def split_of(group: str, *, validation: float, test: float) -> str:
    """Choose a split from the hash of a document's group alone, so that a source may grow without moving what it had."""
    place = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"


def count_characters(text: bytes) -> int:
    """Return the number of code points in a piece of valid UTF-8 (every byte that does not continue one)."""
    if text.isascii():
        return len(text)
    return int(np.count_nonzero((np.frombuffer(text, np.uint8) & 0xC0) != 0x80))


class Collector:
    """Writes documents one after another into the spool file and remembers them in the journal."""

    def __init__(self, journal: Journal, spool: Path, fractions: tuple[float, float]) -> None:
        """Continue where the journal says. `fractions` are those of validation and test."""
        self._journal, self._fractions = journal, fractions
        state = journal.get("collected", {})
        self.source = int(state.get("source", 0))
        self.taken = int(state.get("taken", 0))
        """Documents of the current source that were read, kept or not."""
        self.number = int(state.get("number", 0))
        self.bytes = int(state.get("bytes", 0))
        self.dropped: dict[str, dict[str, int]] = state.get("dropped", {})
        self._file = spool.open("r+b" if spool.exists() else "w+b")
        self._file.truncate(self.bytes)
        self._file.seek(self.bytes)
        self._committed, self._pending = self.bytes, 0

    def add(self, title: str, document: Document) -> None:
        """Spool one document unless it is empty or repeats an earlier one."""
        start, digest, characters = self.bytes, hashlib.sha256(), 0
        for piece in document.pieces:
            digest.update(piece)
            characters += count_characters(piece)
            self._file.write(piece)
            self.bytes += len(piece)
        sha, size = digest.digest(), self.bytes - start
        self.taken += 1
        if not size or self._journal.knows(sha):
            self._file.seek(start)
            self.bytes = start
            self._drop("empty" if not size else "repeated")
        else:
            group = sha.hex() if document.group is None else f"{title}/{document.group}"
            split = document.split or split_of(group, validation=self._fractions[0], test=self._fractions[1])
            row = Seen(self.number, sha, f"{title}/{document.key}", self.source, split, size, characters, start)
            self._journal.add(row)
            self.number += 1
        self._pending += 1
        if self.bytes - self._committed >= COMMIT_BYTES or self._pending >= COMMIT_DOCUMENTS:
            self.commit()

    def next_source(self) -> None:
        """Go on to the next source."""
        self.source, self.taken = self.source + 1, 0
        self.commit()

    def commit(self) -> None:
        """Make the spool and then the journal durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        state = {"source": self.source, "taken": self.taken, "number": self.number, "bytes": self.bytes, "dropped": self.dropped}
        self._journal.set(collected=state)
        self._journal.commit()
        self._committed, self._pending = self.bytes, 0

    def close(self) -> None:
        """Close the spool, cutting off what a dropped document left at its end."""
        self._file.truncate(self.bytes)
        self._file.close()

    def _drop(self, why: str) -> None:
        reasons = self.dropped.setdefault(str(self.source), {})
        reasons[why] = reasons.get(why, 0) + 1


def collect(
    sources: Sequence[SourceConfig], journal: Journal, spool: Path, *, fractions: tuple[float, float], cache: Path, report: Report
) -> None:
    """Read all sources into the spool, or the rest of them. Raises `ValueError` for text that cannot be read and for an empty source."""
    if journal.get("collected_all"):
        return
    collector = Collector(journal, spool, fractions)
    try:
        for source in sources[collector.source :]:
            documents: Iterable[Document] = read(source, cache=cache, start=collector.taken)
            for document in documents:
                collector.add(source.title, document)
                report("read", collector.bytes, None)
            if not collector.taken:
                raise ValueError(f"source {source.title!r} is empty: it holds no document")
            collector.next_source()
    finally:
        collector.close()
    train = sum(count for _, split, count, _, _ in journal.totals() if split == "train")
    if not train:
        where = ", ".join(f"{count} in {split}" for _, split, count, _, _ in journal.totals()) or "all are empty"
        raise ValueError(
            f"the corpus is empty: no document fell into the train split ({where}); add text, set a separator, or lower validation and test"
        )
    report("read", collector.bytes, collector.bytes)
    journal.set(collected_all=True, dropped=collector.dropped)
    journal.commit()
