"""The page: chapters of runs put into a template, and written in one step where nothing of somebody else's lies."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path as File
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pathlm.report import answers, compare, passages, routes, signals, training
from pathlm.report.figure import Chapter, Missing, Section, number, told
from pathlm.report.read import OTHER_FORM, Run, read, require
from pathlm.words import visible

MARK = '<meta name="generator" content="pathlm report">'
"""Stands near the beginning of every page, so that a page may be written over and other files may not."""
FAMILIES = {"brian": "BRIAN", "brillm": "BriLLM"}


@dataclass(frozen=True)
class Written:
    """A page that was written, and what could not be shown on it."""

    file: File
    bytes: int
    notes: tuple[str, ...]


def report(folders: Sequence[File | str] | File | str, out: File | str | None = None) -> Written:
    """Make one HTML page of what some runs wrote into their folders; it needs no network and no other file.

    Args:
        folders: A run folder, or several to be shown beside each other.
        out: The page; by default `report.html` in the folder of a single run, and in the working directory for several.

    Raises `FileNotFoundError` for a folder that does not exist, and `ValueError` for one with nothing to show, for a damaged `run.json` or
    `metrics.jsonl` (naming the file and the line), and for an `out` that is something else than a page of ours. Other damaged files are
    left out; the page and `notes` say so.
    """
    given = [folders] if isinstance(folders, str | File) else list(folders)
    if not given:
        raise ValueError("folders=[]: name at least one run")
    for folder in given:
        require(folder)
    file = File(out) if out is not None else (File(given[0]) if len(given) == 1 else File()) / "report.html"
    _check(file)
    runs = [read(folder) for folder in given]
    page = render(runs)
    _write(file, page)
    return Written(file, len(page), tuple(note for run in runs for note in run.notes))


def render(runs: Sequence[Run]) -> bytes:
    """Return the page of some runs as UTF-8. Notes of what could not be shown are added to the runs."""
    chapters = [_chapter(run, f"r{number}") for number, run in enumerate(runs, start=1)]
    environment = Environment(
        loader=PackageLoader("pathlm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_final,
    )
    return (
        environment.get_template("page.html")
        .render(
            mark=Markup(MARK),
            chapters=chapters,
            beside=compare.beside(runs),
            title=", ".join(run.name for run in runs),
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            version=version("pathlm"),
        )
        .encode()
    )


def _final(value: Any) -> Any:
    """Make every text of the page one that does nothing; what a template or a picture wrote is left as it is."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _chapter(run: Run, key: str) -> Chapter:
    """Return everything about a run that its files tell. A file of another form than ours becomes a note."""
    folder = str(run.folder)
    place = shlex.quote(f"./{folder}" if folder.startswith("-") else folder)  # what begins with a dash would be read as an option
    chapter = Chapter(key, run.name, _facts(run))
    trace = routes.TRACE.format(run=place)
    sentences = passages.section(run)
    found: list[tuple[str, Callable[[], tuple[list[Section], list[Missing]]]]] = [
        ("metrics.jsonl or gates.jsonl", lambda: _listed(training.section(run))),
        ("eval.json", lambda: _listed(compare.results(run))),
        ("long-context.json", lambda: _listed(answers.long_contexts(run))),
        ("synthetic.json", lambda: _listed(answers.synthetic(run))),
        ("choices.json", lambda: _listed(answers.choices(run))),
        ("routes.json or paths.jsonl", lambda: _listed(routes.where(run))),
        ("paths.jsonl", lambda: _listed((sentences, [] if sentences else [Missing("sentences with the path of every token", trace)]))),
        ("paths.jsonl or neighbours.jsonl", lambda: signals.section(run, trace)),
        ("routes.json", lambda: _listed(routes.worth(run))),
    ]
    spoilt: set[str] = set()
    for name, make in found:
        try:
            sections, missing = make()
        except OTHER_FORM as error:
            if not spoilt.isdisjoint(name.split(" or ")):
                continue  # another section has said so
            spoilt.update(name.split(" or "))
            run.notes.append(f"{run.folder / name} is not of the form that is expected here ({error!r}); what it holds is not shown")
            continue
        chapter.sections += sections
        chapter.missing += [Missing(it.what, it.command.format(run=place)) for it in missing]
    chapter.notes = run.notes
    return chapter


def _listed(found: tuple[Section | None, list[Missing]]) -> tuple[list[Section], list[Missing]]:
    section, missing = found
    return ([] if section is None else [section]), missing


def _facts(run: Run) -> list[tuple[str, str]]:
    """Return a run at a glance: what it is and where it ended."""
    config = run.record.get("config") if isinstance(run.record.get("config"), dict) else {}
    assert isinstance(config, dict)
    facts = [("family", FAMILIES.get(run.family, run.family or "not said"))]
    if config.get("preset"):
        facts.append(("preset", str(config["preset"])))
    if run.family == "brian":
        given = [run.model.get(name) for name in ("pre_blocks", "pool_blocks", "post_blocks")]
        size = [part for part in given if isinstance(part, int)]
        if len(size) == len(given):
            facts.append(("blocks", f"{size[0]} before, {size[1]} in the pool, {size[2]} after" if size[1] else f"{sum(size)}, no pool"))
    if run.family == "brillm" and isinstance(run.model.get("vocab_size"), int):
        facts.append(("nodes", told(run.model["vocab_size"], 0)))
    if number(run.record.get("parameters")) is not None:
        facts.append(("parameters", told(run.record["parameters"], 0)))
    facts += [(name, value) for name, value in compare.ends(run) if value != "–" and name != "tokens/s"]
    if run.record.get("started"):
        facts.append(("started", str(run.record["started"])[:16].replace("T", " ")))
    return facts


def _check(file: File) -> None:
    """Refuse a place where no page can be, or where something else lies."""
    if not file.parent.is_dir():
        raise FileNotFoundError(f"out={str(file)!r}: the folder {str(file.parent)!r} does not exist")
    if file.is_dir():
        raise ValueError(f"out={str(file)!r}: is a folder; name a file, such as {str(file / 'report.html')!r}")
    if file.exists():
        with file.open("rb") as page:
            if MARK.encode() not in page.read(1024):
                raise ValueError(f"out={str(file)!r}: exists and was not written by pathlm report; name another file, or remove it")


def _write(file: File, page: bytes) -> None:
    """Put a page in its place in one step: whoever opens it sees the old one or the new one."""
    handle, name = tempfile.mkstemp(prefix=".writing-", suffix=".html", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(page)
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        File(name).unlink(missing_ok=True)
        raise
