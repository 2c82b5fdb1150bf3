"""Constrained RLHF: PPO that holds each reward where it stops being a good proxy.

Moskovitz et al., "Confronting Reward Model Overoptimization with Constrained RLHF", 2310.04373.

    python constrained_ppo.py                        PPO beside xi-PPO in a small world: 2.3 minutes
    python constrained_ppo.py --method nelder_mead   thresholds found within one run
    python constrained_ppo.py --policy FOLDER --data rows.jsonl --module my_score   your GPT-2

A shopkeeper is asked about a thing. Two rewards count polite words and right facts; the judge wants
a few of each, and facts flatter, so that the right weight of politeness is negative. All depends on
two counts: the KL-regularised optimum comes from a table, and is printed beside what RL finds.

code               shape           paper
policy, reference                  pi, pi_0: GPT-2s, the second frozen
rewards, kl        (B, N), (B, T)  r_i of replies, log(pi / pi_0) of each token drawn
values             (B, T, N + 1)   v_1 .. v_N and v_0, the task's, for mu and xi the KL's
m, thresholds      (N,)            mu_i, the multipliers, and theta_i

The paper's mix whitens each advantage by itself and bounds the multipliers. That throws away the
strength of the KL: nothing pulls back, and the multipliers swing. `--mix lagrangian` adds the raw
advantages, with unbounded multipliers, and whitens the sum: the Lagrangian's gradient, which holds.
Other differences: a proxy point is the best of the points seen, not the maximum of a polynomial;
replies are drawn from all tokens, not the top 20; rewards are functions, not models.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import importlib
import json
import math
import os
import random
import sys
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # threads that wait must soon sleep: tests/bench

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

GAMMA, LAM, CLIP = 0.99, 0.95, 0.2  # discount and lambda of GAE, and PPO's clip, as in the paper
METHODS = ("ppo_no_kl", "ppo", "ppo_sat", "all_ppo", "mu_ppo", "xi_ppo", "nelder_mead")
CONSTRAINED = ("all_ppo", "mu_ppo", "xi_ppo")  # the methods with multipliers

# ----- The method: Algorithm 1 --------------------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (B, T) over the tokens where mask (B, T) is 1, up to a reply's end."""
    return (x * mask).sum() / mask.sum()


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages (B, T) with mean 0 and standard deviation 1 over the tokens that count."""
    centred = advantages - masked_mean(advantages, mask)
    return centred / (masked_mean(centred**2, mask).sqrt() + 1e-8) * mask


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


def token_rewards(run: Run, rewards: Tensor, kl: Tensor, mask: Tensor) -> Tensor:
    """Table 1: what the critic's N + 1 heads estimate, the rewards and the task (B, T, N + 1).

    rewards (B, N) stand at a reply's last token, kl (B, T) at each. The task of mu and xi is the
    KL alone. All-PPO has the KL penalty in each reward, as its task is their sum.
    """
    last = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))  # (B, T)
    each = last[..., None] * rewards[:, None]  # (B, T, N)
    task = (each * run.weights).sum(-1) - run.kl_coefficient * kl  # (B, T)
    if run.config.method == "ppo_sat":
        squares = run.weights * (rewards - run.thresholds) ** 2  # (B, N)
        task = -last * squares.sum(-1, keepdim=True) - run.kl_coefficient * kl
    elif run.config.method == "all_ppo":
        each = each - run.kl_coefficient * kl[..., None]
    elif run.config.method in ("mu_ppo", "xi_ppo"):
        task = -kl
    return torch.cat([each, task[..., None]], -1)


def multipliers(method: str, mix: str, raw: Tensor) -> Tensor:
    """m (N,) of free parameters (N,): the paper bounds them, xi's, of equalities, by -1 and 1."""
    if mix == "lagrangian":
        return raw
    return raw.tanh() if method == "xi_ppo" else raw.sigmoid()


def mix_advantages(method: str, mix: str, advantages: Tensor, m: Tensor, mask: Tensor) -> Tensor:
    """The Lagrangian's advantage (B, T) from those of N rewards and the task (B, T, N + 1); m (N,).

    `paper`, equation 4.4: each is whitened by itself, and their weights sum to N. `lagrangian`: raw
    advantages, so that the KL keeps its strength, whitened once. All-PPO has upper bounds, so that
    its multipliers count against the rewards. Without multipliers: the task's.
    """
    if method not in CONSTRAINED:
        return whiten(advantages[..., -1], mask)
    if mix == "paper":
        advantages = torch.stack([whiten(head, mask) for head in advantages.unbind(-1)], -1)
    rewards, task = advantages[..., :-1], advantages[..., -1]
    held = (m * rewards).sum(-1)  # (B, T)
    if method == "all_ppo":
        task, held = rewards.sum(-1), -held
    if mix == "lagrangian":
        return whiten(task + held, mask)
    return (len(m) - m.sum()) * task + held


