"""safe_rlhf.py against transformers' Llama, tokenizers, and maximum likelihood by SciPy."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.signal import lfilter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import safe_rlhf as s
from tests._helpers import close, sentences

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
SIZES = {
    "plain": {},
    "grouped queries, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama 3's positions": {"num_key_value_heads": 2, "rope_parameters": LLAMA3, "rms_norm_eps": 1e-2},
}
BASE = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 160, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def their_llama(kind=LlamaForCausalLM, **sizes):
    """Theirs, every parameter moved away from its start, attention as they wrote it out."""
    model = kind(LlamaConfig(**BASE | sizes, attn_implementation="eager")).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_logits_and_gradients_are_transformers(tmp_path, sizes):
    theirs = their_llama(**sizes)
    theirs.save_pretrained(tmp_path)
    ours = s.read_llama(str(tmp_path))
    tokens = torch.randint(1, 61, (3, 40))  # 0 is padding, whose embedding theirs never trains
    truth = theirs(tokens).logits
    close(ours(tokens), truth, 2e-4)
    truth.logsumexp(-1).sum().backward()
    ours(tokens).logsumexp(-1).sum().backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert wanted.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        close(parameter.grad, wanted[name], 2e-3)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_padded_answers_have_transformers_log_probabilities(tmp_path, sizes):
    theirs = their_llama(**sizes)
    theirs.save_pretrained(tmp_path)
    ours = s.read_llama(str(tmp_path))
    prompts = [torch.randint(3, 61, (n,)).tolist() for n in (3, 30, 1, 6)]
    rollout = s.write_answers(ours, prompts, 2, 12, torch.Generator().manual_seed(1))
    for b, prompt in enumerate(prompts):
        n = int(rollout.mask[b].sum())
        whole = torch.tensor([prompt + rollout.tokens[b, :n].tolist()])
        logp = theirs(whole).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        close(rollout.logp[b, :n], logp.gather(-1, whole[0, len(prompt) :, None])[:, 0], 2e-4)


@pytest.mark.parametrize("official", [False, True])
def test_scores_are_those_of_their_sequence_classifier(tmp_path, official):
    """Also under the official code's names: a head with a bias, and a normaliser's buffers."""
    theirs = their_llama(LlamaForSequenceClassification, num_labels=1)
    theirs.save_pretrained(tmp_path)
    bias = 0.0
    if official:
        (tmp_path / "model.safetensors").unlink()
        tensors = {k.replace("score.", "score_head."): v for k, v in theirs.state_dict().items()}
        bias = 0.7
        tensors |= {"score_head.bias": torch.tensor([bias]), "normalizer.mean": torch.zeros(1)}
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    ours = s.read_llama(str(tmp_path), scores=True)
    rows = [torch.randint(3, 61, (n,)).tolist() for n in (5, 12, 9)]
    prompts, valid = s.pad_in_front([row[:3] for row in rows])
    tokens, mask = (x.flip(1) for x in s.pad_in_front([row[3:][::-1] for row in rows]))
    scores = ours.score_of(s.Rollout(prompts, valid, tokens, mask.float()))
    for score, row in zip(scores, rows, strict=True):
        close(score, theirs(torch.tensor([row])).logits[0, 0] + bias, 2e-4)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', must be 'silu'"),
        ({"model_type": "gpt2"}, "model_type = 'gpt2', must be 'llama'"),
        ({"head_dim": 8}, "head_dim = 8, must be 6"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn', must be default or llama3"),
        ({"intermediate_size": 48}, "the weights do not fit config.json"),
        ({"num_hidden_layers": 3}, r"model.layers.2.input_layernorm.weight is missing"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path, changes, words):
    their_llama().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(ValueError, match=words):
        s.read_llama(str(tmp_path))


# ----- Formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.97, 0.8), (1.0, 1.0)])
def test_gae_is_scipys_filter_run_backwards(gamma, lam):
    r = np.random.default_rng(0)
    rewards, values = r.standard_normal((2, 6, 9))
    lengths = r.integers(1, 10, 6)
    mask = (np.arange(9) < lengths[:, None]).astype(float)
    ours, returns = s.gae(*(torch.tensor(x) for x in (rewards, values, mask)), gamma, lam)
    for b, n in enumerate(lengths):
        deltas = rewards[b, :n] + gamma * np.append(values[b, 1:n], 0.0) - values[b, :n]
        truth = lfilter([1.0], [1.0, -gamma * lam], deltas[::-1])[::-1]
        close(ours[b, :n], torch.tensor(truth.copy()))
        close(returns[b, :n], torch.tensor(truth + values[b, :n]))


def test_losses_are_the_likelihoods_of_bradley_and_terry():
    """By SciPy's expit in place of a log-sigmoid, each term written out."""
    from scipy.special import expit

    r = np.random.default_rng(0)
    safer, unsafer = r.standard_normal((2, 20))
    signs = np.where(r.random((2, 20)) < 0.5, 1.0, -1.0)
    likelihood = np.log(expit(unsafer - safer)) + np.log(expit(signs[0] * safer)) + np.log(expit(signs[1] * unsafer))
    truth = -likelihood.mean() + 0.001 * np.mean([safer**2, unsafer**2])
    close(s.cost_loss(*(torch.tensor(x) for x in (safer, unsafer, *signs))), torch.tensor(truth))


