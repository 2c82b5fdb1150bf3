"""recaption.py: formulas against slow loops, captions against their parser, then the jobs as a user starts them."""

import dataclasses
import http.server
import importlib
import itertools
import json
import math
import os
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


def test_relations_are_below_and_right_and_a_binding_is_colour_and_shape():
    at = {place: r.Thing("circle", "red", place=place) for place in r.VALUES["place"]}
    a, b, c, d = at.values()
    found = [r.relation(*pair) for pair in ((a, b), (a, c), (d, a), (b, c), (a, r.Thing()), (None, a))]
    assert found == [(0, 1), (1, 0), (-1, -1), (1, -1), None, None]
    said, true = (r.Scene((r.Thing(shape, "red"),)) for shape in ("circle", "square"))
    assert r.agreement(said, true)["binding"] == (0, 1, 1)


def test_things_are_matched_whatever_their_order_and_counted():
    said, true = (r.parse_caption(text) for text in ("a red circle and a blue cross", "a blue cross and a red circle"))
    assert r.agreement(said, true)["binding"] == (2, 2, 2)
    fewer = r.agreement(r.Scene(said.things[:1]), true)
    more = r.agreement(true, r.Scene(said.things[:1]))
    assert fewer["count"] == more["count"] == (0, 1, 1) and fewer["shape"] == (1, 1, 2) and more["shape"] == (1, 2, 1)
    things = r.parse_caption("a red circle, a blue cross in the top right").things
    assert [thing.shape for thing in things] == ["cross", "circle"], "what has no place comes last"


def test_a_triangle_stands_on_its_side():
    image = r.render(r.Scene((r.Thing("triangle", "red", "large", "plain", "top left"),), "white"))
    red = (image[:16, :16] == r.COLOURS["red"]).all(-1).sum(1)
    assert red[11:13].min() > 8 > 4 > red[2:4].max()


def test_agreement_of_the_same_of_nothing_and_of_babble():
    for scene in scenes(20):
        found = r.agreement(scene, scene)
        assert all(a == b == c for a, b, c in found.values())
    nothing = r.agreement_report([(r.Scene(), scenes(1)[0])])
    assert nothing["f1"] == 0 and nothing["hallucinated"] is nothing["texture"] is None
    row = dict.fromkeys(("hallucinated", "spatial_f1", "spatial_hallucinated", "binding"), 0.25) | nothing
    lines = r.score_table({"mute": row}, {}).splitlines()
    assert lines[1].split() == ["mute", "0.000", "-", "0.000", "-", "-"]
    babble = r.parse_caption(", ".join(["a red circle"] * 9))
    assert len(babble.things) == 9 and r.agreement(babble, scenes(1)[0])["colour"][1] == 9


def test_the_tokenizer_is_reversible_and_cuts_long_texts():
    texts = ["a red circle.", "Déjà vu! 日本 🙂", "two  spaces", "IMG_0007.jpg"]
    pieces = r.Pieces.learn(["a red circle."] * 2, 10)
    assert [pieces.decode(pieces.encode(text)) for text in texts] == texts
    assert len(pieces.encode("a red circle.")) == 4
    assert r.Pieces.learn(["a a b"], 10).pieces == [] and r.Pieces.learn(["c c c c b b"], 1).pieces == [" c"]
    assert pieces.decode(pieces.encode("half \ud83d")) == "half ?", "half of a character, as JSON may hold"
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


