"""Entering canonical memory: codes for a model that was trained without them, and the rows that it then no longer makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.layers import rotary_frequencies

# Shapes: D width, C numbers in a code, J keys of it, Z readers, H heads, G key/value heads, K head width, f = K / 2 frequencies

CODE_FIELDS = ("code_dim", "code_keys", "code_adapter", "code_delta_rank", "post_memory")
"""Fields that the weights of codes depend on."""
MEMORY_FIELDS = ("memory", "left_rows", "local_window", "code_window", "code_sinks", "attention_window", "attention_sinks", *CODE_FIELDS)
"""Fields that say what a model remembers."""
NEAR = 64
"""Tokens over which the turning of what is left of keys is averaged, where it no longer turns."""


def remembering(weights: dict[str, Tensor], config: BrianConfig) -> dict[str, Tensor]:
    """Return the weights of a model whose blocks all remember keys and values, as those of a model of `config`.

    A code is made so that as much as possible of all blocks' keys and values can be made of it (the widest directions of their matrices
    together), its turned keys so that heads can mix as much as possible of their own keys from them (`_turned_keys`), and the adapters make
    the rest of what the blocks would make of the state that enters the pool. Nothing is learned here, and while every token is read as a
    row, nothing changes.
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
    made = [
        weights[f"blocks.{i}.qkv_proj.weight"].double() * weights[f"blocks.{i}.attention_norm.weight"].double()
        for i in range(config.pre_blocks, config.pre_blocks + _readers(config))
    ]
    query_ZHKD = torch.stack([one[: heads * width].unflatten(0, (heads, width)) for one in made])
    key_ZGKD, value_ZGKD = (torch.stack(parts) for parts in zip(*(one[heads * width :].unflatten(0, (2, groups, width)) for one in made)))
    like = weights["embed_tokens.weight"]
    found: dict[str, Tensor] = {"codes.norm.weight": torch.ones(config.hidden_size)}
    if config.code_dim != 0:
        every = torch.cat((key_ZGKD, value_ZGKD)).flatten(0, 2)
        down_CD = _widest(every.T @ every, config.code_width)
        found["codes.down.weight"] = down_CD
        key_ZGKD, value_ZGKD = key_ZGKD @ down_CD.T, value_ZGKD @ down_CD.T
    found["codes.turned_keys.weight"], found["codes.mix"], rest_ZGKC = _turned_keys(query_ZHKD, key_ZGKD, config.code_keys)
    key_ZGKC = _unplaced(rest_ZGKC, config)
    if config.code_adapter == "shared":
        key_ZGKC, value_ZGKD = key_ZGKC.mean(0, keepdim=True), value_ZGKD.mean(0, keepdim=True)
    found |= {"codes.key": key_ZGKC, "codes.value": value_ZGKD}
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


def _turned_keys(query_ZHKD: Tensor, key_ZGKC: Tensor, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys (J · K, C) that all heads share, how each mixes them (Z, H, J, K), and what is left of their own keys (Z, G, K, C).

    Turning by a place multiplies the pair of numbers of a frequency with one complex number, so a head's key is for each frequency one
    complex function of the code, and heads may mix functions with complex numbers before they are turned. The best J functions for all
    heads of all readers together are the widest singular directions at that frequency, heads weighted by how much they ask there.
    """
    readers, heads, width, _ = query_ZHKD.shape
    groups, half, code = key_ZGKC.shape[1], width // 2, key_ZGKC.shape[-1]
    first, second = key_ZGKC.repeat_interleave(heads // groups, 1).flatten(0, 1).chunk(2, dim=1)
    own_fNC = torch.complex(first, second).transpose(0, 1)  # N = Z · H heads
    asks_fN1 = query_ZHKD.flatten(0, 1).unflatten(1, (2, half)).square().sum((1, 3)).sqrt().T[..., None].clamp(min=1e-9)
    left, size, right = torch.linalg.svd(own_fNC * asks_fN1, full_matrices=False)
    kept = min(keys, size.shape[-1])
    mix_fNJ = left[..., :kept] * size[:, None, :kept] / asks_fN1
    key_fJC = right[:, :kept]
    rest_NfC = (own_fNC - mix_fNJ @ key_fJC).transpose(0, 1)
    # A score is the real part of conj(query) · key, so a query is multiplied with the conjugate of what its key is a mixture with.
    mix_NJf, key_JfC = mix_fNJ.conj().permute(1, 2, 0), key_fJC.transpose(0, 1)
    mix_NJK, key_JKC = (torch.cat((x.real, x.imag), dim=d) for x, d in ((mix_NJf, 2), (key_JfC, 1)))
    mix_NJK = torch.nn.functional.pad(mix_NJK, (0, 0, 0, keys - kept))
    key_JKC = torch.nn.functional.pad(key_JKC, (0, 0, 0, 0, 0, keys - kept))
    rest_NKC = torch.cat((rest_NfC.real, rest_NfC.imag), dim=1)
    rest_ZGKC = rest_NKC.view(readers, groups, heads // groups, width, code).mean(2)
    return key_JKC.flatten(0, 1), mix_NJK.unflatten(0, (readers, heads)), rest_ZGKC


def _unplaced(key_ZGKC: Tensor, config: BrianConfig) -> Tensor:
    """Return what keys are to a query on the average of the next `NEAR` places, where both are turned by their place."""
    frequency, _ = rotary_frequencies(config)
    angle = torch.arange(NEAR)[:, None] * frequency.double().cpu()
    cos, sin = (table.mean(0).to(key_ZGKC.device)[:, None] for table in (angle.cos(), angle.sin()))
    first, second = key_ZGKC.chunk(2, dim=2)
    # turn(q, t) · turn(k, s) = q · turn(k, s - t), and s - t is not positive.
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=2)
