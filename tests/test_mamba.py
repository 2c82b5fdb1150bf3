"""mamba.py: the scan against slow loops, the model against steps, data, and the jobs."""

import base64
import functools
import itertools
import json
import lzma
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
from tests._helpers import close, far_from_zero, sentences, text

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ("sequential", "chunked", "fused")


# ----- The oracle: the paper's recurrence, one position after another, in float64


def recurrence(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None,
    starts=None,
):  # fmt: skip
    """Section 3.2: h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t."""
    u, delta, A, B, C = (tensor.double() for tensor in (u, delta, A, B, C))
    h = torch.zeros(len(u), *A.shape).double() if initial_state is None else initial_state.double()
    ys = []
    for t in range(u.shape[1]):
        u_t, step = u[:, t], delta[:, t]
        step = step if delta_bias is None else step + delta_bias.double()
        step = torch.logaddexp(step, torch.zeros_like(step)) if delta_softplus else step
        if starts is not None:
            h = torch.where(starts[:, t, None, None], torch.zeros_like(h), h)
        h = torch.exp(step[..., None] * A) * h + (step * u_t)[..., None] * B[:, t, None]
        y = (C[:, t, None] * h).sum(-1)
        y = y if D is None else y + D.double() * u_t
        ys.append(y if z is None else y * z[:, t].double() * torch.sigmoid(z[:, t].double()))
    return torch.stack(ys, 1), h


