"""Where a Mamba decides to remember: `python tests/claims/what_it_remembers.py`, or with --checkpoint FILE.

Delta, the step size, is what selection is made with (section 3.5.2 and theorem 1 of arXiv 2312.00752): a large one
resets the state and takes the token in, a small one lets the token pass by and keeps what there is. The paper says so
and shows no picture of it. Here a paragraph is drawn with delta under each of its tokens, mean over the channels, a
strip for each layer; and over the validation text delta is set out by kind of token: does the model take in the start
of a word, or its end, or what stands between? The mean may hide what single channels do, where one opens as another
shuts: so the picture also has the channel of each layer whose delta varies most, and the table how much either varies.

A checkpoint is one that mamba.py wrote (out/mamba/checkpoint.pt after its default run), or a folder. Without one, a
smaller model is trained for each seed, and the table has the mean and s.d. over the seeds; the picture is the first's.
"""

import math
import re
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from _claims import device, finish, mamba, markdown, mean_sd, parse, plus_minus
from torch import Tensor

PARAGRAPH = """\
A context manager is an object that defines the runtime context to be established when executing a "with" statement. \
It handles the entry into, and the exit from, the desired runtime context for the execution of the block of code.

Typical uses of context managers include saving and restoring various kinds of global state, locking and unlocking \
resources, and closing opened files:

   >>> with open("spam.txt") as file:
   ...     text = file.read(80)
"""


@dataclass(frozen=True)
class Settings:
    """The checkpoint, or the sizes of the models that are trained without one; and the text."""

    checkpoint: str = mamba.flag("", "checkpoint of mamba.py or folder; empty: train a model for each seed")
    data: str = mamba.flag("", "as mamba.py's: text to train on and to measure on")
    tokenizer: str = mamba.flag("bpe:1024", "as mamba.py's; a checkpoint has its own, a folder needs one")
    text: str = mamba.flag(PARAGRAPH, "the paragraph that is drawn")
    d_model: int = mamba.flag(128, "width")
    n_layer: int = mamba.flag(4, "layers")
    steps: int = mamba.flag(600, "steps")
    batch: int = mamba.flag(8, "sequences a step")
    length: int = mamba.flag(256, "tokens a window, in training and in measuring")
    lr: float = mamba.flag(4e-3, "peak learning rate")
    eval_tokens: int = mamba.flag(40_960, "validation tokens that delta is measured on")


SMOKE = {"tokenizer": "byte", "d_model": 16, "n_layer": 2, "steps": 4, "batch": 4, "length": 16, "eval_tokens": 500}
SMOKE |= {"checkpoint": ""}
KINDS = {  # the first pattern that a token's whole text matches is its kind
    "line break": r"\s*\n\s*",
    "spaces": r"[ \t]+",
    "start of a word": r"\s+[A-Za-z_].*",
    "rest of a word, or a word without a space before it": r"[A-Za-z_].*",
    "number": r"\s*\d+.*",
    "punctuation and the rest": r"(?s:.*)",
}


def kind_of(text: str) -> str:
    """The kind of a token by its text."""
    return next(kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, text))


@torch.no_grad()
def channel_steps(model: mamba.Mamba, tokens: Tensor) -> Tensor:
    """Delta after the softplus of tokens (B, L) in every layer and channel: (n_layer, B, L, d_inner)."""
    found = []
    x = model.embed(tokens.to(device()))
    for layer in model.backbone.layers:
        mixer = layer.mixer
        inner, _ = mixer.in_proj(layer.norm(x)).chunk(2, dim=-1)
        inner, _ = mamba.causal_conv(inner, mixer.conv1d.weight, mixer.conv1d.bias)
        delta, _, _ = mixer.select(F.silu(inner))
        found.append(F.softplus(delta + mixer.dt_proj.bias).cpu())
        x = x + mixer(layer.norm(x))[0]
    return torch.stack(found)


def step_sizes(model: mamba.Mamba, tokens: Tensor) -> Tensor:
    """Delta, mean over the channels, of tokens (B, L) in every layer: (n_layer, B, L)."""
    return channel_steps(model, tokens).mean(-1)


