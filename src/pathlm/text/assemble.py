"""The last pass of `prepare`: choose documents so that sources mix by token share, and write shards, records and the manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from pathlm.text.collect import Report
from pathlm.text.journal import Encoded, Journal, Seen
from pathlm.text.manifest import SPLITS
from pathlm.text.shards import DTYPES, file_sha256
from pathlm.text.sources import SourceConfig

_COPY = 1 << 20


def choose(journal: Journal, sources: Sequence[SourceConfig]) -> dict[int, bytes]:
    """Return, per source that declares a share, the largest text hash that is kept in the train split.

    Without shares everything is kept. With shares, the source that is scarcest for its share gives all its documents, and every
    other source the documents with the smallest text hashes (a fixed random order) up to the number of tokens that its share
    then asks for, to the nearest document. Nothing is repeated. Validation, test and shift keep everything.
    """
    if sources[0].share is None:
        return {}
    held = {source: tokens for source, split, _, _, tokens in journal.totals() if split == "train"}
    if missing := [s.title for number, s in enumerate(sources) if not held.get(number)]:
        raise ValueError(f"sources {', '.join(missing)} declare a share but have no document in the train split")
    shares = normalised(sources)
    whole = min(held[number] / share for number, share in enumerate(shares))
    cutoffs = {}
    for number, share in enumerate(shares):
        wanted, taken = share * whole, 0
        cutoffs[number] = b""
        for document, tokens in journal.by_content(number):
            if taken and abs(taken + tokens - wanted) > abs(taken - wanted):
                break
            taken += tokens
            cutoffs[number] = document.sha
    return cutoffs


def normalised(sources: Sequence[SourceConfig]) -> list[float]:
    """Return the declared shares divided by their sum."""
    shares = [source.share or 0.0 for source in sources]
    return [share / sum(shares) for share in shares]


@dataclass(frozen=True)
class _Layout:
    """What every split is written from and to."""

    out: Path
    tokens: IO[bytes]
    """All tokens, in the order of the journal; read piece by piece, since a mapped file would count as resident memory."""
    dtype: np.dtype[Any]
    titles: list[str]
    journal: Journal
    shard_tokens: int
    report: Report
    bytes: int
    """Of text over all splits, for the progress bar."""


def _write_split(split: str, kept: Iterator[tuple[Seen, Encoded]], layout: _Layout, *, before: int) -> dict[str, Any]:
    """Write one split: shards, one record per document, and the index. Shards that are already there stay."""
    folder = layout.out / split
    folder.mkdir(exist_ok=True)
    shards = _Shards(folder, split, layout)
    totals = {"documents": 0, "tokens": 0, "bytes": 0, "characters": 0}
    by_source = [0] * len(layout.titles)
    position = 0
    with (folder / "documents.jsonl").open("wb") as lines, (folder / "index.bin").open("wb") as index:
        for document, encoded in kept:
            index.write(np.array([totals["tokens"], position], dtype="<u8").tobytes())
            position += lines.write(_record(document, encoded, layout.titles[document.source]))
            for piece in _pieces(layout, encoded):
                shards.write(piece)
            for name, value in (
                ("documents", 1),
                ("tokens", encoded.tokens),
                ("bytes", document.bytes),
                ("characters", document.characters),
            ):
                totals[name] += value
            by_source[document.source] += encoded.tokens
            layout.report("write", before + totals["bytes"], layout.bytes)
        index.write(np.array([totals["tokens"], position], dtype="<u8").tobytes())
        for file in (lines, index):
            file.flush()
            os.fsync(file.fileno())
    files = [describe_file(layout.out, folder / name) for name in ("documents.jsonl", "index.bin")]
    return totals | {"shards": shards.close(), "files": files, "tokens_by_source": by_source}


def _pieces(layout: _Layout, encoded: Encoded) -> Iterator[np.ndarray]:
    """Yield the tokens of one document, a bounded number at a time."""
    layout.tokens.seek(encoded.offset * layout.dtype.itemsize)
    left = encoded.tokens
    while left:
        content = layout.tokens.read(min(left, _COPY) * layout.dtype.itemsize)
        assert content, "the token spool is shorter than the journal says"
        yield np.frombuffer(content, dtype=layout.dtype)
        left -= len(content) // layout.dtype.itemsize


def _record(document: Seen, encoded: Encoded, source: str) -> bytes:
    """Return the line of documents.jsonl."""
    record = {
        "id": document.id,
        "source": source,
        "split": document.split,
        "tokens": encoded.tokens,
        "bytes": document.bytes,
        "characters": document.characters,
        "sha256_text": document.sha.hex(),
        "sha256_tokens": encoded.sha.hex(),
    }
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def describe_file(root: Path, file: Path) -> dict[str, Any]:
    """Return a file's name under `root`, its size and its sha256."""
    return {"file": file.relative_to(root).as_posix(), "bytes": file.stat().st_size, "sha256": file_sha256(file)}


