"""Multiple choice by likelihood: which of several continuations a model finds likeliest, and question sets made from plain text."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from pathlm.evaluate.checkpoint import evaluating, start_token
from pathlm.evaluate.lm import reach
from pathlm.evaluate.subject import Measure, Subject, at_once
from pathlm.evaluate.synthetic import interval
from pathlm.text.corpus import Corpus
from pathlm.text.synthetic.draws import Draws

NORMALISATIONS = ("raw", "per_byte", "per_token")
_LONGEST_SENTENCE = 400
_CONTEXT_SENTENCES = 3


@dataclass(frozen=True, slots=True)
class Question:
    """A context, continuations to choose from, and the number of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class ChoiceScore:
    """How often the right continuation was the likeliest, under one way of comparing long with short ones."""

    normalisation: str
    """`raw`: log-likelihood; `per_byte`: divided by the choice's UTF-8 bytes; `per_token`: divided by its tokens."""
    correct: int
    questions: int
    accuracy: float
    low: float
    """Lower end of the 95 % interval (Wilson)."""
    high: float
    chance: float
    """Expected accuracy of guessing."""

    def row(self) -> dict[str, Any]:
        """Return the fields as plain values, ready for a table or JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Log-likelihood of a continuation in nats, whether greedy decoding would write it, and its number of tokens."""

    logprob: float
    greedy: bool
    tokens: int


def score_choices(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    delimiter: str = " ",
    context: int | None = None,
    batch_size: int = 16,
) -> list[ChoiceScore]:
    """Let a causal language model choose; return its accuracy under each normalisation.

    `delimiter` stands between context and choice ("" for languages written without spaces). `context` limits the tokens that the model sees
    (default: its `max_position_embeddings`); what is too long loses its beginning. Equal scores go to the first choice.
    """
    if not questions:
        raise ValueError("questions=[]: there must be at least one")
    pairs = [encode_pair(tokenizer, q.context, delimiter + choice) for q in questions for choice in q.choices]
    found = iter(likelihoods(model, pairs, context=context, batch_size=batch_size))
    correct = dict.fromkeys(NORMALISATIONS, 0)
    for question in questions:
        answers = [next(found) for _ in question.choices]
        sizes = [len(choice.encode()) for choice in question.choices]
        scores = {
            "raw": [a.logprob for a in answers],
            "per_byte": [a.logprob / size for a, size in zip(answers, sizes, strict=True)],
            "per_token": [a.logprob / a.tokens for a in answers],
        }
        for name, values in scores.items():
            correct[name] += values.index(max(values)) == question.answer
    count, chance = len(questions), sum(1 / len(q.choices) for q in questions) / len(questions)
    return [ChoiceScore(name, right, count, right / count, *interval(right, count), chance) for name, right in correct.items()]


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a context, from the start token on, and of its continuation, as they are when written in one go.

    Spaces at the end of the context belong to the continuation: tokenizers join a space to the word after it.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    start = start_token(tokenizer)
    if start is None:
        raise ValueError(f"tokenizer={type(tokenizer).__name__}: has neither bos_token nor eos_token to start a text with")
    whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    before = tokenizer(context, add_special_tokens=False)["input_ids"] if context else []
    if not whole[len(before) :]:
        raise ValueError(f"continuation={continuation!r}: has no token of its own after the context")
    return [start, *whole[: len(before)]], whole[len(before) :]


def likelihoods(
    model: Any, pairs: Sequence[tuple[list[int], list[int]]], *, context: int | None = None, batch_size: int = 16
) -> list[Likelihood]:
    """Return the likelihood of each continuation after its context, both as tokens. Contexts that are too long lose their beginning.

    Raises `ValueError` when a continuation alone is longer than `context`, and for a likelihood that is no number.
    """
    context, _ = reach(model, context)
    if longest := max((len(after) for _, after in pairs if len(after) > context), default=0):
        raise ValueError(f"context={context}: a continuation of {longest} tokens does not fit")
    found: list[Likelihood | None] = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    with evaluating(model), torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            for i, likelihood in zip(batch, _forward(model, [pairs[i] for i in batch], context), strict=True):
                if math.isnan(likelihood.logprob):
                    raise ValueError("the log-likelihood of a continuation is nan: the model is broken or its precision is too low")
                found[i] = likelihood
    return [likelihood for likelihood in found if likelihood is not None]


