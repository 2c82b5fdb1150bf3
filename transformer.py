"""Transformer++: the language model that Mamba is measured against. Train, sample, evaluate.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752,
appendix E.2.1; its parts are from Touvron et al., "LLaMA", arXiv 2302.13971.

    python transformer.py                     trains on Python's documentation: 5 minutes, two cores
    python transformer.py sample --prompt "A" writes text with that checkpoint: seconds
    python transformer.py eval --data FILE    scores that checkpoint on your text: seconds

code      shape           meaning
x         (B, L, D)       the residual stream, D is d_model
q         (B, H, L, d)    queries of H heads of d channels each
k, v      (B, G, L, d)    keys and values, each shared by H / G query heads (2305.13245)
cos, sin  (L, 1, d)       of the rotary angles, position * theta^(-2i/d) (2104.09864)
cache     (2, B, G, C, d) a layer's keys and values so far: room for C positions

Each "++" can be undone by its flag: rotary positions by `--position learned`, SwiGLU by
`--mlp gelu`, RMSNorm without biases by `--norm layernorm`, which has biases everywhere.

Differences from the paper: model, text and steps are a laptop's, and the rate fits them. Matrices
that write to the residual stream start smaller by sqrt(2 n_layer), as GPT-2's; the paper does not
say. Not included: dropout, sliding windows, experts, rotary scalings other than Llama 3's.
"""

from __future__ import annotations

import argparse
import ast
import base64
import collections
import contextlib
import dataclasses
import hashlib
import json
import lzma
import math
import os
import re
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # threads that wait must soon sleep: tests/bench

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ----- Rotary positions and attention -------------------------------------------------------------


def rotary_angles(config: TransformerConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (L, 1, d) of position * theta^(-2i/d), equation 15 of 2104.09864, for `rotate`.

    With `rope_scaling` as in Llama 3: wavelengths that turn fewer than low_freq_factor times in the
    original length are `factor` times as long, above high_freq_factor as they are, between a blend.
    """
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_size, 2) / config.head_size)
    if config.rope_scaling is not None:
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        frequencies = torch.lerp(frequencies / s["factor"], frequencies, keep.clamp(0, 1))
    angles = torch.outer(positions.float(), frequencies.to(positions.device)).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()  # (L, 1, d / 2), of a pair
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)  # of its two channels


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) of channels of x (B, L, H, d) to (a cos - b sin, b cos + a sin).

    Equation 34 of 2104.09864; the pairs are those of Llama's checkpoints, i and i + d/2.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # b where a was, and a where b was
    return (x * cos + swapped * sin).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: q (B, H, L, d) with k, v (B, G, M, d) -> (B, H, L, d).

    mask (B or 1, 1, L, M) is True where a query sees a key. None: it sees itself and those before,
    which is for L = M, or for L = 1, where the query is the last.
    """
    causal = mask is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)


