"""The model families, and the one place that knows them all by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from pathlm.config import complaint

FAMILIES = ("brian", "brillm")


def family(model_type: str) -> ModuleType:
    """Return the package of a family by its `model_type`.

    Each offers the same names: `Config`, `Model`, `PRESETS`, `curriculum(name, steps, knobs=…, stages=…, config=…, length=…)`,
    `param_groups(model, optim)`, `from_rows(config, rows)` (a fresh model for what a run reads), `start_from(folder, config)`,
    `check_start(theirs, config, origin=…)` (whether a model may begin with the weights of another configuration),
    `paths(output, tokenizer, newest=…)`, whose traces are cut (`row`) and continued (`after`), `FROM_DATA` (fields that a run's data
    decide, besides the vocabulary) and `FRESH` (fields that say how a fresh model is made). A graph of nodes offers
    `neighbours(model, tokenizer, nodes)`, too. Raises `ValueError` for a family that does not exist.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r}: known families are {', '.join(FAMILIES)}")
    package = import_module(f"{__name__}.{model_type}")
    # Importing the submodule `curriculum` puts it in the place of the function of that name.
    if isinstance(package.curriculum, ModuleType):
        package.curriculum = package.curriculum.curriculum  # type: ignore[attr-defined]
    return package


def read_config(folder: Path | str) -> Any:
    """Return the configuration of the model saved in `folder`.

    Raises `ValueError` where there is none, and naming the file, the field, its value and the rule where it is of no possible model.
    """
    from transformers import AutoConfig

    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"folder={str(folder)!r}: holds no config.json, so no model was saved there")
    try:
        with _quiet():
            return AutoConfig.from_pretrained(folder, local_files_only=True)
    except StrictDataclassError as error:
        raise ValueError(f"{file}: {complaint(error)}") from error
    except (AttributeError, TypeError) as error:  # a field of another family, or of no family
        raise ValueError(f"{file}: {error}") from error


def read_tokenizer(folder: Path | str) -> Any:
    """Return the tokenizer saved in `folder`. Raises `OSError` where there is none, and `ValueError` where its files are damaged."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except OSError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"folder={str(folder)!r}: its tokenizer cannot be read: {error!r}") from error


def open_mapped(folder: Path | str) -> Any:
    """Return the signal graph saved in `folder`, its weights left on disk. Raises `ValueError` for a model of another family."""
    kind = read_config(folder).model_type
    package = family(kind) if kind in FAMILIES else None
    if package is None or not hasattr(package, "open_mapped"):
        raise ValueError(f"mmap=True: a {kind} model reads all its weights for every token; only a signal graph (brillm) can stay on disk")
    return package.open_mapped(folder)


def open_whole(folder: Path | str, **options: Any) -> Any:
    """Return the model saved in `folder`; `options` go to `from_pretrained`.

    Raises `ValueError` for weights that are damaged, missing, over or of another shape: transformers would draw them anew and go on.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    read_config(folder)
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with _quiet():
            found: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are damaged ({error}); use another checkpoint") from error
    model, told = found
    wrong = {what: sorted(told[f"{what}_keys"]) for what in ("missing", "unexpected")}
    wrong["mismatched"] = [f"{name} {tuple(its)}, must be {tuple(ours)}" for name, its, ours in sorted(told["mismatched_keys"])]
    for what, names in wrong.items():
        if names:
            listed = f"{what} weights {', '.join(names[:5])}"
            raise ValueError(f"folder={str(folder)!r}: {listed}; the weights must be those that its config.json asks for")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from telling at length what we say in a line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
