"""Whole numbers from a counter-based stream: the same on any machine and any NumPy, at any index, without the ones before."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

import numpy as np
from numpy.random import Philox

T = TypeVar("T")

_AT_ONCE = 64


class Draws:
    """Uniform draws that are a pure function of `key` and of the index given to `seek`.

    Only the raw 64-bit output of Philox is used: NumPy promises that it never changes, which it does not promise for the methods of
    `Generator`. A bounded number is the high half of a 128-bit product; its bias is below n / 2⁶⁴.
    """

    def __init__(self, *key: object) -> None:
        digest = blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
        self._philox = Philox(key=int.from_bytes(digest, "little"))
        self._state = self._philox.state
        self._ready: list[int] = []

    def seek(self, index: int) -> None:
        """Start the sub-stream `index`, 0 to 2⁶⁴ − 1; each has 2⁶⁴ blocks of its own."""
        self._state["state"]["counter"][:] = (0, index, 0, 0)
        self._state["buffer_pos"] = 4  # nothing left of what was buffered at another index
        self._philox.state = self._state
        self._ready = self._philox.random_raw(_AT_ONCE).tolist()

    def below(self, bound: int) -> int:
        """Return a number from 0 to `bound` − 1."""
        if not self._ready:
            self._ready = self._philox.random_raw(_AT_ONCE).tolist()
        return (self._ready.pop() * bound) >> 64

    def between(self, low: int, high: int) -> int:
        """Return a number from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def pick(self, items: Sequence[T]) -> T:
        """Return one of the items."""
        return items[self.below(len(items))]

    def many(self, items: Sequence[T], count: int) -> list[T]:
        """Return `count` of fewer than 2³² items, each drawn from all of them; much faster than one after another."""
        if not count:
            return []
        raw = self._philox.random_raw(count)
        return [items[i] for i in (((raw >> np.uint64(32)) * np.uint64(len(items))) >> np.uint64(32)).tolist()]

    def several(self, items: Sequence[T], count: int) -> list[T]:
        """Return `count` different items in random order (a shuffled copy when `count` is all of them)."""
        rest = list(items)
        size, ready = len(rest), self._ready
        while len(ready) < count:
            ready[:0] = self._philox.random_raw(_AT_ONCE).tolist()
        for i in range(count):
            j = i + ((ready.pop() * (size - i)) >> 64)
            rest[i], rest[j] = rest[j], rest[i]
        return rest[:count]
