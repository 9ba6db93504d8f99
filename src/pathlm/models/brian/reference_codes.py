"""Canonical memory once more, slowly: one token, one head and one code at a time. Only tests import it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pathlm.models.brian.codes import Codes
from pathlm.models.brian.modeling import BrianForCausalLM
from pathlm.models.brian.reference import Heads, finish, linear, normalise, turn, visible
from pathlm.models.layers import Block

# Shapes: C numbers in a code, K head width


@dataclass(frozen=True)
class Code:
    """What is remembered of a token."""

    code_C: Tensor
    keys: list[Tensor]
    """(K,) each, turned by the token's place"""


@dataclass(frozen=True)
class Seen:
    """One token that is read, as a row or as a code, and what share of its weight counts."""

    share: float
    row: tuple[Heads, Heads] | None = None
    code: Code | None = None


def write(model: BrianForCausalLM, h_D: Tensor, position: int) -> Code:
    """Return what is remembered of a token that enters the pool."""
    codes = _codes(model)
    code_C = normalise(h_D, codes.norm.weight, model.config.rms_norm_eps)
    if codes.down is not None:
        code_C = linear(codes.down, code_C)
    return Code(code_C, [turn(key_K, position, model) for key_K in linear(codes.turned_keys, code_C).split(model.blocks[0].width)])


def seen_from(
    t: int, documents: list[int], model: BrianForCausalLM, rows: list[tuple[Heads, Heads] | None], codes: list[Code], *,
    window: int, share: float,
) -> list[Seen]:  # fmt: skip
    """Return what token t reads: the newest `window` tokens as rows, all if it is 0, as far as `share` goes, all others as codes."""
    config = model.config
    all_before = visible(t, documents)
    as_codes = visible(t, documents, config.code_window, config.code_sinks)
    found = []
    for age, s in enumerate(reversed(all_before)):
        near = config.memory == "local+canonical" and (not window or age < window)
        row = rows[s]
        if near and share and row is not None:
            found.append(Seen(share, row=row))
        if s in as_codes and (not near or share < 1):
            found.append(Seen(1 - share if near else 1.0, code=codes[s]))
    return found


def read(model: BrianForCausalLM, block: Block, reader: int, h_D: Tensor, position: int, seen: list[Seen]) -> Tensor:
    """Return what a block's heads read for a token in state `h_D`, heads beside each other."""
    config = model.config
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert groups is not None and width is not None
    parts = linear(block.qkv_proj, normalise(h_D, block.attention_norm.weight, config.rms_norm_eps)).split(width)
    read = []
    for head in range(heads):
        group = head * groups // heads
        query, turned = parts[head], turn(parts[head], position, model)
        weights, values = [], []
        for one in seen:
            if one.row is not None:
                key, value = one.row[0][group], one.row[1][group]
                score = turned @ key
            else:
                assert one.code is not None
                key_KC, value_KC = _adapters(model, reader, head, group)
                value = value_KC @ one.code.code_C
                score = query @ (key_KC @ one.code.code_C)
                for number, key_K in enumerate(one.code.keys):
                    score = score + turn(_mixed(query, _codes(model).mix[reader, head, number]), position, model) @ key_K
            weights.append(one.share * (score / math.sqrt(width)).exp())
            values.append(value)
        weight = torch.stack(weights)
        read.append(weight @ torch.stack(values) / weight.sum())
    return torch.cat(read)


def _mixed(query_K: Tensor, mix_K: Tensor) -> Tensor:
    """Multiply a query with a mixture, both halves of complex numbers: one for each frequency."""
    half = len(query_K) // 2
    product = torch.complex(query_K[:half], query_K[half:]) * torch.complex(mix_K[:half], mix_K[half:])
    return torch.cat((product.real, product.imag))


def post(model: BrianForCausalLM, hidden: list[Tensor], codes: list[Code], documents: list[int], positions: list[int]) -> list[Tensor]:
    """Return the tokens' states after the blocks after the pool, which read codes."""
    for index in range(model.config.post_blocks):
        block = model.blocks[model.config.pre_blocks + model.config.pool_blocks + index]
        assert isinstance(block, Block)
        reader = model.config.pool_blocks + index
        after = []
        for t, h_D in enumerate(hidden):
            near = visible(t, documents, model.config.code_window, model.config.code_sinks)
            heard = read(model, block, reader, h_D, positions[t], [Seen(1.0, code=codes[s]) for s in near])
            after.append(finish(model, block, h_D, heard))
        hidden = after
    return hidden


def _adapters(model: BrianForCausalLM, reader: int, head: int, group: int) -> tuple[Tensor, Tensor]:
    """Return the matrices (K, C) that make a head's key and value of a code."""
    codes = _codes(model)
    number = 0 if model.config.code_adapter == "shared" else reader
    key_KC, value_KC = codes.key[number, group], codes.value[number, group]
    if model.config.code_delta_rank:
        key_KC = key_KC + codes.key_wide[reader, head] @ codes.key_narrow[reader, head]
        value_KC = value_KC + codes.value_wide[reader, head] @ codes.value_narrow[reader, head]
    return key_KC, value_KC


def _codes(model: BrianForCausalLM) -> Codes:
    assert model.codes is not None
    return model.codes
