"""transformer.py against transformers' Llama: logits, losses, gradients, texts, files both ways."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import transformer
from transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4  # relative error of a tensor's norm, float32
LENGTH = 45  # beyond the original length of SCALING
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALING |= {"original_max_position_embeddings": 32}
SIZES = {
    "d_model": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 4,
    "d_ff": 56,
    "vocab_size": 43,
    "max_length": 512,
}
SIZES |= {"tie_embeddings": False, "norm_eps": 1e-5}
CONFIGS = {
    "multi-head": {},
    "grouped-query": {"n_kv_head": 2},
    "multi-query, tied": {"n_kv_head": 1, "tie_embeddings": True},
    "theta 500000": {"rope_theta": 500000.0},
    "Llama-3 scaling": {
        "rope_scaling": SCALING, "rope_theta": 500000.0, "n_kv_head": 2, "d_model": 128,
    },
    "scaling by other factors, tied": {
        "rope_scaling": SCALING
        | {"factor": 32.0, "low_freq_factor": 2.0, "original_max_position_embeddings": 40},
        "tie_embeddings": True,
        "d_model": 64,
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


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Make every parameter matter: none keeps one value for all its elements."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter += 0.4 * torch.randn_like(parameter)
        elif "embed" in name:
            parameter.normal_()
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


def our_model(options: dict) -> Transformer:
    return randomise(Transformer(TransformerConfig(**SIZES | options)))


def their_model(options: dict) -> LlamaForCausalLM:
    """Theirs by their own names; attention as they wrote it out, not PyTorch's, which is ours."""
    options = SIZES | {"rope_theta": 10000.0, "rope_scaling": None} | options
    rope = {"rope_theta": options["rope_theta"]} | (
        options["rope_scaling"] or {"rope_type": "default"}
    )
    ids = dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id")
    )  # none: generation never stops early
    config = LlamaConfig(
        hidden_size=options["d_model"],
        intermediate_size=options["d_ff"],
        num_hidden_layers=options["n_layer"],
        num_attention_heads=options["n_head"],
        num_key_value_heads=options["n_kv_head"],
        vocab_size=options["vocab_size"],
        max_position_embeddings=options["max_length"],
        rms_norm_eps=options["norm_eps"],
        tie_word_embeddings=options["tie_embeddings"],
        rope_parameters=rope,
        attn_implementation="eager",
        **ids,
    )
    return randomise(LlamaForCausalLM(config))


