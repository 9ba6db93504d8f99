"""Configurations, presets, folders and the traps of building models: what a user meets before the first forward pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import pathlm
from pathlm.config import OptimConfig
from pathlm.models import family
from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.brian.curriculum import curriculum
from pathlm.models.brian.memory import SMALLEST, BrianCache
from pathlm.models.brian.modeling import BrianForCausalLM
from pathlm.models.brian.tracing import paths
from pathlm.models.layers import causal_mask, rotary_frequencies

TINY: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.3}


def tiny(**options: Any) -> BrianForCausalLM:
    torch.manual_seed(0)
    return BrianForCausalLM(BrianConfig(**TINY | {"pre_blocks": 1, "post_blocks": 1} | options)).eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_blocks": 2}, "max_route_steps=0: pool_blocks=2 needs at least 1"),
        ({"max_route_steps": 4}, "max_route_steps=4: there are no pool blocks to visit"),
        ({"pool_blocks": 2, "max_route_steps": 3, "min_route_steps": 4}, "min_route_steps=4: must lie in 1 … max_route_steps=3"),
        ({"pool_blocks": 1, "max_route_steps": 3, "route_top_k": 2}, "route_top_k=2: must be 1, or 2 where pool_blocks=1 is at least 2"),
        ({"pool_blocks": 2, "max_route_steps": 3, "route_top_k": 3}, "route_top_k=3: must be 1, or 2"),
        ({"pool_blocks": 1, "max_route_steps": 3, "max_repeats": 2}, "max_repeats=2: needs more than route_top_k=1 pool blocks"),
        ({"pool_blocks": 2, "max_route_steps": 2, "route_moves": "back"}, "route_moves='back': must be one of any, recur, skip"),
        ({"route_moves": "skip"}, "route_moves='skip': there are no pool blocks to move between"),
        ({"pool_blocks": 2, "max_route_steps": 2, "route_moves": "recur", "route_top_k": 2}, "route_moves='recur': needs route_top_k=1"),
        ({"pool_blocks": 2, "max_route_steps": 2, "route_moves": "recur", "max_repeats": 1}, "in the last block no move would be left"),
        ({"pool_blocks": 2, "max_route_steps": 2, "route_moves": "skip", "max_repeats": 1}, "no block is visited twice"),
        ({"pool_blocks": 2, "max_route_steps": 3, "route_moves": "skip"}, "max_route_steps=3: with route_moves=.* at most pool_blocks=2"),
        ({"pool_blocks": 2, "max_route_steps": 3, "memory": "global"}, "memory='global': must be one of local"),
        ({"pool_blocks": 2, "max_route_steps": 3, "block_position": "spiral"}, "block_position='spiral': must be one of arc"),
        ({"pool_blocks": 2, "max_route_steps": 3, "block_position_dim": 3}, "block_position_dim=3: must be even"),
        ({"pre_blocks": 0, "post_blocks": 0}, "pre_blocks=0: the model needs at least one block"),
        ({"post_blocks": -1}, "post_blocks=-1: must not be negative"),
        ({"hidden_size": 100, "num_attention_heads": 12}, "hidden_size=100: must be a multiple of num_attention_heads=12"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: must be at least 1"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5: must divide num_attention_heads=4"),
        ({"head_dim": 7}, "head_dim=7: must be even"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': blocks are SwiGLU"),
        ({"initializer_range": 0.0}, "initializer_range=0.0: must lie between 0 and 1"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0: must be positive"),
        ({"pad_token_id": 4_096}, "pad_token_id=4096: must lie in 0"),
        ({"eos_token_id": 4_096}, "eos_token_id=4096: must lie in 0 … vocab_size - 1 = 4095"),
        ({"eos_token_id": [1, -1]}, r"eos_token_id=\[1, -1\]: must lie in 0 … vocab_size - 1 = 4095"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "cached decoding could not equal"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_parameters=.*: rope_theta must be a positive number"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}}, "rope_parameters=.*: factor must be a positive"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"n_pool": 2}, "BrianConfig has no option n_pool; it has attention_bias"),
    ],
)
def test_a_preset_refuses_what_cannot_be_built_and_names_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pathlm.preset("plain-tiny", **options)


def test_a_preset_that_does_not_exist_is_refused_with_the_ones_that_do() -> None:
    with pytest.raises(ValueError, match="preset='plain-huge': there are plain-tiny, plain-125m"):
        pathlm.preset("plain-huge")


def test_the_configuration_checks_types_when_built_directly() -> None:
    with pytest.raises(StrictDataclassError):
        BrianConfig(hidden_size=32.5)
    with pytest.raises(StrictDataclassError):
        BrianConfig(pool_blocks=1)  # nobody may visit it: max_route_steps is 0


def test_presets_have_the_promised_shapes_and_exact_costs() -> None:
    table = pathlm.presets()
    shapes = {name: (s.blocks, s.hidden_size, s.vocab_size, s.context) for name, s in table.items()}
    assert shapes == {
        "plain-tiny": (6, 128, 4_096, 512),
        "plain-125m": (12, 768, 32_000, 2_048),
        "plain-350m": (24, 960, 32_000, 2_048),
        "plain-1b": (32, 1_536, 32_000, 2_048),
        "brian-tiny": (6, 128, 4_096, 512),
        "brian-r125": (12, 768, 32_000, 2_048),
        "brian-r350": (24, 960, 32_000, 2_048),
        "brian-r1b": (32, 1_536, 32_000, 2_048),
        "brillm-tiny": (1, 16, 1_024, None),
        "brillm-en": (1, 32, 4_000, None),
        "brillm-zh": (1, 32, 4_001, None),
    }
    counts = {name: s.parameters for name, s in table.items()}
    assert counts == {
        "plain-tiny": 1_730_176,
        "plain-125m": 134_105_856,
        "plain-350m": 326_907_840,
        "plain-1b": 1_004_373_504,
        "brian-tiny": 1_741_136,
        "brian-r125": 134_555_712,
        "brian-r350": 329_015_296,
        "brian-r1b": 1_009_330_304,
        "brillm-tiny": 60_001 * 17 * 16 + 1_024 * 16 + 30,
        "brillm-en": 906_998 * 33 * 32 + 4_000 * 32 + 32,
        "brillm-zh": 2_072_001 * 33 * 32 + 4_001 * 32 + 32,
    }
    for routed, plain in (("tiny", "tiny"), ("r125", "125m"), ("r350", "350m"), ("r1b", "1b")):
        mine, its = table[f"brian-{routed}"], table[f"plain-{plain}"]
        assert (mine.blocks, its.max_route_steps) == (its.blocks, 0)
        assert 0 < mine.max_route_steps <= mine.blocks
        assert mine.cache_bytes_per_token == its.cache_bytes_per_token, "as many visits as the plain decoder has blocks"
        assert 1 < mine.flops_per_token / its.flops_per_token < 1.01, "the router is cheap"
    assert table["brillm-en"].cache_bytes_per_token == 0, "a text is one signal, however long"
    assert table["brillm-en"].flops_per_token == 2 * 32**2 * (2 + 906_997 / 4_000)
    assert table["plain-125m"].cache_bytes_per_token == 2 * 12 * 768 * 2
    assert table["plain-tiny"].flops_per_token == 2 * (6 * (4 * 128**2 + 3 * 128 * 352 + 2 * 128 * 513 / 2) + 128 * 4_096)
    model = pathlm.build(pathlm.preset("plain-tiny"))
    assert sum(p.numel() for p in model.parameters()) == table["plain-tiny"].parameters
    assert model.flops_per_token(512) == table["plain-tiny"].flops_per_token
    assert model.floating_point_ops({"input_ids": torch.zeros(2, 512)}) == int(3 * 2 * 512 * model.flops_per_token(512))


def test_the_memory_takes_the_bytes_the_preset_says_and_grows_by_half() -> None:
    model = pathlm.build(pathlm.preset("plain-tiny")).bfloat16()
    cache = model(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    assert cache.bytes() == 5 * pathlm.presets()["plain-tiny"].cache_bytes_per_token
    layer = cache.layers[0]
    capacities = []
    for _ in range(300):
        layer.update(torch.zeros(1, 4, 1, 32), torch.zeros(1, 4, 1, 32))
        capacities.append(layer.capacity)
    assert layer.get_seq_length() == 305 and capacities[0] == SMALLEST
    assert len(set(capacities)) <= 6, "buffers must not be copied for every token"


def test_initial_weights_shrink_where_they_write_to_the_residual_stream() -> None:
    torch.manual_seed(0)
    model = pathlm.build(pathlm.preset("plain-tiny"))
    block = model.blocks[0]
    for weight, std in ((block.qkv_proj.weight, 0.02), (model.embed_tokens.weight, 0.02), (block.down_proj.weight, 0.02 / 12**0.5)):
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert (block.mlp_norm.weight == 1).all()


def test_a_folder_opens_with_auto_classes_and_with_load(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BrianConfig)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(5)[None]
    assert isinstance(opened, BrianForCausalLM) and torch.equal(opened(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        pathlm.load(tmp_path / "missing")


def test_rotary_angles_survive_half_precision_and_the_meta_device() -> None:
    frequency = rotary_frequencies(tiny().config)[0]
    assert torch.equal(tiny().bfloat16().rotary.frequency, frequency)
    with torch.device("meta"):
        empty = BrianForCausalLM(tiny().config)
    assert torch.equal(empty.to_empty(device="cpu").rotary.frequency, frequency)


def test_resizing_and_tying_follow_transformers() -> None:
    model = tiny(tie_word_embeddings=True)
    assert model.lm_head.weight is model.embed_tokens.weight
    model.resize_token_embeddings(70)
    assert model(torch.tensor([[65]])).logits.shape == (1, 1, 70) and model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        (
            {"input_ids": torch.zeros(1, 0, dtype=torch.long)},
            r"input_ids has shape \(1, 0\): must be \(B, T\), at least one row of at least one",
        ),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, r"input_ids has shape \(0, 3\)"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"input_ids has shape \(3,\)"),
        ({"inputs_embeds": torch.zeros(1, 0, 32)}, r"inputs_embeds has shape \(1, 0, 32\): must be \(B, T, D\)"),
        ({"inputs_embeds": torch.zeros(3, 32)}, r"inputs_embeds has shape \(3, 32\)"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 4)}, r"attention_mask has shape \(1, 4\)"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long), "document_ids": torch.ones(2, 3)}, r"document_ids has shape \(2, 3\)"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long), "labels": torch.zeros(1, 2)}, r"labels has shape \(1, 2\)"),
        ({"inputs_embeds": torch.zeros(1, 3, 32), "trace": True}, "trace=True needs input_ids"),
    ],
)
def test_a_forward_pass_refuses_arguments_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(**options)


def test_caches_of_transformers_work_where_they_grow_and_are_refused_where_not() -> None:
    model, ids = tiny().double(), torch.arange(9)[None]
    cache = DynamicCache(config=model.config)
    logits = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(4, dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="StaticCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))
    with pytest.raises(ValueError, match="offloading"):
        BrianCache(model.config).layers[0].offload()
    with pytest.raises(ValueError, match="negative"):
        BrianCache(model.config).crop(3)


def test_logits_are_kept_where_asked_and_embeddings_may_come_from_outside() -> None:
    model, ids = tiny(), torch.arange(6)[None]
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])
    torch.testing.assert_close(model(inputs_embeds=model.embed_tokens(ids)).logits, whole)
    lean = model(ids, labels=ids, skip_logits=True)
    assert lean.logits is None and lean.past_key_values is None


def test_positions_count_within_documents_and_not_over_padding() -> None:
    rows = torch.tensor([[-1, -1, 0, 0, 0, 0], [0, 0, -1, -1, 0, 0], [5, 5, 2, 2, -1, 2], [-1, 3, 3, 9, 9, -1], [0, 1, 0, 1, 1, 0]])
    # The model reads positions off its mask: how many earlier tokens a token sees.
    positions = causal_mask(rows.shape[1], rows)[:, 0].sum(-1) - 1
    assert positions[rows >= 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1, 0, 1, 0, 0, 1, 1, 2, 2]
    # Left-padded with explicit positions equals counted ones.
    model, ids = tiny(), torch.arange(6).expand(5, 6)
    counted = model(ids, document_ids=rows).logits
    torch.testing.assert_close(counted, model(ids, document_ids=rows, position_ids=positions).logits)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}, {"prefill_chunk_size": 2}], ids=str)
def test_assisted_and_chunked_generation_equal_greedy_decoding(options) -> None:
    model, ids = tiny(), torch.tensor([[1, 2, 3, 1, 2, 3, 1]])
    if options.pop("assistant", False):
        options = {"assistant_model": tiny()}
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    assert found.tolist() == plain.tolist()


def test_a_memory_is_refused_while_blocks_are_recomputed() -> None:
    model, ids = tiny().train(), torch.arange(6)[None]
    memory = model(ids, use_cache=True).past_key_values
    model.set_activation_checkpointing(True)
    with pytest.raises(ValueError, match="past_key_values"):
        model(ids[:, :1], past_key_values=memory)


def test_every_token_of_a_plain_decoder_takes_the_same_path() -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return chr(97 + ids[0])

    model, ids = tiny(), torch.tensor([[0, 1, 2], [3, 4, 0]])
    out = model(ids, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]), trace=True)
    found = paths(out, Letters())
    assert [p.text for p in found] == ["a", "b", "c", "d", "e"]
    assert {tuple(step.node for step in p.steps) for p in found} == {("block:1", "block:2")}
    assert {(p.first, p.route, p.evaluations) for p in found} == {(2, (), 2)}
    with pytest.raises(ValueError, match="trace=True"):
        paths(model(ids), Letters())


def test_only_matrices_decay_and_tied_weights_appear_once() -> None:
    model = tiny(tie_word_embeddings=True, attention_bias=True)
    decayed, others = family("brian").param_groups(model, OptimConfig(weight_decay=0.3))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim == 2 for p in decayed["params"]) and all(p.ndim == 1 for p in others["params"])
    assert sum(p.numel() for g in (decayed, others) for p in g["params"]) == sum(p.numel() for p in model.parameters())


def test_the_curriculum_of_a_plain_decoder_is_one_stage() -> None:
    stage, _ = curriculum("default", 100).at(10_000)
    assert stage.name == "plain"
    with pytest.raises(ValueError, match="curriculum='hand-over'"):
        curriculum("hand-over", 100)


COMPILED = """
import torch
from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.brian.modeling import BrianForCausalLM
config = BrianConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_attention_heads=4, initializer_range=0.3)
model = BrianForCausalLM(config).train()
ids = torch.arange(40).view(2, 20)
for extra in ({}, {"document_ids": ids // 7}, {"skip_logits": True}):
    torch._dynamo.reset()
    grads = []
    for call in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        loss = call(ids, labels=ids, **extra).loss
        loss.backward()
        grads.append((loss.detach(), model.embed_tokens.weight.grad.clone()))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
def test_a_training_step_compiles_into_one_graph() -> None:
    """In a process of its own, as the shape checks that the tests switch on cannot be compiled."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True)
