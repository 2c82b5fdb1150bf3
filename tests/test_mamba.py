"""Mamba's own: the scan against slow loops, the model against steps, folders, and the state that training carries."""

import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mamba
from tests._helpers import close, corpus_of, far_from_zero, text

pytestmark = pytest.mark.usefixtures("one_thread")


# ----- The oracle: the paper's recurrence, one position after another -------------------------------------------------


def recurrence(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None, starts=None
):
    """Section 3.2, slowly, in float64: h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t."""
    D, delta_bias, initial_state = (None if x is None else x.double() for x in (D, delta_bias, initial_state))
    h = torch.zeros(len(u), *A.shape).double() if initial_state is None else initial_state
    columns = (x.double().unbind(1) for x in (u, delta, torch.zeros_like(u) if z is None else z))
    Bs, Cs = (w.double()[:, :, None].unbind(1) if w.ndim == 3 else [w.double()] * u.shape[1] for w in (B, C))
    ys = []
    for t, (u_t, step, z_t) in enumerate(zip(*columns, strict=True)):
        step = step if delta_bias is None else step + delta_bias
        step = torch.logaddexp(step, torch.zeros_like(step)) if delta_softplus else step
        if starts is not None:
            h = torch.where(starts[:, t, None, None], torch.zeros_like(h), h)
        h = torch.exp(step[..., None] * A.double()) * h + step[..., None] * Bs[t] * u_t[..., None]
        y = (Cs[t] * h).sum(-1)
        y = y if D is None else y + D * u_t
        ys.append(y if z is None else y * z_t * torch.sigmoid(z_t))
    return torch.stack(ys, 1), h


