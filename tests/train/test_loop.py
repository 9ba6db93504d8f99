import ast
import inspect
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_family import FakeConfig, FakeModel, FakeRows, OtherConfig, config, curriculum, go, job
from reading import assert_same_end, metrics
from rich.console import Console
from safetensors.torch import load_file

from pathlm.config import RunError
from pathlm.train import batches, loop, parallel
from pathlm.train.interrupt import Interrupt
from pathlm.train.run import carry_out


def gradients(tmp_path, rows, micro_rows, *, precision="fp32", checkpointing=False):
    """Loss, metrics, gradient norm and gradients of one step on 8 rows."""
    run = config(tmp_path, micro_rows=micro_rows, precision=precision, activation_checkpointing=checkpointing)
    acc = parallel.accelerator(run)
    torch.manual_seed(0)
    model = FakeModel(FakeConfig(dropout=0.0)).to(torch.float64 if precision == "fp32" else torch.float32)
    called = parallel.prepare_model(acc, model, run)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = batches.read(rows, 0, 8, batches.Share(0, 1, micro_rows))
    knobs = curriculum(8).at(5)[1]
    numbers, stop = loop.step(acc, called, optimizer, batch, knobs, clip=1e9, interrupt=Interrupt())
    assert stop == 0
    return numbers, {name: p.grad.clone() for name, p in model.named_parameters()}


class UnevenRows(FakeRows):
    """Rows whose numbers of targets differ by a factor of ten."""

    def batch(self, start, count):
        found = super().batch(start, count)
        labels = found["labels"].copy()
        for row, number in zip(labels, range(start, start + count)):
            row[2 if number % 3 else 12 :] = -100
        return found | {"labels": labels}


@pytest.mark.parametrize("micro_rows", [4, 3, 2, 1])
def test_accumulated_rows_give_the_loss_and_the_gradients_of_one_batch(tmp_path, micro_rows):
    whole, whole_grads = gradients(tmp_path, UnevenRows(), 8)
    parts, part_grads = gradients(tmp_path, UnevenRows(), micro_rows)
    assert parts == pytest.approx(whole, rel=1e-6)
    torch.testing.assert_close(part_grads, whole_grads, rtol=1e-6, atol=1e-9)


def test_every_metric_is_the_mean_over_targets(tmp_path):
    rows = UnevenRows()
    found, _ = gradients(tmp_path, rows, 3)
    torch.manual_seed(0)
    model = FakeModel(FakeConfig(dropout=0.0)).double()
    one = [{k: torch.from_numpy(v) for k, v in rows.batch(i, 1).items()} for i in range(8)]
    counts = np.array([batches.targets(row["labels"].numpy()) for row in one], dtype=float)
    with torch.no_grad():
        outs = [model(**row, knobs=curriculum(8).at(5)[1]).metrics for row in one]
    for name in ("loss/lm", "fake/right", "fake/heat"):
        by_hand = np.average([float(out[name]) for out in outs], weights=counts)
        assert found[name] == pytest.approx(by_hand, rel=1e-5)
    assert found["data/target_share"] == pytest.approx(counts.sum() / 96)


def test_a_row_without_targets_changes_nothing(tmp_path):
    class Padded(FakeRows):
        def batch(self, start, count):
            found = super().batch(start, count)
            labels = found["labels"].copy()
            labels[np.arange(start, start + count) % 2 == 1] = -100
            return found | {"labels": labels}

    whole, whole_grads = gradients(tmp_path, Padded(), 8)
    parts, part_grads = gradients(tmp_path, Padded(), 1)
    for name in ("loss/total", "loss/lm", "optim/grad_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-6)
    torch.testing.assert_close(part_grads, whole_grads, rtol=1e-6, atol=1e-9)


def test_recomputed_activations_give_the_same_gradients(tmp_path):
    kept, kept_grads = gradients(tmp_path, FakeRows(), 4)
    again, again_grads = gradients(tmp_path, FakeRows(), 4, checkpointing=True)
    assert again == kept
    torch.testing.assert_close(again_grads, kept_grads, rtol=0, atol=0)


def test_recomputing_needs_blocks_that_are_named(tmp_path):
    with pytest.raises(ValueError, match="activation_checkpointing=True: OtherModel names no blocks"):
        go(config(tmp_path, activation_checkpointing=True), model=OtherConfig())


def test_bfloat16_computes_near_the_full_precision_and_keeps_full_weights(tmp_path):
    full, _ = gradients(tmp_path, FakeRows(), 4)
    half, grads = gradients(tmp_path, FakeRows(), 4, precision="bf16")
    assert half["loss/lm"] == pytest.approx(full["loss/lm"], rel=0.02)
    assert half["loss/lm"] != full["loss/lm"]
    assert {g.dtype for g in grads.values()} == {torch.float32}
    result = go(config(tmp_path, precision="bf16", steps=3))
    saved = load_file(result.folder / "checkpoints" / "latest" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}


def test_the_host_waits_for_the_device_once_a_step(tmp_path, monkeypatch):
    waits = Counter()
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)

        def counted(self, *args, _real=real, _name=name, **kwargs):
            waits[_name] += 1
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    gradients(tmp_path, FakeRows(), 2)
    assert waits == {"tolist": 1}


