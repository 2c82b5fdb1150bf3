"""Transformer++'s own: attention and its parts against slow loops, cached decoding against the whole, and folders."""

import cmath
import copy
import dataclasses
import itertools
import json
import math
import random
import re

import pytest
import torch
import torch.nn.functional as F

import transformer
from tests._helpers import close, far_from_zero, text
from transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
VANILLA = {"position": "learned", "mlp": "gelu", "norm": "layernorm"}
PLUS = {name: choices[0] for name, choices in transformer.PARTS.items()}
SWITCHES = [dict(zip(PLUS, choice, strict=True)) for choice in itertools.product(*transformer.PARTS.values())]


def config_of(**changes):
    sizes = {"d_model": 12, "n_layer": 2, "n_head": 2, "d_ff": 20, "vocab_size": 29, "max_length": 64}
    return TransformerConfig(**sizes | changes)


def small(**changes):
    return far_from_zero(Transformer(config_of(**changes)))


def drawn(seed):
    """Random sizes and parts; each of the eight sets of parts comes once in eight seeds."""
    r = random.Random(seed)
    parts = SWITCHES[seed % 8]
    groups, shared = r.randint(1, 3), r.randint(1, 3)
    size = 2 * r.randint(1, 4) if parts["position"] == "rope" else r.randint(1, 7)
    sizes = {"d_model": groups * shared * size, "n_head": groups * shared, "n_kv_head": groups if shared > 1 else 0}
    sizes |= {"n_layer": r.randint(1, 3), "d_ff": r.randint(1, 30), "tie_embeddings": r.random() < 0.5}
    sizes |= {"rope_theta": r.choice([100.0, 10000.0]), "norm_eps": r.choice([1e-6, 1e-5, 1e-2])}
    sizes["rope_scaling"] = SCALING if r.random() < 0.5 else None
    return small(**sizes | parts)


each_model = pytest.mark.parametrize("seed", range(16))
each_switch = pytest.mark.parametrize("parts", SWITCHES, ids=lambda parts: "-".join(parts.values()))

# ----- The oracle: the equations, one position and one channel after another ------------------------------------------


