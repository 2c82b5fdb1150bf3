"""constrained_ppo.py: formulas against slow loops, then the runs as a user starts them."""

import copy
import dataclasses
import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import constrained_ppo as c
from tests._helpers import close

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT, CPU = Path(c.__file__), torch.device("cpu")
both_mixes = pytest.mark.parametrize("mix", ["paper", "lagrangian"])
each_method = pytest.mark.parametrize("method", c.METHODS[:-1])  # nelder_mead trains as xi_ppo


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def ragged_mask(B, T):
    lengths = torch.randint(1, T + 1, (B,))
    lengths[0] = T  # one without padding
    return (torch.arange(T) < lengths[:, None]).double()


@pytest.fixture(scope="module")
def world():
    """A task, and a pi_0 that nobody trained."""
    config = c.Config(**c.SMOKE | {"supervised": 0}, reply=8, thresholds="", device="cpu")
    task = c.Task(config)
    return config, task, c.first_policy(config, task, CPU)


@pytest.fixture
def small(world, tmp_path):
    """The world for one test, and runs in it."""
    config, task, reference = copy.copy(world)
    config, task = dataclasses.replace(config, out=str(tmp_path)), copy.copy(task)

    def run(method="xi_ppo", **changes):
        return c.Run(dataclasses.replace(config, method=method, **changes), "x", task, reference)

    return SimpleNamespace(config=config, task=task, reference=reference, run=run)


# ----- The formulas


@pytest.mark.parametrize("gamma,lam", [(0.99, 0.95), (0.9, 0.0), (0.0, 0.5)])
def test_gae_is_the_double_sum_over_each_reply_and_head(gamma, lam):
    B, T, H = 4, 6, 3
    rewards, values, mask = doubles(B, T, H), doubles(B, T, H), ragged_mask(B, T)
    advantages, returns = c.gae(rewards, values, mask, gamma, lam)
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        n, truth = int(mask[b].sum()), 0.0
        for s in range(t, n):  # the sum over s of (gamma lam)^(s - t) delta_s
            following = values[b, s + 1, h].item() if s + 1 < n else 0.0
            delta = rewards[b, s, h].item() + gamma * following - values[b, s, h].item()
            truth += (gamma * lam) ** (s - t) * delta
        assert advantages[b, t, h].item() == pytest.approx(truth, abs=1e-12)
        value = values[b, t, h].item() if t < n else 0.0
        assert returns[b, t, h].item() == pytest.approx(truth + value, abs=1e-12)


def test_equal_advantages_are_whitened_to_0():
    assert c.whiten(torch.ones(2, 3), torch.ones(2, 3)).abs().max() == 0  # no NaN


def test_policy_loss_is_the_clipped_objective_and_at_ratio_1_the_policy_gradient():
    B, T, clip = 4, 5, 0.2
    logp, old, advantages, mask = doubles(B, T), doubles(B, T), doubles(B, T), ragged_mask(B, T)
    total = 0.0
    for b, t in itertools.product(range(B), range(T)):
        ratio, a = math.exp(logp[b, t] - old[b, t]), advantages[b, t].item()
        total += mask[b, t].item() * min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a)
    loss = c.ppo_policy_loss(logp, old, advantages, mask, clip)
    assert loss.item() == pytest.approx(-total / mask.sum().item())
    logp.requires_grad_()
    c.ppo_policy_loss(logp, logp.detach(), advantages, mask, clip).backward()
    close(logp.grad, -advantages * mask / mask.sum())


def slow_m(method, mix, raw):
    if mix == "lagrangian":
        return list(raw)
    return [math.tanh(x) if method == "xi_ppo" else 1 / (1 + math.exp(-x)) for x in raw]


