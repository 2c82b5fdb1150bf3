"""What the programs on the Mamba paper's claims share: flags, training on sequences made on the spot, result files."""

import argparse
import contextlib
import dataclasses
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))  # for `import mamba`: the scripts are run, not installed

import mamba  # noqa: E402

# (inputs (B, L), targets (B, M)) of a generator: the model answers at the last M positions.
Batch = tuple[Tensor, Tensor]


def parse(
    doc: str, kind: type, paper: dict | None, smoke: dict, argv: list[str] | None
) -> tuple[object, argparse.Namespace]:
    """The settings of a program, of the dataclass `kind`, and seeds, results, paper and smoke, from its command line.

    --paper and --smoke change the defaults to those given, and a flag that is written out comes before them. A run with
    --smoke writes to out/claims, one with --paper to a result file of its own. No --paper where `paper` is None.
    """
    parser = argparse.ArgumentParser(description=doc)
    mamba.add_flags(parser, kind)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run each (default: 1 2 3)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for result and picture")
    either = parser.add_mutually_exclusive_group()
    parser.set_defaults(paper=False)
    if paper is not None:
        either.add_argument("--paper", action="store_true", help="the paper's settings: for a large machine")
    either.add_argument("--smoke", action="store_true", help="tiny, in seconds: does it run? Writes to out/claims")
    asked = parser.parse_args(argv)
    if asked.smoke:
        parser.set_defaults(**smoke, seeds=[1, 2], results=Path("out/claims"))
    if asked.paper:
        parser.set_defaults(**paper)
    asked = parser.parse_args(argv)
    asked.argv = sys.argv[1:] if argv is None else argv
    return kind(**{field.name: getattr(asked, field.name) for field in dataclasses.fields(kind)}), asked


def generator(*numbers: int) -> torch.Generator:
    """A random state of its own for these numbers (seed, purpose, ...)."""
    return torch.Generator().manual_seed(hash(numbers) % 2**63)  # the hash of integers is the same in every process


def new_model(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """make() with the initialisation of that seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def growing_lengths(first: int, last: int, steps: int) -> list[int]:
    """The length that each step trains at: at least `first`, doubled until it is `last`, in stages of equal steps.

    Long sequences with few answers teach slowly at first. All of it at `last`, as in the paper: first = last.
    """
    stages = [last]
    while stages[0] // 2 >= first:
        stages.insert(0, stages[0] // 2)
    return [stages[step * len(stages) // steps] for step in range(steps)]


def train(
    model: nn.Module, draw: Callable[[int], Batch], steps: int, lr: float, every: int, check: Callable[[], object]
) -> list[tuple[int, object]]:
    """Adam without decay at a constant rate, warmed up over the first 100 steps, with the gradient's norm clipped at 1.

    draw(step), from step 1 on, gives a batch; the loss is taken where there are targets. Returns (step, check()) for
    each `every` steps.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    seen = []
    for step in range(1, steps + 1):
        inputs, targets = (x.to(device) for x in draw(step))
        loss = F.cross_entropy(model(inputs)[:, -targets.shape[1] :].flatten(0, 1), targets.flatten())
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"training diverged at step {step}: loss {loss.item()}; lower --lr")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warm.step()
        if step % every == 0 or step == steps:
            seen.append((step, check()))
    return seen


def time_invariant_scan(u, delta, A, B, C, D, z, delta_bias, *_, **__) -> tuple[Tensor, None]:
    """`mamba.selective_scan` where nothing depends on the input: a convolution, here by FFT (equation 3); no state.

    u, z: (B, L, E), A, B, C: (E, N), D, delta_bias: (E,); delta, which is 0 before the bias, is not looked at.
    """
    step, length = F.softplus(delta_bias), u.shape[1]
    decay = torch.exp((step[:, None] * A)[..., None] * torch.arange(length, device=u.device))  # (E, N, L)
    kernel = step * torch.einsum("en,en,enl->le", B, C, decay)  # (L, E)
    product = torch.fft.rfft(u, 2 * length, dim=1) * torch.fft.rfft(kernel, 2 * length, dim=0)
    return (torch.fft.irfft(product, 2 * length, dim=1)[:, :length] + D * u) * F.silu(z), None


@contextlib.contextmanager
def faster(selective: str) -> Iterator[None]:
    """Within, a model of which nothing is selective is computed as the convolution that it is: several times faster."""
    before = mamba.selective_scan
    mamba.selective_scan = before if selective else time_invariant_scan
    try:
        yield
    finally:
        mamba.selective_scan = before


def mean_sd(values: list[float]) -> dict:
    """Mean, sample standard deviation (0 for one value) and the values."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "sd": sd, "each": list(values)}


def markdown(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table in Markdown; all columns but the first `left` are numbers, and stand to the right."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plus_minus(score: dict, digits: int) -> str:
    """Mean ± s.d. of what `mean_sd` gave."""
    return f"{score['mean']:.{digits}f} ± {score['sd']:.{digits}f}"


def device() -> torch.device:
    """Where a program computes: on CUDA if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def finish(name: str, asked: argparse.Namespace, settings: object, began: float, content: dict, draw: Callable) -> dict:
    """Write NAME.json, and with matplotlib NAME.png by draw(result, pyplot, path). Returns what the file holds."""
    base = mamba.result_record(mamba.Config(), device())
    command = shlex.join(["python", f"tests/claims/{name}.py", *asked.argv])
    result = {"command": command, "seeds": asked.seeds, "settings": dataclasses.asdict(settings), **content}
    # Where other work halts a run now and then, as it did these, its processor time says more than the clock.
    result |= {"wall_seconds": round(time.perf_counter() - began, 1), "cpu_seconds": round(time.process_time(), 1)}
    result |= {key: base[key] for key in ("versions", "device", "script_sha256")}
    asked.results.mkdir(parents=True, exist_ok=True)
    path = asked.results / f"{name}{'_paper' if asked.paper else ''}.json"
    path.write_text(compact(result) + "\n", "utf-8")
    result = json.loads(path.read_text("utf-8"))
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed; pip install matplotlib")
        return result
    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw(result, pyplot, path.with_suffix(".png"))
    return result


def compact(value: object, depth: int = 0) -> str:
    """JSON, indented, with lists of numbers, and of lists of numbers, on one line and floats of six digits."""

    def is_flat(x: object) -> bool:
        return not isinstance(x, dict) and (not isinstance(x, list | tuple) or all(map(is_flat, x)))

    def short(x: object) -> object:
        if isinstance(x, list | tuple):
            return [short(y) for y in x]
        return float(f"{x:.6g}") if isinstance(x, float) else x

    pad = "\n" + " " * (depth + 1)
    if is_flat(value):
        return json.dumps(short(value), ensure_ascii=False)
    if isinstance(value, dict):
        parts = [f"{json.dumps(str(key), ensure_ascii=False)}: {compact(x, depth + 1)}" for key, x in value.items()]
        return "{" + ",".join(pad + part for part in parts) + pad[:-1] + "}"
    return "[" + ",".join(pad + compact(x, depth + 1) for x in value) + pad[:-1] + "]"
