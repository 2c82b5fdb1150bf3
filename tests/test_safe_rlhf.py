"""safe_rlhf.py: each formula against slow loops or worked examples, then runs as a user's."""

import copy
import dataclasses
import importlib
import inspect
import itertools
import json
import math
import random
import statistics
from pathlib import Path

import pytest
import torch

import constrained_ppo
import safe_rlhf as s
from tests._helpers import close

pytestmark = pytest.mark.usefixtures("one_thread")


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def ragged_mask(B, T):
    lengths = torch.randint(1, T + 1, (B,))
    return (torch.arange(T) < lengths[:, None]).double()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def tiny(tmp_path, **changes):
    return s.Config(**s.SMOKE | {"method": "ppo_lag", "out": str(tmp_path)} | changes)


# ----- The formulas -------------------------------------------------------------------------------


def test_reward_loss_by_hand():
    better, worse = doubles(6), doubles(6)
    pairs = list(zip(better.tolist(), worse.tolist(), strict=True))
    truth = sum(-math.log(sigmoid(a - b)) for a, b in pairs) / 6
    squares = sum(a * a + b * b for a, b in pairs) / 12
    close(s.reward_loss(better, worse), number(truth + 0.001 * squares))
    close(s.reward_loss(better, worse, 0.3), number(truth + 0.3 * squares))


def test_cost_loss_by_hand():
    safer, unsafer = doubles(6), doubles(6)
    signs = torch.tensor([[-1, -1, 1, -1, 1, -1], [1, -1, 1, 1, 1, -1]]).double()
    truth, squares = 0.0, 0.0
    for a, b, p, q in zip(*(x.tolist() for x in (safer, unsafer, *signs)), strict=True):
        truth -= math.log(sigmoid(b - a)) + math.log(sigmoid(p * a)) + math.log(sigmoid(q * b))
        squares += a * a + b * b
    close(s.cost_loss(safer, unsafer, *signs), number(truth / 6 + 0.001 * squares / 12))
    close(s.cost_loss(safer, unsafer, *signs, 0.2), number(truth / 6 + 0.2 * squares / 12))


def test_a_sign_fixes_the_zero_and_a_sign_of_0_leaves_it_free():
    for sign, shifted in ((1.0, False), (0.0, True)):
        scores = torch.tensor([5.0, 6.0], dtype=torch.float64, requires_grad=True)
        for _ in range(300):
            loss = s.cost_loss(scores[:1], scores[1:], number([-sign]), number([sign]), 0.0)
            scores.data -= torch.autograd.grad(loss, scores)[0]
        assert scores[1] > scores[0] + 2
        assert (scores[0].item() > 0) == shifted and scores[1] > 0


@pytest.mark.parametrize("lr,most,window", [(0.1, 5, 128), (0.5, 2, 3), (0.1, 5, 1), (0.0, 5, 7)])
def test_lambda_moves_in_log_space_by_the_mean_of_the_last_costs(lr, most, window):
    r, seen, log = random.Random(0), [], math.log(0.7)
    multiplier = s.LagrangeMultiplier(0.7, lr, most, threshold=-0.4, window=window)
    for _ in range(40):
        costs = [r.gauss(0.3, 2) for _ in range(5)]
        seen += costs
        recent = seen[-window:]
        log += lr * math.exp(log) * (sum(recent) / len(recent) + 0.4)
        log = min(log, math.log(most))
        assert multiplier.update(number(costs)) == pytest.approx(math.exp(log))
        assert multiplier.value == pytest.approx(math.exp(log)) and multiplier.value <= most * 1.01


def test_lambda_rises_above_the_threshold_fades_below_and_stops_at_its_maximum():
    above, below = s.LagrangeMultiplier(), s.LagrangeMultiplier()
    for _ in range(200):
        before = above.value, below.value
        above.update([1.0])
        below.update([-1.0])
        assert above.value >= before[0] and 0 < below.value < before[1]
    assert above.value == pytest.approx(5.0) and below.value < 0.06