def test_a_timed_layer_by_hand_and_at_first_it_adds_nothing():
    """adaLN-zero of DiT: norms without weights of their own, shifted, scaled and gated by the condition."""
    layer, x, memory, condition = (
        far_from_zero(r.Layer(8, 2, True, True)),
        doubles(2, 5, 8),
        doubles(2, 3, 8),
        doubles(2, 8),
    )
    mask = torch.tensor([[True, True, False], [True, False, False]])
    for b in range(2):
        shift, scale, gate, shift_2, scale_2, gate_2 = layer.time(condition[b]).view(6, 8)

        def norm(rows):
            return (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

        rows = x[b] + gate * layer.attend((norm(x[b]) * (1 + scale) + shift)[None])[0]
        rows = rows + layer.cross(norm(rows)[None], memory[b, mask[b]][None])[0]
        rows = rows + gate_2 * layer.mlp(norm(rows) * (1 + scale_2) + shift_2)
        close(layer(x, memory, memory_mask=mask, condition=condition)[b], rows)
    new = r.Layer(8, 2, timed=True).double()
    close(new(x, condition=condition), x)


def test_the_painter_tells_times_apart_by_sines_and_cosines():
    painter, seen, t = r.Painter(20, 9, 4, 4, 16, 2, 1, 1), [], torch.tensor([0.0, 0.37])
    painter.time.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    painter(torch.randn(2, 4, 4, 4), t, torch.tensor([[1, 5, 2]] * 2))
    for b, i in itertools.product(range(2), range(8)):
        angle = 1000 * t[b].item() / 10000 ** (i / 8)
        close(seen[0][b, [i, 8 + i]], torch.tensor([math.sin(angle), math.cos(angle)]), 1e-3)


def test_a_readers_first_state_sees_the_last_token():
    reader, tokens = far_from_zero(r.TextReader(20, 9, 16, 2, 1)), torch.tensor([[1, 5, 6, 2], [1, 5, 7, 2]])
    for mask in None, tokens != 0:
        first, second = reader(tokens, mask)[:, 0]
        assert (first != second).all()


def test_draws_are_from_the_fewest_tokens_that_reach_top_p():
    logits, count = torch.tensor([0.3, 2.1, -1.0, 1.4, 0.9]), 6000
    shares = [math.exp(v / 0.7) for v in logits.tolist()]
    shares = [share / sum(shares) for share in shares]
    for cut, kept in (
        ({"top_p": 0.8}, {1, 3}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_p": 0.99}, {0, 1, 3, 4}),
        ({}, set(range(5))),
    ):
        drawn = r.sample_token(logits.expand(count, -1), 0.7, generator=seeded(), **cut).bincount(minlength=5)
        for i, share in enumerate(shares):
            share = share / sum(shares[j] for j in kept) if i in kept else 0.0
            assert abs(drawn[i] - count * share) <= 5 * math.sqrt(count * share * (1 - share))
    assert r.sample_token(logits[None], 0.0).item() == 1


def test_what_follows_an_end_is_padding_and_a_row_without_one_fills_the_length(monkeypatch):
    draws = iter(torch.tensor([[5, 2, 7, 2, 8, 8, 8, 8], [5, 6, 7, 8, 9, 5, 6, 7]]).T)
    monkeypatch.setattr(r, "sample_token", lambda *_, **__: next(draws))
    found = small_coca().decoder.generate(doubles(2, 3, 16)).tolist()
    assert found == [[1, 5, 2, 0, 0, 0, 0, 0, 0], [1, 5, 6, 7, 8, 9, 5, 6, 7]]


def test_what_the_captioner_compares():
    """Pixels in -1 .. 1, channels first; image: a pooling of the memory; text: the end token's state; the scale."""
    model, seen, tokens = small_coca(), [], torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]])
    images = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8)
    model.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    memory, image = model.look(images)
    for channel in range(3):
        close(seen[0][:, channel], images[..., channel].double() / 127.5 - 1)
    close(image, model.of_image(model.pool_one(memory)).squeeze(1))
    states = model.decoder.read(tokens)
    text = torch.stack(
        [model.of_text(model.decoder.middle(states[0, 3])), model.of_text(model.decoder.middle(states[1, 2]))]
    )
    close(model.embed_text(tokens), text)
    for log_scale, scale in (1.0, math.e), (9.0, 100.0):
        model.log_scale.fill_(log_scale)
        clip, write = model.losses(images, tokens)
        close(clip, r.clip_loss(image, text, torch.tensor(scale, dtype=torch.float64)))
        close(write, r.caption_loss(model.decoder.write(states, memory), tokens, 0))
    model.requires_grad_(True).losses(images, tokens, write=False)[0].backward()
    assert model.decoder.lower[0].mlp[0].weight.grad.any() and model.stem[0].weight.grad.any()


def test_the_autoencoder_takes_its_scale_off_and_puts_it_back():
    model, images = r.Autoencoder(3), torch.randint(256, (2, 4, 4, 3), dtype=torch.uint8)
    noisy = [model.loss(images, seeded(n)).item() for n in (0, 1)]
    assert noisy[0] != noisy[1], "noise is added to the latents"
    model.encoder = model.decoder = torch.nn.Identity()
    model.mean += torch.tensor([0.5, -0.2, 0.1]).view(3, 1, 1)
    model.deviation *= torch.tensor([2.0, 0.5, 3.0]).view(3, 1, 1)
    latents = model.encode(images)
    close(latents[:, 0], ((images[..., 0] / 127.5 - 1) - 0.5) / 2, 1e-5)
    assert torch.equal(model.decode(latents), images)
    assert (model.decode(latents + 99) == 255).all() and (model.decode(latents - 99) == 0).all()


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

    average = work.train("line", "painter", module, 8, loss_of, 0.1, ema=0.3)  # few steps: the first ones still show
    for step, weight in enumerate([*seen[1:], module.weight.detach()], 1):
        decay = min(0.3, step / (10 + step))
        truth = decay * truth + (1 - decay) * weight
    close(average.weight, truth, 1e-5)


