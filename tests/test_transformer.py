"""transformer.py: attention and its parts against slow loops, the cache, and the jobs."""

import ast
import cmath
import copy
import inspect
import itertools
import json
import math
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mamba
import transformer
from tests._helpers import close, far_from_zero, sentences, text
from tests.test_mamba import jobs, press_ctrl_c, saved, write_bin
from transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALING |= {"original_max_position_embeddings": 32}
PLUS = {"position": "rope", "mlp": "swiglu", "norm": "rmsnorm"}
VANILLA = {"position": "learned", "mlp": "gelu", "norm": "layernorm"}
SWITCHES = [
    dict(zip(PLUS, choice, strict=True))
    for choice in itertools.product(*zip(PLUS.values(), VANILLA.values(), strict=True))
]


def config_of(**changes):
    sizes = {"d_model": 12, "n_layer": 2, "n_head": 2, "d_ff": 20, "vocab_size": 29}
    return TransformerConfig(**sizes | {"max_length": 64} | changes)


def small(**changes):
    return far_from_zero(Transformer(config_of(**changes)))


def drawn(seed):
    """Random sizes and parts; each of the eight sets of parts comes once in eight seeds."""
    r, parts = random.Random(seed), SWITCHES[seed % 8]
    groups, shared = r.randint(1, 3), r.randint(1, 3)
    size = 2 * r.randint(1, 4) if parts["position"] == "rope" else r.randint(1, 7)
    heads = groups * shared
    sizes = {"d_model": heads * size, "n_head": heads, "n_kv_head": groups if shared > 1 else 0}
    sizes |= {"n_layer": r.randint(1, 3), "d_ff": r.randint(1, 30)}
    sizes |= {"rope_theta": r.choice([100.0, 10000.0]), "norm_eps": r.choice([1e-6, 1e-5, 1e-2])}
    sizes |= {"rope_scaling": r.choice([None, SCALING]), "tie_embeddings": r.random() < 0.5}
    return small(**sizes | parts)


each_model = pytest.mark.parametrize("seed", range(16))
each_switch = pytest.mark.parametrize("parts", SWITCHES, ids=lambda parts: "-".join(parts.values()))


# ----- The oracle: the equations, one position and one channel after another, in float64


