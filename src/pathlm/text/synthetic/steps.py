"""Tasks that need k steps, one after another: arithmetic, rewriting, repeated transformation, pointer chasing, composition."""

from dataclasses import dataclass
from math import factorial, perm
from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from pathlm.text.synthetic.draws import Draws
from pathlm.text.synthetic.task import Draft, Question, Task, require, require_alphabet, require_steps, symbols


@strict
@dataclass(kw_only=True)
class StepTask(Task):
    """A task whose samples need between `min_k` and `max_k` steps."""

    min_k: int = 1
    max_k: int = 6

    def validate_steps(self) -> None:
        """Refuse an empty range."""
        require_steps(self.min_k, self.max_k)

    @property
    def ks(self) -> range:
        """Numbers of steps."""
        return range(self.min_k, self.max_k + 1)


@strict
@dataclass(kw_only=True)
class Arithmetic(StepTask):
    """`arithmetic mod 11 : ( 3 + 5 ) * 2 =` → `5`: k operations from the inside out, modulo a prime.

    Additions or subtractions alternate with multiplications, so neighbouring steps cannot be merged; nothing adds 0 or multiplies by 0 or
    1, and the modulus is prime, so every step is a bijection of the value so far and none may be skipped. difficulty is the modulus.
    """

    name: ClassVar[str] = "arithmetic"
    modulus: int = 11

    def validate_modulus(self) -> None:
        """Refuse a modulus under which a multiplication loses its value."""
        prime = self.modulus >= 5 and all(self.modulus % d for d in range(2, int(self.modulus**0.5) + 1))
        require(prime and self.modulus < 1000, "modulus", self.modulus, "must be a prime number from 5 to 997")

    def write(self, draws: Draws, k: int) -> Draft:
        """Wrap one operation after another around a number."""
        modulus = self.modulus
        value = draws.below(modulus)
        expression, multiplies = [str(value)], draws.below(2)
        for step in range(k):
            number = draws.between(2 if multiplies else 1, modulus - 1)
            operator = "*" if multiplies else "+-"[draws.below(2)]
            value = (value * number if multiplies else value + number if operator == "+" else value - number) % modulus
            expression = [*(["(", *expression, ")"] if step else expression), operator, str(number)]
            multiplies = not multiplies
        return Draft([self.name, "mod", str(modulus), ":", *expression, "="], [str(value)], modulus)

    def words(self) -> list[str]:
        """Return the frame, operators and numbers up to the modulus."""
        return [self.name, "mod", ":", "=", "(", ")", "+", "-", "*", *map(str, range(self.modulus + 1))]

    def longest(self) -> int:
        """Return the frame, k operations with their numbers, k − 1 pairs of brackets, and the answer."""
        return 5 + 1 + 2 * self.max_k + 2 * (self.max_k - 1) + 1

    def prompts(self, k: int) -> int:
        """Count those that begin with an addition or subtraction."""
        return self.modulus * (2 * (self.modulus - 1)) ** ((k + 1) // 2) * (self.modulus - 2) ** (k // 2)


@strict
@dataclass(kw_only=True)
class Rewrite(StepTask):
    """`rewrite b z > c a b > z c b > a : a b c =` → `z c`: apply the stated rules until none fits.

    A rule `u v > z` replaces u v, side by side, by z. Exactly one rule fits at any time and each but the first needs the symbol that the
    one before it wrote, so k rewrites happen in only one order. As many rules and one more never fit although they look alike: every new
    symbol, the last one too, is on the left of one of them. difficulty is the number of rules, 2k + 1.
    """

    name: ClassVar[str] = "rewrite"
    untouched: int = 2
    """Symbols of the word that no rule uses up."""
    alphabet: int = 26

    def validate_rewrite(self) -> None:
        """Refuse alphabets that are too small for all symbols of a sample to differ."""
        require(
            self.untouched >= 1, "untouched", self.untouched, "must be at least 1: rules that never fit need symbols that are not adjacent"
        )
        require_alphabet(self.alphabet, 2 * self.max_k + 1 + self.untouched, "2 * max_k + 1 + untouched")

    def write(self, draws: Draws, k: int) -> Draft:
        """Grow one symbol outwards over the word, one neighbour at each step."""
        letters = symbols(self.alphabet)
        chosen = draws.several(letters, 2 * k + 1 + self.untouched)
        word, fresh = chosen[k:], chosen[:k]
        left = draws.below(len(word) - 1)  # the first pair is word[left], word[left + 1]
        right = left + 2  # what is used up is word[left:right]
        rules = [(word[left], word[left + 1], fresh[0])]
        rules.append((*self._apart(draws, word), draws.pick(letters)))
        for active, following in zip(fresh, [*fresh[1:], None], strict=True):
            before, after = word[left - 1] if left else None, word[right] if right < len(word) else None
            to_left = after is None or (before is not None and draws.below(2) == 1)
            neighbour = before if to_left else after
            if following is not None:
                assert neighbour is not None
                rules.append((neighbour, active, following) if to_left else (active, neighbour, following))
                left, right = (left - 1, right) if to_left else (left, right + 1)
            other = draws.pick([symbol for symbol in word if symbol != neighbour])
            rules.append((*((other, active) if to_left else (active, other)), draws.pick(letters)))
        prompt = [self.name]
        for u, v, z in draws.several(rules, len(rules)):
            prompt += (u, v, ">", z)
        return Draft([*prompt, ":", *word, "="], [*word[:left], fresh[-1], *word[right:]], len(rules))

    def _apart(self, draws: Draws, word: list[str]) -> tuple[str, str]:
        """Return two symbols that do not stand side by side in this order, and never will: what lies between them becomes one symbol."""
        first = draws.below(len(word))
        second = draws.pick([i for i in range(len(word)) if i not in (first, first + 1)])
        return word[first], word[second]

    def words(self) -> list[str]:
        """Return the frame and the symbols."""
        return [self.name, ":", "=", ">", *symbols(self.alphabet)]

    def longest(self) -> int:
        """Return the frame, 2k + 1 rules, the word and the answer."""
        return 3 + 4 * (2 * self.max_k + 1) + (self.max_k + 1 + self.untouched) + (1 + self.untouched)

    def prompts(self, k: int) -> int:
        """Count the choices of different symbols."""
        return perm(self.alphabet, 2 * k + 1 + self.untouched)


def single_cycle(draws: Draws, names: list[str], size: int) -> tuple[list[str], dict[str, str]]:
    """Draw `size` of the names in the order of a random cycle, and the map from each to its successor."""
    cycle = draws.several(names, size)
    return cycle, dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))


