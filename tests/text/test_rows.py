from pathlib import Path

import numpy as np
import pytest
from texts import Build

from pathlm.text.corpus import Corpus
from pathlm.text.rows import IGNORE, PADDING, PackedRows, permute


@pytest.fixture
def corpus(build: Build, texts: Path) -> Corpus:
    return build(texts, shard_tokens=777)


def reference(corpus: Corpus, split: str, length: int, row: int) -> dict[str, list[int]]:
    """Cut one row out of the documents, one token at a time."""
    flat = [(token, d.number) for d in corpus.documents(split) for token in corpus.document_tokens(split, d.number).tolist()]
    cut = flat[row * length : (row + 1) * length]
    cut += [(corpus.manifest["tokenizer"]["pad"], PADDING)] * (length - len(cut))
    labels = [
        IGNORE if number == PADDING or place == 0 or cut[place - 1][1] != number else token for place, (token, number) in enumerate(cut)
    ]
    return {"input_ids": [token for token, _ in cut], "labels": labels, "document_ids": [number for _, number in cut]}


@pytest.mark.parametrize("length", [2, 3, 64, 5000])
def test_rows_are_what_a_loop_over_tokens_cuts(corpus: Corpus, length: int) -> None:
    rows = PackedRows(corpus, "validation", length=length, seed=0, shuffle=False)
    batch = rows.batch(0, rows.rows_per_epoch)
    for row in range(0, rows.rows_per_epoch, 1 + rows.rows_per_epoch // 12):
        for name, values in reference(corpus, "validation", length, row).items():
            assert batch[name][row].tolist() == values, (name, row)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_token_is_used_exactly_once_per_epoch(corpus: Corpus, shuffle: bool) -> None:
    rows = PackedRows(corpus, "train", length=50, seed=3, shuffle=shuffle)
    for epoch in range(3):
        batch = rows.batch(epoch * rows.rows_per_epoch, rows.rows_per_epoch)
        real = batch["document_ids"] != PADDING
        assert real.sum() == len(corpus.tokens("train"))
        order = np.lexsort((batch["input_ids"][real], batch["document_ids"][real]))
        found = np.stack([batch["document_ids"][real][order], batch["input_ids"][real][order]])
        whole = [np.sort(corpus.document_tokens("train", d.number)) for d in corpus.documents("train")]
        np.testing.assert_array_equal(found[1], np.concatenate(whole))
        np.testing.assert_array_equal(found[0], np.repeat(np.arange(len(whole)), [len(tokens) for tokens in whole]))


def test_a_batch_depends_on_its_place_only(corpus: Corpus) -> None:
    rows = PackedRows(corpus, "train", length=40, seed=5)
    many = rows.batch(0, 3 * rows.rows_per_epoch)
    for start, count in ((2 * rows.rows_per_epoch - 3, 7), (0, 1), (rows.rows_per_epoch, 5)):
        few = PackedRows(corpus, "train", length=40, seed=5).batch(start, count)
        for name in many:
            assert few[name].dtype == np.int64
            np.testing.assert_array_equal(few[name], many[name][start : start + count])


def test_epochs_and_seeds_have_different_orders(corpus: Corpus) -> None:
    rows = PackedRows(corpus, "train", length=40, seed=5)
    n = rows.rows_per_epoch
    orders = [rows.batch(start, n)["input_ids"].tobytes() for start in (0, n, 2 * n)]
    orders.append(PackedRows(corpus, "train", length=40, seed=6).batch(0, n)["input_ids"].tobytes())
    orders.append(PackedRows(corpus, "train", length=40, seed=6, shuffle=False).batch(0, n)["input_ids"].tobytes())
    assert len(set(orders)) == 5


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 5000])
def test_the_shuffle_is_a_permutation(size: int) -> None:
    for key in range(5):
        assert np.sort(permute(np.arange(size), size, key=key)).tolist() == list(range(size))


def test_the_shuffle_is_even() -> None:
    places = np.stack([permute(np.arange(40), 40, key=key) for key in range(1500)])
    counts = np.stack([np.bincount(places[:, place], minlength=40) for place in range(40)])
    expected = 1500 / 40
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 1300 < chi_square < 1750, "1521 degrees of freedom"
    neighbours = (np.abs(np.diff(places, axis=1)) == 1).mean()
    assert abs(neighbours - 2 / 40) < 0.006


def test_the_documents_of_a_batch_can_be_named(corpus: Corpus) -> None:
    rows = PackedRows(corpus, "train", length=64, seed=0)
    batch = rows.batch(0, 2)
    numbers = sorted(set(batch["document_ids"].ravel().tolist()) - {PADDING})
    assert rows.describe(batch) == [corpus.documents("train")[number].id for number in numbers]
    assert len(rows.tokenizer()) == rows.vocab_size == corpus.vocab_size


def test_rows_that_cannot_be_cut_are_refused(corpus: Corpus, build: Build, texts: Path) -> None:
    with pytest.raises(ValueError, match="length=1: a row needs at least 2"):
        PackedRows(corpus, "train", length=1, seed=0)
    with pytest.raises(ValueError, match=r"split='dev'.*has train, validation, test"):
        PackedRows(corpus, "dev", length=8, seed=0)
    with pytest.raises(ValueError, match="rows -1 to 0"):
        PackedRows(corpus, "train", length=8, seed=0).batch(-1, 2)
    empty = build(texts, out="no-test", test=0.0)
    with pytest.raises(ValueError, match=r"split='test' of .* has no documents"):
        PackedRows(empty, "test", length=8, seed=0)
