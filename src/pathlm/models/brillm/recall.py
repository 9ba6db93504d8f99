"""Asking a signal graph: which nodes light up at a step, from any start and with any initial signal; and nodes that are no text."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathlm.config import build_strict
from pathlm.models.brillm.configuration import BrillmConfig
from pathlm.models.brillm.edges import count
from pathlm.models.brillm.modeling import BrillmForCausalLM
from pathlm.models.brillm.presets import FROM_DATA
from pathlm.models.tokens import token_text
from pathlm.path import Neighbours

# Shapes: T steps, K nodes, D width of the signal

AT_ONCE = 2**22
"""Numbers of edges that are read at a time."""
NEIGHBOURS = 12
"""Nodes on either side of a node that are named."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of a graph by their names, which may be anything: words, patches of a picture, places. A tokenizer for `pathlm.trace`."""

    names: tuple[Hashable, ...]

    def __post_init__(self) -> None:
        seen: set[Hashable] = set()
        for name in self.names:
            if name in seen:
                raise ValueError(f"names: {name!r} stands there twice")
            seen.add(name)
        object.__setattr__(self, "_numbers", {name: number for number, name in enumerate(self.names)})

    @classmethod
    def of(cls, walks: Iterable[Iterable[Hashable]]) -> Nodes:
        """Return the nodes of some paths in the order in which they first come."""
        return cls(tuple(dict.fromkeys(name for walk in walks for name in walk)))

    def ids(self, names: Iterable[Hashable]) -> list[int]:
        """Return the numbers of some nodes. Raises `ValueError` for one that does not exist."""
        numbers: dict[Hashable, int] = self._numbers  # type: ignore[attr-defined]
        try:
            return [numbers[name] for name in names]
        except KeyError as error:
            raise ValueError(f"node {error.args[0]!r}: is not among the {len(self.names)} nodes of this graph") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Return the names of some numbers, as `pathlm.models.brillm.tracing.paths` asks for them."""
        return " ".join(str(self.names[number]) for number in ids)


def graph_of(walks: Sequence[Sequence[Hashable]], *, nodes: Nodes | None = None, **options: Any) -> tuple[BrillmForCausalLM, Nodes]:
    """Return a fresh model whose edges are the pairs of neighbours in some paths over nodes of any names, and those nodes.

    `nodes` sets their order, or adds more of them. `options` are fields of `BrillmConfig`, such as `signal_size` or `min_count`, but for
    those that follow from the paths.
    """
    if unknown := sorted(options.keys() - BrillmConfig.__annotations__.keys()):
        raise ValueError(f"BrillmConfig has no option {', '.join(unknown)}")  # transformers would keep it silently
    if decided := sorted(options.keys() & {"vocab_size", *FROM_DATA}):
        raise ValueError(f"{decided[0]}={options[decided[0]]!r}: follows from the paths; leave it out")
    nodes = nodes or Nodes.of(walks)
    config = build_strict(BrillmConfig, {"vocab_size": len(nodes.names)} | options)
    pairs = (np.array(list(pairwise(ids)), dtype=np.int64).reshape(-1, 2) for ids in map(nodes.ids, walks))
    return BrillmForCausalLM.from_counts(config, *count(pairs, len(nodes.names))), nodes


@torch.no_grad()
def energies_at(model: BrillmForCausalLM, tokens: Sequence[int], nodes: Sequence[int], *, initial_signal: Tensor | None = None) -> Tensor:
    """Return the energy (T, K) that each of some nodes would have after each of T tokens; only the edges to these nodes are read.

    The first token may be any node. `initial_signal` (D,) is what enters it, by default the configuration's.
    Raises `ValueError` for an empty path and for nodes that do not exist.
    """
    token_T, node_K = _checked(model, "tokens", tokens), _checked(model, "nodes", nodes)
    signal_TD, place_TD = model.signals(token_T[None], initial_signal=initial_signal)
    signal_TD, place_TD = signal_TD[0], place_TD[0]
    graph = model.graph
    step = max(1, AT_ONCE // max(len(node_K) * model.config.signal_size**2, 1))
    found = []
    for first in range(0, len(token_T), step):
        part = slice(first, first + step)
        row_NK = graph.edges.lookup(*torch.broadcast_tensors(token_T[part, None], node_K))
        z_NKD = torch.einsum("nkoi,ni->nko", graph.weight[row_NK], signal_TD[part]) + graph.bias[row_NK] + place_TD[part, None]
        found.append(torch.linalg.vector_norm(torch.nn.functional.gelu(z_NKD), dim=-1))
    return torch.cat(found)


def recall(
    model: BrillmForCausalLM,
    tokens: Sequence[int],
    *,
    among: Sequence[int] | None = None,
    top_k: int = 10,
    initial_signal: Tensor | None = None,
) -> list[tuple[int, float]]:
    """Return the nodes that light up most after part of a path, with their energies, best first and ties by number.

    `among` are the nodes that are asked for, all by default. Raises `ValueError` as `energies_at` does.
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1")
    asked = range(model.config.vocab_size) if among is None else among
    if among is None:
        token_T = _checked(model, "tokens", tokens)
        with torch.no_grad():
            energy_K = model(token_T[None], initial_signal=initial_signal, use_cache=False, logits_to_keep=1).logits[0, -1]
    else:
        energy_K = energies_at(model, tokens, list(among), initial_signal=initial_signal)[-1]
    order = sorted(zip((-energy_K).tolist(), asked, strict=True))
    return [(node, -energy) for energy, node in order[:top_k]]


