"""The tables of the three READMEs, made from the result files: `python tests/claims/report.py`.

Each stands between `<!-- NAME -->` and `<!-- end -->` in README.md, tests/claims/README.md or
tests/bench/README.md. NAME is a function below, or `NAME:PART` with its argument. The column of
lines in README.md's first table is counted anew too. With `--check` nothing is written, and the
exit status is 1 where a README differs from the result files.
"""

import argparse
import importlib
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLAIMS, BENCH = ROOT / "tests/claims/results", ROOT / "tests/bench/results"
READMES = (ROOT / "README.md", ROOT / "tests/claims/README.md", ROOT / "tests/bench/README.md")
LEFT, RIGHT = "---", "---:"
NAMES = {"mamba": "Mamba", "transformer": "Transformer++"}


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def number(value: float) -> str:
    """Three digits or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(head: list[str], rows: list[list[str]], align: list[str]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, align, *rows))


def default_run(script: str) -> str:
    result = read(CLAIMS / f"{script}_default.json")
    rows = [[name, f"{value:.3f}"] for name, value in result["baselines_bits_a_byte"].items()]
    bits = result["bits_a_byte"]
    name = f"{NAMES[script]}, {result['parameters']:,} parameters"
    rows.append([name, f"{bits['mean']:.3f} ± {bits['sd']:.3f}"])
    return table(["model", "validation bits a byte"], rows, [LEFT, LEFT])


def mamba_default() -> str:
    return default_run("mamba")


def transformer_default() -> str:
    return default_run("transformer")


def sample(script: str, lines: int = 12) -> str:
    return (
        "```text\n"
        + "\n".join(read(CLAIMS / f"{script}_default.json")["sample"].splitlines()[:lines])
        + "\n```"
    )


def mamba_sample() -> str:
    return sample("mamba")


def transformer_sample() -> str:
    return sample("transformer")


def scan() -> str:
    result = read(BENCH / "scan.json")
    head = [
        "(B, D, L, N)",
        "pass",
        "fused, ms",
        "chunked, ms",
        "mambapy, ms",
        "fused faster by",
        "chunked faster by",
    ]
    head += ["fused: share of the floor", "peak extra MB, fused", "chunked", "mambapy"]
    rows = []
    for row in result["times"]:
        key = row["shape"], row["mode"]
        memory = next(m["bytes"] for m in result["memory"] if (m["shape"], m["mode"]) == key)
        fused, chunked, theirs = (
            statistics.median(row["seconds"][k]) for k in ("fused", "chunked", "mambapy")
        )
        cells = [1e3 * fused, 1e3 * chunked, 1e3 * theirs, theirs / fused, theirs / chunked]
        share = f"{result['floor']['seconds'][' '.join(key)] / fused:.0%}"
        cells = [
            *map(number, cells),
            share,
            *(number(memory[k] / 1e6) for k in ("fused", "chunked", "mambapy")),
        ]
        rows.append([str(tuple(row["sizes"])), row["mode"], *cells])
    return table(head, rows, [LEFT, LEFT] + [RIGHT] * 9)


def goals(*files: str) -> str:
    rows = [goal for name in files for goal in read(BENCH / name)["goals"]]
    verdict = {True: "reached", False: "**missed**"}
    return "\n".join(
        f"- {g['goal']}: {g['ratio']:.3g} times, goal {g['at_least']:g}: {verdict[g['reached']]}"
        for g in rows
    )


def scan_goals() -> str:
    return goals("scan.json", "scan-tuned.json")


def model() -> str:
    result = read(BENCH / "model.json")
    rows = [
        [f"`{r['script']}`", r["job"], r["model"], number(r["tokens_a_second"]), ""]
        for r in result["measured"]
    ]
    for row, measured in zip(rows, result["measured"], strict=True):
        row[-1] = "" if measured["model"] == "ours" else number(measured["ratio"])
    for name, pair in result["pair"].items():
        job = f"training, {pair['parameters']:,} parameters"
        rows.append([f"`{name}`", job, "ours", number(pair["tokens_a_second"]), ""])
    return table(
        ["script", "job", "model", "tokens a second", "ours is faster by"],
        rows,
        [LEFT] * 3 + [RIGHT] * 2,
    )


def folder() -> str:
    """A real model: tokens a second, and the memory's bandwidth that they need of what there is."""
    result = read(BENCH / "folder.json")
    size, there = result["weight_bytes"], result["bytes_a_second"]
    rows = []
    for name, rate in result["tokens_a_second"].items():
        rows.append([name, number(rate), f"{rate * size / there:.0%}"])
    head = ["model", "tokens a second", f"of the floor, {there / 1e9:.1f} GB/s"]
    return table(head, rows, [LEFT, RIGHT, RIGHT])


def model_goals() -> str:
    return goals("model.json", "folder.json")


