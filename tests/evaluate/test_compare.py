"""`pathlm eval` on a corpus that was really prepared: right numbers, cached n-grams, results beside the checkpoint, clear refusals."""

import io
import json
import math
import random

import numpy as np
import pytest
import torch
from cases import scatter
from rich.console import Console

from pathlm import build, preset
from pathlm.evaluate import compare, run
from pathlm.evaluate.lm import choose, score
from pathlm.evaluate.ngram import KneserNey
from pathlm.evaluate.records import read_token_losses
from pathlm.evaluate.routes import route_table
from pathlm.text.corpus import Corpus
from pathlm.text.prepare import prepare, prepare_config

LINE = "the people of this nation hold that peace, trade and law serve 春眠不觉晓 every citizen in all the states and 处处闻啼鸟"
WORDS = LINE.split()


def write_texts(file, *, documents, seed):
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, weights=range(len(WORDS), 0, -1), k=draw.randrange(5, 60))) + "." for _ in range(documents)]
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")


def make_corpus(folder, *, seed=0, vocab_size=300):
    write_texts(folder / "texts.jsonl", documents=80, seed=seed)
    source = {"path": str(folder / "texts.jsonl")}
    table = {"out": str(folder / "corpus"), "sources": [source], "vocab_size": vocab_size, "validation": 0.2, "test": 0.1, "workers": 1}
    prepare(prepare_config(table))
    return Corpus.open(folder / "corpus")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("text"))


def save_model(folder, corpus, *, vocab_size=None, with_tokenizer=True):
    torch.manual_seed(0)
    options = {"vocab_size": vocab_size or corpus.vocab_size, "max_position_embeddings": 32, "hidden_size": 32, "num_attention_heads": 2}
    build(preset("plain-tiny", **options)).save_pretrained(folder)
    if with_tokenizer:
        corpus.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def trained(tmp_path, corpus):
    """Return a run folder as training leaves it."""
    place = tmp_path / "run"
    for name in ("step-00000001", "step-00000002"):
        save_model(place / "checkpoints" / name, corpus)
    (place / "checkpoints" / "best").symlink_to("step-00000001")
    (place / "checkpoints" / "latest").symlink_to("step-00000002")
    (place / "run.json").write_text(json.dumps({"config": {"data": {"corpus": str(corpus.folder), "length": 24}}}))
    return place


def test_a_run_is_measured_on_its_own_corpus_beside_the_ngrams(trained, corpus):
    result = run(trained)
    documents = [corpus.document_tokens("validation", n) for n in range(len(corpus.documents("validation")))]
    texts = [record.bytes for record in corpus.documents("validation")]
    tokens = sum(len(document) - 1 for document in documents)
    assert result["checkpoint"] == str((trained / "checkpoints" / "step-00000001").resolve())
    assert (result["model"]["context"], result["model"]["stride"]) == (24, 12)
    for found in (result["model"], *result["ngrams"]["orders"].values()):
        assert (found["tokens"], found["bytes"], found["documents"]) == (tokens, sum(texts), len(documents))
        assert found["bits_per_byte"] == pytest.approx(found["loss"] * tokens / math.log(2) / sum(texts))
    assert result["model"]["loss"] == pytest.approx(math.log(corpus.vocab_size), abs=0.5)

    train = [corpus.document_tokens("train", n) for n in range(len(corpus.documents("train")))]
    reference = KneserNey(np.concatenate(train), np.cumsum([0, *map(len, train)])[:-1], vocab_size=corpus.vocab_size)
    expected = reference.losses(np.concatenate(documents), np.cumsum([0, *map(len, documents)])[:-1]).mean(axis=1)
    assert result["ngrams"]["train_tokens"] == sum(map(len, train))
    assert [result["ngrams"]["orders"][str(n)]["loss"] for n in range(1, 6)] == pytest.approx(expected.tolist())


def test_the_bytes_are_those_of_the_text(corpus):
    tokenizer = corpus.tokenizer()
    for record in corpus.documents("validation"):
        text = tokenizer.decode(corpus.document_tokens("validation", record.number), skip_special_tokens=True)
        assert len(text.encode()) == record.bytes


def test_results_of_every_split_are_kept_beside_the_checkpoints(trained):
    first = run(trained, max_documents=2)
    second = run(trained / "checkpoints" / "latest", split="test", order=2)
    assert json.loads((trained / "eval.json").read_text()) == {"validation": first, "test": second}
    assert list(second["ngrams"]["orders"]) == ["1", "2"]
    assert first["model"]["documents"] == first["ngrams"]["orders"]["3"]["documents"] == 2
    assert not list(trained.glob("*.part"))


