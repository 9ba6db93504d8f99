"""What a user of signal graphs meets: configurations, edges, folders, memories, paths."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import pathlm
from pathlm.config import OptimConfig
from pathlm.generate import generate
from pathlm.models import family
from pathlm.models.brillm import edges as edges_module
from pathlm.models.brillm.configuration import BrillmConfig
from pathlm.models.brillm.edges import Edges, count, count_rows
from pathlm.models.brillm.memory import UNDO, BrillmCache
from pathlm.models.brillm.modeling import BrillmForCausalLM, start_from
from pathlm.models.brillm.tracing import paths

PAIRS = [(0, 1), (1, 2), (2, 3), (3, 1), (1, 1), (4, 0)]


class Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


def tiny(**options: Any) -> BrillmForCausalLM:
    torch.manual_seed(0)
    return BrillmForCausalLM.from_edges(
        BrillmConfig(**{"vocab_size": 6, "signal_size": 4} | options), Edges.from_pairs(np.array(PAIRS), 6)
    ).eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signal_size": 5}, "signal_size=5: must be even"),
        ({"vocab_size": 0}, "vocab_size=0: must be at least 1"),
        ({"edges": 1_024**2 + 1}, "edges=1048577: must lie in 0 … vocab_size² = 1048576"),
        ({"edges": -1}, "edges=-1: must lie in"),
        ({"context": "mean"}, "context='mean': must be one of pooled, chain, decay, node-decay, gated, timescales, or several"),
        ({"context": "chain+"}, r"context='chain\+': must be one of"),
        ({"context": "pooled+pooled"}, r"context='pooled\+pooled': only decay may come more than once"),
        ({"context": "chain", "keep_initial": True}, 'keep_initial=True: context="chain" keeps the last output alone'),
        ({"timescales": [2.0]}, "timescales=.*: context='pooled' has none"),
        ({"context": "timescales", "timescales": [4, 0.5]}, r"timescales=\[4, 0.5\]: must be numbers of at least 1"),
        ({"context": "timescales", "timescales": []}, r"timescales=\[\]: must be numbers of at least 1"),
        ({"positions": "learned"}, "positions='learned': must be one of divided, multiplied, none"),
        ({"beyond": "stop"}, "beyond='stop': must be one of continue, hold"),
        ({"arithmetic": "original"}, "arithmetic='original': must be one of published, released"),
        ({"arithmetic": "released"}, "positions='divided': arithmetic=\"released\" was made with 'multiplied' only"),
        (
            {"arithmetic": "released", "positions": "multiplied", "context": "chain"},
            "context='chain': arithmetic=",
        ),
        ({"arithmetic": "released", "positions": "multiplied", "normalise": True}, "normalise=True: arithmetic="),
        ({"position_scale": 0.0}, "position_scale=0.0: must be positive"),
        ({"rivals": 1_024}, "rivals=1024: must lie in 1 … vocab_size - 1 = 1023"),
        ({"min_count": 0}, "min_count=0: must be at least 1"),
        ({"initializer_range": 0.0}, "initializer_range=0.0: must be positive"),
        ({"pad_token_id": 1_024}, "pad_token_id=1024: must lie in"),
        ({"eos_token_id": 1_024}, "eos_token_id=1024: must lie in"),
        ({"eos_token_id": [1, 1_024]}, r"eos_token_id=\[1, 1024\]: must lie in"),
        ({"hidden_dim": 2}, "BrillmConfig has no option hidden_dim"),
    ],
)
def test_a_preset_refuses_what_cannot_be_built_and_names_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pathlm.preset("brillm-tiny", **options)
    with pytest.raises(StrictDataclassError):
        BrillmConfig(signal_size=4.5)


def test_edges_are_found_by_their_pairs_and_all_others_share_row_0() -> None:
    found = Edges.from_pairs(np.array(PAIRS + PAIRS[:2]), 6)
    every = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    rows = {pair: row for row, pair in enumerate(sorted(PAIRS), start=1)}
    assert found.lookup(every[:, 0], every[:, 1]).tolist() == [rows.get(tuple(pair), 0) for pair in every.tolist()]
    assert [found.targets(u).tolist() for u in range(6)] == [[1], [1, 2], [3], [1], [0], []]
    assert found.start_V1.tolist() == [0, 1, 3, 4, 5, 6, 6]
    none = Edges.from_pairs(np.empty((0, 2), np.int64), 6)
    assert none.lookup(every[:, 0], every[:, 1]).sum() == 0
    full = Edges.even(36, 6)
    assert torch.equal(full.lookup(every[:, 0], every[:, 1]), torch.arange(1, 37))
    with pytest.raises(ValueError, match="nodes from 0 to 6: must lie in 0 … vocab_size - 1 = 5"):
        Edges.from_pairs(np.array([(0, 6)]), 6)
    with pytest.raises(ValueError, match="must rise strictly"):
        Edges.from_keys(torch.tensor([3, 2]), 6)


@pytest.mark.parametrize("chunk", [1, 3, 2**20])
def test_a_corpus_is_counted_in_chunks_and_its_documents_do_not_touch(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edges_module, "CHUNK", chunk)
    stream, starts = np.array([5, 0, 1, 0, 1, 5, 5, 2, 5, 5, 5, 0, 1, 5]), np.array([0, 6, 9, 10, 14])
    corpus = SimpleNamespace(tokens=lambda split: stream, documents=lambda split: SimpleNamespace(starts=starts))
    key, times = count_rows(SimpleNamespace(corpus=corpus, split="train"), 6)
    expected: dict[int, int] = {}
    for first, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        for t in range(first + 1, stop):
            pair = int(stream[t - 1]) * 6 + int(stream[t])
            expected[pair] = expected.get(pair, 0) + 1
    assert dict(zip(key.tolist(), times.tolist(), strict=True)) == expected and expected[0 * 6 + 1] == 3
    kept = Edges.from_counts((key, times), 6, min_count=2)
    assert kept.key_E.tolist() == sorted(pair for pair, many in expected.items() if many >= 2)


def test_counting_refuses_what_is_no_pair() -> None:
    with pytest.raises(ValueError, match="must be whole numbers"):
        count([np.zeros((3, 3), np.int64)], 6)
    with pytest.raises(ValueError, match="must be whole numbers"):
        count([np.zeros((3, 2))], 6)


def test_a_folder_opens_with_auto_classes_and_brings_its_edges(tmp_path: Path) -> None:
    model, ids = tiny(), torch.tensor([[0, 1, 2, 3, 1, 5]])
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BrillmConfig)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(opened, BrillmForCausalLM) and torch.equal(opened(ids).logits, model(ids).logits)
    assert torch.equal(opened.graph.key, model.graph.key) and opened.config.edges == len(PAIRS)
    again = start_from(tmp_path, BrillmConfig(vocab_size=6, signal_size=4, rivals=3))
    assert again.config.rivals == 3 and torch.equal(again.eval()(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="its normalise is False, the run's is True"):
        start_from(tmp_path, BrillmConfig(vocab_size=6, signal_size=4, normalise=True))
    with pytest.raises(ValueError, match="its signal_size is 4, the run's is 8"):
        start_from(tmp_path, BrillmConfig(vocab_size=6, signal_size=8))


def test_a_model_of_edges_leaves_the_configuration_it_was_given_alone() -> None:
    config = BrillmConfig(vocab_size=6, signal_size=4)
    model = BrillmForCausalLM.from_edges(config, Edges.from_pairs(np.array(PAIRS), 6))
    assert (config.edges, model.config.edges, model.graph.weight.shape[0]) == (0, 6, 7)
    with pytest.raises(ValueError, match="vocab_size=7: must be 6, the nodes of the edges"):
        BrillmForCausalLM.from_edges(BrillmConfig(vocab_size=7, signal_size=4), Edges.from_pairs(np.array(PAIRS), 6))


@torch.no_grad()
def test_a_memory_stays_as_large_as_it_is_however_long_the_text() -> None:
    model, memory = tiny(), BrillmCache()
    sizes = set()
    for _ in range(30):
        model(torch.randint(6, (2, 50)), past_key_values=memory, logits_to_keep=1)
        sizes.add((memory.bytes(), sum(t.numel() for t in memory.memory.state)))
    assert sizes == {(2 * (4 * 4 + 3 * 8), 2 * (UNDO + 1) * (4 + 3))} and memory.get_seq_length() == 1500
    with pytest.raises(ValueError, match="remembers how to take back 32 tokens"):
        memory.crop(-40)
    with pytest.raises(ValueError, match="negative"):
        memory.crop(3)
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache: must be a BrillmCache"):
        model(torch.tensor([[1]]), past_key_values=DynamicCache())


@pytest.mark.parametrize(("context", "signals"), [("decay", 1), ("gated", 1), ("chain+pooled", 2), ("decay+decay+timescales", 5)])
@torch.no_grad()
def test_the_state_of_every_wiring_is_its_number_of_signals_and_does_not_grow(context: str, signals: int) -> None:
    model, memory = tiny(context=context), BrillmCache()
    sizes = set()
    for length in (1, 7, 90):
        model(torch.randint(6, (2, length)), past_key_values=memory, logits_to_keep=1)
        sizes.add(memory.bytes())
    assert sizes == {2 * (signals * 4 * 4 + 3 * 8)} and model.config.signals == signals


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}, {"prefill_chunk_size": 2}], ids=str)
def test_assisted_and_chunked_generation_equal_greedy_decoding(options: dict[str, Any]) -> None:
    model, ids = tiny(), torch.tensor([[1, 2, 3, 1, 2, 3, 1]])
    if options.pop("assistant", False):
        options = {"assistant_model": tiny()}
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, **options).tolist() == plain.tolist()


def test_texts_of_different_length_are_continued_beyond_the_trained_positions() -> None:
    model, prompts = tiny(trained_positions=4), [[1, 2, 3, 1, 4], [2]]
    found = generate(model, prompts, max_new_tokens=9, temperature=0)
    for prompt, text in zip(prompts, found, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, pad_token_id=0)[0, len(prompt) :]
        assert text == alone.tolist()


@torch.no_grad()
def test_a_path_is_the_sentence_with_its_energies_and_rivals() -> None:
    model = tiny()
    ids, documents = torch.tensor([[0, 1, 1, 2, 5, 0], [0, 3, 0, 1, 0, 0]]), torch.tensor([[7, 7, 7, 7, 2, 2], [-1, 4, -1, 4, -1, -1]])
    out = model(ids, document_ids=documents, trace=True)
    found = paths(out, Letters())
    assert [path.text for path in found] == ["abbc", "fa", "db"] and {path.family for path in found} == {"brillm"}
    assert [[step.node for step in path.steps] for path in found] == [list("abbc"), list("fa"), list("db")]
    step = found[0].steps[2]
    energies = out.logits[0, 1]
    assert step.score == pytest.approx(float(energies[1])) and found[0].steps[0].score == 0 and found[0].steps[0].rivals == ()
    assert [name for name, _ in step.rivals] == ["c", "4 nodes without an edge of their own"], "b has edges to b and c"
    assert [e for _, e in step.rivals] == pytest.approx([float(energies[2]), float(energies[0])])
    assert step.margin == pytest.approx(float(energies[1] - energies[2]))
    assert found[2].steps[1].score == pytest.approx(float(out.logits[1, 1, 1])), "padding lies between"
    assert out.trace.row_BT[0].tolist() == [0, *model.graph.edges.lookup(ids[0, :3], ids[0, 1:4]).tolist(), 0, 0]
    with pytest.raises(ValueError, match="trace=True"):
        paths(model(ids), Letters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "input_ids=None"),
        (
            {"input_ids": torch.zeros(1, 0, dtype=torch.long)},
            r"input_ids has shape \(1, 0\): must be \(B, T\), at least one row of at least one",
        ),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, r"input_ids has shape \(0, 3\)"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"input_ids has shape \(3,\)"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 4)}, r"attention_mask has shape \(1, 4\)"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long), "labels": torch.zeros(1, 2)}, r"labels has shape \(1, 2\)"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long), "position_ids": torch.zeros(1, 3)}, "position_ids: a signal walks"),
        ({"inputs_embeds": torch.zeros(1, 3, 4)}, "inputs_embeds: a signal walks"),
    ],
)
def test_a_forward_pass_refuses_arguments_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(**options)


def test_edges_are_updated_by_rows_and_only_their_matrices_decay() -> None:
    model = tiny()
    groups = family("brillm").param_groups(model, OptimConfig(weight_decay=0.3))
    assert [(group["weight_decay"], group.get("rows", False)) for group in groups] == [(0.3, True), (0.0, True), (0.0, False)]
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(p.numel() for p in model.parameters())
    assert model.row_gradients


def test_the_curriculum_is_one_stage() -> None:
    curriculum = family("brillm").curriculum
    assert curriculum("default", 10).at(100)[0].name == "graph"
    refused = (
        ({"name": "route"}, "curriculum='route'"),
        ({"stages": {"exit": 1.0}}, "stages.exit=1.0"),
        ({"knobs": {"noise": 1}}, "noise"),
        ({"steps": 0}, "steps=0"),
    )
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            curriculum(**{"name": "default", "steps": 10} | options)