# ----- The model ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransformerConfig:
    """The model's sizes and parts; the defaults are the paper's 125M Transformer++."""

    d_model: int = 768  # width of the residual stream
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0  # heads of keys and values; 0: n_head
    d_ff: int = 0  # width in the MLP; 0: 8/3 d_model to a multiple of 128, with GELU 4 d_model
    vocab_size: int = 50277
    rope_theta: float = 10000.0  # the longest wavelength is nearly 2 pi theta
    rope_scaling: dict | None = None  # Llama 3's, by Hugging Face's names
    norm_eps: float = 1e-5
    tie_embeddings: bool = True  # the head's weight is the embedding's
    max_length: int = 2048  # learned positions end here
    position: str = "rope"  # or learned
    mlp: str = "swiglu"  # or gelu
    norm: str = "rmsnorm"  # or layernorm, with biases in all linear layers

    def __post_init__(self):
        parts = {"position": ("rope", "learned"), "mlp": ("swiglu", "gelu")}
        for name, choices in (parts | {"norm": ("rmsnorm", "layernorm")}).items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} must be in {choices}")
        if self.d_model % self.n_head or self.n_head % self.groups:
            sizes = f"d_model {self.d_model}, n_head {self.n_head}, n_kv_head {self.groups}"
            raise ValueError(f"{sizes}: each must be divisible by the next")
        if self.position == "rope" and self.head_size % 2:
            raise ValueError(f"d_model / n_head is {self.head_size}, must be even for rope")

    @property
    def head_size(self) -> int:
        return self.d_model // self.n_head

    @property
    def groups(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def hidden(self) -> int:
        wide = -(-8 * self.d_model // 384) * 128 if self.mlp == "swiglu" else 4 * self.d_model
        return self.d_ff or wide

    @property
    def bias(self) -> bool:
        return self.norm == "layernorm"

    def make_norm(self) -> nn.Module:
        """RMSNorm: x / sqrt(mean(x^2) + eps) * weight, over the last axis (1910.07467)."""
        kind = nn.LayerNorm if self.norm == "layernorm" else nn.RMSNorm
        return kind(self.d_model, eps=self.norm_eps)


class Attention(nn.Module):
    """Causal self-attention with grouped queries. Names are the checkpoints'."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        D, G, d = config.d_model, config.groups, config.head_size
        self.head_size = d
        self.q_proj = nn.Linear(D, D, config.bias)
        self.k_proj = nn.Linear(D, G * d, config.bias)
        self.v_proj = nn.Linear(D, G * d, config.bias)
        self.o_proj = nn.Linear(D, D, config.bias)

    def forward(self, x: Tensor, angles, mask: Tensor | None, cache: Cache | None, layer: int):
        """x (B, L, D) -> (B, L, D); angles are `rotary_angles`', None for learned positions."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_size))  # (B, L, H, d)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_size))  # (B, L, G, d)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_size))
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or G, L, d)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU (2002.05202): (SiLU(x W_gate) * x W_up) W_down; or the vanilla GELU(x W_up) W_down."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gated = config.mlp == "swiglu"
        if self.gated:
            self.gate_proj = nn.Linear(config.d_model, config.hidden, config.bias)
        self.up_proj = nn.Linear(config.d_model, config.hidden, config.bias)
        self.down_proj = nn.Linear(config.hidden, config.d_model, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> (B, L, D)."""
        if self.gated:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(F.gelu(self.up_proj(x)))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm. The residual stream around them is float32."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.input_layernorm = config.make_norm()
        self.self_attn = Attention(config)
        self.post_attention_layernorm = config.make_norm()
        self.mlp = MLP(config)

    def forward(self, x: Tensor, angles, mask: Tensor | None, cache: Cache | None, layer: int):
        """x (B, L, D) -> (B, L, D); what else there is goes to `Attention`."""
        dtype = self.input_layernorm.weight.dtype
        x = x + self.self_attn(self.input_layernorm(x.to(dtype)), angles, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x.to(dtype)))


class Transformer(nn.Module):
    """The language model: embedding, layers, norm, head."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config, self.model = config, nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.model.embed_positions = nn.Embedding(config.max_length, config.d_model)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.model.norm = config.make_norm()
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))  # to the stream
                std = 0.02 / math.sqrt(2 * config.n_layer) if writes else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens, cache: Cache | None = None, starts=None, targets=None) -> Tensor:
        """tokens (B, L) -> logits (B, L, V); with targets (B, L) their mean loss in nats instead.

        With a cache, tokens follow what is in it and are added; then nothing is differentiated.
        starts (B, L) bool, without a cache: where a document begins, which sees nothing before it.
        """
        precision = contextlib.nullcontext()
        if tokens.is_cuda and targets is not None:
            precision = torch.autocast("cuda", torch.bfloat16)  # around float32 parameters
        with precision, torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            x = self.hidden(tokens, cache, starts)
            return self.lm_head(x) if targets is None else self.loss(x, targets)

    def hidden(self, tokens: Tensor, cache: Cache | None = None, starts=None) -> Tensor:
        """tokens (B, L) -> what the head reads, (B, L, D)."""
        if starts is not None and cache is not None:
            raise ValueError("starts cannot go with a cache")
        L, past, mask, angles = tokens.shape[1], 0 if cache is None else cache.length, None, None
        positions = torch.arange(past, past + L, device=tokens.device)
        if starts is not None:
            document = starts.cumsum(1)  # (B, L): its number; a query sees its own, up to itself
            mask = (document[:, None, :, None] == document[:, None, None, :]).tril()
        elif past > 0 and L > 1:
            seen = torch.arange(past + L, device=tokens.device) <= positions[:, None]
            mask = seen[None, None]  # (1, 1, L, past + L)
        x = self.model.embed_tokens(tokens)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.config.position == "rope":
            angles = rotary_angles(self.config, positions)
        else:
            if starts is not None:  # each document counts from 0
                positions = positions - torch.where(starts, positions, 0).cummax(1).values
            x = x + self.model.embed_positions(positions)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, angles, mask, cache, i)
        if cache is not None:
            cache.length += L
        return self.model.norm(x.to(self.lm_head.weight.dtype))

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy; on a CPU by pieces, so that the logits never exist as a whole."""
        x, targets, pieces = x.flatten(0, 1), targets.flatten(), None
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            pieces = nn.LinearCrossEntropyOptions(512, chunking_method=None, acc_policy="balanced")
        return F.linear_cross_entropy(x, self.lm_head.weight, targets, options=pieces)

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache with room for `capacity` positions of each of `batch` rows."""
        return Cache(self.config, batch, capacity, self.lm_head.weight.detach())

    @torch.inference_mode()
    def generate(
        self, tokens, max_new_tokens, temperature=1.0, top_k=None, generator=None
    ) -> Tensor:
        """tokens (B, L) -> (B, L + max_new_tokens): one prefill, then a token at a time.

        Raises FloatingPointError where the logits are not finite.
        """
        if tokens.numel() == 0:
            raise ValueError("the prompt is empty: give at least one token")
        cache, new = self.init_cache(len(tokens), tokens.shape[1] + max_new_tokens), tokens
        for i in range(max_new_tokens):
            logits = self.lm_head(self.hidden(new, cache)[:, -1])
            if not logits.isfinite().all():
                raise FloatingPointError(f"the logits of new token {i + 1} are not finite")
            new = sample_token(logits, temperature, top_k, generator).unsqueeze(1)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens


# ----- Generation with a cache --------------------------------------------------------------------


