"""A prepared corpus on disk: its splits as token streams, its documents as records, its tokenizer; read only when asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from pathlm.text.manifest import SPLITS, Manifest
from pathlm.text.shards import TokenStream, check_file, dtype_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDEX_BYTES = 16
"""Per document and once for the end: where its tokens start and where its line in documents.jsonl starts."""


@dataclass(frozen=True, slots=True)
class DocumentRecord:
    """One document of a split: what it is, where its tokens start in the stream, how large it is, and its hashes."""

    number: int
    id: str
    source: str
    split: str
    start: int
    tokens: int
    """Including the begin and end tokens."""
    bytes: int
    """Of the text in UTF-8."""
    characters: int
    sha256_text: str
    sha256_tokens: str


class Corpus:
    """A folder that `pathlm prepare` wrote."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Use `Corpus.open`."""
        self.folder = folder
        self.record = manifest
        self._documents: dict[str, Documents] = {}
        self._streams: dict[str, TokenStream] = {}

    @classmethod
    def open(cls, folder: Path | str, *, verify: bool = True) -> Corpus:
        """Open a prepared folder, checking that every file has its size, and with `verify` also its hash.

        Raises `ValueError` naming the file when something is missing, truncated, changed, or does not fit the vocabulary.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        dtype_for(manifest.vocab_size, manifest.dtype)
        width = np.dtype(manifest.dtype).itemsize
        files = [(f["file"], f["bytes"], f["sha256"]) for f in manifest.tokenizer["files"]]
        for split in manifest.splits.values():
            files += [(f["file"], f["bytes"], f["sha256"]) for f in split["files"]]
            files += [(shard["file"], shard["tokens"] * width, shard["sha256"]) for shard in split["shards"]]
        for name, size, sha256 in files:
            check_file(folder / name, size=size, sha256=sha256 if verify else None)
        return cls(folder, manifest)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json."""
        table: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        return table

    @property
    def vocab_size(self) -> int:
        """Number of ids that a model needs."""
        return self.record.vocab_size

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, `train` first."""
        return tuple(split for split in SPLITS if split in self.record.splits)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Open the tokenizer through transformers."""
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(self.folder / "tokenizer"))
        return tokenizer

    def tokens(self, split: str) -> TokenStream:
        """Return the tokens of a split as one sequence; slices are int64 arrays."""
        if split not in self._streams:
            self._streams[split] = TokenStream(self.folder, self._split(split)["shards"], self.record.dtype)
        return self._streams[split]

    def documents(self, split: str) -> Documents:
        """Return the records of a split's documents as a sequence that reads lines only when they are asked for."""
        if split not in self._documents:
            self._documents[split] = Documents(self.folder / split, self._split(split)["documents"], split)
        return self._documents[split]

    def document_tokens(self, split: str, index: int) -> np.ndarray:
        """Return the tokens of one document, with its begin and end tokens, as int64."""
        starts = self.documents(split).starts
        if not 0 <= index < len(starts) - 1:
            raise IndexError(f"document {index} of {split}: there are {len(starts) - 1}")
        return self.tokens(split)[int(starts[index]) : int(starts[index + 1])]

    def _split(self, split: str) -> dict[str, Any]:
        if split not in self.record.splits:
            raise ValueError(f"split={split!r}: {self.folder} has {', '.join(self.splits)}")
        return self.record.splits[split]


class Documents(Sequence[DocumentRecord]):
    """The document records of one split, read from disk one line at a time."""

    def __init__(self, folder: Path, count: int, split: str) -> None:
        """Map the index of the split in `folder`."""
        self._index = np.memmap(folder / "index.bin", dtype="<u8", mode="r", shape=(count + 1, 2))
        self._file = folder / "documents.jsonl"
        self._split = split

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each document starts in the token stream, and where the last one ends: int64, one more than there are documents."""
        return np.ascontiguousarray(self._index[:, 0]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._index) - 1

    @overload
    def __getitem__(self, where: int) -> DocumentRecord: ...
    @overload
    def __getitem__(self, where: slice) -> list[DocumentRecord]: ...
    def __getitem__(self, where: int | slice) -> DocumentRecord | list[DocumentRecord]:
        if isinstance(where, slice):
            return [self[number] for number in range(*where.indices(len(self)))]
        number = where + len(self) if where < 0 else where
        if not 0 <= number < len(self):
            raise IndexError(f"document {where} of {self._split}: there are {len(self)}")
        with self._file.open("rb") as lines:
            lines.seek(int(self._index[number, 1]))
            return self._record(number, lines.readline())

    def __iter__(self) -> Iterator[DocumentRecord]:
        with self._file.open("rb") as lines:
            for number, line in enumerate(lines):
                yield self._record(number, line)

    def _record(self, number: int, line: bytes) -> DocumentRecord:
        return DocumentRecord(number=number, start=int(self._index[number, 0]), **json.loads(line))
