"""Suites of `pathlm eval`: which are meant, which options concern them, and the two that ask questions."""

import json

import pytest
import torch
from arrays import make_llama
from typer.testing import CliRunner

from pathlm import build, preset
from pathlm.cli import app
from pathlm.evaluate import choices, suites, synthetic
from pathlm.evaluate.checkpoint import open_model
from pathlm.evaluate.choices import Question, score_choices, write_questions
from pathlm.evaluate.synthetic import score_tasks
from pathlm.text.synthetic import open_task
from pathlm.text.synthetic.words import task_tokenizer


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, False, None), ("lm",)),
        (("routing,lm", False, None), ("routing", "lm")),
        (("lm,lm", False, None), ("lm",)),
        ((None, True, None), ("routing",)),
        ((None, False, ["hellaswag"]), ("lm-eval",)),
    ],
)
def test_suites_are_chosen_by_name(given, expected):
    suite, routes, tasks = given
    assert suites.choose(suite, routes=routes, tasks=tasks) == expected


def refused(**options):
    with pytest.raises(ValueError) as error:
        suites.run("no such folder", **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "lm,nothing"}, "--suite lm,nothing: knows lm, routing, synthetic, choices, long-context, not 'nothing'"),
        ({"suite": ""}, "not ''"),
        ({"suite": "lm", "routes": True}, "--suite lm: does not go with --routes"),
        ({"routes": True, "tasks": ["a"]}, "--lm-eval a: measures answers, --routes measures text"),
        ({"samples": 3}, "--samples 3: needs --suite synthetic or choices or long-context"),
        ({"questions": "q.jsonl", "suite": "lm,synthetic"}, "--questions q.jsonl: needs --suite choices"),
        ({"specs": ["copy", "sum"], "suite": "choices"}, "--task copy sum: needs --suite synthetic or long-context"),
        ({"specs": ["sum"], "suite": "synthetic,long-context"}, "--task sum: is meant for one suite"),
        ({"limit": 3}, "--limit 3: needs --lm-eval"),
        ({"plot": "a.svg"}, "--plot a.svg: needs --routes"),
        ({"records": "r", "suite": "synthetic"}, "--records r: does not go with --suite synthetic"),
        ({"records": "r", "tasks": ["a"]}, "--records r: does not go with --lm-eval"),
        ({"branches": 2, "suite": "lm,routing"}, "--branches 2: does not go with --routes"),
        ({"records": "r", "suite": "lm,long-context"}, "is meant for one suite, --suite lm,long-context names 2"),
        ({"suite": "long-context", "lengths": "a"}, "lengths='a': must be whole numbers"),
        ({"sample": 3}, "sample=3: is no option of a suite"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_no_suite_would_look_at_are_refused_before_any_work(options, message):
    assert message in refused(**options)


def test_every_suite_gets_its_own_options_and_no_others(monkeypatch):
    asked = {}

    def prepare(name):
        return lambda subject, **options: lambda: asked.setdefault(name, options | {"budget": subject.budget})

    monkeypatch.setattr(suites, "_prepare", prepare)
    more = {
        "samples": 5,
        "batch": 2,
        "lengths": "8,16",
        "budgets": "0.5",
        "against": "plain",
        "questions": "q",
        "budget": 0.7,
        "plot": None,
    }
    found = suites.run("folder", "corpus", suite=",".join(suites.SUITES), context=9, **more)
    assert list(found) == list(asked) == list(suites.SUITES)
    own = {name: {option for option in options if option in suites.CONCERNS} for name, options in asked.items()}
    assert own == {
        "lm": set(), "routing": {"budgets", "against"}, "synthetic": {"samples", "batch"},
        "choices": {"samples", "batch", "questions"}, "long-context": {"samples", "batch", "lengths"},
    }  # fmt: skip
    assert asked["long-context"]["lengths"] == [8, 16] and asked["routing"]["budgets"] == [0.5]
    assert all(options["budget"] == 0.7 for options in asked.values())
    assert "corpus" not in asked["synthetic"] and asked["choices"]["corpus"] == "corpus"


def test_what_any_suite_refuses_is_told_before_the_first_one_measures(monkeypatch):
    done = []

    def refuse(subject, **options):
        raise ValueError("documents=1")

    monkeypatch.setattr(suites, "_prepare", lambda name: refuse if name == "choices" else lambda subject, **_: lambda: done.append(name))
    with pytest.raises(ValueError, match="documents=1"):
        suites.run("folder", suite="lm,routing,choices,synthetic")
    assert not done


@pytest.fixture(scope="module")
def solver(tmp_path_factory):
    """A run that was trained on two tasks, without weights that could solve them."""
    folder = tmp_path_factory.mktemp("solver")
    tokenizer = task_tokenizer([open_task("arithmetic:max_k=3"), open_task("copy:max_length=8")])
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    build(preset("plain-tiny", vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data = {"tasks": {"arithmetic:max_k=3": 1.0, "copy:max_length=8": 1.0}}
    (folder / "run.json").write_text(json.dumps({"config": {"data": data}}))
    return folder


def test_synthetic_tasks_are_those_of_the_run_and_written_beside_it(solver):
    result = synthetic.run(solver, samples=6, split="test", device="cpu")
    assert json.loads((solver / "synthetic.json").read_text())["test"] == result
    model, tokenizer = open_model(solver, device="cpu")
    expected = score_tasks(model, ["arithmetic:max_k=3", "copy:max_length=8"], tokenizer, samples=6)
    assert result["rows"] == [score.row() for score in expected] and {row["k"] for row in result["rows"]} >= {1, 2, 3}
    again = synthetic.run(solver, ["arithmetic:max_k=3"], samples=2, device="cpu")
    both = json.loads((solver / "synthetic.json").read_text())
    assert both == {"test": result, "validation": again}


def test_the_command_asks_synthetic_tasks(solver):
    done = CliRunner().invoke(
        app, ["eval", str(solver), "--suite", "synthetic", "--task", "arithmetic:max_k=3", "--samples", "3", "--device", "cpu"]
    )
    assert done.exit_code == 0, done.stderr
    (row, *_) = json.loads((solver / "synthetic.json").read_text())["validation"]["rows"]
    assert f"{row['accuracy']:.3f}" in done.stdout and "arithmetic" in done.stdout and "synthetic.json" in done.stdout.replace("\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"specs": ["cpoy"]}, "task 'cpoy': known tasks are"),
        ({"samples": 0}, "samples=0: must be at least 1"),
        ({"batch": 0}, "batch=0: must be at least 1"),
        ({"split": "nowhere"}, "split='nowhere'"),
        ({"specs": ["compose"]}, "the tokenizer cannot write"),
        ({"specs": ["copy:min_length=60,max_length=60"]}, "a sample takes .* tokens, the model's max_position_embeddings=64 are fewer"),
        ({"budget": 0.5}, "has no pool to leave early"),
        ({"branches": 2}, "has no pool to branch in"),
    ],
    ids=str,
)
def test_tasks_that_cannot_be_asked_are_refused(solver, options, message):
    with pytest.raises(ValueError, match=message):
        synthetic.run(solver, **{"device": "cpu", "samples": 2} | options)


def test_a_late_task_that_does_not_fit_is_refused_before_the_first_is_asked(solver, monkeypatch):
    monkeypatch.setattr(synthetic, "score_tasks", None)
    with pytest.raises(ValueError, match=r"a sample takes .* tokens"):
        synthetic.run(solver, ["arithmetic:max_k=3", "copy:min_length=60,max_length=60"], samples=2, device="cpu")


def test_a_run_without_tasks_must_be_told_of_some(solver, tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="was not trained on synthetic tasks; name one"):
        synthetic.run(tmp_path / "model", device="cpu")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        synthetic.run(tmp_path / "model", ["copy"], device="cpu")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A small prepared corpus of texts with sentences, and a model that shares its tokenizer."""
    from pathlm.text.corpus import Corpus
    from pathlm.text.prepare import prepare, prepare_config

    folder = tmp_path_factory.mktemp("reader")
    texts = [" ".join(f"In year {year} of our time the {n} rivers rose again." for n in range(12)) for year in range(1800, 1830)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(prepare_config({"out": str(folder / "corpus"), "sources": [str(folder / "text.jsonl")], "vocab_size": 280, "validation": 0.2}))
    corpus = Corpus.open(folder / "corpus")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 256}
    torch.manual_seed(0)
    build(preset("plain-tiny", vocab_size=corpus.vocab_size, **sizes)).save_pretrained(folder / "model")
    corpus.tokenizer().save_pretrained(folder / "model")
    return folder


def test_choices_are_made_from_the_corpus_and_written(reader):
    result = choices.run(reader / "model", reader / "corpus", samples=4, device="cpu")
    assert json.loads((reader / "model" / "choices.json").read_text())["validation"] == result
    assert [(row["set"], row["normalisation"]) for row in result["rows"]] == [
        (name, how) for name in ("next sentence", "shuffled sentence") for how in ("raw", "per_byte", "per_token")
    ]
    assert all(row["questions"] == 4 and row["chance"] == (0.25 if "next" in row["set"] else 0.5) for row in result["rows"])


def test_a_file_of_questions_is_asked_as_it_stands(reader, tmp_path):
    file = tmp_path / "which.jsonl"
    asked = [Question("The rivers", ("rose again.", "of our time the 3"), number % 2) for number in range(5)]
    write_questions(file, asked)
    result = choices.run(reader / "model", questions=file, samples=4, device="cpu")
    model, tokenizer = open_model(reader / "model", device="cpu")
    assert result["rows"] == [{"set": "which"} | score.row() for score in score_choices(model, tokenizer, asked[:4])]
    assert "which.jsonl" in json.loads((reader / "model" / "choices.json").read_text())


def test_texts_without_spaces_are_joined_without_one():
    assert choices._delimiter([Question("江山如此多嬌", ("引無數", "英雄競折腰"), 0)]) == ""
    assert choices._delimiter([Question("江山", ("two words", "引"), 0)]) == " "


def test_the_command_asks_choices(reader):
    model, corpus = str(reader / "model"), str(reader / "corpus")
    done = CliRunner().invoke(app, ["eval", model, "--corpus", corpus, "--suite", "choices", "--samples", "3", "--device", "cpu"])
    assert done.exit_code == 0, done.stderr
    for part in ("next sentence", "shuffled sentence", "per byte", "0.250", "choices.json"):
        assert part in done.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"questions": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"samples": 0}, "samples=0"),
        ({"context": 999}, "context=999: must lie between 1 and"),
        ({"corpus": None}, "does not say which corpus it was trained on"),
        ({"split": "nowhere"}, "nowhere"),
    ],
    ids=str,
)
def test_choices_that_cannot_be_asked_are_refused(reader, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        choices.run(reader / "model", **{"corpus": reader / "corpus", "device": "cpu", "samples": 2} | options)
