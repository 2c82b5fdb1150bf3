"""mamba.py against transformers' and mambapy's Mamba and the official initialisation: equal numbers, equal files."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mambapy import mamba as mambapy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MambaConfig as TheirConfig
from transformers import MambaForCausalLM

import mamba

TOLERANCE = 1e-4  # relative error of a tensor's norm, float32
SIZES = {"d_model": 24, "n_layer": 2, "vocab_size": 43}  # 43: rows of padding in ours, none in theirs
CONFIGS = {
    "defaults": {},
    "d_state 5, expand 1": {"d_state": 5, "expand": 1},
    "kernel 2, no bias of the convolution": {"d_conv": 2, "conv_bias": False},
    "kernel 3, biases, head untied": {"d_conv": 3, "bias": True, "tie_embeddings": False},
    "dt_rank 7, expand 3": {"dt_rank": 7, "expand": 3, "vocab_size": 40},
    "one state, one layer, eps 1e-3": {"d_state": 1, "n_layer": 1, "norm_eps": 1e-3, "bias": True, "conv_bias": False},
    "vocabulary padded to 16, untied": {"pad_vocab_size_multiple": 16, "tie_embeddings": False, "d_state": 32},
    "one tap, width 40": {"d_conv": 1, "d_model": 40, "vocab_size": 50},
}
THEIR_NAMES = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "dt_rank": "time_step_rank",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "layer_norm_epsilon",
}

each_config = pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Make every parameter matter: none stays at the value that initialisation gives to all its elements."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.endswith("A_log"):
            parameter += 0.4 * torch.randn_like(parameter)
        elif "embedding" in name:
            parameter.normal_()
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


def our_model(options: dict) -> mamba.Mamba:
    return randomise(mamba.Mamba(mamba.MambaConfig(**SIZES | options)))


def their_model(options: dict) -> MambaForCausalLM:
    options = {k: v for k, v in (SIZES | options).items() if k != "pad_vocab_size_multiple"}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # none: generation never stops early
    config = TheirConfig(**{THEIR_NAMES.get(k, k): v for k, v in options.items()}, **ids)
    return randomise(MambaForCausalLM(config))


def some_tokens(vocab_size: int, batch: int = 2, length: int = 19) -> Tensor:
    return torch.randint(1, vocab_size, (batch, length))


def assert_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    error = (ours - theirs).norm() / theirs.norm()
    assert error <= TOLERANCE, f"{what}: relative error {error:.1e}"


def language_model_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def assert_same_model(ours: mamba.Mamba, theirs: nn.Module) -> None:
    """Equal logits, loss and gradient of every parameter."""
    tokens = some_tokens(ours.config.vocab_size)
    logits = ours(tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    if isinstance(theirs, MambaForCausalLM):
        output = theirs(tokens, labels=tokens)
        their_logits, their_loss = output.logits, output.loss
    else:
        their_logits = theirs(tokens)
        their_loss = F.cross_entropy(their_logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert_close(logits, their_logits, "logits")
    assert_close(loss, their_loss, "loss")
    loss.backward()
    their_loss.backward()
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        grad, want = parameters[name].grad, parameter.grad
        assert want.norm() > 0, f"{name}: a gradient of 0 compares nothing"
        assert not grad[len(want) :].any(), f"{name}: rows of padding have a gradient"
        assert_close(grad[: len(want)], want, f"gradient of {name}")


# ----- transformers: the same numbers from the same files, both ways


@each_config
def test_their_folder_in_our_model(options: dict, tmp_path: Path) -> None:
    theirs = their_model(options)
    theirs.save_pretrained(tmp_path)
    assert_same_model(mamba.Mamba.from_pretrained(str(tmp_path)), theirs)


@each_config
def test_our_folder_in_their_model(options: dict, tmp_path: Path) -> None:
    ours = our_model(options)
    ours.save_pretrained(str(tmp_path))
    theirs, report = MambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_model(ours, theirs.eval())
    again = mamba.Mamba.from_pretrained(str(tmp_path))
    tokens = some_tokens(ours.config.vocab_size)
    assert torch.equal(again(tokens), ours(tokens)), "reading what we wrote changes the logits"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["safetensors in shards", "bin", "bin in shards", "bfloat16"])
def test_their_other_files(kind: str, tied: bool, tmp_path: Path) -> None:
    theirs = their_model({"tie_embeddings": tied})
    if kind == "safetensors in shards":
        theirs.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    elif kind == "bfloat16":
        theirs.bfloat16().save_pretrained(tmp_path)
        theirs.float()
    else:
        theirs.config.save_pretrained(tmp_path)
        tensors = theirs.state_dict()
        names = ["pytorch_model.bin"] if kind == "bin" else [f"pytorch_model-{i}-of-3.bin" for i in range(3)]
        weight_map = {key: names[i % len(names)] for i, key in enumerate(tensors)}
        for name in names:
            torch.save({k: v for k, v in tensors.items() if weight_map[k] == name}, tmp_path / name)
        if len(names) > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same_model(mamba.Mamba.from_pretrained(str(tmp_path)), theirs)


def write_official(folder: Path, theirs: MambaForCausalLM, padding: int = 8, **fields) -> None:
    """Write a model as the official code does: its config fields, its name of the embedding, the padded vocabulary."""
    config = theirs.config
    ssm = {"d_state": config.state_size, "d_conv": config.conv_kernel, "dt_rank": config.time_step_rank}
    content = {"d_model": config.hidden_size, "d_intermediate": 0, "n_layer": config.num_hidden_layers}
    content |= {"vocab_size": config.vocab_size, "ssm_cfg": ssm | {"layer": "Mamba1"}, "attn_layer_idx": []}
    content |= {"attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    content |= {"pad_vocab_size_multiple": padding, "tie_embeddings": config.tie_word_embeddings}
    (folder / "config.json").write_text(json.dumps(content | fields))
    tensors = {k.replace("embeddings", "embedding"): v for k, v in theirs.state_dict().items()}
    for name in ("backbone.embedding.weight", "lm_head.weight"):
        tensors[name] = F.pad(tensors[name], (0, 0, 0, -config.vocab_size % padding), value=3.0)
    torch.save(tensors, folder / "pytorch_model.bin")


@pytest.mark.parametrize("padding", [8, 16])
@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False, "d_state": 8, "d_conv": 3, "dt_rank": 5}])
def test_official_folder(options: dict, padding: int, tmp_path: Path) -> None:
    theirs = their_model(options)
    write_official(tmp_path, theirs, padding)
    assert_same_model(mamba.Mamba.from_pretrained(str(tmp_path)), theirs)


def test_official_folder_with_the_fewest_fields(tmp_path: Path) -> None:
    """The first released models' config.json has no tie_embeddings, no d_intermediate and an empty ssm_cfg."""
    theirs = their_model({})
    write_official(tmp_path, theirs)
    fields = {k: SIZES[k] for k in ("d_model", "n_layer", "vocab_size")} | {"ssm_cfg": {}, "rms_norm": True}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"residual_in_fp32": True, "fused_add_norm": True}))
    assert_same_model(mamba.Mamba.from_pretrained(str(tmp_path)), theirs)


