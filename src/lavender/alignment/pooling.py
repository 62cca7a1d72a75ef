"""From attention rows to word maps, and from many layers and heads to few (the paper's aggregation, §4.2, App. D).

Axis suffixes: L layer, B sample, H head, R row, K image key, W word, C cell, N word of the batch, r c rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from lavender.config import Pooling

FLOOR = 1e-12  # of attention: the logarithm of a masked key stays finite


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
