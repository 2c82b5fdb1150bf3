# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6"]
# ///
"""Better captions: train a captioner, recaption the training images, and see what a text-to-image model makes of it.

Betker et al., "Improving Image Generation with Better Captions" (the DALL-E 3 report), 2023.

    python recaption.py                                        every stage below, on drawn scenes: 17 minutes, two cores
    python recaption.py generate --arms descriptive:65 ...     a stage, with those that it needs; finished ones stay
    python recaption.py captioner --data DIR                   a captioner of your images and their captions.jsonl
    python recaption.py caption --images DIR --checkpoint out/recaption/captioner.pt --out captions.jsonl
    python recaption.py upsample "a red circle" --chat-url URL --chat-model NAME

Stages: data (scenes, noisy alt-text, small clean sets), captioner (CLIP and language-model loss on the noisy pairs,
then two fine-tunes, each from the base), caption (every image, short and descriptive), generate (identical
text-to-image models, each on its own blend of captions), score (by a CLIP and an attribute reader trained apart).

code                 shape                 report
tokens               (B, T)                t_1 .. t_T, begin, pieces of text, end, padding
image, text          (B, E)                CLIP embeddings; image is F(i)
memory               (B, Q, D)             what the decoder's upper half attends to, z and F(i) in one
short, descriptive   one for each image    SSC, DSC: short and descriptive synthetic captions
alt                  one for each image    the ground truth: text found with the image, noisy
latents              (B, C, h, w)          what the latent diffusion model draws, decoded by the autoencoder

Read first `clip_loss`, `caption_loss`, `blend_captions`, `rectified_flow_loss`, then `Pipeline`, a property a stage.

Differences from the report, which discloses no sizes, no decoding and no loss weights
1. Scenes of 32 x 32 pixels with one to three objects stand for the world; alt-text omits, swaps and misses by rule.
2. The loss weights are CoCa's, 2 and 1 (Yu et al. 2022). A text's embedding is its end token's state, where CoCa adds a
   token; the image encoder, pre-trained in the report, is trained with the rest, and has a convolutional stem.
3. The text-to-image model is a rectified flow in an autoencoder's latents; its text encoder, no T5, learns with it.
4. The scoring CLIP is trained here on clean captions, not the public ViT-B/32. A reader of attributes adds what the
   report has people and GPT-4V judge; its own accuracy is printed first.
5. The built-in prompt upsampler is a small model trained on pairs of short and descriptive captions.

Not included: T5, the report's convolutional decoder by consistency distillation, human evaluation, several machines.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import http.client
import importlib
import itertools
import json
import math
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ----- Config ---------------------------------------------------------------------------------------------------------


def flag(default, text: str):
    """A field of `Config`, and a flag with its default and help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; each field is a flag."""

    data: str = flag("", "captioner: folder of your images and captions.jsonl; empty: scenes that the script draws")
    images: str = flag("", "caption: folder of images to caption; empty: the training images")
    checkpoint: str = flag("", "caption: the captioner.pt to use; empty: OUT/captioner.pt")
    skip_bad: bool = flag(False, "caption: name, count and skip files that are no images, in place of stopping")
    scenes: int = flag(6000, "training images that the script draws")
    clean: int = flag(1000, "of these, with a clean short and a clean descriptive caption, for the two fine-tunes")
    prompts: int = flag(200, "held-out scenes that the models are judged on")
    size: int = flag(32, "height and width of an image in pixels, a multiple of 8; your images are cut to a square")
    width: int = flag(128, "of the captioner and of the scoring CLIP")
    layers: int = flag(2, "of their image encoder, of each half of their decoder, and of the text encoder")
    heads: int = flag(4, "attention heads of every model")
    queries: int = flag(16, "of the attention pooling that the decoder attends to; CoCa: 256")
    length: int = flag(56, "most tokens of a caption")
    vocabulary: int = flag(4096, "most pieces of text of the tokenizer, beside the 256 bytes that spell the rest")
    captioner_steps: int = flag(900, "steps of the base captioner")
    tune_steps: int = flag(400, "steps of each of its two fine-tunes")
    batch: int = flag(64, "rows of a step, of every model")
    lr: float = flag(4e-4, "peak learning rate of base captioner, scoring CLIP and upsampler")
    tune_lr: float = flag(1e-3, "peak learning rate of the fine-tunes")
    caption_weight: float = flag(2.0, "of the language-model loss, as in CoCa")
    contrastive_weight: float = flag(1.0, "of the CLIP loss, as in CoCa")
    temperature: float = flag(0.0, "of the captions' draws; 0: the likeliest token each time")
    top_p: float = flag(1.0, "draws are from the likeliest tokens that make up this probability")
    channels: int = flag(8, "of the autoencoder's latents")
    encoder_steps: int = flag(1200, "steps of the autoencoder")
    encoder_lr: float = flag(3e-3, "its peak learning rate")
    paint_width: int = flag(128, "of the text-to-image models")
    paint_layers: int = flag(6, "of the text-to-image models")
    paint_lr: float = flag(2e-3, "peak learning rate of text-to-image models and attribute reader")
    paint_steps: int = flag(1500, "steps of each text-to-image model; report: 500,000 of 2,048 images")
    arms: str = flag("ground_truth,descriptive:95", "models, by commas: ground_truth, short:%%, descriptive:%%")
    drop: float = flag(0.1, "share of training captions left empty, for guidance")
    ema: float = flag(0.998, "decay of the weights' average, which is what draws")
    sample_steps: int = flag(20, "Euler steps of a sample")
    guidance: float = flag(3.0, "classifier-free guidance; 1: none")
    judge_steps: int = flag(400, "steps of the scoring CLIP, of the attribute reader and of the prompt upsampler")
    chat_url: str = flag("", "upsample: an OpenAI-compatible endpoint, its key in OPENAI_API_KEY; empty: a small model")
    chat_model: str = flag("", "upsample: the model's name at that endpoint")
    chat_timeout: float = flag(60.0, "upsample: seconds to wait for an answer")
    seed: int = flag(0, "seed of data, initialisation, draws")
    device: str = flag("auto", "auto (cuda, mps or cpu, the first there is) or a torch device")
    out: str = flag("out/recaption", "folder of the stages, result and pictures; caption --images: a .jsonl file")
    resume: bool = flag(False, "go on within an unfinished stage or caption file; finished stages are always kept")
    smoke: bool = flag(False, "tiny models for a few steps, whatever the other flags: does it run?")

    def __post_init__(self):
        zero = ("temperature", "caption_weight", "contrastive_weight", "drop", "ema", "seed", "lr", "tune_lr")
        zero += ("encoder_lr", "paint_lr", "guidance")
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                fits = math.isfinite(value) and (value > 0 or (value == 0 and name in zero))
                rule = "0 or more" if name in zero else "above 0"
                require(fits, f"--{name.replace('_', '-')} {value}: must be {rule} and finite; correct it")
        require(self.top_p <= 1, f"--top-p {self.top_p}: must be at most 1; lower it")
        for name in ("drop", "ema"):
            require(getattr(self, name) < 1, f"--{name} {getattr(self, name)}: must be below 1; lower it")
        require(self.size % 8 == 0, f"--size {self.size}: must be a multiple of 8; change it")
        for name in ("width", "paint_width"):
            value, rule = getattr(self, name), f"must be a multiple of twice the heads, {self.heads}"
            require(value % (2 * self.heads) == 0, f"--{name.replace('_', '-')} {value}: {rule}; change either")
        for name, least in (("length", 3), ("prompts", 2)):
            require(getattr(self, name) >= least, f"--{name} {getattr(self, name)}: must be {least} or more; raise it")
        require(self.clean <= self.scenes, f"--clean {self.clean}: must be at most --scenes {self.scenes}; lower it")
        read_arms(self.arms)


def read_arms(text: str) -> dict[str, tuple[str, float]]:
    """`ground_truth,short:95` -> {"ground_truth": ("ground_truth", 0.0), "short:95": ("short", 0.95)}."""
    found = {}
    for name in (part.strip() for part in text.split(",")):
        style, _, percent = name.partition(":")
        fits = name == "ground_truth" or (style in STYLES[:2] and re.fullmatch(r"\d{1,2}|100", percent))
        require(fits, f"--arms {name!r}: must be ground_truth, short:P or descriptive:P, P of 0 to 100; correct it")
        found[name] = (style, int(percent or 0) / 100)
    return found


STYLES = ("short", "descriptive", "alt")
PROMPTS = ("ground_truth", "descriptive", "brief", "upsampled")  # styles of what a model is asked to draw
SMOKE = {
    "scenes": 48, "clean": 12, "prompts": 8, "width": 16, "layers": 1, "heads": 2, "queries": 2, "length": 48,
    "captioner_steps": 4, "tune_steps": 3, "batch": 8, "channels": 4, "encoder_steps": 3, "paint_width": 16,
    "paint_layers": 1, "paint_steps": 4, "sample_steps": 2, "judge_steps": 4,
}  # fmt: skip
OF_DATA = ("data", "scenes", "clean", "size", "length", "vocabulary", "seed")
OF_CAPTIONER = (
    *OF_DATA, "width", "layers", "heads", "queries", "batch", "lr", "captioner_steps", "tune_steps", "tune_lr",
    "caption_weight", "contrastive_weight",
)  # fmt: skip
OF_LATENTS = (*OF_DATA, "channels", "encoder_steps", "encoder_lr", "batch")
OF_PAINTER = ("paint_width", "paint_layers", "paint_lr", "paint_steps", "drop", "ema", "temperature", "top_p")
NEEDS = {  # the fields that a saved stage depends on; the others may differ
    "data": OF_DATA,
    "captioner": OF_CAPTIONER,
    "captions": (*OF_CAPTIONER, "temperature", "top_p"),
    "autoencoder": OF_LATENTS,
    "painter": (*OF_CAPTIONER, *OF_LATENTS, *OF_PAINTER),
    "judge": (*OF_DATA, "width", "layers", "heads", "batch", "lr", "paint_lr", "judge_steps"),
}


# ----- Shared block: the same text in every script --------------------------------------------------------------------


class UserError(ValueError):
    """Bad input from the user: one line that says the value, the rule and the fix."""


def require(fits: bool, message: str) -> None:
    """Raise UserError with the message unless the input fits."""
    if not fits:
        raise UserError(message)


def add_flags(parser: argparse.ArgumentParser, config_class: type) -> argparse.ArgumentParser:
    """A flag for every field of the config dataclass, with its help and default."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    for field in dataclasses.fields(config_class):
        boolean = isinstance(field.default, bool)
        kind = {"action": argparse.BooleanOptionalAction} if boolean else {"type": type(field.default)}
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=field.default, help=field.metadata["help"], **kind)
    return parser


