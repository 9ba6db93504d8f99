import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from texts import Build, contents, sentences

from pathlm.text import collect, encode
from pathlm.text.collect import split_of
from pathlm.text.corpus import Corpus
from pathlm.text.prepare import from_arguments, load_recipe, prepare, prepare_config


def test_every_document_is_its_text_between_two_end_tokens(build: Build, texts: Path) -> None:
    corpus = build(texts)
    tokenizer = corpus.tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    files = {f"texts/{f.relative_to(texts).as_posix()}": f.read_text(encoding="utf-8") for f in texts.rglob("*.txt")}
    seen = 0
    for split in corpus.splits:
        for document in corpus.documents(split):
            ids = corpus.document_tokens(split, document.number)
            text = tokenizer.decode(ids[1:-1])
            assert ids[0] == ids[-1] == end
            assert hashlib.sha256(text.encode()).hexdigest() == document.sha256_text
            assert hashlib.sha256(ids.astype("<u2").tobytes()).hexdigest() == document.sha256_tokens
            assert (document.tokens, document.bytes, document.characters) == (len(ids), len(text.encode()), len(text))
            assert files.get(document.id, text) == text
            seen += 1
    assert seen == 48 + 28


def test_repeated_and_empty_documents_are_dropped_and_counted(build: Build, texts: Path) -> None:
    (texts / "empty.txt").write_text("")
    corpus = build(texts)
    (source,) = corpus.manifest["sources"]
    assert source["dropped"] == {"empty": 1, "repeated": 2}
    hashes = [document.sha256_text for split in corpus.splits for document in corpus.documents(split)]
    assert len(set(hashes)) == len(hashes) == source["unique"]["documents"]


