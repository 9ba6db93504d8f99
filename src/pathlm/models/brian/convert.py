"""Llama checkpoints as BRIAN models and back: the same weights under other names, two or three of Llama's matrices joined into one.

Wrapping turns some blocks of a trained decoder into a pool. The fresh router takes them in their old order, so nothing changes at first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pathlm.config import build_strict, override
from pathlm.models import open_whole, read_config, read_tokenizer
from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.brian.entering import MEMORY_FIELDS, check_entry, remembering
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
FITTING = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
    "tie_word_embeddings", "rope_parameters", "attention_bias", "mlp_bias",
)  # fmt: skip
"""Fields that weights depend on in every model."""
POOL_FIELDS = (
    "pre_blocks", "pool_blocks", "post_blocks", "block_position", "block_position_dim", "block_position_to", "router_hidden",
)  # fmt: skip
"""Fields that a routed model's weights depend on."""
ROUTING_FIELDS = (
    "max_route_steps", "min_route_steps", "route_top_k", "route_moves", "max_repeats", "location_bias", *MEMORY_FIELDS, *POOL_FIELDS[3:],
)  # fmt: skip
"""Fields that say how a pool is used."""
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
    routing: Mapping[str, Any] | None = None,
    **options: Any,
) -> BrianForCausalLM:
    """Return a BRIAN model with the weights of a Llama model, given itself or as the folder it was saved in.

    Layers that the three numbers leave over go to `pre_blocks`, or to `post_blocks` where `pre_blocks` is given. With `pool_blocks` the
    model is wrapped: its router takes the layers in their order until it is trained otherwise. `routing` are fields of `BrianConfig` that
    say how; `max_route_steps` is as many as there are blocks in the pool unless given there.
    `options` go to `from_pretrained` when `source` is a folder. Logits are equal; dropout, which only training knows, is not carried over.
    Raises `ValueError` when `source` is not a Llama model or uses what a BRIAN block does not have.
    """
    llama = source if isinstance(source, LlamaForCausalLM) else _read(source, options)
    theirs = llama.config
    pre, post = _split(theirs.num_hidden_layers, pre_blocks, pool_blocks, post_blocks)
    config = _config_like(theirs, _routing(routing, pre, pool_blocks, post))
    return _with_pool(config, brian_weights(llama.state_dict(), theirs.num_hidden_layers), llama)


def wrap(
    source: BrianForCausalLM | LlamaForCausalLM | Path | str, *, pre_blocks: int, pool_blocks: int, post_blocks: int, **routing: Any
) -> BrianForCausalLM:
    """Return a plain decoder, ours or any Llama model, with `pool_blocks` of its blocks as a pool. Its logits are equal to the last bit.

    The three numbers must add up to the decoder's blocks. `routing` are other fields of `BrianConfig`, such as `max_route_steps`. With
    `route_top_k=2` the logits are equal only while one block is visited at a time (knobs with `top_k=1`): two are mixed otherwise.
    Raises `ValueError` when they do not, or when `source` has a pool already.
    """
    if isinstance(source, BrianForCausalLM | LlamaForCausalLM):
        theirs: Any = source.config
    elif (kind := (theirs := read_config(source)).model_type) not in ("brian", "llama"):
        raise ValueError(f"folder={str(source)!r}: holds a {kind} model; only a plain decoder of ours or a Llama model can be wrapped")
    if getattr(theirs, "pool_blocks", 0):
        raise ValueError(f"pool_blocks={theirs.pool_blocks}: the model has a pool already; a plain decoder is wrapped once")
    if pool_blocks < 1:
        raise ValueError(f"pool_blocks={pool_blocks}: a pool needs at least one block")
    if pre_blocks + pool_blocks + post_blocks != theirs.num_hidden_layers:
        said = f"pre_blocks={pre_blocks}, pool_blocks={pool_blocks}, post_blocks={post_blocks}"
        raise ValueError(f"{said}: must add up to the {theirs.num_hidden_layers} blocks of the model")
    _check_whole_path(routing.get("max_route_steps", pool_blocks), pool_blocks)
    config = _config_like(theirs, _routing(routing, pre_blocks, pool_blocks, post_blocks))  # refused before weights are read
    _check_same_function(config)
    opened = source if isinstance(source, BrianForCausalLM | LlamaForCausalLM) else open_whole(source)
    weights = opened.state_dict()
    if theirs.model_type == "llama":
        weights = brian_weights(weights, theirs.num_hidden_layers)
    return _with_pool(config, weights, opened)


