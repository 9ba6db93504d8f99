"""Entering canonical memory changes nothing, what it keeps is small, and what is read of it is counted rightly."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LENGTH, Case, ids
from checks import counting
from huggingface_hub.errors import StrictDataclassClassValidationError

from pathlm.models.brian import travel
from pathlm.models.brian.convert import start_from, wrap
from pathlm.models.brian.curriculum import Knobs, curriculum
from pathlm.models.brian.memory import BrianCache
from pathlm.models.brian.sight import Sight
from pathlm.models.layers import turned

ROUTE = {"pool_blocks": 3, "max_route_steps": 4, "block_position_dim": 6}
CODES = (
    {"code_dim": 6},
    {"code_dim": 0, "code_adapter": "shared", "code_keys": 2},
    {"code_keys": 1, "code_delta_rank": 2, "num_key_value_heads": 2},
)


def built(**options: Any) -> Any:
    return Case("", "brian", ROUTE | options).build()


def changed(config: Any, **options: Any) -> Any:
    config = copy.deepcopy(config)
    for name, value in options.items():
        setattr(config, name, value)
    return config


@torch.no_grad()
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_entering_changes_no_logit_and_leaves_rows_without_a_jump(codes: dict[str, Any], tmp_path: Path) -> None:
    groups = {name: codes[name] for name in codes if name.startswith("num")}
    model, codes = built(**groups), codes | {"memory": "local+canonical"}
    model.save_pretrained(tmp_path / "rows")
    entered = start_from(tmp_path / "rows", changed(model.config, **codes)).eval()
    tokens = ids(2)
    assert torch.equal(entered(tokens).logits, model(tokens).logits)
    entered.codes.set_reach(None, 0.0)
    entered.save_pretrained(tmp_path / "faded")
    left = start_from(tmp_path / "faded", changed(entered.config, memory="canonical")).eval()
    torch.testing.assert_close(left(tokens).logits, entered(tokens).logits, rtol=0, atol=1e-12)
    assert sum(p.numel() for p in left.parameters()) < sum(p.numel() for p in entered.parameters())


@torch.no_grad()
def test_codes_begin_as_what_the_blocks_would_make_of_the_state_that_enters(tmp_path: Path) -> None:
    """With codes of all numbers, a value that is read is the block's own value of that state."""
    model = built(block_position_to="router")
    model.save_pretrained(tmp_path)
    codes = start_from(tmp_path, changed(model.config, memory="canonical", code_dim=32)).codes
    h_nD = torch.randn(5, 32, dtype=torch.float64)
    code_nC = codes.down(codes.norm(h_nD))
    for number, block in enumerate(model.pool_blocks):
        value_nGK = block.remember(h_nD)[:, block.groups :]
        torch.testing.assert_close(codes.answer(number, code_nC[:, None].expand(-1, block.heads, -1)), value_nGK, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("keys", [4, 12])
def test_heads_begin_to_look_for_codes_as_they_looked_for_rows(keys: int, tmp_path: Path) -> None:
    """With a turned key for every head of every block all scores are those of rows of the states that entered; with fewer, the nearest."""
    model = built(block_position_to="router", pool_blocks=3, num_attention_heads=4)
    model.save_pretrained(tmp_path)
    codes = start_from(tmp_path, changed(model.config, memory="canonical", code_dim=32, code_keys=keys)).codes
    h_BTD = torch.randn(1, 9, 32, dtype=torch.float64)
    rotary = model.rotary(torch.arange(9)[None], torch.float64)
    table_BTW = codes.write(h_BTD, rotary)[:, 0]
    off = []
    for number, block in enumerate(model.pool_blocks):
        qkv = block.project(h_BTD)
        query, key, _ = turned(qkv, rotary, block.heads)
        asked = codes.ask(number, qkv[0, :, : block.heads])[None]
        question = codes.question(asked, rotary).transpose(1, 2)
        found = question @ table_BTW[:, None].mT * (block.width / question.shape[-1]) ** 0.5
        off.append((found - query @ key.repeat_interleave(block.heads // block.groups, 1).mT).square().mean() / found.square().mean())
    assert (max(off) < 1e-10) if keys == 12 else (1e-6 < max(off) < 0.5)


def test_codes_that_nobody_has_read_begin_as_if_they_were_new(tmp_path: Path) -> None:
    model = built(memory="local+canonical")
    model.save_pretrained(tmp_path / "unread")
    left = start_from(tmp_path / "unread", changed(model.config, memory="local"))
    left.save_pretrained(tmp_path / "rows")
    unread, new = (start_from(tmp_path / name, changed(model.config, memory="canonical")).codes for name in ("unread", "rows"))
    assert torch.equal(unread.key, new.key) and torch.equal(unread.down.weight, new.down.weight)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({"memory": "canonical"}, {"memory": "local"}, "model.memory='local'.*no keys and values"),
        (
            {"memory": "local+canonical", "post_memory": "canonical"},
            {"memory": "local", "post_memory": "own"},
            "model.memory='local'.*post_memory='canonical'",
        ),
        ({"memory": "canonical"}, {"code_dim": 7}, "model.code_dim=7.*has None"),
        ({"memory": "local+canonical"}, {"code_adapter": "shared"}, "model.code_adapter='shared'.*has 'block'"),
        ({"memory": "canonical"}, {"code_keys": 2}, "model.code_keys=2.*has 4"),
    ],
)
def test_weights_that_do_not_fit_a_memory_are_refused(first: dict[str, Any], then: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = built(**first)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        start_from(tmp_path, changed(model.config, **then))


def test_processes_that_draw_different_numbers_begin_codes_alike() -> None:
    begun = []
    for rank in (1, 2):
        model = built(memory="local+canonical", code_delta_rank=2).train()
        torch.manual_seed(rank)
        model(ids(2), labels=ids(2), knobs=Knobs(local_window=3.0))
        begun.append(dict(model.codes.named_parameters()))
    assert all(torch.equal(parameter, begun[1][name]) for name, parameter in begun[0].items())
    assert begun[0]["key_narrow"].any()


@torch.no_grad()
def test_a_cache_that_cannot_take_tokens_back_keeps_them_in_every_layer() -> None:
    model = built(memory="canonical", code_window=4, attention_window=180)
    cache = model(torch.randint(8, (1, 200)), use_cache=True).past_key_values
    cache = model(torch.randint(8, (1, 1)), past_key_values=cache).past_key_values
    with pytest.raises(ValueError, match="tokens_to_remove=-90: a window of 4 has forgotten"):
        cache.crop(-90)
    assert [layer.get_seq_length() for layer in cache.layers] == [201] * len(cache.layers)
    cache.crop(-5)
    assert [layer.get_seq_length() for layer in cache.layers] == [196] * len(cache.layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "global"}, "memory='global'"),
        ({"memory": "canonical", "local_window": 3}, "local_window=3.*there are no rows"),
        ({"code_dim": 4}, "code_dim=4.*there are no codes"),
        ({"memory": "canonical", "code_sinks": 2}, "code_sinks=2.*code_window"),
        ({"memory": "canonical", "left_rows": "refreshed"}, "left_rows='refreshed'.*rows"),
        ({"memory": "canonical", "code_window": -1}, "code_window=-1"),
        ({"memory": "canonical", "pool_blocks": 0, "max_route_steps": 0}, "memory='canonical'.*no pool"),
        ({"post_memory": "canonical"}, "post_memory='canonical'.*no codes"),
        ({"attention_sinks": 1}, "attention_sinks=1.*attention_window"),
        ({"memory": "canonical", "code_dim": 33}, "code_dim=33: must be at most hidden_size=32"),
        ({"memory": "canonical", "code_keys": 0}, "code_keys=0: must be at least 1"),
        ({"route_beams": 2, "beam_expansion": 1}, "route_beams=2: needs beam_expansion above 1"),
    ],
)
def test_a_memory_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        Case("", "brian", ROUTE | options).config()


