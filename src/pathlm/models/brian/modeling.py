"""The BRIAN model: blocks, a pool that tokens find their own way through, blocks. With an empty pool its logits are Llama's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, StaticCache

from pathlm.models.brian.codes import CodeReader, Codes
from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.brian.curriculum import Knobs
from pathlm.models.brian.memory import BrianCache
from pathlm.models.brian.pool import Records
from pathlm.models.brian.reads import Reads
from pathlm.models.brian.routing import RoutePool, Router
from pathlm.models.brian.sight import Sight
from pathlm.models.brian.table import code_mask
from pathlm.models.brian.tracing import Trace
from pathlm.models.brian.travel import Journey, travel
from pathlm.models.hosted import Hosted, require_tokens
from pathlm.models.layers import Block, PoolBlock, ResidualLinear, RMSNorm, Rotary, matrix_of
from pathlm.models.losses import IGNORE, linear_cross_entropies, linear_cross_entropy, next_labels
from pathlm.models.output import PathOutput

# Shapes: B rows, T new tokens, P tokens in memory, S = P + T, D width, V vocabulary


class BrianForCausalLM(Hosted, PreTrainedModel, GenerationMixin):
    """A causal language model whose tokens move through blocks: first and last in order, in between as their router says."""

    config: BrianConfig
    config_class = BrianConfig
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012 - transformers' protocol
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: BrianConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(_block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = Rotary(config)
        self.gradient_checkpointing = False
        # Last, and without drawing from the generator: a seed gives the blocks the same weights with a pool and without one.
        with torch.random.fork_rng(devices=[]):
            self.pool = RoutePool(config) if config.pool_blocks else None
            self.codes = Codes(config) if config.remembers_codes else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        knobs: Knobs | None = None,
        trace: bool = False,
        skip_logits: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        budget: float | None = None,
        depths: Tensor | None = None,
        route_beams: int | None = None,
        **kwargs: Any,
    ) -> PathOutput:
        """Read T tokens after the P tokens in memory; return logits (B, T, V), and the loss where there are `labels`.

        Args:
            input_ids: Token ids (B, T).
            attention_mask: (B, P + T), 0 where there is padding, on any side.
            position_ids: (B, T) or (1, T); by default tokens are counted from 0 within their document, without padding.
            past_key_values: Memory of earlier tokens, as returned by an earlier call.
            inputs_embeds: (B, T, D) instead of `input_ids`.
            labels: (B, T), token t at place t; this method shifts. -100 is not counted.
            use_cache: Whether to return a memory; by default the configuration's word, and not while there are labels.
            document_ids: (B, P + T); tokens see their own document only. -1 is padding.
            logits_to_keep: Compute logits for the last so many places, or for these places; 0 is all.
            knobs: The curriculum's values at this step; by default the router is in charge. A plain decoder has none.
            trace: Whether to return the paths of the tokens.
            skip_logits: With labels, compute the loss in pieces and return no logits.
            num_items_in_batch: Divide the summed loss by this instead of by the number of labels (the stock Trainer's protocol).
            budget: Route steps tokens may take on average, as a share of `max_route_steps`; by default what was trained last.
            depths: (B, T), the number of route steps of every token, instead of the router's choice to leave. Blocks stay its choice.
            route_beams: Most branches of a token in the pool at once, instead of the configuration's number.
            kwargs: Ignored, as transformers passes switches of its own.

        Raises:
            ValueError: When arguments do not fit together.
        """
        h_BTD = self._embed(input_ids, inputs_embeds)
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not self.training
        if use_cache and past_key_values is None:
            past_key_values = self.new_memory()
        past = _length(past_key_values)
        if past_key_values is not None and self.training:
            self._check_training_memory(past, knobs if labels is not None else None)
        if budget is not None:
            self.check_budget(budget)
        self._check_depths(depths, h_BTD, knobs)
        self._check_beams(route_beams, knobs, depths)
        target_BT = None if labels is None else next_labels(labels, h_BTD.shape[:2])
        segment_BS = _segments(h_BTD, past, attention_mask, document_ids)
        # Records are made here: a compiler follows no factory of a dataclass's field.
        journey = Journey(knobs, budget, input_ids, target_BT, segment_BS, trace, depths, route_beams, Records())
        if target_BT is None and not trace and isinstance(logits_to_keep, int) and not self.training and depths is None:
            journey.keep = logits_to_keep
        elif target_BT is not None and not self.training and self.codes is not None:
            journey.reads = Reads(self.config)
        self._look_around(h_BTD, journey, position_ids, past_key_values, past)
        h_BTD = self.norm(self._run_blocks(h_BTD, journey, past_key_values))

        loss: Tensor | None = None
        metrics: dict[str, Tensor] = {}
        if target_BT is not None:
            loss, metrics = self._loss(h_BTD, target_BT, num_items_in_batch, journey)
        logits_BTV = None
        if not (skip_logits and labels is not None):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits_BTV = self.lm_head(h_BTD[:, kept])
        return PathOutput(
            loss=loss,
            logits=logits_BTV,
            past_key_values=past_key_values,
            metrics=metrics,
            trace=self._trace(journey, h_BTD) if trace else None,
        )

    @property
    def pool_blocks(self) -> list[PoolBlock]:
        """The blocks that the router chooses from."""
        return [block for block in self.blocks if isinstance(block, PoolBlock)]

    def check_budget(self, budget: float) -> None:
        """Raise `ValueError` for a budget that no forward pass would take: outside what was trained, or where there is no pool."""
        if self.pool is None:
            raise ValueError(f"budget={budget}: a plain decoder has no pool to leave early")
        self.pool.check_budget(budget)

    def check_branches(self, branches: int) -> None:
        """Raise `ValueError` for a number of ways at once that the model's tokens cannot take."""
        self._check_beams(branches, None, None)

    def set_branches(self, branches: int) -> None:
        """Let tokens take up to this many ways at once from now on. Raises `ValueError` for a number that the model cannot have."""
        self.check_branches(branches)
        self.config.route_beams = branches

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Choose whether training recomputes each block in the backward pass instead of keeping its activations."""
        self.gradient_checkpointing = enabled

    def new_memory(self) -> BrianCache:
        """Return the memory of texts of which nothing has been read."""
        return BrianCache(self.config, local_window=self.config.local_window if self.codes is None else self.codes.reach[0])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw matrices from normal(0, initializer_range); those that write to the residual stream are divided by √(2 × blocks)."""
        std = self.config.initializer_range
        if isinstance(module, ResidualLinear):
            std /= (2 * self.config.num_hidden_layers) ** 0.5
        if isinstance(module, RoutePool):
            module.reset()  # the router's and adapters' weights, too
        elif isinstance(module, Router):
            pass
        elif isinstance(module, Codes):
            module.reset()
        elif isinstance(module, Rotary):
            module.refresh()
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Embedding | nn.Linear):
            init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is not None:
            return require_tokens("inputs_embeds", inputs_embeds, "B, T, D")
        assert input_ids is not None
        return self.embed_tokens(require_tokens("input_ids", input_ids))

    def _check_depths(self, depths: Tensor | None, h_BTD: Tensor, knobs: Knobs | None) -> None:
        if depths is None:
            return
        if self.pool is None:
            raise ValueError("depths: a plain decoder has no pool to leave early")
        shape = tuple(h_BTD.shape[:2])
        if depths.shape != shape or depths.is_floating_point():
            raise ValueError(f"depths are {depths.dtype} {tuple(depths.shape)}: must be whole numbers {shape}, one per token")
        if knobs is not None and knobs.router_share < 1:
            raise ValueError(f"depths: with router_share={knobs.router_share} some tokens follow a teacher, whose routes say when to leave")
        low, high = self.pool.steps_possible
        shallow, deep = int(depths.min()), int(depths.max())
        if shallow < low or deep > high:
            raise ValueError(f"depths go from {shallow} to {deep}: must lie in {low} … {high}, the route steps that are possible")

    def _check_beams(self, beams: int | None, knobs: Knobs | None, depths: Tensor | None) -> None:
        if beams is None:
            beams = knobs.route_beams if knobs is not None and knobs.route_beams is not None else self.config.route_beams
        self.config.check_branches(beams)
        if beams > 1 and depths is not None:
            raise ValueError(f"depths: with route_beams={beams} a token's branches leave when they choose to")
        if beams > 1 and knobs is not None:
            knobs.check_branches("route_beams", beams)

    def _check_training_memory(self, past: int, knobs: Knobs | None) -> None:
        if self.gradient_checkpointing:
            raise ValueError("past_key_values: recomputing a block would write its memory twice; train without a memory (use_cache=False)")
        if not past or knobs is None or self.pool is None:
            return
        for name, share in (("whole", knobs.whole), ("probe_share", knobs.probe_share)):
            if share:
                rule = "reads the text again, from its first token; train on whole texts, without a memory of earlier tokens"
                raise ValueError(f"past_key_values: {name}={share:g} {rule}")

    def _look_around(self, h_BTD: Tensor, journey: Journey, position_ids: Tensor | None, memory: Cache | None, past: int) -> None:
        """Note what the tokens may look at and where they stand, and drop what the memory need not keep for them."""
        if isinstance(memory, BrianCache):
            memory.forget(journey.segment_BS)
        journey.sight = Sight.of(h_BTD.shape[1], past, journey.segment_BS, h_BTD.device)
        journey.rotary = self.rotary(journey.sight.positions() if position_ids is None else position_ids, h_BTD.dtype)

    def _run_blocks(self, h_BTD: Tensor, journey: Journey, memory: Cache | None, *, start: int = 0) -> Tensor:
        """Run the blocks from number `start` on."""
        config, (sight, rotary) = self.config, journey.seen
        recompute = self.gradient_checkpointing and self.training
        pool, first = config.pool_blocks, config.pre_blocks  # read once: a configuration answers slowly
        layer, near = start, sight.within(config.attention_window, config.attention_sinks, _slots(memory, config, sight.tokens))
        for index, block in enumerate(self.blocks):
            if index < start:
                continue
            if isinstance(block, PoolBlock):
                if index == first:
                    journey.entered = h_BTD
                    h_BTD = travel(self, h_BTD, journey, rotary, memory, recompute=recompute)
                    sight, rotary = journey.seen
                    layer += config.remembers_rows + config.remembers_codes
                continue
            if pool and index >= first:
                journey.after_pool.append(h_BTD.detach())
            if isinstance(block, CodeReader):
                assert self.codes is not None and journey.code_rows is not None
                mask = code_mask(self.codes, journey.code_rows, sight)
                inputs = (self.codes, h_BTD, rotary, journey.code_rows.rows_B1SW, mask)
                h_BTD = checkpoint(block.read, *inputs, use_reentrant=False) if recompute else block.read(*inputs)
                continue
            if recompute:
                h_BTD = checkpoint(block, h_BTD, rotary, near, None, layer, use_reentrant=False)
            else:
                h_BTD = block(h_BTD, rotary, near, memory, layer)
            layer += 1
        return h_BTD

    def _loss(self, h_BTD: Tensor, target_BT: Tensor, count: Tensor | int | None, journey: Journey) -> tuple[Tensor, dict[str, Tensor]]:
        if count is None:
            count = (target_BT != IGNORE).sum().clamp(min=1)  # without a counted label the loss is 0, not 0 ÷ 0
        total, loss_N = linear_cross_entropies(h_BTD.flatten(0, 1), matrix_of(self.lm_head), journey.judged_now(target_BT.flatten()))
        loss = total / count
        metrics = {"loss/lm": loss.detach()}
        if self.pool is None:
            return loss, metrics
        extra, found = journey.lessons(self, loss_N, count)
        if self.training and (whole := (journey.knobs or Knobs()).whole):
            other = linear_cross_entropy(self._stay(journey).flatten(0, 1), matrix_of(self.lm_head), target_BT.flatten()) / count
            loss = loss.lerp(other, whole)
            metrics["loss/whole"] = other.detach()
        return loss + extra.to(loss.dtype), metrics | found

    def _stay(self, journey: Journey) -> Tensor:
        """Return what the head would have read (B, T, D) if the router had let nobody leave the pool early."""
        assert journey.entered is not None
        return self.norm(self._run_blocks(journey.entered, journey.without_leaving(), None, start=self.config.pre_blocks))

    def _trace(self, journey: Journey, h_BTD: Tensor) -> Trace:
        input_ids = journey.input_ids
        if input_ids is None:
            raise ValueError("trace=True needs input_ids, since a path names its token")
        segment_BS = journey.segment_BS
        present = torch.ones_like(input_ids, dtype=torch.bool) if segment_BS is None else segment_BS[:, -input_ids.shape[1] :] >= 0
        if self.pool is None:
            return Trace.fixed(input_ids, present, self.config.num_hidden_layers)
        return Trace.routed(input_ids, present, self.config, journey.records, journey.threshold, self.pool.gain_scale)