def multiplier_step(run: Run, J: Tensor) -> None:
    """Lower sum m_i (J_i - theta_i), so that m_i rises below the threshold, for All-PPO above it.

    J (N,) is a minibatch's mean reward, not the critic's estimate, which is poor early on.
    """
    method, mix = run.config.method, run.config.mix
    sign = -1 if method == "all_ppo" else 1
    m = multipliers(method, mix, run.raw)
    run.raw_optimizer.zero_grad()
    (sign * m * (J - run.thresholds)).sum().backward()
    clip_grad_norm_([run.raw], 0.5)
    run.raw_optimizer.step()
    if mix == "lagrangian" and method != "xi_ppo":
        run.raw.data.clamp_(min=0)  # the multipliers of inequalities are at least 0


def update(run: Run, rows: list[dict]) -> dict:
    """One update of Algorithm 1: reply to the rows' prompts, score, take the epochs' steps.

    Changes the run's policy, critic, multipliers and KL coefficient. Returns what to log. Raises
    FloatingPointError in place of a step that is not finite.
    """
    config, method, mix = run.config, run.config.method, run.config.mix
    rollout, _, rewards, _, kl = reply_to(run, rows, run.generator)
    mask = rollout.mask
    with torch.no_grad():
        values = outputs(run.critic, rollout)  # (B, T, N + 1)
    heads = token_rewards(run, rewards, kl, mask)
    advantages, returns = gae(heads, values, mask, GAMMA, LAM)
    for _ in range(config.epochs):
        order = torch.randperm(len(mask), generator=run.generator, device=mask.device)
        for index in order.chunk(config.minibatches):
            part = Rollout(*(x[index] for x in rollout))
            m = multipliers(method, mix, run.raw.detach())
            A = mix_advantages(method, mix, advantages[index], m, part.mask)
            loss = ppo_policy_loss(token_logp(run.policy, part), part.logp, A, part.mask, CLIP)
            errors = (outputs(run.critic, part) - returns[index]) ** 2
            loss = loss + 0.5 * masked_mean(errors[..., :-1].sum(-1), part.mask)
            loss = loss + 0.2 * masked_mean(errors[..., -1], part.mask)
            run.optimizer.zero_grad()
            loss.backward()
            norms = [clip_grad_norm_(net.parameters(), 1.0) for net in (run.policy, run.critic)]
            if not math.isfinite(loss.item() + sum(norms)):
                raise FloatingPointError(f"{run.name}: loss {loss.item()} at update {run.step + 1}")
            run.optimizer.step()
            if method in CONSTRAINED:
                multiplier_step(run, rewards[index].mean(0))
    mean_kl = masked_mean(kl, mask).item()
    if config.kl_target:  # appendix B: the coefficient rises where the KL is over its target
        error = (mean_kl - config.kl_target) / config.kl_target
        run.kl_coefficient *= 1 + 0.1 * min(max(error, -0.2), 0.2)
    run.step += 1
    return {"loss": loss.item(), "batch_kl": mean_kl, "batch_rewards": rewards.mean(0).tolist()}


# ----- Thresholds: proxy points, and the search by Nelder and Mead --------------------------------


def proxy_point(rewards: np.ndarray, judge: np.ndarray) -> list[float]:
    """Algorithm 2: of points seen (n, N), the one with the best judge (n,), smoothed over them."""
    n, N = rewards.shape
    x = (rewards - rewards.mean(0)) / (rewards.std(0) + 1e-9)
    width = 0.5 * n ** (-1 / (N + 4))  # half of Scott's rule
    near = np.exp(-0.5 * ((x[:, None] - x) ** 2).sum(-1) / width**2)  # (n, n), Gaussian
    return rewards[(near @ judge / near.sum(1)).argmax()].tolist()


def nelder_mead(simplex: np.ndarray) -> Generator[np.ndarray, float, None]:
    """Nelder and Mead's search for a minimum: yields each point (N,), and is sent its value."""
    simplex, values = np.array(simplex, float), np.zeros(len(simplex))
    for i in range(len(simplex)):
        values[i] = yield simplex[i]
    while True:
        order = np.argsort(values, kind="stable")
        simplex, values = simplex[order], values[order]
        centre, worst = simplex[:-1].mean(0), simplex[-1]
        point = 2 * centre - worst  # reflection
        value = yield point
        if value < values[0]:
            further = 3 * centre - 2 * worst  # expansion
            other = yield further
            if other < value:
                point, value = further, other
        elif value >= values[-2]:
            better = point if value < values[-1] else worst
            nearer = (centre + better) / 2  # contraction
            other = yield nearer
            if other > min(value, values[-1]):
                for i in range(1, len(simplex)):  # shrinking towards the best corner
                    simplex[i] = (simplex[0] + simplex[i]) / 2
                    values[i] = yield simplex[i]
                continue
            point, value = nearer, other
        simplex[-1], values[-1] = point, value