def test_a_stage_of_another_shape_and_a_captioner_of_another_run_are_refused(tmp_path):
    work = r.Pipeline(r.Config(**r.SMOKE, out=str(tmp_path)), quiet)

    def loss(model, _):
        return model.weight.sum()

    work.train("line", "painter", torch.nn.Linear(2, 2), 3, loss)
    with pytest.raises(ValueError, match=r"line.pt: was made by another version of this script"):
        work.train("line", "painter", torch.nn.Linear(3, 3), 3, loss)
    other = r.Pipeline(dataclasses.replace(work.config, seed=7), quiet)
    other.save("captioner", {})
    work.train = lambda name, needs, module, *_: module
    with pytest.raises(ValueError, match=r"captioner.pt: saved with another config: seed was 7"):
        _ = work.captioners


@pytest.mark.parametrize("content", [{}, {"config": None}, {"config": {}}, {"config": {}, "source": ""}, [1]])
def test_files_of_another_script_under_a_stages_name_are_refused(tmp_path, content):
    for name, stage in ("data", "pictures"), ("autoencoder", "autoencoder"):
        (tmp_path / name).mkdir()
        torch.save(content, tmp_path / name / f"{name}.pt")
        work = r.Pipeline(r.Config(**r.SMOKE, resume=True, out=str(tmp_path / name)), quiet)
        with pytest.raises(ValueError, match=rf"{name}\.pt: is no file of this script \(.*; move it away"):
            getattr(work, stage)


