"""The CUDA path of mamba.py on a real GPU: right against float64, and how fast; some minutes:

    python tests/gpu/check.py [--sweep] [--out DIR]

It needs torch, triton and numpy, prints tables, and writes OUT/result.json. The exit status is 1
where a result is wrong. Where the `mamba_ssm` package is installed its kernels run beside ours.
--sweep tries other tiles of the kernel. Without a GPU, `TRITON_INTERPRET=1 python
tests/gpu/check.py --quick` only proves that the program runs.
"""

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import os
import platform
import statistics
import sys
import time
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
try:
    importlib.import_module("tiktoken")
except ImportError:  # only tokenizers need it
    sys.modules["tiktoken"] = types.ModuleType("tiktoken")
import mamba
import transformer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
CASES = {  # (B, L, D, N), share of document starts, dtype, largest relative error
    "float32": ((2, 200, 96, 16), 0.02, torch.float32, 1e-5),
    "odd sizes": ((3, 67, 65, 5), 0.1, torch.float32, 1e-5),
    "one position": ((2, 1, 130, 16), 0.0, torch.float32, 1e-5),
    "one state": ((2, 40, 33, 1), 0.0, torch.float32, 1e-5),
    "many segments": ((1, 3001, 70, 16), 0.001, torch.float32, 1e-5),
    "bfloat16": ((2, 200, 96, 16), 0.02, torch.bfloat16, 2 * torch.finfo(torch.bfloat16).eps),
    "float16": ((2, 200, 96, 16), 0.02, torch.float16, 2 * torch.finfo(torch.float16).eps),
}


def draw(shape, starts: float, dtype: torch.dtype) -> dict:
    """Arguments of `selective_scan`; u, z, B and C are slices, as the model's are."""
    B, L, D, N = shape
    torch.manual_seed(0)
    u, z = torch.randn(B, L, 2 * D, device=DEVICE, dtype=dtype).chunk(2, dim=-1)
    Bs, Cs = torch.randn(B, L, 2 * N, device=DEVICE, dtype=dtype).chunk(2, dim=-1)
    x = {
        "u": u,
        "delta": torch.randn(B, L, D, device=DEVICE, dtype=dtype),
        "B": Bs,
        "C": Cs,
        "z": z,
    }
    x |= {"A": -torch.rand(D, N, device=DEVICE) * 4, "D": torch.randn(D, device=DEVICE)}
    x |= {
        "delta_bias": torch.randn(D, device=DEVICE) - 1,
        "initial_state": torch.randn(B, D, N, device=DEVICE),
    }
    return x | {"starts": torch.rand(B, L, device=DEVICE) < starts, "delta_softplus": True}


def recurrence(u, delta, A, B, C, D, z, delta_bias, initial_state, starts, delta_softplus):
    """The paper's recurrence, one position after another, in float64."""
    h, ys = initial_state, []
    for t in range(u.shape[1]):
        step = torch.logaddexp(delta[:, t] + delta_bias, torch.zeros_like(delta_bias))
        h = torch.where(starts[:, t, None, None], 0.0, h)
        h = torch.exp(step[..., None] * A) * h + (step * u[:, t])[..., None] * B[:, t, None]
        ys.append(((h * C[:, t, None]).sum(-1) + D * u[:, t]) * z[:, t] * torch.sigmoid(z[:, t]))
    return torch.stack(ys, 1), h


