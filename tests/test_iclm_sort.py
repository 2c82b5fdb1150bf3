"""iclm_sort.py by slow loops in float64, by hand-made cases, and as a user runs it."""

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

import iclm_sort
import mamba
import transformer
from iclm_sort import (
    Config,
    build_graph,
    distinct_neighbours,
    drop_duplicates,
    nearest_neighbours,
    ordering_report,
    pack,
    traverse,
)

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent


def unit(n, d, seed=0, clusters=0):
    """Random unit rows, around so many centres."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d))
    if clusters:
        x = x * 0.5 + rng.standard_normal((clusters, d))[rng.integers(clusters, size=n)]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def lists(n, k, seed=0, clusters=4, d=8):
    return nearest_neighbours(unit(n, d, seed, clusters), k)


# ----- Embeddings -----------------------------------------------------------------------------------------------------

TEXTS = [
    "The cat sat on the mat; the cat slept.",
    "def read_file(path):\n    return open(path).read()",
    "naïve café déjà vu 日本語 text",
    "!!! ??? ...",
    "The dog sat on the mat, and the dog slept.",
    "word",
]


def slow_terms(text):
    """Words, split at underscores and between ideographs, and pairs; marks only where there are no words."""
    found = re.findall(
        r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]",
        text.lower(),
    )
    words = [w for w in found if w[0].isalnum()] or found
    codes = [zlib.crc32(w.encode()) for w in words]
    codes += [(a * 0x9E3779B1 + b + 1) % 2**64 for a, b in itertools.pairwise(codes)]
    return Counter((c * 0x9E3779B97F4A7C15 % 2**64) >> 47 for c in codes)


def test_embeddings_are_projected_tf_idf():
    counts = [slow_terms(text) for text in TEXTS]
    frequency = Counter(term for count in counts for term in count)
    table = torch.randn(iclm_sort.BUCKETS, 32, generator=torch.Generator().manual_seed(3)).double().numpy()
    ours = iclm_sort.embed_documents(TEXTS, dim=32, seed=3)
    for row, count in zip(ours, counts, strict=True):
        truth = sum((1 + math.log(c)) * (1 + math.log(7 / (1 + frequency[t]))) * table[t] for t, c in count.items())
        np.testing.assert_allclose(row, truth / np.linalg.norm(truth), atol=2e-6)
    assert ours.dtype == np.float32 and ours.shape == (6, 32)
    wide = iclm_sort.embed_documents(TEXTS, dim=1024)
    assert wide[0] @ wide[4] > 0.35 > 0.15 > abs(wide[0] @ wide[[1, 2, 3, 5]].T).max()
    np.testing.assert_array_equal(ours, iclm_sort.embed_documents(iter(TEXTS), dim=32, seed=3))
    assert not np.array_equal(ours, iclm_sort.embed_documents(TEXTS, dim=32, seed=4))


@pytest.mark.parametrize("texts", [[], ["fine", "  \n"]])
def test_there_must_be_text_to_embed(texts):
    with pytest.raises(ValueError, match="cannot embed"):
        iclm_sort.embed_documents(texts)


def test_what_is_not_blank_can_be_embedded():
    """An underscore is neither a word nor blank: a mark, then."""
    x = iclm_sort.embed_documents(["fine", "____", "_!_"])
    assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)


# ----- Neighbours -----------------------------------------------------------------------------------------------------


def slow_neighbours(x, k):
    """By float64 loops: falling similarity, then rising index, never itself."""
    x = x.astype(np.float64)
    rows = [sorted((-float(x[i] @ x[j]), j) for j in range(len(x)) if j != i)[:k] for i in range(len(x))]
    return np.array([[-s for s, _ in row] for row in rows]), np.array([[j for _, j in row] for row in rows])


@pytest.mark.parametrize(("n", "d", "k"), [(2, 3, 1), (9, 4, 8), (150, 8, 5), (61, 2, 20)])
@pytest.mark.parametrize("method", ["exact", "ivf"])
def test_neighbours_by_loops(n, d, k, method):
    x = unit(n, d, n)
    similarity, index = nearest_neighbours(x, k, method, recall=1.0)
    truth, numbers = slow_neighbours(x, k)
    assert similarity.dtype == np.float32 and index.dtype == np.int64
    np.testing.assert_allclose(similarity, truth, atol=1e-6)
    np.testing.assert_array_equal(index, numbers)


@pytest.mark.parametrize("method", ["exact", "ivf"])
def test_among_equal_similarities_some_are_taken(method):
    """Whole numbers, so that equal products are equal floats, many of them at the k-th place."""
    x = np.random.default_rng(0).integers(-1, 2, (90, 3)).astype(np.float32) + np.float32([4, 0, 0])
    truth, _ = slow_neighbours(x, 7)
    similarities, ids = nearest_neighbours(x, 7, method, recall=1.0)
    np.testing.assert_array_equal(similarities, truth)
    np.testing.assert_array_equal(np.einsum("nd,nkd->nk", x, x[ids]), truth)
    assert all(len({i, *row}) == 8 for i, row in enumerate(ids.tolist()))


def test_lists_shorter_than_k_are_filled_by_exact_search():
    """Copies of few points: an inverted list of one copy holds fewer than k others."""
    x = np.concatenate([np.eye(6, dtype=np.float32)] * 3)
    similarities, ids = nearest_neighbours(x, 9, "ivf", recall=0.1)
    truth, _ = slow_neighbours(x, 9)
    np.testing.assert_allclose(similarities, truth, atol=1e-6)
    assert ids.min() >= 0


def test_neighbours_in_many_parts_are_those_of_one(monkeypatch):
    """What processes share out: parts of the queries give bit for bit what all of them give."""
    x = unit(1000, 16, 3, 30)
    for method in ("exact", "ivf"):
        whole = nearest_neighbours(x, 6, method)
        monkeypatch.setattr(iclm_sort, "processes", lambda: (0, 1))
        rows = np.r_[100:200, 700:950]
        for all_of_them, some in zip(whole, nearest_neighbours(x, 6, method, rows=rows), strict=True):
            np.testing.assert_allclose(some, all_of_them[rows], atol=1e-6)


def test_ivf_reaches_the_recall_asked_for():
    x = unit(6000, 24, 2, 60)
    _, exact = nearest_neighbours(x, 10)
    shares = []
    for recall in (0.5, 0.9, 0.99):
        similarity, index = nearest_neighbours(x, 10, "ivf", recall)
        shares.append(float((exact[:, :, None] == index[:, None, :]).any(2).mean()))
        assert shares[-1] > recall - 0.03
        assert (np.diff(similarity, axis=1) <= 0).all() and (index != np.arange(6000)[:, None]).all()
        assert all(len(set(row)) == 10 for row in index.tolist())
        np.testing.assert_allclose(similarity, np.einsum("nd,nkd->nk", x, x[index]), atol=1e-6)
    assert shares == sorted(shares) and shares[0] < 0.99


def test_ivf_looks_into_as_many_lists_as_it_takes():
    """Without clusters the neighbours lie in lists far apart, and in more of them than a fixed few."""
    x = np.random.default_rng(3).standard_normal((8000, 24), dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    rows = np.arange(0, 8000, 40)
    exact, found = (nearest_neighbours(x, 10, method, 0.95, rows=rows)[1] for method in ("exact", "ivf"))
    assert (exact[:, :, None] == found[:, None, :]).any(2).mean() > 0.93


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_must_be_finite(value):
    x = unit(6, 4)
    x[2, 1] = value
    with pytest.raises(ValueError, match="finite"):
        nearest_neighbours(x, 2)


@pytest.mark.parametrize("k", [0, 5, 9])
def test_k_must_be_below_the_number_of_documents(k):
    with pytest.raises(ValueError, match=f"k {k} for 5 documents"):
        nearest_neighbours(unit(5, 3), k)


def test_unknown_methods_and_orders():
    with pytest.raises(ValueError, match="'hnsw'"):
        nearest_neighbours(unit(5, 3), 2, "hnsw")
    with pytest.raises(ValueError, match="'tsp' must be one of paper, edge"):
        traverse(build_graph(*lists(9, 3)), "tsp")


# ----- Duplicates and the graph ---------------------------------------------------------------------------------------


def test_of_two_alike_the_earlier_stays():
    x = unit(40, 5, 1)
    x[[7, 31]], x[20] = x[3], x[12]
    keep = drop_duplicates(*nearest_neighbours(x, 4), 0.999)
    assert np.flatnonzero(~keep).tolist() == [7, 20, 31]
    assert drop_duplicates(*nearest_neighbours(x, 4), 1.5).all()


@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.9])
def test_dropped_documents_by_loops(threshold):
    similarity, index = lists(200, 6, 5, d=3)
    like = defaultdict(set)
    for i, j, s in zip(np.arange(200).repeat(6), index.ravel(), similarity.ravel(), strict=True):
        if s >= threshold:
            like[min(i, j)].add(max(i, j))
    keep = [True] * 200
    for i in range(200):
        for j in like[i] if keep[i] else ():
            keep[j] = False
    ours = drop_duplicates(similarity, index, threshold)
    assert ours.tolist() == keep and 0 < sum(keep) < 200
    chain = np.array([[1, 2], [0, 2], [1, 0]])  # 0 ~ 1 ~ 2, but not 0 ~ 2: what drops 2 is gone, so 2 stays
    assert drop_duplicates(np.array([[0.99, 0.1], [0.99, 0.97], [0.97, 0.1]]), chain, 0.95).tolist() == [
        True,
        False,
        True,
    ]


def test_of_sixty_copies_one_stays():
    """Near-copies fill one another's lists of ten; what stays still finds its true neighbours."""
    rng = np.random.default_rng(0)
    others = unit(200, 16, 1, 20)
    copies = others[7] + 0.005 * rng.standard_normal((60, 16)).astype(np.float32)
    x = np.concatenate([others, copies / np.linalg.norm(copies, axis=1, keepdims=True)])
    threshold = 0.98
    similarities, ids, keep = distinct_neighbours(x, 10, threshold)
    near = (x @ x.T >= threshold) & keep & keep[:, None]
    assert near.sum() == keep.sum()  # each is near itself alone, of all pairs and not of lists only
    assert keep[7] and not keep[200:].any()
    kept = np.flatnonzero(keep)
    truth, numbers = slow_neighbours(x[kept], 10)
    np.testing.assert_allclose(similarities[kept], truth, atol=1e-6)
    np.testing.assert_array_equal(ids[kept], kept[numbers])
    assert (ids[~keep] == -1).all() and np.isneginf(similarities[~keep]).all()


