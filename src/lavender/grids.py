"""Which part of the picture each image key covers, and the matrix that turns keys into a map.

Every image key has a box in the picture's own frame: (top, left, bottom, right) as shares of its
height and width, so the whole picture is (0, 0, 1, 1). Keys that show no part of it (class tokens,
newlines, padding tiles) have an empty box. A map is then `attention @ overlap`, one differentiable
product that handles tiles, padding, crops and thumbnails alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

EMPTY_BOX = (0.0, 0.0, 0.0, 0.0)


class KeyLayout(NamedTuple):
    """What each image key of a batch shows.

    Attributes:
        boxes: float32 (sample, key, 4): the key's box as shares of its own picture, empty where it shows none of it.
            Where `views` is given: (view, patch, 4), the boxes of a resampler's patches.
        pictures: long (sample, key): the index of the key's picture within its sample, -1 for padding.
        views: long (sample, key), of models whose keys are a resampler's latents; else None. A view is what the
            resampler turns into latents at once (a picture or a crop of one); the index is that of its first axis,
            over the whole batch, and -1 for padding. A view's latents are its keys in their order.
    """

    boxes: Tensor
    pictures: Tensor
    views: Tensor | None = None


def key_layout(boxes: Sequence[Sequence[Tensor]]) -> KeyLayout:
    """The layout of a batch from the boxes of each sample's pictures, each (key, 4), in the order of the keys."""
    samples = [torch.cat([torch.zeros(0, 4), *(one.float() for one in own)]) for own in boxes]
    pictures = [
        torch.arange(len(own)).repeat_interleave(torch.tensor([len(one) for one in own], dtype=torch.long))
        for own in boxes
    ]
    return KeyLayout(
        pad_sequence(samples, batch_first=True), pad_sequence(pictures, batch_first=True, padding_value=-1)
    )


def overlap_matrix(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of each key's box that lies in each cell of the grid.

    Args:
        boxes: float (key, 4) as above. Parts outside the picture count as outside.
        grid: (rows, cols).

    Returns:
        Float32 (key, rows·cols). A row sums to the share of its box inside the picture, to 0 for an
        empty box; so `attention @ overlap` keeps the attention's mass on the picture.
    """
    rows, cols = grid
    top, left, bottom, right = boxes.double().unbind(dim=-1)
    down = _overlap_1d(top, bottom, rows)
    across = _overlap_1d(left, right, cols)
    return (down[:, :, None] * across[:, None, :]).flatten(1).float()


def _overlap_1d(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """Share of the interval [start, end) in each of `cells` equal cells of [0, 1): (key, cells)."""
    edges = torch.linspace(0, 1, cells + 1, dtype=start.dtype)
    common = torch.minimum(end[:, None], edges[1:]) - torch.maximum(start[:, None], edges[:-1])
    length = end - start
    return common.clamp_min(0) / torch.where(length > 0, length, 1)[:, None]


def grid_boxes(rows: int, cols: int, frame: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)) -> Tensor:
    """Boxes of a row-major grid of patches that fills `frame`: float64 (rows·cols, 4)."""
    top, left, bottom, right = frame
    down = torch.linspace(top, bottom, rows + 1, dtype=torch.float64)
    across = torch.linspace(left, right, cols + 1, dtype=torch.float64)
    return torch.stack(
        [
            down[:-1, None].expand(rows, cols),
            across[None, :-1].expand(rows, cols),
            down[1:, None].expand(rows, cols),
            across[None, 1:].expand(rows, cols),
        ],
        dim=-1,
    ).flatten(0, 1)
