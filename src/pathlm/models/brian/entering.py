"""Entering canonical memory: codes for a model that was trained without them, and the rows that it then no longer makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.layers import rotary_frequencies

# Shapes: D width, C numbers in a code, G key/value heads, K head width

CODE_FIELDS = ("code_dim", "code_adapter", "code_delta_rank", "post_memory")
"""Fields that the weights of codes depend on."""
MEMORY_FIELDS = ("memory", "left_rows", "local_window", "code_window", "code_sinks", "attention_window", "attention_sinks", *CODE_FIELDS)
"""Fields that say what a model remembers."""
NEAR = 64
"""Tokens over which the turning of keys is averaged, where a code's key knows no place."""


def remembering(weights: dict[str, Tensor], config: BrianConfig) -> dict[str, Tensor]:
    """Return the weights of a model whose blocks all remember keys and values, as those of a model of `config`.

    A code is made so that as much as possible of all blocks' keys and values can be made of it (the widest directions of their matrices
    together), and the adapters make what the blocks would make of the state that enters the pool. Nothing is learned here, and while
    every token is read as a row, nothing changes.
    """
    if not config.remembers_codes:
        return weights
    weights = dict(weights)
    if "codes.key" not in weights or _unread(weights, config):
        weights |= _codes(weights, config)
    first, readers = config.pre_blocks, _readers(config)
    silent = [i for i in range(first, first + readers) if i >= first + config.pool_blocks or not config.remembers_rows]
    assert config.head_dim is not None
    rows = config.num_attention_heads * config.head_dim
    for index in silent:
        for name in (f"blocks.{index}.qkv_proj.weight", f"blocks.{index}.qkv_proj.bias"):
            if name in weights:
                weights[name] = weights[name][:rows]
    return weights


@torch.no_grad()
def begin(model: Any) -> None:
    """Let the codes of a model in training, which nobody has read so far, start from what its blocks have learned.

    What is drawn by chance stays as it was drawn when the model was made: processes that train together draw different numbers now.
    """
    found = _codes(model.state_dict(), model.config)
    for name, parameter in model.codes.named_parameters():
        if not name.endswith("_narrow"):
            parameter.copy_(found[f"codes.{name}"])


def check_entry(theirs: BrianConfig, config: BrianConfig, *, where: str) -> None:
    """Refuse to start a model from weights that do not fit what it is to remember; `where` names the weights."""
    if not theirs.remembers_codes:
        return
    if theirs.memory == "canonical" and config.memory != "canonical":
        raise ValueError(f"model.memory={config.memory!r}: {where} has 'canonical', and its blocks make no keys and values")
    if not config.remembers_codes:  # codes are left behind
        if theirs.post_memory == "canonical":
            rule = f"{where} has post_memory='canonical', and its blocks after the pool make no keys and values"
            raise ValueError(f"model.memory={config.memory!r}: {rule}")
        return
    for name in CODE_FIELDS:
        mine, its = getattr(config, name), getattr(theirs, name)
        if mine != its:
            raise ValueError(f"model.{name}={mine!r}: {where} has {its!r}, and its weights fit no other")


def _unread(weights: dict[str, Tensor], config: BrianConfig) -> bool:
    """Whether codes that came with these weights were never read, so that they are as they were drawn."""
    return config.post_memory == "own" and not weights["codes.local_window"] and bool(weights["codes.local_share"] == 1)


def _readers(config: BrianConfig) -> int:
    return config.pool_blocks + (config.post_blocks if config.post_memory == "canonical" else 0)


@torch.no_grad()
def _codes(weights: dict[str, Tensor], config: BrianConfig) -> dict[str, Tensor]:
    """Return the weights of `Codes`, made of the blocks' own."""
    groups, width, heads = config.num_key_value_heads, config.head_dim, config.num_attention_heads
    assert groups is not None and width is not None
    keys, values = [], []
    for index in range(config.pre_blocks, config.pre_blocks + _readers(config)):
        made = weights[f"blocks.{index}.qkv_proj.weight"][heads * width :].double()
        made = made * weights[f"blocks.{index}.attention_norm.weight"].double()
        key, value = made.unflatten(0, (2, groups, width))  # (G, K, D)
        keys.append(_unplaced(key, config))
        values.append(value)
    key_RGKD, value_RGKD = torch.stack(keys), torch.stack(values)
    like = weights["embed_tokens.weight"]
    found: dict[str, Tensor] = {"codes.norm.weight": torch.ones(config.hidden_size)}
    if config.code_dim != 0:
        made = torch.cat((key_RGKD, value_RGKD)).flatten(0, 2)
        down_CD = _widest(made.T @ made, config.code_width)
        found["codes.down.weight"] = down_CD
        key_RGKD, value_RGKD = key_RGKD @ down_CD.T, value_RGKD @ down_CD.T
    if config.code_adapter == "shared":
        key_RGKD, value_RGKD = key_RGKD.mean(0, keepdim=True), value_RGKD.mean(0, keepdim=True)
    found |= {"codes.key": key_RGKD, "codes.value": value_RGKD, "codes.turned_key.weight": torch.zeros(width, config.code_width)}
    if (rank := config.code_delta_rank) > 0:
        readers, std = _readers(config), config.code_width**-0.5
        for name in ("key", "value"):
            found[f"codes.{name}_wide"] = torch.zeros(readers, heads, width, rank)
            found[f"codes.{name}_narrow"] = std * torch.randn(readers, heads, rank, config.code_width)
    found = {name: tensor.to(like.device, like.dtype) for name, tensor in found.items()}
    window = torch.tensor(config.local_window, device=like.device)
    return found | {"codes.local_window": window, "codes.local_share": torch.ones((), device=like.device)}


def _widest(square_DD: Tensor, code: int) -> Tensor:
    """Return the `code` widest directions (C, D) of a symmetric matrix, zeros after them where there are more numbers than directions."""
    directions = torch.linalg.eigh(square_DD).eigenvectors.flip(-1).T[:code]
    return torch.nn.functional.pad(directions, (0, 0, 0, code - len(directions)))


def _unplaced(key_GKD: Tensor, config: BrianConfig) -> Tensor:
    """Return what keys are to a query on the average of the next `NEAR` places, where both are turned by their place."""
    frequency, _ = rotary_frequencies(config)
    angle = torch.arange(NEAR)[:, None] * frequency.double().cpu()
    cos, sin = (table.mean(0).to(key_GKD.device)[:, None] for table in (angle.cos(), angle.sin()))
    first, second = key_GKD.chunk(2, dim=1)
    # turn(q, t) · turn(k, s) = q · turn(k, s - t), and s - t is not positive.
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=1)