def draw(B, L, D, N, seed=0, static="", without=(), positive=False, starts=0.05, scale=1.0, A=1.0):
    """Arguments of `selective_scan`, all but those in `without`; B and C input-independent where `static`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x = {"u": normal(B, L, D), "delta": normal(B, L, D) * scale, "A": -A * normal(D, N).exp()}
    x |= {name: normal(D, N) if name in static else normal(B, L, N) for name in "BC"}
    x |= {"D": normal(D), "z": normal(B, L, D), "delta_bias": normal(D), "initial_state": normal(B, D, N)}
    x |= {"delta_softplus": not positive, "starts": torch.rand(B, L, generator=generator) < starts}
    if positive:  # step sizes are given as they are
        x |= {"delta": x["delta"].abs(), "delta_bias": x["delta_bias"].abs() * scale}
    return {k: v for k, v in x.items() if k not in without}


def drawn(seed):
    """Random sizes, and each optional argument there or not."""
    r = random.Random(seed)
    B, L, N = r.randint(1, 4), r.choice([r.randint(1, 12), r.randint(13, 60), r.randint(61, 150)]), r.randint(1, 20)
    without = [k for k in ("D", "z", "delta_bias", "initial_state", "starts") if r.random() < 0.4]
    static = "".join(k for k in "BC" if r.random() < 0.3)
    return draw(B, L, r.randint(1, 70 if L <= 60 else 9), N, seed, static, without, positive=r.random() < 0.3)


LAYOUTS = (
    lambda x: x,
    lambda x: F.pad(x, (3, 2))[..., 3:-2],  # a slice of a wider projection
    lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    lambda x: x[:1].expand_as(x),
)


def differentiate(scan, x, layout=LAYOUTS[0], dtype=None):
    """y, the last state, and the gradients of all tensors of `x` from both of these."""
    leaves = {k: v.to(dtype or v.dtype) for k, v in x.items() if torch.is_tensor(v) and v.is_floating_point()}
    leaves = {k: v.clone().requires_grad_() for k, v in leaves.items()}
    y, state = scan(**x | {k: layout(v) for k, v in leaves.items()})
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in (y, state)]
    grads = torch.autograd.grad((y, state), list(leaves.values()), upstream)
    return {"y": y, "state": state} | dict(zip(leaves, grads, strict=True))


def distance(ours, truth):
    """Relative error in norm of each tensor; what must be 0 must be exactly 0."""
    errors = {}
    for k in truth.keys() | ours.keys():
        size, off = truth[k].double().norm().item(), (ours[k].double() - truth[k].double()).norm().item()
        errors[k] = 0.0 if off == 0 else off / size if size else math.inf
    return errors


def check(ours, truth, tolerance):
    wrong = {k: e for k, e in distance(ours, truth).items() if not e <= tolerance}
    assert not wrong, wrong


def with_state(backend="auto"):
    return functools.partial(mamba.selective_scan, return_final_state=True, backend=backend)


HARD = {
    "L = 1": functools.partial(draw, 2, 1, 5, 3),
    "L prime": functools.partial(draw, 1, 197, 7, 16),
    "L 5000": functools.partial(draw, 1, 5000, 2, 2, starts=0.001, without=["z", "delta_bias"]),
    "many channels": functools.partial(draw, 1, 85, 600, 16, without=["D", "z"]),
    "exp(delta A) is 0": functools.partial(draw, 2, 40, 6, 4, scale=1e5),
    "exp(delta A) is 0, no softplus": functools.partial(draw, 2, 40, 6, 4, scale=1e5, positive=True),
    "delta near 0": functools.partial(draw, 2, 90, 6, 4, scale=1e-7, positive=True),
    "A near 0": functools.partial(draw, 2, 90, 6, 4, A=1e-6, starts=0),
    "A large": functools.partial(draw, 2, 90, 6, 4, A=1e3),
    "all starts": functools.partial(draw, 2, 60, 6, 4, starts=1.1),
    "static B and C": functools.partial(draw, 2, 130, 6, 4, static="BC"),
}
CASES = HARD | {f"drawn {seed}": functools.partial(drawn, seed) for seed in range(25)}
TINY = (2**14, 8, 48, 2**11)  # ChunkedScan.SIZES that force segments, many windows and blocks
PATHS = [*((name, None) for name in mamba.SCANS), ("chunked", TINY)]


def need(backend, x, dtype=torch.float32):
    """Skip, visibly, what the fused scan does not take; without a compiler that is everything."""
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "delta_softplus", "starts")
    arguments = [v.to(dtype) if torch.is_tensor(v := x.get(k)) and v.is_floating_point() else v for k in names]
    if backend == "fused" and (problem := mamba.fused_problem(*arguments)):
        pytest.skip(f"fused: {problem}")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(mamba.ChunkedScan.SIZES, "cpu", TINY)


@functools.cache
def case_and_truth(name):
    x = CASES[name]()
    layout = LAYOUTS[len(name + name[-1]) % 4 if name in HARD else int(name.split()[1]) % 4]
    return x, layout, differentiate(recurrence, x, layout, torch.float64)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("backend", "sizes"), PATHS)
def test_scan_is_the_recurrence(name, backend, sizes, monkeypatch):
    if sizes:
        monkeypatch.setitem(mamba.ChunkedScan.SIZES, "cpu", sizes)
    x, layout, truth = case_and_truth(name)
    need(backend, x)
    check(differentiate(with_state(backend), x, layout), truth, 1e-5)


def paths_taken(cases):
    """What the stretches, windows and blocks of these cases have in them."""
    taken = set()
    for x in cases:
        arguments = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "starts")
        stretches = mamba.ChunkedScan(*(x.get(k) for k in arguments)).stretches()
        taken |= {"segments"} if stretches[0][0].segments > 1 else {"one segment"}
        taken |= {"remainder after segments"} if len(stretches) > 1 else set()
        taken |= {"windows"} if any(len(windows) > 2 for windows in stretches) else set()
        taken |= {"blocks"} if any(window.blocks > 1 for windows in stretches for window in windows) else set()
        taken |= {"ragged tail"} if any(windows[-1].T < windows[0].T for windows in stretches) else set()
    return taken


@pytest.mark.parametrize("sizes", [None, TINY])
def test_the_cases_take_every_path(sizes, monkeypatch):
    if sizes:
        monkeypatch.setitem(mamba.ChunkedScan.SIZES, "cpu", sizes)
    every = {"segments", "one segment", "remainder after segments", "blocks", "ragged tail"}
    assert paths_taken(make() for make in CASES.values()) >= every | ({"windows"} if sizes else set())


@pytest.mark.parametrize(("backend", "sizes"), PATHS)
def test_float64_is_computed_in_float64(backend, sizes, monkeypatch):
    if sizes:
        monkeypatch.setitem(mamba.ChunkedScan.SIZES, "cpu", sizes)
    for static in ("", "BC"):
        x = draw(2, 45, 9, 5, static=static)
        need(backend, x, torch.float64)
        truth = differentiate(recurrence, x, dtype=torch.float64)
        ours = differentiate(with_state(backend), x, dtype=torch.float64)
        assert {v.dtype for v in ours.values()} == {torch.float64}
        check(ours, truth, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", mamba.SCANS)
def test_half_precision_inputs_are_computed_in_float32(backend, dtype, tiny):
    check_half(draw(2, 45, 9, 5), backend, dtype)
    check_half(draw(2, 45, 9, 5, without=["delta_bias"]), backend, dtype)  # which would make delta float32


def check_half(x, backend, dtype):
    need(backend, x)
    half = x | {k: x[k].to(dtype) for k in ("u", "delta", "B", "C", "z")}
    ours = differentiate(with_state(backend), half)
    truth = differentiate(with_state(backend), half | {k: half[k].float() for k in ("u", "delta", "B", "C", "z")})
    assert ours["y"].dtype == dtype and ours["state"].dtype == torch.float32
    check({"state": ours["state"]}, {"state": truth["state"]}, 1e-6)
    if "delta_bias" in x:  # sums are then taken in the same order
        assert all(torch.equal(ours[k], truth[k].to(ours[k].dtype)) for k in ("y", "state"))
    assert all(ours[k].dtype == v.dtype for k, v in half.items() if k in ours)
    check(ours, truth, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("static", ["", "BC"])
@pytest.mark.parametrize("sizes", [(24, 2, 8, 8), (0, 2, 8, 1000)])
def test_gradients_are_the_finite_differences(static, sizes, monkeypatch):
    monkeypatch.setitem(mamba.ChunkedScan.SIZES, "cpu", sizes)
    x = draw(2, 11, 2, 2, static=static, starts=0.2)
    names = [k for k, v in x.items() if torch.is_tensor(v) and v.is_floating_point()]
    tensors = [x[k].double().requires_grad_() for k in names]

    def scan(*tensors):
        return with_state("chunked")(**x | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(scan, tensors, fast_mode=False)


# ----- Properties of the scan -----------------------------------------------------------------------------------------


def in_pieces(cuts, carry, backend):
    """`selective_scan` run piece by piece, the state carried over the cuts or dropped there."""

    def scan(starts=None, initial_state=None, **x):
        ys, state = [], initial_state
        for a, b in itertools.pairwise([0, *cuts, x["u"].shape[1]]):
            piece = {k: v[:, a:b] if k in ("u", "delta", "z", "B", "C") and v.ndim == 3 else v for k, v in x.items()}
            state = state if a == 0 or carry else None
            marks = None if starts is None else starts[:, a:b]
            y, state = with_state(backend)(**piece, initial_state=state, starts=marks)
            ys.append(y)
        return torch.cat(ys, 1), state

    return scan


@pytest.fixture(params=["chunked", "fused"])
def backend(request, tiny):
    """The parallel scans, the chunked one in small pieces."""
    need(request.param, draw(1, 2, 3, 4))
    return request.param


@pytest.mark.parametrize("static", ["", "BC"])
def test_starts_are_documents_run_apart(static, backend):
    x, cuts = draw(2, 60, 9, 5, static=static), [1, 17, 18, 40]
    need(backend, x)
    x["starts"] = torch.zeros(2, 60, dtype=torch.bool)
    x["starts"][:, cuts] = True
    check(differentiate(with_state(backend), x), differentiate(in_pieces(cuts, False, backend), x), 1e-5)


def test_a_start_at_position_0_drops_the_initial_state(backend):
    x = draw(2, 30, 9, 5, starts=0)
    x["starts"][:, 0] = True
    ours = differentiate(with_state(backend), x)
    bare = differentiate(with_state(backend), {k: v for k, v in x.items() if k not in ("initial_state", "starts")})
    assert not ours.pop("initial_state").any()
    check(ours, bare, 1e-6)


@pytest.mark.parametrize("cuts", [[1], [59], [30], [7, 8, 31]])
def test_a_sequence_may_be_cut_anywhere(cuts, backend):
    x = draw(2, 60, 9, 5)
    check(differentiate(in_pieces(cuts, True, backend), x), differentiate(with_state(backend), x), 1e-5)


@pytest.mark.parametrize(("backend", "sizes"), PATHS)
def test_runs_are_bitwise_equal_and_inputs_are_left_alone(backend, sizes, monkeypatch):
    if sizes:
        monkeypatch.setitem(mamba.ChunkedScan.SIZES, "cpu", sizes)
    torch.set_num_threads(2)
    x = draw(3, 100, 20, 8)
    need(backend, x)
    before = {k: v.clone() for k, v in x.items() if torch.is_tensor(v)}
    first, second = (differentiate(with_state(backend), x) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    with torch.no_grad():
        y, state = with_state(backend)(**x)
    assert torch.equal(y, first["y"]) and torch.equal(state, first["state"])
    assert all(torch.equal(x[k], v) for k, v in before.items())


def test_backward_may_be_called_twice(backend):
    x = draw(2, 60, 9, 5)
    leaves = {k: v.requires_grad_() for k, v in x.items() if torch.is_tensor(v) and v.is_floating_point()}
    y, state = with_state(backend)(**x)
    loss = (y * y).sum() + state.sum()
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_states_are_not_kept(backend):
    B, L, D, N = 2, 256, 64, 16
    x, sizes = draw(B, L, D, N), []
    x["u"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda v: sizes.append(v.numel()) or v, lambda v: v):
        y = mamba.selective_scan(**x, backend=backend)
        assert y.requires_grad and sum(sizes) < B * L * D * N / 2  # the inputs are 4 N-ths of it
        sizes.clear()
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                assert not mamba.selective_scan(**x).requires_grad
        mamba.selective_scan(**x | {"u": x["u"].detach()})
        assert not sizes


@pytest.mark.parametrize("backend", mamba.SCANS)
def test_autocast_does_not_reach_the_scan(backend, monkeypatch):
    x, scan, on = draw(2, 60, 9, 5), mamba.SCANS[backend], []
    need(backend, x)
    plain = differentiate(with_state(backend), x)
    monkeypatch.setitem(mamba.SCANS, backend, lambda *args: on.append(torch.is_autocast_enabled("cpu")) or scan(*args))
    with torch.autocast("cpu", torch.bfloat16):
        under = differentiate(with_state(backend), x)
    assert on == [False] and all(torch.equal(plain[k], under[k]) for k in plain)


# ----- The fused scan's library ---------------------------------------------------------------------------------------

PROGRAM = """
import sys, torch, mamba
torch.manual_seed(0)
compile_c, tried = mamba.compile_c, []
mamba.compile_c = lambda *arguments: tried.append(arguments) or compile_c(*arguments)
u, delta, B, C = torch.randn(2, 50, 70), torch.rand(2, 50, 70), torch.randn(2, 50, 4), torch.randn(2, 50, 4)
x = [v.requires_grad_() for v in (u, delta, -torch.rand(70, 4), B, C)]
y, want = (mamba.selective_scan(*x, backend=b) for b in ("auto", "sequential"))
assert (y - want).norm() < 1e-5 * want.norm()
y.sum().backward()
mamba.selective_scan(*x)
assert len(tried) <= 3, tried  # once, with each set of flags
print(mamba.fused_problem(*x, *[None] * 6))
"""


def start_program(cache, **environment):
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.Popen(command, cwd=Path(mamba.__file__).parent, env=environment, stdout=-1, stderr=-1, text=True)


def ends(process):
    """What it printed, and its lines on standard error."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output.strip(), errors.splitlines()


