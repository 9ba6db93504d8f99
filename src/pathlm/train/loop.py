"""The training loop. It knows rows, knobs and numbers, and no model family."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pathlm.config import RunConfig, RunError
from pathlm.train import batches, checkpoint, gates, optim, parallel
from pathlm.train.hardware import Clock
from pathlm.train.interrupt import Interrupt
from pathlm.train.sinks import VALIDATION, Sink
from pathlm.train.state import State, random_state, restore_random_state, seed_everything


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    folder: Path
    step: int
    tokens: int
    best_validation: float | None
    last_validation: float | None
    interrupted: int = 0
    """The signal that ended the run early, 0 if none did."""
    finished_before: bool = False
    """True when there was nothing left to do."""

    @property
    def exit_code(self) -> int:
        """What a command should exit with: 0, 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.interrupted if self.interrupted else 0


def train(
    acc: Accelerator,
    model: Any,
    *,
    rows: Any,
    validation: Any,
    curriculum: Any,
    param_groups: Callable[[Any], list[dict[str, Any]]],
    config: RunConfig,
    sinks: Sequence[Sink],
    tell_gates: gates.Tell | None = None,
) -> RunResult:
    """Train `model` on `rows` from the newest checkpoint of the run's folder, or from the beginning, up to `config.steps`.

    `rows` and `validation` (or None) answer `batch(start, count)`, `describe(batch)` and `tokenizer()`; `curriculum.at(step)` returns
    the stage and its knobs, `curriculum.ends(step)` whether a stage ends; `param_groups(model)` the optimizer's groups. Raises `RunError`
    when a number is not finite, before the weights are touched, when a stage fails a gate, and when a checkpoint cannot be written.
    """
    called = parallel.prepare_model(acc, model, config)
    optimizer = optim.adamw(param_groups(model), config.optim)
    state = _restored(acc, called, optimizer, config)
    gates.check(state, curriculum, config)  # what failed before a resume fails again
    share = batches.Share(acc.process_index, acc.num_processes, config.micro_rows)
    count = config.batch_tokens // config.data.length
    clock = Clock(model, config, device=acc.device, processes=acc.num_processes if acc.is_main_process else 0)
    tokenizer = rows.tokenizer()
    stop = 0
    called.train()
    ahead = batches.stream(rows, state.next_row, count, share, steps=config.steps - state.step, pin=acc.device.type == "cuda")
    with Interrupt() as interrupt, closing(ahead):
        if not state.step:
            _begin_stage(acc, called, validation, curriculum, config, state)
        clock.start()
        for batch in ahead:
            stage, knobs = curriculum.at(state.step)
            lr = optim.learning_rate(config.optim, state.step, config.steps)
            optim.set_learning_rate(optimizer, lr)
            metrics, stop = step(acc, called, optimizer, batch, knobs, clip=config.optim.clip, interrupt=interrupt)
            if not (math.isfinite(metrics["loss/total"]) and math.isfinite(metrics["optim/grad_norm"])):
                ahead.close()  # rows answer one question at a time
                raise RunError(_diagnose(acc, rows, batch, metrics, state.step + 1, config.folder / "checkpoints"))
            optimizer.step()
            state.advance(count, config.batch_tokens)
            _tell(sinks, state, stage, metrics | {"optim/lr": lr} | clock.stop(), model)
            ended = gates.stage_ends(curriculum, state, config)
            save = ended or state.step % config.save_every == 0
            measured: dict[str, float] = {}
            if validation is not None and (ended or state.step % config.eval_every == 0):
                measured = validate(acc, called, validation, config, knobs)
                comparable = state.best_step is None or curriculum.at(state.best_step - 1)[1] == knobs
                save |= state.note_validation(measured[VALIDATION], comparable=comparable)
                _tell(sinks, state, stage, measured, model)
            if ended:
                gates.close(stage, measured, state, more=curriculum.ends(state.step - 1), tell=tell_gates)
                _begin_stage(acc, called, validation, curriculum, config, state)
            # Processes must agree when to stop: with several of them a signal counts once it went through a step's sum.
            stop = stop if acc.num_processes > 1 else interrupt.number
            if save or stop:
                checkpoint.save(acc, config.folder, called, optimizer, state, tokenizer=tokenizer, keep_last=config.keep_last)
            gates.check(state, curriculum, config)
            if stop:
                break
            clock.start()
    stop = stop if state.step < config.steps else 0
    return RunResult(config.folder, state.step, state.tokens, state.best_validation, state.last_validation, stop)


