"""What the programs on the Mamba paper's claims share: flags, training, ablated blocks, results."""

import argparse
import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
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
SELECTIVE = ("delta", "B", "C")  # what depends on the input in Mamba


def parse(doc: str, kind: type, paper: dict | None, smoke: dict, argv: list[str] | None) -> tuple:
    """The settings of a program, of the dataclass `kind`, and seeds, results, paper and smoke.

    --paper and --smoke change the defaults to those given; a flag that is written out comes before
    them. A run with --smoke writes to out/claims, one with --paper to a result file of its own. No
    --paper where `paper` is None. From here on freed memory is kept: see `keep_memory`.
    """
    keep_memory()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter)
    for field in dataclasses.fields(kind):
        name, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        parser.add_argument(name, type=type(field.default), default=field.default, help=text)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run each")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder to write to")
    either = parser.add_mutually_exclusive_group()
    parser.set_defaults(paper=False)
    if paper is not None:
        either.add_argument("--paper", action="store_true", help="the paper's: for a large machine")
    either.add_argument("--smoke", action="store_true", help="tiny, to out/claims: does it run?")
    asked = parser.parse_args(argv)
    if asked.smoke:
        parser.set_defaults(**smoke, seeds=[1, 2], results=Path("out/claims"))
    if asked.paper:
        parser.set_defaults(**paper)
    asked = parser.parse_args(argv)
    asked.argv = sys.argv[1:] if argv is None else argv
    return kind(**{f.name: getattr(asked, f.name) for f in dataclasses.fields(kind)}), asked


