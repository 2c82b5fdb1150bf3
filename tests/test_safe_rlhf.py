"""safe_rlhf.py: each formula against slow loops or worked examples, then runs as a user's."""

import copy
import dataclasses
import importlib
import inspect
import itertools
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import constrained_ppo
import safe_rlhf as s
from tests._helpers import close

pytestmark = pytest.mark.usefixtures("one_thread")


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def ragged_mask(B, T):
    lengths = torch.randint(1, T + 1, (B,))
    return (torch.arange(T) < lengths[:, None]).double()


def tiny(folder, **changes):
    return s.Config(**s.SMOKE | {"method": "ppo_lag", "out": str(folder)} | changes)


@pytest.fixture(scope="module")
def world():
    """The lab of the invented world; tests must not change it."""
    return s.Lab(tiny("nowhere"))


# ----- The formulas -------------------------------------------------------------------------------


@pytest.mark.parametrize("options,weight", [((), 0.001), ((0.3,), 0.3)])
def test_losses_of_reward_and_cost_by_hand(options, weight):
    """The better or unsafer answer scores higher; a cost has its sign."""
    low, high = doubles(6), doubles(6)
    p, q = torch.tensor([[-1, -1, 1, -1, 1, -1], [1, -1, 1, 1, 1, -1]]).double()
    pairs = -(high - low).sigmoid().log().mean() + weight * torch.cat([low**2, high**2]).mean()
    alone = -((p * low).sigmoid().log() + (q * high).sigmoid().log()).mean()
    close(s.reward_loss(high, low, *options), pairs)
    close(s.cost_loss(low, high, p, q, *options), pairs + alone)


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
        assert multiplier.update(costs) == multiplier.value == pytest.approx(math.exp(log))


def test_the_lagrangians_advantage():
    reward, cost = doubles(3, 4), doubles(2, 3, 4)
    close(s.lagrangian_advantage(reward, cost[0], 0.7), (reward - 0.7 * cost[0]) / 1.7)
    both = s.lagrangian_advantage(reward, cost, torch.tensor([0.7, 2.0]))
    close(both, (reward - 0.7 * cost[0] - 2 * cost[1]) / 3.7, 1e-6)
    close(s.lagrangian_advantage(reward, cost[0], 0.0), reward)


def test_shaped_rewards_by_loops_and_the_kl_counts_once_whatever_lambda_is():
    scores, logp, reference, mask = 3 * doubles(5), doubles(5, 6), doubles(5, 6), ragged_mask(5, 6)
    scores[0] = 70.0
    for sign, clamp in itertools.product((-1, 1), (50.0, 0.4)):
        ours = s.shaped_rewards(scores, logp, reference, mask, 0.3, sign, clamp)
        for b, t in itertools.product(range(5), range(6)):
            truth = sign * 0.3 * (logp[b, t] - reference[b, t]).item()
            if t == int(mask[b].sum()) - 1:
                truth += scores[b].item()
            truth = min(max(truth, -clamp), clamp) * mask[b, t].item()
            assert ours[b, t].item() == pytest.approx(truth)
    pair = [s.shaped_rewards(0 * scores, logp, reference, mask, 0.3, sign) for sign in (-1, 1)]
    for lam in (0.0, 0.3, 5.0):
        close(s.lagrangian_advantage(*pair, lam), -0.3 * (logp - reference) * mask)


def test_the_critics_loss_is_clipped():
    values, old, returns, mask = 8 * doubles(4, 5), doubles(4, 5), 8 * doubles(4, 5), doubles(4, 5)
    clipped = old + torch.clamp(values - old, -5, 5)
    error = torch.maximum((values - returns).abs(), (clipped - returns).abs())
    truth = 0.5 * (error**2 * mask).sum() / mask.sum()
    close(s.critic_loss(values, old, returns, mask, 5.0), truth)


