"""Where text comes from: named corpora, local txt, jsonl and parquet files, Hugging Face datasets, all read as a stream of documents."""

import codecs
import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.dataclasses import strict

from pathlm.config import with_options
from pathlm.text import corpora

KINDS = {".txt": "txt", ".text": "txt", ".md": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_PIECE = 1 << 20


@strict
@dataclass(kw_only=True)
class SourceConfig:
    """One source of text: exactly one of `name`, `path` and `hub`, its share of the training tokens, and which field holds the text."""

    name: str | None = None
    """A named corpus, for example `sotu`."""
    path: str | None = None
    """A file, a folder or a glob of txt, jsonl (also .gz) or parquet files."""
    hub: str | None = None
    """A Hugging Face dataset, or a local folder that `datasets.load_dataset` opens; streamed."""
    share: float | None = None
    """Wanted share of the training tokens. All sources declare one, or none does."""
    label: str | None = None
    """What the source is called in document ids; derived from name, path or hub when absent."""
    text_field: str = "text"
    id_field: str | None = None
    """Field with a document's name; line or row numbers when absent."""
    separator: str | None = None
    """Text between two documents of a txt file; without it a file is one document."""
    subset: str | None = None
    """Configuration of a hub dataset, for example `sample-10BT`."""
    hub_split: str = "train"
    revision: str | None = None
    max_documents: int | None = None
    """Read only so many documents from the front of the source."""

    def validate_source(self) -> None:
        """Refuse a source that cannot be read."""
        given = [kind for kind in ("name", "path", "hub") if getattr(self, kind)]
        if len(given) != 1:
            raise ValueError(f"a source needs exactly one of name, path and hub, but has {', '.join(given) or 'none'}")
        if self.name and self.name not in corpora.NAMED:
            raise ValueError(f"name={self.name!r}: the named corpora are {', '.join(corpora.NAMED)}; a file or folder is given as path")
        if self.share is not None and not 0 < self.share < float("inf"):
            raise ValueError(f"share={self.share!r}: must be positive")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"max_documents={self.max_documents!r}: must be at least 1")
        if self.separator == "":
            raise ValueError("separator='': must not be empty")

    @property
    def title(self) -> str:
        """What the source is called in document ids."""
        if self.label or self.name:
            return self.label or str(self.name)
        if self.hub:
            return "/".join(Path(self.hub).parts[-2:]).strip("/") + (f"/{self.subset}" if self.subset else "")
        parts = [part for part in Path(str(self.path)).parts if not glob.has_magic(part) and part not in (".", "..", "/")]
        return Path(parts[-1]).stem if parts else "text"


class Document(NamedTuple):
    """A document as it is read: its name in the source and its UTF-8 text in pieces, so that a large file is never held whole."""

    key: str
    pieces: Iterable[bytes]
    group: str | None = None
    """Documents of one group share a split; without a group, the text's hash decides."""
    split: str | None = None
    """The split this document must go to, whatever its hash."""


def parse_source(text: str) -> SourceConfig:
    """Read a source from one word: `sotu`, `books/*.txt`, `hub:roneneldan/TinyStories`, each optionally followed by `=share`.

    Raises `ValueError` when the word is neither a named corpus nor something that looks like a path.
    """
    body, equals, tail = text.rpartition("=")
    options: dict[str, Any] = {}
    if equals and re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]+)?", tail):
        text, options["share"] = body, float(tail)
    if text.startswith("hub:"):
        options["hub"], _, subset = text.removeprefix("hub:").partition("@")
        options["subset"] = subset or None
    elif text in corpora.NAMED:
        options["name"] = text
    elif glob.has_magic(text) or "/" in text or Path(text).exists() or Path(text.removesuffix(".gz")).suffix in KINDS:
        options["path"] = text
    else:
        known = ", ".join(corpora.NAMED)
        raise ValueError(f"source {text!r} is neither a named corpus ({known}) nor a file, folder or glob, nor hub:owner/name")
    return with_options(SourceConfig, options)


def source_from(value: Any) -> SourceConfig:
    """Read a source from a recipe: a word, or a table with the fields of `SourceConfig`."""
    if isinstance(value, SourceConfig):
        return value
    if isinstance(value, str):
        return parse_source(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"sources: {value!r} must be a word such as 'sotu' or a table with name, path or hub")
    share = value.get("share")
    return with_options(SourceConfig, {**value, "share": float(share)} if isinstance(share, int) else value, where="sources.")


def list_files(path: str) -> list[tuple[str, Path]]:
    """Return the text files behind a file, folder or glob as (name, file), sorted by name. Raises `ValueError` when there is none."""
    root = Path(path)
    if root.is_dir():
        found = [f for f in root.rglob("*") if f.is_file() and _kind(f, strict=False)]
        found = [f for f in found if not any(part.startswith(".") for part in f.relative_to(root).parts)]
    elif root.is_file():
        root, found = root.parent, [root]
    else:
        found = [f for f in map(Path, glob.glob(path, recursive=True)) if f.is_file()]
        while glob.has_magic(root.name) or any(glob.has_magic(part) for part in root.parent.parts):
            root = root.parent
    if not found:
        raise ValueError(f"path={path!r}: no txt, jsonl or parquet file there")
    for file in found:
        _kind(file)
    return sorted((f.relative_to(root).as_posix(), f) for f in found)


def fingerprint(source: SourceConfig) -> list[list[Any]]:
    """Return (name, size, time of change) of every local file of a source, to notice a change between two runs."""
    if source.name:
        return [[source.name, 0, corpora.NAMED[source.name].sha256]]
    if not source.path:
        return []
    return [[name, (status := file.stat()).st_size, status.st_mtime_ns] for name, file in list_files(source.path)]