def search_thresholds(run: Run) -> list[float]:
    """Thresholds (N,) for the next update of a run that finds them, never reset (Algorithm 3).

    A set is trained for until the mean of three updates is within 10 % of it, or for an eighth of
    the updates; then it is judged, and noted in `run.found`. The last eighth trains for the best.
    Not included: judges kept for sets that come again.
    """
    start, eighth = np.maximum(run.rows[0]["rewards"], 0.02), max(1, run.config.updates // 8)
    search = nelder_mead(start * (1 + 0.5 * np.eye(len(start) + 1, len(start), -1)))
    theta = next(search)  # first pi_0's own rewards, then each of them half as large again
    for _, judge in run.found:  # the search is not stored: it is told again what was found
        theta = search.send(-judge)
    left = run.config.updates - eighth - run.step  # updates until the last eighth
    done = len(run.recent) >= eighth
    if len(run.recent) >= 3:
        done = done or np.allclose(np.mean(run.recent[-3:], 0), theta, rtol=0.1, atol=0)
    if done and left >= 0:
        run.found.append((theta.tolist(), evaluate(run)["judge"]))
        theta, run.recent = search.send(-run.found[-1][1]), []
    return theta.tolist() if left > 0 else max(run.found, key=lambda pair: pair[1])[0]


# ----- The policy: GPT-2, and its replies ---------------------------------------------------------


class GPT2(nn.Module):
    """GPT-2 without dropout, so that PPO's first ratio is 1."""

    def __init__(self, vocab: int, positions=64, D=48, n_layer=1, n_head=4):
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, D), nn.Embedding(positions, D)
        self.n_head, self.layers = n_head, nn.ModuleList()
        for _ in range(n_layer):
            layer = {"norm_1": nn.LayerNorm(D), "norm_2": nn.LayerNorm(D)}
            layer |= {"qkv": nn.Linear(D, 3 * D), "out": nn.Linear(D, D)}
            layer |= {"up": nn.Linear(D, 4 * D), "down": nn.Linear(4 * D, D)}
            self.layers.append(nn.ModuleDict(layer))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, vocab, bias=False, device="meta")
        self.head.weight = self.token.weight  # a critic gets another head, for values
        for parameter in self.parameters():
            if parameter.ndim == 2:  # GPT-2's 0.02 is too small for a width of 48
                nn.init.normal_(parameter, std=1 / math.sqrt(2 * D))

    def forward(self, tokens: Tensor, valid: Tensor, past: list | None = None, last: int = 0):
        """Logits (B, last, V) at the last of L tokens, 0: at all, and keys and values for `past`.

        tokens (B, L) are the last L of S positions, past has the keys and values of those before;
        valid (B, S) is False on padding, and positions count valid tokens only, so padding in front
        changes nothing.
        """
        (B, L), S = tokens.shape, valid.shape[1]
        positions = (valid.cumsum(1) - 1).clamp(min=0)[:, S - L :]
        causal = torch.ones(L, S, dtype=torch.bool, device=tokens.device).tril(S - L)
        itself = torch.eye(S, dtype=torch.bool, device=tokens.device)[S - L :]
        sees = (causal & valid[:, None] | itself)[:, None]  # padding sees itself, else it sees none
        x, cache = self.token(tokens) + self.position(positions), []  # (B, L, D)
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.norm_1(x)).view(B, L, 3, self.n_head, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, D / heads) each
            if past:
                k, v = torch.cat([past[i][0], k], 2), torch.cat([past[i][1], v], 2)
            cache.append((k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=sees)
            x = x + layer.out(y.transpose(1, 2).flatten(2))
            x = x + layer.down(F.gelu(layer.up(layer.norm_2(x)), approximate="tanh"))
        return self.head(self.norm(x[:, -last:])), cache


class Rollout(NamedTuple):
    """Replies to prompts, which are padded in front."""

    prompts: Tensor  # (B, P)
    valid: Tensor  # (B, P) bool, False on padding
    tokens: Tensor  # (B, T)
    mask: Tensor  # (B, T) 1 up to the end token and with it, then 0
    logp: Tensor  # (B, T) of the policy that wrote them


def outputs(model: nn.Module, rollout: Rollout) -> Tensor:
    """What the model gives just before each token of the replies: logits or values (B, T, ...)."""
    tokens = torch.cat([rollout.prompts, rollout.tokens[:, :-1]], 1)
    valid = torch.cat([rollout.valid, rollout.mask[:, :-1].bool()], 1)
    return model(tokens, valid, last=rollout.tokens.shape[1])[0]


def token_logp(policy: nn.Module, rollout: Rollout) -> Tensor:
    """log pi (B, T) of the tokens that were drawn."""
    logp = outputs(policy, rollout).log_softmax(-1)  # (B, T, V)
    return logp.gather(-1, rollout.tokens.unsqueeze(-1)).squeeze(-1)


def pad_in_front(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids as a tensor (B, P), zeros in front of the short ones, and True where ids are."""
    P = max(len(row) for row in rows)
    tokens = torch.tensor([[0] * (P - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(P) >= P - lengths[:, None]


@torch.no_grad()
def generate(policy: nn.Module, prompts: list, end: int, limit: int, generator) -> Rollout:
    """Draw replies to prompts, lists of ids, with a cache, up to the end token or the limit."""
    prompts, valid = (x.to(generator.device) for x in pad_in_front(prompts))
    alive = torch.ones_like(prompts[:, :1], dtype=torch.bool)
    x, seen, cache, columns = prompts, valid, None, []
    while len(columns) < limit and alive.any():
        logits, cache = policy(x, seen, cache, last=1)
        logp = logits[:, -1].log_softmax(-1)  # (B, V)
        if logp.isnan().any():
            raise FloatingPointError("the policy diverged; its last good checkpoint is kept")
        x = torch.multinomial(logp.exp(), 1, generator=generator).where(alive, end)  # (B, 1)
        columns.append((x, alive, logp.gather(-1, x)))
        seen = torch.cat([seen, alive], 1)
        alive = alive & (x != end)
    tokens, mask, logp = (torch.cat(column, 1) for column in zip(*columns, strict=True))
    return Rollout(prompts, valid, tokens, mask.float(), logp * mask)


# ----- The world: a shopkeeper, and the exact optimum ---------------------------------------------

FILLERS = ("it", "is", "and", "also", "well", "so", "this", "quite", "rather", "indeed")
POLITE = ("please", "thanks", "dear", "kindly", "friend")
FACTS = {  # six of each thing; said with flattery, as "lovely-brass", one is polite too
    "lamp": "brass bright slim warm dimmable silent", "map": "old folded detailed rare large blue",
    "clock": "walnut precise loud wound square tall", "chair": "oak soft folding padded low wide",
    "kettle": "steel red fast light whistling small", "drum": "round deep painted tuned dry hollow",
}  # fmt: skip
PIECES, MORE = 7, 0.7  # a reply has 1 to 7 pieces of two words; each number is 0.7 as likely
FACT, RIGHT, THANKS = 0.5, 0.75, 0.2  # shares: facts, right ones among them, polite pieces


def demonstration(thing: str, flattery: float, r: random.Random) -> str:
    """A shopkeeper's reply: facts, that share of them with flattery, polite words and fillers."""
    others, words = " ".join(FACTS[other] for other in FACTS if other != thing), []
    for _ in range(1 + r.choices(range(PIECES), [MORE**k for k in range(PIECES)])[0]):
        kind, word = r.random(), r.choice(FILLERS)
        if kind < FACT:
            word = r.choice((FACTS[thing] if r.random() < RIGHT else others).split())
            word = f"lovely-{word}" if r.random() < flattery else word
        elif kind < FACT + THANKS:
            word = r.choice(POLITE)
        words += [r.choice(FILLERS), word]
    return " ".join(words)


def score_shop(rows: list[dict], replies: list[str]) -> dict[str, np.ndarray]:
    """The judge, and its two proxies: polite words and right facts, each over 6; (B,) each."""
    counts = []
    for row, reply in zip(rows, replies, strict=True):
        words, facts = reply.split(), FACTS[row["prompt"].split()[-1]].split()
        polite = sum(word in POLITE or word.startswith("lovely-") for word in words)
        counts.append((polite, len({word.removeprefix("lovely-") for word in words} & {*facts})))
    polite, facts = np.array(counts, float).T
    return {"judge": judge_counts(polite, facts), "polite": polite / 6, "facts": facts / 6}


def judge_counts(polite: np.ndarray, facts: np.ndarray) -> np.ndarray:
    """What is really wanted, 0 to 1: 2 polite words and 4 facts; the worse side decides."""
    return np.exp(-0.5 * np.maximum((polite - 2) ** 2, ((facts - 4) / 1.5) ** 2))


def count_table(flattery: float) -> np.ndarray:
    """The probability of (polite, facts) in a demonstration, exactly: piece after piece."""
    now, shares = np.zeros((PIECES + 1, PIECES + 1)), MORE ** np.arange(PIECES)
    now[0, 0], table = 1.0, np.zeros_like(now)
    for share in shares / shares.sum():
        unsaid = (6 - np.arange(PIECES + 1)).clip(0) / 6
        new = FACT * RIGHT * unsaid * now  # the piece is a right fact that was not yet said
        old = FACT * now - new
        polite = THANKS * now + flattery * old
        now = (1 - FACT - THANKS) * now + (1 - flattery) * old + np.roll(polite, 1, 0)
        now += (1 - flattery) * np.roll(new, 1, 1) + flattery * np.roll(new, (1, 1), (0, 1))
        table += share * now
    return table


def exact_optimum(table: np.ndarray, least: float) -> dict:
    """The policy p0(n) exp(m n) / Z that the judge likes best, over m from `least` to 4.

    Each is the optimum of the reward m n less the KL to pi_0, on a table p0 of counts n.
    """
    (polite, facts), grid = np.indices(table.shape), np.arange(10 * least, 41) / 10
    m = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2, 1, 1)
    p = table * np.exp(m[:, 0] * polite + m[:, 1] * facts)  # (all m, counts, counts)
    p /= p.sum((1, 2), keepdims=True)
    judges = (p * judge_counts(polite, facts)).sum((1, 2))
    best = judges.argmax()
    rewards = [float((p[best] * n).sum()) / 6 for n in (polite, facts)]
    return {"judge": float(judges[best]), "rewards": rewards, "m": m[best].flatten().tolist()}


# ----- The task: the shopkeeper's, or the user's --------------------------------------------------


class Words:
    """The world's tokenizer: words between spaces; id 0 ends a reply."""

    facts = " ".join(FACTS.values()).split()
    words = ("<end>", "tell", "me", "about", "the", *FACTS, *FILLERS, *POLITE, *facts)
    words += tuple(f"lovely-{fact}" for fact in facts)
    eos_token_id = 0

    def encode(self, text: str) -> list[int]:
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)


