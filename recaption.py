"""Better captions: train a captioner, recaption the images, train text-to-image models on that.

Betker et al., "Improving Image Generation with Better Captions" (the DALL-E 3 report), 2023.

    python recaption.py                              the whole experiment: scores and a picture
    python recaption.py captioner --data photos/     a captioner of your images and captions.jsonl
    python recaption.py caption --images photos/ --out captions.jsonl     by that captioner
    python recaption.py upsample --prompt "a red circle"                  a prompt at length

code                 shape       report
tokens               (B, T)      t_1 .. t_T: begin, words, end, then padding
image, text          (B, E)      CLIP embeddings; image is F(i)
memory               (B, N, D)   the image, as the decoder's upper half attends to it
short, descriptive   texts       SSC, DSC: short and descriptive synthetic captions
ground_truth         texts       alt-text: noisy text that was found with the image
x, text              (B, N, K)   latents of an image, and states of its caption (T5's there)

The report gives no sizes, decoding or loss weights. Here drawn scenes stand for photographs, a new
image encoder for CLIP's, a rectified flow on principal components for latent diffusion, a retelling
text model for T5, nearest renderings for human judges. Not included: the consistency decoder.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import hashlib
import http.client
import itertools
import json
import math
import os
import random
import re
import sys
import textwrap
import time
import urllib.parse
from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # threads that wait must soon sleep

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ----- The method: losses, blend, guidance --------------------------------------------------------


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Mean cross-entropy of both directions (Radford et al. 2021): embeddings (B, E) -> ()."""
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits = logit_scale * image @ text.T  # (B, B): pairs are on the diagonal
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def caption_loss(logits: Tensor, tokens: Tensor, pad: int) -> Tensor:
    """Section 2.1: -mean log P(t_j | t_1 .. t_{j-1}; image); logits (B, T, V), tokens (B, T)."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=pad)


def blend_captions(synthetic, ground_truth, probability: float, generator) -> list[str]:
    """Section 3.2: each image's synthetic caption with this probability, else its ground truth."""
    if not 0 <= probability <= 1:
        raise ValueError(f"probability {probability} must be between 0 and 1")
    draws = torch.rand(len(ground_truth), generator=generator) < probability
    triples = zip(draws.tolist(), synthetic, ground_truth, strict=True)
    return [ours if draw else theirs for draw, ours, theirs in triples]


def clip_score(image: Tensor, text: Tensor) -> Tensor:
    """The cosine (B,) of embeddings (B, E), times 100."""
    return 100 * F.cosine_similarity(image, text, dim=-1)


def rectified_flow_loss(model: Callable, x: Tensor, text: Tensor, generator) -> Tensor:
    """Mean square of v(x_t, t, text) - (x - noise), x_t = t x + (1 - t) noise (Liu et al. 2022).

    x: (B, ...); text: (B, ...) as the model takes it; t: (B,), drawn here.
    """
    t = torch.randn(len(x), generator=generator).to(x)  # drawn on the CPU: the same everywhere
    t = torch.sigmoid(1.5 * t - 1.5).clamp(max=0.95)  # mostly near noise, where the text decides
    noise = torch.randn(x.shape, generator=generator).to(x)
    share = t.view(-1, *[1] * (x.ndim - 1))
    return F.mse_loss(model(share * x + (1 - share) * noise, t, text), x - noise)


def guided_velocity(model: Callable, x: Tensor, t: Tensor, text: Tensor, guidance: float) -> Tensor:
    """v(0) + guidance (v(text) - v(0)) at x (B, ...), t (B,); 0: no text (Ho and Salimans 2022)."""
    both = torch.cat([text, torch.zeros_like(text)])
    with_text, without = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    return without + guidance * (with_text - without)


def sample_latents(model, text: Tensor, shape, steps: int, guidance: float, generator) -> Tensor:
    """Latents (B, *shape): Euler's method from noise, t = 0, to t = 1, by steps that grow."""
    x = torch.randn(len(text), *shape, generator=generator).to(text.device)
    for step in range(steps):
        t, after = (step / steps) ** 2, ((step + 1) / steps) ** 2
        times = torch.full((len(x),), t, device=x.device)
        x = x + (after - t) * guided_velocity(model, x, times, text, guidance)
    return x


# ----- The captioner ------------------------------------------------------------------------------

LENGTH, STATES = 56, 8  # tokens of a text, where it is cut, and states that stand for it later


class MultiHead(nn.Module):
    """Attention with several heads, of x to itself or to a memory."""

    def __init__(self, D: int, heads: int = 4):
        super().__init__()
        self.heads, self.out = heads, nn.Linear(D, D)
        self.q, self.kv = nn.Linear(D, D), nn.Linear(D, 2 * D)

    def forward(self, x, memory=None, mask=None, causal=False, cache=None) -> Tensor:
        """x (B, L, D), memory (B, S, D), x itself if None, mask (B, 1, 1, S), False at padding."""
        B, L, D = x.shape  # batch, length, width
        size, cache = D // self.heads, {} if cache is None else cache
        q = self.q(x).view(B, L, self.heads, size).transpose(1, 2)  # (B, heads, L, size)
        if memory is None or self not in cache:
            kv = self.kv(x if memory is None else memory).view(B, -1, 2, self.heads, size)
            kv = kv.permute(2, 0, 3, 1, 4)  # keys and values: (2, B, heads, S, size)
            # x's are added to those of earlier tokens; a memory's are computed once.
            cache[self] = torch.cat([cache[self], kv], dim=3) if self in cache else kv
        causal = causal and L > 1  # a single token may see all that is in the cache
        y = F.scaled_dot_product_attention(q, *cache[self], attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(B, L, D))


