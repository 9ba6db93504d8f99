"""The files of a released BriLLM: weights, vocabulary and word frequencies, read piece by piece, and every mistake in them named.

Row 0 of the weights is the edge that all pairs share which the frequencies count zero times. The other rows are the pairs counted at
least once: sources in the order of the vocabulary, and the targets of each source in that order, too.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from pathlm.models.brillm.edges import Edges

# Shapes: E rows, D width of the signal, V nodes, P positions

CHUNK = 2**20
"""Characters of the word frequencies that are read at a time."""
LONGEST_TOKEN = 2**16
"""Characters: a mistake further than this before the end of what was read is one, and not a word that is cut there."""
SLAB = 2**23
"""Bytes of weights that are read at a time."""
_NAMES = ("weights", "biases", "node_bias", "positions")


@dataclass(frozen=True)
class Released:
    """A released model whose files were found to fit each other; its weights are still on disk."""

    file: Path
    vocabulary: tuple[str, ...]
    edges: Edges
    node_bias_VD: Tensor
    position_P: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of all numbers."""
        return self.node_bias_VD.dtype

    @property
    def rows(self) -> int:
        """Edges, the shared one included."""
        return self.edges.key_E.numel() + 1

    @property
    def width(self) -> int:
        """Of the signal."""
        return self.node_bias_VD.shape[1]

    def weights(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the edges' matrices, out × in as ours are, some rows at a time, each with the number of its first row.

        Raises `ValueError` at the first number that is not finite.
        """
        for first, slab_EDD in self._slabs("weights", self.width**2):
            yield first, slab_EDD.transpose(1, 2).contiguous()

    def biases(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the edges' biases likewise."""
        for first, slab_E1D in self._slabs("biases", self.width):
            yield first, slab_E1D[:, 0].contiguous()

    def _slabs(self, name: str, numbers: int) -> Iterator[tuple[int, Tensor]]:
        step = max(1, SLAB // (numbers * self.dtype.itemsize))
        for first in range(0, self.rows, step):
            # Mapped anew for every slab: what was read before would count as ours for as long as one mapping lives.
            slab = _state(self.file)[name][first : first + step]
            # A sum is quicker, and may only overflow besides.
            if not bool(slab.sum().isfinite()) and not bool(slab.isfinite().all()):
                row = first + int((~slab.isfinite()).flatten(1).any(1).nonzero()[0])
                raise ValueError(f"weights={str(self.file)!r}: row {row} of {name}, {self._edge(row)}, holds numbers that are not finite")
            yield first, slab

    def _edge(self, row: int) -> str:
        if row == 0:
            return "the shared edge"
        source, target = divmod(int(self.edges.key_E[row - 1]), len(self.vocabulary))
        return f"the edge {self.vocabulary[source]!r} → {self.vocabulary[target]!r}"


def open_released(weights: Path | str, vocab: Path | str, word_frequency: Path | str) -> Released:
    """Read the three files of a released model, all but the edges' weights.

    Raises `FileNotFoundError` naming the first that is not there, and `ValueError` naming the file and what is wrong.
    """
    require_files(weights=weights, vocab=vocab, word_frequency=word_frequency)
    vocabulary = read_vocabulary(Path(vocab))
    node_bias, positions, rows = _read_small(Path(weights), Path(vocab), len(vocabulary))
    edges = read_frequency(Path(word_frequency), vocabulary)
    if rows != edges.key_E.numel() + 1:
        rule = f"must be {edges.key_E.numel() + 1}: the pairs that word_frequency={str(word_frequency)!r} counts, and the shared edge"
        raise ValueError(f"weights={str(weights)!r}: weights has {rows} rows, {rule}; the two are of different models")
    return Released(Path(weights), vocabulary, edges, node_bias, positions)


def require_files(**files: Path | str) -> None:
    """Raise `FileNotFoundError` naming the first of these files that is not there."""
    for name, file in files.items():
        if not Path(file).is_file():
            raise FileNotFoundError(f"{name}={str(file)!r}: there is no such file")


def read_vocabulary(file: Path) -> tuple[str, ...]:
    """Return the tokens in the order of their numbers. Raises `ValueError` where these are not 0, 1, 2 … down the file."""
    where = f"vocab={str(file)!r}"
    try:
        pairs = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=list)
    except (UnicodeDecodeError, JSONDecodeError) as error:
        raise ValueError(f"{where}: is no JSON ({error})") from None
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, tuple) for pair in pairs):
        raise ValueError(f"{where}: must be a JSON object, each token with its number")
    seen: set[str] = set()
    for place, (token, number) in enumerate(pairs):
        if token in seen:
            raise ValueError(f"{where}: the token {token!r} stands there twice")
        seen.add(token)
        if isinstance(number, bool) or number != place:
            raise ValueError(
                f"{where}: the token {token!r} has the number {number!r}, must be {place}: 0, 1, 2 … down the file, none twice"
            )
    return tuple(token for token, _ in pairs)


