"""The programs in tests/claims on Mamba's paper: tasks against plain loops, and each run, tiny."""

import importlib
import json
import math
import statistics
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mamba
import transformer
from tests._helpers import close, far_from_zero, sentences

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "claims"))
READS_TEXT = ("selection_ablation", "carried_state", "what_it_remembers", "transformer_plus_plus")
PROGRAMS = ("selective_copying", "induction_heads", *READS_TEXT)

pytestmark = pytest.mark.usefixtures("one_thread")
each_program = pytest.mark.parametrize("name", PROGRAMS)


def program(name: str):
    return importlib.import_module(name)


def small(vocab: int = 20, **sizes) -> mamba.Mamba:
    return far_from_zero(mamba.Mamba(mamba.MambaConfig(8, 2, vocab, **sizes))).float()


# ----- The tasks


def test_copying_by_reading_it_out() -> None:
    """A reader that skips the noise and stops at the first marker finds the targets, no more."""
    (length, tokens, vocab), random = (9, 3, 7), torch.Generator().manual_seed(1)
    inputs, targets = program("selective_copying").copying(500, length, tokens, vocab, random)
    places, symbols = Counter(), Counter()
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert len(row) == length + tokens and row[length:] == [vocab - 1] * tokens
        read = [(place, symbol) for place, symbol in enumerate(row[:length]) if symbol != 0]
        assert [symbol for _, symbol in read] == target
        places.update(place for place, _ in read)
        symbols.update(target)
    assert set(symbols) == set(range(1, vocab - 1))
    # Each place holds a data token in a third of the sequences, within 5 standard deviations.
    assert all(abs(places[place] - 500 / 3) < 5 * math.sqrt(500 * 2 / 9) for place in range(length))


def test_induction_by_looking_it_up() -> None:
    length, vocab, random = 6, 5, torch.Generator().manual_seed(1)
    inputs, targets = program("induction_heads").induction(600, length, vocab, random)
    places, answers = Counter(), Counter()
    for row, (target,) in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert len(row) == length and row[-1] == vocab - 1 and row.count(vocab - 1) == 2
        first = row.index(vocab - 1)
        assert target == row[first + 1] != vocab - 1
        places[first] += 1
        answers[target] += 1
    assert set(places) == set(range(length - 2)) and set(answers) == set(range(vocab - 1))
    for counts, kinds in (places, length - 2), (answers, vocab - 1):
        spread = math.sqrt(600 * (kinds - 1)) / kinds
        assert all(abs(count - 600 / kinds) < 5 * spread for count in counts.values())


def test_lengths_double_in_equal_stages_up_to_the_trained_one() -> None:
    common = importlib.import_module("_claims")
    assert common.growing_lengths(16, 64, 30) == [16] * 10 + [32] * 10 + [64] * 10
    assert common.growing_lengths(64, 64, 3) == [64] * 3
    assert common.growing_lengths(5, 21, 3) == [5, 10, 21]


@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_answers_do_not_depend_on_the_chunk(chunk: int) -> None:
    heads, model = program("induction_heads"), small(vocab=16)
    inputs, _ = heads.induction(40, 50, 16, torch.Generator().manual_seed(1))
    assert torch.equal(heads.answers(model, inputs, chunk), model(inputs)[:, -1].argmax(-1))


def test_accuracy_counts_every_sequence_once() -> None:
    """A model that always answers 3 is right as often as the answer is 3."""
    heads, model, random = program("induction_heads"), small(vocab=16), torch.Generator()
    always = F.one_hot(torch.tensor([[3]]), 16)
    model.forward = lambda tokens, state, return_state: (always.expand(len(tokens), 1, 16), None)
    random.manual_seed(1)
    targets = torch.cat([heads.induction(n, 20, 16, random)[1] for n in (16, 5)])
    shown = heads.accuracy(model, heads.Settings(), 20, 21, torch.Generator().manual_seed(1))
    assert shown == pytest.approx(100 * (targets == 3).double().mean().item()) and shown > 0


