"""Where a Mamba decides to remember: `python tests/claims/what_it_remembers.py`.

Delta, the step size, is what selection is made with (section 3.5.2 and theorem 1 of arXiv
2312.00752): a large one resets the state and takes the token in, a small one lets the token pass
by and keeps what there is. The paper says so and shows no picture of it. Here a paragraph is drawn
with delta under each of its tokens, mean over the channels, a strip for each layer; and over the
validation text delta is set out by kind of token: does the model take in the start of a word, or
its end, or what stands between? The mean may hide what single channels do, where one opens as
another shuts: so the picture also has the channel of each layer whose delta varies most, and the
table how much either varies.

--checkpoint FILE is one that mamba.py wrote (out/mamba/checkpoint.pt), or a folder. Without one, a
smaller model is trained for each seed, and the table has the mean and s.d. over the seeds; the
picture is the first's.
"""

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _claims import finish, mamba, markdown, mean_sd, model_of, parse, plus_minus, train_on_text
from torch import Tensor

PARAGRAPH = """\
A context manager is an object that defines the runtime context to be established when executing \
a "with" statement. It handles the entry into, and the exit from, the desired runtime context for \
the execution of the block of code.

Typical uses of context managers include saving and restoring various kinds of global state, \
locking and unlocking resources, and closing opened files:

   >>> with open("spam.txt") as file:
   ...     text = file.read(80)
"""


@dataclass(frozen=True)
class Settings:
    """The checkpoint, or the sizes of the models that are trained without one; and the text."""

    checkpoint: str = mamba.flag("", "mamba.py's or a folder; empty: train one for each seed")
    data: str = mamba.flag("", "as mamba.py's: text to train on and to measure on")
    tokenizer: str = mamba.flag("bpe:1024", "as mamba.py's; a checkpoint has its own")
    text: str = mamba.flag(PARAGRAPH, "the paragraph that is drawn")
    d_model: int = mamba.flag(128, "width")
    n_layer: int = mamba.flag(4, "layers")
    steps: int = mamba.flag(600, "steps")
    batch: int = mamba.flag(8, "sequences a step")
    length: int = mamba.flag(256, "tokens a window, in training and in measuring")
    lr: float = mamba.flag(4e-3, "peak learning rate")
    eval_tokens: int = mamba.flag(40_960, "validation tokens that delta is measured on")


SMOKE = {"tokenizer": "byte", "d_model": 16, "n_layer": 2, "steps": 4, "batch": 4, "length": 16}
SMOKE |= {"eval_tokens": 500, "checkpoint": ""}
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
    """Delta, after the softplus, of tokens (B, L) in each channel: (n_layer, B, L, d_inner)."""
    found = []
    x = model.backbone.embeddings(tokens.to(model.lm_head.weight.device))
    for layer in model.backbone.layers:
        mixer = layer.mixer
        inner, _ = mixer.in_proj(layer.norm(x)).chunk(2, dim=-1)
        inner, _ = mamba.causal_conv(inner, mixer.conv1d.weight, mixer.conv1d.bias)
        delta, *_ = mixer.select(F.silu(inner))
        found.append(F.softplus(delta + mixer.dt_proj.bias).cpu())
        x = x + mixer(layer.norm(x))[0]
    return torch.stack(found)


def step_sizes(model: mamba.Mamba, tokens: Tensor) -> Tensor:
    """Delta, mean over the channels, of tokens (B, L) in every layer: (n_layer, B, L)."""
    return channel_steps(model, tokens).mean(-1)


def windows_of(tokens: np.ndarray, length: int) -> Tensor:
    """The tokens as windows (B, length) that are read each from nothing; the rest is left out."""
    whole = len(tokens) // length * length
    return torch.from_numpy(tokens[:whole].astype(np.int64)).view(-1, length)


def text_of(tokenizer: mamba.Tokenizer, token: int) -> str:
    return tokenizer.decode_bytes([token]).decode("utf-8", "replace")


