"""What Safe RLHF claims, in safe_rlhf.py's invented world, by its default settings.

`python tests/claims/safe_claims.py`: PPO on the reward turns harmful; PPO-Lagrangian keeps to
the threshold, with at least the helpfulness of each fixed nu that keeps it; the cost model needs
its sign terms; three rounds with red-teaming; other thresholds; Llama 2's gate. All runs of a seed
start from one policy, and see as many answers. A run that is done is kept in --out and not done
again; --parts and --seeds choose among them. Once all are there, the result file is written.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

from _claims import compact, markdown  # noqa: E402

import safe_rlhf as s  # noqa: E402

NUS = (0.01, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
THRESHOLDS = ("0", "-2", "-3")  # beside the default
T_95 = {1: math.nan, 2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
KEYS = ("helpfulness", "cost_harm", "true_harm", "unsafe_harm", "refused")
KEPT = ("update", "lambda_harm", "cost_harm", "batch_cost_harm", "helpfulness", "reward")
ROWS = {  # of the table: the run's name in the result file
    "SFT alone": "sft", "PPO on the reward": "ppo", "**PPO-Lagrangian**": "ppo_lag",
    "its cost model by pairs alone": "no sign terms", "Llama 2's gate": "gate",
    "R − 0.5 C": "nu 0.5", "R − C": "nu 1", "R − 2 C": "nu 2", "R − 5 C": "nu 5",
    "threshold 0": "d 0", "threshold −2": "d -2", "threshold −2.5": "d -2.5",
    "threshold −3": "d -3",
}  # fmt: skip


# ----- Statistics ---------------------------------------------------------------------------------


def over(values: list[float]) -> dict:
    """Mean, half the width of its 95 % interval by Student's t, and the values."""
    half = 0.0
    if len(values) > 1:
        half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.mean(values), "half": half, "each": values}


def win_rates(rows: list[dict], baseline: list[dict]) -> dict[str, tuple[int, float | None]]:
    """By transition of safety: the number of answers, and the share that is more helpful."""
    wins = {f"{a} -> {b}": [] for a in ("safe", "unsafe") for b in ("safe", "unsafe")}
    for now, then in zip(rows, baseline, strict=True):
        names = ["unsafe" if row["unsafe_harm"] else "safe" for row in (then, now)]
        gain = now["helpfulness"] - then["helpfulness"]
        wins[" -> ".join(names)].append((np.sign(gain) + 1) / 2)  # ties count half
    return {k: (len(v), float(np.mean(v)) if v else None) for k, v in wins.items()}


def elo(games: Sequence[tuple[int, int, float]], draws: float = 0.1) -> np.ndarray:
    """Elo ratings (N,) of most likelihood, the first's 1000, by Zermelo's iteration.

    A game is (i, j, i's score: 1, 1/2 or 0). Virtual draws between each two players keep the rating
    of one who always wins finite.
    """
    N = 1 + max(max(i, j) for i, j, _ in games)
    wins, strength = draws / 2 * (1 - np.eye(N)), np.ones(N)
    for i, j, score in games:
        wins[i, j] += score
        wins[j, i] += 1 - score
    for _ in range(10_000):
        before = strength
        strength = wins.sum(1) / ((wins + wins.T) / (before[:, None] + before)).sum(1)
        strength = strength / strength[0]
        if np.abs(np.log(strength / before)).max() < 1e-10:
            break
    return 1000 + 400 * np.log10(strength)


# ----- Runs ---------------------------------------------------------------------------------------


