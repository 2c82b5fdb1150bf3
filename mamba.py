"""Mamba: a language model on selective state spaces. Train, sample, evaluate.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752.

    python mamba.py                       trains on Python's documentation: 5 minutes on two cores
    python mamba.py sample --prompt "A"   writes text with that checkpoint: seconds
    python mamba.py eval --data FILE      scores that checkpoint on your text: seconds

code      shape      paper
u, y      (B, L, D)  x, y: input and output of the state space model; D here is the paper's E D
delta     (B, L, D)  Δ: step size; large takes the input in, small ignores it
A         (D, N)     A: diagonal and negative; exp(Δ A) is the share of the state that is kept
B, C      (B, L, N)  B, C: how the input enters the state, and how the state is read
D, z      (D,), (B, L, D)  the skip connection, and the gating branch of Figure 3
state, h  (B, D, N)  h_t: all that the model remembers of its past

Differences from the paper: B is discretised by Euler's rule, as in the official code, not by the
zero-order hold of equation 4. The fused scan is C on a CPU and Triton on a GPU, not CUDA. Model,
text and steps are a laptop's, and so the rate is higher. Not included: Mamba-2, hybrids, beams.
"""

from __future__ import annotations

import argparse
import ast
import base64
import collections
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import lzma
import math
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # threads that wait must soon sleep: tests/bench

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ----- The selective scan -------------------------------------------------------------------------


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    initial_state: Tensor | None = None, starts: Tensor | None = None,
    return_final_state: bool = False, backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Algorithm 2's SSM: h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t.

    u, delta, z: (B, L, D); A: (D, N), negative; B, C: (B, L, N); D, delta_bias: (D,).
    initial_state: (B, D, N), else zeros. starts: (B, L) bool, True where a document begins, which
    sees nothing of what came before. delta_bias is added to delta, and delta_softplus makes it
    positive. z gates the result: y * SiLU(z). backend: auto, sequential, chunked or fused.
    Returns y (B, L, D) in u's dtype, and with return_final_state the last state (B, D, N). Computes
    in float32, for float64 u in float64. Raises ValueError for shapes that do not fit.
    """
    check_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, starts)
    dtype = torch.promote_types(u.dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        x, delta, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
        if delta_bias is not None:
            delta = delta + delta_bias.to(dtype)
        if delta_softplus:
            delta = F.softplus(delta)
        # Where a document begins the step size is 1e30: exp(1e30 A) is 0, and the past is gone.
        decay = delta if starts is None else delta.masked_fill(starts.unsqueeze(-1), 1e30)
        h = A.new_zeros(len(u), *A.shape) if initial_state is None else initial_state.to(dtype)
        scan = choose_scan(backend, x, A)
        y, h = scan(delta * x, decay, A, B, C, h)
        if D is not None:
            y = torch.addcmul(y, x, D.to(dtype))
        if z is not None:
            y = y * F.silu(z.to(dtype))
    return (y.to(u.dtype), h) if return_final_state else y.to(u.dtype)


def sequential_scan(x, delta, A, B, C, h):
    """Equation 2, position by position; the other backends compute the same, faster.

    x, which is delta * u here, and delta: (B, L, D); A: (D, N); B, C: (B, L, N); h, the state
    before: (B, D, N). Returns y (B, L, D) and the last state (B, D, N).
    """
    ys = []
    for t in range(x.shape[1]):
        A_bar = torch.exp(delta[:, t, :, None] * A)  # equation 4: (B, D, N), between 0 and 1
        h = A_bar * h + x[:, t, :, None] * B[:, t, None, :]  # B by Euler's rule
        ys.append((h * C[:, t, None, :]).sum(-1))
    return torch.stack(ys, dim=1), h


def selective_scan_step(
    state, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False
) -> tuple[Tensor, Tensor]:
    """`selective_scan` at one position: u, delta, z (B, D), B, C (B, N) -> y (B, D) and state."""
    dtype = u.dtype
    u, delta, B, C = (tensor.to(state.dtype) for tensor in (u, delta, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    A_bar = torch.exp(delta.unsqueeze(-1) * A)
    state = torch.addcmul((delta * u).unsqueeze(-1) * B.unsqueeze(1), A_bar, state)
    y = (state @ C.unsqueeze(-1)).squeeze(-1)
    if D is not None:
        y = torch.addcmul(y, D, u)
    if z is not None:
        y = y * F.silu(z.to(state.dtype))
    return y.to(dtype), state


# ----- The block and the model --------------------------------------------------------------------


@dataclass(frozen=True)
class MambaConfig:
    """The model's sizes; the defaults are the paper's 130M model."""

    d_model: int = 768  # width of the residual stream
    n_layer: int = 24
    vocab_size: int = 50280  # ids: rows of the embedding, and logits
    d_state: int = 16  # N, states a channel
    d_conv: int = 4  # taps of the convolution
    expand: int = 2  # the block is this much wider than the residual stream
    dt_rank: int | str = "auto"  # R; auto is d_model / 16, rounded up
    tie_embeddings: bool = True  # the head's weight is the embedding's
    norm_eps: float = 1e-5

    @property
    def rank(self) -> int:
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank


def causal_conv(x, weight, bias, window=None, starts=None) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution: y_t = bias + sum_i weight_i x_{t-W+1+i} within t's document.

    x: (B, L, E); weight: (E, 1, W); bias: (E,); window: (B, W-1, E), the inputs before x, zeros if
    None; starts: (B, L) bool. Returns y (B, L, E) and the window before the next inputs.
    """
    L, W = x.shape[1], weight.shape[-1]
    if window is None:
        window = x.new_zeros(len(x), W - 1, x.shape[2])
    x, weight = torch.cat([window.to(x.dtype), x], dim=1), weight.to(x.dtype)  # x: (B, W-1+L, E)
    if starts is None:
        y = F.conv2d(x.mT.unsqueeze(2), weight.unsqueeze(2), groups=len(weight)).squeeze(2).mT
    else:
        document = F.pad(starts.cumsum(1), (W - 1, 0)).unsqueeze(-1)  # which one an input is of
        y = torch.zeros_like(x[:, W - 1 :])
        for i in range(W):
            other = document[:, i : i + L] != document[:, W - 1 :]
            y = y + weight[:, 0, i] * x[:, i : i + L].masked_fill(other, 0.0)
        x = x.masked_fill(document != document[:, -1:], 0.0)
    return y + bias.to(x.dtype), x[:, L:]