def slow_frequencies(d, theta, scaling):
    """Radians a position of each pair of channels; Llama 3 scales them by their wavelength."""
    frequencies = []
    for i in range(d // 2):
        frequency = theta ** (-2 * i / d)
        if scaling is not None:
            length = scaling["original_max_position_embeddings"]
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            wavelength = 2 * math.pi / frequency
            if wavelength > length / low:
                frequency /= scaling["factor"]
            elif wavelength >= length / high:
                share = (length / wavelength - low) / (high - low)
                frequency = (1 - share) * frequency / scaling["factor"] + share * frequency
        frequencies.append(frequency)
    return frequencies


def slow_rotation(x, positions, frequencies):
    """x (B, L, H, d): channels i and i + d/2 are a complex number, turned by position * freq."""
    x, half = x.clone(), x.shape[-1] // 2
    for b, t, h, i in itertools.product(*map(range, (*x.shape[:3], half))):
        z = complex(x[b, t, h, i], x[b, t, h, i + half])
        z *= cmath.exp(1j * positions[t] * frequencies[i])
        x[b, t, h, i], x[b, t, h, i + half] = z.real, z.imag
    return x


def slow_attention(q, k, v, sees):
    """q (B, H, L, d), k and v (B, G, M, d); sees(b, t, s): whether query t attends to key s."""
    y, share = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for b, h, t in itertools.product(*map(range, q.shape[:3])):
        keys = [s for s in range(k.shape[2]) if sees(b, t, s)]
        scores = [(q[b, h, t] @ k[b, h // share, s]).item() for s in keys]
        weights = [math.exp(score / math.sqrt(q.shape[-1])) for score in scores]
        for s, weight in zip(keys, weights, strict=True):
            y[b, h, t] += weight / sum(weights) * v[b, h // share, s]
    return y


def slow_norm(x, weights, name, eps):
    """RMSNorm, or LayerNorm where the weights have a bias of that name."""
    bias, y = weights.get(f"{name}.bias"), torch.empty_like(x)
    for row, out in zip(x.flatten(0, -2), y.flatten(0, -2), strict=True):
        row = row if bias is None else row - sum(row) / len(row)
        out.copy_(row / math.sqrt(sum(row * row).item() / len(row) + eps))
    return y * weights[f"{name}.weight"] + (0 if bias is None else bias)


def slow_linear(x, weights, name):
    y = torch.einsum("...i,oi->...o", x, weights[f"{name}.weight"])
    return y + weights.get(f"{name}.bias", 0)


def slow_mlp(x, weights, name):
    """FFN_SwiGLU of 2002.05202, or GELU by the error function where there is no gate."""
    up = slow_linear(x, weights, f"{name}.up_proj")
    if f"{name}.gate_proj.weight" in weights:
        gate = slow_linear(x, weights, f"{name}.gate_proj")
        up *= gate / (1 + torch.exp(-gate))
    else:
        up.apply_(lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))))
    return slow_linear(up, weights, f"{name}.down_proj")


def slow_logits(model, tokens):
    config, weights, L = model.config, model.state_dict(), tokens.shape[1]
    x = weights["model.embed_tokens.weight"][tokens]
    if config.position == "learned":
        x = x + weights["model.embed_positions.weight"][:L]
    frequencies = slow_frequencies(config.head_size, config.rope_theta, config.rope_scaling)
    for i in range(config.n_layer):
        layer, heads = f"model.layers.{i}", {}
        y = slow_norm(x, weights, f"{layer}.input_layernorm", config.norm_eps)
        for name in "qkv":
            heads[name] = slow_linear(y, weights, f"{layer}.self_attn.{name}_proj")
            heads[name] = heads[name].unflatten(-1, (-1, config.head_size))
            if config.position == "rope" and name != "v":
                heads[name] = slow_rotation(heads[name], range(L), frequencies)
        heads = [v.transpose(1, 2) for v in heads.values()]
        y = slow_attention(*heads, lambda b, t, s: s <= t).transpose(1, 2).flatten(2)
        x = x + slow_linear(y, weights, f"{layer}.self_attn.o_proj")
        y = slow_norm(x, weights, f"{layer}.post_attention_layernorm", config.norm_eps)
        x = x + slow_mlp(y, weights, f"{layer}.mlp")
    x = slow_norm(x, weights, "model.norm", config.norm_eps)
    return slow_linear(x, weights, "lm_head")


@each_model
def test_the_model_is_the_equations(seed):
    model, tokens = drawn(seed), text(2, 9)
    close(model(tokens), slow_logits(model, tokens), tolerance_of(model))


def tolerance_of(model):
    return 1e-4 if model.config.position == "rope" else 1e-10  # the angles are float32


@pytest.mark.parametrize("scaling", [None, SCALING])
@pytest.mark.parametrize("seed", range(4))
def test_rotation_is_complex_multiplication(seed, scaling):
    r = random.Random(seed)
    L, H, d, theta = r.randint(1, 7), r.randint(1, 3), 2 * r.randint(1, 5), r.choice([10.0, 1e4])
    config = config_of(d_model=H * d, n_head=H, rope_theta=theta, rope_scaling=scaling)
    positions, x = torch.randint(40, (L,)), torch.randn(2, L, H, d).double()
    frequencies = slow_frequencies(d, theta, scaling)
    for far, tolerance in ((0, 1e-5), (100_003, 2e-2)):  # in bfloat16 positions would be equal
        ours = transformer.rotate(x, *transformer.rotary_angles(config, positions + far))
        close(ours, slow_rotation(x, (positions + far).tolist(), frequencies), tolerance)


@pytest.mark.parametrize("seed", range(8))
def test_attention_is_the_loop(seed):
    r = random.Random(seed)
    G, L, past, d = r.randint(1, 3), r.randint(1, 6), r.choice([0, 0, 3]), r.randint(1, 5)
    q = torch.randn(2, G * r.randint(1, 3), L, d).double()
    k, v = torch.randn(2, 2, G, past + L, d).double()
    truth = slow_attention(q, k, v, lambda b, t, s: s <= past + t)
    if past == 0:
        close(transformer.attend(q, k, v), truth)
    close(transformer.attend(q[:, :, -1:], k, v), truth[:, :, -1:])  # the last sees all
    mask = torch.rand(2, 1, L, past + L) < 0.5
    mask[..., 0] = True
    truth = slow_attention(q, k, v, lambda b, t, s: mask[b, 0, t, s])
    close(transformer.attend(q, k, v, mask), truth)


# ----- The model


@each_model
def test_documents_in_one_row_are_documents_apart(seed):
    model, tokens, starts = drawn(seed), text(3, 22), torch.rand(3, 22) < 0.2
    starts[:, 5] = True
    whole = model(tokens, starts=starts)
    for b in range(3):  # each row starts its documents where it wants
        cuts = [0, *(t for t in range(1, 22) if starts[b, t]), 22]
        apart = [model(tokens[b : b + 1, a:e]) for a, e in itertools.pairwise(cuts)]
        close(whole[b : b + 1], torch.cat(apart, 1), tolerance_of(model))
    with pytest.raises(ValueError, match="starts"):
        model(tokens, model.init_cache(3, 22), starts)


@each_switch
def test_gradients_of_the_model_are_the_finite_differences(parts):
    """Along a random direction in each parameter."""
    model = small(n_kv_head=1, d_ff=5, n_layer=1, **parts).requires_grad_(True)
    tokens, starts = text(2, 7), torch.tensor([[0, 0, 0, 1, 0, 0], [0] * 6]).bool()

    def loss():
        return model(tokens[:, :-1], starts=starts, targets=tokens[:, 1:])

    for parameter in model.parameters():
        (gradient,), direction = torch.autograd.grad(loss(), parameter), torch.randn_like(parameter)
        values = []
        for step in (1e-5, -2e-5):
            parameter.data += step * direction
            values.append(loss().item())
        parameter.data += 1e-5 * direction
        slope, ours = (values[0] - values[1]) / 2e-5, (gradient * direction).sum().item()
        assert ours == pytest.approx(slope, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 513), (3, 400)])
