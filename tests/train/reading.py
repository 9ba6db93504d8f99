"""What a run left behind, without the numbers that a clock made."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(("time/", "memory/"))} for row in rows]


def assert_same_end(one: Path, other: Path) -> None:
    """Both runs logged the same numbers and ended with the same weights, optimizer and random generators, bit for bit."""
    assert metrics(one) == metrics(other)
    a, b = ((run / "checkpoints" / "latest") for run in (one, other))
    assert a.resolve().name == b.resolve().name
    torch.testing.assert_close(load_file(a / "model.safetensors"), load_file(b / "model.safetensors"), rtol=0, atol=0)
    one_state, other_state = (torch.load(c / "training_state.pt", weights_only=True) for c in (a, b))
    assert one_state["state"] == other_state["state"]
    torch.testing.assert_close(one_state["optimizer"], other_state["optimizer"], rtol=0, atol=0)
    assert torch.equal(one_state["random"][0]["torch"], other_state["random"][0]["torch"])