def spread(model: mamba.Mamba, windows: Tensor) -> tuple[list[float], list[float], list[int]]:
    """How much log delta varies over the tokens of windows (B, L), a number a layer each.

    The s.d. of the mean over the channels; of a channel, the median over the channels; and the
    channel that varies most.
    """
    count, totals, squares, means = windows.numel(), 0.0, 0.0, []
    for rows in windows.split(8):
        deltas = channel_steps(model, rows).double()
        means.append(deltas.mean(-1).log().flatten(1))
        totals = totals + deltas.log().sum((1, 2))
        squares = squares + deltas.log().square().sum((1, 2))
    channels = (squares / count - (totals / count).square()).clamp(min=0).sqrt()
    of_mean = torch.cat(means, dim=1).std(1, correction=0)
    return of_mean.tolist(), channels.quantile(0.5, dim=1).tolist(), channels.argmax(1).tolist()


def load_or_train(s: Settings, corpus: mamba.Corpus | None, seed: int) -> tuple:
    """The checkpoint's model and tokenizer; or without one a model trained on the corpus."""
    if s.checkpoint:
        model, tokenizer, _ = mamba.load_model(Path(s.checkpoint))
        return model, tokenizer or mamba.load_tokenizer(s.tokenizer, [])
    model, config = model_of(s, corpus, seed)
    train_on_text(model, corpus, config)
    return model, corpus.tokenizer


def by_kind(
    model: mamba.Mamba, tokenizer: mamba.Tokenizer, tokens: np.ndarray, length: int
) -> dict:
    """For each kind of token there is: delta's geometric mean over that of all, a number a layer.

    The tokens are read in windows of `length`, each from nothing.
    """
    windows = windows_of(tokens, length)
    logs = [step_sizes(model, rows).double().log() for rows in windows.split(8)]
    logs = torch.cat(logs, dim=1).flatten(1)  # (n_layer, tokens)
    names = np.array([kind_of(text_of(tokenizer, i)) for i in windows.flatten().tolist()])
    found = {}
    for kind in KINDS:
        here = torch.from_numpy(names == kind)
        if here.any():
            found[kind] = (logs[:, here].mean(1) - logs.mean(1)).exp().tolist()
    return found


def share(tokenizer: mamba.Tokenizer, tokens: np.ndarray) -> dict[str, float]:
    """The part of the tokens that is of each kind."""
    kinds = [kind_of(text_of(tokenizer, i)) for i in tokens.tolist()]
    return {kind: kinds.count(kind) / len(kinds) for kind in KINDS}


def table(result: dict) -> str:
    """The README's table."""
    rows, layers = [], range(1, len(result["drawn"]["delta"]) + 1)
    for what, each in (result["kinds"] | result["spread"]).items():
        part = f"{result['share'][what]:.0%}" if what in result["share"] else ""
        rows.append([what, part, *(plus_minus(layer, 2) for layer in each)])
    return markdown(["kind of token", "of all", *(f"layer {i}" for i in layers)], rows)