def draw(B, L, D, N, seed=0, without=(), positive=False, starts=0.05, scale=1.0, A=1.0):
    """Arguments of `selective_scan`, all but those in `without`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x = {"u": normal(B, L, D), "delta": normal(B, L, D) * scale, "A": -A * normal(D, N).exp()}
    x |= {"B": normal(B, L, N), "C": normal(B, L, N), "D": normal(D), "z": normal(B, L, D)}
    x |= {"delta_bias": normal(D), "initial_state": normal(B, D, N), "delta_softplus": not positive}
    x |= {"starts": torch.rand(B, L, generator=generator) < starts}
    if positive:  # step sizes are given as they are
        x |= {"delta": x["delta"].abs(), "delta_bias": x["delta_bias"].abs() * scale}
    return {name: value for name, value in x.items() if name not in without}


def drawn(seed):
    """Random sizes, and each optional argument there or not."""
    r = random.Random(seed)
    L = r.choice([r.randint(1, 12), r.randint(13, 60), r.randint(61, 150)])
    optional = ("D", "z", "delta_bias", "initial_state", "starts")
    without = [name for name in optional if r.random() < 0.4]
    channels = r.randint(1, 70 if L <= 60 else 9)
    return draw(r.randint(1, 4), L, channels, r.randint(1, 20), seed, without, r.random() < 0.3)


HARD = {
    "L = 1": functools.partial(draw, 2, 1, 5, 3),
    "L prime": functools.partial(draw, 1, 197, 7, 16),
    "L 5000": functools.partial(draw, 1, 5000, 2, 2, starts=0.001, without=["z", "delta_bias"]),
    "many channels": functools.partial(draw, 1, 85, 600, 16, without=["D", "z"]),
    "exp(delta A) is 0": functools.partial(draw, 2, 40, 6, 4, scale=1e5),
    "exp(delta A) is 0, given": functools.partial(draw, 2, 40, 6, 4, scale=1e5, positive=True),
    "delta near 0": functools.partial(draw, 2, 90, 6, 4, scale=1e-7, positive=True),
    "A near 0": functools.partial(draw, 2, 90, 6, 4, A=1e-6),
    "A large": functools.partial(draw, 2, 90, 6, 4, A=1e3),
    "all starts": functools.partial(draw, 2, 60, 6, 4, starts=1.1),
}
CASES = HARD | {f"drawn {seed}": functools.partial(drawn, seed) for seed in range(25)}
LAYOUTS = (
    lambda x: x,
    lambda x: F.pad(x, (3, 2))[..., 3:-2],  # a slice of a wider projection
    lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    lambda x: x[:1].expand_as(x),
)


def differentiate(scan, x, layout=LAYOUTS[0], dtype=None):
    """y, the last state, and the gradients of all tensors of `x` from both of these."""
    leaves = {k: v.to(dtype or v.dtype) for k, v in x.items() if is_float(v)}
    leaves = {k: v.clone().requires_grad_() for k, v in leaves.items()}
    y, state = scan(**x | {k: layout(v) for k, v in leaves.items()})
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in (y, state)
    ]
    grads = torch.autograd.grad((y, state), list(leaves.values()), upstream)
    return {"y": y, "state": state} | dict(zip(leaves, grads, strict=True))


def is_float(value):
    return torch.is_tensor(value) and value.is_floating_point()


def check(ours, truth, tolerance):
    """Relative error in norm of each tensor; what must be 0 must be exactly 0."""
    for name in truth.keys() | ours.keys():
        size = truth[name].double().norm().item()
        off = (ours[name].double() - truth[name].double()).norm().item()
        assert off <= tolerance * size + 1e-30 * (size > 0), (name, off, size)


def scan_by(backend):
    return functools.partial(mamba.selective_scan, return_final_state=True, backend=backend)


def need(backend):
    """Skip, visibly, where there is no compiler."""
    if backend == "fused" and not mamba.can_compile("cpu"):
        pytest.skip("no C compiler")


@functools.cache
def case_and_truth(name):
    x = CASES[name]()
    layout = LAYOUTS[len(name + name[-1]) % 4 if name in HARD else int(name.split()[1]) % 4]
    return x, layout, differentiate(recurrence, x, layout, torch.float64)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scan_is_the_recurrence(name, backend):
    need(backend)
    x, layout, truth = case_and_truth(name)
    check(differentiate(scan_by(backend), x, layout), truth, 1e-5)


@pytest.mark.parametrize("backend", ["auto", "sequential", "chunked"])
def test_float64_is_computed_in_float64(backend):
    x = draw(2, 145, 9, 5)
    truth = differentiate(recurrence, x, dtype=torch.float64)
    ours = differentiate(scan_by(backend), x, dtype=torch.float64)
    assert {value.dtype for value in ours.values()} == {torch.float64}
    check(ours, truth, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_inputs_are_computed_in_float32(backend, dtype):
    need(backend)
    x = draw(2, 45, 9, 5)
    half = x | {name: x[name].to(dtype) for name in ("u", "delta", "B", "C", "z")}
    single = half | {name: half[name].float() for name in ("u", "delta", "B", "C", "z")}
    with torch.autocast("cpu", torch.bfloat16):
        ours = differentiate(scan_by(backend), half)
    truth = differentiate(scan_by(backend), single)
    assert ours["y"].dtype == dtype and ours["state"].dtype == torch.float32
    assert torch.equal(ours["y"], truth["y"].to(dtype))
    assert torch.equal(ours["state"], truth["state"])
    check(ours, truth, 2 * torch.finfo(dtype).eps)


def test_gradients_are_the_finite_differences(monkeypatch):
    monkeypatch.setattr(mamba.ParallelScan, "CHUNK", 1)  # the least, 8 positions
    x = draw(2, 19, 2, 2, starts=0.2)
    names = [name for name, value in x.items() if is_float(value)]
    tensors = [x[name].double().requires_grad_() for name in names]

    def scan(*tensors):
        return scan_by("chunked")(**x | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(scan, tensors, fast_mode=False)


# ----- Properties of the scan


@pytest.fixture(params=["chunked", "fused"])
def backend(request, monkeypatch):
    """The parallel scans, the chunked one in small chunks."""
    need(request.param)
    monkeypatch.setattr(mamba.ParallelScan, "CHUNK", 1)
    return request.param


def in_pieces(cuts, carry, backend):
    """`selective_scan` run piece by piece, the state carried over the cuts or dropped there."""

    def scan(starts=None, initial_state=None, **x):
        ys, state = [], initial_state
        for a, b in itertools.pairwise([0, *cuts, x["u"].shape[1]]):
            piece = {
                k: v[:, a:b] if k in ("u", "delta", "z", "B", "C") else v for k, v in x.items()
            }
            marks = None if starts is None else starts[:, a:b]
            before = state if a == 0 or carry else None
            y, state = scan_by(backend)(**piece, initial_state=before, starts=marks)
            ys.append(y)
        return torch.cat(ys, 1), state

    return scan


def test_starts_are_documents_run_apart(backend):
    x, cuts = draw(2, 60, 9, 5), [1, 17, 18, 40]
    x["starts"] = torch.zeros(2, 60, dtype=torch.bool)
    x["starts"][:, cuts] = True
    apart = differentiate(in_pieces(cuts, False, backend), x)
    check(differentiate(scan_by(backend), x), apart, 1e-5)


def test_a_start_at_position_0_drops_the_initial_state(backend):
    x = draw(2, 30, 9, 5, starts=0)
    x["starts"][:, 0] = True
    ours = differentiate(scan_by(backend), x)
    without = {k: v for k, v in x.items() if k not in ("initial_state", "starts")}
    assert not ours.pop("initial_state").any()
    check(ours, differentiate(scan_by(backend), without), 1e-6)


@pytest.mark.parametrize("cuts", [[1], [59], [30], [7, 8, 31]])
def test_a_sequence_may_be_cut_anywhere(cuts, backend):
    x = draw(2, 60, 9, 5)
    whole = differentiate(scan_by(backend), x)
    check(differentiate(in_pieces(cuts, True, backend), x), whole, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_are_bitwise_equal_and_inputs_are_left_alone(backend):
    need(backend)
    x = draw(3, 100, 70, 8)
    before = {k: v.clone() for k, v in x.items() if torch.is_tensor(v)}
    torch.set_num_threads(2)
    first = differentiate(scan_by(backend), x)
    torch.set_num_threads(1)
    second = differentiate(scan_by(backend), x)
    assert all(torch.equal(first[k], second[k]) for k in first)
    with torch.no_grad():
        y, state = scan_by(backend)(**x)
    assert torch.equal(y, first["y"]) and torch.equal(state, first["state"])
    assert all(torch.equal(x[k], v) for k, v in before.items())


def test_backward_may_be_called_twice(backend):
    x = draw(2, 60, 9, 5)
    leaves = [v.requires_grad_() for v in x.values() if is_float(v)]
    y, state = scan_by(backend)(**x)
    loss = (y * y).sum() + state.sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_states_are_not_kept(backend):
    B, L, D, N = 2, 256, 64, 16
    x, sizes = draw(B, L, D, N), []
    x["u"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda v: sizes.append(v.numel()) or v, id):
        mamba.selective_scan(**x, backend=backend)
    assert 0 < sum(sizes) < B * L * D * N / 2  # the inputs of the operations are 12 N-ths of it


def test_the_fused_scan_says_what_it_cannot_take():
    double = {k: v.double() if is_float(v) else v for k, v in draw(2, 5, 3, 4).items()}
    with pytest.raises(ValueError, match=r"cannot take torch\.float64"):
        mamba.selective_scan(**double, backend="fused")
    wide = draw(1, 4, 2, 200)
    with pytest.raises(ValueError, match="200 states"):
        mamba.selective_scan(**wide, backend="fused")
    check({"y": scan_by("auto")(**wide)[0]}, {"y": recurrence(**wide)[0]}, 1e-5)


@pytest.mark.parametrize("channels", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
def test_tiles_and_blocks_of_any_size(channels, length):
    need("fused")
    x = draw(2, length, channels, 3, seed=channels + length)
    truth = differentiate(recurrence, x, dtype=torch.float64)
    check(differentiate(scan_by("fused"), x), truth, 1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(value):
    need("fused")
    x = draw(1, 40, 5, 4, without=["starts"])
    x["u"][0, 7, 2] = value
    y = mamba.selective_scan(**x, backend="fused")
    assert not y[0, 7:, 2].isfinite().any() and y[0, :7].isfinite().all()
    assert y[..., 3:].isfinite().all()


def test_a_step_is_a_scan_of_one_position():
    x = draw(2, 1, 9, 5, without=["starts"])
    softplus, state = x.pop("delta_softplus"), x.pop("initial_state")
    one = [v[:, 0] if v.ndim == 3 else v for v in x.values()]
    y, after = mamba.selective_scan_step(state, *one, softplus)
    truth, last = recurrence(**x, initial_state=state, delta_softplus=True)
    check({"y": y, "state": after}, {"y": truth[:, 0], "state": last}, 1e-6)


BAD_SCANS = {
    "u": torch.zeros(4, 6),
    "delta": torch.zeros(2, 4, 5),
    "A": torch.zeros(5, 3),
    "B": torch.zeros(2, 4, 6),
    "C": torch.zeros(2, 3, 3),
    "D": torch.zeros(1),
    "z": torch.zeros(2, 6, 4),
    "delta_bias": torch.zeros(3),
    "initial_state": torch.zeros(2, 3, 6),
    "starts": torch.zeros(4, 2, dtype=torch.bool),
    "backend": "cuda-kernel",
}


@pytest.mark.parametrize("name", BAD_SCANS)
def test_arguments_that_do_not_fit_are_named(name):
    with pytest.raises(ValueError, match=rf"\b{name}\b.*must be"):
        mamba.selective_scan(**draw(2, 4, 6, 3) | {name: BAD_SCANS[name]})


def test_starts_need_a_state_that_can_be_forgotten():
    x = draw(2, 4, 6, 3)
    x["A"][0, 0] = 0.0
    with pytest.raises(ValueError, match="A negative"):
        mamba.selective_scan(**x)


# ----- The C library

PROGRAM = """
import torch, mamba
u, delta, B, C = (torch.rand(2, 50, n) for n in (70, 70, 4, 4))
x = [v.requires_grad_() for v in (u, delta, -torch.rand(70, 4), B, C)]
y, want = (mamba.selective_scan(*x, backend=b) for b in ("auto", "sequential"))
assert (y - want).norm() < 1e-5 * want.norm()
y.sum().backward()
mamba.selective_scan(*x)
print(mamba.can_compile('cpu'))
"""


def start_program(**environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-c", PROGRAM]
    cwd = Path(mamba.__file__).parent
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=-1, stderr=-1, text=True)


def ends(process):
    """What it printed, and its lines on standard error."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output.strip(), errors.splitlines()


