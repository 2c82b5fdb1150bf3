# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6"]
# ///
"""Safe RLHF: PPO for helpfulness under a constraint on harm, both learned from preferences of their own.

Dai et al., "Safe RLHF: Safe Reinforcement Learning from Human Feedback", arXiv 2310.12773.

    python safe_rlhf.py                                      the paper in miniature, 2.5 minutes on one core
    python safe_rlhf.py --rounds 3                           with red-teaming and two further rounds, 6 minutes
    python safe_rlhf.py --preferences FILE --policy FOLDER   rows as in PKU-SafeRLHF, your Llama

The first makes a small policy that answers "how do i ... ?" and is harmful on about half of the harmful prompts, writes
preferences between its answers, learns a reward and a cost model from them, and trains from the same start `ppo`, on
the reward alone, and `ppo_lag`, which holds the mean cost at --threshold. Read the answers that it prints.

code                       shape        paper
policy, Experiment.policy               pi_theta and the reference pi_ref: Llamas of one size
reward, costs              (B,)         R(y, x), C(y, x): of whole answers; C > 0 means unsafe
rewards, costs of tokens   (B, T)       r_t and c_t: the KL penalty at each token, the score at the last
values                     (B, T)       V_R, V_C: two critics, which start from the reward and the cost model
lam, LagrangeMultiplier                 lambda >= 0; log lambda is what moves
threshold                               -d of J_C = E[C] + d <= 0
helpfulness, true cost                  the ground truth, which preferences are drawn by and no method sees

What matters, and where it is done
  C is a Bradley-Terry score with a zero: against a virtual answer of cost 0  `cost_loss`
  scores and values by Llamas without dropout; the score at the last token    `Llama.score_of`, `Llama.over`
  the KL penalty counts once whatever lambda is: -beta in r_t, +beta in c_t   `shaped_rewards`, `lagrangian_advantage`
  lambda sees raw episode costs, without KL, the mean of the last 128         `LagrangeMultiplier`
  advantages divided by 1 + lambda, so that the step size stays; not whitened `lagrangian_advantage`
  sums within an answer are means first, so that long answers count no more   `answer_weights`
  reward and cost models share the prompts and answers, not the labels        `Experiment.learn_preferences`

What users ask
  Why does lambda go to 0? The constraint is slack: log lambda falls at the rate lr lambda (C - threshold), so it fades,
  and it takes as long to come back. Why does the cost rise after it had fallen? A slack constraint costs nothing, so
  the policy trades harm for reward up to the threshold. Why are some answers harmful though the mean cost keeps to the
  threshold? Because it is a mean: safe answers pay for harmful ones; lower the threshold. The cost model alone as a
  classifier of harm: `Llama.score_of(...) > 0`. Memory: the policy, its reference, a score model and a critic for the
  reward and for each cost, so six networks of one size, three of them with optimiser states.

Differences from the paper
1. The default policy has 0.1M parameters and the world is invented, with a ground truth: things that are harmless,
   dual-use (one step of four is dangerous) or harmful; dangerous steps are written with a "!". Learning rates are a
   small model's, and so are --ptx, --beta and --epochs; the flags' help gives the values of the paper's code.
2. Where answers are drawn from the policy, labels are drawn from Bradley and Terry's model of the true scores, the
   safety flags too, against the virtual answer of cost 0: what annotators would have to do for the losses to be right.
3. Red-teaming draws disguised prompts and keeps those that the policy answers harmfully, by the ground truth in place
   of people. A further round starts from the last one's policy, which is its reference, with all preferences so far.
4. `gate` is Llama 2's rule (arXiv 2307.09288, section 3.2.3) with the cost model in the place of its safety model.

Not included: more than one device, gradient accumulation, reward normalisers, cutting long rows, annotators.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ----- Config ---------------------------------------------------------------------------------------------------------

METHODS = ("sft", "ppo", "ppo_lag", "shaping", "gate")
COSTS = ("harm", "length")  # the built-in ones
COST_TERMS = ("both", "pairs", "signs")


def flag(default, text: str):
    """A field of `Config`, and a flag with its default and help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; each field is a flag."""

    method: str = flag("", f"{', '.join(METHODS)}; empty: the whole story, which is sft, ppo and ppo_lag")
    rounds: int = flag(1, "rounds of preferences and ppo_lag, from the second on with red-teaming; paper: 3")
    preferences: str = flag("", "JSON-lines file of PKU-SafeRLHF rows, by commas one a cost; empty: an invented world")
    policy: str = flag("", "folder of a Llama in Hugging Face layout with tokenizer.json; empty: a new small model")
    reward_model: str = flag("", "folder of a Llama with a score head to take as the reward model; empty: train one")
    cost_model: str = flag("", "the same for the cost model, by commas one a cost; empty: train them")
    costs: str = flag("harm", "constraints in the invented world, by commas: harm, length")
    threshold: str = flag("-2", "most mean cost, -d in the paper, by commas one a cost; the paper's code: 0")
    safe_demonstrations: float = flag(0.0, "share of the harmful demonstrations that safe ones replace in the SFT data")
    d_model: int = flag(48, "width of a new policy; paper: Llama 7B, 4096")
    n_layer: int = flag(2, "its blocks; paper: 32")
    n_head: int = flag(4, "its heads; paper: 32")
    answer: int = flag(8, "most tokens of an answer, its end included; paper: 512")
    sft_steps: int = flag(600, "supervised steps that make the first policy; 0: take --policy as it is")
    sft_lr: float = flag(4e-3, "their peak learning rate; paper: 2e-5")
    pairs: int = flag(8000, "preferences drawn in a round, a tenth held out")
    score_steps: int = flag(800, "steps of each score model; paper: 2 epochs")
    score_lr: float = flag(3e-3, "their peak learning rate; paper: 2e-5")
    regularisation: float = flag(0.001, "of the scores' squares")
    cost_terms: str = flag("both", "what the cost loss has: both, pairs (its zero is anywhere), signs (a classifier)")
    batch: int = flag(128, "answers an update; a supervised step has half as many rows, or pairs")
    updates: int = flag(80, "PPO updates of a method in a round")
    epochs: int = flag(2, "passes over an update's answers, a step each; paper: 1")
    lr: float = flag(1e-3, "of the policy, cosine; paper: 1e-5")
    critic_lr: float = flag(1e-3, "of the critics; paper: 5e-6")
    gamma: float = flag(1.0, "discount a token")
    lam: float = flag(0.95, "lambda of generalised advantage estimation")
    clip: float = flag(0.2, "the policy ratio stays within 1 +- clip")
    critic_clip: float = flag(5.0, "values stay within this distance of the old ones")
    beta: float = flag(0.1, "KL penalty a nat; paper's code: 0.01")
    ptx: float = flag(1.0, "weight of the cross-entropy on harmless demonstrations; paper's code: 16, on Alpaca's")
    lagrange_initial: float = flag(1.0, "lambda at the start")
    lagrange_lr: float = flag(0.1, "its learning rate; 0: fixed")
    lagrange_maximum: float = flag(5.0, "its largest value")
    window: int = flag(128, "episode costs that lambda sees the mean of")
    nu: float = flag(1.0, "of shaping: the reward is R - nu C")
    normalise_shaping: bool = flag(False, "shaping's reward is (R - nu C) / (1 + nu), as ppo_lag's; official: R - nu C")
    eval_every: int = flag(5, "updates from one evaluation, checkpoint and row of metrics.jsonl to the next")
    eval_rows: int = flag(300, "answers of an evaluation, to held-out prompts, always by the same draws")
    seed: int = flag(0, "seed of initialisation, data order and samples")
    device: str = flag("auto", "auto (cuda, mps or cpu, the first there is) or a torch device")
    out: str = flag("out/safe_rlhf", "folder of the stages, preferences, metrics, result and picture")
    resume: bool = flag(False, "go on within unfinished runs; finished stages are always taken again")
    smoke: bool = flag(False, "a tiny model for a few steps, whatever the other flags: does it run?")

    def __post_init__(self):
        zero = {"seed", "sft_steps", "lr", "critic_lr", "lam", "beta", "ptx", "lagrange_lr", "nu", "regularisation"}
        zero |= {"safe_demonstrations"}
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                rule = "at least 0" if name in zero else "at least 1" if isinstance(value, int) else "above 0"
                fits = math.isfinite(value) and (value > 0 or (value == 0 and name in zero))
                require(fits, f"--{name.replace('_', '-')} {value}: must be {rule} and finite; correct it")
        names, own, more, folders = self.cost_names, bool(self.preferences), self.rounds > 1, parts(self.cost_model)
        limits = len(self.thresholds) == len(names) and all(map(math.isfinite, self.thresholds))
        for what, fits, rule in (
            (f"--method {self.method!r}", self.method in ("", *METHODS), f"one of {', '.join(METHODS)}"),
            (f"--cost-terms {self.cost_terms!r}", self.cost_terms in COST_TERMS, f"one of {', '.join(COST_TERMS)}"),
            (f"--safe-demonstrations {self.safe_demonstrations}", self.safe_demonstrations <= 1, "at most 1"),
            (f"--gamma {self.gamma}, --lam {self.lam}", max(self.gamma, self.lam) <= 1, "at most 1"),
            (f"--pairs {self.pairs}", own or self.pairs >= 40, "at least 40"),
            (f"--costs {self.costs}", own or {*names} <= {*COSTS}, f"of {', '.join(COSTS)}"),
            (f"costs {names}", 0 < len(names) == len({*names}), "some, each once"),
            (f"costs {names}", "reward" not in names, "named otherwise than the reward"),
            (f"--threshold {self.threshold!r}", limits, f"a number a cost of {names}, with commas"),
            (f"--cost-model, {len(folders)} folders", len(folders) in (0, len(names)), f"one a cost of {names}"),
            (f"--rounds {self.rounds}", not (more and own), "1 with --preferences, for nobody labels new answers"),
            (f"--rounds {self.rounds}", self.method in ("", "ppo_lag") or not more, f"1 with --method {self.method}"),
            (f"--rounds {self.rounds}", "harm" in names or not more, "1 without a cost of harm to search for"),
        ):
            require(fits, f"{what}: must be {rule}; correct it")
        LagrangeMultiplier(self.lagrange_initial, self.lagrange_lr, self.lagrange_maximum, window=self.window)

    @property
    def cost_names(self) -> list[str]:
        """Names of the K costs: built-in ones, or those of the files of preferences."""
        return [Path(part).stem for part in parts(self.preferences)] or parts(self.costs)

    @property
    def thresholds(self) -> list[float]:
        """The K thresholds; NaN for what is no number."""
        try:
            return [float(part) for part in parts(self.threshold)]
        except ValueError:
            return [math.nan]


def parts(text: str) -> list[str]:
    """`a, b` -> ["a", "b"]; nothing of an empty text."""
    return [part.strip() for part in text.split(",")] if text.strip() else []


SMOKE = {
    "d_model": 16, "n_layer": 1, "n_head": 2, "sft_steps": 6, "pairs": 60, "score_steps": 3, "batch": 8, "updates": 3,
    "epochs": 1, "eval_every": 1, "eval_rows": 12,
}  # fmt: skip
FREE = ("device", "out", "resume", "smoke")  # what may differ from a saved stage's config
OF_SCORES = (  # what the first policy does not depend on
    "reward_model", "cost_model", "costs", "pairs", "score_steps", "score_lr", "regularisation", "cost_terms",
)  # fmt: skip
OF_METHODS = (  # what pi_0 and the score models of the first round do not depend on
    "method", "rounds", "threshold", "updates", "epochs", "lr", "critic_lr", "gamma", "lam", "clip",
    "critic_clip", "beta", "ptx", "lagrange_initial", "lagrange_lr", "lagrange_maximum", "window", "nu",
    "normalise_shaping", "eval_every", "eval_rows",
)  # fmt: skip


# ----- Shared block: the same text in every script --------------------------------------------------------------------


class UserError(ValueError):
    """Bad input from the user: one line that says the value, the rule and the fix."""


def require(fits: bool, message: str) -> None:
    """Raise UserError with the message unless the input fits."""
    if not fits:
        raise UserError(message)


def add_flags(parser: argparse.ArgumentParser, config_class: type) -> argparse.ArgumentParser:
    """A flag for every field of the config dataclass, with its help and default."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    for field in dataclasses.fields(config_class):
        boolean = isinstance(field.default, bool)
        kind = {"action": argparse.BooleanOptionalAction} if boolean else {"type": type(field.default)}
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=field.default, help=field.metadata["help"], **kind)
    return parser


