"""Settings for every test: the same random state and number of threads, no window for a picture."""

import os
import sys

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # before torch: threads that wait must soon sleep
import torch

# Child processes read these; two threads keep sums, and so metrics, the same on every machine.
os.environ["OMP_NUM_THREADS"] = "2"
os.environ["MPLBACKEND"] = "Agg"
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def same_random_state() -> None:
    """A test's draws do not depend on the tests that ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For tests whose tensors are small: a second thread costs time, most where others run."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


@pytest.fixture
def no_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
