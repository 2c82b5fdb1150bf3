"""What the default run of a language model reaches: the word `default` of two programs here."""

import json
from pathlib import Path
from types import ModuleType

import _claims
from _claims import Claim, Setting, mean_sd, plus_minus

SETTINGS = {
    "out": Setting("out/claims", "folder for the runs"),
    "flags": Setting("", "more flags for the script", smoke="--smoke"),
}
TITLES = {"mamba": "Mamba", "transformer": "Transformer++"}


def default_run(script: ModuleType) -> Claim:
    """The script's default training, once a seed; about 5 minutes each on two cores."""

    def measure(s, seeds, progress) -> dict:
        """The runs' results; sample, sizes and baselines are the first seed's."""
        results, curves = [], []
        for seed in seeds:
            out = f"{s.out}/{script.__name__}_default_{seed}"
            if script.main(["--seed", str(seed), "--out", out, *s.flags.split()]):
                raise SystemExit(f"the run of seed {seed} failed")
            folder = Path(out, "smoke") if "--smoke" in s.flags else Path(out)
            results.append(json.loads((folder / "result.json").read_text("utf-8")))
            rows = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
            pairs = [(row["step"], row.get("valid_bits_a_byte")) for row in rows]
            curves.append([pair for pair in pairs if pair[1] is not None])
            if seed == seeds[0]:
                sample = script.sample(script.Config(out=str(folder), seed=seed))
        first, config = results[0], results[0]["config"]
        kept = ("parameters", "baselines_bits_a_byte", "config", "device", "script_sha256")
        content = {key: first[key] for key in kept} | {"sample": sample}
        content["bits_a_byte"] = mean_sd([run["validation"]["bits_a_byte"] for run in results])
        content["nats_a_token"] = [run["validation"]["loss"] for run in results]
        content["wall_seconds"] = [run["wall_seconds"] for run in results]
        content["tokens_seen"] = config["steps"] * config["batch"] * config["length"]
        return content | {"validation_curves": curves}

    def table(result: dict) -> str:
        rows = [[name, f"{bits:.3f}"] for name, bits in result["baselines_bits_a_byte"].items()]
        name = f"{TITLES[script.__name__]}, {result['parameters']:,} parameters"
        rows.append([name, plus_minus(result["bits_a_byte"], 3)])
        return _claims.markdown(["model", "validation bits a byte"], rows, left=2)

    def draw(result: dict, plt):
        """Bits a byte by step, beside the baselines."""
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        steps = [step for step, _ in result["validation_curves"][0]]
        runs = [[bits for _, bits in curve] for curve in result["validation_curves"]]
        title = TITLES[script.__name__]
        _claims.draw_band(axes, steps, runs, "o-", ms=3, label=f"{title}, {len(runs)} seeds")
        for i, (name, bits) in enumerate(result["baselines_bits_a_byte"].items(), 1):
            axes.axhline(bits, ls="--", lw=1, color=f"C{i}", label=name)
        axes.set(xlabel="step", ylabel="validation bits a byte", ylim=(1.5, None))
        axes.legend()
        return figure

    return Claim(f"{script.__name__}_default", SETTINGS, measure, table, draw)
