"""Does the order of the documents teach a model to use its context? All arms at equal tokens.

    python tests/claims/iclm_claims.py                       all arms, seeds 1 to 5
    python tests/claims/iclm_claims.py --seeds 1 --arms standard sorted
    python tests/claims/iclm_claims.py --larger --seeds 1 2 3 --arms standard sorted

The documents are the functions of Python's standard library, without near-duplicates; whole
modules, a tenth of the documents, are held out. Arms: standard (shuffled), knn (each document
before its ten nearest, with repeats), cluster, sorted (the paper's walk), sorted with duplicates
kept, and standard with attention kept within documents. The model is transformer.py's, trained by
its steps, and all arms start from equal weights. Settings were chosen on seed 0. Runs that the
result file has, of this iclm_sort.py and these settings, are not made again. --larger: four times
the parameters and the steps, in a result file of its own.

Naming: six functions of two held-out modules, each followed by an arbitrary word for its module,
and one more function: how often is the right word the likelier one of the two? Chance is a half.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from _claims import HERE, compact, markdown, mean_sd
from torch import nn

import iclm_sort
import transformer

DUPLICATES, WITHIN = "sorted, duplicates kept", "standard, within documents"
ARMS = ("standard", "knn", "cluster", "sorted", DUPLICATES, WITHIN)
SCORES = {
    "training_loss": "training loss, last tenth",
    "random_order_loss": "held out, random order (the paper's protocol)",
    "no_context_loss": "no context",
    "related_context_gain": "**context gain**, related",
    "unrelated_context_gain": "context gain, unrelated",
    "naming_accuracy": "naming accuracy (chance 0.5)",
}


SIZES = {"d_model": 96, "n_layer": 2, "n_head": 4, "length": 512, "steps": 600, "batch": 4}
SETTINGS = transformer.Config(**SIZES, lr=4e-3, min_lr=4e-4, warmup=0.05)
LARGER = dataclasses.replace(SETTINGS, steps=2400, d_model=192, n_head=8, lr=2e-3, min_lr=2e-4)
SMOKE = dataclasses.replace(SETTINGS, tokenizer="byte", length=128, steps=4, d_model=16)


def hold_out(labels: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Which of the documents to hold out, (n,) bool: whole labels, a tenth of the kept at most.

    Where labels are so few or so large that it is less than a twentieth, every tenth document.
    """
    rng, kept, total = np.random.default_rng(0), np.flatnonzero(keep), 0
    names, label = np.unique(labels, return_inverse=True)
    sizes, held = np.bincount(label[kept], minlength=len(names)), np.zeros(len(names), bool)
    for i in rng.permutation(len(names)):
        if total + sizes[i] <= len(kept) / 10:
            held[i], total = True, total + sizes[i]
    if total < len(kept) / 20:
        return np.isin(np.arange(len(label)), rng.permutation(kept)[::10])
    return held[label]