class Layer(nn.Module):
    """Pre-norm transformer layer: attention, with `cross` also to a memory, and an MLP."""

    def __init__(self, D: int, cross: bool = False):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(3 if cross else 2))
        self.attend, self.cross = MultiHead(D), MultiHead(D) if cross else None
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU("tanh"), nn.Linear(4 * D, D))

    def forward(self, x, memory=None, mask=None, causal=False, cache=None) -> Tensor:
        """x (B, L, D) -> (B, L, D); memory, and the mask of it, as in `MultiHead`."""
        x = x + self.attend(self.norms[0](x), causal=causal, cache=cache)
        if self.cross is not None:
            x = x + self.cross(self.norms[2](x), memory, mask, cache=cache)
        return x + self.mlp(self.norms[1](x))


class TextDecoder(nn.Module):
    """A causal language model: its lower half sees text, its upper half a memory too (CoCa)."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__()
        D = config.width
        self.embed = nn.Embedding(tokenizer.size, D)
        self.place = nn.Parameter(0.02 * torch.randn(LENGTH, D))
        nn.init.normal_(self.embed.weight, std=0.02)
        self.lower = nn.ModuleList([Layer(D), Layer(D)])
        self.upper = nn.ModuleList([Layer(D, cross=True), Layer(D, cross=True)])
        self.enter, self.norm = nn.LayerNorm(D), nn.LayerNorm(D)

    def read(self, tokens: Tensor, cache: dict | None = None, first: int = 0) -> Tensor:
        """The lower half: tokens (B, T), at positions from `first` on -> states (B, T, D)."""
        x = self.enter(self.embed(tokens) + self.place[first : first + tokens.shape[1]])
        for layer in self.lower:
            x = layer(x, causal=True, cache=cache)
        return x

    def write(self, states: Tensor, memory: Tensor, cache: dict | None = None) -> Tensor:
        """The upper half: states (B, T, D), memory (B, N, D) -> logits (B, T, V)."""
        for layer in self.upper:
            states = layer(states, memory, causal=True, cache=cache)
        return F.linear(self.norm(states), self.embed.weight)

    def generate(self, memory: Tensor) -> Tensor:
        """The likeliest tokens, one by one: (B, T), begin first; after a row's end is padding."""
        tokens = torch.full((len(memory), 1), Tokenizer.begin, device=memory.device)
        ended, cache = torch.zeros_like(tokens, dtype=torch.bool), {}
        while tokens.shape[1] < LENGTH and not ended.all():
            states = self.read(tokens[:, -1:], cache, tokens.shape[1] - 1)
            token = self.write(states, memory, cache).argmax(-1)  # (B, 1)
            tokens = torch.cat([tokens, token.masked_fill(ended, Tokenizer.pad)], dim=1)
            ended |= token == Tokenizer.end
        return tokens