@pytest.mark.parametrize(
    "options", [{"memory": "canonical"}, {"attention_window": 4}, {"memory": "local+canonical", "local_window": 2}], ids=str
)
def test_a_decoder_is_not_wrapped_into_one_that_sees_less(options: dict[str, Any]) -> None:
    plain = Case("", "brian").build()
    with pytest.raises(ValueError, match="would not be the same"):
        wrap(plain, pre_blocks=1, pool_blocks=1, post_blocks=1, **options)
    wrapped = wrap(plain, pre_blocks=1, pool_blocks=1, post_blocks=1, memory="local+canonical", code_dim=4)
    assert torch.equal(wrapped(ids(2)).logits, plain(ids(2)).logits)


@torch.no_grad()
def test_a_prefill_sends_only_the_tokens_that_are_asked_for_through_the_pool() -> None:
    model = built(memory="canonical", post_memory="canonical")
    tokens, pre = ids(3), model.config.pre_blocks
    whole = model(tokens).logits
    for keep in (1, 3):
        with counting(model) as counts:
            some = model(tokens, logits_to_keep=keep, use_cache=True)
        torch.testing.assert_close(some.logits, whole[:, -keep:], rtol=0, atol=1e-12)
        assert counts[:pre] == [3 * LENGTH] * pre and counts[-1] == 3 * keep
        assert 3 * keep <= sum(counts[pre:-1]) <= 3 * keep * model.config.max_route_steps
        later = model(tokens[:, :2], past_key_values=some.past_key_values).logits
        torch.testing.assert_close(later, model(torch.cat((tokens, tokens[:, :2]), 1)).logits[:, -2:], rtol=0, atol=1e-12)


