"""transformer.py against transformers' Llama: logits, losses, gradients, texts, files both ways."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import transformer
from tests.peers.test_mamba import assert_close, assert_same_model, randomise
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


@pytest.mark.parametrize("name", ["Llama-3 scaling", "scaling by other factors, tied"])
def test_scaling_matters_at_this_length(name):
    """Else the two configurations that have it would compare nothing."""
    scaled, plain = (
        Transformer(TransformerConfig(**SIZES | CONFIGS[name] | changes))
        for changes in ({}, {"rope_scaling": None})
    )
    plain.load_state_dict(randomise(scaled).state_dict())
    tokens = torch.randint(43, (2, LENGTH))
    assert (plain(tokens) - scaled(tokens)).norm() > 0.01 * scaled(tokens).norm()
    angles = [transformer.rotary_angles(m.config, torch.ones(1)) for m in (scaled, plain)]
    slow, usual = (torch.atan2(sin, cos) for cos, sin in angles)
    factor = scaled.config.rope_scaling["factor"]
    kept, divided = slow == usual, torch.isclose(slow * factor, usual)
    assert kept.any() and divided.any() and not (kept | divided).all()  # the three regimes


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_is_read_in_float32(tied, tmp_path):
    narrow = their_model({"tie_embeddings": tied, "n_kv_head": 2}).bfloat16()
    narrow.save_pretrained(tmp_path / "theirs")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    ours = transformer.read_folder(tmp_path / "theirs")
    assert_same_model(ours, theirs)
    transformer.write_folder(ours.bfloat16(), str(tmp_path / "ours"))
    assert_same_model(transformer.read_folder(tmp_path / "ours"), theirs)


# ----- Old files

OLD = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "pretraining_tp": 1}
OLD |= {"torch_dtype": "float32", "use_cache": True, "transformers_version": "4.31.0"}
REQUIRED = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size"
SINCE = "num_key_value_heads rms_norm_eps tie_word_embeddings max_position_embeddings hidden_act"


def write_old(folder, theirs, names, **fields):
    """A model as transformers wrote it before its fifth version: these fields and the constant."""
    fields |= OLD | {name: getattr(theirs.config, name) for name in names.split()}
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = {k: v.clone() for k, v in theirs.state_dict().items()}
    for i in range(SIZES["n_layer"]):
        constant = theirs.model.rotary_emb.inv_freq.clone()
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = constant
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_old_spellings_of_rope(spelling, tmp_path):
    theirs = their_model(CONFIGS["Llama-3 scaling"])
    scaling = {spelling: "llama3"} | {k: v for k, v in SCALING.items() if k != "rope_type"}
    fields = {"rope_scaling": scaling, "rope_theta": 500000.0}
    write_old(tmp_path, theirs, f"{REQUIRED} {SINCE}", **fields)
    ours = transformer.read_folder(tmp_path)
    assert ours.config.rope_theta == 500000.0
    assert_same_model(ours, theirs)


def test_fields_that_old_files_lack(tmp_path):
    """Defaults are theirs: all heads have keys and values, 1e-6, an untied head, theta 10000."""
    theirs = their_model({"norm_eps": 1e-6})
    write_old(tmp_path, theirs, REQUIRED)
    ours = transformer.read_folder(tmp_path)
    found = ours.config
    assert (found.norm_eps, found.tie_embeddings, found.groups) == (1e-6, False, 4)
    assert_same_model(ours, theirs)


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


# ----- Writing text, and documents


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


@each_config
def test_documents_in_one_row_are_theirs_run_apart(options, tmp_path):
    theirs = their_model(options)
    theirs.save_pretrained(tmp_path)
    ours, cuts = transformer.read_folder(tmp_path), [0, 1, 7, 20, 21, LENGTH]
    tokens, targets = torch.randint(ours.config.vocab_size, (2, 2, LENGTH))
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    starts[:, cuts[:-1]] = True
    logits = torch.cat([theirs(tokens[:, a:b]).logits for a, b in itertools.pairwise(cuts)], 1)
    assert_close(ours(tokens, starts=starts), logits, "logits")
    loss, want = ours(tokens, starts=starts, targets=targets), F.cross_entropy(logits.mT, targets)
    assert_close(loss, want, "loss")
    loss.backward()
    want.backward()
    parameters = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert_close(parameters[name].grad, parameter.grad, f"gradient of {name}")
