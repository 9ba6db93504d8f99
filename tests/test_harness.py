"""lm-eval's own numbers on a local multiple-choice task equal ours, without a network."""

import importlib
import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from pathlm.cli import app
from pathlm.evaluate.choices import Question, read_questions, score_choices, write_questions
from pathlm.models.library import build, preset
from pathlm.text.synthetic import open_task, samples
from pathlm.text.synthetic.words import task_tokenizer

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def harness():
    return importlib.import_module("pathlm.evaluate.harness")


@pytest.fixture(scope="module")
def tokenizer():
    return task_tokenizer([open_task("copy")])


@pytest.fixture(scope="module", params=["llama", "plain"])
def model(request, tokenizer):
    torch.manual_seed(0)
    if request.param == "plain":
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
        return build(preset("plain-tiny", vocab_size=len(tokenizer), hidden_size=16, max_position_embeddings=64, **ids)).eval()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def questions(tmp_path):
    """Choices of different lengths, so that the normalisations disagree."""
    stream, made = samples("copy:max_length=8"), []
    for i in range(60):
        choices = tuple(" ".join(stream.sample(4 * i + j).answer) for j in range(4))
        made.append(Question(" ".join(stream.sample(4 * i + i % 4).prompt), choices, i % 4))
    write_questions(tmp_path / "copying.jsonl", made)
    return tmp_path / "copying.jsonl"


def request(*args):
    return SimpleNamespace(args=args)


def ours(model, tokenizer, file):
    return {score.normalisation: score.accuracy for score in score_choices(model, tokenizer, read_questions(file))}


def test_accuracy_on_a_local_task_equals_our_own(harness, model, tokenizer, questions, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    found = harness.evaluate(harness.HarnessModel(model, tokenizer, batch_size=7), [questions])["copying"]
    expected = ours(model, tokenizer, questions)
    assert found["acc,none"] == expected["raw"]
    assert found["acc_bytes,none"] == expected["per_byte"]
    assert len({*expected.values()}) > 1, "the normalisations should disagree here, or the test compares one number"


def test_a_saved_model_is_evaluated_from_its_folder(harness, model, tokenizer, questions, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = CliRunner().invoke(app, ["eval", str(tmp_path / "model"), "--lm-eval", str(questions), "--limit", "20", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "model" / "eval.json").read_text())["lm-eval"]["tasks"]["copying"]
    first = score_choices(model, tokenizer, read_questions(questions)[:20])
    assert found["acc,none"] == first[0].accuracy
    assert f"{first[0].accuracy:.4f}" in done.output


def test_a_file_of_questions_that_does_not_exist_is_named_before_the_model_is_opened(harness, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no-such\.jsonl"):
        harness.run(tmp_path / "no model", [tmp_path / "no-such.jsonl"])


def test_rolling_likelihood_counts_every_token_once(harness, model, tokenizer):
    lm = harness.HarnessModel(model, tokenizer, context=5)
    tokens = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m"]
    (found,) = lm.loglikelihood_rolling([request(" ".join(tokens))])
    ids = [0, *tokenizer.convert_tokens_to_ids(tokens)]
    expected = 0.0
    for i in range(1, len(ids)):
        begin = 5 * ((i - 1) // 5) if i <= 10 else len(ids) - 6  # whole windows, the last one moved back to be full
        logits = model(torch.tensor([ids[begin:i]])).logits[0, -1]
        expected += float(logits.log_softmax(-1)[ids[i]].detach())
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_model_without_a_longest_text_is_told_how_much_it_is_to_see(harness, tokenizer, tmp_path):
    graph = build(preset("brillm-tiny", vocab_size=len(tokenizer), signal_size=4, edges=20))
    graph.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "q.jsonl").write_text('{"context": "copy : a", "choices": ["b", "c"], "answer": 0}\n')
    with pytest.raises(ValueError, match="context: the model names no max_position_embeddings, so say how many tokens it is to see"):
        harness.run(tmp_path / "m", [str(tmp_path / "q.jsonl")])
    assert harness.run(tmp_path / "m", [str(tmp_path / "q.jsonl")], context=16)["q"]


def test_generation_stops_before_the_first_stop_string(harness, model, tokenizer):
    lm = harness.HarnessModel(model, tokenizer)
    (whole,) = lm.generate_until([request("copy : a b =", {"until": [], "max_gen_toks": 12})])
    words = whole.split()
    assert len(words) <= 12 and words
    stop = words[-1]
    (cut,) = lm.generate_until([request("copy : a b =", {"until": [stop], "max_gen_toks": 12})])
    assert cut == whole[: whole.index(stop)]


def test_a_likelihood_request_is_answered_in_order(harness, model, tokenizer):
    lm = harness.HarnessModel(model, tokenizer, batch_size=2)
    pairs = [("copy :", " a"), ("copy : a b c", " d e"), ("", "b")]
    together = lm.loglikelihood([request(*pair) for pair in pairs])
    single = [lm.loglikelihood([request(*pair)])[0] for pair in pairs]
    assert [logprob for logprob, _ in together] == pytest.approx([logprob for logprob, _ in single], abs=1e-5)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "pathlm.evaluate.harness", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pathlm\[eval\]'"):
        importlib.import_module("pathlm.evaluate.harness")


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