def lines_of(pieces: list[str], width: int) -> list[list[tuple[int, int, str]]]:
    """Where each token is drawn: (token, column, its text) by line, cut at `width` and breaks."""
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
    """The text in lines, each over a strip a layer: delta over its geometric mean, red is large.

    The upper strips are means over the channels, the lower ones, on a wider scale, the channel that
    varies most.
    """
    drawn = result["drawn"]
    bands = [(f"layer {i}", deltas, math.log(1.5)) for i, deltas in enumerate(drawn["delta"], 1)]
    for i, deltas in enumerate(drawn["channel_delta"]):
        bands.append((f"layer {i + 1}, channel {drawn['channel'][i]}", deltas, math.log(8)))
    lines = lines_of(drawn["tokens"], width)
    letter, row, strip = 0.602 * 9 / 72, 0.24, 0.1  # inches: a letter of 9 points, a line, a strip
    block = row + len(bands) * strip + 0.1
    size = (width * letter + 1.2, len(lines) * block + 0.9)
    figure, axes = plt.subplots(figsize=size)
    corner = 0.95 / size[0], 0.75 / size[1]
    axes.set_position([*corner, width * letter / size[0], 1 - 0.85 / size[1]])
    axes.set(xlim=(0, width), ylim=(len(lines) * block, 0))
    axes.axis("off")
    colours = plt.get_cmap("RdBu_r")
    for number, line in enumerate(lines):
        top = number * block
        for _, column, shown in line:
            style = {"family": "DejaVu Sans Mono", "fontsize": 9, "va": "center", "ha": "center"}
            for at, letter_ in enumerate(shown.replace(" ", "\N{NO-BREAK SPACE}"), column):
                axes.text(at + 0.5, top + row / 2, letter_, parse_math=False, **style)
        for band, (name, deltas, limit) in enumerate(bands):
            y, centre = top + row + band * strip, sum(map(math.log, deltas)) / len(deltas)
            axes.text(-0.5, y + strip / 2, name, fontsize=4.5, ha="right", va="center")
            for i, column, shown in line:
                colour = colours(plt.Normalize(-limit, limit)(math.log(deltas[i]) - centre))
                place = (column, y), max(1, len(shown)) - 0.08, strip * 0.9
                axes.add_patch(plt.Rectangle(*place, color=colour, lw=0))
    for left, limit, what in (
        (0.1, 1.5, "mean over the channels"),
        (0.55, 8, "the channel that varies most"),
    ):
        bar = figure.add_axes([left, 0.3 / size[1], 0.35, 0.09 / size[1]])
        scale = plt.cm.ScalarMappable(plt.Normalize(-math.log(limit), math.log(limit)), colours)
        ticks = [-math.log(limit), 0, math.log(limit)]
        bar = figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=ticks)
        bar.ax.set_xticklabels([f"{math.exp(tick):.2g}" for tick in ticks], fontsize=7)
        bar.ax.set_title(f"delta over its geometric mean: {what}", fontsize=7, pad=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Train or load, write the result file and the picture, print the table."""
    s, asked = parse(__doc__, Settings, None, SMOKE, argv)
    began, runs, spreads, drawn = time.perf_counter(), [], [], None
    corpus = None if s.checkpoint else mamba.load_corpus(s.data, s.tokenizer)
    for seed in asked.seeds[:1] if s.checkpoint else asked.seeds:
        model, tokenizer = load_or_train(s, corpus, seed)
        if corpus is None:
            corpus = mamba.load_corpus(s.data, tokenizer)
        measured = corpus.valid[: s.eval_tokens]
        runs.append(by_kind(model, tokenizer, measured, s.length))
        spreads.append(spread(model, windows_of(measured, s.length)))
        if drawn is None:
            ids, widest = tokenizer.encode(s.text), spreads[0][2]
            deltas = channel_steps(model, torch.tensor([ids]))[:, 0]
            drawn = {"tokens": [text_of(tokenizer, i) for i in ids]}
            drawn |= {"delta": deltas.mean(-1).tolist(), "channel": widest}
            chosen = [layer[:, k].tolist() for layer, k in zip(deltas, widest, strict=True)]
            drawn["channel_delta"] = chosen
        print(f"{time.perf_counter() - began:5.0f} s  seed {seed}: measured", flush=True)
    layers = range(len(drawn["delta"]))
    content = {"unit": "delta's geometric mean over that of all tokens, by layer", "kinds": {}}
    for kind in runs[0]:
        content["kinds"][kind] = [mean_sd([run[kind][i] for run in runs]) for i in layers]
    content |= {"share": share(tokenizer, corpus.valid[: s.eval_tokens]), "spread": {}}
    for i, what in enumerate(("of the mean over channels", "of a channel (median)")):
        each = [mean_sd([found[i][layer] for found in spreads]) for layer in layers]
        content["spread"][f"s.d. of log delta, {what}"] = each
    content["drawn"] = drawn
    print(table(finish("what_it_remembers", asked, s, began, content, draw)))


if __name__ == "__main__":
    main()
