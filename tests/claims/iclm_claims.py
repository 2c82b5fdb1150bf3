"""Does the order of the documents teach a model to use its context? All arms at equal tokens.

    python tests/claims/iclm_claims.py                       all arms, seeds 1 to 5
    python tests/claims/iclm_claims.py --seeds 1 --arms standard sorted
    python tests/claims/iclm_claims.py --larger --seeds 1 2 3 --arms standard sorted

The documents are the functions of Python's standard library, without near-duplicates; whole
modules, a tenth of the documents, are held out. Arms: standard (shuffled), knn (each document
before its ten nearest, with repeats), cluster, sorted (the paper's walk), sorted with duplicates
kept, and standard with attention kept within documents. All start from equal weights. Settings were
chosen on seed 0. Runs are kept in --runs, so that a stopped program goes on; the result file holds
all of them. --larger: four times the parameters and the steps, in a result file of its own.

Naming: six functions of two held-out modules, each followed by an arbitrary word for its module,
and one more function: how often is the right word the likelier one of the two? Chance is a half.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import iclm_sort  # noqa: E402
import mamba  # noqa: E402

ARMS = ("standard", "knn", "cluster", "sorted", "sorted, duplicates kept")
ARMS += ("standard, within documents",)
SCORES = {
    "training_loss": "training loss, last tenth",
    "random_order_loss": "held out, random order (the paper's protocol)",
    "no_context_loss": "no context",
    "related_context_gain": "**context gain**, related",
    "unrelated_context_gain": "context gain, unrelated",
    "naming_accuracy": "naming accuracy (chance 0.5)",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of every run."""

    documents: int = 0  # 0: all
    vocabulary: str = "bpe:1024"
    length: int = 512
    steps: int = 600
    batch: int = 4
    d_model: int = 96
    n_layer: int = 2
    n_head: int = 4
    lr: float = 4e-3


SMOKE = Settings(300, "byte", length=128, steps=4, d_model=16)
LARGER = Settings(steps=2400, d_model=192, n_head=8, lr=2e-3)


class CausalLM(nn.Module):
    """A small language model like LLaMA: RMSNorm, rotary positions, attention, GELU, tied head."""

    def __init__(self, settings: Settings, vocab_size: int):
        super().__init__()
        d, self.heads = settings.d_model, settings.n_head
        linear = functools.partial(nn.Linear, bias=False)
        self.embedding, self.norm = nn.Embedding(vocab_size, d), nn.RMSNorm(d)
        self.layers = nn.ModuleList()
        for _ in range(settings.n_layer):
            mlp = nn.Sequential(nn.RMSNorm(d), linear(d, 4 * d), nn.GELU(), linear(4 * d, d))
            parts = [nn.RMSNorm(d), linear(d, 3 * d), linear(d, d), mlp]
            self.layers.append(nn.ModuleList(parts))
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) of tokens (B, L); mask (B, 1, L, L) bool, by default the causal one."""
        x, (B, L) = self.embedding(tokens), tokens.shape
        half = x.shape[-1] // self.heads // 2
        frequencies = 10000.0 ** (-torch.arange(half, device=x.device) / half)
        angles = torch.arange(L, device=x.device)[:, None] * frequencies
        turns = torch.polar(torch.ones_like(angles), angles)  # (L, d / 2) complex
        for norm, qkv, out, mlp in self.layers:
            q, k, v = qkv(norm(x)).view(B, L, 3, self.heads, 2 * half).permute(2, 0, 3, 1, 4)
            q, k = rotate(q, turns), rotate(k, turns)  # (B, H, L, d)
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
            x = x + out(y.transpose(1, 2).flatten(2))
            x = x + mlp(x)
        return self.norm(x) @ self.embedding.weight.T


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions: each pair of components of x (B, H, L, d) times a complex number."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)


class WithinDocuments(CausalLM):
    """In training no document sees another one; a document ends with a separator."""

    separator = 0

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.training:
            return super().forward(tokens)
        ends = tokens == self.separator
        document = ends.cumsum(1) - ends.long()  # a separator belongs to the document it ends
        same = document[:, None, :, None] == document[:, None, None, :]
        return super().forward(tokens, same.tril())


def train_arm(
    name: str, contexts: np.ndarray, settings: Settings, seed: int, vocab_size: int, kind=CausalLM
) -> tuple[CausalLM, list[float]]:
    """A model trained on contexts (m, L), shuffled anew each epoch, and the loss of each step.

    Every arm of a seed starts alike. Raises FloatingPointError for a loss that is not finite.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model, losses = kind(settings, vocab_size), []
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == whole], "weight_decay": decay}
        for whole, decay in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, settings.lr, betas=(0.9, 0.95))
    epochs = math.ceil(settings.steps * settings.batch / len(contexts))
    rows = np.concatenate([rng.permutation(len(contexts)) for _ in range(epochs)])
    for step in iclm_sort.progress(f"{name}, seed {seed}", range(settings.steps), settings.steps):
        batch = contexts[rows[step * settings.batch :][: settings.batch]]
        tokens = torch.from_numpy(batch.astype(np.int64))
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        if not loss.isfinite():
            raise FloatingPointError(f"{name} diverged at step {step + 1}: loss {loss}; lower --lr")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm = (step + 1) / max(1, settings.steps // 20)
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / settings.steps))  # from 1 to 0.1
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(warm, cosine)
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


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


