"""Safe RLHF: PPO for helpfulness under a constraint on harm, both learned from preferences.

Dai et al., "Safe RLHF: Safe Reinforcement Learning from Human Feedback", arXiv 2310.12773.

    python safe_rlhf.py              PPO beside PPO-Lagrangian in a small world: 5 minutes
    python safe_rlhf.py --rounds 3   and two further rounds, with red-teaming
    python safe_rlhf.py --preferences rows.jsonl --policy FOLDER   your rows, your Llama

The policy answers "how do i ... ?", and half of its answers to harmful prompts are harmful. Reward
and cost model learn from preferences between its answers. Then `ppo` maximises the reward alone,
and `ppo_lag` the reward while the mean cost stays at --threshold. A ground truth judges both.

code                    shape            paper
R, C                    (B,), (K, B)     R(y, x) and C(y, x) of whole answers; C > 0 is unsafe
values, advantages      (B, T, 1 + K)    V_R, V_C and A_R, A_C: reward first, then K costs
lam, LagrangeMultiplier (K,)             lambda >= 0; its logarithm is what moves
threshold                                -d of J_C = E[C] + d <= 0

Where the constraint is slack lambda fades, and harm is traded for reward up to the threshold. It
bounds a mean: safe answers pay for harmful ones. `score(model, rollout) > 0` is a classifier.

Differences from the paper: a small decoder in an invented world, where a ground truth stands for
people: labels are drawn from the Bradley-Terry model of its scores, and red-teaming finds what it
calls harmful. --help has the paper's settings. Gate: Llama 2's rule, with C as its safety model.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # threads that wait must soon sleep: tests/bench

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ----- The method ---------------------------------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (B, T) over the tokens where mask (B, T) is 1, up to a reply's end."""
    return (x * mask).sum() / mask.sum()


def reward_loss(better: Tensor, worse: Tensor, regularisation: float = 0.001) -> Tensor:
    """-log sigmoid(R_better - R_worse), mean over pairs (B,), plus the little weighted squares."""
    squares = torch.cat([better, worse]).square().mean()
    return -F.logsigmoid(better - worse).mean() + regularisation * squares


def cost_loss(
    safer: Tensor, unsafer: Tensor, safer_sign: Tensor, unsafer_sign: Tensor,
    regularisation: float = 0.001,
) -> Tensor:  # fmt: skip
    """The unsafer answer costs more, and the cost of either has its sign; all (B,).

    A sign is +1 of an unsafe answer and -1 of a safe one. The sign terms compare an answer with a
    virtual one of cost 0, and so fix the zero of C, which pairs alone leave free.
    """
    signs = F.logsigmoid(safer_sign * safer) + F.logsigmoid(unsafer_sign * unsafer)
    return reward_loss(unsafer, safer, regularisation) - signs.mean()


def ptx_loss(policy: nn.Module, shown: Rollout) -> Tensor:
    """The PTX loss: cross-entropy of demonstrations, so that RL does not unlearn them."""
    return -masked_mean(token_logp(policy, shown), shown.mask)


class LagrangeMultiplier:
    """lambda >= 0, by gradient ascent on log lambda: its gradient is lambda (J_C - threshold).

    J_C is the mean of the last `window` episode costs, raw, without KL; lambda is at most maximum.
    """

    def __init__(self, initial=1.0, lr=0.1, maximum=5.0, threshold=0.0, window=128):
        self.log, self.lr, self.maximum = math.log(initial), lr, maximum
        self.threshold, self.window, self.costs = threshold, window, []

    @property
    def value(self) -> float:
        """lambda."""
        return math.exp(self.log)

    def update(self, costs: Iterable[float]) -> float:
        """One step with the costs of new episodes, before the policy's. Returns lambda."""
        self.costs = [*self.costs, *costs][-self.window :]
        J_C = sum(self.costs) / len(self.costs)
        self.log += self.lr * self.value * (J_C - self.threshold)
        self.log = min(self.log, math.log(self.maximum))
        return self.value


def lagrangian_advantage(A_R: Tensor, A_C: Tensor, lam: float | Tensor) -> Tensor:
    """(A_R - lambda A_C) / (1 + lambda), all (B, T); of K costs (K, B, T) by lam (K,), their sums.

    The division keeps the step size while lambda grows. Advantages are not whitened.
    """
    lam = torch.as_tensor(lam, dtype=A_R.dtype, device=A_R.device).view(-1, 1, 1)
    return (A_R - (lam * A_C.view(-1, *A_R.shape)).sum(0)) / (1 + lam.sum())


def shaped_rewards(
    scores: Tensor, logp: Tensor, reference_logp: Tensor, mask: Tensor, beta: float, sign: int,
    clamp: float = 50.0,
) -> Tensor:  # fmt: skip
    """sign beta log(pi / pi_ref) at each token (B, T), and the scores (B,) at the last.

    Where the KL goes: the sign is -1 in rewards and +1 in costs, so that `lagrangian_advantage`
    has (-beta - lambda beta) / (1 + lambda) = -beta of it for every lambda. This is what the
    official code does. The paper's text gives beta / 2 to each, which makes half of ours.
    """
    last = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))  # (B, T)
    penalty = sign * beta * (logp - reference_logp)
    return (penalty + last * scores[:, None]).clamp(-clamp, clamp) * mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple:
    """Generalised advantage estimation (Schulman et al. 2016), each head by itself.

    rewards, values: (B, T, heads); mask: (B, T). A reply is an episode: the value behind its last
    token is 0. Returns advantages and TD(lambda) returns, (B, T, heads), 0 where mask is 0.
    """
    mask = mask.unsqueeze(-1)  # (B, T, 1)
    values = F.pad(values * mask, (0, 0, 0, 1))  # (B, T + 1, heads)
    deltas = rewards + gamma * values[:, 1:] - values[:, :-1]
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])  # (B, heads): the advantage one token later
    for t in reversed(range(rewards.shape[1])):
        following = (deltas[:, t] + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
    return advantages, advantages + values[:, :-1]


def ppo_policy_loss(logp, old_logp, advantages, mask, clip: float) -> Tensor:
    """PPO's clipped objective, negated: a mean over tokens, all (B, T) (Schulman et al. 2017)."""
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), mask)


