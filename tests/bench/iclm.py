"""How fast iclm_sort.py finds neighbours and sorts, beside faiss and beside its own goals.

    python tests/bench/iclm.py               100k vectors, a million documents, the default corpus
    python tests/bench/iclm.py --only neighbours --sizes 1000000
    python tests/bench/iclm.py --only graph --sizes 1000000 10000000

Neighbours: our inverted lists beside faiss' IVFFlat on clustered vectors, at the same recall, each
with the fewest probes that reach it, with the same threads. Of large sets faiss answers a part of
the queries, from which its time for all is extrapolated. Graph: lists of k = 10 as of points on a
line with random neighbours near by, then `build_graph` and the walk. Orders: share of the upper
bound on the default corpus. Each size has a process of its own, whose largest memory is given; what
a run does not measure stays as the result file has it.
"""

import itertools

import _common  # first: torch's threads read what it sets
from _common import in_new_process, resident_bytes, timed

# isort: split
import numpy as np
import torch

import iclm_sort

GOALS = {1_000_000: (15, 1.5), 10_000_000: (180, 10)}  # seconds of graph and walk, GB
GOAL_SHARES, GOAL_RECALL = {"edge": 0.92, "paper": 0.88}, 0.95
PROBES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def clustered(n: int, d: int, latent: int = 32) -> np.ndarray:
    """Unit rows (n, d): n / 100 overlapping clusters in `latent` dimensions, with noise in d."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((n // 100, latent), dtype=np.float32)
    z = centres[rng.integers(len(centres), size=n)]
    z = z + 0.9 * rng.standard_normal((n, latent), dtype=np.float32)
    x = z @ (rng.standard_normal((latent, d), dtype=np.float32) / latent**0.5)
    x += 0.2 * rng.standard_normal((n, d), dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def recall(true: np.ndarray, found: np.ndarray) -> float:
    return float((true[:, :, None] == found[:, None, :]).any(2).mean())


def neighbours(n: int, d: int = 256, k: int = 10) -> dict:
    """Seconds and recall of our inverted lists, and of faiss' with the fewest probes."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    x, search = clustered(n, d), iclm_sort.nearest_neighbours
    sample = np.random.default_rng(5).choice(n, min(n, 1000), replace=False)
    _, true = search(x, k, "exact", rows=sample)
    seconds, (_, found) = timed(lambda: search(x, k, "ivf", recall=GOAL_RECALL + 0.01))
    ours = {"seconds": seconds, "recall": recall(true, found[sample])}

    lists = round(4 * np.sqrt(n))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter = 6  # as many rounds as ours
    index.cp.max_points_per_centroid = 39  # its own least
    built = timed(lambda: index.train(x))[0] + timed(lambda: index.add(x))[0]
    for probes in PROBES:
        index.nprobe = probes
        theirs = {"recall": recall(true, index.search(x[sample], k + 1)[1])}
        if theirs["recall"] >= GOAL_RECALL:
            break
    queries = x if n <= 200_000 else x[:65536]
    searched = timed(lambda: index.search(queries, k + 1))[0] * n / len(queries)
    theirs |= {"build_seconds": built, "search_seconds": searched, "seconds": built + searched}
    theirs |= {"probes": probes, "lists": lists, "queries_timed": len(queries)}
    row = {"n": n, "d": d, "k": k, "vectors": clustered.__doc__, "ours": ours, "faiss": theirs}
    row["faster_than_faiss_by"] = theirs["seconds"] / seconds
    return row | {"than_its_search_alone": searched / seconds, "threads": torch.get_num_threads()}


