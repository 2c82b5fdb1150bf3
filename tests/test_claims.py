"""tests/claims on the language models: tasks against plain loops, and each program, tiny."""

import importlib.util
import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mamba
import transformer
from tests._helpers import close, far_from_zero, sentences

CLAIMS = Path(__file__).resolve().parent / "claims"
sys.path.insert(0, str(CLAIMS))

import _claims  # noqa: E402
import mamba_claims as claims  # noqa: E402
import transformer_claims  # noqa: E402

PROGRAMS = {"mamba_claims": claims, "transformer_claims": transformer_claims}
WORDS = [(name, word) for name, program in PROGRAMS.items() for word in program.CLAIMS]
each_claim = pytest.mark.parametrize(("name", "word"), WORDS)
pytestmark = pytest.mark.usefixtures("one_thread")


def small(vocab: int = 20) -> mamba.Mamba:
    return far_from_zero(mamba.Mamba(mamba.MambaConfig(8, 2, vocab))).float()


def settings(table: dict, **values):
    return claims.SimpleNamespace(**{name: row.default for name, row in table.items()} | values)


def in_equal_parts(counts: Counter, share: float, total: int) -> bool:
    """Each count is within five standard deviations of its share of the total."""
    spread = math.sqrt(total * share * (1 - share))
    return all(abs(count - total * share) < 5 * spread for count in counts.values())


def test_copying_by_reading_it_out() -> None:
    """A reader that skips the noise and stops at the first marker finds the targets, no more."""
    (length, tokens, vocab), random = (9, 3, 7), torch.Generator().manual_seed(1)
    inputs, targets = claims.copying(500, length, tokens, vocab, random)
    places, symbols = Counter(), Counter()
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert len(row) == length + tokens and row[length:] == [vocab - 1] * tokens
        read = [(place, symbol) for place, symbol in enumerate(row[:length]) if symbol != 0]
        assert [symbol for _, symbol in read] == target
        places.update(place for place, _ in read)
        symbols.update(target)
    assert set(symbols) == set(range(1, vocab - 1)) and set(places) == set(range(length))
    assert in_equal_parts(places, tokens / length, 500)


def test_induction_by_looking_it_up() -> None:
    length, vocab, random = 6, 5, torch.Generator().manual_seed(1)
    inputs, targets = claims.induction(600, length, vocab, random)
    places, answers = Counter(), Counter()
    for row, (target,) in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert len(row) == length and row[-1] == vocab - 1 and row.count(vocab - 1) == 2
        first = row.index(vocab - 1)
        assert target == row[first + 1] != vocab - 1
        places[first] += 1
        answers[target] += 1
    assert set(places) == set(range(length - 2)) and set(answers) == set(range(vocab - 1))
    assert in_equal_parts(places, 1 / 4, 600) and in_equal_parts(answers, 1 / 4, 600)


@pytest.mark.parametrize(("first", "last", "expected"), [(4, 16, [4, 8, 16]), (5, 21, [5, 10, 21])])
def test_lengths_double_in_equal_stages_up_to_the_trained_one(first, last, expected) -> None:
    s, lengths = settings(claims.HEADS, first_length=first, length=last, lr=0.0), []

    def draw(length: int):
        lengths.append(length)
        return claims.induction(2, length, 16, torch.Generator())

    claims.train(small(vocab=16).requires_grad_(), s, 6, draw, lambda: 0.0)
    assert lengths == [length for length in expected for _ in range(2)]


@pytest.mark.parametrize("chunk", [1, 7, 20, 64])
def test_accuracy_by_reading_whole_sequences(chunk: int) -> None:
    model, random, right = small(vocab=5), torch.Generator().manual_seed(1), 0
    for count in 16, 5:
        inputs, targets = claims.induction(count, 20, 5, random)
        right += (model(inputs)[:, -1].argmax(-1) == targets[:, 0]).sum().item()
    s = settings(claims.HEADS, sequences=21, chunk=chunk, vocab=5)
    shown = claims.heads_accuracy(model, s, 20, torch.Generator().manual_seed(1))
    assert shown == pytest.approx(100 * right / 21) and right > 0


def test_a_carried_state_is_that_of_the_whole_sequence(monkeypatch) -> None:
    """With a rate of 0: each loss is taken where the model stands after all windows of a row."""
    model = small(vocab=16).requires_grad_()
    s = settings(claims.HEADS, length=9, batch=2, streams=3, carried_steps=26, lr=0.0)
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
    claims.train_on_carried_states(model, s, 1)
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


