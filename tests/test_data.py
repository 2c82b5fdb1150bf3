"""The data section of mamba.py: documents, tokenizers, corpora, n-gram baselines."""

import base64
import collections
import itertools
import json
import math
import random

import numpy as np
import pytest

import mamba

MIXED = (
    "Hello, world! It's 12345 o'clock.\n\n\tdef f(x): return x  # naïve café e\u0301\r\n"
    "中文 日本語 한국어 🙂👩‍👩‍👧 \u00a0 \x00\x1c <|endoftext|> </s>   trailing   "
)
PROSE = "the cat sat on the mat and the dog sat on the log; that is that.\n" * 8 + MIXED * 3


def write_tiktoken(path, tokens):
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return str(path)


def tokens_of(tokenizer):
    return [t.encode("latin-1") for t, _ in sorted(tokenizer.vocab.items(), key=lambda item: item[1])]


@pytest.fixture(params=["byte", "bpe:300", "tiktoken", "named"])
def tokenizer(request, tmp_path, monkeypatch):
    if request.param in ("byte", "bpe:300"):
        return mamba.load_tokenizer(request.param, [PROSE])
    learnt = tokens_of(mamba.load_tokenizer("bpe:300", [PROSE]))
    if request.param == "tiktoken":
        return mamba.load_tokenizer(write_tiktoken(tmp_path / "x.tiktoken", learnt), [])
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: i for i, token in enumerate(learnt)}
    encoding = tiktoken.Encoding("gpt2", pat_str=mamba.GPT2, mergeable_ranks=ranks, special_tokens={mamba.END: 305})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return mamba.load_tokenizer("gpt2", [])


def test_python_documents_are_prose_and_the_same_each_time():
    documents = mamba.python_documents()
    text = "\n".join(documents)
    assert documents == mamba.python_documents()
    assert len(documents) > 200 and len(text) > 1_000_000 and min(map(len, documents)) >= 200
    module = next(d for d in documents if d.startswith("textwrap\n"))
    assert "textwrap.TextWrapper.wrap\nwrap(text : string) -> [string]" in module
    assert "assignment" in documents[0].lower() or "assert" in documents[0].lower()


def test_read_documents(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("zwei 🙂", "utf-8")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n\n{"text": "", "x": 1}\n{"text": "four\\n"}\n')
    (tmp_path / "d.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no")
    assert mamba.read_documents(str(tmp_path)) == ["one", "zwei 🙂", "three", "four\n"]
    assert mamba.read_documents(str(tmp_path / "a.txt")) == ["one"]
    assert mamba.read_documents(str(tmp_path / "c.jsonl")) == ["three", "four\n"]


def test_round_trips(tokenizer):
    ids = tokenizer.encode(MIXED)
    assert ids.dtype == np.uint16 and ids.ndim == 1 and int(ids.max()) < tokenizer.vocab_size
    assert tokenizer.decode(ids) == MIXED and tokenizer.decode_bytes(ids) == MIXED.encode()
    assert tokenizer.separator not in ids and tokenizer.separator == tokenizer.vocab_size - 1
    parsed = tokenizer.encode(MIXED, special=True)
    assert (parsed == tokenizer.separator).sum() == 1 and tokenizer.decode(parsed) == MIXED
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,) and lengths.dtype == np.int64
    assert lengths[ids].sum() == len(MIXED.encode()) and lengths[tokenizer.separator] == 1
    assert tokenizer.encode("").shape == (0,) and tokenizer.decode([]) == ""
    assert tokenizer.decode(tokenizer.encode("\ud800 lone surrogate")) == "? lone surrogate"
    assert tokenizer.decode_bytes([tokenizer.vocab_size + 3]) == b""  # padding of the vocabulary


def test_json_carries_the_whole_tokenizer(tokenizer):
    again = mamba.Tokenizer.from_json(json.loads(json.dumps(tokenizer.to_json())))
    for special in (False, True):
        assert np.array_equal(again.encode(PROSE, special), tokenizer.encode(PROSE, special))
    assert (again.name, again.vocab_size, again.separator) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.separator,
    )
    assert np.array_equal(again.byte_lengths(), tokenizer.byte_lengths())


def test_bytes_are_ids():
    tokenizer = mamba.load_tokenizer("byte", [])
    assert tokenizer.encode(MIXED).tolist() == list(MIXED.encode())
    assert (tokenizer.vocab_size, tokenizer.separator) == (257, 256)
    lengths = tokenizer.byte_lengths()
    assert lengths.tolist() == [1] * 257