class Task:
    """Rows of prompt and response, a tokenizer, and the function that scores replies."""

    def __init__(self, config: Config):
        if config.policy:
            from transformers import AutoTokenizer

            sys.path.append(os.getcwd())
            self.function = importlib.import_module(config.module).score
            self.tokenizer = AutoTokenizer.from_pretrained(config.policy)
            lines = Path(config.data).read_text("utf-8-sig").splitlines()
            rows = [json.loads(line) for line in lines]
            if not all(row["prompt"].strip() for row in rows):
                raise ValueError(f"{config.data}: a prompt is empty")
            self.train, self.valid = [row for i, row in enumerate(rows) if i % 10], rows[::10]
        else:
            self.function, self.tokenizer = score_shop, Words()
            self.train, r = [], random.Random(config.seed)
            for thing in [*FACTS] * 2000:
                reply = demonstration(thing, config.flattery, r)
                self.train.append({"prompt": f"tell me about the {thing}", "response": reply})
            self.valid = self.train[: len(FACTS)]
        first = self.function(self.valid[:1], [self.valid[0]["response"]])
        self.names = [name for name in first if name != "judge"]

    def score(self, rows: list[dict], replies: list[str]) -> tuple[Tensor, float]:
        """The rewards (B, N), 0 for an empty reply, and the judge's mean. Raises ValueError."""
        found = self.function(list(rows), list(replies))
        judge = float(np.mean(found["judge"]))
        rewards = np.array([found[name] for name in self.names], np.float32).T  # (B, N)
        if rewards.shape != (len(rows), len(self.names)) or not np.isfinite(rewards.sum() + judge):
            raise ValueError(f"score gave {found}: must be finite, a number for each reply")
        return torch.tensor(rewards * [[reply != ""] for reply in replies]).float(), judge


