# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "tiktoken==0.14.0"]
# ///
"""Mamba in one file: a selective state space language model, trained, sampled and evaluated in plain PyTorch.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752.

    @@COMMANDS@@

| code                 | shape        | paper                                                                        |
|----------------------|--------------|------------------------------------------------------------------------------|
| u, y                 | (B, L, D)    | x, y: input and output of the SSM; D here is the paper's expanded width ED   |
| delta                | (B, L, D)    | Δ: step size, softplus(parameter + s_Δ(x)); large: take in, small: ignore    |
| A                    | (D, N)       | A: diagonal, negative; a_t = exp(Δ_t A) is the decay of the state            |
| B, C                 | (B, L, N)    | B, C: what of the input enters the state, what of the state is read out      |
| D                    | (D,)         | the skip connection D, which the paper's algorithms leave out                |
| z                    | (B, L, D)    | the gating branch of Figure 3                                                |
| state, h             | (B, D, N)    | h_t: all that the model remembers                                            |
| d_model, d_inner     |              | D, ED of Figure 3; E = 2                                                     |
| d_state, rank        |              | N = 16; R = D/16, the rank of s_Δ                                            |

Where to look: `selective_scan_step` is the recurrence, `ChunkedScan` computes it in parallel, `MambaBlock` is Figure 3.

Differences from the paper: (1) B is discretised by Euler's rule, delta B u, as in the official code; equation (4) has the
exact zero-order hold. (2) The scan is pure PyTorch; the paper's is a fused CUDA kernel. (3) The default model, text and
number of steps are those of a laptop. (4) Windows are drawn as epochs of shuffled, non-overlapping stretches of the text.
(5) The SSM's input-independent B and C (`selective`) start at 1 and at a normal draw, as S4D's; the paper does not say.

Not included: tensor parallelism, mixture with attention layers, Mamba-2, training data of the paper (the Pile).
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
import hashlib
import heapq
import importlib
import itertools
import json
import math
import os
import pickle
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
from types import SimpleNamespace

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ----- Config ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MambaConfig:
    """The model's sizes; the defaults are the 130M model's but for vocab_size."""

    d_model: int = 768  # width of the residual stream
    n_layer: int = 24
    vocab_size: int = 50277  # logits; the embedding has more rows, see pad_vocab_size_multiple
    d_state: int = 16  # N, states a channel
    d_conv: int = 4  # taps of the convolution
    expand: int = 2  # E, the block's width in units of d_model
    dt_rank: int | str = "auto"  # R; auto = ceil(d_model / 16)
    dt_min: float = 0.001  # step sizes at initialisation: log-uniform from here
    dt_max: float = 0.1  # to here,
    dt_init_floor: float = 1e-4  # and nowhere below this
    bias: bool = False  # of in_proj and out_proj
    conv_bias: bool = True
    tie_embeddings: bool = True  # the head's weight is the embedding's
    pad_vocab_size_multiple: int = 8  # rows of the embedding are rounded up to this
    norm_eps: float = 1e-5
    selective: tuple[str, ...] = ("delta", "B", "C")  # which depend on the input; none: time-invariant, as S4D

    def __post_init__(self):
        if unknown := set(self.selective) - {"delta", "B", "C"}:
            raise UserError(f"selective has {sorted(unknown)}, must be among delta, B, C; drop what is not")
        for name in ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "expand", "pad_vocab_size_multiple"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{name} = {value} must be at least 1; raise it")

    @property
    def d_inner(self) -> int:
        return int(self.expand * self.d_model)

    @property
    def rank(self) -> int:
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank


def flag(default, text: str):
    """A field of a job's config and its flag: default and help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Everything that decides a training run; a flag each."""

    data: str = flag("", "text file, folder, .jsonl or .bin of tokens; empty: the documentation that ships with Python")
    tokenizer: str = flag("bpe:1024", "byte, bpe:N, a tiktoken encoding, a .tiktoken file or a tokenizer.json")
    d_model: int = flag(192, "width of the residual stream; paper: 768 for 130M to 2560 for 2.8B")
    n_layer: int = flag(4, "Mamba blocks; paper: 24 to 64")
    d_state: int = flag(16, "N, states a channel")
    selective: str = flag("delta,B,C", "which of delta, B, C depend on the input; empty: a time-invariant model")
    steps: int = flag(400, "optimiser steps; paper: 4,800 for 130M")
    batch: int = flag(16, "sequences a step, over all processes; paper: half a million tokens a step")
    accumulate: int = flag(1, "micro-batches that a process splits its share of the batch into, to save memory")
    length: int = flag(256, "tokens a sequence; paper: 2,048")
    lr: float = flag(3e-3, "peak learning rate; paper: 5 x GPT-3's, so 3e-3 for 130M")
    min_lr: float = flag(1e-5, "learning rate at the end of the cosine")
    warmup: float = flag(0.1, "share of the steps in which the rate rises linearly")
    weight_decay: float = flag(0.1, "of matrices; not of A_log, D, norms and biases")
    beta2: float = flag(0.95, "AdamW's second beta; the first is 0.9")
    clip: float = flag(1.0, "largest norm of the gradient")
    carry_state: bool = flag(False, "let the state run on from batch to batch over contiguous text, gradients cut")
    document_resets: bool = flag(False, "reset the state where a document starts; the paper packs without")
    eval_every: int = flag(100, "steps between evaluations and checkpoints")
    eval_tokens: int = flag(20_000, "validation tokens of those; the last evaluation takes all (0: always all)")
    seed: int = flag(0, "seed of initialisation, data order and sampling")
    device: str = flag("auto", "auto (cuda, mps or cpu), or a torch device")
    compile: bool = flag(False, "torch.compile what surrounds the scan")
    out: str = flag("out/mamba", "folder of checkpoint, metrics, result and picture")
    resume: bool = flag(False, "go on from the checkpoint in --out")
    smoke: bool = flag(False, "a tiny model for a few steps: does it run at all?")


SMOKE = {"d_model": 16, "n_layer": 2, "steps": 4, "batch": 4, "length": 32, "eval_every": 2, "eval_tokens": 500}
SMOKE |= {"tokenizer": "byte"}


@dataclass(frozen=True)
class SampleConfig:
    """Write text with a checkpoint."""

    checkpoint: str = flag(
        "out/mamba/checkpoint.pt", "our checkpoint, or a folder in the official or Hugging Face layout"
    )
    prompt: str = flag("The class", "text to go on from")
    tokenizer: str = flag("", "as for train; empty: the checkpoint's own, or tokenizer.json in its folder")
    tokens: int = flag(300, "tokens to write")
    temperature: float = flag(0.8, "0 takes the likeliest token")
    top_k: int = flag(0, "draw from the k likeliest tokens; 0: from all")
    top_p: float = flag(1.0, "draw from the fewest tokens of at least this probability together")
    seed: int = flag(0, "seed of the draws")
    device: str = flag("auto", "auto (cuda, mps or cpu), or a torch device")


@dataclass(frozen=True)
class EvalConfig:
    """Loss of a checkpoint on text."""

    checkpoint: str = flag(
        "out/mamba/checkpoint.pt", "our checkpoint, or a folder in the official or Hugging Face layout"
    )
    data: str = flag("", "as for train; its validation part is scored")
    tokenizer: str = flag("", "as for train; empty: the checkpoint's own, or tokenizer.json in its folder")
    length: int = flag(256, "tokens a window")
    batch: int = flag(16, "windows at once")
    carry_state: bool = flag(False, "let the state run on from window to window")
    document_resets: bool = flag(False, "reset the state where a document starts")
    device: str = flag("auto", "auto (cuda, mps or cpu), or a torch device")
    out: str = flag("", "folder for eval.json; empty: print only")


# ----- Shared block: the same text in every script --------------------------------------------------------------------


class UserError(ValueError):
    """Bad input from the user: one line that says the value, the rule and the fix."""


def add_flags(parser: argparse.ArgumentParser, config_class: type) -> argparse.ArgumentParser:
    """A flag for every field of a job's config dataclass, with its help and its default; unknown flags exit with 2."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    for field in dataclasses.fields(config_class):
        kind = (
            {"action": argparse.BooleanOptionalAction}
            if isinstance(field.default, bool)
            else {"type": type(field.default)}
        )
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=field.default, help=field.metadata["help"], **kind)
    return parser


def pick_device(name: str) -> torch.device:
    """The torch device of that name; auto is cuda, mps or cpu, the first that is there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); try auto or cpu") from None
    return torch.device(name)


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Call write(temporary name), then rename: a crash leaves the old file or the new one, never half of one."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path: Path, value: object) -> None:
    """Write value as readable JSON, atomically."""
    write_atomically(path, lambda name: Path(name).write_text(json.dumps(value, indent=2) + "\n", "utf-8"))


