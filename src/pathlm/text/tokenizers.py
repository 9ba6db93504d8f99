"""Tokenizers: byte-level BPE and character vocabularies trained here, or any fast Hugging Face tokenizer, behind one encoding interface."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unk|>"
SMALLEST_BPE = 258
"""256 bytes and the two special tokens."""

# A pretokenizer that splits like GPT-2's never joins what stands on the two sides of these places, so encoding the parts gives
# the tokens of the whole: before white space that follows something else, and after Chinese punctuation before an ideograph.
_CUT = re.compile(r"(?<=\S)(?=[ \n\r\t])|(?<=[。！？；，、])(?=[\u4e00-\u9fff])")

# All chunks between two such places before white space. `_RARE` is the white space that is no such place.
_RARE = r"\x0b\x0c\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_ANY = rf"[ \n\r\t{_RARE}]"
_INK = rf"[^ \n\r\t{_RARE}]"
_CHUNK = re.compile(rf"{_ANY}*{_INK}+(?:[{_RARE}]{_ANY}*{_INK}+)*|{_ANY}+")

_WORD = re.compile(r"[^\W\d_]+")
_DISTINCT_BYTES = 4_000_000
_KNOWN_CHUNKS = 250_000
_TRIAL_CHARACTERS = 1 << 20
_WORTHWHILE = 0.75


class Encoder:
    """Turns text into token ids. Special tokens that stand literally in the text are encoded as plain text."""

    def __init__(self, backend: Tokenizer, *, bos: int, eos: int, pad: int | None, kind: str, wrapper: Any = None) -> None:
        """Wrap a backend. `wrapper` is the transformers tokenizer it came from, if it was loaded."""
        self.backend, self.bos, self.eos, self.pad, self.kind = backend, bos, eos, pad, kind
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self._wrapper = wrapper
        self._known = _KnownChunks(backend) if _splits_like_gpt2(backend) else None
        self._table: np.ndarray | None = None
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        if kind == "characters":
            self._table = np.full(0x110000, backend.token_to_id(UNKNOWN), dtype=np.uint32)
            for token, number in backend.get_vocab(with_added_tokens=False).items():
                if len(token) == 1:
                    self._table[ord(token)] = number

    @property
    def splits_long_text(self) -> bool:
        """Whether long texts may be encoded in the parts that `cut` makes, with the same tokens as in one go."""
        return self._known is not None or self.kind == "characters"

    @property
    def digest(self) -> str:
        """Sha256 over the whole backend and the special ids."""
        text = json.dumps([self.backend.to_str(), self.bos, self.eos, self.pad])
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts in one flat uint32 array, and how many belong to each text. Adds no special token."""
        if self._table is not None:
            ids = self._table[np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4")]
            return ids, np.fromiter(map(len, texts), np.int64, len(texts))
        if self._known is not None and self._known.lock.acquire(blocking=False):
            try:
                if self._known.worthwhile:
                    return self._known.encode(texts)
            finally:
                self._known.lock.release()
        found = [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        flat = (
            np.frombuffer(array("I", chain.from_iterable(found)), dtype=np.uint32)
            if len(found) > 1
            else np.array(found[0], dtype=np.uint32)
        )
        return flat, np.fromiter(map(len, found), np.int64, len(found))

    def save(self, folder: Path) -> None:
        """Write files that `transformers.AutoTokenizer` opens."""
        if self._wrapper is None:
            from transformers import PreTrainedTokenizerFast

            special = {"bos_token": END, "eos_token": END, "pad_token": PAD} | ({"unk_token": UNKNOWN} if self.kind == "characters" else {})
            wrapper = PreTrainedTokenizerFast(tokenizer_object=self.backend, clean_up_tokenization_spaces=False, **special)
        else:
            wrapper = self._wrapper
        wrapper.save_pretrained(str(folder))


def _splits_like_gpt2(backend: Tokenizer) -> bool:
    """Whether a tokenizer encodes text in independent parts as GPT-2's does: byte-level BPE that changes nothing beforehand."""
    table = json.loads(backend.to_str())
    splitter = table["pre_tokenizer"] or {}
    return (
        table["normalizer"] is None
        and table["model"]["type"] == "BPE"
        and not table["model"].get("dropout")
        and (splitter.get("type"), splitter.get("add_prefix_space"), splitter.get("use_regex", True)) == ("ByteLevel", False, True)
        and all(token["special"] for token in table["added_tokens"])
    )


class _KnownChunks:
    """Remembers the tokens of chunks of text (a word with the space before it and the punctuation after it) that were met before.

    Looking a chunk up is several times faster than encoding it, but holds Python's interpreter lock. So one thread at a time does
    that, and the others use the library, which works without the lock; the tokens are the same.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self.lock = Lock()
        self._backend = backend
        self._known: dict[str, bytes] = {}
        self._characters, self._missed = 0, 0

    @property
    def worthwhile(self) -> bool:
        """False for text whose chunks seldom come back, for example Chinese."""
        return self._characters < _TRIAL_CHARACTERS or self._missed <= (1 - _WORTHWHILE) * self._characters

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Do what `Encoder.encode` does."""
        chunks = [_CHUNK.findall(text) for text in texts]
        known: Mapping[str, bytes] = self._known
        new = [chunk for chunk in set(chain.from_iterable(chunks)) if chunk not in known]
        encodings = self._backend.encode_batch_fast(new, add_special_tokens=False)
        found = {chunk: array("I", encoding.ids).tobytes() for chunk, encoding in zip(new, encodings, strict=True)}
        self._characters += sum(map(len, texts))
        self._missed += sum(map(len, new))
        room = _KNOWN_CHUNKS - len(self._known)
        self._known.update(islice(found.items(), room))
        if room < len(found):
            known = ChainMap(found, self._known)
        parts = [b"".join(map(known.__getitem__, row)) for row in chunks]
        return np.frombuffer(b"".join(parts), dtype=np.uint32), np.fromiter((len(part) // 4 for part in parts), np.int64, len(parts))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Encoder:
    """Train a byte-level BPE that round-trips every text: no normalisation, no added space, all 256 bytes in the vocabulary.

    The trainer's memory grows with the distinct words, which are whole clauses in Chinese. Once `_DISTINCT_BYTES` of them were seen,
    further text that is not plain ASCII is left out.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END, PAD], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(_few_words(texts), trainer=trainer)
    return _own(backend, "bpe")


def _few_words(texts: Iterable[str]) -> Iterator[str]:
    """Pass texts on, leaving out what is not ASCII after the distinct words of such texts have reached `_DISTINCT_BYTES`."""
    seen: set[str] = set()
    size = 0
    for text in texts:
        if not text.isascii():
            if size > _DISTINCT_BYTES:
                continue
            new = set(_WORD.findall(text)) - seen
            size += sum(len(word.encode()) for word in new)
            seen |= new
        yield text


def train_characters(texts: Iterable[str], vocab_size: int) -> Encoder:
    """Keep the most frequent characters, ties by code point; every other character becomes `<|unk|>`."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    kept = sorted(counts, key=lambda character: (-counts[character], character))[: vocab_size - 3]
    vocabulary = {token: number for number, token in enumerate([END, PAD, UNKNOWN, *kept])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END, PAD, UNKNOWN])
    return _own(backend, "characters")


def load_pretrained(name: str) -> Encoder:
    """Load a Hugging Face tokenizer from a folder or by name. Raises `ValueError` when there is none or it cannot be used."""
    from transformers import AutoTokenizer

    try:
        wrapper = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"tokenizer={name!r}: neither bpe, characters nor a Hugging Face tokenizer: {str(error).splitlines()[0]}"
        ) from error
    if not getattr(wrapper, "is_fast", False):
        raise ValueError(f"tokenizer={name!r}: only tokenizers with a fast backend can be used")
    if wrapper.eos_token_id is None:
        raise ValueError(f"tokenizer={name!r}: has no end-of-text token, which must stand between documents")
    eos = int(wrapper.eos_token_id)
    bos = eos if wrapper.bos_token_id is None else int(wrapper.bos_token_id)
    backend = Tokenizer.from_str(wrapper.backend_tokenizer.to_str())
    return Encoder(backend, bos=bos, eos=eos, pad=wrapper.pad_token_id, kind="pretrained", wrapper=wrapper)


def open_trained(folder: Path, kind: str) -> Encoder:
    """Open a tokenizer that `train_bpe` or `train_characters` made and `save` wrote."""
    return _own(Tokenizer.from_file(str(folder / "tokenizer.json")), kind)


def _own(backend: Tokenizer, kind: str) -> Encoder:
    end = backend.token_to_id(END)
    assert end is not None
    return Encoder(backend, bos=end, eos=end, pad=backend.token_to_id(PAD), kind=kind)


def cut(pieces: Iterable[str], size: int, *, anywhere: bool = False) -> Iterator[str]:
    """Regroup a text given in pieces into parts of at least `size` characters, cut only where tokens cannot join.

    With `anywhere`, parts have exactly `size` characters. A text without any such place stays whole.
    """
    buffer = ""
    for piece in pieces:
        buffer += piece
        start = 0
        while len(buffer) - start > size:
            if anywhere:
                end = start + size
            else:
                place = _CUT.search(buffer, start + size)
                if place is None:
                    break
                end = place.start()
            if end >= len(buffer):
                break
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    if buffer:
        yield buffer
