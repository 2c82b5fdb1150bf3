"""Files of the `tokenizers` package: the same ids as mamba.py, and so transformer.py, makes."""

import json

import pytest
import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre

import mamba
import transformer

TEXTS = [
    "The quick brown fox doesn't jump; THEY'LL say it'S 12345 times, won't they?",
    "def f(x):\n    if x:\n\t\treturn x ** 2  # square\n\n\n    return {'a': [1, 2, 3]}\r\n",
    "Unicode: naïve e\u0301 A\u030a \u212b ﬁ ½ ² Ⅷ ١٢٣ \u00a0nbsp\u3000wide \u200b zero \ufeff",
    "emoji 🙂👩‍👩‍👧‍👦🇫🇷 end 🙂🙂🙂",
    "中文没有空格，可是有标点。日本語も、한국어도 ภาษาไทยไม่มี",
    "spaces:  two   three    four" + " " * 40 + "many \n \n  \n\t\t tabs  ",
    "before<|endoftext|>after <|endoftext|> <tool>call</tool> <|end_of_text|> <s>x</s>\n",
]
TRAINING = [*TEXTS, *TEXTS, mamba.__doc__, "the quick brown fox the quick the lazy dog " * 20]
ENDS = {"llama3": "<|end_of_text|>", "llama2": "</s>"}


def build(kind, size=600):
    """A tiny tokenizer of one family, trained here."""
    if kind == "llama2":
        return build_llama2()
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    first = {"llama3": [pre.Split(Regex(mamba.CL100K), "isolated")]}
    first["smollm"] = [pre.Digits(individual_digits=True)]
    pieces = [*first.get(kind, []), pre.ByteLevel(False, use_regex=kind != "llama3")]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre.Sequence(pieces), decoders.ByteLevel()
    texts, alphabet = TRAINING, pre.ByteLevel.alphabet()
    if kind == "smollm":  # some bytes have no id
        texts, alphabet = [text for text in TRAINING if text.isascii()], []
    options = {"vocab_size": size, "show_progress": False, "initial_alphabet": alphabet}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**options))
    tokenizer.add_special_tokens([ENDS.get(kind, "<|endoftext|>")])
    return tokenizer


def build_llama2():
    """No byte-level letters, but a token for each byte, a space in front of all, and <s>."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    special = {"special_tokens": ["<unk>", "<s>", "</s>"], "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=300, limit_alphabet=40, **special)
    tokenizer.train_from_iterator(TRAINING, trainer)
    template = {"single": "<s> $A", "special_tokens": [("<s>", 1)]}
    tokenizer.post_processor = processors.TemplateProcessing(**template)
    data = json.loads(tokenizer.to_str())
    vocab = data["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    return tokenizers.Tokenizer.from_str(json.dumps(data))


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "smollm", "llama2"])
def test_our_ids_are_theirs(tmp_path, kind):
    end, peer = ENDS.get(kind, "<|endoftext|>"), build(kind)
    peer.add_tokens(["[PAD]"])
    peer.enable_truncation(5)
    peer.enable_padding(length=64)
    peer.save(str(tmp_path / "tokenizer.json"))
    peer.no_truncation()
    peer.no_padding()
    ours = mamba.load_tokenizer(str(tmp_path / "tokenizer.json"), [])
    ours = mamba.Tokenizer(**ours.arguments)  # as from a checkpoint
    assert ours.vocab_size == peer.get_vocab_size() == peer.token_to_id("[PAD]") + 1
    assert ours.separator == peer.token_to_id(end)
    for text in ["", " ", "a [PAD] b", *TEXTS]:
        for special in (True, False):
            peer.encode_special_tokens = not special
            ids = peer.encode(text).ids
            assert ours.encode(text, special) == ids, (special, text)
            back = ours.decode_bytes(ids).decode()
            assert back == peer.decode(ids)
            assert (ours.separator in ids) == (special and end in text)
        if kind != "smollm" or text.isascii():
            assert back == text
    assert ours.decode_bytes([ours.vocab_size + 9]) == b""  # a model's padding
    assert (ours.encode("x")[0] == 1) == (kind == "llama2")  # <s>


@pytest.mark.parametrize("script", [mamba, transformer], ids=lambda script: script.__name__)
def test_folders_with_more_ids_than_rows(script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    peer, model = build("gpt2", 299), mamba.Mamba(mamba.MambaConfig(16, 1, 300))
    assert peer.add_special_tokens(["[PAD]"]) and peer.token_to_id("[PAD]") == 300
    if script is transformer:
        model = transformer.Transformer(transformer.TransformerConfig(16, 1, 2, vocab_size=300))
    script.write_folder(model, "hf")
    peer.save("hf/tokenizer.json")
    (tmp_path / "text.txt").write_text("Hello world, this is a text.\n" * 60)

    usual = ["--checkpoint=hf", "--tokens=5", "--temperature=0"]
    assert script.main(["sample", *usual, "--prompt=hello [PAD] you"]) == 2
    assert "token 300 is beyond" in capsys.readouterr().err
    assert script.main(["sample", *usual, "--prompt=Hé you"]) == 0
    ids = model.generate(torch.tensor([peer.encode("Hé you").ids]), 5, temperature=0)[0]
    assert capsys.readouterr().out == peer.decode(ids.tolist()) + "\n"
    assert script.main(["eval", *usual, "--data=text.txt"]) == 0
    for content in ("", "[]", '{"model": {"type": "Other"}}'):
        (tmp_path / "hf" / "tokenizer.json").write_text(content)
        assert script.main(["sample", *usual]) == 2
