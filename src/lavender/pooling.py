"""From attention rows to word maps, and from many layers and heads to few (the paper's aggregation, §4.2, App. D).

Axis suffixes: L layer, B sample, H head, R row, K image key, W word, C cell, N word of the batch, r c rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from lavender.config import Pooling
from lavender.grids import overlap_matrix

FLOOR = 1e-12  # of attention: the logarithm of a masked key stays finite


def word_attention(rows_LBHRK: Tensor, shares_BWR: Tensor) -> Tensor:
    """Mean of the rows that predict a word's tokens: (layer, sample, head, word, key).

    `shares_BWR` holds 1/n at a word's n rows and 0 elsewhere.
    """
    return torch.einsum("lbhrk,bwr->lbhwk", rows_LBHRK, shares_BWR)


def to_grid(attention_LBHWK: Tensor, boxes_BK4: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay attention on the picture: (layer, sample, head, word, rows, cols).

    Scaled so that uniform attention over the picture is 1 in every cell, whatever the grid. Without
    this the Aligner's first normalisation would see numbers of its own epsilon's size.
    """
    overlaps = [_overlap(boxes.numpy().tobytes(), grid) for boxes in boxes_BK4.float().cpu()]
    overlap = torch.stack(overlaps).to(attention_LBHWK.device)
    maps = torch.einsum("lbhwk,bkc->lbhwc", attention_LBHWK, overlap)
    return maps.unflatten(-1, grid) * (grid[0] * grid[1])


@lru_cache(maxsize=16)
def _overlap(boxes: bytes, grid: tuple[int, int]) -> Tensor:
    """The overlap matrix of float32 boxes; pictures of one shape share it (26 MB for Llama-3.2-Vision)."""
    return overlap_matrix(torch.frombuffer(bytearray(boxes), dtype=torch.float32).view(-1, 4), grid)


def is_flow(pooling: Pooling) -> bool:
    return pooling in ("flow-sum", "flow-multi")


def flow(rows_LBHRK: Tensor, positions_BR: Tensor, pooling: Pooling) -> Tensor:
    """Attention flow (Eq. 40–44): Â¹ = A¹, then Âˡ = Âˡ⁻¹ + Aˡ or Âˡ⁻¹ ⊙ Aˡ; rows weighted by r = i / N_text.

    The weight keeps early rows, which see less text, from counting as much as late ones where a word has several.

    Args:
        rows_LBHRK: attention of each layer.
        positions_BR: which of the text's tokens the rows are, from 0.

    Returns:
        (1, sample, head, row, key). The sum is divided by the number of layers, and a product sums to 1 over the keys
        before the weight: a product of 40 layers would leave every number format. Weights are relative to a sample's
        last row.
    """
    if pooling == "flow-sum":
        merged_BHRK = rows_LBHRK.mean(dim=0)
    else:
        merged_BHRK = rows_LBHRK.float().clamp_min(FLOOR).log().sum(dim=0).softmax(dim=-1)
    order_BR = positions_BR.to(merged_BHRK.device).float() + 1
    weight_BR = order_BR / order_BR.amax(dim=1, keepdim=True)
    return (merged_BHRK * weight_BR[:, None, :, None])[None]


def num_channels(pooling: Pooling, num_heads: int) -> int:
    """How many channels of a pooling the Aligner sees: the heads, or one where they are pooled first."""
    return 1 if pooling in ("mean-mean", "max-mean", "mean-max", "max-max") else num_heads


def pooled(attention_LNHrc: Tensor, pooling: Pooling, aligner: Callable[[Tensor], Tensor]) -> Tensor:
    """One map a word, (word, rows, cols) in [0, 1].

    Args:
        attention_LNHrc: (layer, word, head, rows, cols); after a flow there is one layer.
        pooling: "mean-max" and its kin pool heads by the first word, then layers by the second, then comes the
            Aligner. The others put the Aligner on each layer with shared weights, then take the mean over layers
            ("layer-max": the maximum).
        aligner: (map, channels, rows, cols) → (map, rows, cols).
    """
    if num_channels(pooling, 0) == 1:
        heads, layers = pooling.split("-")
        maps_LNrc = attention_LNHrc.mean(dim=2) if heads == "mean" else attention_LNHrc.amax(dim=2)
        maps_Nrc = maps_LNrc.mean(dim=0) if layers == "mean" else maps_LNrc.amax(dim=0)
        return aligner(maps_Nrc[:, None]).float()
    num_layers, num_words = attention_LNHrc.shape[:2]
    maps_LNrc = aligner(attention_LNHrc.flatten(0, 1)).float().unflatten(0, (num_layers, num_words))
    return maps_LNrc.amax(dim=0) if pooling == "layer-max" else maps_LNrc.mean(dim=0)
