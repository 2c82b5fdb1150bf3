"""iclm_sort.py by slow loops in float64, by hand-made cases, and as a user runs it."""

import dataclasses
import functools
import importlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import unittest.mock
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import iclm_sort
import mamba
import transformer
from iclm_sort import build_graph, nearest_neighbours, ordering_report, traverse

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent


def unit(n, d, seed=0, clusters=0):
    """Random unit rows, around so many centres."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d))
    if clusters:
        x = x * 0.5 + rng.standard_normal((clusters, d))[rng.integers(clusters, size=n)]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def lists(n, k, seed=0, d=8):
    return nearest_neighbours(unit(n, d, seed, clusters=4), k)


def rows_of(graph):
    """For each document its (neighbour, weight) pairs."""
    arcs = list(zip(graph.neighbours.tolist(), graph.weights.tolist(), strict=True))
    return [arcs[a:b] for a, b in itertools.pairwise(graph.indptr.tolist())]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def corpus(tmp_path):
    """Sixty documents on six topics."""
    r, rows = random.Random(0), []
    words = [["".join(r.choices("abcdefgh", k=5)) for _ in range(12)] for _ in range(6)]
    for i in range(60):
        rows.append({"text": " ".join(r.choices(words[i % 6], k=20)), "label": f"topic {i % 6}"})
    return write_lines(tmp_path / "corpus.jsonl", rows)


# ----- Embeddings and neighbours ------------------------------------------------------------------

TEXTS = ["The cat sat on the mat; the cat slept.", "def read_file(path):\n    return open(path)"]
TEXTS += ["naïve café déjà vu 日本語 text", "!!! ??? ...", "____", "the dog on the mat"]


def slow_terms(text):
    """Words, cut at underscores and between ideographs, and pairs; or else marks."""
    ideograph = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
    found = re.findall(rf"[{ideograph}]|[^\W_{ideograph}]+|[^\w\s]|_", text.lower())
    words = [word for word in found if word[0].isalnum()] or found
    codes = [zlib.crc32(word.encode()) for word in words]
    codes += [(a * 0x9E3779B1 + b + 1) % 2**64 for a, b in itertools.pairwise(codes)]
    return Counter((code * 0x9E3779B97F4A7C15 % 2**64) >> 47 for code in codes)


def test_embeddings_are_projected_tf_idf():
    counts = [slow_terms(text) for text in TEXTS]
    frequency = Counter(term for count in counts for term in count)
    random_state = torch.Generator().manual_seed(3)
    table = torch.randn(iclm_sort.BUCKETS, 32, generator=random_state).double().numpy()
    ours = iclm_sort.embed_documents(iter(TEXTS), dim=32, seed=3)
    for row, count in zip(ours, counts, strict=True):
        truth = np.zeros(32)
        for term, c in count.items():
            truth += (1 + math.log(c)) * (1 + math.log(7 / (1 + frequency[term]))) * table[term]
        np.testing.assert_allclose(row, truth / np.linalg.norm(truth), atol=2e-6)
    with pytest.raises(ValueError, match="cannot embed"):
        iclm_sort.embed_documents(["fine", "  \n"])


def slow_neighbours(x, k):
    """In float64: falling similarity, then rising index, never itself."""
    similarities = x.astype(np.float64) @ x.T
    np.fill_diagonal(similarities, -np.inf)
    ids = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, ids, 1), ids


@pytest.mark.parametrize(("n", "d", "k"), [(2, 3, 1), (9, 4, 8), (150, 8, 5), (61, 2, 20)])
@pytest.mark.parametrize("method", ["exact", "ivf"])
def test_neighbours_by_loops(n, d, k, method):
    x = unit(n, d, n)
    similarities, ids = nearest_neighbours(x, k, method, recall=1.0)
    truth, numbers = slow_neighbours(x, k)
    np.testing.assert_allclose(similarities, truth, atol=1e-6)
    np.testing.assert_array_equal(ids, numbers)


def test_lists_shorter_than_k_are_filled_by_exact_search():
    """Copies of few points: an inverted list of one copy holds fewer than k others."""
    x = np.concatenate([np.eye(6, dtype=np.float32)] * 3)
    similarities, ids = nearest_neighbours(x, 9, "ivf", recall=0.1)
    np.testing.assert_allclose(similarities, slow_neighbours(x, 9)[0], atol=1e-6)
    assert ids.min() >= 0


@pytest.mark.parametrize(("clusters", "recall"), [(60, 0.5), (60, 0.9), (60, 0.99), (0, 0.95)])
def test_ivf_reaches_the_recall_asked_for(clusters, recall):
    """Without clusters the neighbours lie in lists far apart, in more than a fixed few."""
    x, rows = unit(6000, 24, 2, clusters), np.arange(0, 6000, 20)
    true = nearest_neighbours(x, 10, "exact", rows=rows)[1]
    similarities, ids = nearest_neighbours(x, 10, "ivf", recall, rows=rows)
    share = (true[:, :, None] == ids[:, None, :]).any(2).mean()
    assert recall - 0.03 < share < max(0.99, recall + 0.01)
    np.testing.assert_allclose(similarities, np.einsum("nd,nkd->nk", x[rows], x[ids]), atol=1e-6)
    assert (np.diff(similarities, axis=1) <= 0).all()
    assert all(len({i, *row}) == 11 for i, row in zip(rows, ids.tolist(), strict=True))


@pytest.mark.parametrize(
    ("value", "k", "method", "rule"),
    [(np.nan, 2, "auto", "finite"), (0, 5, "auto", "k 5 for 5"), (0, 2, "hnsw", "'hnsw'")],
)
def test_what_nearest_neighbours_refuses(value, k, method, rule):
    with pytest.raises(ValueError, match=rule):
        nearest_neighbours(np.float32([[1], [value], [1], [1], [1]]), k, method)


# ----- Duplicates and the graph -------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.5, 0.75, 1.5])
def test_dropped_documents_by_loops(threshold):
    """Of two that are alike, or at the threshold, the earlier stays; the dropped drops no other."""
    similarities, ids = lists(200, 6, 5, d=3)
    similarities = np.floor(4 * similarities) / 4
    keep, pairs = [True] * 200, set()
    for i, j in zip(*np.nonzero(similarities >= threshold), strict=True):
        pairs.add((min(i, ids[i, j]), max(i, ids[i, j])))
    for earlier, later in sorted(pairs):
        keep[later] &= not keep[earlier]
    ours = iclm_sort.drop_duplicates(similarities, ids, threshold)
    assert ours.tolist() == keep and (all(keep) or 0 < sum(keep) < 200)


def test_of_sixty_copies_one_stays():
    """Near-copies fill one another's lists of ten; what stays still finds its true neighbours."""
    rng = np.random.default_rng(0)
    others = unit(200, 16, 1, 20)
    copies = others[7] + 0.005 * rng.standard_normal((60, 16)).astype(np.float32)
    x = np.concatenate([others, copies / np.linalg.norm(copies, axis=1, keepdims=True)])
    threshold = 0.98
    similarities, ids, keep = iclm_sort.distinct_neighbours(x, 10, threshold)
    near = (x @ x.T >= threshold) & keep & keep[:, None]
    assert near.sum() == keep.sum()  # each is near itself alone, of all pairs and not of lists only
    assert keep[7] and not keep[200:].any()
    kept = np.flatnonzero(keep)
    truth, numbers = slow_neighbours(x[kept], 10)
    np.testing.assert_allclose(similarities[kept], truth, atol=1e-6)
    np.testing.assert_array_equal(ids[kept], kept[numbers])
    assert (ids[~keep] == -1).all() and np.isneginf(similarities[~keep]).all()


