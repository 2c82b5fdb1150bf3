"""constrained_ppo.py against others' Nelder-Mead and GPT-2, and a run from a user's folder."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import constrained_ppo as c
from tests._helpers import close, sentences

pytestmark = pytest.mark.usefixtures("one_thread")


def rosenbrock(x):
    valley = sum(100 * (x[i + 1] - x[i] ** 2) ** 2 + (1 - x[i]) ** 2 for i in range(len(x) - 1))
    return valley + (x[0] - 1) ** 2


def waves(x):
    return float(np.sum((x - 0.3) ** 2) + 0.3 * np.sin(3 * x).sum())


def kinks(x):
    return float(np.abs(x - 0.2) @ np.arange(1, len(x) + 1))


@pytest.mark.parametrize("function", [rosenbrock, waves, kinks])
@pytest.mark.parametrize("N", [1, 2, 3, 5])
def test_nelder_mead_asks_for_what_scipy_evaluates(function, N):
    simplex, theirs = np.random.default_rng(N).uniform(-1, 2, (N + 1, N)), []

    def noted(x):
        theirs.append(x.copy())
        return function(x)

    options = {"initial_simplex": simplex, "maxfev": 150, "xatol": 0, "fatol": -1}
    minimize(noted, simplex[0], method="Nelder-Mead", options=options)
    search = c.nelder_mead(simplex)
    point = next(search)
    assert len(theirs) == 150
    for x in theirs[:120]:
        close(point, x, 1e-7)
        point = search.send(function(point))


def their_gpt2(vocab_size=61, **sizes):
    """Theirs, every parameter moved away from its start."""
    sizes = {"n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 160} | sizes
    options = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **sizes, **options)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def test_our_gpt2_is_theirs(tmp_path):
    """Logits and gradients, with the same weights; a layer's matrices are (in, out) there."""
    theirs, ours = their_gpt2(), c.GPT2(61, positions=160, D=24, n_layer=2, n_head=3)
    names = {"token": "wte", "position": "wpe", "layers": "h", "norm": "ln_f"}
    names |= {"norm_1": "ln_1", "norm_2": "ln_2", "qkv": "attn.c_attn", "out": "attn.c_proj"}
    names |= {"up": "mlp.c_fc", "down": "mlp.c_proj"}
    their = dict(theirs.transformer.named_parameters())
    pairs = []
    for name, parameter in ours.named_parameters():
        truth = their.pop(".".join(names.get(part, part) for part in name.split(".")))
        flip = name.startswith("layers") and parameter.ndim == 2
        pairs.append((parameter, truth, flip))
        parameter.data.copy_(truth.data.T if flip else truth.data)
    assert not their
    tokens = torch.randint(61, (3, 30))
    truth, logits = theirs(tokens).logits, ours(tokens, torch.ones(3, 30, dtype=torch.bool))[0]
    close(logits, truth, 1e-4)
    truth.logsumexp(-1).sum().backward()
    logits.logsumexp(-1).sum().backward()
    for parameter, truth, flip in pairs:
        close(parameter.grad, truth.grad.T if flip else truth.grad, 1e-3)


def test_a_users_model_draws_what_it_says_and_padding_changes_nothing(tmp_path):
    theirs = their_gpt2()
    theirs.save_pretrained(tmp_path)
    policy = c.Pretrained(str(tmp_path))
    prompts = [torch.randint(1, 61, (n,)).tolist() for n in (3, 9, 1, 6)]
    rollout = c.generate(policy, prompts, 0, 12, torch.Generator().manual_seed(1))
    logp = c.token_logp(policy, rollout)
    close(logp * rollout.mask, rollout.logp, 1e-4)
    (logp * rollout.mask).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in policy.parameters())
    for b, prompt in enumerate(prompts):  # alone and without padding
        n = int(rollout.mask[b].sum())
        whole = torch.tensor([prompt + rollout.tokens[b, :n].tolist()])
        logp = theirs(whole).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        close(rollout.logp[b, :n], logp.gather(-1, whole[0, len(prompt) :, None])[:, 0], 1e-4)


def test_a_whole_run_from_a_gpt2_folder_and_back(tmp_path, monkeypatch, capsys):
    """The user's policy, rows and module; what it raises keeps its traceback."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=300, initial_alphabet=ByteLevel.alphabet(), special_tokens=["<|endoftext|>"]
    )
    bpe.train_from_iterator([sentences(seed) for seed in range(3)], trainer)
    folder = tmp_path / "gpt2"
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(folder)
    their_gpt2(bpe.get_vocab_size(), n_embd=16, n_head=2, n_layer=1).save_pretrained(folder)
    rows = [{"prompt": f"say {w}", "response": w, "kind": w} for w in "abcde" * 6]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    body = (
        "def score(rows, replies):\n"
        "    same = [float(row['kind'] in reply) for row, reply in zip(rows, replies)]\n"
        "    return {'judge': sum(same) / len(rows), 'same': same,\n"
        "            'short': [1 / (1 + len(reply)) for reply in replies]}\n"
    )
    (tmp_path / "own_score.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    flags = ["--smoke", "--policy", str(folder), "--data", "rows.jsonl", "--module", "own_score"]
    flags += ["--method", "xi_ppo", "--thresholds", "0.1,0.2", "--reply", "5", "--device", "cpu"]
    assert c.main([*flags, "--lr", "1e-2", "--out", "out"]) == 0
    result = json.loads((tmp_path / "out/smoke/result.json").read_text())
    assert result["final"].keys() == {"xi_ppo_lagrangian"} and "optimum" not in result
    saved = torch.load(tmp_path / "out/smoke/xi_ppo_lagrangian.pt", weights_only=True)["run"]
    start, out = c.Pretrained(str(folder)), str(tmp_path / "out/smoke/xi_ppo_lagrangian")
    again, moved = c.Pretrained(out).state_dict(), []
    for name, tensor in start.state_dict().items():
        assert torch.equal(again[name], saved[f"policy.{name}"])
        assert torch.equal(tensor, saved[f"reference.{name}"])  # it was not fine-tuned
        moved.append(not torch.equal(tensor, again[name]))
    assert any(moved)
    AutoTokenizer.from_pretrained(out)

    late = body.replace("    same", "    calls.append(1)\n    1 / (len(calls) < 4)\n    same", 1)
    (tmp_path / "own_late.py").write_text("calls = []\n" + late)
    flags[flags.index("own_score")] = "own_late"
    assert c.main([*flags, "--out", "late"]) == 2
    error = capsys.readouterr().err
    assert "own_late.py" in error and error.endswith(": ZeroDivisionError: division by zero\n")


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    their_gpt2().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"n_layer": 3}))
    with pytest.raises(ValueError, match="the weights do not fit"):
        c.Pretrained(str(tmp_path))
