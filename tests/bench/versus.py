"""Mamba beside Transformer++ at equal parameters: loss by tokens, time by length, text by context.

    python tests/bench/versus.py                     # an hour on two cores, most of it the loss
    python tests/bench/versus.py --parts time text   # the others stay as the result file has them

Writes OUT/versus.json and OUT/versus.png. One process, float32; both train by mamba.py's recipe on
the same data in the same order. A Transformer of n layers stands beside a Mamba of 2 n blocks of
the same width, as in the paper, its MLP widened until the parameters are equal. Each one's rate
is chosen among three on seed 0 at the smaller size, a run not reported.
"""

import functools
import itertools
import statistics
from pathlib import Path

import _common  # first: torch's threads read what it sets
from _common import count, interleave, median, print_rows

# isort: split
import numpy as np
import torch
from torch import Tensor, nn

import mamba
import transformer

FULL = {
    "loss": {"widths": (96, 192), "batch": 8, "steps": 360, "every": 60, "seeds": (1, 2, 3)},
    "time": {"width": 256, "tokens": 16_384, "lengths": [2**k for k in range(8, 15)]},
    "text": {"width": 256, "batches": (1, 16), "contexts": (128, 512, 2048, 8192, 32_768)},
}
SMOKE = {
    "loss": {"widths": (16,), "batch": 2, "steps": 4, "every": 2, "seeds": (1, 2)},
    "time": {"width": 16, "tokens": 512, "lengths": (64, 256)},
    "text": {"width": 16, "batches": (1, 2), "contexts": (16, 64)},
}
RATES, NEW_TOKENS = (1e-3, 2e-3, 4e-3), 32
NAMES = {"mamba": "Mamba", "transformer": "Transformer++"}