def slow_graph(similarities, ids, keep):
    """Rows of (neighbour, weight) by sets and dictionaries."""
    rows = [{} for _ in ids]
    for i, row in enumerate(ids.tolist()):
        for j, weight in zip(row, similarities[i].tolist(), strict=True):
            if j >= 0 and keep[i] and keep[j]:
                rows[i][j] = rows[j][i] = max(weight, rows[i].get(j, -2))
    return [sorted(row.items()) for row in rows]


@pytest.mark.parametrize("case", ["usual", "ties", "a hub", "k = 1"])
def test_graph_by_loops(case):
    rng, n, k = np.random.default_rng(len(case)), 300, 1 if case == "k = 1" else 4
    similarities, ids = lists(n, k, len(case))
    similarities += rng.choice(np.float32([0, 1e-7]), similarities.shape)  # rounding, one way round
    if case == "ties":
        similarities = np.round(similarities, 2)
    ids[rng.random(ids.shape) < 0.05] = -1
    if case == "a hub":
        ids[1:][(ids[1:] != 0).all(1), 2] = 0
    keep = rng.random(n) < 0.8
    assert rows_of(build_graph(similarities, ids, keep)) == slow_graph(similarities, ids, keep)
    graph = build_graph(similarities, ids)
    assert rows_of(graph) == slow_graph(similarities, ids, [True] * n)
    falling = sorted(rows_of(graph)[0], key=lambda arc: (-arc[1], arc[0]))
    assert graph.row(0).tolist() == [j for j, _ in falling]