class CoCa(nn.Module):
    """A captioner and CLIP in one (Yu et al. 2022): an image encoder and a `TextDecoder`."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__()
        D, stem = config.width, []
        for before, after in itertools.pairwise((3, D // 4, D // 2, D)):  # each halves the side
            stem += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(4, after), nn.GELU()]
        self.tokenizer, self.stem = tokenizer, nn.Sequential(*stem[:-1])
        self.place = nn.Parameter(0.5 * torch.randn((config.size // 8) ** 2, D))
        self.encoder = nn.ModuleList(Layer(D) for _ in range(2))
        self.norm, self.decoder = nn.LayerNorm(D), TextDecoder(config, tokenizer)
        self.of_image, self.of_text = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, H, W, 3) uint8 -> memory (B, N, D), a row a patch, and embedding (B, E)."""
        x = images.permute(0, 3, 1, 2).to(self.place.dtype) / 127.5 - 1
        x = self.stem(x).flatten(2).mT + self.place  # (B, N, D)
        for layer in self.encoder:
            x = layer(x)
        memory = self.norm(x)  # of all patches: a few pooled queries would lose the shapes
        return memory, self.of_image(memory.mean(1))

    def embed_text(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Embedding (B, E): of the lower half's state of the end token, which has seen all."""
        ends = (tokens == Tokenizer.end).int().argmax(1)
        return self.of_text(states[torch.arange(len(tokens)), ends])

    def caption(self, images: Tensor) -> list[str]:
        """A caption of each of the images (N, H, W, 3) uint8."""
        texts = []
        for part in images.split(500):
            memory, _ = self.look(part.to(self.place.device))
            texts += self.tokenizer.decode(self.decoder.generate(memory))
        return texts


# ----- The experiment -----------------------------------------------------------------------------


def run_all(config: Config) -> None:
    """The report's experiment; writes the stages, result.json and samples.png to config.out."""
    began = time.perf_counter()
    data = draw_pictures(config, "data", config.scenes, config.clean)
    held_out = draw_pictures(config, "held out", config.prompts, config.prompts, data.scenes)
    clean = draw_pictures(config, "judge", config.scenes, config.scenes)

    captioners = train_captioners(config, data)
    captions = {"ground_truth": list(data.captions["ground_truth"].values())}
    for style in ("short", "descriptive"):
        recaption = functools.partial(captioners[style].caption, data.images)
        captions[style] = stage(config, f"captions_{style}", recaption)

    text_model, latents = train_text_model(config, captioners["descriptive"]), Latents(data.images)
    x, painters = latents.encode(data.images), {}
    for arm in config.arms.split(","):
        painters[arm] = train_painter(config, arm, captions, text_model, x)

    new = functools.partial(CoCa, config, text_model.tokenizer)
    judge = train_coca(config, "judge", new, clean, "descriptive", config.judge_steps)
    result = {"captioners": {}, "models": {arm: {} for arm in ("real images", *painters)}}
    for name, captioner in captioners.items():
        result["captioners"][name] = agreement(captioner.caption(held_out.images), held_out.scenes)
    drawn = {"real images": held_out.images}
    for style in ("ground_truth", "descriptive"):
        prompts = list(held_out.captions[style].values())
        for arm, painter in painters.items():
            text, noise = text_model.encode(prompts), generator(config, "noise")
            y = sample_latents(painter, text, x.shape[1:], 10, config.guidance, noise)
            drawn[arm] = latents.decode(y)
        for arm, images in drawn.items():
            result["models"][arm][style] = score_images(judge, images, prompts)
    result["wall_seconds"] = round(time.perf_counter() - began, 1)
    finish(config, result, drawn, prompts)


def train_captioners(config: Config, data: Pictures) -> dict[str, CoCa]:
    """The base, and the fine-tunes that data has texts for, each from the base."""
    tokenizer = Tokenizer(text for texts in data.captions.values() for text in texts.values())
    new = functools.partial(CoCa, config, tokenizer)
    base = train_coca(config, "base", new, data, "ground_truth", config.base_steps)
    captioners, new = {"base": base}, functools.partial(copy.deepcopy, base)
    for style, steps in ("short", config.tune_steps // 2), ("descriptive", config.tune_steps):
        if data.captions[style]:
            captioners[style] = train_coca(config, style, new, data, style, steps)
    return captioners


def train_coca(config, name, make_model, data: Pictures, style: str, steps: int) -> CoCa:
    """The stage OUT/name.pt: the base, a fine-tune or the judge, of data's captions in a style."""
    texts, fine_tune = data.captions[style], name in ("short", "descriptive")
    indices = torch.tensor(sorted(texts))
    batch, lr = (config.batch, 2e-3) if fine_tune else (2 * config.batch, 5e-4)

    def loss_of(model: CoCa, numbers: torch.Generator) -> Tensor:
        rows = indices[torch.randint(len(indices), (batch,), generator=numbers)]
        tokens = model.tokenizer.batch([texts[i] for i in rows.tolist()]).to(config.device)
        memory, image = model.look(data.images[rows].to(config.device))
        states = model.decoder.read(tokens)
        scale = model.log_scale.exp().clamp(max=100)
        contrastive = clip_loss(image, model.embed_text(states, tokens), scale)
        if name == "judge":
            return contrastive
        caption = caption_loss(model.decoder.write(states, memory), tokens, Tokenizer.pad)
        return caption if fine_tune else contrastive + 2 * caption  # CoCa's weights

    return train(config, name, make_model, loss_of, steps, lr)


def generator(config: Config, *purpose: str) -> torch.Generator:
    """Random numbers of its own for each purpose."""
    digest = hashlib.sha256(repr((config.seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def stage(config: Config, name: str, make: Callable[[], object]):
    """What OUT/name.pt holds, or else make() makes; ValueError if a setting has changed."""
    path, settings = Path(config.out) / f"{name}.pt", dataclasses.asdict(config)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"settings": settings, "made": make()}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)  # never half of one
    saved = torch.load(path, "cpu", weights_only=True)
    for key in settings.keys() - FREE:
        if saved["settings"][key] != settings[key]:
            raise ValueError(f"{path}: {key} was {saved['settings'][key]!r}: change --out")
    return saved["made"]


def train(config, name, make_model, loss_of, steps, lr, ema=0.0, draws="") -> nn.Module:
    """The stage OUT/name.pt: AdamW on loss_of(model, generator); returns the average, frozen."""
    draws = draws or name  # stages with the same draws start alike and see the same random numbers
    torch.manual_seed(generator(config, "initialise", draws).initial_seed())
    model = make_model().to(config.device).requires_grad_()

    def make() -> dict:
        numbers, average = generator(config, "train", draws), copy.deepcopy(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), fused=True)
        began = time.perf_counter()
        for step in range(1, steps + 1):
            fall = 0.51 + 0.49 * math.cos(math.pi * (step - 1) / steps)
            optimizer.param_groups[0]["lr"] = lr * min(step / (0.05 * steps + 1), fall)
            loss = loss_of(model, numbers)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(loss.item() + norm.item()):
                raise FloatingPointError(f"{name} diverged at step {step}: loss {loss.item()}")
            optimizer.step()
            decay = min(ema, step / (10 + step))
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.data.lerp_(parameter.data, 1 - decay)
            if step % max(1, steps // 8) == 0 or step == steps:
                minutes = (time.perf_counter() - began) / step * (steps - step) / 60
                text = f"{name} {step}/{steps} · loss {loss:.4f} · {minutes:.1f} minutes left"
                print(text, flush=True)
        words = model.tokenizer.words if isinstance(model, CoCa) else None
        return {"state": average.state_dict(), "words": words}

    model.load_state_dict(stage(config, name, make)["state"])
    return model.requires_grad_(False)


# ----- The text-to-image model --------------------------------------------------------------------


class TextModel(nn.Module):
    """A text as a few states, from which it can be retold: encoder and decoder, as T5 is."""

    def __init__(self, config: Config, captioner: CoCa):
        super().__init__()
        self.tokenizer, D = captioner.tokenizer, config.width
        self.decoder = copy.deepcopy(captioner.decoder)
        self.encoder = copy.deepcopy(captioner.decoder)  # its lower half is used
        self.queries = nn.Parameter(torch.randn(STATES, D))
        self.ask, self.norm = Layer(D, cross=True), nn.LayerNorm(D)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """States (B, STATES, D) of texts: what queries find in them."""
        tokens = self.tokenizer.batch(texts).to(self.queries.device)  # (B, T)
        mask = (tokens != Tokenizer.pad)[:, None, None]
        queries = self.queries.expand(len(texts), -1, -1)
        return self.norm(self.ask(queries, self.encoder.read(tokens), mask))

    def encode(self, texts: Sequence[str]) -> Tensor:
        """States (N, STATES, D) of any number of texts."""
        return torch.cat([self(texts[i : i + 256]) for i in range(0, len(texts), 256)])


def train_text_model(config: Config, captioner: CoCa) -> TextModel:
    """The stage OUT/text_model.pt: it learns to retell captions, of new scenes, descriptively."""
    rng = random.Random(f"{config.seed} text model")
    styles = ("descriptive", "descriptive", "ground_truth", "brief", "short")

    def loss_of(model: TextModel, _) -> Tensor:
        scenes = [draw_scene(rng) for _ in range(config.batch)]
        states = model([describe(scene, rng.choice(styles), rng) for scene in scenes])
        retold = [describe(scene, "descriptive", rng) for scene in scenes]
        tokens = model.tokenizer.batch(retold).to(states.device)
        logits = model.decoder.write(model.decoder.read(tokens), states)
        return caption_loss(logits, tokens, Tokenizer.pad)

    new = functools.partial(TextModel, config, captioner)
    return train(config, "text_model", new, loss_of, config.text_steps, 2e-3, ema=0.98)


class Latents:
    """Principal components of patches, in place of an autoencoder: images to latents and back."""

    def __init__(self, images: Tensor, K: int = 48):
        self.mean, self.basis, self.scale = 0.0, torch.eye(3 * 8 * 8), 1.0  # of patches of 8 x 8
        x = self.encode(images).flatten(0, 1)  # as yet the patches themselves
        self.mean = x.mean(0)
        variance, basis = torch.linalg.eigh((x - self.mean).T @ (x - self.mean) / len(x))
        variance, self.basis = variance.flip(0)[:K], basis.flip(1)[:, :K]  # the largest first
        scale = variance.clamp(min=1e-9) ** 0.3  # by ** 0.5 all would have variance 1
        self.scale = scale * (variance / scale**2).mean().sqrt()  # latents have mean square 1

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8 to latents (B, N, K)."""
        x = F.pixel_unshuffle(images.permute(0, 3, 1, 2) / 127.5 - 1, 8).flatten(2).mT
        return (x - self.mean) @ self.basis / self.scale

    def decode(self, x: Tensor) -> Tensor:
        """Latents to images."""
        x = ((x.cpu() * self.scale) @ self.basis.T + self.mean).mT  # (B, 3 * 8 * 8, N)
        x = F.pixel_shuffle(x.unflatten(2, (math.isqrt(x.shape[2]), -1)), 8)
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


class Painter(nn.Module):
    """The velocity of latents: a transformer that attends to the states of a text."""

    def __init__(self, config: Config, N: int, K: int):
        super().__init__()
        D = config.width
        self.enter, self.place = nn.Linear(K, D), nn.Parameter(0.5 * torch.randn(N, D))
        self.text, self.slot = nn.Linear(D, D), nn.Parameter(0.5 * torch.randn(STATES, D))
        self.time = nn.Sequential(nn.Linear(1, D), nn.SiLU(), nn.Linear(D, D))
        self.layers = nn.ModuleList(Layer(D, cross=True) for _ in range(6))
        self.norm, self.last = nn.LayerNorm(D), nn.Linear(D, K)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """x (B, N, K), t (B,) from noise, 0, to image, 1, text (B, STATES, D) -> like x."""
        y = self.enter(x) + self.place + self.time(t[:, None])[:, None]  # (B, N, D)
        for layer in self.layers:
            y = layer(y, self.text(text) + self.slot)
        image = self.last(self.norm(y))  # the velocity leads there in the time that is left
        return (image - x) / (1 - t)[:, None, None]


def train_painter(config, arm, captions, text_model, latents) -> Painter:
    """The stage OUT/painter_ARM.pt; arms have the same initialisation, images, times and noise."""
    style, _, percent = arm.partition(":")
    synthetic, ground_truth = captions[style], captions["ground_truth"]
    texts = sorted({*synthetic, *ground_truth})
    states = dict(zip(texts, text_model.encode(texts), strict=True))

    def loss_of(model: Painter, numbers: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (config.batch,), generator=numbers).tolist()
        pairs = [synthetic[i] for i in rows], [ground_truth[i] for i in rows]
        blend = blend_captions(*pairs, int(percent or 0) / 100, numbers)
        text = torch.stack([states[caption] for caption in blend])  # (B, STATES, D)
        dropped = torch.rand(len(rows), 1, 1, generator=numbers) < 0.1  # for guidance
        text = text.masked_fill(dropped.to(text.device), 0.0)
        return rectified_flow_loss(model, latents[rows].to(text.device), text, numbers)

    new = functools.partial(Painter, config, *latents.shape[1:])
    name = f"painter_{arm}".replace(":", "_")
    return train(config, name, new, loss_of, config.paint_steps, 2e-3, ema=0.995, draws="painter")


# ----- The judges ---------------------------------------------------------------------------------


def score_images(judge: CoCa, images: Tensor, texts: Sequence[str]) -> dict[str, float]:
    """Mean CLIP score, and the shares of what the texts say that the images show."""
    tokens = judge.tokenizer.batch(texts).to(judge.place.device)
    _, image = judge.look(images.to(judge.place.device))
    score = clip_score(image, judge.embed_text(judge.decoder.read(tokens), tokens))
    return {"clip_score": score.mean().item()} | agreement(texts, classify(images))


def classify(images: Tensor) -> list[Scene]:
    """The scenes whose renderings are nearest, in squared error, to images (B, H, W, 3) uint8."""
    half, names = images.shape[1] // 2, ("shape", "colour", "size", "texture")
    options = [None, *itertools.starmap(Thing, itertools.product(*(VALUES[n] for n in names)))]
    drawn = [[render_quarter(option, b, half) for option in options] for b in BACKGROUNDS]
    drawn = torch.from_numpy(np.array(drawn)).flatten(2).float()  # (backgrounds, options, pixels)
    quarters = images.unflatten(2, (2, half)).unflatten(1, (2, half)).transpose(2, 3)
    quarters = quarters.flatten(3).reshape(-1, drawn.shape[2]).float()  # (B * 4, pixels)
    errors, best = torch.cdist(quarters, drawn).square().min(-1)  # (backgrounds, B * 4)
    scenes = []
    for i, ground in enumerate(errors.unflatten(1, (-1, 4)).sum(-1).argmin(0).tolist()):
        found = zip(best[ground, 4 * i : 4 * i + 4].tolist(), VALUES["place"], strict=True)
        things = [options[k]._replace(place=place) for k, place in found if k > 0]
        scenes.append(Scene(tuple(things), VALUES["background"][ground]))
    return scenes


def agreement(texts: Iterable[str], scenes: Iterable[Scene]) -> dict[str, float | None]:
    """By attribute, the share of what texts say that is so in scenes; None if nothing is said."""
    rows = []  # an attribute, what was said, and what is so
    for text, scene in zip(texts, scenes, strict=True):
        said = parse_caption(text)
        rows.append(("count", len(said.things), len(scene.things)))
        rows.append(("background", said.background, scene.background))
        ours = said.things[:4]  # more are of a caption gone astray
        best, agreed = (), -1  # objects are matched so that most agrees
        for order in itertools.permutations([*scene.things, *[Thing()] * len(ours)], len(ours)):
            values = zip(sum(ours, ()), sum(order, ()), strict=True)
            same = sum(a == b is not None for a, b in values)
            if same > agreed:
                best, agreed = order, same
        for thing, true in zip(ours, best, strict=True):
            rows += zip(Thing._fields, thing, true, strict=True)
            if thing.colour and thing.shape:  # both of one object
                rows.append(("binding", thing[:2], true[:2]))
    report = {}
    for name in ("binding", "count", *VALUES):
        right = [a == b for key, a, b in rows if key == name and a is not None]
        report[name] = sum(right) / len(right) if right else None
    return report


def finish(config: Config, result: dict, drawn: dict[str, Tensor], prompts: list[str]) -> None:
    """Write OUT/result.json, print its scores and draw OUT/samples.png."""
    result |= {
        "config": dataclasses.asdict(config), "argv": sys.argv, "seed": config.seed,
        "device": f"{config.device}, {torch.get_num_threads()} threads",
        "python": sys.version, "torch": torch.__version__,
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }  # fmt: skip
    Path(config.out, "result.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    tables = {"captioner": result["captioners"]} | result["models"]
    for model, rows in tables.items():
        for name, row in rows.items():
            cells = [f"{key} {value:.2f}" for key, value in row.items() if value is not None]
            print(f"{model:14} {name:12} " + " · ".join(cells))
    print(f"{config.out}/result.json after {result['wall_seconds']:.0f} s")
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no picture: matplotlib is not installed; pip install matplotlib")
    # What the models draw for the first eight prompts, a column each, beside the real images.
    columns = [F.pad(x[:8], (0, 0, 1, 1, 1, 1)).flatten(0, 1) for x in drawn.values()]
    side, names = columns[0].shape[1], [textwrap.fill(prompt, 60) for prompt in prompts[:8]]
    figure, axes = plt.subplots(figsize=(len(drawn), 8))
    axes.imshow(torch.cat(columns, dim=1).numpy())
    axes.set_xticks([side * (i + 0.5) for i in range(len(drawn))], drawn, fontsize=6)
    axes.set_yticks([side * (i + 0.5) for i in range(len(names))], names, fontsize=8)
    figure.savefig(Path(config.out, "samples.png"), dpi=140, bbox_inches="tight")
    plt.close(figure)


# ----- Scenes, their pictures, and what is said of them -------------------------------------------

COLOURS = {  # of objects; no background has the same name, so that a word says which is meant
    "red": (220, 40, 40), "green": (40, 170, 70), "blue": (50, 90, 220),
    "yellow": (240, 210, 50), "purple": (150, 60, 190), "orange": (245, 140, 30),
}  # fmt: skip
BACKGROUNDS = dict(white=(250,) * 3, black=(20, 20, 25), grey=(140, 140, 145), pink=(250, 190, 205))
VALUES = {
    "shape": ("circle", "square", "triangle", "cross"),
    "colour": tuple(COLOURS),
    "size": ("large", "small"),
    "texture": ("plain", "striped"),
    "place": ("top left", "top right", "bottom left", "bottom right"),
    "background": tuple(BACKGROUNDS),
}
ATTRIBUTE_OF = {value: name for name, values in VALUES.items() for value in values}
WORDS = re.compile(r"\b(" + "|".join(ATTRIBUTE_OF) + r")s?\b|\band\b|[,.;:]|$")
# None is what is not said; a scene has one to three things, each in a quarter of its own.
Thing = namedtuple("Thing", "shape colour size texture place", defaults=[None] * 5)
Scene = namedtuple("Scene", "things background", defaults=[(), None])
# Images (N, H, W, 3) uint8; texts by style, then by the index of the image; scenes, if drawn.
Pictures = namedtuple("Pictures", "images captions scenes")


def draw_scene(rng: random.Random) -> Scene:
    """A scene of one to three things, all values as likely."""
    things = []
    for place in sorted(rng.sample(range(4), rng.randint(1, 3))):
        values = [rng.choice(VALUES[name]) for name in ("shape", "colour", "size", "texture")]
        things.append(Thing(*values, VALUES["place"][place]))
    return Scene(tuple(things), rng.choice(VALUES["background"]))


@functools.cache
def render_quarter(thing: Thing | None, background: str, side: int) -> np.ndarray:
    """A thing, or none, on a background (side, side, 3) uint8; a pixel is the mean of 16 points."""
    fine = 4 * side
    v, u = np.mgrid[:fine, :fine] * (16 / fine) + 8 / fine - 8  # from -8 to 8, down and right
    image = np.broadcast_to(np.array(BACKGROUNDS[background], float), (fine, fine, 3)).copy()
    if thing is not None:
        r = 7 if thing.size == "large" else 4.5
        inside = {
            "circle": u * u + v * v < r * r,
            "square": np.maximum(abs(u), abs(v)) < 0.88 * r,
            "triangle": (v < 0.85 * r) & (v > 2 * abs(u) - r),
            "cross": (np.minimum(abs(u), abs(v)) < 0.32 * r) & (np.maximum(abs(u), abs(v)) < r),
        }[thing.shape]
        shade = np.where((thing.texture == "striped") & (v % 4 < 2), 0.35, 1.0)
        image[inside] = (shade[..., None] * COLOURS[thing.colour])[inside]
    return image.reshape(side, 4, side, 4, 3).mean((1, 3)).round().astype(np.uint8)


def render(scene: Scene, size: int = 32) -> np.ndarray:
    """The picture (size, size, 3) uint8 of a scene that says everything."""
    there = {thing.place: thing._replace(place=None) for thing in scene.things}
    quarters = [render_quarter(there.get(p), scene.background, size // 2) for p in VALUES["place"]]
    return np.vstack([np.hstack(quarters[:2]), np.hstack(quarters[2:])])


def phrase(thing: Thing) -> str:
    """`a large striped red circle in the top left`, without what the thing leaves open."""
    words = filter(None, ("a", thing.size, thing.texture, thing.colour, thing.shape))
    text = " ".join(words).replace("a orange", "an orange")
    return f"{text} in the {thing.place}" if thing.place else text


def describe(scene: Scene, style: str, rng: random.Random) -> str:
    """A caption in one of four styles: descriptive, short, brief, or ground_truth: alt-text."""
    things, ground = list(scene.things), scene.background
    if style == "descriptive":  # all that the scene holds
        phrases = [phrase(thing) for thing in things]
        count = ("one object", "two objects", "three objects")[len(things) - 1]
        wordings = (
            f"{' and '.join(phrases)}, on a {ground} background.",
            f"on a {ground} background, there is {', '.join(phrases)}.",
            f"the background is {ground}. there is {'; there is '.join(phrases)}.",
            f"a picture of {count} on a {ground} background: {'; '.join(phrases)}.",
        )
        return rng.choice(wordings)
    if style in ("short", "brief"):  # colour and shape, of the first of the largest or of all
        main = min(things, key=lambda thing: thing.size != "large")
        said = things if style == "brief" else [main]
        return " and ".join(phrase(Thing(t.shape, t.colour)) for t in said) + "."
    kind = rng.randrange(10)  # alt-text is noisy
    if kind <= 1:  # of none of the objects
        count = f"{len(things)} Shapes on {ground.title()} | Stock Art"
        return rng.choice(("IMG_0417.jpg", "Free Wallpaper Download", count, count))
    if kind <= 4:  # of one, not always the main one
        thing = rng.choice(things)._replace(texture=None, place=None)
        text = phrase(rng.choice((thing, thing._replace(size=None)))).title()
        return text + rng.choice(("", " - Buy Online", " clipart", "!"))
    others = things[1:] + things[:1] if kind <= 6 else things  # the colours are handed round
    texts = [f"{b.colour} {a.shape}" for a, b in zip(things, others, strict=True)]
    return rng.choice((" and ", ", ")).join(texts) + rng.choice(("", f", {ground}"))


def parse_caption(text: str) -> Scene:
    """What a text says, in whatever words: of `describe(scene, "descriptive")` the scene itself."""
    things, background, now = [], None, {}
    for match in WORDS.finditer(text.lower()):
        attribute = ATTRIBUTE_OF.get(match[1])
        if attribute == "background":
            background = background or match[1]
        elif attribute is None or attribute in now:  # a stop, or a second shape: the next thing
            if "shape" in now or "colour" in now:
                things.append(Thing(**now))
            now = {}
        if attribute not in (None, "background"):
            now[attribute] = match[1]
    things.sort(key=lambda thing: VALUES["place"].index(thing.place) if thing.place else 4)
    return Scene(tuple(things), background)


def draw_pictures(config: Config, purpose: str, count: int, clean: int, unlike=()) -> Pictures:
    """Scenes unlike those given, with alt-text; the first `clean` of them with clean captions."""
    rng, scenes, others = random.Random(f"{config.seed} {purpose}"), [], set(unlike)
    while len(scenes) < count:
        scene = draw_scene(rng)
        if scene not in others:
            scenes.append(scene)
    captions = {}
    for style, number in ("ground_truth", count), ("short", clean), ("descriptive", clean):
        captions[style] = {i: describe(scenes[i], style, rng) for i in range(number)}
    images = np.stack([render(scene, config.size) for scene in scenes])
    return Pictures(torch.from_numpy(images), captions, scenes)


class Tokenizer:
    """Words, each with the space before it, to ids and back; a word not learned is `unknown`."""

    pad, begin, end, unknown = range(4)  # then the words
    split = re.compile(r" ?\w+| ?[^\w\s]|\s").findall

    def __init__(self, texts: Iterable[str]):
        words = set().union(*map(Tokenizer.split, texts))
        self.words = ["", "", "", "", *sorted(words)]
        self.size, self.ids = len(self.words), {word: i for i, word in enumerate(self.words)}

    def batch(self, texts: Sequence[str]) -> Tensor:
        """Tokens (B, T) of texts, with begin and end, cut to the length, padded to the longest."""
        rows = []
        for text in texts:
            ids = [self.ids.get(word, self.unknown) for word in Tokenizer.split(text)]
            rows.append(torch.tensor([self.begin, *ids[: LENGTH - 2], self.end]))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def decode(self, tokens: Tensor) -> list[str]:
        """Texts of tokens (B, T); the first four tokens are no words."""
        return ["".join(self.words[i] for i in row).strip() for row in tokens.tolist()]


# ----- Appendix: your own images and prompts ------------------------------------------------------


def read_image(path: Path, size: int) -> np.ndarray:
    """The middle square of a file's first frame, upright and on white: (size, size, 3) uint8."""
    from PIL import Image, ImageOps  # .jpg, .png, .webp, .avif, .gif, .bmp, ...: all that it reads

    with Image.open(path) as image:
        if image.mode[0] in "IF":  # Pillow would make all of it white
            raise ValueError(f"{path}: mode {image.mode} must be one of 8 bits a channel")
        image = ImageOps.exif_transpose(image).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.array(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


def train_own(config: Config) -> None:
    """The job `captioner`: a row of --data's captions.jsonl has file, caption, perhaps more."""
    folder, images = Path(config.data), []
    captions = {"ground_truth": {}, "short": {}, "descriptive": {}}
    text = (folder / "captions.jsonl").read_text("utf-8-sig")
    for i, row in enumerate(map(json.loads, text.strip().split("\n"))):
        images.append(read_image(folder / row["file"], config.size))
        row["ground_truth"] = row["caption"]
        for style in captions.keys() & row.keys():
            captions[style][i] = row[style]
    digest = hashlib.sha256(text.encode()).hexdigest()  # no stage of other captions is loaded
    config = dataclasses.replace(config, data=f"{config.data} {digest}")
    train_captioners(config, Pictures(torch.from_numpy(np.stack(images)), captions, []))


def caption_folder(config: Config) -> None:
    """The job `caption`: a row of file and caption for each image in a folder and those in it."""
    folder, out, done, left_out = Path(config.images), Path(config.out), set(), 0
    saved = torch.load(config.checkpoint, "cpu", weights_only=True)
    then = Config(**saved["settings"])
    captioner = CoCa(then, Tokenizer(saved["made"]["words"])).to(config.device)
    captioner.requires_grad_(False).load_state_dict(saved["made"]["state"])
    if config.resume and out.exists():
        done = {json.loads(line)["file"] for line in out.read_text("utf-8").splitlines()}
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    with out.open("a" if config.resume else "x", buffering=1, encoding="utf-8") as file:
        for name in [name for name in files if name not in done]:
            try:
                image = torch.from_numpy(read_image(files[name], then.size))
            except (OSError, ValueError, SyntaxError) as error:  # the kinds that formats have
                left_out += 1
                print(f"{name} is left out: {error}")
                continue
            (caption,) = captioner.caption(image[None])
            file.write(json.dumps({"file": name, "caption": caption}) + "\n")
    print(f"{out}: {len(files) - left_out} captions; {left_out} files are left out")


RULES = """Write prompts for a program that paints pictures: one paragraph of 15 to 80 words. Keep
what the user said; add surroundings, background, light, style. Asked for a change, change that."""
TOWER = "A white lighthouse with a red lantern stands on a black cliff above a choppy sea at {}."
EXAMPLES = {  # expand; change one thing and keep the rest; a new subject
    "New subject: a lighthouse": TOWER.format("dusk"),
    "Make it noon.": TOWER.format("noon"),
    "New subject: cats": "Two cats lie on a red sofa in lamplight, one of them asleep, one awake.",
}


def upsample(config: Config) -> None:
    """The job `upsample`: print --prompt at length, by the text model or by --chat-url."""
    if not config.chat_url:
        data = draw_pictures(config, "data", config.scenes, config.clean)
        text_model = train_text_model(config, train_captioners(config, data)["descriptive"])
        tokens = text_model.decoder.generate(text_model.encode([config.prompt]))
        return print(*text_model.tokenizer.decode(tokens))
    messages = [{"role": "system", "content": RULES}]
    for user, answer in EXAMPLES.items():
        messages += {"role": "user", "content": user}, {"role": "assistant", "content": answer}
    messages.append({"role": "user", "content": f"New subject: {config.prompt}"})
    body = json.dumps({"model": config.chat_model, "messages": messages})
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key.isprintable():
        raise ValueError("OPENAI_API_KEY must be one line")  # http.client's message would show it
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    url = urllib.parse.urlsplit(config.chat_url)
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    connection = kinds[url.scheme](url.netloc, timeout=60)  # it follows no redirect
    connection.request("POST", f"{url.path.rstrip('/')}/chat/completions", body, headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise ValueError(f"{config.chat_url} answers {answer.status} {answer.reason}")
    print(json.load(answer)["choices"][0]["message"]["content"].strip())


# ----- Config and main ----------------------------------------------------------------------------


def flag(default, text: str):
    """A field of `Config`, which is a flag with this default and help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    data: str = flag("", "captioner: folder of your images and captions.jsonl (54 words a text)")
    images: str = flag("", "caption: folder of images")
    checkpoint: str = flag("out/recaption/descriptive.pt", "caption: the captioner")
    prompt: str = flag("a red circle and a blue square.", "upsample: the prompt")
    scenes: int = flag(6000, "training images that are drawn")
    clean: int = flag(1000, "of these, with clean captions for the two fine-tunes")
    prompts: int = flag(200, "held-out scenes that the models are judged on")
    size: int = flag(32, "height and width of an image in pixels, a multiple of 8")
    width: int = flag(128, "of every model")
    batch: int = flag(32, "images a step; twice as many for the base captioner and the judge")
    base_steps: int = flag(700, "steps of the base captioner")
    tune_steps: int = flag(400, "steps of its descriptive fine-tune; of the short one half as many")
    text_steps: int = flag(500, "steps of the text model")
    paint_steps: int = flag(1800, "steps of each text-to-image model; report: 500,000")
    judge_steps: int = flag(300, "steps of the scoring CLIP")
    arms: str = flag("ground_truth,descriptive:95", "ground_truth, short:%% or descriptive:%%")
    guidance: float = flag(1.5, "classifier-free guidance; 1: none")
    chat_url: str = flag("", "upsample: an OpenAI-compatible endpoint; key: OPENAI_API_KEY")
    chat_model: str = flag("", "upsample: the model's name there")
    seed: int = flag(0, "seed of data, initialisation and draws")
    device: str = flag("auto", "auto (cuda, mps or cpu, the first there is) or a torch device")
    out: str = flag("out/recaption", "folder of stages and result; caption: a .jsonl file")
    resume: bool = flag(False, "caption: go on in that file; finished stages are always kept")
    smoke: bool = flag(False, "tiny models for a few steps, written to OUT/smoke: does it run?")

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) is int and value < 1 and name != "seed":
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
        for arm in self.arms.split(","):
            if not re.fullmatch(r"ground_truth|(short|descriptive):(\d\d?|100)", arm):
                raise ValueError(f"--arms {arm} must be ground_truth, short:% or descriptive:%")
        if self.device == "auto":
            accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
            object.__setattr__(self, "device", str(accelerator))


FREE = {"images", "checkpoint", "prompt", "prompts", "arms", "guidance", "chat_url"}
FREE |= {"chat_model", "device", "out", "resume", "smoke"}  # may differ from a saved stage's
SMOKE = dict(scenes=48, clean=12, prompts=8, width=16, batch=8, base_steps=4, tune_steps=3)
SMOKE |= dict(text_steps=3, paint_steps=4, judge_steps=3)
JOBS = {"all": run_all, "captioner": train_own, "caption": caption_folder, "upsample": upsample}


def main(argv: list[str] | None = None) -> int:
    """Run a job. Returns 0; 1 where numbers are not finite, 2 for bad input, 130 after Ctrl-C."""
    suppress = {"argument_default": argparse.SUPPRESS}  # so that `given` has what was written out
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], **suppress)
    parser.add_argument("job", nargs="?", default="all", choices=JOBS, help="what to do")
    for field in dataclasses.fields(Config):
        options = {"type": type(field.default)}
        if isinstance(field.default, bool):
            options = {"action": "store_true"}
        text = f"{field.metadata['help']}; default: {field.default!r}"
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=text, **options)
    given = vars(parser.parse_args(argv))
    if given.get("smoke"):
        given = SMOKE | given | {"out": f"{given.get('out', Config.out)}/smoke"}
    sys.stdout.reconfigure(errors="replace")  # where it is not UTF-8
    try:
        JOBS[given.pop("job")](Config(**given))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # one line; `python -X dev` shows where it came from
        if sys.flags.dev_mode:
            raise
        text = f"{Path(__file__).name}: {type(error).__name__}: {error}"
        if isinstance(error, ImportError):
            text += "; pip install pillow"  # all else is imported above
        print(" ".join(text.split())[:400], file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