def test_two_processes_may_compile_at_once(tmp_path):
    need("fused", draw(1, 2, 3, 4))
    running = [start_program(tmp_path) for _ in range(2)]
    assert [ends(process) for process in running] == [("None", [])] * 2
    (made,) = (tmp_path / "mamba-scan").iterdir()  # one library, and nothing half written
    assert made.suffix == ".so" and not (tmp_path / "mamba-scan").stat().st_mode & 0o077
    before = made.stat().st_mtime_ns
    assert ends(start_program(tmp_path)) == ("None", []) and made.stat().st_mtime_ns == before


def test_an_unfit_cache_folder_is_left_alone(tmp_path):
    """One that others may write to, a file in its place, a place where no folder can be made; side by side."""
    need("fused", draw(1, 2, 3, 4))
    caches = {name: tmp_path / name for name in ("open", "file", "none")}
    for folder in caches.values():
        folder.mkdir()
    (caches["open"] / "mamba-scan").mkdir()
    (caches["open"] / "mamba-scan").chmod(0o777)
    (caches["file"] / "mamba-scan").write_text("")
    places = caches | {"none": Path("/proc")}
    running = {name: start_program(places[name], TMPDIR=str(folder)) for name, folder in caches.items()}
    for name, folder in caches.items():
        assert ends(running[name]) == ("None", []), name
        assert not list((places[name] / "mamba-scan").glob("*")) and list(folder.glob("mamba-scan-*/scan-*.so")), name


