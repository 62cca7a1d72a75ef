"""From attention rows to word maps of each layer and head.

Axis suffixes: L layer, B sample, H head, R row, K image key, W word, C cell.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lavender.grids import overlap_matrix


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