def slow_frequencies(d, theta, scaling):
    """Radians a position of each pair of channels; with scaling, Llama 3's three regimes by the wavelength."""
    frequencies = []
    for i in range(d // 2):
        frequency = theta ** (-2 * i / d)
        if scaling is not None:
            length, low, high = (
                scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
            )
            wavelength = 2 * math.pi / frequency
            if wavelength > length / low:
                frequency /= scaling["factor"]
            elif wavelength >= length / high:
                share = (length / wavelength - low) / (high - low)
                frequency = (1 - share) * frequency / scaling["factor"] + share * frequency
        frequencies.append(frequency)
    return frequencies


def slow_rotation(x, positions, frequencies):
    """x (B, L, H, d): channels i and i + d/2 are a complex number, turned by position times frequency."""
    x, half = x.clone(), x.shape[-1] // 2
    for b, t, h, i in itertools.product(*map(range, (*x.shape[:3], half))):
        z = complex(x[b, t, h, i], x[b, t, h, i + half]) * cmath.exp(1j * positions[t] * frequencies[i])
        x[b, t, h, i], x[b, t, h, i + half] = z.real, z.imag
    return x


def slow_attention(q, k, v, sees):
    """q (B, H, L, d), k and v (B, G, M, d); sees(b, t, s): whether query t attends to key s."""
    y, share = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for b, h, t in itertools.product(*map(range, q.shape[:3])):
        keys = [s for s in range(k.shape[2]) if sees(b, t, s)]
        scores = [sum(q[b, h, t] * k[b, h // share, s]).item() / math.sqrt(q.shape[-1]) for s in keys]
        weights = [math.exp(score - max(scores)) for score in scores]
        for s, weight in zip(keys, weights, strict=True):
            y[b, h, t] += weight / sum(weights) * v[b, h // share, s]
    return y


def slow_norm(x, weights, name, eps):
    """RMSNorm, or LayerNorm where the weights have a bias of that name."""
    bias = weights.get(f"{name}.bias")
    y = torch.empty_like(x)
    for row, out in zip(x.flatten(0, -2), y.flatten(0, -2), strict=True):
        row = row if bias is None else row - sum(row) / len(row)
        out.copy_(row / math.sqrt(sum(row * row).item() / len(row) + eps))
    return y * weights[f"{name}.weight"] + (0 if bias is None else bias)


def slow_linear(x, weights, name):
    return torch.einsum("...i,oi->...o", x, weights[f"{name}.weight"]) + weights.get(f"{name}.bias", 0)


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
    config, weights = model.config, model.state_dict()
    x = weights["model.embed_tokens.weight"][tokens]
    if config.position == "learned":
        x = x + weights["model.embed_positions.weight"][: tokens.shape[1]]
    frequencies = slow_frequencies(config.head_size, config.rope_theta, config.rope_scaling)
    for i in range(config.n_layer):
        layer = f"model.layers.{i}"
        y = slow_norm(x, weights, f"{layer}.input_layernorm", config.norm_eps)
        q, k, v = (
            slow_linear(y, weights, f"{layer}.self_attn.{p}_proj").unflatten(-1, (-1, config.head_size)) for p in "qkv"
        )
        if config.position == "rope":
            q, k = (slow_rotation(heads, range(tokens.shape[1]), frequencies) for heads in (q, k))
        y = slow_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), lambda b, t, s: s <= t)
        x = x + slow_linear(y.transpose(1, 2).flatten(2), weights, f"{layer}.self_attn.o_proj")
        y = slow_norm(x, weights, f"{layer}.post_attention_layernorm", config.norm_eps)
        x = x + slow_mlp(y, weights, f"{layer}.mlp")
    return slow_linear(slow_norm(x, weights, "model.norm", config.norm_eps), weights, "lm_head")


@each_model
def test_the_model_is_the_equations(seed):
    model, tokens = drawn(seed), text(2, 9)
    in_float32 = model.config.position == "rope" or model.config.norm == "rmsnorm"  # angles, and the root of eps
    close(model(tokens), slow_logits(model, tokens), 2e-6 if in_float32 else 1e-10)


@pytest.mark.parametrize("scaling", [None, SCALING, SCALING | {"original_max_position_embeddings": 8192, "factor": 32}])
@pytest.mark.parametrize("theta", [100.0, 10000.0, 500000.0])
@pytest.mark.parametrize("d", [2, 6, 64, 128])
def test_rotary_frequencies(d, theta, scaling):
    ours = transformer.rotary_frequencies(config_of(d_model=d, n_head=1, rope_theta=theta, rope_scaling=scaling))
    truth = torch.tensor(slow_frequencies(d, theta, scaling))
    torch.testing.assert_close(ours, truth, rtol=2e-6, atol=0)
    if scaling is not None and d == 128 and theta > 100:  # all three regimes are there
        ratio = truth / torch.tensor(slow_frequencies(d, theta, None))
        ends = torch.isclose(ratio, torch.tensor(1.0)), torch.isclose(ratio, torch.tensor(1 / scaling["factor"]))
        assert ends[0].any() and ends[1].any() and not (ends[0] | ends[1]).all()


@pytest.mark.parametrize("seed", range(6))
def test_rotation_is_complex_multiplication(seed):
    r = random.Random(seed)
    L, H, d, scaling = r.randint(1, 7), r.randint(1, 3), 2 * r.randint(1, 5), r.choice([None, SCALING])
    config = config_of(d_model=H * d, n_head=H, rope_theta=r.choice([10.0, 10000.0]), rope_scaling=scaling)
    positions = torch.tensor([r.randint(0, 40) for _ in range(L)])
    x = torch.randn(2, L, H, d).double()
    angles = transformer.rotary_angles(config, positions)
    ours = transformer.rotate(x, *angles)
    close(ours, slow_rotation(x, positions.tolist(), slow_frequencies(d, config.rope_theta, scaling)), 1e-5)
    close(ours.norm(dim=-1), x.norm(dim=-1), 1e-6)


def test_angles_of_far_positions():
    """In float32; half precision tells 256 from 257 no more."""
    positions = [0, 257, 4_097, 100_003]
    cos, sin = transformer.rotary_angles(config_of(d_model=12, n_head=1), torch.tensor(positions))
    angles = torch.tensor([[t * f for f in slow_frequencies(12, 10000.0, None)] for t in positions]).double()
    close(cos[:, 0].double(), angles.cos().repeat(1, 2), 2e-2)
    close(sin[:, 0].double(), torch.cat([-angles.sin(), angles.sin()], 1), 2e-2)


@pytest.mark.parametrize("scaling", [None, SCALING])
def test_scores_depend_on_the_difference_of_positions(scaling):
    config, (q, k) = config_of(d_model=16, n_head=1, rope_scaling=scaling), torch.randn(2, 16).double()

    def score(at, to):
        cos, sin = transformer.rotary_angles(config, torch.tensor([at, to]))
        turned = transformer.rotate(torch.stack([q, k])[None, :, None], cos, sin)[0, :, 0]
        return (turned[0] * turned[1]).sum()

    for gap in (0, 1, 7):
        scores = torch.stack([score(at + gap, at) for at in (0, 1, 13, 200)])
        close(scores, scores[:1].expand(4), 1e-3)
        assert gap == 0 or (score(gap, 0) - score(0, gap)).abs() > 1e-2
    close(score(0, 0), (q * k).sum())


@pytest.mark.parametrize("seed", range(8))
def test_attention_is_the_loop(seed):
    r = random.Random(seed)
    G, L, past, d = r.randint(1, 3), r.randint(1, 6), r.choice([0, 0, 3]), r.randint(1, 5)
    q = torch.randn(2, G * r.randint(1, 3), L, d).double()
    k, v = torch.randn(2, 2, G, past + L, d).double()
    truth = slow_attention(q, k, v, lambda b, t, s: s <= past + t)
    close(transformer.attend(q, k, v, transformer.visible(None, past, L, q.device)), truth)
    if past == 0:
        close(transformer.attend(q, k, v), truth)
    close(transformer.attend(q[:, :, -1:], k, v), truth[:, :, -1:])
    mask = torch.rand(2, 1, L, past + L) < 0.5
    mask[..., 0] = True
    close(transformer.attend(q, k, v, mask), slow_attention(q, k, v, lambda b, t, s: mask[b, 0, t, s]))


@pytest.mark.parametrize("seed", range(8))
def test_a_position_sees_its_document_up_to_itself(seed):
    """document_begins and visible, in two pieces, against a walk over the positions."""
    r = random.Random(seed)
    B, L = r.randint(1, 3), r.randint(2, 12)
    cut, starts = r.randint(1, L - 1), torch.rand(B, L) < r.choice([0.1, 0.5])
    head = transformer.document_begins(starts[:, :cut], None, 0, cut)
    tail = transformer.document_begins(starts[:, cut:], head[:, -1], cut, L - cut)
    mask = transformer.visible(tail, cut, L - cut, starts.device)
    assert mask.shape == (B, 1, L - cut, L)
    for b in range(B):
        begin = 0
        for t in range(L):
            begin = t if starts[b, t] else begin
            assert begin == (head[b, t] if t < cut else tail[b, t - cut])
            assert t < cut or mask[b, 0, t - cut].tolist() == [begin <= s <= t for s in range(L)]
    assert torch.equal(transformer.document_begins(None, head[:, -1], cut, 2), head[:, -1:].expand(B, 2))


# ----- Norms and MLPs -------------------------------------------------------------------------------------------------


def a_norm(size, eps):
    norm = transformer.RMSNorm(size, eps)
    norm.weight.data = torch.randn(size)
    return norm


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 4, 6), (2, 2, 3, 4)])
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.5])
def test_rmsnorm_is_its_formula_forward_and_backward(shape, eps):
    norm, x, upstream = a_norm(shape[-1], eps), torch.randn(shape), torch.randn(shape).double()
    x.flatten(0, -2)[0] *= 1e-4  # eps matters
    with torch.no_grad():
        bare = norm(x)
    x.requires_grad_()
    y = norm(x)
    ours = torch.autograd.grad(y, (x, norm.weight), upstream.float())
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    truth = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    grads = torch.autograd.grad(truth, (wide, weight), upstream)
    for a, b in ((y, truth), (bare, truth), (ours[0], grads[0]), (ours[1], grads[1])):
        assert (a.double() - b).norm() <= 1e-6 * b.norm()
    close(bare, y, 1e-6)


