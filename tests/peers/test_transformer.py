"""transformer.py against transformers' Llama: logits, losses, gradients, texts, files both ways."""

import itertools
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import transformer
from tests.peers.test_mamba import assert_same_model, randomise
from transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 45  # beyond the original length of SCALING
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALING |= {"original_max_position_embeddings": 32}
OTHER = {"factor": 32.0, "low_freq_factor": 2.0, "original_max_position_embeddings": 40}
SIZES = {
    "d_model": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 4, "d_ff": 56, "vocab_size": 43,
    "max_length": 512, "tie_embeddings": False, "norm_eps": 1e-5,
}  # fmt: skip
CONFIGS = {
    "multi-head": {},
    "grouped-query": {"n_kv_head": 2},
    "multi-query, tied": {"n_kv_head": 1, "tie_embeddings": True},
    "theta 500000": {"rope_theta": 500000.0},
    "Llama-3 scaling": {
        "rope_scaling": SCALING, "rope_theta": 500000.0, "n_kv_head": 2, "d_model": 128,
    },
    "scaling by other factors, tied": {
        "rope_scaling": SCALING | OTHER, "tie_embeddings": True, "d_model": 64,
    },
    "odd widths": {
        "d_model": 60, "n_head": 3, "n_kv_head": 3, "d_ff": 100, "vocab_size": 101, "n_layer": 3,
    },
    "odd widths, tied, multi-query": {
        "d_model": 42, "n_head": 7, "n_kv_head": 1, "d_ff": 1, "vocab_size": 7, "n_layer": 1,
        "tie_embeddings": True,
    },
    "eps 1e-6": {"norm_eps": 1e-6, "n_kv_head": 2},
    "eps 0.3, heads of 2": {"norm_eps": 0.3, "n_head": 16, "n_kv_head": 8},
}  # fmt: skip
each_config = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)


def their_model(options, **more):
    """Theirs by their own names; attention as they wrote it out, not PyTorch's, which is ours."""
    options = SIZES | options
    given = {theirs: options[ours] for ours, theirs in transformer.NAMES.items()}
    rope = options.get("rope_scaling") or {"rope_type": "default"}
    rope = {"rope_theta": options.get("rope_theta", 10000.0)} | rope
    given |= more | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # no ends
    config = LlamaConfig(**given, rope_parameters=rope, attn_implementation="eager")
    return randomise(LlamaForCausalLM(config))


# ----- The same numbers from the same files, both ways


@each_config
def test_folders_both_ways(options, tmp_path):
    theirs = their_model(options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = transformer.read_folder(tmp_path / "theirs")
    want = TransformerConfig(**SIZES | options)
    assert {k: getattr(ours.config, k) for k in SIZES} == {k: getattr(want, k) for k in SIZES}
    assert_same_model(ours, theirs)
    transformer.write_folder(ours, str(tmp_path / "new" / "ours"))
    loading = {"output_loading_info": True, "attn_implementation": "eager"}
    written, report = LlamaForCausalLM.from_pretrained(tmp_path / "new" / "ours", **loading)
    assert not any(report.values()), report
    assert written.config.bos_token_id is None  # or its generation ends at our token 1 or 2
    assert written.generation_config.eos_token_id is None
    assert_same_model(ours, written.eval())
    again, tokens = transformer.read_folder(tmp_path / "new" / "ours"), torch.randint(7, (2, 45))
    assert torch.equal(again(tokens), ours(tokens))
    tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert tied == again.config.tie_embeddings == want.tie_embeddings


def test_defaults_in_our_folder(tmp_path):
    """Fields left alone, n_kv_head and d_ff 0 too, and a scaling without a type mean the same."""
    scaling = {k: v for k, v in SCALING.items() if k != "rope_type"}
    sizes = {"d_model": 128, "n_layer": 1, "n_head": 2, "vocab_size": 43}
    ours = randomise(Transformer(TransformerConfig(**sizes, rope_scaling=scaling)))
    transformer.write_folder(ours, str(tmp_path))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.config.num_key_value_heads == 2 and theirs.config.intermediate_size == 384
    assert theirs.config.rope_parameters["rope_type"] == "llama3"
    assert_same_model(ours, theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_is_read_in_float32(tied, tmp_path):
    narrow = their_model({"tie_embeddings": tied, "n_kv_head": 2}).bfloat16()
    narrow.save_pretrained(tmp_path / "theirs")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    ours = transformer.read_folder(tmp_path / "theirs")
    assert_same_model(ours, theirs)
    transformer.write_folder(ours.bfloat16(), str(tmp_path / "ours"))
    assert_same_model(transformer.read_folder(tmp_path / "ours"), theirs)


# ----- What is refused

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
YARN = LINEAR | {"rope_type": "yarn", "original_max_position_embeddings": 64}
REFUSED = {  # what the message must say, of fields in config.json
    "hidden_act is 'gelu'": {"hidden_act": "gelu"},
    "attention_bias is True": {"attention_bias": True},
    "model_type is 'mistral'": {"model_type": "mistral"},
    "raising an error": {"head_dim": 16},
    "rope type 'linear'": {"rope_parameters": LINEAR},
    "rope type 'dynamic'": {"rope_parameters": LINEAR | {"rope_type": "dynamic"}},
    "rope type 'yarn'": {"rope_parameters": YARN},
    "layers.2": {"num_hidden_layers": 3},
    "layers.1": {"num_hidden_layers": 1},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("words", REFUSED)
def test_a_model_that_is_not_plain_is_refused(words, tmp_path):
    their_model({}).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | REFUSED[words]))
    with pytest.raises((ValueError, RuntimeError), match=words):
        transformer.read_folder(tmp_path)


def test_heads_of_another_size_are_refused(tmp_path):
    their_model({}, head_dim=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="head_dim 16 must be"):
        transformer.read_folder(tmp_path)


@pytest.mark.parametrize("part", ["position learned", "mlp gelu", "norm layernorm"])
def test_a_model_that_is_no_llama_is_not_written(part, tmp_path):
    parts = dict([part.split()])
    with pytest.raises(ValueError, match=r"Transformer\+\+"):
        transformer.write_folder(Transformer(TransformerConfig(**SIZES | parts)), str(tmp_path))
    assert not list(tmp_path.iterdir())


# ----- Writing text


@pytest.mark.parametrize(
    "name", ["multi-head", "grouped-query", "multi-query, tied", "Llama-3 scaling", "odd widths"]
)
def test_greedy_generation(name, tmp_path):
    theirs = their_model(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ours = transformer.read_folder(tmp_path)
    for batch, length in itertools.product((1, 3), (1, 9)):
        prompt = torch.randint(ours.config.vocab_size, (batch, length))
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
        want = theirs.generate(prompt, max_new_tokens=40, **options)
        assert want.shape == (batch, length + 40)
        assert name.endswith("tied") or len(want.unique()) > 5, "too uniform a text to compare"
        assert torch.equal(ours.generate(prompt, 40, temperature=0), want)