class MambaBlock(nn.Module):
    """Figure 3: expand, convolve, select, scan, gate, contract. Names are the checkpoints'."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        N, R, E = config.d_state, config.rank, config.expand * config.d_model  # E: block's width
        self.in_proj = nn.Linear(config.d_model, 2 * E, bias=False)
        self.conv1d = nn.Conv1d(E, E, config.d_conv, groups=E, bias=True)
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, E, bias=True)
        self.A_log = nn.Parameter(torch.arange(1.0, N + 1).log().repeat(E, 1))  # S4D-real
        self.D = nn.Parameter(torch.ones(E))
        self.out_proj = nn.Linear(E, config.d_model, bias=False)
        with torch.no_grad():  # the official initialisation; the rest keeps PyTorch's defaults
            nn.init.uniform_(self.dt_proj.weight, -(R**-0.5), R**-0.5)
            dt = torch.exp(torch.empty(E).uniform_(math.log(0.001), math.log(0.1)))
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(bias) = dt
            nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
            self.out_proj.weight /= math.sqrt(config.n_layer)

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Algorithm 2's selection: x (..., E) -> delta (..., E), A (E, N), B and C (..., N).

        delta is still without its bias and softplus, which the scan adds.
        """
        rank, N = self.dt_proj.in_features, self.A_log.shape[1]
        delta, B, C = self.x_proj(x).split([rank, N, N], dim=-1)
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        return F.linear(delta, self.dt_proj.weight), A, B, C

    def forward(self, x: Tensor, state=None, starts: Tensor | None = None):
        """x (B, L, d_model) -> y of that shape, and the state after it.

        A state is the pair of the convolution's window (B, W-1, E) and the SSM's state (B, E, N).
        """
        window, h = (None, None) if state is None else state
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, E) each
        x, window = causal_conv(x, self.conv1d.weight, self.conv1d.bias, window, starts)
        x = F.silu(x)
        delta, A, B, C = self.select(x)
        y, h = selective_scan(
            x, delta, A, B, C, self.D, z, self.dt_proj.bias, delta_softplus=True,
            initial_state=h, starts=starts, return_final_state=True,
        )  # fmt: skip
        return self.out_proj(y), (window, h)

    def step(self, x: Tensor, state):
        """`forward` at one position, x (B, d_model), in constant time and memory."""
        window, h = state
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, E) each
        window = torch.cat([window, x.unsqueeze(1)], dim=1)  # (B, W, E)
        x = (window * self.conv1d.weight.squeeze(1).t()).sum(1)
        x = F.silu(x + self.conv1d.bias)
        delta, A, B, C = self.select(x)
        y, h = selective_scan_step(h, x, delta, A, B, C, self.D, z, self.dt_proj.bias, True)
        return self.out_proj(y), (window[:, 1:], h)


