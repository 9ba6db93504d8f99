"""Per-token loss records: one compact file that says what a model lost on every token, joined to its corpus by document and place."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1


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
        from safetensors.numpy import save_file

        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        columns = {"document": self.document, "position": self.position, "token": self.token, "loss": self.loss}
        save_file(columns, part, metadata={"pathlm": json.dumps(self.header, sort_keys=True)})
        os.replace(part, file)

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


def read_token_losses(file: Path | str) -> TokenLosses:
    """Read what `pathlm eval --records` wrote. Raises `ValueError` when the file holds something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            header = json.loads((tensors.metadata() or {})["pathlm"])
            columns = {name: tensors.get_tensor(name) for name in ("document", "position", "token", "loss")}
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file} holds no token losses ({error})") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{file} has format {header.get('format')!r}; this version reads {FORMAT}")
    return TokenLosses(**columns, header=header)
