"""recaption.py: formulas against slow loops, captions against their parser, stages, user's jobs."""

import dataclasses
import functools
import http.server
import itertools
import json
import math
import random
import re
import shutil
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import recaption as r
from tests._helpers import close, far_from_zero

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = r.Config(**r.SMOKE, device="cpu")
SMOKE = ["--smoke", "--device", "cpu", "--out"]


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def scenes(count):
    rng = random.Random(0)
    return [r.draw_scene(rng) for _ in range(count)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# ----- Scenes and captions ------------------------------------------------------------------------


def test_captions_say_what_their_style_says():
    wordings, drawn, noisy = set(), scenes(600), []
    for i, scene in enumerate(drawn):
        styles = ("ground_truth", "short", "brief", "descriptive")
        texts = {style: r.describe(scene, style, random.Random(i)) for style in styles}
        said = {style: r.parse_caption(text) for style, text in texts.items()}
        assert said["descriptive"] == scene == r.parse_caption(texts["descriptive"].upper())
        wordings.add(" ".join(texts["descriptive"].split()[:2]))
        pairs = tuple(r.Thing(thing.shape, thing.colour) for thing in scene.things)
        large = [p for p, t in zip(pairs, scene.things, strict=True) if t.size == "large"]
        assert said["short"].things == ((large or pairs)[0],) and said["brief"].things == pairs
        noisy.append(texts["ground_truth"])
    assert {"on a", "the background", "a picture"} <= wordings
    report = r.agreement(noisy, drawn)  # alt-text omits, swaps and misses
    assert 0.6 < report["binding"] < 0.95 and report["count"] < 0.8
    assert 0.05 < sum(not r.parse_caption(text).things for text in noisy) / 600 < 0.35


def test_draws_are_reproducible_and_held_out_scenes_are_new():
    a, b = (r.draw_pictures(TINY, "data", 600, 9) for _ in range(2))
    assert torch.equal(a.images, b.images) and a.captions == b.captions
    assert [len(texts) for texts in a.captions.values()] == [600, 9, 9]
    other = dataclasses.replace(TINY, seed=1)
    assert a.scenes != r.draw_pictures(other, "data", 600, 9).scenes
    assert len({r.generator(c, p).initial_seed() for c in (TINY, other) for p in "ab"}) == 4
    assert set(r.draw_pictures(TINY, "held out", 200, 0).scenes) & set(a.scenes)
    assert not set(r.draw_pictures(TINY, "held out", 200, 0, a.scenes).scenes) & set(a.scenes)


def test_a_picture_shows_its_scene():
    """Colours are in the middle of their quarter, the background in empty quarters."""
    for scene in scenes(60):
        image, used = r.render(scene).astype(int), {t.place: t for t in scene.things}
        for i, place in enumerate(r.VALUES["place"]):
            row, column = divmod(i, 2)
            cell = image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            if place not in used:
                assert (cell == r.BACKGROUNDS[scene.background]).all()
                continue
            colour = np.array(r.COLOURS[used[place].colour])
            assert abs(cell[6:11, 8] - colour).max(-1).min() <= 1
            dark = (abs(cell - 0.35 * colour).max(-1) <= 1).any()
            assert dark == (used[place].texture == "striped")


def test_agreement_by_hand():
    said = "a red circle in the top left and a small blue square in the top right, on white"
    true = "a red square in the top right and a large blue circle in the top left, on black"
    found = r.agreement([said], [r.parse_caption(true)])
    # Objects are matched by place and shape, so that colours are wrong.
    assert found["shape"] == found["place"] == found["count"] == 1 and found["texture"] is None
    assert found["colour"] == found["binding"] == found["size"] == found["background"] == 0
    both = r.parse_caption("a blue cross and a red circle")
    assert r.agreement(["a red circle and a blue cross"], [both])["binding"] == 1
    fewer, more = r.agreement(["a red circle"], [both]), r.agreement(["a red circle, " * 9], [both])
    assert fewer["count"] == more["count"] == 0 and fewer["shape"] == 1 and more["shape"] == 0.25
    red = r.parse_caption("a red square")
    assert r.agreement(["a red circle"], [red])["binding"] == 0
    assert set(r.agreement(["nothing"], [both]).values()) == {None, 0.0}


def test_the_classifier_reads_renderings_noisy_ones_and_what_latents_keep():
    drawn, rng = scenes(100), np.random.default_rng(0)
    images = torch.from_numpy(np.stack([r.render(scene) for scene in drawn]))
    assert r.classify(images) == drawn
    noisy = (images + torch.from_numpy(rng.normal(0, 50, images.shape))).clamp(0, 255)
    assert r.classify(noisy.to(torch.uint8)) == drawn
    latents = r.Latents(images)
    found = r.classify(latents.decode(latents.encode(images)))
    assert sum(a == b for a, b in zip(found, drawn, strict=True)) >= 98


def test_the_tokenizer_is_reversible_and_cuts_long_texts():
    texts = ["a red circle.", "Déjà vu! 日本 🙂", "two  spaces", "IMG_0007.jpg"]
    tokenizer = r.Tokenizer(texts)
    tokens = tokenizer.batch([*texts, "a " * 99])
    assert tokenizer.decode(tokens)[:4] == texts and tokens.shape == (5, r.LENGTH)
    assert (tokens[:, 0] == r.Tokenizer.begin).all()
    assert ((tokens == r.Tokenizer.end).sum(1) == 1).all()
    assert tokenizer.decode(tokenizer.batch(["a blue circle."])) == ["a circle."], "blue is unknown"
    assert r.Tokenizer(tokenizer.words).words == tokenizer.words, "as a checkpoint is loaded"


# ----- Formulas -----------------------------------------------------------------------------------


def test_clip_loss_clip_score_and_caption_loss_term_by_term():
    B, image, text, scale = 5, doubles(5, 3), doubles(5, 3), torch.tensor(7.0)
    truth = 0.0
    for a, b in (image, text), (text, image):
        for i in range(B):
            scores = [scale * (a[i] @ b[j]) / (a[i].norm() * b[j].norm()) for j in range(B)]
            truth -= (scores[i] - torch.logsumexp(torch.stack(scores), 0)) / (2 * B)
    close(r.clip_loss(image, text, scale), truth)
    cosines = [100 * (a @ b) / (a.norm() * b.norm()) for a, b in zip(image, text, strict=True)]
    close(r.clip_score(image, text), torch.stack(cosines))
    logits, tokens, terms = doubles(3, 6, 9), torch.randint(1, 9, (3, 6)), []
    tokens[0, 4:] = tokens[1, 2:] = 0
    for b, t in itertools.product(range(3), range(1, 6)):
        if tokens[b, t] != 0:
            terms.append(torch.logsumexp(logits[b, t - 1], 0) - logits[b, t - 1, tokens[b, t]])
    close(r.caption_loss(logits, tokens, 0), sum(terms) / len(terms))


def test_blending_draws_each_caption_apart():
    synthetic, truth = [f"s{i}" for i in range(4000)], [f"g{i}" for i in range(4000)]
    assert r.blend_captions(synthetic, truth, 0.0, seeded()) == truth
    assert r.blend_captions(synthetic, truth, 1.0, seeded()) == synthetic
    blended = r.blend_captions(synthetic, truth, 0.95, seeded())
    assert all(text[1:] == str(i) for i, text in enumerate(blended))
    share = sum(text[0] == "s" for text in blended)
    assert abs(share - 3800) < 5 * math.sqrt(4000 * 0.95 * 0.05)
    with pytest.raises(ValueError, match="probability 95"):
        r.blend_captions(synthetic, truth, 95, seeded())


def velocity(x, t, text):
    """Stands for a painter."""
    return torch.sin(x) * t.view(-1, 1, 1) + text.sum(1).view(-1, 1, 1) / 10


def test_flow_loss_image_by_image():
    x, text, generator, truth = doubles(3, 2, 4), doubles(3, 5), seeded(3), 0.0
    found = r.rectified_flow_loss(velocity, x, text, seeded(3))
    t = 1 / (1 + torch.exp(1.5 - 1.5 * torch.randn(3, generator=generator).double()))
    noise = torch.randn(x.shape, generator=generator).double()
    for b in range(3):
        point = t[b] * x[b] + (1 - t[b]) * noise[b]
        difference = torch.sin(point) * t[b] + text[b].sum() / 10 - (x[b] - noise[b])
        truth += (difference**2).mean() / 3
    close(found, truth, 1e-6)
    times = []
    r.rectified_flow_loss(lambda x, t, _: times.extend(t) or x, doubles(4000, 1), None, seeded())
    assert max(times) <= 0.95 and abs(np.median(times) - 1 / (1 + math.exp(1.5))) < 0.01


def test_guidance_and_euler_step_by_step():
    text, x = torch.randn(2, 5), torch.randn(2, 3, 4, generator=seeded(4))
    found = r.sample_latents(velocity, text, (3, 4), 4, 3.0, seeded(4))
    for t, after in itertools.pairwise([0, 1 / 16, 4 / 16, 9 / 16, 1]):
        with_text, without = (velocity(x, torch.tensor(t), said) for said in (text, 0 * text))
        x = x + (after - t) * (without + 3 * (with_text - without))
    close(found, x, 1e-5)


# ----- Models -------------------------------------------------------------------------------------


@pytest.fixture
def coca():
    return far_from_zero(r.CoCa(TINY, r.Tokenizer(f" w{i}" for i in range(16))))


def test_decoding_with_a_cache_takes_the_likeliest_tokens_of_a_full_pass(coca):
    model, memory = coca.decoder, 3 * doubles(20, 3, 16)
    model.embed.weight[r.Tokenizer.end] *= 2  # so that some end before others
    found = model.generate(memory)
    logits, lengths = model.write(model.read(found), memory), set()
    for row, scores in zip(found.tolist(), logits, strict=True):
        length = row.index(r.Tokenizer.end) + 1 if r.Tokenizer.end in row else len(row)
        assert row[1:length] == scores[: length - 1].argmax(-1).tolist()
        assert set(row[length:]) <= {r.Tokenizer.pad}
        lengths.add(length)
    assert len(lengths) > 1 and found.shape[1] <= r.LENGTH


def test_padding_changes_nothing_and_images_are_means_over_patches(coca):
    images = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    memory, image = coca.look(images)
    assert memory.shape == (2, 16, 16)
    close(image, coca.of_image(memory.mean(1)))
    tokens = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]])
    wide = torch.nn.functional.pad(tokens, (0, 3))
    states = coca.decoder.read(tokens)
    text = coca.of_text(torch.stack([states[0, 3], states[1, 2]]))  # of the end tokens
    close(coca.embed_text(states, tokens), text)
    close(coca.embed_text(coca.decoder.read(wide), wide), text)
    text_model = far_from_zero(r.TextModel(TINY, coca))
    both = text_model([" w1 w2", " w1 w2 w3 w4 w5"])
    close(both[:1], text_model([" w1 w2"]))
    assert both.shape == (2, r.STATES, 16) and (both[0] != both[1]).all(-1).all()


