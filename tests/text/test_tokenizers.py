import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import Build, contents, sentences

from pathlm.text import tokenizers as tk

SAMPLE = [sentences(seed, 60) for seed in range(8)]
BPE = tk.train_bpe(SAMPLE, 400)
CHARACTERS = tk.train_characters(SAMPLE, 60)
HARD = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab9's ,.\n\r\t\x0b\x1c\x85\xa0\u2003\u2028\u3000。，水流")),
    max_size=60,
)


def library(text: str) -> list[int]:
    """Encode the whole text in one call of the tokenizers library."""
    return BPE.backend.encode(text, add_special_tokens=False).ids


@settings(deadline=None, max_examples=400)
@given(HARD)
def test_bpe_round_trips_every_text(text: str) -> None:
    ids, counts = BPE.encode([text])
    assert counts.tolist() == [len(ids)]
    assert BPE.backend.decode(ids.tolist(), skip_special_tokens=False) == text


@settings(deadline=None, max_examples=400)
@given(st.lists(HARD, min_size=1, max_size=4))
def test_remembered_chunks_have_the_tokens_of_the_library(texts: list[str]) -> None:
    ids, counts = BPE._known.encode(texts)
    assert ids.tolist() == [number for text in texts for number in library(text)]
    assert counts.tolist() == [len(library(text)) for text in texts]


@settings(deadline=None, max_examples=300)
@given(st.lists(HARD, max_size=8), st.integers(1, 12))
def test_a_text_encoded_in_parts_has_the_tokens_of_the_whole(pieces: list[str], size: int) -> None:
    parts = list(tk.cut(pieces, size))
    assert "".join(parts) == "".join(pieces)
    assert [number for part in parts for number in library(part)] == library("".join(pieces))


def test_cutting_bounds_the_parts_of_ordinary_text() -> None:
    for text in ("\n".join(SAMPLE), "水流山高。月小，" * 500):
        parts = list(tk.cut([text], 100))
        assert max(map(len, parts)) < 200 and len(parts) > 10
    assert [len(part) for part in tk.cut(["abcd" * 5], 7, anywhere=True)] == [7, 7, 6]


def test_when_the_memory_of_chunks_is_full_the_tokens_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tk, "_KNOWN_CHUNKS", 50)
    chunks = tk._KnownChunks(BPE.backend)
    for text in SAMPLE:
        assert chunks.encode([text])[0].tolist() == library(text)
    assert 0 < len(chunks._known) <= 50


def test_text_whose_chunks_never_come_back_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tk, "_TRIAL_CHARACTERS", 1000)
    repeating, varied = tk._KnownChunks(BPE.backend), tk._KnownChunks(BPE.backend)
    repeating.encode(["the same words again " * 100])
    varied.encode([" ".join(str(number) for number in range(1000))])
    assert repeating.worthwhile and not varied.worthwhile


@pytest.mark.parametrize("encoder", [BPE, CHARACTERS], ids=["bpe", "characters"])
def test_special_tokens_written_in_a_text_are_ordinary_text(encoder: tk.Encoder) -> None:
    ids, _ = encoder.encode(["a<|endoftext|>b<|pad|>"])
    assert not {encoder.eos, encoder.pad} & set(ids.tolist())


def test_characters_keep_the_most_frequent_and_ties_follow_code_points() -> None:
    encoder = tk.train_characters(["ccc bb ed", "水"], 3 + 4)
    assert [encoder.backend.id_to_token(number) for number in range(7)] == ["<|endoftext|>", "<|pad|>", "<|unk|>", "c", " ", "b", "d"]


@settings(deadline=None, max_examples=200)
@given(st.lists(HARD, min_size=1, max_size=3))
def test_the_character_table_has_the_tokens_of_the_library(texts: list[str]) -> None:
    ids, counts = CHARACTERS.encode(texts)
    wanted = [CHARACTERS.backend.encode(text, add_special_tokens=False).ids for text in texts]
    assert ids.tolist() == [number for row in wanted for number in row]
    assert counts.tolist() == [len(text) for text in texts]


