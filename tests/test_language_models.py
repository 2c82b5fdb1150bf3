"""mamba.py and transformer.py: data, tokenizers, training and jobs, which are the same text."""

import copy
import itertools
import json
import lzma
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mamba
import transformer
from tests._helpers import close, sentences

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[mamba, transformer], ids=["mamba", "transformer"], scope="module")
def script(request):
    return request.param


def small(script, vocab_size=257):
    """A little model of the script."""
    torch.manual_seed(0)
    if script is mamba:
        return mamba.Mamba(mamba.MambaConfig(16, 1, vocab_size, 4))
    return transformer.Transformer(transformer.TransformerConfig(16, 1, 2, vocab_size=vocab_size))


# ----- Data


PROSE = "the cat sat on the mat and the dog sat on the log; that is that.\n" * 8
MIXED = "Hello, world! It's 12345 o'clock.\n\n\tdef f(x): naïve café\r\n中文 🙂👩‍👧 <|endoftext|>  "


def test_python_documents_are_prose_and_the_same_each_time(script):
    documents = script.python_documents()
    text = "\n".join(documents)
    assert len(documents) > 200 and len(text) > 1_000_000
    assert "wrap(text : string) -> [string]" in text and "test.support" not in documents
    assert documents == script.python_documents()


@pytest.mark.parametrize("name", ["byte", "bpe:300"])
def test_round_trips(script, name):
    tokenizer = script.load_tokenizer(name, [PROSE + MIXED])
    for words in (MIXED, "", " " * 1_000_000 + "x", *MIXED):
        ids = tokenizer.encode(words)
        assert tokenizer.separator not in ids and max(ids, default=0) < tokenizer.vocab_size
        assert tokenizer.decode_bytes(ids) == words.encode()
    assert tokenizer.separator == tokenizer.vocab_size - 1
    assert tokenizer.decode_bytes([tokenizer.separator]) == b""
    assert tokenizer.decode_bytes([tokenizer.vocab_size + 3]) == b""  # of a padded vocabulary
    again = script.Tokenizer(**tokenizer.arguments)
    assert again.encode(MIXED) == tokenizer.encode(MIXED)


def test_bpe_joins_the_commonest_pair(script):
    """Each merge, by recounting every pair of every word."""
    import regex

    tokenizer = script.load_tokenizer("bpe:330", [PROSE, MIXED])
    words = [[bytes([b]) for b in w.encode()] for w in regex.findall(script.CL100K, PROSE)]
    words += [[bytes([b]) for b in w.encode()] for w in regex.findall(script.CL100K, MIXED)]
    for token, rank in sorted(tokenizer.arguments["ranks"].items(), key=lambda item: item[1])[256:]:
        pairs = [pair for word in words for pair in itertools.pairwise(word)]
        count = {pair: pairs.count(pair) for pair in set(pairs)}
        best = max(count.values())
        joined = [pair for pair in count if pair[0] + pair[1] == token and count[pair] == best]
        assert joined, (rank, token)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == joined[0]:
                    word[i : i + 2] = [token]
                i += 1
    assert tokenizer.vocab_size == 330
    ids = tokenizer.encode(PROSE) + tokenizer.encode(MIXED)
    assert [tokenizer.bytes_of[i] for i in ids] == [part for word in words for part in word]


def test_bpe_of_text_without_spaces_takes_no_minutes(script):
    dna = "".join(random.Random(0).choices("ACGT", k=100_000))
    tokenizer = script.load_tokenizer("bpe:400", [dna])
    assert tokenizer.vocab_size == 400 and len(tokenizer.encode(dna)) < 40_000
    with pytest.raises(ValueError, match="ids to offer"):
        script.load_tokenizer("bpe:5000", ["short text"])


def test_a_tiktoken_file(script, tmp_path):
    import base64

    learnt = script.load_tokenizer("bpe:300", [PROSE + MIXED])
    rows = [
        base64.b64encode(token) + b" %d\n" % i for token, i in learnt.arguments["ranks"].items()
    ]
    (tmp_path / "x.tiktoken").write_bytes(b"".join(rows))
    tokenizer = script.load_tokenizer(str(tmp_path / "x.tiktoken"), [])
    assert tokenizer.encode(MIXED) == learnt.encode(MIXED) and tokenizer.vocab_size == 300


