"""Runs side by side: which are comparable at equal parameters, equal training and equal blocks per token, and how far apart they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pathlm.evaluate.recorded import OF_TRAINING, Recorded, check_file, number, read_runs, replace

WITHIN = 0.05
LEVELS = {
    "parameters": "equal parameters",
    "training_flops": "equal training FLOPs",
    "active_blocks": "equal active blocks per token",
}


def run(
    folders: Sequence[Path | str], *, within: float = WITHIN, json_file: Path | str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Line runs up by what they cost and what they lose, all of it as recorded in their folders.

    Args:
        folders: Two or more runs of any family.
        within: Largest share by which two costs may differ to be called equal.
        json_file: Write the result to this file, too.
        console: Where tables appear; nothing is printed without one.

    Returns `runs` (costs, speed and losses of each; None is "not recorded") and `pairs`: for every level and every two runs whether they
    are `comparable`, `why_not`, the `ratio` of their costs, and `differences`, the first one's losses minus the second one's.

    Raises `ValueError` for fewer than two runs and a share out of range, and what `recorded.read` raises for damaged folders.
    """
    if not 0.0 <= within < 1.0:
        raise ValueError(f"within={within}: must lie between 0 and 1, a share by which costs may differ")
    check_file("json", json_file)
    if len(folders) < 2:
        raise ValueError(f"runs={[str(folder) for folder in folders]}: name at least two runs to compare")
    told = [describe(one) for one in read_runs(folders)]
    pairs = [_pair(level, one, other, within=within) for level in LEVELS for one, other in combinations(told, 2)]
    result = {"within": within, "runs": told, "pairs": pairs}
    if json_file is not None:
        replace(Path(json_file), result)
    if console is not None:
        for part in shown(result):
            console.print(part, highlight=False, soft_wrap=isinstance(part, str))
    return result


def describe(one: Recorded) -> dict[str, Any]:
    """Return what a run cost, how fast it was, and what it lost on which text."""
    record = one.record
    return {
        "name": one.name,
        "folder": str(one.folder),
        "kind": one.kind,
        "preset": one.config.get("preset"),
        "parameters": number(record.get("parameters")),
        "training_flops": one.training_flops,
        "active_blocks": one.active_blocks(),
        "tokens": one.tokens,
        "tokens_per_s": one.tokens_per_s,
        "machine": ", ".join(f"{name} {record[name]}" for name in ("device", "processes", "threads") if name in record),
        "cache_bytes_per_token": number(record.get("cache_bytes_per_token")),
        "corpus": record.get("corpus_sha256"),
        "losses": one.losses(),
    }


COSTS = ("parameters", "training_flops", "active_blocks", "tokens", "tokens_per_s", "cache_bytes_per_token")
NO_BLOCKS = ("active_blocks", "graph")
"""What a signal graph does not have, so that it is not missing."""


