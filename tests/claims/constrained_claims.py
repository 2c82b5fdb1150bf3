"""What Constrained RLHF claims, in a small world: `python tests/claims/constrained_claims.py`.

In the correlated world (--flattery 0.6) and the independent one (0), over seeds, beside the exact
optimum (arXiv 2310.04373 has GPT-2 on DailyDialog, 5 seeds, and only plots):
1. a single reward without KL is overoptimised: the judge rises, then falls, the reward goes on;
2. thresholds: the proxy point of these runs, and Nelder and Mead's search within one run;
3. every method at the thresholds found, with both mixes; PPO with equal weights and with the best
   that were found for it;
4. the same at other thresholds: the proxy point, and those of the exact optimum.
PPO's KL coefficients and weights, SETTINGS, are those that the exact table says are the best, for
equal weights and for weights of at least 0. A run that is done is kept in --out and not done again.
Writes results/constrained_rlhf.json and a picture. About 5 minutes a seed and world on one core.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

from _claims import compact, over  # noqa: E402

import constrained_ppo as c  # noqa: E402

WORLDS = {"correlated": 0.6, "independent": 0.0}
SETTINGS = {  # of PPO: coefficient and weights that are the best by the exact table
    "correlated": {"ppo": (0.33, "1,1"), "ppo, tuned": (0.083, "0,1")},
    "independent": {"ppo": (0.079, "1,1"), "ppo, tuned": (0.043, "0.67,1")},
}


def one_seed(arguments: argparse.Namespace, world: str, seed: int) -> dict:
    """Every run of a seed in a world."""
    path = arguments.out / f"{world}_{seed}.json"
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    began = time.perf_counter()
    out = arguments.out / f"{world}_{seed}"
    out.mkdir(parents=True, exist_ok=True)
    options = {"thresholds": "", "out": str(out), "resume": True, "device": "cpu"}
    options |= c.SMOKE if arguments.smoke else {}
    config = c.Config(flattery=WORLDS[world], seed=seed, **options)
    task = c.Task(config)
    reference = c.first_policy(config, task, torch.device("cpu"))

    def train(name: str, **changes) -> None:
        """One run: its evaluations as columns, and what its search found."""
        changed = dataclasses.replace(config, **changes)
        run = c.train(changed, name.replace(", ", "_").replace(" ", "_"), task, reference)
        runs[name] = {"found": run.found, "thresholds": run.thresholds.tolist()}
        for key in ("update", "judge", "kl", "rewards"):
            runs[name][key] = [row[key] for row in run.rows]

    short, runs = {"method": "ppo_no_kl", "updates": config.updates // 2}, {}
    for name, weights in ("only polite", "1,0"), ("only facts", "0,1"), ("only sum", "1,1"):
        train(name, weights=weights, **short)
    columns = [[x for run in runs.values() for x in run[key]] for key in ("rewards", "judge")]
    points = {"proxy": c.proxy_point(*map(c.np.array, columns))}
    train("nelder_mead", method="xi_ppo", thresholds="search", updates=3 * config.updates)
    points["search"] = max(runs["nelder_mead"]["found"], key=lambda pair: pair[1])[0]
    points["optimum"] = c.exact_optimum(c.count_table(WORLDS[world]), -4.0)["rewards"]
    theta = {name: ",".join(f"{x:.4f}" for x in point) for name, point in points.items()}
    for name, (coefficient, weights) in SETTINGS[world].items():
        train(name, method="ppo", kl_coefficient=coefficient, weights=weights)
    for method in arguments.methods:
        for mix in ("lagrangian", "paper"):
            train(f"{method}, {mix}", method=method, mix=mix, thresholds=theta["search"])
    for point in ("proxy", "optimum"):
        name = f"xi_ppo, lagrangian, theta of the {point}"
        train(name, method="xi_ppo", thresholds=theta[point])
    if arguments.sat:
        train("ppo_sat", method="ppo_sat", kl_coefficient=0.05, thresholds=theta["search"])
    seconds = round(time.perf_counter() - began, 1)
    result = {"world": world, "seed": seed, "runs": runs, "points": points, "seconds": seconds}
    path.write_text(json.dumps(result), "utf-8")
    return result


def end(column: list[float]) -> float:
    """The mean of a run's last four evaluations."""
    return statistics.mean(column[-4:])