def test_the_painters_velocity_leads_to_the_image_that_it_predicts():
    painter, seen = far_from_zero(r.Painter(TINY, 5, 3)), []
    x, t, text = doubles(2, 5, 3), torch.tensor([0.0, 0.7]).double(), doubles(2, r.STATES, 16)
    painter.last.register_forward_hook(lambda _, inputs, output: seen.append(output))
    found = painter(x, t, text)
    close(x + (1 - t)[:, None, None] * found, seen[0])
    assert (painter(x, t, text.flip(1)) != found).all(), "a text's states have an order"
    assert (painter(x, t + 0.1, text) != found).all()


def test_latents_are_principal_components_with_mean_square_1():
    images = r.draw_pictures(TINY, "data", 300, 0).images
    x = r.Latents(images).encode(images)
    close(x.square().mean(), torch.tensor(1.0), 1e-3)
    close(x.mean((0, 1)), torch.zeros(48), 1e-3)
    patches = np.lib.stride_tricks.sliding_window_view(images.numpy(), (8, 8), (1, 2))[:, ::8, ::8]
    scatter = np.cov(patches.reshape(-1, 192).T / 127.5, bias=True)  # by their own eigenvalues
    truth = np.sort(np.linalg.eigvalsh(scatter))[::-1][:48] ** 0.4
    variance = x.var((0, 1)).double()
    close(variance / variance[0], torch.from_numpy(truth / truth[0]), 0.02)


