"""The tokenizer.json reader of mamba.py against the `tokenizers` package: equal ids on mixed text."""

import json

import pytest

import mamba

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = LLAMA.replace(r"\p{N}{1,3}", r"\p{N}")
TEXTS = [
    "",
    " ",
    "The quick brown fox doesn't jump; THEY'LL say it'S 12345 times, won't they?",
    "def f(x):\n    if x:\n\t\treturn x ** 2  # square\n\n\n    return {'a': [1, 2, 3]}\r\n",
    "Unicode: naïve café e\u0301 A\u030a \u212b ﬁ ½ ² Ⅷ ١٢٣ \u00a0nbsp\u3000wide \u200b zero \ufeff",
    "emoji 🙂👩‍👩‍👧‍👦🇫🇷 end 🙂🙂🙂",
    "中文没有空格，可是有标点。日本語も、한국어도 ภาษาไทยไม่มีช่องว่าง",
    "spaces:  two   three    four" + " " * 40 + "many \n \n  \n\t\t tabs  ",
    "before<|endoftext|>after <|endoftext|> <tool>call</tool> <|end_of_text|>\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaa --------------------------- abababababababab",
    "null \x00 bell \x07 separators \x1c\x1d\x85\u2028 ſ long s 'ſ K kelvin",
]
TRAINING = [*TEXTS, *TEXTS, mamba.__doc__ or "", "the quick brown fox the quick the lazy dog " * 20]


def build(kind: str):
    """A tiny tokenizer of one family, trained here."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    isolated = {"llama3": LLAMA, "qwen": QWEN}.get(kind)
    if isolated:
        split = pre_tokenizers.Split(Regex(isolated), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind in ("neox", "qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|end_of_text|>" if kind == "llama3" else "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[end] if kind in ("gpt2", "neox") else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.add_special_tokens([AddedToken(end, normalized=False, special=True)])
    if kind == "neox":
        tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    if kind == "qwen":
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in ("<tool>", "</tool>")])
    return tokenizer


def both(tmp_path, data: dict | str):
    """The peer's and our tokenizer, from one file."""
    path = tmp_path / "tokenizer.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), "utf-8")
    return tokenizers.Tokenizer.from_file(str(path)), mamba.load_tokenizer(str(path), [])


def compare(peer, ours):
    for special in (True, False):
        peer.encode_special_tokens = not special
        for text in TEXTS:
            want = peer.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, special=special).tolist() == want, (special, text)
            assert ours.decode(want) == peer.decode(want, skip_special_tokens=False)
            if not ours.nfc:
                assert ours.decode(want) == text


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama3", "qwen"])
@pytest.mark.parametrize("merges_as_strings", [False, True])
def test_same_ids_and_round_trip(tmp_path, kind, merges_as_strings):
    data = json.loads(build(kind).to_str())
    if merges_as_strings:
        data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    peer, ours = both(tmp_path, data)
    compare(peer, ours)
    compare(peer, mamba.Tokenizer.from_json(ours.to_json()))
    assert ours.vocab_size == peer.get_vocab_size()
    assert ours.separator == peer.token_to_id("<|end_of_text|>" if kind == "llama3" else "<|endoftext|>")


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_ids_out_of_merge_order_unreachable_words_and_shared_tokens(tmp_path, ignore_merges):
    data = json.loads(build("gpt2").to_str())
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    tokens = [token for token in vocab if token != "<|endoftext|>"]
    shuffled = dict(zip(tokens, [vocab[token] for token in reversed(tokens)], strict=True))
    data["model"]["vocab"] = vocab = {"<|endoftext|>": vocab["<|endoftext|>"], **shuffled}
    for word in ("THEY", "Ġspaces", "Ġwon't"):  # no merge makes these
        vocab.setdefault(word, len(vocab))
    made = set(vocab)
    extra = [[t[:i], t[i:]] for t in tokens for i in range(1, len(t)) if {t[:i], t[i:]} <= made]
    merges += [pair for pair in extra if pair not in merges][:200]  # a token that several pairs make, as in Llama 3
    data["model"]["ignore_merges"] = ignore_merges
    compare(*both(tmp_path, data))


def test_random_merge_tables(tmp_path):
    """Merges in an order that no training gives: lowest rank first, then leftmost, with new pairs joining in."""
    import random

    rng = random.Random(0)
    base = json.loads(build("gpt2").to_str())
    for _ in range(20):
        alphabet = {t: i for i, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        vocab, merges = dict(alphabet), []
        for _ in range(40):
            pair = [rng.choice([*"abc", *list(vocab)[256:]]) for _ in range(2)]
            vocab.setdefault("".join(pair), len(vocab))
            merges.append(pair)
        merges = [list(pair) for pair in dict.fromkeys(map(tuple, rng.sample(merges, len(merges))))]
        base["model"] |= {"vocab": vocab, "merges": merges}
        base["added_tokens"] = []
        peer, ours = both(tmp_path, base)
        for _ in range(30):
            text = "".join(rng.choices("abc", k=rng.randrange(40)))
            assert ours.encode(text).tolist() == peer.encode(text).ids


REFUSED = {
    "dropout": lambda d: d["model"].update(dropout=0.1),
    "byte_fallback": lambda d: d["model"].update(byte_fallback=True),
    "end_of_word_suffix": lambda d: d["model"].update(end_of_word_suffix="</w>"),
    "Lowercase": lambda d: d.update(normalizer={"type": "Lowercase"}),
    "Unigram": lambda d: d.update(model={"type": "Unigram", "vocab": [["a", 0.0]]}),
    "WordPiece": lambda d: d.update(model={"type": "WordPiece", "vocab": {}}),
    "Metaspace": lambda d: d.update(pre_tokenizer={"type": "Metaspace", "replacement": "_"}),
    "pre_tokenizer {}": lambda d: d.update(pre_tokenizer=None),
    "add_prefix_space": lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
    "lstrip": lambda d: d["added_tokens"][0].update(lstrip=True),
    "vocabulary without": lambda d: d["model"]["vocab"].pop("a"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses_what_it_cannot_do_exactly(tmp_path, what):
    data = json.loads(build("gpt2").to_str())
    REFUSED[what](data)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    with pytest.raises(mamba.UserError) as error:
        mamba.load_tokenizer(str(path), [])
    message = str(error.value)
    assert what in message and str(path) in message and "give a byte-level BPE" in message and "\n" not in message