def test_the_gradient_norm_is_logged_before_clipping_and_clipped(tmp_path):
    run = config(tmp_path, steps=2, optim={"clip": 1e-4})
    norms = [row["optim/grad_norm"] for row in metrics(go(run).folder) if "loss/lm" in row]
    assert all(norm > 1e-4 for norm in norms)


def test_clipping_scales_the_gradients_to_the_limit():
    weight = torch.nn.Linear(3, 1, bias=False)
    weight.weight.grad = torch.tensor([[3.0, 0.0, 4.0]])
    assert float(parallel.clip(weight, 1.0)) == pytest.approx(5.0)
    torch.testing.assert_close(weight.weight.grad, torch.tensor([[0.6, 0.0, 0.8]]), rtol=1e-5, atol=1e-6)


def test_each_step_gets_its_stage_its_knobs_and_its_learning_rate(tmp_path):
    rows = [row for row in metrics(go(config(tmp_path)).folder) if "loss/lm" in row]
    assert [row["stage"] for row in rows] == ["warm"] * 3 + ["hot"] * 5
    assert [row["fake/heat"] for row in rows] == [0.5, 0.75, 1.0] + [1.0] * 5
    assert rows[0]["optim/lr"] == 0.005 and rows[-1]["optim/lr"] == pytest.approx(0.001)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["tokens"] for row in rows] == [96 * i for i in range(1, 9)]


def test_an_unrelated_family_trains_in_the_same_loop(tmp_path):
    run = config(tmp_path, steps=60, optim={"lr": 3e-2})
    result = go(run, model=OtherConfig())
    losses = [row["loss/total"] for row in metrics(result.folder) if "loss/total" in row]
    assert losses[0] == pytest.approx(math.log(17), rel=0.1)
    assert losses[-1] < 0.8 * losses[0]
    assert result.last_validation < losses[0]


def test_an_unrelated_family_resumes_to_the_same_end(tmp_path):
    whole = go(config(tmp_path / "whole"), model=OtherConfig())
    run = config(tmp_path / "parts")

    class Stopped(BaseException):
        pass

    class Failing(FakeRows):
        def batch(self, start, count):
            if start >= 40:
                raise Stopped
            return super().batch(start, count)

    with pytest.raises(Stopped):
        go(run, model=OtherConfig(), rows=Failing())
    go(run, model=OtherConfig(), resume=True)
    assert_same_end(run.folder, whole.folder)


def test_the_loop_imports_no_model():
    imported = [node for node in ast.walk(ast.parse(inspect.getsource(loop))) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in imported for alias in node.names] + [getattr(node, "module", "") or "" for node in imported]
    assert not [name for name in names if "models" in name or "transformers" in name]


def test_validation_does_not_change_the_training_after_it(tmp_path):
    often = [row for row in metrics(go(config(tmp_path / "a", eval_every=1)).folder) if "loss/lm" in row]
    never = [row for row in metrics(go(config(tmp_path / "b"), validation=None).folder) if "loss/lm" in row]
    assert often == never


def test_validation_measures_all_rows_by_their_targets_without_dropout(tmp_path):
    run = config(tmp_path, eval_every=8, eval_rows=5, micro_rows=2)
    result = go(run, validation=UnevenRows(seed=3))
    model = FakeModel.from_pretrained(result.folder / "checkpoints" / "latest")
    batch = {k: torch.from_numpy(v) for k, v in UnevenRows(seed=3).batch(0, 5).items()}
    with torch.no_grad():
        expected = float(model(**batch, knobs=curriculum(8).at(7)[1]).loss)
    assert result.last_validation == pytest.approx(expected, rel=1e-6)


def test_evaluation_rows_beyond_the_split_are_not_measured_twice(tmp_path):
    class Short(FakeRows):
        rows_per_epoch = 3

        def batch(self, start, count):
            assert start + count <= 3
            return super().batch(start, count)

    assert go(config(tmp_path, steps=2), validation=Short(seed=3)).last_validation is not None


