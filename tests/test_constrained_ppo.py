"""constrained_ppo.py: formulas against slow loops, then the runs as a user starts them."""

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
SCRIPT = Path(c.__file__)
UNBOUND, CPU = ("ppo_no_kl", "ppo", "ppo_sat"), torch.device("cpu")
both_mixes = pytest.mark.parametrize("mix", ["paper", "lagrangian"])


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def ragged_mask(B, T):
    lengths = torch.randint(1, T + 1, (B,))
    lengths[0] = T  # one without padding
    return (torch.arange(T) < lengths[:, None]).double()


@pytest.fixture
def small(tmp_path):
    """A task and a pi_0 that nobody trained, and runs of them."""
    config = c.Config(**c.SMOKE | {"supervised": 0}, reply=8, out=str(tmp_path), device="cpu")
    task = c.Task(config)
    reference = c.first_policy(config, task, CPU)

    def run(method="xi_ppo", **changes):
        changes = {"thresholds": ""} | changes
        return c.Run(dataclasses.replace(config, method=method, **changes), "x", task, reference)

    return SimpleNamespace(config=config, task=task, reference=reference, run=run)


# ----- The formulas


@pytest.mark.parametrize("gamma,lam", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
def test_gae_is_the_double_sum_over_each_reply_and_head(gamma, lam):
    B, T, H = 4, 6, 3
    rewards, values, mask = doubles(B, T, H), doubles(B, T, H), ragged_mask(B, T)
    advantages, returns = c.gae(rewards * mask[..., None], values, mask, gamma, lam)
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        n, truth = int(mask[b].sum()), 0.0
        for s in range(t, n):  # the sum over s of (gamma lam)^(s - t) delta_s
            following = values[b, s + 1, h].item() if s + 1 < n else 0.0
            delta = rewards[b, s, h].item() + gamma * following - values[b, s, h].item()
            truth += (gamma * lam) ** (s - t) * delta
        assert advantages[b, t, h].item() == pytest.approx(truth, abs=1e-12)
        value = values[b, t, h].item() if t < n else 0.0
        assert returns[b, t, h].item() == pytest.approx(truth + value, abs=1e-12)
    noise = doubles(B, T, H) * (1 - mask[..., None])  # padding changes nothing
    again, _ = c.gae(rewards * mask[..., None] + noise, values + noise, mask, gamma, lam)
    close(again, advantages)


def test_whitened_advantages_have_mean_0_and_deviation_1_where_they_count():
    advantages, mask = 3 + 5 * doubles(6, 8), ragged_mask(6, 8)
    out = c.whiten(advantages, mask)
    kept = out[mask.bool()]
    assert abs(kept.mean()) < 1e-12 and abs(kept.std(correction=0) - 1) < 1e-6
    assert (out[~mask.bool()] == 0).all()
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
@pytest.mark.parametrize("method", c.METHODS[:-1])
def test_mixed_advantages(method, mix):
    B, T, N, raw = 3, 4, 3, [0.7, -0.4, 1.9]
    advantages, mask = doubles(B, T, N + 1) * torch.tensor([1, 20, 0.1, 3]), ragged_mask(B, T)
    counts, m = mask.bool(), slow_m(method, mix, raw)
    ours = c.multipliers(method, mix, torch.tensor(raw, dtype=torch.float64))
    close(ours, torch.tensor(m, dtype=torch.float64))

    def white(x):
        return (x - x[counts].mean()) / x[counts].std(correction=0)

    heads = list(advantages.unbind(-1))
    if mix == "paper" and method in c.CONSTRAINED:
        heads = [white(head) for head in heads]
    held = sum(m[i] * heads[i] for i in range(N))
    strength = N - sum(m) if mix == "paper" else 1.0
    truth = heads[N]  # without multipliers: the task alone
    if method in ("mu_ppo", "xi_ppo"):
        truth = strength * heads[N] + held
    elif method == "all_ppo":
        truth = strength * sum(heads[:N]) - held
    if mix == "lagrangian" or method in UNBOUND:
        truth = white(truth)
    ours = c.mix_advantages(method, mix, advantages, torch.tensor(m, dtype=torch.float64), mask)
    close(ours[counts], truth[counts], 1e-6)


def test_only_the_lagrangian_mix_keeps_the_strength_of_the_kl():
    advantages, mask, m = doubles(5, 6, 3), ragged_mask(5, 6), torch.tensor([0.5, 0.5]).double()
    stronger = advantages * torch.tensor([1, 1, 1000.0])
    paper, raw = ("xi_ppo", "paper"), ("xi_ppo", "lagrangian")
    close(
        c.mix_advantages(*paper, advantages, m, mask),
        c.mix_advantages(*paper, stronger, m, mask),
        1e-4,
    )
    task = c.whiten(advantages[..., -1], mask)
    assert (c.mix_advantages(*raw, advantages, m, mask) - task).abs().max() > 0.1
    assert (c.mix_advantages(*raw, stronger, m, mask) - task).abs().max() < 0.01


@both_mixes
@pytest.mark.parametrize("method,side", [("mu_ppo", 1), ("xi_ppo", 1), ("all_ppo", -1)])
def test_a_multiplier_rises_where_its_constraint_is_violated(small, method, mix, side):
    """mu, xi: below the threshold, each by itself; All-PPO: above it."""
    run = small.run(method, mix=mix, thresholds="0.3,0.5", multiplier_lr=0.1)
    run.raw.data = torch.tensor([0.2, 0.4])
    before = run.raw.detach().clone()
    J = torch.tensor([0.2, 0.7])
    c.multiplier_step(run, J)
    slope = torch.ones(2)  # of m by raw
    if mix == "paper":
        slope = (
            1 - before.tanh() ** 2
            if method == "xi_ppo"
            else before.sigmoid() * (1 - before.sigmoid())
        )
    close(run.raw.detach() - before, -0.1 * side * slope * (J - torch.tensor([0.3, 0.5])), 1e-5)
    run.raw.data = torch.tensor([0.2, 0.4])
    c.multiplier_step(run, side * torch.tensor([100.0, 100.0]))  # far: the gradient is cut
    assert (run.raw < before).all() and (run.raw.detach() - before).norm() < 0.1 * (0.5 + 0.1)


def test_multipliers_of_inequalities_stay_above_0_and_equalities_turn_negative(small):
    for method, mix, low, high in (
        ("xi_ppo", "lagrangian", -99, -5), ("mu_ppo", "lagrangian", 0, 1e-9),
        ("xi_ppo", "paper", -1, -0.9), ("mu_ppo", "paper", 0, 0.1),
    ):  # fmt: skip
        run = small.run(method, mix=mix, thresholds="0.3,0.3")
        for _ in range(200):
            c.multiplier_step(run, torch.tensor([0.6, 0.6]))
        m = c.multipliers(method, mix, run.raw.detach())
        assert low <= m.min() and m.max() < high


@pytest.mark.parametrize("method", c.METHODS[:-1])
def test_each_critic_head_has_its_own_reward(method):
    B, T, N, coefficient = 3, 4, 3, 0.3
    rewards, mask = doubles(B, N), ragged_mask(B, T)
    kl, weights, thresholds = doubles(B, T) * mask, doubles(N), doubles(N)
    run = SimpleNamespace(method=method, weights=weights, thresholds=thresholds)
    run.kl_coefficient = coefficient
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


def fixed_reply(run, monkeypatch, B=7, T=5):
    """Have `reply_to` give one rollout of another policy, so that ratios are clipped."""
    prompts = [run.task.tokenizer.encode(row["prompt"]) for row in run.task.train[:B]]
    rollout = c.generate(run.policy, prompts, T, run.generator)
    rollout.logp = (rollout.logp + 0.3 * torch.randn(rollout.logp.shape)) * rollout.mask
    kl = torch.randn(rollout.mask.shape) * rollout.mask
    rewards = torch.rand(B, 2)
    monkeypatch.setattr(c, "reply_to", lambda *_: (rollout, [], rewards, 0.0, kl))
    return rollout, rewards, kl


@both_mixes
@pytest.mark.parametrize("method", c.METHODS[:-1])
def test_a_step_minimises_the_papers_loss(small, monkeypatch, method, mix):
    options = {"mix": mix, "thresholds": "0.1,0.2", "weights": "0.5,2", "kl_coefficient": 0.7}
    run = small.run(method, **options, epochs=1, minibatches=1, lr=0.0, kl_target=0.2)
    run.raw.data = torch.tensor([0.4, 0.3])
    rollout, rewards, kl = fixed_reply(run, monkeypatch)
    run.critic.head.bias.data = torch.tensor([1.0, 2.0, 3.0])  # its weights are 0
    coefficient = 0.0 if method == "ppo_no_kl" else 0.7
    assert run.kl_coefficient == coefficient
    mask, counts = rollout.mask, rollout.mask.bool()
    heads = c.token_rewards(run, rewards, kl, mask)
    values = torch.tensor([1.0, 2.0, 3.0]).expand(*mask.shape, 3)
    advantages, returns = c.gae(heads, values, mask, 0.99, 0.95)
    m = torch.tensor(slow_m(method, mix, [0.4, 0.3]))
    A = c.mix_advantages(method, mix, advantages, m, mask)[counts]
    ratio = (c.token_logp(run.policy, rollout) - rollout.logp).exp()[counts]
    truth = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A).mean()
    for i, weight in enumerate((0.5, 0.5, 0.2)):
        truth = truth + weight * ((values - returns)[..., i][counts] ** 2).mean()
    row = c.update(run, [])
    assert row["loss"] == pytest.approx(truth.item(), rel=1e-4)
    moved = not torch.equal(run.raw.detach(), torch.tensor([0.4, 0.3]))
    assert moved == (method in c.CONSTRAINED)
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