@both_mixes
@each_method
def test_mixed_advantages(method, mix):
    B, T, N, raw = 3, 4, 3, [0.7, -0.4, 1.9]
    advantages, mask = doubles(B, T, N + 1) * torch.tensor([1, 20, 0.1, 3]), ragged_mask(B, T)
    counts, m = mask.bool(), slow_m(method, mix, raw)
    ours = c.multipliers(method, mix, torch.tensor(raw, dtype=torch.float64))
    close(ours, torch.tensor(m, dtype=torch.float64))

    def white(x):
        return (x - x[counts].mean()) / x[counts].std(correction=0)

    heads, strength = list(advantages.unbind(-1)), 1.0
    if mix == "paper" and method in c.CONSTRAINED:
        heads, strength = [white(head) for head in heads], N - sum(m)
    held = sum(m[i] * heads[i] for i in range(N))
    truth = heads[N]  # without multipliers: the task alone
    if method in ("mu_ppo", "xi_ppo"):
        truth = strength * heads[N] + held
    elif method == "all_ppo":
        truth = strength * sum(heads[:N]) - held
    if mix == "lagrangian" or method not in c.CONSTRAINED:
        truth = white(truth)
    close(c.mix_advantages(method, mix, advantages, ours, mask)[counts], truth[counts], 1e-6)


@both_mixes
@pytest.mark.parametrize("method,side", [("mu_ppo", 1), ("xi_ppo", 1), ("all_ppo", -1)])
def test_a_multiplier_rises_where_its_constraint_is_violated(small, method, mix, side):
    """mu, xi: below the threshold, each by itself; All-PPO: above it."""
    run = small.run(method, mix=mix, thresholds="0.3,0.5", multiplier_lr=0.1)
    raw = torch.tensor([0.2, 0.4], requires_grad=True)
    slope = torch.autograd.grad(c.multipliers(method, mix, raw).sum(), raw)[0]
    run.raw.data.copy_(raw.data)
    c.multiplier_step(run, torch.tensor([0.2, 0.7]))
    close(run.raw.data - raw.data, -0.1 * side * slope * torch.tensor([-0.1, 0.2]), 1e-5)
    run.raw.data.copy_(raw.data)
    c.multiplier_step(run, side * torch.tensor([100.0, 100.0]))  # far: the gradient is cut
    assert (run.raw < raw).all() and (run.raw - raw).norm() < 0.1 * (0.5 + 0.1)


@pytest.mark.parametrize("method,sign", [("xi_ppo", -1), ("mu_ppo", 0), ("all_ppo", 0)])
def test_only_multipliers_of_equalities_turn_negative(small, method, sign):
    run = small.run(method, mix="lagrangian", thresholds="0.3,0.3")
    kept = 0.0 if method == "all_ppo" else 0.6
    c.multiplier_step(run, torch.tensor([kept, kept]))
    assert run.raw.sign().tolist() == [sign, sign]


@each_method
def test_each_critic_head_has_its_own_reward(method):
    B, T, N, coefficient = 3, 4, 3, 0.3
    rewards, mask, weights, thresholds = doubles(B, N), ragged_mask(B, T), doubles(N), doubles(N)
    kl, run = doubles(B, T) * mask, SimpleNamespace(config=SimpleNamespace(method=method))
    run.weights, run.thresholds, run.kl_coefficient = weights, thresholds, coefficient
    heads = c.token_rewards(run, rewards, kl, mask)
    assert heads.shape == (B, T, N + 1)
    for b, t in itertools.product(range(B), range(T)):
        at_end = t == int(mask[b].sum()) - 1
        penalty = coefficient * kl[b, t].item()
        for i in range(N):
            truth = rewards[b, i].item() * at_end - penalty * (method == "all_ppo")
            assert heads[b, t, i].item() == pytest.approx(truth)
        r0 = sum(weights[i] * rewards[b, i] for i in range(N)).item()
        if method == "ppo_sat":
            r0 = -sum(weights[i] * (rewards[b, i] - thresholds[i]) ** 2 for i in range(N)).item()
        truth = r0 * at_end - penalty
        if method in ("mu_ppo", "xi_ppo"):
            truth = -kl[b, t].item()
        assert heads[b, t, N].item() == pytest.approx(truth)


# ----- The update


