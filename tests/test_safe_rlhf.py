"""safe_rlhf.py: each formula against slow loops or worked examples, then the runs as a user starts them."""

import copy
import dataclasses
import importlib
import itertools
import json
import math
import random
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import safe_rlhf as s
from tests._helpers import close

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = s.SMOKE | {"updates": 2}


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def ragged_mask(B, T):
    lengths = torch.randint(1, T + 1, (B,))
    return (torch.arange(T) < lengths[:, None]).double()


def quiet(*_, **__):
    pass


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ----- The formulas ---------------------------------------------------------------------------------------------------


def test_reward_loss_by_hand():
    better, worse = doubles(6), doubles(6)
    truth = sum(-math.log(sigmoid(a - b)) for a, b in zip(better.tolist(), worse.tolist(), strict=True)) / 6
    squares = sum(x * x for x in [*better.tolist(), *worse.tolist()]) / 12
    close(s.reward_loss(better, worse), number(truth + 0.001 * squares))
    close(s.reward_loss(better, worse, 0.3), number(truth + 0.3 * squares))


def test_cost_loss_by_hand():
    safer, unsafer = doubles(6), doubles(6)
    signs = torch.tensor([[-1, -1, 1, -1, 1, -1], [1, -1, 1, 1, 1, -1]]).double()
    truth, squares = 0.0, 0.0
    for a, b, first, second in zip(*(x.tolist() for x in (safer, unsafer, *signs)), strict=True):
        truth -= math.log(sigmoid(b - a)) + math.log(sigmoid(first * a)) + math.log(sigmoid(second * b))
        squares += a * a + b * b
    close(s.cost_loss(safer, unsafer, *signs), number(truth / 6 + 0.001 * squares / 12))
    close(s.cost_loss(safer, unsafer, *signs, regularisation=0.2), number(truth / 6 + 0.2 * squares / 12))


def test_a_sign_fixes_the_zero_and_a_sign_of_0_leaves_it_free():
    """One safe and one unsafe answer: with signs the costs end around 0, without only their difference is learned."""
    for sign, shifted in ((1.0, False), (0.0, True)):
        scores = torch.tensor([5.0, 6.0], dtype=torch.float64, requires_grad=True)
        for _ in range(300):
            loss = s.cost_loss(scores[:1], scores[1:], number([-sign]), number([sign]), regularisation=0.0)
            (gradient,) = torch.autograd.grad(loss, scores)
            scores.data -= gradient
        assert scores[1] > scores[0] + 2
        assert (scores[0].item() > 0) == shifted and scores[1] > 0


@pytest.mark.parametrize("lr,maximum,window", [(0.1, 5.0, 128), (0.5, 2.0, 3), (0.1, 5.0, 1), (0.0, 5.0, 7)])
def test_lambda_moves_in_log_space_by_the_mean_of_the_last_costs(lr, maximum, window):
    r, seen, log = random.Random(0), [], math.log(0.7)
    multiplier = s.LagrangeMultiplier(0.7, lr, maximum, threshold=-0.4, window=window)
    for _ in range(40):
        costs = [r.gauss(0.3, 2) for _ in range(5)]
        seen += costs
        recent = seen[-window:]
        log = min(log + lr * math.exp(log) * (sum(recent) / len(recent) + 0.4), math.log(maximum))
        assert multiplier.update(torch.tensor(costs, dtype=torch.float64)) == pytest.approx(math.exp(log))
        assert multiplier.value == pytest.approx(math.exp(log)) and multiplier.value <= maximum * 1.0000001


def test_lambda_rises_above_the_threshold_fades_below_and_stops_at_its_maximum():
    above, below = s.LagrangeMultiplier(), s.LagrangeMultiplier()
    for _ in range(200):
        before = above.value, below.value
        above.update([1.0])
        below.update([-1.0])
        assert above.value >= before[0] and 0 < below.value < before[1]
    assert above.value == pytest.approx(5.0) and below.value < 0.06


@pytest.mark.parametrize(
    "options,words",
    [
        ({"initial": 0}, "initial=0"),
        ({"initial": 6}, "maximum=5.0"),
        ({"window": 0}, "window=0"),
        ({"lr": -1}, "lr=-1"),
    ],
)
def test_a_bad_multiplier_is_refused(options, words):
    with pytest.raises(ValueError, match=f"{words}.*correct it"):
        s.LagrangeMultiplier(**options)


def test_lambda_refuses_costs_that_are_not_finite():
    multiplier = s.LagrangeMultiplier()
    with pytest.raises(ValueError, match="must be finite"):
        multiplier.update([0.0, math.nan])
    assert multiplier.value == 1.0 and not multiplier.costs


def test_the_lagrangians_advantage():
    reward, cost = doubles(3, 4), doubles(2, 3, 4)
    for b, t in itertools.product(range(3), range(4)):
        one = s.lagrangian_advantage(reward, cost[0], 0.7)[b, t]
        close(one, (reward[b, t] - 0.7 * cost[0, b, t]) / 1.7)
        both = s.lagrangian_advantage(reward, cost, torch.tensor([0.7, 2.0]))[b, t]
        close(both, (reward[b, t] - 0.7 * cost[0, b, t] - 2 * cost[1, b, t]) / 3.7, 1e-6)
    close(s.lagrangian_advantage(reward, cost[0], 0.0), reward)
    close(s.lagrangian_advantage(reward, cost[0], 1e12), -cost[0], 1e-9)


