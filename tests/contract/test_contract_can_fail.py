"""Models with the faults of the two originals and others like them: the contract must catch each one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checks
import pytest
import torch
from cases import CASES
from checks import CHECKS, saved_and_loaded_it_is_the_same
from torch import Tensor

from pathlm.models.brian.memory import BlockMemory
from pathlm.models.brian.modeling import BrianForCausalLM
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

    def _loss(self, h_BTD: Tensor, labels_BT: Tensor, count: Any) -> Tensor:
        return super()._loss(h_BTD, labels_BT.roll(1, dims=1), count)


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
    (PredictsItself, "the_loss_counts_each_label_once"),
)


@pytest.mark.parametrize(("model", "check"), BROKEN, ids=lambda v: getattr(v, "__name__", v))
def test_a_broken_model_fails_the_check_that_guards_against_it(model: type[BrianForCausalLM], check: str) -> None:
    with pytest.raises(AssertionError):
        getattr(checks, check)(CASES[0].build(model=model))


def test_a_model_that_forgets_to_save_something_is_caught(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        saved_and_loaded_it_is_the_same(CASES[0].build(model=ForgetsToSave), tmp_path)


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
    shown = {check for _, check in BROKEN} | {"streaming_tells_what_generate_returns", "memory_can_be_cropped_repeated_and_reordered"}
    assert shown == {check.__name__ for check in CHECKS}


def test_turning_by_a_wrong_angle_is_a_different_function() -> None:
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    cos, sin = torch.full((1, 3, 1, 8), 0.6, dtype=torch.float64), torch.full((1, 3, 1, 8), 0.8, dtype=torch.float64)
    sin[..., :4] *= -1
    torch.testing.assert_close(rotate(rotate(x, cos, sin), cos, -sin), x)
    assert (rotate(x, cos, sin) - x).abs().max() > 0.1