# ----- Orders, contexts and what they are worth ---------------------------------------------------


@pytest.mark.parametrize("order", ["paper", "edge", "random", "file"])
@pytest.mark.parametrize("n", [2, 37, 400])
def test_each_kept_document_once_and_the_same_again(order, n):
    x, keep = unit(n, 6, n, 5), np.arange(n) % 7 != 3
    graph = build_graph(*nearest_neighbours(x, min(5, n - 1)), keep)
    path = traverse(graph, order, 1, x)
    assert sorted(path.tolist()) == np.flatnonzero(keep).tolist()
    assert path.tolist() == traverse(graph, order, 1, x).tolist()


def test_the_walk_follows_the_algorithm():
    """Each step goes to the heaviest unvisited neighbour; else to any one of least degree."""
    index = np.array([[1], [0], [0], [0], [5], [4], [7], [6]])  # a star and two pairs
    graph = build_graph(np.full((8, 1), 0.5, np.float32), index)
    starts = Counter(int(traverse(graph, seed=seed)[0]) for seed in range(700))
    assert starts.keys() == {1, 2, 3, 4, 5, 6, 7} and min(starts.values()) > 60
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


def test_edge_matching_by_loops():
    """Joined ends keep every edge that was taken."""
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
        for embeddings in (None, unit(90, 8, seed, 4)):
            path = traverse(graph, "edge", seed, embeddings).tolist()
            steps = {(min(a, b), max(a, b)) for a, b in itertools.pairwise(path)}
            assert taken <= steps and len(steps) == 89


def test_edge_joins_better_than_the_walk():
    """Over more than 4,096 documents, which the report sums in two parts."""
    x, share = unit(4200, 16, 4, 200), {}
    graph = build_graph(*nearest_neighbours(x, 8))
    for order in ("paper", "edge", "random"):
        path = traverse(graph, order, embeddings=x)
        report = ordering_report(x, path, graph)
        cosine = (x[path[1:]] * x[path[:-1]]).sum(1).mean()
        assert report["adjacent_cosine"] == pytest.approx(cosine, abs=1e-6)
        share[order] = report["share_of_bound"]
    assert 1 > share["edge"] > share["paper"] + 0.01 > share["random"] + 0.3


