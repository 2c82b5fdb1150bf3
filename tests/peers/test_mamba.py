"""mamba.py against the Mamba of transformers and mambapy: equal numbers from the same files."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from mambapy import mamba as mambapy
from safetensors.torch import load_file, save_file
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
    "one tap, width 40": {"d_conv": 1, "d_model": 40, "vocab_size": 50},
}
each_config = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)


@torch.no_grad()
def randomise(model):
    """Every parameter matters: none keeps a value that initialisation gives to all its elements."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.endswith("A_log"):
            parameter += 0.4 * torch.randn_like(parameter)
        elif "embedding" in name:
            parameter.normal_()
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


def their_model(options):
    given = {mamba.NAMES[k]: v for k, v in (SIZES | options).items() if k in mamba.NAMES}
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # nothing ends a text
    return randomise(MambaForCausalLM(TheirConfig(**given, **none)))


def some_tokens(vocab_size=43, batch=2, length=19):
    return torch.randint(1, vocab_size, (batch, length))


def assert_close(ours, theirs, what):
    assert ours.shape == theirs.shape, what
    error = (ours - theirs).norm() / theirs.norm()
    assert error <= 1e-4, f"{what}: relative error {error:.1e}"


def assert_same_model(ours, theirs):
    """Equal logits, loss and gradient of every parameter."""
    tokens = some_tokens(ours.config.vocab_size)
    logits = theirs(tokens)
    logits = getattr(logits, "logits", logits)
    assert_close(ours(tokens), logits, "logits")
    loss = ours(tokens[:, :-1], targets=tokens[:, 1:])
    their_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert_close(loss, their_loss, "loss")
    loss.backward()
    their_loss.backward()
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        grad, want = parameters[name].grad, parameter.grad
        assert want.norm() > 0, f"{name}: a gradient of 0 compares nothing"
        assert_close(grad, want, f"gradient of {name}")


# ----- transformers: the same numbers from the same files, both ways


@each_config
def test_their_folder_in_our_model(options, tmp_path):
    theirs = their_model(options)
    theirs.save_pretrained(tmp_path)
    assert_same_model(mamba.read_folder(str(tmp_path)), theirs)


@each_config
def test_our_folder_in_their_model(options, tmp_path):
    ours = randomise(mamba.Mamba(mamba.MambaConfig(**SIZES | options)))
    mamba.write_folder(ours, str(tmp_path))
    theirs, report = MambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_model(ours, theirs.eval())
    tokens = some_tokens(ours.config.vocab_size)
    assert torch.equal(mamba.read_folder(str(tmp_path))(tokens), ours(tokens))
    ends = theirs.config  # no token ends a text
    assert ends.bos_token_id is ends.eos_token_id is ends.pad_token_id is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["safetensors in shards", "bin", "bin in shards", "bfloat16"])