def test_captions_that_the_length_cuts_are_counted(tmp_path):
    said, needed = [], [99]
    for step in "whole", "cut":
        length = sorted(needed)[len(needed) // 2]  # second: some captions are longer, some just fit
        work = r.Pipeline(r.Config(**r.SMOKE | {"length": length}, out=str(tmp_path / step)), said.append)
        p, pieces = work.pictures, work.pieces
        texts = [*p.alt, *p.short.values(), *p.descriptive.values()]
        needed = [len(pieces.encode(text)) + 2 for text in texts]
    rows = pieces.batch(texts, length).tolist()
    cut = sum(pieces.decode(row) != text for text, row in zip(texts, rows, strict=True))
    assert 0 < cut < len(texts) and length in needed
    assert said == [f"{cut} of {len(texts)} captions are cut to --length {length}; whole, they need {max(needed)}"]


def test_the_rate_rises_and_falls_and_gradients_are_clipped(tmp_path):
    work, norms = r.Pipeline(r.Config(**r.SMOKE, out=str(tmp_path)), quiet), []

    def loss_of(model, generator):
        if model.weight.grad is not None:
            norms.append(model.weight.grad.norm().item())  # the last step's, as it was used
        return 50 * model.weight.sum()

    work.train("line", "painter", torch.nn.Linear(4, 4, bias=False), 8, loss_of, 0.1)
    rates = [row["lr"] / 0.1 for row in work.rows]
    assert len(rates) == 8 and rates[0] < 0.8 < max(rates) <= 1 and rates[-1] < 0.1
    assert rates[1:] == sorted(rates[1:], reverse=True) and max(norms) < 1.001


class Recorder:
    """Stands for a model in a stage's loss: keeps the pairs of images, or prompts, and tokens that it is given."""

    decoder = property(lambda self: self)

    def look(self, images):
        self.images = images
        return images, None

    def read(self, tokens):
        self.tokens = tokens

    def write(self, *_):
        return torch.zeros(*self.tokens.shape, 9999)

    def losses(self, images, tokens, write=True):
        self.images, self.tokens, self.written = images, tokens, write
        return torch.tensor(3.0), torch.tensor(5.0)

    def loss(self, *given):
        self.given = given


@pytest.fixture
def traced(tmp_path, monkeypatch):
    """A pipeline whose training only adds 1 to every weight, and what each stage asked it for."""
    work, asked = (
        r.Pipeline(
            r.Config(
                **r.SMOKE | {"batch": 40, "length": 80, "scenes": 24, "prompts": 6}, tune_lr=0.5, out=str(tmp_path)
            ),
            quiet,
        ),
        {},
    )

    def train(name, needs, module, steps, loss_of, lr=None, ema=0.0, same=""):
        start = [p.detach().clone() for p in module.parameters()]
        for p in module.parameters():
            p.data += 1
        asked[name] = {"needs": needs, "start": start, "loss_of": loss_of, "lr": lr, "ema": ema, "steps": steps}
        return module

    monkeypatch.setattr(work, "train", train)
    return work, asked


def pairs_of(work, images, all_images, tokens):
    """(index, text) of each row of a batch."""
    at = [[torch.equal(image, other) for other in all_images].index(True) for image in images]
    return list(zip(at, map(work.pieces.decode, tokens.tolist()), strict=True))


def test_the_fine_tunes_start_from_the_base_and_see_their_own_pairs(traced, monkeypatch):
    work, asked = traced
    p, base = work.pictures, work.captioners["base"]
    for style in "short", "descriptive":
        call = asked[style]
        assert all(map(torch.equal, call["start"], base.parameters())) and call["lr"] == 0.5
        call["loss_of"](model := Recorder(), seeded())
        pairs = pairs_of(work, model.images, p.images, model.tokens)
        assert all(text == getattr(p, style)[i] for i, text in pairs) and len(set(pairs)) > 5
    # The base sees alt-text, and its loss has CoCa's weights.
    loss = asked["base"]["loss_of"](model := Recorder(), seeded())
    assert loss == 1 * 3 + 2 * 5
    pairs = pairs_of(work, model.images, p.images, model.tokens)
    assert all(text == p.alt[i].strip() for i, text in pairs) and len({i for i, _ in pairs}) > 12
    # And each style is written by its own captioner.
    monkeypatch.setattr(r, "caption_images", lambda model, *_: [str(id(model))] * 24)
    assert work.captions == {style: [str(id(work.captioners[style]))] * 24 for style in ("short", "descriptive")}


def test_a_painter_sees_the_blend_of_its_own_image_and_sometimes_nothing(traced, monkeypatch):
    work, asked = traced
    count, seen, starts = 24, [], []
    work.latents = torch.arange(count).float().view(-1, 1)
    work.captions = {style: [f"{style} {i}" for i in range(count)] for style in ("short", "descriptive")}
    work.pictures.alt[:] = [f"alt {i}" for i in range(count)]
    monkeypatch.setattr(r, "rectified_flow_loss", lambda model, x, text, _: seen.append((x, text)))
    for arm, style, share in (
        ("ground_truth", "", 0),
        ("short:80", "short", 0.8),
        ("descriptive:30", "descriptive", 0.3),
    ):
        work.painter(arm)
        call = asked.pop("painter_" + arm.replace(":", "_"))
        assert call["ema"] == work.config.ema and call["steps"] == work.config.paint_steps
        starts.append(call["start"])
        assert all(map(torch.equal, starts[0], starts[-1]))
        again = [(call["loss_of"](None, seeded(5)), *seen[-1])[1:] for _ in range(2)]
        assert all(map(torch.equal, *again)), "every draw is the generator's"
        seen.clear()
        generator = seeded()
        for _ in range(15):
            call["loss_of"](None, generator)
        rows = [
            (int(i), work.pieces.decode(t)) for x, text in seen for i, t in zip(x[:, 0], text.tolist(), strict=True)
        ]
        assert all(text in ("", f"alt {i}", f"{style} {i}") for i, text in rows)
        n, empty = len(rows), sum(not text for _, text in rows)
        assert abs(empty - 0.1 * n) < 5 * math.sqrt(n * 0.1 * 0.9)
        synthetic = sum(text.startswith(style + " ") for _, text in rows)
        assert abs(synthetic - share * (n - empty)) <= 5 * math.sqrt(n * share * (1 - share))


def test_latents_have_mean_0_and_deviation_1(traced):
    work, _ = traced
    close(work.latents.mean((0, 2, 3)), torch.zeros(4), 1e-4)
    close(work.latents.std((0, 2, 3)), torch.ones(4), 1e-4)


def test_the_judges_see_clean_captions_of_scenes_of_their_own(traced):
    work, asked = traced
    drawn, texts = work.judging
    shown = {image.numpy().tobytes() for image in work.pictures.images}
    held = {image.numpy().tobytes() for image in work.held_out.images}
    own = {image.numpy().tobytes() for image in drawn.images}
    assert len(own & shown) < 3 and len(own & held) < 3 and len(held & shown) < 3
    assert work.judge is not work.captioners["base"] and work.reader and work.upsampler
    asked["judge"]["loss_of"](model := Recorder(), seeded())
    for i, text in pairs_of(work, model.images, drawn.images, model.tokens):
        assert text in (drawn.descriptive[i], texts[i], drawn.short[i])
    assert not model.written and len(model.images) == 80
    asked["upsampler"]["loss_of"](model := Recorder(), seeded())
    prompts, long = ([work.pieces.decode(row) for row in part.tolist()] for part in model.given)
    assert set(zip(prompts, long, strict=True)) <= set(zip(texts, drawn.descriptive.values(), strict=True))
    asked["reader"]["loss_of"](model := Recorder(), seeded())
    images, scenes_, _ = model.given
    assert all((r.render(scene) == image.numpy()).all() for scene, image in zip(scenes_, images, strict=True))


def test_upsampled_prompts_are_drawn_from_but_the_users_own_are_judged(traced, monkeypatch):
    work, _ = traced
    drawn, judged = [], []
    monkeypatch.setattr(work, "painter", lambda arm: arm)
    monkeypatch.setattr(work, "upsample", lambda prompts: [f"long {text}" for text in prompts])
    monkeypatch.setattr(work, "draw", lambda painter, lines: drawn.append((painter, lines)) or torch.zeros(len(lines)))
    monkeypatch.setattr(r, "judge_images", lambda work, images, said: judged.append(said) or {})
    r.score_arms(work)
    for arm, (alt, descriptive, brief, upsampled) in zip(
        ("ground_truth", "descriptive:95"), (drawn[:4], drawn[4:]), strict=True
    ):
        assert alt == (arm, work.held_out.alt) and descriptive == (arm, list(work.held_out.descriptive.values()))
        assert upsampled == (arm, [f"long {text}" for text in brief[1]])
        assert all(r.parse_caption(t) == r.brief(s) for t, s in zip(brief[1], work.held_out.scenes, strict=True))
    assert judged == [*([lines for _, lines in drawn[:3]] + [drawn[2][1]])] * 2


def test_images_are_judged_by_what_was_said(traced, monkeypatch):
    """A share is of what the text says, and the text's own embedding counts."""
    work, _ = traced
    said = [r.Scene((r.Thing("circle", "red"),)), r.Scene((r.Thing("square", "blue"),))]
    shown = [r.Scene((r.Thing("circle", "red", "large", "plain", "top left"), r.Thing("cross", "red")), "white")] * 2
    monkeypatch.setattr(work.reader, "read", lambda images: shown)
    texts, images = [r.describe(scene) for scene in said], torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    found = r.judge_images(work, images, texts)
    assert found["shape"] == found["colour"] == found["binding"] == 0.5 and found["count"] == 0.0
    with torch.no_grad():
        scores = r.clip_score(work.judge.look(images)[1], work.judge.embed_text(work.tokens(texts)))
    assert found["clip"] == pytest.approx(scores.mean().item())
    # And a captioner's hallucinations are what it says that is not so, not what it leaves out.
    monkeypatch.setattr(r, "caption_images", lambda *_: [r.describe(r.brief(scene)) for scene in work.held_out.scenes])
    found = r.score_captioners(work)["base"]
    assert found["hallucinated"] == 0.0 < found["f1"] < 1 and found["spatial_hallucinated"] is None


def test_models_draw_from_the_same_noise_with_the_guidance_asked_for(traced, monkeypatch):
    work, _ = traced
    seen = []

    def spy(painter, text, shape, steps, guidance, generator):
        seen.append((torch.randn(1, generator=generator).item(), steps, guidance))
        return torch.zeros(len(text), *shape)

    monkeypatch.setattr(r, "sample_latents", spy)
    work.draw(None, ["a"] * 3), work.draw(None, ["another text"] * 3)
    assert seen[0] == seen[1] and seen[0][1:] == (work.config.sample_steps, work.config.guidance)


FIELDS = (
    "drop ema paint_steps top_p",
    "temperature top_p",
    "tune_lr caption_weight",
    "judge_steps",
    "channels",
    "scenes",
)
STAGES = "painter", "captions", "captioner", "judge", "autoencoder", "data"


@pytest.mark.parametrize("fields,stage", [*zip(FIELDS, STAGES, strict=True)])
def test_a_stage_of_another_config_is_not_taken(tmp_path, fields, stage):
    config = r.Config(**r.SMOKE, out=str(tmp_path))
    r.Pipeline(config, quiet).save("x", {})
    for field in fields.split():
        value = getattr(config, field)
        other = dataclasses.replace(config, **{field: (value or 1.0) / 2 if isinstance(value, float) else 2 * value})
        with pytest.raises(ValueError, match=f"{field} was"), r.Pipeline(other, quiet).load("x", stage):
            pass


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
        (["upsample", "x", "--chat-url", "http://x /v1", "--chat-model", "m"], "ASCII, no spaces"),
        (["--length", "2"], "--length 2: must be 3 or more"),
        (["--prompts", "1"], "--prompts 1: must be 2 or more"),
        (["--images", "photos"], "--images photos: must go with the job caption"),
        (["caption", "photos"], "'photos': only upsample takes a second word"),
        (["caption", "--out", "found.jsonl"], "--out found.jsonl: must be a folder"),
    ],
)
def test_bad_flags_exit_2_with_one_line(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert r.main(["--out", str(tmp_path / "run"), *flags]) == 2
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
        ("{", "captions.jsonl:2: must be UTF-8 JSON"),
        ('{"file": "1.png"}', "captions.jsonl:2: must be UTF-8 JSON"),
        ('{"file": "1.png", "caption": 3}', "captions.jsonl:2: must be UTF-8 JSON"),
        ('["1.png", "x"]', "captions.jsonl:2: must be UTF-8 JSON"),
        ('{"file": "1.png", "caption": "x", "short": 3}', "captions.jsonl:2: must be UTF-8 JSON"),
        ('{"file": "9.png", "caption": "x"}', "captions.jsonl:2: there is no"),
        ('{"file": "bad.png", "caption": "x"}', "bad.png: is no image"),
    ],
)
def test_a_bad_row_is_named(folder, tmp_path, capsys, line, words):
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "captions.jsonl").write_text('{"file": "1.png", "caption": "x"}\n' + line + "\n")
    assert r.main(["captioner", "--data", str(folder), "--smoke", "--out", str(tmp_path / "own")]) == 2
    assert words in capsys.readouterr().err


