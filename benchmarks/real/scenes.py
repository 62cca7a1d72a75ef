"""Photographic cut-outs with names, pasted on photographs: pictures, captions, true masks.

The cut-outs are those of Debian's `tuxpaint-stamps-default` that are photographs (not drawings), for names of one word;
the backgrounds are photographs of scikit-image. A scene is a pure function of its seed and settings. The last of
several photographs of a name is never trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import numpy as np
import skimage.data
from PIL import Image
from scipy.ndimage import binary_fill_holes

from lavender.maps import Word
from lavender.world.hands import cutout

SMALLEST, LARGEST = 0.34, 0.52  # longer side of a thing, as a share of the picture's side
PROMPT = "What is in the picture?"
BACKGROUNDS = ("grass", "gravel", "brick", "coffee", "rocket")
Photographs = Literal["seen", "unseen"]

CUTOUTS: dict[str, tuple[str, ...]] = {
    "bear": ("animals/mammals/bears/bear", "animals/mammals/bears/european-bear"),
    "camel": ("animals/mammals/camel/camel", "animals/mammals/camel/dromedary"),
    "chicken": ("animals/birds/chicken_profile", "animals/birds/hen"),
    "crow": ("animals/birds/crow",),
    "deer": ("animals/mammals/deer/deer", "animals/mammals/deer/wapiti"),
    "dog": ("animals/mammals/dogs/dog",),
    "dolphin": ("animals/mammals/aquatic/dolphin",),
    "donkey": ("animals/mammals/equines/donkey", "animals/mammals/equines/donkey_eating"),
    "duck": ("animals/birds/duck", "animals/birds/drake"),
    "elephant": ("animals/mammals/elephant",),
    "flamingo": ("animals/birds/pink_flamingo",),
    "fox": ("animals/mammals/dogs/fox",),
    "frog": ("animals/amphibians/frog", "animals/amphibians/frog-1"),
    "giraffe": ("animals/mammals/giraffe",),
    "goat": ("animals/mammals/bovines/goat", "animals/mammals/bovines/mountaingoat"),
    "gorilla": ("animals/mammals/apes/gorilla",),
    "horse": ("animals/mammals/equines/horse",),
    "kangaroo": ("animals/marsupials/kangaroo",),
    "lion": ("animals/mammals/cats/lion", "animals/mammals/cats/lion-2"),
    "lobster": ("animals/fish/lobster",),
    "owl": ("animals/birds/owl",),
    "penguin": ("animals/birds/penguin", "animals/birds/magellanic_penguin", "animals/birds/little-penguin"),
    "pig": ("animals/mammals/pig", "animals/mammals/pig_golden", "animals/mammals/pig_golden2"),
    "rabbit": ("animals/mammals/rodents/rabbit", "animals/mammals/rodents/rabbit-2", "animals/mammals/rabbit_little"),
    "sheep": ("animals/mammals/bovines/sheep", "animals/mammals/bovines/ram"),
    "tiger": ("animals/mammals/cats/tiger", "animals/mammals/cats/tiger_sumatran"),
    "zebra": ("animals/mammals/equines/zebra",),
    "apple": ("food/fruit/apple_red", "food/fruit/apple_green", "food/fruit/apple_fuji"),
    "avocado": ("food/fruit/avocado",),
    "banana": ("food/fruit/banana",),
    "broccoli": ("food/vegetables/broccoli",),
    "carrot": ("food/vegetables/carrot",),
    "corn": ("food/vegetables/corn",),
    "eggplant": ("food/vegetables/eggplant",),
    "garlic": ("food/vegetables/garlic",),
    "lemon": ("food/fruit/lemon",),
    "mushroom": ("food/vegetables/mushroom", "plants/mushrooms/cep", "plants/mushrooms/cep-1"),
    "onion": ("food/vegetables/onion",),
    "orange": ("food/fruit/orange", "food/fruit/sliced_orange"),
    "pear": ("food/fruit/pear",),
    "pepper": ("food/vegetables/pepper", "food/vegetables/yellowpepper"),
    "pineapple": ("food/fruit/pineapple",),
    "potato": ("food/vegetables/potato",),
    "strawberry": ("food/fruit/strawberry", "food/fruit/Strawberry2"),
    "tomato": ("food/vegetables/tomato",),
    "airplane": ("vehicles/flight/planes/747",),
    "basketball": ("sports/basketball",),
    "bus": ("vehicles/masstransit/green_korean_bus",),
    "camera": ("hobbies/camera_35mm",),
    "car": ("vehicles/auto/sedan", "vehicles/auto/sportscar2", "vehicles/auto/beetle"),
    "drum": ("hobbies/music/percussion/drum_tomtom_floor",),
    "guitar": (
        "hobbies/music/string/guitar_classical",
        "hobbies/music/string/guitar_electric",
        "hobbies/music/string/guitar2",
    ),
    "hammer": ("household/tools/hammer",),
    "kettle": ("household/kettle",),
    "key": ("household/key",),
    "mug": ("household/dishes/mug",),
    "rose": ("plants/flowers/rose",),
    "teapot": ("household/dishes/teapot",),
    "truck": ("vehicles/auto/truck",),
    "violin": ("hobbies/music/string/violin",),
}
"""Name → its photographs, below the folder of cut-outs, without `.png`."""
NAMES = tuple(CUTOUTS)
NEW_NAMES = NAMES[2::3]
"""Every third name, 20 of 60: stage 1 never shows them."""
KNOWN_NAMES = tuple(name for name in NAMES if name not in NEW_NAMES)


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, its caption and the truth about it.

    Attributes:
        image: RGB, a square.
        masks: name → its visible silhouette, bool (height, width); in the order of the caption.
        caption: names every thing once.
        words: each name's place in the caption, in the order of `masks`.
    """

    image: Image.Image
    masks: dict[str, np.ndarray]
    caption: str
    words: tuple[Word, ...]


