"""Pooling: attention of many layers and heads becomes one map per word (the paper's aggregation, §4.2, App. D).

Axis suffixes: L layer, B sample, H head, R row, K image key, W word, C cell, N word of the batch, r c rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from lavender.config import Pooling

FLOOR = 1e-12  # of attention: the logarithm of a masked key stays finite


class PoolingSteps(NamedTuple):
    """What a pooling does, in this order, with attention of many layers and heads.

    Attributes:
        heads: how heads are pooled before everything else; "all" keeps one channel per head.
        flow: how layers are merged by attention flow (Eq. 40–44), as a sum or a product; None for no flow.
        layers: how layers are pooled where no flow has merged them.
        layers_first: whether layers are pooled before the Aligner, which then runs once, instead of after it.
        learned: whether parallel query and key projections are trained (Eq. 15–16).
    """

    heads: Literal["all", "mean", "max"] = "all"
    flow: Literal["sum", "product"] | None = None
    layers: Literal["mean", "max"] = "mean"
    layers_first: bool = False
    learned: bool = False


POOLINGS: dict[Pooling, PoolingSteps] = {
    "layer-mean": PoolingSteps(),
    "layer-max": PoolingSteps(layers="max"),
    "mean-mean": PoolingSteps(heads="mean", layers="mean", layers_first=True),
    "max-mean": PoolingSteps(heads="max", layers="mean", layers_first=True),
    "mean-max": PoolingSteps(heads="mean", layers="max", layers_first=True),
    "max-max": PoolingSteps(heads="max", layers="max", layers_first=True),
    "flow-sum": PoolingSteps(flow="sum"),
    "flow-multi": PoolingSteps(flow="product"),
    "mean-flow-sum": PoolingSteps(heads="mean", flow="sum"),
    "max-flow-sum": PoolingSteps(heads="max", flow="sum"),
    "mean-flow-multi": PoolingSteps(heads="mean", flow="product"),
    "max-flow-multi": PoolingSteps(heads="max", flow="product"),
    "learn": PoolingSteps(learned=True),
}
"""What each value of `AlignmentConfig.pooling` does."""


def flow(rows_LBHRK: Tensor, positions_BR: Tensor, pooling: Pooling) -> Tensor:
    """Attention flow (Eq. 40–44): Â¹ = A¹, then Âˡ = Âˡ⁻¹ + Aˡ or Âˡ⁻¹ ⊙ Aˡ; rows weighted by r = i / N_text.

    Early rows see less text. The weight keeps them from counting as much as late ones where a word has several rows.

    Args:
        rows_LBHRK: attention of each layer. Heads are pooled here if `pooling` pools them ("mean-flow-sum").
        positions_BR: position of each row's token in the text, from 0.

    Returns:
        (1, sample, head, row, key). A sum is divided by the number of layers. A product is scaled to sum to 1 over the
        keys before the weight, because a product of 40 layers underflows. Weights are relative to a sample's last row.
    """
    steps = POOLINGS[pooling]
    rows_LBHRK = _pool(rows_LBHRK, steps.heads, dim=2)
    if steps.flow == "sum":
        merged_BHRK = rows_LBHRK.mean(dim=0)
    else:
        merged_BHRK = rows_LBHRK.float().clamp_min(FLOOR).log().sum(dim=0).softmax(dim=-1)
    order_BR = positions_BR.to(merged_BHRK.device).float() + 1
    weight_BR = order_BR / order_BR.amax(dim=1, keepdim=True)
    return (merged_BHRK * weight_BR[:, None, :, None])[None]


def _pool(attention: Tensor, how: Literal["all", "mean", "max"], dim: int) -> Tensor:
    """The mean or maximum along a dimension, which keeps length 1; "all" leaves it unchanged."""
    if how == "all":
        return attention
    return attention.mean(dim, keepdim=True) if how == "mean" else attention.amax(dim, keepdim=True)


def num_channels(pooling: Pooling, num_heads: int) -> int:
    """Number of input channels of the Aligner: the heads, or 1 where heads are pooled first."""
    return num_heads if POOLINGS[pooling].heads == "all" else 1


def pooled(attention_LNHrc: Tensor, pooling: Pooling, aligner: Callable[[Tensor], Tensor]) -> Tensor:
    """Pool attention to one map per word.

    Args:
        attention_LNHrc: (layer, word, head, rows, cols). After a flow there is one layer. There is one head where the
            capture has pooled the heads already.
        aligner: (map, channels, rows, cols) → (map, rows, cols).

    Returns:
        (word, rows, cols), with values in [0, 1] if the Aligner's are.
    """
    steps = POOLINGS[pooling]
    attention_LNHrc = _pool(attention_LNHrc, steps.heads, dim=2)
    if steps.layers_first:
        attention_LNHrc = _pool(attention_LNHrc, steps.layers, dim=0)
    num_layers, num_words = attention_LNHrc.shape[:2]
    maps_LNrc = aligner(attention_LNHrc.flatten(0, 1)).float().unflatten(0, (num_layers, num_words))
    return _pool(maps_LNrc, steps.layers, dim=0)[0]