def test_shaped_rewards_by_loops():
    B, T, beta = 5, 6, 0.3
    scores, logp, reference, mask = 3 * doubles(B), doubles(B, T), doubles(B, T), ragged_mask(B, T)
    scores[0] = 70.0
    for sign, clamp in itertools.product((-1, 1), (50.0, 0.4)):
        ours = s.shaped_rewards(scores, logp, reference, mask, beta, sign, clamp)
        for b, t in itertools.product(range(B), range(T)):
            last = t == int(mask[b].sum()) - 1
            truth = sign * beta * (logp[b, t] - reference[b, t]).item() + last * scores[b].item()
            truth = min(max(truth, -clamp), clamp) * mask[b, t].item()
            assert ours[b, t].item() == pytest.approx(truth)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 5.0])
def test_the_kl_penalty_counts_once_whatever_lambda_is(lam):
    """Of scores of 0 the Lagrangian's advantage is that of -beta KL alone: the sign of beta in the costs sees to it."""
    logp, reference, mask = doubles(4, 5), doubles(4, 5), ragged_mask(4, 5)
    none, zeros = torch.zeros(4, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.float64)
    pair = [s.shaped_rewards(none, logp, reference, mask, 0.2, sign) for sign in (-1, 1)]
    reward, cost = (s.gae(x, zeros, mask, 1.0, 0.95)[0] for x in pair)
    close(s.lagrangian_advantage(reward, cost, lam), s.gae(-0.2 * (logp - reference) * mask, zeros, mask, 1.0, 0.95)[0])


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.0)])
def test_gae_is_the_double_sum_over_each_answer(gamma, lam):
    B, T = 4, 6
    rewards, values, mask = doubles(B, T), doubles(B, T), ragged_mask(B, T)
    advantages, returns = s.gae(rewards, values, mask, gamma, lam)
    for b, t in itertools.product(range(B), range(T)):
        n, truth = int(mask[b].sum()), 0.0
        for k in range(t, n):
            following = values[b, k + 1].item() if k + 1 < n else 0.0
            truth += (gamma * lam) ** (k - t) * (rewards[b, k] + gamma * following - values[b, k]).item()
        close(advantages[b, t], number(truth))
        close(returns[b, t], number(truth + (values[b, t].item() if t < n else 0.0)))


def test_losses_are_means_within_an_answer_and_then_over_answers():
    B, T, clip = 4, 5, 0.2
    logp, old, advantages, mask = doubles(B, T), doubles(B, T), doubles(B, T), ragged_mask(B, T)
    values, before, returns = 8 * doubles(B, T), doubles(B, T), doubles(B, T)
    policy, critic = 0.0, 0.0
    for b in range(B):
        n = int(mask[b].sum())
        for t in range(n):
            ratio, a = math.exp(logp[b, t] - old[b, t]), advantages[b, t].item()
            policy -= min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a) / n / B
            v, o, g = values[b, t].item(), before[b, t].item(), returns[b, t].item()
            critic += 0.5 * max((v - g) ** 2, (min(max(v, o - 5), o + 5) - g) ** 2) / n / B
    weights = s.answer_weights(mask)
    close(s.ppo_policy_loss(logp, old, advantages, weights, clip), number(policy))
    close(s.critic_loss(values, before, returns, weights, 5.0), number(critic))


def test_values_clipped_past_their_return_teach_nothing():
    values = torch.tensor([[9.0, 0.5]], requires_grad=True)
    s.critic_loss(values, torch.zeros(1, 2), torch.tensor([[20.0, 20.0]]), torch.ones(1, 2), 5.0).backward()
    assert values.grad[0, 0] == 0 and values.grad[0, 1] < 0


def test_llama_2s_gate():
    safety, helpful = torch.tensor([0.9, 0.9, 0.1, 0.15]), torch.tensor([0.3, 0.4, 0.5, 0.6])
    tagged = torch.tensor([False, True, False, False])
    close(s.llama2_gate(safety, helpful, tagged), torch.tensor([0.3, 0.9, 0.1, 0.6]))
    close(s.llama2_gate(safety, helpful, tagged, threshold=0.0), torch.tensor([0.3, 0.9, 0.5, 0.6]))


def test_what_each_method_maximises():
    reward, costs, tagged = doubles(50), 3 * doubles(2, 50), torch.arange(50) % 3 == 0
    config = s.Config(costs="harm,length", threshold="0,0", nu=2.0)
    of = lambda **changes: s.method_scores(dataclasses.replace(config, **changes), reward, costs, tagged)  # noqa: E731
    assert len(of(method="ppo")) == 1 and torch.equal(of(method="ppo")[0], reward)
    for ours, truth in zip(of(method="ppo_lag"), (reward, *costs), strict=True):
        assert torch.equal(ours, truth)
    close(of(method="shaping")[0], reward - 2 * costs[0] - 2 * costs[1])
    close(of(method="shaping", normalise_shaping=True)[0], (reward - 2 * costs[0] - 2 * costs[1]) / 3)
    gated = [  # sigmoid(-C) < 0.15 is C > 1.735, and the logit of a sigmoid is what went in
        -c if tag or c > 1.7346 else r
        for r, c, tag in zip(reward.tolist(), costs[0].tolist(), tagged.tolist(), strict=True)
    ]
    (ours,) = of(method="gate")
    close(ours, (number(gated) - np.mean(gated)) / np.std(gated), 1e-5)


def test_quadrants_and_win_rates_by_counting():
    r = np.random.default_rng(0)
    rewards, baseline, costs, before = r.integers(0, 3, (4, 80)) - 1.0
    found, rates = s.quadrants(rewards, baseline, costs), s.win_rates(rewards, baseline, costs, before)
    for better, safe in itertools.product((True, False), repeat=2):
        name = f"{'better' if better else 'worse'}, {'safe' if safe else 'unsafe'}"
        assert found[name] == sum(
            (x > y) == better and (c <= 0) == safe for x, y, c in zip(rewards, baseline, costs, strict=True)
        )
    for then, now in itertools.product((True, False), repeat=2):
        rows = [
            (x > y) + 0.5 * (x == y)
            for x, y, c, b in zip(rewards, baseline, costs, before, strict=True)
            if (b <= 0) == then and (c <= 0) == now
        ]
        word = {True: "safe", False: "unsafe"}
        assert rates[f"{word[then]} -> {word[now]}"] == (len(rows), pytest.approx(sum(rows) / len(rows)))
    assert s.win_rates([1], [0], [-1], [-1])["unsafe -> safe"] == (0, None)


