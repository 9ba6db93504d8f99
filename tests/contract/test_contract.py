"""The contract of every model: run for each family and option, and shown to fail for models that break it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BRANCHED, CASES, RELEASED, ROUTED, Case, ids
from checks import CHECKS, one_row_is_decoded_as_many_are, saved_and_loaded_it_is_the_same
from torch.utils.data import Dataset

SLOW_OR_DISCRETE = ("generation", "streaming", "a_long_decode")
SINGLE = [check for check in CHECKS if not check.__name__.startswith(SLOW_OR_DISCRETE)]
LATER = ROUTED[1::2] + BRANCHED[1::2]
"""Half of the routed cases wait for a release where float64 has shown their routes already."""
EVERY_OTHER = [pytest.param(case, marks=pytest.mark.slow) if case in LATER else case for case in CASES]
PRECISE = [
    pytest.param(case, check, id=f"{case}-{check.__name__}", marks=[pytest.mark.slow] if case in LATER and check not in SINGLE else [])
    for case in CASES
    for check in CHECKS
]


@pytest.mark.parametrize(("case", "check"), PRECISE)
def test_the_contract_holds_in_float64(case: Case, check: Callable[[Any], None]) -> None:
    check(case.build())


@pytest.mark.parametrize("check", SINGLE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", EVERY_OTHER, ids=str)
def test_the_contract_holds_in_float32(case: Case, check: Callable[[Any], None]) -> None:
    check(case.build(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", EVERY_OTHER, ids=str)
def test_a_saved_model_loads_as_the_same(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    saved_and_loaded_it_is_the_same(case.build(dtype), tmp_path)


STEPWISE = (
    "decoding_in_any_chunks_is_one_forward_pass",
    "one_row_is_decoded_as_many_are",
    "rows_are_written_together_as_they_are_read",
    "a_long_decode_outgrows_the_first_buffer",
    "padding_on_either_side_changes_nothing",
    "rows_of_different_length_continue_together",
    "documents_in_a_row_do_not_see_each_other",
    "packed_documents_may_be_padded_on_either_side",
    "generation_with_and_without_memory_agrees",
    "memory_can_be_cropped_repeated_and_reordered",
)
"""Checks that compare decoding with one forward pass, which the released arithmetic makes two functions."""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_released_arithmetic_is_exempt_from_stepwise_equals_full_alone(check: Callable[[Any], None]) -> None:
    if check.__name__ in STEPWISE:
        with pytest.raises(AssertionError):
            check(RELEASED.build())
    else:
        check(RELEASED.build())


def test_a_released_model_loads_as_the_same_and_its_padding_and_documents_change_nothing(tmp_path: Path) -> None:
    model, row = RELEASED.build(), ids(1, 5)
    saved_and_loaded_it_is_the_same(model, tmp_path)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), row, row[:, :4]), dim=1)
    documents = torch.tensor([[-1] * 3 + [4] * 5 + [9] * 4])
    for use_cache in (False, True):
        alone = model(row, use_cache=use_cache).logits
        whole = model(padded, document_ids=documents, use_cache=use_cache).logits
        torch.testing.assert_close(whole[:, 3:8], alone, rtol=0, atol=1e-10)
        torch.testing.assert_close(whole[:, 8:], alone[:, :4], rtol=0, atol=1e-10)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_weights_loaded_into_a_model_that_has_decoded_are_used_at_once(assign: bool) -> None:
    """What was derived from the weights before must go with them."""
    model = ROUTED[0].build()
    one_row_is_decoded_as_many_are(model)
    opposite = {name: -weight if "router" in name else weight for name, weight in model.state_dict().items()}
    model.load_state_dict(opposite, assign=assign)
    one_row_is_decoded_as_many_are(model)


class Rows(Dataset):
    """One row eight times, for the stock Trainer: the loss of any batch is the loss of the row."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = ids(1)[0]
        return {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}


@pytest.mark.parametrize("case", EVERY_OTHER, ids=str)
def test_the_stock_trainer_runs_two_steps(case: Case, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = case.build(torch.float32)
    expected = model(ids(1), labels=ids(1)).loss.item()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()(ids(1), labels=ids(1)).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    routed = getattr(model.config, "pool_blocks", 0) > 0
    assert routed or reached == before.keys()
    model.zero_grad()
    # A step so small that no token takes another route, or the loss might rise.
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-6, "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, **options)
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses == [pytest.approx(expected, abs=1e-3), losses[1]] and losses[1] < losses[0]
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} >= reached
