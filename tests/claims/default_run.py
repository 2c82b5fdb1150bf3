"""What the default run of a script reaches: `python tests/claims/default_run.py mamba|transformer`.

Runs the script's default training once a seed, and writes results/SCRIPT_default.json, which the
README's table comes from, and results/SCRIPT_default.png: validation loss by step, mean and range
over the seeds, beside the baselines. Other flags, as --smoke, go to the script. About 5 minutes a
seed on two cores.
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
    module = importlib.import_module(script)
    if code := module.main(["--seed", str(seed), "--out", str(out), *flags]):
        sys.exit(code)
    if "--smoke" in flags:
        out = out / "smoke"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    result = json.loads((out / "result.json").read_text("utf-8"))
    result["sample"] = module.sample(module.Config(out=str(out), seed=seed))
    result["versions"] = {"python": result["python"].split()[0], "torch": result["torch"]}
    return result, [row for row in rows if "valid_loss" in row]


def table(script: str, result: dict) -> str:
    """The README's table."""
    bits = result["bits_a_byte"]
    rows = [(name, f"{value:.3f}") for name, value in result["baselines_bits_a_byte"].items()]
    name = f"{NAMES[script]}, {result['parameters']:,} parameters"
    rows.append((name, f"{bits['mean']:.3f} ± {bits['sd']:.3f}"))
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["| model | validation bits a byte |", "| --- | --- |", *lines])


def draw(script: str, curves: list[list[dict]], baselines: dict[str, float], path: Path) -> None:
    """Validation bits a byte by step, mean and range over the seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [row["step"] for row in curves[0]]
    bits = [[curve[i]["valid_bits_a_byte"] for curve in curves] for i in range(len(steps))]
    label = f"{NAMES[script]}, {len(curves)} seeds"
    axes.plot(steps, [statistics.mean(b) for b in bits], "o-", ms=3, label=label)
    axes.fill_between(steps, [min(b) for b in bits], [max(b) for b in bits], alpha=0.3)
    for i, (name, value) in enumerate(baselines.items()):
        axes.axhline(value, ls="--", lw=1, color=f"C{i + 1}", label=name)
    axes.set(xlabel="step", ylabel="validation bits a byte", ylim=(1.5, None))
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run the seeds, write the result file and the picture, print the table."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("script", choices=NAMES, help="whose default run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run each")
    parser.add_argument("--out", type=Path, default=Path("out/claims"), help="folder for the runs")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder to write to")
    arguments, flags = parser.parse_known_args()
    script, runs = arguments.script, []
    for seed in arguments.seeds:
        runs.append(run(script, seed, arguments.out / f"{script}_default_{seed}", flags))
    first, config = runs[0][0], runs[0][0]["config"]
    scores = [result["validation"]["bits_a_byte"] for result, _ in runs]
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    result = {"command": f"python tests/claims/default_run.py {script}", "seeds": arguments.seeds}
    result["bits_a_byte"] = {"mean": statistics.mean(scores), "sd": spread, "each": scores}
    result["nats_a_token"] = [result["validation"]["loss"] for result, _ in runs]
    result["wall_seconds"] = [result["wall_seconds"] for result, _ in runs]
    result["tokens_seen"] = config["steps"] * config["batch"] * config["length"]
    kept = ("sample", "parameters", "baselines_bits_a_byte", "config", "versions", "device")
    result |= {key: first[key] for key in (*kept, "script_sha256")}
    curves = [[(row["step"], row["valid_bits_a_byte"]) for row in rows] for _, rows in runs]
    result["validation_curves"] = curves
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"{script}_default.json"
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    curves, baselines = [rows for _, rows in runs], first["baselines_bits_a_byte"]
    draw(script, curves, baselines, path.with_suffix(".png"))
    print(table(script, result))


if __name__ == "__main__":
    main()
