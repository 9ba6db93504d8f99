"""The BRIAN model once more, slowly: one token and one head at a time. Only tests import it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pathlm.models.brian.modeling import BrianForCausalLM
from pathlm.models.layers import Block, rotary_frequencies

# Shapes: T tokens, D width, K head width, V vocabulary

Heads = list[Tensor]
"""One vector (K,) per head."""


def logits(model: BrianForCausalLM, input_ids: list[int], document_ids: list[int] | None = None) -> Tensor:
    """Return the logits (T, V) of one row of a plain decoder, by the equations. `reference_pool.read` reads with a pool."""
    assert model.config.pool_blocks == 0
    documents = document_ids or [0] * len(input_ids)
    hidden = ordinary(model, model.blocks, [model.embed_tokens.weight[token] for token in input_ids], documents)
    return head(model, hidden)


def loss(model: BrianForCausalLM, input_ids: list[int], labels: list[int], document_ids: list[int] | None = None) -> Tensor:
    """Return the mean of -log p(label) over the tokens whose label is counted, each predicted from the token before."""
    return cross_entropy(logits(model, input_ids, document_ids), labels)


def cross_entropy(scores_TV: Tensor, labels: list[int]) -> Tensor:
    """Return the mean of -log p(label) over counted labels, token t predicted by the scores at t - 1."""
    terms = [torch.logsumexp(scores_TV[t - 1], 0) - scores_TV[t - 1, labels[t]] for t in range(1, len(labels)) if labels[t] != -100]
    return torch.stack(terms).sum() / len(terms)


def ordinary(model: BrianForCausalLM, blocks: Iterable[nn.Module], hidden: list[Tensor], documents: list[int]) -> list[Tensor]:
    """Return the hidden state of every token after all `blocks`, in order."""
    positions, config = count(documents), model.config
    seen = [visible(t, documents, config.attention_window, config.attention_sinks) for t in range(len(documents))]
    for block in blocks:
        assert isinstance(block, Block)
        parts = [project(model, block, h_D, position) for h_D, position in zip(hidden, positions, strict=True)]
        rows = [(key, value) for _, key, value in parts]
        hidden = [finish(model, block, h_D, attend(parts[t][0], [rows[s] for s in seen[t]], model)) for t, h_D in enumerate(hidden)]
    return hidden


def head(model: BrianForCausalLM, hidden: list[Tensor]) -> Tensor:
    """Return the logits (T, V)."""
    return torch.stack([model.lm_head.weight @ normalise(h, model.norm.weight, model.config.rms_norm_eps) for h in hidden])


def count(documents: list[int]) -> list[int]:
    """Return each token's position: how many tokens of its document are before it."""
    return [documents[:t].count(documents[t]) for t in range(len(documents))]


def visible(t: int, documents: list[int], window: int = 0, sinks: int = 0) -> list[int]:
    """Return the tokens that token t sees: of its document all up to itself, or the `window` newest and the first `sinks`."""
    mine = [s for s in range(t + 1) if documents[s] == documents[t]]
    return mine if not window else mine[:sinks] + mine[max(sinks, len(mine) - window) :]


def project(model: BrianForCausalLM, block: Block, h_D: Tensor, position: int) -> tuple[Heads, Heads, Heads]:
    """Return one token's turned queries and keys, and its values."""
    config = model.config
    heads, groups, width = config.num_attention_heads, block.groups, config.head_dim
    assert width is not None
    parts = linear(block.qkv_proj, normalise(h_D, block.attention_norm.weight, config.rms_norm_eps)).split(width)
    turned = [turn(part, position, model) for part in parts[: heads + groups]]
    return turned[:heads], turned[heads:], list(parts[heads + groups :])


def attend(query: Heads, rows: list[tuple[Heads, Heads]], model: BrianForCausalLM) -> Tensor:
    """Return what one token's queries read from the key and value rows it sees, heads beside each other."""
    heads, groups, width = model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim
    assert groups is not None and width is not None
    read = []
    for number in range(heads):
        group = number * groups // heads
        score = torch.stack([key[group] for key, _ in rows]) @ query[number] / math.sqrt(width)
        weight = score.exp() / score.exp().sum()
        read.append(weight @ torch.stack([value[group] for _, value in rows]))
    return torch.cat(read)


def finish(model: BrianForCausalLM, block: Block, h_D: Tensor, read: Tensor) -> Tensor:
    """Add what attention read, and what the MLP makes of it."""
    h_D = h_D + linear(block.out_proj, read)
    gate, up = linear(block.gate_up_proj, normalise(h_D, block.mlp_norm.weight, model.config.rms_norm_eps)).chunk(2)
    return h_D + linear(block.down_proj, gate / (1 + torch.exp(-gate)) * up)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return W x + b."""
    return layer.weight @ x if layer.bias is None else layer.weight @ x + layer.bias


def normalise(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return `x_D` divided by its root mean square, times the weight."""
    return weight_D * x_D / torch.sqrt((x_D * x_D).sum() / len(x_D) + eps)


def turn(x_K: Tensor, position: int, model: BrianForCausalLM) -> Tensor:
    """Turn the pairs (i, i + K/2) by the position's angles. Angles are float32, as everywhere."""
    frequency, scale = rotary_frequencies(model.config)
    angle = position * frequency
    cos, sin = (angle.cos() * scale).to(x_K.dtype), (angle.sin() * scale).to(x_K.dtype)
    first, second = x_K.chunk(2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin))
