"""What a manifest may say: a recipe, rows of overrides, seeds; every row is read before anything is trained. Imports no torch."""

# No postponed annotations here: with them, `strict` would check no types.

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict

from pathlm.config import RunConfig, build_strict, find_recipe, load, with_options

MEASURES = {
    "loss": "nats/token",
    "bits_per_byte": "bits/byte",
    "block_evaluations": "blocks/token",
    "tokens_per_s": "tokens/s",
    "parameters": "parameters",
    "tokens": "tokens read",
}
"""Metrics with a name of their own, and their headings; all others are named as the run's log names them."""
EVALUATED = ("loss", "bits_per_byte", "block_evaluations")
"""Those of them that come from the documents of a split."""
USUAL = ("loss", "bits_per_byte", "block_evaluations", "tokens_per_s", "parameters")
USUAL_WITHOUT_TEXT = ("validation/loss", "tokens_per_s", "parameters")
SEEDS = 1000
"""Seeds lie below this: a row that begins from another reads its data in the order of a seed beyond it."""


@strict
@dataclass(kw_only=True)
class EvaluationConfig:
    """How every trained row is measured: the options of `pathlm eval`."""

    split: str = "test"
    """Not `validation`, where the checkpoint was chosen."""
    context: int | None = None
    stride: int | None = None
    max_documents: int | None = None
    max_tokens: int | None = None

    def validate_evaluation(self) -> None:
        """Refuse numbers that measure nothing."""
        for name in ("context", "stride", "max_documents", "max_tokens"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"evaluation.{name}", value, "must be at least 1")


@strict
@dataclass(kw_only=True)
class Row:
    """One row of the table: what differs from the recipe, and where it begins."""

    name: str
    about: str = ""
    """A few words for the table."""
    set: list[str] = field(default_factory=list)
    """Overrides, as behind `--set`: `optim.lr=1e-3`."""
    origin: str | None = None
    """`from` in a manifest: another row, from whose checkpoint of the same seed this one begins."""

    def validate_row(self) -> None:
        """Refuse names that are no folder's, and overrides of what the manifest decides."""
        _require(_plain(self.name), "name", self.name, "must be a plain folder name")
        ours = {"name": "the row's name decides it", "out": "the manifest's out decides it", "seed": "the manifest's seeds decide it"}
        if self.origin is not None:
            ours["init"] = f"from = {self.origin!r} decides it"
        for text in self.set:
            _require_free(text, ours)


@dataclass(frozen=True)
class Run:
    """A row with one seed: one run folder."""

    row: Row
    seed: int
    config: RunConfig
    before: "Run | None" = None
    """The run that this one begins from."""

    @property
    def title(self) -> str:
        """How messages call it."""
        return f"row {self.row.name!r}, seed {self.seed}"