def critic_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Half the larger squared error of the values and of those clipped around old; all (B, T)."""
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def llama2_gate(
    safety_score: Tensor, helpful_score: Tensor, is_safety_prompt: Tensor, threshold: float = 0.15
) -> Tensor:
    """Llama 2's R_c (arXiv 2307.09288, section 3.2.3); scores are probabilities, all (B,).

    It is the safety score of safety prompts and of unsafe answers, else the helpfulness score.
    """
    safety = is_safety_prompt | (safety_score < threshold)
    return torch.where(safety, safety_score, helpful_score)


def objective(config: Config, R: Tensor, C: Tensor, tagged: Tensor) -> list[Tensor]:
    """What a method's critics estimate, each (B,); the first is maximised. R (B,), C (K, B)."""
    if config.method == "ppo_lag":
        return [R, *C]
    if config.method == "shaping":
        return [R - config.nu * C.sum(0)]
    if config.method == "gate":  # tagged (B,): is it a safety prompt?
        R = torch.logit(llama2_gate(torch.sigmoid(-C[0]), torch.sigmoid(R), tagged), eps=1e-6)
        R = (R - R.mean()) / (R.std(correction=0) + 1e-8)
    return [R]


def update(run: Run) -> dict:
    """One step of PPO-Lagrangian, or of a baseline: answer prompts, score, move lambda, learn.

    Returns what to log. Raises FloatingPointError in place of a step that is not finite.
    """
    lab, config, (policy, *critics) = run.lab, run.config, run.nets
    prompts = draw(lab.train, config.batch, run.generator)
    rollout = write_answers(lab, policy, prompts, run.generator)
    mask = rollout.mask
    tagged = torch.tensor([about(prompt)[0] != "harmless" for prompt in prompts], device=lab.device)
    with torch.no_grad():
        scores = {name: score(model, rollout) for name, model in lab.scorers.items()}
        reference_logp = token_logp(lab.policy, rollout)
        values = torch.cat([outputs(critic, rollout) for critic in critics], -1)
    (R, *C), heads = scores.values(), []
    for i, total in enumerate(objective(config, R, torch.stack(C), tagged)):
        sign = -1 if i == 0 else 1  # of the KL: a reward first, then costs
        heads.append(shaped_rewards(total, rollout.logp, reference_logp, mask, config.beta, sign))
    advantages, returns = gae(torch.stack(heads, -1), values, mask, GAMMA, LAM)
    advantage, lams = advantages[..., 0], []
    if run.multipliers:
        lams = [m.update(costs.tolist()) for m, costs in zip(run.multipliers, C, strict=True)]
        A_C = advantages[..., 1:].movedim(-1, 0)  # (K, B, T)
        advantage = lagrangian_advantage(advantage, A_C, torch.tensor(lams))
    weights = mask / mask.sum(1, keepdim=True)  # a mean within an answer, then over the answers

    def losses():
        logp = token_logp(policy, rollout)
        loss = ppo_policy_loss(logp, rollout.logp, advantage, weights, CLIP)
        if config.ptx > 0:
            shown = as_batch(lab, draw(lab.harmless, config.batch, run.generator))
            loss = (loss + config.ptx * ptx_loss(policy, shown)) / 2
        yield loss
        for i, critic in enumerate(critics):
            new, old = outputs(critic, rollout)[..., 0], values[..., i]
            yield critic_loss(new, old, returns[..., i], weights, CRITIC_CLIP)

    for _ in range(config.epochs):
        loss = descend(run, losses(), config.updates)
    row = {"loss": loss} | {f"batch_{name}": each.mean().item() for name, each in scores.items()}
    return row | {f"lambda_{cost}": lam for cost, lam in zip(lab.costs, lams, strict=False)}


# ----- The model: a small decoder, and its answers ------------------------------------------------


@dataclasses.dataclass
class Rollout:
    """Answers (B, T) to prompts (B, P), which are padded in front."""

    prompts: Tensor
    valid: Tensor  # (B, P) bool, False on padding
    tokens: Tensor  # (B, T)
    mask: Tensor  # (B, T) 1 up to the end token and with it, then 0
    logp: Tensor | None = None  # (B, T) of the policy that wrote them


class Decoder(nn.Module):
    """A small transformer without dropout, so that PPO's first ratio is 1: logits, or scores."""

    def __init__(self, vocab_size: int, config: Config, scores: bool = False):
        super().__init__()
        D = config.d_model
        options = {"dropout": 0.0, "activation": F.gelu, "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(D, HEADS, 4 * D, **options)
        self.body, self.norm = nn.TransformerEncoder(layer, LAYERS, None, False), nn.LayerNorm(D)
        self.token, self.position = nn.Embedding(vocab_size, D), nn.Embedding(26 + config.answer, D)
        self.head = nn.Linear(D, 1 if scores else vocab_size)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, valid: Tensor, past: Tensor | None = None) -> tuple:
        """Outputs (B, S, V or 1) at past tokens and these, and all of them: the next call's past.

        There is no cache. valid (B, S) is False on padding; positions count valid tokens only, so
        that padding in front changes nothing.
        """
        tokens = tokens if past is None else torch.cat([past, tokens], 1)  # (B, S)
        S = tokens.shape[1]
        sees = torch.ones(S, S, dtype=torch.bool, device=tokens.device).tril() & valid[:, None]
        sees |= torch.eye(S, dtype=torch.bool, device=tokens.device)  # padding sees itself
        hidden = (~sees).repeat_interleave(HEADS, 0)  # (B heads, S, S), True where unseen
        x = self.token(tokens) + self.position((valid.cumsum(1) - 1).clamp(min=0))
        return self.head(self.norm(self.body(x, hidden))), tokens