def read_frequency(file: Path, vocabulary: tuple[str, ...]) -> Edges:
    """Return the pairs that are counted at least once, from a JSON object source → {target → count} of all pairs, one source at a time.

    Raises `ValueError` for a source or target that is missing or not in the vocabulary, and for a count that is none.
    """
    where, number = f"word_frequency={str(file)!r}", {token: place for place, token in enumerate(vocabulary)}
    targets_V: list[np.ndarray | None] = [None] * len(vocabulary)
    with file.open(encoding="utf-8") as lines:
        for source, pairs in _members(lines, where):
            if source not in number:
                raise ValueError(f"{where}: the source {source!r} is not in the vocabulary; it was counted with another one")
            if targets_V[number[source]] is not None:
                raise ValueError(f"{where}: the source {source!r} stands there twice")
            targets_V[number[source]] = _counted(pairs, vocabulary, number, f"{where}: the source {source!r}")
    for source, targets in zip(vocabulary, targets_V, strict=True):
        if targets is None:
            raise ValueError(f"{where}: the source {source!r} of the vocabulary is missing")
    key = [source * len(vocabulary) + targets for source, targets in enumerate(targets_V) if targets is not None]
    return Edges.from_keys(torch.from_numpy(np.concatenate(key)), len(vocabulary))


def _counted(pairs: list[tuple[str, Any]], vocabulary: tuple[str, ...], number: dict[str, int], where: str) -> np.ndarray:
    """Return the targets of one source that are counted at least once, rising."""
    names = tuple(name for name, _ in pairs)
    if names != vocabulary:
        if strange := next((name for name in names if name not in number), None):
            raise ValueError(f"{where}: the target {strange!r} is not in the vocabulary; it was counted with another one")
        if missing := number.keys() - set(names):
            first = min(missing, key=number.__getitem__)
            raise ValueError(f"{where}: the target {first!r} is missing; every pair must be there, zeros included")
        if len(names) > len(vocabulary):
            twice = next(name for place, name in enumerate(names) if name in names[:place])
            raise ValueError(f"{where}: the target {twice!r} stands there twice")
    for name, count in pairs:
        if type(count) is not int or count < 0:
            raise ValueError(f"{where}: the count of the target {name!r} is {count!r}, must be a whole number from 0")
    if names == vocabulary:
        return np.array([place for place, (_, count) in enumerate(pairs) if count], dtype=np.int64)
    return np.sort(np.array([number[name] for name, count in pairs if count], dtype=np.int64))