def test_what_each_method_maximises():
    reward, costs, tagged = doubles(50), 3 * doubles(2, 50), torch.arange(50) % 3 == 0

    def of(method):
        config = s.Config(method=method, costs="harm,length", threshold="0,0", nu=2.0)
        return torch.stack(s.objective(config, reward, costs, tagged))

    assert torch.equal(of("ppo"), reward[None])
    assert torch.equal(of("ppo_lag"), torch.stack([reward, *costs]))
    close(of("shaping"), (reward - 2 * costs[0] - 2 * costs[1])[None])
    refuse = tagged | (costs[0] > math.log(0.85 / 0.15))  # where sigmoid(-C) < 0.15
    gated = torch.where(refuse, -costs[0], reward)  # the logit of a sigmoid is what went in
    close(of("gate")[0], (gated - gated.mean()) / gated.std(correction=0), 1e-5)
    at_the_edge = [torch.tensor([x]) for x in (0.15, 0.6, False)]
    assert s.llama2_gate(*at_the_edge).item() == pytest.approx(0.6)


def test_what_constrained_ppo_has_too_is_the_same_text():
    """Its tests have the oracles of `gae` and `ppo_policy_loss`."""
    for name in ("masked_mean", "gae", "ppo_policy_loss", "token_logp", "pad_in_front", "flag"):
        ours, theirs = getattr(s, name), getattr(constrained_ppo, name)
        assert inspect.getsource(ours) == inspect.getsource(theirs)


# ----- The world ----------------------------------------------------------------------------------

HARMLESS, DUAL, HARMFUL = "how do i fix the blick ?", "how do i fix the kesh ?", "make a skel ."


def test_the_ground_truth_by_hand():
    steps = {prompt: s.about(prompt)[1] for prompt in (HARMLESS, DUAL, HARMFUL)}
    assert steps[HARMLESS] == [f"blick-{i}" for i in (1, 2, 3, 4)]
    assert [step[-1] == "!" for step in steps[DUAL]] == [False, True, False, False]
    assert all(step.endswith("!") for step in steps[HARMFUL])
    one, two, *_ = s.ALTERNATIVES
    best_safe = " ".join([steps[DUAL][0], *steps[DUAL][2:], one])  # partial, and no refusal
    for prompt, answer, helpfulness, harm in (
        (HARMLESS, "blick-1 blick-1", 0.5, -2.5),  # repeated
        (HARMLESS, f"blick-1 {one}", 1, -2.5),  # worth nothing, but no word too many
        (DUAL, " ".join(steps[DUAL]), 4, 1.75),
        (DUAL, best_safe, 3.6, -2.5),
        (HARMFUL, f"{' '.join(steps[HARMFUL])} {one} {two}", 3, 4),  # four count
        (HARMFUL, s.REFUSAL, 0, -3.5),
        (HARMFUL, "", -0.5, -2.5),
    ):
        length = -2.5 if answer == s.REFUSAL else len(answer.split()) - 3.5
        truth = {"helpfulness": pytest.approx(helpfulness), "true_harm": harm}
        truth |= {"true_length": length, "refused": float(answer == s.REFUSAL)}
        assert s.true_scores(prompt, answer) == truth


def test_prompts_are_split_without_overlap_and_of_all_kinds_alike(world):
    """Or an evaluated mean cost would not be the one that the multiplier holds."""
    parts = [world.train, world.held, world.disguised]
    assert len(set().union(*parts)) == sum(map(len, parts)) == 18 * 24 + 12 * 32
    kinds = [s.about(prompt)[0] for prompt in world.held]
    assert max(map(kinds.count, s.THINGS)) - min(map(kinds.count, s.THINGS)) <= 1
    assert {s.about(prompt)[0] for prompt in world.disguised} == {"dual-use", "harmful"}
    assert not {prompt for prompt, _ in world.shown} & {*world.held}
    assert {s.about(prompt)[0] for prompt, _ in world.harmless} == {"harmless"}
    unsafe = [s.true_scores(*pair)["true_harm"] > 0 for pair in world.shown if "prug" in pair[0]]
    assert 0.5 < sum(unsafe) / len(unsafe) < 0.8  # half of them, and more where disguised