# ----- transformers: generation and cached decoding


@pytest.mark.parametrize("options", [{"tie_embeddings": False}, {"tie_embeddings": False, "d_conv": 2, "bias": True}])
def test_greedy_generation(options: dict, tmp_path: Path) -> None:
    theirs = their_model(options)
    theirs.save_pretrained(tmp_path)
    ours = mamba.Mamba.from_pretrained(str(tmp_path))
    for length in (1, 9):  # one token is shorter than the convolution
        prompt = some_tokens(SIZES["vocab_size"], batch=3, length=length)
        want = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=40)
        assert want.shape == (3, length + 40) and len(want.unique()) > 5, "too uniform a text to compare"
        assert torch.equal(ours.generate(prompt, 40, temperature=0), want)


@torch.no_grad()
def test_cached_decoding(tmp_path: Path) -> None:
    """Their prefill and one-token steps against ours, and ours against our logits of the whole."""
    theirs = their_model({})
    theirs.save_pretrained(tmp_path)
    ours = mamba.Mamba.from_pretrained(str(tmp_path))
    tokens = some_tokens(SIZES["vocab_size"], length=24)
    for prefill in (1, 2, 12):
        output = theirs(tokens[:, :prefill], use_cache=True)
        logits, state = ours(tokens[:, :prefill], return_state=True)
        assert_close(logits, output.logits, "prefill")
        for t in range(prefill, 24):
            output = theirs(tokens[:, t : t + 1], cache_params=output.cache_params, use_cache=True)
            logits, state = ours.step(tokens[:, t], state)
            assert_close(logits, output.logits[:, 0], f"token {t} after a prefill of {prefill}")
    assert_close(logits, ours(tokens)[:, -1], "last token")


# ----- mambapy: the scan and the model