def naive_bpe(documents, size):
    """Merges by recounting every pair of every word each time."""
    import regex

    words = [[bytes([b]) for b in w.encode()] for d in documents for w in regex.findall(mamba.CL100K, d)]
    tokens, merges = [bytes([b]) for b in range(256)], []
    while len(tokens) < size - 1:
        count = collections.Counter((a, b) for word in words for a, b in itertools.pairwise(word))
        best = min(count, key=lambda pair: (-count[pair], pair))
        merges.append(best)
        if best[0] + best[1] not in tokens:
            tokens.append(best[0] + best[1])
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
                i += 1
    return tokens, merges, [token for word in words for token in word]


@pytest.mark.parametrize(
    ("documents", "size"),
    [([PROSE], 340), (["aaaaaaa aaaa aaaaaaaaaa ababababa", MIXED], 290), (["xyxyxyx yxyxyyx xxyyxxyy"] * 3, 264)],
)
def test_bpe_equals_the_naive_loop(documents, size):
    tokens, merges, pieces = naive_bpe(documents, size)
    tokenizer = mamba.load_tokenizer(f"bpe:{size}", documents)
    assert tokenizer.vocab_size == size and tokenizer.separator == size - 1
    assert [tuple(t.encode("latin-1") for t in pair) for pair in tokenizer.merges] == merges
    assert tokens_of(tokenizer) == tokens
    ids = np.concatenate([tokenizer.encode(text) for text in documents])
    assert [tokenizer.bytes_of[i] for i in ids.tolist()] == pieces  # training and encoding cut alike
    assert mamba.load_tokenizer(f"bpe:{size}", documents).to_json() == tokenizer.to_json()


def test_ids_equal_tiktokens():
    tiktoken = pytest.importorskip("tiktoken")
    rng = random.Random(0)
    learnt = tokens_of(mamba.load_tokenizer("bpe:350", [PROSE]))
    learnt += [b"mat and", b" dogs", b"ogs", b"the the"]  # words that merges reach otherwise or never
    ranks = {token: i for i, token in enumerate(learnt)}
    encoding = tiktoken.Encoding("x", pat_str=mamba.CL100K, mergeable_ranks=ranks, special_tokens={mamba.END: 500})
    vocab = {token.decode("latin-1"): i for token, i in ranks.items()}
    ours = mamba.Tokenizer("x", vocab, None, [mamba.CL100K], [(mamba.END, 500, True)], whole_words=True)
    texts = [PROSE, " dogs ogs", "a" * 500, *("".join(rng.choices(PROSE, k=200)) for _ in range(50))]
    for text in texts:
        assert ours.encode(text).tolist() == encoding.encode(text, disallowed_special=())
        assert ours.encode(text, special=True).tolist() == encoding.encode(text, allowed_special="all")


def test_every_twentieth_document_is_for_validation(tmp_path):
    rows = [f"document {i}" for i in range(1, 46)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    corpus = mamba.load_corpus(str(path), "byte")
    assert corpus.tokenizer.decode(corpus.valid) == "document 20<|endoftext|>document 40<|endoftext|>"
    kept = [row for i, row in enumerate(rows, 1) if i % 20]
    assert corpus.tokenizer.decode(corpus.train) == "".join(row + mamba.END for row in kept)
    assert (corpus.vocab_size, corpus.separator, corpus.train.dtype) == (257, 256, np.uint16)


@pytest.mark.parametrize(
    ("lengths", "train", "valid"),
    [
        ([1000], [950], [50]),
        ([500, 500], [500, 450], [50]),  # no boundary is near
        ([600, 330, 70], [600, 330], [70]),  # 93 % is near 95 %
        ([930, 25, 45], [930, 25], [45]),
        ([990, 10], [950], [40, 10]),
    ],
)
def test_few_documents_are_cut_near_95_percent(tmp_path, lengths, train, valid):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in lengths))
    corpus = mamba.load_corpus(str(path), "byte")
    pieces = [[len(p) for p in corpus.tokenizer.decode(x).split(mamba.END)[:-1]] for x in (corpus.train, corpus.valid)]
    assert pieces == [train, valid]