@both_mixes
@each_method
def test_a_step_minimises_the_papers_loss(small, monkeypatch, method, mix):
    options = {"mix": mix, "thresholds": "0.1,0.2", "weights": "0.5,2", "kl_coefficient": 0.7}
    run = small.run(method, **options, epochs=1, minibatches=1, lr=0.0, kl_target=0.2)
    raw, bias = torch.tensor([0.4, 0.3]), torch.tensor([1.0, 2.0, 3.0])
    run.raw.data, run.critic.head.bias.data = raw.clone(), bias.clone()  # its weights are 0
    rollout = c.generate(run.policy, [[1, 2, 3, 4, 5]] * 7, 0, 5, run.generator)
    mask, counts = rollout.mask, rollout.mask.bool()
    noise = 0.3 * torch.randn(mask.shape)  # another policy's reply, so that ratios are clipped
    rollout = rollout._replace(logp=(rollout.logp + noise) * mask)
    kl, rewards = torch.randn(mask.shape) * mask, torch.rand(7, 2)
    monkeypatch.setattr(c, "reply_to", lambda *_: (rollout, [], rewards, 0.0, kl))
    coefficient = 0.0 if method == "ppo_no_kl" else 0.7
    assert run.kl_coefficient == coefficient
    heads, values = c.token_rewards(run, rewards, kl, mask), bias.expand(*mask.shape, 3)
    advantages, returns = c.gae(heads, values, mask, 0.99, 0.95)
    m = torch.tensor(slow_m(method, mix, raw.tolist()))
    A = c.mix_advantages(method, mix, advantages, m, mask)[counts]
    ratio = (c.token_logp(run.policy, rollout) - rollout.logp).exp()[counts]
    truth = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A).mean()
    for i, weight in enumerate((0.5, 0.5, 0.2)):
        truth = truth + weight * ((values - returns)[..., i][counts] ** 2).mean()
    row = c.update(run, [])
    assert row["loss"] == pytest.approx(truth.item(), rel=1e-4)
    assert torch.equal(run.raw.data, raw) == (method not in c.CONSTRAINED)
    mean = c.masked_mean(kl, mask).item()
    assert row["batch_kl"] == pytest.approx(mean)
    error = min(max((mean - 0.2) / 0.2, -0.2), 0.2)
    assert run.kl_coefficient == pytest.approx(coefficient * (1 + 0.1 * error))


def test_an_update_goes_through_its_minibatches_by_their_own_means(small, monkeypatch):
    run, means = small.run("mu_ppo", batch=12, epochs=3, minibatches=2), []
    scores = {"judge": [0.0] * 12, "polite": range(12), "facts": [0.0] * 12}
    run.task.function = lambda rows, replies: scores
    monkeypatch.setattr(c, "multiplier_step", lambda run, J: means.append(J[0].item()))
    row = c.update(run, run.task.train[:12])
    assert len(means) == 6 and row["batch_rewards"][0] == pytest.approx(5.5, abs=1.1)
    for pair in zip(means[::2], means[1::2], strict=True):
        assert sum(pair) / 2 == pytest.approx(row["batch_rewards"][0])  # each reply once
    assert len({round(mean, 3) for mean in means}) > 2


def test_a_step_leaves_pi_0_alone_and_changes_what_it_should(small):
    run = small.run("xi_ppo", thresholds="90,-90")
    before = {k: v.clone() for k, v in small.reference.state_dict().items()}
    critic = [p.clone() for p in run.critic.parameters()]
    row = c.update(run, run.task.train[:8])
    assert all(torch.equal(v, before[k]) for k, v in small.reference.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in run.policy.state_dict().items())
    assert any(not torch.equal(a, b) for a, b in zip(critic, run.critic.parameters(), strict=True))
    assert run.raw[0] > 0 > run.raw[1] and row["batch_kl"] == pytest.approx(0, abs=1e-5)


