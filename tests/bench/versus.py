"""Mamba beside Transformer++ at equal parameters, on one sheet: loss by tokens, time by length, text by context.

    python tests/bench/versus.py                       # all three, about an hour on two cores, most of it the loss
    python tests/bench/versus.py --parts time text   # some of them; the others stay as the result file has them
    python tests/bench/versus.py --out tests/bench/results

Writes OUT/versus.json and OUT/versus.png. One process, float32, the same data in the same order for both. A Transformer
of n layers stands beside a Mamba of 2 n blocks of the same width, as in the paper, its MLP widened until the parameters
are equal. Each architecture's learning rate is chosen among three on seed 0 at the smaller size, a run not reported.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _common import add_common_flags, interleave, median, number, prepare, table, write_result
from torch import nn

import mamba
import transformer

LOSS = {"widths": (96, 192), "batch": 8, "steps": 360, "every": 60, "seeds": (1, 2, 3), "rates": (1e-3, 2e-3, 4e-3)}
TIME = {"width": 256, "tokens": 16_384, "lengths": (256, 512, 1024, 2048, 4096, 8192, 16_384)}
TEXT = {"width": 256, "contexts": (128, 512, 2048, 8192, 32_768), "batches": (1, 16), "new": 32}
QUICK_LOSS = {"widths": (16,), "batch": 2, "steps": 4, "every": 2, "seeds": (1, 2), "rates": (1e-3,)}
QUICK_TIME = {"width": 16, "tokens": 512, "lengths": (64, 256)}
QUICK_TEXT = {"width": 16, "contexts": (16, 64), "batches": (1, 2), "new": 4}
NAMES = {"mamba": "Mamba", "transformer": "Transformer++"}


def flags(script: str, width: int, vocab: int) -> dict:
    """The flags that give a model of that width: 4 blocks of Mamba, or 2 layers of a Transformer as large."""
    if script == "mamba":
        return {"d_model": width, "n_layer": 4}
    sizes = {"d_model": width, "n_layer": 2, "n_head": max(1, width // 32)}
    plain = transformer.make_model(transformer.Config(**sizes, d_ff=1), vocab)
    missing = parameters(mamba.make_model(mamba.Config(d_model=width, n_layer=4), vocab)) - parameters(plain)
    return sizes | {"d_ff": 1 + round(missing / (2 * 3 * width))}  # three matrices in each of two layers


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def make(script: str, width: int, vocab: int = 4096) -> nn.Module:
    module = {"mamba": mamba, "transformer": transformer}[script]
    return module.make_model(module.Config(**flags(script, width, vocab)), vocab)


# ----- 1. Validation loss against tokens


def train(script: str, corpus, settings: dict, **changes) -> list[tuple[int, float]]:
    """Train once by the script's own recipe: tokens seen and validation bits a byte, every so often."""
    module = {"mamba": mamba, "transformer": transformer}[script]
    config = module.Config(steps=settings["steps"], batch=settings["batch"], length=256, **changes)
    run, curve = module.Run(config, corpus, torch.device("cpu")), []
    while run.step < config.steps:
        run.train_step()
        if run.step % settings["every"] == 0:
            bits = module.evaluate(run.model, corpus, config, 20_000 if run.step < config.steps else 0)["bits_a_byte"]
            curve.append((run.step * config.batch * config.length, bits))
    return curve


def measure_loss(settings: dict) -> list[dict]:
    """Curves of both scripts at each width, over the seeds, at the rate that was best on seed 0 at the first width."""
    mamba.keep_memory()
    corpus, rows = mamba.load_corpus("", "bpe:1024"), []
    for script in NAMES:
        sizes = flags(script, settings["widths"][0], corpus.vocab_size)
        tried = {lr: train(script, corpus, settings, **sizes, lr=lr)[-1][1] for lr in settings["rates"]}
        best = min(tried, key=tried.get)
        print(f"{NAMES[script]}: " + ", ".join(f"{v:.3f} at {lr:g}" for lr, v in tried.items()), flush=True)
        for width in settings["widths"]:
            sizes = flags(script, width, corpus.vocab_size)
            curves = [train(script, corpus, settings, **sizes, lr=best, seed=seed) for seed in settings["seeds"]]
            ends = [curve[-1][1] for curve in curves]
            row = {"script": script, "sizes": sizes, "seeds": settings["seeds"], "lr": best, "tried_on_seed_0": tried}
            row["parameters"] = parameters(make(script, width, corpus.vocab_size))
            row |= {"bits_a_byte": statistics.mean(ends), "sd": statistics.stdev(ends), "curves": curves}
            rows.append(row)
            print(f"{NAMES[script]} {row['parameters']:,}: {row['bits_a_byte']:.3f} ± {row['sd']:.3f}", flush=True)
    return rows