def read(source: SourceConfig, *, cache: Path, start: int = 0) -> Iterator[Document]:
    """Yield the documents of a source from number `start` on. Raises `ValueError` naming file and place of what cannot be read."""
    if source.hub:
        documents = _read_hub(source, start)
        start = 0
    elif source.name:
        documents = _read_named(corpora.fetch(source.name, cache))
    else:
        documents = (document for name, file in list_files(str(source.path)) for document in _read_file(source, name, file))
    for number, document in enumerate(documents):
        if source.max_documents is not None and number >= source.max_documents:
            return
        if number >= start:
            yield document


def _kind(file: Path, *, strict: bool = True) -> str | None:
    kind = KINDS.get(Path(file.name.removesuffix(".gz")).suffix.lower())
    if file.suffix == ".gz" and kind == "parquet":
        kind = None
    if kind is None and strict:
        raise ValueError(f"{file}: only {', '.join(KINDS)} files can be read")
    return kind


def _read_file(source: SourceConfig, name: str, file: Path) -> Iterator[Document]:
    kind = _kind(file)
    if kind == "parquet":
        yield from _read_parquet(source, name, file)
    elif kind == "jsonl":
        yield from _read_jsonl(source, name, file)
    elif source.separator is None:
        yield Document(name, _pieces(file))
    else:
        for number, text in enumerate(_separated(_pieces(file), source.separator.encode())):
            yield Document(f"{name}:{number}", (text,))


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """Open a file of bytes, unpacking .gz; damage to the packing is a `ValueError` that names the file."""
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
        try:
            yield stream
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{file}: truncated or damaged gzip file ({error})") from error


def _pieces(file: Path) -> Iterator[bytes]:
    """Yield a file's bytes, checked to be UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    with _open(file) as stream:
        while True:
            piece = stream.read(_PIECE)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: not UTF-8 at byte {position - pending + error.start} ({error.reason})") from error
            if not piece:
                return
            position += len(piece)
            yield piece


def _separated(pieces: Iterable[bytes], separator: bytes) -> Iterator[bytes]:
    """Yield what lies between the separators."""
    buffer = b""
    for piece in pieces:
        *whole, buffer = (buffer + piece).split(separator)
        yield from whole
    yield buffer


def _read_jsonl(source: SourceConfig, name: str, file: Path) -> Iterator[Document]:
    position = 0
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            try:
                row = json.loads(line.decode("utf-8")) if line.strip() else None
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: not UTF-8 at byte {position + error.start}, line {number} ({error.reason})") from error
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error})") from error
            position += len(line)
            if row is not None:
                yield _from_row(source, row, f"{name}:{number}", where)


def _read_parquet(source: SourceConfig, name: str, file: Path) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: not a parquet file ({error})") from error
    columns = [source.text_field] + ([source.id_field] if source.id_field else [])
    if missing := [column for column in columns if column not in table.schema_arrow.names]:
        raise ValueError(f"{file}: has no field {', '.join(missing)}; it has {', '.join(table.schema_arrow.names)}")
    number = 0
    with closing(table):
        for batch in table.iter_batches(batch_size=256, columns=columns):
            texts = batch.column(columns[0])
            if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
                raise ValueError(f"{file}: field {columns[0]} holds {texts.type}, not text")
            keys = batch.column(columns[1]) if source.id_field else None
            for row, value in enumerate(texts.cast(pa.large_binary())):
                text = value.as_py()
                where = f"{file}, row {number}"
                if text is None:
                    raise ValueError(f"{where}: field {source.text_field!r} is empty (null)")
                try:
                    text.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where}: not UTF-8 at byte {error.start} of field {source.text_field!r} ({error.reason})") from error
                yield Document(f"{name}:{number}" if keys is None else str(keys[row].as_py()), (text,))
                number += 1


def _read_hub(source: SourceConfig, start: int) -> Iterator[Document]:
    """Stream a dataset; it is never held whole, in memory or on disk."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"hub={source.hub!r}: reading a Hugging Face dataset needs the extra: pip install 'pathlm[hub]'") from error
    assert source.hub is not None
    try:
        rows = datasets.load_dataset(source.hub, name=source.subset, split=source.hub_split, revision=source.revision, streaming=True)
        names = rows.column_names
        if names is not None:
            wanted = [source.text_field] + ([source.id_field] if source.id_field else [])
            if missing := [column for column in wanted if column not in names]:
                raise ValueError(f"has no field {', '.join(missing)}; it has {', '.join(names)}")
            rows = rows.select_columns(wanted)
        if source.max_documents is not None:
            rows = rows.take(source.max_documents)
        for number, row in enumerate(rows.skip(start) if start else rows, start=start):
            yield _from_row(source, row, str(number), f"hub={source.hub!r}, row {number}")
    except (OSError, ValueError) as error:
        text = str(error)
        raise ValueError(text if text.startswith("hub=") else f"hub={source.hub!r}: {text}") from error


def _from_row(source: SourceConfig, row: Any, key: str, where: str) -> Document:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a record must be an object with named fields, not {type(row).__name__}")
    for field in (source.text_field, source.id_field):
        if field is not None and row.get(field) is None:
            raise ValueError(f"{where}: has no field {field!r}; it has {', '.join(row)}")
    text = row[source.text_field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {source.text_field!r} holds {type(text).__name__}, not text")
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field {source.text_field!r} is not UTF-8 at character {error.start} ({error.reason})") from error
    return Document(str(row[source.id_field]) if source.id_field else key, (encoded,))


def _read_named(file: Path) -> Iterator[Document]:
    with file.open("rb") as lines:
        for line in lines:
            row = json.loads(line)
            yield Document(row["id"], (row["text"].encode(),), row["group"], row["split"])
