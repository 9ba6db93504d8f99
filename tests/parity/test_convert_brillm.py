"""Released BriLLM files become folders of ours and files again; what is wrong with them is said in one line, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from released import FOLDER, SHARED, expected, model, needs_fixture
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import pathlm
from pathlm.cli import app
from pathlm.generate import run
from pathlm.models.brillm import released
from pathlm.models.brillm.convert import FILES, export_released, from_brillm, import_released
from pathlm.models.brillm.edges import Edges

pytestmark = needs_fixture
ENGLISH = SHARED / "brillm" / "wiki_bpe_tokenizer_4000_bytelevel.json"


def files(folder: Path = FOLDER) -> list[Path]:
    return [folder / name for name in FILES]


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="pathlm")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def check_files(tmp_path: Path, vocabulary: dict[str, int], width: int = 4) -> list[Path]:
    """The files of a model of this vocabulary whose edges are few."""
    nodes = len(vocabulary)
    edges = Edges.even(nodes * 2, nodes)
    torch.save(
        {
            "weights": torch.randn(nodes * 2 + 1, width, width),
            "biases": torch.randn(nodes * 2 + 1, 1, width),
            "node_bias": torch.randn(nodes, 1, width),
            "positions": torch.ones(1, 16, 1),
        },
        tmp_path / "model.bin",
    )
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with (tmp_path / "word_frequency.json").open("w", encoding="utf-8") as out:
        for source, name in enumerate(vocabulary):
            own = set(edges.targets(source).tolist())
            counts = {target: int(number in own) for target, number in vocabulary.items()}
            out.write(("{" if source == 0 else ", ") + json.dumps(name) + ": " + json.dumps(counts))
        out.write("}")
    return files(tmp_path)


def test_a_released_model_is_imported_with_every_number_in_its_place() -> None:
    mine, theirs = from_brillm(*files()).state_dict(), model().state_dict()
    assert pathlm.from_brillm is from_brillm and mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_imported_and_exported_it_has_the_same_bits_again(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(released, "SLAB", 2_000)  # a few rows at a time
    monkeypatch.setattr(released, "CHUNK", 700)  # less than one source
    given = torch.load(FOLDER / "model.bin", weights_only=True)
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    given["weights"][3, 0, 0] = -0.0
    torch.save(given, tmp_path / "given.bin")
    done = command("convert", "brillm", tmp_path / "given.bin", *files()[1:], tmp_path / "ours")
    assert (done.exit_code, done.stdout) == (0, f"wrote {tmp_path / 'ours'}\n"), done.stderr
    assert command("convert", tmp_path / "ours", tmp_path / "back", "--to", "released").exit_code == 0
    back = torch.load(tmp_path / "back" / "model.bin", weights_only=True)
    assert {name: (t.shape, t.dtype) for name, t in back.items()} == {name: (t.shape, t.dtype) for name, t in given.items()}
    assert all(bits(back[name]) == bits(given[name]) for name in given)
    assert (tmp_path / "back" / "vocab.json").read_text("utf-8") == json.dumps(
        json.loads(files()[1].read_text("utf-8")), ensure_ascii=False
    ), "in the same order, too"
    again, first = from_brillm(*files(tmp_path / "back")), from_brillm(tmp_path / "given.bin", *files()[1:])
    assert all(torch.equal(tensor, first.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert again.dtype == dtype and {path.name for path in tmp_path.iterdir()} == {"given.bin", "ours", "back"}


@torch.no_grad()
def test_the_folder_opens_as_any_other_and_on_disk_with_the_same_energies(tmp_path: Path) -> None:
    import_released(*files(), tmp_path / "ours")
    tokens, theirs = expected()["tokens"], model()
    for opened in (AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), pathlm.load(tmp_path / "ours", mmap=True)[0]):
        assert torch.equal(opened(tokens).logits, theirs(tokens).logits)
    for it in expected()["generations"]:
        prompt = torch.tensor([it["prompt"]])
        out = opened.generate(prompt, max_new_tokens=len(it["continuation"]), do_sample=False)
        assert out[0, prompt.shape[1] :].tolist() == it["continuation"]


def test_chinese_text_is_one_token_per_character_and_text_again(tmp_path: Path) -> None:
    import_released(*files(), tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer("一万与丕").input_ids == [1, 2, 3, 4] and tokenizer.decode([1, 2, 3, 4]) == "一万与丕"
    assert tokenizer("一Ω \n与").input_ids == [1, 0, 0, 0, 3]
    (text,) = run(tmp_path / "ours", ["一万与"], max_new_tokens=6, temperature=0)
    assert len(text) == 6 and run(tmp_path / "ours", ["一万与"], max_new_tokens=6, temperature=0, mmap=True) == [text]
    done = command("generate", tmp_path / "ours", "一万与", "--max-new-tokens", "6", "--temperature", "0", "--mmap")
    assert done.stdout.strip() == f"一万与{text}"


@pytest.mark.parametrize("language", ["", "_en"], ids=["Chinese", "English"])
def test_the_published_vocabularies_are_read_and_their_tokenizers_saved(tmp_path: Path, language: str) -> None:
    vocabulary = json.loads((SHARED / "brillm" / f"vocab_wiki_4k{language}.json").read_text(encoding="utf-8"))
    if language:
        text = "In frogs, the hind legs are larger"
    else:
        text = "《罗马》描述了一个城市。"
    assert released.read_vocabulary(SHARED / "brillm" / f"vocab_wiki_4k{language}.json") == tuple(vocabulary)
    # A few nodes are enough for the frequencies: the tokenizer's part needs the vocabulary alone.
    from pathlm.models.brillm.convert import _tokenizer

    made = _tokenizer(tuple(vocabulary), ENGLISH if language else None, "vocab")
    made.save_pretrained(str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == vocabulary
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == (" " if language else "") + text and tokenizer.unk_token_id not in ids
    if not language:
        assert ids == [vocabulary[character] for character in text]


def test_a_vocabulary_of_words_brings_its_tokenizer(tmp_path: Path) -> None:
    backend = json.loads(ENGLISH.read_text(encoding="utf-8"))
    words = list(backend["model"]["vocab"])[:90]
    backend["model"] |= {"vocab": {word: number for number, word in enumerate(words)}, "merges": []}
    (tmp_path / "bpe.json").write_text(json.dumps(backend), encoding="utf-8")
    given = check_files(tmp_path, backend["model"]["vocab"])
    done = command("convert", "brillm", *given, tmp_path / "ours", "--tokenizer", tmp_path / "bpe.json")
    assert done.exit_code == 0, done.stderr
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").pad_token_id == 0
    (text,) = run(tmp_path / "ours", ["frogs"], max_new_tokens=20, seed=1)
    assert text
    refused = command("convert", "brillm", *given, tmp_path / "none")
    assert "'[PAD]' is no single character; give --tokenizer" in refused.stderr
    wrong = command("convert", "brillm", *given, tmp_path / "none", "--tokenizer", ENGLISH)
    assert "has 4000 tokens for 90; it is not that of vocab=" in wrong.stderr
    none = command("convert", "brillm", *given, tmp_path / "none", "--tokenizer", given[0])
    assert "is no tokenizer's JSON file" in none.stderr and not (tmp_path / "none").exists()


Change = Callable[[dict[str, Any], dict[str, int], dict[str, dict[str, Any]]], Any]


def nan(weights: dict[str, Any], vocab: dict[str, int], counts: dict[str, dict[str, Any]]) -> None:
    weights["weights"][5, 2, 2] = torch.nan


def put(value: Any, *keys: Any) -> Change:
    """A change of one entry of the files, the first of which is 0, 1 or 2; None takes it away."""

    def change(*contents: Any) -> None:
        place = contents[keys[0]]
        for key in keys[1:-1]:
            place = place[key]
        if value is None:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value(place[keys[-1]]) if callable(value) else value

    return change


def renamed(old: str, new: str) -> Change:
    def change(weights: Any, vocab: dict[str, int], counts: Any) -> None:
        kept = {new if token == old else token: number for token, number in vocab.items()}
        vocab.clear()
        vocab.update(kept)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nan, r"model.bin': row 5 of weights, the edge '<unk>' → '亯', holds numbers that are not finite"),
        (put(torch.inf, 0, "weights", 0, 0, 0), "row 0 of weights, the shared edge, holds numbers"),
        (put(torch.nan, 0, "biases", 1, 0, 0), "row 1 of biases, the edge '<unk>' → '与', holds"),
        (put(torch.nan, 0, "node_bias", 1, 0, 0), "node_bias holds numbers that are not finite"),
        (put(lambda w: w[:-1], 0, "weights"), r"biases has shape \(\d+, 1, 8\), must be \(\d+, 1, 8\): a row for each of weights"),
        (put(lambda w: w[..., :7], 0, "weights"), r"weights has shape \(\d+, 8, 7\), must be .* a square matrix per row"),
        (put(lambda w: w.double(), 0, "biases"), "biases is torch.float64, must be floating and as weights: torch.float32"),
        (put(lambda w: w[:, 0], 0, "node_bias"), r"node_bias has shape \(48, 8\), must be \(48, 1, 8\): one for each of the 48 tokens"),
        (put(lambda w: w.flatten(), 0, "positions"), r"positions has shape \(512,\), must be \(1, 512, 1\)"),
        (put(None, 0, "positions"), "holds biases, node_bias, weights; the released layout is tensors weights, biases"),
        (put(None, 1, "佂"), r"node_bias has shape \(48, 1, 8\), must be \(47, 1, 8\): one for each of the 47 tokens of vocab="),
        (put(3, 1, "佂"), "the token '佂' has the number 3, must be 47: 0, 1, 2 … down the file, none twice"),
        (put("47", 1, "佂"), "the token '佂' has the number '47', must be 47"),
        (
            renamed("佂", "the"),
            "source '佂' is not in the vocabulary; it was counted with another one|target '佂' is not in the vocabulary",
        ),
        (put(None, 2, "一"), "word_frequency=.*: the source '一' of the vocabulary is missing"),
        (put(None, 2, "一", "万"), "the source '一': the target '万' is missing; every pair must be there, zeros included"),
        (put(1, 2, "一", "Ω"), "the source '一': the target 'Ω' is not in the vocabulary"),
        (put({}, 2, "Ω"), "the source 'Ω' is not in the vocabulary; it was counted with another one"),
        (put(-1, 2, "一", "万"), "the source '一': the count of the target '万' is -1, must be a whole number from 0"),
        (put(1.5, 2, "一", "万"), "the count of the target '万' is 1.5"),
        (put(True, 2, "一", "万"), "the count of the target '万' is True"),
        (put({"x": 1}, 2, "一", "万"), "the count of the target '万' is "),
        (put(7, 2, "一"), "is no JSON: Expecting '{' at character"),
        (put(lambda count: int(not count), 2, "一", "万"), r"weights has \d+ rows, must be \d+: the pairs that word_frequency="),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line_and_leave_nothing_behind(tmp_path: Path, change: Change, message: str) -> None:
    weights = torch.load(FOLDER / "model.bin", weights_only=True)
    vocab, counts = (json.loads(file.read_text(encoding="utf-8")) for file in files()[1:])
    change(weights, vocab, counts)
    torch.save(weights, tmp_path / "model.bin")
    for name, content in zip(FILES[1:], (vocab, counts), strict=True):
        (tmp_path / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as refused:
        import_released(*files(tmp_path), tmp_path / "ours")
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.bin", b"nothing", "model.bin': cannot be read as a state dict"),
        ("model.bin", lambda whole: whole[: len(whole) // 2], "model.bin': cannot be read as a state dict"),
        ("vocab.json", b"[1, 2]", "must be a JSON object, each token with its number"),
        ("vocab.json", b'{"a": 0, "a": 1}', "the token 'a' stands there twice"),
        ("vocab.json", b'{"a": 0, ', "vocab.json': is no JSON"),
        ("word_frequency.json", b"[]", "must be a JSON object, each source with the counts of its targets"),
        ("word_frequency.json", b"{}", "the source '<unk>' of the vocabulary is missing"),
        ("word_frequency.json", b'{"\xff": {}}', "is not UTF-8"),
        ("word_frequency.json", lambda whole: whole[: len(whole) // 2], "is no JSON: .* at character"),
        ("word_frequency.json", lambda whole: whole + b"{}", "is no JSON: Expecting the end at character"),
        ("word_frequency.json", lambda whole: whole.replace(b"0}, ", b"0} "), r"is no JSON: Expecting ',' or '}' at character"),
        ("word_frequency.json", lambda whole: b'{"<unk>": {}, ' + whole[1:], "the target '<unk>' is missing"),
    ],
)
@pytest.mark.parametrize("chunk", [50, 2**20])
def test_damaged_files_are_named(
    tmp_path: Path, name: str, content: Any, message: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(released, "CHUNK", chunk)
    for file in files():
        shutil.copyfile(file, tmp_path / file.name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content(whole) if callable(content) else content)
    with pytest.raises(ValueError, match=message):
        from_brillm(*files(tmp_path))


def test_sources_and_targets_may_come_in_any_order(tmp_path: Path) -> None:
    counts = json.loads(files()[2].read_text(encoding="utf-8"))
    turned = {source: dict(reversed(row.items())) for source, row in reversed(counts.items())}
    (tmp_path / "turned.json").write_text(json.dumps(turned), encoding="utf-8")
    mine, theirs = from_brillm(*files()[:2], tmp_path / "turned.json"), model()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in mine.state_dict().items())
    row = {"<unk>": 0} | counts["一"]
    text = json.dumps(row)[:-1] + ', "<unk>": 0}'
    (tmp_path / "twice.json").write_text(json.dumps(counts).replace(json.dumps(counts["一"]), text), encoding="utf-8")
    with pytest.raises(ValueError, match="the target '<unk>' stands there twice"):
        from_brillm(*files()[:2], tmp_path / "twice.json")


def test_a_long_file_is_read_in_pieces_and_a_mistake_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(released, "CHUNK", 1_000)
    monkeypatch.setattr(released, "LONGEST_TOKEN", 100)
    vocabulary = released.read_vocabulary(files()[1])
    read: list[int] = []
    kept = released._Reader.more

    def more(self: Any) -> None:
        kept(self)
        read.append(len(self.text))

    monkeypatch.setattr(released._Reader, "more", more)
    released.read_frequency(files()[2], vocabulary)
    assert max(read) < 2_500 < len(files()[2].read_text(encoding="utf-8"))
    whole = files()[2].read_text(encoding="utf-8")
    (tmp_path / "bad.json").write_text(whole.replace(": 0", ": ]", 1), encoding="utf-8")
    read.clear()
    with pytest.raises(ValueError, match=r"is no JSON: Expecting value at character 20"):
        released.read_frequency(tmp_path / "bad.json", vocabulary)
    assert len(read) == 1


def test_places_that_hold_something_and_options_that_say_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()  # an empty folder is a new one
    import_released(*files(), tmp_path / "ours")
    pathlm.build(pathlm.preset("brillm-tiny", vocab_size=8, edges=3, signal_size=4)).save_pretrained(tmp_path / "published")
    pathlm.build(pathlm.preset("plain-tiny", vocab_size=8, hidden_size=32, intermediate_size=8)).save_pretrained(tmp_path / "plain")
    refused = {
        ("brillm", *files(), tmp_path / "ours"): "already holds something; name a new folder",
        ("brillm", *files(), tmp_path / "x", "--wrap", "1/2/1"): "--wrap 1/2/1: a released BriLLM is converted as it is",
        ("brillm", *files(), tmp_path / "x", "--to", "llama"): "--to llama: a released BriLLM is converted as it is",
        ("brillm", *files()[:2], tmp_path / "x"): "must be FOLDER OUT, or brillm WEIGHTS VOCAB FREQUENCY OUT",
        (tmp_path / "ours", tmp_path / "x", "--to", "released", "--set", "a=1"): "--set a=1: a released BriLLM is converted as it is",
        (tmp_path / "ours", tmp_path / "x", "--tokenizer", ENGLISH): "goes with brillm WEIGHTS VOCAB FREQUENCY OUT",
        (tmp_path / "published", tmp_path / "x", "--to", "released"): "arithmetic='published': the released code computes",
        (tmp_path / "ours", tmp_path / "x"): "holds a brillm model, which cannot become brian",
        (tmp_path / "plain", tmp_path / "x", "--to", "released"): "holds a brian model; only a BriLLM has a released layout",
        ("brillm", *files(), tmp_path / "x", "--tokenizer", "absent"): "tokenizer='absent': there is no such file",
    }
    for arguments, message in refused.items():
        done = command("convert", *arguments)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1) and message in done.stderr, done.stderr
        assert not (tmp_path / "x").exists()
    (tmp_path / "ours" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer.json"):
        export_released(tmp_path / "ours", tmp_path / "x")
    with pytest.raises(ValueError, match="mmap=True: a brian model reads all its weights"):
        pathlm.load(tmp_path / "plain", mmap=True)


@pytest.mark.parametrize(("place", "name"), [(0, "weights"), (1, "vocab"), (2, "word_frequency")])
def test_the_file_that_is_missing_is_named_whatever_the_others_hold(tmp_path: Path, place: int, name: str) -> None:
    (tmp_path / "other").write_bytes(b"{")
    given = [tmp_path / "other"] * 3
    given[place] = tmp_path / "absent"
    done = command("convert", "brillm", *given, tmp_path / "x")
    assert (done.exit_code, done.stderr) == (2, f"error: {name}='{tmp_path / 'absent'}': there is no such file\n")


def test_a_model_on_disk_refuses_weights_that_are_not_its_own(tmp_path: Path) -> None:
    import_released(*files(), tmp_path / "ours")
    with pytest.raises(ValueError, match="mmap=True: the weights stay as they are on disk; leave dtype out"):
        pathlm.load(tmp_path / "ours", mmap=True, dtype=torch.float64)
    with pytest.raises(ValueError, match="device='cuda': with mmap the weights stay on disk"):
        run(tmp_path / "ours", ["一"], mmap=True, device="cuda")
    file = tmp_path / "ours" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"edges": config["edges"] - 1}))
    with pytest.raises(ValueError, match=r"graph.bias has shape \(433, 8\), must be \(432, 8\) by its config.json"):
        pathlm.load(tmp_path / "ours", mmap=True)
    file.write_text(json.dumps(config))
    weights = tmp_path / "ours" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"are damaged \(graph.position_weight does not fit into it\)"):
        pathlm.load(tmp_path / "ours", mmap=True)
    weights.unlink()
    with pytest.raises(ValueError, match=r"holds no model.safetensors"):
        pathlm.load(tmp_path / "ours", mmap=True)
