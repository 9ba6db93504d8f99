"""From a configuration to a run: checked as a whole before any work, recorded, then trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from pathlm.config import RunConfig
from pathlm.evaluate.checkpoint import find_checkpoint
from pathlm.train import checkpoint, gates, parallel, record, sinks
from pathlm.train.loop import RunResult, train
from pathlm.train.state import State, seed_everything


@dataclass(frozen=True)
class Job:
    """What a family and a data set bring to a run. Nothing is built yet."""

    model_config: Any
    build: Callable[[], Any]
    """Returns the model a run begins with: freshly initialised, or with the weights that `init` tells of."""
    curriculum: Callable[[int], Any]
    """Returns the curriculum of a run of so many steps."""
    param_groups: Callable[[Any], list[dict[str, Any]]]
    rows: Any
    validation: Any = None
    notes: tuple[str, ...] = ()
    init: dict[str, str] | None = None
    """The checkpoint whose weights the run starts from, and their sha256."""


def start(config: RunConfig, *, resume: bool = False, console: Console | None = None, watch: sinks.Sink | None = None) -> RunResult:
    """Train, or continue, the run that `config` describes; return how it ended.

    `watch` is called as a sink is, `(state, stage, metrics, model)` after every step and every evaluation, beside the run's own.

    Raises `ValueError` naming what cannot be used, before any work, and `RunError` when the run must stop: a number that is not
    finite, a checkpoint that cannot be written or read.
    """
    return carry_out(config, resolve(config), resume=resume, console=console, watch=watch)


def resolve(config: RunConfig, *, verify: bool = True) -> Job:
    """Open the data and look up the model's family; check that they fit each other.

    `verify` compares the corpus with its hashes, which reads it once.
    """
    from pathlm.models import family, library
    from pathlm.text.mixture import open_rows

    # A typo in a recipe is told before a large corpus is opened.
    model_config = library.preset_for_data(config.preset, **config.model)
    package = family(model_config.model_type)
    curriculum = partial(package.curriculum, config.curriculum, knobs=config.knobs, stages=config.stages, length=config.data.length)
    curriculum(config.steps, config=model_config)
    init = find_init(config)
    made = _made_with(config, init["checkpoint"], package.FRESH) if init else {}
    rows = open_rows(config.data, "train", seed=config.seed, verify=verify)
    validation = None
    notes: tuple[str, ...] = ()
    try:
        # Seed 0: runs that differ in their seed only are measured on the same rows.
        validation = open_rows(config.data, "validation", seed=0, verify=False)
    except ValueError as error:
        notes = (f"no validation: {error}",)
    model_config = fit_to_rows(config, rows, partial(library.preset_for_data, config.preset, **made))
    if init is not None:
        _check_tokenizer(config, init["checkpoint"], rows.tokenizer())
    return Job(
        model_config=model_config,
        build=partial(package.start_from, Path(init["checkpoint"]), model_config)
        if init
        else partial(package.from_rows, model_config, rows),
        curriculum=partial(curriculum, config=model_config),
        param_groups=partial(package.param_groups, optim=config.optim),
        rows=rows,
        validation=validation,
        notes=notes,
        init=init,
    )


def find_init(config: RunConfig) -> dict[str, str] | None:
    """Return where the weights are that `init` names (in a run: its best checkpoint, else its latest), and their hash."""
    if config.init is None:
        return None
    try:
        place = find_checkpoint(config.init)
        return {"checkpoint": str(place), "sha256": record.weights_digest(place)}
    except (ValueError, OSError) as error:
        raise ValueError(f"init={config.init!r}: {error}") from error


def _made_with(config: RunConfig, place: str, fresh: Sequence[str]) -> dict[str, Any]:
    """Return how the weights of `init` were made, refusing a recipe that says otherwise: nothing is made anew."""
    from pathlm.models import read_config

    theirs = read_config(place)
    made = {name: getattr(theirs, name) for name in fresh if hasattr(theirs, name)}
    for name in fresh:
        if name in config.model and config.model[name] != made.get(name):
            rule = f"says how fresh weights are made, and init={config.init!r} brings others; leave it out"
            raise ValueError(f"model.{name}={config.model[name]!r}: {rule}")
    return made


def _check_tokenizer(config: RunConfig, place: str, tokenizer: Any) -> None:
    """Refuse weights that were trained on tokens of another tokenizer, where a tokenizer lies beside them."""
    from pathlm.models import read_tokenizer

    if not (Path(place) / "tokenizer_config.json").is_file():
        return
    if read_tokenizer(place).get_vocab() != tokenizer.get_vocab():
        rule = "its tokenizer is not that of the data; prepare the corpus with it (pathlm prepare --tokenizer)"
        raise ValueError(f"init={config.init!r}: {rule}")


def fit_to_rows(config: RunConfig, rows: Any, preset: Callable[..., Any]) -> Any:
    """Return the model's configuration with the vocabulary and special tokens of the data, unless the recipe sets them."""
    tokenizer = rows.tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model_config = preset(**({"vocab_size": rows.vocab_size} | special | config.model))
    if model_config.vocab_size < rows.vocab_size:
        rule = f"the tokenizer of the data has {rows.vocab_size} tokens; leave it out, or make it at least as large"
        raise ValueError(f"model.vocab_size={model_config.vocab_size}: {rule}")
    longest = getattr(model_config, "max_position_embeddings", None)  # not every family has a limit
    if longest is not None and config.data.length > longest:
        rule = f"the model is made for max_position_embeddings={longest}"
        raise ValueError(f"data.length={config.data.length}: {rule}")
    return model_config


