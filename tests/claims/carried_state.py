"""Letting the state run on: `python tests/claims/carried_state.py`.

A recurrent model need not start every window of a text from nothing: the state at the end of one
batch can be where the next one starts, its gradient cut, so that a text is read on and on at no
cost. Users of recurrent models have done so for decades; the paper starts every sequence from
nothing and has no figure. Here a Mamba is trained on short windows in either way, at equal tokens,
and each is then evaluated in either way, on the same windows: what is gained, and where in the
window? To carry the state a batch's rows must read the text in its order, so that its windows
cannot be drawn at random; a third model, in that order and yet from nothing, tells one from the
other.

The recipe is mamba.py's, and nothing was tuned. Windows are short, since what is not known at the
start of a window is the smaller a part of it the longer it is.
"""

import itertools
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from _claims import finish, mamba, markdown, mean_sd, model_of, parse, plus_minus, train_on_text
from torch import nn


@dataclass(frozen=True)
class Settings:
    """Sizes of the model and of the run."""

    data: str = mamba.flag("", "as mamba.py's: text, or the documentation that ships with Python")
    tokenizer: str = mamba.flag("bpe:1024", "as mamba.py's")
    d_model: int = mamba.flag(96, "width")
    n_layer: int = mamba.flag(2, "layers")
    steps: int = mamba.flag(500, "steps")
    batch: int = mamba.flag(16, "sequences a step")
    length: int = mamba.flag(64, "tokens a window")
    lr: float = mamba.flag(4e-3, "peak learning rate")
    eval_tokens: int = mamba.flag(0, "validation tokens, 0 for all")


SMOKE = {"tokenizer": "byte", "d_model": 16, "steps": 4, "batch": 4, "length": 16}
SMOKE |= {"eval_tokens": 300}
WAYS = {"from nothing": False, "carried": True}  # of evaluating: is the state carried?
TRAINED = {  # how: are the windows in the text's order, and is the state carried?
    "from nothing, shuffled": (False, False),
    "from nothing, in order": (True, False),
    "carried, in order": (True, True),
}


def in_order(tokens: np.ndarray, batch: int, length: int) -> np.ndarray:
    """Where windows begin, (windows, batch): each row reads its own stretch."""
    windows = (len(tokens) - 1) // batch // length
    return (np.arange(windows)[:, None] + windows * np.arange(batch)) * length


def train_in_order(model: mamba.Mamba, corpus: mamba.Corpus, config, carry: bool) -> None:
    """mamba.py's steps, but on windows in the text's order, with the state carried on or not."""
    optimizer, state = mamba.make_optimizer(model, config), None
    device = model.lm_head.weight.device
    order = in_order(corpus.train, config.batch, config.length)
    for step in range(config.steps):
        offsets = order[step % len(order)]
        x, y, _ = mamba.read_windows(corpus, corpus.train, offsets, config, device)
        before = state if carry and step % len(order) else None
        loss, state = model(x, before, return_state=True, targets=y)
        state = [(window.detach(), h.detach()) for window, h in state]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = mamba.learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss_by_position(model, corpus: mamba.Corpus, config: mamba.Config, carry: bool) -> list:
    """Mean loss (nats a token) at each position of a window, over the validation text.

    It is read in config.batch contiguous stretches, with the state carried on or not.
    """
    device, state = model.lm_head.weight.device, None
    total = torch.zeros(config.length, dtype=torch.float64)
    order = in_order(corpus.valid, config.batch, config.length)
    for offsets in order:
        x, y, _ = mamba.read_windows(corpus, corpus.valid, offsets, config, device)
        logits, state = model(x, state if carry else None, return_state=True)
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        total += losses.view(y.shape).sum(0).double().cpu()
    return (total / order.size).tolist()


def run(s: Settings, corpus: mamba.Corpus, ordered: bool, carried: bool, seed: int) -> dict:
    """One model, trained in order or not and carried or not: its loss, evaluated in each way."""
    model, config = model_of(s, corpus, seed)
    if ordered:
        train_in_order(model, corpus, config, carried)
    else:
        train_on_text(model, corpus, config)
    return {way: loss_by_position(model, corpus, config, carry) for way, carry in WAYS.items()}


def spans(length: int) -> dict[str, slice]:
    """The stretches of a window that the table has, by name."""
    cuts = [0, *(c for c in (1, 4, 16) if c < length), length]
    names = [f"{a + 1}" if b == a + 1 else f"{a + 1}–{b}" for a, b in itertools.pairwise(cuts)]
    return dict(zip(names, map(slice, cuts, cuts[1:]), strict=False)) | {"all": slice(0, length)}


def summarise(s: Settings, runs: list[dict]) -> dict:
    """For each way of evaluating, mean and s.d. of the loss in each stretch, and the curves."""
    found = {}
    for way in WAYS:
        curves = [run[way] for run in runs]
        losses = {}
        for name, part in spans(s.length).items():
            losses[name] = mean_sd([sum(c[part]) / len(c[part]) for c in curves])
        found[way] = {"loss": losses, "by_position": curves}
    return found


def table(result: dict) -> str:
    """The README's table."""
    rows, names = [], spans(result["settings"]["length"])
    for trained, arm in result["trained"].items():
        for way in WAYS:
            scores = [plus_minus(score, 3) for score in arm[way]["loss"].values()]
            rows.append([trained, way, *scores])
    head = [f"position {name}" if name != "all" else "all" for name in names]
    return markdown(["trained", "evaluated", *head], rows, left=2)


def draw(result: dict, plt, path) -> None:
    """Loss by position, mean and range over the seeds."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (trained, arm) in enumerate(result["trained"].items()):
        for way, style in zip(WAYS, ("--", "-"), strict=True):
            at = list(zip(*arm[way]["by_position"], strict=True))
            x, label = range(1, len(at) + 1), f"trained {trained}, evaluated {way}"
            axes.plot(x, [sum(v) / len(v) for v in at], style, color=f"C{i}", lw=1.3, label=label)
            axes.fill_between(x, [*map(min, at)], [*map(max, at)], color=f"C{i}", alpha=0.15)
    axes.set(xlabel="position in the window", ylabel="validation loss, nats a token")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Train in either way, write the result file and the picture, print the table."""
    s, asked = parse(__doc__, Settings, None, SMOKE, argv)
    began, arms = time.perf_counter(), {}
    corpus = mamba.load_corpus(s.data, s.tokenizer)
    corpus.valid = corpus.valid[: s.eval_tokens or None]
    for trained, (ordered, carried) in TRAINED.items():
        arm = summarise(s, [run(s, corpus, ordered, carried, seed) for seed in asked.seeds])
        arms[trained] = arm
        shown = " · ".join(f"{way} {arm[way]['loss']['all']['mean']:.3f}" for way in WAYS)
        print(f"{time.perf_counter() - began:5.0f} s  trained {trained}: {shown}", flush=True)
    content = {"unit": "nats a token", "tokens_seen": s.steps * s.batch * s.length}
    content["trained"] = arms
    print(table(finish("carried_state", asked, s, began, content, draw)))


if __name__ == "__main__":
    main()
