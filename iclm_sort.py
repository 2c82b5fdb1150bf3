# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "tiktoken==0.14.0"]
# ///
"""In-Context Pretraining: sort a corpus so that related documents share a context.

Shi et al., "In-Context Pretraining: Language Modeling Beyond Document Boundaries", arXiv 2310.10638.

    python iclm_sort.py                            sorts Python's functions, trains on both orders
    python iclm_sort.py sort --input corpus.jsonl  writes train.bin for mamba.py and transformer.py
    python iclm_sort.py sort --input corpus/ --encoder contriever/ --context-length 8192

code               shape        paper
x                  (n, d)       E(d): embeddings of the documents, of length 1
similarities, ids  (n, k)       N(d): the most similar other documents of each, and their cosines
graph              n nodes      G: an edge where either document is in the other's list
order              (n_kept,)    P: the path through all documents
contexts           (m, L)       what is trained on: the tokens along the path, cut

Differences from the paper: line 7 of Algorithm 1 prints arg min of the similarity; text and figure
mean arg max, and so do we. Degree is that in the whole graph, k is 10 and near-duplicates have a
cosine of 0.95: the paper says none of the three. Embeddings are TF-IDF unless --encoder or
--embeddings gives others. Inverted lists hold whole vectors, not quantised ones. `--order edge` is
ours and finds a heavier path. Not included: graph and walk on many machines, SPLiCe's links and
BM25 chains, the paper's downstream tasks.
"""

from __future__ import annotations

import argparse
import array
import ast
import dataclasses
import datetime
import functools
import hashlib
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
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

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
    if method not in METHODS or not 1 <= k < len(x):
        rule = f"{', '.join(METHODS)} and k below the {len(x)} documents, at least 1"
        raise ValueError(f"method {method!r}, k {k}: must be one of {rule}")
    x = torch.from_numpy(np.require(x, np.float32, ["C", "W"])).to(device)
    if not x.sum().isfinite():
        raise ValueError("every number of the embeddings must be finite")
    rows = torch.arange(len(x)) if rows is None else torch.as_tensor(rows)
    if method == "auto":
        method = "exact" if len(rows) * len(x) <= 2.5e9 else "ivf"
    search, size = exact_search(x, k) if method == "exact" else ivf_search(x, k, recall, seed)
    rank, world = processes()
    similarities, ids = torch.zeros(len(rows), k), torch.zeros(len(rows), k, dtype=torch.int64)
    starts = range(rank * size, len(rows), world * size)
    for start in progress(f"neighbours ({method})", starts, len(starts)):
        part = slice(start, start + size)
        similarities[part], ids[part] = search(rows[part].to(device))
    if world > 1:
        dist.all_reduce(similarities)  # the rows of the other processes are 0 here
        dist.all_reduce(ids)
    return similarities.numpy(), ids.numpy()


METHODS = ("auto", "exact", "ivf")


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
    return torch.cat([(part @ centres.T).argmax(1) for part in x.split(4096)])


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
    for i, at in zip(order, np.cumsum(sizes) - sizes, strict=True):
        contexts[at : at + len(tokens[i])] = tokens[i]
    return contexts.reshape(count, context_length)