def test_copies_alone():
    similarities, ids, keep = distinct_neighbours(np.ones((40, 3), np.float32) / 3**0.5, 10, 0.9)
    assert keep.tolist() == [True] + [False] * 39 and (ids == -1).all()
    assert traverse(build_graph(similarities, ids, keep)).tolist() == [0]


def test_a_threshold_must_be_a_number():
    with pytest.raises(ValueError, match="threshold nan"):
        drop_duplicates(*lists(9, 3), math.nan)


def test_a_cosine_at_the_threshold_drops():
    assert drop_duplicates(np.array([[0.5], [0.5]], np.float32), np.array([[1], [0]]), 0.5).tolist() == [True, False]


def slow_graph(similarity, index, keep):
    """Rows of (neighbour, weight) by sets and dictionaries."""
    edges = {}
    for i, row in enumerate(index.tolist()):
        for j, weight in zip(row, similarity[i].tolist(), strict=True):
            if j >= 0 and keep[i] and keep[j]:
                for pair in ((i, j), (j, i)):
                    edges[pair] = max(weight, edges.get(pair, -2))
    rows = [[] for _ in index]
    for (i, j), weight in edges.items():
        rows[i].append((j, weight))
    return [sorted(row) for row in rows]


def rows_of(graph):
    spans = itertools.pairwise(graph.indptr.tolist())
    return [list(zip(graph.neighbours[a:b].tolist(), graph.weights[a:b].tolist(), strict=True)) for a, b in spans]