def test_a_carried_state_is_that_of_the_whole_sequence(monkeypatch) -> None:
    """With a rate of 0: each loss is taken where the model stands after all windows of a row."""
    heads, model = program("induction_heads"), small(vocab=16).requires_grad_()
    s = heads.Settings(length=9, batch=2, streams=3, carried_steps=40, lr=0.0)
    usual, hidden, windows, losses = F.cross_entropy, model.hidden, [], []

    def read(inputs, state):
        if inputs.ndim == 2:  # not the step of the last symbol
            windows.append(inputs)
        return hidden(inputs, state)

    def loss(logits, answer):
        losses.append((logits.detach(), answer))
        return usual(logits, answer)

    monkeypatch.setattr(model, "hidden", read)
    monkeypatch.setattr(F, "cross_entropy", loss)
    heads.train_on_carried_states(model, s, 1)
    monkeypatch.undo()
    longest = []
    for row in range(5):
        sequence, lengths = [], []
        for window, (logits, answer) in zip(windows, losses, strict=True):
            symbols = window[row].tolist()
            sequence = symbols if 15 in symbols else sequence + symbols
            assert answer[row] == sequence[sequence.index(15) + 1]
            close(logits[row], model(torch.tensor([[*sequence, 15]]))[0, -1].detach(), 1e-4)
            lengths.append(len(sequence) // 8)
        longest.append(max(lengths))
    assert longest == [1, 1, 2, 4, 8]


# ----- What they compute


@pytest.mark.parametrize(
    "selective", ["", "B", "C", "B,C", "delta", "delta,B", "delta,C", "delta,B,C"]
)
def test_ablated_block_against_the_recurrence(selective: str) -> None:
    """One document after another, position by position, with a B and a C a channel and state."""
    common, (L, E, N) = importlib.import_module("_claims"), (11, 16, 3)
    config, parts = mamba.MambaConfig(8, 1, 20, N), tuple(filter(None, selective.split(",")))
    block = far_from_zero(common.AblatedBlock(config, parts))
    u, starts = torch.randn(1, L, 8, dtype=torch.float64), torch.zeros(1, L, dtype=torch.bool)
    starts[0, 5] = True
    outputs = []
    for document in u[0].split([5, L - 5]):
        x, z = block.in_proj(document).chunk(2, dim=-1)
        x = F.pad(x, (0, 0, 3, 0)).unfold(0, 4, 1)  # (L, E, 4)
        x = F.silu((x * block.conv1d.weight[:, 0]).sum(-1) + block.conv1d.bias)
        chosen, h = dict.fromkeys(parts), torch.zeros(E, N)
        if parts:
            sizes = [{"delta": config.rank}.get(part, N) for part in parts]
            chosen = dict(zip(parts, block.x_proj(x).split(sizes, dim=-1), strict=True))
        for t in range(len(x)):
            delta = block.dt_proj.bias
            if "delta" in parts:
                delta = delta + block.dt_proj.weight @ chosen["delta"][t]
            B = chosen["B"][t].expand(E, N) if "B" in parts else block.B.view(E, N)
            C = chosen["C"][t].expand(E, N) if "C" in parts else block.C.view(E, N)
            delta = F.softplus(delta)[:, None]
            h = torch.exp(-delta * torch.exp(block.A_log)) * h + delta * B * x[t][:, None]
            y = (h * C).sum(-1) + block.D * x[t]
            outputs.append(block.out_proj(y * F.silu(z[t])))
    close(block(u, starts=starts)[0][0], torch.stack(outputs))
    if selective == "delta,B,C":
        mixer = mamba.MambaBlock(config).double()
        mixer.load_state_dict(block.state_dict())
        close(block(u, starts=starts)[0], mixer(u, starts=starts)[0])


def test_mamba_has_no_ablated_block_and_an_ablated_model_no_other() -> None:
    common, config = importlib.import_module("_claims"), mamba.MambaConfig(8, 2, 20)
    for selective, kind in (("delta", "B", "C"), mamba.MambaBlock), (("B",), common.AblatedBlock):
        layers = common.make_mamba(config, selective).backbone.layers
        assert [type(layer.mixer) for layer in layers] == [kind, kind]


def byte_corpus(size: int) -> mamba.Corpus:
    tokens = np.frombuffer(sentences(0, size).encode()[:size], np.uint8)
    return mamba.Corpus(tokens, tokens, mamba.load_tokenizer("byte", []), 257, 256)


def test_loss_by_position_by_one_token_after_another() -> None:
    carried, model = program("carried_state"), small(vocab=256)
    config, corpus = mamba.Config(batch=2, length=5), byte_corpus(61)
    for carry in True, False:
        shown = carried.loss_by_position(model, corpus, config, carry)
        losses = [[] for _ in range(5)]
        for row in corpus.valid[:31], corpus.valid[30:]:  # two stretches of six windows of five
            for i in range(30):
                token = torch.tensor([int(row[i])])
                if i == 0 or (i % 5 == 0 and not carry):
                    logits, state = model(token[None], return_state=True)
                    logits = logits[:, 0]
                else:
                    logits, state = model.step(token, state)
                loss = F.cross_entropy(logits, torch.tensor([int(row[i + 1])]))
                losses[i % 5].append(loss.item())
        assert shown == pytest.approx([sum(at) / 12 for at in losses], abs=1e-4)


def test_the_arms_differ_in_their_parts_and_not_in_size() -> None:
    claim = program("transformer_plus_plus")
    counts, kinds = [], set()
    for parts in claim.ARMS.values():
        shape = transformer.TransformerConfig(96, 2, 4, vocab_size=1024, max_length=256, **parts)
        counts.append(claim.count(claim.equal_parameters(shape)))
        kinds.add(tuple(parts.values()))
    assert len(kinds) == 8 and max(counts) - min(counts) < 0.002 * min(counts)


@pytest.mark.parametrize("carry", [True, False])
def test_training_in_order_by_hand(carry: bool) -> None:
    """The weights after eight steps, two more than the text has windows, are the same."""
    corpus, config = byte_corpus(61), mamba.Config(steps=8, batch=2, length=5, lr=0.01, clip=1e9)
    ours, model = small(vocab=256).requires_grad_(True), small(vocab=256).requires_grad_(True)
    model.load_state_dict(ours.state_dict())
    program("carried_state").train_in_order(ours, corpus, config, carry)
    optimizer = mamba.make_optimizer(model, config)
    for step in range(8):
        first = step % 6 * 5
        rows = torch.tensor(corpus.train.copy()).long()
        rows = torch.stack([rows[first : first + 6], rows[30 + first : 36 + first]])
        if not carry or first == 0:
            state = None
        logits, state = model(rows[:, :-1], state, return_state=True)
        state = [tuple(tensor.detach() for tensor in layer) for layer in state]
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        for group in optimizer.param_groups:
            group["lr"] = mamba.learning_rate(step, config)
        optimizer.step()
    for mine, theirs in zip(ours.parameters(), model.parameters(), strict=True):
        close(mine, theirs, 1e-3)


def test_spans_cover_the_window() -> None:
    carried = program("carried_state")
    assert list(carried.spans(64)) == ["1", "2–4", "5–16", "17–64", "all"]
    assert list(carried.spans(3)) == ["1", "2–3", "all"]
    for length in 1, 2, 4, 5, 16, 64:
        *parts, whole = carried.spans(length).values()
        assert [i for part in parts for i in range(length)[part]] == list(range(length))
        assert whole == slice(0, length)


def test_step_sizes_are_what_the_scan_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, scan = small(), [], mamba.selective_scan

    def listen(u, delta, A, B, C, D, z, delta_bias, *rest, **options):
        given.append(F.softplus(delta + delta_bias).mean(-1))
        return scan(u, delta, A, B, C, D, z, delta_bias, *rest, **options)

    tokens = torch.randint(20, (2, 9))
    shown = program("what_it_remembers").step_sizes(model, tokens)
    monkeypatch.setattr(mamba, "selective_scan", listen)
    model(tokens)
    close(shown, torch.stack(given), 1e-6)
    assert shown.std() > 0.001


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("\n\n", "line break"), ("  ", "spaces"), (" the", "start of a word"), (" 12", "number"),
        ("ing", "rest of a word"), ("12", "number"), ("...", "punctuation"), (' "', "punctuation"),
        ("", "punctuation"),
    ],
)  # fmt: skip
def test_kinds_of_token(text: str, kind: str) -> None:
    assert program("what_it_remembers").kind_of(text).startswith(kind)


