# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "tiktoken==0.14.0"]
# ///
"""Mamba: a language model on selective state spaces: train, sample, evaluate.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752.

    python mamba.py                       trains on Python's documentation: 3.3 minutes on two cores, 1.76 bits a byte
    python mamba.py sample --prompt "A"   writes text with that checkpoint, seconds
    python mamba.py eval --data FILE      scores that checkpoint on your text, seconds

code               shape       paper
u, y               (B, L, D)   x, y: input and output of the state space model; D here is the paper's E D
delta              (B, L, D)   Δ: step size; large takes the input in, small ignores it
A                  (D, N)      A: diagonal and negative; exp(Δ A) is what the state keeps of itself
B, C               (B, L, N)   B, C: how the input enters the state, and how the state is read
D                  (D,)        the skip connection, which the paper's algorithms leave out
z                  (B, L, D)   the gating branch of Figure 3
state, h           (B, D, N)   h_t: all that the model remembers
rank               R           rank of the projection s_Δ

`selective_scan_step` is the recurrence, `ChunkedScan` computes it in parallel in pure PyTorch, `FUSED` in C and
`triton_forward` in Triton; `MambaBlock` is Figure 3.

Differences from the paper
1. B is discretised by Euler's rule, as in the official code; equation (4) has the zero-order hold.
2. The fused scan is C on a CPU and Triton on a GPU, where the paper's is CUDA; without their compilers, PyTorch.
3. Model, text and number of steps are a laptop's, and the learning rate 4e-3; the recipe is the paper's otherwise.
4. Where B or C is input-independent (`--selective`) it starts at 1, or from a normal draw, as in S4D; not in the paper.

Not included: Mamba-2, hybrids with attention, tensor parallelism, decoding with a beam.
"""

from __future__ import annotations

import argparse
import ast
import base64
import codecs
import collections
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import heapq
import importlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ----- Config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MambaConfig:
    """The model's sizes; the defaults are the paper's 130M model."""

    d_model: int = 768  # width of the residual stream
    n_layer: int = 24
    vocab_size: int = 50277  # number of logits
    d_state: int = 16  # N, states a channel
    d_conv: int = 4  # taps of the convolution
    expand: int = 2  # E: the block is this much wider than the residual stream
    dt_rank: int | str = "auto"  # R; auto is d_model / 16, rounded up
    dt_min: float = 0.001  # step sizes at the start of training are log-uniform from here
    dt_max: float = 0.1  # to here,
    dt_init_floor: float = 1e-4  # and never less than this
    bias: bool = False  # of in_proj and out_proj
    conv_bias: bool = True
    tie_embeddings: bool = True  # the head's weight is the embedding's
    pad_vocab_size_multiple: int = 8  # the embedding has this many rows, or a multiple
    norm_eps: float = 1e-5
    selective: tuple[str, ...] = ("delta", "B", "C")  # what depends on the input; nothing: time-invariant, as S4D

    def __post_init__(self):
        unknown = set(self.selective) - {"delta", "B", "C"}
        require(not unknown, f"selective {sorted(unknown)}: must be among delta, B and C; leave it out")
        sizes = ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "expand", "rank", "pad_vocab_size_multiple")
        for name in sizes:
            require(getattr(self, name) >= 1, f"{name} {getattr(self, name)}: must be at least 1; raise it")
        require(0 < self.dt_min <= self.dt_max, f"dt_min {self.dt_min}: must be in (0, dt_max]; correct either")

    @property
    def longest(self) -> float:
        """Positions that a text may have."""
        return math.inf

    @property
    def d_inner(self) -> int:
        return int(self.expand * self.d_model)

    @property
    def rank(self) -> int:
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank


def flag(default, text: str):
    """A field of `Config`, and a flag with its default and help."""
    return dataclasses.field(default=default, metadata={"help": text})


LEAST = {
    "steps": 1, "batch": 1, "accumulate": 1, "length": 1, "eval_every": 1, "warmup": 0, "lr": 0, "min_lr": 0, "clip": 0,
    "weight_decay": 0, "top_p": 1e-9, "beta2": 0, "eval_tokens": 0, "tokens": 0, "temperature": 0, "top_k": 0, "seed": 0
}  # fmt: skip
MOST = {"warmup": 1, "beta2": 0.99999, "top_p": 1, "seed": 2**62}


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; each field is a flag."""

    data: str = flag("", "text file, folder, .jsonl or .bin of tokens; empty: the documentation that ships with Python")
    tokenizer: str = flag("bpe:1024", "byte, bpe:N, a tiktoken encoding, a .tiktoken file or a tokenizer.json")
    d_model: int = flag(192, "width of the residual stream; paper: 768 (130M) to 2,560 (2.8B)")
    n_layer: int = flag(4, "Mamba blocks; paper: 24 to 64")
    d_state: int = flag(16, "states a channel, N")
    selective: str = flag("delta,B,C", "which of delta, B, C depend on the input; empty: none, time-invariant as S4D")
    steps: int = flag(960, "optimiser steps; paper: 4,800 (130M)")
    batch: int = flag(8, "sequences a step, over all processes; paper: 256, half a million tokens")
    accumulate: int = flag(1, "micro-batches into which a process splits its part of the batch, to save memory")
    length: int = flag(256, "tokens a sequence; paper: 2,048")
    lr: float = flag(4e-3, "peak learning rate; paper: 3e-3 (130M), five times GPT-3's")
    min_lr: float = flag(1e-5, "learning rate at the end of the cosine")
    warmup: float = flag(0.1, "part of the steps in which the rate rises")
    weight_decay: float = flag(0.1, "of matrices; none for A_log, D, norms and biases")
    beta2: float = flag(0.95, "AdamW's second beta; the first is 0.9")
    clip: float = flag(1.0, "largest norm of the gradient")
    carry_state: bool = flag(False, "let the state run on from batch to batch over contiguous text, gradients cut")
    document_resets: bool = flag(False, "reset the state where a document starts; the paper packs them without")
    eval_every: int = flag(90, "steps from one evaluation and checkpoint to the next")
    eval_tokens: int = flag(20_000, "validation tokens for these, 0 for all; the last one takes all")
    compile: bool = flag(False, "torch.compile all but the scan")
    checkpoint: str = flag("", "sample, eval: checkpoint or folder of either layout; empty: OUT/checkpoint.pt")
    prompt: str = flag("The class", "sample: text to go on from")
    tokens: int = flag(300, "sample: tokens to write")
    temperature: float = flag(0.8, "sample: 0 takes the likeliest token")
    top_k: int = flag(0, "sample: draw from the k likeliest tokens; 0: from all")
    top_p: float = flag(1.0, "sample: draw from the fewest tokens that together are this likely")
    seed: int = flag(0, "seed of initialisation, data order and samples")
    device: str = flag("auto", "auto (cuda, mps or cpu, the first there is) or a torch device")
    out: str = flag("out/mamba", "folder of checkpoint, metrics, result and picture")
    resume: bool = flag(False, "go on from OUT/checkpoint.pt")
    smoke: bool = flag(False, "a tiny model for a few steps, whatever the other flags: does it run?")

    def __post_init__(self):
        for name, least in LEAST.items():
            value, most, words = getattr(self, name), MOST.get(name, math.inf), f"--{name.replace('_', '-')}"
            require(not value < least, f"{words} {value}: must be at least {least}; raise it")
            require(value <= most, f"{words} {value}: must be a number from {least} to {most}; lower it")  # NaN is not


SMOKE = {"d_model": 16, "n_layer": 2, "steps": 4, "batch": 4, "length": 32, "eval_every": 2, "tokenizer": "byte"}
SAMPLING = ("checkpoint", "prompt", "tokens", "temperature", "top_k", "top_p")
FREE = (*SAMPLING, "accumulate", "compile", "device", "out", "resume", "smoke")  # what may differ on resuming


# ----- Shared block: the same text in every script --------------------------------------------------------------------


class UserError(ValueError):
    """Bad input from the user: one line that says the value, the rule and the fix."""


def require(fits: bool, message: str) -> None:
    """Raise UserError with the message unless the input fits."""
    if not fits:
        raise UserError(message)


def add_flags(parser: argparse.ArgumentParser, config_class: type) -> argparse.ArgumentParser:
    """A flag for every field of the config dataclass, with its help and default."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    for field in dataclasses.fields(config_class):
        boolean = isinstance(field.default, bool)
        kind = {"action": argparse.BooleanOptionalAction} if boolean else {"type": type(field.default)}
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=field.default, help=field.metadata["help"], **kind)
    return parser


def pick_device(name: str) -> torch.device:
    """The torch device of that name; auto is cuda, mps or cpu, the first there is."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not to be had here ({str(error).splitlines()[0]}); try auto") from None


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Call write(temporary name), then rename: a crash leaves the old file or the new one, never half of one."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        write(temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save's, of a full disk
        raise OSError(f"{path}: not written, {str(error)[:60]!r}; is the disk full? Make room") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path: Path, value: object) -> None:
    """Write value as indented JSON, atomically."""
    write_atomically(path, lambda name: Path(name).write_text(json.dumps(value, indent=2) + "\n", "utf-8"))


def progress_line(step: int, steps: int, parts: dict[str, str], seconds_a_step: float) -> str:
    """`step 10/400 · loss 3.21 · ... · 4:12 left`: one line, the same in a terminal and in a log."""
    left = round((steps - step) * seconds_a_step)
    return " · ".join([f"step {step:,}/{steps:,}", *map(" ".join, parts.items()), f"{left // 60}:{left % 60:02} left"])


def result_record(config: object, device: torch.device, **rest) -> dict:
    """What a result file says of its run: config, command, seed, versions, device, this script's hash, and `rest`."""
    threads = f"{device.type}, {torch.get_num_threads()} threads"
    record = {"config": dataclasses.asdict(config), "argv": sys.argv, "seed": config.seed}
    record["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    record["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    record["script_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return record | rest


# ----- Data: documents -> tokens -> train and valid ------------------------------------------------------------------

END = "<|endoftext|>"
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # split pattern, as the next
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
    r"\s+(?!\S)|\s"
)


def python_documents() -> list[str]:
    """English technical prose that ships with Python: its language-reference topics, then each module's docstrings.

    Sources are parsed, never imported. Left out: tests, build files, and what some systems package apart.
    """
    from pydoc_data.topics import topics

    skipped = re.compile(
        r"(^|/)(test|tests|(site|dist)-packages|pydoc_data|idlelib|lib2to3|distutils|ensurepip|venv|tkinter|turtle.*|"
        r"config-.*|_sysconfig.*|sitecustomize\.py|__pycache__)(/|$)"
    )

    def docstrings(node: ast.AST, name: str):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield f"{name}\n{text}"
        for child in getattr(node, "body", []):
            yield from docstrings(child, f"{name}.{child.name}" if hasattr(child, "name") else name)

    documents = [text.strip() for _, text in sorted(topics.items())]
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if not skipped.search(file):
            module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            with contextlib.suppress(SyntaxError, ValueError):  # not source of this Python
                documents.append("\n\n".join(docstrings(ast.parse((root / file).read_bytes()), module)))
    return [text for text in documents if len(text) >= 200]


def read_documents(path: str) -> list[str]:
    """Documents of a UTF-8 text file, of a `.jsonl` file with a `text` field, or of all such files under a folder."""
    root, documents = Path(path), []
    require(root.exists(), f"{path}: no such file or folder; give a text file, a folder, a .jsonl or a .bin")
    for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(root).parts):
            continue
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            require(root.is_dir(), f"{path}: must be UTF-8, but byte {error.start} is not; convert it")
            continue  # a picture, an archive
        if file.suffix != ".jsonl":
            documents.append(text)
            continue
        for number, line in enumerate(text.split("\n"), 1):
            try:
                documents.append("".join([json.loads(line)["text"]]) if line.strip() else "")
            except (ValueError, KeyError, TypeError):
                rule = 'must be a JSON object with a string "text"; correct it'
                raise UserError(f"{file}, line {number}: {line[:60]!r} {rule}") from None
    documents = [text for text in documents if text.strip()]
    require(documents != [], f"{path}: holds no text; give UTF-8 text that is not empty")
    return documents


