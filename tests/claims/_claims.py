"""What the programs in this folder share: flags, statistics, tables, result files, pictures."""

import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # for `import mamba`: scripts are not installed


T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # Student's, by the number of seeds


class Setting(NamedTuple):
    """A value that decides a run; each is a flag."""

    default: Any
    help: str
    smoke: Any = None  # the value with --smoke, and
    paper: Any = None  # with --paper; None: the default


class Claim(NamedTuple):
    """A claim of a paper and the experiment on it."""

    name: str  # of the result file
    settings: dict[str, Setting]
    measure: Callable  # (settings, seeds, progress) -> content of the result file
    table: Callable  # result -> Markdown
    draw: Callable | None = None  # (result, pyplot) -> figure


def main(script: ModuleType, doc: str, claims: dict[str, Claim], argv=None) -> None:
    """Run the claim on that script that the first word names: result file, picture and table.

    A flag that is written out comes before what --smoke and --paper say. With --smoke results go to
    out/claims, with --paper to files of their own.
    """
    argv, began = sys.argv[1:] if argv is None else argv, time.perf_counter()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter)
    words = parser.add_subparsers(dest="word", required=True)
    for word, claim in claims.items():
        add_flags(words.add_parser(word, argument_default=argparse.SUPPRESS), claim.settings)
    given = vars(parser.parse_args(argv))
    claim, mode = claims[given["word"]], given.get("mode", "default")
    settings = {}
    for name, setting in claim.settings.items():
        of_mode = getattr(setting, mode)
        settings[name] = given.get(name, setting.default if of_mode is None else of_mode)
    seeds = given.get("seeds", [1, 2] if mode == "smoke" else [1, 2, 3])
    folder = given.get("results", Path("out/claims") if mode == "smoke" else HERE / "results")

    def progress(text: str) -> None:
        print(f"{time.perf_counter() - began:5.0f} s  {text}", flush=True)

    keep_memory()
    content = claim.measure(SimpleNamespace(**settings), seeds, progress)
    result = {
        "command": shlex.join(["python", f"tests/claims/{script.__name__}_claims.py", *argv]),
        "seeds": seeds,
        "settings": settings,
        # Where other work halts a run now and then its processor time says more than the clock.
        "wall_seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": f"{device()}, {torch.get_num_threads()} threads",
        "script_sha256": hashlib.sha256(Path(script.__file__).read_bytes()).hexdigest(),
    } | content
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{claim.name}{'_paper' if mode == 'paper' else ''}.json"
    path.write_text(compact(result) + "\n", "utf-8")
    result = json.loads(path.read_text("utf-8"))
    print(claim.table(result))
    if claim.draw:
        save_picture(lambda plt: claim.draw(result, plt), path.with_suffix(".png"))


def add_flags(parser: argparse.ArgumentParser, settings: dict[str, Setting]) -> None:
    """A flag for each setting, and those that every claim has."""
    for name, (default, text, _, paper) in settings.items():
        text += f"; default: {default}" + (f", paper: {paper}" if paper is not None else "")
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), help=text)
    parser.add_argument("--seeds", type=int, nargs="+", help="one run each; default: 1 2 3")
    parser.add_argument("--results", type=Path, help="folder to write to")
    modes = parser.add_mutually_exclusive_group()
    options = {"dest": "mode", "action": "store_const"}
    modes.add_argument(
        "--smoke", const="smoke", help="tiny, to out/claims: does it run?", **options
    )
    if any(setting.paper is not None for setting in settings.values()):
        modes.add_argument("--paper", const="paper", help="the paper's: for a GPU", **options)


def keep_memory() -> None:
    """Have glibc keep freed blocks: fetching them anew each step takes up to half the time."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, as small ones do,
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks


def device() -> torch.device:
    """Where a program computes: on CUDA if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def new_model(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """make() with the initialisation of that seed, where the program computes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().to(device())


def mean_sd(values: list[float]) -> dict:
    """Mean, sample standard deviation (0 for one value) and the values."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "sd": sd, "each": list(values)}


def over(values: list[float | None]) -> dict | None:
    """Mean, half the width of its 95 % interval by Student's t, and the values; None if one is."""
    if None in values:
        return None
    n = len(values)
    half = T_95[n] * statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0
    return {"mean": statistics.mean(values), "half": half, "each": values}


def plus_minus(score: dict, digits: int) -> str:
    """Mean ± s.d. of what `mean_sd` gave."""
    return f"{score['mean']:.{digits}f} ± {score['sd']:.{digits}f}"


def markdown(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table in Markdown; columns after the first `left` are numbers, and stand to the right."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_band(axes, x: list, runs: list[list[float]], *form, **style) -> None:
    """A line for the mean over the runs, in a band from the least to the greatest."""
    values = list(zip(*runs, strict=True))  # of the runs, at each x
    (line,) = axes.plot(x, [statistics.mean(v) for v in values], *form, **style)
    low, high = [min(v) for v in values], [max(v) for v in values]
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2)


def save_picture(draw: Callable, path: Path) -> None:
    """The figure that draw(pyplot) gives, as a PNG, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed; pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = draw(pyplot)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def compact(value: object) -> str:
    """JSON, indented, but lists of numbers on one line; floats of six digits."""
    short = json.loads(json.dumps(value), parse_float=lambda x: float(f"{float(x):.6g}"))
    text = json.dumps(short, indent=1, ensure_ascii=False)
    return re.sub(r'\[[^][{}"]*\]', lambda found: re.sub(r"\n *", "", found[0]), text)
