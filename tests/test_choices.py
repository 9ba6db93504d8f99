"""Multiple choice agrees with the likelihood of each text computed alone, and question sets are what they say."""

import copy
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pathlm.evaluate.choices import (
    Question,
    encode_pair,
    likelihoods,
    next_sentence,
    read_questions,
    score_choices,
    sentences,
    shuffled_sentence,
    write_questions,
)  # fmt: skip
from pathlm.text.synthetic import open_task
from pathlm.text.synthetic.words import task_tokenizer

TEXT = " ".join(f"Sentence number {i} says that {i} is one more than {i - 1}." for i in range(40))


@pytest.fixture(scope="module")
def tokenizer():
    return task_tokenizer([open_task("copy")])


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


@torch.no_grad()
def alone(model, before, after):
    """The slow twin: one text, one token at a time."""
    total, greedy = 0.0, True
    for i, token in enumerate(after):
        logits = model(torch.tensor([before + after[:i]])).logits[0, -1]
        total, greedy = total + float(logits.log_softmax(-1)[token]), greedy and int(logits.argmax()) == token
    return total, greedy


def test_likelihoods_agree_with_one_token_at_a_time(model, tokenizer):
    pairs = [encode_pair(tokenizer, c, a) for c, a in [("copy : a b", " a b"), ("", "c"), ("copy", " : d e f g ="), ("a", " a")]]
    for (before, after), found in zip(pairs, likelihoods(model, pairs, batch_size=3), strict=True):
        total, greedy = alone(model, before, after)
        assert found.logprob == pytest.approx(total, abs=1e-12)
        assert (found.greedy, found.tokens) == (greedy, len(after))


def test_a_likelihood_that_is_no_number_is_no_answer(model, tokenizer):
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[5] = torch.nan
    with pytest.raises(ValueError, match="the log-likelihood of a continuation is nan: the model is broken"):
        score_choices(broken, tokenizer, [Question("copy : a", ("b", "c"), 0)])


def test_a_continuation_that_is_greedy_is_found_so(model, tokenizer):
    before = encode_pair(tokenizer, "copy : a b =", " c")[0]
    best = [int(model(torch.tensor([before])).logits[0, -1].argmax())]
    assert likelihoods(model, [(before, best)])[0].greedy


def test_contexts_lose_their_beginning_and_continuations_never(model, tokenizer):
    before, after = encode_pair(tokenizer, " ".join("abcdefgh" * 3), " x y")
    cut = likelihoods(model, [(before, after)], context=6)[0].logprob
    assert cut == pytest.approx(alone(model, before[-5:], after)[0], abs=1e-12)
    with pytest.raises(ValueError, match="context=1: a continuation of 2 tokens does not fit"):
        likelihoods(model, [(before, after)], context=1)


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(tokenizer):
    assert encode_pair(tokenizer, "copy : a ", "b c") == encode_pair(tokenizer, "copy : a", " b c")
    with pytest.raises(ValueError, match="continuation=' ': has no token of its own"):
        encode_pair(tokenizer, "a", " ")


def test_each_normalisation_divides_by_what_it_says(model, tokenizer):
    questions = [Question("copy :", ("a", "b c d", "aa"[:1] + " q"), 1), Question("copy : z =", ("z", "y y y"), 0)]
    right = {"raw": 0, "per_byte": 0, "per_token": 0}
    for q in questions:
        found = [alone(model, *encode_pair(tokenizer, q.context, " " + c))[0] for c in q.choices]
        for name, sizes in {"raw": [1] * 9, "per_byte": map(len, q.choices), "per_token": [len(c.split()) for c in q.choices]}.items():
            scores = [total / size for total, size in zip(found, sizes, strict=False)]
            right[name] += scores.index(max(scores)) == q.answer
    scores = score_choices(model, tokenizer, questions, batch_size=2)
    assert {s.normalisation: s.correct for s in scores} == right
    assert all(s.questions == 2 and s.low <= s.accuracy <= s.high and s.chance == pytest.approx((1 / 3 + 1 / 2) / 2) for s in scores)


def test_scoring_leaves_the_model_in_the_mode_it_was_in(model, tokenizer):
    model.train()
    score_choices(model, tokenizer, [Question("copy", ("a", "b"), 0)])
    assert model.training
    model.eval()


def test_questions_survive_the_file(tmp_path):
    questions = [Question("上文", ("甲", "乙"), 1), Question("", ("a", "b", "c"), 0)]
    write_questions(tmp_path / "q.jsonl", questions)
    assert read_questions(tmp_path / "q.jsonl") == questions


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"context": "a", "choices": ["b", "c"]}, "line 2: 'answer' is missing"),
        ({"context": "a", "choices": ["b", "c"], "answer": 2}, "line 2: answer=2: must be a number from 0 to 1"),
        ({"context": "a", "choices": ["b", "c"], "answer": True}, "answer=True"),
        ({"context": "a", "choices": ["b"], "answer": 0}, "there must be at least 2"),
        ({"context": "a", "choices": ["b", ""], "answer": 0}, "not empty"),
        ({"context": None, "choices": ["b", "c"], "answer": 0}, "context must be text"),
    ],
)
def test_a_bad_question_is_named_by_file_and_line(tmp_path, row, message):
    good = {"context": "a", "choices": ["b", "c"], "answer": 0}
    (tmp_path / "q.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "q.jsonl")


def test_an_empty_file_of_questions_is_an_error(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no question"):
        read_questions(tmp_path / "q.jsonl")


def test_next_sentence_questions_hold_the_true_sentence_and_rivals_from_elsewhere():
    text = sentences(TEXT)
    assert len(text) == 40
    for q in next_sentence([TEXT], count=50, seed=3):
        place = text.index(q.choices[q.answer])
        assert q.context == " ".join(text[place - 3 : place])
        assert len(set(q.choices)) == 4 and set(q.choices) <= set(text)
        near = text[place - 3 : place] + text[place + 1 : place + 4]
        assert not set(q.choices) & set(near)


def test_shuffled_sentence_questions_hold_the_same_words_in_another_order():
    for q in shuffled_sentence([TEXT, "太短。"], count=50):
        true, wrong = q.choices[q.answer], q.choices[1 - q.answer]
        assert true in sentences(TEXT) and true != wrong
        assert sorted(true.split()) == sorted(wrong.split())


def test_question_sets_are_functions_of_the_seed_and_spread_their_answers():
    assert next_sentence([TEXT], count=20, seed=1) == next_sentence([TEXT], count=20, seed=1)
    assert next_sentence([TEXT], count=20, seed=1) != next_sentence([TEXT], count=20, seed=2)
    answers = [q.answer for q in next_sentence([TEXT], count=400)]
    assert all(60 < answers.count(i) < 140 for i in range(4))


def test_texts_without_sentences_are_refused():
    with pytest.raises(ValueError, match="none has 11 different sentences"):
        next_sentence(["Too short."], count=1)


def test_chinese_sentences_are_shuffled_by_character():
    text = "".join(f"第{'一二三四五六七八九十'[i]}句话说的是春天来了。" for i in range(10))
    assert len(sentences(text)) == 10
    for q in shuffled_sentence([text], count=5):
        assert sorted(q.choices[0]) == sorted(q.choices[1])
