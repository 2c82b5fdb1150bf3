"""What Constrained RLHF claims, on templated small talk: `python tests/claims/constrained_rlhf.py`.

Over seeds, with constrained_ppo.py's default settings but for 60 updates a run, to keep it short (arXiv 2310.04373 has
GPT-2 on DailyDialog, 100 updates, 5 seeds):
1. a single reward without KL is overoptimised: the true metric rises, then falls, while the reward goes on rising;
2. correlated rewards: the joint proxy point is another one than each reward's own;
3. the six methods at the joint proxy point: do they keep to it, and what is the true metric at the end? Also ppo_sat
   with the squares of the batch's mean rewards in place of each reply's, since of a 0 or 1 reward the latter is linear;
4. trained three times longer, which of ppo and xi_ppo holds?
5. thresholds 10 % lower and higher, and each reward's own;
6. nelder_mead's single run against the two steps, single-reward runs and then xi_ppo;
7. beyond the paper: diversity maximised under the same constraints, by mu_ppo with another objective.
ppo and ppo_sat are tuned on seed 0, which is not reported, with the updates that finding the proxy point takes, two
runs each: of --targets, the KL a token that the coefficient adapts to. A seed that is done is kept in --out and not
done again. Writes results/constrained_rlhf.json, which the README's tables come from, and a picture beside it. About 7
minutes a seed on one core.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import constrained_ppo as c  # noqa: E402

KEPT = ("update", "evaluation", "kl", "distinct", "tokens_a_reply", "meteor", "intent", "m_meteor", "m_intent")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # Student's, by n


def quiet(*_, **__) -> None:
    """Print nothing."""


def arm(task: c.Task, name: str, method: str, updates: int, thresholds=(), weights=(), **changes) -> dict:
    """One run: its rows, and the diversity of its last replies."""
    task.config, before = dataclasses.replace(task.config, **changes), task.config
    run = c.Run(task, name, method, updates, thresholds, weights).go(quiet)
    task.config = before
    rows = [{k: round(v, 4) for k, v in row.items() if k in KEPT} for row in run.rows]
    result = {"rows": rows, "thresholds": [*thresholds], "samples": run.texts[:4]}
    result["diversity"] = statistics.mean(c.diversity_reward([], run.texts, [], []))
    if run.search:
        result["searched"] = run.search.found
    print(f"{name}: evaluation {end(result, 'evaluation'):.3f}", flush=True)
    return result


def of_means(rewards: torch.Tensor, thresholds: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """-sum a_i (mean r_i - theta_i)^2, to first order in each reply's rewards (B, N), as a reward (B,)."""
    return -2 * (weights * (rewards.mean(0) - thresholds) * rewards).sum(-1)


def end(run: dict, key: str, upto: int | None = None) -> float:
    """The mean of a run's last four evaluations, up to an update: the iterates swing."""
    rows = [row for row in run["rows"] if upto is None or row["update"] <= upto]
    return statistics.mean(row[key] for row in rows[-4:])


def start(arguments: argparse.Namespace, seed: int, target: float) -> tuple[c.Task, dict]:
    """The first step of a seed: pi_0, the single-reward runs, the proxy points."""
    flags = {"updates": arguments.updates, "single_updates": arguments.updates, "eval_every": arguments.eval_every}
    flags |= c.SMOKE if arguments.smoke else {}
    config = c.Config(**flags, seed=seed, out=str(arguments.out / f"constrained_rlhf_{seed}"), kl_target=target)
    task = c.prepare(config, torch.device("cpu"), quiet)
    singles, points = c.proxy_points(task, print)
    runs = {run.name: arm(task, run.name, "ppo_no_kl", run.updates, weights=run.weights.tolist()) for run in singles}
    return task, points | {"runs": runs}


def tune(arguments: argparse.Namespace) -> dict[str, float]:
    """The KL target of ppo and of ppo_sat that is best on seed 0."""
    task, points = start(arguments, 0, arguments.targets[0])
    best = {}
    for method in ("ppo", "ppo_sat"):
        tried = {
            target: arm(task, f"{method}_{target}", method, task.config.updates, points["joint"], kl_target=target)
            for target in arguments.targets
        }
        best[method] = max(tried, key=lambda target: end(tried[target], "evaluation"))
    return best


