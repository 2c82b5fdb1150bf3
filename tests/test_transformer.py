"""transformer.py: attention and its parts against slow loops, the cache, folders, data, jobs."""

import cmath
import copy
import dataclasses
import functools
import inspect
import itertools
import json
import math
import random
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import mamba
import transformer
from tests._helpers import close, far_from_zero, sentences, text
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
    ours = transformer.rotate(x, *transformer.rotary_angles(config, positions))
    truth = slow_rotation(x, positions.tolist(), slow_frequencies(d, theta, scaling))
    close(ours, truth, 1e-5)


def test_llama_3_scales_three_regimes_and_far_positions_keep_their_angles():
    scaling = SCALING | {"original_max_position_embeddings": 8192}
    config = config_of(d_model=128, n_head=1, rope_theta=5e5, rope_scaling=scaling)
    positions = [1, 257, 4_097, 100_003]
    truth = torch.tensor(slow_frequencies(128, 5e5, scaling)).double()
    ratio = truth / torch.tensor(slow_frequencies(128, 5e5, None)).double()
    kept, scaled = torch.isclose(ratio, torch.ones(64).double()), ratio < 0.1251
    assert kept.any() and scaled.any() and not (kept | scaled).all()
    cos, sin = transformer.rotary_angles(config, torch.tensor(positions))
    angles = torch.outer(torch.tensor(positions).double(), truth)
    close(cos[:, 0].double(), angles.cos().repeat(1, 2), 2e-2)  # in bfloat16 257 would be 256
    close(sin[:, 0].double(), torch.cat([-angles.sin(), angles.sin()], 1), 2e-2)


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
def test_the_past_does_not_see_the_future(seed):
    model, tokens, starts = drawn(seed), text(2, 20), torch.rand(2, 20) < 0.1
    for marks in (None, starts):
        logits = model(tokens, starts=marks)
        for t in (1, 10, 19):
            changed = tokens.clone()
            changed[:, t:] = (changed[:, t:] + 1) % 29
            again = model(changed, starts=marks)
            close(again[:, :t], logits[:, :t], 1e-12)
            assert (again[:, t] - logits[:, t]).abs().max() > 1e-3


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
    tokens, starts = text(2, 7), torch.zeros(2, 6, dtype=torch.bool)
    starts[0, 3] = True

    def loss():
        return model(tokens[:, :-1], starts=starts, targets=tokens[:, 1:])

    gradients = torch.autograd.grad(loss(), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        direction, values = torch.randn_like(parameter), []
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
    model = Transformer(config_of(**sizes, **parts))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == ("norm" in name and name.endswith("weight"))).all()
        else:
            writes = "o_proj" in name or "down_proj" in name
            assert p.std().item() == pytest.approx(0.02 / (4 if writes else 1), rel=0.05), name
            assert abs(p.mean().item()) < 0.001
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    tied = Transformer(config_of(**parts))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_parameter_counts_are_the_published_ones():
    gpt2 = {"vocab_size": 50257, "max_length": 1024} | VANILLA
    smollm = {"d_model": 576, "n_layer": 30, "n_head": 9, "n_kv_head": 3, "vocab_size": 49152}
    with torch.device("meta"):
        models = [Transformer(TransformerConfig(**sizes)) for sizes in (gpt2, smollm)]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts == [124_439_808, 134_515_008]  # GPT-2 small, SmolLM2-135M


@pytest.mark.parametrize("words", ["n_head 5", "n_kv_head 4", "position alibi", "mlp relu"])
def test_sizes_that_do_not_fit_are_named(words):
    name, value = words.split()
    with pytest.raises(ValueError, match=f"{name} '?{value}"):
        config_of(**{name: int(value) if value.isdigit() else value})
    with pytest.raises(ValueError, match="must be even"):
        config_of(n_head=4)  # heads of 3 channels have no pairs
    assert config_of(n_head=4, position="learned").head_size == 3