def test_rmsnorm_gradients_are_the_finite_differences():
    norm = a_norm(5, 1e-3).double()
    x = (torch.randn(2, 3, 5).double() * torch.tensor([1.0, 1e-2, 10.0]).double()[:, None]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: transformer.RMSNormFunction.apply(x, w, norm.floor), (x, norm.weight))


def test_rmsnorm_of_zeros_and_of_narrow_parameters():
    norm, x = a_norm(6, 1e-5), torch.zeros(2, 6, requires_grad=True)
    y = norm(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert not y.any() and gradient.isfinite().all()
    x, narrow = torch.randn(3, 6), copy.deepcopy(norm).bfloat16()
    for module in (narrow, transformer.lean(narrow)):
        y = module(x)
        assert y.dtype == torch.bfloat16
        close(y.float(), norm(x), 2e-2)


def test_a_narrow_rmsnorm_rounds_only_its_result():
    norm, x = a_norm(64, 1e-5).bfloat16(), torch.randn(50, 64)
    truth = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.float()
    assert ((norm(x).float() - truth).abs() <= 1.001 * 2**-8 * truth.abs()).all()  # half a unit in the last place


def test_steps_are_the_modules():
    """What `lean` makes of a module computes what the module does."""
    x = torch.randn(3, 12)
    for parts in SWITCHES:
        model = small(**parts).float()
        layer = model.model.layers[0]
        with torch.no_grad():
            for module in (layer.mlp, layer.input_layernorm, layer.self_attn.q_proj, model.lm_head):
                close(transformer.lean(module)(x), module(x), 1e-5)


# ----- Cached decoding ------------------------------------------------------------------------------------------------


def in_pieces(model, tokens, cuts, starts=None, steps_from=None, capacity=None):
    """Logits by calls with a cache, cut at `cuts`; from `steps_from` on by the stepper, a token a call."""
    L, end = tokens.shape[1], tokens.shape[1] if steps_from is None else steps_from
    cache, logits = model.init_cache(len(tokens), capacity or L), []
    for a, b in itertools.pairwise([0, *(c for c in cuts if c < end), end]):
        logits.append(model(tokens[:, a:b], cache, None if starts is None else starts[:, a:b]))
    if end < L:
        step = model.stepper(cache)
        logits += [step(token).unsqueeze(1) for token in tokens[:, end:].unbind(1)]
    assert cache.length == L
    return torch.cat(logits, 1)


@each_model
def test_cached_decoding_is_full_recomputation(seed):
    model, r = drawn(seed), random.Random(seed)
    B, L = r.randint(1, 4), r.randint(5, 24)
    tokens = text(B, L)
    whole = model(tokens)
    for _ in range(4):
        cuts = sorted(r.sample(range(1, L), r.randint(0, 4)))
        close(in_pieces(model, tokens, cuts, capacity=L + r.randint(0, 3)), whole)
        close(in_pieces(model, tokens, cuts, steps_from=r.randint(1, L - 1)), whole)
    close(in_pieces(model, tokens, range(1, L)), whole)


@pytest.mark.parametrize("parts", [PLUS, VANILLA])
def test_steps_and_calls_may_alternate(parts):
    model, tokens = small(n_kv_head=1, **parts), text(3, 14)
    cache = model.init_cache(3, 14)
    step, logits = model.stepper(cache), []  # made before there is anything in the cache
    for a, b in itertools.pairwise([0, 1, 2, 5, 6, 7, 8, 12, 13, 14]):
        logits.append(step(tokens[:, a]).unsqueeze(1) if b == a + 1 else model(tokens[:, a:b], cache))
    close(torch.cat(logits, 1), model(tokens))


@each_model
def test_the_past_does_not_see_the_future(seed):
    model, tokens = drawn(seed), text(2, 20)
    starts = torch.rand(2, 20) < 0.1
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
    """Whole; in calls with a cache; and going on by single tokens after the last start."""
    model, r, L = drawn(seed), random.Random(seed), 22
    tokens, starts, tolerance = text(3, L), torch.rand(3, L) < 0.2, 1e-10
    if model.config.position == "rope":
        tolerance = 1e-4  # its angles are in float32
    truth = torch.empty(3, L, 29).double()
    for b in range(3):  # each row starts its documents where it wants
        cuts = [0, *(t for t in range(1, L) if starts[b, t]), L]
        for a, e in itertools.pairwise(cuts):
            truth[b, a:e] = model(tokens[b : b + 1, a:e])[0]
    whole = model(tokens, starts=starts)
    close(whole, truth, tolerance)
    for _ in range(3):
        cuts = sorted(r.sample(range(1, L), 4))
        close(in_pieces(model, tokens, cuts, starts), whole)
        last = starts.int().argmax(1).max().item() if starts.any() else 0
        end = r.randint(last + 1, L)
        ends_here = starts & (torch.arange(L) < end)
        close(in_pieces(model, tokens, cuts, ends_here, steps_from=end), model(tokens, starts=ends_here))
    assert not torch.isclose(whole, model(tokens)).all()


@pytest.mark.parametrize("parts", [PLUS, VANILLA])
def test_a_start_at_position_0(parts):
    model, tokens = small(**parts), text(2, 9)
    starts = torch.zeros(2, 9, dtype=torch.bool)
    close(model(tokens, starts=starts), model(tokens))
    starts[:, 0] = True
    close(model(tokens, starts=starts), model(tokens))
    cache = model.init_cache(2, 24)
    model(text(2, 6), cache)
    close(model(tokens, cache, starts), model(tokens), 1e-5)  # nothing of the cache is seen
    more = text(2, 3)
    close(model(more, cache), model(torch.cat([tokens, more], 1))[:, 9:], 1e-5)
    step, last = model.stepper(cache), text(2)
    close(step(last), model(torch.cat([tokens, more, last[:, None]], 1))[:, -1], 1e-5)


@pytest.mark.parametrize("parts", [PLUS, VANILLA])
def test_a_full_cache_is_named_and_left_as_it_is(parts):
    model, tokens = small(**parts), text(2, 9)
    cache = model.init_cache(2, 8)
    model(tokens[:, :6], cache)
    with pytest.raises(ValueError, match=r"9 positions.*cache holds 8.*init_cache"):
        model(tokens[:, 6:], cache)
    step = model.stepper(cache)
    logits = [step(token) for token in tokens[:, 6:8].unbind(1)]
    close(torch.stack(logits, 1), model(tokens)[:, 6:8])
    with pytest.raises(ValueError, match=r"9 positions.*cache holds 8.*init_cache"):
        step(tokens[:, 8])


def test_learned_positions_end():
    model, tokens = small(max_length=8, **VANILLA), text(2, 9)
    ends = r"9 positions.*max_length 8.*shorten"
    model(tokens[:, :8])
    assert model.generate(tokens[:, :5], 4).shape == (2, 9)  # the ninth is never read
    for call in (model, lambda x: model.generate(x[:, :5], 5), lambda x: model.init_cache(2, x.shape[1])):
        with pytest.raises(ValueError, match=ends):
            call(tokens)
    assert small(max_length=8)(tokens).shape == (2, 9, 29)  # rotary ones do not
    assert small(max_length=8).generate(tokens, 9).shape == (2, 18)


# ----- Writing text ---------------------------------------------------------------------------------------------------


@each_model
def test_greedy_text_is_the_likeliest_token_by_full_recomputation(seed):
    model, prompt = drawn(seed), text(3, 1 if seed % 4 == 0 else 7)
    longer, length = prompt, prompt.shape[1]
    for _ in range(12):
        longer = torch.cat([longer, model(longer)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(prompt, 12, temperature=0), longer)
    assert torch.equal(model.generate(prompt, 12, top_k=1), longer)
    assert torch.equal(model.generate(prompt, 12, temperature=1.5, top_p=1e-6), longer)
    assert torch.equal(model.generate(prompt[1:2], 12, temperature=0), longer[1:2])
    assert torch.equal(model.generate(prompt, 0), prompt)
    stop = longer[0, length + 2].item()
    stopped = model.generate(prompt, 12, temperature=0, stop_token=stop)
    for ours, truth in zip(stopped[:, length:].tolist(), longer[:, length:].tolist(), strict=True):
        end = truth.index(stop) if stop in truth else len(truth)
        assert ours == truth[:end] + [stop] * (len(ours) - end)
    assert stopped.shape[1] < length + 12 or any(stop not in row for row in longer[:, length:].tolist())


def test_the_generator_decides_the_text():
    model, prompt = small(), text(2, 5)
    options = {"temperature": 1.5, "top_k": 20, "top_p": 0.99}
    texts = [model.generate(prompt, 20, **options, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert torch.equal(texts[0][:, :5], prompt) and texts[0].shape == (2, 25)


@pytest.mark.parametrize("shape", [(2, 0), (3,), (1, 2, 3)])
def test_a_prompt_that_does_not_fit(shape):
    with pytest.raises(ValueError, match=rf"prompt.*{re.escape(str(shape))}.*\(B, L\)"):
        small().generate(text(*shape), 3)


def test_a_model_that_has_gradients_writes_too():
    model, prompt = Transformer(config_of()), text(1, 3)
    assert model.generate(prompt, 4).shape == (1, 7) and model(prompt).requires_grad


# ----- Loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("B", "L"), [(1, 1), (2, 3), (1, 511), (1, 512), (1, 513), (3, 171), (2, 512), (7, 211)])
def test_head_loss_is_the_cross_entropy(B, L, dtype):
    D, V = 1 + 7 * L % 13, 2 + 5 * L % 41
    x, weight = (torch.randn(*shape, dtype=dtype).requires_grad_() for shape in ((B, L, D), (V, D)))
    targets = torch.randint(V, (B, L))
    loss = transformer.head_loss(x, weight, targets)
    truth = F.cross_entropy((x.double() @ weight.double().T).flatten(0, 1), targets.flatten())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(loss, truth.to(dtype), rtol=tolerance, atol=tolerance)
    grads = (torch.autograd.grad(3 * y, (x, weight)) for y in (loss, truth))
    for ours, want in zip(*grads, strict=True):
        assert ours.dtype == dtype and (ours - want).norm() <= tolerance * want.norm()
    with torch.no_grad():
        torch.testing.assert_close(transformer.head_loss(x, weight, targets), loss.detach())


@pytest.mark.parametrize("parts", [PLUS, VANILLA | {"tie_embeddings": False}])
def test_the_loss_with_targets_is_that_of_the_logits(parts):
    model, tokens = small(**parts).requires_grad_(True), text(3, 21)
    starts = torch.rand(3, 20) < 0.1
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = model(inputs, starts=starts, targets=targets)
    truth = F.cross_entropy(model(inputs, starts=starts).flatten(0, 1), targets.flatten())
    close(loss, truth)
    parameters = list(model.parameters())
    close(torch.autograd.grad(loss, parameters), torch.autograd.grad(truth, parameters))


def test_gradients_of_the_model_are_the_finite_differences():
    """Along a random direction in each parameter, for each set of parts."""
    for parts in SWITCHES:
        model, tokens = small(n_kv_head=1, d_ff=5, n_layer=1, **parts).requires_grad_(True), text(2, 7)
        starts = torch.zeros(2, 6, dtype=torch.bool)
        starts[0, 3] = True
        loss = model(tokens[:, :-1], starts=starts, targets=tokens[:, 1:])
        for (name, parameter), gradient in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            direction, values = torch.randn_like(parameter), []
            for sign in (1, -1):
                parameter.data += sign * 1e-5 * direction
                with torch.no_grad():
                    values.append(model(tokens[:, :-1], starts=starts, targets=tokens[:, 1:]).item())
                parameter.data -= sign * 1e-5 * direction
            slope = (values[0] - values[1]) / 2e-5
            assert abs(slope - (gradient * direction).sum().item()) <= 1e-6 * max(1, abs(slope)), (name, parts)


# ----- Half precision -------------------------------------------------------------------------------------------------


@each_switch
def test_a_bfloat16_model_stays_close_and_its_residual_stream_float32(parts):
    wide, tokens, seen = small(d_model=24, n_kv_head=1, **parts).float(), text(2, 12), []
    model = copy.deepcopy(wide).bfloat16()
    for module in model.modules():
        if isinstance(module, transformer.RMSNorm | torch.nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    truth, logits = wide(tokens), model(tokens)
    stepped = in_pieces(model, tokens, [3], steps_from=6)
    assert stepped.dtype == logits.dtype == torch.bfloat16 and {*seen} == {torch.float32}
    assert len(seen) == 5 * (1 + 2 + 6)  # norms, in the whole, the pieces and the steps
    for ours in (logits, stepped):
        assert (ours.float() - truth).norm() <= 3e-2 * truth.norm()
    loss = model(tokens[:, :-1], targets=tokens[:, 1:]).float()
    close(loss, wide(tokens[:, :-1], targets=tokens[:, 1:]), 3e-2)
    assert model.generate(tokens, 4).shape == (2, 16)


# ----- Sizes, parts and initialisation --------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [PLUS, VANILLA])
@pytest.mark.parametrize("n_layer", [1, 8])
def test_initialisation(parts, n_layer):
    sizes = {"d_model": 128, "n_layer": n_layer, "d_ff": 256, "vocab_size": 500, "max_length": 128}
    model = Transformer(config_of(**sizes, **parts, tie_embeddings=False))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * n_layer) if re.search(r"(o|down)_proj", name) else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.04), name
            assert abs(parameter.mean()) < 4 * std / math.sqrt(parameter.numel()), name
    tokens = text(4, 65)
    loss = model(tokens[:, :-1], targets=tokens[:, 1:])
    assert loss.item() == pytest.approx(math.log(500), abs=0.2)


@pytest.mark.parametrize(
    ("d_model", "mlp", "hidden"),
    [
        (768, "swiglu", 2048),
        (192, "swiglu", 512),
        (2048, "swiglu", 5504),
        (48, "swiglu", 128),
        (49, "swiglu", 256),
        (1, "swiglu", 128),
        (768, "gelu", 3072),
        (49, "gelu", 196),
    ],
)
def test_the_automatic_width_of_the_mlp(d_model, mlp, hidden):
    config = config_of(d_model=d_model, n_head=1, d_ff="auto", mlp=mlp, position="learned")
    assert config.hidden == hidden and dataclasses.replace(config, d_ff=77).hidden == 77
    if mlp == "swiglu":
        assert hidden % 128 == 0 and hidden - 128 < 8 * d_model / 3 <= hidden


@each_model
def test_the_number_of_parameters(seed):
    model = drawn(seed)
    c = model.config
    D, V, shared, biased = c.d_model, c.vocab_size, c.groups * c.head_size, c.norm == "layernorm"
    attention = 2 * D * D + 2 * D * shared + biased * 2 * (D + shared)
    mlp = (3 if c.mlp == "swiglu" else 2) * D * c.hidden + biased * (D + (2 if c.mlp == "swiglu" else 1) * c.hidden)
    count = V * D * (1 if c.tie_embeddings else 2) + (c.max_length * D if c.position == "learned" else 0)
    count += c.n_layer * (attention + mlp + 2 * D * (1 + biased)) + D * (1 + biased)
    assert sum(p.numel() for p in model.parameters()) == count


def test_the_papers_125m_has_its_size():
    with torch.device("meta"):
        model = Transformer(TransformerConfig())
    total = sum(p.numel() for p in model.parameters())
    assert total == 50277 * 768 + 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 768 == 123_566_592


@each_switch
def test_each_switch_changes_what_it_should(parts):
    model = small(**parts)
    names = {name for name, _ in model.named_parameters()}
    biased = parts["norm"] == "layernorm"
    assert ("model.embed_positions.weight" in names) == (parts["position"] == "learned")
    assert ("model.layers.0.mlp.gate_proj.weight" in names) == (parts["mlp"] == "swiglu")
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    norms = {n for n, m in model.named_modules() if isinstance(m, transformer.RMSNorm | torch.nn.LayerNorm)}
    assert len(norms) == 5 and len(linears) == 2 * (4 + (3 if parts["mlp"] == "swiglu" else 2))
    assert {n for n in names if n.endswith("bias")} == ({f"{n}.bias" for n in linears | norms} if biased else set())
    tokens = text(1, 8)
    assert model(tokens + 0).shape == (1, 8, 29)
    moved = tokens[:, [1, 0, *range(2, 8)]]  # either kind of position tells order
    if not torch.equal(moved, tokens):
        assert not torch.isclose(model(moved)[:, -1], model(tokens)[:, -1]).all()


def test_tied_embeddings_are_one_tensor():
    tied, untied = small(), small(tie_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


BAD_CONFIGS = {
    "d_model 0": {"d_model": 0},
    "n_layer 0": {"n_layer": 0},
    "n_head -1": {"n_head": -1},
    "vocab_size 0": {"vocab_size": 0},
    "max_length 0": {"max_length": 0},
    "n_head 5": {"n_head": 5},  # does not divide 12
    "n_head 4": {"n_head": 4},  # heads of 3 channels have no pairs
    "n_kv_head 5": {"n_kv_head": 5},
    "n_kv_head 4": {"n_kv_head": 4},
    "n_kv_head -1": {"n_kv_head": -1},
    "d_ff 0": {"d_ff": 0},
    "d_ff 'wide'": {"d_ff": "wide"},
    "position 'alibi'": {"position": "alibi"},
    "mlp 'relu'": {"mlp": "relu"},
    "norm 'batch'": {"norm": "batch"},
    "rope_scaling {'factor': 2.0}": {"rope_scaling": {"factor": 2.0}},
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_sizes_that_do_not_fit_are_named(case):
    with pytest.raises(ValueError) as error:
        config_of(**BAD_CONFIGS[case])
    message = str(error.value)
    assert message.startswith(case) and re.search(r"must|lacks", message) and "; " in message and "\n" not in message


def test_odd_heads_are_for_learned_positions():
    assert config_of(n_head=4, position="learned").head_size == 3


@pytest.mark.parametrize("parts", [PLUS, VANILLA, PLUS | {"tie_embeddings": False, "n_kv_head": 1}])
def test_a_tiny_batch_is_learnt_by_heart(parts):
    model, tokens = Transformer(config_of(d_model=32, d_ff=64, **parts)), text(2, 33)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


# ----- Folders --------------------------------------------------------------------------------------------------------

FOLDERS = {
    "plain": {},
    "grouped, untied": {"n_kv_head": 1, "tie_embeddings": False, "d_ff": "auto", "norm_eps": 1e-6},
    "scaled": {"rope_scaling": SCALING | {"rope_type": "llama3"}, "rope_theta": 5e5, "max_length": 99},
    "scaled, no rope_type": {"rope_scaling": SCALING, "rope_theta": 5e5},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_saved_model_is_read_back_bitwise(name, tmp_path, no_safetensors):
    model = small(**FOLDERS[name]).float()
    model.save_pretrained(str(tmp_path / "new" / "folder"))
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "pytorch_model.bin"]
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert ("lm_head.weight" in tensors) != model.config.tie_embeddings  # once in the file, as in the model
    again, tokens = Transformer.from_pretrained(str(folder)), text(2, 40)
    assert torch.equal(again(tokens), model(tokens))
    config = dataclasses.replace(model.config, n_kv_head=model.config.groups, d_ff=model.config.hidden)
    if config.rope_scaling is not None:
        config = dataclasses.replace(config, rope_scaling=SCALING | {"rope_type": "llama3"})
    assert again.config == config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == config.tie_embeddings


def llama(folder, without=(), **changes):
    """A folder as Hugging Face writes it, with these fields of config.json; its model, fields and tensors."""
    model = small(tie_embeddings=False, n_kv_head=1).float()
    fields = {"model_type": "llama", "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"num_key_value_heads": 1, "intermediate_size": 20, "vocab_size": 29, "max_position_embeddings": 64}
    fields |= {"rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "head_dim": 6}
    fields |= {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "attention_dropout": 0.0}
    fields = {k: v for k, v in (fields | changes).items() if k not in without}
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    return model, tensors


def test_llamas_layout_is_read(tmp_path, no_safetensors):
    tokens = text(2, 9)
    for without in (
        [],
        ["head_dim", "attention_dropout"],
        ["max_position_embeddings", "hidden_act", "rope_parameters"],
    ):
        model, tensors = llama(tmp_path, without)
        assert torch.equal(Transformer.from_pretrained(str(tmp_path))(tokens), model(tokens))
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
    halves = dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])
    for i, half in enumerate(halves):
        torch.save(half, tmp_path / f"shard{i}.bin")
    index = {"weight_map": {k: f"shard{i}.bin" for i, half in enumerate(halves) for k in half}}
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert torch.equal(Transformer.from_pretrained(str(tmp_path))(tokens), model(tokens))
    (tmp_path / "shard1.bin").unlink()
    with pytest.raises(ValueError, match=r"shard1\.bin.*index"):
        Transformer.from_pretrained(str(tmp_path))


def test_what_a_folder_leaves_out_has_llamas_defaults(tmp_path, no_safetensors):
    llama(tmp_path, ["rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "rope_parameters"])
    config = Transformer.from_pretrained(str(tmp_path)).config
    assert (config.norm_eps, config.max_length, config.tie_embeddings) == (1e-6, 2048, False)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)


def test_rope_theta_is_read_from_either_place(tmp_path, no_safetensors):
    llama3 = SCALING | {"rope_type": "llama3"}
    old, older = {"rope_theta": 500.0, "rope_scaling": llama3}, {"rope_theta": 500.0}
    older["rope_scaling"] = SCALING | {"type": "llama3"}
    for changes in (old, older, {"rope_parameters": llama3 | {"rope_theta": 500.0}}):
        llama(tmp_path, () if "rope_parameters" in changes else ("rope_parameters",), **changes)
        config = Transformer.from_pretrained(str(tmp_path)).config
        assert config.rope_theta == 500.0 and config.rope_scaling.items() >= SCALING.items()
        truth = transformer.rotary_frequencies(config_of(rope_theta=500.0, rope_scaling=SCALING))
        assert torch.equal(transformer.rotary_frequencies(config), truth)


UNSUPPORTED = {
    "hidden_act = 'gelu'": {"hidden_act": "gelu"},
    "attention_bias = True": {"attention_bias": True},
    "mlp_bias = True": {"mlp_bias": True},
    "model_type = 'mistral'": {"model_type": "mistral"},
    "head_dim = 8": {"head_dim": 8},
    "quantization_config = {'bits': 4}": {"quantization_config": {"bits": 4}},
    "partial_rotary_factor = 0.5": {"partial_rotary_factor": 0.5},
}
for kind in ("linear", "yarn", "dynamic", "longrope"):
    named = f"rope type '{kind}'"
    UNSUPPORTED[f"{named} (old)"] = {"rope_parameters": None, "rope_scaling": {"type": kind, "factor": 2.0}}
    UNSUPPORTED[f"{named} (later)"] = {"rope_parameters": None, "rope_scaling": {"rope_type": kind, "factor": 2.0}}
    UNSUPPORTED[f"{named} (new)"] = {"rope_parameters": {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_not_supported_is_named(case, tmp_path, no_safetensors):
    llama(tmp_path, **UNSUPPORTED[case])
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(str(tmp_path))
    assert case.split(" (")[0] in str(error.value) and str(tmp_path) in str(error.value)


def test_all_that_is_not_supported_is_named_at_once(tmp_path, no_safetensors):
    llama(tmp_path, ["vocab_size"], hidden_act="gelu", mlp_bias=True, rope_scaling={"type": "yarn"}, rope_parameters={})
    with pytest.raises(ValueError, match=r"(?=.*hidden_act)(?=.*mlp_bias)(?=.*'yarn')(?=.*vocab_size is missing)"):
        Transformer.from_pretrained(str(tmp_path))
    llama(tmp_path, rope_parameters={"rope_type": "llama3", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match=r"lacks low_freq_factor, high_freq_factor, original_max_position_embeddings"):
        Transformer.from_pretrained(str(tmp_path))


def test_all_tensors_that_do_not_fit_are_named(tmp_path, no_safetensors):
    _, tensors = llama(tmp_path)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(12)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(21, 12)
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(str(tmp_path))
    message = str(error.value)
    assert "up_proj.weight is (21, 12), must be (20, 12)" in message and "0.self_attn.q_proj.bias is extra" in message
    assert "model.norm.weight is missing" in message and "lm_head.weight is missing" in message
    assert message.count(" is ") == 4


@pytest.mark.parametrize("changes", [{name: vanilla} for name, vanilla in VANILLA.items()] + [VANILLA])
def test_vanilla_parts_are_not_saved_as_llama(changes, tmp_path):
    with pytest.raises(ValueError) as error:
        small(**changes).save_pretrained(str(tmp_path / "folder"))
    assert all(f"{name} {value}" in str(error.value) for name, value in changes.items())
    assert not (tmp_path / "folder").exists()


def test_folders_that_are_none(tmp_path, no_safetensors):
    with pytest.raises(ValueError, match=r"nowhere.*config\.json"):
        Transformer.from_pretrained(str(tmp_path / "nowhere"))
    llama(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*not a file of tensors"):
        Transformer.from_pretrained(str(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        Transformer.from_pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors.*pip install safetensors"):
        Transformer.from_pretrained(str(tmp_path))