class Mamba(nn.Module):
    """The language model: embedding, layers of norm and block, norm, head."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config, self.backbone = config, nn.Module()
        self.backbone.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.backbone.layers = nn.ModuleList(nn.Module() for _ in range(config.n_layer))
        for layer in self.backbone.layers:
            layer.norm = nn.RMSNorm(config.d_model, config.norm_eps)
            layer.mixer = MambaBlock(config)
        self.backbone.norm_f = nn.RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(self.backbone.embeddings.weight, std=0.02)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    def forward(self, tokens, state=None, starts=None, return_state=False, targets=None):
        """tokens (B, L) -> logits (B, L, V); with targets (B, L) their mean loss in nats instead.

        starts (B, L) bool marks where a document begins. return_state adds the state from which the
        next call goes on: for each layer the window (B, W-1, E) and the SSM's state (B, E, N).
        """
        precision = contextlib.nullcontext()
        if tokens.is_cuda and targets is not None:
            precision = torch.autocast("cuda", torch.bfloat16)  # around float32 parameters
        with precision:
            x, state = self.hidden(tokens, state, starts)
            result = self.lm_head(x) if targets is None else self.loss(x, targets)
        return (result, state) if return_state else result

    def hidden(self, tokens, state=None, starts=None) -> tuple[Tensor, list]:
        """tokens (B, L), or (B,) for a step -> what the head reads (..., d_model), and state."""
        x, after, dtype = self.backbone.embeddings(tokens), [], self.lm_head.weight.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))  # the residual stream
        for i, layer in enumerate(self.backbone.layers):
            y, before = layer.norm(x.to(dtype)), None if state is None else state[i]
            if tokens.ndim == 1:
                y, block_state = layer.mixer.step(y, before)
            else:
                y, block_state = layer.mixer(y, before, starts)
            x = x + y
            after.append(block_state)
        return self.backbone.norm_f(x.to(dtype)), after

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy; on a CPU by pieces, so that the logits never exist as a whole."""
        x, targets, pieces = x.flatten(0, 1), targets.flatten(), None
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            pieces = nn.LinearCrossEntropyOptions(512, chunking_method=None, acc_policy="balanced")
        return F.linear_cross_entropy(x, self.lm_head.weight, targets, options=pieces)

    # ----- Generation

    def step(self, token: Tensor, state: list) -> tuple[Tensor, list]:
        """token (B,) -> logits (B, V) and the next state, in constant time and memory a token."""
        x, state = self.hidden(token, state)
        return self.lm_head(x), state

    @torch.inference_mode()
    def generate(
        self, tokens, max_new_tokens, temperature=1.0, top_k=None, generator=None
    ) -> Tensor:
        """tokens (B, L) -> (B, L + max_new_tokens): one parallel prefill, then step by step.

        Raises FloatingPointError where the logits are not finite.
        """
        if tokens.numel() == 0:
            raise ValueError("the prompt is empty: give at least one token")
        x, state = self.hidden(tokens)
        logits = self.lm_head(x[:, -1])
        for i in range(max_new_tokens):
            if not logits.isfinite().all():
                raise FloatingPointError(f"the logits of new token {i + 1} are not finite")
            token = sample_token(logits, temperature, top_k, generator)
            tokens = torch.cat([tokens, token.unsqueeze(1)], dim=1)
            logits, state = self.step(token, state)
        return tokens


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


# ----- The parallel scan --------------------------------------------------------------------------


