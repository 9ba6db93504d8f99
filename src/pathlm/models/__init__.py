"""The model families, and the one place that knows them all by name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

FAMILIES = ("brian", "brillm")


def family(model_type: str) -> ModuleType:
    """Return the package of a family by its `model_type`.

    Each offers the same names: `Config`, `Model`, `PRESETS`, `curriculum(name, steps, knobs=…, stages=…, config=…)`,
    `param_groups(model, optim)`, `from_rows(config, rows)` (a fresh model for what a run reads), `start_from(folder, config)`,
    `check_start(theirs, config, origin=…)` (whether a model may begin with the weights of another configuration),
    `paths(output, tokenizer)` and `FROM_DATA` (fields that a run's data decide, besides the vocabulary). Raises `ValueError` for a family
    that does not exist.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r}: known families are {', '.join(FAMILIES)}")
    package = import_module(f"{__name__}.{model_type}")
    # Importing the submodule `curriculum` puts it in the place of the function of that name.
    if isinstance(package.curriculum, ModuleType):
        package.curriculum = package.curriculum.curriculum  # type: ignore[attr-defined]
    return package


def open_mapped(folder: Path | str) -> Any:
    """Return the signal graph saved in `folder`, its weights left on disk. Raises `ValueError` for a model of another family."""
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(folder).model_type
    package = family(kind) if kind in FAMILIES else None
    if package is None or not hasattr(package, "open_mapped"):
        raise ValueError(f"mmap=True: a {kind} model reads all its weights for every token; only a signal graph (brillm) can stay on disk")
    return package.open_mapped(folder)


def open_whole(folder: Path | str, **options: Any) -> Any:
    """Return the model saved in `folder`; `options` go to `from_pretrained`.

    Raises `ValueError` where weights are missing or over: transformers would draw the missing ones and go on.
    """
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, told = found
    for what in ("missing_keys", "unexpected_keys"):
        if names := sorted(told[what]):
            listed = f"{what.replace('_keys', '')} weights {', '.join(names[:5])}"
            raise ValueError(f"folder={str(folder)!r}: {listed}; the weights must be those that its config.json asks for")
    return model