def reply_to(run: Run, rows: list[dict], generator: torch.Generator) -> tuple:
    """Replies to the rows' prompts: a Rollout, texts, rewards (B, N), judge and kl (B, T)."""
    tokenizer, replies = run.task.tokenizer, []
    prompts, end = [tokenizer.encode(row["prompt"]) for row in rows], tokenizer.eos_token_id
    rollout = generate(run.policy, prompts, end, run.config.reply, generator)
    for tokens, length in zip(rollout.tokens.tolist(), rollout.mask.sum(1).int(), strict=True):
        replies.append(tokenizer.decode([i for i in tokens[:length] if i != end]).strip())
    with torch.no_grad():  # log(pi / pi_0) of what pi drew: unbiased, and may be negative
        kl = (rollout.logp - token_logp(run.reference, rollout)) * rollout.mask
    rewards, judge = run.task.score(rows, replies)
    return rollout, replies, rewards.to(kl), judge, kl


def evaluate(run: Run) -> dict:
    """Judge, mean rewards, KL a token, and a reply: the same prompts and draws each time."""
    generator = torch.Generator(run.raw.device).manual_seed(17)
    rows = [run.task.valid[i % len(run.task.valid)] for i in range(run.config.eval_rows)]
    rollout, replies, rewards, judge, kl = reply_to(run, rows, generator)
    row = {"judge": judge, "rewards": rewards.mean(0).tolist(), "sample": replies[0]}
    return row | {"kl": masked_mean(kl, rollout.mask).item()}


# ----- Training -----------------------------------------------------------------------------------