def test_each_head_learns_its_own_return(small, monkeypatch):
    monkeypatch.setattr(c, "GAMMA", 1.0)
    run = small.run("mu_ppo", batch=16, lr=3e-3)
    run.optimizer.param_groups[0]["lr"] = 0.0  # the policy stays
    run.task.function = lambda rows, replies: {
        "judge": 0.0, "polite": [1.0] * len(rows), "facts": [-0.5] * len(rows)
    }  # fmt: skip
    for _ in range(60):
        c.update(run, run.task.train[:16])
    rollout, *_ = c.reply_to(run, run.task.train[:50], run.generator)
    values = c.outputs(run.critic, rollout)[rollout.mask.bool()]
    close(values.mean(0), torch.tensor([1.0, -0.5, 0.0]), 0.1)


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
    task.function = lambda rows, replies: {
        "judge": 0.25, "polite": [1.0, 2.0, 3.0], "facts": [4.0, 5.0, 6.0]
    }  # fmt: skip
    rewards, judge = task.score(rows, ["is", "", "so"])
    assert rewards.tolist() == [[1, 4], [0, 0], [3, 6]] and judge == 0.25
    for bad in ([1.0, 2.0], [1.0, math.nan, 2.0], [[1.0]] * 3):
        task.function = lambda rows, replies, bad=bad: {"judge": 0.0, "polite": bad, "facts": bad}
        with pytest.raises(ValueError, match="must be finite, a number for each reply"):
            task.score(rows, ["a"] * 3)
    task.function = lambda rows, replies: {"judge": math.inf, "polite": [0] * 3, "facts": [0] * 3}
    with pytest.raises(ValueError, match="must be finite"):
        task.score(rows, ["a"] * 3)