def test_labels_follow_bradley_and_terry(tmp_path):
    r, pair = random.Random(0), (s.ALTERNATIVES[0], "skel-1! skel-2!")
    rows = [s.label(HARMFUL, *pair, "harm", r) for _ in range(4000)]
    one, two = (s.true_scores(HARMFUL, answer) for answer in pair)
    gain = s.SURENESS * (two["helpfulness"] - one["helpfulness"])
    log_odds = torch.tensor([-one["true_harm"], -two["true_harm"], gain])
    flags = torch.tensor([list(row.values())[3:6] for row in rows]).float()
    close(flags.mean(0), log_odds.sigmoid(), 0.03)
    same = [row["safer_response_id"] for row, (p, q, _) in zip(rows, flags, strict=True) if p == q]
    assert sum(same) / len(same) == pytest.approx(1 / (1 + math.exp(5)), abs=0.05)
    for row, read in zip(rows, s.read_rows(write_rows(tmp_path / "rows", rows)), strict=True):
        found = [read["prompt"], *read["answers"], *read["safe"], read["better"], read["safer"]]
        assert found == list(row.values())


# ----- The models ---------------------------------------------------------------------------------


def moved(model):
    """The model, its weights away from 0, so that nothing hides by being small."""
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def alone(model, ids):
    """What the model gives for one row without padding, (L, ...)."""
    return model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[0][0]


def test_answers_in_a_batch_have_the_log_probabilities_and_scores_of_each_by_itself(world):
    """Neither padding, nor later tokens, nor what follows the end change anything."""
    policy, scorer = moved(copy.deepcopy(world.policy)), moved(s.new_scorer(world, ""))
    prompts = ["dax", *world.train[:15], *world.disguised[:8]]
    rollout = s.write_answers(world, policy, prompts, torch.Generator().manual_seed(3))
    close(s.token_logp(policy, rollout) * rollout.mask, rollout.logp, 1e-5)
    tokens = torch.where(rollout.mask.bool(), rollout.tokens, 7)
    changed = dataclasses.replace(rollout, tokens=tokens)
    values, scores = s.outputs(scorer, changed)[..., 0], s.score(scorer, changed)
    lengths = rollout.mask.sum(1).int().tolist()
    assert min(lengths) < max(lengths) == world.config.answer
    for b, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
        ids = world.tokenizer.encode(f"{prompt} ASSISTANT:")
        answer, P = rollout.tokens[b, :n].tolist(), len(ids)
        assert 0 not in answer[:-1] and (answer[-1] == 0 or n == world.config.answer)
        logp = alone(policy, ids + answer).log_softmax(-1)[P - 1 : -1]
        close(rollout.logp[b, :n], logp[torch.arange(n), answer], 1e-4)
        truth = alone(scorer, ids + answer)[:, 0]
        close(values[b, :n], truth[P - 1 : -1], 1e-4)
        close(scores[b], truth[-1], 1e-4)


def test_draws_follow_the_distribution(world):
    policy, ids = moved(copy.deepcopy(world.policy)), world.tokenizer.encode("dax ASSISTANT:")
    policy.head.weight.data *= 3
    generator = torch.Generator().manual_seed(3)
    first = s.write_answers(world, policy, ["dax"] * 4000, generator).tokens[:, 0]
    truth = alone(policy, ids)[-1].softmax(0)
    assert truth.max() > 0.2
    close(torch.bincount(first, minlength=len(truth)) / 4000, truth, 0.03)


def test_texts_are_encoded_in_the_template(world):
    batch = s.as_batch(world, [(HARMLESS, "sorry"), (DUAL + " blick", "blick-1 blick-2")])
    ids = [*batch.prompts[0][batch.valid[0]].tolist(), *batch.tokens[0].tolist()]
    assert world.tokenizer.decode(ids) == f"{HARMLESS} ASSISTANT: sorry"
    assert batch.mask.tolist() == [[1, 1, 0], [1, 1, 1]] and batch.tokens[0, 1] == 0


# ----- Runs ---------------------------------------------------------------------------------------


def new_lab(folder, **changes):
    """A lab with a policy and score models that have hardly learned."""
    lab = s.Lab(tiny(folder, **changes))
    lab.policy.requires_grad_(False)
    torch.manual_seed(1)
    for name in ("reward", *(f"cost_{cost}" for cost in lab.costs)):
        lab.scorers[name] = s.new_scorer(lab, "")
    return lab


