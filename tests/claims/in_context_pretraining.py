"""Does the order of the documents teach a model to use its context? All arms at equal tokens, from equal starts.

    python tests/claims/in_context_pretraining.py                                  all arms, seeds 1 to 5
    python tests/claims/in_context_pretraining.py --seeds 1 --arms standard sorted  adds these to what is there

The documents are the functions of Python's standard library; every tenth module is held out, duplicates were dropped
over all of them together. Arms: standard (shuffled), knn (each document before its ten nearest, with repeats), cluster,
sorted (the paper's walk), sorted without deduplication, and standard with attention kept within documents. Settings
were chosen on seed 0. Runs are kept in --runs, so that a stopped program goes on; the result file holds all of them.

Naming: six functions of two held-out modules, each followed by an arbitrary word for its module, and one more function:
how often is the right word the likelier one of the two? Chance is a half.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import iclm_sort  # noqa: E402

ARMS = {
    "standard": ("random", True, False),  # order, deduplicated, attention within documents
    "knn": ("knn", True, False),
    "cluster": ("cluster", True, False),
    "sorted": ("paper", True, False),
    "sorted, duplicates kept": ("paper", False, False),
    "standard, within documents": ("random", True, True),
}
SCORES = {
    "training_loss": "training loss, last tenth",
    "random_order_loss": "held out, random order (the paper's protocol)",
    "related_order_loss": "held out, related order",
    "no_context_loss": "no context",
    "related_context_gain": "**context gain**, related",
    "unrelated_context_gain": "context gain, unrelated",
    "naming_accuracy": "naming accuracy (chance 0.5)",
}


def naming(model, done, graph, config, shots: int = 3, body: int = 48, tasks: int = 200) -> float:
    """Share of tasks in which the right one of two words is the likelier; see the top."""
    rng, separator = np.random.default_rng(0), done.vocabulary["document_separator"]
    by_label = {}
    for i in graph.nodes():
        if len(done.tokens[i]) >= body:
            by_label.setdefault(done.labels[i], []).append(i)
    labels = sorted(label for label, found in by_label.items() if len(found) > shots)
    rows, right, words = [], [], (ord("A"), ord("B"))  # ids below 256 are single bytes
    for _ in range(tasks):
        pair = [labels[j] for j in rng.choice(len(labels), 2, replace=False)]
        chosen = [rng.choice(by_label[label], shots + 1, replace=False) for label in pair]
        examples = [(side, chosen[side][shot]) for side in (0, 1) for shot in range(shots)]
        row = []
        for side, i in [examples[j] for j in rng.permutation(len(examples))]:
            row += [*done.tokens[i][:body].tolist(), separator, words[side], separator]
        right.append(int(rng.integers(2)))
        rows.append([*row, *done.tokens[chosen[right[-1]][shots]][:body].tolist(), separator])
    with torch.inference_mode():
        logits = model(torch.tensor(rows))[:, -1] @ model.embedding.weight[list(words)].T
    return float((logits.argmax(1) == torch.tensor(right)).float().mean())


def run_arm(name: str, seed: int, done, graphs: dict, config: iclm_sort.Config) -> dict:
    """All scores of one arm and seed."""
    order, deduplicated, masked = ARMS[name]
    config, separator = dataclasses.replace(config, seed=seed), done.vocabulary["document_separator"]
    train, held_out = graphs[deduplicated]
    path = iclm_sort.traverse(train, order, "static", seed, done.x)
    contexts, starts = iclm_sort.pack(done.tokens, path, config.context_length, separator)
    losses = []

    class Log:
        """Takes the training loss as train_arm logs it."""

        write, flush = staticmethod(lambda line: losses.append(json.loads(line)["loss"])), staticmethod(lambda: None)

    began = time.perf_counter()
    model = iclm_sort.train_arm(name, contexts, starts if masked else None, config, done.vocabulary["vocab_size"], Log)
    held = iclm_sort.hold_out(done, dataclasses.replace(config, seed=0), graphs[True][1])
    scores = iclm_sort.judge(model, held) | {"training_loss": losses[-1]}
    scores["naming_accuracy"] = naming(model, done, graphs[True][1], config)
    return {
        "arm": name,
        "seed": seed,
        "contexts": len(contexts),
        "seconds": round(time.perf_counter() - began, 1),
    } | scores


def summary(rows: list[dict]) -> dict:
    """Mean and standard deviation of each score of each arm, and of its difference from standard with the same seed."""
    found = {}
    for name in ARMS:
        mine = {row["seed"]: row for row in rows if row["arm"] == name}
        standard = {row["seed"]: row for row in rows if row["arm"] == "standard"}
        if not mine:
            continue
        found[name] = {"seeds": sorted(mine)}
        for score in SCORES:
            values = [row[score] for row in mine.values()]
            apart = [row[score] - standard[seed][score] for seed, row in mine.items() if seed in standard]
            found[name][score] = {
                "mean": statistics.mean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
            }
            if apart:
                spread = statistics.stdev(apart) if len(apart) > 1 else 0.0
                found[name][score] |= {"minus_standard": statistics.mean(apart), "sd_of_difference": spread}
        places = next(iter(mine.values()))["no_context_loss_at"]
        found[name]["no_context_loss_at"] = {
            at: statistics.mean(r["no_context_loss_at"][at] for r in mine.values()) for at in places
        }
    return found


def table(found: dict) -> str:
    """The README's table: nats a token."""
    lines = ["| nats a token | " + " | ".join(found) + " |", "| --- |" + " ---: |" * len(found)]
    for score, label in SCORES.items():
        cells = [f"{arm[score]['mean']:.3f} ± {arm[score]['sd']:.3f}" for arm in found.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for at in next(iter(found.values()))["no_context_loss_at"]:
        cells = [f"{arm['no_context_loss_at'][at]:.3f}" for arm in found.values()]
        lines.append(f"| no context, tokens {at} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: dict, path: Path) -> None:
    """Differences from standard, paired by seed, with their standard deviations."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    parts = (("random_order_loss", "no_context_loss"), ("related_context_gain", "unrelated_context_gain"))
    for ax, scores in zip(axes, parts, strict=True):
        for i, score in enumerate(scores):
            names = [name for name in found if name != "standard" and "minus_standard" in found[name][score]]
            at = np.arange(len(names)) + 0.38 * i
            values = [found[name][score]["minus_standard"] for name in names]
            spread = [found[name][score]["sd_of_difference"] for name in names]
            ax.barh(at, values, 0.36, xerr=spread, label=score.replace("_", " "))
        ax.set_yticks(np.arange(len(names)) + 0.19, names)
        ax.axvline(0, color="0.4", lw=0.8)
        ax.legend(fontsize=8)
    axes[0].set(xlabel="loss minus standard's, nats (left is better)")
    axes[1].set(xlabel="gain minus standard's, nats (right is better)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run what is missing, write the result file and the picture, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="default: 1 2 3 4 5")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="default: all")
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps of a run (default: 600)")
    parser.add_argument(
        "--lr", type=float, default=iclm_sort.Config.lr, help="peak learning rate (default: the script's)"
    )
    parser.add_argument("--runs", type=Path, default=Path("out/in_context_pretraining"), help="folder of single runs")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for result and picture")
    arguments = parser.parse_args()
    config = iclm_sort.Config(
        steps=arguments.steps, lr=arguments.lr, out=str(arguments.runs), resume=True, device="cpu"
    )
    done = iclm_sort.run_stages(config, iclm_sort.start(config))
    whole = dataclasses.replace(done, graph=iclm_sort.build_graph(done.similarity, done.index))
    graphs = {True: iclm_sort.split(done), False: iclm_sort.split(whole)}
    iclm_sort.keep_memory()
    path = arguments.runs / f"runs-{arguments.steps}-{arguments.lr:g}.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
    for seed in arguments.seeds:
        for name in arguments.arms:
            if not any((row["arm"], row["seed"]) == (name, seed) for row in rows):
                rows.append(run_arm(name, seed, done, graphs, config))
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    rows = [row for row in rows if row["seed"] in arguments.seeds]
    found = summary(rows)
    documents = {"training": int(graphs[True][0].keep.sum()), "held_out": int(graphs[True][1].keep.sum())}
    documents["duplicates_dropped"] = int((~done.graph.keep).sum())
    result = {"command": "python tests/claims/in_context_pretraining.py", "summary": found, "documents": documents}
    result |= {"tokens_a_run": config.steps * config.batch * config.context_length, "runs": rows}
    result |= iclm_sort.result_record(dataclasses.replace(config, out="out"), torch.device("cpu"))
    result["argv"] = ["tests/claims/in_context_pretraining.py", *sys.argv[1:]]
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "in_context_pretraining.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    draw(found, arguments.results / "in_context_pretraining.png")
    print(table(found))


if __name__ == "__main__":
    main()