def test_the_kl_is_the_policys_log_probability_less_pi_0s(small):
    run = small.run("ppo")
    for parameter in run.policy.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    rollout, _, _, _, kl = c.reply_to(run, run.task.train[:30], run.generator)
    ours, reference = c.token_logp(run.policy, rollout), c.token_logp(run.reference, rollout)
    close(kl, (ours - reference) * rollout.mask, 1e-4)
    assert c.masked_mean(kl, rollout.mask) > 0.1


def test_an_empty_reply_has_no_reward_and_others_are_finite_numbers(small):
    task, rows = small.task, small.task.train[:3]

    def score(judge, polite):
        task.function = lambda rows, replies: {"judge": judge, "polite": polite, "facts": [4.0] * 3}
        return task.score(rows, ["is", "", "so"])

    rewards, judge = score(0.25, [1.0, 2.0, 3.0])
    assert rewards.tolist() == [[1, 4], [0, 0], [3, 4]] and judge == 0.25
    task.names = ["polite"]
    for judge, bad in ((0.0, [1.0, math.nan, 2.0]), (math.inf, [1.0] * 3), (0.0, [1.0, 2.0])):
        with pytest.raises(ValueError, match="must be finite, a number for each reply"):
            score(judge, bad)


# ----- Thresholds


@pytest.mark.parametrize("N", [1, 2, 3])
def test_a_proxy_point_is_a_point_that_was_seen_near_the_peak(N):
    r = np.random.default_rng(N)
    peak, x = np.array([0.3, 0.5, 0.4][:N]), r.uniform(0.1, 0.8, (150, N))
    y = 0.9 - ((x - peak) ** 2).sum(1) + 0.005 * r.standard_normal(150)
    point = c.proxy_point(x, y)
    assert any((point == seen).all() for seen in x)
    close(np.array(point), peak, 0.12)
    lucky, last = y.copy(), np.argmin(y)
    lucky[last] = 1.0  # one noisy evaluation
    assert N == 3 or np.abs(np.array(c.proxy_point(x, lucky)) - x[last]).max() > 0.05


@pytest.mark.parametrize("N", [1, 2, 4])
def test_nelder_mead_finds_a_minimum(N):
    goal = np.arange(1, N + 1) / 3
    search = c.nelder_mead(np.concatenate([np.zeros((1, N)), 0.5 * np.eye(N)]))
    point = next(search)
    for _ in range(120 * N):
        point = search.send(((point - goal) ** 2).sum())
    close(point, goal, 1e-3)


def test_a_search_moves_on_when_a_set_is_reached_or_out_of_time_and_ends_at_the_best(monkeypatch):
    config, rows = SimpleNamespace(updates=80), [{"rewards": [0.2, 0.4]}]
    run, asked = SimpleNamespace(config=config, rows=rows, recent=[], found=[]), []

    def judge(run):
        return {"judge": -abs(asked[-1][0] - 0.25) - abs(asked[-1][1] - 0.5)}

    monkeypatch.setattr(c, "evaluate", judge)
    for run.step in range(80):
        asked.append(c.search_thresholds(run))
        share = (0.8, 1.0, 1.2)[run.step % 3]  # at first the mean of three is what was asked for
        run.recent.append(np.array(asked[-1]) * share if run.step < 30 else [9.0, 9.0])
    close(np.array(asked[::3][:3]), np.array([[0.2, 0.4], [0.3, 0.4], [0.2, 0.6]]))
    assert len(run.found) == 30 // 3 + 4  # three updates a set, then an eighth of the updates
    for at, value in run.found:
        assert value == -abs(at[0] - 0.25) - abs(at[1] - 0.5)
    best = max(run.found, key=lambda pair: pair[1])[0]
    assert asked[69] == run.found[-1][0] != asked[70] == asked[79] == best


# ----- The policy


def draw(prompts, limit):
    """A policy whose parameters are not small, and its replies."""
    policy = c.GPT2(20, positions=40, D=16, n_layer=2, n_head=2)
    for parameter in policy.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    policy.requires_grad_(False)
    return policy, c.generate(policy, prompts, 0, limit, torch.Generator().manual_seed(1))


