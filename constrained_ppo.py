# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "tiktoken==0.14.0"]
# ///
"""Constrained RLHF: PPO that holds each reward model at the value beyond which it stops being a good proxy.

Moskovitz et al., "Confronting Reward Model Overoptimization with Constrained RLHF", arXiv 2310.04373.

    python constrained_ppo.py                               the paper in miniature, 3 minutes on one core
    python constrained_ppo.py --method nelder_mead          thresholds found within one run, 1.5 minutes more
    python constrained_ppo.py --data FILE --policy FOLDER   your dialogues, your GPT-2

The first makes a small policy that answers small talk, trains it by PPO on each reward alone until the true metric
falls while the reward goes on rising, fits the proxy point where the metric was best, and from the same start trains
`ppo`, with a KL penalty, and `xi_ppo`, which holds each reward at its proxy point. Read the samples that it prints.

code                     shape            paper
policy, Task.policy                       pi, pi_0: GPT-2s of one size, the second frozen
rewards, r0              (B, N), (B,)     r_i, r_0: of whole replies; METEOR and intent as in the paper
penalty, kl              (B, T)           a_KL log(pi/pi_0), log(pi/pi_0), at each token
values                   (B, T, N + 1)    v_1..v_N and v_0, the task's, which for mu and xi is the KL's
raw, multipliers         (N,)             mu_i, bounded: sigmoid for mu-PPO and All-PPO, tanh for xi-PPO
thresholds               (N,)             theta_i, by default the proxy points theta*
evaluation                                r*, the true metric, seen K times a run

What matters in PPO for language models, and where it is done
  no gradient, reward or mean from what follows end-of-text             `masked_mean`, `gae`, `write_replies`
  log-probabilities at the temperature and the top-k of the draws       `token_logp`
  prompts padded in front, positions and attention without padding      `GPT2.hidden`
  no dropout, the same weights in draws and ratio: the first is 1       `GPT2`, `write_replies`
  the KL by log(pi/pi_0) of the tokens drawn: unbiased, may be < 0      `Task.log_ratio`
  a reply is an episode: rewards at its last token, no value behind     `token_rewards`, `gae`
  a value network of its own, a head a reward, no value clipping        `Run.learn`
  advantages normalised by minibatch, each reward's apart, then mixed   `normalise`, `mix_advantages`
  multipliers from mean returns, not from the critic's early values     `multiplier_loss`
  evaluation always by the same prompts and draws                       `Task.evaluate`

Differences from the paper
1. The default policy has 0.1M parameters and the data are templates, chosen because they show the effect: most of the
   pre-training replies are dull or rambling, so that PPO at first improves the replies, and wording and much of their
   content are free, so that collapse on what the rewards like best costs variety. Learning rates are a small model's.
2. The metric is the geometric mean of lexical match and of n-gram overlap with the references. The paper's mean of two
   parts, scaled over the single-reward runs, needs these runs even for Nelder-Mead, and its second part praises babble.
3. METEOR matches equal words only; intent's classifier is a bag of words.
4. Ratios are of the top-k policies that wrote the replies, and the KL is to pi_0 among those same k tokens, since among
   pi_0's own it may be infinite: which k they are costs nothing. The critic starts from pi_0, its heads from 0.
5. Algorithm 3 leaves open when thresholds count as reached, here the mean of three updates within --tolerance, and how
   the run ends, here with an eighth of its updates at the best thresholds found.

Not included: more than one device, learned reward models other than intent's, ROUGE-L, beam search.
"""

from __future__ import annotations

import argparse
import contextlib
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
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
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
REWARDS = ("meteor", "intent", "diversity")  # the built-in ones
COLUMNS = ("run", "method", "update", "loss", "kl_coefficient", "evaluation", "kl", "tokens_a_reply", "distinct")


def flag(default, text: str):
    """A field of `Config`, and a flag with its default and help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; each field is a flag."""

    method: str = flag("", f"{', '.join(METHODS)} or nelder_mead; empty: the whole story, ending in ppo and xi_ppo")
    thresholds: str = flag("", "theta of each constrained reward, by commas; empty: the fitted proxy point")
    data: str = flag("", "JSON-lines file of prompt, response and label; empty: small talk by templates")
    policy: str = flag("", "folder of a GPT-2 in Hugging Face layout to start from; empty: a new small model")
    reward: str = flag("meteor,intent", "by commas: meteor, intent, diversity or NAME=MODULE:FUNCTION")
    evaluation: str = flag("", "MODULE:FUNCTION, the true metric; empty: geometric mean of lexical match and variety")
    objective: str = flag("kl", "what mu_ppo and xi_ppo maximise: kl, for -KL as in the paper, or one of the rewards")
    weights: str = flag("", "a_i of each reward for ppo_no_kl, ppo, ppo_sat, by commas; empty: 1; paper: 0.5,1")
    d_model: int = flag(64, "width of a new policy; paper: GPT-2, 768")
    n_layer: int = flag(2, "its blocks; paper: 12")
    n_head: int = flag(4, "its heads; paper: 12")
    length: int = flag(64, "its positions, for prompt and reply together")
    reply: int = flag(20, "most tokens of a reply, as in the paper")
    top_k: int = flag(20, "replies are drawn from the k likeliest tokens, as in the paper; 0: from all")
    temperature: float = flag(1.0, "of the draws, and of every log-probability")
    pretrain_steps: int = flag(600, "supervised steps that make the initial policy pi_0; 0: take --policy as it is")
    pretrain_lr: float = flag(3e-3, "their peak learning rate")
    batch: int = flag(64, "replies an update, and rows a supervised step; paper: 1,280 tokens an update")
    updates: int = flag(100, "PPO updates of a method; paper: 100 (128k tokens)")
    single_updates: int = flag(100, "PPO updates of each single-reward run, to which the proxy point is fitted")
    epochs: int = flag(2, "passes over an update's replies; paper: 5")
    minibatches: int = flag(2, "minibatches a pass; paper: 20")
    lr: float = flag(3e-4, "of the policy; paper: 1e-6, of a model 1,000 times larger")
    critic_lr: float = flag(1e-3, "of the value network")
    gamma: float = flag(0.99, "discount a token")
    lam: float = flag(0.95, "lambda of generalised advantage estimation")
    clip: float = flag(0.2, "the policy ratio stays within 1 +- clip")
    kl_coefficient: float = flag(0.2, "a_KL at the start of ppo, ppo_sat, all_ppo; it adapts")
    kl_target: float = flag(0.2, "nats a token that it adapts to; paper: 0.5")
    multiplier_lr: float = flag(0.5, "rate of the multipliers' SGD; paper: 0.1, in 25 times as many minibatches")
    tolerance: float = flag(0.1, "nelder_mead: relative distance at which thresholds count as reached")
    degree: int = flag(4, "of the polynomial fitted to the evaluation; paper: 10, on more points")
    eval_every: int = flag(4, "updates from one evaluation, checkpoint and row of metrics.jsonl to the next")
    eval_rows: int = flag(400, "held-out prompts of an evaluation, the same with the same draws every time")
    seed: int = flag(0, "seed of initialisation, data order and samples")
    device: str = flag("auto", "auto (cuda, mps or cpu, the first there is) or a torch device")
    out: str = flag("out/constrained_ppo", "folder of the stages, metrics, result and picture")
    resume: bool = flag(False, "go on within unfinished runs; finished stages are always taken again")
    smoke: bool = flag(False, "a tiny model for a few steps, whatever the other flags: does it run?")

    def __post_init__(self):
        known = ("", *METHODS, "nelder_mead")
        require(self.method in known, f"--method {self.method!r}: must be one of {', '.join(known[1:])}; correct it")
        zero = ("seed", "top_k", "pretrain_steps", "kl_coefficient", "multiplier_lr", "critic_lr", "lr", "gamma", "lam")
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                rule = "at least 0" if name in zero else "at least 1" if isinstance(value, int) else "above 0"
                fits = math.isfinite(value) and (value > 0 or (value == 0 and name in zero))
                require(fits, f"--{name.replace('_', '-')} {value}: must be {rule} and finite; correct it")
        require(max(self.gamma, self.lam) <= 1, f"--gamma {self.gamma}, --lam {self.lam}: must be at most 1; lower it")
        require(self.minibatches <= self.batch, f"--minibatches {self.minibatches}: must be at most --batch; lower it")
        fits = self.objective == "kl" or (self.objective in self.names and len(self.names) > 1)
        require(fits, f"--objective {self.objective}: must be kl or one of several rewards {self.names}; correct it")
        numbers(self.thresholds, len(self.constrained), "--thresholds")
        numbers(self.weights, len(self.names), "--weights")

    @property
    def names(self) -> list[str]:
        """Names of the rewards."""
        return [*reward_specs(self.reward)]

    @property
    def constrained(self) -> list[str]:
        """Names of the N rewards that have a threshold: all but the objective."""
        return [name for name in self.names if name != self.objective]


