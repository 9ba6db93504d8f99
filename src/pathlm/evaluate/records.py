"""Per-token loss records: one compact file that says what a model lost on every token, joined to its corpus by document and place."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
COLUMNS = {"document": "I32", "position": "I32", "token": "I32", "loss": "F32"}
"""The tensors of a file and their types, in the order in which they lie there."""
WIDTH = 4
"""Bytes of an entry of each."""


@dataclass(frozen=True, eq=False)
class TokenLosses:
    """The loss of every predicted token of some documents of one split, in the order of the corpus."""

    document: np.ndarray
    """int32: the document's number in its split."""
    position: np.ndarray
    """int32: the token's place in its document; 0 is the start token, which is never predicted, so the first is 1."""
    token: np.ndarray
    """int32: the token itself."""
    loss: np.ndarray
    """float32: −ln p(token | the tokens before it in its document), in nats."""
    header: dict[str, Any]
    """What was measured: format, model, corpus digest, split, context, stride."""

    def __post_init__(self) -> None:
        """Refuse columns that do not belong together."""
        sizes = {len(column) for column in (self.document, self.position, self.token, self.loss)}
        if len(sizes) != 1:
            raise ValueError(f"token losses: columns of different lengths {sorted(sizes)}")

    def __len__(self) -> int:
        return len(self.loss)

    @classmethod
    def of(cls, numbers: list[int], documents: list[np.ndarray], losses: list[np.ndarray], header: dict[str, Any]) -> TokenLosses:
        """Put documents (each with its start token) and the losses of all their other tokens side by side."""
        sizes = [len(tokens) - 1 for tokens in documents]
        return cls(
            np.repeat(np.asarray(numbers, dtype=np.int32), sizes),
            np.concatenate([np.arange(1, size + 1, dtype=np.int32) for size in sizes]),
            np.concatenate([tokens[1:] for tokens in documents]).astype(np.int32),
            np.concatenate(losses).astype(np.float32),
            header | {"format": FORMAT},
        )

    def of_document(self, number: int) -> np.ndarray:
        """Return the losses of one document's tokens from place 1 on; empty when the document was not measured."""
        first, last = np.searchsorted(self.document, [number, number + 1])
        return self.loss[first:last]

    def write(self, file: Path | str) -> None:
        """Write a safetensors file: the four columns, and the header as JSON in its metadata. The file appears whole or not at all."""
        with LossWriter(file, self.header, tokens=len(self)) as out:
            out.add(self)

    def check(self, corpus: Any) -> None:
        """Raise `ValueError` unless the corpus has exactly these tokens at these places."""
        split = self.header["split"]
        starts = np.asarray([record.start for record in corpus.documents(split)] + [len(corpus.tokens(split))])
        document, position = self.document.astype(np.int64), self.position.astype(np.int64)
        if len(self) and (document.max() >= len(starts) - 1 or np.any(position >= (starts[1:] - starts[:-1])[document])):
            raise ValueError(f"token losses of {split!r} name documents or places that {corpus.folder} does not have")
        tokens = corpus.tokens(split)
        for begin in range(0, len(self), 1 << 20):
            where = (starts[document] + position)[begin : begin + (1 << 20)]
            found = tokens[int(where.min()) : int(where.max()) + 1][where - where.min()]
            if np.any(wrong := found != self.token[begin : begin + (1 << 20)]):
                row = begin + int(np.argmax(wrong))
                raise ValueError(
                    f"token losses of {split!r} do not belong to {corpus.folder}: document {document[row]}, place {position[row]} "
                    f"is token {found[row - begin]} there and {self.token[row]} here"
                )


class LossWriter:
    """Writes the losses of so many tokens to a file as they come, in memory that does not grow with them.

    The file appears whole, when the last token was added and the `with` block ends, or not at all.
    """

    def __init__(self, file: Path | str, header: dict[str, Any], *, tokens: int) -> None:
        self._file, self._tokens, self._done = Path(file), tokens, 0
        size = WIDTH * tokens
        described: dict[str, Any] = {
            name: {"dtype": kind, "shape": [tokens], "data_offsets": [place * size, (place + 1) * size]}
            for place, (name, kind) in enumerate(COLUMNS.items())
        }
        metadata = {"pathlm": json.dumps(header | {"format": FORMAT}, sort_keys=True)}
        text = json.dumps({"__metadata__": metadata} | described).encode()
        text += b" " * (-len(text) % 8)
        self._begin = len(text).to_bytes(8, "little") + text

    def __enter__(self) -> LossWriter:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._part = self._file.with_name(self._file.name + ".part")
        self._out = self._part.open("wb")
        self._out.write(self._begin)
        return self

    def add(self, losses: TokenLosses) -> None:
        """Add the next tokens."""
        for place, name in enumerate(COLUMNS):
            column = np.asarray(getattr(losses, name), dtype="<f4" if COLUMNS[name] == "F32" else "<i4")
            self._out.seek(len(self._begin) + WIDTH * (place * self._tokens + self._done))
            self._out.write(column.tobytes())
        self._done += len(losses)

    def __exit__(self, kind: object, *_: object) -> None:
        self._out.close()
        if kind is not None:
            self._part.unlink()
            return
        assert self._done == self._tokens, f"{self._done} of {self._tokens} tokens were added"
        try:
            os.replace(self._part, self._file)
        except OSError:
            self._part.unlink()
            raise


class LossFile:
    """What `pathlm eval --records` wrote, read piece by piece. Raises `ValueError` when the file holds something else."""

    def __init__(self, file: Path | str) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            tensors = safe_open(file, framework="numpy")
            self.header: dict[str, Any] = json.loads((tensors.metadata() or {})["pathlm"])
            self._columns = {name: tensors.get_slice(name) for name in COLUMNS}
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{file} holds no token losses ({error})") from error
        if self.header.get("format") != FORMAT:
            raise ValueError(f"{file} has format {self.header.get('format')!r}; this version reads {FORMAT}")

    def __len__(self) -> int:
        return int(self._columns["loss"].get_shape()[0])

    def rows(self, start: int, stop: int) -> TokenLosses:
        """Return the tokens from `start` to before `stop`, or those that there are, in the order of the corpus."""
        stop = min(stop, len(self))
        return TokenLosses(**{name: column[start:stop] for name, column in self._columns.items()}, header=self.header)


def read_token_losses(file: Path | str) -> TokenLosses:
    """Read what `pathlm eval --records` wrote. Raises `ValueError` when the file holds something else."""
    found = LossFile(file)
    return found.rows(0, len(found))
