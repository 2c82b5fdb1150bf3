"""safe_rlhf.py against transformers' Llama, SciPy, and maximum likelihood by SciPy."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.signal import lfilter
from scipy.special import expit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import safe_rlhf as s
from tests._helpers import close, sentences

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = {
    "vocab_size": 300, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 160,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SCORER = "AutoModelForSequenceClassification"


def save_llama(folder, kind=LlamaForCausalLM, **changes):
    """Theirs, every parameter moved away from its start, and a byte-level BPE with a <s>."""
    model = kind(LlamaConfig(**BASE | changes)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([sentences(seed) for seed in range(3)], trainer)
    start = [("<s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=start)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1, "tie_word_embeddings": True}])
def test_padded_answers_have_transformers_log_probabilities(tmp_path, changes):
    """Written with a cache and padding in front; theirs reads each answer by itself."""
    theirs, _ = save_llama(tmp_path, **changes)
    ours, _ = s.read_folder(tmp_path, "AutoModelForCausalLM")
    prompts = [torch.randint(3, 61, (n,)).tolist() for n in (3, 30, 1, 6)]
    rollout = s.write_answers(ours, prompts, 2, 12, torch.Generator().manual_seed(1))
    close((s.token_logp(ours, rollout) * rollout.mask).detach(), rollout.logp, 2e-4)
    for b, prompt in enumerate(prompts):
        n = int(rollout.mask[b].sum())
        whole = torch.tensor([prompt + rollout.tokens[b, :n].tolist()])
        logp = theirs(whole).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        close(rollout.logp[b, :n], logp.gather(-1, whole[0, len(prompt) :, None])[:, 0], 2e-4)


def test_scores_are_those_of_their_sequence_classifier(tmp_path):
    theirs, _ = save_llama(tmp_path, LlamaForSequenceClassification, num_labels=1)
    ours, _ = s.read_folder(tmp_path, SCORER)
    rows = [torch.randint(3, 61, (n,)).tolist() for n in (5, 12, 9)]
    prompts, valid = s.pad_in_front([row[:3] for row in rows])
    tokens, mask = (x.flip(1) for x in s.pad_in_front([row[3:][::-1] for row in rows]))
    scores = s.score(ours, s.Rollout(prompts, valid, tokens, mask.float()))
    for score, row in zip(scores, rows, strict=True):
        close(score, theirs(torch.tensor([row])).logits[0, 0], 2e-4)


def test_a_score_head_that_is_missing_is_refused_and_a_new_one_is_asked_for(tmp_path):
    theirs, _ = save_llama(tmp_path)
    with pytest.raises(ValueError, match=r"weights do not fit.*score\.weight"):
        s.read_folder(tmp_path, SCORER)
    ours, _ = s.read_folder(tmp_path, SCORER, new_head=True)
    body = theirs.model.state_dict()
    found = ours.inner.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in body.items())


def test_weights_that_are_missing_are_refused(tmp_path):
    save_llama(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"weights do not fit.*layers\.2\."):
        s.read_folder(tmp_path, "AutoModelForCausalLM")


# ----- Formulas -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.97, 0.8), (1.0, 1.0)])
def test_gae_is_scipys_filter_run_backwards(gamma, lam):
    r = np.random.default_rng(0)
    rewards, values = r.standard_normal((2, 6, 9, 1))
    lengths = r.integers(1, 10, 6)
    mask = (np.arange(9) < lengths[:, None]).astype(float)
    ours, returns = s.gae(*(torch.tensor(x) for x in (rewards, values, mask)), gamma, lam)
    for b, n in enumerate(lengths):
        following = np.append(values[b, 1:n, 0], 0.0)
        deltas = rewards[b, :n, 0] + gamma * following - values[b, :n, 0]
        truth = lfilter([1.0], [1.0, -gamma * lam], deltas[::-1])[::-1]
        close(ours[b, :n, 0], torch.tensor(truth.copy()))
        close(returns[b, :n, 0], torch.tensor(truth + values[b, :n, 0]))


def test_losses_are_the_likelihoods_of_bradley_and_terry():
    """By SciPy's expit in place of a log-sigmoid, each term written out."""
    r = np.random.default_rng(0)
    safer, unsafer = r.standard_normal((2, 20))
    signs = np.where(r.random((2, 20)) < 0.5, 1.0, -1.0)
    likelihood = np.log(expit(unsafer - safer))
    likelihood += np.log(expit(signs[0] * safer)) + np.log(expit(signs[1] * unsafer))
    truth = -likelihood.mean() + 0.001 * np.mean([safer**2, unsafer**2])
    ours = s.cost_loss(*(torch.tensor(x) for x in (safer, unsafer, *signs)))
    close(ours, torch.tensor(truth))


