"""What every benchmark shares: interleaved repeats, medians, ratios of paired runs, the machine they ran on, and how they are shown.

A benchmark is a module of this folder with `main(argv: list[str]) -> dict`:

    from benchmarks.timing import arguments, environment, interleaved, ratio, show

    def main(argv):
        options = arguments(__doc__).parse_args(argv)
        seconds = interleaved({"ours": ours, "theirs": theirs}, repeats=options.repeats)
        rows = [{"case": name, "median s": statistics.median(times)} for name, times in seconds.items()]
        return show("training step", rows, {"ours ÷ theirs": ratio(seconds["ours"], seconds["theirs"])}, options=options)
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, with the quartiles that say how far to trust it."""

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.lower:.3f} to {self.upper:.3f})"


def interleaved(cases: Mapping[str, Callable[[], object]], *, repeats: int = 7, warmup: int = 1) -> dict[str, list[float]]:
    """Return `repeats` wall times in seconds for each case, taken in turns so that a slow minute hits every case alike.

    Every second round runs in reverse order, so that no case is always the one that follows the same neighbour. On CUDA, each time includes
    waiting for the device.
    """
    for _ in range(warmup):
        for call in cases.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats):
        order = list(cases) if turn % 2 == 0 else list(reversed(cases))
        for name in order:
            _synchronize()
            start = time.perf_counter()
            cases[name]()
            _synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Divide the runs pair by pair (the i-th of each were neighbours in time) and return median and quartiles."""
    pairs = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    if len(pairs) < 2:
        return Ratio(pairs[0], pairs[0], pairs[0])
    lower, _, upper = statistics.quantiles(pairs, n=4, method="inclusive")
    return Ratio(statistics.median(pairs), lower, upper)


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge a number: processor, cores, threads, device, versions, date."""
    record: dict[str, Any] = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "cpu": _processor(), "cores": len(os.sched_getaffinity(0))}
    record |= {"python": platform.python_version()}
    for package in ("pathlm", "torch", "transformers", "tokenizers"):
        with suppress(PackageNotFoundError):
            record[package] = version(package)
    torch = sys.modules.get("torch")
    if torch is not None:
        record["threads"] = torch.get_num_threads()
        record["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return record


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options every benchmark has: `--repeats N`, `--json FILE`."""
    parser = argparse.ArgumentParser(prog="pathlm bench", description=(description or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each case, taken in turns")
    parser.add_argument("--json", type=Path, default=None, help="also write the result to this file")
    return parser


def show(title: str, rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, Ratio], *, options: argparse.Namespace) -> dict[str, Any]:
    """Print rows and ratios as tables with the machine below, write JSON where `--json` asks, and return the whole record."""
    machine = environment()
    result = {"benchmark": title, "rows": [dict(row) for row in rows], "ratios": {name: asdict(r) for name, r in ratios.items()}}
    result["environment"] = machine
    console = Console()
    if rows:
        table = Table(title=title, title_justify="left")
        for number, name in enumerate(rows[0]):
            table.add_column(name, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
        console.print(table)
    for name, value in ratios.items():
        console.print(f"{name}: [bold]{value}[/bold]  median of paired runs (quartiles)", highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None), style="dim", highlight=False)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}" if isinstance(value, float) else str(value)
    )


def _synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def _processor() -> str:
    """Return the processor's name; the architecture where the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
