"""`pathlm bench memory` runs, counts the tensors that exist, and its models decode from the same memory every time."""

import json
import sys
from pathlib import Path

import pytest
import torch

from pathlm.bench import bench
from pathlm.models.brian.presets import cache_numbers_per_token

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import remembered
from benchmarks.memory import writer

TINY = remembered.EXTENTS["tiny"]


def told(*arguments):
    """The record of a run, and its rows by case."""
    found = bench("memory", ["--tiny", "--repeats", "1", "--threads", "1", *arguments])
    return found, {row["case"]: row for row in found["rows"]}


def test_the_bytes_of_caches_are_those_of_tensors_that_exist(tmp_path):
    found, rows = told("--only", "cache", "--json", str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text()) == found
    for name in (remembered.PLAIN, *remembered.memories(64)):
        lasting, held, spare = (rows[f"cache of 768 tokens, {name}, {kind}"]["median"] for kind in ("lasting", "held", "spare room"))
        assert lasting == 4 * cache_numbers_per_token(remembered.of_size(TINY, name).config)
        assert spare > 0 and (held > lasting if "window" in name else held == lasting)
    assert found["ratios"]["cache of 768 tokens, canonical, lasting ÷ plain"]["median"] == pytest.approx((4 * 64 + 16 + 4 * 16) / (12 * 64))


def test_spare_room_is_what_buffers_have_beside_what_they_hold():
    model = remembered.as_trained(TINY, remembered.CANONICAL, "cpu").eval()
    *_, memory = remembered.read(model, torch.zeros(2, 20, dtype=torch.long), 10)
    held = {layer: sum(t.numel() for t in (layer.keys, layer.values)) for layer in memory.layers}
    assert memory.bytes() == 4 * sum(held.values())
    assert remembered.allocated(memory) == 4 * sum(numbers // layer.held * layer.capacity for layer, numbers in held.items())


def test_a_prefill_is_timed_beside_the_plain_decoder():
    found, rows = told("--only", "prefill")
    assert rows["prefill of 24 tokens, plain"]["tokens/s"] > 0
    assert list(found["ratios"]) == ["prefill of 24 tokens, speed, canonical, post blocks too ÷ plain"]


@pytest.mark.parametrize("name", [remembered.CANONICAL, remembered.MIXED.format(64)])
def test_a_stream_keeps_what_it_kept_at_its_beginning(name):
    first, *later = remembered.streamed(remembered.Extent(**vars(TINY) | {"stream": (1_200, 1_800, 2_400)}), name, "cpu")
    # The peak is for a process of its own to tell (below): one that has been larger before does not rise.
    assert first["tokens"] == 1_200 and first["held"] <= first["allocated"]
    assert all(mark["allocated"] <= 1.05 * first["allocated"] for mark in later)
    config = remembered.as_trained(TINY, name, "cpu", **remembered.windowed(TINY, name)).config
    assert cache_numbers_per_token(config) == 0


def test_streams_are_measured_in_processes_of_their_own():
    found, rows = told("--only", "stream")
    assert rows["stream with windows, canonical, 900 tokens: peak of the process"]["median"] > 0
    assert len(found["ratios"]) == 4


def test_training_and_decoding_are_timed_beside_rows():
    found, rows = told("--only", "train")
    assert rows["training step, canonical"]["tokens/s"] > 0
    assert "training step, local+canonical, window 64 ÷ local" in found["ratios"]
    found, rows = told("--only", "decode", "--new", "2", "--batch", "2")
    assert rows["decoding after 70 tokens, batch 2, canonical"]["tokens/s"] > 0
    assert {"speed, canonical ÷ local", "speed, local ÷ plain"} <= {name.split("batch 2, ")[1] for name in found["ratios"]}


@pytest.mark.parametrize("name", [remembered.LOCAL, remembered.CANONICAL, remembered.MIXED.format(64)])
def test_decoding_goes_on_from_the_same_memory_every_time(name):
    model = remembered.as_trained(TINY, name, "cpu").eval()
    write = writer(model, torch.arange(300)[None] % 64, 5)
    assert torch.equal(write(), write())
