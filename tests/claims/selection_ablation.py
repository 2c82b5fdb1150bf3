"""Which selection matters, and how large a state: `python tests/claims/selection_ablation.py`.

The claims (section 4.6.2 of arXiv 2312.00752, tables 7 and 10): in language modelling delta is the
most important selective parameter and all three together are best; and a larger state buys a lower
perplexity where B and C are selective, and next to nothing where they are constant.

The paper's figures are perplexities of models of about 350M parameters on the Pile. Ours are bits a
byte on the documentation that ships with Python, of models 2,700 times smaller: not the size of an
effect is to be compared, but its direction and the order. All arms have mamba.py's recipe, and
nothing was tuned; every arm of a seed sees the same data in the same order. After 150 steps, with
seeds 1 to 3, no arm differed from another beyond the seeds; so 400 steps are the default, and fresh
seeds are reported. `--paper` has the recipe of the paper's 350M models, for your own --data: that
the ablation's models have just these sizes, and the paper's figures below, were not checked
against its text.
"""

import math
import time
from dataclasses import dataclass

from _claims import finish, mamba, markdown, mean_sd, model_of, parse, plus_minus, train_on_text


@dataclass(frozen=True)
class Settings:
    """Sizes of the model and of the run."""

    data: str = mamba.flag("", "as mamba.py's: text, or the documentation that ships with Python")
    tokenizer: str = mamba.flag("bpe:1024", "as mamba.py's")
    d_model: int = mamba.flag(64, "width; paper: 1,024")
    n_layer: int = mamba.flag(2, "layers; paper: 48")
    largest_state: int = mamba.flag(16, "d_state, and the second table's largest; paper: 16")
    steps: int = mamba.flag(400, "steps; paper: 13,500")
    batch: int = mamba.flag(4, "sequences a step; paper: 256, half a million tokens")
    length: int = mamba.flag(256, "tokens a sequence; paper: 2,048")
    lr: float = mamba.flag(4e-3, "peak learning rate; paper: 1.5e-3, five times GPT-3's 3e-4")
    eval_tokens: int = mamba.flag(0, "validation tokens, 0 for all")


PAPER = {"tokenizer": "gpt2", "d_model": 1024, "n_layer": 48, "steps": 13_500, "lr": 1.5e-3}
PAPER |= {"batch": 256, "length": 2048}
SMOKE = {"tokenizer": "byte", "d_model": 16, "largest_state": 2, "steps": 2, "batch": 2}
SMOKE |= {"length": 16, "eval_tokens": 300}

# The paper's perplexities, from memory of tables 7 and 10.
SUBSETS = {"": 10.93, "B": 10.15, "C": 9.98, "B,C": None, "delta": 9.81}
SUBSETS |= {"delta,B": None, "delta,C": None, "delta,B,C": 8.71}
STATES = {
    "delta": {1: 9.88, 2: 9.86, 4: 9.82, 8: 9.82, 16: 9.81},
    "delta,B,C": {1: 9.73, 2: 9.40, 4: 9.09, 8: 8.84, 16: 8.71},
}


def arms(largest: int) -> list[tuple[str, int]]:
    """(selective, d_state) of every arm; the largest state's are rows of both tables."""
    smaller = [n for n in STATES["delta"] if n < largest]
    first = [(subset, largest) for subset in SUBSETS]
    return first + [(kind, n) for kind in STATES for n in smaller]


def run_arm(s: Settings, selective: str, d_state: int, corpus: mamba.Corpus, seeds: list) -> dict:
    """One arm over the seeds."""
    parts, runs = tuple(filter(None, selective.split(","))), []
    for seed in seeds:
        model, config = model_of(s, corpus, seed, parts, d_state=d_state)
        train_on_text(model, corpus, config)
        runs.append(mamba.evaluate(model, corpus, config, s.eval_tokens))
    parameters = sum(p.numel() for p in model.parameters())
    arm = {"selective": selective, "d_state": d_state, "parameters": parameters}
    arm["bits_a_byte"] = mean_sd([scores["bits_a_byte"] for scores in runs])
    arm["perplexity_a_token"] = mean_sd([math.exp(scores["loss"]) for scores in runs])
    return arm


