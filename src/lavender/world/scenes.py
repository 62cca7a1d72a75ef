"""Scenes: named things on a background, drawn from a seed, with the true mask of each thing.

A scene is a pure function of `(seed, style)`. Splits are disjoint ranges of seeds. Lengths are in pixels; images are
uint8 (height, width, 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_fill_holes, zoom

from lavender.world.hands import HANDS, cutouts_by_name, names_drawn
from lavender.world.sprites import CUTOUT_PREFIX, NAMES, SpriteSet, share_of_box, sprite

Style = Literal["plain", "openmoji", "outline", "photograph", "mixed", "cutout"]
"""Sprites and background. plain: Twemoji on textures. photograph: Twemoji on photographs. openmoji and outline:
OpenMoji on photographs, in colour and as black outlines. mixed: each thing in a random hand, on textures; needs the
drawings of `lavender.world.hands`. cutout: photographic cut-outs on photographs; needs the cut-outs, and shows only the
names that they have."""
Split = Literal["teacher", "pretrain", "finetune", "development", "sealed"]

SPLITS: dict[Split, range] = {
    "teacher": range(0, 1_000_000),
    "pretrain": range(1_000_000, 2_000_000),
    "finetune": range(2_000_000, 3_000_000),
    "development": range(3_000_000, 4_000_000),
    "sealed": range(4_000_000, 5_000_000),
}
"""The seeds of each split. `sealed` is used once, for the reported numbers."""

SHORT_SIDE = 64
LONG_SIDES = (64, 80, 96, 112, 128)
NUM_THINGS_PROBABILITIES = (0.25, 0.35, 0.25, 0.15)  # one to four things, 2.3 on average
SMALLEST_SHARE, LARGEST_SHARE = 0.045, 0.17  # drawn area per picture area; the visible share is 4–20 %
LARGEST_OVERLAP = 0.2  # the share of a thing that later things may hide
_PHOTOGRAPHS = ("grass", "gravel", "brick", "coffee", "rocket")


@dataclass(frozen=True, eq=False)
class Thing:
    """One named thing of a scene.

    Attributes:
        name: one of `sprites.NAMES`.
        box: (top, left, bottom, right) of the whole sprite, in pixels.
        flipped: whether the sprite is mirrored left to right.
        mask: the visible silhouette with holes filled, bool (height, width) of the picture.
    """

    name: str
    box: tuple[int, int, int, int]
    flipped: bool
    mask: np.ndarray

    @property
    def share(self) -> float:
        """The visible share of the picture's area, from 0 to 1."""
        return float(self.mask.mean())

    @property
    def centre(self) -> tuple[float, float]:
        """(row, column) of the box's centre, as shares of the picture's height and width."""
        top, left, bottom, right = self.box
        height, width = self.mask.shape
        return (top + bottom) / 2 / height, (left + right) / 2 / width


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and the things in it.

    Attributes:
        seed, style: what the scene was drawn from.
        pixels: uint8 (height, width, 3), RGB.
        things: one to four things with distinct names; later ones may hide parts of earlier ones.
    """

    seed: int
    style: Style
    pixels: np.ndarray
    things: tuple[Thing, ...]

    @property
    def image(self) -> Image.Image:
        """The picture as a PIL image, RGB."""
        return Image.fromarray(self.pixels)

    @property
    def names(self) -> tuple[str, ...]:
        """The things' names, in the order of `things`."""
        return tuple(thing.name for thing in self.things)

    def mask_of(self, name: str) -> np.ndarray:
        """The visible mask of the thing of this name, bool (height, width)."""
        return next(thing.mask for thing in self.things if thing.name == name)


def split_of(seed: int) -> Split:
    """The split that a seed belongs to.

    Raises:
        ValueError: the seed is in no split.
    """
    for split, seeds in SPLITS.items():
        if seed in seeds:
            return split
    raise ValueError(f"Got seed {seed}. Expected a seed of a split: {SPLITS}. Do this: choose a seed of one.")


def scenes(
    split: Split, count: int, style: Style = "plain", start: int = 0, hands: Sequence[str] = HANDS
) -> Iterator[Scene]:
    """Draw scenes of a split one after another: `count` of them, from its `start`-th seed on. See `draw_scene`."""
    for seed in SPLITS[split][start : start + count]:
        yield draw_scene(seed, style, hands)


def draw_scene(seed: int, style: Style = "plain", hands: Sequence[str] = HANDS) -> Scene:
    """Draw the scene of a seed. The style decides the sprites and the background, not the rules of placement.

    Args:
        hands: the hands of a scene of the style "mixed", a part of `lavender.world.hands.HANDS`; no other style uses
            them. Names that none of them has do not occur.

    Raises:
        ValueError: the seed is in no split.
        FileError: the style needs drawings or cut-outs that are not there.
    """
    split_of(seed)
    rng = np.random.default_rng([seed, get_args(Style).index(style)])
    background = random_background(rng, textured=style in ("plain", "mixed"))
    num_things = 1 + int(rng.choice(4, p=NUM_THINGS_PROBABILITIES))
    choices = sprite_choices(style, hands)
    names = [str(name) for name in rng.choice(list(choices), size=num_things, replace=False)]
    set_rng = np.random.default_rng([seed, get_args(Style).index(style), 1])
    sprite_sets = [choices[name][int(set_rng.integers(len(choices[name])))] for name in names]
    return Scene(seed, style, *place_things(rng, background, names, sprite_sets))