# ----- 2. Time of a training pass against length, at equal tokens


def training_pass(model: nn.Module, batch: int, length: int) -> Callable[[], None]:
    tokens = torch.randint(0, 4096, (batch, length + 1))

    def run() -> None:
        model(tokens[:, :-1], targets=tokens[:, 1:]).backward()
        model.zero_grad()

    return run


def measure_time(settings: dict, rounds: int) -> dict:
    """Microseconds a token, forward and backward, at each length; the first length from which Mamba is faster."""
    models, rows = {script: make(script, settings["width"]) for script in NAMES}, []
    for length in settings["lengths"]:
        batch = settings["tokens"] // length
        runs = {script: training_pass(model, batch, length) for script, model in models.items()}
        seconds = interleave(runs, rounds, budget=60.0)
        micro = {script: median(times) / settings["tokens"] * 1e6 for script, times in seconds.items()}
        rows.append({"length": length, "batch": batch, "microseconds_a_token": micro, "seconds": seconds})
        print(f"L {length:,}: " + ", ".join(f"{NAMES[k]} {number(v)} µs a token" for k, v in micro.items()), flush=True)
    faster = [row["microseconds_a_token"]["mamba"] < row["microseconds_a_token"]["transformer"] for row in rows]
    slower = [row["length"] for row, mamba_wins in zip(rows, faster, strict=True) if not mamba_wins]
    first = next((row["length"] for row in rows if row["length"] > max(slower, default=0)), None)
    print(f"Mamba is faster from length {first:,} on" if first else "Mamba is not faster at any of these lengths")
    return {"rows": rows, "crossing": first, "parameters": {k: parameters(m) for k, m in models.items()}}


# ----- 3. Generation against context


def writer(script: str, model: nn.Module, batch: int, context: int, new: int) -> tuple[Callable[[], None], int]:
    """A call that writes `new` tokens after `context` others, and the bytes that it keeps of these.

    What the state or the cache holds does not matter to the time: it is not computed but set.
    """
    token = torch.randint(0, 4096, (batch,))
    if script == "mamba":
        state = model.init_state(batch)
        step = model.stepper(state)

        def run() -> None:
            for _ in range(new):
                step(token)

        return run, sum(x.nbytes for layer in state for x in layer)
    cache = model.init_cache(batch, context + new)
    for tensor in cache.layers:
        tensor.normal_()
    step = model.stepper(cache)

    def run() -> None:
        cache.length = context
        for _ in range(new):
            step(token)

    kept = sum(x.nbytes for x in cache.layers)
    return run, kept * context // (context + new)


@torch.inference_mode()
def measure_text(settings: dict, rounds: int) -> list[dict]:
    """Tokens a second, all rows together, and bytes of state or cache."""
    models, rows = {script: make(script, settings["width"]).eval() for script in NAMES}, []
    for batch in settings["batches"]:
        for context in settings["contexts"]:
            made = {k: writer(k, model, batch, context, settings["new"]) for k, model in models.items()}
            seconds = interleave({k: run for k, (run, _) in made.items()}, rounds, budget=30.0)
            rate = {k: batch * settings["new"] / median(times) for k, times in seconds.items()}
            kept = {k: size for k, (_, size) in made.items()}
            rows.append({"batch": batch, "context": context, "tokens_a_second": rate, "bytes": kept})
            rows[-1]["seconds"] = seconds
            text = ", ".join(f"{NAMES[k]} {number(rate[k])} tokens/s {number(kept[k] / 1e6)} MB" for k in NAMES)
            print(f"batch {batch}, context {context:,}: {text}", flush=True)
    return rows


# ----- The sheet


