"""recaption.py: formulas against slow loops, captions against their parser, then the jobs as a user starts them."""

import dataclasses
import http.server
import itertools
import json
import math
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import recaption as r
from tests._helpers import close, far_from_zero

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(r.__file__)
WORDS = ["a", " red", " circle", " square", "."]


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def quiet(*_, **__):
    pass


def scenes(count, seed=0):
    generator = seeded(seed)
    return [r.draw_scene(generator) for _ in range(count)]


# ----- Scenes and captions --------------------------------------------------------------------------------------------


def test_the_parser_inverts_every_wording_of_every_scene():
    wordings = set()
    for i, scene in enumerate(scenes(300)):
        text = r.describe(scene, "descriptive", seeded(i))
        assert r.parse_caption(text) == scene, text
        assert r.parse_caption(text.upper()) == scene
        wordings.add(" ".join(text.split()[:2]))
    assert {"on a", "the background", "a picture"} <= wordings


def test_the_parser_inverts_what_is_left_open():
    for i, scene in enumerate(scenes(100)):
        partial = r.brief(scene)
        assert r.parse_caption(r.describe(partial, "descriptive", seeded(i))) == partial
        short = r.parse_caption(r.describe(scene, "short", seeded(i)))
        large = [thing for thing in scene.things if thing.size == "large"] or list(scene.things)
        assert short == r.Scene((r.Thing(large[0].shape, large[0].colour),))


def test_descriptions_have_the_length_that_the_tokenizer_allows():
    texts = [r.describe(scene, "descriptive", seeded(i)) for i, scene in enumerate(scenes(300))]
    pieces = r.Pieces.learn(texts, 4096)
    assert max(len(pieces.encode(text)) for text in texts) + 2 <= r.Config().length


def test_alt_text_omits_swaps_and_misses():
    """Of what alt-text says of colour and shape together some is wrong, and most scenes are not said in full."""
    pairs = [(r.parse_caption(r.describe(s, "alt", seeded(i))), s) for i, s in enumerate(scenes(400))]
    report = r.agreement_report(pairs)
    assert 0.6 < report["binding"] < 0.95 and report["f1"] < 0.6
    assert 0.05 < sum(not said.things for said, _ in pairs) / len(pairs) < 0.35