def table(result: dict) -> str:
    """The README's two tables."""
    found = {(arm["selective"], arm["d_state"]): arm for arm in result["arms"]}
    largest = result["settings"]["largest_state"]
    rows = []
    for subset, paper in SUBSETS.items():
        arm = found[subset, largest]
        ticks = ["yes" if name in subset.split(",") else "–" for name in ("delta", "B", "C")]
        ours = f"{arm['parameters']:,}", plus_minus(arm["bits_a_byte"], 3)
        rows.append([*ticks, *ours, f"{paper:.2f}" if paper else "–"])
    head = ["delta selective", "B", "C", "parameters", "ours, bits a byte", "paper, perplexity"]
    first, rows = markdown(head, rows, left=3), []
    for n in [n for n in STATES["delta"] if n <= largest]:
        paper = [f"{STATES[kind][n]:.2f}" for kind in STATES]
        ours = [plus_minus(found[kind, n]["bits_a_byte"], 3) for kind in STATES]
        rows.append([str(n), *ours, *paper])
    head = ["d_state", "B and C constant, bits a byte", "all selective, bits a byte"]
    head += ["paper, constant", "paper, selective"]
    return first + "\n\n" + markdown(head, rows, left=0)


def draw(result: dict, plt, path) -> None:
    """A bar for each subset and a curve for each kind over the state's size; dots are seeds."""
    done, largest = result["arms"], result["settings"]["largest_state"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    subsets = [arm for arm in done if arm["d_state"] == largest]
    names = [
        arm["selective"].replace("delta", "Δ").replace(",", ", ") or "nothing" for arm in subsets
    ]
    left.barh(names, [arm["bits_a_byte"]["mean"] for arm in subsets], color="C0", alpha=0.6)
    for i, arm in enumerate(subsets):
        left.plot(arm["bits_a_byte"]["each"], [i] * len(arm["bits_a_byte"]["each"]), "k.", ms=4)
    each = [value for arm in done for value in arm["bits_a_byte"]["each"]]
    left.set(xlim=(min(each) - 0.05, max(each) + 0.02))
    left.set(xlabel="validation bits a byte", ylabel="selective")
    left.invert_yaxis()
    for kind, label in ("delta", "B and C constant"), ("delta,B,C", "all selective"):
        line = sorted(
            (arm for arm in done if arm["selective"] == kind), key=lambda arm: arm["d_state"]
        )
        x, scores = [arm["d_state"] for arm in line], [arm["bits_a_byte"] for arm in line]
        means, sds = [b["mean"] for b in scores], [b["sd"] for b in scores]
        right.errorbar(x, means, sds, fmt="o-", ms=4, capsize=3, label=label)
    right.set_xscale("log", base=2)
    right.set(xlabel="d_state", ylabel="validation bits a byte")
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Run every arm, write the result file and the picture, print the tables."""
    s, asked = parse(__doc__, Settings, PAPER, SMOKE, argv)
    began, done = time.perf_counter(), []
    corpus = mamba.load_corpus(s.data, s.tokenizer)
    for selective, d_state in arms(s.largest_state):
        done.append(run_arm(s, selective, d_state, corpus, asked.seeds))
        took, score = time.perf_counter() - began, plus_minus(done[-1]["bits_a_byte"], 3)
        print(f"{took:5.0f} s  {selective or 'nothing'}, d_state {d_state}: {score}", flush=True)
    content = {"tokens_seen": s.steps * s.batch * s.length, "arms": done}
    print(table(finish("selection_ablation", asked, s, began, content, draw)))


if __name__ == "__main__":
    main()
