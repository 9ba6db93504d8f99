"""Synthetic tasks with known structure: each sample carries its task, its difficulty and the number of steps k that its answer needs."""

from dataclasses import fields
from typing import Any, get_args

from pathlm.config import with_options
from pathlm.text.synthetic.long import Hops, LongTask, Needle
from pathlm.text.synthetic.programs import Program, Sum, Variables
from pathlm.text.synthetic.sequences import Brackets, Copy, Reverse, Transform
from pathlm.text.synthetic.steps import Arithmetic, Compose, Pointer, Repeat, Rewrite
from pathlm.text.synthetic.task import SPLITS, Question, Sample, SampleStream, Task

__all__ = ["LONG_TASKS", "SPLITS", "TASKS", "LongTask", "Question", "Sample", "SampleStream", "Task", "open_task", "samples"]

TASKS: dict[str, type[Task]] = {
    kind.name: kind for kind in (Copy, Reverse, Transform, Brackets, Arithmetic, Rewrite, Repeat, Pointer, Compose)
}
LONG_TASKS: dict[str, type[LongTask]] = {kind.name: kind for kind in (Needle, Hops, Variables, Sum, Program)}
"""Tasks with filler, of any length."""


def open_task(spec: str, **options: Any) -> Task:
    """Return a task by name, with options in the string or as keywords.

    `open_task("pointer:nodes=20,max_k=4")` and `open_task("pointer", nodes=20, max_k=4)` are the same task.

    Raises `ValueError` naming the task, or the option, its value and the rule, when it cannot be used.
    """
    name, _, text = spec.partition(":")
    known: dict[str, type[Task]] = {**TASKS, **LONG_TASKS}
    if name not in known:
        raise ValueError(f"task {spec!r}: known tasks are {', '.join(known)}")
    kind = known[name]
    types = {f.name: f.type for f in fields(kind)}  # type: ignore[arg-type]
    written: dict[str, Any] = {}
    for option in filter(None, text.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"task {spec!r}: {option!r} must have the form name=value, for example {name}:{next(iter(types))}=4")
        written[key.strip()] = _read(value.strip(), types.get(key.strip()), f"task {spec!r}: {key.strip()}")
    if twice := sorted(written.keys() & options.keys()):
        raise ValueError(f"task {spec!r}: {', '.join(twice)} is given twice")
    try:
        return with_options(kind, written | options)
    except ValueError as error:
        raise ValueError(f"task {spec!r}: {error}") from error


def samples(spec: str, split: str = "train", *, seed: int = 0) -> SampleStream:
    """Return the endless samples of a task: iterate over them, or ask for `.sample(index)`."""
    return SampleStream(open_task(spec), split, seed=seed)


def _read(text: str, kind: Any, name: str) -> Any:
    """Read an option's value; all options are whole numbers or one of a few names."""
    if kind is not int:
        if (names := get_args(kind)) and text not in names:
            raise ValueError(f"{name}={text!r}: must be one of {', '.join(names)}")
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r}: must be a whole number") from None