def versus_loss() -> str:
    rows = sorted(
        read(BENCH / "versus.json")["parts"]["loss"], key=lambda row: row["parameters"] // 1e5
    )
    cells = [[NAMES[r["script"]], f"{r['parameters']:,}", f"{r['lr']:g}"] for r in rows]
    cells = [
        [*c, f"{r['bits_a_byte']:.3f} ± {r['sd']:.3f}"] for c, r in zip(cells, rows, strict=True)
    ]
    return table(
        ["model", "parameters", "peak rate", "validation bits a byte"], cells, [LEFT] + [RIGHT] * 3
    )


def versus_time() -> str:
    rows = []
    for row in read(BENCH / "versus.json")["parts"]["time"]["rows"]:
        ours, theirs = (row["microseconds_a_token"][k] for k in ("mamba", "transformer"))
        rows.append([f"{row['length']:,}", number(ours), number(theirs), number(theirs / ours)])
    head = ["length", "Mamba, µs a token", "Transformer++, µs a token", "Transformer++ / Mamba"]
    return table(head, rows, [RIGHT] * 4)


def versus_text() -> str:
    rows = []
    for row in read(BENCH / "versus.json")["parts"]["text"]:
        speed = [number(row["tokens_a_second"][k]) for k in NAMES]
        memory = [number(row["bytes"][k] / 1e6) for k in NAMES]
        rows.append([str(row["batch"]), f"{row['context']:,}", *speed, *memory])
    head = [
        "batch",
        "context",
        "Mamba, tokens/s",
        "Transformer++, tokens/s",
        "Mamba, MB",
        "Transformer++, MB",
    ]
    return table(head, rows, [RIGHT] * 6)


def of_program(name: str) -> str:
    """The table that a program in this folder prints."""
    sys.path.insert(0, str(CLAIMS.parent))
    return importlib.import_module(name).table(read(CLAIMS / f"{name}.json"))


def transformer_plus_plus() -> str:
    return of_program("transformer_plus_plus")


def selective_copying() -> str:
    return of_program("selective_copying")


def constrained_rlhf(part: str) -> str:
    sys.path.insert(0, str(CLAIMS.parent))
    return importlib.import_module("constrained_rlhf").tables(
        read(CLAIMS / "constrained_rlhf.json")["claims"]
    )[part]


def safe_rlhf() -> str:
    sys.path.insert(0, str(CLAIMS.parent))
    result = read(CLAIMS / "safe_rlhf_claims.json")
    return importlib.import_module("safe_rlhf_claims").table(result)


def recaption_seed_0() -> str:
    """What the models of one default run draw; shares of what the prompts say."""
    keys, rows = ("binding", "count", "shape", "colour", "size", "texture", "place"), []
    for model, of_prompts in read(CLAIMS / "recaption_seed_0.json")["models"].items():
        for prompts, row in of_prompts.items():
            shares = ["" if row[key] is None else f"{row[key]:.2f}" for key in keys]
            rows.append([model, prompts.replace("_", " "), f"{row['clip_score']:.1f}", *shares])
    head = ["trained on", "prompts", "CLIP score", *keys]
    return table(head, rows, [LEFT, LEFT] + [RIGHT] * 8)


def recaption_captioners() -> str:
    keys, rows = ("f1", "hallucinated", "spatial_f1", "spatial_hallucinated", "binding"), []
    for name, row in read(CLAIMS / "recaption_default.json")["captioners"].items():
        rows.append(
            [
                name,
                *("" if row[k] is None else f"{row[k]:.3f}" for k in keys),
                number(row["images_a_second"]),
            ]
        )
    head = [
        "captioner",
        "attribute F1",
        "hallucinated",
        "spatial F1",
        "spatial, hallucinated",
        "binding",
        "images/s",
    ]
    return table(head, rows, [LEFT] + [RIGHT] * 6)


def recaption_models() -> str:
    keys, rows = ("clip", "shape", "colour", "binding", "texture", "place", "relation", "count"), []
    result = read(CLAIMS / "recaption_default.json")
    for model, styles in (
        {"real images": {"descriptive": result["real"]}} | result["arms"]
    ).items():
        for style, row in styles.items():
            cells = [
                "" if row[k] is None else f"{row[k]:.{1 if k == 'clip' else 2}f}" for k in keys
            ]
            rows.append([model, style.replace("_", " "), *cells])
    return table(["trained on", "prompts", "CLIP score", *keys[1:]], rows, [LEFT] * 2 + [RIGHT] * 8)