def test_drawn_log_probabilities_are_those_of_a_full_pass_and_padding_changes_nothing():
    prompts = [torch.randint(1, 20, (n,)).tolist() for n in (3, 9, 1, 6)]
    policy, rollout = draw(prompts, 12)
    close(c.token_logp(policy, rollout) * rollout.mask, rollout.logp, 1e-4)
    for b, prompt in enumerate(prompts):  # alone and without padding
        n = int(rollout.mask[b].sum())
        whole = torch.tensor([prompt + rollout.tokens[b, :n].tolist()])
        logits, _ = policy(whole, torch.ones_like(whole, dtype=torch.bool))
        logp = logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        close(rollout.logp[b, :n], logp.gather(-1, whole[0, len(prompt) :, None])[:, 0], 1e-4)


def test_a_reply_ends_with_the_end_token_and_later_tokens_change_nothing():
    policy, rollout = draw([[1, 2, 3]] * 200, 10)
    for tokens, mask in zip(rollout.tokens.tolist(), rollout.mask.tolist(), strict=True):
        n = tokens.index(0) + 1 if 0 in tokens else 10
        assert mask == [1.0] * n + [0.0] * (10 - n) and not any(tokens[n:])
    changed = rollout._replace(tokens=rollout.tokens.clone())
    changed.tokens[:, 5:] = 7
    close(c.outputs(policy, changed)[:, :6], c.outputs(policy, rollout)[:, :6])


def test_draws_follow_the_policy():
    policy, rollout = draw([[4, 5]] * 20_000, 1)
    p = policy(torch.tensor([[4, 5]]), torch.ones(1, 2).bool())[0][0, -1].softmax(-1)
    shares = torch.bincount(rollout.tokens[:, 0], minlength=20) / 20_000
    assert (shares - p).abs().max() < 5 * 0.5 / math.sqrt(20_000)


# ----- The world


def test_counts_by_hand():
    rows = [{"prompt": "tell me about the lamp"}] * 4
    replies = ["please it brass is lovely-bright", "brass lovely-brass", "oak so lovely-oak", ""]
    found = c.score_shop(rows, replies)
    assert (6 * found["polite"]).tolist() == pytest.approx([2, 1, 1, 0])
    assert (6 * found["facts"]).tolist() == pytest.approx([2, 1, 0, 0])
    close(found["judge"][:2], np.exp([-0.5 * (2 / 1.5) ** 2, -0.5 * (3 / 1.5) ** 2]))
    judge = c.judge_counts(np.array([2.0, 4.0]), np.array([4.0, 4.0]))
    assert judge == pytest.approx([1, math.exp(-2)])


@pytest.mark.parametrize("flattery", [0.6, 0.0])
def test_the_table_is_that_of_the_demonstrations(flattery):
    table, r, n = c.count_table(flattery), random.Random(1), 20_000
    assert table.sum() == pytest.approx(1) and (table >= 0).all()
    replies = [c.demonstration("lamp", flattery, r) for _ in range(n)]
    found = c.score_shop([{"prompt": "tell me about the lamp"}] * n, replies)
    seen = np.zeros_like(table)
    places = (np.rint(6 * found["polite"]).astype(int), np.rint(6 * found["facts"]).astype(int))
    np.add.at(seen, places, 1 / n)
    assert (abs(seen - table) < 5 * np.sqrt(table / n) + 1e-4).all()
    assert {len(reply.split()) for reply in replies} == {2, 4, 6, 8, 10, 12, 14}


def test_the_optimum_is_the_best_of_the_kl_regularised_ones():
    table = c.count_table(0.6)
    optimum, positive = c.exact_optimum(table, -4.0), c.exact_optimum(table, 0.0)
    polite, facts = np.indices(table.shape)

    def tilted(a, b):
        p = table * np.exp(a * polite + b * facts)
        return p / p.sum()

    def judge(p):
        return (p * c.judge_counts(polite, facts)).sum()

    grid = np.arange(-40, 41) / 10
    best = max(judge(tilted(a, b)) for a, b in itertools.product(grid, repeat=2))
    p, m = tilted(*optimum["m"]), optimum["m"]
    assert optimum["judge"] == pytest.approx(best) == pytest.approx(judge(p))
    assert optimum["rewards"] == pytest.approx([(p * n).sum() / 6 for n in (polite, facts)])
    assert m[0] < 0 < m[1]  # politeness has a negative weight, which PPO's have not
    assert positive["m"][0] == 0 and positive["judge"] < optimum["judge"] - 0.1