@dataclass
class Tokenizer:
    """Byte-level BPE by tiktoken, and all that a checkpoint needs to make it again."""

    name: str
    ranks: dict[bytes, int]  # id of each token; the lower of two possible merges goes first
    pattern: str  # cuts text into the words that are merged within
    added: list[tuple[str, int, bool]]  # text, id, special: a special one is found in text only when asked for
    nfc: bool = False  # bring text to Unicode's composed form first

    def __post_init__(self):
        ids = {text: i for text, i, _ in self.added}
        self.bytes_of = {i: token for token, i in self.ranks.items()} | {i: text.encode() for text, i in ids.items()}
        self.vocab_size = max(self.bytes_of) + 1
        self.dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        self.separator = next((ids[t] for t in (END, "<|end_of_text|>", "</s>") if t in ids), None)
        try:
            self.encoding = tiktoken.Encoding(
                self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=ids
            )
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            raise UserError(f"tokenizer {self.name!r}: tiktoken refuses it ({str(error)[:80]}); use another") from None

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Ids (n,) of text; special tokens written in it are ordinary text unless `special`. Adds none of its own."""
        found = {t: i for t, i, is_special in self.added if special or not is_special}
        finder = "|".join(re.escape(t) for t in sorted(found, key=len, reverse=True))
        ids: list[int] = []
        for piece in re.split(f"({finder})", text) if found else [text]:
            if piece in found:
                ids.append(found[piece])
            else:
                ids += self.encoding.encode_ordinary(unicodedata.normalize("NFC", piece) if self.nfc else piece)
        return np.array(ids, self.dtype)

    def decode_bytes(self, ids) -> bytes:
        """Bytes of a sequence of ids; an id without a token (padding of the vocabulary) has none."""
        return b"".join(self.bytes_of.get(int(i), b"") for i in ids)

    def decode(self, ids) -> str:
        """Text of a sequence of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_json(self) -> str:
        """The whole tokenizer as JSON, bytes as Latin-1."""
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps(state | {"ranks": {token.decode("latin-1"): i for token, i in self.ranks.items()}})

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The tokenizer that `to_json` wrote."""
        state = json.loads(text)
        return cls(**state | {"ranks": {token.encode("latin-1"): i for token, i in state["ranks"].items()}})


def load_tokenizer(name: str, documents: list[str]) -> Tokenizer:
    """Tokenizer `byte`, `bpe:N` (trained on documents), of a .tiktoken or tokenizer.json file, or named by tiktoken.

    A .tiktoken file has no split pattern and gets cl100k's. Raises ValueError for any other name and for a bad file.
    """
    if name == "byte":
        return Tokenizer(name, {bytes([b]): b for b in range(256)}, r"(?s:.{1,99})", [(END, 256, True)])
    if name.startswith("bpe:"):
        return train_bpe(name, documents)
    if name.endswith((".json", ".tiktoken")):
        require(Path(name).is_file(), f"tokenizer {name!r}: no such file; correct the path")
        if name.endswith(".json"):
            return read_huggingface(name)
        try:
            rows = [line.split() for line in Path(name).read_bytes().splitlines()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
        except ValueError as error:
            raise UserError(f"{name}: each line must be a base64 token and its rank, but {error}; correct it") from None
        require(all(bytes([b]) in ranks for b in range(256)), f"{name}: must rank all 256 single bytes; add them")
        return Tokenizer(name, ranks, CL100K, [(END, max(ranks.values()) + 1, True)])
    choices = f"byte, bpe:N, a .tiktoken file, a tokenizer.json file, {', '.join(tiktoken.list_encoding_names())}"
    require(name in tiktoken.list_encoding_names(), f"tokenizer {name!r}: unknown; choose from {choices}")
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:  # requests' errors are among these
        fix = "connect once (TIKTOKEN_CACHE_DIR keeps the file), or give a local file, byte or bpe:N"
        raise UserError(f"tokenizer {name!r}: the download failed ({type(error).__name__}); {fix}") from None
    added = [(text, i, True) for text, i in encoding._special_tokens.items()]
    return Tokenizer(name, encoding._mergeable_ranks, encoding._pat_str, added)


def train_bpe(name: str, documents: list[str]) -> Tokenizer:
    """Byte-level BPE `bpe:N` of N ids (bytes, merges, separator): join the commonest pair, of equals the smallest."""
    size = int(name[4:]) if name[4:].isdecimal() else 0
    require(size >= 257, f"tokenizer {name!r}: bpe:N needs a whole N >= 257 (256 bytes, a separator); try bpe:1024")
    require(documents != [], f"tokenizer {name!r}: bpe:N learns from text, has none; name a trained tokenizer's file")
    split = importlib.import_module("regex").compile(CL100K).findall  # tiktoken brings it; `re` lacks \p{L}
    words = collections.Counter(word for text in documents for word in split(text))
    parts = [[bytes([b]) for b in word.encode("utf-8", "replace")] for word in words]
    counts, total, places = list(words.values()), collections.Counter(), collections.defaultdict(set)

    def tally(k: int, sign: int) -> set:
        pairs = list(itertools.pairwise(parts[k]))
        for pair in pairs:
            total[pair] += sign * counts[k]
            places[pair].add(k)
        return set(pairs)

    changed = {pair for k in range(len(parts)) for pair in tally(k, 1)}
    ranks, heap = {bytes([b]): b for b in range(256)}, []
    while len(ranks) < size - 1:
        for pair in changed:
            heapq.heappush(heap, (-total[pair], pair))
        count, pair = heapq.heappop(heap) if heap else (0, None)
        require(count < 0, f"tokenizer {name!r}: the text yields only {len(ranks) + 1} ids; lower N or add text")
        changed = set()
        if -count != total[pair]:
            continue  # outdated: pushed again when its count changed
        ranks.setdefault(b"".join(pair), len(ranks))
        for k in places.pop(pair):
            changed |= tally(k, -1)
            word, parts[k] = parts[k], []
            for part in word:
                if parts[k] and (parts[k][-1], part) == pair:
                    parts[k][-1] += part
                else:
                    parts[k].append(part)
            changed |= tally(k, 1)
    return Tokenizer(name, ranks, CL100K, [(END, size - 1, True)])


def read_huggingface(path: str) -> Tokenizer:
    """A Hugging Face `tokenizer.json` of the byte-level BPE kind; what its post-processor adds (BOS, EOS) is left out.

    Raises ValueError that names the settings with which our ids could differ from the `tokenizers` package's.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's alphabet: these bytes as themselves,
    hidden = [b for b in range(256) if b not in shown]  # and these as the letters from U+0100
    byte_of = {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}
    try:
        data = json.loads(Path(path).read_text("utf-8"))
        model, form, cuts, added = data["model"], data["normalizer"], data["pre_tokenizer"] or {}, data["added_tokens"]
        *splits, last = cuts["pretokenizers"] if cuts.get("type") == "Sequence" else [cuts]
        settings = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
        flaws = [f"{key} {model[key]}" for key in settings if model.get(key)]
        flaws += [f"model {model['type']}"] if model.get("type", "BPE") != "BPE" else []
        flaws += [f"normalizer {form['type']}"] if form and form["type"] != "NFC" else []
        whole = ("Split", "Isolated", False)
        flaws += [f"pre_tokenizer {c}" for c in splits if (c["type"], c.get("behavior"), c.get("invert")) != whole]
        flaws += [] if last.get("type") == "ByteLevel" and not last["add_prefix_space"] else [f"pre_tokenizer {last}"]
        for token in added:
            touchy = form and token["normalized"] and set(token["content"]) != {" "}
            if touchy or not token["content"] or token["lstrip"] or token["rstrip"] or token["single_word"]:
                flaws.append(f"added token {token['content']!r} (lstrip, rstrip, single_word or normalized)")
        patterns = [cut["pattern"].get("Regex") or re.escape(cut["pattern"]["String"]) for cut in splits]
        patterns += [GPT2] if last.get("use_regex", True) else []
        flaws += [f"{len(patterns)} split patterns"] * (len(patterns) != 1)
        flaws += [f"split pattern {p!r} (must take in all text, without ^ and $)" for p in patterns if not covers(p)]
        added = [(token["content"], token["id"], token["special"]) for token in added]
        require(not flaws, f"{path}: unsupported: {'; '.join(flaws)}; give a byte-level BPE tokenizer.json")
        ids = {bytes(byte_of[c] for c in t): i for t, i in model["vocab"].items() if byte_of.keys() >= set(t)}
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merges = [tuple(bytes(byte_of[c] for c in side) for side in pair) for pair in pairs]
        ranks = {token: ids[token] for token in [*(bytes([b]) for b in range(256)), *(a + b for a, b in merges)]}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: must be a byte-level BPE tokenizer.json, but {error!r}; give another") from None
    ranks |= {token: i for token, i in ids.items() if token.decode("utf-8", "replace") not in {t for t, _, _ in added}}
    rule = "a vocabulary with merges or words that tiktoken would take otherwise; give another"
    require(same_merges(merges, ranks, bool(model.get("ignore_merges"))), f"{path}: unsupported: {rule}")
    return Tokenizer(path, ranks, patterns[0], added, bool(form))


@functools.cache
def covers(pattern: str) -> bool:
    """Whether the split pattern takes in every character, and means the same to tiktoken as to Hugging Face."""
    regex = importlib.import_module("regex")  # tiktoken brings it
    probe = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    try:
        matches = regex.finditer(pattern, probe)
    except regex.error:
        return False
    return "".join(match.group() for match in matches) == probe and not re.search(r"(?<!\[)\^|\$", pattern)


def same_merges(merges: list[tuple[bytes, bytes]], ranks: dict[bytes, int], whole_words: bool) -> bool:
    """Whether merging by rank of the result, as tiktoken does, follows this list of merges, as Hugging Face does.

    `whole_words`: words of the vocabulary that no merges make are tokens as well (ignore_merges), in tiktoken always.
    """
    order, allowed = [ranks[a + b] for a, b in merges], set(merges)
    if order != sorted(order):
        return False
    for token in ranks:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 1:
            known = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
            if not known:
                break
            i = min(known)[1]
            if (parts[i], parts[i + 1]) not in allowed:
                return False
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) > 1 and not whole_words:
            return False
    return True


@dataclass
class Corpus:
    """Token ids to train on and to validate on, 1-D uint16 or uint32, and what they mean."""

    train: np.ndarray
    valid: np.ndarray
    tokenizer: Tokenizer | None
    vocab_size: int
    separator: int | None
    source: str

    def byte_lengths(self) -> np.ndarray:
        """Bytes of each token, int64 (vocab_size,): 1 for the separator, 0 for an id without a token or tokenizer."""
        texts = self.tokenizer.bytes_of if self.tokenizer else {}
        sizes = [1 if texts and i == self.separator else len(texts.get(i, b"")) for i in range(self.vocab_size)]
        return np.array(sizes, np.int64)


def load_corpus(path: str, tokenizer_name: str, tokenizer: Tokenizer | None = None) -> Corpus:
    """Corpus of `path`: text (see `read_documents`), "" for `python_documents`, or a .bin (see `load_tokens`).

    Every 20th document is for validation; with fewer than 20, the last 5 % of the characters, from a boundary if one
    is within 2 %. `tokenizer`, from a checkpoint, comes before `tokenizer_name`; a new one never sees validation text.
    """
    if path.endswith(".bin"):
        return load_tokens(path, tokenizer)
    documents = read_documents(path) if path else python_documents()
    train, valid = [text for i, text in enumerate(documents, 1) if i % 20], documents[19::20]
    if not valid:
        ends = list(itertools.accumulate(map(len, documents)))
        cut = ends[-1] * 19 // 20
        nearest = min(ends[:-1], key=lambda end: abs(end - cut), default=0)
        cut = nearest if abs(nearest - cut) <= ends[-1] // 50 else cut
        heads = [max(cut - end, -len(text)) + len(text) for text, end in zip(documents, ends, strict=True)]
        halves = [(text[:head], text[head:]) for text, head in zip(documents, heads, strict=True)]
        train, valid = ([text for text in half if text] for half in zip(*halves, strict=True))
    tokenizer = tokenizer or load_tokenizer(tokenizer_name, train)
    end = np.array([] if tokenizer.separator is None else [tokenizer.separator], tokenizer.dtype)
    ids = [[x for text in half for x in (tokenizer.encode(text), end)] for half in (train, valid)]
    train, valid = (np.concatenate([end[:0], *half]) for half in ids)
    return Corpus(train, valid, tokenizer, tokenizer.vocab_size, tokenizer.separator, path or "python documents")