def test_draws_are_reproducible_and_differ_by_seed():
    assert scenes(20, 1) == scenes(20, 1) != scenes(20, 2)
    texts = [[r.describe(s, "alt", seeded(n)) for s in scenes(20)] for n in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_an_unknown_style_is_named():
    with pytest.raises(ValueError, match="style 'long': must be one of short, descriptive, alt"):
        r.describe(scenes(1)[0], "long")


def test_a_picture_shows_its_scene():
    """Colours stand in the middle of their quarter, the background in the corners, nothing in empty quarters."""
    for scene in scenes(60):
        image = r.render(scene)
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        ground = np.array(r.BACKGROUNDS[scene.background])
        assert (image[0, 0] == ground).all() and (image[31, 31] == ground).all()
        used = {thing.place: thing for thing in scene.things}
        for i, place in enumerate(r.VALUES["place"]):
            row, column = divmod(i, 2)
            cell = image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            if place not in used:
                assert (cell == ground).all()
                continue
            colour = np.array(r.COLOURS[used[place].colour])
            assert abs(cell[6:11, 8].astype(int) - colour).max(-1).min() <= 1
            dark = (abs(cell.astype(int) - 0.35 * colour).max(-1) <= 1).any()
            assert dark == (used[place].texture == "striped")


def test_no_two_values_look_alike():
    base = r.Thing("circle", "red", "large", "plain", "top left")
    shown = [r.Scene((base,), "white"), r.Scene((base,), "pink")]
    for name, values in r.VALUES.items():
        shown += [
            r.Scene((dataclasses.replace(base, **{name: v}),), "white") for v in values if v != getattr(base, name)
        ]
    images = [r.render(scene).astype(int) for scene in shown]
    assert min(abs(a - b).sum() for a, b in itertools.combinations(images, 2)) > 1000


def test_a_larger_picture_is_the_same_one():
    for scene in scenes(5):
        coarse = r.render(scene, 64).reshape(32, 2, 32, 2, 3).mean((1, 3))
        assert abs(coarse - r.render(scene)).max() < 130 and abs(coarse - r.render(scene)).mean() < 4


def test_agreement_by_hand():
    said = r.parse_caption(
        "a red circle in the top left and a small blue square in the top right, on a white background"
    )
    true = r.parse_caption(
        "a red square in the top right and a large blue circle in the top left, on a black background"
    )
    found = r.agreement(said, true)
    # Things are matched by place and shape, so that colours are wrong; the relation is right, and no binding.
    assert found["shape"] == found["place"] == (2, 2, 2) and found["colour"] == (0, 2, 2)
    assert found["binding"] == (0, 2, 2) and found["relation"] == (1, 1, 1) and found["count"] == (1, 1, 1)
    assert found["size"] == (0, 1, 1) and found["texture"] == (0, 0, 0) and found["background"] == (0, 1, 1)
    report = r.agreement_report([(said, true)])
    assert report["f1"] == pytest.approx(2 * 2 / (6 + 6)) and report["hallucinated"] == pytest.approx(4 / 6)
    assert report["spatial_f1"] == 1 and report["spatial_hallucinated"] == 0


def test_agreement_of_the_same_of_nothing_and_of_babble():
    for scene in scenes(20):
        found = r.agreement(scene, scene)
        assert all(a == b == c for a, b, c in found.values())
    nothing = r.agreement_report([(r.Scene(), scenes(1)[0])])
    assert nothing["f1"] == 0 == nothing["hallucinated"]
    babble = r.parse_caption(", ".join(["a red circle"] * 9))
    assert len(babble.things) == 9 and r.agreement(babble, scenes(1)[0])["colour"][1] == 9


def test_the_tokenizer_is_reversible_and_cuts_long_texts():
    texts = ["a red circle.", "Déjà vu! 日本 🙂", "two  spaces", "IMG_0007.jpg"]
    pieces = r.Pieces.learn(["a red circle."] * 2, 10)
    assert [pieces.decode(pieces.encode(text)) for text in texts] == texts
    assert len(pieces.encode("a red circle.")) == 4
    tokens = pieces.batch([*texts, "x" * 99], 12)
    assert tokens.shape == (5, 12) and (tokens[:, 0] == pieces.begin).all()
    assert all((row == pieces.end).sum() == 1 for row in tokens)


# ----- Formulas -------------------------------------------------------------------------------------------------------


def test_clip_loss_row_by_row():
    B, image, text, scale = 5, doubles(5, 3), doubles(5, 3), torch.tensor(7.0)
    truth = 0.0
    for a, b in (image, text), (text, image):
        for i in range(B):
            scores = [scale * (a[i] @ b[j]) / (a[i].norm() * b[j].norm()) for j in range(B)]
            truth -= (scores[i] - torch.logsumexp(torch.stack(scores), 0)) / (2 * B)
    close(r.clip_loss(image, text, scale), truth)


def test_caption_loss_token_by_token():
    logits, tokens = doubles(3, 6, 9), torch.randint(1, 9, (3, 6))
    tokens[0, 4:] = tokens[1, 2:] = 0
    terms = []
    for b in range(3):
        for t in range(1, 6):
            if tokens[b, t] != 0:
                terms.append(torch.logsumexp(logits[b, t - 1], 0) - logits[b, t - 1, tokens[b, t]])
    close(r.caption_loss(logits, tokens, 0), sum(terms) / len(terms))


def test_blending_draws_each_caption_apart():
    synthetic, truth = [f"s{i}" for i in range(4000)], [f"g{i}" for i in range(4000)]
    assert r.blend_captions(synthetic, truth, 0.0, seeded()) == truth
    assert r.blend_captions(synthetic, truth, 1.0, seeded()) == synthetic
    blended = r.blend_captions(synthetic, truth, 0.95, seeded())
    assert all(text[1:] == str(i) for i, text in enumerate(blended))
    assert abs(sum(text[0] == "s" for text in blended) - 3800) < 5 * math.sqrt(4000 * 0.95 * 0.05)
    generator = seeded()
    again = [r.blend_captions(synthetic, truth, 0.5, generator) for _ in range(2)]
    assert again[0] != again[1] and again[0] == r.blend_captions(synthetic, truth, 0.5, seeded())
    with pytest.raises(ValueError, match="probability 95"):
        r.blend_captions(synthetic, truth, 95, generator)


def test_clip_score_is_a_cosine_in_percent():
    image, text = doubles(4, 3), doubles(4, 3)
    truth = [100 * (a @ b) / (a.norm() * b.norm()) for a, b in zip(image, text, strict=True)]
    close(r.clip_score(image, text), torch.stack(truth))


def test_flow_loss_image_by_image():
    x, text = doubles(3, 2, 4, 4), torch.randint(3, 9, (3, 5))

    def model(x, t, text):
        return torch.sin(x) * t.view(-1, 1, 1, 1) + text.sum(1).view(-1, 1, 1, 1) / 10

    generator = seeded(3)
    t = torch.rand(3, generator=generator, dtype=torch.float64)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    truth = 0.0
    for b in range(3):
        point = t[b] * x[b] + (1 - t[b]) * noise[b]
        velocity = torch.sin(point) * t[b] + text[b].sum() / 10
        truth += ((velocity - (x[b] - noise[b])) ** 2).mean() / 3
    close(r.rectified_flow_loss(model, x, text, seeded(3)), truth)


def test_guidance_leads_away_from_the_empty_caption():
    x, t, text = doubles(2, 3), doubles(2), torch.tensor([[1, 5, 6, 2, 0], [1, 7, 2, 0, 0]])
    seen = []

    def model(x, t, text):
        seen.append(text)
        return x * t[:, None] + text.sum(1, keepdim=True)

    empty = torch.tensor([[1, 2, 0, 0, 0]] * 2)
    for guidance in 0.0, 1.0, 3.0:
        a, b = model(x, t, text), model(x, t, empty)
        close(r.guided_velocity(model, x, t, text, guidance), b + guidance * (a - b))
    assert torch.equal(seen[-1][2:], empty), "the empty caption is begin and end"


def test_euler_follows_a_straight_path_exactly():
    """Where the velocity is the one from the noise to a target, any number of steps ends at the target."""
    target, text = torch.randn(2, 3, 4, 4), torch.ones(2, 3, dtype=torch.long)

    def model(x, t, text):
        return (target - x) / (1 - t.view(-1, 1, 1, 1))

    for steps in 1, 7:  # from other noise than the target, which is drawn with seed 0
        close(r.sample_latents(model, text, (3, 4, 4), steps, 1.0, seeded(1)), target, 1e-4)


def test_euler_step_by_step():
    text, x = torch.tensor([[1, 5, 2], [1, 2, 0]]), torch.randn(2, 3, generator=seeded(4))

    def model(x, t, text):
        return x * t[:, None] + text.sum(1, keepdim=True)

    found = r.sample_latents(model, text, (3,), 4, 3.0, seeded(4))
    for t in 0.0, 0.25, 0.5, 0.75:
        empty = x * t + 3  # begin and end
        x = x + (empty + 3 * (x * t + torch.tensor([[8.0], [3.0]]) - empty)) / 4
    close(found, x, 1e-5)


# ----- Models ---------------------------------------------------------------------------------------------------------


def small_coca(vocab=20, length=9):
    return far_from_zero(r.CoCa(16, vocab, length, 16, 2, 2, 3))


def test_the_attention_pool_query_by_query():
    pool, memory = far_from_zero(r.AttentionPool(8, 2, 3)), doubles(2, 5, 8)
    at = pool.attend
    for b, i in itertools.product(range(2), range(3)):
        q, parts = at.q(pool.queries[i]), []
        for head in range(2):
            piece = slice(4 * head, 4 * head + 4)
            keys = [at.kv(pool.before(memory[b, n]))[:8][piece] for n in range(5)]
            values = [at.kv(pool.before(memory[b, n]))[8:][piece] for n in range(5)]
            weights = torch.stack([q[piece] @ key / 2 for key in keys]).softmax(0)
            parts.append(sum(w * v for w, v in zip(weights, values, strict=True)))
        close(pool(memory)[b, i], pool.norm(at.out(torch.cat(parts))))


def test_a_new_captioners_queries_see_different_things():
    """Their answers differ: with a small stream in front of them, not normed, each would be the mean over places."""
    model = r.CoCa(32, 50, 9, 64, 2, 4, 8)
    drawn = r.draw_pictures(32, 1, 32, seeded())
    memory, _ = model.look(drawn.images)
    assert memory.std(1).mean() > 0.03 * memory.std(0).mean()


def test_a_later_token_changes_no_earlier_logit_and_the_lower_half_sees_no_image():
    model, tokens, memory = small_coca().decoder, torch.randint(3, 20, (2, 7)), doubles(2, 3, 16)
    other = tokens.clone()
    other[:, 4] = (tokens[:, 4] - 2) % 17 + 3
    a, b = (model.write(model.read(x), memory) for x in (tokens, other))
    close(a[:, :4], b[:, :4])
    assert (a[:, 4:] != b[:, 4:]).any(-1).all()
    assert (model.write(model.read(tokens), memory + 1) != a).any(-1).all()


@pytest.mark.parametrize("temperature,top_p", [(0.0, None), (1.0, None), (1.3, 0.8)])
def test_decoding_with_a_cache_equals_decoding_without(temperature, top_p):
    model, memory = small_coca().decoder, doubles(6, 3, 16)
    with torch.no_grad():
        model.embed.weight[r.Pieces.end] *= 1.5  # so that some end before others
    found = [model.generate(memory, seeded(), temperature, top_p, cached) for cached in (True, False)]
    assert torch.equal(*found)
    for row in found[0].tolist():
        if r.Pieces.end in row:
            assert set(row[row.index(r.Pieces.end) + 1 :]) <= {r.Pieces.pad}


def test_padding_changes_no_embedding_no_loss_and_no_velocity():
    model, tokens = small_coca(), torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]])
    wide = torch.nn.functional.pad(tokens, (0, 3))
    close(model.embed_text(tokens), model.embed_text(wide))
    images = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8)
    for a, b in zip(model.losses(images, tokens), model.losses(images, wide), strict=True):
        close(a, b)
    painter = far_from_zero(r.Painter(20, 9, 4, 4, 16, 2, 2, 1))
    x, t = doubles(2, 4, 4, 4), torch.rand(2, dtype=torch.float64)
    close(painter(x, t, tokens), painter(x, t, wide))
    upsampler = far_from_zero(r.Upsampler(20, 9, 16, 2, 1))
    close(upsampler.look(tokens), upsampler.look(wide))


