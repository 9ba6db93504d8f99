"""BriLLM: one signal walks a graph of tokens, and the next token is the node where it would arrive strongest."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Names come on first use: transformers' Auto classes fetch the configuration while transformers itself is still being imported.
_HOMES = {
    "Config": ("configuration", "BrillmConfig"),
    "Model": ("modeling", "BrillmForCausalLM"),
    "PRESETS": ("presets", "PRESETS"),
    "FROM_DATA": ("presets", "FROM_DATA"),
    "check_start": ("modeling", "check_start"),
    "FRESH": ("presets", "FRESH"),
    "cache_numbers_per_token": ("presets", "cache_numbers_per_token"),
    "flops_per_token": ("presets", "flops_per_token"),
    "Knobs": ("curriculum", "Knobs"),
    "curriculum": ("curriculum", "curriculum"),
    "from_rows": ("modeling", "from_rows"),
    "neighbours": ("recall", "neighbours"),
    "open_mapped": ("mapped", "open_mapped"),
    "param_groups": ("optim", "param_groups"),
    "paths": ("tracing", "paths"),
    "start_from": ("modeling", "start_from"),
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