@strict
@dataclass(kw_only=True)
class MapTask(StepTask):
    """A task that states a map of symbols in its prompt: one random cycle through all of them, so that no repetition is short."""

    nodes: int = 16
    """Length of the cycle."""
    alphabet: int = 26
    """Names that the nodes are drawn from."""
    encoding: Literal["spelled", "pair"] = "spelled"
    """`spelled` writes `a > c` as three words, `pair` as one word `a>c`."""
    order: Literal["shuffled", "sorted"] = "shuffled"
    """The order in which the pairs are stated."""

    def validate_map(self) -> None:
        """Refuse cycles on which k steps forward are as short a way back."""
        rule = f"must exceed 2 * max_k={2 * self.max_k}, or the way back round the cycle would be the shorter one"
        require(self.nodes > 2 * self.max_k, "nodes", self.nodes, rule)
        require_alphabet(self.alphabet, self.nodes, "nodes")

    def stated(self, draws: Draws, successor: dict[str, str]) -> list[str]:
        """Write the map."""
        keys = draws.several(list(successor), len(successor)) if self.order == "shuffled" else sorted(successor, key=lambda s: (len(s), s))
        if self.encoding == "pair":
            return [f"{key}>{successor[key]}" for key in keys]
        return [word for key in keys for word in (key, ">", successor[key])]

    def words(self) -> list[str]:
        """Return the frame, the numbers of steps, the symbols and, where pairs are words, every pair."""
        letters = symbols(self.alphabet)
        pairs = [f"{a}>{b}" for a in letters for b in letters if a != b] if self.encoding == "pair" else [">"]
        return [self.name, ":", "=", "times", *map(str, self.ks), *letters, *pairs]

    def map_length(self) -> int:
        """Return the words that state the map."""
        return self.nodes * (1 if self.encoding == "pair" else 3)

    def prompts(self, k: int) -> int:
        """Count the cycles and the orders in which their pairs may be stated, with one question each."""
        return perm(self.alphabet, self.nodes) // self.nodes * (factorial(self.nodes) if self.order == "shuffled" else 1)


