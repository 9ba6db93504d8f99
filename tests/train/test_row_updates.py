"""Tables of which a step touches few rows: their AdamW, their clipping, and runs of a signal graph with them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_family import VOCABULARY, FakeRows, config
from reading import assert_same_end, metrics
from rich.console import Console
from torch import Tensor, nn

from pathlm.config import OptimConfig, RunConfig
from pathlm.models import family
from pathlm.models.brillm.configuration import BrillmConfig
from pathlm.models.brillm.edges import Edges, count_rows
from pathlm.train import checkpoint, loop, parallel
from pathlm.train.loop import RunResult
from pathlm.train.optim import RowAdamW, adamw, set_learning_rate
from pathlm.train.run import Job, carry_out

ROWS, WIDTH, STEPS = 6, 3, 7
OPTIM = OptimConfig(lr=0.05, betas=(0.8, 0.95), weight_decay=0.2)


def draws(seed: int = 0) -> list[Tensor]:
    """Gradients of a table: row 0 in every step, the others in some, row 5 never."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for step in range(STEPS):
        grad = torch.randn(ROWS, WIDTH, WIDTH, dtype=torch.float64, generator=generator)
        grad[[row for row in range(1, ROWS) if (row + step) % 3 or row == 5]] = 0
        found.append(grad)
    return found


def as_rows(grad: Tensor, *, twice: bool = False) -> Tensor:
    """The same gradient, sparse; `twice` names every row two times with half of it, as two micro-batches would."""
    row = grad.flatten(1).any(1).nonzero()[:, 0]
    index, values = (torch.cat((row, row)), torch.cat((grad[row], grad[row])) / 2) if twice else (row, grad[row])
    return torch.sparse_coo_tensor(index[None], values, grad.shape, check_invariants=True)


def trained(kind: Any, grads: list[Tensor], start: Tensor, *, rows: bool) -> tuple[Tensor, torch.optim.Optimizer]:
    table, plain = nn.Parameter(start.clone()), nn.Parameter(torch.ones(4, dtype=torch.float64))
    groups = [{"params": [table], "weight_decay": OPTIM.weight_decay} | ({"rows": True} if rows else {}), {"params": [plain]}]
    optimizer = adamw(groups, OPTIM)
    assert type(optimizer) is kind
    for step, grad in enumerate(grads):
        set_learning_rate(optimizer, 0.05 / (1 + step))
        table.grad, plain.grad = grad, torch.full_like(plain, step - 2.0)
        optimizer.step()
    return torch.cat((table.detach().flatten(), plain.detach())), optimizer


@pytest.mark.parametrize("form", [lambda g: g, as_rows, partial(as_rows, twice=True)], ids=["dense", "rows", "rows twice"])
@pytest.mark.parametrize("at_once", [1, 2**22], ids=["a row at a time", "at once"])
def test_a_table_touched_as_a_whole_moves_as_with_the_stock_optimizer(form: Any, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathlm.train.optim.AT_ONCE", at_once)
    grads = [torch.randn(ROWS, WIDTH, WIDTH, dtype=torch.float64) for _ in range(STEPS)]
    start = torch.randn(ROWS, WIDTH, WIDTH, dtype=torch.float64)
    mine, _ = trained(RowAdamW, [form(grad) for grad in grads], start, rows=True)
    theirs, _ = trained(torch.optim.AdamW, grads, start, rows=False)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", [lambda g: g, as_rows], ids=["dense", "rows"])
def test_every_row_moves_as_if_the_stock_optimizer_had_seen_its_own_steps_only(form: Any) -> None:
    start = torch.randn(ROWS, WIDTH, WIDTH, dtype=torch.float64)
    grads = draws()
    found, optimizer = trained(RowAdamW, [form(grad) for grad in grads], start, rows=True)
    table = found[:-4].view_as(start)
    for row in range(ROWS):
        alone = nn.Parameter(start[row].clone())
        stock = torch.optim.AdamW([alone], lr=0.05, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=OPTIM.weight_decay)
        for step, grad in enumerate(grads):
            if grad[row].any():
                stock.param_groups[0]["lr"] = 0.05 / (1 + step)
                alone.grad = grad[row]
                stock.step()
        torch.testing.assert_close(table[row], alone.detach(), rtol=0, atol=1e-12)
    assert torch.equal(table[5], start[5]), "a row that nothing touched stays as it was"
    steps = optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]
    assert steps.tolist() == [sum(bool(g[row].any()) for g in grads) for row in range(ROWS)]


def test_a_single_gradient_moves_a_weight_once_and_by_the_learning_rate() -> None:
    grad = torch.zeros(ROWS, 1, dtype=torch.float64)
    grad[2] = 1e-3
    table = nn.Parameter(torch.zeros(ROWS, 1, dtype=torch.float64))
    optimizer = adamw([{"params": [table], "rows": True, "weight_decay": 0.0}], OPTIM)
    for step in range(50):
        other = torch.zeros_like(grad)
        other[0] = 1.0
        table.grad = as_rows(grad if step == 10 else other)
        optimizer.step()
    assert float(table[2].detach()) == pytest.approx(-0.05, rel=1e-4)


