"""Checkpoints: folders that `from_pretrained` opens, written whole or not at all, and what a resumed run needs beside the weights."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from pathlm.config import RunError
from pathlm.evaluate.checkpoint import no_progress_bars
from pathlm.train import parallel
from pathlm.train.state import State, random_state, restore_random_state, seed_everything

FORMAT = 1
TRAINING_STATE = "training_state.pt"
LOGS = ("metrics.jsonl", "gates.jsonl")
"""Files of a run that a checkpoint makes durable: it stands for their rows up to its step."""
REQUIRED = ("config.json", "model.safetensors", TRAINING_STATE)
UNFINISHED = (".writing-", ".removing-", ".link-")


def steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints under `folder`, oldest first."""
    found = (re.fullmatch(r"step-(\d{8,})", entry.name) for entry in folder.glob("step-*"))
    return sorted(int(m[1]) for m in found if m and all((folder / m[0] / name).is_file() for name in REQUIRED))


def newest(folder: Path) -> int | None:
    """Return the step of the newest complete checkpoint, whatever `latest` points to; None when there is none."""
    return next(reversed(steps(folder)), None)


def path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of `step` is."""
    return folder / f"step-{step:08d}"


def save(
    acc: Accelerator, run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: State, *, tokenizer: Any = None, keep_last: int
) -> Path:
    """Write the checkpoint of `state.step` of the run in folder `run`, point `latest` and `best` to it, and remove old ones.

    Every process must call it; the first one writes. Raises `RunError` when it cannot be written, leaving earlier checkpoints as they were.
    """
    folder = run / "checkpoints"
    weights, moments = parallel.states(acc.unwrap_model(model), optimizer)
    generators = parallel.gathered(acc, random_state())
    target = path(folder, state.step)
    if acc.is_main_process:
        content = {"format": FORMAT, "state": vars(state).copy(), "optimizer": moments, "random": generators}
        try:
            _write(run, target, acc.unwrap_model(model), weights, content, tokenizer)
            _link(folder, "latest", target.name)
            if state.best_step is not None and path(folder, state.best_step).is_dir():
                _link(folder, "best", path(folder, state.best_step).name)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise RunError(_explain(folder, target, error)) from error
        prune(folder, keep_last=keep_last)
    acc.wait_for_everyone()
    return target


def _write(run: Path, target: Path, model: Any, weights: dict[str, Any], content: dict[str, Any], tokenizer: Any) -> None:
    """Fill a hidden sibling, make it durable, and give it its name in one step."""
    hidden = target.with_name(f"{UNFINISHED[0]}{target.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        with no_progress_bars():  # ours is on the screen
            model.save_pretrained(hidden, state_dict=weights, max_shard_size="100TB")
        shutil.copymode(hidden / "config.json", hidden / "model.safetensors")  # safetensors lets nobody but the owner read
        if tokenizer is not None:
            tokenizer.save_pretrained(hidden)
        torch.save(content, hidden / TRAINING_STATE)
        if (run / "run.json").is_file():
            shutil.copyfile(run / "run.json", hidden / "run.json")
        logs = [run / name for name in LOGS if (run / name).is_file()]
        for file in [*hidden.rglob("*"), hidden, *logs]:
            _flush(file)
    except Exception:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    if target.exists():  # an incomplete one that was not counted
        _remove(target)
    os.replace(hidden, target)
    _flush(target.parent)


def _flush(file: Path) -> None:
    """Ask the disk to keep a file's bytes, or a folder's names."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(folder: Path, name: str, target: str) -> None:
    """Point the symbolic link `name` to a sibling, in one step."""
    fresh = folder / f"{UNFINISHED[2]}{name}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    os.replace(fresh, folder / name)
    _flush(folder)


def _remove(target: Path) -> None:
    """Remove a checkpoint so that half of it is never taken for a whole one."""
    gone = target.with_name(f"{UNFINISHED[1]}{target.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(target, gone)
    shutil.rmtree(gone)


def _explain(folder: Path, target: Path, error: BaseException) -> str:
    kept = steps(folder)
    free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
    safe = f"the checkpoint of step {kept[-1]} is intact ({path(folder, kept[-1])})" if kept else "there is no earlier checkpoint"
    return (
        f"{target} could not be written: {' '.join(str(error).split())[:300]}. {free / 2**20:,.0f} MiB are free there. "
        f"{safe[0].upper()}{safe[1:]}; make room and continue with --resume."
    )


def prune(folder: Path, *, keep_last: int) -> None:
    """Remove all checkpoints but the last `keep_last` and those that `latest` and `best` point to."""
    found = steps(folder)
    linked = {os.readlink(folder / name) for name in ("latest", "best") if (folder / name).is_symlink()}
    for step in found[:-keep_last]:
        if path(folder, step).name not in linked:
            _remove(path(folder, step))


def clean(folder: Path) -> None:
    """Remove what an interrupted write left, and point `latest` and `best` to checkpoints that exist."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name.startswith(UNFINISHED):
            entry.unlink() if entry.is_symlink() else shutil.rmtree(entry)
    found = steps(folder)
    if found:
        newest_one = path(folder, found[-1])
        _link(folder, "latest", newest_one.name)
        if (best := read(newest_one)["state"]["best_step"]) in found:
            _link(folder, "best", path(folder, best).name)


def read(target: Path) -> dict[str, Any]:
    """Read the training state of a checkpoint. Raises `RunError` naming the file when it is damaged."""
    file = target / TRAINING_STATE
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        known = content["format"] if isinstance(content, dict) else None
    except Exception as error:  # torch.load fails in a dozen ways on a damaged file
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{file} cannot be read ({reason}); remove {target} to continue from the checkpoint before it") from error
    if known != FORMAT:
        raise RunError(f"{file} has format {known}; this version reads format {FORMAT}")
    return content


def restore(acc: Accelerator, target: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, seed: int) -> State:
    """Put weights, optimizer and random generators back to what they were when `target` was written; return the state."""
    content = read(target)
    file = target / "model.safetensors"
    try:
        parallel.restore(acc.unwrap_model(model), optimizer, safetensors.torch.load_file(file), content["optimizer"])
    except (SafetensorError, ValueError, OSError) as error:
        raise RunError(f"{file} cannot be used: {error}; remove {target} to continue from the checkpoint before it") from error
    state = State(**content["state"])
    if acc.num_processes == len(content["random"]):
        restore_random_state(content["random"][acc.process_index])
    else:
        seed_everything(seed + state.step, acc.process_index)
    return state
