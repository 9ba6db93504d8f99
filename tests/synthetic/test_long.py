"""Tasks with filler: answers follow from the text alone, every prompt has the length asked for, and splits stay apart whatever the hay."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathlm.text.mixture import TaskRows
from pathlm.text.synthetic import LONG_TASKS, open_task, samples
from pathlm.text.synthetic.draws import Draws
from pathlm.text.synthetic.long import HAY
from pathlm.text.synthetic.words import SampleEncoder, task_tokenizer

VARIANTS = [
    "needle",
    "needle:length=14,keys=1,digits=2",
    "needle:length=90,keys=6,values=2,digits=1,hay=text",
    "needle:length=80,keys=5,questions=3,digits=2",
    "needle:length=700,keys=60,alphabet=90",
    "hops",
    "hops:length=60,nodes=7,max_k=3,encoding=pair,hay=text",
    "hops:length=100,nodes=9,order=sorted,max_k=2,questions=4",
    "variables",
    "variables:length=40,chains=1,max_k=4,digits=3,hay=text",
    "variables:length=90,chains=4,max_k=3,digits=1,ask=names",
    "sum",
    "sum:length=64,digits=3,max_k=5,answer=running",
    "sum:length=40,digits=2,max_k=4,order=units-first,hay=text",
    "program",
    "program:length=300,ask=trace,variables=5,modulus=97,max_k=20",
    "program:length=128,ask=state,variables=2,modulus=3,hay=text",
]


def solve(task, text):
    """Return the answer and the number of steps of the question that a text ends with."""
    question = text.rpartition(" ? ")[2]
    if task.name == "program":
        return interpret(text, question, task.modulus)
    if task.name == "sum":
        return add_up(text, task)
    return {"needle": needle, "hops": hops, "variables": variables}[task.name](text, question)


def needle(text, question):
    hidden = re.findall(r"# ([a-z]+)((?: \d)+)", text)
    return [digit for key, digits in hidden if key == question.split()[-1] for digit in digits.split()], 1


def hops(text, question):
    successor = dict(re.findall(r"(\b[a-z]{1,2}) ?> ?([a-z]{1,2}\b)", text))
    single = re.search(r": ([a-z]+) times (\d+) =$", text)
    node, k = (single[1], int(single[2])) if single else (text.split()[-1], int(text.split()[-2]))
    for _ in range(k):
        node = successor[node]
    return [node], k


def variables(text, question):
    held, copies = {}, {}
    for name, value in re.findall(r"# ([a-z]+) = ((?:\d(?: \d)*\b)|[a-z]+)", text):
        assert name not in held, "assigned twice"
        held[name], copies[name] = (held[value], copies[value] + 1) if value in held else (value, 0)
    asked = question.removesuffix(" =")
    if asked in held:
        return held[asked].split(), copies[asked]
    return [name for name in held if held[name] == asked], max(copies[name] for name in held if held[name] == asked)


def add_up(text, task):
    numbers = [int(digits.replace(" ", "")) for digits in re.findall(r"\+((?: \d)+)", text)]
    sums = [sum(numbers[: i + 1]) for i in range(1, len(numbers))]
    width = len(str(int("9" * task.digits) * (task.max_k + 1)))
    texts = [f"{total:0{width}d}" for total in (sums if task.answer == "running" else sums[-1:])]
    return list("".join(text if task.order == "units-last" else text[::-1] for text in texts)), len(sums)


def interpret(text, question, modulus):
    held, trace = {}, []
    lines = re.findall(r"# (?:repeat (\d+) |if ([a-z]) > ([a-z]) : )?([a-z]) (\+=|-=|=) ([a-z]\b|\d+)", text)
    assert len(lines) == text.split().count("#")
    for times, one, other, name, operator, operand in lines:
        if name not in held:
            held[name] = int(operand)
            continue
        for _ in range(int(times or 1)):
            if not one or held[one] > held[other]:
                value = int(operand) if operand.isdigit() else held[operand]
                held[name] = {"=": value, "+=": held[name] + value, "-=": held[name] - value}[operator] % modulus
            trace.append(held[name])
    asked = question.removesuffix(" =")
    answer = [held[name] for name in sorted(held)] if asked == "state" else trace if asked == "trace" else [held[asked]]
    return [str(value) for value in answer], len(trace)


@pytest.mark.parametrize("spec", VARIANTS)
@settings(max_examples=40, deadline=None)
@given(index=st.integers(0, 2**64 - 1), seed=st.integers(0, 2**32), split=st.sampled_from(["train", "validation", "test"]))
def test_answers_and_steps_follow_from_the_text_alone(spec, index, seed, split):
    stream = samples(spec, split, seed=seed)
    sample, text = stream.sample(index), ""
    for question in sample.questions:
        text = f"{text} {' '.join(question.prompt)}".strip()
        assert (list(question.answer), question.k) == solve(stream.task, text)
        text = f"{text} {' '.join(question.answer)}"
    assert sample.task == spec.partition(":")[0]


@pytest.mark.parametrize("spec", VARIANTS)
def test_prompts_have_one_length_and_the_longest_sample_is_as_long_as_the_row(spec):
    stream = samples(spec)
    words = set(stream.task.words())
    drawn = [stream.sample(index) for index in range(200)]
    assert len({len(sample.prompt) for sample in drawn}) == 1, "the length of a prompt must tell nothing"
    lengths = {2 + len(sample.text.split()) for sample in drawn}
    assert max(lengths) == stream.task.length and stream.task.longest() == stream.task.length - 2
    assert all(words.issuperset(sample.text.split()) for sample in drawn)


@pytest.mark.parametrize("name", LONG_TASKS)
@pytest.mark.parametrize("length", [200, 1000])
def test_what_is_stated_lies_all_over_the_hay(name, length):
    """The longest stretch of hay is where needles would never be, were they at one end."""
    stream = samples(f"{name}:length={length}")
    marks = {"hops": ">", "sum": "+"}.get(name, "#")
    places = [place / length for index in range(100) for place, word in enumerate(stream.sample(index).prompt) if word == marks]
    counts = np.histogram(places, bins=5, range=(0, 1))[0]
    assert counts.min() > 0.5 * counts.mean()


def test_hay_is_words_in_random_order_or_whole_sentences():
    words, text = (
        [" ".join(samples(f"needle:length=400,hay={hay}").sample(index).prompt) for index in range(20)] for hay in ("words", "text")
    )
    assert all("rain fell and the road was wet ." in prompt for prompt in text)
    assert not any("rain fell and the road was wet ." in prompt for prompt in words)
    assert {before for prompt in text for before in re.findall(r"(\S+) #", prompt)} <= {".", "needle", *"0123456789"}, "inside a sentence"
    assert len({prompt.split()[1] for prompt in (*words, *text)}) > 10


def test_no_word_of_the_hay_means_something_to_a_task():
    for name in LONG_TASKS:
        others = open_task(name, **({"alphabet": 702} if "alphabet" in open_task(name).__dataclass_fields__ else {})).words()
        assert len(others) == len(set(others)), f"{name}: a word of the hay is a word of the task"
    assert all(len(word) > 2 or word == "." for word in HAY)


@pytest.mark.parametrize(
    ("spec", "k"),
    [("needle:keys=1,digits=2,length=24,alphabet=700", 1), ("variables:chains=1,max_k=1,length=20", 1), ("sum:length=40,max_k=4", 4)],
)
def test_what_is_stated_and_asked_is_held_out_whatever_the_hay(spec, k):
    def stated(split, seed, count):
        drawn = (samples(spec, split, seed=seed).sample(index, k=k) for index in range(count))
        return {tuple(word for word in sample.prompt if word not in HAY) for sample in drawn}

    task = open_task(spec)
    assert task.held_out(k)
    trained, again = stated("train", 0, 4000), stated("train", 1, 4000)
    assert trained & again, "the space is too large for this test to mean anything"
    assert not (stated("validation", 0, 1000) | stated("test", 1, 1000)) & (trained | again)


@pytest.mark.parametrize(
    ("spec", "k"),
    [
        ("needle:keys=1,digits=1,length=12,alphabet=3", 1),
        ("variables:chains=1,max_k=1,digits=1,length=16,alphabet=3", 1),
        ("sum:max_k=1,length=16", 1),
        ("hops:nodes=3,max_k=1,alphabet=4,length=24", 1),
    ],
)
def test_the_declared_number_of_prompts_is_not_more_than_there_are(spec, k):
    task = open_task(spec)
    met = {tuple(w for w in samples(spec).sample(i, k=k).prompt if w not in HAY) for i in range(4000)}
    assert len(met) >= task.prompts(k) > 1


@pytest.mark.parametrize("name", LONG_TASKS)
def test_rows_are_filled_by_samples_and_answers_are_targets(name):
    spec = f"{name}:length=128"
    rows = TaskRows({spec: 1.0}, "train", length=128, seed=0)
    batch = rows.batch(0, 20)
    tokenizer = rows.tokenizer()
    documents = [set(ids[ids >= 0]) for ids in batch["document_ids"]]
    assert all(len(found) == 1 for found in documents)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        text = tokenizer.decode(ids[ids != tokenizer.pad_token_id][1:-1])
        answer = tokenizer.decode(labels[labels >= 0])
        assert text.endswith(answer) and answer


def test_a_tokenizer_that_splits_words_is_told_the_longest_a_sample_may_be():
    task = open_task("needle:length=40,keys=2")
    assert SampleEncoder(task_tokenizer([task]), [task]).longest(task) == 40


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("needle:length=20", "length=20: must be at least 33: 24 words of statements, 7 around them, a start and an end"),
        ("hops:length=56", "length=56: must be at least 57"),
        ("variables:length=49", r"length=49: must be at least 50"),
        ("sum:length=23", "length=23: must be at least 24"),
        ("program:length=90", "length=90: must be at least 91"),
        ("needle:keys=0", "keys=0: must be at least 1"),
        ("needle:keys=2,questions=3", "questions=3: must not be above keys=2"),
        ("needle:keys=30", r"alphabet=26: must lie between 30 \(keys\)"),
        ("needle:hay=grass", "hay='grass': must be one of words, text"),
        ("variables:digits=0", "digits=0: must lie between 1 and 9"),
        ("variables:chains=11,digits=1", "chains=11: must lie between 1 and 10"),
        ("variables:max_k=20", r"alphabet=26: must lie between 42 \(chains \* \(max_k \+ 1\)\)"),
        ("sum:digits=0", "digits=0: must be at least 1"),
        ("program:variables=1", "variables=1: must lie between 2 and 26"),
        ("program:modulus=2", "modulus=2: must lie between 3 and 999"),
        ("hops:nodes=12", r"nodes=12: must exceed 2 \* max_k=12"),
    ],
)
def test_lengths_and_options_that_cannot_be_are_refused_by_name_value_and_rule(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_task(spec)
    assert str(caught.value).startswith(f"task {spec!r}: ")


@pytest.mark.parametrize("spec", VARIANTS)
def test_the_least_length_holds_every_sample(spec):
    task = open_task(spec)
    name, _, options = spec.partition(":")
    others = [option for option in options.split(",") if option and not option.startswith("length=")]
    least = 2 + task.frame + task.most_stated
    stream = samples(f"{name}:{','.join([*others, f'length={least}'])}")
    assert all(stream.sample(index).prompt for index in range(100))
    with pytest.raises(ValueError, match=f"length={least - 1}: must be at least {least}"):
        open_task(f"{name}:{','.join([*others, f'length={least - 1}'])}")


def test_many_draws_are_uniform_and_follow_the_index():
    draws = Draws("many")
    draws.seek(3)
    drawn = draws.many("abcdefg", 70_000)
    assert all(abs(drawn.count(letter) - 10_000) < 500 for letter in "abcdefg") and draws.many("ab", 0) == []
    draws.seek(3)
    assert draws.many("abcdefg", 100) == drawn[:100] != [b for a, b in pairwise(drawn[:101])]


def test_the_samples_on_the_page_are_right():
    page = (Path(__file__).parents[2] / "docs" / "synthetic.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)` \| `([^`]*)` → `([^`]*)` \|", page, flags=re.MULTILINE)
    assert list(dict.fromkeys(task for task, _, _ in shown)) == list(LONG_TASKS)
    for name, prompt, answer in shown:
        task = open_task(name, **({"max_k": 2} if name == "sum" else {}))
        assert solve(task, prompt)[0] == answer.split(), name