def test_rows_may_have_a_mark_blank_lines_and_any_line_end(folder):
    rows = [{"file": f"{i}.png", "caption": f"line\u2028{i} é", "short": f"s{i}"} for i in (1, 2, 3)]
    text = "\ufeff\r\n" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    for mark in "\ufeff", "":
        (folder / "captions.jsonl").write_bytes((mark + text[3:]).encode())
        found = r.read_pictures(folder, 8)
        assert found.alt == [row["caption"] for row in rows] and found.short == {0: "s1", 1: "s2", 2: "s3"}
    (folder / "captions.jsonl").write_bytes(text[3:].encode("latin-1", "replace"))
    with pytest.raises(ValueError, match=r"captions\.jsonl:1: must be UTF-8 JSON"):
        r.read_pictures(folder, 8)
    for text in "", "\n", json.dumps(rows[0]):
        (folder / "captions.jsonl").write_text(text)
        with pytest.raises(ValueError, match="must have two rows or more"):
            r.read_pictures(folder, 8)


@pytest.fixture
def captioner(folder, tmp_path):
    """The command that captions the folder, without --out."""
    model = r.CoCa(16, 259, 9, 16, 1, 2, 2)
    content = {"sizes": model.sizes, "pieces": [], "states": {"base": model.state_dict(), "short": model.state_dict()}}
    torch.save(content, tmp_path / "c.pt")
    return [
        "caption",
        "--images",
        str(folder),
        "--checkpoint",
        str(tmp_path / "c.pt"),
        "--batch",
        "2",
        "--seed",
        str(2**70),
    ]


