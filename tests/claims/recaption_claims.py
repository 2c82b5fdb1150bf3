"""What the DALL-E 3 report says of better captions: `python tests/claims/recaption_claims.py`.

Over seeds 1, 2, 3, with recaption.py's default settings, which were chosen on seed 0: the
captioners; models trained on ground truth, on 95 % short and on 95 % descriptive captions, drawing
from ground-truth and from descriptive prompts; the blend of 65 to 100 % descriptive captions; and
prompt upsampling by the text model, judged against the brief prompt that the user wrote. Figures
are means with 95 % intervals by Student's t, and differences from ground truth seed by seed.

A finished stage or seed is kept in --out. `--arms ground_truth,descriptive:95` does the default run
alone and writes better_captions_default.json; all arms write better_captions_blend.json.
"""

import argparse
import dataclasses
import functools
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]

from _claims import over  # noqa: E402

import recaption as r  # noqa: E402

ARMS = "ground_truth,descriptive:65,descriptive:80,descriptive:90,descriptive:95,descriptive:100"
ARMS += ",short:95"


def one_seed(asked: argparse.Namespace, seed: int) -> dict:
    """The result of a seed, from --out if it is there, with the scores of upsampled prompts."""
    sizes = r.SMOKE if asked.smoke else {}
    out = asked.out / f"recaption_{seed}"
    config = r.Config(**sizes, seed=seed, out=str(out), arms=asked.arms)
    if not (out / "result.json").is_file():
        r.run_all(config)
    result = json.loads((out / "result.json").read_text("utf-8"))
    if result["config"]["arms"] != asked.arms:
        raise ValueError(f"{out}: made with --arms {result['config']['arms']}; give another --out")
    if not (out / "upsampled.json").is_file():
        (out / "upsampled.json").write_text(json.dumps(upsampling(config)), "utf-8")
    return result | {"upsampling": json.loads((out / "upsampled.json").read_text("utf-8"))}


def upsampling(config: r.Config) -> dict:
    """Scores, by the brief prompts, of what models draw from these and from upsampled ones."""
    data = r.draw_pictures(config, "data", config.scenes, config.clean)
    held_out = r.draw_pictures(config, "held out", config.prompts, config.prompts, data.scenes)
    captioners = r.train_captioners(config, data)  # these and the next are loaded
    text_model = r.train_text_model(config, captioners["descriptive"])
    new = functools.partial(r.CoCa, config, text_model.tokenizer)
    judge = r.train_coca(config, "judge", new, data, "descriptive", config.judge_steps)
    captions = {"ground_truth": list(data.captions["ground_truth"].values())}
    captions["descriptive"] = r.stage(config, "captions_descriptive", dict)
    latents, rng = r.Latents(data.images), random.Random(config.seed)
    brief = [r.describe(scene, "brief", rng) for scene in held_out.scenes]
    tokens = text_model.decoder.generate(text_model.encode(brief))
    prompts = {"brief": brief, "upsampled": text_model.tokenizer.decode(tokens)}
    found, x = {}, latents.encode(data.images)
    for arm in ("ground_truth", "descriptive:95"):
        painter, found[arm] = r.train_painter(config, arm, captions, text_model, x), {}
        for style, texts in prompts.items():
            noise, states = r.generator(config, "noise"), text_model.encode(texts)
            y = r.sample_latents(painter, states, x.shape[1:], 10, config.guidance, noise)
            found[arm][style] = r.score_images(judge, latents.decode(y), brief)
    return found


def claims(seeds: list[dict]) -> dict:
    """Every score over the seeds, and models' differences from the one of ground truth."""
    found = {"captioners": {}, "models": {}}
    for name, row in seeds[0]["captioners"].items():
        figures = {key: over([seed["captioners"][name][key] for seed in seeds]) for key in row}
        found["captioners"][name] = figures
    for part in ("models", "upsampling"):
        for arm, styles in seeds[0][part].items():
            for style in styles:
                rows = [seed[part][arm][style] for seed in seeds]
                base = [seed[part]["ground_truth"][style] for seed in seeds]
                figures = {key: over([row[key] for row in rows]) for key in rows[0]}
                for key in ("clip_score", "binding"):
                    less = [a[key] - b[key] for a, b in zip(rows, base, strict=True)]
                    figures[f"{key}, less ground_truth"] = over(less)
                found["models"][f"{arm}, {style}"] = figures
    return found


def main(argv: list[str] | None = None) -> dict:
    """Run what is not done yet, then write and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="a run each")
    parser.add_argument("--arms", default=ARMS, help="models, as recaption.py's --arms")
    parser.add_argument("--out", type=Path, default=Path("out/claims"), help="for finished runs")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="for the result")
    parser.add_argument("--smoke", action="store_true", help="tiny, written to --out: does it run?")
    asked = parser.parse_args(argv)
    if asked.smoke:
        asked.results = asked.out
    seeds = [one_seed(asked, seed) for seed in asked.seeds]
    result = {"command": f"python tests/claims/recaption_claims.py --arms {asked.arms}"}
    result |= {"seeds": asked.seeds, "claims": claims(seeds)}
    result |= {key: seeds[0][key] for key in ("device", "torch", "python", "script_sha256")}
    result["wall_seconds"] = [seed["wall_seconds"] for seed in seeds]
    result["settings"] = dataclasses.asdict(r.Config()) | {"out": ""}
    name = "better_captions_blend" if asked.arms == ARMS else "better_captions_default"
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (asked.results / f"{name}.json").write_text(text, "utf-8")
    for part in result["claims"].values():
        for row, figures in part.items():
            cells = [f"{k} {v['mean']:.3f} ± {v['half']:.3f}" for k, v in figures.items() if v]
            print(f"{row}: " + " · ".join(cells))
    return result


if __name__ == "__main__":
    main()