def test_elo_of_two_is_the_log_odds():
    games = [(0, 1, 1.0)] * 30 + [(1, 0, 1.0)] * 60 + [(0, 1, 0.5)] * 10
    ratings, low, high = s.elo(games, draws=0.0)
    assert ratings[0] == 1000 and ratings[1] == pytest.approx(1000 + 400 * math.log10(65 / 35), abs=1e-6)
    assert low[1] < ratings[1] < high[1] and low[0] == high[0] == 1000
    # the standard error of log-odds p(1 - p) n, draws halved: within a third of the bootstrap's width
    assert (high[1] - low[1]) == pytest.approx(2 * 1.96 * 400 / math.log(10) / math.sqrt(100 * 0.65 * 0.35), rel=0.35)


def test_elo_of_one_who_always_wins_is_finite_and_bad_games_are_refused():
    ratings, low, high = s.elo([(0, 1, 0.0)] * 20 + [(1, 2, 0.0)] * 20)
    assert np.isfinite([ratings, low, high]).all() and 1200 < ratings[1] < ratings[2]
    with pytest.raises(ValueError, match="i not j"):
        s.elo([(1, 1, 1.0)])
    with pytest.raises(ValueError, match="score from 0 to 1"):
        s.elo([(0, 1, 3.0)])


# ----- The world ------------------------------------------------------------------------------------------------------


def prompt_of(kind, thing):
    return next(p for p in itertools.chain(*s.world()) if (p.kind, p.thing) == (kind, thing))


def test_the_ground_truth_by_hand():
    harmless, dual, harmful = (prompt_of(kind, things.split()[1]) for kind, things in s.THINGS.items())
    assert s.steps_of(harmless) == [f"{harmless.thing}-{i}" for i in (1, 2, 3, 4)]
    assert [step[-1] == "!" for step in s.steps_of(dual)] == [False, True, False, False]
    assert all(step.endswith("!") for step in s.steps_of(harmful))
    use, ask, *_ = s.ALTERNATIVES
    for prompt, answer, helpfulness, harm in (
        (harmless, " ".join(s.steps_of(harmless)), 4, -2.5),
        (harmless, f"{harmless.thing}-1 {harmless.thing}-1", 0.5, -2.5),  # repeated
        (harmless, f"{harmless.thing}-1 {use}", 0.5 + 0.0, -2.5 + 0.0),
        (dual, " ".join(s.steps_of(dual)), 4, 1.75),
        (dual, " ".join(s.steps_of(dual)[2:]), 2, -2.5),
        (harmful, " ".join(s.steps_of(harmful)), 4, 4),
        (harmful, f"{use} {ask}", 1.2, -2.5),
        (harmful, s.REFUSAL, 0, -3.5),
        (harmful, "", -0.5, -2.5),
    ):
        scores = s.true_scores(prompt, answer)
        if answer == f"{harmless.thing}-1 {use}":
            helpfulness = 1.0  # an alternative to what is harmless is worth nothing, but no word too many
        assert (scores["helpfulness"], scores["harm"]) == (pytest.approx(helpfulness), harm), answer
        assert scores["length"] == (len(answer.split()) - 3.5 if answer != s.REFUSAL else -2.5)


def test_the_best_safe_answer_to_dual_use_is_partial_and_no_refusal():
    dual = prompt_of("dual-use", "vorn")
    safe = [step for step in s.steps_of(dual) if not step.endswith("!")]
    scores = s.true_scores(dual, " ".join([*safe, s.ALTERNATIVES[0]]))
    assert scores["harm"] < 0 and 3 < scores["helpfulness"] < 4


def test_prompts_are_split_without_overlap():
    train, held, disguised = s.world()
    assert len({*train, *held, *disguised}) == len(train) + len(held) + len(disguised)
    assert {p.kind for p in train} == {p.kind for p in held} == {*s.THINGS}
    assert {p.kind for p in disguised} == {"dual-use", "harmful"} and all(p.disguised for p in disguised)


@pytest.mark.parametrize("disguised,share,low,high", [(False, 0, 0.45, 0.55), (True, 0, 0.75, 0.85), (True, 1, 0, 0)])
def test_demonstrations_are_as_harmful_as_they_say(disguised, share, low, high):
    prompt = dataclasses.replace(prompt_of("harmful", "grax"), disguised=disguised)
    r = random.Random(0)
    harm = [s.true_scores(prompt, s.demonstration(prompt, r, share))["harm"] > 0 for _ in range(1000)]
    assert low <= sum(harm) / 1000 <= high


def test_labels_follow_bradley_and_terry(tmp_path):
    harmful, r = prompt_of("harmful", "skel"), random.Random(0)
    pair = (f"{s.ALTERNATIVES[0]}", "skel-1! skel-2!")
    rows = s.preference_rows([harmful] * 4000, [pair] * 4000, "harm", r)
    first, second = (s.true_scores(harmful, answer) for answer in pair)
    better = sigmoid(2 * (second["helpfulness"] - first["helpfulness"]))
    assert np.mean([row["better_response_id"] for row in rows]) == pytest.approx(better, abs=0.03)
    for i, scores in enumerate((first, second)):
        assert np.mean([row[f"is_response_{i}_safe"] for row in rows]) == pytest.approx(
            sigmoid(-scores["harm"]), abs=0.03
        )
    same = [row for row in rows if row["is_response_0_safe"] == row["is_response_1_safe"]]
    assert np.mean([row["safer_response_id"] == 0 for row in same]) == pytest.approx(sigmoid(5), abs=0.05)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = s.read_pairs(str(tmp_path / "rows.jsonl"))  # none breaks the rule on flags
    assert [p.better for p in pairs] == [row["better_response_id"] for row in rows] and pairs[7].where.endswith(
        "line 8"
    )
    assert s.preference_rows([harmful], [("sorry", "sorry")], "harm", r) == []


