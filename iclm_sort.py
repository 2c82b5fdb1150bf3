"""In-Context Pretraining: sort a corpus so that related documents share a context.

Shi et al., "In-Context Pretraining: Language Modeling Beyond Document Boundaries",
arXiv 2310.10638.

    python iclm_sort.py                       sorts the functions of Python's library: 20 seconds
    python iclm_sort.py --input corpus.jsonl  writes train.bin for mamba.py and transformer.py
    python iclm_sort.py --input corpus/ --encoder contriever/ --context-length 8192

code               shape        paper
x                  (n, d)       E(d): embeddings of the documents, of length 1
similarities, ids  (n, k)       N(d): the most similar other documents of each, and their cosines
graph              n nodes      G: an edge where either document is in the other's list
order              (n_kept,)    P: the path through all documents
contexts           (m, L)       what is trained on: the tokens along the path, cut

Differences from the paper: line 7 of Algorithm 1 prints arg min of the similarity; text and figure
mean arg max, and so do we. Degree is that in the whole graph, k is 10 and near-duplicates have a
cosine of 0.95: the paper says none of the three. Embeddings are TF-IDF unless --encoder or
--embeddings gives others; inverted lists hold whole vectors; `--order edge` is ours. Not included:
training, which is as always (tests/claims/iclm_claims.py compares orders), graph and
walk on many machines, SPLiCe's links and BM25 chains.
"""

from __future__ import annotations

import argparse
import array
import dataclasses
import datetime
import hashlib
import itertools
import json
import math
import os
import re
import sys
import sysconfig
import textwrap
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # threads that wait must soon sleep: tests/bench

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# ----- Neighbours ---------------------------------------------------------------------------------

Search = Callable[[Tensor], tuple[Tensor, Tensor]]  # row numbers (r,) -> similarities, ids (r, k)


