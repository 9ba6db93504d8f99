"""Rows of tasks and of text: shares, isolation, labels, and purity in the row's number."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathlm.config import DataConfig
from pathlm.text.mixture import IGNORE, TASK_DOCUMENTS, MixedRows, TaskRows, open_rows
from pathlm.text.prepare import PrepareConfig, prepare
from pathlm.text.sources import SourceConfig
from pathlm.text.synthetic import TASKS, open_task
from pathlm.text.synthetic.words import SampleEncoder, task_tokenizer

ALL = dict.fromkeys(TASKS, 1.0)


def rows(tasks=ALL, split="train", **options):
    return TaskRows(tasks, split, **{"length": 96, "seed": 0} | options)


def documents(batch):
    """Yield (ids, labels) of every document of a batch, checking that each is one stretch of one row."""
    for ids, labels, numbers in zip(batch["input_ids"], batch["labels"], batch["document_ids"], strict=True):
        for number in dict.fromkeys(numbers[numbers >= 0].tolist()):
            places = np.flatnonzero(numbers == number)
            assert (np.diff(places) == 1).all()
            yield number, ids[places], labels[places]


def test_every_document_is_one_whole_sample_and_its_answer_is_the_target():
    source = rows()
    tokenizer, batch, seen = source.tokenizer(), source.batch(0, 40), set()
    for number, ids, labels in documents(batch):
        assert tokenizer.decode([ids[0]]) == tokenizer.decode([ids[-1]]) == "<|endoftext|>"
        words = tokenizer.decode(ids[1:-1]).split()
        equals = len(words) - words[::-1].index("=")
        assert (labels[1 + equals : -1] == ids[1 + equals : -1]).all() and len(labels) > 2 + equals
        assert (labels[: 1 + equals] == IGNORE).all() and labels[-1] == IGNORE
        assert number not in seen
        seen.add(number)
    padding = batch["document_ids"] < 0
    assert (batch["labels"][padding] == IGNORE).all()
    assert (batch["input_ids"][padding] == tokenizer.pad_token_id).all()
    assert 0 < padding.mean() < 0.3


@pytest.mark.parametrize(("labels", "counted"), [("answer", 0), ("answer-end", 1)])
def test_the_end_is_a_target_when_asked_for(labels, counted):
    for _, ids, found in documents(rows({"pointer": 1.0}, labels=labels).batch(0, 4)):
        assert (found != IGNORE).sum() == 1 + counted
        assert (found[-1] == ids[-1]) == bool(counted)


@pytest.mark.parametrize(("labels", "counted"), [("answer", 0), ("answer-end", 1)])
def test_of_several_questions_every_answer_is_a_target_and_no_other_word(labels, counted):
    made = rows({"pointer:nodes=13,encoding=pair,questions=5": 1.0}, labels=labels)
    for _, ids, found in documents(made.batch(0, 4)):
        words = made.tokenizer().convert_ids_to_tokens(ids)
        first = words.index(":") + 3
        targets = [*range(first, first + 5 * 3, 3), *([len(ids) - 1] * counted)]
        assert np.flatnonzero(found != IGNORE).tolist() == targets and (found[targets] == ids[targets]).all()


def test_all_tokens_but_the_first_are_targets_when_asked_for():
    for _, ids, found in documents(rows(labels="all").batch(0, 4)):
        assert found[0] == IGNORE and (found[1:] == ids[1:]).all()


@settings(max_examples=15, deadline=None)
@given(start=st.integers(0, 10**9), count=st.integers(1, 40), split=st.sampled_from(["train", "validation"]))
def test_a_row_is_a_function_of_its_number(start, count, split):
    whole = rows({"copy": 1.0, "compose": 2.0}, split).batch(start, count)
    fresh = rows({"copy": 1.0, "compose": 2.0}, split)
    middle = count // 2
    for name, array in fresh.batch(start + middle, count - middle).items():
        np.testing.assert_array_equal(array, whole[name][middle:])
        assert array.dtype == np.int64 and array.shape == (count - middle, 96)
    if middle:
        np.testing.assert_array_equal(fresh.batch(start, middle)["input_ids"], whole["input_ids"][:middle])


def test_weights_are_shares_of_the_samples():
    source = rows({"copy": 1.0, "pointer": 3.0, "copy:max_length=5": 1.0}, length=64)
    names = [text.split("#")[0] for text in source.describe(source.batch(0, 600))]
    shares = [names.count(name) / len(names) for name in ("copy", "pointer", "copy:max_length=5")]
    assert shares == pytest.approx([0.2, 0.6, 0.2], abs=0.04)


def test_the_end_of_a_row_favours_no_number_of_steps():
    """A greedy packer that skips what does not fit would lose long samples, which are those with many steps."""
    source = rows({"compose": 1.0}, length=64)
    comma = source.tokenizer().convert_tokens_to_ids(",")
    ks = [1 + int((ids == comma).sum()) for _, ids, _ in documents(source.batch(0, 1600))]
    assert len(ks) > 2500
    assert [ks.count(k) / len(ks) for k in range(1, 7)] == pytest.approx([1 / 6] * 6, abs=0.025)


def test_describe_names_the_samples_of_a_batch():
    source = rows({"pointer:max_k=1": 1.0})
    names = source.describe(source.batch(16, 1))
    assert names[0] == f"pointer:max_k=1#{1 << 20} k=1"


def test_a_tokenizer_survives_the_disk_and_refuses_unknown_words(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = rows({"pointer:encoding=pair": 1.0, "brackets": 1.0}).tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "pointer a>b : c times 3 = <|endoftext|> brackets ( { ="
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == text
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|pad|>")
    with pytest.raises(Exception, match="WordLevel error"):
        tokenizer("unheard")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": {"pointer": 1.0}, "length": 56}, r"data.length=56: a sample of task 'pointer' may take 57 tokens"),
        ({"tasks": {"pointr": 1.0}}, r"task 'pointr': known tasks are"),
        ({"split": "shift"}, r"split='shift'"),
        ({"tasks": {}}, r"name at least one task"),
    ],
)
def test_what_cannot_be_read_is_refused_before_training(options, message):
    with pytest.raises(ValueError, match=message):
        rows(**options)


def test_a_row_as_long_as_the_longest_sample_is_enough():
    source = rows({"pointer": 1.0}, length=57)
    assert (source.batch(0, 3)["document_ids"] >= TASK_DOCUMENTS).all()


class FakeText:
    """Rows whose every number is the row's own."""

    length, vocab_size = 96, 7

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def tokenizer(self):
        return self._tokenizer

    def batch(self, start, count):
        assert count > 0
        array = np.repeat(np.arange(start, start + count)[:, None], self.length, axis=1)
        return {"input_ids": array, "labels": array.copy(), "document_ids": array.copy()}

    def describe(self, batch):
        numbers = np.unique(batch["document_ids"])
        return [f"text {n}" for n in numbers[numbers >= 0]]


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.01, 0.99).map(lambda x: round(x, 3)), start=st.integers(0, 10**7), count=st.integers(1, 20))
def test_the_share_of_task_rows_is_exact_to_one_row_over_any_prefix(share, start, count):
    mixed = MixedRows(FakeText(None), rows({"copy": 1.0}), share=share)
    assert abs(mixed.task_rows_before(start) - start * Fraction(str(share))) < 1
    batch = mixed.batch(start, count)
    is_task = batch["document_ids"].max(axis=1) >= TASK_DOCUMENTS
    assert is_task.sum() == mixed.task_rows_before(start + count) - mixed.task_rows_before(start)
    texts = batch["input_ids"][~is_task, 0]
    first = start - mixed.task_rows_before(start)
    assert texts.tolist() == list(range(first, first + len(texts))), "no text row is skipped or repeated"