def _members(file: TextIO, where: str) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Yield the members of a JSON object of objects, each as (name, pairs); holds one of them and some of the file at a time."""
    reader = _Reader(file)
    try:
        if reader.sign() != "{":
            raise ValueError(f"{where}: must be a JSON object, each source with the counts of its targets")
        reader.at += 1
        closed = reader.sign() == "}"
        while not closed:
            name = reader.value('"')
            reader.expect(":")
            pairs = reader.value("{")
            yield name, pairs
            closed = reader.expect(",}") == "}"
        reader.at += 1
        reader.expect("")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: is not UTF-8 ({error})") from None
    except JSONDecodeError as error:
        raise ValueError(f"{where}: is no JSON: {error.msg} at character {reader.before + error.pos:,}") from None


class _Reader:
    """A piece of a long JSON text, moved on as it is read."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.at, self.before, self.ended = file, "", 0, 0, False
        self._decoder = JSONDecoder(object_pairs_hook=list)

    def more(self) -> None:
        """Forget what was read, and read on."""
        fresh = self.file.read(CHUNK)
        self.before += self.at
        self.text, self.at, self.ended = self.text[self.at :] + fresh, 0, not fresh

    def sign(self) -> str:
        """Go to the next sign that is no white space and return it; nothing at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\n\r":
                    return self.text[self.at]
                self.at += 1
            if self.ended:
                return ""
            self.more()

    def expect(self, signs: str) -> str:
        """Step over one of some signs and return it; with none given, the text must end."""
        found = self.sign()
        if (found not in signs or not found) if signs else found:
            raise JSONDecodeError(f"Expecting {' or '.join(map(repr, signs)) or 'the end'}", self.text, self.at)
        self.at += 1
        return found

    def value(self, begins: str) -> Any:
        """Read a string or an object, whichever begins with that sign; an object as a list of pairs."""
        if self.sign() != begins:
            raise JSONDecodeError(f"Expecting {begins!r}", self.text, self.at)
        while True:
            try:
                found, self.at = self._decoder.raw_decode(self.text, self.at)
                return found
            except JSONDecodeError as error:
                if self.ended or error.pos < len(self.text) - LONGEST_TOKEN:
                    raise
            self.more()


def _read_small(file: Path, vocab: Path, nodes: int) -> tuple[Tensor, Tensor, int]:
    """Return copies of node biases (V, D) and positions (P,), and how many rows of edges there are."""
    state, where = _state(file), f"weights={str(file)!r}"
    shapes = {name: tuple(state[name].shape) for name in _NAMES}
    weights, width = shapes["weights"], shapes["weights"][-1] if len(shapes["weights"]) == 3 else 0
    expected: dict[str, tuple[tuple[int, ...], str]] = {
        "weights": ((weights[0] if weights else 0, width, width), "a square matrix per row"),
        "biases": ((weights[0] if weights else 0, 1, width), "a row for each of weights"),
        "node_bias": ((nodes, 1, width), f"one for each of the {nodes} tokens of vocab={str(vocab)!r}"),
        "positions": ((1, state["positions"].numel(), 1), "one number per position"),
    }
    for name, (shape, rule) in expected.items():
        if shapes[name] != shape or not state[name].numel():
            raise ValueError(f"{where}: {name} has shape {shapes[name]}, must be {shape}: {rule}")
        if state[name].dtype != state["weights"].dtype or not state[name].is_floating_point():
            raise ValueError(f"{where}: {name} is {state[name].dtype}, must be floating and as weights: {state['weights'].dtype}")
    for name in ("node_bias", "positions"):
        if not bool(state[name].isfinite().all()):
            raise ValueError(f"{where}: {name} holds numbers that are not finite")
    return state["node_bias"][:, 0].clone(), state["positions"].flatten().clone(), weights[0]


def _state(file: Path) -> dict[str, Tensor]:
    """Map the weights into memory. Raises `ValueError` for a file that holds something else."""
    where = f"weights={str(file)!r}"
    try:
        state = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    except (RuntimeError, OSError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{where}: cannot be read as a state dict: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or set(state) != set(_NAMES) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        held = ", ".join(sorted(map(str, state))[:8]) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{where}: holds {held or 'nothing'}; the released layout is tensors {', '.join(_NAMES)}")
    return state