def pick_device(name: str) -> torch.device:
    """The torch device of that name; auto is cuda, mps or cpu, the first there is."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not to be had here ({str(error).splitlines()[0]}); try auto") from None


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Call write(temporary name), then rename: a crash leaves the old file or the new one, never half of one."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        write(temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save's, of a full disk
        raise OSError(f"{path}: not written, {str(error)[:60]!r}; is the disk full? Make room") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path: Path, value: object) -> None:
    """Write value as indented JSON, atomically."""
    write_atomically(path, lambda name: Path(name).write_text(json.dumps(value, indent=2) + "\n", "utf-8"))


def progress_line(step: int, steps: int, parts: dict[str, str], seconds_a_step: float) -> str:
    """`step 10/400 · loss 3.21 · ... · 4:12 left`: one line, the same in a terminal and in a log."""
    left = round((steps - step) * seconds_a_step)
    return " · ".join([f"step {step:,}/{steps:,}", *map(" ".join, parts.items()), f"{left // 60}:{left % 60:02} left"])


def result_record(config: object, device: torch.device, **rest) -> dict:
    """What a result file says of its run: config, command, seed, versions, device, this script's hash, and `rest`."""
    threads = f"{device.type}, {torch.get_num_threads()} threads"
    record = {"config": dataclasses.asdict(config), "argv": sys.argv, "seed": config.seed}
    record["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    record["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    record["script_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return record | rest


# ----- Data: scenes, their pictures, and what is said of them ---------------------------------------------------------

COLOURS = {  # of objects, and then of backgrounds: no name is in both, so that a word says which is meant
    "red": (220, 40, 40), "green": (40, 170, 70), "blue": (50, 90, 220),
    "yellow": (240, 210, 50), "purple": (150, 60, 190), "orange": (245, 140, 30),
}  # fmt: skip
BACKGROUNDS = {"white": (250, 250, 250), "black": (20, 20, 25), "grey": (140, 140, 145), "pink": (250, 190, 205)}
VALUES = {
    "shape": ("circle", "square", "triangle", "cross"),
    "colour": tuple(COLOURS),
    "size": ("large", "small"),
    "texture": ("plain", "striped"),
    "place": ("top left", "top right", "bottom left", "bottom right"),
}
ATTRIBUTES = (*VALUES, "background")
FIELD_OF = {value: name for name in VALUES for value in VALUES[name]} | {name: "background" for name in BACKGROUNDS}
NAMED = re.compile(r"\b(" + "|".join(FIELD_OF) + r")s?\b|\band\b|[,.;:]")


@dataclass(frozen=True)
class Thing:
    """An object of a scene, or what is said of one: None where nothing is."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    texture: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Scene:
    """One to three things, each in a quarter of its own, in reading order; or what a text says of a scene."""

    things: tuple[Thing, ...] = ()
    background: str | None = None


def pick(options: Sequence, generator: torch.Generator):
    """One of the options, each as likely."""
    return options[int(torch.randint(len(options), (), generator=generator))]


def draw_scene(generator: torch.Generator) -> Scene:
    """A scene of one to three things, all values as likely."""
    places = torch.randperm(4, generator=generator)[: pick((1, 2, 3), generator)].sort().values.tolist()
    names = ("shape", "colour", "size", "texture")
    things = [{name: pick(VALUES[name], generator) for name in names} for _ in places]
    things = [Thing(**t, place=VALUES["place"][at]) for t, at in zip(things, places, strict=True)]
    return Scene(tuple(things), pick(tuple(BACKGROUNDS), generator))


def render(scene: Scene, size: int = 32) -> np.ndarray:
    """The picture (size, size, 3) uint8 of a scene that says everything; edges are means of 4 x 4 points a pixel."""
    fine = 4 * size
    y, x = np.mgrid[:fine, :fine] * (32 / fine) + 16 / fine  # in 32nds of the side, whatever the size
    image = np.broadcast_to(np.array(BACKGROUNDS[scene.background], float), (fine, fine, 3)).copy()
    for thing in scene.things:
        row, column = divmod(VALUES["place"].index(thing.place), 2)
        u, v, r = x - 16 * column - 8, y - 16 * row - 8, 7 if thing.size == "large" else 4.5
        inside = {
            "circle": u * u + v * v < r * r,
            "square": np.maximum(abs(u), abs(v)) < 0.88 * r,
            "triangle": (v < 0.85 * r) & (v > 2 * abs(u) - r),
            "cross": (np.minimum(abs(u), abs(v)) < 0.32 * r) & (np.maximum(abs(u), abs(v)) < r),
        }[thing.shape]
        shade = np.where((thing.texture == "striped") & (v % 4 < 2), 0.35, 1.0)
        image[inside] = (shade[..., None] * COLOURS[thing.colour])[inside]
    return image.reshape(size, 4, size, 4, 3).mean((1, 3)).round().astype(np.uint8)


def phrase(thing: Thing) -> str:
    """`a large striped red circle`, without what the thing leaves open."""
    words = [word for word in (thing.size, thing.texture, thing.colour, thing.shape or "thing") if word]
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def listed(parts: Sequence[str]) -> str:
    """`x`, `x and y`, `x, y and z`."""
    return ", ".join(parts[:-1]) + " and " * (len(parts) > 1) + parts[-1]


def describe(scene: Scene, style: str = "descriptive", generator: torch.Generator | None = None) -> str:
    """A caption, wordings drawn: `descriptive` says all that the scene holds; `short` colour and shape of its main
    subject, the first of the largest; `alt` what the web might say, true or not."""
    generator = generator or torch.Generator().manual_seed(0)
    require(style in STYLES, f"style {style!r}: must be one of {', '.join(STYLES)}; correct it")
    if style == "alt":
        return alt_text(scene, generator)
    if style == "short":
        main = min(scene.things, key=lambda thing: thing.size != "large")
        return phrase(Thing(main.shape, main.colour)) + "."
    order, ground = pick(range(4), generator), scene.background and f"a {scene.background} background"
    placed = [phrase(thing) + (f" in the {thing.place}" if thing.place else "") for thing in scene.things]
    if order == 0:
        return listed(placed) + f", on {ground}." * bool(ground)
    if order == 1:
        return f"on {ground}, " * bool(ground) + f"there is {listed(placed)}."
    if order == 2:
        there = [(f"in the {t.place} is " if t.place else "there is ") + phrase(t) for t in scene.things]
        return f"the background is {scene.background}. " * bool(ground) + "; ".join(there) + "."
    count = ("one object", "two objects", "three objects")[len(scene.things) - 1]
    return f"a picture of {count}" + f" on {ground}" * bool(ground) + f": {'; '.join(placed)}."


def alt_text(scene: Scene, generator: torch.Generator) -> str:
    """Noisy alt-text: often some of the objects, sometimes all, with colours swapped, or nothing to do with them."""
    kind, things = pick(range(10), generator), list(scene.things)
    if kind == 0:
        number = int(torch.randint(10000, (), generator=generator))
        return pick((f"IMG_{number:04}.jpg", "Free Wallpaper Download", "untitled", "Click to Enlarge"), generator)
    if kind == 1:
        return f"{len(things)} Shapes on {scene.background.title()} | Stock Art"
    if kind <= 4:  # one of the objects, not always the main one
        thing = pick(things, generator)
        words = [f"{thing.colour} {thing.shape}", thing.shape, f"{thing.size} {thing.colour} {thing.shape}"]
        return pick(words, generator).title() + pick(("", " - Buy Online", " clipart", "!"), generator)
    if kind <= 6:  # all, the colours handed round among them
        things = [Thing(a.shape, b.colour) for a, b in zip(things, things[1:] + things[:1], strict=True)]
    elif kind <= 8:
        things = [Thing(thing.shape, thing.colour) for thing in things]
    else:
        things = [Thing(thing.shape, place=thing.place) for thing in things]
    found = [" ".join(filter(None, (t.colour, t.shape, t.place))) for t in things]
    return pick((" and ".join(found), listed(found), f"{', '.join(found)}, {scene.background}"), generator)


def parse_caption(text: str) -> Scene:
    """What a text says, of whatever wording; parse_caption(describe(scene)) == scene.

    A thing's words stand between `and`, commas and other stops; a second shape, or colour, and so on begins another.
    """
    things, background, now = [], None, {}
    for match in itertools.chain(NAMED.finditer(text.lower()), [None]):
        word = match and match[1]
        field = FIELD_OF.get(word)
        if field == "background":
            background = background or word
        elif field is None or field in now:  # a stop, or the next thing
            if "shape" in now or "colour" in now:
                things.append(Thing(**now))
            now = {}
        if field and field != "background":
            now[field] = word
    things.sort(key=lambda thing: VALUES["place"].index(thing.place) if thing.place else 4)  # others keep their order
    return Scene(tuple(things), background)


def agreement(said: Scene, true: Scene) -> dict[str, tuple[int, int, int]]:
    """For each attribute, how often it was said and is so, was said, and is there to be said; and three more rows.

    Things are matched so that most agrees. `binding` is colour and shape of one thing together, `relation` where a pair
    of things lie to each other, `count` their number.
    """
    most = max(len(said.things), len(true.things))
    first, second = (list(s.things) + [None] * (most - len(s.things)) for s in (said, true))

    def agreed(a: Thing | None, b: Thing | None) -> int:
        return 0 if a is None or b is None else sum(getattr(a, n) == getattr(b, n) is not None for n in VALUES)

    # With more than five things, of a text gone astray, the order stays as it is: there are too many to try.
    orders = itertools.permutations(second) if most <= 5 else [tuple(second)]
    pairs = list(zip(first, max(orders, key=lambda order: sum(map(agreed, first, order))), strict=True))
    values = {"background": [(said.background, true.background)]}
    for name in VALUES:
        values[name] = [tuple(thing and getattr(thing, name) for thing in pair) for pair in pairs]
    couples = [tuple((t.colour, t.shape) if t and t.colour and t.shape else None for t in pair) for pair in pairs]
    relations = [tuple(relation(a[side], b[side]) for side in (0, 1)) for a, b in itertools.combinations(pairs, 2)]
    values |= {"binding": couples, "relation": relations, "count": [(len(said.things), len(true.things))]}
    found = {}
    for name, rows in values.items():
        found[name] = (
            sum(a == b and a is not None for a, b in rows),
            sum(a is not None for a, _ in rows),
            sum(b is not None for _, b in rows),
        )
    return found


def relation(a: Thing | None, b: Thing | None) -> tuple[int, int] | None:
    """Whether b lies (below, right) of a: 1, 0 or -1 each; None where a place is not said."""
    if not (a and b and a.place and b.place):
        return None
    (y, x), (v, u) = (divmod(VALUES["place"].index(thing.place), 2) for thing in (a, b))
    return v - y, u - x


def agreement_report(pairs: Iterable[tuple[Scene, Scene]]) -> dict[str, float | None]:
    """Over said and true: attribute F1, share said that is not so, what is so by kind of word; None: nothing said."""
    total = {name: np.zeros(3, int) for name in (*ATTRIBUTES, "binding", "relation", "count")}
    for said, true in pairs:
        for name, counts in agreement(said, true).items():
            total[name] += counts

    def report(names: Sequence[str], prefix: str) -> dict:
        agreed, said, true = sum(total[name] for name in names).tolist()
        found = {"f1": 2 * agreed / max(1, said + true), "hallucinated": 1 - agreed / said if said else None}
        return {f"{prefix}{name}": value for name, value in found.items()}

    found = report([name for name in ATTRIBUTES if name != "place"], "") | report(["place"], "spatial_")
    return found | {name: (n[0] / n[1]).item() if n[1] else None for name, n in total.items()}


class Pieces:
    """A reversible tokenizer: the commonest words, each with the space before it, and bytes for all the rest."""

    pad, begin, end = 0, 1, 2
    split = re.compile(r" ?\w+| ?[^\w\s]|\s")

    def __init__(self, pieces: Sequence[str]):
        self.pieces = list(pieces)
        self.ids = {piece: 259 + i for i, piece in enumerate(self.pieces)}
        self.size = 259 + len(self.pieces)

    @classmethod
    def learn(cls, texts: Iterable[str], most: int) -> Pieces:
        """The pieces that are there more than once, at most so many."""
        counts = Counter(piece for text in texts for piece in cls.split.findall(text))
        return cls([piece for piece, n in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most] if n > 1])

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end."""
        pieces = self.split.findall(text.encode("utf-8", "replace").decode())  # JSON may hold halves of a character
        return [i for p in pieces for i in ([self.ids[p]] if p in self.ids else [3 + b for b in p.encode("utf-8")])]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first end; begin and padding are left out."""
        ids = itertools.takewhile(lambda i: i != self.end, ids)
        parts = (bytes([i - 3]) if i < 259 else self.pieces[i - 259].encode("utf-8", "replace") for i in ids if i > 2)
        return b"".join(parts).decode("utf-8", "replace").strip()

    def batch(self, texts: Sequence[str], length: int) -> Tensor:
        """Tokens (B, T) of texts, with begin and end, padded, and cut so that T is at most `length`."""
        rows = [[self.begin, *self.encode(text)[: length - 2], self.end] for text in texts]
        longest = max(map(len, rows))
        return torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])


@dataclass
class Pictures:
    """Images (N, size, size, 3) uint8, the text found with each, and clean captions of some, by index."""

    images: Tensor
    alt: list[str]
    short: dict[int, str]
    descriptive: dict[int, str]
    scenes: list[Scene]  # what is in them; empty for the user's own


def draw_pictures(count: int, clean: int, size: int, generator: torch.Generator) -> Pictures:
    """Scenes, rendered, with alt-text; the first `clean` of them with clean captions."""
    scenes = [draw_scene(generator) for _ in range(count)]
    images = torch.from_numpy(np.stack([render(scene, size) for scene in scenes]))
    alt, *others = [
        [describe(scene, style, generator) for scene in scenes[:n]]
        for style, n in (("alt", count), ("short", clean), ("descriptive", clean))
    ]
    return Pictures(images, alt, *(dict(enumerate(texts)) for texts in others), scenes)


SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}


class BadImage(UserError):
    """A file that is no image; without Pillow, none is known to be bad."""


def read_image(path: Path, size: int) -> np.ndarray:
    """The file's middle square as (size, size, 3) uint8, by Pillow; BadImage where it is no image."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError("reading image files needs Pillow; pip install pillow") from None
    try:
        with Image.open(path) as image:
            require(image.mode[0] not in "IF", f"mode {image.mode}: must be 8 bits a channel")  # or all becomes white
            whole = ImageOps.exif_transpose(image).convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
        return np.array(ImageOps.fit(flat, (size, size), Image.Resampling.LANCZOS))
    except Exception as error:  # each format has its own kinds
        raise BadImage(f"{path}: is no image that Pillow reads ({str(error)[:80]}); correct or remove it") from None


def read_pictures(folder: Path, size: int) -> Pictures:
    """The user's images with FOLDER/captions.jsonl: file, caption, and optionally short and descriptive."""
    path = folder / "captions.jsonl"
    require(path.is_file(), f"--data {folder}: must be a folder with a captions.jsonl; give another")
    images, found = [], Pictures(torch.empty(0), [], {}, {}, [])
    lines = ((n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip())
    for number, line in lines:  # bytes: json.loads takes off a mark at the file's start, and a caption may hold U+2028
        try:
            row = dict.fromkeys(STYLES[:2], "") | json.loads(line)
            fits = all(isinstance(row[name], str) for name in ("file", "caption", *STYLES[:2]))
        except (ValueError, KeyError, TypeError):
            fits = False
        require(fits, f"{path}:{number}: must be UTF-8 JSON of texts: file, caption, short, descriptive; correct it")
        require((folder / row["file"]).is_file(), f"{path}:{number}: there is no {folder / row['file']}; correct it")
        images.append(read_image(folder / row["file"], size))
        found.alt.append(row["caption"])
        for name in STYLES[:2]:
            if row[name]:
                getattr(found, name)[len(found.alt) - 1] = row[name]
    require(len(images) > 1, f"{path}: must have two rows or more; add some")
    found.images = torch.from_numpy(np.stack(images))
    return found


# ----- The method: losses, blending, guidance -------------------------------------------------------------------------


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """The mean of both directions' cross-entropies of embeddings (B, E), of any length (Radford et al. 2021).

    With several processes each has a part of the batch as large as any other's: the embeddings of all are gathered, and
    row i of process r belongs to column r B + i. The mean over processes, and of their gradients, is one process's.
    """
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    images, texts, first = image, text, 0
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.nn.functional import all_gather  # the one that gradients go through

        images, texts, first = torch.cat(all_gather(image)), torch.cat(all_gather(text)), dist.get_rank() * len(image)
    labels = first + torch.arange(len(image), device=image.device)
    ours, theirs = logit_scale * image @ texts.T, logit_scale * text @ images.T
    return (F.cross_entropy(ours, labels) + F.cross_entropy(theirs, labels)) / 2


def caption_loss(logits: Tensor, tokens: Tensor, pad: int) -> Tensor:
    """-mean log P(t_j | t_1 .. t_{j-1}; image): logits (B, T, V) at j - 1, tokens (B, T) at j; padding is left out."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=pad)


def blend_captions(
    synthetic: Sequence[str], ground_truth: Sequence[str], probability: float, generator: torch.Generator
) -> list[str]:
    """For each image the synthetic caption with that probability, else the ground truth: drawn anew at each call."""
    require(0 <= probability <= 1, f"probability {probability}: must be between 0 and 1; correct it")
    draws = torch.rand(len(ground_truth), generator=generator) < probability
    return [a if draw else b for a, b, draw in zip(synthetic, ground_truth, draws.tolist(), strict=True)]


def clip_score(image: Tensor, text: Tensor) -> Tensor:
    """The cosine (B,) of embeddings (B, E), times 100."""
    return 100 * F.cosine_similarity(image, text, dim=-1)


def rectified_flow_loss(model: Callable, x: Tensor, text: Tensor, generator: torch.Generator) -> Tensor:
    """Mean square of v(x_t, t, text) - (x - noise) at x_t = t x + (1 - t) noise (Liu et al. 2022), t even in (0, 1).

    The draws are made on the generator's device, so that they are the same wherever x is.
    """
    t = torch.rand(len(x), generator=generator, dtype=x.dtype).to(x.device)
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    share = t.view(-1, *[1] * (x.ndim - 1))
    return F.mse_loss(model(share * x + (1 - share) * noise, t, text), x - noise)


def guided_velocity(model: Callable, x: Tensor, t: Tensor, text: Tensor, guidance: float) -> Tensor:
    """v(empty) + guidance (v(text) - v(empty)), of x (B, ...), t (B,), tokens (B, T) (Ho, Salimans 2022); one call."""
    if guidance == 1:
        return model(x, t, text)
    with_text, without = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, empty_like(text)])).chunk(2)
    return without + guidance * (with_text - without)


def empty_like(text: Tensor) -> Tensor:
    """The empty caption's tokens, begin and end, in the shape (B, T) of other ones."""
    empty = torch.full_like(text, Pieces.pad)
    empty[:, :2] = torch.tensor([Pieces.begin, Pieces.end], device=text.device)
    return empty


@torch.no_grad()
def sample_latents(
    model: Callable, text: Tensor, shape: Sequence[int], steps: int, guidance: float, generator: torch.Generator
) -> Tensor:
    """Latents (B, *shape) for tokens (B, T): Euler's method from noise at t = 0 to t = 1."""
    x = torch.randn(len(text), *shape, generator=generator).to(text.device)
    for step in range(steps):
        t = torch.full((len(x),), step / steps, device=x.device)
        x = x + guided_velocity(model, x, t, text, guidance) / steps
    return x


# ----- The models -----------------------------------------------------------------------------------------------------


class MultiHead(nn.Module):
    """Attention with several heads, of x to itself or to a memory."""

    def __init__(self, D: int, heads: int):
        super().__init__()
        self.heads, self.q, self.kv, self.out = heads, nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)

    def forward(self, x, memory=None, mask=None, causal=False, cache=None) -> Tensor:
        """x (B, L, D); memory (B, S, D), None: x; mask (B, S), False where it is padding; cache: a dict to go on with.

        In a cache the keys of x are added to those before; a memory's are made once.
        """
        (B, L, D), own = x.shape, memory is None
        q = self.q(x).view(B, L, self.heads, -1).transpose(1, 2)  # (B, heads, L, D / heads)
        kv = None if cache is None else cache.get("own" if own else "memory")
        if own or kv is None:
            new = self.kv(x if own else memory).view(B, -1, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
            kv = new if kv is None else torch.cat([kv, new], 3)
        if cache is not None:
            cache["own" if own else "memory"] = kv
        mask = None if mask is None else mask[:, None, None]
        y = F.scaled_dot_product_attention(q, *kv, attn_mask=mask, is_causal=causal and L > 1)
        return self.out(y.transpose(1, 2).reshape(B, L, D))


class Layer(nn.Module):
    """Attention to itself, with `cross` to a memory, and a GELU network, each added to the stream behind a LayerNorm.

    `timed`: the norms are shifted and scaled, and what is added is gated, by a condition (adaLN-zero, of DiT).
    """

    def __init__(self, D: int, heads: int, cross: bool = False, timed: bool = False):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D, elementwise_affine=not timed) for _ in range(2 + cross))
        self.attend, self.cross = MultiHead(D, heads), MultiHead(D, heads) if cross else None
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(approximate="tanh"), nn.Linear(4 * D, D))
        self.time = nn.Linear(D, 6 * D) if timed else None
        if timed:
            nn.init.zeros_(self.time.weight)
            nn.init.zeros_(self.time.bias)

    def forward(self, x, memory=None, mask=None, memory_mask=None, causal=False, cache=None, condition=None) -> Tensor:
        """x (B, L, D), condition (B, D); the rest as in `MultiHead`."""
        shift = scale = shift_2 = scale_2 = 0.0
        gate = gate_2 = 1.0
        if self.time is not None:
            shift, scale, gate, shift_2, scale_2, gate_2 = self.time(condition)[:, None].chunk(6, -1)
        x = x + gate * self.attend(self.norms[0](x) * (1 + scale) + shift, mask=mask, causal=causal, cache=cache)
        if self.cross is not None:
            x = x + self.cross(self.norms[2](x), memory, memory_mask, cache=cache)
        return x + gate_2 * self.mlp(self.norms[1](x) * (1 + scale_2) + shift_2)


