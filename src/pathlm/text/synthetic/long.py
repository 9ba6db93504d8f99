"""Tasks whose answer lies far back: what matters is spread over as much filler as is asked for. Needles, and references to follow."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import perm
from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from pathlm.text.synthetic.draws import Draws
from pathlm.text.synthetic.steps import Pointer
from pathlm.text.synthetic.task import Draft, Question, Task, require, require_alphabet, symbols

# No word of these is a name that tasks draw: names of symbols have at most two letters.
_SENTENCES = (
    "the wind moves over the wide grey water .",
    "all day the old men sat and saw the ships .",
    "rain fell and the road was wet .",
    "two dogs ran out from the red barn .",
    "her hand was cold but the tea was hot .",
    "one bell rang and then the town was still .",
    "who left the lamp near the open door .",
    "they had bread and salt and not much more .",
    "the sun set late that year .",
    "his boat lay under the long stone wall .",
    "new snow hid the path again .",
    "some birds came back when the ice was gone .",
)
SENTENCES = tuple(tuple(sentence.split()) for sentence in _SENTENCES)
HAY = tuple(dict.fromkeys(word for sentence in SENTENCES for word in sentence))
DIGITS = tuple("0123456789")


@strict
@dataclass(kw_only=True)
class LongTask(Task):
    """A task whose statements stand in their order in a hay of filler, each at a place of its own, before a question about them.

    The prompt has the same number of words whatever is stated, so that its length tells nothing. The statements and the question decide
    which split a sample may appear in, whatever the hay.
    """

    length: int = 256
    """Words of the longest sample, and its start and its end: the tokens of the row that it fills where every word is one token."""
    hay: Literal["words", "text"] = "words"
    """What lies between statements: `words` in random order, or sentences of plain `text`, over and over."""

    @property
    @abstractmethod
    def most_stated(self) -> int:
        """Most words that the statements of a sample have."""

    @property
    @abstractmethod
    def frame(self) -> int:
        """Words besides statements and hay: the task's name, the questions and their longest answers."""

    def validate_long(self) -> None:
        """Refuse lengths that do not hold what is stated, and asked, and answered."""
        least = 2 + self.frame + self.most_stated
        rule = f"must be at least {least}: {self.most_stated} words of statements, {self.frame} around them, a start and an end"
        require(self.length >= least, "length", self.length, rule)

    def spread(self, draws: Draws, statements: Sequence[Sequence[str]]) -> list[str]:
        """Return the statements in their order with hay between them, `length` − 2 − `frame` words in all."""
        size = self.length - 2 - self.frame - sum(map(len, statements))
        assert size >= 0, f"{self.spec}: statements of more than {self.most_stated} words"
        hay, gaps = self._hay(draws, size)
        body: list[str] = []
        at = 0
        for statement, cut in zip(statements, sorted(draws.many(gaps, len(statements))), strict=True):
            body += hay[at:cut]
            body += statement
            at = cut
        return body + hay[at:]

    def _hay(self, draws: Draws, size: int) -> tuple[list[str], Sequence[int]]:
        """Return `size` words of filler and the places where something may stand between them: anywhere, or where a sentence begins."""
        if self.hay == "words":
            return draws.many(HAY, size), range(size + 1)
        sentences = draws.many(SENTENCES, 1 + size // min(map(len, SENTENCES)))
        hay = [word for sentence in sentences for word in sentence][:size]
        return hay, [start for start in accumulate(map(len, sentences), initial=0) if start <= size]

    def names(self) -> list[str]:
        """Return the task's name: any other word may occur again and again."""
        return [self.name]

    def longest(self) -> int:
        """Return the words of the longest sample."""
        return self.length - 2


@strict
@dataclass(kw_only=True)
class Needle(LongTask):
    """`needle … # b 2 7 … # a 5 0 … ? a` → `5 0`: find what was stated under a key.

    With more `values` than one a key is stated again, and the answer is all that was stated under it, in order. More `questions` than one
    ask for other keys of the same hay, each with its answer: `? a 5 0 ? b 2 7`. difficulty is the number of needles.
    """

    name: ClassVar[str] = "needle"
    keys: int = 4
    """Different keys in the hay; all but the ones asked for are distractors."""
    values: int = 1
    """Times that each key is stated, with a value of its own each time."""
    digits: int = 4
    """Digits of a value, each a word."""
    questions: int = 1
    """Keys that are asked for, one after another."""
    alphabet: int = 26
    """Symbols that keys are drawn from."""

    def validate_needles(self) -> None:
        """Refuse needles that cannot be told apart, and samples that ask nothing."""
        for name in ("keys", "values", "digits", "questions"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.questions <= self.keys, "questions", self.questions, f"must not be above keys={self.keys}: each asks for another one")
        require_alphabet(self.alphabet, self.keys, "keys")

    @property
    def ks(self) -> range:
        """One step: every digit of an answer is one look-up."""
        return range(1, 2)

    @property
    def most_stated(self) -> int:
        """Return the words of all needles."""
        return self.keys * self.values * (2 + self.digits)

    @property
    def frame(self) -> int:
        """Return the words of the name and of every question with its answer."""
        return 1 + self.questions * (2 + self.values * self.digits)

    def write(self, draws: Draws, k: int) -> Draft:
        """Hide the needles and ask for some of them."""
        keys = draws.several(symbols(self.alphabet), self.keys)
        asked = keys[: self.questions]
        needles = [("#", key, *draws.many(DIGITS, self.digits)) for key in draws.several(keys * self.values, self.keys * self.values)]
        found = {key: tuple(word for needle in needles if needle[1] == key for word in needle[2:]) for key in asked}
        first, *others = (Question(("?", key), found[key], 1) for key in asked)
        stated = tuple(word for needle in needles for word in needle)
        prompt = [self.name, *self.spread(draws, needles), *first.prompt]
        core = stated if others else stated + first.prompt
        return Draft(prompt, list(first.answer), len(needles), tuple(others), core=core)

    def words(self) -> list[str]:
        """Return the frame, digits, symbols and hay."""
        return [self.name, "#", "?", *DIGITS, *symbols(self.alphabet), *HAY]

    def prompts(self, k: int) -> int:
        """Count keys with their values, in the order in which they are stated."""
        return perm(self.alphabet, self.keys) * 10 ** (self.digits * self.keys * self.values)


@strict
@dataclass(kw_only=True)
class Hops(LongTask, Pointer):
    """`hops … a > c … c > b … b > a … : a times 2 =` → `b`: `pointer`, the pairs of its map spread over hay.

    A chain of references goes back and forth over the whole length where pairs are stated in shuffled order. k, difficulty and all options
    are those of `pointer`.
    """

    name: ClassVar[str] = "hops"

    @property
    def most_stated(self) -> int:
        """Return the words of the map."""
        return self.map_length()

    @property
    def frame(self) -> int:
        """Return the words of a pointer's frame, questions and answers."""
        return Pointer.longest(self) - self.map_length()

    def stated(self, draws: Draws, successor: dict[str, str]) -> list[str]:
        """Write the map with hay between its pairs."""
        words = super().stated(draws, successor)
        size = len(words) // len(successor)
        return self.spread(draws, [words[i : i + size] for i in range(0, len(words), size)])

    def write(self, draws: Draws, k: int) -> Draft:
        """Ask about the map as a pointer does; the pairs and the question decide the split."""
        draft = super().write(draws, k)
        hay = set(HAY)
        return draft._replace(core=tuple(word for word in draft.prompt[: draft.shared] if word not in hay))

    def words(self) -> list[str]:
        """Return the words of a pointer, and hay."""
        return [*super().words(), *HAY]