def carry_out(
    config: RunConfig, job: Job, *, resume: bool = False, console: Console | None = None, watch: sinks.Sink | None = None
) -> RunResult:
    """Begin or continue the run of `job`, whatever family it comes from."""
    acc = parallel.accelerator(config)
    console = (console or Console()) if acc.is_main_process else Console(quiet=True)
    _check_processes(config, acc)
    curriculum = job.curriculum(config.steps)
    found = existing(config, job, _record(config, job, acc), resume=resume)
    at = checkpoint.newest(config.folder / "checkpoints") or 0
    seed_everything(config.seed)
    model = job.build() if at < config.steps else None  # before anything is written: weights of `init` may not fit
    acc.wait_for_everyone()  # nobody writes before everybody has looked
    if acc.is_main_process:
        _prepare_folder(config, _record(config, job, acc) | _costs(model, config), found, at)
    acc.wait_for_everyone()
    for note in job.notes:
        _say(console, f"note: {note}")
    if model is None:
        result = _finished(config, curriculum, at)
        _say(console, f"{config.folder} is finished: step {at} of {config.steps}. Nothing to do.")
        return result
    if resume:
        _say(console, f"continuing {config.folder} from step {at}" if at else f"no checkpoint in {config.folder} yet: beginning at step 0")

    parameters = sum(p.numel() for p in model.parameters())
    _say(
        console,
        f"{config.name}: {readable(parameters)} parameters, {config.steps:,} steps of {config.batch_tokens:,} tokens on {_where(acc)}",
    )
    if about := getattr(model, "about", ""):
        _say(console, about)
    with ExitStack() as stack:
        told = [stack.enter_context(sink) for sink in _sinks(config, console, at)] if acc.is_main_process else []
        result = train(
            acc,
            model,
            rows=job.rows,
            validation=job.validation,
            curriculum=curriculum,
            param_groups=job.param_groups,
            config=config,
            sinks=told if watch is None else [*told, watch],
            tell_gates=_gate_reporter(config, console) if acc.is_main_process else None,
        )
    _say(console, _farewell(config, result))
    return result


def _check_processes(config: RunConfig, acc: Accelerator) -> None:
    rows = config.batch_tokens // config.data.length
    if rows < acc.num_processes:
        rule = f"{rows} rows of {config.data.length} tokens a step cannot be shared by {acc.num_processes} processes"
        raise ValueError(f"batch_tokens={config.batch_tokens}: {rule}")
    if str(acc.distributed_type.value) not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        rule = (
            f'set strategy = "ddp" or "fsdp2" in the recipe, and let the launcher only start processes (it asks for {acc.distributed_type})'
        )
        raise ValueError(f"strategy={config.strategy!r}: {rule}")
    if config.precision == "bf16" and acc.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(f"precision='bf16': {torch.cuda.get_device_name(acc.device)} does not support it")


