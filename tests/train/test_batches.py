import time

import numpy as np
import pytest
import torch
from fake_family import FakeRows

from pathlm.train.batches import Share, read, stream, targets


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_rows", [1, 2, 4, 100])
@pytest.mark.parametrize("count", [5, 8, 13])
def test_processes_share_the_rows_of_a_step_exactly_and_in_equally_many_pieces(count, micro_rows, world):
    slices = [Share(rank, world, micro_rows).slices(40, count) for rank in range(world)]
    rows = [row for pieces in slices for begin, size in pieces for row in range(begin, begin + size)]
    assert rows == list(range(40, 40 + count))
    assert len({len(pieces) for pieces in slices}) == 1
    sizes = [size for pieces in slices for _, size in pieces]
    assert max(sizes) <= micro_rows


def test_the_last_micro_batch_is_the_smaller_one():
    assert Share(0, 1, 4).slices(0, 10) == [(0, 4), (4, 4), (8, 2)]


def test_a_process_with_nothing_left_computes_a_row_that_does_not_count():
    batch = read(FakeRows(), 0, 3, Share(0, 2, 1))
    assert [len(micro["labels"]) for micro in batch.micro] == [1, 1]
    assert batch.counts[0] > 0 and batch.counts[1] == 0
    assert (batch.micro[1]["labels"] != -100).all()  # so that its loss is a number
    assert batch.positions == 3 * 12


def test_targets_are_the_labels_after_the_first_column():
    assert targets(np.array([[5, -100, 7], [-100, 2, 3]])) == 3


def test_reading_ahead_changes_nothing():
    rows, share = FakeRows(), Share(0, 1, 3)
    ahead = list(stream(rows, 16, 8, share, steps=4))
    for i, batch in enumerate(ahead):
        direct = read(rows, 16 + 8 * i, 8, share)
        assert batch.counts == direct.counts
        torch.testing.assert_close(batch.micro, direct.micro)


def test_the_next_batch_is_read_while_this_one_is_used():
    class Slow(FakeRows):
        read_at: list[float] = []  # noqa: RUF012

        def batch(self, start, count):
            self.read_at.append(time.perf_counter())
            return super().batch(start, count)

    batches = stream(Slow(), 0, 2, Share(0, 1, 2), steps=3)
    next(batches)
    deadline = time.perf_counter() + 10
    while len(Slow.read_at) < 2 and time.perf_counter() < deadline:
        time.sleep(0.001)
    assert len(Slow.read_at) == 2  # and not the third
    batches.close()


def test_an_error_while_reading_reaches_the_loop():
    class Broken(FakeRows):
        def batch(self, start, count):
            if start >= 4:
                raise ValueError("shard 3 is gone")
            return super().batch(start, count)

    batches = stream(Broken(), 0, 2, Share(0, 1, 2), steps=3)
    next(batches)
    next(batches)
    with pytest.raises(ValueError, match="shard 3 is gone"):
        next(batches)