# ----- The models -----------------------------------------------------------------------------------------------------


def small_llama(scores=False, **changes):
    sizes = {"vocab_size": 23, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 3, "num_key_value_heads": 1}
    model = s.Llama(s.LlamaConfig(**sizes | changes), scores)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def written(policy, limit=9, count=12, seed=3):
    prompts = [torch.randint(1, 23, (n % 5 + 1,)).tolist() for n in range(count)]
    return prompts, s.write_answers(policy, prompts, 0, limit, torch.Generator().manual_seed(seed))


def test_written_log_probabilities_are_those_of_a_full_forward():
    """The cache and padding in front change nothing: PPO's first ratio is 1."""
    policy = small_llama()
    prompts, rollout = written(policy)
    close(policy.token_logp(rollout) * rollout.mask, rollout.logp, 1e-5)
    ends = 0
    for b, prompt in enumerate(prompts):  # each by itself, without padding or cache
        n = int(rollout.mask[b].sum())
        answer = rollout.tokens[b, :n].tolist()
        assert 0 not in answer[:-1] and (answer[-1] == 0 or n == 9)
        ends += answer[-1] == 0
        logp = policy(torch.tensor([prompt + answer]))[0].log_softmax(-1)
        for t in range(n):
            close(rollout.logp[b, t], logp[len(prompt) + t - 1, answer[t]], 1e-4)
    assert ends


def test_scores_are_those_at_the_last_token_of_each_answer_by_itself():
    scorer = small_llama(scores=True)
    prompts, rollout = written(small_llama())
    values = scorer.over(rollout)
    for b, prompt in enumerate(prompts):
        n = int(rollout.mask[b].sum())
        alone = scorer(torch.tensor([prompt + rollout.tokens[b, :n].tolist()]))[0]
        close(scorer.score_of(rollout)[b], alone[-1], 1e-4)
        close(values[b, :n], alone[len(prompt) - 1 : -1], 1e-4)


def test_what_follows_the_end_never_matters():
    policy, scorer = small_llama(), small_llama(scores=True)
    _, rollout = written(policy, 12, 24)
    assert (rollout.mask.sum(1) < rollout.tokens.shape[1]).any()
    changed = dataclasses.replace(rollout, tokens=torch.where(rollout.mask.bool(), rollout.tokens, 7))
    close(policy.token_logp(changed) * rollout.mask, policy.token_logp(rollout) * rollout.mask, 1e-6)
    close(scorer.score_of(changed), scorer.score_of(rollout), 1e-6)


def test_draws_follow_the_distribution():
    policy = small_llama()
    rollout = s.write_answers(policy, [[3, 5]] * 4000, 0, 1, torch.Generator().manual_seed(0))
    counts = torch.bincount(rollout.tokens[:, 0], minlength=23) / 4000
    close(counts, policy(torch.tensor([[3, 5]]))[0, -1].softmax(0), 0.04)


def test_words_are_encoded_in_the_template():
    tokenizer = s.WordTokenizer(["how do i fix it ?", "so so"])
    ids = tokenizer.encode(s.TEMPLATE.format("how do i ?") + "so fix")
    assert tokenizer.decode(ids) == "BEGINNING_OF_CONVERSATION:_USER: how do i ? ASSISTANT: so fix"
    head = tokenizer.encode(s.TEMPLATE.format("how do i ?"))
    assert ids[: len(head)] == head and tokenizer.end not in ids


# ----- Runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The stages of a tiny config."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("saved")
    s.pipeline(s.Config(**TINY, method="sft", out=str(out)), quiet)
    return out


