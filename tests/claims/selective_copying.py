"""Selective copying: `python tests/claims/selective_copying.py`.

The claim (section 4.1.1, table 1 of arXiv 2312.00752): to copy tokens that stand at random places
in noise a model has to choose, by content, what enters its state. Selective models do so (Mamba
99.8 % of the tokens), time-invariant ones cannot (S4 18.3 %, Hyena in H3's block 30.1 %). Every arm
here is one and the same Mamba block, in which delta, B and C depend on the input or do not.

The sequence: noise with data tokens at random places, then as many markers as there are data
tokens; at the markers the model must give the data tokens in their order. Symbol 0 is noise, the
last one is the marker, the rest are data.

Scaled down, beside the paper: see `Settings`; `--paper` has the paper's settings. Training begins
with shorter sequences, which teach sooner. Settings were chosen on seed 0 by Mamba's accuracy, and
seed 0 is not reported; guessing gives 1 in (vocab - 2).
"""

import time
from dataclasses import dataclass

import torch
from _claims import (
    device,
    finish,
    generator,
    growing_lengths,
    make_mamba,
    mamba,
    markdown,
    mean_sd,
    new_model,
    parse,
    plus_minus,
    train,
)
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """Sizes of the task, the model and the run."""

    length: int = mamba.flag(64, "positions of the noise and the data tokens; paper: 4,096")
    first_length: int = mamba.flag(16, "but at first these, then twice as many; paper: 4,096")
    tokens: int = mamba.flag(8, "data tokens to copy; paper: 16")
    vocab: int = mamba.flag(16, "symbols, with noise and marker; paper: 16")
    d_model: int = mamba.flag(64, "width; paper: 64")
    n_layer: int = mamba.flag(2, "layers; paper: 2")
    d_state: int = mamba.flag(8, "states a channel; the paper does not say")
    steps: int = mamba.flag(1000, "steps; paper: 400,000")
    batch: int = mamba.flag(32, "sequences a step, more while they are shorter; paper: 64")
    lr: float = mamba.flag(2e-3, "constant learning rate; paper: 1e-4")
    every: int = mamba.flag(100, "steps between evaluations")
    sequences: int = mamba.flag(256, "sequences of an evaluation")


PAPER = {"length": 4096, "first_length": 4096, "d_state": 16, "tokens": 16, "steps": 400_000}
PAPER |= {"batch": 64, "lr": 1e-4, "every": 10_000}
SMOKE = {"length": 12, "first_length": 6, "tokens": 3, "d_model": 16, "steps": 4, "batch": 4}
SMOKE |= {"every": 2, "sequences": 8}

ARMS = {  # name: what is selective, and the paper's nearest figure
    "delta, B and C (Mamba)": ("delta,B,C", "99.8"),
    "delta": ("delta", ""),
    "B and C": ("B,C", ""),
    "nothing: time-invariant": ("", "18.3 (S4), 30.1 (Hyena)"),
}


def copying(batch: int, length: int, tokens: int, vocab: int, random) -> tuple[Tensor, Tensor]:
    """Inputs (B, length + tokens) and targets (B, tokens), which stand in order in the noise.

    Their places in a sequence differ, and every set of places is equally likely.
    """
    targets = torch.randint(1, vocab - 1, (batch, tokens), generator=random)
    places = torch.rand(batch, length, generator=random).argsort(1)[:, :tokens].sort(1).values
    inputs = torch.zeros(batch, length, dtype=torch.long).scatter(1, places, targets)
    return torch.cat([inputs, torch.full((batch, tokens), vocab - 1)], dim=1), targets


@torch.no_grad()
def accuracy(model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Per cent of the targets that the model gives, 32 sequences at a time."""
    found = [
        model(x.to(device()))[:, -targets.shape[1] :].argmax(-1).cpu() == y
        for x, y in zip(inputs.split(32), targets.split(32), strict=True)
    ]
    return 100 * torch.cat(found).double().mean().item()


def run(s: Settings, selective: str, seed: int) -> list[tuple[int, float]]:
    """One training run: (step, per cent of tokens right) on sequences made for this alone."""
    lengths, random = growing_lengths(s.first_length, s.length, s.steps), generator(seed, 0)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        length = lengths[step - 1]
        batch = s.batch * (s.length + s.tokens) // (length + s.tokens)
        return copying(batch, length, s.tokens, s.vocab, random)

    parts = tuple(filter(None, selective.split(",")))
    config = mamba.MambaConfig(s.d_model, s.n_layer, s.vocab, s.d_state)
    model = new_model(lambda: make_mamba(config, parts), seed)
    held_out = copying(s.sequences, s.length, s.tokens, s.vocab, generator(seed, 1))
    return train(model, draw, s.steps, s.lr, s.every, lambda: accuracy(model, *held_out))


def table(result: dict) -> str:
    """The README's table."""
    rows = [
        [arm["arm"], plus_minus(arm["final"], 1), arm["paper"] or "–"] for arm in result["arms"]
    ]
    return markdown(["what depends on the input", "tokens right, %", "paper, %"], rows)


def draw_curves(result: dict, plt, path) -> None:
    """Accuracy by step: mean and range over the seeds."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for arm in result["arms"]:
        steps = [step for step, _ in arm["curves"][0]]
        values = [[curve[i][1] for curve in arm["curves"]] for i in range(len(steps))]
        axes.plot(steps, [sum(v) / len(v) for v in values], label=arm["arm"])
        axes.fill_between(steps, [*map(min, values)], [*map(max, values)], alpha=0.2)
    axes.axhline(result["guessing"], color="grey", lw=1, ls=":", label="guessing")
    axes.set(xlabel="step", ylabel="tokens right, %", ylim=(0, 102))
    axes.legend(fontsize=8, title="selective")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Run every arm, write the result file and the picture, print the table."""
    s, asked = parse(__doc__, Settings, PAPER, SMOKE, argv)
    began, arms = time.perf_counter(), []
    for name, (selective, paper) in ARMS.items():
        curves = [run(s, selective, seed) for seed in asked.seeds]
        final = mean_sd([curve[-1][1] for curve in curves])
        arm = {"arm": name, "selective": selective, "paper": paper, "final": final}
        arms.append(arm | {"curves": curves})
        print(f"{time.perf_counter() - began:5.0f} s  {name}: {plus_minus(final, 1)} %", flush=True)
    content = {"unit": "per cent of the tokens right", "guessing": 100 / (s.vocab - 2)}
    content["arms"] = arms
    print(table(finish("selective_copying", asked, s, began, content, draw_curves)))


if __name__ == "__main__":
    main()
