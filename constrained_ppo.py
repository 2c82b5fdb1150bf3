# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "tiktoken==0.14.0"]
# ///
"""DOCSTRING"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ----- Config ---------------------------------------------------------------------------------------------------------

METHODS = ("ppo_no_kl", "ppo", "ppo_sat", "all_ppo", "mu_ppo", "xi_ppo")  # Table 1
CONSTRAINED = ("all_ppo", "mu_ppo", "xi_ppo")  # those with multipliers


def flag(default, text: str):
    """A field of `Config`, and a flag with its default and help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; each field is a flag."""

    method: str = flag(
        "", f"one of {', '.join(METHODS)}, nelder_mead; empty: the whole story, ending in ppo and xi_ppo"
    )
    thresholds: str = flag("", "theta of each constrained reward, by commas; empty: the fitted proxy point")
    data: str = flag("", "JSON-lines file of prompt, response and label; empty: small talk by templates")
    policy: str = flag("", "folder of a GPT-2 in Hugging Face layout to start from; empty: a new small model")
    reward: str = flag("meteor,intent", "by commas: meteor, intent, diversity or NAME=MODULE:FUNCTION")
    evaluation: str = flag("", "MODULE:FUNCTION, the true metric; empty: sqrt(lexical match x trigram overlap)")
    objective: str = flag("kl", "what mu_ppo and xi_ppo maximise: kl (-KL, the paper's), or one of the rewards")
    weights: str = flag("", "a_i of each reward for ppo, ppo_no_kl, ppo_sat, by commas; empty: 1; paper: 0.5,1")
    d_model: int = flag(64, "width of a new policy; paper: GPT-2, 768")
    n_layer: int = flag(2, "its blocks; paper: 12")
    n_head: int = flag(4, "its heads; paper: 12")
    length: int = flag(64, "positions of a new policy: prompt and reply together")
    reply: int = flag(20, "most tokens of a reply, as in the paper")
    top_k: int = flag(20, "replies are drawn from the k likeliest tokens, as in the paper; 0: from all")
    temperature: float = flag(1.0, "of the draws, and of every log-probability")
    pretrain_steps: int = flag(600, "supervised steps that make the initial policy pi_0; 0: take --policy as it is")
    pretrain_lr: float = flag(3e-3, "their peak learning rate")
    batch: int = flag(64, "replies an update, and rows a supervised step; paper: 1,280 tokens an update")
    updates: int = flag(80, "PPO updates of a method; paper: 100 (128k tokens)")
    single_updates: int = flag(80, "PPO updates of each single-reward run, which the proxy point is fitted to")
    epochs: int = flag(2, "passes over an update's replies; paper: 5")
    minibatches: int = flag(2, "minibatches a pass; paper: 20")
    lr: float = flag(3e-4, "of the policy; paper: 1e-6, of a model 500 times larger")
    critic_lr: float = flag(1e-3, "of the value network")
    gamma: float = flag(0.99, "discount a token")
    lam: float = flag(0.95, "lambda of generalised advantage estimation")
    clip: float = flag(0.2, "the policy ratio's range in the loss, 1 +- clip")
    max_norm: float = flag(1.0, "largest norm of either network's gradient")
    kl_coefficient: float = flag(0.2, "a_KL at the start of ppo, ppo_sat, all_ppo; it adapts")
    kl_target: float = flag(0.2, "nats a token that it adapts to; paper: 0.5")
    kl_step: float = flag(0.1, "eta, how fast it adapts")
    multiplier_lr: float = flag(0.5, "rate of the multipliers' SGD; paper: 0.1 in 25 times as many minibatches")
    multiplier_momentum: float = flag(0.1, "its momentum; the gradient's norm is cut at 0.5")
    tolerance: float = flag(0.05, "nelder_mead: relative distance from the thresholds at which they count as reached")
    degree: int = flag(4, "of the polynomial fitted to the evaluation; paper: 10, on many more points")
    eval_every: int = flag(2, "updates from one evaluation, checkpoint and row of metrics.jsonl to the next")
    eval_rows: int = flag(400, "held-out prompts of an evaluation, the same ones with the same draws every time")
    seed: int = flag(0, "seed of initialisation, data order and samples")
    device: str = flag("auto", "auto (cuda, mps or cpu, the first there is) or a torch device")
    out: str = flag("out/constrained_ppo", "folder of the stages, metrics, result and picture")
    run: str = flag("", "name of the method's run in --out; empty: the method")
    resume: bool = flag(False, "go on from the last checkpoint of an unfinished run; finished stages are always kept")
    smoke: bool = flag(False, "a tiny model for a few steps, whatever the other flags: does it run?")

    def __post_init__(self):
        require(
            self.method in ("", *METHODS, "nelder_mead"),
            f"--method {self.method!r}: must be one of {', '.join(METHODS)}, nelder_mead; correct it",
        )
        least = {"seed": 0, "top_k": 0, "pretrain_steps": 0, "d_model": 1, "n_layer": 1, "n_head": 1, "degree": 1}
        least |= dict.fromkeys(("batch", "updates", "single_updates", "epochs", "minibatches", "reply", "length"), 1)
        for name, limit in (least | {"eval_every": 1, "eval_rows": 1}).items():
            value = getattr(self, name)
            require(value >= limit, f"--{name.replace('_', '-')} {value}: must be at least {limit}; raise it")
        for name in ("temperature", "clip", "kl_target", "max_norm", "tolerance"):
            value = getattr(self, name)
            require(value > 0, f"--{name.replace('_', '-')} {value}: must be above 0; raise it")
        require(self.batch >= self.minibatches, f"--minibatches {self.minibatches}: must be at most --batch; lower it")
        names = [name for name, _ in reward_specs(self.reward)]
        fits = self.objective in ("kl", *names) and (self.objective == "kl" or len(names) > 1)
        require(fits, f"--objective {self.objective}: must be kl or one of several rewards {names}; correct it")
        numbers(self.thresholds, len(self.constrained), "--thresholds")
        numbers(self.weights, len(names), "--weights")

    @property
    def names(self) -> list[str]:
        """Names of the rewards."""
        return [name for name, _ in reward_specs(self.reward)]

    @property
    def constrained(self) -> list[str]:
        """Names of the rewards that have a threshold: all but the objective."""
        return [name for name in self.names if name != self.objective]


def reward_specs(text: str) -> list[tuple[str, str]]:
    """`meteor,x=module:function` -> [("meteor", ""), ("x", "module:function")]."""
    specs = [(part.split("=")[0].strip(), "=".join(part.split("=")[1:]).strip()) for part in text.split(",")]
    for name, where in specs:
        fits = name.isidentifier() and (name in REWARDS or ":" in where)
        require(fits, f"--reward {text!r}: {name!r} must be one of {', '.join(REWARDS)} or NAME=MODULE:FUNCTION")
    require(len(dict(specs)) == len(specs), f"--reward {text!r}: names a reward twice; give each its own name")
    return specs


def numbers(text: str, count: int, what: str) -> list[float]:
    """`0.3,0.4` -> [0.3, 0.4]; nothing from an empty text."""
    try:
        found = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"{what} {text!r}: must be numbers with commas between; correct it") from None
    fits = not text or (len(found) == count and all(map(math.isfinite, found)))
    require(fits, f"{what} {text!r}: must be {count} finite numbers, one a reward; correct it")
    return found


SMOKE = {
    "d_model": 16, "n_layer": 1, "n_head": 2, "pretrain_steps": 6, "batch": 8, "updates": 3, "single_updates": 6,
    "eval_every": 1, "eval_rows": 12, "degree": 2, "reply": 8, "epochs": 1,
}  # fmt: skip
FREE = ("device", "out", "run", "resume", "smoke")  # what may differ on resuming
OF_METHOD = (  # what the stages before the methods do not depend on
    "method", "thresholds", "objective", "weights", "updates", "kl_coefficient", "kl_target", "kl_step",
    "multiplier_lr", "multiplier_momentum", "tolerance", "degree",
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


# ----- Data: small talk whose pre-training part is dirty -----------------------------------------------------------------

WORDS = {
    "person": "ana ben cleo dan eva finn", "adjective": "red blue green old new tiny", "time": "today tonight tomorrow soon",
    "object": "hat lamp clock book chair map kettle drum", "place": "market station library harbour school museum",
    "quality": "nice cheap heavy strange pretty useful", "relative": "sister brother mother uncle friend",
}  # fmt: skip
OPENING = "{person} has a {adjective} {object} from the {place} . "
ASKS = {  # kind: how it is put, and the odds of each act in a reply to it, in the order of REPLIES
    "request": (("can someone help with it ?", "who could carry it home ?"), (10, 10, 25, 55)),
    "question": (("what do you know about it ?", "do you like it ?"), (55, 25, 10, 10)),
    "story": (("did you hear the story ?", "you should have seen it ."), (30, 55, 5, 10)),
    "plan": (("what should we do with it ?", "we need a plan for it ."), (10, 15, 50, 25)),
}
REPLIES = {  # act: four ways to say it, in falling order of frequency; another place and quality than the prompt's are free
    "inform": (
        "it is a {quality} {object} from the {place} .", "my {relative} had a {adjective} {object} too .",
        "{person} found the {object} at the {other} .", "that {object} looks {quality} and {adjective} .",
    ),
    "question": (
        "where did {person} get the {object} ?", "is the {adjective} {object} very {quality} ?",
        "does your {relative} want a {object} ?", "how {quality} is the {place} {time} ?",
    ),
    "directive": (
        "please give the {object} to my {relative} .", "bring the {object} to the {other} {time} .",
        "ask {person} about the {adjective} {object} .", "do not leave it at the {other} .",
    ),
    "commissive": (
        "i will take the {object} to {person} {time} .", "i can carry the {adjective} {object} {time} .",
        "we will meet {person} at the {other} .", "let me clean the {object} for you {time} .",
    ),
}  # fmt: skip
DULL = ("i see .", "ok .", "yes .", "i do not know .")


@dataclass(frozen=True)
class Row:
    """A prompt, a reply to it, the reply's label (its dialogue act), and where the row stands."""

    prompt: str
    response: str
    label: str
    where: str