def test_a_tokenizer_is_never_learnt_from_validation(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = ["zqzqzqzq " * 99 if i % 20 == 0 else "the cat sat on the mat" for i in range(1, 41)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    corpus = mamba.load_corpus(str(path), "bpe:262")
    assert not any("q" in token for token in corpus.tokenizer.vocab if len(token) > 1)
    given = mamba.load_tokenizer("byte", [])
    assert mamba.load_corpus(str(path), "bpe:262", given).tokenizer is given


def write_bin(folder, ids=None, raw=None, **meta):
    path = folder / "x.bin"
    dtype = meta.get("dtype", "uint16")
    path.write_bytes(np.array(ids, dtype).tobytes() if raw is None else raw)
    meta = {"dtype": dtype, "vocab_size": 257, "tokenizer": "byte", "document_separator": 256} | meta
    (folder / "x.json").write_text(json.dumps(meta))
    return str(path)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_bin_is_mapped_not_read(tmp_path, dtype):
    ids = np.arange(4000) % 200
    ids[3850] = 256
    corpus = mamba.load_corpus(write_bin(tmp_path, ids, dtype=dtype), "ignored")
    assert isinstance(corpus.train, np.memmap) and isinstance(corpus.valid, np.memmap)
    assert corpus.train.dtype == dtype and len(corpus.train) == 3851 and corpus.train[-1] == 256
    assert np.array_equal(np.concatenate([corpus.train, corpus.valid]), ids)
    assert corpus.tokenizer.name == "byte" and corpus.separator == 256 and corpus.source.endswith("x.bin")


def test_a_bin_without_tokenizer_or_separator_or_with_one_beside_it(tmp_path):
    path = write_bin(tmp_path, range(100), tokenizer=None, document_separator=None)
    corpus = mamba.load_corpus(path, "byte")
    assert corpus.tokenizer is None and len(corpus.train) == 95 and mamba.ngram_baselines(corpus) == {}
    write_tiktoken(tmp_path / "own.tiktoken", [bytes([b]) for b in range(256)])
    path = write_bin(tmp_path, range(100), tokenizer="own.tiktoken")
    assert mamba.load_corpus(path, "byte").tokenizer.decode([104, 105]) == "hi"


BAD_TEXT = {
    "missing": (None, None, "no such file", "give a text file"),
    "empty": ("x.txt", b" \n", "holds no text", "not empty"),
    "latin-1": ("x.txt", b"caf\xe9", "byte 3", "convert it"),
    "broken JSON": ("x.jsonl", b'{"text": "a"}\n{"text": ', "line 2", "correct it"),
    "no text field": ("x.jsonl", b'{"body": "a"}', "line 1", "correct it"),
    "text not a string": ("x.jsonl", b'{"text": "a"}\n\n{"text": 3}', "line 3", "correct it"),
    "not an object": ("x.jsonl", b"[1]", "line 1", "correct it"),
    "nothing readable": ("folder/x.png", b"\xff\xfe", "holds no text", "UTF-8"),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_text(tmp_path, case):
    name, content, rule, fix = BAD_TEXT[case]
    path = tmp_path / (name or "missing.txt")
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    path = path.parent if case == "nothing readable" else path
    one_line(lambda: mamba.load_corpus(str(path), "byte"), str(path), rule, fix)


def one_line(call, *parts):
    with pytest.raises(mamba.UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


BAD_NAMES = {
    "bpe:256": (">= 257", "try bpe:1024"),
    "bpe:many": (">= 257", "try bpe:1024"),
    "bpe:-300": (">= 257", "try bpe:1024"),
    "bpe:5000": ("yields only", "lower N"),
    "bytes": ("unknown", "choose from byte, bpe:N"),
    "nowhere.json": ("no such file", "correct the path"),
    "nowhere.tiktoken": ("no such file", "correct the path"),
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_tokenizer_names(name):
    if name == "bytes":
        pytest.importorskip("tiktoken")
    one_line(lambda: mamba.load_tokenizer(name, ["short text"]), repr(name), *BAD_NAMES[name])


def test_bad_tokenizer_files(tmp_path, monkeypatch):
    path = tmp_path / "x.tiktoken"
    for content, rule in ((b"!!! 3\n", "base64"), (b"YQ== x\n", "base64"), (b"YQ==\n", "base64"), (b"YQ== 0\n", "256")):
        path.write_bytes(content)
        one_line(lambda: mamba.load_tokenizer(str(path), []), str(path), rule)
    path = tmp_path / "tokenizer.json"
    for content in ("{", "[]", '{"model": {}}', '{"a": 1}'):
        path.write_text(content)
        one_line(lambda: mamba.load_tokenizer(str(path), []), str(path), "must be a Hugging Face", "give another")
    one_line(lambda: mamba.splitter("(unclosed"), "(unclosed", "regular expression", "correct it")


def test_no_network_and_no_package(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")

    def fail(name):
        raise ConnectionError("offline")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    one_line(lambda: mamba.load_tokenizer("gpt2", []), "'gpt2'", "network", "local file")
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    one_line(lambda: mamba.load_tokenizer("gpt2", []), "'gpt2'", "pip install tiktoken")
    monkeypatch.setitem(__import__("sys").modules, "regex", None)
    mamba.splitter.cache_clear()
    one_line(lambda: mamba.load_tokenizer("bpe:300", [PROSE]), "regex", "pip install regex")
    assert mamba.load_tokenizer("byte", []).encode("ok").tolist() == [111, 107]  # bytes need no package


BAD_BINS = {
    "dtype": (dict(ids=[1, 2], dtype="int16"), "'int16'", "uint16 or uint32"),
    "odd": (dict(raw=b"\0" * 5), "5 bytes", "multiple of 2"),
    "odd for uint32": (dict(raw=b"\0" * 6, dtype="uint32"), "6 bytes", "multiple of 4"),
    "empty": (dict(raw=b""), "empty", "write token ids"),
    "id in train": (dict(ids=[300] + [1] * 99), "token id 300", "below vocab_size 257"),
    "id in valid": (dict(ids=[1] * 99 + [257]), "token id 257", "below vocab_size 257"),
    "vocab_size": (dict(ids=[1], vocab_size="257"), "'257'", "integer"),
    "smaller than its tokenizer": (dict(ids=[1], vocab_size=256), "vocab_size 256", "at least 257"),
    "bpe": (dict(ids=[1], tokenizer="bpe:300"), "'bpe:300'", "trained tokenizer's file"),
}


@pytest.mark.parametrize("case", BAD_BINS)
def test_bad_bins(tmp_path, case):
    arguments, *parts = BAD_BINS[case]
    path = write_bin(tmp_path, **arguments)
    one_line(lambda: mamba.load_corpus(path, "byte"), *parts)


def test_bad_bin_descriptions(tmp_path):
    one_line(lambda: mamba.load_corpus(str(tmp_path / "x.bin"), "byte"), "x.bin", "no such file")
    path = write_bin(tmp_path, [1, 2])
    for content in ("{", "[]", '{"dtype": "uint16"}'):
        (tmp_path / "x.json").write_text(content)
        one_line(lambda: mamba.load_corpus(path, "byte"), "x.json", "vocab_size", "correct it")
    (tmp_path / "x.json").unlink()
    one_line(lambda: mamba.load_corpus(path, "byte"), "x.bin", "needs x.json", "write one")


def test_one_letter_is_a_corpus_too_short_to_train_on(tmp_path):
    (tmp_path / "x.txt").write_text("a")
    corpus = mamba.load_corpus(str(tmp_path / "x.txt"), "byte")
    assert (corpus.train.tolist(), corpus.valid.tolist()) == ([], [97, 256])
    one_line(lambda: mamba.check_length(corpus.train, 8, "training"), "training", "0 tokens", "needs 9", "more text")


def test_check_length():
    mamba.check_length(np.zeros(9), 8, "validation")
    one_line(lambda: mamba.check_length(np.zeros(8), 8, "validation"), "validation", "8 tokens", "needs 9", "more text")


def slow_probability(train, history, byte, order):
    """Witten-Bell by the book: dictionaries and recursion."""
    if order == 0:
        return 1 / 256
    context = history[len(history) - order + 1 :] if order > 1 else b""
    lower = slow_probability(train, history, byte, order - 1)
    if len(context) < order - 1:
        return lower
    follow = collections.Counter(
        train[i + order - 1] for i in range(len(train) - order + 1) if train[i : i + order - 1] == context
    )
    total, kinds = sum(follow.values()), len(follow)
    return (follow[byte] + kinds * lower) / (total + kinds) if total else lower


@pytest.mark.parametrize("order", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(3))
def test_ngram_bits_equal_the_slow_model(order, seed):
    rng = random.Random(seed)
    letters = b"ab\x00\xff"[: 2 + seed]
    train = bytes(rng.choices(letters, k=120))
    valid = bytes(rng.choices(letters + b"z", k=40))
    want = [-math.log2(slow_probability(train, valid[:i], valid[i], order)) for i in range(len(valid))]
    assert mamba.ngram_bits(train, valid, order) == pytest.approx(sum(want) / len(want), rel=1e-12)


@pytest.mark.parametrize("history", [b"", b"a", b"abra", b"never seen"])
def test_ngram_probabilities_of_the_next_byte_sum_to_one(history):
    train = b"abracadabra, abracadabra" * 3
    before = len(history) * mamba.ngram_bits(train, history, 5) if history else 0.0
    after = [(len(history) + 1) * mamba.ngram_bits(train, history + bytes([b]), 5) for b in range(256)]
    assert sum(2 ** (before - bits) for bits in after) == pytest.approx(1, abs=1e-9)


def test_ngram_baselines_count_a_separator_as_one_byte():
    documents = ["the cat sat on the mat. " * 5, "a dog. " * 9]
    results = []
    for name in ("byte", "bpe:262"):
        tokenizer = mamba.load_tokenizer(name, documents)
        ids = np.concatenate([np.append(tokenizer.encode(d), tokenizer.separator) for d in documents])
        corpus = mamba.Corpus(ids, ids, tokenizer, tokenizer.vocab_size, tokenizer.separator, "test")
        results.append(mamba.ngram_baselines(corpus))
    text = "\0".join([*documents, ""]).encode()
    assert (
        results[0]
        == results[1]
        == {
            "byte unigram": mamba.ngram_bits(text, text, 1),
            "byte trigram": mamba.ngram_bits(text, text, 3),
            "byte 5-gram": mamba.ngram_bits(text, text, 5),
        }
    )
