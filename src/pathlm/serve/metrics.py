"""What a server counts, as the text that Prometheus reads."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper ends of the intervals of durations."""
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters, and durations in intervals, by name and labels. Names and labels are ours alone, so that there are ever as many."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, dict[Labels, float | int]] = defaultdict(lambda: defaultdict(float))
        self._durations: dict[str, dict[Labels, tuple[list[int], float]]] = defaultdict(dict)
        self._help: dict[str, str] = {}

    def describe(self, name: str, text: str) -> None:
        """Say what a name stands for."""
        self._help[name] = text

    def add(self, name: str, amount: float | int = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name][tuple(labels.items())] += amount

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Note a duration."""
        with self._lock:
            counts, total = self._durations[name].setdefault(tuple(labels.items()), ([0] * (len(SECONDS) + 1), 0.0))
            counts[bisect_left(SECONDS, seconds)] += 1
            self._durations[name][tuple(labels.items())] = (counts, total + seconds)

    def text(self, gauges: Iterable[tuple[str, Labels, float | int]] = ()) -> str:
        """Return everything in Prometheus' text format, with `gauges` as they are now."""
        now: dict[str, dict[Labels, float | int]] = defaultdict(dict)
        for name, labels, value in gauges:
            now[name][labels] = value
        with self._lock:
            return "\n".join((*self._written(self._counts, "counter"), *self._written(now, "gauge"), *self._histograms(), ""))

    def _written(self, values: dict[str, dict[Labels, float | int]], kind: str) -> Iterator[str]:
        for name, by_labels in values.items():
            yield from self._head(name, kind)
            yield from (f"{name}{_shown(labels)} {value:g}" for labels, value in by_labels.items())

    def _histograms(self) -> Iterator[str]:
        for name, by_labels in self._durations.items():
            yield from self._head(name, "histogram")
            for labels, (counts, total) in by_labels.items():
                below = 0
                for end, count in zip((*map(str, SECONDS), "+Inf"), counts, strict=True):
                    below += count
                    yield f"{name}_bucket{_shown((*labels, ('le', end)))} {below}"
                yield f"{name}_sum{_shown(labels)} {total:g}"
                yield f"{name}_count{_shown(labels)} {below}"

    def _head(self, name: str, kind: str) -> Iterator[str]:
        if name in self._help:
            yield f"# HELP {name} {self._help[name]}"
        yield f"# TYPE {name} {kind}"


def _shown(labels: Labels) -> str:
    escaped = ((name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for name, value in labels)
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}" if labels else ""