def _pair(level: str, a: Mapping[str, Any], b: Mapping[str, Any], *, within: float) -> dict[str, Any]:
    found: dict[str, Any] = {"level": level, "one": a["name"], "other": b["name"], "ratio": None, "comparable": False, "differences": []}
    if missing := [told for told in (a, b) if told[level] is None]:
        return found | {"why_not": "; ".join(f"{told['name']}: {_absent(level, told)}" for told in missing)}
    found["ratio"] = ratio = a[level] / b[level] if b[level] else float("inf")
    if not 1 / (1 + within) <= ratio <= 1 + within:
        return found | {"why_not": f"{_share(ratio)} {_NAMES[level]}"}
    if a["corpus"] != b["corpus"]:
        return found | {"why_not": "trained on different text"}
    found["differences"] = _differences(a["losses"], b["losses"])
    if not found["differences"]:
        return found | {
            "why_not": "losses were not measured on the same documents in the same windows: repeat pathlm eval with the same options"
        }
    return found | {"comparable": True, "why_not": None}


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one loss minus the other, and so for bits per byte, for every text that both were measured on alike."""
    found = []
    for split, mine in ours.items():
        its = theirs.get(split)
        if its is not None and its["of"] == mine["of"]:
            bits = None if mine["bits_per_byte"] is None or its["bits_per_byte"] is None else mine["bits_per_byte"] - its["bits_per_byte"]
            found.append({"split": split, "loss": mine["loss"] - its["loss"], "bits_per_byte": bits})
    return found


def shown(result: Mapping[str, Any]) -> Iterator[Table | str]:
    """Yield the result for a terminal: what runs cost, what they lose, and which two may be compared at which level."""
    costs = _table("run", "kind", "parameters", "training\nFLOPs", "blocks\n/token", "tokens\nread", "tokens/s", "cache\nB/token")
    for one in result["runs"]:
        quantities = (readable(one[name]) for name in ("parameters", "training_flops"))
        blocks, cache, speed = (one[name] for name in ("active_blocks", "cache_bytes_per_token", "tokens_per_s"))
        rest = (_fixed(blocks, 2), readable(one["tokens"]), _fixed(speed, 0), _fixed(cache, 0))
        costs.add_row(escape(one["name"]), one["kind"], *quantities, *rest)
    yield costs
    if len(machines := {one["machine"] for one in result["runs"]}) > 1:
        yield f"[dim]tokens/s are of different machines: {escape('; '.join(sorted(machines)))}[/]"
    splits = dict.fromkeys(split for one in result["runs"] for split in one["losses"])
    losses = _table("run", *(f"{split}\n{unit}" for split in splits for unit in _units(split)))
    for one in result["runs"]:
        cells = [_fixed(one["losses"].get(split, {}).get(name), 4) for split in splits for name in _units(split).values()]
        losses.add_row(escape(one["name"]), *cells)
    yield ""
    yield losses
    if any(value is None for one in result["runs"] for name, value in one.items() if name in COSTS and (name, one["kind"]) != NO_BLOCKS):
        yield "[dim]–: not recorded; pathlm train records costs in run.json, pathlm eval losses in eval.json[/]"
    for level, title in LEVELS.items():
        yield f"\n[bold]{title}[/] (within {result['within']:.0%})"
        for pair in (pair for pair in result["pairs"] if pair["level"] == level and pair["ratio"] is not None):
            said = (
                "; ".join(map(_told, pair["differences"])) if pair["comparable"] else f"[dim]not comparable, {escape(pair['why_not'])}[/]"
            )
            yield f"  {escape(pair['one'])} − {escape(pair['other'])}: {said}"
        yield from (f"  [dim]{escape(one['name'])}: {_absent(level, one)}[/]" for one in result["runs"] if one[level] is None)


def _absent(level: str, told: Mapping[str, Any]) -> str:
    return "has no blocks" if (level, told["kind"]) == NO_BLOCKS else f"{_NAMES[level]} not recorded"


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("run", "kind") else "right", no_wrap=True)
    return table


def _units(split: str) -> dict[str, str]:
    """Return the columns of a split; the log of a training has no bits per byte."""
    return {"nats": "loss"} if split == OF_TRAINING else {"nats": "loss", "bits/byte": "bits_per_byte"}


def _told(difference: Mapping[str, Any]) -> str:
    bits = "" if difference["bits_per_byte"] is None else f", {difference['bits_per_byte']:+.4f} bits/byte"
    return f"{difference['loss']:+.4f} nats{bits} ({difference['split']})"


def _share(ratio: float) -> str:
    return f"{ratio:.3g} times as many" if ratio >= 2 or ratio <= 0.5 else f"{abs(ratio - 1):.1%} {'more' if ratio > 1 else 'fewer'}"


def _fixed(value: float | int | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def readable(value: float | int | None) -> str:
    """Return a count as a person reads it: `1.73 M`, `42.0 T`."""
    if value is None:
        return "–"
    size, sign = next(
        ((size, sign) for size, sign in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")) if value >= size), (1, "")
    )
    return f"{value / size:.3g}{sign}"


_NAMES = {"parameters": "parameters", "training_flops": "training FLOPs", "active_blocks": "active blocks"}