@pytest.mark.parametrize("parts", [PLUS, VANILLA | {"tie_embeddings": False}])
def test_the_loss_with_targets_is_the_cross_entropy(parts, shape):
    model, tokens = small(max_length=513, **parts).requires_grad_(True), text(*shape)
    targets, parameters = text(*shape), list(model.parameters())
    loss = model(tokens, targets=targets)
    truth = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    close(loss, truth)
    close(torch.autograd.grad(loss, parameters), torch.autograd.grad(truth, parameters))


@each_switch
def test_a_bfloat16_model_stays_close_and_its_residual_stream_float32(parts):
    wide, tokens, seen = small(d_model=24, n_kv_head=1, **parts).float(), text(2, 12), []
    model = copy.deepcopy(wide).bfloat16()
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: seen.extend([args[0].dtype, out.dtype]))
    truth, logits, cached = wide(tokens), model(tokens), in_pieces(model, tokens, [3, 4, 5, 6])
    assert set(seen) == {torch.float32} and logits.dtype == cached.dtype == torch.bfloat16
    assert (logits.float() - truth).norm() < 0.1 * truth.norm()
    assert (cached.float() - truth).norm() < 0.1 * truth.norm()


@pytest.mark.parametrize("parts", [PLUS, VANILLA])
def test_initialisation(parts):
    """Normal of 0.02, smaller by sqrt(2 layers) where the residual stream is written to."""
    sizes = {"d_model": 96, "n_layer": 8, "d_ff": 0, "vocab_size": 999, "tie_embeddings": False}
    for name, p in Transformer(config_of(**sizes, **parts)).named_parameters():
        if p.ndim == 1:
            assert (p == ("norm" in name and name.endswith("weight"))).all()
        else:
            writes = "o_proj" in name or "down_proj" in name
            assert p.std().item() == pytest.approx(0.02 / (4 if writes else 1), rel=0.05), name
    for tied in (True, False):
        model = Transformer(config_of(tie_embeddings=tied, **parts))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