# ----- Thresholds


@pytest.mark.parametrize("N", [1, 2, 3])
def test_a_proxy_point_is_a_point_that_was_seen_near_the_peak(N):
    r = np.random.default_rng(N)
    peak, x = np.array([0.3, 0.5, 0.4][:N]), r.uniform(0.1, 0.8, (150, N))
    y = 0.9 - ((x - peak) ** 2).sum(1) + 0.005 * r.standard_normal(150)
    point = c.proxy_point(x, y)
    assert any((point == seen).all() for seen in x)
    close(np.array(point), peak, 0.12)
    lucky = np.where((abs(x - x[np.argmin(y)]) < 1e-9).all(1), 1.0, y)  # one noisy evaluation
    found = np.array(c.proxy_point(x, lucky))
    assert N == 3 or np.abs(found - x[np.argmin(y)]).max() > 0.05


@pytest.mark.parametrize("N", [1, 2, 4])
def test_nelder_mead_finds_a_minimum(N):
    goal = np.arange(1, N + 1) / 3
    search = c.nelder_mead(np.concatenate([np.zeros((1, N)), 0.5 * np.eye(N)]))
    point = next(search)
    for _ in range(120 * N):
        point = search.send(((point - goal) ** 2).sum())
    close(point, goal, 1e-3)


def test_a_search_moves_on_when_a_set_is_reached_or_out_of_time_and_ends_at_the_best():
    found, asked = [], []
    search = c.search_thresholds([0.2, 0.4], 80, found)
    theta = next(search)
    for step in range(80):
        asked.append(theta)
        means = theta if step < 30 else [9.0, 9.0]  # at first all are reached, then none

        def judge(theta=theta):
            return -abs(theta[0] - 0.25) - abs(theta[1] - 0.5)

        theta = search.send((means, judge))
    close(np.array(asked[::3][:3]), np.array([[0.2, 0.4], [0.3, 0.4], [0.2, 0.6]]))
    assert len(found) == 30 // 3 + 4  # three updates a set, then ten
    for at, value in found:
        assert value == -abs(at[0] - 0.25) - abs(at[1] - 0.5)
    assert asked[69] != asked[70] == asked[79] == max(found, key=lambda pair: pair[1])[0]


