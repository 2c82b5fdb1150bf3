"""What the tests of more than one file use."""

import random

import numpy as np
import torch

WORDS = ("the", "cat", "sat", "on", "a", "naïve", "mat", "déjà", "vu", "日本", "🙂")


def close(ours, truth, tolerance=1e-10):
    torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


def far_from_zero(model):
    """The model in float64, its weights moved away from 0, so that nothing hides by being small."""
    model = model.double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def text(*shape):
    return torch.randint(29, shape)


def sentences(seed, size=1900):
    r = random.Random(seed)
    return " ".join(r.choice(WORDS) for _ in range(size))[:size]


def corpus_of(script, tokens, name="byte", documents=()):
    """A corpus of these tokens, to train on and held out alike."""
    tokenizer, tokens = script.load_tokenizer(name, list(documents)), np.asarray(tokens)
    return script.Corpus(tokens, tokens, tokenizer, tokenizer.vocab_size, tokenizer.separator, "x")