def test_a_learned_captioner_sees_the_shapes(tmp_path):
    """Reduced: one object a picture. One that guesses shapes has a quarter of them right."""
    sizes = {"width": 64, "batch": 16, "base_steps": 30, "tune_steps": 250}
    config = dataclasses.replace(TINY, out=str(tmp_path), **sizes)
    drawn = r.draw_pictures(config, "data", 1500, 1500)
    one = [i for i, scene in enumerate(drawn.scenes) if len(scene.things) == 1]
    train, held_out = one[:380], one[380:]
    texts = {i: drawn.captions["descriptive"][i] for i in train}
    data = r.Pictures(drawn.images, {"ground_truth": texts, "short": {}, "descriptive": texts}, [])
    captioner = r.train_captioners(config, data)["descriptive"]
    said = captioner.caption(drawn.images[held_out])
    report = r.agreement(said, [drawn.scenes[i] for i in held_out])
    assert report["shape"] > 0.55 and report["place"] > 0.9


# ----- Stages -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with all stages of a smoke run."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("recaption")
    assert r.main([*SMOKE, str(out)]) == 0
    return out / "smoke"


def test_a_run_writes_what_it_says(finished):
    result = json.loads((finished / "result.json").read_text())
    assert set(result["captioners"]) == {"base", "short", "descriptive"}
    assert set(result["models"]) == {"real images", "ground_truth", "descriptive:95"}
    for styles in result["models"].values():
        assert set(styles) == {"ground_truth", "descriptive"}
        assert {"clip_score", *r.VALUES, "binding", "count"} == set(styles["descriptive"])
    real = result["models"]["real images"]["descriptive"]
    assert set(real.values()) - {real["clip_score"]} <= {1, None}
    assert result["wall_seconds"] > 0 and result["seed"] == 0 and len(result["script_sha256"]) == 64