def random_background(rng: np.random.Generator, textured: bool = True) -> np.ndarray:
    """A texture, or a photograph, of a random size: uint8 (height, width, 3)."""
    height, width = SHORT_SIDE, int(rng.choice(LONG_SIDES))
    if rng.random() < 0.5:
        height, width = width, height
    return _texture(rng, height, width) if textured else _photograph(rng, height, width)


def place_things(
    rng: np.random.Generator, background: np.ndarray, names: Sequence[str], sprite_sets: Sequence[SpriteSet]
) -> tuple[np.ndarray, tuple[Thing, ...]]:
    """Draw things at random places on a background, each from its set of sprites.

    Returns:
        The picture, uint8 (height, width, 3), and the things in the order of `names`.
    """
    height, width = background.shape[:2]
    placed = None
    while placed is None:
        placed = _try_to_place(rng, names, sprite_sets, height, width)
    boxes, flips, alphas = placed
    pixels = background.astype(np.float32)
    masks: list[np.ndarray] = []
    for name, sprite_set, box, flipped, alpha in zip(names, sprite_sets, boxes, flips, alphas, strict=True):
        top, left, bottom, right = box
        rows, columns = slice(top, bottom), slice(left, right)
        drawing = _scaled_sprite(name, sprite_set, bottom - top, right - left, flipped)
        colour = np.asarray(drawing, dtype=np.float32)[..., :3]
        pixels[rows, columns] += (colour - pixels[rows, columns]) * alpha[rows, columns, None]
        solid = binary_fill_holes(alpha > 0.5)
        masks = [mask & ~solid for mask in masks] + [solid]
    things = tuple(
        Thing(name, box, flipped, mask) for name, box, flipped, mask in zip(names, boxes, flips, masks, strict=True)
    )
    return pixels.round().astype(np.uint8), things


def sprite_choices(style: Style, hands: Sequence[str] = HANDS) -> dict[str, tuple[SpriteSet, ...]]:
    """Name → the sets of sprites that a scene of the style draws it from. Names without one are left out."""
    if style == "mixed":
        drawn = {hand: frozenset(NAMES) if hand == "twemoji" else names_drawn(hand) for hand in hands}
        choices = {name: tuple(hand for hand in hands if name in drawn[hand]) for name in NAMES}
        return {name: sets for name, sets in choices.items() if sets}
    if style == "cutout":
        return {name: tuple(CUTOUT_PREFIX + part for part in parts) for name, parts in cutouts_by_name().items()}
    return dict.fromkeys(NAMES, ("twemoji",) if style in ("plain", "photograph") else (style,))


@lru_cache(maxsize=4096)
def _scaled_sprite(name: str, sprite_set: SpriteSet, height: int, width: int, flipped: bool) -> Image.Image:
    drawing = sprite(name, sprite_set).resize((width, height), Image.Resampling.LANCZOS)
    return drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else drawing


def _try_to_place(
    rng: np.random.Generator, names: Sequence[str], sprite_sets: Sequence[SpriteSet], height: int, width: int
):
    """Boxes, flips and alphas, float32 (height, width), of one random placement; None if things hide each other."""
    boxes, flips, alphas = [], [], []
    for name, sprite_set in zip(names, sprite_sets, strict=True):
        share = rng.uniform(SMALLEST_SHARE, LARGEST_SHARE if len(names) < 4 else 0.1)
        original = sprite(name, sprite_set)
        area = share * height * width / share_of_box(name, sprite_set)
        tall = math.sqrt(area * original.height / original.width)
        shrink = min(1.0, (SHORT_SIDE - 2) / max(tall, area / tall))
        box_height, box_width = round(tall * shrink), round(area / tall * shrink)
        top, left = int(rng.integers(height - box_height + 1)), int(rng.integers(width - box_width + 1))
        flipped = bool(rng.random() < 0.5)
        alpha = np.zeros((height, width), dtype=np.float32)
        drawing = np.asarray(_scaled_sprite(name, sprite_set, box_height, box_width, flipped))
        bottom, right = top + box_height, left + box_width
        alpha[top:bottom, left:right] = drawing[..., 3] / 255
        boxes.append((top, left, bottom, right))
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
    """A smooth random texture with distractor shapes, uint8 (height, width, 3)."""
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
    """A random crop of a photograph that scikit-image ships, uint8 (height, width, 3)."""
    photograph = _photograph_pixels(_PHOTOGRAPHS[int(rng.integers(len(_PHOTOGRAPHS)))])
    scale = rng.uniform(1.0, 3.0)
    crop_height, crop_width = round(height * scale), round(width * scale)
    top = int(rng.integers(photograph.height - crop_height + 1))
    left = int(rng.integers(photograph.width - crop_width + 1))
    crop = photograph.crop((left, top, left + crop_width, top + crop_height))
    return np.asarray(crop.resize((width, height), Image.Resampling.BILINEAR))
