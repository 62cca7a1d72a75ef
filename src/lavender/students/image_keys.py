"""The box of each image key in its picture, and the resampling of attention on keys to a grid over the picture.

A box is (top, left, bottom, right) as shares of the picture's height and width. The whole picture is (0, 0, 1, 1).
Keys that show no part of it (class tokens, newlines, padding) have an empty box. What a key shows of a cell is the
product of two shares, of the cell's row and of its column. So a map is made a row of cells at a time, by differentiable
products for tiles, padding, crops and thumbnails alike. A tensor of all keys and cells would be the largest of all.

Axis suffixes: L layer, B sample, H head, R row, W word, K key, V view, N latent, P patch, S map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lavender.errors import CaptureError

EMPTY_BOX = (0.0, 0.0, 0.0, 0.0)


class KeyLayout(NamedTuple):
    """Which part of which picture each image key of a batch shows.

    Attributes:
        boxes: float32 (sample, key, 4), the box of each key in its own picture. If `views` is given: (view, patch, 4),
            the boxes of the patches that the resampler gets.
        pictures: long (sample, key), the index of the key's picture within the sample; -1 for padding.
        views: long (sample, key), only if the keys are latents of a resampler. A view is a picture, or a crop of one,
            that the resampler turns into latents at once. The index counts views over the whole batch; -1 for padding.
            The latents of a view are its keys, in their order; they follow each other.
    """

    boxes: Tensor
    pictures: Tensor
    views: Tensor | None = None


def key_layout(boxes: Sequence[Sequence[Tensor]]) -> KeyLayout:
    """The `KeyLayout` of a batch.

    Args:
        boxes: for each sample, for each of its pictures, the boxes of its keys, float (key, 4), in the keys' order.
    """
    sample_boxes = [torch.cat([torch.zeros(0, 4), *(picture.float() for picture in sample)]) for sample in boxes]
    pictures = [
        torch.arange(len(sample)).repeat_interleave(
            torch.tensor([len(picture) for picture in sample], dtype=torch.long)
        )
        for sample in boxes
    ]
    return KeyLayout(
        pad_sequence(sample_boxes, batch_first=True), pad_sequence(pictures, batch_first=True, padding_value=-1)
    )


def overlap_matrix(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of each key's box that lies in each cell of a grid over the picture.

    Args:
        boxes: float (key, 4). A box may reach beyond the picture.
        grid: (rows, cols).

    Returns:
        Float32 (key, rows · cols). A row sums to the share of the box that is inside the picture, and to 0 for an
        empty box. So `attention @ overlap` keeps the mass of attention on the picture.
    """
    rows, cols = grid
    down, across = _shares(boxes, (rows, cols))
    return (down[:, :, None] * across[:, None, :]).flatten(1).float()