def draw_scene(
    seed: Sequence[int],
    num_things: Sequence[int],
    names: Sequence[str],
    photographs: Photographs = "seen",
    side: int = 224,
) -> Scene:
    """A scene of distinct names on a background.

    Args:
        seed: what the scene is drawn from.
        num_things: the numbers of things to choose from.
        names: the names to choose from; in `NAMES`.
        photographs: "seen": those of training. "unseen": the last of several, which is in no training scene; names
            with one photograph are left out.
        side: pixels per side of the picture.
    """
    rng = np.random.default_rng(list(seed))
    if photographs == "unseen":
        names = [name for name in names if len(CUTOUTS[name]) > 1]
    chosen = _choose(rng, int(rng.choice(list(num_things))), names)
    drawings = [_cropped(_part(rng, name, photographs)) for name in chosen]
    pixels, masks = _background(rng, side), []
    for (top, left, height, width), original in zip(_place(rng, drawings, side), drawings, strict=True):
        drawing = original.resize((width, height), Image.Resampling.LANCZOS)
        if rng.random() < 0.5:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        drawn = np.asarray(drawing, dtype=np.float32)
        area = (slice(top, top + height), slice(left, left + width))
        pixels[area] += (drawn[..., :3] - pixels[area]) * drawn[..., 3:] / 255
        mask = np.zeros((side, side), dtype=bool)
        mask[area] = binary_fill_holes(drawn[..., 3] > 127)
        masks.append(mask)
    caption, words = _caption(chosen)
    image = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    return Scene(image, dict(zip(chosen, masks, strict=True)), caption, words)


def _choose(rng: np.random.Generator, count: int, names: Sequence[str]) -> list[str]:
    """Distinct names in random order. Where new and known names are to choose from, half of the draws are new."""
    new, known = ([name for name in names if (name in NEW_NAMES) == is_new] for is_new in (True, False))
    if not new or not known:
        return [str(name) for name in rng.choice(list(names), size=count, replace=False)]
    num_new = int(np.clip(rng.binomial(count, 0.5), 1, count))  # at least one
    chosen = [*rng.choice(new, size=num_new, replace=False), *rng.choice(known, size=count - num_new, replace=False)]
    return [str(chosen[index]) for index in rng.permutation(count)]


def _part(rng: np.random.Generator, name: str, photographs: Photographs) -> str:
    parts = CUTOUTS[name]
    if photographs == "unseen":
        return parts[-1]
    seen = parts[:-1] if len(parts) > 1 else parts
    return seen[int(rng.integers(len(seen)))]


@lru_cache(maxsize=256)
def _cropped(part: str) -> Image.Image:
    drawing = cutout(f"{part}.png")
    return drawing.crop(drawing.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox())


def _place(rng: np.random.Generator, drawings: Sequence[Image.Image], side: int) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of each thing; the boxes do not overlap."""
    while True:
        boxes: list[tuple[int, int, int, int]] = []
        taken = np.zeros((side, side), dtype=bool)
        for original in drawings:
            scale = rng.uniform(SMALLEST, LARGEST) * side / max(original.size)
            height, width = max(8, round(original.height * scale)), max(8, round(original.width * scale))
            top, left = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
            area = (slice(top, top + height), slice(left, left + width))
            if taken[area].any():
                break
            taken[area] = True
            boxes.append((top, left, height, width))
        else:
            return boxes


@cache
def _photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def _background(rng: np.random.Generator, side: int) -> np.ndarray:
    """A random crop of a photograph, float32 (side, side, 3)."""
    photograph = _photograph(BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))])
    cut = int(rng.integers(128, min(photograph.size) + 1))
    left, top = (int(rng.integers(length - cut + 1)) for length in photograph.size)
    crop = photograph.crop((left, top, left + cut, top + cut)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(crop, dtype=np.float32) * rng.uniform(0.6, 1.2)


def _caption(names: Sequence[str]) -> tuple[str, tuple[Word, ...]]:
    """ "a bear, an apple and a mug." and the names' places in it."""
    text, words = "", []
    for index, name in enumerate(names):
        text += "" if index == 0 else " and " if index == len(names) - 1 else ", "
        text += "an " if name[0] in "aeiou" else "a "
        words.append(Word(name, len(text), len(text) + len(name), name, "noun"))
        text += name
    return text + ".", tuple(words)