def _forward(model: Any, pairs: list[tuple[list[int], list[int]]], context: int) -> Iterator[Likelihood]:
    fed = [(before + after)[-(context + 1) : -1] for before, after in pairs]
    width = max(map(len, fed))
    input_ids, attention_mask = torch.zeros((2, len(fed), width), dtype=torch.long)
    for i, tokens in enumerate(fed):
        input_ids[i, : len(tokens)] = torch.tensor(tokens)
        attention_mask[i, : len(tokens)] = 1
    logits = model(input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device)).logits
    for row, tokens, (_, after) in zip(logits, fed, pairs, strict=True):
        due = torch.tensor(after, device=row.device)
        places = row[len(tokens) - len(after) : len(tokens)]
        precise = places.double() if places.dtype == torch.float64 else places.float()
        logprobs = precise.log_softmax(dim=-1).gather(1, due[:, None])
        yield Likelihood(float(logprobs.double().sum()), bool((places.argmax(dim=-1) == due).all()), len(after))


def read_questions(file: Path | str) -> list[Question]:
    """Read JSON lines `{"context": …, "choices": […], "answer": number}`. Raises `ValueError` naming file, line and what is wrong."""
    questions = []
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    questions.append(_question(json.loads(line)))
                except (KeyError, TypeError, ValueError) as error:
                    what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                    raise ValueError(f"{file}, line {number}: {what}") from error
    if not questions:
        raise ValueError(f"{file}: holds no question")
    return questions


def _question(row: dict[str, Any]) -> Question:
    context, choices, answer = row["context"], row["choices"], row["answer"]
    if not isinstance(context, str) or not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("context must be text and choices a list of texts that are not empty")
    if len(choices) < 2:
        raise ValueError(f"choices={choices!r}: there must be at least 2")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"answer={answer!r}: must be a number from 0 to {len(choices) - 1}")
    return Question(context, tuple(choices), answer)


def write_questions(file: Path | str, questions: Iterable[Question]) -> None:
    """Write what `read_questions` reads."""
    with open(file, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(asdict(question), ensure_ascii=False) + "\n" for question in questions)


def corpus_texts(corpus: Corpus, split: str) -> Iterator[str]:
    """Yield the documents of a split as text."""
    tokenizer = corpus.tokenizer()
    for record in corpus.documents(split):
        yield str(tokenizer.decode(corpus.document_tokens(split, record.number)[1:-1]))


def next_sentence(texts: Iterable[str], *, count: int, seed: int = 0, rivals: int = 3) -> list[Question]:
    """Make questions "which sentence comes next?" after up to three sentences of a text; the rivals are from elsewhere in the same text.

    The same texts and seed give the same questions. Raises `ValueError` when no text has enough sentences.
    """
    return _make(texts, _next_sentence, count=count, seed=seed, rivals=rivals, needs=2 + 2 * _CONTEXT_SENTENCES + rivals)


def shuffled_sentence(texts: Iterable[str], *, count: int, seed: int = 0) -> list[Question]:
    """Make questions "which is the sentence?" between a sentence and its words in random order, after the sentences before it.

    Sentences written without spaces are shuffled by character. Raises `ValueError` when no text has enough sentences.
    """
    return _make(texts, _shuffled_sentence, count=count, seed=seed, rivals=1, needs=2 + _CONTEXT_SENTENCES)


def sentences(text: str) -> list[str]:
    """Split a text into sentences of 5 or more words, or characters where there are no spaces, and at most 400 characters."""
    parts = (" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n+", text))
    return [part for part in parts if len(_units(part)) >= 5 and len(part) <= _LONGEST_SENTENCE]


def _units(sentence: str) -> list[str]:
    return sentence.split() if " " in sentence else list(sentence)


def _make(texts: Iterable[str], make: Any, *, count: int, seed: int, rivals: int, needs: int) -> list[Question]:
    if count < 1:
        raise ValueError(f"count={count}: must be at least 1")
    if rivals < 1:
        raise ValueError(f"rivals={rivals}: must be at least 1")
    usable = [found for text in texts if len(set(found := sentences(text))) >= needs]
    if not usable:
        raise ValueError(f"texts: none has {needs} different sentences of 5 to {_LONGEST_SENTENCE} characters or words")
    draws = Draws("pathlm questions", make.__name__, seed)
    questions = []
    for index in range(count):
        draws.seek(index)
        text = draws.pick(usable)
        place = draws.between(_CONTEXT_SENTENCES, len(text) - 1)
        true, wrong = text[place], make(draws, text, place, rivals)
        choices = draws.several([true, *wrong], 1 + len(wrong))
        questions.append(Question(" ".join(text[place - _CONTEXT_SENTENCES : place]), tuple(choices), choices.index(true)))
    return questions