def test_a_new_painter_says_0_and_its_patches_stand_where_they_were():
    painter = r.Painter(20, 9, 3, 4, 16, 2, 1, 1)
    x, text = torch.randn(2, 3, 4, 4), torch.tensor([[1, 5, 2]] * 2)
    assert not painter(x, torch.rand(2), text).any()
    # Weights that hand each patch through: the output is the input.
    painter = r.Painter(20, 9, 3, 4, 16, 2, 0, 1)
    painter.norm = torch.nn.Identity()
    painter.place.data.zero_()
    painter.patch.bias.data.zero_()
    painter.patch.weight.data = torch.eye(12, 12).view(12, 3, 2, 2).repeat(2, 1, 1, 1)[:16]
    painter.last.weight.data = torch.eye(12, 16)
    close(painter(x, torch.rand(2), text), x)


def test_the_captioner_learns_a_few_pictures_by_heart():
    torch.manual_seed(0)
    held = r.draw_pictures(4, 4, 32, seeded(5))
    texts = [held.descriptive[i] for i in range(4)]
    pieces = r.Pieces.learn(texts * 2, 100)
    model, tokens = r.CoCa(32, pieces.size, 56, 32, 1, 2, 4), pieces.batch(texts, 56)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(220):
        clip, write = model.losses(held.images, tokens)
        optimizer.zero_grad()
        (clip + 2 * write).backward()
        optimizer.step()
    assert clip < 0.2 and write < 0.2
    assert r.caption_images(model, pieces, held.images, r.Config(), seeded()) == texts


