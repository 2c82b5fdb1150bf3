# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "tiktoken==0.14.0"]
# ///
"""In-Context Pretraining: sort a corpus so that related documents share a context, and measure what that teaches.

Shi et al., "In-Context Pretraining: Language Modeling Beyond Document Boundaries", arXiv 2310.10638.

    python iclm_sort.py                                  sorts Python's functions, trains on both orders: 3.6 minutes
    python iclm_sort.py sort --input corpus.jsonl        writes train.bin for `mamba.py --data`, and a report
    python iclm_sort.py sort --encoder contriever/ --context-length 8192 --input corpus/ --order edge

code               shape                 meaning
x                  (n, d)                unit embeddings of the documents: E(d)
similarity, index  (n, k)                each document's nearest others, and their cosines: N(d)
indptr, neighbours (n + 1,), (arcs,)     the graph: an edge where either is in the other's list; weights: its cosines
order              (n_kept,)             the path through all documents
contexts, starts   (m, L)                token ids as they are trained on, and where in them documents begin

Read first `walk`, which is Algorithm 1, then `build_graph`, `pack`, and `sort`, which puts the stages together.

Differences from the paper
1. Line 7 of Algorithm 1 prints arg min of the similarity; text and figure mean arg max, and so do we.
2. Degree is counted in the whole graph (`--degree static`) or in what is left of it (`remaining`): not said.
3. k is 10 and duplicates are dropped from a cosine of 0.95 (`--k`, `--threshold`): not said. Section 4.2's text and
   table contradict each other on what dropping them does.
4. Embeddings are hashed TF-IDF unless `--encoder` names a model's folder; lists are exact, or of inverted lists without
   product quantisation.
5. `--order edge` joins the heaviest edges first, then the nearest ends: a heavier path than the paper's.

Not included: distributed graph and walk, links and BM25 chaining (SPLiCe), the paper's downstream tasks.
"""

from __future__ import annotations

import argparse
import array
import ast
import base64
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import re
import shutil
import string
import sys
import sysconfig
import textwrap
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ----- Config ---------------------------------------------------------------------------------------------------------


def flag(default, text: str):
    """A field of `Config`, and a flag with its default and help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; each field is a flag."""

    input: str = flag("", ".jsonl file, text file or folder of these; empty: the functions of Python's own modules")
    text_field: str = flag("text", "field of a .jsonl line that holds the document")
    label_field: str = flag("label", "field with its label, if it has one: only the report uses labels")
    skip_bad: bool = flag(False, "count bad lines and go on, rather than stop at the first one")
    tokenizer: str = flag("bpe:1024", "byte, bpe:N, a tiktoken encoding, a .tiktoken file or a tokenizer.json")
    context_length: int = flag(512, "tokens of a context; paper: 8,192")
    encoder: str = flag("", "folder of a BERT-family encoder such as Contriever, the paper's; empty: hashed TF-IDF")
    embeddings: str = flag("", ".npy of shape (documents, dimensions) that takes the encoder's place")
    dim: int = flag(256, "dimensions of the TF-IDF embeddings; Contriever's are 768")
    k: int = flag(10, "neighbours of a document; the paper's released configuration has 50")
    method: str = flag("auto", "exact, ivf or faiss; auto: exact up to --exact-limit documents, then ivf")
    exact_limit: int = flag(50_000, "documents up to which auto compares all pairs")
    recall: float = flag(0.95, "ivf, faiss: share of the true neighbours to find")
    threshold: float = flag(0.95, "cosine from which the later of two documents is dropped; over 1: none are")
    order: str = flag("paper", "paper, edge, random, file, knn (with repeats) or cluster")
    degree: str = flag("static", "paper: degree in the whole graph (static), or in what is left of it (remaining)")
    steps: int = flag(1200, "experiment: optimiser steps of each arm")
    batch: int = flag(4, "experiment: contexts a step; paper: 4 million tokens")
    d_model: int = flag(96, "experiment: width of the model; paper: 1,024 (0.3B) to 4,096 (7B)")
    n_layer: int = flag(2, "experiment: layers; paper: 24 to 32")
    n_head: int = flag(4, "experiment: attention heads")
    lr: float = flag(4e-3, "experiment: peak learning rate; a cosine takes it to a tenth, as in the paper")
    seed: int = flag(0, "seed of embeddings, order, shuffle, initialisation and batches")
    device: str = flag("auto", "auto (cuda, mps or cpu, the first there is) or a torch device")
    out: str = flag("out/iclm_sort", "folder of everything that is written")
    resume: bool = flag(False, "keep the stages in OUT/stages that the same input and flags made")
    smoke: bool = flag(False, "a few documents and steps, whatever the other flags: does it run?")

    def __post_init__(self):
        for name in ("context_length", "dim", "k", "steps", "batch", "d_model", "n_layer", "n_head"):
            value, words = getattr(self, name), name.replace("_", "-")
            require(value > 0, f"--{words} {value}: must be at least 1; raise it")
        require(0 < self.lr < math.inf, f"--lr {self.lr}: must be a number above 0; correct it")
        require(self.seed >= 0, f"--seed {self.seed}: must not be negative; raise it")
        for name, choices in (("order", ORDERS), ("degree", DEGREES), ("method", ("auto", *METHODS))):
            value = getattr(self, name)
            require(value in choices, f"--{name} {value}: must be one of {', '.join(choices)}; choose one")
        require(0 < self.recall <= 1, f"--recall {self.recall}: must be above 0 and at most 1; correct it")
        fits = self.d_model % (2 * self.n_head) == 0
        require(fits, f"--n-head {self.n_head}: must cut --d-model {self.d_model} into even widths; change either")
        both = self.encoder and self.embeddings
        require(not both, "--encoder and --embeddings: one of them must do; leave one out")


SMOKE = dict(steps=3, batch=2, d_model=16, n_head=2, context_length=64, tokenizer="byte", k=5)


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


# ----- Data: documents and their tokens -------------------------------------------------------------------------------

END = "<|endoftext|>"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
    r"\s+(?!\S)|\s"
)


@dataclass(frozen=True)
class Document:
    """A text, a name to find it by, and a label (or "") that only the report uses."""

    text: str
    id: str
    label: str


def python_functions() -> Iterator[Document]:
    """The functions and methods of the standard library, each with its module as the label; parsed, never imported.

    Left out: tests, build files, what some systems package apart, and functions of fewer than 100 characters.
    """
    skipped = re.compile(
        r"(^|/)(test|tests|(site|dist)-packages|pydoc_data|idlelib|lib2to3|distutils|ensurepip|venv|tkinter|turtle.*|"
        r"config-.*|_sysconfig.*|sitecustomize\.py|__pycache__)(/|$)"
    )

    def functions(node: ast.AST, name: str):
        for child in getattr(node, "body", []):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child, f"{name}.{child.name}"
            elif isinstance(child, ast.ClassDef):
                yield from functions(child, f"{name}.{child.name}")

    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if skipped.search(file):
            continue
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        with contextlib.suppress(SyntaxError, ValueError):  # not source of this Python
            source = (root / file).read_text("utf-8")
            lines = source.splitlines(keepends=True)
            for node, name in functions(ast.parse(source), module):
                text = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
                if len(text) >= 100:
                    yield Document(text, name, module)


class Source:
    """The documents of --input; each pass over it reads them anew, so that no corpus has to fit in memory.

    `done` of `total` bytes have been read in this pass, and `counts` says what was left out.
    """

    def __init__(self, config: Config):
        self.config, self.root, self.done, self.total = config, Path(config.input), 0, 1
        self.counts, self.shipped = collections.Counter(), []
        if config.input:
            require(self.root.exists(), f"--input {config.input}: no such file or folder; correct the path")
            found = sorted(self.root.rglob("*")) if self.root.is_dir() else [self.root]
            hidden = (any(part.startswith(".") for part in file.relative_to(self.root).parts) for file in found)
            self.files = [file for file, h in zip(found, hidden, strict=True) if file.is_file() and not h]
            self.total = sum(file.stat().st_size for file in self.files)

    def __iter__(self) -> Iterator[Document]:
        self.counts, self.done = collections.Counter(), 0
        if not self.config.input:
            if not self.shipped:  # parsing them takes longer than keeping them
                self.shipped = list(itertools.islice(python_functions(), 150 if self.config.smoke else None))
            yield from self.shipped
            return
        for file in self.files:
            for document in self.read_lines(file) if file.suffix == ".jsonl" else self.read_text(file):
                if document.text.strip():
                    yield document
                else:
                    self.counts["empty documents"] += 1

    def texts(self) -> Iterator[str]:
        """The documents without their names."""
        return (document.text for document in self)

    def read_text(self, file: Path) -> Iterator[Document]:
        """The one document of a text file, labelled by its folder."""
        self.done += file.stat().st_size
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            fits = self.root.is_dir() or self.config.skip_bad
            require(fits, f"{file}: must be UTF-8, but byte {error.start} is not; convert it")
            self.counts["files that are not UTF-8"] += 1
        else:
            name = file.relative_to(self.root) if self.root.is_dir() else file.name
            yield Document(text, str(name), file.parent.name)

    def read_lines(self, file: Path) -> Iterator[Document]:
        """The documents of a .jsonl file."""
        text_field, label_field = self.config.text_field, self.config.label_field
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                self.done += len(line)
                if not line.strip():
                    continue
                fields = None
                try:
                    fields = json.loads(line)
                    text, name = "".join([fields[text_field]]), fields.get("id", f"{file.name}:{number}")
                    document = Document(text, str(name), str(fields.get(label_field, "")))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    has = f", has {', '.join(fields)}" if isinstance(fields, dict) else ""
                    rule = f"must be a JSON object with a string {text_field!r}{has}"
                    fix = "correct it, name the field by --text-field, or give --skip-bad"
                    require(self.config.skip_bad, f"{file}, line {number}: {line[:60]!r} {rule}; {fix}")
                    self.counts["bad lines"] += 1
                else:
                    yield document

    def fingerprint(self) -> list:
        """What tells this input from another one."""
        if not self.config.input:
            return [sys.version, self.config.smoke]
        return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in self.files]