class ParallelScan(torch.autograd.Function):
    """`sequential_scan` in pure PyTorch, by chunks of T positions, with its own backward pass.

    Exponentials and products are taken for a whole chunk; only h_t = a_t h_{t-1} + b_t goes one
    position at a time, over all channels and states. A chunk's arrays (B, T, N, D) stay in cache,
    and the states (B, L, D, N) never exist as a whole: as in section 3.3.2, the backward pass
    computes them again, from each chunk's first state. Nothing divides by a decay, which may be 0.
    """

    CHUNK = 400_000  # elements of an array, so that a few of them fit the cache

    @staticmethod
    def states(x, delta, A, B, h):
        """Decays a_t and states h_t of a chunk, (B, T, N, D) each, from h (B, N, D) before it."""
        a = (delta.unsqueeze(2) * A).exp_()
        hs = x.unsqueeze(2) * B.unsqueeze(3)
        for a_t, h_t in zip(a.unbind(1), hs.unbind(1), strict=True):
            h = h_t.addcmul_(a_t, h)
        return a, hs

    @staticmethod
    def forward(ctx, x, delta, A, B, C, h0):
        A, h = A.t().contiguous(), h0.mT.contiguous()  # (N, D), (B, N, D): channels last
        ctx.T = max(8, min(128, ParallelScan.CHUNK // h.numel()))
        y, first_states = torch.empty_like(x), []
        for t in range(0, x.shape[1], ctx.T):
            now = slice(t, t + ctx.T)
            first_states.append(h)
            _, hs = ParallelScan.states(x[:, now], delta[:, now], A, B[:, now], h)
            y[:, now] = (C[:, now, None] @ hs).squeeze(2)
            h = hs[:, -1].clone()
        ctx.save_for_backward(x, delta, A, B, C, *first_states)
        return y, h.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def backward(ctx, dy, dh):
        x, delta, A, B, C, *first_states = ctx.saved_tensors
        dx, ddelta, dB, dC = (torch.empty_like(tensor) for tensor in (x, delta, B, C))
        dA, carry = torch.zeros_like(A), dh.mT  # carry: the gradient from the next chunk
        for k in reversed(range(len(first_states))):
            now, h0 = slice(k * ctx.T, (k + 1) * ctx.T), first_states[k]
            a, hs = ParallelScan.states(x[:, now], delta[:, now], A, B[:, now], h0)
            dC[:, now] = (hs @ dy[:, now, :, None]).squeeze(3)
            g = dy[:, now, None] * C[:, now, :, None]  # g_t, of h_t, is C_t dy_t + a_{t+1} g_{t+1}
            g[:, -1] += carry
            for t in range(g.shape[1] - 2, -1, -1):
                g[:, t].addcmul_(a[:, t + 1], g[:, t + 1])
            carry = a[:, 0] * g[:, 0]
            dB[:, now] = (g @ x[:, now, :, None]).squeeze(3)
            dx[:, now] = (B[:, now, None] @ g).squeeze(2)
            g.mul_(a)[:, 1:].mul_(hs[:, :-1])  # now of delta_t A, since a_t = exp(delta_t A):
            g[:, 0].mul_(h0)  # g_t a_t h_{t-1}
            ddelta[:, now] = (g * A).sum(2)
            dA += g.mul_(delta[:, now, None]).sum((0, 1))
        return dx, ddelta, dA.t(), dB, dC, carry.mT


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
    """AdamW; weight decay for matrices only, and not for A_log."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim > 1 and not name.endswith("A_log")
        (decayed if matrix else others).append(parameter)
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
def evaluate(model: Mamba, corpus: Corpus, config: Config, limit: int = 0) -> dict:
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
        sizes = MambaConfig(config.d_model, config.n_layer, corpus.vocab_size, config.d_state)
        model = Mamba(sizes)
    check_run(config, corpus, saved)
    optimizer, history = make_optimizer(model.to(device), config), saved["history"]
    if config.resume:
        optimizer.load_state_dict(saved["optimizer"])
    forward = model
    if config.compile:
        SCANS.update({name: torch.compiler.disable(scan) for name, scan in SCANS.items()})  # loops
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


def load_model(config: Config) -> tuple[Mamba, Tokenizer | str, dict]:
    """The model in config.checkpoint, else OUT/checkpoint.pt, a tokenizer, and what else is saved.

    The checkpoint may be a model folder. Where it has no tokenizer, it is config's, by its name.
    """
    path = Path(config.checkpoint or f"{config.out}/checkpoint.pt")
    if path.is_dir():
        own = path / "tokenizer.json"
        tokenizer = load_tokenizer(str(own), []) if own.is_file() else config.tokenizer
        return read_folder(path), tokenizer, {}
    saved = torch.load(path, "cpu", weights_only=True)  # data only, never code
    model = Mamba(MambaConfig(**saved["model_config"]))
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
    options = (config.tokens, config.temperature, config.top_k, generator)
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


# ----- Appendix: the fused scans ------------------------------------------------------------------


class FusedScan(torch.autograd.Function):
    """`sequential_scan` as one pass in C or Triton, in float32; the states never leave the cache.

    As in section 3.3.2 the forward pass keeps few states, one in BLOCK positions, and the backward
    pass computes the others again. Each tile of channels adds up its own share of dB and dC.
    """

    TILE, BLOCK = 64, 16  # channels side by side, positions

    @staticmethod
    def forward(ctx, x, delta, A, B, C, h0):
        A = A.t() / math.log(2)  # the kernels take exponentials to base 2
        x, delta, A, B, C = (tensor.contiguous() for tensor in (x, delta, A, B, C))
        h, y = h0.mT.clone(memory_format=torch.contiguous_format), torch.empty_like(x)  # (B, N, D)
        blocks, saved = -(-x.shape[1] // FusedScan.BLOCK), None
        if any(ctx.needs_input_grad):
            saved = h.new_empty(len(h), blocks, *A.shape)
        FusedScan.run(x, delta, A, B, C, saved, h, y)
        ctx.save_for_backward(x, delta, A, B, C, saved)
        return y, h.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh):
        x, delta, A, B, C, saved = ctx.saved_tensors
        g = dh.mT.clone(memory_format=torch.contiguous_format)
        dx, ddelta, dA = (torch.empty_like(tensor) for tensor in (x, x, g))
        dB, dC = (x.new_empty(-(-len(A.t()) // FusedScan.TILE), *B.shape) for _ in range(2))
        FusedScan.run(x, delta, A, B, C, saved, g, None, dy.contiguous(), dx, ddelta, dA, dB, dC)
        return dx, ddelta, dA.sum(0).t(), dB.sum(0), dC.sum(0), g.mT

    @staticmethod
    def run(x, delta, A, B, C, saved, state, y, *gradients):
        """Fill y and saved, and take state along; with gradients (dy, dx, ...) take it back."""
        tensors = (x, delta, A, B, C, saved, state, y, *(gradients or [None] * 6))
        (batch, L, D), N, T, W = x.shape, len(A), FusedScan.BLOCK, FusedScan.TILE
        if x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
            tiles, S = -(-D // W), 1 << (N - 1).bit_length()
            memory = x.new_empty(batch, tiles, T, S, W) if gradients else None
            with torch.cuda.device_of(x):
                kernel = triton_kernel()[tiles, batch]
                kernel(*tensors, memory, L, D, N, T=T, W=W, S=S, num_warps=2)
        else:
            sizes = map(ctypes.c_int64, (torch.get_num_threads(), batch, L, D, N))
            addresses = [None if v is None else ctypes.c_void_p(v.data_ptr()) for v in tensors]
            c_library().scan(*sizes, *addresses)


C_SOURCE = r"""
#include <stdint.h>
#include <string.h>
#define EACH _Pragma("omp simd") for (int w = 0; w < W; w++)  /* channel of a tile */
typedef float row[W] __attribute__((aligned(64)));
typedef const float *in;

static inline float exp2_(float x) {  /* by its whole part and, by a polynomial, the rest */
    union { float f; int32_t i; } n, r;
    x = x < -127.f ? -127.f : x > 128.f ? 128.f : x;
    n.f = x + 12582912.f;  /* 1.5 x 2^23 rounds */
    float f = x - (n.f - 12582912.f);
    r.f = .0555033247f + f * (.00961843736f + f * (.00133988744f + f * .000153533619f));
    r.f = 1.f + f * (.693147203f + f * (.240226479f + f * r.f));
    r.i += (int32_t)((uint32_t)n.i << 23);
    return r.f;
}
static inline void load(float *to, in from, int m) { EACH to[w] = w < m ? from[w] : 0.f; }
static inline void store(float *to, in from, int m) { memcpy(to, from, m * sizeof *to); }
static inline void fetch(float *to, in from, int m, int64_t next) {
    for (int w = 0; w < m; w += 16) __builtin_prefetch(from + next + w);
    load(to, from, m);
}

/* n positions of a tile: takes h along, y += C_t h_t; keeps each a_t and h_{t-1} where asked to. */
static void block(int n, int64_t N, row *x, row *delta, row *A, in B, in C, row *h, row *y,
                  row *as, row *befores) {
    for (int64_t i = 0; i < N; i++) {
        row a, now;
        memcpy(now, h[i], sizeof now);
        for (int t = 0; t < n; t++) {
            float b = B[t * N + i], c = C[t * N + i];
            EACH a[w] = exp2_(delta[t][w] * A[i][w]);
            if (as) memcpy(as[i * T + t], a, sizeof a), memcpy(befores[i * T + t], now, sizeof now);
            EACH { now[w] = a[w] * now[w] + x[t][w] * b; y[t][w] += c * now[w]; }
        }
        memcpy(h[i], now, sizeof now);
    }
}

/* A thread takes tiles of W channels, each from the first position to the last, and `state` is h.
   With dy it goes back instead, and state is g, the gradient of a_{t+1} h_t, which comes from the
   future; each block of T positions starts from its saved state. dB and dC are a tile's share. */
void scan(int64_t threads, int64_t batch, int64_t L, int64_t D, int64_t N, in x, in delta, in A,
          in B, in C, float *saved, float *state, float *y, in dy, float *dx, float *ddelta,
          float *dA, float *dB, float *dC) {
    int64_t blocks = (L + T - 1) / T, next = dy ? -T * D : T * D;
    _Pragma("omp parallel for collapse(2) num_threads(threads)")
    for (int64_t b = 0; b < batch; b++) for (int64_t d = 0; d < D; d += W) {
        int m = D - d < W ? (int)(D - d) : W;
        row As[N], dAs[N], hs[N], gs[N], as[dy ? N * T : 1], befores[dy ? N * T : 1];
        row xs[T], deltas[T], ys[T], dys[T], dxs[T], ddeltas[T];
        memset(dAs, 0, sizeof dAs);
        for (int64_t i = 0; i < N; i++) load(As[i], A + i * D + d, m);
        for (int64_t i = 0; i < N; i++) load(dy ? gs[i] : hs[i], state + (b * N + i) * D + d, m);
        for (int64_t step = 0; step < blocks; step++) {
            int64_t k = dy ? blocks - 1 - step : step, t0 = b * L + k * T;
            int n = L - k * T < T ? (int)(L - k * T) : T;
            for (int64_t i = 0; saved && i < N; i++) {
                float *place = saved + ((b * blocks + k) * N + i) * D + d;
                if (dy) load(hs[i], place, m); else store(place, hs[i], m);
            }
            for (int t = 0; t < n; t++) {
                int64_t at = (t0 + t) * D + d;
                fetch(xs[t], x + at, m, next); fetch(deltas[t], delta + at, m, next);
                EACH ys[t][w] = dxs[t][w] = ddeltas[t][w] = 0.f;
                if (dy) fetch(dys[t], dy + at, m, next);
            }
            block(n, N, xs, deltas, As, B + t0 * N, C + t0 * N, hs, ys, dy ? as : 0, befores);
            for (int t = 0; t < n && !dy; t++) store(y + (t0 + t) * D + d, ys[t], m);
            if (!dy) continue;
            for (int64_t i = 0; i < N; i++) for (int t = n - 1; t >= 0; t--) {
                int64_t at = (t0 + t) * N + i, share = d / W * batch * L * N + at;
                float Bi = B[at], Ci = C[at], sum_B = 0.f, sum_C = 0.f;
                float *before = befores[i * T + t], *h = t + 1 < n ? before + W : hs[i];
                _Pragma("omp simd reduction(+ : sum_B, sum_C)") for (int w = 0; w < W; w++) {
                    float dh = gs[i][w] + Ci * dys[t][w];
                    gs[i][w] = dh * as[i * T + t][w];
                    float dlog = gs[i][w] * before[w];  /* of delta_t A = log a_t */
                    sum_B += dh * xs[t][w]; sum_C += dys[t][w] * h[w]; dxs[t][w] += dh * Bi;
                    ddeltas[t][w] += dlog * As[i][w]; dAs[i][w] += dlog * deltas[t][w];
                }
                dB[share] = sum_B; dC[share] = sum_C;
            }
            for (int t = 0; t < n; t++) store(dx + (t0 + t) * D + d, dxs[t], m);
            for (int t = 0; t < n; t++) {
                EACH ddeltas[t][w] *= .693147181f;  /* A was divided by log 2 */
                store(ddelta + (t0 + t) * D + d, ddeltas[t], m);
            }
        }
        for (int64_t i = 0; i < N; i++) store(state + (b * N + i) * D + d, dy ? gs[i] : hs[i], m);
        for (int64_t i = 0; dy && i < N; i++) store(dA + (b * N + i) * D + d, dAs[i], m);
    }
}
"""


@functools.cache
def c_library() -> ctypes.CDLL:
    """C_SOURCE, compiled by $CC or cc in a second. Raises OSError."""
    command = [*shlex.split(os.environ.get("CC", "cc")), "-O3", "-march=native", "-fPIC", "-shared"]
    command += ["-fno-math-errno", "-fno-trapping-math"]  # else it does not vectorise
    command += [f"-DW={FusedScan.TILE}", f"-DT={FusedScan.BLOCK}", "-x", "c", "-"]
    with tempfile.TemporaryDirectory() as folder:
        for more in (["-fopenmp", "-mprefer-vector-width=512"], ["-fopenmp"], ["-fopenmp-simd"]):
            build = [*command, *more, "-o", f"{folder}/scan.so"]
            done = subprocess.run(build, input=C_SOURCE, capture_output=True, text=True)
            if done.returncode == 0:
                return ctypes.CDLL(f"{folder}/scan.so")
    raise OSError(f"{command[0]} failed: {done.stderr.strip()[-100:]}")


def triton_scan(
    x, delta, A, B, C, saved, state, y, dy, dx, ddelta, dA, dB, dC, memory, L, D, N,
    T: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The scan of C_SOURCE for Triton: a program a tile; h and g (N, W) stay in registers."""
    k, b, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    d, n, blocks = k * W + tl.arange(0, W), tl.arange(0, S), tl.cdiv(L, T)
    at, tile = n[:, None] * D + d[None, :], (n[:, None] < N) & (d[None, :] < D)
    A, h = tl.load(A + at, tile, 0.0), tl.load(state + b * N * D + at, tile, 0.0)
    g, sum_A = h, tl.zeros([S, W], tl.float32)
    if dy is not None:
        memory += (b * tl.num_programs(0) + k) * T * S * W + n[:, None] * W
        memory += tl.arange(0, W)[None, :]
    for step in range(blocks):
        block = step if dy is None else blocks - 1 - step
        if saved is not None and dy is None:
            tl.store(saved + (b * blocks + block) * N * D + at, h, tile)
        if dy is not None:
            h = tl.load(saved + (b * blocks + block) * N * D + at, tile, 0.0)
            tl.debug_barrier()  # what one thread stores in memory another may load
        for t in range(block * T, tl.minimum(block * T + T, L)):
            channel, number = (b * L + t) * D + d, (b * L + t) * N + n
            if dy is not None:
                tl.store(memory + (t - block * T) * S * W, h)
            x_t, delta_t = tl.load(x + channel, d < D, 0.0), tl.load(delta + channel, d < D, 0.0)
            B_t, C_t = tl.load(B + number, n < N, 0.0), tl.load(C + number, n < N, 0.0)
            h = tl.exp2(delta_t[None, :] * A) * h + x_t[None, :] * B_t[:, None]
            if dy is None:
                tl.store(y + channel, tl.sum(C_t[:, None] * h, 0), d < D)
        if dy is not None:
            tl.debug_barrier()
            for back in range(tl.minimum(T, L - block * T)):
                t = tl.minimum(block * T + T, L) - 1 - back
                channel, number = (b * L + t) * D + d, (b * L + t) * N + n
                share = k * batch * L * N + number
                before = tl.load(memory + (t - block * T) * S * W)
                x_t, delta_t = tl.load(x + channel, d < D, 0), tl.load(delta + channel, d < D, 0)
                B_t, C_t = tl.load(B + number, n < N, 0), tl.load(C + number, n < N, 0)
                dy_t = tl.load(dy + channel, d < D, 0)
                dh = g + C_t[:, None] * dy_t[None, :]
                g = dh * tl.exp2(delta_t[None, :] * A)
                dlog = g * before  # of delta_t A = log a_t
                sum_A += dlog * delta_t[None, :]
                tl.store(dx + channel, tl.sum(dh * B_t[:, None], 0), d < D)
                tl.store(ddelta + channel, 0.693147181 * tl.sum(dlog * A, 0), d < D)
                tl.store(dB + share, tl.sum(dh * x_t[None, :], 1), n < N)
                tl.store(dC + share, tl.sum(h * dy_t[None, :], 1), n < N)
                h = before
    if dy is None:
        tl.store(state + b * N * D + at, h, tile)
    else:
        tl.store(state + b * N * D + at, g, tile)
        tl.store(dA + b * N * D + at, sum_A, tile)


@functools.cache
def triton_kernel():
    """`triton_scan` as a Triton kernel, compiled when first called; before, `tl` is undefined."""
    global tl
    import triton
    import triton.language as tl

    return triton.jit(triton_scan)


SCANS = {"sequential": sequential_scan, "chunked": ParallelScan.apply, "fused": FusedScan.apply}


def choose_scan(backend: str, x: Tensor, A: Tensor) -> Callable:
    """The function (x, delta, A, B, C, h) -> (y, h) of a backend; auto is the fastest there is."""
    device = x.device.type
    fits = x.dtype == torch.float32 and A.shape[1] <= 128 and device in ("cpu", "cuda")
    if backend == "auto":
        backend = "fused" if fits and can_compile(device) else "chunked"
    if backend not in SCANS or (backend == "fused" and not fits):
        wanted = f"backend {backend!r} must be auto, {', '.join(SCANS)}"
        raise ValueError(f"{wanted}; fused cannot take {x.dtype}, {A.shape[1]} states on {device}")
    return SCANS[backend]


@functools.cache
def can_compile(device: str) -> bool:
    """Whether the fused scan can be had on cpu or cuda; says once why not."""
    try:
        triton_kernel() if device == "cuda" else c_library()
    except (ImportError, OSError) as error:
        print(f"selective_scan is chunked, not fused: {error}", file=sys.stderr)
        return False
    return True


def check_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, starts) -> None:
    """Raise ValueError that names the tensor, its shape and the shape that it must have."""
    if u.ndim != 3 or A.ndim != 2 or u.numel() == 0:
        raise ValueError(f"u {tuple(u.shape)} must be (B, L, D), A {tuple(A.shape)} must be (D, N)")
    sizes = dict(zip("BLDN", (*u.shape, A.shape[1]), strict=True))
    for name, tensor, axes in (
        ("delta", delta, "BLD"), ("z", z, "BLD"), ("A", A, "DN"), ("B", B, "BLN"), ("C", C, "BLN"),
        ("D", D, "D"), ("delta_bias", delta_bias, "D"), ("initial_state", initial_state, "BDN"),
        ("starts", starts, "BL"),
    ):  # fmt: skip
        shape = tuple(sizes[axis] for axis in axes)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must be {shape} for u {tuple(u.shape)}")
    if starts is not None and (starts.dtype != torch.bool or (A >= 0).any()):
        raise ValueError("starts must be bool, and A negative: where it is not, no start forgets")


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
    "d_model": "hidden_size", "n_layer": "num_hidden_layers", "vocab_size": "vocab_size",
    "d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand",
    "dt_rank": "time_step_rank", "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "layer_norm_epsilon",
}  # fmt: skip
PLAIN = {  # what we take for granted, in Hugging Face's config.json, then in the official one
    "model_type": "mamba", "hidden_act": "silu", "use_bias": False, "use_conv_bias": True,
    "d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True, "layer": "Mamba1",
    "bias": False, "conv_bias": True,
}  # fmt: skip