def test_a_set_counts_as_reached_by_the_mean_of_three_updates():
    found = []
    search = c.search_thresholds([0.2], 800, found)
    next(search)
    for mean in (0.1, 0.3, 0.25):  # their mean is 0.217, within 10 % of 0.2
        assert not found
        search.send(([mean], lambda: 0.0))
    assert found == [([0.2], 0.0)]


# ----- The policy


def tiny_policy(n_layer=2):
    policy = c.GPT2(20, positions=40, D=16, n_layer=n_layer, n_head=2)
    for parameter in policy.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return policy.requires_grad_(False)


def test_drawn_log_probabilities_are_those_of_a_full_pass_and_padding_changes_nothing():
    policy = tiny_policy()
    prompts = [torch.randint(1, 20, (n,)).tolist() for n in (3, 9, 1, 6)]
    rollout = c.generate(policy, prompts, 12, torch.Generator().manual_seed(1))
    close(c.token_logp(policy, rollout) * rollout.mask, rollout.logp, 1e-4)
    for b, prompt in enumerate(prompts):  # alone and without padding
        n = int(rollout.mask[b].sum())
        whole = torch.tensor([prompt + rollout.tokens[b, :n].tolist()])
        logits, _ = policy(whole, torch.ones_like(whole, dtype=torch.bool))
        logp = logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        close(rollout.logp[b, :n], logp.gather(-1, whole[0, len(prompt) :, None])[:, 0], 1e-4)


def test_a_reply_ends_with_the_end_token_and_later_tokens_change_nothing():
    policy = tiny_policy()
    rollout = c.generate(policy, [[1, 2, 3]] * 200, 10, torch.Generator().manual_seed(1))
    for tokens, mask in zip(rollout.tokens.tolist(), rollout.mask.tolist(), strict=True):
        n = tokens.index(0) + 1 if 0 in tokens else 10
        assert mask == [1.0] * n + [0.0] * (10 - n) and not any(tokens[n:])
    changed = dataclasses.replace(rollout, tokens=rollout.tokens.clone())
    changed.tokens[:, 5:] = 7
    close(c.outputs(policy, changed)[:, :6], c.outputs(policy, rollout)[:, :6])


def test_draws_follow_the_policy():
    policy = tiny_policy()
    rollout = c.generate(policy, [[4, 5]] * 20_000, 1, torch.Generator().manual_seed(1))
    whole = torch.tensor([[4, 5]])
    p = policy(whole, torch.ones_like(whole, dtype=torch.bool))[0][0, -1].softmax(-1)
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
    assert c.judge_counts(np.array([2.0, 4.0]), np.array([4.0, 4.0])) == pytest.approx(
        [1, math.exp(-2)]
    )


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
    table, best = c.count_table(0.6), 0.0
    for a, b in itertools.product(np.arange(-40, 41) / 10, repeat=2):
        weighted = [
            (table[i, j] * math.exp(a * i + b * j), i, j) for i, j in np.ndindex(table.shape)
        ] if abs(a + 1) < 0.35 and abs(b - 3) < 0.35 else []  # fmt: skip
        Z = sum(w for w, _, _ in weighted)
        for_judge = sum(w * c.judge_counts(float(i), float(j)) for w, i, j in weighted)
        best = max(best, for_judge / Z if Z else 0.0)
    optimum = c.exact_optimum(table, -4.0)
    assert optimum["judge"] == pytest.approx(best)
    m, positive = optimum["m"], c.exact_optimum(table, 0.0)
    assert m[0] < 0 < m[1]  # politeness has a negative weight, which PPO's have not
    assert positive["m"][0] == 0 and positive["judge"] < optimum["judge"] - 0.1
    polite, facts = np.indices(table.shape)
    p = table * np.exp(m[0] * polite + m[1] * facts)
    p /= p.sum()
    close(np.array(optimum["rewards"]), np.array([(p * polite).sum(), (p * facts).sum()]) / 6)

    def objective(q):  # what p maximises: the reward less the KL to the table
        some = table > 0
        return (q * (m[0] * polite + m[1] * facts)).sum() - (
            q[some] * np.log(q[some] / table[some])
        ).sum()

    for seed in range(20):
        q = p * np.exp(0.1 * np.random.default_rng(seed).standard_normal(p.shape))
        assert objective(q / q.sum()) < objective(p)