class Cache:
    """Keys and values of the positions so far, for each layer in memory set aside once."""

    def __init__(self, config: TransformerConfig, batch: int, capacity: int, like: Tensor):
        shape = (2, batch, config.groups, capacity, config.head_size)
        self.layers = [like.new_empty(shape) for _ in range(config.n_layer)]
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, G, L, d) after the `length` positions there are; returns all so far."""
        end, (keys, values) = self.length + k.shape[2], self.layers[layer]
        if end > keys.shape[2]:
            raise ValueError(f"{end} positions are too many for a cache of {keys.shape[2]}")
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


def sample_token(logits, temperature=1.0, top_k=None, generator=None) -> Tensor:
    """Draw a token (B,) from logits (B, V), of the top_k likeliest; temperature 0 is greedy."""
    if not temperature >= 0:
        raise ValueError(f"{temperature=} must be at least 0")
    if temperature < 1e-6:  # logits divided by less overflow
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


# ----- Data: documents -> tokens -> train and valid -----------------------------------------------


def python_documents() -> list[str]:
    """Prose that ships with Python: its reference topics, then the docstrings of each module."""
    from pydoc_data.topics import topics

    left_out = "tests?|(site|dist)-packages|idlelib|lib2to3|distutils|ensurepip|tkinter|turtle.*"
    left_out += r"|pydoc_data|config-.*|_sysconfig.*|sitecustomize\.py"  # not on every system
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documents, root = [topics[name] for name in sorted(topics)], Path(sysconfig.get_path("stdlib"))
    for file in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if not re.search(f"(^|/)({left_out})(/|$)", file):
            nodes = ast.walk(ast.parse((root / file).read_bytes()))  # never imported
            texts = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
            documents.append("\n\n".join([file, *filter(None, texts)]))
    return documents


def drop_repeated_paragraphs(documents: list[str]) -> list[str]:
    """The documents without paragraphs of 60 characters or more that occurred before.

    Otherwise held-out text stands in the training text too, and copying looks like learning.
    """
    seen, kept = set(), []
    for document in documents:
        paragraphs = []
        for paragraph in document.strip().split("\n\n"):
            if len(paragraph) < 60 or paragraph not in seen:
                paragraphs.append(paragraph)
                seen.add(paragraph)
        kept.append("\n\n".join(paragraphs))
    return [document for document in kept if document.strip()]


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """For training, and every 20th for validation; of few documents, the last 5 % of the text."""
    most = sum(map(len, documents)) / 50  # a longer one would decide the score: it trains
    valid = [i for i, text in enumerate(documents) if len(text) <= most][19::20]
    if valid:
        train = sorted(set(range(len(documents))) - set(valid))
        return [documents[i] for i in train], [documents[i] for i in valid]
    text = "\n\n".join(documents)
    return [text[: len(text) * 19 // 20]], [text[len(text) * 19 // 20 :]]


@dataclass
class Corpus:
    """Token ids to train on and to validate on, 1-D, and what they mean."""

    train: np.ndarray
    valid: np.ndarray
    tokenizer: Tokenizer | None
    vocab_size: int
    separator: int | None  # the id after each document
    context_length: int | None = None  # of packed contexts: no window joins two


def load_corpus(path: str, tokenizer: Tokenizer | str, split: bool = True) -> Corpus:
    """The corpus of a text file, a folder of .txt, a .jsonl of `text`, a .bin, or Python's prose.

    Without `split` all is for validation. A tokenizer trained here never sees validation text.
    """
    if path.endswith(".bin"):
        return read_tokens(path, split)
    if not path:
        documents = python_documents()
    elif Path(path).is_dir():
        documents = [file.read_text("utf-8-sig") for file in sorted(Path(path).rglob("*.txt"))]
    else:
        documents = [Path(path).read_text("utf-8-sig")]
    if path.endswith(".jsonl"):
        documents = [json.loads(row)["text"] for row in documents[0].split("\n") if row.strip()]
    train, valid = [], documents
    if split:
        train, valid = split_documents(drop_repeated_paragraphs(documents))
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer, train)
    halves, end = [], [] if tokenizer.separator is None else [tokenizer.separator]
    for texts in (train, valid):
        ids = [np.array(tokenizer.encode(text) + end, np.uint32) for text in texts]
        halves.append(np.concatenate([*ids, np.array([], np.uint32)]))
    return Corpus(*halves, tokenizer, tokenizer.vocab_size, tokenizer.separator)


def read_tokens(path: str, split: bool) -> Corpus:
    """The corpus of a .bin of little-endian ids, described by a .json of the same name.

    That has vocab_size, dtype (uint16 or uint32), tokenizer (a name, a file there, or null),
    document_separator (an id or null) and, for packed contexts, context_length.
    """
    about, tokenizer, cut = json.loads(Path(path).with_suffix(".json").read_text("utf-8")), None, 0
    tokens = np.memmap(path, {"uint16": "<u2", "uint32": "<u4"}[about["dtype"]], "r")
    if about["tokenizer"] is not None:
        beside = Path(path).with_name(about["tokenizer"])
        tokenizer = load_tokenizer(str(beside) if beside.is_file() else about["tokenizer"], [])
    context = about.get("context_length")
    if split:
        cut = len(tokens) - min(len(tokens) // 20, 10_000_000)
        cut -= cut % (context or 1)
    size, separator = about["vocab_size"], about["document_separator"]
    return Corpus(tokens[:cut], tokens[cut:], tokenizer, size, separator, context)


def xz_bits(corpus: Corpus) -> float | None:
    """Bits a byte that xz needs for the validation text after the last 32 MB of training text."""
    if corpus.tokenizer is None:
        return None
    train = corpus.tokenizer.decode_bytes(corpus.train[-16_000_000:])[-32_000_000:]
    valid = corpus.tokenizer.decode_bytes(corpus.valid)
    return 8 * (len(lzma.compress(train + valid)) - len(lzma.compress(train))) / max(1, len(valid))


# ----- Training -----------------------------------------------------------------------------------

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun


def window_offsets(corpus: Corpus, config: Config, step: int) -> np.ndarray:
    """Where the windows of a step begin, (batch,): known from the step, so resuming is exact.

    An epoch has all windows side by side, shuffled, from a position of its own. Windows of packed
    contexts begin at multiples of the length, and so none joins two contexts.
    """
    windows = (len(corpus.train) - 1) // config.length
    first, order = step * config.batch, []
    for epoch in range(first // windows, (first + config.batch - 1) // windows + 1):
        rng = np.random.default_rng((config.seed, epoch))
        start = 0
        if corpus.context_length is None:
            start = rng.integers(len(corpus.train) - windows * config.length)
        order.append(start + config.length * rng.permutation(windows))
    return np.concatenate(order)[first % windows :][: config.batch]


def read_windows(corpus: Corpus, tokens: np.ndarray, offsets, config: Config, device):
    """Inputs and targets (B, L) of the windows at offsets; their starts with document_resets."""
    rows = np.stack([tokens[o : o + config.length + 1] for o in offsets]).astype(np.int64)
    if rows.max() >= corpus.vocab_size:
        raise ValueError(f"token {rows.max()} is beyond the model's {corpus.vocab_size}")
    starts = None
    if config.document_resets and corpus.separator is not None:
        before = np.array([[tokens[o - 1] if o else corpus.separator] for o in offsets])
        starts = np.concatenate([before, rows[:, :-2]], axis=1) == corpus.separator
        starts = torch.from_numpy(starts).to(device)
    rows = torch.from_numpy(rows).to(device)
    return rows[:, :-1], rows[:, 1:], starts


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up over the first `warmup` of the steps, then a cosine from lr down to min_lr."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    share = (step - warm) / max(1, config.steps - 1 - warm)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices only."""
    decayed, others = [], []
    for parameter in model.parameters():
        (decayed if parameter.ndim > 1 else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others}]
    return torch.optim.AdamW(groups, config.lr, (0.9, config.beta2), weight_decay=0.0)


