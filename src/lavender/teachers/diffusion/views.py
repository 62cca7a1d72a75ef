"""Views: the part of a picture that the teacher sees, and the way of its maps back to the whole picture.

A box is (top, left, bottom, right) in shares of the picture's height and width. (0, 0, 1, 1) is the whole picture; a
crop lies inside it, and padding reaches beyond it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
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
    """Resample maps of views to maps of the whole pictures: bilinearly, or where a side shrinks by area means.

    Args:
        maps_BWrc: (row, word, rows, cols), one view per row.
        boxes: per row, the box of its view.
        grid: (rows, cols) of the result.

    Returns:
        (row, word, *grid); 0 where the view does not show the picture.
    """
    if all(box == WHOLE for box in boxes):
        return _sample_boxes(maps_BWrc, [WHOLE], grid)
    inverse = [
        (-top / (bottom - top), -left / (right - left), (1 - top) / (bottom - top), (1 - left) / (right - left))
        for top, left, bottom, right in boxes
    ]
    return _sample_boxes(maps_BWrc, inverse, grid)


def resample_to_view(maps_BWrc: Tensor, boxes: Sequence[Box], grid: tuple[int, int]) -> Tensor:
    """The inverse of `resample_to_picture`: maps of whole pictures become maps of their views, 0 in padding."""
    if all(box == WHOLE for box in boxes):
        return _sample_boxes(maps_BWrc, [WHOLE], grid)
    return _sample_boxes(maps_BWrc, boxes, grid)


def _resized(image: Image.Image, width: int, height: int) -> np.ndarray:
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def _sample_boxes(maps_BWrc: Tensor, boxes: Sequence[Box], grid: tuple[int, int]) -> Tensor:
    """Each row's map on a grid over its box (in shares of the map), or over the only box; 0 outside the map."""
    rows, cols = maps_BWrc.shape[-2:]
    down_BRr = torch.stack([_axis_weights(top, bottom, rows, grid[0]) for top, _, bottom, _ in boxes]).to(maps_BWrc)
    across_BCc = torch.stack([_axis_weights(left, right, cols, grid[1]) for _, left, _, right in boxes]).to(maps_BWrc)
    return down_BRr[:, None] @ maps_BWrc @ across_BCc[:, None].mT


def _axis_weights(low: float, high: float, source: int, target: int) -> Tensor:
    """The weights of a map's cells along an axis in each cell of the result: float64 (target, source).

    Args:
        low, high: where the result begins and ends, in shares of the map.
    """
    ends = (low + torch.arange(target + 1, dtype=torch.float64) / target * (high - low)) * source
    first, last, cells = ends[:-1, None], ends[1:, None], torch.arange(source, dtype=torch.float64)
    middle = (first + last) / 2
    if (high - low) * source > target:  # a point between two cells would pass over others
        weights = (torch.minimum(last, cells + 1) - torch.maximum(first, cells)).clamp_min(0)
    else:
        weights = (1 - ((middle - 0.5).clamp(0, source - 1) - cells).abs()).clamp_min(0)
    is_inside = (middle > 0) & (middle < source)
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-12) * is_inside