# ----- Runs


@pytest.mark.parametrize("method", c.METHODS)
def test_resuming_goes_on_bit_for_bit(small, monkeypatch, method):
    config = dataclasses.replace(
        small.config, method=method, thresholds="0.2,0.3", updates=16, eval_every=3
    )
    arguments = small.task, small.reference
    whole = c.train(config, "whole", *arguments)
    update, calls = c.update, []

    def interrupted(*both):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return update(*both)

    monkeypatch.setattr(c, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        c.train(config, "half", *arguments)
    monkeypatch.setattr(c, "update", update)
    config = dataclasses.replace(config, resume=True)
    again = c.train(config, "half", *arguments)
    assert [row | {"run": 0} for row in again.rows] == [row | {"run": 0} for row in whole.rows]
    assert again.found == whole.found and bool(again.found) == (method == "nelder_mead")
    for ours, truth in zip(again.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(ours, truth)
    monkeypatch.setattr(c, "update", None)  # finished: only loaded
    assert c.train(config, "half", *arguments).rows == again.rows
    with pytest.raises(ValueError, match=r"half.pt: lr was 0.001 and is 0.5"):
        c.train(dataclasses.replace(config, lr=0.5), "half", *arguments)


def test_nelder_mead_trains_for_what_its_search_asks_for(small):
    config = dataclasses.replace(
        small.config, method="nelder_mead", thresholds="", updates=16, eval_every=1
    )
    run = c.train(config, "x", small.task, small.reference)
    trained = [row["thresholds"] for row in run.rows[1:]]
    assert run.method == "xi_ppo" and trained[0] == pytest.approx(run.rows[0]["rewards"])
    for i, (theta, judge) in enumerate(run.found):  # an eighth of the updates is two
        assert trained[2 * i] == trained[2 * i + 1] == pytest.approx(theta)
        assert run.rows[2 * i + 2]["judge"] == judge
    best = max(run.found, key=lambda pair: pair[1])[0]
    assert len(run.found) == 7 and trained[14] == trained[15] == pytest.approx(best)


def first_word(words):
    """A score: 1 where a reply begins with one of the words."""

    def score(rows, replies):
        value = [float(reply.split()[:1] in words) for reply in replies]
        return {"judge": value, "polite": value, "facts": value}

    return score


def test_ppo_learns_a_reward(small):
    run = small.run("ppo_no_kl", batch=32, lr=3e-3, reply=3)
    run.task.function = first_word([[word] for word in c.Words.words[:60]])
    first = c.update(run, run.task.train[:32])["batch_rewards"][0]
    for _ in range(40):
        last = c.update(run, run.task.train[:32])["batch_rewards"][0]
    assert first < 0.8 and last > 0.9


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_xi_holds_a_reward_at_its_threshold(small, seed):
    """The same reward, to be had always: the multiplier keeps it near 0.6, else it would be 1."""
    run = small.run("xi_ppo", batch=32, lr=3e-3, reply=3, thresholds="0.75,0.75", seed=seed)
    run.task.function = first_word([[word] for word in c.Words.words[:60]])
    values = [c.update(run, run.task.train[:32])["batch_rewards"][0] for _ in range(100)]
    assert abs(np.mean(values[40:]) - 0.75) < 0.08


# ----- As a user starts it


def test_the_default_run_tells_the_story_and_is_the_same_again(tmp_path, capsys):
    for out in ("a", "b"):
        assert c.main(["--smoke", "--device", "cpu", "--out", str(tmp_path / out)]) == 0
    out = tmp_path / "a" / "smoke"
    result = json.loads((out / "result.json").read_text())
    names = {"ppo", "xi_ppo", "xi_ppo_lagrangian"}
    others = {"only_polite", "only_facts", "only_sum", "nelder_mead"}
    assert result["final"].keys() == names | others and len(result["thresholds"]) == 2
    assert result["optimum"]["judge"] > result["optimum_of_weights_above_0"]["judge"]
    assert result["script_sha256"] and result["config"]["updates"] == 4
    rows = [(tmp_path / x / "smoke" / "metrics.jsonl").read_text() for x in ("a", "b")]
    assert rows[0] == rows[1]
    last = {row["run"]: row for row in map(json.loads, rows[0].splitlines())}
    assert {name: row["judge"] for name, row in last.items()} == result["final"]
    assert (
        last["xi_ppo"]["thresholds"]
        == last["xi_ppo_lagrangian"]["thresholds"]
        == result["thresholds"]
    )
    found = [pair for pairs in result["found"] for pair in pairs]
    best = max(found, key=lambda pair: pair[1])[0]
    close(np.array(result["thresholds"]), np.array(best), 1e-4)
    assert (out / "story.png").stat().st_size > 5000
    assert "xi_ppo_lagrangian: judge" in capsys.readouterr().out


def test_thresholds_given_or_by_the_proxy_point(tmp_path):
    flags = ["--smoke", "--device", "cpu", "--method", "xi_ppo", "--mix", "paper"]
    assert c.main([*flags, "--thresholds", "0.4,0.5", "--out", str(tmp_path / "a")]) == 0
    result = json.loads((tmp_path / "a/smoke/result.json").read_text())
    assert result["final"].keys() == {"xi_ppo"}
    assert result["thresholds"] == pytest.approx([0.4, 0.5])
    assert c.main([*flags, "--thresholds", "proxy", "--out", str(tmp_path / "b")]) == 0
    lines = (tmp_path / "b/smoke/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    seen = [row["rewards"] for row in rows if row["run"].startswith("only_")]
    theta = json.loads((tmp_path / "b/smoke/result.json").read_text())["thresholds"]
    assert any(point == pytest.approx(theta, abs=1e-4) for point in seen)


def test_results_are_written_before_the_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(c, "plot", lambda *_: 1 / 0)
    flags = ["--smoke", "--device", "cpu", "--method", "ppo"]
    assert c.main([*flags, "--out", str(tmp_path)]) == 2
    assert (tmp_path / "smoke/result.json").exists() and (tmp_path / "smoke/metrics.jsonl").exists()


def test_a_run_that_diverges_says_so_and_keeps_its_checkpoint(tmp_path, capsys):
    flags = ["--smoke", "--device", "cpu", "--method", "ppo"]
    flags += ["--out", str(tmp_path)]
    assert c.main([*flags, "--lr", "1e20"]) == 1
    assert "diverged" in capsys.readouterr().err
    assert c.main(flags) == 0
    kept = (tmp_path / "smoke/ppo.pt").read_bytes()
    assert c.main([*flags, "--lr", "1e20"]) == 1
    assert (tmp_path / "smoke/ppo.pt").read_bytes() == kept


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--method", "best"], "'best'"),
        (["--mix", "both"], "'both'"),
        (["--thresholds", "0.3"], "'0.3' must be 2 finite numbers"),
        (["--thresholds", "0.3,nan"], "'0.3,nan' must be 2 finite"),
        (["--method", "ppo", "--weights", "1,2,3"], "'1,2,3' must be 2"),
        (["--policy", "somewhere"], "--policy, --data and --module go together"),
        (["--flattery", "1.5"], "--flattery must be in 0..1"),
        (["--kl-coefficient", "-1"], "--kl-coefficient, --kl-target at least 0"),
        (["--device", "nonsense"], "nonsense"),
        (["--out", __file__], "Not a directory"),
    ],
)
def test_bad_flags_exit_2_with_one_line(tmp_path, capsys, flags, words):
    defaults = ["--smoke", "--method", "xi_ppo", "--device", "cpu", "--out", str(tmp_path)]
    assert c.main([*defaults, *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1, error


def test_a_run_is_stopped_and_resumed_from_the_command_line(tmp_path):
    """From another process, which ends where an undisturbed run does."""
    flags = ["--smoke", "--device", "cpu", "--method", "ppo", "--out"]
    assert c.main([*flags, str(tmp_path / "whole")]) == 0
    program = "import constrained_ppo as c, sys; u = c.update; n = []\n"
    program += "def stop(*a):\n    n.append(1)\n    if len(n) > 2: raise KeyboardInterrupt\n"
    program += "    return u(*a)\nc.update = stop\nsys.exit(c.main(sys.argv[1:]))"
    options = {"cwd": SCRIPT.parent, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "timeout": 120}
    command = [sys.executable, "-c", program, *flags, str(tmp_path / "half")]
    assert subprocess.run(command, **options).returncode == 130
    command = [sys.executable, str(SCRIPT), *flags, str(tmp_path / "half"), "--resume"]
    assert subprocess.run(command, **options).returncode == 0
    whole, half = ((tmp_path / x / "smoke/metrics.jsonl").read_text() for x in ("whole", "half"))
    assert whole == half