def equal(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_resuming_goes_on_bit_for_bit(tmp_path, monkeypatch):
    lab = new_lab(tmp_path, updates=4, eval_every=2)
    frozen = copy.deepcopy([lab.policy, *lab.scorers.values()])
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
    assert all(map(equal, [lab.policy, *lab.scorers.values()], frozen))
    assert not any(map(equal, whole.nets, frozen))


@pytest.mark.parametrize("ptx", [0.0, 3.0])
def test_an_update_by_hand(tmp_path, monkeypatch, ptx):
    """Each signal has its own scores, critic and sign of the KL; lambda moves before the policy."""
    lab, losses = new_lab(tmp_path, ptx=ptx, beta=0.5), []
    nets = copy.deepcopy([lab.policy, *lab.scorers.values()])
    for parameter in nets[0].parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # so that there is a KL
    run = s.Run(lab, lab.config, "x", nets, [1.0] * 3)
    run.multipliers.append(s.LagrangeMultiplier(lr=0.1, threshold=-2.0))
    monkeypatch.setattr(s, "descend", lambda run, each, steps: losses.extend(each) or 0.0)
    row = s.update(run)
    generator, (policy, *critics) = torch.Generator().manual_seed(0), nets
    prompts = s.draw(lab.train, 8, generator)
    rollout = s.write_answers(lab, policy, prompts, generator)
    R, C = (s.score(model, rollout)[:, None] for model in lab.scorers.values())
    lam = math.exp(0.1 * (C.mean() + 2))
    assert row["lambda_harm"] == pytest.approx(lam, rel=1e-5)
    assert row["batch_reward"] == pytest.approx(R.mean().item())
    logp, mask = s.token_logp(policy, rollout), rollout.mask
    kl = 0.5 * (logp - s.token_logp(lab.policy, rollout)).detach() * mask
    assert kl.abs().max() > 0.01
    last = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))
    values = torch.stack([s.outputs(critic, rollout)[..., 0] for critic in critics], -1)
    rewards = torch.stack([last * R - kl, last * C + kl], -1)
    A, returns = s.gae(rewards, values.detach(), mask, 1.0, 0.95)
    weights = mask / mask.sum(1, keepdim=True) / len(mask)  # within an answer, then over answers
    advantage = (A[..., 0] - lam * A[..., 1]) / (1 + lam)
    loss = -((logp - logp.detach()).exp() * advantage * weights).sum()
    if ptx:  # averaged with the cross-entropy of demonstrations
        shown = s.as_batch(lab, s.draw(lab.harmless, 8, generator))
        logits, used = s.outputs(policy, shown), shown.mask.bool()
        loss = (loss + ptx * F.cross_entropy(logits[used], shown.tokens[used])) / 2
    ours, truth = (torch.autograd.grad(x, [*policy.parameters()]) for x in (losses[0], loss))
    for pair in zip(ours, truth, strict=True):
        close(*pair, 1e-5)
    for i in range(2):
        error = (values[..., i] - returns[..., i]) ** 2
        close(losses[1 + i], 0.5 * (error * weights).sum(), 1e-5)


@pytest.mark.parametrize(
    "method,seed", [("ppo", 0), ("ppo_lag", 0), ("ppo_lag", 1), ("ppo_lag", 2)]
)
def test_ppo_learns_a_reward_and_the_lagrangian_holds_a_cost(tmp_path, monkeypatch, method, seed):
    """Reward and cost are both the share of words from the front half: only lambda stops it.

    Without a KL penalty the share would swing around the threshold, as it should.
    """
    options = {"lr": 1e-2, "critic_lr": 3e-3, "ptx": 0.0, "beta": 0.1, "threshold": "0.5"}
    options |= {"answer": 4, "batch": 64, "updates": 50, "lagrange_lr": 0.5, "eval_every": 50}
    lab = new_lab(tmp_path, **options, method=method, seed=seed)

    def share(model, rollout):
        front = rollout.tokens < len(lab.tokenizer.words) // 2
        return (front * rollout.mask).sum(1) / rollout.mask.sum(1)

    monkeypatch.setattr(s, "score", share)
    costs = [row["batch_cost_harm"] for row in s.ppo(lab, lab.config, method).rows]
    if method == "ppo":
        assert sum(costs[-10:]) / 10 > 0.9
    else:
        assert abs(sum(costs[-20:]) / 20 - 0.5) < 0.05


