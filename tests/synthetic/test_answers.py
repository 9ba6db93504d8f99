"""Every answer, and every k, is recomputed from the text of the sample alone by an interpreter that shares no code with the generator."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathlm.text.synthetic import TASKS, open_task, samples

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VARIANTS = [
    "copy",
    "copy:alphabet=40,min_length=1,max_length=3",
    "reverse",
    "reverse:max_length=4",
    "transform",
    *(f"transform:operation={name},min_length=1" for name in ("rotate", "swap", "double", "thin", "next")),
    "brackets",
    "brackets:kinds=4,max_open=1,max_k=3,length=7",
    "brackets:kinds=2,max_open=9,max_k=2,length=60",
    "arithmetic",
    "arithmetic:modulus=97,max_k=9",
    "arithmetic:modulus=5,max_k=3",
    "rewrite",
    "rewrite:untouched=1,alphabet=14",
    "rewrite:untouched=5,max_k=9",
    "repeat",
    "repeat:encoding=pair,min_length=1,max_length=2,nodes=13",
    "pointer",
    "pointer:encoding=pair,order=sorted,nodes=13,alphabet=13",
    "pointer:order=sorted,nodes=60,alphabet=80,max_k=29",
    "compose",
    "compose:start=first,size=3,max_k=8",
]


def solve(text: str) -> tuple[list[str], int]:
    """Return the answer and the number of steps, read off the prompt."""
    prompt = text.split(" = ")[0].removesuffix(" =")
    task, _, rest = prompt.partition(" ")
    return {
        "copy": lambda: (word_of(rest), 1),
        "reverse": lambda: ([*reversed(word_of(rest))], 1),
        "transform": lambda: (transform(rest), 1),
        "brackets": lambda: brackets(rest.removeprefix(": ").split()),
        "arithmetic": lambda: arithmetic(rest),
        "rewrite": lambda: rewrite(rest),
        "repeat": lambda: chase(rest, moves=True),
        "pointer": lambda: chase(rest, moves=False),
        "compose": lambda: compose(rest),
    }[task]()


def word_of(rest: str) -> list[str]:
    return rest.partition(": ")[2].split()


def transform(rest: str) -> list[str]:
    word = word_of(rest)
    match rest.split()[0]:
        case "rotate":
            return [word[(i + 1) % len(word)] for i in range(len(word))]
        case "swap":
            return [word[i ^ 1] if (i ^ 1) < len(word) else word[i] for i in range(len(word))]
        case "double":
            return [word[i // 2] for i in range(2 * len(word))]
        case "thin":
            return [symbol for i, symbol in enumerate(word) if i % 2 == 0]
        case "next":
            return [LETTERS[(LETTERS.index(symbol) + 1) % 26] for symbol in word]
    raise AssertionError(rest)


def brackets(prompt: list[str]) -> tuple[list[str], int]:
    left, rounds = "".join(prompt), 0
    while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", left)) != left:
        left, rounds = shorter, rounds + 1
    assert not set(left) & set(")]}>")
    return [{"(": ")", "[": "]", "{": "}", "<": ">"}[bracket] for bracket in reversed(left)], rounds


def arithmetic(rest: str) -> tuple[list[str], int]:
    match = re.fullmatch(r"mod (\d+) : ([\d()+* -]+)", rest)
    assert match is not None
    modulus, expression = int(match[1]), match[2]
    operators = re.findall(r"[-+*]", expression)
    numbers = [int(number) for number in re.findall(r"\d+", expression)]
    assert all((a == "*") != (b == "*") for a, b in pairwise(operators)), "neighbouring steps could be merged"
    assert all(0 < n < modulus and (op != "*" or n > 1) for op, n in zip(operators, numbers[1:], strict=True)), "a step does nothing"
    return [str(eval(expression) % modulus)], len(operators)


def rewrite(rest: str) -> tuple[list[str], int]:
    stated, _, word_text = rest.partition(" : ")
    rules = re.findall(r"(\w+) (\w+) > (\w+)", stated)
    assert " ".join(f"{u} {v} > {z}" for u, v, z in rules) == stated
    word, steps = word_text.split(), 0
    while fits := [(i, z) for i, pair in enumerate(pairwise(word)) for u, v, z in rules if pair == (u, v)]:
        assert len(fits) == 1, "the order of rewriting must not be a choice"
        (place, symbol), steps = fits[0], steps + 1
        word[place : place + 2] = [symbol]
    assert len(rules) == 2 * steps + 1
    return word, steps


def read_map(stated: str) -> dict[str, str]:
    pairs = re.findall(r"(\w+) ?> ?(\w+)", stated)
    successor = dict(pairs)
    assert len(successor) == len(pairs)
    seen, node = set(), pairs[0][0]
    while node not in seen:
        seen.add(node)
        node = successor[node]
    assert seen == set(successor), "the map must be one cycle"
    return successor


def chase(rest: str, *, moves: bool) -> tuple[list[str], int]:
    stated, _, question = rest.partition(" : ")
    successor = read_map(stated)
    *word, times, k = question.split()
    assert times == "times" and len(successor) > 2 * int(k)
    for _ in range(int(k)):
        word = [successor[symbol] for symbol in word]
        word = [*word[1:], word[0]] if moves else word
    return word, int(k)


def chase_all(text: str) -> list[tuple[tuple[str, ...], int]]:
    """Return the answer and the number of steps of every question about one map, read off the whole sample."""
    stated, _, asked = text.removeprefix("pointer ").partition(" : ")
    successor = read_map(stated)
    words, found = asked.split(), []
    assert len(words) % 3 == 0
    for k, node in zip(words[::3], words[1::3], strict=True):
        for _ in range(int(k)):
            node = successor[node]
        found.append(((node,), int(k)))
    return found


def compose(rest: str) -> tuple[list[str], int]:
    first, _, second = rest.partition(" : ")
    question, stated = (first, second) if first.startswith("start") else (second, first)
    element = question.removeprefix("start ")
    permutations = [permutation.split() for permutation in stated.split(" , ")]
    for images in permutations:
        assert sorted(images) == list(LETTERS[: len(images)])
        element = images[LETTERS.index(element)]
    return [element], len(permutations)


@pytest.mark.parametrize("spec", VARIANTS)
@settings(max_examples=60, deadline=None)
@given(index=st.integers(0, 2**64 - 1), seed=st.integers(0, 2**32), split=st.sampled_from(["train", "validation", "test"]))
def test_answers_and_steps_follow_from_the_text_alone(spec, index, seed, split):
    sample = samples(spec, split, seed=seed).sample(index)
    answer, k = solve(sample.text)
    assert (list(sample.answer), sample.k) == (answer, k)
    assert sample.task == spec.split(":")[0]


DENSE = [
    "pointer:questions=5",
    "pointer:encoding=pair,alphabet=13,nodes=13,questions=16",
    "pointer:order=sorted,questions=2,min_k=2,max_k=4",
]


@pytest.mark.parametrize("spec", DENSE)
@settings(max_examples=60, deadline=None)
@given(index=st.integers(0, 2**64 - 1), seed=st.integers(0, 2**32), split=st.sampled_from(["train", "validation", "test"]))
def test_every_question_about_a_map_has_the_answer_and_the_steps_that_follow_from_the_text(spec, index, seed, split):
    stream = samples(spec, split, seed=seed)
    sample = stream.sample(index)
    assert [(question.answer, question.k) for question in sample.questions] == chase_all(sample.text)
    assert len(sample.questions) == stream.task.questions and sample.k == sample.questions[0].k
    written = sample.text.split()
    assert len(written) == stream.task.longest() and set(stream.task.words()).issuperset(written)


def test_further_questions_draw_their_steps_evenly_whatever_the_first_is():
    stream = samples("pointer:questions=5")
    drawn = [question.k for index in range(300) for question in stream.sample(index, k=6).more]
    assert {k: drawn.count(k) for k in range(1, 7)} == pytest.approx(dict.fromkeys(range(1, 7), 200), abs=60)


@pytest.mark.parametrize("spec", VARIANTS)
def test_words_and_lengths_stay_within_what_the_task_declares(spec):
    stream = samples(spec)
    words, longest, seen = set(stream.task.words()), stream.task.longest(), set()
    for index in range(400):
        sample = stream.sample(index)
        assert words.issuperset(sample.prompt) and words.issuperset(sample.answer)
        assert len(sample.prompt) + len(sample.answer) <= longest
        assert sample.answer, "a sample without an answer teaches nothing"
        seen.add(len(sample.prompt) + len(sample.answer))
    tight = {"brackets", "transform"}  # their longest samples are too rare to meet in 400
    assert max(seen) == longest or sample.task in tight


@pytest.mark.parametrize("name", TASKS)
def test_every_k_occurs_equally_often_and_can_be_asked_for(name):
    stream = samples(name)
    ks = stream.task.ks
    drawn = [stream.sample(i).k for i in range(200 * len(ks))]
    assert {k: drawn.count(k) for k in ks} == pytest.approx(dict.fromkeys(ks, 200), abs=60)
    assert all(stream.sample(i, k=k).k == k for i in range(20) for k in ks)
    with pytest.raises(ValueError, match=f"k={ks[-1] + 1}: {name} has samples with k from"):
        stream.sample(0, k=ks[-1] + 1)


@pytest.mark.parametrize("name", ["pointer", "compose", "repeat", "arithmetic", "rewrite"])
def test_answers_are_spread_so_that_guessing_does_not_pay(name):
    stream = samples(name)
    for k in (1, stream.task.ks[-1]):
        answers = [stream.sample(i, k=k).answer for i in range(1000)]
        most = max(answers.count(answer) for answer in set(answers))
        assert most <= {"compose": 260, "arithmetic": 150}.get(name, 80)


def test_an_option_named_difficulty_is_what_the_page_says():
    def difficulties(spec):
        return {samples(spec).sample(i).difficulty for i in range(300)}

    assert difficulties("copy:min_length=3,max_length=5") == {3, 4, 5}
    assert difficulties("pointer:nodes=20") == {20}
    assert difficulties("compose:size=4") == {4}
    assert difficulties("arithmetic:modulus=7") == {7}
    assert difficulties("rewrite:max_k=3") == {3, 5, 7}
    assert difficulties("repeat") == {2, 3, 4, 5, 6}
    for index in range(100):
        sample = samples("brackets").sample(index)
        assert sample.difficulty == len(sample.prompt) - 3


def test_open_task_reads_options_from_the_name_and_from_keywords_alike():
    assert open_task("pointer:nodes=20,encoding=pair") == open_task("pointer", nodes=20, encoding="pair")
    assert open_task("pointer:encoding=pair,nodes=20").spec == "pointer:nodes=20,encoding=pair"
    assert open_task("pointer:nodes=16").spec == "pointer"
    assert open_task(open_task("repeat:max_k=3").spec) == open_task("repeat:max_k=3")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pointr", r"task 'pointr': known tasks are copy, reverse"),
        ("pointer:nodes=12", r"nodes=12: must exceed 2 \* max_k=12"),
        ("pointer:nodes=30", r"alphabet=26: must lie between 30 \(nodes\) and 702"),
        ("pointer:hops=3", r"Pointer has no option hops; it has alphabet"),
        ("pointer:order=random", r"order='random': must be one of shuffled, sorted"),
        ("pointer:nodes=many", r"nodes='many': must be a whole number"),
        ("pointer:nodes", r"'nodes' must have the form name=value"),
        ("pointer:max_k=0", r"max_k=0: must not be below min_k=1"),
        ("pointer:min_k=0", r"min_k=0: must be at least 1"),
        ("pointer:questions=0", r"questions=0: must be at least 1"),
        ("copy:min_length=9,max_length=8", r"max_length=8: must not be below min_length=9"),
        ("copy:alphabet=1", r"alphabet=1: must lie between 2"),
        ("arithmetic:modulus=10", r"modulus=10: must be a prime number"),
        ("brackets:length=15", r"length=15: max_k=6 and max_open=4 need at least 16"),
        ("brackets:kinds=5", r"kinds=5: must lie between 2 and 4"),
        ("rewrite:max_k=12", r"alphabet=26: must lie between 27"),
        ("rewrite:untouched=0", r"untouched=0: must be at least 1"),
        ("compose:size=2", r"size=2: must lie between 3 and 26"),
    ],
)
def test_bad_options_are_refused_by_name_value_and_rule(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_task(spec)
    assert str(caught.value).startswith(f"task {spec!r}: ")


def test_an_option_given_twice_is_refused():
    with pytest.raises(ValueError, match="nodes is given twice"):
        open_task("pointer:nodes=20", nodes=24)


def test_the_samples_on_the_page_are_right():
    page = (Path(__file__).parents[2] / "docs" / "synthetic.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)` \| `([^`]*) = ([^`]*)` \|", page, flags=re.MULTILINE)
    assert [task for task, _, _ in shown] == list(TASKS)
    assert [(prompt, " ".join(solve(f"{prompt} =")[0])) for _, prompt, _ in shown] == [(prompt, answer) for _, prompt, answer in shown]