def read_folder(folder: str | Path) -> Mamba:
    """The model in a folder in Hugging Face's layout, by `transformers`, or in the official one.

    Raises ValueError for another model, ValueError or RuntimeError for weights that do not fit.
    """
    folder = Path(folder)
    fields = json.loads((folder / "config.json").read_text("utf-8"))
    fields |= fields.get("ssm_cfg") or {}
    for name, value in PLAIN.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{name} is {fields[name]!r}, a plain Mamba's is {value!r}")
    if "model_type" in fields:
        from transformers import MambaForCausalLM

        options = {"dtype": torch.float32, "output_loading_info": True}
        theirs, report = MambaForCausalLM.from_pretrained(folder, **options)
        if any(report.values()):  # else what is missing would be drawn anew
            raise ValueError(f"the weights do not fit: {report}")
        given = {ours: getattr(theirs.config, name) for ours, name in NAMES.items()}
        tensors = theirs.state_dict()
    else:
        given = {ours: fields[ours] for ours in NAMES if ours in fields}
        tensors = torch.load(folder / "pytorch_model.bin", "cpu", weights_only=True)
        tensors["backbone.embeddings.weight"] = tensors.pop("backbone.embedding.weight")
        tensors.setdefault("lm_head.weight", tensors["backbone.embeddings.weight"])
        given["vocab_size"] = len(tensors["lm_head.weight"])  # which is padded there
    model = Mamba(MambaConfig(**given))
    model.load_state_dict(tensors)
    return model