def test_a_process_compiles_and_leaves_nothing(tmp_path):
    need("fused")
    running = [start_program(TMPDIR=str(tmp_path)) for _ in range(2)]
    assert [ends(process) for process in running] == [("True", [])] * 2
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_the_chunked_scan_runs_and_one_line_says_so():
    compilers = ("no-such-compiler", "false", "cc -no-such-flag")
    running = [start_program(CC=cc) for cc in compilers]
    for process in running:
        output, errors = ends(process)
        assert output == "False" and len(errors) == 1
        assert errors[0].startswith("selective_scan is chunked, not fused: ")


# ----- The model


def small(**changes):
    config = {"d_model": 12, "n_layer": 2, "vocab_size": 29, "d_state": 4} | changes
    return far_from_zero(mamba.Mamba(mamba.MambaConfig(**config)))


def by_steps(model, tokens):
    logits, state = model(tokens[:, :1], return_state=True)
    logits = [logits[:, 0]]
    for token in tokens[:, 1:].unbind(1):
        y, state = model.step(token, state)
        logits.append(y)
    return torch.stack(logits, 1), state


def test_the_block_is_figure_3():
    block, x = small().backbone.layers[0].mixer, torch.randn(2, 20, 12).double()
    branch, z = F.linear(x, block.in_proj.weight).chunk(2, -1)
    conv = block.conv1d
    branch = F.silu(F.conv1d(F.pad(branch.mT, (3, 0)), conv.weight, conv.bias, groups=24).mT)
    delta, B, C = F.linear(branch, block.x_proj.weight).split([1, 4, 4], -1)
    delta = F.linear(delta, block.dt_proj.weight)
    A = -block.A_log.exp()
    y, state = recurrence(branch, delta, A, B, C, block.D, z, block.dt_proj.bias, True)
    ours, (window, h) = block(x)
    close(ours, F.linear(y, block.out_proj.weight))
    close(h, state)
    close(window, F.linear(x, block.in_proj.weight)[:, -3:, :24])


def test_parallel_is_step_by_step():
    model, tokens = small(), text(3, 37)
    logits, state = model(tokens, return_state=True)
    close((logits, state), by_steps(model, tokens))
    for cut in (1, 2, 20, 36):
        head, carried = model(tokens[:, :cut], return_state=True)
        tail, after = model(tokens[:, cut:], carried, return_state=True)
        close((torch.cat([head, tail], 1), after), (logits, state))


def test_documents_in_one_row_do_not_see_one_another():
    model, tokens, cuts = small(), text(2, 40), [0, 2, 3, 17, 39]
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[:, cuts] = True
    apart = [model(tokens[:, a:b]) for a, b in itertools.pairwise([*cuts, 40])]
    _, dirty = model(text(2, 9), return_state=True)
    whole = model(tokens, dirty, starts)
    close(whole, torch.cat(apart, 1))
    for cut in (17, 18, 19, 20):  # the convolution's window does not look over a start either
        _, state = model(tokens[:, :cut], None, starts[:, :cut], return_state=True)
        close(model(tokens[:, cut:], state, starts[:, cut:]), whole[:, cut:])


def test_the_past_does_not_see_the_future():
    model, tokens = small(), text(2, 40)
    logits = model(tokens)
    for t in (1, 20, 39):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 29
        again = model(changed)
        assert torch.equal(again[:, :t], logits[:, :t])
        assert not torch.isclose(again[:, t], logits[:, t]).all()


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_causal_conv_is_conv1d(taps):
    shapes = (2, 11, 21), (21, 1, taps), (2, taps - 1, 21), (21,)
    x, weight, before, bias = (torch.randn(shape).double().requires_grad_() for shape in shapes)

    def truth(x):
        return F.conv1d(x.mT, weight, bias, groups=21).mT

    y, window = mamba.causal_conv(x, weight, bias, before)
    expected = truth(torch.cat([before, x], 1))
    close(y, expected)
    close(window, torch.cat([before, x], 1)[:, 11:])
    tensors, upstream = (x, weight, bias), torch.randn(2, 11, 21).double()
    close(
        torch.autograd.grad(y, tensors, upstream), torch.autograd.grad(expected, tensors, upstream)
    )
    starts = torch.zeros(2, 11, dtype=torch.bool)
    starts[:, [1, 2, 8]] = True
    pieces = [truth(F.pad(x[:, a:b], (0, 0, taps - 1, 0))) for a, b in ((1, 2), (2, 8), (8, 11))]
    close(mamba.causal_conv(x, weight, bias, before, starts)[0][:, 1:], torch.cat(pieces, 1))


def test_the_loss_is_the_mean_cross_entropy():
    model, tokens, targets = small(vocab_size=600), text(3, 300), text(3, 300)
    truth = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    close(model(tokens, targets=targets), truth)


def test_the_residual_stream_is_float32_when_the_model_is_bfloat16():
    model, seen = small().bfloat16(), []
    for layer in model.backbone.layers:
        layer.register_module("probe", torch.nn.Identity())
    hook = torch.nn.Module.register_forward_hook
    hook(model.backbone.norm_f, lambda _, args, __: seen.append(args[0].dtype))
    logits, state = model(text(2, 9), return_state=True)
    assert model.step(text(2), state)[0].dtype == logits.dtype == torch.bfloat16
    assert {h.dtype for _, h in state} == {torch.float32}


def test_initialisation_is_the_papers():
    model = mamba.Mamba(mamba.MambaConfig(d_model=64, n_layer=4, vocab_size=999))
    block = model.backbone.layers[3].mixer
    dt = F.softplus(block.dt_proj.bias)
    assert dt.min() > 0.0009 and dt.max() < 0.101
    assert abs(dt.log().mean().item() - math.log(0.01)) < 0.4
    close(block.A_log.exp(), torch.arange(1.0, 17).expand(128, 16), 1e-5)
    assert (block.D == 1).all() and 0.45 < block.dt_proj.weight.abs().max() <= 0.5
    assert abs(model.backbone.embeddings.weight.std().item() - 0.02) < 1e-3
    assert 0.9 < block.out_proj.weight.abs().max() * 2 * 128**0.5 <= 1  # Kaiming over sqrt(layers)
    assert 0.9 < block.in_proj.weight.abs().max() * 64**0.5 <= 1
    assert model.lm_head.weight is model.backbone.embeddings.weight
    untied = mamba.Mamba(mamba.MambaConfig(8, 1, 9, tie_embeddings=False))
    assert untied.lm_head.weight is not untied.backbone.embeddings.weight


