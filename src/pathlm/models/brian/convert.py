"""Llama checkpoints as BRIAN models and back: the same weights under other names, two or three of Llama's matrices joined into one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pathlm.config import build_strict
from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.brian.modeling import BrianForCausalLM

# Parts of a block that hold the same tensor under another name.
SAME = {
    "attention_norm": "input_layernorm",
    "out_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "down_proj": "mlp.down_proj",
}
# Parts of a block that hold several of Llama's, one under the other.
JOINED = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
)


def from_llama(
    source: LlamaForCausalLM | Path | str,
    *,
    pre_blocks: int | None = None,
    pool_blocks: int = 0,
    post_blocks: int | None = None,
    **options: Any,
) -> BrianForCausalLM:
    """Return a BRIAN model with the weights of a Llama model, given itself or as the folder it was saved in.

    Layers that the three numbers leave over go to `pre_blocks`, or to `post_blocks` where `pre_blocks` is given.
    `options` go to `from_pretrained` when `source` is a folder. Logits are equal; dropout, which only training knows, is not carried over.
    Raises `ValueError` when `source` is not a Llama model or uses what a BRIAN block does not have.
    """
    llama = source if isinstance(source, LlamaForCausalLM) else _read(source, options)
    theirs = llama.config
    pre, post = _split(theirs.num_hidden_layers, pre_blocks, pool_blocks, post_blocks)
    fields = {name: getattr(theirs, name) for name in SHARED_FIELDS}
    if fields["rope_parameters"] is not None:
        fields["rope_parameters"] = dict(fields["rope_parameters"])
    config = build_strict(BrianConfig, fields | {"pre_blocks": pre, "pool_blocks": pool_blocks, "post_blocks": post})
    with torch.device("meta"):
        model = BrianForCausalLM(config)
    weights = brian_weights(llama.state_dict(), theirs.num_hidden_layers)
    return _filled(model, weights, llama)


def to_llama(model: BrianForCausalLM) -> LlamaForCausalLM:
    """Return the Llama model with the weights of a BRIAN model whose pool is empty; logits are equal."""
    config = model.config
    if config.pool_blocks:
        raise ValueError(f"pool_blocks={config.pool_blocks}: Llama has no router, so only a plain decoder can become one")
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    fields["rope_parameters"] = dict(fields["rope_parameters"])
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=config.num_hidden_layers, **fields))
    return _filled(llama, llama_weights(model.state_dict(), config), model)


def convert(folder: Path | str, out: Path | str, *, to: Literal["brian", "llama"]) -> Path:
    """Read the model and tokenizer in `folder`, convert the model, write both to `out` and return it: the body of `pathlm convert`.

    Raises `ValueError` when `folder` holds no model of the other kind, or when `out` already holds a model.
    """
    source, target = Path(folder), Path(out)
    if to not in ("brian", "llama"):
        raise ValueError(f"to={to!r}: must be brian or llama")
    if (target / "config.json").exists():
        raise ValueError(f"out={str(target)!r}: already holds a model; name a new folder")
    kind = _model_type(source)
    if kind != ("llama" if to == "brian" else "brian"):
        raise ValueError(f"folder={str(source)!r}: holds a {kind} model, which cannot become {to}")
    model = from_llama(source) if to == "brian" else to_llama(BrianForCausalLM.from_pretrained(source))
    model.save_pretrained(target)
    if (source / "tokenizer_config.json").exists():
        AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


def brian_weights(llama: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Rename and join a Llama model's weights."""
    weights = {"embed_tokens.weight": llama["model.embed_tokens.weight"], "norm.weight": llama["model.norm.weight"]}
    weights["lm_head.weight"] = llama["lm_head.weight"]
    for index in range(layers):
        for kind in ("weight", "bias"):
            for ours, theirs in SAME.items():
                if (tensor := llama.get(f"model.layers.{index}.{theirs}.{kind}")) is not None:
                    weights[f"blocks.{index}.{ours}.{kind}"] = tensor
            for ours, parts in JOINED.items():
                if f"model.layers.{index}.{parts[0]}.{kind}" in llama:
                    weights[f"blocks.{index}.{ours}.{kind}"] = torch.cat([llama[f"model.layers.{index}.{part}.{kind}"] for part in parts])
    return weights


def llama_weights(brian: dict[str, Tensor], config: BrianConfig) -> dict[str, Tensor]:
    """Rename and split a plain decoder's weights."""
    assert config.num_key_value_heads is not None and config.head_dim is not None
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sizes = {"qkv_proj": (query, key, key), "gate_up_proj": (config.intermediate_size, config.intermediate_size)}
    weights = {"model.embed_tokens.weight": brian["embed_tokens.weight"], "model.norm.weight": brian["norm.weight"]}
    weights["lm_head.weight"] = brian["lm_head.weight"]
    for index in range(config.num_hidden_layers):
        for kind in ("weight", "bias"):
            for ours, theirs in SAME.items():
                if (tensor := brian.get(f"blocks.{index}.{ours}.{kind}")) is not None:
                    weights[f"model.layers.{index}.{theirs}.{kind}"] = tensor
            for ours, parts in JOINED.items():
                if (tensor := brian.get(f"blocks.{index}.{ours}.{kind}")) is not None:
                    pieces = tensor.split(sizes[ours])
                    weights |= {f"model.layers.{index}.{part}.{kind}": piece for part, piece in zip(parts, pieces, strict=True)}
    return weights


def _filled(model: Any, weights: dict[str, Tensor], origin: Any) -> Any:
    """Put copies of `weights` into `model`, made on the meta device, and take over what else `origin` is set to."""
    dtype, device = origin.lm_head.weight.dtype, origin.lm_head.weight.device
    model = model.to(dtype).to_empty(device=device)
    model.load_state_dict(weights)
    model.tie_weights()
    for name, module in model.named_modules():  # Llama's rotary buffers are not saved, and empty now
        if hasattr(module, "inv_freq"):
            fresh = type(module)(model.config).to(device)
            model.set_submodule(name, fresh)
    model.generation_config = origin.generation_config
    model.config.dtype = dtype
    return model.train(origin.training)


def _read(folder: Path | str, options: dict[str, Any]) -> LlamaForCausalLM:
    kind = _model_type(Path(folder))
    if kind != "llama":
        raise ValueError(f"source={str(folder)!r}: holds a {kind} model, not a Llama model")
    return LlamaForCausalLM.from_pretrained(folder, **options)


def _model_type(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder={str(folder)!r}: holds no config.json, so no model was saved there")
    return AutoConfig.from_pretrained(folder).model_type


def _split(layers: int, pre: int | None, pool: int, post: int | None) -> tuple[int, int]:
    """Return how many of `layers` go before and after the pool."""
    if post is None:
        post = 0 if pre is None else layers - pre - pool
    if pre is None:
        pre = layers - pool - post
    if min(pre, post) < 0 or pre + pool + post != layers:
        raise ValueError(f"pre_blocks={pre}, pool_blocks={pool}, post_blocks={post}: must add up to the model's {layers} layers")
    return pre, post