def ordering_report(x, order, graph: Graph, labels=None, lengths=None, context_length=0) -> dict:
    """What an order of documents is worth; x (n, d) are their unit embeddings.

    adjacent_cosine is the mean over steps. bound: the mean of each document's two best, among its
    edges and steps, negative ones as 0; no path has more than a share_of_bound of 1. segments lie
    between steps that follow no edge. label_purity, of labels (n,): the steps within one label.
    With lengths (n,) in tokens, and context_length: truncation_rate, documents that a cut parts,
    and within_context_cosine, of two documents that a context touches.
    """
    order, n = np.asarray(order, np.int64), len(x)
    before, after = order[:-1], order[1:]
    steps = np.zeros(len(before))
    for i in range(0, len(steps), 4096):
        part = slice(i, i + 4096)
        steps[part] = (x[before[part]] * x[after[part]]).sum(1)
    row = np.repeat(np.arange(n), np.diff(graph.indptr))
    leaps = np.flatnonzero(~np.isin(before * n + after, row * n + graph.neighbours))

    row = np.concatenate([row, before[leaps], after[leaps]])
    weight = np.concatenate([graph.weights, steps[leaps], steps[leaps]])
    falling = np.lexsort((-weight, row))
    row, weight = row[falling], weight[falling]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    best = np.maximum(weight[rank < 2], 0).sum()  # a path has two steps at a document

    segments = np.diff(np.concatenate([[-1], leaps, [len(order) - 1]]))
    kept = np.flatnonzero(graph.keep)
    report = {"documents": len(order), "each_once": np.array_equal(np.sort(order), kept)}
    report["adjacent_cosine"] = float(steps.mean()) if len(steps) else 0.0
    report["bound"] = float(best / 2 / len(order))
    report["share_of_bound"] = float(2 * steps.sum() / best) if best else 0.0
    report |= {"segments": len(segments), "longest_segment": int(segments.max())}
    if labels is not None and len(steps):
        same = np.asarray(labels)[before] == np.asarray(labels)[after]
        report["label_purity"] = float(same.mean())
    if context_length:
        begin = np.cumsum(lengths[order]) - lengths[order]
        first, last = begin // context_length, (begin + lengths[order] - 1) // context_length
        cosines = []
        for context in range(last[-1] + 1):
            documents = x[
                order[np.searchsorted(last, context) : np.searchsorted(first, context + 1)]
            ]
            m, total = len(documents), documents.sum(0, np.float64)
            if m > 1:
                cosines.append((total @ total - m) / (m * (m - 1)))
        report["within_context_cosine"] = float(np.mean(cosines)) if cosines else None
        report |= {"contexts": int(last[-1] + 1), "truncation_rate": float((last > first).mean())}
    return report


# ----- The experiment: does the order teach a model to use its context? ---------------------------


class CausalLM(nn.Module):
    """A small language model like LLaMA: RMSNorm, rotary positions, attention, GELU, tied head."""

    def __init__(self, config: Config, vocab_size: int):
        super().__init__()
        d, self.heads = config.d_model, config.n_head
        linear = functools.partial(nn.Linear, bias=False)
        self.embedding, self.norm = nn.Embedding(vocab_size, d), nn.RMSNorm(d)
        self.layers = nn.ModuleList()
        for _ in range(config.n_layer):
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


def train_arm(
    name: str, contexts: np.ndarray, config: Config, vocab_size: int, model_class=CausalLM
) -> tuple[CausalLM, list[float]]:
    """A model trained on contexts (m, L), shuffled anew each epoch, and the loss of each step.

    Every arm starts alike. Raises FloatingPointError for a loss that is not finite.
    """
    device, rng = pick_device(config.device), np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    model, losses = model_class(config, vocab_size).to(device), []
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, (0.9, 0.95), weight_decay=0.1)
    epochs = math.ceil(config.steps * config.batch / len(contexts))
    rows = np.concatenate([rng.permutation(len(contexts)) for _ in range(epochs)])
    for step in progress(f"train {name}", range(config.steps), config.steps):
        batch = contexts[rows[step * config.batch :][: config.batch]]
        tokens = torch.from_numpy(batch.astype(np.int64)).to(device)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        if not loss.isfinite():
            raise FloatingPointError(f"{name} diverged at step {step + 1}: {loss}; lower --lr")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm = (step + 1) / max(1, config.steps // 20)
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / config.steps))  # from 1 to 0.1
        optimizer.param_groups[0]["lr"] = config.lr * min(warm, cosine)
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


