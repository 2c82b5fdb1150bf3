"""What the benchmarks share: interleaved timing, tables, goals, result files, another malloc."""

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # before torch: threads that wait must soon sleep
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for `import mamba`: the scripts are run, not installed

# glibc returns large blocks to the system and fetches them anew, page by page; so large, never.
TUNED = {"MALLOC_MMAP_THRESHOLD_": 2**35, "MALLOC_TRIM_THRESHOLD_": 2**35}
TUNED |= {"MALLOC_TOP_PAD_": 2**28}


def add_common_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Flags of every benchmark."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--out", default="out/bench", help="folder of the result file")
    text = "tuned: start again with a glibc that keeps freed memory (its own result file)"
    parser.add_argument("--malloc", choices=("default", "tuned"), default="default", help=text)
    threads = torch.get_num_threads()
    parser.add_argument("--threads", type=int, default=threads, help="threads of PyTorch")
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Restart under the malloc asked for, which reads settings then; set threads and seed."""
    settings = {name: str(value) for name, value in TUNED.items()}
    if args.malloc == "tuned" and not settings.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)


def measure(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    return measure_beside_others(run)[0]


def measure_beside_others(run: Callable[[], object]) -> tuple[float, bool]:
    """Seconds of one call, and whether others took over a tenth of a processor meanwhile (Linux).

    A parallel loop waits for its slowest thread, so that a busy neighbour can slow one
    of many small operations far more than one of few large ones (up to 100 times was seen). Such a
    run measures the neighbour.
    """
    busy, own, began = busy_seconds(), time.process_time(), time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    others = busy_seconds() - busy - (time.process_time() - own)
    return seconds, others > 0.1 * seconds + 0.03  # the system counts in hundredths of a second


def busy_seconds() -> float:
    """Processor time of all processes since start-up; 0 where the system does not say."""
    try:
        user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    except OSError:
        return 0.0
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def interleave(runs: dict[str, Callable], rounds: int, budget: float) -> dict[str, list[float]]:
    """Seconds of each call, round after round (a, b, c, a, b, c, ...): what changes hits all.

    The first call of each warms up and is not counted, unless it alone takes the budget. Runs that
    other processes disturbed are repeated, up to twice `rounds` more, and count only where there is
    no other. An implementation drops out of later rounds once it has taken `budget` seconds
    undisturbed, or four times that in all.
    """
    clean, disturbed = ({name: [] for name in runs} for _ in range(2))
    for round_ in range(3 * rounds + 1):
        for name, run in runs.items():
            spent, in_all = sum(clean[name]), sum(clean[name] + disturbed[name])
            if len(clean[name]) >= rounds or spent > budget or in_all > 4 * budget:
                continue
            seconds, beside_others = measure_beside_others(run)
            if round_ > 0 or seconds > budget:
                (disturbed if beside_others else clean)[name].append(seconds)
    for name in runs:
        if not clean[name]:
            print(f"note: other processes disturbed every run of {name}")
    return {name: clean[name] or disturbed[name] for name in runs}


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def spread(seconds: list[float]) -> float:
    """Half the range, relative to the median: how far to trust a ratio."""
    return (max(seconds) - min(seconds)) / 2 / median(seconds)


def number(value: float | None) -> str:
    """Three digits or so."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(rows: list[list[str]]) -> str:
    """Rows of text as a Markdown table; the first is the header, the first column stands left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def goal(name: str, ratio: float, at_least: float) -> dict:
    """Print a goal beside what was measured; returns both for the result file."""
    verdict = "reached" if ratio >= at_least else "MISSED"
    print(f"goal {verdict}: {name}: {number(ratio)} times, goal {at_least:g}")
    return {"goal": name, "ratio": ratio, "at_least": at_least, "reached": ratio >= at_least}


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_result(args: argparse.Namespace, name: str, **measured) -> None:
    """OUT/name.json (name-tuned.json under tuned malloc): measurements and their origin."""
    named = ("torch", "numpy", "mambapy", "transformers")
    versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in named}
    record = {"argv": sys.argv, "malloc": args.malloc, "cpu": cpu_name(), "cpus": os.cpu_count()}
    record["versions"] = {"python": platform.python_version()} | versions
    record |= {"threads": torch.get_num_threads(), "load": os.getloadavg(), "script_sha256": {}}
    for path in ROOT.glob("*.py"):
        if path.stem in sys.modules:
            record["script_sha256"][path.stem] = hashlib.sha256(path.read_bytes()).hexdigest()
    record |= measured
    path = Path(args.out) / f"{name}{'-tuned' if args.malloc == 'tuned' else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    print(f"wrote {path}")


def need_peers() -> None:
    """Exit with the install command where there are no peers; quieten transformers' notes."""
    try:
        importlib.import_module("mambapy.mamba")
        importlib.import_module("transformers").logging.set_verbosity_error()
    except ImportError as error:
        sys.exit(f"not installed: {error.name}; pip install -r tests/peers/requirements.txt")