def make_tasks(tokens, graph, separator: int, length: int, most=400) -> dict[str, np.ndarray]:
    """What models are judged by: token ids of the held-out documents, whose graph is given.

    random_order (m, L): contexts of documents in random order, the paper's protocol. no_context
    (t, 1 + T): a separator and the first T tokens of a document. related_context and
    unrelated_context (t, L): the same after other documents, the most similar last, or any.
    """
    rng, target = np.random.default_rng(0), min(64, length // 4)
    documents = rng.permutation(np.flatnonzero(graph.keep))
    chosen = [i for i in documents if len(graph.row(i)) and len(tokens[i]) >= target]
    tasks = {"no_context": [], "related_context": [], "unrelated_context": []}
    for i in chosen[:most]:
        wanted, near = [separator, *tokens[i][:target]], graph.row(i)
        others = rng.permutation(documents[~np.isin(documents, [i, *near])])
        tasks["no_context"].append(wanted)
        for name, past in (("related", [*near, *others]), ("unrelated", others)):
            row = wanted
            for j in past:
                if len(row) < length:
                    row = [separator, *tokens[j], *row]
            tasks[f"{name}_context"].append(([separator] * length + row)[-length:])
    contexts = iclm_sort.pack(tokens, documents, length, separator)
    tasks["random_order"] = contexts[: 1 + 65536 // length]
    return {name: np.array(rows, np.int64) for name, rows in tasks.items()}


@torch.inference_mode()
def judge(model: nn.Module, tasks: dict[str, np.ndarray]) -> dict[str, float]:
    """Nats a token of each task; a context gain is what the documents before take off the loss."""
    scores = {}
    for name, rows in tasks.items():
        last = rows.shape[1] - 1 if name == "random_order" else tasks["no_context"].shape[1] - 1
        nats = []
        for tokens in torch.from_numpy(rows).split(8):
            logits = model(tokens[:, :-1])[:, -last:]
            nats.append(F.cross_entropy(logits.mT, tokens[:, -last:], reduction="none"))
        scores[f"{name}_loss"] = torch.cat(nats).mean().item()
    for name in ("related_context", "unrelated_context"):
        scores[f"{name}_gain"] = scores["no_context_loss"] - scores[f"{name}_loss"]
    return scores


@torch.inference_mode()
def naming(model: nn.Module, corpus: SimpleNamespace, shots=3, body=48, tasks=200) -> float:
    """Share of tasks in which the right one of two words is the likelier; see the top."""
    rng, by_label, separator = np.random.default_rng(0), {}, corpus.separator
    for i in np.flatnonzero(corpus.held & corpus.lists[2]):
        if len(corpus.tokens[i]) >= body:
            by_label.setdefault(corpus.labels[i], []).append(i)
    names = sorted(label for label, found in by_label.items() if len(found) > shots)
    if len(names) < 2:
        return 0.5
    rows, right, words = [], [], (ord("A"), ord("B"))  # ids below 256 are single bytes
    for _ in range(tasks):
        pair = [names[j] for j in rng.choice(len(names), 2, replace=False)]
        chosen = [rng.choice(by_label[name], shots + 1, replace=False) for name in pair]
        examples = [(side, chosen[side][shot]) for side in (0, 1) for shot in range(shots)]
        row = []
        for side, i in [examples[j] for j in rng.permutation(len(examples))]:
            row += [*corpus.tokens[i][:body], separator, words[side], separator]
        right.append(int(rng.integers(2)))
        rows.append([*row, *corpus.tokens[chosen[right[-1]][shots]][:body], separator])
    logits = model(torch.from_numpy(np.array(rows, np.int64)))[:, -1, list(words)]
    return float((logits.argmax(1) == torch.tensor(right)).float().mean())


def read_corpus(config: transformer.Config) -> SimpleNamespace:
    """Documents, their neighbours with and without near-duplicates, and the tasks, for all seeds.

    lists and all_lists are similarities, ids (n, k) and keep (n,); held (n,): what is held out.
    """
    documents = list(iclm_sort.python_functions())[: 300 if config is SMOKE else None]
    texts, labels = [text for text, _ in documents], np.array([label for _, label in documents])
    tokenizer = transformer.load_tokenizer(config.tokenizer, texts)
    sizes = {"vocab_size": tokenizer.vocab_size, "separator": tokenizer.separator}
    corpus = SimpleNamespace(labels=labels, **sizes)
    corpus.tokens = [np.array(tokenizer.encode(text), np.uint16) for text in texts]
    corpus.x = iclm_sort.embed_documents(texts)
    corpus.lists = iclm_sort.distinct_neighbours(corpus.x, 10, 0.95)
    corpus.all_lists = iclm_sort.distinct_neighbours(corpus.x, 10, 2.0)
    similarities, ids, keep = corpus.lists
    corpus.held = hold_out(labels, keep)
    graph = iclm_sort.build_graph(similarities, ids, keep & corpus.held)
    corpus.tasks = make_tasks(corpus.tokens, graph, corpus.separator, config.length)
    return corpus


def order_of(name: str, corpus: SimpleNamespace, seed: int) -> np.ndarray:
    """The order of the training documents in an arm."""
    similarities, ids, keep = corpus.all_lists if name == DUPLICATES else corpus.lists
    graph = iclm_sort.build_graph(similarities, ids, keep & ~corpus.held)
    if name == "cluster":  # groups of about 32 by k-means, in random order, each shuffled
        documents, rng = np.flatnonzero(graph.keep), np.random.default_rng(seed)
        part = torch.from_numpy(corpus.x[documents])
        centres = iclm_sort.k_means(part, math.ceil(len(documents) / 32), seed)
        group = iclm_sort.nearest_centre(part, centres).numpy()
        place = rng.permutation(len(centres))[group]
        return documents[np.lexsort((rng.permutation(len(documents)), place))]
    orders = {"knn": "knn", "sorted": "paper", DUPLICATES: "paper"}
    return iclm_sort.traverse(graph, orders.get(name, "random"), seed)


def run_arm(name: str, seed: int, corpus: SimpleNamespace, config: transformer.Config) -> dict:
    """All scores of one arm and seed; every arm of a seed starts alike."""
    began, order = time.perf_counter(), order_of(name, corpus, seed)
    contexts = iclm_sort.pack(corpus.tokens, order, config.length, corpus.separator)
    tokens = np.append(contexts, np.uint16(corpus.separator))  # what the last one's end predicts
    about = corpus.vocab_size, corpus.separator, config.length
    packed = transformer.Corpus(tokens, tokens, None, *about)
    config = dataclasses.replace(config, seed=seed, document_resets=name == WITHIN)
    sizes = config.d_model, config.n_layer, config.n_head
    shape = transformer.TransformerConfig(*sizes, vocab_size=corpus.vocab_size)
    torch.manual_seed(seed)
    model = transformer.Transformer(shape)
    optimizer, losses = transformer.make_optimizer(model, config), []
    for step in iclm_sort.progress("train", range(config.steps), config.steps):
        losses.append(transformer.train_step(model, optimizer, packed, config, step)[0])
    scores = judge(model, corpus.tasks)
    scores["training_loss"] = statistics.mean(losses[-max(1, config.steps // 10) :])
    scores["naming_accuracy"] = naming(model, corpus)
    seconds = round(time.perf_counter() - began, 1)
    return {"arm": name, "seed": seed, "contexts": len(contexts), "seconds": seconds} | scores


def summary(rows: list[dict]) -> dict:
    """Mean and deviation of each score of each arm, and of its difference from standard's seed."""
    runs, found = {(row["arm"], row["seed"]): row for row in rows}, {}
    for name in ARMS:
        seeds = sorted(seed for arm, seed in runs if arm == name)
        paired = [seed for seed in seeds if ("standard", seed) in runs]
        for score in SCORES if seeds else ():
            arm = found.setdefault(name, {"seeds": seeds})
            arm[score] = mean_sd([runs[name, seed][score] for seed in seeds])
            if paired:
                apart = [runs[name, i][score] - runs["standard", i][score] for i in paired]
                arm[score]["minus_standard"] = statistics.mean(apart)
                arm[score]["sd_of_difference"] = mean_sd(apart)["sd"]
    return found


def table(found: dict) -> str:
    """The README's table: nats a token."""
    rows = []
    for score, label in SCORES.items():
        cells = [f"{arm[score]['mean']:.3f} ± {arm[score]['sd']:.3f}" for arm in found.values()]
        rows.append([label, *cells])
    return markdown(["nats a token", *found], rows)


def draw(found: dict, path: Path) -> None:
    """Differences from standard, paired by seed, with their standard deviations."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    losses = ("random_order_loss", "no_context_loss")
    gains = ("related_context_gain", "unrelated_context_gain")
    arms = {name: arm for name, arm in found.items() if name != "standard"}
    for ax, scores in zip(axes, (losses, gains), strict=True):
        for i, score in enumerate(scores):
            values = [arm[score]["minus_standard"] for arm in arms.values()]
            spread = [arm[score]["sd_of_difference"] for arm in arms.values()]
            at = np.arange(len(arms)) + 0.38 * i
            ax.barh(at, values, 0.36, xerr=spread, label=score.replace("_", " "))
        ax.set_yticks(np.arange(len(arms)) + 0.19, list(arms))
        ax.axvline(0, color="0.4", lw=0.8)
        ax.legend(fontsize=8)
    axes[0].set(xlabel="loss minus standard's, nats (left is better)")
    axes[1].set(xlabel="gain minus standard's, nats (right is better)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, write the result file and the picture, print the table."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    seeds = {"nargs": "+", "default": [1, 2, 3, 4, 5], "help": "default: 1 2 3 4 5"}
    parser.add_argument("--seeds", type=int, **seeds)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, help="default: all")
    parser.add_argument("--larger", action="store_true", help="four times the model and the steps")
    parser.add_argument("--smoke", action="store_true", help="tiny, to out/claims: does it run?")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder to write to")
    asked, config, name = parser.parse_args(argv), SETTINGS, "in_context_pretraining"
    if asked.larger:
        config, name = LARGER, f"{name}_larger"
    if asked.smoke:
        config, asked.results = SMOKE, Path("out/claims")
    asked.results.mkdir(parents=True, exist_ok=True)
    path = asked.results / f"{name}.json"
    settings = {key: getattr(config, key) for key in (*SIZES, "tokenizer", "lr", "min_lr")}
    script = hashlib.sha256(Path(iclm_sort.__file__).read_bytes()).hexdigest()
    result = {"script_sha256": script, "settings": settings, "runs": []}
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))
        if all(before[key] == result[key] for key in ("script_sha256", "settings")):
            result = before
    corpus, rows = read_corpus(config), result["runs"]
    keep, held = corpus.lists[2], corpus.held
    result["command"] = "python tests/claims/iclm_claims.py"
    counts = {"training": keep & ~held, "held_out": keep & held, "duplicates_dropped": ~keep}
    result["documents"] = {key: int(found.sum()) for key, found in counts.items()}
    result["tokens_a_run"] = config.steps * config.batch * config.length
    result["torch"], result["threads"] = torch.__version__, torch.get_num_threads()
    for seed, arm in itertools.product(asked.seeds, asked.arms):
        if not any((row["arm"], row["seed"]) == (arm, seed) for row in rows):
            rows.append(run_arm(arm, seed, corpus, config))
            print(rows[-1], flush=True)
        result["summary"] = summary(rows)
        path.write_text(compact(result) + "\n", "utf-8")
    draw(result["summary"], path.with_suffix(".png"))
    print(table(result["summary"]))


if __name__ == "__main__":
    main()
