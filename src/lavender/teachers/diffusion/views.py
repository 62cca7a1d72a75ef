"""How a picture comes to the teacher, and how maps come back into the frame of the whole picture.

A view is the part of the picture that the teacher sees, a box (top, left, bottom, right) in shares of the
picture's height and width: (0, 0, 1, 1) is the whole, a crop lies inside, padding reaches beyond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lavender.config import Geometry

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
PADDING = (128, 128, 128)


@dataclass(frozen=True, eq=False)
class Frame:
    """What the teacher sees of a picture.

    Attributes:
        pixels: uint8 (height, width, 3).
        view: the part of the picture that they show.
    """

    pixels: np.ndarray
    view: Box

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def mirrored(self) -> Frame:
        """The same of the picture seen in a mirror."""
        top, left, bottom, right = self.view
        return Frame(self.pixels[:, ::-1], (top, 1 - right, bottom, 1 - left))


def frame(image: Image.Image, geometry: Geometry, side: int, unit: int, longest: int) -> Frame:
    """Bring a picture to the teacher.

    Args:
        geometry: "squash" to a square; the central square ("crop"); padded to a square ("letterbox"); or "aspect",
            about as many pixels in the picture's own shape, sides rounded to `unit`.
        side: of the square, in pixels.
        longest: no side of "aspect" is longer, in pixels; a picture of a more extreme shape is squashed.
    """
    width, height = image.size
    if geometry == "aspect":
        scale = side / (width * height) ** 0.5
        shape = [min(max(unit, round(length * scale / unit) * unit), longest) for length in (width, height)]
        return Frame(_resized(image, shape[0], shape[1]), WHOLE)
    if geometry == "squash":
        return Frame(_resized(image, side, side), WHOLE)
    if geometry == "crop":
        short = min(width, height)
        left, top = (width - short) / 2, (height - short) / 2
        seen = image.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + short, top + short))
        return Frame(np.asarray(seen), (top / height, left / width, (top + short) / height, (left + short) / width))
    long = max(width, height)
    inside = max(1, round(side * width / long)), max(1, round(side * height / long))
    left, top = (side - inside[0]) // 2, (side - inside[1]) // 2
    canvas = Image.new("RGB", (side, side), PADDING)
    canvas.paste(image.resize(inside, Image.Resampling.BILINEAR), (left, top))
    view = -top / inside[1], -left / inside[0], (side - top) / inside[1], (side - left) / inside[0]
    return Frame(np.asarray(canvas), view)


def lay(maps_BWrc: Tensor, views: Sequence[Box], grid: tuple[int, int]) -> Tensor:
    """Maps of the teacher's views on the grid of the whole pictures, bilinear; 0 where a picture is not seen."""
    if all(view == WHOLE for view in views):
        return F.interpolate(maps_BWrc, size=grid, mode="bilinear", align_corners=False)
    inverse = [
        (-top / (bottom - top), -left / (right - left), (1 - top) / (bottom - top), (1 - left) / (right - left))
        for top, left, bottom, right in views
    ]
    return _sampled(maps_BWrc, inverse, grid)


def from_picture(maps_BWrc: Tensor, views: Sequence[Box], grid: tuple[int, int]) -> Tensor:
    """The way back: maps of whole pictures as the teacher's views see them, 0 in padding."""
    if all(view == WHOLE for view in views):
        return F.interpolate(maps_BWrc, size=grid, mode="bilinear", align_corners=False)
    return _sampled(maps_BWrc, views, grid)


def _resized(image: Image.Image, width: int, height: int) -> np.ndarray:
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def _sampled(maps_BWrc: Tensor, boxes: Sequence[Box], grid: tuple[int, int]) -> Tensor:
    """Each row's map, read at the cell centres of a grid over a box (in shares of the map); 0 outside the map."""
    places = []
    for top, left, bottom, right in boxes:
        down = top + (torch.arange(grid[0], dtype=torch.float64) + 0.5) / grid[0] * (bottom - top)
        across = left + (torch.arange(grid[1], dtype=torch.float64) + 0.5) / grid[1] * (right - left)
        places.append(torch.stack([across.expand(grid), down[:, None].expand(grid)], dim=-1))
    places_BrcX = torch.stack(places).to(maps_BWrc.device)
    sampled = F.grid_sample(
        maps_BWrc, (2 * places_BrcX - 1).to(maps_BWrc.dtype), padding_mode="border", align_corners=False
    )
    inside = ((places_BrcX > 0) & (places_BrcX < 1)).all(dim=-1)
    return sampled * inside[:, None]