def test_without_a_compiler_the_chunked_scan_runs_and_one_line_says_so(tmp_path):
    compilers = ("no-such-compiler", "false", "cc -no-such-flag")
    for place in compilers:
        (tmp_path / place).mkdir()
    running = {compiler: start_program(tmp_path / compiler, CC=compiler) for compiler in compilers}
    for compiler, process in running.items():
        problem, errors = ends(process)
        said = r"selective_scan: chunked and not fused, since .*compiled"
        assert len(errors) == 1 and re.match(said, errors[0]), (compiler, errors)
        assert "could not be compiled" in problem, compiler
        assert not list((tmp_path / compiler / "mamba-scan").iterdir()), compiler


def test_the_fused_scan_says_what_it_cannot_take():
    x = draw(2, 5, 3, 4)
    double = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in x.items()}
    with pytest.raises(ValueError, match="float32, and the input is float64; choose backend"):
        mamba.selective_scan(**double, backend="fused")
    with pytest.raises(ValueError, match="input-independent; choose backend"):
        mamba.selective_scan(**draw(2, 5, 3, 4, static="B"), backend="fused")


@pytest.mark.parametrize("channels", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
def test_tiles_and_blocks_of_any_size(channels, length):
    x = draw(2, length, channels, 3, seed=channels + length)
    need("fused", x)
    check(differentiate(with_state("fused"), x), differentiate(recurrence, x, dtype=torch.float64), 1e-5)


def test_rows_may_lie_apart():
    x = draw(2, 20, 12, 4)
    need("fused", x)
    wide = {
        k: torch.cat([v, torch.full_like(v, math.nan)], -1)[..., : v.shape[-1]] for k, v in x.items() if k in "uzBC"
    }
    turned = {"delta": x["delta"].mT.contiguous().mT}
    ours, truth = (with_state("fused")(**x | changed) for changed in (wide | turned, {}))
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(value):
    x = draw(1, 40, 5, 4, without=["starts"])
    need("fused", x)
    x["u"][0, 7, 2] = value
    y = mamba.selective_scan(**x, backend="fused")
    assert not y[0, 7:, 2].isfinite().any() and y[0, :7].isfinite().all() and y[..., 3:].isfinite().all()


# ----- One position ---------------------------------------------------------------------------------------------------


def test_a_step_is_a_scan_of_one_position():
    for static in ("", "B", "C"):
        x = draw(2, 1, 9, 5, static=static, without=["starts"])
        state = x.pop("initial_state")
        one = {k: v[:, 0] if torch.is_tensor(v) and v.ndim == 3 else v for k, v in x.items()}
        one |= {k: x[k][None] for k in static}
        y, after = mamba.selective_scan_step(state, **one)
        truth, last = recurrence(**x, initial_state=state)
        check({"y": y, "state": after}, {"y": truth[:, 0], "state": last}, 1e-6)


BAD_SCANS = {
    "u is (4, 6)": {"u": torch.zeros(4, 6)},
    "u (2, 0, 6)": {"u": torch.zeros(2, 0, 6)},
    "delta (2, 4, 5)": {"delta": torch.zeros(2, 4, 5)},
    "A (5, 3)": {"A": torch.zeros(5, 3)},
    "B (2, 4, 6)": {"B": torch.zeros(2, 4, 6)},
    "C (2, 3, 3)": {"C": torch.zeros(2, 3, 3)},
    "D (1,)": {"D": torch.zeros(1)},
    "z (2, 6, 4)": {"z": torch.zeros(2, 6, 4)},
    "delta_bias (3,)": {"delta_bias": torch.zeros(3)},
    "initial_state (2, 3, 6)": {"initial_state": torch.zeros(2, 3, 6)},
    "starts (4, 2)": {"starts": torch.zeros(4, 2, dtype=torch.bool)},
    "starts bool": {"starts": torch.zeros(2, 4, dtype=torch.int64)},
    "backend 'cuda-kernel'": {"backend": "cuda-kernel"},
}


@pytest.mark.parametrize("case", BAD_SCANS)
def test_arguments_that_do_not_fit_are_named(case):
    with pytest.raises(ValueError) as error:
        mamba.selective_scan(**draw(2, 4, 6, 3) | BAD_SCANS[case])
    name, value = case.replace(" is ", " ").split(" ", 1)
    message = str(error.value)
    assert re.search(rf"\b{name}\b", message) and value in message and "\n" not in message, message
    assert "must be" in message or all(backend in message for backend in mamba.SCANS)


# ----- The model ------------------------------------------------------------------------------------------------------

FULL = ("delta", "B", "C")
SUBSETS = [names for n in range(4) for names in itertools.combinations(FULL, n)]


def small(selective=FULL, **changes):
    config = {"d_model": 12, "n_layer": 2, "vocab_size": 29, "d_state": 4, "selective": selective} | changes
    return far_from_zero(mamba.Mamba(mamba.MambaConfig(**config)))


def by_steps(model, tokens):
    logits, state = [], model.init_state(len(tokens))
    for token in tokens.unbind(1):
        y, state = model.step(token, state)
        logits.append(y)
    return torch.stack(logits, 1), state


@pytest.mark.parametrize("selective", SUBSETS)
def test_the_block_is_figure_3(selective):
    block, x = small(selective).backbone.layers[0].mixer, torch.randn(2, 20, 12).double()
    branch, z = F.linear(x, block.in_proj.weight).chunk(2, -1)
    conv = block.conv1d
    branch = F.silu(F.conv1d(F.pad(branch.mT, (3, 0)), conv.weight, conv.bias, groups=24).mT)
    delta, B, C = torch.zeros_like(branch), getattr(block, "B", None), getattr(block, "C", None)
    projected = iter(F.linear(branch, w) for w in block.x_proj.weight.split(block.sizes)) if selective else iter(())
    if "delta" in selective:
        delta = F.linear(next(projected), block.dt_proj.weight)
    B = next(projected) if "B" in selective else B
    C = next(projected) if "C" in selective else C
    A = -block.A_log.exp()
    y, state = recurrence(branch, delta, A, B, C, block.D, z, block.dt_proj.bias, True)
    ours, (window, h) = block(x)
    close(ours, F.linear(y, block.out_proj.weight))
    close(h, state)
    close(window, F.linear(x, block.in_proj.weight)[:, -3:, :24])


def test_without_selection_the_ssm_is_one_long_convolution():
    x = draw(2, 50, 6, 4, static="BC", without=["z", "initial_state", "starts"])
    x["delta"].zero_()
    dt, lags = F.softplus(x["delta_bias"].double()), torch.arange(50.0).double()
    kernel = torch.exp(lags[:, None, None] * dt[:, None] * x["A"].double()) * dt[:, None] * (x["B"] * x["C"]).double()
    kernel = kernel.sum(-1)  # K_l = C exp(l dt A) dt B, (L, D)
    y = torch.zeros(2, 50, 6).double() + x["D"] * x["u"]
    for lag in range(50):
        y[:, lag:] += kernel[lag] * x["u"][:, : 50 - lag]
    check({"y": mamba.selective_scan(**x)}, {"y": y}, 1e-6)


@pytest.mark.parametrize("selective", SUBSETS)
def test_parallel_is_step_by_step(selective, tiny):
    model, tokens = small(selective), text(3, 37)
    logits, state = model(tokens, return_state=True)
    close((logits, state), by_steps(model, tokens))
    for cut in (1, 2, 20, 36):
        head, carried = model(tokens[:, :cut], return_state=True)
        tail, after = model(tokens[:, cut:], carried, return_state=True)
        close((torch.cat([head, tail], 1), after), (logits, state))


def test_documents_in_one_row_do_not_see_one_another(tiny):
    model, tokens, cuts = small(), text(2, 40), [0, 2, 3, 17, 39]
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[:, cuts] = True
    apart = [model(tokens[:, a:b]) for a, b in itertools.pairwise([*cuts, 40])]
    _, dirty = model(text(2, 9), return_state=True)
    close(model(tokens, dirty, starts), torch.cat(apart, 1))


def test_a_cut_soon_after_a_start(tiny):
    model, tokens, starts = small(), text(2, 20), torch.zeros(2, 20, dtype=torch.bool)
    starts[:, 9] = True
    whole = model(tokens, starts=starts)
    for cut in (9, 10, 11, 12):
        _, state = model(tokens[:, :cut], None, starts[:, :cut], return_state=True)
        close(model(tokens[:, cut:], state, starts[:, cut:]), whole[:, cut:])


def test_the_past_does_not_see_the_future(tiny):
    model, tokens = small(), text(2, 40)
    logits = model(tokens)
    for t in (1, 20, 39):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 29
        again = model(changed)
        assert torch.equal(again[:, :t], logits[:, :t]) and not torch.isclose(again[:, t], logits[:, t]).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])  # a path each
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_causal_conv_is_conv1d(taps, bias, dtype, tolerance):
    x, weight, before = torch.randn(2, 11, 21), torch.randn(21, 1, taps), torch.randn(2, taps - 1, 21)
    x, weight, before = (v.to(dtype).requires_grad_() for v in (x, weight, before))
    bias = torch.randn(21, dtype=dtype).requires_grad_() if bias else None

    def truth(x):
        return F.conv1d(x.double().mT, weight.double(), None if bias is None else bias.double(), groups=21).mT

    y, window = mamba.causal_conv(x, weight, bias, before)
    expected = truth(torch.cat([before, x], 1))
    assert y.dtype == dtype
    close(y.double(), expected, tolerance)
    close(window, torch.cat([before, x], 1)[:, 11:])
    tensors, upstream = [v for v in (x, weight, bias) if v is not None], torch.randn(2, 11, 21, dtype=dtype)
    right = torch.autograd.grad(expected, tensors, upstream.double())
    for ours, grad in zip(torch.autograd.grad(y, tensors, upstream), right, strict=True):
        close(ours, grad, 10 * tolerance)
    starts = torch.zeros(2, 11, dtype=torch.bool)
    starts[:, [1, 2, 8]] = True
    pieces = [truth(F.pad(x[:, a:b], (0, 0, taps - 1, 0))) for a, b in ((1, 2), (2, 8), (8, 11))]
    y = mamba.causal_conv(x, weight, bias, before, starts)[0]
    close(y[:, 1:].double(), torch.cat(pieces, 1), tolerance)


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_the_convolution_are_the_finite_differences(bias, cut):
    x, weight, before = torch.randn(2, 6, 3), torch.randn(3, 1, 4), torch.randn(2, 3, 3)
    starts = torch.zeros(2, 6, dtype=torch.bool)
    starts[0, [0, 3]], starts[1, 4] = True, True
    tensors = [v.double().requires_grad_() for v in (x, weight, before, *[torch.randn(3)] * bias)]

    def conv(x, weight, before, bias=None):
        return mamba.causal_conv(x, weight, bias, before, starts if cut else None)

    assert torch.autograd.gradcheck(conv, tensors)


