"""The BriLLM equations once more, slowly: one row, one step, one target at a time, over all nodes. Only tests import it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pathlm.models.brillm.configuration import TIMESCALES
from pathlm.models.brillm.modeling import BrillmForCausalLM

# Shapes: T tokens, V nodes, D width of the signal, C candidates

NORM_EPS = 1e-6


def edge(model: BrillmForCausalLM, source: int, target: int) -> int:
    """Return the row of a pair's edge, found by reading the whole list; 0 where it has none of its own."""
    keys: list[int] = model.graph.key.tolist()
    key = source * model.config.vocab_size + target
    return keys.index(key) + 1 if key in keys else 0


def position(model: BrillmForCausalLM, number: int) -> Tensor:
    """Return the positional vector (D,) of a position: sine and cosine of it, at frequencies divided or multiplied by 10000^(2j/d)."""
    config = model.config
    dtype = model.graph.weight.dtype
    if config.positions == "none":
        return torch.zeros(config.signal_size, dtype=dtype)
    if config.beyond == "hold":
        number = min(number, config.trained_positions - 1)
    numbers = []
    for j in range(config.signal_size // 2):
        rate = 10_000.0 ** (2 * j / config.signal_size)
        angle = number * rate if config.positions == "multiplied" else number / rate
        numbers += [math.sin(angle), math.cos(angle)]
    return config.position_scale * torch.tensor(numbers, dtype=torch.float64).to(dtype)


def gelu(x: Tensor) -> Tensor:
    """Return x · Φ(x)."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def pooled(model: BrillmForCausalLM, outputs: list[Tensor]) -> Tensor:
    """Return the mean of outputs, weighted by the softmax of their positions' weights."""
    config = model.config
    weights = model.graph.position_weight
    last = len(weights) - 1
    if config.beyond == "continue" or len(outputs) <= last + 1:
        softmax = torch.softmax(torch.stack([weights[min(k, last)] for k in range(len(outputs))]), 0)
        return torch.stack([weight * output for weight, output in zip(softmax, outputs, strict=True)]).sum(0)
    # Held: past the trained positions every new output enters with the share that the last trained one had.
    share = torch.softmax(weights, 0)[last]
    mean = pooled(model, outputs[: last + 1])
    for output in outputs[last + 1 :]:
        mean = (1 - share) * mean + share * output
    return mean


def fading(outputs: list[Tensor], kept: list[Tensor]) -> Tensor:
    """Return s of `s ← s · kept + output · (1 − kept)` after the last output, beginning with the first one."""
    state = outputs[0]
    for output, keep in zip(outputs[1:], kept[1:], strict=True):
        state = state * keep + output * (1 - keep)
    return state


def joined(model: BrillmForCausalLM, tokens: list[int], first: Tensor, outputs: list[Tensor]) -> Tensor:
    """Return the signal that leaves the last of `tokens`: the first signal and what arrived at every later token, joined."""
    config, graph = model.config, model.graph
    # Where each of them arrived: the first signal at the first token, output k at token k + 1.
    came = list(zip([first, *outputs], tokens, strict=True))
    if outputs and not config.keep_initial:
        came = came[1:]
    members, nodes = [output for output, _ in came], [node for _, node in came]
    traces, decays = [], iter(getattr(graph, "decay", []))
    for part in config.context.split("+"):
        if part == "pooled":
            traces.append(pooled(model, members))
        elif part == "chain":
            traces.append(members[-1])
        elif part == "decay":
            traces.append(fading(members, [torch.sigmoid(next(decays))] * len(members)))
        elif part == "node-decay":
            traces.append(fading(members, [torch.sigmoid(graph.node_decay[node]) for node in nodes]))
        elif part == "gated":
            traces.append(fading(members, [1 - torch.sigmoid(graph.gate[node]) for node in nodes]))
        else:
            kept = [torch.tensor(1 - 1 / scale, dtype=torch.float64) for scale in config.timescales or TIMESCALES]
            traces += [fading(members, [keep] * len(members)) for keep in kept]
    if len(traces) == 1:
        return traces[0]
    return torch.stack([mix * trace for mix, trace in zip(graph.mix, traces, strict=True)]).sum(0)


def entering(model: BrillmForCausalLM, output: Tensor) -> Tensor:
    """Return what enters the signal of an output: itself, or its direction with a root mean square of 1."""
    return output / torch.sqrt((output * output).mean() + NORM_EPS) if model.config.normalise else output


def outcome(model: BrillmForCausalLM, signal_D: Tensor, source: int, target: int, place_D: Tensor) -> Tensor:
    """Return the signal that arrives at `target` over the edge from `source`."""
    row = edge(model, source, target)
    return gelu(model.graph.weight[row] @ signal_D + model.graph.bias[row] + place_D)


def energies(model: BrillmForCausalLM, tokens: list[int], *, decoding: bool = False, initial_signal: Tensor | None = None) -> Tensor:
    """Return the energy (T, V) of every next node after each token of one text.

    `decoding` is the arithmetic of the released decoding: edge i adds the vector of position i instead of i + 1.
    """
    width, nodes = model.config.signal_size, model.config.vocab_size
    if initial_signal is None:
        level = 1 / width if model.config.initial_signal is None else model.config.initial_signal
        initial_signal = torch.full((width,), level, dtype=model.graph.weight.dtype)
    first = entering(model, gelu(initial_signal + model.graph.node_bias[tokens[0]] + position(model, 0)))
    outputs: list[Tensor] = []
    rows = []
    for i, token in enumerate(tokens):
        signal = joined(model, tokens[: i + 1], first, outputs)
        place = position(model, i if decoding else i + 1)
        arrived = [outcome(model, signal, token, target, place) for target in range(nodes)]
        rows.append(torch.stack([_energy(y) for y in arrived]))
        if i + 1 < len(tokens):
            outputs.append(entering(model, arrived[tokens[i + 1]]))
    return torch.stack(rows)


def _energy(y_D: Tensor) -> Tensor:
    """Return the length of a vector; one of no length has no slope."""
    squares = (y_D * y_D).sum()
    return torch.sqrt(squares) if squares > 0 else squares


def loss(energy_TV: Tensor, labels: list[int]) -> Tensor:
    """Return the mean of −log softmax over all nodes at the labels that are counted, token t predicted by the energies at t − 1."""
    terms = [cross_entropy(energy_TV[t - 1], labels[t]) for t in range(1, len(labels)) if labels[t] != -100]
    return torch.stack(terms).sum() / len(terms)


def cross_entropy(energy_V: Tensor, target: int, candidates: list[int] | None = None) -> Tensor:
    """Return −log of the target's share in Σ exp(energy), over all nodes or over some candidates."""
    compared = range(len(energy_V)) if candidates is None else candidates
    return (
        torch.log(torch.stack([torch.exp(energy_V[node] - energy_V.max()) for node in compared]).sum()) + energy_V.max() - energy_V[target]
    )


def greedy(model: BrillmForCausalLM, prompt: list[int], count: int, *, decoding: bool = False) -> list[int]:
    """Return the `count` tokens of most energy after a prompt, each read before the next; released decoding repeats none at once."""
    tokens = list(prompt)
    for _ in range(count):
        energy = energies(model, tokens, decoding=decoding)[-1].clone()
        if decoding:
            energy[tokens[-1]] = -torch.inf
        tokens.append(int(energy.argmax()))
    return tokens[len(prompt) :]