class AttentionPool(nn.Module):
    """Learned queries attend to a memory: (B, N, D) -> (B, queries, D) (CoCa's pooling).

    Queries and memory are of deviation 1, or all attention would be even and the queries' answers the same.
    """

    def __init__(self, D: int, heads: int, queries: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, D))
        self.attend, self.before, self.norm = MultiHead(D, heads), nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, memory: Tensor) -> Tensor:
        """memory (B, N, D)."""
        return self.norm(self.attend(self.queries.expand(len(memory), -1, -1), self.before(memory)))


class TextDecoder(nn.Module):
    """A causal language model whose lower half sees text alone and whose upper half attends to a memory too (CoCa)."""

    def __init__(self, vocab: int, length: int, D: int, heads: int, layers: int):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab, D), nn.Parameter(0.02 * torch.randn(length, D))
        nn.init.normal_(self.embed.weight, std=0.02)
        self.lower = nn.ModuleList(Layer(D, heads) for _ in range(layers))
        self.upper = nn.ModuleList(Layer(D, heads, cross=True) for _ in range(layers))
        self.enter, self.middle, self.norm = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)

    def read(self, tokens: Tensor, caches: list | None = None, first: int = 0) -> Tensor:
        """The lower half's states (B, T, D) of tokens (B, T), which stand at positions from `first` on."""
        x = self.enter(self.embed(tokens) + self.place[first : first + tokens.shape[1]])
        for i, layer in enumerate(self.lower):
            x = layer(x, causal=True, cache=caches and caches[i])
        return x

    def write(self, states: Tensor, memory: Tensor, caches: list | None = None) -> Tensor:
        """Logits (B, T, V) by the upper half, of the lower one's states and a memory (B, Q, D)."""
        for i, layer in enumerate(self.upper, len(self.lower)):
            states = layer(states, memory, causal=True, cache=caches and caches[i])
        return F.linear(self.norm(states), self.embed.weight)

    def summary(self, states: Tensor, tokens: Tensor) -> Tensor:
        """(B, D): the state of each row's end token, which has seen all before it."""
        at = (tokens == Pieces.end).int().argmax(1)
        return self.middle(states[torch.arange(len(states), device=states.device), at])

    @torch.no_grad()
    def generate(self, memory: Tensor, generator=None, temperature=0.0, top_p=None, cached=True) -> Tensor:
        """Tokens (B, T), begin first, drawn until each row has its end; what follows an end is padding."""
        tokens = torch.full((len(memory), 1), Pieces.begin, device=memory.device)
        caches = [{} for _ in (*self.lower, *self.upper)] if cached else None
        ended = torch.zeros(len(memory), dtype=torch.bool, device=memory.device)
        for at in range(len(self.place) - 1):
            new = tokens[:, at:] if cached else tokens
            logits = self.write(self.read(new, caches, at if cached else 0), memory, caches)[:, -1]
            drawn = sample_token(logits.cpu(), temperature, top_p=top_p, generator=generator).to(tokens.device)
            drawn = drawn.masked_fill(ended, Pieces.pad)
            tokens, ended = torch.cat([tokens, drawn[:, None]], 1), ended | (drawn == Pieces.end)
            if ended.all():
                break
        return tokens


