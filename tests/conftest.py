"""What every test runs under: no network for Hugging Face libraries, and one thread per worker."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread_per_worker():
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