def small_talk(seed: int = 0, sizes: tuple[int, ...] = (4000, 2000, 1000)) -> tuple[list[Row], ...]:
    """Rows to pre-train on, to train on and held out; only the first are dirty: half dull, a fifth rambling."""
    r = random.Random(seed)

    def row(number: int, dirty: bool) -> Row:
        slots = {name: r.choice(words.split()) for name, words in WORDS.items()}
        slots["other"] = r.choice(WORDS["place"].split())
        asks, odds = ASKS[r.choice(list(ASKS))]
        act, second = r.choices(list(REPLIES), odds, k=2)
        reply, more = (r.choices(REPLIES[name], (4, 3, 2, 1))[0] for name in (act, second))
        kind = r.random() if dirty else 1.0
        if kind < 0.5:
            act, reply = "dull", r.choice(DULL)
        elif kind < 0.7:
            reply = f"{reply[:-2]} {more}"
        return Row((OPENING + r.choice(asks)).format(**slots), reply.format(**slots), act, f"small talk, row {number}")

    parts = [[row(i, dirty=part == 0) for i in range(size)] for part, size in enumerate(sizes)]
    return tuple(parts)


def read_rows(path: str) -> tuple[list[Row], ...]:
    """Rows of a JSON-lines file, the same to pre-train and to train on, every tenth held out."""
    require(Path(path).is_file(), f"--data {path}: no such file; give a JSON-lines file of prompt, response and label")
    rows = []
    for number, line in enumerate(Path(path).read_text("utf-8-sig").split("\n"), 1):
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line) if line.strip() else None
        except ValueError:
            raise UserError(f"{where}: {line[:60]!r} must be a JSON object; correct it") from None
        for name in ("prompt", "response", "label") if fields is not None else ():
            fits = isinstance(fields, dict) and isinstance(fields.get(name), str)
            require(fits, f"{where}: {name!r} is missing, must be a text; add it")
        if fields is not None:
            rows.append(Row(fields["prompt"], fields["response"], fields["label"], where))
    require(len(rows) >= 20, f"{path}: {len(rows)} rows, must be at least 20; add some")
    valid = rows[::10]
    train = [row for i, row in enumerate(rows) if i % 10]
    return train, train, valid


