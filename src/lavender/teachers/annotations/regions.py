"""Parts of a picture and their exact share of each cell of a grid.

Legend of axis suffixes: D intervals from the top down, A intervals across, R rows, C columns.
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
"""(left, top, right, bottom) in pixels from the top left corner; half-open."""


@dataclass(frozen=True, eq=False)
class Region:
    """Part of a picture, as rectangles of a raster that are covered or not.

    Attributes:
        covered: bool (down, across).
        down: (down + 1,) rising edges of the raster in pixels from the top.
        across: (across + 1,) rising edges in pixels from the left.
    """

    covered: np.ndarray
    down: np.ndarray
    across: np.ndarray


def mask_region(mask: np.ndarray) -> Region:
    """The pixels of a mask, bool (height, width)."""
    height, width = mask.shape
    return Region(mask, np.arange(height + 1), np.arange(width + 1))


def box_region(boxes: Sequence[PixelBox], size: Size) -> Region:
    """The union of boxes, cut at the borders of the picture."""
    height, width = size
    cut_NX = np.clip(np.asarray(boxes, dtype=np.float64).reshape(-1, 4), 0, (width, height, width, height))
    across, down = np.unique(cut_NX[:, [0, 2]]), np.unique(cut_NX[:, [1, 3]])
    covered = np.zeros((max(len(down) - 1, 0), max(len(across) - 1, 0)), dtype=bool)
    for left, top, right, bottom in cut_NX:
        covered |= ((down[:-1] >= top) & (down[1:] <= bottom))[:, None] & (
            (across[:-1] >= left) & (across[1:] <= right)
        )
    return Region(covered, down, across)


def turn_upright(region: Region, size: Size, orientation: int) -> Region:
    """A region of a picture as its file stores it, in the frame of the upright picture.

    Args:
        size: of the stored picture.
        orientation: EXIF orientation that swaps height and width, 5 to 8; with another the region stays.
    """
    if orientation not in (5, 6, 7, 8):
        return region
    width, height = size  # those of the upright picture
    covered, down, across = region.covered.T, region.across, region.down
    if orientation in (7, 8):
        covered, down = covered[::-1], height - down[::-1]
    if orientation in (6, 7):
        covered, across = covered[:, ::-1], width - across[::-1]
    return Region(covered, down, across)


def cell_shares(region: Region, size: Size, grid: tuple[int, int]) -> Tensor:
    """The covered share of each cell's area, float32 (rows, cols) in [0, 1].

    Exact: a pixel or box edge inside a cell counts by the part that lies there, whether or not the grid divides the
    picture's size.

    Args:
        size: of the picture that the region lies in.
        grid: (rows, cols) over the whole picture.
    """
    down_RD = _shares_1d(region.down, size[0], grid[0])
    across_CA = _shares_1d(region.across, size[1], grid[1])
    shares_RC = down_RD @ region.covered.astype(np.float64) @ across_CA.T
    return torch.from_numpy(shares_RC).float().clamp(0, 1)


def _shares_1d(edges: np.ndarray, length: int, cells: int) -> np.ndarray:
    """Share of each cell of [0, length) that each interval between two edges covers, (cell, interval)."""
    # In units of 1 / cells pixel the edges of pixels and of cells are whole numbers, so the differences are exact.
    start, end = edges[:-1] * cells, edges[1:] * cells
    cell = np.arange(cells)[:, None] * length
    return (np.minimum(end, cell + length) - np.maximum(start, cell)).clip(0) / length
