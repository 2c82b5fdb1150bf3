"""mamba.py: the scan against slow loops, the model against its steps, data, training, jobs."""

import base64
import collections
import copy
import io
import itertools
import json
import lzma
import math
import random
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from functools import cache, partial

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F

import mamba
from tests._helpers import close, far_from_zero, sentences, text

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ("sequential", "chunked", "fused")


# ----- The oracle: the paper's recurrence, one position after another, in float64


def recurrence(
    u, delta, A, B, C, D=0.0, z=None, delta_bias=0.0, delta_softplus=False, initial_state=None,
    starts=None,
):  # fmt: skip
    """Section 3.2: h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = C_t h_t + D u_t."""
    u, step, ys = u.double(), delta.double() + delta_bias, []
    if delta_softplus:
        step = torch.logaddexp(step, torch.zeros_like(step))
    h = torch.zeros(len(u), *A.shape).double() if initial_state is None else initial_state
    for t in range(u.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None, None], torch.zeros_like(h), h)
        h = torch.exp(step[:, t, :, None] * A) * h + (step * u)[:, t, :, None] * B[:, t, None]
        ys.append((C[:, t, None] * h).sum(-1) + D * u[:, t])
    y = torch.stack(ys, 1)
    if z is not None:
        y = y * z * torch.sigmoid(z.double())
    return y, h