def test_characters_round_trip_what_they_know() -> None:
    counts = Counter("".join(SAMPLE))
    known = {character for character, _ in counts.most_common(40)}
    text = re.sub(f"[^{re.escape(''.join(known))}]", "", SAMPLE[3])
    ids, _ = CHARACTERS.encode([text])
    assert CHARACTERS.backend.decode(ids.tolist()) == text


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_the_saved_tokenizer_opens_in_transformers_and_agrees(build: Build, texts: Path, kind: str) -> None:
    corpus = build(texts, tokenizer=kind)
    tokenizer = corpus.tokenizer()
    assert len(tokenizer) == corpus.vocab_size <= 300
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|pad|>")
    assert tokenizer.unk_token == ("<|unk|>" if kind == "characters" else None)
    text = "The river of May 水流  stands.\n\n 42 sacks"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == (text if kind == "bpe" else tokenizer.decode(ids))
    document = next(iter(corpus.documents("train")))
    stored = corpus.document_tokens("train", 0)[1:-1]
    assert tokenizer(tokenizer.decode(stored))["input_ids"] == stored.tolist(), document.id


def test_a_hugging_face_tokenizer_is_used_as_it_is(build: Build, texts: Path) -> None:
    first = build(texts, out="first", vocab_size=350)
    again = build(texts, out="again", tokenizer=str(first.folder / "tokenizer"))
    assert again.manifest["tokenizer"]["kind"] == "pretrained"
    for split in first.splits:
        np.testing.assert_array_equal(first.tokens(split)[:], again.tokens(split)[:])
    assert again.tokenizer().get_vocab() == first.tokenizer().get_vocab()


def test_a_tokenizer_that_splits_otherwise_is_left_to_the_library(build: Build, texts: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.train_from_iterator(SAMPLE, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(str(tmp_path / "other"))
    corpus = build(texts, tokenizer=str(tmp_path / "other"))
    assert not tk.load_pretrained(str(tmp_path / "other")).splits_long_text
    assert corpus.manifest["tokenizer"]["pad"] is None
    document = corpus.documents("train")[0]
    text = (texts.parent / document.id).read_text(encoding="utf-8")
    assert corpus.document_tokens("train", 0).tolist() == [0, *backend.encode(text, add_special_tokens=False).ids, 1]
    from pathlm.text.rows import PADDING, PackedRows

    last = PackedRows(corpus, "train", length=4096, seed=0, shuffle=False)
    batch = last.batch(last.rows_per_epoch - 1, 1)
    assert set(batch["input_ids"][batch["document_ids"] == PADDING].tolist()) <= {1}, "the end token stands for padding"


def test_a_tokenizer_without_an_end_token_is_refused(build: Build, texts: Path, tmp_path: Path) -> None:
    first = build(texts, out="first")
    folder = tmp_path / "endless"
    first.tokenizer().save_pretrained(str(folder))
    table = json.loads((folder / "tokenizer_config.json").read_text())
    table["eos_token"] = None
    (folder / "tokenizer_config.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="has no end-of-text token"):
        build(texts, out="again", tokenizer=str(folder))


def test_training_sees_the_train_split_only(build: Build, tmp_path: Path) -> None:
    rows = [{"text": f"{sentences(n, 2)} {chr(0x4E00 + n)}"} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    corpus = build(tmp_path / "rows.jsonl", tokenizer="characters", vocab_size=500, validation=0.2, test=0.2)
    known = set(corpus.tokenizer().get_vocab())
    unseen = 0
    for split in corpus.splits:
        for document in corpus.documents(split):
            character = chr(0x4E00 + int(document.id.rpartition(":")[2]) - 1)
            assert (character in known) == (split == "train")
            unseen += character not in known
    assert unseen > 10


def test_training_leaves_out_further_clauses_when_it_has_seen_enough_distinct_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tk, "_DISTINCT_BYTES", 20)
    texts = ["水流水流", "水流水流", "plain", "山高月小山高", "水流水流", "plain too"]
    assert list(tk._few_words(texts)) == ["水流水流", "水流水流", "plain", "山高月小山高", "plain too"]


def test_the_sample_for_training_is_capped_and_fixed(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": sentences(n, 20)}) for n in range(80)))
    seen: list[str] = []
    train = tk.train_bpe

    def spy(texts: object, vocab_size: int) -> tk.Encoder:
        seen.append("".join(kept := list(texts)))
        return train(kept, vocab_size)

    monkeypatch.setattr(tk, "train_bpe", spy)
    one = build(tmp_path / "rows.jsonl", out="one", tokenizer_sample_mb=0.01)
    two = build(tmp_path / "rows.jsonl", out="two", tokenizer_sample_mb=0.01)
    assert seen[0] == seen[1] and 9_900 < len(seen[0].encode()) <= 10_000
    assert contents(one.folder) == contents(two.folder)