def split(done: Sorted) -> tuple[Graph, Graph]:
    """Graphs of the documents to train on, and of those held out: whole labels, a tenth at most.

    Where labels are so few or so large that it is less than a twentieth, every tenth document.
    """
    rng, kept, total = np.random.default_rng(0), np.flatnonzero(done.keep), 0
    names, label = np.unique(done.labels, return_inverse=True)
    sizes, held = np.bincount(label[kept], minlength=len(names)), np.zeros(len(names), bool)
    for i in rng.permutation(len(names)):
        if total + sizes[i] <= len(kept) / 10:
            held[i], total = True, total + sizes[i]
    part = held[label]
    if total < len(kept) / 20:
        part = np.isin(np.arange(len(label)), rng.permutation(kept)[::10])
    lists = done.similarities, done.ids  # without near-duplicates: none is in both graphs
    return build_graph(*lists, done.keep & ~part), build_graph(*lists, done.keep & part)


def hold_out(done: Sorted, graph: Graph, config: Config, most: int = 400) -> dict[str, np.ndarray]:
    """What models are judged by: tokens of the held-out documents, whose graph is given.

    random_order (m, L): contexts of documents in random order, the paper's protocol. no_context
    (t, 1 + T): a separator and the first T tokens of a document. related_context and
    unrelated_context (t, L): the same after other documents, the most similar last, or any.
    """
    rng, tokens, separator = np.random.default_rng(config.seed), done.tokens, done.separator
    length, target = config.context_length, min(64, config.context_length // 4)
    documents = rng.permutation(np.flatnonzero(graph.keep))
    chosen = [i for i in documents if len(graph.row(i)) and len(tokens[i]) >= target > 0]
    if separator is None or not chosen:
        rule = f"a separator, and one of {target} tokens or more that has a neighbour"
        raise ValueError(f"cannot judge by {len(documents)} held-out documents; it takes {rule}")
    rows = {"no_context": [], "related_context": [], "unrelated_context": []}
    for i in chosen[:most]:
        wanted, related = [separator, *tokens[i][:target]], graph.row(i)
        others = rng.permutation(documents[~np.isin(documents, [i, *related])])
        rows["no_context"].append(wanted)
        for name, past in (("related", [*related, *others]), ("unrelated", others)):
            row = wanted
            for j in past:
                if len(row) < length:
                    row = [separator, *tokens[j], *row]
            rows[f"{name}_context"].append(([separator] * length + row)[-length:])
    rows["random_order"] = pack(tokens, documents, length, separator)[: 1 + 65536 // length]
    return {name: np.array(row) for name, row in rows.items()}


@torch.inference_mode()
def judge(model: CausalLM, held: dict[str, np.ndarray]) -> dict[str, float]:
    """Nats a token of `hold_out`'s; a context gain is what that context takes off the loss."""
    scores, target = {}, held["no_context"].shape[1] - 1
    for name, rows in held.items():
        last, nats = -target if name != "random_order" else 0, []
        for tokens in torch.from_numpy(rows.astype(np.int64)).split(8):
            tokens = tokens.to(model.norm.weight.device)
            logits, wanted = model(tokens[:, :-1])[:, last:], tokens[:, 1:][:, last:]
            nats.append(F.cross_entropy(logits.mT, wanted, reduction="none"))
        scores[f"{name}_loss"] = torch.cat(nats).mean().item()
    for name in ("related_context", "unrelated_context"):
        scores[f"{name}_gain"] = scores["no_context_loss"] - scores[f"{name}_loss"]
    return scores


def experiment(config: Config) -> None:
    """The default job: sort, then train on the shuffled and on the sorted documents.

    Both arms see as many tokens. Writes metrics.jsonl, result.json and result.png to config.out.
    """
    began, done = time.perf_counter(), prepare(config)
    if done is None:
        return
    graph, held_graph = split(done)
    held, arms, paths, metrics = hold_out(done, held_graph, config), {}, {}, []
    for name, order in (("standard", "random"), ("sorted", config.order)):
        paths[name] = traverse(graph, order, config.seed, done.x)

        def train(name=name) -> dict:
            contexts = pack(done.tokens, paths[name], config.context_length, done.separator)
            model, losses = train_arm(name, contexts, config, done.about["vocab_size"])
            return judge(model, held) | {"losses": losses}

        arms[name] = stage(config, name, ARM, train)
        for step, loss in enumerate(arms[name].pop("losses").tolist(), 1):
            metrics.append(json.dumps({"arm": name, "step": step, "loss": loss}) + "\n")
        arms[name] = {score: value.item() for score, value in arms[name].items()}
        Path(config.out, "metrics.jsonl").write_text("".join(metrics), "utf-8")
    write_result(config, began, "result.json", done, graph, paths, arms)


# ----- The job `sort`, and what both jobs begin and end with --------------------------------------

READ = ("input", "text_field", "label_field", "tokenizer", "smoke")
EMBED = (*READ, "encoder", "embeddings", "dim", "seed")
LISTS = (*EMBED, "k", "method", "recall", "threshold")
ARM = (*LISTS, "order", "context_length", "steps", "batch", "d_model", "n_layer", "n_head", "lr")


@dataclass
class Sorted:
    """The documents and their neighbours; about is what train.json says of the tokens."""

    tokens: list[np.ndarray]  # n times (length,)
    labels: np.ndarray  # (n,)
    about: dict
    separator: int | None
    x: np.ndarray  # (n, d)
    similarities: np.ndarray  # (n, k)
    ids: np.ndarray  # (n, k)
    keep: np.ndarray  # (n,) bool


def stage(config: Config, name: str, fields: tuple, make: Callable[[], dict]) -> dict:
    """make()'s arrays, which OUT/stages keeps; with --resume those that are there, if these fields
    of the config and the files that they name are as they were.
    """
    key, path = [sys.version], Path(config.out, "stages", f"{name}.npz")
    for field in fields:
        value = getattr(config, field)
        root = Path(str(value) or os.devnull)
        files = [file for file in sorted([root, *root.rglob("*")]) if file.is_file()]
        key += [field, value, *[f"{file} {file.stat()[6:9:2]}" for file in files]]
    if config.resume and path.is_file():
        arrays = dict(np.load(path))
        if arrays.pop("key") == json.dumps(key):
            print(f"{name}: kept from the run before", flush=True)
            return arrays
    arrays = make()
    if processes()[0] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.savez(file, key=json.dumps(key), **arrays)
        os.replace(path.with_suffix(".tmp"), path)  # never half of one
    return {part: np.asarray(array) for part, array in arrays.items()}


def prepare(config: Config) -> Sorted | None:
    """Both jobs up to the neighbours; None in torchrun's processes that only search for them."""
    device, x = pick_device(config.device), None
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    rank, world = processes()
    if rank == 0:
        read = stage(config, "read", READ, lambda: read_and_tokenise(config))
        count = len(read["lengths"])
        x = stage(config, "embed", EMBED, lambda: {"x": embed(config, count, device)})["x"]
    if world > 1:
        dist.barrier()
        x = np.load(Path(config.out, "stages", "embed.npz"))["x"]

    def lists() -> dict:
        search = {"method": config.method, "recall": config.recall, "seed": config.seed}
        found = distinct_neighbours(x, config.k, config.threshold, device=device, **search)
        return dict(zip(("similarities", "ids", "keep"), found, strict=True))

    found = stage(config, "neighbours", LISTS, lists)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return None
    print(f"{count:,} documents, {found['keep'].sum():,} without near-duplicates", flush=True)
    about, file = json.loads(read["about"].item()), read["tokenizer"].item()
    if file:
        Path(config.out, "tokenizer.json").write_text(file, "utf-8")
    tokens = np.split(read["flat"], read["lengths"].cumsum()[:-1])
    return Sorted(tokens, read["labels"], about, about["document_separator"], x, **found)


def sort(config: Config) -> None:
    """The job `sort`: train.bin, of whole contexts in random order, with train.json; order.npy,
    report.json and report.png, all in config.out.
    """
    began, done, out = time.perf_counter(), prepare(config), Path(config.out)
    if done is None:
        return
    graph = build_graph(done.similarities, done.ids, done.keep)
    orders = dict.fromkeys(("file", "random", config.order))
    paths = {order: traverse(graph, order, config.seed, done.x) for order in orders}
    np.save(out / "order.npy", paths[config.order])
    contexts = pack(done.tokens, paths[config.order], config.context_length, done.separator)
    np.random.default_rng(config.seed).shuffle(contexts)
    contexts.astype(contexts.dtype.newbyteorder("<")).tofile(out / "train.tmp")
    about = done.about | {"context_length": config.context_length}
    (out / "train.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    os.replace(out / "train.tmp", out / "train.bin")
    print(f"{out}/train.bin: {len(contexts):,} contexts of {config.context_length} tokens")
    write_result(config, began, "report.json", done, graph, paths, {})


def write_result(config: Config, began, name: str, done: Sorted, graph, paths, arms: dict) -> None:
    """Print and write what the orders are worth and what the arms learnt, and draw the orders."""
    lengths, orders = np.array([len(ids) for ids in done.tokens]), {}
    lengths += done.separator is not None
    for order, path in paths.items():
        rest = (done.labels, lengths, config.context_length)
        orders[order] = ordering_report(done.x, path, graph, *rest)
    for columns in (orders, arms):
        for value in next(iter(columns.values()), {}):
            cells = [f"{column} {columns[column].get(value)}" for column in columns]
            print(f"{value}: {' · '.join(cells)}")
    result = {
        "orders": orders, "arms": arms, "documents": len(done.keep),
        "duplicates": int((~done.keep).sum()),
        "wall_seconds": round(time.perf_counter() - began, 1), "argv": sys.argv,
        "python": sys.version, "torch": torch.__version__, "seed": config.seed,
        "device": f"{config.device}, {torch.get_num_threads()} threads",
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "config": dataclasses.asdict(config),
    }  # fmt: skip
    file = Path(config.out, name)
    file.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(f"{file} after {result['wall_seconds']} s", flush=True)
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no picture: matplotlib is not installed; pip install matplotlib")
    figure, axes = plt.subplots(layout="constrained")
    for order, path in paths.items():
        cosines = (done.x[path[1:]] * done.x[path[:-1]]).sum(1)
        axes.hist(cosines, np.linspace(-0.2, 1, 61), histtype="step", label=order)
    axes.set(xlabel="cosine of adjacent documents", ylabel="steps")
    axes.legend()
    figure.savefig(file.with_suffix(".png"), dpi=150)
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

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    options = {"local_files_only": True, "output_loading_info": True}
    model, report = AutoModel.from_pretrained(folder, **options)
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


def embed(config: Config, count: int, device: torch.device) -> np.ndarray:
    """Unit rows (count, d) float32, by --embeddings, --encoder or TF-IDF."""
    texts = (text for text, _ in read_documents(config))
    if config.encoder:
        return encode_documents(texts, config.encoder, device)
    if not config.embeddings:
        return embed_documents(texts, config.dim, config.seed)
    x = np.load(config.embeddings)
    if x.ndim != 2 or len(x) != count or x.dtype.kind not in "fiu":
        rule = f"must be {count} rows of real numbers"
        raise ValueError(f"{config.embeddings}: {x.dtype} {x.shape} {rule}")
    norm = np.linalg.norm(x.astype(np.float32), axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norm) | (norm == 0))
    if len(bad):
        raise ValueError(f"{config.embeddings}: row {bad[0]} is zero or not finite")
    return x.astype(np.float32) / norm


# ----- Input: documents and their tokens ----------------------------------------------------------


@functools.cache
def python_functions() -> list[tuple[str, str]]:
    """The functions of the standard library, of 100 characters or more, each with its module.

    Files are parsed, never imported; tests, and what some systems lack, are left out.
    """
    left_out = "tests?|(site|dist)-packages|pydoc_data|idlelib|lib2to3|distutils|ensurepip|venv"
    left_out += r"|tkinter|turtle.*|config-.*|_sysconfig.*|sitecustomize\.py"
    root, functions = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root).as_posix()
        if re.search(f"(^|/)({left_out})(/|$)", file):
            continue
        source = path.read_text("utf-8")
        lines, tree = source.splitlines(keepends=True), ast.parse(source)
        for holder in ast.walk(tree):
            if isinstance(holder, ast.Module | ast.ClassDef):
                for node in holder.body:
                    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                        text = "".join(lines[node.lineno - 1 : node.end_lineno])
                        functions.append((textwrap.dedent(text), file.removesuffix(".py")))
    return [(text, module) for text, module in functions if len(text) >= 100]


def read_documents(config: Config) -> Iterator[tuple[str, str]]:
    """Text and label of each document of --input that is not blank: a line of a .jsonl file, else a
    file as a whole, whose label is its folder. Only the report and the hold-out use labels.
    """
    if not config.input:
        yield from python_functions()[: 150 if config.smoke else None]
        return
    root = Path(config.input)
    files = [file for file in sorted(root.rglob("*")) if file.is_file()]
    for file in files or [root]:
        number = 0
        try:
            with open(file, encoding="utf-8-sig", newline="\n") as lines:
                if file.suffix != ".jsonl":
                    lines = [json.dumps({config.text_field: lines.read()})]
                for number, line in enumerate(lines, 1):
                    row = json.loads(line) if line.strip() else {config.text_field: ""}
                    text, label = row[config.text_field], row.get(config.label_field)
                    if text.strip():
                        yield text, str(file.parent.name if label is None else label)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            rule = f"must be UTF-8, a .jsonl's line an object with a string {config.text_field!r}"
            raise ValueError(f"{file}, line {number + 1} {rule}: {error!r}") from error


def open_tokenizer(name: str) -> tuple[Callable[[str], list[int]], int, int | None, str]:
    """Tokenizer `byte`, a tokenizer.json file, or one that tiktoken knows.

    Returns encode (a text to ids), the number of ids, the separator's id or None, and the
    tokenizer.json's content or "".
    """
    if name == "byte":
        return lambda text: list(text.encode("utf-8", "replace")), 257, 256, ""
    if not name.endswith(".json"):
        encoding = tiktoken.get_encoding(name)
        end = encoding._special_tokens.get("<|endoftext|>")
        return encoding.encode_ordinary, encoding.n_vocab, end, ""
    import tokenizers

    file = Path(name).read_text("utf-8")
    model = tokenizers.Tokenizer.from_str(file)
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True  # such a token written in a text is ordinary text
    ids = model.get_vocab()
    ends = [ids[end] for end in ("<|endoftext|>", "<|end_of_text|>", "</s>") if end in ids]

    def encode(text: str) -> list[int]:
        return model.encode(text, add_special_tokens=False).ids

    return encode, max(ids.values()) + 1, ends[0] if ends else None, file


def read_and_tokenise(config: Config) -> dict:
    """Arrays: the ids of all documents, their lengths and labels (n,), and what train.json says."""
    encode, size, separator, file = open_tokenizer(config.tokenizer)
    dtype = "uint16" if size <= 1 << 16 else "uint32"
    ids, labels = [], []
    for text, label in progress("read and tokenise", read_documents(config)):
        found = []
        for piece in re.split(r"(\s{4000})", text):  # at a million spaces tiktoken panics
            found += encode(piece)
        ids.append(np.array(found, dtype))
        labels.append(label)
    if len(ids) <= config.k:
        raise ValueError(f"--k {config.k} must be below the {len(ids)} documents of --input")
    about = {"dtype": dtype, "vocab_size": size, "document_separator": separator}
    about["tokenizer"] = "tokenizer.json" if file else config.tokenizer
    arrays = {"flat": np.concatenate(ids), "lengths": [len(part) for part in ids]}
    return arrays | {"labels": labels, "about": json.dumps(about), "tokenizer": file}


# ----- Helpers ------------------------------------------------------------------------------------


def progress(name: str, items: Iterable, total: int = 0) -> Iterator:
    """The items; a line every five seconds says how many are done, at what rate, and what is left."""
    start = shown = time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - shown > 5:
            shown, rate = now, done / (now - start)
            left = f" of {total:,} · {(total - done) / rate / 60:.1f} minutes left" if total else ""
            print(f"{name}: {done:,}{left} · {rate:,.1f} a second", flush=True)


def processes() -> tuple[int, int]:
    """The number of this process, and how many torchrun started."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def pick_device(name: str) -> torch.device:
    """The device of that name, auto for cuda, mps or cpu."""
    accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.empty(0, device=accelerator if name == "auto" else name).device
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


# ----- Config and main ----------------------------------------------------------------------------


def flag(default, text: str):
    """A field of `Config`, which is a flag with this default and help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    input: str = flag("", ".jsonl, text file or folder of these; empty: Python's own functions")
    text_field: str = flag("text", "field of a .jsonl line that holds the document")
    label_field: str = flag("label", "field with its label: only report and hold-out use labels")
    tokenizer: str = flag("byte", "byte, a tokenizer.json, or a name that tiktoken knows")
    context_length: int = flag(1024, "tokens of a context; paper: 8,192")
    encoder: str = flag("", "folder of an encoder such as Contriever, the paper's; empty: TF-IDF")
    embeddings: str = flag("", ".npy of shape (documents, dimensions) in the encoder's place")
    dim: int = flag(256, "dimensions of TF-IDF; Contriever has 768")
    k: int = flag(10, "neighbours of a document; the paper's released configuration has 50")
    method: str = flag("auto", "exact, ivf, or auto: ivf for more than 50,000 documents")
    recall: float = flag(0.95, "ivf: the part of the true neighbours to find")
    threshold: float = flag(0.95, "cosine from which the later document is dropped; 2: none is")
    order: str = flag("paper", "paper, edge, random, file, or knn, which repeats documents")
    steps: int = flag(1200, "optimiser steps of each arm")
    batch: int = flag(2, "contexts a step; paper: 4 million tokens")
    d_model: int = flag(96, "width of the model; paper: 1,024 (0.3B) to 4,096 (7B)")
    n_layer: int = flag(2, "its layers; paper: 24 to 32")
    n_head: int = flag(4, "its attention heads")
    lr: float = flag(4e-3, "peak learning rate")
    seed: int = flag(0, "seed of embeddings, order, shuffle, initialisation and batches")
    device: str = flag("auto", "auto (cuda, mps or cpu, the first there is) or a torch device")
    out: str = flag("out/iclm_sort", "folder of everything that is written")
    resume: bool = flag(False, "keep the stages in OUT/stages that the same input and flags made")
    smoke: bool = flag(False, "150 documents, a few steps, written to OUT/smoke: does it run?")

    def __post_init__(self):
        for name in ("context_length", "k", "steps", "batch", "d_model", "n_layer", "n_head"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} must be 1 or more"
                )
        if self.order not in ORDERS or self.d_model % (2 * self.n_head):
            rule = f"{', '.join(ORDERS)}, and --d-model a multiple of twice --n-head"
            raise ValueError(f"--order {self.order} must be one of {rule}")
        if self.encoder and self.embeddings:
            raise ValueError("--encoder and --embeddings exclude each other")


SMOKE = {"steps": 3, "d_model": 16, "n_head": 2, "context_length": 128, "tokenizer": "byte", "k": 5}
JOBS = {"experiment": experiment, "sort": sort}


def main(argv: list[str] | None = None) -> int:
    """Run a job. Returns 0; 1 where a loss is not finite, 2 for bad input, 130 after Ctrl-C."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=formatter)
    parser.add_argument("job", nargs="?", default="experiment", choices=JOBS, help="what to do")
    for field in dataclasses.fields(Config):
        kind = {"type": type(field.default)}
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, default=field.default, help=field.metadata["help"], **kind)
    given = vars(parser.parse_args(argv))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # where it is not UTF-8
    if given["smoke"]:
        given |= SMOKE | {"out": f"{given['out']}/smoke"}
    kinds = (ValueError, OSError, RuntimeError, LookupError, ArithmeticError, ImportError)
    try:
        JOBS[given.pop("job")](Config(**given))
    except (*kinds, AssertionError) as error:  # the last is torch's, of a missing device
        text = " ".join(f"{Path(__file__).name}: {error}".split())[:400]
        if isinstance(error, ImportError):
            text += f"; pip install {error.name}"
        print(text, file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