@pytest.mark.parametrize("seed", range(4))
def test_graph_by_loops(seed):
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(5, 300)), int(rng.integers(1, 5))
    similarity, index = lists(n, k, seed)
    similarity += rng.choice([0, 1e-7], similarity.shape).astype(np.float32)  # the two ways round differ by rounding
    similarity = np.round(similarity, 2) if seed == 3 else similarity  # many ties
    index[rng.random(index.shape) < 0.05] = -1
    keep = rng.random(n) < 0.8
    graph = build_graph(similarity, index, keep)
    assert rows_of(graph) == slow_graph(similarity, index, keep)
    assert graph.weights.dtype == np.float32 and graph.keep.tolist() == keep.tolist()
    assert rows_of(build_graph(similarity, index)) == slow_graph(similarity, index, [True] * n)


def test_graph_with_a_hub():
    similarity, index = lists(700, 3, 7)
    index[1:, 2], similarity[1:, 2] = 0, np.linspace(-0.9, -0.5, 699)
    again = (index[:, :2] == 0).any(1)
    index[again, 2] = -1
    graph = build_graph(similarity, index)
    assert rows_of(graph) == slow_graph(similarity, index, [True] * 700)
    falling = sorted(rows_of(graph)[0], key=lambda arc: (-arc[1], arc[0]))
    assert graph.row(0).tolist() == [j for j, _ in falling]


# ----- Orders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["paper", "edge", "random", "file"])
@pytest.mark.parametrize("n", [2, 37, 400])
def test_each_kept_document_once_and_the_same_again(order, n):
    x = unit(n, 6, n, 5)
    keep = np.arange(n) % 7 != 3
    graph = build_graph(*nearest_neighbours(x, min(5, n - 1)), keep)
    for embeddings in (x, None) if order == "edge" else (x,):
        path = traverse(graph, order, 1, embeddings)
        assert path.dtype == np.int64 and sorted(path.tolist()) == np.flatnonzero(keep).tolist()
        assert path.tolist() == traverse(graph, order, 1, embeddings).tolist()
    if order in ("random", "paper") and n == 400:
        assert path.tolist() != traverse(graph, order, 2, x).tolist()


def test_a_chain_is_walked_from_an_end():
    indptr, neighbours = np.array([0, 1, 3, 4, 4]), np.array([1, 0, 2, 1], np.int32)
    weights = np.array([0.5, 0.5, 0.9, 0.9], np.float32)
    graph = iclm_sort.Graph(indptr, neighbours, weights, np.ones(4, bool))
    paths = {tuple(traverse(graph, seed=seed).tolist()) for seed in range(20)}
    assert paths == {(3, 0, 1, 2), (3, 2, 1, 0)}  # the one without an edge, then the chain


def test_nothing_kept():
    graph = build_graph(*lists(9, 3), np.zeros(9, bool))
    assert [len(traverse(graph, order, embeddings=unit(9, 8))) for order in iclm_sort.ORDERS] == [0] * 5


def test_the_walk_follows_the_algorithm():
    """Each step goes to the heaviest unvisited neighbour; else to an unvisited one of least degree."""
    for seed in range(10):
        graph = build_graph(*lists(120, 3, seed))
        rows, path = rows_of(graph), traverse(graph, "paper", seed).tolist()
        left = set(range(120))
        for step, node in enumerate(path):
            options = [(w, -j) for j, w in rows[path[step - 1]] if j in left] if step else []
            if options:
                assert node == -max(options)[1]
            else:
                assert len(rows[node]) == min(len(rows[i]) for i in left)
            left.remove(node)


def test_the_start_is_drawn_among_the_least():
    """A star of three leaves and two pairs: each of the seven documents of degree 1 starts as often as the others."""
    index = np.array([[1], [0], [0], [0], [5], [4], [7], [6]])
    graph = build_graph(np.full((8, 1), 0.5, np.float32), index)
    starts = Counter(int(traverse(graph, "paper", seed)[0]) for seed in range(700))
    assert starts.keys() == {1, 2, 3, 4, 5, 6, 7} and min(starts.values()) > 60


