"""BRIAN: tokens move through a pool of Transformer blocks. With an empty pool it is a plain decoder."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Names come on first use: transformers' Auto classes fetch the configuration while transformers itself is still being imported.
_HOMES = {
    "Config": ("configuration", "BrianConfig"),
    "Model": ("modeling", "BrianForCausalLM"),
    "PRESETS": ("presets", "PRESETS"),
    "FROM_DATA": ("presets", "FROM_DATA"),
    "check_start": ("convert", "check_start"),
    "FRESH": ("presets", "FRESH"),
    "cache_numbers_per_token": ("presets", "cache_numbers_per_token"),
    "flops_per_token": ("presets", "flops_per_token"),
    "flops_per_visit": ("presets", "flops_per_visit"),
    "Knobs": ("curriculum", "Knobs"),
    "curriculum": ("curriculum", "curriculum"),
    "from_rows": ("modeling", "from_rows"),
    "param_groups": ("optim", "param_groups"),
    "paths": ("tracing", "paths"),
    "start_from": ("convert", "start_from"),
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, own = _HOMES[name]
    value = getattr(import_module(f"{__name__}.{home}"), own)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