def test_by_kind_against_a_loop() -> None:
    remembers, model = program("what_it_remembers"), small(vocab=257)
    tokenizer = mamba.load_tokenizer("byte", [])
    tokens = np.array(tokenizer.encode("a b\n12 (cd) ef, 3\n g"))
    shown = remembers.by_kind(model, tokenizer, tokens, 10)
    logs, kinds = [], []
    for first in range(0, len(tokens) - 9, 10):
        window = tokens[first : first + 10]
        logs.append(remembers.step_sizes(model, torch.tensor(window)[None])[:, 0].log())
        kinds += [remembers.kind_of(chr(i)) for i in window]
    logs = torch.cat(logs, dim=1).T.tolist()  # a row for each token
    assert set(shown) == set(kinds)
    for kind, ratios in shown.items():
        for layer, ratio in enumerate(ratios):
            mine = [row[layer] for row, k in zip(logs, kinds, strict=True) if k == kind]
            everyone = [row[layer] for row in logs]
            expected = math.exp(sum(mine) / len(mine) - sum(everyone) / len(everyone))
            assert ratio == pytest.approx(expected, rel=1e-4)


def test_spread_against_a_loop() -> None:
    """Of logarithms, over all tokens: that of the channels' mean, the median one; the widest."""
    remembers, model = program("what_it_remembers"), small(vocab=30)
    windows = torch.randint(30, (19, 7), generator=torch.Generator().manual_seed(2))
    of_mean, of_channel, widest = remembers.spread(model, windows)
    for layer in range(2):
        rows = [remembers.channel_steps(model, w[None])[layer, 0].double() for w in windows]
        deltas = torch.cat(rows)  # (tokens, channels)
        each = [statistics.pstdev(deltas[:, e].log().tolist()) for e in range(deltas.shape[1])]
        assert of_channel[layer] == pytest.approx(statistics.median(each), rel=1e-3)
        assert widest[layer] == each.index(max(each))
        assert of_mean[layer] == pytest.approx(
            statistics.pstdev(deltas.mean(1).log().tolist()), rel=1e-3
        )