def _block(config: BrianConfig, index: int) -> Block:
    """Return the block at a place: before the pool, in it, or after it."""
    place = index - config.pre_blocks
    if 0 <= place < config.pool_blocks:
        return PoolBlock(config, remembers=config.remembers_rows)
    return CodeReader(config, place) if place >= 0 and config.post_memory == "canonical" else Block(config)


def _slots(memory: Cache | None, config: BrianConfig, tokens: int) -> Tensor | None:
    """Return which tokens the blocks outside the pool will remember after `tokens` more; None where nothing is ever forgotten."""
    if not config.attention_window or not isinstance(memory, BrianCache):
        return None
    return memory.layers[0 if config.pre_blocks else -1].slots(tokens)  # type: ignore[union-attr]


def from_rows(config: BrianConfig, rows: Any) -> BrianForCausalLM:
    """Return a freshly initialised model for a run; what its rows hold makes no difference."""
    return BrianForCausalLM(config)


def _length(memory: Cache | None) -> int:
    """Return how many tokens are remembered, refusing memories whose tensors are longer than that."""
    if memory is None:
        return 0
    if not isinstance(memory, Cache) or isinstance(memory, StaticCache):
        raise ValueError(f"past_key_values is a {type(memory).__name__}: must be a growing cache, such as the one this model returns")
    return memory.get_seq_length()


def _segments(h_BTD: Tensor, past: int, attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
    """Return each token's document number (B, S), -1 for padding; None where all tokens of a row belong together."""
    expected = (h_BTD.shape[0], past + h_BTD.shape[1])
    for name, given in (("attention_mask", attention_mask), ("document_ids", document_ids)):
        if given is not None and tuple(given.shape) != expected:
            rule = f"must be {expected}, the {past} remembered tokens before the new ones"
            raise ValueError(f"{name} has shape {tuple(given.shape)}: {rule}")
    if attention_mask is not None and _known(attention_mask.all()):
        attention_mask = None
    if document_ids is not None:
        segment_BS = document_ids.clamp(min=-1)
        if attention_mask is not None:
            segment_BS = torch.where(attention_mask.bool(), segment_BS, -1)
        return None if _known((segment_BS == segment_BS[:, :1]).all() & (segment_BS[:, 0] >= 0).all()) else segment_BS
    return None if attention_mask is None else attention_mask.long().clamp(max=1) - 1


def _known(condition: Tensor) -> bool:
    """Whether `condition` holds, as far as that can be told without waiting for a device or leaving a compiled graph."""
    return not torch.compiler.is_compiling() and condition.device.type == "cpu" and bool(condition)
