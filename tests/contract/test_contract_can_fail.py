"""Models with the faults of the two originals and others like them: the contract must catch each one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import checks
import pytest
import torch
from cases import BRANCHED, CASES, GRAPHS, ROUTED
from checks import CHECKS, saved_and_loaded_it_is_the_same
from torch import Tensor

from pathlm.models.brian import memory, pool, walk
from pathlm.models.brian.beam import BeamRun
from pathlm.models.brian.codes import Codes
from pathlm.models.brian.memory import BlockMemory, CodeMemory, NewestRows, PoolMemory
from pathlm.models.brian.modeling import BrianForCausalLM
from pathlm.models.brian.outlook import Outlook
from pathlm.models.brian.pool import PoolRun
from pathlm.models.brian.routing import RoutePool
from pathlm.models.brian.sight import Sight
from pathlm.models.brillm import advance, energy, fused, modeling, positions
from pathlm.models.brillm.memory import SignalMemory
from pathlm.models.brillm.modeling import BrillmForCausalLM
from pathlm.models.layers import rotate


class SeesTheFuture(BrianForCausalLM):
    """A decision is pooled over the row, as the original router's was."""

    def _embed(self, *inputs: Any) -> Tensor:
        h_BTD = super()._embed(*inputs)
        return h_BTD + 0.1 * h_BTD.mean(dim=1, keepdim=True)


class SeesItsNeighbours(BrianForCausalLM):
    """Something is pooled over the batch."""

    def _embed(self, *inputs: Any) -> Tensor:
        h_BTD = super()._embed(*inputs)
        return h_BTD + 0.1 * h_BTD.mean(dim=0, keepdim=True)


class CountsWrongWhenDecoding(BrianForCausalLM):
    """Trains with one position and decodes with another, as the original BriLLM does."""

    def forward(self, input_ids: Tensor | None = None, **options: Any) -> Any:
        memory = options.get("past_key_values")
        if input_ids is not None and memory is not None and memory.get_seq_length():
            past = memory.get_seq_length()
            options["position_ids"] = torch.arange(past - 1, past - 1 + input_ids.shape[1])[None]
        return super().forward(input_ids, **options)


class SeesPadding(BrianForCausalLM):
    def forward(self, input_ids: Tensor | None = None, **options: Any) -> Any:
        options["attention_mask"] = None
        return super().forward(input_ids, **options)


class SeesOtherDocuments(BrianForCausalLM):
    def forward(self, input_ids: Tensor | None = None, **options: Any) -> Any:
        options["document_ids"] = None
        return super().forward(input_ids, **options)


class PredictsItself(BrianForCausalLM):
    """The loss compares token t with the scores of token t."""

    def _loss(self, h_BTD: Tensor, target_BT: Tensor, *rest: Any) -> Any:
        return super()._loss(h_BTD, target_BT.roll(1, dims=1), *rest)


class ForgetsToSave(BrianForCausalLM):
    """Something outside the weights changes the result."""

    made = 0

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        ForgetsToSave.made += 1
        self.extra = ForgetsToSave.made

    def _embed(self, *inputs: Any) -> Tensor:
        return super()._embed(*inputs) * (1 + self.extra)


BROKEN = (
    (SeesTheFuture, "the_past_cannot_see_the_future"),
    (SeesTheFuture, "decoding_in_any_chunks_is_one_forward_pass"),
    (CountsWrongWhenDecoding, "one_row_is_decoded_as_many_are"),
    (SeesTheFuture, "a_long_decode_outgrows_the_first_buffer"),
    (SeesTheFuture, "documents_in_a_row_do_not_see_each_other"),
    (SeesTheFuture, "generation_with_and_without_memory_agrees"),
    (SeesItsNeighbours, "neighbours_and_their_order_change_nothing"),
    (CountsWrongWhenDecoding, "decoding_in_any_chunks_is_one_forward_pass"),
    (CountsWrongWhenDecoding, "a_long_decode_outgrows_the_first_buffer"),
    (CountsWrongWhenDecoding, "rows_of_different_length_continue_together"),
    (CountsWrongWhenDecoding, "generation_with_and_without_memory_agrees"),
    (SeesPadding, "padding_on_either_side_changes_nothing"),
    (SeesPadding, "rows_of_different_length_continue_together"),
    (SeesOtherDocuments, "documents_in_a_row_do_not_see_each_other"),
    (SeesOtherDocuments, "packed_documents_may_be_padded_on_either_side"),
    (PredictsItself, "the_loss_counts_each_label_once"),
)


