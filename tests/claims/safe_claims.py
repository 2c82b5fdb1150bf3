"""What Safe RLHF claims, in safe_rlhf.py's invented world, by its default settings.

`python tests/claims/safe_claims.py`: PPO on the reward turns harmful; PPO-Lagrangian keeps to
the threshold, with at least the helpfulness of each fixed nu that keeps it; the cost model needs
its sign terms; three rounds with red-teaming; other thresholds; Llama 2's gate. All runs of a seed
start from one policy, and see as many answers. A run that is done is kept in --out and not done
again; --parts and --seeds choose among them. Once all are there, the result file is written.
"""

import argparse
import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

from _claims import compact, markdown, over, save_picture  # noqa: E402

import safe_rlhf as s  # noqa: E402

RUNS = {"ppo": {"method": "ppo"}, "ppo_lag": {"method": "ppo_lag"}, "gate": {"method": "gate"}}
for nu in (0.01, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0):
    RUNS[f"nu {nu:g}"] = {"method": "shaping", "nu": nu}
for d in ("0", "-2", "-3"):  # thresholds beside the default
    RUNS[f"d {d}"] = {"method": "ppo_lag", "threshold": d}
RUNS["fixed lambda"] = {"method": "ppo_lag", "lagrange_lr": 0.0}
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
        odds = (wins + wins.T) / (strength[:, None] + strength)
        strength = wins.sum(1) / odds.sum(1)
        strength /= strength[0]
    return 1000 + 400 * np.log10(strength)


# ----- Runs ---------------------------------------------------------------------------------------


class Seed:
    """A seed's folder: its lab, with the first policy and score models, and what is done."""

    def __init__(self, folder: Path, seed: int, smoke: bool):
        self.folder, sizes = folder, s.SMOKE if smoke else {}
        folder.mkdir(parents=True, exist_ok=True)
        self.config = s.Config(**sizes, seed=seed, out=str(folder), resume=True)
        self.lab = s.Lab(self.config)
        s.learn_demonstrations(self.lab)
        s.draw_preferences(self.lab, 1)
        self.accuracy = s.learn_score(self.lab, 1) | s.learn_score(self.lab, 1, "harm")

    def kept(self, name: str, make: Callable[[], dict]) -> dict:
        """The result of that name: read, or made and written."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(make()), "utf-8")
        return json.loads(path.read_text("utf-8"))

    def run(self, name: str, lab: s.Lab | None = None, **changes) -> dict:
        """A PPO run's rows, its last answers' means, and its wins over the first policy."""
        lab = lab or self.lab

        def make() -> dict:
            run = s.ppo(lab, dataclasses.replace(lab.config, **changes), name.replace(" ", "_"))
            rows = [{key: row[key] for key in KEPT if key in row} for row in run.rows]
            return {"rows": rows} | self.answers(run.nets[0])

        return self.kept(name, make)

    def answers(self, policy) -> dict:
        """The means of a policy's answers, and its wins over the first one."""
        rows, first = s.evaluate(self.lab, policy), s.evaluate(self.lab, self.lab.policy)
        return {"means": s.means(rows), "wins": win_rates(rows, first)}


def sweep(seed: Seed) -> dict:
    """The methods, shaping over a grid of nu, and ppo_lag with other thresholds."""
    first = seed.kept("sft", lambda: seed.answers(seed.lab.policy))
    return {"sft": first} | {name: seed.run(name, **changes) for name, changes in RUNS.items()}


def pairs_alone(seed: Seed) -> dict:
    """ppo_lag with a cost model that learned from pairs, without the sign terms."""
    lab, cost_loss = copy.copy(seed.lab), s.cost_loss
    lab.config = dataclasses.replace(seed.config, out=str(seed.folder / "pairs"))
    lab.scorers = dict(seed.lab.scorers)
    Path(lab.config.out).mkdir(exist_ok=True)
    s.cost_loss = lambda safer, unsafer, *signs: s.reward_loss(unsafer, safer)
    try:
        accuracy = s.learn_score(lab, 1, "harm")
    finally:
        s.cost_loss = cost_loss
    run = seed.run("no sign terms", lab, method="ppo_lag")
    return {"no sign terms": run | {"accuracy": accuracy}}


def rounds(seed: Seed) -> dict:
    """Three rounds with red-teaming, in a folder of their own."""
    options = {"rounds": 3, "method": "ppo_lag", "out": str(seed.folder / "rounds")}
    config = dataclasses.replace(seed.config, **options)
    return {"rounds": seed.kept("rounds", lambda: {"rounds": s.train(config)["rounds"]})}


PARTS = {f.__name__: f for f in (sweep, pairs_alone, rounds)}


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


def draw(result: dict, plt):
    """The frontier, and lambda and cost of PPO-Lagrangian by update, a line a seed."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, row in result["claims"]["answers"].items():
        x, y = row["true_harm"], row["helpfulness"]
        axes[0].errorbar(x["mean"], y["mean"], y["half"], x["half"], "C0.", lw=0.8)
        axes[0].annotate(name.replace("nu ", "ν "), (x["mean"], y["mean"]), fontsize=7)
    axes[0].set(xlabel="true cost", ylabel="true helpfulness")
    for axis, key in zip(axes[1:], ("lambda_harm", "batch_cost_harm"), strict=True):
        for seed in result["runs"]:
            rows = seed["ppo_lag"]["rows"]
            axis.plot([row["update"] for row in rows], [row[key] for row in rows], lw=0.9)
        axis.set(xlabel="update", title=key)
    axes[2].axhline(result["threshold"], color="k", lw=0.6)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Run the parts of the seeds that are not done; once all are, write the result."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("out/claims/safe_rlhf"), help="the runs")
    parser.add_argument("--smoke", action="store_true", help="tiny, two seeds, to out/claims")
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv)
    results = HERE / "results"
    if arguments.smoke:
        arguments.seeds, results = [1, 2], Path("out/claims")
        arguments.out = arguments.out / "smoke"
    seeds = []
    for number in arguments.seeds:
        seed = Seed(arguments.out / f"seed_{number}", number, arguments.smoke)
        seeds.append({"accuracy": seed.accuracy})
        for part in arguments.parts:
            seeds[-1] |= PARTS[part](seed)
            print(f"seed {number}: {part} is done", flush=True)
    if set(arguments.parts) != set(PARTS):
        return
    threshold, accuracy = float(s.Config().threshold), [seed["accuracy"] for seed in seeds]
    result = {
        "command": " ".join(["python tests/claims/safe_claims.py", *argv]),
        "seeds": arguments.seeds, "threshold": threshold, "claims": claims(seeds, threshold),
        "accuracy": {k: over([row[k] for row in accuracy]) for k in accuracy[0]},
        "runs": seeds, "torch": torch.__version__, "python": sys.version,
        "script_sha256": s.hashlib.sha256(Path(s.__file__).read_bytes()).hexdigest(),
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    path = results / "safe_rlhf_claims.json"
    path.write_text(compact(result) + "\n", "utf-8")
    save_picture(lambda plt: draw(result, plt), path.with_suffix(".png"))
    print(table(result))


if __name__ == "__main__":
    main()