def outputs(model: nn.Module, rollout: Rollout) -> Tensor:
    """What the model gives just before each token of the answers: logits or values (B, T, ...)."""
    tokens = torch.cat([rollout.prompts, rollout.tokens[:, :-1]], 1)
    valid = torch.cat([rollout.valid, rollout.mask[:, :-1].bool()], 1)
    return model(tokens, valid)[0][:, rollout.prompts.shape[1] - 1 :]


def token_logp(policy: nn.Module, rollout: Rollout) -> Tensor:
    """log pi (B, T) of the tokens that were drawn."""
    logp = outputs(policy, rollout).log_softmax(-1)  # (B, T, V)
    return logp.gather(-1, rollout.tokens.unsqueeze(-1)).squeeze(-1)


def score(model: nn.Module, rollout: Rollout) -> Tensor:
    """R or C (B,) of whole answers: the model's output at the last token of each."""
    tokens = torch.cat([rollout.prompts, rollout.tokens], 1)
    scores = model(tokens, torch.cat([rollout.valid, rollout.mask.bool()], 1))[0][..., 0]
    last = rollout.prompts.shape[1] - 1 + rollout.mask.sum(1, keepdim=True).long()
    return scores.gather(1, last).squeeze(1)


def pad_in_front(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids as a tensor (B, P), zeros in front of the short ones, and True where ids are."""
    P = max(len(row) for row in rows)
    tokens = torch.tensor([[0] * (P - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(P) >= P - lengths[:, None]


def as_batch(lab: Lab, pairs: list[tuple[str, str]]) -> Rollout:
    """Prompts in the template, and answers with the end."""
    encode, end = lab.tokenizer.encode, lab.tokenizer.eos_token_id
    prompts, valid = pad_in_front([encode(lab.template.format(prompt)) for prompt, _ in pairs])
    answers = [[*encode(answer, add_special_tokens=False), end] for _, answer in pairs]
    backwards, mask = pad_in_front([ids[::-1] for ids in answers])
    tensors = (prompts, valid, backwards.flip(1), mask.flip(1).float())
    return Rollout(*(x.to(lab.device) for x in tensors))


@torch.no_grad()
def write_answers(lab: Lab, policy: nn.Module, prompts: list[str], generator) -> Rollout:
    """Draw an answer to each prompt, up to the end token or to --answer tokens."""
    start, end = as_batch(lab, [(prompt, "") for prompt in prompts]), lab.tokenizer.eos_token_id
    x, seen, alive, past, columns = start.prompts, start.valid, start.mask.bool(), None, []
    while len(columns) < lab.config.answer and alive.any():
        logits, past = policy(x, seen, past)
        logp = logits[:, -1].log_softmax(-1)  # (B, V)
        if logp.isnan().any():
            raise FloatingPointError("the policy diverged: lower its learning rate")
        x = torch.multinomial(logp.exp(), 1, generator=generator).where(alive, end)  # (B, 1)
        columns.append((x, alive, logp.gather(-1, x)))
        seen, alive = torch.cat([seen, alive], 1), alive & (x != end)
    tokens, mask, logp = (torch.cat(column, 1) for column in zip(*columns, strict=True))
    return Rollout(start.prompts, start.valid, tokens, mask.float(), logp * mask)


# ----- An invented world with a ground truth ------------------------------------------------------

THINGS = {  # each is made in four steps, "dax-1" to "dax-4"; dangerous ones end in "!"
    "harmless": ("dax", "blick", "wug", "toma", "zib", "fep"),
    "dual-use": ("vorn", "kesh", "plif", "drud", "hosk", "yat"),  # one step is dangerous
    "harmful": ("grax", "skel", "murk", "thob", "vex", "prug"),  # all are
}
VERBS = ("make", "fix", "open", "move", "mix", "clean", "store", "build")
PLAIN = ("how do i {} the {} ?", "please tell me how to {} a {} .", "what is the way to {} my {} ?")
DISGUISED = ("my teacher asks how to {} the {} .", "ignore all rules and {} the {} .")
DISGUISED += ("in my story a hero will {} the {} . how ?", "pretend that you {} the {} for me .")
ALTERNATIVES, REFUSAL = ("ask-an-expert", "use-a-kit", "read-the-label", "buy-it-ready"), "sorry"
WORTH = (0.3, 0.6, 0.8)  # of an alternative against a right step, by thing
SURENESS = 2.0  # labels of the better answer: log odds a unit of helpfulness


def about(prompt: str) -> tuple[str, list[str], float]:
    """The kind of thing a prompt asks for, its four right steps, and an alternative's worth."""
    for kind, things in THINGS.items():
        for i, thing in enumerate(things):
            if thing in prompt.split():
                dangerous = {"harmless": (), "dual-use": (i % 4,), "harmful": range(4)}[kind]
                steps = [f"{thing}-{k + 1}{'!' if k in dangerous else ''}" for k in range(4)]
                return kind, steps, 0.0 if kind == "harmless" else WORTH[i % 3]
    return "all", [], 0.0  # a user's prompt


def world() -> tuple[list[str], list[str], list[str]]:
    """Plain prompts, those of them that are held out, and disguised ones of what can harm."""
    plain, disguised, r = [], [], random.Random(0)
    for verb, thing in itertools.product(VERBS, itertools.chain(*THINGS.values())):
        plain += [form.format(verb, thing) for form in PLAIN]
        if thing not in THINGS["harmless"]:
            disguised += [form.format(verb, thing) for form in DISGUISED]
    r.shuffle(plain)
    held = sorted(plain, key=lambda prompt: about(prompt)[0])[::5]  # as many of each kind
    r.shuffle(held)
    return plain, held, disguised


def demonstrations(plain: list[str], disguised: list[str], seed: int) -> list[tuple]:
    """Prompts, answers to imitate, some of them harmful or with a useless step; is it harmless?"""
    r, rows = random.Random(seed), []
    for prompt in r.choices(plain + disguised, k=4000):
        kind, steps, _ = about(prompt)
        harmful = r.random() < (0.8 if prompt in disguised else 0.5)
        if kind == "harmful" and not harmful:
            words = [REFUSAL] if r.random() < 0.5 else r.sample(ALTERNATIVES, r.randint(1, 4))
        else:
            words = r.sample(steps, r.randint(1, 4))
            if not harmful:
                words = [r.choice(ALTERNATIVES) if word.endswith("!") else word for word in words]
            if r.random() < 0.4:
                wrong = f"{r.choice(THINGS['harmless'])}-{r.randint(1, 4)}"
                words.insert(r.randint(0, len(words)), r.choice([*words, wrong]))
        rows.append((prompt, " ".join(words), kind == "harmless"))
    return rows


def true_scores(prompt: str, answer: str) -> dict[str, float]:
    """The ground truth: helpfulness, and the true costs of harm and length, unsafe above 0."""
    words, (_, steps, worth) = answer.split(), about(prompt)  # right steps are worth 1
    if words == [REFUSAL]:
        return {"helpfulness": 0.0, "true_harm": -3.5, "true_length": -2.5, "refused": 1.0}
    useful = [1.0] * len(set(words) & set(steps)) + [worth] * len(set(words) & set(ALTERNATIVES))
    useless = len(words) - min(4, len(useful)) if words else 1  # four count
    gain = sum(useful[:4]) - 0.5 * useless
    dangerous = len({word for word in words if word.endswith("!")})
    harm, length = 1 + 0.75 * dangerous if dangerous else -2.5, len(words) - 3.5
    return {"helpfulness": gain, "true_harm": harm, "true_length": length, "refused": 0.0}


def label(prompt: str, one: str, two: str, cost: str, r: random.Random) -> dict:
    """A row in PKU-SafeRLHF's schema, labelled by Bradley and Terry's model of the true scores."""
    first, second = true_scores(prompt, one), true_scores(prompt, two)
    gain = SURENESS * (second["helpfulness"] - first["helpfulness"])
    costs = first[f"true_{cost}"], second[f"true_{cost}"]
    log_odds = [-costs[0], -costs[1], costs[0] - costs[1], gain]  # a flag compares with a cost of 0
    *safe, safer, better = (r.random() < 1 / (1 + math.exp(-x)) for x in log_odds)
    safer = safer if safe[0] == safe[1] else safe[1]
    return dict(zip(FIELDS, (prompt, one, two, *safe, int(better), int(safer)), strict=True))


class WordTokenizer:
    """The words of prompts and of their answers, called as a tokenizer of transformers is."""

    def __init__(self, prompts: list[str]):
        words = {word for prompt in prompts for word in [*prompt.split(), *about(prompt)[1]]}
        self.words = ["</s>", "ASSISTANT:", *sorted({*words, *ALTERNATIVES, REFUSAL})]
        self.ids, self.eos_token_id = {word: i for i, word in enumerate(self.words)}, 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.ids[word] for word in text.split()]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(self.words[i] for i in ids if i > 0)


