"""transformer.py's jobs train, sample and eval, as a user runs them."""

import copy
import dataclasses
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import transformer
from tests._helpers import close, corpus_of, far_from_zero, sentences, text

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPTS = {"transformer": transformer}
MODELS = {
    "transformer": (transformer.Transformer, transformer.TransformerConfig),
}
OWN = {"transformer": {"n_head": 2}}
VANILLA = {"position": "learned", "mlp": "gelu", "norm": "layernorm"}
VANILLA_FLAGS = "--position learned --mlp gelu --norm layernorm"


@pytest.fixture(params=SCRIPTS)
def script(request):
    return SCRIPTS[request.param]


def each(names, common=(), **own):
    """Parametrise over the script and, under `names`, over the cases common to all scripts and each script's own."""
    single = "," not in names
    cases = [(script, case) for script in SCRIPTS for case in (*common, *own.get(script, ()))]
    values = [(script, case) if single else (script, *case) for script, case in cases]
    ids = [f"{script}-{case if single else '-'.join(map(str, case))}" for script, case in cases]
    return pytest.mark.parametrize(f"script,{names}", values, ids=ids, indirect=["script"])


def new_model(script, **config):
    model, sizes = MODELS[script.__name__]
    return model(sizes(**OWN[script.__name__] | config))


def small(script, **changes):
    return far_from_zero(new_model(script, **{"d_model": 12, "n_layer": 2, "vocab_size": 29} | changes))


# ----- Writing text ---------------------------------------------------------------------------------------------------


