"""constrained_ppo.py against others' Nelder-Mead and GPT-2, and a run from a GPT-2 folder."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

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


SIZES = {
    "plain": {"n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 40},
    "one head, deep": {"n_embd": 16, "n_head": 1, "n_layer": 4, "n_positions": 64},
}


def their_gpt2(vocab_size=61, **sizes):
    """Theirs, every parameter moved away from its start, attention as they wrote it out."""
    options = {"attn_implementation": "eager", "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **sizes, **options)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_logits_and_gradients_are_transformers(tmp_path, sizes):
    theirs = their_gpt2(**sizes)
    theirs.save_pretrained(tmp_path)
    ours, tokens = c.read_folder(str(tmp_path)), torch.randint(61, (3, 30))
    truth, logits = theirs(tokens).logits, ours(tokens, torch.ones(3, 30, dtype=torch.bool))[0]
    close(logits, truth, 1e-4)
    truth.logsumexp(-1).sum().backward()
    logits.logsumexp(-1).sum().backward()
    theirs_by_name = {name: p.grad for name, p in theirs.transformer.named_parameters()}
    wanted = c.transposed(theirs_by_name)
    assert wanted.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        close(parameter.grad, wanted[name], 1e-3)


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
    their_gpt2(
        bpe.get_vocab_size(), n_embd=16, n_head=2, n_layer=1, n_positions=160
    ).save_pretrained(folder)
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
    saved = torch.load(tmp_path / "out/smoke/xi_ppo_lagrangian.pt", weights_only=True)
    again = c.read_folder(str(tmp_path / "out/smoke/xi_ppo_lagrangian"))
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, saved["policy"][name])
    start = c.read_folder(str(folder)).state_dict()
    assert all(torch.equal(start[name], saved["reference"][name]) for name in start)  # not tuned
    assert not torch.equal(start["wte.weight"], saved["policy"]["wte.weight"])

    late = body.replace("    same", "    calls.append(1)\n    1 / (len(calls) < 4)\n    same", 1)
    (tmp_path / "own_late.py").write_text("calls = []\n" + late)
    flags[flags.index("own_score")] = "own_late"
    with pytest.raises(c.UserCodeError) as caught:
        c.main([*flags, "--out", "late"])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"activation_function": "relu"}, "not a plain GPT-2"),
        ({"layer_norm_epsilon": 1e-2}, "not a plain GPT-2"),
        ({"n_layer": 3}, "the weights do not fit"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, changes, words):
    their_gpt2(**SIZES["plain"]).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(ValueError, match=words):
        c.read_folder(str(tmp_path))