def draw(B, L, D, N, seed=0, without=(), positive=False, starts=0.05, scale=1.0, A=1.0):
    """Arguments of `selective_scan`, all but those in `without`."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator)
    x = {"u": normal(B, L, D), "delta": normal(B, L, D) * scale, "A": -A * normal(D, N).exp()}
    x |= {"B": normal(B, L, N), "C": normal(B, L, N), "D": normal(D), "z": normal(B, L, D)}
    x |= {"delta_bias": normal(D), "initial_state": normal(B, D, N), "delta_softplus": not positive}
    x |= {"starts": torch.rand(B, L, generator=generator) < starts}
    if positive:  # step sizes are given as they are
        x |= {"delta": x["delta"].abs(), "delta_bias": x["delta_bias"].abs() * scale}
    return {name: value for name, value in x.items() if name not in without}


def drawn(seed):
    """Random sizes, and each optional argument there or not."""
    r = random.Random(seed)
    L = r.choice([r.randint(1, 12), r.randint(13, 60), r.randint(61, 150)])
    optional = ("D", "z", "delta_bias", "initial_state", "starts")
    without = [name for name in optional if r.random() < 0.4]
    channels = r.randint(1, 70 if L <= 60 else 9)
    return draw(r.randint(1, 4), L, channels, r.randint(1, 20), seed, without, r.random() < 0.3)


HARD = {
    "L = 1": partial(draw, 2, 1, 5, 3),
    "L prime": partial(draw, 1, 197, 7, 16),
    "L 2000": partial(draw, 1, 2000, 2, 2, starts=0.002, without=["z", "delta_bias"]),
    "many channels": partial(draw, 1, 85, 600, 16, without=["D", "z"]),
    "tiles and blocks, filled": partial(draw, 2, 32, 64, 3),
    "tiles and blocks, one too few": partial(draw, 2, 15, 63, 3),
    "tiles and blocks, one too many": partial(draw, 2, 33, 129, 3),
    "exp(delta A) is 0": partial(draw, 2, 40, 6, 4, scale=1e5),
    "exp(delta A) is 0, given": partial(draw, 2, 40, 6, 4, scale=1e5, positive=True),
    "delta near 0": partial(draw, 2, 90, 6, 4, scale=1e-7, positive=True),
    "A near 0": partial(draw, 2, 90, 6, 4, A=1e-6),
    "all starts": partial(draw, 2, 60, 6, 4, starts=1.1),
    "A large": partial(draw, 2, 90, 6, 4, A=1e3),
}
CASES = HARD | {f"drawn {seed}": partial(drawn, seed) for seed in range(25)}
LAYOUTS = (
    lambda x: x,
    lambda x: F.pad(x, (3, 2))[..., 3:-2],  # a slice of a wider projection
    lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    lambda x: x[:1].expand_as(x),
)


def is_float(value):
    return torch.is_tensor(value) and value.is_floating_point()


def differentiate(scan, x, layout=LAYOUTS[0], dtype=None):
    """y, the last state, and the gradients of all tensors of `x` from both of these."""
    leaves = {k: v.to(dtype or v.dtype) for k, v in x.items() if is_float(v)}
    leaves = {k: v.clone().requires_grad_() for k, v in leaves.items()}
    outputs = scan(**x | {k: layout(v) for k, v in leaves.items()})
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return dict(zip(("y", "state", *leaves), (*outputs, *grads), strict=True))


def check(ours, truth, tolerance):
    """Relative error in norm of each tensor; what must be 0 must be exactly 0."""
    for name in truth.keys() | ours.keys():
        size = truth[name].double().norm().item()
        off = (ours[name].double() - truth[name].double()).norm().item()
        assert off <= tolerance * size + 1e-30 * (size > 0), (name, off, size)


def scan_by(backend):
    """Skips the test, visibly, where there is no compiler."""
    if backend == "fused" and not mamba.can_compile("cpu"):
        pytest.skip("no C compiler")
    return partial(mamba.selective_scan, return_final_state=True, backend=backend)


@cache
def case_and_truth(name):
    x, layout = CASES[name](), LAYOUTS[list(CASES).index(name) % 4]
    return x, layout, differentiate(recurrence, x, layout, torch.float64)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scan_is_the_recurrence(name, backend):
    x, layout, truth = case_and_truth(name)
    check(differentiate(scan_by(backend), x, layout), truth, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_inputs_are_computed_in_float32(backend, dtype):
    x, narrow = draw(2, 45, 9, 5), ("u", "delta", "B", "C", "z")
    half = x | {name: x[name].to(dtype) for name in narrow}
    truth = differentiate(scan_by(backend), half | {name: half[name].float() for name in narrow})
    with torch.autocast("cpu", torch.bfloat16):
        ours = differentiate(scan_by(backend), half)
    assert ours["y"].dtype == dtype and ours["state"].dtype == torch.float32
    assert torch.equal(ours["y"], truth["y"].to(dtype))
    assert torch.equal(ours["state"], truth["state"])
    check(ours, truth, 2 * torch.finfo(dtype).eps)


def test_float64_gradients_are_the_finite_differences(monkeypatch):
    monkeypatch.setattr(mamba.ParallelScan, "CHUNK", 1)  # the least, 8 positions
    x = draw(2, 19, 2, 2, starts=0.2)
    names = [name for name, value in x.items() if is_float(value)]
    tensors = [x[name].double().requires_grad_() for name in names]

    def scan(*tensors):
        return scan_by("auto")(**x | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(scan, tensors, fast_mode=False)


# ----- Properties of the scan


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_are_bitwise_equal_and_inputs_are_left_alone(backend):
    x = draw(3, 100, 70, 8)
    before = {k: v.clone() for k, v in x.items() if torch.is_tensor(v)}
    first = differentiate(scan_by(backend), x)
    torch.set_num_threads(2)
    second = differentiate(scan_by(backend), x)
    assert all(torch.equal(first[k], second[k]) for k in first)
    y, state = scan_by(backend)(**x)
    assert torch.equal(y, first["y"]) and torch.equal(state, first["state"])
    assert all(torch.equal(x[k], v) for k, v in before.items())


@pytest.mark.parametrize("backend", ["chunked", "fused"])
def test_states_are_not_kept(backend):
    x, sizes = draw(2, 256, 64, 16), []
    x["u"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda v: sizes.append(v.numel()) or v, id):
        scan_by(backend)(**x)
    assert 0 < sum(sizes) < 16 * x["u"].numel() / 2  # most are inputs of the operations


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(value):
    x = draw(1, 40, 5, 4, without=["starts"])
    x["u"][0, 7, 2] = value
    y, _ = scan_by("fused")(**x)
    assert not y[0, 7:, 2].isfinite().any() and y[0, :7].isfinite().all()
    assert y[..., 3:].isfinite().all()


def test_arguments_that_do_not_fit_are_named():
    x = draw(2, 4, 6, 3)
    narrow = {name: value[..., :1] for name, value in x.items() if torch.is_tensor(value)}
    narrow |= {"u": x["u"][0], "A": x["A"][:5]}
    bad = {rf"\b{name} .* must be": {name: value} for name, value in narrow.items()}
    bad["backend 'cuda' must be"] = {"backend": "cuda"}
    bad["cannot take torch.float64"] = {"backend": "fused", "u": x["u"].double()}
    bad["200 states"] = draw(2, 4, 6, 200) | {"backend": "fused"}
    bad["A negative"] = {"A": 0 * x["A"]}  # or nothing would be forgotten at a start
    for words, changes in bad.items():
        with pytest.raises(ValueError, match=words):
            mamba.selective_scan(**x | changes)


@pytest.mark.parametrize("compiler", ["cc", "no-such-compiler", "false", "cc -no-such-flag"])
def test_the_c_library_is_compiled_or_one_line_says_why_not(
    compiler, tmp_path, monkeypatch, capsys
):
    """A compiler leaves no files; without one the chunked scan runs."""
    scan_by("fused")
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("c_library", "can_compile"):  # as in a new process
        monkeypatch.setattr(mamba, name, cache(getattr(mamba, name).__wrapped__))
    x = draw(2, 50, 70, 4)
    for _ in range(2):
        check(differentiate(scan_by("auto"), x), differentiate(scan_by("sequential"), x), 1e-5)
    errors, compiled = capsys.readouterr().err.splitlines(), compiler == "cc"
    assert mamba.can_compile("cpu") == compiled and len(errors) == (not compiled)
    assert all(error.startswith("selective_scan is chunked, not fused: ") for error in errors)
    assert list(tmp_path.iterdir()) == []


# ----- The model


def small(**changes):
    config = {"d_model": 12, "n_layer": 2, "vocab_size": 29, "d_state": 4} | changes
    return far_from_zero(mamba.Mamba(mamba.MambaConfig(**config)))


def test_the_block_is_figure_3():
    block, x = small().backbone.layers[0].mixer, torch.randn(2, 20, 12).double()
    branch, z = F.linear(x, block.in_proj.weight).chunk(2, -1)
    conv = block.conv1d
    branch = F.silu(F.conv1d(F.pad(branch.mT, (3, 0)), conv.weight, conv.bias, groups=24).mT)
    delta, B, C = F.linear(branch, block.x_proj.weight).split([1, 4, 4], -1)
    delta = F.linear(delta, block.dt_proj.weight)
    A = -block.A_log.exp()
    y, state = recurrence(branch, delta, A, B, C, block.D, z, block.dt_proj.bias, True)
    window = F.linear(x, block.in_proj.weight)[:, -3:, :24]
    close(block(x), (F.linear(y, block.out_proj.weight), (window, state)))


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_parallel_is_step_by_step(taps):
    model, tokens = small(d_conv=taps), text(3, 37)
    logits, state = model(tokens, return_state=True)
    y, after = model(tokens[:, :1], return_state=True)
    for t in range(1, 37):
        close(y[:, -1], logits[:, t - 1])
        step, after = model.step(tokens[:, t], after)
        y = step.unsqueeze(1)
    close((y[:, -1], after), (logits[:, -1], state))
    for cut in (1, 2, 20, 36):
        head, carried = model(tokens[:, :cut], return_state=True)
        tail, after = model(tokens[:, cut:], carried, return_state=True)
        close((torch.cat([head, tail], 1), after), (logits, state))


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_documents_in_one_row_do_not_see_one_another(taps):
    model, tokens, cuts = small(d_conv=taps), text(2, 40), [0, 2, 3, 17, 39]
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[:, cuts] = True
    apart = [model(tokens[:, a:b]) for a, b in itertools.pairwise([*cuts, 40])]
    _, dirty = model(text(2, 9), return_state=True)
    whole = model(tokens, dirty, starts)
    close(whole, torch.cat(apart, 1))
    for cut in (17, 18, 19, 20):  # the convolution's window does not look over a start either
        _, state = model(tokens[:, :cut], None, starts[:, :cut], return_state=True)
        close(model(tokens[:, cut:], state, starts[:, cut:]), whole[:, cut:])


# ----- Writing text


def test_greedy_text_is_the_likeliest_token_by_full_recomputation():
    model, prompt = small(), text(3, 7)
    longer = prompt
    for _ in range(12):
        longer = torch.cat([longer, model(longer)[:, -1:].argmax(-1)], 1)
    for options in ({"temperature": 0}, {"top_k": 1}):
        assert torch.equal(model.generate(prompt, 12, **options), longer)
    assert torch.equal(model.generate(prompt[:1], 12, temperature=0), longer[:1])
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, second, other = (model.generate(prompt, 20, generator=seed) for seed in seeds)
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.6849, 0.2466, 0.0616, 0.0068]),
        ({"top_k": 2}, [0.625, 0.375, 0.0, 0.0]),
        ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 1e-7}, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_tokens_are_drawn_from_the_cut_distribution(options, expected):
    order = [2, 0, 3, 1]
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[torch.tensor(order).argsort()]
    drawn = mamba.sample_token(logits.expand(20_000, 4), **options)
    share = drawn.bincount(minlength=4)[order] / 20_000
    close(share, torch.tensor(expected), 0.015)
    assert (share[torch.tensor(expected) == 0] == 0).all()
    with pytest.raises(ValueError, match="temperature=-1 must"):
        mamba.sample_token(logits, temperature=-1)


# ----- Data

PROSE = "the cat sat on the mat and the dog sat on the log; that is that.\n" * 8
MIXED = "Hello, world! It's 12345 o'clock.\n\n\tdef f(x): naïve café\r\n中文 🙂👩‍👧 <|endoftext|>  "


def test_python_documents_are_topics_and_docstrings(tmp_path, monkeypatch):
    for name in ("b.py", "a.py", "test/c.py", "idlelib/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"'''{name}'''\ndef f():\n  'f of {name}'\nraise OSError")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    *topics, a, b = mamba.python_documents()
    assert (a, b) == ("a.py\n\na.py\n\nf of a.py", "b.py\n\nb.py\n\nf of b.py")
    assert any("context manager" in topic for topic in topics)


@pytest.mark.parametrize("name", ["byte", "bpe:300", "x.tiktoken"])
def test_round_trips(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learnt = mamba.load_tokenizer("bpe:300", [PROSE + MIXED])
    rows = [base64.b64encode(t) + b" %d\n" % i for t, i in learnt.arguments["ranks"].items()]
    (tmp_path / "x.tiktoken").write_bytes(b"".join(rows))
    tokenizer = mamba.load_tokenizer(name, [PROSE + MIXED])
    again, end = mamba.Tokenizer(**tokenizer.arguments), tokenizer.separator
    assert end == tokenizer.vocab_size - 1 == (256 if name == "byte" else 299)
    for words in (MIXED, "", " " * 1_000_000 + "x", *MIXED):
        ids = tokenizer.encode(words)
        assert max(ids, default=0) < end and again.encode(words) == ids
        assert tokenizer.decode_bytes(ids) == words.encode()
        assert name == "byte" or learnt.encode(words) == ids
    parsed = tokenizer.encode(MIXED, special=True)
    assert parsed.count(end) == 1 and tokenizer.decode_bytes([end + 4]) == b""  # of a padded model
    assert tokenizer.decode_bytes(parsed) == MIXED.replace("<|endoftext|>", "").encode()


def test_bpe_joins_the_commonest_pair():
    """Each merge, by recounting every pair of every word."""
    tokenizer, text = mamba.load_tokenizer("bpe:330", [PROSE, MIXED]), PROSE + MIXED
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(mamba.CL100K, text)]
    ranks = tokenizer.arguments["ranks"]
    for token in sorted(ranks, key=ranks.get)[256:]:
        count = collections.Counter(pair for word in words for pair in itertools.pairwise(word))
        best = [pair for pair in count if count[pair] == max(count.values())]
        joined = next(pair for pair in best if b"".join(pair) == token)
        for word in words:
            for i in range(len(word) - 1):
                if tuple(word[i : i + 2]) == joined:
                    word[i : i + 2] = [token]
    ids = tokenizer.encode(text)
    assert [tokenizer.bytes_of[i] for i in ids] == [part for word in words for part in word]
    letters = "".join(random.Random(0).choices("abcdefgh ", k=2000))  # many ties, in an order
    ids = mamba.load_tokenizer("bpe:400", [letters]).bytes_of
    assert zlib.crc32(repr(ids).encode()) == 1259100156  # that each process finds


def test_bpe_cuts_long_words():
    """Of text without spaces, whose one word would take minutes, tokens are at most 32 bytes."""
    assert max(map(len, mamba.load_tokenizer("bpe:263", ["ACGT" * 500]).bytes_of.values())) == 32
    with pytest.raises(ValueError, match="yields only 263 ids"):
        mamba.load_tokenizer("bpe:264", ["ACGT" * 500])


def test_repeated_paragraphs_are_dropped():
    long = "a paragraph of sixty characters and more, which stands in two documents"
    documents = [f"one\n\n{long}\n\nshort", f"two\n\n{long}\n\nshort\n\nshort", long]
    kept = mamba.drop_repeated_paragraphs(documents)
    assert kept == [documents[0], "two\n\nshort\n\nshort"]


@pytest.mark.parametrize("kind", ["rows.jsonl", "folder"])
def test_every_twentieth_document_is_for_validation(kind, tmp_path):
    """But the one that alone would decide the score; and no tokenizer is learnt from them."""
    rows = [f"zqzqzqzq zqzqzqzq {i}" if i % 20 == 19 else f"the cat sat {i}" for i in range(60)]
    rows.insert(30, "a document so long that it alone would decide the score. " * 30 + "End.")
    (tmp_path / "folder").mkdir()
    for i, row in enumerate(rows):
        (tmp_path / "folder" / f"{i:02}.txt").write_text(row)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    corpus = mamba.load_corpus(str(tmp_path / kind), "bpe:262")
    for tokens, held_out in ((corpus.train, False), (corpus.valid, True)):
        ends = np.flatnonzero(tokens == corpus.separator)
        texts = [corpus.tokenizer.decode_bytes(ids).decode() for ids in np.split(tokens, ends + 1)]
        assert texts == [row for row in rows if ("zq" in row) == held_out] + [""]
    assert not any(b"q" in token for token in corpus.tokenizer.bytes_of.values() if len(token) > 1)


def write_bin(folder, name, ids, **changes):
    about = {"dtype": "uint16", "vocab_size": 257, "tokenizer": "byte", "document_separator": 256}
    about |= changes
    np.asarray(ids, about["dtype"]).tofile(folder / f"{name}.bin")
    (folder / f"{name}.json").write_text(json.dumps(about))
    return str(folder / f"{name}.bin")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_bin_is_mapped_not_read(tmp_path, dtype):
    """And cut between packed contexts: a twentieth of these is no whole number of them."""
    ids = np.arange(32 * 101) % 257
    path = write_bin(tmp_path, "x", ids, dtype=dtype, context_length=32)
    corpus = mamba.load_corpus(path, "ignored")
    assert isinstance(corpus.train, np.memmap) and len(corpus.train) == 32 * 95
    assert np.array_equal(np.concatenate([corpus.train, corpus.valid]), ids)
    assert (corpus.tokenizer.vocab_size, corpus.separator, corpus.context_length) == (257, 256, 32)


# ----- Training


def corpus_of(tokens, name="byte", documents=()):
    tokenizer, tokens = mamba.load_tokenizer(name, documents), np.asarray(tokens, np.uint32)
    return mamba.Corpus(tokens, tokens, tokenizer, tokenizer.vocab_size, tokenizer.separator)


@pytest.mark.parametrize("context", [None, 32, 64])
@pytest.mark.parametrize("size", [33, 64, 65, 1024])
def test_an_epoch_reads_each_window_once(size, context):
    """From a position of its own; where contexts are packed at multiples of the length."""
    corpus, config = corpus_of(np.arange(size)), mamba.Config(length=32, batch=3)
    corpus.context_length, count = context, (size - 1) // 32
    steps = [mamba.window_offsets(corpus, config, step) for step in range(2 * count)]
    epochs = np.concatenate(steps).reshape(6, count)
    assert epochs.min() >= 0 and epochs.max() + 33 <= size
    for epoch in epochs:
        assert (np.diff(np.sort(epoch)) == 32).all()
        assert context is None or (epoch % 32 == 0).all()
    assert size < 1024 or len({tuple(epoch) for epoch in epochs}) == 6


@pytest.mark.parametrize("clip", [1.9, 0.0])
def test_a_training_step_is_adamw_written_out(clip):
    """Windows, starts, loss in two pieces, clipping, rate, AdamW (1711.05101, algorithm 2)."""
    tokens = np.random.default_rng(0).choice([256, 7, 8, 9, 10], 900)
    sizes = {"batch": 4, "accumulate": 2, "length": 260, "steps": 8, "warmup": 0.25, "clip": clip}
    rates = {"lr": 1e-2, "min_lr": 1e-3, "weight_decay": 0.3, "beta2": 0.8}
    config = mamba.Config(**sizes, **rates, document_resets=True, seed=3)
    corpus, norms = corpus_of(tokens), []
    trained = mamba.Mamba(mamba.MambaConfig(16, 1, 257, 4)).double()
    model, optimizer = copy.deepcopy(trained), mamba.make_optimizer(trained, config)
    named = list(model.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in named}
    cosine = [1e-3 + 9e-3 * math.cos(math.pi * i / 10) ** 2 for i in range(6)]
    for step, rate in enumerate([5e-3, 1e-2, *cosine], 1):
        offsets = mamba.window_offsets(corpus, config, step - 1)
        windows = torch.from_numpy(np.stack([tokens[o : o + 261] for o in offsets]))
        before = torch.tensor([[tokens[o - 1] if o else 256] for o in offsets])
        starts = torch.cat([before, windows[:, :-2]], 1) == 256
        logits = model(windows[:, :-1], starts=starts)
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(math.sqrt(sum(g.square().sum().item() for g in grads)))
        ours = mamba.train_step(trained, optimizer, corpus, config, step - 1)
        assert ours == pytest.approx((loss.item(), norms[-1]), rel=1e-5)
        scale = min(1.0, clip / norms[-1]) if clip else 1.0
        for (name, p), g in zip(named, grads, strict=True):
            m, v = moments[name]
            m.mul_(0.9).add_(g * scale, alpha=0.1)
            v.mul_(0.8).add_((g * scale) ** 2, alpha=0.2)
            update = m / (1 - 0.9**step) / ((v / (1 - 0.8**step)).sqrt() + 1e-8)
            decay = 0.3 if p.ndim > 1 and not name.endswith("A_log") else 0.0
            p.data -= rate * (decay * p.data + update)
    assert not clip or min(norms) < clip < max(norms)  # clipped, and not
    close(list(trained.parameters()), list(model.parameters()), 1e-5)


@pytest.mark.parametrize(("length", "resets"), [(1, True), (7, False), (64, True), (500, False)])
def test_every_token_but_the_first_is_scored_once(length, resets):
    documents, tokens = [sentences(i, 35) for i in range(5)], []
    tokenizer = mamba.load_tokenizer("bpe:280", documents)
    for document in documents:
        tokens += [*tokenizer.encode(document), 279]
    corpus, model = corpus_of(tokens, "bpe:280", documents), small(vocab_size=280)
    nats, size = 0.0, 0
    for i, (token, target) in enumerate(itertools.pairwise(tokens)):
        begins = resets and (i == 0 or tokens[i - 1] == 279)
        if i % length == 0 or begins:
            logits, state = model(torch.tensor([[token]]), return_state=True)
            logits = logits[:, 0]
        else:
            logits, state = model.step(torch.tensor([token]), state)
        nats -= logits[0].log_softmax(-1)[target].item()
        size += len(tokenizer.decode_bytes([target]))
    config, count = mamba.Config(length=length, document_resets=resets), len(tokens) - 1
    truth = {"loss": nats / count, "bits_a_byte": nats / math.log(2) / size, "tokens": count}
    assert mamba.evaluate(model, corpus, config) == pytest.approx(truth, abs=2e-6)
    assert mamba.evaluate(model, corpus, config, limit=50)["tokens"] == 50


# ----- Jobs, as a user runs them

TINY = "--tokenizer byte --d-model 16 --n-layer 1 --steps 20 --batch 4 --length 32 --lr 1e-2"
TINY = f"{TINY} --tokens 5 --eval-every 5 --eval-tokens 60".split()


def jobs(script, folder, monkeypatch):
    """A function that runs a job on a small text, in that folder, without the slow picture."""
    monkeypatch.setattr(script, "plot", lambda *_: None)
    monkeypatch.chdir(folder)
    (folder / "text.txt").write_text(sentences(1), "utf-8")

    def run(out, flags="", job="train", data="--data text.txt"):
        words = [job, *(TINY if job == "train" else []), "--out", out]
        return script.main([*words, *shlex.split(f"{data} {flags}")])

    return run


@pytest.fixture
def run(tmp_path, monkeypatch):
    return jobs(mamba, tmp_path, monkeypatch)


def saved(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def losses(out):
    return torch.tensor([row["loss"] for row in saved(out)["history"]])


def press_ctrl_c(script, steps, monkeypatch):
    """During these steps, once each."""
    usual, left = script.learning_rate, list(steps)

    def pressed(step, config):
        if step + 1 in left:
            left.remove(step + 1)
            raise KeyboardInterrupt
        return usual(step, config)

    monkeypatch.setattr(script, "learning_rate", pressed)


def test_a_run_writes_its_files_and_eval_agrees(tmp_path, monkeypatch):
    """Also where standard output is not UTF-8."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    (tmp_path / "text.txt").write_text(sentences(1), "utf-8")
    assert mamba.main([*TINY, "--data=text.txt", "--out=out", "--prompt=日本"]) == 0
    assert mamba.main(["eval", "--out=out"]) == 0
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert sorted(files) == ["checkpoint.pt", "loss.png", "metrics.jsonl", "result.json"]
    result = json.loads(files["result.json"].read_text())
    assert result["config"]["d_model"] == 16 and len(result["script_sha256"]) == 64
    rows = [json.loads(row) for row in files["metrics.jsonl"].read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, 21)]
    assert [row["step"] for row in rows if "valid_loss" in row] == [5, 10, 15, 20]
    sys.stdout.seek(0)
    printed = sys.stdout.read()
    assert "step 20/20 · loss" in printed and "\n??" in printed
    assert printed.count(str(result["validation"])) == 2