def test_the_second_evaluation_counts_no_ngrams(trained, corpus, monkeypatch):
    first = run(trained)
    assert (corpus.folder / compare.NGRAM_CACHE).is_file()
    with monkeypatch.context() as patch:
        patch.setattr(compare, "KneserNey", None)
        assert run(trained)["ngrams"] == first["ngrams"]
        with pytest.raises(TypeError):  # other documents are no reason to use the cache
            run(trained, max_documents=1)
    Corpus.open(corpus.folder)  # the cache does not spoil the corpus


def test_a_damaged_cache_is_counted_again(trained, corpus):
    first = run(trained)["ngrams"]
    (corpus.folder / compare.NGRAM_CACHE).write_text("{", encoding="utf-8")
    assert run(trained)["ngrams"] == first


def test_ngrams_are_counted_on_whole_documents_up_to_a_bound(corpus):
    chosen = list(corpus.documents("validation"))
    sizes = [record.tokens for record in corpus.documents("train")]
    found = compare.ngram_scores(corpus, "validation", chosen, order=2, train_tokens=sum(sizes[:4]) + 1)
    assert found["train_tokens"] == sum(sizes[:4])


def test_ngrams_score_documents_in_groups(corpus, monkeypatch):
    chosen = choose(corpus, "validation")
    whole = compare._count_and_score(corpus, "validation", chosen, order=3, train_tokens=10_000)
    monkeypatch.setattr("pathlm.evaluate.lm.GROUP_TOKENS", 50)
    parts = compare._count_and_score(corpus, "validation", chosen, order=3, train_tokens=10_000)
    assert parts[0] == whole[0] and parts[1] == pytest.approx(whole[1], rel=1e-12)


def test_the_table_shows_ngrams_then_the_model(trained):
    screen = io.StringIO()
    result = run(trained, console=Console(file=screen, width=120))
    lines = [line for line in screen.getvalue().splitlines() if "-gram " in line or "run, step-00000001" in line]
    assert len(lines) == 6 and "run, step-00000001" in lines[-1]
    assert f"{result['model']['loss']:.4f}" in lines[-1] and f"{result['ngrams']['orders']['3']['bits_per_byte']:.4f}" in lines[2]
    assert str(trained / "eval.json") in screen.getvalue()


def test_records_are_written_on_request_and_join_with_the_corpus(trained, corpus, tmp_path):
    result = run(trained, records=tmp_path / "losses.safetensors", order=0)
    found = read_token_losses(tmp_path / "losses.safetensors")
    found.check(corpus)
    assert found.loss.mean(dtype=np.float64) == pytest.approx(result["model"]["loss"], rel=1e-6)
    assert result["ngrams"]["orders"] == {}


def test_a_routed_run_is_measured_at_a_budget_beside_its_result_without_one(trained, corpus):
    place = trained / "checkpoints" / "step-00000001"
    sizes = {"max_position_embeddings": 32, "hidden_size": 32, "num_attention_heads": 2, "initializer_range": 0.3}
    model = build(preset("brian-tiny", vocab_size=corpus.vocab_size, **sizes)).eval()
    scatter(model)
    model.save_pretrained(place)
    free, least = run(trained, order=1), run(trained, order=1, budget=0.25)
    assert free["model"]["loss"] == pytest.approx(score(model, corpus, context=24).loss, rel=1e-5)
    assert least["model"]["loss"] != pytest.approx(free["model"]["loss"], rel=1e-4)
    model.register_forward_pre_hook(lambda _, args, given: (args, given | {"budget": 0.25}), with_kwargs=True)
    assert least["model"]["loss"] == pytest.approx(score(model, corpus, context=24).loss, rel=1e-5)
    written = json.loads((trained / "eval.json").read_text())
    assert list(written) == ["validation", "validation, budget 0.25"]
    assert (written["validation"]["budget"], written["validation, budget 0.25"]["budget"]) == (None, 0.25)
    for budget, message in ((0.1, "budget=0.1: must lie between 0.25 and 1"), (1.2, "budget=1.2: must lie above 0 and at most at 1")):
        with pytest.raises(ValueError, match=message):
            run(trained, order=1, budget=budget)


def routed_run(trained, corpus, **options):
    sizes = {"max_position_embeddings": 32, "hidden_size": 32, "num_attention_heads": 2, "initializer_range": 0.3}
    model = build(preset("brian-tiny", vocab_size=corpus.vocab_size, **sizes | options)).eval()
    scatter(model)
    model.save_pretrained(trained / "checkpoints" / "step-00000001")
    return model