def nearest_neighbours(
    x: np.ndarray, k: int, method="auto", recall=0.95, seed=0, device="cpu", rows=None
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of x (n, d) with the largest inner product with each row but itself: N(d).

    method: exact compares all pairs; ivf finds about `recall` of the neighbours by inverted lists;
    auto takes ivf for more than 2.5e9 pairs. rows (r,): whose neighbours to find, by default all.
    The processes of torchrun share them out. Returns similarities (r, k) float32, falling, and ids
    (r, k) int64. Raises ValueError for another method, k outside 1 ... n - 1, or non-finite x.
    """
    if method not in ("auto", "exact", "ivf") or not 1 <= k < len(x):
        raise ValueError(f"method {method!r} and k {k} for {len(x)} documents; see the docstring")
    x = torch.from_numpy(np.require(x, np.float32, ["C", "W"])).to(device)
    if not x.sum().isfinite():
        raise ValueError("every number of the embeddings must be finite")
    rows = torch.arange(len(x)) if rows is None else torch.as_tensor(rows)
    if method == "ivf" or (method == "auto" and len(rows) * len(x) > 2.5e9):
        search, size = ivf_search(x, k, recall, seed)
    else:
        search, size = exact_search(x, k)
    rank, world = processes()
    similarities, ids = torch.zeros(len(rows), k), torch.zeros(len(rows), k, dtype=torch.int64)
    starts = range(rank * size, len(rows), world * size)
    for start in progress("neighbours", starts, len(starts)):
        part = slice(start, start + size)
        similarities[part], ids[part] = search(rows[part].to(device))
    if world > 1:
        dist.all_reduce(similarities)  # the rows of the other processes are 0 here
        dist.all_reduce(ids)
    return similarities.numpy(), ids.numpy()


def exact_search(x: Tensor, k: int) -> tuple[Search, int]:
    """Compare with all. Returns the search, and for how many rows at a time it is meant."""

    def search(rows: Tensor) -> tuple[Tensor, Tensor]:
        similarities = x[rows] @ x.T  # (r, n)
        similarities.scatter_(1, rows[:, None], -math.inf)  # no document is its own neighbour
        return similarities.topk(k)

    most = 1 << 24 if x.device.type == "cpu" else 1 << 28  # similarities that are held at a time
    return search, max(1, most // len(x))


def ivf_search(x: Tensor, k: int, recall: float, seed: int) -> tuple[Search, int]:
    """Inverted lists: k-means cuts the documents into lists, and a query looks into the nearest.

    All queries that look into a list do so together, in one matrix product. Each looks into as many
    as it takes to find `recall` of the true neighbours of 256 documents.
    """
    centres = k_means(x, min(len(x), round(4 * math.sqrt(len(x)))), seed)
    own = nearest_centre(x, centres)  # (n,): the list that each document is in
    members = own.argsort(stable=True)  # the documents, list after list
    by_list, numbers = x[members], torch.arange(len(centres) + 1, device=x.device)
    ends = torch.searchsorted(own[members], numbers).tolist()

    exact = exact_search(x, k)[0]
    sample = np.random.default_rng(seed).choice(len(x), min(len(x), 256), replace=False)
    sample = torch.from_numpy(sample).to(x.device)
    true = torch.cat([exact(part)[1] for part in sample.split(16)])  # (s, k)
    to_lists = x[sample] @ centres.T  # (s, lists)
    rank = (to_lists[:, None] >= to_lists.gather(1, own[true])[:, :, None]).sum(2)  # (s, k)
    probes = int(np.quantile(rank.cpu(), recall, method="inverted_cdf"))

    def search(rows: Tensor) -> tuple[Tensor, Tensor]:
        queries = x[rows]
        lists = [(part @ centres.T).topk(probes).indices for part in queries.split(4096)]
        lists = torch.cat(lists).flatten()  # (r * probes,): the visits of queries to lists
        visits = lists.argsort(stable=True)  # list after list
        visit_ends = torch.searchsorted(lists[visits], numbers).tolist()
        best = x.new_full((len(lists), k + 1), -math.inf)  # + 1: the query may find itself
        ids = torch.full_like(best, -1, dtype=torch.int64)
        for number in range(len(centres)):
            visit = visits[visit_ends[number] : visit_ends[number + 1]]
            part = slice(ends[number], ends[number + 1])
            found = min(k + 1, part.stop - part.start)
            scores = queries[visit // probes] @ by_list[part].T
            best[visit, :found], places = scores.topk(found)
            ids[visit, :found] = members[part][places]
        best, ids = best.view(len(rows), -1), ids.view(len(rows), -1)
        best, places = best.masked_fill_(ids == rows[:, None], -math.inf).topk(k)
        ids = ids.gather(1, places)
        few = best[:, -1].isneginf().nonzero()[:, 0]  # its lists hold fewer than k others
        for part in few.split(16):
            best[part], ids[part] = exact(rows[part])
        return best, ids

    return search, max(1, (1 << 24) // (probes * (k + 1)))


def k_means(x: Tensor, count: int, seed: int) -> Tensor:
    """Unit centres (count, d): six rounds of spherical k-means on 32 rows of x for each."""
    rng = np.random.default_rng(seed)
    sample = x[torch.from_numpy(rng.choice(len(x), min(len(x), 32 * count), replace=False))]
    centres = sample[:count]
    for _ in progress("k-means", range(6), 6):
        sums = torch.zeros_like(centres).index_add_(0, nearest_centre(sample, centres), sample)
        centres = F.normalize(sums, dim=1)
    return centres


def nearest_centre(x: Tensor, centres: Tensor) -> Tensor:
    """For each row of x (n, d) the number of its nearest centre, (n,)."""
    parts = progress("assign to lists", x.split(4096), math.ceil(len(x) / 4096))
    return torch.cat([(part @ centres.T).argmax(1) for part in parts])


# ----- Near-duplicates ----------------------------------------------------------------------------


def drop_duplicates(similarities: np.ndarray, ids: np.ndarray, threshold: float) -> np.ndarray:
    """Which documents stay, (n,) bool, so that in the lists (n, k) no two are `threshold` alike.

    Documents are judged in their order, and one that stays drops later ones: whatever is dropped is
    like something that stays. Raises ValueError for a NaN threshold.
    """
    if math.isnan(threshold):
        raise ValueError(f"threshold {threshold} must be a number")
    row, column = np.nonzero((similarities >= threshold) & (ids >= 0))
    other = ids[row, column]
    pairs = np.unique(np.stack([np.minimum(row, other), np.maximum(row, other)], 1), axis=0)
    keep = np.ones(len(ids), bool)
    for earlier, later in pairs.tolist():  # by the earlier one, which has been judged by then
        if keep[earlier]:
            keep[later] = False
    return keep


def distinct_neighbours(
    x: np.ndarray, k: int, threshold: float, **search
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The neighbours among the documents that stay when near-duplicates are dropped.

    Sixty copies of a document fill one another's lists and hide the rest. So a list that lost a
    member is searched anew among the documents that stay, until none loses any. Returns
    similarities, ids (n, k), -inf and -1 where there are too few, and keep (n,) bool. `search` goes
    to `nearest_neighbours`.
    """
    similarities, ids = np.full((len(x), k), -np.inf, np.float32), np.full((len(x), k), -1)
    keep, todo = np.ones(len(x), bool), np.arange(len(x))
    while len(todo) and keep.sum() > 1:
        kept = np.flatnonzero(keep)
        width = min(k, len(kept) - 1)
        rows = np.searchsorted(kept, todo)
        found, others = nearest_neighbours(x[kept], width, rows=rows, **search)
        similarities[todo, :width], ids[todo, :width] = found, kept[others]
        keep &= drop_duplicates(similarities, ids, threshold)
        gone = (ids >= 0) & ~(keep[ids] & keep[:, None])
        similarities[gone], ids[gone] = -np.inf, -1
        todo = np.flatnonzero(keep & gone.any(1))
    return similarities, ids, keep


# ----- The graph ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graph:
    """Undirected and weighted: indptr[i] to indptr[i + 1] are the edges of document i."""

    indptr: np.ndarray  # (n + 1,) int64
    neighbours: np.ndarray  # (2 edges,) int32, in a huge graph int64; rising within a document
    weights: np.ndarray  # (2 edges,) float32: cosine
    keep: np.ndarray  # (n,) bool: False for a document that was dropped

    def row(self, i: int) -> np.ndarray:
        """The neighbours of document i, the most similar first."""
        part = slice(self.indptr[i], self.indptr[i + 1])
        return self.neighbours[part][np.argsort(-self.weights[part], kind="stable")]


def build_graph(similarities: np.ndarray, ids: np.ndarray, keep: np.ndarray | None = None) -> Graph:
    """Section 2.1: an edge where either of two kept documents is in the other's list (n, k).

    keep (n,) bool is by default all. An id of -1 is no neighbour. Where rounding made the two
    weights of a pair differ, the edge has the larger one.
    """
    n, k = ids.shape
    keep = np.ones(n, bool) if keep is None else np.asarray(keep, bool)
    arc = np.flatnonzero((ids >= 0) & keep[ids] & keep[:, None])
    start, end = arc // k, ids.ravel()[arc]
    pair = np.minimum(start, end) * n + np.maximum(start, end)
    del start, end  # of ten million documents each array here takes a gigabyte
    order = np.argsort(pair)
    pair, weight = pair[order], similarities.ravel()[arc[order]]
    del arc, order
    first = np.flatnonzero(np.diff(pair, prepend=-1))  # a pair is there twice where both list it
    if len(first):
        weight = np.maximum.reduceat(weight, first)
    low, high = (part.astype(np.min_scalar_type(-n)) for part in np.divmod(pair[first], n))
    del pair, first
    row, other = np.concatenate([high, low]), np.concatenate([low, high])  # each edge both ways
    order = np.argsort(row, kind="stable")  # a document's lower neighbours stay before its higher
    indptr = np.append(0, np.bincount(row, minlength=n).cumsum())
    return Graph(indptr, other[order], np.tile(weight, 2)[order], keep)


# ----- The walk: Algorithm 1 ----------------------------------------------------------------------


def walk(graph: Graph, rng: np.random.Generator) -> np.ndarray:
    """Algorithm 1: a path through all kept documents, (n_kept,), each exactly once.

    It starts at an unvisited document of least degree, which would be the first to lose all its
    neighbours, and goes to the heaviest unvisited neighbour; where there is none, it starts anew.
    """
    documents = rng.permutation(np.flatnonzero(graph.keep))
    degrees = np.diff(graph.indptr)[documents]
    by_degree = documents[np.argsort(degrees, kind="stable")]  # of equal degree: in random order
    indptr, neighbours, weights = map(memoryview, (graph.indptr, graph.neighbours, graph.weights))
    unvisited, path = bytearray(graph.keep), array.array("q")
    for start in progress("walk", memoryview(by_degree), len(by_degree)):
        node = start if unvisited[start] else -1
        while node >= 0:
            path.append(node)
            unvisited[node] = 0
            edges = slice(indptr[node], indptr[node + 1])
            node, heaviest = -1, -math.inf
            for other, weight in zip(neighbours[edges], weights[edges], strict=True):
                if unvisited[other] and weight > heaviest:  # line 7, the arg max
                    node, heaviest = other, weight
    return np.frombuffer(path, np.int64)


# ----- The edge order, and the others -------------------------------------------------------------


def chain_edges(graph: Graph, x: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Greedy matching, not in the paper: the heaviest edges first, each that joins two chains.

    Then the nearest ends of chains by embeddings x (n, d), again and again, until there is one
    chain; without x the chains stand in random order. Returns a path (n_kept,).
    """
    documents, n = np.flatnonzero(graph.keep), len(graph.keep)
    links = array.array("q", [-1]) * (2 * n)  # of document i: links[2 i] and links[2 i + 1]
    far = array.array("q", range(n))  # of an end of a chain: its other end

    def join(a: np.ndarray, b: np.ndarray) -> int:
        """Take edges in this order, each that joins ends of two chains; return how many did."""
        count = 0
        for i, j in progress("edges", zip(memoryview(a), memoryview(b), strict=True), len(a)):
            if links[2 * i + 1] < 0 and links[2 * j + 1] < 0 and far[i] != j:
                links[2 * i if links[2 * i] < 0 else 2 * i + 1] = j
                links[2 * j if links[2 * j] < 0 else 2 * j + 1] = i
                left, right = far[i], far[j]
                far[left], far[right] = right, left
                count += 1
        return count

    row = np.repeat(np.arange(n), np.diff(graph.indptr))
    once = np.flatnonzero(row < graph.neighbours)
    once = once[np.argsort(-graph.weights[once], kind="stable")]
    joined = join(row[once], graph.neighbours[once])
    while x is not None and joined < len(documents) - 1:
        ends = documents[np.array(links[1::2])[documents] < 0]
        k = min(10, len(ends) - 1)  # one of them at most is of the same chain
        similarities, ids = nearest_neighbours(x[ends], k)
        order = np.argsort(-similarities.ravel(), kind="stable")
        joined += join(np.repeat(ends, k)[order], ends[ids.ravel()[order]])

    path, seen = array.array("q"), bytearray(n)
    for start in rng.permutation(documents).tolist():
        is_end = links[2 * start + 1] < 0 and not seen[start]
        node, before = start if is_end else -1, -1
        while node >= 0:
            path.append(node)
            seen[node] = 1
            one, two = links[2 * node], links[2 * node + 1]
            node, before = two if one == before else one, node
    return np.frombuffer(path, np.int64)


ORDERS = ("paper", "edge", "random", "file", "knn")


def traverse(
    graph: Graph, order="paper", seed=0, embeddings: np.ndarray | None = None, repeats=10
) -> np.ndarray:
    """An order of the kept documents, (n_kept,) int64, the same for the same seed.

    paper: Algorithm 1, see `walk`. edge: see `chain_edges`, which takes the embeddings (n, d).
    random; file: as they came; knn, the retrieval baseline, with repeats: each document, in random
    order, before its `repeats` nearest. Raises ValueError for another order.
    """
    if order not in ORDERS:
        raise ValueError(f"order {order!r} must be one of {', '.join(ORDERS)}")
    rng, documents = np.random.default_rng(seed), np.flatnonzero(graph.keep)
    if order == "paper":
        return walk(graph, rng)
    if order == "edge":
        return chain_edges(graph, embeddings, rng)
    if order == "file":
        return documents
    documents = rng.permutation(documents)
    if order == "knn" and len(documents):
        return np.concatenate([[i, *graph.row(i)[:repeats]] for i in documents])
    return documents


# ----- Packing, and what an order is worth --------------------------------------------------------


def pack(tokens, order: np.ndarray, context_length: int, separator: int | None) -> np.ndarray:
    """Section 2.2: join documents, a separator after each, and cut: contexts (m, context_length).

    tokens[i] are the ids of document i, order (n_kept,) their numbers. The last context is filled
    up with separators, or 0. Raises ValueError for an empty order.
    """
    if len(order) == 0:
        raise ValueError("there are no documents to pack")
    end = 0 if separator is None else 1
    sizes = np.array([len(tokens[i]) + end for i in order])
    count = math.ceil(sizes.sum() / context_length)
    contexts = np.full(count * context_length, separator or 0, tokens[order[0]].dtype)
    places = zip(order, np.cumsum(sizes) - sizes, strict=True)
    for i, at in progress("pack", places, len(order)):
        contexts[at : at + len(tokens[i])] = tokens[i]
    return contexts.reshape(count, context_length)


def ordering_report(x: np.ndarray, order: np.ndarray, graph: Graph, labels=None) -> dict:
    """What an order of documents is worth, by their unit embeddings x (n, d).

    adjacent_cosine is the mean over steps. bound: the mean of each document's two best, among its
    edges and its steps, negative ones as 0; no path has a share_of_bound above 1. segments lie
    between steps that follow no edge. label_purity, of labels (n,) that differ: steps within one.
    """
    before, after = order[:-1], order[1:]
    cosines = np.zeros(len(before))
    for i in range(0, len(cosines), 4096):
        part = slice(i, i + 4096)
        cosines[part] = (x[before[part]] * x[after[part]]).sum(1)
    row = np.repeat(np.arange(len(x)), np.diff(graph.indptr))
    edges = row * len(x) + graph.neighbours
    leaps = np.flatnonzero(~np.isin(before * len(x) + after, edges))
    row = np.concatenate([row, before[leaps], after[leaps]])
    weight = np.concatenate([graph.weights, cosines[leaps], cosines[leaps]])
    falling = np.lexsort((-weight, row))
    row, weight = row[falling], weight[falling]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    best = np.maximum(weight[rank < 2], 0).sum()  # a path has two steps at a document
    segments = np.diff([-1, *leaps, len(order) - 1])
    report = {
        "each_once": np.array_equal(np.sort(order), np.flatnonzero(graph.keep)),
        "adjacent_cosine": float(cosines.mean()) if len(cosines) else 0.0,
        "bound": float(best / 2 / len(order)),
        "share_of_bound": float(2 * cosines.sum() / best) if best else 0.0,
        "segments": len(segments),
        "longest_segment": int(segments.max()),
    }
    if labels is not None and len(cosines) and (labels != labels[0]).any():
        report["label_purity"] = float((labels[before] == labels[after]).mean())
    return report


# ----- The job: from documents to contexts --------------------------------------------------------

EMBED = ("input", "text_field", "smoke", "encoder", "embeddings", "dim", "seed")
LISTS = (*EMBED, "k", "recall", "threshold")


def stage(config: Config, name: str, fields: tuple, make: Callable[[], dict]) -> dict:
    """make()'s arrays, which OUT/stages keeps; with --resume those that are there, if these fields
    of the config and the files that they name are as they were.
    """
    key, path = [sys.version], Path(config.out, "stages", f"{name}.npz")
    for field in fields:
        value = getattr(config, field)
        key += [field, value]
        if isinstance(value, str) and value:
            for file in sorted([Path(value), *Path(value).rglob("*")]):
                if file.is_file():
                    key += [str(file), file.stat().st_size, file.stat().st_mtime_ns]
    if config.resume and path.is_file():
        arrays = dict(np.load(path))
        if arrays.pop("key") == json.dumps(key):
            print(f"{name}: kept from the run before", flush=True)
            return arrays
    arrays = make()
    if processes()[0] == 0:
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.savez(file, key=json.dumps(key), **arrays)
        os.replace(path.with_suffix(".tmp"), path)  # never half of one
    return arrays


def find_neighbours(config: Config) -> tuple[np.ndarray, ...]:
    """Embeddings (n, d) of the documents, and `distinct_neighbours`' similarities, ids and keep."""
    device = pick_device(config.device)
    Path(config.out, "stages").mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    if processes()[0] == 0:
        x = stage(config, "embed", EMBED, lambda: {"x": embed(config, device)})["x"]
    if processes()[1] > 1:
        dist.barrier()  # the first process has written them
        x = np.load(Path(config.out, "stages", "embed.npz"))["x"]

    def search() -> dict:
        rest = {"recall": config.recall, "seed": config.seed, "device": device}
        similarities, ids, keep = distinct_neighbours(x, config.k, config.threshold, **rest)
        return {"similarities": similarities, "ids": ids, "keep": keep}

    found = stage(config, "neighbours", LISTS, search)
    if dist.is_initialized():
        rank = dist.get_rank()
        dist.destroy_process_group()
        if rank > 0:
            raise SystemExit(0)  # torchrun started it to search, no more
    print(f"{len(x):,} documents, {found['keep'].sum():,} without near-duplicates", flush=True)
    return x, found["similarities"], found["ids"], found["keep"]


def sort(config: Config) -> None:
    """The job `sort`: train.bin, of whole contexts in random order, with train.json; order.npy,
    report.json and report.png, all in config.out.
    """
    began, out = time.perf_counter(), Path(config.out)
    x, similarities, ids, keep = find_neighbours(config)
    print("building the graph", flush=True)
    graph = build_graph(similarities, ids, keep)
    orders = dict.fromkeys(("file", "random", config.order))
    paths = {order: traverse(graph, order, config.seed, x) for order in orders}
    np.save(out / "order.npy", paths[config.order])
    tokens, labels, about = tokenise(config)
    contexts = pack(tokens, paths[config.order], config.context_length, about["document_separator"])
    np.random.default_rng(config.seed).shuffle(contexts)  # one context says nothing of the next
    contexts.astype(contexts.dtype.newbyteorder("<")).tofile(out / "train.tmp")
    (out / "train.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    os.replace(out / "train.tmp", out / "train.bin")
    print(f"{out}/train.bin: {len(contexts):,} contexts of {config.context_length} tokens")

    reports = {order: ordering_report(x, path, graph, labels) for order, path in paths.items()}
    for order, report in reports.items():
        print(f"{order}: " + " · ".join(f"{name} {value:.4g}" for name, value in report.items()))
    result = {
        "orders": reports, "documents": len(x), "kept": int(keep.sum()), "contexts": len(contexts),
        "wall_seconds": round(time.perf_counter() - began, 1), "argv": sys.argv,
        "python": sys.version, "torch": torch.__version__, "seed": config.seed,
        "device": f"{config.device}, {torch.get_num_threads()} threads",
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "config": dataclasses.asdict(config),
    }  # fmt: skip
    (out / "report.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(f"{out}/report.json after {result['wall_seconds']} s", flush=True)
    plot(x, paths, out / "report.png")


def plot(x: np.ndarray, paths: dict[str, np.ndarray], path: Path) -> None:
    """Cosines of adjacent documents in each order, of the first 100,000, as a PNG."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no picture: matplotlib is not installed; pip install matplotlib")
    figure, axes = plt.subplots(layout="constrained")
    for name, order in paths.items():
        order = order[:100_000]
        cosines = (x[order[1:]] * x[order[:-1]]).sum(1)
        axes.hist(cosines, np.linspace(-0.2, 1, 61), histtype="step", label=name)
    axes.set(xlabel="cosine of adjacent documents", ylabel="steps")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ----- Embedders ----------------------------------------------------------------------------------

BUCKETS = 1 << 17  # of hashed words and pairs of words
CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces: each is a word
WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+|[^\w\s]|_")


def hashed_terms(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of a text's words, or else its marks, and of adjacent pairs of them; their counts."""
    words = WORD.findall(text.lower())
    words = [word for word in words if word[0].isalnum()] or words
    codes = np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in words], np.uint64)
    pairs = codes[:-1] * np.uint64(0x9E3779B1) + codes[1:] + np.uint64(1)
    hashed = np.concatenate([codes, pairs]) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - 17)
    terms, counts = np.unique(hashed, return_counts=True)
    return terms.astype(np.int32), counts.astype(np.int32)


def embed_documents(texts: Iterable[str], dim: int = 256, seed: int = 0) -> np.ndarray:
    """TF-IDF projected at random: unit rows (n, dim) float32. Raises ValueError for a blank text.

    A row is the sum over its terms of (1 + log tf) (1 + log((1 + n) / (1 + df))) times the term's
    row of a normal matrix. A cosine is TF-IDF's with an error of about dim^-1/2.
    """
    found = [hashed_terms(text) for text in progress("hash words", texts)]
    if min((len(terms) for terms, _ in found), default=0) == 0:
        raise ValueError(f"cannot embed {len(found)} documents: none may be blank")
    frequency = np.bincount(np.concatenate([terms for terms, _ in found]), minlength=BUCKETS)
    idf = 1 + np.log((1 + len(found)) / (1 + frequency))
    table = torch.randn(BUCKETS, dim, generator=torch.Generator().manual_seed(seed))
    x = np.empty((len(found), dim), np.float32)
    for i, (terms, counts) in progress("embed", enumerate(found), len(found)):
        weights = torch.from_numpy(((1 + np.log(counts)) * idf[terms]).astype(np.float32))
        x[i] = F.normalize(weights @ table[torch.from_numpy(terms)], dim=0)
    return x


@torch.inference_mode()
def encode_documents(texts: Iterable[str], folder: str, device: torch.device) -> np.ndarray:
    """Unit rows (n, d) by the encoder in a Hugging Face folder, as Contriever's: the mean of the
    last layer over a text's tokens, as far as they fit into the encoder's window.
    """
    from transformers import AutoModel, AutoTokenizer

    if not Path(folder).is_dir():
        raise ValueError(f"--encoder {folder} must be a model's folder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    missing = [name for name in report["missing_keys"] if not name.startswith("pooler.")]
    if missing or report["mismatched_keys"]:  # else they would be drawn at random
        raise ValueError(f"--encoder {folder}: the weights do not fit: {report}")
    model, rows = model.float().to(device).eval(), []
    length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    for text in progress("encode", texts):
        tokens = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        hidden = model(**tokens.to(device)).last_hidden_state[0]  # (L, d)
        rows.append(F.normalize(hidden.mean(0), dim=0).cpu().numpy())
    return np.stack(rows)


def embed(config: Config, device: torch.device) -> np.ndarray:
    """Unit rows (n, d) float32 of the documents, by --embeddings, --encoder or TF-IDF."""
    texts = (text for text, _ in read_documents(config))
    if config.encoder:
        return encode_documents(texts, config.encoder, device)
    if not config.embeddings:
        return embed_documents(texts, config.dim, config.seed)
    x, count = np.load(config.embeddings), sum(1 for _ in texts)
    if x.ndim != 2 or len(x) != count or x.dtype.kind not in "fiu":
        rule = f"must be numbers of shape ({count}, d), a row for each document"
        raise ValueError(f"{config.embeddings}: {x.dtype} {x.shape} {rule}")
    x = x.astype(np.float32)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norm) | (norm == 0))
    if len(bad):
        raise ValueError(f"{config.embeddings}: row {bad[0]} is zero or not finite")
    return x / norm