def sample_token(logits: Tensor, temperature=1.0, top_k=None, top_p=None, generator=None) -> Tensor:
    """Draw a token (B,) from logits (B, V): temperature 0 is greedy; top_k and top_p cut the tail, in that order."""
    fits = temperature >= 0 and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)
    require(fits, f"{temperature=}, {top_k=}, {top_p=}: must be >= 0, >= 1 and in (0, 1]; correct the one that is not")
    if temperature < 1e-6:  # logits divided by less overflow
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if top_p is not None:  # the fewest tokens whose probabilities reach top_p
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


class CoCa(nn.Module):
    """A captioner and CLIP in one: image encoder, two attention poolings in a row, and a `TextDecoder`."""

    def __init__(self, size: int, vocab: int, length: int, width: int, layers: int, heads: int, queries: int):
        super().__init__()
        self.sizes = {"size": size, "vocab": vocab, "length": length, "width": width}
        self.sizes |= {"layers": layers, "heads": heads, "queries": queries}
        D, stem = width, (3, width // 4, width // 2, width)
        convolutions = [nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(stem)]
        self.stem = nn.Sequential(*itertools.chain(*((conv, nn.GELU()) for conv in convolutions)))[:-1]
        self.place = nn.Parameter(0.02 * torch.randn((size // 8) ** 2, D))
        self.enter, self.encoder = nn.LayerNorm(D), nn.ModuleList(Layer(D, heads) for _ in range(layers))
        self.pool, self.pool_one = AttentionPool(D, heads, queries), AttentionPool(D, heads, 1)
        self.decoder = TextDecoder(vocab, length, D, heads, layers)
        self.of_image, self.of_text = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Memory (B, Q, D) and embedding (B, E) of images (B, H, W, 3), uint8."""
        x = self.stem(images.permute(0, 3, 1, 2).to(self.place.dtype) / 127.5 - 1).flatten(2).transpose(1, 2)
        x = self.enter(x + self.place)
        for layer in self.encoder:
            x = layer(x)
        memory = self.pool(x)
        return memory, self.of_image(self.pool_one(memory)[:, 0])

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Embedding (B, E) of tokens (B, T)."""
        return self.of_text(self.decoder.summary(self.decoder.read(tokens), tokens))

    def losses(self, images: Tensor, tokens: Tensor, write: bool = True) -> tuple[Tensor, Tensor]:
        """The CLIP loss and the language-model loss of pairs; the second is 0 unless `write`."""
        memory, image = self.look(images)
        states = self.decoder.read(tokens)
        text = self.of_text(self.decoder.summary(states, tokens))
        clip = clip_loss(image, text, self.log_scale.exp().clamp(max=100))
        return clip, caption_loss(self.decoder.write(states, memory), tokens, Pieces.pad) if write else 0 * clip


class Autoencoder(nn.Module):
    """Images to latents of a quarter of their height and width, and back."""

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        half = width // 2
        self.encoder = nn.Sequential(
            nn.Conv2d(3, half, 4, 2, 1), nn.SiLU(), nn.Conv2d(half, width, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(width, width, 3, 1, 1), nn.SiLU(), nn.Conv2d(width, channels, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1), nn.SiLU(), nn.Conv2d(width, width, 3, 1, 1), nn.SiLU(),
            nn.Conv2d(width, 4 * half, 1), nn.PixelShuffle(2), nn.SiLU(),
            nn.Conv2d(half, half, 3, 1, 1), nn.SiLU(), nn.Conv2d(half, 12, 3, 1, 1), nn.PixelShuffle(2),
        )  # fmt: skip
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("deviation", torch.ones(channels, 1, 1))

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, H / 4, W / 4), of mean 0 and deviation 1 a channel, of images (B, H, W, 3) uint8."""
        return (self.encoder(images.permute(0, 3, 1, 2).float() / 127.5 - 1) - self.mean) / self.deviation

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, H, W, 3), uint8, of latents."""
        x = self.decoder(latents * self.deviation + self.mean).clamp(-1, 1)
        return ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)

    def loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Absolute and squared error of what comes back from noisy latents, which are kept small."""
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        z = self.encoder(x)
        back = self.decoder(z + 0.05 * torch.randn(z.shape, generator=generator).to(z.device))
        return (back - x).abs().mean() + F.mse_loss(back, x) + 0.01 * z.square().mean()


class TextReader(nn.Module):
    """Encodes a text, every token attending to all others: what images or long prompts are made from."""

    def __init__(self, vocab: int, length: int, D: int, heads: int, layers: int):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab, D), nn.Parameter(torch.randn(length, D))
        self.layers, self.norm = nn.ModuleList(Layer(D, heads) for _ in range(layers)), nn.LayerNorm(D)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) of tokens (B, T); where mask (B, T) is False, nothing attends."""
        x = self.embed(tokens) + self.place[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, mask=mask)
        return self.norm(x)


class Painter(nn.Module):
    """The velocity of latents: a transformer over their 2 x 2 patches that attends to a caption's encoding."""

    def __init__(self, vocab: int, length: int, channels: int, side: int, D: int, heads: int, layers: int, reader: int):
        super().__init__()
        self.reader = TextReader(vocab, length, D, heads, reader)
        self.patch, self.place = nn.Conv2d(channels, D, 2, 2), nn.Parameter(0.5 * torch.randn((side // 2) ** 2, D))
        self.time = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.layers = nn.ModuleList(Layer(D, heads, cross=True, timed=True) for _ in range(layers))
        self.norm, self.last = nn.LayerNorm(D), nn.Linear(D, 4 * channels)
        for zero in self.last.parameters():
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """x (B, C, h, w), t (B,) from noise, 0, to image, 1, tokens (B, T) -> velocity (B, C, h, w)."""
        words = text != Pieces.pad
        memory = self.reader(text, words)
        half = self.place.shape[1] // 2
        angles = 1000 * t[:, None] * torch.exp(-math.log(1e4) / half * torch.arange(half, device=x.device))
        share = (words / words.sum(1, keepdim=True)).to(memory.dtype)
        condition = F.silu(
            self.time(torch.cat([angles.sin(), angles.cos()], 1)) + torch.einsum("bt,btd->bd", share, memory)
        )
        y = self.patch(x).flatten(2).transpose(1, 2) + self.place
        for layer in self.layers:
            y = layer(y, memory, memory_mask=words, condition=condition)
        B, C, h, w = x.shape
        y = self.last(self.norm(y)).view(B, h // 2, w // 2, C, 2, 2)
        return y.permute(0, 3, 1, 4, 2, 5).reshape(B, C, h, w)


class Reader(nn.Module):
    """The judge of attributes: shape, colour, size and texture in each quarter of an image, and the background."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.counts = [1 + len(VALUES["shape"]), *(len(VALUES[name]) for name in ("colour", "size", "texture"))]
        self.look = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, 2, 1), nn.ReLU(), nn.Conv2d(width // 2, width, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(8),
        )  # fmt: skip
        self.things, self.ground = nn.Linear(16 * width, sum(self.counts)), nn.Linear(64 * width, len(BACKGROUNDS))

    def forward(self, images: Tensor, noise: Tensor | float = 0.0) -> tuple[list[Tensor], Tensor]:
        """Logits (B, 4, values) of four attributes, shape's first value `none`, and (B, backgrounds)."""
        x = self.look(images.permute(0, 3, 1, 2).float() / 127.5 - 1 + noise)
        cells = x.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return list(self.things(cells).split(self.counts, -1)), self.ground(x.flatten(1))

    def loss(self, images: Tensor, scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
        """Cross-entropy; half of the images are blurred, all have noise, as a generator's drawings would."""
        labels = torch.full((len(scenes), 4, 4), -100)
        labels[:, :, 0] = 0
        for row, scene in zip(labels, scenes, strict=True):
            for thing in scene.things:
                values = [VALUES[name].index(getattr(thing, name)) for name in ("shape", "colour", "size", "texture")]
                row[VALUES["place"].index(thing.place)] = torch.tensor([values[0] + 1, *values[1:]])
        ground = torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes], device=images.device)
        x = images.permute(0, 3, 1, 2).float()
        half = len(x) // 2
        x = torch.cat([F.avg_pool2d(x[:half], 3, 1, 1, count_include_pad=False), x[half:]]).permute(0, 2, 3, 1)
        things, grounds = self(x, 0.15 * torch.randn(len(x), 3, *x.shape[1:3], generator=generator).to(x.device))
        labels = labels.to(x.device).unbind(-1)
        losses = [F.cross_entropy(a.flatten(0, 1), b.flatten()) for a, b in zip(things, labels, strict=True)]
        return sum(losses) + F.cross_entropy(grounds, ground)

    @torch.no_grad()
    def read(self, images: Tensor) -> list[Scene]:
        """The scenes that images (B, H, W, 3) uint8 show."""
        things, grounds = self(images)
        found = torch.stack([logits.argmax(-1) for logits in things], -1).tolist()
        scenes = []
        for cells, ground in zip(found, grounds.argmax(-1).tolist(), strict=True):
            values = [VALUES[name] for name in ("colour", "size", "texture")]
            there = [
                Thing(VALUES["shape"][shape - 1], *(v[i] for v, i in zip(values, rest, strict=True)), place)
                for (shape, *rest), place in zip(cells, VALUES["place"], strict=True) if shape
            ]  # fmt: skip
            scenes.append(Scene(tuple(there), list(BACKGROUNDS)[ground]))
        return scenes


class Upsampler(nn.Module):
    """Short prompt to long one: a `TextDecoder` that attends to the encoding of the short prompt."""

    def __init__(self, vocab: int, length: int, D: int, heads: int, layers: int):
        super().__init__()
        self.length, self.reader = length, TextReader(vocab, length, D, heads, layers)
        self.decoder = TextDecoder(vocab, length, D, heads, layers)

    def look(self, short: Tensor) -> Tensor:
        """The memory (B, length, D) of short prompts (B, T), padded to the full length, whatever T is."""
        return self.reader(F.pad(short, (0, self.length - short.shape[1]), value=Pieces.pad))

    def loss(self, short: Tensor, long: Tensor) -> Tensor:
        """The language-model loss of the long prompts' tokens."""
        return caption_loss(self.decoder.write(self.decoder.read(long), self.look(short)), long, Pieces.pad)


# ----- The stages -----------------------------------------------------------------------------------------------------


def keep_memory() -> None:
    """Have glibc keep freed blocks: giving them back and fetching them anew each step takes up to half the time."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, as small ones do,
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks


def load_torch(path: Path, device: str | torch.device = "cpu") -> dict:
    """The contents of a .safetensors file, by the safetensors package, or of a torch.save; data only, never code."""
    try:
        if path.suffix == ".safetensors":
            return importlib.import_module("safetensors.torch").load_file(path)
        return torch.load(path, map_location=device, weights_only=True)
    except ImportError:
        raise UserError(f"{path}: reading it needs the safetensors package; pip install safetensors") from None
    except Exception as error:  # each format has its own kinds
        raise UserError(f"{path}: not a file of tensors ({str(error).splitlines()[0][:80]}); give another") from None


@contextlib.contextmanager
def saved_stage(path: Path, config: Config, skipped: Iterable[str], device: torch.device) -> Iterator[dict | None]:
    """A saved stage, or None; raises UserError where its config differs, or where it does not fit when put to use."""
    if not path.is_file():
        yield None
        return
    content, now = load_torch(path, device), dataclasses.asdict(config)
    try:
        then = {k: v for k, v in content["config"].items() if k not in skipped}
        differing = [f"{k} was {v!r}, is {now.get(k)!r}" for k, v in then.items() if v != now.get(k)]
        require(not differing, f"{path}: saved with another config: {'; '.join(differing)}; undo that, or change --out")
        yield content
    except UserError:
        raise
    except Exception as error:  # whatever a file that something else wrote leads to
        raise UserError(f"{path}: is no file of this script ({error!r:.90}); move it away, or change --out") from None


def take_state(part: nn.Module | torch.optim.Optimizer, state: dict, path: Path) -> None:
    """part.load_state_dict(state), read from path; UserError where the shapes or names differ."""
    try:
        part.load_state_dict(state)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        raise UserError(f"{path}: was made by another version of this script; move it away and train anew") from None


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


class Pipeline:
    """The stages, each a property: taken from OUT where it is finished, else made, with those it needs, and saved."""

    def __init__(self, config: Config, say: Callable = print):
        self.config, self.device, self.out, self.say = config, pick_device(config.device), Path(config.out), say
        fits = self.out.is_dir() or not (self.out.exists() or self.out.suffix == ".jsonl")
        require(fits, f"--out {self.out}: must be a folder, no file; give another")
        self.out.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict] = []
        source = Path(config.data or "-") / "captions.jsonl"
        self.source = hashlib.sha256(source.read_bytes()).hexdigest() if source.is_file() else ""
        keep_memory()

    def generator(self, *purpose) -> torch.Generator:
        """Random numbers of their own for a purpose."""
        digest = hashlib.sha256(repr((self.config.seed, *purpose)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def new(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """make() with that name's initialisation, on the device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.generator(name).initial_seed())
            return make().to(self.device)

    @contextlib.contextmanager
    def load(self, name: str, needs: str) -> Iterator[dict | None]:
        """The saved stage of that name, or None; UserError where a field that it depends on has changed."""
        skipped = {field.name for field in dataclasses.fields(Config)} - set(NEEDS[needs])
        path = self.out / f"{name}.pt"
        with saved_stage(path, self.config, skipped, self.device) as content:
            fits = content is None or content["source"] == self.source
            require(fits, f"{path}: --data had another captions.jsonl then; undo that, or change --out")
            yield content

    def save(self, name: str, content: dict) -> dict:
        """Save a stage."""
        content = {"config": dataclasses.asdict(self.config), "source": self.source} | content
        write_atomically(self.out / f"{name}.pt", lambda path: torch.save(content, path))
        return content

    @torch.enable_grad()  # a stage may be asked for where none is needed
    def train(
        self, name: str, needs: str, module, steps: int, loss_of: Callable, lr=None, ema=0.0, same=""
    ) -> nn.Module:
        """AdamW on loss_of(module, generator), the rate risen and fallen; saved eight times, or taken where finished.

        Returns the module, or the average of its weights with decay `ema`; names that are `same` have the same draws.
        """
        lr, generator = self.config.lr if lr is None else lr, self.generator("train", same or name)
        optimizer = torch.optim.AdamW(module.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        average, step, rows = copy.deepcopy(module).requires_grad_(False), 0, []
        with self.load(name, needs) as content:
            if content and (content["step"] == steps or self.config.resume):
                for part, state in ((module, "module"), (average, "average"), (optimizer, "optimizer")):
                    take_state(part, content[state], self.out / f"{name}.pt")
                generator.set_state(content["generator"].cpu())
                step, rows = content["step"], content["rows"]
        first, began, every = step, time.perf_counter(), max(1, steps // 8)
        while step < steps:
            rate = lr * min((step + 1) / (0.05 * steps + 1), 0.51 + 0.49 * math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = rate
            loss, step = loss_of(module, generator), step + 1
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            if not math.isfinite(norm.item() + loss.item()):
                raise FloatingPointError(f"{name} diverged at step {step}: loss {loss.item()}; lower --lr")
            optimizer.step()
            decay = min(ema, step / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in module.parameters()], 1 - decay)
            if step % every == 0 or step == steps:
                pace = (time.perf_counter() - began) / (step - first)
                rows.append({"stage": name, "step": step, "loss": round(loss.item(), 5), "lr": rate})
                parts = {"of": name, "loss": f"{loss.item():.4f}", "ms": f"{1000 * pace:.0f}"}
                self.say(progress_line(step, steps, parts, pace), flush=True)
                states = {"module": module, "average": average, "optimizer": optimizer}
                states = {part: value.state_dict() for part, value in states.items()}
                self.save(name, {"step": step, "rows": rows, "generator": generator.get_state()} | states)
        self.rows += rows
        return average

    @functools.cached_property
    def pictures(self) -> Pictures:
        """The training images: drawn here, or the user's own."""
        c = self.config
        if c.data:
            return read_pictures(Path(c.data), c.size)
        with self.load("data", "data") as content:
            if content is None:
                drawn = draw_pictures(c.scenes, c.clean, c.size, self.generator("data"))
                content = self.save("data", vars(drawn) | {"scenes": [dataclasses.asdict(s) for s in drawn.scenes]})
            scenes = [Scene(tuple(Thing(**t) for t in s["things"]), s["background"]) for s in content["scenes"]]
            return Pictures(*(content[name] for name in ("images", "alt", "short", "descriptive")), scenes)

    @functools.cached_property
    def held_out(self) -> Pictures:
        """Scenes that no model trains on, each with clean captions."""
        count = self.config.prompts
        return draw_pictures(count, count, self.config.size, self.generator("held out"))

    @functools.cached_property
    def pieces(self) -> Pieces:
        """The tokenizer of the training texts."""
        p, most = self.pictures, self.config.length
        texts = [*p.alt, *p.short.values(), *p.descriptive.values()]
        pieces = Pieces.learn(texts, self.config.vocabulary)
        need = [len(pieces.encode(text)) + 2 for text in texts]
        if cut := sum(n > most for n in need):
            self.say(f"{cut} of {len(texts)} captions are cut to --length {most}; whole, they need {max(need)}")
        return pieces

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Tokens (B, T) of texts, on the device."""
        return self.pieces.batch(texts, self.config.length).to(self.device)

    def coca(self, name: str) -> CoCa:
        """A new captioner or CLIP."""
        c = self.config
        return self.new(name, lambda: CoCa(c.size, self.pieces.size, c.length, c.width, c.layers, c.heads, c.queries))

    @functools.cached_property
    def captioners(self) -> dict[str, CoCa]:
        """The base captioner, by both losses on the noisy pairs; its fine-tunes, by the language model's on clean."""
        c, p, found = self.config, self.pictures, {}
        found["base"] = self.train("base", "captioner", self.coca("base"), c.captioner_steps, self.pair_loss)
        for style in STYLES[:2]:
            texts = getattr(p, style)
            if not texts:
                self.say(f"no {style} captions in {c.data}: no {style} captioner")
                continue
            index = torch.tensor(sorted(texts))

            def loss_of(model: CoCa, generator: torch.Generator, index=index, texts=texts) -> Tensor:
                rows = index[torch.randint(len(index), (c.batch,), generator=generator)]
                tokens = self.tokens([texts[i] for i in rows.tolist()])
                memory, _ = model.look(p.images[rows].to(self.device))
                return caption_loss(model.decoder.write(model.decoder.read(tokens), memory), tokens, Pieces.pad)

            start = copy.deepcopy(found["base"]).requires_grad_()
            found[style] = self.train(style, "captioner", start, c.tune_steps, loss_of, c.tune_lr)
        with self.load("captioner", "captioner") as there:
            if there is None:
                states = {name: model.state_dict() for name, model in found.items()}
                self.save("captioner", {"sizes": found["base"].sizes, "pieces": self.pieces.pieces, "states": states})
        return found

    def pair_loss(self, model: CoCa, generator: torch.Generator) -> Tensor:
        """Both losses of a batch of images and the text found with them."""
        c, p = self.config, self.pictures
        rows = torch.randint(len(p.images), (c.batch,), generator=generator)
        clip, write = model.losses(p.images[rows].to(self.device), self.tokens([p.alt[i] for i in rows.tolist()]))
        return c.contrastive_weight * clip + c.caption_weight * write

    @functools.cached_property
    def captions(self) -> dict[str, list[str]]:
        """The synthetic captions of the training images, by style."""
        with self.load("captions", "captions") as content:
            if content is None:
                content, x = {}, self.pictures.images
                for style, model in self.captioners.items():
                    if style != "base":
                        content[style] = caption_images(model, self.pieces, x, self.config, self.generator(style))
                self.save("captions", content)
            return {style: content[style] for style in STYLES[:2] if style in content}

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder, of the training images."""
        c, p, name = self.config, self.pictures, "autoencoder"

        def loss_of(model: Autoencoder, generator: torch.Generator) -> Tensor:
            rows = torch.randint(len(p.images), (c.batch,), generator=generator)
            return model.loss(p.images[rows].to(self.device), generator)

        new = self.new(name, lambda: Autoencoder(c.channels))
        module = self.train(name, name, new, c.encoder_steps, loss_of, c.encoder_lr)
        with torch.no_grad():
            latents = module.encode(p.images[:1024].to(self.device))
            module.mean += latents.mean((0, 2, 3)).view_as(module.mean)
            module.deviation *= latents.std((0, 2, 3)).view_as(module.deviation)
        return module

    @functools.cached_property
    def latents(self) -> Tensor:
        """Latents (N, C, h, w) of the training images."""
        with torch.no_grad():
            parts = [self.autoencoder.encode(x.to(self.device)) for x in self.pictures.images.split(512)]
        return torch.cat(parts)

    def painter(self, arm: str) -> Painter:
        """The text-to-image model of an arm; all have the same initialisation, images, noise and number of steps."""
        c, alt, (style, share) = self.config, self.pictures.alt, read_arms(arm)[arm]
        synthetic = alt if style == "ground_truth" else self.captions[style]

        def make() -> Painter:
            sizes = (c.channels, c.size // 4, c.paint_width, c.heads, c.paint_layers, c.layers)
            return Painter(self.pieces.size, c.length, *sizes)

        def loss_of(model: Painter, generator: torch.Generator) -> Tensor:
            rows = torch.randint(len(alt), (c.batch,), generator=generator).tolist()
            texts = blend_captions([synthetic[i] for i in rows], [alt[i] for i in rows], share, generator)
            empty = (torch.rand(len(rows), generator=generator) < c.drop).tolist()
            tokens = self.tokens(["" if none else text for text, none in zip(texts, empty, strict=True)])
            return rectified_flow_loss(model, self.latents[rows], tokens, generator)

        name = "painter_" + arm.replace(":", "_")
        new = self.new("painter", make)
        return self.train(name, "painter", new, c.paint_steps, loss_of, c.paint_lr, c.ema, same="painter")

    def draw(self, painter: Painter, prompts: Sequence[str]) -> Tensor:
        """Images (B, H, W, 3) uint8 for prompts, from the same noise each time."""
        c, generator, images = self.config, self.generator("noise"), []
        shape = (c.channels, c.size // 4, c.size // 4)
        for texts in batches(prompts, 100):
            x = sample_latents(painter, self.tokens(texts), shape, c.sample_steps, c.guidance, generator)
            images.append(self.autoencoder.decode(x))
        return torch.cat(images)

    @functools.cached_property
    def judging(self) -> tuple[Pictures, list[str]]:
        """Scenes for the judges, other than those that the models see, with clean captions, and brief ones."""
        c, generator = self.config, self.generator("judge's scenes")
        drawn = draw_pictures(c.scenes, c.scenes, c.size, generator)
        return drawn, [describe(brief(scene), "descriptive", generator) for scene in drawn.scenes]

    @functools.cached_property
    def judge(self) -> CoCa:
        """The scoring CLIP: trained apart from the captioner, on clean captions, long, brief and short."""
        c = self.config

        def loss_of(model: CoCa, generator: torch.Generator) -> Tensor:
            drawn, texts = self.judging
            rows = torch.randint(len(texts), (2 * c.batch,), generator=generator).tolist()
            sets = (drawn.descriptive, drawn.descriptive, texts, drawn.short)
            tokens = self.tokens([pick(sets, generator)[i] for i in rows])
            return model.losses(drawn.images[rows].to(self.device), tokens, write=False)[0]

        return self.train("judge", "judge", self.coca("judge"), c.judge_steps, loss_of)

    @functools.cached_property
    def reader(self) -> Reader:
        """The attribute reader."""

        def loss_of(model: Reader, generator: torch.Generator) -> Tensor:
            drawn, _ = self.judging
            rows = torch.randint(len(drawn.scenes), (self.config.batch,), generator=generator).tolist()
            return model.loss(drawn.images[rows].to(self.device), [drawn.scenes[i] for i in rows], generator)

        c = self.config
        return self.train("reader", "judge", self.new("reader", Reader), c.judge_steps, loss_of, c.paint_lr)

    @functools.cached_property
    def upsampler(self) -> Upsampler:
        """The built-in prompt upsampler."""
        c, name = self.config, "upsampler"

        def loss_of(model: Upsampler, generator: torch.Generator) -> Tensor:
            drawn, texts = self.judging
            rows = torch.randint(len(texts), (c.batch,), generator=generator).tolist()
            return model.loss(self.tokens([texts[i] for i in rows]), self.tokens([drawn.descriptive[i] for i in rows]))

        sizes = (self.pieces.size, c.length, c.width, c.heads, c.layers)
        return self.train(name, "judge", self.new(name, lambda: Upsampler(*sizes)), c.judge_steps, loss_of)

    def upsample(self, prompts: Sequence[str]) -> list[str]:
        """Longer prompts, drawn by the built-in model."""
        memory = self.upsampler.look(self.tokens(prompts))
        tokens = self.upsampler.decoder.generate(memory, self.generator("upsample"), temperature=0.7)
        return [self.pieces.decode(row) for row in tokens.tolist()]


def brief(scene: Scene) -> Scene:
    """What a user would say of it: the objects' colours and shapes alone."""
    return Scene(tuple(Thing(thing.shape, thing.colour) for thing in scene.things))


def caption_images(
    model: CoCa, pieces: Pieces, images: Tensor, config: Config, generator: torch.Generator, size: int = 256
) -> list[str]:
    """A caption for each image (N, H, W, 3) uint8."""
    texts, device = [], model.place.device
    with torch.no_grad():
        for part in images.split(size):
            memory, _ = model.look(part.to(device))
            tokens = model.decoder.generate(memory, generator, config.temperature, config.top_p)
            texts += [pieces.decode(row) for row in tokens.tolist()]
    return texts


# ----- Scores, table, pictures ----------------------------------------------------------------------------------------


def judge_images(work: Pipeline, images: Tensor, said: list[str]) -> dict:
    """CLIP score and attribute shares of images against what was said: the prompt that the user wrote."""
    with torch.no_grad():
        parts = zip(images.split(256), batches(said, 256), strict=True)
        pairs = [(work.judge.look(x.to(work.device))[1], work.judge.embed_text(work.tokens(t))) for x, t in parts]
    scores = torch.cat([clip_score(image, text) for image, text in pairs])
    scenes = [scene for part in images.split(256) for scene in work.reader.read(part.to(work.device))]
    shares = agreement_report((parse_caption(text), seen) for text, seen in zip(said, scenes, strict=True))
    return {"clip": scores.mean().item(), "clip_deviation": scores.std().item()} | shares


def score_captioners(work: Pipeline) -> dict[str, dict]:
    """F1, hallucinated share, and the same of spatial words, of each captioner on the held-out scenes."""
    held, found = work.held_out, {}
    for name, model in work.captioners.items():
        began = time.perf_counter()
        texts = caption_images(model, work.pieces, held.images, work.config, work.generator("held", name))
        pace = len(texts) / (time.perf_counter() - began)
        said, more = map(parse_caption, texts), {"images_a_second": pace, "texts": texts[:8]}
        found[name] = agreement_report(zip(said, held.scenes, strict=True)) | more
    return found


def score_reader(work: Pipeline) -> dict:
    """How much of what held-out renders show the reader reads, and what the judges give to these true images."""
    held = work.held_out
    report = judge_images(work, held.images, list(held.descriptive.values()))
    shares = ", ".join(f"{name} {report[name]:.3f}" for name in ("shape", "colour", "texture", "binding", "count"))
    work.say(f"the reader on real renders: {shares}; the scoring CLIP gives them {report['clip']:.1f}", flush=True)
    return report


def score_arms(work: Pipeline, styles: Sequence[str] = PROMPTS) -> tuple[dict, dict[str, Tensor]]:
    """Models' scores by style of prompt, of upsampled ones by the brief one behind; what they draw for descriptive."""
    held, found, drawn = work.held_out, {}, {}
    texts = [describe(brief(scene), "descriptive", work.generator("brief", i)) for i, scene in enumerate(held.scenes)]
    prompts = {"ground_truth": held.alt, "descriptive": list(held.descriptive.values())}
    prompts |= {"brief": texts, "upsampled": work.upsample(texts) if "upsampled" in styles else texts}
    for arm in read_arms(work.config.arms):
        painter = work.painter(arm)
        for style in styles:
            began = time.perf_counter()
            images = work.draw(painter, prompts[style])
            pace = {"images_a_second": len(images) / (time.perf_counter() - began)}
            row = judge_images(work, images, texts if style == "upsampled" else prompts[style])
            found.setdefault(arm, {})[style] = row | pace
            if style == "descriptive":
                drawn[arm] = images.cpu()
    return found, drawn


def score_table(captioners: dict, arms: dict) -> str:
    """Both tables, of captioners and of models; a dash where nothing of that kind was said."""

    def cells(row: dict, width: int) -> str:
        return "".join("-".rjust(width) if row[c] is None else f"{row[c]:{width}.3f}" for c in columns)

    columns = ("f1", "hallucinated", "spatial_f1", "spatial_hallucinated", "binding")
    lines = [f"{'captioner':24}" + "".join(f"{name:>22}" for name in columns)]
    lines += [f"{name:24}" + cells(row, 22) for name, row in captioners.items()]
    columns = ("clip", "shape", "colour", "binding", "texture", "place", "relation", "count")
    lines += ["", f"{'model, prompts':34}" + "".join(f"{name:>11}" for name in columns)]
    for arm, styles in arms.items():
        lines += [f"{arm + ', ' + style:34}" + cells(row, 11) for style, row in styles.items()]
    return "\n".join(lines)


def draw_pages(work: Pipeline, drawn: dict[str, Tensor]) -> None:
    """captions.png, images with what is said of them, and samples.png, prompts by models."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no pictures: matplotlib is not installed; pip install matplotlib")
        return
    from textwrap import fill

    held, rows = work.held_out, min(6, work.config.prompts)
    texts = {"alt-text": held.alt[:rows]}
    for name, model in work.captioners.items():
        if name != "base":
            generator = work.generator("held", name)
            texts[name] = caption_images(model, work.pieces, held.images[:rows], work.config, generator)
    pages = {"captions": (1, lambda i: "\n".join(fill(f"{k}: {v[i]}", 78) for k, v in texts.items()))}
    pages |= {"samples": (1 + len(drawn), lambda i: fill(held.descriptive[i], 46))} if drawn else {}
    for page, (count, text) in pages.items():
        figure, axes = plt.subplots(rows, 1 + count, figsize=(1.7 * count + 6, 1.7 * rows), squeeze=False,
                                    width_ratios=[1] * count + [4], layout="constrained")  # fmt: skip
        for i, line in enumerate(axes):
            shown = {"the scene": held.images[i]} | ({k: v[i] for k, v in drawn.items()} if count > 1 else {})
            for axis, (name, image) in zip(line, shown.items(), strict=False):
                axis.imshow(image.numpy())
                axis.set_title(name if i == 0 else "", fontsize=8)
            safe = "".join(c if (c.isascii() and c.isprintable()) or c == "\n" else "?" for c in text(i))
            line[-1].text(0, 0.5, safe, va="center", fontsize=8, parse_math=False)
            for axis in line:
                axis.axis("off")
        write_atomically(work.out / f"{page}.png", functools.partial(figure.savefig, dpi=110, format="png"))
        plt.close(figure)


# ----- Prompt upsampling by a chat endpoint ---------------------------------------------------------------------------

SYSTEM = """You write prompts for a program that paints a picture from a description. The user gives a few words; you
answer with one description, 15 to 80 words, of the picture those words call for, and with nothing else: no greeting, no
quotes, no list. Rules: keep everything the user said, above all numbers, colours, names and who is where. Add what the
words leave open: surroundings, background, light, style, texture. Describe only what can be seen. If the user asks for
a change, change that and keep the rest of your last description. If the user names a new subject, start afresh."""
LIGHTHOUSE = """A white lighthouse with a red lantern room stands on a black cliff above a grey, choppy sea at %s; a \
narrow gravel path with a wooden rail leads up to its door, and a few gulls hang in the wind beside the tower."""
CATS = """Two cats lie on a worn green velvet sofa: a ginger one stretched out asleep on the left, a black one sitting \
upright on the right, in a small living room with warm lamplight and a full bookshelf behind them."""
EXAMPLES = (  # expand; change one thing and keep the rest; a new subject
    ("New subject: a lighthouse", LIGHTHOUSE % "dusk"),
    ("Make it noon.", LIGHTHOUSE % "noon under a cloudless sky"),
    ("New subject: two cats on a sofa", CATS),
)


def check_upsampled(text: str) -> str | None:
    """What is wrong with an answer, or None: it must have 15 to 80 words, in one paragraph."""
    words = len(text.split())
    if "\n" in text.strip():
        return "it has more than one paragraph"
    return None if 15 <= words <= 80 else f"it has {words} words, not 15 to 80"


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: the key would go along to wherever it leads."""

    def redirect_request(self, *_) -> None:
        return None


def ask_chat(config: Config, messages: list[dict], wait: Callable[[float], object] = time.sleep) -> str:
    """An endpoint's answer to messages; on 429, 5xx, time-outs, no connection, asked up to five times, ever later."""
    key, url = os.environ.get("OPENAI_API_KEY", "").strip(), config.chat_url.rstrip("/")
    require(key.isascii() and key.isprintable(), "OPENAI_API_KEY: must be printable ASCII, and is not; set it anew")
    url += "" if url.endswith("/chat/completions") else "/chat/completions"
    fits = bool(re.fullmatch(r"https?://[!-~]+", url))
    require(fits, f"--chat-url {config.chat_url!r}: must begin http:// or https:// and be ASCII, no spaces; correct it")
    body = json.dumps({"model": config.chat_model, "messages": messages}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def hide(text: object) -> str:
        return str(text).replace(key, "***") if key else str(text)

    for attempt in range(5):
        pause, request = 2.0**attempt, urllib.request.Request(url, body, headers)
        try:
            with urllib.request.build_opener(_Stay).open(request, timeout=config.chat_timeout) as answer:
                text = answer.read().decode("utf-8", "replace")
            break
        except urllib.error.HTTPError as error:
            detail = hide(f"{error.code} {error.reason}: {error.read(9999).decode('utf-8', 'replace')}")[:200]
            require(error.code == 429 or error.code >= 500, f"{url}: answers {detail}; correct the request")
            with contextlib.suppress(TypeError, ValueError):
                pause = min(60.0, max(pause, float(error.headers.get("Retry-After"))))
        except (OSError, ValueError, http.client.HTTPException) as error:  # no connection, none in time, no HTTP
            detail = hide(getattr(error, "reason", error))
        if attempt < 4:
            wait(pause)
    else:
        raise UserError(f"{url}: five attempts failed, the last with {detail}; try later, or correct --chat-url")
    try:
        return json.loads(text)["choices"][0]["message"]["content"].encode("utf-8", "replace").decode().strip()
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{url}: answers no chat completion but {hide(text)[:200]!r}; correct --chat-url") from None


def upsample_by_chat(config: Config, prompt: str, wait: Callable[[float], object] = time.sleep) -> str:
    """The prompt at length, by the endpoint; an answer that fails the check is asked for again twice, then reported."""
    require(bool(config.chat_model), "--chat-model: must name the endpoint's model; give it")
    messages = [{"role": "system", "content": SYSTEM}]
    for user, answer in EXAMPLES:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": f"New subject: {prompt}"})
    for _ in range(3):
        text = ask_chat(config, messages, wait)
        if not (wrong := check_upsampled(text)):
            return text
        again = f"That breaks the rules: {wrong}. Answer again with the description alone."
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": again}]
    raise UserError(f"--chat-model {config.chat_model}: three answers broke the rules, the last as {wrong}; change it")


# ----- Jobs, main -----------------------------------------------------------------------------------------------------


def load_captioner(path: Path, device: torch.device) -> tuple[dict[str, CoCa], Pieces, int]:
    """The models by style, tokenizer and image size of a captioner.pt."""
    require(path.is_file(), f"--checkpoint {path}: there is none; train one by `captioner`, or give another")
    content = load_torch(path, device)
    fits = isinstance(content, dict) and {"sizes", "pieces", "states"} <= content.keys()
    require(fits, f"--checkpoint {path}: is no captioner.pt of this script; give another")
    models = {}
    for style, state in content["states"].items():
        models[style] = CoCa(**content["sizes"]).to(device).requires_grad_(False)
        take_state(models[style], state, path)
    return models, Pieces(content["pieces"]), content["sizes"]["size"]


def kept_rows(path: Path, resume: bool, styles: Iterable[str]) -> list[dict]:
    """The rows that an earlier run wrote, of these styles; half a line at the end, where it stopped, is cut off."""
    if not path.exists():
        return []
    require(resume, f"--out {path}: is there already; go on in it with --resume, or give another")
    whole = path.read_bytes().rpartition(b"\n")
    try:
        rows = [json.loads(line) for line in whole[0].splitlines()]
        fits = all(isinstance(row["file"], str) and set(styles) <= row.keys() for row in rows)
        fits = fits and b'{"file": "'.startswith(whole[2][:10])
    except (ValueError, LookupError, TypeError):
        fits = False
    require(fits, f"--out {path}: has lines that this captioner did not write; give another")
    with open(path, "r+b") as file:
        file.truncate(len(whole[0]) + len(whole[1]))
    return rows


def caption_folder(config: Config) -> int:
    """Caption every image of a folder and those within it: a row a file, written batch by batch. Returns the rows."""
    folder, out, device = Path(config.images), Path(config.out), pick_device(config.device)
    require(folder.is_dir(), f"--images {folder}: must be a folder; give another")
    path = Path(config.checkpoint or Path(Config.out if out.suffix == ".jsonl" else out) / "captioner.pt")
    out = out if out.suffix == ".jsonl" else out / "captions.jsonl"
    models, pieces, size = load_captioner(path, device)
    models = {style: model for style, model in models.items() if style != "base"} or {"caption": models["base"]}
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {row["file"] for row in kept_rows(out, config.resume, models.keys())}
    end = out.stat().st_size if out.exists() else 0
    found = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    files = sorted(p.relative_to(folder).as_posix() for p in found)
    require(bool(files), f"--images {folder}: has no images ({' '.join(sorted(SUFFIXES))}); give another")
    todo, bad, written, began = [file for file in files if file not in done], [], 0, time.perf_counter()
    for names in batches(todo, config.batch):
        images, good, failed = [], [], None
        for name in names:
            try:
                images.append(read_image(folder / name, size))
                good.append(name)
            except BadImage as error:
                bad.append(name)
                if not config.skip_bad:
                    failed = error
                    break
                print(error, file=sys.stderr)
        if images:
            generator = torch.Generator().manual_seed((config.seed + len(done) + written) % 2**63)
            stack = torch.from_numpy(np.stack(images))
            texts = {style: caption_images(m, pieces, stack, config, generator) for style, m in models.items()}
            rows = [{"file": name} | {style: t[i] for style, t in texts.items()} for i, name in enumerate(good)]
            try:  # a file's name that is not UTF-8 is written as JSON escapes
                with open(out, "a", encoding="utf-8", errors="backslashreplace") as file:
                    require(file.tell() == end, f"--out {out}: another run writes to it; stop one, go on with --resume")
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                    end = file.tell()
            except OSError as error:
                raise OSError(f"{out}: not written ({error.strerror}); mend that and go on with --resume") from None
        written += len(images)
        require(failed is None, f"{failed}; or go on with --skip-bad --resume: {written} rows are written")
        pace = (time.perf_counter() - began) / (written + len(bad))
        print(progress_line(written + len(bad), len(todo), {"rate": f"{1 / pace:.0f} images/s"}, pace), flush=True)
    print(f"{out}: {written} rows written, {len(done)} there before, {len(bad)} files skipped")
    return written


def run_all(config: Config) -> dict:
    """Every stage, then scores, table, pictures and OUT/result.json."""
    began, work = time.perf_counter(), Pipeline(config)
    seconds, spent = {}, began

    def timed(name: str, value):
        nonlocal spent
        seconds[name], spent = round(time.perf_counter() - spent, 1), time.perf_counter()
        return value

    timed("data", work.pictures)
    captioners = timed("captioner", score_captioners(work))
    timed("caption", work.captions)
    real = timed("judges", score_reader(work))
    for arm in read_arms(config.arms):
        timed(f"generate {arm}", work.painter(arm))
    arms, drawn = timed("score", score_arms(work))
    work.say("\n" + score_table(captioners, {"real images": {"descriptive": real}} | arms) + "\n")
    lines = "".join(json.dumps(row) + "\n" for row in work.rows)
    write_atomically(work.out / "metrics.jsonl", lambda name: Path(name).write_text(lines, "utf-8"))
    draw_pages(work, drawn)
    parts = {"captioner": work.captioners["base"], "painter": work.painter(next(iter(arms))), "judge": work.judge}
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()}
    result = {"captioners": captioners, "real": real, "arms": arms, "parameters": parameters, "seconds": seconds}
    result = result_record(config, work.device, wall_seconds=round(time.perf_counter() - began, 1), **result)
    write_json(work.out / "result.json", result)
    work.say(f"{work.out}: result.json, metrics.jsonl and the stages, after {result['wall_seconds']:.0f} s")
    return result


def run_job(job: str, config: Config, prompt: str) -> None:
    """One job of the command line."""
    fits = not config.data or job in ("captioner", "data")
    require(fits, f"--data {config.data}: must go with the job captioner; caption its images by caption --images")
    require(not config.images or job == "caption", f"--images {config.images}: must go with the job caption; name it")
    require(not prompt or job == "upsample", f"{prompt!r}: only upsample takes a second word; give a flag instead")
    if job in ("all", "score"):
        run_all(config)
    elif job == "caption" and config.images:
        caption_folder(config)
    elif job == "upsample":
        require(bool(prompt.strip()), "upsample: must have a prompt, in quotes; give it behind the word")
        print(upsample_by_chat(config, prompt) if config.chat_url else Pipeline(config).upsample([prompt])[0])
    else:
        work = Pipeline(config)
        if job == "data":
            p = work.pictures
            print(f"{len(p.alt):,} images, {len(p.short):,} short and {len(p.descriptive):,} descriptive captions")
        elif job == "captioner" and config.data:
            print(f"{work.out / 'captioner.pt'}: {', '.join(work.captioners)}")
        elif job == "captioner":
            print(score_table(score_captioners(work), {}))
        elif job == "caption":
            columns = {"alt": work.pictures.alt} | work.captions
            lines = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_atomically(work.out / "captions.jsonl", lambda name: Path(name).write_text(text, "utf-8"))
            print(f"{work.out / 'captions.jsonl'}: {len(lines):,} rows")
        else:
            for arm in read_arms(config.arms):
                work.painter(arm)


JOBS = ("all", "data", "captioner", "caption", "generate", "score", "upsample")


def build_parser() -> argparse.ArgumentParser:
    """The command line: a job, for `upsample` a prompt, and a flag for every field of `Config`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", nargs="?", default="all", choices=JOBS, help="a stage, or all of them")
    parser.add_argument("prompt", nargs="?", default="", help="upsample: the prompt to write at length")
    return add_flags(parser, Config)


def main(argv: list[str] | None = None) -> int:
    """Run a job from the command line. Returns 0; 1 when training diverged, 2 for bad input, 130 after Ctrl-C."""
    arguments = vars(build_parser().parse_args(argv))
    job, prompt = arguments.pop("job"), arguments.pop("prompt")
    try:
        run_job(job, Config(**arguments | (SMOKE if arguments["smoke"] else {})), prompt)
    except (UserError, OSError, FloatingPointError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