def test_score_models_learn_and_the_cost_model_knows_its_zero(tmp_path):
    """The better answer has more words; unsafe ones begin with a dangerous step."""
    lab = s.Lab(tiny(tmp_path, d_model=32, score_steps=100, batch=128))
    prompts = [p for p in lab.train + lab.held if s.about(p)[0] == "harmful"] * 4
    r = random.Random(0)
    for prompt in prompts:
        one, two = r.sample([*s.about(prompt)[1], *s.ALTERNATIVES], 2)
        safe = ["!" not in one, "!" not in two]
        row = {"prompt": prompt, "answers": [one, f"{two} {r.choice(s.ALTERNATIVES)}"]}
        row |= {"safe": safe, "better": 1, "safer": int(safe[1] and not safe[0])}
        lab.rows["harm"].append(row)
    found = s.learn_score(lab, 1) | s.learn_score(lab, 1, "harm")
    assert found["reward_pairs"] > 0.95 and found["cost_harm_signs"] > 0.9
    assert found["cost_harm_pairs"] > 0.7
    for row in lab.rows["harm"]:
        row["safe"] = [True, True]
    with pytest.raises(ValueError, match="one safety label"):  # C would have no zero
        s.learn_score(lab, 1, "harm")


def test_red_teaming_keeps_what_the_truth_calls_harmful_and_never_runs_out(tmp_path, monkeypatch):
    def judged(lab, policy, prompts, seed):
        return [{"prompt": p, "true_harm": 1.0 if "rules" in p else -1.0} for p in prompts]

    lab = s.Lab(tiny(tmp_path))
    monkeypatch.setattr(s, "evaluate", judged)
    lab.found, share = s.red_team(lab, 0)
    assert share == len(lab.found) / (len(lab.disguised) // 3) > 0
    assert all("rules" in prompt for prompt in lab.found)
    assert not {*lab.found} & {*s.red_team(lab, 0)[0]}
    lab.found = lab.disguised
    assert s.red_team(lab, 0) == ([], 0.0)


def test_rounds_of_two_costs_find_prompts_and_are_taken_again(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # no picture: seconds less
    options = {"costs": "harm,length", "threshold": "-2,0", "pairs": 120, "updates": 2, "batch": 64}
    config = tiny(tmp_path, rounds=2, method="ppo,ppo_lag", **options)
    result = s.train(config)
    first, second = result["rounds"]
    assert second["found"] > 0 == first["found"]
    assert set(result["means"]) == {"sft", "ppo", "ppo_lag", "ppo_lag-2"}
    assert {"cost_length_pairs", "cost_length_signs"} <= result["accuracy"].keys()
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"lambda_harm", "lambda_length", "cost_length", "unsafe_length"} <= row.keys()
    files = [tmp_path / f"preferences_{name}_2.jsonl" for name in ("harm", "length")]
    harm, length = (s.read_rows(file) for file in files)
    for key in ("prompt", "answers", "better"):
        assert [row[key] for row in harm] == [row[key] for row in length]
    assert [row["safe"] for row in harm] != [row["safe"] for row in length]
    disguised = {row["prompt"] for row in harm} & {*s.world()[2]}
    share = sum(row["prompt"] in disguised for row in harm) / len(harm)
    assert 0.6 < share < 0.8  # half, and of PPO's
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    again = s.train(dataclasses.replace(config, resume=True))
    assert again["means"] == result["means"] and again["rounds"] == result["rounds"]
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}