def new_lab(tmp_path, saved, **changes):
    """An experiment with the saved policy and score models."""
    config = s.Config(**TINY | {"method": "ppo_lag"} | changes, out=str(tmp_path))
    for path in saved.iterdir():
        if path.suffix in (".pt", ".jsonl"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    lab = s.Experiment(config, torch.device("cpu"))
    lab.learn_demonstrations()
    lab.learn_preferences(1, [])
    return lab


@pytest.mark.parametrize("method", s.METHODS[1:])
def test_resuming_goes_on_bit_for_bit(tmp_path, saved, method):
    lab = new_lab(tmp_path, saved, updates=4, eval_every=2, method=method)
    whole = s.Run(lab, lab.config, "whole").go(quiet)
    half, evaluate = s.Run(lab, lab.config, "half"), lab.evaluate

    def interrupted(*arguments):
        if half.step == 4:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    lab.evaluate = interrupted
    with pytest.raises(KeyboardInterrupt):
        half.go(quiet)
    lab.evaluate = evaluate
    config = dataclasses.replace(lab.config, resume=True)
    again = s.Run(lab, config, "half").go(quiet)
    assert [row | {"run": "whole"} for row in again.rows] == whole.rows and len(whole.rows) == 3
    for part in ("policy", "critics"):
        pairs = zip(getattr(again, part).state_dict().values(), getattr(whole, part).state_dict().values(), strict=True)
        assert all(torch.equal(ours, truth) for ours, truth in pairs)
    assert [m.value for m in again.multipliers] == [m.value for m in whole.multipliers]
    assert s.Run(lab, lab.config, "half").go(quiet).rows == again.rows  # finished: only loaded


def test_an_update_changes_what_it_should(tmp_path, saved):
    lab = new_lab(tmp_path, saved)
    frozen = [lab.policy, lab.reward, *lab.costs]
    before = [copy.deepcopy(model.state_dict()) for model in frozen]
    run = s.Run(lab, lab.config, "x")
    critics = copy.deepcopy(run.critics.state_dict())
    for i, model in enumerate([lab.reward, *lab.costs]):  # critics start from the score models
        for name, value in model.state_dict().items():
            assert torch.equal(critics[f"{i}.{name}"], value)
    row = run.update()
    for model, state in zip(frozen, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for name, value in run.policy.state_dict().items():
        assert "norm" in name or not torch.equal(value, before[0][name])
    assert any(not torch.equal(value, critics[name]) for name, value in run.critics.state_dict().items())
    assert row["lambda_harm"] == pytest.approx(
        math.exp(0.1 * (row["batch_harm"] + 2)), rel=1e-5
    )  # raw costs, moved first


def test_advantages_and_returns_are_each_signals_own(tmp_path, saved, monkeypatch):
    lab = new_lab(tmp_path, saved, costs="harm", gamma=1.0)
    run, gae, calls, shaped = s.Run(lab, lab.config, "x"), s.gae, [], []
    original = s.shaped_rewards
    monkeypatch.setattr(s, "gae", lambda *args: calls.append(args) or gae(*args))
    monkeypatch.setattr(s, "shaped_rewards", lambda *args: shaped.append(args) or original(*args))
    row = run.update()
    assert [args[5] for args in shaped] == [-1, 1] and len(calls) == 2
    assert shaped[0][0].mean().item() == pytest.approx(row["batch_reward"])
    assert shaped[1][0].mean().item() == pytest.approx(row["batch_harm"])
    assert not torch.equal(calls[0][1], calls[1][1])
    run.update()  # the reference is the policy that the run began with: the same at first, then not
    for at, same in ((0, True), (2, False)):
        logp, reference = shaped[at][1:3]
        assert ((logp - reference).abs().max() < 1e-5) == same


@pytest.mark.parametrize("ptx", [0.0, 3.0])
def test_ppos_gradient_is_averaged_with_that_of_the_demonstrations(tmp_path, saved, monkeypatch, ptx):
    lab = new_lab(tmp_path, saved, ptx=ptx)
    run = s.Run(lab, lab.config, "x")
    monkeypatch.setattr(s.nn.utils, "clip_grad_norm_", lambda parameters, norm: torch.zeros(()))
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    rollout = lab.write(run.policy, lab.train[:4], torch.Generator().manual_seed(1))
    advantage, values = torch.randn(rollout.mask.shape), torch.zeros(rollout.mask.shape)
    state = run.generator.get_state()
    run.learn(rollout, advantage, [values] * 2, [values] * 2)
    ours = [parameter.grad.clone() for parameter in run.policy.parameters()]
    logp = run.policy.token_logp(rollout)
    loss = -((logp - logp.detach()).exp() * advantage * s.answer_weights(rollout.mask)).sum() / 4
    if ptx:
        run.generator.set_state(state)
        rows = torch.randint(len(lab.harmless), (lab.config.batch,), generator=run.generator)
        shown = lab.rollout([lab.harmless[i] for i in rows.tolist()])
        logits, used = run.policy.over(shown), shown.mask.bool()
        loss = (loss + ptx * torch.nn.functional.cross_entropy(logits[used], shown.tokens[used])) / 2
    for mine, truth in zip(ours, torch.autograd.grad(loss, [*run.policy.parameters()]), strict=True):
        close(mine, truth, 1e-5)


def stubbed(lab, reward, cost):
    """Scores by functions of the answers' tokens (B, T) and mask, in place of the models'."""
    lab.reward.score_of = lambda rollout: reward(rollout.tokens, rollout.mask)
    lab.costs[0].score_of = lambda rollout: cost(rollout.tokens, rollout.mask)


def test_ppo_learns_a_reward_and_the_lagrangian_holds_a_cost(tmp_path, saved):
    """Reward and cost are the same, the share of words from the front half: the constraint is all that stops it."""
    lab = new_lab(tmp_path, saved, lr=1e-2, critic_lr=3e-3, ptx=0.0, beta=0.0, threshold="0.5")
    lab.config = dataclasses.replace(lab.config, answer=4, batch=64)
    middle = lab.tokenizer.size // 2
    share = lambda tokens, mask: ((tokens < middle) * mask).sum(1) / mask.sum(1)  # noqa: E731
    stubbed(lab, share, share)
    config = dataclasses.replace(lab.config, updates=60, lagrange_lr=0.5)
    ends = {}
    for method in ("ppo", "ppo_lag"):
        run = s.Run(lab, dataclasses.replace(config, method=method), method)
        ends[method] = [run.update()["batch_harm"] for _ in range(60)]
    assert sum(ends["ppo"][-10:]) / 10 > 0.9
    assert abs(sum(ends["ppo_lag"][-20:]) / 20 - 0.5) < 0.12


def test_two_costs_by_the_same_code(tmp_path):
    result = s.pipeline(s.Config(**TINY, costs="harm,length", threshold="-2,0", out=str(tmp_path)), quiet)
    row = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert {"lambda_harm", "lambda_length", "cost_length", "true_length", "unsafe_length"} <= row.keys()
    assert {"cost_length_pairs", "cost_length_signs"} <= result["accuracy"].keys()
    pairs = [s.read_pairs(str(tmp_path / f"preferences_{name}_1.jsonl")) for name in ("harm", "length")]
    for key in ("answers", "better"):
        assert [getattr(p, key) for p in pairs[0]] == [getattr(p, key) for p in pairs[1]]
    assert [p.safe for p in pairs[0]] != [p.safe for p in pairs[1]]


def test_red_teaming_keeps_what_the_truth_calls_harmful_and_never_runs_out(tmp_path, saved, monkeypatch):
    lab = new_lab(tmp_path, saved)
    monkeypatch.setattr(
        lab, "answers", lambda policy, prompts, seed: [f"{p.thing}-1!" if "rules" in p.text else "" for p in prompts]
    )
    found, share = lab.red_team(lab.policy, [], 0)
    assert found and all("rules" in p.text for p in found) and share == len(found) / (len(lab.disguised) // 3)
    assert not {*found} & {*lab.red_team(lab.policy, found, 0)[0]}
    assert lab.red_team(lab.policy, lab.disguised, 0) == ([], 0.0)
    assert len(lab.red_team(lab.policy, lab.disguised[5:], 0)[0]) <= 5


def test_rounds_find_prompts_and_measure_on_them(tmp_path):
    config = s.Config(**TINY | {"pairs": 120}, rounds=2, out=str(tmp_path))
    result = s.pipeline(config, quiet)
    first, second = result["rounds"]
    assert second["found"] > 0 == first["found"] and set(result["means"]) == {"sft", "ppo", "ppo_lag", "ppo_lag-round2"}
    assert {"harmful share, plain", "harmful share, found", "harmful share, fresh"} <= second.keys()
    rows = s.read_pairs(str(tmp_path / "preferences_harm_2.jsonl"))
    forms = {p.text for p in s.world()[2]}
    assert 0.2 < sum(row.prompt in forms for row in rows) / len(rows) < 0.8
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    assert s.pipeline(config, quiet)["rounds"] == result["rounds"]
    assert stamps == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}


def test_score_models_learn_and_the_cost_model_knows_its_zero(tmp_path):
    """From pairs whose better answer has more words and whose unsafe ones begin with a dangerous step."""
    lab = s.Experiment(s.Config(**TINY | {"d_model": 32, "score_steps": 120, "score_lr": 3e-3}), torch.device("cpu"))
    prompts, r = [p for p in lab.train + lab.held if p.kind == "harmful"], random.Random(0)
    answers = []
    for prompt in prompts * 4:
        one, two = r.sample([*s.steps_of(prompt), *s.ALTERNATIVES], 2)
        answers.append((one, f"{two} {r.choice(s.ALTERNATIVES)}"))
    pairs = []
    for prompt, (one, two) in zip(prompts * 4, answers, strict=True):
        safe = ("!" not in one, "!" not in two)
        pairs.append(s.Pair(prompt.text, (one, two), safe, 1, 0 if safe[0] else 1 if safe[1] else 0, "here"))
    lab.pairs = [pairs]
    lab.reward, lab.costs = s.scorer_from(lab.policy), [s.scorer_from(lab.policy)]
    lab.train_scores(lab.reward, 0)
    lab.train_scores(lab.costs[0], 1)
    found = lab.measure()
    assert found["reward_pairs"] > 0.95 and found["cost_harm_signs"] > 0.9 and found["cost_harm_pairs"] > 0.7


@pytest.mark.parametrize("terms", s.COST_TERMS)
def test_the_cost_model_reads_the_labels_of_its_terms_alone(terms):
    """Of flipped labels: pairs alone do not see the flags, signs alone not which is the safer; both see both."""
    lab = s.Experiment(s.Config(**TINY | {"score_steps": 3, "cost_terms": terms}), torch.device("cpu"))
    r, start = random.Random(0), s.scorer_from(lab.policy)
    texts = [(p.text, tuple(r.sample([*s.steps_of(p), *s.ALTERNATIVES], 2))) for p in lab.train[:40]]

    def learned(flip_flags, flip_safer):
        flags = [(i % 3 == 0) != flip_flags for i in range(40)]
        safer = [int((i % 2 == 0) != flip_safer) for i in range(40)]
        rows = zip(texts, flags, safer, strict=True)
        lab.pairs, model = [[s.Pair(*text, (f, f), 1, which, "here") for text, f, which in rows]], copy.deepcopy(start)
        lab.train_scores(model, 1)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    plain, flags, safer = learned(False, False), learned(True, False), learned(False, True)
    assert torch.equal(plain, learned(False, False))
    assert torch.equal(plain, flags) == (terms == "pairs") and torch.equal(plain, safer) == (terms == "signs")


# ----- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--method", "best"], ["'best'", "must be one of", "ppo_lag"]),
        (["--cost-terms", "flags"], ["--cost-terms 'flags'", "must be one of", "signs"]),
        (["--threshold", "0,1"], ["--threshold '0,1'", "must be a number a cost"]),
        (["--threshold", "x"], ["--threshold 'x'", "must be a number a cost"]),
        (["--costs", "harm,charm"], ["--costs harm,charm", "must be of"]),
        (["--cost-model", "a,b"], ["2 folders", "must be one a cost"]),
        (["--lagrange-initial", "9"], ["initial=9.0", "maximum"]),
        (["--lr", "-1"], ["--lr -1.0", "must be at least 0"]),
        (["--updates", "0"], ["--updates 0", "must be at least 1"]),
        (["--safe-demonstrations", "1.5"], ["1.5", "at most 1"]),
        (["--gamma", "1.5"], ["--gamma 1.5", "must be at most 1"]),
        (["--preferences", "nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        (["--policy", "nowhere"], ["nowhere", "config.json"]),
        (["--smoke", "--reward-model", "nowhere"], ["nowhere", "config.json"]),
        (["--preferences", "a.jsonl", "--rounds", "2"], ["--rounds 2", "must be 1 with --preferences"]),
        (["--method", "sft", "--rounds", "2"], ["--rounds 2", "must be 1 with --method sft"]),
        (["--costs", "length", "--rounds", "2"], ["--rounds 2", "must be 1 without a cost of harm"]),
        (["--costs", "harm,harm"], ["['harm', 'harm']", "each once"]),
        (["--preferences", "reward.jsonl"], ["costs ['reward']", "must be named otherwise"]),
    ],
)
def test_bad_flags_exit_2_with_one_line(tmp_path, capsys, flags, words):
    assert s.main([*flags, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words) and len(error.splitlines()) == 1, error


def rows_of(count=40):
    """Rows in the data set's schema, with both kinds of label."""
    return [
        {
            "prompt": f"what of {w} ?", "response_0": f"{w} is good", "response_1": f"{w} is bad {w}",
            "is_response_0_safe": True, "is_response_1_safe": i % 3 == 0, "better_response_id": i % 2,
            "safer_response_id": 0,
        }
        for i, w in enumerate([f"w{i}" for i in range(count)])
    ]  # fmt: skip


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"safer_response_id": None}, ["'safer_response_id' is None", "must be 0 or 1"]),
        ({"better_response_id": 2}, ["'better_response_id' is 2", "must be 0 or 1"]),
        ({"better_response_id": True}, ["'better_response_id' is True", "must be 0 or 1"]),
        ({"is_response_0_safe": 1}, ["'is_response_0_safe' is 1", "must be true or false"]),
        ({"response_1": None}, ["'response_1' is None", "must be a text"]),
        ({"is_response_1_safe": False, "safer_response_id": 1}, ["response_1 is called the safer", "must not be"]),
        ({"response_1": " w6 is  good "}, ["both answers are the same tokens", "drop the row"]),
        ({"response_1": "w1 " * 3000}, ["positions", "must be at most the model's 2048"]),
        ("not json", ["must be a JSON object"]),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, capsys, change, words):
    rows = rows_of()
    rows[6] = change if isinstance(change, str) else rows[6] | change
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert s.main(["--smoke", "--preferences", path, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in ["rows.jsonl, line 7", *words]), error


@pytest.mark.parametrize(
    "flag,words", [(True, "labelled safe, must be some unsafe"), (False, "labelled unsafe, must be")]
)
def test_labels_of_one_kind_alone_are_named(tmp_path, capsys, flag, words):
    rows = [row | {"is_response_0_safe": flag, "is_response_1_safe": flag} for row in rows_of()]
    rows[1] |= {} if flag else {"is_response_0_safe": True, "better_response_id": 0}
    if not flag:  # one safe answer, to a prompt that is held out, lets the cost model see unsafe ones only
        rows[0], rows[1] = (
            rows[0] | {"is_response_0_safe": True, "better_response_id": 0},
            rows[1] | {"is_response_0_safe": False},
        )
    code = s.main(["--smoke", "--preferences", write_rows(tmp_path / "r.jsonl", rows), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2 and (words in error or "no better answer is labelled safe" in error), error


def test_a_file_of_one_prompt_is_refused(tmp_path, capsys):
    rows = [row | {"prompt": "what ?"} for row in rows_of()]
    path = write_rows(tmp_path / "r.jsonl", rows)
    assert s.main(["--smoke", "--preferences", path, "--out", str(tmp_path / "out")]) == 2
    assert "holds one prompt, must hold two" in capsys.readouterr().err


def test_own_preferences_and_two_files_of_them(tmp_path, capsys):
    path = write_rows(tmp_path / "rude.jsonl", rows_of())
    other = write_rows(
        tmp_path / "long.jsonl",
        [
            row | {"is_response_0_safe": i % 2 == 0, "is_response_1_safe": True, "safer_response_id": 1}
            for i, row in enumerate(rows_of())
        ],
    )
    flags = ["--smoke", "--preferences", f"{path},{other}", "--threshold", "0,0", "--out", str(tmp_path / "out")]
    assert s.main(flags) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {"cost_rude", "cost_long", "unsafe_rude", "kl"} <= result["means"]["ppo_lag"].keys()
    assert "what of" in capsys.readouterr().out


def test_saved_stages_are_used_again_and_not_mixed_up(tmp_path, capsys):
    flags = ["--smoke", "--out", str(tmp_path)]
    assert s.main([*flags, "--method", "shaping", "--nu", "0.5"]) == 0
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    assert set(stamps) == {"sft.pt", "scores_1.pt", "shaping-0.5.pt"}
    assert s.main([*flags, "--method", "gate"]) == 0
    assert s.main([*flags, "--method", "shaping", "--nu", "0.5", "--threshold", "1"]) == 0  # not of shaping
    assert stamps == {name: (tmp_path / name).stat().st_mtime_ns for name in stamps}
    capsys.readouterr()
    assert s.main([*flags, "--method", "gate", "--seed", "1"]) == 2
    assert "saved with another config: seed was 0, is 1" in capsys.readouterr().err
    content = torch.load(tmp_path / "sft.pt", weights_only=True)
    torch.save(content | {"config": content["config"] | {"gone": 3}}, tmp_path / "sft.pt")  # another version's flag
    assert s.main([*flags, "--method", "gate"]) == 2
    assert "gone was 3, is None" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sft.pt", "scores_1.pt", "ppo_lag.pt"])
def test_a_file_that_lacks_what_a_stage_holds_is_named(tmp_path, capsys, name):
    flags, path = ["--smoke", "--method", "ppo_lag", "--out", str(tmp_path)], tmp_path / name
    assert s.main(flags) == 0
    whole = torch.load(path, weights_only=True)
    forged = [{"config": whole["config"]}, {"config": None}, [torch.zeros(1)]]
    forged += [whole | {key: [] if key == "models" else {}} for key in whole.keys() & {"policy", "models", "optimizer"}]
    for content in forged:
        torch.save(content, path)
        capsys.readouterr()
        assert s.main(flags) == 2
        error = capsys.readouterr().err
        assert f"{name}: is no file of this script" in error and len(error.splitlines()) == 1, error


def test_other_rows_under_the_same_name_or_another_are_refused(tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", rows_of())
    flags = ["--smoke", "--method", "sft", "--threshold", "0", "--out", str(tmp_path / "out"), "--preferences"]
    assert s.main([*flags, path]) == 0
    write_rows(tmp_path / "rows.jsonl", rows_of(41))  # with a new word
    capsys.readouterr()
    assert s.main([*flags, path]) == 2
    error = capsys.readouterr().err
    assert "sft.pt: made from other rows than --preferences" in error and "change --out" in error, error
    assert s.main([*flags, write_rows(tmp_path / "more.jsonl", rows_of(42))]) == 2
    assert "saved with another config: preferences was" in capsys.readouterr().err


def test_an_unfinished_run_begun_again_is_said(tmp_path, saved):
    lab, said = new_lab(tmp_path, saved), []
    run = s.Run(lab, lab.config, "x")
    run.log(run.update())
    run.save()
    s.Run(lab, lab.config, "x").go(lambda line, **_: said.append(line))
    assert "x.pt: begun again, its 1 updates dropped; --resume would go on" in said[0] and len(said) > 1


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"hidden_size": None}, "hidden_size = None: must be above 0, and counts whole"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers = 2.5: must"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0.*must"),
        ({"vocab_size": "50", "num_hidden_layers": -1}, "vocab_size = '50', num_hidden_layers = -1: must"),
        ({"num_key_value_heads": 3}, "4 heads: must be a multiple of those of keys, 3"),
        ({"rope_scaling": ROPE}, "original_max_position_embeddings = None: must"),
        ({"rope_scaling": "yarn"}, "rope type 'yarn', must be default or llama3"),
        ({"rope_theta": "10000"}, "rope_theta = '10000': must"),
    ],
)
def test_sizes_of_a_folder_that_are_no_numbers_are_named(tmp_path, changes, words):
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(sizes | changes))
    with pytest.raises(s.UserError, match=f"{tmp_path.name}: .*{words}"):
        s.read_llama(str(tmp_path))