def test_lines_hold_every_token_once_within_the_width() -> None:
    pieces = ["ab", " c", "\n", "defg", "h", "\n\n", " i"]
    lines = program("what_it_remembers").lines_of(pieces, 5)
    assert [i for line in lines for i, _, _ in line] == list(range(len(pieces)))
    assert lines[0] == [(0, 0, "ab"), (1, 2, " c"), (2, 4, "¶")]
    assert all(column + len(shown) <= 5 for line in lines for _, column, shown in line)


def test_compact_json_is_json() -> None:
    value = {
        "a": [1, 2.5, [3, None]],
        "b": {"c": [], "d": {}},
        "e": [{"f": "é"}],
        "g": (1 / 3, True),
    }
    text = importlib.import_module("_claims").compact(value)
    assert json.loads(text) == {**value, "g": [0.333333, True]}


# ----- Running, and what the README says


@each_program
def test_smoke(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """As the user runs it: a table, a result that holds it, and a picture, all under out/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(sentences(i, 700) for i in range(3)), "utf-8")
    module = program(name)
    module.main(["--smoke", *(["--data", "text.txt"] if name in READS_TEXT else [])])
    folder = tmp_path / "out" / "claims"
    result = json.loads((folder / f"{name}.json").read_text("utf-8"))
    assert {"command", "seeds", "settings", "versions", "device"} <= result.keys()
    assert {"script_sha256", "wall_seconds", "cpu_seconds"} <= result.keys()
    assert module.table(result) in capsys.readouterr().out
    if importlib.util.find_spec("matplotlib"):
        assert (folder / f"{name}.png").stat().st_size > 5000
    assert {path.name for path in tmp_path.iterdir()} == {"out", "text.txt"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_readme_has_the_tables_of_the_result_files(name: str) -> None:
    path = HERE / "claims" / "results" / f"{name}.json"
    if not path.is_file():
        pytest.skip("not run over seeds yet, as the README says")
    result = json.loads(path.read_text("utf-8"))
    readme = (HERE / "claims" / "README.md").read_text("utf-8")
    assert program(name).table(result) in readme
    fresh = (
        " --seeds 4 5 6" if result["seeds"] == [4, 5, 6] else ""
    )  # where 1 to 3 had been looked at before
    assert len(result["seeds"]) == 3
    assert result["command"] == f"python tests/claims/{name}.py{fresh}"
    assert result["command"] in readme


@each_program
def test_paper_settings_are_settings(name: str) -> None:
    """What --paper and --smoke change are fields; where there is no --paper it is refused."""
    module, common = program(name), importlib.import_module("_claims")
    paper = getattr(module, "PAPER", None)
    for flags, changes in (["--smoke"], module.SMOKE), (["--paper"], paper):
        if changes is None:
            with pytest.raises(SystemExit):
                module.main(flags)
            continue
        settings, _ = common.parse("", module.Settings, paper, module.SMOKE, flags)
        assert {key: getattr(settings, key) for key in changes} == changes
        flags = [*flags, "--steps", "77"]
        settings, _ = common.parse("", module.Settings, paper, module.SMOKE, flags)
        assert settings.steps == 77
