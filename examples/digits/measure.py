"""Train the graph of digits with several seeds and measure it beside simpler ways: `python examples/digits/measure.py`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import picture  # noqa: E402
from digits import PLACES, Digits, Kinds, Training, pictures, train  # noqa: E402

SETTINGS: dict[str, Any] = {"signal_size": 16, "context": "pooled", "normalise": True, "initializer_range": 0.2}
"""Fields of the graph's configuration, chosen on 300 of the training pictures"""
KINDS = 12
SEEN = (4, 8, 12, 16)
"""So many patches are shown, from above, before the name is asked for"""
TEMPERATURES = (1.0, 0.7, 0.5)
PER_NAME = 50
STRENGTHS = (0.1, 0.3, 1.0, 3.0)
"""Inverse penalties of logistic regression, chosen by 3-fold cross-validation on the training pictures"""


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, and write results and pictures into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=Training.epochs)
    parser.add_argument("--kinds", type=int, default=KINDS, help="kinds of patch at each place")
    parser.add_argument("--pictures", type=int, default=None, help="use only the first so many training and test pictures")
    parser.add_argument("--per-name", type=int, default=PER_NAME, help="pictures drawn of each digit")
    parser.add_argument("--validation", action="store_true", help="choose settings: leave the test pictures alone")
    parser.add_argument("--out", type=Path, default=HERE)
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    split = pictures(asked.validation, many=asked.pictures)
    kinds = Kinds.of(split[0], asked.kinds)
    results: dict[str, Any] = {"settings": SETTINGS | {"kinds": asked.kinds, "epochs": asked.epochs}}
    results["pictures"] = {"training": len(split[0]), "test": len(split[2])}
    results["beside"], drawn = beside(kinds, split, asked.per_name)
    results["seeds"] = []
    for seed in range(asked.seeds):
        print(f"seed {seed}")
        found, shown = one_seed(kinds, split, asked, seed)
        results["seeds"].append(found)
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if seed == 0:
            title = "Drawn by name: the signal flows on from a name node"
            (asked.out / "drawn.svg").write_text(picture.sheet(title, shown["drawn"] + drawn), encoding="utf-8")
            title = "Recalled from the upper half, without a name"
            (asked.out / "recalled.svg").write_text(picture.sheet(title, shown["recalled"]), encoding="utf-8")
    print(table(results), flush=True)


