"""iclm_sort.py by slow loops in float64, by hand-made cases, and as a user runs it."""

import importlib
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


# ----- Embeddings ---------------------------------------------------------------------------------

TEXTS = [
    "The cat sat on the mat; the cat slept.",
    "def read_file(path):\n    return open(path).read()",
    "naïve café déjà vu 日本語 text",
    "!!! ??? ...",
    "The dog sat on the mat, and the dog slept.",
    "word",
]


def slow_terms(text):
    """Words, cut at underscores and between ideographs, and pairs; or else marks."""
    found = re.findall(
        r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
        r"|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]",
        text.lower(),
    )
    words = [w for w in found if w[0].isalnum()] or found
    codes = [zlib.crc32(w.encode()) for w in words]
    codes += [(a * 0x9E3779B1 + b + 1) % 2**64 for a, b in itertools.pairwise(codes)]
    return Counter((c * 0x9E3779B97F4A7C15 % 2**64) >> 47 for c in codes)


def test_embeddings_are_projected_tf_idf():
    counts = [slow_terms(text) for text in TEXTS]
    frequency = Counter(term for count in counts for term in count)
    table = (
        torch.randn(iclm_sort.BUCKETS, 32, generator=torch.Generator().manual_seed(3))
        .double()
        .numpy()
    )
    ours = iclm_sort.embed_documents(TEXTS, dim=32, seed=3)
    for row, count in zip(ours, counts, strict=True):
        truth = sum(
            (1 + math.log(c)) * (1 + math.log(7 / (1 + frequency[t]))) * table[t]
            for t, c in count.items()
        )
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


# ----- Neighbours ---------------------------------------------------------------------------------


def slow_neighbours(x, k):
    """By float64 loops: falling similarity, then rising index, never itself."""
    x = x.astype(np.float64)
    rows = [
        sorted((-float(x[i] @ x[j]), j) for j in range(len(x)) if j != i)[:k] for i in range(len(x))
    ]
    return np.array([[-s for s, _ in row] for row in rows]), np.array(
        [[j for _, j in row] for row in rows]
    )


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
        for all_of_them, some in zip(
            whole, nearest_neighbours(x, 6, method, rows=rows), strict=True
        ):
            np.testing.assert_allclose(some, all_of_them[rows], atol=1e-6)


def test_ivf_reaches_the_recall_asked_for():
    x = unit(6000, 24, 2, 60)
    _, exact = nearest_neighbours(x, 10)
    shares = []
    for recall in (0.5, 0.9, 0.99):
        similarity, index = nearest_neighbours(x, 10, "ivf", recall)
        shares.append(float((exact[:, :, None] == index[:, None, :]).any(2).mean()))
        assert shares[-1] > recall - 0.03
        assert (np.diff(similarity, axis=1) <= 0).all() and (
            index != np.arange(6000)[:, None]
        ).all()
        assert all(len(set(row)) == 10 for row in index.tolist())
        np.testing.assert_allclose(similarity, np.einsum("nd,nkd->nk", x, x[index]), atol=1e-6)
    assert shares == sorted(shares) and shares[0] < 0.99