# ----- Input: documents and their tokens ----------------------------------------------------------


def python_functions() -> Iterator[tuple[str, str]]:
    """The functions of the standard library, of 100 characters or more, and their modules.

    Files are read, never imported; tests, and what some systems lack, are left out.
    """
    left_out = "tests?|(site|dist)-packages|pydoc_data|idlelib|lib2to3|distutils|ensurepip|venv"
    left_out += r"|tkinter|turtle.*|config-.*|_sysconfig.*|sitecustomize\.py"
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if not re.search(f"(^|/)({left_out})(/|$)", file):
            source = (root / file).read_text("utf-8")
            for text in re.split(r"(?m)^(?=[ \t]*(?:async )?def )", source)[1:]:
                if len(text) >= 100:
                    yield textwrap.dedent(text), file


def read_documents(config: Config) -> Iterator[tuple[str, str]]:
    """Text and label of each document of --input that is not blank: a line of a .jsonl file, else a
    file as a whole, whose label is its folder. Only the report uses labels.
    """
    if not config.input:
        yield from itertools.islice(python_functions(), 150 if config.smoke else None)
        return
    root = Path(config.input)
    for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if file.is_dir() or hidden:
            continue
        try:
            if file.suffix != ".jsonl":
                text = file.read_text("utf-8-sig")
                if text.strip():
                    yield text, file.parent.name
                continue
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, 1):  # noqa: B007 (the error names it)
                    row = json.loads(line) if line.strip() else {config.text_field: ""}
                    if row[config.text_field].strip():
                        yield row[config.text_field], str(row.get("label", ""))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} must be UTF-8: {error}") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            rule = f"must be a JSON object with a string {config.text_field!r}"
            raise ValueError(f"{file}, line {number} {rule}: {error!r}") from error


