"""How fast iclm_sort.py finds neighbours and sorts, beside faiss and beside its own goals.

    python tests/bench/iclm.py               100k vectors, a million documents, the default corpus
    python tests/bench/iclm.py --only neighbours --sizes 1000000
    python tests/bench/iclm.py --only graph --sizes 1000000 10000000
    python tests/bench/iclm.py --only orders

Neighbours: our inverted lists beside faiss' IVFFlat on clustered vectors, all queries of all
vectors, at the same recall, each with the fewest probes that reach it, in one process, with the
same threads. Of large sets faiss answers a batch of queries, from which its time for all is
extrapolated. Graph: lists of k = 10 as of points on a line with random neighbours near by, then
`build_graph` and the walk, each size in a process of its own, whose largest memory is given.
Orders: share of the upper bound on the default corpus.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import iclm_sort  # noqa: E402

GOALS = {1_000_000: (15, 1.5), 10_000_000: (180, 10)}  # seconds of graph and walk, GB
GOAL_SHARES, GOAL_RECALL = {"edge": 0.92, "paper": 0.88}, 0.95


def clustered(n: int, d: int, latent: int = 32, seed: int = 0) -> np.ndarray:
    """Unit rows (n, d): n / 100 overlapping clusters in `latent` dimensions, with noise in d."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((n // 100, latent), dtype=np.float32)
    z = centres[rng.integers(len(centres), size=n)] + 0.9 * rng.standard_normal(
        (n, latent), dtype=np.float32
    )
    x = z @ (rng.standard_normal((latent, d), dtype=np.float32) / latent**0.5)
    x += 0.2 * rng.standard_normal((n, d), dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def share(true: np.ndarray, found: np.ndarray) -> float:
    return float((true[:, :, None] == found[:, None, :]).any(2).mean())


def neighbours(n: int, d: int = 256, k: int = 10) -> dict:
    """Seconds and recall of our inverted lists, and of faiss' with the fewest probes."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    x = clustered(n, d)
    sample = np.random.default_rng(5).choice(n, 1000, replace=False)
    began = time.perf_counter()
    true = iclm_sort.nearest_neighbours(x, k, "exact", rows=sample)[1]
    exact = (time.perf_counter() - began) * n / len(sample)
    began = time.perf_counter()
    found = iclm_sort.nearest_neighbours(x, k, "ivf", recall=GOAL_RECALL + 0.01)[1]
    ours = {"seconds": time.perf_counter() - began, "recall": share(true, found[sample])}
    row = {
        "n": n,
        "d": d,
        "k": k,
        "vectors": clustered.__doc__,
        "exact_seconds_extrapolated": exact,
        "ours": ours,
    }
    text = f"{ours['seconds']:.1f} s at recall {ours['recall']:.3f}; exact search: {exact:.0f} s"
    print(f"n {n:,}: ours {text}", flush=True)
    lists = round(4 * np.sqrt(n))
    began = time.perf_counter()
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.max_points_per_centroid = (
        6,
        39,
    )  # as many rounds as ours; 39 is its own least
    index.train(x)
    index.add(x)
    built = time.perf_counter() - began
    for probes in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512):
        index.nprobe = probes
        if share(true, index.search(x[sample], k + 1)[1]) >= GOAL_RECALL:
            break
    began = time.perf_counter()
    part = x if n <= 200_000 else x[:65536]
    found = np.concatenate(
        [index.search(part[i : i + 65536], k + 1)[1] for i in range(0, len(part), 65536)]
    )
    searched = (time.perf_counter() - began) * n / len(part)
    theirs = {
        "build_seconds": built,
        "search_seconds": searched,
        "seconds": built + searched,
        "probes": probes,
    }
    theirs |= {
        "recall": share(true, index.search(x[sample], k + 1)[1]),
        "lists": lists,
        "queries_timed": len(part),
    }
    text = (
        f"{theirs['seconds']:.1f} s ({searched:.1f} s of search) at recall {theirs['recall']:.3f}"
    )
    print(f"n {n:,}: faiss {text}", flush=True)
    faster = {
        "faster_than_faiss_by": theirs["seconds"] / ours["seconds"],
        "than_its_search_alone": searched / ours["seconds"],
    }
    return row | {"faiss": theirs} | faster


def synthetic_lists(n: int, k: int = 10, reach: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Lists as of points on a line in shuffled order: neighbours within `reach` places."""
    rng = np.random.default_rng(0)
    name = rng.permutation(n)
    place = np.empty(n, np.int64)
    place[name] = np.arange(n)
    similarity, index = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    for start in range(0, n, 1 << 18):
        at = place[start : start + (1 << 18), None]
        steps = np.argsort(rng.random((len(at), 2 * reach), np.float32), axis=1)[:, :k].astype(
            np.int64
        )
        steps = np.where(steps < reach, steps - reach, steps - reach + 1)
        steps = np.take_along_axis(steps, np.argsort(np.abs(steps), axis=1, kind="stable"), 1)
        other = (at + steps) % n
        low, high = np.minimum(at, other), np.maximum(at, other)
        noise = ((low * 1_000_003 + high * 7_919) % 4093) / 4093 / 200  # the same from either side
        weight = (1 - np.abs(steps) / 50 + noise).astype(np.float32)
        order = np.argsort(-weight, axis=1, kind="stable")
        similarity[start : start + (1 << 18)] = np.take_along_axis(weight, order, 1)
        index[start : start + (1 << 18)] = name[np.take_along_axis(other, order, 1)]
    return similarity, index


def graph(n: int) -> dict:
    """Seconds of graph and walk, and the process' largest memory with the lists and before."""
    similarity, index = synthetic_lists(n)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    began = time.perf_counter()
    made = iclm_sort.build_graph(similarity, index)
    built = time.perf_counter() - began
    path = iclm_sort.traverse(made)
    walked = time.perf_counter() - began - built
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    assert np.bincount(path, minlength=n).tolist() == [1] * n if n <= 1_000_000 else len(path) == n
    row = {"n": n, "arcs": len(made.neighbours), "graph_seconds": built, "walk_seconds": walked}
    return row | {"seconds": built + walked, "peak_gb": peak, "gb_before": start}


def orders() -> dict:
    """Share of the upper bound of each order on the default corpus, k = 10."""
    texts = [text for text, _ in iclm_sort.python_functions()]
    x = iclm_sort.embed_documents(texts)
    made = iclm_sort.build_graph(*iclm_sort.distinct_neighbours(x, 10, iclm_sort.Config.threshold))
    rows = {}
    for order in ("file", "random", "paper", "edge"):
        reports = []
        for seed in range(5):
            path = iclm_sort.traverse(made, order, seed, x)
            reports.append(iclm_sort.ordering_report(x, path, made))
        keys = ("adjacent_cosine", "bound", "share_of_bound", "segments")
        rows[order] = {key: float(np.mean([r[key] for r in reports])) for key in keys}
        shares = [report["share_of_bound"] for report in reports]
        rows[order]["sd_of_share"] = float(np.std(shares, ddof=1))
        share = f"{rows[order]['share_of_bound']:.4f} of the bound"
        print(f"{order}: {share}, {rows[order]['segments']:.0f} segments", flush=True)
    return {"documents": len(texts), "kept": int(made.keep.sum()), "seeds": 5, "orders": rows}


def verdicts(result: dict) -> list[str]:
    """A line for each goal that was set beforehand."""
    lines = []

    def say(text: str, good: bool) -> None:
        lines.append(f"{text}: {'reached' if good else '**missed**'}")

    for row in result.get("neighbours", []):
        ratio, recall = row["faster_than_faiss_by"], row["ours"]["recall"]
        text = f"{row['n']:,} neighbours at recall {recall:.3f}: {ratio:.2f} times faiss' speed"
        say(f"{text}, goal 1 at {GOAL_RECALL}", ratio >= 1 and recall >= GOAL_RECALL)
    for row in result.get("graph", []):
        if row["n"] in GOALS:
            seconds, gigabytes = GOALS[row["n"]]
            text = f"graph and walk of {row['n']:,}"
            reached = row["seconds"] <= seconds
            say(f"{text}: {row['seconds']:.1f} s, goal {seconds}", reached)
            reached = row["peak_gb"] <= gigabytes
            say(f"{text}: {row['peak_gb']:.2f} GB, goal {gigabytes}", reached)
    for order, goal in GOAL_SHARES.items() if "orders" in result else ():
        value = result["orders"]["orders"][order]["share_of_bound"]
        say(f"{order}: {value:.4f} of the bound, goal {goal}", value >= goal)
    return lines


def main() -> None:
    """Run what is asked for, merge it into the result file, say which goals were reached."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=["neighbours", "graph", "orders"],
        choices=["neighbours", "graph", "orders"],
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        help="documents (default: 100,000 for neighbours, 1,000,000 for graph)",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of iclm.json")
    parser.add_argument("--graph-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.graph_of:
        print(json.dumps(graph(arguments.graph_of)))
        return
    path = arguments.out / "iclm.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    for name in arguments.only:
        sizes = arguments.sizes or [{"neighbours": 100_000, "graph": 1_000_000}.get(name)]
        if name == "orders":
            result["orders"] = orders()
            continue
        rows = {row["n"]: row for row in result.get(name, [])}
        for n in sizes:
            if name == "neighbours":
                rows[n] = neighbours(n) | {"threads": arguments.threads}
            else:
                command = [
                    sys.executable,
                    __file__,
                    "--graph-of",
                    str(n),
                    "--threads",
                    str(arguments.threads),
                ]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                rows[n] = json.loads(done.stdout.splitlines()[-1])  # after progress lines
                print(json.dumps(rows[n]), flush=True)
        result[name] = [rows[n] for n in sorted(rows)]
    result["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    result["command"] = "python tests/bench/iclm.py, once for each part and size"
    result["goals"] = verdicts(result)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print("\n".join(result["goals"]))


if __name__ == "__main__":
    main()