def some_tokens(vocab_size: int, batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(vocab_size, (batch, length))


def read(folder: Path) -> Transformer:
    return transformer.read_folder(folder)


def assert_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    error = (ours - theirs).norm() / theirs.norm()
    assert error <= TOLERANCE, f"{what}: relative error {error:.1e}"


def assert_same_model(ours: Transformer, theirs: LlamaForCausalLM) -> None:
    """Equal logits, loss and gradient of every parameter."""
    tokens = some_tokens(ours.config.vocab_size)
    output = theirs(tokens, labels=tokens)
    assert_close(ours(tokens), output.logits, "logits")
    loss = ours(tokens[:, :-1], targets=tokens[:, 1:])
    assert_close(loss, output.loss, "loss")
    ours.zero_grad(), theirs.zero_grad()
    loss.backward()
    output.loss.backward()
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        assert parameter.grad.norm() > 0, f"{name}: a gradient of 0 compares nothing"
        assert_close(parameters[name].grad, parameter.grad, f"gradient of {name}")


# ----- The same numbers from the same files, both ways


@each_config
def test_their_folder_in_our_model(options: dict, tmp_path: Path) -> None:
    theirs = their_model(options)
    theirs.save_pretrained(tmp_path)
    ours = read(tmp_path)
    got, want = ours.config, TransformerConfig(**SIZES | options)
    assert {k: getattr(got, k) for k in SIZES} == {k: getattr(want, k) for k in SIZES}
    assert_same_model(ours, theirs)


@each_config
def test_our_folder_in_their_model(options: dict, tmp_path: Path) -> None:
    ours = our_model(options)
    transformer.write_folder(ours, str(tmp_path))
    options = {"output_loading_info": True, "attn_implementation": "eager"}
    theirs, report = LlamaForCausalLM.from_pretrained(tmp_path, **options)
    assert not any(report.values()), report
    assert theirs.generation_config.eos_token_id is None, "their generation would end at a token"
    assert_same_model(ours, theirs.eval())
    again = read(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())
    tokens = some_tokens(ours.config.vocab_size)
    assert torch.equal(again(tokens), ours(tokens)), "reading what we wrote changes the logits"


def test_defaults_in_our_folder(tmp_path: Path) -> None:
    """Fields left alone, n_kv_head and d_ff 0 too, and a scaling without a type mean the same."""
    scaling = {k: v for k, v in SCALING.items() if k != "rope_type"}
    config = TransformerConfig(
        d_model=128, n_layer=1, n_head=2, vocab_size=43, rope_scaling=scaling
    )
    ours = randomise(Transformer(config))
    transformer.write_folder(ours, str(tmp_path))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.config.num_key_value_heads == 2 and theirs.config.intermediate_size == 384
    assert theirs.config.rope_parameters["rope_type"] == "llama3"
    assert_same_model(ours, theirs)


def test_scaling_matters_at_this_length(tmp_path: Path) -> None:
    """Else the two configurations that have it would compare nothing."""
    for name in ("Llama-3 scaling", "scaling by other factors, tied"):
        scaled, plain = our_model(CONFIGS[name]), our_model(CONFIGS[name] | {"rope_scaling": None})
        plain.load_state_dict(scaled.state_dict())
        tokens = some_tokens(43)
        assert (plain(tokens) - scaled(tokens)).norm() > 100 * TOLERANCE * scaled(tokens).norm()
        angles = [transformer.rotary_angles(m.config, torch.ones(1)) for m in (scaled, plain)]
        slow, usual = (torch.atan2(sin, cos) for cos, sin in angles)
        frequencies = slow / usual
        factor = scaled.config.rope_scaling["factor"]
        kept, divided = frequencies == 1, torch.isclose(frequencies * factor, torch.tensor(1.0))
        assert (
            kept.any() and divided.any() and not (kept | divided).all()
        )  # each of the three regimes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["safetensors in shards", "bin", "bin in shards", "bfloat16"])
def test_their_other_files(kind: str, tied: bool, tmp_path: Path) -> None:
    theirs = their_model({"tie_embeddings": tied, "n_kv_head": 2})
    if kind == "safetensors in shards":
        theirs.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    elif kind == "bfloat16":
        theirs.bfloat16().save_pretrained(tmp_path)
        theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    else:
        theirs.config.save_pretrained(tmp_path)
        tensors = theirs.state_dict()
        names = (
            ["pytorch_model.bin"]
            if kind == "bin"
            else [f"pytorch_model-{i}-of-3.bin" for i in range(3)]
        )
        weight_map = {key: names[i % len(names)] for i, key in enumerate(tensors)}
        for name in names:
            torch.save({k: v for k, v in tensors.items() if weight_map[k] == name}, tmp_path / name)
        if len(names) > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same_model(read(tmp_path), theirs)


def test_our_bfloat16_folder(tmp_path: Path) -> None:
    ours = our_model({"n_kv_head": 2}).bfloat16()
    transformer.write_folder(ours, str(tmp_path))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_same_model(read(tmp_path), theirs)


# ----- Old files


def write_old(
    folder: Path, theirs: LlamaForCausalLM, without: tuple[str, ...] = (), **changes
) -> None:
    """Write a model as transformers did before its fifth version, without some of the fields."""
    c = theirs.config
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads"
    names += " num_key_value_heads vocab_size rms_norm_eps tie_word_embeddings"
    names += " max_position_embeddings hidden_act"
    fields = {name: getattr(c, name) for name in names.split()}
    fields["rope_theta"] = c.rope_parameters["rope_theta"]
    fields |= {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "rope_scaling": None,
        "pretraining_tp": 1,
    }
    fields |= {
        "torch_dtype": "float32",
        "use_cache": True,
        "initializer_range": 0.02,
        "transformers_version": "4.31.0",
    }
    fields = {k: v for k, v in (fields | changes).items() if k not in without}
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = {k: v.clone() for k, v in theirs.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_old_spellings_of_rope(spelling: str, tmp_path: Path) -> None:
    theirs = their_model(CONFIGS["Llama-3 scaling"])
    scaling = {spelling: "llama3"} | {k: v for k, v in SCALING.items() if k != "rope_type"}
    write_old(tmp_path, theirs, rope_scaling=scaling)
    ours = read(tmp_path)
    assert ours.config.rope_theta == 500000.0
    assert_same_model(ours, theirs)
    assert_same_model(ours, LlamaForCausalLM.from_pretrained(tmp_path).eval())
    transformer.write_folder(ours, str(tmp_path / "ours"))
    assert_same_model(ours, LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval())


def test_fields_that_old_files_lack(tmp_path: Path) -> None:
    """Defaults are theirs: all heads have keys and values, 1e-6, an untied head, theta 10000."""
    theirs = their_model({"norm_eps": 1e-6})
    without = (
        "num_key_value_heads",
        "tie_word_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "hidden_act",
    )
    write_old(tmp_path, theirs, (*without, "max_position_embeddings"))
    ours = read(tmp_path)
    assert (ours.config.norm_eps, ours.config.tie_embeddings, ours.config.groups) == (
        1e-6,
        False,
        4,
    )
    assert_same_model(ours, theirs)
    assert_same_model(ours, LlamaForCausalLM.from_pretrained(tmp_path).eval())


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_old_files_with_the_rotary_constant(kind: str, tmp_path: Path) -> None:
    theirs = their_model({})
    write_old(tmp_path, theirs)
    tensors = load_file(tmp_path / "model.safetensors")
    for i in range(SIZES["n_layer"]):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = (
            theirs.model.rotary_emb.inv_freq.clone()
        )
    if kind == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same_model(read(tmp_path), theirs)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_their_other_scalings_are_refused(kind: str, tmp_path: Path) -> None:
    theirs = their_model({})
    theirs.config.rope_parameters = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    if kind == "yarn":
        theirs.config.rope_parameters["original_max_position_embeddings"] = 64
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"rope type '{kind}'"):
        read(tmp_path)


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    their_model({}).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        read(tmp_path)


# ----- Writing text


@pytest.mark.parametrize(
    "name", ["multi-head", "grouped-query", "multi-query, tied", "Llama-3 scaling", "odd widths"]
)
def test_greedy_generation(name: str, tmp_path: Path) -> None:
    theirs = their_model(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ours = read(tmp_path)
    for batch, length in itertools.product((1, 3), (1, 9)):
        prompt = some_tokens(ours.config.vocab_size, batch, length)
        mask = torch.ones_like(prompt)
        want = theirs.generate(
            prompt, attention_mask=mask, do_sample=False, max_new_tokens=40, use_cache=True
        )
        assert want.shape == (batch, length + 40)
        assert name.endswith("tied") or len(want.unique()) > 5, "too uniform a text to compare"
        assert torch.equal(ours.generate(prompt, 40, temperature=0), want)


@torch.no_grad()
def test_cached_decoding(tmp_path: Path) -> None:
    """Their prefill and one-token calls against ours."""
    theirs = their_model(CONFIGS["Llama-3 scaling"])
    theirs.save_pretrained(tmp_path)
    ours, tokens = read(tmp_path), some_tokens(SIZES["vocab_size"], 3)
    for prefill in (1, 2, 40):
        output = theirs(tokens[:, :prefill], use_cache=True)
        cache = ours.init_cache(3, LENGTH)
        assert_close(ours(tokens[:, :prefill], cache), output.logits, "prefill")
        for t in range(prefill, LENGTH):
            token, past = tokens[:, t : t + 1], output.past_key_values
            output = theirs(token, past_key_values=past, use_cache=True)
            assert_close(ours(token, cache), output.logits, f"token {t} after {prefill} at once")


@each_config
def test_documents_in_one_row_are_theirs_run_apart(options: dict, tmp_path: Path) -> None:
    theirs = their_model(options)
    theirs.save_pretrained(tmp_path)
    ours, cuts = read(tmp_path), [0, 1, 7, 20, 21, LENGTH]
    tokens, starts = some_tokens(ours.config.vocab_size), torch.zeros(2, LENGTH, dtype=torch.bool)
    starts[:, cuts[:-1]] = True
    logits = torch.cat([theirs(tokens[:, a:b]).logits for a, b in itertools.pairwise(cuts)], 1)
    assert_close(ours(tokens, starts=starts), logits, "logits")
    targets = torch.randint(ours.config.vocab_size, (2, LENGTH))
    loss, want = ours(tokens, starts=starts, targets=targets), F.cross_entropy(logits.mT, targets)
    assert_close(loss, want, "loss")
    loss.backward()
    want.backward()
    parameters = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert_close(parameters[name].grad, parameter.grad, f"gradient of {name}")