@pytest.mark.parametrize("flags", ["--seed 1", "--accumulate 2 --document-resets"])
def test_an_interrupted_run_goes_on_bit_for_bit(run, tmp_path, monkeypatch, flags):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("whole", flags) == 0
    press_ctrl_c(mamba, (7, 17), monkeypatch)
    for kept, resume in ((5, ""), (15, " --resume")):
        assert run("parts", flags + resume) == 130
        assert len(losses(parts)) == kept
    (parts / "metrics.jsonl").write_bytes(b"\0" * 60 + b'{"step": 17, "lo')  # damaged
    assert run("parts", f"{flags} --resume --temperature 0 --checkpoint none.pt") == 0  # of samples
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    for name in ("model", "optimizer"):
        close(saved(parts)[name], saved(whole)[name], 0)


@pytest.mark.filterwarnings("ignore")
def test_parts_processes_and_compiled_code_train_alike(run, tmp_path, monkeypatch):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [mamba.__file__, *TINY, "--data=text.txt", "--out=two", "--accumulate=2"]
    two = subprocess.Popen(command, stdout=-1, stderr=-1, text=True)
    eager = partial(torch.compile, backend="aot_eager")  # Inductor takes half a minute
    monkeypatch.setattr(torch, "compile", eager)
    monkeypatch.setattr(mamba, "SCANS", dict(mamba.SCANS))
    assert [run("one"), run("parts", "--accumulate 4"), run("compiled", "--compile")] == [0, 0, 0]
    output, errors = two.communicate()
    assert two.returncode == 0 and output.count("step 20/20 · ") == 1, errors  # one process speaks
    for name in ("two", "parts", "compiled"):
        ours, truth = losses(tmp_path / name), losses(tmp_path / "one")
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=0)
        close(saved(tmp_path / name)["model"], saved(tmp_path / "one")["model"], 1e-3)


