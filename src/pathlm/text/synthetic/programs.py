"""Tasks about values that change over a long text: assignments to follow, numbers to add up, small programs to run."""

from dataclasses import dataclass
from itertools import pairwise
from math import perm
from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict

from pathlm.text.synthetic.draws import Draws
from pathlm.text.synthetic.long import DIGITS, HAY, LongTask
from pathlm.text.synthetic.steps import StepTask
from pathlm.text.synthetic.task import Draft, require, require_alphabet, symbols

Statement = tuple[str, ...]


def _draft(task: LongTask, draws: Draws, statements: list[Statement], question: Statement, answer: list[str]) -> Draft:
    """Spread statements over hay and ask one question about them; difficulty is the number of statements."""
    core = (*(word for statement in statements for word in statement), *question)
    return Draft([task.name, *task.spread(draws, statements), *question], answer, len(statements), core=core)


@strict
@dataclass(kw_only=True)
class Variables(LongTask, StepTask):
    """`variables … # a = 4 2 … # f = 7 0 … # c = a … ? c =` → `4 2`: follow a value from variable to variable.

    Several chains of k copies run through each other, and every variable is assigned once. `ask=value` asks what the last variable of a
    chain holds; `ask=names` asks which variables hold a value, in the order of their assignments: `? 4 2 =` → `a c`. difficulty is the
    number of assignments.
    """

    name: ClassVar[str] = "variables"
    max_k: int = 4
    chains: int = 2
    """Values that are handed on, each from variable to variable k times; all but the one asked for are distractors."""
    digits: int = 2
    """Digits of a value, each a word."""
    ask: Literal["value", "names"] = "value"
    alphabet: int = 26
    """Names that the variables are drawn from."""

    def validate_chains(self) -> None:
        """Refuse chains that cannot be told apart."""
        require(1 <= self.digits <= 9, "digits", self.digits, "must lie between 1 and 9")
        require(1 <= self.chains <= 10**self.digits, "chains", self.chains, f"must lie between 1 and {10**self.digits}, one value each")
        require_alphabet(self.alphabet, self.chains * (self.max_k + 1), "chains * (max_k + 1)")

    @property
    def most_stated(self) -> int:
        """Return the words of all assignments."""
        return self.chains * (3 + self.digits + 4 * self.max_k)

    @property
    def frame(self) -> int:
        """Return the words of the name, the question and the longest answer."""
        return 1 + (2 + 1 + self.digits if self.ask == "value" else 2 + self.digits + self.max_k + 1)

    def write(self, draws: Draws, k: int) -> Draft:
        """Assign and copy, the chains mixed at random; the one asked about is the first that was drawn."""
        names = draws.several(symbols(self.alphabet), self.chains * (k + 1))
        chains = [names[i : i + k + 1] for i in range(0, len(names), k + 1)]
        values: dict[Statement, None] = {}
        while len(values) < self.chains:
            values[tuple(draws.many(DIGITS, self.digits))] = None
        value, *_ = values
        stated = [[("#", chain[0], "=", *held)] for chain, held in zip(chains, values, strict=True)]
        for chain, statements in zip(chains, stated, strict=True):
            statements += [("#", to, "=", source) for source, to in pairwise(chain)]
        rest = [iter(statements) for statements in stated]
        turns = draws.several([number for number in range(self.chains) for _ in range(k + 1)], len(names))
        question, answer = (("?", chains[0][-1], "="), list(value)) if self.ask == "value" else (("?", *value, "="), chains[0])
        return _draft(self, draws, [next(rest[turn]) for turn in turns], question, answer)

    def words(self) -> list[str]:
        """Return the frame, digits, symbols and hay."""
        return [self.name, "#", "?", "=", *DIGITS, *symbols(self.alphabet), *HAY]

    def prompts(self, k: int) -> int:
        """Count names and values, one chain stated after the other."""
        return perm(self.alphabet, self.chains * (k + 1)) * perm(10**self.digits, self.chains)


@strict
@dataclass(kw_only=True)
class Sum(LongTask, StepTask):
    """`sum … + 7 … + 5 … + 1 … =` → `1 3`: add up k + 1 numbers.

    Sums are written with as many digits as the largest possible one, so that the length of an answer tells nothing. `answer=running` asks
    for the sum after every addition, `1 2 1 3`; `order=units-first` writes sums from their last digit on, in the order in which carries
    arise. difficulty is the number of operands.
    """

    name: ClassVar[str] = "sum"
    max_k: int = 8
    digits: int = 1
    """Digits of an operand, each a word."""
    answer: Literal["total", "running"] = "total"
    order: Literal["units-last", "units-first"] = "units-last"

    def validate_sum(self) -> None:
        """Refuse numbers without digits."""
        require(self.digits >= 1, "digits", self.digits, "must be at least 1")

    @property
    def width(self) -> int:
        """Digits of a sum."""
        return len(str((self.max_k + 1) * (10**self.digits - 1)))

    @property
    def most_stated(self) -> int:
        """Return the words of all operands."""
        return (self.max_k + 1) * (1 + self.digits)

    @property
    def frame(self) -> int:
        """Return the words of the name, the question and the longest answer."""
        return 2 + self.width * (self.max_k if self.answer == "running" else 1)

    def write(self, draws: Draws, k: int) -> Draft:
        """Draw the operands and add them up."""
        operands = [tuple(draws.many(DIGITS, self.digits)) for _ in range(k + 1)]
        total, sums = int("".join(operands[0])), []
        for operand in operands[1:]:
            total += int("".join(operand))
            written = str(total).zfill(self.width)
            sums.append(written if self.order == "units-last" else written[::-1])
        asked = sums if self.answer == "running" else sums[-1:]
        return _draft(self, draws, [("+", *operand) for operand in operands], ("=",), list("".join(asked)))

    def words(self) -> list[str]:
        """Return the frame, digits and hay."""
        return [self.name, "+", "=", *DIGITS, *HAY]

    def prompts(self, k: int) -> int:
        """Count the operands."""
        return 10 ** (self.digits * (k + 1))


