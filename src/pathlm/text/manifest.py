"""The manifest of a prepared corpus: what is in the folder, where it came from, and the hashes that prove it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
FILE = "manifest.json"
SPLITS = ("train", "validation", "test", "shift")
"""Every split there may be, in order. `shift` is held-out text that differs, for example by its time."""


@dataclass
class Manifest:
    """Everything needed to open a corpus and to check it. Field by field what `manifest.json` holds."""

    settings: dict[str, Any]
    """The settings that decide the content (not the number of workers or the folder)."""
    tokenizer: dict[str, Any]
    """Kind, digest, vocabulary size, special ids, and the files with their sizes and hashes."""
    dtype: str
    splits: dict[str, dict[str, Any]]
    """Per split: documents, tokens, bytes, characters, shards, and the hashed files `documents.jsonl` and `index.bin`."""
    sources: list[dict[str, Any]]
    """Per source: declared and realised share of the training tokens, documents and tokens per split, and what was left out."""
    made_with: dict[str, str]
    format: int = FORMAT
    digest: str = ""
    """Sha256 over the content alone: equal digests mean equal tokens and documents, wherever they were prepared."""
    folder: Path = field(default_factory=Path, compare=False)

    def __post_init__(self) -> None:
        """Compute the digest of the content."""
        content = [self.format, self.tokenizer["digest"], self.dtype, self.splits]
        self.digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of ids that a model needs."""
        return int(self.tokenizer["vocab_size"])

    @property
    def tokens(self) -> int:
        """Number of tokens over all splits."""
        return sum(split["tokens"] for split in self.splits.values())

    def write(self, folder: Path) -> None:
        """Put `manifest.json` into `folder`, whole or not at all."""
        table = {name: value for name, value in asdict(self).items() if name != "folder"}
        part = folder / (FILE + ".part")
        with part.open("w", encoding="utf-8", newline="\n") as out:
            json.dump(table, out, ensure_ascii=False, indent=1, sort_keys=True)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        part.replace(folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `manifest.json`. Raises `ValueError` when there is none or it does not fit this version."""
        file = folder / FILE
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            unfinished = (folder / ".work").exists()
            why = "its preparation was not finished; run the same prepare again" if unfinished else "make it with `pathlm prepare`"
            raise ValueError(f"{folder} is not a prepared corpus (no {FILE}): {why}") from error
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}); prepare the corpus again") from error
        if not isinstance(table, dict) or table.get("format") != FORMAT:
            found = table.get("format") if isinstance(table, dict) else None
            raise ValueError(f"{file} has format {found!r}, this version reads {FORMAT}; prepare the corpus again")
        digest = table.pop("digest", None)
        try:
            manifest = cls(**table, folder=folder)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{file} lacks or misspells a field ({error}); prepare the corpus again") from error
        if digest != manifest.digest:
            raise ValueError(f"{file} was changed: its content hashes to {manifest.digest}, but it says {digest}; prepare the corpus again")
        return manifest
