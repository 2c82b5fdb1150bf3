"""The tables of tests/bench/README.md, which tests/claims/report.py fills in."""

import json
import statistics
from pathlib import Path

from tests.claims._claims import markdown
from tests.claims._default import TITLES


def read(name: str) -> dict:
    path = Path(__file__).with_name("results") / f"{name}.json"
    return json.loads(path.read_text("utf-8"))


def number(value: float) -> str:
    """Three digits or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def goals(*names: str) -> str:
    """What the benchmarks were to reach."""
    lines = []
    for name in names:
        for goal in read(name)["goals"]:
            verdict = "reached" if goal["reached"] else "**missed**"
            ratio = f"{goal['ratio']:.3g} times, goal {goal['at_least']:g}"
            lines.append(f"- {goal['goal']}: {ratio}: {verdict}")
    return "\n".join(lines)


def scan() -> str:
    result, names, rows = read("scan"), ("fused", "chunked", "mambapy"), []
    memory = {(row["shape"], row["mode"]): row["bytes"] for row in result["memory"]}
    for row in result["times"]:
        key = row["shape"], row["mode"]
        times = [statistics.median(row["seconds"][name]) for name in names]
        cells = [*(1e3 * seconds for seconds in times), times[2] / times[0], times[2] / times[1]]
        share = f"{result['floor']['seconds'][' '.join(key)] / times[0]:.0%}"
        extra = [number(memory[key][name] / 1e6) for name in names]
        rows.append([str(tuple(row["sizes"])), row["mode"], *map(number, cells), share, *extra])
    head = ["(B, D, L, N)", "pass", *(f"{name}, ms" for name in names), "fused faster by"]
    head += ["chunked faster by", "fused: share of the floor", "peak extra MB, fused"]
    return markdown([*head, "chunked", "mambapy"], rows, left=2)


def model() -> str:
    result, rows = read("model"), []
    for row in result["measured"]:
        faster = "" if row["model"] == "ours" else number(row["ratio"])
        names = f"`{row['script']}`", row["job"], row["model"]
        rows.append([*names, number(row["tokens_a_second"]), faster])
    for name, pair in result["pair"].items():
        job = f"training, {pair['parameters']:,} parameters"
        rows.append([f"`{name}`", job, "ours", number(pair["tokens_a_second"]), ""])
    return markdown(["script", "job", "model", "tokens a second", "ours is faster by"], rows, 3)


def folder() -> str:
    """A real model: tokens a second, and the memory's bandwidth that they need of what there is."""
    result = read("folder")
    size, there, rows = result["weight_bytes"], result["bytes_a_second"], []
    for name, rate in result["tokens_a_second"].items():
        rows.append([name, number(rate), f"{rate * size / there:.0%}"])
    return markdown(["model", "tokens a second", f"of the floor, {there / 1e9:.1f} GB/s"], rows)


def versus(part: str) -> str:
    """Mamba beside the Transformer."""
    parts, rows = read("versus")["parts"], []
    if part == "loss":
        for row in sorted(parts["loss"], key=lambda row: row["parameters"] // 1e5):
            cells = [TITLES[row["script"]], f"{row['parameters']:,}", f"{row['lr']:g}"]
            rows.append([*cells, f"{row['bits_a_byte']:.3f} ± {row['sd']:.3f}"])
        return markdown(["model", "parameters", "peak rate", "validation bits a byte"], rows)
    if part == "time":
        for row in parts["time"]["rows"]:
            ours, theirs = (row["microseconds_a_token"][script] for script in TITLES)
            rows.append([f"{row['length']:,}", *map(number, (ours, theirs, theirs / ours))])
        head = [f"{title}, µs a token" for title in TITLES.values()]
        return markdown(["length", *head, "Transformer++ / Mamba"], rows, left=0)
    for row in parts["text"]:
        cells = [row["tokens_a_second"][script] for script in TITLES]
        cells += [row["bytes"][script] / 1e6 for script in TITLES]
        rows.append([str(row["batch"]), f"{row['context']:,}", *map(number, cells)])
    head = [f"{title}, {unit}" for unit in ("tokens/s", "MB") for title in TITLES.values()]
    return markdown(["batch", "context", *head], rows, left=0)


def iclm(part: str) -> str:
    """The order, the neighbours and the graph of iclm_sort.py."""
    result, rows = read("iclm"), []
    if part == "goals":
        return "\n".join(f"- {goal}" for goal in result["goals"])
    if part == "orders":
        orders = result["orders"]["orders"]
        for name in sorted(orders, key=lambda name: orders[name]["share_of_bound"]):
            row = orders[name]
            cells = [f"{row['adjacent_cosine']:.3f}", f"{row['share_of_bound']:.1%}"]
            rows.append([name, *cells, number(row["segments"])])
        head = ["order", "cosine of adjacent documents", "of the upper bound", "segments"]
        return markdown(head, rows)
    if part == "graph":
        for row in result["graph"]:
            cells = [row["graph_seconds"], row["walk_seconds"], 1e6 * row["seconds"] / row["n"]]
            cells = map(number, [*cells, row["peak_gb"]])
            rows.append([f"{row['n']:,}", f"{row['arcs']:,}", *cells])
        head = ["documents", "arcs", "graph, s", "walk, s", "microseconds a document", "peak GB"]
        return markdown(head, rows, left=0)
    for row in result["neighbours"]:
        ours, theirs = row["ours"], row["faiss"]
        cells = [ours["seconds"], theirs["seconds"], row["faster_than_faiss_by"]]
        cells = map(number, [*cells, row["than_its_search_alone"]])
        recalls = [f"{ours['recall']:.3f}", f"{theirs['recall']:.3f}"]
        rows.append([f"{row['n']:,} x {row['d']}", *cells, *recalls])
    head = ["vectors", "ours, s", "faiss IVFFlat, s", "faster by", "than its search alone"]
    return markdown([*head, "our recall@10", "faiss'"], rows)