def one_seed(arguments: argparse.Namespace, seed: int, targets: dict[str, float]) -> dict:
    """Every run of a seed."""
    began = time.perf_counter()
    task, found = start(arguments, seed, targets["ppo"])
    theta, runs, short = found["joint"], found["runs"], task.config.updates
    runs["ppo"] = arm(task, "ppo", "ppo", 3 * short, theta)
    runs["xi_ppo"] = arm(task, "xi_ppo", "xi_ppo", 3 * short, theta)
    runs["mu_ppo"] = arm(task, "mu_ppo", "mu_ppo", short, theta)
    runs["all_ppo"] = arm(task, "all_ppo", "all_ppo", short, theta)
    runs["ppo_sat"] = arm(task, "ppo_sat", "ppo_sat", short, theta, kl_target=targets["ppo_sat"])
    per_reply, c.saturated_reward = c.saturated_reward, of_means
    runs["ppo_sat, means"] = arm(task, "ppo_sat_means", "ppo_sat", short, theta, kl_target=targets["ppo_sat"])
    c.saturated_reward = per_reply
    runs["ppo_no_kl"] = arm(task, "ppo_no_kl", "ppo_no_kl", short, theta)
    runs["nelder_mead"] = arm(task, "nelder_mead", "nelder_mead", 2 * short)
    runs["xi_ppo, 10 % lower"] = arm(task, "lower", "xi_ppo", short, [0.9 * t for t in theta])
    runs["xi_ppo, 10 % higher"] = arm(task, "higher", "xi_ppo", short, [1.1 * t for t in theta])
    runs["xi_ppo, each reward's own"] = arm(task, "separate", "xi_ppo", short, found["separate"])
    other = {"reward": "meteor,intent,diversity", "objective": "diversity"}
    task = c.Task(dataclasses.replace(task.config, **other), task.device)
    saved = torch.load(Path(task.config.out) / "start.pt", weights_only=True)
    task.policy.load_state_dict(saved["policy"])
    task.classifier.load_state_dict(saved["classifier"])
    task.policy.requires_grad_(False)
    runs["mu_ppo for diversity"] = arm(task, "diversity", "mu_ppo", short, theta)
    return found | {"seed": seed, "short": short, "wall_seconds": round(time.perf_counter() - began, 1)}


def over(seeds: list[dict], value) -> dict:
    """Mean over the seeds and half the width of its 95 % interval by Student's t, and each seed's value."""
    each = [value(seed) for seed in seeds]
    n = len(each)
    half = T_95[n] * statistics.stdev(each) / math.sqrt(n) if n > 1 else 0.0
    return {"mean": statistics.mean(each), "half": half, "each": each}


def peak(run: dict, key: str = "evaluation") -> float:
    """The value of key where the mean of three evaluations in a row is highest."""
    rows = run["rows"]
    i = max(range(len(rows) - 2), key=lambda i: sum(row["evaluation"] for row in rows[i : i + 3]))
    return statistics.mean(row[key] for row in rows[i : i + 3])


def tokens(run: dict, batch: int) -> float:
    """Tokens written in training, from the replies' length at the evaluations."""
    return run["rows"][-1]["update"] * batch * statistics.mean(row["tokens_a_reply"] for row in run["rows"])