def test_finished_stages_are_kept_and_others_made_bit_for_bit(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "smoke")
    command, gone = [*SMOKE, str(tmp_path)], folder / "painter_descriptive_95.pt"
    before = {path: path.read_bytes() for path in folder.glob("*.pt")}
    state = torch.load(gone, weights_only=True)["made"]["state"]
    gone.unlink()
    assert r.main([*command, "--arms", "descriptive:95,short:50"]) == 0
    progress = re.findall(r"(?m)^(\w+) \d+/\d+ · .* minutes left$", capsys.readouterr().out)
    assert set(progress) == {"painter_descriptive_95", "painter_short_50"}
    again = torch.load(gone, weights_only=True)["made"]["state"]
    assert all(torch.equal(again[key], value) for key, value in state.items())
    assert all(path == gone or path.read_bytes() == data for path, data in before.items())
    assert r.main([*command, "--seed", "7"]) == 2
    assert "seed was 0" in capsys.readouterr().err
    assert r.main(["upsample", "--prompt", "a red circle", *command]) == 0
    assert "step" not in capsys.readouterr().out


@pytest.fixture
def traced(tmp_path, monkeypatch):
    """Config, pictures, and what each stage asked training for, which adds 1 to every weight."""
    config, asked = dataclasses.replace(TINY, out=str(tmp_path), batch=40), {}

    def train(config, name, make_model, loss_of, *others, **named):
        model = make_model()
        asked[name] = make_model(), loss_of
        for parameter in model.parameters():
            parameter.data += 1
        return model

    monkeypatch.setattr(r, "train", train)
    return config, r.draw_pictures(config, "data", 24, 12), asked