class _Shards:
    """Cuts a stream of tokens into files. A finished file is recorded in the journal and never written twice."""

    def __init__(self, folder: Path, split: str, layout: _Layout) -> None:
        self._folder, self._split, self._journal, self._size = folder, split, layout.journal, layout.shard_tokens
        self._number, self._filled = 0, 0
        self._out: Any = None
        self._digest = hashlib.sha256()
        self._records: list[dict[str, Any]] = []
        self._open()

    def _open(self) -> None:
        self._name = f"{self._number:05d}.bin"
        self._known = self._journal.shard(self._split, self._number)
        self._filled, self._digest = 0, hashlib.sha256()
        if self._known is None:
            self._out = (self._folder / (self._name + ".part")).open("wb")

    def write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            piece, tokens = tokens[: self._size - self._filled], tokens[self._size - self._filled :]
            if self._known is None:
                content = np.ascontiguousarray(piece).data
                self._digest.update(content)
                self._out.write(content)
            self._filled += len(piece)
            if self._filled == self._size:
                self._finish()
                self._number += 1
                self._open()

    def _finish(self) -> None:
        if self._known is None:
            self._out.flush()
            os.fsync(self._out.fileno())
            self._out.close()
            (self._folder / (self._name + ".part")).replace(self._folder / self._name)
            self._known = (self._filled, self._digest.hexdigest())
            self._journal.add_shard(self._split, self._number, *self._known)
            self._journal.commit()
        self._records.append({"file": f"{self._split}/{self._name}", "tokens": self._known[0], "sha256": self._known[1]})

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard and return the records of all."""
        if self._filled:
            self._finish()
        elif self._known is None:
            self._out.close()
            (self._folder / (self._name + ".part")).unlink()
        return self._records


def write_all(
    journal: Journal, token_file: Path, out: Path, *, sources: Sequence[SourceConfig], dtype: str, shard_tokens: int, report: Report
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Write every split. Return what the manifest says about the splits and about the sources."""
    cutoffs = choose(journal, sources)
    totals = list(journal.totals())
    size = sum(row[3] for row in totals)
    splits: dict[str, dict[str, Any]] = {}
    with token_file.open("rb") as tokens:
        layout = _Layout(out, tokens, DTYPES[dtype], [source.title for source in sources], journal, shard_tokens, report, size)
        for split in SPLITS:
            if split != "shift" or any(row[1] == split for row in totals):
                before = sum(record["bytes"] for record in splits.values())
                splits[split] = _write_split(split, journal.kept(split, cutoffs), layout, before=before)
    report("write", size, size)
    return splits, _describe_sources(journal, sources, splits)


def _describe_sources(journal: Journal, sources: Sequence[SourceConfig], splits: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    by_source = {split: record.pop("tokens_by_source") for split, record in splits.items()}
    train = sum(by_source["train"])
    dropped = journal.get("dropped", {})
    read: dict[int, dict[str, int]] = {}
    for source, _, documents, size, tokens in journal.totals():
        held = read.setdefault(source, {"documents": 0, "bytes": 0, "tokens": 0})
        for name, value in (("documents", documents), ("bytes", size), ("tokens", tokens)):
            held[name] += value
    shares = normalised(sources) if sources[0].share is not None else [None] * len(sources)
    return [
        {
            "source": source.title,
            "declared_share": shares[number],
            "realised_share": by_source["train"][number] / train,
            "tokens": {split: counts[number] for split, counts in by_source.items()},
            "unique": read.get(number, {"documents": 0, "bytes": 0, "tokens": 0}),
            "dropped": {"empty": 0, "repeated": 0} | dropped.get(str(number), {}),
        }
        for number, source in enumerate(sources)
    ]


def remove_corpus(folder: Path) -> None:
    """Delete what `prepare` wrote into a folder, and nothing else."""
    for name in ("manifest.json", "inputs.json"):  # first: a corpus that is half removed must not look finished
        (folder / name).unlink(missing_ok=True)
    for name in ("tokenizer", *SPLITS, ".work"):
        shutil.rmtree(folder / name, ignore_errors=True)
