"""Where a model lies and how it is opened for reading: run folders, checkpoints and Hugging Face folders alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn


def find_checkpoint(folder: Path | str) -> Path:
    """Return the folder that holds the weights: `folder` itself, or the best (else the latest) checkpoint of a run folder.

    Raises `FileNotFoundError` when there is no such folder and `ValueError` when it holds no model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {str(folder)!r} does not exist")
    for candidate in (folder, folder / "checkpoints" / "best", folder / "checkpoints" / "latest"):
        if (candidate / "config.json").is_file():
            return candidate.resolve()
    raise ValueError(
        f"model folder {str(folder)!r} holds no model: expected config.json in it, or, for a run, in checkpoints/best or checkpoints/latest"
    )


def run_folder(folder: Path | str) -> Path:
    """Return the run that a folder belongs to: itself for a run or a foreign model, the run above for one of a run's checkpoints."""
    folder = Path(folder).resolve()
    run = folder.parent.parent
    return run if folder.parent.name == "checkpoints" and (run / "run.json").is_file() else folder


def run_record(folder: Path | str) -> dict[str, Any]:
    """Return `run.json` of the run that `folder` belongs to; empty where there is none."""
    for place in (run_folder(folder), Path(folder)):
        if (place / "run.json").is_file():
            record: dict[str, Any] = json.loads((place / "run.json").read_text(encoding="utf-8"))
            return record
    return {}


def open_model(
    folder: Path | str, *, device: str | None = None, budget: float | None = None, branches: int | None = None, mmap: bool = False
) -> tuple[Any, Any]:
    """Load the model and the tokenizer (None where there is none) of a run, a checkpoint or any Hugging Face folder, for evaluation.

    With a `budget` every forward pass is told of it (see `check_budget`). `branches` replaces the number of ways that a token may take at
    once through a pool. With `mmap` the weights of a signal graph stay on disk, and `device` can only be the CPU. Raises `ValueError` for a
    folder without a model, damaged weights, a `device` that is not here, a budget that the model was not trained for, and branches that it
    cannot have.
    """
    from pathlm.models import open_mapped, open_whole, read_tokenizer

    check_share(budget)
    place = find_checkpoint(folder)
    if mmap and device not in (None, "cpu"):
        raise ValueError(f"device={device!r}: with mmap the weights stay on disk, for the cpu to read")
    where = _device("cpu" if mmap else device)
    with no_progress_bars():
        model: Any = open_mapped(place) if mmap else open_whole(place, local_files_only=True)
    model = model.to(where).eval()
    if branches is not None:
        if not hasattr(model, "set_branches"):
            raise ValueError(f"branches={branches}: a {type(model).__name__} has no pool to branch in")
        model.set_branches(branches)
    if options := check_budget(model, budget):
        model.register_forward_pre_hook(lambda _, arguments, given: (arguments, options | given), with_kwargs=True)
    has_tokenizer = any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    return model, read_tokenizer(place) if has_tokenizer else None


def check_budget(model: Any, budget: float | None) -> dict[str, float]:
    """Return what a forward pass is told about a budget: `{"budget": budget}`, nothing for None.

    A budget is the share of its steps that a routed model may take on average. Raises `ValueError` for one that the model was not trained
    for, and for a model whose every token takes the same way.
    """
    if budget is None:
        return {}
    if not hasattr(model, "check_budget"):
        raise ValueError(f"budget={budget}: a {type(model).__name__} has no pool to leave early")
    model.check_budget(budget)
    return {"budget": float(budget)}


def check_branches(model: Any, branches: int | None) -> dict[str, int]:
    """Return what a forward pass is told about branches, the ways through the pool that a token may take at once; nothing for None.

    Raises `ValueError` for a number that the model cannot have.
    """
    if branches is None:
        return {}
    if not hasattr(model, "check_branches"):
        raise ValueError(f"branches={branches}: a {type(model).__name__} has no pool to branch in")
    model.check_branches(branches)
    return {"route_beams": branches}


def check_share(budget: float | None) -> None:
    """Raise `ValueError` for a budget that is a share of nothing: this needs no model."""
    if budget is not None and not 0.0 < budget <= 1.0:
        raise ValueError(f"budget={budget}: must lie above 0 and at most at 1, a share of the route steps")


def _device(name: str | None) -> torch.device:
    """Return the device of that name, by default a GPU where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device={name!r}: torch knows no such device; try cpu or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}: this machine and this build of torch offer {torch.cuda.device_count()} CUDA devices")
    return device


def start_token(tokenizer: Any) -> int | None:
    """Return the token that stands before a document's first: `bos`, or `eos` where there is no `bos`."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars of its own between our lines, while it loads or saves."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode (no dropout) and leave it afterwards as it was found."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
