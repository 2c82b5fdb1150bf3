"""The programs in tests/claims on Mamba's paper: their tasks against plain loops, and each one run, tiny."""

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
from tests._helpers import close, corpus_of, far_from_zero, sentences

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "claims"))
PROGRAMS = ("selective_copying", "induction_heads", "selection_ablation", "carried_state", "what_it_remembers")
READS_TEXT = PROGRAMS[2:]

pytestmark = pytest.mark.usefixtures("one_thread")
each_program = pytest.mark.parametrize("name", PROGRAMS)


def program(name: str):
    return importlib.import_module(name)


def small(vocab: int = 20, **sizes) -> mamba.Mamba:
    return far_from_zero(mamba.Mamba(mamba.MambaConfig(8, 2, vocab, **sizes))).float()


# ----- The tasks


def test_copying_by_reading_it_out() -> None:
    """A reader that skips the noise and stops at the first marker finds the targets, and they are all that there is."""
    length, tokens, vocab = 9, 3, 7
    inputs, targets = program("selective_copying").copying(500, length, tokens, vocab, torch.Generator().manual_seed(1))
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
    length, vocab = 6, 5
    inputs, targets = program("induction_heads").induction(600, length, vocab, torch.Generator().manual_seed(1))
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
    heads = program("induction_heads")
    model = small(vocab=16)
    model.forward = lambda tokens, state, return_state: (F.one_hot(torch.full_like(tokens, 3), 16), None)
    targets = torch.cat([heads.induction(n, 20, 16, g)[1] for g in [torch.Generator().manual_seed(1)] for n in (16, 5)])
    shown = heads.accuracy(model, heads.Settings(), 20, 21, torch.Generator().manual_seed(1))
    assert shown == pytest.approx(100 * (targets == 3).double().mean().item()) and shown > 0


# ----- What they compute


def test_the_convolution_is_the_scan_of_a_time_invariant_model() -> None:
    common, (B, L, E, N) = importlib.import_module("_claims"), (2, 11, 3, 4)
    torch.manual_seed(0)
    u, z = (torch.randn(B, L, E, dtype=torch.float64, requires_grad=True) for _ in range(2))
    A = (-torch.rand(E, N, dtype=torch.float64) - 0.1).requires_grad_()
    b, c = (torch.randn(E, N, dtype=torch.float64, requires_grad=True) for _ in range(2))
    d, bias = (torch.randn(E, dtype=torch.float64, requires_grad=True) for _ in range(2))
    leaves, zeros = (u, A, b, c, d, z, bias), torch.zeros(B, L, E, dtype=torch.float64)
    ours, _ = common.time_invariant_scan(u, zeros, A, b, c, d, z, bias, True)
    truth = mamba.selective_scan(u, zeros, A, b, c, d, z, bias, True, backend="sequential")
    close(ours, truth)
    weight = torch.randn_like(truth)
    grads = [torch.autograd.grad((y * weight).sum(), leaves) for y in (ours, truth)]
    for mine, theirs in zip(*grads, strict=True):
        close(mine, theirs)


def test_only_a_model_without_selection_is_computed_as_a_convolution() -> None:
    common, scan = importlib.import_module("_claims"), mamba.selective_scan
    with common.faster("delta"):
        assert mamba.selective_scan is scan
    with pytest.raises(ZeroDivisionError), common.faster(""):
        assert mamba.selective_scan is common.time_invariant_scan
        raise ZeroDivisionError
    assert mamba.selective_scan is scan


def test_loss_by_position_by_one_token_after_another() -> None:
    carried, model = program("carried_state"), small(vocab=256)
    text = np.frombuffer(sentences(0, 61).encode()[:61], np.uint8)
    config = mamba.Config(batch=2, length=5)
    corpus = corpus_of(mamba, text)
    for carry in True, False:
        shown, losses = carried.loss_by_position(model, corpus, config, carry), [[] for _ in range(5)]
        for row in text[:31], text[30:]:  # two stretches of six windows of five, and what follows the last
            state = model.init_state(1)
            for i in range(30):
                if i % 5 == 0 and not carry:
                    state = model.init_state(1)
                logits, state = model.step(torch.tensor([int(row[i])]), state)
                losses[i % 5].append(F.cross_entropy(logits, torch.tensor([int(row[i + 1])])).item())
        assert shown == pytest.approx([sum(at) / 12 for at in losses], abs=1e-4)


def test_spans_cover_the_window() -> None:
    carried = program("carried_state")
    assert list(carried.spans(64)) == ["1", "2–4", "5–16", "17–64", "all"]
    assert list(carried.spans(3)) == ["1", "2–3", "all"]
    for length in 1, 2, 4, 5, 16, 64:
        *parts, whole = carried.spans(length).values()
        assert [i for part in parts for i in range(length)[part]] == list(range(length)[whole]) == list(range(length))


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
        *[("\n\n", "line break"), ("  ", "spaces"), (" the", "start of a word"), ("ing", "rest of a word")],
        *[(" 12", "number"), ("12", "number"), ("...", "punctuation"), (' "', "punctuation"), ("", "punctuation")],
    ],
)
def test_kinds_of_token(text: str, kind: str) -> None:
    assert program("what_it_remembers").kind_of(text).startswith(kind)