def test_a_mixture_is_a_function_of_the_row_and_describes_both_kinds():
    mixed = MixedRows(FakeText(None), rows({"copy": 1.0}), share=0.3)
    whole = mixed.batch(5, 20)
    for i in range(20):
        for name, array in mixed.batch(5 + i, 1).items():
            np.testing.assert_array_equal(array[0], whole[name][i])
    names = mixed.describe(mixed.batch(0, 5))
    assert names[:4] == ["text 0", "text 1", "text 2", "text 3"] and names[4] == "copy#0 k=1"


def test_open_rows_reads_tasks_without_a_corpus():
    source = open_rows(DataConfig(task_share=1.0, tasks={"copy": 1.0}, length=64), "validation", seed=3)
    assert source.length == 64 and source.vocab_size == len(source.tokenizer())
    assert source.batch(0, 2)["input_ids"].shape == (2, 64)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small prepared corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": f"Document {i} tells of {i * i} things and of no others. " * 5}) for i in range(200)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    source = SourceConfig(path=str(folder / "text.jsonl"))
    prepare(PrepareConfig(out=str(folder / "out"), sources=[source], vocab_size=400, workers=1))
    return folder / "out"


def test_open_rows_mixes_a_corpus_with_tasks_in_its_own_tokenizer(corpus):
    data = DataConfig(corpus=str(corpus), length=160, task_share=0.25, tasks={"pointer:nodes=5,max_k=2": 1.0, "copy:max_length=6": 1.0})
    for split in ("train", "validation"):
        source = open_rows(data, split, seed=1)
        batch = source.batch(3, 8)
        is_task = batch["document_ids"].max(axis=1) >= TASK_DOCUMENTS
        assert is_task.tolist() == [True, False, False, False, True, False, False, False]
        text = source.tokenizer().decode(batch["input_ids"][0])
        assert "pointer" in text or "copy :" in text
        assert "things and of no others" in source.tokenizer().decode(batch["input_ids"][1])
        assert batch["input_ids"].max() < source.vocab_size
        assert any(name.startswith("pointer:") for name in source.describe(batch))
        assert any("text.jsonl" in name or "text" in name for name in source.describe(batch))
    only_text = open_rows(DataConfig(corpus=str(corpus), length=64), "train", seed=1)
    assert (only_text.batch(0, 4)["document_ids"] < TASK_DOCUMENTS).all()
    only_tasks = open_rows(DataConfig(corpus=str(corpus), length=160, task_share=1.0, tasks=data.tasks), "train", seed=1)
    assert only_tasks.vocab_size == only_text.vocab_size


