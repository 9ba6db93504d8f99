"""Models by name: presets as configurations, models built from them, and models read from folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pathlm.config import build_strict
from pathlm.models import FAMILIES, family, open_mapped, open_whole, read_config, read_tokenizer


@dataclass(frozen=True)
class PresetSummary:
    """What a preset's model is and costs, without building it in memory."""

    name: str
    family: str
    parameters: int
    """Exact; tied weights count once"""
    blocks: int
    max_route_steps: int
    """Visits to a pool's blocks that a token may make; 0 where there is no pool"""
    hidden_size: int
    vocab_size: int
    context: int | None
    """Tokens the model is meant to read at most; None where there is no limit"""
    flops_per_token: float
    """Forward pass, in rows of `context` tokens"""
    cache_bytes_per_token: int
    """Keys and values of all blocks in bfloat16"""


def preset(name: str, **overrides: Any) -> PreTrainedConfig:
    """Return the configuration of a preset with some fields replaced.

    Raises `ValueError` for a preset or field that does not exist and for a value that is not allowed.
    """
    package = _package(name)
    return build_strict(package.Config, package.PRESETS[name] | _known(package.Config, overrides))


def preset_for_data(name: str, **overrides: Any) -> PreTrainedConfig:
    """Return a preset's configuration for a model that data will complete, such as a graph whose edges are counted in it.

    What the data decide is open. Raises `ValueError` as `preset` does, and where it is overridden all the same.
    """
    open_fields = _package(name).FROM_DATA
    if decided := sorted(open_fields.keys() & overrides.keys()):
        raise ValueError(f"model.{decided[0]}={overrides[decided[0]]!r}: follows from the data that a run reads; leave it out")
    return preset(name, **(open_fields | overrides))


def _package(name: str) -> Any:
    for package in map(family, FAMILIES):
        if name in package.PRESETS:
            return package
    raise ValueError(f"preset={name!r}: there are {', '.join(n for f in FAMILIES for n in family(f).PRESETS)}")


def presets() -> dict[str, PresetSummary]:
    """Return a summary of every preset by name."""
    return {name: summarise(name, preset(name)) for model_type in FAMILIES for name in family(model_type).PRESETS}


def summarise(name: str, config: PreTrainedConfig) -> PresetSummary:
    """Count a model's parameters, operations and memory. Nothing is allocated."""
    package = family(config.model_type)
    context = getattr(config, "max_position_embeddings", None)
    with torch.device("meta"):
        model = package.Model(config)
    return PresetSummary(
        name=name,
        family=config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        blocks=config.num_hidden_layers,
        max_route_steps=getattr(config, "max_route_steps", 0),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context=context,
        flops_per_token=package.flops_per_token(config, context or 1),
        cache_bytes_per_token=2 * package.cache_numbers_per_token(config),
    )


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a freshly initialised model; seed torch first to have the same one again."""
    return family(config.model_type).Model(config)


def load(folder: Path | str, *, mmap: bool = False, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and the tokenizer saved in `folder`, ready for evaluation. A Llama checkpoint becomes a plain decoder.

    `mmap` leaves the weights of a signal graph on disk: it opens at once, reads what each step needs, and cannot be trained. `options` go
    to `from_pretrained`, for instance `dtype=torch.float32`. Raises `ValueError` when the folder holds no model.
    """
    config = read_config(folder)
    if mmap and options:
        raise ValueError(f"mmap=True: the weights stay as they are on disk; leave {', '.join(options)} out")
    if mmap:
        model: PreTrainedModel = open_mapped(folder)
    elif config.model_type == "llama":
        from pathlm.models.brian.convert import from_llama

        model = from_llama(folder, **options)
    else:
        family(config.model_type)
        model = open_whole(folder, **options)
    return model.eval(), read_tokenizer(folder)


def _known(cls: type[PreTrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return `overrides`, refusing names that the family's configuration does not declare; transformers would keep them silently."""
    known = set(cls.__annotations__) - {"model_type", "keys_to_ignore_at_inference"}
    if unknown := sorted(overrides.keys() - known):
        raise ValueError(f"{cls.__name__} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return overrides
