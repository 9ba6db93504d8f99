import json
from pathlib import Path

import pytest
from texts import Build, sentences

from pathlm.text.corpus import Corpus
from pathlm.text.prepare import prepare, prepare_config


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with txt, jsonl and (in a subfolder) more txt files: 48 + 30 documents, two of them repeated."""
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    for number in range(48):
        place = folder / "deeper" if number % 3 == 0 else folder
        (place / f"story-{number:02d}.txt").write_text(sentences(number, 5 + number % 7), encoding="utf-8", newline="")
    rows = [{"text": sentences(100 + number, 3), "name": f"row-{number}"} for number in range(28)]
    rows += [{"text": sentences(100, 3), "name": "again"}, {"text": sentences(7, 5 + 7 % 7), "name": "a story again"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Prepare a corpus from options and open it."""

    def build(*sources: object, out: str = "corpus", **options: object) -> Corpus:
        listed = [str(source) if isinstance(source, Path) else source for source in sources]
        prepare(prepare_config({"out": str(tmp_path / out), "sources": listed, "vocab_size": 300, "workers": 1} | options))
        return Corpus.open(tmp_path / out)

    return build