def test_greedy_text_is_the_likeliest_token_by_full_recomputation(script):
    model, prompt = small(script), text(3, 7)
    longer = prompt
    for _ in range(12):
        longer = torch.cat([longer, model(longer)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(prompt, 12, temperature=0), longer)
    assert torch.equal(model.generate(prompt, 12, top_k=1), longer)
    assert torch.equal(model.generate(prompt, 12, temperature=1.5, top_p=1e-6), longer)
    rows = [model.generate(row[None], 12, temperature=0) for row in prompt]
    assert torch.equal(torch.cat(rows), longer) and torch.equal(model.generate(prompt, 0), prompt)
    stop = longer[0, 9].item()
    stopped = model.generate(prompt, 12, temperature=0, stop_token=stop)
    for ours, truth in zip(stopped[:, 7:].tolist(), longer[:, 7:].tolist(), strict=True):
        end = truth.index(stop) if stop in truth else len(truth)
        assert ours == truth[:end] + [stop] * (len(ours) - end)
    assert stopped.shape[1] < 19 or any(stop not in row for row in longer[:, 7:].tolist())


def test_the_generator_decides_the_text(script):
    model, prompt = small(script), text(2, 5)
    texts = [model.generate(prompt, 20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.6849, 0.2466, 0.0616, 0.0068]),
        ({"top_k": 2}, [0.625, 0.375, 0.0, 0.0]),
        ({"top_p": 0.79}, [0.625, 0.375, 0.0, 0.0]),
        ({"top_p": 0.81}, [0.5263, 0.3158, 0.1579, 0]),
        ({"top_k": 3}, [0.5263, 0.3158, 0.1579, 0]),
        ({"top_k": 3, "top_p": 0.5}, [1.0, 0.0, 0.0, 0.0]),
        ({"top_k": 9, "top_p": 1.0}, [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_tokens_are_drawn_from_the_cut_distribution(script, options, expected):
    order = [2, 0, 3, 1]
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[torch.tensor(order).argsort()].expand(20_000, 4)
    share = script.sample_token(logits, **options).bincount(minlength=4)[order] / 20_000
    close(share, torch.tensor(expected), 0.015)
    assert (share[torch.tensor(expected) == 0] == 0).all()


def test_the_fewest_tokens_that_reach_top_p(script):
    drawn = script.sample_token(torch.zeros(200, 4), top_p=0.5)  # exactly two of four equal ones
    assert len(drawn.unique()) == 2


@pytest.mark.parametrize("bad", [{"temperature": -0.5}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_sampling_options(script, bad):
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"{name}={value}.*must be"):
        script.sample_token(torch.zeros(1, 4), **bad)


# ----- Learning -------------------------------------------------------------------------------------------------------


def test_a_tiny_batch_is_learnt_by_heart(script):
    model, tokens = new_model(script, d_model=32, n_layer=1, vocab_size=29), text(2, 33)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(50):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


MATRICES = {
    "transformer": "embed_tokens.weight q_proj.weight k_proj.weight v_proj.weight o_proj.weight up_proj.weight "
    "down_proj.weight",
}


@each(
    "changes,matrices",
    transformer=[({}, "gate_proj.weight"), (VANILLA, "embed_positions.weight")],
)
def test_what_decays(script, changes, matrices):
    model = new_model(script, d_model=16, n_layer=1, vocab_size=9, **changes)
    optimizer = script.make_optimizer(model, script.Config(weight_decay=0.3), torch.device("cpu"))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decayed = {name for name, p in model.named_parameters() if decay[id(p)] == 0.3}
    ends = {*MATRICES[script.__name__].split(), *matrices.split()}
    assert {".".join(name.split(".")[-2:]) for name in decayed} == ends
    assert len(decay) == len(list(model.parameters())) and {*decay.values()} == {0.3, 0.0}


def test_learning_rate(script):
    config = script.Config(steps=100, lr=2.0, min_lr=0.5, warmup=0.1)
    rates = [script.learning_rate(step, config) for step in range(100)]
    close(torch.tensor(rates[:11]), torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.0]), 1e-6)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.5)
    assert rates[54] == pytest.approx(1.25, abs=0.02) and rates[32] == pytest.approx(
        0.5 + 1.5 * math.cos(math.pi / 8) ** 2, abs=0.02
    )
    assert script.learning_rate(0, script.Config(steps=1, lr=2.0)) == 2.0


def test_a_training_step_is_adamw_written_out(script, tmp_path):
    """Windows, document starts, loss, clipping, rate and AdamW (1711.05101, algorithm 2) for some steps, in float64."""
    tokens = np.random.default_rng(0).choice([256, 7, 8, 9, 10], 900)
    sizes = {"d_model": 16, "n_layer": 1, "batch": 4, "accumulate": 2, "length": 16, "steps": 8, "warmup": 0.25}
    rates = {"lr": 1e-2, "min_lr": 1e-3, "weight_decay": 0.3, "beta2": 0.8, "clip": 1.9, "document_resets": True}
    config = script.Config(**sizes, **rates, **OWN[script.__name__], seed=3, out=str(tmp_path))
    training, norms = script.Run(config, corpus_of(script, tokens), torch.device("cpu")), []
    model = copy.deepcopy(training.model.double())
    decays = {id(p): group["weight_decay"] for group in training.optimizer.param_groups for p in group["params"]}
    decays = [decays[id(p)] for p in training.model.parameters()]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for step in range(1, 7):
        offsets = training.batches.offsets(step - 1)
        windows = torch.from_numpy(np.stack([tokens[o : o + 17] for o in offsets]))
        before = torch.tensor([[tokens[o - 1] if o else 256] for o in offsets])
        logits = model(windows[:, :-1], starts=torch.cat([before, windows[:, :-2]], 1) == 256)
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(math.sqrt(sum(g.square().sum().item() for g in grads)))
        assert training.train_step() == pytest.approx((loss.item(), norms[-1]), rel=1e-5)
        rate = script.learning_rate(step - 1, config)
        for p, g, decay, (m, v) in zip(model.parameters(), grads, decays, moments, strict=True):
            g = g * min(1.0, 1.9 / norms[-1])
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.8).add_(g * g, alpha=0.2)
            p.data -= rate * (decay * p.data + m / (1 - 0.9**step) / ((v / (1 - 0.8**step)).sqrt() + 1e-8))
    assert min(norms) < 1.9 < max(norms)  # clipped, and not
    close(list(training.model.parameters()), list(model.parameters()), 1e-4)


def test_a_checkpoint_brings_everything_back(script, tmp_path):
    corpus, config = (
        corpus_of(script, np.arange(256)),
        script.Config(d_model=16, n_layer=1, length=32, out=str(tmp_path)),
    )
    config = dataclasses.replace(config, **OWN[script.__name__])
    training, again = (script.Run(config, corpus, torch.device("cpu")) for _ in range(2))
    training.train_step()
    training.best, state = 1.5, torch.get_rng_state()
    training.save()
    torch.rand(3)
    again.load()
    assert (again.step, again.best) == (1, 1.5) and torch.equal(torch.get_rng_state(), state)
    assert again.train_step() == training.train_step()


# ----- Jobs, as a user runs them --------------------------------------------------------------------------------------

TINY_RUN = "--tokenizer byte --d-model 16 --n-layer 1 --steps 20 --batch 4 --length 32 --lr 1e-2 --tokens 5"
TINY_RUN = f"{TINY_RUN} --eval-every 5 --eval-tokens 60".split()


def tiny_run(script):
    """Flags of a run of seconds."""
    own = [f"--{name.replace('_', '-')}={size}" for name, size in OWN[script.__name__].items()]
    return [*TINY_RUN, *own]


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """Train on a small text, in which carried states start anew after 17 steps; without the picture, which is slow."""
    monkeypatch.setattr(script, "plot", lambda *_: None)
    (tmp_path / "text.txt").write_text(sentences(1), "utf-8")

    def run(out, *flags, job="train", data="text.txt"):
        return script.main(
            [job, *tiny_run(script), "--data", str(tmp_path / data), "--out", str(tmp_path / out), *flags]
        )

    return run


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return torch.tensor([row["loss"] for row in rows(folder)])


