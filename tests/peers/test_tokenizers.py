"""Files of the `tokenizers` package: the ids that mamba.py and transformer.py make are its."""

import json
import random
import re
import unicodedata

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre

import mamba
import transformer

LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA.replace(r"\p{N}{1,3}", r"\p{N}")
TEXTS = [
    "",
    " ",
    "The quick brown fox doesn't jump; THEY'LL say it'S 12345 times, won't they?",
    "def f(x):\n    if x:\n\t\treturn x ** 2  # square\n\n\n    return {'a': [1, 2, 3]}\r\n",
    "Unicode: naïve e\u0301 A\u030a \u212b ﬁ ½ ² Ⅷ ١٢٣ \u00a0nbsp\u3000wide \u200b zero \ufeff",
    "emoji 🙂👩‍👩‍👧‍👦🇫🇷 end 🙂🙂🙂",
    "中文没有空格，可是有标点。日本語も、한국어도 ภาษาไทยไม่มี",
    "spaces:  two   three    four" + " " * 40 + "many \n \n  \n\t\t tabs  ",
    "before<|endoftext|>after <|endoftext|> <tool>call</tool> <|end_of_text|> <s>x</s>\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaa --------------------------- abababababababab",
    "null \x00 bell \x07 separators \x1c\x1d\x85\u2028 ſ long s 'ſ K kelvin",
]
TRAINING = [*TEXTS, *TEXTS, mamba.__doc__, "the quick brown fox the quick the lazy dog " * 20]
ENDS = {"llama3": "<|end_of_text|>", "llama2": "</s>", "mistral": "</s>"}


def build(kind, size=600):
    """A tiny tokenizer of one family, trained here."""
    tokenizer, pieces = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama3")), []
    if kind in ("llama3", "qwen"):
        pattern = Regex(LLAMA if kind == "llama3" else QWEN)
        pieces.append(pre.Split(pattern, "isolated"))
    if kind == "smollm":
        pieces.append(pre.Digits(individual_digits=True))
    pieces.append(pre.ByteLevel(False, use_regex=kind not in ("llama3", "qwen")))
    tokenizer.pre_tokenizer = pre.Sequence(pieces) if pieces[1:] else pieces[0]
    if kind in ("neox", "qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder, end = decoders.ByteLevel(), ENDS.get(kind, "<|endoftext|>")
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[end] if kind in ("gpt2", "neox") else [],
        initial_alphabet=[] if kind == "smollm" else pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for text in TRAINING if text.isascii()] if kind == "smollm" else TRAINING
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(end, normalized=False, special=True)])
    if kind == "neox":
        tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    if kind == "qwen":
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<tool>", "</tool>")])
    return tokenizer