@pytest.mark.parametrize("options", [{"initial": 0}, {"initial": 6}, {"window": 0}, {"lr": -1}])
def test_a_bad_multiplier_is_refused(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        s.LagrangeMultiplier(**options)


def test_lambda_refuses_costs_that_are_not_finite():
    multiplier = s.LagrangeMultiplier()
    with pytest.raises(ValueError, match="must be finite"):
        multiplier.update([0.0, math.nan])
    assert multiplier.value == 1.0 and not multiplier.costs


def test_the_lagrangians_advantage():
    reward, cost = doubles(3, 4), doubles(2, 3, 4)
    one = s.lagrangian_advantage(reward, cost[0], 0.7)
    both = s.lagrangian_advantage(reward, cost, torch.tensor([0.7, 2.0]))
    for b, t in itertools.product(range(3), range(4)):
        close(one[b, t], (reward[b, t] - 0.7 * cost[0, b, t]) / 1.7)
        truth = (reward[b, t] - 0.7 * cost[0, b, t] - 2 * cost[1, b, t]) / 3.7
        close(both[b, t], truth, 1e-6)
    close(s.lagrangian_advantage(reward, cost[0], 0.0), reward)
    close(s.lagrangian_advantage(reward, cost[0], 1e12), -cost[0], 1e-9)


def test_shaped_rewards_by_loops():
    B, T, beta = 5, 6, 0.3
    scores, logp, reference, mask = 3 * doubles(B), doubles(B, T), doubles(B, T), ragged_mask(B, T)
    scores[0] = 70.0
    for sign, clamp in itertools.product((-1, 1), (50.0, 0.4)):
        ours = s.shaped_rewards(scores, logp, reference, mask, beta, sign, clamp)
        for b, t in itertools.product(range(B), range(T)):
            truth = sign * beta * (logp[b, t] - reference[b, t]).item()
            if t == int(mask[b].sum()) - 1:
                truth += scores[b].item()
            truth = min(max(truth, -clamp), clamp) * mask[b, t].item()
            assert ours[b, t].item() == pytest.approx(truth)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 5.0])
def test_the_kl_penalty_counts_once_whatever_lambda_is(lam):
    """Of scores of 0 the Lagrangian's advantage is that of -beta KL alone."""
    logp, reference, mask = doubles(4, 5), doubles(4, 5), ragged_mask(4, 5)
    none = torch.zeros(4, dtype=torch.float64)
    pair = [s.shaped_rewards(none, logp, reference, mask, 0.2, sign) for sign in (-1, 1)]
    tokens = torch.stack([*pair, -0.2 * (logp - reference) * mask], -1)
    reward, cost, truth = s.gae(tokens, 0 * tokens, mask, 1.0, 0.95)[0].unbind(-1)
    close(s.lagrangian_advantage(reward, cost, lam), truth)


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.0)])
def test_gae_is_the_double_sum_over_each_answer(gamma, lam):
    B, T, H = 4, 6, 2
    rewards, values, mask = doubles(B, T, H), doubles(B, T, H), ragged_mask(B, T)
    advantages, returns = s.gae(rewards, values, mask, gamma, lam)
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        n, truth = int(mask[b].sum()), 0.0
        for k in range(t, n):
            following = values[b, k + 1, h].item() if k + 1 < n else 0.0
            delta = (rewards[b, k, h] + gamma * following - values[b, k, h]).item()
            truth += (gamma * lam) ** (k - t) * delta
        close(advantages[b, t, h], number(truth))
        close(returns[b, t, h], number(truth + (values[b, t, h].item() if t < n else 0.0)))


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
    weights = mask / mask.sum(1, keepdim=True)
    close(s.ppo_policy_loss(logp, old, advantages, weights, clip), number(policy))
    close(s.critic_loss(values, before, returns, weights, 5.0), number(critic))


def test_values_clipped_past_their_return_teach_nothing():
    values, goal = torch.tensor([[9.0, 0.5]], requires_grad=True), torch.full((1, 2), 20.0)
    s.critic_loss(values, torch.zeros(1, 2), goal, torch.ones(1, 2), 5.0).backward()
    assert values.grad[0, 0] == 0 and values.grad[0, 1] < 0


def test_llama_2s_gate():
    safety, helpful = torch.tensor([0.9, 0.9, 0.1, 0.15]), torch.tensor([0.3, 0.4, 0.5, 0.6])
    tagged = torch.tensor([False, True, False, False])
    close(s.llama2_gate(safety, helpful, tagged), torch.tensor([0.3, 0.9, 0.1, 0.6]))
    close(s.llama2_gate(safety, helpful, tagged, 0.0), torch.tensor([0.3, 0.9, 0.5, 0.6]))


def test_what_each_method_maximises():
    reward, costs, tagged = doubles(50), 3 * doubles(2, 50), torch.arange(50) % 3 == 0

    def of(method):
        config = s.Config(method=method, costs="harm,length", threshold="0,0", nu=2.0)
        return s.objective(config, reward, costs, tagged)

    (ppo,) = of("ppo")
    assert torch.equal(ppo, reward)
    assert torch.equal(torch.stack(of("ppo_lag")), torch.stack([reward, *costs]))
    close(of("shaping")[0], reward - 2 * costs[0] - 2 * costs[1])
    gated = []  # sigmoid(-C) < 0.15 is C > 1.735, and the logit of a sigmoid is what went in
    for r, c, tag in zip(reward.tolist(), costs[0].tolist(), tagged.tolist(), strict=True):
        gated.append(-c if tag or c > 1.7346 else r)
    gated = number(gated)
    close(of("gate")[0], (gated - gated.mean()) / gated.std(correction=0), 1e-5)


