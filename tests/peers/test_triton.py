"""The fused scan in Triton, without a GPU: by its interpreter, and that it compiles for one."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import mamba
from tests.test_mamba import LAYOUTS, check, differentiate, draw, recurrence

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:overflow"),  # NumPy's, of 1 / (1 + e^x), which is rightly 0
]
small, optional = partial(draw, 1, 13, 3, 4), ["D", "z", "delta_bias", "initial_state", "starts"]
CASES = {
    "L = 1": partial(draw, 2, 1, 5, 3),
    "L prime": partial(draw, 2, 23, 7, 16, starts=0.2),
    "no optional tensors": partial(draw, 2, 9, 5, 1, positive=True, without=optional),
    "exp(delta A) is 0": partial(small, scale=1e5),
    "delta near 0": partial(small, scale=1e-7, positive=True),
    "softplus is tiny": lambda: small() | {"delta_bias": torch.tensor([-12.0, -9.0, -6.0])},
    "A near 0": partial(small, A=1e-6, starts=0),
    "A large": partial(small, A=1e3),
    "all starts": partial(small, starts=1.1),
}
fused = partial(mamba.selective_scan, return_final_state=True, backend="fused")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(mamba, "c_library", None)  # so it is Triton's


@pytest.mark.parametrize(("block", "width"), [(1, 2), (8, 4), (4, 8), (64, 16)])
@pytest.mark.parametrize("name", CASES)
def test_scan_is_the_recurrence(name, block, width, monkeypatch):
    monkeypatch.setattr(mamba.FusedScan, "BLOCK", block)
    monkeypatch.setattr(mamba.FusedScan, "TILE", width)
    x, layout = CASES[name](), LAYOUTS[len(name) % 4]
    truth = differentiate(recurrence, x, layout, torch.float64)
    check(differentiate(fused, x, layout), truth, 1e-5)


def test_runs_are_bitwise_equal():
    x = draw(2, 18, 70, 3)  # two blocks, and two tiles of channels
    first, second = differentiate(fused, x), differentiate(fused, x)
    assert all(torch.equal(first[k], second[k]) for k in first)
    y, state = fused(**x)  # which keeps nothing for a backward pass
    assert torch.equal(y, first["y"]) and torch.equal(state, first["state"])


COMPILE = """
import os, torch, triton, mamba
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
kernel = mamba.triton_kernel()

class Compiler:  # what FusedScan.run launches, compiled and not run
    def __getitem__(self, grid):
        return self

    def __call__(self, *given, num_warps, **constants):
        given, signature = dict(zip(kernel.arg_names, given)) | constants, {}
        kinds = {int: "i32", torch.Tensor: "*fp32"}
        for name, value in given.items():
            constant = name in constants or value is None
            signature[name] = "constexpr" if constant else kinds[type(value)]
        constants = {(i,): given[k] for i, k in enumerate(given) if signature[k] == "constexpr"}
        source, options = ASTSource(kernel, signature, constants), {"num_warps": num_warps}
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        ptx, saved, dy = built.asm["ptx"], given["saved"] is not None, given["dy"] is not None
        print(saved, dy, len(built.asm["cubin"]), ".local" in ptx, "atom." in ptx)

mamba.triton_kernel, os.environ["TRITON_INTERPRET"] = Compiler, "1"
x = [torch.rand(2, 40, n, requires_grad=True) for n in (70, 70, 16, 16)]
x = [*x[:2], torch.rand(70, 16), *x[2:], torch.rand(2, 70, 16)]
y, h = mamba.FusedScan.apply(*x)
(y.sum() + h.sum()).backward()
mamba.FusedScan.apply(*(v.detach() for v in x))
"""


def test_the_kernel_compiles_for_an_h200(monkeypatch):
    """In another process, for this one has the interpreter; no GPU. No spills, no atomics."""
    monkeypatch.delenv("TRITON_INTERPRET")
    command, folder = [sys.executable, "-c", COMPILE], Path(mamba.__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    kinds = [["True", "False"], ["True", "True"], ["False", "False"]]  # saved, dy
    assert [row[:2] for row in rows] == kinds, rows
    assert all(int(row[2]) > 1000 and row[3:] == ["False", "False"] for row in rows), rows


def test_the_check_for_a_gpu_runs(tmp_path):
    """`tests/gpu/check.py` at tiny sizes, so that where there is a GPU it does not fail itself."""
    script = Path(mamba.__file__).with_name("tests") / "gpu" / "check.py"
    command = [sys.executable, str(script), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["checks"]) == 3 and all(row["right"] for row in result["checks"])
    assert result["scan"] and result["models"]["mamba.py"]["training"] > 0