def write_folder(model: Mamba, folder: str) -> None:
    """Write Hugging Face's layout, by `transformers`."""
    import transformers

    config = dataclasses.replace(model.config, dt_rank=model.config.rank)
    fields = {theirs: getattr(config, ours) for ours, theirs in NAMES.items()}
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # else they are 0
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**fields))
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
    d_model: int = flag(192, "width of the residual stream; paper: 768 (130M) to 2,560 (2.8B)")
    n_layer: int = flag(4, "Mamba blocks; paper: 24 to 64")
    d_state: int = flag(16, "states per channel, N")
    steps: int = flag(1400, "optimiser steps; paper: 4,800 (130M)")
    batch: int = flag(2, "sequences a step; paper: 256, half a million tokens")
    accumulate: int = flag(1, "micro-batches of a process's part of the batch, to save memory")
    length: int = flag(0, "tokens a sequence; 0: 512, to evaluate the checkpoint's; paper: 2,048")
    lr: float = flag(4e-3, "peak learning rate; paper: 3e-3 (130M), five times GPT-3's")
    min_lr: float = flag(1e-5, "learning rate at the end of the cosine")
    warmup: float = flag(0.1, "part of the steps in which the rate rises")
    weight_decay: float = flag(0.1, "of matrices; none for A_log, D, norms and biases")
    beta2: float = flag(0.95, "AdamW's second beta; the first is 0.9")
    clip: float = flag(1.0, "largest norm of the gradient; 0: no clipping")
    document_resets: bool = flag(False, "empty the state where a document begins; not the paper's")
    eval_every: int = flag(200, "steps from one evaluation and checkpoint to the next")
    eval_tokens: int = flag(20_000, "validation tokens for these, 0 for all; the last takes all")
    compile: bool = flag(False, "torch.compile all but the scan")
    checkpoint: str = flag("", "sample, eval: checkpoint or folder; empty: OUT/checkpoint.pt")
    prompt: str = flag("The class", "sample: text to go on from")
    tokens: int = flag(300, "sample: tokens to write")
    temperature: float = flag(0.8, "sample: 0 takes the likeliest token")
    top_k: int = flag(0, "sample: draw from the k likeliest tokens; 0: from all")
    seed: int = flag(0, "seed of initialisation, data order and samples")
    device: str = flag("auto", "auto (cuda, mps or cpu, the first there is) or a torch device")
    out: str = flag("out/mamba", "folder of checkpoint, metrics, result and picture")
    resume: bool = flag(False, "go on from OUT/checkpoint.pt")
    smoke: bool = flag(False, "a tiny model for a few steps, written to OUT/smoke: does it run?")

    def __post_init__(self):
        positive = ("d_model", "n_layer", "d_state", "steps", "batch", "accumulate", "eval_every")
        for name, value in dataclasses.asdict(self).items():
            least = 1 if name in positive else 0
            if not isinstance(value, str) and not value >= least:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")


DEFAULT_LENGTH = 512
SMOKE = {"d_model": 16, "n_layer": 2, "steps": 4, "batch": 4, "length": 64, "tokenizer": "byte"}
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