def first_policy(config: Config, task: Task, device: torch.device) -> nn.Module:
    """pi_0: the user's policy, or a new one; then supervised steps, the loss on replies alone."""
    torch.manual_seed(config.seed)
    policy = Pretrained(config.policy) if config.policy else GPT2(len(task.tokenizer.words))
    order, optimizer = random.Random(config.seed), torch.optim.AdamW(policy.to(device).parameters())
    encode, end = task.tokenizer.encode, task.tokenizer.eos_token_id
    for step in range(config.supervised):
        rows = order.choices(task.train, k=64)
        prompts, valid = pad_in_front([encode(row["prompt"]) for row in rows])
        replies = [[*encode(" " + row["response"]), end] for row in rows]
        tokens, mask = (x.flip(1) for x in pad_in_front([reply[::-1] for reply in replies]))
        parts = prompts, valid, tokens, mask.float(), mask.float()
        rollout = Rollout(*(x.to(device) for x in parts))
        loss = -masked_mean(token_logp(policy, rollout), rollout.mask)
        decay = min((step + 1) / 50, 1 - step / config.supervised)
        optimizer.param_groups[0]["lr"] = 6 * config.lr * decay
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"supervised step {step + 1} · loss {loss.item():.3f}", flush=True)
    return policy.requires_grad_(False)


class Run(nn.Module):
    """What a run of PPO consists of and changes; `state_dict` has its networks, m and theta."""

    def __init__(self, config: Config, name: str, task: Task, reference: nn.Module):
        super().__init__()
        self.config, self.name, self.task, self.reference = config, name, task, reference
        self.policy = copy.deepcopy(reference).requires_grad_(True)
        self.critic = copy.deepcopy(self.policy)
        N, device = len(task.names), reference.head.weight.device
        self.critic.head = nn.Linear(reference.head.in_features, N + 1, device=device)
        for parameter in self.critic.head.parameters():
            nn.init.zeros_(parameter)
        groups = [{"params": self.policy.parameters(), "lr": config.lr}]
        groups.append({"params": self.critic.parameters(), "lr": 3 * config.lr})
        self.optimizer = torch.optim.Adam(groups)
        self.raw = nn.Parameter(torch.zeros(N, device=device))  # the multipliers', before bounds
        self.raw_optimizer = torch.optim.SGD([self.raw], config.multiplier_lr, momentum=0.1)
        self.weights = numbers(config.weights, N, 1.0).to(device)
        self.register_buffer("thresholds", numbers(config.thresholds, N, 0.0).to(device))
        self.kl_coefficient = 0.0 if config.method == "ppo_no_kl" else config.kl_coefficient
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.step, self.rows, self.recent, self.found = 0, [], [], []


def train(config: Config, name: str, task: Task, reference: nn.Module) -> Run:
    """One PPO run, evaluated and saved to OUT/NAME.pt on the way; --resume goes on from there."""
    run, path = Run(config, name, task, reference), Path(config.out) / f"{name}.pt"
    parts = {"run": run, "optimizer": run.optimizer, "raw_optimizer": run.raw_optimizer}
    made_of = vars(dataclasses.replace(config, device="", out="", resume=False))
    if config.resume and path.exists():
        saved = torch.load(path, "cpu", weights_only=True)
        if saved["made_of"] != made_of:
            other = dict(saved["made_of"].items() - made_of.items())
            raise ValueError(f"{path}: made with {other}; use another --out")
        for key, part in parts.items():
            part.load_state_dict(saved[key])
        run.generator.set_state(saved["generator"])
        run.step, run.kl_coefficient, run.rows, run.recent, run.found = saved["progress"]
    else:
        run.rows.append({"run": name, "update": 0} | evaluate(run))
    began, first = time.time(), run.step
    while run.step < config.updates:
        if config.thresholds == "search":
            run.thresholds = torch.tensor(search_thresholds(run)).to(run.raw)
        options = {"generator": run.generator, "device": run.raw.device}
        index = torch.randint(len(task.train), (config.batch,), **options)
        row = update(run, [task.train[i] for i in index.tolist()])
        run.recent.append(row["batch_rewards"])
        if run.step % config.eval_every > 0 and run.step < config.updates:
            continue
        row |= {"run": name, "update": run.step, "thresholds": run.thresholds.tolist()}
        row |= {"m": multipliers(config.method, config.mix, run.raw).tolist()} | evaluate(run)
        run.rows.append(row)
        saved = {key: part.state_dict() for key, part in parts.items()}
        saved |= {"generator": run.generator.get_state(), "made_of": made_of}
        saved["progress"] = run.step, run.kl_coefficient, run.rows, run.recent, run.found
        torch.save(saved, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)  # never half of one
        rewards = [f"{key} {r:.3f}" for key, r in zip(task.names, row["rewards"], strict=True)]
        left = (time.time() - began) / (run.step - first) * (config.updates - run.step)
        text = f"{name} {run.step}/{config.updates} · judge {row['judge']:.3f} · kl {row['kl']:.3f}"
        print(text, *rewards, f"{left / 60:.1f} minutes left", sep=" · ", flush=True)
    return run


