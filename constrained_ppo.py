# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6"]
# ///
"""Constrained RLHF: PPO that holds each reward where it stops being a good proxy.

Moskovitz et al., "Confronting Reward Model Overoptimization with Constrained RLHF", arXiv 2310.04373.

    python constrained_ppo.py                        PPO beside xi-PPO in a small world: 5 minutes
    python constrained_ppo.py --method nelder_mead   thresholds found within one run: 2 minutes
    python constrained_ppo.py --policy FOLDER --data rows.jsonl --rewards my_rewards   your GPT-2

A shopkeeper is asked about a thing. Two rewards count polite words and right facts; the judge wants
few of the first and some of the second, and facts flatter. Both depend on two counts alone, so the
best policy near pi_0 is computed exactly, from a table, and printed beside what RL reached.

code                  shape             paper
policy, reference                       pi, pi_0: GPT-2s, the second frozen
rewards, r0           (B, N), (B,)      r_i, r_0: of whole replies
kl                    (B, T)            log(pi / pi_0) of each token drawn
values, advantages    (B, T, N + 1)     v_1 .. v_N and v_0, the task's: for mu and xi the KL's
m                     (N,)              mu_i, the multipliers
thresholds            (N,)              theta_i

Two mixes: the paper's whitens each advantage by itself and bounds the multipliers. That throws away
the strength of the KL: nothing pulls back, and the multipliers swing. `--mix lagrangian` adds raw
advantages, m_i unbounded, and whitens the sum: this is the gradient of the Lagrangian, and holds.

Other differences from the paper: a proxy point is the best of the points seen, smoothed, where the
paper takes the maximum of a polynomial. Replies are drawn from all tokens, not from the top 20, so
that ratio and KL are of the policy that wrote them. Rewards are functions, not models.
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
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # threads that wait must soon sleep: tests/bench

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

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


def ppo_policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """PPO's clipped objective, negated: a mean over tokens, all (B, T) (Schulman et al. 2017)."""
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), mask)


def multipliers(method: str, mix: str, raw: Tensor) -> Tensor:
    """The multipliers m (N,) of free parameters (N,).

    The paper's are bounded: between 0 and 1 for mu and All, between -1 and 1 for xi, whose
    constraints are equalities. Those of the Lagrangian mix are the parameters themselves.
    """
    if mix == "lagrangian":
        return raw
    return raw.tanh() if method == "xi_ppo" else raw.sigmoid()


def token_rewards(
    method: str, rewards: Tensor, r0: Tensor, penalty: Tensor, mask: Tensor
) -> Tensor:
    """What the critic's N + 1 heads estimate, (B, T, N + 1): the N rewards, then the task.

    rewards (B, N) and r0 (B,) stand at a reply's last token, the KL penalty (B, T) at each. The
    task is r0 less the penalty. All-PPO, whose task is the sum of its rewards, has it in each.
    """
    last = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))  # (B, T)
    each = last[..., None] * rewards[:, None]  # (B, T, N)
    if method == "all_ppo":
        each = each - penalty[..., None]
    task = last * r0[:, None] - penalty  # (B, T)
    return torch.cat([each, task[..., None]], -1)


