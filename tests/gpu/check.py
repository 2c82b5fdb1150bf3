"""The CUDA path of mamba.py on a real GPU: right against float64, and how fast; some minutes:

    python tests/gpu/check.py [--out DIR]

It needs torch, triton and numpy, prints what it finds, and writes OUT/result.json. The exit status
is 1 where a result is wrong. Where the `mamba_ssm` package is installed its kernels run beside
ours. Without a GPU, `TRITON_INTERPRET=1 python tests/gpu/check.py --quick` only proves that the
program runs.
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import sys
import time
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.modules["tiktoken"] = types.ModuleType("tiktoken")  # only tokenizers need it
import mamba  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LEAVES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
BF16, F16 = torch.bfloat16, torch.float16
CASES = {  # (B, L, D, N), share of document starts, dtype, largest relative error
    "float32": ((2, 200, 96, 16), 0.02, torch.float32, 1e-5),
    "odd sizes": ((3, 67, 65, 5), 0.1, torch.float32, 1e-5),
    "one position": ((2, 1, 130, 16), 0.0, torch.float32, 1e-5),
    "many segments": ((1, 3001, 70, 16), 0.001, torch.float32, 1e-5),
    "bfloat16": ((2, 200, 96, 16), 0.02, BF16, 2 * torch.finfo(BF16).eps),
    "float16": ((2, 200, 96, 16), 0.02, F16, 2 * torch.finfo(F16).eps),
}
QUICK_CASES = {name: ((2, 9, 5, 3), *CASES[name][1:]) for name in ("odd sizes", "float16")}


def draw(shape, starts: float, dtype: torch.dtype) -> dict:
    """Arguments of `selective_scan`; u, z, B and C are slices, as the model's are."""
    B, L, D, N = shape
    torch.manual_seed(0)
    normal = functools.partial(torch.randn, device=DEVICE)
    wide, narrow = normal(B, L, 2 * D, dtype=dtype), normal(B, L, 2 * N, dtype=dtype)
    x = {"u": wide[..., :D], "z": wide[..., D:], "B": narrow[..., :N], "C": narrow[..., N:]}
    x |= {"delta": normal(B, L, D, dtype=dtype), "delta_bias": normal(D) - 1, "D": normal(D)}
    x |= {"A": -4 * torch.rand(D, N, device=DEVICE), "initial_state": normal(B, D, N)}
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


def scan_outputs(shape, starts: float, dtype: torch.dtype) -> tuple[dict, dict]:
    """Of the fused scan, and of the recurrence in float64."""
    scan = functools.partial(mamba.selective_scan, return_final_state=True, backend="fused")
    x = draw(shape, starts, dtype)
    return differentiate(scan, x), differentiate(recurrence, x, torch.float64)


@torch.no_grad()
def decoding_outputs() -> tuple[dict, dict]:
    """Logits by steps, and of the whole sequence."""
    torch.manual_seed(0)
    model = mamba.Mamba(mamba.MambaConfig(d_model=64, n_layer=2, vocab_size=99)).to(DEVICE)
    tokens, steps = torch.randint(99, (3, 40), device=DEVICE), {}
    logits, (_, state) = model(tokens), model(tokens[:, :20], return_state=True)
    for t in range(20, 40):
        steps[t], state = model.step(tokens[:, t], state)
    return steps, {t: logits[:, t] for t in steps}


def check(cases: dict) -> list[dict]:
    """A row for each check: its largest relative error, and whether two runs are equal."""
    runs = {"decoding": (decoding_outputs, 1e-4)}
    for name, (*case, allowed) in cases.items():
        runs[name] = functools.partial(scan_outputs, *case), allowed
    rows = []
    for name, (run, allowed) in runs.items():
        (ours, truth), (again, _), errors = run(), run(), {}
        for k, x in truth.items():
            errors[k] = ((ours[k].double() - x).norm() / x.norm().clamp(min=1e-30)).item()
        worst, same = max(errors, key=errors.get), all(torch.equal(ours[k], again[k]) for k in ours)
        row = {"case": name, "error": errors[worst], "of": worst, "same twice": same}
        rows.append(row | {"right": same and errors[worst] <= allowed})
        print(rows[-1], flush=True)
    return rows


def seconds(run, repeats: int = 10) -> float:
    """Median of one call's seconds, after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
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
    memory = torch.ones(2**26, device=DEVICE)
    rate = 2 * memory.nbytes / seconds(memory.clone)
    wide, narrow = BF16.itemsize * B * L * D / rate, BF16.itemsize * B * L * N / rate
    # Forward reads u, delta, z, B, C and writes y; backward reads dy for y, and writes gradients.
    floor = {"forward": 4 * wide + 2 * narrow, "backward": 7 * wide + 4 * narrow}
    table = {"shape": shape, "floor": floor}
    for name, (scan, of) in runs.items():
        y = scan()
        back = functools.partial(torch.autograd.grad, y, of, torch.ones_like(y), retain_graph=True)
        table[name] = {"forward": seconds(scan), "backward": seconds(back)}
    print(table, flush=True)
    return table


def time_model(config, batch: int, length: int, new: int, prompts: tuple) -> dict:
    """Tokens a second: training under bfloat16, and writing, so many prompts at a time."""
    model = mamba.Mamba(config).to(DEVICE)
    tokens = torch.randint(100, (batch, length + 1), device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=DEVICE.type == "cuda")

    def train() -> None:
        with torch.autocast(DEVICE.type, BF16):
            loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    row = {"training": batch * length / seconds(train, 5)}
    model.to(BF16 if DEVICE.type == "cuda" else torch.float32)
    for count in prompts:
        prompt = torch.randint(100, (count, length), device=DEVICE)
        first = seconds(functools.partial(model.generate, prompt, 1), 3)  # mostly the prompt's time
        took = seconds(functools.partial(model.generate, prompt, new + 1), 3) - first
        row[f"writing, batch {count}"] = count * new / took
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--out", type=Path, default="out/gpu", help="folder of result.json")
    args = parser.parse_args()
    cases, shapes = CASES, [(8, 4096, 2048, 16), (1, 65536, 1024, 16)]
    model = mamba.MambaConfig(), 8, 2048, 128, (1, 16, 128)
    if args.quick:
        cases, shapes = QUICK_CASES, [(1, 9, 5, 3)]
        model = mamba.MambaConfig(32, 2, 100), 2, 8, 4, (1, 2)
    if DEVICE.type != "cuda" and not (args.quick and os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("CUDA is not available; only TRITON_INTERPRET=1 with --quick runs without")
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "Triton's interpreter"
    result = {"device": name, "torch": torch.__version__, "checks": check(cases)}
    result["scan"] = [time_scan(shape) for shape in shapes]
    result["models"] = {"mamba.py": time_model(*model)}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    wrong = [row["case"] for row in result["checks"] if not row["right"]]
    print(result["models"], "wrong:", wrong, args.out / "result.json")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