def train_step(forward, optimizer, corpus: Corpus, config: Config, step: int):
    """The step of AdamW of that number: its loss (nats a token) and the norm of its gradient.

    forward is the model, maybe compiled or distributed: then each process takes its part of the
    batch. Raises FloatingPointError if loss or norm is not finite, before a weight has changed.
    """
    parameters, parts, loss = list(forward.parameters()), config.accumulate, 0.0
    device = parameters[0].device
    pieces = np.split(window_offsets(corpus, config, step), WORLD * parts)
    for i, offsets in enumerate(pieces[RANK * parts : (RANK + 1) * parts]):
        x, y, starts = read_windows(corpus, corpus.train, offsets, config, device)
        exchange = WORLD == 1 or i + 1 == parts  # of gradients between processes: once a step
        with contextlib.nullcontext() if exchange else forward.no_sync():
            mean = forward(x, starts=starts, targets=y) / parts
            mean.backward()
        loss = loss + mean.detach() / WORLD
    if WORLD > 1:
        dist.all_reduce(loss)
    norm = nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
    if not (loss + norm).isfinite():
        found = f"loss {loss:.4g}, gradient norm {norm:.4g}"
        raise FloatingPointError(f"training diverged at step {step + 1}: {found}; lower --lr")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), norm.item()


@torch.no_grad()
def evaluate(model: Transformer, corpus: Corpus, config: Config, limit: int = 0) -> dict:
    """Loss on the first `limit` tokens of corpus.valid, 0 for all: nats a token and bits a byte.

    All but the first are predicted once, in windows of config.length side by side, each on its own.
    Separators cost bits and count no bytes. Raises FloatingPointError if it is not finite.
    """
    tokens = corpus.valid[: limit + 1] if limit else corpus.valid
    device, nats, count = model.lm_head.weight.device, 0.0, len(tokens) - 1
    for first in range(0, count, config.length):
        x, y, starts = read_windows(corpus, tokens, [first], config, device)
        nats += model(x, starts=starts, targets=y).item() * y.numel()
    if not math.isfinite(nats):
        raise FloatingPointError(f"the model's loss on the validation text is {nats}")
    size = len(corpus.tokenizer.decode_bytes(tokens[1:])) if corpus.tokenizer else 0
    bits = round(nats / math.log(2) / size, 6) if size else None
    return {"loss": round(nats / count, 6), "bits_a_byte": bits, "tokens": count}