@strict
@dataclass(kw_only=True)
class Pointer(MapTask):
    """`pointer a > c c > b b > a : a times 1 =` → `c`: follow the stated map k times.

    More than one question is asked as number of hops and start, each with its answer: `pointer a > c c > b b > a : 1 a c 1 b a`. The answer
    follows right on the start, so one more word is a target for every three. difficulty is the number of pairs.

    k look-ups are needed one after another by whatever acts only where the question stands; a network that already composes the map at the
    places of its pairs can double the reach per layer, as far as causality lets one pair see the other.
    """

    name: ClassVar[str] = "pointer"
    questions: int = 1
    """Questions about one map; all but the first draw a number of hops of their own."""

    def validate_questions(self) -> None:
        """Refuse samples that ask nothing."""
        require(self.questions >= 1, "questions", self.questions, "must be at least 1")

    def write(self, draws: Draws, k: int) -> Draft:
        """State a cycle, and a start and a number of hops for every question."""
        cycle, successor = single_cycle(draws, symbols(self.alphabet), self.nodes)
        start = draws.below(self.nodes)
        prompt = [self.name, *self.stated(draws, successor), ":"]
        answer = cycle[(start + k) % self.nodes]
        if self.questions == 1:
            return Draft([*prompt, cycle[start], "times", str(k), "="], [answer], self.nodes)
        more = []
        for _ in range(self.questions - 1):
            hops, first = draws.between(self.min_k, self.max_k), draws.below(self.nodes)
            more.append(Question((str(hops), cycle[first]), (cycle[(first + hops) % self.nodes],), hops))
        return Draft([*prompt, str(k), cycle[start]], [answer], self.nodes, tuple(more), len(prompt))

    def words(self) -> list[str]:
        """Return the words of the map, without the frame of a single question where there are several."""
        return [word for word in super().words() if self.questions == 1 or word not in ("=", "times")]

    def longest(self) -> int:
        """Return the frame, the map, and the questions with their answers."""
        return self.map_length() + (7 if self.questions == 1 else 2 + 3 * self.questions)


@strict
@dataclass(kw_only=True)
class Repeat(MapTask):
    """`repeat a > c c > b b > a : a b times 1 =` → `a c`: transform a word k times.

    One application replaces every symbol by its image and then moves the first to the end. The map is stated in the prompt: a fixed
    transformation could be memorised together with its powers and would then take one step for any k. difficulty is the length of the word.
    """

    name: ClassVar[str] = "repeat"
    min_length: int = 2
    max_length: int = 6

    def validate_word(self) -> None:
        """Refuse words that cannot be drawn."""
        require(self.min_length >= 1, "min_length", self.min_length, "must be at least 1")
        require(self.max_length >= self.min_length, "max_length", self.max_length, f"must not be below min_length={self.min_length}")

    def write(self, draws: Draws, k: int) -> Draft:
        """State a map, a word and a number of applications."""
        cycle, successor = single_cycle(draws, symbols(self.alphabet), self.nodes)
        word = [draws.below(self.nodes) for _ in range(draws.between(self.min_length, self.max_length))]
        image = [cycle[(node + k) % self.nodes] for node in word]
        moved = k % len(image)
        prompt = [self.name, *self.stated(draws, successor), ":", *(cycle[node] for node in word), "times", str(k), "="]
        return Draft(prompt, image[moved:] + image[:moved], len(word))

    def longest(self) -> int:
        """Return the frame, the map, the word and the answer."""
        return self.map_length() + 5 + 2 * self.max_length


@strict
@dataclass(kw_only=True)
class Compose(StepTask):
    """`compose b c a , c a b : start a =` → `a`: carry one element through k stated permutations.

    Each permutation is written as the images of a, b, c, … in order, and the first written is applied first. The steps all differ, so there
    is nothing to double; merging neighbours as a tree is the only parallel way. With five elements or more this is the word problem of a
    group that is not solvable. difficulty is the number of elements.
    """

    name: ClassVar[str] = "compose"
    size: int = 5
    start: Literal["last", "first"] = "last"
    """Whether the start is told after the permutations, or before them (then it can be carried along while reading)."""

    def validate_size(self) -> None:
        """Refuse sets too small to be permuted."""
        require(3 <= self.size <= 26, "size", self.size, "must lie between 3 and 26")

    def write(self, draws: Draws, k: int) -> Draft:
        """State k permutations and a start."""
        letters = symbols(self.size)
        element = draws.below(self.size)
        question = ["start", letters[element]]
        stated: list[str] = []
        for step in range(k):
            images = draws.several(range(self.size), self.size)
            element = images[element]
            stated += [*([","] if step else []), *(letters[image] for image in images)]
        body = [*stated, ":", *question] if self.start == "last" else [*question, ":", *stated]
        return Draft([self.name, *body, "="], [letters[element]], self.size)

    def words(self) -> list[str]:
        """Return the frame and the elements."""
        return [self.name, ":", "=", ",", "start", *symbols(self.size)]

    def longest(self) -> int:
        """Return the frame, k permutations with commas between them, and the answer."""
        return 5 + self.max_k * (self.size + 1) - 1 + 1

    def prompts(self, k: int) -> int:
        """Count permutations and starts."""
        return self.size * factorial(self.size) ** k