def _next_sentence(draws: Draws, text: list[str], place: int, rivals: int) -> list[str]:
    near = {*text[place - _CONTEXT_SENTENCES : place + 1 + _CONTEXT_SENTENCES]}
    return draws.several(list(dict.fromkeys(sentence for sentence in text if sentence not in near)), rivals)


def _shuffled_sentence(draws: Draws, text: list[str], place: int, rivals: int) -> list[str]:
    units = _units(text[place])
    joint = " " if " " in text[place] else ""
    for _ in range(100):
        shuffled = joint.join(draws.several(units, len(units)))
        if shuffled != text[place]:
            return [shuffled]
    return [joint.join(units[::-1] if units[::-1] != units else ["…", *units])]


def prepare(
    subject: Subject,
    corpus: Path | str | None = None,
    *,
    questions: Path | str | None = None,
    samples: int = 200,
    split: str = "validation",
    seed: int = 0,
    context: int | None = None,
    batch: int = 16,
) -> Measure:
    """Make ready to let a model choose: among the answers of a file of questions, or of questions made from the text of a corpus.

    Args:
        subject: The model.
        corpus: A prepared corpus to make questions from; by default the one the run was trained on.
        questions: A file of questions (see `read_questions`) instead.
        samples: Questions of each kind that are made, or the first so many of the file.
        split: Which part of the corpus.
        seed: Of the questions that are made.
        context: Tokens the model sees at most; by default its `max_position_embeddings`.
        batch: Sequences that run at once.

    Measuring returns the content that is also written to `choices.json` of the run (or model) folder, under the split's name, or the
    file's: `rows`, the fields of `ChoiceScore` with the `set` of questions.

    Raises `ValueError` for files that hold no questions and text without enough sentences.
    """
    for name, count in (("samples", samples), ("batch", batch)):
        if count < 1:
            raise ValueError(f"{name}={count}: must be at least 1")
    about: dict[str, Any] = {"suite": "choices", "checkpoint": str(subject.place)}
    about |= {"questions": None if questions is None else str(questions), "seed": seed}
    about |= {"split": split if questions is None else None, "context": context, "budget": subject.budget, "branches": subject.branches}
    if questions is None:
        of, sets = split, _made(subject.corpus(corpus), split, samples, seed)
    else:
        of, sets = Path(questions).name, {Path(questions).stem: read_questions(questions)[:samples]}
    model, _ = subject.with_tokenizer()
    reach(model, context)
    return lambda: _measured(subject, of, sets, about, batch=batch)


run = at_once(prepare)


def _measured(subject: Subject, of: str, sets: Mapping[str, Sequence[Question]], about: dict[str, Any], *, batch: int) -> dict[str, Any]:
    model, tokenizer = subject.opened
    begun = time.perf_counter()
    with nullcontext() if subject.console is None else subject.console.status("multiple choice"):
        rows = [
            {"set": name} | score.row()
            for name, asked in sets.items()
            for score in score_choices(model, tokenizer, asked, delimiter=_delimiter(asked), context=about["context"], batch_size=batch)
        ]
    result = about | {"date": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": time.perf_counter() - begun, "rows": rows}
    file = subject.note("choices.json", of + subject.asked, result)
    subject.print(table(result, of), note=f"{result['seconds']:.1f} s; written to {file}")
    return result


def _made(corpus: Corpus, split: str, count: int, seed: int) -> dict[str, list[Question]]:
    """Return questions made from a split of a corpus, by kind."""
    texts = list(corpus_texts(corpus, split))
    following = next_sentence(texts, count=count, seed=seed)
    return {"next sentence": following, "shuffled sentence": shuffled_sentence(texts, count=count, seed=seed)}


def _delimiter(questions: Sequence[Question]) -> str:
    """Return what stands between context and choice: a space, but nothing where no text has one, as in Chinese."""
    return " " if any(" " in text for question in questions for text in (question.context, *question.choices)) else ""


def table(result: Mapping[str, Any], of: str) -> Table:
    """Return a result of `run` as a table, a row per set of questions and normalisation."""
    shown = Table(title=f"multiple choice, {of}", caption="log-likelihoods as they are (raw), per byte, per token of the choice")
    for heading in ("questions", "likelihood", "right", "(95 %)", "guessing", "asked"):
        shown.add_column(heading, justify="left" if heading in ("questions", "likelihood") else "right", no_wrap=heading != "questions")
    for row in result["rows"]:
        between = f"{row['low']:.3f}–{row['high']:.3f}"
        numbers = (f"{row['accuracy']:.3f}", between, f"{row['chance']:.3f}", f"{row['questions']:,}")
        shown.add_row(row["set"], row["normalisation"].replace("_", " "), *numbers)
    return shown