def make_tasks(
    tokens, graph: iclm_sort.Graph, separator: int, length: int, seed: int, most=400
) -> dict:
    """What models are judged by: token ids of the held-out documents, whose graph is given.

    random_order (m, L): contexts of documents in random order, the paper's protocol. no_context
    (t, 1 + T): a separator and the first T tokens of a document. related_context and
    unrelated_context (t, L): the same after other documents, the most similar last, or any.
    """
    rng, target = np.random.default_rng(seed), min(64, length // 4)
    documents = rng.permutation(np.flatnonzero(graph.keep))
    chosen = [i for i in documents if len(graph.row(i)) and len(tokens[i]) >= target > 0]
    if separator is None or not chosen:
        rule = f"a separator, and one of {target} tokens or more that has a neighbour"
        raise ValueError(f"cannot judge by {len(documents)} held-out documents; it takes {rule}")
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
    tasks["random_order"] = iclm_sort.pack(tokens, documents, length, separator)[
        : 1 + 65536 // length
    ]
    return {name: np.array(rows, np.int64) for name, rows in tasks.items()}


@torch.inference_mode()
def judge(model: CausalLM, tasks: dict[str, np.ndarray]) -> dict[str, float]:
    """Nats a token of each task; a context gain is what the documents before take off the loss."""
    scores, device = {}, model.norm.weight.device
    for name, rows in tasks.items():
        last = rows.shape[1] - 1 if name == "random_order" else tasks["no_context"].shape[1] - 1
        nats = []
        for tokens in torch.from_numpy(rows).to(device).split(8):
            logits = model(tokens[:, :-1])[:, -last:]
            nats.append(F.cross_entropy(logits.mT, tokens[:, -last:], reduction="none"))
        scores[f"{name}_loss"] = torch.cat(nats).mean().item()
    for name in ("related_context", "unrelated_context"):
        scores[f"{name}_gain"] = scores["no_context_loss"] - scores[f"{name}_loss"]
    return scores


@torch.inference_mode()
def naming(model, tokens, labels, held, separator, shots=3, body=48, tasks=200) -> float:
    """Share of tasks in which the right one of two words is the likelier; see the top."""
    rng, by_label = np.random.default_rng(0), {}
    for i in np.flatnonzero(held):
        if len(tokens[i]) >= body:
            by_label.setdefault(labels[i], []).append(i)
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
            row += [*tokens[i][:body], separator, words[side], separator]
        right.append(int(rng.integers(2)))
        rows.append([*row, *tokens[chosen[right[-1]][shots]][:body], separator])
    logits = model(torch.from_numpy(np.array(rows, np.int64)))[:, -1, list(words)]
    return float((logits.argmax(1) == torch.tensor(right)).float().mean())


@dataclasses.dataclass
class Corpus:
    """The documents, their neighbours without near-duplicates and with them, and the tasks."""

    tokens: list[np.ndarray]
    x: np.ndarray  # (n, d)
    labels: np.ndarray  # (n,)
    vocab_size: int
    separator: int
    lists: tuple  # similarities, ids (n, k), keep (n,)
    all_lists: tuple
    held: np.ndarray  # (n,) bool
    tasks: dict


def read_corpus(settings: Settings) -> Corpus:
    """All that does not depend on the seed."""
    documents = list(iclm_sort.python_functions())[: settings.documents or None]
    texts, labels = [text for text, _ in documents], np.array([label for _, label in documents])
    tokenizer = mamba.load_tokenizer(settings.vocabulary, texts)
    tokens = [np.array(tokenizer.encode(text), np.uint16) for text in texts]
    x = iclm_sort.embed_documents(texts)
    lists = iclm_sort.distinct_neighbours(x, 10, 0.95)
    all_lists = iclm_sort.distinct_neighbours(x, 10, 2.0)
    held = hold_out(labels, lists[2])
    graph = iclm_sort.build_graph(*lists[:2], lists[2] & held)
    tasks = make_tasks(tokens, graph, tokenizer.separator, settings.length, seed=0)
    rest = (lists, all_lists, held, tasks)
    return Corpus(tokens, x, labels, tokenizer.vocab_size, tokenizer.separator, *rest)


def order_of(name: str, corpus: Corpus, seed: int) -> np.ndarray:
    """The order of the training documents in an arm."""
    lists = corpus.all_lists if name == "sorted, duplicates kept" else corpus.lists
    graph = iclm_sort.build_graph(*lists[:2], lists[2] & ~corpus.held)
    if name == "cluster":
        return clustered(corpus.x, np.flatnonzero(graph.keep), seed)
    order = {"knn": "knn", "sorted": "paper", "sorted, duplicates kept": "paper"}.get(
        name, "random"
    )
    return iclm_sort.traverse(graph, order, seed)


def clustered(x: np.ndarray, documents: np.ndarray, seed: int) -> np.ndarray:
    """Groups of about 32 by k-means, in random order, each shuffled."""
    rng, part = np.random.default_rng(seed), torch.from_numpy(x[documents])
    centres = iclm_sort.k_means(part, math.ceil(len(documents) / 32), seed)
    group = iclm_sort.nearest_centre(part, centres).numpy()
    place = rng.permutation(len(centres))[group]
    return documents[np.lexsort((rng.permutation(len(documents)), place))]


def run_arm(name: str, seed: int, corpus: Corpus, settings: Settings) -> dict:
    """All scores of one arm and seed."""
    began, order = time.perf_counter(), order_of(name, corpus, seed)
    contexts = iclm_sort.pack(corpus.tokens, order, settings.length, corpus.separator)
    WithinDocuments.separator = corpus.separator
    kind = WithinDocuments if name == "standard, within documents" else CausalLM
    model, losses = train_arm(name, contexts, settings, seed, corpus.vocab_size, kind)
    scores = judge(model, corpus.tasks)
    scores["training_loss"] = statistics.mean(losses[-max(1, settings.steps // 10) :])
    held = corpus.held & corpus.lists[2]
    scores["naming_accuracy"] = naming(model, corpus.tokens, corpus.labels, held, corpus.separator)
    seconds = round(time.perf_counter() - began, 1)
    return {"arm": name, "seed": seed, "contexts": len(contexts), "seconds": seconds} | scores


def summary(rows: list[dict]) -> dict:
    """Mean and deviation of each score of each arm, and of its difference from standard's seed."""
    found = {}
    for name in ARMS:
        mine = {row["seed"]: row for row in rows if row["arm"] == name}
        standard = {row["seed"]: row for row in rows if row["arm"] == "standard"}
        if not mine:
            continue
        found[name] = {"seeds": sorted(mine)}
        for score in SCORES:
            values = [row[score] for row in mine.values()]
            apart = [
                row[score] - standard[seed][score] for seed, row in mine.items() if seed in standard
            ]
            found[name][score] = {
                "mean": statistics.mean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
            }
            if apart:
                spread = statistics.stdev(apart) if len(apart) > 1 else 0.0
                found[name][score] |= {
                    "minus_standard": statistics.mean(apart),
                    "sd_of_difference": spread,
                }
    return found


def table(found: dict) -> str:
    """The README's table: nats a token."""
    lines = ["| nats a token | " + " | ".join(found) + " |", "| --- |" + " ---: |" * len(found)]
    for score, label in SCORES.items():
        cells = [f"{arm[score]['mean']:.3f} ± {arm[score]['sd']:.3f}" for arm in found.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: dict, path: Path) -> None:
    """Differences from standard, paired by seed, with their standard deviations."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    parts = (
        ("random_order_loss", "no_context_loss"),
        ("related_context_gain", "unrelated_context_gain"),
    )
    for ax, scores in zip(axes, parts, strict=True):
        for i, score in enumerate(scores):
            names = [
                name
                for name in found
                if name != "standard" and "minus_standard" in found[name][score]
            ]
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


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, write the result file and the picture, print the table."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    text = "default: 1 2 3 4 5"
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help=text)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, help="default: all")
    parser.add_argument("--lr", type=float, default=0.0, help="peak rate; 0: that of the settings")
    parser.add_argument("--larger", action="store_true", help="four times the model and the steps")
    parser.add_argument("--smoke", action="store_true", help="seconds, to see that it works")
    runs = Path("out/in_context_pretraining")
    parser.add_argument("--runs", type=Path, default=runs, help="folder of single runs")
    text = "folder for result and picture"
    parser.add_argument("--results", type=Path, default=HERE / "results", help=text)
    arguments = parser.parse_args(argv)
    settings = SMOKE if arguments.smoke else LARGER if arguments.larger else Settings()
    if arguments.lr:
        settings = dataclasses.replace(settings, lr=arguments.lr)
    corpus = read_corpus(settings)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    path = arguments.runs / f"runs-{key}.jsonl"
    rows = []
    if path.is_file():
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for seed in arguments.seeds:
        for name in arguments.arms:
            if not any((row["arm"], row["seed"]) == (name, seed) for row in rows):
                rows.append(run_arm(name, seed, corpus, settings))
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(json.dumps(rows[-1]), flush=True)
    rows = [row for row in rows if row["seed"] in arguments.seeds]
    found, keep = summary(rows), corpus.lists[2]
    result = {
        "command": "python tests/claims/iclm_claims.py",
        "argv": sys.argv,
        "summary": found,
        "documents": {
            "training": int((keep & ~corpus.held).sum()),
            "held_out": int((keep & corpus.held).sum()),
            "duplicates_dropped": int((~keep).sum()),
        },
        "tokens_a_run": settings.steps * settings.batch * settings.length,
        "settings": dataclasses.asdict(settings),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "script_sha256": hashlib.sha256(Path(iclm_sort.__file__).read_bytes()).hexdigest(),
        "runs": rows,
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    name = "in_context_pretraining_larger" if arguments.larger else "in_context_pretraining"
    (arguments.results / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    draw(found, arguments.results / f"{name}.png")
    print(table(found))


if __name__ == "__main__":
    main()
