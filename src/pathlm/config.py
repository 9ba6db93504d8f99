"""The configuration of a run: what a recipe file may say, with every unknown name an error. Imports no torch."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

T = TypeVar("T")

RHYTHM = {"name", "out", "preset", "steps", "eval_every", "save_every", "keep_last", "log_every", "tensorboard", "gates"}
"""Options that a resumed run may change without changing any number; `steps` has a rule of its own."""
EXECUTION = {"micro_rows", "compile", "activation_checkpointing", "strategy", "unused_parameters"}
"""Options that a resumed run may change and that change its numbers by rounding only."""


class RunError(RuntimeError):
    """A run that had to stop; the message says why, what is safe and what to do."""


@strict
@dataclass(kw_only=True)
class DataConfig:
    """What a run reads: a prepared corpus, synthetic tasks, or both mixed."""

    corpus: str | None = None
    """Folder written by `pathlm prepare`; None when only tasks are trained on."""
    length: int = 256
    """Tokens per packed row."""
    tasks: dict[str, float] = field(default_factory=dict)
    """Synthetic tasks with their relative weights; options follow the name, as in `"pointer:nodes=20,max_k=3"`."""
    task_share: float = 0.0
    """Share of rows that come from the tasks, 0 to 1."""
    task_labels: Literal["answer", "answer-end", "all"] = "answer"
    """Which tokens of a sample are targets: its answer, also the end after it, or all."""

    def validate_data(self) -> None:
        """Refuse combinations that cannot be read."""
        _require(self.length >= 2, "data.length", self.length, "a row needs at least 2 tokens")
        _require(0.0 <= self.task_share <= 1.0, "data.task_share", self.task_share, "must lie between 0 and 1")
        _require(
            self.corpus is not None or self.task_share == 1.0, "data.corpus", self.corpus, "name a prepared folder, or set task_share = 1.0"
        )
        _require(bool(self.tasks) == (self.task_share > 0), "data.tasks", self.tasks, f"tasks and task_share={self.task_share} go together")
        _require(all(w > 0 for w in self.tasks.values()), "data.tasks", self.tasks, "weights must be positive")


@strict
@dataclass(kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule, a pure function of the step."""

    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """`wsd` is warm-up, stable, decay."""
    warmup_steps: int = 20
    decay_steps: int = 0
    """Length of the final linear decay of `wsd`, in steps."""
    final_lr_share: float = 0.1
    """Learning rate at the last step as a share of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices only, never to norms, biases or one-dimensional parameters."""
    clip: float = 1.0
    """Largest global gradient norm."""

    def validate_optim(self) -> None:
        """Refuse values that cannot train."""
        _require(0 < self.lr < inf, "optim.lr", self.lr, "must be positive and finite")
        _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "must not be negative")
        _require(self.decay_steps >= 0, "optim.decay_steps", self.decay_steps, "must not be negative")
        _require(0.0 <= self.final_lr_share <= 1.0, "optim.final_lr_share", self.final_lr_share, "must lie between 0 and 1")
        _require(all(0.0 <= b < 1.0 for b in self.betas), "optim.betas", self.betas, "must lie in [0, 1)")
        _require(self.eps > 0, "optim.eps", self.eps, "must be positive")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "must not be negative")
        _require(self.clip > 0, "optim.clip", self.clip, "must be positive")
        if self.schedule == "wsd":
            _require(self.decay_steps > 0, "optim.decay_steps", self.decay_steps, 'schedule = "wsd" needs a decay of at least one step')


@strict
@dataclass(kw_only=True)
class RunConfig:
    """One training run: a preset, what differs from it, the data, the optimizer and the rhythm of the run."""

    name: str
    """The run is written to `<out>/<name>`."""
    preset: str
    out: str = "runs"
    seed: int = 0
    curriculum: str = "default"
    """Which of the family's curricula to follow."""
    knobs: dict[str, Any] = field(default_factory=dict)
    """Values that replace those of the curriculum: `noise = 0.5` in every stage, `"hand over.noise" = 0.5` in that one."""
    stages: dict[str, float] = field(default_factory=dict)
    """Parts of the run that the curriculum's stages get, by name, where they differ from the curriculum's own; 0 leaves a stage out."""
    gates: Literal["stop", "warn"] = "stop"
    """What a failing gate at the end of a stage does: stop the run, or only say so."""
    init: str | None = None
    """Folder of a run, a checkpoint or a Llama model whose weights the run starts from; None starts from random ones."""
    steps: int = 1000
    batch_tokens: int = 8192
    """Tokens per optimizer step over all processes, a multiple of `data.length`."""
    micro_rows: int = 8
    """Rows per forward pass and process; gradients accumulate up to `batch_tokens`."""
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    activation_checkpointing: bool = False
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """How several processes share the model, when there are several."""
    unused_parameters: bool = False
    """Allow steps that give some parameters no gradient. `ddp` then walks the graph at every step. BRIAN does not need it."""
    eval_every: int = 100
    eval_rows: int = 64
    """Rows of the validation split measured at each evaluation."""
    save_every: int = 100
    keep_last: int = 2
    log_every: int = 10
    tensorboard: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of the family's configuration that differ from the preset."""
    data: DataConfig = field(default_factory=lambda: DataConfig(task_share=1.0, tasks={"copy": 1.0}))
    optim: OptimConfig = field(default_factory=OptimConfig)

    def validate_run(self) -> None:
        """Refuse a rhythm that does not add up."""
        for name in ("steps", "batch_tokens", "micro_rows", "eval_every", "eval_rows", "save_every", "keep_last", "log_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        _require(
            bool(self.name) and "/" not in self.name and not self.name.startswith("."), "name", self.name, "must be a plain folder name"
        )
        _require(self.seed >= 0, "seed", self.seed, "must not be negative")
        _require(self.init != "", "init", self.init, "name a folder, or leave it out")
        _require(all(0 <= part < inf for part in self.stages.values()), "stages", self.stages, "parts must be finite and not negative")
        rule = f"must be a multiple of data.length={self.data.length}"
        _require(self.batch_tokens % self.data.length == 0, "batch_tokens", self.batch_tokens, rule)
        rule = f"warm-up and decay must fit into steps={self.steps}"
        _require(self.optim.warmup_steps + self.optim.decay_steps <= self.steps, "optim.warmup_steps", self.optim.warmup_steps, rule)

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return Path(self.out) / self.name

    def to_dict(self) -> dict[str, Any]:
        """Return every field as plain values, ready for JSON."""
        return asdict(self)