def build_with_bytes(kind):
    """As Llama 2's and Mistral's: no byte-level letters, but a token for each byte."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if kind == "llama2":
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(spaces)
    else:
        tokenizer.pre_tokenizer = pre.Metaspace("▁", "first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    special = {"special_tokens": ["<unk>", "<s>", "</s>"], "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=300, limit_alphabet=40, **special)
    tokenizer.train_from_iterator(TRAINING, trainer)
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = begin
    data = json.loads(tokenizer.to_str())
    vocab = data["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    return tokenizers.Tokenizer.from_str(json.dumps(data))


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama3", "qwen", "smollm", "llama2", "mistral"])
def test_mamba_gives_their_ids(tmp_path, kind):
    peer = build_with_bytes(kind) if kind in ("llama2", "mistral") else build(kind)
    peer.add_tokens(["[PAD]"])
    used = tokenizers.Tokenizer.from_str(peer.to_str())
    used.enable_truncation(5)
    used.enable_padding(length=64)
    used.save(str(tmp_path / "tokenizer.json"))
    ours = mamba.load_tokenizer(str(tmp_path / "tokenizer.json"), [])
    again, end = (
        mamba.Tokenizer(**ours.arguments),
        peer.token_to_id(ENDS.get(kind, "<|endoftext|>")),
    )
    assert ours.vocab_size == peer.get_vocab_size() == peer.token_to_id("[PAD]") + 1
    assert ours.separator == again.separator == end
    found, form = 0, "NFC" if kind in ("neox", "qwen") else None
    for text in [*TEXTS, "a [PAD] b"]:
        for special in (True, False):
            peer.encode_special_tokens = not special
            ids = peer.encode(text).ids
            assert ours.encode(text, special) == again.encode(text, special) == ids, (special, text)
            back = ours.decode_bytes(ids, special).decode()
            assert back == peer.decode(ids, skip_special_tokens=not special)
            found += end in ids
            assert special or end not in ids
        lost = kind == "smollm" and not text.isascii()  # it has no id for those bytes
        lost |= kind == "mistral" and text[:1] == " "  # the file's own decoder drops it
        assert lost or back == (unicodedata.normalize(form, text) if form else text)
    assert found > 0 and ours.decode_bytes([ours.vocab_size + 9]) == b""  # a model's padding
    assert (ours.encode("x")[0] == 1) == (kind in ("llama2", "mistral"))  # <s>


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "\x00 no JSON", '{"model": {"type": "Other"}}']
)
def test_mamba_refuses_a_bad_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer"):
        mamba.load_tokenizer(str(tmp_path / "tokenizer.json"), [])


def test_an_added_token_beyond_the_models_rows(tmp_path, capsys):
    peer, text = build("gpt2", 300), tmp_path / "text.txt"
    assert peer.add_special_tokens(["[PAD]"]) and peer.token_to_id("[PAD]") == 300
    mamba.write_folder(mamba.Mamba(mamba.MambaConfig(16, 1, 300)), str(tmp_path))
    peer.save(str(tmp_path / "tokenizer.json"))
    words = ["--checkpoint", str(tmp_path), "--tokens", "5"]
    assert mamba.main(["sample", *words, "--prompt", "hello [PAD] you"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"(^|\n)mamba\.py: .*token 300 is beyond .*\n$", error), error
    assert mamba.main(["sample", *words, "--prompt", "hello you"]) == 0
    text.write_text("Hello world, this is a text.\n" * 60)
    assert mamba.main(["eval", *words, "--data", str(text)]) == 0
    assert "bits_a_byte" in capsys.readouterr().out


# ----- transformer.py's own reader: the same ids, or a refusal


def both(tmp_path, data):
    """The peer's and our tokenizer, from one file."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data), "utf-8")
    return tokenizers.Tokenizer.from_file(str(path)), transformer.load_tokenizer(str(path), [])


def compare(peer, ours):
    for special in (True, False):
        peer.encode_special_tokens = not special
        for text in TEXTS:
            want = peer.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, special=special).tolist() == want, (special, text)
            assert ours.decode(want) == peer.decode(want, skip_special_tokens=False)
            assert ours.nfc or ours.decode(want) == text


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama3", "qwen"])
@pytest.mark.parametrize("merges_as_strings", [False, True])
def test_same_ids_and_round_trip(tmp_path, kind, merges_as_strings):
    data = json.loads(build(kind).to_str())
    if merges_as_strings:
        data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    peer, ours = both(tmp_path, data)
    compare(peer, ours)
    compare(peer, transformer.Tokenizer.from_json(ours.to_json()))
    assert ours.vocab_size == peer.get_vocab_size()
    assert ours.separator == peer.token_to_id(ENDS.get(kind, "<|endoftext|>"))


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_unreachable_words_and_tokens_that_several_pairs_make(tmp_path, ignore_merges):
    data = json.loads(build("gpt2").to_str())
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    tokens = {token for token in vocab if token != "<|endoftext|>"}
    pairs = [[t[:i], t[i:]] for t in tokens for i in range(1, len(t))]  # as in Llama 3
    extra = [pair for pair in pairs if tokens.issuperset(pair) and pair not in merges]
    assert len(extra) > 20
    data["model"]["merges"] = sorted([*merges, *extra], key=lambda pair: vocab["".join(pair)])
    data["model"]["ignore_merges"] = ignore_merges
    compare(*both(tmp_path, data))
    vocab |= {"QJXQJX": 9000, "ĠzqXjZq": 9001, "ĠJqZ": 9002}  # no merge makes these
    text = "QJXQJX zqXjZq JqZ QJXQJXTHEY"
    assert refused_or_equal(tmp_path, data, [*TEXTS, text]) is ignore_merges
    if ignore_merges:
        _, ours = both(tmp_path, data)
        ids = ours.encode(text).tolist()
        assert {9000, 9001, 9002} <= set(ids) and ours.decode(ids) == text


