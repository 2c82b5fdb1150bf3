"""What the benchmarks share: flags, timing by turns, memory, goals, tables and result files."""

import argparse
import concurrent.futures
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # before torch: threads that wait must soon sleep
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for `import mamba`: the scripts are run, not installed


def parse(doc: str, rounds=0, **more: dict) -> argparse.Namespace:
    """The flags of every benchmark and `more`, with their options. Sets threads and seed."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], formatter_class=formatter)
    parser.add_argument("--smoke", action="store_true", help="tiny, to OUT/smoke: does it run?")
    parser.add_argument("--out", default="out/bench", help="folder of the result file")
    threads = torch.get_num_threads()
    parser.add_argument("--threads", type=int, default=threads, help="threads of PyTorch")
    if rounds:
        text = "runs of each that are timed; the median counts"
        parser.add_argument("--rounds", type=int, default=rounds, help=text)
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    args = parser.parse_args()
    if args.smoke:
        args.out, args.rounds = f"{args.out}/smoke", 2
        print("a trial run: its sizes are tiny, and its goals say nothing")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


# ----- Time


def timed(run: Callable[[], object]) -> tuple[float, object]:
    """Seconds of one call, and what it returned."""
    began = time.perf_counter()
    found = run()
    return time.perf_counter() - began, found


def best_of(rounds: int, run: Callable[[], object]) -> float:
    """Seconds of the fastest call, for a rate that the machine can reach."""
    return min(timed(run)[0] for _ in range(rounds))


def interleave(runs: dict[str, Callable], rounds: int, budget: float) -> dict[str, list[float]]:
    """Seconds of each call, round after round (a, b, c, a, b, c, ...): what changes hits all.

    The first call of each warms up and is not counted, unless it alone takes the budget. One that
    has taken `budget` seconds drops out of later rounds. Other processes make times longer, those
    of many small operations more than those of few large ones: look at the load in the result file.
    """
    times = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            if sum(times[name]) <= budget:
                seconds, _ = timed(run)
                if round_ > 0 or seconds > budget:
                    times[name].append(seconds)
    return times


# ----- Memory (Linux)


def in_new_process(function: Callable, *arguments, threads: int):
    """What function(*arguments) returns in a process of its own, whose memory nothing else uses."""
    context = multiprocessing.get_context("spawn")
    start = {"initializer": torch.set_num_threads, "initargs": (threads,)}
    with concurrent.futures.ProcessPoolExecutor(1, context, **start) as pool:
        return pool.submit(function, *arguments).result()


def resident_bytes(key="VmHWM") -> int:
    """Memory of this process: VmHWM, the most so far, or VmRSS, now."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_of(run: Callable[[], object]) -> int:
    """Bytes by which the resident memory grows, at its peak, during one call."""
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    run()
    return resident_bytes() - before


# ----- Tables, goals and result files


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_rows(rows: list[dict]) -> None:
    """Rows of a result file as a table: of a list of seconds the median, of a dict each value."""
    table = []
    for row in rows:
        cells = {}
        for name, value in row.items():
            parts = value if isinstance(value, dict) else {"": value}
            for part, x in parts.items():
                if isinstance(x, list) and isinstance(x[0], float):
                    x = median(x)
                if not isinstance(x, list | tuple):
                    cells[f"{name} {part}".strip()] = number(x) if isinstance(x, float) else str(x)
        table.append(cells)
    lines = [list(table[0]), *(list(cells.values()) for cells in table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.rjust, line, widths)), flush=True)


def goal(name: str, ratio: float, at_least: float) -> dict:
    """Print a goal beside what was measured; returns both for the result file."""
    verdict = "reached" if ratio >= at_least else "MISSED"
    print(f"goal {verdict}: {name}: {number(ratio)} times, goal {at_least:g}")
    return {"goal": name, "ratio": ratio, "at_least": at_least, "reached": ratio >= at_least}


def read_result(args: argparse.Namespace, name: str) -> dict:
    """The result file of an earlier run, to which this one adds; empty where there is none."""
    path = Path(args.out, f"{name}.json")
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def write_result(args: argparse.Namespace, name: str, **measured) -> None:
    """OUT/name.json: measurements and their origin."""
    named = ("torch", "numpy", "mambapy", "transformers", "faiss-cpu")
    versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in named}
    record = {"argv": sys.argv, "cpus": os.cpu_count()}
    cpus = Path("/proc/cpuinfo")  # of Linux
    models = re.findall(r"model name\s*: (.*)", cpus.read_text()) if cpus.is_file() else []
    record["cpu"] = models[0] if models else platform.processor()
    record["versions"] = {"python": platform.python_version()} | versions
    record |= {"threads": torch.get_num_threads(), "load": os.getloadavg(), "script_sha256": {}}
    for path in ROOT.glob("*.py"):
        if path.stem in sys.modules:
            record["script_sha256"][path.stem] = hashlib.sha256(path.read_bytes()).hexdigest()
    path = Path(args.out, f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | measured, indent=2) + "\n", "utf-8")
    print(f"wrote {path}", flush=True)