def test_vocabulary_padding_is_cut():
    model = small()
    assert len(model.backbone.embeddings.weight) == 32
    before = model(text(1, 5))
    model.lm_head.weight[29:] = math.nan
    assert before.shape == (1, 5, 29) and model(text(1, 5)).isfinite().all()
    assert model.step(text(1), model.init_state(1))[0].shape == (1, 29)


def test_the_residual_stream_is_float32_when_the_model_is_bfloat16():
    model, seen = small().bfloat16(), []
    for norm in [*(layer.norm for layer in model.backbone.layers), model.backbone.norm_f]:
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    logits, state = model(text(2, 9), return_state=True)
    assert model.step(text(2), state)[0].dtype == logits.dtype == torch.bfloat16
    assert seen == [torch.float32] * 6 and {h.dtype for _, h in state} == {torch.float32}
    assert {h.dtype for _, h in model.init_state(2)} == {model.backbone.layers[0].mixer.A().dtype} == {torch.float32}


def test_initialisation_is_the_papers():
    model = mamba.Mamba(mamba.MambaConfig(d_model=64, n_layer=4, vocab_size=999))
    block = model.backbone.layers[3].mixer
    dt = F.softplus(block.dt_proj.bias)
    assert dt.min() > 0.0009 and dt.max() < 0.101 and abs(dt.log().mean().item() - math.log(0.01)) < 0.4
    close(block.A_log.exp(), torch.arange(1.0, 17).expand(128, 16), 1e-5)
    assert (block.D == 1).all() and 0.45 < block.dt_proj.weight.abs().max() <= 0.5
    assert abs(model.backbone.embeddings.weight.std().item() - 0.02) < 1e-3
    assert 0.9 < block.out_proj.weight.abs().max() * 2 * 128**0.5 <= 1  # 1 / sqrt(fan-in) over sqrt(layers)
    assert 0.9 < block.in_proj.weight.abs().max() * 64**0.5 <= 1 and model.backbone.norm_f.eps == 1e-5
    assert model.lm_head.weight is model.backbone.embeddings.weight