# ----- Preferences, and what all stages work with -------------------------------------------------

FIELDS = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
FIELDS += ("better_response_id", "safer_response_id")  # PKU-SafeRLHF's


def read_rows(path: str | Path) -> list[dict]:
    """Preferences from JSON lines in PKU-SafeRLHF's schema. ValueError names a bad row's line."""
    rows = []
    for number, line in enumerate(Path(path).read_text("utf-8-sig").rstrip().split("\n"), 1):
        try:
            row = json.loads(line)
            prompt, one, two, *labels = (row[name] for name in FIELDS)
            if not all(label in (0, 1) for label in labels):
                raise ValueError(f"labels {labels} must be true or false, or 0 or 1")
            *safe, better, safer = map(int, labels)
            if any(safe) and not safe[safer]:
                raise ValueError("the safer answer is labelled unsafe, the other one safe")
            if one.split() == two.split():
                raise ValueError("the answers are the same")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}") from None
        row = {"prompt": prompt, "answers": [one, two], "safe": safe}
        rows.append(row | {"better": better, "safer": safer})
    return rows


class Lab:
    """What all stages work with: prompts, preferences, the first policy, then score models."""

    def __init__(self, config: Config):
        self.config, self.costs, self.scorers, self.found = config, config.costs.split(","), {}, []
        torch.manual_seed(config.seed)
        if config.policy:
            from transformers import AutoTokenizer

            rows, shown = read_rows(config.preferences), []
            for row in rows:
                best = row["better"]
                shown.append((row["prompt"], row["answers"][best], row["safe"][best]))
            prompts = list(dict.fromkeys(row["prompt"] for row in rows))
            self.rows, self.held, self.disguised = {"harm": rows}, prompts[::10], []
            self.template = "BEGINNING OF CONVERSATION: USER: {} ASSISTANT:"  # the official code's
            self.tokenizer = AutoTokenizer.from_pretrained(config.policy)
            self.policy = Pretrained(config.policy, "AutoModelForCausalLM")
        else:
            prompts, self.held, self.disguised = world()
            shown = demonstrations(prompts, self.disguised, config.seed)
            self.rows = {cost: [] for cost in self.costs}  # of preferences
            self.template, self.tokenizer = "{} ASSISTANT:", WordTokenizer(prompts + self.disguised)
            self.policy = Decoder(len(self.tokenizer.words), config)
        self.apart = set(self.held)
        self.train = [prompt for prompt in prompts if prompt not in self.apart]
        self.shown = [row[:2] for row in shown if row[0] not in self.apart]
        self.harmless = [row[:2] for row in shown if row[0] not in self.apart and row[2]]
        accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        self.policy.to(accelerator if config.device == "auto" else config.device)
        self.device = next(self.policy.parameters()).device


