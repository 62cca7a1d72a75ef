"""Scenes: named things on a textured background, drawn from a seed, with the truth kept.

A scene is a pure function of `(seed, style)`. Splits are disjoint ranges of seeds.

Units: pixels; boxes are (top, left, height, width); images are uint8 (height, width, 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_fill_holes, zoom

from lavender.world.sprites import NAMES, Hand, share_of_box, sprite

Style = Literal["plain", "openmoji", "outline", "photograph"]
"""Hand and background: plain is Twemoji on textures, photograph the same drawings on photographs; the other
two are OpenMoji's hand, in colour and as an outline, on photographs."""
Split = Literal["teacher", "pretrain", "finetune", "development", "sealed"]

SPLITS: dict[Split, range] = {
    "teacher": range(0, 1_000_000),
    "pretrain": range(1_000_000, 2_000_000),
    "finetune": range(2_000_000, 3_000_000),
    "development": range(3_000_000, 4_000_000),
    "sealed": range(4_000_000, 5_000_000),
}
"""Seeds of each split. `sealed` is touched once, for a reported number."""

SHORT_SIDE = 64
LONG_SIDES = (64, 80, 96, 112, 128)
NUM_THINGS_PROBABILITIES = (0.25, 0.35, 0.25, 0.15)  # one to four things, 2.3 on average
SMALLEST_SHARE, LARGEST_SHARE = 0.045, 0.17  # of the picture, drawn; the visible share stays within 4–20 %
LARGEST_OVERLAP = 0.2  # share of a thing that later things may hide
_PHOTOGRAPHS = ("grass", "gravel", "brick", "coffee", "rocket")