def test_a_tiny_batch_is_learnt_by_heart():
    model, tokens = mamba.Mamba(mamba.MambaConfig(32, 1, 29, 4)), text(2, 33)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(50):
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


# ----- Writing text


def test_greedy_text_is_the_likeliest_token_by_full_recomputation():
    model, prompt = small(), text(3, 7)
    longer = prompt
    for _ in range(12):
        longer = torch.cat([longer, model(longer)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(prompt, 12, temperature=0), longer)
    assert torch.equal(model.generate(prompt, 12, top_k=1), longer)
    assert torch.equal(model.generate(prompt, 12, temperature=1.5, top_p=1e-6), longer)
    rows = [model.generate(row[None], 12, temperature=0) for row in prompt]
    assert torch.equal(torch.cat(rows), longer)


def test_the_generator_decides_the_text():
    model, prompt = small(), text(2, 5)
    texts = [
        model.generate(prompt, 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
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
        ({"temperature": 1e-7}, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_tokens_are_drawn_from_the_cut_distribution(options, expected):
    order = [2, 0, 3, 1]
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[torch.tensor(order).argsort()]
    drawn = mamba.sample_token(logits.expand(20_000, 4), **options)
    share = drawn.bincount(minlength=4)[order] / 20_000
    close(share, torch.tensor(expected), 0.015)
    assert (share[torch.tensor(expected) == 0] == 0).all()


@pytest.mark.parametrize("bad", [{"temperature": -0.5}, {"top_k": -1}, {"top_p": 1.5}])
def test_bad_sampling_options(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        mamba.sample_token(torch.zeros(1, 4), **bad)


# ----- Folders in the official layout; Hugging Face's are tested in tests/peers


def official(folder, model, **changes):
    """A folder as state-spaces/mamba writes it."""
    fields = {"d_model": 12, "n_layer": 2, "vocab_size": 27, "ssm_cfg": {"d_state": 4}}
    fields |= {"rms_norm": True, "residual_in_fp32": True, "pad_vocab_size_multiple": 8}
    (folder / "config.json").write_text(json.dumps(fields | changes))
    weights = {k.replace("embeddings", "embedding"): v for k, v in model.state_dict().items()}
    torch.save(weights, folder / "pytorch_model.bin")
    return weights


def test_the_official_layout_is_read(tmp_path):
    model, tokens = small().float(), text(2, 9)
    official(tmp_path, model)
    assert torch.equal(mamba.read_folder(tmp_path)(tokens), model(tokens))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "Mamba2"),
        ({"rms_norm": False}, "rms_norm"),
        ({"ssm_cfg": {"d_state": 5}}, "A_log"),
        ({"ssm_cfg": {"d_state": 4, "bias": True}}, "bias"),
        ({"n_layer": 3}, "layers.2"),
        ({"d_model": None}, "NoneType"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, changes, words):
    official(tmp_path, small().float(), **changes)
    with pytest.raises(ValueError, match=words):
        mamba.load_model(tmp_path)


# ----- Data


PROSE = "the cat sat on the mat and the dog sat on the log; that is that.\n" * 8
MIXED = "Hello, world! It's 12345 o'clock.\n\n\tdef f(x): naïve café\r\n中文 🙂👩‍👧 <|endoftext|>  "


def test_python_documents_are_prose_and_the_same_each_time():
    documents = mamba.python_documents()
    text = "\n".join(documents)
    assert len(documents) > 200 and len(text) > 1_000_000
    assert "wrap(text : string) -> [string]" in text and "test.support" not in documents
    assert documents == mamba.python_documents()


@pytest.mark.parametrize("name", ["byte", "bpe:300"])
def test_round_trips(name):
    tokenizer = mamba.load_tokenizer(name, [PROSE + MIXED])
    for words in (MIXED, "", " " * 1_000_000 + "x", *MIXED):
        ids = tokenizer.encode(words)
        assert tokenizer.separator not in ids and max(ids, default=0) < tokenizer.vocab_size
        assert tokenizer.decode_bytes(ids) == words.encode()
    parsed = tokenizer.encode(MIXED, special=True)
    assert (
        parsed.count(tokenizer.separator) == 1 and tokenizer.separator == tokenizer.vocab_size - 1
    )
    assert tokenizer.decode_bytes(parsed, special=True) == MIXED.encode()
    assert tokenizer.decode_bytes(parsed) == MIXED.replace("<|endoftext|>", "").encode()
    assert tokenizer.decode_bytes([tokenizer.vocab_size + 3]) == b""  # of a padded vocabulary
    again = mamba.Tokenizer(**tokenizer.arguments)
    assert again.encode(MIXED) == tokenizer.encode(MIXED)


def test_bpe_joins_the_commonest_pair():
    """Each merge, by recounting every pair of every word."""
    import regex

    tokenizer = mamba.load_tokenizer("bpe:330", [PROSE, MIXED])
    words = [[bytes([b]) for b in w.encode()] for w in regex.findall(mamba.CL100K, PROSE)]
    words += [[bytes([b]) for b in w.encode()] for w in regex.findall(mamba.CL100K, MIXED)]
    for token, rank in sorted(tokenizer.arguments["ranks"].items(), key=lambda item: item[1])[256:]:
        pairs = [pair for word in words for pair in itertools.pairwise(word)]
        count = {pair: pairs.count(pair) for pair in set(pairs)}
        best = max(count.values())
        joined = [pair for pair in count if pair[0] + pair[1] == token and count[pair] == best]
        assert joined, (rank, token)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == joined[0]:
                    word[i : i + 2] = [token]
                i += 1
    assert tokenizer.vocab_size == 330
    ids = tokenizer.encode(PROSE) + tokenizer.encode(MIXED)
    assert [tokenizer.bytes_of[i] for i in ids] == [part for word in words for part in word]


def test_bpe_of_text_without_spaces_takes_no_minutes():
    dna = "".join(random.Random(0).choices("ACGT", k=100_000))
    tokenizer = mamba.load_tokenizer("bpe:400", [dna])
    assert tokenizer.vocab_size == 400 and len(tokenizer.encode(dna)) < 40_000
    with pytest.raises(ValueError, match="N must be from 257 to at most 265"):
        mamba.load_tokenizer("bpe:5000", ["short text"])
    with pytest.raises(ValueError, match="yields only 263 ids"):
        mamba.load_tokenizer("bpe:264", ["a" * 16 + " aaa"])  # six merges


def test_bpe_is_the_same_in_every_process():
    """Ties too, although Python hashes strings anew in each."""
    program = "import mamba; ranks = mamba.load_tokenizer('bpe:400', [mamba.__doc__]).bytes_of; "
    command, cwd = [sys.executable, "-c", program + "print(ranks)"], Path(mamba.__file__).parent
    seeds = [os.environ | {"PYTHONHASHSEED": seed} for seed in "123"]
    found = [subprocess.check_output(command, cwd=cwd, env=seed) for seed in seeds]
    assert found[0] == found[1] == found[2] and len(found[0]) > 1000


def test_a_tiktoken_file(tmp_path):
    learnt = mamba.load_tokenizer("bpe:300", [PROSE + MIXED])
    rows = [
        base64.b64encode(token) + b" %d\n" % i for token, i in learnt.arguments["ranks"].items()
    ]
    (tmp_path / "x.tiktoken").write_bytes(b"".join(rows))
    tokenizer = mamba.load_tokenizer(str(tmp_path / "x.tiktoken"), [])
    assert tokenizer.encode(MIXED) == learnt.encode(MIXED) and tokenizer.vocab_size == 300


def test_repeated_paragraphs_are_dropped():
    long = "a paragraph of sixty characters and more, which stands in two documents"
    documents = [f"one\n\n{long}\n\nshort", f"two\n\n{long}\n\nshort", long]
    kept = mamba.drop_repeated_paragraphs(documents)
    assert kept == [documents[0], "two\n\nshort"]
    assert mamba.drop_repeated_paragraphs([f"{long}\n\n{long}\n\nshort\n\nshort"]) == [
        f"{long}\n\nshort\n\nshort"
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), "utf-8")
    return str(path)


def test_every_twentieth_document_is_for_validation(tmp_path):
    rows = [f"document {i} of many" for i in range(1, 62)]
    rows[10] = "a document so long that it alone would decide the score. " * 30
    corpus = mamba.load_corpus(write_jsonl(tmp_path / "x.jsonl", rows), "byte")
    kept = [row for row in rows if row != rows[10]]
    text = corpus.tokenizer.decode_bytes(corpus.valid, special=True).decode()
    assert text == "".join(row + "<|endoftext|>" for row in kept[19::20])
    assert len(corpus.train) + len(corpus.valid) == sum(len(row.strip()) + 1 for row in rows)


def test_a_folder_is_its_text_files(tmp_path):
    (tmp_path / "under").mkdir()
    for i in range(60):
        (tmp_path / "under" / f"{i:02}.txt").write_text(f"text {i}", "utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    corpus = mamba.load_corpus(str(tmp_path), "byte")
    text = corpus.tokenizer.decode_bytes(corpus.valid, special=True).decode()
    assert text == "".join(f"text {i}<|endoftext|>" for i in (19, 39, 59))


def test_of_few_documents_the_end_is_for_validation(tmp_path):
    (tmp_path / "x.txt").write_text("x" * 950 + "y" * 50)
    corpus = mamba.load_corpus(str(tmp_path / "x.txt"), "byte")
    assert corpus.train.tolist() == [ord("x")] * 950 + [256]
    assert corpus.valid.tolist() == [ord("y")] * 50 + [256]
    whole = mamba.load_corpus(str(tmp_path / "x.txt"), "byte", split=False)
    assert len(whole.train) == 0 and len(whole.valid) == 1001


def test_a_tokenizer_is_never_learnt_from_validation(tmp_path):
    rows = ["zqzqzqzq " * 9 if i % 20 == 0 else f"the cat sat on the mat {i}" for i in range(1, 61)]
    corpus = mamba.load_corpus(write_jsonl(tmp_path / "x.jsonl", rows), "bpe:262")
    assert not any(b"q" in token for token in corpus.tokenizer.arguments["ranks"] if len(token) > 1)


def write_bin(folder, ids, **changes):
    description = {"dtype": "uint16", "vocab_size": 257, "tokenizer": "byte"}
    description |= {"document_separator": 256} | changes
    np.asarray(ids, {"uint16": "<u2", "uint32": "<u4"}[description["dtype"]]).tofile(
        folder / "x.bin"
    )
    (folder / "x.json").write_text(json.dumps(description))
    return str(folder / "x.bin")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_bin_is_mapped_not_read(tmp_path, dtype):
    ids = np.arange(4000) % 257
    corpus = mamba.load_corpus(write_bin(tmp_path, ids, dtype=dtype), "ignored")
    assert isinstance(corpus.train, np.memmap) and len(corpus.train) == 3800
    assert np.array_equal(np.concatenate([corpus.train, corpus.valid]), ids)
    assert corpus.tokenizer.vocab_size == 257 and corpus.separator == 256
    bare = write_bin(tmp_path, ids, tokenizer=None, document_separator=None)
    corpus = mamba.load_corpus(bare, "byte")
    assert corpus.tokenizer is None and mamba.xz_bits(corpus) is None


def test_windows_keep_to_packed_contexts(tmp_path):
    """Each context is filled with its own number, so that a window over two contexts would show."""
    contexts = np.repeat(np.arange(101), 32)  # a twentieth is no whole number of them
    path = write_bin(tmp_path, contexts, tokenizer=None, context_length=32)
    corpus = mamba.load_corpus(path, "")
    assert len(corpus.train) % 32 == 0 and corpus.context_length == 32
    for length in (32, 16):
        config, seen = mamba.Config(length=length, batch=8), set()
        for step in range(60):
            offsets = mamba.window_offsets(corpus, config, step)
            x, _, _ = mamba.read_windows(corpus, corpus.train, offsets, config, "cpu")
            assert (x == x[:, :1]).all()
            seen |= set(x[:, 0].tolist())
        assert seen >= set(range(len(corpus.train) // 32 - 1))  # the last has no token after it
    for length in (33, 10):
        with pytest.raises(ValueError, match="must divide the data's context_length, 32"):
            mamba.check_run(mamba.Config(length=length), corpus, {"config": {}})


def test_xz_is_given_the_training_text(tmp_path):
    words = [sentences(i, 400) for i in range(40)]
    corpus = mamba.load_corpus(write_jsonl(tmp_path / "x.jsonl", words), "byte")
    train, valid = (bytes(ids[ids < 256].astype(np.uint8)) for ids in (corpus.train, corpus.valid))
    grown = len(lzma.compress(train + valid)) - len(lzma.compress(train))
    assert mamba.xz_bits(corpus) == pytest.approx(8 * grown / len(valid))


# ----- Training


def corpus_of(tokens, separator=256):
    tokens, tokenizer = np.asarray(tokens, np.uint32), mamba.load_tokenizer("byte", [])
    return mamba.Corpus(tokens, tokens, tokenizer, 257, separator)


@pytest.mark.parametrize("size", [33, 64, 65, 1000])
def test_an_epoch_reads_each_window_once(size):
    corpus, config = corpus_of(np.arange(size)), mamba.Config(length=32, batch=3)
    count = (size - 1) // 32
    steps = [mamba.window_offsets(corpus, config, step) for step in range(2 * count)]
    epochs = np.concatenate(steps).reshape(6, count)
    assert epochs.min() >= 0 and epochs.max() + 33 <= size
    for epoch in epochs:
        assert (np.diff(np.sort(epoch)) == 32).all()
    assert (mamba.window_offsets(corpus, config, 1) == steps[1]).all()  # needs no replay
    if size == 1000:
        other = mamba.window_offsets(corpus, mamba.Config(length=32, batch=3, seed=1), 1)
        assert (other != steps[1]).any() and len({tuple(epoch) for epoch in epochs}) == 6


def test_a_document_starts_after_a_separator():
    """Of what stands before the window too."""
    tokens = np.random.default_rng(0).choice([256, 7, 8], 200)
    config, offsets = mamba.Config(length=9, document_resets=True), [0, 1, 17, 60, 151, 190]
    x, y, starts = mamba.read_windows(corpus_of(tokens), tokens, offsets, config, "cpu")
    for row, o in enumerate(offsets):
        assert x[row].tolist() == tokens[o : o + 9].tolist()
        assert y[row].tolist() == tokens[o + 1 : o + 10].tolist()
        expected = [t == 0 or tokens[t - 1] == 256 for t in range(o, o + 9)]
        assert starts[row].tolist() == expected


def test_what_decays():
    model = mamba.Mamba(mamba.MambaConfig(16, 1, 9))
    optimizer = mamba.make_optimizer(model, mamba.Config(weight_decay=0.3))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    decayed = {name.split(".")[-2] for name, p in model.named_parameters() if decay[id(p)] == 0.3}
    assert decayed == {"embeddings", "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"}
    assert len(decay) == len(list(model.parameters())) and set(decay.values()) == {0.3, 0.0}


def test_learning_rate():
    config = mamba.Config(steps=100, lr=2.0, min_lr=0.5, warmup=0.1)
    rates = [mamba.learning_rate(step, config) for step in range(100)]
    close(torch.tensor(rates[:11]), torch.tensor([0.2 * i for i in range(1, 11)] + [2.0]), 1e-6)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.5)
    half = 0.5 + 1.5 * math.cos(math.pi / 8) ** 2
    assert rates[54] == pytest.approx(1.25, abs=0.02) and rates[32] == pytest.approx(half, abs=0.02)


@pytest.mark.parametrize("clip", [1.9, 0.0])
def test_a_training_step_is_adamw_written_out(clip):
    """Windows, starts, loss, clipping, rate and AdamW (1711.05101, algorithm 2), in float64."""
    tokens = np.random.default_rng(0).choice([256, 7, 8, 9, 10], 900)
    sizes = {"batch": 4, "accumulate": 2, "length": 16, "steps": 8, "warmup": 0.25, "clip": clip}
    config = mamba.Config(
        **sizes, lr=1e-2, min_lr=1e-3, weight_decay=0.3, beta2=0.8, document_resets=True, seed=3
    )
    corpus, norms = corpus_of(tokens), []
    trained = mamba.Mamba(mamba.MambaConfig(16, 1, 257, 4)).double()
    model = mamba.Mamba(trained.config).double()
    model.load_state_dict(trained.state_dict())
    optimizer = mamba.make_optimizer(trained, config)
    decays = [
        0.3 if p.ndim > 1 and not name.endswith("A_log") else 0.0
        for name, p in model.named_parameters()
    ]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for step in range(1, 7):
        offsets = mamba.window_offsets(corpus, config, step - 1)
        windows = torch.from_numpy(np.stack([tokens[o : o + 17] for o in offsets]))
        before = torch.tensor([[tokens[o - 1] if o else 256] for o in offsets])
        starts = torch.cat([before, windows[:, :-2]], 1) == 256
        logits = model(windows[:, :-1], starts=starts)
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(math.sqrt(sum(g.square().sum().item() for g in grads)))
        ours = mamba.train_step(trained, optimizer, corpus, config, step - 1)
        assert ours == pytest.approx((loss.item(), norms[-1]), rel=1e-5)
        rate = mamba.learning_rate(step - 1, config)
        scale = min(1.0, clip / norms[-1]) if clip else 1.0
        for p, g, decay, (m, v) in zip(model.parameters(), grads, decays, moments, strict=True):
            m.mul_(0.9).add_(g * scale, alpha=0.1)
            v.mul_(0.8).add_((g * scale) ** 2, alpha=0.2)
            update = m / (1 - 0.9**step) / ((v / (1 - 0.8**step)).sqrt() + 1e-8)
            p.data -= rate * (decay * p.data + update)
    assert not clip or min(norms) < clip < max(norms)  # clipped, and not
    close(list(trained.parameters()), list(model.parameters()), 1e-5)


@pytest.mark.parametrize("length", [1, 7, 64, 500])
@pytest.mark.parametrize("resets", [False, True])
def test_every_token_but_the_first_is_scored_once(length, resets):
    documents = [sentences(i, 35) for i in range(9)]
    tokenizer = mamba.load_tokenizer("bpe:280", documents)
    tokens = []
    for document in documents:
        tokens += [*tokenizer.encode(document), tokenizer.separator]
    corpus = mamba.Corpus(np.array([]), np.array(tokens), tokenizer, 280, tokenizer.separator)
    model, nats, size = small(vocab_size=280), 0.0, 0
    for i, token in enumerate(tokens[:-1]):
        begins = resets and (i == 0 or tokens[i - 1] == corpus.separator)
        if i % length == 0 or begins:
            logits, state = model(torch.tensor([[token]]), return_state=True)
            logits = logits[:, 0]
        else:
            logits, state = model.step(torch.tensor([token]), state)
        nats -= logits[0].log_softmax(-1)[tokens[i + 1]].item()
        size += len(tokenizer.decode_bytes([tokens[i + 1]]))
    config, count = mamba.Config(length=length, document_resets=resets), len(tokens) - 1
    scores = mamba.evaluate(model, corpus, config)
    truth = {"loss": nats / count, "bits_a_byte": nats / math.log(2) / size, "tokens": count}
    assert scores == pytest.approx(truth, abs=2e-6)
    assert mamba.evaluate(model, corpus, config, limit=50)["tokens"] == 50


# ----- Jobs, as a user runs them

TINY = "--tokenizer byte --d-model 16 --n-layer 1 --d-state 4 --steps 20 --batch 4 --length 32"
TINY += " --lr 1e-2 --tokens 5 --eval-every 5 --eval-tokens 60"
TINY = TINY.split()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A job on a small text; without the picture, which is slow."""
    monkeypatch.setattr(mamba, "plot", lambda *_: None)
    (tmp_path / "text.txt").write_text(sentences(1), "utf-8")

    def run(out, *flags, job="train", data="text.txt"):
        data = ["--data", str(tmp_path / data)] if data else []
        return mamba.main(
            [job, *(TINY if job == "train" else []), *data, "--out", str(tmp_path / out), *flags]
        )

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
    train_step = mamba.train_step

    def pressed(*arguments):
        if arguments[-1] + 1 == step:
            monkeypatch.setattr(mamba, "train_step", train_step)
            signal.raise_signal(signal.SIGINT)
        return train_step(*arguments)

    monkeypatch.setattr(mamba, "train_step", pressed)


def test_a_run_writes_its_files_and_can_be_repeated(run, tmp_path, monkeypatch, capsys):
    assert [run("b"), run("c", "--seed", "1")] == [0, 0]
    monkeypatch.undo()
    assert run("a") == 0
    a, b, c = (tmp_path / name for name in "abc")
    names = ["checkpoint.pt", "loss.png", "metrics.jsonl", "result.json"]
    assert sorted(path.name for path in a.iterdir()) == names
    metrics = [(folder / "metrics.jsonl").read_bytes() for folder in (a, b, c)]
    assert metrics[0] == metrics[1] != metrics[2]
    assert [row["step"] for row in rows(a)] == [*range(1, 21)]
    assert losses(a)[-1] < losses(a)[0] - 0.5
    assert [row["step"] for row in rows(a) if "valid_loss" in row] == [5, 10, 15, 20]
    result = json.loads((a / "result.json").read_text())
    assert result["config"]["d_model"] == 16 and result["seed"] == 0
    assert result["baselines_bits_a_byte"]["xz"] > 0 and len(result["script_sha256"]) == 64
    assert "step 20 · loss" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["", "--accumulate 2 --document-resets"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(
    run, tmp_path, monkeypatch, capsys, flags
):
    flags = flags.split()
    assert run("whole", *flags) == 0
    stop_after(monkeypatch, 7)
    assert run("parts", *flags) == 130
    assert len(rows(tmp_path / "parts")) == len(saved(tmp_path / "parts")["history"]) == 7
    assert "stopped after step 7" in capsys.readouterr().out
    stop_after(monkeypatch, 16)
    assert run("parts", *flags, "--resume") == 130
    (tmp_path / "parts" / "metrics.jsonl").write_bytes(b"\0" * 60 + b'{"step": 17, "lo')  # damaged
    assert run("parts", *flags, "--resume") == 0
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    first, second = saved(whole), saved(parts)
    assert first.pop("config") != second.pop("config") and same(first, second)


def start(*words, cwd, **environment):
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        words, cwd=cwd, env=environment, stdout=-1, stderr=-1, text=True, errors="replace"
    )


def interrupt(process):
    """Send Ctrl-C once the process has made a step; returns the last line that it prints."""
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "", errors
    return output.splitlines()[-1]


def test_ctrl_c_leaves_a_checkpoint(tmp_path):
    flags = [*TINY, "--data", "text.txt", "--out", "run", "--steps", "100000"]
    (tmp_path / "text.txt").write_text(sentences(1), "utf-8")
    last = interrupt(start(sys.executable, mamba.__file__, *flags, cwd=tmp_path))
    stopped = int(re.fullmatch(r"stopped after step (\d+); --resume goes on", last)[1])
    assert len(saved(tmp_path / "run")["history"]) == len(rows(tmp_path / "run")) == stopped
    interrupt(start(sys.executable, mamba.__file__, *flags, "--resume", cwd=tmp_path))
    assert len(rows(tmp_path / "run")) > stopped


def test_two_processes_are_one(run, tmp_path):
    assert run("one", "--accumulate", "2") == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [*TINY, "--data", "text.txt", "--out", "two", "--accumulate", "2"]
    process = start(sys.executable, *launch, mamba.__file__, *flags, cwd=tmp_path)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    torch.testing.assert_close(
        losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=0
    )
    close(saved(tmp_path / "two")["model"], saved(tmp_path / "one")["model"], 1e-3)
    assert output.count("step 20 · ") == 1  # one process speaks


def test_accumulation_is_one_batch(run, tmp_path):
    assert [run("1"), run("4", "--accumulate", "4")] == [0, 0]
    torch.testing.assert_close(losses(tmp_path / "4"), losses(tmp_path / "1"), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_compiled_training_is_training(run, tmp_path):
    need("fused")
    assert run("plain", "--steps", "3") == 0
    scans = dict(mamba.SCANS)
    try:
        assert run("compiled", "--steps", "3", "--compile") == 0
    finally:
        mamba.SCANS.update(scans)
    torch.testing.assert_close(
        losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=1e-4, atol=0
    )


def test_divergence_keeps_the_last_good_checkpoint(run, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    usual = mamba.learning_rate
    monkeypatch.setattr(mamba, "learning_rate", lambda i, c: 1e30 if i == 6 else usual(i, c))
    assert run("late") == 1
    assert re.search(r"diverged at step 8: .*nan.*lower --lr\n", capsys.readouterr().err)
    monkeypatch.setattr(mamba, "learning_rate", usual)
    kept = saved(tmp_path / "late")
    assert len(kept["history"]) == 5 and all(v.isfinite().all() for v in kept["model"].values())
    assert signal.getsignal(signal.SIGINT) is before  # Ctrl-C is usual again
    assert run("late", "--resume") == 0


def test_a_model_that_scores_nan_is_not_saved_and_does_not_write(
    run, tmp_path, monkeypatch, capsys
):
    usual = mamba.learning_rate
    monkeypatch.setattr(mamba, "learning_rate", lambda i, c: math.inf if i == 9 else usual(i, c))
    assert run("out") == 1 and len(saved(tmp_path / "out")["history"]) == 5
    content = saved(tmp_path / "out")
    content["model"]["backbone.norm_f.weight"][0] = math.nan
    torch.save(content, tmp_path / "out" / "checkpoint.pt")
    for job in ("sample", "eval"):
        capsys.readouterr()
        assert run("out", job=job) == 1
        assert re.fullmatch(r"mamba.py: .*(not finite|is nan).*\n", capsys.readouterr().err)


def numbers(output):
    """The dictionary of scores at the end of a line."""
    return json.loads(output[output.index("{") : output.index("}") + 1].replace("'", '"'))


def test_eval_agrees_with_training_and_takes_its_length(run, tmp_path, capsys):
    assert run("out") == 0
    trained = json.loads((tmp_path / "out" / "result.json").read_text())["validation"]
    capsys.readouterr()
    assert run("out", job="eval", data="") == 0
    assert numbers(capsys.readouterr().out) == trained
    corpus = mamba.load_corpus(str(tmp_path / "text.txt"), "byte")
    (tmp_path / "valid.txt").write_bytes(corpus.tokenizer.decode_bytes(corpus.valid))
    assert run("out", job="eval", data="valid.txt") == 0  # all of the file
    assert numbers(capsys.readouterr().out) == trained
    assert run("out", "--length", "7", job="eval", data="valid.txt") == 0
    other = numbers(capsys.readouterr().out)
    assert other["tokens"] == trained["tokens"] and other["loss"] != trained["loss"]


def test_training_beats_xz_where_copying_does_not_help(run, tmp_path):
    """Of letters drawn independently: their entropy is the floor, which matches do not reach."""
    letters = random.Random(0).choices("abcdefgh", weights=[30, 20, 15, 12, 10, 6, 4, 3], k=20_000)
    (tmp_path / "long.txt").write_text("".join(letters))
    assert run("out", "--d-model", "32", "--steps", "60", "--length", "64", data="long.txt") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["validation"]["bits_a_byte"] < result["baselines_bits_a_byte"]["xz"] - 0.1


def test_tokens_from_a_bin(run, tmp_path, capsys):
    parts = [[*sentences(i, 90).encode(), 256] for i in range(40)]
    write_bin(tmp_path, np.concatenate(parts))
    assert run("plain", data="x.bin") == run("resets", "--document-resets", data="x.bin") == 0
    assert not torch.equal(losses(tmp_path / "plain"), losses(tmp_path / "resets"))
    assert run("resets", job="eval", data="x.bin") == run("resets", job="sample") == 0
    capsys.readouterr()
    assert run("resets", job="eval", data="") == 0  # with resets, as it was trained
    trained = json.loads((tmp_path / "resets" / "result.json").read_text())["validation"]
    assert numbers(capsys.readouterr().out) == trained
    write_bin(tmp_path, np.concatenate(parts), tokenizer=None)
    assert run("bare", data="x.bin") == 0 and run("bare", job="eval", data="x.bin") == 0
    capsys.readouterr()
    assert run("bare", job="sample", data="") == 2 and "--tokenizer" in capsys.readouterr().err
    assert run("bare", "--tokenizer", "byte", job="sample", data="") == 0  # the advice helps


def test_samples_from_a_checkpoint(run, tmp_path, capsys):
    assert run("out") == 0 and capsys.readouterr()
    assert (
        run("out", "--prompt", "naïve", "--tokens", "30", "--temperature", "0", job="sample") == 0
    )
    text = capsys.readouterr().out.removesuffix("\n")
    model, tokenizer, _ = mamba.load_model(tmp_path / "out" / "checkpoint.pt")
    ids = model.generate(torch.tensor([tokenizer.encode("naïve")]), 30, temperature=0)[0]
    assert tokenizer.decode_bytes(ids, special=True).decode("utf-8", "replace") == text
    assert text.startswith("naïve")


def test_output_that_is_not_utf8(run, tmp_path):
    flags = [*TINY, "--data", "text.txt", "--out", "out", "--prompt", "日本"]
    process = start(sys.executable, mamba.__file__, *flags, cwd=tmp_path, PYTHONIOENCODING="cp1252")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors == ""
    assert (tmp_path / "out" / "result.json").exists()


BAD = {  # flags after the usual ones; what the line must say
    "--data nowhere.txt": "nowhere.txt",
    "--data empty.txt": "are too few for --length 32",
    "--data short.txt": "are too few for --length 32",
    "--data latin.txt": "can't decode byte",
    "--data rows.jsonl": "rows.jsonl, line 3",
    "--data x.bin": "token 300 is beyond the model's 257",
    "--data odd.bin": "odd.json",
    "--data nulls.bin": "the .json beside it do not fit",
    "--tokenizer wordpiece": "Unknown encoding wordpiece",
    "--tokenizer bpe:9999999": "N must be from 257",
    "--tokenizer bpe:100": "N must be from 257",
    "--tokenizer two.tiktoken": "every single byte",
    "--tokenizer twice.tiktoken": "nothing twice",
    "--steps 0": "--steps 0 must be at least 1",
    "--lr nan": "--lr nan must be at least 0",
    "--document-resets --data bare.bin": "needs a document_separator",
    "--device cuda": "CUDA",
    "eval --out good --length -5": "--length -5 must be",
    "--batch 3 --accumulate 2": "equal division",
    "--device tpu": "tpu",
    "--out text.txt": "text.txt",
    "--out junk --resume": "junk/checkpoint.pt holds no model",
    "--out nothing --resume": "nothing/checkpoint.pt",
    "sample --checkpoint junk/checkpoint.pt": "holds no model",
    "sample --checkpoint zero.pt": "holds no model",
    "sample --checkpoint four.pt": "holds no model",
    "sample --checkpoint other.pt": "holds no model",
    "sample --checkpoint nowhere.pt": "nowhere.pt",
    "sample --checkpoint junk": "config.json",
    "sample --out good --prompt ''": "prompt is empty",
    "sample --out good --temperature -1": "--temperature -1.0 must be at least 0",
    "sample --out good --top-p 7": "top_p",
    "eval --out good --data empty.txt": "1 tokens, and so none",
}


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name, content in {"text": sentences(1), "empty": "", "short": "x" * 30}.items():
        (folder / f"{name}.txt").write_text(content, "utf-8")
    (folder / "latin.txt").write_bytes(b"caf\xe9" * 100)
    (folder / "rows.jsonl").write_text('{"text": "a"}\n\n{"text": 3}\n')
    (folder / "odd.bin").write_bytes(b"abc")
    write_bin(folder, [1] * 1000, tokenizer=None, document_separator=None)
    (folder / "x.bin").rename(folder / "bare.bin")
    (folder / "x.json").rename(folder / "bare.json")
    write_bin(folder, [300] * 1000, vocab_size=None)
    (folder / "x.bin").rename(folder / "nulls.bin")
    (folder / "x.json").rename(folder / "nulls.json")
    write_bin(folder, [300] * 1000)
    (folder / "two.tiktoken").write_text("YQ== 0\nYg== 1\n")
    ranks = "".join(f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256))
    (folder / "twice.tiktoken").write_text(f"{ranks}YWI= 255\n")
    (folder / "junk").mkdir()
    (folder / "junk" / "checkpoint.pt").write_bytes(b"not tensors at all")
    (folder / "four.pt").write_bytes(b"junk")
    (folder / "zero.pt").write_bytes(b"")
    torch.save([1, 2], folder / "other.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert mamba.main([*TINY, "--data", "text.txt", "--steps", "1", "--out", "good"]) == 0
    return folder


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(flags, bad_inputs, monkeypatch, capsys):
    monkeypatch.chdir(bad_inputs)
    words = shlex.split(flags)
    if words[0] in mamba.JOBS:
        code = mamba.main(words)
    else:
        code = mamba.main([*TINY, "--data", "text.txt", "--out", "out", *words])
    line = capsys.readouterr().err
    assert code == 2 and re.fullmatch(r"mamba\.py: .*\n", line) and BAD[flags] in line, line


def test_resuming_with_another_config_names_the_field(run, tmp_path, capsys):
    assert run("out") == 0
    assert run("out", "--resume", "--lr", "0.5") == 2
    assert "lr was 0.01 and is 0.5" in capsys.readouterr().err
    assert run("out", "--resume", "--accumulate", "2", "--temperature", "0") == 0
    (tmp_path / "text.txt").write_text(sentences(1) * 2, "utf-8")
    assert run("out", "--resume") == 2 and "data have changed" in capsys.readouterr().err


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert (
        mamba.main(["--tokenizer", str(tmp_path / "tokenizer.json"), "--out", str(tmp_path)]) == 2
    )
    assert "pip install tokenizers" in capsys.readouterr().err