@strict
@dataclass(kw_only=True)
class Experiment:
    """A table of runs: rows of overrides over one recipe, each with every seed."""

    name: str
    recipe: str
    """A recipe's file, or the name of a shipped one; a file is looked for beside the manifest, too."""
    rows: list[Row]
    out: str = ""
    """Folder of the run folders and of the table; `runs/<name>` where it is not given. Manifests may share one, and then equal rows."""
    seeds: list[int] = field(default_factory=lambda: [0])
    baseline: str | None = None
    """The row with which all others are compared, seed by seed."""
    set: list[str] = field(default_factory=list)
    """Overrides for every row; a row's own come after them."""
    metrics: list[str] | None = None
    """Columns of the table; None is what fits the data."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    file: str = ""
    """Where it was read."""

    def validate_experiment(self) -> None:
        """Refuse what is no table."""
        _require(_plain(self.name), "name", self.name, "must be a plain folder name")
        names = [row.name for row in self.rows]
        _require(bool(names), "rows", names, "there must be at least one")
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        _require(twice is None, "rows", twice, "two rows have this name")
        for i, row in enumerate(self.rows):
            rule = f"must name a row above it; there are {', '.join(names[:i]) or 'none'}"
            _require(row.origin is None or row.origin in names[:i], f"row {row.name!r}: from", row.origin, rule)
        _require(bool(self.seeds), "seeds", self.seeds, "there must be at least one")
        _require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "must differ from each other")
        _require(all(0 <= seed < SEEDS for seed in self.seeds), "seeds", self.seeds, f"must lie in 0 … {SEEDS - 1}")
        _require(self.baseline is None or self.baseline in names, "baseline", self.baseline, f"must be one of the rows {', '.join(names)}")
        for text in self.set:
            _require_free(text, {"name": "rows have names", "out": "write out = … in the manifest", "seed": "write seeds = […] there"})
        for name in self.metrics or ():
            rule = f"must be one of {', '.join(MEASURES)}, or a name of metrics.jsonl, such as validation/loss"
            _require(name in MEASURES or "/" in name, "metrics", name, rule)
        _require(
            self.metrics is None or len(set(self.metrics)) == len(self.metrics) > 0, "metrics", self.metrics, "each once, one at least"
        )

    @property
    def folder(self) -> Path:
        """Where runs and tables are written."""
        return Path(self.out or f"runs/{self.name}")

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Every row with every seed, in the order in which they are trained: one seed's rows, then the next one's."""
        return tuple(self._runs())

    @property
    def columns(self) -> tuple[str, ...]:
        """The metrics of the table."""
        if self.metrics is not None:
            return tuple(self.metrics)
        return USUAL if all(run.config.data.corpus is not None for run in self.runs) else USUAL_WITHOUT_TEXT

    @property
    def evaluates(self) -> bool:
        """Whether a column comes from the documents of a split."""
        return any(name in EVALUATED for name in self.columns)

    def chosen(self, rows: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> tuple[Run, ...]:
        """Return the runs of some rows, with the rows that they begin from, and of some seeds; None is all.

        Raises `ValueError` naming a row or a seed that the manifest does not have.
        """
        names = [row.name for row in self.rows]
        for name in rows or ():
            _require(name in names, "rows", name, f"{self.place} has {', '.join(names)}")
        for seed in seeds or ():
            _require(seed in self.seeds, "seeds", seed, f"{self.place} has {', '.join(map(str, self.seeds))}")
        wanted = set(names if rows is None else rows)
        for row in reversed(self.rows):
            if row.name in wanted and row.origin is not None:
                wanted.add(row.origin)
        return tuple(run for run in self.runs if run.row.name in wanted and (seeds is None or run.seed in seeds))

    @property
    def place(self) -> str:
        """How messages call the manifest."""
        return self.file or self.name

    def _runs(self) -> Iterator[Run]:
        for seed in self.seeds:
            known: dict[str, Run] = {}
            for row in self.rows:
                before = known[row.origin] if row.origin is not None else None
                try:
                    known[row.name] = run = Run(row, seed, self._config(row, seed, before), before)
                except ValueError as error:
                    raise ValueError(f"{self.place}: row {row.name!r}: {error}") from error
                yield run

    def _config(self, row: Row, seed: int, before: Run | None) -> RunConfig:
        # A row that goes on where another ended must not read the same text in the same order again.
        order = seed if before is None else before.config.seed + SEEDS
        ours = [f"name={json.dumps(f'{row.name}-{seed}')}", f"out={json.dumps(str(self.folder))}", f"seed={order}"]
        if before is not None:
            ours.append(f"init={json.dumps(str(before.config.folder))}")
        return load(self.recipe, [*self.set, *row.set, *ours])


def read(file: Path | str) -> Experiment:
    """Read a manifest and every run that it describes.

    Raises `FileNotFoundError` where there is none, and `ValueError` naming the file, the row, the field, its value and
    the rule where something cannot be used.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no manifest {str(file)!r}")
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not valid TOML: {error}") from error
    try:
        found = _experiment({"name": file.stem} | table, file)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    assert found.runs  # reads every row's configuration
    return found


def _experiment(table: dict[str, Any], file: Path) -> Experiment:
    """Build the experiment of a manifest's table."""
    known = {f.name for f in fields(Experiment)} - {"file"}
    if unknown := sorted(table.keys() - known):
        raise ValueError(f"a manifest has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    for name in ("recipe", "rows"):
        if name not in table:
            raise ValueError(f"{name} is missing; a manifest needs a recipe and [[rows]]")
    if not isinstance(table["rows"], list) or not all(isinstance(row, Mapping) for row in table["rows"]):
        raise ValueError(f"rows={table['rows']!r}: write each as a section [[rows]]")
    if not isinstance(table.get("evaluation", {}), Mapping):
        raise ValueError(f"evaluation={table['evaluation']!r}: write it as a section [evaluation]")
    rows = [_row(row, number) for number, row in enumerate(table["rows"], start=1)]
    evaluation = with_options(EvaluationConfig, table.get("evaluation", {}), where="evaluation.")
    found = build_strict(Experiment, table | {"rows": rows, "evaluation": evaluation, "file": str(file)})
    beside = file.parent / found.recipe
    try:
        return replace(found, recipe=str(find_recipe(beside if beside.is_file() else found.recipe)))
    except FileNotFoundError as error:
        raise ValueError(f"recipe={found.recipe!r}: {error}") from error


def _row(table: Mapping[str, Any], number: int) -> Row:
    known = {"name", "about", "set", "from"}
    name = f"row {table.get('name', number)!r}"
    if unknown := sorted(table.keys() - known):
        raise ValueError(f"{name}: a row has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    if "name" not in table:
        raise ValueError(f"{name}: a row needs a name")
    try:
        return build_strict(Row, {("origin" if key == "from" else key): value for key, value in table.items()})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _plain(name: str) -> bool:
    return bool(name) and "/" not in name and not name.startswith(".")


def _require_free(text: str, ours: Mapping[str, str]) -> None:
    name = text.partition("=")[0].strip()
    _require(name not in ours, "set", text, ours.get(name, ""))


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: {rule}")