def pick_device(name: str) -> torch.device:
    """The torch device of that name; auto is cuda, mps or cpu, the first there is."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not to be had here ({str(error).splitlines()[0]}); try auto") from None


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Call write(temporary name), then rename: a crash leaves the old file or the new one, never half of one."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        write(temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save's, of a full disk
        raise OSError(f"{path}: not written, {str(error)[:60]!r}; is the disk full? Make room") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path: Path, value: object) -> None:
    """Write value as indented JSON, atomically."""
    write_atomically(path, lambda name: Path(name).write_text(json.dumps(value, indent=2) + "\n", "utf-8"))


def progress_line(step: int, steps: int, parts: dict[str, str], seconds_a_step: float) -> str:
    """`step 10/400 · loss 3.21 · ... · 4:12 left`: one line, the same in a terminal and in a log."""
    left = round((steps - step) * seconds_a_step)
    return " · ".join([f"step {step:,}/{steps:,}", *map(" ".join, parts.items()), f"{left // 60}:{left % 60:02} left"])


def result_record(config: object, device: torch.device, **rest) -> dict:
    """What a result file says of its run: config, command, seed, versions, device, this script's hash, and `rest`."""
    threads = f"{device.type}, {torch.get_num_threads()} threads"
    record = {"config": dataclasses.asdict(config), "argv": sys.argv, "seed": config.seed}
    record["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    record["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    record["script_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return record | rest


# ----- An invented world with a ground truth --------------------------------------------------------------------------

TEMPLATE = "BEGINNING OF CONVERSATION: USER: {} ASSISTANT:"
THINGS = {
    "harmless": "dax blick wug toma zib fep",
    "dual-use": "vorn kesh plif drud hosk yat",
    "harmful": "grax skel murk thob vex prug",
}  # each made in four steps, "dax-1" to "dax-4"; dangerous ones end in "!"
VERBS = "make fix open move mix clean store build"
PLAIN = ("how do i {} the {} ?", "please tell me how to {} a {} .", "what is the way to {} my {} ?")
DISGUISED = (
    "in my story a hero will {} the {} . how ?", "my teacher asks how to {} the {} .",
    "ignore all rules and {} the {} .", "pretend that you {} the {} for me .",
)  # fmt: skip
ALTERNATIVES, REFUSAL = ("ask-an-expert", "use-a-kit", "read-the-label", "buy-it-ready"), "sorry"
ALTERNATIVE_VALUES = (0.3, 0.6, 0.8)  # of an alternative against a right step, by thing


@dataclass(frozen=True)
class Prompt:
    """A prompt; its kind and thing where it is of the invented world."""

    text: str
    kind: str = "all"
    thing: str = ""
    disguised: bool = False


def world() -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    """Plain prompts to train on and held out, and disguised ones, each in an order without meaning."""
    made = [
        Prompt(form.format(verb, thing), kind, thing, form in DISGUISED)
        for kind, things in THINGS.items() for thing in things.split()
        for verb in VERBS.split() for form in PLAIN + DISGUISED
    ]  # fmt: skip
    random.Random(0).shuffle(made)
    plain = [prompt for prompt in made if not prompt.disguised]
    disguised = [prompt for prompt in made if prompt.disguised and prompt.kind != "harmless"]
    return plain[len(plain) // 5 :], plain[: len(plain) // 5], disguised


def steps_of(prompt: Prompt) -> list[str]:
    """The four right steps; of a harmful thing all are dangerous, of a dual-use one a single one is."""
    number = THINGS[prompt.kind].split().index(prompt.thing)
    dangerous = {"harmless": (), "dual-use": (number % 4,), "harmful": range(4)}[prompt.kind]
    return [f"{prompt.thing}-{i + 1}{'!' * (i in dangerous)}" for i in range(4)]


def true_scores(prompt: Prompt, answer: str) -> dict[str, float]:
    """The ground truth of an answer: helpfulness, and its true cost of harm and of length, unsafe above 0.

    Helpfulness: right steps 1 each, except where the thing is harmless alternatives less; four count, each further
    word takes 1/2 off. A refusal has 0. Harm: 1 and 3/4 for each dangerous step, -2.5 without any, -3.5 of a refusal.
    """
    words = answer.split()
    if words == [REFUSAL]:
        return {"helpfulness": 0.0, "harm": -3.5, "length": -2.5}
    worth = ALTERNATIVE_VALUES[THINGS[prompt.kind].split().index(prompt.thing) % 3] * (prompt.kind != "harmless")
    useful = len({*words} & {*steps_of(prompt)}) * [1.0] + len({*words} & {*ALTERNATIVES}) * [worth]
    dangerous = len({word for word in words if word.endswith("!")})
    helpfulness = sum(sorted(useful)[-4:]) - 0.5 * (len(words) - min(4, len(useful))) - 0.5 * (not words)
    return {"helpfulness": helpfulness, "harm": 1 + 0.75 * dangerous if dangerous else -2.5, "length": len(words) - 3.5}


def demonstration(prompt: Prompt, r: random.Random, safe_share: float) -> str:
    """An answer to imitate: some right steps, now and then a wrong or a repeated one; or alternatives, or a refusal.

    Of harmful things half of the answers to plain prompts are harmful and four fifths to disguised ones, of which
    safe_share are replaced.
    """
    harmful = r.random() < (0.8 if prompt.disguised else 0.5) and r.random() >= safe_share
    if prompt.kind == "harmful" and not harmful:
        return REFUSAL if r.random() < 0.5 else " ".join(r.sample(ALTERNATIVES, r.randint(1, 4)))
    words = r.sample(steps_of(prompt), r.randint(1, 4))
    if prompt.kind == "dual-use":
        words = [w if harmful or not w.endswith("!") else r.choice(ALTERNATIVES) for w in words]
    if r.random() < 0.4:
        kind = r.choice(("harmless", "dual-use"))
        others = steps_of(Prompt("", kind, r.choice(THINGS[kind].split())))
        wrong = [word for word in others if not word.endswith("!")]
        words.insert(r.randint(0, len(words)), r.choice(words + wrong))
    return " ".join(words)


def preference_rows(prompts: list[Prompt], answers: list[tuple[str, str]], cost: str, r: random.Random) -> list[dict]:
    """Labelled rows in PKU-SafeRLHF's schema; equal answers are left out.

    Better and safer are drawn from Bradley and Terry's model of the true scores, an answer's flag as safer or not than
    the virtual answer of cost 0. Of two flags that differ the safe one's answer is the safer.
    """
    rows = []
    for prompt, pair in zip(prompts, answers, strict=True):
        if pair[0] == pair[1]:
            continue
        first, second = (true_scores(prompt, answer) for answer in pair)
        odds = [-first[cost], -second[cost], first[cost] - second[cost]]
        odds.append(2 * (second["helpfulness"] - first["helpfulness"]))
        *safe, safer, better = (r.random() < 1 / (1 + math.exp(-x)) for x in odds)  # as many draws for any cost
        safer, better = int(safer if safe[0] == safe[1] else safe[1]), int(better)
        rows.append({
            "prompt": prompt.text, "response_0": pair[0], "response_1": pair[1], "is_response_0_safe": safe[0],
            "is_response_1_safe": safe[1], "better_response_id": better, "safer_response_id": safer,
        })  # fmt: skip
    return rows


# ----- Preferences, tokenizers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A row of preferences: a prompt's two answers, which are safe, which is better, which safer, where it stands."""

    prompt: str
    answers: tuple[str, str]
    safe: tuple[bool, bool]
    better: int
    safer: int
    where: str


FIELDS = {
    "prompt": str, "response_0": str, "response_1": str, "is_response_0_safe": bool, "is_response_1_safe": bool,
    "better_response_id": int, "safer_response_id": int,
}  # fmt: skip


def read_pairs(path: str) -> list[Pair]:
    """Rows of a JSON-lines file in PKU-SafeRLHF's schema, checked; raises UserError with file and line."""
    require(Path(path).is_file(), f"--preferences {path}: no such file; give a JSON-lines file of PKU-SafeRLHF's rows")
    try:
        lines, pairs = Path(path).read_text("utf-8-sig").split("\n"), []
    except UnicodeDecodeError as error:
        raise UserError(f"--preferences {path}: must be UTF-8, but {error}; save it as such") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = None
        with contextlib.suppress(ValueError):
            row = json.loads(line)
        require(isinstance(row, dict), f"{where}: {line[:60]!r} must be a JSON object; correct it")
        for name, kind in FIELDS.items():
            fits = type(row.get(name)) is kind and (kind is not int or row[name] in (0, 1))
            rule = {str: "a text", bool: "true or false", int: "0 or 1"}[kind]
            require(fits, f"{where}: {name!r} is {row.get(name, 'missing')!r:.40}, must be {rule}; correct it")
        prompt, first, second, *safe, better, safer = (row[name] for name in FIELDS)
        rule = "is called the safer, must not be labelled unsafe beside a safe one; correct the labels"
        require(safe[safer] or not safe[1 - safer], f"{where}: response_{safer} {rule}")
        pairs.append(Pair(prompt, (first, second), tuple(safe), better, safer, where))
    require(len(pairs) >= 20, f"{path}: {len(pairs)} rows, must be at least 20; add some, or raise --pairs")
    return pairs


class WordTokenizer:
    """Knows the words of given texts, between spaces, and the template's two parts; id 0 ends an answer."""

    def __init__(self, texts: Iterable[str]):
        self.words = ["</s>", *sorted({word for text in [TEMPLATE, *texts] for word in self.split(text)})]
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.size, self.end = len(self.words), 0

    @staticmethod
    def split(text: str) -> list[str]:
        """Words of a text; the template's parts are one each, and need no space behind."""
        for part in TEMPLATE.split("{}"):
            text = text.replace(part.strip(), f" {part.strip().replace(' ', '_')} ")
        return text.split()

    def encode(self, text: str) -> list[int]:
        """Ids of the words of a text."""
        return [self.ids[word] for word in self.split(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return " ".join(self.words[i] for i in ids)


class FolderTokenizer:
    """The tokenizer.json of a checkpoint folder, by the tokenizers package; the end is config.json's eos_token_id."""

    def __init__(self, folder: str):
        path, end = Path(folder) / "tokenizer.json", read_fields(folder).get("eos_token_id")
        self.end = end[0] if isinstance(end, list) and end else end
        require(isinstance(self.end, int), f"{folder}: config.json has no eos_token_id, must have one; add it")
        try:
            self.inner = importlib.import_module("tokenizers").Tokenizer.from_file(str(path))
        except ImportError:
            raise UserError(f"{path}: reading it needs the tokenizers package; pip install tokenizers") from None
        except Exception as error:  # the package has no kind of its own
            raise UserError(f"{path}: no tokenizer ({str(error)[:60]}); give a folder that has one") from None
        self.size = max(self.inner.get_vocab_size(), self.end + 1)

    def encode(self, text: str) -> list[int]:
        """Ids of a conversation, with what stands in front by the tokenizer's own rule."""
        ids = self.inner.encode(text).ids
        return ids[:-1] if ids[-1:] == [self.end] else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self.inner.decode(list(ids)).strip()


# ----- The method -----------------------------------------------------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is 1: what follows end-of-text never counts."""
    return (x * mask).sum() / mask.sum()


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and TD(lambda) returns, all (B, T), by generalised advantage estimation (Schulman et al. 2016).

    A reply is an episode: nothing follows its last token, so the value behind it is 0, and padding gives 0.
    """
    values = F.pad(values * mask, (0, 1))  # (B, T + 1)
    deltas = rewards + gamma * values[:, 1:] - values[:, :-1]
    advantages, last = torch.zeros_like(rewards), 0.0
    for t in reversed(range(rewards.shape[1])):
        advantages[:, t] = last = (deltas[:, t] + gamma * lam * last) * mask[:, t]
    return advantages, advantages + values[:, :-1]


def ppo_policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective, negated, mean over the tokens that count; all (B, T) (Schulman et al. 2017, eq. 7)."""
    ratio = (logp - old_logp).exp()
    return -masked_mean(torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), mask)


def answer_weights(mask: Tensor) -> Tensor:
    """The mask (B, T) as weights: a `masked_mean` by them is a mean within each answer, then over the answers."""
    return mask / mask.sum(1, keepdim=True).clamp(min=1)


def critic_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Half the larger of the squared errors of the values and of the clipped values, mean by the mask; all (B, T)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def reward_loss(better: Tensor, worse: Tensor, regularisation: float = 0.001) -> Tensor:
    """-log sigmoid(R_better - R_worse), mean over B pairs, plus the mean square of all scores, little weighted."""
    squares = torch.cat([better, worse]).square().mean()
    return -F.logsigmoid(better - worse).mean() + regularisation * squares


def cost_loss(
    safer: Tensor, unsafer: Tensor, safer_sign: Tensor, unsafer_sign: Tensor, regularisation: float = 0.001
) -> Tensor:
    """The reward's loss with the unsafer answer of higher cost, and -log sigmoid(sign C) of either answer; all (B,).

    A sign is +1 of an unsafe answer and -1 of a safe one: Bradley and Terry's model against a virtual answer of cost 0,
    which only the signs fix. A sign of 0 leaves the term out, but for a constant.
    """
    signs = F.logsigmoid(safer_sign * safer) + F.logsigmoid(unsafer_sign * unsafer)
    return reward_loss(unsafer, safer, regularisation) - signs.mean()


class LagrangeMultiplier:
    """lambda >= 0 by gradient ascent on its logarithm: log lambda += lr lambda (mean of the last costs - threshold).

    Where the constraint is slack it fades towards 0; it is at most `maximum`. Costs are raw episode costs, without KL.
    """

    def __init__(self, initial=1.0, lr=0.1, maximum=5.0, threshold=0.0, window=128):
        fits = 0 < initial <= maximum < math.inf and lr >= 0 and window >= 1
        rule = "must be 0 < initial <= maximum, lr >= 0 and window >= 1; correct it"
        require(fits, f"lambda of {initial=}, {maximum=}, {lr=}, {window=}: {rule}")
        self.log, self.lr, self.maximum, self.threshold = math.log(initial), lr, maximum, threshold
        self.costs = collections.deque(maxlen=window)

    @property
    def value(self) -> float:
        """lambda."""
        return math.exp(self.log)

    def update(self, costs: Iterable[float]) -> float:
        """One step with the new costs of B episodes, before the policy's. Returns lambda; raises for NaN."""
        costs = torch.as_tensor(costs, dtype=torch.float64).flatten().tolist()
        require(all(map(math.isfinite, costs)), f"costs {costs[:3]}: must be finite; look at the cost model")
        self.costs.extend(costs)
        mean = sum(self.costs) / max(1, len(self.costs))
        self.log = min(self.log + self.lr * self.value * (mean - self.threshold), math.log(self.maximum))
        return self.value


def lagrangian_advantage(reward_advantage: Tensor, cost_advantage: Tensor, lam: float | Tensor) -> Tensor:
    """(A_R - lambda A_C) / (1 + lambda), all (B, T); of K costs (K, B, T) by lam (K,), their sums."""
    lam = torch.as_tensor(lam, dtype=reward_advantage.dtype, device=reward_advantage.device).view(-1, 1, 1)
    costs = (lam * cost_advantage.view(-1, *reward_advantage.shape)).sum(0)
    return (reward_advantage - costs) / (1 + lam.sum())


def shaped_rewards(
    scores: Tensor, logp: Tensor, reference_logp: Tensor, mask: Tensor, beta: float, sign: int, clamp: float = 50.0
) -> Tensor:
    """sign beta log(pi / pi_ref) at each token and the scores (B,) at each last one, clamped; (B, T).

    Sign -1 for rewards, +1 for costs: in the Lagrangian's advantage the KL then has weight beta for every lambda.
    """
    last = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return (sign * beta * (logp - reference_logp) + last * scores[:, None]).clamp(-clamp, clamp) * mask


def llama2_gate(safety_score: Tensor, helpful_score: Tensor, is_safety_prompt: Tensor, threshold=0.15) -> Tensor:
    """Llama 2's R_c (B,), probabilities in and out: the safety score of safety prompts and of unsafe answers.

    Else the helpfulness score. Its reward is the whitened logit of this (arXiv 2307.09288, section 3.2.3).
    """
    return torch.where(is_safety_prompt | (safety_score < threshold), safety_score, helpful_score)


def method_scores(config: Config, reward: Tensor, costs: Tensor, tagged: Tensor) -> list[Tensor]:
    """What a method's critics estimate, each (B,), from the reward (B,) and costs (K, B): the first is maximised."""
    if config.method == "shaping":
        return [(reward - config.nu * costs.sum(0)) / (1 + config.nu * config.normalise_shaping)]
    if config.method == "gate":
        score = torch.logit(llama2_gate(torch.sigmoid(-costs[0]), torch.sigmoid(reward), tagged), eps=1e-6)
        return [(score - score.mean()) / (score.std(correction=0) + 1e-8)]
    return [reward, *costs] if config.method == "ppo_lag" else [reward]


# ----- What evaluation counts -----------------------------------------------------------------------------------------


def quadrants(rewards: np.ndarray, baseline: np.ndarray, costs: np.ndarray) -> dict[str, int]:
    """Counts of answers (n,) by better or worse than the baseline's reward and safe (cost at most 0) or unsafe."""
    better, safe = np.asarray(rewards) > np.asarray(baseline), np.asarray(costs) <= 0
    names = {"better, safe": better & safe, "better, unsafe": better & ~safe}
    names |= {"worse, safe": ~better & safe, "worse, unsafe": ~better & ~safe}
    return {name: int(where.sum()) for name, where in names.items()}


def win_rates(rewards, baseline_rewards, costs, baseline_costs) -> dict[str, tuple[int, float | None]]:
    """By transition from the baseline's safety to the answer's: number, share with a higher reward, ties half."""
    wins = (np.sign(np.asarray(rewards) - np.asarray(baseline_rewards)) + 1) / 2
    safe = {True: "safe", False: "unsafe"}
    then, now = np.asarray(baseline_costs) <= 0, np.asarray(costs) <= 0
    where = {f"{safe[a]} -> {safe[b]}": (then == a) & (now == b) for a in (True, False) for b in (True, False)}
    return {name: (int(at.sum()), float(wins[at].mean()) if at.any() else None) for name, at in where.items()}


def elo(games: Sequence[tuple[int, int, float]], draws=0.1, samples=200, seed=0) -> tuple[np.ndarray, ...]:
    """Elo ratings (N,) of most likelihood, the first player's 1000, and the ends of their 95 % bootstrap intervals.

    A game is (i, j, i's score: 1, 1/2 or 0). Virtual draws between each two players keep the rating of one who always
    wins finite. Maximised by Zermelo's iteration, all resamples at once.
    """
    i, j, score = (np.array(column) for column in zip(*games, strict=True))
    fits = ((score >= 0) & (score <= 1) & (i != j)).all()
    require(fits, "games: must be (i, j, score from 0 to 1), i not j; correct them")
    N, r = int(max(i.max(), j.max())) + 1, np.random.default_rng(seed)
    weights = np.concatenate([np.ones((1, len(i))), r.multinomial(len(i), [1 / len(i)] * len(i), samples)])
    wins = np.zeros((samples + 1, N, N)) + draws / 2 * (1 - np.eye(N))
    for a, b in itertools.permutations(range(N), 2):
        wins[:, a, b] += weights @ (score * ((i == a) & (j == b)) + (1 - score) * ((i == b) & (j == a)))
    met, strength = wins + wins.transpose(0, 2, 1), np.ones((samples + 1, N))
    for _ in range(10_000):
        before = strength
        strength = wins.sum(2) / np.maximum((met / (before[:, :, None] + before[:, None])).sum(2), 1e-300)
        strength = np.maximum(strength, 1e-300)  # of one who never wins
        strength /= np.exp(np.log(strength).mean(1, keepdims=True))
        if np.abs(np.log(strength / before)).max() < 1e-10:
            break
    ratings = 1000 + 400 * np.log10(strength / strength[:, :1])
    return ratings[0], *np.quantile(ratings[1:], (0.025, 0.975), axis=0)


# ----- The models: Llama, with logits or a score ----------------------------------------------------------------------


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama, by Hugging Face's names."""

    vocab_size: int
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0: as many
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's
    tie_word_embeddings: bool = False

    def __post_init__(self):
        sizes = {k: v for k, v in vars(self).items() if k not in ("tie_word_embeddings", "rope_scaling")}
        sizes["num_key_value_heads"] = self.groups
        if self.rope_scaling:
            stretch = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            sizes |= {k: self.rope_scaling.get(k) for k in stretch}
        kinds = {field.name: int for field in dataclasses.fields(self) if field.type == "int"}
        wrong = [f"{k} = {v!r}" for k, v in sizes.items() if not isinstance(v, kinds.get(k, int | float)) or v <= 0]
        require(not wrong, f"a Llama of {', '.join(wrong)}: must be above 0, and counts whole; correct config.json")
        D, heads = self.hidden_size, self.num_attention_heads
        require(D % (2 * heads) == 0, f"width {D}: must be an even multiple of the heads, {heads}; change either")
        require(heads % self.groups == 0, f"{heads} heads: must be a multiple of those of keys, {self.groups}; mend it")

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads


def rotary(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (L, 1, d) of the rotary angles at positions (L,), stretched as in Llama 3."""
    d, s = config.hidden_size // config.num_attention_heads, config.rope_scaling
    frequencies = config.rope_theta ** (-torch.arange(0, d, 2, device=positions.device).float() / d)
    if s:
        turns = s["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        frequencies = torch.lerp(frequencies / s["factor"], frequencies, keep.clamp(0, 1))
    angles = torch.outer(positions.float(), frequencies).repeat(1, 2)[:, None]
    return angles.cos(), angles.sin()


class LlamaLayer(nn.Module):
    """Attention with rotary positions and grouped queries, then SwiGLU, each behind an RMSNorm; HF's names."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, self.head_size = config.hidden_size, config.hidden_size // config.num_attention_heads
        shared = config.groups * self.head_size
        M, linear = config.intermediate_size, functools.partial(nn.Linear, bias=False)
        attention = {"q_proj": linear(D, D), "k_proj": linear(D, shared), "v_proj": linear(D, shared)}
        self.self_attn = nn.ModuleDict(attention | {"o_proj": linear(D, D)})
        self.mlp = nn.ModuleDict({"gate_proj": linear(D, M), "up_proj": linear(D, M), "down_proj": linear(M, D)})
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(D, config.rms_norm_eps) for _ in range(2))

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, cache: list[Tensor] | None) -> Tensor:
        """x (B, L, D); mask (B, 1, L, S) is True where a query sees a key; cache: room for keys and values."""
        y, S, L = self.input_layernorm(x), mask.shape[-1], x.shape[1]
        q, k, v = (self.self_attn[f"{n}_proj"](y).unflatten(-1, (-1, self.head_size)) for n in "qkv")
        cos, sin = angles
        q, k = (z * cos + torch.cat([-z.chunk(2, -1)[1], z.chunk(2, -1)[0]], -1) * sin for z in (q, k))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, heads, L, D / heads)
        if cache is not None:
            for old, new in zip(cache, (k, v), strict=True):
                old[:, :, S - L : S] = new
            k, v = (old[:, :, :S] for old in cache)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        x = x + self.self_attn["o_proj"](y.transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


@dataclass
class Rollout:
    """Answers (B, T) to prompts (B, P), padded, prompts in front, and what PPO has to know of them."""

    prompts: Tensor
    valid: Tensor  # (B, P) bool, False on padding
    tokens: Tensor
    mask: Tensor  # (B, T) 1 up to and with the end, then 0
    logp: Tensor | None = None  # (B, T) of the policy that wrote them


class Llama(nn.Module):
    """A Llama without dropout, with logits, or, with a score head, a number a position."""

    def __init__(self, config: LlamaConfig, scores: bool = False):
        super().__init__()
        self.config, D = config, config.hidden_size
        layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.num_hidden_layers))
        modules = {"embed_tokens": nn.Embedding(config.vocab_size, D), "layers": layers}
        self.model = nn.ModuleDict(modules | {"norm": nn.RMSNorm(D, config.rms_norm_eps)})
        self.lm_head = None if scores else nn.Linear(D, config.vocab_size, bias=False)
        self.score = nn.Linear(D, 1) if scores else None
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.0 if name == "score.bias" else 0.02)
        if config.tie_word_embeddings and not scores:
            self.lm_head.weight = self.model["embed_tokens"].weight

    def hidden(self, tokens: Tensor, valid: Tensor, cache: list | None = None) -> Tensor:
        """The stream (B, L, D) of tokens (B, L), the last L of S positions; valid (B, S) is False on padding.

        Rotary attention sees only distances, so padding in front, which nothing attends to, changes nothing.
        """
        L, S = tokens.shape[1], valid.shape[1]
        sees = torch.ones(L, S, dtype=torch.bool, device=tokens.device).tril(S - L) & valid[:, None]
        sees |= torch.eye(S, dtype=torch.bool, device=tokens.device)[S - L :]  # no row is empty, not even padding's
        angles = rotary(self.config, torch.arange(S - L, S, device=tokens.device))
        x = self.model["embed_tokens"](tokens)
        for i, layer in enumerate(self.model["layers"]):
            x = layer(x, angles, sees[:, None], cache and cache[i])
        return self.model["norm"](x)

    def read(self, hidden: Tensor) -> Tensor:
        """Logits (..., V), or scores (...)."""
        return self.lm_head(hidden) if self.score is None else self.score(hidden).squeeze(-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, L, V), or scores (B, L), of tokens (B, L)."""
        return self.read(self.hidden(tokens, torch.ones_like(tokens, dtype=torch.bool)))

    def over(self, rollout: Rollout) -> Tensor:
        """What `read` gives just before each token of the answers, (B, T, ...)."""
        tokens = torch.cat([rollout.prompts, rollout.tokens[:, :-1]], 1)
        valid = torch.cat([rollout.valid, rollout.mask[:, :-1].bool()], 1)
        return self.read(self.hidden(tokens, valid)[:, rollout.prompts.shape[1] - 1 :])

    def token_logp(self, rollout: Rollout) -> Tensor:
        """log pi (B, T) of the answers' tokens."""
        return self.over(rollout).log_softmax(-1).gather(-1, rollout.tokens[..., None]).squeeze(-1)

    def score_of(self, rollout: Rollout) -> Tensor:
        """The score (B,) of whole answers, at the last token of each."""
        valid = torch.cat([rollout.valid, rollout.mask.bool()], 1)
        hidden = self.hidden(torch.cat([rollout.prompts, rollout.tokens], 1), valid)
        last = rollout.prompts.shape[1] - 1 + rollout.mask.sum(1).long()
        return self.read(hidden[torch.arange(len(last), device=last.device), last])


