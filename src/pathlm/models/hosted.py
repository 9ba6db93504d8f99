"""What transformers' `generate` and `Trainer` ask of a model, and every family answers alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache

# Shapes: B rows, T new tokens, D width


class Hosted:
    """A mixin, to stand before transformers' classes: `generate` gets the family's own memory, and operations are counted."""

    config: Any

    def new_memory(self) -> Cache:
        """Return the memory of texts of which nothing has been read."""
        raise NotImplementedError

    def flops_per_token(self, length: int) -> float:
        """Return the floating-point operations of one forward pass per token, in rows of `length` tokens."""
        from pathlm.models import family

        found: float = family(self.config.model_type).flops_per_token(self.config, length)
        return found

    def costs(self, length: int) -> dict[str, float | int]:
        """Return what a token costs in rows of `length` tokens: operations of a forward pass, of a visit to a pool's block, bytes of cache.

        `flops_per_token` counts all route steps of a pool; one that is left early saves `flops_per_visit` for each block that is not run.
        `cache_bytes_per_token` is in the numbers that the weights have.
        """
        from pathlm.models import family

        package = family(self.config.model_type)
        visit = package.flops_per_visit(self.config, length) if getattr(self.config, "pool_blocks", 0) else 0.0
        size = next(self.parameters()).element_size()  # type: ignore[attr-defined]
        held = size * package.cache_numbers_per_token(self.config)
        return {"flops_per_token": self.flops_per_token(length), "flops_per_visit": visit, "cache_bytes_per_token": held}

    def floating_point_ops(self, input_dict: dict[str, Any], exclude_embeddings: bool = True) -> int:
        """Return the operations of a training step on this batch: the forward pass and twice as much for the backward pass."""
        batch, tokens = input_dict["input_ids"].shape
        return int(3 * batch * tokens * self.flops_per_token(tokens))

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Let `generate` hand over no cache of its own: a table of keys and values that copies itself for every token is not ours."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give `generate` a memory of ours, which assisted decoding wants to see before the first forward pass."""
        wanted = generation_config.use_cache and generation_config.cache_implementation is None
        if wanted and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.new_memory()
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]


def require_tokens(name: str, given: Tensor, axes: str = "B, T") -> Tensor:
    """Return what a model is to read: token ids (B, T), or vectors (B, T, D). Raises `ValueError` for another shape and for nothing."""
    if given.ndim != axes.count(",") + 1 or not given.numel():
        raise ValueError(f"{name} has shape {tuple(given.shape)}: must be ({axes}), at least one row of at least one token")
    return given
