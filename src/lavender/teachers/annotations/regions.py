"""Regions of an image, and the exact share of each grid cell that they cover.

Axis suffixes: D intervals from the top down, A intervals across, R rows, C columns, N boxes, X edges of a box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, int]
"""(height, width) in pixels."""
PixelBox = tuple[float, float, float, float]
"""(top, left, bottom, right) in pixels from the top left corner; half-open."""


@dataclass(frozen=True, eq=False)
class Region:
    """Part of an image, as the covered cells of a raster with edges at any place.

    Attributes:
        covered: bool (down, across), whether each cell belongs to the region.
        down: (down + 1,) rising edges of the raster in pixels from the top.
        across: (across + 1,) rising edges in pixels from the left.
    """

    covered: np.ndarray
    down: np.ndarray
    across: np.ndarray


def mask_region(mask: np.ndarray) -> Region:
    """The region of the true pixels of a mask, bool (height, width)."""
    height, width = mask.shape
    return Region(mask, np.arange(height + 1), np.arange(width + 1))


def box_region(boxes: Sequence[PixelBox], size: Size) -> Region:
    """The union of boxes, cut at the borders of an image of (height, width)."""
    height, width = size
    cut_NX = np.clip(np.asarray(boxes, dtype=np.float64).reshape(-1, 4), 0, (height, width, height, width))
    down, across = np.unique(cut_NX[:, [0, 2]]), np.unique(cut_NX[:, [1, 3]])
    covered = np.zeros((max(len(down) - 1, 0), max(len(across) - 1, 0)), dtype=bool)
    for top, left, bottom, right in cut_NX:
        covered |= ((down[:-1] >= top) & (down[1:] <= bottom))[:, None] & (
            (across[:-1] >= left) & (across[1:] <= right)
        )
    return Region(covered, down, across)


def turn_upright(region: Region, size: Size, orientation: int) -> Region:
    """Turn a region of a stored image to the same place of the upright image.

    Args:
        region: a region of the image as its file stores it.
        size: (height, width) of the stored image in pixels.
        orientation: EXIF orientation. The region is unchanged unless it swaps height and width (5 to 8).
    """
    if orientation not in (5, 6, 7, 8):
        return region
    width, height = size  # of the upright image
    covered, down, across = region.covered.T, region.across, region.down
    if orientation in (7, 8):
        covered, down = covered[::-1], height - down[::-1]
    if orientation in (6, 7):
        covered, across = covered[:, ::-1], width - across[::-1]
    return Region(covered, down, across)


def cell_shares(region: Region, size: Size, grid: tuple[int, int]) -> Tensor:
    """The covered share of each cell's area, float32 (rows, cols) in [0, 1].

    The shares are exact, also where a pixel or box only partly lies in a cell.

    Args:
        region: a region of an image.
        size: (height, width) of the image in pixels.
        grid: (rows, cols) over the whole image.
    """
    down_RD = _shares_1d(region.down, size[0], grid[0])
    across_CA = _shares_1d(region.across, size[1], grid[1])
    shares_RC = down_RD @ region.covered.astype(np.float64) @ across_CA.T
    return torch.from_numpy(shares_RC).float().clamp(0, 1)


def _shares_1d(edges: np.ndarray, length: int, cells: int) -> np.ndarray:
    """The share of each of `cells` equal cells of [0, length) that each interval covers, (cell, interval)."""
    # In units of 1 / cells pixels, the edges of pixels and cells are integers, so their differences are exact.
    start, end = edges[:-1] * cells, edges[1:] * cells
    cell = np.arange(cells)[:, None] * length
    return (np.minimum(end, cell + length) - np.maximum(start, cell)).clip(0) / length