class Seed:
    """A seed's folder: its lab, with the first policy and score models, and what is done."""

    def __init__(self, arguments: argparse.Namespace, seed: int):
        smoke = s.SMOKE if arguments.smoke else {}
        self.folder = arguments.out / f"seed_{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = s.Config(**smoke, seed=seed, out=str(self.folder), resume=True)
        self.lab = s.Lab(self.config)
        s.learn_demonstrations(self.lab)
        s.draw_preferences(self.lab, 1)
        self.accuracy = s.learn_score(self.lab, 1, 0) | s.learn_score(self.lab, 1, 1)

    def kept(self, name: str, make: Callable[[], dict]) -> dict:
        """The result of that name: read, or made and written."""
        path, began = self.folder / f"{name}.json", time.process_time()
        if not path.exists():
            path.write_text(json.dumps(make()), "utf-8")
            print(
                f"seed {self.config.seed}, {name}: {time.process_time() - began:.0f} s", flush=True
            )
        return json.loads(path.read_text("utf-8"))

    def run(self, name: str, lab: s.Lab | None = None, **changes) -> dict:
        """A PPO run's rows, its last answers' means, and its wins over the first policy."""
        lab = lab or self.lab

        def make() -> dict:
            run = s.ppo(lab, dataclasses.replace(lab.config, **changes), name.replace(" ", "_"))
            rows = [{k: row[k] for k in KEPT if k in row} for row in run.rows]
            return {"rows": rows} | self.answers(run.nets[0])

        return self.kept(name, make)

    def answers(self, policy) -> dict:
        rows, first = s.evaluate(self.lab, policy), s.evaluate(self.lab, self.lab.policy)
        return {"means": s.means(rows), "wins": win_rates(rows, first)}


def frontier(seed: Seed) -> dict:
    """The methods, and shaping over a grid of nu."""
    done = {"sft": seed.kept("sft", lambda: seed.answers(seed.lab.policy))}
    done |= {name: seed.run(name, method=name) for name in ("ppo", "ppo_lag", "gate")}
    done |= {f"nu {nu:g}": seed.run(f"nu {nu:g}", method="shaping", nu=nu) for nu in NUS}
    return done | {"fixed lambda": seed.run("fixed lambda", method="ppo_lag", lagrange_lr=0.0)}


def pairs_alone(seed: Seed) -> dict:
    """ppo_lag with a cost model that learned from pairs, without the sign terms."""
    lab, cost_loss = copy.copy(seed.lab), s.cost_loss
    lab.config = dataclasses.replace(seed.config, out=str(seed.folder / "pairs"))
    lab.scorers = dict(seed.lab.scorers)
    Path(lab.config.out).mkdir(exist_ok=True)
    s.cost_loss = lambda safer, unsafer, *signs: s.reward_loss(unsafer, safer)
    try:
        accuracy = s.learn_score(lab, 1, 1)
    finally:
        s.cost_loss = cost_loss
    run = seed.run("no sign terms", lab, method="ppo_lag")
    return {"no sign terms": run | {"accuracy": accuracy}}


def thresholds(seed: Seed) -> dict:
    """ppo_lag with other thresholds."""
    return {f"d {d}": seed.run(f"d {d}", method="ppo_lag", threshold=d) for d in THRESHOLDS}


def rounds(seed: Seed) -> dict:
    """Three rounds with red-teaming, in a folder of their own."""
    options = {"rounds": 3, "method": "ppo_lag", "out": str(seed.folder / "rounds")}
    config = dataclasses.replace(seed.config, **options)
    return {"rounds": seed.kept("rounds", lambda: {"rounds": s.train(config)["rounds"]})}


PARTS = {f.__name__: f for f in (frontier, pairs_alone, thresholds, rounds)}


# ----- Tables -------------------------------------------------------------------------------------


