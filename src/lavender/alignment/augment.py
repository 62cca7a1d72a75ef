"""Random flips, crops and resizes of pictures in training, and of their maps with them.

This is the only place where a picture and its maps change. A view is drawn for each picture of a sample in each epoch
from the seed, the epoch and the sample alone. So it does not depend on the number of workers, and a run that is resumed
draws the same views.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image
from torch import Tensor

from lavender.data.conversations import text_of
from lavender.maps import to_heat
from lavender.students.image_keys import grid_boxes, overlap_matrix

DRAW = "lavender_draw"
"""Column that tells repeated rows of a data set apart, so that each has a view of its own."""
MIN_SIDE = 64
"""No picture becomes smaller than this on a side, in pixels, unless it is smaller already."""
_SIDES = re.compile(r"(?<![^\W_])(left|right)", re.IGNORECASE)  # of a word's beginning: not "bright"
_HALF = 0.5


@dataclass(frozen=True)
class View:
    """What a student sees of a picture: a part of it, perhaps mirrored and resized.

    Attributes:
        whole: (height, width) of the picture in pixels.
        box: (top, left, bottom, right) of the part in pixels.
        size: (height, width) of the view in pixels.
        mirrored: whether left and right are exchanged.
    """

    whole: tuple[int, int]
    box: tuple[int, int, int, int]
    size: tuple[int, int]
    mirrored: bool

    def picture(self, image: Image.Image) -> Image.Image:
        """The view of the picture. The same pixels if nothing changes."""
        top, left, bottom, right = self.box
        if self.box != (0, 0, *self.whole):
            image = image.crop((left, top, right, bottom))
        if self.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        height, width = self.size
        return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)

    def shows(self, heat: Tensor) -> bool:
        """Whether at least half of a map's place is in the view: of the cells with at least half of its maximum."""
        place = (heat >= _HALF * heat.max()).float()
        top, left, bottom, right = self._shares()
        down, across = _overlaps(self._shares(), heat.shape[0], heat.shape[1])
        # the shares of the map's rows, and of its columns, that are in the view
        rows, cols = down.sum(dim=0) * (bottom - top), across.sum(dim=0) * (right - left)
        return bool(rows @ place @ cols >= _HALF * place.sum())

    def map(self, heat: Tensor) -> Tensor:
        """A map of the view, on the same grid: (rows, cols) whose maximum is 1. Each cell is a mean over its area."""
        if self.box != (0, 0, *self.whole):
            down, across = _overlaps(self._shares(), heat.shape[0], heat.shape[1])
            heat = to_heat(down @ heat @ across.T)
        return heat.flip(-1) if self.mirrored else heat

    def _shares(self) -> tuple[float, float, float, float]:
        """The box in shares of the picture's height and width."""
        (height, width), (top, left, bottom, right) = self.whole, self.box
        return top / height, left / width, bottom / height, right / width


class Augment:
    """Draws a view of each picture of a sample.

    Args:
        flip: probability of mirroring a picture. A sample whose texts have "left" or "right" is never mirrored.
        crop: the smallest share of its height and width that a random crop keeps; 1 for no crop.
        resize: the smallest factor by which a picture is scaled; 1 for no resize.
        seed: of the draws.

    Attributes:
        epoch: the number of the epoch. It is in shared memory, so workers of data loaders see each change.
    """

    def __init__(self, flip: float, crop: float, resize: float, seed: int):
        self._flip, self._crop, self._resize, self._seed = flip, crop, resize, seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def views(
        self, images: Sequence[Image.Image], identities: Sequence[str], messages: Sequence[Mapping], draw: int | None
    ) -> list[View]:
        """A view of each picture.

        Args:
            images: the whole pictures.
            identities: the `image_id` of each.
            messages: the conversation.
            draw: a number that tells samples of the same content apart.
        """
        texts = [text_of(message.get("content")) for message in messages]
        has_sides = any(_SIDES.search(text) for text in texts)
        views = []
        for index, image in enumerate(images):
            key = json.dumps([self._seed, int(self.epoch), draw, index, *identities, *texts]).encode()
            chance = random.Random(hashlib.blake2b(key, digest_size=16).digest())
            views.append(self._view((image.height, image.width), chance, may_mirror=not has_sides))
        return views

    def _view(self, whole: tuple[int, int], chance: random.Random, may_mirror: bool) -> View:
        mirrored = chance.random() < self._flip and may_mirror
        kept = _scaled(whole, chance.uniform(self._crop, 1))
        top, left = (chance.randint(0, side - part) for side, part in zip(whole, kept, strict=True))
        size = _scaled(kept, chance.uniform(self._resize, 1))
        return View(whole, (top, left, top + kept[0], left + kept[1]), size, mirrored)


@lru_cache(maxsize=64)
def _overlaps(box: tuple[float, float, float, float], rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """The share of each row of a box that lies in each row of the picture, (rows, rows), and the same of columns.

    A cell's share is the product of the two; a matrix for cells would have (rows · cols)² numbers.
    """
    top, left, bottom, right = box
    down = overlap_matrix(grid_boxes(rows, 1, (top, 0.0, bottom, 1.0)), (rows, 1))
    return down, overlap_matrix(grid_boxes(1, cols, (0.0, left, 1.0, right)), (1, cols))


def _scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """(height, width) scaled by this factor from 0 to 1, or by the one at which the shorter side is `MIN_SIDE`."""
    factor = max(factor, min(1, MIN_SIDE / min(size)))
    return round(size[0] * factor), round(size[1] * factor)
