"""Time and memory of mamba.py's fused and chunked scans beside mambapy's, transformers' and a loop.

    python tests/bench/scan.py                  # timings, memory, growth with length: ten minutes
    python tests/bench/scan.py --malloc tuned   # timings again: the malloc keeps what is freed

All run in one process on the same inputs, interleaved; each gets softplus, its bias, D and z, so
that all compute one function, and that they do is checked first. Memory is the growth of a fresh
process's resident peak over one call. The floor of the fused scan is the larger of its memory
traffic, at the rate of a copy, and its exponentials, at the rate of torch.exp in the cache, both
measured here.
"""

import argparse
import functools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import _common  # first: torch's threads read what it sets
from _common import goal, interleave, measure, median, number, spread, table

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

import mamba

SHAPES = {"S": (1, 768, 512, 16), "M": (2, 1536, 2048, 16), "X": (1, 256, 8192, 16)}  # (B, D, L, N)
QUICK_SHAPES = {"S": (1, 32, 64, 16), "M": (2, 64, 128, 16), "X": (1, 16, 512, 16)}
MODES = ("forward", "forward+backward")
OURS = ("fused", "chunked")
IMPLEMENTATIONS = (*OURS, "mambapy", "transformers", "loop")
LOOPS = ("transformers", "loop")  # their backward pass is quadratic in L: see each select's
LIMIT = 60.0  # seconds, of one forward+backward of a loop

# Forward+backward under the default malloc: at least so many times mambapy's speed,
SPEED_GOALS = {
    "chunked": {"M": 9.0, "X": 3.8, "S": 2.5},
    "fused": {"M": 38.0, "X": 25.0, "S": 12.0},
}
MEMORY_GOAL = 9.0  # and at most this part of its memory, but not at S, where it is the allocator's


def ours(inputs: dict[str, Tensor], backend: str) -> Tensor:
    return mamba.selective_scan(**inputs, delta_softplus=True, backend=backend)


def mambapy_scan(inputs: dict[str, Tensor]) -> Tensor:
    """As mambapy's MambaBlock calls its own scan."""
    from mambapy.mamba import MambaBlock

    v = inputs
    delta = F.softplus(v["delta"] + v["delta_bias"])
    y = MambaBlock.selective_scan(None, v["u"], delta, v["A"], v["B"], v["C"], v["D"])  # no `self`
    return y * F.silu(v["z"])