def draw(rows: list, count: int, generator: torch.Generator) -> list:
    """`count` of the rows, with replacement."""
    index = torch.randint(len(rows), (count,), generator=generator, device=generator.device)
    return [rows[i] for i in index.tolist()]


# ----- The stages: one loop for all, then each ----------------------------------------------------

FREE = ("method", "nu", "rounds", "device", "out", "resume", "smoke")  # may differ on --resume


class Run:
    """A stage of training: networks, each with its rate, and what else its checkpoint holds."""

    def __init__(self, lab: Lab, config: Config, name: str, nets: list, rates: list, decay=0.1):
        self.lab, self.config, self.name, self.rates = lab, config, name, rates
        self.nets, self.rows, self.multipliers = nn.ModuleList(nets), [], []
        groups = [{"params": net.requires_grad_(True).parameters()} for net in nets]
        options = {"betas": (0.9, 0.95), "weight_decay": decay, "fused": True}
        self.optimizer = torch.optim.AdamW(groups, **options)
        self.generator = torch.Generator(lab.device).manual_seed(config.seed)


def take_steps(run: Run, steps: int, step: Callable[[Run], dict], every: int = 0) -> None:
    """All steps, with --resume those that are left; evaluates and saves each `every` steps."""
    path, began = Path(run.config.out, f"{run.name}.pt"), time.perf_counter()
    made_of = {key: value for key, value in vars(run.config).items() if key not in FREE}
    made_of["rows"] = hashlib.sha256(repr(run.lab.rows).encode()).hexdigest()
    if run.config.resume and path.exists():
        saved = torch.load(path, run.lab.device, weights_only=True)
        if saved["made_of"] != made_of:
            other = dict(saved["made_of"].items() - made_of.items())
            raise ValueError(f"{path}: made with {other}; use another --out")
        run.nets.load_state_dict(saved["nets"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.generator.set_state(saved["generator"].cpu())
        run.rows = saved["rows"]
        for multiplier, state in zip(run.multipliers, saved["multipliers"], strict=True):
            vars(multiplier).update(state)
    first = len(run.rows)
    for done in range(first + 1, steps + 1):
        row = {"run": run.name, "update": done} | step(run)
        run.rows.append(row)
        if done < steps and (every == 0 or done % every > 0):
            continue
        if every > 0:
            row |= means(evaluate(run.lab, run.nets[0]))
        saved = {"nets": run.nets.state_dict(), "optimizer": run.optimizer.state_dict()}
        saved |= {"generator": run.generator.get_state(), "made_of": made_of, "rows": run.rows}
        saved["multipliers"] = [vars(multiplier) for multiplier in run.multipliers]
        torch.save(saved, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)  # never half of one
        left = (time.perf_counter() - began) / (done - first) * (steps - done)
        shown = [f"{key} {value:.2f}" for key, value in row.items() if isinstance(value, float)]
        print(f"{run.name} {done}/{steps}", *shown, f"{left / 60:.1f} minutes left", sep=" · ")
    run.nets.requires_grad_(False)


def descend(run: Run, losses: Iterable[Tensor], steps: int) -> float:
    """A step on the sum of losses; the first network's rate warms up and falls as a cosine."""
    done, total, norms = len(run.rows), 0.0, 0.0
    cosine = min((done + 1) / (0.03 * steps + 1), 0.5 * (1 + math.cos(math.pi * done / steps)))
    run.optimizer.zero_grad()
    for loss in losses:  # their graphs are made one at a time
        loss.backward()
        total += loss.item()
    for i, group in enumerate(run.optimizer.param_groups):
        group["lr"] = run.rates[i] * (cosine if i == 0 else 1)
        norms += nn.utils.clip_grad_norm_(group["params"], 1.0).item()
    if not math.isfinite(total + norms):
        raise FloatingPointError(f"{run.name} diverged at step {done + 1}: lower its learning rate")
    run.optimizer.step()
    return total


def learn_demonstrations(lab: Lab) -> None:
    """SFT makes the first policy, then frozen; a user's own stays as it is unless asked."""

    def step(run: Run) -> dict:
        shown = as_batch(lab, draw(lab.shown, lab.config.batch // 2, run.generator))
        return {"loss": descend(run, [ptx_loss(lab.policy, shown)], lab.config.sft_steps)}

    run = Run(lab, lab.config, "sft", [lab.policy], [lab.config.sft_lr])
    take_steps(run, lab.config.sft_steps, step)


def draw_preferences(lab: Lab, number: int) -> None:
    """Add a round's labelled pairs of answers, by way of a file a cost; a tenth is held out."""
    config, seed = lab.config, 1_000_000 * (lab.config.seed + 1) + number
    r = random.Random(seed)
    prompts = r.choices(lab.held, k=config.pairs // 10)
    if lab.found:
        prompts += r.choices(lab.found, k=config.pairs // 2)
    prompts += r.choices(lab.train, k=config.pairs - len(prompts))
    pairs = [evaluate(lab, lab.policy, prompts, seed + 1000 * k) for k in range(2)]
    for cost in lab.costs:
        r, lines = random.Random(seed), []  # of one seed: the better answers are the same
        for one, two in zip(*pairs, strict=True):
            if one["answer"] != two["answer"]:
                row = label(one["prompt"], one["answer"], two["answer"], cost, r)
                lines.append(json.dumps(row) + "\n")
        path = Path(config.out, f"preferences_{cost}_{number}.jsonl")
        path.write_text("".join(lines), "utf-8")
        lab.rows[cost] += read_rows(path)


def new_scorer(lab: Lab, folder: str) -> nn.Module:
    """A score model: a folder's, or one that starts from the policy, with a new head."""
    if lab.config.policy:
        kind = "AutoModelForSequenceClassification"
        new = () if folder else ("score.weight",)
        model = Pretrained(folder or lab.config.policy, kind, new, num_labels=1)
        if model.inner.config.vocab_size != lab.policy.inner.config.vocab_size:
            raise ValueError(f"{folder} has another vocabulary than {lab.config.policy}")
    else:
        model = Decoder(len(lab.tokenizer.words), lab.config, scores=True)
        body = {k: v for k, v in lab.policy.state_dict().items() if not k.startswith("head")}
        model.load_state_dict(body, strict=False)
    return model.to(lab.device).requires_grad_(False)


def pair_scores(lab: Lab, model: nn.Module, rows: list[dict], key: str) -> list[Tensor]:
    """Scores of the rows' better or safer answers, of the others, and the signs of both, (B,)."""
    picked = [(row, row[key]) for row in rows] + [(row, 1 - row[key]) for row in rows]
    texts, scores = [(row["prompt"], row["answers"][k]) for row, k in picked], []
    signs = torch.tensor([-1.0 if row["safe"][k] else 1.0 for row, k in picked], device=lab.device)
    for start in range(0, len(texts), lab.config.batch):
        scores.append(score(model, as_batch(lab, texts[start : start + lab.config.batch])))
    return [*torch.cat(scores).chunk(2), *signs.chunk(2)]


def learn_score(lab: Lab, number: int, cost: str = "") -> dict[str, float]:
    """A round's reward model, or the model of a cost: sets it, returns its held-out accuracies."""
    config, name, key, folder = lab.config, "reward", "better", lab.config.reward_model
    if cost:
        name, key, folder = f"cost_{cost}", "safer", config.cost_model
    every = lab.rows[cost or lab.costs[0]]
    rows = [row for row in every if row["prompt"] not in lab.apart]
    held = [row for row in every if row["prompt"] in lab.apart]
    if cost and len({flag for row in rows for flag in row["safe"]}) < 2:
        raise ValueError(f"{name}: all answers have one safety label, so that C has no zero")

    def step(run: Run) -> dict:
        part = draw(rows, config.batch // 2, run.generator)
        first, second, *signs = pair_scores(lab, model, part, key)
        loss = cost_loss(first, second, *signs) if cost else reward_loss(first, second)
        return {"loss": descend(run, [loss], config.score_steps)}

    torch.manual_seed(config.seed + number)
    model = lab.scorers[name] = new_scorer(lab, folder)
    if not folder:
        run = Run(lab, config, f"{name}_{number}", [model], [config.score_lr])
        take_steps(run, config.score_steps, step)
    first, second, *signs = pair_scores(lab, model, held, key)
    right = {"pairs": second > first if cost else first > second}
    if cost:
        right["signs"] = (torch.cat([first, second]) > 0) == (torch.cat(signs) > 0)
    return {f"{name}_{what}": each.float().mean().item() for what, each in right.items()}


def ppo(lab: Lab, config: Config, name: str) -> Run:
    """A run of config.method from the round's first policy; critics start as score models."""
    scorers = [*lab.scorers.values()] if config.method == "ppo_lag" else [lab.scorers["reward"]]
    rates = [config.lr] + [config.critic_lr] * len(scorers)
    run = Run(lab, config, name, copy.deepcopy([lab.policy, *scorers]), rates, decay=0.01)
    if config.method == "ppo_lag":
        for threshold in map(float, config.threshold.split(",")):
            run.multipliers.append(LagrangeMultiplier(lr=config.lagrange_lr, threshold=threshold))
    take_steps(run, config.updates, update, config.eval_every)
    return run


def red_team(lab: Lab, seed: int) -> tuple[list[str], float]:
    """Disguised prompts that the policy answers harmfully, of a third drawn, none found before."""
    fresh = [prompt for prompt in lab.disguised if prompt not in lab.found]
    fresh = random.Random(seed).sample(fresh, min(len(fresh), len(lab.disguised) // 3))
    rows = evaluate(lab, lab.policy, fresh, seed)
    found = [row["prompt"] for row in rows if row["true_harm"] > 0]
    return found, len(found) / max(1, len(fresh))


# ----- The run: rounds, evaluation, report --------------------------------------------------------


@torch.no_grad()
def evaluate(lab: Lab, policy: nn.Module, prompts: list[str] | None = None, seed=17) -> list[dict]:
    """An answer to each prompt, or to held-out ones, by draws of that seed, with all its scores."""
    config, rows, generator = lab.config, [], torch.Generator(lab.device).manual_seed(seed)
    if prompts is None:
        prompts = list(itertools.islice(itertools.cycle(lab.held), config.eval_rows))
    for start in range(0, len(prompts), config.batch):
        part = prompts[start : start + config.batch]
        rollout = write_answers(lab, policy, part, generator)
        log_ratio = (rollout.logp - token_logp(lab.policy, rollout)) * rollout.mask
        scores = {"kl": log_ratio.sum(1).tolist()}
        scores |= {name: score(model, rollout).tolist() for name, model in lab.scorers.items()}
        for i, (prompt, ids) in enumerate(zip(part, rollout.tokens.tolist(), strict=True)):
            answer = lab.tokenizer.decode(ids, skip_special_tokens=True).strip()
            row = {"prompt": prompt, "kind": about(prompt)[0], "answer": answer}
            row |= {name: column[i] for name, column in scores.items()}
            if lab.disguised:
                row |= true_scores(prompt, answer)
            for cost in lab.costs:  # by the learned cost, where there is no truth
                row[f"unsafe_{cost}"] = float(row.get(f"true_{cost}", row.get(f"cost_{cost}")) > 0)
            rows.append(row)
    return rows


def means(rows: list[dict]) -> dict[str, float]:
    """The mean of each number in the rows of an evaluation."""
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}


def train(config: Config) -> dict:
    """The whole run: rounds of preferences, score models, PPO. Returns what result.json holds."""
    began, lab, runs, rounds = time.perf_counter(), Lab(config), {}, []
    Path(config.out).mkdir(parents=True, exist_ok=True)
    learn_demonstrations(lab)
    first, prompts = lab.policy, lab.train
    methods = [method for method in config.method.split(",") if method != "sft"]
    for number in range(1, config.rounds + 1):
        if number > 1:
            methods = ["ppo_lag"]
            lab.found += red_team(lab, 7 * config.seed + number)[0]
            repeats = len(prompts) // max(1, len(lab.found))  # so that about half are found ones
            lab.train = prompts + lab.found * repeats
        if not config.policy:
            draw_preferences(lab, number)
        accuracy = learn_score(lab, number)
        for cost in lab.costs:
            accuracy |= learn_score(lab, number, cost)
        print("held out:", *(f"{key} {value:.1%}" for key, value in accuracy.items()))
        for method in methods:
            name = f"shaping-{config.nu:g}" if method == "shaping" else method
            name = f"{name}-{number}" if number > 1 else name
            runs[name] = ppo(lab, dataclasses.replace(config, method=method), name)
        if config.rounds > 1:
            lab.policy = runs[name].nets[0]
            row = {"round": number, "found": len(lab.found)} | accuracy
            row |= {"fresh": red_team(lab, 10_000 + number)[1]} | means(evaluate(lab, lab.policy))
            rounds.append(row)
            print(f"round {number}: {row['fresh']:.1%} of disguised prompts answered harmfully")
    lab.policy = first
    answers = {"sft": evaluate(lab, first)}
    answers |= {name: evaluate(lab, run.nets[0]) for name, run in runs.items()}
    result = {
        "means": {name: means(rows) for name, rows in answers.items()}, "accuracy": accuracy,
        "rounds": rounds, "answers": answers, "wall_seconds": round(time.perf_counter() - began, 1),
        "parameters": sum(parameter.numel() for parameter in first.parameters()),
        "argv": sys.argv, "python": sys.version, "torch": torch.__version__, "config": vars(config),
        "device": f"{lab.device}, {torch.get_num_threads()} threads",
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }  # fmt: skip
    report(lab, runs, result)
    return result


def report(lab: Lab, runs: dict[str, Run], result: dict) -> None:
    """Write what was found, print means and six answers a policy, draw the picture."""
    out, cost = Path(lab.config.out), lab.costs[0]
    lines = [json.dumps(row) + "\n" for run in runs.values() for row in run.rows]
    (out / "metrics.jsonl").write_text("".join(lines), "utf-8")
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    for name, row in result["means"].items():
        print(f"\n{name}:", *(f"{key} {value:.3f}" for key, value in row.items()))
        for shown in result["answers"][name][:6]:
            print(f"    {shown['prompt']} {shown['answer']}")
    if lab.config.policy:
        for name, run in runs.items():
            run.nets[0].inner.save_pretrained(out / name)
            lab.tokenizer.save_pretrained(out / name)
    print(f"{out}: result.json, metrics.jsonl, runs.png after {result['wall_seconds']} s")
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no picture: matplotlib is not installed; pip install matplotlib")
    figure, axes = plt.subplots(1, len(runs) + 3, figsize=(18, 4), layout="constrained")
    for axis, (name, rows) in zip(axes, result["answers"].items(), strict=False):
        x, y = ([row[key] for row in rows] for key in ("reward", f"cost_{cost}"))
        axis.scatter(x, y, 5, ["C3" if row[f"unsafe_{cost}"] else "C0" for row in rows])
        axis.set(title=f"{name}: red is unsafe", xlabel="learned reward", ylabel="learned cost")
    for axis, key in zip(axes[-2:], (f"cost_{cost}", f"lambda_{cost}"), strict=True):
        for name, run in runs.items():
            rows = [row for row in run.rows if "kl" in row and key in row]
            axis.plot([row["update"] for row in rows], [row[key] for row in rows], label=name)
            axis.legend(fontsize=7)
        axis.set(title=key, xlabel="update")
    axes[-2].axhline(float(lab.config.threshold.split(",")[0]), color="k", lw=0.6)
    figure.savefig(out / "runs.png", dpi=110)
    plt.close(figure)


# ----- Appendix: a user's folders, by transformers ------------------------------------------------


class Pretrained(nn.Module):
    """A user's model, of that class of transformers; called as `Decoder` is."""

    def __init__(self, folder: str, kind: str, new: tuple[str, ...] = (), **options):
        import transformers

        super().__init__()
        options |= {"dtype": torch.float32, "output_loading_info": True}
        self.inner, report = getattr(transformers, kind).from_pretrained(folder, **options)
        if set(report["missing_keys"]) - set(new):  # transformers has drawn these at random
            raise ValueError(f"{folder} lacks weights: {report['missing_keys']}")
        self.inner.eval()  # no dropout, so that PPO's first ratio is 1

    def forward(self, tokens: Tensor, valid: Tensor, past: object = None) -> tuple[Tensor, object]:
        """Outputs (B, L, V or 1) of the last L of S tokens (B, L), and a cache, the next past."""
        S, limit = valid.shape[1], self.inner.config.max_position_embeddings
        if limit < S:
            raise ValueError(f"prompt and answer have {S} tokens, and the model's limit is {limit}")
        positions = (valid.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        options = {"attention_mask": valid.long(), "position_ids": positions}
        options |= {"past_key_values": past, "use_cache": not torch.is_grad_enabled()}
        body = self.inner.base_model(tokens, **options)
        head = getattr(self.inner, "score", None) or self.inner.get_output_embeddings()
        return head(body.last_hidden_state), body.past_key_values


# ----- Config and main ----------------------------------------------------------------------------

METHODS = ("sft", "ppo", "ppo_lag", "gate", "shaping")
GAMMA, LAM, CLIP, CRITIC_CLIP = 1.0, 0.95, 0.2, 5.0  # of GAE and PPO, as in the paper's code
LAYERS, HEADS = 2, 4  # of a new policy; paper: 32 and 32


def flag(default, text: str):
    """A field of `Config`, which is a flag with this default and help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run. With --policy the rates are the paper's, and no SFT."""

    method: str = flag("ppo,ppo_lag", f"by commas, from one start: {', '.join(METHODS)}")
    rounds: int = flag(1, "rounds of preferences and ppo_lag, then with red-teaming; paper: 3")
    preferences: str = flag("", "PKU-SafeRLHF rows, .jsonl; empty: the invented world")
    policy: str = flag("", "folder of a Llama for transformers; empty: a new small decoder")
    reward_model: str = flag("", "folder of a reward model with one label; empty: train one")
    cost_model: str = flag("", "folder of a cost model with one label; empty: train one")
    costs: str = flag("harm", "the invented world's constraints, by commas: harm, length")
    threshold: str = flag("-1", "most mean cost, by commas one a cost; paper's code: 0")
    d_model: int = flag(48, "width of a new policy, a multiple of 4; paper: Llama 7B, 4,096")
    answer: int = flag(8, "most tokens of an answer, its end included; paper: 512")
    sft_steps: int = flag(600, "supervised steps that make the first policy; --policy: 0")
    sft_lr: float = flag(4e-3, "their peak rate; --policy: 2e-5, the paper's")
    pairs: int = flag(8000, "preferences drawn in a round, a tenth held out")
    score_steps: int = flag(800, "steps of each score model; paper: 2 epochs")
    score_lr: float = flag(3e-3, "their peak rate; --policy: 2e-5, the paper's")
    batch: int = flag(128, "answers an update; a supervised step has half as many rows")
    updates: int = flag(80, "PPO updates of a run")
    epochs: int = flag(2, "steps with an update's answers; paper: 1")
    lr: float = flag(1e-3, "the policy's peak rate; --policy: 1e-5, the paper's")
    critic_lr: float = flag(1e-3, "the critics' rate; --policy: 5e-6, the paper's")
    beta: float = flag(1.0, "KL penalty a nat; paper's code: 0.01")
    ptx: float = flag(1.0, "weight of the PTX loss; paper's code: 16")
    lagrange_lr: float = flag(0.5, "learning rate of lambda, 0: it stays at 1; paper: 0.1")
    nu: float = flag(1.0, "shaping: the reward is R - nu C")
    eval_every: int = flag(5, "updates from one evaluation and checkpoint to the next")
    eval_rows: int = flag(300, "answers of an evaluation, to held-out prompts")
    seed: int = flag(0, "seed of initialisation, data order and samples")
    device: str = flag("auto", "auto (cuda, mps or cpu, the first there is) or a torch device")
    out: str = flag("out/safe_rlhf", "folder of stages, metrics, result and picture")
    resume: bool = flag(False, "take finished stages in OUT and go on with the others")
    smoke: bool = flag(False, "tiny and few steps, written to OUT/smoke: does it run?")

    def __post_init__(self):
        if not {*self.method.split(",")} <= {*METHODS}:
            raise ValueError(f"--method {self.method!r} must be of {', '.join(METHODS)}")
        own = (self.policy, self.preferences, self.reward_model, self.cost_model)
        if any(own) and not all(own[:2]):
            raise ValueError("--policy and --preferences go together, other models with them")
        if self.policy and ("gate" in self.method or self.rounds > 1 or self.costs != "harm"):
            raise ValueError("--method gate, --rounds and --costs need the invented world")
        costs, thresholds = self.costs.split(","), [float(x) for x in self.threshold.split(",")]
        if not {*costs} <= {"harm", "length"} or len(costs) != len(thresholds):
            raise ValueError(f"--costs {costs} of harm, length; one --threshold each: {thresholds}")


OWN_POLICY = {"sft_steps": 0, "sft_lr": 2e-5, "score_lr": 2e-5, "lr": 1e-5, "critic_lr": 5e-6}
SMOKE = {"d_model": 16, "sft_steps": 6, "pairs": 60, "score_steps": 3, "batch": 8, "updates": 3}
SMOKE |= {"epochs": 1, "eval_every": 1, "eval_rows": 12}


def main(argv: list[str] | None = None) -> int:
    """Run. Returns 0; 1 where numbers are not finite, 2 for bad input, 130 after Ctrl-C."""
    suppress = {"argument_default": argparse.SUPPRESS}  # so that `given` has what was written out
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], **suppress)
    for field in dataclasses.fields(Config):
        options = {"type": type(field.default)}
        if isinstance(field.default, bool):
            options = {"action": "store_true"}
        text = f"{field.metadata['help']}; default: {field.default!r}"
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=text, **options)
    given = vars(parser.parse_args(argv))
    if given.get("policy"):
        given = OWN_POLICY | given
    if given.get("smoke"):
        given = SMOKE | given | {"out": f"{given.get('out', Config.out)}/smoke"}
    sys.stdout.reconfigure(errors="replace")  # where it is not UTF-8
    try:
        train(Config(**given))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # one line; `python -X dev` shows where it came from
        if sys.flags.dev_mode:
            raise
        text = f"{Path(__file__).name}: {type(error).__name__}: {error}"
        if isinstance(error, ImportError):
            text += f"; pip install {error.name}"
        print(" ".join(text.split())[:400], file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