def test_a_run_without_validation_has_no_best_checkpoint(tmp_path):
    result = go(config(tmp_path), validation=None)
    assert result.best_validation is None and result.last_validation is None
    assert not (result.folder / "checkpoints" / "best").exists()
    assert (result.folder / "checkpoints" / "latest").exists()


def test_evaluating_less_often_than_the_run_is_long_evaluates_at_the_end_of_its_stages(tmp_path):
    result = go(config(tmp_path, eval_every=1000))
    assert [row["step"] for row in metrics(result.folder) if "validation/loss" in row] == [3, 8]


def test_losses_under_other_knobs_do_not_compete_for_the_best(tmp_path, monkeypatch):
    losses = {1: 1.0, 2: 2.0, 3: 3.0, 4: 5.0, 5: 4.0, 6: 4.5, 7: 3.5, 8: 3.25}  # the heat moves until 3 and stays from there on
    seen = iter(losses.values())
    monkeypatch.setattr(loop, "validate", lambda *a, **k: {"validation/loss": next(seen)})
    result = go(config(tmp_path, eval_every=1))
    assert (result.best_validation, (result.folder / "checkpoints" / "best").resolve().name) == (3.0, "step-00000003")


class Asking(FakeModel):
    """Calls halves of its blocks, so that it alone knows what to recompute."""

    def set_activation_checkpointing(self, enabled):
        self.asked = enabled


def test_a_model_that_can_recompute_its_activations_is_asked_to(tmp_path):
    run = config(tmp_path, activation_checkpointing=True)
    model = Asking(FakeConfig())
    parallel.prepare_model(parallel.accelerator(run), model, run)
    assert model.asked is True and "forward" not in vars(model.cells[0])


class Poisoned(FakeModel):
    """Its loss, or a gradient, is not a number once it was fed five steps."""

    where = "loss"

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        if self.training and self.seen > 10:
            poison = self.cells[0].linear.weight.sum() * 0
            out.loss = out.loss * float("nan") if self.where == "loss" else out.loss + torch.sqrt(poison)
        return out


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_before_the_weights_change(tmp_path, where):
    run = config(tmp_path)
    poisoned = []

    def build():
        poisoned.append(Poisoned(FakeConfig()))
        poisoned[0].where = where
        return poisoned[0]

    with pytest.raises(RunError) as caught:
        carry_out(run, replace(job(run), build=build), console=Console(quiet=True))
    said = str(caught.value)
    assert "step 6 is not finite" in said
    assert f"checkpoints/step-{4:08d}" in said
    assert all(f"doc-{n}" in said for n in (80, 81, 94, 95)) and "doc-79" not in said
    assert all(p.isfinite().all() for p in poisoned[0].parameters())
    assert metrics(run.folder)[-1]["step"] == 5
    assert go(run, resume=True).step == 8  # from the checkpoint, with a model that is well


def test_that_there_is_no_checkpoint_yet_is_said(tmp_path):
    run = config(tmp_path, optim={"lr": 1e30, "warmup_steps": 0}, eval_every=100, save_every=100)
    with pytest.raises(RunError, match="There is no checkpoint yet"):
        go(run)


def test_one_seed_gives_one_run_and_another_seed_another(tmp_path):
    one, two, three = (metrics(go(config(tmp_path / str(i), seed=seed)).folder) for i, seed in enumerate([0, 0, 1]))
    assert one == two
    assert one != three


def test_rows_are_read_in_order_once(tmp_path):
    asked = []

    class Watched(FakeRows):
        def batch(self, start, count):
            asked.extend(range(start, start + count))
            return super().batch(start, count)

    go(config(tmp_path, batch_tokens=84, micro_rows=3), rows=Watched())  # 7 rows a step
    assert asked == list(range(56))


def test_speed_utilisation_and_memory_are_logged(tmp_path):
    rows = [json.loads(line) for line in (go(config(tmp_path)).folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "loss/lm" in row:
            assert row["time/tokens_per_s"] > 0 and 0 < row["time/flops_utilisation"] < 1 and row["memory/gib"] > 0.05
        else:
            assert row["time/validation_s"] > 0


def test_logging_less_often_logs_the_same_numbers(tmp_path):
    all_rows = metrics(go(config(tmp_path / "a")).folder)
    some = metrics(go(config(tmp_path / "b", log_every=3)).folder)
    assert some == [row for row in all_rows if "validation/loss" in row or row["step"] in (1, 3, 6, 8)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_model_trains_to_nearly_the_same_loss(tmp_path):
    plain = go(config(tmp_path / "a"), dropout=0.0)
    compiled = go(config(tmp_path / "b", compile=True), dropout=0.0)
    assert compiled.last_validation == pytest.approx(plain.last_validation, rel=1e-4)
    FakeModel.from_pretrained(compiled.folder / "checkpoints" / "latest")