def synthetic_lists(n: int, k: int = 10, reach: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Lists as of points on a line in shuffled order: neighbours within `reach` places."""
    rng = np.random.default_rng(0)
    name = rng.permutation(n)
    place = np.empty(n, np.int64)
    place[name] = np.arange(n)
    similarity, index = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    for start in range(0, n, 1 << 18):
        at = place[start : start + (1 << 18), None]
        draws = rng.random((len(at), 2 * reach), np.float32)
        steps = np.argsort(draws, axis=1)[:, :k].astype(np.int64)
        steps = np.where(steps < reach, steps - reach, steps - reach + 1)
        other = (at + steps) % n
        low, high = np.minimum(at, other), np.maximum(at, other)
        noise = ((low * 1_000_003 + high * 7_919) % 4093) / 4093 / 200  # the same from either side
        weight = (1 - np.abs(steps) / 50 + noise).astype(np.float32)
        order = np.argsort(-weight, axis=1, kind="stable")
        similarity[start : start + (1 << 18)] = np.take_along_axis(weight, order, 1)
        index[start : start + (1 << 18)] = name[np.take_along_axis(other, order, 1)]
    return similarity, index


def graph(n: int) -> dict:
    """Seconds of graph and walk, and the largest memory of this process, with the lists."""
    similarity, index = synthetic_lists(n)
    built, made = timed(lambda: iclm_sort.build_graph(similarity, index))
    walked, path = timed(lambda: iclm_sort.traverse(made))
    peak = resident_bytes()
    assert (np.bincount(path, minlength=n) == 1).all()
    row = {"n": n, "arcs": len(made.neighbours), "graph_seconds": built, "walk_seconds": walked}
    return row | {"seconds": built + walked, "peak_gb": peak / 1e9}


def orders(documents: int | None) -> dict:
    """Share of the upper bound of each order on the default corpus, k = 10, five seeds."""
    found = itertools.islice(iclm_sort.python_functions(), documents)
    x = iclm_sort.embed_documents(text for text, _ in found)
    made = iclm_sort.build_graph(*iclm_sort.distinct_neighbours(x, 10, iclm_sort.Config.threshold))
    rows = {}
    for order in ("file", "random", "paper", "edge"):
        paths = [iclm_sort.traverse(made, order, seed, x) for seed in range(5)]
        reports = [iclm_sort.ordering_report(x, path, made) for path in paths]
        keys = ("adjacent_cosine", "bound", "share_of_bound", "segments")
        rows[order] = {key: float(np.mean([r[key] for r in reports])) for key in keys}
        shares = [report["share_of_bound"] for report in reports]
        rows[order]["sd_of_share"] = float(np.std(shares, ddof=1))
    return {"documents": len(x), "kept": int(made.keep.sum()), "seeds": 5, "orders": rows}


def verdicts(result: dict) -> list[str]:
    """A line for each goal that was set beforehand."""
    goals = []  # text, and whether it is reached
    for row in result.get("neighbours", []):
        ratio, found = row["faster_than_faiss_by"], row["ours"]["recall"]
        text = f"{row['n']:,} neighbours at recall {found:.3f}: {ratio:.2f} times faiss' speed"
        reached = ratio >= 1 and found >= GOAL_RECALL
        goals.append((f"{text}, goal 1 at {GOAL_RECALL}", reached))
    for row in result.get("graph", []):
        if row["n"] in GOALS:
            text, (seconds, memory) = f"graph and walk of {row['n']:,}", GOALS[row["n"]]
            took, peak = row["seconds"], row["peak_gb"]
            goals.append((f"{text}: {took:.1f} s, goal {seconds}", took <= seconds))
            goals.append((f"{text}: {peak:.2f} GB, goal {memory}", peak <= memory))
    for order, least in GOAL_SHARES.items():
        if "orders" in result:
            share = result["orders"]["orders"][order]["share_of_bound"]
            goals.append((f"{order}: {share:.4f} of the bound, goal {least}", share >= least))
    return [f"{text}: {'reached' if good else '**missed**'}" for text, good in goals]


def main() -> None:
    """Run what is asked for, add it to the result file, say which goals were reached."""
    parts = "neighbours", "graph", "orders"
    only = {"nargs": "+", "choices": parts, "default": parts, "help": "what to measure"}
    text = "documents; none: 100,000 for neighbours, 1,000,000 for the graph"
    args = _common.parse(__doc__, only=only, sizes={"type": int, "nargs": "+", "help": text})
    sizes, result = {"neighbours": 100_000, "graph": 1_000_000}, _common.read_result(args, "iclm")
    if args.smoke:
        sizes = dict.fromkeys(sizes, 3000)
    for name in args.only:
        if name == "orders":
            result[name] = orders(300 if args.smoke else None)
            continue
        rows = {row["n"]: row for row in result.get(name, [])}
        for n in args.sizes or [sizes[name]]:
            measure = graph if name == "graph" else neighbours
            rows[n] = in_new_process(measure, n, threads=args.threads)
            print(rows[n], flush=True)
        result[name] = [rows[n] for n in sorted(rows)]
    measured = {name: result[name] for name in parts if name in result}
    goals = verdicts(measured)
    print("\n".join(goals))
    _common.write_result(args, "iclm", **measured, goals=goals)


if __name__ == "__main__":
    main()