@pytest.mark.parametrize("workers", [2, 5])
def test_workers_and_piece_sizes_change_no_byte(build: Build, texts: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (texts / "long.txt").write_text(sentences(9, 4000), encoding="utf-8")
    one = build(texts, out="one")
    monkeypatch.setattr(encode, "TASK_BYTES", 700)
    monkeypatch.setattr(encode, "PART_CHARACTERS", 1500)
    monkeypatch.setattr(encode, "COMMIT_BYTES", 900)
    monkeypatch.setattr(collect, "COMMIT_DOCUMENTS", 3)
    many = build(texts, out="many", workers=workers)
    assert contents(one.folder) == contents(many.folder)


def test_the_order_in_which_the_system_lists_files_changes_no_byte(build: Build, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = build(texts, out="one")
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(listed(self, pattern), key=lambda f: f.name[::-1], reverse=True))
    assert contents(one.folder) == contents(build(texts, out="two").folder)


def test_the_same_text_elsewhere_has_the_same_digest(build: Build, texts: Path, tmp_path: Path) -> None:
    one = build(texts, out="one")
    (tmp_path / "moved").mkdir()
    moved = texts.rename(tmp_path / "moved" / "texts")
    two = build(moved, out="two")
    assert one.record.digest == two.record.digest


def test_a_growing_source_moves_no_document_to_another_split(build: Build, texts: Path) -> None:
    before = build(texts, out="before", validation=0.2, test=0.2)
    for number in range(20):
        (texts / f"a-new-story-{number}.txt").write_text(sentences(900 + number, 4), encoding="utf-8")
    rows = (texts / "rows.jsonl").read_text().splitlines()
    (texts / "rows.jsonl").write_text("\n".join([json.dumps({"text": "A new first row."}), *rows]) + "\n")
    after = build(texts, out="after", validation=0.2, test=0.2)
    places = [{d.sha256_text: d.split for split in c.splits for d in c.documents(split)} for c in (before, after)]
    assert len(places[0]) == 76 and len(places[1]) == 97
    assert places[0].items() <= places[1].items()
    assert set(places[0].values()) == {"train", "validation", "test"}


def test_splits_have_about_the_wanted_shares() -> None:
    found = [split_of(str(number), validation=0.05, test=0.05) for number in range(20_000)]
    assert abs(found.count("test") / 20_000 - 0.05) < 0.006
    assert abs(found.count("validation") / 20_000 - 0.05) < 0.006


def test_sources_mix_by_share_of_training_tokens(build: Build, tmp_path: Path) -> None:
    for name, count, size in (("long", 60, 40), ("short", 200, 2), ("medium", 80, 10)):
        rows = [json.dumps({"text": sentences(hash((count, n)) % 10**6, size)}) for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    shares = {"long": 0.5, "short": 0.2, "medium": 0.3}
    corpus = build(*(f"{tmp_path}/{name}.jsonl={share}" for name, share in shares.items()))
    train = corpus.record.splits["train"]["tokens"]
    largest = max(d.tokens for d in corpus.documents("train"))
    complete = 0
    for source in corpus.manifest["sources"]:
        declared = shares[source["source"]]
        assert source["declared_share"] == pytest.approx(declared)
        assert abs(source["realised_share"] - declared) * train <= largest
        assert source["realised_share"] == source["tokens"]["train"] / train
        complete += sum(source["tokens"].values()) == source["unique"]["tokens"]
    assert complete == 1, "exactly the scarcest source is used up"
    ids = [d.id for d in corpus.documents("train")]
    assert len(set(ids)) == len(ids)


def test_a_source_without_training_text_cannot_have_a_share(build: Build, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Some text to train on.")
    (tmp_path / "b.txt").write_text("Some text to train on.")
    with pytest.raises(ValueError, match="sources b declare a share but have no document"):
        build(f"{tmp_path}/a.txt=0.5", f"{tmp_path}/b.txt=0.5", validation=0.0, test=0.0)


def test_a_finished_corpus_is_returned_at_once(build: Build, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = build(texts)
    before = {f: f.stat().st_mtime_ns for f in corpus.folder.rglob("*")}
    monkeypatch.setattr("pathlm.text.prepare.collect", None)
    assert build(texts, workers=2).record == corpus.record
    assert before == {f: f.stat().st_mtime_ns for f in corpus.folder.rglob("*")}


def test_other_settings_are_refused_with_what_differs_until_overwrite_is_asked(build: Build, texts: Path) -> None:
    build(texts)
    with pytest.raises(ValueError, match=r"test was 0\.05 and is now 0\.1; vocab_size was 300 and is now 310\. .*overwrite"):
        build(texts, vocab_size=310, test=0.1)
    assert build(texts, vocab_size=310, test=0.1, overwrite=True).vocab_size == 310


def test_changed_input_files_are_noticed(build: Build, texts: Path) -> None:
    build(texts)
    (texts / "story-01.txt").write_text("Another text.")
    with pytest.raises(ValueError, match=r"'story-01\.txt' among them, since it was prepared"):
        build(texts)
    assert build(texts, overwrite=True).record.splits


def test_a_folder_with_other_files_is_never_touched(build: Build, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds files that prepare did not write"):
        build(texts, overwrite=True)
    assert (tmp_path / "corpus" / "thesis.tex").read_text() == "precious"


def test_shards_are_cut_at_the_wanted_size_and_read_as_one_stream(build: Build, texts: Path) -> None:
    small, large = build(texts, out="small", shard_tokens=1000), build(texts, out="large")
    shards = small.record.splits["train"]["shards"]
    assert len(shards) > 5 and {shard["tokens"] for shard in shards[:-1]} == {1000}
    np.testing.assert_array_equal(small.tokens("train")[:], large.tokens("train")[:])
    np.testing.assert_array_equal(small.tokens("train")[995:3010], large.tokens("train")[:][995:3010])


def test_progress_is_reported_for_every_phase_and_reaches_its_total(texts: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int | None]] = []
    prepare(
        prepare_config({"out": str(tmp_path / "c"), "sources": [str(texts)], "vocab_size": 300}), progress=lambda *call: calls.append(call)
    )
    last = {phase: (done, total) for phase, done, total in calls}
    assert list(last) == ["read", "tokenizer", "encode", "write"]
    assert all(done == total for done, total in last.values())


def test_a_rich_progress_bar_can_be_given(texts: Path, tmp_path: Path) -> None:
    from rich.console import Console

    from pathlm.text.progress import bar

    with (tmp_path / "log").open("w") as file, bar(Console(file=file, force_terminal=True, width=120)) as progress:
        prepare(prepare_config({"out": str(tmp_path / "c"), "sources": [str(texts)], "vocab_size": 300}), progress=progress)
        assert [task.description for task in progress.tasks] == ["Reading text", "Training tokenizer", "Encoding", "Writing shards"]
        assert all(task.finished for task in progress.tasks)


def test_a_recipe_is_read_and_its_typos_are_errors(tmp_path: Path) -> None:
    recipe = tmp_path / "data-mix.toml"
    recipe.write_text('vocab_size = 512\nsources = ["sotu=1", { path = "x/*.txt", share = 2, label = "x" }]\n')
    config = load_recipe(recipe, workers=3)
    assert (config.out, config.workers, config.sources[1].share, config.sources[0].name) == ("data/mix", 3, 2.0, "sotu")
    recipe.write_text('vocab = 512\nsources = ["sotu"]\n')
    with pytest.raises(ValueError, match="PrepareConfig has no option vocab"):
        load_recipe(recipe)
    recipe.write_text('sources = [{ nam = "sotu" }]\n')
    with pytest.raises(ValueError, match=r"SourceConfig has no option sources\.nam"):
        load_recipe(recipe)


def test_what_a_recipe_says_is_replaced_or_taken_back(tmp_path: Path) -> None:
    recipe = tmp_path / "data-mix.toml"
    recipe.write_text('vocab_size = 512\ntest = 0.2\nsources = ["sotu"]\n')
    config = from_arguments([str(recipe)], ["test=", "validation=0.1"], vocab_size=600)
    assert (config.out, config.vocab_size, config.test, config.validation) == ("data/mix", 600, 0.05, 0.1)
    with pytest.raises(ValueError, match="--set 'validation=': takes back what a recipe says of validation, but it says nothing"):
        from_arguments([str(recipe)], ["validation="])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 257}, "vocab_size=257: tokenizer = 'bpe' needs at least 258"),
        ({"vocab_size": 70_000, "dtype": "uint16"}, "dtype='uint16' holds ids up to 65535, but the vocabulary has 70000"),
        ({"sources": []}, "sources=.*name at least one"),
        ({"sources": ["sotu", "sotu"]}, "give one of them a label"),
        ({"sources": ["sotu=0.5", "tang"]}, "either every source declares a share or none does"),
        ({"sources": ["nosuch"]}, "source 'nosuch' is neither a named corpus"),
        ({"sources": [{"name": "nosuch"}]}, "name='nosuch': the named corpora are sotu"),
        ({"sources": [{"name": "sotu", "path": "x"}]}, "exactly one of name, path and hub, but has name, path"),
        ({"sources": ["sotu=0"]}, "must be positive"),
        ({"validation": 0.6, "test": 0.4}, "must leave text for training"),
        ({"tokenizer": "no/such/folder"}, "neither bpe, characters nor a Hugging Face tokenizer"),
        ({"dtype": "int8"}, "dtype"),
        ({"sources": ["missing/*.txt"]}, "no txt, jsonl or parquet file there"),
    ],
)
def test_bad_settings_are_refused_before_any_work(options: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=message):
        prepare(prepare_config({"out": str(tmp_path / "c"), "sources": ["sotu"]} | options))
    assert not (tmp_path / "c").exists()