def step(
    acc: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: batches.StepBatch,
    knobs: Any,
    *,
    clip: float,
    interrupt: Interrupt,
) -> tuple[dict[str, float], int]:
    """Compute the gradients of one optimizer step; return the token-weighted mean of every metric, and the signal to stop for or 0.

    Counting targets instead of micro-batches makes accumulation exact: 1 × 8 and 4 × 2 rows give equal losses and gradients, and so
    do one and several processes. All numbers reach the host together: the step's only synchronisation.
    """
    optimizer.zero_grad(set_to_none=True)
    weights = _weights(acc, batch)
    totals: dict[str, Tensor] = {}
    for i, micro in enumerate(batch.micro):
        with parallel.accumulate(acc, model, last=i == len(batch.micro) - 1):
            out = _forward(acc, model, micro, knobs)
            # Several processes average their gradients, and this is a share of a sum.
            acc.backward(out.loss * (weights[i] * acc.num_processes))
        _add(totals, out, weights[i])
    norm = parallel.clip(model, clip)
    host = [sum(batch.counts) / batch.positions, float(interrupt.number == SIGINT), float(interrupt.number == SIGTERM)]
    numbers = parallel.summed(acc, torch.cat([torch.stack(list(totals.values())), _to_device(acc, host)]))
    *values, target_share, ctrl_c, terminated, grad_norm = torch.cat([numbers, norm.float().reshape(1)]).tolist()
    metrics = dict(zip(totals, values, strict=True)) | {"data/target_share": target_share, "optim/grad_norm": grad_norm}
    return metrics, int(SIGTERM if terminated else SIGINT if ctrl_c else 0)


def validate(acc: Accelerator, model: nn.Module, rows: Any, config: RunConfig, knobs: Any) -> dict[str, float]:
    """Return the token-weighted mean loss and metrics over the first `eval_rows` rows of the validation split."""
    began = time.perf_counter()
    generators = random_state()
    count = min(config.eval_rows, getattr(rows, "rows_per_epoch", config.eval_rows))
    batch = batches.read(rows, 0, count, batches.Share(acc.process_index, acc.num_processes, config.micro_rows))
    weights = _weights(acc, batch)
    totals: dict[str, Tensor] = {}
    model.eval()
    with torch.no_grad(), acc.autocast():
        for micro, weight in zip(batch.micro, weights, strict=True):
            _add(totals, _forward(acc, model, micro, knobs), weight)
    model.train()
    # What an evaluation draws must not change the training after it.
    restore_random_state(generators)
    values = parallel.summed(acc, torch.stack(list(totals.values()))).tolist()
    found = dict(zip(totals, values, strict=True))
    total = found.pop("loss/total")
    loss = found.pop("loss/lm", total)
    rest = {f"validation/{name}": value for name, value in found.items()}
    return {VALIDATION: loss, **rest, "time/validation_s": time.perf_counter() - began}


def _restored(acc: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig) -> State:
    """Bring model, optimizer and random generators to where the run's newest checkpoint left them, or to the beginning."""
    seed_everything(config.seed, acc.process_index)
    folder = config.folder / "checkpoints"
    at = checkpoint.newest(folder)
    return State() if at is None else checkpoint.restore(acc, checkpoint.path(folder, at), model, optimizer, seed=config.seed)


def _begin_stage(acc: Accelerator, model: nn.Module, rows: Any, curriculum: Any, config: RunConfig, state: State) -> None:
    """Measure what the relative gates of the stage that begins with the next step will compare with, where it has any."""
    stage, knobs = curriculum.at(state.step)
    begins = not state.step or curriculum.ends(state.step - 1)
    if begins and rows is not None and any(gate.relative for gate in stage.gates):
        gates.begin(stage, validate(acc, model, rows, config, knobs), state)


def _forward(acc: Accelerator, model: nn.Module, micro: Mapping[str, Tensor], knobs: Any) -> Any:
    inputs = {name: value.to(acc.device, non_blocking=True) for name, value in micro.items()}
    return model(**inputs, knobs=knobs, use_cache=False, skip_logits=True)


def _to_device(acc: Accelerator, values: Sequence[float]) -> Tensor:
    """Send a few numbers to the device without waiting for it."""
    return torch.tensor(values, dtype=torch.float32).to(acc.device, non_blocking=True)


def _weights(acc: Accelerator, batch: batches.StepBatch) -> Tensor:
    """Return the share of every micro-batch in the targets of the whole step, over all processes."""
    counts = _to_device(acc, [float(count) for count in batch.counts])
    return counts / parallel.summed(acc, counts.sum()).clamp(min=1)


def _add(totals: dict[str, Tensor], out: Any, weight: Tensor) -> None:
    """Add one micro-batch's numbers to the weighted sums. A model reports the same names for every batch of a step."""
    for name, value in ({"loss/total": out.loss} | (out.metrics or {})).items():
        part = value.detach().float() * weight
        totals[name] = totals[name] + part if name in totals else part


def _tell(sinks: Sequence[Sink], state: State, stage: Any, metrics: Mapping[str, float], model: Any) -> None:
    for sink in sinks:
        sink(state, stage, metrics, model)


def _diagnose(acc: Accelerator, rows: Any, batch: batches.StepBatch, metrics: Mapping[str, float], at: int, folder: Path) -> str:
    """Say which step went wrong, on which documents, and what is safe. Every process must call it."""
    documents = [name for part in parallel.gathered(acc, [d for raw in batch.raw for d in rows.describe(raw)]) for name in part]
    documents = list(dict.fromkeys(documents))
    shown = ", ".join(documents[:20]) + (f" and {len(documents) - 20} more" if len(documents) > 20 else "")
    newest = checkpoint.newest(folder)
    good = f"The last good checkpoint is {checkpoint.path(folder, newest)}." if newest is not None else "There is no checkpoint yet."
    return (
        f"step {at} is not finite: loss {metrics['loss/total']}, gradient norm {metrics['optim/grad_norm']}. The weights were not touched. "
        f"Documents of its batch: {shown}. {good} A smaller optim.lr or optim.clip often helps."
    )