def load_tokens(path: str, tokenizer: Tokenizer | None = None) -> Corpus:
    """Memory-mapped corpus of a .bin of little-endian token ids, described by the .json beside it.

    Its keys: dtype ("uint16" or "uint32"), vocab_size, tokenizer (a name, or a path from its folder; or null) and
    document_separator (or null). The last 5 %, at most 10 million, is for validation, from a separator if one is near.
    """
    file, description = Path(path), Path(path).with_suffix(".json")
    keys = ("dtype", "vocab_size", "tokenizer", "document_separator")
    require(file.is_file(), f"{path}: no such file; correct the path")
    require(description.is_file(), f"{path}: needs {description.name} beside it; write one with {', '.join(keys)}")
    try:
        dtype, vocab_size, name, separator = (json.loads(description.read_text("utf-8"))[key] for key in keys)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{description}: must be JSON with {', '.join(keys)}, but {error!r}; correct it") from None
    require(dtype in ("uint16", "uint32"), f"{description}: dtype {dtype!r} must be uint16 or uint32; correct it")
    require(isinstance(vocab_size, int), f"{description}: vocab_size {vocab_size!r} must be an integer; correct it")
    size, width = file.stat().st_size, np.dtype(dtype).itemsize
    require(size > 0, f"{path}: is empty; write token ids into it")
    require(size % width == 0, f"{path}: {size} bytes must be a multiple of {width} for {dtype}; correct either")
    tokens = np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r")
    cut = len(tokens) - min(len(tokens) // 20, 10_000_000)
    near = np.flatnonzero(tokens[cut - 1 : cut + min((len(tokens) - cut) // 2, 1 << 16)] == separator)
    cut += int(near[0]) if len(near) else 0
    for part in (tokens[: min(cut, 10_000_000)], tokens[cut:]):  # all of a huge file would take minutes
        top = int(part.max(initial=0))
        require(top < vocab_size, f"{path}: token id {top} must be below vocab_size {vocab_size}; correct either")
    if tokenizer is None and name is not None:
        beside = description.parent / (name := str(name))
        tokenizer = load_tokenizer(str(beside) if beside.is_file() else name, [])
    least = tokenizer.vocab_size if tokenizer else 0
    rule = f"must be at least {least}, its tokenizer's; mend it"
    require(vocab_size >= least, f"{description}: vocab_size {vocab_size} {rule}")
    fits = separator is None or (isinstance(separator, int) and 0 <= separator < vocab_size)
    require(fits, f"{description}: document_separator {separator!r} must be null or below vocab_size; correct it")
    return Corpus(tokens[:cut], tokens[cut:], tokenizer, vocab_size, separator, path)


def check_length(tokens: np.ndarray, length: int, what: str) -> None:
    """Raise UserError when `tokens` is shorter than one window: `length` inputs and the target after the last."""
    rule = f"one window needs {length + 1}; give more text or shorter windows"
    require(len(tokens) > length, f"{what}: {len(tokens)} tokens, the text is shorter than one window; {rule}")


def ngram_bits(train: bytes, valid: bytes, order: int) -> float:
    """Bits a byte of `valid` under an interpolated Witten-Bell model of `order` <= 8 bytes fitted on `train`.

    p(w|h) = (c(h,w) + T(h) p(w|h')) / (c(h) + T(h)): c counts in `train`, T(h) distinct bytes after h, h' is h less
    its first byte; below the unigram p = 1/256 (Witten & Bell 1991; Chen & Goodman 1998, eq. 2.15).
    """

    def grams(data: bytes, n: int) -> np.ndarray:  # (len - n + 1,) n bytes packed in a uint64, the last one lowest
        x = np.frombuffer(data, np.uint8).astype(np.uint64)
        return sum(x[i : len(x) - n + 1 + i] << np.uint64(8 * (n - 1 - i)) for i in range(n))

    def look_up(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
        place = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
        return np.where(keys[place] == queries, values[place], 0)

    p = np.full(len(valid), 1 / 256)
    for n in range(1, min(order, len(train), len(valid)) + 1):
        seen, count = np.unique(grams(train, n), return_counts=True)
        contexts, first, kinds = np.unique(seen >> 8, return_index=True, return_counts=True)
        query = grams(valid, n)
        c, t = look_up(seen, count, query), look_up(contexts, kinds, query >> 8)
        total = t + look_up(contexts, np.add.reduceat(count, first), query >> 8)
        p[n - 1 :] = np.where(total > 0, (c + t * p[n - 1 :]) / np.maximum(total, 1), p[n - 1 :])
    return float(-np.log2(p).mean())


def ngram_baselines(corpus: Corpus) -> dict[str, float]:
    """Bits a byte of the validation text under n-grams fitted on the first 20 MB of training text; {} if no tokenizer.

    A separator is one zero byte, as in `Corpus.byte_lengths`.
    """
    if corpus.tokenizer is None:
        return {}
    table = corpus.tokenizer.bytes_of | {corpus.tokenizer.separator: b"\0"}
    parts = (corpus.train[:20_000_000], corpus.valid)
    train, valid = (b"".join(table.get(i, b"") for i in part.tolist()) for part in parts)
    orders = {"byte unigram": 1, "byte trigram": 3, "byte 5-gram": 5}
    return {name: ngram_bits(train[:20_000_000], valid, order) for name, order in orders.items()}


# ----- The method: selective scan -------------------------------------------------------------------------------------


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, initial_state: Tensor | None = None,
    starts: Tensor | None = None, return_final_state: bool = False, backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The selective scan of Algorithm 2: h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, and y_t = C_t h_t + D u_t.

    u, delta, z: (B, L, D); A: (D, N) real; B, C: (B, L, N), or (D, N) when input-independent (Algorithm 1, S4);
    D, delta_bias: (D,); initial_state: (B, D, N); starts: (B, L) bool, True where the state is reset *before* that
    position. delta_bias is added to delta before the softplus that `delta_softplus` asks for; z gates: y * SiLU(z).
    Returns y (B, L, D) in u's dtype, and with `return_final_state` the last state (B, D, N). Everything is computed in
    float32, or in float64 for float64 u. Raises ValueError for shapes that do not fit and for an unknown backend.
    """
    check_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, starts)
    arguments = (u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, starts)
    if backend == "auto":
        problem = fused_problem(*arguments)
        backend = "chunked" if problem else "fused"  # the fastest that works here
        if problem:
            say_once(f"selective_scan: chunked and not fused, since {problem}")
    require(backend in SCANS, f"scan backend {backend!r} does not exist; choose auto, {', '.join(SCANS)}")
    with torch.autocast(u.device.type, enabled=False):
        y, state = SCANS[backend](*arguments)
    return (y, state) if return_final_state else y


def selective_scan_step(
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One position of `selective_scan`: equation (2), discretised by equation (4) for A and by Euler's rule for B.

    state: (B, D, N); u, delta, z: (B, D); A: (D, N); B, C: (B, N), or (1, D, N) when input-independent.
    Returns y (B, D) in u's dtype and the next state (B, D, N) in the dtype of `state`.
    """
    dtype = u.dtype
    u, delta, B, C = (x.to(state.dtype) for x in (u, delta, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    A_bar = torch.exp(delta.unsqueeze(-1) * A)  # (B, D, N), in (0, 1] for A <= 0
    B_bar_u = (delta * u).unsqueeze(-1) * (B if B.ndim == 3 else B.unsqueeze(1))  # (B, D, N)
    state = torch.addcmul(B_bar_u, A_bar, state)
    y = (state * (C if C.ndim == 3 else C.unsqueeze(1))).sum(-1)  # (B, D)
    if D is not None:
        y = torch.addcmul(y, D, u)
    if z is not None:
        y = y * F.silu(z.to(state.dtype))
    return y.to(dtype), state


def scan_sequential(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, starts):
    """The recurrence, one position after another: for reading, and slow under autograd."""
    dtype, ys = state_dtype(u), []
    state = u.new_zeros(u.shape[0], *A.shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    for t in range(u.shape[1]):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None], 0.0)
        B_t, C_t = (w[:, t] if w.ndim == 3 else w.unsqueeze(0) for w in (B, C))
        z_t = None if z is None else z[:, t]
        y, state = selective_scan_step(state, u[:, t], delta[:, t], A, B_t, C_t, D, z_t, delta_bias, delta_softplus)
        ys.append(y)
    return torch.stack(ys, dim=1), state


def scan_chunked(*arguments):
    """The parallel scan in pure PyTorch: `ChunkedScan`, with its hand-written backward."""
    return scan_by(ChunkedScan, *arguments)


def scan_fused(*arguments):
    """The scan as one pass in C or in Triton: `FusedScan`, `TritonScan`, with their hand-written backward."""
    problem = fused_problem(*arguments)
    require(problem is None, f"fused scan: {problem}; choose backend auto or chunked")
    return scan_by(fused_kind(arguments[0]), *arguments)


def scan_by(kind: type, *arguments):
    """The scan by one of the classes; states are saved only where a gradient will be asked for."""
    *tensors, delta_softplus, starts = arguments
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return ScanFunction.apply(kind, *arguments)
    return kind(*tensors[:-1], delta_softplus, starts).forward(tensors[-1], save=False)[:2]


SCANS = {"sequential": scan_sequential, "chunked": scan_chunked, "fused": scan_fused}


def state_dtype(x: Tensor) -> torch.dtype:
    """States are float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, starts) -> None:
    """Raise ValueError with the tensor's name, its shape and the shape it should have."""
    fits = u.ndim == 3 and A.ndim == 2 and u.numel() > 0
    require(fits, f"selective_scan: u {tuple(u.shape)} must be (B, L, D), not empty, A {tuple(A.shape)} must be (D, N)")
    (batch, length, d), n = u.shape, A.shape[1]
    full, weights, channels = (batch, length, d), (batch, length, n), (d,)
    for name, x, shape in (
        ("delta", delta, full), ("A", A, (d, n)), ("B", B, weights), ("C", C, weights), ("D", D, channels),
        ("z", z, full), ("delta_bias", delta_bias, channels), ("initial_state", initial_state, (batch, d, n)),
        ("starts", starts, (batch, length)),
    ):  # fmt: skip
        fits = x is None or x.shape == shape or (name in "BC" and x.shape == (d, n))
        require(fits, f"selective_scan: {name} {fits or tuple(x.shape)} must be {shape} for u {tuple(u.shape)}")
    fits = starts is None or starts.dtype == torch.bool
    require(fits, f"selective_scan: starts is {fits or starts.dtype}, must be torch.bool; use starts.bool()")


def scan_(a: Sequence[Tensor], h: Sequence[Tensor], state: Tensor) -> None:
    """In place, h_t = a_t h_{t-1} + h_t over T positions (Q, N, D); state (Q, N, D) is h_{-1}, then h_{T-1}."""
    last = state
    for a_t, h_t in zip(a, h, strict=True):
        last = h_t.addcmul_(a_t, last)
    state.copy_(last)


def scan_back_(a: Sequence[Tensor], g: Sequence[Tensor], grad_state: Tensor) -> None:
    """The adjoint of `scan_`, in place: g_t = g_t + a_{t+1} g_{t+1} from t = T-1 down.

    grad_state (Q, N, D) is a_T g_T before, the gradient of the last state, and a_0 g_0 after, that of the first.
    """
    g[-1].add_(grad_state)
    for t in range(len(g) - 2, -1, -1):
        g[t].addcmul_(a[t + 1], g[t + 1])
    torch.mul(a[0], g[0], out=grad_state)


@dataclass(frozen=True)
class Window:
    """In each of `segments` stretches of `length` positions, from `first` on: `blocks` blocks of T from `offset` on."""

    first: int
    segments: int
    length: int
    offset: int
    blocks: int
    T: int

    def view(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (blocks, segments, B, T, ...), a view."""
        x = x[:, self.first : self.first + self.segments * self.length].unflatten(1, (self.segments, self.length))
        x = x[:, :, self.offset : self.offset + self.blocks * self.T].unflatten(2, (self.blocks, self.T))
        return x.transpose(0, 2)

    def starts(self, starts: Tensor | None) -> list[Tensor | None]:
        """The document starts of each block, (Q, T)."""
        return [None] * self.blocks if starts is None else list(self.view(starts).flatten(1, 2))


class ChunkedScan:
    """The scan as reduce, combine, scan: chunks of the sequence side by side, and within each one block after another.

    Where batch x channels alone would leave the machine idle the sequence is cut into S segments, which become rows
    beside the batch's: Q = S B. Their end states from a zero start come first (reduce); from these the true start of
    each, start_{s+1} = end_s + exp(A sum_t delta_t) start_s (combine); then all are scanned from there. In a segment,
    blocks of T positions, (Q, T, N, D), stay in the cache while the exponential, the recurrence and the product with C
    pass over them: the (B, L, D, N) states never exist. The backward pass starts each block from its saved first state,
    computes the other states again, and runs the adjoint recurrence g_t = C_t dy_t + a_{t+1} g_{t+1}. Nothing is
    divided by a product of decays, so that exp(delta A) may underflow to 0; every sum has a fixed order.
    """

    # Elements that a step should advance, over segments if need be; fewest of these; elements in a block; in a window.
    SIZES: ClassVar = {"cpu": (2**16, 16, 3 * 2**17, 2**18), "cuda": (2**18, 8, 2**26, 2**24)}

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, starts):
        self.u, self.delta, self.B, self.C, self.z, self.starts = u, delta, B, C, z, starts
        self.delta_softplus, self.dtype = delta_softplus, state_dtype(u)
        self.A = A.t().to(self.dtype).contiguous()  # (N, D): channels last, here and below
        self.static = {k: w.t().to(self.dtype) for k, w in (("B", B), ("C", C)) if w.ndim == 2}  # (N, D)
        self.D, self.delta_bias = (None if w is None else w.to(self.dtype) for w in (D, delta_bias))
        self.scratch: dict[str, Tensor] = {}
        self.views: dict[tuple, tuple[Tensor, ...]] = {}
        self.deltas: dict[Window, Tensor] = {}  # what the reducing pass leaves to the next
        self.sums: dict[torch.Size, Tensor] = {}  # of the gradients of A, over the blocks of each shape

    def stretches(self) -> list[list[Window]]:
        """The sequence as one stretch of S segments and, if S does not divide L, one more; each as its windows."""
        (batch, L, D), N = self.u.shape, self.A.shape[0]
        step, fewest, block, inputs = self.SIZES.get(self.u.device.type, self.SIZES["cuda"])
        S = min(math.isqrt(L), step // (batch * N * D))
        S = S if fewest <= S else 1  # fewer would not repay the second pass
        stretches = []
        for first, segments, length in ((0, S, L // S), (L - L % S, 1, L % S)):
            Q = segments * batch
            T = max(1, min(length, max(4, block // (Q * N * D))))
            J, whole = max(1, inputs // (T * Q * D)), length // T * T
            spans = [(w, min(J, (whole - w) // T), T) for w in range(0, whole, J * T)]
            spans += [(whole, 1, length - whole)] * (whole < length)
            stretches.append([Window(first, segments, length, *span) for span in spans])
        return [windows for windows in stretches if windows]

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Scratch memory, kept from block to block: asking the system for it anew costs more than the arithmetic."""
        size, flat = math.prod(shape), self.scratch.get(name)
        if flat is None or flat.numel() < size:
            flat = self.scratch[name] = self.u.new_empty(size, dtype=self.dtype)
        return flat[:size].view(shape)

    def steps(self, name: str, x: Tensor) -> tuple[Tensor, ...]:
        """The positions (Q, N, D) of x (Q, T, N, D), the buffer `name`: views, made once a shape."""
        key = (name, x.shape, x.data_ptr())
        if key not in self.views:
            self.views[key] = x.unbind(1)
        return self.views[key]

    def load(self, name: str, x: Tensor, window: Window, copy: bool = False) -> Tensor:
        """A window of x (B, L, D or N) as (blocks, Q, T, D or N), to be read only: where it can, a view."""
        view = window.view(x)
        if 1 in (window.segments, len(x)) and x.dtype == self.dtype and not copy:
            return view.flatten(1, 2)
        return self.buffer(name, *view.shape).copy_(view).flatten(1, 2)

    def load_inputs(self, window: Window, reduce: bool, gate: bool = True) -> SimpleNamespace:
        """u, delta before (raw) and after the softplus, x = delta u, and with `gate` z, each (blocks, Q, T, D).

        The softplus is dear: a pass that reduces leaves it to the pass that scans afterwards, whose raw is None.
        """
        v = SimpleNamespace(u=self.load("u", self.u, window), raw=None, z=None)
        v.new = lambda name: self.buffer(name, *v.u.shape)
        v.delta = self.deltas.pop(window, None)
        if v.delta is None:
            v.delta = v.raw = self.load_raw(window)
            if self.delta_softplus:
                out = self.deltas.setdefault(window, torch.empty_like(v.raw)) if reduce else v.new("delta")
                v.delta = torch.ops.aten.softplus.out(v.raw, out=out)  # F.softplus, which takes no `out`
        v.x = torch.mul(v.delta, v.u, out=v.new("x"))
        if gate and self.z is not None:
            v.z = self.load("z", self.z, window)
            v.gate = torch.sigmoid(v.z, out=v.new("gate"))
            v.silu = torch.mul(v.z, v.gate, out=v.new("silu"))
        return v

    def load_raw(self, window: Window) -> Tensor:
        """delta with its bias, before the softplus, (blocks, Q, T, D)."""
        raw = self.load("raw", self.delta, window)
        return raw if self.delta_bias is None else torch.add(raw, self.delta_bias, out=self.buffer("raw", *raw.shape))

    def load_weights(self, name: str, window: Window) -> list[Tensor]:
        """B or C for each block, to multiply (Q, T, N, D): (Q, T, N, 1), or (N, D) when input-independent."""
        if name in self.static:
            return [self.static[name]] * window.blocks
        return list(self.load(name, getattr(self, name), window, copy=True).unsqueeze(-1))

    def decay(self, delta: Tensor, starts: Tensor | None) -> Tensor:
        """a_t = exp(delta_t A), and 0 where a document starts: (Q, T, N, D) from delta (Q, T, D)."""
        a = torch.mul(delta.unsqueeze(2), self.A, out=self.buffer("a", *delta.shape[:2], *self.A.shape)).exp_()
        return a if starts is None else a.masked_fill_(starts[..., None, None], 0.0)

    def outer(self, v: Tensor, weights: Tensor, name: str) -> Tensor:
        """v (Q, T, D) times weights (Q, T, N, 1) or (N, D), in the buffer `name`: (Q, T, N, D)."""
        return torch.mul(v.unsqueeze(2), weights, out=self.buffer(name, *v.shape[:2], *self.A.shape))

    def contract(self, weights: Tensor, h: Tensor, out: Tensor, spare: str = "a") -> None:
        """out (Q, T, D) = the sum over n of weights * h (Q, T, N, D). `spare` names a buffer free to use."""
        Q, T, N, D = h.shape
        if weights.ndim == 2:
            h = torch.mul(h, weights, out=self.buffer(spare, *h.shape))
            weights = self.buffer("ones", Q, T, N).fill_(1.0)
        torch.bmm(weights.view(Q * T, 1, N), h.view(Q * T, N, D), out=out.view(Q * T, 1, D))

    def contract_back(self, v: Tensor, h: Tensor, grad: Tensor, spare: str = "a") -> None:
        """The gradient of `contract`'s weights, for v (Q, T, D): writes grad (Q, T, N, 1), or adds to grad (N, D)."""
        Q, T, N, D = h.shape
        if grad.ndim == 4:
            torch.bmm(v.view(Q * T, 1, D), h.view(Q * T, N, D).mT, out=grad.view(Q * T, 1, N))
        else:
            products = torch.mul(h, v.unsqueeze(2), out=self.buffer(spare, *h.shape))
            ones, total = self.buffer("ones", 1, Q * T).fill_(1.0), self.buffer("sum", 1, N * D)
            grad += torch.mm(ones, products.view(Q * T, N * D), out=total).view(N, D)

    def carries(self, windows: list[Window], carry: Tensor, reduce: Callable, order: int) -> Tensor:
        """What enters each segment (Q, N, D), when `carry` (B, N, D) enters the first (order 1) or the last (-1).

        `reduce(window, state)` takes a state through a window and returns the window's sum of delta over time (Q, D).
        """
        S, batch = windows[0].segments, len(carry)
        if S == 1:
            return carry.clone()
        ends = carry.new_zeros(S * batch, *carry.shape[1:])
        total = sum(reduce(window, ends) for window in windows[::order])
        decay = torch.mul(total.unsqueeze(1), self.A).exp_()
        if self.starts is not None:
            reset = dataclasses.replace(windows[0], offset=0, blocks=1, T=windows[0].length).view(self.starts).any(-1)
            decay.masked_fill_(reset.view(-1, 1, 1), 0.0)
        entering, ends, decay = (x.view(S, batch, *carry.shape[1:]) for x in (torch.empty_like(ends), ends, decay))
        entering[0 if order == 1 else -1] = carry
        for s, after in itertools.pairwise(range(S)[::order]):
            torch.addcmul(ends[s], decay[s], entering[s], out=entering[after])
        return entering.flatten(0, 1)

    def forward(self, initial_state: Tensor | None, save: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """y (B, L, D), the last state (B, D, N) and, with `save`, the states that enter each block."""
        y, saved = torch.empty(self.u.shape, dtype=self.u.dtype, device=self.u.device), []
        state = self.A.new_zeros(len(self.u), *self.A.shape)  # (B, N, D)
        if initial_state is not None:
            state += initial_state.mT
        for windows in self.stretches():
            entering = self.carries(windows, state, self.forward_window, 1)
            for window in windows:
                saved.append(entering.new_empty(window.blocks, *entering.shape) if save else None)
                self.forward_window(window, entering, y, saved[-1])
            state = entering[-len(state) :]
        return y, state.mT.contiguous(), saved

    def forward_window(
        self, window: Window, state: Tensor, y: Tensor | None = None, saved: Tensor | None = None
    ) -> Tensor:
        """Take state (Q, N, D) through the window, in place; write y, if given. Returns the sum of delta (Q, D)."""
        v, B = self.load_inputs(window, reduce=y is None, gate=y is not None), self.load_weights("B", window)
        total = self.total(v.delta) if y is None else None  # now, while delta is in the cache
        out, C = (None, None) if y is None else (v.new("y"), self.load_weights("C", window))
        for j, starts in enumerate(window.starts(self.starts)):
            if saved is not None:
                saved[j] = state
            a = self.decay(v.delta[j], starts)
            h = self.outer(v.x[j], B[j], "h")
            scan_(self.steps("a", a), self.steps("h", h), state)
            if y is not None:
                self.contract(C[j], h, out[j])
        if y is not None:
            if self.D is not None:
                out.addcmul_(v.u, self.D)
            self.store(y, window, out, v.silu if v.z is not None else None)
        return total

    def total(self, x: Tensor) -> Tensor:
        """The sum over time (Q, D) of x (blocks, Q, T, D)."""
        return (x.new_ones(*x.shape[:2], 1, x.shape[2]) @ x).sum(0).squeeze(1)

    def store(self, out: Tensor, window: Window, value: Tensor, factor: Tensor | None = None) -> None:
        """Write value, times the factor, both (blocks, Q, T, D), to its place in out (B, L, D)."""
        view = window.view(out)
        if factor is None:
            view.copy_(value.view(view.shape))
        else:
            torch.mul(value.view(view.shape), factor.view(view.shape), out=view)

    def backward(self, dy: Tensor, grad_state: Tensor, saved: list[Tensor]) -> dict[str, Tensor | None]:
        """Gradients of every input, by name, from those of y (B, L, D) and of the last state (B, D, N)."""
        grads = {k: None if (x := getattr(self, k)) is None else torch.empty_like(x) for k in ("u", "delta", "z")}
        for k in ("B", "C", "D", "delta_bias"):
            x = self.static.get(k, getattr(self, k))
            grads[k] = None if x is None else torch.zeros(x.shape, dtype=self.dtype, device=x.device)
        grad_state, saved = grad_state.mT.to(self.dtype), list(saved)
        for windows in reversed(self.stretches()):
            reduce = functools.partial(self.backward_window, dy)
            entering = self.carries(windows, grad_state, reduce, -1)
            for window in reversed(windows):
                self.backward_window(dy, window, entering, saved.pop(), grads)
            grad_state = entering[: len(grad_state)]
        grads["A"] = sum(gradients.sum((0, 1)) for gradients in self.sums.values())
        return grads | {k: grads[k].t() for k in ("A", *self.static)} | {"initial_state": grad_state.mT}

    def backward_window(self, dy, window: Window, grad_state: Tensor, saved=None, grads: dict | None = None) -> Tensor:
        """Take grad_state (Q, N, D) back through the window, in place; with `grads`, write or add to all gradients."""
        v, C = self.load_inputs(window, reduce=grads is None), self.load_weights("C", window)
        B = None if grads is None else self.load_weights("B", window)
        v.dy = v.g_y = self.load("dy", dy, window, copy=v.z is None)  # g_y: the gradient before the gate
        if v.z is not None:
            v.g_y = torch.mul(v.dy, v.silu, out=v.new("g_y"))
        v.y, v.g_x, v.g_delta = map(v.new, ("y", "g_x", "g_delta"))
        g_B, g_C = (None, None) if grads is None else (self.grad_weights(k, grads[k], window) for k in "BC")
        starts = window.starts(self.starts)
        for j in reversed(range(window.blocks)):
            a = self.decay(v.delta[j], starts[j])
            if grads is None:
                g = self.outer(v.g_y[j], C[j], "h")
                scan_back_(self.steps("a", a), self.steps("h", g), grad_state)
                continue
            h, w = self.outer(v.x[j], B[j], "h"), self.buffer("w", *a.shape)  # w_t = a_t h_{t-1}
            torch.mul(a[:, 0], saved[j], out=w[:, 0])
            state = self.buffer("state", *saved[j].shape).copy_(saved[j])
            scan_(self.steps("a", a), self.steps("h", h), state)
            torch.mul(a[:, 1:], h[:, :-1], out=w[:, 1:])
            if v.z is not None:
                self.contract(C[j], h, v.y[j], spare="spare")
            self.contract_back(v.g_y[j], h, g_C[j], spare="spare")
            g = self.outer(v.g_y[j], C[j], "h")
            scan_back_(self.steps("a", a), self.steps("h", g), grad_state)
            self.contract_back(v.x[j], g, g_B[j])
            self.contract(B[j], g, v.g_x[j])
            w *= g  # the gradient of delta_t A, since a_t = exp(delta_t A)
            if w.shape not in self.sums:
                self.sums[w.shape] = torch.zeros_like(w)
            self.sums[w.shape].addcmul_(w, v.delta[j].unsqueeze(2))
            self.contract(self.A, w, v.g_delta[j], spare="w")
        if grads is not None:
            self.finish_gradients(window, v, grads)
        return self.total(v.delta) if grads is None else None

    def grad_weights(self, name: str, grad: Tensor, window: Window) -> list[Tensor]:
        """Where each block's gradient of B or C goes: scratch to write (Q, T, N, 1), or the sum (N, D) to add to."""
        if name in self.static:
            return [grad] * window.blocks
        return list(self.buffer("g_" + name, *window.view(grad).shape).flatten(1, 2).unsqueeze(-1))

    def finish_gradients(self, window: Window, v: SimpleNamespace, grads: dict) -> None:
        """From the gradients of x = delta u and of delta A to those of u, delta, z, D, delta_bias, B and C."""
        for k in {"B", "C"} - self.static.keys():
            self.store(grads[k], window, self.buffer("g_" + k, *window.view(grads[k]).shape))
        if v.z is not None:
            slope = torch.add(v.gate, v.silu, out=v.new("slope")).addcmul_(v.silu, v.gate, value=-1)  # of SiLU(z)
            if self.D is not None:
                v.y.addcmul_(v.u, self.D)
            self.store(grads["z"], window, slope.mul_(v.y), v.dy)
        v.g_delta.addcmul_(v.u, v.g_x)
        if self.delta_softplus:
            v.g_delta.mul_(torch.sigmoid(self.load_raw(window) if v.raw is None else v.raw, out=v.new("slope")))
        if self.delta_bias is not None:
            grads["delta_bias"] += v.g_delta.sum((0, 1, 2))
        self.store(grads["delta"], window, v.g_delta)
        g_u = v.g_x.mul_(v.delta)
        if self.D is not None:
            g_u.addcmul_(v.g_y, self.D)
            grads["D"] += torch.mul(v.g_y, v.u, out=v.new("slope")).sum((0, 1, 2))
        self.store(grads["u"], window, g_u)


# ----- The method: fused, in C ----------------------------------------------------------------------------------------

FUSED = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#define EACH _Pragma("omp simd") for (int w = 0; w < W; w++)  /* channel of a tile */
#define ROW(x, b, l) (s->x + (b) * s->x##_stride[0] + (l) * s->x##_stride[1])
typedef float row[W] __attribute__((aligned(64)));
typedef struct { row u, raw, delta, x, z, gate, y, dy, gy, dx, dd; } position;  /* gy: of y before the gate */
typedef struct {  /* `fused_struct`; strides are of batch and time */
    int64_t threads, batch, length, channels, states, softplus;
    int64_t u_stride[2], delta_stride[2], z_stride[2], B_stride[2], C_stride[2];
    const float *u, *delta, *A, *B, *C, *D, *z, *delta_bias, *initial, *dy, *dstate;
    const char *starts;
    float *y, *state, *saved, *du, *ddelta, *dz, *dA, *dB, *dC, *dD, *ddelta_bias, *dinitial;
} scan;

#define LOG2E 1.44269504f
static inline float exp2_(float x) {  /* the whole part becomes the exponent, the rest a polynomial; 0 or inf beyond */
    union { float f; int32_t i; } whole, r;
    x = x < -127.f ? -127.f : x > 128.f ? 128.f : x;
    whole.f = x + 12582912.f;  /* 1.5 x 2^23 rounds */
    float f = x - (whole.f - 12582912.f);
    r.f = 1.f + f * (.693147004f + f * (.240222424f + f * (.0555073358f + f * (.00967151299f + f * .00132647273f))));
    r.i += (int32_t)((uint32_t)whole.i << 23);
    return r.f;
}
static inline float log1p_(float e) {  /* for 0 to 1: 2 artanh(e / (2 + e)) */
    float s = e / (2.f + e), q = s * s, p = 1.f / 9 + q * (1.f / 11 + q * (1.f / 13 + q / 15));
    return 2.f * s * (1.f + q * (1.f / 3 + q * (1.f / 5 + q * (1.f / 7 + q * p))));
}
static inline float sigmoid_(float x) { return 1.f / (1.f + exp2_(-LOG2E * x)); }
static inline void load(float *to, const float *from, int m) { EACH to[w] = w < m ? from[w] : 0.f; }
static inline void fetch(float *to, const float *from, int m, int64_t ahead) {  /* a prefetch may miss the array */
    for (int w = 0; w < m; w += 16) __builtin_prefetch(from + ahead + w);
    load(to, from, m);
}
static inline void store(float *to, const float *from, int m) { memcpy(to, from, m * sizeof *to); }

/* n positions from l on of m channels from d on: fills k, takes h along; keeps in as and hs each a_t and h_{t-1}. */
static void run(const scan *s, int64_t b, int64_t d, int m, int64_t l, int n, position *k, row *A, row *h, row *as,
                row *hs) {
    row skip, bias;
    load(skip, s->D + d, m);
    load(bias, s->delta_bias + d, m);
    int64_t ahead = hs ? -T : T;
    for (int t = 0; t < n; t++) {
        position *p = k + t;
        fetch(p->u, ROW(u, b, l + t) + d, m, ahead * s->u_stride[1]);
        fetch(p->raw, ROW(delta, b, l + t) + d, m, ahead * s->delta_stride[1]);
        EACH {
            float r = p->raw[w] += bias[w];
            p->delta[w] = s->softplus ? (r > 0.f ? r : 0.f) + log1p_(exp2_(-LOG2E * __builtin_fabsf(r))) : r;
            p->x[w] = p->delta[w] * p->u[w];
            p->y[w] = skip[w] * p->u[w];
            p->z[w] = p->gate[w] = 1.f;
        }
        if (s->z) fetch(p->z, ROW(z, b, l + t) + d, m, ahead * s->z_stride[1]);
        if (s->z) EACH p->gate[w] = sigmoid_(p->z[w]);
        if (hs) fetch(p->dy, s->dy + (b * s->length + l + t) * s->channels + d, m, ahead * s->channels);
        if (hs) EACH { p->gy[w] = p->dy[w] * p->z[w] * p->gate[w]; p->dx[w] = p->dd[w] = 0.f; }
    }
    for (int64_t i = 0; i < s->states; i++) {
        row now, a;
        memcpy(now, h[i], sizeof now);
        for (int t = 0; t < n; t++) {
            position *p = k + t;
            float Bi = ROW(B, b, l + t)[i], Ci = ROW(C, b, l + t)[i];
            EACH a[w] = exp2_(p->delta[w] * A[i][w]);
            if (hs) memcpy(hs[i * T + t], now, sizeof now);
            if (s->starts && s->starts[b * s->length + l + t]) memset(a, 0, sizeof a), memset(now, 0, sizeof now);
            if (hs) memcpy(as[i * T + t], a, sizeof a);
            EACH { now[w] = a[w] * now[w] + p->x[w] * Bi; p->y[w] += Ci * now[w]; }
        }
        memcpy(h[i], now, sizeof now);
    }
}

static void forward_tile(const scan *s, int64_t b, int64_t d, int m, row *A) {
    int64_t N = s->states, D = s->channels, blocks = (s->length + T - 1) / T;
    position k[T];
    row *h = A + N;
    for (int64_t i = 0; i < N; i++) load(h[i], s->initial + (b * N + i) * D + d, m);
    for (int64_t c = 0; c < blocks; c++) {
        int n = s->length - c * T < T ? (int)(s->length - c * T) : T;
        for (int64_t i = 0; i < N && s->saved; i++) store(s->saved + ((b * blocks + c) * N + i) * D + d, h[i], m);
        run(s, b, d, m, c * T, n, k, A, h, NULL, NULL);
        for (int t = 0; t < n; t++) {
            EACH k[t].y[w] *= k[t].z[w] * k[t].gate[w];
            store(s->y + (b * s->length + c * T + t) * D + d, k[t].y, m);
        }
    }
    for (int64_t i = 0; i < N; i++) store(s->state + (b * N + i) * D + d, h[i], m);
}

/* g is the gradient of h: g_t = C_t gy_t + a_{t+1} g_{t+1}; dB and dC are a tile's share. */
static void backward_tile(const scan *s, int64_t b, int64_t d, int m, row *A) {
    int64_t N = s->states, D = s->channels, L = s->length, blocks = (L + T - 1) / T;
    position k[T];
    row *h = A + N, *g = h + N, *dA = g + N, *as = dA + N, *hs = as + T * N, skip, dD = {0}, dbias = {0};
    load(skip, s->D + d, m);
    memset(dA, 0, N * sizeof *dA);
    for (int64_t i = 0; i < N; i++) load(g[i], s->dstate + (b * N + i) * D + d, m);
    for (int64_t c = blocks - 1; c >= 0; c--) {
        int n = L - c * T < T ? (int)(L - c * T) : T;
        for (int64_t i = 0; i < N; i++) load(h[i], s->saved + ((b * blocks + c) * N + i) * D + d, m);
        run(s, b, d, m, c * T, n, k, A, h, as, hs);
        for (int64_t i = 0; i < N; i++) for (int t = n - 1; t >= 0; t--) {
            position *p = k + t;
            int64_t l = c * T + t, share = ((d / W * s->batch + b) * L + l) * N + i;
            float Bi = ROW(B, b, l)[i], Ci = ROW(C, b, l)[i], dB = 0.f, dC = 0.f;
            float *a = as[i * T + t], *before = hs[i * T + t], *now = t + 1 < n ? before + W : h[i];
            _Pragma("omp simd reduction(+ : dB, dC)") for (int w = 0; w < W; w++) {
                float e = g[i][w] + Ci * p->gy[w], q = (g[i][w] = e * a[w]) * before[w];  /* q: gradient of delta A */
                dB += e * p->x[w]; dC += p->gy[w] * now[w];
                p->dx[w] += e * Bi; p->dd[w] += q * A[i][w]; dA[i][w] += q * p->delta[w];
            }
            s->dB[share] = dB; s->dC[share] = dC;
        }
        for (int t = 0; t < n; t++) {
            position *p = k + t;
            int64_t at = (b * L + c * T + t) * D + d;
            EACH {
                p->dd[w] = (p->dd[w] / LOG2E + p->dx[w] * p->u[w]) * (s->softplus ? sigmoid_(p->raw[w]) : 1.f);
                p->dx[w] = p->dx[w] * p->delta[w] + skip[w] * p->gy[w];
                p->y[w] *= p->dy[w] * p->gate[w] * (1.f + p->z[w] * (1.f - p->gate[w]));
                dD[w] += p->gy[w] * p->u[w]; dbias[w] += p->dd[w];
            }
            store(s->du + at, p->dx, m); store(s->ddelta + at, p->dd, m);
            if (s->z) store(s->dz + at, p->y, m);
        }
    }
    for (int64_t i = 0; i < N; i++) {
        store(s->dA + (b * N + i) * D + d, dA[i], m);
        store(s->dinitial + (b * N + i) * D + d, g[i], m);
    }
    store(s->dD + b * D + d, dD, m); store(s->ddelta_bias + b * D + d, dbias, m);
}

/* Every tile of every row is one thread's, from the first position to the last or back, with `rows` rows of memory. */
static int tiles(const scan *s, int64_t rows, void (*work)(const scan *, int64_t, int64_t, int, row *)) {
    int failed = 0;
    _Pragma("omp parallel for collapse(2) num_threads(s->threads)")
    for (int64_t b = 0; b < s->batch; b++) for (int64_t d = 0; d < s->channels; d += W) {
        int m = s->channels - d < W ? (int)(s->channels - d) : W;
        row *A = aligned_alloc(64, rows * sizeof *A);
        if (!A) { failed = 1; continue; }
        for (int64_t i = 0; i < s->states; i++) load(A[i], s->A + i * s->channels + d, m);
        work(s, b, d, m, A);
        free(A);
    }
    return failed;
}
int forward(const scan *s) { return tiles(s, 2 * s->states, forward_tile); }
int backward(const scan *s) { return tiles(s, (4 + 2 * T) * s->states, backward_tile); }
"""


class FusedScan:
    """The scan as one pass in C, with `ChunkedScan`'s methods: a thread takes a tile of channels along the sequence.

    The states stay in the cache, and the backward pass starts each block of positions from its saved first state and
    computes the others again. No sum depends on the number of threads.
    """

    TILE, BLOCK = 64, 16  # channels that are computed side by side, positions between two saved states
    INTEGERS = ("threads", "batch", "length", "channels", "states", "softplus")
    STRIDED = ("u", "delta", "z", "B", "C")
    POINTERS = (
        "u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial", "dy", "dstate", "starts", "y", "state", "saved",
        "du", "ddelta", "dz", "dA", "dB", "dC", "dD", "ddelta_bias", "dinitial",
    )  # fmt: skip

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, starts):
        D, delta_bias = (A.new_zeros(len(A)) if w is None else w for w in (D, delta_bias))
        tensors = {"u": u, "delta": delta, "z": z, "B": B, "C": C, "D": D, "delta_bias": delta_bias}
        tensors["A"] = A.t() / math.log(2)  # since the exponential is taken to base 2
        self.inputs = {k: None if x is None else x.float() for k, x in tensors.items()}
        for k, x in self.inputs.items():  # rows may lie apart, as the halves of a projection do
            dense = x is None or (x.stride(-1) == 1 and k in self.STRIDED) or x.is_contiguous()
            self.inputs[k] = x if dense else x.contiguous()
        self.inputs["starts"] = None if starts is None else starts.contiguous()
        self.dtype, self.sizes = u.dtype, (*u.shape, A.shape[1])
        self.integers = dict(zip(self.INTEGERS, (torch.get_num_threads(), *self.sizes, delta_softplus), strict=True))

    def prepare(self, name: str, **tensors: Tensor) -> Callable[[], None]:
        """A call of `forward` or `backward` in `FUSED` on the inputs and these tensors, whatever they hold by then."""
        struct, given, run = fused_struct()(**self.integers), self.inputs | tensors, getattr(fused_library(), name)
        for k, x in given.items():
            if x is not None:
                setattr(struct, k, x.data_ptr())
        for k in self.STRIDED:
            if given[k] is not None:
                setattr(struct, k + "_stride", given[k].stride()[:2])
        reference = ctypes.byref(struct)

        def call(_keep=given) -> None:
            require(run(reference) == 0, "fused scan: out of memory; free some")

        return call

    def forward(self, initial_state: Tensor | None, save: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """y (B, L, D), the last state (B, D, N) and, with `save`, the states that enter each block (B, L / T, N, D)."""
        (batch, L, D, N), new = self.sizes, self.inputs["u"].new_empty
        outputs = {"y": new(batch, L, D), "state": new(batch, N, D)}
        outputs["saved"] = new(batch, -(-L // self.BLOCK), N, D) if save else None
        initial = self.inputs["A"].new_zeros(batch, D, N) if initial_state is None else initial_state
        self.prepare("forward", initial=initial.mT.float().contiguous(), **outputs)()
        return outputs["y"].to(self.dtype), outputs["state"].mT, [outputs["saved"]] if save else []

    def backward(self, dy: Tensor, grad_state: Tensor, saved: list[Tensor]) -> dict[str, Tensor | None]:
        """Gradients of every input, by name, from those of y (B, L, D) and of the last state (B, D, N)."""
        (batch, L, D, N), new = self.sizes, self.inputs["u"].new_empty
        tiles = -(-D // self.TILE)
        grads = {k: new(batch, L, D) for k in ("u", "delta") + ("z",) * (self.inputs["z"] is not None)}
        grads |= {"A": new(batch, N, D), "initial": new(batch, N, D), "D": new(batch, D), "delta_bias": new(batch, D)}
        grads |= {"B": new(tiles, batch, L, N), "C": new(tiles, batch, L, N)}  # each tile's and row's share
        given = {"dy": dy.float().contiguous(), "dstate": grad_state.mT.float().contiguous(), "saved": saved[0]}
        self.prepare("backward", **given, **{"d" + k: x for k, x in grads.items()})()
        sums = {k: grads[k].sum(0) for k in ("A", "B", "C", "D", "delta_bias")}
        return grads | sums | {"A": sums["A"].t(), "initial_state": grads["initial"].mT}


@functools.cache
def fused_struct() -> type[ctypes.Structure]:
    """The C struct `scan`: integers, strides of batch and time, pointers."""
    fields = [(name, ctypes.c_int64) for name in FusedScan.INTEGERS]
    fields += [(name + "_stride", ctypes.c_int64 * 2) for name in FusedScan.STRIDED]
    fields += [(name, ctypes.c_void_p) for name in FusedScan.POINTERS]
    return type("Struct", (ctypes.Structure,), {"_fields_": fields})


@functools.cache
def fused_library() -> ctypes.CDLL | str:
    """`FUSED`, compiled for this machine by `cc` (or $CC) once, about a second, and kept in the user's cache folder.

    The file's name is a hash of source, flags and processor. Returns the reason where it cannot be compiled or loaded.
    """
    command = [*shlex.split(os.environ.get("CC") or "cc"), f"-DW={FusedScan.TILE}", f"-DT={FusedScan.BLOCK}"]
    command += ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
    cpuinfo, processor = Path("/proc/cpuinfo"), platform.processor() + platform.machine()
    if cpuinfo.exists():
        lines = cpuinfo.read_text("utf-8", "replace").splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    for extra in (["-fopenmp", "-mprefer-vector-width=512"], ["-fopenmp"], ["-fopenmp-simd"]):
        key = "\0".join([FUSED, *command, *extra, processor])
        path = cache_folder() / f"scan-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
        try:
            if not path.exists():
                write_atomically(path, functools.partial(compile_c, [*command, *extra]))
            return ctypes.CDLL(str(path))
        except (OSError, subprocess.SubprocessError) as problem:
            reason = str(problem).strip().splitlines()[-1][:100]
    return reason


def compile_c(command: list[str], out: str) -> None:
    """Compile `FUSED` to the shared library `out`; raises OSError with what the compiler says last."""
    done = subprocess.run([*command, "-x", "c", "-", "-o", out], input=FUSED, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{command[0]}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")


@functools.cache
def cache_folder() -> Path:
    """A folder for compiled code that only this user can write to: in the user's cache, else a new temporary one."""
    with contextlib.suppress(OSError, RuntimeError, AttributeError):  # no home, no such rights, no such system
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mamba-scan"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if os.access(folder, os.W_OK) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    return Path(tempfile.mkdtemp(prefix="mamba-scan-"))


# ----- The method: fused, in Triton -----------------------------------------------------------------------------------
#
# These functions become kernels in `triton_problem`; until then `tl`, Triton's language, is no name here. A program
# takes a tile of W channels along one segment of one row; pointers of length L step by the strides that follow them.


def triton_sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + tl.exp2(-1.44269504 * x))


def triton_softplus(x):
    """log(1 + e^x): of e = exp(-|x|) as 2 artanh(e / (2 + e)), which is right also where e is tiny."""
    e = tl.exp2(-1.44269504 * tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15))))))
    return tl.maximum(x, 0.0) + 2.0 * s * series


def triton_load(x, live):
    """Numbers as float32, 0 where not live."""
    return tl.load(x, live, 0.0).to(tl.float32)


def triton_vector(x, d, live):
    """A number a channel, 0 where there is no such tensor."""
    return triton_load(x + d, live) if x is not None else tl.zeros([d.numel], tl.float32)


def triton_forward(
    u, delta, A, B, C, D, z, delta_bias, starts, initial, y, state, decay, saved, L, channels, N, span,
    u_b, u_l, u_d, delta_b, delta_l, delta_d, z_b, z_l, z_d, B_b, B_l, B_n, C_b, C_l, C_n,
    SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """y, the segment's last state and, where asked, the states that enter each block; without y, also its decay."""
    d, n = tl.program_id(0) * W + tl.arange(0, W), tl.arange(0, STATES)
    b, s, segments = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(2)
    live, real, at = d < channels, n < N, n[:, None] * channels + d[None, :]
    tile, place = real[:, None] & live[None, :], (b * segments + s) * N * channels + at
    A_log2 = 1.44269504 * tl.load(A + at, tile, 0.0)
    h = tl.load(initial + place, tile, 0.0)  # (N, W), in registers from the first position to the last
    skip, bias = triton_vector(D, d, live), triton_vector(delta_bias, d, live)
    total, keep = tl.zeros([W], tl.float32), 1.0
    begin, length = s * span, tl.minimum(span, L - s * span)
    u, delta = u + b * u_b + begin * u_l + d * u_d, delta + b * delta_b + begin * delta_l + d * delta_d
    B += b * B_b + begin * B_l + n * B_n
    if y is not None:
        y, C = y + (b * L + begin) * channels + d, C + b * C_b + begin * C_l + n * C_n
    z = z + b * z_b + begin * z_l + d * z_d if z is not None else None
    if saved is not None:
        saved += (b * tl.cdiv(L, BLOCK) + begin // BLOCK) * N * channels + at
    for first in range(0, length, ROWS):
        if saved is not None:  # noqa: SIM102 (decided when it is compiled, the next when it runs)
            if first % BLOCK == 0:
                tl.store(saved, h, tile)
                saved += N * channels
        ys = ()
        for i in tl.static_range(ROWS):  # stores come after, so that the loads of all rows may overlap
            inside = first + i < length
            row, some = d < tl.where(inside, channels, 0), n < tl.where(inside, N, 0)
            u_t, B_t = triton_load(u + i * u_l, row), triton_load(B + i * B_l, some)
            raw = triton_load(delta + i * delta_l, row) + bias
            delta_t = tl.where(row, triton_softplus(raw) if SOFTPLUS else raw, 0.0)
            if starts is not None:
                new = tl.load(starts + b * L + begin + first + i, inside, 0) != 0
                h, keep = tl.where(new, 0.0, h), tl.where(new, 0.0, keep)
            h = tl.exp2(delta_t[None, :] * A_log2) * h + (delta_t * u_t)[None, :] * B_t[:, None]
            if y is not None:
                y_t = tl.sum(triton_load(C + i * C_l, some)[:, None] * h, 0) + skip * u_t
                if z is not None:
                    z_t = triton_load(z + i * z_l, row)
                    y_t *= z_t * triton_sigmoid(z_t)
                ys += (y_t,)
            total += delta_t
        if y is not None:
            for i in tl.static_range(ROWS):
                tl.store(y + i * channels, ys[i], d < tl.where(first + i < length, channels, 0))
            y, C = y + ROWS * channels, C + ROWS * C_l
        if z is not None:
            z += ROWS * z_l
        u, delta, B = u + ROWS * u_l, delta + ROWS * delta_l, B + ROWS * B_l
    tl.store(state + place, h, tile)
    if decay is not None:
        tl.store(decay + place, keep * tl.exp2(total[None, :] * A_log2), tile)


def triton_states(
    u, delta, B, bias, starts, h, memory, A_log2, live, real, first, rows, u_l, delta_l, B_l, SOFTPLUS: tl.constexpr
):
    """The states of `rows` positions from the one before them, which all go to `memory`; returns the last."""
    tl.debug_barrier()  # what one thread stores another may load, and may still load from the block before
    tl.store(memory, h)
    for i in range(rows):
        t = first + i
        raw = triton_load(delta + t * delta_l, live) + bias
        delta_t = triton_softplus(raw) if SOFTPLUS else raw
        x = delta_t * triton_load(u + t * u_l, live)
        if starts is not None:
            h = tl.where(tl.load(starts + t) != 0, 0.0, h)
        h = tl.exp2(delta_t[None, :] * A_log2) * h + x[None, :] * triton_load(B + t * B_l, real)[:, None]
        tl.store(memory + (i + 1) * h.numel, h)
    tl.debug_barrier()
    return h


def triton_backward(
    u, delta, A, B, C, D, z, delta_bias, starts, dy, dstate, saved, memory, du, ddelta, dz, dA, dB, dC, dD, dbias,
    dinitial, L, channels, N, span, u_b, u_l, u_d, delta_b, delta_l, delta_d, z_b, z_l, z_d, B_b, B_l, B_n, C_b, C_l,
    C_n, dy_b, dy_l, dy_d, SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """All gradients, of B and C each tile's share; without du only dinitial, what leaves the segment's front."""
    k, d, n = tl.program_id(0), tl.program_id(0) * W + tl.arange(0, W), tl.arange(0, STATES)
    b, s, segments = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(2)
    live, real, at = d < channels, n < N, n[:, None] * channels + d[None, :]
    tile, place = real[:, None] & live[None, :], (b * segments + s) * N * channels + at
    A_log2, g = 1.44269504 * tl.load(A + at, tile, 0.0), tl.load(dstate + place, tile, 0.0)
    skip, bias = triton_vector(D, d, live), triton_vector(delta_bias, d, live)
    A_sum, D_sum, bias_sum = tl.zeros([STATES, W], tl.float32), tl.zeros([W], tl.float32), tl.zeros([W], tl.float32)
    begin, end = s * span, tl.minimum((s + 1) * span, L)
    delta, C, dy = delta + b * delta_b + d * delta_d, C + b * C_b + n * C_n, dy + b * dy_b + d * dy_d
    z = z + b * z_b + d * z_d if z is not None else None
    starts = starts + b * L if starts is not None else None
    if du is not None:
        u, B = u + b * u_b + d * u_d, B + b * B_b + n * B_n
        memory += ((b * segments + s) * tl.num_programs(0) + k) * (BLOCK + 1) * STATES * W
        memory += n[:, None] * W + tl.arange(0, W)[None, :]
    for c in range(tl.cdiv(end, BLOCK) - 1, begin // BLOCK - 1, -1):
        first, rows = c * BLOCK, tl.minimum(BLOCK, end - c * BLOCK)
        if du is not None:
            h = tl.load(saved + (b * tl.cdiv(L, BLOCK) + c) * N * channels + at, tile, 0.0)
            h = triton_states(
                u, delta, B, bias, starts, h, memory, A_log2, live, real, first, rows, u_l, delta_l, B_l, SOFTPLUS
            )
        for i in range(rows - 1, -1, -1):
            t = first + i
            raw, gy = triton_load(delta + t * delta_l, live) + bias, triton_load(dy + t * dy_l, live)
            delta_t, C_t = triton_softplus(raw) if SOFTPLUS else raw, triton_load(C + t * C_l, real)
            dout = gy
            if z is not None:
                z_t, gate = triton_load(z + t * z_l, live), triton_sigmoid(triton_load(z + t * z_l, live))
                gy *= z_t * gate
            a = tl.exp2(delta_t[None, :] * A_log2)
            if starts is not None:
                a = tl.where(tl.load(starts + t) != 0, 0.0, a)
            e = g + C_t[:, None] * gy[None, :]  # the gradient of h_t, as g is that of a_{t+1} h_t
            g = e * a
            if du is not None:
                out, share = (b * L + t) * channels + d, ((k * tl.num_programs(1) + b) * L + t) * N + n
                u_t, before = triton_load(u + t * u_l, live), tl.load(memory + i * e.numel)
                if z is not None:
                    y_t = tl.sum(C_t[:, None] * h, 0) + skip * u_t
                    tl.store(dz + out, dout * y_t * gate * (1.0 + z_t * (1.0 - gate)), live)
                dx = tl.sum(e * triton_load(B + t * B_l, real)[:, None], 0)
                q = g * before  # the gradient of delta A
                dd = (tl.sum(q * A_log2, 0) / 1.44269504 + dx * u_t) * (triton_sigmoid(raw) if SOFTPLUS else 1.0)
                tl.store(dB + share, tl.sum(e * (delta_t * u_t)[None, :], 1), real)
                tl.store(dC + share, tl.sum(h * gy[None, :], 1), real)
                tl.store(du + out, dx * delta_t + skip * gy, live)
                tl.store(ddelta + out, dd, live)
                A_sum, D_sum, bias_sum, h = A_sum + q * delta_t[None, :], D_sum + gy * u_t, bias_sum + dd, before
    tl.store(dinitial + place, g, tile)
    if du is not None:
        tl.store(dA + place, A_sum, tile)
        tl.store(dD + (b * segments + s) * channels + d, D_sum, live)
        tl.store(dbias + (b * segments + s) * channels + d, bias_sum, live)


class TritonScan:
    """The scan as Triton kernels, with `ChunkedScan`'s methods.

    Where batch x channels alone would leave the device idle the sequence is cut into S segments, which run side by
    side: as in `ChunkedScan`, a first pass finds what each adds and keeps, and from these follows what enters each.
    """

    BLOCK, ROWS, TILE, WARPS = 64, 4, 64, 2  # positions between two saved states, positions at once, channels, warps
    PROGRAMS, SEGMENTS = 512, 32  # fewer programs than that leave a large device idle; segments at most

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, starts):
        inputs = {"u": u, "delta": delta, "A": A.t(), "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
        inputs["starts"] = None if starts is None else starts.view(torch.uint8)
        dense = ("A", "D", "delta_bias", "starts")
        self.inputs = {k: x.contiguous() if x is not None and k in dense else x for k, x in inputs.items()}
        (batch, L, channels), N = u.shape, A.shape[1]
        tiles, blocks = -(-channels // self.TILE), -(-L // self.BLOCK)
        span = -(-blocks // min(self.SEGMENTS, max(1, self.PROGRAMS // (tiles * batch)))) * self.BLOCK
        self.grid, self.sizes, self.shape = (tiles, batch, -(-L // span)), (batch, -(-L // span), N, channels), u.shape
        self.options = {"L": L, "channels": channels, "N": N, "span": span, "SOFTPLUS": delta_softplus}
        self.options |= {"BLOCK": self.BLOCK, "ROWS": self.ROWS, "W": self.TILE, "STATES": 1 << (N - 1).bit_length()}

    def launch(self, kernel: str, **given: Tensor) -> None:
        """Run a kernel over all programs. What it names and nobody gives is None, which the compiler leaves out."""
        kernel, given = globals()[kernel], self.inputs | self.options | given
        for name, axes in {"u": "bld", "delta": "bld", "z": "bld", "dy": "bld", "B": "bln", "C": "bln"}.items():
            strides = (0, 0, 0) if given.get(name) is None else given[name].stride()
            given |= {f"{name}_{axis}": stride for axis, stride in zip(axes, strides, strict=True)}
        device = given["u"].device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            arguments = {name: given.get(name) for name in kernel.arg_names}
            kernel[self.grid](**arguments, num_warps=self.WARPS, enable_fp_fusion=True)

    def enter(self, first: Tensor, ends: Tensor, decay: Tensor, order: int) -> Tensor:
        """What enters each segment (B, S, N, D), if `first` (B, N, D) enters the first (order 1) or the last (-1)."""
        enters, (at, *_) = torch.empty_like(ends), range(ends.shape[1])[::order]
        enters[:, at] = first
        for s, after in itertools.pairwise(range(ends.shape[1])[::order]):
            torch.addcmul(ends[:, s], decay[:, s], enters[:, s], out=enters[:, after])
        return enters

    def forward(self, initial_state: Tensor | None, save: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """y (B, L, D), the last state (B, D, N), and with `save` each block's first state and each segment's decay."""
        batch, segments, N, channels = self.sizes
        new = functools.partial(torch.empty, device=self.inputs["u"].device, dtype=torch.float32)
        ends, decay, initial = new(self.sizes), new(self.sizes), new(self.sizes).zero_()
        if segments > 1:
            self.launch("triton_forward", initial=initial, state=ends, decay=decay)
        if initial_state is not None:
            initial[:, 0] = initial_state.mT
        enters = self.enter(initial[:, 0], ends, decay, 1)
        y, saved = torch.empty(self.shape, dtype=self.inputs["u"].dtype, device=ends.device), None
        if save:
            saved = new(batch, -(-self.shape[1] // self.BLOCK), N, channels)
        self.launch("triton_forward", initial=enters, y=y, state=ends, saved=saved)
        return y, ends[:, -1].mT, [saved, decay] if save else []

    def backward(self, dy: Tensor, grad_state: Tensor, saved: list[Tensor]) -> dict[str, Tensor | None]:
        """Gradients of every input, by name, from those of y (B, L, D) and of the last state (B, D, N)."""
        saved, decay = saved
        batch, segments, N, channels = self.sizes
        ends, zero, tiles = torch.empty_like(decay), torch.zeros_like(decay), self.grid[0]
        if segments > 1:
            self.launch("triton_backward", dy=dy, dstate=zero, dinitial=ends)
        enters = self.enter(grad_state.mT, ends, decay, -1)
        grads = {
            k: torch.empty(self.shape, dtype=x.dtype, device=dy.device)
            for k in ("u", "delta", "z")
            if (x := self.inputs[k]) is not None
        }
        grads |= {"A": torch.empty_like(decay), "initial": ends}
        grads |= {k: decay.new_empty(batch, segments, channels) for k in ("D", "bias")}
        grads |= {k: decay.new_empty(tiles, batch, self.shape[1], N) for k in ("B", "C")}
        memory = decay.new_empty(math.prod(self.grid), self.BLOCK + 1, self.options["STATES"], self.TILE)
        given = {"d" + k: x for k, x in grads.items()}
        self.launch("triton_backward", dy=dy, dstate=enters, saved=saved, memory=memory, **given)
        sums = {k: grads[k].sum((0, 1)) for k in ("A", "D", "bias")} | {k: grads[k].sum(0) for k in ("B", "C")}
        grads |= sums | {"A": sums["A"].t(), "delta_bias": sums["bias"], "initial_state": ends[:, 0].mT}
        return grads


@functools.cache
def triton_problem() -> str | None:
    """Turn the functions above into Triton's kernels. Returns why that cannot be, or None."""
    global tl
    try:
        triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
    except ImportError:
        return "Triton is not installed (pip install triton)"
    for name in [name for name in globals() if name.startswith("triton_") and name != "triton_problem"]:
        globals()[name] = triton.jit(globals()[name])
    return None


def fused_kind(x: Tensor) -> type:
    """The fused scan for x: Triton's on CUDA, and where its interpreter is asked for, and C's elsewhere."""
    return TritonScan if x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1" else FusedScan


def fused_problem(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, starts) -> str | None:
    """Why the fused scan cannot take these arguments, or None if it can."""
    if u.device.type not in ("cpu", "cuda"):
        return f"there is none for {u.device.type}"
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if any(x is not None and x.dtype == torch.float64 for x in tensors):
        return "it computes in float32, and the input is float64"
    if B.ndim == 2 or C.ndim == 2:
        return "B or C is input-independent"
    if fused_kind(u) is TritonScan:
        return triton_problem()
    library = fused_library()
    return f"it could not be compiled ({library})" if isinstance(library, str) else None


@functools.cache
def say_once(text: str) -> None:
    """Print a line to standard error, the first time only."""
    print(text, file=sys.stderr, flush=True)


class ScanFunction(torch.autograd.Function):
    """`ChunkedScan`, `FusedScan` or `TritonScan` for autograd."""

    NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")

    @staticmethod
    def forward(ctx, kind, *arguments):
        *tensors, initial_state, ctx.delta_softplus, starts = arguments
        ctx.kind = kind
        y, state, saved = kind(*tensors, ctx.delta_softplus, starts).forward(initial_state, save=True)
        ctx.save_for_backward(*tensors, initial_state, starts, *saved)
        return y, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_state):
        *tensors, initial_state, starts = ctx.saved_tensors[:10]
        with torch.autocast(grad_y.device.type, enabled=False):
            scan = ctx.kind(*tensors, ctx.delta_softplus, starts)
            grads = scan.backward(grad_y, grad_state, ctx.saved_tensors[10:])
        pairs = zip(ScanFunction.NAMES, (*tensors, initial_state), strict=True)
        return None, *(None if x is None else grads[k].to(x.dtype) for k, x in pairs), None, None


# ----- The model ------------------------------------------------------------------------------------------------------


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution of x (B, L, E) with weight (E, 1, W): y_t = bias + sum_i weight_i x_{t-W+1+i}.

    window (B, W-1, E) holds the inputs before x, zeros if None; past a start (B, L) bool no tap looks back.
    Returns the result (B, L, E) and the next window.
    """
    L, W = x.shape[1], weight.shape[-1]
    if window is None:
        window = x.new_zeros(x.shape[0], W - 1, x.shape[2])
    padded, weight = torch.cat([window.to(x.dtype), x], dim=1), weight.to(x.dtype)  # (B, W-1+L, E)
    bias, window = 0.0 if bias is None else bias.to(x.dtype), padded[:, L:]
    plain = starts is None and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    if plain and torch.backends.cpu.get_cpu_capability().startswith("AVX"):  # where the library's is fast
        y = F.conv2d(padded.mT.unsqueeze(2), weight.unsqueeze(2), groups=len(weight))  # (B, E, 1, L), channels last
        return y.squeeze(2).mT + bias, window
    y = bias + x * weight[:, 0, -1]
    begun = starts  # whether a document began at the position or in the `back` before it
    for back in range(1, W):
        past = padded[:, W - 1 - back :][:, :L]
        if starts is not None:
            past = past.masked_fill(begun.unsqueeze(-1), 0.0)
            begun = begun | F.pad(starts, (back, 0))[:, :L]
        y = torch.addcmul(y, past, weight[:, 0, -1 - back])
    if starts is not None:  # nor may the next call's taps
        begun = F.pad(starts, (W - 1, 0))[:, L:].flip(1).cumsum(1).flip(1)  # starts at or after each input
        window = window.masked_fill((F.pad(begun, (0, 1))[:, 1:] > 0).unsqueeze(-1), 0.0)
    return y, window


class MambaBlock(nn.Module):
    """The Mamba block (Figure 3): expand, convolve, select, scan, gate, contract. Names are the checkpoints' names."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        E, N, R = config.d_inner, config.d_state, config.rank
        self.selective, sizes = config.selective, {"delta": R, "B": N, "C": N}
        self.sizes = [size for name, size in sizes.items() if name in self.selective]
        self.in_proj = nn.Linear(config.d_model, 2 * E, bias=config.bias)
        self.conv1d = nn.Conv1d(E, E, config.d_conv, groups=E, bias=config.conv_bias)
        self.x_proj = nn.Linear(E, sum(self.sizes), bias=False) if self.sizes else None
        self.dt_proj = nn.Linear(R, E, bias=True)
        self.A_log = nn.Parameter(torch.arange(1.0, N + 1).log().repeat(E, 1))  # S4D-real: A = -1, -2, ...
        self.D = nn.Parameter(torch.ones(E))
        if "delta" not in self.selective:
            self.dt_proj.weight = None  # the bias alone is then the step size
        if "B" not in self.selective:  # input-independent: a value per channel and state, as in S4D
            self.B = nn.Parameter(torch.ones(E, N))
        if "C" not in self.selective:
            self.C = nn.Parameter(torch.randn(E, N))
        self.out_proj = nn.Linear(E, config.d_model, bias=config.bias)
        self.reset_parameters(config)

    @torch.no_grad()
    def reset_parameters(self, config: MambaConfig) -> None:
        """The official initialisation; what is not named here keeps PyTorch's default, as there."""
        if self.dt_proj.weight is not None:
            nn.init.uniform_(self.dt_proj.weight, -(config.rank**-0.5), config.rank**-0.5)
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = torch.exp(torch.rand(config.d_inner) * (high - low) + low).clamp(min=config.dt_init_floor)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(bias) = dt
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        self.out_proj.weight /= math.sqrt(config.n_layer)
        for linear in (self.in_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """delta (.., E), before bias and softplus, B and C (.., N), from x (.., E): selection, section 3.2."""
        parts = iter(self.x_proj(x).split(self.sizes, dim=-1) if self.sizes else ())
        delta = F.linear(next(parts), self.dt_proj.weight) if "delta" in self.selective else torch.zeros_like(x)
        return delta, *(next(parts) if name in self.selective else getattr(self, name) for name in ("B", "C"))

    def forward(self, x: Tensor, state=None, starts: Tensor | None = None):
        """x (B, L, d_model) -> (B, L, d_model) and the state after it: window (B, W-1, E), SSM state (B, E, N)."""
        window, h = (None, None) if state is None else state
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, E) each
        x, window = causal_conv(x, self.conv1d.weight, self.conv1d.bias, window, starts)
        x = F.silu(x)
        delta, B, C = self.select(x)
        D, bias = self.D, self.dt_proj.bias
        y, h = selective_scan(x, delta, self.A(), B, C, D, z, bias, True, h, starts, return_final_state=True)
        return self.out_proj(y), (window, h)

    def A(self) -> Tensor:
        """The continuous A (E, N), negative."""
        return -torch.exp(self.A_log.to(state_dtype(self.A_log)))

    def step(self, x: Tensor, state: tuple[Tensor, Tensor], A: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`forward` for one position: x (B, d_model), with A = self.A(); in constant time and memory."""
        window, h = state
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, E) each
        window = torch.cat([window, x.unsqueeze(1)], dim=1)  # (B, W, E)
        x = (window * self.conv1d.weight.squeeze(1).t()).sum(1)
        x = F.silu(x if self.conv1d.bias is None else x + self.conv1d.bias)
        delta, B, C = self.select(x)
        B, C = (w.unsqueeze(0) if name not in self.selective else w for name, w in (("B", B), ("C", C)))
        y, h = selective_scan_step(h, x, delta, A, B, C, self.D, z, self.dt_proj.bias, True)
        return self.out_proj(y), (window[:, 1:], h)


class RMSNormFunction(torch.autograd.Function):
    """x / rms(x) * weight in three passes over x, and four back; PyTorch makes it of many where it has no kernel."""

    @staticmethod
    def forward(ctx, x, weight, floor):
        scale = math.sqrt(x.shape[-1]) / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        products = (grad * x).flatten(0, -2)
        along = (products @ weight).view_as(scale) * scale**3 / -x.shape[-1]  # the norm's gradient lies along x
        return torch.mul(grad, weight).mul_(scale).addcmul_(x, along), scale.flatten() @ products, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 (float64 for float64)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps
        self.register_buffer("floor", torch.tensor(math.sqrt(eps * size)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if x.device.type != "cpu":  # there PyTorch has a kernel
            y = F.rms_norm(x, x.shape[-1:], weight, self.eps)
        else:
            y = RMSNormFunction.apply(x, weight, self.floor)
        return y.to(self.weight.dtype)


def lean(module: nn.Module) -> Callable:
    """What a linear layer or norm computes for x (B, d_model), without the module: decoding waits for calls."""
    if isinstance(module, nn.Linear):
        multiply = torch.mm if module.bias is None else functools.partial(torch.addmm, module.bias)
        return functools.partial(multiply, mat2=module.weight.t())
    if isinstance(module, RMSNorm) and module.weight.dtype == torch.float32:
        weight, floor = module.weight * math.sqrt(len(module.weight)), module.floor
        return lambda x: x.div(torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)).mul_(weight)
    return module


class Layer(nn.Module):
    """Norm and block; the residual stream around them stays in float32."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MambaBlock(config)

    def stepper(self, window: Tensor, h: Tensor) -> Callable[[Tensor], Tensor]:
        """Norm, block and residual for one position, x (B, d_model) -> (B, d_model), with the fused scan; see `lean`.

        window (B, W-1, E) and h (B, E, N) are the state, from which it goes on in memory of its own.
        """
        mixer, norm, project, out = self.mixer, lean(self.norm), lean(self.mixer.in_proj), lean(self.mixer.out_proj)
        (batch, past, E), new = window.shape, self.norm.weight.new_empty
        ring = F.pad(window, (0, 0, 0, 1))  # (B, W, E): the newest input replaces the oldest
        taps = mixer.conv1d.weight.squeeze(1).t()  # (W, E), oldest first
        rolled = [taps.roll(place + 1, 0) for place in range(past + 1)]  # when the newest stands at `place`
        bias = torch.zeros(E) if mixer.conv1d.bias is None else mixer.conv1d.bias
        xz, parts, (u, delta, y) = new(batch, 2 * E), new(batch, sum(mixer.sizes)), (new(batch, E) for _ in range(3))
        x, z = xz.chunk(2, dim=-1)
        rank, B, C = parts.split(mixer.sizes, dim=-1)
        u_, delta_, B_, C_, z_, y_ = (v.unsqueeze(1) for v in (u, delta, B, C, z, y))  # sequences of one position
        state = h.mT.clone(memory_format=torch.contiguous_format)
        scan = FusedScan(u_, delta_, mixer.A(), B_, C_, mixer.D, z_, mixer.dt_proj.bias, True, None)
        advance = scan.prepare("forward", initial=state, y=y_, state=state)
        select, widen = lean(mixer.x_proj), mixer.dt_proj.weight.t()
        place = itertools.cycle([past, *range(past)])

        def step(residual: Tensor) -> Tensor:
            project(norm(residual), out=xz)
            now = next(place)
            ring.select(1, now).copy_(x)
            F.silu(torch.sum(ring * rolled[now], dim=1, out=u).add_(bias), inplace=True)
            select(u, out=parts)
            torch.mm(rank, widen, out=delta)
            advance()
            return out(y).add_(residual)

        return step


class Mamba(nn.Module):
    """The Mamba language model: embedding, layers of norm and block, norm, head."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config
        rows = -(-config.vocab_size // config.pad_vocab_size_multiple) * config.pad_vocab_size_multiple
        self.backbone = nn.Module()
        self.backbone.embeddings = nn.Embedding(rows, config.d_model)
        self.backbone.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.backbone.norm_f = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, rows, bias=False)
        nn.init.normal_(self.backbone.embeddings.weight, std=0.02)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L) or (B,) -> the residual stream (..., d_model), float32 or wider."""
        x = self.backbone.embeddings(tokens)
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of the residual stream (B, L, d_model) for targets (B, L); see `head_loss`."""
        return head_loss(self.backbone.norm_f(x), self.lm_head.weight[: self.config.vocab_size], targets)

    def logits(self, x: Tensor) -> Tensor:
        """The residual stream (..., d_model) -> (..., V): the padding of the vocabulary is cut off."""
        return self.lm_head(self.backbone.norm_f(x))[..., : self.config.vocab_size]

    def forward(self, tokens: Tensor, state=None, starts: Tensor | None = None, return_state=False, targets=None):
        """tokens (B, L) -> logits (B, L, V), and with `return_state` the state from which the next call goes on.

        The state is a list with (convolution window (B, W-1, E), SSM state (B, E, N)) of each layer. starts (B, L) bool
        marks where a document begins: it sees nothing before it. With targets (B, L) the mean loss takes the place of
        the logits.
        """
        x, after = self.hidden(tokens, state, starts)
        y = self.logits(x) if targets is None else self.loss(x, targets)
        return (y, after) if return_state else y

    def hidden(self, tokens: Tensor, state=None, starts: Tensor | None = None) -> tuple[Tensor, list]:
        """tokens (B, L) -> the residual stream after the last layer (B, L, d_model), and the state."""
        x, after = self.embed(tokens), []
        for i, layer in enumerate(self.backbone.layers):
            y, new = layer.mixer(layer.norm(x), None if state is None else state[i], starts)
            x = x + y
            after.append(new)
        return x, after

    def init_state(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """The state before the first token, for `forward` and `step`."""
        weight, c = self.lm_head.weight, self.config
        h = weight.new_zeros(batch, c.d_inner, c.d_state, dtype=state_dtype(weight))
        return [(weight.new_zeros(batch, c.d_conv - 1, c.d_inner), h) for _ in range(c.n_layer)]

    def step(self, token: Tensor, state: list, As: list[Tensor] | None = None) -> tuple[Tensor, list]:
        """token (B,) -> logits (B, V) and the next state, in constant time and memory a token.

        As, each layer's A, saves computing them again at every step.
        """
        x, after = self.embed(token), []
        for i, layer in enumerate(self.backbone.layers):
            y, new = layer.mixer.step(layer.norm(x), state[i], layer.mixer.A() if As is None else As[i])
            x = x + y
            after.append(new)
        return self.logits(x), after

    @torch.inference_mode()
    def stream(self, tokens: Tensor, max_new_tokens: int, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Yield `max_new_tokens` tokens (B,) that follow the prompt (B, L >= 1): parallel prefill, then `step`."""
        fits = tokens.ndim == 2 and tokens.shape[1] > 0
        require(fits, f"prompt of shape {tuple(tokens.shape)}: must be (B, L) with L >= 1; give at least one token")
        x, state = self.hidden(tokens)
        logits, step = self.logits(x[:, -1]), self.stepper(state)
        for i in range(max_new_tokens):
            token = sample_token(logits, temperature, top_k, top_p, generator)
            yield token
            if i + 1 < max_new_tokens:
                logits = step(token)

    def stepper(self, state: list) -> Callable[[Tensor], Tensor]:
        """A function token (B,) -> logits (B, V) that goes on from the state, like `step`, which stays as it is."""
        layers, weight = self.backbone.layers, self.lm_head.weight
        if weight.dtype == torch.float32 and len(layers[0].mixer.sizes) == 3:
            u = weight.new_zeros(1, 1, 1)
            if fused_kind(u) is FusedScan and fused_problem(u, u, u, u, u, *[None] * 6) is None:
                steps = [layer.stepper(*pair) for layer, pair in zip(layers, state, strict=True)]
                norm, head = lean(self.backbone.norm_f), lean(self.lm_head)

                def step(token: Tensor) -> Tensor:
                    x = self.embed(token)
                    for layer in steps:
                        x = layer(x)
                    return head(norm(x))[:, : self.config.vocab_size]

                return step
        As, box = [layer.mixer.A() for layer in layers], [state]
        if weight.is_cuda:
            return self.graph_stepper(state, As)

        def step(token: Tensor) -> Tensor:
            logits, box[0] = self.step(token, box[0], As)
            return logits

        return step

    def graph_stepper(self, state: list, As: list[Tensor]) -> Callable[[Tensor], Tensor]:
        """`stepper` as a CUDA graph: the host starts one a token, and not some forty kernels a layer."""
        before = [x for pair in state for x in pair]
        now = [x.clone() for x in before]
        token = torch.zeros(len(now[0]), dtype=torch.long, device=now[0].device)

        def advance() -> Tensor:
            logits, after = self.step(token, list(zip(now[::2], now[1::2], strict=True)), As)
            torch._foreach_copy_(now, [x for pair in after for x in pair])
            return logits

        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            advance()  # libraries choose their kernels at the first call, which a graph cannot hold
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            logits = advance()
        torch._foreach_copy_(now, before)

        def step(new: Tensor) -> Tensor:
            token.copy_(new)
            graph.replay()
            return logits

        return step

    @classmethod
    def from_pretrained(cls, folder: str) -> Mamba:
        """Read a local folder in the official or Hugging Face layout; see `read_folder`."""
        return read_folder(folder)

    def save_pretrained(self, folder: str) -> None:
        """Write Hugging Face's layout; see `write_folder`."""
        write_folder(self, folder)

    def generate(
        self, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, stop_token=None
    ) -> Tensor:
        """tokens (B, L) and up to `max_new_tokens` more, (B, L + n); after a `stop_token` a row repeats it."""
        new, done = [], torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for token in self.stream(tokens, max_new_tokens, temperature, top_k, top_p, generator):
            new.append(token if stop_token is None else token.masked_fill(done, stop_token))
            if stop_token is not None:
                done = done | (token == stop_token)
                if done.all():
                    break
        return torch.cat([tokens, *(t.unsqueeze(1) for t in new)], dim=1)


def head_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of x (B, L, d_model) through the head's weight (V, d_model) for targets (B, L).

    On the CPU it goes in pieces, so that the logits (B L, V) never exist as a whole: faster, and less memory.
    """
    pieces = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512, chunking_method=None, acc_policy="balanced")
    whole = x.device.type != "cpu" or torch.compiler.is_compiling()
    return F.linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), options=None if whole else pieces)


def sample_token(logits: Tensor, temperature=1.0, top_k=None, top_p=None, generator=None) -> Tensor:
    """Draw a token (B,) from logits (B, V): temperature 0 is greedy; top_k and top_p cut the tail, in that order."""
    fits = temperature >= 0 and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)
    require(fits, f"{temperature=}, {top_k=}, {top_p=}: must be >= 0, >= 1 and in (0, 1]; correct the one that is not")
    if temperature < 1e-6:  # logits divided by less overflow
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if top_p is not None:  # the fewest tokens whose probabilities reach top_p
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


# ----- Checkpoint folders: the official layout and Hugging Face's -----------------------------------------------------

NAMES = {  # Hugging Face's name of each of our fields
    "d_model": "hidden_size", "n_layer": "num_hidden_layers", "vocab_size": "vocab_size", "d_state": "state_size",
    "d_conv": "conv_kernel", "expand": "expand", "dt_rank": "time_step_rank", "dt_min": "time_step_min",
    "dt_max": "time_step_max", "dt_init_floor": "time_step_floor", "bias": "use_bias", "conv_bias": "use_conv_bias",
    "tie_embeddings": "tie_word_embeddings", "norm_eps": "layer_norm_epsilon",
}  # fmt: skip


def read_config(fields: dict) -> tuple[dict, list[str]]:
    """A config.json of either layout -> arguments of MambaConfig, and what in it we do not do."""
    if "hidden_size" in fields:
        given = {ours: fields[theirs] for ours, theirs in NAMES.items() if theirs in fields}
        need = {"model_type": "mamba", "hidden_act": "silu"}
        need["intermediate_size"] = int(fields.get("expand", 2) * fields["hidden_size"])
        given["pad_vocab_size_multiple"] = 1
    else:
        given, known = dict(fields.get("ssm_cfg") or {}), {field.name for field in dataclasses.fields(MambaConfig)}
        need = {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "ssm_cfg.layer": "Mamba1"}
        fields = fields | {"ssm_cfg.layer": given.pop("layer", "Mamba1")}
        for name in ("dt_init", "dt_scale", "use_fast_path"):  # of initialisation and speed only
            given.pop(name, None)
        need |= {f"ssm_cfg.{name}": "absent" for name in given.keys() - known}
        fields |= {f"ssm_cfg.{name}": given.pop(name) for name in given.keys() - known}
        ours = ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple", "tie_embeddings")
        given |= {name: fields[name] for name in ours if name in fields}
    problems = [f"{k} = {fields[k]!r}, must be {v!r}" for k, v in need.items() if fields.get(k, v) not in (v, None)]
    problems += [f"{k} is missing" for k in ("d_model", "n_layer", "vocab_size") if k not in given]
    return given, problems


def read_fields(folder: str | Path, name: str = "config.json") -> dict:
    """The JSON object in a checkpoint folder's config.json, or in another of its files."""
    path = Path(folder) / name
    require(path.is_file(), f"{folder}: holds no {name}, must be a folder with one and its weights; correct the path")
    try:
        fields = json.loads(path.read_text("utf-8"))
        require(isinstance(fields, dict), "it is another kind of value")
    except ValueError as error:
        raise UserError(f"{path}: must be a JSON object, but {error}; copy it anew") from None
    return fields


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors or pytorch_model.bin, or of the shards in their .index.json, in float32."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index, tensors = folder / f"{name}.index.json", {}
        if not index.is_file() and not (folder / name).is_file():
            continue
        shards = read_fields(folder, index.name).get("weight_map") if index.is_file() else {"all": name}
        require(isinstance(shards, dict), f"{index}: weight_map must name the file of each tensor; copy it anew")
        for shard in sorted({folder / str(shard) for shard in shards.values()}):
            require(shard.is_file(), f"{shard}: named in {index.name}, but not there; copy it there")
            part = load_torch(shard)
            require(isinstance(part, dict), f"{shard}: must hold tensors by name; give another")
            tensors |= part
        return {k: v.float() for k, v in tensors.items() if isinstance(v, Tensor)}
    raise UserError(f"{folder}: has neither model.safetensors nor pytorch_model.bin, nor an index of shards; add one")


def load_torch(path: Path, device: str | torch.device = "cpu") -> dict:
    """The contents of a .safetensors file, by the safetensors package, or of a torch.save; data only, never code."""
    try:
        if path.suffix == ".safetensors":
            return importlib.import_module("safetensors.torch").load_file(path)
        return torch.load(path, map_location=device, weights_only=True)
    except ImportError:
        raise UserError(f"{path}: reading it needs the safetensors package; pip install safetensors") from None
    except Exception as error:  # each format has its own kinds
        raise UserError(f"{path}: not a file of tensors ({str(error).splitlines()[0][:80]}); give another") from None


def check_tensors(folder: str, want: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Raise UserError listing the tensors that are missing, extra or of another shape than the model's."""
    problems = [f"{k} is missing" for k in want.keys() - tensors.keys()]
    problems += [f"{k} is extra" for k in tensors.keys() - want.keys()]
    for k in want.keys() & tensors.keys():
        if want[k].shape != tensors[k].shape:
            problems.append(f"{k} is {tuple(tensors[k].shape)}, must be {tuple(want[k].shape)}")
    require(not problems, f"{folder}: the weights do not fit config.json: {'; '.join(sorted(problems))}; mend either")


def read_folder(folder: str) -> Mamba:
    """The model in a local folder; raises ValueError once, listing all that does not fit in its config or tensors."""
    try:
        given, problems = read_config(read_fields(folder))
        require(not problems, f"{folder}: cannot be done here: {'; '.join(problems)}; give a plain Mamba")
        model = Mamba(MambaConfig(**given))
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{folder}: config.json has a wrong value ({str(error)[:70]!r}); correct it") from None
    tensors = {
        k.replace("backbone.embedding.", "backbone.embeddings."): v for k, v in read_tensors(Path(folder)).items()
    }
    if model.config.tie_embeddings and "backbone.embeddings.weight" in tensors:
        tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"]
    check_tensors(folder, model.state_dict(), tensors)
    model.load_state_dict(tensors)
    return model


def write_folder(model: Mamba, folder: str) -> None:
    """Write Hugging Face's layout, which `transformers` reads; the vocabulary's padding is cut off."""
    config = model.config
    fits = set(config.selective) == {"delta", "B", "C"}
    require(fits, f"selective {config.selective}: Hugging Face's layout holds full selection; save the checkpoint")
    fields = {theirs: getattr(config, ours) for ours, theirs in NAMES.items()}
    fields |= {"time_step_rank": config.rank, "intermediate_size": config.d_inner, "hidden_act": "silu"}
    fields |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "residual_in_fp32": True}
    fields |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    tensors = model.state_dict()
    for k in ("backbone.embeddings.weight", "lm_head.weight"):
        tensors[k] = tensors[k][: config.vocab_size]
    if config.tie_embeddings:
        del tensors["lm_head.weight"]
    write_tensors(folder, fields, tensors)


def write_tensors(folder: str, fields: dict, tensors: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors, or pytorch_model.bin where the safetensors package is missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / "config.json", fields)
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    try:
        save = importlib.import_module("safetensors.torch").save_file
        write_atomically(Path(folder) / "model.safetensors", lambda name: save(tensors, name, {"format": "pt"}))
    except ImportError:
        write_atomically(Path(folder) / "pytorch_model.bin", lambda name: torch.save(tensors, name))


# ----- Train ----------------------------------------------------------------------------------------------------------


class Batches:
    """Where each step's windows begin: a pure function of the step, so that resuming needs no replay.

    Shuffled epochs of non-overlapping windows, from a new offset each epoch; with `carry`, row r of the batch instead
    reads its own contiguous stretch of the text, step after step.
    """

    def __init__(self, tokens: np.ndarray, batch: int, length: int, seed: int, carry: bool):
        self.size, self.batch, self.length, self.seed, self.carry = len(tokens), batch, length, seed, carry
        rows = batch if carry else 1
        self.windows = (len(tokens) - 1) // rows // length  # of a row, or of an epoch
        require(self.windows > 0, f"{self.size:,} tokens: too few for {rows} stretches of --length {length}; lower one")
        self.epoch, self.order = -1, np.zeros(0, np.int64)

    def offsets(self, step: int) -> np.ndarray:
        """The first position of each of the step's windows, (batch,)."""
        if self.carry:
            return (np.arange(self.batch) * self.windows + step % self.windows) * self.length
        numbers = np.arange(step * self.batch, (step + 1) * self.batch)
        return np.array([self.shuffled(n // self.windows)[n % self.windows] for n in numbers])

    def shuffled(self, epoch: int) -> np.ndarray:
        """The first positions of an epoch's windows, in its order."""
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            slack = self.size - 1 - self.windows * self.length
            self.epoch, self.order = epoch, rng.permutation(self.windows) * self.length + rng.integers(slack + 1)
        return self.order

    def fresh(self, step: int) -> bool:
        """Whether the state starts from zero at this step."""
        return not self.carry or step % self.windows == 0


def gather(corpus: Corpus, tokens: np.ndarray, offsets, config: Config, device: torch.device):
    """Inputs and targets (B, L) of the windows at `offsets`, and their starts (B, L) bool with document_resets.

    Windows that the text's end cuts short must be alike. Raises ValueError for a token outside the vocabulary.
    """
    window = torch.from_numpy(np.stack([tokens[o : o + config.length + 1] for o in offsets]).astype(np.int64))
    top, size = int(window.max()), corpus.vocab_size
    require(top < size, f"{corpus.source}: token {top} is outside the vocabulary of {size}; correct the data")
    window, starts = window.to(device), None
    x, y = window[:, :-1], window[:, 1:]
    if config.document_resets and corpus.separator is not None:
        before = torch.tensor([[int(tokens[o - 1]) if o else corpus.separator] for o in offsets], device=device)
        starts = torch.cat([before, x[:, :-1]], dim=1) == corpus.separator
    return x, y, starts


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up over the first `warmup` of the steps, then a cosine from lr down to min_lr."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    share = (step - warm) / max(1, config.steps - 1 - warm)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def make_optimizer(model: nn.Module, config: Config, device: torch.device) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices only, and not for A_log or an input-independent B or C."""
    groups: dict[bool, list] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and name.split(".")[-1] not in ("A_log", "B", "C")].append(parameter)
    groups = [{"params": ps, "weight_decay": config.weight_decay * decayed} for decayed, ps in groups.items()]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=device.type == "cuda")


def autocast(device: torch.device):
    """bfloat16 on CUDA, around float32 parameters; elsewhere nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def evaluate(model: Mamba, corpus: Corpus, config: Config, limit: int = 0) -> dict:
    """Loss on the validation text in nats a token and bits a byte: every token but the first predicted once.

    Windows of config.length run on from one another with config.carry_state, else each starts from nothing. `limit`
    tokens, or all of them at 0.
    """
    tokens = corpus.valid[: limit + 1] if limit else corpus.valid
    offsets = range(0, len(tokens) - 1, config.length)
    whole = (len(tokens) - 1) // config.length
    rows = 1 if config.carry_state else config.batch
    chunks = [offsets[i : min(i + rows, whole)] for i in range(0, whole, rows)] + [offsets[whole:]]
    sizes = torch.from_numpy(corpus.byte_lengths())
    device, state, nats, count, size = next(model.parameters()).device, None, 0.0, 0, 0
    for chunk in filter(len, chunks):
        x, y, starts = gather(corpus, tokens, chunk, config, device)
        with autocast(device):
            logits, state = model(x, state if config.carry_state else None, starts, return_state=True)
        nats += F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum").item()
        count, size = count + y.numel(), size + int(sizes[y.cpu()].sum())
    return {"loss": nats / count, "bits_a_byte": nats / math.log(2) / size if size else None, "tokens": count}


def load_run(path: Path, device: str | torch.device = "cpu") -> dict:
    """The contents of a checkpoint that `Run.save` wrote."""
    content = load_torch(path, device)
    fits = isinstance(content, dict) and content.keys() >= {"model", "model_config", "config", "tokenizer", "step"}
    fits = fits and content["config"].keys() <= {field.name for field in dataclasses.fields(Config)}
    require(fits, f"{path}: is no checkpoint of this script; give one that `train` wrote")
    return content


def make_model(config: Config, vocab_size: int) -> Mamba:
    """A new model of the sizes that the flags say."""
    selective = tuple(name for name in config.selective.split(",") if name)
    return Mamba(MambaConfig(config.d_model, config.n_layer, vocab_size, config.d_state, selective=selective))


class Run:
    """A training run: model, optimiser and position, one step at a time; what a checkpoint holds."""

    def __init__(self, config: Config, corpus: Corpus, device: torch.device):
        self.config, self.corpus, self.device, self.path = config, corpus, device, Path(config.out) / "checkpoint.pt"
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        parts = self.world * config.accumulate
        fits = config.batch % parts == 0
        require(fits, f"--batch {config.batch}: must be a multiple of processes x --accumulate, {parts}; change one")
        size, first = config.batch // parts, config.batch // self.world * self.rank
        self.micro = [slice(first + i * size, first + (i + 1) * size) for i in range(config.accumulate)]
        self.batches = Batches(corpus.train, config.batch, config.length, config.seed, config.carry_state)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.model = make_model(config, corpus.vocab_size).to(device)
        self.optimizer = make_optimizer(self.model, config, device)
        self.forward = self.model
        if config.compile:
            SCANS.update({name: torch.compiler.disable(scan) for name, scan in SCANS.items()})  # its loop is no graph
            self.forward = torch.compile(self.model)
        if self.world > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.forward)
        self.step, self.best = 0, math.inf
        self.carried: list = [None] * config.accumulate  # with carry_state, the state after each micro-batch

    def train_step(self) -> tuple[float, float]:
        """One optimiser step: loss (nats a token) and gradient norm. Raises FloatingPointError if not finite."""
        total = torch.zeros((), device=self.device)
        for i, rows in enumerate(self.micro):
            offsets = self.batches.offsets(self.step)[rows]
            x, y, starts = gather(self.corpus, self.corpus.train, offsets, self.config, self.device)
            state = None if self.batches.fresh(self.step) else self.carried[i]
            last = i + 1 == len(self.micro)
            with contextlib.nullcontext() if self.world == 1 or last else self.forward.no_sync():
                with autocast(self.device):
                    loss, state = self.forward(x, state, starts, return_state=True, targets=y)
                loss = loss / len(self.micro)
                loss.backward()
            if self.config.carry_state:
                self.carried[i] = [(window.detach(), h.detach()) for window, h in state]
            total += loss.detach()
        if self.world > 1:
            dist.all_reduce(total)
        loss = total.item() / self.world
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip).item()
        self.check_finite(f"loss {loss}, gradient norm {norm}", loss + norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss, norm

    def check_finite(self, what: str, value: float) -> None:
        """Raise FloatingPointError naming the step and the last good checkpoint unless the value is finite."""
        if not math.isfinite(value):
            kept = f"the last good checkpoint is {self.path}" if self.path.exists() else "there is no checkpoint yet"
            raise FloatingPointError(f"training diverged at step {self.step + 1}: {what}; {kept}; lower --lr")

    def save(self) -> None:
        """Write the checkpoint, atomically; every process must call it."""
        parts = [self.carried]
        if self.carried[0] is not None and self.world > 1:
            parts = [None] * self.world
            dist.all_gather_object(parts, self.carried)
        carried = []
        if self.carried[0] is not None:  # joined to the whole batch's, which any number of processes can split again
            layers = zip(*itertools.chain(*parts), strict=True)
            carried = [[torch.cat(pieces).cpu() for pieces in zip(*layer, strict=True)] for layer in layers]
        if self.rank == 0:
            tokenizer = self.corpus.tokenizer and self.corpus.tokenizer.to_json()
            content = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "carried": carried}
            content |= {"step": self.step, "best": self.best, "rng": torch.get_rng_state(), "tokenizer": tokenizer}
            content |= {"config": dataclasses.asdict(self.config)}
            content |= {"model_config": dataclasses.asdict(self.model.config)}
            write_atomically(self.path, lambda name: torch.save(content, name))

    def load(self) -> None:
        """Go on from the checkpoint in config.out. Raises ValueError naming every field in which its config differs."""
        content, now = load_run(self.path, self.device), dataclasses.asdict(self.config)
        then = {k: v for k, v in content["config"].items() if k not in FREE}
        differing = [f"{k} was {v!r}, is {now.get(k)!r}" for k, v in then.items() if v != now.get(k)]
        require(not differing, f"{self.path}: saved with another config: {'; '.join(differing)}; give the same flags")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.best = content["step"], content["best"]
        if content["carried"]:
            layers = [[tensor.to(self.device) for tensor in layer] for layer in content["carried"]]
            self.carried = [[(window[rows], h[rows]) for window, h in layers] for rows in self.micro]
        torch.set_rng_state(content["rng"].cpu())


def keep_memory() -> None:
    """Have glibc keep freed blocks: giving them back and fetching them anew each step takes up to half the time."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, as small ones do,
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks


def train(config: Config) -> dict:
    """The job `train`: writes checkpoint.pt, metrics.jsonl, result.json and loss.png to config.out."""
    began, device, out = time.perf_counter(), pick_device(config.device), Path(config.out)
    if "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    keep_memory()
    tokenizer = None
    if config.resume:
        path = out / "checkpoint.pt"
        require(path.is_file(), f"--resume: {out} holds no checkpoint.pt, must be the folder of a run; correct --out")
        tokenizer = (saved := load_run(path)["tokenizer"]) and Tokenizer.from_json(saved)
    corpus = load_corpus(config.data, config.tokenizer, tokenizer)
    check_length(corpus.train, config.length, f"{corpus.source}, training part")
    check_length(corpus.valid, 1, f"{corpus.source}, validation part")
    run = Run(config, corpus, device)
    require(not out.exists() or out.is_dir(), f"--out {out}: must be a folder, but a file is there; give another")
    out.mkdir(parents=True, exist_ok=True)
    if config.resume:
        run.load()
    say = print if run.rank == 0 else lambda *_, **__: None
    count, sizes = sum(p.numel() for p in run.model.parameters()), (len(corpus.train), len(corpus.valid))
    say(f"{count:,} parameters on {device} · {corpus.source}: {sizes[0]:,} tokens to train on, {sizes[1]:,} held out")
    baselines = ngram_baselines(corpus) if run.rank == 0 else {}
    say("bits a byte of n-grams on the same text: " + " · ".join(f"{k} {v:.3f}" for k, v in baselines.items()))
    history, pace = train_loop(run, say)
    if run.step < config.steps:
        raise KeyboardInterrupt
    result = {"parameters": count, "tokens_seen": config.steps * config.batch * config.length}
    result |= {"seconds_a_step": pace, "baselines_bits_a_byte": baselines}
    result["validation"] = evaluate(run.model, corpus, config)
    say(f"validation: {scores_text(result['validation'])}", flush=True)
    if run.rank == 0:
        most = run.model.config.longest
        prompt = corpus.tokenizer and len(corpus.tokenizer.encode(config.prompt, special=True))
        if prompt is not None and not 0 < prompt <= most:
            say(f"no sample: --prompt has {prompt} tokens, must have from 1 to {most}; `sample` takes another")
        elif prompt:
            fits = int(min(config.tokens, most - prompt + 1))
            result["sample"] = write_sample(run.model, corpus.tokenizer, dataclasses.replace(config, tokens=fits))
        plot(history, baselines, out / "loss.png")
        result = result_record(config, device, wall_seconds=round(time.perf_counter() - began, 1), **result)
        write_json(out / "result.json", result)
        say(f"{out}: result.json, metrics.jsonl, checkpoint.pt after {result['wall_seconds']:.0f} s")
    return result


def train_loop(run: Run, say: Callable) -> tuple[list[dict], float]:
    """Step to the end or to a Ctrl-C, logging, evaluating and saving. Returns the metrics and seconds a step."""
    config, path = run.config, Path(run.config.out) / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if config.resume else []
    history = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may leave half a line
    history = [row for row in history if row["step"] <= run.step]
    stop = threading.Event()
    previous = signal.signal(signal.SIGINT, lambda *_: stop.set() or signal.signal(signal.SIGINT, previous))
    first, busy = run.step, []  # seconds of each step
    try:
        with open(path if run.rank == 0 else os.devnull, "w", encoding="utf-8") as log:
            log.writelines(json.dumps(row) + "\n" for row in history)
            while run.step < config.steps and not stopped(stop, run):
                began = time.perf_counter()
                loss, norm = run.train_step()
                busy.append(time.perf_counter() - began)
                row = {"step": run.step, "loss": loss, "norm": norm, "lr": learning_rate(run.step - 1, config)}
                if due := run.step % config.eval_every == 0 or run.step == config.steps:
                    scores = evaluate(run.model, run.corpus, config, config.eval_tokens)
                    run.check_finite(f"validation loss {scores['loss']}", scores["loss"])
                    row |= {"valid_loss": scores["loss"], "valid_bits_a_byte": scores["bits_a_byte"]}
                    run.best = min(run.best, scores["loss"])
                    run.save()
                history.append(row)
                log.write(json.dumps(row) + "\n")
                log.flush()
                pace = sum(busy[1:]) / max(1, len(busy) - 1)  # the first step warms up and does not count
                if due or run.step - first < 3 or run.step % max(1, config.steps // 20) == 0:
                    parts = {"loss": f"{loss:.4f}"} | ({"valid": scores_text(scores)} if due else {})
                    parts |= {"norm": f"{norm:.2f}", "lr": f"{row['lr']:.1e}", "step": f"{pace * 1e3:.0f} ms"}
                    parts |= {"speed": f"{config.batch * config.length / pace if pace else 0:,.0f} tok/s"}
                    say(progress_line(run.step, config.steps, parts, pace), flush=True)
            if run.step < config.steps:
                run.save()
                words = [word for word in sys.argv if word != "--resume"] + ["--resume"]
                launcher = f"torchrun --nproc-per-node {run.world}" if run.world > 1 else "python"
                say(f"stopped after step {run.step}; to go on: {launcher} {shlex.join(words)}")
    finally:
        signal.signal(signal.SIGINT, previous)
    return history, pace if busy else 0.0


def stopped(stop: threading.Event, run: Run) -> bool:
    """Whether a Ctrl-C came, to any of the processes: all stop at the same step."""
    if run.world == 1:
        return stop.is_set()
    flags = torch.tensor(float(stop.is_set()), device=run.device)
    dist.all_reduce(flags)
    return flags.item() > 0


def scores_text(scores: dict) -> str:
    """`3.2100 nats a token, 1.9500 bits a byte`."""
    bits = f", {scores['bits_a_byte']:.4f} bits a byte" if scores["bits_a_byte"] else ""
    return f"{scores['loss']:.4f} nats a token{bits}"


def plot(history: list[dict], baselines: dict[str, float], path: Path) -> None:
    """Training and validation loss by step as a PNG, in bits a byte where known, with the n-grams' as lines."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed; pip install matplotlib")
        return
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    valid = [row for row in history if "valid_loss" in row]
    bits = bool(valid) and valid[-1]["valid_bits_a_byte"] is not None
    unit = valid[-1]["valid_bits_a_byte"] / valid[-1]["valid_loss"] if bits else 1.0  # bits a byte in a nat a token
    for rows, name, style in ((history, "loss", {"lw": 0.7}), (valid, "valid_loss", {"marker": "o", "ms": 3})):
        label = "training" if rows is history else "validation"
        axes.plot([row["step"] for row in rows], [row[name] * unit for row in rows], label=label, **style)
    for i, (name, value) in enumerate(baselines.items()):
        axes.axhline(value, ls="--", lw=1, color=f"C{i + 2}", label=name)
    axes.set(xlabel="step", ylabel="bits a byte" if bits else "nats a token", title=path.parent.name, ylim=(0, None))
    axes.legend()
    write_atomically(path, lambda name: figure.savefig(name, dpi=150, format="png"))
    plt.close(figure)


# ----- Sample, evaluate, main -----------------------------------------------------------------------------------------


def load_checkpoint(config: Config, device: torch.device) -> tuple[Mamba, Tokenizer | None]:
    """The model of config.checkpoint, our file or a folder of either layout, and its tokenizer.

    That is our checkpoint's own; a folder's is config.tokenizer where that is set, else its tokenizer.json.
    """
    path = Path(config.checkpoint or Path(config.out) / "checkpoint.pt")
    require(path.exists(), f"--checkpoint {path}: no such file or folder; train first, or correct the path")
    if path.is_dir():
        beside, named = path / "tokenizer.json", config.tokenizer
        if named == Config.tokenizer and beside.is_file():
            named = str(beside)
        model = Mamba.from_pretrained(str(path)).to(device)
        return model, None if named.startswith("bpe:") else load_tokenizer(named, [])
    content = load_run(path, device)
    model = Mamba(MambaConfig(**content["model_config"])).to(device)
    model.load_state_dict(content["model"])
    return model, content["tokenizer"] and Tokenizer.from_json(content["tokenizer"])


def write_sample(model: nn.Module, tokenizer: Tokenizer, config: Config) -> str:
    """Print the prompt and what the model writes after it, as it comes, in whole characters. Returns the text."""
    device, prompt = next(model.parameters()).device, tokenizer.encode(config.prompt, special=True).astype(np.int64)
    generator = torch.Generator(device).manual_seed(config.seed)
    decoder, text = codecs.getincrementaldecoder("utf-8")("replace"), config.prompt
    options = (config.tokens, config.temperature, config.top_k or None, config.top_p, generator)
    print(text, end="", flush=True)
    for token in model.stream(torch.from_numpy(prompt)[None].to(device), *options):
        piece = decoder.decode(tokenizer.decode_bytes(token.tolist()))
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def sample(config: Config) -> str:
    """The job `sample`."""
    model, tokenizer = load_checkpoint(config, pick_device(config.device))
    require(tokenizer is not None, f"--checkpoint {config.checkpoint}: has no tokenizer; name it by --tokenizer")
    return write_sample(model, tokenizer, config)


def evaluate_checkpoint(config: Config) -> dict:
    """The job `eval`: loss and bits a byte on the validation part of the data."""
    model, tokenizer = load_checkpoint(config, pick_device(config.device))
    fits = tokenizer is not None or config.data.endswith(".bin")
    require(fits, f"--checkpoint {config.checkpoint}: has no tokenizer for text; name its own by --tokenizer")
    corpus, size = load_corpus(config.data, config.tokenizer, tokenizer), model.config.vocab_size
    rule = f"has {corpus.vocab_size} tokens, the model's vocabulary {size}; give its --tokenizer"
    require(corpus.vocab_size <= size, f"{corpus.source}: {rule}")
    check_length(corpus.valid, 1, corpus.source)
    scores = evaluate(model, corpus, config)
    print(f"{corpus.source}: {scores_text(scores)}, {scores['tokens']:,} tokens")
    return scores


JOBS = {"train": train, "sample": sample, "eval": evaluate_checkpoint}


def build_parser() -> argparse.ArgumentParser:
    """The command line: a job and a flag for every field of `Config`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", nargs="?", default="train", choices=JOBS, help="train, sample from or eval a checkpoint")
    return add_flags(parser, Config)


def main(argv: list[str] | None = None) -> int:
    """Run a job from the command line. Returns 0; 1 when training diverged, 2 for bad input, 130 after Ctrl-C."""
    arguments = vars(build_parser().parse_args(argv))
    job = JOBS[arguments.pop("job")]
    try:
        job(Config(**arguments | (SMOKE if arguments["smoke"] else {})))
    except (UserError, OSError, FloatingPointError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
