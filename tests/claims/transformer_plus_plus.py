"""What each "++" part buys: `python tests/claims/transformer_plus_plus.py`, about 20 minutes on two cores.

From the vanilla Transformer to Transformer++, one part exchanged at a time in either direction, at equal parameters
(the MLP's width makes them so), tokens and data order, over seeds: rotary for learned positions, SwiGLU for GELU, and
RMSNorm for LayerNorm with biases. Every arm trains at three peak rates on seed 0, which is not reported, and keeps the
best. Writes results/transformer_plus_plus.json, which the README's table comes from, and a picture beside it.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import transformer  # noqa: E402

VANILLA = {"position": "learned", "mlp": "gelu", "norm": "layernorm"}
PLUS = {"position": "rope", "mlp": "swiglu", "norm": "rmsnorm"}
LABELS = {"position": "rotary positions", "mlp": "SwiGLU", "norm": "RMSNorm, no biases"}
ARMS = {"Transformer": VANILLA}
ARMS |= {f"Transformer + {label}": VANILLA | {part: PLUS[part]} for part, label in LABELS.items()}
ARMS |= {f"Transformer++ without {label}": PLUS | {part: VANILLA[part]} for part, label in LABELS.items()}
ARMS |= {"Transformer++": PLUS}


def equal_parameters(config: transformer.Config, vocab: int) -> transformer.Config:
    """The config with the MLP's width that brings it nearest to the default Transformer++'s parameters."""

    def count(changed: transformer.Config) -> int:
        return sum(p.numel() for p in transformer.make_model(changed, vocab).parameters())

    goal = count(dataclasses.replace(config, **PLUS))
    one, two = (count(dataclasses.replace(config, d_ff=width)) for width in (1, 2))
    return dataclasses.replace(config, d_ff=1 + round((goal - one) / (two - one)))


def train(config: transformer.Config, corpus: transformer.Corpus) -> float:
    """Validation bits a byte of one run by the script's recipe."""
    run = transformer.Run(config, corpus, torch.device("cpu"))
    for _ in range(config.steps):
        run.train_step()
    return transformer.evaluate(run.model, corpus, config)["bits_a_byte"]


def run_arm(name: str, config: transformer.Config, corpus: transformer.Corpus, rates: list, seeds: list) -> dict:
    """One arm: its rate chosen on seed 0, then the seeds."""
    config = equal_parameters(dataclasses.replace(config, **ARMS[name]), corpus.vocab_size)
    tried = {lr: train(dataclasses.replace(config, lr=lr, seed=0), corpus) for lr in rates}
    best = min(tried, key=tried.get)
    scores = [train(dataclasses.replace(config, lr=best, seed=seed), corpus) for seed in seeds]
    model = transformer.make_model(config, corpus.vocab_size)
    arm = {
        "arm": name,
        "parts": ARMS[name],
        "d_ff": config.d_ff,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    arm |= {"lr": best, "tried_on_seed_0": tried, "bits_a_byte": scores}
    return arm | {"mean": statistics.mean(scores), "sd": statistics.stdev(scores) if len(scores) > 1 else 0.0}


def table(arms: list[dict]) -> str:
    """The README's table."""
    vanilla = arms[0]["mean"]
    lines = ["| model | parameters | peak rate | validation bits a byte | against the vanilla one |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for arm in arms:
        score = f"{arm['mean']:.3f} ± {arm['sd']:.3f}"
        lines.append(
            f"| {arm['arm']} | {arm['parameters']:,} | {arm['lr']:g} | {score} | {arm['mean'] - vanilla:+.3f} |"
        )
    return "\n".join(lines)


def draw(arms: list[dict], path: Path) -> None:
    """A bar for each arm, a dot for each seed."""
    import matplotlib.pyplot as plt

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


def main() -> None:
    """Run every arm, write the result file and the picture, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run each (default: 1 2 3)")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="tried on seed 0")
    parser.add_argument("--steps", type=int, default=300, help="steps a run (default: 300)")
    parser.add_argument("--d-model", type=int, default=96, help="width (default: 96)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for result and picture")
    arguments = parser.parse_args()
    began, corpus = time.perf_counter(), transformer.load_corpus("", "bpe:1024")
    transformer.keep_memory()
    sizes = {"d_model": arguments.d_model, "n_layer": 2, "n_head": 4, "batch": 8, "length": 256}
    config = transformer.Config(**sizes, steps=arguments.steps)
    arms = []
    for name in ARMS:
        arms.append(run_arm(name, config, corpus, arguments.rates, arguments.seeds))
        print(f"{name}: {arms[-1]['mean']:.3f} ± {arms[-1]['sd']:.3f} at {arms[-1]['lr']:g}", flush=True)
    result = {"command": "python tests/claims/transformer_plus_plus.py", "seeds": arguments.seeds, "arms": arms}
    device = torch.device("cpu")
    result |= transformer.result_record(config, device, wall_seconds=round(time.perf_counter() - began, 1))
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "transformer_plus_plus.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    draw(arms, arguments.results / "transformer_plus_plus.png")
    print(table(arms))


if __name__ == "__main__":
    main()