@dataclass(frozen=True, eq=False)
class Thing:
    """One named thing. `mask` is its visible silhouette, holes filled: bool (height, width)."""

    name: str
    box: tuple[int, int, int, int]
    flipped: bool
    mask: np.ndarray

    @property
    def share(self) -> float:
        """Visible share of the picture's area."""
        return float(self.mask.mean())

    @property
    def centre(self) -> tuple[float, float]:
        """(row, column) of the box centre, as shares of the picture's height and width."""
        top, left, height, width = self.box
        return (top + height / 2) / self.mask.shape[0], (left + width / 2) / self.mask.shape[1]


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and what is in it. Names are distinct within a scene."""

    seed: int
    style: Style
    pixels: np.ndarray
    things: tuple[Thing, ...]

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(thing.name for thing in self.things)

    def mask_of(self, name: str) -> np.ndarray:
        return next(thing.mask for thing in self.things if thing.name == name)


def split_of(seed: int) -> Split:
    """The split a seed belongs to."""
    for split, seeds in SPLITS.items():
        if seed in seeds:
            return split
    raise ValueError(f"Got seed {seed}; expected one inside a split: {SPLITS}.")


def scenes(split: Split, count: int, style: Style = "plain", start: int = 0) -> Iterator[Scene]:
    """The `count` scenes of a split that begin at its `start`-th seed."""
    for seed in SPLITS[split][start : start + count]:
        yield draw_scene(seed, style)


def draw_scene(seed: int, style: Style = "plain") -> Scene:
    """Draw the scene of a seed. Style decides the hand and the background, never the layout rules."""
    split_of(seed)
    hand: Hand = "twemoji" if style in ("plain", "photograph") else style
    rng = np.random.default_rng([seed, get_args(Style).index(style)])
    height, width = SHORT_SIDE, int(rng.choice(LONG_SIDES))
    if rng.random() < 0.5:
        height, width = width, height
    background = _texture(rng, height, width) if style == "plain" else _photograph(rng, height, width)
    num_things = 1 + int(rng.choice(4, p=NUM_THINGS_PROBABILITIES))
    names = [str(name) for name in rng.choice(list(NAMES), size=num_things, replace=False)]
    placed = None
    while placed is None:  # where things hide each other, the whole placement is drawn again
        placed = _place_things(rng, names, hand, height, width)
    boxes, flips, alphas = placed
    pixels = background.astype(np.float32)
    masks: list[np.ndarray] = []
    for name, box, flipped, alpha in zip(names, boxes, flips, alphas, strict=True):
        rows, columns = slice(box[0], box[0] + box[2]), slice(box[1], box[1] + box[3])
        colour = np.asarray(_scaled(name, hand, box[2], box[3], flipped), dtype=np.float32)[..., :3]
        pixels[rows, columns] += (colour - pixels[rows, columns]) * alpha[rows, columns, None]
        solid = binary_fill_holes(alpha > 0.5)
        masks = [mask & ~solid for mask in masks] + [solid]
    things = tuple(
        Thing(name, box, flipped, mask) for name, box, flipped, mask in zip(names, boxes, flips, masks, strict=True)
    )
    return Scene(seed, style, pixels.round().astype(np.uint8), things)


@lru_cache(maxsize=4096)
def _scaled(name: str, hand: Hand, height: int, width: int, flipped: bool) -> Image.Image:
    drawing = sprite(name, hand).resize((width, height), Image.Resampling.LANCZOS)
    return drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else drawing


def _place_things(rng: np.random.Generator, names: list[str], hand: Hand, height: int, width: int):
    """Boxes, flips and full-size alphas of one try, or None where things hide each other."""
    boxes, flips, alphas = [], [], []
    for name in names:
        share = rng.uniform(SMALLEST_SHARE, LARGEST_SHARE if len(names) < 4 else 0.1)
        original = sprite(name, hand)
        area = share * height * width / share_of_box(name, hand)
        tall = math.sqrt(area * original.height / original.width)
        shrink = min(1.0, (SHORT_SIDE - 2) / max(tall, area / tall))
        box_height, box_width = round(tall * shrink), round(area / tall * shrink)
        top, left = int(rng.integers(height - box_height + 1)), int(rng.integers(width - box_width + 1))
        flipped = bool(rng.random() < 0.5)
        alpha = np.zeros((height, width), dtype=np.float32)
        drawing = np.asarray(_scaled(name, hand, box_height, box_width, flipped))
        alpha[top : top + box_height, left : left + box_width] = drawing[..., 3] / 255
        boxes.append((top, left, box_height, box_width))
        flips.append(flipped)
        alphas.append(alpha)
    covered = np.zeros((height, width), dtype=bool)
    for alpha in reversed(alphas):
        solid = alpha > 0.5
        if (solid & covered).sum() > LARGEST_OVERLAP * solid.sum() or (solid & ~covered).mean() < 0.04:
            return None
        covered |= solid
    return boxes, flips, alphas


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A soft random texture with distractor shapes: uint8 (height, width, 3)."""
    coarse = rng.uniform(40, 230, size=3) + rng.normal(0, 25, size=(4, 4, 3))
    soft = zoom(coarse, (height / 4, width / 4, 1), order=1)
    rows, columns = np.mgrid[:height, :width]
    kind = rng.integers(4)
    angle, period = rng.uniform(0, math.pi), rng.uniform(6, 24)
    wave = np.cos(2 * math.pi * (rows * math.sin(angle) + columns * math.cos(angle)) / period)
    if kind == 1:
        soft = soft + 18 * wave[..., None]
    elif kind == 2:
        soft = soft + 14 * np.sign(wave)[..., None]
    elif kind == 3:
        soft = soft + rng.normal(0, 8, size=(height, width, 1))
    canvas = Image.fromarray(np.clip(soft + rng.normal(0, 3, size=soft.shape), 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(2, 7))):
        colour = tuple(int(value) for value in rng.integers(20, 240, size=3))
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        reach_x, reach_y = rng.uniform(2, 9, size=2)
        box = (x - reach_x, y - reach_y, x + reach_x, y + reach_y)
        shape = rng.integers(4)
        if shape == 0:
            pen.ellipse(box, fill=colour)
        elif shape == 1:
            pen.rectangle(box, fill=colour)
        elif shape == 2:
            pen.polygon([(x, y - reach_y), (x - reach_x, y + reach_y), (x + reach_x, y + reach_y)], fill=colour)
        else:
            pen.line((x, y, x + 3 * reach_x, y + 2 * reach_y), fill=colour, width=2)
    return np.asarray(canvas)


@cache
def _photograph_pixels(name: str) -> Image.Image:
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def _photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A crop of a photograph that scikit-image carries: the unseen backgrounds."""
    photograph = _photograph_pixels(_PHOTOGRAPHS[int(rng.integers(len(_PHOTOGRAPHS)))])
    scale = rng.uniform(1.0, 3.0)
    crop_height, crop_width = round(height * scale), round(width * scale)
    top = int(rng.integers(photograph.height - crop_height + 1))
    left = int(rng.integers(photograph.width - crop_width + 1))
    crop = photograph.crop((left, top, left + crop_width, top + crop_height))
    return np.asarray(crop.resize((width, height), Image.Resampling.BILINEAR))