def _check_same_function(config: BrianConfig) -> None:
    """Refuse to wrap a decoder so that it sees less than it did."""
    limits = {name: getattr(config, name) for name in ("local_window", "attention_window")}
    limits |= {"memory": "canonical"} if config.memory == "canonical" else {}
    limits |= {"post_memory": "canonical"} if config.post_memory == "canonical" else {}
    for name, value in limits.items():
        if value:
            rule = "the wrapped model would not be the same; wrap it without, and let training change it (pathlm train --set init=…)"
            raise ValueError(f"{name}={value!r}: {rule}")


def _check_whole_path(longest: Any, blocks: int, *, where: str = "") -> None:
    """Refuse fewer route steps than a decoder that is wrapped has blocks in its pool."""
    if isinstance(longest, int) and 0 < longest < blocks:
        rule = f"must be at least pool_blocks={blocks}, or the old path through them would be cut"
        raise ValueError(f"{where}max_route_steps={longest}: {rule}")


def start_from(folder: Path | str, config: BrianConfig) -> BrianForCausalLM:
    """Return a model of this configuration with the weights saved in `folder`: of the same architecture, or a decoder to wrap.

    Options that hold no weights may differ: how many route steps there are, how many blocks a step visits, how often one may be repeated,
    windows. Codes may be new: they then start from what the blocks' own keys and values are made of.
    Raises `ValueError` naming the first field that does not fit.
    """
    kind = read_config(folder).model_type
    if kind not in ("brian", "llama"):
        raise ValueError(f"init={str(folder)!r}: holds a {kind} model; BRIAN starts from a BRIAN or a Llama model")
    source = open_whole(folder)
    check_start(source.config, config, origin=f"init={str(folder)!r}")
    weights = source.state_dict() if kind == "brian" else brian_weights(source.state_dict(), source.config.num_hidden_layers)
    if not config.remembers_codes:
        weights = {name: weight for name, weight in weights.items() if not name.startswith("codes.")}
    return _with_pool(config, weights, source)


def check_start(theirs: Any, config: BrianConfig, *, origin: str) -> None:
    """Raise `ValueError` naming the first field in which a model of this configuration cannot begin with the weights of `theirs`.

    `theirs` is the configuration of a BRIAN or a Llama model, `origin` how a message calls it.
    """
    pool = getattr(theirs, "pool_blocks", 0)
    if config.num_hidden_layers != theirs.num_hidden_layers:
        said = f"pre_blocks={config.pre_blocks}, pool_blocks={config.pool_blocks}, post_blocks={config.post_blocks}"
        raise ValueError(f"model: {said} must add up to the {theirs.num_hidden_layers} blocks of {origin}")
    fixed = FITTING + (POOL_FIELDS if pool else ())
    for name in fixed:
        mine, its = getattr(config, name), getattr(theirs, name)
        if mine != its:
            raise ValueError(f"model.{name}={mine!r}: {origin} has {its!r}, and its weights fit no other")
    if config.pool_blocks and not pool:
        _check_whole_path(config.max_route_steps, config.pool_blocks, where="model.")
    if pool and not config.router_sees_position and config.max_route_steps != theirs.max_route_steps:
        rule = f"{origin} has {theirs.max_route_steps}, and its router knows each step by its number"
        raise ValueError(f"model.max_route_steps={config.max_route_steps}: {rule}")
    if isinstance(theirs, BrianConfig):
        check_entry(theirs, config, where=origin)


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