def differentiate(scan, x: dict, dtype: torch.dtype | None = None) -> dict:
    """y, the last state and every gradient."""
    leaves = {
        k: (v if dtype is None else v.to(dtype)).detach().requires_grad_()
        for k, v in x.items()
        if k in NAMES
    }
    outputs = scan(**x | leaves)
    torch.manual_seed(1)
    upstream = [torch.randn(o.shape, device=DEVICE).bfloat16().to(o.dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return dict(zip(("y", "state", *leaves), (*outputs, *grads), strict=True))


def check_scan() -> list[dict]:
    """The fused scan against the recurrence, and twice against itself."""
    scan, rows = (
        functools.partial(mamba.selective_scan, return_final_state=True, backend="fused"),
        [],
    )
    for name, (shape, starts, dtype, allowed) in CASES.items():
        x = draw(shape, starts, dtype)
        ours, again, truth = (
            differentiate(scan, x),
            differentiate(scan, x),
            differentiate(recurrence, x, torch.float64),
        )
        errors = {
            k: ((ours[k].double() - v).norm() / v.norm().clamp(min=1e-30)).item()
            for k, v in truth.items()
        }
        worst, same = max(errors, key=errors.get), all(torch.equal(ours[k], again[k]) for k in ours)
        right = errors[worst] <= allowed and same
        rows.append(
            {
                "case": name,
                "error": errors[worst],
                "of": worst,
                "allowed": allowed,
                "same twice": same,
            }
        )
        rows[-1]["right"] = right
        found = f"worst {errors[worst]:.1e} ({worst}), allowed {allowed:.0e}, same {same}"
        print(f"{name:16} {shape!s:20} {found}")
    return rows


def check_decoding() -> dict:
    """Logits by steps against those of the whole sequence."""
    torch.manual_seed(0)
    model = mamba.Mamba(mamba.MambaConfig(d_model=64, n_layer=2, vocab_size=99))
    model = model.to(DEVICE).requires_grad_(False)
    tokens = torch.randint(99, (3, 40), device=DEVICE)
    logits, (_, state) = model(tokens), model(tokens[:, :20], return_state=True)
    errors = []
    for t in range(20, 40):
        step, state = model.step(tokens[:, t], state)
        errors.append((step - logits[:, t]).norm().item())
    error = max(errors) / logits[:, 0].norm().item()
    print(f"decoding by steps: worst {error:.1e}, allowed 1e-4")
    return {"case": "decoding", "error": error, "allowed": 1e-4, "right": error <= 1e-4}


def seconds(run, repeats: int = 10) -> float:
    """Median of one call's seconds, after two to warm up; on a GPU by its own clock."""
    times = []
    for i in range(repeats + 2):
        if DEVICE.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            took = begin.elapsed_time(end) / 1e3
        else:
            began = time.perf_counter()
            run()
            took = time.perf_counter() - began
        times += [took] if i >= 2 else []
    return statistics.median(times)


def peak_bytes(run) -> int:
    """Memory that a call takes, its results included; 0 without a GPU."""
    if DEVICE.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def exponentials_a_second() -> float:
    """This GPU's rate, measured on a tensor that stays in registers."""
    triton = importlib.import_module("triton")
    global tl
    tl = importlib.import_module("triton.language")

    def many(x, N: tl.constexpr):
        at = tl.program_id(0) * 256 + tl.arange(0, 256)
        a, b = tl.load(x + at), tl.load(x + at) + 0.5
        for _ in range(N):
            a, b = tl.exp2(-a), tl.exp2(-b)
        tl.store(x + at, a + b)

    kernel, programs = triton.jit(many), 132 * 64
    x = torch.rand(programs * 256, device=DEVICE)
    return 2 * 2000 * len(x) / seconds(lambda: kernel[(programs,)](x, 2000, num_warps=8))


def floor(shape, dtype: torch.dtype, bandwidth: float, exponentials: float) -> dict:
    """The least seconds: of memory at `bandwidth`, or of B L D N exponentials at their rate."""
    B, L, D, N = shape
    size, rows, weights = dtype.itemsize, B * L * D, B * L * N
    least = {
        "forward": 4 * rows + 2 * weights,
        "backward": 7 * rows + 4 * weights,
    }  # u delta z y; and dy du ddelta dz
    return {k: max(size * n / bandwidth, rows * N / exponentials) for k, n in least.items()}


def time_scan(shape, args) -> dict:
    """Forward and backward of one shape by each implementation that is there, beside the floor."""
    x = draw(shape, 0, torch.bfloat16) | {"starts": None, "initial_state": None}
    leaves = {k: x[k].detach().requires_grad_() for k in NAMES if x[k] is not None}
    bound = floor(shape, torch.bfloat16, args.bandwidth * 1e12, args.exponentials)
    runs = {
        b: functools.partial(mamba.selective_scan, **x | leaves, backend=b)
        for b in ("fused", "chunked")
    }
    with contextlib.suppress(ImportError):  # (B, D, L) is the layout of the official kernels
        official = importlib.import_module(
            "mamba_ssm.ops.selective_scan_interface"
        ).selective_scan_fn
        turned = {
            k: v.detach().mT.contiguous().requires_grad_() for k, v in leaves.items() if v.ndim == 3
        }
        turned |= {k: leaves[k] for k in ("A", "D", "delta_bias")}
        runs["official CUDA"] = functools.partial(official, **turned, delta_softplus=True)
    table = {"shape": shape, "floor": bound}
    inputs = sum(v.numel() * v.element_size() for v in leaves.values())
    for name, run in runs.items():
        y = run()
        upstream = torch.randn_like(y)
        wanted = list((turned if name == "official CUDA" else leaves).values())
        back = functools.partial(torch.autograd.grad, y, wanted, upstream, retain_graph=True)
        row = {"forward": seconds(run), "backward": seconds(back)}
        row["peak"] = peak_bytes(
            lambda run=run, of=wanted, g=upstream: torch.autograd.grad(run(), of, g)
        )
        row["floors"] = {k: row[k] / bound[k] for k in bound}
        row["memory over inputs and outputs"] = row["peak"] / (
            2 * inputs + 2 * y.numel() * y.element_size()
        )
        table[name] = row
        times = "".join(
            f", {k} {1e3 * row[k]:8.3f} ms ({row['floors'][k]:.1f} floors)" for k in bound
        )
        print(f"{shape!s:22} {name:14}{times}, peak {row['peak'] / 2**20:.0f} MiB")
        del y
    return table


def sweep(shape) -> list[dict]:
    """The fused scan by other tiles and blocks, best first."""
    x, rows = draw(shape, 0, torch.bfloat16) | {"starts": None, "initial_state": None}, []
    leaves = {k: x[k].detach().requires_grad_() for k in NAMES if x[k] is not None}
    run = functools.partial(mamba.selective_scan, **x | leaves, backend="fused")
    kept = mamba.FusedScan.TILE, mamba.FusedScan.BLOCK
    for tile, block in itertools.product((32, 64, 128), (8, 16, 32)):
        mamba.FusedScan.TILE, mamba.FusedScan.BLOCK = tile, block
        y = run()
        of = [*leaves.values()], torch.ones_like(y)
        back = functools.partial(torch.autograd.grad, y, *of, retain_graph=True)
        rows.append({"tile": tile, "block": block})
        rows[-1] |= {"forward": seconds(run, 5), "backward": seconds(back, 5)}
    mamba.FusedScan.TILE, mamba.FusedScan.BLOCK = kept
    rows.sort(key=lambda row: row["forward"] + row["backward"])
    for row in rows:
        times = f"forward {1e3 * row['forward']:.3f} ms, backward {1e3 * row['backward']:.3f} ms"
        print(f"tile {row['tile']}, block {row['block']}: {times}")
    return rows


def models(quick: bool) -> dict:
    """Mamba-130M, or a tiny one, and a Transformer++ of its size."""
    if quick:
        ours, theirs = (
            mamba.MambaConfig(32, 2, 100),
            transformer.TransformerConfig(32, 2, 2, vocab_size=100),
        )
    else:
        ours = mamba.MambaConfig(768, 24, 50280)
        theirs = transformer.TransformerConfig(768, 12, 12, vocab_size=50277, tie_embeddings=True)
    return {
        "mamba.py": mamba.Mamba(ours).to(DEVICE),
        "transformer.py": transformer.Transformer(theirs).to(DEVICE),
    }


def time_models(args) -> dict:
    """Tokens a second of training at 8 x 2048 under bfloat16, and of writing by batch."""
    rows, (batch, length) = {}, (2, 16) if args.quick else (8, 2048)
    for name, model in models(args.quick).items():
        tokens = torch.randint(100, (batch, length + 1), device=DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), fused=DEVICE.type == "cuda")

        def train(model=model, optimizer=optimizer, tokens=tokens) -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = model(tokens[:, :-1], targets=tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        row = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "training": batch * length / seconds(train, 5),
        }
        model.to(torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
        new = 4 if args.quick else 128
        for rows_ in (1, 2) if args.quick else (1, 16, 128):
            prompt = torch.randint(100, (rows_, 8 if args.quick else 2048), device=DEVICE)
            both = [seconds(functools.partial(model.generate, prompt, n), 3) for n in (1, new + 1)]
            row[f"writing, batch {rows_}"] = (
                rows_ * new / (both[1] - both[0])
            )  # the prompt's time taken off
        rows[name] = row
        print(name, ", ".join(f"{k} {v:,.0f}" for k, v in row.items()))
        del model, optimizer
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--sweep", action="store_true", help="try other tile sizes of the kernels")
    parser.add_argument(
        "--bandwidth", type=float, default=4.3, help="memory, TB/s (an H200's copy: 4.3)"
    )
    parser.add_argument("--out", default="out/gpu", help="folder of result.json")
    args = parser.parse_args()
    if DEVICE.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error(
            "no CUDA device here; only a trial run is possible, by TRITON_INTERPRET=1 and --quick"
        )
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "Triton's interpreter"
    result = {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "argv": sys.argv[1:],
    }
    if args.quick:
        small = {"odd sizes": CASES["odd sizes"], "float16": CASES["float16"]}
        shrunk = {k: ((2, 9, 5, 3), *rest) for k, (_, *rest) in small.items()}
        CASES.clear(), CASES.update(shrunk)
    result["checks"] = [*check_scan(), check_decoding()]
    args.exponentials = exponentials_a_second() if DEVICE.type == "cuda" else 1e9
    result["exponentials a second"] = args.exponentials
    print(f"{name}: {args.exponentials / 1e12:.2f}e12 exponentials a second")
    shapes = [(1, 9, 5, 3)] if args.quick else [(8, 4096, 2048, 16), (1, 65536, 1024, 16)]
    result["scan"] = [time_scan(shape, args) for shape in shapes]
    if args.sweep:
        result["sweep"] = sweep(shapes[0])
    result["models"] = time_models(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    wrong = [row["case"] for row in result["checks"] if not row["right"]]
    print(f"WRONG: {', '.join(wrong)}" if wrong else "all right", f"({out / 'result.json'})")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