def test_repeated_paragraphs_are_dropped(script):
    long = "a paragraph of sixty characters and more, which stands in two documents"
    documents = [f"one\n\n{long}\n\nshort", f"two\n\n{long}\n\nshort", long]
    kept = script.drop_repeated_paragraphs(documents)
    assert kept == [documents[0], "two\n\nshort"]
    assert script.drop_repeated_paragraphs([f"{long}\n\n{long}\n\nshort\n\nshort"]) == [
        f"{long}\n\nshort\n\nshort"
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), "utf-8")
    return str(path)


def test_every_twentieth_document_is_for_validation(script, tmp_path):
    rows = [f"document {i} of many" for i in range(1, 62)]
    rows[10] = "a document so long that it alone would decide the score. " * 30
    corpus = script.load_corpus(write_jsonl(tmp_path / "x.jsonl", rows), "byte")
    kept = [row for row in rows if row != rows[10]]
    text = corpus.tokenizer.decode_bytes(corpus.valid).decode()
    assert text == "".join(kept[19::20])
    assert len(corpus.train) + len(corpus.valid) == sum(len(row.strip()) + 1 for row in rows)


def test_of_few_documents_the_end_is_for_validation(script, tmp_path):
    (tmp_path / "x.txt").write_text("x" * 950 + "y" * 50)
    corpus = script.load_corpus(str(tmp_path / "x.txt"), "byte")
    assert corpus.train.tolist() == [ord("x")] * 950 + [256]
    assert corpus.valid.tolist() == [ord("y")] * 50 + [256]
    whole = script.load_corpus(str(tmp_path / "x.txt"), "byte", split=False)
    assert len(whole.train) == 0 and len(whole.valid) == 1001


def test_a_tokenizer_is_never_learnt_from_validation(script, tmp_path):
    rows = ["zqzqzqzq " * 9 if i % 20 == 0 else f"the cat sat on the mat {i}" for i in range(1, 61)]
    corpus = script.load_corpus(write_jsonl(tmp_path / "x.jsonl", rows), "bpe:262")
    assert not any(b"q" in token for token in corpus.tokenizer.arguments["ranks"] if len(token) > 1)


def write_bin(folder, ids, **changes):
    description = {"dtype": "uint16", "vocab_size": 257, "tokenizer": "byte"}
    description |= {"document_separator": 256} | changes
    np.asarray(ids, {"uint16": "<u2", "uint32": "<u4"}[description["dtype"]]).tofile(
        folder / "x.bin"
    )
    (folder / "x.json").write_text(json.dumps(description))
    return str(folder / "x.bin")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_bin_is_mapped_not_read(script, tmp_path, dtype):
    ids = np.arange(4000) % 257
    corpus = script.load_corpus(write_bin(tmp_path, ids, dtype=dtype), "ignored")
    assert isinstance(corpus.train, np.memmap) and len(corpus.train) == 3800
    assert np.array_equal(np.concatenate([corpus.train, corpus.valid]), ids)
    assert corpus.tokenizer.vocab_size == 257 and corpus.separator == 256
    bare = write_bin(tmp_path, ids, tokenizer=None, document_separator=None)
    corpus = script.load_corpus(bare, "byte")
    assert corpus.tokenizer is None and script.xz_bits(corpus) is None