def tokenise(config: Config) -> tuple[list[np.ndarray], np.ndarray, dict]:
    """The ids and the labels of all documents, and train.json; copies a tokenizer.json to OUT.

    Special tokens written in a text are ordinary text. What the file says of truncation is ignored.
    """
    dtype, separator, size = np.uint16, 256, 257
    if config.tokenizer != "byte":
        import tokenizers

        file = Path(config.tokenizer).read_text("utf-8")
        try:
            model = tokenizers.Tokenizer.from_str(file)
        except Exception as error:  # the package has no kinds of its own
            raise ValueError(f"--tokenizer {config.tokenizer}: {error}") from error
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True
        known = model.get_vocab()
        ends = [known[end] for end in ("<|endoftext|>", "<|end_of_text|>", "</s>") if end in known]
        separator, size = ends[0] if ends else None, max(known.values()) + 1
        dtype = np.uint16 if size <= 1 << 16 else np.uint32
        Path(config.out, "tokenizer.json").write_text(file, "utf-8")
    ids, labels = [], []
    for text, label in progress("tokenise", read_documents(config)):
        if config.tokenizer == "byte":
            ids.append(np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(dtype))
        else:
            ids.append(np.array(model.encode(text, add_special_tokens=False).ids, dtype))
        labels.append(label)
    about = {"dtype": dtype.__name__, "vocab_size": size, "document_separator": separator}
    about["tokenizer"] = "byte" if config.tokenizer == "byte" else "tokenizer.json"
    return ids, np.array(labels), about | {"context_length": config.context_length}


