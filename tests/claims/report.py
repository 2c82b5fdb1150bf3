"""The tables of the three READMEs, made from the result files: `python tests/claims/report.py`.

Each stands between `<!-- NAME -->` and `<!-- end -->` in README.md, tests/claims/README.md or
tests/bench/README.md. NAME is a result file whose program makes the table, or a function below; in
`NAME:PART` PART is its argument. The column of lines in README.md's first table is counted anew
too. With `--check` nothing is written, and the exit status is 1 where a README differs.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLAIMS, BENCH = ROOT / "tests/claims/results", ROOT / "tests/bench/results"
READMES = (ROOT / "README.md", ROOT / "tests/claims/README.md", ROOT / "tests/bench/README.md")
sys.path[:0] = [str(ROOT), str(CLAIMS.parent)]

import constrained_claims  # noqa: E402
import iclm_claims  # noqa: E402
import mamba_claims  # noqa: E402
import safe_claims  # noqa: E402
import transformer_claims  # noqa: E402
from _claims import markdown  # noqa: E402
from _default import TITLES  # noqa: E402


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def number(value: float) -> str:
    """Three digits or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# ----- tests/claims -------------------------------------------------------------------------------

TABLES = {}  # by name of the result file
for program in (mamba_claims, transformer_claims):
    TABLES |= {claim.name: claim.table for claim in program.CLAIMS.values()}
TABLES["safe_rlhf_claims"] = safe_claims.table
TABLES["in_context_pretraining"] = lambda result: iclm_claims.table(result["summary"])


def constrained_rlhf(part: str) -> str:
    return constrained_claims.tables(read(CLAIMS / "constrained_rlhf.json")["claims"])[part]


def sample(script: str, lines: int = 12) -> str:
    """The first lines of what the default run of that script writes."""
    text = read(CLAIMS / f"{script}_default.json")["sample"]
    return "\n".join(["```text", *text.splitlines()[:lines], "```"])


def recaption() -> str:
    """What captioners say and models draw in two default runs: seed 0 / seed 1."""
    keys = ("clip_score", "binding", "count", "shape", "colour", "size", "texture", "place")
    runs, rows = [read(CLAIMS / f"recaption_seed_{seed}.json") for seed in (0, 1)], []
    tables = [{"captioner": run["captioners"]} | run["models"] for run in runs]
    for model, names in tables[0].items():
        for name in names:
            cells = []
            for key in keys:
                values = [table[model][name].get(key) for table in tables]
                cells.append(" / ".join(f"{value:.2f}" for value in values if value is not None))
            rows.append([model, name.replace("_", " "), *cells])
    return markdown(["", "prompts", "CLIP score", *keys[1:]], rows, left=2)


# ----- tests/bench --------------------------------------------------------------------------------


def goals(*names: str) -> str:
    """What the benchmarks were to reach."""
    lines = []
    for name in names:
        for goal in read(BENCH / f"{name}.json")["goals"]:
            verdict = "reached" if goal["reached"] else "**missed**"
            ratio = f"{goal['ratio']:.3g} times, goal {goal['at_least']:g}"
            lines.append(f"- {goal['goal']}: {ratio}: {verdict}")
    return "\n".join(lines)


def scan() -> str:
    result, names, rows = read(BENCH / "scan.json"), ("fused", "chunked", "mambapy"), []
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
    result, rows = read(BENCH / "model.json"), []
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
    result = read(BENCH / "folder.json")
    size, there, rows = result["weight_bytes"], result["bytes_a_second"], []
    for name, rate in result["tokens_a_second"].items():
        rows.append([name, number(rate), f"{rate * size / there:.0%}"])
    return markdown(["model", "tokens a second", f"of the floor, {there / 1e9:.1f} GB/s"], rows)


def versus(part: str) -> str:
    """Mamba beside the Transformer."""
    parts, rows = read(BENCH / "versus.json")["parts"], []
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
    result, rows = read(BENCH / "iclm.json"), []
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


# ----- The READMEs --------------------------------------------------------------------------------


def renew(text: str) -> str:
    """A README with every table made anew. Raises KeyError for a name that has none."""

    def fill(found: re.Match) -> str:
        name, *parts = found[1].split(":")
        if name in TABLES:
            table = TABLES[name](read(CLAIMS / f"{name}.json"))
        else:
            table = globals()[name](*parts)
        return f"<!-- {found[1]} -->\n{table}\n<!-- end -->"

    def lines(found: re.Match) -> str:
        return f"{found[1]}{len((ROOT / found[2]).read_text('utf-8').splitlines()):,} |"

    text = re.sub(r"(?m)^(\| \[`(\w+\.py)`\]\(\2\) \| [^|]* \| )[\d,]+ \|", lines, text)
    return re.sub(r"<!-- ([\w:-]+) -->\n(?:(?!<!-- ).*\n)*<!-- end -->", fill, text)


def main(argv: list[str] | None = None) -> int:
    """Renew the three READMEs, or with --check only compare. Returns 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, differs = parser.parse_args(argv).check, False
    for path in READMES:
        text = path.read_text("utf-8")
        if not check:
            path.write_text(renew(text), "utf-8")
        elif renew(text) != text:
            differs = True
            print(f"{path.relative_to(ROOT)} differs: run python tests/claims/report.py")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