# ----- A user's own folders -----------------------------------------------------------------------


def write_rows(path):
    rows = []
    for i in range(30):
        values = (f"naïve question {i} 日本 ?", f"yes, {i}", f"no, {i} no", True, i % 2 == 0, 1, 0)
        rows.append(dict(zip(s.FIELDS, values, strict=True)))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def test_a_whole_run_from_llama_folders_and_rows(tmp_path, capsys):
    flags = ["--smoke", "--preferences", write_rows(tmp_path / "rows.jsonl")]
    for name in ("policy", "reward", "cost"):
        kind = LlamaForCausalLM if name == "policy" else LlamaForSequenceClassification
        changes = {} if name == "policy" else {"num_labels": 1}
        _, tokenizer = save_llama(tmp_path / name, kind, **changes)
        flags += [f"--{name}" if name == "policy" else f"--{name}-model", str(tmp_path / name)]
    flags += ["--out", str(tmp_path / "out"), "--threshold", "0", "--lr", "1e-3"]
    assert s.main(flags) == 0, capsys.readouterr().err
    out = tmp_path / "out" / "smoke"
    assert {path.name for path in out.glob("*.pt")} == {"ppo.pt", "ppo_lag.pt"}  # no SFT, no scores
    again, _ = s.read_folder(out / "ppo_lag", "AutoModelForCausalLM")  # save_pretrained's
    first, _ = s.read_folder(tmp_path / "policy", "AutoModelForCausalLM")
    trained = torch.load(out / "ppo_lag.pt", weights_only=True)["nets"]
    for name, value in again.inner.state_dict().items():
        close(value, trained[f"0.inner.{name}"])
    assert not torch.equal(again.inner.lm_head.weight, first.inner.lm_head.weight)
    config = s.Config(policy=str(tmp_path / "policy"), preferences=flags[2], threshold="0")
    lab = s.Lab(config)
    prompt, answer = lab.encode("naïve question 3 日本 ?", "yes, 3")
    text = lab.template.format("naïve question 3 日本 ?")
    assert prompt == tokenizer.encode(text).ids and prompt[0] == 1
    assert prompt + answer == [*tokenizer.encode(text + "yes, 3").ids, 2]
    assert lab.tokenizer.decode(answer, skip_special_tokens=True) == "yes, 3"


def test_score_models_of_other_vocabularies_are_refused(tmp_path, capsys):
    save_llama(tmp_path / "policy")
    changes = {"num_labels": 1, "vocab_size": 301}
    save_llama(tmp_path / "reward", LlamaForSequenceClassification, **changes)
    flags = ["--smoke", "--policy", str(tmp_path / "policy"), "--threshold", "0"]
    flags += ["--reward-model", str(tmp_path / "reward"), "--out", str(tmp_path / "out")]
    assert s.main([*flags, "--preferences", write_rows(tmp_path / "rows.jsonl")]) == 2
    assert "301 tokens, not 300" in capsys.readouterr().err


# ----- Elo, which the program on the claims has ---------------------------------------------------


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "claims"))
    return importlib.import_module("safe_claims")


@pytest.mark.parametrize("draws", [0.0, 0.1, 2.0])
def test_elo_is_the_maximum_of_the_likelihood(claims, draws):
    r, games, strengths = np.random.default_rng(1), [], (1000, 1100, 900, 1250)
    N = len(strengths)
    for _ in range(300):
        i, j = r.choice(N, 2, replace=False)
        p = 1 / (1 + 10 ** ((strengths[j] - strengths[i]) / 400))
        games.append((int(i), int(j), 0.5 if r.random() < 0.1 else float(r.random() < p)))

    def negative(x):
        ratings = np.concatenate([[0.0], x])

        def log_p(i, j):
            return -math.log1p(math.exp(ratings[j] - ratings[i]))

        total = sum(score * log_p(i, j) + (1 - score) * log_p(j, i) for i, j, score in games)
        virtual = sum(log_p(i, j) for i in range(N) for j in range(N) if i != j)
        return -total - draws / 2 * virtual

    best = minimize(negative, np.zeros(N - 1), method="BFGS", options={"gtol": 1e-9})
    truth = 1000 + 400 / math.log(10) * np.concatenate([[0.0], best.x])
    ratings, low, high = claims.elo(games, draws=draws)
    np.testing.assert_allclose(ratings, truth, atol=1e-2)
    assert (low <= ratings + 1e-9).all() and (ratings <= high + 1e-9).all()