def plain(merges=(), words=(), added=(), pattern=None, nfc=False, ignore_merges=False):
    """A tokenizer.json of the 256 bytes, these merges, words, added tokens and split pattern."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre.ByteLevel.alphabet()))}
    for token in [*("".join(pair) for pair in merges), *words]:
        vocab.setdefault(token, len(vocab))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    data = json.loads(tokenizer.to_str())
    data["model"]["merges"] = [list(pair) for pair in merges]
    data["normalizer"] = {"type": "NFC"} if nfc else None
    usual = dict.fromkeys(("special", "normalized", "lstrip", "rstrip", "single_word"), False)
    added = [{"id": len(vocab) + k} | usual | token for k, token in enumerate(added)]
    return data | {"added_tokens": added} | ({"pre_tokenizer": split(pattern)} if pattern else {})


def split(*patterns, behavior="Isolated"):
    """A pre-tokenizer that splits by these patterns, then maps bytes to letters."""
    usual = {"type": "Split", "behavior": behavior, "invert": False}
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    splits = [usual | {"pattern": pattern} for pattern in patterns]
    return {"type": "Sequence", "pretokenizers": [*splits, last | {"use_regex": False}]}


def refused_or_equal(tmp_path, data, texts):
    """Whether ours takes the file; if so, its ids, and what each id stands for, are the peer's."""
    try:
        peer, ours = both(tmp_path, data)
    except transformer.UserError:
        return False
    for special in (True, False):
        peer.encode_special_tokens = not special
        for text in texts:
            ids = ours.encode(text, special=special).tolist()
            assert ids == peer.encode(text).ids, (special, text)
    for i in peer.get_vocab().values():
        assert ours.decode([i]) == peer.decode([i], skip_special_tokens=False), i
    return True


ab, spaces = ("a", "b"), {"content": "  ", "normalized": True}
whole = {"words": ["abcd"], "ignore_merges": True}
tricky = [("b", "b"), ("bb", "c"), ("b", "bbc"), ("bb", "b")]
HARMLESS = {
    "spaces and NFC": ({"added": [spaces], "nfc": True}, "a  \u0301\u0327b e  e\u0301"),
    "an added merge": ({"merges": [ab], "added": [{"content": "ab", "id": 256}]}, "ab cab"),
    "longest added token": ({"added": [{"content": "<a"}, {"content": "<a>"}]}, "<a><a<a>"),
    "the same merge twice": ({"merges": [ab, ab, ("ab", "c")]}, "abc ab"),
    "split of all": ({"merges": [ab], "pattern": {"Regex": r"\p{L}+|\P{L}+"}}, "ab 12 cd"),
    "whole word by ignore_merges": ({"merges": [("b", "c")]} | whole, "abcd xabcd"),
    "pair by ignore_merges": ({"merges": [("b", "c")], "ignore_merges": True}, "abc"),
}
wide = {"content": "\u2002", "normalized": True}
HOSTILE = {
    "unreachable merge": ({"merges": [("b", "c"), ab, ("c", "d"), ("ab", "cd")]}, "abcd xabcd"),
    "unreachable word": ({"words": ["THEY"]}, "THEY"),
    "word that tiktoken merges": ({"words": ["bc"], "ignore_merges": True}, "abc"),
    "reachable by tiktoken": ({"merges": tricky, "ignore_merges": True}, "accbbbcaabab"),
    "split of some": ({"pattern": {"Regex": r"\p{L}+"}}, "ab 12 cd"),
    "split at a string": ({"merges": [ab], "pattern": {"String": " "}}, "ab 12 cd"),
    "line's end": ({"merges": [("Ġ", "Ġ")], "pattern": {"Regex": r" +$|\s|\S"}}, "a  \nb  "),
    "line's start": ({"merges": [("a", "a")], "pattern": {"Regex": r"^aa|\s|\S"}}, "aa\naa"),
    "empty added token": ({"added": [{"content": ""}]}, "xa b"),
    "added space that NFC makes": ({"added": [wide], "nfc": True}, "a\u2000b"),
}


@pytest.mark.parametrize("case", [*HARMLESS, *HOSTILE])
def test_files_are_refused_or_equal(tmp_path, case):
    arguments, text = (HARMLESS | HOSTILE)[case]
    assert refused_or_equal(tmp_path, plain(**arguments), [text]) or case in HOSTILE


