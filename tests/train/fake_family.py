"""Two tiny families that share nothing but the trainer's seam, and rows made from numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pathlm.config import RunConfig, with_options
from pathlm.models.output import PathOutput
from pathlm.models.stages import Curriculum, Gate, Stage
from pathlm.train.loop import RunResult
from pathlm.train.run import Job, carry_out

VOCABULARY = 17


class FakeConfig(PreTrainedConfig):
    model_type = "fake"
    hidden_size: int = 8
    vocab_size: int = VOCABULARY
    dropout: float = 0.1


@dataclass(frozen=True)
class FakeKnobs:
    heat: float = 1.0


class Cell(nn.Module):
    """One block: a matrix and a random mask."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.dropout(torch.tanh(self.linear(h)))


class FakeModel(PreTrainedModel):
    """Predicts a token from the one before it, through two blocks with dropout; its head is tied to its embedding."""

    config_class = FakeConfig
    _tied_weights_keys = {"head.weight": "embed.weight"}  # noqa: RUF012
    _no_split_modules = ["Cell"]  # noqa: RUF012

    def __init__(self, config: FakeConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.cells = nn.ModuleList(Cell(config.hidden_size, config.dropout) for _ in range(2))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("seen", torch.zeros(()))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, document_ids: torch.Tensor, knobs: FakeKnobs, **kwargs: Any
    ) -> PathOutput:
        if self.training:
            self.seen += 1
        h = self.embed(input_ids)
        for cell in self.cells:
            h = cell(h)
        logits = self.head(h) * knobs.heat
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        right = (logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100].float().mean()
        return PathOutput(
            loss=loss, logits=logits, metrics={"loss/lm": loss.detach(), "fake/right": right, "fake/heat": loss.new_tensor(knobs.heat)}
        )


class OtherConfig(PreTrainedConfig):
    model_type = "other"
    hidden_size: int = 8


class OtherModel(PreTrainedModel):
    """A recurrent network: no blocks, no metrics, no knobs."""

    config_class = OtherConfig

    def __init__(self, config: OtherConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCABULARY, config.hidden_size)
        self.memory = nn.GRU(config.hidden_size, config.hidden_size, batch_first=True)
        self.out = nn.Linear(config.hidden_size, VOCABULARY)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> PathOutput:
        logits = self.out(self.memory(self.embed(input_ids))[0])
        return PathOutput(loss=nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


class FakeRows:
    """Row i holds two documents, then padding, all drawn from (seed, i); the second token follows from the first."""

    vocab_size = VOCABULARY
    rows_per_epoch = 50

    def __init__(self, *, length: int = 12, seed: int = 0) -> None:
        self.length, self.seed = length, seed

    def batch(self, start: int, count: int) -> dict[str, np.ndarray]:
        rows = [self._row(i) for i in range(start, start + count)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, i: int) -> dict[str, np.ndarray]:
        draw = np.random.default_rng((self.seed, i))
        cut, end = sorted(draw.choice(np.arange(2, self.length + 1), 2, replace=False))
        ids = np.cumsum(draw.integers(1, 4, self.length)) % (VOCABULARY - 1)
        documents = np.where(np.arange(self.length) < cut, 2 * i, 2 * i + 1)
        labels = ids.copy()
        labels[[0, cut % self.length]] = -100
        ids[end:], documents[end:], labels[end:] = VOCABULARY - 1, -1, -100
        return {"input_ids": ids, "labels": labels, "document_ids": documents}

    def describe(self, batch: Mapping[str, np.ndarray]) -> list[str]:
        return [f"doc-{n}" for n in np.unique(batch["document_ids"]) if n >= 0]

    def tokenizer(self) -> None:
        return None


def groups(optim: Any, model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def curriculum(
    steps: int, *, warm: tuple[Gate, ...] = (), hot: tuple[Gate, ...] = (), knobs: Mapping[str, Any] | None = None
) -> Curriculum:
    """Two stages: three steps that warm up, then the rest of the run."""
    stages = (Stage("warm", 3, FakeKnobs(0.5), FakeKnobs(1.0), gates=warm), Stage("hot", None, FakeKnobs(), gates=hot))
    return Curriculum(stages).with_knobs(knobs or {})


def config(tmp_path: Path, **options: Any) -> RunConfig:
    """A run of 8 steps of 8 rows that evaluates every 2 steps and saves every 3."""
    base: dict[str, Any] = {
        "name": "run", "out": str(tmp_path), "preset": "fake", "steps": 8, "batch_tokens": 96, "micro_rows": 4,
        "eval_every": 2, "eval_rows": 6, "save_every": 3, "log_every": 1,
        "data": {"length": 12, "task_share": 1.0, "tasks": {"copy": 1}}, "optim": {"warmup_steps": 2, "lr": 1e-2},
    }  # fmt: skip
    for name, value in options.items():
        base[name] = base.get(name, {}) | value if isinstance(value, dict) else value
    return with_options(RunConfig, base)


def job(
    run: RunConfig, *, rows: Any = None, validation: Any = "own", model: Any = None, gates: Mapping[str, Any] | None = None, **options: Any
) -> Job:
    """The fake family's job; `gates` are those of the stages by name."""
    model_config = model or FakeConfig(**options)
    kind = {"fake": FakeModel, "other": OtherModel}[model_config.model_type]
    return Job(
        model_config=model_config,
        build=partial(kind, model_config),
        curriculum=partial(curriculum, knobs=run.knobs, **(gates or {})),
        param_groups=partial(groups, run.optim),
        rows=rows or FakeRows(seed=run.seed),
        validation=FakeRows(seed=10_000) if validation == "own" else validation,
    )


def go(run: RunConfig, *, resume: bool = False, console: Console | None = None, **options: Any) -> RunResult:
    return carry_out(run, job(run, **options), resume=resume, console=console or Console(quiet=True))
