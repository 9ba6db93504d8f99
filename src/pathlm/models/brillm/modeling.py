"""The BriLLM model: one signal per row walks the graph of tokens along the text; the logits are its energies at all next nodes."""

from __future__ import annotations

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache

from pathlm.models import open_whole, read_config
from pathlm.models.brillm import advance, counted, positions, wirings
from pathlm.models.brillm.configuration import BrillmConfig
from pathlm.models.brillm.curriculum import Knobs
from pathlm.models.brillm.edges import SHARED, Edges, count_rows
from pathlm.models.brillm.energy import Ledger, cross_entropy, draw_rivals, energies, read_edges
from pathlm.models.brillm.graph import Arrivals, Graph
from pathlm.models.brillm.memory import BrillmCache
from pathlm.models.brillm.tracing import Trace, Walk
from pathlm.models.hosted import Hosted, require_tokens
from pathlm.models.losses import IGNORE, next_labels
from pathlm.models.output import PathOutput

# Shapes: B rows, T new tokens, P tokens read before, S = P + T, V nodes, E rows of edges, D width of the signal,
# M running signals, N counted positions

PUBLISHED_SHARES = "English 5.7%, Chinese 13.0%"


class SignalGraph(nn.Module):
    """The parameters of a graph: an edge per row, the one that unseen pairs share first; a bias per node; the wiring's own."""

    key: Tensor
    start: Tensor
    # Each is there where the configuration's contexts need it.
    position_weight: nn.Parameter
    """(P,), pooled"""
    decay: nn.Parameter
    """(decays, D): the sigmoid is what each dimension keeps"""
    node_decay: nn.Parameter
    """(V,): the sigmoid is what is kept on arriving at each node"""
    gate: nn.Parameter
    """(V, D): the sigmoid is the share of what arrives at each node"""
    mix: nn.Parameter
    """(M, D): weights of several running signals"""

    def __init__(self, config: BrillmConfig) -> None:
        super().__init__()
        rows, width = config.edges + 1, config.signal_size
        self.weight = nn.Parameter(torch.empty(rows, width, width))
        """(E, D, D), out × in: the signal on an edge is `weight @ signal + bias`"""
        self.bias = nn.Parameter(torch.empty(rows, width))
        self.node_bias = nn.Parameter(torch.empty(config.vocab_size, width))
        wirings.add_parameters(self, config)
        self.register_buffer("key", torch.empty(config.edges, dtype=torch.int64))
        self.register_buffer("start", torch.empty(config.vocab_size + 1, dtype=torch.int64))
        if not self.key.is_meta:  # where it is, a file or nothing is to follow
            self.set_edges(Edges.even(config.edges, config.vocab_size))

    @property
    def edges(self) -> Edges:
        """Which pairs of nodes have a row of their own."""
        return Edges(self.key, self.start)

    @torch.no_grad()
    def set_edges(self, edges: Edges) -> None:
        """Say which pairs the rows belong to; there are as many as before."""
        self.key.copy_(edges.key_E)
        self.start.copy_(edges.start_V1)


