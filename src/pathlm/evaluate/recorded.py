"""What a run left in its folder, read without torch: its record, its log, its gates, and what evaluations wrote beside them."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

LOSS = "validation/loss"
VISITS = "route/block_evaluations"
SECOND_PASS = "loss/whole"
"""Logged by steps of training that read their rows a second time, with all route steps."""
EVALUATIONS = ("eval", "routes", "synthetic", "choices", "long-context")
"""Files that `pathlm eval` writes, one entry per split."""
OF_TRAINING = "validation rows"
"""What the losses of the training log are called beside the splits of `eval.json`."""


@dataclass(frozen=True)
class Recorded:
    """A run, or a model folder that was evaluated, by its files alone."""

    folder: Path
    record: Mapping[str, Any]
    """`run.json`; for a folder that is no run `{"model": its config.json}`"""
    log: Sequence[Mapping[str, Any]] = ()
    """Rows of `metrics.jsonl`"""
    verdicts: Sequence[Mapping[str, Any]] = ()
    """Rows of `gates.jsonl`"""
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Content of `eval.json`, `routes.json` … by name, empty where there is no such file"""
    before: Recorded | None = None
    """The run whose weights this one began with, where its folder could be found"""

    @property
    def name(self) -> str:
        """What the folder is called."""
        return self.folder.name

    @property
    def model(self) -> Mapping[str, Any]:
        """The model's configuration."""
        found: Mapping[str, Any] = self.record.get("model") or {}
        return found

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's configuration, empty for a folder that is no run."""
        found: Mapping[str, Any] = self.record.get("config") or {}
        return found

    @property
    def kind(self) -> str:
        """`graph` (BriLLM), `plain`, `fixed` (a pool whose blocks are visited in order), `routed`, or `wrapped` (not yet trained)."""
        if self.model.get("model_type") == "brillm":
            return "graph"
        if not self.model.get("pool_blocks"):
            return "plain"
        if not self.config:
            return "wrapped"
        return "fixed" if self.config.get("curriculum") == "fixed" else "routed"

    @property
    def blocks(self) -> int | None:
        """How many blocks the model holds; None for a signal graph."""
        if self.kind == "graph":
            return None
        parts = [self.model.get(f"{part}_blocks") for part in ("pre", "pool", "post")]
        known = [part for part in parts if isinstance(part, int)]
        return sum(known) if known else self.model.get("num_hidden_layers")

    @cached_property
    def last(self) -> Mapping[str, Any]:
        """The last evaluation row of the log; empty where there is none."""
        return next((row for row in reversed(self.log) if LOSS in row), {})

    @property
    def tokens(self) -> int | None:
        """Positions read so far, those of the run that the weights come from included; None where these are not known."""
        found = _with_earlier(self, float(self._read()), lambda before, step: float(before._read(step)))
        return None if found is None else int(found)

    @property
    def training_flops(self) -> float | None:
        """Operations of training so far, three forward passes a token; None where the folder does not record what a token costs."""
        return _with_earlier(self, self._flops(), Recorded._flops)

    def _read(self, step: int | None = None) -> int:
        """Return the positions that this run itself had read at a step, by default at the last one that was logged."""
        if step is not None:
            return step * int(self.config["batch_tokens"])
        return max((row["tokens"] for row in self.log if isinstance(row.get("tokens"), int)), default=0)

    def _flops(self, step: int | None = None) -> float | None:
        """Return this run's own operations up to a step: of a pool, as many visits as were logged on average.

        Where a second pass with all route steps was logged, it counts in full but for the blocks before the pool, which run once.
        """
        whole, visit = (number(self.record.get(name)) for name in ("flops_per_token", "flops_per_visit"))
        if whole is None or visit is None:
            return None
        rows = [row for row in self.log if LOSS not in row and (step is None or row["step"] <= step)]
        ran = [value for row in rows if (value := number(row.get(VISITS))) is not None]
        if visit and not ran:
            return None
        if not visit:
            return 3.0 * self._read(step) * whole
        twice = sum(SECOND_PASS in row for row in rows) / len(ran)
        again = whole - visit * int(self.model.get("pre_blocks") or 0)
        return 3.0 * self._read(step) * (whole - visit * (self.most_visits - statistics.fmean(ran)) + twice * again)

    @property
    def most_visits(self) -> int:
        """Blocks run for a token that takes all its route steps."""
        around = sum(int(self.model.get(f"{part}_blocks") or 0) for part in ("pre", "post"))
        return around + int(self.model.get("max_route_steps") or 0) * int(self.model.get("route_top_k") or 1)

    def active_blocks(self) -> float | None:
        """Return the blocks that run for a token when text is read: as evaluated, else as logged; None for a signal graph."""
        if self.kind in ("plain", "graph"):
            return number(self.blocks)
        for entry in self.texts().values():
            if (ran := dig(entry, "routes", "block_evaluations")) is not None:
                return ran
        for entry in self.evaluations.get("routes", {}).values():
            if (ran := dig(entry, "routed", "block_evaluations")) is not None:
                return ran
        return number(self.last.get(f"validation/{VISITS}"))

    @property
    def tokens_per_s(self) -> float | None:
        """Median speed of training, in the log's rows."""
        speeds = [value for row in self.log if (value := number(row.get("time/tokens_per_s"))) is not None]
        return statistics.median(speeds) if speeds else None

    def texts(self) -> dict[str, Mapping[str, Any]]:
        """Return the entries of `eval.json` by split, `test` before the others; those of a budget or of branches asked for are left out."""
        plain = {name: entry for name, entry in self.evaluations.get("eval", {}).items() if name == entry.get("split")}
        return dict(sorted(plain.items(), key=lambda item: item[0] != "test"))

    def losses(self) -> dict[str, dict[str, Any]]:
        """Return what the model lost, by split and over the validation rows of its training: loss, bits per byte, and `of`, on what.

        Two losses compare where `of` is the same: the same text, cut into the same tokens, seen through the same window.
        """
        found = {}
        for split, entry in self.texts().items():
            of = [at(entry, "corpus", "digest")]
            of += [at(entry, "model", name) for name in ("documents", "bytes", "tokens", "context", "stride")]
            found[split] = {name: dig(entry, "model", name) for name in ("loss", "bits_per_byte")} | {"of": of}
        data = self.config.get("data") or {}
        if (loss := number(self.last.get(LOSS))) is not None and not data.get("task_share"):
            of = [self.record.get("corpus_sha256"), data.get("length"), self.config.get("eval_rows")]
            found[OF_TRAINING] = {"loss": loss, "bits_per_byte": None, "of": of}
        return {name: it for name, it in found.items() if it["loss"] is not None}


