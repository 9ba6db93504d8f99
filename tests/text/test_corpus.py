import json
from pathlib import Path

import pytest
from texts import Build

from pathlm.text.corpus import Corpus


def test_records_come_in_order_and_by_number(build: Build, texts: Path) -> None:
    corpus = build(texts)
    documents = corpus.documents("train")
    listed = list(documents)
    assert [documents[number] for number in range(len(documents))] == listed == documents[:]
    assert documents[-1] == listed[-1]
    start = 0
    for number, document in enumerate(listed):
        assert (document.number, document.start, document.split, document.source) == (number, start, "train", "texts")
        start += document.tokens
    assert start == len(corpus.tokens("train")) == corpus.manifest["splits"]["train"]["tokens"]
    with pytest.raises(IndexError, match="there are"):
        documents[len(documents)]
    with pytest.raises(IndexError, match="there are"):
        corpus.document_tokens("train", len(documents))


@pytest.mark.parametrize("name", ["train/00000.bin", "test/documents.jsonl", "validation/index.bin", "tokenizer/tokenizer.json"])
def test_a_truncated_file_is_named_before_anything_is_read(build: Build, texts: Path, name: str) -> None:
    file = build(texts).folder / name
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=rf"{name} has \d+ bytes, but the manifest says \d+: it is truncated"):
        Corpus.open(file.parent.parent, verify=False)


@pytest.mark.parametrize("name", ["train/00000.bin", "test/documents.jsonl", "validation/index.bin", "tokenizer/tokenizer.json"])
def test_a_changed_byte_is_noticed(build: Build, texts: Path, name: str) -> None:
    file = build(texts).folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} has sha256 .* its content changed"):
        Corpus.open(file.parent.parent)


def test_a_missing_shard_is_named(build: Build, texts: Path) -> None:
    corpus = build(texts)
    (corpus.folder / "train" / "00000.bin").unlink()
    with pytest.raises(ValueError, match=r"train/00000\.bin is missing"):
        Corpus.open(corpus.folder)


def test_a_folder_that_is_no_corpus_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no manifest\.json.*make it with `pathlm prepare`"):
        Corpus.open(tmp_path)
    (tmp_path / ".work").mkdir()
    with pytest.raises(ValueError, match="was not finished; run the same prepare again"):
        Corpus.open(tmp_path)


def test_a_changed_manifest_is_refused(build: Build, texts: Path) -> None:
    file = build(texts).folder / "manifest.json"
    table = json.loads(file.read_text())
    for change, message in (
        ({"format": 99}, "format 99, this version reads 1"),
        ({"dtype": "uint32"}, "was changed"),
        ({"surprise": 1}, "lacks or misspells a field"),
    ):
        file.write_text(json.dumps(table | change))
        with pytest.raises(ValueError, match=message):
            Corpus.open(file.parent)
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Corpus.open(file.parent)


def test_a_vocabulary_larger_than_the_dtype_is_refused(build: Build, texts: Path) -> None:
    corpus = build(texts)
    table = json.loads((corpus.folder / "manifest.json").read_text())
    table["tokenizer"]["vocab_size"] = 70_000
    (corpus.folder / "manifest.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="holds ids up to 65535, but the vocabulary has 70000"):
        Corpus.open(corpus.folder)


def test_wide_ids_are_stored_in_four_bytes(build: Build, texts: Path) -> None:
    narrow, wide = build(texts, out="narrow"), build(texts, out="wide", dtype="uint32")
    assert (narrow.record.dtype, wide.record.dtype) == ("uint16", "uint32")
    assert wide.tokens("train")[:].tolist() == narrow.tokens("train")[:].tolist()
    sizes = [(c.folder / "train" / "00000.bin").stat().st_size for c in (narrow, wide)]
    assert sizes[1] == 2 * sizes[0]


def test_tokens_are_read_without_a_step(build: Build, texts: Path) -> None:
    tokens = build(texts).tokens("train")
    assert len(tokens[5:5]) == 0 and len(tokens[len(tokens) - 2 : len(tokens) + 5]) == 2
    with pytest.raises(ValueError, match="step=2"):
        tokens[::2]
