"""Where a Mamba decides to remember: `python tests/claims/what_it_remembers.py`, or with --checkpoint FILE.

Delta, the step size, is what selection is made with (section 3.5.2 and theorem 1 of arXiv 2312.00752): a large one
resets the state and takes the token in, a small one lets the token pass by and keeps what there is. The paper says so
and shows no picture of it. Here a paragraph is drawn with delta under each of its tokens, mean over the channels, a
strip for each layer; and over the validation text delta is set out by kind of token: does the model take in the start
of a word, or its end, or what stands between?

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
    steps: int = mamba.flag(250, "steps")
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
def step_sizes(model: mamba.Mamba, tokens: Tensor) -> Tensor:
    """Delta after the softplus, mean over the channels, of tokens (B, L) in every layer: (n_layer, B, L)."""
    found = []
    x = model.embed(tokens.to(device()))
    for layer in model.backbone.layers:
        mixer = layer.mixer
        inner, _ = mixer.in_proj(layer.norm(x)).chunk(2, dim=-1)
        inner, _ = mamba.causal_conv(inner, mixer.conv1d.weight, mixer.conv1d.bias)
        delta, _, _ = mixer.select(F.silu(inner))
        found.append(F.softplus(delta + mixer.dt_proj.bias).mean(-1).cpu())
        x = x + mixer(layer.norm(x))[0]
    return torch.stack(found)


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
    windows = torch.from_numpy(tokens[: len(tokens) // length * length].astype(np.int64)).view(-1, length)
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
    """The text in lines, and under each line a strip a layer: delta over the layer's geometric mean, red is large."""
    pieces, deltas = result["drawn"]["tokens"], result["drawn"]["delta"]
    lines, layers = lines_of(pieces, width), len(deltas)
    centre = [sum(map(math.log, d)) / len(d) for d in deltas]
    letter, row, strip = 0.602 * 9 / 72, 0.24, 0.1  # inches: a monospaced letter of 9 points, a line, a strip
    block = row + layers * strip + 0.1
    size = (width * letter + 1.0, len(lines) * block + 0.9)
    figure, axes = plt.subplots(figsize=size)
    axes.set_position([0.7 / size[0], 0.75 / size[1], width * letter / size[0], 1 - 0.85 / size[1]])
    axes.set(xlim=(0, width), ylim=(len(lines) * block, 0))
    axes.axis("off")
    norm, colours = plt.Normalize(-math.log(4), math.log(4)), plt.get_cmap("RdBu_r")
    for number, line in enumerate(lines):
        top = number * block
        for layer in range(layers):
            y = top + row + layer * strip
            axes.text(-0.5, y + strip / 2, f"layer {layer + 1}", fontsize=4.5, ha="right", va="center")
        for i, column, shown in line:
            style = {"family": "DejaVu Sans Mono", "fontsize": 9, "va": "center"}
            for at, character in enumerate(shown):
                if character != " ":
                    axes.text(column + at + 0.5, top + row / 2, character, ha="center", parse_math=False, **style)
            for layer in range(layers):
                colour = colours(norm(math.log(deltas[layer][i]) - centre[layer]))
                place = (column, top + row + layer * strip), max(1, len(shown)) - 0.08, strip * 0.9
                axes.add_patch(plt.Rectangle(*place, color=colour, lw=0))
    bar = figure.add_axes([0.3, 0.3 / size[1], 0.4, 0.09 / size[1]])
    scale = plt.cm.ScalarMappable(norm, colours)
    bar = figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=[math.log(r) for r in (0.25, 0.5, 1, 2, 4)])
    bar.ax.set_xticklabels(["¼", "½", "1", "2", "4"], fontsize=7)
    bar.ax.set_title("delta over the layer's geometric mean", fontsize=7, pad=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Train or load, write the result file and the picture, print the table."""
    s, asked = parse(__doc__, Settings, None, SMOKE, argv)
    began, runs, drawn = time.perf_counter(), [], None
    mamba.keep_memory()
    corpus = None if s.checkpoint else mamba.load_corpus(s.data, s.tokenizer)
    for seed in asked.seeds[:1] if s.checkpoint else asked.seeds:
        model, tokenizer = load_or_train(s, corpus, seed)
        if corpus is None:
            corpus = mamba.load_corpus(s.data, s.tokenizer, tokenizer)
        runs.append(by_kind(model, tokenizer, corpus.valid[: s.eval_tokens], s.length))
        ids = tokenizer.encode(s.text)
        drawn = drawn or (
            [tokenizer.decode([i]) for i in ids],
            step_sizes(model, torch.from_numpy(ids.astype(np.int64))[None])[:, 0].tolist(),
        )
        print(f"{time.perf_counter() - began:5.0f} s  seed {seed}: measured", flush=True)
    layers = range(len(drawn[1]))
    kinds = {kind: [mean_sd([run[kind][layer] for run in runs]) for layer in layers] for kind in runs[0]}
    shares = share(corpus.tokenizer, corpus.valid[: s.eval_tokens])
    content = {"unit": "delta's geometric mean over that of all tokens, by layer", "share": shares, "kinds": kinds}
    content |= {"drawn": {"tokens": drawn[0], "delta": drawn[1]}}
    print(table(finish("what_it_remembers", asked, s, began, content, draw)))


if __name__ == "__main__":
    main()
