"""The CUDA path of mamba.py on a real GPU: right against float64, and how fast; some minutes:

    python tests/gpu/check.py [--out DIR]

It needs torch, triton and numpy, prints what it finds, and writes OUT/result.json. The exit status
is 1 where a result is wrong. Where the `mamba_ssm` package is installed its kernels run beside
ours. Without a GPU, `TRITON_INTERPRET=1 python tests/gpu/check.py --quick` only proves that the
program runs.
"""

import argparse
import functools
import importlib
import importlib.util
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
if importlib.util.find_spec("tiktoken") is None:  # only tokenizers need it
    sys.modules["tiktoken"] = types.ModuleType("tiktoken")
import mamba
import transformer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LEAVES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
BF16, F16 = torch.bfloat16, torch.float16
CASES = {  # (B, L, D, N), share of document starts, dtype, largest relative error
    "float32": ((2, 200, 96, 16), 0.02, torch.float32, 1e-5),
    "odd sizes": ((3, 67, 65, 5), 0.1, torch.float32, 1e-5),
    "one position": ((2, 1, 130, 16), 0.0, torch.float32, 1e-5),
    "one state": ((2, 40, 33, 1), 0.0, torch.float32, 1e-5),
    "many segments": ((1, 3001, 70, 16), 0.001, torch.float32, 1e-5),
    "bfloat16": ((2, 200, 96, 16), 0.02, BF16, 2 * torch.finfo(BF16).eps),
    "float16": ((2, 200, 96, 16), 0.02, F16, 2 * torch.finfo(F16).eps),
}
QUICK_CASES = {name: ((2, 9, 5, 3), *CASES[name][1:]) for name in ("odd sizes", "float16")}


# ----- Right?


