"""Mamba beside Transformer++ at equal parameters: loss by tokens, time by length, text by context.

    python tests/bench/versus.py                     # an hour on two cores, most of it the loss
    python tests/bench/versus.py --parts time text   # the others stay as the result file has them
    python tests/bench/versus.py --out tests/bench/results

Writes OUT/versus.json and OUT/versus.png. One process, float32; both train by mamba.py's recipe on
the same data in the same order. A Transformer of n layers stands beside a Mamba of 2 n blocks of
the same width, as in the paper, its MLP widened until the parameters are equal. Each one's rate
is chosen among three on seed 0 at the smaller size, a run not reported.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import _common  # first: torch's threads read what it sets
from _common import interleave, median, number, table

# isort: split
import torch
from torch import nn

import mamba
import transformer

LOSS = {"widths": (96, 192), "batch": 8, "steps": 360, "every": 60, "seeds": (1, 2, 3)}
LOSS["rates"] = (1e-3, 2e-3, 4e-3)
TIME = {"width": 256, "tokens": 16_384, "lengths": (256, 512, 1024, 2048, 4096, 8192, 16_384)}
TEXT = {"width": 256, "contexts": (128, 512, 2048, 8192, 32_768), "batches": (1, 16), "new": 32}
QUICK_LOSS = {"widths": (16,), "batch": 2, "steps": 4, "every": 2, "seeds": (1, 2)}
QUICK_LOSS["rates"] = (1e-3,)
QUICK_TIME = {"width": 16, "tokens": 512, "lengths": (64, 256)}
QUICK_TEXT = {"width": 16, "contexts": (16, 64), "batches": (1, 2), "new": 4}
NAMES = {"mamba": "Mamba", "transformer": "Transformer++"}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def make(script: str, width: int, vocab: int = 4096) -> nn.Module:
    """A Mamba of that width and 4 blocks, or a Transformer of 2 layers that is as large."""
    ours = mamba.Mamba(mamba.MambaConfig(width, 4, vocab))
    if script == "mamba":
        return ours
    sizes = {"d_model": width, "n_layer": 2, "n_head": max(1, width // 32), "vocab_size": vocab}

    def widened(d_ff: int) -> nn.Module:
        return transformer.Transformer(transformer.TransformerConfig(**sizes, d_ff=d_ff))

    missing = parameters(ours) - parameters(widened(1))
    return widened(1 + round(missing / (2 * 3 * width)))  # three matrices in each of two layers


# ----- 1. Validation loss against tokens


def train(script: str, corpus, settings: dict, width: int, lr: float, seed: int = 0) -> list:
    """Train once: tokens seen and validation bits a byte, every so often."""
    config = {"steps": settings["steps"], "batch": settings["batch"], "lr": lr, "seed": seed}
    config, curve = mamba.Config(**config, length=256), []
    torch.manual_seed(seed)
    model = make(script, width, corpus.vocab_size)
    optimizer = mamba.make_optimizer(model, config)
    for step in range(config.steps):
        mamba.train_step(model, optimizer, corpus, config, step)
        if (step + 1) % settings["every"] == 0:
            limit = 20_000 if step + 1 < config.steps else 0
            bits = mamba.evaluate(model, corpus, config, limit)["bits_a_byte"]
            curve.append(((step + 1) * config.batch * config.length, bits))
    return curve


def measure_loss(settings: dict) -> list[dict]:
    """Curves of both at each width, over the seeds, at the rate that was best on seed 0."""
    corpus, rows = mamba.load_corpus("", "bpe:1024"), []
    for script in NAMES:
        first, tried = settings["widths"][0], {}
        for lr in settings["rates"]:
            tried[lr] = train(script, corpus, settings, first, lr)[-1][1]
        best = min(tried, key=tried.get)
        text = ", ".join(f"{bits:.3f} at {lr:g}" for lr, bits in tried.items())
        print(f"{NAMES[script]}: {text}", flush=True)
        for width in settings["widths"]:
            curves = [train(script, corpus, settings, width, best, k) for k in settings["seeds"]]
            ends = [curve[-1][1] for curve in curves]
            row = {"script": script, "sizes": {"d_model": width}, "seeds": settings["seeds"]}
            row |= {"lr": best, "tried_on_seed_0": tried}
            row["parameters"] = parameters(make(script, width, corpus.vocab_size))
            row |= {"bits_a_byte": statistics.mean(ends), "sd": statistics.stdev(ends)}
            rows.append(row | {"curves": curves})
            score = f"{row['bits_a_byte']:.3f} ± {row['sd']:.3f}"
            print(f"{NAMES[script]} {row['parameters']:,}: {score}", flush=True)
    return rows


# ----- 2. Time of a training pass against length, at equal tokens


def training_pass(model: nn.Module, batch: int, length: int) -> Callable[[], None]:
    tokens = torch.randint(0, 4096, (batch, length + 1))

    def run() -> None:
        model(tokens[:, :-1], targets=tokens[:, 1:]).backward()
        model.zero_grad()

    return run


def measure_time(settings: dict, rounds: int) -> dict:
    """Microseconds a token, forward and backward, by length; from where on Mamba is faster."""
    models, rows = {script: make(script, settings["width"]) for script in NAMES}, []
    first = None
    for length in settings["lengths"]:
        batch = settings["tokens"] // length
        runs = {script: training_pass(model, batch, length) for script, model in models.items()}
        seconds = interleave(runs, rounds, budget=60.0)
        micro = {k: median(times) / settings["tokens"] * 1e6 for k, times in seconds.items()}
        rows.append({"length": length, "batch": batch, "microseconds_a_token": micro})
        rows[-1]["seconds"] = seconds
        text = ", ".join(f"{NAMES[k]} {number(v)} µs a token" for k, v in micro.items())
        print(f"L {length:,}: {text}", flush=True)
        first = (first or length) if micro["mamba"] < micro["transformer"] else None
    print(f"Mamba is faster from length {first} on (None: at none of these)")
    sizes = {k: parameters(m) for k, m in models.items()}
    return {"rows": rows, "crossing": first, "parameters": sizes}


# ----- 3. Generation against context


def writer(script: str, model, batch: int, context: int, new: int) -> tuple[Callable, int]:
    """A call that writes `new` tokens after `context` others, and the bytes that it keeps of these.

    What the state or the cache holds does not matter to the time: it is not computed but set.
    """
    token = torch.randint(0, 4096, (batch, 1))
    if script == "mamba":
        first = model.hidden(token)[1]

        def run() -> None:
            state = first
            for _ in range(new):
                _, state = model.step(token[:, 0], state)

        return run, sum(x.nbytes for layer in first for x in layer)
    cache = model.init_cache(batch, context + new)
    for tensor in cache.layers:
        tensor.normal_()

    def run() -> None:
        cache.length = context
        for _ in range(new):
            model(token, cache)

    kept = sum(x.nbytes for x in cache.layers)
    return run, kept * context // (context + new)


@torch.inference_mode()
def measure_text(settings: dict, rounds: int) -> list[dict]:
    """Tokens a second, all rows together, and bytes of state or cache."""
    models, rows = {script: make(script, settings["width"]).eval() for script in NAMES}, []
    for batch in settings["batches"]:
        for context in settings["contexts"]:
            new, made, kept = settings["new"], {}, {}
            for k, model in models.items():
                made[k], kept[k] = writer(k, model, batch, context, new)
            seconds = interleave(made, rounds, budget=30.0)
            rate = {k: batch * new / median(times) for k, times in seconds.items()}
            row = {"batch": batch, "context": context, "tokens_a_second": rate, "bytes": kept}
            rows.append(row | {"seconds": seconds})
            text = [f"{k} {number(rate[k])} tokens/s {number(kept[k] / 1e6)} MB" for k in NAMES]
            print(f"batch {batch}, context {context:,}: {', '.join(text)}", flush=True)
    return rows


# ----- The sheet


STYLES = {"mamba": {"color": "C0", "ls": "-", "marker": "o"}}
STYLES["transformer"] = {"color": "C1", "ls": "--", "marker": "s"}


def draw(parts: dict, path: Path) -> None:
    """Four pictures: loss by tokens, time by length, tokens a second and memory by context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, ((loss, time), (speed, memory)) = plt.subplots(
        2, 2, figsize=(10, 7.6), layout="constrained"
    )
    for row in parts.get("loss", []):
        tokens = [count / 1000 for count, _ in row["curves"][0]]
        bits = [[curve[i][1] for curve in row["curves"]] for i in range(len(tokens))]
        smaller = row["sizes"]["d_model"] == min(r["sizes"]["d_model"] for r in parts["loss"])
        style = STYLES[row["script"]] | ({"mfc": "white"} if smaller else {})
        loss.plot(tokens, [statistics.mean(b) for b in bits], **style)
        band = [min(b) for b in bits], [max(b) for b in bits]
        loss.fill_between(tokens, *band, color=style["color"], alpha=0.2, lw=0)
    loss.set(xlabel="thousand tokens", ylabel="validation bits a byte")
    loss.set_title("Loss, mean and range over the seeds")
    for script in NAMES:
        rows = parts.get("time", {}).get("rows", [])
        micro = [row["microseconds_a_token"][script] for row in rows]
        time.plot([row["length"] for row in rows], micro, **STYLES[script])
        for row in parts.get("text", []):
            style = STYLES[script] | ({"mfc": "white"} if row["batch"] == 1 else {})
            rows = [other for other in parts["text"] if other["batch"] == row["batch"]]
            contexts = [other["context"] for other in rows]
            speed.plot(contexts, [other["tokens_a_second"][script] for other in rows], **style)
            memory.plot(contexts, [other["bytes"][script] / 1e6 for other in rows], **style)
    time.set(xlabel="length", ylabel="µs a token", title="Forward and backward, equal tokens")
    speed.set(xlabel="context", ylabel="tokens a second", title="Writing")
    memory.set(xlabel="context", ylabel="MB", title="State or cache")
    for axes in (time, speed, memory):
        axes.set(xscale="log", yscale="log")
        ticks = sorted({x for line in axes.lines for x in line.get_xdata()})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.minorticks_off()
    for script, name in NAMES.items():
        loss.plot([], [], label=f"{name}: larger model, or batch 16", **STYLES[script])
        loss.plot([], [], mfc="white", label=f"{name}: smaller, or batch 1", **STYLES[script])
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def tables(parts: dict) -> str:
    """The README's tables."""
    texts = []
    if loss := parts.get("loss"):
        rows = [["model", "parameters", "peak rate", "validation bits a byte"]]
        for row in loss:
            score = f"{row['bits_a_byte']:.3f} ± {row['sd']:.3f}"
            rows.append([NAMES[row["script"]], f"{row['parameters']:,}", f"{row['lr']:g}", score])
        texts.append(table(rows))
    if time := parts.get("time"):
        head = [f"{name}, µs a token" for name in NAMES.values()]
        rows = [["length", *head, "Transformer++ / Mamba"]]
        for row in time["rows"]:
            micro = row["microseconds_a_token"]
            rows.append([f"{row['length']:,}", *(number(micro[k]) for k in NAMES)])
            rows[-1].append(number(micro["transformer"] / micro["mamba"]))
        texts.append(table(rows))
    if text := parts.get("text"):
        head = [f"{name}, {unit}" for unit in ("tokens/s", "MB") for name in NAMES.values()]
        rows = [["batch, context", *head]]
        for row in text:
            rates, sizes = ([row[key][k] for k in NAMES] for key in ("tokens_a_second", "bytes"))
            numbers = [*map(number, rates), *(number(size / 1e6) for size in sizes)]
            rows.append([f"{row['batch']}, {row['context']:,}", *numbers])
        texts.append(table(rows))
    return "\n\n".join(texts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    _common.add_common_flags(parser)
    names = ("loss", "time", "text")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="what to measure")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each; the median counts")
    args = parser.parse_args(argv)
    _common.prepare(args)
    path, parts = Path(args.out) / "versus.json", {}
    if path.exists() and not args.quick:
        parts = json.loads(path.read_text("utf-8"))["parts"]
    rounds = 2 if args.quick else args.rounds
    measures = {
        "loss": lambda: measure_loss(QUICK_LOSS if args.quick else LOSS),
        "time": lambda: measure_time(QUICK_TIME if args.quick else TIME, rounds),
        "text": lambda: measure_text(QUICK_TEXT if args.quick else TEXT, rounds),
    }
    for name in names:
        if name in args.parts:
            parts[name] = measures[name]()
            _common.write_result(args, "versus", parts=parts)
    draw(parts, path.with_suffix(".png"))
    print(tables(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