# ----- Cached decoding and writing text


def in_pieces(model, tokens, cuts, capacity=None):
    """Logits by calls with a cache, cut at `cuts`."""
    L = tokens.shape[1]
    cache = model.init_cache(len(tokens), capacity or L)
    pieces = itertools.pairwise([0, *cuts, L])
    return torch.cat([model(tokens[:, a:b], cache) for a, b in pieces], 1)


@each_model
def test_cached_decoding_is_full_recomputation(seed):
    model, r = drawn(seed), random.Random(seed)
    B, L = r.randint(1, 4), r.randint(5, 24)
    tokens = text(B, L)
    whole = model(tokens)
    close(in_pieces(model, tokens, range(1, L)), whole)  # by single steps
    for _ in range(4):
        cuts = sorted(r.sample(range(1, L), r.randint(1, 4)))
        close(in_pieces(model, tokens, cuts, L + r.randint(0, 3)), whole)


def test_a_cache_outside_no_grad():
    """As README does it: parameters want gradients, and what a cache is used for has none."""
    model, tokens = Transformer(config_of()), text(2, 10)
    logits, whole = in_pieces(model, tokens, [7, 8], 1000), model(tokens)
    close(logits, whole, 1e-5)
    assert whole.requires_grad and not logits.requires_grad


def test_a_full_cache_is_an_error():
    model, tokens = small(), text(2, 9)
    cache = model.init_cache(2, 8)
    model(tokens[:, :8], cache)
    with pytest.raises(ValueError, match="9 positions are too many for a cache of 8"):
        model(tokens[:, 8:], cache)
    with pytest.raises(IndexError):
        small(max_length=8, position="learned")(tokens)


@each_model
def test_greedy_text_is_the_likeliest_token_by_full_recomputation(seed):
    model, prompt = drawn(seed), text(3, 1 if seed % 4 == 0 else 7)
    longer = prompt
    for _ in range(12):
        longer = torch.cat([longer, model(longer)[:, -1:].argmax(-1)], 1)
    for options in ({"temperature": 0}, {"top_k": 1}):
        assert torch.equal(model.generate(prompt, 12, **options), longer)
    seeds = [torch.Generator().manual_seed(number) for number in (1, 1, 2)]
    first, second, other = (model.generate(prompt, 20, generator=number) for number in seeds)
    assert torch.equal(first, second) and not torch.equal(first, other)
    model.lm_head.weight[3] = math.nan
    with pytest.raises(FloatingPointError, match="new token 1 "):
        model.generate(prompt, 2)


# ----- What mamba.py has too, and test_mamba.py tests

SHARED = """
sample_token python_documents drop_repeated_paragraphs split_documents Corpus load_corpus
read_tokens xz_bits window_offsets read_windows learning_rate train_step evaluate start_process
save check_run plot load_model evaluate_checkpoint Tokenizer load_tokenizer train_bpe flag main
"""


@pytest.mark.parametrize("name", [*SHARED.split(), "train"])
def test_what_mamba_has_too_is_the_same_text(name):
    """`train` from where it has a model, but for the scan that is not compiled."""
    ours, theirs = (inspect.getsource(getattr(script, name)) for script in (transformer, mamba))
    theirs = theirs.replace("Mamba", "Transformer")
    if name == "train":
        ours, theirs = (source[source.index("    check_run(") :] for source in (ours, theirs))
        theirs = re.sub(r" +SCANS.*\n", "", theirs)
    assert ours == theirs


# ----- Training and jobs

VANILLA_FLAGS = "--position learned --mlp gelu --norm layernorm"


@pytest.fixture
def run(tmp_path, monkeypatch):
    return jobs(transformer, tmp_path, monkeypatch)


