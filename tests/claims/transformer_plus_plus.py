"""What each "++" part buys: `python tests/claims/transformer_plus_plus.py`.

From the vanilla Transformer to Transformer++ (appendix E.2.1 of arXiv 2312.00752), one part
exchanged at a time in either direction, at equal parameters (the MLP's width makes them so), tokens
and data order: rotary for learned positions, SwiGLU for GELU, and RMSNorm for LayerNorm with
biases. Every arm trains at each of the rates on seed 0, which is not reported, and keeps the best.
"""

import statistics
import time
from dataclasses import dataclass, replace

from _claims import device, finish, mamba, markdown, new_model, parse

import transformer


@dataclass(frozen=True)
class Settings:
    """Text, sizes and rates."""

    data: str = mamba.flag("", "as transformer.py's: text to train on and to measure on")
    tokenizer: str = mamba.flag("bpe:1024", "as transformer.py's")
    d_model: int = mamba.flag(96, "width; paper: 768 to 2,048")
    n_layer: int = mamba.flag(2, "layers; paper: 12 to 24")
    n_head: int = mamba.flag(4, "heads; paper: 12 to 32")
    steps: int = mamba.flag(300, "steps; paper: 4,800 and more")
    batch: int = mamba.flag(8, "sequences a step; paper: 256, half a million tokens")
    length: int = mamba.flag(256, "tokens a sequence; paper: 2,048")
    rates: str = mamba.flag("1e-3 2e-3 4e-3", "peak learning rates, tried on seed 0")
    eval_tokens: int = mamba.flag(0, "validation tokens, 0 for all")


SMOKE = {"tokenizer": "byte", "d_model": 16, "n_layer": 1, "steps": 2, "batch": 2, "length": 16}
SMOKE |= {"rates": "1e-3", "eval_tokens": 300}
VANILLA = {"position": "learned", "mlp": "gelu", "norm": "layernorm"}
PLUS = {"position": "rope", "mlp": "swiglu", "norm": "rmsnorm"}
LABELS = {"position": "rotary positions", "mlp": "SwiGLU", "norm": "RMSNorm, no biases"}
ARMS = {"Transformer": VANILLA}
ARMS |= {f"Transformer + {label}": VANILLA | {part: PLUS[part]} for part, label in LABELS.items()}
ARMS |= {
    f"Transformer++ without {label}": PLUS | {part: VANILLA[part]} for part, label in LABELS.items()
}
ARMS |= {"Transformer++": PLUS}


def count(shape: transformer.TransformerConfig) -> int:
    return sum(p.numel() for p in transformer.Transformer(shape).parameters())


def equal_parameters(shape: transformer.TransformerConfig) -> transformer.TransformerConfig:
    """With the MLP's width that brings it nearest to a Transformer++ of the usual width."""
    goal = count(replace(shape, **PLUS))
    one, two = (count(replace(shape, d_ff=width)) for width in (1, 2))
    return replace(shape, d_ff=1 + round((goal - one) / (two - one)))


def train(s: Settings, shape: transformer.TransformerConfig, corpus, lr: float, seed: int) -> float:
    """Validation bits a byte of one run by the script's recipe."""
    names = ("steps", "batch", "length", "eval_tokens")
    config = transformer.Config(**{name: getattr(s, name) for name in names}, lr=lr, seed=seed)
    model = new_model(lambda: transformer.Transformer(shape), seed).to(device())
    optimizer = transformer.make_optimizer(model, config)
    for step in range(s.steps):
        transformer.train_step(model, optimizer, corpus, config, step)
    return transformer.evaluate(model, corpus, config, s.eval_tokens)["bits_a_byte"]


def run_arm(name: str, s: Settings, corpus: transformer.Corpus, seeds: list[int]) -> dict:
    """One arm: its rate chosen on seed 0, then the seeds."""
    sizes = {"vocab_size": corpus.vocab_size, "max_length": s.length}
    shape = transformer.TransformerConfig(s.d_model, s.n_layer, s.n_head, **sizes, **ARMS[name])
    shape = equal_parameters(shape)
    tried = {lr: train(s, shape, corpus, lr, 0) for lr in map(float, s.rates.split())}
    best = min(tried, key=tried.get)
    scores = [train(s, shape, corpus, best, seed) for seed in seeds]
    arm = {"arm": name, "parts": ARMS[name], "d_ff": shape.d_ff, "parameters": count(shape)}
    arm |= {"lr": best, "tried_on_seed_0": tried, "bits_a_byte": scores}
    return arm | {"mean": statistics.mean(scores), "sd": statistics.stdev(scores)}


def table(result: dict) -> str:
    """The README's table."""
    rows, vanilla = [], result["arms"][0]["mean"]
    for arm in result["arms"]:
        score, difference = f"{arm['mean']:.3f} ± {arm['sd']:.3f}", f"{arm['mean'] - vanilla:+.3f}"
        rows.append([arm["arm"], f"{arm['parameters']:,}", f"{arm['lr']:g}", score, difference])
    head = ["model", "parameters", "peak rate", "validation bits a byte", "against the vanilla one"]
    return markdown(head, rows)


def draw(result: dict, plt, path) -> None:
    """A bar for each arm, a dot for each seed."""
    arms = result["arms"]
    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    names, means = [arm["arm"] for arm in arms], [arm["mean"] for arm in arms]
    axes.barh(names, means, color=["C7", *["C0"] * (len(arms) - 2), "C1"], alpha=0.6)
    for i, arm in enumerate(arms):
        axes.plot(arm["bits_a_byte"], [i] * len(arm["bits_a_byte"]), "k.", ms=4)
    scores = [score for arm in arms for score in arm["bits_a_byte"]]
    axes.set(xlabel="validation bits a byte", xlim=(min(scores) - 0.05, max(scores) + 0.02))
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Run every arm, write the result file and the picture, print the table."""
    s, asked = parse(__doc__, Settings, None, SMOKE, argv)
    began, arms = time.perf_counter(), []
    corpus = transformer.load_corpus(s.data, s.tokenizer)
    for name in ARMS:
        arms.append(run_arm(name, s, corpus, asked.seeds))
        took, score = time.perf_counter() - began, f"{arms[-1]['mean']:.3f} ± {arms[-1]['sd']:.3f}"
        print(f"{took:5.0f} s  {name}: {score} at {arms[-1]['lr']:g}", flush=True)
    content = {"tokens_seen": s.steps * s.batch * s.length, "arms": arms}
    print(table(finish("transformer_plus_plus", asked, s, began, content, draw, transformer)))


if __name__ == "__main__":
    main()