def one_seed(kinds: Kinds, split: Any, asked: argparse.Namespace, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train one graph; return what was measured, and pictures to show."""
    learn, label, test, truth = split
    torch.manual_seed(seed)
    digits = Digits(kinds, **SETTINGS)
    start = time.process_time()
    told = kinds.read(learn)
    train(digits, told, label, Training(epochs=asked.epochs), seed=seed)
    found: dict[str, Any] = {"seed": seed, "edges": digits.model.config.edges, "cpu_seconds": time.process_time() - start}
    seen = kinds.read(test)
    found["named"] = {many: share(digits.energies(seen[:, :many]).numpy().argmax(1), truth) for many in SEEN}
    surprise = np.stack([digits.surprise(seen, np.full(len(truth), digit)).numpy() for digit in range(10)], axis=1)
    found["nats"] = float(surprise[np.arange(len(truth)), truth].mean())
    found["named_by_drawing"] = share(surprise.argmin(1), truth)
    wanted = np.repeat(np.arange(10), asked.per_name)
    found["drawn"] = {}
    rows = []
    for temperature in TEMPERATURES:
        drawn, whole = digits.draw(wanted, temperature=temperature)
        found["drawn"][temperature] = judged(kinds.picture(drawn), wanted, split) | {"whole": float(whole.mean())}
        rows += [(f"graph, T {temperature:g}, {n + 1}", kinds.picture(drawn[n :: asked.per_name])) for n in range(min(2, asked.per_name))]
    found["recalled"], recalled = recall_lower_half(digits, told, seen)
    firsts = [int(np.flatnonzero(truth == digit)[0]) for digit in range(10) if (truth == digit).any()]
    upper = np.where(np.arange(PLACES) < PLACES // 2, seen, -1)
    again = [(f"flow, T 0.7, {n + 1}", kinds.picture(digits.complete(seen[firsts, : PLACES // 2], temperature=0.7))) for n in range(3)]
    kept = [("picture", test[firsts]), ("its patches", kinds.picture(seen[firsts])), ("upper half", kinds.picture(upper[firsts]))]
    return found, {"drawn": rows, "recalled": [*kept, ("lit up most", kinds.picture(recalled[firsts])), *again]}


def recall_lower_half(digits: Digits, told: np.ndarray, seen: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Ask for each patch of the lower half, given the upper one alone; return the share that lights up most rightly, and all (N, 16)."""
    half, best = PLACES // 2, seen.copy()
    walk = digits.answers(seen[:, :half])
    for place in range(half, PLACES):
        question = digits.place[place].expand(len(walk), 1)
        with torch.no_grad():
            energy = digits.model(torch.cat([walk, question], dim=1), logits_to_keep=1, use_cache=False).logits[:, -1, digits.patch[place]]
        best[:, place] = energy.numpy().argmax(1)
    frequent = np.array([np.bincount(here).argmax() for here in told.T])
    return {"patches": share(best[:, half:], seen[:, half:]), "most_frequent": share(frequent[half:], seen[:, half:])}, best


def beside(kinds: Kinds, split: Any, per_name: int) -> tuple[dict[str, Any], list[tuple[str, np.ndarray]]]:
    """Measure the simpler ways, on the same patches where they read patches."""
    learn, label, test, truth = split
    told, seen, draws = kinds.read(learn), kinds.read(test), np.random.default_rng(0)
    nodes = kinds.one_hot(told), kinds.one_hot(seen)
    column = np.concatenate([np.full(len(centres), place) for place, centres in enumerate(kinds.centres)])
    named = {many: regression(nodes[0][:, column < many], label, nodes[1][:, column < many], truth) for many in SEEN}
    found: dict[str, Any] = {
        "named_by_regression": named,
        "named_by_regression_on_pixels": regression(flat(learn), label, flat(test), truth),
    }
    chains = [Chain(kinds, told[label == digit]) for digit in range(10)]
    wanted = np.repeat(np.arange(10), per_name)
    rows = []
    for name in ("frequencies", "pairs"):
        surprise = np.stack([chain.surprise(seen, pairs=name == "pairs") for chain in chains], axis=1)
        drawn = kinds.picture(np.concatenate([chain.draw(per_name, draws, pairs=name == "pairs") for chain in chains]))
        found[name] = judged(drawn, wanted, split) | {"nats": float(surprise[np.arange(len(truth)), truth].mean())}
        found[name]["named"] = share(surprise.argmin(1), truth)
        rows.append((name, drawn[::per_name]))
    sizes = np.array([len(centres) for centres in kinds.centres])
    found["random_patches"] = judged(kinds.picture((draws.random((len(wanted), PLACES)) * sizes).astype(np.int64)), wanted, split)
    found["random_pixels"] = judged(draws.uniform(0, 16, (len(wanted), 8, 8)), wanted, split)
    some = np.concatenate([np.flatnonzero(label == digit)[:per_name] for digit in range(10)])
    found["training_pictures"] = judged(learn[some], label[some], split) | {"right": None}
    found["test_pictures"] = judged(test, truth, split) | {"teaches": None}
    found["test_pictures_as_patches"] = judged(kinds.picture(seen), truth, split) | {"teaches": None}
    return found, rows


class Chain:
    """How often kinds of patch come in some pictures, alone and after the patch before, smoothed."""

    def __init__(self, kinds: Kinds, told: np.ndarray) -> None:
        sizes = [len(centres) for centres in kinds.centres]
        self.alone, self.after = [], []
        for place, size in enumerate(sizes):
            count = np.bincount(told[:, place], minlength=size) + 0.3
            self.alone.append(count / count.sum())
            pairs = np.zeros((sizes[place - 1] if place else 1, size))
            np.add.at(pairs, (told[:, place - 1] if place else np.zeros(len(told), dtype=np.int64), told[:, place]), 1.0)
            pairs += 4.0 * self.alone[-1]
            self.after.append(pairs / pairs.sum(1, keepdims=True))

    def chances(self, kind: np.ndarray, place: int, *, pairs: bool) -> np.ndarray:
        """Return the chances (N, K) of the patches at a place, given those before it (N, P)."""
        if not pairs:
            return np.broadcast_to(self.alone[place], (len(kind), len(self.alone[place])))
        return self.after[place][kind[:, place - 1] if place else np.zeros(len(kind), dtype=np.int64)]

    def surprise(self, kind: np.ndarray, *, pairs: bool) -> np.ndarray:
        """Return minus the logarithm of the probability (N,) of pictures."""
        rows = np.arange(len(kind))
        return -sum(np.log(self.chances(kind, place, pairs=pairs)[rows, kind[:, place]]) for place in range(PLACES))

    def draw(self, many: int, draws: np.random.Generator, *, pairs: bool) -> np.ndarray:
        """Draw pictures (N, 16)."""
        kind = np.zeros((many, PLACES), dtype=np.int64)
        for place in range(PLACES):
            chance = self.chances(kind, place, pairs=pairs)
            kind[:, place] = (chance.cumsum(1) < draws.random((many, 1))).sum(1).clip(max=chance.shape[1] - 1)
        return kind


def judged(images: np.ndarray, wanted: np.ndarray, split: Any) -> dict[str, float | None]:
    """Judge pictures (N, 8, 8) by what never saw the graph: neighbours among real pictures, and what real ones are called beside these.

    `right`: the share that the nearest real training picture names as wanted. `teaches`: the share of real test pictures that the nearest
    of these names right, which asks for variety, too. `spread`: mean distance of two of one digit, as a share of that of real test ones.
    """
    from sklearn.neighbors import KNeighborsClassifier

    learn, label, test, truth = split
    right = share(KNeighborsClassifier(1).fit(flat(learn), label).predict(flat(images)), wanted)
    teaches = share(KNeighborsClassifier(1).fit(flat(images), wanted).predict(flat(test)), truth)
    return {"right": right, "teaches": teaches, "spread": _spread(images, wanted) / _spread(test, truth)}


def _spread(images: np.ndarray, label: np.ndarray) -> float:
    groups = [flat(images[label == digit]) for digit in range(10)]
    return float(np.mean([np.sqrt(((one[:, None] - one[None]) ** 2).sum(-1)).mean() for one in groups if len(one)]))


def regression(learn: np.ndarray, label: np.ndarray, test: np.ndarray, truth: np.ndarray) -> float:
    """Return the accuracy of logistic regression, its penalty chosen by cross-validation on what it learns from."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    made = [LogisticRegression(C=strength, max_iter=2_000) for strength in STRENGTHS]
    best = max(made, key=lambda one: cross_val_score(one, learn, label, cv=3).mean())
    return share(best.fit(learn, label).predict(test), truth)


def flat(images: np.ndarray) -> np.ndarray:
    """Return pictures as rows of pixels from 0 to 1."""
    return images.reshape(len(images), -1) / 16.0


def share(found: np.ndarray, truth: np.ndarray) -> float:
    """Return the share that is right."""
    return float((found == truth).mean())


def table(results: dict[str, Any]) -> str:
    """Return the results as two Markdown tables, with the lowest and the highest seed."""
    seeds, other = results["seeds"], results["beside"]

    def told(*names: Any, digits: int = 3) -> str:
        values = []
        for value in seeds:
            for name in names:
                value = value[name]
            values.append(value)
        return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"

    lines = ["| naming, share right | signal graph | logistic regression, same patches |", "|---|---|---|"]
    lines += [f"| {many} of 16 patches | {told('named', many)} | {other['named_by_regression'][many]:.3f} |" for many in SEEN]
    lines.append(f"| by drawing: the name that makes the picture least surprising | {told('named_by_drawing')} | |")
    lines += ["", "| drawing | named right by nearest real picture | names real pictures as nearest | spread | nats per test picture |"]
    lines.append("|---|---|---|---|---|")
    for temperature in TEMPERATURES:
        cells = [told("drawn", temperature, name) for name in ("right", "teaches", "spread")]
        nats = told("nats", digits=2) if temperature == 1 else ""
        lines.append(f"| **signal graph**, temperature {temperature:g} | {' | '.join(cells)} | {nats} |")
    real = ("training_pictures", "test_pictures_as_patches", "test_pictures")
    for name in ("frequencies", "pairs", "random_patches", "random_pixels", *real):
        one = other[name]
        cells = ["" if one.get(kind) is None else f"{one[kind]:.3f}" for kind in ("right", "teaches", "spread")]
        nats = f"{one['nats']:.2f}" if "nats" in one else ""
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} | {nats} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