def windows_of(tokens: np.ndarray, length: int) -> Tensor:
    """The tokens as windows (B, length) that are read each from nothing; what is over is left out."""
    return torch.from_numpy(tokens[: len(tokens) // length * length].astype(np.int64)).view(-1, length)


def spread(model: mamba.Mamba, windows: Tensor) -> tuple[list[float], list[float], list[int]]:
    """How much delta varies over the tokens of windows (B, L): standard deviations of its logarithm, a number a layer.

    Of the mean over the channels; of a channel, the median over the channels; and the channel that varies most.
    """
    count, totals, squares, means = windows.numel(), 0.0, 0.0, []
    for rows in windows.split(8):
        deltas = channel_steps(model, rows).double()
        means.append(deltas.mean(-1).log().flatten(1))
        totals = totals + deltas.log().sum((1, 2))
        squares = squares + deltas.log().square().sum((1, 2))
    channels = (squares / count - (totals / count).square()).clamp(min=0).sqrt()  # (n_layer, d_inner)
    of_mean = torch.cat(means, dim=1).std(1, correction=0)
    return of_mean.tolist(), channels.quantile(0.5, dim=1).tolist(), channels.argmax(1).tolist()


def load_or_train(s: Settings, corpus: mamba.Corpus | None, seed: int) -> tuple[mamba.Mamba, mamba.Tokenizer]:
    """The checkpoint's model and tokenizer; or without one a model trained on the corpus."""
    if s.checkpoint:
        config = mamba.Config(checkpoint=s.checkpoint, tokenizer=s.tokenizer)
        model, tokenizer = mamba.load_checkpoint(config, device())
        mamba.require(tokenizer is not None, f"--checkpoint {s.checkpoint}: has no tokenizer; give --tokenizer a file")
        return model, tokenizer
    sizes = {"d_model": s.d_model, "n_layer": s.n_layer, "steps": s.steps, "batch": s.batch, "length": s.length}
    run = mamba.Run(mamba.Config(**sizes, lr=s.lr, seed=seed), corpus, device())
    for _ in range(s.steps):
        run.train_step()
    return run.model, corpus.tokenizer


def by_kind(model: mamba.Mamba, tokenizer: mamba.Tokenizer, tokens: np.ndarray, length: int) -> dict[str, list[float]]:
    """For each kind of token there is: delta's geometric mean over that of all tokens, a number a layer.

    The tokens are read in windows of `length`, each from nothing.
    """
    windows = windows_of(tokens, length)
    deltas = torch.cat([step_sizes(model, rows) for rows in windows.split(8)], dim=1).double().log()  # (n_layer, B, L)
    kinds = {i: kind_of(tokenizer.decode([i])) for i in windows.unique().tolist()}
    names = np.array([[kinds[i] for i in row] for row in windows.tolist()])
    overall = deltas.mean((1, 2))
    chosen = {kind: torch.from_numpy(names == kind) for kind in KINDS}
    return {kind: (deltas[:, here].mean(1) - overall).exp().tolist() for kind, here in chosen.items() if here.any()}


def share(tokenizer: mamba.Tokenizer, tokens: np.ndarray) -> dict[str, float]:
    """The part of the tokens that is of each kind."""
    kinds = [kind_of(tokenizer.decode([i])) for i in tokens.tolist()]
    return {kind: kinds.count(kind) / len(kinds) for kind in KINDS}


def table(result: dict) -> str:
    """The README's table."""
    layers = len(result["drawn"]["delta"])
    rows = [
        [kind, f"{result['share'][kind]:.0%}", *(plus_minus(layer, 2) for layer in each)]
        for kind, each in result["kinds"].items()
    ]
    for what, each in result["spread"].items():
        rows.append([what, "", *(plus_minus(layer, 2) for layer in each)])
    return markdown(["kind of token", "of all", *(f"layer {i}" for i in range(1, layers + 1))], rows)


def lines_of(pieces: list[str], width: int) -> list[list[tuple[int, int, str]]]:
    """Where each token is drawn: for each line of text (token, column, its text), cut at `width` and at line breaks."""
    lines, column = [[]], 0
    for i, piece in enumerate(pieces):
        shown = piece.replace("\n", "¶")
        if column + len(shown) > width:
            lines.append([])
            column = 0
        lines[-1].append((i, column, shown))
        column += len(shown)
        if "\n" in piece:
            lines.append([])
            column = 0
    return [line for line in lines if line]


def draw(result: dict, plt, path, width: int = 92) -> None:
    """The text in lines, under each line a strip a layer: delta over the layer's geometric mean, red is large.

    The upper strips are means over the channels, the lower ones the channel that varies most, on a wider scale.
    """
    drawn = result["drawn"]
    names = [f"layer {i + 1}" for i in range(len(drawn["delta"]))]
    bands = [(name, deltas, math.log(1.5)) for name, deltas in zip(names, drawn["delta"], strict=True)]
    channels = zip(names, drawn["channel"], drawn["channel_delta"], strict=True)
    bands += [(f"{name}, channel {number}", deltas, math.log(8)) for name, number, deltas in channels]
    lines = lines_of(drawn["tokens"], width)
    letter, row, strip = 0.602 * 9 / 72, 0.24, 0.1  # inches: a monospaced letter of 9 points, a line, a strip
    block = row + len(bands) * strip + 0.1
    size = (width * letter + 1.2, len(lines) * block + 0.9)
    figure, axes = plt.subplots(figsize=size)
    axes.set_position([0.95 / size[0], 0.75 / size[1], width * letter / size[0], 1 - 0.85 / size[1]])
    axes.set(xlim=(0, width), ylim=(len(lines) * block, 0))
    axes.axis("off")
    colours = plt.get_cmap("RdBu_r")
    for number, line in enumerate(lines):
        top = number * block
        for _, column, shown in line:
            style = {"family": "DejaVu Sans Mono", "fontsize": 9, "va": "center"}
            for at, character in enumerate(shown):
                if character != " ":
                    axes.text(column + at + 0.5, top + row / 2, character, ha="center", parse_math=False, **style)
        for band, (name, deltas, limit) in enumerate(bands):
            y, centre = top + row + band * strip, sum(map(math.log, deltas)) / len(deltas)
            axes.text(-0.5, y + strip / 2, name, fontsize=4.5, ha="right", va="center")
            for i, column, shown in line:
                colour = colours(plt.Normalize(-limit, limit)(math.log(deltas[i]) - centre))
                place = (column, y), max(1, len(shown)) - 0.08, strip * 0.9
                axes.add_patch(plt.Rectangle(*place, color=colour, lw=0))
    for left, limit, what in (0.1, 1.5, "mean over the channels"), (0.55, 8, "the channel that varies most"):
        bar = figure.add_axes([left, 0.3 / size[1], 0.35, 0.09 / size[1]])
        scale = plt.cm.ScalarMappable(plt.Normalize(-math.log(limit), math.log(limit)), colours)
        ticks = [1 / limit, 1, limit]
        bar = figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=[math.log(r) for r in ticks])
        bar.ax.set_xticklabels([f"{r:.2g}" for r in ticks], fontsize=7)
        bar.ax.set_title(f"delta over its geometric mean: {what}", fontsize=7, pad=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Train or load, write the result file and the picture, print the table."""
    s, asked = parse(__doc__, Settings, None, SMOKE, argv)
    began, runs, spreads, drawn = time.perf_counter(), [], [], None
    mamba.keep_memory()
    corpus = None if s.checkpoint else mamba.load_corpus(s.data, s.tokenizer)
    for seed in asked.seeds[:1] if s.checkpoint else asked.seeds:
        model, tokenizer = load_or_train(s, corpus, seed)
        if corpus is None:
            corpus = mamba.load_corpus(s.data, s.tokenizer, tokenizer)
        measured = corpus.valid[: s.eval_tokens]
        runs.append(by_kind(model, tokenizer, measured, s.length))
        spreads.append(spread(model, windows_of(measured, s.length)))
        if drawn is None:
            ids = tokenizer.encode(s.text)
            deltas, widest = channel_steps(model, torch.from_numpy(ids.astype(np.int64))[None])[:, 0], spreads[0][2]
            drawn = {"tokens": [tokenizer.decode([i]) for i in ids], "delta": deltas.mean(-1).tolist()}
            chosen = [layer[:, channel].tolist() for layer, channel in zip(deltas, widest, strict=True)]
            drawn |= {"channel": widest, "channel_delta": chosen}
        print(f"{time.perf_counter() - began:5.0f} s  seed {seed}: measured", flush=True)
    layers = range(len(drawn["delta"]))
    kinds = {kind: [mean_sd([run[kind][layer] for run in runs]) for layer in layers] for kind in runs[0]}
    content = {"unit": "delta's geometric mean over that of all tokens, by layer", "kinds": kinds}
    content["share"] = share(corpus.tokenizer, corpus.valid[: s.eval_tokens])
    names = ("s.d. of log delta, of the mean over channels", "s.d. of log delta, of a channel (median)")
    each = {name: [mean_sd([s_[i][layer] for s_ in spreads]) for layer in layers] for i, name in enumerate(names)}
    content |= {"spread": each, "drawn": drawn}
    print(table(finish("what_it_remembers", asked, s, began, content, draw)))


if __name__ == "__main__":
    main()