def test_each_captioner_starts_where_it_should_and_learns_its_own_pairs(traced):
    """The losses too: CoCa's weights for the base, captions for fine-tunes, CLIP for the judge."""
    config, data, asked = traced
    base = r.train_captioners(config, data)["base"]
    new = functools.partial(r.CoCa, config, base.tokenizer)
    assert not same(r.train_coca(config, "judge", new, data, "descriptive", 1), base)
    styles = {"base": "ground_truth", "judge": "descriptive"}
    for name, (model, loss_of) in asked.items():
        assert same(model, base) == (name in ("short", "descriptive"))
        far_from_zero(model).log_scale.fill_(9.0 if name == "judge" else 1.0)  # at most log(100)
        model.look, model.decoder.read = Mock(wraps=model.look), Mock(wraps=model.decoder.read)
        loss, found = loss_of(model, seeded()), set()
        (images,), (tokens,) = model.look.call_args.args, model.decoder.read.call_args.args
        texts = data.captions[styles.get(name, name)]
        for image, text in zip(images, model.tokenizer.decode(tokens), strict=True):
            found |= {i for i in texts if torch.equal(data.images[i], image) and texts[i] == text}
        assert len(found) > 5
        (memory, image), states = model.look(images), model.decoder.read(tokens)
        text, scale = model.embed_text(states, tokens), min(model.log_scale.exp(), 100)
        clip = r.clip_loss(image, text, scale)
        caption = r.caption_loss(model.decoder.write(states, memory), tokens, 0)
        close(loss, {"base": clip + 2 * caption, "judge": clip}.get(name, caption))


def test_the_text_model_retells_captions_of_every_style(traced):
    config, data, asked = traced
    captioner = r.train_captioners(config, data)["descriptive"]
    r.train_text_model(config, captioner)
    (start, loss_of), given = asked["text_model"], []
    assert same(start.decoder, captioner.decoder) and start.decoder is not captioner.decoder
    start.register_forward_pre_hook(lambda _, inputs: given.extend(inputs[0]))
    for _ in range(4):
        assert loss_of(start, None).requires_grad
    said = [r.parse_caption(text) for text in given]
    whole = [s for s in said if s.background and all(None not in thing for thing in s.things)]
    assert len(given) == 160 and 30 < len(whole) < 110


def test_arms_differ_in_captions_alone_which_are_a_blend_of_each_images_own(tmp_path, monkeypatch):
    """The same initial weights, images, times and noise, by the real training."""
    config = dataclasses.replace(TINY, out=str(tmp_path), batch=40, paint_steps=10)
    styles, seen, usual = ("ground_truth", "short", "descriptive"), [], r.rectified_flow_loss
    captions = {style: [f"{style} {i}" for i in range(24)] for style in styles}

    def encode(texts):  # a caption's number: 100 for each style, and its image's
        pairs = [text.split() for text in texts]
        numbers = [100.0 * styles.index(style) + 100 + int(i) for style, i in pairs]
        return torch.tensor(numbers).view(-1, 1, 1).expand(-1, r.STATES, 16)

    def spy(model, x, text, generator):
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        seen.append((weights, x[:, 0, 0], text[:, 0, 0], generator.get_state()))
        return usual(model, x, text, generator)

    monkeypatch.setattr(r, "rectified_flow_loss", spy)
    x = torch.arange(24.0).view(-1, 1, 1).expand(-1, 16, 48)  # an image's number
    for arm, share in ("ground_truth", 0), ("descriptive:95", 0.95), ("short:50", 0.5):
        r.train_painter(config, arm, captions, SimpleNamespace(encode=encode), x)
        torch.rand(7)  # what comes between two stages decides nothing
        images, texts = (torch.cat([step[i] for step in seen[-10:]]) for i in (1, 2))
        some = texts > 0
        assert (texts[some] % 100 == images[some]).all(), "the caption is the image's own"
        assert abs((~some).sum() - 40) < 5 * math.sqrt(36)
        alt, wanted = (texts[some] < 200).sum(), (1 - share) * some.sum()
        assert abs(alt - wanted) <= 5 * math.sqrt(wanted * share)
    a, b = seen[:10], seen[10:20]
    assert torch.equal(a[0][0], b[0][0]), "they start alike"
    for (_, x, _, state), (_, x2, _, state2) in zip(a, b, strict=True):
        assert torch.equal(x, x2) and torch.equal(state, state2)
    assert not torch.equal(a[0][1], a[1][1]) and not torch.equal(a[-1][0], b[-1][0])