def test_names_of_any_bytes_are_written_and_found_again(folder, captioner, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (folder / "1.png").rename(folder / name)
    except OSError:
        pytest.skip("this file system holds UTF-8 alone")
    (folder / "2.png").rename(folder / "日本 🙂.png")
    file = tmp_path / "found.jsonl"
    for _ in range(2):
        assert r.main([*captioner, "--out", str(file), "--resume"]) == 0
        names = [json.loads(line)["file"] for line in file.read_text("utf-8").split("\n")[:-1]]
        assert len(names) == 7 and {name, "日本 🙂.png", "deep/0.png"} <= set(names)


def test_a_full_disk_costs_no_row(folder, captioner, tmp_path, capsys):
    """The largest file allowed ends within a row: the next run cuts that off and goes on."""
    resource = pytest.importorskip("resource", reason="no such limit on this system")
    file, before = tmp_path / "found.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
    try:
        assert r.main([*captioner, "--out", str(file)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert f"{file}: not written" in error and "--resume" in error and error.count("\n") == 1
    assert r.main([*captioner, "--out", str(file), "--resume"]) == 0
    assert len({json.loads(line)["file"] for line in file.read_text().splitlines()}) == 7


def test_files_of_others_are_left_as_they_are(folder, captioner, tmp_path, capsys):
    for text in "my notes", '{"file": "1.png", "caption": "mine"}\n', '["file"]\n':
        (file := tmp_path / "o.jsonl").write_text(text)
        assert r.main([*captioner, "--out", str(file), "--resume"]) == 2
        assert "this captioner did not write" in capsys.readouterr().err and file.read_text() == text
    file.write_text(json.dumps({"file": "1.png", "short": "x"}) + "\n" + json.dumps({"file": "2.png"})[:7])
    assert r.main([*captioner, "--out", str(file), "--resume"]) == 0
    assert file.read_text().count("1.png") == 1 == file.read_text().count("2.png")


def test_two_runs_do_not_write_to_one_file(folder, captioner, tmp_path, monkeypatch, capsys):
    """A second run begins and ends while the first has one batch written: each file has one row all the same."""
    file, usual, statuses = tmp_path / "o.jsonl", r.caption_images, []

    def caption(*given):
        if file.exists() and not statuses:
            statuses.append(None)
            statuses[0] = r.main([*captioner, "--out", str(file), "--resume"])
        return usual(*given)

    monkeypatch.setattr(r, "caption_images", caption)
    assert r.main([*captioner, "--out", str(file)]) == 2 and statuses == [0]
    assert "o.jsonl: another run writes to it; stop one, go on with --resume" in capsys.readouterr().err
    names = [json.loads(line)["file"] for line in file.read_text().splitlines()]
    assert len(names) == 7 == len(set(names))


def test_batches_have_draws_of_their_own(folder, captioner, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(
        r, "caption_images", lambda m, p, images, c, g: seeds.append(g.initial_seed()) or ["x"] * len(images)
    )
    (folder / "1.png").write_bytes(b"no image")
    assert r.main([*captioner, "--out", str(tmp_path / "o.jsonl"), "--skip-bad"]) == 0
    assert len(seeds) == 4 == len(set(seeds))
    names = [json.loads(line)["file"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert names == ["2.png", *(f"{i}.png" for i in range(3, 7)), "deep/0.png"]


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
    Image.fromarray(np.full((9, 9), 20000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(r.BadImage, match=r"deep\.png: .*mode I;16: must be 8 bits a channel"):
        r.read_image(tmp_path / "deep.png", 8)


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
    model = small_coca()
    content = {"sizes": model.sizes | {"width": 32}, "pieces": [], "states": {"base": model.state_dict()}}
    torch.save(content, tmp_path / "other.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:999])
    command = ["caption", "--images", str(folder), "--out", str(tmp_path / "o.jsonl"), "--checkpoint"]
    cases = {"x": "no captioner.pt", "y": "there is none", "other": "another version", "half": "not a file of tensors"}
    for name, words in cases.items():
        assert r.main([*command, str(tmp_path / f"{name}.pt")]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


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
    assert KEY not in str(error.value) and waits[3:] == [1.0, 2.0, 4.0, 8.0] and len(seen) == 9
    answers += [says("", 429, **{"Retry-After": "900"}), says("", 429, **{"Retry-After": "soon"}), says(GOOD)]
    assert r.upsample_by_chat(config, "x", waits.append) == GOOD and waits[7:] == [60.0, 2.0]


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
        ((200, f"<html>{KEY}".encode(), {}), r"no chat completion but '<html>\*\*\*"),
        ((200, b"x" * 190 + KEY.encode(), {}), "no chat completion"),  # a part of the key is not shown, either
        ((400, b"x" * 190 + KEY.encode(), {}), "answers 400"),
        ((200, {"choices": []}, {}), "no chat completion"),
        ((200, {"choices": [{"message": {"content": None}}]}, {}), "no chat completion"),
    ]
    for i, (answer, words) in enumerate(cases, 1):
        answers.append(answer)
        with pytest.raises(ValueError, match=words) as error:
            r.upsample_by_chat(config, "x", lambda _: pytest.fail("it waits"))
        assert KEY[:6] not in str(error.value) and len(seen) == i


def test_answers_that_break_the_rules_are_asked_for_again_then_reported(endpoint):
    config, seen, answers = endpoint
    answers += [says("too short"), says(f"{GOOD}\n\n{GOOD}"), says(GOOD)]
    assert r.upsample_by_chat(config, "x") == GOOD
    assert "2 words" in seen[1][2]["messages"][-1]["content"]
    assert "one paragraph" in seen[2][2]["messages"][-1]["content"]
    answers += [says("word " * 81)] * 3
    with pytest.raises(ValueError, match="three answers broke the rules, the last as it has 81 words"):
        r.upsample_by_chat(config, "x")
    short, long = says("word " * 15), says("word " * 80)
    for answer in short, long:
        answers.append(answer)
        assert r.upsample_by_chat(config, "x") == answer[1]["choices"][0]["message"]["content"].strip()
    assert [message["role"] for message in seen[2][2]["messages"][-4:]] == ["assistant", "user"] * 2


def test_keys_that_no_header_can_hold_are_not_shown(endpoint, monkeypatch, capsys):
    config, seen, answers = endpoint
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\r\n")  # as a file's line ends
    answers.append(says(GOOD + " \ud83d"))
    assert r.upsample_by_chat(config, "x \ud83d").endswith("?") and seen[0][1] == f"Bearer {KEY}"
    for key in f"{KEY}\n{KEY}", f"{KEY}é":
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert r.main(["upsample", "x", "--chat-url", config.chat_url, "--chat-model", "m"]) == 2
        error = capsys.readouterr().err
        assert "OPENAI_API_KEY: must be printable ASCII" in error and KEY not in error


def test_a_server_that_speaks_no_http_is_reported(monkeypatch):
    class Silent(http.server.BaseHTTPRequestHandler):
        def handle(self):
            self.rfile.readline()
            self.wfile.write(b"SSH-2.0-x\r\n")

    server = http.server.HTTPServer(("127.0.0.1", 0), Silent)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    config = r.Config(chat_url=f"http://127.0.0.1:{server.server_port}", chat_model="m")
    with pytest.raises(ValueError, match="five attempts failed"):
        r.upsample_by_chat(config, "x", quiet)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def claims(monkeypatch):
    """tests/claims: better_captions.py with few arms, and report.py."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "claims"))
    program, report = (importlib.import_module(name) for name in ("better_captions", "report"))
    monkeypatch.setattr(program, "BLEND", ("ground_truth", "descriptive:95"))
    monkeypatch.setattr(program, "ARMS", (*program.BLEND, "short:95"))
    return program, report


def test_the_claims_program_compares_seed_by_seed_and_keeps_what_is_done(tmp_path, monkeypatch, capsys, claims):
    program, report = claims
    program.main(["--smoke", "--out", str(tmp_path)])
    files = [tmp_path / f"better_captions_{seed}" / "scores.json" for seed in (1, 2)]
    seeds = [json.loads(file.read_text("utf-8")) for file in files]
    for i, seed in enumerate(seeds):  # so little training leaves nothing to tell apart: what was measured is made up
        for j, styles in enumerate(seed["arms"].values()):
            for k, row in enumerate(styles.values()):
                row |= {"clip": 10.0 * j + k + 3 * i * j, "binding": 0.1 * j + 0.01 * i, "count": 0.5}
        files[i].write_text(json.dumps(seed), "utf-8")
    stamps = [file.stat().st_mtime_ns for file in files]
    capsys.readouterr()
    result = program.main(["--smoke", "--out", str(tmp_path)])
    assert stamps == [file.stat().st_mtime_ns for file in files]
    assert program.show(result["claims"]) in capsys.readouterr().out
    kind, up = result["claims"]["caption kind"], result["claims"]["upsampling"]
    row = kind["descriptive:95, descriptive"]
    assert row["clip"]["each"] == [11, 14] and row["clip"]["mean"] == 12.5
    assert row["clip, less ground_truth"]["each"] == [10, 13]
    assert row["clip, less ground_truth"]["half"] == pytest.approx(12.706 * np.std([10, 13], ddof=1) / math.sqrt(2))
    assert up["descriptive:95, upsampled less brief"]["clip"]["each"] == [1, 1]
    monkeypatch.setattr(report, "CLAIMS", tmp_path)
    lines = {line.split(" | ")[0]: line for line in report.better_captions("kind").splitlines()}
    assert "| 12.5 ± 19.1 | +11.5 ± 19.1 | 10.5 ± 6.4 % | +10.0 ± 0.0 % |" in lines["| descriptive:95, descriptive"]
    assert "+" not in lines["| ground truth, descriptive"]
    assert "| +1.0 ± 0.0 |" in report.better_captions("upsampling").splitlines()[-1]


def test_the_claims_program_refuses_seeds_of_other_settings(tmp_path, claims):
    program, _ = claims
    folder = tmp_path / "better_captions_1"
    folder.mkdir()
    (folder / "scores.json").write_text(json.dumps({"settings": {"seed": 7}}), "utf-8")
    with pytest.raises(r.UserError, match=r"made with other .*seed"):
        program.main(["--smoke", "--out", str(tmp_path)])
