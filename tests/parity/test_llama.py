"""A BRIAN model with an empty pool is transformers' Llama: equal logits and losses on equal weights, converted both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pathlm
from pathlm.models.brian.convert import convert, from_llama, to_llama

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPES: dict[str, dict[str, Any] | None] = {
    "default": None,
    "base 500,000": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16},
}
OPTIONS: dict[str, dict[str, Any]] = {
    **{f"rotary {name}": {"rope_parameters": rope} for name, rope in ROPES.items()},
    "grouped queries": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 16},
    "tied head": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "larger epsilon": {"rms_norm_eps": 1e-2},
    "everything": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "rope_parameters": ROPES["yarn"],
    },
}


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**BASE | options)).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:  # norms start at one and biases at zero, which would hide that they are mixed up
                p.add_(torch.randn_like(p) * 0.2)
            assert p.dtype == torch.float64, name
    return model


def tokens(rows: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_logits_and_loss_equal_those_of_llama(options: dict[str, Any]) -> None:
    theirs, ids = llama(**options), tokens()
    ours = from_llama(theirs)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(ours(ids, labels=ids).loss.float(), theirs(ids, labels=ids).loss.float(), rtol=1e-6, atol=1e-6)
    mask, positions = torch.ones_like(ids), torch.arange(40).expand(3, 40).clone()
    mask[0, :7], positions[0] = 0, (torch.arange(40) - 7).clamp(min=0)
    padded = theirs(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(ours(ids, attention_mask=mask).logits[mask.bool()], padded[mask.bool()], rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_llama_comes_back_from_brian_bit_for_bit(options: dict[str, Any]) -> None:
    theirs = llama(**options)
    back = to_llama(from_llama(theirs, post_blocks=1))
    assert back.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in back.state_dict().items())
    assert torch.equal(back(tokens()).logits, theirs(tokens()).logits)
    mine, original = back.config.to_dict(), theirs.config.to_dict()
    assert {name for name in mine.keys() | original.keys() if mine.get(name) != original.get(name)} <= {
        "dtype",
        "architectures",
        "_name_or_path",
    }


def test_gradients_equal_those_of_llama() -> None:
    theirs, ids = llama(num_key_value_heads=2).float(), tokens()
    ours = from_llama(theirs).train()
    theirs.train()(ids, labels=ids).loss.backward()
    ours(ids, labels=ids, skip_logits=True).loss.backward()
    names = {"norm.weight": "model.norm.weight", "embed_tokens.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    names |= {
        f"blocks.1.{a}.weight": f"model.layers.1.{b}.weight"
        for a, b in (("out_proj", "self_attn.o_proj"), ("mlp_norm", "post_attention_layernorm"))
    }
    mine, original = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for a, b in names.items():
        expected = original[b].grad.clone()
        if a == "embed_tokens.weight":
            expected[0] = mine[a].grad[0]  # Llama drops the gradient of its padding token, which no token here is
        torch.testing.assert_close(mine[a].grad, expected, rtol=1e-3, atol=1e-6)
    joined = torch.cat([original[f"model.layers.0.self_attn.{part}_proj.weight"].grad for part in "qkv"])
    torch.testing.assert_close(mine["blocks.0.qkv_proj.weight"].grad, joined, rtol=1e-3, atol=1e-6)


def test_greedy_continuations_equal_those_of_llama() -> None:
    theirs, prompt = llama(eos_token_id=None), tokens(2, 5)
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(from_llama(theirs).generate(prompt, **options), theirs.generate(prompt, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folders_are_converted_both_ways(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = llama().to(dtype)
    theirs.save_pretrained(tmp_path / "llama")
    ours = pathlm.from_llama(tmp_path / "llama", pre_blocks=1)
    assert (ours.config.pre_blocks, ours.config.post_blocks, ours.dtype) == (1, 2, dtype)
    assert convert(tmp_path / "llama", tmp_path / "brian", to="brian") == tmp_path / "brian"
    convert(tmp_path / "brian", tmp_path / "back", to="llama")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "back")
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in back.state_dict().items())
    with pytest.raises(ValueError, match="already holds a model"):
        convert(tmp_path / "llama", tmp_path / "brian", to="brian")
    with pytest.raises(ValueError, match="holds a llama model, which cannot become llama"):
        convert(tmp_path / "llama", tmp_path / "new", to="llama")
    with pytest.raises(ValueError, match=r"no config\.json"):
        convert(tmp_path / "nowhere", tmp_path / "new", to="llama")


def test_a_split_that_does_not_add_up_is_refused() -> None:
    with pytest.raises(ValueError, match="must add up to the model's 3 layers"):
        from_llama(llama(), pre_blocks=2, post_blocks=2)
    with pytest.raises(ValueError, match="pre_blocks=3, pool_blocks=1, post_blocks=-1: must add up to the model's 3 layers"):
        from_llama(llama(), pre_blocks=3, pool_blocks=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}}, "cached decoding could not equal"),
    ],
)
def test_what_a_block_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_llama(llama(**options))
