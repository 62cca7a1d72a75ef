"""Scenes with a sign to read: a board with one short word on it, and at most two things beside it.

The letters are DejaVu Sans Bold, which Matplotlib ships. No weights of the built-in world are trained on signs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lavender.world.language import Mention, Question
from lavender.world.scenes import Scene, Thing, place_things, random_background, split_of
from lavender.world.sprites import NAMES

WORDS = (
    *("stop", "open", "exit", "taxi", "bank", "cafe", "shop", "hotel", "park", "zoo", "farm", "milk"),
    *("bread", "fruit", "books", "toys", "sale", "east", "west", "north", "south", "slow", "road", "beach"),
    *("pool", "gym", "post", "king", "menu", "tea", "soup", "rice", "film", "jazz", "quiet", "vote"),
    *("news", "lost", "keys", "wash", "cold", "hot", "up", "down", "push", "pull", "mind", "gap"),
)
"""What signs say. None is a name of a thing."""
WITHHELD_WORDS = WORDS[3::4]
"""Every fourth word. No sign of the fine-tuning split says one: who reads these reads letters."""
SIGN_QUESTION = "what does the sign say?"
FONT_SIZES = (11, 13)  # pixels, the smallest and the largest
_STREAM = 83
_MARGIN = 3  # pixels between the letters and the board's edge
_PLACES = 40  # places that are tried before the scene is drawn anew
_BOARDS = (((20, 90, 60), (250, 250, 250)), ((200, 30, 30), (250, 250, 250)), ((250, 220, 60), (15, 15, 15)))
_BOARDS += (((245, 245, 245), (20, 20, 20)), ((30, 60, 150), (250, 250, 250)))
"""(Colour of the board, colour of the letters), RGB."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SignScene(Scene):
    """A scene of at most two things and a sign that hides none of them.

    Attributes:
        word: what the sign says, in lower case. It is drawn in capitals.
        board: the sign, bool (height, width) of the picture.
    """

    word: str
    board: np.ndarray

    def mask_of(self, name: str) -> np.ndarray:
        """The board for the sign's word, otherwise the mask of the thing of this name: bool (height, width)."""
        return self.board if name == self.word else super().mask_of(name)


def draw_sign(seed: int) -> SignScene:
    """The scene of a seed with a sign. It has other things than the plain scene of that seed.

    Raises:
        ValueError: the seed is in no split.
    """
    words = [word for word in WORDS if word not in WITHHELD_WORDS] if split_of(seed) == "finetune" else WORDS
    rng = np.random.default_rng([seed, _STREAM])
    background = random_background(rng)
    word = str(rng.choice(words))
    sign = _drawn(word, int(rng.integers(FONT_SIZES[0], FONT_SIZES[1] + 1)), int(rng.integers(len(_BOARDS))))
    names = [str(name) for name in rng.choice(list(NAMES), size=int(rng.integers(3)), replace=False)]
    while True:
        pixels, things = place_things(rng, background, names, ["twemoji"] * len(names))
        corner = _free_corner(rng, things, pixels.shape[:2], sign.shape[:2])
        if corner is not None:
            break
    rows, columns = (slice(start, start + size) for start, size in zip(corner, sign.shape[:2], strict=True))
    pixels[rows, columns] = sign
    board = np.zeros(pixels.shape[:2], dtype=bool)
    board[rows, columns] = True
    return SignScene(seed, "plain", pixels, things, word=word, board=board)


def ask_to_read(scene: SignScene) -> Question:
    """ "what does the sign say?" → "exit". The form is "read", or "read a withheld word"."""
    form = "read a withheld word" if scene.word in WITHHELD_WORDS else "read"
    return Question(form, SIGN_QUESTION, scene.word, scene.word)


def mention_of(scene: SignScene) -> Mention:
    """The sign's word in the answer, which is this word alone."""
    return Mention(scene.word, 0, len(scene.word), 0)


def _free_corner(
    rng: np.random.Generator, things: tuple[Thing, ...], picture: tuple[int, int], size: tuple[int, int]
) -> tuple[int, int] | None:
    """(top, left) of a place for the board where no thing is; None if none of some random places is free."""
    for _ in range(_PLACES):
        top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip(picture, size, strict=True))
        if not any(thing.mask[top : top + size[0], left : left + size[1]].any() for thing in things):
            return top, left
    return None


@lru_cache(maxsize=512)
def _drawn(word: str, font_size: int, colours: int) -> np.ndarray:
    """A board with a border and the word in capitals: uint8 (height, width, 3)."""
    path = files("matplotlib").joinpath("mpl-data", "fonts", "ttf", "DejaVuSans-Bold.ttf")
    font = ImageFont.truetype(str(path), font_size)
    left, top, right, bottom = font.getbbox(word.upper())
    size = round(right - left) + 2 * _MARGIN, round(bottom - top) + 2 * _MARGIN
    board, letters = _BOARDS[colours]
    canvas = Image.new("RGB", size, board)
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=letters)
    pen.text((_MARGIN - left, _MARGIN - top), word.upper(), fill=letters, font=font)
    return np.asarray(canvas)