def draw(parts: dict, path: Path) -> None:
    """Four pictures: loss by tokens, time by length, tokens a second and memory by context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((loss, time), (speed, memory)) = plt.subplots(2, 2, figsize=(10, 7.4), layout="constrained")
    colours = {"mamba": "C0", "transformer": "C1"}
    for row in parts.get("loss", []):
        tokens, bits = [p[0] for p in row["curves"][0]], [[p[1] for p in curve] for curve in row["curves"]]
        style = {"color": colours[row["script"]], "ls": "-" if row["sizes"]["d_model"] > 100 else "--"}
        label = f"{NAMES[row['script']]}, {row['parameters'] / 1e6:.2f}M"
        loss.plot(tokens, [statistics.mean(b) for b in zip(*bits, strict=True)], label=label, **style)
        band = [min(b) for b in zip(*bits, strict=True)], [max(b) for b in zip(*bits, strict=True)]
        loss.fill_between(tokens, *band, color=style["color"], alpha=0.2, lw=0)
    loss.set(xlabel="tokens", ylabel="validation bits a byte", title="Loss, mean and range over the seeds")
    for script, name in NAMES.items():
        rows = parts.get("time", {}).get("rows", [])
        micro = [row["microseconds_a_token"][script] for row in rows]
        time.plot([row["length"] for row in rows], micro, "o-", color=colours[script], label=name)
        for batch in sorted({row["batch"] for row in parts.get("text", [])}):
            rows = [row for row in parts["text"] if row["batch"] == batch]
            style = {"color": colours[script], "label": f"{name}, batch {batch}", "ls": "-" if batch == 1 else "--"}
            contexts = [row["context"] for row in rows]
            speed.plot(contexts, [row["tokens_a_second"][script] for row in rows], marker="o", **style)
            memory.plot(contexts, [row["bytes"][script] / 1e6 for row in rows], marker="o", **style)
    time.set(xlabel="length", ylabel="µs a token", title="Forward and backward, equal tokens")
    speed.set(xlabel="context", ylabel="tokens a second", title="Writing")
    memory.set(xlabel="context", ylabel="MB", title="State or cache")
    for axes, part in ((loss, "loss"), (time, "time"), (speed, "text"), (memory, "text")):
        if part in parts:
            axes.legend(fontsize=8)
            axes.set(**{} if axes is loss else {"xscale": "log", "yscale": "log"})
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
        rows = [["length", *(f"{name}, µs a token" for name in NAMES.values()), "Transformer++ / Mamba"]]
        for row in time["rows"]:
            micro = row["microseconds_a_token"]
            rows.append([f"{row['length']:,}", *(number(micro[k]) for k in NAMES)])
            rows[-1].append(number(micro["transformer"] / micro["mamba"]))
        texts.append(table(rows))
    if text := parts.get("text"):
        rows = [["batch, context", *(f"{n}, tokens/s" for n in NAMES.values()), *(f"{n}, MB" for n in NAMES.values())]]
        for row in text:
            rates, sizes = ([row[key][k] for k in NAMES] for key in ("tokens_a_second", "bytes"))
            numbers = [*map(number, rates), *(number(size / 1e6) for size in sizes)]
            rows.append([f"{row['batch']}, {row['context']:,}", *numbers])
        texts.append(table(rows))
    return "\n\n".join(texts)


def main(argv: list[str] | None = None) -> int:
    parser = add_common_flags(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    names = ("loss", "time", "text")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="what to measure")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each; the median counts")
    args = parser.parse_args(argv)
    prepare(args)
    path = Path(args.out) / "versus.json"
    parts = json.loads(path.read_text("utf-8"))["parts"] if path.exists() and not args.quick else {}
    rounds = 2 if args.quick else args.rounds
    measures = {
        "loss": lambda: measure_loss(QUICK_LOSS if args.quick else LOSS),
        "time": lambda: measure_time(QUICK_TIME if args.quick else TIME, rounds),
        "text": lambda: measure_text(QUICK_TEXT if args.quick else TEXT, rounds),
    }
    for name in names:
        if name in args.parts:
            parts[name] = measures[name]()
            write_result(args, "versus", parts=parts)
    draw(parts, path.with_suffix(".png"))
    print(tables(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