@pytest.mark.parametrize(
    "shape", [(2, 1, 3, 4), (1, 3, 5, 1), (2, 64, 6, 16), (3, 100, 4, 5), (1, 777, 3, 16)], ids=str
)
@pytest.mark.parametrize("backend", ["auto", "sequential"])
def test_scan(shape: tuple[int, int, int, int], backend: str) -> None:
    """Outputs and the gradient of every input equal those of mambapy's pscan inside its block's own code."""
    batch, L, width, N = shape
    u, delta, z, dy = (torch.randn(batch, L, width) for _ in range(4))
    A, B, C = -torch.rand(width, N) * N - 0.1, torch.randn(batch, L, N), torch.randn(batch, L, N)
    D, delta_bias = torch.randn(width), torch.randn(width)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    inputs = [x.requires_grad_() for x in (u, delta, A, B, C, D, z, delta_bias)]
    y = mamba.selective_scan(*inputs, delta_softplus=True, backend=backend)
    step = F.softplus(delta + delta_bias)
    want = mambapy.MambaBlock.selective_scan(None, u, step, A, B, C, D) * F.silu(
        z
    )  # the method takes nothing from its block
    assert_close(y, want, "y")
    grads = zip(names, torch.autograd.grad(y, inputs, dy), torch.autograd.grad(want, inputs, dy), strict=True)
    for name, ours, theirs in grads:
        if L > 1 or name != "A":  # with one position the decay multiplies a state of 0
            assert_close(ours, theirs, f"gradient of {name}")
        else:
            assert not ours.any() and not theirs.any()


class MambapyModel(nn.Module):
    """mambapy's layers and norm as its language model puts them together (that module needs einops, for Mamba-2)."""

    def __init__(self, config: mambapy.MambaConfig, vocab_size: int):
        super().__init__()
        self.backbone = mambapy.Mamba(config)
        self.backbone.embeddings = nn.Embedding(vocab_size, config.d_model)
        self.backbone.norm_f = mambapy.RMSNorm(config.d_model, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.backbone.norm_f(self.backbone(self.backbone.embeddings(tokens))))


@pytest.mark.parametrize("options", [{}, {"d_state": 8, "d_conv": 3, "dt_rank": 3, "bias": True, "conv_bias": False}])
def test_mambapy_model(options: dict) -> None:
    theirs = randomise(MambapyModel(mambapy.MambaConfig(d_model=24, n_layers=2, **options), vocab_size=48))
    ours = mamba.Mamba(mamba.MambaConfig(d_model=24, n_layer=2, vocab_size=48, tie_embeddings=False, **options))
    ours.load_state_dict(theirs.state_dict())
    assert_same_model(ours, theirs)


# ----- The official initialisation


def assert_uniform(x: Tensor, bound: float, what: str) -> None:
    """Uniform on [-bound, bound], by its largest distance to that distribution (Kolmogorov and Smirnov)."""
    x = x.detach().flatten().sort().values
    assert x.abs().max() <= bound * (1 + 1e-6), f"{what}: {x.abs().max():.4g} is beyond {bound:.4g}"
    distance = (x / bound * 0.5 + 0.5 - torch.linspace(0, 1, len(x))).abs().max()
    assert distance <= 2 / math.sqrt(len(x)), f"{what}: not uniform on ±{bound:.4g}, distance {distance:.3f}"


def test_initialisation() -> None:
    d_model, n_layer, E, R, N = 192, 3, 384, 12, 16
    options = {"bias": True, "tie_embeddings": False}
    model = mamba.Mamba(mamba.MambaConfig(d_model=d_model, n_layer=n_layer, vocab_size=1000, **options))
    tied = mamba.Mamba(mamba.MambaConfig(d_model=d_model, n_layer=1, vocab_size=1000))
    assert tied.lm_head.weight is tied.backbone.embeddings.weight
    for embedding in (model.backbone.embeddings.weight, tied.backbone.embeddings.weight):
        assert abs(embedding.mean()) < 2e-4 and embedding.std().item() == pytest.approx(0.02, rel=0.01)
    assert_uniform(model.lm_head.weight, d_model**-0.5, "lm_head.weight")
    assert torch.all(model.backbone.norm_f.weight == 1)
    log_dt = []
    for layer in model.backbone.layers:
        mixer = layer.mixer
        assert torch.all(layer.norm.weight == 1) and torch.all(mixer.D == 1)
        assert torch.equal(mixer.A_log, torch.arange(1.0, N + 1).log().expand(E, N)) and mixer.A_log.is_contiguous()
        assert not mixer.in_proj.bias.any() and not mixer.out_proj.bias.any()
        bounds = {"in_proj": d_model**-0.5, "x_proj": E**-0.5, "conv1d": 4**-0.5, "dt_proj": R**-0.5}
        bounds["out_proj"] = E**-0.5 / math.sqrt(n_layer)
        for name, bound in bounds.items():
            assert_uniform(getattr(mixer, name).weight, bound, f"{name}.weight")
        assert_uniform(mixer.conv1d.bias, 4**-0.5, "conv1d.bias")
        log_dt.append(F.softplus(mixer.dt_proj.bias).log())
    low, high = math.log(0.001), math.log(0.1)
    log_dt = torch.cat(log_dt)
    assert low - 1e-3 <= log_dt.min() and log_dt.max() <= high + 1e-3
    assert_uniform((log_dt - (low + high) / 2).clamp(-(high - low) / 2, (high - low) / 2), (high - low) / 2, "log dt")