# ----- Runs


def interrupt_at(call, monkeypatch):
    """Have Ctrl-C come before that update."""
    update, calls = c.update, []

    def interrupted(*both):
        calls.append(1)
        if len(calls) == call:
            monkeypatch.setattr(c, "update", update)
            raise KeyboardInterrupt
        return update(*both)

    monkeypatch.setattr(c, "update", interrupted)


@pytest.mark.parametrize(
    "method,thresholds", [("ppo", ""), ("all_ppo", "0.2,0.3"), ("xi_ppo", "search")]
)
def test_resuming_goes_on_bit_for_bit(small, monkeypatch, method, thresholds):
    changes = {"thresholds": thresholds, "updates": 16, "eval_every": 3, "kl_target": 0.1}
    config = dataclasses.replace(small.config, method=method, **changes)
    whole = c.train(config, "x", small.task, small.reference)
    (Path(config.out) / "x.pt").unlink()
    interrupt_at(11, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        c.train(config, "x", small.task, small.reference)
    config = dataclasses.replace(config, resume=True)
    again = c.train(config, "x", small.task, small.reference)
    assert again.rows == whole.rows and again.found == whole.found
    assert bool(again.found) == (thresholds == "search")
    for ours, truth in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, truth)
    monkeypatch.setattr(c, "update", None)  # finished: only loaded
    assert c.train(config, "x", small.task, small.reference).rows == again.rows
    with pytest.raises(ValueError, match=r"x.pt: made with {'lr': 0.001}"):
        c.train(dataclasses.replace(config, lr=0.5), "x", small.task, small.reference)


def test_a_search_trains_for_what_it_asks_for(small):
    config = dataclasses.replace(small.config, method="xi_ppo", thresholds="search")
    config = dataclasses.replace(config, updates=16, eval_every=1)
    run = c.train(config, "x", small.task, small.reference)
    trained = [row["thresholds"] for row in run.rows[1:]]
    assert trained[0] == pytest.approx(run.rows[0]["rewards"])
    for i, (theta, judge) in enumerate(run.found):  # an eighth of the updates is two
        assert trained[2 * i] == trained[2 * i + 1] == pytest.approx(theta)
        assert run.rows[2 * i + 2]["judge"] == judge
    best = max(run.found, key=lambda pair: pair[1])[0]
    assert len(run.found) == 7 and trained[14] == trained[15] == pytest.approx(best)


def rewards_of_first_words(run, updates):
    """Train where both rewards are 1 for a reply that begins with one of sixty words."""

    def score(rows, replies):
        first = [reply.split()[:1] for reply in replies]
        value = [float(word != [] and word[0] in c.Words.words[:60]) for word in first]
        return {"judge": value, "polite": value, "facts": value}

    run.task.function = score
    return [c.update(run, run.task.train[:32])["batch_rewards"][0] for _ in range(updates)]


def test_ppo_learns_a_reward(small):
    values = rewards_of_first_words(small.run("ppo_no_kl", batch=32, lr=3e-3, reply=3), 41)
    assert values[0] < 0.8 and values[-1] > 0.9


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_xi_holds_a_reward_at_its_threshold(small, seed):
    """The same reward, to be had always: the multiplier keeps it near 0.75, else it would be 1."""
    options = {"batch": 32, "lr": 3e-3, "reply": 3, "thresholds": "0.75,0.75", "seed": seed}
    values = rewards_of_first_words(small.run("xi_ppo", **options), 100)
    assert abs(np.mean(values[40:]) - 0.75) < 0.08


