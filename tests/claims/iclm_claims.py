"""Does the order of the documents teach a model to use its context? All arms at equal tokens.

    python tests/claims/iclm_claims.py                       all arms, seeds 1 to 5
    python tests/claims/iclm_claims.py --seeds 1 --arms standard sorted
    python tests/claims/iclm_claims.py --larger --seeds 1 2 3 --arms standard sorted

The documents are the functions of Python's standard library, without near-duplicates; whole
modules, a tenth of the documents, are held out. Arms: standard (shuffled), knn (each document
before its ten nearest, with repeats), cluster, sorted (the paper's walk), sorted with duplicates
kept, and standard with attention kept within documents. All start from equal weights. Settings were
chosen on seed 0. Runs that the result file has, of this iclm_sort.py and these settings, are not
made again. --larger: four times the parameters and the steps, in a result file of its own.

Naming: six functions of two held-out modules, each followed by an arbitrary word for its module,
and one more function: how often is the right word the likelier one of the two? Chance is a half.
"""

import argparse
import dataclasses
import functools
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
from torch import Tensor, nn

import iclm_sort
import mamba

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


def same_document(tokens: Tensor, separator: int) -> Tensor:
    """A causal mask (B, 1, L, L), in which no document of tokens (B, L) sees another one."""
    ends = tokens == separator
    document = ends.cumsum(1) - ends.long()  # a separator belongs to the document it ends
    return (document[:, None, :, None] == document[:, None, None, :]).tril()


def train(model, contexts: np.ndarray, settings: Settings, seed: int, within=None) -> list[float]:
    """Train on contexts (m, L), shuffled anew each epoch. Returns the loss of each step.

    within: the separator, where no document is to see another one.
    """
    rng, losses = np.random.default_rng(seed), []
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1}]
    groups += [{"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, settings.lr, betas=(0.9, 0.95))
    epochs = math.ceil(settings.steps * settings.batch / len(contexts))
    rows = np.concatenate([rng.permutation(len(contexts)) for _ in range(epochs)])
    for step in iclm_sort.progress("train", range(settings.steps), settings.steps):
        batch = contexts[rows[step * settings.batch :][: settings.batch]]
        tokens = torch.from_numpy(batch.astype(np.int64))
        x, y = tokens[:, :-1], tokens[:, 1:]
        mask = None if within is None else same_document(x, within)
        loss = F.cross_entropy(model(x, mask).flatten(0, 1), y.flatten())
        if not loss.isfinite():
            raise FloatingPointError(f"training diverged at step {step + 1}: loss {loss}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm = (step + 1) / max(1, settings.steps // 20)
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / settings.steps))  # from 1 to 0.1
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(warm, cosine)
        optimizer.step()
        losses.append(loss.item())
    return losses


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
def judge(model: CausalLM, tasks: dict[str, np.ndarray]) -> dict[str, float]:
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
def naming(model: CausalLM, corpus: SimpleNamespace, shots=3, body=48, tasks=200) -> float:
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


def read_corpus(settings: Settings) -> SimpleNamespace:
    """Documents, their neighbours with and without near-duplicates, and the tasks, for all seeds.

    lists and all_lists are similarities, ids (n, k) and keep (n,); held (n,): what is held out.
    """
    documents = list(iclm_sort.python_functions())[: settings.documents or None]
    texts, labels = [text for text, _ in documents], np.array([label for _, label in documents])
    tokenizer = mamba.load_tokenizer(settings.vocabulary, texts)
    sizes = {"vocab_size": tokenizer.vocab_size, "separator": tokenizer.separator}
    corpus = SimpleNamespace(labels=labels, **sizes)
    corpus.tokens = [np.array(tokenizer.encode(text), np.uint16) for text in texts]
    corpus.x = iclm_sort.embed_documents(texts)
    corpus.lists = iclm_sort.distinct_neighbours(corpus.x, 10, 0.95)
    corpus.all_lists = iclm_sort.distinct_neighbours(corpus.x, 10, 2.0)
    similarities, ids, keep = corpus.lists
    corpus.held = hold_out(labels, keep)
    graph = iclm_sort.build_graph(similarities, ids, keep & corpus.held)
    corpus.tasks = make_tasks(corpus.tokens, graph, corpus.separator, settings.length)
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


def run_arm(name: str, seed: int, corpus: SimpleNamespace, settings: Settings) -> dict:
    """All scores of one arm and seed; every arm of a seed starts alike."""
    began, order = time.perf_counter(), order_of(name, corpus, seed)
    contexts = iclm_sort.pack(corpus.tokens, order, settings.length, corpus.separator)
    torch.manual_seed(seed)
    model, within = CausalLM(settings, corpus.vocab_size), None
    if name == WITHIN:
        within = corpus.separator
    losses = train(model, contexts, settings, seed, within)
    scores = judge(model, corpus.tasks)
    scores["training_loss"] = statistics.mean(losses[-max(1, settings.steps // 10) :])
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
    asked, settings, name = parser.parse_args(argv), Settings(), "in_context_pretraining"
    if asked.larger:
        settings, name = LARGER, f"{name}_larger"
    if asked.smoke:
        settings, asked.results = SMOKE, Path("out/claims")
    asked.results.mkdir(parents=True, exist_ok=True)
    path = asked.results / f"{name}.json"
    script = hashlib.sha256(Path(iclm_sort.__file__).read_bytes()).hexdigest()
    result = {"script_sha256": script, "settings": dataclasses.asdict(settings), "runs": []}
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))
        if all(before[key] == result[key] for key in ("script_sha256", "settings")):
            result = before
    corpus, rows = read_corpus(settings), result["runs"]
    keep, held = corpus.lists[2], corpus.held
    result["command"] = "python tests/claims/iclm_claims.py"
    counts = {"training": keep & ~held, "held_out": keep & held, "duplicates_dropped": ~keep}
    result["documents"] = {key: int(found.sum()) for key, found in counts.items()}
    result["tokens_a_run"] = settings.steps * settings.batch * settings.length
    result["torch"], result["threads"] = torch.__version__, torch.get_num_threads()
    for seed, arm in itertools.product(asked.seeds, asked.arms):
        if not any((row["arm"], row["seed"]) == (arm, seed) for row in rows):
            rows.append(run_arm(arm, seed, corpus, settings))
            print(rows[-1], flush=True)
        result["summary"] = summary(rows)
        path.write_text(compact(result) + "\n", "utf-8")
    draw(result["summary"], path.with_suffix(".png"))
    print(table(result["summary"]))


if __name__ == "__main__":
    main()
