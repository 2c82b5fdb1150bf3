# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "tiktoken==0.14.0"]
# ///
"""Transformer++: the language model that Mamba is measured against: train, sample, evaluate.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752, appendix E.2.1; its
parts are from Touvron et al., "LLaMA", arXiv 2302.13971.

    python transformer.py                     trains on Python's documentation: 3.9 minutes, two cores, 1.79 bits a byte
    python transformer.py sample --prompt "A" writes text with that checkpoint, seconds
    python transformer.py eval --data FILE    scores that checkpoint on your text, seconds

code               shape                 meaning
x                  (B, L, d_model)       the residual stream
q                  (B, L, H, d)          queries of H heads of d channels; (B, H, L, d) in attention
k, v               (B, L, G, d)          keys and values, each shared by a group of H / G query heads (2305.13245)
cos, sin           (L, 1, d)             of the rotary angles, position x theta^(-2i/d) (2104.09864)
cache              (B, G, capacity, d)   keys and values of the positions so far, a pair for each layer

Vanilla and "++", each with its flag: learned or rotary positions (`--position`), GELU or SwiGLU (`--mlp`, 2002.05202),
LayerNorm with biases in all linear layers or RMSNorm with none (`--norm`). `Attention` is the heart, `Cache` is why
generation slows down with the context, and Mamba's does not.

Differences from the paper
1. Model, text and number of steps are a laptop's, and the learning rate 1.5e-3; the recipe is the paper's otherwise.
2. Matrices start from a normal of 0.02, those that write to the residual stream from 0.02 / sqrt(2 n_layer), as
   GPT-2's; the paper does not say.

Not included: dropout, sliding windows, mixtures of experts, other rotary scalings than Llama 3's, tensor parallelism.
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
import re
import shlex
import signal
import sys
import sysconfig
import threading
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ----- Config ---------------------------------------------------------------------------------------------------------


PARTS = {"position": ("rope", "learned"), "mlp": ("swiglu", "gelu"), "norm": ("rmsnorm", "layernorm")}  # "++" first


@dataclass(frozen=True)
class TransformerConfig:
    """The model's sizes and parts; the defaults are the paper's 125M Transformer++."""

    d_model: int = 768  # width of the residual stream
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0  # heads of keys and values; 0: n_head
    d_ff: int | str = "auto"  # width inside the MLP; auto: 8/3 d_model up to a multiple of 128, with gelu 4 d_model
    vocab_size: int = 50277
    rope_theta: float = 10000.0  # wavelengths of the rotary positions go from 2 pi to 2 pi theta
    rope_scaling: dict | None = None  # Llama 3's stretching of the long ones, by Hugging Face's names
    norm_eps: float = 1e-5
    tie_embeddings: bool = True  # the head's weight is the embedding's
    max_length: int = 2048  # with learned positions no text may be longer; rotary ones have no end
    position: str = "rope"  # or learned
    mlp: str = "swiglu"  # or gelu
    norm: str = "rmsnorm"  # or layernorm, with which linear layers have biases

    def __post_init__(self):
        for name in ("d_model", "n_layer", "n_head", "vocab_size", "max_length"):
            require(getattr(self, name) >= 1, f"{name} {getattr(self, name)}: must be at least 1; raise it")
        for name, choices in PARTS.items():
            value, rule = getattr(self, name), f"must be {' or '.join(choices)}"
            require(value in choices, f"{name} {value!r}: {rule}; choose one of these")
        whole, kind = (2, "even") if self.position == "rope" else (1, "equal")
        fits = self.d_model % (self.n_head * whole) == 0
        require(fits, f"n_head {self.n_head}: must cut d_model {self.d_model} into {kind} widths; change either")
        fits = self.n_kv_head >= 0 and self.n_head % self.groups == 0
        require(fits, f"n_kv_head {self.n_kv_head}: must divide n_head {self.n_head}; change either")
        fits = self.d_ff == "auto" or (isinstance(self.d_ff, int) and self.d_ff >= 1)
        require(fits, f"d_ff {self.d_ff!r}: must be auto or an integer of at least 1; correct it")
        need = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        missing = [k for k in need if k not in self.rope_scaling] if self.rope_scaling else []
        require(not missing, f"rope_scaling {self.rope_scaling}: lacks {', '.join(missing)}; add them, or give None")

    @property
    def longest(self) -> float:
        """Positions that a text may have."""
        return math.inf if self.position == "rope" else self.max_length

    @property
    def head_size(self) -> int:
        return self.d_model // self.n_head

    @property
    def groups(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def hidden(self) -> int:
        if self.d_ff != "auto":
            return self.d_ff
        return -(-8 * self.d_model // 384) * 128 if self.mlp == "swiglu" else 4 * self.d_model


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
    d_model: int = flag(192, "width of the residual stream; paper: 768 (125M) to 2,048 (1.3B)")
    n_layer: int = flag(4, "layers of attention and MLP; paper: 12 to 24")
    n_head: int = flag(6, "attention heads; paper: 12 to 32")
    n_kv_head: int = flag(0, "heads of keys and values, shared by groups of query heads; 0: n_head, as in the paper")
    d_ff: int = flag(0, "width inside the MLP; 0: 8/3 d_model up to a multiple of 128, with gelu 4 d_model")
    position: str = flag("rope", "rope, or learned as in the vanilla Transformer")
    mlp: str = flag("swiglu", "swiglu, or gelu as in the vanilla Transformer")
    norm: str = flag("rmsnorm", "rmsnorm, or layernorm with biases everywhere as in the vanilla Transformer")
    steps: int = flag(2400, "optimiser steps; paper: 4,800 (125M)")
    batch: int = flag(4, "sequences a step, over all processes; paper: 256, half a million tokens")
    accumulate: int = flag(1, "micro-batches into which a process splits its part of the batch, to save memory")
    length: int = flag(256, "tokens a sequence; paper: 2,048")
    lr: float = flag(1.5e-3, "peak learning rate; paper: 3e-3 (125M), five times GPT-3's")
    min_lr: float = flag(1e-5, "learning rate at the end of the cosine")
    warmup: float = flag(0.1, "part of the steps in which the rate rises")
    weight_decay: float = flag(0.1, "of matrices; none for norms and biases")
    beta2: float = flag(0.95, "AdamW's second beta; the first is 0.9")
    clip: float = flag(1.0, "largest norm of the gradient")
    document_resets: bool = flag(False, "cut attention where a document starts; the paper packs them without")
    eval_every: int = flag(300, "steps from one evaluation and checkpoint to the next")
    eval_tokens: int = flag(20_000, "validation tokens for these, 0 for all; the last one takes all")
    compile: bool = flag(False, "torch.compile the model")
    checkpoint: str = flag("", "sample, eval: checkpoint or folder in Llama's layout; empty: OUT/checkpoint.pt")
    prompt: str = flag("The class", "sample: text to go on from")
    tokens: int = flag(300, "sample: tokens to write")
    temperature: float = flag(0.8, "sample: 0 takes the likeliest token")
    top_k: int = flag(0, "sample: draw from the k likeliest tokens; 0: from all")
    top_p: float = flag(1.0, "sample: draw from the fewest tokens that together are this likely")
    seed: int = flag(0, "seed of initialisation, data order and samples")
    device: str = flag("auto", "auto (cuda, mps or cpu, the first there is) or a torch device")
    out: str = flag("out/transformer", "folder of checkpoint, metrics, result and picture")
    resume: bool = flag(False, "go on from OUT/checkpoint.pt")
    smoke: bool = flag(False, "a tiny model for a few steps, whatever the other flags: does it run?")

    def __post_init__(self):
        for name, least in LEAST.items():
            value, most, words = getattr(self, name), MOST.get(name, math.inf), f"--{name.replace('_', '-')}"
            require(not value < least, f"{words} {value}: must be at least {least}; raise it")
            require(value <= most, f"{words} {value}: must be a number from {least} to {most}; lower it")  # NaN is not


SMOKE = {
    "d_model": 16, "n_layer": 2, "n_head": 2, "n_kv_head": 0, "d_ff": 0, "steps": 4, "batch": 4, "length": 32,
    "eval_every": 2, "tokenizer": "byte",
}  # fmt: skip
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


# ----- The method: attention with rotary positions --------------------------------------------------------------------


def rotary_frequencies(config: TransformerConfig) -> Tensor:
    """Radians a position, (d / 2,): theta^(-2i/d), equation (15) of 2104.09864; with `rope_scaling` as in Llama 3.

    That divides by `factor` where the wavelength exceeds original_length / low_freq_factor, leaves it alone below
    original_length / high_freq_factor, and goes from one to the other in between.
    """
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_size, 2).float() / config.head_size)
    if config.rope_scaling is None:
        return frequencies
    s = config.rope_scaling
    turns = s["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the original length
    keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    return torch.lerp(frequencies / s["factor"], frequencies, keep.clamp(0, 1))


def rotary_angles(config: TransformerConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """What `rotate` needs at the positions (L,): cos and sin of the angles, (L, 1, d) each, in float32."""
    angles = torch.outer(positions.float(), rotary_frequencies(config).to(positions.device)).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()  # (L, 1, d / 2)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) of x (..., L, H, d) by its angle at that position; see `rotary_angles`.

    Equation (34) of 2104.09864, with the pairs that Llama's checkpoints have: halves, not neighbours.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of q (B, H, L, d) and k, v (B, G, M, d), G a divisor of H: (B, H, L, d).

    mask (B or 1, 1, L, M) bool: what each query sees. None: itself and those before, for L = M; everything, for L = 1.
    """
    causal = mask is None and q.shape[2] > 1
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared)