def test_ivf_looks_into_as_many_lists_as_it_takes():
    """Without clusters the neighbours lie in lists far apart, in more than a fixed few."""
    x = np.random.default_rng(3).standard_normal((8000, 24), dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    rows = np.arange(0, 8000, 40)
    exact, found = (
        nearest_neighbours(x, 10, method, 0.95, rows=rows)[1] for method in ("exact", "ivf")
    )
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


# ----- Duplicates and the graph -------------------------------------------------------------------


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
    chain = np.array(
        [[1, 2], [0, 2], [1, 0]]
    )  # 0 ~ 1 ~ 2, but not 0 ~ 2: what drops 2 is gone, so 2 stays
    assert drop_duplicates(
        np.array([[0.99, 0.1], [0.99, 0.97], [0.97, 0.1]]), chain, 0.95
    ).tolist() == [
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
    assert drop_duplicates(
        np.array([[0.5], [0.5]], np.float32), np.array([[1], [0]]), 0.5
    ).tolist() == [True, False]


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
    return [
        list(zip(graph.neighbours[a:b].tolist(), graph.weights[a:b].tolist(), strict=True))
        for a, b in spans
    ]


@pytest.mark.parametrize("seed", range(4))
def test_graph_by_loops(seed):
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(5, 300)), int(rng.integers(1, 5))
    similarity, index = lists(n, k, seed)
    similarity += rng.choice([0, 1e-7], similarity.shape).astype(
        np.float32
    )  # the two ways round differ by rounding
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


# ----- Orders -------------------------------------------------------------------------------------


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
    assert [len(traverse(graph, order, embeddings=unit(9, 8))) for order in iclm_sort.ORDERS] == [
        0
    ] * 5


def test_the_walk_follows_the_algorithm():
    """Each step goes to the heaviest unvisited neighbour; else to one of least degree."""
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
    """A star of three leaves and two pairs: the seven documents of degree 1 start equally often."""
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
    return max(
        sum(cosine[a][b] for a, b in itertools.pairwise(p))
        for p in itertools.permutations(range(len(x)))
    )


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


# ----- Contexts -----------------------------------------------------------------------------------


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


# ----- What an order is worth ---------------------------------------------------------------------


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
    x[[4095, 4096, 4097, 8191, 8192, 8193]] *= (
        1000  # a step that is left out, or counted twice, shows
    )
    cosine = (x[1:].astype(np.float64) * x[:-1]).sum(1).mean()
    empty = iclm_sort.Graph(
        np.zeros(10_001, np.int64), *(np.zeros(0, t) for t in "if"), np.ones(10_000, bool)
    )
    report = ordering_report(x, np.arange(10_000), empty)
    assert report["adjacent_cosine"] == pytest.approx(cosine, rel=1e-4)


# ----- Input and tokens ---------------------------------------------------------------------------


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def corpus(tmp_path, n=60):
    r = random.Random(0)
    words = [["".join(r.choices("abcdefgh", k=5)) for _ in range(12)] for _ in range(6)]
    rows = [
        {"text": " ".join(r.choices(words[i % 6], k=20)), "label": f"topic {i % 6}"}
        for i in range(n)
    ]
    return write_lines(tmp_path / "corpus.jsonl", rows)


def read(path, **flags):
    return list(iclm_sort.read_documents(Config(input=str(path), **flags)))


def test_input_of_lines_files_and_folders(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    rows = [{"text": "one\u2028more", "label": "L", "extra": 1}, {"text": "two"}, {"text": " "}]
    write_lines(tmp_path / "in" / "x.jsonl", rows)
    (tmp_path / "in" / "a" / "b.txt").write_text("\ufeffthree", "utf-8")
    (tmp_path / "in" / ".hidden").write_bytes(b"\xff")
    (tmp_path / "in" / ".git").mkdir()
    (tmp_path / "in" / ".git" / "index").write_bytes(b"\xff")
    assert read(tmp_path / "in") == [("three", "a"), ("one\u2028more", "L"), ("two", "")]
    write_lines(tmp_path / "y.jsonl", [{"body": "hi"}])
    assert read(tmp_path / "y.jsonl", text_field="body") == [("hi", "")]


@pytest.mark.parametrize(
    "line",
    ['{"text": "cut', '{"body": "x"}', '{"text": 3}', "[1, 2]", "[" * 100_000],
    ids=lambda line: line[:20],
)
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + '\n{"text": "fine too"}\n')
    with pytest.raises(
        ValueError, match=r"bad.jsonl, line 2 must be a JSON object with a string 'text'"
    ):
        read(path)


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"picture.png must be UTF-8"):
        read(tmp_path)


def test_python_functions_are_labelled_by_module():
    found = list(itertools.islice(iclm_sort.python_functions(), 400))
    assert all(re.match(r"\s*(async )?def ", text) and len(text) > 60 for text, _ in found)
    assert len({label for _, label in found}) > 5