@pytest.mark.parametrize(("budget", "options"), [(None, {}), (0.3, {"route_top_k": 2}), (1.0, {"max_route_steps": 6})])
def test_a_routed_run_says_what_it_computed_for_its_loss(trained, corpus, budget, options):
    model = routed_run(trained, corpus, **options)
    screen = io.StringIO()
    result = run(trained, order=1, budget=budget, records=trained / "losses", console=Console(file=screen, width=200))
    expected = route_table(model, corpus, context=24, budget=budget)
    found, most = result["routes"], model.config.max_route_steps
    assert found["steps_mean"] == pytest.approx(expected.steps.mean())
    assert found["block_evaluations"] == pytest.approx(expected.evaluations.mean()) == 2 + found["steps_mean"] * model.config.route_top_k
    assert found["blocks_share"] == pytest.approx(found["block_evaluations"] / 6)
    assert found["steps_share"] == pytest.approx(found["steps_mean"] / most)
    assert budget != 1.0 or found["steps_mean"] == most
    line = (
        f"route steps {found['steps_mean']:.2f} of {most} ({found['steps_share']:.0%}), "
        f"{found['block_evaluations']:.2f} blocks run per token, {found['blocks_share']:.0%} of the model's 6"
    )
    assert line in screen.getvalue()
    name = "validation" if budget is None else f"validation, budget {budget:g}"
    assert json.loads((trained / "eval.json").read_text())[name]["routes"] == found
    kept = read_token_losses(trained / "losses")
    kept.check(corpus)
    assert kept.loss.mean(dtype=np.float64) == pytest.approx(result["model"]["loss"], rel=1e-6)
    assert kept.header["budget"] == budget and kept.header["split"] == "validation" and kept.header["unit"] == "nats"
    assert (kept.header["context"], kept.header["stride"]) == (24, 12)


def test_a_plain_run_says_nothing_of_routes(trained):
    screen = io.StringIO()
    assert run(trained, order=0, console=Console(file=screen, width=200))["routes"] is None
    assert "route" not in screen.getvalue()


def test_a_plain_decoder_is_not_measured_at_a_budget(trained):
    with pytest.raises(ValueError, match=r"budget=0\.5: a plain decoder has no pool"):
        run(trained, order=1, budget=0.5)


def test_a_foreign_folder_needs_a_corpus_and_gets_its_own_context(tmp_path, corpus):
    folder = save_model(tmp_path / "model", corpus)
    with pytest.raises(ValueError, match=r"corpus: .* does not say which corpus"):
        run(folder)
    result = run(folder, corpus.folder, order=1)
    assert result["model"]["context"] == 32
    assert (folder / "eval.json").is_file()
    model = build(preset("plain-tiny", vocab_size=corpus.vocab_size, max_position_embeddings=32, hidden_size=32, num_attention_heads=2))
    model.load_state_dict(type(model).from_pretrained(folder).state_dict())
    assert score(model, corpus).loss == pytest.approx(result["model"]["loss"], rel=1e-6)


def test_a_model_with_another_vocabulary_is_refused(tmp_path, corpus):
    other = make_corpus(tmp_path, seed=5, vocab_size=310)
    with pytest.raises(ValueError, match=r"vocab_size=\d+, the tokenizer of .* has \d+ tokens"):
        run(save_model(tmp_path / "small", corpus, vocab_size=280), corpus.folder)
    with pytest.raises(ValueError, match="another tokenizer"):
        run(save_model(tmp_path / "other", other), corpus.folder)
    with pytest.raises(ValueError, match="do not match"):
        run(save_model(tmp_path / "bare", corpus, vocab_size=corpus.vocab_size + 1, with_tokenizer=False), corpus.folder)
    padded = save_model(tmp_path / "padded", corpus, vocab_size=corpus.vocab_size + 20)
    assert run(padded, corpus.folder, order=1, max_documents=1)["model"]["documents"] == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"split": "nowhere"}, ValueError, "split='nowhere'"),
        ({"order": -1}, ValueError, "order=-1"),
        ({"context": 33}, ValueError, "context=33"),
        ({"corpus": "no/such/folder"}, FileNotFoundError, "no/such/folder"),
        ({"records": "/"}, ValueError, "records='/': is a folder, must be the name of a file"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(trained, options, error, message):
    with pytest.raises(error, match=message):
        run(trained, **options)


@pytest.mark.parametrize("device", ["cuda:99", "no-such-device"])
def test_a_device_that_is_not_here_is_named(device, tmp_path):
    from pathlm.evaluate.checkpoint import open_model

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"device='{device}'"):
        open_model(tmp_path, device=device)


def test_damaged_weights_are_named_with_their_folder(tmp_path):
    from pathlm.evaluate.checkpoint import open_model
    from pathlm.models.library import build, preset

    build(preset("plain-tiny", vocab_size=32, hidden_size=16)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=str(tmp_path)):
        open_model(tmp_path, device="cpu")