def make(script: str, width: int, vocab: int = 4096) -> nn.Module:
    """A Mamba of that width and 4 blocks, or a Transformer of 2 layers that is as large."""
    ours = mamba.Mamba(mamba.MambaConfig(width, 4, vocab))
    if script == "mamba":
        return ours
    sizes = {"d_model": width, "n_layer": 2, "n_head": max(1, width // 32), "vocab_size": vocab}

    def widened(d_ff: int) -> nn.Module:
        return transformer.Transformer(transformer.TransformerConfig(**sizes, d_ff=d_ff))

    missing = count(ours) - count(widened(1))
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
        for lr in RATES:
            tried[lr] = train(script, corpus, settings, first, lr)[-1][1]
        best = min(tried, key=tried.get)
        for width in settings["widths"]:
            curves = [train(script, corpus, settings, width, best, k) for k in settings["seeds"]]
            ends = [curve[-1][1] for curve in curves]
            row = {"script": script, "sizes": {"d_model": width}, "seeds": settings["seeds"]}
            row |= {"lr": best, "tried_on_seed_0": tried}
            row["parameters"] = count(make(script, width, corpus.vocab_size))
            row |= {"bits_a_byte": statistics.mean(ends), "sd": statistics.stdev(ends)}
            rows.append(row | {"curves": curves})
            print_rows(rows[-1:])
    return rows


# ----- 2. Time of a training pass against length, at equal tokens


def training_pass(model: nn.Module, tokens: Tensor) -> None:
    model(tokens[:, :-1], targets=tokens[:, 1:]).backward()
    model.zero_grad()


def measure_time(settings: dict) -> dict:
    """Microseconds a token, forward and backward, by length."""
    models, rows = {script: make(script, settings["width"]) for script in NAMES}, []
    for length in settings["lengths"]:
        batch = settings["tokens"] // length
        tokens = torch.randint(0, 4096, (batch, length + 1))
        runs = {k: functools.partial(training_pass, m, tokens) for k, m in models.items()}
        seconds = interleave(runs, settings["rounds"], budget=60.0)
        micro = {k: median(times) / settings["tokens"] * 1e6 for k, times in seconds.items()}
        row = {"length": length, "batch": batch, "microseconds_a_token": micro}
        rows.append(row | {"seconds": seconds})
    print_rows(rows)
    return {"rows": rows, "parameters": {k: count(m) for k, m in models.items()}}


# ----- 3. Generation against context


def write(model: nn.Module, token: Tensor, kept, context: int) -> None:
    """A token (B, 1) again and again, after `context` others, of which a state or cache is kept."""
    if isinstance(model, mamba.Mamba):
        for _ in range(NEW_TOKENS):
            _, kept = model.step(token[:, 0], kept)
    else:
        kept.length = context
        for _ in range(NEW_TOKENS):
            model(token, kept)


@torch.inference_mode()
def measure_text(settings: dict) -> list[dict]:
    """Tokens a second, all rows together, and bytes of state or cache."""
    models, rows = {script: make(script, settings["width"]).eval() for script in NAMES}, []
    for batch, context in itertools.product(settings["batches"], settings["contexts"]):
        token, runs = torch.randint(0, 4096, (batch, 1)), {}
        # What state and cache hold does not matter to the time.
        state = models["mamba"].hidden(token)[1]
        cache = models["transformer"].init_cache(batch, context + NEW_TOKENS)
        size = sum(x.normal_()[..., :context, :].nbytes for x in cache.layers)
        sizes = {"mamba": sum(x.nbytes for layer in state for x in layer), "transformer": size}
        for script, kept in (("mamba", state), ("transformer", cache)):
            runs[script] = functools.partial(write, models[script], token, kept, context)
        seconds = interleave(runs, settings["rounds"], budget=30.0)
        rate = {script: batch * NEW_TOKENS / median(times) for script, times in seconds.items()}
        row = {"batch": batch, "context": context, "tokens_a_second": rate, "bytes": sizes}
        rows.append(row | {"seconds": seconds})
    print_rows(rows)
    return rows


# ----- The picture

STYLES = {"mamba": {"color": "C0", "ls": "-", "marker": "o"}}
STYLES["transformer"] = {"color": "C1", "ls": "--", "marker": "s"}
SMALL = {"mfc": "white"}  # markers of the smaller model, or of batch 1


def draw(parts: dict, path: Path) -> None:
    """Four pictures: loss by tokens, time by length, tokens a second and memory by context."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(2, 2, figsize=(10, 7.6), layout="constrained")
    loss, time, speed, memory = axes.flat
    smaller = min(row["sizes"]["d_model"] for row in parts["loss"])
    for row in parts["loss"]:
        style = STYLES[row["script"]] | (SMALL if row["sizes"]["d_model"] == smaller else {})
        tokens = [seen / 1000 for seen, _ in row["curves"][0]]
        bits = np.array(row["curves"])[:, :, 1]  # (seeds, evaluations)
        loss.plot(tokens, bits.mean(0), **style)
        loss.fill_between(tokens, bits.min(0), bits.max(0), color=style["color"], alpha=0.2, lw=0)
    for script, name in NAMES.items():
        rows, style = parts["time"]["rows"], STYLES[script]
        micro = [row["microseconds_a_token"][script] for row in rows]
        time.plot([row["length"] for row in rows], micro, **style)
        loss.plot([], [], label=f"{name}: larger model, or batch 16", **style)
        loss.plot([], [], label=f"{name}: smaller, or batch 1", **style | SMALL)
        for batch in {row["batch"] for row in parts["text"]}:
            style = STYLES[script] | (SMALL if batch == 1 else {})
            rows = [row for row in parts["text"] if row["batch"] == batch]
            contexts = [row["context"] for row in rows]
            speed.plot(contexts, [row["tokens_a_second"][script] for row in rows], **style)
            memory.plot(contexts, [row["bytes"][script] / 1e6 for row in rows], **style)
    loss.set(
        xlabel="thousand tokens", ylabel="validation bits a byte", title="Loss, mean and range"
    )
    time.set(xlabel="length", ylabel="µs a token", title="Forward and backward, equal tokens")
    speed.set(xlabel="context", ylabel="tokens a second", title="Writing")
    memory.set(xlabel="context", ylabel="MB", title="State or cache")
    for ax in (time, speed, memory):
        ax.set(xscale="log", yscale="log")
        ticks = sorted({x for line in ax.lines for x in line.get_xdata()})
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:,g}")
        ax.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


PARTS = {"loss": measure_loss, "time": measure_time, "text": measure_text}


def main() -> None:
    choice = {"nargs": "+", "choices": tuple(PARTS), "default": tuple(PARTS)}
    args = _common.parse(__doc__, rounds=5, parts=choice | {"help": "what to measure"})
    parts = _common.read_result(args, "versus").get("parts", {})
    for name in args.parts:
        settings = SMOKE[name] if args.smoke else FULL[name]
        parts[name] = PARTS[name](settings | {"rounds": args.rounds})
        _common.write_result(args, "versus", parts=parts)
    if parts.keys() == PARTS.keys():
        draw(parts, Path(args.out, "versus.png"))


if __name__ == "__main__":
    main()