def test_edge_matching_by_loops():
    for seed in range(6):
        graph = build_graph(*lists(90, 4, seed))
        edges = sorted((-w, i, j) for i, row in enumerate(rows_of(graph)) for j, w in row if i < j)
        fragment, ends, taken = {i: i for i in range(90)}, Counter(), set()
        for _, i, j in edges:
            if ends[i] < 2 and ends[j] < 2 and fragment[i] != fragment[j]:
                taken.add((i, j))
                ends.update([i, j])
                old = fragment[j]
                fragment = {node: fragment[i] if f == old else f for node, f in fragment.items()}
        path = traverse(graph, "edge", seed=seed).tolist()
        steps = {(min(a, b), max(a, b)) for a, b in itertools.pairwise(path)}
        assert taken <= steps and len(steps) == 89
        for embeddings in (unit(90, 8, seed, 4),):  # joined ends keep every edge that was taken
            path = traverse(graph, "edge", seed=seed, embeddings=embeddings).tolist()
            assert taken <= {(min(a, b), max(a, b)) for a, b in itertools.pairwise(path)}


def best_path(x):
    """The heaviest path through a few documents, by trying all of them."""
    cosine = (x @ x.T).tolist()
    return max(sum(cosine[a][b] for a, b in itertools.pairwise(p)) for p in itertools.permutations(range(len(x))))


def test_orders_against_the_heaviest_path():
    shares = defaultdict(list)
    for seed in range(12):
        x = unit(7, 3, seed)
        graph = build_graph(*nearest_neighbours(x, 6))
        for order in ("paper", "edge"):
            path = traverse(graph, order, seed=seed, embeddings=x)
            total = float((x[path[1:]] * x[path[:-1]]).sum())
            assert total <= best_path(x) + 1e-4
            shares[order].append(total / best_path(x))
    assert min(np.mean(s) for s in shares.values()) > 0.85


def test_edge_joins_better_than_the_walk():
    x = unit(3000, 16, 4, 200)
    graph = build_graph(*nearest_neighbours(x, 8))
    share = {
        order: ordering_report(x, traverse(graph, order, embeddings=x), graph)["share_of_bound"]
        for order in iclm_sort.ORDERS
        if order != "knn"
    }
    assert 1 > share["edge"] > share["paper"] + 0.01 > share["random"] + 0.3


def test_knn_repeats_each_document_before_its_best_neighbours():
    graph = build_graph(*lists(30, 4))
    path, rows = traverse(graph, "knn", repeats=3).tolist(), rows_of(graph)
    seen = []
    while path:
        node, *path = path
        best = [j for j, _ in sorted(rows[node], key=lambda arc: (-arc[1], arc[0]))[:3]]
        assert path[: len(best)] == best
        path = path[len(best) :]
        seen.append(node)
    assert sorted(seen) == list(range(30)) != seen