def document_begins(starts: Tensor | None, begin: Tensor | None, past: int, length: int) -> Tensor | None:
    """Where the document of each of `length` positions from `past` on begins, (B, length); None: all at 0.

    starts (B, length) bool marks the first positions of documents; begin (B,): where that of position past - 1 began.
    """
    if starts is None:
        return None if begin is None else begin.unsqueeze(1).expand(-1, length)
    begins = torch.where(starts, torch.arange(past, past + length, device=starts.device), 0)
    if begin is not None:
        begins[:, 0] = torch.maximum(begins[:, 0], begin)
    return begins.cummax(dim=1).values


def visible(begins: Tensor | None, past: int, length: int, device: torch.device) -> Tensor | None:
    """The mask (B or 1, 1, length, past + length) for `attend`: no position ahead, none before the query's document.

    None where `attend` needs no mask.
    """
    if begins is None and (past == 0 or length == 1):
        return None
    keys = torch.arange(past + length, device=device)
    mask = keys <= keys[past:, None]  # (length, past + length)
    return mask[None, None] if begins is None else (mask & (keys >= begins.unsqueeze(-1))).unsqueeze(1)


class Cache:
    """Keys and values of the positions so far, in memory set aside once: (2, B, G, capacity, d) for each layer."""

    def __init__(self, config: TransformerConfig, batch: int, capacity: int, like: Tensor):
        shape = (2, batch, config.groups, capacity, config.head_size)
        self.layers = [like.new_empty(shape) for _ in range(config.n_layer)]
        self.capacity, self.length = capacity, 0
        self.begin: Tensor | None = None  # (B,) where each row's present document begins; None: at 0
        self.positions = torch.arange(capacity, device=like.device)
        self.angles = rotary_angles(config, self.positions) if config.position == "rope" else None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, G, L, d) after the `length` positions there are; returns all, (B, G, length + L, d)."""
        end, (keys, values) = self.length + k.shape[2], self.layers[layer]
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        return keys[:, :, :end], values[:, :, :end]


# ----- The model ------------------------------------------------------------------------------------------------------


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


class LayerNorm(nn.LayerNorm):
    """PyTorch's, computed in float32 (float64 for float64) where the parameters are narrower."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries. Names are the checkpoints' names."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        bias, self.head_size = config.norm == "layernorm", config.head_size
        shared = config.groups * config.head_size
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias)
        self.k_proj = nn.Linear(config.d_model, shared, bias)
        self.v_proj = nn.Linear(config.d_model, shared, bias)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias)

    def forward(self, x: Tensor, angles, mask: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
        """x (B, L, d_model) -> (B, L, d_model); angles is `rotary_angles`' cos and sin, or None."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_size)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or G, L, d)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """(SiLU(x W_gate) * x W_up) W_down: FFN_SwiGLU of 2002.05202."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        bias = config.norm == "layernorm"
        self.gate_proj = nn.Linear(config.d_model, config.hidden, bias)
        self.up_proj = nn.Linear(config.d_model, config.hidden, bias)
        self.down_proj = nn.Linear(config.hidden, config.d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def stepper(self) -> Callable:
        """residual + `forward` for residual and x (B, d_model), in place; see `lean`."""
        gate, up, down = lean(self.gate_proj), lean(self.up_proj), lean_add(self.down_proj)
        return lambda residual, x: down(residual, F.silu(gate(x), inplace=True).mul_(up(x)))


class GELU(nn.Module):
    """GELU(x W_up) W_down, the vanilla Transformer's."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        bias = config.norm == "layernorm"
        self.up_proj = nn.Linear(config.d_model, config.hidden, bias)
        self.down_proj = nn.Linear(config.hidden, config.d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))

    def stepper(self) -> Callable:
        """residual + `forward` for residual and x (B, d_model), in place; see `lean`."""
        up, down = lean(self.up_proj), lean_add(self.down_proj)
        return lambda residual, x: down(residual, F.gelu(up(x)))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm; the residual stream around them stays in float32."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else GELU(config)

    def forward(self, x: Tensor, *context) -> Tensor:
        """x (B, L, d_model) -> (B, L, d_model); context is `Attention`'s."""
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))

    def stepper(self, cache: Cache, layer: int) -> Callable:
        """`forward` for one position as a function (x (B, d_model), angles) -> (B, d_model); see `lean`."""
        attention, memory = self.self_attn, cache.layers[layer]
        projections = [lean(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        norm, norm_mlp, mlp = lean(self.input_layernorm), lean(self.post_attention_layernorm), self.mlp.stepper()
        out, (_, B, G, _, d) = lean_add(attention.o_proj), memory.shape
        H = attention.q_proj.out_features // d
        heads = memory.new_empty(B, H + 2 * G, d)
        parts = heads.flatten(1).split([H * d, G * d, G * d], dim=1)
        qk, q = heads[:, : H + G], heads[:, :H].unsqueeze(2)
        halves = qk.unflatten(2, (2, -1)) if cache.angles else None  # swapped, they are qk rolled by d/2
        kv = heads[:, H:].unflatten(1, (2, G)).transpose(0, 1)

        def step(x: Tensor, angles) -> Tensor:
            y, n = norm(x), cache.length
            for project, part in zip(projections, parts, strict=True):
                project(y, out=part)
            if angles is not None:
                torch.addcmul(qk * angles[0], halves.flip(2).view_as(qk), angles[1], out=qk)  # `rotate`
            memory.select(3, n).copy_(kv)
            x = out(x, attend(q, *memory.narrow(3, 0, n + 1)).flatten(1))
            return mlp(x, norm_mlp(x))

        return step


def make_norm(config: TransformerConfig) -> nn.Module:
    """The norm that the config names."""
    return (RMSNorm if config.norm == "rmsnorm" else LayerNorm)(config.d_model, eps=config.norm_eps)


def lean(module: nn.Module) -> Callable:
    """What a linear layer or norm computes for x (B, d_model), without the module: decoding waits for calls."""
    if isinstance(module, nn.Linear):
        multiply = torch.mm if module.bias is None else functools.partial(torch.addmm, module.bias)
        return functools.partial(multiply, mat2=module.weight.t())
    if isinstance(module, RMSNorm) and module.weight.dtype == torch.float32:
        weight, floor = module.weight * math.sqrt(len(module.weight)), module.floor
        return lambda x: x.div(torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)).mul_(weight)
    return module


def lean_add(layer: nn.Linear) -> Callable:
    """A function (x, y): x += layer(y), in one operation where it can be; see `lean`."""
    if layer.bias is None and layer.weight.dtype == torch.float32:
        weight = layer.weight.t()
        return lambda x, y: x.addmm_(y, weight)
    multiply = lean(layer)
    return lambda x, y: x.add_(multiply(y))


class Transformer(nn.Module):
    """The Transformer language model: embedding, layers, norm, head."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config, self.model = config, nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.model.embed_positions = nn.Embedding(config.max_length, config.d_model)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.model.norm = make_norm(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))  # to the residual stream
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * config.n_layer) if writes else 1))

    def hidden(self, tokens: Tensor, cache: Cache | None = None, starts: Tensor | None = None) -> Tensor:
        """tokens (B, L) -> the residual stream after the last norm, (B, L, d_model); see `forward`."""
        length, past, begin = tokens.shape[1], *((cache.length, cache.begin) if cache else (0, None))
        self.check_room(past + length, cache)
        begins = document_begins(starts, begin, past, length)
        positions, angles = torch.arange(past, past + length, device=tokens.device), None
        x = self.embed(tokens, positions if begins is None else positions - begins)
        if self.config.position == "rope":
            angles = rotary_angles(self.config, positions)
        mask = visible(begins, past, length, tokens.device)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, angles, mask, cache, i)
        if cache is not None:
            cache.length, cache.begin = past + length, None if begins is None else begins[:, -1]
        return self.model.norm(x)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens at their positions -> the residual stream (..., d_model), float32 or wider."""
        x = self.model.embed_tokens(tokens)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x if self.config.position == "rope" else x + self.model.embed_positions(positions)

    def check_room(self, count: int, cache: Cache | None = None) -> None:
        """Raise ValueError where the cache or learned positions do not reach that far."""
        fits = cache is None or count <= cache.capacity
        require(fits, f"{count} positions: {fits or f'the cache holds {cache.capacity}'}; give init_cache more")
        fits = count <= self.config.longest
        require(fits, f"{count} positions: learned ones end at max_length {self.config.max_length}; shorten the text")

    def forward(self, tokens: Tensor, cache: Cache | None = None, starts: Tensor | None = None, targets=None) -> Tensor:
        """tokens (B, L) -> logits (B, L, V). With a cache, tokens follow what is in it, and are added to it.

        starts (B, L) bool marks where a document begins: it sees nothing before it. With targets (B, L) the mean loss
        takes the place of the logits; see `head_loss`.
        """
        x = self.hidden(tokens, cache, starts)
        return self.lm_head(x) if targets is None else head_loss(x, self.lm_head.weight, targets)

    def stepper(self, cache: Cache) -> Callable[[Tensor], Tensor]:
        """A function token (B,) -> logits (B, V): `forward` for one more position of the cache, in few operations."""
        layers = [layer.stepper(cache, i) for i, layer in enumerate(self.model.layers)]
        norm, head, embedding = lean(self.model.norm), lean(self.lm_head), self.model.embed_tokens.weight
        plain = self.config.position == "rope" and embedding.dtype == torch.float32

        def step(token: Tensor) -> Tensor:
            n = cache.length
            if cache.begin is not None or n == cache.capacity:  # earlier documents are in the cache, or it is full
                return self(token.unsqueeze(1), cache)[:, -1]
            x = embedding[token] if plain else self.embed(token, cache.positions[n])
            angles = cache.angles and (cache.angles[0][n], cache.angles[1][n])
            for layer in layers:
                x = layer(x, angles)
            cache.length = n + 1
            return head(norm(x))

        return step

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `capacity` positions of each of `batch` rows."""
        self.check_room(capacity)
        return Cache(self.config, batch, capacity, self.lm_head.weight)

    @torch.inference_mode()
    def stream(self, tokens: Tensor, max_new_tokens: int, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Yield `max_new_tokens` tokens (B,) that follow the prompt (B, L >= 1): prefill, then one at a time."""
        fits = tokens.ndim == 2 and tokens.shape[1] > 0
        require(fits, f"prompt of shape {tuple(tokens.shape)}: must be (B, L) with L >= 1; give at least one token")
        capacity = tokens.shape[1] + max(0, max_new_tokens - 1)
        cache = self.init_cache(len(tokens), capacity)
        logits, step = self.lm_head(self.hidden(tokens, cache)[:, -1]), self.stepper(cache)
        for i in range(max_new_tokens):
            token = sample_token(logits, temperature, top_k, top_p, generator)
            yield token
            if i + 1 < max_new_tokens:
                logits = step(token)

    @classmethod
    def from_pretrained(cls, folder: str) -> Transformer:
        """Read a local folder in Llama's layout; see `read_folder`."""
        return read_folder(folder)

    def save_pretrained(self, folder: str) -> None:
        """Write Llama's layout; see `write_folder`."""
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


# ----- Checkpoint folders: Llama's layout by Hugging Face -------------------------------------------------------------

NAMES = {  # Hugging Face's name of each of our fields
    "d_model": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "d_ff": "intermediate_size", "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings", "max_length": "max_position_embeddings",
}  # fmt: skip
DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048}  # where it has none
NEEDED = {
    "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0,
    "partial_rotary_factor": 1, "quantization_config": None,
}  # fmt: skip