def _with_earlier(run: Recorded, here: float | None, of: Callable[[Recorded, int], float | None]) -> float | None:
    """Add to what a run spent what its first weights had cost, run by run; None where one of them does not tell."""
    origin = run.record.get("init")
    if here is None or not origin:
        return here
    step = re.search(r"step-(\d+)$", str(origin.get("checkpoint")))
    if run.before is None or step is None:
        return None
    earlier = _with_earlier(run.before, of(run.before, int(step[1])), of)
    return None if earlier is None else here + earlier


def number(value: Any) -> float | None:
    """Return a finite number as a float, and None for anything else: what was not measured, NaN, text."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def at(entry: Any, *names: str) -> Any:
    """Return what is at the end of nested mappings; None where one of them is not there."""
    for name in names:
        entry = entry.get(name) if isinstance(entry, Mapping) else None
    return entry


def dig(entry: Any, *names: str) -> float | None:
    """Return the number at the end of nested mappings; None where there is none."""
    return number(at(entry, *names))


def listed(entry: Any, *names: str) -> list[Mapping[str, Any]]:
    """Return the rows at the end of nested mappings; none where there are none."""
    found = at(entry, *names)
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def read_runs(folders: Sequence[Path | str]) -> list[Recorded]:
    """Read several runs, each joined to the run that its first weights come from. Raises `ValueError` for a folder that is named twice."""
    if not folders:
        raise ValueError("runs=[]: name at least one run folder")
    if doubled := [str(folder) for n, folder in enumerate(folders) if Path(folder).resolve() in {Path(f).resolve() for f in folders[:n]}]:
        raise ValueError(f"run folder {doubled[0]!r} is named twice")
    return [read(folder, beside=folders) for folder in folders]


def read(folder: Path | str, *, beside: Sequence[Path | str] = (), after: Sequence[Path] = ()) -> Recorded:
    """Read a run folder, or a model folder that `pathlm eval` has measured.

    The run that the first weights come from is looked for where the record says, and among the folders `beside`; `after` are the runs that
    began with this one's. A last line that was cut off in writing is left out. Raises `FileNotFoundError` where there is no folder, and
    `ValueError` naming the file, and the line, for one that holds no run, nothing measured, or damaged files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"run folder {str(folder)!r} {'is a file' if folder.exists() else 'does not exist'}")
    record = _mapping(folder / "run.json")
    if record is None:
        config = _mapping(folder / "config.json")
        if config is None:
            raise ValueError(f"{str(folder)!r} holds no run: it has neither run.json nor, as a model folder, config.json")
        record = {"model": config}
    elif not isinstance(record.get("config"), dict) or not isinstance(record.get("model"), dict):
        raise ValueError(f"{folder / 'run.json'} is not the record of a run: it has no config, or no model")
    log, verdicts = (_rows(folder / name) for name in ("metrics.jsonl", "gates.jsonl"))
    evaluations = {name: found for name in EVALUATIONS if (found := _mapping(folder / f"{name}.json"))}
    for name, entries in evaluations.items():
        if wrong := [split for split, entry in entries.items() if not isinstance(entry, dict)]:
            raise ValueError(f"{folder / f'{name}.json'} is damaged: its entry {wrong[0]!r} holds nothing")
    if not log and not evaluations:
        raise ValueError(f"{str(folder)!r} holds nothing measured: its metrics.jsonl is missing or empty, and it has not been evaluated")
    return Recorded(folder.resolve(), record, log, verdicts, evaluations, _before(record, beside, (*after, folder.resolve())))


