"""Wrapping changes nothing: a routed model made of a plain decoder or a Llama computes the same to the last bit until it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import pathlm
from pathlm.models.brian.convert import convert
from pathlm.models.brian.curriculum import Knobs
from pathlm.models.brian.modeling import BrianForCausalLM

SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "initializer_range": 0.2}
SPLIT: dict[str, int] = {"pre_blocks": 2, "pool_blocks": 3, "post_blocks": 1}
FORCED = Knobs(router_share=0.0, exit_share=0.0)
ROUTING: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "more steps than blocks": {"max_route_steps": 7},
    "at least two steps": {"min_route_steps": 2},
    "circle": {"block_position": "circle", "block_position_dim": 8},
    "random": {"block_position": "random"},
    "no positions": {"block_position": "none"},
    "positions to blocks alone": {"block_position_to": "blocks"},
    "positions to the state": {"block_position_to": "state"},
    "deep router": {"router_hidden": 16},
    "repeats capped": {"max_repeats": 1},
    "recur only": {"route_moves": "recur", "max_route_steps": 5},
    "skip only": {"route_moves": "skip"},
}
PLAIN: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries": {"num_key_value_heads": 2},
    "tied head": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "yarn": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    },
}


def stirred(model: Any) -> Any:
    """Move norms and biases away from one and zero, where a mix-up would not show."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.2)
    return model.float().eval()


def plain(**options: Any) -> BrianForCausalLM:
    torch.manual_seed(0)
    return stirred(pathlm.build(pathlm.preset("plain-tiny", **SIZES | options)))


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return stirred(LlamaForCausalLM(LlamaConfig(**{"num_hidden_layers": 6, "max_position_embeddings": 64} | SIZES | options)))


def tokens(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(1))


DOCUMENTS = torch.tensor([[0] * 24, [3] * 9 + [4] * 13 + [-1] * 2])