def saved(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Bitwise equality of checkpoints."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def stop_after(script, monkeypatch, step):
    """Press Ctrl-C during this step, once."""
    train_step = script.Run.train_step

    def pressed(self):
        if self.step + 1 == step:
            monkeypatch.setattr(script.Run, "train_step", train_step)
            signal.raise_signal(signal.SIGINT)
        return train_step(self)

    monkeypatch.setattr(script.Run, "train_step", pressed)


def test_a_run_writes_its_files_and_can_be_repeated(script, run, tmp_path, monkeypatch):
    assert [run("b"), run("c", "--seed", "1")] == [0, 0]
    picture = []  # it is slow
    if picture:
        monkeypatch.undo()
    assert run("a") == 0
    a, b, c = (tmp_path / name for name in "abc")
    assert sorted(p.name for p in a.iterdir()) == ["checkpoint.pt", *picture, "metrics.jsonl", "result.json"]
    assert (
        (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes() != (c / "metrics.jsonl").read_bytes()
    )
    assert not picture or (a / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [row["step"] for row in rows(a)] == [*range(1, 21)] and losses(a)[-1] < losses(a)[0] - 0.5
    assert [row["step"] for row in rows(a) if "valid_loss" in row] == [5, 10, 15, 20]
    assert rows(a)[9]["lr"] == script.learning_rate(9, script.Config(steps=20, lr=1e-2))
    result = json.loads((a / "result.json").read_text())
    assert result["config"]["d_model"] == 16 and result["seed"] == 0 and result["tokens_seen"] == 20 * 4 * 32
    assert result["parameters"] == sum(
        p.numel() for p in script.load_checkpoint(script.Config(out=str(a)), torch.device("cpu"))[0].parameters()
    )


@each(
    "flags",
    [""],
    transformer=["--n-kv-head 1 --accumulate 2 --document-resets", VANILLA_FLAGS],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(script, run, tmp_path, monkeypatch, capsys, flags):
    flags = flags.split()
    assert run("whole", *flags) == 0
    stop_after(script, monkeypatch, 7)
    assert run("parts", *flags) == 130 and len(rows(tmp_path / "parts")) == saved(tmp_path / "parts")["step"] == 7
    assert "stopped after step 7" in capsys.readouterr().out
    stop_after(script, monkeypatch, 16)
    assert run("parts", *flags, "--resume") == 130
    assert run("parts", *flags, "--resume") == 0
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    first, second = saved(whole), saved(parts)
    assert first.pop("config") != second.pop("config") and same(first, second)


@each("flags", transformer=[""])
def test_ctrl_c_before_the_first_step(script, run, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(script, "stopped", lambda *_: True)
    assert run("out", *flags.split()) == 130
    monkeypatch.undo()
    assert run("out", *flags.split(), "--resume") == 0 and len(rows(tmp_path / "out")) == 20


def start(*words, cwd):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=cwd, env=environment, stdout=-1, stderr=-1, text=True)


def interrupt(process, step):
    """Send Ctrl-C once the process has passed `step`; returns the last line that it prints."""
    for line in process.stdout:
        if (found := re.match(r"step ([\d,]+)/", line)) and int(found[1].replace(",", "")) >= step:
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "", errors
    return output.splitlines()[-1]


def test_the_command_that_ctrl_c_prints_resumes(script, run, tmp_path):
    flags = [*tiny_run(script), "--data", "text.txt", "--out", "run dir", "--steps", "100000", "--eval-every", "20"]
    last = interrupt(start(sys.executable, str(script.__file__), *flags, cwd=tmp_path), 3)
    stopped, command = re.fullmatch(r"stopped after step ([\d,]+); to go on: (.*)", last).groups()
    assert saved(tmp_path / "run dir")["step"] == int(stopped)
    again = interrupt(start(*shlex.split(command), cwd=tmp_path), int(stopped) + 1)
    assert again.endswith(command)  # and not --resume twice
    steps = [row["step"] for row in rows(tmp_path / "run dir")]
    assert steps == [*range(1, len(steps) + 1)] and len(steps) > int(stopped)


@each("flags", transformer=["--accumulate 2"])
def test_two_processes_are_one(script, run, tmp_path, flags):
    assert run("one", *flags.split()) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script.__file__]
    command += [*tiny_run(script), "--data", "text.txt", "--out", "two", *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=0)
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert one.keys() == two.keys()
    for part in one.keys() & {"model", "carried"}:
        close(two[part], one[part], 1e-3)
    assert done.stdout.count(b"stopped") == 0 and done.stdout.count(b"step 20/20") == 1  # one process speaks


def test_accumulation_is_one_batch(run, tmp_path):
    assert [run("1"), run("4", "--accumulate", "4")] == [0, 0]
    torch.testing.assert_close(losses(tmp_path / "4"), losses(tmp_path / "1"), rtol=1e-5, atol=0)


def test_resuming_with_another_config_names_the_fields(run, tmp_path, capsys):
    assert run("out") == 0
    assert run("out", "--resume", "--lr", "0.5", "--length", "16", "--accumulate", "2") == 2
    error = capsys.readouterr().err
    assert "lr was 0.01, is 0.5" in error and "length was 32, is 16" in error and error.count(" was ") == 2


def test_divergence_keeps_the_last_good_checkpoint(script, run, tmp_path, monkeypatch, capsys):
    assert run("early", "--lr", "1e30", "--eval-every", "50") == 1
    assert re.fullmatch(
        rf"{script.__name__}\.py: .*step \d+: .*(nan|inf).*no checkpoint.*lower --lr\n", capsys.readouterr().err
    )
    usual = script.learning_rate
    monkeypatch.setattr(script, "learning_rate", lambda step, config: 1e30 if step == 6 else usual(step, config))
    assert run("late") == 1
    assert re.search(rf"step 8: .*{re.escape(str(tmp_path / 'late' / 'checkpoint.pt'))}", capsys.readouterr().err)
    monkeypatch.undo()
    kept = saved(tmp_path / "late")
    assert kept["step"] == 5 and all(v.isfinite().all() for v in kept["model"].values())
    assert run("late", "--resume") == 0 and run("late", job="sample") == 0


def test_a_full_disk_is_an_oserror_and_keeps_the_old_file(script, tmp_path):
    """torch.save says it as a RuntimeError about positions."""

    def fail(name: str) -> None:
        Path(name).write_text("half")
        raise RuntimeError("unexpected pos 64 vs 0\nand a stack")

    path = tmp_path / "kept.pt"
    path.write_text("old")
    with pytest.raises(OSError, match=r"kept.pt: not written, 'unexpected pos 64 vs 0.*; is the disk full"):
        script.write_atomically(path, fail)
    assert path.read_text() == "old" and len([*tmp_path.iterdir()]) == 1


@each("rate", [math.inf])  # after 1e30, attention's last norm still makes a finite loss: that of all 0
def test_a_model_that_scores_nan_is_not_saved(script, run, tmp_path, monkeypatch, rate):
    usual = script.learning_rate
    monkeypatch.setattr(script, "learning_rate", lambda step, config: rate if step == 9 else usual(step, config))
    assert run("out") == 1 and saved(tmp_path / "out")["step"] == 5


# ----- Batches, evaluation, samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [33, 64, 65, 1000])
def test_an_epoch_reads_each_window_once(script, size):
    arguments = (np.arange(size), 3, 32, 0)
    batches = script.Batches(*arguments)
    windows = np.concatenate([batches.offsets(step) for step in range(2 * batches.windows)])  # six epochs
    assert batches.windows == (size - 1) // 32 and windows.min() >= 0 and windows.max() + 33 <= size
    for epoch in windows.reshape(6, -1):
        assert (np.diff(np.sort(epoch)) == 32).all()
    assert (script.Batches(*arguments).offsets(4) == batches.offsets(4)).all()  # needs no replay


def test_a_document_starts_after_a_separator(script):
    """Of what stands before the window too: a carried state must not run on into a new document."""
    tokens = np.random.default_rng(0).choice([256, 7, 8], 200)
    corpus, config = corpus_of(script, tokens), script.Config(length=9, document_resets=True)
    offsets = [0, 1, 17, 60, 151, 190]
    x, y, starts = script.gather(corpus, tokens, offsets, config, torch.device("cpu"))
    for b, o in enumerate(offsets):
        assert (x[b].tolist(), y[b].tolist()) == (tokens[o : o + 9].tolist(), tokens[o + 1 : o + 10].tolist())
        assert starts[b].tolist() == [t == 0 or tokens[t - 1] == 256 for t in range(o, o + 9)]


def test_epochs_and_seeds_differ(script):
    own = ()
    epochs = [script.Batches(np.arange(1000), 3, 32, seed, *own).shuffled(e) for seed in (0, 1) for e in range(4)]
    assert len({tuple(epoch // 32) for epoch in epochs}) == 8  # each another order,
    assert len({epoch.min() for epoch in epochs}) > 2  # from other offsets


def predictor(model):
    """A function (token, begins) -> logits (V,) of the next one: Mamba's by steps, attention's of the whole prefix."""
    past = None

    def by_prefix(token, begins):
        nonlocal past
        past = [token] if begins else [*past, token]
        return model(torch.tensor([past]))[0, -1]

    return by_prefix


def slow_evaluation(model, corpus, length, carry, resets):
    """Nats and bytes of all tokens but the first, one at a time."""
    nats = size = 0
    tokens, predict = corpus.valid.tolist(), predictor(model)
    for i, token in enumerate(tokens[:-1]):
        begins = resets and (i == 0 or tokens[i - 1] == corpus.separator)
        logits = predict(token, i == 0 or begins or (i % length == 0 and not carry))
        nats -= logits.double().log_softmax(-1)[tokens[i + 1]].item()
        size += 1 if tokens[i + 1] == corpus.separator else len(corpus.tokenizer.decode_bytes(tokens[i + 1 : i + 2]))
    return {"loss": nats / (len(tokens) - 1), "bits_a_byte": nats / math.log(2) / size, "tokens": len(tokens) - 1}


MODES = [(length, resets) for length in (1, 7, 64, 500) for resets in (False, True)]


@each(
    "length,resets,variant",
    [(*mode, "plain") for mode in MODES],
    transformer=[(*mode, "vanilla") for mode in MODES],
)
def test_every_token_but_the_first_is_scored_once(script, length, resets, variant):
    documents = [sentences(i, 35) for i in range(9)]
    corpus = corpus_of(script, [], "bpe:280", documents)
    corpus.valid = np.concatenate([np.append(corpus.tokenizer.encode(d), corpus.separator) for d in documents])
    model = small(script, vocab_size=280, **VANILLA if variant == "vanilla" else {})
    flags = {"carry_state": True} if variant == "carry" else {}
    config = script.Config(length=length, batch=3, document_resets=resets, **flags)
    truth = slow_evaluation(model, corpus, length, variant == "carry", resets)
    assert script.evaluate(model, corpus, config) == pytest.approx(truth, rel=1e-5)
    corpus.valid = corpus.valid[:51]
    assert script.evaluate(model, corpus, config) == script.evaluate(model, corpus, config, limit=50)
    assert script.evaluate(model, corpus, config)["tokens"] == 50


@each("flags", [""], transformer=["--length 37 --batch 3"])
def test_the_eval_job(script, run, tmp_path, capsys, flags):
    assert run("out") == 0 and capsys.readouterr() and run("out", *flags.split(), job="eval") == 0
    model, tokenizer = script.load_checkpoint(script.Config(out=str(tmp_path / "out")), torch.device("cpu"))
    corpus = script.load_corpus(str(tmp_path / "text.txt"), "", tokenizer)
    with torch.no_grad():
        truth = slow_evaluation(model, corpus, 37 if flags else 32, "--carry-state" in flags, False)
    numbers = re.search(r": ([\d.]+) nats a token, ([\d.]+) bits a byte, (\d+) tokens", capsys.readouterr().out)
    assert [float(n) for n in numbers.groups()] == pytest.approx(list(truth.values()), abs=2e-4)


def test_training_beats_the_unigram_by_a_bit_a_byte(script, run, tmp_path):
    (tmp_path / "long.txt").write_text(sentences(2, 20_000), "utf-8")
    flags = "--n-layer 2 --d-model 32 --steps 60 --batch 8 --length 64 --eval-every 60"
    own = []
    assert run("out", *flags.split(), *own, data="long.txt") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["validation"]["bits_a_byte"] < result["baselines_bits_a_byte"]["byte unigram"] - 1


def test_tokens_from_a_bin(run, tmp_path, capsys):
    parts = [np.append(np.frombuffer(sentences(i, 90).encode(), np.uint8), 256) for i in range(40)]
    np.concatenate(parts).astype("<u2").tofile(tmp_path / "tokens.bin")
    description = {"dtype": "uint16", "vocab_size": 257, "tokenizer": "byte", "document_separator": 256}
    (tmp_path / "tokens.json").write_text(json.dumps(description))
    assert run("plain", data="tokens.bin") == run("resets", "--document-resets", data="tokens.bin") == 0
    assert run("resets", "--document-resets", job="eval", data="tokens.bin") == run("resets", job="sample") == 0
    assert not torch.equal(losses(tmp_path / "plain"), losses(tmp_path / "resets"))  # the flag does something


class Parrot(torch.nn.Module):
    """A model that writes the given bytes, one a token."""

    def __init__(self, content):
        super().__init__()
        self.weight, self.content = torch.nn.Parameter(torch.zeros(1)), content

    def stream(self, tokens, max_new_tokens, *options):
        yield from (torch.tensor([byte]) for byte in self.content[:max_new_tokens])


@pytest.mark.parametrize("tokens", [99, 25])  # 25: in the middle of the last character
def test_a_sample_comes_in_whole_characters(script, tokens, monkeypatch):
    content, pieces = "né → 日本語 🙂 👩‍👧".encode(), []
    monkeypatch.setattr("builtins.print", lambda *words, end="\n", **_: pieces.append("".join(words) + end))
    text = script.write_sample(
        Parrot(content), script.load_tokenizer("byte", []), script.Config(prompt="Oh", tokens=tokens)
    )
    assert text == "Oh" + content[:tokens].decode("utf-8", "ignore") and "".join(pieces) == text + "\n"
    assert len(pieces) > 10 and "\ufffd" not in text


def test_samples_from_a_checkpoint_and_from_a_folder(script, run, tmp_path, capsys, no_safetensors):
    assert run("out") == 0 and capsys.readouterr()
    assert run("out", "--prompt", "naïve", "--tokens", "30", "--temperature", "0", job="sample") == 0
    text = capsys.readouterr().out.removesuffix("\n")
    model, tokenizer = script.load_checkpoint(script.Config(out=str(tmp_path / "out")), torch.device("cpu"))
    prompt = torch.tensor([tokenizer.encode("naïve").tolist()])
    assert tokenizer.decode(model.generate(prompt, 30, temperature=0)[0]) in (text, text + "\ufffd")  # a cut character
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    spec = {"model": {"type": "BPE", "vocab": {c: i for i, c in enumerate(letters)}, "merges": []}, "normalizer": None}
    spec |= {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, "added_tokens": []}
    folder = small(script, vocab_size=256).float()
    folder.save_pretrained(str(tmp_path / "hf"))
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(spec))
    flags = ["--checkpoint", str(tmp_path / "hf"), "--prompt", "Hé", "--tokens", "20", "--temperature", "0"]
    assert script.main(["sample", *flags]) == 0
    tokenizer = script.load_tokenizer(str(tmp_path / "hf" / "tokenizer.json"), [])
    ids = folder.generate(torch.tensor([tokenizer.encode("Hé").tolist()]), 20, temperature=0)[0]
    text = capsys.readouterr().out.removesuffix("\n")
    assert text.startswith("Hé") and tokenizer.decode(ids) in (text, text + "\ufffd")
    assert script.main(["sample", *flags, "--prompt", ""]) == 2 and "at least one token" in capsys.readouterr().err
    chosen = script.load_checkpoint(
        script.Config(checkpoint=str(tmp_path / "hf"), tokenizer="byte"), torch.device("cpu")
    )
    assert chosen[1].name == "byte"  # a tokenizer that is asked for goes before the folder's
    (tmp_path / "hf" / "tokenizer.json").unlink()
    for job in ("sample", "eval"):  # never with a tokenizer that the model was not trained with
        assert script.main([job, *flags]) == 2 and "has no tokenizer" in capsys.readouterr().err


# ----- Bad input ------------------------------------------------------------------------------------------------------

BAD = {  # flags after the usual ones; what the line must say: the value, the rule, the fix
    "--data nowhere.txt": "nowhere.txt: no such file.*give",
    "--data empty.txt": "empty.txt: holds no text; give",
    "--data short.txt": "short.txt.*: 29 tokens.*needs 33; give",
    "--data outside.bin": "outside.bin: token id 300 must be below vocab_size 257; correct",
    "--data odd.bin": "odd.bin: 3 bytes must be a multiple of 2.*correct",
    "--data lonely.bin": "lonely.bin: needs lonely.json beside it; write",
    "--tokenizer wordpiece": "'wordpiece': unknown; choose",
    "--batch 3 --accumulate 2": "--batch 3: must be a multiple of .*2; change",
    "--device tpu": "--device tpu: .*try auto",
    "--d-model 0": "d_model 0: must be at least 1; raise",
    "--batch 0": "--batch 0: must be at least 1; raise",
    "--length 0": "--length 0: must be at least 1; raise",
    "--accumulate 0": "--accumulate 0: must be at least 1; raise",
    "--eval-every 0": "--eval-every 0: must be at least 1; raise",
    "--steps 0": "--steps 0: must be at least 1; raise",
    "--seed -1": "--seed -1: must be at least 0; raise",
    "--lr nan": "--lr nan: must be a number from 0 to inf; lower",
    "--warmup 1.5": "--warmup 1.5: must be a number from 0 to 1; lower",
    "--beta2 1": "--beta2 1.0: must be a number from 0 to 0.99999; lower",
    "--out text.txt": "text.txt: must be a folder.*; give",
    "--out other --resume": "checkpoint.pt: is no checkpoint of this script; give",
    "--out empty --resume": "empty holds no checkpoint.pt, must be.*correct",
    "--out junk --resume": "checkpoint.pt: not a file of tensors.*; give",
    "sample --checkpoint junk/checkpoint.pt": "checkpoint.pt: not a file of tensors.*; give",
    "sample --checkpoint other.pt": "other.pt: is no checkpoint of this script; give",
    "sample --checkpoint nowhere.pt": "nowhere.pt: no such file.*train first",
    "sample --checkpoint junk": "junk: holds no config.json.*correct",
    "sample --checkpoint good.pt --prompt ''": "must be.*L >= 1; give",
    "sample --checkpoint good.pt --temperature -1": "--temperature -1.0: must be at least 0; raise",
    "sample --checkpoint good.pt --top-k -3": "--top-k -3: must be at least 0; raise",
    "sample --checkpoint good.pt --top-p 0": "--top-p 0.0: must be at least 1e-09; raise",
    "--temperature nan": "--temperature nan: must be a number from 0 to inf; lower",
    "--top-p 7": "--top-p 7.0: must be a number from 1e-09 to 1; lower",
    "eval --checkpoint small.pt": "has 257 tokens, the model's vocabulary 29; give",
}

BAD_OWN = {
    "transformer": {
        "--n-head 5": "n_head 5: must cut d_model 16 into even widths; change",
        "--n-head 16": "n_head 16: must cut d_model 16 into even widths; change",
        "--n-head 0": "n_head 0: must be at least 1; raise",
        "--n-kv-head 3": "n_kv_head 3: must divide n_head 2; change",
        "--n-kv-head -1": "n_kv_head -1: must divide n_head 2; change",
        "--d-ff -1": "d_ff -1: must be .*at least 1; correct",
        "--position sinus": "position 'sinus': must be rope or learned; choose",
        "--mlp relu": "mlp 'relu': must be swiglu or gelu; choose",
        "--norm batch": "norm 'batch': must be rmsnorm or layernorm; choose",
        "sample --checkpoint learned.pt --prompt abc --tokens 15": "17 positions: .*end at max_length 16; shorten",
        "eval --checkpoint learned.pt": "32 positions: .*end at max_length 16; shorten",
    },
}


@each("flags", BAD, **BAD_OWN)
def test_bad_input_is_one_line(script, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in {"text": sentences(1), "empty": " \n", "short": "x" * 30}.items():
        Path(f"{name}.txt").write_text(content, "utf-8")
    for name, content in {"outside": b"\x01\x00" * 99 + b"\x2c\x01", "odd": b"abc", "lonely": b"ab"}.items():
        Path(f"{name}.bin").write_bytes(content)
        description = {"dtype": "uint16", "vocab_size": 257, "tokenizer": "byte", "document_separator": None}
        if name != "lonely":
            Path(f"{name}.json").write_text(json.dumps(description))
    for name, content in {"junk": b"not tensors at all", "other": None}.items():
        Path(name).mkdir()
        Path(name, "checkpoint.pt").write_bytes(content) if content else torch.save({"a": 1}, f"{name}/checkpoint.pt")
    torch.save([1, 2], "other.pt")
    models = {"good": {"vocab_size": 257}, "small": {"vocab_size": 29}}
    if script is transformer:
        models["learned"] = {"vocab_size": 257, "position": "learned", "max_length": 16}
    for name, changes in models.items():
        model, tokenizer = small(script, **changes).float(), script.load_tokenizer("byte", [])
        content = {"model": model.state_dict(), "model_config": dataclasses.asdict(model.config)}
        torch.save(content | {"tokenizer": tokenizer.to_json(), "config": {}, "step": 0}, f"{name}.pt")
    words = shlex.split(flags)
    job = [words.pop(0)] if words[0] in script.JOBS else []
    assert script.main([*job, *tiny_run(script), "--data", "text.txt", "--out", "out", *words]) == 2
    line = capsys.readouterr().err
    expected = (BAD | BAD_OWN[script.__name__])[flags]
    assert re.fullmatch(rf"{script.__name__}\.py: .*\n", line) and re.search(expected, line), line
    assert not Path("out", "checkpoint.pt").exists()


WRONG_FOLDERS = {  # files of a checkpoint folder, or fields of its config.json; what the line must say
    "no JSON": ({"config.json": b"{nope"}, "config.json: must be a JSON object, but .*line 1.*; copy"),
    "not UTF-8": ({"config.json": b"\xff\xfe"}, "config.json: must be a JSON object, but .*utf-8.*; copy"),
    "a list": ({"config.json": b"[1]"}, "config.json: must be a JSON object, but it is another.*; copy"),
    "empty": ({"config.json": b"{}"}, "folder: cannot be done here: .*vocab_size is missing; give"),
    "size null": ({"num_hidden_layers": None}, r"folder: config.json has a wrong value \(.*NoneType.*\); correct"),
    "size text": ({"vocab_size": "29"}, r"folder: config.json has a wrong value \(.*str.*\); correct"),
    "size broken": ({"vocab_size": 1.5}, r"folder: config.json has a wrong value \(.*\); correct"),
    "a list of tensors": ({"pytorch_model.bin": [1]}, "pytorch_model.bin: must hold tensors by name; give"),
    "tensors within": ({"pytorch_model.bin": {"model": {}}}, "folder: the weights.*embed.* is missing.*; mend"),
    "index no JSON": ({"pytorch_model.bin.index.json": b""}, "index.json: must be a JSON object.*; copy"),
    "index empty": ({"pytorch_model.bin.index.json": b"{}"}, "index.json: weight_map must name.*; copy"),
    "index of numbers": (
        {"pytorch_model.bin.index.json": b'{"weight_map": {"a": 3}}'},
        "3: named in .*index.json.*; copy",
    ),
}
WRONG_OWN = {
    "transformer": {
        "heads": ({"num_attention_heads": 0}, r"folder: config.json has a wrong value \(.*zero.*\); correct"),
        "rope": ({"rope_parameters": 7}, r"folder: config.json has a wrong value \(.*int.*\); correct"),
        "theta": ({"rope_theta": "x"}, r"folder: config.json has a wrong value \(.*sequence.*\); correct"),
    },
}


@each("flaw", WRONG_FOLDERS, **WRONG_OWN)
def test_a_wrong_folder_is_one_line(script, flaw, tmp_path, monkeypatch, capsys, no_safetensors):
    monkeypatch.chdir(tmp_path)
    small(script).float().save_pretrained("folder")
    changes, expected = (WRONG_FOLDERS | WRONG_OWN[script.__name__])[flaw]
    fields = json.loads(Path("folder", "config.json").read_text())
    for name, value in changes.items():
        if name.endswith(".bin"):
            torch.save(value, f"folder/{name}")
        elif name.endswith(".json"):
            Path("folder", name).write_bytes(value)
        else:
            Path("folder", "config.json").write_text(json.dumps(fields | {name: value}))
    assert script.main(["sample", "--checkpoint", "folder", "--tokenizer", "byte"]) == 2
    line = capsys.readouterr().err
    assert re.fullmatch(rf"{script.__name__}\.py: .*\n", line) and re.search(expected, line), line


def test_numbers_beside_the_tensors_are_left_out(script, tmp_path, no_safetensors):
    model, tokens = small(script).float(), text(1, 5)
    model.save_pretrained(str(tmp_path))
    content = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    torch.save(content | {"epoch": 3}, tmp_path / "pytorch_model.bin")
    assert torch.equal(script.read_folder(str(tmp_path))(tokens), model(tokens))


def test_a_run_whose_log_was_cut_goes_on(run, tmp_path):
    assert run("out") == 0
    log = tmp_path / "out" / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 21, "lo')  # killed as it wrote
    assert run("out", "--resume") == 0 and log.read_text() == whole


@each("prompt,tokens", [("", 0)], transformer=[("x" * 40, 40)])
def test_a_prompt_that_does_not_fit_loses_no_result(script, run, tmp_path, capsys, prompt, tokens):
    flags = ["--position", "learned"] if prompt else []
    assert run("out", "--prompt", prompt, *flags) == 0
    assert f"no sample: --prompt has {tokens} tokens, must have from 1" in capsys.readouterr().out
    assert "sample" not in json.loads((tmp_path / "out" / "result.json").read_text())


@pytest.mark.parametrize("temperature", [1e-7, 1e-300])
def test_a_temperature_near_0_is_greedy(script, temperature):
    logits = torch.randn(5, 9) * 50
    assert torch.equal(script.sample_token(logits, temperature), logits.argmax(-1))


def test_bad_input_has_no_traceback(script, tmp_path):
    command = [sys.executable, script.__file__, "--data", "gone.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "gone.txt" in done.stderr


def test_a_vanilla_transformer_trains_and_writes_as_much_as_fits(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(sentences(1), "utf-8")
    flags = "--tokenizer byte --d-model 16 --n-layer 1 --n-head 2 --steps 2 --batch 2 --length 32 --position learned"
    flags = [*flags.split(), "--mlp", "gelu", "--norm", "layernorm", "--prompt", "cat", "--tokens", "300"]
    where = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    assert transformer.main([*flags, *where]) == 0 and not capsys.readouterr().err
    assert (tmp_path / "out" / "result.json").exists()
