"""Train, measure and look inside language models whose computation is a path you can read."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

from wrapt import register_post_import_hook

_HOMES = {
    "Path": "pathlm.path",
    "Step": "pathlm.path",
    "BrianConfig": "pathlm.models.brian.configuration",
    "BrianForCausalLM": "pathlm.models.brian.modeling",
    "BrillmConfig": "pathlm.models.brillm.configuration",
    "BrillmForCausalLM": "pathlm.models.brillm.modeling",
    "from_brillm": "pathlm.models.brillm.convert",
    "from_llama": "pathlm.models.brian.convert",
    "wrap": "pathlm.models.brian.convert",
    "preset": "pathlm.models.library",
    "presets": "pathlm.models.library",
    "build": "pathlm.models.library",
    "load": "pathlm.models.library",
}
__all__ = sorted(_HOMES)
__version__ = version("pathlm")


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import pathlm` stays instant and needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _register_configurations(auto: Any) -> None:
    from pathlm.models.brian.configuration import BrianConfig
    from pathlm.models.brillm.configuration import BrillmConfig

    for config in (BrianConfig, BrillmConfig):
        auto.AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_models(auto: Any) -> None:
    from pathlm.models.brian.configuration import BrianConfig
    from pathlm.models.brian.modeling import BrianForCausalLM
    from pathlm.models.brillm.configuration import BrillmConfig
    from pathlm.models.brillm.modeling import BrillmForCausalLM

    auto.AutoModelForCausalLM.register(BrianConfig, BrianForCausalLM, exist_ok=True)
    auto.AutoModelForCausalLM.register(BrillmConfig, BrillmForCausalLM, exist_ok=True)


# The Auto classes learn both families as soon as they are imported, before or after pathlm.
register_post_import_hook(_register_configurations, "transformers.models.auto.configuration_auto")
register_post_import_hook(_register_models, "transformers.models.auto.modeling_auto")