def test_samples_are_written_with_the_corpus_tokenizer():
    """Byte-level tokenizers write a sample as text, and the answer's tokens are still known."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import TokenizersBackend

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<|endoftext|>"])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = TokenizersBackend(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    source = rows({"pointer:nodes=5,max_k=2": 1.0, "transform:max_length=6": 1.0}, length=160, tokenizer=tokenizer)
    for _, ids, labels in documents(source.batch(0, 16)):
        text = tokenizer.decode(ids[1:-1])
        prompt, _, answer = text.partition(" =")
        assert tokenizer.decode(labels[labels != IGNORE]) == answer and answer.startswith(" ")
        assert prompt.split()[0] in ("pointer", "transform")
    assert SampleEncoder(tokenizer, [open_task("copy")]).longest(open_task("copy")) == 2 + 35 * 2 + 3
    with pytest.raises(ValueError, match=r"data.length=40: a sample of task 'copy' may take 75 tokens"):
        rows({"copy": 1.0}, length=40, tokenizer=tokenizer)


def test_a_tokenizer_that_cannot_write_a_task_is_refused():
    with pytest.raises(ValueError, match=r"cannot write 'pointer', which task 'pointer' needs"):
        rows({"pointer": 1.0}, tokenizer=task_tokenizer([open_task("copy")]))