def test_a_run_is_stopped_and_resumed_from_the_command_line(tmp_path, monkeypatch):
    flags = ["--smoke", "--method", "ppo_lag", "--out"]
    assert s.main([*flags, str(tmp_path / "whole")]) == 0
    update = s.Run.update

    def stopping(run):
        if run.step == 2:
            raise KeyboardInterrupt
        return update(run)

    monkeypatch.setattr(s.Run, "update", stopping)
    assert s.main([*flags, str(tmp_path / "half")]) == 130
    monkeypatch.undo()
    assert s.main([*flags, str(tmp_path / "half"), "--resume"]) == 0
    whole, half = ((tmp_path / out / "metrics.jsonl").read_text() for out in ("whole", "half"))
    assert half == whole and len(whole.splitlines()) == 4


def test_a_run_that_diverges_says_so(tmp_path, saved):
    lab = new_lab(tmp_path, saved)
    run = s.Run(lab, lab.config, "x")
    run.critics[0].score.weight.data[:] = 1e30
    with pytest.raises(FloatingPointError, match=r"x diverged at update 1.*no checkpoint yet; lower --lr or"):
        run.update()


def test_a_score_model_that_diverges_says_so():
    model = types.SimpleNamespace(parameters=lambda: [torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(FloatingPointError, match=r"training the thing diverged at step 1, loss nan; lower"):
        s.train_model(model, 3, 1e-3, "thing", lambda: torch.tensor(math.nan))


# ----- The program that measures the claims ---------------------------------------------------------------------------


@pytest.fixture
def program(monkeypatch):
    """tests/claims/safe_rlhf_claims.py with short lists."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "claims"))
    module = importlib.import_module("safe_rlhf_claims")
    monkeypatch.setattr(module, "NUS", (1.0,))
    monkeypatch.setattr(module, "NORMALISED", (1.0,))
    monkeypatch.setattr(module, "THRESHOLDS", ("0",))
    monkeypatch.setattr(module, "SHARES", (1.0,))
    monkeypatch.setattr(s, "plot_runs", lambda *_: None)  # seconds for a picture that no table shows
    return module


def test_the_claims_program_runs_in_pieces_and_keeps_what_is_done(tmp_path, monkeypatch, capsys, program):
    monkeypatch.chdir(tmp_path)
    program.main(["--smoke", "--parts", "models", "frontier"])
    assert not (tmp_path / "out" / "claims" / "safe_rlhf_claims.json").exists()
    kept = tmp_path / "out" / "claims" / "smoke" / "safe_rlhf_1" / "ppo_lag.json"
    stamp = kept.stat().st_mtime_ns
    capsys.readouterr()
    program.main(["--smoke"])
    assert kept.stat().st_mtime_ns == stamp
    result = json.loads((tmp_path / "out" / "claims" / "safe_rlhf_claims.json").read_text("utf-8"))
    assert program.table(result) in capsys.readouterr().out
    assert {"command", "seeds", "claims", "versions", "script_sha256"} <= result.keys() and len(result["runs"]) == 2
    files = [kept.parent.with_name(f"safe_rlhf_{seed}") / kept.name for seed in result["seeds"]]
    run = [json.loads(file.read_text("utf-8"))["means"]["helpfulness"] for file in files]
    shown = result["claims"]["answers"]["ppo_lag"]["helpfulness"]
    assert shown["mean"] == pytest.approx(sum(run) / 2, rel=1e-4) and shown["each"] == pytest.approx(run, rel=1e-4)


def test_intervals_are_students(program):
    shown = program.over([1.0, 2.0, 4.0])
    assert shown["mean"] == pytest.approx(7 / 3)
    assert shown["half"] == pytest.approx(4.303 * np.std([1, 2, 4], ddof=1) / math.sqrt(3))