def transformers_scan(inputs: dict[str, Tensor]) -> Tensor:
    """As transformers' MambaMixer calls its scan uncompiled; channels before positions."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    v = {k: x.mT if x.ndim == 3 else x for k, x in inputs.items()}
    first = v["u"], v["delta"], v["A"], v["B"], v["C"]
    rest = {name: v[name] for name in ("D", "z", "delta_bias")}
    return mamba_selective_scan(*first, **rest, delta_softplus=True).mT


def implementation(name: str) -> Callable[[dict[str, Tensor]], Tensor]:
    backends = {"fused": "fused", "chunked": "chunked", "loop": "sequential"}
    if name in backends:
        return functools.partial(ours, backend=backends[name])
    return {"mambapy": mambapy_scan, "transformers": transformers_scan}[name]


def make_inputs(name: str, shape: tuple[int, int, int, int], grad: bool) -> dict[str, Tensor]:
    """Inputs in an implementation's own memory layout: transformers' are (B, D, L)."""
    (batch, width, L, N), generator = shape, torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    inputs = {k: draw(batch, L, width) for k in ("u", "delta", "z")}
    inputs |= {k: draw(batch, L, N) for k in ("B", "C")}
    inputs |= {"A": -torch.arange(1.0, N + 1).repeat(width, 1)}
    inputs |= {"D": draw(width), "delta_bias": draw(width) - 4}
    if name == "transformers":
        inputs = {k: x.mT.contiguous().mT if x.ndim == 3 else x for k, x in inputs.items()}
    return {k: x.requires_grad_(grad) for k, x in inputs.items()}


def make_run(name: str, shape: tuple[int, int, int, int], mode: str) -> Callable[[], object]:
    """A call to time, with its inputs bound."""
    scan, grad = implementation(name), mode != "forward"
    inputs = make_inputs(name, shape, grad)
    dy = torch.ones_like(inputs["u"], requires_grad=False)

    def run() -> object:
        with torch.set_grad_enabled(grad):
            y = scan(inputs)
            return torch.autograd.grad(y, list(inputs.values()), dy) if grad else y

    return run


def check_equal(shape: tuple[int, int, int, int]) -> None:
    """All compute one function, with one gradient: otherwise there is nothing to compare."""
    want = make_run("loop", shape, MODES[1])()
    for name in IMPLEMENTATIONS:
        for a, b in zip(make_run(name, shape, MODES[1])(), want, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm(), f"{name} computes something else"


def hopeless(name: str, shape: tuple[int, int, int, int], mode: str) -> float | None:
    """Seconds of a loop's forward+backward, if over LIMIT, by an eighth of the length."""
    if name not in LOOPS or mode == "forward":
        return None
    batch, width, L, N = shape
    seconds = 64 * measure(make_run(name, (batch, width, L // 8, N), mode))
    return seconds if seconds > LIMIT else None


# ----- Time


def time_shapes(shapes: dict, names: list[str], rounds: int, budget: float) -> list[dict]:
    """A row per shape and mode: times of each implementation, and why one has none."""
    rows = []
    for label, shape in shapes.items():
        for mode in MODES:
            predicted = {name: hopeless(name, shape, mode) for name in names}
            runs = {
                name: make_run(name, shape, mode)
                for name, seconds in predicted.items()
                if seconds is None
            }
            times = interleave(runs, rounds, budget)
            row = {"shape": label, "sizes": shape, "mode": mode, "seconds": times}
            row["predicted"] = {name: s for name, s in predicted.items() if s is not None}
            rows.append(row)
            print_times(rows[-1], first=len(rows) == 1)
    return rows


def print_times(row: dict, first: bool) -> None:
    """A line of the table of times, as it comes: medians in ms, and times the fused scan's."""
    if first:
        print("\nms, and times the fused scan's (in brackets: half the range of the runs)")
    our = median(row["seconds"]["fused"])
    parts = []
    for name in [*row["seconds"], *row["predicted"]]:
        if name in row["predicted"]:
            parts.append(f"{name} – (would take about {row['predicted'][name]:.0f} s)")
        else:
            seconds = row["seconds"][name]
            text = f"±{spread(seconds):.0%}, n {len(seconds)}, {number(median(seconds) / our)} x"
            parts.append(f"{name} {number(median(seconds) * 1e3)} ({text})")
    print(f"{row['shape']} {row['sizes']} {row['mode']}: " + " · ".join(parts), flush=True)


def speed_goals(rows: list[dict]) -> list[dict]:
    goals = []
    for name, at_least in SPEED_GOALS.items():
        for row in rows:
            if row["mode"] != "forward":
                text = f"{row['mode']} at {row['shape']}: mambapy's time over the {name} scan's"
                ratio = median(row["seconds"]["mambapy"]) / median(row["seconds"][name])
                goals.append(goal(text, ratio, at_least[row["shape"]]))
    return goals


def time_growth(lengths: list[int], width: int, rounds: int) -> list[dict]:
    """Microseconds a token of ours, by length: flat is linear."""
    rows = []
    for L in lengths:
        runs, shape = {}, (1, width, L, 16)
        for name in OURS:
            runs |= {f"{name} {mode}": make_run(name, shape, mode) for mode in MODES}
        times = interleave(runs, rounds, budget=10.0)
        rows.append({"L": L, "seconds": times} | {m: median(s) / L * 1e6 for m, s in times.items()})
    return rows


def floors(shapes: dict) -> dict:
    """Least seconds of each shape and mode at this machine's rates of copying and exponentials."""
    x, y, z = torch.ones(2**26), torch.empty(2**26), torch.zeros(2**16)
    copied = 2 * x.nbytes / min(measure(lambda: y.copy_(x)) for _ in range(9))
    many = min(measure(lambda: [torch.exp(z) for _ in range(100)]) for _ in range(9))
    rate = 100 * z.numel() / many
    least = {}
    for label, (batch, width, L, N) in shapes.items():
        full, weights = 4 * batch * L * width, 4 * batch * L * N
        moved = {MODES[0]: 4 * full + 2 * weights}  # reads u, delta, z, B, C, writes y
        # It reads these and dy again, and writes their gradients.
        moved[MODES[1]] = moved[MODES[0]] + 7 * full + 4 * weights
        for passes, mode in enumerate(MODES, 1):
            least[f"{label} {mode}"] = max(
                moved[mode] / copied, passes * batch * width * L * N / rate
            )
    return {"bytes_a_second": copied, "exponentials_a_second": rate, "seconds": least}


def print_floors(least: dict, rows: list[dict]) -> None:
    rates = least["bytes_a_second"] / 1e9, least["exponentials_a_second"] / 1e9
    print(f"\nfloor of the fused scan at {rates[0]:.1f} GB/s, {rates[1]:.2f} exponentials a ns")
    lines = [["", "floor, ms", "fused, ms", "share"]]
    for row in rows:
        name, took = f"{row['shape']} {row['mode']}", median(row["seconds"]["fused"])
        seconds = least["seconds"][name]
        lines.append([name, number(seconds * 1e3), number(took * 1e3), f"{seconds / took:.0%}"])
    print(table(lines), flush=True)


# ----- Memory


def status(key: str) -> int:
    """A field of this process's status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", text)[1])


def peak_of(run: Callable[[], object]) -> int:
    """Bytes by which the resident memory grows, at its peak, during one call (Linux)."""
    before = status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    except OSError:
        return sampled_peak(run) - before
    run()
    return status("VmHWM") - before


def sampled_peak(run: Callable[[], object]) -> int:
    """The largest resident size seen by a thread that looks every millisecond."""
    seen, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(status("VmRSS"))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return max(seen)


def memory_here(job: str) -> int:
    """The measurement of one fresh process, after a small call that loads what any needs."""
    name, shape, mode = json.loads(job)
    make_run(name, (1, 32, 32, 16), mode)()
    return peak_of(make_run(name, tuple(shape), mode))


def measure_memory(rows: list[dict], threads: int) -> list[dict]:
    """Bytes of each implementation that was timed, shape and mode, each in a process of its own."""
    memory = []
    for row in rows:
        peaks = {}
        for name in row["seconds"]:
            job = json.dumps([name, row["sizes"], row["mode"]])
            flags = ["--threads", str(threads), "--memory-of", job]
            command = [sys.executable, __file__, *flags]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            peaks[name] = int(done.stdout.splitlines()[-1])
        memory.append({"shape": row["shape"], "mode": row["mode"], "bytes": peaks})
    return memory


def print_memory(memory: list[dict]) -> None:
    print("\npeak extra memory, MB, and times the fused scan's")
    header = ["", *IMPLEMENTATIONS]
    lines = []
    for row in memory:
        line, our = [f"{row['shape']} {row['mode']}"], row["bytes"]["fused"]
        for name in IMPLEMENTATIONS:
            peak = row["bytes"].get(name)
            times = "" if name == "fused" or not peak or not our else f" ({number(peak / our)} x)"
            line.append(number(peak / 1e6 if peak else None) + times)
        lines.append(line)
    print(table([header, *lines]), flush=True)


def memory_goals(memory: list[dict]) -> list[dict]:
    goals = []
    for row in memory:
        if row["mode"] != "forward" and row["shape"] != "S":
            for name in OURS:
                ratio = row["bytes"]["mambapy"] / row["bytes"][name]
                text = f"{row['mode']} at {row['shape']}: mambapy's memory over the {name} scan's"
                goals.append(goal(text, ratio, MEMORY_GOAL))
    return goals


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    _common.add_common_flags(parser)
    yes_no = argparse.BooleanOptionalAction
    parser.add_argument("--rounds", type=int, default=9, help="runs of each; the median counts")
    text = "what to measure; always fused, chunked and mambapy"
    parser.add_argument(
        "--only", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS, help=text
    )
    parser.add_argument("--memory", action=yes_no, default=True, help="measure memory too")
    parser.add_argument("--growth", action=yes_no, default=True, help="time long sequences too")
    parser.add_argument("--memory-of", default="", help="for the program itself: one measurement")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    _common.need_peers()
    _common.prepare(args)
    if args.memory_of:
        print(memory_here(args.memory_of))
        return 0
    check_equal((2, 8, 37, 16))
    shapes = QUICK_SHAPES if args.quick else SHAPES
    names = list(dict.fromkeys((*OURS, "mambapy", *args.only)))  # what the goals need
    rounds, budget = (2, 1.0) if args.quick else (args.rounds, 20.0)
    rows, least = time_shapes(shapes, names, rounds, budget), floors(shapes)
    print_floors(least, rows)
    judged = args.malloc == "default" and not args.quick
    goals, growth, memory = speed_goals(rows) if judged else [], None, None
    if args.growth:
        lengths = [128, 256] if args.quick else [2**k for k in range(10, 17)]
        width, rounds = (16, 2) if args.quick else (256, 5)
        growth = time_growth(lengths, width, rounds)
        print(f"\nours at (1, {width}, L, 16), microseconds a token")
        names = list(growth[0]["seconds"])
        lines = [[f"{row['L']:,}", *(number(row[m]) for m in names)] for row in growth]
        print(table([["L", *names], *lines]))
    if args.memory and args.malloc == "default":  # one that keeps everything says nothing
        memory = measure_memory(rows, args.threads)
        print_memory(memory)
        goals += memory_goals(memory) if judged else []
    measured = {"times": rows, "floor": least, "growth": growth, "memory": memory}
    _common.write_result(args, "scan", **measured, goals=goals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