def test_initialisation_of_what_is_not_the_papers():
    steps = {"dt_min": 1e-3, "dt_max": 2.0, "dt_init_floor": 0.05}
    config = mamba.MambaConfig(64, 1, 99, selective=(), bias=True, tie_embeddings=False, **steps)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = mamba.Mamba(config)
        block = model.backbone.layers[0].mixer
        block.dt_proj.bias.data.zero_()
        torch.manual_seed(4)
        block.reset_parameters(config)
        torch.manual_seed(4)
        drawn = torch.exp(torch.rand(128) * math.log(2000) + math.log(1e-3))
    close(F.softplus(block.dt_proj.bias), drawn.clamp(min=0.05), 1e-5)  # softplus undone exactly, above the floor
    assert (block.B == 1).all() and abs(block.C.std().item() - 1) < 0.1 and abs(block.C.mean()) < 0.1
    assert not block.in_proj.bias.any() and not block.out_proj.bias.any()
    assert model.lm_head.weight is not model.backbone.embeddings.weight


@pytest.mark.parametrize("changes", [{}, {"d_conv": 1, "expand": 3}, {"bias": True, "conv_bias": False, "d_conv": 2}])
def test_the_stepper_of_the_fused_scan_is_step(changes):
    need("fused", draw(1, 2, 3, 4))
    model, tokens = small(vocab_size=101, dt_rank=3, **changes).float(), text(3, 17)
    with torch.no_grad():
        state = model(tokens, return_state=True)[1]
        before = [tensor.clone() for layer in state for tensor in layer]
        step, carried = model.stepper(state), state
        for token in text(9, 3):
            want, carried = model.step(token, carried)
            close(step(token), want, 1e-4)
    assert all(map(torch.equal, before, (tensor for layer in state for tensor in layer)))  # it is left as it was


