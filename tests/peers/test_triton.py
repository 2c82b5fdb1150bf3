"""The fused scan in Triton, without a GPU: by its interpreter, and that it compiles for one."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mamba
from tests.test_mamba import LAYOUTS, check, differentiate, draw, in_pieces, recurrence, scan_by

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:overflow"),  # NumPy's, of 1 / (1 + e^x), which is rightly 0
]
small = functools.partial(draw, 1, 13, 3, 4)
optional = ["D", "z", "delta_bias", "initial_state", "starts"]
CASES = {
    "L = 1": functools.partial(draw, 2, 1, 5, 3),
    "L prime": functools.partial(draw, 1, 23, 7, 16),
    "no optional tensors": functools.partial(draw, 2, 9, 5, 1, positive=True, without=optional),
    "exp(delta A) is 0": functools.partial(small, scale=1e5),
    "delta near 0": functools.partial(small, scale=1e-7, positive=True),
    "softplus is tiny": lambda: small() | {"delta_bias": torch.tensor([-12.0, -9.0, -6.0])},
    "A near 0": functools.partial(small, A=1e-6, starts=0),
    "A large": functools.partial(small, A=1e3),
    "all starts": functools.partial(small, starts=1.1),
    "many starts": functools.partial(draw, 2, 21, 3, 5, starts=0.3),
}
fused = scan_by("fused")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tile(monkeypatch, 4, 8)


def tile(monkeypatch, block, width):
    monkeypatch.setattr(mamba.FusedScan, "BLOCK", block)
    monkeypatch.setattr(mamba.FusedScan, "TILE", width)


@pytest.mark.parametrize(("block", "width"), [(1, 2), (8, 4), (4, 8), (64, 16)])
@pytest.mark.parametrize("name", CASES)
def test_scan_is_the_recurrence(name, block, width, monkeypatch):
    tile(monkeypatch, block, width)
    monkeypatch.setattr(mamba, "c_library", None)  # it is Triton's
    x, layout = CASES[name](), LAYOUTS[len(name) % 4]
    truth = differentiate(recurrence, x, layout, torch.float64)
    check(differentiate(fused, x, layout), truth, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    x = draw(1, 11, 5, 4)
    half = x | {name: x[name].to(dtype) for name in ("u", "delta", "B", "C", "z")}
    single = half | {name: half[name].float() for name in ("u", "delta", "B", "C", "z")}
    ours, truth = differentiate(fused, half), differentiate(fused, single)
    assert ours["y"].dtype == dtype and ours["state"].dtype == torch.float32
    assert torch.equal(ours["y"], truth["y"].to(dtype))
    assert torch.equal(ours["state"], truth["state"])
    check(ours, truth, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("cuts", [[1], [12], [4, 5, 11]])
def test_a_sequence_may_be_cut_anywhere(cuts):
    x = draw(1, 13, 5, 4)
    check(differentiate(in_pieces(cuts, True, "fused"), x), differentiate(fused, x), 1e-5)


def test_runs_are_bitwise_equal():
    x = draw(2, 13, 9, 4)
    first, second = differentiate(fused, x), differentiate(fused, x)
    assert all(torch.equal(first[k], second[k]) for k in first)
    with torch.no_grad():
        y, state = fused(**x)
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


def test_the_kernel_compiles_for_an_h200():
    """In another process, for this one has the interpreter; no GPU. No spills, no atomics."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command, folder = [sys.executable, "-c", COMPILE], Path(mamba.__file__).parent
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    kinds = [["True", "False"], ["True", "True"], ["False", "False"]]  # saved, dy
    assert [row[:2] for row in rows] == kinds and all(int(row[2]) > 1000 for row in rows), rows
    assert all(row[3:] == ["False", "False"] for row in rows), rows


def test_the_check_for_a_gpu_runs(tmp_path):
    """`tests/gpu/check.py` at tiny sizes, so that where there is a GPU it does not fail itself."""
    script = Path(mamba.__file__).with_name("tests") / "gpu" / "check.py"
    command = [sys.executable, str(script), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["checks"]) == 3 and all(row["right"] for row in result["checks"])
    assert result["scan"][0]["fused"]["backward"] > 0
    assert result["models"]["mamba.py"]["training"] > 0
