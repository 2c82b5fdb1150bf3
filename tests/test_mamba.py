"""mamba.py: the scan against slow loops, the model against steps, data, and the jobs."""

import functools
import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mamba
from tests._helpers import close, far_from_zero, text

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
    with pytest.raises(ValueError, match=r"fit torch\.float64"):
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
    x, weight, before = (
        torch.randn(2, 11, 21),
        torch.randn(21, 1, taps),
        torch.randn(2, taps - 1, 21),
    )
    x, weight, before = (v.double().requires_grad_() for v in (x, weight, before))
    bias = torch.randn(21).double().requires_grad_()

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
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, changes, words):
    official(tmp_path, small().float(), **changes)
    with pytest.raises((ValueError, RuntimeError), match=words):
        mamba.read_folder(tmp_path)


def test_what_decays():
    model = mamba.Mamba(mamba.MambaConfig(16, 1, 9))
    optimizer = mamba.make_optimizer(model, mamba.Config(weight_decay=0.3))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    decayed = {name.split(".")[-2] for name, p in model.named_parameters() if decay[id(p)] == 0.3}
    assert decayed == {"embeddings", "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"}
    assert len(decay) == len(list(model.parameters())) and set(decay.values()) == {0.3, 0.0}




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