@pytest.mark.parametrize(("model", "check"), BROKEN, ids=lambda v: getattr(v, "__name__", v))
def test_a_broken_model_fails_the_check_that_guards_against_it(model: type[BrianForCausalLM], check: str) -> None:
    with pytest.raises(AssertionError):
        getattr(checks, check)(CASES[0].build(model=model))


# Faults of routing, each put into a sound model: what is replaced, and the fault.


def averaged(self: Any, h_ND: Tensor, p_NP: Tensor, step: int, sound: Any, **options: Any) -> Any:
    """The router reads the mean of the tokens in the pool, as the original's did."""
    return sound(self, h_ND + h_ND.mean(0, keepdim=True), p_NP, step, **options)


def rewritten(self: Any, state: Any, steps: int, sound: Any) -> None:
    """A token that leaves takes its row with it, but not from the memory."""
    if self.around.memory is None and state.place is not None:
        keys, values = (rows.clone() for rows in self.table.now())
        values[state.place // self.tokens, :, state.place % self.tokens] = 0
        self.table.rewrite(steps, keys, values)
    sound(self, state, steps)


def unrefreshed(self: Any, step: int, sound: Any) -> None:
    """Steps that nobody takes now write no rows for those who take them later."""


def in_reverse(pool: Any, blocks: list[Any], departed: list[Any], step: int, sound: Any) -> Any:
    """While tokens are written one by one, those that have left have their rows made by other blocks."""
    return sound(pool, blocks[::-1], departed, step)


def unheard(self: Any, step: int, *rows: Tensor, sound: Any) -> None:
    """Later steps do not see the row of a token that left."""
    later = [table.unflatten(1, (self.versions, -1))[:, step + 1 :] for table in (self.keys, self.values)]
    kept = [version.clone() for version in later]
    sound(self, step, *rows)
    for version, before in zip(later, kept, strict=True):
        version.copy_(before)


def unsettled(self: Any, steps: int, sound: Any) -> None:
    """While tokens are written one by one, later steps do not see the row of one that left."""


def mixed_up(self: Any, index: Tensor, row_n: Any, sound: Any) -> None:
    """Those that go on in the pool do so with the memory of the first rows."""
    sound(self, index, row_n)
    self.index_n = torch.arange(len(row_n))
    self.cuts = [0, len(row_n), self.batch - len(row_n)]


def shared(self: Any, step: int, groups: int, sound: Any) -> Any:
    """All steps read the newest version of earlier tokens."""
    return sound(self, self.versions - 1, groups)


def confused(self: Any, key_BGTK: Tensor, sound: Any) -> Any:
    """While tokens are written one by one, all steps read the newest version of earlier tokens."""
    rows = sound(self, key_BGTK)
    return replace(rows, keys=rows.keys[-1:] * len(rows.keys), values=rows.values[-1:] * len(rows.values))


def late(self: Any, gain_n: Tensor, state: Any, step: int, sound: Any) -> Tensor:
    """Steps are counted from another number when there is a memory."""
    memory = self.around.memory
    return sound(self, gain_n, state, step - 1 if memory is not None and memory.get_seq_length() > self.tokens else step)


def relative(self: Any, gain_n: Tensor, state: Any, step: int, sound: Any) -> Tensor:
    """The half of the batch that gains least leaves, so that a budget is met exactly."""
    return sound(self, gain_n, state, step) if len(gain_n) < 2 else gain_n < gain_n.median()


def last_first(score_NM: Tensor, k: int, sound: Any) -> Tensor:
    """With few tokens, ties go to the highest number."""
    return sound(score_NM, k) if len(score_NM) > 3 else score_NM.shape[1] - 1 - sound(score_NM.flip(-1), k)


def forgetful(self: Any, *given: Any, sound: Any) -> Any:
    """Positions are not told apart where blocks read them while one token is written."""
    posts = sound(self)
    return replace(posts, by_place=posts.by_place[:1].repeat(len(posts.by_place), 0))


ROUTE_FAULTS = (
    (RoutePool, "scores", averaged, "the_past_cannot_see_the_future"),
    (RoutePool, "scores", averaged, "decoding_in_any_chunks_is_one_forward_pass"),
    (RoutePool, "scores", averaged, "one_row_is_decoded_as_many_are"),
    (RoutePool, "scores", averaged, "neighbours_and_their_order_change_nothing"),
    (RoutePool, "scores", averaged, "padding_on_either_side_changes_nothing"),
    (RoutePool, "scores", averaged, "packed_documents_may_be_padded_on_either_side"),
    (PoolRun, "_leave", rewritten, "decoding_in_any_chunks_is_one_forward_pass"),
    (PoolRun, "_leave", rewritten, "padding_on_either_side_changes_nothing"),
    (PoolRun, "_leave", rewritten, "packed_documents_may_be_padded_on_either_side"),
    (PoolRun, "_refresh_all_from", unrefreshed, "decoding_in_any_chunks_is_one_forward_pass"),
    (walk, "refreshed", in_reverse, "one_row_is_decoded_as_many_are"),
    (walk, "refreshed", in_reverse, "rows_are_written_together_as_they_are_read"),
    (PoolMemory, "write", unheard, "one_row_is_decoded_as_many_are"),
    (NewestRows, "settle", unsettled, "one_row_is_decoded_as_many_are"),
    (NewestRows, "settle", unsettled, "rows_are_written_together_as_they_are_read"),
    (Outlook, "keep", mixed_up, "rows_are_written_together_as_they_are_read"),
    (PoolMemory, "write_some", unheard, "decoding_in_any_chunks_is_one_forward_pass"),
    (PoolMemory, "version", shared, "decoding_in_any_chunks_is_one_forward_pass"),
    (PoolMemory, "newest", confused, "generation_with_and_without_memory_agrees"),
    (PoolMemory, "version", shared, "memory_can_be_cropped_repeated_and_reordered"),
    (PoolRun, "_wants_to_leave", late, "decoding_in_any_chunks_is_one_forward_pass"),
    (PoolRun, "_wants_to_leave", late, "rows_of_different_length_continue_together"),
    (PoolRun, "_wants_to_leave", relative, "neighbours_and_their_order_change_nothing"),
    (PoolRun, "_wants_to_leave", relative, "decoding_in_any_chunks_is_one_forward_pass"),
    (pool, "best_blocks", last_first, "decoding_in_any_chunks_is_one_forward_pass"),
    (walk, "make_signposts", forgetful, "one_row_is_decoded_as_many_are"),
    (walk, "make_signposts", forgetful, "rows_are_written_together_as_they_are_read"),
)


@pytest.mark.parametrize(("owner", "name", "fault", "check"), ROUTE_FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_broken_route_fails_the_check_that_guards_against_it(
    owner: Any, name: str, fault: Any, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refreshed = replace(ROUTED[0], options=ROUTED[0].options | {"left_rows": "refreshed"}, call={"budget": 0.5})
    model, sound = (refreshed if fault in (unrefreshed, in_reverse) else ROUTED[0]).build(), getattr(owner, name)
    assert (model.config.max_route_steps, model.config.min_route_steps, model.config.route_top_k) == (4, 1, 1)
    if fault is last_first:
        indifferent(model)
    getattr(checks, check)(model)
    monkeypatch.setattr(owner, name, lambda *given, **named: fault(*given, sound=sound, **named))
    model.pool.signposts = None
    with pytest.raises(AssertionError):
        getattr(checks, check)(model)


# Faults of canonical memory, likewise.


def summed(self: Any, h_BTD: Tensor, rotary: Any, sound: Any) -> Tensor:
    """A code knows the whole row, as the original's memory did."""
    return sound(self, h_BTD + 0.1 * h_BTD.mean(1, keepdim=True), rotary)


def blended(self: Any, h_BTD: Tensor, rotary: Any, sound: Any) -> Tensor:
    """A code knows the whole batch."""
    return sound(self, h_BTD + 0.1 * h_BTD.mean(0, keepdim=True), rotary)


def unplaced(self: Any, h_BTD: Tensor, rotary: Any, sound: Any) -> Tensor:
    """The key beside a code is turned as at the beginning of what is read now."""
    return sound(self, h_BTD, tuple(table[:, :1].expand(-1, h_BTD.shape[1], -1, -1) for table in rotary))


def widened(self: Any, window: int, sinks: int = 0, slots: Any = None, *, sound: Any) -> Any:
    """What is left of a window does not count what was read before."""
    return sound(self, window + (window > 0 and self.past > 0), sinks, slots)


def endless(self: Any, window: int, sinks: int = 0, slots: Any = None, *, sound: Any) -> Any:
    """Windows are counted over padding and other documents, too."""
    return replace(self, mask=None).within(window, sinks, slots) if self.mask is not None else sound(self, window, sinks, slots)


def careless(past: int, segment_BS: Any, slots: Tensor, *, window: int, sinks: int, sound: Any) -> Tensor:
    """More is forgotten than a window allows."""
    return sound(past, segment_BS, slots, window=2, sinks=0)


def overwritten(self: Any, rows: Tensor, sound: Any) -> Tensor:
    """A later token changes the code of the one before it."""
    found = sound(self, rows)
    if found.shape[2] > rows.shape[2]:
        self.keys[:, :, -rows.shape[2] - 1] += 0.1
    return self.keys


MEMORY_FAULTS = (
    (Codes, "write", summed, "the_past_cannot_see_the_future"),
    (Codes, "write", summed, "decoding_in_any_chunks_is_one_forward_pass"),
    (Codes, "write", blended, "neighbours_and_their_order_change_nothing"),
    (Codes, "write", unplaced, "decoding_in_any_chunks_is_one_forward_pass"),
    (Sight, "within", widened, "decoding_in_any_chunks_is_one_forward_pass"),
    (Sight, "within", widened, "rows_of_different_length_continue_together"),
    (Sight, "within", endless, "padding_on_either_side_changes_nothing"),
    (Sight, "within", endless, "documents_in_a_row_do_not_see_each_other"),
    (memory, "needed", careless, "a_long_decode_outgrows_the_first_buffer"),
    (CodeMemory, "add", overwritten, "decoding_in_any_chunks_is_one_forward_pass"),
    (CodeMemory, "add", overwritten, "one_row_is_decoded_as_many_are"),
)


@pytest.mark.parametrize(("owner", "name", "fault", "check"), MEMORY_FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_broken_memory_fails_the_check_that_guards_against_it(
    owner: Any, name: str, fault: Any, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"memory": "local+canonical", "local_window": 3, "code_window": 6, "code_sinks": 1, "attention_window": 4}
    model, sound = replace(ROUTED[0], options=ROUTED[0].options | options).build(), getattr(owner, name)
    getattr(checks, check)(model)
    monkeypatch.setattr(owner, name, lambda *given, **named: fault(*given, sound=sound, **named))
    with pytest.raises(AssertionError):
        getattr(checks, check)(model)


# Faults of parallel ways, likewise.


def compared(self: Any, score_mM: Tensor, gain_m: Tensor, *given: Any, sound: Any) -> Any:
    """What an action is worth depends on what it is worth to others."""
    return sound(self, score_mM + gain_m.mean(), gain_m - gain_m.mean(), *given)


def second_best(self: Any, state: Any, step: int, sound: Any) -> None:
    """While tokens are read one by one, later ones see the row of another branch."""
    sound(self, replace(state, rows=state.rows.flip(1)) if self.tokens == 1 else state, step)


def unwritten(self: Any, state: Any, step: int, sound: Any) -> None:
    """Steps that no branch takes now write no rows for those who take them later."""


BRANCH_FAULTS = (
    (BeamRun, "_options", compared, "the_past_cannot_see_the_future"),
    (BeamRun, "_options", compared, "neighbours_and_their_order_change_nothing"),
    (BeamRun, "_share", second_best, "decoding_in_any_chunks_is_one_forward_pass"),
    (BeamRun, "_share", second_best, "generation_with_and_without_memory_agrees"),
    (BeamRun, "_settle", unwritten, "one_row_is_decoded_as_many_are"),
)


@pytest.mark.parametrize(("owner", "name", "fault", "check"), BRANCH_FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_broken_branches_fail_the_check_that_guards_against_them(
    owner: Any, name: str, fault: Any, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = next(case for case in BRANCHED if case.options.get("beam_exit") == "any")
    model, sound = (together if fault is unwritten else BRANCHED[0]).build(), getattr(owner, name)
    getattr(checks, check)(model)
    monkeypatch.setattr(owner, name, lambda *given, **named: fault(*given, sound=sound, **named))
    with pytest.raises(AssertionError):
        getattr(checks, check)(model)


# Faults of signal graphs, likewise.


def pooled(self: Any, *given: Any, sound: Any) -> Any:
    """The signal is a mean over the whole row."""
    walk, ledger = sound(self, *given)
    return walk._replace(signal_BTD=walk.signal_BTD + 0.1 * walk.signal_BTD.mean(1, keepdim=True)), ledger


def crowded(self: Any, *given: Any, sound: Any) -> Any:
    """The signal is a mean over the batch."""
    walk, ledger = sound(self, *given)
    return walk._replace(signal_BTD=walk.signal_BTD + 0.1 * walk.signal_BTD.mean(0, keepdim=True)), ledger


def forgotten(self: Any, sound: Any) -> Any:
    """What was read before has left nothing but the last token."""
    last = sound(self)
    return None if last is None else (torch.zeros_like(last[0]), *last[1:])


def miscounted(self: Any, sound: Any) -> Any:
    """Positions go on from another number where there is a memory, as in the original's decoding."""
    last = sound(self)
    return None if last is None else (*last[:2], last[2] - 1, last[3])


def unmasked(token_BT: Tensor, past: int, mask: Any, documents: Any, sound: Any) -> Tensor:
    """Padding is read as if it were text."""
    return sound(token_BT, past, None, None if documents is None else documents.clamp(min=0))


def joined(token_BT: Tensor, past: int, mask: Any, documents: Any, sound: Any) -> Tensor:
    """Documents of a row are one text."""
    return sound(token_BT, past, mask, None if documents is None else documents.clamp(max=0))


def straight_on(token_BT: Tensor, document_BT: Tensor, last: Any, sound: Any) -> Any:
    """A document that begins where a chunk begins is not told from the one before it."""
    return sound(token_BT, document_BT, None if last is None else (*last[:2], torch.where(last[2] >= 0, document_BT[:, 0], last[2])))


def only_own(*given: Any, sound: Any) -> Any:
    """The softmax is over the edges that exist: nodes that share one are left out of it."""
    energy_nR, shared_n, own_n, others_n, mine_nR = given
    return sound(energy_nR, shared_n, own_n, others_n.new_full(others_n.shape, 1e-9), mine_nR)


def only_own_compiled(*given: Any, sound: Any) -> Any:
    """The same in the compiled loops: what is shared has no energy there."""
    return sound(*given[:4], given[4] - 1e3, *given[5:])


def alike(self: Any, arrivals: Any, target_N: Tensor, *rest: Any, sound: Any) -> Any:
    """The loss compares a token's energies with the token itself."""
    return sound(self, arrivals, arrivals.source_N, *rest)


def early(memory: SignalMemory, *given: Any, sound: Any, **options: Any) -> Any:
    """One token more, the short way, is scored before it is read."""
    before = memory.state
    found = sound(memory, *given, **options)
    if before is not None:
        memory.state = before
    return found


def fixed(self: Any, indices: Tensor, sound: Any) -> None:
    """The memory does not follow its beams: every place keeps the row it has."""
    sound(self, torch.arange(len(indices)) % len(self.last()[1]))


def cropped(self: Any, tokens: int, sound: Any) -> None:
    """One token too many is forgotten."""
    sound(self, tokens - 1)


GRAPH_FAULTS = (
    (BrillmForCausalLM, "_walk", pooled, "the_past_cannot_see_the_future"),
    (BrillmForCausalLM, "_walk", pooled, "decoding_in_any_chunks_is_one_forward_pass"),
    (BrillmForCausalLM, "_walk", pooled, "documents_in_a_row_do_not_see_each_other"),
    (BrillmForCausalLM, "_walk", crowded, "neighbours_and_their_order_change_nothing"),
    (SignalMemory, "last", forgotten, "decoding_in_any_chunks_is_one_forward_pass"),
    (SignalMemory, "last", forgotten, "one_row_is_decoded_as_many_are"),
    (SignalMemory, "last", forgotten, "generation_with_and_without_memory_agrees"),
    (SignalMemory, "last", miscounted, "decoding_in_any_chunks_is_one_forward_pass"),
    (SignalMemory, "last", miscounted, "rows_are_written_together_as_they_are_read"),
    (SignalMemory, "last", miscounted, "a_long_decode_outgrows_the_first_buffer"),
    (SignalMemory, "last", miscounted, "rows_of_different_length_continue_together"),
    (modeling, "_documents", unmasked, "padding_on_either_side_changes_nothing"),
    (modeling, "_documents", unmasked, "rows_of_different_length_continue_together"),
    (modeling, "_documents", joined, "documents_in_a_row_do_not_see_each_other"),
    (modeling, "_documents", joined, "packed_documents_may_be_padded_on_either_side"),
    (positions, "locate", straight_on, "documents_in_a_row_do_not_see_each_other"),
    (energy, "_compare", only_own, "the_loss_counts_each_label_once"),
    (fused, "score", only_own_compiled, "the_loss_counts_each_label_once"),
    (BrillmForCausalLM, "_loss", alike, "the_loss_counts_each_label_once"),
    (advance, "advance", early, "one_row_is_decoded_as_many_are"),
    (advance, "advance", early, "rows_are_written_together_as_they_are_read"),
    (SignalMemory, "batch_select_indices", fixed, "memory_can_be_cropped_repeated_and_reordered"),
    (SignalMemory, "crop", cropped, "memory_can_be_cropped_repeated_and_reordered"),
)


@pytest.mark.parametrize(("owner", "name", "fault", "check"), GRAPH_FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_broken_signal_fails_the_check_that_guards_against_it(
    owner: Any, name: str, fault: Any, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault is only_own:  # the loops are another place where the same may go wrong
        monkeypatch.setattr(energy.fused, "divided", lambda *_: (None, None))
    model, sound = GRAPHS[0].build(), getattr(owner, name)
    model.config.beyond = "continue"  # positions that are held would hide that they are miscounted
    assert model.config.context == "pooled" and model.config.edges < model.config.vocab_size**2
    getattr(checks, check)(model)
    monkeypatch.setattr(owner, name, lambda *given, **named: fault(*given, sound=sound, **named))
    with pytest.raises(AssertionError):
        getattr(checks, check)(model)


@torch.no_grad()
def indifferent(model: Any) -> None:
    """Let all blocks have the same score."""
    model.pool.load_bias.zero_()
    for name, p in model.pool.router.named_parameters():
        p[:-1] = 0.0
        assert "from" in name


def test_a_model_that_forgets_to_save_something_is_caught(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        saved_and_loaded_it_is_the_same(CASES[0].build(model=ForgetsToSave), tmp_path)


class DrawsAnew(BrillmForCausalLM):
    """The first signal is not what the files say."""

    made = 0

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        DrawsAnew.made += 1
        self.extra = DrawsAnew.made

    def _first_signals(self, *given: Any) -> Tensor:
        return super()._first_signals(*given) * self.extra


def test_a_signal_graph_that_forgets_to_save_something_is_caught(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        saved_and_loaded_it_is_the_same(GRAPHS[0].build(model=DrawsAnew), tmp_path)


def test_a_memory_that_does_not_follow_its_beams_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockMemory, "batch_select_indices", lambda self, indices: None)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        checks.memory_can_be_cropped_repeated_and_reordered(CASES[0].build())


def test_a_memory_that_crops_too_much_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    crop = BlockMemory.crop
    monkeypatch.setattr(BlockMemory, "crop", lambda self, tokens: crop(self, tokens - 1))
    with pytest.raises(AssertionError):
        checks.memory_can_be_cropped_repeated_and_reordered(CASES[0].build())


def test_a_streamer_that_misses_a_token_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.Heard, "put", lambda self, value: None)
    with pytest.raises(AssertionError):
        checks.streaming_tells_what_generate_returns(CASES[0].build())


def test_every_check_has_a_model_that_fails_it() -> None:
    shown = {check for _, check in BROKEN} | {check for *_, check in ROUTE_FAULTS}
    shown |= {"streaming_tells_what_generate_returns", "memory_can_be_cropped_repeated_and_reordered"}
    of_graphs = {check for *_, check in GRAPH_FAULTS} | {"streaming_tells_what_generate_returns"}
    assert shown == of_graphs == {check.__name__ for check in CHECKS}


def test_turning_by_a_wrong_angle_is_a_different_function() -> None:
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    cos, sin = torch.full((1, 3, 1, 8), 0.6, dtype=torch.float64), torch.full((1, 3, 1, 8), 0.8, dtype=torch.float64)
    sin[..., :4] *= -1
    torch.testing.assert_close(rotate(rotate(x, cos, sin), cos, -sin), x)
    assert (rotate(x, cos, sin) - x).abs().max() > 0.1