@strict
@dataclass(kw_only=True)
class Program(LongTask, StepTask):
    """`program # a = 4 # b = 9 … # a += b … # if a > b : b -= 1 … # repeat 2 a += 3 … ? a =` → `9`: run a program, modulo a number.

    Every variable is set once at the start; then k changes are run: additions, subtractions and copies of numbers and variables, some of
    them repeated, some under a condition. `ask=value` asks for one variable at the end, `ask=state` for all of them in the order of their
    names, `ask=trace` for the variable on the left after every change (after every round of a repeated one, and whether or not a condition
    held): k answers.

    k counts the changes that are run; a value that was copied over is not needed, so that one variable may need fewer of them. difficulty
    is the number of statements.
    """

    name: ClassVar[str] = "program"
    max_k: int = 8
    variables: int = 3
    modulus: int = 10
    ask: Literal["value", "state", "trace"] = "value"

    def validate_program(self) -> None:
        """Refuse programs in which nothing can be copied or changed."""
        require(2 <= self.variables <= 26, "variables", self.variables, "must lie between 2 and 26")
        require(3 <= self.modulus < 1000, "modulus", self.modulus, "must lie between 3 and 999")

    @property
    def most_stated(self) -> int:
        """Return the words of the first values, and of k changes under conditions."""
        return 4 * self.variables + 9 * self.max_k

    @property
    def frame(self) -> int:
        """Return the words of the name, the question and the longest answer."""
        return 4 + {"value": 1, "state": self.variables, "trace": self.max_k}[self.ask]

    def write(self, draws: Draws, k: int) -> Draft:
        """Write statements and run them."""
        names = symbols(self.variables)
        held = {name: draws.below(self.modulus) for name in names}
        statements: list[Statement] = [("#", name, "=", str(value)) for name, value in held.items()]
        trace: list[int] = []
        while len(trace) < k:
            target, other, third = draws.pick(names), draws.pick(names), draws.pick(names)
            change, rounds = self._change(draws, names, target), 1
            kind = draws.below(4)
            if kind == 0 and len(trace) + 2 <= k and change[1] != "=":
                rounds = draws.between(2, min(4, k - len(trace)))
                statements.append(("#", "repeat", str(rounds), *change))
            elif kind == 1 and other != third:
                statements.append(("#", "if", other, ">", third, ":", *change))
                rounds = 1 if held[other] > held[third] else 0
            else:
                statements.append(("#", *change))
            for _ in range(rounds):
                held[target] = self._run(change, held)
                trace.append(held[target])
            if not rounds:
                trace.append(held[target])
        asked = draws.pick(names)
        question, answer = {
            "value": (("?", asked, "="), [held[asked]]),
            "state": (("?", "state", "="), list(held.values())),
            "trace": (("?", "trace", "="), trace),
        }[self.ask]
        return _draft(self, draws, statements, question, [str(value) for value in answer])

    def _change(self, draws: Draws, names: list[str], target: str) -> Statement:
        """Return a change of `target` by a number that is not 0, or by another variable."""
        others = [name for name in names if name != target]
        operator = draws.pick(("+=", "+=", "-=", "-=", "="))
        number = operator != "=" and draws.below(2)
        return (target, operator, str(draws.between(1, self.modulus - 1)) if number else draws.pick(others))

    def _run(self, change: Statement, held: dict[str, int]) -> int:
        """Return what the variable on the left holds after a change."""
        target, operator, operand = change
        value = held[operand] if operand in held else int(operand)
        return {"=": value, "+=": held[target] + value, "-=": held[target] - value}[operator] % self.modulus

    def words(self) -> list[str]:
        """Return the frame, operators, numbers, names and hay."""
        frame = ["#", "?", "=", "+=", "-=", ">", "if", ":", "repeat", "state", "trace"]
        return [self.name, *frame, *map(str, range(max(self.modulus, 5))), *symbols(self.variables), *HAY]

    def prompts(self, k: int) -> int:
        """Count first values, and k additions and subtractions of numbers."""
        return self.modulus**self.variables * (2 * self.variables * (self.modulus - 1)) ** k
