"""Scores count what they say: a model that knows the answers gets all of them, one wrong token costs the sample."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pathlm.evaluate.synthetic import interval, score_tasks
from pathlm.models.library import build, preset
from pathlm.text.synthetic import open_task, samples
from pathlm.text.synthetic.words import SampleEncoder, task_tokenizer


class Oracle(nn.Module):
    """Predicts the next token of every row it is given, except where `spoil` says otherwise."""

    def __init__(self, size, spoil):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.size, self.spoil = size, spoil

    def forward(self, input_ids, attention_mask):
        following = torch.cat([input_ids[:, 1:], input_ids[:, :1]], dim=1)
        for row, mask in zip(following, attention_mask, strict=True):
            self.spoil(row, int(mask.sum()))
        return SimpleNamespace(logits=F.one_hot(following, self.size).float())


def score(spoil, *, spec="reverse", **options):
    tokenizer = task_tokenizer([open_task(spec)])
    return score_tasks(Oracle(len(tokenizer), spoil), [spec], tokenizer, **{"samples": 10, "batch_size": 3} | options)


def test_a_model_that_knows_every_answer_scores_one():
    (found,) = score(lambda row, length: None)
    assert (found.task, found.k, found.correct, found.samples, found.accuracy, found.token_accuracy) == ("reverse", 1, 10, 10, 1.0, 1.0)
    assert found.held_out and found.row()["high"] == 1.0


def test_one_wrong_answer_token_costs_the_sample_but_not_the_other_tokens():
    def spoil_last(row, length):
        row[length - 2] = 0

    (found,) = score(spoil_last)
    tokens = [len(samples("reverse", "test").sample(i, k=1).answer) for i in range(10)]
    assert found.correct == 0
    assert found.token_accuracy == pytest.approx(1 - 10 / sum(tokens))


def test_errors_in_the_prompt_cost_nothing():
    def spoil_prompt(row, length):
        row[:3] = 0

    assert score(spoil_prompt)[0].accuracy == 1.0


def test_every_k_gets_its_own_row_and_may_be_chosen():
    assert [found.k for found in score(lambda row, length: None, spec="pointer")] == [1, 2, 3, 4, 5, 6]
    assert [found.k for found in score(lambda row, length: None, spec="pointer", ks=[2, 5])] == [2, 5]
    with pytest.raises(ValueError, match="samples=0: must be at least 1"):
        score(lambda row, length: None, samples=0)


def test_every_question_of_a_sample_counts_for_its_own_k():
    spec = "pointer:questions=4,max_k=2"
    drawn = [samples(spec, "test").sample(i, k=k) for k in (1, 2) for i in range(10)]
    asked = [question.k for sample in drawn for question in sample.questions]
    found = score(lambda row, length: None, spec=spec)
    assert [(s.k, s.samples, s.correct) for s in found] == [(k, asked.count(k), asked.count(k)) for k in (1, 2)]

    def spoil_last(row, length):
        row[length - 2] = 0

    lost = [sum(sample.more[-1].k == k for sample in drawn) for k in (1, 2)]
    assert [s.samples - s.correct for s in score(spoil_last, spec=spec)] == lost


def test_a_teacher_forced_hit_is_what_greedy_generation_writes():
    torch.manual_seed(0)
    task = open_task("reverse:max_length=4")
    tokenizer = task_tokenizer([task])
    config = preset("plain-tiny", vocab_size=len(tokenizer), hidden_size=16, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    model = build(config).eval()
    encode = SampleEncoder(tokenizer, [task])
    sample = encode(samples(task.spec, "test").sample(0))
    written = model.generate(torch.tensor([sample.ids[: sample.start]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    from pathlm.evaluate.synthetic import answer_hits

    greedy = sample._replace(ids=[*sample.ids[: sample.start], *written[0, sample.start :].tolist(), 0])
    assert answer_hits(model, [greedy], pad_id=1)[0].all()
    wrong = greedy._replace(ids=[*greedy.ids[: sample.stop - 1], (greedy.ids[sample.stop - 1] + 1) % len(tokenizer), 0])
    assert answer_hits(model, [wrong], pad_id=1)[0].tolist() == [True] * (sample.stop - sample.start - 1) + [False]


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (3, 10), (57, 100)])
def test_the_interval_is_where_the_score_test_does_not_reject(successes, trials):
    low, high = interval(successes, trials)
    share = successes / trials
    for edge in (low, high):
        if 0 < edge < 1:
            assert abs(share - edge) / math.sqrt(edge * (1 - edge) / trials) == pytest.approx(1.959964, abs=1e-6)
    assert low <= share <= high
