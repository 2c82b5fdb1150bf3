"""constrained_ppo.py against other people's METEOR, BLEU, ROUGE, Nelder-Mead, kernel density and GPT-2."""

import itertools
import json
import random

import numpy as np
import pytest
import sacrebleu
import torch
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import save_file
from scipy.optimize import minimize
from scipy.stats import gaussian_kde
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import GPT2Config, GPT2LMHeadModel

import constrained_ppo as c
from tests._helpers import close, sentences

pytestmark = pytest.mark.usefixtures("one_thread")


def texts(count, seed=0, low=0):
    """Word lists of 0 to 14 words from few, so that words repeat and match in many ways; real replies among them."""
    r = random.Random(seed)
    random_ones = [[r.choice("abcdefg") for _ in range(r.randint(low, 14))] for _ in range(count)]
    replies = [row.response.split() for row in c.small_talk((0, 0, count))[2]]
    return random_ones + r.sample(replies, count)


class NoStems:
    """Lets NLTK's METEOR match equal words only."""

    def stem(self, word):
        return word


class NoSynonyms:
    """The same."""

    def synsets(self, word):
        return []


def test_meteor_is_nltks_with_exact_matches():
    pairs = list(zip(texts(400, 1), texts(400, 2), strict=True))
    pairs += list(itertools.product(texts(20, 3), texts(20, 4)))
    scores = []
    for reference, response in pairs:
        theirs = single_meteor_score(reference, response, preprocess=str, stemmer=NoStems(), wordnet=NoSynonyms())
        assert c.meteor(reference, response) == pytest.approx(theirs, abs=1e-12), (reference, response)
        scores.append(theirs)
    assert sum(score > 0 for score in scores) > len(scores) / 2


@pytest.mark.parametrize("seed", range(5))
def test_bleu_is_sacrebleus(seed):
    references, responses = texts(60, seed, 1), texts(60, seed + 50, 1)
    options = {"tokenize": "none", "smooth_method": "none", "force": True}
    theirs = sacrebleu.corpus_bleu(
        [" ".join(words) for words in responses], [[" ".join(words) for words in references]], **options
    )
    assert c.bleu(references, responses) == pytest.approx(theirs.score / 100, abs=1e-9) and theirs.score > 0
    longer = [words + ["z"] * (seed % 3) for words in references]  # the brevity penalty
    theirs = sacrebleu.corpus_bleu(
        [" ".join(words) for words in responses], [[" ".join(words) for words in longer]], **options
    )
    assert c.bleu(longer, responses) == pytest.approx(theirs.score / 100, abs=1e-9)


class Spaces:
    """A tokenizer that splits at spaces, as ours."""

    def tokenize(self, text):
        return text.split()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_rouge_is_rouge_scores(n):
    scorer, positive = RougeScorer([f"rouge{n}"], tokenizer=Spaces()), 0
    for reference, response in zip(texts(300, 1), texts(300, 2), strict=True):
        theirs = scorer.score(" ".join(reference), " ".join(response))[f"rouge{n}"].fmeasure
        assert c.rouge(reference, response, n) == pytest.approx(theirs, abs=1e-12)
        positive += theirs > 0
    assert positive > 20


def rosenbrock(x):
    return sum(100 * (x[i + 1] - x[i] ** 2) ** 2 + (1 - x[i]) ** 2 for i in range(len(x) - 1)) + (x[0] - 1) ** 2


def waves(x):
    return float(np.sum((x - 0.3) ** 2) + 0.3 * np.sin(3 * x).sum())


def kinks(x):
    return float(np.abs(x - 0.2) @ np.arange(1, len(x) + 1))


@pytest.mark.parametrize("function", [rosenbrock, waves, kinks])
@pytest.mark.parametrize("N", [1, 2, 3, 5])
def test_nelder_mead_asks_for_what_scipy_evaluates(function, N):
    r = np.random.default_rng(N)
    simplex, theirs = r.uniform(-1, 2, (N + 1, N)), []

    def noted(x):
        theirs.append(x.copy())
        return function(x)

    options = {"initial_simplex": simplex, "maxfev": 150, "xatol": 0, "fatol": -1}
    minimize(noted, simplex[0], method="Nelder-Mead", options=options)
    search = c.NelderMead(simplex)
    assert len(theirs) == 150
    for x in theirs[:120]:
        close(search.ask(), x, 1e-7)
        search.tell(function(search.ask()))


@pytest.mark.parametrize("N", [1, 2, 3])
def test_kernel_density_is_scipys(N):
    r = np.random.default_rng(N)
    points, at = r.standard_normal((70, N)) @ r.standard_normal((N, N)), r.standard_normal((50, N))
    close(c.kernel_density(points)(at), gaussian_kde(points.T)(at.T), 1e-6)


