"""safe_rlhf.py against transformers' Llama, and Elo against maximum likelihood by SciPy."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
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


def save_llama(folder, kind=LlamaForCausalLM, **changes):
    """Theirs, every parameter moved away from its start, and a byte-level BPE with a <s>."""
    model = kind(LlamaConfig(**BASE | changes)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[*names.values()], **options)
    tokenizer.train_from_iterator([sentences(seed) for seed in range(3)], trainer)
    start = [("<s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=start)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return model, tokenizer


def write_rows(path):
    rows = []
    for i in range(30):
        values = (f"naïve question {i} 日本 ?", f"yes, {i}", f"no, {i} no", True, i % 2 == 0, 1, 0)
        rows.append(dict(zip(s.FIELDS, values, strict=True)))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1, "tie_word_embeddings": True}])
def test_padded_answers_have_transformers_log_probabilities_and_scores(tmp_path, changes):
    """Written with a cache and padding in front; theirs reads each answer by itself."""
    theirs, tokenizer = save_llama(tmp_path / "policy", **changes)
    scorer, _ = save_llama(tmp_path / "cost", LlamaForSequenceClassification, num_labels=1)
    rows = write_rows(tmp_path / "rows.jsonl")
    lab = s.Lab(s.Config(policy=str(tmp_path / "policy"), preferences=rows, answer=12))
    model, prompts = s.new_scorer(lab, str(tmp_path / "cost")), ["a", "what of it ? " * 3, "yes"]
    rollout = s.write_answers(lab, lab.policy, prompts, torch.Generator().manual_seed(1))
    close((s.token_logp(lab.policy, rollout) * rollout.mask).detach(), rollout.logp, 2e-4)
    for b, prompt in enumerate(prompts):
        n, ids = int(rollout.mask[b].sum()), tokenizer.encode(lab.template.format(prompt)).ids
        assert ids == rollout.prompts[b][rollout.valid[b]].tolist() and ids[0] == 1
        whole = torch.tensor([ids + rollout.tokens[b, :n].tolist()])
        logp = theirs(whole).logits.log_softmax(-1)[0, len(ids) - 1 : -1]
        close(rollout.logp[b, :n], logp.gather(-1, whole[0, len(ids) :, None])[:, 0], 2e-4)
        close(s.score(model, rollout)[b], scorer(whole).logits[0, 0], 2e-4)
    answer = s.as_batch(lab, [("naïve", "yes, 3")]).tokens[0].tolist()
    assert lab.tokenizer.decode(answer) == "yes, 3</s>"
    with pytest.raises(ValueError, match="limit is 160"):
        s.write_answers(lab, lab.policy, ["a long question " * 30], None)


def test_a_whole_run_from_llama_folders_and_rows(tmp_path, capsys):
    flags = ["--smoke", "--preferences", write_rows(tmp_path / "rows.jsonl"), "--threshold", "0"]
    for name, flag in (("policy", "--policy"), ("cost", "--cost-model")):
        kind, changes = LlamaForCausalLM, {}
        if name == "cost":
            kind, changes = LlamaForSequenceClassification, {"num_labels": 1}
        save_llama(tmp_path / name, kind, **changes)
        flags += [flag, str(tmp_path / name)]
    flags += ["--out", str(tmp_path / "out"), "--lr", "1e-3"]
    assert s.main(flags) == 0, capsys.readouterr().err
    out = tmp_path / "out" / "smoke"
    stages = {"reward_1.pt", "ppo.pt", "ppo_lag.pt"}  # no SFT, and the cost model is there
    assert {path.name for path in out.glob("*.pt")} == stages
    trained = torch.load(out / "ppo_lag.pt", weights_only=True)["nets"]
    written = LlamaForCausalLM.from_pretrained(out / "ppo_lag")  # by save_pretrained
    for name, value in written.state_dict().items():
        close(value, trained[f"0.inner.{name}"])
    first = LlamaForCausalLM.from_pretrained(tmp_path / "policy")
    assert not torch.equal(written.lm_head.weight, first.lm_head.weight)
    means = json.loads((out / "result.json").read_text())["means"]["ppo_lag"]
    assert {"cost_harm", "unsafe_harm", "kl"} <= means.keys() and "helpfulness" not in means


def test_score_models_of_other_vocabularies_are_refused(tmp_path):
    save_llama(tmp_path / "policy")
    changes = {"num_labels": 1, "vocab_size": 301}
    save_llama(tmp_path / "reward", LlamaForSequenceClassification, **changes)
    rows = write_rows(tmp_path / "rows.jsonl")
    lab = s.Lab(s.Config(policy=str(tmp_path / "policy"), preferences=rows))
    with pytest.raises(ValueError, match="another vocabulary"):
        s.new_scorer(lab, str(tmp_path / "reward"))
    with pytest.raises(ValueError, match=r"lacks weights.*score\.weight"):  # a policy is none
        s.new_scorer(lab, str(tmp_path / "policy"))
    assert s.new_scorer(lab, "").inner.score.weight.shape == (1, BASE["hidden_size"])


@pytest.mark.parametrize("draws", [0.0, 0.1, 2.0])
def test_elo_is_the_maximum_of_the_likelihood(monkeypatch, draws):
    """Elo is in the program on the claims."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "claims"))
    claims = importlib.import_module("safe_claims")
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
    np.testing.assert_allclose(claims.elo(games, draws=draws), truth, atol=1e-2)