# ----- Contexts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [99, None])
@pytest.mark.parametrize("length", [1, 4, 7, 1000])
def test_pack_by_loops(separator, length):
    r = random.Random(length)
    tokens = [np.array([r.randrange(90)] * r.randrange(30), np.uint16) for _ in range(12)]
    order, flat = r.sample(range(12), 9), []
    for i in order:
        flat += [*tokens[i].tolist(), *([separator] if separator is not None else [])]
    while len(flat) % length:
        flat.append(separator or 0)
    contexts = pack(tokens, np.array(order), length, separator)
    assert contexts.dtype == np.uint16 and contexts.shape == (len(flat) // length, length)
    assert contexts.ravel().tolist() == flat


def test_pack_refuses_no_documents():
    with pytest.raises(ValueError, match="no documents"):
        pack([np.arange(5, dtype=np.uint16)], np.array([], np.int64), 4, 9)


# ----- What an order is worth -----------------------------------------------------------------------------------------


def test_report_by_loops():
    x, labels = unit(60, 8, 2, 5), np.arange(60) // 7
    keep = np.arange(60) % 9 != 4
    graph = build_graph(*nearest_neighbours(x, 4), keep)
    cosine = x.astype(np.float64) @ x.T
    for order in (traverse(graph, "paper"), traverse(graph, "random")):
        steps, rows, runs = list(itertools.pairwise(order.tolist())), rows_of(graph), [1]
        for a, b in steps:
            runs = [*runs[:-1], runs[-1] + 1] if b in dict(rows[a]) else [*runs, 1]
        best = []
        for i in order.tolist():
            weights = dict(rows[i]) | {sum(step) - i: cosine[step] for step in steps if i in step}
            best += [max(0, w) for w in sorted(weights.values())[-2:]]
        expected = {
            "each_once": True,
            "adjacent_cosine": np.mean([cosine[step] for step in steps]),
            "bound": sum(best) / 2 / len(order),
            "share_of_bound": sum(cosine[step] for step in steps) / (sum(best) / 2),
            "segments": len(runs),
            "longest_segment": max(runs),
            "label_purity": np.mean([labels[a] == labels[b] for a, b in steps]),
        }
        assert ordering_report(x, order, graph, labels) == pytest.approx(expected, abs=1e-6)
    assert not ordering_report(x, order[:-1], graph)["each_once"]
    assert not ordering_report(x, np.append(order[:-1], order[0]), graph)["each_once"]


def test_no_path_is_better_than_its_bound():
    """With lists of one, whose edges miss most of the good steps; a ring of pairs is exactly 1."""
    for seed in range(20):
        x = unit(9, 2, seed)
        graph = build_graph(*nearest_neighbours(x, 1))
        for order in itertools.islice(itertools.permutations(range(9)), 0, 360_000, 9_001):
            assert ordering_report(x, np.array(order), graph)["share_of_bound"] <= 1 + 1e-9
    pair = np.array([[1.0, 0.0], [0.8, 0.6]], np.float32)
    graph = build_graph(*nearest_neighbours(pair, 1))
    assert ordering_report(pair, np.arange(2), graph)["share_of_bound"] == pytest.approx(1)


def test_report_over_many_blocks():
    """The mean over 10,000 documents is that over all steps, those between two blocks too."""
    x = unit(10_000, 2)
    x[[4095, 4096, 4097, 8191, 8192, 8193]] *= 1000  # a step that is left out, or counted twice, shows
    cosine = (x[1:].astype(np.float64) * x[:-1]).sum(1).mean()
    empty = iclm_sort.Graph(np.zeros(10_001, np.int64), *(np.zeros(0, t) for t in "if"), np.ones(10_000, bool))
    report = ordering_report(x, np.arange(10_000), empty)
    assert report["adjacent_cosine"] == pytest.approx(cosine, rel=1e-4)


# ----- Tokenizers and input -------------------------------------------------------------------------------------------


def test_learnt_merges_are_those_of_the_other_scripts():
    texts = [text for _, text in zip(range(15), transformer.python_documents(), strict=False)]
    ours = iclm_sort.open_vocabulary("bpe:350", texts)
    theirs = transformer.load_tokenizer("bpe:350", texts)
    assert ours.encode(texts[:5]) == [theirs.encode(text).tolist() for text in texts[:5]]
    assert (ours.size, ours.separator) == (theirs.vocab_size, theirs.separator)


@pytest.mark.parametrize("name", ["bpe:256", "bpe:x", "bpe:99999", "no-such", "missing.json", "missing.tiktoken"])
def test_unknown_tokenizers(name):
    with pytest.raises(ValueError, match=f"--tokenizer {re.escape(name)}: (needs|bpe:N|unknown|no such file)"):
        iclm_sort.open_vocabulary(name, ["text"])


BAD_RANKS = {
    "empty": [],
    "words only": [(b"a", 0), (b"b", 1)],
    "twice": [(bytes([b]), b // 2) for b in range(256)],
    "negative": [(bytes([b]), b - 1) for b in range(256)],
    "no base64": [],
}


@pytest.mark.parametrize("case", BAD_RANKS)
def test_bad_tiktoken_files(tmp_path, case):
    path = tmp_path / "x.tiktoken"
    rows = [base64.b64encode(token) + b" %d\n" % rank for token, rank in BAD_RANKS[case]]
    path.write_bytes(b"".join(rows) + b"?? 1\n" * (case == "no base64"))
    with pytest.raises(iclm_sort.UserError, match=r"x.tiktoken: (must rank all 256|each line must be).*correct it"):
        iclm_sort.open_vocabulary(str(path), [])


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def corpus(tmp_path, n=60, **changes):
    r = random.Random(0)
    words = [["".join(r.choices("abcdefgh", k=5)) for _ in range(12)] for _ in range(6)]
    rows = [{"text": " ".join(r.choices(words[i % 6], k=20)), "id": i, "label": f"topic {i % 6}"} for i in range(n)]
    return write_lines(tmp_path / "corpus.jsonl", rows)


def read(path, **flags):
    source = iclm_sort.Source(Config(input=str(path), **flags))
    return list(source), source


def test_input_of_lines_files_and_folders(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    write_lines(
        tmp_path / "in" / "x.jsonl",
        [{"text": "one", "id": 7, "label": "L", "extra": 1}, {"text": "two"}, {"text": " "}],
    )
    (tmp_path / "in" / "a" / "b.txt").write_text("\ufeffthree", "utf-8")
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "in" / ".hidden").write_text("no")
    documents, source = read(tmp_path / "in")
    assert [(d.text, d.id, d.label) for d in documents] == [
        ("three", "a/b.txt", "a"),
        ("one", "7", "L"),
        ("two", "x.jsonl:2", ""),
    ]
    assert source.counts == {"files that are not UTF-8": 1, "empty documents": 1} and source.done == source.total
    write_lines(tmp_path / "y.jsonl", [{"body": "hi", "kind": "k"}])
    documents, _ = read(tmp_path / "y.jsonl", text_field="body", label_field="kind")
    assert [(d.text, d.label) for d in documents] == [("hi", "k")]


BAD_LINES = {
    '{"text": "cut': 'must be a JSON object with a string "text"|must be a JSON object with a string',
    '{"body": "x", "url": "y"}': "has body, url",
    '{"text": 3}': "string",
    "[1, 2]": "object",
    "[" * 100_000: "object",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20])
def test_a_broken_line_is_named_or_counted(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + '\n{"text": "fine too"}\n')
    with pytest.raises(ValueError, match=rf"bad.jsonl, line 2: .*({BAD_LINES[line]}).*--skip-bad"):
        read(path)
    documents, source = read(path, skip_bad=True)
    assert [d.text for d in documents] == ["fine", "fine too"] and source.counts == {"bad lines": 1}


def test_python_functions_are_labelled_by_module():
    found = list(itertools.islice(iclm_sort.python_functions(), 400))
    assert all(d.id.startswith(d.label + ".") and "def " in d.text and len(d.text) >= 100 for d in found)
    assert len({d.label for d in found}) > 5


# ----- The model and the experiment -----------------------------------------------------------------------------------


def test_documents_are_apart_with_starts():
    config = Config(d_model=16, n_layer=2, n_head=2)
    torch.manual_seed(1)
    model = iclm_sort.CausalLM(config, 30).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    first, second = torch.randint(30, (2, 5)), torch.randint(30, (2, 6))
    both, starts = torch.cat([first, second], 1), torch.zeros(2, 11, dtype=torch.bool)
    starts[:, [0, 5]] = True
    apart = model(both, starts)
    torch.testing.assert_close(apart[:, :5], model(first))
    torch.testing.assert_close(apart[:, 5:], model(second))  # rotary positions are relative
    assert not torch.allclose(model(both)[:, 5:], model(second))
    changed = both.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 30
    torch.testing.assert_close(model(changed)[:, :8], model(both)[:, :8])
    losses = model.losses(both)
    truth = -(model(both[:, :-1]) @ model.embedding.weight.T).log_softmax(-1).gather(-1, both[:, 1:, None])[..., 0]
    torch.testing.assert_close(losses, truth)
    torch.testing.assert_close(model.losses(both, 3), truth[:, -3:])


def test_losses_are_those_of_training():
    model = iclm_sort.CausalLM(Config(d_model=16, n_layer=1, n_head=2), 30)
    tokens = torch.randint(0, 30, (11, 9), generator=torch.Generator().manual_seed(0))
    losses = model.losses(tokens)
    whole = iclm_sort.head_loss(model(tokens[:, :-1]), model.embedding.weight, tokens[:, 1:])
    assert losses.shape == (11, 8) and losses.mean().item() == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(model.losses(tokens, 3), losses[:, -3:])


@pytest.fixture
def sorted_documents():
    """240 documents of forty labels; every token of document i is i, the separator is 255."""
    sizes = np.random.default_rng(0).integers(9, 30, 240)
    tokens = iclm_sort.Ragged(np.repeat(np.arange(240), sizes).astype(np.uint16), np.append(0, sizes.cumsum()))
    x = unit(240, 8, 3, 12)
    found = nearest_neighbours(x, 5)
    graph = build_graph(*found, np.arange(240) % 11 != 5)
    labels = [f"label {i % 40}" for i in range(240)]
    return iclm_sort.Sorted(tokens, {"document_separator": 255}, labels, x, *found, graph, graph.nodes())


def test_held_out_documents_are_not_trained_on(sorted_documents):
    done = sorted_documents
    train, held = iclm_sort.split(done)
    assert not (train.keep & held.keep).any() and ((train.keep | held.keep) == done.graph.keep).all()
    names = [{done.labels[i] for i in graph.nodes()} for graph in (train, held)]
    assert not names[0] & names[1] and [len(part) for part in names] == [36, 4]
    for graph in (train, held):
        assert graph.keep[graph.neighbours].all()
    done.labels = [""] * 240
    assert 20 <= iclm_sort.split(done)[1].keep.sum() <= 24  # every tenth document
    done.labels = ["the folder of all files"] * 240
    train, held = iclm_sort.split(done)
    assert 20 <= held.keep.sum() <= 24 and train.keep.sum() + held.keep.sum() == done.graph.keep.sum()


def test_a_context_too_short_to_judge_by(sorted_documents):
    with pytest.raises(iclm_sort.UserError, match="--context-length 3: must be at least 4 to train on; raise it"):
        iclm_sort.hold_out(sorted_documents, Config(context_length=3, device="cpu"), sorted_documents.graph)


def test_what_stands_before_the_targets(sorted_documents):
    graph = sorted_documents.graph
    held = iclm_sort.hold_out(sorted_documents, Config(context_length=64, device="cpu"), graph, target=8, most=30)
    assert held.alone.shape == (30, 9) and held.random.shape[1] == held.related.shape[1] == 64
    for t, (separator, i, *rest) in enumerate(held.alone.tolist()):
        assert separator == 255 and rest == [i] * 7
        best = graph.neighbours[graph.indptr[i] : graph.indptr[i + 1]].tolist()
        for name, rows in held.after.items():
            past, wanted = rows[t].tolist()[:55], rows[t].tolist()[55:]
            nearest_first = [j for j in dict.fromkeys(reversed(past)) if j != 255]
            assert wanted == held.alone[t].tolist() and i not in past and past[-1] == nearest_first[0]
            if name == "related":
                assert nearest_first[: len(best)] == best[: len(nearest_first)]
            else:
                assert not set(best) & set(past)
    assert set(held.random.unique().tolist()) <= {255, *graph.nodes().tolist()}


def test_a_gain_is_what_the_past_takes_off_the_loss():
    held = iclm_sort.HeldOut(*(torch.zeros(2, 9) for _ in range(3)), {n: torch.zeros(2, 9) for n in ("near", "far")})
    values = {id(held.random): 5.0, id(held.related): 4.0, id(held.after["near"]): 1.0, id(held.after["far"]): 3.0}

    class Model:
        def losses(self, tokens, last=0):
            return torch.full((2, last or 8), values[id(tokens)]) if id(tokens) in values else torch.arange(8.0)[None]

    scores = iclm_sort.judge(Model(), held)
    assert (scores["random_order_loss"], scores["related_order_loss"], scores["no_context_loss"]) == (5, 4, 3.5)
    assert (scores["near_context_gain"], scores["far_context_gain"]) == (2.5, 0.5)
    assert scores["near_context_loss"] == 1 and scores["no_context_loss_at"] == {"0-3": 1.5, "4-7": 5.5}


def test_a_model_learns_and_its_start_is_the_seeds():
    contexts = np.tile(np.arange(17, dtype=np.uint16), (8, 1))
    config = Config(d_model=16, n_layer=1, n_head=2, steps=150, batch=4, lr=1e-2)
    models = [iclm_sort.train_arm("a", contexts, None, config, 30) for _ in range(2)]
    assert models[0].losses(torch.from_numpy(contexts.astype(np.int64))).mean() < 0.1 < math.log(30)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(FloatingPointError, match=r"diverged at step .* lower --lr"):
        iclm_sort.train_arm("a", contexts, None, Config(d_model=16, n_layer=1, n_head=2, steps=60, lr=1e30), 30)


# ----- As a user runs it ----------------------------------------------------------------------------------------------


def run(*words, launcher=()):
    """In a process of its own."""
    command = [sys.executable, *launcher, ROOT / "iclm_sort.py", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def here(capsys):
    """The command line in this process: what it prints, after checking the status."""

    def run_here(*words, status=0):
        found = iclm_sort.main([*map(str, words)])
        printed = capsys.readouterr()
        assert found == status, printed
        return printed.err if status else printed.out

    return run_here


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    """Drawing takes longer than all else; two tests draw."""
    if not re.search("sorted_tokens|drawn", request.node.name):
        monkeypatch.setattr(iclm_sort, "picture", lambda *_: None)


SORT = ("--context-length", "64", "--k", "5", "--tokenizer", "bpe:300", "--dim", "64")


def test_sorted_tokens_are_read_by_mamba(tmp_path, here, capsys):
    out = tmp_path / "out"
    here("sort", "--input", corpus(tmp_path, 200), "--out", out, *SORT)
    about, order = json.loads((out / "train.json").read_text()), np.load(out / "order.npy")
    tokens = np.fromfile(out / "train.bin", "<u2")
    report = json.loads((out / "report.json").read_text())
    assert report["orders"]["paper"]["each_once"] and len(order) == 200 - round(200 * report["duplicates"])
    assert (out / "order.png").stat().st_size > 10_000
    given = mamba.load_corpus(str(out / "train.bin"), "byte")
    assert given.separator == about["document_separator"] == 299 and given.vocab_size == 300
    texts = [json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    expected = [x for i in order for x in (*given.tokenizer.encode(texts[i]), 299)]
    contexts = {tuple(c) for c in itertools.zip_longest(*[iter(expected)] * 64, fillvalue=299)}
    assert {tuple(c) for c in tokens.reshape(-1, 64).tolist()} == contexts  # the same ids and cuts, in another order
    assert mamba.main(["--data", str(out / "train.bin"), "--smoke", "--out", str(tmp_path / "mamba")]) == 0
    assert (tmp_path / "mamba" / "smoke" / "result.json").is_file()


def test_embeddings_of_one_number_are_drawn(tmp_path, here):
    np.save(tmp_path / "x.npy", unit(60, 1))
    flags = ("sort", "--input", corpus(tmp_path), "--out", tmp_path / "out", *SORT, "--threshold", "2")
    here(*flags, "--embeddings", tmp_path / "x.npy")
    assert (tmp_path / "out" / "order.png").stat().st_size > 10_000


def test_stages_are_kept_where_nothing_changed(tmp_path, here):
    first, out = (corpus(tmp_path), tmp_path / "out")
    here("sort", "--input", first, "--out", out, *SORT)
    before = {name: (out / name).read_bytes() for name in ("train.bin", "order.npy")}
    words = here("sort", "--input", first, "--out", out, *SORT, "--resume")
    assert all(f"{stage}: kept" in words for stage in iclm_sort.NEEDS)
    assert before == {name: (out / name).read_bytes() for name in before}
    words = here("sort", "--input", first, "--out", out, *SORT, "--resume", "--order", "edge")
    assert "graph: kept" in words and "order: kept" not in words
    assert before["order.npy"] != (out / "order.npy").read_bytes()
    words = here("sort", "--input", first, "--out", out, *SORT, "--resume", "--k", "4")
    assert "embed: kept" in words and "neighbours: kept" not in words
    os.utime(first, (1, 1))
    assert "kept from" not in here("sort", "--input", first, "--out", out, *SORT, "--resume")
    (out / "stages" / "graph" / "key").unlink()  # as if stopped while writing it
    words = here("sort", "--input", first, "--out", out, *SORT, "--resume")
    assert "neighbours: kept" in words and "graph: kept" not in words


def test_two_processes_find_the_same(tmp_path, here):
    first = corpus(tmp_path, 1500)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    here("sort", "--input", first, "--out", tmp_path / "one", *SORT)
    run("sort", "--input", first, "--out", tmp_path / "two", *SORT, launcher=launcher)
    for name in ("order.npy", "train.bin", "stages/neighbours/similarity.npy", "stages/neighbours/index.npy"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_embeddings_of_ones_own(tmp_path, here):
    first = corpus(tmp_path)
    x = unit(60, 16, 1, 6) * np.linspace(1, 9, 60, dtype=np.float32)[:, None]
    np.save(tmp_path / "x.npy", x)
    here("sort", "--input", first, "--out", tmp_path / "out", *SORT, "--embeddings", tmp_path / "x.npy")
    ours = np.load(tmp_path / "out" / "stages" / "embed" / "x.npy")
    np.testing.assert_allclose(ours, x / np.linalg.norm(x, axis=1, keepdims=True), atol=1e-6)


def bad_embeddings(tmp_path, name):
    x = unit(60, 4)
    x = {
        "count": x[:50],
        "NaN": np.where(np.arange(60)[:, None] == 9, np.nan, x),
        "zero": x * (np.arange(60) != 4)[:, None],
    }.get(name, x[0])
    np.save(tmp_path / "x.npy", x)
    return ("--embeddings", tmp_path / "x.npy")


BAD_INPUT = {
    "count": "50 rows, must be one for each of the 60 documents",
    "NaN": "row 9 is not finite",
    "zero": "row 4 is zero",
    "shape": r"shape \(4,\) must be \(documents, dimensions\)",
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_embeddings(tmp_path, name, here):
    flags = ("sort", "--input", corpus(tmp_path), "--out", tmp_path / "out", *SORT)
    assert re.search(BAD_INPUT[name], here(*flags, *bad_embeddings(tmp_path, name), status=2))
    assert "read: kept" in here(*flags, "--resume")  # nothing that was done is lost


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--input", "nowhere"), "--input nowhere: no such file or folder"),
        (("--k", "60"), "--k 60: must be below the 60 documents"),
        (("--order", "tsp"), "--order tsp: must be one of paper, edge"),
        (("--encoder", "nowhere"), "--encoder nowhere: holds no config.json"),
        (("--context-length", "0"), "--context-length 0: must be at least 1"),
        (("--encoder", "a", "--embeddings", "b"), "--encoder and --embeddings"),
        (("--text-field", "body"), "has text, id, label"),
        (("--lr", "nan"), "--lr nan: must be a number above 0"),
        (("--lr", "-1"), "--lr -1.0: must be a number above 0"),
        (("--recall", "1.5"), "--recall 1.5: must be above 0 and at most 1"),
    ],
)
def test_bad_flags(tmp_path, here, flags, message):
    words = ("sort", "--input", corpus(tmp_path), "--out", tmp_path / "out", *SORT, *flags)
    error = here(*words, status=2)
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", ["words", "complex", "empty", "archive", "pickled"])
def test_a_file_that_holds_no_embeddings(tmp_path, kind):
    path, x = tmp_path / "x.npy", unit(60, 4)
    with open(path, "wb") as file:
        if kind == "archive":
            np.savez(file, x=x)
        elif kind != "empty":
            np.save(file, {"words": x.astype(str), "complex": x * 1j, "pickled": np.array([x, None], object)}[kind])
    config = Config(embeddings=str(path), out=str(tmp_path))
    with pytest.raises(iclm_sort.UserError, match=r"x.npy: must be (a|one) .npy array.*; give another"):
        iclm_sort.embed_stage(None, config, 60, torch.device("cpu"), tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_encoder_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(iclm_sort.UserError, match=r"config.json: must (be JSON|hold a JSON object)"):
        iclm_sort.Encoder(str(tmp_path), torch.device("cpu"))


@pytest.mark.parametrize("case", ["weight", "shape", "setting", "words", "list"])
def test_an_encoder_whose_files_do_not_fit(tmp_path, case):
    """Refused by name before any text is read; whole, the same files are an encoder."""
    config = {"model_type": "bert", "hidden_act": "gelu", "hidden_size": 8, "max_position_embeddings": 5}
    config |= {"num_attention_heads": 2, "num_hidden_layers": 1}
    shapes = {f"embeddings.{n}_embeddings": (5, 8) for n in ("word", "position", "token_type")}
    parts = ("self.query", "self.key", "self.value", "output.dense")
    shapes |= {f"encoder.layer.0.attention.{n}": (8, 8) for n in parts}
    shapes |= {"encoder.layer.0.intermediate.dense": (32, 8), "encoder.layer.0.output.dense": (8, 32)}
    norms = ("embeddings.", "encoder.layer.0.attention.output.", "encoder.layer.0.output.")
    weights = {f"{n}LayerNorm.{part}": torch.ones(8) for n in norms for part in ("weight", "bias")}
    weights |= {f"{n}.weight": torch.randn(shape) for n, shape in shapes.items()}
    weights |= {f"{n}.bias": torch.zeros(shape[0]) for n, shape in shapes.items() if "encoder" in n}

    def save(settings, tensors):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nword")
        torch.save(tensors, tmp_path / "pytorch_model.bin")

    save(config | {"layer_norm_eps": 1e-12}, weights)
    assert iclm_sort.Encoder(str(tmp_path), torch.device("cpu")).embed(["word", "a word"]).shape == (2, 8)
    if case == "weight":
        del weights["encoder.layer.0.output.dense.bias"]
    elif case == "shape":
        weights["encoder.layer.0.output.dense.bias"] = torch.zeros(9)
    elif case == "words":
        weights["embeddings.word_embeddings.weight"] = torch.randn(4, 8)
    settings = config if case == "setting" else config | {"layer_norm_eps": 1e-12}
    save(settings, [weights] if case == "list" else weights)
    with pytest.raises(iclm_sort.UserError, match=r"must fit each other .*; give one|not a file of tensors"):
        iclm_sort.Encoder(str(tmp_path), torch.device("cpu"))


def test_an_empty_folder(tmp_path, here):
    (tmp_path / "in").mkdir()
    assert "holds no documents" in here("sort", "--input", tmp_path / "in", "--out", tmp_path / "out", status=2)


def test_a_document_longer_than_many_contexts(tmp_path, here):
    rows = [{"text": f"short words number {i}"} for i in range(20)] + [{"text": "long words " * 2000}]
    first = write_lines(tmp_path / "long.jsonl", rows)
    here("sort", "--input", first, "--out", tmp_path / "out", *SORT[:-4], "--tokenizer", "byte")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["documents_longer_than_a_context"] == 1
    assert (np.fromfile(tmp_path / "out" / "train.bin", "<u2") == 256).sum() >= 20