def existing(config: RunConfig, job: Job, new: Mapping[str, Any], *, resume: bool) -> dict[str, Any] | None:
    """Return the record of the run that the folder already holds, after checking that the run of record `new` may continue it."""
    file = config.folder / "run.json"
    if not file.is_file():
        # Rows or checkpoints without a record are not ours to continue or to overwrite.
        if any((config.folder / name).exists() for name in ("metrics.jsonl", "checkpoints")):
            raise ValueError(
                f"name={config.name!r}: {config.folder} holds a run without run.json; choose another name or remove the folder"
            )
        return None
    if not resume:
        rule = "continue it with --resume, choose another name (--set name=…), or remove the folder"
        raise ValueError(f"name={config.name!r}: {config.folder} already holds a run; {rule}")
    found = record.read(file)
    at = checkpoint.newest(config.folder / "checkpoints") or 0
    record.check_continues(found, new, step=at, curriculum=job.curriculum)
    return found


def _record(config: RunConfig, job: Job, acc: Accelerator) -> dict[str, Any]:
    return record.describe(config, job.model_config, device=_where(acc), processes=acc.num_processes, init=job.init)


def _costs(model: Any, config: RunConfig) -> dict[str, Any]:
    """Return how large a model is, and what a token of this run costs where its family tells that."""
    if model is None:
        return {}
    size = {"parameters": sum(p.numel() for p in model.parameters())}
    return size | (model.costs(config.data.length) if hasattr(model, "costs") else {})


def _prepare_folder(config: RunConfig, new: dict[str, Any], found: dict[str, Any] | None, at: int) -> None:
    """Write the record, and bring the folder back to what it was at step `at`."""
    config.folder.mkdir(parents=True, exist_ok=True)
    if found is not None:
        new = (
            found
            | new
            | {
                "started": found["started"],
                "resumed": [*found["resumed"], {"step": at, "at": datetime.now(UTC).isoformat(timespec="seconds")}],
            }
        )
    record.write(config.folder / "run.json", new)
    checkpoint.clean(config.folder / "checkpoints")
    for log in checkpoint.LOGS:
        sinks.truncate(config.folder / log, at)


def _sinks(config: RunConfig, console: Console, at: int) -> list[Any]:
    found = [sinks.jsonl(config.folder / "metrics.jsonl", config), sinks.screen(console, config, start=at)]
    return [*found, sinks.tensorboard(config.folder / "tensorboard", config, start=at)] if config.tensorboard else found


def _gate_reporter(config: RunConfig, console: Console) -> gates.Tell:
    return gates.reporter(config.folder, partial(_say, console), steps=config.steps, advise=config.gates == "warn")


def _finished(config: RunConfig, curriculum: Any, at: int) -> RunResult:
    state = State(**checkpoint.read(checkpoint.path(config.folder / "checkpoints", at))["state"])
    gates.check(state, curriculum, config)
    return RunResult(config.folder, at, state.tokens, state.best_validation, state.last_validation, finished_before=True)


def _farewell(config: RunConfig, result: RunResult) -> str:
    if result.interrupted:
        name = Signals(result.interrupted).name
        return f"{name}: stopped and saved at step {result.step} of {config.steps}. Give the same command with --resume to continue."
    best = f", best validation loss {result.best_validation:.4f}" if result.best_validation is not None else ""
    return f"finished at step {result.step}{best}: {result.folder}"


def readable(number: int) -> str:
    """Return a number as a person reads it: `1.7 M`, `18.3 k`, `430`."""
    size, sign = next(((size, sign) for size, sign in ((1e6, " M"), (1e3, " k")) if number >= size), (1, ""))
    return f"{number / size:,.1f}{sign}" if sign else str(number)


def _where(acc: Accelerator) -> str:
    name = torch.cuda.get_device_name(acc.device) if acc.device.type == "cuda" else acc.device.type
    return f"{name} × {acc.num_processes}" if acc.num_processes > 1 else name


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