def progress_line(step: int, steps: int, parts: dict[str, str], seconds_a_step: float) -> str:
    """`step 10/400 · loss 3.21 · ... · 4:12 left`, on a line of its own in a terminal and in a log alike."""
    left = round((steps - step) * seconds_a_step)
    words = [f"step {step:,}/{steps:,}", *(f"{k} {v}" for k, v in parts.items()), f"{left // 60}:{left % 60:02} left"]
    return " · ".join(words)


def result_record(config: object, device: torch.device, **rest) -> dict:
    """What a result file says of its run: config, command, versions, device, this script's hash, and `rest`."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )
    script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    record = {"config": dataclasses.asdict(config), "argv": sys.argv, "versions": versions, "device": name}
    return record | {"script_sha256": script} | rest


# ----- Data: documents -> tokens -> train and valid ------------------------------------------------------------------

END = "<|endoftext|>"
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # split pattern, as the next
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
    r"\s+(?!\S)|\s"
)


def require(ok: bool, message: str) -> None:
    """Raise UserError(message) unless `ok`."""
    if not ok:
        raise UserError(message)


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
        except ValueError as error:  # what its regular expressions cannot do
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

    def byte_lengths(self) -> np.ndarray:
        """Bytes of each token, int64 (vocab_size,): 1 for the separator, 0 for an id without a token."""
        lengths = [1 if i == self.separator else len(self.bytes_of.get(i, b"")) for i in range(self.vocab_size)]
        return np.array(lengths, np.int64)

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
    require(
        documents != [], f"tokenizer {name!r}: bpe:N learns from text and has none; name a trained tokenizer's file"
    )
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
            touchy = form and token["normalized"] and not token["content"].isspace()
            if touchy or token["lstrip"] or token["rstrip"] or token["single_word"]:
                flaws.append(f"added token {token['content']!r} (lstrip, rstrip, single_word or normalized)")
        patterns = [cut["pattern"].get("Regex") or re.escape(cut["pattern"]["String"]) for cut in splits]
        patterns += [GPT2] if last.get("use_regex", True) else []
        flaws += [f"{len(patterns)} split patterns"] * (len(patterns) != 1)
        added = [(token["content"], token["id"], token["special"]) for token in added]
        require(not flaws, f"{path}: unsupported: {'; '.join(flaws)}; give a byte-level BPE tokenizer.json")
        ids = {bytes(byte_of[c] for c in t): i for t, i in model["vocab"].items() if byte_of.keys() >= set(t)}
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merges = [tuple(bytes(byte_of[c] for c in side) for side in pair) for pair in pairs]
        ranks = {token: ids[token] for token in [*(bytes([b]) for b in range(256)), *(a + b for a, b in merges)]}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: must be a byte-level BPE tokenizer.json, but {error!r}; give another") from None
    if model.get("ignore_merges"):
        ranks |= ids  # words of the vocabulary that no merge makes are tokens as well, in tiktoken always
    rule = "merges that tiktoken would take in another order; give another"
    require(same_merges(merges, ranks), f"{path}: unsupported: {rule}")
    return Tokenizer(path, ranks, patterns[0], added, bool(form))


def same_merges(merges: list[tuple[bytes, bytes]], ranks: dict[bytes, int]) -> bool:
    """Whether merging by rank of the result, as tiktoken does, follows this list of merges, as Hugging Face does."""
    order, allowed = [ranks[a + b] for a, b in merges], set(merges)
    if order != sorted(order):
        return False
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:  # merge what comes before this token
            best, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
            if best >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2 and tuple(parts) not in allowed:
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
        beside = description.parent / name
        tokenizer = load_tokenizer(str(beside) if beside.is_file() else name, [])
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

    A separator is one zero byte, as in `Tokenizer.byte_lengths`.
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
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective state space model (Algorithm 2): h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,  y_t = C_t h_t + D u_t.

    u, delta, z: (B, L, D); A: (D, N) real; B, C: (B, L, N), or (D, N) when input-independent (Algorithm 1, S4);
    D, delta_bias: (D,); initial_state: (B, D, N); starts: (B, L) bool, True where the state is reset *before* that
    position. delta_bias is added to delta before the softplus that `delta_softplus` asks for; z gates: y * SiLU(z).
    Returns y (B, L, D) in u's dtype, and with `return_final_state` the last state (B, D, N). Everything is computed in
    float32, or in float64 for float64 u. Raises ValueError for shapes that do not fit and for an unknown backend.
    """
    _check_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, starts)
    if backend == "auto":
        backend = "chunked"  # the fastest that works here
    if backend not in SCANS:
        raise UserError(f"scan backend {backend!r} does not exist; choose auto, {', '.join(SCANS)}")
    with torch.autocast(u.device.type, enabled=False):
        y, state = SCANS[backend](u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, starts)
    return (y, state) if return_final_state else y


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
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
    state = A_bar * state + B_bar_u
    y = (state * (C if C.ndim == 3 else C.unsqueeze(1))).sum(-1)  # (B, D)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z.to(state.dtype))
    return y.to(dtype), state


def _scan_sequential(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, starts):
    """The recurrence, one position after another: for reading, and slow under autograd."""
    dtype = _state_dtype(u)
    state = u.new_zeros(u.shape[0], *A.shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    ys = []
    for t in range(u.shape[1]):
        if starts is not None:
            state = state.masked_fill(starts[:, t, None, None], 0.0)
        B_t, C_t = (w[:, t] if w.ndim == 3 else w.unsqueeze(0) for w in (B, C))
        z_t = None if z is None else z[:, t]
        y, state = selective_scan_step(state, u[:, t], delta[:, t], A, B_t, C_t, D, z_t, delta_bias, delta_softplus)
        ys.append(y)
    return torch.stack(ys, dim=1), state


@torch.compiler.disable
def _scan_chunked(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, starts):
    """The parallel scan in pure PyTorch; see `ChunkedScan`."""
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _ChunkedScanFunction.apply(*tensors, delta_softplus, starts)
    y, state, _ = ChunkedScan(*tensors[:-1], delta_softplus, starts).forward(initial_state, save=False)
    return y, state


SCANS = {"sequential": _scan_sequential, "chunked": _scan_chunked}


def _state_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _check_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, starts) -> None:
    """Raise ValueError with the tensor's name, its shape and the shape it should have."""
    if u.ndim != 3 or A.ndim != 2 or 0 in u.shape:
        raise UserError(
            f"selective_scan: u {tuple(u.shape)} must be (B, L, D), none of them 0, and A {tuple(A.shape)} (D, N)"
        )
    (b, l, d), n = u.shape, A.shape[1]
    want = {"delta": (b, l, d), "A": (d, n), "B": (b, l, n), "C": (b, l, n), "D": (d,), "z": (b, l, d)}
    want |= {"delta_bias": (d,), "initial_state": (b, d, n), "starts": (b, l)}
    given = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    given |= {"initial_state": initial_state, "starts": starts}
    for name, x in given.items():
        static = name in "BC" and x.shape == (d, n)
        if x is not None and x.shape != want[name] and not static:
            raise UserError(f"selective_scan: {name} is {tuple(x.shape)}, must be {want[name]} for u {tuple(u.shape)}")
    if starts is not None and starts.dtype != torch.bool:
        raise UserError(f"selective_scan: starts is {starts.dtype}, must be torch.bool; use starts.bool()")


def scan_(a: Tensor, h: Tensor, state: Tensor) -> None:
    """In place, h_t = a_t h_{t-1} + h_t along dim 1 of (Q, T, N, K); `state` (Q, N, K) is h_{-1} before, h_{T-1} after."""
    last = state
    for a_t, h_t in zip(a.unbind(1), h.unbind(1), strict=True):
        last = h_t.addcmul_(a_t, last)
    state.copy_(last)


def scan_back_(a: Tensor, g: Tensor, grad_state: Tensor) -> None:
    """The adjoint of `scan_`, in place: g_t = g_t + a_{t+1} g_{t+1} from t = T-1 down.

    `grad_state` (Q, N, K) is a_T g_T before (the gradient for the last state), a_0 g_0 after (for the first).
    """
    a, g = a.unbind(1), g.unbind(1)
    g[-1].add_(grad_state)
    for t in range(len(g) - 2, -1, -1):
        g[t].addcmul_(a[t + 1], g[t + 1])
    torch.mul(a[0], g[0], out=grad_state)


@dataclass(frozen=True)
class Window:
    """Positions of a segment whose inputs are loaded together: `blocks` blocks of `T`, from position `first` on."""

    first: int
    blocks: int
    T: int