def test_windows_keep_to_packed_contexts(script, tmp_path):
    """Each context is filled with its own number, so that a window over two contexts would show."""
    contexts = np.repeat(np.arange(100), 32)
    path = write_bin(tmp_path, contexts, tokenizer=None, context_length=32)
    corpus = script.load_corpus(path, "")
    assert len(corpus.train) % 32 == 0 and corpus.context_length == 32
    for length in (32, 16):
        config, seen = script.Config(length=length, batch=8), set()
        for step in range(60):
            offsets = script.window_offsets(corpus, config, step)
            x, _, _ = script.read_windows(corpus, corpus.train, offsets, config, "cpu")
            assert (x == x[:, :1]).all()
            seen |= set(x[:, 0].tolist())
        assert seen >= set(range(len(corpus.train) // 32 - 1))  # the last has no token after it
    for length in (33, 10):
        with pytest.raises(ValueError, match="must divide the data's context_length, 32"):
            script.check_run(script.Config(length=length), corpus, {"config": {}})


def test_xz_is_given_the_training_text(script, tmp_path):
    words = [sentences(i, 400) for i in range(40)]
    corpus = script.load_corpus(write_jsonl(tmp_path / "x.jsonl", words), "byte")
    train, valid = (bytes(ids[ids < 256].astype(np.uint8)) for ids in (corpus.train, corpus.valid))
    grown = len(lzma.compress(train + valid)) - len(lzma.compress(train))
    assert script.xz_bits(corpus) == pytest.approx(8 * grown / len(valid))


# ----- Training


def corpus_of(script, tokens, separator=256):
    tokens, tokenizer = np.asarray(tokens, np.uint32), script.load_tokenizer("byte", [])
    return script.Corpus(tokens, tokens, tokenizer, 257, separator)


@pytest.mark.parametrize("size", [33, 64, 65, 1000])
def test_an_epoch_reads_each_window_once(script, size):
    corpus, config = corpus_of(script, np.arange(size)), script.Config(length=32, batch=3)
    count = (size - 1) // 32
    steps = [script.window_offsets(corpus, config, step) for step in range(2 * count)]
    epochs = np.concatenate(steps).reshape(6, count)
    assert epochs.min() >= 0 and epochs.max() + 33 <= size
    for epoch in epochs:
        assert (np.diff(np.sort(epoch)) == 32).all()
    assert (script.window_offsets(corpus, config, 1) == steps[1]).all()  # needs no replay
    if size == 1000:
        other = script.window_offsets(corpus, script.Config(length=32, batch=3, seed=1), 1)
        assert (other != steps[1]).any() and len({tuple(epoch) for epoch in epochs}) == 6


def test_a_document_starts_after_a_separator(script):
    """Of what stands before the window too."""
    tokens = np.random.default_rng(0).choice([256, 7, 8], 200)
    config, offsets = script.Config(length=9, document_resets=True), [0, 1, 17, 60, 151, 190]
    x, y, starts = script.read_windows(corpus_of(script, tokens), tokens, offsets, config, "cpu")
    for row, o in enumerate(offsets):
        assert x[row].tolist() == tokens[o : o + 9].tolist()
        assert y[row].tolist() == tokens[o + 1 : o + 10].tolist()
        expected = [t == 0 or tokens[t - 1] == 256 for t in range(o, o + 9)]
        assert starts[row].tolist() == expected


def test_learning_rate(script):
    config = script.Config(steps=100, lr=2.0, min_lr=0.5, warmup=0.1)
    rates = [script.learning_rate(step, config) for step in range(100)]
    close(torch.tensor(rates[:11]), torch.tensor([0.2 * i for i in range(1, 11)] + [2.0]), 1e-6)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.5)
    half = 0.5 + 1.5 * math.cos(math.pi / 8) ** 2
    assert rates[54] == pytest.approx(1.25, abs=0.02) and rates[32] == pytest.approx(half, abs=0.02)


@pytest.mark.parametrize("clip", [1.9, 0.0])
def test_a_training_step_is_adamw_written_out(script, clip):
    """Windows, starts, loss, clipping, rate and AdamW (1711.05101, algorithm 2), in float64."""
    tokens = np.random.default_rng(0).choice([256, 7, 8, 9, 10], 900)
    sizes = {"batch": 4, "accumulate": 2, "length": 16, "steps": 8, "warmup": 0.25, "clip": clip}
    config = script.Config(
        **sizes, lr=1e-2, min_lr=1e-3, weight_decay=0.3, beta2=0.8, document_resets=True, seed=3
    )
    corpus, norms = corpus_of(script, tokens), []
    trained = small(script).double()
    model = copy.deepcopy(trained)
    optimizer = script.make_optimizer(trained, config)
    decays = [
        0.3 if p.ndim > 1 and not name.endswith("A_log") else 0.0
        for name, p in model.named_parameters()
    ]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for step in range(1, 7):
        offsets = script.window_offsets(corpus, config, step - 1)
        windows = torch.from_numpy(np.stack([tokens[o : o + 17] for o in offsets]))
        before = torch.tensor([[tokens[o - 1] if o else 256] for o in offsets])
        starts = torch.cat([before, windows[:, :-2]], 1) == 256
        logits = model(windows[:, :-1], starts=starts)
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(math.sqrt(sum(g.square().sum().item() for g in grads)))
        ours = script.train_step(trained, optimizer, corpus, config, step - 1)
        assert ours == pytest.approx((loss.item(), norms[-1]), rel=1e-5)
        rate = script.learning_rate(step - 1, config)
        scale = min(1.0, clip / norms[-1]) if clip else 1.0
        for p, g, decay, (m, v) in zip(model.parameters(), grads, decays, moments, strict=True):
            m.mul_(0.9).add_(g * scale, alpha=0.1)
            v.mul_(0.8).add_((g * scale) ** 2, alpha=0.2)
            update = m / (1 - 0.9**step) / ((v / (1 - 0.8**step)).sqrt() + 1e-8)
            p.data -= rate * (decay * p.data + update)
    assert not clip or min(norms) < clip < max(norms)  # clipped, and not
    close(list(trained.parameters()), list(model.parameters()), 1e-5)


@pytest.mark.parametrize("length", [1, 7, 64, 500])
@pytest.mark.parametrize("resets", [False, True])
def test_every_token_but_the_first_is_scored_once(script, length, resets):
    documents = [sentences(i, 35) for i in range(9)]
    tokenizer = script.load_tokenizer("bpe:280", documents)
    tokens = []
    for document in documents:
        tokens += [*tokenizer.encode(document), tokenizer.separator]
    corpus = script.Corpus(np.array([]), np.array(tokens), tokenizer, 280, tokenizer.separator)
    model, nats, size, first = small(script, 280), 0.0, 0, 0
    for i in range(len(tokens) - 1):
        begins = resets and (i == 0 or tokens[i - 1] == corpus.separator)
        first = i if i % length == 0 or begins else first
        logits = model(torch.tensor([tokens[first : i + 1]]))[:, -1]
        nats -= logits[0].log_softmax(-1)[tokens[i + 1]].item()
        size += len(tokenizer.decode_bytes([tokens[i + 1]]))
    config, count = script.Config(length=length, document_resets=resets), len(tokens) - 1
    scores = script.evaluate(model, corpus, config)
    truth = {"loss": nats / count, "bits_a_byte": nats / math.log(2) / size, "tokens": count}
    assert scores == pytest.approx(truth, abs=2e-6)
    assert script.evaluate(model, corpus, config, limit=50)["tokens"] == 50


# ----- Jobs, as a user runs them

TINY = "--tokenizer byte --d-model 16 --n-layer 1 --steps 20 --batch 4 --length 32"
TINY += " --lr 1e-2 --tokens 5 --eval-every 5 --eval-tokens 60"
TINY = TINY.split()
HEADS = {mamba: ["--d-state", "4"], transformer: ["--n-head", "2"]}


def tiny(script):
    """Flags of a run of seconds."""
    return TINY + HEADS[script]


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """A job on a small text; without the picture, which is slow."""
    monkeypatch.setattr(script, "plot", lambda *_: None)
    (tmp_path / "text.txt").write_text(sentences(1), "utf-8")

    def run(out, *flags, job="train", data="text.txt"):
        data = ["--data", str(tmp_path / data)] if data else []
        return script.main(
            [
                job,
                *(tiny(script) if job == "train" else []),
                *data,
                "--out",
                str(tmp_path / out),
                *flags,
            ]
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
    train_step = script.train_step

    def pressed(*arguments):
        if arguments[-1] + 1 == step:
            monkeypatch.setattr(script, "train_step", train_step)
            signal.raise_signal(signal.SIGINT)
        return train_step(*arguments)

    monkeypatch.setattr(script, "train_step", pressed)


def test_a_run_writes_its_files_and_can_be_repeated(script, run, tmp_path, monkeypatch, capsys):
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
    assert result["config"]["d_model"] == 16 and result["seed"] == 0
    assert result["baselines_bits_a_byte"]["xz"] > 0 and len(result["script_sha256"]) == 64
    assert "step 20 · loss" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["", "--accumulate 2 --document-resets"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(
    script, run, tmp_path, monkeypatch, capsys, flags
):
    flags = flags.split()
    assert run("whole", *flags) == 0
    stop_after(script, monkeypatch, 7)
    assert run("parts", *flags) == 130
    assert len(rows(tmp_path / "parts")) == len(saved(tmp_path / "parts")["history"]) == 7
    assert "stopped after step 7" in capsys.readouterr().out
    stop_after(script, monkeypatch, 16)
    assert run("parts", *flags, "--resume") == 130
    (tmp_path / "parts" / "metrics.jsonl").write_bytes(b"\0" * 60 + b'{"step": 17, "lo')  # damaged
    assert run("parts", *flags, "--resume") == 0
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    first, second = saved(whole), saved(parts)
    assert first.pop("config") != second.pop("config") and same(first, second)


def start(*words, cwd, **environment):
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        words, cwd=cwd, env=environment, stdout=-1, stderr=-1, text=True, errors="replace"
    )


def interrupt(process):
    """Send Ctrl-C once the process has made a step; returns the last line that it prints."""
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "", errors
    return output.splitlines()[-1]


def test_ctrl_c_leaves_a_checkpoint(script, tmp_path):
    flags = [*tiny(script), "--data", "text.txt", "--out", "run", "--steps", "100000"]
    (tmp_path / "text.txt").write_text(sentences(1), "utf-8")
    last = interrupt(start(sys.executable, script.__file__, *flags, cwd=tmp_path))
    stopped = int(re.fullmatch(r"stopped after step (\d+); --resume goes on", last)[1])
    assert len(saved(tmp_path / "run")["history"]) == len(rows(tmp_path / "run")) == stopped
    interrupt(start(sys.executable, script.__file__, *flags, "--resume", cwd=tmp_path))
    assert len(rows(tmp_path / "run")) > stopped


def test_two_processes_are_one(script, run, tmp_path):
    assert run("one", "--accumulate", "2") == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += [
        script.__file__,
        *tiny(script),
        "--data",
        "text.txt",
        "--out",
        "two",
        "--accumulate",
        "2",
    ]
    process = start(*command, cwd=tmp_path)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    torch.testing.assert_close(
        losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=0
    )
    close(saved(tmp_path / "two")["model"], saved(tmp_path / "one")["model"], 1e-3)
    assert output.count("step 20 · ") == 1  # one process speaks


def test_accumulation_is_one_batch(script, run, tmp_path):
    assert [run("1"), run("4", "--accumulate", "4")] == [0, 0]
    torch.testing.assert_close(losses(tmp_path / "4"), losses(tmp_path / "1"), rtol=1e-5, atol=0)


def test_divergence_keeps_the_last_good_checkpoint(script, run, tmp_path, monkeypatch, capsys):
    usual = script.learning_rate
    monkeypatch.setattr(script, "learning_rate", lambda i, c: 1e30 if i == 6 else usual(i, c))
    assert run("late") == 1
    assert re.search(r"diverged at step 8: .*nan.*lower --lr\n", capsys.readouterr().err)
    monkeypatch.setattr(script, "learning_rate", usual)
    kept = saved(tmp_path / "late")
    assert len(kept["history"]) == 5 and all(v.isfinite().all() for v in kept["model"].values())
    assert run("late", "--resume") == 0


def test_a_model_that_scores_nan_is_not_saved_and_does_not_write(
    script, run, tmp_path, monkeypatch, capsys
):
    usual = script.learning_rate
    monkeypatch.setattr(script, "learning_rate", lambda i, c: math.inf if i == 9 else usual(i, c))
    assert run("out") == 1 and len(saved(tmp_path / "out")["history"]) == 5
    content = saved(tmp_path / "out")
    content["model"]["lm_head.weight"][0] = math.nan
    torch.save(content, tmp_path / "out" / "checkpoint.pt")
    for job in ("sample", "eval"):
        capsys.readouterr()
        assert run("out", job=job) == 1
        assert re.fullmatch(r"\w+\.py: .*(not finite|is nan).*\n", capsys.readouterr().err)


def numbers(output):
    """The dictionary of scores at the end of a line."""
    return json.loads(output[output.index("{") : output.index("}") + 1].replace("'", '"'))


def test_eval_agrees_with_training_and_takes_its_length(script, run, tmp_path, capsys):
    assert run("out") == 0
    trained = json.loads((tmp_path / "out" / "result.json").read_text())["validation"]
    capsys.readouterr()
    assert run("out", job="eval", data="") == 0
    assert numbers(capsys.readouterr().out) == trained
    corpus = script.load_corpus(str(tmp_path / "text.txt"), "byte")
    (tmp_path / "valid.txt").write_bytes(corpus.tokenizer.decode_bytes(corpus.valid))
    assert run("out", job="eval", data="valid.txt") == 0  # all of the file
    assert numbers(capsys.readouterr().out) == trained
    assert run("out", "--length", "7", job="eval", data="valid.txt") == 0
    other = numbers(capsys.readouterr().out)
    assert other["tokens"] == trained["tokens"] and other["loss"] != trained["loss"]


def test_training_beats_xz_where_copying_does_not_help(script, run, tmp_path):
    """Of letters drawn independently: their entropy is the floor, which matches do not reach."""
    letters = random.Random(0).choices("abcdefgh", weights=[30, 20, 15, 12, 10, 6, 4, 3], k=20_000)
    (tmp_path / "long.txt").write_text("".join(letters))
    assert run("out", "--d-model", "32", "--steps", "60", "--length", "64", data="long.txt") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["validation"]["bits_a_byte"] < result["baselines_bits_a_byte"]["xz"] - 0.1


def test_tokens_from_a_bin(script, run, tmp_path, capsys):
    parts = [[*sentences(i, 90).encode(), 256] for i in range(40)]
    write_bin(tmp_path, np.concatenate(parts))
    assert run("plain", data="x.bin") == run("resets", "--document-resets", data="x.bin") == 0
    assert not torch.equal(losses(tmp_path / "plain"), losses(tmp_path / "resets"))
    assert run("resets", job="eval", data="x.bin") == run("resets", job="sample") == 0
    write_bin(tmp_path, np.concatenate(parts), tokenizer=None)
    assert run("bare", data="x.bin") == 0 and run("bare", job="eval", data="x.bin") == 0
    capsys.readouterr()
    assert run("bare", job="sample", data="") == 2 and "--tokenizer" in capsys.readouterr().err
    assert run("bare", "--tokenizer", "byte", job="sample", data="") == 0  # the advice helps


def test_samples_from_a_checkpoint(script, run, tmp_path, capsys):
    assert run("out") == 0 and capsys.readouterr()
    assert (
        run("out", "--prompt", "naïve", "--tokens", "30", "--temperature", "0", job="sample") == 0
    )
    text = capsys.readouterr().out.removesuffix("\n")
    model, tokenizer, _ = script.load_model(tmp_path / "out" / "checkpoint.pt")
    ids = model.generate(torch.tensor([tokenizer.encode("naïve")]), 30, temperature=0)[0]
    assert tokenizer.decode_bytes(ids).decode("utf-8", "replace") == text
    assert text.startswith("naïve")


def test_output_that_is_not_utf8(script, run, tmp_path):
    flags = [*tiny(script), "--data", "text.txt", "--out", "out", "--prompt", "日本"]
    process = start(
        sys.executable, script.__file__, *flags, cwd=tmp_path, PYTHONIOENCODING="cp1252"
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors == ""
    assert (tmp_path / "out" / "result.json").exists()


BAD = {  # flags after the usual ones; what the line must say
    "--data nowhere.txt": "nowhere.txt",
    "--data empty.txt": "are too few for --length 32",
    "--data short.txt": "are too few for --length 32",
    "--data latin.txt": "can't decode byte",
    "--data rows.jsonl": "rows.jsonl, line 3",
    "--data x.bin": "token 300 is beyond the model's 257",
    "--data odd.bin": "odd.json",
    "--tokenizer wordpiece": "Unknown encoding wordpiece",
    "--tokenizer bpe:9999999": "ids to offer",
    "--tokenizer bpe:100": "ids to offer",
    "--tokenizer two.tiktoken": "every single byte",
    "--steps 0": "--steps 0 is too small",
    "--lr nan": "--lr nan is too small",
    "--document-resets --data bare.bin": "needs a document_separator",
    "--device cuda": "CUDA",
    "eval --out good --length -5": "--length -5 is too small",
    "--batch 3 --accumulate 2": "equal division",
    "--device tpu": "tpu",
    "--out text.txt": "text.txt",
    "--out junk --resume": "junk/checkpoint.pt holds no model",
    "--out nothing --resume": "nothing/checkpoint.pt",
    "sample --checkpoint junk/checkpoint.pt": "holds no model",
    "sample --checkpoint zero.pt": "holds no model",
    "sample --checkpoint four.pt": "holds no model",
    "sample --checkpoint other.pt": "holds no model",
    "sample --checkpoint nowhere.pt": "nowhere.pt",
    "sample --checkpoint junk": "config.json",
    "sample --out good --prompt ''": "must have some",
    "sample --out good --temperature -1": "--temperature -1.0 is too small",
    "eval --out good --data empty.txt": "1 tokens, and so none",
}


@pytest.fixture(scope="module")
def bad_inputs(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name, content in {"text": sentences(1), "empty": "", "short": "x" * 30}.items():
        (folder / f"{name}.txt").write_text(content, "utf-8")
    (folder / "latin.txt").write_bytes(b"caf\xe9" * 100)
    (folder / "rows.jsonl").write_text('{"text": "a"}\n\n{"text": 3}\n')
    (folder / "odd.bin").write_bytes(b"abc")
    write_bin(folder, [1] * 1000, tokenizer=None, document_separator=None)
    (folder / "x.bin").rename(folder / "bare.bin")
    (folder / "x.json").rename(folder / "bare.json")
    write_bin(folder, [300] * 1000)
    (folder / "two.tiktoken").write_text("YQ== 0\nYg== 1\n")
    (folder / "junk").mkdir()
    (folder / "junk" / "checkpoint.pt").write_bytes(b"not tensors at all")
    (folder / "four.pt").write_bytes(b"junk")
    (folder / "zero.pt").write_bytes(b"")
    torch.save([1, 2], folder / "other.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert (
            script.main([*tiny(script), "--data", "text.txt", "--steps", "1", "--out", "good"]) == 0
        )
    return folder


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(script, flags, bad_inputs, monkeypatch, capsys):
    monkeypatch.chdir(bad_inputs)
    words = shlex.split(flags)
    if words[0] in script.JOBS:
        code = script.main(words)
    else:
        code = script.main([*tiny(script), "--data", "text.txt", "--out", "out", *words])
    line = capsys.readouterr().err
    assert code == 2 and re.fullmatch(r"\w+\.py: .*\n", line) and BAD[flags] in line, line


def test_resuming_with_another_config_names_the_field(script, run, tmp_path, capsys):
    assert run("out") == 0
    assert run("out", "--resume", "--lr", "0.5") == 2
    assert "lr was 0.01 and is 0.5" in capsys.readouterr().err
    assert run("out", "--resume", "--accumulate", "2", "--temperature", "0") == 0
    (tmp_path / "text.txt").write_text(sentences(1) * 2, "utf-8")
    assert run("out", "--resume") == 2 and "data have changed" in capsys.readouterr().err


def test_a_missing_package_is_one_line(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert (
        script.main(["--tokenizer", str(tmp_path / "tokenizer.json"), "--out", str(tmp_path)]) == 2
    )
    assert "pip install tokenizers" in capsys.readouterr().err
