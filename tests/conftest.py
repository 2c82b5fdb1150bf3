"""Settings for every test: the same random state, the same number of threads, no window for a picture."""

import os

import pytest
import torch

# Child processes read these; two threads keep sums, and so metrics, the same from machine to machine.
os.environ["OMP_NUM_THREADS"] = "2"
os.environ["MPLBACKEND"] = "Agg"
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def same_random_state() -> None:
    """A test's draws do not depend on the tests that ran before it."""
    torch.manual_seed(0)