def reward_specs(text: str) -> dict[str, str]:
    """`meteor,x=module:function` -> {"meteor": "", "x": "module:function"}."""
    pairs = [[half.strip() for half in part.partition("=")[::2]] for part in text.split(",")]
    fits = all(name.isidentifier() and (name in REWARDS or ":" in where) for name, where in pairs)
    specs = dict(pairs)
    fits = fits and len(specs) == len(pairs) and not specs.keys() & {*COLUMNS}
    rule = f"must be {', '.join(REWARDS)} or NAME=MODULE:FUNCTION, each once, NAME none of {', '.join(COLUMNS)}"
    require(fits, f"--reward {text!r}: {rule}; correct it")
    return specs


def numbers(text: str, count: int, what: str) -> list[float]:
    """`0.3,0.4` -> [0.3, 0.4], `count` of them; nothing from an empty text."""
    try:
        found = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [math.nan]
    fits = not text or (len(found) == count and all(map(math.isfinite, found)))
    require(fits, f"{what} {text!r}: must be {count} numbers with commas between, one a reward; correct it")
    return found


SMOKE = {
    "d_model": 16, "n_layer": 1, "n_head": 2, "pretrain_steps": 6, "batch": 8, "updates": 3, "single_updates": 6,
    "eval_every": 1, "eval_rows": 12, "degree": 2, "reply": 8, "epochs": 1,
}  # fmt: skip
FREE = ("device", "out", "resume", "smoke")  # what may differ from a saved stage's config
OF_METHODS = (  # what the stages before the methods do not depend on
    "method", "thresholds", "objective", "weights", "updates", "kl_coefficient", "kl_target", "multiplier_lr",
    "tolerance", "degree",
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


# ----- Data: small talk, its pre-training part dirty ------------------------------------------------------------------

SLOTS = {
    "person": "ana ben cleo dan eva finn", "adjective": "red blue green old new tiny", "other": "park shop cafe tower",
    "object": "hat lamp clock book chair map kettle drum", "place": "market station library harbour school museum",
    "quality": "nice cheap heavy strange pretty useful", "relative": "sister brother mother uncle friend",
    "time": "today tonight tomorrow soon",
}  # fmt: skip
OPENING = "{person} has a {adjective} {object} from the {place} . "
ASKS = (  # two ways to put each kind of opening, and the odds of each act in a reply, in the order of REPLIES
    ("can someone help with it ?", "who could carry it home ?", (10, 10, 25, 55)),
    ("what do you know about it ?", "do you like it ?", (55, 25, 10, 10)),
    ("did you hear the story ?", "you should have seen it .", (30, 55, 5, 10)),
    ("what should we do with it ?", "we need a plan for it .", (10, 15, 50, 25)),
)
REPLIES = {  # four ways to put each act; {quality}, {relative}, {other} and {time} are free, the rest is the prompt's
    "inform": ("it is a {quality} {object} from the {place} .", "my {relative} had a {adjective} {object} too .",
               "{person} found the {object} at the {other} .", "that {object} looks {quality} and {adjective} ."),
    "question": ("where did {person} get the {object} ?", "is the {adjective} {object} very {quality} ?",
                 "does your {relative} want a {object} ?", "how {quality} is the {place} {time} ?"),
    "directive": ("please give the {object} to my {relative} .", "bring the {object} to the {other} {time} .",
                  "ask {person} about the {adjective} {object} .", "do not leave it at the {other} ."),
    "commissive": ("i will take the {object} to {person} {time} .", "i can carry the {adjective} {object} {time} .",
                   "we will meet {person} at the {other} .", "let me clean the {object} for you {time} ."),
}  # fmt: skip
DULL = ("i see .", "ok .", "yes .", "i do not know .")


@dataclass(frozen=True)
class Row:
    """A prompt, a reply to it, the reply's label (its dialogue act), and where the row stands."""

    prompt: str
    response: str
    label: str
    where: str


def small_talk(sizes: tuple[int, ...] = (4000, 2000, 1000)) -> tuple[list[Row], ...]:
    """Rows to pre-train on, to train on and held out; only the first are dirty: half dull, a fifth rambling."""
    r = random.Random(0)

    def row(number: int, dirty: bool) -> Row:
        slots = {name: r.choice(words.split()) for name, words in SLOTS.items()}
        *asks, odds = r.choice(ASKS)
        act, second = r.choices(list(REPLIES), odds, k=2)
        reply, more, kind = r.choice(REPLIES[act]), r.choice(REPLIES[second]), r.random() if dirty else 1.0
        if kind < 0.5:
            act, reply = "dull", r.choice(DULL)
        elif kind < 0.7:
            reply = f"{reply[:-2]} {more}"
        return Row((OPENING + r.choice(asks)).format(**slots), reply.format(**slots), act, f"small talk, row {number}")

    return tuple([row(i, dirty=part == 0) for i in range(size)] for part, size in enumerate(sizes))


def read_rows(path: str) -> tuple[list[Row], ...]:
    """Rows of a JSON-lines file: the same to pre-train and to train on, every tenth held out."""
    require(Path(path).is_file(), f"--data {path}: no such file; give a JSON-lines file of prompt, response and label")
    try:
        text, rows = Path(path).read_text("utf-8-sig"), []
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: must be UTF-8 text, but {error}; convert it") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            fields = None
            with contextlib.suppress(ValueError):
                fields = json.loads(line)
            require(isinstance(fields, dict), f"{where}: {line[:60]!r} must be a JSON object; correct it")
            for name in ("prompt", "response", "label"):
                require(isinstance(fields.get(name), str), f"{where}: {name!r} is missing, must be a text; add it")
            rows.append(Row(fields["prompt"], fields["response"], fields["label"], where))
    require(len(rows) >= 20, f"--data {path}: {len(rows)} rows, must be at least 20; add some")
    train = [row for i, row in enumerate(rows) if i % 10]
    return train, train, rows[::10]


class Words:
    """A tokenizer that knows the words of given texts, between spaces; id 0 ends a reply."""

    def __init__(self, texts: Iterable[str]):
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
        paths = [Path(folder) / name for name in ("vocab.json", "tokenizer.json") if (Path(folder) / name).is_file()]
        require(len(paths) > 0, f"--policy {folder}: has neither vocab.json nor tokenizer.json; copy one there")
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2 writes as themselves
        hidden = [b for b in range(256) if b not in visible]
        byte_of = {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
        try:
            vocab = json.loads(paths[0].read_text("utf-8"))
            vocab = dict(vocab if paths[0].name == "vocab.json" else vocab["model"]["vocab"])
            self.end = vocab.pop("<|endoftext|>", len(vocab))  # tokenizer.json may keep it apart, as the last
            ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items()}  # ids in order of merging
            pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
            self.encoding = tiktoken.Encoding(folder, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
            self.size, self.encode = max(self.end, *ranks.values()) + 1, self.encoding.encode_ordinary
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{paths[0]}: not a vocabulary of GPT-2's kind ({error!r:.60}); give GPT-2's") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without the space in front."""
        return self.encoding.decode([i for i in ids if i < self.size and i != self.end]).strip()


# ----- Scores of replies ----------------------------------------------------------------------------------------------


def meteor(reference: Sequence, response: Sequence) -> float:
    """METEOR of two token lists by exact matches alone, 0 to 1 (Banerjee and Lavie 2005).

    The harmonic mean of precision and recall, recall weighted 9 times, less up to half where matches are scattered.
    From the back, a word is matched to the last equal word still free, as in NLTK.
    """
    places = defaultdict(list)
    for j, word in enumerate(reference):
        places[word].append(j)
    pairs = [(i, places[word].pop()) for i, word in reversed(list(enumerate(response))) if places.get(word)][::-1]
    if not pairs:
        return 0.0
    chunks = 1 + sum(after != (i + 1, j + 1) for (i, j), after in itertools.pairwise(pairs))
    precision, recall = len(pairs) / len(response), len(pairs) / len(reference)
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return mean * (1 - 0.5 * (chunks / len(pairs)) ** 3)


def ngrams(words: Sequence, n: int) -> list[tuple]:
    """Each run of n words."""
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def bleu(references: list[list], responses: list[list]) -> float:
    """Corpus BLEU, 0 to 1: up to 4-grams, brevity penalty, no smoothing (Papineni et al. 2002)."""
    logs = 0.0
    for n in range(1, 5):
        pairs = [(ngrams(a, n), ngrams(b, n)) for a, b in zip(references, responses, strict=True)]
        hits = sum((Counter(a) & Counter(b)).total() for a, b in pairs)
        if not hits:
            return 0.0
        logs += math.log(hits / sum(len(b) for _, b in pairs)) / 4
    return math.exp(logs + min(0.0, 1 - sum(map(len, references)) / sum(map(len, responses))))


def rouge(reference: list, response: list, n: int = 2) -> float:
    """ROUGE-n F1 of a reply, 0 to 1 (Lin 2004)."""
    a, b = ngrams(reference, n), ngrams(response, n)
    hits = (Counter(a) & Counter(b)).total()
    return 2 * hits / (len(a) + len(b)) if hits else 0.0


def overlap(references: list[list], responses: list[list], n: int = 3) -> float:
    """Sum over n-grams, ends included, of the smaller of their shares in the two corpora: 1 for the same variety."""
    edge, sides = [None] * (n - 1), (references, responses)
    a, b = (Counter(gram for words in side for gram in ngrams([*edge, *words, *edge], n)) for side in sides)
    all_a, all_b = a.total(), b.total()
    return math.fsum(min(a[gram] / all_a, b[gram] / all_b) for gram in a.keys() & b.keys())  # the same in any order


def true_metric(prompts: list[str], responses: list[str], references: list[str], labels: list[str]) -> float:
    """r*, 0 to 1: the geometric mean of lexical match (BLEU and ROUGE-2) and of `overlap`.

    The first asks for the right words, the second for the references' variety: one reply to everything scores low in
    it, babble in both.
    """
    a, b = [text.split() for text in references], [text.split() for text in responses]
    lexical = (bleu(a, b) + sum(map(rouge, a, b)) / len(a)) / 2
    return math.sqrt(lexical * overlap(a, b))


def meteor_reward(prompts, responses, references, labels) -> list[float]:
    """METEOR of each reply against its reference."""
    return [meteor(a.split(), b.split()) for a, b in zip(references, responses, strict=True)]


def diversity_reward(prompts, responses, references, labels) -> list[float]:
    """How rare a reply's bigrams are among the replies drawn with it, 0 to 1: the mean of 1 / occurrences."""
    grams = [ngrams(text.split(), 2) for text in responses]
    counts = Counter(itertools.chain(*grams))
    return [sum(1 / counts[gram] for gram in own) / max(1, len(own)) for own in grams]


# ----- The method -----------------------------------------------------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is 1: what follows end-of-text never counts."""
    return (x * mask).sum() / mask.sum()


def normalise(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages (B, T) with mean 0 and standard deviation 1 over the tokens that count."""
    centred = advantages - masked_mean(advantages, mask)
    return centred / (masked_mean(centred**2, mask).sqrt() + 1e-8) * mask


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


def multipliers(method: str, raw: Tensor) -> Tensor:
    """Bounded multipliers (N,) of free parameters (N,): 0 to 1 for mu and All, -1 to 1 for xi, of equalities."""
    require(method in CONSTRAINED, f"{method!r}: must be one of {', '.join(CONSTRAINED)} to have multipliers; use one")
    return raw.tanh() if method == "xi_ppo" else raw.sigmoid()


def mix_advantages(method: str, task_advantage: Tensor, reward_advantages: Tensor, multipliers: Tensor) -> Tensor:
    """The Lagrangian's advantage (B, T) from the task's (B, T) and the rewards' (B, T, N), normalised each by itself.

    mu, xi: (N - sum m) A_task + sum m_i A_i (eq. 4.4), weights that sum to N. All-PPO's constraints are upper bounds,
    so its m_i count against the rewards. Without constraints: the task's advantage as it is.
    """
    if method not in CONSTRAINED:
        return task_advantage
    constraints = (reward_advantages * multipliers).sum(-1)
    task = (reward_advantages.shape[-1] - multipliers.sum()) * task_advantage
    return task - constraints if method == "all_ppo" else task + constraints


def multiplier_loss(method: str, raw: Tensor, returns: Tensor, thresholds: Tensor) -> Tensor:
    """What the multipliers minimise: sum m_i (J_i - theta_i), for All-PPO its negative; raw, J and theta (N,).

    J_i is a minibatch's mean return, not the critic's estimate, which is poor early on. Below its threshold m_i rises,
    for All-PPO above it.
    """
    violations = (multipliers(method, raw) * (returns - thresholds)).sum()
    return -violations if method == "all_ppo" else violations


def saturated_reward(rewards: Tensor, thresholds: Tensor, weights: Tensor) -> Tensor:
    """PPO-SAT's reward (B,) = -sum a_i (r_i - theta_i)^2 of rewards (B, N) (Table 1).

    Of a reward r that is 0 or 1 it is (2 theta - 1) r and a constant: below theta = 1/2 it pays for r = 0.
    """
    return -(weights * (rewards - thresholds) ** 2).sum(-1)


def adaptive_kl(coefficient: float, kl: float, target: float, step: float = 0.1) -> float:
    """The next a_KL: larger where the mean KL a token is over its target, smaller where under it (App. B)."""
    return coefficient * (1 + step * min(max((kl - target) / target, -0.2), 0.2))


def token_rewards(method: str, rewards: Tensor, r0: Tensor, penalty: Tensor, mask: Tensor) -> Tensor:
    """What the N + 1 critic heads estimate (B, T, N + 1), from rewards (B, N), r0 (B,) and the KL penalty (B, T).

    A reply's rewards stand at its last token, the penalty at each. The last head is the task's: r0 less the penalty.
    All-PPO has the penalty in each reward.
    """
    ends = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))
    each = ends[..., None] * rewards[:, None]
    if method == "all_ppo":
        each = each - penalty[..., None]
    return torch.cat([each, (ends * r0[:, None] - penalty)[..., None]], -1)


# ----- Proxy points, and the search for thresholds --------------------------------------------------------------------


def kernel_density(points: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The Gaussian kernel density of points (n, N), bandwidth by Scott's rule, as a function (m, N) -> (m,)."""
    n, N = points.shape
    covariance = (np.atleast_2d(np.cov(points.T)) + 1e-9 * np.eye(N)) * n ** (-2 / (N + 4))
    inverse, scale = np.linalg.inv(covariance), n * math.sqrt(np.linalg.det(2 * math.pi * covariance))

    def density(x: np.ndarray) -> np.ndarray:
        difference = x[:, None] - points
        return np.exp(-0.5 * ((difference @ inverse) * difference).sum(-1)).sum(1) / scale

    return density


def polynomial_surface(x: np.ndarray, y: np.ndarray, degree: int, ridge=1e-4) -> Callable[[np.ndarray], np.ndarray]:
    """The polynomial of that degree nearest to y (n,) at x (n, N), slightly ridged, as a function (m, N) -> (m,)."""
    terms = [c for d in range(degree + 1) for c in itertools.combinations_with_replacement(range(x.shape[1]), d)]

    def features(x: np.ndarray) -> np.ndarray:
        return np.stack([x[:, list(c)].prod(1) for c in terms], 1)

    A = features(x)
    solution = np.linalg.solve(A.T @ A + ridge * len(A) * np.diag([float(c != ()) for c in terms]), A.T @ y)
    return lambda x: features(x) @ solution


def fit_proxy_points(rewards: np.ndarray, evaluation: np.ndarray, degree: int) -> np.ndarray:
    """The proxy point (N,): where the evaluation (n,), fitted over rewards (n, N), is highest (Algorithm 2).

    The fit counts only within the samples' range and where they are dense, as at nine tenths of them. Candidates are
    the samples and draws from the kernel density itself, so that any number of rewards will do.
    """
    rewards, evaluation = np.asarray(rewards, float), np.asarray(evaluation, float)
    n, N = rewards.shape
    need = math.comb(N + degree, degree)
    spread = rewards.std(0) * (np.ptp(rewards, 0) > 0)  # that of a constant is not always 0
    require(n >= need, f"{n} evaluations for {need} coefficients of degree {degree}: must be no fewer; lower --degree")
    require((spread > 0).all(), f"rewards that never changed, {rewards[0]}: nothing to fit; give --thresholds")
    x = (rewards - rewards.mean(0)) / spread
    density, surface = kernel_density(x), polynomial_surface(x, evaluation, degree)
    r = np.random.default_rng(0)
    size = min(20_000, 10_000_000 // n)  # the densities take size x n numbers
    draws = x[r.integers(n, size=size)] + r.standard_normal((size, N)) * n ** (-1 / (N + 4))
    draws = np.concatenate([x, draws[((draws >= x.min(0)) & (draws <= x.max(0))).all(1)]])
    draws = draws[density(draws) >= np.quantile(density(x), 0.1)]
    return rewards.mean(0) + draws[surface(draws).argmax()] * spread


class NelderMead:
    """Nelder and Mead's simplex search, minimising, an evaluation at a time; coefficients 1, 2, 1/2, 1/2 (Algorithm 3).

    `ask()` gives the point (N,) to evaluate next, `tell(value)` its value; `told` holds all values.
    """

    def __init__(self, simplex):
        self.simplex, self.told = np.array(simplex, float), []
        fits = self.simplex.ndim == 2 and self.simplex.shape[0] == self.simplex.shape[1] + 1
        rule = "must be N + 1 finite points of N numbers; correct it"
        require(fits and np.isfinite(self.simplex).all(), f"a simplex of shape {self.simplex.shape}: {rule}")
        self.values, self.search = np.full(len(self.simplex), np.inf), self._search()
        self.asked = next(self.search)

    def ask(self) -> np.ndarray:
        """The point to evaluate next; the same until `tell`."""
        return self.asked.copy()

    def tell(self, value: float) -> None:
        """The value at the point asked for; NaN counts as infinitely bad."""
        self.told.append(float(value))
        self.asked = self.search.send(math.inf if math.isnan(value) else float(value))

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
                if not (other <= value if outside else other < values[-1]):
                    for i in range(1, len(simplex)):  # shrinking towards the best corner
                        simplex[i] = (simplex[0] + simplex[i]) / 2
                        values[i] = yield simplex[i]
                    continue
                point, value = nearer, other
            simplex[-1], values[-1] = point, value


# ----- The policy: GPT-2 ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPT2Config:
    """The sizes of a GPT-2, by Hugging Face's names."""

    vocab_size: int
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5


@dataclass
class Replies:
    """Replies (B, T) to prompts (B, P), padded, prompts in front, and what PPO has to know of them."""

    prompts: Tensor
    valid: Tensor  # (B, P) bool, False on padding
    tokens: Tensor
    mask: Tensor  # (B, T) 1 up to and with end-of-text, then 0
    logp: Tensor | None = None  # (B, T) of the policy that wrote them
    support: Tensor | None = None  # (B, T, k) the tokens that each was drawn from; None: all

    def part(self, index: Tensor) -> Replies:
        """Some of the replies."""
        return Replies(*(x if x is None else x[index] for x in vars(self).values()))


class Block(nn.Module):
    """Attention, then a GELU network, each behind a LayerNorm and added to the stream."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        D, self.n_head = config.n_embd, config.n_head
        self.ln_1, self.ln_2 = (nn.LayerNorm(D, config.layer_norm_epsilon) for _ in range(2))
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(D, 3 * D), "c_proj": nn.Linear(D, D)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 4 * D), "c_proj": nn.Linear(4 * D, D)})

    def forward(self, x: Tensor, mask: Tensor, cache: list[Tensor] | None) -> Tensor:
        """x (B, L, D); mask (B, 1, L, S) is True where a query sees a key; cache: room for keys and values."""
        (B, L, D), S = x.shape, mask.shape[-1]
        q, k, v = self.attn["c_attn"](self.ln_1(x)).view(B, L, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            for old, new in zip(cache, (k, v), strict=True):
                old[:, :, S - L : S] = new
            k, v = (old[:, :, :S] for old in cache)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, L, D / heads)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(B, L, D))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """GPT-2 without dropout, which would make PPO's first ratio differ from 1; `heads`: values in place of logits."""

    def __init__(self, config: GPT2Config, heads: int = 0):
        super().__init__()
        self.config, D = config, config.n_embd
        require(D % config.n_head == 0, f"width {D}: must be a multiple of the heads, {config.n_head}; change either")
        self.wte, self.wpe = nn.Embedding(config.vocab_size, D), nn.Embedding(config.n_positions, D)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(D, config.layer_norm_epsilon)
        self.head = nn.Linear(D, heads) if heads else None
        for name, parameter in self.named_parameters():
            if "ln_" not in name:
                std = 0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02
                nn.init.normal_(parameter, std=0.0 if "bias" in name or "head" in name else std)

    def hidden(self, tokens: Tensor, valid: Tensor, cache: list | None = None) -> Tensor:
        """The stream (B, L, D) of tokens (B, L), the last L of S positions; valid (B, S) is False on padding.

        Positions count valid tokens only, so padding in front changes nothing.
        """
        L, S = tokens.shape[1], valid.shape[1]
        positions = (valid.cumsum(1) - 1).clamp(min=0)[:, S - L :]
        sees = torch.ones(L, S, dtype=torch.bool, device=tokens.device).tril(S - L) & valid[:, None]
        sees |= torch.eye(S, dtype=torch.bool, device=tokens.device)[S - L :]  # no row is empty, not even padding's
        x = self.wte(tokens) + self.wpe(positions)
        for i, block in enumerate(self.h):
            x = block(x, sees[:, None], cache and cache[i])
        return self.ln_f(x)

    def read(self, hidden: Tensor) -> Tensor:
        """Values (..., heads), or logits (..., V) by the embedding's own weights."""
        return self.head(hidden) if self.head is not None else F.linear(hidden, self.wte.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, L, V) of tokens (B, L)."""
        return self.read(self.hidden(tokens, torch.ones_like(tokens, dtype=torch.bool)))

    def over(self, replies: Replies) -> Tensor:
        """What `read` gives just before each token of the replies, (B, T, ...)."""
        tokens = torch.cat([replies.prompts, replies.tokens[:, :-1]], 1)
        valid = torch.cat([replies.valid, replies.mask[:, :-1].bool()], 1)
        return self.read(self.hidden(tokens, valid)[:, replies.prompts.shape[1] - 1 :])


def token_logp(logits: Tensor, replies: Replies, temperature: float) -> Tensor:
    """log pi (B, T) of the replies' tokens at the temperature, and among the top-k tokens, that they were drawn with.

    With the full softmax instead, the ratio would be that of another policy than the one that wrote the replies.
    """
    logits = logits / temperature
    chosen = logits.gather(-1, replies.tokens[..., None]).squeeze(-1)
    return chosen - (logits if replies.support is None else logits.gather(-1, replies.support)).logsumexp(-1)


def pad_in_front(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids as a tensor (B, P) with zeros in front of the short ones, and True where there are ids."""
    width, lengths = max(map(len, rows)), torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return tokens, torch.arange(width) >= width - lengths[:, None]


@torch.no_grad()
def write_replies(policy: GPT2, prompts: list, end: int, config: Config, generator: torch.Generator) -> Replies:
    """Draw a reply to each prompt, a list of ids, with a key-value cache; it ends with end-of-text, or when full."""
    tokens, valid = (x.to(policy.wte.weight.device) for x in pad_in_front(prompts))
    (B, P), D, heads = tokens.shape, policy.config.n_embd, policy.config.n_head
    room = torch.empty(len(policy.h), 2, B, heads, P + config.reply, D // heads, device=tokens.device)
    cache, alive, k = [[*layer] for layer in room], valid.any(1), min(config.top_k, policy.config.vocab_size)
    columns, x, whole = [], tokens, valid
    while len(columns) < config.reply and alive.any():
        logits = policy.read(policy.hidden(x, whole, cache)[:, -1]) / config.temperature
        values, support = logits.topk(k) if k else (logits, None)
        logp = values.log_softmax(-1)
        drawn = torch.multinomial(logp.exp(), 1, generator=generator)
        x = (support.gather(-1, drawn) if k else drawn).where(alive[:, None], end)
        columns.append((x, alive[:, None].float(), logp.gather(-1, drawn), support))
        whole = torch.cat([whole, alive[:, None]], 1)
        alive = alive & (x[:, 0] != end)
    *parts, support = zip(*columns, strict=True)
    drawn, mask, logp = (torch.cat(part, 1) for part in parts)
    return Replies(tokens, valid, drawn, mask, logp * mask, torch.stack(support, 1) if k else None)


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


def read_policy(folder: str) -> GPT2:
    """The GPT-2 in a local folder of Hugging Face layout; raises UserError listing all that does not fit."""
    path = next((p for n in ("model.safetensors", "pytorch_model.bin") if (p := Path(folder) / n).is_file()), None)
    fits = path is not None and (Path(folder) / "config.json").is_file()
    require(fits, f"--policy {folder}: must be a folder with config.json and model.safetensors or pytorch_model.bin")
    try:
        fields = dict(json.loads((Path(folder) / "config.json").read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"--policy {folder}: config.json is no JSON object ({error}); give another") from None
    needed = {"model_type": "gpt2", "activation_function": "gelu_new", "tie_word_embeddings": True, "n_inner": None}
    needed |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    problems = [f"{k} = {fields[k]!r}, must be {v!r}" for k, v in needed.items() if fields.get(k, v) != v]
    usual = vars(GPT2Config(vocab_size=50257))
    sizes = {k: fields.get(k, v) for k, v in usual.items()}
    wrong = [k for k, v in sizes.items() if type(v) is not type(usual[k]) or v <= 0]
    problems += [f"{k} = {sizes[k]!r}, must be above 0, such as {usual[k]}" for k in wrong]
    require(not problems, f"--policy {folder}: cannot be done here: {'; '.join(problems)}; give a plain GPT-2")
    model, content = GPT2(GPT2Config(**sizes)), load_torch(path)
    fits = isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values())
    require(fits, f"{path}: must hold tensors by name; give another")
    tensors = {k.removeprefix("transformer."): v.float() for k, v in content.items()}
    for k in list(tensors):
        if k.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
            del tensors[k]  # masks of old files, and the tied embedding
        elif k.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            tensors[k] = tensors[k].T  # theirs are (in, out)
    check_tensors(folder, model.state_dict(), tensors)
    model.load_state_dict(tensors)
    return model


# ----- What PPO starts from: pi_0, rewards, evaluation ----------------------------------------------------------------


class Task:
    """Rows, tokenizer, initial policy pi_0 (the reference too), rewards and evaluation metric."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.dirty, self.train, self.valid = read_rows(config.data) if config.data else small_talk()
        self.valid = self.valid[: config.eval_rows]
        every = dict.fromkeys([*self.dirty, *self.train, *self.valid])
        self.tokenizer = BytePairs(config.policy) if config.policy else Words(f"{r.prompt} {r.response}" for r in every)
        self.labels = sorted({row.label for row in every})
        torch.manual_seed(config.seed)
        sizes = GPT2Config(self.tokenizer.size, config.length, config.d_model, config.n_layer, config.n_head)
        self.policy = (read_policy(config.policy) if config.policy else GPT2(sizes)).to(device)
        vocabulary = self.policy.config.vocab_size
        rule = f"{self.tokenizer.size} tokens, must be at most its model's {vocabulary}; mend either"
        require(self.tokenizer.size <= vocabulary, f"--policy {config.policy}: {rule}")
        self.classifier = nn.EmbeddingBag(vocabulary, len(self.labels)).to(device)  # a reply's act by its words alone
        self.ids = {row: self.encode(row) for row in every}
        built_in = {"meteor": meteor_reward, "diversity": diversity_reward, "intent": self.intent_reward}
        specs = reward_specs(config.reward).items()
        self.rewards = {n: load_function(f"--reward {n}", at) if at else built_in[n] for n, at in specs}
        self.metric = load_function("--evaluation", config.evaluation) if config.evaluation else true_metric

    def encode(self, row: Row) -> tuple[list[int], list[int]]:
        """Ids of a row's prompt and of its reply with end-of-text; raises UserError past the model's length."""
        prompt = self.tokenizer.encode(row.prompt)
        reply = [*self.tokenizer.encode(" " + row.response), self.tokenizer.end]
        size, limit = len(prompt) + max(len(reply), self.config.reply), self.policy.config.n_positions
        require(prompt != [], f"{row.where}: the prompt is empty, must hold a word; give one")
        rule = f"must be at most the model's {limit}; shorten them, or lower --reply"
        require(size <= limit, f"{row.where}: prompt and reply take {size} positions, {rule}")
        return prompt, reply

    def act_logits(self, replies: list[list[int]]) -> Tensor:
        """The classifier's logits (B, labels)."""
        starts = torch.tensor([0, *itertools.accumulate(map(len, replies[:-1]))], device=self.device)
        return self.classifier(torch.tensor([*itertools.chain(*replies)], dtype=torch.long, device=self.device), starts)

    @torch.no_grad()
    def intent_reward(self, prompts, responses, references, labels) -> list[float]:
        """1 where the classifier gives a reply the reference's dialogue act, else 0."""
        predicted = self.act_logits([self.tokenizer.encode(" " + text) for text in responses]).argmax(-1).tolist()
        return [float(self.labels[i] == label) for i, label in zip(predicted, labels, strict=True)]

    def texts(self, replies: Replies) -> list[str]:
        """The replies as texts, up to end-of-text."""
        rows = zip(replies.tokens.tolist(), replies.mask.sum(1).int().tolist(), strict=True)
        return [self.tokenizer.decode([i for i in row[:n] if i != self.tokenizer.end]) for row, n in rows]

    def score(self, rows: list[Row], texts: list[str]) -> Tensor:
        """Every reward of every reply, (B, all); raises UserError where one is not a finite number a reply."""
        columns = []
        for name, function in self.rewards.items():
            values = torch.as_tensor(call(f"--reward {name}", function, rows, texts)).float()
            rule = f"must be ({len(rows)},), a number a reply; correct the function"
            require(values.shape == (len(rows),), f"--reward {name}: gave shape {tuple(values.shape)}, {rule}")
            bad = [(v, text) for v, text in zip(values.tolist(), texts, strict=True) if not math.isfinite(v)]
            require(not bad, f"--reward {name}: gave (value, reply) {bad[:1]}, must be finite; correct the function")
            columns.append(values)
        return torch.stack(columns, 1).to(self.device)

    def evaluate(self, policy: GPT2) -> tuple[dict, list[str]]:
        """True metric, mean rewards and KL on the held-out prompts, always by the same draws; and the replies."""
        generator, texts, total = torch.Generator(self.device).manual_seed(17), [], torch.zeros(2)
        for i in range(0, len(self.valid), 200):
            prompts = [self.ids[row][0] for row in self.valid[i : i + 200]]
            replies = write_replies(policy, prompts, self.tokenizer.end, self.config, generator)
            total += torch.stack([self.log_ratio(replies).sum(), replies.mask.sum()]).cpu()
            texts += self.texts(replies)
        value = call("--evaluation", self.metric, self.valid, texts)
        rule = "must be one finite number; correct the function"
        require(value.shape == () and np.isfinite(value), f"--evaluation: gave {str(value)[:60]}, {rule}")
        result = {"evaluation": value.item(), "kl": (total[0] / total[1]).item()}
        result |= {"tokens_a_reply": total[1].item() / len(texts), "distinct": len(set(texts)) / len(texts)}
        return result | dict(zip(self.rewards, self.score(self.valid, texts).mean(0).tolist(), strict=True)), texts

    @torch.no_grad()
    def log_ratio(self, replies: Replies) -> Tensor:
        """log(pi/pi_0) (B, T) of the tokens drawn; its mean over pi's draws is the KL a token, without bias."""
        return (replies.logp - token_logp(self.policy.over(replies), replies, self.config.temperature)) * replies.mask


def call(what: str, function: Callable, rows: list[Row], texts: list[str]) -> np.ndarray:
    """function(prompts, responses, references, labels) of replies to rows; raises UserError with the failing line."""
    prompts, references, labels = ([getattr(row, name) for row in rows] for name in ("prompt", "response", "label"))
    try:
        return np.asarray(function(prompts, [*texts], references, labels), float)  # lists of its own to change
    except Exception as error:  # any, the function may be the user's
        at = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(at.filename).name}, line {at.lineno}"
        raise UserError(f"{what}: failed at {place}: {error!r:.200}; correct the function, then --resume") from error


def load_function(what: str, where: str) -> Callable:
    """The function MODULE:FUNCTION, the module looked for in the current folder too."""
    module, _, name = where.partition(":")
    sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the module is the user's, and may do anything
        raise UserError(f"{what} {where!r}: must be MODULE:FUNCTION, but {error!r:.200}; correct it") from None
    finally:
        sys.path.pop()
    require(callable(function), f"{what} {where!r}: must be a function, is {type(function).__name__}; correct it")
    return function


def fit(module: nn.Module, steps: int, lr: float, loss_of: Callable[[], Tensor]) -> float:
    """AdamW steps on the losses that loss_of gives, the rate rising, then falling. Returns the mean of the last 50."""
    optimizer = torch.optim.AdamW(module.parameters(), lr, weight_decay=0.01, fused=True)
    losses = []
    for step in range(steps):
        loss = loss_of()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"loss {losses[-1]} at pre-training step {step + 1}; lower --pretrain-lr")
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / (0.1 * steps + 1), 1 - step / steps + 0.01)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    return sum(losses[-50:]) / max(1, len(losses[-50:]))


def pretrain(task: Task) -> float:
    """Make pi_0: supervised steps on the dirty rows, the loss on the replies alone. Returns the last losses' mean."""
    order = random.Random(task.config.seed)

    def loss() -> Tensor:
        rows = order.choices(task.dirty, k=task.config.batch)
        prompts, valid = pad_in_front([task.ids[row][0] for row in rows])
        tokens, mask = (x.flip(1) for x in pad_in_front([task.ids[row][1][::-1] for row in rows]))  # padded behind
        replies = Replies(*(x.to(task.device) for x in (prompts, valid, tokens, mask.float())))
        return -masked_mean(token_logp(task.policy.over(replies), replies, 1.0), replies.mask)

    return fit(task.policy, task.config.pretrain_steps, task.config.pretrain_lr, loss)


def train_classifier(task: Task, steps: int = 300) -> float:
    """Fit the act classifier to the training replies' labels. Returns its accuracy on the held-out references."""
    order, rows = random.Random(task.config.seed), [*task.dirty, *task.train]

    def loss() -> Tensor:
        chosen = order.choices(rows, k=128)
        labels = torch.tensor([task.labels.index(row.label) for row in chosen], device=task.device)
        return F.cross_entropy(task.act_logits([task.ids[row][1][:-1] for row in chosen]), labels)

    fit(task.classifier, 2 if task.config.smoke else steps, 0.1, loss)
    return call("intent", task.intent_reward, task.valid, [row.response for row in task.valid]).mean().item()


# ----- PPO ------------------------------------------------------------------------------------------------------------


class Run:
    """One PPO run of a method from pi_0; its checkpoint holds all that going on bit for bit needs."""

    def __init__(self, task: Task, name: str, method: str, updates: int, thresholds=(), weights=()):
        config, device, N = task.config, task.device, len(task.config.constrained)
        self.task, self.config, self.name, self.updates = task, config, name, updates
        self.method = "xi_ppo" if method == "nelder_mead" else method
        self.columns = [config.names.index(name) for name in config.constrained]
        self.thresholds = torch.tensor([*thresholds] or [0.0] * N, device=device)
        weights = [*weights] or numbers(config.weights, len(config.names), "--weights") or [1.0] * len(config.names)
        self.weights, self.head_weights = torch.tensor(weights, device=device), [0.5] * N + [0.2]
        self.policy = copy.deepcopy(task.policy).requires_grad_(True)
        self.critic = GPT2(task.policy.config, heads=N + 1).to(device)
        self.critic.load_state_dict(task.policy.state_dict(), strict=False)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.raw = (0.01 * torch.randn(N, generator=self.generator, device=device)).requires_grad_(True)
        rates = (self.policy, config.lr), (self.critic, config.critic_lr)
        self.optimizer = torch.optim.Adam([{"params": p.parameters(), "lr": lr} for p, lr in rates], fused=True)
        self.multiplier_optimizer = torch.optim.SGD([self.raw], config.multiplier_lr, momentum=0.1)
        self.kl_coefficient = 0.0 if method == "ppo_no_kl" else config.kl_coefficient
        self.step, self.rows, self.texts = 0, [], []
        self.search = ThresholdSearch(config, updates) if method == "nelder_mead" else None
        self.path = Path(config.out) / f"{name}.pt"

    def task_reward(self, rewards: Tensor, kl: Tensor) -> tuple[Tensor, Tensor]:
        """The task's reward at a reply's end, r0 (B,), and the KL penalty (B, T), by Table 1; rewards (B, all)."""
        if self.method in ("mu_ppo", "xi_ppo"):
            if self.config.objective == "kl":
                return torch.zeros_like(rewards[:, 0]), kl
            return rewards[:, self.config.names.index(self.config.objective)], torch.zeros_like(kl)
        if self.method == "ppo_sat":
            r0 = saturated_reward(rewards[:, self.columns], self.thresholds, self.weights[self.columns])
            return r0, self.kl_coefficient * kl
        return rewards @ self.weights, self.kl_coefficient * kl

    def update(self) -> dict:
        """Write replies, score them, and take the epochs' steps on them. Returns what to log."""
        config, task, method = self.config, self.task, self.method
        options = {"generator": self.generator, "device": task.device}
        if self.search:
            self.thresholds = torch.tensor(self.search.thresholds(), dtype=torch.float32, device=task.device)
        rows = [task.train[i] for i in torch.randint(len(task.train), (config.batch,), **options).tolist()]
        prompts = [task.ids[row][0] for row in rows]
        replies = write_replies(self.policy, prompts, task.tokenizer.end, config, self.generator)
        rewards, kl = task.score(rows, task.texts(replies)), task.log_ratio(replies)
        with torch.no_grad():
            values = self.critic.over(replies)
        scores = rewards[:, self.columns]
        heads = token_rewards(method, scores, *self.task_reward(rewards, kl), replies.mask).unbind(-1)
        each = zip(heads, values.unbind(-1), strict=True)
        pairs = [gae(reward, value, replies.mask, config.gamma, config.lam) for reward, value in each]
        advantages, returns = (torch.stack(side, -1) for side in zip(*pairs, strict=True))  # (B, T, N + 1)
        losses = [
            self.learn(replies.part(index), advantages[index], returns[index], scores[index].mean(0))
            for _ in range(config.epochs)
            for index in torch.randperm(config.batch, **options).chunk(config.minibatches)
        ]
        self.step += 1
        mean_kl = masked_mean(kl, replies.mask).item()
        if method in ("ppo", "ppo_sat", "all_ppo"):
            self.kl_coefficient = adaptive_kl(self.kl_coefficient, mean_kl, config.kl_target)
        means = rewards.mean(0)
        if self.search:
            self.search.after(means[self.columns].tolist(), lambda: task.evaluate(self.policy)[0]["evaluation"])
        row = {"update": self.step, "loss": sum(losses) / len(losses)}
        row |= {"batch_kl": mean_kl, "kl_coefficient": self.kl_coefficient}
        row |= {f"batch_{name}": value for name, value in zip(config.names, means.tolist(), strict=True)}
        if method in CONSTRAINED:
            both = multipliers(method, self.raw.detach()).tolist(), self.thresholds.tolist()
            for name, m, theta in zip(config.constrained, *both, strict=True):
                row |= {f"m_{name}": m, f"theta_{name}": theta}
        return row

    def learn(self, replies: Replies, advantages: Tensor, returns: Tensor, scores: Tensor) -> float:
        """One step on a minibatch: policy and critic, then the multipliers by its mean scores (N,)."""
        mask, method = replies.mask, self.method
        each = torch.stack([normalise(a, mask) for a in advantages.unbind(-1)], -1)  # one scale, before they are mixed
        task = each[..., :-1].sum(-1) if method == "all_ppo" else each[..., -1]
        m = multipliers(method, self.raw.detach()) if method in CONSTRAINED else self.raw.detach()
        logp = token_logp(self.policy.over(replies), replies, self.config.temperature)
        advantage = mix_advantages(method, task, each[..., :-1], m)
        loss = ppo_policy_loss(logp, replies.logp, advantage, mask, self.config.clip)
        errors = (self.critic.over(replies) - returns) ** 2
        loss = loss + sum(w * masked_mean(e, mask) for w, e in zip(self.head_weights, errors.unbind(-1), strict=True))
        self.optimizer.zero_grad()
        loss.backward()
        norms = [nn.utils.clip_grad_norm_(part.parameters(), 1.0).item() for part in (self.policy, self.critic)]
        if not math.isfinite(loss.item() + sum(norms)):
            kept = f"the last good checkpoint is {self.path}" if self.path.exists() else "there is no checkpoint yet"
            where = f"{self.name} diverged at update {self.step + 1}: loss {loss.item()}, gradient norms {norms}"
            raise FloatingPointError(f"{where}; {kept}; lower --lr or --critic-lr")
        self.optimizer.step()
        if method in CONSTRAINED:
            self.multiplier_optimizer.zero_grad()
            multiplier_loss(method, self.raw, scores, self.thresholds).backward()
            nn.utils.clip_grad_norm_([self.raw], 0.5)
            self.multiplier_optimizer.step()
        return loss.item()

    def log(self, row: dict) -> dict:
        """Evaluate the policy and keep the row."""
        scores, self.texts = self.task.evaluate(self.policy)
        self.rows.append({"run": self.name, "method": self.method} | row | scores)
        return self.rows[-1]

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        content = {"config": dataclasses.asdict(self.config), "done": self.step >= self.updates}
        content |= {name: getattr(self, name).state_dict() for name in STATEFUL} | {"raw": self.raw.detach()}
        content |= {name: getattr(self, name) for name in PLAIN} | {"generator": self.generator.get_state()}
        content["search"] = self.search and [self.search.start, self.search.means, self.search.found]
        write_atomically(self.path, lambda name: torch.save(content, name))

    def load(self, content: dict) -> None:
        """Go on from what `save` wrote."""
        for name in STATEFUL:
            getattr(self, name).load_state_dict(content[name])
        vars(self).update({name: content[name] for name in PLAIN})
        self.raw.data.copy_(content["raw"])
        self.generator.set_state(content["generator"].cpu())
        if self.search:
            self.search.load(*content["search"])

    def go(self, say: Callable = print) -> Run:
        """Update to the end, evaluating and saving on the way; a finished run is only loaded."""
        single = {*OF_METHODS} - {"objective"}  # which decides how many heads the critic has
        skipped = {*FREE, "method"} | (single if self.name.startswith("only_") else set())
        with saved_stage(self.path, self.config, skipped, self.task.device) as content:
            if content and (content["done"] or self.config.resume):
                self.load(content)
            elif content:
                say(f"{self.path}: begun again, its {content['step']} updates dropped; --resume would go on from there")
        if not self.rows:
            row = self.log({"update": 0})
            if self.search:
                self.search.begin([row[name] for name in self.config.constrained])
        first, began = self.step, time.perf_counter()
        while self.step < self.updates:
            row = self.update()
            if self.step % self.config.eval_every == 0 or self.step == self.updates:
                row = self.log(row)
                self.save()
                if 8 * (self.step - self.config.eval_every) // self.updates < 8 * self.step // self.updates:
                    parts = {name: f"{row[name]:.3f}" for name in ("evaluation", *self.config.names, "kl")}
                    pace = (time.perf_counter() - began) / (self.step - first)
                    say(progress_line(self.step, self.updates, {"of": self.name} | parts, pace), flush=True)
        return self


STATEFUL = ("policy", "critic", "optimizer", "multiplier_optimizer")
PLAIN = ("step", "rows", "texts", "kl_coefficient", "thresholds")


class ThresholdSearch:
    """Nelder and Mead's search for the thresholds within one run, which is never reset (Algorithm 3).

    A set of thresholds is trained for until it is reached, the mean of three updates, or until an eighth of all updates
    is gone; then the policy is evaluated as it stands. What was found within 5 % of a point is taken for its value. The
    last eighth trains for the best thresholds found.
    """

    def __init__(self, config: Config, updates: int):
        self.updates, self.tolerance = updates, config.tolerance
        self.start, self.means, self.found, self.since = [], [], [], 0

    def begin(self, scores: list[float]) -> None:
        """Start with the initial policy's own scores, moved off 0, and with one of them half as large again."""
        self.start = [score if abs(score) > 0.02 else 0.02 for score in scores]
        self.simplex = NelderMead(self.start * (1 + 0.5 * np.eye(len(scores) + 1, len(scores), -1)))

    def thresholds(self) -> list[float]:
        """The thresholds to train for now."""
        last = len(self.means) >= self.updates - self.updates // 8 and self.found
        return max(self.found, key=lambda pair: pair[1])[0] if last else self.simplex.ask().tolist()

    def after(self, means: list[float], evaluate: Callable[[], float]) -> None:
        """Note an update's mean scores; once thresholds are reached or out of time, evaluate, ask for others."""
        theta, eighth = np.array(self.thresholds()), max(1, self.updates // 8)
        self.means.append(means)
        step, recent = len(self.means), self.means[self.since :][-3:]
        reached = len(recent) == 3 and (np.abs(np.mean(recent, 0) - theta) <= self.tolerance * np.abs(theta)).all()
        if step > self.updates - eighth or not (reached or step - self.since >= eighth):
            return
        self.found.append((theta.tolist(), evaluate()))
        self.since, value = step, self.found[-1][1]
        for _ in range(50):  # a simplex that has shrunk to within 5 % asks only for what is known
            self.simplex.tell(-value)
            point = self.simplex.ask()
            known = [v for at, v in self.found if (np.abs(point - at) <= 0.05 * np.abs(at)).all()]
            if not known:
                break
            value = known[-1]

    def load(self, start: list[float], means: list[list[float]], found: list[tuple]) -> None:
        """Go through a search again from its attributes of these names, all that it depends on."""
        self.begin(start)
        values = iter(found)
        for each in means:
            self.after(each, lambda: next(values)[1])


# ----- The whole story ------------------------------------------------------------------------------------------------


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


def prepare(config: Config, device: torch.device, say: Callable = print) -> Task:
    """Data, pi_0 and the act classifier: made and saved to OUT/start.pt, or loaded from it."""
    Path(config.out).mkdir(parents=True, exist_ok=True)
    task, path = Task(config, device), Path(config.out) / "start.pt"
    rows = hashlib.sha256(repr([*task.ids]).encode()).hexdigest()
    with saved_stage(path, config, FREE + OF_METHODS, device) as content:
        if content:
            rule = f"made from other rows than --data {config.data} holds now; undo that, or change --out"
            require(content["rows"] == rows, f"{path}: {rule}")
            task.policy.load_state_dict(content["policy"])
            task.classifier.load_state_dict(content["classifier"])
            task.facts = content["facts"]
    if content is None:
        task.facts = {"parameters": sum(p.numel() for p in task.policy.parameters()), "pretrain_loss": pretrain(task)}
        task.facts["classifier_accuracy"] = train_classifier(task) if "intent" in task.rewards else None
        content = {"config": dataclasses.asdict(config), "rows": rows, "facts": task.facts}
        content |= {"policy": task.policy.state_dict(), "classifier": task.classifier.state_dict()}
        write_atomically(path, lambda name: torch.save(content, name))
    task.policy.requires_grad_(False)
    size = f"{task.facts['parameters']:,} parameters on {device}, loss {task.facts['pretrain_loss']:.3f}"
    say(f"pi_0: {size} · {len(task.train):,} prompts to train on, {len(task.valid):,} held out", flush=True)
    return task


def proxy_points(task: Task, say: Callable = print) -> tuple[list[Run], dict]:
    """PPO on each reward alone, without KL, and the joint and separate proxy points of these runs (Algorithm 2)."""
    config, runs = task.config, []
    for name in config.constrained:
        weights = [float(name == other) for other in config.names]
        runs.append(Run(task, f"only_{name}", "ppo_no_kl", config.single_updates, weights=weights).go(say))

    def point(rows: list[dict], names: list[str]) -> list[float]:
        columns = np.array([[row[name] for name in names] for row in rows])
        return fit_proxy_points(columns, [row["evaluation"] for row in rows], config.degree).tolist()

    joint = point([row for run in runs for row in run.rows], config.constrained)
    separate = [point(run.rows, [name])[0] for run, name in zip(runs, config.constrained, strict=True)]
    text = [f"{n} {a:.3f} ({b:.3f})" for n, a, b in zip(config.constrained, joint, separate, strict=True)]
    say(f"proxy point (each reward's own in brackets): {', '.join(text)}", flush=True)
    return runs, {"joint": joint, "separate": separate}


def story(config: Config, say: Callable = print) -> dict:
    """The job of the script: stages, runs, table and samples; OUT/metrics.jsonl, result.json and runs.png."""
    began, device, out = time.perf_counter(), pick_device(config.device), Path(config.out)
    require(not out.exists() or out.is_dir(), f"--out {out}: must be a folder, but a file is there; give another")
    task = prepare(config, device, say)
    thresholds, runs, points = numbers(config.thresholds, len(config.constrained), "--thresholds"), [], {}
    if not config.method or (config.method in ("ppo_sat", *CONSTRAINED) and not thresholds):
        runs, points = proxy_points(task, say)
        thresholds = thresholds or points["joint"]
    for method in [config.method] if config.method else ["ppo", "xi_ppo"]:
        name = "-".join(filter(None, (method, config.thresholds.replace(",", "-"))))
        updates = config.updates * (2 if method == "nelder_mead" else 1)  # as in the paper
        runs.append(Run(task, name, method, updates, thresholds).go(say))
    metrics = "".join(json.dumps(row) + "\n" for run in runs for row in run.rows)
    write_atomically(out / "metrics.jsonl", lambda name: Path(name).write_text(metrics, "utf-8"))
    samples = show(task, runs, say)
    draw(runs, config, out / "runs.png")
    result = task.facts | {"thresholds": thresholds, "proxy_points": points, "samples": samples}
    best = {run.name: max(row["evaluation"] for row in run.rows) for run in runs}
    result["runs"] = {run.name: run.rows[-1] | {"best_evaluation": best[run.name]} for run in runs}
    result["searched"] = runs[-1].search and runs[-1].search.found
    result = result_record(config, device, wall_seconds=round(time.perf_counter() - began, 1), **result)
    write_json(out / "result.json", result)
    say(f"{out}: result.json, metrics.jsonl, and the runs, after {result['wall_seconds']:.0f} s")
    return result


def show(task: Task, runs: list[Run], say: Callable) -> list[dict[str, str]]:
    """Print each run's best and last evaluation, and its last rewards, KL and variety; print and return samples."""
    columns = ("evaluation", *task.config.names, "kl", "distinct")
    say("\n" + " " * 14 + "".join(f"{name:>12}" for name in ("best", *columns)))
    for name, rows in [("pi_0", runs[0].rows[:1]), *((run.name, run.rows) for run in runs)]:
        values = max(row["evaluation"] for row in rows), *(rows[-1][column] for column in columns)
        say(f"{name:14}" + "".join(f"{value:12.3f}" for value in values))
    texts = {"reference": [row.response for row in task.valid], "pi_0": task.evaluate(task.policy)[1]}
    texts |= {run.name: run.texts for run in runs}
    samples = [{"prompt": row.prompt} | {k: v[i] for k, v in texts.items()} for i, row in enumerate(task.valid[:4])]
    for sample in samples:
        say("\n" + "\n".join(f"{k:>12}  {v}" for k, v in sample.items()))
    return samples


def draw(runs: list[Run], config: Config, path: Path) -> None:
    """Evaluation, rewards and multipliers by update, as a PNG."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed; pip install matplotlib")
        return
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    panels = {"evaluation": ["evaluation"], "rewards": config.names}
    panels["multipliers"] = [f"m_{name}" for name in config.constrained]
    for axis, (title, keys) in zip(axes, panels.items(), strict=True):
        for (i, run), (j, key) in itertools.product(enumerate(runs), enumerate(keys)):
            if line := [(row["update"], row[key]) for row in run.rows if key in row]:
                style = {"color": f"C{i}", "linestyle": ("-", "--", ":", "-.")[j % 4], "label": f"{run.name}: {key}"}
                axis.plot(*zip(*line, strict=True), **style)
        axis.set(title=title, xlabel="update")
        if axis.lines:
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