@torch.no_grad()
def neighbours(model: BrillmForCausalLM, tokenizer: Any, nodes: Sequence[int], *, top_k: int = NEIGHBOURS) -> list[Neighbours]:
    """Return for some nodes where a signal that starts there goes, and which nodes send theirs there; each node once, in their order."""
    edges, vocabulary = model.graph.edges, model.config.vocab_size
    found = []
    for node in dict.fromkeys(_checked(model, "nodes", nodes).tolist()):
        energy_V = model(torch.tensor([[node]], device=model.device), use_cache=False).logits[0, -1]
        target_K = edges.targets(node)
        rest_V = torch.ones_like(energy_V, dtype=torch.bool).index_fill_(0, target_K, False)
        source_K = edges.key_E[edges.key_E % vocabulary == node] // vocabulary
        arriving_K = _arriving(model, source_K, node)
        found.append(
            Neighbours(
                token_text(tokenizer, node),
                _named(tokenizer, target_K, energy_V[target_K], top_k),
                _named(tokenizer, source_K, arriving_K, top_k),
                len(target_K),
                len(source_K),
                float(energy_V[rest_V][0]) if bool(rest_V.any()) else None,
            )
        )
    return found


def _arriving(model: BrillmForCausalLM, source_K: Tensor, node: int) -> Tensor:
    """Return the energy at a node of signals that start at each of some others."""
    size = max(1, AT_ONCE // model.config.signal_size**2)
    found = [torch.zeros(0, device=model.device)]
    for part in source_K.split(size) if len(source_K) else ():
        signal_KD, place_KD = (of[:, 0] for of in model.signals(part[:, None]))
        row_K = model.graph.edges.lookup(part, torch.full_like(part, node))
        z_KD = torch.einsum("koi,ki->ko", model.graph.weight[row_K], signal_KD) + model.graph.bias[row_K] + place_KD
        found.append(torch.linalg.vector_norm(torch.nn.functional.gelu(z_KD), dim=-1))
    return torch.cat(found)


def _named(tokenizer: Any, node_K: Tensor, energy_K: Tensor, many: int) -> tuple[tuple[str, float], ...]:
    """Return the nodes of most energy by name, best first and ties by number."""
    best = energy_K.sort(descending=True, stable=True)
    return tuple(
        (token_text(tokenizer, node), energy) for node, energy in zip(node_K[best.indices[:many]].tolist(), best.values[:many].tolist())
    )


def _checked(model: BrillmForCausalLM, name: str, ids: Sequence[int]) -> Tensor:
    """Return node numbers as a tensor, refusing none and those that do not exist."""
    found = torch.as_tensor(ids, dtype=torch.int64, device=model.device)
    if found.ndim != 1 or not found.numel() or not 0 <= int(found.min()) <= int(found.max()) < model.config.vocab_size:
        rule = f"must be at least one number from 0 to vocab_size - 1 = {model.config.vocab_size - 1}"
        raise ValueError(f"{name}={list(ids)[:8]!r}: {rule}")
    return found