def test_the_stepper_without_the_fused_scan_is_step(monkeypatch):
    monkeypatch.setattr(mamba, "fused_problem", lambda *_: "not today")
    model, tokens = small().float(), text(2, 5)
    with torch.no_grad():
        state = model(tokens, return_state=True)[1]
        step, carried = model.stepper(state), state
        for token in text(4, 2):
            want, carried = model.step(token, carried)
            assert torch.equal(step(token), want)


# ----- Folders --------------------------------------------------------------------------------------------------------


OWN = {"dt_min": 0.002, "dt_max": 0.3, "dt_init_floor": 0.001, "norm_eps": 1e-3}


@pytest.mark.parametrize("changes", [OWN, {"tie_embeddings": False, "bias": True, "conv_bias": False, "dt_rank": 3}])
def test_a_saved_model_is_read_back_bitwise(changes, tmp_path, no_safetensors):
    model = small(**changes).float()
    model.save_pretrained(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]
    again, tokens = mamba.Mamba.from_pretrained(str(tmp_path)), text(2, 9)
    assert torch.equal(again(tokens), model(tokens))
    assert again.config == dataclasses.replace(model.config, dt_rank=model.config.rank, pad_vocab_size_multiple=1)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    halves = dict(list(weights.items())[::2]), dict(list(weights.items())[1::2])
    for i, half in enumerate(halves):
        torch.save(half, tmp_path / f"shard{i}.bin")
    index = {"weight_map": {k: f"shard{i}.bin" for i, half in enumerate(halves) for k in half}}
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert torch.equal(mamba.Mamba.from_pretrained(str(tmp_path))(tokens), model(tokens))