# ----- As a user starts it


@pytest.fixture
def main(tmp_path):
    """Start the script with flags; the exit status must be the one given."""

    def start(*flags, out="x", status=0):
        flags = ["--smoke", "--device", "cpu", "--out", str(tmp_path / out), *flags]
        assert c.main(flags) == status
        return tmp_path / out / "smoke"

    return start


def read(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return json.loads((out / "result.json").read_text()), rows


def test_the_default_run_shows_ppo_and_both_mixes_at_thresholds_that_it_found(main, capsys):
    out = main()
    result, rows = read(out)
    names = {"ppo", "xi_ppo", "xi_ppo_lagrangian"}
    others = {"only_polite", "only_facts", "only_sum", "nelder_mead"}
    assert result["final"].keys() == names | others
    assert result["optimum"]["judge"] > result["optimum_of_weights_above_0"]["judge"]
    assert result["script_sha256"] and result["config"]["updates"] == 4
    last = {row["run"]: row for row in rows}
    assert {name: row["judge"] for name, row in last.items()} == result["final"]
    for name in ("xi_ppo", "xi_ppo_lagrangian"):
        assert last[name]["thresholds"] == result["thresholds"]
    found = [pair for pairs in result["found"] for pair in pairs]
    best = max(found, key=lambda pair: pair[1])[0]
    close(np.array(result["thresholds"]), np.array(best), 1e-4)
    assert (out / "runs.png").stat().st_size > 5000
    assert "xi_ppo_lagrangian: judge" in capsys.readouterr().out


def test_thresholds_given_or_by_the_proxy_point(main):
    flags = ["--method", "xi_ppo", "--mix", "paper", "--thresholds"]
    result, _ = read(main(*flags, "0.4,0.5"))
    assert result["final"].keys() == {"xi_ppo"}
    assert result["thresholds"] == pytest.approx([0.4, 0.5])
    result, rows = read(main(*flags, "proxy", out="y"))
    seen = [row["rewards"] for row in rows if row["run"].startswith("only_")]
    assert any(point == pytest.approx(result["thresholds"], abs=1e-4) for point in seen)


def test_results_are_written_before_the_picture(main, monkeypatch):
    monkeypatch.setattr("matplotlib.pyplot.subplots", lambda *_, **__: 1 / 0)
    assert read(main("--method", "ppo", status=2))


def test_a_run_that_diverges_says_so_and_keeps_its_checkpoint(main, capsys):
    kept = main("--method", "ppo") / "ppo.pt"
    before = kept.read_bytes()
    main("--method", "ppo", "--lr", "1e20", status=1)
    assert "diverged" in capsys.readouterr().err and kept.read_bytes() == before


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--method", "best"], "'best'"),
        (["--mix", "both"], "'both'"),
        (["--thresholds", "0.3"], "'0.3' must be 2 finite numbers"),
        (["--thresholds", "0.3,nan"], "'0.3,nan' must be 2 finite"),
        (["--policy", "somewhere"], "--policy, --data and --module go together"),
        (["--flattery", "1.5"], "--flattery must be in 0..1"),
        (["--kl-coefficient", "-1"], "--kl-coefficient, --kl-target at least 0"),
        (["--device", "nonsense"], "nonsense"),
        (["--out", __file__], "Not a directory"),
    ],
)
def test_bad_flags_exit_2_with_one_line(main, capsys, flags, words):
    main("--method", "xi_ppo", *flags, status=2)
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1, error


def test_a_run_that_was_stopped_goes_on_from_the_command_line(main, monkeypatch):
    """In another process, and ends where an undisturbed run does."""
    whole = main("--method", "ppo")
    interrupt_at(3, monkeypatch)
    half = main("--method", "ppo", out="half", status=130)
    flags = ["--smoke", "--device", "cpu", "--method", "ppo", "--resume", "--out", half.parent]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, SCRIPT, *flags], env=environment, timeout=120, check=True)
    assert (whole / "metrics.jsonl").read_text() == (half / "metrics.jsonl").read_text()
