"""What the default run of a script reaches, over seeds: `python tests/claims/default_run.py mamba` or `transformer`.

Runs the script's default training once a seed, and writes results/SCRIPT_default.json, which the README's table comes
from, and results/SCRIPT_default.png: validation loss by step, mean and range over the seeds, beside the n-grams.
About 5 minutes a seed on two cores.
"""

import argparse
import importlib
import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))


NAMES = {"mamba": "Mamba", "transformer": "Transformer++"}


def run(script: str, seed: int, out: Path, flags: list[str]) -> tuple[dict, list[dict]]:
    """One training run: its result, and the rows of its metrics that have a validation loss."""
    code = importlib.import_module(script).main(["--seed", str(seed), "--out", str(out), *flags])
    if code:
        sys.exit(code)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    return json.loads((out / "result.json").read_text("utf-8")), [row for row in rows if "valid_loss" in row]


def table(script: str, result: dict) -> str:
    """The README's table."""
    bits = result["bits_a_byte"]
    rows = [(name, f"{value:.3f}") for name, value in result["baselines_bits_a_byte"].items()]
    rows.append((f"{NAMES[script]}, {result['parameters']:,} parameters", f"{bits['mean']:.3f} ± {bits['sd']:.3f}"))
    lines = ["| model | validation bits a byte |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)


def draw(script: str, curves: list[list[dict]], baselines: dict[str, float], path: Path) -> None:
    """Validation bits a byte by step, mean and range over the seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [row["step"] for row in curves[0]]
    bits = [[curve[i]["valid_bits_a_byte"] for curve in curves] for i in range(len(steps))]
    axes.plot(steps, [statistics.mean(b) for b in bits], "o-", ms=3, label=f"{NAMES[script]}, {len(curves)} seeds")
    axes.fill_between(steps, [min(b) for b in bits], [max(b) for b in bits], alpha=0.3)
    for i, (name, value) in enumerate(baselines.items()):
        axes.axhline(value, ls="--", lw=1, color=f"C{i + 1}", label=name)
    axes.set(xlabel="step", ylabel="validation bits a byte", ylim=(1.5, 5.0))
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run the seeds, write the result file and the picture, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=NAMES, help="whose default run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run each (default: 1 2 3)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/claims"), help="folder for the runs (default: out/claims)"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for result and picture")
    arguments, flags = parser.parse_known_args()
    script = arguments.script
    runs = [run(script, seed, arguments.out / f"{script}_default_{seed}", flags) for seed in arguments.seeds]
    first = runs[0][0]
    scores = [result["validation"]["bits_a_byte"] for result, _ in runs]
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    result = {
        "command": f"python tests/claims/default_run.py {script}",
        "seeds": arguments.seeds,
        "bits_a_byte": {"mean": statistics.mean(scores), "sd": spread, "each": scores},
        "nats_a_token": [result["validation"]["loss"] for result, _ in runs],
        "wall_seconds": [result["wall_seconds"] for result, _ in runs],
        "sample": first["sample"],
        **{k: first[k] for k in ("parameters", "tokens_seen", "baselines_bits_a_byte", "config", "versions", "device")},
        "script_sha256": first["script_sha256"],
        "validation_curves": [[(row["step"], row["valid_bits_a_byte"]) for row in rows] for _, rows in runs],
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"{script}_default.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    picture = arguments.results / f"{script}_default.png"
    draw(script, [rows for _, rows in runs], first["baselines_bits_a_byte"], picture)
    print(table(script, result))


if __name__ == "__main__":
    main()