def test_initialisation_of_the_step_size() -> None:
    """dt_min, dt_max, dt_init_floor and dt_rank mean what they mean in the official code."""
    config = mamba.MambaConfig(1024, 1, 8, dt_rank=9, dt_min=1e-6, dt_max=1.0, dt_init_floor=1e-3)
    mixer = mamba.MambaBlock(config)
    assert_uniform(mixer.dt_proj.weight, 9**-0.5, "dt_proj.weight")
    dt = F.softplus(mixer.dt_proj.bias.detach().double())
    assert dt.min().item() == pytest.approx(1e-3, rel=1e-3) and 0.9 < dt.max() < 1
    assert (dt < 1.001e-3).double().mean().item() == pytest.approx(0.5, abs=0.05), (
        "half of the draws are below the floor"
    )


def test_initialisation_is_theirs() -> None:
    """The parameters that transformers initialises by the official rules have the same quantiles here."""
    sizes = {"hidden_size": 192, "num_hidden_layers": 3, "vocab_size": 64}
    theirs = MambaForCausalLM(TheirConfig(**sizes, rescale_prenorm_residual=True))
    ours = mamba.Mamba(mamba.MambaConfig(d_model=192, n_layer=3, vocab_size=64))
    levels = torch.linspace(0, 1, 11)
    for name in ("A_log", "D", "dt_proj.weight", "dt_proj.bias", "conv1d.weight", "out_proj.weight"):
        a, b = (
            torch.cat([layer.mixer.get_parameter(name).detach().flatten() for layer in m.backbone.layers]).quantile(
                levels
            )
            for m in (ours, theirs)
        )
        torch.testing.assert_close(a, b, rtol=0, atol=0.05 * (b[-1] - b[0]).item() + 1e-6, msg=lambda m, n=name: n + m)


# ----- What is refused


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"d_intermediate": 64}, "d_intermediate"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({"attn_cfg": {"num_heads": 4}}, "attn_cfg"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "Mamba2"),
        ({"ssm_cfg": {"no_such_field": 3}}, "no_such_field"),
        ({"rms_norm": False}, "rms_norm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_official_config_that_is_refused(fields: dict, named: str, tmp_path: Path) -> None:
    write_official(tmp_path, their_model({}), **fields)
    with pytest.raises(mamba.UserError, match=named):
        mamba.Mamba.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "field", [{"model_type": "mamba2"}, {"hidden_act": "gelu"}, {"intermediate_size": 50}], ids=str
)
def test_their_config_that_is_refused(field: dict, tmp_path: Path) -> None:
    their_model({}).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | field))
    with pytest.raises(mamba.UserError, match=f"{next(iter(field))}.*{next(iter(field.values()))}"):
        mamba.Mamba.from_pretrained(str(tmp_path))


def test_everything_refused_is_named_at_once(tmp_path: Path) -> None:
    fields = {"d_intermediate": 64, "attn_layer_idx": [1], "attn_cfg": {"num_heads": 4}, "rms_norm": False}
    write_official(tmp_path, their_model({}), **fields, ssm_cfg={"layer": "Mamba2"})
    with pytest.raises(mamba.UserError) as error:
        mamba.Mamba.from_pretrained(str(tmp_path))
    assert not [name for name in (*fields, "Mamba2") if name not in str(error.value)]


@pytest.mark.parametrize("layout", ["theirs", "official"])
def test_weights_that_do_not_fit(layout: str, tmp_path: Path) -> None:
    """One error names every tensor that is missing, extra or of another shape."""
    theirs = their_model({"tie_embeddings": False})
    if layout == "theirs":
        theirs.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
    else:
        write_official(tmp_path, theirs)
        tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    prefix = "backbone.layers.1.mixer."
    missing = [prefix + "D", "backbone.norm_f.weight"]
    misshapen = [prefix + "A_log", "lm_head.weight"]
    extra = [prefix + "dt_proj.scale", "backbone.layers.2.norm.weight"]
    for name in missing:
        del tensors[name]
    for name in misshapen:
        tensors[name] = tensors[name][:-1].clone()
    for name in extra:
        tensors[name] = torch.ones(3)
    if layout == "theirs":
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(mamba.UserError) as error:
        mamba.Mamba.from_pretrained(str(tmp_path))
    text = str(error.value)
    for names, word in (missing, "missing"), (extra, "extra"), (misshapen, "must be"):
        for name in names:
            assert any(name in part and word in part for part in text.split(";")), f"{name} is not named as {word}"
    assert prefix + "in_proj.weight" not in text, "a tensor that fits is named"


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    their_model({}).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(mamba.UserError, match=shard.name):
        mamba.Mamba.from_pretrained(str(tmp_path))