def bytes_per_token(**options: Any) -> float:
    """Of the pool alone, from what is allocated for 40 tokens more."""
    model, sizes = built(pre_blocks=0, post_blocks=0, **options), []
    for length in (20, 60):
        with torch.no_grad():
            sizes.append(model(ids(1, length), use_cache=True).past_key_values.bytes())
    return (sizes[1] - sizes[0]) / 40


def test_what_a_pool_keeps_of_a_token_depends_on_neither_steps_nor_blocks() -> None:
    code = 8 * (6 + 4 * 8)  # float64: six numbers, and four keys of eight
    for steps, blocks in ((2, 2), (6, 2), (6, 5)):
        shape = {"max_route_steps": steps, "pool_blocks": blocks, "code_dim": 6}
        assert bytes_per_token(memory="canonical", **shape) == code
        assert bytes_per_token(memory="local", max_route_steps=steps, pool_blocks=blocks) == 8 * 2 * 32 * steps


@torch.no_grad()
@pytest.mark.parametrize("memory", ["canonical", "local+canonical"])
def test_with_windows_a_stream_takes_no_more_memory_than_its_beginning(memory: str) -> None:
    near = {"local_window": 4} if memory == "local+canonical" else {}
    model = built(memory=memory, code_window=8, code_sinks=2, attention_window=8, attention_sinks=1, **near)
    past, largest = None, []
    for chunk in ids(1, 1_200).split(30, dim=1):
        past = model(chunk, past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values
        assert isinstance(past, BrianCache)
        largest.append(max(layer.capacity for layer in past.layers))  # type: ignore[union-attr]
    assert past.get_seq_length() == 1_200
    assert max(largest) == max(largest[:12]) < 400


@torch.no_grad()
@pytest.mark.parametrize(("memory", "share"), [("canonical", 1.0), ("local+canonical", 1.0), ("local+canonical", 0.4)])
def test_rows_are_written_token_by_token_as_they_are_read_when_much_is_forgotten(
    memory: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = {"local_window": 3} if memory == "local+canonical" else {}
    options = {"memory": memory, "code_window": 8, "code_sinks": 2, "attention_window": 8, "attention_sinks": 1, "code_dim": 6} | near
    model = Case("", "brian", ROUTE | options, local_share=share).build()
    walked, walk = [], travel.walk
    monkeypatch.setattr(travel, "walk", lambda *given: walked.append(len(given[2])) or walk(*given))
    tokens = ids(3, 320)
    whole = model(tokens, use_cache=False).logits
    for rows in (tokens, tokens[:1]):
        past = model(rows[:, :240], use_cache=True, logits_to_keep=1).past_key_values
        for t in range(240, 320):
            out = model(rows[:, t : t + 1], past_key_values=past)
            torch.testing.assert_close(out.logits[:, 0], whole[: len(rows), t], rtol=0, atol=1e-10)
        assert max(layer.held for layer in past.layers) < 240
    assert walked == [3] * 80 + [1] * 80


def test_what_a_window_shows_of_a_long_text_takes_no_table_of_all_of_it() -> None:
    past = 10**13
    slots = torch.cat((torch.arange(2), torch.arange(past - 3, past + 2)))
    seen = Sight.of(2, past, None, slots.device).within(3, 1, slots)
    assert seen is not None and seen[0, 0].int().tolist() == [[1, 0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 1, 1, 1]]


def test_what_was_forgotten_cannot_be_taken_back() -> None:
    model = built(memory="canonical", code_window=4, attention_window=4)
    with torch.no_grad():
        past = model(ids(1, 400), use_cache=True).past_key_values
        past = model(ids(1, 1), past_key_values=past).past_key_values
    past.crop(-20)
    assert past.get_seq_length() == 381
    with pytest.raises(ValueError, match=r"tokens_to_remove=-200: a window of 4 has forgotten"):
        past.crop(-200)


@torch.no_grad()
def test_what_is_read_of_codes_is_counted() -> None:
    """Where queries are next to nothing, every token and code that is seen is read alike."""
    window = 3
    model = built(memory="local+canonical", local_window=window, max_route_steps=3, min_route_steps=3)
    for block in model.pool_blocks:
        block.qkv_proj.weight[:32] *= 1e-9
    found = model(ids(1), labels=ids(1)).metrics
    seen = [(max(t + 1 - window, 0), min(t + 1, window)) for t in range(LENGTH)]
    mass = sum(codes / (codes + rows) for codes, rows in seen) / LENGTH
    first = sum((codes > 0) / (codes + rows) for codes, rows in seen) / LENGTH
    assert found["memory/code_mass"].item() == pytest.approx(mass, abs=1e-6)
    assert found["memory/local_ratio"].item() == pytest.approx((1 - mass) / mass, abs=1e-5)
    assert found["memory/sink_share"].item() == pytest.approx(first / mass, abs=1e-6)
    assert found["memory/utilisation"].item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("window", "start", "end"), [(3, (64.0, 1.0), (3.0, 1.0)), (0, (0.0, 1.0), (0.0, 0.0))])
def test_a_curriculum_narrows_the_window_or_lets_rows_fade(window: int, start: tuple[float, float], end: tuple[float, float]) -> None:
    config = Case("", "brian", ROUTE | {"memory": "local+canonical", "local_window": window}).config()
    for name in ("default", "joint", "route"):
        found = curriculum(name, 1_000, config=config)
        assert [stage.name for stage in found.stages][-2:] == ["narrowing", "codes"]
        assert all((stage.start.local_window, stage.start.local_share) == (0.0, 1.0) for stage in found.stages[:-2])
        reach = [(knobs.local_window, knobs.local_share) for knobs in (found.stages[-2].knobs(0), found.at(999)[1])]
        assert reach == [start, end]
    assert [stage.name for stage in curriculum("stage-5", 100, config=config).stages] == ["narrowing", "codes"]
    if window:  # a window wider than the text would be none, so narrowing begins at the text's length, but never below where it ends
        widths = [curriculum("stage-5", 100, config=config, length=length).stages[0].start.local_window for length in (24, 2)]
        assert widths == [24.0, float(window)]
    alone = Case("", "brian", ROUTE | {"memory": "canonical"}).config()
    assert "codes" not in [stage.name for stage in curriculum("default", 1_000, config=alone).stages]


def test_a_model_is_used_with_the_window_it_was_trained_with_last(tmp_path: Path) -> None:
    model = built(memory="local+canonical", local_window=2)
    narrow = model(ids(2)).logits
    model.train()
    knobs = curriculum("stage-5", 10, config=model.config).at(0)[1]
    model(ids(2), labels=ids(2), knobs=knobs)
    model.eval().save_pretrained(tmp_path)
    assert model.codes.reach == (64, 1.0)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(ids(2)).logits, model(ids(2)).logits)
    assert not torch.allclose(model(ids(2)).logits, narrow)


