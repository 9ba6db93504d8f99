"""A signal graph whose nodes are no text: it names pictures of digits and draws digits by name, with one and the same edges.

A picture of 8×8 pixels is 16 patches of 2×2. Nodes are kinds of patch at a place, the names of the digits, and questions: one per place,
and one for the name. A walk is questions with their answers: `place 0, patch 0.7, place 1, patch 1.2, …, name?, seven` names a picture,
and `name?, seven, place 0, patch 0.7, …` draws one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathlm.config import OptimConfig
from pathlm.models.brillm.modeling import BrillmForCausalLM
from pathlm.models.brillm.optim import param_groups
from pathlm.models.brillm.recall import graph_of
from pathlm.train.optim import adamw, learning_rate

# Shapes: N pictures, P places, T tokens of a walk, K kinds of patch

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ASK = "name?"
SIDE, PATCH = 8, 2
ACROSS = SIDE // PATCH
PLACES = ACROSS**2
IGNORE = -100
# Row by row, each in the direction opposite to the one before: neighbours in a walk are neighbours in the picture.
ORDER = np.concatenate([row if i % 2 == 0 else row[::-1] for i, row in enumerate(np.arange(PLACES).reshape(ACROSS, ACROSS))])


def cut(images: np.ndarray) -> np.ndarray:
    """Return the patches (N, 16, 4) of pictures (N, 8, 8), in the order of a walk."""
    cells = images.reshape(len(images), ACROSS, PATCH, ACROSS, PATCH).transpose(0, 1, 3, 2, 4)
    return cells.reshape(len(images), PLACES, PATCH**2)[:, ORDER]


def paste(patches: np.ndarray) -> np.ndarray:
    """Return the pictures (N, 8, 8) of patches (N, 16, 4): the inverse of `cut`."""
    cells = np.empty_like(patches)
    cells[:, ORDER] = patches
    return cells.reshape(len(patches), ACROSS, ACROSS, PATCH, PATCH).transpose(0, 1, 3, 2, 4).reshape(len(patches), SIDE, SIDE)


@dataclass(frozen=True)
class Kinds:
    """What kinds of patch there are at each place, as k-means finds them in training pictures."""

    centres: list[np.ndarray]
    """(K, 4) for each place; K is lower where fewer patches differ"""

    @classmethod
    def of(cls, images: np.ndarray, kinds: int) -> Kinds:
        """Find at most `kinds` kinds of patch at each place of pictures (N, 8, 8)."""
        from sklearn.cluster import KMeans

        found = []
        for patches in cut(images).swapaxes(0, 1):
            several = min(kinds, len(np.unique(patches, axis=0)))
            found.append(KMeans(several, n_init=2, random_state=0).fit(patches).cluster_centers_)
        return cls(found)

    def read(self, images: np.ndarray) -> np.ndarray:
        """Return the kind (N, 16) of each patch: the nearest centre."""
        found = [((here[:, None] - centres) ** 2).sum(-1).argmin(1) for here, centres in zip(cut(images).swapaxes(0, 1), self.centres)]
        return np.stack(found, axis=1)

    def picture(self, kind: np.ndarray) -> np.ndarray:
        """Return the pictures (N, 8, 8) of kinds of patch (N, 16); -1 is a blank."""
        patches = [np.where(here[:, None] < 0, 0.0, centres[here]) for here, centres in zip(kind.T, self.centres)]
        return paste(np.stack(patches, axis=1))

    def one_hot(self, kind: np.ndarray) -> np.ndarray:
        """Return a number for every patch node (N, nodes): 1 for those of the picture, 0 for the others."""
        return np.concatenate([np.eye(len(centres))[here] for here, centres in zip(kind.T, self.centres)], axis=1)


class Digits:
    """A signal graph over patches, names and questions."""

    def __init__(self, kinds: Kinds, **options: Any) -> None:
        """Make a fresh graph; `options` are fields of `BrillmConfig`. Every answer leads to every later question."""
        patches = [[("patch", place, kind) for kind in range(len(centres))] for place, centres in enumerate(kinds.centres)]
        questions: list[Hashable] = [("place", place) for place in range(PLACES)]
        walks: list[list[Hashable]] = [[ASK, name] for name in NAMES]
        walks += [[name, question] for name in NAMES for question in questions]
        for place, here in enumerate(patches):
            walks += [[questions[place], patch] for patch in here]
            walks += [[patch, question] for patch in here for question in [*questions[place + 1 :], ASK]]
        self.kinds = kinds
        self.model, self.nodes = graph_of(walks, **{"positions": "none", "trained_positions": 2 * PLACES + 2} | options)
        self.name = torch.tensor(self.nodes.ids(NAMES))
        self.place = torch.tensor(self.nodes.ids(questions))
        self.ask = self.nodes.ids([ASK])[0]
        self.patch = [torch.tensor(self.nodes.ids(here)) for here in patches]
        # Where a patch node belongs, and -1 for all others: the way back from a walk to a picture.
        self.belongs = torch.full((len(self.nodes.names), 2), -1)
        for place, ids in enumerate(self.patch):
            self.belongs[ids] = torch.stack([torch.full_like(ids, place), torch.arange(len(ids))], dim=1)

    def answers(self, kind: np.ndarray) -> Tensor:
        """Return the questions and answers (N, 2 P) of the first P places, of kinds of patch (N, P)."""
        patch = [ids[torch.from_numpy(here)] for ids, here in zip(self.patch, kind.T)]
        question = [torch.full_like(node, int(place)) for place, node in zip(self.place, patch)]
        return torch.stack([node for pair in zip(question, patch) for node in pair], dim=1)

    def named(self, label: np.ndarray) -> Tensor:
        """Return the question for the name with its answer (N, 2)."""
        name = self.name[torch.from_numpy(label)]
        return torch.stack([torch.full_like(name, self.ask), name], dim=1)

    @torch.no_grad()
    def energies(self, kind: np.ndarray) -> Tensor:
        """Return the energy (N, 10) of every name after the patches of the first places (N, P) and the question for the name."""
        walk = torch.cat([self.answers(kind), self.named(np.zeros(len(kind), dtype=np.int64))[:, :1]], dim=1)
        return self.model(walk, logits_to_keep=1, use_cache=False).logits[:, -1, self.name]

    @torch.no_grad()
    def surprise(self, kind: np.ndarray, label: np.ndarray) -> Tensor:
        """Return minus the logarithm of the probability (N,) of drawing just these patches when asked for these names."""
        walk = torch.cat([self.named(label), self.answers(kind)], dim=1)
        log_BTV = self.model(walk, use_cache=False).logits[:, 1:-1].log_softmax(-1)
        return -log_BTV.gather(2, walk[:, 2:, None])[..., 0].sum(1)

    def draw(self, label: np.ndarray, *, temperature: float) -> tuple[np.ndarray, np.ndarray]:
        """Let the signal flow on from names; return the kinds of patch (N, 16), and for whom every place was asked for once (N,).

        All nodes may come at every step, and nobody corrects the way. -1 is a place that the signal did not visit.
        """
        return self._flow(self.named(label), 2 * PLACES, temperature)

    def complete(self, kind: np.ndarray, *, temperature: float) -> np.ndarray:
        """Let the signal flow on from the patches of the first places (N, P), without a name; return the kinds of patch (N, 16)."""
        return self._flow(self.answers(kind), 2 * (PLACES - kind.shape[1]), temperature)[0]

    def _flow(self, walk: Tensor, more: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
        mask = torch.ones_like(walk)
        done = self.model.generate(walk, attention_mask=mask, do_sample=True, temperature=temperature, top_k=0, max_new_tokens=more)
        found = torch.full((len(done), PLACES + 1), -1)
        place, kind = self.belongs[done].unbind(-1)
        for t in range(done.shape[1]):  # whatever is no patch goes to a column that is dropped
            found.scatter_(1, torch.where(place[:, t] < 0, PLACES, place[:, t])[:, None], kind[:, t, None])
        whole = (found[:, :PLACES] >= 0).all(1)
        return found[:, :PLACES].numpy(), whole.numpy()


@dataclass(frozen=True)
class Training:
    """How a graph is trained."""

    epochs: int = 40
    batch: int = 128
    lr: float = 0.03
    thin: float = 0.5
    """Of the patches on the way to a name, a random share of at most this is left out, anew in every walk"""
    thin_drawn: float = 0.2
    """So many patches are left out on the way from a name"""
    nameless: float = 0.2
    """So many pictures are drawn without a name"""


def train(
    digits: Digits, kind: np.ndarray, label: np.ndarray, training: Training, *, seed: int, said: Callable[[str], None] = print
) -> None:
    """Train both orders together: patches then name, where only the name counts, and name then patches, where all that follows does."""
    steps = training.epochs * -(-len(kind) // training.batch)
    optim = OptimConfig(lr=training.lr, warmup_steps=min(10, steps), final_lr_share=0.02, weight_decay=0.0, betas=(0.9, 0.999))
    optimizer = adamw(param_groups(digits.model, optim), optim)
    draws = torch.Generator().manual_seed(seed)
    answers, named = digits.answers(kind), digits.named(label)
    step = 0
    for epoch in range(training.epochs):
        for at in torch.randperm(len(kind), generator=draws).split(training.batch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(optim, step, steps)
            optimizer.zero_grad()
            naming, drawing = _losses(digits.model, answers[at], named[at], training, draws)
            (naming + 2 * drawing).backward()
            optimizer.step()
            step += 1
        if (epoch + 1) % max(training.epochs // 4, 1) == 0:
            said(f"epoch {epoch + 1}: loss of names {naming.item():.3f}, of drawing {drawing.item():.3f} per node")


def _losses(model: BrillmForCausalLM, answers: Tensor, named: Tensor, training: Training, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the losses of both orders. What is left out is masked, and the signal goes on from what was before it."""
    many = len(answers)
    kept = torch.rand(many, PLACES, generator=draws) >= training.thin * torch.rand(many, 1, generator=draws)
    walk = torch.cat([answers, named], dim=1)
    labels = torch.full_like(walk, IGNORE)
    labels[:, -1] = walk[:, -1]
    naming = model(**_closed_up(walk, torch.cat([kept, kept.new_ones(many, 1)], dim=1), labels), skip_logits=True).loss
    kept = torch.rand(many, 1 + PLACES, generator=draws) >= torch.tensor([training.nameless] + PLACES * [training.thin_drawn])
    walk = torch.cat([named, answers], dim=1)
    labels = walk.clone()
    # That a question is left out is our doing, and none of the graph's: only a question that follows the one before it is learned.
    labels[:, 2::2].masked_fill_(~kept[:, :-1], IGNORE)
    drawing = model(**_closed_up(walk, kept, labels), skip_logits=True).loss
    return naming, drawing


def _closed_up(walk: Tensor, kept: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Leave questions out together with their answers, and move what is left to the front."""
    present = kept.repeat_interleave(2, dim=1)
    order = (~present).long().argsort(dim=1, stable=True)
    labels = labels.masked_fill(~present, IGNORE)
    ids = {"input_ids": walk, "labels": labels, "attention_mask": present.long()}
    return {name: value.gather(1, order) for name, value in ids.items()}


def pictures(validation: bool = False, *, many: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return training pictures (N, 8, 8) with their digits, and 500 test pictures with theirs; `many` takes the first ones only.

    With `validation`, the test pictures stay untouched: 300 of the training pictures stand in for them.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise SystemExit('this example needs scikit-learn, for its pictures and to compare with: pip install "pathlm[examples]"') from error
    found = load_digits()
    images, label = found.images, found.target
    learn, test = train_test_split(np.arange(len(label)), test_size=500, stratify=label, random_state=0)
    if validation:
        learn, test = train_test_split(learn, test_size=300, stratify=label[learn], random_state=1)
    learn, test = learn[:many], test[:many]
    return images[learn], label[learn], images[test], label[test]