def test_a_row_with_a_gradient_of_zeros_is_not_touched() -> None:
    table = nn.Parameter(torch.ones(ROWS, 2))
    optimizer = adamw([{"params": [table], "rows": True, "weight_decay": 0.5}], OPTIM)
    table.grad = torch.sparse_coo_tensor([[1, 3]], [[0.0, 0.0], [0.0, 2.0]], (ROWS, 2), check_invariants=True)
    optimizer.step()
    assert [bool((row != 1).any()) for row in table.detach()] == [False, False, False, True, False, False]


def test_moments_of_rows_are_saved_and_loaded() -> None:
    start, grads = torch.randn(ROWS, WIDTH, WIDTH, dtype=torch.float64), [as_rows(g) for g in draws()]
    _, optimizer = trained(RowAdamW, grads, start, rows=True)
    other = adamw([{"params": [nn.Parameter(start.clone())], "rows": True}, {"params": [nn.Parameter(torch.ones(4).double())]}], OPTIM)
    other.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_sparse_and_dense_gradients_are_clipped_together(limit: float) -> None:
    model = nn.ParameterDict(
        {"table": nn.Parameter(torch.zeros(ROWS, WIDTH, WIDTH).double()), "other": nn.Parameter(torch.zeros(4).double())}
    )
    grad, other = draws()[0], torch.randn(4, dtype=torch.float64)
    found = []
    for form in (lambda g: g.clone(), as_rows, partial(as_rows, twice=True)):
        model["table"].grad, model["other"].grad = form(grad), other.clone()
        norm = parallel.clip(model, limit)
        found.append((norm, model["table"].grad.to_dense(), model["other"].grad))
    for mine in found[1:]:
        for a, b in zip(mine, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert found[0][0] > 1


def graph_job(run: RunConfig, **options: Any) -> Job:
    """A run of a signal graph on rows of numbers, its edges counted from them."""
    package = family("brillm")
    rows = FakeRows(seed=run.seed)
    model_config = BrillmConfig(vocab_size=VOCABULARY, signal_size=4, trained_positions=10, **options)
    return Job(
        model_config=model_config,
        build=partial(package.from_rows, model_config, rows),
        curriculum=partial(package.curriculum, run.curriculum, config=model_config),
        param_groups=partial(package.param_groups, optim=run.optim),
        rows=rows,
        validation=FakeRows(seed=10_000),
    )


def go(run: RunConfig, *, resume: bool = False, **options: Any) -> RunResult:
    return carry_out(run, graph_job(run, **options), resume=resume, console=Console(quiet=True))


def test_a_signal_graph_learns_and_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"steps": 12, "optim": {"lr": 0.05, "warmup_steps": 2}, "save_every": 5}
    whole = go(config(tmp_path / "whole", **options), rivals=5)
    losses = [row["validation/loss"] for row in metrics(whole.folder) if "validation/loss" in row]
    assert losses[-1] < losses[0] - 0.2
    cut = config(tmp_path / "cut", **options)
    real = loop.step

    def deadly(*given: Any, **named: Any) -> Any:
        if checkpoint.newest(cut.folder / "checkpoints") == 5:
            raise KeyboardInterrupt
        return real(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", deadly)
        with pytest.raises(KeyboardInterrupt):
            go(cut, rivals=5)
    resumed = go(cut, resume=True, rivals=5)
    assert_same_end(resumed.folder, whole.folder)


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    found = [go(config(tmp_path / str(n), steps=4, micro_rows=n)).folder for n in (8, 2)]
    pairs = zip(metrics(found[0]), metrics(found[1]), strict=True)
    for one, many in pairs:
        for name in ("loss/total", "optim/grad_norm", "validation/loss"):
            if name in one:
                assert one[name] == pytest.approx(many[name], rel=1e-4)


def test_edges_are_counted_from_the_rows_of_a_run() -> None:
    rows = FakeRows(seed=3)
    key, times = count_rows(rows, VOCABULARY)
    batch = rows.batch(0, rows.rows_per_epoch)
    expected: dict[int, int] = {}
    for ids, documents in zip(batch["input_ids"].tolist(), batch["document_ids"].tolist(), strict=True):
        for t in range(1, len(ids)):
            if documents[t] == documents[t - 1] >= 0:
                pair = ids[t - 1] * VOCABULARY + ids[t]
                expected[pair] = expected.get(pair, 0) + 1
    assert dict(zip(key.tolist(), times.tolist(), strict=True)) == expected and key.tolist() == sorted(expected)
    model = family("brillm").from_rows(BrillmConfig(vocab_size=VOCABULARY, signal_size=4, min_count=6, trained_positions=10), rows)
    assert model.config.edges == sum(n >= 6 for n in expected.values()) and 0 < model.config.edges < len(expected)
    kept = Edges.from_counts((key, times), VOCABULARY, min_count=6)
    assert torch.equal(model.graph.key, kept.key_E) and torch.equal(model.graph.start, kept.start_V1)