def mix_advantages(method: str, mix: str, advantages: Tensor, m: Tensor, mask: Tensor) -> Tensor:
    """The Lagrangian's advantage (B, T) from those of N rewards and the task (B, T, N + 1); m (N,).

    `paper`, equation 4.4: each is whitened by itself, and their weights sum to N. `lagrangian`: raw
    advantages, so that the KL keeps its strength, whitened once. All-PPO's constraints are upper
    bounds, so that its multipliers count against the rewards. Without multipliers: the task's.
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


def multiplier_loss(method: str, m: Tensor, rewards: Tensor, thresholds: Tensor) -> Tensor:
    """What the multipliers minimise: sum of m_i (J_i - theta_i); m, rewards J, thresholds: (N,).

    J is a minibatch's mean reward, not the critic's estimate, which is poor early on. Below its
    threshold m_i rises, for All-PPO above it.
    """
    violation = (m * (rewards - thresholds)).sum()
    return -violation if method == "all_ppo" else violation


def adaptive_kl(coefficient: float, kl: float, target: float, step: float = 0.1) -> float:
    """The next KL coefficient: larger where the mean KL a token is over its target (appendix B)."""
    return coefficient * (1 + step * min(max((kl - target) / target, -0.2), 0.2))


def task_reward(run: Run, rewards: Tensor, kl: Tensor) -> tuple[Tensor, Tensor]:
    """Table 1's objective: r0 (B,), at a reply's end, and the KL penalty (B, T); rewards (B, N)."""
    if run.method in ("mu_ppo", "xi_ppo"):  # they maximise -KL; the rewards are constraints
        return torch.zeros_like(rewards[:, 0]), kl
    penalty = run.kl_coefficient * kl
    if run.method == "ppo_sat":
        return -(run.weights * (rewards - run.thresholds) ** 2).sum(-1), penalty
    return rewards @ run.weights, penalty


def update(run: Run, prompts: list[list[int]], score: Callable[[Rollout], Tensor]) -> dict:
    """One update of Algorithm 1: write replies, score them (B, N), and take the epochs' steps.

    Changes the run's policy, critic, multipliers and KL coefficient. Returns what to log. Raises
    FloatingPointError in place of a step that is not finite.
    """
    config, method = run.config, run.method
    rollout = generate(run.policy, prompts, config.reply, run.generator)
    mask, rewards = rollout.mask, score(rollout)
    with torch.no_grad():
        values = outputs(run.critic, rollout)  # (B, T, N + 1)
        kl = (rollout.logp - token_logp(run.reference, rollout)) * mask  # unbiased; may be < 0
    r0, penalty = task_reward(run, rewards, kl)
    heads = token_rewards(method, rewards, r0, penalty, mask)
    advantages, returns = gae(heads, values, mask, config.gamma, config.lam)
    for _ in range(config.epochs):
        order = torch.randperm(len(mask), generator=run.generator, device=mask.device)
        for index in order.chunk(config.minibatches):
            part, m = rollout.part(index), multipliers(method, config.mix, run.raw)
            A = mix_advantages(method, config.mix, advantages[index], m.detach(), part.mask)
            logp = token_logp(run.policy, part)
            loss = ppo_policy_loss(logp, part.logp, A, part.mask, config.clip)
            errors = (outputs(run.critic, part) - returns[index]) ** 2
            for error, weight in zip(errors.unbind(-1), run.head_weights, strict=True):
                loss = loss + weight * masked_mean(error, part.mask)
            run.optimizer.zero_grad()
            loss.backward()
            norms = [clip_grad_norm_(net.parameters(), 1.0) for net in (run.policy, run.critic)]
            if not math.isfinite(loss.item() + sum(norms)):
                raise FloatingPointError(f"{run.name}: loss {loss.item()} at update {run.step + 1}")
            run.optimizer.step()
            if method in CONSTRAINED:
                run.raw_optimizer.zero_grad()
                J = rewards[index].mean(0)  # (N,)
                multiplier_loss(method, m, J, run.thresholds).backward()
                clip_grad_norm_([run.raw], 0.5)
                run.raw_optimizer.step()
                if config.mix == "lagrangian" and method != "xi_ppo":
                    run.raw.data.clamp_(min=0)  # the multipliers of inequalities are at least 0
    mean_kl = masked_mean(kl, mask).item()
    if config.kl_target and method in ("ppo", "ppo_sat", "all_ppo"):
        run.kl_coefficient = adaptive_kl(run.kl_coefficient, mean_kl, config.kl_target)
    run.step += 1
    return {"loss": loss.item(), "batch_kl": mean_kl, "batch_rewards": rewards.mean(0).tolist()}


# ----- Thresholds: proxy points, and the search by Nelder and Mead --------------------------------


def proxy_point(rewards: np.ndarray, judge: np.ndarray) -> list[float]:
    """The point (N,) where the judge was best, of rewards (n, N) and judge (n,) (Algorithm 2).

    The judge is smoothed over near points by a Gaussian kernel, and the best of the points that
    were seen is taken: the maximum of a fitted polynomial lies where no policy has been. Raises
    ValueError where a reward never changed.
    """
    n, N = rewards.shape
    if (np.ptp(rewards, 0) == 0).any():
        raise ValueError(f"a reward never changed, {rewards[0]}: give --thresholds")
    x = (rewards - rewards.mean(0)) / rewards.std(0)
    distance = ((x[:, None] - x) ** 2).sum(-1)  # (n, n)
    near = np.exp(-0.5 * distance / (0.5 * n ** (-1 / (N + 4))) ** 2)  # half of Scott's bandwidth
    return rewards[(near @ judge / near.sum(1)).argmax()].tolist()


def nelder_mead(simplex: np.ndarray) -> Generator[np.ndarray, float, None]:
    """Nelder and Mead's search for a minimum, from a simplex (N + 1, N); coefficients 1, 2, ½, ½.

    Yields each point (N,) to evaluate, and is sent its value; it never ends (Algorithm 3).
    """
    simplex, values = np.array(simplex, float), np.zeros(len(simplex))
    for i, corner in enumerate(simplex):
        values[i] = yield corner
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
            if value < values[-1]:
                point = 1.5 * centre - 0.5 * worst  # contraction outside
                other = yield point
                shrink = other > value
            else:
                point = 0.5 * centre + 0.5 * worst  # contraction inside
                other = yield point
                shrink = other >= values[-1]
            value = other
            if shrink:  # towards the best corner
                for i in range(1, len(simplex)):
                    simplex[i] = (simplex[0] + simplex[i]) / 2
                    values[i] = yield simplex[i]
                continue
        simplex[-1], values[-1] = point, value


class ThresholdSearch:
    """Algorithm 3: thresholds found within one xi-PPO run, which is never reset.

    A set of thresholds is trained for until the mean of three updates is within 10 % of it, or an
    eighth of the updates is gone. Then the policy is evaluated as it stands. A set within 5 % of
    an earlier one takes that one's value. The last eighth trains for the best set found.
    """

    def __init__(self, start: list[float], updates: int):
        self.start, self.updates = start, updates
        self.means, self.found, self.since = [], [], 0
        corners = np.tile(np.maximum(start, 0.02), (len(start) + 1, 1))
        for i in range(len(start)):
            corners[i + 1, i] *= 1.5
        self.search = nelder_mead(corners)
        self.asked = next(self.search).tolist()

    def thresholds(self) -> list[float]:
        """The thresholds to train for now."""
        if len(self.means) >= self.updates - self.updates // 8 and self.found:
            return max(self.found, key=lambda pair: pair[1])[0]
        return self.asked

    def observe(self, means: list[float], evaluate: Callable[[], float]) -> None:
        """Note an update's mean rewards; where the set is reached or out of time, move on."""
        theta, eighth = np.array(self.asked), max(1, self.updates // 8)
        self.means.append(means)
        step, recent = len(self.means), self.means[self.since :][-3:]
        reached = len(recent) == 3
        if reached:
            reached = bool((abs(np.mean(recent, 0) - theta) <= 0.1 * abs(theta)).all())
        if step > self.updates - eighth or not (reached or step - self.since >= eighth):
            return
        value = evaluate()
        self.found.append((self.asked, value))
        self.since = step
        for _ in range(50):  # a simplex that has shrunk asks only for what is known
            self.asked = self.search.send(-value).tolist()
            known = [v for at, v in self.found if np.allclose(self.asked, at, rtol=0.05, atol=0)]
            if not known:
                break
            value = known[-1]


# ----- The policy: GPT-2, and its replies ---------------------------------------------------------


@dataclass(frozen=True)
class GPT2Config:
    """The sizes of a GPT-2, by Hugging Face's names; the defaults are the paper's 124M model."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    eos_token_id: int = 50256

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"width {self.n_embd} must be a multiple of {self.n_head} heads")


@dataclass
class Rollout:
    """Replies (B, T) to prompts (B, P), which are padded in front."""

    prompts: Tensor
    valid: Tensor  # (B, P) bool, False on padding
    tokens: Tensor  # (B, T)
    mask: Tensor  # (B, T) 1 up to the end token and with it, then 0
    logp: Tensor | None = None  # (B, T) of the policy that wrote them

    def part(self, index: Tensor) -> Rollout:
        """Some of the replies."""
        return Rollout(*(x[index] for x in vars(self).values()))


class Block(nn.Module):
    """Attention, then a GELU network, each behind a LayerNorm and added to the stream."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        D, self.n_head = config.n_embd, config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(D, 3 * D), "c_proj": nn.Linear(D, D)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 4 * D), "c_proj": nn.Linear(4 * D, D)})

    def forward(self, x: Tensor, sees: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, L, D); sees (B, 1, L, S): which keys a query sees. Gives keys and values too."""
        B, L, D = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).view(B, L, 3, self.n_head, -1)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, L, D / heads)
        q, kv = qkv[0], qkv[1:]
        if past is not None:
            kv = torch.cat([past, kv], 3)
        y = F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=sees)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(B, L, D))
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](hidden), kv


class GPT2(nn.Module):
    """GPT-2 without dropout, so that PPO's first ratio is 1; `heads`: values in place of logits."""

    def __init__(self, config: GPT2Config, heads: int = 0):
        super().__init__()
        self.config, D = config, config.n_embd
        self.wte, self.wpe = nn.Embedding(config.vocab_size, D), nn.Embedding(config.n_positions, D)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(D)
        self.head = nn.Linear(D, heads) if heads else None
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name.startswith("head"):
                nn.init.zeros_(parameter)
            elif "ln_" not in name:
                deep = math.sqrt(2 * config.n_layer) if "c_proj" in name else 1.0
                nn.init.normal_(parameter, std=0.02 / deep)

    def forward(
        self, tokens: Tensor, valid: Tensor, past: list | None = None, last: int = 0
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, last, V), or values (B, last, heads), at the last of L tokens; 0: at all.

        tokens (B, L) are the last L of S positions; valid (B, S) is False on padding, and positions
        count valid tokens only, so padding in front changes nothing. past: the keys and values of
        the S - L positions before, as this gives them.
        """
        L, S = tokens.shape[1], valid.shape[1]
        positions = (valid.cumsum(1) - 1).clamp(min=0)[:, S - L :]
        sees = torch.ones(L, S, dtype=torch.bool, device=tokens.device).tril(S - L) & valid[:, None]
        itself = torch.eye(S, dtype=torch.bool, device=tokens.device)[S - L :]
        sees = (sees | itself).unsqueeze(1)  # (B, 1, L, S); padding sees itself, else it sees none
        x, cache = self.wte(tokens) + self.wpe(positions), []
        for i, block in enumerate(self.h):
            x, kv = block(x, sees, past[i] if past else None)
            cache.append(kv)
        x = self.ln_f(x[:, -last:])
        return self.head(x) if self.head else F.linear(x, self.wte.weight), cache


def outputs(model: GPT2, rollout: Rollout) -> Tensor:
    """What the model gives just before each token of the replies: logits or values (B, T, ...)."""
    tokens = torch.cat([rollout.prompts, rollout.tokens[:, :-1]], 1)
    valid = torch.cat([rollout.valid, rollout.mask[:, :-1].bool()], 1)
    return model(tokens, valid, last=rollout.tokens.shape[1])[0]


def token_logp(policy: GPT2, rollout: Rollout) -> Tensor:
    """log pi (B, T) of the replies' tokens."""
    logp = outputs(policy, rollout).log_softmax(-1)  # (B, T, V)
    return logp.gather(-1, rollout.tokens.unsqueeze(-1)).squeeze(-1)


def pad_in_front(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids as a tensor (B, P), zeros in front of the short ones, and True where ids are."""
    P = max(len(row) for row in rows)
    tokens = torch.tensor([[0] * (P - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(P) >= P - lengths[:, None]


@torch.no_grad()
def generate(
    policy: GPT2, prompts: list[list[int]], limit: int, generator: torch.Generator
) -> Rollout:
    """Draw a reply to each prompt, with a cache of keys and values, up to the end or the limit."""
    end, device = policy.config.eos_token_id, policy.wte.weight.device
    prompts, valid = (x.to(device) for x in pad_in_front(prompts))
    alive = torch.ones(len(prompts), 1, dtype=torch.bool, device=device)
    x, seen, cache, columns = prompts, valid, None, []
    while len(columns) < limit and alive.any():
        logits, cache = policy(x, seen, cache, last=1)
        logp = logits[:, -1].log_softmax(-1)  # (B, V)
        x = torch.multinomial(logp.exp(), 1, generator=generator).where(alive, end)  # (B, 1)
        columns.append((x, alive, logp.gather(-1, x)))
        seen = torch.cat([seen, alive], 1)
        alive = alive & (x != end)
    tokens, mask, logp = (torch.cat(column, 1) for column in zip(*columns, strict=True))
    return Rollout(prompts, valid, tokens, mask.float(), logp * mask)


