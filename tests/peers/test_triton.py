"""The fused scan in Triton, without a GPU: its results by Triton's interpreter, and that it compiles for one."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mamba
from tests import test_mamba as scans

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:overflow"),  # NumPy's, for 1 / (1 + e^x) at a large x, which is rightly 0
]
TILINGS = {  # BLOCK, ROWS, TILE and PROGRAMS of TritonScan
    "one segment, ragged tiles": {"BLOCK": 8, "ROWS": 4, "TILE": 4, "PROGRAMS": 1},
    "segments of one block": {"BLOCK": 4, "ROWS": 2, "TILE": 8, "PROGRAMS": 512},
    "blocks longer than the sequence": {"BLOCK": 64, "ROWS": 4, "TILE": 16, "PROGRAMS": 512},
}
CASES = {
    "L = 1": functools.partial(scans.draw, 2, 1, 5, 3),
    "L prime": functools.partial(scans.draw, 1, 23, 7, 16),
    "no optional tensors": functools.partial(
        scans.draw, 2, 9, 5, 1, positive=True, without=["D", "z", "delta_bias", "initial_state", "starts"]
    ),
    "exp(delta A) is 0": functools.partial(scans.draw, 1, 13, 3, 4, scale=1e5),
    "delta near 0": functools.partial(scans.draw, 1, 13, 3, 4, scale=1e-7, positive=True),
    "softplus is tiny": lambda: scans.draw(1, 13, 3, 4) | {"delta_bias": torch.tensor([-12.0, -9.0, -6.0])},
    "A near 0": functools.partial(scans.draw, 1, 13, 3, 4, A=1e-6, starts=0),
    "A large": functools.partial(scans.draw, 1, 13, 3, 4, A=1e3),
    "all starts": functools.partial(scans.draw, 1, 13, 3, 4, starts=1.1),
    "many starts": functools.partial(scans.draw, 2, 21, 3, 5, starts=0.3),
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name, value in TILINGS["segments of one block"].items():
        monkeypatch.setattr(mamba.TritonScan, name, value)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("name", CASES)
def test_scan_is_the_recurrence(name, tiling, monkeypatch):
    for option, value in TILINGS[tiling].items():
        monkeypatch.setattr(mamba.TritonScan, option, value)
    x, layout = CASES[name](), scans.LAYOUTS[len(name) % 4]
    truth = scans.differentiate(scans.recurrence, x, layout, torch.float64)
    scans.check(scans.differentiate(scans.with_state("fused"), x, layout), truth, 1e-5)


def test_this_is_tritons_scan():
    x = scans.draw(1, 5, 3, 4)["u"]
    assert mamba.fused_kind(x) is mamba.TritonScan
    assert type(mamba.triton_forward).__module__.startswith("triton") or mamba.triton_problem() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    x = scans.draw(1, 11, 5, 4)
    half = x | {k: x[k].to(dtype) for k in ("u", "delta", "B", "C", "z")}
    ours = scans.differentiate(scans.with_state("fused"), half)
    whole = half | {k: half[k].float() for k in ("u", "delta", "B", "C", "z")}
    truth = scans.differentiate(scans.with_state("fused"), whole)
    assert ours["y"].dtype == dtype and ours["state"].dtype == torch.float32
    assert torch.equal(ours["state"], truth["state"])
    assert dtype == torch.bfloat16 or torch.equal(ours["y"], truth["y"].half())  # the interpreter cuts bfloat16 off
    scans.check(ours, truth, 2 * torch.finfo(dtype).eps)


def test_inputs_are_not_copied(monkeypatch):
    """Whatever their strides; only starts, A and vectors of D values may be."""
    x = scans.draw(2, 9, 5, 4)
    wide = {k: torch.nn.functional.pad(x[k], (3, 2))[..., 3:-2] for k in ("u", "delta", "z", "B", "C")}
    scan = mamba.TritonScan(**{k: v for k, v in (x | wide).items() if k != "initial_state"})
    assert all(scan.inputs[k].data_ptr() == wide[k].data_ptr() for k in wide)


@pytest.mark.parametrize("cuts", [[1], [12], [4, 5, 11]])
def test_a_sequence_may_be_cut_anywhere(cuts):
    x = scans.draw(1, 13, 5, 4, starts=0)
    pieces = scans.differentiate(scans.in_pieces(cuts, True, "fused"), x)
    scans.check(pieces, scans.differentiate(scans.with_state("fused"), x), 1e-5)


def test_runs_are_bitwise_equal():
    x = scans.draw(2, 13, 9, 4)
    first, second = (scans.differentiate(scans.with_state("fused"), x) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


COMPILE = """
import itertools, json, sys, triton, mamba
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
assert mamba.triton_problem() is None
options = {"SOFTPLUS": True, "BLOCK": 64, "ROWS": mamba.TritonScan.ROWS, "W": mamba.TritonScan.TILE, "STATES": 16}
whole = {"y", "dy", "du", "ddelta", "dz", "u", "delta", "B", "C", "z"}  # in the model's dtype, the rest in float32
optional = {"D", "z", "delta_bias", "starts", "dz", "saved", "decay"}
for name, dtype, without in json.loads(sys.stdin.read()):
    kernel, signature, constants = getattr(mamba, name), {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in options or argument in without or argument in optional - {"saved"} and "optional" in without:
            signature[argument], constants[(i,)] = "constexpr", options.get(argument)
        elif argument in ("L", "channels", "N", "span") or argument[-2:] in ("_b", "_l", "_d", "_n"):
            signature[argument] = "i32"
        else:
            signature[argument] = "*u8" if argument == "starts" else f"*{dtype if argument in whole else 'fp32'}"
    source = ASTSource(kernel, signature, constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": mamba.TritonScan.WARPS})
    print(name, dtype, len(built.asm["cubin"]), ".local" in built.asm["ptx"], "atom." in built.asm["ptx"])
"""


def test_the_kernels_compile_for_an_h200():
    """In another process, for this one has the interpreter; no GPU is needed. Nothing spills, nothing is atomic."""
    gradients = ["du", "ddelta", "dz", "dA", "dB", "dC", "dD", "dbias"]
    todo = [
        ("triton_forward", "bf16", ["decay"]),
        ("triton_forward", "fp32", ["optional"]),
        ("triton_forward", "fp16", ["y", "C", "saved", "z"]),  # the segments' ends
        ("triton_backward", "bf16", []),
        ("triton_backward", "fp32", ["optional"]),
        ("triton_backward", "fp16", ["u", "B", "saved", "memory", *gradients]),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], input=json.dumps(todo), env=environment, cwd=Path(mamba.__file__).parent,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == len(todo) and all(int(size) > 1000 for _, _, size, _, _ in rows), rows
    assert all(spills == atomics == "False" for *_, spills, atomics in rows), rows


def test_the_check_for_a_gpu_runs(tmp_path):
    """`tests/gpu/check.py` at tiny sizes: the program itself must not fail first where there is a GPU."""
    script = Path(mamba.__file__).with_name("tests") / "gpu" / "check.py"
    command = [sys.executable, str(script), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)  # the fixture asked for the interpreter
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["checks"]) == 3 and all(row["right"] for row in result["checks"])
    assert result["scan"][0]["fused"]["backward"] > 0 and result["models"]["mamba.py"]["training"] > 0