def _before(record: Mapping[str, Any], beside: Sequence[Path | str], after: Sequence[Path]) -> Recorded | None:
    """Read the run that a record's first weights come from, where it can be found."""
    checkpoint = Path(str((record.get("init") or {}).get("checkpoint", "")))
    if checkpoint.parent.name != "checkpoints":
        return None
    origin = checkpoint.parent.parent
    for place in (origin, *(Path(folder) for folder in beside if Path(folder).resolve().name == origin.name)):
        if (place / "run.json").is_file() and place.resolve() not in after:
            return read(place, beside=beside, after=after)
    return None


def _mapping(file: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where there is no file."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged: it holds no names and values")
    return found


def _rows(file: Path) -> tuple[dict[str, Any], ...]:
    """Read the whole lines of a JSON-lines file, rows that have a step; none where there is no file."""
    rows = []
    for at, line in enumerate(file.read_bytes().splitlines(keepends=True) if file.is_file() else [], start=1):
        if not line.endswith(b"\n"):
            break  # it was being written
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {at}: is damaged: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{file}, line {at}: is damaged: it is no row with a step")
        rows.append(row)
    return tuple(rows)


def check_file(name: str, place: Path | str | None) -> None:
    """Raise `ValueError` where a file is to be written at the end and a folder is in its place; `name` is the option's."""
    if place is not None and Path(place).is_dir():
        raise ValueError(f"{name}={str(place)!r}: is a folder, must be the name of a file")


def replace(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that the file is replaced whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, file)