def test_their_other_files(kind, tied, tmp_path):
    theirs = their_model({"tie_embeddings": tied})
    if kind == "safetensors in shards":
        theirs.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    elif kind == "bfloat16":
        theirs.bfloat16().save_pretrained(tmp_path)
        theirs.float()
    else:
        theirs.config.save_pretrained(tmp_path)
        tensors, many = theirs.state_dict(), kind == "bin in shards"
        names = [f"model-{i}.bin" for i in range(3)] if many else ["pytorch_model.bin"]
        place = {key: names[i % len(names)] for i, key in enumerate(tensors)}
        for name in names:
            torch.save({k: v for k, v in tensors.items() if place[k] == name}, tmp_path / name)
        if many:
            index = json.dumps({"metadata": {}, "weight_map": place})
            (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    assert_same_model(mamba.read_folder(str(tmp_path)), theirs)


def write_official(folder, theirs, **fields):
    """A folder as the official code writes it: its fields, its name of the embedding.

    The weights have some rows more than vocab_size, by its pad_vocab_size_multiple.
    """
    c = theirs.config
    ssm = {"d_state": c.state_size, "d_conv": c.conv_kernel, "dt_rank": c.time_step_rank}
    ssm |= {"layer": "Mamba1", "dt_min": 0.001, "dt_max": 0.1, "dt_init_floor": 1e-4}
    all_ = {"d_model": c.hidden_size, "n_layer": c.num_hidden_layers}
    all_ |= {"vocab_size": c.vocab_size - 3}
    all_ |= {"d_intermediate": 0, "ssm_cfg": ssm, "attn_layer_idx": [], "attn_cfg": {}}
    all_ |= {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    all_ |= {"pad_vocab_size_multiple": 8, "tie_embeddings": c.tie_word_embeddings}
    (folder / "config.json").write_text(json.dumps(all_ | fields))
    tensors = {k.replace("embeddings", "embedding"): v for k, v in theirs.state_dict().items()}
    torch.save(tensors, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "options", [{}, {"tie_embeddings": False, "d_state": 8, "d_conv": 3, "dt_rank": 5}]
)
def test_official_folder(options, tmp_path):
    theirs = their_model(options)
    write_official(tmp_path, theirs)
    assert_same_model(mamba.read_folder(str(tmp_path)), theirs)


def test_official_folder_with_the_fewest_fields(tmp_path):
    """The first released models' have no tie_embeddings, no d_intermediate, an empty ssm_cfg."""
    theirs = their_model({})
    write_official(tmp_path, theirs)
    fields = SIZES | {"ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert_same_model(mamba.read_folder(str(tmp_path)), theirs)


REFUSED = [  # layout, fields of config.json, what becomes of one tensor
    ("official", {"d_intermediate": 64}, None),
    ("official", {"attn_layer_idx": [1]}, None),
    ("official", {"ssm_cfg": {"layer": "Mamba2"}}, None),
    ("official", {"ssm_cfg": {"bias": True}}, None),
    ("official", {"rms_norm": False}, None),
    ("official", {}, "missing"),
    ("official", {}, "misshapen"),
    ("theirs", {"model_type": "mamba2"}, None),
    ("theirs", {"use_bias": True}, None),
    ("theirs", {"use_conv_bias": False}, None),
    ("theirs", {"hidden_act": "gelu"}, None),
    ("theirs", {"intermediate_size": 50}, None),
    ("theirs", {}, "missing"),
    ("theirs", {}, "misshapen"),
]


@pytest.mark.parametrize(("layout", "fields", "spoil"), REFUSED, ids=str)
def test_what_is_refused(layout, fields, spoil, tmp_path):
    theirs, name = their_model({}), "backbone.layers.1.mixer.A_log"
    if layout == "official":
        write_official(tmp_path, theirs, **fields)
        path, save = tmp_path / "pytorch_model.bin", torch.save
        tensors = torch.load(path, weights_only=True)
    else:
        theirs.save_pretrained(tmp_path)
        config = tmp_path / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
        path = tmp_path / "model.safetensors"
        tensors, save = load_file(path), lambda x, path: save_file(x, path, {"format": "pt"})
    tensor = tensors.pop(name)
    if spoil != "missing":
        tensors[name] = tensor[:-1].clone() if spoil else tensor
    save(tensors, path)
    with pytest.raises(ValueError, match=tmp_path.name):
        mamba.load_model(tmp_path)


# ----- transformers: generation and cached decoding


@pytest.mark.parametrize("taps", [4, 2])
def test_greedy_generation(taps, tmp_path):
    theirs = their_model({"tie_embeddings": False, "d_conv": taps})
    theirs.save_pretrained(tmp_path)
    ours = mamba.read_folder(str(tmp_path))
    for length in (1, 9):  # one token is shorter than the convolution
        prompt = some_tokens(batch=3, length=length)
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
        want = theirs.generate(prompt, max_new_tokens=40, **options)
        assert want.shape == (3, length + 40) and len(want.unique()) > 5  # else it is too uniform
        assert torch.equal(ours.generate(prompt, 40, temperature=0), want)


@torch.no_grad()
def test_cached_decoding(tmp_path):
    """Their prefill and one-token steps against ours, and ours against our logits of the whole."""
    theirs = their_model({})
    theirs.save_pretrained(tmp_path)
    ours, tokens = mamba.read_folder(str(tmp_path)), some_tokens(length=24)
    for prefill in (1, 2, 12):
        output = theirs(tokens[:, :prefill], use_cache=True)
        logits, state = ours(tokens[:, :prefill], return_state=True)
        assert_close(logits, output.logits, "prefill")
        for t in range(prefill, 24):
            cache = output.cache_params
            output = theirs(tokens[:, t : t + 1], cache_params=cache, use_cache=True)
            logits, state = ours.step(tokens[:, t], state)
            assert_close(logits, output.logits[:, 0], f"token {t} after a prefill of {prefill}")
    assert_close(logits, ours(tokens)[:, -1], "last token")


# ----- mambapy: the scan and the model

SHAPES = [(2, 1, 3, 4), (1, 3, 5, 1), (2, 64, 6, 16), (3, 100, 4, 5), (1, 777, 3, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "sequential", "chunked"])
def test_scan(shape, backend):
    """Output and gradients equal those of mambapy's pscan inside its block's own code."""
    batch, L, width, N = shape
    u, delta, z, dy = (torch.randn(batch, L, width) for _ in range(4))
    A, B, C = -torch.rand(width, N) * N - 0.1, torch.randn(batch, L, N), torch.randn(batch, L, N)
    D, delta_bias = torch.randn(width), torch.randn(width)
    inputs = [x.requires_grad_() for x in (u, delta, A, B, C, D, z, delta_bias)]
    y = mamba.selective_scan(*inputs, delta_softplus=True, backend=backend)
    step = F.softplus(delta + delta_bias)
    want = mambapy.MambaBlock.selective_scan(None, u, step, A, B, C, D) * F.silu(z)
    assert_close(y, want, "y")
    ours, theirs = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(want, inputs, dy)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if L > 1 or inputs[i] is not A:
            assert_close(a, b, f"gradient {i}")
        else:  # with one position the decay multiplies a state of 0
            assert not a.any() and not b.any()


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


@pytest.mark.parametrize("options", [{}, {"d_state": 8, "d_conv": 3, "dt_rank": 3}])
def test_mambapy_model(options):
    theirs = randomise(MambapyModel(mambapy.MambaConfig(24, 2, **options), 48))
    ours = mamba.Mamba(mamba.MambaConfig(24, 2, 48, tie_embeddings=False, **options))
    ours.load_state_dict(theirs.state_dict())
    assert_same_model(ours, theirs)


# ----- The official initialisation


def parameter(model, name):
    layers = model.backbone.layers
    return torch.cat([layer.mixer.get_parameter(name).detach().flatten() for layer in layers])


def test_initialisation_is_theirs():
    """What transformers initialises by the official rules has the same quantiles here."""
    sizes = {"hidden_size": 192, "num_hidden_layers": 3, "vocab_size": 64}
    theirs = MambaForCausalLM(TheirConfig(**sizes, rescale_prenorm_residual=True))
    ours = mamba.Mamba(mamba.MambaConfig(d_model=192, n_layer=3, vocab_size=64))
    names = "A_log D dt_proj.weight dt_proj.bias conv1d.weight out_proj.weight"
    for name in names.split():
        quantiles = torch.linspace(0, 1, 11)
        a, b = (parameter(model, name).quantile(quantiles) for model in (ours, theirs))
        allowed = 0.05 * (b[-1] - b[0]).item() + 1e-6
        assert (a - b).abs().max() <= allowed, name


def test_the_other_parameters_have_pytorchs_initialisation():
    """Uniform, by the largest distance to that distribution (Kolmogorov and Smirnov)."""
    model = mamba.Mamba(mamba.MambaConfig(192, 3, 1000, tie_embeddings=False))
    bounds = {"in_proj.weight": 192, "x_proj.weight": 384, "conv1d.bias": 4}
    drawn = {name: (parameter(model, name), n**-0.5) for name, n in bounds.items()}
    drawn["lm_head"] = model.lm_head.weight.detach().flatten(), 192**-0.5
    for name, (x, bound) in drawn.items():
        assert x.abs().max() <= bound * (1 + 1e-6), name
        distance = x.sort().values / bound * 0.5 + 0.5 - torch.linspace(0, 1, len(x))
        assert distance.abs().max() <= 2 / math.sqrt(len(x)), name
