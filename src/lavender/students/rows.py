"""Softmax attention of selected rows on selected keys, with almost no memory for backward.

Autograd would keep several tensors of size row × all keys per layer. Here backward computes them again from the
queries of the rows, the keys (which the layer keeps anyway) and two numbers per row. Only the result stays in memory.

Axis suffixes: B sample, H head, G key head, R row, T token, K key, I kept key, D head width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Heads = Literal["all", "mean", "max"]


def attention_rows(
    query_BHRD: Tensor,
    key_BGKD: Tensor,
    rows_BR: Tensor,
    keys_BI: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    heads: Heads = "all",
) -> Tensor:
    """softmax(q·kᵀ·scaling + mask) over all keys, kept at `keys_BI`: (sample, head, row, kept key).

    Computed in float32, or float64 for such queries. For grouped-query attention the queries are grouped; keys are
    never repeated.

    Args:
        query_BHRD: queries of the selected rows.
        key_BGKD: all keys.
        rows_BR: long, positions of the rows in the sequence.
        keys_BI: long, positions of the keys to keep, padded with -1, where the result is 0. None keeps all keys.
        mask: mask of the layer, (sample or 1, head or 1, token, key): bool, True where a row sees a key; or float,
            added to the scores. None: a row sees the keys up to its own position.
        scaling: factor of the scores.
        heads: "mean" or "max" pools the heads into one; "all" keeps them.
    """
    if mask is not None:
        mask = mask.expand(query_BHRD.shape[0], -1, -1, -1)
    return _AttentionRows.apply(query_BHRD, key_BGKD, rows_BR, keys_BI, mask, scaling, heads)


class _AttentionRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, rows: Tensor, keys: Tensor | None, mask, scaling, heads):
        scores = scores_of(query, key, rows, mask, scaling)
        largest = scores.amax(dim=-1, keepdim=True)
        exponentials = scores.sub_(largest).exp_()
        total = exponentials.sum(dim=-1, keepdim=True)
        # not their log-sum-exp: in a row that sees nothing, the largest score would swallow the logarithm of the total
        ctx.save_for_backward(query, key, rows, keys, mask, largest, total)
        ctx.scaling, ctx.heads = scaling, heads
        kept = _kept(exponentials, keys).div_(total) if keys is not None else exponentials.div_(total)
        if heads == "all":
            return kept
        return kept.mean(dim=1, keepdim=True) if heads == "mean" else kept.amax(dim=1, keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        query, key, rows, keys, mask, largest, total = ctx.saved_tensors
        # 0 for a row that sees nothing: it has no gradient
        normaliser = (largest > hidden_score(mask, largest) / 2) / total
        exponentials = scores_of(query, key, rows, mask, ctx.scaling).sub_(largest).exp_()
        kept = _kept(exponentials, keys) * normaliser
        if ctx.heads == "mean":
            grad = (grad / kept.shape[1]).expand_as(kept)
        elif ctx.heads == "max":
            grad = torch.zeros_like(kept).scatter_(1, kept.argmax(dim=1, keepdim=True), grad)
        # softmax: ∂L/∂s = p · (∂L/∂p − Σ p ∂L/∂p), where ∂L/∂p is 0 for keys that are not kept
        weighted = kept * grad if keys is None else (kept * grad).masked_fill_(_index(keys, grad) < 0, 0)
        grad_scores = exponentials.mul_(-ctx.scaling * normaliser * weighted.sum(dim=-1, keepdim=True))
        if keys is None:
            grad_scores.add_(weighted, alpha=ctx.scaling)
        else:
            index = _index(keys, grad).clamp_min(0).expand_as(weighted)
            grad_scores.scatter_add_(3, index, weighted.mul_(ctx.scaling))
        return *_query_and_key_gradients(grad_scores, query, key), None, None, None, None, None


def scores_of(query_BHRD: Tensor, key_BGKD: Tensor, rows_BR: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Masked scores of the rows and all keys: (sample, head, row, key), in float32 or float64."""
    dtype = torch.promote_types(query_BHRD.dtype, torch.float32)
    samples, heads, num_rows, width = query_BHRD.shape
    with torch.autocast(query_BHRD.device.type, enabled=False):
        grouped = (query_BHRD.to(dtype) * scaling).reshape(samples, key_BGKD.shape[1], -1, width)
        scores = (grouped @ key_BGKD.to(dtype).mT).reshape(samples, heads, num_rows, -1)
    least = torch.finfo(dtype).min  # not -inf: a padded row sees nothing, and would become NaN
    num_keys = key_BGKD.shape[2]
    if mask is None:
        later = torch.arange(num_keys, device=scores.device) > rows_BR.to(scores.device)[:, None, :, None]
        return scores.masked_fill_(later, least)
    row_mask = select_rows(mask, rows_BR)[..., :num_keys]
    if row_mask.dtype == torch.bool:
        return scores.masked_fill_(~row_mask, least)
    return scores.add_(row_mask).clamp_min_(least)


def hidden_score(mask: Tensor | None, scores: Tensor) -> float:
    """The score of a key that a row does not see, in `scores_of`."""
    return torch.finfo(mask.dtype if mask is not None and mask.is_floating_point() else scores.dtype).min


def _kept(values_BHRK: Tensor, keys_BI: Tensor | None) -> Tensor:
    """The values at the keys to keep, 0 at padding: (sample, head, row, kept key)."""
    if keys_BI is None:
        return values_BHRK
    index = _index(keys_BI, values_BHRK)
    kept = values_BHRK.gather(3, index.clamp_min(0).expand(-1, *values_BHRK.shape[1:3], -1))
    return kept.masked_fill_(index < 0, 0)


def _index(keys_BI: Tensor, like: Tensor) -> Tensor:
    return keys_BI.to(like.device)[:, None, None]


def _query_and_key_gradients(grad_scores: Tensor, query_BHRD: Tensor, key_BGKD: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys, from the gradient of the unscaled scores."""
    samples, groups, num_keys, width = key_BGKD.shape
    grouped = grad_scores.reshape(samples, groups, -1, num_keys)
    queries = query_BHRD.to(grad_scores.dtype).reshape(samples, groups, -1, width)
    with torch.autocast(grad_scores.device.type, enabled=False):
        grad_query = (grouped @ key_BGKD.to(grad_scores.dtype)).reshape(query_BHRD.shape)
        grad_key = grouped.mT @ queries
    return grad_query.to(query_BHRD.dtype), grad_key.to(key_BGKD.dtype)


def select_rows(tensor_BHTD: Tensor, rows_BR: Tensor) -> Tensor:
    """The selected rows of each sample: (sample, head, token, width) → (sample, head, row, width)."""
    index = rows_BR.to(tensor_BHTD.device)[:, None, :, None]
    return tensor_BHTD.gather(2, index.expand(-1, tensor_BHTD.shape[1], -1, tensor_BHTD.shape[-1]))
