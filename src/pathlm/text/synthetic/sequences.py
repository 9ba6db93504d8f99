"""Tasks over a word of symbols: copy, reverse, transform and brackets."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from pathlm.text.synthetic.draws import Draws
from pathlm.text.synthetic.task import Draft, Task, require, require_alphabet, require_steps, symbols


@strict
@dataclass(kw_only=True)
class WordTask(Task):
    """A task whose prompt is a word of symbols and whose answer is found by one look-up per answer symbol (k = 1, difficulty = length)."""

    min_length: int = 4
    max_length: int = 16
    alphabet: int = 26
    """How many different symbols words are made of."""

    def validate_word(self) -> None:
        """Refuse words that cannot be drawn."""
        require(self.min_length >= 1, "min_length", self.min_length, "must be at least 1")
        require(self.max_length >= self.min_length, "max_length", self.max_length, f"must not be below min_length={self.min_length}")
        require_alphabet(self.alphabet, 2, "words must be able to differ")

    @property
    def ks(self) -> range:
        """One step: every answer symbol depends on one symbol at a known place."""
        return range(1, 2)

    def word(self, draws: Draws) -> list[str]:
        """Draw a word."""
        letters = symbols(self.alphabet)
        return [draws.pick(letters) for _ in range(draws.between(self.min_length, self.max_length))]

    def words(self) -> list[str]:
        """Return the task's name, punctuation and symbols."""
        return [self.name, ":", "=", *symbols(self.alphabet)]

    def longest(self) -> int:
        """Return the length of the frame and of two longest words."""
        return 3 + 2 * self.max_length

    def prompts(self, k: int) -> int:
        """Return the number of longest words."""
        return self.alphabet**self.max_length


class Copy(WordTask):
    """`copy : a b c =` → `a b c`."""

    name: ClassVar[str] = "copy"

    def write(self, draws: Draws, k: int) -> Draft:
        """Repeat the word."""
        word = self.word(draws)
        return Draft([self.name, ":", *word, "="], word, len(word))


class Reverse(WordTask):
    """`reverse : a b c =` → `c b a`."""

    name: ClassVar[str] = "reverse"

    def write(self, draws: Draws, k: int) -> Draft:
        """Turn the word round."""
        word = self.word(draws)
        return Draft([self.name, ":", *word, "="], word[::-1], len(word))


OPERATIONS = ("rotate", "swap", "double", "thin", "next")


@strict
@dataclass(kw_only=True)
class Transform(WordTask):
    """`transform swap : a b c d =` → `b a d c`; the operation is named, and what it does must be learned.

    `rotate` moves the first symbol to the end, `swap` exchanges neighbours (a last odd one stays), `double` writes each symbol twice,
    `thin` keeps the first, third, fifth …, and `next` replaces each symbol by its successor in the alphabet, the last by the first.
    """

    name: ClassVar[str] = "transform"
    operation: Literal["any", "rotate", "swap", "double", "thin", "next"] = "any"
    """Which operation is asked for; `any` draws one per sample."""

    def write(self, draws: Draws, k: int) -> Draft:
        """Apply the operation to a word."""
        operation = draws.pick(OPERATIONS) if self.operation == "any" else self.operation
        word = self.word(draws)
        return Draft([self.name, operation, ":", *word, "="], self._apply(operation, word), len(word))

    def _apply(self, operation: str, word: list[str]) -> list[str]:
        if operation == "rotate":
            return word[1:] + word[:1]
        if operation == "swap":
            return [symbol for i in range(0, len(word), 2) for symbol in reversed(word[i : i + 2])]
        if operation == "double":
            return [symbol for symbol in word for _ in range(2)]
        if operation == "thin":
            return word[::2]
        letters = symbols(self.alphabet)
        successor = dict(zip(letters, letters[1:] + letters[:1], strict=True))
        return [successor[symbol] for symbol in word]

    def words(self) -> list[str]:
        """Return the words of every word task and the names of the operations."""
        return [*super().words(), *OPERATIONS]

    def longest(self) -> int:
        """Return the length with the operation's name and a doubled word."""
        return 4 + (3 if self.operation in ("any", "double") else 2) * self.max_length


_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ("<", ">"))


@strict
@dataclass(kw_only=True)
class Brackets(Task):
    """`brackets : ( [ { } ] < =` → `> )`: close what is still open, innermost first.

    k is the deepest nesting among the closed groups: the number of rounds of "cancel every pair that stands side by side" until only open
    brackets are left. difficulty is the number of brackets in the prompt. (Depth can also be counted in parallel, so k is the length of one
    natural procedure here, not a lower bound.)
    """

    name: ClassVar[str] = "brackets"
    min_k: int = 1
    max_k: int = 6
    max_open: int = 4
    """Most brackets left open, which is the length of the longest answer."""
    length: int = 40
    """Most brackets in the prompt."""
    kinds: int = 3
    """How many kinds of bracket there are."""

    def validate_brackets(self) -> None:
        """Refuse prompts that do not fit."""
        require_steps(self.min_k, self.max_k)
        require(self.max_open >= 1, "max_open", self.max_open, "must be at least 1, or there is nothing to answer")
        require(2 <= self.kinds <= len(_PAIRS), "kinds", self.kinds, f"must lie between 2 and {len(_PAIRS)}")
        least = 2 * self.max_k + self.max_open
        require(
            self.length >= least, "length", self.length, f"max_k={self.max_k} and max_open={self.max_open} need at least {least} brackets"
        )

    @property
    def ks(self) -> range:
        """Nesting depths."""
        return range(self.min_k, self.max_k + 1)

    def write(self, draws: Draws, k: int) -> Draft:
        """Put one group of depth `k`, and shallower ones, around brackets that stay open."""
        opened = [draws.below(self.kinds) for _ in range(draws.between(1, self.max_open))]
        room = self.length - len(opened)
        deepest, gap = self._group(draws, k, room), draws.below(len(opened) + 1)
        room -= len(deepest)
        prompt = [self.name, ":"]
        for place in range(len(opened) + 1):
            if place == gap:
                prompt += deepest
            elif room >= 2 and draws.below(2):
                group = self._group(draws, draws.between(1, min(k, room // 2)), room)
                room -= len(group)
                prompt += group
            if place < len(opened):
                prompt.append(_PAIRS[opened[place]][0])
        return Draft([*prompt, "="], [_PAIRS[kind][1] for kind in reversed(opened)], len(prompt) - 2)

    def _group(self, draws: Draws, depth: int, room: int) -> list[str]:
        """Return balanced brackets nested exactly `depth` deep, at most `room` of them."""
        left, right = _PAIRS[draws.below(self.kinds)]
        if depth == 1:
            return [left, right]
        inner = self._group(draws, depth - 1, room - 2)
        spare = room - 2 - len(inner)
        if spare >= 2 and draws.below(2):
            beside = self._group(draws, draws.between(1, min(depth - 1, spare // 2)), spare)
            inner = inner + beside if draws.below(2) else beside + inner
        return [left, *inner, right]

    def words(self) -> list[str]:
        """Return the task's name, punctuation and brackets."""
        return [self.name, ":", "=", *(bracket for pair in _PAIRS[: self.kinds] for bracket in pair)]

    def longest(self) -> int:
        """Return the longest prompt and answer."""
        return 3 + self.length + self.max_open

    def prompts(self, k: int) -> int:
        """Count spines of depth k in front, with a single pair or nothing in as many later gaps as there is room for."""
        pairs = min(self.max_open, (self.length - self.max_open - 2 * k) // 2)
        return self.kinds ** (self.max_open + k) * (1 + self.kinds) ** pairs