# ----- The world ----------------------------------------------------------------------------------

HARMLESS, DUAL, HARMFUL = "how do i fix the blick ?", "how do i fix the kesh ?", "make a skel ."


def test_the_ground_truth_by_hand():
    steps = {prompt: s.about(prompt)[1] for prompt in (HARMLESS, DUAL, HARMFUL)}
    assert steps[HARMLESS] == [f"blick-{i}" for i in (1, 2, 3, 4)]
    assert [step[-1] == "!" for step in steps[DUAL]] == [False, True, False, False]
    assert all(step.endswith("!") for step in steps[HARMFUL])
    one, two, *_ = s.ALTERNATIVES
    for prompt, answer, helpfulness, harm in (
        (HARMLESS, " ".join(steps[HARMLESS]), 4, -2.5),
        (HARMLESS, "blick-1 blick-1", 0.5, -2.5),  # repeated
        (HARMLESS, f"blick-1 {one}", 1, -2.5),  # worth nothing, but no word too many
        (DUAL, " ".join(steps[DUAL]), 4, 1.75),
        (DUAL, " ".join(steps[DUAL][2:]), 2, -2.5),
        (HARMFUL, " ".join(steps[HARMFUL]), 4, 4),
        (HARMFUL, f"{one} {two}", 1.2, -2.5),
        (HARMFUL, f"{' '.join(steps[HARMFUL])} {one} {two}", 3, 4),  # four count
        (HARMFUL, s.REFUSAL, 0, -3.5),
        (HARMFUL, "", -0.5, -2.5),
    ):
        scores = s.true_scores(prompt, answer)
        assert (scores["helpfulness"], scores["true_harm"]) == (pytest.approx(helpfulness), harm)
        length = -2.5 if answer == s.REFUSAL else len(answer.split()) - 3.5
        assert scores["true_length"] == length


def test_the_best_safe_answer_to_dual_use_is_partial_and_no_refusal():
    safe = [step for step in s.about(DUAL)[1] if not step.endswith("!")]
    scores = s.true_scores(DUAL, " ".join([*safe, s.ALTERNATIVES[0]]))
    assert scores["true_harm"] < 0 and 3 < scores["helpfulness"] < 4


def test_prompts_are_split_without_overlap(tmp_path):
    lab = s.Lab(tiny(tmp_path))
    parts = [lab.train, lab.held, lab.disguised]
    assert len(set().union(*parts)) == sum(map(len, parts)) == 18 * 24 + 12 * 32
    assert {s.about(p)[0] for p in lab.train} == {s.about(p)[0] for p in lab.held} == {*s.THINGS}
    assert {s.about(p)[0] for p in lab.disguised} == {"dual-use", "harmful"}
    shown = {tuple(prompt) for prompt, _ in lab.demonstrations}
    assert not shown & {tuple(lab.encode(prompt)[0]) for prompt in lab.held}


@pytest.mark.parametrize("harmful", [False, True])
def test_demonstrations_are_as_harmful_as_they_say(harmful):
    r = random.Random(0)
    for prompt in (DUAL, HARMFUL):
        answers = [s.demonstration(prompt, harmful, r) for _ in range(300)]
        harm = [s.true_scores(prompt, answer)["true_harm"] > 0 for answer in answers]
        assert any(harm) == harmful and (all(harm) == harmful or prompt == DUAL)


def test_labels_follow_bradley_and_terry(tmp_path):
    r, pair = random.Random(0), (s.ALTERNATIVES[0], "skel-1! skel-2!")
    rows = [s.label(HARMFUL, *pair, "harm", r) for _ in range(4000)]
    one, two = (s.true_scores(HARMFUL, answer) for answer in pair)

    def share(key, at=rows):
        return sum(row[key] for row in at) / len(at)

    better = sigmoid(s.SURENESS * (two["helpfulness"] - one["helpfulness"]))
    assert share("better_response_id") == pytest.approx(better, abs=0.03)
    for i, scores in enumerate((one, two)):
        safe = sigmoid(-scores["true_harm"])
        assert share(f"is_response_{i}_safe") == pytest.approx(safe, abs=0.03)
    same = [row for row in rows if row["is_response_0_safe"] == row["is_response_1_safe"]]
    assert share("safer_response_id", same) == pytest.approx(sigmoid(-5), abs=0.05)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = s.read_rows(tmp_path / "rows.jsonl")  # none breaks the rule on flags
    assert [row | FROM_FILE for row in rows] == [row | FROM_FILE for row in read]
    assert read[7]["where"].endswith("line 8")


FROM_FILE = {"where": "", "safe": []}


# ----- The models ---------------------------------------------------------------------------------


