"""The BRIAN model once more, slowly: one token, one head and one attended token at a time. Only tests import it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pathlm.models.brian.modeling import BrianForCausalLM
from pathlm.models.layers import Block, rotary_frequencies

# Shapes: T tokens, D width, K head width, V vocabulary


def logits(model: BrianForCausalLM, input_ids: list[int], document_ids: list[int] | None = None) -> Tensor:
    """Return the logits (T, V) of one row, by the equations."""
    documents = document_ids or [0] * len(input_ids)
    positions = [documents[:t].count(documents[t]) for t in range(len(documents))]
    hidden = [model.embed_tokens.weight[token] for token in input_ids]
    for block in model.blocks:
        assert isinstance(block, Block)
        hidden = _block(model, block, hidden, positions, documents)
    return torch.stack([model.lm_head.weight @ _normalise(h, model.norm.weight, model.config.rms_norm_eps) for h in hidden])


def loss(model: BrianForCausalLM, input_ids: list[int], labels: list[int], document_ids: list[int] | None = None) -> Tensor:
    """Return the mean of -log p(label) over the tokens whose label is counted, each predicted from the token before."""
    scores = logits(model, input_ids, document_ids)
    terms = [torch.logsumexp(scores[t - 1], 0) - scores[t - 1, labels[t]] for t in range(1, len(labels)) if labels[t] != -100]
    return torch.stack(terms).sum() / len(terms)


def _block(model: BrianForCausalLM, block: Block, hidden: list[Tensor], positions: list[int], documents: list[int]) -> list[Tensor]:
    config = model.config
    heads, groups, width, eps = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps
    assert groups is not None and width is not None
    query, key, value = [], [], []
    for h_D, position in zip(hidden, positions, strict=True):
        rows = _linear(block.qkv_proj, _normalise(h_D, block.attention_norm.weight, eps)).split(width)
        query.append([_turn(row, position, model) for row in rows[:heads]])
        key.append([_turn(row, position, model) for row in rows[heads : heads + groups]])
        value.append(rows[heads + groups :])
    result = []
    for t, h_D in enumerate(hidden):
        visible = [s for s in range(t + 1) if documents[s] == documents[t]]
        read = []
        for head in range(heads):
            group = head * groups // heads
            score = torch.stack([query[t][head] @ key[s][group] / math.sqrt(width) for s in visible])
            weight = score.exp() / score.exp().sum()
            read.append(sum((w * value[s][group] for w, s in zip(weight, visible, strict=True)), torch.zeros_like(value[t][group])))
        h_D = h_D + _linear(block.out_proj, torch.cat(read))
        gate, up = _linear(block.gate_up_proj, _normalise(h_D, block.mlp_norm.weight, eps)).split(config.intermediate_size)
        result.append(h_D + _linear(block.down_proj, gate / (1 + torch.exp(-gate)) * up))
    return result


def _linear(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    return layer.weight @ x if layer.bias is None else layer.weight @ x + layer.bias


def _normalise(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return weight_D * x_D / torch.sqrt((x_D * x_D).sum() / len(x_D) + eps)


def _turn(x_K: Tensor, position: int, model: BrianForCausalLM) -> Tensor:
    """Turn the pairs (i, i + K/2) by the position's angles. Angles are float32, as everywhere."""
    frequency, scale = rotary_frequencies(model.config)
    half = len(x_K) // 2
    turned = [torch.zeros_like(x_K[0])] * len(x_K)
    for i in range(half):
        angle = torch.tensor(float(position)) * frequency[i]
        cos, sin = (angle.cos() * scale).to(x_K.dtype), (angle.sin() * scale).to(x_K.dtype)
        turned[i], turned[i + half] = x_K[i] * cos - x_K[i + half] * sin, x_K[i + half] * cos + x_K[i] * sin
    return torch.stack(turned)
