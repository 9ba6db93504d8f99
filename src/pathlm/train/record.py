"""`run.json`: what a run is, and whether a later configuration may continue it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import pathlm
from pathlm.config import EXECUTION, RHYTHM, DataConfig, RunConfig, with_options
from pathlm.train.optim import first_difference, learning_rate

FORMAT = 1
VOLATILE = {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures"}


def describe(config: RunConfig, model_config: Any, *, device: str, processes: int, init: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the content of `run.json` for a new run; `init` tells where its first weights come from."""
    architecture = {name: value for name, value in model_config.to_dict().items() if name not in VOLATILE}
    record = {
        "format": FORMAT,
        "name": config.name,
        "config": config.to_dict(),
        "model": architecture,
        "corpus_sha256": corpus_digest(config.data),
        "init": init,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed": [],
        "device": device,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "versions": {
            "pathlm": pathlm.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    return json.loads(json.dumps(record))


def corpus_digest(data: DataConfig) -> str | None:
    """Return the hash of the corpus's manifest, which holds the hashes of everything else; None without a corpus."""
    if data.corpus is None:
        return None
    file = Path(data.corpus) / "manifest.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def weights_digest(folder: Path) -> str:
    """Return the hash of the weights in a folder: that of the file, or of the list of names and hashes where there are several."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise ValueError(f"{folder} holds no weights: neither .safetensors nor .bin")
    digests = []
    for file in files:
        with file.open("rb") as content:
            digests.append(hashlib.file_digest(content, "sha256").hexdigest())
    if len(files) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{file.name} {digest}\n" for file, digest in zip(files, digests)).encode()).hexdigest()


def write(file: Path, record: Mapping[str, Any]) -> None:
    """Replace `file` in one step."""
    fresh = file.with_name(f".{file.name}.new")
    with fresh.open("w", encoding="utf-8") as out:
        out.write(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(fresh, file)


def read(file: Path) -> dict[str, Any]:
    """Read `run.json`. Raises `ValueError` naming the file when it is not one."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        known = record["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not the record of a run: {error!r}") from error
    if known != FORMAT:
        raise ValueError(f"{file} has format {known}; this version reads format {FORMAT}")
    return record


def check_continues(old: Mapping[str, Any], new: Mapping[str, Any], *, step: int, curriculum: Callable[[int], Any]) -> None:
    """Raise `ValueError` naming every field in which `new` cannot continue the run `old` from `step`.

    `curriculum(steps)` returns the curriculum of a run of so many steps.
    """
    before, after = _comparable(old), _comparable(new)
    # A name only one of them has is an option that one version of the library lacks.
    changed = [name for name in before.keys() & after.keys() if before[name] != after[name]]
    said = "; ".join(f"{name}={after[name]!r} (the run has {before[name]!r})" for name in sorted(changed))
    if changed:
        raise ValueError(f"--resume: {said}: a run is continued as it was begun; give the changed one another name")
    _check_steps(old["config"], new["config"], step=step, curriculum=curriculum)


def _check_steps(old: Mapping[str, Any], new: Mapping[str, Any], *, step: int, curriculum: Callable[[int], Any]) -> None:
    """Allow another number of steps when everything done so far would have been the same with it."""
    was, steps = old["steps"], new["steps"]
    if was == steps:
        return
    said = f"steps={steps} (the run has {was} and is at step {step})"
    if steps < step:
        raise ValueError(f"--resume: {said}: the run is already past it")
    optim = with_options(RunConfig, dict(new)).optim
    if first_difference(partial(_rate, optim, was), partial(_rate, optim, steps), steps=step) is not None:
        rule = f'schedule = "{optim.schedule}" would have used other learning rates so far'
        raise ValueError(f"--resume: {said}: {rule}; a constant schedule, or wsd before its decay, can be prolonged")
    if first_difference(curriculum(was).at, curriculum(steps).at, steps=step) is not None:
        raise ValueError(f"--resume: {said}: its curriculum would have been another one so far")


def _rate(optim: Any, steps: int, step: int) -> float:
    return learning_rate(optim, step, steps)


def _comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return every value that a continued run must share, named as in a recipe; the model by its whole configuration."""
    config = dict(record["config"])
    sections = {name: config.pop(name) for name in ("data", "optim")} | {"model": record["model"]}
    config.pop("model")
    flat = config | {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    flat["data.corpus"] = record["corpus_sha256"]
    flat["init"] = (record.get("init") or {}).get("sha256")
    return {name: value for name, value in flat.items() if name not in RHYTHM | EXECUTION}