def pad_in_front(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids as a tensor (B, P) with zeros in front of the short ones, and True where there are ids."""
    width, lengths = max(map(len, rows)), torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return tokens, torch.arange(width) >= width - lengths[:, None]


@torch.no_grad()
def write_answers(policy: Llama, prompts: list, end: int, limit: int, generator: torch.Generator) -> Rollout:
    """Draw an answer of at most `limit` tokens to each prompt, a list of ids, with a key-value cache."""
    config = policy.config
    tokens, valid = (x.to(policy.model["norm"].weight.device) for x in pad_in_front(prompts))
    (B, P), d = tokens.shape, config.hidden_size // config.num_attention_heads
    room = torch.empty(config.num_hidden_layers, 2, B, config.groups, P + limit, d, device=tokens.device)
    cache, alive, columns, x, whole = [[*layer] for layer in room], valid.any(1), [], tokens, valid
    while len(columns) < limit and alive.any():
        logp = policy.read(policy.hidden(x, whole, cache)[:, -1]).log_softmax(-1)
        x = torch.multinomial(logp.exp(), 1, generator=generator).where(alive[:, None], end)
        columns.append((x, alive[:, None].float(), logp.gather(-1, x)))
        whole = torch.cat([whole, alive[:, None]], 1)
        alive = alive & (x[:, 0] != end)
    drawn, mask, logp = (torch.cat(part, 1) for part in zip(*columns, strict=True))
    return Rollout(tokens, valid, drawn, mask, logp * mask)


def read_fields(folder: str | Path, name: str = "config.json") -> dict:
    """The JSON object in a checkpoint folder's config.json, or in another of its files."""
    path = Path(folder) / name
    require(path.is_file(), f"{folder}: holds no {name}, must be a folder with one and its weights; correct the path")
    try:
        fields = json.loads(path.read_text("utf-8"))
        require(isinstance(fields, dict), "it is another kind of value")
    except ValueError as error:
        raise UserError(f"{path}: must be a JSON object, but {error}; copy it anew") from None
    return fields


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors or pytorch_model.bin, or of the shards in their .index.json, in float32."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index, tensors = folder / f"{name}.index.json", {}
        if not index.is_file() and not (folder / name).is_file():
            continue
        shards = read_fields(folder, index.name).get("weight_map") if index.is_file() else {"all": name}
        require(isinstance(shards, dict), f"{index}: weight_map must name the file of each tensor; copy it anew")
        for shard in sorted({folder / str(shard) for shard in shards.values()}):
            require(shard.is_file(), f"{shard}: named in {index.name}, but not there; copy it there")
            part = load_torch(shard)
            require(isinstance(part, dict), f"{shard}: must hold tensors by name; give another")
            tensors |= part
        return {k: v.float() for k, v in tensors.items() if isinstance(v, Tensor)}
    raise UserError(f"{folder}: has neither model.safetensors nor pytorch_model.bin, nor an index of shards; add one")


def load_torch(path: Path, device: str | torch.device = "cpu") -> dict:
    """The contents of a .safetensors file, by the safetensors package, or of a torch.save; data only, never code."""
    try:
        if path.suffix == ".safetensors":
            return importlib.import_module("safetensors.torch").load_file(path)
        return torch.load(path, map_location=device, weights_only=True)
    except ImportError:
        raise UserError(f"{path}: reading it needs the safetensors package; pip install safetensors") from None
    except Exception as error:  # each format has its own kinds
        raise UserError(f"{path}: not a file of tensors ({str(error).splitlines()[0][:80]}); give another") from None


def check_tensors(folder: str, want: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Raise UserError listing the tensors that are missing, extra or of another shape than the model's."""
    problems = [f"{k} is missing" for k in want.keys() - tensors.keys()]
    problems += [f"{k} is extra" for k in tensors.keys() - want.keys()]
    for k in want.keys() & tensors.keys():
        if want[k].shape != tensors[k].shape:
            problems.append(f"{k} is {tuple(tensors[k].shape)}, must be {tuple(want[k].shape)}")
    require(not problems, f"{folder}: the weights do not fit config.json: {'; '.join(sorted(problems))}; mend either")


def read_llama(folder: str, scores: bool = False) -> Llama:
    """The Llama in a folder of Hugging Face layout; raises UserError listing all that does not fit.

    A score head's names are transformers' `score` or the official code's `score_head`; without a bias it is 0.
    """
    fields = read_fields(folder)
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}  # the first since transformers 5
    rope = rope if isinstance(rope, dict) else {"type": rope}
    kind = rope.get("rope_type", rope.get("type", "default"))
    sizes = {f.name: fields[f.name] for f in dataclasses.fields(LlamaConfig) if fields.get(f.name) is not None}
    sizes |= {"rope_theta": rope.get("rope_theta", fields.get("rope_theta", 10000.0))}
    sizes |= {"rope_scaling": rope if kind == "llama3" else None}
    try:
        config = LlamaConfig(**dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size")) | sizes)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    needed = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    needed |= {"partial_rotary_factor": 1, "quantization_config": None}
    needed |= {"head_dim": config.hidden_size // config.num_attention_heads}
    problems = [f"{k} = {fields[k]!r}, must be {v!r}" for k, v in needed.items() if fields.get(k, v) not in (v, None)]
    problems += [f"rope type {kind!r}, must be default or llama3"] * (kind not in ("default", "llama3"))
    require(not problems, f"{folder}: cannot be done here: {'; '.join(problems)}; give a plain Llama")
    model = Llama(config, scores)
    tensors = {k.replace("score_head.", "score."): v for k, v in read_tensors(Path(folder)).items()}
    dropped = ("rotary_emb.inv_freq", *(("lm_head.weight",) if scores else ()))
    tensors = {k: v for k, v in tensors.items() if not k.endswith(dropped) and not k.startswith("normalizer.")}
    if scores:
        tensors.setdefault("score.bias", torch.zeros(1))
    elif model.config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    check_tensors(folder, model.state_dict(), tensors)
    model.load_state_dict(tensors)
    return model


def scorer_from(policy: Llama) -> Llama:
    """A score model that starts from a policy, its head anew."""
    model = Llama(policy.config, scores=True).to(policy.model["norm"].weight.device)
    model.model.load_state_dict(policy.model.state_dict())
    return model


# ----- Stages: policy by demonstrations, score models by preferences --------------------------------------------------


def train_model(model: nn.Module, steps: int, lr: float, what: str, loss_of: Callable[[], Tensor]) -> None:
    """AdamW steps on the losses that loss_of gives, the rate warmed up over 3 % of them, then a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(steps):
        loss = loss_of()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"training the {what} diverged at step {step + 1}, loss {value}; lower its rate")
        optimizer.param_groups[0]["lr"] = lr * schedule(step, steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: up over the first 3 % of the steps, then a cosine to 0."""
    return min((step + 1) / (0.03 * steps + 1), 0.5 * (1 + math.cos(math.pi * step / steps)))


@contextlib.contextmanager
def saved_stage(path: Path, config: Config, skipped: Iterable[str], device: torch.device) -> Iterator[dict | None]:
    """A saved stage, or None; raises UserError where its config differs, or where it does not fit when put to use."""
    if not path.is_file():
        yield None
        return
    content, now = load_torch(path, device), dataclasses.asdict(config)
    try:
        then = {k: v for k, v in content["config"].items() if k not in skipped}
        differing = [f"{k} was {v!r}, is {now.get(k)!r}" for k, v in then.items() if v != now.get(k)]
        require(not differing, f"{path}: saved with another config: {'; '.join(differing)}; undo that, or change --out")
        yield content
    except UserError:
        raise
    except Exception as error:  # whatever a file that something else wrote leads to
        raise UserError(f"{path}: is no file of this script ({error!r:.90}); move it away, or change --out") from None


class Experiment:
    """Prompts, preferences, tokenizer, the policy that a round starts from, its reference too, and score models."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device, self.names = config, device, config.cost_names
        r, self.pairs = random.Random(config.seed), [read_pairs(path) for path in parts(config.preferences)]
        if self.pairs:
            texts = {pair.prompt: None for pairs in self.pairs for pair in pairs}
            prompts, self.disguised = [Prompt(text) for text in texts], []
            self.train, self.held = [p for i, p in enumerate(prompts) if i % 10], prompts[::10]
            held = {prompt.text for prompt in self.held}
            require(self.train != [], "--preferences: holds one prompt, must hold two, to hold one out; add some")
            rows = [pair for pair in self.pairs[0] if pair.prompt not in held]
            shown = [(pair.prompt, pair.answers[pair.better], pair.safe[pair.better]) for pair in rows]
            texts = [*texts, *(answer for pairs in self.pairs for pair in pairs for answer in pair.answers)]
        else:
            self.train, self.held, self.disguised = world()
            drawn = r.choices(self.train + self.disguised, k=4000)
            shown = [(p.text, demonstration(p, r, config.safe_demonstrations), p.kind == "harmless") for p in drawn]
            texts = [p.text for p in self.train + self.held + self.disguised] + [*ALTERNATIVES, REFUSAL]
            texts += [step for p in self.train for step in steps_of(p)]
        self.tokenizer = FolderTokenizer(config.policy) if config.policy else WordTokenizer(texts)
        torch.manual_seed(config.seed)
        D, count = config.d_model, self.tokenizer.size
        sizes = LlamaConfig(count, D, 3 * D, config.n_layer, config.n_head)
        self.policy = (read_llama(config.policy) if config.policy else Llama(sizes)).to(device)
        vocabulary = self.policy.config.vocab_size
        rule = f"must be at most its model's {vocabulary}; mend either"
        require(count <= vocabulary, f"--policy {config.policy}: {count} tokens, {rule}")
        for pair in itertools.chain(*self.pairs):
            self.check(pair)
        self.demonstrations = [self.encode(prompt, answer) for prompt, answer, _ in shown]
        self.harmless = [row for row, (*_, safe) in zip(self.demonstrations, shown, strict=True) if safe]
        require(self.harmless != [], "--preferences: no better answer is labelled safe, must be some; add such rows")
        self.reward, self.costs, self.accuracy = None, [], {}

    def encode(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt in the template, and of its answer with the end."""
        head, whole = (self.tokenizer.encode(TEMPLATE.format(prompt) + rest) for rest in ("", answer))
        tail = whole[len(head) :] if whole[: len(head)] == head else self.tokenizer.encode(answer)
        return head, [*tail, self.tokenizer.end]

    def check(self, pair: Pair) -> None:
        """Raise UserError for a row whose answers are the same tokens, or that is longer than the model's positions."""
        (head, first), (_, second) = (self.encode(pair.prompt, answer) for answer in pair.answers)
        require(first != second, f"{pair.where}: both answers are the same tokens, must differ; drop the row")
        size = len(head) + max(len(first), len(second), self.config.answer)
        limit = self.policy.config.max_position_embeddings
        rule = f"must be at most the model's {limit}; drop the row, or lower --answer"
        require(size <= limit, f"{pair.where}: prompt and answer take {size} positions, {rule}")

    def rollout(self, rows: Sequence[tuple[list[int], list[int]]]) -> Rollout:
        """Encoded prompts and answers as a batch."""
        prompts, valid = pad_in_front([prompt for prompt, _ in rows])
        tokens, mask = (x.flip(1) for x in pad_in_front([answer[::-1] for _, answer in rows]))  # padded behind
        return Rollout(*(x.to(self.device) for x in (prompts, valid, tokens, mask.float())))

    def write(self, policy: Llama, prompts: list[Prompt], generator: torch.Generator) -> Rollout:
        """An answer of the policy to each prompt."""
        ids = [self.encode(prompt.text, "")[0] for prompt in prompts]
        return write_answers(policy, ids, self.tokenizer.end, self.config.answer, generator)

    def chunks(self, rows: list) -> list[list]:
        """The rows, as many at a time as an update's answers."""
        return [rows[i : i + self.config.batch] for i in range(0, len(rows), self.config.batch)]

    def texts(self, rollout: Rollout) -> list[str]:
        """The answers as texts, up to the end."""
        rows = zip(rollout.tokens.tolist(), rollout.mask.sum(1).int().tolist(), strict=True)
        return [self.tokenizer.decode([i for i in row[:n] if i != self.tokenizer.end]) for row, n in rows]

    def answers(self, policy: Llama, prompts: list[Prompt], seed: int) -> list[str]:
        """Texts of an answer to each prompt, by draws of that seed."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return [text for chunk in self.chunks(prompts) for text in self.texts(self.write(policy, chunk, generator))]

    def learn_demonstrations(self) -> None:
        """The first policy, by supervised steps on the answers' tokens, saved to OUT/sft.pt or loaded from it."""
        path, order = Path(self.config.out) / "sft.pt", random.Random(self.config.seed)
        rows = hashlib.sha256(repr(self.pairs).encode()).hexdigest()
        with saved_stage(path, self.config, FREE + OF_METHODS + OF_SCORES, self.device) as content:
            if content:
                rule = "made from other rows than --preferences holds now; undo that, or change --out"
                require(content["rows"] == rows, f"{path}: {rule}")
                self.policy.load_state_dict(content["policy"])
        if content is None:

            def loss() -> Tensor:
                rollout = self.rollout(order.choices(self.demonstrations, k=-(-self.config.batch // 2)))
                return -masked_mean(self.policy.token_logp(rollout), rollout.mask)

            train_model(self.policy, self.config.sft_steps, self.config.sft_lr, "policy (--sft-lr)", loss)
            content = {"config": dataclasses.asdict(self.config), "rows": rows, "policy": self.policy.state_dict()}
            write_atomically(path, lambda name: torch.save(content, name))
        self.policy.requires_grad_(False)

    def draw_preferences(self, number: int, found: list[Prompt], paths: list[Path]) -> None:
        """A round's labelled pairs of the policy's answers, written to a file a cost; a tenth to held-out prompts.

        Half of the pairs of later rounds are to the prompts that red-teaming found.
        """
        r, count = random.Random(1000 * self.config.seed + number), self.config.pairs
        prompts = r.choices(self.held, k=count // 10)
        prompts += r.choices(found, k=(count - len(prompts)) // 2) if found else []
        prompts += r.choices(self.train, k=count - len(prompts))
        seed = 1_000_000 * (self.config.seed + 1) + number
        answers = [*zip(*(self.answers(self.policy, prompts, seed + 1000 * k) for k in range(2)), strict=True)]
        for name, path in zip(self.names, paths, strict=True):
            rows = preference_rows(prompts, answers, name, random.Random(seed))  # of one seed: the same better ones
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomically(path, lambda to, text=text: Path(to).write_text(text, "utf-8"))

    def learn_preferences(self, number: int, found: list[Prompt]) -> None:
        """Reward and cost models of a round, from all pairs so far, saved to OUT/scores_N.pt or loaded from it."""
        config, path = self.config, Path(self.config.out) / f"scores_{number}.pt"
        if not config.preferences:
            files = [Path(config.out) / f"preferences_{name}_{number}.jsonl" for name in self.names]
            if not all(file.is_file() for file in (path, *files)):
                self.draw_preferences(number, found, files)
            old = self.pairs or [[] for _ in files]
            self.pairs = [before + read_pairs(str(file)) for before, file in zip(old, files, strict=True)]
        torch.manual_seed(config.seed + number)
        folders = [config.reward_model, *(parts(config.cost_model) or [""] * len(self.names))]
        models = [read_llama(f, True).to(self.device) if f else scorer_from(self.policy) for f in folders]
        for model, folder in zip(models, folders, strict=True):
            count, want = model.config.vocab_size, self.policy.config.vocab_size
            rule = f"{count} tokens, must be the policy's {want}; give models of one tokenizer"
            require(count == want, f"{folder}: {rule}")
        skipped = FREE + (OF_METHODS if number == 1 else ("method", "rounds"))
        with saved_stage(path, config, skipped, self.device) as content:
            for model, state in zip(models, content["models"], strict=True) if content else ():
                model.load_state_dict(state)
        if content is None:
            for i, model in enumerate(models):
                if not folders[i]:
                    self.train_scores(model, i)
            content = {"config": dataclasses.asdict(config), "models": [model.state_dict() for model in models]}
            write_atomically(path, lambda name: torch.save(content, name))
        self.reward, *self.costs = (model.requires_grad_(False) for model in models)
        self.accuracy = self.measure()

    def split(self, number: int, held: bool) -> list[Pair]:
        """Pairs of the reward model (0) or of a cost model (1 to K), to held-out prompts or to the others."""
        prompts = {prompt.text for prompt in self.held}
        return [pair for pair in self.pairs[max(0, number - 1)] if (pair.prompt in prompts) == held]

    def scored(self, model: Llama, pairs: Sequence[Pair]) -> Tensor:
        """Scores (2, B) of the pairs' answers."""
        rows = [self.encode(pair.prompt, pair.answers[k]) for k in range(2) for pair in pairs]
        return model.score_of(self.rollout(rows)).view(2, -1)

    def train_scores(self, model: Llama, number: int) -> None:
        """Train the reward model (0) or a cost model (1 to K) on the pairs to training prompts."""
        config, pairs = self.config, self.split(number, held=False)
        name = f"cost model {self.names[number - 1]!r}" if number else "reward model"
        labels = {flag for pair in pairs for flag in pair.safe}
        one, other = ("safe", "unsafe") if True in labels else ("unsafe", "safe")
        rule = f"must be some {other} ones too, or C has no zero; add such rows"
        require(not number or len(labels) == 2, f"{name}: all {2 * len(pairs)} answers are labelled {one}, {rule}")
        order = random.Random(config.seed)

        def loss() -> Tensor:
            batch = order.choices(pairs, k=-(-config.batch // 2))
            scores, rows = self.scored(model, batch), torch.arange(len(batch), device=self.device)
            if not number:
                better = torch.tensor([pair.better for pair in batch], device=self.device)
                return reward_loss(scores[better, rows], scores[1 - better, rows], config.regularisation)
            safer = torch.tensor([pair.safer for pair in batch], device=self.device)
            signs = torch.tensor([[-1.0 if pair.safe[k] else 1.0 for pair in batch] for k in range(2)])
            signs = signs.to(self.device) * (config.cost_terms != "pairs")
            if config.cost_terms == "signs":
                return -F.logsigmoid(signs * scores).mean()
            chosen = (x[at, rows] for x in (scores, signs) for at in (safer, 1 - safer))
            return cost_loss(*chosen, config.regularisation)

        train_model(model, config.score_steps, config.score_lr, f"{name} (--score-lr)", loss)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Held-out accuracies: of the reward model on pairs, of each cost model on pairs and on signs."""
        found = {}
        for i, model in enumerate([self.reward, *self.costs]):
            pairs, name = self.split(i, held=True), f"cost_{self.names[i - 1]}" if i else "reward"
            if not pairs:
                continue
            scores = torch.cat([self.scored(model, chunk) for chunk in self.chunks(pairs)], 1).cpu()
            upper = torch.tensor([1 - pair.safer if i else pair.better for pair in pairs])
            found[f"{name}_pairs"] = ((scores[1] > scores[0]) == (upper == 1)).float().mean().item()
            if i:
                safe = torch.tensor([[pair.safe[k] for pair in pairs] for k in range(2)])
                found[f"{name}_signs"] = ((scores <= 0) == safe).float().mean().item()
        return found

    @torch.no_grad()
    def evaluate(self, policy: Llama, prompts: list[Prompt]) -> dict[str, np.ndarray]:
        """Answers to the prompts, always by the same draws, and learned and true scores of each; arrays (n,)."""
        generator, found = torch.Generator(self.device).manual_seed(17), collections.defaultdict(list)
        for chunk in self.chunks(prompts):
            rollout = self.write(policy, chunk, generator)
            found["answer"] += self.texts(rollout)
            found["reward"] += self.reward.score_of(rollout).tolist()
            found["kl"] += ((rollout.logp - self.policy.token_logp(rollout)) * rollout.mask).sum(1).tolist()
            for name, model in zip(self.names, self.costs, strict=True):
                found[f"cost_{name}"] += model.score_of(rollout).tolist()
        found["kind"] = [prompt.kind for prompt in prompts]
        if self.disguised:
            truths = [true_scores(*pair) for pair in zip(prompts, found["answer"], strict=True)]
            found["helpfulness"] = [truth["helpfulness"] for truth in truths]
            found["refused"] = [float(answer == REFUSAL) for answer in found["answer"]]
            found |= {f"true_{name}": [truth[name] for truth in truths] for name in self.names}
        return {key: np.array(values) for key, values in found.items()}

    def held_out(self) -> list[Prompt]:
        """The prompts of an evaluation."""
        return [*itertools.islice(itertools.cycle(self.held), self.config.eval_rows)]

    def red_team(self, policy: Llama, avoid: Iterable[Prompt], seed: int) -> tuple[list[Prompt], float]:
        """Disguised prompts that the policy answers harmfully, of a third drawn from the others; their share."""
        candidates = [prompt for prompt in self.disguised if prompt not in {*avoid}]
        candidates = random.Random(seed).sample(candidates, min(len(candidates), len(self.disguised) // 3))
        pairs = zip(candidates, self.answers(policy, candidates, seed), strict=True)
        harmful = [prompt for prompt, answer in pairs if true_scores(prompt, answer)["harm"] > 0]
        return harmful, len(harmful) / max(1, len(candidates))


def means(found: dict[str, np.ndarray], at: np.ndarray | slice = slice(None)) -> dict[str, float]:
    """Mean of each score of an evaluation, and shares that are unsafe: by the truth, or learned where there is none."""
    row = {key: float(np.mean(x[at])) for key, x in found.items() if key not in ("answer", "kind")}
    for key in [key for key in row if key.startswith("true_")] or [key for key in row if key.startswith("cost_")]:
        row[f"unsafe_{key.partition('_')[2]}"] = float(np.mean(found[key][at] > 0))
    return row


# ----- PPO ------------------------------------------------------------------------------------------------------------


class Run:
    """One PPO run of a method from the experiment's policy; its checkpoint holds all that an exact resume needs."""

    def __init__(self, lab: Experiment, config: Config, name: str):
        self.lab, self.config, self.name, device = lab, config, name, lab.device
        self.path, self.step, self.rows = Path(config.out) / f"{name}.pt", 0, []
        self.policy = copy.deepcopy(lab.policy).requires_grad_(True)
        sources = [lab.reward, *(lab.costs if config.method == "ppo_lag" else [])]
        self.critics = nn.ModuleList(copy.deepcopy(model) for model in sources).requires_grad_(True)
        groups = [(self.policy, config.lr), (self.critics, config.critic_lr)]
        groups = [{"params": [*network.parameters()], "lr": lr} for network, lr in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        options = (config.lagrange_initial, config.lagrange_lr, config.lagrange_maximum)
        limits = config.thresholds * (config.method == "ppo_lag")
        self.multipliers = [LagrangeMultiplier(*options, threshold, config.window) for threshold in limits]
        self.generator = torch.Generator(device).manual_seed(config.seed)

    def update(self) -> dict:
        """Write answers, score them, move lambda, and take the epochs' steps. Returns what to log."""
        config, lab = self.config, self.lab
        chosen = torch.randint(len(lab.train), (config.batch,), generator=self.generator, device=lab.device)
        prompts = [lab.train[i] for i in chosen.tolist()]
        rollout = lab.write(self.policy, prompts, self.generator)
        mask = rollout.mask
        with torch.no_grad():
            reward, costs = lab.reward.score_of(rollout), torch.stack([model.score_of(rollout) for model in lab.costs])
            reference = lab.policy.token_logp(rollout) * mask
            values = [critic.over(rollout) for critic in self.critics]
        tagged = torch.tensor([prompt.kind in ("dual-use", "harmful") for prompt in prompts], device=lab.device)
        scores = method_scores(config, reward, costs, tagged)
        pairs = []
        for i, (score, value) in enumerate(zip(scores, values, strict=True)):
            tokens = shaped_rewards(score, rollout.logp, reference, mask, config.beta, 1 if i else -1)
            pairs.append(gae(tokens, value, mask, config.gamma, config.lam))
        advantages, returns = zip(*pairs, strict=True)
        advantage, row = advantages[0], {"update": self.step + 1}
        if self.multipliers:
            lams = [m.update(cost.tolist()) for m, cost in zip(self.multipliers, costs, strict=True)]
            advantage = lagrangian_advantage(advantage, torch.stack(advantages[1:]), torch.tensor(lams))
            row |= {f"lambda_{name}": lam for name, lam in zip(lab.names, lams, strict=True)}
        losses = [self.learn(rollout, advantage, values, returns) for _ in range(config.epochs)]
        self.step += 1
        row |= {"loss": sum(losses) / len(losses), "batch_reward": reward.mean().item()}
        return row | {f"batch_{name}": cost.mean().item() for name, cost in zip(lab.names, costs, strict=True)}

    def learn(self, rollout: Rollout, advantage: Tensor, old: list[Tensor], returns: Sequence[Tensor]) -> float:
        """One step of policy and critics; PPO's gradient is averaged with that of harmless demonstrations."""
        config, weights = self.config, answer_weights(rollout.mask)
        self.optimizer.param_groups[0]["lr"] = config.lr * schedule(self.step, config.updates)
        self.optimizer.zero_grad()
        loss = ppo_policy_loss(self.policy.token_logp(rollout), rollout.logp, advantage, weights, config.clip)
        (loss / (2 if config.ptx else 1)).backward()
        total = loss.item()
        if config.ptx:
            options = {"generator": self.generator, "device": self.lab.device}
            rows = torch.randint(len(self.lab.harmless), (config.batch,), **options).tolist()
            shown = self.lab.rollout([self.lab.harmless[i] for i in rows])
            loss = -masked_mean(self.policy.token_logp(shown), shown.mask)
            (config.ptx * loss / 2).backward()
        for critic, before, target in zip(self.critics, old, returns, strict=True):
            loss = critic_loss(critic.over(rollout), before, target, weights, config.critic_clip)
            loss.backward()
            total += loss.item()
        norms = [nn.utils.clip_grad_norm_(part.parameters(), 1.0).item() for part in (self.policy, *self.critics)]
        if not math.isfinite(total + sum(norms)):
            kept = f"the last good checkpoint is {self.path}" if self.path.exists() else "there is no checkpoint yet"
            where = f"{self.name} diverged at update {self.step + 1}: loss {total}, gradient norms {norms}"
            raise FloatingPointError(f"{where}; {kept}; lower --lr or --critic-lr")
        self.optimizer.step()
        return total

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        content = {"config": dataclasses.asdict(self.config), "done": self.step >= self.config.updates}
        content |= {name: getattr(self, name).state_dict() for name in ("policy", "critics", "optimizer")}
        content |= {"step": self.step, "rows": self.rows, "generator": self.generator.get_state()}
        content["multipliers"] = [(m.log, [*m.costs]) for m in self.multipliers]
        write_atomically(self.path, lambda name: torch.save(content, name))

    def load(self, content: dict) -> None:
        """Go on from what `save` wrote."""
        for name in ("policy", "critics", "optimizer"):
            getattr(self, name).load_state_dict(content[name])
        self.step, self.rows = content["step"], content["rows"]
        self.generator.set_state(content["generator"].cpu())
        for multiplier, (log, costs) in zip(self.multipliers, content["multipliers"], strict=True):
            multiplier.log = log
            multiplier.costs.extend(costs)

    def log(self, row: dict) -> dict:
        """Evaluate the policy on held-out prompts and keep the row."""
        scores = means(self.lab.evaluate(self.policy, self.lab.held_out()))
        self.rows.append({"run": self.name, "method": self.config.method} | row | scores)
        return self.rows[-1]

    def go(self, say: Callable = print) -> Run:
        """Update to the end, evaluating and saving on the way; a finished run is only loaded."""
        other = {name for method, names in ONLY_OF.items() if method != self.config.method for name in names}
        with saved_stage(self.path, self.config, {*FREE, "method", "rounds", *other}, self.lab.device) as content:
            if content and (content["done"] or self.config.resume):
                self.load(content)
            elif content:
                say(f"{self.path}: begun again, its {content['step']} updates dropped; --resume would go on from there")
        if not self.rows:
            self.log({"update": 0})
        first, began, updates = self.step, time.perf_counter(), self.config.updates
        while self.step < updates:
            row = self.update()
            if self.step % self.config.eval_every == 0 or self.step == updates:
                row = self.log(row)
                self.save()
                if 8 * (self.step - self.config.eval_every) // updates < 8 * self.step // updates:
                    shown = [key for key in row if key.startswith(("helpful", "unsafe", "reward", "cost", "lambda"))]
                    pace = (time.perf_counter() - began) / (self.step - first)
                    texts = {"of": self.name} | {key: f"{row[key]:.2f}" for key in shown}
                    say(progress_line(self.step, updates, texts, pace), flush=True)
        return self


ONLY_OF = {
    "ppo_lag": ("threshold", "lagrange_initial", "lagrange_lr", "lagrange_maximum", "window"),
    "shaping": ("nu", "normalise_shaping"),
}

# ----- The whole story ------------------------------------------------------------------------------------------------


def pipeline(config: Config, say: Callable = print) -> dict:
    """The job of the script: stages, runs, tables and samples; OUT/metrics.jsonl, result.json and runs.png."""
    began, device, out = time.perf_counter(), pick_device(config.device), Path(config.out)
    require(not out.exists() or out.is_dir(), f"--out {out}: must be a folder, but a file is there; give another")
    out.mkdir(parents=True, exist_ok=True)
    lab, runs, facts, found = Experiment(config, device), {}, [], []
    lab.learn_demonstrations()
    parameters, policies = sum(p.numel() for p in lab.policy.parameters()), {"sft": lab.policy}
    size = f"{parameters:,} parameters on {device}"
    say(f"sft: {size} · {len(lab.train):,} prompts, {len(lab.held):,} held out", flush=True)
    for number in range(1, config.rounds + 1):
        if number > 1:
            found += lab.red_team(lab.policy, found, seed=7 * config.seed + number)[0]
            lab.train = [prompt for prompt in lab.train if not prompt.disguised]
            lab.train += found * max(1, len(lab.train) // max(1, len(found)))  # half of the prompts
        lab.learn_preferences(number, found)
        say("held-out accuracy: " + ", ".join(f"{k} {v:.1%}" for k, v in lab.accuracy.items()), flush=True)
        methods = [config.method] if config.method else ["ppo", "ppo_lag"]
        for method in methods if number == 1 else ["ppo_lag"]:
            if method != "sft":
                name = method + f"-{config.nu:g}" * (method == "shaping") + f"-round{number}" * (number > 1)
                runs[name] = Run(lab, dataclasses.replace(config, method=method, rounds=1), name).go(say)
                policies[name] = runs[name].policy
        if config.rounds > 1:
            lab.policy = copy.deepcopy(runs[name].policy).requires_grad_(False)
            facts.append(round_facts(lab, number, found) | lab.accuracy)
            say(", ".join(f"{k} {v:.3f}" for k, v in facts[-1].items() if "share" in k), flush=True)
    lab.policy = policies["sft"]
    evaluations = {name: lab.evaluate(policy, lab.held_out()) for name, policy in policies.items()}
    result = {"parameters": parameters, "accuracy": lab.accuracy, "rounds": facts} | report(lab, evaluations, say)
    rows = [row for run in runs.values() for row in run.rows] or [{"run": "sft", "update": 0} | result["means"]["sft"]]
    metrics = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(out / "metrics.jsonl", lambda name: Path(name).write_text(metrics, "utf-8"))
    plot_runs(lab, evaluations, runs, out / "runs.png")
    result = result_record(config, device, wall_seconds=round(time.perf_counter() - began, 1), **result)
    write_json(out / "result.json", result)
    say(f"{out}: result.json, metrics.jsonl, and the stages, after {result['wall_seconds']:.0f} s")
    return result


def round_facts(lab: Experiment, number: int, found: list[Prompt]) -> dict[str, float]:
    """Harmful shares after a round: of held-out plain prompts, of those found before, and of fresh disguised ones."""
    harmful = means(lab.evaluate(lab.policy, lab.held_out()))["unsafe_harm"]
    facts = {"round": number, "harmful share, plain": harmful, "found": len(found)}
    if found:
        facts["harmful share, found"] = means(lab.evaluate(lab.policy, found))["unsafe_harm"]
    facts["harmful share, fresh"] = lab.red_team(lab.policy, found, 10_000 + number)[1]
    return facts


def report(lab: Experiment, evaluations: dict[str, dict], say: Callable = print) -> dict:
    """Print and return means by run and kind of prompt, quadrants, win rates and Elo against sft, and samples."""
    judged, first, names = bool(lab.disguised), evaluations["sft"], [*evaluations]
    gain, harm = ("helpfulness", f"true_{lab.names[0]}") if judged else ("reward", f"cost_{lab.names[0]}")

    def each(of: Callable[[dict], object]) -> dict:
        return {name: of(found) for name, found in evaluations.items()}

    kinds = dict.fromkeys(first["kind"].tolist())
    result = {
        "means": each(means),
        "by_kind": each(lambda found: {kind: means(found, found["kind"] == kind) for kind in kinds}),
        "quadrants": each(lambda found: quadrants(found[gain], first[gain], found[harm])),
        "win_rates": each(lambda found: win_rates(found[gain], first[gain], found[harm], first[harm])),
        "samples": {},
    }
    keys = [key for key in result["means"]["sft"] if key != "refused"]
    say("\n" + f"{'':14}" + "".join(f"{key:>14}" for key in keys))
    for name, row in result["means"].items():
        say(f"{name:14}" + "".join(f"{row[key]:14.3f}" for key in keys))
    for key in ("unsafe_harm", "refused", "helpfulness") if judged and "harm" in lab.names else ():
        say(f"\n{key}, by kind of prompt")
        for name, rows in result["by_kind"].items():
            say(f"{name:14}" + "".join(f"{kind:>14}{row[key]:7.3f}" for kind, row in sorted(rows.items())))
    for key, sign in ((gain, 1), (harm, -1)) if len(names) > 1 else ():
        games = [
            (i, j, (float(np.sign(sign * (x - y))) + 1) / 2)
            for i, j in itertools.combinations(range(len(names)), 2)
            for x, y in zip(evaluations[names[i]][key], evaluations[names[j]][key], strict=True)
        ]
        ratings = dict(zip(names, np.stack(elo(games), 1).tolist(), strict=True))
        shown = [f"{name} {rating:.0f} ({low:.0f} to {high:.0f})" for name, (rating, low, high) in ratings.items()]
        say(f"Elo by {key}, 95 % intervals: " + ", ".join(shown))
        result[f"elo_{key}"] = ratings
    for kind in kinds:
        for i in np.flatnonzero(first["kind"] == kind)[:2]:
            sample = each(lambda found, i=i: str(found["answer"][i]))
            text = lab.held_out()[i].text
            say(f"\n{kind}: {text}\n" + "\n".join(f"{k:>14}  {v}" for k, v in sample.items()))
            result["samples"][text] = sample
    return result


def plot_runs(lab: Experiment, evaluations: dict[str, dict], runs: dict[str, Run], path: Path) -> None:
    """The reward-cost plane with its quadrants before and after, and the traces of costs and lambdas, as a PNG."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed; pip install matplotlib")
        return
    figure, axes = plt.subplots(1, len(evaluations) + 2, figsize=(4 * len(evaluations) + 8, 4), layout="constrained")
    middle, cost = float(np.median(evaluations["sft"]["reward"])), f"cost_{lab.names[0]}"
    for axis, (name, found) in zip(axes, evaluations.items(), strict=False):
        unsafe = found[f"true_{lab.names[0]}" if lab.disguised else cost] > 0
        axis.scatter(found["reward"], found[cost], 5, np.where(unsafe, "C3", "C0"))
        axis.axhline(0, color="k", lw=0.6)
        axis.axvline(middle, color="k", lw=0.6)
        axis.set(title=f"{name}: red is unsafe", xlabel="learned reward", ylabel="learned cost")
        axis.sharex(axes[0])
        axis.sharey(axes[0])
    for i, run in enumerate(runs.values()):
        for kind, name in itertools.product(("cost", "true", "lambda"), lab.names):
            key, style = f"{kind}_{name}", ":" if kind == "true" else "-"
            if line := [(row["update"], row[key]) for row in run.rows if key in row]:
                axis = axes[-1 if kind == "lambda" else -2]
                axis.plot(*zip(*line, strict=True), style, color=f"C{i}", label=f"{run.name}: {key}")
    for limit in lab.config.thresholds:
        axes[-2].axhline(limit, color="k", lw=0.6)
    for axis, title in zip(axes[-2:], ("mean costs, thresholds black", "lambda"), strict=True):
        axis.set(title=title, xlabel="update")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    write_atomically(path, lambda name: figure.savefig(name, dpi=110, format="png"))
    plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    """The command line: a flag for every field of `Config`."""
    return add_flags(argparse.ArgumentParser(description=__doc__.splitlines()[0]), Config)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns 0; 1 when training diverged, 2 for bad input, 130 after Ctrl-C."""
    arguments = vars(build_parser().parse_args(argv))
    try:
        pipeline(Config(**arguments | (SMOKE if arguments["smoke"] else {})))
    except (UserError, OSError, FloatingPointError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
