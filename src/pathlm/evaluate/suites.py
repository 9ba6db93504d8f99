"""What `pathlm eval` measures: suites chosen by name, each with the options that concern it, and a refusal of those that concern none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

if TYPE_CHECKING:
    from pathlm.evaluate.subject import Measure

SUITES = ("lm", "routing", "synthetic", "choices", "long-context")
LM_EVAL = "lm-eval"
CONCERNS = {
    "against": ("--against", ("routing",)),
    "budgets": ("--budgets", ("routing",)),
    "plot": ("--plot", ("routing",)),
    "specs": ("--task", ("synthetic", "long-context")),
    "questions": ("--questions", ("choices",)),
    "lengths": ("--lengths", ("long-context",)),
    "samples": ("--samples", ("synthetic", "choices", "long-context")),
    "batch": ("--batch", ("synthetic", "choices", "long-context")),
    "limit": ("--limit", (LM_EVAL,)),
    "fewshot": ("--fewshot", (LM_EVAL,)),
}
"""Options of some suites alone: how they are written, and of which."""
NOT_WITH = {
    "records": ("--records", ("routing", "synthetic", "choices", LM_EVAL)),
    "branches": ("--branches", ("routing",)),
}
"""Options that some suites cannot obey."""
OF_ONE = ("records", "specs")
"""Options that mean one suite, so that only one of those that know them may be chosen."""
N = TypeVar("N", int, float)


def run(
    model_folder: Path | str,
    corpus: Path | str | None = None,
    *,
    suite: str | None = None,
    routes: bool = False,
    tasks: Sequence[str] | None = None,
    split: str = "validation",
    context: int | None = None,
    stride: int | None = None,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    order: int = 5,
    budget: float | None = None,
    branches: int | None = None,
    device: str | None = None,
    console: Console | None = None,
    **own: Any,
) -> dict[str, Any]:
    """Measure a model by one suite or several, one after the other; return what each found.

    `suite` names some of lm, routing, synthetic, choices and long-context, with commas between (by default lm); `routes` is routing alone,
    and `tasks` are those of lm-eval instead. `own` are options of single suites (see `CONCERNS`), lists written with commas between;
    `records` is a file. The others are those of the suites, which say what they mean.

    Raises `ValueError` for suites that do not exist and options that no chosen suite would look at, and what any of the chosen ones
    refuses, before anything is measured.
    """
    chosen = choose(suite, routes=routes, tasks=tasks)
    _refuse(chosen, own | {"branches": branches}, said=suite)
    records = own.pop("records", None)
    given = {name: value for name, value in own.items() if value is not None}
    if "budgets" in given:
        given["budgets"] = numbers("budgets", given["budgets"], float)
    if "lengths" in given:
        given["lengths"] = numbers("lengths", given["lengths"], int)
    text = {"context": context, "stride": stride, "max_documents": max_documents, "max_tokens": max_tokens}
    wanted: dict[str, dict[str, Any]] = {
        "lm": {"corpus": corpus, "split": split, **text, "order": order, "records": records},
        "routing": {"corpus": corpus, "split": split, **text},
        "synthetic": {"split": split},
        "choices": {"corpus": corpus, "split": split, "context": context},
        "long-context": {"split": split, "records": records},
        LM_EVAL: {"tasks": tasks, "context": context},
    }
    from pathlm.evaluate.subject import Subject

    subject = Subject(model_folder, budget=budget, branches=branches, device=device, console=console)
    ready: dict[str, Measure] = {}
    for name in chosen:
        mine = {option: value for option, value in given.items() if name in CONCERNS[option][1]}
        ready[name] = _prepare(name)(subject, **wanted[name], **mine)
    return {name: measure() for name, measure in ready.items()}


def choose(suite: str | None, *, routes: bool = False, tasks: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the suites that are meant, each once."""
    if routes and tasks:
        raise ValueError(f"--lm-eval {tasks[0]}: measures answers, --routes measures text; give one of them")
    if suite is not None and (routes or tasks):
        raise ValueError(f"--suite {suite}: does not go with {'--routes' if routes else '--lm-eval'}; give one of them")
    if routes or tasks:
        return ("routing",) if routes else (LM_EVAL,)
    chosen = tuple(dict.fromkeys(("lm" if suite is None else suite).split(",")))
    for name in chosen:
        if name not in SUITES:
            raise ValueError(f"--suite {suite}: knows {', '.join(SUITES)}, not {name!r}")
    return chosen


def _refuse(chosen: Sequence[str], options: dict[str, Any], *, said: str | None) -> None:
    """Raise `ValueError` for the first option that no chosen suite would look at, or that one of them cannot obey."""
    if unknown := sorted(options.keys() - CONCERNS.keys() - NOT_WITH.keys()):
        raise ValueError(f"{unknown[0]}={options[unknown[0]]!r}: is no option of a suite; there are {', '.join([*CONCERNS, *NOT_WITH])}")
    for name, value in options.items():
        if value is None:
            continue
        flag, of = CONCERNS[name] if name in CONCERNS else (NOT_WITH[name][0], (*SUITES, LM_EVAL))
        written = f"{flag} {' '.join(value) if isinstance(value, list) else value}"
        users = [suite for suite in chosen if suite in of]
        if not users:
            raise ValueError(f"{written}: needs {_flag(of)}")
        for suite in chosen:
            if suite in NOT_WITH.get(name, ("", ()))[1]:
                raise ValueError(f"{written}: does not go with {_flag((suite,))}")
        if name in OF_ONE and len(users) > 1:
            raise ValueError(f"{written}: is meant for one suite, --suite {said} names {len(users)}")


def _flag(suites: Sequence[str]) -> str:
    """Return how suites are asked for on the command line."""
    alone = {"routing": "--routes", LM_EVAL: "--lm-eval"}
    return alone.get(suites[0], f"--suite {' or '.join(suites)}")


def _prepare(name: str) -> Callable[..., Measure]:
    """Import what makes a suite ready."""
    if name == LM_EVAL:
        from pathlm.evaluate import harness

        return harness.prepare
    from pathlm.evaluate import choices, compare, long_context, routing, synthetic

    suites = {"lm": compare, "routing": routing, "synthetic": synthetic, "choices": choices, "long-context": long_context}
    found: Callable[..., Measure] = suites[name].prepare
    return found


def numbers(name: str, text: str, kind: Callable[[str], N]) -> list[N]:
    """Read numbers with commas between."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        rule = "whole numbers with commas between, such as 256,1024" if kind is int else "numbers with commas between, such as 0.4,0.7,1"
        raise ValueError(f"{name}={text!r}: must be {rule}") from None