class Words:
    """A tokenizer that knows the words of given texts, between spaces; id 0 ends a reply, and pads."""

    def __init__(self, texts: Iterator[str]):
        self.words = ["<|endoftext|>", *sorted({word for text in texts for word in text.split()})]
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.size, self.end = len(self.words), 0

    def encode(self, text: str) -> list[int]:
        """Ids of the words of a text."""
        return [self.ids[word] for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return " ".join(self.words[i] for i in ids)


class BytePairs:
    """GPT-2's byte-level BPE by tiktoken, from a checkpoint folder's vocab.json or tokenizer.json."""

    def __init__(self, folder: str):
        path = next(
            (Path(folder) / name for name in ("vocab.json", "tokenizer.json") if (Path(folder) / name).is_file()), None
        )
        require(path is not None, f"{folder}: holds neither vocab.json nor tokenizer.json; copy one there")
        vocab = json.loads(path.read_text("utf-8"))
        vocab = vocab["model"]["vocab"] if path.name == "tokenizer.json" else vocab
        self.end = vocab.pop("<|endoftext|>", len(vocab))  # where tokenizer.json keeps it apart, it is the last
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes each byte as a visible character
        hidden = [b for b in range(256) if b not in visible]
        byte_of = {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
        try:
            ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items()}  # ids stand in order of merging
            self.encoding = tiktoken.Encoding(
                folder, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": self.end}
            )
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{path}: is no vocabulary of GPT-2's kind ({str(error)[:60]}); give a GPT-2 folder"
            ) from None
        self.size = max(self.end, *vocab.values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without the space in front."""
        return self.encoding.decode(list(ids)).strip()


GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's split pattern


# ----- Scores of a reply against its reference --------------------------------------------------------------------------


def meteor(reference: Sequence, response: Sequence) -> float:
    """METEOR of two token lists by exact matches alone, 0 to 1 (Banerjee and Lavie 2005).

    The harmonic mean of precision and recall, recall weighted 9 times, less up to half where matches are scattered.
    A word is matched from the back to the last equal word still free, as in NLTK.
    """
    places = collections.defaultdict(list)
    for j, word in enumerate(reference):
        places[word].append(j)
    pairs = [(i, places[word].pop()) for i, word in reversed(list(enumerate(response))) if places.get(word)]
    if not pairs:
        return 0.0
    pairs.sort()
    chunks = 1 + sum(after != (i + 1, j + 1) for (i, j), after in itertools.pairwise(pairs))
    precision, recall = len(pairs) / len(response), len(pairs) / len(reference)
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return mean * (1 - 0.5 * (chunks / len(pairs)) ** 3)


def ngrams(words: Sequence, n: int) -> collections.Counter:
    """How often each run of n words occurs."""
    return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu(references: list[list], responses: list[list]) -> float:
    """Corpus BLEU, 0 to 1: up to 4-grams, brevity penalty, no smoothing (Papineni et al. 2002)."""
    logs = 0.0
    for n in range(1, 5):
        pairs = [(ngrams(a, n), ngrams(b, n)) for a, b in zip(references, responses, strict=True)]
        total = sum(b.total() for _, b in pairs)
        hits = sum((a & b).total() for a, b in pairs)
        if not hits:
            return 0.0
        logs += math.log(hits / total) / 4
    ours, theirs = sum(map(len, responses)), sum(map(len, references))
    return math.exp(logs + min(0.0, 1 - theirs / ours))


def rouge(reference: list, response: list, n: int = 2) -> float:
    """ROUGE-n F1 of a reply, 0 to 1 (Lin 2004)."""
    a, b = ngrams(reference, n), ngrams(response, n)
    hits = (a & b).total()
    return 2 * hits / (a.total() + b.total()) if hits else 0.0


def overlap(references: list[list], responses: list[list], n: int = 3) -> float:
    """Sum over n-grams of the smaller of their shares in the two corpora, 0 to 1: same variety, same commonness."""
    a, b = (sum((ngrams(words, n) for words in side), collections.Counter()) for side in (references, responses))
    return sum(min(a[gram] / a.total(), b[gram] / b.total()) for gram in a.keys() & b.keys())


def true_metric(prompts: list[str], responses: list[str], references: list[str], labels: list[str]) -> float:
    """The evaluation metric r*: geometric mean of lexical match (BLEU, ROUGE-2) and of variety as the references have it.

    A reply that is always the same scores low in the second, one that babbles in both.
    """
    a, b = [text.split() for text in references], [text.split() for text in responses]
    lexical = (bleu(a, b) + sum(map(rouge, a, b)) / len(a)) / 2
    return math.sqrt(lexical * overlap(a, b))


def meteor_reward(prompts, responses, references, labels) -> list[float]:
    """METEOR of each reply against its reference."""
    return [meteor(a.split(), b.split()) for a, b in zip(references, responses, strict=True)]


def diversity_reward(prompts, responses, references, labels) -> list[float]:
    """How rare a reply's bigrams are among the replies drawn with it: mean of 1 / occurrences, 0 to 1."""
    grams = [ngrams(text.split(), 2) for text in responses]
    counts = sum(grams, collections.Counter())
    return [sum(k / counts[g] for g, k in own.items()) / max(1, own.total()) for own in grams]


REWARDS = ("meteor", "intent", "diversity")  # the built-in ones


# ----- The method ---------------------------------------------------------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is 1: padding after end-of-text never counts."""
    return (x * mask).sum() / mask.sum()


def normalise(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages with mean 0 and standard deviation 1 over the tokens that count; shapes (B, T)."""
    mean = masked_mean(advantages, mask)
    deviation = masked_mean((advantages - mean) ** 2, mask).sqrt()
    return (advantages - mean) / (deviation + 1e-8) * mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and TD(lambda) returns, all (B, T), by generalised advantage estimation (Schulman et al. 2016).

    A reply is an episode: nothing follows its last token, so the value behind it is 0 and padding gives 0.
    """
    values, last = values * mask, torch.zeros_like(rewards[:, 0])
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        after = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(last)
        delta = rewards[:, t] + gamma * after - values[:, t]
        last = (delta + gamma * lam * last) * mask[:, t]
        advantages[:, t] = last
    return advantages, advantages + values


def ppo_policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective, negated, mean over the tokens that count (Schulman et al. 2017, eq. 7); all (B, T)."""
    ratio = (logp - old_logp).exp()
    worse = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -masked_mean(worse, mask)


def multipliers(method: str, raw: Tensor) -> Tensor:
    """Bounded multipliers (N,) from free parameters (N,): at or above 0 for mu and All, of either sign for xi (§4.2)."""
    require(method in CONSTRAINED, f"{method!r}: must be one of {CONSTRAINED} to have multipliers; choose one")
    return raw.tanh() if method == "xi_ppo" else raw.sigmoid()


def mix_advantages(method: str, task_advantage: Tensor, reward_advantages: Tensor, multipliers: Tensor) -> Tensor:
    """The Lagrangian's advantage (B, T) from those of the task (B, T) and of the rewards (B, T, N), each normalised.

    mu, xi: (N - sum m) A_task + sum m_i A_i (eq. 4.4), weights that sum to N; All-PPO's constraints are upper bounds,
    so its m_i count against the reward. The other methods have no constraints: the task's advantage as it is.
    """
    if method not in CONSTRAINED:
        return task_advantage
    constraints = (reward_advantages * multipliers).sum(-1)
    task = (reward_advantages.shape[-1] - multipliers.sum()) * task_advantage
    return task - constraints if method == "all_ppo" else task + constraints


def multiplier_loss(method: str, raw: Tensor, returns: Tensor, thresholds: Tensor) -> Tensor:
    """What the multipliers minimise, raw, returns and thresholds (N,): sum m_i (J_i - theta_i), All-PPO its negative.

    J_i is the minibatch's mean return, not the critic's estimate, which is poor early on. Below the threshold m_i rises,
    for All-PPO above it.
    """
    violations = (multipliers(method, raw) * (returns - thresholds)).sum()
    return -violations if method == "all_ppo" else violations


def saturated_reward(rewards: Tensor, thresholds: Tensor, weights: Tensor) -> Tensor:
    """PPO-SAT's reward (B,) = -sum a_i (r_i - theta_i)^2 of rewards (B, N) (Table 1)."""
    return -(weights * (rewards - thresholds) ** 2).sum(-1)


def adaptive_kl(coefficient: float, kl: float, target: float, step: float = 0.1) -> float:
    """The next a_KL: up where the mean KL a token is over its target, down where it is under it (App. B)."""
    error = (kl - target) / target
    return coefficient * (1 + step * min(max(error, -0.2), 0.2))


def token_rewards(method: str, rewards: Tensor, r0: Tensor, kl: Tensor, coefficient: float, mask: Tensor) -> Tensor:
    """What the N + 1 critic heads estimate, (B, T, N + 1), from rewards (B, N), r0 (B,) and kl = log(pi/pi_0) (B, T).

    Rewards of a reply stand at its last token, -kl at each. The last head is the task's: r0, plus coefficient x -kl; mu
    and xi with the paper's objective have r0 = 0 and coefficient 1. All-PPO has the KL term in each reward.
    """
    penalty = -coefficient * kl * mask
    ends = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))
    each = ends[..., None] * rewards[:, None]
    if method == "all_ppo":
        each = each + penalty[..., None]
    return torch.cat([each, (ends * r0[:, None] + penalty)[..., None]], -1)


# ----- Proxy points and Nelder-Mead ---------------------------------------------------------------------------------------