@pytest.mark.parametrize("selective", ["", "B", "C", "B,C", "delta", "delta,B", "delta,B,C"])
def test_ablated_block_against_the_recurrence(selective: str) -> None:
    """One document after another, position by position, with a B and a C a channel and state."""
    (L, E, N), config = (11, 16, 3), mamba.MambaConfig(8, 1, 20, 3)
    parts = [part for part in selective.split(",") if part]
    block = far_from_zero(claims.AblatedBlock(config, tuple(parts)))
    u, starts = torch.randn(1, L, 8, dtype=torch.float64), torch.zeros(1, L, dtype=torch.bool)
    starts[0, 5] = True
    outputs = []
    for document in u[0].split([5, L - 5]):
        x, z = block.in_proj(document).chunk(2, dim=-1)
        x = F.pad(x, (0, 0, 3, 0)).unfold(0, 4, 1)  # (L, E, 4)
        x = F.silu((x * block.conv1d.weight[:, 0]).sum(-1) + block.conv1d.bias)
        chosen, h = {}, torch.zeros(E, N)
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


def test_only_an_ablated_model_has_ablated_blocks() -> None:
    for selective, kind in ("delta,B,C", mamba.MambaBlock), ("delta", claims.AblatedBlock):
        model = claims.make_mamba(mamba.MambaConfig(8, 2, 20), selective)
        assert [type(layer.mixer) for layer in model.backbone.layers] == [kind, kind]


def test_the_arms_differ_in_their_parts_and_not_in_size() -> None:
    counts, kinds = [], set()
    for parts in transformer_claims.ARMS.values():
        shape = transformer.TransformerConfig(96, 2, 4, vocab_size=1024, max_length=256, **parts)
        shape = transformer_claims.equal_parameters(shape)
        counts.append(transformer_claims.count(shape))
        kinds.add(tuple(parts.values()))
    assert len(kinds) == 4 and max(counts) - min(counts) < 0.002 * min(counts)


@each_claim
def test_smoke(name: str, word: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """As the user runs it: a table, a result that holds it, and a picture, all under out/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(sentences(i, 700) for i in range(3)), "utf-8")
    program, script = PROGRAMS[name], importlib.import_module(name.removesuffix("_claims"))
    claim, flags = program.CLAIMS[word], []
    if "data" in claim.settings:
        flags = ["--data", "text.txt"]
    if word == "default":
        flags = ["--flags", "--smoke --data text.txt", "--seeds", "1"]
    _claims.main(script, "", program.CLAIMS, [word, "--smoke", *flags])
    folder = tmp_path / "out" / "claims"
    result = json.loads((folder / f"{claim.name}.json").read_text("utf-8"))
    assert {"command", "seeds", "settings", "versions", "device"} <= result.keys()
    assert {"script_sha256", "wall_seconds", "cpu_seconds"} <= result.keys()
    assert claim.table(result) in capsys.readouterr().out
    if importlib.util.find_spec("matplotlib") and claim.draw:
        assert (folder / f"{claim.name}.png").stat().st_size > 5000
    assert {path.name for path in tmp_path.iterdir()} == {"out", "text.txt"}


@each_claim
def test_the_readme_has_the_table_of_three_seeds_and_how_to_make_it(name: str, word: str) -> None:
    claim = PROGRAMS[name].CLAIMS[word]
    result = json.loads((CLAIMS / "results" / f"{claim.name}.json").read_text("utf-8"))
    readme = (CLAIMS / "README.md").read_text("utf-8")
    assert len(result["seeds"]) == 3 and 0 not in result["seeds"]
    assert claim.table(result) in readme
    fresh = " --seeds 4 5 6" if result["seeds"] == [4, 5, 6] else ""  # 1 to 3 were looked at
    assert f"`python tests/claims/{name}.py {word}{fresh}`" in readme


def test_flags_come_before_paper_and_smoke(tmp_path: Path, monkeypatch) -> None:
    row = {"a": _claims.Setting(1, "", smoke=2, paper=3), "b": _claims.Setting(4, "", smoke=5)}
    seen = []
    monkeypatch.chdir(tmp_path)

    def measure(s, seeds, progress) -> dict:
        seen.append((s.a, s.b, seeds))
        return {"each": [1 / 3, [2, None]], "text": "[é]"}

    claim = _claims.Claim("x", row, measure, lambda result: "")
    for flags in [], ["--smoke"], ["--paper"], ["--smoke", "--a", "7", "--seeds", "9"]:
        results = [] if "--smoke" in flags else ["--results", "here"]
        _claims.main(mamba, "", {"x": claim}, ["x", *flags, *results])
    assert seen == [(1, 4, [1, 2, 3]), (2, 5, [1, 2]), (3, 4, [1, 2, 3]), (7, 5, [9])]
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")}
    assert names == {"here/x.json", "here/x_paper.json", "out/claims/x.json"}
    text = (tmp_path / "here/x.json").read_text("utf-8")
    assert json.loads(text)["each"] == [0.333333, [2, None]] and '"text": "[é]"' in text
    with pytest.raises(SystemExit):
        _claims.main(mamba, "", transformer_claims.CLAIMS, ["parts", "--paper"])