def test_numbers_that_are_not_finite_end_a_job(run, tmp_path, monkeypatch, capsys):
    """In one line, with exit code 1, and the last good checkpoint stays."""
    usual, out, rates = mamba.learning_rate, tmp_path / "out", {}
    monkeypatch.setattr(mamba, "learning_rate", lambda i, c: rates.get(i) or usual(i, c))
    for bad, rate, error in ((6, 1e30, "diverged at step 8: .*nan"), (9, math.inf, "loss .* nan")):
        rates |= {6: None, bad: rate}
        assert run("out") == 1
        assert re.fullmatch(rf"mamba\.py: .*{error}.*\n", capsys.readouterr().err)
        assert len(saved(out)["history"]) == 5
        assert all(v.isfinite().all() for v in saved(out)["model"].values())
    rates.clear()
    assert run("out", "--resume") == 0
    content = saved(out)
    content["model"]["backbone.norm_f.weight"][0] = math.nan
    torch.save(content, out / "checkpoint.pt")
    for job in ("sample", "eval"):
        capsys.readouterr()
        assert run("out", job=job) == 1
        assert re.fullmatch(r"mamba\.py: .*(not finite|is nan).*\n", capsys.readouterr().err)


@pytest.mark.parametrize("seed", [0, 1])
def test_training_beats_xz_where_copying_does_not_help(run, tmp_path, seed):
    """Of letters drawn independently: their entropy is the floor, which matches do not reach."""
    letters = random.Random(seed).choices(b"abcdefgh", [30, 20, 15, 12, 10, 6, 4, 3], k=20_000)
    (tmp_path / "text.txt").write_bytes(bytes(letters))
    assert run("out", f"--seed {seed} --d-model 32 --steps 60 --length 64") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    grown = len(lzma.compress(bytes(letters))) - len(lzma.compress(bytes(letters[:19_000])))
    assert result["baselines_bits_a_byte"]["xz"] == pytest.approx(8 * grown / 1000)
    assert result["validation"]["bits_a_byte"] < 8 * grown / 1000 - 0.1