def better_captions(part: str) -> str:
    """A claim's rows as mean ± half; CLIP scores as they are, all else as per cent."""
    judged = ("clip", "clip, less ground_truth", "binding", "binding, less ground_truth")
    claim, columns = {
        "captioner": (
            "captioner",
            ("f1", "hallucinated", "spatial_f1", "spatial_hallucinated", "shape", "colour"),
        ),
        "kind": ("caption kind", (*judged, "relation", "count")),
        "blend": ("blend", judged),
        "upsampling": ("upsampling", (*judged, "count")),
    }[part]

    def cell(arm: str, column: str, value: dict | None) -> str:
        if not value or ("less" in column and arm.startswith("ground_truth")):
            return ""
        scale, mark = (1, "") if column.startswith("clip") else (100, " %")
        sign = "+" if "less" in arm + column else ""
        return f"{scale * value['mean']:{sign}.1f} ± {scale * value['half']:.1f}{mark}"

    rows = read(CLAIMS / "better_captions.json")["claims"][claim].items()
    cells = [
        [arm.replace("_", " "), *(cell(arm, c, row.get(c)) for c in columns)] for arm, row in rows
    ]
    names = {"f1": "attribute F1", "spatial_f1": "spatial F1"}
    head = [names.get(c, c.replace("_", " ").replace("clip", "CLIP score")) for c in columns]
    first = "captioner" if part == "captioner" else "trained on, drawn from"
    return table([first, *head], cells, [LEFT] + [RIGHT] * len(head))


def induction_heads() -> str:
    return of_program("induction_heads")


def selection_ablation() -> str:
    return of_program("selection_ablation")


def carried_state() -> str:
    return of_program("carried_state")


def what_it_remembers() -> str:
    return of_program("what_it_remembers")


def iclm_orders() -> str:
    orders, rows = read(BENCH / "iclm.json")["orders"]["orders"], []
    for name, row in sorted(orders.items(), key=lambda item: item[1]["share_of_bound"]):
        rows.append(
            [
                name,
                f"{row['adjacent_cosine']:.3f}",
                f"{row['share_of_bound']:.1%}",
                number(row["segments"]),
            ]
        )
    head = ["order", "cosine of adjacent documents", "of the upper bound", "segments"]
    return table(head, rows, [LEFT] + [RIGHT] * 3)


def iclm_neighbours() -> str:
    rows = []
    for row in read(BENCH / "iclm.json")["neighbours"]:
        ours, theirs = row["ours"], row["faiss"]
        cells = [
            ours["seconds"],
            theirs["seconds"],
            row["faster_than_faiss_by"],
            row["than_its_search_alone"],
        ]
        recalls = [f"{ours['recall']:.3f}", f"{theirs['recall']:.3f}"]
        rows.append([f"{row['n']:,} x {row['d']}", *map(number, cells), *recalls])
    head = [
        "vectors",
        "ours, s",
        "faiss IVFFlat, s",
        "faster by",
        "than its search alone",
        "our recall@10",
        "faiss'",
    ]
    return table(head, rows, [LEFT] + [RIGHT] * 6)


def iclm_graph() -> str:
    rows = []
    for row in read(BENCH / "iclm.json")["graph"]:
        cells = [
            row["graph_seconds"],
            row["walk_seconds"],
            1e6 * row["seconds"] / row["n"],
            row["peak_gb"],
        ]
        rows.append([f"{row['n']:,}", f"{row['arcs']:,}", *map(number, cells)])
    head = ["documents", "arcs", "graph, s", "walk, s", "microseconds a document", "peak GB"]
    return table(head, rows, [RIGHT] * 6)


def iclm_goals() -> str:
    return "\n".join(f"- {goal}" for goal in read(BENCH / "iclm.json")["goals"])


def in_context_pretraining() -> str:
    sys.path.insert(0, str(CLAIMS.parent))
    program = importlib.import_module("in_context_pretraining")
    return program.table(read(CLAIMS / "in_context_pretraining.json")["summary"])


def renew(text: str) -> str:
    """A README with every table made anew. Raises KeyError for a name that no function has."""

    def fill(found: re.Match) -> str:
        name, *parts = found[1].split(":")
        return f"<!-- {found[1]} -->\n{globals()[name](*parts)}\n<!-- end -->"

    def lines(found: re.Match) -> str:
        return f"{found[1]}{len((ROOT / found[2]).read_text('utf-8').splitlines()):,} |"

    text = re.sub(
        r"^(\| \[`(\w+\.py)`\]\(\2\) \| [^|]* \| )[\d,]+ \|", lines, text, flags=re.MULTILINE
    )
    return re.sub(r"<!-- ([\w:]+) -->\n(?:(?!<!-- ).*\n)*<!-- end -->", fill, text)


def main(argv: list[str] | None = None) -> int:
    """Renew the three READMEs, or with --check only compare. Returns 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    help_text = "write nothing; exit with 1 where a README differs"
    parser.add_argument("--check", action="store_true", help=help_text)
    check, differs = parser.parse_args(argv).check, False
    for path in READMES:
        before = path.read_text("utf-8")
        after = renew(before)
        if not check:
            path.write_text(after, "utf-8")
        elif before != after:
            differs = True
            name, old = path.relative_to(ROOT), before.splitlines()
            print(f"{name} differs from the result files; run python tests/claims/report.py.")
            print(
                "It should have:",
                *[line for line in after.splitlines() if line not in old][:9],
                sep="\n",
            )
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