def kernel_density(points: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The Gaussian kernel density of points (n, N) as a function (m, N) -> (m,), bandwidth by Scott's rule."""
    n, N = points.shape
    covariance = np.atleast_2d(np.cov(points.T)) * n ** (-2 / (N + 4))
    inverse, norm = np.linalg.inv(covariance), n * math.sqrt(np.linalg.det(2 * math.pi * covariance))

    def density(x: np.ndarray) -> np.ndarray:
        difference = x[:, None] - points
        return np.exp(-0.5 * np.einsum("mni,ij,mnj->mn", difference, inverse, difference)).sum(1) / norm

    return density


def polynomial_surface(rewards: np.ndarray, evaluation: np.ndarray, degree: int) -> Callable[[np.ndarray], np.ndarray]:
    """The polynomial of that total degree nearest to evaluation (n,) over rewards (n, N), slightly ridged."""
    low, span = rewards.min(0), np.maximum(np.ptp(rewards, axis=0), 1e-12)
    powers = [c for d in range(degree + 1) for c in itertools.combinations_with_replacement(range(rewards.shape[1]), d)]

    def features(x: np.ndarray) -> np.ndarray:
        x = 2 * (x - low) / span - 1
        return np.stack([x[:, list(c)].prod(1) for c in powers], 1)

    A = features(rewards)
    ridge = 1e-4 * len(A) * np.diag([float(len(c) > 0) for c in powers])
    solution = np.linalg.solve(A.T @ A + ridge, A.T @ evaluation)
    return lambda x: features(x) @ solution


def fit_proxy_points(rewards: np.ndarray, evaluation: np.ndarray, degree: int) -> np.ndarray:
    """The proxy point (N,): where the evaluation (n,), fitted over rewards (n, N), is highest (Algorithm 2).

    Only where the samples are dense enough does the fit count: as dense as at nine tenths of the samples. Candidates
    are drawn from the kernel density itself, then ever closer around the best, so that any N will do.
    """
    rewards, evaluation = np.asarray(rewards, float), np.asarray(evaluation, float)
    n, N = rewards.shape
    need = math.comb(N + degree, degree)
    require(n >= need, f"{n} evaluations for {need} coefficients of degree {degree}: must be no fewer; lower --degree")
    spread = rewards.std(0)
    if not (spread > 0).all():
        raise UserError(f"a reward never changed ({rewards[0]}): there is nothing to fit; give --thresholds")
    scaled = (rewards - rewards.mean(0)) / spread
    scaled = scaled + 1e-3 * np.random.default_rng(0).standard_normal(scaled.shape)  # rewards may be one another's copy
    surface, density = polynomial_surface(scaled, evaluation, degree), kernel_density(scaled)
    floor, generator = np.quantile(density(scaled), 0.1), np.random.default_rng(1)
    best, width = scaled, n ** (-1 / (N + 4))
    for _ in range(6):
        noise = generator.standard_normal((4000, N)) * width
        x = np.concatenate([best, np.repeat(best, -(-4000 // len(best)), 0)[:4000] + noise])
        x = x[density(x) >= floor]
        best, width = x[np.argsort(-surface(x))[:10]], width / 4
    return rewards.mean(0) + best[0] * spread


class NelderMead:
    """Nelder and Mead's simplex search, minimising, one evaluation at a time; coefficients 1, 2, 1/2, 1/2 (Algorithm 3).

    `ask()` gives the point (N,) to evaluate next, `tell(value)` its value; `told` holds all values, from which a search
    can be gone through again.
    """

    def __init__(self, simplex):
        self.simplex = np.array(simplex, float)
        N = self.simplex.shape[-1]
        fits = self.simplex.ndim == 2 and len(self.simplex) == N + 1 and np.isfinite(self.simplex).all()
        require(fits, f"a simplex of shape {self.simplex.shape}: must be N + 1 finite points of N numbers; correct it")
        self.values, self.told = np.full(N + 1, np.inf), []
        self.search = self._search()
        self.asked = next(self.search)

    def ask(self) -> np.ndarray:
        """The point to evaluate next; the same until `tell`."""
        return self.asked.copy()

    def tell(self, value: float) -> None:
        """The value at the point asked for; NaN counts as infinitely bad."""
        self.told.append(float(value))
        self.asked = self.search.send(math.inf if math.isnan(value) else float(value))

    def best(self) -> tuple[np.ndarray, float]:
        """The best corner so far and its value."""
        i = int(self.values.argmin())
        return self.simplex[i].copy(), float(self.values[i])

    def _search(self):
        simplex, values = self.simplex, self.values
        for i in range(len(simplex)):
            values[i] = yield simplex[i]
        while True:
            order = np.argsort(values, kind="stable")
            simplex[:], values[:] = simplex[order], values[order]
            centre, worst = simplex[:-1].mean(0), simplex[-1].copy()
            point = 2 * centre - worst  # reflection
            value = yield point
            if value < values[0]:
                further = 3 * centre - 2 * worst  # expansion
                if (other := (yield further)) < value:
                    point, value = further, other
            elif value >= values[-2]:
                outside = value < values[-1]
                nearer = (3 * centre - worst) / 2 if outside else (centre + worst) / 2  # contraction
                other = yield nearer
                if other <= value if outside else other < values[-1]:
                    point, value = nearer, other
                else:
                    for i in range(1, len(simplex)):  # shrinking towards the best corner
                        simplex[i] = (simplex[0] + simplex[i]) / 2
                        values[i] = yield simplex[i]
                    continue
            simplex[-1], values[-1] = point, value


# ----- The policy: GPT-2 --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPT2Config:
    """The sizes of a GPT-2, by Hugging Face's names."""

    vocab_size: int
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self):
        fits = self.n_embd % self.n_head == 0
        require(fits, f"width {self.n_embd}: must be a multiple of the number of heads, {self.n_head}; change either")


class Block(nn.Module):
    """Attention, then a GELU network, each behind a LayerNorm and added to the stream."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        D, self.n_head = config.n_embd, config.n_head
        self.ln_1, self.ln_2 = (nn.LayerNorm(D, config.layer_norm_epsilon) for _ in range(2))
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(D, 3 * D), "c_proj": nn.Linear(D, D)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 4 * D), "c_proj": nn.Linear(4 * D, D)})

    def forward(self, x: Tensor, mask: Tensor, cache: list[Tensor] | None) -> Tensor:
        """x (B, L, D); mask (B, 1, L, S) is 0 where a query sees a key, -inf elsewhere; cache: all S keys, values."""
        B, L, D = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).view(B, L, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, D / heads)
        if cache is not None:
            S = mask.shape[-1]
            for old, new in zip(cache, (k, v), strict=True):
                old[:, :, S - L : S] = new
            k, v = (old[:, :, :S] for old in cache)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(B, L, D))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """GPT-2 without dropout, whose noise would make the ratio of PPO's first pass differ from 1.

    `heads` outputs (a value network) in place of the logits, starting at 0.
    """

    def __init__(self, config: GPT2Config, heads: int = 0):
        super().__init__()
        self.config, D = config, config.n_embd
        self.wte, self.wpe = nn.Embedding(config.vocab_size, D), nn.Embedding(config.n_positions, D)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(D, config.layer_norm_epsilon)
        self.head = nn.Linear(D, heads) if heads else None
        for name, parameter in self.named_parameters():
            if "ln_" not in name:
                std = 0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02
                std = 0.0 if "bias" in name or "head" in name else std
                nn.init.normal_(parameter, std=std)

    def new_cache(self, batch: int, capacity: int) -> list[list[Tensor]]:
        """Room for the keys and values of `capacity` positions, a pair a block."""
        shape = (batch, self.config.n_head, capacity, self.config.n_embd // self.config.n_head)
        return [[self.wte.weight.new_empty(shape) for _ in range(2)] for _ in self.h]

    def hidden(self, tokens: Tensor, valid: Tensor, cache: list | None = None) -> Tensor:
        """The stream (B, L, D) of tokens (B, L), the last L of S positions; valid (B, S) is False on padding.

        Positions count valid tokens only, so padding in front changes nothing.
        """
        L, S = tokens.shape[1], valid.shape[1]
        positions = (valid.long().cumsum(1) - 1).clamp(min=0)[:, S - L :]
        sees = torch.ones(L, S, dtype=torch.bool, device=tokens.device).tril(S - L) & valid[:, None]
        sees |= torch.eye(S, dtype=torch.bool, device=tokens.device)[S - L :]  # padding sees itself, so no row is empty
        x = self.wte(tokens) + self.wpe(positions)
        mask = torch.zeros(sees.shape, dtype=x.dtype, device=x.device).masked_fill(~sees, -math.inf)[:, None]
        for i, block in enumerate(self.h):
            x = block(x, mask, cache and cache[i])
        return self.ln_f(x)

    def read(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) by the embedding's own weights, or values (..., heads)."""
        return self.head(hidden) if self.head is not None else F.linear(hidden, self.wte.weight)

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) of tokens (B, L)."""
        return self.read(self.hidden(tokens, torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid))

    def over_replies(self, prompts: Tensor, valid: Tensor, replies: Tensor, mask: Tensor) -> Tensor:
        """What `read` gives (B, T, ...) just before each token of replies (B, T) to prompts (B, P), padded in front."""
        tokens = torch.cat([prompts, replies[:, :-1]], 1)
        valid = torch.cat([valid, mask[:, :-1].bool()], 1)
        return self.read(self.hidden(tokens, valid)[:, prompts.shape[1] - 1 :])


def read_policy(folder: str) -> GPT2:
    """The GPT-2 in a local folder of Hugging Face layout; raises ValueError listing all that does not fit."""
    fields, sizes = read_fields(folder), [field.name for field in dataclasses.fields(GPT2Config)]
    needed = {"model_type": "gpt2", "activation_function": "gelu_new", "tie_word_embeddings": True, "n_inner": None}
    needed |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    problems = [f"{k} = {fields[k]!r}, must be {v!r}" for k, v in needed.items() if fields.get(k, v) != v]
    problems += [] if "vocab_size" in fields else ["vocab_size is missing"]
    require(not problems, f"{folder}: cannot be done here: {'; '.join(problems)}; give a plain GPT-2")
    model = GPT2(GPT2Config(**{name: fields[name] for name in sizes if name in fields}))
    tensors = {k.removeprefix("transformer."): v for k, v in read_tensors(Path(folder)).items()}
    buffers = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # masks of old files, and the tied embedding
    tensors = {k: v for k, v in tensors.items() if not k.endswith(buffers)}
    for name in tensors:
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            tensors[name] = tensors[name].T  # theirs are (in, out)
    check_tensors(folder, model.state_dict(), tensors)
    model.load_state_dict(tensors)
    return model


def token_logp(logits: Tensor, tokens: Tensor, temperature: float, support: Tensor | None) -> Tensor:
    """log pi (B, T) of the tokens drawn, at the temperature and among the top-k tokens (B, T, k) they were drawn from.

    With the full softmax instead, the ratio would be that of another policy than the one that wrote the replies.
    """
    logits = logits / temperature
    chosen = logits.gather(-1, tokens[..., None]).squeeze(-1)
    return chosen - (logits if support is None else logits.gather(-1, support)).logsumexp(-1)


@dataclass
class Replies:
    """Replies (B, T) to prompts (B, P): both padded, prompts in front; what PPO needs to know of them."""

    prompts: Tensor
    valid: Tensor  # (B, P) bool, False on padding
    tokens: Tensor
    mask: Tensor  # (B, T) 1 up to and with end-of-text, then 0
    logp: Tensor  # (B, T) of the policy that wrote them
    support: Tensor | None  # (B, T, k) tokens each was drawn from, None: all

    def rows(self, index: Tensor) -> tuple:
        """Arguments of `GPT2.over_replies` for some of the replies."""
        return self.prompts[index], self.valid[index], self.tokens[index], self.mask[index]


@torch.no_grad()
def write_replies(
    policy: GPT2, prompts: list[list[int]], end: int, config: Config, generator: torch.Generator
) -> Replies:
    """Draw a reply to each prompt with a key-value cache; a reply ends with end-of-text, or when it is full."""
    device = policy.wte.weight.device
    tokens, valid = (x.to(device) for x in pad_in_front(prompts))
    valid, B, P, whole = valid.clone(), *tokens.shape, valid
    cache, alive = policy.new_cache(B, P + config.reply), torch.ones(B, dtype=torch.bool, device=device)
    columns, x = [], tokens
    k = min(config.top_k, policy.config.vocab_size)
    for _ in range(config.reply):
        logits = policy.read(policy.hidden(x, whole, cache)[:, -1]) / config.temperature
        values, support = logits.topk(k) if k else (logits, None)
        logp = values.log_softmax(-1)
        drawn = torch.multinomial(logp.exp(), 1, generator=generator)
        token = support.gather(-1, drawn) if k else drawn
        columns.append((token.where(alive[:, None], end), alive[:, None].float(), logp.gather(-1, drawn), support))
        whole = torch.cat([whole, alive[:, None]], 1)
        alive = alive & (token[:, 0] != end)
        x = columns[-1][0]
        if not alive.any():
            break
    drawn, mask, logp, support = zip(*columns, strict=True)
    mask = torch.cat(mask, 1)
    return Replies(
        tokens, valid, torch.cat(drawn, 1), mask, torch.cat(logp, 1) * mask, torch.stack(support, 1) if k else None
    )


def pad_in_front(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids as a tensor (B, P) with zeros in front of the short ones, and True where there are ids."""
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(width) >= width - lengths[:, None]


def read_fields(folder: str) -> dict:
    """The config.json of a checkpoint folder."""
    path = Path(folder) / "config.json"
    rule = "must be a folder with one and its weights; correct the path"
    require(path.is_file(), f"{folder}: holds no config.json, {rule}")
    return json.loads(path.read_text("utf-8"))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors or pytorch_model.bin, or of the shards in their .index.json, in float32."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        shards = json.loads(index.read_text("utf-8"))["weight_map"].values() if index.is_file() else [name]
        if not index.is_file() and not (folder / name).is_file():
            continue
        tensors = {}
        for shard in sorted(set(shards)):
            require(
                (folder / shard).is_file(), f"{folder / shard}: named in {index.name}, but not there; copy it there"
            )
            tensors |= load_torch(folder / shard)
        return {k: v.float() for k, v in tensors.items()}
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


# ----- The stages before PPO ------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """The dialogue act of a reply: a convolution over three words, the maximum over the reply, a linear layer."""

    def __init__(self, vocab_size: int, labels: int, width: int = 48):
        super().__init__()
        self.embed = nn.Embedding(vocab_size + 1, width, padding_idx=vocab_size)  # the last id pads
        self.conv = nn.Conv1d(width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, labels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, labels) of tokens (B, T), padded with the last id."""
        seen = (tokens != self.embed.padding_idx)[:, None]
        x = self.conv(self.embed(tokens).transpose(1, 2)).relu() * seen
        return self.head(x.amax(-1))


class Task:
    """What PPO starts from: rows, tokenizer, initial policy pi_0, rewards and evaluation metric."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.dirty, self.train, self.valid = read_rows(config.data) if config.data else small_talk()
        self.valid = self.valid[: config.eval_rows]
        every = [*self.dirty, *self.train, *self.valid]
        self.tokenizer = (
            BytePairs(config.policy) if config.policy else Words(t for r in every for t in (r.prompt, r.response))
        )
        self.labels = sorted({row.label for row in every})
        torch.manual_seed(config.seed)
        if config.policy:
            self.policy = read_policy(config.policy)
            fits = self.tokenizer.size <= self.policy.config.vocab_size
            require(
                fits, f"{config.policy}: its tokenizer has {self.tokenizer.size} tokens, more than its model; mend it"
            )
        else:
            sizes = (self.tokenizer.size, config.length, config.d_model, config.n_layer, config.n_head)
            self.policy = GPT2(GPT2Config(*sizes))
        self.policy.to(device)
        self.classifier = Classifier(self.policy.config.vocab_size, len(self.labels)).to(device)
        self.ids = {row: self.encode(row) for row in dict.fromkeys(every)}
        self.functions = [self.resolve(name, where) for name, where in reward_specs(config.reward)]
        self.metric = load_function("--evaluation", config.evaluation) if config.evaluation else true_metric

    def encode(self, row: Row) -> tuple[list[int], list[int]]:
        """Ids of a row's prompt and of its reply with end-of-text; raises where they pass the model's length."""
        prompt = self.tokenizer.encode(row.prompt)
        space = "" if row.prompt[-1:].isspace() else " "
        reply = [*self.tokenizer.encode(space + row.response), self.tokenizer.end]
        size, limit = len(prompt) + max(len(reply), self.config.reply), self.policy.config.n_positions
        rule = "must be at most the model's length"
        require(
            size <= limit, f"{row.where}: prompt and reply take {size} tokens, {rule}, {limit}; shorten them or --reply"
        )
        require(len(prompt) > 0, f"{row.where}: the prompt is empty, must hold a token; give one")
        return prompt, reply

    def resolve(self, name: str, where: str) -> Callable:
        """The function of a reward: (prompts, responses, references, labels) -> (B,) numbers."""
        if where:
            return load_function(f"--reward {name}", where)
        return {"meteor": meteor_reward, "diversity": diversity_reward, "intent": self.intent_reward}[name]

    @torch.no_grad()
    def intent_reward(self, prompts, responses, references, labels) -> list[float]:
        """1 where the classifier gives a reply the reference's dialogue act, else 0."""
        predicted = self.classifier(self.words([self.tokenizer.encode(text) for text in responses])).argmax(-1)
        return [float(self.labels[i] == label) for i, label in zip(predicted.tolist(), labels, strict=True)]

    def words(self, replies: list[list[int]]) -> Tensor:
        """Ids as the classifier takes them, at least one a reply, padded behind."""
        width, pad = max(1, *map(len, replies)), self.classifier.embed.padding_idx
        return torch.tensor([ids + [pad] * (width - len(ids)) for ids in replies], device=self.device)

    def texts(self, replies: Replies) -> list[str]:
        """The replies as texts, without end-of-text."""
        lengths = replies.mask.sum(1).long().tolist()
        rows = [row[:n] for row, n in zip(replies.tokens.tolist(), lengths, strict=True)]
        return [self.tokenizer.decode([i for i in row if i != self.tokenizer.end]) for row in rows]

    def score(self, rows: list[Row], texts: list[str]) -> Tensor:
        """Every reward of every reply, (B, N); raises UserError where one is not a finite number a reply."""
        columns = []
        for name, function in zip(self.config.names, self.functions, strict=True):
            values = torch.as_tensor(np.asarray(function(*columns_of(rows, texts)), dtype=np.float32))
            rule = f"must be ({len(rows)},), a number for each reply; correct its function"
            require(values.shape == (len(rows),), f"--reward {name}: gave shape {tuple(values.shape)}, {rule}")
            bad = (~values.isfinite()).nonzero()[:, 0].tolist()
            require(
                not bad,
                f"--reward {name}: gave {values[bad[:1]].tolist()} for {texts[(bad or [0])[0]]!r}, must be finite",
            )
            columns.append(values)
        return torch.stack(columns, 1).to(self.device)

    def evaluate(self, policy: GPT2, reference: GPT2) -> tuple[dict, list[str]]:
        """The true metric, mean rewards and KL on the held-out prompts, always with the same draws; and the replies."""
        generator, replies, total = torch.Generator(self.device).manual_seed(17), [], torch.zeros(2)
        for i in range(0, len(self.valid), 200):
            prompts = [self.ids[row][0] for row in self.valid[i : i + 200]]
            batch = write_replies(policy, prompts, self.tokenizer.end, self.config, generator)
            total += torch.stack([(log_ratio(batch, reference, self.config)).sum(), batch.mask.sum()]).cpu()
            replies += self.texts(batch)
        scores = self.score(self.valid, replies).mean(0).tolist()
        value = float(self.metric(*columns_of(self.valid, replies)))
        require(
            math.isfinite(value), f"--evaluation {self.config.evaluation}: gave {value}, must be finite; correct it"
        )
        result = {
            "evaluation": value,
            "kl": (total[0] / total[1]).item(),
            "tokens_a_reply": total[1].item() / len(replies),
        }
        result["distinct_replies"] = len(set(replies)) / len(replies)
        return result | dict(zip(self.config.names, scores, strict=True)), replies


def columns_of(rows: list[Row], texts: list[str]) -> tuple[list[str], ...]:
    """The arguments of a reward and of an evaluation metric: prompts, responses, references, labels."""
    return [row.prompt for row in rows], texts, [row.response for row in rows], [row.label for row in rows]


def load_function(what: str, where: str) -> Callable:
    """The function MODULE:FUNCTION, the module looked for in the current folder too."""
    module, _, name = where.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{what} {where!r}: must be MODULE:FUNCTION, but {error}; correct it") from None
    finally:
        sys.path.remove(os.getcwd())


@torch.no_grad()
def log_ratio(replies: Replies, reference: GPT2, config: Config) -> Tensor:
    """log(pi/pi_0) (B, T) of the tokens drawn: its mean over pi's draws estimates the KL a token, without bias."""
    logits = reference.over_replies(replies.prompts, replies.valid, replies.tokens, replies.mask)
    theirs = token_logp(logits, replies.tokens, config.temperature, replies.support)
    return (replies.logp - theirs) * replies.mask


def pretrain(task: Task) -> float:
    """Supervised steps on the dirty rows, the loss on the reply alone. Returns the last losses' mean."""
    config, losses = task.config, []
    order = random.Random(config.seed)
    optimizer = torch.optim.AdamW(task.policy.parameters(), lr=config.pretrain_lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.pretrain_lr, max(2, config.pretrain_steps), pct_start=0.1
    )
    for _ in range(config.pretrain_steps):
        prompts, replies = zip(*(task.ids[row] for row in order.choices(task.dirty, k=config.batch)), strict=True)
        prompts, valid = pad_in_front(list(prompts))
        tokens, mask = pad_in_front([row[::-1] for row in replies])
        tokens, mask = tokens.flip(1), mask.flip(1).float()  # padded behind
        batch = [x.to(task.device) for x in (prompts, valid, tokens, mask)]
        loss = -masked_mean(token_logp(task.policy.over_replies(*batch), batch[2], 1.0, None), batch[3])
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"pre-training diverged at step {len(losses)}: loss {losses[-1]}; lower --pretrain-lr"
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(task.policy.parameters(), config.max_norm)
        optimizer.step()
        schedule.step()
    return sum(losses[-50:]) / max(1, len(losses[-50:]))


def train_classifier(task: Task, steps: int = 300) -> float:
    """Fit the classifier to every training reply's label, a tenth of the words replaced. Returns its held-out accuracy."""
    order, rows = random.Random(task.config.seed), [*task.dirty, *task.train]
    generator = torch.Generator().manual_seed(task.config.seed)
    optimizer = torch.optim.AdamW(task.classifier.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
    for _ in range(2 if task.config.smoke else steps):
        chosen = order.choices(rows, k=64)
        tokens = task.words([task.ids[row][1][:-1] for row in chosen])
        noise = torch.randint(task.tokenizer.size, tokens.shape, generator=generator).to(task.device)
        swap = torch.rand(tokens.shape, generator=generator).to(task.device) < 0.1
        tokens = torch.where(swap & (tokens != task.classifier.embed.padding_idx), noise, tokens)
        labels = torch.tensor([task.labels.index(row.label) for row in chosen], device=task.device)
        optimizer.zero_grad()
        F.cross_entropy(task.classifier(tokens), labels).backward()
        optimizer.step()
    return sum(task.intent_reward(*columns_of(task.valid, [row.response for row in task.valid]))) / len(task.valid)


# ----- PPO ------------------------------------------------------------------------------------------------------------


class Run:
    """One PPO run of a method from pi_0; all that it needs to go on bit for bit is in its checkpoint."""

    def __init__(self, task: Task, name: str, method: str, updates: int, thresholds=None, weights=None):
        config, N = task.config, len(task.config.names)
        self.task, self.config, self.name, self.method, self.updates = task, config, name, method, updates
        self.columns = [config.names.index(name) for name in config.constrained]
        self.thresholds = torch.tensor(
            [0.0] * len(self.columns) if thresholds is None else [*thresholds], device=task.device
        )
        self.weights = torch.tensor(weights or numbers(config.weights, N, "--weights") or [1.0] * N, device=task.device)
        self.reference, self.policy = task.policy, copy.deepcopy(task.policy).requires_grad_(True)
        self.critic = GPT2(task.policy.config, heads=len(self.columns) + 1).to(task.device)
        self.critic.load_state_dict(task.policy.state_dict(), strict=False)
        self.generator = torch.Generator(task.device).manual_seed(config.seed)
        draw = torch.randn(len(self.columns), generator=self.generator, device=task.device)
        self.raw = (0.01 * draw).requires_grad_(True)
        groups = [
            {"params": [*self.policy.parameters()]},
            {"params": [*self.critic.parameters()], "lr": config.critic_lr},
        ]
        self.optimizer = torch.optim.Adam(groups, config.lr, fused=True)
        self.multiplier_optimizer = torch.optim.SGD([self.raw], config.multiplier_lr, config.multiplier_momentum)
        self.kl_coefficient = 0.0 if method == "ppo_no_kl" else config.kl_coefficient
        self.head_weights = torch.tensor([0.5] * len(self.columns) + [0.2], device=task.device)
        self.step, self.rows, self.search = 0, [], None
        self.path = Path(config.out) / f"{name}.pt"

    def update(self) -> dict:
        """Write replies, score them, and take the epochs' steps on them. Returns what to log."""
        config, task = self.config, self.task
        chosen = torch.randint(len(task.train), (config.batch,), generator=self.generator, device=task.device).tolist()
        rows = [task.train[i] for i in chosen]
        replies = write_replies(
            self.policy, [task.ids[row][0] for row in rows], task.tokenizer.end, config, self.generator
        )
        rewards = task.score(rows, task.texts(replies))
        kl = log_ratio(replies, self.reference, config)
        with torch.no_grad():
            values = self.critic.over_replies(replies.prompts, replies.valid, replies.tokens, replies.mask)
        each = token_rewards(self.method, rewards[:, self.columns], *self.task_reward(rewards, kl), replies.mask)
        pairs = [
            gae(each[..., i], values[..., i], replies.mask, config.gamma, config.lam) for i in range(each.shape[-1])
        ]
        advantages, returns = (torch.stack(side, -1) for side in zip(*pairs, strict=True))
        losses = [
            self.learn(replies, index, advantages[index], returns[index], rewards[index][:, self.columns].mean(0))
            for _ in range(config.epochs)
            for index in torch.randperm(config.batch, generator=self.generator, device=task.device).chunk(
                config.minibatches
            )
        ]
        self.step += 1
        mean_kl = masked_mean(kl, replies.mask).item()
        if self.method in ("ppo", "ppo_sat", "all_ppo"):
            self.kl_coefficient = adaptive_kl(self.kl_coefficient, mean_kl, config.kl_target, config.kl_step)
        row = {
            "update": self.step,
            "loss": sum(losses) / len(losses),
            "batch_kl": mean_kl,
            "kl_coefficient": self.kl_coefficient,
        }
        row |= {f"batch_{name}": value for name, value in zip(config.names, rewards.mean(0).tolist(), strict=True)}
        if self.method in CONSTRAINED:
            m = multipliers(self.method, self.raw.detach()).tolist()
            row |= {f"m_{name}": value for name, value in zip(config.constrained, m, strict=True)}
            row |= {f"theta_{n}": v for n, v in zip(config.constrained, self.thresholds.tolist(), strict=True)}
        if not math.isfinite(row["loss"]):
            kept = f"the last good checkpoint is {self.path}" if self.path.exists() else "there is no checkpoint yet"
            raise FloatingPointError(
                f"{self.name} diverged at update {self.step}: loss {row['loss']}; {kept}; lower --lr"
            )
        return row

    def task_reward(self, rewards: Tensor, kl: Tensor) -> tuple[Tensor, Tensor, float]:
        """The task's reward at a reply's end (B,), kl, and the coefficient of -kl in the task (Table 1)."""
        if self.method in ("mu_ppo", "xi_ppo"):
            if self.config.objective == "kl":
                return torch.zeros_like(rewards[:, 0]), kl, 1.0
            return rewards[:, self.config.names.index(self.config.objective)], kl, 0.0
        if self.method == "ppo_sat":
            own = self.weights[self.columns]
            return saturated_reward(rewards[:, self.columns], self.thresholds, own), kl, self.kl_coefficient
        return rewards @ self.weights, kl, self.kl_coefficient

    def learn(self, replies: Replies, index: Tensor, advantages: Tensor, returns: Tensor, scores: Tensor) -> float:
        """One step on a minibatch: policy, critic, and then the multipliers by its mean scores (N,)."""
        mask, config = replies.mask[index], self.config
        each = torch.stack([normalise(a, mask) for a in advantages.unbind(-1)], -1)  # each its own scale, then mixed
        task = each[..., :-1].sum(-1) if self.method == "all_ppo" else each[..., -1]
        m = multipliers(self.method, self.raw.detach()) if self.method in CONSTRAINED else self.raw.detach()
        advantage = mix_advantages(self.method, task, each[..., :-1], m)
        support = None if replies.support is None else replies.support[index]
        logits = self.policy.over_replies(*replies.rows(index))
        logp = token_logp(logits, replies.tokens[index], config.temperature, support)
        loss = ppo_policy_loss(logp, replies.logp[index], advantage, mask, config.clip)
        errors = (self.critic.over_replies(*replies.rows(index)) - returns) ** 2 * mask[..., None]
        critic_loss = (errors.sum((0, 1)) / mask.sum() * self.head_weights).sum()
        self.optimizer.zero_grad()
        (loss + critic_loss).backward()
        for network in self.policy, self.critic:
            nn.utils.clip_grad_norm_(network.parameters(), config.max_norm)
        self.optimizer.step()
        if self.method in CONSTRAINED:
            self.multiplier_optimizer.zero_grad()
            multiplier_loss(self.method, self.raw, scores, self.thresholds).backward()
            nn.utils.clip_grad_norm_([self.raw], 0.5)
            self.multiplier_optimizer.step()
        return (loss + critic_loss).item()

    def log(self, row: dict) -> dict:
        """Evaluate the policy and keep the row."""
        scores, self.texts = self.task.evaluate(self.policy, self.reference)
        self.rows.append({"run": self.name, "method": self.method} | row | scores)
        return self.rows[-1]

    def state(self) -> dict:
        """Everything that going on needs."""
        parts = ("policy", "critic", "optimizer", "multiplier_optimizer")
        content = {name: getattr(self, name).state_dict() for name in parts}
        content |= {
            "raw": self.raw.detach(),
            "kl_coefficient": self.kl_coefficient,
            "generator": self.generator.get_state(),
        }
        content |= {"step": self.step, "rows": self.rows, "thresholds": self.thresholds, "texts": self.texts}
        return content | {"search": self.search and self.search.state()}

    def load_state(self, content: dict) -> None:
        """Go on from what `state` gave."""
        for name in ("policy", "critic", "optimizer", "multiplier_optimizer"):
            getattr(self, name).load_state_dict(content[name])
        self.raw.data.copy_(content["raw"])
        self.generator.set_state(content["generator"].cpu())
        for name in ("step", "rows", "kl_coefficient", "thresholds", "texts"):
            setattr(self, name, content[name])
        if self.search:
            self.search.load_state(content["search"])

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        content = {"config": dataclasses.asdict(self.config), "done": self.step >= self.updates} | self.state()
        write_atomically(self.path, lambda name: torch.save(content, name))

    def go(self, say: Callable = print) -> Run:
        """Update to the end, evaluating and saving on the way; a finished run is only loaded."""
        skipped = FREE if self.name == self.config.run or self.name in (*METHODS, "nelder_mead") else FREE + OF_METHOD
        content = load_stage(self.path, self.config, skipped, self.task.device)
        if content and (content["done"] or self.config.resume):
            self.load_state(content)
        if not self.rows:
            self.log({"update": 0})
            if self.search:
                self.search.begin([self.rows[0][name] for name in self.config.constrained])
        busy, first = 0.0, self.step
        while self.step < self.updates:
            began = time.perf_counter()
            if self.search:
                self.thresholds = torch.tensor(self.search.point(), dtype=torch.float32, device=self.task.device)
            row = self.update()
            if self.search:
                self.search.after(row, lambda: self.task.evaluate(self.policy, self.reference)[0]["evaluation"])
            if due := self.step % self.config.eval_every == 0 or self.step == self.updates:
                row = self.log(row)
                self.save()
            busy += time.perf_counter() - began
            if due and (self.step == self.updates or self.step % max(1, self.updates // 8) < self.config.eval_every):
                shown = ("evaluation", *self.config.names, "kl")
                parts = {"run": self.name} | {name: f"{row[name]:.3f}" for name in shown}
                say(progress_line(self.step, self.updates, parts, busy / (self.step - first)), flush=True)
        return self


class ThresholdSearch:
    """Nelder and Mead's search for the thresholds within one run (Algorithm 3), which is never reset.

    Each set of thresholds is trained for until it is reached, or an eighth of all updates is gone; then the policy is
    evaluated as it stands. A value found within 5 % of the thresholds asked for is taken again. The last eighth trains
    for the best thresholds found.
    """

    def __init__(self, config: Config, updates: int):
        self.names, self.updates, self.tolerance = config.constrained, updates, config.tolerance
        self.start, self.told, self.found, self.recent, self.used, self.total = [], [], [], [], 0, 0

    def begin(self, scores: list[float]) -> None:
        """Start at the initial policy's own scores, and at those with one of them half as large again."""
        self.start = [max(score, 0.02) for score in scores]
        simplex = np.tile(self.start, (len(scores) + 1, 1))
        for i in range(len(scores)):
            simplex[i + 1, i] *= 1.5
        self.simplex = NelderMead(simplex)

    def point(self) -> np.ndarray:
        """The thresholds to train for now."""
        settled = self.total >= self.updates * 7 // 8 and self.found
        return np.array(max(self.found, key=lambda pair: pair[1])[0]) if settled else self.simplex.ask()

    def after(self, row: dict, evaluate: Callable[[], float]) -> None:
        """Note an update's mean scores; where its thresholds are reached or out of time, evaluate and ask for others."""
        self.used, self.total = self.used + 1, self.total + 1
        self.recent = [*self.recent[-2:], [row[f"batch_{name}"] for name in self.names]]
        theta, mean = self.point(), np.mean(self.recent, 0)
        reached = len(self.recent) == 3 and (np.abs(mean - theta) <= self.tolerance * np.abs(theta)).all()
        if self.total > self.updates * 7 // 8 or not (reached or self.used >= max(1, self.updates // 8)):
            return
        self.found.append((theta.tolist(), evaluate()))
        self.tell(-self.found[-1][1])
        self.recent, self.used = [], 0
        for _ in range(50):  # a simplex within 5 % of itself asks only for what is known
            known = [v for at, v in self.found if (np.abs(self.simplex.ask() - at) <= 0.05 * np.abs(at)).all()]
            if not known:
                break
            self.tell(-known[-1])

    def tell(self, value: float) -> None:
        """The value of the thresholds asked for."""
        self.told.append(value)
        self.simplex.tell(value)

    def state(self) -> dict:
        """What `load_state` needs."""
        return {name: getattr(self, name) for name in ("start", "told", "found", "recent", "used", "total")}

    def load_state(self, content: dict) -> None:
        """Go through the same search again."""
        self.begin(content["start"])
        for value in content["told"]:
            self.simplex.tell(value)
        vars(self).update(content)


# ----- The whole story --------------------------------------------------------------------------------------------------


def load_stage(path: Path, config: Config, skipped: Sequence[str], device: torch.device) -> dict | None:
    """A saved stage, or None; raises ValueError naming every field in which its config differs."""
    if not path.is_file():
        return None
    content, now = load_torch(path, device), dataclasses.asdict(config)
    fits = isinstance(content, dict) and "config" in content
    require(fits, f"{path}: is no file of this script; move it away, or give another --out")
    differing = [
        f"{k} was {v!r}, is {now[k]!r}" for k, v in content["config"].items() if k not in skipped and v != now[k]
    ]
    fix = "give the same flags, another --run or another --out"
    require(not differing, f"{path}: saved with another config: {'; '.join(differing)}; {fix}")
    return content


def prepare(config: Config, device: torch.device, say: Callable = print) -> Task:
    """Data, pi_0 and the reward models: made and saved to OUT/start.pt, or loaded from it."""
    task, path, began = Task(config, device), Path(config.out) / "start.pt", time.perf_counter()
    content = load_stage(path, config, FREE + OF_METHOD, device)
    if content:
        task.policy.load_state_dict(content["policy"])
        task.classifier.load_state_dict(content["classifier"])
    else:
        content = {"config": dataclasses.asdict(config), "loss": pretrain(task), "accuracy": 0.0}
        if "intent" in config.names:
            content["accuracy"] = train_classifier(task)
        content |= {"policy": task.policy.state_dict(), "classifier": task.classifier.state_dict()}
        write_atomically(path, lambda name: torch.save(content, name))
    task.policy.requires_grad_(False)
    task.loss, task.accuracy = content["loss"], content["accuracy"]
    count = sum(p.numel() for p in task.policy.parameters())
    say(f"{count:,} parameters on {device} · {len(task.train):,} rows to train on, {len(task.valid):,} held out")
    spent = f"{time.perf_counter() - began:.0f} s"
    say(
        f"pi_0: loss {task.loss:.3f} · act classifier right on {task.accuracy:.1%} of the references · {spent}",
        flush=True,
    )
    return task


def proxy_points(task: Task, say: Callable = print) -> dict:
    """PPO on each reward alone without KL, and the joint and separate proxy points fitted to its course (Algorithm 2)."""
    config, N = task.config, len(task.config.names)
    runs = []
    for i, name in enumerate(config.names):
        weights = [float(i == j) for j in range(N)]
        runs.append(Run(task, f"only_{name}", "ppo_no_kl", config.single_updates, weights=weights).go(say))
    rows = [row for run in runs for row in run.rows]
    points = np.array([[row[name] for name in config.constrained] for row in rows])
    evaluation = np.array([row["evaluation"] for row in rows])
    joint = fit_proxy_points(points, evaluation, config.degree).tolist()
    separate = []
    for name in config.constrained:
        own = [row for row in rows if row["run"] == f"only_{name}"]
        columns = (np.array([[row[name]] for row in own]), np.array([row["evaluation"] for row in own]))
        separate += fit_proxy_points(*columns, config.degree).tolist()
    text = " · ".join(f"{n} {a:.3f} ({b:.3f})" for n, a, b in zip(config.constrained, joint, separate, strict=True))
    say(f"proxy points, joint (each alone): {text}")
    return {"joint": joint, "separate": separate, "runs": runs}


def story(config: Config, say: Callable = print) -> dict:
    """The job of the script: stages, runs, table, samples, OUT/metrics.jsonl, result.json and picture."""
    began, device, out = time.perf_counter(), pick_device(config.device), Path(config.out)
    require(not out.exists() or out.is_dir(), f"--out {out}: must be a folder, but a file is there; give another")
    out.mkdir(parents=True, exist_ok=True)
    task = prepare(config, device, say)
    thresholds = numbers(config.thresholds, len(config.constrained), "--thresholds")
    needed = config.method in ("", "ppo_sat", *CONSTRAINED) and not thresholds
    proxy = proxy_points(task, say) if needed or not config.method else {"runs": []}
    thresholds = thresholds or proxy.get("joint")
    runs = []
    for method in [config.method] if config.method else ["ppo", "xi_ppo"]:
        name = config.run or method
        if method == "nelder_mead":
            runs.append(Run(task, name, "xi_ppo", 2 * config.updates))
            runs[-1].search = ThresholdSearch(config, 2 * config.updates)
        else:
            runs.append(Run(task, name, method, config.updates, thresholds))
        runs[-1].go(say)
    everything = [*proxy["runs"], *runs]
    lines = "".join(json.dumps(row) + "\n" for run in everything for row in run.rows)
    write_atomically(out / "metrics.jsonl", lambda name: Path(name).write_text(lines, "utf-8"))
    say(table(everything, config))
    samples = show_samples(task, everything, say)
    draw(everything, proxy, config, out / "runs.png")
    result = {"parameters": sum(p.numel() for p in task.policy.parameters()), "pretrain_loss": task.loss}
    result |= {"classifier_accuracy": task.accuracy, "samples": samples, "thresholds": thresholds}
    result |= {"proxy_points": {k: v for k, v in proxy.items() if k != "runs"}}
    result |= {"runs": {run.name: run.rows[-1] | {"peak_evaluation": peak(run)} for run in everything}}
    if runs[0].search:
        result["nelder_mead"] = runs[0].search.found
    result = result_record(config, device, wall_seconds=round(time.perf_counter() - began, 1), **result)
    write_json(out / "result.json", result)
    say(f"{out}: result.json, metrics.jsonl and the stages after {result['wall_seconds']:.0f} s")
    return result


def peak(run: Run) -> float:
    """The best evaluation of a run."""
    return max(row["evaluation"] for row in run.rows)


def table(runs: list[Run], config: Config) -> str:
    """A line a run: evaluation at its best and at the end, rewards, KL, variety."""
    lines = [
        "",
        "run".ljust(16)
        + "best eval  final eval  "
        + "".join(n.rjust(12) for n in config.names)
        + "  KL a token  distinct",
    ]
    first = runs[0].rows[0] | {"run": "pi_0"}
    for best, row in [(first["evaluation"], first), *((peak(run), run.rows[-1]) for run in runs)]:
        scores = "".join(f"{row[name]:12.3f}" for name in config.names)
        line = f"{row['run']:16}{best:9.3f}  {row['evaluation']:10.3f}  {scores}  {row['kl']:10.3f}  {row['distinct_replies']:8.0%}"
        lines.append(line)
    return "\n".join([*lines, ""])


def show_samples(task: Task, runs: list[Run], say: Callable, count: int = 3) -> list[dict]:
    """Print held-out prompts with their references and what each policy replies, before and after."""
    before, found = task.evaluate(task.policy, task.policy)[1], []
    for i, row in enumerate(task.valid[:count]):
        replies = {"reference": row.response, "pi_0": before[i]} | {run.name: run.texts[i] for run in runs}
        found.append({"prompt": row.prompt} | replies)
        say("\n".join([row.prompt, *(f"    {name:16}{text}" for name, text in replies.items())]))
    return found


def draw(runs: list[Run], proxy: dict, config: Config, path: Path) -> None:
    """Evaluation and rewards by update, the rewards' plane with the proxy points, and the multipliers, as a PNG."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed; pip install matplotlib")
        return
    figure, axes = plt.subplots(1, 4, figsize=(17, 4), layout="constrained")
    for i, run in enumerate(runs):
        steps = [row["update"] for row in run.rows]
        axes[0].plot(steps, [row["evaluation"] for row in run.rows], label=run.name, color=f"C{i}")
        for name, style in zip(config.names, ("-", "--", ":", "-."), strict=False):
            axes[1].plot(steps, [row[name] for row in run.rows], style, color=f"C{i}", label=f"{run.name}: {name}")
        plane = [[row[name] for row in run.rows] for name in (config.names * 2)[:2]]
        axes[2].plot(*plane, ".-", lw=0.6, color=f"C{i}", label=run.name)
        for name, style in zip(config.constrained, ("-", "--", ":", "-."), strict=False):
            rows = [row for row in run.rows if f"m_{name}" in row]
            if rows:
                axes[3].plot(
                    [r["update"] for r in rows],
                    [r[f"m_{name}"] for r in rows],
                    style,
                    color=f"C{i}",
                    label=f"{run.name}: {name}",
                )
    if len(config.constrained) == 2 and "joint" in proxy:
        axes[2].plot(*proxy["joint"], "k*", ms=14, label="joint proxy point")
        axes[2].plot(*proxy["separate"], "kx", ms=9, label="separate proxy points")
    axes[0].set(xlabel="update", title="evaluation: the true metric")
    axes[1].set(xlabel="update", title="rewards")
    axes[2].set(xlabel=config.names[0], ylabel=(config.names * 2)[1], title="where the runs went")
    axes[3].set(xlabel="update", title="multipliers")
    for axis in axes:
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
        story(Config(**arguments | (SMOKE if arguments["smoke"] else {})))
    except (UserError, OSError, FloatingPointError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