def train(config: Config) -> dict:
    """The job `train`: writes checkpoint.pt, metrics.jsonl, result.json and loss.png to config.out.

    It saves at each evaluation, and --resume goes on from there, bit for bit.
    """
    began, out, device = time.perf_counter(), Path(config.out), start_process(config.device)
    config = dataclasses.replace(config, length=config.length or DEFAULT_LENGTH)
    if config.resume:
        model, tokenizer, saved = load_model(dataclasses.replace(config, checkpoint=""))
        corpus = load_corpus(config.data, tokenizer)
    else:
        saved, corpus = {"config": {}, "history": []}, load_corpus(config.data, config.tokenizer)
        torch.manual_seed(config.seed)
        sizes = (config.d_model, config.n_layer, config.n_head, config.n_kv_head, config.d_ff)
        parts = {"position": config.position, "mlp": config.mlp, "norm": config.norm}
        parts |= {"vocab_size": corpus.vocab_size, "max_length": config.length}
        model = Transformer(TransformerConfig(*sizes, **parts))
    check_run(config, corpus, saved)
    optimizer, history = make_optimizer(model.to(device), config), saved["history"]
    if config.resume:
        optimizer.load_state_dict(saved["optimizer"])
    forward = model
    if config.compile:
        forward = torch.compile(forward)
    if WORLD > 1:
        forward = nn.parallel.DistributedDataParallel(forward)
    count, xz = sum(p.numel() for p in model.parameters()), xz_bits(corpus)
    print(f"{count:,} parameters on {device} · {len(corpus.train):,} tokens to train on")
    print(f"{len(corpus.valid):,} held out; xz, given the training text: {xz} bits a byte")

    out.mkdir(parents=True, exist_ok=True)
    first = len(history) + 1
    for step in range(first, config.steps + 1):
        if step <= first + 1:
            start = time.perf_counter()  # again after the first step, which warms up
        loss, norm = train_step(forward, optimizer, corpus, config, step - 1)
        history.append({"step": step, "loss": loss, "norm": norm})
        due = step % config.eval_every == 0 or step == config.steps
        if due:
            scores = evaluate(model, corpus, config, config.eval_tokens)
            history[-1] |= {f"valid_{name}": value for name, value in scores.items()}
        if due or step <= first + 3 or step % max(1, config.steps // 20) == 0:
            pace = (time.perf_counter() - start) / max(1, step - first)
            row = [f"{name} {value:.5g}" for name, value in history[-1].items() if value]
            left = f"{pace * 1e3:.0f} ms · {(config.steps - step) * pace / 60:.1f} minutes left"
            print(f"step {step}/{config.steps}", *row[1:], left, sep=" · ", flush=True)
        if RANK == 0 and due:
            save(out, model, optimizer, corpus, config, history)

    scores = evaluate(model, corpus, config)
    result = {
        "validation": scores, "baselines_bits_a_byte": {"xz": xz}, "parameters": count,
        "wall_seconds": round(time.perf_counter() - began, 1), "argv": sys.argv,
        "python": sys.version, "torch": torch.__version__, "seed": config.seed,
        "device": f"{device}, {torch.get_num_threads()} threads",
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "config": dataclasses.asdict(config),
    }  # fmt: skip
    print(f"validation: {scores} after {result['wall_seconds']} s · {out}", flush=True)
    if RANK == 0:
        (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        plot(history, xz, out / "loss.png")
        if corpus.tokenizer and config.prompt:
            sample(dataclasses.replace(config, checkpoint=""))
    return result


def save(out: Path, model, optimizer, corpus: Corpus, config: Config, history: list[dict]) -> None:
    """Write checkpoint.pt, never half of one, and metrics.jsonl, a line a step."""
    saved = {
        "model": model.state_dict(), "model_config": dataclasses.asdict(model.config),
        "optimizer": optimizer.state_dict(), "history": history,
        "config": dataclasses.asdict(config) | {"size of the data": len(corpus.train)},
        "tokenizer": corpus.tokenizer and corpus.tokenizer.arguments,
    }  # fmt: skip
    torch.save(saved, out / "checkpoint.tmp")
    os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")
    rows = "".join(json.dumps(row) + "\n" for row in history)
    (out / "metrics.jsonl").write_text(rows, "utf-8")


def start_process(name: str) -> torch.device:
    """The device of that name, auto for cuda, mps or cpu; joins the other processes of torchrun."""
    accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.empty(0, device=accelerator if name == "auto" else name).device
    if WORLD > 1 and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group()  # NCCL between GPUs, gloo between CPUs
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (one process speaks)
    return device


def check_run(config: Config, corpus: Corpus, saved: dict) -> None:
    """Raise ValueError if config does not fit the corpus, or what a checkpoint saved."""
    if config.length >= len(corpus.train) or len(corpus.valid) < 2:
        sizes = f"{len(corpus.train)} tokens to train on and {len(corpus.valid)} held out"
        raise ValueError(f"{sizes} are too few for --length {config.length}")
    if (corpus.context_length or config.length) % config.length:
        raise ValueError(f"--length must divide the data's context_length {corpus.context_length}")
    if config.document_resets and corpus.separator is None:
        raise ValueError("--document-resets needs a document_separator, and the data have none")
    free = ("accumulate", "compile", "device", "out", "resume", "smoke", "checkpoint", "prompt")
    free += ("tokens", "temperature", "top_k")
    now = dataclasses.asdict(config) | {"size of the data": len(corpus.train)}
    for name, value in saved["config"].items():
        if name not in free and value != now[name]:
            raise ValueError(f"--resume: {name} was {value!r} and is {now[name]!r}")


def plot(history: list[dict], xz: float | None, path: Path) -> None:
    """Training and validation loss by step as a PNG, in bits a byte where known, with xz's."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no picture: matplotlib is not installed; pip install matplotlib")
    valid = [row for row in history if "valid_loss" in row]
    unit = valid[-1]["valid_bits_a_byte"] / valid[-1]["valid_loss"] if xz else 1.0
    figure, axes = plt.subplots(layout="constrained")
    for rows, key, label in ((history, "loss", "training"), (valid, "valid_loss", "validation")):
        axes.plot([row["step"] for row in rows], [row[key] * unit for row in rows], label=label)
    axes.axhline(xz or 0.0, ls="--", color="grey", label="xz, given the training text")
    axes.set(xlabel="step", ylabel="bits a byte" if xz else "nats a token", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def load_model(config: Config) -> tuple[Transformer, Tokenizer | str, dict]:
    """The model in config.checkpoint, else OUT/checkpoint.pt, a tokenizer, and what else is saved.

    The checkpoint may be a model folder. Where it has no tokenizer, it is config's, by its name.
    """
    path = Path(config.checkpoint or f"{config.out}/checkpoint.pt")
    if path.is_dir():
        own = path / "tokenizer.json"
        tokenizer = load_tokenizer(str(own), []) if own.is_file() else config.tokenizer
        return read_folder(path), tokenizer, {}
    saved = torch.load(path, "cpu", weights_only=True)  # data only, never code
    model = Transformer(TransformerConfig(**saved["model_config"]))
    model.load_state_dict(saved["model"])
    tokenizer = Tokenizer(**saved["tokenizer"]) if saved["tokenizer"] else config.tokenizer
    return model, tokenizer, saved


def sample(config: Config) -> str:
    """The job `sample`: print the prompt and what the model writes after it. Returns the text."""
    model, tokenizer, _ = load_model(config)
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer, [])
    device, size = start_process(config.device), model.config.vocab_size
    ids = tokenizer.encode(config.prompt, special=True)
    if max(ids, default=0) >= size:
        raise ValueError(f"--prompt: token {max(ids)} is beyond the model's {size}")
    generator = torch.Generator(device).manual_seed(config.seed)
    room = model.config.max_length - len(ids)
    count = config.tokens if model.config.position == "rope" else min(config.tokens, room)
    options = (count, config.temperature, config.top_k, generator)
    ids = model.to(device).generate(torch.tensor([ids], device=device).long(), *options)[0]
    text = tokenizer.decode_bytes(ids).decode("utf-8", "replace")
    print(text)
    return text


def evaluate_checkpoint(config: Config) -> dict:
    """The job `eval`: the loss on all of --data, or else on the text that training held out."""
    model, tokenizer, saved = load_model(config)
    trained = saved.get("config", {"data": "", "length": DEFAULT_LENGTH, "document_resets": False})
    data, length = config.data or trained["data"], config.length or trained["length"]
    resets = config.document_resets or trained["document_resets"]
    config = dataclasses.replace(config, length=length, document_resets=resets)
    if isinstance(tokenizer, str) and not data.endswith(".bin"):
        tokenizer = load_tokenizer(tokenizer, [])  # never one that is trained on this text
    corpus = load_corpus(data, tokenizer, split=not config.data)
    corpus.vocab_size = model.config.vocab_size
    if len(corpus.valid) < 2:
        raise ValueError(f"{data} has {len(corpus.valid)} tokens, and so none to predict")
    scores = evaluate(model.to(start_process(config.device)), corpus, config)
    source, part = data or "Python documentation", "all" if config.data else "the held-out part"
    print(f"{source}, {part}: {scores}")
    return scores


# ----- Appendix: tokenizers -----------------------------------------------------------------------

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # what may separate documents
CL100K = (  # how cl100k cuts text into the words within which it merges
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


class Tokenizer:
    """Text to ids and back: byte-level BPE by tiktoken, or a `tokenizer.json` by `tokenizers`.

    ranks are the ids of byte strings, the lower merged first; file is a tokenizer.json's content,
    whose post-processor may add a BOS to each text. A checkpoint keeps `arguments`.
    """

    def __init__(self, ranks=None, pattern="", special=None, file=None):
        self.arguments = {"ranks": ranks, "pattern": pattern, "special": special, "file": file}
        if file is None:
            self.bpe = tiktoken.Encoding(
                "bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
            )
            self.bytes_of = {i: token for token, i in ranks.items()}
            known, self.vocab_size = special, self.bpe.n_vocab
        else:
            import tokenizers

            self.file = tokenizers.Tokenizer.from_str(file)
            self.file.no_truncation()
            self.file.no_padding()
            known = self.file.get_vocab()
            self.vocab_size = max(known.values()) + 1
        self.separator = next((known[text] for text in ENDS if text in known), None)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of text; special tokens written in it are ordinary text unless `special`."""
        if self.arguments["file"]:
            self.file.encode_special_tokens = not special
            return self.file.encode(text).ids
        allowed, ids = set(self.arguments["special"]) if special else set(), []
        for piece in re.split(r"(\s{4000})", text):  # at a million spaces tiktoken panics
            ids += self.bpe.encode(piece, allowed_special=allowed, disallowed_special=())
        return ids

    def decode_bytes(self, ids) -> bytes:
        """Bytes of ids; special tokens and ids that are unknown yield none."""
        ids = [int(i) for i in ids]
        if self.arguments["file"]:
            return self.file.decode(ids).encode()
        return b"".join(self.bytes_of.get(i, b"") for i in ids)


def load_tokenizer(name: str, documents: list[str]) -> Tokenizer:
    """`byte`, `bpe:N` (trained on documents), a tokenizer.json or .tiktoken file, a tiktoken name.

    A .tiktoken file has no pattern and gets cl100k's.
    """
    if name == "byte":
        return Tokenizer({bytes([b]): b for b in range(256)}, r"(?s:.{1,99})", {ENDS[0]: 256})
    if name.startswith("bpe:"):
        return train_bpe(name, documents)
    if name.endswith(".json"):
        return Tokenizer(file=Path(name).read_text("utf-8"))
    if name.endswith(".tiktoken"):
        rows = [line.split() for line in Path(name).read_bytes().splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
        if sum(len(token) == 1 for token in ranks) < 256 or len(set(ranks.values())) < len(rows):
            raise ValueError(f"{name} must rank every single byte, and nothing twice")
        return Tokenizer(ranks, CL100K, {ENDS[0]: max(ranks.values()) + 1})
    encoding = tiktoken.get_encoding(name)  # downloads it once
    return Tokenizer(encoding._mergeable_ranks, encoding._pat_str, encoding._special_tokens)


def train_bpe(name: str, documents: list[str]) -> Tokenizer:
    """Byte-level BPE `bpe:N` of N ids: over and over, join the commonest pair of neighbours."""
    import regex  # tiktoken brings it

    words = collections.Counter()
    for text in documents:
        for word in regex.findall(CL100K, text):  # at most 32 characters, or some take minutes
            words.update(word[i : i + 32].encode() for i in range(0, len(word), 32))
    parts = {word: [bytes([b]) for b in word] for word in words}
    total = collections.Counter()  # of each pair
    places = collections.defaultdict(dict)  # its words; not a set, whose order differs by process

    def count_pairs(word: bytes, sign: int) -> None:
        for pair in zip(parts[word], parts[word][1:], strict=False):
            total[pair] += sign * words[word]
            places[pair][word] = None

    for word in words:
        count_pairs(word, 1)
    ranks, size = {bytes([b]): b for b in range(256)}, int(name.removeprefix("bpe:"))
    if size < 257:
        raise ValueError(f"--tokenizer {name}: N must be at least 257, all bytes and a separator")
    while len(ranks) < size - 1:
        pair = max(total, key=total.get, default=None)
        if pair is None or total[pair] < 1:
            raise ValueError(f"--tokenizer {name}: this text yields only {len(ranks) + 1} ids")
        ranks.setdefault(b"".join(pair), len(ranks))
        for word in places.pop(pair):
            count_pairs(word, -1)
            joined: list[bytes] = []
            for part in parts[word]:
                if joined and (joined[-1], part) == pair:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts[word] = joined
            count_pairs(word, 1)
        del total[pair]
    return Tokenizer(ranks, CL100K, {ENDS[0]: size - 1})


# ----- Appendix: model folders --------------------------------------------------------------------

NAMES = {  # Hugging Face's name of each of our fields
    "d_model": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "d_ff": "intermediate_size", "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings",
    "max_length": "max_position_embeddings",
}  # fmt: skip
PLAIN = {  # what we take for granted
    "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "partial_rotary_factor": 1.0, "quantization_config": None,
}  # fmt: skip


def read_folder(folder: str | Path) -> Transformer:
    """The model in a folder in Llama's layout, read by `transformers`, in float32."""
    folder = Path(folder)
    fields = json.loads((folder / "config.json").read_text("utf-8"))
    for name, value in PLAIN.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{name} is {fields[name]!r}, a plain Llama's is {value!r}")
    from transformers import LlamaForCausalLM

    options = {"dtype": torch.float32, "output_loading_info": True}
    theirs, report = LlamaForCausalLM.from_pretrained(folder, **options)
    if any(report.values()):  # else what is missing would be drawn anew
        raise ValueError(f"the weights do not fit: {report}")
    given = {ours: getattr(theirs.config, name) for ours, name in NAMES.items()}
    rope = theirs.config.rope_parameters
    if rope["rope_type"] == "llama3":
        given["rope_scaling"] = rope
    elif rope["rope_type"] != "default":
        raise ValueError(f"rope type {rope['rope_type']!r} must be default or llama3")
    if theirs.config.head_dim != given["d_model"] // given["n_head"]:
        raise ValueError(f"head_dim {theirs.config.head_dim} must be hidden_size / heads")
    model = Transformer(TransformerConfig(**given, rope_theta=float(rope["rope_theta"])))
    model.load_state_dict(theirs.state_dict())
    return model


def write_folder(model: Transformer, folder: str) -> None:
    """Write Llama's layout, by `transformers`. Raises ValueError for a model without its parts."""
    import transformers

    config = dataclasses.replace(model.config, d_ff=model.config.hidden)
    config = dataclasses.replace(config, n_kv_head=config.groups)
    if (config.position, config.mlp, config.norm) != ("rope", "swiglu", "rmsnorm"):
        raise ValueError("Llama's layout holds Transformer++ alone, with all its parts")
    fields = {theirs: getattr(config, ours) for ours, theirs in NAMES.items()}
    rope = {"rope_type": "llama3"} | config.rope_scaling if config.rope_scaling else {}
    rope = {"rope_type": "default"} | rope | {"rope_theta": config.rope_theta}
    fields |= {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": None}  # not 1 and 2
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    theirs.load_state_dict(model.state_dict())
    theirs.save_pretrained(folder)


# ----- Config and main ----------------------------------------------------------------------------


def flag(default, text: str):
    """A field of `Config`, which is a flag with this default and help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    data: str = flag("", "text file, folder of .txt, .jsonl or .bin; empty: Python's own prose")
    tokenizer: str = flag("bpe:1024", "byte, bpe:N, tokenizer.json, .tiktoken or tiktoken's name")
    d_model: int = flag(192, "width of the residual stream; paper: 768 (125M) to 2,048 (1.3B)")
    n_layer: int = flag(4, "layers of attention and MLP; paper: 12 to 24")
    n_head: int = flag(3, "attention heads; paper: 12 to 32")
    n_kv_head: int = flag(0, "heads of keys and values, shared by query heads; 0: n_head")
    d_ff: int = flag(0, "width in the MLP; 0: 8/3 d_model to a multiple of 128, gelu: 4 d_model")
    position: str = flag("rope", "rope, or learned as in the vanilla Transformer")
    mlp: str = flag("swiglu", "swiglu, or gelu as in the vanilla Transformer")
    norm: str = flag("rmsnorm", "rmsnorm, or layernorm with biases as in the vanilla Transformer")
    steps: int = flag(1400, "optimiser steps; paper: 4,800 (125M)")
    batch: int = flag(4, "sequences a step; paper: 256, half a million tokens")
    accumulate: int = flag(1, "micro-batches of a process's part of the batch, to save memory")
    length: int = flag(0, "tokens a sequence; 0: 256, to evaluate the checkpoint's; paper: 2,048")
    lr: float = flag(3e-3, "peak learning rate; paper: 3e-3 (125M), five times GPT-3's")
    min_lr: float = flag(1e-5, "learning rate at the end of the cosine")
    warmup: float = flag(0.1, "part of the steps in which the rate rises")
    weight_decay: float = flag(0.1, "of matrices; none for norms and biases")
    beta2: float = flag(0.95, "AdamW's second beta; the first is 0.9")
    clip: float = flag(1.0, "largest norm of the gradient; 0: no clipping")
    document_resets: bool = flag(False, "cut attention where a document begins; not the paper's")
    eval_every: int = flag(200, "steps from one evaluation and checkpoint to the next")
    eval_tokens: int = flag(20_000, "validation tokens for these, 0 for all; the last takes all")
    compile: bool = flag(False, "torch.compile the model")
    checkpoint: str = flag("", "sample, eval: checkpoint or folder; empty: OUT/checkpoint.pt")
    prompt: str = flag("The class", "sample: text to go on from")
    tokens: int = flag(300, "sample: tokens to write")
    temperature: float = flag(0.8, "sample: 0 takes the likeliest token")
    top_k: int = flag(0, "sample: draw from the k likeliest tokens; 0: from all")
    seed: int = flag(0, "seed of initialisation, data order and samples")
    device: str = flag("auto", "auto (cuda, mps or cpu, the first there is) or a torch device")
    out: str = flag("out/transformer", "folder of checkpoint, metrics, result and picture")
    resume: bool = flag(False, "go on from OUT/checkpoint.pt")
    smoke: bool = flag(False, "a tiny model for a few steps, written to OUT/smoke: does it run?")

    def __post_init__(self):
        positive = ("d_model", "n_layer", "n_head", "steps", "batch", "accumulate", "eval_every")
        for name, value in dataclasses.asdict(self).items():
            least = 1 if name in positive else 0
            if not isinstance(value, str) and not value >= least:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")


DEFAULT_LENGTH = 256
SMOKE = {"d_model": 16, "n_layer": 2, "n_head": 2, "steps": 4, "batch": 4, "length": 64}
SMOKE["tokenizer"] = "byte"
JOBS = {"train": train, "sample": sample, "eval": evaluate_checkpoint}


def main(argv: list[str] | None = None) -> int:
    """Run a job. Returns 0; 1 where numbers are not finite, 2 for bad input, 130 after Ctrl-C."""
    suppress = {"argument_default": argparse.SUPPRESS}  # so that `given` has what was written out
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], **suppress)
    parser.add_argument("job", nargs="?", default="train", choices=JOBS, help="what to do")
    for field in dataclasses.fields(Config):
        options = {"type": type(field.default)}
        if isinstance(field.default, bool):
            options = {"action": "store_true"}
        text = f"{field.metadata['help']}; default: {field.default!r}"
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=text, **options)
    given = vars(parser.parse_args(argv))
    if given.get("smoke"):
        given = SMOKE | given | {"out": f"{given.get('out', Config.out)}/smoke"}
    sys.stdout.reconfigure(errors="replace")  # where it is not UTF-8
    try:
        JOBS[given.pop("job")](Config(**given))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # one line; `python -X dev` shows where it came from
        if sys.flags.dev_mode:
            raise
        text = f"{Path(__file__).name}: {type(error).__name__}: {error}"
        if isinstance(error, ImportError):
            text += f"; pip install {error.name}"
        print(" ".join(text.split())[:400], file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