def draw(shape, starts: float, dtype: torch.dtype) -> dict:
    """Arguments of `selective_scan`; u, z, B and C are slices, as the model's are."""
    B, L, D, N = shape
    torch.manual_seed(0)
    normal = functools.partial(torch.randn, device=DEVICE)
    x = dict(zip(("u", "z"), normal(B, L, 2 * D, dtype=dtype).chunk(2, dim=-1), strict=True))
    x |= dict(zip(("B", "C"), normal(B, L, 2 * N, dtype=dtype).chunk(2, dim=-1), strict=True))
    x |= {"delta": normal(B, L, D, dtype=dtype), "delta_bias": normal(D) - 1}
    x |= {"A": -4 * torch.rand(D, N, device=DEVICE), "D": normal(D)}
    x["initial_state"] = normal(B, D, N)
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
    leaves = {name: x[name].to(dtype or x[name].dtype).detach() for name in LEAVES}
    outputs = scan(**x | {name: leaf.requires_grad_() for name, leaf in leaves.items()})
    torch.manual_seed(1)
    upstream = [torch.randn(o.shape, device=DEVICE).bfloat16().to(o.dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return dict(zip(("y", "state", *leaves), (*outputs, *grads), strict=True))


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def scan_errors(shape, starts: float, dtype: torch.dtype) -> dict[str, float]:
    """Of the fused scan against the recurrence; infinite where two runs differ."""
    scan = functools.partial(mamba.selective_scan, return_final_state=True, backend="fused")
    x = draw(shape, starts, dtype)
    ours, again = differentiate(scan, x), differentiate(scan, x)
    truth = differentiate(recurrence, x, torch.float64)
    errors = {name: relative(ours[name], truth[name]) for name in truth}
    errors["twice"] = 0.0 if all(torch.equal(ours[k], again[k]) for k in ours) else float("inf")
    return errors


def decoding_errors() -> dict[str, float]:
    """Of logits by steps against those of the whole sequence."""
    torch.manual_seed(0)
    model = mamba.Mamba(mamba.MambaConfig(d_model=64, n_layer=2, vocab_size=99)).to(DEVICE)
    tokens, errors = torch.randint(99, (3, 40), device=DEVICE), {}
    with torch.no_grad():
        logits, (_, state) = model(tokens), model(tokens[:, :20], return_state=True)
        for t in range(20, 40):
            step, state = model.step(tokens[:, t], state)
            errors[f"position {t}"] = relative(step, logits[:, t].double())
    return errors


def check(cases: dict) -> list[dict]:
    """A row for each check: its largest error, and whether that is allowed."""
    found = {name: (scan_errors(*case), allowed) for name, (*case, allowed) in cases.items()}
    found["decoding"] = decoding_errors(), 1e-4
    rows = []
    for name, (errors, allowed) in found.items():
        worst = max(errors, key=errors.get)
        row = {"case": name, "error": errors[worst], "of": worst, "allowed": allowed}
        rows.append(row | {"right": errors[worst] <= allowed})
        print(f"{name}: worst {errors[worst]:.1e} ({worst}), allowed {allowed:.0e}", flush=True)
    return rows


# ----- Fast?


def clock() -> float:
    """Seconds, when the GPU has done all that it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(run, repeats: int = 10) -> float:
    """Median of one call's seconds, after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        began = clock()
        run()
        times.append(clock() - began)
    return statistics.median(times[2:])


def time_scan(shape) -> dict:
    """Seconds forward and backward of each implementation that is there, and the memory's floor."""
    B, L, D, N = shape
    x = draw(shape, 0, BF16) | {"starts": None, "initial_state": None}
    leaves = {name: x[name].detach().requires_grad_() for name in LEAVES if x[name] is not None}
    runs = {}
    for name in ("fused", "chunked"):
        scan = functools.partial(mamba.selective_scan, **x | leaves, backend=name)
        runs[name] = scan, list(leaves.values())
    if importlib.util.find_spec("mamba_ssm"):
        official = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        turned = dict(leaves)  # their layout is (B, D, L)
        for name in ("u", "delta", "B", "C", "z"):
            turned[name] = leaves[name].detach().mT.contiguous().requires_grad_()
        scan = functools.partial(official.selective_scan_fn, **turned, delta_softplus=True)
        runs["official CUDA"] = scan, list(turned.values())
    copied = torch.ones(2**28 if DEVICE.type == "cuda" else 2**20, device=DEVICE)
    rate = 2 * copied.nbytes / seconds(copied.clone)
    wide, narrow = BF16.itemsize * B * L * D / rate, BF16.itemsize * B * L * N / rate
    # Forward reads u, delta, z, B, C and writes y; backward reads dy for y, and writes gradients.
    table = {"shape": shape, "bytes_a_second": rate}
    table["floor"] = {"forward": 4 * wide + 2 * narrow, "backward": 7 * wide + 4 * narrow}
    for name, (scan, of) in runs.items():
        y = scan()
        back = functools.partial(torch.autograd.grad, y, of, torch.ones_like(y), retain_graph=True)
        table[name] = {"forward": seconds(scan), "backward": seconds(back)}
        print(shape, name, table[name], "floor", table["floor"], flush=True)
    return table


def time_models(models: dict, batch: int, length: int, new: int, prompts: tuple) -> dict:
    """Tokens a second of training under bfloat16, and of writing after so many prompts at a time."""
    rows = {}
    for name, model in models.items():
        model.to(DEVICE)
        tokens = torch.randint(100, (batch, length + 1), device=DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), fused=DEVICE.type == "cuda")

        def train(model=model, optimizer=optimizer, tokens=tokens) -> None:
            with torch.autocast(DEVICE.type, BF16):
                loss = model(tokens[:, :-1], targets=tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        rows[name] = {"training": batch * length / seconds(train, 5)}
        model.to(BF16 if DEVICE.type == "cuda" else torch.float32)
        for count in prompts:
            prompt = torch.randint(100, (count, length), device=DEVICE)
            one, all_ = (seconds(lambda n=n: model.generate(prompt, n), 3) for n in (1, new + 1))
            rows[name][f"writing, batch {count}"] = count * new / (all_ - one)
        print(name, rows[name], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--out", type=Path, default="out/gpu", help="folder of result.json")
    args = parser.parse_args()
    name, cases, shapes = "Triton's interpreter", QUICK_CASES, [(1, 9, 5, 3)]
    ours, theirs = mamba.MambaConfig(32, 2, 100), transformer.TransformerConfig(32, 2, 2, d_ff=64)
    sizes = 2, 8, 4, (1, 2)
    if not args.quick:
        cases, shapes = CASES, [(8, 4096, 2048, 16), (1, 65536, 1024, 16)]
        ours, theirs, sizes = (
            mamba.MambaConfig(),
            transformer.TransformerConfig(),
            (8, 2048, 128, (1, 16, 128)),
        )
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    elif os.environ.get("TRITON_INTERPRET") != "1" or not args.quick:
        parser.error("CUDA is not available; only TRITON_INTERPRET=1 with --quick runs without")
    models = {"mamba.py": mamba.Mamba(ours), "transformer.py": transformer.Transformer(theirs)}
    result = {"device": name, "torch": torch.__version__, "python": platform.python_version()}
    result["checks"] = check(cases)
    result["scan"] = [time_scan(shape) for shape in shapes]
    result["models"] = time_models(models, *sizes)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    wrong = [row["case"] for row in result["checks"] if not row["right"]]
    print(f"WRONG: {', '.join(wrong)}" if wrong else "all right", args.out / "result.json")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