@pytest.mark.parametrize("parts", [PLUS, VANILLA])
def test_matrices_decay_and_nothing_else(parts):
    model = Transformer(config_of(**parts))
    groups = transformer.make_optimizer(model, transformer.Config(weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(p): 0.3 if p.ndim > 1 else 0.0 for p in model.parameters()}


@pytest.mark.parametrize("flags", ["--n-kv-head 1 --document-resets", VANILLA_FLAGS])
def test_an_interrupted_run_goes_on_bit_for_bit(run, tmp_path, monkeypatch, flags):
    whole, parts, flags = tmp_path / "whole", tmp_path / "parts", f"--n-head 2 {flags}"
    assert run("whole", flags) == 0
    press_ctrl_c(transformer, [7], monkeypatch)
    assert run("parts", flags) == 130
    assert run("parts", f"{flags} --resume") == 0
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    assert len(saved(parts)["history"]) == 20
    for name in ("model", "optimizer"):
        close(saved(parts)[name], saved(whole)[name], 0)


def test_smoke_leaves_a_run_alone_and_heeds_other_flags(run, tmp_path):
    words = ["--smoke", "--d-model", "24", "--data", str(tmp_path / "text.txt")]
    assert transformer.main([*words, "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["smoke"]
    content = saved(tmp_path / "out" / "smoke")
    assert len(content["history"]) == 4 and content["model_config"]["d_model"] == 24


@pytest.mark.parametrize("data", ["text.txt", "x.bin", "bare.bin"])
def test_eval_and_sample_agree_with_training_to_the_last_position(run, tmp_path, capsys, data):
    """Where positions are learned, and documents keep apart; tokens may have no tokenizer."""
    ids = np.concatenate([[*sentences(i, 90).encode(), 256] for i in range(40)])
    write_bin(tmp_path, "x", ids)
    write_bin(tmp_path, "bare", ids, tokenizer=None)
    flags = f"--n-head 2 {VANILLA_FLAGS} --length 64 --document-resets"
    assert run("out", flags, data=f"--data {data}") == 0
    trained = json.loads((tmp_path / "out" / "result.json").read_text())["validation"]
    valid = transformer.load_corpus(data, "byte").valid
    write_bin(tmp_path, "valid", valid, tokenizer="byte" if trained["bits_a_byte"] else None)
    found = []
    for flags in ("", "--data valid.bin", "--data valid.bin --length 7"):
        capsys.readouterr()
        assert run("out", flags, job="eval", data="") == 0
        found.append(ast.literal_eval(re.search(r"{.*}", capsys.readouterr().out)[0]))
    assert found[0] == found[1] == trained  # as it was trained, and all of a file
    assert found[2]["tokens"] == trained["tokens"] and found[2]["loss"] != trained["loss"]
    byte = transformer.load_tokenizer("byte", [])
    model, _, _ = transformer.load_model(transformer.Config(out=str(tmp_path / "out")))
    for prompt in ("cat", "x" * 64):
        flags = f"--tokens 300 --temperature 0 --tokenizer byte --prompt {prompt}"
        assert run("out", flags, job="sample", data="") == 0
        ids = model.generate(torch.tensor([[*prompt.encode()]]), 64 - len(prompt), temperature=0)
        written = byte.decode_bytes(ids[0]).decode("utf-8", "replace")
        assert capsys.readouterr().out == written + "\n"


SIZES = {
    "--n-head 5": "n_head 5",
    "--n-head 2 --n-kv-head 3": "n_kv_head 3",
    "--n-head 16": "must be even",  # heads of one channel have no pairs to turn
    "--n-head 2 --position alibi": "position 'alibi'",
    "--n-head 2 --mlp relu": "mlp 'relu'",
}


@pytest.mark.parametrize("flags", SIZES)
def test_sizes_that_do_not_fit_are_one_line(flags, run, capsys):
    assert run("out", flags) == 2
    assert re.fullmatch(rf"transformer\.py: .*{SIZES[flags]}.*\n", capsys.readouterr().err)