# ----- GPT-2 ----------------------------------------------------------------------------------------------------------

SIZES = {
    "plain": {"n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 40},
    "one head, deep": {"n_embd": 16, "n_head": 1, "n_layer": 4, "n_positions": 64},
    "eps 1e-2": {"n_embd": 32, "n_head": 8, "n_layer": 1, "n_positions": 33, "layer_norm_epsilon": 1e-2},
}


def their_gpt2(vocab_size, **sizes):
    """Theirs, every parameter moved away from its start, attention as they wrote it out."""
    options = {"attn_implementation": "eager", "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **sizes, **options)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def train_bpe(folder, vocab_size=300):
    """A byte-level BPE as GPT-2 has, saved as vocab.json, merges.txt and tokenizer.json."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    corpus = [sentences(seed) for seed in range(3)] + [row.response for row in c.small_talk((0, 0, 50))[2]]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": len(vocab)}))
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("layout", ["safetensors", "bin without prefix"])
def test_logits_and_gradients_are_transformers(tmp_path, sizes, layout):
    theirs = their_gpt2(61, **sizes)
    theirs.config.save_pretrained(tmp_path)
    if layout == "safetensors":
        theirs.save_pretrained(tmp_path)
    else:  # as the first released files: no prefix, masks among the tensors
        tensors = {k.removeprefix("transformer."): v for k, v in theirs.state_dict().items()}
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4).tril()
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    ours, tokens = c.read_policy(str(tmp_path)), torch.randint(61, (3, 30))
    truth = theirs(tokens).logits
    close(ours(tokens), truth, 1e-4)
    truth.logsumexp(-1).sum().backward()
    ours(tokens).logsumexp(-1).sum().backward()
    wanted = {k.removeprefix("transformer."): p.grad for k, p in theirs.named_parameters()}
    assert wanted.keys() == {k for k, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        transposed = "c_" in name and name.endswith("weight")
        close(parameter.grad, wanted[name].T if transposed else wanted[name], 1e-3)


def test_padded_replies_have_transformers_log_probabilities(tmp_path):
    theirs = their_gpt2(61, **SIZES["plain"])
    theirs.save_pretrained(tmp_path)
    ours, config = c.read_policy(str(tmp_path)), c.Config(top_k=0, reply=12)
    prompts = [torch.randint(1, 61, (n,)).tolist() for n in (3, 9, 1, 6)]
    replies = c.write_replies(ours, prompts, 0, config, torch.Generator().manual_seed(1))
    for b, prompt in enumerate(prompts):
        n = int(replies.mask[b].sum())
        whole = torch.tensor([prompt + replies.tokens[b, :n].tolist()])
        logp = theirs(whole).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        close(replies.logp[b, :n], logp.gather(-1, whole[0, len(prompt) :, None])[:, 0], 1e-4)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_ids_are_tokenizers(tmp_path, name):
    theirs = train_bpe(tmp_path)
    (tmp_path / ("vocab.json" if name == "tokenizer.json" else "tokenizer.json")).unlink()
    ours = c.BytePairs(str(tmp_path))
    assert ours.end == theirs.token_to_id("<|endoftext|>") and ours.size == theirs.get_vocab_size()
    for seed in range(5):
        text = sentences(seed) + " it's 12,345 — naïve;\n\n  日本 🙂  "
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids and ours.decode([*ids, ours.end]) == text.strip()


def test_a_whole_run_from_a_gpt2_folder(tmp_path):
    tokenizer = train_bpe(tmp_path)
    model = their_gpt2(tokenizer.get_vocab_size(), n_embd=16, n_head=2, n_layer=1, n_positions=160)
    model.save_pretrained(tmp_path)
    flags = ["--smoke", "--policy", str(tmp_path), "--method", "xi_ppo", "--thresholds", "0.1,0.2"]
    assert c.main([*flags, "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    content = torch.load(tmp_path / "out" / "start.pt", weights_only=True)
    assert content["classifier"]["weight"].shape[0] == tokenizer.get_vocab_size()


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"activation_function": "relu"}, "activation_function = 'relu', must be 'gelu_new'"),
        ({"model_type": "llama"}, "model_type = 'llama', must be 'gpt2'"),
        ({"n_embd": 48}, "the weights do not fit config.json"),
        ({"n_layer": 3}, "h.2.attn.c_attn.bias is missing"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path, changes, words):
    model = their_gpt2(61, **SIZES["plain"])
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(ValueError, match=words):
        c.read_policy(str(tmp_path))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="x is extra"):
        c.read_policy(str(tmp_path))
    for text in "", "[1, 2]":
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(c.UserError, match=r"--policy .*config.json is no JSON object"):
            c.read_policy(str(tmp_path))