def claims(seeds: list[dict], threshold: float) -> dict:
    """Every figure, by claim; `seeds` holds each seed's runs by name."""
    found = {"answers": {}, "against ppo_lag": {}, "lambda": {}, "rounds": {}}
    for name in [name for name, run in seeds[0].items() if "means" in run]:
        runs = [seed[name] for seed in seeds]
        found["answers"][name] = {k: over([run["means"][k] for run in runs]) for k in KEYS}
        if name.startswith("nu"):
            pairs = [(seed["ppo_lag"]["means"], seed[name]["means"]) for seed in seeds]
            gain = over([best["helpfulness"] - own["helpfulness"] for best, own in pairs])
            kept = sum(own["cost_harm"] <= threshold for _, own in pairs)
            found["against ppo_lag"][name] = {"gain": gain, "feasible": kept}
        if "lambda_harm" in runs[0].get("rows", [{}])[-1]:
            lams = [[row["lambda_harm"] for row in run["rows"]] for run in runs]
            found["lambda"][name] = {"last": over([lam[-1] for lam in lams])}
            found["lambda"][name] |= {"least": over([min(lam) for lam in lams])}
    for i in range(3):
        rows = [seed["rounds"]["rounds"][i] for seed in seeds]
        keys = ("found", "unsafe_harm", "fresh", "helpfulness")
        found["rounds"][str(i + 1)] = {k: over([float(row[k]) for row in rows]) for k in keys}
    return found


def show(value: dict, percent: bool = False) -> str:
    """`2.80 ± 0.12`, or `12 ± 3 %`."""
    if percent:
        return f"{100 * value['mean']:.0f} ± {100 * value['half']:.0f} %"
    return f"{value['mean']:.2f} ± {value['half']:.2f}"


def table(result: dict) -> str:
    """The README's table: at most twelve rows; the result file has the others."""
    head, rows = ["", "helpfulness", "learned cost", "true cost", "unsafe", "refused"], []
    for title, name in ROWS.items():
        row = result["claims"]["answers"].get(name)
        if row:
            rows.append([title, *(show(row[key], key in KEYS[3:]) for key in KEYS)])
    return markdown(head, rows)


def draw(result: dict, path: Path) -> None:
    """The frontier, and lambda and cost of PPO-Lagrangian by update, a line a seed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, row in result["claims"]["answers"].items():
        x, y = row["true_harm"], row["helpfulness"]
        axes[0].errorbar(x["mean"], y["mean"], y["half"], x["half"], "C0.", lw=0.8)
        axes[0].annotate(name.replace("nu ", "ν "), (x["mean"], y["mean"]), fontsize=7)
    axes[0].set(xlabel="true cost", ylabel="true helpfulness")
    for seed in result["runs"]:
        rows = seed["ppo_lag"]["rows"]
        for axis, key in zip(axes[1:], ("lambda_harm", "batch_cost_harm"), strict=True):
            axis.plot([row["update"] for row in rows], [row[key] for row in rows], lw=0.9)
            axis.set(xlabel="update", title=key)
    axes[2].axhline(result["threshold"], color="k", lw=0.6)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Run the parts of the seeds that are not done; once all are, write the result."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("out/claims/safe_rlhf"), help="the runs")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="result, picture")
    parser.add_argument("--smoke", action="store_true", help="tiny, two seeds, to out/claims")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.seeds, arguments.results = [1, 2], Path("out/claims")
        arguments.out = arguments.out / "smoke"
    seeds = []
    for number in arguments.seeds:
        seed = Seed(arguments, number)
        seeds.append({"accuracy": seed.accuracy})
        for part in arguments.parts:
            seeds[-1] |= PARTS[part](seed)
    if set(arguments.parts) != set(PARTS):
        return
    threshold, accuracy = float(s.Config().threshold), [seed["accuracy"] for seed in seeds]
    result = {
        "command": "python tests/claims/safe_claims.py", "seeds": arguments.seeds,
        "threshold": threshold, "claims": claims(seeds, threshold),
        "accuracy": {k: over([row[k] for row in accuracy]) for k in accuracy[0]},
        "runs": seeds, "torch": torch.__version__, "python": sys.version,
        "script_sha256": s.hashlib.sha256(Path(s.__file__).read_bytes()).hexdigest(),
        "argv": ["tests/claims/safe_claims.py", *(sys.argv[1:] if argv is None else argv)],
    }  # fmt: skip
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / "safe_rlhf_claims.json"
    path.write_text(compact(result) + "\n", "utf-8")
    with contextlib.suppress(ImportError):
        draw(result, path.with_suffix(".png"))
    print(table(result))


if __name__ == "__main__":
    main()
