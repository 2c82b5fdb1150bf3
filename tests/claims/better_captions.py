"""What the DALL-E 3 report says of better captions, on drawn scenes: `python tests/claims/better_captions.py`.

Over seeds 1, 2, 3, with recaption.py's default settings, which were chosen on seed 0:
1. the captioner: attribute F1 and the share of what is said that is not so, of the base and of the two fine-tunes, and
   both of the spatial words apart;
2. models trained on ground truth, on 95 % short and on 95 % descriptive captions, drawing from ground-truth and from
   descriptive prompts: CLIP score, and binding of colour to shape;
3. the blend: 0, 65, 80, 90, 95, 100 % descriptive captions, on both kinds of prompts;
4. prompt upsampling on and off, on the models of ground truth and of 95 % descriptive captions, judged against the
   brief prompt that the user wrote.
Each figure is a mean over seeds with its 95 % interval by Student's t, and beside 2 to 4 the differences between arms,
seed by seed. Every stage and every seed that is done is kept in --out and not done again, so that the program can be
run in pieces. Writes results/better_captions.json, which the README's tables come from, and a picture beside it.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import recaption as r  # noqa: E402

BLEND = ("ground_truth", *(f"descriptive:{percent}" for percent in (65, 80, 90, 95, 100)))
ARMS = (*BLEND, "short:95")
UPSAMPLED = ("ground_truth", "descriptive:95")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # Student's, by n


def one_seed(arguments: argparse.Namespace, seed: int) -> dict:
    """Captioners' and models' scores of a seed: from --out, where they are, or found now."""
    out, began = arguments.out / f"better_captions_{seed}", time.perf_counter()
    sizes = r.SMOKE if arguments.smoke else {}
    config = r.Config(**sizes, seed=seed, out=str(out), arms=",".join(ARMS), resume=True)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "device", "resume", "smoke")}
    if (out / "scores.json").is_file():
        found = json.loads((out / "scores.json").read_text("utf-8"))
        differing = [k for k, v in settings.items() if found["settings"].get(k) != v]
        r.require(not differing, f"{out}: made with other {', '.join(differing)}; move it away, or give another --out")
        return found
    work = r.Pipeline(config)
    found = {"settings": settings, "captioners": r.score_captioners(work), "real": r.score_reader(work)}
    found["arms"] = {}
    for arm in ARMS:
        work.config = dataclasses.replace(config, arms=arm)
        file = out / f"scores_{arm.replace(':', '_')}.json"
        if not file.is_file():
            styles = r.PROMPTS if arm in UPSAMPLED else r.PROMPTS[:2]
            r.write_json(file, r.score_arms(work, styles)[0][arm])
        found["arms"][arm] = json.loads(file.read_text("utf-8"))
        found["device"] = r.result_record(config, work.device)["device"]
    r.write_json(out / "scores.json", found | {"wall_seconds": round(time.perf_counter() - began, 1)})
    return found


def over(seeds: list[dict], value) -> dict | None:
    """Mean over the seeds and half the width of its 95 % interval by Student's t, and each seed's value; or None."""
    each = [value(seed) for seed in seeds]
    if None in each:
        return None
    n = len(each)
    half = T_95[n] * statistics.stdev(each) / math.sqrt(n) if n > 1 else 0.0
    return {"mean": statistics.mean(each), "half": half, "each": [round(x, 5) for x in each]}


def claims(seeds: list[dict]) -> dict:
    """Every figure, by claim."""

    def figures(arms, styles, names=("clip", "binding", "shape", "colour", "texture", "place", "relation", "count")):
        table = {}
        for arm in arms:
            for style in styles:
                row = {k: over(seeds, lambda s, a=arm, t=style, k=k: s["arms"][a][t][k]) for k in names}
                less = {
                    k: over(seeds, lambda s, a=arm, t=style, k=k: s["arms"][a][t][k] - s["arms"][arms[0]][t][k])
                    for k in ("clip", "binding")
                }
                table[f"{arm}, {style}"] = row | {f"{k}, less {arms[0]}": v for k, v in less.items()}
        return table

    names = (
        "f1",
        "hallucinated",
        "spatial_f1",
        "spatial_hallucinated",
        "shape",
        "colour",
        "binding",
        "images_a_second",
    )
    captioners = {
        style: {k: over(seeds, lambda s, t=style, k=k: s["captioners"][t][k]) for k in names}
        for style in seeds[0]["captioners"]
    }
    found = {"captioner": captioners}
    found["caption kind"] = figures(("ground_truth", "short:95", "descriptive:95"), ("ground_truth", "descriptive"))
    found["blend"] = figures(BLEND, ("ground_truth", "descriptive"))
    found["upsampling"] = figures(UPSAMPLED, ("brief", "upsampled"))
    for arm in UPSAMPLED:
        found["upsampling"][f"{arm}, upsampled less brief"] = {
            k: over(seeds, lambda s, a=arm, k=k: s["arms"][a]["upsampled"][k] - s["arms"][a]["brief"][k])
            for k in ("clip", "binding")
        }
    names = ("shape", "colour", "texture", "binding", "relation", "count", "clip")
    found["real images"] = {k: over(seeds, lambda s, k=k: s["real"][k]) for k in names}
    return found


def show(found: dict) -> str:
    """The figures as text, `mean +- half`."""
    lines = []
    for claim, rows in found.items():
        lines.append(f"\n{claim}")
        rows = rows if "clip" not in rows else {"": rows}
        for name, row in rows.items():
            cells = [f"{k} {v['mean']:.3f} ± {v['half']:.3f}" for k, v in row.items() if v]
            lines.append(f"  {name}: " + " · ".join(cells))
    return "\n".join(lines)


def draw(found: dict, path: Path) -> None:
    """CLIP score and binding by the share of descriptive captions, both kinds of prompts, with intervals."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed; pip install matplotlib")
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    shares = [0 if arm == "ground_truth" else int(arm.partition(":")[2]) for arm in BLEND]
    for axis, name in zip(axes, ("clip", "binding"), strict=True):
        for style in ("ground_truth", "descriptive"):
            row = [found["blend"][f"{arm}, {style}"][name] for arm in BLEND]
            axis.errorbar(
                shares,
                [v["mean"] for v in row],
                [v["half"] for v in row],
                marker="o",
                capsize=3,
                label=f"{style} prompts",
            )
        axis.set(title=name, xlabel="descriptive captions, %")
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    """Run what is not done yet, then write and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one set of runs each")
    parser.add_argument("--out", type=Path, default=Path("out/claims"), help="where finished runs are kept")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for result and picture")
    parser.add_argument("--smoke", action="store_true", help="tiny, in seconds: does it run? Writes to --out alone")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.seeds, arguments.results = [1, 2], arguments.out
    arguments.results.mkdir(parents=True, exist_ok=True)
    seeds = [one_seed(arguments, seed) for seed in arguments.seeds]
    found = claims(seeds)
    base = r.result_record(r.Config(), r.pick_device("auto"))
    result = {"command": "python tests/claims/better_captions.py", "seeds": arguments.seeds, "claims": found}
    result |= {"settings": seeds[0]["settings"], "devices": sorted({seed["device"] for seed in seeds})}
    result |= {key: base[key] for key in ("versions", "script_sha256")}
    r.write_json(arguments.results / "better_captions.json", result)
    draw(found, arguments.results / "better_captions.png")
    print(show(found))
    return result


if __name__ == "__main__":
    main()
