"""On a CUDA device: the same run, one wait for the device a step."""

import warnings

import pytest
import torch
from fake_family import FakeConfig, FakeModel, FakeRows, config, curriculum, go
from reading import metrics

from pathlm.models.output import PathOutput
from pathlm.train import batches, loop, parallel
from pathlm.train.interrupt import Interrupt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_host_waits_for_the_device_once_a_step(tmp_path, precision):
    run = config(tmp_path, precision=precision)
    acc = parallel.accelerator(run)
    model = FakeModel(FakeConfig(dropout=0.0))
    model.forward = quiet_forward(model)
    called = parallel.prepare_model(acc, model, run)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = batches.read(FakeRows(), 0, 8, batches.Share(0, 1, 4), pin=True)
    knobs = curriculum(8).at(5)[1]
    for _ in range(2):
        loop.step(acc, called, optimizer, batch, knobs, clip=1.0, interrupt=Interrupt())
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            loop.step(acc, called, optimizer, batch, knobs, clip=1.0, interrupt=Interrupt())
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in found if "synchroniz" in str(w.message)]) == 1


def quiet_forward(model):
    """The model without its metrics: indexing by a mask waits for the device."""

    def forward(input_ids, labels, document_ids, knobs, **kwargs):
        h = model.embed(input_ids)
        for cell in model.cells:
            h = cell(h)
        logits = model.head(h)
        return PathOutput(loss=torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()))

    return forward


def test_a_run_on_the_gpu_resumes_and_reports_its_memory(tmp_path):
    whole = go(config(tmp_path / "whole", steps=12, optim={"schedule": "constant"}))
    run = config(tmp_path / "parts", optim={"schedule": "constant"})
    go(run)
    go(config(tmp_path / "parts", steps=12, optim={"schedule": "constant"}), resume=True)
    a, b = ([row["loss/lm"] for row in metrics(folder) if "loss/lm" in row] for folder in (whole.folder, run.folder))
    assert a == pytest.approx(b, rel=1e-5)
