"""Which part of the picture each image key covers, and the matrix that turns keys into a map.

Every image key has a box in the picture's own frame: (top, left, bottom, right) as shares of its
height and width, so the whole picture is (0, 0, 1, 1). Keys that show no part of it (class tokens,
newlines, padding tiles) have an empty box. A map is then `attention @ overlap`, one differentiable
product that handles tiles, padding, crops and thumbnails alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lavender.errors import CaptureError

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


def word_attention(rows_LBHRK: Tensor, shares_BWR: Tensor) -> Tensor:
    """Mean of the rows that predict a word's tokens: (layer, sample, head, word, key).

    `shares_BWR` holds 1/n at a word's n rows and 0 elsewhere.
    """
    return torch.einsum("lbhrk,bwr->lbhwk", rows_LBHRK, shares_BWR)


def to_grid(
    attention_LBHWK: Tensor,
    layout: KeyLayout,
    word_pictures_BW: Tensor,
    grid: tuple[int, int],
    mixing_VNP: Tensor | None = None,
) -> Tensor:
    """Lay attention on the pictures: (layer, sample, head, word, rows, cols).

    Scaled so that uniform attention over a sample's only picture is 1 in every cell, whatever the grid. Without
    this the Aligner's first normalisation would see numbers of its own epsilon's size.

    Args:
        layout: what the keys show.
        word_pictures_BW: which of its sample's pictures a word's map is of; other pictures' keys do not count.
        mixing_VNP: where the keys are a resampler's latents: their attention on the patches, (view, latent, patch).

    Raises:
        CaptureError: keys and layout do not fit each other, or a resampler's attention is missing.
    """
    num_keys = layout.pictures.shape[1]
    if attention_LBHWK.shape[-1] != num_keys or (layout.views is None and layout.boxes.shape[1] != num_keys):
        raise CaptureError(
            f"attention on {attention_LBHWK.shape[-1]} keys, {num_keys} keys with a picture and boxes of the shape "
            f"{tuple(layout.boxes.shape)}",
            "a box for each key",
            "pass the model the batch that the boxes were made of",
        )
    device = attention_LBHWK.device
    if layout.pictures.numel() and layout.pictures.max() > 0:
        own_BWK = (layout.pictures[:, None] == word_pictures_BW[..., None].to(layout.pictures.device)).to(device)
        attention_LBHWK = attention_LBHWK * own_BWK[:, None]
    overlaps = [_overlap(boxes.numpy().tobytes(), grid) for boxes in layout.boxes.float().cpu()]
    overlap = torch.stack(overlaps).to(device)
    if layout.views is not None:
        overlap = _of_latents(overlap, layout.views.to(device), mixing_VNP)
    maps = torch.einsum("lbhwk,bkc->lbhwc", attention_LBHWK, overlap.to(attention_LBHWK.dtype))
    return maps.unflatten(-1, grid) * (grid[0] * grid[1])


def _of_latents(overlap_VPC: Tensor, views_BK: Tensor, mixing_VNP: Tensor | None) -> Tensor:
    """Where a resampler's latents lie: (sample, key, cell), 0 for padding of keys."""
    real_BK, num_views = views_BK >= 0, overlap_VPC.shape[0]
    own_BKV = views_BK[..., None] == torch.arange(num_views, device=views_BK.device)
    order_BK = (own_BKV.cumsum(dim=1) - 1).gather(2, views_BK.clamp_min(0)[..., None])[..., 0]
    latents = int(order_BK.max()) + 1
    if mixing_VNP is not None and not real_BK.any():  # a batch of text alone, whose model ran on a picture of nothing
        latents = mixing_VNP.shape[1]
    expected = (num_views, latents, overlap_VPC.shape[1])
    if mixing_VNP is None or mixing_VNP.shape != expected:
        raise CaptureError(
            f"a resampler's attention of the shape {None if mixing_VNP is None else tuple(mixing_VNP.shape)}",
            f"(view, latent, patch) = {expected}, captured in the same forward",
            "use lavender.students.word_maps.capturing or lavender.alignment.objective.attach, and the batch that "
            "the boxes were made of",
        )
    latents_VNC = torch.einsum("vnp,vpc->vnc", mixing_VNP, overlap_VPC.to(mixing_VNP.dtype))
    return latents_VNC[views_BK.clamp_min(0), order_BK.clamp_min(0)] * real_BK[..., None]


@lru_cache(maxsize=16)
def _overlap(boxes: bytes, grid: tuple[int, int]) -> Tensor:
    """The overlap matrix of float32 boxes; pictures of one shape share it (26 MB for Llama-3.2-Vision)."""
    return overlap_matrix(torch.frombuffer(bytearray(boxes), dtype=torch.float32).view(-1, 4), grid)