@pytest.mark.xfail(raises=AssertionError, reason="known: `tokenizers` looks in another order")
@pytest.mark.parametrize(
    ("added", "text"),
    [
        ([{"content": "a b"}, {"content": "xa", "normalized": True}], "xa b"),
        ([{"content": "<  >", "special": True}, {"content": "  "}], "a<  >b"),
    ],
)
def test_overlapping_added_tokens(tmp_path, added, text):
    refused_or_equal(tmp_path, plain(added=added), [text])


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_random_merge_tables_are_refused_or_equal(tmp_path, ignore_merges):
    """Merges that no training gives, in any order, with words that none of them makes."""
    rng, taken = random.Random(0), 0
    for n in range(400):
        tokens, merges = list("abc"), []
        for _ in range(rng.choice([2, 3, 4, 6, 10])):
            merges.append((rng.choice(tokens), rng.choice(tokens)))
            tokens.append("".join(merges[-1]))
        if n % 2:
            merges.sort(key=lambda pair: tokens.index("".join(pair)))
        words = rng.choice([0, 0, 1, 2])
        words = ["".join(rng.choices("abc", k=rng.randrange(2, 6))) for _ in range(words)]
        data = plain(dict.fromkeys(merges), words, ignore_merges=ignore_merges)
        texts = ["".join(rng.choices("abc", k=rng.randrange(30))) for _ in range(20)]
        taken += refused_or_equal(tmp_path, data, [*tokens, *words, *texts])
    assert 50 < taken < 350


def reverse_ids(data):
    vocab = data["model"]["vocab"]
    vocab |= dict(zip(vocab, sorted(vocab.values(), reverse=True), strict=True))


def leave_a_pair_out(data):
    data["model"]["vocab"] |= {"bc": 9000, "ab": 9001, "abc": 9002}
    data["model"]["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"]]


def give_one_id_twice(data):
    data |= plain([ab])
    data["model"]["vocab"]["ab"] = 5


def normalise_an_added_token(data):
    data["normalizer"] = {"type": "NFC"}
    data["added_tokens"][0]["normalized"] = True


unigram = {"type": "Unigram", "vocab": [["a", 0.0]]}
REFUSED = {  # what the line must name, and what is done to a good file
    "dropout": lambda d: d["model"].update(dropout=0.1),
    "byte_fallback": lambda d: d["model"].update(byte_fallback=True),
    "end_of_word_suffix": lambda d: d["model"].update(end_of_word_suffix="</w>"),
    "Lowercase": lambda d: d.update(normalizer={"type": "Lowercase"}),
    "Unigram": lambda d: d.update(model=unigram),
    "WordPiece": lambda d: d.update(model={"type": "WordPiece", "vocab": {}}),
    "Metaspace": lambda d: d.update(pre_tokenizer={"type": "Metaspace", "replacement": "_"}),
    "pre_tokenizer {}": lambda d: d.update(pre_tokenizer=None),
    "add_prefix_space": lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
    "lstrip": lambda d: d["added_tokens"][0].update(lstrip=True),
    "rstrip": lambda d: d["added_tokens"][0].update(rstrip=True),
    "single_word": lambda d: d["added_tokens"][0].update(single_word=True),
    "normalized": normalise_an_added_token,
    "Removed": lambda d: d.update(pre_tokenizer=split({"Regex": LLAMA}, behavior="Removed")),
    "2 split patterns": lambda d: d.update(pre_tokenizer=split({"Regex": LLAMA}, {"String": " "})),
    "0 split patterns": lambda d: d.update(pre_tokenizer=split()),
    "otherwise": reverse_ids,
    "would take otherwise": lambda d: random.Random(0).shuffle(d["model"]["merges"]),
    "tiktoken would take": lambda d: d["model"]["merges"].insert(0, d["model"]["merges"].pop(1)),
    "tiktoken would take otherwise": leave_a_pair_out,
    "tiktoken refuses it": give_one_id_twice,
    "b'a'": lambda d: d["model"]["vocab"].pop("a"),
    "b'QQ'": lambda d: d["model"]["merges"].append(["Q", "Q"]),
    "too many values": lambda d: d["model"]["merges"].append("Q Q Q"),
    "'vocab'": lambda d: d["model"].pop("vocab"),
    "'pre_tokenizer'": lambda d: d.pop("pre_tokenizer"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses_what_it_cannot_do_exactly(tmp_path, what):
    data = json.loads(build("gpt2").to_str())
    REFUSED[what](data)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data), "utf-8")
    with pytest.raises(transformer.UserError, match=f"(?=.*{re.escape(what)}).*tokenizer.json"):
        transformer.load_tokenizer(str(path), [])