# ----- Helpers ------------------------------------------------------------------------------------


def progress(name: str, items: Iterable, total: int = 0) -> Iterator:
    """The items; every five seconds a line says how many are done, how fast, and what is left."""
    start = shown = time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - shown > 5:
            shown, rate, of, left = now, done / (now - start), "", ""
            if total:
                of, left = f"/{total:,}", f" · {(total - done) / rate / 60:.1f} minutes left"
            print(f"{name} {done:,}{of} · {rate:,.1f} a second{left}", flush=True)


def processes() -> tuple[int, int]:
    """The number of this process, and how many torchrun started."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def pick_device(name: str) -> torch.device:
    """The device of that name, auto for cuda, mps or cpu; of torchrun's processes each its own."""
    accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.empty(0, device=accelerator if name == "auto" else name).device
    own = device.type == "cuda" and "LOCAL_RANK" in os.environ
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if own else device


# ----- Config and main ----------------------------------------------------------------------------


def flag(default, text: str):
    """A field of `Config`, which is a flag with this default and help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    input: str = flag("", ".jsonl, text file or folder of these; empty: Python's own functions")
    text_field: str = flag("text", "field of a .jsonl line that holds the document")
    tokenizer: str = flag("byte", "byte, or a tokenizer.json")
    context_length: int = flag(1024, "tokens of a context; paper: 8,192")
    encoder: str = flag("", "folder of an encoder such as Contriever, the paper's; empty: TF-IDF")
    embeddings: str = flag("", ".npy of shape (documents, dimensions) in the encoder's place")
    dim: int = flag(256, "dimensions of TF-IDF; Contriever has 768")
    k: int = flag(10, "neighbours of a document; the paper's released configuration has 50")
    recall: float = flag(0.95, "part of the true neighbours to find, of more than 50,000 documents")
    threshold: float = flag(0.95, "cosine from which the later document is dropped; 2: none is")
    order: str = flag("paper", "paper, edge, random, file, or knn, which repeats documents")
    seed: int = flag(0, "seed of embeddings, inverted lists, order and shuffle")
    device: str = flag("auto", "auto (cuda, mps or cpu, the first there is) or a torch device")
    out: str = flag("out/iclm_sort", "folder of everything that is written")
    resume: bool = flag(False, "keep the stages in OUT/stages that the same input and flags made")
    smoke: bool = flag(False, "150 documents, written to OUT/smoke: does it run?")

    def __post_init__(self):
        for name in ("context_length", "k", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} must be 1 or more"
                )
        if self.order not in ORDERS:
            raise ValueError(f"--order {self.order} must be one of {', '.join(ORDERS)}")
        if self.encoder and self.embeddings:
            raise ValueError("--encoder and --embeddings exclude each other")


SMOKE = {"k": 5, "context_length": 128}


def main(argv: list[str] | None = None) -> int:
    """Sort. Returns 0; 2 for bad input, 130 after Ctrl-C."""
    suppress = {"argument_default": argparse.SUPPRESS}  # so that `given` has what was written out
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], **suppress)
    for field in dataclasses.fields(Config):
        options = {"type": type(field.default)}
        if isinstance(field.default, bool):
            options = {"action": "store_true"}
        text = f"{field.metadata['help']}; default: {field.default!r}"
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=text, **options)
    given = vars(parser.parse_args(argv))
    if given.get("smoke"):
        given = SMOKE | given | {"out": f"{given.get('out', Config.out)}/smoke"}
    sys.stdout.reconfigure(errors="replace")  # where it is not UTF-8
    try:
        sort(Config(**given))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # one line; `python -X dev` shows where it came from
        if sys.flags.dev_mode:
            raise
        text = f"{Path(__file__).name}: {type(error).__name__}: {error}"
        if isinstance(error, ImportError):
            text += f"; pip install {error.name}"
        print(" ".join(text.split())[:400], file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