def test_by_kind_against_a_loop() -> None:
    remembers, model = program("what_it_remembers"), small(vocab=257)
    tokenizer = mamba.load_tokenizer("byte", [])
    tokens = tokenizer.encode("a b\n12 (cd) ef, 3\n g")
    shown = remembers.by_kind(model, tokenizer, tokens, 10)
    logs, kinds = [], []
    for first in range(0, len(tokens) - 9, 10):
        window = tokens[first : first + 10]
        logs.append(remembers.step_sizes(model, torch.tensor(window.astype(np.int64))[None])[:, 0].log())
        kinds += [remembers.kind_of(tokenizer.decode([i])) for i in window]
    logs = torch.cat(logs, dim=1).T.tolist()  # a row for each token
    assert set(shown) == set(kinds)
    for kind, ratios in shown.items():
        for layer, ratio in enumerate(ratios):
            mine = [row[layer] for row, k in zip(logs, kinds, strict=True) if k == kind]
            everyone = [row[layer] for row in logs]
            expected = math.exp(sum(mine) / len(mine) - sum(everyone) / len(everyone))
            assert ratio == pytest.approx(expected, rel=1e-4)


def test_spread_against_a_loop() -> None:
    """Of logarithms, over all tokens: the spread of the channels' mean, the median of each one's; the widest."""
    remembers, model = program("what_it_remembers"), small(vocab=30)
    windows = torch.randint(30, (19, 7), generator=torch.Generator().manual_seed(2))
    of_mean, of_channel, widest = remembers.spread(model, windows)
    for layer in range(2):
        rows = [remembers.channel_steps(model, w[None])[layer, 0].double() for w in windows]
        deltas = torch.cat(rows)  # (tokens, channels)
        each = [statistics.pstdev(deltas[:, e].log().tolist()) for e in range(deltas.shape[1])]
        assert of_channel[layer] == pytest.approx(statistics.median(each), rel=1e-3)
        assert widest[layer] == each.index(max(each))
        assert of_mean[layer] == pytest.approx(statistics.pstdev(deltas.mean(1).log().tolist()), rel=1e-3)


def test_lines_hold_every_token_once_within_the_width() -> None:
    pieces = ["ab", " c", "\n", "defg", "h", "\n\n", " i"]
    lines = program("what_it_remembers").lines_of(pieces, 5)
    assert [i for line in lines for i, _, _ in line] == list(range(len(pieces)))
    assert lines[0] == [(0, 0, "ab"), (1, 2, " c"), (2, 4, "¶")]
    assert all(column + len(shown) <= 5 for line in lines for _, column, shown in line)


def test_compact_json_is_json() -> None:
    value = {"a": [1, 2.5, [3, None]], "b": {"c": [], "d": {}}, "e": [{"f": "é"}], "g": (1 / 3, True)}
    text = importlib.import_module("_claims").compact(value)
    assert json.loads(text) == {**value, "g": [0.333333, True]}


# ----- Running, and what the README says


@each_program
def test_smoke(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As the user runs it: a table, a result that holds what the table says, and a picture, all under out/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(sentences(i, 700) for i in range(3)), "utf-8")
    module = program(name)
    module.main(["--smoke", *(["--data", "text.txt"] if name in READS_TEXT else [])])
    folder = tmp_path / "out" / "claims"
    result = json.loads((folder / f"{name}.json").read_text("utf-8"))
    assert {"command", "seeds", "settings", "versions", "device", "script_sha256", "wall_seconds"} <= result.keys()
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
    assert program(name).table(result) in (HERE.parent / "README.md").read_text("utf-8")
    fresh = " --seeds 4 5 6" if result["seeds"] == [4, 5, 6] else ""  # where 1 to 3 had been looked at before
    assert len(result["seeds"]) == 3 and result["command"] == f"python tests/claims/{name}.py{fresh}"
    assert result["command"] in (HERE.parent / "README.md").read_text("utf-8")


@each_program
def test_paper_settings_are_settings(name: str) -> None:
    """What --paper and --smoke change are fields; where there is no --paper it is refused."""
    module, common = program(name), importlib.import_module("_claims")
    for flags, changes in (["--smoke"], module.SMOKE), (["--paper"], getattr(module, "PAPER", None)):
        if changes is None:
            with pytest.raises(SystemExit):
                module.main(flags)
            continue
        paper = getattr(module, "PAPER", None)
        settings, _ = common.parse("", module.Settings, paper, module.SMOKE, flags)
        assert {key: getattr(settings, key) for key in changes} == changes
        settings, _ = common.parse("", module.Settings, paper, module.SMOKE, [*flags, "--steps", "77"])
        assert settings.steps == 77