def read_config(fields: dict) -> tuple[dict, list[str]]:
    """A config.json of Llama's layout -> arguments of TransformerConfig, and what in it we do not do."""
    given = {ours: (DEFAULTS | fields)[theirs] for ours, theirs in NAMES.items() if theirs in DEFAULTS | fields}
    given["n_kv_head"] = given.get("n_kv_head") or 0
    problems = [f"{k} = {fields[k]!r}, must be {v!r}" for k, v in NEEDED.items() if fields.get(k, v) not in (v, None)]
    sizes = ("d_model", "n_layer", "n_head", "d_ff", "vocab_size")
    problems += [f"{NAMES[k]} is missing" for k in sizes if k not in given]
    if not problems and fields.get("head_dim") not in (None, given["d_model"] // given["n_head"]):
        problems.append(f"head_dim = {fields['head_dim']}, must be hidden_size / num_attention_heads")
    rope = fields.get("rope_parameters") or {}  # since transformers 5; before, rope_theta and rope_scaling
    scaling = rope or fields.get("rope_scaling") or {}
    given["rope_theta"] = 1.0 * rope.get("rope_theta", fields.get("rope_theta", 10000.0))  # no string
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "llama3":
        given["rope_scaling"] = {k: v for k, v in scaling.items() if k != "rope_theta"}
    elif kind != "default":
        problems.append(f"rope type {kind!r}, must be default or llama3")
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


def read_folder(folder: str) -> Transformer:
    """The model in a local folder; raises ValueError once, listing all that does not fit in its config or tensors."""
    try:
        given, problems = read_config(read_fields(folder))
        require(not problems, f"{folder}: cannot be done here: {'; '.join(problems)}; give a plain Llama")
        model = Transformer(TransformerConfig(**given))
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{folder}: config.json has a wrong value ({str(error)[:70]!r}); correct it") from None
    constant = "rotary_emb.inv_freq"  # in old files
    tensors = {k: v for k, v in read_tensors(Path(folder)).items() if not k.endswith(constant)}
    if model.config.tie_embeddings and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    check_tensors(folder, model.state_dict(), tensors)
    model.load_state_dict(tensors)
    return model


def write_folder(model: Transformer, folder: str) -> None:
    """Write Llama's layout, which `transformers` reads."""
    config = model.config
    plus = {name: choices[0] for name, choices in PARTS.items()}
    vanilla = [f"{name} {getattr(config, name)}" for name, value in plus.items() if getattr(config, name) != value]
    require(not vanilla, f"{', '.join(vanilla)}: Llama's layout holds Transformer++ only; save the checkpoint")
    fields = {theirs: getattr(config, ours) for ours, theirs in NAMES.items()}
    fields |= {"num_key_value_heads": config.groups, "intermediate_size": config.hidden, "head_dim": config.head_size}
    scaling = config.rope_scaling and config.rope_scaling | {"rope_type": "llama3"}
    fields |= {"rope_theta": config.rope_theta, "rope_scaling": scaling, "hidden_act": "silu"}
    fields |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False}
    fields |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    tensors = model.state_dict()
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

    Shuffled epochs of non-overlapping windows, from a new offset each epoch.
    """

    def __init__(self, tokens: np.ndarray, batch: int, length: int, seed: int):
        self.size, self.batch, self.length, self.seed = len(tokens), batch, length, seed
        self.windows = (len(tokens) - 1) // length  # of an epoch
        self.epoch, self.order = -1, np.zeros(0, np.int64)

    def offsets(self, step: int) -> np.ndarray:
        """The first position of each of the step's windows, (batch,)."""
        numbers = np.arange(step * self.batch, (step + 1) * self.batch)
        return np.array([self.shuffled(n // self.windows)[n % self.windows] for n in numbers])

    def shuffled(self, epoch: int) -> np.ndarray:
        """The first positions of an epoch's windows, in its order."""
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            slack = self.size - 1 - self.windows * self.length
            self.epoch, self.order = epoch, rng.permutation(self.windows) * self.length + rng.integers(slack + 1)
        return self.order


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
    """AdamW; weight decay for matrices only."""
    groups: dict[bool, list] = {True: [], False: []}
    for parameter in model.parameters():
        groups[parameter.ndim > 1].append(parameter)
    groups = [{"params": ps, "weight_decay": config.weight_decay * decayed} for decayed, ps in groups.items()]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=device.type == "cuda")


def autocast(device: torch.device):
    """bfloat16 on CUDA, around float32 parameters; elsewhere nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def evaluate(model: Transformer, corpus: Corpus, config: Config, limit: int = 0) -> dict:
    """Loss on the validation text in nats a token and bits a byte: every token but the first predicted once.

    Each window of config.length starts from nothing. `limit` tokens, or all of them at 0.
    """
    tokens = corpus.valid[: limit + 1] if limit else corpus.valid
    offsets = range(0, len(tokens) - 1, config.length)
    whole = (len(tokens) - 1) // config.length
    chunks = [offsets[i : min(i + config.batch, whole)] for i in range(0, whole, config.batch)] + [offsets[whole:]]
    sizes = torch.from_numpy(corpus.byte_lengths())
    device, nats, count, size = next(model.parameters()).device, 0.0, 0, 0
    for chunk in filter(len, chunks):
        x, y, starts = gather(corpus, tokens, chunk, config, device)
        with autocast(device):
            logits = model(x, starts=starts)
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


def make_model(config: Config, vocab_size: int) -> Transformer:
    """A new model of the sizes and parts that the flags say; learned positions reach one window."""
    chosen = {name: getattr(config, name) for name in ("d_model", "n_layer", "n_head", "n_kv_head", *PARTS)}
    chosen |= {"d_ff": config.d_ff or "auto", "vocab_size": vocab_size, "max_length": config.length}
    return Transformer(TransformerConfig(**chosen))


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
        self.batches = Batches(corpus.train, config.batch, config.length, config.seed)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.model = make_model(config, corpus.vocab_size).to(device)
        self.optimizer = make_optimizer(self.model, config, device)
        self.forward = torch.compile(self.model) if config.compile else self.model
        if self.world > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.forward)
        self.step, self.best = 0, math.inf

    def train_step(self) -> tuple[float, float]:
        """One optimiser step: loss (nats a token) and gradient norm. Raises FloatingPointError if not finite."""
        total = torch.zeros((), device=self.device)
        for i, rows in enumerate(self.micro):
            offsets = self.batches.offsets(self.step)[rows]
            x, y, starts = gather(self.corpus, self.corpus.train, offsets, self.config, self.device)
            last = i + 1 == len(self.micro)
            with contextlib.nullcontext() if self.world == 1 or last else self.forward.no_sync():
                with autocast(self.device):
                    loss = self.forward(x, starts=starts, targets=y) / len(self.micro)
                loss.backward()
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
        if self.rank == 0:
            tokenizer = self.corpus.tokenizer and self.corpus.tokenizer.to_json()
            content = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
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


def load_checkpoint(config: Config, device: torch.device) -> tuple[Transformer, Tokenizer | None]:
    """The model of config.checkpoint, our file or a folder in Llama's layout, and its tokenizer.

    That is our checkpoint's own; a folder's is config.tokenizer where that is set, else its tokenizer.json.
    """
    path = Path(config.checkpoint or Path(config.out) / "checkpoint.pt")
    require(path.exists(), f"--checkpoint {path}: no such file or folder; train first, or correct the path")
    if path.is_dir():
        beside, named = path / "tokenizer.json", config.tokenizer
        if named == Config.tokenizer and beside.is_file():
            named = str(beside)
        model = Transformer.from_pretrained(str(path)).to(device)
        return model, None if named.startswith("bpe:") else load_tokenizer(named, [])
    content = load_run(path, device)
    model = Transformer(TransformerConfig(**content["model_config"])).to(device)
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