class BrillmForCausalLM(Hosted, PreTrainedModel, GenerationMixin):
    """A causal language model on a graph of tokens: the next token is the node where the signal would arrive with the most energy."""

    config: BrillmConfig
    config_class = BrillmConfig
    _no_split_modules = ["SignalGraph"]  # noqa: RUF012 - transformers' protocol

    def __init__(self, config: BrillmConfig) -> None:
        super().__init__(config)
        self.graph = SignalGraph(config)
        self.row_gradients = False
        """Whether edges get sparse gradients, of touched rows only. `param_groups` asks for them; other optimizers expect dense ones."""
        self.post_init()

    @classmethod
    def from_edges(cls, config: BrillmConfig, edges: Edges) -> BrillmForCausalLM:
        """Return a freshly initialised model of these edges. `config.edges` need not be set; `config` is not changed."""
        nodes = edges.start_V1.numel() - 1
        if nodes != config.vocab_size:
            raise ValueError(f"vocab_size={config.vocab_size}: must be {nodes}, the nodes of the edges")
        config = deepcopy(config)
        config.edges = edges.key_E.numel()
        model = cls(config)
        model.graph.set_edges(edges)
        return model

    @classmethod
    def from_counts(cls, config: BrillmConfig, key: np.ndarray, times: np.ndarray) -> BrillmForCausalLM:
        """Return a freshly initialised model of pairs and how often they came, as `edges.count` returns them.

        A pair that came at least `config.min_count` times has an edge of its own; with `initial_energies="counts"` the model starts as a
        bigram model.
        """
        model = cls.from_edges(config, Edges.from_counts((key, times), config.vocab_size, min_count=config.min_count))
        if config.initial_energies == "counts":
            counted.set_energies(model.graph, key, times, min_count=config.min_count)
        return model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        knobs: Knobs | None = None,
        trace: bool = False,
        skip_logits: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        initial_signal: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> PathOutput:
        """Read T tokens after the P tokens in memory; return energies (B, T, V) as logits, and the loss where there are `labels`.

        With `arithmetic="released"`, a pass that keeps or continues a memory computes what the released decoding does, which is not what
        the released training does, and does not offer the node it stands on; all other passes compute what the training does.

        Args:
            input_ids: Token ids (B, T).
            attention_mask: (B, P + T), 0 where there is padding, on any side.
            past_key_values: Memory of earlier tokens, as returned by an earlier call.
            labels: (B, T), token t at place t; this method shifts. -100 is not counted.
            use_cache: Whether to return a memory; by default the configuration's word, and not while there are labels.
            document_ids: (B, P + T); a new number begins a new text, with a new signal. -1 is padding.
            logits_to_keep: Compute logits for the last so many places, or for these places; 0 is all.
            knobs: The curriculum's values at this step; there are none that change this family's computation yet.
            trace: Whether to return the path of the signal.
            skip_logits: With labels, compute the loss only and return no logits.
            num_items_in_batch: Divide the summed loss by this instead of by the number of labels (the stock Trainer's protocol).
            initial_signal: (D,) or (B, D), what enters the first node of a text; by default the configuration's.
            generator: Draws the rivals where they are sampled; by default torch's own.
            kwargs: Ignored, as transformers passes switches of its own.

        Raises `ValueError` when arguments do not fit together.
        """
        if input_ids is None or kwargs.get("inputs_embeds") is not None or kwargs.get("position_ids") is not None:
            raise _not_ids(input_ids, kwargs)
        require_tokens("input_ids", input_ids)
        released = self.config.arithmetic == "released"
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and labels is None and not self.training and not released)
        memory = _checked(past_key_values) if past_key_values is not None else self.new_memory() if use_cache else None
        decoding = released and memory is not None
        if memory is not None and labels is None and document_ids is None and initial_signal is None and not trace:
            energy_B1V = self._one_more(input_ids, memory, attention_mask, decoding)
            if energy_B1V is not None:
                return PathOutput(logits=energy_B1V, past_key_values=memory if use_cache else None, metrics={})
        target_BT = None if labels is None else next_labels(labels, input_ids.shape, self.config.vocab_size)
        loss, logits_BTV, found = None, None, None
        metrics: dict[str, Tensor] = {}
        with torch.autocast(input_ids.device.type, enabled=False):
            walk, ledger = self._walk(input_ids, memory, attention_mask, document_ids, initial_signal, decoding)
            if target_BT is not None:
                arrivals = self._arrivals(input_ids, walk, target_BT != IGNORE, decoding)
                loss, metrics = self._loss(arrivals, target_BT[target_BT != IGNORE], ledger, num_items_in_batch, generator)
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            if target_BT is None or not skip_logits:
                logits_BTV = self._logits(input_ids, walk, slice(None) if trace else kept, decoding)
            if trace:
                place_BTD = positions.vectors(walk.places.number_BT + int(not decoding), self.config, walk.signal_BTD.dtype)
                found = Trace.of(self.signal_graph, input_ids, walk, place_BTD, logits_BTV)
                logits_BTV = None if logits_BTV is None else logits_BTV[:, kept]
        return PathOutput(loss=loss, logits=logits_BTV, past_key_values=memory if use_cache else None, metrics=metrics, trace=found)

    @property
    def about(self) -> str:
        """What a run says of its model at the start: which part of a full graph's parameters there is, beside the published models'."""
        config = self.config
        kept = (config.edges + 1) / config.vocab_size**2
        least = f"seen at least {config.min_count:,} times" if config.min_count > 1 else "seen"
        return (
            f"{config.edges:,} of {config.vocab_size**2:,} pairs were {least} and have an edge: {kept:.1%} of a full graph's parameters "
            f"(published: {PUBLISHED_SHARES})"
        )

    @property
    def signal_graph(self) -> Graph:
        """What scoring reads."""
        graph = self.graph
        return Graph(graph.edges, graph.weight, graph.bias, self.config.train_shared, self.row_gradients)

    def signals(
        self, input_ids: Tensor, *, attention_mask: Tensor | None = None, initial_signal: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the signal as it leaves each token (B, T, D), and the positional vector that is added on its next edge (B, T, D)."""
        walk, _ = self._walk(require_tokens("input_ids", input_ids), None, attention_mask, None, initial_signal, False)
        return walk.signal_BTD, positions.vectors(walk.places.number_BT + 1, self.config, walk.signal_BTD.dtype)

    def new_memory(self) -> BrillmCache:
        """Return the memory of texts of which nothing has been read."""
        return BrillmCache()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw edges and node biases evenly from ± `initializer_range`; the wiring begins as it says."""
        if isinstance(module, SignalGraph):
            reach = self.config.initializer_range
            for parameter in (module.weight, module.bias, module.node_bias):
                init.uniform_(parameter, -reach, reach)
            wirings.initialise(module, self.config)

    def _walk(
        self,
        token_BT: Tensor,
        memory: BrillmCache | None,
        attention_mask: Tensor | None,
        document_ids: Tensor | None,
        initial_signal: Tensor | None,
        decoding: bool,
    ) -> tuple[Walk, Ledger]:
        """Carry the signal along the edges that the text takes."""
        past = memory.get_seq_length() if memory is not None else 0
        document_BT = _documents(token_BT, past, attention_mask, document_ids)
        last = memory.memory.last() if memory is not None else None
        places = positions.locate(token_BT, document_BT, None if last is None else last[1:])
        # Edge i leads from position i to i + 1 and adds the vector of i + 1; released decoding adds that of i.
        along_BT = places.present_BT & ~places.starts_BT
        row_BT = torch.where(along_BT, self.graph.edges.lookup(places.before_BT, token_BT), SHARED)
        weight_BTDD, bias_BTD, ledger = read_edges(self.signal_graph, row_BT)
        dtype = self.graph.weight.dtype
        added_BTD = bias_BTD + positions.vectors((places.number_BT - int(decoding)).clamp(min=0), self.config, dtype)
        share_BTMD = wirings.shares(self.graph, token_BT, places, self.config)
        first_BTD = self._first_signals(token_BT, initial_signal)
        many, width = self.config.signals, self.config.signal_size
        state_BMD = first_BTD.new_zeros(len(token_BT), many, width) if last is None else last[0].unflatten(1, (many, width))
        before_BMD, signal_BD = state_BMD, wirings.mixed(state_BMD, self.graph)
        states, signals, entered = [], [], []
        # One column at a time, and only columns that anything happens in: a text's own path is all that is sequential.
        starts, goes = places.starts_BT.any(0).tolist(), along_BT.any(0).tolist()
        parts = zip(weight_BTDD.unbind(1), added_BTD.unbind(1), share_BTMD.unbind(1), first_BTD.unbind(1), strict=True)
        for t, (weight_BDD, added_BD, share_BMD, first_BD) in enumerate(parts):
            h_BD = first_BD
            if goes[t]:
                h_BD = F.gelu(torch.baddbmm(added_BD[..., None], weight_BDD, signal_BD[..., None])[..., 0])
                h_BD = wirings.entering(h_BD, self.config)
                state_BMD = torch.lerp(state_BMD, h_BD[:, None], share_BMD)
            if starts[t]:
                state_BMD = torch.where(places.starts_BT[:, t, None, None], first_BD[:, None], state_BMD)
            signal_BD = wirings.mixed(state_BMD, self.graph)
            signals.append(signal_BD)
            states.append(state_BMD)
            entered.append(h_BD)
        signal_BTD = torch.stack(signals, dim=1)
        if memory is not None:
            newest_BT = torch.where(places.present_BT, token_BT, places.before_BT)
            state_BTS = signal_BTD if many == 1 else torch.stack(states, dim=1).flatten(2)
            memory.memory.write(state_BTS.detach(), newest_BT, places.number_BT, places.document_BT)
        return Walk(places, row_BT, signal_BTD, entered, first_BTD, share_BTMD, before_BMD, wirings.weights_of(self.graph)), ledger

    def _first_signals(self, token_BT: Tensor, initial_signal: Tensor | None) -> Tensor:
        """Return the signal (B, T, D) that would leave each token if a text began with it."""
        width, bias = self.config.signal_size, self.graph.node_bias
        if initial_signal is None:
            level = 1 / width if self.config.initial_signal is None else self.config.initial_signal
            initial_signal = bias.new_full((width,), level)
        elif tuple(initial_signal.shape) not in ((width,), (token_BT.shape[0], width)):
            raise ValueError(f"initial_signal has shape {tuple(initial_signal.shape)}: must be ({width},), or one such row per text")
        place_D = positions.vectors(token_BT.new_zeros(1), self.config, bias.dtype)[0]
        base = (initial_signal.to(bias) + place_D).expand(token_BT.shape[0], width)[:, None]
        return wirings.entering(F.gelu(base + F.embedding(token_BT, bias)), self.config)

    def _one_more(self, token_BT: Tensor, memory: BrillmCache, attention_mask: Tensor | None, decoding: bool) -> Tensor | None:
        """Return the energies (B, 1, V) after one more token per row the short way, or None where there is none for this."""
        if not (advance.knows(self.config) and advance.possible(memory.memory, self.signal_graph, token_BT, attention_mask)):
            return None
        weight_P = getattr(self.graph, "position_weight", self.graph.bias[:0, 0])
        return advance.advance(memory.memory, self.signal_graph, self.config, token_BT, weight_P, released=decoding)

    def _arrivals(self, token_BT: Tensor, walk: Walk, kept_BT: Tensor, decoding: bool) -> Arrivals:
        """Return the signals that are to be scored: those of the kept places."""
        number_N = walk.places.number_BT[kept_BT] + int(not decoding)
        return Arrivals(walk.signal_BTD[kept_BT], token_BT[kept_BT], positions.vectors(number_N, self.config, walk.signal_BTD.dtype))

    def _logits(self, token_BT: Tensor, walk: Walk, kept: slice | Tensor, decoding: bool) -> Tensor:
        """Return the energies (B, K, V) at the kept places of every row, in their order."""
        kept_BT = torch.zeros_like(walk.places.present_BT)
        kept_BT[:, kept] = True
        arrivals = self._arrivals(token_BT, walk, kept_BT, decoding)
        logits_NV = energies(self.signal_graph, arrivals)
        if decoding:
            logits_NV = logits_NV.scatter(1, arrivals.source_N[:, None], -torch.inf)
        logits_BKV = logits_NV.unflatten(0, (token_BT.shape[0], -1))
        if isinstance(kept, slice):
            return logits_BKV
        return logits_BKV[:, torch.unique(kept % token_BT.shape[1], return_inverse=True)[1]]

    def _loss(
        self, arrivals: Arrivals, target_N: Tensor, ledger: Ledger, count: Tensor | int | None, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if count is None:
            count = max(target_N.numel(), 1)  # without a counted label the loss is 0, not 0 ÷ 0
        rivals = self.config.rivals if self.training else None
        if self.training and self.config.signal_dropout:
            arrivals = arrivals._replace(signal_ND=F.dropout(arrivals.signal_ND, self.config.signal_dropout))
        compared_NV = None if rivals is None else draw_rivals(target_N, self.config.vocab_size, rivals, generator)
        total, _, sure_N = cross_entropy(self.signal_graph, arrivals, target_N, ledger, rivals_NV=compared_NV)
        loss = total / count
        own_N = self.graph.edges.lookup(arrivals.source_N, target_N) != SHARED
        counted = max(target_N.numel(), 1)
        metrics = {
            "loss/lm": loss.detach(),
            "energy/target_probability": sure_N.sum() / counted,
            "energy/own_edges": own_N.sum().to(loss.dtype) / counted,
        }
        return loss, metrics


def from_rows(config: BrillmConfig, rows: Any) -> BrillmForCausalLM:
    """Return a fresh model for what `rows` hold: each pair of neighbours that comes at least `min_count` times gets an edge of its own."""
    wanted, trained = config.trained_positions, max(rows.length - 2, 0)
    if "pooled" in config.contexts and wanted > trained:
        rule = f"rows of {rows.length} tokens train {trained} position weights; data.length={wanted + 2} trains all"
        warnings.warn(f"trained_positions={wanted}: {rule}, and with untrained ones longer texts are read badly", stacklevel=2)
    key, times = count_rows(rows, config.vocab_size)
    if not (times >= config.min_count).any():
        most = int(times.max()) if len(times) else 0
        raise ValueError(f"min_count={config.min_count}: no pair came so often (at most {most} times), so the graph would have no edges")
    return BrillmForCausalLM.from_counts(config, key, times)


def start_from(folder: Path | str, config: BrillmConfig) -> BrillmForCausalLM:
    """Open the model in `folder` as the beginning of a run. Raises `ValueError` when it is not of the architecture of `config`."""
    found = read_config(folder)
    if found.model_type != "brillm":
        raise ValueError(f"init={str(folder)!r}: holds a {found.model_type} model; BriLLM starts from a BriLLM")
    check_start(found, config, origin=f"init={str(folder)!r}")
    merged = deepcopy(config)
    merged.edges = found.edges
    model: BrillmForCausalLM = open_whole(folder, config=merged)
    return model


def check_start(found: Any, config: BrillmConfig, *, origin: str) -> None:
    """Raise `ValueError` naming the first field in which a graph of this configuration cannot begin with the weights of `found`.

    `found` is a model's configuration, `origin` how a message calls it.
    """
    wiring = ("context", "timescales", "normalise", "keep_initial", "initial_signal", "position_scale", "beyond")
    for name in ("vocab_size", "signal_size", *wiring, "arithmetic", "positions", "trained_positions"):
        mine, theirs = getattr(config, name), getattr(found, name)
        if mine != theirs:
            raise ValueError(f"{origin}: its {name} is {theirs!r}, the run's is {mine!r}")


def _not_ids(input_ids: Tensor | None, given: dict[str, Any]) -> ValueError:
    name = next((name for name in ("inputs_embeds", "position_ids") if given.get(name) is not None), "input_ids=None")
    return ValueError(f"{name}: a signal walks from token to token and counts them itself; give input_ids")


def _checked(memory: Cache) -> BrillmCache:
    if not isinstance(memory, BrillmCache):
        raise ValueError(f"past_key_values is a {type(memory).__name__}: must be a BrillmCache, such as the one this model returns")
    return memory


def _documents(token_BT: Tensor, past: int, attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor:
    """Return each new token's document number (B, T), -1 for padding."""
    expected = (token_BT.shape[0], past + token_BT.shape[1])
    for name, given in (("attention_mask", attention_mask), ("document_ids", document_ids)):
        if given is not None and tuple(given.shape) != expected:
            rule = f"must be {expected}, the {past} remembered tokens before the new ones"
            raise ValueError(f"{name} has shape {tuple(given.shape)}: {rule}")
    document_BT = torch.zeros_like(token_BT) if document_ids is None else document_ids[:, past:].clamp(min=-1)
    return document_BT if attention_mask is None else torch.where(attention_mask[:, past:].bool(), document_BT, -1)