def claims(seeds: list[dict], batch: int) -> dict:
    """Every figure of the README, by claim."""
    short, names = seeds[0]["short"], ("meteor", "intent")
    arms = ("ppo_no_kl", "ppo", "ppo_sat", "ppo_sat, means", "all_ppo", "mu_ppo", "xi_ppo")
    found = {"overoptimisation": {}, "proxy points": {}, "methods": {}, "longer": {}, "thresholds": {}}
    for name in names:
        single = f"only_{name}"
        found["overoptimisation"][single] = {
            "pi_0": over(seeds, lambda s, k=single: s["runs"][k]["rows"][0]["evaluation"]),
            "peak": over(seeds, lambda s, k=single: peak(s["runs"][k])),
            "end": over(seeds, lambda s, k=single: end(s["runs"][k], "evaluation")),
            "reward at the peak": over(seeds, lambda s, k=single, n=name: peak(s["runs"][k], n)),
            "reward at the end": over(seeds, lambda s, k=single, n=name: end(s["runs"][k], n)),
            "KL at the peak": over(seeds, lambda s, k=single: peak(s["runs"][k], "kl")),
            "KL at the end": over(seeds, lambda s, k=single: end(s["runs"][k], "kl")),
        }
    for i, name in enumerate(names):
        found["proxy points"][name] = {
            "joint": over(seeds, lambda s, i=i: s["joint"][i]),
            "separate": over(seeds, lambda s, i=i: s["separate"][i]),
            "difference": over(seeds, lambda s, i=i: s["joint"][i] - s["separate"][i]),
        }
    for name in arms:
        found["methods"][name] = {"evaluation": over(seeds, lambda s, k=name: end(s["runs"][k], "evaluation", short))}
        for i, reward in enumerate(names):
            off = over(seeds, lambda s, k=name, i=i, r=reward: end(s["runs"][k], r, short) / s["joint"][i] - 1)
            found["methods"][name][f"{reward} from its threshold"] = off
        found["methods"][name]["KL"] = over(seeds, lambda s, k=name: end(s["runs"][k], "kl", short))
    for name in ("ppo", "xi_ppo"):
        for label, upto in ((f"{short} updates", short), (f"{3 * short} updates", 3 * short)):
            found["longer"][f"{name}, {label}"] = over(
                seeds, lambda s, k=name, u=upto: end(s["runs"][k], "evaluation", u)
            )
        change = over(seeds, lambda s, k=name: end(s["runs"][k], "evaluation") - end(s["runs"][k], "evaluation", short))
        found["longer"][f"{name}, change"] = change
    for name in ("xi_ppo", "xi_ppo, 10 % lower", "xi_ppo, 10 % higher", "xi_ppo, each reward's own"):
        found["thresholds"][name] = over(seeds, lambda s, k=name: end(s["runs"][k], "evaluation", short))
    two_steps = [*(f"only_{name}" for name in names), "xi_ppo"]
    found["nelder_mead"] = {
        "evaluation": over(seeds, lambda s: end(s["runs"]["nelder_mead"], "evaluation")),
        "of two steps": over(seeds, lambda s: end(s["runs"]["xi_ppo"], "evaluation", short)),
        "tokens": over(seeds, lambda s: tokens(s["runs"]["nelder_mead"], batch)),
        "tokens of two steps": over(
            seeds, lambda s: sum(tokens(s["runs"][k], batch) / (3 if k == "xi_ppo" else 1) for k in two_steps)
        ),
        "best thresholds": [max(s["runs"]["nelder_mead"]["searched"], key=lambda p: p[1])[0] for s in seeds],
    }
    found["diversity"] = {}
    for name in ("mu_ppo", "mu_ppo for diversity", "ppo_no_kl"):
        row = {"diversity": over(seeds, lambda s, k=name: s["runs"][k]["diversity"])}
        for i, reward in enumerate(names):
            off = over(seeds, lambda s, k=name, i=i, r=reward: end(s["runs"][k], r) / s["joint"][i] - 1)
            row[f"{reward} from its threshold"] = off
        found["diversity"][name] = row | {"evaluation": over(seeds, lambda s, k=name: end(s["runs"][k], "evaluation"))}
    return found


def show(value, digits: int = 3, sign: str = "") -> str:
    """`0.280 ± 0.012`."""
    return f"{value['mean']:{sign}.{digits}f} ± {value['half']:.{digits}f}"