def test_codes_begin_where_the_blocks_are_when_they_are_first_read() -> None:
    model = built(memory="local+canonical", local_window=3, left_rows="refreshed").train()
    wide, then = (curriculum("stage-5", 10, config=model.config).at(step)[1] for step in (0, 9))
    first = replace(wide, local_window=LENGTH - 1.0)
    before = {name: p.detach().clone() for name, p in model.codes.named_parameters()}
    model(ids(2), labels=ids(2), knobs=replace(first, local_window=0.0))
    model(ids(2), labels=ids(2), knobs=wide)  # as wide as the context, and wider than these rows
    assert all(torch.equal(p, before[name]) for name, p in model.codes.named_parameters())
    model(ids(2), labels=ids(2), knobs=first)
    begun = {name: p.detach().clone() for name, p in model.codes.named_parameters()}
    assert not any(torch.equal(p, before[name]) for name, p in begun.items() if name != "norm.weight")
    with torch.no_grad():
        model.codes.value.add_(1.0)  # training
    model(ids(2), labels=ids(2), knobs=then)
    assert not torch.equal(model.codes.value, begun["value"]), "what is being read is not begun again"


def test_branches_come_last_in_a_curriculum_and_only_there() -> None:
    both = ROUTE | {"memory": "local+canonical", "local_window": 3, "route_beams": 4}
    stages = curriculum("default", 1_000, config=Case("", "brian", both).config()).stages
    assert [stage.name for stage in stages][-3:] == ["narrowing", "codes", "parallel"]
    assert [stage.start.route_beams for stage in stages] == [1] * (len(stages) - 1) + [4]
    assert stages[-1].start.local_window == 3 and stages[-1].start.beam_share == 0.5
    alone = curriculum("stage-6", 10, config=Case("", "brian", both).config())
    assert [stage.name for stage in alone.stages] == ["parallel"]
    with pytest.raises(ValueError, match="curriculum='stage-6'"):
        curriculum("stage-6", 10, config=Case("", "brian", ROUTE).config())