def official(folder, **changes):
    """A folder as state-spaces/mamba writes it, and the model it was made from."""
    model, fields = small().float(), {"d_model": 12, "n_layer": 2, "vocab_size": 29, "ssm_cfg": {"d_state": 4}}
    fields |= {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    (folder / "config.json").write_text(json.dumps(fields | changes))
    weights = {k.replace("embeddings", "embedding"): v for k, v in model.state_dict().items()}
    torch.save(weights, folder / "pytorch_model.bin")
    return model, weights


def test_the_official_layout_is_read(tmp_path, no_safetensors):
    model, _ = official(tmp_path)
    tokens = text(2, 9)
    assert torch.equal(mamba.Mamba.from_pretrained(str(tmp_path))(tokens), model(tokens))


def test_folders_that_do_not_fit_name_all_that_is_wrong(tmp_path, no_safetensors):
    _, weights = official(tmp_path, attn_layer_idx=[1], ssm_cfg={"layer": "Mamba2", "ngroups": 2, "d_state": 4})
    with pytest.raises(ValueError, match=r"(?=.*attn_layer_idx.*\[1\])(?=.*ngroups)(?=.*Mamba2)"):
        mamba.Mamba.from_pretrained(str(tmp_path))
    official(tmp_path, rms_norm=False)
    with pytest.raises(ValueError, match="rms_norm = False, must be True"):
        mamba.Mamba.from_pretrained(str(tmp_path))
    official(tmp_path, hidden_size=12, num_hidden_layers=2, intermediate_size=25)
    with pytest.raises(ValueError, match="intermediate_size = 25, must be 24"):
        mamba.Mamba.from_pretrained(str(tmp_path))
    official(tmp_path)
    weights["backbone.norm_f.bias"] = torch.zeros(12)
    weights["backbone.layers.1.mixer.D"] = torch.zeros(7)
    del weights["backbone.layers.0.mixer.A_log"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"(?=.*norm_f.bias is extra)(?=.*1.mixer.D is \(7,\).*\(24,\))(?=.*0.mixer.A_log is m)"
    ):
        mamba.Mamba.from_pretrained(str(tmp_path))


# ----- Carrying the state ---------------------------------------------------------------------------------------------


def test_carried_windows_are_contiguous():
    batches = mamba.Batches(np.arange(1000), 3, 32, 0, True)
    offsets = np.array([batches.offsets(step) for step in range(22)])
    assert (np.diff(offsets[:10], axis=0) == 32).all() and (offsets[10] == offsets[0]).all()
    assert (np.diff(offsets[0]) == 320).all() and [step for step in range(22) if batches.fresh(step)] == [0, 10, 20]


def test_the_state_is_carried_from_step_to_step(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 256, 600)
    sizes = {"d_model": 16, "n_layer": 1, "d_state": 4, "batch": 2, "length": 100, "steps": 9, "carry_state": True}
    training = mamba.Run(mamba.Config(**sizes, out=str(tmp_path)), corpus_of(mamba, tokens), torch.device("cpu"))
    stretches = torch.from_numpy(tokens[:400]).view(2, 200)  # two windows a row
    state = None
    for step in range(4):
        first = step % 2 * 100
        x = stretches[:, first : first + 100]
        y = torch.from_numpy(np.stack([tokens[r * 200 + first + 1 :][:100] for r in range(2)]))
        logits, state = training.model(x, state if step % 2 else None, return_state=True)
        truth = F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
        assert training.train_step()[0] == pytest.approx(truth, rel=1e-6)
        close(training.carried[0], state, 1e-6)
        assert not any(tensor.requires_grad for layer in training.carried[0] for tensor in layer)