@pytest.mark.parametrize("parts", [PLUS, VANILLA | {"n_kv_head": 1}])
def test_a_tiny_batch_is_learnt_by_heart(parts):
    model, tokens = Transformer(config_of(d_model=32, d_ff=64, **parts)), text(2, 33)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


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
    close(in_pieces(model, tokens, []), whole)
    close(in_pieces(model, tokens, range(1, L)), whole)  # by single steps
    for _ in range(4):
        cuts = sorted(r.sample(range(1, L), r.randint(1, 4)))
        close(in_pieces(model, tokens, cuts, L + r.randint(0, 3)), whole)


def test_a_cache_outside_no_grad():
    """As README does it: parameters want gradients, and what a cache is used for has none."""
    model, tokens = Transformer(config_of()), text(2, 10)
    cache = model.init_cache(batch=2, capacity=1000)
    logits = [model(piece, cache) for piece in tokens.split([7, 1, 2], 1)]
    whole = model(tokens)
    close(torch.cat(logits, 1), whole, 1e-5)
    assert whole.requires_grad and not any(piece.requires_grad for piece in logits)
    assert model.generate(tokens, 4).shape == (2, 14)


@pytest.mark.parametrize("length", [1, 3])
def test_a_full_cache_is_an_error(length):
    model, tokens = small(), text(2, 8 + length)
    cache = model.init_cache(2, 8)
    model(tokens[:, :8], cache)
    with pytest.raises(ValueError, match=f"{8 + length}.*8"):
        model(tokens[:, 8:], cache)
    with pytest.raises(IndexError):
        small(max_length=8, position="learned")(tokens)