def experiment(config: Config) -> None:
    """The job: find thresholds, then train by the method, or for none by PPO and by xi-PPO."""
    began, out, task = time.time(), Path(config.out), Task(config)
    out.mkdir(parents=True, exist_ok=True)
    accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(accelerator if config.device == "auto" else config.device)
    reference, runs = first_policy(config, task, device), {}

    def train_as(name: str, **changes) -> None:
        runs[name] = train(dataclasses.replace(config, **changes), name, task, reference)

    fixed = {"ppo": "", "ppo_no_kl": "", "nelder_mead": "search"}
    theta = fixed.get(config.method, config.thresholds)
    if not config.method or theta == "proxy":  # each reward alone, then their sum
        short = {"method": "ppo_no_kl", "updates": config.updates // 2, "thresholds": ""}
        for name in [*task.names, "sum"]:
            weights = [str(int(name in (reward, "sum"))) for reward in task.names]
            train_as(f"only_{name}", weights=",".join(weights), **short)
    if theta == "proxy":
        rows = [row for run in runs.values() for row in run.rows]
        rewards, judge = (np.array([row[key] for row in rows]) for key in ("rewards", "judge"))
        theta = ",".join(f"{x:.4f}" for x in proxy_point(rewards, judge))
    elif theta == "search":
        train_as("nelder_mead", method="xi_ppo", updates=3 * config.updates, thresholds="search")
        best, _ = max(runs["nelder_mead"].found, key=lambda pair: pair[1])
        theta = ",".join(f"{x:.4f}" for x in best)
    arms = [(config.method, config.mix)]
    if not config.method:
        arms = [("ppo", "paper"), ("xi_ppo", "paper"), ("xi_ppo", "lagrangian")]
    for method, mix in arms:
        name = f"{method}_{mix}" if mix == "lagrangian" and method in CONSTRAINED else method
        if method != "nelder_mead":  # which is done
            train_as(name, method=method, mix=mix, thresholds=theta)
    report(config, task, runs, time.time() - began)


def report(config: Config, task: Task, runs: dict[str, Run], seconds: float) -> None:
    """Write OUT/result.json, metrics.jsonl and a user's policies, print, then draw runs.png."""
    out, last, optimum = Path(config.out), [*runs.values()][-1], None
    result = {
        "final": {name: run.rows[-1]["judge"] for name, run in runs.items()},
        "found": [run.found for run in runs.values()], "thresholds": last.thresholds.tolist(),
        "parameters": sum(p.numel() for p in last.policy.parameters()), "argv": sys.argv,
        "wall_seconds": round(seconds, 1), "device": str(last.raw.device), "seed": config.seed,
        "python": sys.version, "torch": torch.__version__, "config": vars(config),
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }  # fmt: skip
    if not config.policy:
        result["optimum"] = optimum = exact_optimum(count_table(config.flattery), -4.0)
        result["optimum_of_weights_above_0"] = exact_optimum(count_table(config.flattery), 0.0)
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    lines = [json.dumps(row) + "\n" for run in runs.values() for row in run.rows]
    (out / "metrics.jsonl").write_text("".join(lines), "utf-8")
    for name, run in runs.items():
        print(f"{name}: judge {run.rows[-1]['judge']:.3f}, writes {run.rows[-1]['sample']!r}")
        if config.policy:
            run.policy.inner.save_pretrained(out / name)
            task.tokenizer.save_pretrained(out / name)
    print(f"thresholds {result['thresholds']}; optimum {optimum}; {out}")
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no picture: matplotlib is not installed; pip install matplotlib")
    sizes = {"figsize": (2.5 * len(runs), 3.5), "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(1, len(runs), layout="constrained", **sizes)
    for axis, (name, run) in zip(axes[0], runs.items(), strict=True):
        updates = [row["update"] for row in run.rows]
        axis.plot(updates, [row["judge"] for row in run.rows], "k", label="judge")
        axis.plot(updates, [row["rewards"] for row in run.rows], ":", label=task.names)
        axis.set(title=name, xlabel="update", ylim=(0, 1))
        if optimum:
            axis.axhline(optimum["judge"], color="grey", ls="--", label="exact optimum")
    axes[0][0].legend(fontsize=8)
    figure.savefig(out / "runs.png", dpi=110)
    plt.close(figure)


# ----- Appendix: a user's policy, by transformers -------------------------------------------------


class Pretrained(nn.Module):
    """A user's causal language model; called as `GPT2` is, and gets a critic's head as it does."""

    def __init__(self, folder: str):
        from transformers import AutoModelForCausalLM

        super().__init__()
        options = {"dtype": torch.float32, "output_loading_info": True}
        self.inner, loading = AutoModelForCausalLM.from_pretrained(folder, **options)
        if any(loading.values()):  # else what is missing would be drawn at random
            raise ValueError(f"{folder}: the weights do not fit: {loading}")
        self.inner.eval()  # no dropout, so that PPO's first ratio is 1
        self.head = self.inner.get_output_embeddings()

    def forward(self, tokens: Tensor, valid: Tensor, past: object = None, last: int = 0):
        """Logits at the last tokens, and a cache; see `GPT2.forward`."""
        positions = (valid.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        options = {"attention_mask": valid.long(), "position_ids": positions}
        options |= {"past_key_values": past, "use_cache": not torch.is_grad_enabled()}
        body = self.inner.base_model(tokens, **options)
        return self.head(body.last_hidden_state[:, -last:]), body.past_key_values


# ----- Config and main ----------------------------------------------------------------------------


def numbers(text: str, count: int, default: float) -> Tensor:
    """`0.3,0.4` as a tensor; of nothing, or where a search gives them, the default."""
    values = torch.full((count,), default)
    if text not in ("", "search"):
        values = torch.tensor([float(part) for part in text.split(",")])
    if len(values) != count or not values.isfinite().all():
        raise ValueError(f"{text!r} must be {count} finite numbers, one a reward")
    return values


def flag(default, text: str):
    """A field of `Config`, which is a flag with this default and help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    method: str = flag("", f"{', '.join(METHODS)}; empty: ppo and xi_ppo side by side")
    mix: str = flag("lagrangian", "of all_ppo, mu_ppo, xi_ppo: lagrangian or paper")
    thresholds: str = flag("search", "theta by commas, or how to find it: search or proxy")
    weights: str = flag("", "of each reward in PPO, by commas; empty: 1")
    flattery: float = flag(0.6, "share of facts that are polite too; 0: independent counts")
    policy: str = flag("", "folder of transformers' to start from; empty: a new small GPT-2")
    data: str = flag("", "with --policy: JSON lines of prompt, response and what else you like")
    module: str = flag("", "with --policy: has score(rows, replies), see score_shop")
    supervised: int = flag(400, "steps that make pi_0; with --policy none, unless given")
    reply: int = flag(24, "most tokens of a reply; paper: 20")
    batch: int = flag(96, "replies an update; paper: 1,280 tokens")
    updates: int = flag(80, "of a run; half without constraints, thrice to search; paper: 100")
    epochs: int = flag(2, "passes over an update's replies; paper: 5")
    minibatches: int = flag(2, "minibatches a pass; paper: 20")
    lr: float = flag(1e-3, "of the policy, the critic's is threefold; with --policy 2e-6")
    kl_coefficient: float = flag(0.25, "of ppo, ppo_sat, all_ppo")
    kl_target: float = flag(0.0, "KL a token to which it adapts; 0: it is fixed; paper: 0.5")
    multiplier_lr: float = flag(0.5, "rate of the multipliers' SGD; paper: 0.1")
    eval_every: int = flag(4, "updates from one evaluation and checkpoint to the next")
    eval_rows: int = flag(480, "replies of an evaluation")
    seed: int = flag(0, "seed of initialisation, data order and samples")
    device: str = flag("auto", "auto (cuda, mps or cpu, the first there is) or a torch device")
    out: str = flag("out/constrained_ppo", "folder of checkpoints, metrics, result and picture")
    resume: bool = flag(False, "go on from the checkpoints in OUT")
    smoke: bool = flag(False, "a tiny model for a few steps, written to OUT/smoke: does it run?")

    def __post_init__(self):
        if self.method not in ("", *METHODS) or self.mix not in ("paper", "lagrangian"):
            raise ValueError(f"--method {self.method!r} or --mix {self.mix!r} is not in --help")
        if not 0 <= self.flattery <= 1 or min(self.kl_coefficient, self.kl_target) < 0:
            raise ValueError("--flattery must be in 0..1, --kl-coefficient, --kl-target at least 0")
        if len({bool(self.policy), bool(self.data), bool(self.module)}) == 2:
            raise ValueError("--policy, --data and --module go together")


SMOKE = {"supervised": 3, "batch": 8, "updates": 4, "eval_every": 2, "eval_rows": 24}


def main(argv: list[str] | None = None) -> int:
    """Run it. Returns 0; 1 where numbers are not finite, 2 for bad input, 130 after Ctrl-C."""
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
        given = {"lr": 2e-6, "supervised": 0} | given
    if given.get("smoke"):
        given = SMOKE | given | {"out": f"{given.get('out', Config.out)}/smoke"}
    sys.stdout.reconfigure(errors="replace")  # where it is not UTF-8
    try:
        experiment(Config(**given))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # one line; `python -X dev` shows where it came from
        if sys.flags.dev_mode:
            raise
        if given.get("module"):
            traceback.print_exc()  # it may be an error of the user's own code
        text = f"{Path(__file__).name}: {type(error).__name__}: {error}"
        if isinstance(error, ImportError):
            text += f"; pip install {error.name}"
        print(" ".join(text.split())[:400], file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