def small(scores=False):
    model = s.Decoder(23, 40, s.Config(d_model=12), scores)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def alone(model, prompt, answer):
    """What the model gives for one row without padding, (L, ...)."""
    tokens = torch.tensor([prompt + answer])
    return model(tokens, torch.ones_like(tokens, dtype=torch.bool))[0][0]


def written(policy, limit=9, count=24):
    prompts = [torch.randint(1, 23, (n % 5 + 1,)).tolist() for n in range(count)]
    generator = torch.Generator().manual_seed(3)
    return prompts, s.write_answers(policy, prompts, 0, limit, generator)


def test_a_future_token_changes_nothing_before_it():
    model, tokens = small(), torch.randint(1, 23, (2, 8))
    valid = torch.ones_like(tokens, dtype=torch.bool)
    before = model(tokens, valid)[0]
    tokens[:, 5] = (tokens[:, 5] + 1) % 23
    after = model(tokens, valid)[0]
    close(after[:, :5], before[:, :5], 1e-6)
    assert (after[:, 5] - before[:, 5]).abs().max() > 0.01


def test_written_log_probabilities_are_those_of_each_answer_by_itself():
    """Padding in front changes nothing, and PPO's first ratio is 1."""
    policy, ends = small(), 0
    prompts, rollout = written(policy)
    close(s.token_logp(policy, rollout) * rollout.mask, rollout.logp, 1e-5)
    for b, prompt in enumerate(prompts):
        n = int(rollout.mask[b].sum())
        answer = rollout.tokens[b, :n].tolist()
        assert 0 not in answer[:-1] and (answer[-1] == 0 or n == 9)
        ends += answer[-1] == 0
        logp = alone(policy, prompt, answer).log_softmax(-1)
        for t in range(n):
            close(rollout.logp[b, t], logp[len(prompt) + t - 1, answer[t]], 1e-4)
    assert ends


def test_scores_are_those_at_the_last_token_of_each_answer_by_itself():
    scorer = small(scores=True)
    prompts, rollout = written(small())
    values = s.outputs(scorer, rollout)
    for b, prompt in enumerate(prompts):
        n = int(rollout.mask[b].sum())
        truth = alone(scorer, prompt, rollout.tokens[b, :n].tolist())
        close(s.score(scorer, rollout)[b], truth[-1, 0], 1e-4)
        close(values[b, :n], truth[len(prompt) - 1 : -1], 1e-4)


def test_what_follows_the_end_never_matters():
    policy, scorer = small(), small(scores=True)
    _, rollout = written(policy, 12)
    assert (rollout.mask.sum(1) < rollout.tokens.shape[1]).any()
    tokens = torch.where(rollout.mask.bool(), rollout.tokens, 7)
    changed = dataclasses.replace(rollout, tokens=tokens)
    logps = [s.token_logp(policy, x) * x.mask for x in (changed, rollout)]
    close(*logps, 1e-6)
    close(s.score(scorer, changed), s.score(scorer, rollout), 1e-6)


def test_draws_follow_the_distribution():
    policy, generator = small(), torch.Generator().manual_seed(0)
    rollout = s.write_answers(policy, [[3, 5]] * 4000, 0, 1, generator)
    counts = torch.bincount(rollout.tokens[:, 0], minlength=23) / 4000
    close(counts, alone(policy, [3], [5])[-1].softmax(0), 0.04)


def test_words_are_encoded_in_the_template(tmp_path):
    lab = s.Lab(tiny(tmp_path))
    prompt, answer = lab.encode(HARMLESS, "sorry")
    assert lab.tokenizer.decode(prompt + answer) == f"{HARMLESS} ASSISTANT: sorry"
    assert answer[-1] == lab.tokenizer.eos_token_id not in prompt + answer[:-1]


# ----- Runs ---------------------------------------------------------------------------------------


def new_lab(tmp_path, **changes):
    """A lab with a policy and score models that have hardly learned."""
    lab = s.Lab(tiny(tmp_path, **changes))
    lab.policy.requires_grad_(False)
    torch.manual_seed(1)
    models = [s.new_scorer(lab, "").requires_grad_(False) for _ in range(3)]
    lab.reward, *lab.costs = models[: 1 + len(lab.config.cost_names)]
    return lab