@dataclass
class Vocabulary:
    """A tokenizer as far as it is needed here: text to ids, and how another script finds it again."""

    encode: Callable[[list[str]], list[list[int]]]
    size: int
    separator: int | None
    name: str  # as train.json gives it
    file: bytes = b""  # what a file of that name beside train.json holds, if there is one


def open_vocabulary(name: str, documents: Iterable[str]) -> Vocabulary:
    """Tokenizer `byte`, `bpe:N` (learnt from the first 20 MB of documents), a file's, or one named by tiktoken."""
    named, file, pattern = tiktoken.list_encoding_names(), b"", CL100K
    if name.endswith((".json", ".tiktoken")):
        require(Path(name).is_file(), f"--tokenizer {name}: no such file; correct the path")
    if name.endswith(".json"):
        return read_tokenizer_json(name)
    if name in named:
        try:
            encoding = tiktoken.get_encoding(name)
        except OSError as error:  # requests' errors are among these
            fix = "connect once (TIKTOKEN_CACHE_DIR keeps the file), or give a local file, byte or bpe:N"
            raise UserError(f"--tokenizer {name}: the download failed ({type(error).__name__}); {fix}") from None
        return Vocabulary(encoding.encode_ordinary_batch, encoding.n_vocab, encoding._special_tokens.get(END), name)
    if name == "byte":
        pattern, ranks = r"(?s:.{1,99})", {bytes([b]): b for b in range(256)}
    elif name.startswith("bpe:"):
        ranks = learn_bpe(name, documents)
    else:
        choices = f"byte, bpe:N, a .tiktoken file, a tokenizer.json file, {', '.join(named)}"
        require(name.endswith(".tiktoken"), f"--tokenizer {name}: unknown; choose from {choices}")
        ranks = read_ranks(name)
    end = max(ranks.values()) + 1
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: end})
    if name != "byte":
        name, file = "tokenizer.tiktoken", b"".join(base64.b64encode(t) + b" %d\n" % i for t, i in ranks.items())
    return Vocabulary(encoding.encode_ordinary_batch, encoding.n_vocab, end, name, file)


def read_ranks(path: str) -> dict[bytes, int]:
    """The tokens of a .tiktoken file and their ranks."""
    try:
        rows = [line.split() for line in Path(path).read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    except ValueError as error:
        rule = f"each line must be a base64 token and its rank, but {error}"
        raise UserError(f"--tokenizer {path}: {rule}; correct it") from None
    fits = ranks.keys() >= {bytes([b]) for b in range(256)} and len(set(ranks.values())) == len(ranks)
    rule = "must rank all 256 single bytes, and no two tokens alike, from 0"
    require(fits and min(ranks.values()) >= 0, f"--tokenizer {path}: {rule}; correct it")
    return ranks


def read_tokenizer_json(path: str) -> Vocabulary:
    """A Hugging Face tokenizer.json, by the `tokenizers` package; it adds no tokens, nor finds special ones in text."""
    try:
        tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(path)
    except ImportError:
        raise UserError(f"--tokenizer {path}: needs the tokenizers package; pip install tokenizers") from None
    except Exception as error:  # the package raises no other class
        raise UserError(f"--tokenizer {path}: not a tokenizer.json ({str(error)[:80]}); give another") from None
    tokenizer.encode_special_tokens = True
    ids = (tokenizer.token_to_id(token) for token in (END, "<|end_of_text|>", "</s>"))
    separator = next((i for i in ids if i is not None), None)

    def encode(texts: list[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)]

    size = 1 + max(tokenizer.get_vocab().values())
    return Vocabulary(encode, size, separator, "tokenizer.json", Path(path).read_bytes())


def learn_bpe(name: str, documents: Iterable[str]) -> dict[bytes, int]:
    """Ranks of byte-level BPE `bpe:N` of N ids: bytes, merges of the commonest pair, of equals the smallest, and END.

    For a few thousand merges; a larger vocabulary is better learnt once by a package, and given as its file.
    """
    size = int(name[4:]) if name[4:].isdecimal() else 0
    require(257 <= size <= 1 << 14, f"--tokenizer {name}: bpe:N needs a whole N from 257 to 16384; try bpe:2048")
    split = importlib.import_module("regex").compile(CL100K).findall  # tiktoken brings it; `re` lacks \p{L}
    counts, read = collections.Counter(), 0
    for text in documents:
        counts.update(split(text))
        read += len(text)
        if read > 20_000_000:
            break
    words = [[bytes([b]) for b in word.encode("utf-8", "replace")] for word in counts]
    weights, total, places = list(counts.values()), collections.Counter(), collections.defaultdict(set)

    def tally(i: int, sign: int) -> None:
        for pair in itertools.pairwise(words[i]):
            total[pair] += sign * weights[i]
            places[pair].add(i)

    for i in range(len(words)):
        tally(i, 1)
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < size - 1:
        most = max(total.values(), default=0)
        require(most > 0, f"--tokenizer {name}: the text yields only {len(ranks) + 1} ids; lower N or add text")
        pair = min(pair for pair, count in total.items() if count == most)
        ranks.setdefault(b"".join(pair), len(ranks))
        for i in places.pop(pair):
            tally(i, -1)
            word, words[i] = words[i], []
            for part in word:
                if words[i] and (words[i][-1], part) == pair:
                    words[i][-1] += part
                else:
                    words[i].append(part)
            tally(i, 1)
        total = +total if len(ranks) % 64 == 0 else total  # drop pairs that are gone
        total.pop(pair, None)
    return ranks


# ----- The method: embeddings -----------------------------------------------------------------------------------------

BUCKETS = 1 << 17  # of hashed words and pairs of words
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]|_")
IDEOGRAPH = re.compile(  # what BERT sets apart: neither kana nor hangul
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)


