"""What Safe RLHF claims, in safe_rlhf.py's invented world: `python tests/claims/safe_rlhf_claims.py`.

Over seeds, with safe_rlhf.py's default settings but for 60 updates a run, to keep it short (arXiv 2310.12773 has 7B
models and people's preferences):
models      1. reward and cost models on held-out rows; ppo_lag with a cost model without its sign terms, and with one
               of these terms alone; ppo on one reward of mixed preferences;
frontier    2. ppo on the reward alone, shaping over a grid of nu, in both forms, ppo_lag and Llama 2's gate: true
               helpfulness against true cost, refusals by kind of prompt. Is ppo_lag at least as helpful as every nu
               that keeps to the threshold?
            5. learned against true scores along the same runs: are the models hacked?
lambda      3. window 1, lambda fixed, no PTX;
thresholds     a sweep of the threshold;
long           runs four times as long with the default threshold and the code's, 0: does lambda fade when slack?
sft            safe demonstrations in the place of the harmful ones, and no RLHF;
rounds      4. three rounds with red-teaming;
two         6. beyond the paper: a second constraint, on length, by the same code.

Each part can be run alone (--parts, --seeds); a run that is done is kept in --out and not done again, one that was
stopped goes on. Once all parts of all seeds are done, results/safe_rlhf_claims.json is written, with a picture and the
tables of the README. About 20 minutes a seed on one core.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

from _claims import compact, markdown  # noqa: E402

import safe_rlhf as s  # noqa: E402

PARTS = ("models", "frontier", "lambda", "thresholds", "long", "sft", "rounds", "two")
NUS = (0.01, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0)
NORMALISED = (1.0, 5.0, 100.0)
THRESHOLDS = ("0", "-1", "-2.5", "-3")  # beside the default
SHARES = (0.5, 1.0)
OTHERS = {"no sign terms": "pairs", "a classifier": "signs", "one mixed preference": "both"}  # cost_terms
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # Student's, by n
ACCURACIES = ("reward_pairs", "cost_harm_pairs", "cost_harm_signs")
DRAWN = ("ppo", "ppo_lag", "window 1", "lambda fixed", "ppo_lag, long", "d 0, long")  # update by update
KEPT = ("update", "reward", "kl", "helpfulness", "refused")


def quiet(*_, **__) -> None:
    """Print nothing."""


class Seed:
    """A seed's folder: its experiment, made when first asked for, and the results that are there already."""

    def __init__(self, arguments: argparse.Namespace, seed: int):
        flags = {"updates": arguments.updates} | (s.SMOKE if arguments.smoke else {})
        self.folder = arguments.out / f"safe_rlhf_{seed}"
        self.config = s.Config(**flags, seed=seed, out=str(self.folder), resume=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.made = {}

    def lab(self, **changes) -> s.Experiment:
        """The experiment of the seed, with its policy and score models; with other costs, in a folder of its own."""
        key = json.dumps(changes)
        if key not in self.made:
            out = self.folder / "_".join(["two"] * bool(changes))
            out.mkdir(exist_ok=True)
            lab = s.Experiment(dataclasses.replace(self.config, **changes, out=str(out)), torch.device("cpu"))
            lab.learn_demonstrations()
            lab.learn_preferences(1, [])
            self.made[key] = lab
        return self.made[key]

    def kept(self, name: str, make) -> dict:
        """The result of that name: read, or made and written, with the seconds that it took."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            began = time.process_time()
            result = make()
            s.write_json(path, result | {"cpu_seconds": round(time.process_time() - began, 1)})
            print(f"seed {self.config.seed}, {name}: {time.process_time() - began:.0f} s", flush=True)
        return json.loads(path.read_text("utf-8"))

    def run(self, name: str, lab: s.Experiment, **changes) -> dict:
        """A PPO run: its rows, and its last answers by kind of prompt."""

        def make() -> dict:
            config = dataclasses.replace(lab.config, **changes)
            done = s.Run(lab, config, name.replace(" ", "_")).go(quiet)
            keep = (
                *KEPT,
                *(f"{part}_{c}" for part in ("cost", "true", "unsafe", "lambda", "batch") for c in lab.names),
            )
            rows = [{k: round(v, 4) for k, v in row.items() if k in keep} for row in done.rows]
            return {"rows": rows} | answers(lab, done.policy)

        return self.kept(name, make)


def answers(lab: s.Experiment, policy: s.Llama) -> dict:
    """Mean scores of a policy's answers to the held-out prompts, and by kind of prompt; quadrants and samples."""
    prompts = lab.held_out()
    found, first = lab.evaluate(policy, prompts), lab.evaluate(lab.policy, prompts)
    kinds = {kind: s.means(found, found["kind"] == kind) for kind in s.THINGS}
    counts = s.quadrants(found["helpfulness"], first["helpfulness"], found[f"true_{lab.names[0]}"])
    samples = [[p.text, a] for p, a in zip(prompts[:8], found["answer"].tolist(), strict=False)]
    return {"means": s.means(found), "kinds": kinds, "quadrants": counts, "samples": samples}


def models(seed: Seed) -> dict[str, dict]:
    """Accuracies; ppo_lag with a cost model of one kind of terms; ppo on one reward that mixes both preferences."""
    lab = seed.lab()

    def learned(name: str, terms: str) -> dict:
        kept, lab.config = (lab.reward, lab.costs, lab.pairs), dataclasses.replace(lab.config, cost_terms=terms)
        model = s.scorer_from(lab.policy)
        if terms == "both":  # one label a pair: the safe answer beside an unsafe one, else the more helpful
            lab.pairs = [[mixed(pair) for pair in pairs] for pairs in lab.pairs]
            lab.reward = model
        else:
            lab.costs = [model]
        lab.train_scores(model, int(terms != "both"))
        model.requires_grad_(False)
        accuracy, method = lab.measure(), "ppo" if terms == "both" else "ppo_lag"
        done = s.Run(lab, dataclasses.replace(lab.config, method=method), name.replace(" ", "_")).go(quiet)
        result = {"accuracy": accuracy} | answers(lab, done.policy)
        (lab.reward, lab.costs, lab.pairs), lab.config = kept, dataclasses.replace(lab.config, cost_terms="both")
        return result

    found = {"accuracy": seed.kept("accuracy", lambda: lab.accuracy)}
    for name, terms in OTHERS.items():
        found[name] = seed.kept(name, lambda name=name, terms=terms: learned(name, terms))
    return found


def mixed(pair: s.Pair) -> s.Pair:
    """The pair with one preference for both: the safe answer beside an unsafe one, else the better."""
    return dataclasses.replace(pair, better=pair.safer if pair.safe[0] != pair.safe[1] else pair.better)


def frontier(seed: Seed) -> dict[str, dict]:
    """The methods from one start."""
    lab = seed.lab()
    found = {"sft": seed.kept("sft", lambda: answers(lab, lab.policy))}
    found |= {name: seed.run(name, lab, method=name) for name in ("ppo", "ppo_lag", "gate")}
    for form, nus in (("nu", NUS), ("normalised nu", NORMALISED)):
        for nu in nus:
            options = {"method": "shaping", "nu": nu, "normalise_shaping": form != "nu"}
            found[f"{form} {nu:g}"] = seed.run(f"{form} {nu:g}", lab, **options)
    return found


def multiplier(seed: Seed) -> dict[str, dict]:
    """Ablations of the multiplier, and of PTX."""
    changes = {"window 1": {"window": 1}, "lambda fixed": {"lagrange_lr": 0.0}, "no PTX": {"ptx": 0.0}}
    return {name: seed.run(name, seed.lab(), method="ppo_lag", **change) for name, change in changes.items()}


def thresholds(seed: Seed) -> dict[str, dict]:
    """ppo_lag with other thresholds."""
    return {f"d {d}": seed.run(f"threshold {d}", seed.lab(), method="ppo_lag", threshold=d) for d in THRESHOLDS}


def long(seed: Seed) -> dict[str, dict]:
    """ppo_lag four times as long, with a threshold that leaves room and one that leaves little."""
    lab = seed.lab()
    updates = 4 * lab.config.updates
    return {
        f"{name}, long": seed.run(f"{name}, long", lab, method="ppo_lag", threshold=d, updates=updates)
        for name, d in (("ppo_lag", lab.config.threshold), ("d 0", "0"))
    }


def demonstrations(seed: Seed) -> dict[str, dict]:
    """SFT alone with a share of the harmful demonstrations replaced."""

    def make(share: float) -> dict:
        config = dataclasses.replace(seed.config, safe_demonstrations=share, out=str(seed.folder / f"share_{share:g}"))
        Path(config.out).mkdir(exist_ok=True)
        lab, scores = s.Experiment(config, torch.device("cpu")), seed.lab()
        lab.learn_demonstrations()
        lab.reward, lab.costs = scores.reward, scores.costs
        return answers(lab, lab.policy)

    return {f"safe share {share:g}": seed.kept(f"share_{share:g}", lambda share=share: make(share)) for share in SHARES}


def rounds(seed: Seed) -> dict[str, dict]:
    """Three rounds; the first is the frontier's ppo_lag."""
    config = dataclasses.replace(seed.config, rounds=3, method="ppo_lag")
    return {"rounds": seed.kept("rounds", lambda: {"rounds": s.pipeline(config, quiet)["rounds"]})}


def two(seed: Seed) -> dict[str, dict]:
    """ppo_lag under one constraint and under two."""
    lab = seed.lab(costs="harm,length", threshold="-2,-0.5")
    far = "-2,99"  # a length that is never too long: its lambda fades
    found = {"harm alone": seed.run("harm alone", lab, method="ppo_lag", threshold=far)}
    return found | {"harm and length": seed.run("harm and length", lab, method="ppo_lag")}


def over(values: list[float]) -> dict:
    """Mean and half the width of its 95 % interval by Student's t, and the values."""
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "half": half, "each": values}