BAD = {  # flags after the usual ones; a word of the line, where it is our own
    "--data empty.txt": "too few",
    "--data rows.jsonl": "",
    "--data beyond.bin": "beyond the model's 257",
    "--data packed.bin": "must divide",
    "--data bare.bin --document-resets": "needs a document_separator",
    "--data grown.txt --out grown --resume": "size of the data was",
    "--out good --resume --lr 0.5": "lr was 0.01 and is 0.5",
    "--out text.txt": "",
    "--tokenizer tokenizer.json": "; pip install tokenizers",
    "--tokenizer bpe:9999999": "this text yields only",
    "--tokenizer bpe:256": "N must be at least 257",
    "--tokenizer two.tiktoken": "every single byte",
    "--d-state 0": "--d-state 0 must be at least 1",
    "--lr nan": "--lr nan must be at least 0",
    "--batch 3 --accumulate 2": "",
    "sample --checkpoint junk/checkpoint.pt": "",
    "sample --checkpoint zero.pt": "",
    "sample --checkpoint junk": "",
    "sample --out bare": "--tokenizer",
    "sample --out good --prompt ''": "prompt is empty",
    "eval --out good --data empty.txt": "1 tokens, and so none",
    "eval --checkpoint plain": "--tokenizer",  # none is trained on the text that it scores
}


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    files = {"text.txt": sentences(1), "grown.txt": sentences(1), "empty.txt": "", "zero.pt": ""}
    files |= {"rows.jsonl": '{"text": "a"}\n\n{"text": 3}\n', "tokenizer.json": "{}"}
    files |= {"junk/checkpoint.pt": "not tensors at all", "two.tiktoken": "YQ== 0\nYg== 1\n"}
    (folder / "junk").mkdir()
    (folder / "plain").mkdir()
    sizes = {"d_model": 12, "n_layer": 1, "vocab_size": 29}
    weights = mamba.Mamba(mamba.MambaConfig(**sizes)).state_dict()
    weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    torch.save(weights, folder / "plain" / "pytorch_model.bin")
    (folder / "plain" / "config.json").write_text(json.dumps(sizes))
    for name, content in files.items():
        (folder / name).write_text(content, "utf-8")
    write_bin(folder, "beyond", [300] * 1000)
    write_bin(folder, "bare", [1] * 1000, tokenizer=None, document_separator=None)
    write_bin(folder, "packed", [1] * 1000, context_length=48)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(mamba, "plot", lambda *_: None)
        for out, data in {"good": "text.txt", "grown": "grown.txt", "bare": "bare.bin"}.items():
            assert mamba.main([*TINY, "--steps=1", f"--data={data}", f"--out={out}"]) == 0
    (folder / "grown.txt").write_text(sentences(1) * 2, "utf-8")
    return folder


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(flags, bad_inputs, monkeypatch, capsys):
    monkeypatch.chdir(bad_inputs)
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if it were not installed
    words = shlex.split(flags)
    if words[0] not in mamba.JOBS:
        words = [*TINY, "--steps=1", "--data=text.txt", "--out=out", *words]
    code, line = mamba.main(words), capsys.readouterr().err
    assert code == 2 and re.fullmatch(r"mamba\.py: .+\n", line) and BAD[flags] in line, line