def _shares(boxes: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Shares of boxes in each row and in each column of a grid: float64 (…, key, rows) and (…, key, cols)."""
    top, left, bottom, right = boxes.double().unbind(dim=-1)
    return _overlap_1d(top, bottom, grid[0]), _overlap_1d(left, right, grid[1])


def _overlap_1d(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """Share of the interval [start, end) in each of `cells` equal cells of [0, 1): (…, key, cells)."""
    edges = torch.linspace(0, 1, cells + 1, dtype=start.dtype, device=start.device)
    common = torch.minimum(end[..., None], edges[1:]) - torch.maximum(start[..., None], edges[:-1])
    length = end - start
    return common.clamp_min(0) / torch.where(length > 0, length, 1)[..., None]


def grid_boxes(rows: int, cols: int, box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)) -> Tensor:
    """Boxes of a row-major grid of patches that fills `box`: float64 (rows · cols, 4)."""
    top, left, bottom, right = box
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


def word_attention(rows_LBHRK: Tensor, shares_BWR: Tensor) -> Tensor:
    """Attention of words: the mean of the rows that predict a word's tokens, (layer, sample, head, word, key).

    Args:
        rows_LBHRK: captured rows; see `AttentionRequest.stacked`.
        shares_BWR: 1/n at the n rows of a word, 0 elsewhere.
    """
    return torch.einsum("lbhrk,bwr->lbhwk", rows_LBHRK, shares_BWR)


def to_grid(
    attention_LBHWK: Tensor,
    layout: KeyLayout,
    word_pictures_BW: Tensor,
    grid: tuple[int, int],
    mixing_VNP: Tensor | None = None,
) -> Tensor:
    """Resample attention on keys to a grid over the pictures: (layer, sample, head, word, rows, cols).

    Scaled so that uniform attention on the only picture of a sample is 1 in every cell, for any grid. Unscaled values
    would be about as small as the epsilon of the Aligner's first normalisation.

    Args:
        attention_LBHWK: attention of words on image keys; see `word_attention`.
        layout: what the keys show.
        word_pictures_BW: long (sample, word), index of the picture within the sample that a word's map is of. Keys of
            other pictures do not count.
        grid: (rows, cols).
        mixing_VNP: if the keys are latents of a resampler: their attention on the patches, (view, latent, patch).

    Raises:
        CaptureError: keys and layout do not fit each other, or the resampler's attention is missing.
    """
    num_keys = layout.pictures.shape[1]
    if attention_LBHWK.shape[-1] != num_keys or (layout.views is None and layout.boxes.shape[1] != num_keys):
        raise CaptureError(
            f"attention on {attention_LBHWK.shape[-1]} keys, {num_keys} keys with a picture and boxes of the shape "
            f"{tuple(layout.boxes.shape)}",
            "a box for each key",
            "pass the model the batch that the boxes were made of",
        )
    attention_LBHWK = attention_LBHWK * is_of_word(layout, word_pictures_BW).to(attention_LBHWK)[:, None]
    if layout.views is None:
        rows_BSK = attention_LBHWK.transpose(0, 1).flatten(1, 3)
        maps = _on_cells(rows_BSK, layout.boxes.to(rows_BSK.device), grid)
        maps = maps.unflatten(1, (len(attention_LBHWK), *attention_LBHWK.shape[2:4])).transpose(0, 1)
    else:
        shows_BKrc = _latents_on_cells(layout, grid, attention_LBHWK.device, mixing_VNP).to(attention_LBHWK.dtype)
        maps = torch.einsum("lbhwk,bkrc->lbhwrc", attention_LBHWK, shows_BKrc)
    return maps * (grid[0] * grid[1])


def on_keys(heat_BWrc: Tensor, layout: KeyLayout, word_pictures_BW: Tensor, mixing_VNP: Tensor | None = None) -> Tensor:
    """Lay maps onto the image keys: the mean heat within each key's box, (sample, word, key).

    The part of a box outside the picture counts as 0, and so do keys of other pictures. If the keys are latents of a
    resampler, a latent has the heat of the patches it attends to.

    Args:
        heat_BWrc: maps over the words' pictures.
        layout, word_pictures_BW, mixing_VNP: as for `to_grid`.
    """
    grid = (heat_BWrc.shape[-2], heat_BWrc.shape[-1])
    if layout.views is None:
        heat_BWrc = heat_BWrc.float()
        down, across = (one.to(heat_BWrc) for one in _shares(layout.boxes.to(heat_BWrc.device), grid))
        heat_BWK = heat_BWrc.new_zeros(*heat_BWrc.shape[:2], down.shape[1])
        for row in range(grid[0]):
            heat_BWK += (heat_BWrc[:, :, row] @ across.mT) * down[:, None, :, row]
    else:
        shows_BKrc = _latents_on_cells(layout, grid, heat_BWrc.device, mixing_VNP)
        heat_BWK = torch.einsum("bwrc,bkrc->bwk", heat_BWrc.to(shows_BKrc.dtype), shows_BKrc)
    return heat_BWK * is_of_word(layout, word_pictures_BW).to(heat_BWK)


def _on_cells(values_BSK: Tensor, boxes_BK4: Tensor, grid: tuple[int, int]) -> Tensor:
    """What boxes with values bring to each cell of a grid, by the share of the box: (sample, map, rows, cols)."""
    down, across = (one.to(values_BSK.dtype) for one in _shares(boxes_BK4, grid))
    return torch.stack([(values_BSK * down[:, None, :, row]) @ across for row in range(grid[0])], dim=2)


def is_of_word(layout: KeyLayout, word_pictures_BW: Tensor) -> Tensor:
    """Which image keys are of the picture that a word's map is of: bool (sample, word, key)."""
    return layout.pictures[:, None] == word_pictures_BW[..., None].to(layout.pictures.device)


def seen_cells(layout: KeyLayout, sample: int, picture: int, grid: tuple[int, int]) -> Tensor:
    """The cells of a grid over a picture of which some image key shows a part: bool (rows, cols).

    A model that crops its pictures sees only some of them.
    """
    is_of_picture = layout.pictures[sample] == picture
    if layout.views is None:
        boxes = layout.boxes[sample][is_of_picture]
    else:  # latents of a resampler: the patches of their views
        boxes = layout.boxes[layout.views[sample][is_of_picture].unique()].flatten(0, 1)
    down, across = _shares(boxes.float().cpu(), grid)
    return (down > 0).float().mT @ (across > 0).float() > 0


def _latents_on_cells(
    layout: KeyLayout, grid: tuple[int, int], device: torch.device, mixing_VNP: Tensor | None
) -> Tensor:
    """What each latent shows of each cell, by its attention on the patches: (sample, key, rows, cols), 0 at padding."""
    assert layout.views is not None
    views_BK, boxes_VP4 = layout.views.to(device), layout.boxes.to(device)
    real_BK = views_BK >= 0
    latents = int(views_BK[real_BK].bincount(minlength=len(boxes_VP4)).max())
    if mixing_VNP is not None and not real_BK.any():  # a batch of text alone: the model ran on an empty picture
        latents = mixing_VNP.shape[1]
    expected = (len(boxes_VP4), latents, boxes_VP4.shape[1])
    if mixing_VNP is None or mixing_VNP.shape != expected:
        raise CaptureError(
            f"a resampler's attention of the shape {None if mixing_VNP is None else tuple(mixing_VNP.shape)}",
            f"(view, latent, patch) = {expected}, captured in the same forward",
            "use lavender.students.capture.capturing or lavender.alignment.objective.attach, and the batch that "
            "the boxes were made of",
        )
    latent_K = torch.arange(views_BK.shape[1], device=device) % latents  # those of a view follow each other
    latents_VNrc = _on_cells(mixing_VNP, boxes_VP4, grid)
    return latents_VNrc[views_BK.clamp_min(0), latent_K] * real_BK[..., None, None]