def test_a_smoke_run_writes_its_files_and_its_stages_are_not_mixed_up(tmp_path, capsys):
    flags, out = ["--smoke", "--out", str(tmp_path)], tmp_path / "smoke"
    assert s.main([*flags, "--method", "shaping", "--nu", "0.5"]) == 0
    stages = {"sft.pt", "reward_1.pt", "cost_harm_1.pt", "shaping-0.5.pt"}
    files = {"preferences_harm_1.jsonl", "metrics.jsonl", "result.json", "runs.png"}
    assert {path.name for path in out.iterdir()} == stages | files
    stamps = {name: (out / name).stat().st_mtime_ns for name in stages}
    assert s.main([*flags, "--method", "sft,gate", "--resume"]) == 0
    assert stamps == {name: (out / name).stat().st_mtime_ns for name in stages}
    result = json.loads((out / "result.json").read_text())
    assert {"helpfulness", "reward", "cost_harm"} <= result["means"]["gate"].keys()
    for row in result["answers"]["sft"]:
        assert s.true_scores(row["prompt"], row["answer"]).items() <= row.items()
        assert row["unsafe_harm"] == (row["true_harm"] > 0) and abs(row["kl"]) < 1e-4
    capsys.readouterr()
    assert s.main([*flags, "--method", "gate", "--resume", "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "'seed': 0" in error and "--out" in error


# ----- Bad input ----------------------------------------------------------------------------------


POLICY = ["--policy", "x", "--preferences", "no.jsonl"]
ROW = ("what of it ?", "it is good", "it is bad", True, False, 1, 0)


@pytest.mark.parametrize("flags,word", [
    (["--method", "best"], "'best'"), (["--costs", "charm"], "charm"),
    (["--threshold", "0,1"], "one --threshold each"), (["--threshold", "x"], "'x'"),
    (POLICY[2:], "go together"), (["--cost-model", "x"], "go together"),
    ([*POLICY, "--rounds", "2"], "--rounds"), ([*POLICY, "--method", "gate"], "--method gate"),
    (["--device", "cuda:99"], "safe_rlhf.py"),
])  # fmt: skip
def test_bad_flags_exit_2_with_one_line(tmp_path, capsys, flags, word):
    assert s.main([*flags, "--smoke", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert word in error and len(error.splitlines()) == 1, error


@pytest.mark.parametrize("rate", ["--sft-lr", "--score-lr", "--lr", "--critic-lr"])
def test_divergence_is_one_line(tmp_path, capsys, rate):
    assert s.main(["--smoke", "--method", "ppo", "--out", str(tmp_path), rate, "1e30"]) == 1
    error = capsys.readouterr().err
    assert "diverged" in error and "lower its" in error and len(error.splitlines()) == 1


def write_rows(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize("change", [
    {"safer_response_id": None}, {"safer_response_id": -1}, {"better_response_id": 2},
    {"is_response_0_safe": "yes"}, {"response_1": None}, "not json", "[1]",
    {"is_response_1_safe": False, "safer_response_id": 1},  # safer, but labelled unsafe
    {"response_1": " it is  good "},  # the same answer
])  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line(tmp_path, change):
    rows = [dict(zip(s.FIELDS, ROW, strict=True)) for _ in range(8)]
    rows[6] = change if isinstance(change, str) else rows[6] | change
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 7"):
        s.read_rows(write_rows(tmp_path / "rows.jsonl", rows))


# ----- The program that measures the claims -------------------------------------------------------


def test_the_claims_program_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "claims"))
    program = importlib.import_module("safe_claims")
    a, b, c = ({"unsafe_harm": x, "helpfulness": y} for x, y in ((0, 1), (1, 0), (1, 2)))
    found = program.win_rates([a, b, c], [b, b, a])
    assert found["safe -> unsafe"] == found["unsafe -> safe"] == (1, 1.0)
    assert found["safe -> safe"] == (0, None) and found["unsafe -> unsafe"] == (1, 0.5)
    interval = 4.303 * (7 / 3) ** 0.5 / math.sqrt(3)
    assert program.over([1.0, 2.0, 4.0])["half"] == pytest.approx(interval)
    monkeypatch.chdir(tmp_path)
    few = {name: program.RUNS[name] for name in ("ppo_lag", "nu 1")}
    monkeypatch.setattr(program, "RUNS", few)
    monkeypatch.setitem(s.SMOKE, "batch", 64)  # fewer, larger batches are quicker
    monkeypatch.setattr(s, "report", lambda *_: None)
    program.main(["--smoke", "--parts", "pairs_alone", "sweep"])
    path = tmp_path / "out" / "claims" / "safe_rlhf_claims.json"
    kept = path.parent / "safe_rlhf" / "smoke" / "seed_1" / "ppo_lag.json"
    stamp = kept.stat().st_mtime_ns
    assert not path.exists()
    program.main(["--smoke"])
    assert kept.stat().st_mtime_ns == stamp
    result = json.loads(path.read_text("utf-8"))
    assert path.with_suffix(".png").exists()
    assert program.table(result) in capsys.readouterr().out
    first = json.loads(kept.read_text("utf-8"))["means"]["helpfulness"]
    shown = result["claims"]["answers"]["ppo_lag"]["helpfulness"]["each"]
    assert len(shown) == 2 and shown[0] == pytest.approx(first, rel=1e-4)
