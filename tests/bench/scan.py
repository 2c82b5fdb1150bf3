"""Time and memory of mamba.py's fused and chunked scans beside mambapy's.

    python tests/bench/scan.py --rounds 5   # some minutes

All run in one process on the same inputs, interleaved; each gets softplus, its bias, D and z, so
that all compute one function, and that they do is checked first. Memory is the growth of a fresh
process's resident peak over one call. The floor of the fused scan is the larger of its memory
traffic, at the rate of a copy, and its exponentials, at the rate of torch.exp in the cache, both
measured here.
"""

import functools
from collections.abc import Callable

import _common  # first: torch's threads read what it sets
from _common import best_of, goal, in_new_process, interleave, median, peak_of, print_rows

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

import mamba

SHAPES = {"S": (1, 768, 512, 16), "M": (2, 1536, 2048, 16), "X": (1, 256, 8192, 16)}  # (B, D, L, N)
SMOKE_SHAPES = {"S": (1, 32, 64, 16)}
MODES = ("forward", "forward+backward")

# Forward+backward: at least so many times mambapy's speed,
SPEED_GOALS = {
    "chunked": {"M": 9.0, "X": 3.8, "S": 2.5},
    "fused": {"M": 38.0, "X": 25.0, "S": 12.0},
}
MEMORY_GOAL = 9.0  # and at most this part of its memory, but not at S, where it is the allocator's


def mambapy_scan(u, delta, A, B, C, D, z, delta_bias) -> Tensor:
    """As mambapy's MambaBlock calls its own scan."""
    from mambapy.mamba import MambaBlock

    delta = F.softplus(delta + delta_bias)
    y = MambaBlock.selective_scan(None, u, delta, A, B, C, D)  # it does not use `self`
    return y * F.silu(z)


ours = functools.partial(mamba.selective_scan, delta_softplus=True)
SCANS = {name: functools.partial(ours, backend=name) for name in ("fused", "chunked")}
SCANS["mambapy"] = mambapy_scan


def make_run(scan: Callable, shape: tuple[int, int, int, int], mode: str) -> Callable[[], object]:
    """A call to time, with its inputs bound: y, or the gradients of all inputs."""
    (batch, width, L, N), grad = shape, mode != "forward"
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    inputs = {name: draw(batch, L, width) for name in ("u", "delta", "z")}
    inputs |= {name: draw(batch, L, N) for name in ("B", "C")}
    inputs["A"] = -torch.arange(1.0, N + 1).repeat(width, 1)
    inputs |= {"D": draw(width), "delta_bias": draw(width) - 4}
    leaves, dy = [x.requires_grad_(grad) for x in inputs.values()], torch.ones(batch, L, width)

    def run() -> object:
        with torch.set_grad_enabled(grad):
            y = scan(**inputs)
            return torch.autograd.grad(y, leaves, dy) if grad else y

    return run


def check_equal(shape: tuple[int, int, int, int]) -> None:
    """All have one gradient, the recurrence's: otherwise there is nothing to compare."""
    want = make_run(functools.partial(ours, backend="sequential"), shape, MODES[1])()
    for name, scan in SCANS.items():
        for a, b in zip(make_run(scan, shape, MODES[1])(), want, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm(), f"{name} computes something else"


def time_shapes(shapes: dict, rounds: int) -> list[dict]:
    """A row per shape and mode: seconds of each scan."""
    rows = []
    for label, shape in shapes.items():
        for mode in MODES:
            runs = {name: make_run(scan, shape, mode) for name, scan in SCANS.items()}
            times = interleave(runs, rounds, budget=20.0)
            rows.append({"shape": label, "sizes": shape, "mode": mode, "seconds": times})
    print_rows(rows)
    return rows


def floors(shapes: dict) -> dict:
    """Least seconds of each shape and mode at this machine's rates of copying and exponentials."""
    x, y, z = torch.ones(2**26), torch.empty(2**26), torch.zeros(2**16)
    copied = 2 * x.nbytes / best_of(9, lambda: y.copy_(x))
    rate = 100 * z.numel() / best_of(9, lambda: [torch.exp(z) for _ in range(100)])
    least = {}
    for label, (batch, width, L, N) in shapes.items():
        full, weights = 4 * batch * L * width, 4 * batch * L * N
        moved = {MODES[0]: 4 * full + 2 * weights}  # reads u, delta, z, B, C, writes y
        # It reads these and dy again, and writes their gradients.
        moved[MODES[1]] = moved[MODES[0]] + 7 * full + 4 * weights
        for passes, mode in enumerate(MODES, 1):
            computed = passes * batch * width * L * N / rate
            least[f"{label} {mode}"] = max(moved[mode] / copied, computed)
    return {"bytes_a_second": copied, "exponentials_a_second": rate, "seconds": least}


def memory_of(name: str, shape: tuple[int, int, int, int], mode: str) -> int:
    """Bytes that one call takes, after a small call that loads what any needs."""
    make_run(SCANS[name], (1, 32, 32, 16), mode)()
    return peak_of(make_run(SCANS[name], shape, mode))


def measure_memory(shapes: dict, threads: int) -> list[dict]:
    """A row per shape and mode: bytes of each scan, in a process of its own."""
    rows = []
    for label, shape in shapes.items():
        for mode in MODES:
            peaks = {}
            for name in SCANS:
                peaks[name] = in_new_process(memory_of, name, shape, mode, threads=threads)
            rows.append({"shape": label, "mode": mode, "bytes": peaks})
    print_rows(rows)
    return rows


def judge(times: list[dict], memory: list[dict]) -> list[dict]:
    """The goals, each of a forward+backward pass."""
    goals = []
    for name, at_least in SPEED_GOALS.items():
        for row in times:
            if row["mode"] != "forward":
                text = f"{row['mode']} at {row['shape']}: mambapy's time over the {name} scan's"
                ratio = median(row["seconds"]["mambapy"]) / median(row["seconds"][name])
                goals.append(goal(text, ratio, at_least[row["shape"]]))
    for row in memory:
        if row["mode"] != "forward" and row["shape"] != "S":
            for name in SPEED_GOALS:
                text = f"{row['mode']} at {row['shape']}: mambapy's memory over the {name} scan's"
                ratio = row["bytes"]["mambapy"] / row["bytes"][name]
                goals.append(goal(text, ratio, MEMORY_GOAL))
    return goals


def main() -> None:
    args = _common.parse(__doc__, rounds=9)
    check_equal((2, 8, 37, 16))
    shapes = SMOKE_SHAPES if args.smoke else SHAPES
    times, floor = time_shapes(shapes, args.rounds), floors(shapes)
    memory = measure_memory(shapes, args.threads)
    measured = {"times": times, "floor": floor, "memory": memory, "goals": judge(times, memory)}
    _common.write_result(args, "scan", **measured)


if __name__ == "__main__":
    main()
