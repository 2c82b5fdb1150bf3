"""mamba.py against the Mamba of transformers and mambapy: equal numbers from the same files."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from mambapy import mamba as mambapy
from torch import nn
from transformers import MambaConfig as TheirConfig
from transformers import MambaForCausalLM

import mamba

SIZES = {"d_model": 24, "n_layer": 2, "vocab_size": 43}
CONFIGS = {
    "defaults": {},
    "d_state 5, expand 1": {"d_state": 5, "expand": 1},
    "kernel 2": {"d_conv": 2},
    "kernel 3, head untied": {"d_conv": 3, "tie_embeddings": False},
    "dt_rank 7, expand 3": {"dt_rank": 7, "expand": 3, "vocab_size": 40},
    "one state, one layer": {"d_state": 1, "n_layer": 1, "norm_eps": 1e-3},
    "one tap, width 40": {"d_conv": 1, "d_model": 40},
}


@torch.no_grad()
def randomise(model):
    """Every parameter matters: none keeps a value that initialisation gives to all its elements."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.endswith("A_log"):
            parameter += 0.4 * torch.randn_like(parameter)
        else:
            parameter.normal_(std=1 if "embed" in name else parameter[0].numel() ** -0.5)
    return model.eval()


def their_model(options):
    given = {mamba.NAMES[k]: v for k, v in (SIZES | options).items() if k in mamba.NAMES}
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # nothing ends a text
    return randomise(MambaForCausalLM(TheirConfig(**given, **none)))


def assert_close(ours, theirs, what):
    assert ours.shape == theirs.shape, what
    error = (ours - theirs).norm() / theirs.norm()
    assert error <= 1e-4, f"{what}: relative error {error:.1e}"


def assert_same_model(ours, theirs, length=45):
    """Equal logits, loss and gradient of every parameter."""
    tokens = torch.randint(1, ours.config.vocab_size, (2, length))
    output = theirs(tokens)
    logits = getattr(output, "logits", output)
    assert_close(ours(tokens), logits, "logits")
    loss = ours(tokens[:, :-1], targets=tokens[:, 1:])
    their_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert_close(loss, their_loss, "loss")
    parameters, their_parameters = (dict(m.named_parameters()) for m in (ours, theirs))
    assert parameters.keys() == their_parameters.keys()
    wanted = torch.autograd.grad(their_loss, list(their_parameters.values()))
    found = torch.autograd.grad(loss, [parameters[name] for name in their_parameters])
    for name, ours, theirs in zip(their_parameters, found, wanted, strict=True):
        assert theirs.norm() > 0, f"{name}: a gradient of 0 compares nothing"
        assert_close(ours, theirs, f"gradient of {name}")