class TfIdf:
    """Hashed TF-IDF of words and pairs of adjacent words, projected at random to `dim`: fit with one pass over texts.

    Weight (1 + log tf) (1 + log((1 + n) / (1 + df))); a row is the sum of its weights times the rows of a normal
    matrix (BUCKETS, dim), brought to length 1. A cosine is the unprojected one with an error of about dim^-1/2.
    """

    def __init__(self, dim: int = 256, seed: int = 0):
        self.table = torch.randn(BUCKETS, dim, generator=torch.Generator().manual_seed(seed))
        self.dim, self.document_frequency, self.count = dim, np.zeros(BUCKETS, np.int64), 0

    def terms(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The distinct hashed terms of a text, and how often each occurs; marks count only in a text without words."""
        words = WORD.findall(text.lower())
        words = [word for word in words if word[0].isalnum()] or words
        codes = np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in words], np.uint64)
        pairs = codes[:-1] * np.uint64(0x9E3779B1) + codes[1:] + np.uint64(1)
        hashed = np.concatenate([codes, pairs]) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - 17)
        return np.unique(hashed.astype(np.int64), return_counts=True)

    def fit(self, texts: Iterable[str]) -> TfIdf:
        """Count the documents that each term is in."""
        for text in texts:
            self.document_frequency[self.terms(text)[0]] += 1
            self.count += 1
        return self

    def embed(self, texts: list[str]) -> np.ndarray:
        """Unit rows (len(texts), dim) float32. Raises UserError for an empty text."""
        found = [self.terms(text) for text in texts]
        for text, (terms, _) in zip(texts, found, strict=True):
            require(len(terms) > 0, f"text {text[:20]!r}: has neither words nor marks to embed; leave it out")
        terms, counts = (np.concatenate(part) for part in zip(*found, strict=True))
        idf = 1 + np.log((1 + self.count) / (1 + self.document_frequency[terms]))
        weights = torch.from_numpy(((1 + np.log(counts)) * idf).astype(np.float32))
        begin = torch.from_numpy(np.cumsum([0] + [len(part) for part, _ in found[:-1]]))
        rows = F.embedding_bag(torch.from_numpy(terms), self.table, begin, mode="sum", per_sample_weights=weights)
        return F.normalize(rows, dim=1).numpy()


def embed_documents(texts: Iterable[str], dim: int = 256, seed: int = 0) -> np.ndarray:
    """Unit rows (n, dim) float32 of hashed TF-IDF, see `TfIdf`."""
    texts = list(texts)
    require(len(texts) > 0, "no documents: there is nothing to embed; give at least one text")
    model = TfIdf(dim, seed).fit(texts)
    return np.concatenate([model.embed(batch) for batch in batches(texts, 512)])


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def load_json(path: Path) -> dict:
    """The JSON object in a file of a model's folder."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: must be JSON ({error}); give the model's own file") from None
    require(isinstance(found, dict), f"{path}: must hold a JSON object; give the model's own file")
    return found


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors in float32 of model.safetensors, by the safetensors package, or of pytorch_model.bin."""
    path = next((p for n in ("model.safetensors", "pytorch_model.bin") if (p := folder / n).is_file()), None)
    require(path is not None, f"{folder}: has neither model.safetensors nor pytorch_model.bin; add one")
    try:
        if path.suffix == ".safetensors":
            tensors = importlib.import_module("safetensors.torch").load_file(path)
        else:
            tensors = torch.load(path, "cpu", weights_only=True)
        return {name.removeprefix("bert."): tensor.float() for name, tensor in tensors.items()}
    except ImportError:
        raise UserError(f"{path}: reading it needs the safetensors package; pip install safetensors") from None
    except Exception as error:  # each format has its own kinds
        raise UserError(f"{path}: not a file of tensors ({str(error)[:80]}); give another") from None


class WordPiece:
    """BERT's tokenizer: clean, split at spaces and marks, then the longest known pieces first (1609.08144)."""

    def __init__(self, folder: Path):
        vocab, whole = folder / "vocab.txt", folder / "tokenizer.json"
        require(vocab.is_file() or whole.is_file(), f"{folder}: has neither vocab.txt nor tokenizer.json; add one")
        if vocab.is_file():
            self.ids = {word: i for i, word in enumerate(vocab.read_text("utf-8").splitlines())}
        else:
            self.ids = load_json(whole).get("model", {}).get("vocab", {})
        settings = folder / "tokenizer_config.json"
        self.lower = not settings.is_file() or load_json(settings).get("do_lower_case", True)
        missing = [token for token in ("[UNK]", "[CLS]", "[SEP]", "[PAD]") if token not in self.ids]
        require(not missing, f"{folder}: vocabulary lacks {', '.join(missing)}; give a BERT-family encoder")
        self.pieces = functools.lru_cache(1 << 20)(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without [CLS] and [SEP]; a special token written in it is ordinary text."""
        kind = unicodedata.category
        text = "".join(c for c in text if c in "\t\n\r" or (c != "\ufffd" and kind(c)[0] != "C"))
        text = IDEOGRAPH.sub(r" \g<0> ", text)
        if self.lower:  # by characters: a sigma at a word's end is a sigma
            text = "".join(c.lower() for c in unicodedata.normalize("NFD", text) if kind(c) != "Mn")
        words = "".join(f" {c} " if c in string.punctuation or kind(c)[0] == "P" else c for c in text).split()
        return [i for word in words for i in self.pieces(word)]

    def pieces(self, word: str) -> list[int]:
        """Ids of the longest known pieces of a word, left to right; [UNK] where there are none or it is over 100."""
        found, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            names = (mark + word[start:end] for end in range(len(word), start, -1))
            name = next((name for name in names if name in self.ids), None)
            if name is None or len(word) > 100:
                return [self.ids["[UNK]"]]
            found.append(self.ids[name])
            start += len(name) - len(mark)
        return found


class Encoder:
    """A BERT-family encoder from a local folder in Hugging Face layout: mean of the last layer, padding left out."""

    def __init__(self, folder: str, device: torch.device):
        path = Path(folder)
        require((path / "config.json").is_file(), f"--encoder {folder}: holds no config.json; give a model's folder")
        self.config, self.device = load_json(path / "config.json"), device
        fits = (self.config.get("model_type"), self.config.get("hidden_act")) == ("bert", "gelu")
        require(fits, f"--encoder {folder}: must be model_type bert with hidden_act gelu; give a BERT-family encoder")
        self.tokenizer = WordPiece(path)
        self.weights = {name: tensor.to(device) for name, tensor in read_weights(path).items()}
        token = torch.tensor([[max(self.tokenizer.ids.values())]], device=device)
        try:
            self.dim = self.forward(token, token == token).shape[1]
        except (KeyError, IndexError, RuntimeError) as error:
            rule = f"config.json, vocabulary and weights must fit each other ({str(error)[:80]})"
            raise UserError(f"--encoder {folder}: {rule}; give one model's files") from None
        length = len(self.weights["embeddings.position_embeddings.weight"])
        settings = path / "sentence_bert_config.json"
        own = load_json(settings).get("max_seq_length") if settings.is_file() else length
        self.length = min(own or length, length)

    def layer(self, x: Tensor, name: str, norm: bool = False) -> Tensor:
        """A linear layer, or a LayerNorm, of that name."""
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        if norm:
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.config["layer_norm_eps"])
        return F.linear(x, weight, bias)

    @torch.inference_mode()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean-pooled last hidden state (B, d) of ids (B, L), where mask (B, L) bool is False at padding."""
        names = ("word", "position", "token_type")
        word, position, kind = (self.weights[f"embeddings.{name}_embeddings.weight"] for name in names)
        x = self.layer(word[ids] + position[: ids.shape[1]] + kind[0], "embeddings.LayerNorm", norm=True)
        heads = self.config["num_attention_heads"]
        for i in range(self.config["num_hidden_layers"]):
            at = f"encoder.layer.{i}"
            parts = (self.layer(x, f"{at}.attention.self.{name}") for name in ("query", "key", "value"))
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)  # (B, H, L, d / H)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]).transpose(1, 2).flatten(2)
            x = self.layer(x + self.layer(y, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm", True)
            y = self.layer(F.gelu(self.layer(x, f"{at}.intermediate.dense")), f"{at}.output.dense")
            x = self.layer(x + y, f"{at}.output.LayerNorm", norm=True)
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def embed(self, texts: list[str]) -> np.ndarray:
        """Unit rows (n, d) float32; a text longer than the encoder's window is cut, and its chunks are averaged."""
        ids, pad, room = self.tokenizer.ids, self.tokenizer.ids["[PAD]"], self.length - 2  # no text has the id of [PAD]
        whole = enumerate(map(self.tokenizer.encode, texts))
        chunks = [(i, t[j : j + room]) for i, t in whole for j in range(0, max(len(t), 1), room)]
        chunks.sort(key=lambda chunk: len(chunk[1]))  # like lengths go together: less padding
        total = torch.zeros(len(texts), self.dim)
        for batch in batches(chunks, 64):
            rows = [torch.tensor([ids["[CLS]"], *t, ids["[SEP]"]], device=self.device) for _, t in batch]
            tokens = nn.utils.rnn.pad_sequence(rows, True, pad)
            total.index_add_(0, torch.tensor([i for i, _ in batch]), self.forward(tokens, tokens != pad).cpu())
        return F.normalize(total, dim=1).numpy()


# ----- The method: neighbours -----------------------------------------------------------------------------------------


class Best:
    """The k best candidates of each of `count` rows: only scores that reach a row's k-th best so far are looked at.

    A tile of scores costs its product, one comparison and one pass over booleans; the few that pass wait until a
    merge sorts them by (row, falling score, id) and raises the floors.
    """

    def __init__(self, count: int, k: int):
        self.k, self.floor, self.waiting = k, np.full(count, -np.inf, np.float32), 0
        self.parts: list[tuple[np.ndarray, ...]] = []  # (row, score, id), each 1-D

    def offer(self, scores: Tensor, rows: np.ndarray, ids: np.ndarray) -> None:
        """Scores (r, m) of candidates `ids` (m,) for the rows `rows` (r,); a candidate is offered to a row once."""
        floor, width = self.floor[rows], scores.shape[1]
        if width > self.k and np.isneginf(floor).all():
            floor = scores.topk(self.k).values[:, -1].cpu().numpy()
            self.floor[rows] = floor
        mask = scores >= torch.from_numpy(floor).to(scores.device)[:, None]
        hits = np.flatnonzero(mask.numpy()) if mask.device.type == "cpu" else mask.flatten().nonzero()[:, 0]
        found = scores.flatten()[hits].cpu().numpy()
        hits = hits if isinstance(hits, np.ndarray) else hits.cpu().numpy()
        row, column = np.divmod(hits, width)
        self.parts.append((rows[row], found, ids[column]))
        self.waiting += len(hits)
        if self.waiting > 4 * self.k * len(self.floor):
            self.merge()

    def merge(self) -> tuple[np.ndarray, np.ndarray]:
        """Similarity (count, k) float32 and id (count, k) int64 so far; -inf and -1 where a row has fewer than k."""
        row, score, ids = (np.concatenate(part) for part in zip(*self.parts, strict=True))
        order = stable_order(row, score, ids)
        row, score, ids = row[order], score[order], ids[order]
        place = np.arange(len(row)) - np.searchsorted(row, np.arange(len(self.floor)))[row]
        row, score, ids, place = (part[place < self.k] for part in (row, score, ids, place))
        similarity = np.full((len(self.floor), self.k), -np.inf, np.float32)
        index = np.full((len(self.floor), self.k), -1, np.int64)
        similarity[row, place], index[row, place] = score, ids
        self.parts, self.waiting, self.floor = [(row, score, ids)], 0, similarity[:, -1].copy()
        return similarity, index


def stable_order(row: np.ndarray, weight: np.ndarray, tie: np.ndarray) -> np.ndarray:
    """The permutation that sorts by (row, falling weight, tie): rows below 2^32, weights float32.

    Row and weight share one 64-bit key, which NumPy sorts several times faster than `lexsort` sorts three arrays.
    """
    bits = (weight + np.float32(0)).view(np.uint32)  # + 0: -0 and 0 are one number
    falling = np.where(bits >> 31, bits, ~(bits | np.uint32(1 << 31)))
    key = row.astype(np.uint64) << np.uint64(32) | falling
    order = np.argsort(key)
    sorted_key = key[order]
    same = sorted_key[1:] == sorted_key[:-1]
    if same.any():
        runs = np.flatnonzero(np.append(same, False) | np.insert(same, 0, False))
        inside = order[runs]
        order[runs] = inside[np.lexsort((tie[inside], key[inside]))]
    return order


def check_embeddings(x: np.ndarray, count: int | None = None, what: str = "embeddings") -> None:
    """Raise UserError unless x is (n, d) with n >= 2 rows (`count` rows, if given), finite, and no row is zero."""
    require(x.ndim == 2, f"{what}: shape {x.shape} must be (documents, dimensions); reshape it")
    fits = count is None or len(x) == count
    require(fits, f"{what}: {len(x)} rows, must be one for each of the {count} documents; embed the same documents")
    for start in range(0, len(x), 1 << 16):
        norm = np.linalg.norm(np.asarray(x[start : start + (1 << 16)], np.float32), axis=1)
        bad = np.flatnonzero(~np.isfinite(norm) | (norm == 0))
        if len(bad):
            value = "is zero" if norm[bad[0]] == 0 else "is not finite"
            raise UserError(f"{what}: row {start + bad[0]} {value}; every row must have a direction; mend or drop it")


def nearest_neighbours(
    x: np.ndarray, k: int, method="exact", recall=0.95, seed=0, device="cpu", rows=None, tick=None
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of x (n, d) float32 with the largest inner product (cosine, for unit rows) with each row but itself.

    Returns similarity (n, k) float32, falling, and index (n, k) int64; equal similarities by index. `method`: exact;
    ivf, which looks into so many lists that `recall` of the k are found on a sample; faiss, the same by that library.
    `rows` are those to search for, by default all. `tick(done)` is told of progress. Raises UserError for k >= n,
    NaN and zero rows.
    """
    check_embeddings(x)
    require(1 <= k < len(x), f"k {k}: must be at least 1 and below the {len(x)} documents; change k or add documents")
    require(method in METHODS, f"method {method!r}: must be one of {', '.join(METHODS)}; choose one")
    x = np.require(x, np.float32, ["C", "W"])  # torch wants it writable: a read-only memory map is copied
    rows = np.arange(len(x)) if rows is None else np.asarray(rows)
    search, size = METHODS[method](torch.from_numpy(x).to(device), k, recall, seed)
    similarity, index = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int64)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        similarity[part], index[part] = search(rows[part])
        if tick:
            tick(min(start + size, len(rows)))
    return similarity, index


def exact_neighbours(x: Tensor, k: int, recall: float, seed: int) -> tuple[Search, int]:
    """Every pair, a tile of the product at a time. Returns the search, and for how many rows at a time."""
    size, width = TILE if x.device.type == "cpu" else (1 << 14, 1 << 16)
    width, ids = max(width, 2 * k), np.arange(len(x))

    def search(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        best, queries, local = Best(len(rows), k), x[rows], np.arange(len(rows))
        for left in range(0, len(x), width):
            scores = queries @ x[left : left + width].T
            own = np.flatnonzero((rows >= left) & (rows < left + width))
            scores[own, rows[own] - left] = -math.inf
            best.offer(scores, local, ids[left : left + width])
        return best.merge()

    return search, size


def cluster(x: Tensor, count: int, seed: int) -> Tensor:
    """Unit centres (count, d): six rounds of spherical k-means on a sample of 32 rows of x (n, d) for each."""
    rng = np.random.default_rng(seed)
    sample = x[torch.from_numpy(rng.choice(len(x), min(len(x), 32 * count), replace=False))]
    centres = sample[:count].clone()
    for _ in range(6):
        own = nearest_centre(sample, centres)
        sums = torch.zeros_like(centres).index_add_(0, own, sample)
        empty = torch.bincount(own, minlength=count) == 0
        sums[empty] = sample[torch.from_numpy(rng.choice(len(sample), int(empty.sum()))).to(x.device)]
        centres = F.normalize(sums, dim=1)
    return centres


def nearest_centre(x: Tensor, centres: Tensor) -> Tensor:
    """For each row of x (n, d) the number of its nearest centre, (n,)."""
    return torch.cat([(part @ centres.T).argmax(1) for part in x.split(4096)])


def ivf_neighbours(x: Tensor, k: int, recall: float, seed: int) -> tuple[Search, int]:
    """Inverted lists in one big batch: one product for each list, of all the queries that look into it.

    A row's own list comes first and sets its floor, so that of the further lists few scores pass. The number of lists
    looked into is the least that holds `recall` of the true neighbours of 256 rows.
    """
    centres = cluster(x, min(len(x), round(LISTS * math.sqrt(len(x)))), seed)
    own, exact = nearest_centre(x, centres).cpu().numpy(), exact_neighbours(x, k, recall, seed)[0]
    members = np.argsort(own, kind="stable")  # by list, then by number
    begin = np.searchsorted(own[members], np.arange(len(centres) + 1))
    place = np.empty(len(x), np.int64)
    place[members] = np.arange(len(x)) - begin[own[members]]
    sample = np.random.default_rng(seed).choice(len(x), min(len(x), 256), replace=False)
    scores = (x[sample] @ centres.T).cpu().numpy()
    theirs = np.take_along_axis(scores, own[exact(sample)[1]], 1)[:, :, None]  # of the true neighbours' lists
    rank = (scores[:, None] >= theirs).sum(2)  # of these lists among all, equals before: (sample, k)
    probes = int(np.quantile(rank, recall, method="inverted_cdf"))
    by_list = x[members]

    def search(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        queries, best = x[rows], Best(len(rows), k)
        lists = torch.cat([(part @ centres.T).topk(probes).indices for part in queries.split(2048)]).cpu().numpy()
        lists = np.where(lists == own[rows, None], lists[:, :1], lists)  # products of other sizes round otherwise:
        lists[:, 0] = own[rows]  # the own list stays the first one
        for first, last in ((0, 1), (1, min(4, probes)), (min(4, probes), probes)):
            visits = lists[:, first:last].ravel()
            order = np.argsort(visits, kind="stable")
            edges = np.searchsorted(visits[order], np.arange(len(centres) + 1))
            for number in np.flatnonzero(np.diff(edges)):
                asking = order[edges[number] : edges[number + 1]] // (last - first)
                part = slice(begin[number], begin[number + 1])
                scores = queries[asking] @ by_list[part].T
                if first == 0:
                    scores[np.arange(len(asking)), place[rows[asking]]] = -math.inf
                best.offer(scores, asking, members[part])
            similarity, index = best.merge()
        short = np.flatnonzero(np.isneginf(similarity[:, -1]))  # all its lists together hold fewer than k
        similarity[short], index[short] = exact(rows[short]) if len(short) else (0, 0)
        return similarity, index

    return search, CHUNK["ivf"]


def faiss_neighbours(x: Tensor, k: int, recall: float, seed: int) -> tuple[Search, int]:
    """The same by faiss: a flat index for few documents, else inverted lists with probes enough for `recall`."""
    try:
        faiss = importlib.import_module("faiss")
    except ImportError:
        raise UserError("--method faiss: the package is not installed; pip install faiss-cpu") from None
    exact, x = exact_neighbours(x, k, recall, seed)[0], x.cpu().numpy()
    index = faiss.IndexFlatIP(x.shape[1])
    if len(x) > 20_000:
        index = faiss.IndexIVFFlat(index, x.shape[1], round(4 * math.sqrt(len(x))), faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = seed
        index.train(x)
    index.add(x)
    sample = np.random.default_rng(seed).choice(len(x), min(len(x), 256), replace=False)
    true = exact(sample)[1]
    while len(x) > 20_000 and index.nprobe < index.nlist:
        found = index.search(x[sample], k + 1)[1]
        if (true[:, :, None] == found[:, None, :]).any(2).mean() >= recall:
            break
        index.nprobe *= 2

    def search(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        similarity, found = index.search(x[rows], k + 1)
        similarity[found == rows[:, None]] = -np.inf  # itself, or with equals before it nobody
        order = np.lexsort((found, -similarity))[:, :k]
        return np.take_along_axis(similarity, order, 1), np.take_along_axis(found, order, 1)

    return search, CHUNK["faiss"]


Search = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # numbers of rows (r,) -> similarity, index (r, k)
METHODS = {"exact": exact_neighbours, "ivf": ivf_neighbours, "faiss": faiss_neighbours}
TILE = (1024, 2048)  # rows and columns of the product that is formed at a time
CHUNK = {"exact": TILE[0], "ivf": 1 << 16, "faiss": 1 << 16}  # queries together, in one process or in many
LISTS = 4  # times the root of the number of documents: inverted lists


# ----- The method: the graph and its paths ----------------------------------------------------------------------------


ARCS = 1 << 20  # of the lists, that are sorted at a time


def drop_duplicates(similarity: np.ndarray, index: np.ndarray, threshold: float) -> np.ndarray:
    """Which documents stay, (n,) bool, when of two neighbours at least `threshold` alike only the earlier one does.

    Documents are judged in their order, and only one that stays drops others: each dropped one has its like in what
    is left. Raises UserError for a NaN threshold.
    """
    require(threshold == threshold, f"threshold {threshold}: must be a number; give a cosine such as 0.95")
    row, column = np.nonzero(similarity >= threshold)
    other = index[row, column]
    pairs = np.unique(np.stack([np.minimum(row, other), np.maximum(row, other)], 1), axis=0)
    keep = bytearray(b"\1") * len(index)
    for earlier, later in pairs.tolist():  # by the earlier one, which has been judged when its turn comes
        if keep[earlier]:
            keep[later] = 0
    return np.frombuffer(keep, bool)


@dataclass(frozen=True)
class Graph:
    """Undirected weighted graph over n documents in compressed rows, each by falling weight, then by neighbour."""

    indptr: np.ndarray  # (n + 1,) int64: row i is neighbours[indptr[i]:indptr[i + 1]]
    neighbours: np.ndarray  # (arcs,) int32, or int64 where there are more documents; every edge is two arcs
    weights: np.ndarray  # (arcs,) float32: cosine
    keep: np.ndarray | None = None  # (n,) bool: the documents that were not dropped, by default all

    def __post_init__(self):
        if self.keep is None:
            object.__setattr__(self, "keep", np.ones(len(self.indptr) - 1, bool))

    def nodes(self) -> np.ndarray:
        """The kept documents, rising."""
        return np.flatnonzero(self.keep)

    def row(self, i: int) -> np.ndarray:
        """The neighbours of document i, the most similar first."""
        return self.neighbours[self.indptr[i] : self.indptr[i + 1]]


def build_graph(similarity: np.ndarray, index: np.ndarray, keep: np.ndarray | None = None) -> Graph:
    """An edge where either of two kept documents is in the other's list (section 2.1); similarity, index (n, k).

    Listed by both with weights that rounding made differ, an edge has the larger one. A document may fill its list
    up with -1. Memory beside the input and the graph: 8 bytes an arc of the lists.
    """
    n, k = index.shape
    keep = np.ones(n, bool) if keep is None else np.asarray(keep, bool)
    require(len(keep) == n == len(similarity), f"{len(keep)} keep, {len(similarity)} rows, must be {n}; mend the input")
    narrow, step = np.int32 if n <= 1 << 31 else np.int64, max(1, ARCS // k)

    def kept_arcs(start: int) -> np.ndarray:
        """Which arcs of the rows from start on, (step, k) bool, join two kept documents."""
        target = index[start : start + step]
        return (target >= 0) & keep[start : start + step, None] & keep[target]

    shift, count = np.uint64((n * k).bit_length()), 0
    back = np.empty(n * k, np.uint64)  # (target, arc) of every arc, sorted: what points at a row, without a matrix
    for start in range(0, n, step):
        good = kept_arcs(start)
        arc, target = np.flatnonzero(good) + start * k, index[start : start + step][good]
        back[count : count + len(arc)] = target.astype(np.uint64) << shift | arc.astype(np.uint64)
        count += len(arc)
    back = back[:count]
    back.sort()
    incoming = np.searchsorted(back, np.arange(n + 1, dtype=np.uint64) << shift)
    neighbours, weights = np.empty(2 * count, narrow), np.empty(2 * count, np.float32)
    degrees, filled = np.zeros(n, np.int64), 0
    for start in range(0, n, step):
        stop, good = min(start + step, n), kept_arcs(start)
        arc = (back[incoming[start] : incoming[stop]] & ((np.uint64(1) << shift) - np.uint64(1))).astype(np.int64)
        arriving = np.repeat(np.arange(stop - start), np.diff(incoming[start : stop + 1]))
        row = np.concatenate([np.nonzero(good)[0], arriving])
        other = np.concatenate([index[start:stop][good], arc // k])
        weight = np.concatenate([similarity[start:stop][good], similarity.take(arc)])
        pair = row.astype(np.uint64) << np.uint64(32) | other.astype(np.uint64)
        order = np.argsort(pair)  # mutual arcs meet
        row, other, weight, pair = row[order], other[order], weight[order], pair[order]
        again = np.flatnonzero(pair[1:] == pair[:-1]) + 1
        weight[again - 1] = np.maximum(weight[again - 1], weight[again])
        row, other, weight = (np.delete(part, again) for part in (row, other, weight))
        order = stable_order(row, weight, other)
        neighbours[filled : filled + len(row)], weights[filled : filled + len(row)] = other[order], weight[order]
        degrees[start:stop] = np.bincount(row, minlength=stop - start)
        filled += len(row)
    return Graph(np.append(0, degrees.cumsum()), neighbours[:filled], weights[:filled], keep)


DEGREES = ("static", "remaining")
ORDERS = ("paper", "edge", "random", "file", "knn", "cluster")


def traverse(
    graph: Graph, order="paper", degree="static", seed=0, embeddings: np.ndarray | None = None, repeats=10
) -> np.ndarray:
    """An order of the kept documents, (n_kept,) int64, each exactly once, the same for the same seed.

    paper: Algorithm 1, see `walk`, by the degree in the whole graph (static) or in what is left of it (remaining).
    edge: see `chain_edges`; embeddings (n, d) let it join fragments by their nearest ends. random; file: as they came;
    cluster: k-means groups of about 32, each shuffled; knn, with repeats: each document, shuffled, before its
    `repeats` best neighbours.
    """
    require(order in ORDERS, f"order {order!r}: must be one of {', '.join(ORDERS)}; choose one")
    require(degree in DEGREES, f"degree {degree!r}: must be static or remaining; choose one")
    require(order != "cluster" or embeddings is not None, "order 'cluster': needs embeddings; give them")
    rng, nodes = np.random.default_rng(seed), graph.nodes()
    if order == "file" or len(nodes) == 0:
        return nodes
    if order == "paper":
        return walk(graph, degree == "remaining", rng)
    if order == "edge":
        return chain_edges(graph, embeddings, rng)
    if order == "knn":
        return np.concatenate([[i, *graph.row(i)[:repeats]] for i in rng.permutation(nodes)])
    if order == "cluster":
        x = torch.from_numpy(np.ascontiguousarray(embeddings[nodes], np.float32))
        centres = cluster(x, -(-len(nodes) // 32), seed)
        group = nearest_centre(x, centres).numpy()
        return nodes[np.lexsort((rng.permutation(len(nodes)), rng.permutation(len(centres))[group]))]
    return rng.permutation(nodes)


def walk(graph: Graph, remaining: bool, rng: np.random.Generator) -> np.ndarray:
    """Algorithm 1: from a document of least degree on to the most similar one not yet visited; where there is none,
    anew from a random one of least degree. Every arc is looked at once at most, so it is linear in the graph.

    Line 7 of the algorithm prints arg min; text and figure mean arg max, which in a row by falling weight is the first
    one not yet visited. Documents of low degree go first because later their few neighbours would be gone.
    """
    nodes, degrees = rng.permutation(graph.nodes()), np.diff(graph.indptr)
    starts = memoryview(nodes[np.argsort(degrees[nodes], kind="stable")])  # equal degrees stay shuffled
    pool = Pool(nodes, degrees, rng) if remaining else None
    visited, path = bytearray(~graph.keep), array.array("q")
    rows, arcs = memoryview(graph.indptr), memoryview(graph.neighbours)
    for node in pool.draw() if pool else starts:
        while not visited[node]:
            visited[node] = 1
            path.append(node)
            row = arcs[rows[node] : rows[node + 1]]
            if pool:
                pool.remove(node, row, visited)
            for other in row:
                if not visited[other]:
                    node = other
                    break
    return np.frombuffer(path, np.int64)


class Pool:
    """The documents not yet visited, by the number of their neighbours in the pool; every step takes constant time."""

    def __init__(self, nodes: np.ndarray, degrees: np.ndarray, rng: np.random.Generator):
        self.degree, self.place = array.array("q", degrees.tobytes()), array.array("q", bytes(8 * len(degrees)))
        self.buckets, self.lowest = [[] for _ in range(degrees.max() + 1)], 0
        self.random = random.Random(int(rng.integers(1 << 62)))
        for node in memoryview(nodes):
            self.put(node)

    def put(self, node: int) -> None:
        bucket = self.buckets[self.degree[node]]
        self.place[node] = len(bucket)
        bucket.append(node)

    def take(self, node: int) -> None:
        bucket = self.buckets[self.degree[node]]
        last = bucket.pop()
        if last != node:
            bucket[self.place[node]] = last
            self.place[last] = self.place[node]

    def remove(self, node: int, row: Iterable[int], visited: bytearray) -> None:
        """Take a document out: its neighbours lose one."""
        self.take(node)
        for other in row:
            if not visited[other]:
                self.take(other)
                self.degree[other] -= 1
                self.put(other)
                self.lowest = min(self.lowest, self.degree[other])

    def draw(self) -> Iterator[int]:
        """A random one of those of least degree, as long as any are left."""
        while self.lowest < len(self.buckets):
            if self.buckets[self.lowest]:
                yield self.random.choice(self.buckets[self.lowest])
            else:
                self.lowest += 1


def chain_edges(graph: Graph, embeddings: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Greedy edge matching (not in the paper): the heaviest edges first, each unless it would give a document a third
    neighbour or close a ring; then the nearest ends of what has become of it, again and again, until one path is left.

    Without embeddings the fragments stand in random order.
    """
    nodes, n = graph.nodes(), len(graph.keep)
    links = (array.array("q", [-1]) * n, array.array("q", [-1]) * n)  # the neighbours of a document in its fragment
    far = array.array("q", range(n))  # of a fragment's end, the other end
    row = np.repeat(np.arange(n, dtype=graph.neighbours.dtype), np.diff(graph.indptr))
    once = np.flatnonzero(row < graph.neighbours)
    once = once[np.argsort(-graph.weights[once], kind="stable")]
    joined, added = link_edges(row[once], graph.neighbours[once], links, far), True
    while embeddings is not None and joined < len(nodes) - 1:
        ends = nodes[np.frombuffer(links[1], np.int64)[nodes] < 0]
        # Exact lists always yield an edge: the nearest two ends of different fragments see each other in them.
        k, exact = min(10, len(ends) - 1), len(ends) <= 20_000 or not added
        similarity, index = nearest_neighbours(embeddings[ends], k, "exact" if exact else "ivf")
        order = np.argsort(-similarity.ravel(), kind="stable")
        added = link_edges(np.repeat(ends, k)[order], ends[index.ravel()[order]], links, far)
        joined += added
    first, second = links
    path, seen = array.array("q"), bytearray(n)
    for start in memoryview(rng.permutation(nodes)):
        node, previous = start, -1
        while second[start] < 0 and not seen[node]:  # from an end
            seen[node] = 1
            path.append(node)
            following = first[node] if first[node] != previous else second[node]
            node, previous = (following, node) if following >= 0 else (node, previous)
    return np.frombuffer(path, np.int64)


def link_edges(a: np.ndarray, b: np.ndarray, links: tuple[array.array, array.array], far: array.array) -> int:
    """Take edges (a, b) in their order wherever both are ends of different fragments; how many were taken."""
    (first, second), count = links, 0
    full = np.frombuffer(second, np.int64)
    for start in range(0, len(a), 1 << 18):
        u, v = a[start : start + (1 << 18)], b[start : start + (1 << 18)]
        free = (full[u] < 0) & (full[v] < 0)  # most edges fall here, by NumPy
        for x, y in zip(u[free].tolist(), v[free].tolist(), strict=True):
            if second[x] < 0 and second[y] < 0 and far[x] != y and x != y:
                (first if first[x] < 0 else second)[x] = y
                (first if first[y] < 0 else second)[y] = x
                left, right = far[x], far[y]
                far[left], far[right] = right, left
                count += 1
    return count


# ----- The method: contexts and what an order is worth ----------------------------------------------------------------


def pack(tokens, order: np.ndarray, context_length: int, separator: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate documents in their order, a separator after each, and cut (section 2.2).

    `tokens[i]` are the ids of document i. Returns contexts (m, context_length) and starts, bool of that shape, True at
    the first token of a document. The last context is filled up with separators (0 without one). Raises UserError.
    """
    require(context_length >= 1, f"context_length {context_length}: must be at least 1; raise it")
    end, order = int(separator is not None), np.asarray(order, np.int64)
    require(len(order) > 0, "order: is empty, there is nothing to pack; keep at least one document")
    sizes = np.array([len(tokens[i]) for i in order]) + end
    begin = np.cumsum(sizes) - sizes
    count = -(-int(sizes.sum()) // context_length)
    contexts = np.full(count * context_length, separator or 0, tokens[order[0]].dtype)
    starts = np.zeros(count * context_length, bool)
    for i, at in zip(order.tolist(), begin.tolist(), strict=True):
        contexts[at : at + len(tokens[i])] = tokens[i]
    starts[begin[sizes > end]] = True
    return contexts.reshape(count, -1), starts.reshape(count, -1)


@dataclass(frozen=True)
class Ragged:
    """Documents' ids in one flat array: item i is flat[offsets[i]:offsets[i + 1]]."""

    flat: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.flat[self.offsets[i] : self.offsets[i + 1]]


def ordering_report(
    x, order, graph: Graph | None = None, labels=None, lengths=None, context_length=0, shuffle=None
) -> dict:
    """What an order of documents is worth; x (n, d) are unit rows, of which `order` may leave some out.

    Always: documents, each_once, adjacent_cosine. With a graph: bound, the mean of each document's two best edges, more
    than which no path has; share_of_bound; segments, between steps that follow no edge, and the longest one. With
    labels (n,): label_purity, the share of steps within one label. With lengths (n,), tokens and separator, and
    context_length: contexts; within_context_cosine of two documents; truncation_rate, of documents that a cut parts;
    leakage, cosine across neighbouring contexts, before and, with a permutation of the contexts, after the shuffle.
    """
    order = np.asarray(order, np.int64)
    once = len(np.unique(order)) == len(order) and (graph is None or len(order) == int(graph.keep.sum()))
    report = {"documents": len(order), "each_once": bool(once)}
    steps = [(x[order[i : i + 4097][:-1]] * x[order[i : i + 4097][1:]]).sum(1) for i in range(0, len(order) - 1, 4096)]
    report["adjacent_cosine"] = float(np.concatenate(steps).mean()) if steps else 0.0
    if labels is not None:
        named = np.unique(np.asarray(labels), return_inverse=True)[1][order]
        report["label_purity"] = float((named[1:] == named[:-1]).mean()) if len(order) > 1 else 1.0
    if graph is not None:
        degrees = np.diff(graph.indptr)
        best = np.zeros((len(x), 2))
        for i in (0, 1):
            best[degrees > i, i] = graph.weights[graph.indptr[:-1][degrees > i] + i]
        report["bound"] = float(best[order].mean())
        report["share_of_bound"] = report["adjacent_cosine"] / report["bound"] if report["bound"] else 0.0
        arcs = np.repeat(np.arange(len(x)), degrees) * len(x) + graph.neighbours
        taken = np.isin(order[:-1] * len(x) + order[1:], arcs)
        cuts = np.flatnonzero(np.concatenate([[True], ~taken, [True]]))
        report |= {"segments": len(cuts) - 1, "longest_segment": int(np.diff(cuts).max())}
    if lengths is not None and context_length:
        report |= context_report(x[order], np.asarray(lengths)[order], context_length, shuffle)
    return report


def context_report(x: np.ndarray, lengths: np.ndarray, context_length: int, shuffle) -> dict:
    """`ordering_report` on contexts; x and lengths in order. A document is in every context that it touches."""
    begin = np.cumsum(lengths) - lengths
    first, last = begin // context_length, (begin + np.maximum(lengths, 1) - 1) // context_length
    context = np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)])
    document = np.repeat(np.arange(len(x)), last - first + 1)
    total, size = np.zeros((context[-1] + 1, x.shape[1])), np.bincount(context)
    np.add.at(total, context, x[document])
    square, many = (total**2).sum(1), size > 1
    within = (square - size)[many] / (size * (size - 1))[many]
    mean = total / np.maximum(size, 1)[:, None]
    report = {"contexts": len(size), "within_context_cosine": float(within.mean()) if many.any() else None}
    report["truncation_rate"] = float((last > first).mean())
    for name, permutation in (("before", np.arange(len(size))), ("after", shuffle)):
        if permutation is not None and len(size) > 1:
            report[f"leakage_{name}"] = float((mean[permutation][1:] * mean[permutation][:-1]).sum(1).mean())
    return report


# ----- Sort: the stages of the job ------------------------------------------------------------------------------------

NEEDS = {  # what each stage depends on, beside the stages before it
    "read": ("tokenizer", "text_field", "label_field", "skip_bad"),
    "embed": ("encoder", "embeddings", "dim", "seed"),
    "neighbours": ("k", "method", "exact_limit", "recall"),
    "graph": ("threshold",),
    "order": ("order", "degree"),
}


class Progress:
    """A line every five seconds while a stage is under way."""

    def __init__(self, stage: str, total: int):
        self.stage, self.total = stage, total
        self.began = self.shown = time.perf_counter()

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if now - self.shown > 5:
            self.shown, pace = now, (now - self.began) / max(1, done)
            print(progress_line(done, self.total, {"stage": self.stage}, pace), flush=True)


class Stages:
    """Folders of arrays under OUT/stages; --resume keeps each one that the same input and flags made."""

    def __init__(self, config: Config, fingerprint: list):
        self.config, self.folder, self.key = config, Path(config.out) / "stages", json.dumps(fingerprint)

    def kept(self, stage: str) -> bool:
        """Whether the stage is there, whole, from the same input and flags; to be asked for each stage in turn."""
        needs = {name: getattr(self.config, name) for name in NEEDS[stage]}
        for path in filter(None, (needs.get(name) for name in ("embeddings", "encoder", "tokenizer"))):
            needs[path] = Path(path).stat().st_mtime_ns if Path(path).exists() else None
        self.key = hashlib.sha256(json.dumps([self.key, stage, needs]).encode()).hexdigest()
        file = self.folder / stage / "key"
        return self.config.resume and file.is_file() and file.read_text("utf-8") == self.key

    def make(self, stage: str, write: Callable[[Path], dict | None], kept: bool | None = None) -> dict[str, np.ndarray]:
        """The stage's arrays, memory-mapped: those there, or those that `write(folder)` writes or returns."""
        began, folder, half = time.perf_counter(), self.folder / stage, self.folder / f"{stage}.tmp"
        if self.kept(stage) if kept is None else kept:
            print(f"{stage}: kept from the run before", flush=True)
        else:
            for old in (half, folder):
                shutil.rmtree(old, ignore_errors=True)
            half.mkdir(parents=True)
            for name, rows in (write(half) or {}).items():
                np.save(half / f"{name}.npy", rows)
            (half / "key").write_text(self.key, "utf-8")
            os.replace(half, folder)  # all of a stage, or nothing
            print(f"{stage}: {time.perf_counter() - began:.1f} s", flush=True)
        return {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}


def read_stage(source: Source, config: Config, folder: Path) -> dict[str, np.ndarray]:
    """Tokenise: flat ids, offsets (n + 1,), documents.jsonl (id and label), tokenizer.json-like settings."""
    where = config.input or "the standard library"
    require(next(iter(source), None) is not None, f"--input {where}: holds no documents; give one with text")
    vocabulary = open_vocabulary(config.tokenizer, source.texts())
    dtype = np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.uint32)
    offsets, tick = array.array("q", [0]), Progress("read", source.total)
    with open(folder / "ids.bin", "wb") as ids, open(folder / "documents.jsonl", "w", encoding="utf-8") as names:
        for batch in batches(source, 256):
            for document, found in zip(batch, vocabulary.encode([document.text for document in batch]), strict=True):
                ids.write(np.array(found, dtype).tobytes())
                offsets.append(offsets[-1] + len(found))
                names.write(json.dumps([document.id, document.label]) + "\n")
            tick(source.done)
    if vocabulary.file:
        (folder / vocabulary.name).write_bytes(vocabulary.file)
    about = {"dtype": dtype.name, "vocab_size": vocabulary.size, "tokenizer": vocabulary.name}
    write_json(folder / "vocabulary.json", about | {"document_separator": vocabulary.separator})
    write_json(folder / "left_out.json", dict(source.counts))
    return {"offsets": np.frombuffer(offsets, np.int64)}


def embed_stage(source: Source, config: Config, count: int, device: torch.device, folder: Path) -> None:
    """Unit rows (n, d) float32: of --embeddings, by --encoder, or by TF-IDF."""
    tick = Progress("embed", count)
    if config.embeddings:
        require(Path(config.embeddings).is_file(), f"--embeddings {config.embeddings}: no such file; correct the path")
        try:
            given = np.load(config.embeddings, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise UserError(f"--embeddings {config.embeddings}: must be a .npy array ({error}); give another") from None
        fits = isinstance(given, np.ndarray) and given.dtype.kind in "fiu"
        require(fits, f"--embeddings {config.embeddings}: must be one .npy array of real numbers; give another")
        check_embeddings(given, count, f"--embeddings {config.embeddings}")
        rows = (np.asarray(given[i : i + 4096], np.float32) for i in range(0, count, 4096))
        blocks, dim = (block / np.linalg.norm(block, axis=1, keepdims=True) for block in rows), given.shape[1]
    else:
        encoder = Encoder(config.encoder, device) if config.encoder else None
        model = encoder or TfIdf(config.dim, config.seed).fit(source.texts())
        blocks, dim = map(model.embed, batches(source.texts(), 256)), model.dim
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (count, dim))
    done = 0
    for block in blocks:
        x[done : done + len(block)] = block
        done += len(block)
        tick(done)
    x.flush()


def neighbours_stage(x: np.ndarray, config: Config, device: torch.device, folder: Path | None) -> dict | None:
    """Similarity and index (n, k); of torchrun's processes each searches for its part, and the first has the folder."""
    count, method = len(x), config.method
    if method == "auto":
        method = "exact" if count <= config.exact_limit else "ivf"
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = np.flatnonzero(np.arange(count) // CHUNK[method] % world == rank)
    tick = Progress(f"neighbours ({method})", len(rows)) if rank == 0 else None
    similarity, index = np.zeros((count, config.k), np.float32), np.zeros((count, config.k), np.int64)
    found = nearest_neighbours(x, config.k, method, config.recall, config.seed, device, rows, tick)
    similarity[rows], index[rows] = found
    for part in (similarity, index) if world > 1 else ():
        dist.all_reduce(torch.from_numpy(part))  # the other rows are 0
    if folder is None:
        return None
    recall = 1.0
    if method != "exact":
        sample = np.random.default_rng(config.seed + 1).choice(count, min(count, 256), replace=False)
        true = nearest_neighbours(x, config.k, device=device, rows=sample)[1]
        recall = float((true[:, :, None] == index[sample][:, None, :]).any(2).mean())
        print(f"recall@{config.k} against exact search on {len(sample)} documents: {recall:.3f}")
    write_json(folder / "recall.json", {"method": method, "recall": recall})
    return {"similarity": similarity, "index": index}


def graph_stage(similarity: np.ndarray, index: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    """The graph's arrays."""
    keep = drop_duplicates(similarity, index, threshold)
    graph = build_graph(similarity, index, keep)
    dropped, edges = len(keep) - int(keep.sum()), len(graph.neighbours) // 2
    print(f"graph: {len(keep) - dropped:,} documents, {dropped:,} duplicates dropped, {edges:,} edges", flush=True)
    return vars(graph)


@dataclass
class Sorted:
    """What the stages made."""

    tokens: Ragged
    vocabulary: dict
    labels: list[str]
    x: np.ndarray
    similarity: np.ndarray
    index: np.ndarray
    graph: Graph
    order: np.ndarray


def run_stages(config: Config, device: torch.device) -> Sorted | None:
    """All stages up to the order; None in the processes that torchrun started only to search for neighbours."""
    main, source = not dist.is_initialized() or dist.get_rank() == 0, Source(config)
    stages, kept = Stages(config, source.fingerprint()), [False]
    if main:
        offsets = stages.make("read", lambda half: read_stage(source, config, half))["offsets"]
        count = len(offsets) - 1
        require(count > config.k, f"--k {config.k}: must be below the {count} documents; lower it or add documents")
        stages.make("embed", lambda half: embed_stage(source, config, count, device, half))
        kept = [stages.kept("neighbours")]
    if dist.is_initialized():
        dist.broadcast_object_list(kept)
    x = np.load(stages.folder / "embed" / "x.npy", mmap_mode="r")
    if not main:
        return None if kept[0] else neighbours_stage(x, config, device, None)
    found = stages.make("neighbours", lambda half: neighbours_stage(x, config, device, half), kept[0])
    graph = Graph(**stages.make("graph", lambda half: graph_stage(**found, threshold=config.threshold)))
    path = (graph, config.order, config.degree, config.seed, x)
    order = stages.make("order", lambda half: {"order": traverse(*path)})["order"]
    read = stages.folder / "read"
    vocabulary = load_json(read / "vocabulary.json")
    tokens = Ragged(np.memmap(read / "ids.bin", vocabulary["dtype"], "r"), offsets)
    labels = [json.loads(line)[1] for line in (read / "documents.jsonl").read_text("utf-8").splitlines()]
    return Sorted(tokens, vocabulary, labels, x, **found, graph=graph, order=order)


def sort(config: Config) -> dict | None:
    """The job `sort`: order.npy, train.bin, train.json, report.json and order.png in config.out."""
    began, device, out = time.perf_counter(), start(config), Path(config.out)
    if (done := run_stages(config, device)) is None:
        return None
    contexts = pack(done.tokens, done.order, config.context_length, done.vocabulary["document_separator"])[0]
    shuffle = np.random.default_rng(config.seed).permutation(len(contexts))
    np.save(out / "order.npy", done.order)

    def write(name: str) -> None:  # some at a time: a second copy may not fit in memory
        with open(name, "wb") as file:
            for rows in np.array_split(shuffle, len(shuffle) // 1024 + 1):
                contexts[rows].astype(contexts.dtype.newbyteorder("<")).tofile(file)

    write_atomically(out / "train.bin", write)
    name = done.vocabulary["tokenizer"]
    if (out / "stages" / "read" / name).is_file():
        shutil.copyfile(out / "stages" / "read" / name, out / name)
    write_json(out / "train.json", done.vocabulary | {"context_length": config.context_length})
    report = reports(done, config, shuffle)
    print(table(report["orders"]))
    shuffled = np.random.default_rng(config.seed).permutation(done.order)
    picture(done, {"shuffled": shuffled, config.order: done.order}, {}, out / "order.png")
    report = result_record(config, device, wall_seconds=round(time.perf_counter() - began, 1), **report)
    write_json(out / "report.json", report)
    size = f"{contexts.size:,} tokens in {len(contexts):,} contexts"
    print(f"{out}: train.bin ({size}), order.npy, report.json after {report['wall_seconds']:.0f} s")
    return report


def reports(done: Sorted, config: Config, shuffle: np.ndarray) -> dict:
    """`ordering_report` of the order as it came, shuffled and sorted; what was left out, and the search's recall."""
    lengths = np.diff(done.tokens.offsets) + (done.vocabulary["document_separator"] is not None)
    labels, stages = done.labels if any(done.labels) else None, Path(config.out) / "stages"
    orders, each = {name: traverse(done.graph, name, seed=config.seed) for name in ("file", "random")}, {}
    for name, order in (orders | {config.order: done.order}).items():
        permutation = shuffle if order is done.order else None
        each[name] = ordering_report(done.x, order, done.graph, labels, lengths, config.context_length, permutation)
    return {
        "orders": each,
        "documents": len(done.tokens),
        "duplicates": float(1 - done.graph.keep.mean()),
        "documents_longer_than_a_context": int((lengths > config.context_length).sum()),
        "left_out": load_json(stages / "read" / "left_out.json"),
        "neighbours": load_json(stages / "neighbours" / "recall.json"),
    }


def table(columns: dict[str, dict]) -> str:
    """A line for each value, a column for each dictionary of them; a dictionary among the values has several lines."""
    rows = {"": list(columns)}
    for i, values in enumerate(columns.values()):
        for name, value in values.items():
            for at, cell in value.items() if isinstance(value, dict) else [("", value)]:
                cells = rows.setdefault(f"{name} {at}", ["-"] * len(columns))
                cells[i] = f"{cell:.4f}" if isinstance(cell, float) else str(cell)
    return "\n".join(f"{name:26}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows.items())


# ----- The experiment: does the order teach a model to use its context? -----------------------------------------------


class CausalLM(nn.Module):
    """A small LLaMA-like language model: RMSNorm, rotary positions, attention, GELU, tied head."""

    def __init__(self, config: Config, vocab_size: int):
        super().__init__()
        d, self.heads, linear = config.d_model, config.n_head, functools.partial(nn.Linear, bias=False)
        self.embedding, self.norm, self.layers = nn.Embedding(vocab_size, d), nn.RMSNorm(d), nn.ModuleList()
        for _ in range(config.n_layer):
            attention, mlp = (linear(d, 3 * d), linear(d, d)), (linear(d, 4 * d), linear(4 * d, d))
            self.layers.append(nn.ModuleList([nn.RMSNorm(d), *attention, nn.RMSNorm(d), *mlp]))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith(("2.weight", "5.weight"))  # to the residual stream
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * config.n_layer) if writes else 1))

    def forward(self, tokens: Tensor, starts: Tensor | None = None) -> Tensor:
        """tokens (B, L) -> the residual stream (B, L, d_model); with starts (B, L) bool documents are apart."""
        x, length, mask = self.embedding(tokens), tokens.shape[1], None
        if starts is not None:
            document = starts.cumsum(1)
            mask = (document[:, None, :, None] == document[:, None, None, :]).tril()
        half = x.shape[-1] // self.heads // 2
        wavelengths = 10000.0 ** (torch.arange(half, device=x.device) / half)
        angles = torch.arange(length, device=x.device)[:, None] / wavelengths
        cos, sin = angles.cos(), angles.sin()  # (L, d / 2)
        for norm, qkv, out, norm_2, up, down in self.layers:
            q, k, v = qkv(norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, d)
            q, k = (torch.cat([a * cos - b * sin, a * sin + b * cos], -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
            x = x + out(y.transpose(1, 2).flatten(2))
            x = x + down(F.gelu(up(norm_2(x))))
        return self.norm(x)

    @torch.inference_mode()
    def losses(self, tokens: Tensor, last: int = 0) -> Tensor:
        """Nats of the `last` tokens of each row, or of all but the first: (B, last)."""
        found, last = [], last or tokens.shape[1] - 1
        for part in tokens.split(8):
            logits = self(part[:, :-1])[:, -last:] @ self.embedding.weight.T
            found.append(F.cross_entropy(logits.mT, part[:, -last:], reduction="none"))
        return torch.cat(found)


def head_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of x (B, L, d_model) through the head's weight (V, d_model) for targets (B, L).

    On the CPU it goes in pieces, so that the logits (B L, V) never exist as a whole: faster, and less memory.
    """
    pieces = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512, chunking_method=None, acc_policy="balanced")
    whole = x.device.type != "cpu" or torch.compiler.is_compiling()
    return F.linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), options=None if whole else pieces)


def keep_memory() -> None:
    """Have glibc keep freed blocks: giving them back and fetching them anew each step takes up to half the time."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, as small ones do,
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks


def train_arm(
    name: str, contexts: np.ndarray, starts: np.ndarray | None, config: Config, vocab_size: int, log=None
) -> CausalLM:
    """A model trained on config.steps batches of contexts, shuffled anew each epoch; every arm starts alike."""
    device = pick_device(config.device)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = CausalLM(config, vocab_size).to(device)
    matrices, rest = ([p for p in model.parameters() if (p.ndim > 1) == whole] for whole in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer, rng, waiting = torch.optim.AdamW(groups, config.lr, (0.9, 0.95)), np.random.default_rng(config.seed), []
    began, total, often = time.perf_counter(), 0.0, max(1, config.steps // 10)
    for step in range(1, config.steps + 1):
        while len(waiting) < config.batch:
            waiting += rng.permutation(len(contexts)).tolist()
        rows, waiting = waiting[: config.batch], waiting[config.batch :]
        tokens = torch.from_numpy(contexts[rows].astype(np.int64)).to(device)
        apart = None if starts is None else torch.from_numpy(starts[rows]).to(device)[:, :-1]
        loss = head_loss(model(tokens[:, :-1], apart), model.embedding.weight, tokens[:, 1:])
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"training diverged at step {step} of {name}: loss {loss.item()}; lower --lr")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm, share = max(1, config.steps // 20), step / config.steps
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(step / warm, 0.1 + 0.45 * (1 + math.cos(math.pi * share)))
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % often == 0:
            pace, mean, total = (time.perf_counter() - began) / step, total / often, 0.0
            parts = {"arm": name, "loss": f"{mean:.4f}", "step": f"{pace * 1e3:.0f} ms"}
            print(progress_line(step, config.steps, parts, pace), flush=True)
            if log:
                log.write(json.dumps({"arm": name, "step": step, "loss": mean}) + "\n")
                log.flush()
    return model.eval()


@dataclass
class HeldOut:
    """What models are judged by: contexts of held-out documents, and first tokens of documents after three pasts."""

    random: Tensor  # (m, L) contexts in random order: the paper's protocol
    related: Tensor  # (m, L) contexts along the paper's path
    alone: Tensor  # (t, 1 + T) separator and the first T tokens of a document
    after: dict[str, Tensor]  # (t, L) the same after related documents, the nearest last, or after unrelated ones


def hold_out(done: Sorted, config: Config, graph: Graph, target: int = 64, most: int = 400) -> HeldOut:
    """The held-out contexts and targets; graph is that of the held-out documents alone."""
    rng, separator = np.random.default_rng(config.seed), done.vocabulary["document_separator"]
    device, sets = pick_device(config.device), {}
    require(len(graph.nodes()) > 1, "documents: too few to hold some out; add more")
    for name, order in (("random", "random"), ("related", "paper")):
        contexts, _ = pack(done.tokens, traverse(graph, order, seed=config.seed), config.context_length, separator)
        contexts = contexts[: max(1, min(len(contexts) - 1, 65536 // config.context_length))]
        sets[name] = torch.from_numpy(contexts.astype(np.int64)).to(device)
    target = min(target, config.context_length // 4)
    require(target > 0, f"--context-length {config.context_length}: must be at least 4 to train on; raise it")
    sizes, degrees, rows = np.diff(done.tokens.offsets), np.diff(graph.indptr), collections.defaultdict(list)
    others, past = rng.permutation(graph.nodes()), config.context_length - target - 1
    chosen = [i for i in graph.nodes() if degrees[i] and sizes[i] >= target]
    require(len(chosen) > 0, f"held-out documents: none has a neighbour and {target} tokens; give more text")
    for n, i in enumerate(rng.permutation(chosen)[:most]):
        wanted, best, apart = [separator, *done.tokens[i][:target].tolist()], graph.row(i), np.roll(others, -n)
        rows["alone"].append(wanted)
        apart = apart[~np.isin(apart, [i, *best])]
        for name, sources in (("related", [*best, *apart]), ("unrelated", apart)):
            before = []
            for j in sources:  # the first one comes last, next to the target
                before = [*done.tokens[j].tolist(), *[separator] * bool(before), *before]
                if len(before) >= past:
                    break
            rows[name].append(([separator] * past + before)[-past:] + wanted)
    found = {name: torch.tensor(part, device=device) for name, part in rows.items()}
    return HeldOut(**sets, alone=found.pop("alone"), after=found)


def judge(model: CausalLM, held: HeldOut) -> dict:
    """Nats a token on held-out text in random and in related order, of targets with no, related and unrelated past; the
    context gain, what a past takes off the loss; and the loss alone by position after the boundary."""
    scores = {f"{k}_order_loss": model.losses(getattr(held, k)).mean().item() for k in ("random", "related")}
    alone = model.losses(held.alone)  # (t, T)
    scores["no_context_loss"] = alone.mean().item()
    for name, rows in held.after.items():
        loss = model.losses(rows, alone.shape[1])
        scores |= {f"{name}_context_loss": loss.mean().item(), f"{name}_context_gain": (alone - loss).mean().item()}
    cuts = [(a, b) for a, b in itertools.pairwise([0, 4, 8, 16, 32, 64]) if a < alone.shape[1]]
    return scores | {"no_context_loss_at": {f"{a}-{b - 1}": alone[:, a:b].mean().item() for a, b in cuts}}


def split(done: Sorted, share: int = 10) -> tuple[Graph, Graph]:
    """Graphs of the training and of the held-out documents: every tenth label, or without labels every tenth document.

    Duplicates were dropped over all documents together, so none parts training from held-out text.
    """
    names = np.unique(done.labels, return_inverse=True)[1]
    if names.max() == 0:  # one label for all is none
        names = np.arange(len(names))
    names = np.random.default_rng(0).permutation(names.max() + 1)[names]
    keep, part = done.graph.keep, names % share == 0
    return build_graph(done.similarity, done.index, keep & ~part), build_graph(done.similarity, done.index, keep & part)


def experiment(config: Config) -> dict | None:
    """The default job: sort, then train on the shuffled and on the sorted documents at equal tokens and equal start."""
    began, device, out = time.perf_counter(), start(config), Path(config.out)
    done = run_stages(config, device)
    if done is None:
        return None
    graph, other = split(done)
    separator, lengths = done.vocabulary["document_separator"], np.diff(done.tokens.offsets) + 1
    require(separator is not None, f"--tokenizer {config.tokenizer}: has no token to set documents apart; give another")
    held, labels = hold_out(done, config, other), done.labels if any(done.labels) else None
    keep_memory()
    paths, arms, report = {}, {}, {}
    with open(out / "metrics.jsonl", "w", encoding="utf-8") as log:
        for name, order in {"standard": "random", "sorted": config.order}.items():
            paths[name] = path = traverse(graph, order, config.degree, config.seed, done.x)
            report[name] = ordering_report(done.x, path, graph, labels, lengths, config.context_length)
            contexts, _ = pack(done.tokens, path, config.context_length, separator)
            arms[name] = judge(train_arm(name, contexts, None, config, done.vocabulary["vocab_size"], log), held)
    print(table(report) + "\n\n" + table(arms))
    picture(done, paths, arms, out / "iclm_sort.png")
    result = result_record(config, device, wall_seconds=round(time.perf_counter() - began, 1), arms=arms, orders=report)
    result |= {"tokens_an_arm": config.steps * config.batch * config.context_length}
    write_json(out / "result.json", result)
    print(f"{out}: result.json, metrics.jsonl after {result['wall_seconds']:.0f} s")
    return result


# ----- Pictures, jobs, main -------------------------------------------------------------------------------------------


def picture(done: Sorted, paths: dict[str, np.ndarray], arms: dict, path: Path) -> None:
    """Similarity of adjacent documents in each order; a map of the corpus under the last path; the arms' losses."""
    try:
        import matplotlib.pyplot as plt
        from matplotlib.collections import LineCollection
    except ImportError:
        print("no picture: matplotlib is not installed; pip install matplotlib")
        return
    figure, axes = plt.subplots(1, 3 if arms else 2, figsize=(15 if arms else 10, 4.6), layout="constrained")
    for name, order in paths.items():
        order = order[:200_000]
        cosine = (done.x[order[1:]] * done.x[order[:-1]]).sum(1)
        axes[0].hist(cosine, np.linspace(-0.2, 1, 61), histtype="step", label=f"{name}: mean {cosine.mean():.3f}")
    axes[0].set(xlabel="cosine of adjacent documents", ylabel="steps")
    axes[0].legend()
    order = np.asarray(paths[name][:5000])
    x = F.pad(torch.from_numpy(np.array(done.x[order])), (0, 1))  # embeddings of one number have two components too
    place = ((x - x.mean(0)) @ torch.pca_lowrank(x, 2)[2]).numpy()
    lines = LineCollection(np.stack([place[:-1], place[1:]], 1), cmap="viridis", lw=0.3, alpha=0.5)
    lines.set_array(np.arange(len(place)))
    axes[1].scatter(*place.T, s=1, color="0.6")
    axes[1].add_collection(lines)
    axes[1].set(xlabel=f"first principal component ({len(order):,} documents, {name})", ylabel="second")
    if arms:
        names = [n for n in next(iter(arms.values())) if n.endswith("loss")]
        for i, (arm, scores) in enumerate(arms.items()):
            axes[2].barh(np.arange(len(names)) + 0.35 * i, [scores[n] for n in names], 0.33, label=arm)
        axes[2].set_yticks(np.arange(len(names)) + 0.17, [n.replace("_", " ") for n in names])
        axes[2].set(xlabel="nats a token, held-out text")
        axes[2].legend()
    write_atomically(path, lambda name: figure.savefig(name, dpi=120, format="png"))
    plt.close(figure)


def start(config: Config) -> torch.device:
    """The device; also joins the processes that torchrun started, and makes the folder."""
    device, out = pick_device(config.device), Path(config.out)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # arrays are shared on the CPU
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.type == "cuda" else device
    require(not out.exists() or out.is_dir(), f"--out {out}: must be a folder, but a file is there; give another")
    out.mkdir(parents=True, exist_ok=True)
    return device


JOBS = {"experiment": experiment, "sort": sort}


def build_parser() -> argparse.ArgumentParser:
    """The command line: a job and a flag for every field of `Config`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "sort a corpus; or sort it, train on both orders and compare"
    parser.add_argument("job", nargs="?", default="experiment", choices=JOBS, help=text)
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