def test_training_is_adamw_with_warm_up_cosine_clipped_gradients_and_an_average(tmp_path):
    config = dataclasses.replace(TINY, out=str(tmp_path))

    def new():
        return torch.nn.Linear(1, 1, bias=False)

    def loss_of(model, generator):
        return (50 + torch.rand((), generator=generator)) * (model.weight - 2).square().sum()

    average = r.train(config, "a", new, loss_of, 40, 0.1, 0.7)
    last = r.train(config, "b", new, loss_of, 40, 0.1, draws="a")
    torch.manual_seed(r.generator(config, "initialise", "a").initial_seed())
    model, numbers = new(), r.generator(config, "train", "a")
    optimizer, truth = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98)), model.weight.data
    for k in range(1, 41):
        fall = 0.02 + 0.98 * (1 + math.cos(math.pi * (k - 1) / 40)) / 2
        optimizer.param_groups[0]["lr"] = 0.1 * min(k / 3, fall)
        (gradient,) = torch.autograd.grad(loss_of(model, numbers), model.weight)
        model.weight.grad = gradient / max(1, gradient.norm())
        optimizer.step()
        decay = min(0.7, k / (10 + k))
        truth = decay * truth + (1 - decay) * model.weight.data
    close(average.weight, truth, 1e-5)
    close(last.weight, model.weight.data, 1e-5)
    with pytest.raises(FloatingPointError, match="c diverged at step 1"):
        r.train(config, "c", new, lambda m, _: m.weight.sum() * math.nan, 4, 1)
    assert not (tmp_path / "c.pt").exists()


# ----- The user's own images ----------------------------------------------------------------------


def test_a_captioner_of_ones_own_images(tmp_path, capsys):
    """Four images, one of them in a folder, with captions, and three files that are no images."""
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    photos, lines, file = tmp_path / "photos", [], tmp_path / "found.jsonl"
    (photos / "deep").mkdir(parents=True)
    for i, scene in enumerate(scenes(4)):
        name = f"{i}.png" if i else "deep/0.JPG"
        Image.fromarray(r.render(scene, 48)).save(photos / name)
        lines.append({"file": name, "caption": r.describe(scene, "ground_truth", random.Random(i))})
        if i < 2:
            lines[-1]["descriptive"] = r.describe(scene, "descriptive", random.Random(i))
    text = "\ufeff" + "\n".join(json.dumps(line) for line in lines) + "\n"
    (photos / "captions.jsonl").write_text(text, "utf-8")
    (photos / "broken.png").write_bytes((photos / "1.png").read_bytes()[:99])
    (photos / "notes.txt").write_text("mine")
    train = ["captioner", "--data", str(photos), *SMOKE, str(tmp_path)]
    assert r.main(train) == 0
    assert {p.stem for p in (tmp_path / "smoke").glob("*.pt")} == {"base", "descriptive"}
    command = ["caption", "--images", str(photos), "--device", "cpu", "--out", str(file)]
    command += ["--checkpoint", str(tmp_path / "smoke" / "descriptive.pt")]
    assert r.main(command) == 0
    printed, found = capsys.readouterr().out, file.read_text()
    assert "4 captions; 3 files are left out" in printed
    assert all(name in printed for name in ("broken.png", "notes.txt", "captions.jsonl"))
    rows = [json.loads(line) for line in found.splitlines()]
    assert [row["file"] for row in rows] == ["1.png", "2.png", "3.png", "deep/0.JPG"]
    assert all(isinstance(row["caption"], str) for row in rows)
    assert r.main(command) == 2 and file.read_text() == found
    file.write_text("".join(found.splitlines(True)[:2]))  # as if stopped
    assert r.main([*command, "--resume"]) == 0 and file.read_text() == found
    (photos / "captions.jsonl").write_text(text.replace("circle", "disc"), "utf-8")
    assert r.main(train) == 2 and "data was" in capsys.readouterr().err, "a stage of other captions"