def convert(
    folder: Path | str,
    out: Path | str,
    *,
    to: Literal["brian", "llama"] = "brian",
    wrap_as: str | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Read the model and tokenizer in `folder`, convert the model, write both to `out` and return it: the body of `pathlm convert`.

    `wrap_as`, for instance `"2/8/2"`, turns a plain decoder of either kind into a routed model with so many blocks before, in and after the
    pool; `overrides` such as `max_route_steps=12` then set other fields of the configuration. Raises `ValueError` when `folder` holds no
    model of the right kind, or when `out` already holds a model or a run.
    """
    source, target = Path(folder), Path(out)
    if to not in ("brian", "llama"):
        raise ValueError(f"to={to!r}: must be brian or llama")
    if (target / "config.json").exists():
        raise ValueError(f"out={str(target)!r}: already holds a model; name a new folder")
    if (target / "run.json").exists() or (target / "checkpoints").exists():
        raise ValueError(f"out={str(target)!r}: is the folder of a run, whose model is in its checkpoints; name a new folder")
    source = checkpoint_in(source)
    kind = read_config(source).model_type
    if wrap_as is not None:
        if to != "brian":
            raise ValueError(f"to={to!r}: --wrap makes a BRIAN model")
        numbers, others = _numbers(wrap_as), _table(overrides)
        if twice := sorted(numbers.keys() & others.keys()):
            raise ValueError(f"--set {twice[0]}={others[twice[0]]!r}: --wrap {wrap_as} says how the blocks are split; leave it out")
        model: Any = wrap(source, **numbers, **others)
    elif overrides:
        raise ValueError(f"--set {overrides[0]!r}: sets fields of a wrapped model; give --wrap as well")
    elif kind != ("llama" if to == "brian" else "brian"):
        raise ValueError(f"folder={str(source)!r}: holds a {kind} model, which cannot become {to}")
    else:
        model = from_llama(source) if to == "brian" else to_llama(open_whole(source))
    tokenizer = read_tokenizer(source) if (source / "tokenizer_config.json").exists() else None
    model.save_pretrained(target)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    return target


def checkpoint_in(folder: Path) -> Path:
    """Return the best checkpoint of a run's folder, or the folder itself where it is no run."""
    run = folder / "checkpoints"
    return next((run / name for name in ("best", "latest") if (run / name / "config.json").is_file()), folder)


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


def _config_like(theirs: Any, others: dict[str, Any]) -> BrianConfig:
    """Return the configuration of a model with the fields that `theirs` shares with it, and `others`."""
    fields = {name: getattr(theirs, name) for name in SHARED_FIELDS}
    if fields["rope_parameters"] is not None:
        fields["rope_parameters"] = dict(fields["rope_parameters"])
    return build_strict(BrianConfig, fields | others)


def _with_pool(config: BrianConfig, weights: dict[str, Tensor], origin: Any) -> BrianForCausalLM:
    """Return a model of `config` with these weights; what they lack of a pool is fresh."""
    with torch.device("meta"):
        model = BrianForCausalLM(config)
    return _filled(model, remembering(weights, config), origin)


def _filled(model: Any, weights: dict[str, Tensor], origin: Any) -> Any:
    """Put copies of `weights` into `model`, made on the meta device, and take over what else `origin` is set to."""
    dtype, device = origin.lm_head.weight.dtype, origin.lm_head.weight.device
    model = model.to(dtype).to_empty(device=device)
    pool = getattr(model, "pool", None)
    if pool is not None:
        pool.reset()
    found = model.load_state_dict(weights, strict=False)
    missing = [name for name in found.missing_keys if not (name.startswith("pool.") and pool is not None)]
    assert not found.unexpected_keys and not missing, (found, "weights of another model")
    model.tie_weights()
    for name, module in model.named_modules():  # Llama's rotary buffers are not saved, and empty now
        if hasattr(module, "inv_freq"):
            fresh = type(module)(model.config).to(device)
            model.set_submodule(name, fresh)
    model.generation_config = origin.generation_config
    model.config.dtype = dtype
    return model.train(origin.training)


def _routing(routing: Mapping[str, Any] | None, pre: int, pool: int, post: int) -> dict[str, Any]:
    """Return the fields of a configuration that say how the pool is used, refusing those that say something else."""
    numbers = {"pre_blocks": pre, "pool_blocks": pool, "post_blocks": post}
    given = dict(routing or {})
    if unknown := sorted(given.keys() - set(ROUTING_FIELDS)):
        raise ValueError(f"{unknown[0]}={given[unknown[0]]!r}: is no option of a pool; these are {', '.join(ROUTING_FIELDS)}")
    return numbers | {"max_route_steps": pool} | given


def _numbers(text: str) -> dict[str, int]:
    """Read `2/8/2`."""
    parts = text.split("/")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"wrap={text!r}: must be three numbers of blocks, before, in and after the pool, such as 2/8/2")
    return dict(zip(("pre_blocks", "pool_blocks", "post_blocks"), map(int, parts), strict=True))


def _table(overrides: Sequence[str]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for text in overrides:
        override(table, text)
    return table


def _read(folder: Path | str, options: dict[str, Any]) -> LlamaForCausalLM:
    kind = read_config(folder).model_type
    if kind != "llama":
        raise ValueError(f"source={str(folder)!r}: holds a {kind} model, not a Llama model")
    llama: LlamaForCausalLM = open_whole(folder, **options)
    return llama


def _split(layers: int, pre: int | None, pool: int, post: int | None) -> tuple[int, int]:
    """Return how many of `layers` go before and after the pool."""
    if post is None:
        post = 0 if pre is None else layers - pre - pool
    if pre is None:
        pre = layers - pool - post
    if min(pre, post) < 0 or pre + pool + post != layers:
        raise ValueError(f"pre_blocks={pre}, pool_blocks={pool}, post_blocks={post}: must add up to the model's {layers} layers")
    return pre, post