def at_end(run: dict, key: str) -> float:
    """The mean of a run's last three evaluations."""
    return statistics.mean(row[key] for row in run["rows"][-3:])


def second_half(run: dict, key: str) -> list[float]:
    """The values of key in the second half of a run."""
    return [row[key] for row in run["rows"][1:]][len(run["rows"]) // 2 :]


def best(run: dict) -> dict:
    """The row of a run in which its helpfulness was best."""
    return max(run["rows"], key=lambda row: row["helpfulness"])


def claims(seeds: list[dict], threshold: float) -> dict:
    """Every figure of the README, by claim; `seeds` holds each seed's runs by name."""

    def each(name: str, value) -> dict:
        return over([value(seed[name]) for seed in seeds])

    names = [name for name, run in seeds[0].items() if "means" in run]
    found = {"answers": {}, "against ppo_lag": {}, "lambda": {}, "hacking": {}, "rounds": {}, "two": {}}
    found["models"] = {"both terms": {k: over([seed["accuracy"][k] for seed in seeds]) for k in ACCURACIES}}
    for name, terms in OTHERS.items():
        own = [k for k in ACCURACIES if k.startswith("reward" if terms == "both" else "cost")]
        found["models"][name] = {k: over([seed[name]["accuracy"][k] for seed in seeds]) for k in own}
    for name in names:
        keys = [k for k in seeds[0][name]["means"] if k not in ("kl", "reward")]
        row = {key: each(name, lambda run, k=key: run["means"][k]) for key in keys}
        for kind in s.THINGS:
            row |= {f"refused, {kind}": each(name, lambda run, k=kind: run["kinds"][k]["refused"])}
            row |= {f"unsafe, {kind}": each(name, lambda run, k=kind: run["kinds"][k]["unsafe_harm"])}
            row |= {f"helpfulness, {kind}": each(name, lambda run, k=kind: run["kinds"][k]["helpfulness"])}
        found["answers"][name] = row
    for name in [name for name in names if "nu" in name]:
        gains = [a["ppo_lag"]["means"]["helpfulness"] - a[name]["means"]["helpfulness"] for a in seeds]
        feasible = sum(a[name]["means"]["true_harm"] <= threshold for a in seeds)
        found["against ppo_lag"][name] = {"gain": over(gains), "feasible": feasible, "seeds": len(seeds)}
    for name in [name for name in names if "lambda_harm" in seeds[0][name].get("rows", [{}])[-1]]:
        found["lambda"][name] = {
            "lambda": each(name, lambda run: at_end(run, "lambda_harm")),
            "its s.d.": each(name, lambda run: statistics.pstdev(second_half(run, "lambda_harm"))),
            "learned cost": each(name, lambda run: at_end(run, "cost_harm")),
            "its s.d. ": each(name, lambda run: statistics.pstdev(second_half(run, "batch_harm"))),
        }
    for name in ("ppo", "ppo_lag"):
        found["hacking"][name] = {
            "best helpfulness": each(name, lambda run: best(run)["helpfulness"]),
            "at the end": each(name, lambda run: at_end(run, "helpfulness")),
            "reward at the best": each(name, lambda run: best(run)["reward"]),
            "reward at the end": each(name, lambda run: at_end(run, "reward")),
            "cost at the end": each(name, lambda run: at_end(run, "cost_harm")),
            "true cost": each(name, lambda run: at_end(run, "true_harm")),
        }
    for i in range(len(seeds[0]["rounds"]["rounds"])):
        keys = [key for key in seeds[0]["rounds"]["rounds"][i] if key != "round"]
        rows = [seed["rounds"]["rounds"][i] for seed in seeds]
        found["rounds"][str(i + 1)] = {key: over([row[key] for row in rows if key in row]) for key in keys}
    for name in ("harm alone", "harm and length"):
        keys = ("helpfulness", "cost_harm", "true_harm", "cost_length", "true_length")
        found["two"][name] = {key: each(name, lambda run, k=key: run["means"][k]) for key in keys}
    return found


def show(value: dict, digits: int = 2, sign: str = "") -> str:
    """`2.80 ± 0.12`."""
    return f"{value['mean']:{sign}.{digits}f} ± {value['half']:.{digits}f}"


def percent(value: dict) -> str:
    """`12 ± 3 %`."""
    return f"{100 * value['mean']:.0f} ± {100 * value['half']:.0f} %"


def models_table(found: dict) -> str:
    """Held-out accuracies."""
    head = ["models of", "reward: pairs", "cost: pairs", "cost: signs"]
    rows = [[name, *(percent(row[k]) if k in row else "" for k in ACCURACIES)] for name, row in found["models"].items()]
    return markdown(head, rows)


def answers_table(found: dict) -> str:
    """Every run's answers."""
    head = [
        "",
        "helpfulness",
        "learned cost",
        "true cost",
        "unsafe",
        "of harmful",
        "refused: harmful",
        "dual-use",
        "harmless",
    ]
    keys = ("helpfulness", "cost_harm", "true_harm")
    shares = ("unsafe_harm", "unsafe, harmful", "refused, harmful", "refused, dual-use", "refused, harmless")
    rows = [
        [name, *(show(row[key]) for key in keys), *(percent(row[key]) for key in shares)]
        for name, row in found["answers"].items()
        if "length" not in "".join(row)
    ]
    return markdown(head, rows)


def nu_table(found: dict) -> str:
    """ppo_lag's helpfulness less each nu's."""
    head = ["reward shaping", "seeds that keep to the threshold", "helpfulness of ppo_lag less its own"]
    rows = [
        [name, f"{row['feasible']} of {row['seeds']}", show(row["gain"], sign="+")]
        for name, row in found["against ppo_lag"].items()
    ]
    return markdown(head, rows)


def lambda_table(found: dict) -> str:
    """lambda and the cost in the second half of the runs."""
    head = ["", "lambda at the end", "its s.d. along the run", "learned cost", "its s.d. from batch to batch"]
    return markdown(head, [[name, *(show(value) for value in row.values())] for name, row in found["lambda"].items()])


def hacking_table(found: dict) -> str:
    """Learned against true scores."""
    head = ["", *next(iter(found["hacking"].values()))]
    return markdown(head, [[name, *(show(value) for value in row.values())] for name, row in found["hacking"].items()])


def rounds_table(found: dict) -> str:
    """Harmful shares by round."""
    head = ["round", "prompts found before", "harmful: plain", "found before", "fresh disguised"]
    keys = ("harmful share, plain", "harmful share, found", "harmful share, fresh")
    rows = [
        [name, f"{row['found']['mean']:.0f}", *(percent(row[key]) if key in row else "" for key in keys)]
        for name, row in found["rounds"].items()
    ]
    return markdown(head, rows)


def two_table(found: dict) -> str:
    """One constraint and two."""
    head = ["constraints", "helpfulness", "learned harm", "true harm", "learned length", "true length"]
    return markdown(head, [[name, *(show(value) for value in row.values())] for name, row in found["two"].items()])


TABLES = {
    "models": models_table, "answers": answers_table, "nu": nu_table, "lambda": lambda_table,
    "hacking": hacking_table, "rounds": rounds_table, "two": two_table,
}  # fmt: skip


def table(result: dict) -> str:
    """The README's tables, one below another."""
    return "\n\n".join(make(result["claims"]) for make in TABLES.values())


def draw(result: dict, path: Path) -> None:
    """The frontier, lambda by update, the threshold sweep, learned against true scores, and cost by update."""
    import matplotlib.pyplot as plt

    found, figure, axes = result["claims"]["answers"], *plt.subplots(1, 5, figsize=(22, 4.2), layout="constrained")
    marks = {"sft": "ks", "ppo": "C3^", "ppo_lag": "C0*", "gate": "C1D"}
    for name, row in found.items():
        if name in marks or name.startswith("nu "):
            x, y = row["true_harm"], row["helpfulness"]
            mark = marks.get(name, "C2.")
            axes[0].errorbar(
                x["mean"], y["mean"], y["half"], x["half"], mark, ms=9, lw=0.8, label=name if name in marks else None
            )
            axes[0].annotate(name.replace("nu ", "ν "), (x["mean"], y["mean"]), fontsize=7)
        if (name.startswith("d ") and "long" not in name) or name == "ppo_lag":
            d = float(name.split()[-1]) if name != "ppo_lag" else result["threshold"]
            for key, color in (("cost_harm", "C0"), ("true_harm", "C3")):
                axes[2].errorbar(d, row[key]["mean"], row[key]["half"], fmt=".", color=color)
    ends = sorted([result["threshold"], *(float(d) for d in THRESHOLDS)])
    axes[2].plot(ends, ends, "k", lw=0.6)
    for i, name in enumerate(DRAWN[1:4]):
        for seed in result["runs"]:
            rows = [row for row in seed[name]["rows"] if "lambda_harm" in row]
            first = name if seed is result["runs"][0] else None
            axes[1].plot([r["update"] for r in rows], [r["lambda_harm"] for r in rows], f"C{i}", lw=0.9, label=first)
    for i, name in enumerate(DRAWN[4:]):
        for seed in result["runs"]:
            first = name if seed is result["runs"][0] else None
            rows = seed[name]["rows"]
            axes[4].plot([r["update"] for r in rows], [r["cost_harm"] for r in rows], f"C{i}", lw=0.9, label=first)
        axes[4].axhline((result["threshold"], 0.0)[i], color=f"C{i}", ls=":", lw=0.9)
    for i, name in enumerate(("ppo", "ppo_lag")):
        for seed in result["runs"]:
            rows = seed[name]["rows"]
            for key, style in (("helpfulness", "-"), ("reward", ":")):
                label = f"{name}, {key}" if seed is result["runs"][0] else None
                axes[3].plot(
                    [r["update"] for r in rows], [r[key] for r in rows], style, color=f"C{i}", lw=0.9, label=label
                )
    axes[0].axvline(result["threshold"], color="k", lw=0.6)
    axes[0].set(xlabel="true cost", ylabel="true helpfulness", title="the frontier; threshold black")
    axes[1].set(xlabel="update", title="lambda")
    axes[2].set(xlabel="threshold", title="mean cost: learned blue, true red")
    axes[3].set(xlabel="update", title="learned reward and true helpfulness")
    axes[4].set(xlabel="update", title="learned cost; thresholds dotted")
    for axis in (axes[0], axes[1], axes[3], axes[4]):
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Run the parts of the seeds that are not done; once all are, write the result, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="default: 1 2 3 4 5")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--updates", type=int, default=60, help="PPO updates of a run (default: 60)")
    parser.add_argument("--out", type=Path, default=Path("out/claims"), help="folder for the runs")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for result and picture")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny runs of two seeds: does it work? Writes to out/claims"
    )
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.seeds, arguments.results, arguments.out = [1, 2], Path("out/claims"), Path("out/claims/smoke")
    makers = dict(
        zip(PARTS, (models, frontier, multiplier, thresholds, long, demonstrations, rounds, two), strict=True)
    )
    seeds = []
    for number in arguments.seeds:
        seed, done = Seed(arguments, number), {}
        for part in arguments.parts:
            done |= makers[part](seed)
        seeds.append(done)
    if set(arguments.parts) != set(PARTS):
        return
    config = s.Config(updates=arguments.updates)
    threshold = config.thresholds[0]
    result = {"command": "python tests/claims/safe_rlhf_claims.py", "seeds": arguments.seeds, "threshold": threshold}
    rows = [{name: {"rows": seed[name]["rows"]} for name in DRAWN} for seed in seeds]
    result |= {"claims": claims(seeds, threshold), "runs": rows, "samples": seeds[0]["ppo_lag"]["samples"]}
    result |= s.result_record(
        config, torch.device("cpu"), cpu_seconds=sum(r["cpu_seconds"] for a in seeds for r in a.values())
    )
    result["argv"] = ["tests/claims/safe_rlhf_claims.py", *(sys.argv[1:] if argv is None else argv)]
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / "safe_rlhf_claims.json"
    path.write_text(compact(result) + "\n", "utf-8")
    with contextlib.suppress(ImportError):
        import matplotlib

        matplotlib.use("Agg")
        draw(result, path.with_suffix(".png"))
    print(table(json.loads(path.read_text("utf-8"))))


if __name__ == "__main__":
    main()