def test_images_are_turned_made_opaque_and_cut_to_a_square(tmp_path):
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    image = Image.new("RGBA", (60, 20), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (8, 0, 52, 20))  # the middle is transparent: white when it is shown
    image.save(tmp_path / "wide.png")
    assert (r.read_image(tmp_path / "wide.png", 8) == 255).all()
    image, exif = Image.new("RGB", (20, 20), "red"), Image.Exif()
    image.paste("blue", (0, 0, 20, 10))
    exif[0x0112] = 3  # to be turned by 180 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    top, bottom = r.read_image(tmp_path / "turned.png", 8)[[0, -1], 0].tolist()
    assert (top, bottom) == ([255, 0, 0], [0, 0, 255])
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("lime", "black")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert (r.read_image(tmp_path / "two.gif", 8) == [0, 255, 0]).all()
    for kind in ("jpg", "jfif", "png", "webp", "gif", "bmp"):
        frames[0].save(tmp_path / f"one.{kind}")
        assert abs(r.read_image(tmp_path / f"one.{kind}", 8).astype(int) - [0, 255, 0]).max() < 9
    Image.fromarray(np.full((9, 9), 20000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png: mode I;16"):
        r.read_image(tmp_path / "deep.png", 8)


# ----- Command line and chat endpoint -------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--arms", "long:95"], "--arms long:95"),
        (["--paint-steps", "0"], "--paint-steps 0"),
        (["captioner", "--data", "nowhere"], "nowhere"),
        (["upsample", "--chat-url", "ftp://x"], "ftp"),
        (["--smoke", "--device", "abacus"], "abacus"),
    ],
)
def test_bad_flags_exit_2_with_one_line(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert r.main(["--out", str(tmp_path / "run"), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Answers with the server's `answer`, and keeps the requests."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        status, text = self.server.answer
        self.send_response(status)
        self.send_header("Location", "/v1/chat/completions")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


KEY = "sk-not-to-be-seen"
GOOD = json.dumps({"choices": [{"message": {"role": "assistant", "content": " a fox\n"}}]})


@pytest.mark.parametrize(
    "key,answer,words",
    [
        (KEY, (200, GOOD), "a fox\n"),
        (KEY, (401, f"bad key {KEY}"), "answers 401"),
        (KEY, (302, ""), "answers 302"),
        (KEY, (200, KEY), "Expecting value"),
        (f"{KEY}\n{KEY}", None, "OPENAI_API_KEY"),
    ],
)
def test_a_chat_endpoint_gets_rules_examples_and_the_prompt_and_the_key_is_not_shown(
    monkeypatch, capsys, key, answer, words
):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        server.answer, server.seen = answer, []
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        flags = ["--chat-url", f"http://127.0.0.1:{server.server_port}/v1/", "--chat-model", "m"]
        status = r.main(["upsample", "--prompt", "a red fox", *flags])
        server.shutdown()
    shown = "".join(capsys.readouterr())
    assert words in shown and KEY[:6] not in shown and (status == 0) == (answer == (200, GOOD))
    assert len(server.seen) == (answer is not None), "no redirect is followed"
    for path, authorization, body in server.seen:
        assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
        roles, texts = zip(*(message.values() for message in body["messages"]), strict=True)
        assert body["model"] == "m" and roles == ("system", *("user", "assistant") * 3, "user")
        assert "a red fox" in texts[-1]
        assert all(15 <= len(text.split()) <= 80 and "\n" not in text for text in texts[2:-1:2])


def test_the_claims_program_goes_on_from_stages_and_has_students_intervals(finished, tmp_path):
    from tests.claims import recaption_claims as program

    shutil.copytree(finished, tmp_path / "recaption_0")
    arms = ["--arms", "ground_truth,descriptive:95", "--out", str(tmp_path)]
    claims = program.main(["--smoke", "--seeds", "0", *arms])["claims"]["models"]
    assert (tmp_path / "better_captions_default.json").is_file()
    for style in ("descriptive", "upsampled"):
        ours, truth = (claims[f"{arm}, {style}"] for arm in ("descriptive:95", "ground_truth"))
        for key in ("clip_score", "binding"):
            less = ours[key]["mean"] - truth[key]["mean"]
            assert ours[f"{key}, less ground_truth"]["mean"] == pytest.approx(less)
    found = program.over([0.5, 0.7])
    assert found["mean"] == 0.6 and found["half"] == pytest.approx(12.706 * 0.1)