@dataclass(frozen=True)
class Tile:
    """Rows x channels x a stretch of the sequence, cut into `segments` of `length` that are scanned side by side."""

    rows: slice
    channels: slice
    first: int
    segments: int
    length: int
    T: int  # positions a block
    blocks: int  # blocks a window

    def windows(self) -> list[Window]:
        whole = self.length // self.T * self.T
        size = self.blocks * self.T
        windows = [Window(w, min(size, whole - w) // self.T, self.T) for w in range(0, whole, size)]
        return windows + [Window(whole, 1, self.length - whole)] * (whole < self.length)

    def view(self, x: Tensor, window: Window) -> Tensor:
        """(B, L, ...) -> this tile's rows, this window's positions: (blocks, segments, rows, T, ...)."""
        x = x[self.rows, self.first : self.first + self.segments * self.length].unflatten(
            1, (self.segments, self.length)
        )
        x = x[:, :, window.first : window.first + window.blocks * window.T].unflatten(2, (window.blocks, window.T))
        return x.transpose(0, 2)

    def store(self, out: Tensor, value: Tensor, window: Window) -> None:
        """Copy value (blocks, Q, T, K) to its place in out (B, L, K)."""
        view = self.view(out, window)
        view.copy_(value.view(view.shape))

    def starts(self, starts: Tensor | None, window: Window) -> list[Tensor | None]:
        """The document starts of each block, (Q, T)."""
        return [None] * window.blocks if starts is None else list(self.view(starts, window).flatten(1, 2))


class ChunkedScan:
    """The scan as reduce, combine, scan: segments of the sequence side by side, and in each one block after another.

    Where batch x channels alone would leave the machine idle the sequence is cut into S segments, which become rows
    beside the batch's. Their end states from a zero start are found first (reduce); the true start of each follows from
    its neighbour's, start_{s+1} = end_s + exp(A sum_t delta_t) start_s (combine); then all are scanned from there.
    Within a segment, blocks of T positions (Q rows, T, N, K channels) stay in the cache while exp, the recurrence and
    the product with C pass over them: the (B, L, D, N) states never exist. The backward pass starts each block from its
    saved first state, computes the others again, and runs the adjoint recurrence g_t = C_t dy_t + a_{t+1} g_{t+1}.
    Nothing is divided by a product of decays, so that exp(delta A) may underflow to 0. All sums have a fixed order.
    """

    # Elements: advanced together by one step (at least, at most), in a block of states, in a window of inputs.
    SIZES = {"cpu": (2**12, 2**16, 3 * 2**17, 2**17), "cuda": (2**18, 2**22, 2**26, 2**24)}

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, starts):
        self.u, self.delta, self.B, self.C, self.z, self.starts = u, delta, B, C, z, starts
        self.delta_softplus, self.dtype = delta_softplus, _state_dtype(u)
        self.A = A.t().to(self.dtype).contiguous()  # (N, D): channels last, as everywhere below
        self.static = {
            k: w.t().to(self.dtype) for k, w in (("B", B), ("C", C)) if w.ndim == 2
        }  # input-independent: (N, D)
        self.D, self.delta_bias = (None if w is None else w.to(self.dtype) for w in (D, delta_bias))
        self.scratch: dict[str, Tensor] = {}
        self.zero = self.A.new_zeros(())
        self.ones = self.A.new_ones(
            max(t.T * t.segments * (t.rows.stop - t.rows.start) for t in self.tiles()) * A.shape[1]
        )

    def tiles(self):
        """Yield the tiles (rows, channels, first position, segments, length, T, blocks a window) in scan order."""
        (batch, length, channels), N = self.u.shape, self.A.shape[0]
        least, most, block, window = self.SIZES.get(self.u.device.type, self.SIZES["cuda"])
        K = max(1, min(channels, most // N))
        R = max(1, min(batch, most // (N * K)))
        S = max(1, min(math.isqrt(length), -(-least // (N * K * R))))
        stretches = [(0, S, length // S)] + [(length - length % S, 1, length % S)] * (length % S > 0)
        for row in range(0, batch, R):
            for channel in range(0, channels, K):
                for first, segments, n in stretches:
                    rows, cols = slice(row, min(batch, row + R)), slice(channel, min(channels, channel + K))
                    Q, k = segments * (rows.stop - rows.start), cols.stop - cols.start
                    T = min(n, max(4, block // (Q * N * k)))
                    yield Tile(rows, cols, first, segments, n, T, max(1, window // (T * Q * k)))

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Scratch memory, kept from block to block: asking the system for it anew costs more than the arithmetic."""
        size = math.prod(shape)
        flat = self.scratch.get(name)
        if flat is None or flat.numel() < size:
            flat = self.scratch[name] = self.u.new_empty(size, dtype=self.dtype)
        return flat[:size].view(shape)

    def load(self, name: str, x: Tensor, tile: Tile, window: Window) -> Tensor:
        """A window of x (B, L, K or N) as contiguous (blocks, Q, T, K or N)."""
        view = tile.view(x, window)
        return self.buffer(name, *view.shape).copy_(view).flatten(1, 2)

    def load_delta(self, tile: Tile, window: Window) -> tuple[Tensor, Tensor]:
        """Step sizes before and after the softplus, each (blocks, Q, T, K)."""
        raw = self.load("raw", self.delta[..., tile.channels], tile, window)
        if self.delta_bias is not None:
            raw += self.delta_bias[tile.channels]
        if not self.delta_softplus:
            return raw, raw
        return raw, torch.logaddexp(raw, self.zero, out=self.buffer("delta", *raw.shape))  # log(e^raw + e^0)

    def load_backward(self, dy: Tensor, tile: Tile, window: Window) -> SimpleNamespace:
        """What the backward pass needs of a window, each (blocks, Q, T, K); g_y is the gradient before the gate."""
        raw, delta = self.load_delta(tile, window)
        u, dy = (self.load(k, x[..., tile.channels], tile, window) for k, x in (("u", self.u), ("dy", dy)))
        v = SimpleNamespace(raw=raw, delta=delta, u=u, dy=dy, g_y=dy, z=None)
        v.x, v.y, v.g_x, v.g_delta, v.spare = (self.buffer(k, *u.shape) for k in ("x", "y", "g_x", "g_delta", "spare"))
        torch.mul(delta, u, out=v.x)
        if self.z is not None:
            v.z = self.load("z", self.z[..., tile.channels], tile, window)
            v.gate = torch.sigmoid(v.z, out=self.buffer("gate", *u.shape))
            v.g_y = torch.mul(dy, v.gate, out=self.buffer("g_y", *u.shape)).mul_(v.z)
        return v

    def load_weights(self, name: str, tile: Tile, window: Window) -> list[Tensor]:
        """B or C for each block, to multiply (Q, T, N, K): (Q, T, N, 1), or (N, K) when input-independent."""
        if name in self.static:
            return [self.static[name][:, tile.channels]] * window.blocks
        return list(self.load(name, getattr(self, name), tile, window).unsqueeze(-1))

    def load_weight_grads(self, name: str, grad: Tensor, tile: Tile, window: Window) -> list[Tensor]:
        """Where each block's gradient of B or C goes: scratch to write (Q, T, N, 1), or a sum to add to (N, K)."""
        if name in self.static:
            return [grad[:, tile.channels]] * window.blocks
        return list(self.buffer("g_" + name, *tile.view(grad, window).shape).flatten(1, 2).unsqueeze(-1))

    def decay(self, delta: Tensor, tile: Tile, starts: Tensor | None) -> Tensor:
        """a_t = exp(delta_t A), and 0 where a document starts: (Q, T, N, K) from delta (Q, T, K)."""
        A = self.A[:, tile.channels]
        a = torch.mul(delta.unsqueeze(2), A, out=self.buffer("a", *delta.shape[:2], *A.shape)).exp_()
        return a if starts is None else a.masked_fill_(starts[..., None, None], 0.0)

    def contract(self, weights: Tensor, h: Tensor, out: Tensor, spare: str = "a") -> None:
        """out (Q, T, K) = the sum over n of weights * h (Q, T, N, K). `spare` names a buffer that may be overwritten."""
        Q, T, N, K = h.shape
        if weights.ndim == 2:
            h = torch.mul(h, weights, out=self.buffer(spare, *h.shape))
            weights = self.ones[: Q * T * N]
        torch.bmm(weights.view(Q * T, 1, N), h.view(Q * T, N, K), out=out.view(Q * T, 1, K))

    def reduce(self, v: Tensor, h: Tensor, grad: Tensor, spare: str = "a") -> None:
        """The adjoint of `contract` in the weights: v (Q, T, K) times h, written to (Q, T, N, 1) or added to (N, K)."""
        Q, T, N, K = h.shape
        if grad.ndim == 2:
            product = torch.mul(h, v.unsqueeze(2), out=self.buffer(spare, *h.shape))
            ones, total = self.ones[: Q * T].view(1, -1), self.buffer("sum", 1, N * K)
            grad += torch.mm(ones, product.view(Q * T, N * K), out=total).view(N, K)
        else:
            torch.bmm(v.view(Q * T, 1, K), h.view(Q * T, N, K).mT, out=grad.view(Q * T, 1, N))

    def combine(self, ends: Tensor, total: Tensor, tile: Tile, carry: Tensor, order: list[int]) -> Tensor:
        """The carry into each segment (Q, N, K), given its neighbours' results from zero and their summed step sizes."""
        decay = torch.mul(total.unsqueeze(1), self.A[:, tile.channels]).exp_()  # (Q, N, K)
        if self.starts is not None:
            reset = tile.view(self.starts, Window(0, 1, tile.length)).any(-1)  # (1, S, R)
            decay.masked_fill_(reset.view(-1, 1, 1), 0.0)
        into, ends, decay = (x.view(tile.segments, -1, *x.shape[1:]) for x in (torch.empty_like(ends), ends, decay))
        into[order[0]] = carry
        for s, after in itertools.pairwise(order):
            torch.addcmul(ends[s], decay[s], into[s], out=into[after])
        return into.flatten(0, 1)

    def forward(self, initial_state: Tensor | None, save: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """y (B, L, D), the last state (B, D, N), and with `save` each tile's states at the starts of its blocks."""
        y, saved = torch.empty_like(self.u, memory_format=torch.contiguous_format), []
        state = self.u.new_zeros(len(self.u), *self.A.shape, dtype=self.dtype)  # (B, N, D)
        if initial_state is not None:
            state += initial_state.mT
        for tile in self.tiles():
            into = state[tile.rows, :, tile.channels].contiguous()
            if tile.segments > 1:
                ends = into.new_zeros(tile.segments * len(into), *into.shape[1:])
                total = self.forward_tile(tile, ends)
                into = self.combine(ends, total, tile, into, list(range(tile.segments)))
            saved.append(into.new_empty(-(-tile.length // tile.T), *into.shape) if save else None)
            self.forward_tile(tile, into, y, saved[-1])
            state[tile.rows, :, tile.channels] = into.view(tile.segments, -1, *into.shape[1:])[-1]
        return y, state.mT.contiguous(), saved

    def forward_tile(self, tile: Tile, state: Tensor, y: Tensor | None = None, saved: Tensor | None = None) -> Tensor:
        """Advance state (Q, N, K) in place over the tile; write y, if given. Returns the sum of delta over time (Q, K)."""
        total = state.new_zeros(len(state), state.shape[-1])
        for window in tile.windows():
            _, delta = self.load_delta(tile, window)
            u = self.load("u", self.u[..., tile.channels], tile, window)
            x = torch.mul(delta, u, out=self.buffer("x", *u.shape))
            B = self.load_weights("B", tile, window)
            C = None if y is None else self.load_weights("C", tile, window)
            out = self.buffer("y", *u.shape)
            for j, starts in enumerate(tile.starts(self.starts, window)):
                if saved is not None:
                    saved[window.first // tile.T + j] = state
                a = self.decay(delta[j], tile, starts)
                h = torch.mul(x[j].unsqueeze(2), B[j], out=self.buffer("h", *a.shape))
                scan_(a, h, state)
                if y is not None:
                    self.contract(C[j], h, out[j], spare=a)
            total += delta.sum((0, 2))
            if y is not None:
                if self.D is not None:
                    out.addcmul_(u, self.D[tile.channels])
                if self.z is not None:
                    z = self.load("z", self.z[..., tile.channels], tile, window)
                    out.mul_(z).mul_(z.sigmoid_())
                tile.store(y[..., tile.channels], out, window)
        return total

    def backward(self, dy: Tensor, grad_state: Tensor, saved: list[Tensor]) -> dict[str, Tensor | None]:
        """Gradients of every input, by name, from those of y (B, L, D) and of the last state (B, D, N)."""
        grads = {k: None if (x := getattr(self, k)) is None else torch.empty_like(x) for k in ("u", "delta", "z")}
        for k in ("A", "B", "C", "D", "delta_bias"):
            x = self.static.get(k, getattr(self, k))
            grads[k] = None if x is None else torch.zeros(x.shape, dtype=self.dtype, device=x.device)
        grad_state = grad_state.mT.to(self.dtype).clone(memory_format=torch.contiguous_format)  # (B, N, D)
        for tile, states in reversed(list(zip(self.tiles(), saved, strict=True))):
            into = grad_state[tile.rows, :, tile.channels].contiguous()
            if tile.segments > 1:
                ends = into.new_zeros(tile.segments * len(into), *into.shape[1:])
                total = self.backward_reduce(tile, ends, dy)
                into = self.combine(ends, total, tile, into, list(range(tile.segments))[::-1])
            self.backward_tile(tile, into, dy, states, grads)
            grad_state[tile.rows, :, tile.channels] = into.view(tile.segments, -1, *into.shape[1:])[0]
        return grads | {k: grads[k].t() for k in ("A", *self.static)} | {"initial_state": grad_state.mT}

    def backward_reduce(self, tile: Tile, grad_state: Tensor, dy: Tensor) -> Tensor:
        """Take grad_state (Q, N, K) back over the tile, in place. Returns the sum of delta over time (Q, K)."""
        total = grad_state.new_zeros(len(grad_state), grad_state.shape[-1])
        for window in reversed(tile.windows()):
            v, C = self.load_backward(dy, tile, window), self.load_weights("C", tile, window)
            starts = tile.starts(self.starts, window)
            for j in reversed(range(window.blocks)):
                a = self.decay(v.delta[j], tile, starts[j])
                g = torch.mul(v.g_y[j].unsqueeze(2), C[j], out=self.buffer("h", *a.shape))
                scan_back_(a, g, grad_state)
            total += v.delta.sum((0, 2))
        return total

    def backward_tile(self, tile: Tile, grad_state: Tensor, dy: Tensor, saved: Tensor, grads: dict) -> None:
        """Take grad_state (Q, N, K) back over the tile, in place; write, or add to, the gradients of all inputs."""
        A, g_A = self.A[:, tile.channels], grads["A"][:, tile.channels]
        for window in reversed(tile.windows()):
            v, starts = self.load_backward(dy, tile, window), tile.starts(self.starts, window)
            B, C = (self.load_weights(k, tile, window) for k in "BC")
            g_B, g_C = (self.load_weight_grads(k, grads[k], tile, window) for k in "BC")
            for j in reversed(range(window.blocks)):
                a = self.decay(v.delta[j], tile, starts[j])
                h = torch.mul(v.x[j].unsqueeze(2), B[j], out=self.buffer("h", *a.shape))
                w = self.buffer("w", *a.shape)  # w_t = a_t h_{t-1}
                state = self.buffer("state", *grad_state.shape).copy_(saved[window.first // tile.T + j])
                torch.mul(a[:, 0], state, out=w[:, 0])
                scan_(a, h, state)
                torch.mul(a[:, 1:], h[:, :-1], out=w[:, 1:])
                if v.z is not None:
                    self.contract(C[j], h, v.y[j], spare="spare")
                self.reduce(v.g_y[j], h, g_C[j], spare="spare")
                g = torch.mul(v.g_y[j].unsqueeze(2), C[j], out=h)
                scan_back_(a, g, grad_state)
                self.reduce(v.x[j], g, g_B[j])
                self.contract(B[j], g, v.g_x[j])
                w *= g  # the gradient of delta_t A, since a_t = exp(delta_t A)
                self.reduce(v.delta[j], w, g_A)
                self.contract(A, w, v.g_delta[j])
            for k in {"B", "C"} - self.static.keys():
                view = tile.view(grads[k], window)
                view += self.buffer("g_" + k, *view.shape)
            self.backward_inputs(tile, window, v, grads)

    def backward_inputs(self, tile: Tile, window: Window, v: SimpleNamespace, grads: dict) -> None:
        """From the gradients of x = delta u and of delta A: those of u, delta, z, D and delta_bias, for a window."""
        K = tile.channels
        if v.z is not None:
            if self.D is not None:
                v.y.addcmul_(v.u, self.D[K])
            slope = torch.neg(v.gate, out=v.spare).add_(1).mul_(v.z).add_(1).mul_(v.gate)  # of SiLU(z)
            tile.store(grads["z"][..., K], slope.mul_(v.y).mul_(v.dy), window)
        v.g_delta.addcmul_(v.u, v.g_x)
        g_u = v.g_x.mul_(v.delta)
        if self.D is not None:
            g_u.addcmul_(v.g_y, self.D[K])
            grads["D"][K] += torch.mul(v.g_y, v.u, out=v.spare).sum((0, 1, 2))
        if self.delta_softplus:
            v.g_delta.mul_(v.raw.sigmoid_())
        if self.delta_bias is not None:
            grads["delta_bias"][K] += v.g_delta.sum((0, 1, 2))
        tile.store(grads["u"][..., K], g_u, window)
        tile.store(grads["delta"][..., K], v.g_delta, window)


class _ChunkedScanFunction(torch.autograd.Function):
    """`ChunkedScan` with its hand-written backward, for autograd."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, starts):
        scan = ChunkedScan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, starts)
        y, state, saved = scan.forward(initial_state, save=True)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, starts, *saved)
        ctx.delta_softplus = delta_softplus
        return y, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_state):
        *inputs, initial_state, starts = ctx.saved_tensors[:10]
        with torch.autocast(grad_y.device.type, enabled=False):
            scan = ChunkedScan(*inputs, ctx.delta_softplus, starts)
            grads = scan.backward(grad_y, grad_state, ctx.saved_tensors[10:])
        names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
        inputs = (*inputs, initial_state)
        return *(None if x is None else grads[k].to(x.dtype) for k, x in zip(names, inputs, strict=True)), None, None


# ----- The model ------------------------------------------------------------------------------------------------------


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution of x (B, L, E) with weight (E, 1, W): W shifted multiply-adds.

    window (B, W-1, E) holds the inputs before x, zeros if None; past a start (B, L) bool no tap looks back.
    Returns the result (B, L, E) and the next window.
    """
    L, W = x.shape[1], weight.shape[-1]
    if window is None:
        window = x.new_zeros(x.shape[0], W - 1, x.shape[2])
    padded = torch.cat([window.to(x.dtype), x], dim=1)  # (B, W-1+L, E)
    taps = weight.squeeze(1).to(x.dtype).unbind(-1)  # oldest input first
    y = x * taps[-1] if bias is None else torch.addcmul(bias.to(x.dtype), x, taps[-1])
    for back in range(1, W):
        past = padded[:, W - 1 - back : W - 1 - back + L]
        if starts is not None:  # a document began at one of the last `back` positions
            begun = torch.stack([F.pad(starts, (i, 0))[:, :L] for i in range(back)]).any(0)
            past = past.masked_fill(begun.unsqueeze(-1), 0.0)
        y = torch.addcmul(y, past, taps[-1 - back])
    return y, padded[:, L:]


class MambaBlock(nn.Module):
    """The Mamba block (Figure 3): expand, convolve, select, scan, gate, contract. Names are the checkpoints' names."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        E, N, R = config.d_inner, config.d_state, config.rank
        self.selective, self.sizes = config.selective, [R, N, N]
        self.in_proj = nn.Linear(config.d_model, 2 * E, bias=config.bias)
        self.conv1d = nn.Conv1d(E, E, config.d_conv, groups=E, bias=config.conv_bias)
        sizes = [size for name, size in zip(("delta", "B", "C"), self.sizes, strict=True) if name in self.selective]
        self.x_proj = nn.Linear(E, sum(sizes), bias=False) if sizes else None
        self.dt_proj = nn.Linear(R, E, bias=True)
        if "delta" not in self.selective:
            self.dt_proj.weight = None  # the bias alone is then the step size
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.empty(E))
        for name in ("B", "C"):  # input-independent ones as in S4D: a value per channel and state
            if name not in self.selective:
                self.register_parameter(name, nn.Parameter(torch.empty(E, N)))
        self.out_proj = nn.Linear(E, config.d_model, bias=config.bias)
        self.reset_parameters(config)

    @torch.no_grad()
    def reset_parameters(self, config: MambaConfig) -> None:
        """The official initialisation; what is not named here keeps PyTorch's default, as there."""
        self.A_log.copy_(
            torch.arange(1, config.d_state + 1, dtype=torch.float32).log().expand_as(self.A_log)
        )  # S4D-real
        self.D.fill_(1.0)
        if self.dt_proj.weight is not None:
            nn.init.uniform_(self.dt_proj.weight, -(config.rank**-0.5), config.rank**-0.5)
        log_min, log_max = math.log(config.dt_min), math.log(config.dt_max)
        dt = torch.exp(torch.rand(config.d_inner) * (log_max - log_min) + log_min).clamp(min=config.dt_init_floor)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # so that softplus(bias) = dt
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        self.out_proj.weight /= math.sqrt(config.n_layer)
        for linear in (self.in_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if "B" not in self.selective:
            nn.init.ones_(self.B)
        if "C" not in self.selective:
            nn.init.normal_(self.C)

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step size before bias and softplus (.., E), B and C: (.., N) from the input x (.., E), or constants."""
        parts = iter(())
        if self.x_proj is not None:
            sizes = [s for name, s in zip(("delta", "B", "C"), self.sizes, strict=True) if name in self.selective]
            parts = iter(self.x_proj(x).split(sizes, dim=-1))
        delta = F.linear(next(parts), self.dt_proj.weight) if "delta" in self.selective else torch.zeros_like(x)
        B = next(parts) if "B" in self.selective else self.B
        C = next(parts) if "C" in self.selective else self.C
        return delta, B, C

    def forward(self, x: Tensor, state=None, starts: Tensor | None = None, backend: str = "auto"):
        """x (B, L, d_model) -> (B, L, d_model) and the state after it: window (B, W-1, E), SSM state (B, E, N)."""
        window, h = (None, None) if state is None else state
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, E) each
        x, window = causal_conv(x, self.conv1d.weight, self.conv1d.bias, window, starts)
        x = F.silu(x)
        delta, B, C = self.select(x)
        A = -torch.exp(self.A_log.float())
        y, h = selective_scan(
            x, delta, A, B, C, self.D, z, self.dt_proj.bias, True, h, starts, return_final_state=True, backend=backend
        )
        return self.out_proj(y), (window, h)

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`forward` for one position: x (B, d_model), in constant time and memory."""
        window, h = state
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, E) each
        window = torch.cat([window, x.unsqueeze(1)], dim=1)  # (B, W, E)
        x = (window * self.conv1d.weight.squeeze(1).t()).sum(1)
        x = F.silu(x if self.conv1d.bias is None else x + self.conv1d.bias)
        delta, B, C = self.select(x)
        B, C = (w.unsqueeze(0) if name not in self.selective else w for name, w in (("B", B), ("C", C)))
        A = -torch.exp(self.A_log.float())
        y, h = selective_scan_step(h, x, delta, A, B, C, self.D, z, self.dt_proj.bias, True)
        return self.out_proj(y), (window[:, 1:], h)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 (float64 for float64)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


class Layer(nn.Module):
    """Norm and block; the residual stream around them stays in float32."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MambaBlock(config)


class Mamba(nn.Module):
    """The Mamba language model: embedding, layers, norm, head. Raises ValueError for a token outside the vocabulary."""

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

    def logits(self, x: Tensor) -> Tensor:
        """The residual stream (..., d_model) -> (..., V): the padding of the vocabulary is cut off."""
        return self.lm_head(self.backbone.norm_f(x))[..., : self.config.vocab_size]

    def forward(self, tokens: Tensor, state=None, starts: Tensor | None = None, return_state: bool = False):
        """tokens (B, L) -> logits (B, L, V), and with `return_state` the state from which the next call goes on.

        The state is a list with (convolution window (B, W-1, E), SSM state (B, E, N)) of each layer. starts (B, L) bool
        marks where a document begins: it sees nothing before it.
        """
        x, after = self.embed(tokens), []
        for i, layer in enumerate(self.backbone.layers):
            y, new = layer.mixer(layer.norm(x), None if state is None else state[i], starts)
            x = x + y
            after.append(new)
        return (self.logits(x), after) if return_state else self.logits(x)

    def init_state(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """The state before the first token, for `forward` and `step`."""
        weight, c = self.lm_head.weight, self.config
        h = weight.new_zeros(batch, c.d_inner, c.d_state, dtype=_state_dtype(weight))
        return [(weight.new_zeros(batch, c.d_conv - 1, c.d_inner), h) for _ in range(c.n_layer)]

    def step(self, token: Tensor, state: list) -> tuple[Tensor, list]:
        """token (B,) -> logits (B, V) and the next state: the recurrent view, constant in time and memory a token."""
        x, after = self.embed(token), []
        for layer, before in zip(self.backbone.layers, state, strict=True):
            y, new = layer.mixer.step(layer.norm(x), before)
            x = x + y
            after.append(new)
        return self.logits(x), after

    @torch.inference_mode()
    def stream(self, tokens: Tensor, max_new_tokens: int, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Yield `max_new_tokens` tokens (B,) that follow the prompt (B, L >= 1): parallel prefill, then `step`."""
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise UserError(f"the prompt has shape {tuple(tokens.shape)}, must be (B, L) with L >= 1; give one token")
        logits, state = self(tokens, return_state=True)
        logits = logits[:, -1]
        for i in range(max_new_tokens):
            token = sample_token(logits, temperature, top_k, top_p, generator)
            yield token
            if i + 1 < max_new_tokens:
                logits, state = self.step(token, state)

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
        """tokens (B, L) and up to `max_new_tokens` more (B, L + n); after `stop_token` a row repeats it. Greedy at 0."""
        new, done = [], torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for token in self.stream(tokens, max_new_tokens, temperature, top_k, top_p, generator):
            new.append(token if stop_token is None else token.masked_fill(done, stop_token))
            if stop_token is not None:
                done = done | (token == stop_token)
                if done.all():
                    break
        return torch.cat([tokens, *(t.unsqueeze(1) for t in new)], dim=1)


def sample_token(logits: Tensor, temperature=1.0, top_k=None, top_p=None, generator=None) -> Tensor:
    """Draw a token (B,) from logits (B, V): temperature 0 is greedy; top_k and top_p cut the tail, in that order."""
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise UserError(
            f"sampling: {temperature=}, {top_k=}, {top_p=} must be >= 0, >= 1 and in (0, 1]; mend the one that is not"
        )
    if temperature == 0:
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


def read_folder(folder: str) -> Mamba:
    """Read a local folder in the official layout (config.json, pytorch_model.bin) or Hugging Face's, sharded or not.

    Raises ValueError once, listing everything: config fields that this file does not do, missing, extra or misshapen
    tensors. Float tensors are kept in float32.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: holds no config.json, must be a folder with one and its weights; check the path")
    fields = json.loads(path.read_text("utf-8"))
    config, problems = (config_from_huggingface if "hidden_size" in fields else config_from_official)(fields)
    if problems:
        raise UserError(f"{path}: not supported here: {'; '.join(problems)}; use a plain Mamba checkpoint")
    tensors = {
        k.replace("backbone.embedding.", "backbone.embeddings."): v for k, v in read_tensors(Path(folder)).items()
    }
    model = Mamba(config)
    want = model.state_dict()
    if config.tie_embeddings:
        tensors.setdefault("lm_head.weight", tensors.get("backbone.embeddings.weight", torch.empty(0)))
    problems = [f"{k} is missing" for k in want.keys() - tensors.keys()]
    problems += [f"{k} is extra" for k in tensors.keys() - want.keys()]
    for k in want.keys() & tensors.keys():
        if want[k].shape != tensors[k].shape:
            problems.append(f"{k} is {tuple(tensors[k].shape)}, must be {tuple(want[k].shape)}")
    if problems:
        raise UserError(
            f"{folder}: the weights do not fit config.json: {'; '.join(sorted(problems))}; check both files"
        )
    model.load_state_dict(tensors)
    return model


def config_from_official(fields: dict) -> tuple[MambaConfig, list[str]]:
    """state-spaces/mamba's config.json -> config, and what is in it that we do not do."""
    ssm = dict(fields.get("ssm_cfg") or {})
    problems = [f"{k} = {fields[k]!r}" for k in ("d_intermediate", "attn_layer_idx", "attn_cfg") if fields.get(k)]
    problems += [f"{k} = false" for k in ("rms_norm",) if not fields.get(k, True)]
    if (layer := ssm.pop("layer", "Mamba1")) != "Mamba1":
        problems.append(f"ssm_cfg.layer = {layer!r}")
    for k in ("dt_init", "dt_scale", "use_fast_path"):  # of initialisation and speed: nothing in a trained model
        ssm.pop(k, None)
    known = {f.name for f in dataclasses.fields(MambaConfig)} - {"selective", "d_model", "n_layer", "vocab_size"}
    problems += [f"ssm_cfg.{k} = {ssm.pop(k)!r}" for k in ssm.keys() - known]
    missing = [f"{k} is missing" for k in ("d_model", "n_layer", "vocab_size") if k not in fields]
    if missing:
        return None, problems + missing
    kept = ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple", "tie_embeddings")
    return MambaConfig(**{k: fields[k] for k in kept if k in fields}, **ssm), problems


HUGGINGFACE = {  # their name of each of our fields
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_rank": "time_step_rank",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "layer_norm_epsilon",
}


def config_from_huggingface(fields: dict) -> tuple[MambaConfig, list[str]]:
    """A Hugging Face config.json -> config, and what is in it that we do not do."""
    problems = []
    if fields.get("model_type") != "mamba":
        problems.append(f"model_type = {fields.get('model_type')!r}")
    if fields.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act = {fields['hidden_act']!r}")
    given = {ours: fields[theirs] for ours, theirs in HUGGINGFACE.items() if theirs in fields}
    missing = [f"{HUGGINGFACE[k]} is missing" for k in ("d_model", "n_layer", "vocab_size") if k not in given]
    if missing:
        return None, problems + missing
    config = MambaConfig(**given, pad_vocab_size_multiple=1)
    if fields.get("intermediate_size", config.d_inner) != config.d_inner:
        problems.append(f"intermediate_size = {fields['intermediate_size']} is not expand x hidden_size")
    return config, problems


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors or pytorch_model.bin, or of the shards that its .index.json names, as float32."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        elif (folder / name).is_file():
            files = [name]
        else:
            continue
        tensors = {}
        for file in files:
            if not (folder / file).is_file():
                raise UserError(f"{folder / file}: {index.name} names this shard, but it is not there; copy it there")
            tensors |= load_safetensors(folder / file) if name.endswith(".safetensors") else load_torch(folder / file)
        return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    raise UserError(
        f"{folder}: holds neither model.safetensors nor pytorch_model.bin (nor an index of shards); add one"
    )


def load_torch(path: Path, device: str | torch.device = "cpu") -> dict:
    """torch.load of data only, never of code."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise UserError(f"{path}: not a checkpoint that torch can read ({str(error).splitlines()[0][:80]})") from None


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, by the safetensors package."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: needs the safetensors package; pip install safetensors") from None
    return load_file(path)


def write_folder(model: Mamba, folder: str) -> None:
    """Write Hugging Face's layout, which `transformers` reads: config.json and the weights, without vocabulary padding."""
    config = model.config
    if set(config.selective) != {"delta", "B", "C"}:
        raise UserError(
            f"selective={config.selective}: Hugging Face's layout holds fully selective models only; use those"
        )
    fields = {theirs: getattr(config, ours) for ours, theirs in HUGGINGFACE.items()}
    fields |= {"time_step_rank": config.rank, "intermediate_size": config.d_inner, "hidden_act": "silu"}
    fields |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "residual_in_fp32": True}
    fields |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    for k in ("backbone.embeddings.weight", "lm_head.weight"):
        tensors[k] = tensors[k][: config.vocab_size].clone()
    if config.tie_embeddings:
        del tensors["lm_head.weight"]
    os.makedirs(folder, exist_ok=True)
    write_json(Path(folder) / "config.json", fields)
    try:
        from safetensors.torch import save_file
    except ImportError:
        write_atomically(Path(folder) / "pytorch_model.bin", lambda path: torch.save(tensors, path))
    else:
        write_atomically(Path(folder) / "model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))


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
        if self.windows < 1:
            raise UserError(f"{len(tokens):,} tokens: too few for {rows} stretches of --length {length}; lower one")
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


def gather(corpus: Corpus, tokens: np.ndarray, offsets, config: Config | EvalConfig, device: torch.device):
    """Inputs and targets (B, L) for the windows at `offsets`, and with document_resets their starts (B, L) bool.

    Windows that the text's end cuts short must be alike. Raises ValueError for a token outside the vocabulary.
    """
    window = torch.from_numpy(np.stack([tokens[o : o + config.length + 1] for o in offsets]).astype(np.int64))
    if (top := int(window.max())) >= corpus.vocab_size:
        raise UserError(
            f"{corpus.source}: token {top} is outside the vocabulary of {corpus.vocab_size}; correct the data"
        )
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
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def make_optimizer(model: nn.Module, config: Config, device: torch.device) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices only, and never for A_log."""
    decayed = {k for k, p in model.named_parameters() if p.ndim >= 2 and k.split(".")[-1] not in ("A_log", "B", "C")}
    groups = [
        {
            "params": [p for k, p in model.named_parameters() if (k in decayed) == yes],
            "weight_decay": yes * config.weight_decay,
        }
        for yes in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=device.type == "cuda")


@torch.no_grad()
def evaluate(model: Mamba, tokens: np.ndarray, corpus: Corpus, config: Config | EvalConfig, limit: int = 0) -> dict:
    """Loss in nats a token and bits a byte: every token but the first predicted once, window by window.

    With config.carry_state the windows run on from one another; otherwise each starts from nothing. `limit` tokens, or
    all of them at 0.
    """
    tokens = tokens[: limit + 1] if limit else tokens
    offsets = range(0, len(tokens) - 1, config.length)
    whole = [o for o in offsets if o + config.length < len(tokens)]
    rows = 1 if config.carry_state else config.batch
    chunks = [whole[i : i + rows] for i in range(0, len(whole), rows)] + [[o] for o in offsets[len(whole) :]]
    sizes = None if corpus.tokenizer is None else torch.from_numpy(corpus.tokenizer.byte_lengths())
    device, state = next(model.parameters()).device, None
    nats = count = size = 0
    for chunk in chunks:
        x, y, starts = gather(corpus, tokens, chunk, config, device)
        with autocast(device):
            logits, state = model(x, state if config.carry_state else None, starts, return_state=True)
        nats += F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum").item()
        count += y.numel()
        size += 0 if sizes is None else int(sizes[y.cpu()].sum())
    return {"loss": nats / count, "bits_a_byte": nats / math.log(2) / size if size else None, "tokens": count}


def autocast(device: torch.device):
    """bfloat16 on CUDA, with float32 parameters; elsewhere nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class Run:
    """A training run: model, optimiser and position, one step at a time; what a checkpoint holds."""

    def __init__(self, config: Config, corpus: Corpus, device: torch.device):
        self.config, self.corpus, self.device = config, corpus, device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        parts = self.world * config.accumulate
        if config.batch % parts:
            raise UserError(
                f"--batch {config.batch} must be a multiple of processes x --accumulate = {parts}; change one"
            )
        size, first = config.batch // parts, config.batch // self.world * self.rank
        self.micro = [slice(first + i * size, first + (i + 1) * size) for i in range(config.accumulate)]
        self.batches = Batches(corpus.train, config.batch, config.length, config.seed, config.carry_state)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.model = Mamba(model_config(config, corpus.vocab_size)).to(device)
        self.optimizer = make_optimizer(self.model, config, device)
        self.forward = torch.compile(self.model) if config.compile else self.model
        if self.world > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.forward)
        self.step, self.best = 0, math.inf
        self.carried: list = [None] * config.accumulate  # each micro-batch's state, with carry_state
        self.path = Path(config.out) / "checkpoint.pt"

    def train_step(self) -> tuple[float, float]:
        """One optimiser step. Returns loss (nats a token) and gradient norm; raises FloatingPointError if not finite."""
        total = torch.zeros((), device=self.device)
        for i, rows in enumerate(self.micro):
            offsets = self.batches.offsets(self.step)[rows]
            x, y, starts = gather(self.corpus, self.corpus.train, offsets, self.config, self.device)
            state = None if self.batches.fresh(self.step) else self.carried[i]
            last = i + 1 == len(self.micro)
            with contextlib.nullcontext() if self.world == 1 or last else self.forward.no_sync():
                with autocast(self.device):
                    logits, state = self.forward(x, state, starts, return_state=True)
                loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
                (loss / len(self.micro)).backward()
            self.carried[i] = [(w.detach(), h.detach()) for w, h in state] if self.config.carry_state else None
            total += loss.detach() / len(self.micro)
        if self.world > 1:
            dist.all_reduce(total)
        loss = total.item() / self.world
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip).item()
        if not math.isfinite(loss + norm):
            kept = f"the last good checkpoint is {self.path}" if self.path.exists() else "there is no checkpoint yet"
            raise FloatingPointError(
                f"step {self.step + 1}: loss {loss}, gradient norm {norm}; {kept}; try a lower --lr"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss, norm

    def save(self) -> None:
        """Write the checkpoint, atomically; every process must call it."""
        carried = self.carried
        if self.config.carry_state and self.step:  # all rows, in order, whatever the number of processes
            parts: list = [None] * self.world
            dist.all_gather_object(parts, carried) if self.world > 1 else parts.__setitem__(0, carried)
            layers = zip(*itertools.chain(*parts), strict=True)
            carried = [tuple(torch.cat(column).cpu() for column in zip(*layer, strict=True)) for layer in layers]
        if self.rank == 0:
            tokenizer = None if self.corpus.tokenizer is None else self.corpus.tokenizer.to_json()
            cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
            content = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
            content |= {"best": self.best, "carried": carried, "rng": torch.get_rng_state(), "cuda_rng": cuda}
            content |= {"config": dataclasses.asdict(self.config), "tokenizer": tokenizer}
            content |= {"model_config": dataclasses.asdict(self.model.config)}
            write_atomically(self.path, lambda name: torch.save(content, name))

    def load(self) -> None:
        """Go on from the checkpoint in config.out. Raises ValueError naming every field in which its config differs."""
        content = load_torch(self.path, self.device)
        now, free = dataclasses.asdict(self.config), ("out", "device", "resume", "compile", "accumulate")
        differing = [
            f"{k} was {v!r}, is {now.get(k)!r}"
            for k, v in content["config"].items()
            if k not in free and v != now.get(k)
        ]
        if differing:
            raise UserError(f"{self.path}: saved with another config: {'; '.join(differing)}; give the same flags")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.best = content["step"], content["best"]
        if self.config.carry_state:
            self.carried = [
                [(w[r].to(self.device), h[r].to(self.device)) for w, h in content["carried"]] for r in self.micro
            ]
        torch.set_rng_state(content["rng"].cpu())
        if content["cuda_rng"]:
            torch.cuda.set_rng_state_all([state.cpu() for state in content["cuda_rng"]])


def model_config(config: Config, vocab_size: int) -> MambaConfig:
    """The model that a run's config asks for."""
    selective = tuple(name for name in config.selective.split(",") if name)
    return MambaConfig(config.d_model, config.n_layer, vocab_size, d_state=config.d_state, selective=selective)


def keep_memory() -> None:
    """Ask glibc to keep freed blocks: giving them back and fetching them anew each step costs up to half the time."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks too come from the heap,
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which is never trimmed


def train(config: Config) -> dict:
    """Train as config says; write checkpoint.pt, metrics.jsonl, result.json and loss.png to config.out."""
    began, device = time.perf_counter(), pick_device(config.device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.is_initialized() and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    keep_memory()
    out = Path(config.out)
    tokenizer = None
    if config.resume:
        if not (out / "checkpoint.pt").is_file():
            raise UserError(f"--resume: {out} holds no checkpoint.pt, must be the folder of a run; leave --resume out")
        saved = load_torch(out / "checkpoint.pt")["tokenizer"]
        tokenizer = None if saved is None else Tokenizer.from_json(saved)
    corpus = load_corpus(config.data, config.tokenizer, tokenizer)
    for part, tokens in (("training", corpus.train), ("validation", corpus.valid)):
        check_length(
            tokens, config.length if part == "training" else 1, f"{config.data or 'default data'}, {part} part"
        )
    run = Run(config, corpus, device)
    out.mkdir(parents=True, exist_ok=True)
    if config.resume:
        run.load()
    say = print if run.rank == 0 else lambda *_, **__: None
    count = sum(p.numel() for p in run.model.parameters())
    say(
        f"{count:,} parameters on {device} · {corpus.source}: {len(corpus.train):,} training, {len(corpus.valid):,} validation tokens"
    )
    baselines = ngram_baselines(corpus) if run.rank == 0 else {}
    say("bits a byte of n-grams on the same text: " + " · ".join(f"{k} {v:.3f}" for k, v in baselines.items()))
    history, seconds = train_loop(run, say)
    if run.step < config.steps:
        say(f"stopped after step {run.step}; go on with: {resume_command()}")
        raise KeyboardInterrupt
    final = evaluate(run.model, corpus.valid, corpus, config)
    result = {"parameters": count, "tokens_seen": config.steps * config.batch * config.length, "validation": final}
    result |= {
        "baselines_bits_a_byte": baselines,
        "train_tokens_a_second": None if seconds is None else round(config.batch * config.length / seconds),
    }
    say(
        f"validation: {final['loss']:.4f} nats a token"
        + (f", {final['bits_a_byte']:.4f} bits a byte" if final["bits_a_byte"] else "")
    )
    if corpus.tokenizer is not None and run.rank == 0:
        result["sample"] = write_sample(run.model, corpus.tokenizer, SampleConfig(seed=config.seed))
    if run.rank == 0:
        plot(history, baselines, out / "loss.png")
        result = result_record(config, device, wall_seconds=round(time.perf_counter() - began, 1), **result)
        write_json(out / "result.json", result)
        say(f"wrote {out}/result.json, metrics.jsonl and checkpoint.pt in {result['wall_seconds']:.0f} s")
    return result


def resume_command() -> str:
    """The command line of this process, with --resume."""
    words = [w for w in sys.argv if w != "--resume"]
    launcher = f"torchrun --nproc-per-node {os.environ['WORLD_SIZE']}" if "RANK" in os.environ else "python"
    return shlex.join([*launcher.split(), *words, "--resume"])


def train_loop(run: Run, say: Callable) -> tuple[list[dict], float | None]:
    """Step to the end or to a Ctrl-C, logging, evaluating and saving. Returns the metrics and seconds a step."""
    config, corpus, path = run.config, run.corpus, Path(run.config.out) / "metrics.jsonl"
    history = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if config.resume else []
    history = [row for row in history if row["step"] <= run.step]
    interrupted = threading.Event()
    previous = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    first, started, paused, pace = run.step, 0.0, 0.0, None
    try:
        with open(path if run.rank == 0 else os.devnull, "w", encoding="utf-8") as log:
            log.writelines(json.dumps(row) + "\n" for row in history)
            while run.step < config.steps and not agree(interrupted.is_set(), run):
                loss, norm = run.train_step()
                row = {"step": run.step, "loss": loss, "norm": norm, "lr": learning_rate(run.step - 1, config)}
                now = time.perf_counter()
                if run.step == first + 1:  # warm-up: not timed
                    started = now
                else:
                    pace = (now - started - paused) / (run.step - first - 1)
                due = run.step % config.eval_every == 0 or run.step == config.steps
                if due:
                    scores = evaluate(run.model, corpus.valid, corpus, config, config.eval_tokens)
                    row |= {"valid_" + k: scores[k] for k in ("loss", "bits_a_byte")}
                    run.best = min(run.best, scores["loss"])
                    run.save()
                history.append(row)
                log.write(json.dumps(row) + "\n")
                log.flush()
                if due or run.step <= 3 or run.step % max(1, config.steps // 20) == 0:
                    say(describe(row, config, pace), flush=True)
                paused += time.perf_counter() - now
            if run.step < config.steps:
                run.save()
    finally:
        signal.signal(signal.SIGINT, previous)
    return history, pace


def agree(interrupted: bool, run: Run) -> bool:
    """Whether any process was interrupted, so that all stop at the same step."""
    if run.world == 1:
        return interrupted
    flag = torch.tensor(float(interrupted), device=run.device)
    dist.all_reduce(flag)
    return flag.item() > 0


def describe(row: dict, config: Config, pace: float | None) -> str:
    """The progress line of a metrics row."""
    parts = {"loss": f"{row['loss']:.4f}"}
    if row.get("valid_loss") is not None:
        parts["valid"] = f"{row['valid_loss']:.4f}" + (
            f" ({row['valid_bits_a_byte']:.3f} bits a byte)" if row["valid_bits_a_byte"] else ""
        )
    parts |= {"norm": f"{row['norm']:.2f}", "lr": f"{row['lr']:.1e}"}
    if pace:
        parts |= {"step": f"{pace * 1e3:.0f} ms", "speed": f"{config.batch * config.length / pace:,.0f} tok/s"}
    return progress_line(row["step"], config.steps, parts, pace or 0.0)


def plot(history: list[dict], baselines: dict[str, float], path: Path) -> None:
    """Training and validation loss by step, and the n-grams' bits a byte, as a PNG; without matplotlib a line of text."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed; pip install matplotlib")
        return
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    bits = [row for row in history if row.get("valid_bits_a_byte")]
    valid = [row for row in history if "valid_loss" in row]
    rate = bits[-1]["valid_bits_a_byte"] / bits[-1]["valid_loss"] if bits else 1.0  # nats a token -> bits a byte
    axes.plot([r["step"] for r in history], [r["loss"] * rate for r in history], lw=0.7, alpha=0.5, label="training")
    axes.plot([r["step"] for r in valid], [r["valid_loss"] * rate for r in valid], "o-", ms=3, label="validation")
    for i, (name, value) in enumerate(baselines.items()):
        axes.axhline(value, ls="--", lw=0.9, color=f"C{i + 2}", label=name)
    axes.set(xlabel="step", ylabel="bits a byte" if bits else "nats a token", title="Mamba")
    top = max([*baselines.values(), *(r["valid_loss"] * rate for r in valid)])
    axes.set_ylim(0, 1.3 * top)
    axes.legend()
    write_atomically(path, lambda name: figure.savefig(name, dpi=150, format="png"))
    plt.close(figure)


# ----- Sample, evaluate, main -----------------------------------------------------------------------------------------


def load_checkpoint(path: str, tokenizer: str, device: torch.device) -> tuple[Mamba, Tokenizer | None]:
    """A model to use and its tokenizer, from our checkpoint file or from a folder in the official or HF layout."""
    if not os.path.exists(path):
        raise UserError(f"--checkpoint {path}: no such file or folder; train first or give another path")
    named = load_tokenizer(tokenizer, []) if tokenizer else None
    if os.path.isdir(path):
        beside = os.path.join(path, "tokenizer.json")
        if named is None and os.path.isfile(beside):
            named = load_tokenizer(beside, [])
        return Mamba.from_pretrained(path).to(device).eval(), named
    content = load_torch(Path(path), device)
    if missing := {"model", "model_config", "tokenizer"} - content.keys():
        raise UserError(f"--checkpoint {path}: lacks {sorted(missing)}, must be a checkpoint of mamba.py; give one")
    model = Mamba(MambaConfig(**content["model_config"])).to(device)
    model.load_state_dict(content["model"])
    if named is None and content["tokenizer"] is not None:
        named = Tokenizer.from_json(content["tokenizer"])
    return model.eval(), named


def write_sample(model: Mamba, tokenizer: Tokenizer, config: SampleConfig) -> str:
    """Print the prompt and what the model writes after it, as it comes, in whole characters; returns the text."""
    device, prompt = next(model.parameters()).device, tokenizer.encode(config.prompt, special=True).astype(np.int64)
    if len(prompt) == 0 and tokenizer.separator is not None:
        prompt = np.array([tokenizer.separator])
    generator = torch.Generator(device).manual_seed(config.seed)
    decoder, text = codecs.getincrementaldecoder("utf-8")("replace"), config.prompt
    print(f"--- sample, temperature {config.temperature} ---\n{text}", end="", flush=True)
    options = (config.temperature, config.top_k or None, config.top_p, generator)
    for token in model.stream(torch.from_numpy(prompt)[None].to(device), config.tokens, *options):
        piece = decoder.decode(tokenizer.decode_bytes(token.tolist()))
        print(piece, end="", flush=True)
        text += piece
    print("\n---")
    return text


def sample(config: SampleConfig) -> dict:
    """The job `sample`."""
    model, tokenizer = load_checkpoint(config.checkpoint, config.tokenizer, pick_device(config.device))
    if tokenizer is None:
        raise UserError(f"--checkpoint {config.checkpoint}: has no tokenizer; name it by --tokenizer")
    return {"text": write_sample(model, tokenizer, config)}


def evaluate_job(config: EvalConfig) -> dict:
    """The job `eval`: loss and bits a byte on the validation part of the data."""
    device = pick_device(config.device)
    model, tokenizer = load_checkpoint(config.checkpoint, config.tokenizer, device)
    if tokenizer is None and not config.data.endswith(".bin"):
        raise UserError(f"--checkpoint {config.checkpoint}: has no tokenizer; name it by --tokenizer")
    corpus = load_corpus(config.data, "", tokenizer)
    if corpus.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{corpus.source}: {corpus.vocab_size} tokens, the model knows {model.config.vocab_size}; match them"
        )
    check_length(corpus.valid, 1, corpus.source)
    scores = evaluate(model, corpus.valid, corpus, config)
    bits = f" · {scores['bits_a_byte']:.4f} bits a byte" if scores["bits_a_byte"] else ""
    print(f"{corpus.source}: {scores['loss']:.4f} nats a token{bits} · {scores['tokens']:,} tokens")
    if config.out:
        os.makedirs(config.out, exist_ok=True)
        write_json(Path(config.out) / "eval.json", result_record(config, device, validation=scores))
    return scores


JOBS = {"train": (Config, train), "sample": (SampleConfig, sample), "eval": (EvalConfig, evaluate_job)}


def build_parser(job: str = "train") -> argparse.ArgumentParser:
    """The command line of a job."""
    text = f"{JOBS[job][0].__doc__} Jobs: {', '.join(JOBS)} as the first word; train if there is none."
    return add_flags(argparse.ArgumentParser(prog=f"mamba.py {job}", description=text), JOBS[job][0])


def main(argv: list[str] | None = None) -> int:
    """Run a job from the command line. Returns 0; 2 for bad input; 1 for a run that diverged; 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    job = argv.pop(0) if argv and argv[0] in JOBS else "train"
    config_class, work = JOBS[job]
    config = config_class(**vars(build_parser(job).parse_args(argv)))
    if getattr(config, "smoke", False):
        defaults = {f.name: f.default for f in dataclasses.fields(config)}
        config = dataclasses.replace(config, **{k: v for k, v in SMOKE.items() if getattr(config, k) == defaults[k]})
    try:
        work(config)
    except (UserError, OSError) as error:
        print(f"mamba.py: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"mamba.py: training diverged: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