def with_options(cls: type[T], options: Mapping[str, Any], *, where: str = "") -> T:
    """Build `cls(**options)`, refusing names that it does not declare. Nested dataclasses are built from nested mappings."""
    hints = get_type_hints(cls)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"{cls.__name__} has no option {', '.join(where + name for name in unknown)}; it has {', '.join(sorted(known))}")
    values = {name: _coerce(hints[name], value, where + name) for name, value in options.items()}
    return build_strict(cls, values)


def build_strict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Return `cls(**values)`, a strict dataclass's complaints as one-line `ValueError`s."""
    try:
        return cls(**values)
    except StrictDataclassError as error:
        raise ValueError(complaint(error)) from error
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from error


def complaint(error: StrictDataclassError) -> str:
    """Return what a strict dataclass refuses in one line: the field, its value and the rule."""
    return " ".join(str(error.__cause__ or error).split())


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with pathlm, by name: the file's path below `recipes/`, without `.toml`."""
    inside = Path(__file__).parent / "recipes"  # put there by the wheel; a checkout keeps them at its root
    home = inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"
    return {file.relative_to(home).with_suffix("").as_posix(): file for file in sorted(home.rglob("*.toml"))}


def find_recipe(recipe: Path | str) -> Path:
    """Return the file that `recipe` means: an existing file, or the name of a shipped recipe.

    Raises `FileNotFoundError` listing the shipped names.
    """
    file = Path(recipe)
    if file.is_file():
        return file
    shipped = shipped_recipes()
    if (name := str(recipe)) in shipped:
        return shipped[name]
    raise FileNotFoundError(f"there is no recipe file {name!r}, and no shipped recipe of that name; shipped: {', '.join(shipped)}")


def load(recipe: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML recipe, a file or the name of a shipped one, and apply overrides of the form `optim.lr=1e-3`.

    Raises `FileNotFoundError` when there is no such recipe, and `ValueError` naming the field, the value and the rule when it
    cannot be used.
    """
    file = find_recipe(recipe)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not valid TOML: {error}") from error
    table.setdefault("name", file.stem)
    for text in overrides:
        override(table, text)
    return with_options(RunConfig, table)


def override(table: dict[str, Any], text: str) -> None:
    """Set one dotted name of the nested `table`, from a text such as `optim.lr=1e-3`; `stages.exit=` takes back what it says.

    Values are read as TOML, and as plain text where they are not TOML. Raises `ValueError` for a text of another form, and where there is
    nothing to take back.
    """
    key, equals, written = text.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {text!r} must have the form name=value, for example optim.lr=1e-3")
    if not written.strip():
        if not _take_back(table, key.strip()):
            raise ValueError(f"--set {text!r}: takes back what a recipe says of {key.strip()}, but it says nothing of it")
        return
    try:
        value = tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        value = written
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set {text!r}: {parent} is a value, not a section")
    table[last] = value


def _take_back(table: dict[str, Any], name: str) -> bool:
    """Remove a dotted name from a nested table, whose own keys may have dots (`"hand-over.noise" = 0.5`); say whether it was there."""
    parent, _, rest = name.partition(".")
    inner = table.get(parent)
    deeper = isinstance(inner, dict) and bool(rest) and _take_back(inner, rest)
    return table.pop(name, None) is not None or deeper


def _coerce(kind: Any, value: Any, name: str) -> Any:
    """Turn TOML's tables, lists and whole numbers into the nested dataclasses, tuples and floats that are declared."""
    if is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, Mapping):
            return with_options(kind, value, where=name + ".")
        if not isinstance(value, kind):
            raise ValueError(f"{name}={value!r} must be a section with names and values")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind == dict[str, float] and isinstance(value, Mapping):
        return {key: float(share) if isinstance(share, int) else share for key, share in value.items()}
    if kind == tuple[float, float] and isinstance(value, list):
        return tuple(float(v) if isinstance(v, int) else v for v in value)
    return value


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: {rule}")
