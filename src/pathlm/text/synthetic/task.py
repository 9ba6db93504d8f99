"""What a synthetic task is: options, samples with a known number of steps, and streams that never share a sample between splits."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any, ClassVar, NamedTuple

from pathlm.text.synthetic.draws import Draws

SPLITS = ("train", "validation", "test")
HELD_OUT_FROM = 2**14
"""With fewer different prompts than this, a task at that k is a table to learn, and the splits share its entries."""

_BUCKETS = {"train": frozenset(range(6)), "validation": frozenset({6}), "test": frozenset({7})}
_ATTEMPTS = 1000


class Question(NamedTuple):
    """Words that ask for something, the words of the only answer, and the sequential steps that it needs."""

    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    k: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One question with its only answer, as words; some tasks go on with further questions about the same prompt."""

    task: str
    """The task's name, without options."""
    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    difficulty: int
    """Size of the instance; what is counted depends on the task."""
    k: int
    """Sequential steps that the answer needs, as the task defines them."""
    more: tuple[Question, ...] = ()
    """Further questions in the order in which they are asked, each with steps of its own."""

    @property
    def questions(self) -> tuple[Question, ...]:
        """Every question: the prompt with its answer, then the further ones."""
        return (Question(self.prompt, self.answer, self.k), *self.more)

    @property
    def text(self) -> str:
        """The sample as one line of text."""
        return " ".join(word for question in self.questions for word in (*question.prompt, *question.answer))


class Draft(NamedTuple):
    """What a task writes before it is known to belong to a split."""

    prompt: list[str]
    answer: list[str]
    difficulty: int
    more: tuple[Question, ...] = ()
    shared: int | None = None
    """How many of the prompt's first words decide the split: those that further questions are about too. None is all of them."""
    core: tuple[str, ...] | None = None
    """The words that decide the split where they do not stand together, as those of a prompt with filler between them."""


class Task(ABC):
    """A family of questions. Subclasses are strict dataclasses whose fields are the task's options."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def ks(self) -> range:
        """Every number of steps that occurs."""

    @abstractmethod
    def write(self, draws: Draws, k: int) -> Draft:
        """Write one sample that needs `k` steps."""

    @abstractmethod
    def words(self) -> list[str]:
        """Every word that prompts and answers may contain, in a fixed order."""

    @abstractmethod
    def longest(self) -> int:
        """Words in the longest sample, prompts and answers together."""

    @abstractmethod
    def prompts(self, k: int) -> int:
        """How many different prompts there are at `k`, or a number that is surely smaller."""

    def names(self) -> list[str]:
        """Words that a sample holds once at most: those of more than two letters, which are names of tasks and parts of their frames."""
        return [word for word in self.words() if word.isalpha() and len(word) > 2]

    def held_out(self, k: int) -> bool:
        """Whether no validation or test sample at `k` is ever a training sample, under any seed."""
        return self.prompts(k) >= HELD_OUT_FROM

    @property
    def spec(self) -> str:
        """The task as a string that `open_task` reads: its name and the options that differ from the defaults."""
        options = ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default)  # type: ignore[arg-type]
        return f"{self.name}:{options}" if options else self.name


class SampleStream:
    """The endless samples of one task in one split; sample `index` is a function of (task and options, seed, split, index)."""

    def __init__(self, task: Task, split: str, *, seed: int) -> None:
        require(split in SPLITS, "split", split, f"tasks have the splits {', '.join(SPLITS)}")
        require(seed >= 0, "seed", seed, "must not be negative")
        self.task = task
        self.split = split
        self._draws = Draws("pathlm sample", task.spec, split, seed)
        self._buckets = _BUCKETS[split]
        self._held_out = {k: task.held_out(k) for k in task.ks}

    def sample(self, index: int, *, k: int | None = None) -> Sample:
        """Return sample `index`, whose number of steps is drawn uniformly unless `k` fixes it. Further questions draw theirs."""
        draws, task = self._draws, self.task
        draws.seek(index)
        drawn = task.ks.start + draws.below(len(task.ks))
        if k is None:
            k = drawn
        elif k not in task.ks:
            raise ValueError(f"k={k}: {task.spec} has samples with k from {task.ks[0]} to {task.ks[-1]}")
        for _ in range(_ATTEMPTS):
            draft = task.write(draws, k)
            if not self._held_out[k] or _bucket(draft.core or draft.prompt[: draft.shared]) in self._buckets:
                return Sample(task.name, tuple(draft.prompt), tuple(draft.answer), draft.difficulty, k, draft.more)
        raise AssertionError(f"{task.spec}: no prompt of the {self.split} split in {_ATTEMPTS} attempts; prompts({k}) counts too many")

    def __iter__(self) -> Iterator[Sample]:
        """Yield samples 0, 1, 2, … without end."""
        index = 0
        while True:
            yield self.sample(index)
            index += 1


def _bucket(prompt: Sequence[str]) -> int:
    """Return the eighth of all prompts that this one falls into. It knows no seed, so the splits stay apart across runs."""
    return blake2b(" ".join(prompt).encode(), digest_size=1).digest()[0] & 7


def symbols(count: int) -> list[str]:
    """Return `count` names: a … z, then aa, ab, …"""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [letters[i] if i < 26 else letters[i // 26 - 1] + letters[i % 26] for i in range(count)]


MOST_SYMBOLS = 26 + 26 * 26


def require(holds: bool, name: str, value: Any, rule: str) -> None:
    """Raise `ValueError` naming the field, the value and the rule unless `holds`."""
    if not holds:
        raise ValueError(f"{name}={value!r}: {rule}")


def require_alphabet(alphabet: int, least: int, purpose: str) -> None:
    """Check that there are enough symbols to draw from, and names for them."""
    require(least <= alphabet <= MOST_SYMBOLS, "alphabet", alphabet, f"must lie between {least} ({purpose}) and {MOST_SYMBOLS}")


def require_steps(min_k: int, max_k: int) -> None:
    """Check a range of steps."""
    require(min_k >= 1, "min_k", min_k, "must be at least 1")
    require(max_k >= min_k, "max_k", max_k, f"must not be below min_k={min_k}")