def claims(seeds: list[dict]) -> dict:
    """Every figure of the tables, by world."""
    found, names = {}, ("polite", "facts")
    for world, flattery in WORLDS.items():
        some = [seed for seed in seeds if seed["world"] == world]
        if not some:
            continue
        methods, alone = {}, {}
        for name in some[0]["runs"]:
            runs = [seed["runs"][name] for seed in some]
            methods[name] = {"judge": over([end(run["judge"]) for run in runs])}
            for i, reward in enumerate(names):
                each = [[row[i] for row in run["rewards"]] for run in runs]
                methods[name][reward] = over([end(column) for column in each])
                if name == f"only {reward}":
                    alone[name] = {
                        "pi_0": over([run["judge"][0] for run in runs]),
                        "best": over([max(run["judge"]) for run in runs]),
                        "end": methods[name]["judge"],
                        "reward of pi_0": over([column[0] for column in each]),
                        "reward at the end": methods[name][reward],
                    }
        points = {}
        for name in some[0]["points"]:
            points[name] = [over([seed["points"][name][i] for seed in some]) for i in range(2)]
        xi, ppo = (methods[name]["judge"]["each"] for name in ("xi_ppo, lagrangian", "ppo, tuned"))
        table = c.count_table(flattery)
        found[world] = {
            "optimum": c.exact_optimum(table, -4.0),
            "optimum of weights above 0": c.exact_optimum(table, 0.0),
            "methods": methods,
            "alone": alone,
            "points": points,
            "ahead": over([x - p for x, p in zip(xi, ppo, strict=True)]),
        }
    return found


def show(value: dict, sign: str = "") -> str:
    """`0.280 ± 0.012`, of one seed without the interval."""
    half = f" ± {value['half']:.3f}" if len(value["each"]) > 1 else ""
    return f"{value['mean']:{sign}.3f}{half}"


def tables(found: dict) -> dict[str, str]:
    """The tables of tests/claims/README.md."""

    def table(head: str, rows: list[list[str]]) -> str:
        lines = [head.split(" | "), ["---"] + ["---:"] * head.count(" | "), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    alone, methods, points = [], [], []
    for world, part in found.items():
        for name, row in part["alone"].items():
            alone.append([f"{name}, {world}", *map(show, row.values())])
        for name, row in part["methods"].items():
            methods.append([f"{name}, {world}", *map(show, row.values())])
        for name in ("optimum", "optimum of weights above 0"):
            numbers = [part[name]["judge"], *part[name]["rewards"]]
            methods.append([f"exact {name}, {world}", *(f"{x:.3f}" for x in numbers)])
        ahead = show(part["ahead"], "+")
        methods.append([f"xi_ppo, lagrangian, less ppo, tuned, {world}", ahead, "", ""])
        for name, row in part["points"].items():
            points.append([f"{name}, {world}", *map(show, row)])
    head = "only | judge of pi_0 | best | at the end | reward of pi_0 | at the end"
    return {
        "overoptimisation": table(head, alone),
        "methods": table("at the end | judge | polite / 6 | facts / 6", methods),
        "thresholds": table("thresholds | polite / 6 | facts / 6", points),
    }


def draw(seeds: list[dict], found: dict, path: Path) -> None:
    """The judge by update in both worlds, all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ("only facts", "ppo", "ppo, tuned", "xi_ppo, paper", "xi_ppo, lagrangian")
    sizes = {"figsize": (6.5 * len(found), 4.5), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(1, len(found), **sizes)
    for axis, world in zip(axes[0], found, strict=True):
        for i, name in enumerate(names):
            runs = [seed["runs"][name] for seed in seeds if seed["world"] == world]
            for j, run in enumerate(runs):
                label = name if j == 0 else None
                axis.plot(run["update"], run["judge"], color=f"C{i}", lw=1, label=label)
        axis.axhline(found[world]["optimum"]["judge"], color="grey", ls="--", label="exact optimum")
        axis.set(title=f"{world} world", xlabel="update", ylabel="judge", ylim=(0, None))
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument("--worlds", nargs="+", default=[*WORLDS], choices=WORLDS)
    parser.add_argument("--methods", nargs="+", default=["xi_ppo", "mu_ppo", "all_ppo"])
    parser.add_argument("--sat", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("out/claims/constrained_rlhf"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--smoke", action="store_true", help="tiny, to out/claims: does it run?")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.seeds, arguments.results = [1, 2], Path("out/claims")
        arguments.out = arguments.out / "smoke"
    seeds = [one_seed(arguments, w, s) for s in arguments.seeds for w in arguments.worlds]
    result = {
        "claims": claims(seeds), "settings": SETTINGS, "seeds": arguments.seeds, "runs": seeds,
        "config": vars(c.Config()), "seconds": sum(seed["seconds"] for seed in seeds),
        "script_sha256": c.hashlib.sha256(Path(c.__file__).read_bytes()).hexdigest(),
        "torch": torch.__version__, "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "constrained_rlhf.json").write_text(compact(result) + "\n", "utf-8")
    draw(seeds, result["claims"], arguments.results / "constrained_rlhf.png")
    print("\n\n".join(tables(result["claims"]).values()))


if __name__ == "__main__":
    main()