# ----- transformers: the same numbers from the same files, both ways


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_folders_both_ways(options, tmp_path):
    theirs = their_model(options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = mamba.read_folder(tmp_path / "theirs")
    assert_same_model(ours, theirs)
    mamba.write_folder(ours, str(tmp_path / "ours"))
    written, report = MambaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_model(ours, written.eval())
    ends = written.config  # else they would end a text
    assert ends.bos_token_id is ends.eos_token_id is ends.pad_token_id is None


@pytest.mark.parametrize("tied", [True, False])
def test_their_bfloat16_is_read_in_float32(tied, tmp_path):
    theirs = their_model({"tie_embeddings": tied})
    theirs.bfloat16().save_pretrained(tmp_path)
    assert_same_model(mamba.read_folder(tmp_path), theirs.float())


def write_official(folder, theirs, **fields):
    """A folder of the official code, which pads the vocabulary; fields that are None leave."""
    c = theirs.config
    ssm = {"d_state": c.state_size, "d_conv": c.conv_kernel, "dt_rank": c.time_step_rank}
    given = {"d_model": c.hidden_size, "n_layer": c.num_hidden_layers, "rms_norm": True}
    given |= {"vocab_size": c.vocab_size - 3, "ssm_cfg": ssm | {"layer": "Mamba1"}}
    given |= {"d_intermediate": 0, "attn_layer_idx": [], "residual_in_fp32": True}
    given |= {"pad_vocab_size_multiple": 8, "tie_embeddings": c.tie_word_embeddings} | fields
    kept = {name: value for name, value in given.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    tensors = {k.replace("embeddings", "embedding"): v for k, v in theirs.state_dict().items()}
    torch.save(tensors, folder / "pytorch_model.bin")


FIRST = {"ssm_cfg": {}, "d_intermediate": None, "attn_layer_idx": None, "tie_embeddings": None}
UNTIED = {"tie_embeddings": False, "d_state": 8, "d_conv": 3, "dt_rank": 5}


@pytest.mark.parametrize(("options", "fields"), [({}, {}), (UNTIED, {}), ({}, FIRST)])
def test_official_folder(options, fields, tmp_path):
    """FIRST: the first released models have no more fields than these."""
    theirs = their_model(options)
    write_official(tmp_path, theirs, **fields)
    assert_same_model(mamba.read_folder(tmp_path), theirs)


REFUSED = {
    "official": [
        {"d_intermediate": 64}, {"attn_layer_idx": [1]}, {"rms_norm": False}, {"n_layer": 1},
        {"n_layer": 3}, {"ssm_cfg": {"layer": "Mamba2"}}, {"ssm_cfg": {"bias": True}},
        {"ssm_cfg": {"d_state": 5}}, {"d_model": None},
    ],
    "theirs": [
        {"model_type": "mamba2"}, {"use_bias": True}, {"use_conv_bias": False},
        {"hidden_act": "gelu"}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3},
    ],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("layout", "fields"), [(k, v) for k in REFUSED for v in REFUSED[k]])
def test_a_model_that_is_not_plain_is_refused(layout, fields, tmp_path, capsys):
    """By its config.json, or because the weights are too few, too many or of another shape."""
    theirs = their_model({})
    if layout == "official":
        write_official(tmp_path, theirs, **fields)
    else:
        theirs.save_pretrained(tmp_path)
        config = tmp_path / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    assert mamba.main(["sample", "--tokenizer=byte", f"--checkpoint={tmp_path}"]) == 2
    assert "mamba.py: " in capsys.readouterr().err


@pytest.mark.parametrize("taps", [4, 2])
def test_greedy_generation(taps, tmp_path):
    theirs = their_model({"tie_embeddings": False, "d_conv": taps})
    theirs.save_pretrained(tmp_path)
    ours = mamba.read_folder(tmp_path)
    for length in (1, 9):  # one token is shorter than the convolution
        prompt = torch.randint(1, 43, (3, length))
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
        want = theirs.generate(prompt, max_new_tokens=40, **options)
        assert want.shape == (3, length + 40) and len(want.unique()) > 5  # else it is too uniform
        assert torch.equal(ours.generate(prompt, 40, temperature=0), want)


# ----- mambapy, whose scan is parallel too


class MambapyModel(nn.Module):
    """mambapy's layers and norm as its language model has them, which needs einops, for Mamba-2."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.backbone = mambapy.Mamba(config)
        self.backbone.embeddings = nn.Embedding(vocab_size, config.d_model)
        self.backbone.norm_f = mambapy.RMSNorm(config.d_model, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False)

    def forward(self, tokens):
        return self.lm_head(self.backbone.norm_f(self.backbone(self.backbone.embeddings(tokens))))


@pytest.mark.parametrize("length", [3, 45, 300])
@pytest.mark.parametrize("options", [{}, {"d_state": 8, "d_conv": 3, "dt_rank": 3}])
def test_mambapy_model(options, length):
    theirs = randomise(MambapyModel(mambapy.MambaConfig(24, 2, **options), 48))
    ours = mamba.Mamba(mamba.MambaConfig(24, 2, 48, tie_embeddings=False, **options))
    ours.load_state_dict(theirs.state_dict())
    assert_same_model(ours, theirs, length)


# ----- The initialisation


def parameter(model, name):
    layers = model.backbone.layers
    return torch.cat([layer.mixer.get_parameter(name).detach().flatten() for layer in layers])


def test_initialisation_is_theirs_and_pytorchs():
    """By its quantiles, for what transformers initialises by the official rules; and by bounds."""
    sizes = {"hidden_size": 192, "num_hidden_layers": 3, "vocab_size": 64}
    theirs = MambaForCausalLM(TheirConfig(**sizes, rescale_prenorm_residual=True))
    ours = mamba.Mamba(mamba.MambaConfig(192, 3, 64, tie_embeddings=False))
    names = "A_log D dt_proj.weight dt_proj.bias conv1d.weight out_proj.weight"
    for name in names.split():
        shares = torch.linspace(0, 1, 11)
        a, b = (parameter(model, name).quantile(shares) for model in (ours, theirs))
        assert (a - b).abs().max() <= 0.05 * (b[-1] - b[0]) + 1e-6, name
    bounds = {"in_proj.weight": 192, "x_proj.weight": 384, "conv1d.bias": 4}  # of a uniform
    drawn = {name: parameter(ours, name) * size**0.5 for name, size in bounds.items()}
    drawn["lm_head"] = ours.lm_head.weight.detach().flatten() * 192**0.5
    for name, x in drawn.items():  # the largest distance to that distribution
        distance = x.sort().values * 0.5 + 0.5 - torch.linspace(0, 1, len(x))
        assert x.abs().max() < 1.0001 and distance.abs().max() <= 2 / math.sqrt(len(x)), name
    assert abs(ours.backbone.embeddings.weight.std().item() - 0.02) < 1e-3
