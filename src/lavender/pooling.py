"""From attention rows to word maps, and from many layers and heads to few (the paper's aggregation, §4.2, App. D).

Axis suffixes: L layer, B sample, H head, R row, K image key, W word, C cell, N word of the batch, r c rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lavender.config import Pooling
from lavender.errors import CaptureError
from lavender.grids import KeyLayout, overlap_matrix

FLOOR = 1e-12  # of attention: the logarithm of a masked key stays finite


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
            "use lavender.attention.capturing or lavender.objective.attach, and the batch that the boxes were made of",
        )
    latents_VNC = torch.einsum("vnp,vpc->vnc", mixing_VNP, overlap_VPC.to(mixing_VNP.dtype))
    return latents_VNC[views_BK.clamp_min(0), order_BK.clamp_min(0)] * real_BK[..., None]


@lru_cache(maxsize=16)
def _overlap(boxes: bytes, grid: tuple[int, int]) -> Tensor:
    """The overlap matrix of float32 boxes; pictures of one shape share it (26 MB for Llama-3.2-Vision)."""
    return overlap_matrix(torch.frombuffer(bytearray(boxes), dtype=torch.float32).view(-1, 4), grid)


def is_flow(pooling: Pooling) -> bool:
    return "flow" in pooling


def flow(rows_LBHRK: Tensor, positions_BR: Tensor, pooling: Pooling) -> Tensor:
    """Attention flow (Eq. 40–44): Â¹ = A¹, then Âˡ = Âˡ⁻¹ + Aˡ or Âˡ⁻¹ ⊙ Aˡ; rows weighted by r = i / N_text.

    The weight keeps early rows, which see less text, from counting as much as late ones where a word has several.

    Args:
        rows_LBHRK: attention of each layer; its heads are pooled here where the pooling says so ("mean-flow-sum").
        positions_BR: which of the text's tokens the rows are, from 0.

    Returns:
        (1, sample, head, row, key). The sum is divided by the number of layers, and a product sums to 1 over the keys
        before the weight: a product of 40 layers would leave every number format. Weights are relative to a sample's
        last row.
    """
    rows_LBHRK = _pool(rows_LBHRK, pooled_heads(pooling), dim=2)
    if pooling.endswith("sum"):
        merged_BHRK = rows_LBHRK.mean(dim=0)
    else:
        merged_BHRK = rows_LBHRK.float().clamp_min(FLOOR).log().sum(dim=0).softmax(dim=-1)
    order_BR = positions_BR.to(merged_BHRK.device).float() + 1
    weight_BR = order_BR / order_BR.amax(dim=1, keepdim=True)
    return (merged_BHRK * weight_BR[:, None, :, None])[None]


def pooled_heads(pooling: Pooling) -> Literal["all", "mean", "max"]:
    """How a pooling pools heads before all else, which the capture then does in each row; "all" if it does not."""
    first = pooling.partition("-")[0]
    return first if first in ("mean", "max") else "all"


def _pool(attention: Tensor, how: Literal["all", "mean", "max"], dim: int) -> Tensor:
    """The mean or maximum along a dimension, which stays with length 1; "all" leaves it as it is."""
    if how == "all":
        return attention
    return attention.mean(dim, keepdim=True) if how == "mean" else attention.amax(dim, keepdim=True)


def num_channels(pooling: Pooling, num_heads: int) -> int:
    """How many channels of a pooling the Aligner sees: the heads, or one where they are pooled first."""
    return num_heads if pooled_heads(pooling) == "all" else 1


def pooled(attention_LNHrc: Tensor, pooling: Pooling, aligner: Callable[[Tensor], Tensor]) -> Tensor:
    """One map a word, (word, rows, cols) in [0, 1].

    Args:
        attention_LNHrc: (layer, word, head, rows, cols); after a flow there is one layer, and one head where the
            capture has pooled them.
        pooling: "mean-max" and its kin pool heads by the first word, then layers by the second, then comes the
            Aligner. The others put the Aligner on each layer with shared weights, then take the mean over layers
            ("layer-max": the maximum); of a flow there is one.
        aligner: (map, channels, rows, cols) → (map, rows, cols).
    """
    attention_LNHrc = _pool(attention_LNHrc, pooled_heads(pooling), dim=2)
    if pooled_heads(pooling) != "all" and not is_flow(pooling):
        attention_LNHrc = _pool(attention_LNHrc, "max" if pooling.endswith("max") else "mean", dim=0)
    num_layers, num_words = attention_LNHrc.shape[:2]
    maps_LNrc = aligner(attention_LNHrc.flatten(0, 1)).float().unflatten(0, (num_layers, num_words))
    return maps_LNrc.amax(dim=0) if pooling == "layer-max" else maps_LNrc.mean(dim=0)
