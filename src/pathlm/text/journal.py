"""What a running `prepare` has finished so far, in one SQLite file: the seen documents, the encoded ones and the written shards.

The same tables drop exact duplicates with flat memory and let a killed process continue where it was: everything that was done since
the last commit is simply done again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_TABLES = """
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS documents (number INTEGER PRIMARY KEY, sha BLOB UNIQUE, id TEXT, source INTEGER, split TEXT, bytes INTEGER,
    characters INTEGER, offset INTEGER);
CREATE TABLE IF NOT EXISTS encoded (number INTEGER PRIMARY KEY, tokens INTEGER, sha BLOB, offset INTEGER);
CREATE TABLE IF NOT EXISTS shards (split TEXT, number INTEGER, tokens INTEGER, sha TEXT, PRIMARY KEY (split, number)) WITHOUT ROWID;
"""


class Seen(NamedTuple):
    """A document whose text lies in the spool file: where, how long, and what it is called."""

    number: int
    sha: bytes
    id: str
    source: int
    split: str
    bytes: int
    characters: int
    offset: int


class Encoded(NamedTuple):
    """A document's tokens in the token spool: how many, their sha256, and where the first one lies (in tokens)."""

    number: int
    tokens: int
    sha: bytes
    offset: int


class Busy(ValueError):
    """Another process is preparing the same folder."""


class Journal:
    """The memory of one preparation. One process at a time; `commit` makes everything since the last commit durable."""

    def __init__(self, file: Path) -> None:
        """Open or create. Raises `Busy` when another process holds the file, `ValueError` when it is damaged."""
        try:
            self._db = sqlite3.connect(file, isolation_level=None, timeout=1.0, check_same_thread=False)
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA cache_size = -32768")
            self._db.executescript(_TABLES)
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise Busy(f"{file.parent.parent}: another prepare is working there") from error
            raise ValueError(f"{file.parent.parent}: its journal is damaged ({error}); prepare again with overwrite") from error

    def commit(self) -> None:
        """Make everything so far durable."""
        self._db.execute("COMMIT")
        self._db.execute("BEGIN IMMEDIATE")

    def close(self) -> None:
        """Forget what was not committed, and release the file."""
        self._db.close()

    def get(self, name: str, default: Any = None) -> Any:
        """Return a stored JSON value."""
        row = self._db.execute("SELECT value FROM state WHERE name = ?", (name,)).fetchone()
        return default if row is None else json.loads(row[0])

    def set(self, **values: Any) -> None:
        """Store JSON values by name."""
        self._db.executemany("INSERT OR REPLACE INTO state VALUES (?, ?)", [(k, json.dumps(v, sort_keys=True)) for k, v in values.items()])

    def knows(self, sha: bytes) -> bool:
        """Tell whether a document with this text was already added."""
        return self._db.execute("SELECT 1 FROM documents WHERE sha = ?", (sha,)).fetchone() is not None

    def add(self, document: Seen) -> None:
        """Record a new document."""
        self._db.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?)", document)

    def add_encoded(self, rows: Iterable[Encoded]) -> None:
        """Record the tokens of documents."""
        self._db.executemany("INSERT INTO encoded VALUES (?, ?, ?, ?)", rows)

    def documents(self, after: int = -1) -> Iterator[Seen]:
        """Yield the documents with a number above `after`, in order."""
        yield from map(Seen._make, self._db.execute("SELECT * FROM documents WHERE number > ? ORDER BY number", (after,)))

    def is_empty(self) -> bool:
        """Tell whether no document was added yet."""
        return next(self.documents(), None) is None

    def last_encoded(self) -> tuple[int, int]:
        """Return the number of the last encoded document (-1 when none) and the length of the token spool, in tokens."""
        row = self._db.execute("SELECT number, offset + tokens FROM encoded ORDER BY number DESC LIMIT 1").fetchone()
        return row or (-1, 0)

    def by_content(self, source: int, split: str = "train") -> Iterator[tuple[Seen, int]]:
        """Yield a source's documents of one split, ordered by the hash of their text, with their number of tokens (0 before encoding)."""
        query = """SELECT d.*, coalesce(e.tokens, 0) FROM documents d LEFT JOIN encoded e USING (number)
            WHERE d.source = ? AND d.split = ? ORDER BY d.sha"""
        for row in self._db.execute(query, (source, split)):
            yield Seen._make(row[:-1]), row[-1]

    def totals(self) -> Iterator[tuple[int, str, int, int, int]]:
        """Yield (source, split, documents, bytes, tokens) over all documents."""
        query = """SELECT d.source, d.split, count(*), sum(d.bytes), coalesce(sum(e.tokens), 0) FROM documents d LEFT JOIN encoded e
            USING (number) GROUP BY d.source, d.split ORDER BY d.source, d.split"""
        yield from self._db.execute(query)

    def kept(self, split: str, cutoffs: dict[int, bytes]) -> Iterator[tuple[Seen, Encoded]]:
        """Yield a split's documents in order; in `train`, a source in `cutoffs` keeps those whose text hash is not above its cutoff."""
        query = """SELECT d.*, e.* FROM documents d JOIN encoded e USING (number) WHERE d.split = ? ORDER BY d.number"""
        for row in self._db.execute(query, (split,)):
            document = Seen._make(row[:8])
            if split != "train" or document.source not in cutoffs or document.sha <= cutoffs[document.source]:
                yield document, Encoded._make(row[8:])

    def shard(self, split: str, number: int) -> tuple[int, str] | None:
        """Return (tokens, sha256) of a finished shard."""
        query = "SELECT tokens, sha FROM shards WHERE split = ? AND number = ?"
        row: tuple[int, str] | None = self._db.execute(query, (split, number)).fetchone()
        return row

    def add_shard(self, split: str, number: int, tokens: int, sha: str) -> None:
        """Record a finished shard."""
        self._db.execute("INSERT INTO shards VALUES (?, ?, ?, ?)", (split, number, tokens, sha))