@pytest.mark.parametrize("routing", ROUTING.values(), ids=ROUTING.keys())
@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN.keys())
def test_a_wrapped_decoder_has_its_logits_to_the_last_bit(options: dict[str, Any], routing: dict[str, Any]) -> None:
    before, ids = plain(**options), tokens()
    after = pathlm.wrap(before, **SPLIT, **routing)
    assert (after.config.pool_blocks, after.dtype) == (3, torch.float32)
    with torch.no_grad():
        # Two documents are two rows of attention: what a mask hides does not count.
        for extra in ({}, {"document_ids": DOCUMENTS}):
            shown = DOCUMENTS >= 0 if extra else torch.ones_like(ids, dtype=torch.bool)
            assert torch.equal(after(ids, **extra).logits[shown], before(ids, **extra).logits[shown])


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN.keys())
def test_decoding_with_a_wrapped_decoder_writes_the_same(options: dict[str, Any]) -> None:
    before, prompt = plain(**options), tokens(2, 5)
    after = pathlm.wrap(before, **SPLIT)
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for rows in (prompt, prompt[:1]):
        assert torch.equal(after.generate(rows, **how), before.generate(rows, **how))


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN.keys())
def test_a_wrapped_llama_equals_the_decoder_made_of_it_to_the_last_bit_and_llama_itself_closely(options: dict[str, Any]) -> None:
    theirs, ids = llama(**options), tokens()
    after = pathlm.wrap(theirs, **SPLIT)
    with torch.no_grad():
        assert torch.equal(after(ids).logits, pathlm.from_llama(theirs, pre_blocks=2, post_blocks=4)(ids).logits)
        # Weights this large make single precision differ by more than 1e-6; double precision shows that it is rounding.
        torch.testing.assert_close(after.double()(ids).logits, theirs.double()(ids).logits, rtol=0, atol=1e-10)
        ordinary = llama(**options, initializer_range=0.02)
        torch.testing.assert_close(pathlm.wrap(ordinary, **SPLIT)(ids).logits, ordinary(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("routing", ROUTING.values(), ids=ROUTING.keys())
def test_gradients_of_the_forced_path_are_those_of_the_plain_decoder(routing: dict[str, Any]) -> None:
    before, ids = plain(), tokens()
    after = pathlm.wrap(before, **SPLIT, **routing)
    losses = []
    for model, knobs in ((before, None), (after, FORCED)):
        out = model.train()(ids, labels=ids, knobs=knobs, skip_logits=True)
        out.loss.backward()
        losses.append(out.loss.detach())
    assert torch.equal(*losses)
    mine = dict(after.named_parameters())
    for name, p in before.named_parameters():
        assert p.grad.abs().max() > 0, name
        # The blocks are the same, called in two halves: sums over tokens may be taken in another order.
        torch.testing.assert_close(mine[name].grad, p.grad, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    router = [p.grad for name, p in after.named_parameters() if name.startswith("pool.router")]
    assert all(grad is None or not grad.any() for grad in router), "nothing teaches the router"


def test_the_trace_of_a_wrapped_decoder_is_its_old_path() -> None:
    trace = pathlm.wrap(plain(), **SPLIT, max_route_steps=5)(tokens(), trace=True).trace
    assert trace.block_BTS.unique(dim=1).tolist() == [[[1, 2, 3, 4, 5, 0, 0, 6]]] * 2


@pytest.mark.parametrize("source", [plain, llama], ids=["ours", "llama"])
def test_the_command_s_body_wraps_a_folder(source: Any, tmp_path: Path) -> None:
    before = source()
    before.save_pretrained(tmp_path / "plain")
    assert convert(tmp_path / "plain", tmp_path / "routed", wrap_as="2/3/1", overrides=["max_route_steps=5"]) == tmp_path / "routed"
    after = BrianForCausalLM.from_pretrained(tmp_path / "routed").eval()
    assert (after.config.pre_blocks, after.config.pool_blocks, after.config.post_blocks, after.config.max_route_steps) == (2, 3, 1, 5)
    assert torch.equal(after(tokens()).logits, pathlm.wrap(before, **SPLIT)(tokens()).logits)
    with pytest.raises(ValueError, match="pool_blocks=3: the model has a pool already"):
        convert(tmp_path / "routed", tmp_path / "twice", wrap_as="2/3/1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wrap_as": "2/3/2"}, "pre_blocks=2, pool_blocks=3, post_blocks=2: must add up to the 6 blocks of the model"),
        ({"wrap_as": "3/0/3"}, "pool_blocks=0: a pool needs at least one block"),
        ({"wrap_as": "2/4"}, "wrap='2/4': must be three numbers of blocks"),
        ({"wrap_as": "2/x/2"}, "wrap='2/x/2': must be three numbers"),
        ({"wrap_as": "2/3/1", "to": "llama"}, "to='llama': --wrap makes a BRIAN model"),
        ({"wrap_as": "2/3/1", "overrides": ["max_route_step=4"]}, "max_route_step=4: is no option of a pool; these are max_route_steps"),
        ({"wrap_as": "2/3/1", "overrides": ["hidden_size=4"]}, "hidden_size=4: is no option of a pool"),
        ({"wrap_as": "2/3/1", "overrides": ["min_route_steps=4"]}, "min_route_steps=4: must lie in 1 … max_route_steps=3"),
        ({"wrap_as": "2/1/3", "overrides": ["route_top_k=2"]}, "route_top_k=2: must be 1, or 2 where pool_blocks=1 is at least 2"),
        ({"wrap_as": "2/3/1", "overrides": ["max_route_steps=0"]}, "max_route_steps=0: pool_blocks=3 needs at least 1"),
        ({"wrap_as": "2/3/1", "overrides": ["max_route_steps"]}, "--set 'max_route_steps' must have the form name=value"),
        ({"wrap_as": "2/3/1", "overrides": ["pool_blocks=4"]}, "--set pool_blocks=4: --wrap 2/3/1 says how the blocks are split"),
        ({"wrap_as": "2/3/1", "overrides": ["max_route_steps=2"]}, "max_route_steps=2: must be at least pool_blocks=3"),
        ({"overrides": ["max_route_steps=4"]}, "--set 'max_route_steps=4': sets fields of a wrapped model; give --wrap as well"),
        ({}, "holds a brian model, which cannot become brian"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_by_name_and_leaves_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "plain", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_written_into(tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path / "run" / "checkpoints" / "best")
    with pytest.raises(ValueError, match="is the folder of a run, whose model is in its checkpoints"):
        convert(tmp_path / "run", tmp_path / "run", wrap_as="2/3/1")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_other_models_are_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=8)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="holds a gpt2 model; only a plain decoder of ours or a Llama model can be wrapped"):
        convert(tmp_path / "gpt2", tmp_path / "out", wrap_as="0/2/0")