def tables(found: dict) -> dict[str, str]:
    """The README's tables, by claim."""

    def from_thresholds(row: dict) -> list[str]:
        return [f"{100 * v['mean']:+.0f} ± {100 * v['half']:.0f} %" for k, v in row.items() if "threshold" in k]

    def table(head: str, rows: list[list[str]]) -> str:
        lines = [head.split(" | "), ["---"] + ["---:"] * head.count(" | "), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    parts = {}
    head = "only | metric of pi_0 | best | at the end | reward, at the best | at the end | KL, best | at the end"
    rows = [[k.removeprefix("only_"), *map(show, row.values())] for k, row in found["overoptimisation"].items()]
    parts["overoptimisation"] = table(head, rows)
    rows = [
        [name, show(row["joint"]), show(row["separate"]), show(row["difference"], sign="+")]
        for name, row in found["proxy points"].items()
    ]
    parts["proxy_points"] = table("reward | joint proxy point | its own | difference", rows)
    off = "METEOR from its threshold | intent from its threshold"
    rows = [
        [name, show(row["evaluation"]), *from_thresholds(row), show(row["KL"])]
        for name, row in found["methods"].items()
    ]
    parts["methods"] = table(f"method | metric at the end | {off} | KL a token", rows)
    rows = [[k, show(v, sign="+" if "change" in k else "")] for k, v in found["longer"].items()]
    parts["longer"] = table("trained longer | metric at the end", rows)
    rows = [[k, show(v)] for k, v in found["thresholds"].items()]
    parts["thresholds"] = table("thresholds | metric at the end", rows)
    row = found["nelder_mead"]
    rows = [["nelder_mead, one run", show(row["evaluation"]), f"{row['tokens']['mean']:,.0f}"]]
    rows.append(["two steps", show(row["of two steps"]), f"{row['tokens of two steps']['mean']:,.0f}"])
    parts["nelder_mead"] = table("thresholds found by | metric at the end | tokens", rows)
    rows = [
        [name, show(row["diversity"]), *from_thresholds(row), show(row["evaluation"])]
        for name, row in found["diversity"].items()
    ]
    parts["diversity"] = table(f"run | diversity | {off} | metric", rows)
    return parts


def thin(seed: dict) -> dict:
    """A seed for the result file: of each run's rows what is drawn, as columns."""
    runs = {}
    for name, run in seed["runs"].items():
        columns = {key: [row[key] for row in run["rows"]] for key in ("update", "evaluation", "kl", "meteor", "intent")}
        runs[name] = run | {"rows": columns}
    return seed | {"runs": runs}


def draw(seeds: list[dict], path: Path) -> None:
    """Overoptimisation by update and by KL, the plane with the proxy points, and the methods, all seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(17, 4), layout="constrained")
    for seed in seeds:
        for i, name in enumerate(("meteor", "intent")):
            rows, first = seed["runs"][f"only_{name}"]["rows"], seed is seeds[0]
            updates, metric = [row["update"] for row in rows], [row["evaluation"] for row in rows]
            axes[0].plot(updates, metric, color=f"C{i}", lw=1, label=f"metric, only {name}" if first else None)
            axes[0].plot(updates, [row[name] for row in rows], ":", color=f"C{i}", lw=1, label=name if first else None)
            axes[1].plot(
                [r["kl"] for r in rows], metric, ".", ms=3, color=f"C{i}", label=f"only {name}" if first else None
            )
            axes[2].plot([r["meteor"] for r in rows], [r["intent"] for r in rows], ".", ms=2, color=f"C{i}")
        axes[2].plot(*seed["joint"], "k*", ms=11, label="joint proxy point" if first else None)
        axes[2].plot(*seed["separate"], "kx", ms=8, label="each reward's own" if first else None)
        for i, name in enumerate(("ppo", "xi_ppo")):
            rows = seed["runs"][name]["rows"]
            label = name if first else None
            axes[3].plot(
                [r["update"] for r in rows], [r["evaluation"] for r in rows], lw=1, color=f"C{i + 2}", label=label
            )
    axes[0].set(xlabel="update", title="a single reward, no KL")
    axes[1].set(xlabel="KL a token", ylabel="metric", title="the same against KL")
    axes[2].set(xlabel="METEOR", ylabel="intent", title="the same, rewards")
    axes[3].set(xlabel="update", ylabel="metric", title="trained three times longer")
    for axis in axes:
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Tune, run the seeds that are not done, write the result file and the picture, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="default: 1 2 3 4 5")
    parser.add_argument("--updates", type=int, default=60, help="PPO updates of a run (default: 60)")
    parser.add_argument("--eval-every", type=int, default=3, help="updates between evaluations (default: 3)")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.1, 0.3], help="KL targets tried on seed 0")
    parser.add_argument("--out", type=Path, default=Path("out/claims"), help="folder for the runs")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for result and picture")
    parser.add_argument("--smoke", action="store_true", help="tiny runs: does it work?")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths = {what: arguments.out / f"constrained_rlhf_{what}.json" for what in ("tuned", *arguments.seeds)}
    if not paths["tuned"].is_file():
        c.write_json(paths["tuned"], tune(arguments))
    targets = json.loads(paths["tuned"].read_text("utf-8"))
    for seed in arguments.seeds:
        if not paths[seed].is_file():
            c.write_json(paths[seed], one_seed(arguments, seed, targets))
    seeds = [json.loads(paths[seed].read_text("utf-8")) for seed in arguments.seeds]
    config = c.Config(eval_every=arguments.eval_every, updates=arguments.updates, single_updates=arguments.updates)
    result = {"command": "python tests/claims/constrained_rlhf.py", "seeds": arguments.seeds, "kl_targets": targets}
    result |= {"claims": claims(seeds, config.batch), "runs": [*map(thin, seeds)]}
    result |= c.result_record(config, torch.device("cpu"), wall_seconds=sum(seed["wall_seconds"] for seed in seeds))
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "constrained_rlhf.json").write_text(json.dumps(result) + "\n", "utf-8")
    draw(seeds, arguments.results / "constrained_rlhf.png")
    print("\n\n".join(tables(result["claims"]).values()))


if __name__ == "__main__":
    main()