def games_of(strengths, count, seed):
    """Games between players of these Elo strengths, a tenth of them drawn."""
    r, games = np.random.default_rng(seed), []
    for _ in range(count):
        i, j = r.choice(len(strengths), 2, replace=False)
        p = 1 / (1 + 10 ** ((strengths[j] - strengths[i]) / 400))
        games.append((int(i), int(j), 0.5 if r.random() < 0.1 else float(r.random() < p)))
    return games


@pytest.mark.parametrize("draws", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("strengths", [(1000, 1100, 900, 1250), (1000, 1000), (1000, 700, 1300)])
def test_elo_is_the_maximum_of_the_likelihood(draws, strengths):
    games, N = games_of(strengths, 300, 1), len(strengths)

    def negative(x):
        ratings = np.concatenate([[0.0], x])
        log_p = lambda i, j: -math.log1p(math.exp(ratings[j] - ratings[i]))  # noqa: E731
        total = sum(score * log_p(i, j) + (1 - score) * log_p(j, i) for i, j, score in games)
        return -total - draws / 2 * sum(log_p(i, j) for i in range(N) for j in range(N) if i != j)

    best = minimize(negative, np.zeros(N - 1), method="BFGS", options={"gtol": 1e-9})
    truth = 1000 + 400 / math.log(10) * np.concatenate([[0.0], best.x])
    ratings, low, high = s.elo(games, draws=draws)
    np.testing.assert_allclose(ratings, truth, atol=1e-2)
    assert (low <= ratings + 1e-9).all() and (ratings <= high + 1e-9).all()


def test_elos_intervals_cover_as_often_as_they_say():
    """Of the difference of two players in 200 repetitions: 95 %, within what 200 draws of it allow."""
    covered = 0
    for seed in range(200):
        _, low, high = s.elo(games_of((1000, 1120), 80, seed), draws=0.0, seed=seed)
        truth = 1000 + 400 * math.log10((0.9 * 0.66609 + 0.05) / (1 - 0.9 * 0.66609 - 0.05))  # draws count half
        covered += low[1] <= truth <= high[1]
    assert 0.89 <= covered / 200 <= 0.99


# ----- A user's own folders -------------------------------------------------------------------------------------------


def save_tokenizer(folder):
    """A byte-level BPE that puts a beginning in front, as Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([sentences(seed) for seed in range(3)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def test_a_whole_run_from_llama_folders_and_rows(tmp_path, capsys):
    for name, kind in (("policy", LlamaForCausalLM), ("reward", LlamaForSequenceClassification), ("cost", None)):
        (tmp_path / name).mkdir()
        options = {"num_labels": 1} if name != "policy" else {}
        model = their_llama(kind or LlamaForSequenceClassification, vocab_size=300, **options)
        model.save_pretrained(tmp_path / name)
    tokenizer = save_tokenizer(tmp_path / "policy")
    rows = [
        {
            "prompt": f"naïve question {i} 日本 ?", "response_0": f"yes, {i}", "response_1": f"no, {i} no",
            "is_response_0_safe": True, "is_response_1_safe": i % 2 == 0, "better_response_id": 1,
            "safer_response_id": 0,
        }
        for i in range(30)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    folders = {flag: str(tmp_path / flag.split("-")[0]) for flag in ("policy", "reward-model", "cost-model")}
    flags = [word for flag, folder in folders.items() for word in (f"--{flag}", folder)]
    flags += ["--smoke", "--preferences", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]
    assert s.main(flags) == 0, capsys.readouterr().err
    scores = torch.load(tmp_path / "out" / "scores_1.pt", weights_only=True)["models"]
    kept = s.read_llama(str(tmp_path / "reward"), scores=True).state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in scores[0].items())  # not trained
    text = s.TEMPLATE.format(rows[3]["prompt"])
    lab = s.Experiment(
        s.Config(**s.SMOKE, policy=folders["policy"], preferences=str(tmp_path / "rows.jsonl")), torch.device("cpu")
    )
    head, answer = lab.encode(rows[3]["prompt"], "yes, 3")
    assert head == tokenizer.encode(text).ids and head[0] == 1
    assert (
        head + answer == [*tokenizer.encode(text + "yes, 3").ids, 2] and lab.tokenizer.decode(answer[:-1]) == "yes, 3"
    )


def test_folders_of_other_vocabularies_are_refused(tmp_path, capsys):
    for name, size in (("policy", 300), ("reward", 299)):
        (tmp_path / name).mkdir()
        kind = LlamaForCausalLM if name == "policy" else LlamaForSequenceClassification
        their_llama(kind, vocab_size=size, num_labels=1).save_pretrained(tmp_path / name)
    save_tokenizer(tmp_path / "policy")
    flags = ["--smoke", "--policy", str(tmp_path / "policy"), "--reward-model", str(tmp_path / "reward")]
    assert s.main([*flags, "--out", str(tmp_path / "out")]) == 2
    assert "299 tokens, must be the policy's 300" in capsys.readouterr().err