def keep_memory() -> None:
    """Have glibc keep freed blocks: fetching them anew each step takes up to half the time."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, as small ones do,
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks


def generator(*numbers: int) -> torch.Generator:
    """A random state of its own for these numbers (seed, purpose, ...), in every process."""
    return torch.Generator().manual_seed(hash(numbers) % 2**63)


def new_model(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """make() with the initialisation of that seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def growing_lengths(first: int, last: int, steps: int) -> list[int]:
    """Each step's length: at least `first`, doubled until it is `last`, in stages of equal steps.

    Long sequences with few answers teach slowly at first. As in the paper: first = last.
    """
    stages = [last]
    while stages[0] // 2 >= first:
        stages.insert(0, stages[0] // 2)
    return [stages[step * len(stages) // steps] for step in range(steps)]


def train(model, draw: Callable[[int], Batch], steps, lr, every, check: Callable) -> list[tuple]:
    """Adam without decay, its rate constant after 100 steps, with the gradient's norm clipped at 1.

    draw(step), from step 1 on, gives a batch; the loss is taken where there are targets. Returns
    (step, check()) for each `every` steps.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    seen = []
    for step in range(1, steps + 1):
        inputs, targets = (x.to(device) for x in draw(step))
        logits = model(inputs)[:, -targets.shape[1] :]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"training diverged at step {step}; lower --lr")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warm.step()
        if step % every == 0 or step == steps:
            seen.append((step, check()))
    return seen


def model_of(s, corpus: mamba.Corpus, seed: int, selective=SELECTIVE, **sizes) -> tuple:
    """A new model of the sizes that the settings s have, and mamba.py's config to train it."""
    names = ("d_model", "n_layer", "steps", "batch", "length", "lr")
    config = mamba.Config(**{name: getattr(s, name) for name in names}, **sizes, seed=seed)
    shape = mamba.MambaConfig(s.d_model, s.n_layer, corpus.vocab_size, config.d_state)
    return new_model(lambda: make_mamba(shape, selective), seed), config


def train_on_text(model: mamba.Mamba, corpus: mamba.Corpus, config: mamba.Config) -> None:
    """All steps of mamba.py's recipe."""
    optimizer = mamba.make_optimizer(model, config)
    for step in range(config.steps):
        mamba.train_step(model, optimizer, corpus, config, step)


class AblatedBlock(mamba.MambaBlock):
    """A block in which only the `selective` of delta, B and C depend on the input.

    A B or C that does not is a value a channel and state, as in S4D, where the scan has one a
    position and state. So here each state is a channel of the scan, with one state of its own.
    """

    def __init__(self, config: mamba.MambaConfig, selective: tuple[str, ...]):
        super().__init__(config)
        E, N = self.A_log.shape
        sizes = {"delta": config.rank, "B": N, "C": N}
        self.sizes = {name: sizes[name] for name in selective}
        width = sum(self.sizes.values())
        self.x_proj = nn.Linear(E, width, bias=False) if selective else None
        if "delta" not in selective:
            self.dt_proj.weight = None  # the bias alone is then the step size
        if "B" not in selective:
            self.B = nn.Parameter(torch.ones(E * N))  # flat: the optimiser lets matrices decay
        if "C" not in selective:
            self.C = nn.Parameter(torch.randn(E * N))

    def forward(self, x: Tensor, state=None, starts: Tensor | None = None) -> tuple[Tensor, None]:
        """As a MambaBlock's, but always from nothing, and without the state after it."""
        E, N = self.A_log.shape
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, _ = mamba.causal_conv(x, self.conv1d.weight, self.conv1d.bias, starts=starts)
        x = F.silu(x)
        parts = self.x_proj(x).split(list(self.sizes.values()), dim=-1) if self.sizes else ()
        found = dict(zip(self.sizes, parts, strict=True))
        delta, one = self.dt_proj.bias.expand_as(x), x.new_ones(*x.shape[:2], 1)
        if "delta" in found:
            delta = delta + F.linear(found["delta"], self.dt_proj.weight)
        B = found["B"].repeat(1, 1, E) if "B" in found else self.B  # (B, L, E N) or (E N,)
        C = found["C"].repeat(1, 1, E) if "C" in found else self.C
        u, delta = (tensor.repeat_interleave(N, dim=-1) for tensor in (x, delta))  # (B, L, E N)
        A = -torch.exp(self.A_log).view(-1, 1)
        h = mamba.selective_scan(u * B, delta, A, one, one, delta_softplus=True, starts=starts)
        y = (h * C).unflatten(-1, (E, N)).sum(-1) + self.D * x
        return self.out_proj(y * F.silu(z)), None


def make_mamba(config: mamba.MambaConfig, selective: tuple[str, ...]) -> mamba.Mamba:
    """A new model in which only these of delta, B and C depend on the input."""
    model = mamba.Mamba(config)
    for layer in model.backbone.layers if selective != SELECTIVE else ():
        layer.mixer = AblatedBlock(config, selective)
    return model.to(device())


def mean_sd(values: list[float]) -> dict:
    """Mean, sample standard deviation (0 for one value) and the values."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "sd": sd, "each": list(values)}


def markdown(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table in Markdown; columns after the first `left` are numbers, and stand to the right."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plus_minus(score: dict, digits: int) -> str:
    """Mean ± s.d. of what `mean_sd` gave."""
    return f"{score['mean']:.{digits}f} ± {score['sd']:.{digits}f}"


def device() -> torch.device:
    """Where a program computes: on CUDA if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def finish(name: str, asked, settings, began, content: dict, draw: Callable, script=mamba) -> dict:
    """Write NAME.json, and with matplotlib NAME.png by draw(result, pyplot, path).

    began is the clock's at the start; script is the module that the claim is about.
    """
    command = shlex.join(["python", f"tests/claims/{name}.py", *asked.argv])
    result = {"command": command, "seeds": asked.seeds, "settings": dataclasses.asdict(settings)}
    result |= content
    # Where other work halts a run now and then its processor time says more than the clock.
    result["wall_seconds"] = round(time.perf_counter() - began, 1)
    result["cpu_seconds"] = round(time.process_time(), 1)
    result["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    result["device"] = f"{device()}, {torch.get_num_threads()} threads"
    result["script_sha256"] = hashlib.sha256(Path(script.__file__).read_bytes()).hexdigest()
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
    """JSON, indented, but lists of numbers, and of such, on one line; floats of six digits."""

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
        parts = []
        for key, x in value.items():
            parts.append(f"{json.dumps(str(key), ensure_ascii=False)}: {compact(x, depth + 1)}")
        return "{" + ",".join(pad + part for part in parts) + pad[:-1] + "}"
    return "[" + ",".join(pad + compact(x, depth + 1) for x in value) + pad[:-1] + "]"