def equal(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("method", s.METHODS[1:])
def test_resuming_goes_on_bit_for_bit(tmp_path, method, monkeypatch):
    lab = new_lab(tmp_path, updates=4, eval_every=2, method=method)
    whole = s.ppo(lab, lab.config, "whole")
    original = s.update

    def stopping(run):
        if len(run.rows) == 3:
            raise KeyboardInterrupt
        return original(run)

    monkeypatch.setattr(s, "update", stopping)
    with pytest.raises(KeyboardInterrupt):
        s.ppo(lab, lab.config, "half")
    monkeypatch.undo()
    again = s.ppo(lab, dataclasses.replace(lab.config, resume=True), "half")
    assert [row | {"run": "whole"} for row in again.rows] == whole.rows and len(whole.rows) == 4
    assert equal(again.nets, whole.nets)
    assert [vars(m) for m in again.multipliers] == [vars(m) for m in whole.multipliers]


def test_an_update_changes_what_it_should(tmp_path):
    lab = new_lab(tmp_path, updates=1, threshold="-2", lagrange_lr=0.1)
    frozen = [lab.policy, lab.reward, *lab.costs]
    before = copy.deepcopy(frozen)
    run = s.ppo(lab, lab.config, "x")
    assert all(equal(*pair) for pair in zip(frozen, before, strict=True))
    assert len(run.nets) == 3 and not any(map(equal, run.nets, before))
    row = run.rows[0]  # raw costs; lambda moves before the policy
    rate = lab.config.lagrange_lr * lab.config.lagrange_initial
    lam = lab.config.lagrange_initial * math.exp(rate * (row["batch_harm"] + 2))
    assert row["lambda_harm"] == pytest.approx(lam, rel=1e-5)


def test_advantages_and_returns_are_each_signals_own(tmp_path, monkeypatch):
    """Reward and cost: their own scores, critics and signs of the KL, to the first policy."""
    lab, calls, shaped = new_lab(tmp_path, updates=2), [], []
    gae, shaped_rewards = s.gae, s.shaped_rewards
    monkeypatch.setattr(s, "gae", lambda *args: calls.append(args) or gae(*args))
    kept = monkeypatch.setattr
    kept(s, "shaped_rewards", lambda *args: shaped.append(args) or shaped_rewards(*args))
    run = s.ppo(lab, lab.config, "x")
    assert [args[5] for args in shaped] == [-1, 1] * 2 and len(calls) == 2
    assert shaped[0][0].mean().item() == pytest.approx(run.rows[0]["batch_reward"])
    assert shaped[1][0].mean().item() == pytest.approx(run.rows[0]["batch_harm"])
    values = calls[0][1]
    assert not torch.equal(values[..., 0], values[..., 1])
    for at, same in ((0, True), (2, False)):
        _, logp, reference, mask, *_ = shaped[at]
        assert (((logp - reference) * mask).abs().max() < 1e-5) == same


@pytest.mark.parametrize("ptx", [0.0, 3.0])
def test_ppos_gradient_is_averaged_with_that_of_the_demonstrations(tmp_path, monkeypatch, ptx):
    lab = new_lab(tmp_path, ptx=ptx, method="ppo")
    rates, rollouts, advantages = [1.0, 1.0], [], []
    nets = [copy.deepcopy(net) for net in (lab.policy, lab.reward)]
    run = s.Run(lab, lab.config, "x", nets, rates, 0.0)
    write, gae = lab.write, s.gae
    lab.write = lambda *args: rollouts.append(write(*args)) or rollouts[-1]
    monkeypatch.setattr(s, "gae", lambda *args: advantages.append(gae(*args)) or advantages[-1])
    monkeypatch.setattr(s, "clip_grad_norm_", lambda parameters, norm: torch.zeros(()))
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    states, draw = [], s.draw
    monkeypatch.setattr(
        s, "draw", lambda rows, *args: states.append(draw(rows, *args)) or states[-1]
    )
    s.update(run)
    policy, rollout, A = run.nets[0], rollouts[0], advantages[0][0][..., 0]
    logp = s.token_logp(policy, rollout)
    weights = rollout.mask / rollout.mask.sum(1, keepdim=True)
    loss = -((logp - logp.detach()).exp() * A * weights).sum() / len(A)
    if ptx:
        shown = lab.rollout(states[1])
        logits, used = s.outputs(policy, shown), shown.mask.bool()
        entropy = torch.nn.functional.cross_entropy(logits[used], shown.tokens[used])
        loss = (loss + ptx * entropy) / 2
    for parameter, truth in zip(
        policy.parameters(), torch.autograd.grad(loss, [*policy.parameters()]), strict=True
    ):
        close(parameter.grad, truth, 1e-5)


def test_ppo_learns_a_reward_and_the_lagrangian_holds_a_cost(tmp_path, monkeypatch):
    """Reward and cost are both the share of words from the front half: only lambda stops it.

    Without a KL penalty the share would swing around the threshold, as it should.
    """
    options = {"lr": 1e-2, "critic_lr": 3e-3, "ptx": 0.0, "beta": 0.1, "threshold": "0.5"}
    options |= {"answer": 4, "batch": 64, "updates": 50, "lagrange_lr": 0.5, "eval_every": 50}
    for method, seeds in (("ppo", [0]), ("ppo_lag", [0, 1, 2])):
        for seed in seeds:
            folder = tmp_path / f"{method}{seed}"
            folder.mkdir()
            lab = new_lab(folder, **options, method=method, seed=seed, lagrange_initial=1.0)
            middle = len(lab.tokenizer.words) // 2

            def share(model, rollout, middle=middle):
                return ((rollout.tokens < middle) * rollout.mask).sum(1) / rollout.mask.sum(1)

            monkeypatch.setattr(s, "score", share)
            costs = [row["batch_harm"] for row in s.ppo(lab, lab.config, method).rows]
            if method == "ppo":
                assert sum(costs[-10:]) / 10 > 0.9
            else:
                assert abs(sum(costs[-20:]) / 20 - 0.5) < 0.05


@pytest.mark.parametrize(
    "name", ["masked_mean", "gae", "ppo_policy_loss", "token_logp", "pad_in_front", "flag"]
)
def test_what_constrained_ppo_has_too_is_the_same_text(name):
    ours, theirs = (inspect.getsource(getattr(script, name)) for script in (s, constrained_ppo))
    assert ours == theirs


def test_held_out_prompts_are_of_all_kinds_alike():
    """Or an evaluated mean cost would not be the one that the multiplier holds."""
    plain, held, disguised = s.world()
    kinds = [s.about(prompt)[0] for prompt in held]
    assert max(map(kinds.count, s.THINGS)) - min(map(kinds.count, s.THINGS)) <= 1
    assert len({*held}) == len(held) == math.ceil(len(plain) / 5) and {*held} <= {*plain}
    assert not {*plain} & {*disguised}


def test_two_costs_by_the_same_code(tmp_path):
    config = tiny(tmp_path, costs="harm,length", threshold="-2,0", method="", updates=2)
    result = s.train(config)
    row = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert {"lambda_harm", "lambda_length", "cost_length", "unsafe_length"} <= row.keys()
    assert {"cost_length_pairs", "cost_length_signs"} <= result["accuracy"].keys()
    files = [tmp_path / f"preferences_{name}_1.jsonl" for name in ("harm", "length")]
    harm, length = (s.read_rows(file) for file in files)
    for key in ("response_0", "response_1", "better_response_id"):
        assert [row[key] for row in harm] == [row[key] for row in length]
    assert [row["safe"] for row in harm] != [row["safe"] for row in length]


def test_red_teaming_keeps_what_the_truth_calls_harmful_and_never_runs_out(tmp_path):
    lab = new_lab(tmp_path)
    harmful = lambda prompt: "dax-1!" if "rules" in prompt else ""  # noqa: E731
    lab.answers = lambda policy, prompts, seed: ([harmful(prompt) for prompt in prompts], [])
    found, share = s.red_team(lab, 0)
    assert found and all("rules" in prompt for prompt in found)
    assert share == len(found) / (len(lab.disguised) // 3)
    lab.found = found
    assert not {*found} & {*s.red_team(lab, 0)[0]}
    lab.found = lab.disguised
    assert s.red_team(lab, 0) == ([], 0.0)


def test_rounds_find_prompts_and_measure_on_them(tmp_path):
    config = tiny(tmp_path, pairs=120, rounds=2, method="", updates=2)
    result = s.train(config)
    first, second = result["rounds"]
    assert second["found"] > 0 == first["found"]
    assert set(result["means"]) == {"sft", "ppo", "ppo_lag", "ppo_lag-2"}
    rows = s.read_rows(tmp_path / "preferences_harm_2.jsonl")
    hidden = set(s.world()[2])
    assert 0.2 < sum(row["prompt"] in hidden for row in rows) / len(rows) < 0.8
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    again = s.train(dataclasses.replace(config, resume=True))
    assert again["rounds"] == result["rounds"]
    assert stamps == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}


def test_score_models_learn_and_the_cost_model_knows_its_zero(tmp_path):
    """The better answer has more words; unsafe ones begin with a dangerous step."""
    lab = s.Lab(tiny(tmp_path, d_model=32, score_steps=150, batch=128))
    prompts = [p for p in lab.train + lab.held if s.about(p)[0] == "harmful"] * 4
    r, rows = random.Random(0), []
    for prompt in prompts:
        one, two = r.sample([*s.about(prompt)[1], *s.ALTERNATIVES], 2)
        safe = ["!" not in one, "!" not in two]
        answers = {"response_0": one, "response_1": f"{two} {r.choice(s.ALTERNATIVES)}"}
        safer = 1 if safe[1] and not safe[0] else 0
        rows.append({"prompt": prompt, "safe": safe, "safer_response_id": safer} | answers)
        rows[-1] |= {"better_response_id": 1, "where": "here"}
    lab.rows = [lab.prepare(rows)]
    found = s.learn_scores(lab, 1, 0, "")[1] | s.learn_scores(lab, 1, 1, "")[1]
    assert found["reward_pairs"] > 0.95 and found["cost_harm_signs"] > 0.9
    assert found["cost_harm_pairs"] > 0.7


# ----- Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--method", "best"], ["'best'", "must be one of", "ppo_lag"]),
        (["--threshold", "0,1"], ["--threshold 0,1", "one for"]),
        (["--threshold", "x"], ["'x'"]),
        (["--costs", "harm,charm"], ["charm", "must be"]),
        (["--costs", "harm,harm"], ["['harm', 'harm']", "of their own"]),
        (["--preferences", "reward.jsonl"], ["['reward']", "other than reward"]),
        (["--cost-model", "a,b"], ["a", "one for"]),
        (["--lagrange-initial", "9"], ["initial=9.0", "maximum"]),
        (["--lr", "-1"], ["--lr -1.0", "must be at least 0"]),
        (["--lr", "nan"], ["--lr nan", "must be at least 0"]),
        (["--updates", "0"], ["--updates 0", "must be at least 1"]),
        (["--preferences", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--preferences", "a.jsonl", "--rounds", "2"], ["--rounds 2", "needs"]),
        (["--preferences", "a.jsonl", "--method", "gate"], ["gate needs the invented world"]),
        (["--method", "sft", "--rounds", "2"], ["--rounds 2", "ppo_lag"]),
        (["--costs", "length", "--rounds", "2"], ["--rounds 2", "harm"]),
        (["--device", "cuda:99"], ["safe_rlhf.py"]),
    ],
)
def test_bad_flags_exit_2_with_one_line(tmp_path, capsys, flags, words):
    assert s.main([*flags, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words) and len(error.splitlines()) == 1, error


def rows_of(count=40):
    """Rows in the data set's schema, with both kinds of label."""
    rows = []
    for i in range(count):
        values = (
            f"what of w{i} ?",
            f"w{i} is good",
            f"w{i} is bad w{i}",
            True,
            i % 3 == 0,
            i % 2,
            0,
        )
        rows.append(dict(zip(s.FIELDS, values, strict=True)))
    return rows


def write_rows(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"safer_response_id": None}, ["safer_response_id is None", "must be 0 or 1"]),
        ({"better_response_id": 2}, ["better_response_id is 2", "must be 0 or 1"]),
        ({"better_response_id": True}, ["better_response_id is True", "must be 0 or 1"]),
        ({"is_response_0_safe": 1}, ["is_response_0_safe is 1", "must be true or false"]),
        ({"response_1": None}, ["response_1 is None", "must be a text"]),
        ({"is_response_1_safe": False, "safer_response_id": 1}, ["labelled unsafe"]),
        ({"response_1": " w6 is  good "}, ["the same"]),
        ("not json", ["Expecting value"]),
        ("[1]", ["line 7"]),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, capsys, change, words):
    rows = rows_of()
    rows[6] = change if isinstance(change, str) else rows[6] | change
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert s.main(["--smoke", "--preferences", path, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in ["rows.jsonl, line 7", *words]), error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "change,words",
    [
        ({"is_response_0_safe": True, "is_response_1_safe": True}, "one safety label"),
        ({"is_response_0_safe": False, "is_response_1_safe": False}, "labelled safe"),
        ({"prompt": "what ?"}, "labelled safe"),
    ],
)
def test_rows_that_cannot_teach_are_refused(tmp_path, capsys, change, words):
    path = write_rows(tmp_path / "r.jsonl", [row | change for row in rows_of()])
    assert s.main(["--smoke", "--preferences", path, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


def test_own_preferences_and_two_files_of_them(tmp_path, capsys):
    other = []
    for i, row in enumerate(rows_of()):
        flags = {"is_response_0_safe": i % 2 == 0, "is_response_1_safe": True}
        other.append(row | flags | {"safer_response_id": 1, "prompt": f"{row['prompt']} again"})
    paths = [write_rows(tmp_path / "rude.jsonl", rows_of())]
    paths.append(write_rows(tmp_path / "long.jsonl", other))
    flags = ["--smoke", "--preferences", ",".join(paths), "--threshold", "0,0"]
    assert s.main([*flags, "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "smoke" / "result.json").read_text())
    row = result["means"]["ppo_lag"]
    assert {"cost_rude", "cost_long", "unsafe_rude", "kl"} <= row.keys()
    assert "helpfulness" not in row and "what of" in capsys.readouterr().out


def test_stages_are_taken_again_and_not_mixed_up(tmp_path, capsys):
    flags, out = ["--smoke", "--out", str(tmp_path)], tmp_path / "smoke"
    assert s.main([*flags, "--method", "shaping", "--nu", "0.5"]) == 0
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*.pt")}
    assert set(stamps) == {"sft.pt", "reward_1.pt", "cost_harm_1.pt", "shaping-0.5.pt"}
    assert s.main([*flags, "--method", "gate", "--resume"]) == 0
    assert stamps == {name: (out / name).stat().st_mtime_ns for name in stamps}
    capsys.readouterr()
    assert s.main([*flags, "--method", "gate", "--resume", "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "seed was 0, is 1" in error and "--out" in error


def test_other_rows_under_the_same_name_are_refused(tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", rows_of())
    flags = ["--smoke", "--method", "sft", "--threshold", "0", "--out", str(tmp_path / "out")]
    flags += ["--preferences", path]
    assert s.main(flags) == 0
    write_rows(tmp_path / "rows.jsonl", rows_of()[::-1])
    assert s.main([*flags, "--resume"]) == 2
    assert "rows of --preferences was" in capsys.readouterr().err


@pytest.mark.parametrize("rate", ["--sft-lr", "--score-lr", "--lr", "--critic-lr"])
def test_divergence_is_one_line(tmp_path, capsys, rate):
    assert s.main(["--smoke", "--out", str(tmp_path), rate, "1e30"]) == 1
    error = capsys.readouterr().err
    assert "diverged" in error and "lower its" in error and len(error.splitlines()) == 1


# ----- The program that measures the claims -------------------------------------------------------


@pytest.fixture
def program(monkeypatch):
    """tests/claims/safe_claims.py with short lists."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "claims"))
    module = importlib.import_module("safe_claims")
    monkeypatch.setattr(module, "NUS", (1.0,))
    monkeypatch.setattr(module, "THRESHOLDS", ("0",))
    monkeypatch.setattr(s, "report", lambda *_: None)  # seconds for a picture that no table shows
    return module


def test_the_claims_program_runs_in_pieces_and_keeps_what_is_done(
    tmp_path, monkeypatch, capsys, program
):
    monkeypatch.chdir(tmp_path)
    program.main(["--smoke", "--parts", "pairs_alone", "frontier"])
    assert not (tmp_path / "out" / "claims" / "safe_rlhf_claims.json").exists()
    kept = tmp_path / "out" / "claims" / "safe_rlhf" / "smoke" / "seed_1" / "ppo_lag.json"
    stamp = kept.stat().st_mtime_ns
    capsys.readouterr()
    program.main(["--smoke"])
    assert kept.stat().st_mtime_ns == stamp
    path = tmp_path / "out" / "claims" / "safe_rlhf_claims.json"
    result = json.loads(path.read_text("utf-8"))
    assert program.table(result) in capsys.readouterr().out
    files = [kept.parent.with_name(f"seed_{seed}") / kept.name for seed in result["seeds"]]
    each = [json.loads(file.read_text("utf-8"))["means"]["helpfulness"] for file in files]
    shown = result["claims"]["answers"]["ppo_lag"]["helpfulness"]
    assert shown["mean"] == pytest.approx(sum(each) / 2, rel=1e-4)
    assert shown["each"] == pytest.approx(each, rel=1e-4)
    assert set(result["claims"]["rounds"]) == {"1", "2", "3"}


def test_intervals_are_students(program):
    shown = program.over([1.0, 2.0, 4.0])
    assert shown["mean"] == pytest.approx(7 / 3)
    deviation = statistics.stdev([1, 2, 4])
    assert shown["half"] == pytest.approx(4.303 * deviation / math.sqrt(3))


def test_win_rates_by_counting(program):
    r, rows = random.Random(0), []
    for _ in range(2):
        rows.append([])
        for _ in range(80):
            row = {"unsafe_harm": r.randint(0, 1), "helpfulness": r.randint(0, 2)}
            rows[-1].append(row)
    found = program.win_rates(*rows)
    for then, now in itertools.product((0, 1), repeat=2):
        wins = []
        for new, old in zip(*rows, strict=True):
            if (old["unsafe_harm"], new["unsafe_harm"]) == (then, now):
                gain = new["helpfulness"] - old["helpfulness"]
                wins.append(1.0 if gain > 0 else 0.5 if gain == 0 else 0.0)
        words = ("safe", "unsafe")
        truth = (len(wins), pytest.approx(sum(wins) / len(wins)))
        assert found[f"{words[then]} -> {words[now]}"] == truth


def test_elo_of_two_is_the_log_odds(program):
    games = [(0, 1, 1.0)] * 30 + [(1, 0, 1.0)] * 60 + [(0, 1, 0.5)] * 10
    ratings, low, high = program.elo(games, draws=0.0)
    truth = 1000 + 400 * math.log10(65 / 35)
    assert ratings[0] == 1000 and ratings[1] == pytest.approx(truth, abs=1e-6)
    assert low[1] < ratings[1] < high[1] and low[0] == high[0] == 1000
    with pytest.raises(ValueError, match="i not j"):
        program.elo([(1, 1, 1.0)])
