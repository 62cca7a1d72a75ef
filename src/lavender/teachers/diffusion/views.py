"""Views: the part of a picture that the teacher sees, and the way of its maps back to the whole picture.

A box is (top, left, bottom, right) in shares of the picture's height and width. (0, 0, 1, 1) is the whole picture; a
crop lies inside it, and padding reaches beyond it.
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
"""(top, left, bottom, right) in shares of the picture's height and width."""
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
PADDING = (128, 128, 128)
"""The RGB colour of the padding that "letterbox" adds."""


@dataclass(frozen=True, eq=False)
class View:
    """What the teacher sees of a picture.

    Attributes:
        pixels: uint8 (height, width, 3), RGB.
        box: the part of the picture that the pixels show.
    """

    pixels: np.ndarray
    box: Box

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def mirrored(self) -> View:
        """The same view of the picture flipped from left to right."""
        top, left, bottom, right = self.box
        return View(self.pixels[:, ::-1], (top, 1 - right, bottom, 1 - left))


def view_of(image: Image.Image, geometry: Geometry, side: int, unit: int, longest: int) -> View:
    """Resize, crop or pad a picture to what the teacher sees.

    Args:
        image: RGB.
        geometry: "squash" resizes to a square, "crop" takes the central square, and "letterbox" pads to a square.
            "aspect" keeps the picture's shape, with about as many pixels as the square and sides rounded to `unit`.
        side: height and width of the square, in pixels.
        unit: with "aspect", sides are multiples of this, in pixels.
        longest: with "aspect", the longest side allowed, in pixels; a more elongated picture is squashed.
    """
    width, height = image.size
    if geometry == "aspect":
        scale = side / (width * height) ** 0.5
        shape = [min(max(unit, round(length * scale / unit) * unit), longest) for length in (width, height)]
        return View(_resized(image, shape[0], shape[1]), WHOLE)
    if geometry == "squash":
        return View(_resized(image, side, side), WHOLE)
    if geometry == "crop":
        short = min(width, height)
        left, top = (width - short) / 2, (height - short) / 2
        square = image.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + short, top + short))
        return View(np.asarray(square), (top / height, left / width, (top + short) / height, (left + short) / width))
    long = max(width, height)
    inside = max(1, round(side * width / long)), max(1, round(side * height / long))
    left, top = (side - inside[0]) // 2, (side - inside[1]) // 2
    canvas = Image.new("RGB", (side, side), PADDING)
    canvas.paste(image.resize(inside, Image.Resampling.BILINEAR), (left, top))
    box = -top / inside[1], -left / inside[0], (side - top) / inside[1], (side - left) / inside[0]
    return View(np.asarray(canvas), box)


def resample_to_picture(maps_BWrc: Tensor, boxes: Sequence[Box], grid: tuple[int, int]) -> Tensor:
    """Resample maps of views to maps of the whole pictures, bilinearly.

    Args:
        maps_BWrc: (row, word, rows, cols), one view per row.
        boxes: per row, the box of its view.
        grid: (rows, cols) of the result.

    Returns:
        (row, word, *grid); 0 where the view does not show the picture.
    """
    if all(box == WHOLE for box in boxes):
        return F.interpolate(maps_BWrc, size=grid, mode="bilinear", align_corners=False)
    inverse = [
        (-top / (bottom - top), -left / (right - left), (1 - top) / (bottom - top), (1 - left) / (right - left))
        for top, left, bottom, right in boxes
    ]
    return _sample_boxes(maps_BWrc, inverse, grid)


def resample_to_view(maps_BWrc: Tensor, boxes: Sequence[Box], grid: tuple[int, int]) -> Tensor:
    """The inverse of `resample_to_picture`: maps of whole pictures become maps of their views, 0 in padding."""
    if all(box == WHOLE for box in boxes):
        return F.interpolate(maps_BWrc, size=grid, mode="bilinear", align_corners=False)
    return _sample_boxes(maps_BWrc, boxes, grid)


def _resized(image: Image.Image, width: int, height: int) -> np.ndarray:
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def _sample_boxes(maps_BWrc: Tensor, boxes: Sequence[Box], grid: tuple[int, int]) -> Tensor:
    """Read each row's map at the cell centres of a grid over its box (in shares of the map); 0 outside the map."""
    places = []
    for top, left, bottom, right in boxes:
        down = top + (torch.arange(grid[0], dtype=torch.float64) + 0.5) / grid[0] * (bottom - top)
        across = left + (torch.arange(grid[1], dtype=torch.float64) + 0.5) / grid[1] * (right - left)
        places.append(torch.stack([across.expand(grid), down[:, None].expand(grid)], dim=-1))
    places_BrcX = torch.stack(places)  # of 64 bits, which MPS does not have
    points_BrcX = (2 * places_BrcX - 1).to(maps_BWrc.dtype).to(maps_BWrc.device)
    sampled = F.grid_sample(maps_BWrc, points_BrcX, padding_mode="border", align_corners=False)
    inside = ((places_BrcX > 0) & (places_BrcX < 1)).all(dim=-1).to(maps_BWrc.device)
    return sampled * inside[:, None]