def test_the_reader_reads_what_it_has_learnt():
    torch.manual_seed(0)
    held = r.draw_pictures(8, 0, 32, seeded(6))
    model = r.Reader(32)
    optimizer, generator = torch.optim.AdamW(model.parameters(), 5e-3), seeded()
    for _ in range(80):
        loss = model.loss(held.images, held.scenes, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert r.agreement_report(zip(model.read(held.images), held.scenes, strict=True))["f1"] > 0.95


# ----- Stages ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with all stages of a smoke run."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("recaption") / "run"
    assert r.main(["--smoke", "--out", str(out)]) == 0
    return out


def test_a_run_writes_what_it_says(finished):
    result = json.loads((finished / "result.json").read_text())
    assert set(result["arms"]) == {"ground_truth", "descriptive:95"}
    for styles in result["arms"].values():
        assert set(styles) == {"ground_truth", "descriptive", "brief", "upsampled"}
    assert set(result["captioners"]) == {"base", "short", "descriptive"}
    stages = {json.loads(line)["stage"] for line in (finished / "metrics.jsonl").read_text().splitlines()}
    assert {"base", "short", "descriptive", "autoencoder", "judge", "reader", "upsampler"} < stages


def test_each_stage_is_a_command_that_keeps_what_is_there(finished, capsys):
    before = {path: path.read_bytes() for path in finished.glob("*.pt")}
    for job in "data", "captioner", "caption", "generate":
        assert r.main([job, "--smoke", "--out", str(finished)]) == 0
        assert "step" not in capsys.readouterr().out
    rows = [json.loads(line) for line in (finished / "captions.jsonl").read_text().splitlines()]
    assert len(rows) == r.SMOKE["scenes"] and set(rows[0]) == {"alt", "short", "descriptive"}
    assert r.main(["upsample", "a red circle", "--smoke", "--out", str(finished)]) == 0
    assert {path: path.read_bytes() for path in finished.glob("*.pt")} == before


def test_another_config_is_refused_by_name(finished, capsys):
    assert r.main(["generate", "--smoke", "--out", str(finished), "--seed", "7"]) == 2
    assert "seed was 0, is 7" in capsys.readouterr().err


def test_the_fine_tunes_start_from_the_base_each(tmp_path):
    """With no steps of their own they are the base."""
    work = r.Pipeline(r.Config(**r.SMOKE, tune_lr=0.0, out=str(tmp_path)), quiet)
    for model in work.captioners.values():
        for a, b in zip(model.parameters(), work.captioners["base"].parameters(), strict=True):
            assert torch.equal(a, b)


def test_arms_differ_in_captions_alone(tmp_path, monkeypatch):
    """The same images, times and noise, step by step; what is read differs."""
    seen = {}

    def spy(model, x, text, generator):
        rows = seen.setdefault(arm, [])
        rows.append((x, text, generator.get_state()))
        return model(x, torch.rand(len(x)), text).mean()

    monkeypatch.setattr(r, "rectified_flow_loss", spy)
    work = r.Pipeline(r.Config(**r.SMOKE, out=str(tmp_path)), quiet)
    starts = []
    for arm in "ground_truth", "descriptive:95":
        monkeypatch.setattr(work, "new", lambda *a, new=work.new: starts.append(new(*a)) or starts[-1])
        work.painter(arm)
    for (x, _, before), (y, _, after) in zip(*seen.values(), strict=True):
        assert torch.equal(x, y) and torch.equal(before, after)
    assert any(a.shape != b.shape or (a != b).any() for (_, a, _), (_, b, _) in zip(*seen.values(), strict=True))


def test_resuming_goes_on_bit_for_bit(tmp_path):
    """Stopped after half of the steps of a stage and resumed, against run through."""

    def run(out, stop, resume=False):
        work = r.Pipeline(r.Config(**r.SMOKE | {"paint_steps": 16}, out=str(out), resume=resume), quiet)
        losses, module = [], work.new("painter", lambda: torch.nn.Linear(3, 3))

        def loss_of(model, generator):
            if len(losses) == stop:
                raise KeyboardInterrupt
            losses.append(model(torch.randn(5, 3, generator=generator)).square().mean())
            return losses[-1]

        try:
            return work.train("line", "painter", module, 16, loss_of, ema=0.9), losses
        except KeyboardInterrupt:
            return None, losses

    whole, _ = run(tmp_path / "a", None)
    assert run(tmp_path / "b", 9)[0] is None
    rest, losses = run(tmp_path / "b", None, resume=True)
    assert len(losses) == 8, "it goes on from the last of eight checkpoints"
    for a, b in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(run(tmp_path / "c", 9)[1]) == 9 and len(run(tmp_path / "c", None)[1]) == 16, "without --resume: anew"


def test_the_average_of_the_weights(tmp_path):
    work, seen = r.Pipeline(r.Config(**r.SMOKE, out=str(tmp_path)), quiet), []
    module = work.new("line", lambda: torch.nn.Linear(1, 1, bias=False))
    truth = module.weight.detach().clone()

    def loss_of(model, generator):
        seen.append(model.weight.detach().clone())
        return (model.weight - 5).square().sum()

    average = work.train("line", "painter", module, 30, loss_of, ema=0.7)
    for step, weight in enumerate([*seen[1:], module.weight.detach()], 1):
        decay = min(0.7, step / (10 + step))
        truth = decay * truth + (1 - decay) * weight
    close(average.weight, truth, 1e-5)


def test_divergence_stops_the_stage(tmp_path):
    work = r.Pipeline(r.Config(**r.SMOKE, out=str(tmp_path)), quiet)
    module = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="line diverged at step 1"):
        work.train("line", "painter", module, 4, lambda model, _: model.weight.sum() * math.nan)


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--arms", "long:95"], "--arms 'long:95'"),
        (["--arms", "short:950"], "--arms 'short:950'"),
        (["--size", "30"], "--size 30: must be a multiple of 8"),
        (["--width", "100"], "--width 100"),
        (["--clean", "9000"], "--clean 9000: must be at most --scenes 6000"),
        (["--lr", "nan"], "--lr nan"),
        (["--top-p", "1.5"], "--top-p 1.5"),
        (["--batch", "0"], "--batch 0: must be above 0"),
        (["upsample"], "must have a prompt"),
        (["score", "--data", "x"], "must go with the job captioner"),
        (["captioner", "--data", "nowhere"], "--data nowhere"),
        (["caption", "--images", "nowhere"], "--images nowhere"),
        (["upsample", "x", "--chat-url", "ftp://x", "--chat-model", "m"], "must begin http:// or https://"),
        (["upsample", "x", "--chat-url", "http://x"], "--chat-model: must name"),
    ],
)
def test_bad_flags_exit_2_with_one_line(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert r.main([*flags, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


# ----- The user's own images ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Seven images, one of them within a folder, with captions, and a file that is no image."""
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    (images := tmp_path / "images").mkdir()
    (images / "deep").mkdir()
    lines = []
    for i, scene in enumerate(scenes(7)):
        name = f"{i}.png" if i else "deep/0.png"
        Image.fromarray(r.render(scene, 48)).save(images / name)
        row = {"file": name, "caption": r.describe(scene, "alt", seeded(i))}
        lines.append(row | ({"descriptive": r.describe(scene)} if i < 4 else {}))
    (images / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return images


def test_a_captioner_of_ones_own_images(folder, tmp_path, capsys):
    out = tmp_path / "own"
    assert r.main(["captioner", "--data", str(folder), "--smoke", "--out", str(out)]) == 0
    assert "base, descriptive" in capsys.readouterr().out
    other = (folder / "captions.jsonl").read_text()
    (folder / "captions.jsonl").write_text(other + other.splitlines()[0] + "\n")
    assert r.main(["captioner", "--data", str(folder), "--smoke", "--out", str(out)]) == 2
    assert "another captions.jsonl" in capsys.readouterr().err
    (folder / "4b.png").write_bytes(b"no image")
    command = ["caption", "--images", str(folder), "--checkpoint", str(out / "captioner.pt"), "--batch", "2"]
    file = tmp_path / "found.jsonl"
    assert r.main([*command, "--out", str(file)]) == 2
    assert "4b.png: is no image" in capsys.readouterr().err
    kept = file.read_text()
    assert 0 < kept.count("\n") < 7
    assert r.main([*command, "--out", str(file)]) == 2
    assert "--resume" in capsys.readouterr().err and file.read_text() == kept
    file.write_text(kept + '{"file": "5.p')  # as a run leaves it that is killed in the middle of a row
    assert r.main([*command, "--out", str(file), "--resume", "--skip-bad"]) == 0
    assert "1 files skipped" in capsys.readouterr().out
    text = file.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert text.startswith(kept) and sorted(row["file"] for row in rows) == [
        "1.png",
        *(f"{i}.png" for i in range(2, 7)),
        "deep/0.png",
    ]
    assert all(set(row) == {"file", "descriptive"} for row in rows)
    assert r.main([*command, "--out", str(file), "--resume", "--skip-bad"]) == 0
    assert file.read_text() == text, "nothing is repeated"
    file.write_text("other\n")
    assert r.main([*command, "--out", str(file), "--resume"]) == 2
    assert "did not write" in capsys.readouterr().err and file.read_text() == "other\n"


@pytest.mark.parametrize(
    "line,words",
    [
        ("{", "captions.jsonl:2: must be JSON"),
        ('{"file": "1.png"}', "captions.jsonl:2: must be JSON"),
        ('{"file": "1.png", "caption": 3}', "captions.jsonl:2: must be JSON"),
        ('{"file": "9.png", "caption": "x"}', "captions.jsonl:2: there is no"),
        ('{"file": "bad.png", "caption": "x"}', "bad.png: is no image"),
    ],
)
def test_a_bad_row_is_named(folder, tmp_path, capsys, line, words):
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "captions.jsonl").write_text('{"file": "1.png", "caption": "x"}\n' + line + "\n")
    assert r.main(["captioner", "--data", str(folder), "--smoke", "--out", str(tmp_path / "own")]) == 2
    assert words in capsys.readouterr().err


def test_images_are_turned_made_opaque_and_cut_to_a_square(tmp_path):
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    image = Image.new("RGBA", (60, 20), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (8, 0, 52, 20))  # the middle is transparent: white when it is shown
    image.save(tmp_path / "wide.png")
    assert (r.read_image(tmp_path / "wide.png", 8) == 255).all()
    image = Image.new("RGB", (20, 20), "red")
    image.paste("blue", (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 3  # to be turned by 180 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    top, bottom = r.read_image(tmp_path / "turned.png", 8)[[0, -1], 0].tolist()
    assert (top, bottom) == ([255, 0, 0], [0, 0, 255])


def test_without_pillow_one_line_says_what_to_install(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert r.main(["captioner", "--data", str(folder), "--smoke", "--out", str(tmp_path / "own")]) == 2
    assert "pip install pillow" in capsys.readouterr().err
    torch.save(
        {"sizes": (m := small_coca()).sizes, "pieces": [], "states": {"base": m.state_dict()}}, tmp_path / "c.pt"
    )
    command = ["caption", "--images", str(folder), "--checkpoint", str(tmp_path / "c.pt"), "--skip-bad"]
    assert r.main([*command, "--out", str(tmp_path / "o.jsonl")]) == 2, "no file is skipped for it"
    assert "pip install pillow" in capsys.readouterr().err and not (tmp_path / "o.jsonl").exists()


def test_a_checkpoint_of_something_else_is_refused(folder, tmp_path, capsys):
    torch.save({"x": 1}, tmp_path / "x.pt")
    command = ["caption", "--images", str(folder), "--out", str(tmp_path / "o.jsonl"), "--checkpoint"]
    for path, words in ("x.pt", "no captioner.pt"), ("y.pt", "there is none"):
        assert r.main([*command, str(tmp_path / path)]) == 2
        assert words in capsys.readouterr().err


# ----- Upsampling by a chat endpoint ----------------------------------------------------------------------------------

KEY = "sk-not-to-be-seen"
GOOD = " ".join(["word"] * 20)


@pytest.fixture
def endpoint(monkeypatch):
    """A server on this machine that answers what `answers` says, one after the other, and keeps the requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("Authorization"), body))
            status, answer, headers = answers.pop(0)
            if status is None:  # no answer at all
                release.wait(5)
                return
            text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(text))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    seen, answers, release = [], [], threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name in "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    config = r.Config(chat_url=f"http://127.0.0.1:{server.server_port}/v1", chat_model="m")
    yield config, seen, answers
    release.set()
    server.shutdown()
    thread.join()
    server.server_close()


def says(text, status=200, **headers):
    return status, {"choices": [{"message": {"role": "assistant", "content": text}}]}, headers


def test_the_conversation_has_rules_three_examples_and_the_prompt(endpoint, capsys):
    config, seen, answers = endpoint
    answers.append(says(f" {GOOD}\n"))
    assert r.main(["upsample", "a red fox", "--chat-url", config.chat_url, "--chat-model", "m"]) == 0
    output = "".join(capsys.readouterr())
    assert output.strip() == GOOD and KEY not in output
    ((path, authorization, body),) = seen
    assert path == "/v1/chat/completions" and authorization == f"Bearer {KEY}" and body["model"] == "m"
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["system", *["user", "assistant"] * 3, "user"] and "a red fox" in body["messages"][-1]["content"]
    assert not any(map(r.check_upsampled, [m["content"] for m in body["messages"] if m["role"] == "assistant"]))


def test_busy_servers_are_asked_again_ever_later(endpoint):
    config, seen, answers = endpoint
    answers += [says("", 429, **{"Retry-After": "7"}), says("", 503), says("", 500), says(GOOD)]
    waits = []
    assert r.upsample_by_chat(config, "x", waits.append) == GOOD
    assert waits == [7.0, 2.0, 4.0] and len(seen) == 4
    answers += [says(KEY, 502)] * 5
    with pytest.raises(ValueError, match="five attempts failed, the last with 502") as error:
        r.upsample_by_chat(config, "x", waits.append)
    assert KEY not in str(error.value)


def test_no_answer_in_time_and_no_server(endpoint):
    config, seen, answers = endpoint
    answers += [(None, None, {}), says(GOOD)]
    waits = []
    config = dataclasses.replace(config, chat_timeout=0.2)
    assert r.upsample_by_chat(config, "x", waits.append) == GOOD and waits == [1.0]
    nobody = dataclasses.replace(config, chat_url="http://127.0.0.1:9")
    with pytest.raises(ValueError, match="five attempts failed"):
        r.upsample_by_chat(nobody, "x", waits.append)


def test_refusals_redirects_and_other_answers_are_reported_at_once(endpoint):
    config, seen, answers = endpoint
    cases = [
        ((401, f"bad key {KEY}".encode(), {}), r"answers 401 .*bad key \*\*\*"),
        ((302, b"", {"Location": "http://127.0.0.1:9/"}), "answers 302"),
        ((200, b"<html>", {}), "no chat completion"),
        ((200, {"choices": []}, {}), "no chat completion"),
        ((200, {"choices": [{"message": {"content": None}}]}, {}), "no chat completion"),
    ]
    for i, (answer, words) in enumerate(cases, 1):
        answers.append(answer)
        with pytest.raises(ValueError, match=words) as error:
            r.upsample_by_chat(config, "x", lambda _: pytest.fail("it waits"))
        assert KEY not in str(error.value) and len(seen) == i


def test_answers_that_break_the_rules_are_asked_for_again_then_reported(endpoint):
    config, seen, answers = endpoint
    answers += [says("too short"), says(f"{GOOD}\n\n{GOOD}"), says(GOOD)]
    assert r.upsample_by_chat(config, "x") == GOOD
    assert "2 words" in seen[1][2]["messages"][-1]["content"]
    assert "one paragraph" in seen[2][2]["messages"][-1]["content"]
    answers += [says("word " * 81)] * 3
    with pytest.raises(ValueError, match="three answers broke the rules, the last as it has 81 words"):
        r.upsample_by_chat(config, "x")