def test_knn_repeats_each_document_before_its_best_neighbours():
    graph, expected = build_graph(*lists(30, 4)), []
    for i in traverse(graph, "random", seed=1):
        best = sorted(rows_of(graph)[i], key=lambda arc: (-arc[1], arc[0]))[:3]
        expected += [i, *(j for j, _ in best)]
    assert traverse(graph, "knn", seed=1, repeats=3).tolist() == expected


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
    contexts = iclm_sort.pack(tokens, np.array(order), length, separator)
    assert contexts.dtype == np.uint16 and contexts.shape == (len(flat) // length, length)
    assert contexts.ravel().tolist() == flat


@pytest.mark.parametrize("k", [1, 4])
def test_report_by_loops(k):
    """Lists of one miss most of the good steps: the bound counts those of the path too."""
    x, labels = unit(60, 8, 2, 5), np.arange(60) // 7
    graph = build_graph(*nearest_neighbours(x, k), np.arange(60) % 9 != 4)
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
        assert expected["share_of_bound"] <= 1
        assert "label_purity" not in ordering_report(x, order, graph, 0 * labels)
    assert not ordering_report(x, np.append(order[:-1], order[0]), graph)["each_once"]


# ----- Input and tokens ---------------------------------------------------------------------------


def read(path, **flags):
    return list(iclm_sort.read_documents(iclm_sort.Config(input=str(path), **flags)))


def test_input_of_lines_files_and_folders(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    rows = [{"text": "one\u2028more", "label": "L", "extra": 1}, {"text": "two"}, {"text": " "}]
    write_lines(tmp_path / "in" / "x.jsonl", rows)
    (tmp_path / "in" / "a" / "b.txt").write_text("\ufeffthree", "utf-8")
    (tmp_path / "in" / ".git").mkdir()
    (tmp_path / "in" / ".git" / "index").write_bytes(b"\xff")
    assert read(tmp_path / "in") == [("three", "a"), ("one\u2028more", "L"), ("two", "")]
    write_lines(tmp_path / "y.jsonl", [{"body": "hi"}])
    assert read(tmp_path / "y.jsonl", text_field="body") == [("hi", "")]


BAD_LINES = {"cut": b'{"text": "cut', "field": b'{"body": "x"}', "number": b'{"text": 3}'}
BAD_LINES |= {"deep": b"[" * 100_000, "not text": b"\xff"}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_broken_line_is_named(tmp_path, kind):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n' + BAD_LINES[kind])
    with pytest.raises(ValueError, match=r"bad.jsonl(, line 2 must be a JSON| must be UTF-8)"):
        read(tmp_path)


def save_tokenizer(path, texts, **settings):
    """A tokenizer.json of 400 ids with <|endoftext|>, and settings of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {"initial_alphabet": tokenizers.pre_tokenizers.ByteLevel.alphabet()}
    words["special_tokens"] = ["<|endoftext|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False, **words)
    tokenizer.train_from_iterator(texts, trainer)
    path.write_text(json.dumps(json.loads(tokenizer.to_str()) | settings), "utf-8")
    return path


# ----- As a user runs it --------------------------------------------------------------------------

SORT = ("--context-length", "64", "--k", "5", "--dim", "64")
PADDING = {"strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}


@pytest.fixture
def here(capsys, corpus, tmp_path):
    def run_here(*words, status=0):  # what the command line prints, in this process
        flags = ("--input", corpus, "--out", tmp_path / "out", *SORT, *words)
        found = iclm_sort.main([*map(str, flags)])
        printed = capsys.readouterr()
        assert found == status, printed
        return printed.err if status else printed.out

    return run_here


@pytest.mark.parametrize("tokenizer", ["byte", "json"])
def test_whole_contexts_are_trained_on(tmp_path, here, corpus, tokenizer):
    """Each window of both language models is one; saved truncation and padding are not used."""
    out, texts = tmp_path / "out", [text for text, _ in read(corpus)]
    plain = name = tokenizer
    if tokenizer == "json":
        plain = save_tokenizer(tmp_path / "plain.json", texts)
        settings = {"truncation": TRUNCATION, "padding": PADDING}
        name = save_tokenizer(tmp_path / "some.json", texts, **settings)
    here("--tokenizer", name)
    about, order = json.loads((out / "train.json").read_text()), np.load(out / "order.npy")
    assert sorted(order) == list(range(60)) and (out / "report.png").stat().st_size > 10_000
    plain = mamba.load_tokenizer(str(plain), [])
    assert (about["vocab_size"], about["document_separator"]) == (plain.vocab_size, plain.separator)
    expected = [x for i in order for x in (*plain.encode(texts[i]), plain.separator)]
    expected += [plain.separator] * (-len(expected) % 64)
    contexts = list(zip(*[iter(expected)] * 64, strict=True))
    rows = [tuple(row) for row in np.fromfile(out / "train.bin", "<u2").reshape(-1, 64).tolist()]
    assert Counter(rows) == Counter(contexts) and rows != contexts  # the same, in another order
    for script in (mamba, transformer):
        data, config = script.load_corpus(str(out / "train.bin"), "byte"), script.Config(length=64)
        for step in range(len(contexts)):  # of several epochs
            for start in script.window_offsets(data, config, step):
                assert tuple(data.train[start : start + 64].tolist()) in contexts
        flags = ["--data", out / "train.bin", "--smoke", "--out", tmp_path / script.__name__]
        assert script.main([*map(str, flags)]) == 0


def test_copies_alone_are_reported(tmp_path, here):
    copies = write_lines(tmp_path / "copies.jsonl", [{"text": "the same text in every line"}] * 6)
    here("--input", copies, "--k", "1")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kept"] == 1 and report["orders"]["paper"]["each_once"]
    assert (tmp_path / "out" / "train.bin").is_file()


def test_stages_are_kept_where_nothing_changed(tmp_path, here, corpus, monkeypatch):
    order = tmp_path / "out" / "order.npy"
    monkeypatch.setattr(iclm_sort, "plot", lambda *_: None)  # drawing takes longer than all else
    here()
    before = order.read_bytes()
    printed = here("--resume")
    assert "embed: kept" in printed and "neighbours: kept" in printed
    assert order.read_bytes() == before
    assert "neighbours: kept" in here("--resume", "--order", "edge")
    assert order.read_bytes() != before
    printed = here("--resume", "--k", "4")
    assert "embed: kept" in printed and "neighbours: kept" not in printed
    os.utime(corpus, (1, 1))
    assert ": kept" not in here("--resume")


def test_two_processes_find_the_same(tmp_path):
    """So many documents that exact search takes them in two parts, one for each process."""
    x = unit(4200, 16, 1, 60)
    assert iclm_sort.exact_search(torch.from_numpy(x), 5)[1] < len(x)
    np.save(tmp_path / "x.npy", 3 * x)
    file = write_lines(tmp_path / "in.jsonl", [{"text": f"text {i}"} for i in range(len(x))])
    flags = ["--input", file, *SORT, "--order", "edge", "--embeddings", tmp_path / "x.npy"]
    assert iclm_sort.main([*map(str, flags), "--out", str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / "iclm_sort.py", *flags, "--out", tmp_path / "two"]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for name in ("order.npy", "train.bin"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    ours = np.load(tmp_path / "two" / "stages" / "embed.npz")["x"]
    np.testing.assert_allclose(ours, x, atol=1e-6)


X = unit(60, 4)
BAD_EMBEDDINGS = {
    r"\(50, 4\) must be numbers of shape \(60, d\)": X[:50],
    "row 9 is zero or not finite": np.where(np.arange(60)[:, None] == 9, np.nan, X),
    "row 4 is zero or not finite": X * (np.arange(60) != 4)[:, None],
    "allow_pickle": np.array([None] * 60, object),
}
BAD_FLAGS = {"input": "nowhere", "order": "tsp", "context-length": "0", "text-field": "body"}
BAD_FLAGS |= {"threshold": "nan", "device": "fax"}


@pytest.mark.parametrize("rule", [*BAD_EMBEDDINGS, *BAD_FLAGS, "No space left"])
def test_bad_input_is_one_line(tmp_path, here, monkeypatch, rule):
    flags = ()
    if rule in BAD_EMBEDDINGS:
        np.save(tmp_path / "x.npy", BAD_EMBEDDINGS[rule])
        flags = ("--embeddings", tmp_path / "x.npy")
    elif rule in BAD_FLAGS:
        flags, rule = (f"--{rule}", BAD_FLAGS[rule]), BAD_FLAGS[rule]
    else:
        full = unittest.mock.Mock(side_effect=OSError(28, "No space left on device"))
        monkeypatch.setattr(np, "savez", full)
    error = here(*flags, status=2)
    assert re.search(rule, error) and error.count("\n") == 1


# ----- The experiment in tests/claims -------------------------------------------------------------


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "claims"))
    return importlib.import_module("iclm_claims")


def test_whole_labels_are_held_out_or_else_documents(claims):
    keep, labels = np.arange(240) % 11 != 5, np.arange(240) % 40
    held = claims.hold_out(labels, keep)
    assert not {*labels[held]} & {*labels[~held]} and 11 <= (held & keep).sum() <= 22
    for few in (np.zeros(240), np.arange(240) % 2):
        assert (claims.hold_out(few, keep) & keep).sum() == 22  # every tenth


def test_what_stands_before_the_targets_and_what_it_takes_off_the_loss(claims):
    sizes = np.random.default_rng(0).integers(9, 30, 240)
    tokens = [np.full(size, i, np.uint16) for i, size in enumerate(sizes)]
    graph = build_graph(*nearest_neighbours(unit(240, 8, 3, 12), 5), np.arange(240) % 11 != 5)
    tasks = claims.make_tasks(tokens, graph, 255, 64, most=30)
    for t, (separator, i, *rest) in enumerate(tasks["no_context"].tolist()):
        assert separator == 255 and set(rest) == {i}
        best, pasts = graph.row(i).tolist(), {}
        for name in ("related_context", "unrelated_context"):
            past, wanted = np.split(tasks[name][t], [47])
            assert wanted.tolist() == tasks["no_context"][t].tolist() and i not in past
            pasts[name] = [j for j in dict.fromkeys(past[::-1].tolist()) if j != 255]
        nearest_first = pasts["related_context"]
        assert nearest_first[: len(best)] == best[: len(nearest_first)]
        assert not set(best) & set(pasts["unrelated_context"])
    shape = transformer.TransformerConfig(16, 1, 2, vocab_size=256)
    model = transformer.Transformer(shape)
    scores, losses = claims.judge(model, tasks), {}
    for name, rows in tasks.items():
        rows, last = torch.from_numpy(rows), 63 if name == "random_order" else 16
        chances = model(rows[:, :-1]).log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
        losses[name] = -chances[:, -last:].mean().item()
        assert scores[f"{name}_loss"] == pytest.approx(losses[name], rel=1e-5)
    gain = losses["no_context"] - losses["related_context"]
    assert scores["related_context_gain"] == pytest.approx(gain, abs=1e-5)


def test_arms_differ_in_order_and_runs_are_kept(claims, tmp_path, monkeypatch):
    corpus, orders = claims.read_corpus(claims.SMOKE), {}
    for name in claims.ARMS:
        orders[name] = claims.order_of(name, corpus, 1)
    kept = np.flatnonzero(corpus.lists[2] & ~corpus.held)
    for name in ("standard", "cluster", "sorted"):
        np.testing.assert_array_equal(np.sort(orders[name]), kept)
    cosine = {k: (corpus.x[o[1:]] * corpus.x[o[:-1]]).sum(1).mean() for k, o in orders.items()}
    assert cosine["sorted"] > cosine["cluster"] > cosine["standard"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "read_corpus", lambda config: corpus)
    monkeypatch.setattr(claims, "naming", functools.partial(claims.naming, tasks=10))
    corpus.tasks = {name: rows[:30] for name, rows in corpus.tasks.items()}
    seen = []
    for seeds in (["1"], ["1", "2"]):
        claims.main(["--smoke", "--arms", "standard", "sorted", "--seeds", *seeds])
        seen.append(json.loads(Path("out/claims/in_context_pretraining.json").read_text()))
    assert seen[1]["runs"][:2] == seen[0]["runs"] and len(seen[1]["runs"]) == 4
    assert seen[1]["summary"]["sorted"]["seeds"] == [1, 2]
    config = dataclasses.replace(claims.SMOKE, steps=30, lr=1e-2)
    runs = {name: claims.run_arm(name, 1, corpus, config) for name in ("standard", claims.WITHIN)}
    untrained = seen[1]["runs"][0]["training_loss"]
    assert max(run["training_loss"] for run in runs.values()) < untrained - 0.5
    gains = [runs[name]["related_context_gain"] for name in runs]
    assert gains[0] != gains[1]  # one was trained to see other documents
