"""Models that go wrong only where tokens are written one by one and read codes, alone or beside rows: the contract must catch each one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import checks
import pytest
import torch
from cases import ROUTED
from test_contract_can_fail import mixed_up
from torch import Tensor

from pathlm.models.brian.memory import NewestRows
from pathlm.models.brian.outlook import Outlook


def sightless(self: Any, around: Any, like: Tensor, sound: Any) -> Any:
    """Everything that is remembered is read, whatever the window."""
    return torch.zeros_like(sound(self, around, like))


def as_another(self: Any, number: int, *given: Any, sound: Any) -> Any:
    """What codes tell is heard as by another block."""
    return sound(self, (number + 1) % 2, *given)


def asking_as_another(self: Any, number: int, block: Any, x_nD: Tensor, sound: Any) -> Any:
    """A block's queries are put to codes as another's."""
    qkv, _ = sound(self, number, block, x_nD)
    return qkv, self.codes.ask((number + 1) % 2, qkv[:, : self.heads])


def louder(self: Any, query: Tensor, *tables: Any, sound: Any) -> Tensor:
    """Codes and rows are weighed by different scales."""
    codes = self.codes.width
    return sound(self, torch.cat((2 * query[..., :codes], query[..., codes:]), dim=-1), *tables)


def unwritten(self: Any, step: int, *given: Any, sound: Any) -> None:
    """A token's own row is that of the step before."""
    if step == 0:
        sound(self, step, *given)


ALONE, TOGETHER = "one_row_is_decoded_as_many_are", "rows_are_written_together_as_they_are_read"
WALK_FAULTS = (
    *((Outlook, "_mask", sightless, check) for check in (ALONE, TOGETHER)),
    *((Outlook, "heard", as_another, check) for check in (ALONE, TOGETHER)),
    *((Outlook, "project", asking_as_another, check) for check in (ALONE, TOGETHER)),
    (Outlook, "keep", mixed_up, TOGETHER),
)


@pytest.mark.parametrize("kept", ["canonical", "local+canonical"])
@pytest.mark.parametrize(("owner", "name", "fault", "check"), WALK_FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_broken_way_through_codes_fails_the_check_that_guards_against_it(
    owner: Any, name: str, fault: Any, check: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(owner, name, fault, check, kept, monkeypatch)


@pytest.mark.parametrize(
    ("owner", "name", "fault", "check"),
    [(Outlook, "_mixed", louder, ALONE), (Outlook, "_mixed", louder, TOGETHER), (NewestRows, "write", unwritten, ALONE)],
)
def test_a_broken_way_through_rows_and_codes_fails_the_check_that_guards_against_it(
    owner: Any, name: str, fault: Any, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(owner, name, fault, check, "local+canonical", monkeypatch)


def broken(owner: Any, name: str, fault: Any, check: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that a model with this memory passes a check, and fails it with the fault."""
    options = {"memory": kept, "code_window": 5, "code_sinks": 1, "attention_window": 4}
    options |= {"local_window": 3} if kept == "local+canonical" else {}
    model, sound = replace(ROUTED[0], options=ROUTED[0].options | options).build(), getattr(owner, name)
    getattr(checks, check)(model)
    monkeypatch.setattr(owner, name, lambda *given, **named: fault(*given, sound=sound, **named))
    with pytest.raises(AssertionError):
        getattr(checks, check)(model)
