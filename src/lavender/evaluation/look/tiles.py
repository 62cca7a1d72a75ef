"""Maps as small pictures for a page, and what a reader is told about each: its level and its place.

A page holds a map per word, layer and head. They are stored as grey PNG files of 8 bits, each divided by its own
maximum, in one picture (an atlas) per word. The page colours them.

Axis suffixes: W word, L layer, H head; index 0 of a view's layers and heads is their mean.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lavender.drawing import downscaled, heat_colours
from lavender.maps import to_heat

MAX_BYTES = 10_000_000
"""The most bytes of a page."""
REGION = 0.5
"""The brightest region of a map: the cells with at least this share of the map's maximum."""
MAX_MAP_BYTES = 9_200_000
"""The most bytes of maps in a page, with the numbers that go with each."""
DETAIL_GRIDS = (32, 24, 16, 12, 8)
"""Grids to try, finest first, for the maps of a single head in a single layer: all of them must fit into the page."""
PHOTO_SIDE = 800
"""Longest side of the photograph in a page, in pixels."""
_NUMBER_BYTES = 34  # the six numbers of a map, as text
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


@dataclass(frozen=True, eq=False)
class Levels:
    """What is told about maps, each an array of the maps' leading axes.

    Attributes:
        placed: share of the attention that lies in a place of the picture; of a teacher's map, nothing to tell: 1.
        region: share of the attention that lies in the map's brightest region, see `REGION`.
        area: the region's share of the picture.
        top: the largest value of a cell.
        peak: index of this cell, row by row. Of equal cells, such as those of one image key, the one in their middle.
    """

    placed: np.ndarray
    region: np.ndarray
    area: np.ndarray
    top: np.ndarray
    peak: np.ndarray


def levels_of(maps: Tensor) -> Levels:
    """The levels of maps (…, rows, cols), whose cells hold shares of the attention.

    Examples:
        >>> import torch
        >>> levels = levels_of(torch.tensor([[0.4, 0.1], [0.3, 0.0]]))
        >>> [round(float(value), 2) for value in (levels.placed, levels.region, levels.area, levels.top)]
        [0.8, 0.7, 0.5, 0.4]
    """
    flat = maps.double().flatten(-2)
    top = flat.amax(dim=-1)
    single = maps.double().reshape(-1, 1, *maps.shape[-2:])
    around = (
        torch.stack([F.avg_pool2d(single, side, 1, side // 2) for side in (3, 5, 7)]).sum(dim=0).reshape(flat.shape)
    )
    peak = torch.where(flat >= top[..., None] * (1 - 1e-6), around, -1.0).argmax(dim=-1)
    is_bright = (flat >= REGION * top[..., None]) & (flat > 0)
    region, area = (flat * is_bright).sum(dim=-1), is_bright.double().mean(dim=-1)
    return Levels(*(part.numpy() for part in (flat.sum(dim=-1), region, area, top, peak)))


def with_means(maps_LH: Tensor) -> Tensor:
    """Maps (layer, head, …) with the means over layers and over heads in front: (1 + layer, 1 + head, …)."""
    with_layers = torch.cat([maps_LH.mean(dim=0, keepdim=True), maps_LH])
    return torch.cat([with_layers.mean(dim=1, keepdim=True), with_layers], dim=1)


def place_of(peak: int, grid: tuple[int, int]) -> str:
    """Where a cell of a grid (rows, cols) is, in words and in per cent of the picture.

    Examples:
        >>> place_of(9, (4, 4))
        'centre, 38 % from left and 63 % from top'
        >>> place_of(0, (1, 1))
        'centre, 50 % from left and 50 % from top'
    """
    down, across = ((index + 0.5) / side for index, side in zip(divmod(peak, grid[1]), grid, strict=True))
    row, column = _ROWS[int(3 * down)], _COLUMNS[int(3 * across)]
    name = "centre" if (row, column) == ("middle", "centre") else f"{row} {column}"
    left, top = (int(100 * share + 0.5) for share in (across, down))
    return f"{name}, {left} % from left and {top} % from top"


def detail_grid(num_words: int, num_layers: int, num_heads: int, grid: tuple[int, int]) -> tuple[int, int] | None:
    """The finest grid on which the maps of every head in every layer fit into a page; None if none does."""
    summaries = num_words * (1 + num_layers + num_heads) * _tile_bytes(grid)
    for side in DETAIL_GRIDS:
        detail = min(side, grid[0]), min(side, grid[1])
        if num_words * num_layers * num_heads * _tile_bytes(detail) + summaries <= MAX_MAP_BYTES:
            return detail
    return None


def _tile_bytes(grid: tuple[int, int]) -> float:
    """The most bytes of a map in a page: a byte per cell, a third more as text; and its numbers."""
    return 4 / 3 * grid[0] * grid[1] + _NUMBER_BYTES


def grey(maps: Tensor) -> np.ndarray:
    """Maps (…, rows, cols) as uint8, each divided by its maximum."""
    return (255 * to_heat(maps.double().clamp_min(0))).round().to(torch.uint8).numpy()


def atlas(maps: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
    """Maps (tile, rows, cols) as one grey PNG, on a coarser or the same grid.

    Returns:
        `src`, a data address; `columns`, the number of tiles per row; `grid`. Tiles go row by row.
    """
    tiles = grey(F.adaptive_avg_pool2d(maps.double()[:, None], grid)[:, 0])
    columns = max(1, round(math.sqrt(len(tiles))))
    rows = -(-len(tiles) // columns)
    padded = np.zeros((rows * columns, *grid), dtype=np.uint8)
    padded[: len(tiles)] = tiles
    picture = padded.reshape(rows, columns, *grid).swapaxes(1, 2).reshape(rows * grid[0], columns * grid[1])
    return {"src": png_uri(Image.fromarray(picture)), "columns": columns, "grid": list(grid)}


def palette() -> list[int]:
    """The colours of the 256 values of a map: red, green, blue and opacity of each, from 0 to 255."""
    return heat_colours(np.linspace(0, 1, 256)).flatten().tolist()


def coloured(heat: Tensor, grid: tuple[int, int] | None = None) -> str:
    """A map (rows, cols) as a small PNG in colours, to be stretched over the picture; a data address.

    Args:
        heat: non-negative.
        grid: (rows, cols) to resize it to; None for its own.
    """
    if grid is not None:
        heat = F.interpolate(heat.double()[None, None], size=grid, mode="bilinear", align_corners=False)[0, 0]
    picture = Image.fromarray(grey(heat))
    colours = heat_colours(np.linspace(0, 1, 256))
    picture.putpalette(colours[:, :3].flatten().tolist())
    return png_uri(picture, transparency=bytes(colours[:, 3].tolist()))


def png_uri(image: Image.Image, **settings: Any) -> str:
    """A picture as the data address of a PNG."""
    return _uri(image, "PNG", optimize=True, **settings)


def photo_uri(image: Image.Image, side: int = PHOTO_SIDE, quality: int = 85) -> str:
    """A photograph as the data address of a JPEG, its longest side at most `side` pixels."""
    return _uri(downscaled(image, side), "JPEG", quality=quality)


def _uri(image: Image.Image, kind: str, **settings: Any) -> str:
    buffer = BytesIO()
    image.save(buffer, kind, **settings)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