@each_model
def test_greedy_text_is_the_likeliest_token_by_full_recomputation(seed):
    model, prompt = drawn(seed), text(3, 1 if seed % 4 == 0 else 7)
    longer = prompt
    for _ in range(12):
        longer = torch.cat([longer, model(longer)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(prompt, 12, temperature=0), longer)
    assert torch.equal(model.generate(prompt, 12, top_k=1), longer)
    assert torch.equal(model.generate(prompt, 12, temperature=1.5, top_p=1e-6), longer)
    assert torch.equal(model.generate(prompt[1:2], 12, temperature=0), longer[1:2])


def test_the_generator_decides_the_text():
    model, prompt = small(), text(2, 5)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    texts = [model.generate(prompt, 20, generator=generator) for generator in generators]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    model.lm_head.weight[3] = math.nan
    with pytest.raises(FloatingPointError, match="new token 1 "):
        model.generate(prompt, 2)


# ----- Folders in Llama's layout

FOLDERS = {
    "plain": {},
    "grouped, untied": {"n_kv_head": 1, "tie_embeddings": False, "d_ff": 0, "norm_eps": 1e-6},
    "scaled": {"rope_scaling": SCALING, "rope_theta": 5e5, "max_length": 99},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_written_folder_is_read_back_bitwise(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokens, folder = small(**FOLDERS[name]).float(), text(2, 40), tmp_path / "new" / "folder"
    transformer.write_folder(model, str(folder))
    again = transformer.read_folder(folder)
    close(again.state_dict(), model.state_dict(), 0)
    assert torch.equal(again(tokens), model(tokens))
    tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert tied == model.config.tie_embeddings
    before = {"n_kv_head": model.config.groups, "d_ff": model.config.hidden, "rope_scaling": None}
    config, scaling = dataclasses.replace(model.config, **before), again.config.rope_scaling
    assert dataclasses.replace(again.config, rope_scaling=None) == config
    assert scaling is None if name != "scaled" else scaling.items() >= SCALING.items()
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    close(theirs(tokens).logits.detach(), model(tokens), 1e-4)
    assert theirs.config.bos_token_id is None  # or its `generate` stops at our token 1 or 2
    assert theirs.generation_config.eos_token_id is None


REFUSED_FOLDERS = {  # fields of config.json; what the message must say
    "hidden_act is 'gelu'": {"hidden_act": "gelu"},
    "attention_bias is True": {"attention_bias": True},
    "model_type is 'mistral'": {"model_type": "mistral"},
    "raising an error": {"head_dim": 8},
    "rope type 'linear'": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1}
    },
    "layers.2": {"num_hidden_layers": 3},
    "layers.1": {"num_hidden_layers": 1},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("words", REFUSED_FOLDERS)
def test_folders_that_do_not_fit_are_refused(words, tmp_path):
    pytest.importorskip("transformers")
    transformer.write_folder(small().float(), str(tmp_path))
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | REFUSED_FOLDERS[words]))
    with pytest.raises((ValueError, RuntimeError), match=words):
        transformer.read_folder(tmp_path)
    for part, value in VANILLA.items():
        with pytest.raises(ValueError, match=r"Transformer\+\+"):
            transformer.write_folder(small(**{part: value}), str(tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()


# ----- What mamba.py has too, and test_mamba.py tests

SHARED = """
sample_token python_documents drop_repeated_paragraphs split_documents Corpus load_corpus
read_tokens xz_bits window_offsets read_windows learning_rate train_step evaluate start_process
check_run plot load_model evaluate_checkpoint Tokenizer load_tokenizer train_bpe flag main
"""


@pytest.mark.parametrize("name", SHARED.split())
def test_what_mamba_has_too_is_the_same_text(name):
    ours, truth = (inspect.getsource(getattr(script, name)) for script in (transformer, mamba))
    assert ours == truth.replace("Mamba", "Transformer")


# ----- Training


@pytest.mark.parametrize("parts", [PLUS, VANILLA])
def test_matrices_decay_and_nothing_else(parts):
    model = Transformer(config_of(**parts))
    groups = transformer.make_optimizer(model, transformer.Config(weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    ours = [decay.pop(id(p)) for p in model.parameters()]
    assert ours == [0.3 if p.ndim > 1 else 0.0 for p in model.parameters()] and not decay


# ----- Jobs, as a user runs them

TINY = "--tokenizer byte --d-model 16 --n-layer 1 --n-head 2 --steps 20 --batch 4 --length 32"
TINY += " --lr 1e-2 --tokens 5 --eval-every 5 --eval-tokens 60"
TINY = TINY.split()
VANILLA_FLAGS = "--position learned --mlp gelu --norm layernorm"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A job on a small text; without the picture, which is slow."""
    monkeypatch.setattr(transformer, "plot", lambda *_: None)
    (tmp_path / "text.txt").write_text(sentences(1), "utf-8")

    def run(out, *flags, job="train", data="text.txt"):
        words = [job, *(TINY if job == "train" else []), "--out", str(tmp_path / out)]
        words += ["--data", str(tmp_path / data)] if data else []
        return transformer.main([*words, *flags])

    return run


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return torch.tensor([row["loss"] for row in rows(folder)])


def saved(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def stop_after(monkeypatch, step):
    """Press Ctrl-C during this step, once."""
    train_step = transformer.train_step

    def pressed(*arguments):
        if arguments[-1] + 1 == step:
            monkeypatch.setattr(transformer, "train_step", train_step)
            signal.raise_signal(signal.SIGINT)
        return train_step(*arguments)

    monkeypatch.setattr(transformer, "train_step", pressed)


def test_a_run_writes_its_files_and_can_be_repeated(run, tmp_path, monkeypatch, capsys):
    assert [run("b"), run("c", "--seed", "1")] == [0, 0]
    monkeypatch.undo()
    assert run("a") == 0
    a, b, c = (tmp_path / name for name in "abc")
    names = ["checkpoint.pt", "loss.png", "metrics.jsonl", "result.json"]
    assert sorted(path.name for path in a.iterdir()) == names
    metrics = [(folder / "metrics.jsonl").read_bytes() for folder in (a, b, c)]
    assert metrics[0] == metrics[1] != metrics[2]
    assert [row["step"] for row in rows(a)] == [*range(1, 21)]
    assert losses(a)[-1] < losses(a)[0] - 0.5
    assert [row["step"] for row in rows(a) if "valid_loss" in row] == [5, 10, 15, 20]
    result = json.loads((a / "result.json").read_text())
    assert result["parameters"] == sum(v.numel() for v in saved(a)["model"].values()) - 257 * 16
    assert result["baselines_bits_a_byte"]["xz"] > 0 and len(result["script_sha256"]) == 64
    assert "step 20 · loss" in capsys.readouterr().out
    assert run("out", "--smoke", "--d-model", "7") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["smoke"]
    assert len(rows(tmp_path / "out" / "smoke")) == 4


@pytest.mark.parametrize("flags", ["--n-kv-head 1 --document-resets", VANILLA_FLAGS])
def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(run, tmp_path, monkeypatch, flags):
    flags, whole, parts = flags.split(), tmp_path / "whole", tmp_path / "parts"
    assert run("whole", *flags) == 0
    stop_after(monkeypatch, 7)
    assert run("parts", *flags) == 130
    assert len(rows(parts)) == len(saved(parts)["history"]) == 7
    (parts / "metrics.jsonl").unlink()
    stop_after(monkeypatch, 16)
    assert run("parts", *flags, "--resume") == 130
    (parts / "metrics.jsonl").write_bytes(b"\0" * 60 + b'{"step": 17, "lo')  # damaged
    assert run("parts", *flags, "--resume") == 0
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    for part in ("model", "optimizer"):
        close(saved(parts)[part], saved(whole)[part], 0)


def test_two_processes_are_one_and_so_is_a_batch_in_parts(run, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [transformer.__file__, *TINY, "--data=text.txt", "--out=two", "--accumulate=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 20 · ") == 1  # one process speaks
    assert [run("one"), run("parts", "--accumulate", "4")] == [0, 0]
    for name in ("two", "parts"):
        ours, truth = losses(tmp_path / name), losses(tmp_path / "one")
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=0)
        close(saved(tmp_path / name)["model"], saved(tmp_path / "one")["model"], 1e-3)


@pytest.mark.filterwarnings("ignore")
def test_compiled_training_is_training_and_clip_0_does_not_clip(run, tmp_path, monkeypatch):
    eager = functools.partial(torch.compile, backend="eager")  # the others take half a minute
    monkeypatch.setattr(torch, "compile", eager)
    runs = {"plain": "", "compiled": "--compile", "none": "--clip=0", "much": "--clip=1e9"}
    for name, flag in runs.items():
        assert run(name, "--steps", "5", "--lr", "0.1", *flag.split()) == 0
    plain, compiled, none, much = (losses(tmp_path / name) for name in runs)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=0)
    close(*(saved(tmp_path / name)["model"] for name in ("compiled", "plain")), 1e-3)
    assert torch.equal(none, much) and not torch.equal(none, plain)


def test_divergence_keeps_the_last_good_checkpoint(run, tmp_path, monkeypatch, capsys):
    usual, out, rates = transformer.learning_rate, tmp_path / "out", {}
    monkeypatch.setattr(transformer, "learning_rate", lambda i, c: rates.get(i) or usual(i, c))
    for bad, rate, error in ((6, 1e30, "diverged at step 8: .*nan"), (9, math.inf, "loss .* nan")):
        rates |= {6: None, bad: rate}
        assert run("out") == 1 and re.search(error, capsys.readouterr().err)
        assert len(saved(out)["history"]) == 5
        assert all(v.isfinite().all() for v in saved(out)["model"].values())
    rates.clear()
    assert run("out", "--resume") == 0


def numbers(output):
    """The dictionary of scores at the end of a line."""
    return json.loads(output[output.index("{") : output.index("}") + 1].replace("'", '"'))


def test_learned_positions_are_evaluated_and_sampled_to_their_end(run, tmp_path, capsys):
    flags = [*VANILLA_FLAGS.split(), "--length", "64", "--tokens", "300", "--prompt", "cat"]
    assert run("out", *flags) == 0 and not capsys.readouterr().err
    trained = json.loads((tmp_path / "out" / "result.json").read_text())["validation"]
    assert run("out", job="eval", data="") == 0
    assert numbers(capsys.readouterr().out) == trained
    corpus = transformer.load_corpus(str(tmp_path / "text.txt"), "byte")
    (tmp_path / "valid.txt").write_bytes(corpus.tokenizer.decode_bytes(corpus.valid))
    assert run("out", job="eval", data="valid.txt") == 0  # all of the file
    assert numbers(capsys.readouterr().out) == trained
    assert run("out", "--length", "7", job="eval", data="valid.txt") == 0
    other = numbers(capsys.readouterr().out)
    assert other["tokens"] == trained["tokens"] and other["loss"] != trained["loss"]
    model, tokenizer, _ = transformer.load_model(tmp_path / "out" / "checkpoint.pt")
    for prompt in ("cat", "x" * 64):
        flags = ["--tokens", "300", "--temperature", "0", "--prompt", prompt]
        assert run("out", *flags, job="sample", data="") == 0
        ids = model.generate(torch.tensor([[*prompt.encode()]]), 64 - len(prompt), temperature=0)
        expected = tokenizer.decode_bytes(ids[0]).decode("utf-8", "replace") + "\n"
        assert capsys.readouterr().out == expected


def test_a_folder_writes_and_is_evaluated(run, tmp_path, capsys):
    """With the tokenizer.json beside it, which may have more ids than the model has rows."""
    pytest.importorskip("transformers")
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=256)
    bpe.train_from_iterator([], trainer)
    bpe.add_special_tokens(["[PAD]"])
    model = small(vocab_size=256).float()
    transformer.write_folder(model, str(tmp_path / "hf"))
    bpe.save(str(tmp_path / "hf" / "tokenizer.json"))
    flags = ["--checkpoint", str(tmp_path / "hf"), "--temperature", "0", "--tokens", "9"]
    assert run("x", *flags, "--prompt", "Hé", job="sample") == 0
    ids = model.generate(torch.tensor([bpe.encode("Hé").ids]), 9, temperature=0)[0]
    assert capsys.readouterr().out == bpe.decode(ids.tolist()) + "\n"
    assert run("x", *flags, job="eval") == 0  # of text without [PAD]
    assert numbers(capsys.readouterr().out)["loss"] > 0
    assert run("x", *flags, "--prompt", "a [PAD]", job="sample") == 2
    assert "beyond the model's 256" in capsys.readouterr().err


BAD = {  # flags after the usual ones; what the line must say
    "--data nowhere.txt": "nowhere.txt",
    "--data empty.txt": "are too few for --length 32",
    "--n-head 5": "n_head 5",
    "--out text.txt": "text.txt",
    "--out junk --resume": "junk/checkpoint.pt holds no model",
    "--out good --resume --lr 0.5": "lr was 0.01 and is 0.5",
    "--out good --resume --data longer.txt": "data",
    "sample --checkpoint junk": "config.json",
    "sample --out good --prompt ''": "prompt is empty",
    "eval --out good --data empty.txt": "1 tokens, and so none",
}


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    texts = {"text": sentences(1), "longer": sentences(1) * 2, "empty": ""}
    for name, content in texts.items():
        (folder / f"{name}.txt").write_text(content, "utf-8")
    (folder / "junk").mkdir()
    (folder / "junk" / "checkpoint.pt").write_bytes(b"not tensors at all")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(transformer, "plot", lambda *_: None)
        assert transformer.main([*TINY, "--data", "text.txt", "--steps", "1", "--out", "good"]) == 0
    return folder


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(flags, bad_inputs, monkeypatch, capsys):
    monkeypatch.chdir(bad_inputs)
    words = shlex.split(flags)
    if words[0] not in transformer.JOBS:
        words = [*TINY, "--steps", "1", "--data", "text.txt", "--out", "out", *words]
    assert transformer.main(words) == 2
    line = capsys.readouterr().err
    assert re.fullmatch(r"transformer\.py: .*\n", line) and BAD[flags] in line, line