def save_tokenizer(path, texts, **settings):
    """A tokenizer.json of 400 ids with <|endoftext|>, and settings of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
    )
    tokenizer.train_from_iterator(texts, trainer)
    path.write_text(json.dumps(json.loads(tokenizer.to_str()) | settings), "utf-8")
    return path


TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDING = {"strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}


def test_a_tokenizers_saved_truncation_and_padding_are_not_used(tmp_path):
    file = corpus(tmp_path)
    texts = [text for text, _ in read(file)]
    plain = save_tokenizer(tmp_path / "tokenizer.json", texts)
    ids = {}
    for name, settings in (
        ("plain", {}),
        ("cut", {"truncation": TRUNCATION}),
        ("padded", {"padding": PADDING}),
    ):
        (tmp_path / name).mkdir()
        plain = save_tokenizer(tmp_path / f"{name}.json", texts, **settings)
        config = Config(input=str(file), tokenizer=str(plain), out=str(tmp_path / name))
        found, labels, about = iclm_sort.tokenise(config)
        ids[name] = [part.tolist() for part in found]
    assert ids["cut"] == ids["padded"] == ids["plain"] and about["tokenizer"] == "tokenizer.json"
    theirs = mamba.load_tokenizer(str(plain), [])
    assert ids["plain"] == [theirs.encode(text) for text in texts] and len(labels) == 60
    assert (about["vocab_size"], about["document_separator"]) == (
        theirs.vocab_size,
        theirs.separator,
    )


# ----- As a user runs it --------------------------------------------------------------------------


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
    """Drawing takes longer than all else; a few tests draw."""
    if not re.search("trained_on|drawn|copies", request.node.name):
        monkeypatch.setattr(iclm_sort, "plot", lambda *_: None)


SORT = ("--context-length", "64", "--k", "5", "--dim", "64")


@pytest.mark.parametrize("tokenizer", ["byte", "json"])
def test_whole_contexts_are_trained_on(tmp_path, here, tokenizer):
    """From documents to both language models: each window of theirs is one context."""
    file, out = corpus(tmp_path, 200), tmp_path / "out"
    texts = [text for text, _ in read(file)]
    if tokenizer == "json":
        tokenizer = save_tokenizer(tmp_path / "some.json", texts)
    here("sort", "--input", file, "--out", out, *SORT, "--tokenizer", tokenizer)
    about, order = json.loads((out / "train.json").read_text()), np.load(out / "order.npy")
    report = json.loads((out / "report.json").read_text())
    assert report["orders"]["paper"]["each_once"] and len(order) == report["kept"]
    assert (out / "report.png").stat().st_size > 10_000 and about["context_length"] == 64
    given = mamba.load_corpus(str(out / "train.bin"), "byte")
    separator = about["document_separator"]
    assert (given.separator, given.vocab_size) == (separator, about["vocab_size"])
    expected = [x for i in order for x in (*given.tokenizer.encode(texts[i]), separator)]
    contexts = Counter(itertools.zip_longest(*[iter(expected)] * 64, fillvalue=separator))
    tokens = np.fromfile(out / "train.bin", "<u2")
    assert (
        Counter(map(tuple, tokens.reshape(-1, 64).tolist())) == contexts
    )  # the same, in another order
    for script in (mamba, transformer):
        data = script.load_corpus(str(out / "train.bin"), "byte")
        if not hasattr(data, "context_length"):
            pytest.skip(f"{script.__name__}.py does not know of contexts yet")
        config = script.Config(length=64, batch=4)
        for step in range(3 * len(contexts) // 4):  # of several epochs
            for start in script.window_offsets(data, config, step):
                assert tuple(data.train[start : start + 64].tolist()) in contexts
        flags = [
            "--data",
            str(out / "train.bin"),
            "--smoke",
            "--out",
            str(tmp_path / script.__name__),
        ]
        assert script.main(flags) == 0
        assert (tmp_path / script.__name__ / "smoke" / "result.json").is_file()


def test_embeddings_of_one_number_are_drawn(tmp_path, here):
    np.save(tmp_path / "x.npy", unit(60, 1))
    flags = ("--input", corpus(tmp_path), "--out", tmp_path / "out", *SORT, "--threshold", "2")
    here(*flags, "--embeddings", tmp_path / "x.npy")
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000


def test_copies_alone_are_reported(tmp_path, here):
    file = write_lines(tmp_path / "copies.jsonl", [{"text": "the same text in every line"}] * 6)
    here("--input", file, "--out", tmp_path / "out", *SORT, "--k", "1")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kept"] == 1 and report["orders"]["paper"]["each_once"]
    assert (tmp_path / "out" / "train.bin").is_file()


def test_stages_are_kept_where_nothing_changed(tmp_path, here):
    first, out = corpus(tmp_path), tmp_path / "out"
    words = ("--input", first, "--out", out, *SORT)
    here(*words)
    before = {name: (out / name).read_bytes() for name in ("train.bin", "order.npy")}
    printed = here(*words, "--resume")
    assert "embed: kept" in printed and "neighbours: kept" in printed
    assert before == {name: (out / name).read_bytes() for name in before}
    printed = here(*words, "--resume", "--order", "edge")
    assert "neighbours: kept" in printed and before["order.npy"] != (out / "order.npy").read_bytes()
    printed = here(*words, "--resume", "--k", "4")
    assert "embed: kept" in printed and "neighbours: kept" not in printed
    assert ": kept" not in here(*words)
    os.utime(first, (1, 1))
    assert ": kept" not in here(*words, "--resume")


def test_two_processes_find_the_same(tmp_path, monkeypatch):
    """So many documents that exact search takes them in two parts, one for each process."""
    x = unit(4400, 16, 1, 60)
    assert iclm_sort.exact_search(torch.from_numpy(x), 5)[1] < len(x)
    np.save(tmp_path / "x.npy", x)
    rows = [{"text": f"text {i}"} for i in range(len(x))]
    words = ("--input", write_lines(tmp_path / "in.jsonl", rows), *SORT, "--order", "edge")
    words += ("--embeddings", tmp_path / "x.npy")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run(*words, "--out", tmp_path / "one")
    run(*words, "--out", tmp_path / "two", launcher=launcher)
    for name in ("order.npy", "train.bin"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    one, two = (np.load(tmp_path / name / "stages" / "neighbours.npz") for name in ("one", "two"))
    assert all(np.array_equal(one[part], two[part]) for part in ("similarities", "ids", "keep"))


def test_embeddings_of_ones_own(tmp_path, here):
    x = unit(60, 16, 1, 6) * np.linspace(1, 9, 60, dtype=np.float32)[:, None]
    np.save(tmp_path / "x.npy", x)
    here(
        "--input",
        corpus(tmp_path),
        "--out",
        tmp_path / "out",
        *SORT,
        "--embeddings",
        tmp_path / "x.npy",
    )
    ours = np.load(tmp_path / "out" / "stages" / "embed.npz")["x"]
    np.testing.assert_allclose(ours, x / np.linalg.norm(x, axis=1, keepdims=True), atol=1e-6)
    before = np.load(tmp_path / "out" / "order.npy")
    np.save(tmp_path / "x.npy", x[::-1])  # another file of the same name is not the one before
    flags = ("--embeddings", tmp_path / "x.npy", "--resume")
    assert ": kept" not in here(
        "--input", corpus(tmp_path), "--out", tmp_path / "out", *SORT, *flags
    )
    assert before.tolist() != np.load(tmp_path / "out" / "order.npy").tolist()


BAD_EMBEDDINGS = {
    "count": (lambda x: x[:50], r"\(50, 4\) must be numbers of shape \(60, d\)"),
    "shape": (lambda x: x[0], r"\(4,\) must be numbers of shape \(60, d\)"),
    "words": (lambda x: x.astype(str), "must be numbers"),
    "complex": (lambda x: x * 1j, "must be numbers"),
    "NaN": (
        lambda x: np.where(np.arange(60)[:, None] == 9, np.nan, x),
        "row 9 is zero or not finite",
    ),
    "zero": (lambda x: x * (np.arange(60) != 4)[:, None], "row 4 is zero or not finite"),
    "pickled": (lambda x: np.array([x, None], object), "allow_pickle"),
}


@pytest.mark.parametrize("name", BAD_EMBEDDINGS)
def test_bad_embeddings(tmp_path, name, here):
    change, message = BAD_EMBEDDINGS[name]
    np.save(tmp_path / "x.npy", change(unit(60, 4)))
    flags = ("--input", corpus(tmp_path), "--out", tmp_path / "out", *SORT)
    error = here(*flags, "--embeddings", tmp_path / "x.npy", status=2)
    assert re.search(message, error) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--input", "nowhere"), "nowhere"),
        (("--order", "tsp"), "--order tsp must be one of paper, edge"),
        (("--encoder", "nowhere"), "nowhere"),
        (("--context-length", "0"), "--context-length 0 must be 1 or more"),
        (("--encoder", "a", "--embeddings", "b"), "--encoder and --embeddings"),
        (("--text-field", "body"), "string 'body'"),
        (("--tokenizer", "nowhere.json"), "nowhere.json"),
        (("--tokenizer", __file__), "--tokenizer"),
        (("--threshold", "nan"), "threshold nan"),
        (("--device", "fax"), "fax"),
    ],
)
def test_bad_flags(tmp_path, here, flags, message):
    library = {"--encoder": "transformers", "--tokenizer": "tokenizers"}.get(flags[0])
    if library and "--embeddings" not in flags:
        pytest.importorskip(library)
    error = here("--input", corpus(tmp_path), "--out", tmp_path / "out", *SORT, *flags, status=2)
    assert message in error and error.count("\n") == 1


def test_an_empty_folder(tmp_path, here):
    (tmp_path / "in").mkdir()
    assert "0 documents" in here("--input", tmp_path / "in", "--out", tmp_path / "out", status=2)


def test_a_full_disk_is_one_line(tmp_path, here, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    error = here("--input", corpus(tmp_path), "--out", tmp_path / "out", *SORT, status=2)
    assert "No space left" in error and error.count("\n") == 1


def test_a_document_longer_than_many_contexts(tmp_path, here):
    rows = [{"text": f"short words number {i}"} for i in range(20)] + [
        {"text": "long words " * 2000}
    ]
    here("--input", write_lines(tmp_path / "long.jsonl", rows), "--out", tmp_path / "out", *SORT)
    assert (np.fromfile(tmp_path / "out" / "train.bin", "<u2") == 256).sum() >= 20


def test_progress_says_what_is_left(monkeypatch, capsys):
    now = itertools.count(step=3.0)
    monkeypatch.setattr(iclm_sort.time, "perf_counter", lambda: next(now))
    assert list(iclm_sort.progress("walk", "abcd", 4)) == list("abcd")
    assert capsys.readouterr().out == (
        "walk: 2 of 4 · 0.1 minutes left · 0.3 a second\n"
        "walk: 4 of 4 · 0.0 minutes left · 0.3 a second\n"
    )


# ----- The experiment in tests/claims -------------------------------------------------------------


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "claims"))
    return importlib.import_module("iclm_claims")


def test_documents_are_apart_in_training_only(claims):
    torch.manual_seed(1)
    model = claims.WithinDocuments(claims.Settings(d_model=16, n_layer=2, n_head=2), 30).double()
    model.separator = 29
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    first, second = torch.randint(29, (2, 5)), torch.randint(29, (2, 6))
    first[:, -1] = 29
    both = torch.cat([first, second], 1)
    apart = model.train()(both)
    plain = claims.CausalLM.forward
    torch.testing.assert_close(apart[:, :5], plain(model, first))
    torch.testing.assert_close(apart[:, 5:], plain(model, second))  # rotary positions are relative
    torch.testing.assert_close(model.eval()(both), plain(model, both))
    assert not torch.allclose(plain(model, both)[:, 5:], apart[:, 5:])
    changed = both.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 29
    torch.testing.assert_close(plain(model, changed)[:, :8], plain(model, both)[:, :8])


def test_whole_labels_are_held_out_or_else_documents(claims):
    keep = np.arange(240) % 11 != 5
    held = claims.hold_out(np.arange(240) % 40, keep)
    labels = [set((np.arange(240) % 40)[part]) for part in (held, ~held)]
    assert not labels[0] & labels[1] and 11 <= (held & keep).sum() <= 22
    for few in (np.zeros(240), np.arange(240) % 2, np.minimum(np.arange(240) % 3, 1)):
        assert (claims.hold_out(few, keep) & keep).sum() == 22  # every tenth


def test_what_stands_before_the_targets(claims):
    sizes = np.random.default_rng(0).integers(9, 30, 240)
    tokens = [np.full(size, i, np.uint16) for i, size in enumerate(sizes)]
    graph = build_graph(*nearest_neighbours(unit(240, 8, 3, 12), 5), np.arange(240) % 11 != 5)
    tasks = claims.make_tasks(tokens, graph, 255, 64, seed=0, most=30)
    assert tasks["no_context"].shape == (30, 17) and tasks["random_order"].shape[1] == 64
    for t, (separator, i, *rest) in enumerate(tasks["no_context"].tolist()):
        assert separator == 255 and set(rest) == {i}
        best = graph.row(i).tolist()
        for name in ("related_context", "unrelated_context"):
            past, wanted = np.split(tasks[name][t], [47])
            nearest_first = [j for j in dict.fromkeys(past[::-1].tolist()) if j != 255]
            assert wanted.tolist() == tasks["no_context"][t].tolist() and i not in past
            if name == "related_context":
                assert nearest_first[: len(best)] == best[: len(nearest_first)]
            else:
                assert not set(best) & set(past.tolist())
    assert set(np.unique(tasks["random_order"])) <= {255, *np.flatnonzero(graph.keep)}
    with pytest.raises(ValueError, match="cannot judge"):
        claims.make_tasks(tokens, graph, 255, 3, seed=0)


def test_a_gain_is_what_the_past_takes_off_the_loss(claims):
    torch.manual_seed(0)
    model = claims.CausalLM(claims.Settings(d_model=16, n_layer=1, n_head=2), 30)
    rng = np.random.default_rng(0)
    shapes = {
        "no_context": (11, 5),
        "related_context": (11, 9),
        "unrelated_context": (11, 9),
        "random_order": (3, 9),
    }
    tasks = {name: rng.integers(30, size=shape) for name, shape in shapes.items()}
    scores, losses = claims.judge(model, tasks), {}
    for name, rows in tasks.items():
        rows = torch.from_numpy(rows)
        chances = model(rows[:, :-1]).log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
        losses[name] = -chances[:, -(8 if name == "random_order" else 4) :].mean().item()
        assert scores[f"{name}_loss"] == pytest.approx(losses[name], rel=1e-5)
    for name in ("related_context", "unrelated_context"):
        gain = losses["no_context"] - losses[name]
        assert scores[f"{name}_gain"] == pytest.approx(gain, abs=1e-5)


def test_a_model_learns_and_arms_start_alike(claims):
    contexts = np.tile(np.arange(17, dtype=np.uint16), (8, 1))
    settings = claims.Settings(d_model=16, n_layer=1, n_head=2, steps=150, lr=1e-2)
    models = [claims.train_arm(name, contexts, settings, 0, 30) for name in ("a", "b")]
    assert models[0][1] == models[1][1] and models[0][1][-1] < 0.1 < 3 < models[0][1][0]
    for a, b in zip(models[0][0].parameters(), models[1][0].parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(FloatingPointError, match=r"diverged at step .* lower --lr"):
        claims.train_arm("a", contexts, claims.Settings(d_model=16, n_head=2, lr=1e30), 0, 30)


def test_arms_differ_only_in_order(claims):
    corpus = claims.read_corpus(claims.SMOKE)
    orders = {name: claims.order_of(name, corpus, 1) for name in claims.ARMS}
    train = np.flatnonzero(corpus.lists[2] & ~corpus.held)
    for name in ("standard", "cluster", "sorted"):
        np.testing.assert_array_equal(np.sort(orders[name]), train)
    assert len(orders["knn"]) > 5 * len(train)
    duplicated = np.sort(orders["sorted, duplicates kept"])
    np.testing.assert_array_equal(duplicated, np.flatnonzero(~corpus.held))
    cosines = {
        name: (corpus.x[o[1:]] * corpus.x[o[:-1]]).sum(1).mean() for name, o in orders.items()
    }
    assert cosines["sorted"] > cosines["cluster"] > cosines["standard"]


def test_the_program_runs_and_goes_on(claims, tmp_path, capsys):
    flags = ["--smoke", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    claims.main([*flags, "--seeds", "1", "--arms", "standard", "sorted"])
    first = json.loads((tmp_path / "in_context_pretraining.json").read_text())
    claims.main([*flags, "--seeds", "1", "2", "--arms", "standard", "sorted"])
    result = json.loads((tmp_path / "in_context_pretraining.json").read_text())
    assert result["runs"][:2] == first["runs"] and len(result["runs"]) == 4
    assert result["summary"]["sorted"]["seeds"] == [1, 2]