def test_an_empty_corpus_is_an_error(build: Build, tmp_path: Path) -> None:
    (tmp_path / "nothing.txt").write_text("")
    with pytest.raises(ValueError, match="the corpus is empty"):
        build(tmp_path / "nothing.txt")
    (tmp_path / "nothing.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="source 'nothing' is empty: it holds no document"):
        build(tmp_path / "nothing.jsonl", out="other")


def test_two_processes_cannot_prepare_one_folder_at_once(build: Build, texts: Path, tmp_path: Path) -> None:
    from pathlm.text.journal import Journal

    (tmp_path / "corpus" / ".work").mkdir(parents=True)
    journal = Journal(tmp_path / "corpus" / ".work" / "journal.sqlite")
    with pytest.raises(ValueError, match="another prepare is working there"):
        build(texts, overwrite=True)
    journal.close()
    assert build(texts).record.splits


def test_a_full_run_needs_no_more_open_files_than_it_closes(build: Build, texts: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    corpus = build(texts)
    assert isinstance(corpus, Corpus)
    del corpus
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("harm", ["truncated", "gone", "changed"])
def test_a_damaged_corpus_is_named_and_made_again_with_overwrite(build: Build, texts: Path, harm: str) -> None:
    corpus = build(texts)
    shard = corpus.folder / "train" / "00000.bin"
    whole = shard.read_bytes()
    damaged = {"truncated": whole[:-2], "changed": whole[:-1] + bytes([whole[-1] ^ 1])}
    shard.unlink() if harm == "gone" else shard.write_bytes(damaged[harm])
    if harm != "changed":  # a size is looked at every time, a hash where it is asked for
        with pytest.raises(ValueError, match=r"train/00000\.bin"):
            build(texts)
    build(texts, overwrite=True)
    assert shard.read_bytes() == whole


def test_a_prepare_that_failed_before_its_first_document_does_not_hold_its_folder(tmp_path: Path, texts: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    out = str(tmp_path / "corpus")
    for made in (False, True):
        with pytest.raises(ValueError, match="empty"):
            prepare(prepare_config({"sources": [str(tmp_path / "empty.txt")], "out": out, "vocab_size": 300}))
        assert Path(out).exists() == made, "a folder that was there stays"
        Path(out).mkdir(exist_ok=True)
        assert list(Path(out).iterdir()) == []
    assert prepare(prepare_config({"sources": [str(texts)], "out": out, "vocab_size": 300})).splits
