"""mamba.py but for its data section: the scan against slow loops, the model against steps, the jobs as users do."""

import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mamba


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are small here: a second thread costs time, much of it where the machine is shared."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


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
TINY = (2**14, 48, 2**11)  # ChunkedScan.SIZES that force segments, many windows and blocks
PATHS = [*((name, None) for name in mamba.SCANS), ("chunked", TINY)]


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
        truth = differentiate(recurrence, x, dtype=torch.float64)
        ours = differentiate(with_state(backend), x, dtype=torch.float64)
        assert {v.dtype for v in ours.values()} == {torch.float64}
        check(ours, truth, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", mamba.SCANS)
def test_half_precision_inputs_are_computed_in_float32(backend, dtype, tiny):
    x = draw(2, 45, 9, 5)
    half = x | {k: x[k].to(dtype) for k in ("u", "delta", "B", "C", "z")}
    ours = differentiate(with_state(backend), half)
    truth = differentiate(with_state(backend), half | {k: half[k].float() for k in ("u", "delta", "B", "C", "z")})
    assert ours["y"].dtype == dtype and ours["state"].dtype == torch.float32
    assert all(torch.equal(ours[k], truth[k].to(ours[k].dtype)) for k in ("y", "state"))
    assert all(ours[k].dtype == v.dtype for k, v in half.items() if k in ours)
    check(ours, truth, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("static", ["", "BC"])
@pytest.mark.parametrize("sizes", [(16, 8, 8), (0, 8, 1000)])
def test_gradients_are_the_finite_differences(static, sizes, monkeypatch):
    monkeypatch.setitem(mamba.ChunkedScan.SIZES, "cpu", sizes)
    x = draw(2, 11, 2, 2, static=static, starts=0.2)
    names = [k for k, v in x.items() if torch.is_tensor(v) and v.is_floating_point()]
    tensors = [x[k].double().requires_grad_() for k in names]

    def scan(*tensors):
        return with_state("chunked")(**x | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(scan, tensors, fast_mode=False)


# ----- Properties of the scan -----------------------------------------------------------------------------------------


def in_pieces(cuts, carry):
    """`selective_scan` run piece by piece, the state carried over the cuts or dropped there."""

    def scan(starts=None, initial_state=None, **x):
        ys, state = [], initial_state
        for a, b in itertools.pairwise([0, *cuts, x["u"].shape[1]]):
            piece = {k: v[:, a:b] if k in ("u", "delta", "z", "B", "C") and v.ndim == 3 else v for k, v in x.items()}
            state = state if a == 0 or carry else None
            marks = None if starts is None else starts[:, a:b]
            y, state = with_state()(**piece, initial_state=state, starts=marks)
            ys.append(y)
        return torch.cat(ys, 1), state

    return scan


@pytest.mark.parametrize("static", ["", "BC"])
def test_starts_are_documents_run_apart(static, tiny):
    x, cuts = draw(2, 60, 9, 5, static=static), [1, 17, 18, 40]
    x["starts"] = torch.zeros(2, 60, dtype=torch.bool)
    x["starts"][:, cuts] = True
    check(differentiate(with_state(), x), differentiate(in_pieces(cuts, carry=False), x), 1e-5)


def test_a_start_at_position_0_drops_the_initial_state(tiny):
    x = draw(2, 30, 9, 5, starts=0)
    x["starts"][:, 0] = True
    ours = differentiate(with_state(), x)
    bare = differentiate(with_state(), {k: v for k, v in x.items() if k not in ("initial_state", "starts")})
    assert not ours.pop("initial_state").any()
    check(ours, bare, 1e-6)


@pytest.mark.parametrize("cuts", [[1], [59], [30], [7, 8, 31]])
def test_a_sequence_may_be_cut_anywhere(cuts, tiny):
    x = draw(2, 60, 9, 5)
    check(differentiate(in_pieces(cuts, carry=True), x), differentiate(with_state(), x), 1e-5)


@pytest.mark.parametrize(("backend", "sizes"), PATHS)
def test_runs_are_bitwise_equal_and_inputs_are_left_alone(backend, sizes, monkeypatch):
    if sizes:
        monkeypatch.setitem(mamba.ChunkedScan.SIZES, "cpu", sizes)
    torch.set_num_threads(2)
    x = draw(3, 100, 20, 8)
    before = {k: v.clone() for k, v in x.items() if torch.is_tensor(v)}
    first, second = (differentiate(with_state(backend), x) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    with torch.no_grad():
        y, state = with_state(backend)(**x)
    assert torch.equal(y, first["y"]) and torch.equal(state, first["state"])
    assert all(torch.equal(x[k], v) for k, v in before.items())


def test_backward_may_be_called_twice(tiny):
    x = draw(2, 60, 9, 5)
    leaves = {k: v.requires_grad_() for k, v in x.items() if torch.is_tensor(v) and v.is_floating_point()}
    y, state = with_state()(**x)
    loss = (y * y).sum() + state.sum()
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_states_are_not_kept():
    B, L, D, N = 2, 256, 64, 16
    x, sizes = draw(B, L, D, N), []
    x["u"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda v: sizes.append(v.numel()) or v, lambda v: v):
        y = mamba.selective_scan(**x)
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
    plain = differentiate(with_state(backend), x)
    monkeypatch.setitem(mamba.SCANS, backend, lambda *args: on.append(torch.is_autocast_enabled("cpu")) or scan(*args))
    with torch.autocast("cpu", torch.bfloat16):
        under = differentiate(with_state(backend), x)
    assert on == [False] and all(torch.equal(plain[k], under[k]) for k in plain)


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
    """A model in float64 whose weights are all far from 0, so that nothing is hidden by being small."""
    config = {"d_model": 12, "n_layer": 2, "vocab_size": 29, "d_state": 4, "selective": selective} | changes
    model = mamba.Mamba(mamba.MambaConfig(**config)).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def text(*shape):
    return torch.randint(29, shape)


def close(ours, truth, tolerance=1e-10):
    torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_causal_conv_is_conv1d(taps, bias):
    x, weight = torch.randn(2, 11, 5).double(), torch.randn(5, 1, taps).double()
    bias = torch.randn(5).double() if bias else None
    before = torch.randn(2, taps - 1, 5).double()

    def truth(x):
        return F.conv1d(x.mT, weight, bias, groups=5).mT

    y, window = mamba.causal_conv(x, weight, bias, before)
    close(y, truth(torch.cat([before, x], 1)))
    close(window, torch.cat([before, x], 1)[:, 11:])
    starts = torch.zeros(2, 11, dtype=torch.bool)
    starts[:, [1, 2, 8]] = True
    pieces = [truth(F.pad(x[:, a:b], (0, 0, taps - 1, 0))) for a, b in ((1, 2), (2, 8), (8, 11))]
    close(mamba.causal_conv(x, weight, bias, before, starts)[0][:, 1:], torch.cat(pieces, 1))


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


def test_initialisation_is_the_papers():
    model = mamba.Mamba(mamba.MambaConfig(d_model=64, n_layer=4, vocab_size=999))
    block = model.backbone.layers[3].mixer
    dt = F.softplus(block.dt_proj.bias)
    assert dt.min() > 0.0009 and dt.max() < 0.101 and abs(dt.log().mean().item() - math.log(0.01)) < 0.4
    close(block.A_log.exp(), torch.arange(1.0, 17).expand(128, 16), 1e-5)
    assert (block.D == 1).all() and block.dt_proj.weight.abs().max() <= 0.5 < 2.1 * block.dt_proj.weight.abs().max()
    assert abs(model.backbone.embeddings.weight.std().item() - 0.02) < 1e-3
    assert 0.9 < block.out_proj.weight.abs().max() * 2 * 128**0.5 <= 1  # 1 / sqrt(fan-in) over sqrt(layers)


# ----- Writing text ---------------------------------------------------------------------------------------------------


def test_greedy_text_is_the_likeliest_token_by_full_recomputation():
    model, prompt = small(), text(3, 7)
    longer = prompt
    for _ in range(12):
        longer = torch.cat([longer, model(longer)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(prompt, 12, temperature=0), longer)
    assert torch.equal(model.generate(prompt, 12, top_k=1), longer)
    assert torch.equal(model.generate(prompt, 12, temperature=1.5, top_p=1e-6), longer)
    rows = [model.generate(row[None], 12, temperature=0) for row in prompt]
    assert torch.equal(torch.cat(rows), longer) and torch.equal(model.generate(prompt, 0), prompt)
    stop = longer[0, 9].item()
    stopped = model.generate(prompt, 12, temperature=0, stop_token=stop)
    for ours, truth in zip(stopped[:, 7:].tolist(), longer[:, 7:].tolist(), strict=True):
        end = truth.index(stop) if stop in truth else len(truth)
        assert ours == truth[:end] + [stop] * (len(ours) - end)
    assert stopped.shape[1] < 19 or any(stop not in row for row in longer[:, 7:].tolist())


def test_the_generator_decides_the_text():
    model, prompt = small(), text(2, 5)
    texts = [model.generate(prompt, 20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.6849, 0.2466, 0.0616, 0.0068]),
        ({"top_k": 2}, [0.625, 0.375, 0.0, 0.0]),
        ({"top_p": 0.79}, [0.625, 0.375, 0.0, 0.0]),
        ({"top_p": 0.81}, [0.5263, 0.3158, 0.1579, 0]),
        ({"top_k": 3, "top_p": 0.5}, [1.0, 0.0, 0.0, 0.0]),
        ({"top_k": 9, "top_p": 1.0}, [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_tokens_are_drawn_from_the_cut_distribution(options, expected):
    order = [2, 0, 3, 1]
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[torch.tensor(order).argsort()].expand(20_000, 4)
    share = mamba.sample_token(logits, **options).bincount(minlength=4)[order] / 20_000
    close(share, torch.tensor(expected), 0.015)
    assert (share[torch.tensor(expected) == 0] == 0).all()


@pytest.mark.parametrize("bad", [{"temperature": -0.5}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_sampling_options(bad):
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"{name}={value}.*must be"):
        mamba.sample_token(torch.zeros(1, 4), **bad)


# ----- Folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_safetensors(monkeypatch):
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "bias": True, "conv_bias": False, "dt_rank": 3}])
def test_a_saved_model_is_read_back_bitwise(changes, tmp_path, no_safetensors):
    model = small(**changes).float()
    model.save_pretrained(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin"]
    again, tokens = mamba.Mamba.from_pretrained(str(tmp_path)), text(2, 9)
    assert torch.equal(again(tokens), model(tokens))
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
    official(tmp_path)
    weights["backbone.norm_f.bias"] = torch.zeros(12)
    weights["backbone.layers.1.mixer.D"] = torch.zeros(7)
    del weights["backbone.layers.0.mixer.A_log"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"(?=.*norm_f.bias is extra)(?=.*1.mixer.D is \(7,\).*\(24,\))(?=.*0.mixer.A_log is m)"
    ):
        mamba.Mamba.from_pretrained(str(tmp_path))


# ----- Learning -------------------------------------------------------------------------------------------------------


def test_a_tiny_batch_is_learnt_by_heart():
    model, tokens = mamba.Mamba(mamba.MambaConfig(d_model=32, n_layer=1, vocab_size=29, d_state=4)), text(2, 33)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(50):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_what_decays():
    for selective in (FULL, ()):
        model = mamba.Mamba(mamba.MambaConfig(d_model=16, n_layer=1, vocab_size=9, selective=selective))
        optimizer = mamba.make_optimizer(model, mamba.Config(weight_decay=0.3), torch.device("cpu"))
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        decayed = {name for name, p in model.named_parameters() if decay[id(p)] == 0.3}
        ends = {"embeddings.weight", "in_proj.weight", "conv1d.weight", "out_proj.weight"}
        ends |= {"x_proj.weight", "dt_proj.weight"} if selective else set()
        assert {".".join(name.split(".")[-2:]) for name in decayed} == ends
        assert len(decay) == len(list(model.parameters())) and {*decay.values()} == {0.3, 0.0}


def test_learning_rate():
    config = mamba.Config(steps=100, lr=2.0, min_lr=0.5, warmup=0.1)
    rates = [mamba.learning_rate(step, config) for step in range(100)]
    close(torch.tensor(rates[:11]), torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.0]), 1e-6)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.5)
    assert rates[54] == pytest.approx(1.25, abs=0.02) and rates[32] == pytest.approx(
        0.5 + 1.5 * math.cos(math.pi / 8) ** 2, abs=0.02
    )
    assert mamba.learning_rate(0, mamba.Config(steps=1, lr=2.0)) == 2.0


# ----- Jobs, as a user runs them --------------------------------------------------------------------------------------

SCRIPT = str(Path(mamba.__file__).resolve())
TINY_RUN = "--tokenizer byte --d-model 16 --n-layer 1 --d-state 4 --steps 20 --batch 4 --length 32 --lr 1e-2 --tokens 5"
TINY_RUN = f"{TINY_RUN} --eval-every 5 --eval-tokens 60".split()
WORDS = ("the", "cat", "sat", "on", "a", "naïve", "mat", "déjà", "vu", "日本", "🙂")


def sentences(seed, size=1900):
    r = random.Random(seed)
    return " ".join(r.choice(WORDS) for _ in range(size))[:size]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train on a small text, in which carried states start anew after 17 steps; without the picture, which is slow."""
    monkeypatch.setattr(mamba, "plot", lambda *_: None)
    (tmp_path / "text.txt").write_text(sentences(1), "utf-8")

    def run(out, *flags, job="train", data="text.txt"):
        return mamba.main([job, *TINY_RUN, "--data", str(tmp_path / data), "--out", str(tmp_path / out), *flags])

    return run


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return torch.tensor([row["loss"] for row in rows(folder)])


def saved(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Bitwise equality of checkpoints."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def stop_after(monkeypatch, step):
    """Press Ctrl-C during this step, once."""
    train_step = mamba.Run.train_step

    def pressed(self):
        if self.step + 1 == step:
            monkeypatch.setattr(mamba.Run, "train_step", train_step)
            signal.raise_signal(signal.SIGINT)
        return train_step(self)

    monkeypatch.setattr(mamba.Run, "train_step", pressed)


def test_a_run_writes_its_files_and_can_be_repeated(run, tmp_path, monkeypatch):
    assert [run("b"), run("c", "--seed", "1")] == [0, 0]
    monkeypatch.undo()
    assert run("a") == 0  # with the picture
    a, b, c = (tmp_path / name for name in "abc")
    assert sorted(p.name for p in a.iterdir()) == ["checkpoint.pt", "loss.png", "metrics.jsonl", "result.json"]
    assert (
        (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes() != (c / "metrics.jsonl").read_bytes()
    )
    assert (a / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [row["step"] for row in rows(a)] == [*range(1, 21)] and losses(a)[-1] < losses(a)[0] - 0.5
    assert [row["step"] for row in rows(a) if "valid_loss" in row] == [5, 10, 15, 20]
    assert rows(a)[9]["lr"] == mamba.learning_rate(9, mamba.Config(steps=20, lr=1e-2))
    result = json.loads((a / "result.json").read_text())
    assert result["config"]["d_model"] == 16 and result["seed"] == 0 and result["tokens_seen"] == 20 * 4 * 32
    assert result["parameters"] == sum(
        p.numel() for p in mamba.load_checkpoint(mamba.Config(out=str(a)), torch.device("cpu"))[0].parameters()
    )


@pytest.mark.parametrize("flags", ["", "--carry-state", "--carry-state --accumulate 2 --document-resets"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(run, tmp_path, monkeypatch, capsys, flags):
    flags = flags.split()
    assert run("whole", *flags) == 0
    stop_after(monkeypatch, 7)
    assert run("parts", *flags) == 130 and len(rows(tmp_path / "parts")) == saved(tmp_path / "parts")["step"] == 7
    assert "stopped after step 7" in capsys.readouterr().out
    stop_after(monkeypatch, 16)
    assert run("parts", *flags, "--resume") == 130
    assert run("parts", *flags, "--resume") == 0
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    first, second = saved(whole), saved(parts)
    assert first.pop("config") != second.pop("config") and same(first, second)


def test_ctrl_c_before_the_first_step(run, tmp_path, monkeypatch):
    monkeypatch.setattr(mamba, "stopped", lambda *_: True)
    assert run("out", "--carry-state") == 130
    monkeypatch.undo()
    assert run("out", "--carry-state", "--resume") == 0 and len(rows(tmp_path / "out")) == 20


def start(*words, cwd):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(words, cwd=cwd, env=environment, stdout=-1, stderr=-1, text=True)


def interrupt(process, step):
    """Send Ctrl-C once the process has passed `step`; returns the last line that it prints."""
    for line in process.stdout:
        if (found := re.match(r"step ([\d,]+)/", line)) and int(found[1].replace(",", "")) >= step:
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "", errors
    return output.splitlines()[-1]


def test_the_command_that_ctrl_c_prints_resumes(run, tmp_path):
    flags = [*TINY_RUN, "--data", "text.txt", "--out", "run dir", "--steps", "100000", "--eval-every", "20"]
    last = interrupt(start(sys.executable, SCRIPT, *flags, cwd=tmp_path), 3)
    stopped, command = re.fullmatch(r"stopped after step ([\d,]+); to go on: (.*)", last).groups()
    assert saved(tmp_path / "run dir")["step"] == int(stopped)
    again = interrupt(start(*shlex.split(command), cwd=tmp_path), int(stopped) + 1)
    assert again.endswith(command)  # and not --resume twice
    steps = [row["step"] for row in rows(tmp_path / "run dir")]
    assert steps == [*range(1, len(steps) + 1)] and len(steps) > int(stopped)


@pytest.mark.parametrize("flags", ["", "--accumulate 2 --carry-state"])
def test_two_processes_are_one(run, tmp_path, flags):
    assert run("one", *flags.split()) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    command += [*TINY_RUN, "--data", "text.txt", "--out", "two", *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    check({"loss": losses(tmp_path / "two")}, {"loss": losses(tmp_path / "one")}, 1e-5)
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    close(two["model"], one["model"], 1e-3)
    close(two["carried"], one["carried"], 1e-3)
    assert done.stdout.count(b"stopped") == 0 and done.stdout.count(b"step 20/20") == 1  # one process speaks


def test_accumulation_is_one_batch(run, tmp_path):
    assert [run("1"), run("4", "--accumulate", "4")] == [0, 0]
    check({"loss": losses(tmp_path / "4")}, {"loss": losses(tmp_path / "1")}, 1e-5)


def test_resuming_with_another_config_names_the_fields(run, tmp_path, capsys):
    assert run("out") == 0
    assert run("out", "--resume", "--lr", "0.5", "--length", "16", "--accumulate", "2") == 2
    error = capsys.readouterr().err
    assert "lr was 0.01, is 0.5" in error and "length was 32, is 16" in error and error.count(" was ") == 2


def test_divergence_keeps_the_last_good_checkpoint(run, tmp_path, monkeypatch, capsys):
    assert run("early", "--lr", "1e30", "--eval-every", "50") == 1
    assert re.fullmatch(r"mamba.py: .*step \d+: .*(nan|inf).*no checkpoint.*lower --lr\n", capsys.readouterr().err)
    usual = mamba.learning_rate
    monkeypatch.setattr(mamba, "learning_rate", lambda step, config: 1e30 if step == 6 else usual(step, config))
    assert run("late") == 1
    assert re.search(rf"step 8: .*{re.escape(str(tmp_path / 'late' / 'checkpoint.pt'))}", capsys.readouterr().err)
    monkeypatch.undo()
    kept = saved(tmp_path / "late")
    assert kept["step"] == 5 and all(v.isfinite().all() for v in kept["model"].values())
    assert run("late", "--resume") == 0 and run("late", job="sample") == 0


def test_a_model_that_scores_nan_is_not_saved(run, tmp_path, monkeypatch):
    usual = mamba.learning_rate
    monkeypatch.setattr(mamba, "learning_rate", lambda step, config: 1e30 if step == 9 else usual(step, config))
    assert run("out") == 1 and saved(tmp_path / "out")["step"] == 5


# ----- Batches, evaluation, samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [33, 64, 65, 1000])
def test_an_epoch_reads_each_window_once(size):
    batches = mamba.Batches(np.arange(size), 3, 32, 0, False)
    windows = np.concatenate([batches.offsets(step) for step in range(2 * batches.windows)])  # six epochs
    assert batches.windows == (size - 1) // 32 and windows.min() >= 0 and windows.max() + 33 <= size
    for epoch in windows.reshape(6, -1):
        assert (np.diff(np.sort(epoch)) == 32).all()
    assert (mamba.Batches(np.arange(size), 3, 32, 0, False).offsets(4) == batches.offsets(4)).all()  # needs no replay


def test_carried_windows_are_contiguous():
    batches = mamba.Batches(np.arange(1000), 3, 32, 0, True)
    offsets = np.array([batches.offsets(step) for step in range(22)])
    assert (np.diff(offsets[:10], axis=0) == 32).all() and (offsets[10] == offsets[0]).all()
    assert (np.diff(offsets[0]) == 320).all() and [step for step in range(22) if batches.fresh(step)] == [0, 10, 20]


def corpus_of(tokens, name="byte", documents=()):
    tokenizer = mamba.load_tokenizer(name, list(documents))
    return mamba.Corpus(
        np.asarray(tokens), np.asarray(tokens), tokenizer, tokenizer.vocab_size, tokenizer.separator, "x"
    )


def test_the_state_is_carried_from_step_to_step(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 256, 600)
    sizes = {"d_model": 16, "n_layer": 1, "d_state": 4, "batch": 2, "length": 100, "steps": 9, "carry_state": True}
    training = mamba.Run(mamba.Config(**sizes, out=str(tmp_path)), corpus_of(tokens), torch.device("cpu"))
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


def slow_evaluation(model, corpus, length, carry, resets):
    """Nats and bytes of all tokens but the first, one step at a time."""
    nats = size = 0
    tokens, state = corpus.valid.tolist(), None
    for i, token in enumerate(tokens[:-1]):
        begins = resets and (i == 0 or tokens[i - 1] == corpus.separator)
        if state is None or begins or (i % length == 0 and not carry):
            state = model.init_state(1)
        logits, state = model.step(torch.tensor([token]), state)
        nats -= logits[0].double().log_softmax(-1)[tokens[i + 1]].item()
        size += 1 if tokens[i + 1] == corpus.separator else len(corpus.tokenizer.decode_bytes(tokens[i + 1 : i + 2]))
    return {"loss": nats / (len(tokens) - 1), "bits_a_byte": nats / math.log(2) / size, "tokens": len(tokens) - 1}


MODES = [(length, c, r) for length in (1, 7, 64, 500) for c in (False, True) for r in (False, True)]


@pytest.mark.parametrize(("length", "carry", "resets"), MODES)
def test_every_token_but_the_first_is_scored_once(length, carry, resets):
    documents = [sentences(i, 35) for i in range(9)]
    corpus = corpus_of([], "bpe:280", documents)
    corpus.valid = np.concatenate([np.append(corpus.tokenizer.encode(d), corpus.separator) for d in documents])
    model = small(vocab_size=280)
    config = mamba.Config(length=length, batch=3, carry_state=carry, document_resets=resets)
    truth = slow_evaluation(model, corpus, length, carry, resets)
    assert mamba.evaluate(model, corpus, config) == pytest.approx(truth, rel=1e-5)
    corpus.valid = corpus.valid[:51]
    assert mamba.evaluate(model, corpus, config) == mamba.evaluate(model, corpus, config, limit=50)
    assert mamba.evaluate(model, corpus, config)["tokens"] == 50


@pytest.mark.parametrize("flags", [[], ["--length", "37", "--batch", "3", "--carry-state"]])
def test_the_eval_job(run, tmp_path, capsys, flags):
    assert run("out") == 0 and capsys.readouterr() and run("out", *flags, job="eval") == 0
    model, tokenizer = mamba.load_checkpoint(mamba.Config(out=str(tmp_path / "out")), torch.device("cpu"))
    corpus = mamba.load_corpus(str(tmp_path / "text.txt"), "", tokenizer)
    with torch.no_grad():
        truth = slow_evaluation(model, corpus, 37 if flags else 32, bool(flags), False)
    numbers = re.search(r": ([\d.]+) nats a token, ([\d.]+) bits a byte, (\d+) tokens", capsys.readouterr().out)
    assert [float(n) for n in numbers.groups()] == pytest.approx(list(truth.values()), abs=2e-4)


def test_training_beats_the_unigram_by_a_bit_a_byte(run, tmp_path):
    (tmp_path / "long.txt").write_text(sentences(2, 20_000), "utf-8")
    flags = "--n-layer 2 --d-model 32 --d-state 8 --steps 60 --batch 8 --length 64 --eval-every 60"
    assert run("out", *flags.split(), data="long.txt") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["validation"]["bits_a_byte"] < result["baselines_bits_a_byte"]["byte unigram"] - 1


def test_tokens_from_a_bin(run, tmp_path, capsys):
    parts = [np.append(np.frombuffer(sentences(i, 90).encode(), np.uint8), 256) for i in range(40)]
    np.concatenate(parts).astype("<u2").tofile(tmp_path / "tokens.bin")
    description = {"dtype": "uint16", "vocab_size": 257, "tokenizer": "byte", "document_separator": 256}
    (tmp_path / "tokens.json").write_text(json.dumps(description))
    assert run("plain", data="tokens.bin") == run("resets", "--document-resets", data="tokens.bin") == 0
    assert run("resets", "--document-resets", job="eval", data="tokens.bin") == run("resets", job="sample") == 0
    assert not torch.equal(losses(tmp_path / "plain"), losses(tmp_path / "resets"))  # the flag does something


class Parrot(torch.nn.Module):
    """A model that writes the given bytes, one a token."""

    def __init__(self, content):
        super().__init__()
        self.weight, self.content = torch.nn.Parameter(torch.zeros(1)), content

    def stream(self, tokens, max_new_tokens, *options):
        yield from (torch.tensor([byte]) for byte in self.content[:max_new_tokens])


@pytest.mark.parametrize("tokens", [99, 25])  # 25: in the middle of the last character
def test_a_sample_comes_in_whole_characters(tokens, monkeypatch):
    content, pieces = "né → 日本語 🙂 👩‍👧".encode(), []
    monkeypatch.setattr("builtins.print", lambda *words, end="\n", **_: pieces.append("".join(words) + end))
    text = mamba.write_sample(
        Parrot(content), mamba.load_tokenizer("byte", []), mamba.Config(prompt="Oh", tokens=tokens)
    )
    assert text == "Oh" + content[:tokens].decode("utf-8", "ignore") and "".join(pieces) == text + "\n"
    assert len(pieces) > 10 and "\ufffd" not in text


def test_samples_from_a_checkpoint_and_from_a_folder(run, tmp_path, capsys, no_safetensors):
    assert run("out") == 0 and capsys.readouterr()
    assert run("out", "--prompt", "naïve", "--tokens", "30", "--temperature", "0", job="sample") == 0
    text = capsys.readouterr().out.removesuffix("\n")
    model, tokenizer = mamba.load_checkpoint(mamba.Config(out=str(tmp_path / "out")), torch.device("cpu"))
    prompt = torch.tensor([tokenizer.encode("naïve").tolist()])
    assert tokenizer.decode(model.generate(prompt, 30, temperature=0)[0]) in (text, text + "\ufffd")  # a cut character
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    spec = {"model": {"type": "BPE", "vocab": {c: i for i, c in enumerate(letters)}, "merges": []}, "normalizer": None}
    spec |= {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, "added_tokens": []}
    folder = small(vocab_size=256).float()
    folder.save_pretrained(str(tmp_path / "hf"))
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(spec))
    flags = ["--checkpoint", str(tmp_path / "hf"), "--prompt", "Hé", "--tokens", "20", "--temperature", "0"]
    assert mamba.main(["sample", *flags]) == 0
    tokenizer = mamba.load_tokenizer(str(tmp_path / "hf" / "tokenizer.json"), [])
    ids = folder.generate(torch.tensor([tokenizer.encode("Hé").tolist()]), 20, temperature=0)[0]
    text = capsys.readouterr().out.removesuffix("\n")
    assert text.startswith("Hé") and tokenizer.decode(ids) in (text, text + "\ufffd")
    assert mamba.main(["sample", *flags, "--prompt", ""]) == 2 and "at least one token" in capsys.readouterr().err
    chosen = mamba.load_checkpoint(mamba.Config(checkpoint=str(tmp_path / "hf"), tokenizer="byte"), torch.device("cpu"))
    assert chosen[1].name == "byte"  # a tokenizer that is asked for goes before the folder's
    (tmp_path / "hf" / "tokenizer.json").unlink()
    for job in ("sample", "eval"):  # never with a tokenizer that the model was not trained with
        assert mamba.main([job, *flags]) == 2 and "has no tokenizer" in capsys.readouterr().err


# ----- Bad input ------------------------------------------------------------------------------------------------------

BAD = {  # flags after the usual ones; what the line must say: the value, the rule, the fix
    "--data nowhere.txt": "nowhere.txt: no such file.*give",
    "--data empty.txt": "empty.txt: holds no text; give",
    "--data short.txt": "short.txt.*: 29 tokens.*needs 33; give",
    "--data outside.bin": "outside.bin: token id 300 must be below vocab_size 257; correct",
    "--data odd.bin": "odd.bin: 3 bytes must be a multiple of 2.*correct",
    "--data lonely.bin": "lonely.bin: needs lonely.json beside it; write",
    "--tokenizer wordpiece": "'wordpiece': unknown; choose",
    "--batch 3 --accumulate 2": "--batch 3: must be a multiple of .*2; change",
    "--carry-state --batch 128": "too few for 128 stretches of --length 32; lower",
    "--device tpu": "--device tpu: .*try auto",
    "--selective delta,E": r"\['E'\]: must be among delta, B and C; leave",
    "--d-model 0": "d_model 0: must be at least 1; raise",
    "--batch 0": "--batch 0: must be at least 1; raise",
    "--length 0": "--length 0: must be at least 1; raise",
    "--accumulate 0": "--accumulate 0: must be at least 1; raise",
    "--eval-every 0": "--eval-every 0: must be at least 1; raise",
    "--steps 0": "--steps 0: must be at least 1; raise",
    "--seed -1": "--seed -1: must not be negative; raise",
    "--out text.txt": "text.txt: must be a folder.*; give",
    "--out other --resume": "checkpoint.pt: is no checkpoint of this script; give",
    "--out empty --resume": "empty holds no checkpoint.pt, must be.*correct",
    "--out junk --resume": "checkpoint.pt: not a file of tensors.*; give",
    "sample --checkpoint junk/checkpoint.pt": "checkpoint.pt: not a file of tensors.*; give",
    "sample --checkpoint other.pt": "other.pt: is no checkpoint of this script; give",
    "sample --checkpoint nowhere.pt": "nowhere.pt: no such file.*train first",
    "sample --checkpoint junk": "junk: holds no config.json.*correct",
    "sample --checkpoint good.pt --prompt ''": "must be.*L >= 1; give",
    "sample --checkpoint good.pt --temperature -1": "temperature=-1.0.*must be >= 0.*correct",
    "sample --checkpoint good.pt --top-k -3": "--top-k -3: must not be negative; raise",
    "sample --checkpoint good.pt --top-p 0": "top_p=0.0.*must be.*correct",
    "eval --checkpoint small.pt": "has 257 tokens, the model's vocabulary 29; give",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in {"text": sentences(1), "empty": " \n", "short": "x" * 30}.items():
        Path(f"{name}.txt").write_text(content, "utf-8")
    for name, content in {"outside": b"\x01\x00" * 99 + b"\x2c\x01", "odd": b"abc", "lonely": b"ab"}.items():
        Path(f"{name}.bin").write_bytes(content)
        description = {"dtype": "uint16", "vocab_size": 257, "tokenizer": "byte", "document_separator": None}
        if name != "lonely":
            Path(f"{name}.json").write_text(json.dumps(description))
    for name, content in {"junk": b"not tensors at all", "other": None}.items():
        Path(name).mkdir()
        Path(name, "checkpoint.pt").write_bytes(content) if content else torch.save({"a": 1}, f"{name}/checkpoint.pt")
    torch.save([1, 2], "other.pt")
    for name, size in {"good": 257, "small": 29}.items():
        model, tokenizer = small(vocab_size=size).float(), mamba.load_tokenizer("byte", [])
        content = {"model": model.state_dict(), "model_config": dataclasses.asdict(model.config)}
        torch.save(content | {"tokenizer": tokenizer.to_json(), "config": {}, "step": 0}, f"{name}.pt")
    words = shlex.split(flags)
    job = [words.pop(0)] if words[0] in mamba.JOBS else []
    assert mamba.main([*job, *TINY_RUN, "--data", "text.txt", "--out", "out", *words]) == 2
    line = capsys.readouterr().err
    assert re.fullmatch(r"mamba\.py: .*\n", line) and re.search(BAD[flags], line), line
    assert not Path("out", "checkpoint.pt").exists()


def test_bad_input_has_no_traceback(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--data", "gone.txt"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "gone.txt" in done.stderr
