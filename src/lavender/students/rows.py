"""Selected rows of softmax attention, kept to selected keys, at next to no memory for backward.

Autograd would keep several tensors of (row × all keys) a layer. Here backward computes them again from the rows'
queries, the keys, which are alive anyway, and a number a row; the only tensor that remains is the result.

Axis suffixes: B sample, H head, G key head, S query heads of a key head, R row, T token, K key, I kept key, D width.
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
    """softmax(q·kᵀ·scaling + mask) over all keys, of which `keys_BI` are kept: (sample, head, row, kept key).

    Computed in float32 where queries are of half precision. Grouped-query attention groups the queries; keys are
    never repeated.

    Args:
        query_BHRD: queries of the wanted rows.
        key_BGKD: all keys.
        rows_BR: long, the rows' positions in the sequence.
        keys_BI: long, the keys to keep, -1 for padding, where the result is 0; None keeps all.
        mask: the layer's, (sample or 1, head or 1, token, key): bool, True where a row sees a key, or added to the
            scores. None: a row sees the keys up to its own position.
        heads: "mean" or "max" pools over heads, which leaves one.
    """
    if mask is not None:
        mask = mask.expand(query_BHRD.shape[0], -1, -1, -1)
    return _AttentionRows.apply(query_BHRD, key_BGKD, rows_BR, keys_BI, mask, scaling, heads)


class _AttentionRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, rows: Tensor, keys: Tensor | None, mask, scaling, heads):
        scores = _scores(query, key, rows, mask, scaling)
        most = scores.amax(dim=-1, keepdim=True)
        share = scores.sub_(most).exp_()
        total = share.sum(dim=-1, keepdim=True)
        # not their log-sum-exp: in a row that sees nothing, the logarithm of the total would be lost beside the most
        ctx.save_for_backward(query, key, rows, keys, mask, most, total)
        ctx.scaling, ctx.heads = scaling, heads
        kept = _kept(share, keys).div_(total) if keys is not None else share.div_(total)
        if heads == "all":
            return kept
        return kept.mean(dim=1, keepdim=True) if heads == "mean" else kept.amax(dim=1, keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        query, key, rows, keys, mask, most, total = ctx.saved_tensors
        hidden = torch.finfo(mask.dtype if mask is not None and mask.is_floating_point() else most.dtype).min
        per_unit = (most > hidden / 2) / total  # a row that sees nothing depends on nothing
        share = _scores(query, key, rows, mask, ctx.scaling).sub_(most).exp_()  # times the total
        kept = _kept(share, keys) * per_unit
        if ctx.heads == "mean":
            grad = (grad / kept.shape[1]).expand_as(kept)
        elif ctx.heads == "max":
            grad = torch.zeros_like(kept).scatter_(1, kept.argmax(dim=1, keepdim=True), grad)
        # softmax: ∂L/∂s = p · (∂L/∂p − Σ p ∂L/∂p), where ∂L/∂p is 0 for keys that are not kept
        own = kept * grad if keys is None else (kept * grad).masked_fill_(_index(keys, grad) < 0, 0)
        grad_scores = share.mul_(-ctx.scaling * per_unit * own.sum(dim=-1, keepdim=True))
        if keys is None:
            grad_scores.add_(own, alpha=ctx.scaling)
        else:
            index = _index(keys, grad).clamp_min(0).expand_as(own)
            grad_scores.scatter_add_(3, index, own.mul_(ctx.scaling))
        return *_of_products(grad_scores, query, key), None, None, None, None, None


def _scores(query_BHRD: Tensor, key_BGKD: Tensor, rows_BR: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Scores of the rows for all keys, masked: (sample, head, row, key), in float32 or better."""
    dtype = torch.promote_types(query_BHRD.dtype, torch.float32)
    samples, heads, num_rows, width = query_BHRD.shape
    with torch.autocast(query_BHRD.device.type, enabled=False):
        grouped = (query_BHRD.to(dtype) * scaling).reshape(samples, key_BGKD.shape[1], -1, width)
        scores = (grouped @ key_BGKD.to(dtype).mT).reshape(samples, heads, num_rows, -1)
    least = torch.finfo(dtype).min  # and not -inf: a row of padding sees nothing, and must not become NaN
    num_keys = key_BGKD.shape[2]
    if mask is None:
        later = torch.arange(num_keys, device=scores.device) > rows_BR.to(scores.device)[:, None, :, None]
        return scores.masked_fill_(later, least)
    own = select_rows(mask, rows_BR)[..., :num_keys]
    return scores.masked_fill_(~own, least) if own.dtype == torch.bool else scores.add_(own).clamp_min_(least)


def _kept(share_BHRK: Tensor, keys_BI: Tensor | None) -> Tensor:
    if keys_BI is None:
        return share_BHRK
    index = _index(keys_BI, share_BHRK)
    kept = share_BHRK.gather(3, index.clamp_min(0).expand(-1, *share_BHRK.shape[1:3], -1))
    return kept.masked_fill_(index < 0, 0)


def _index(keys_BI: Tensor, like: Tensor) -> Tensor:
    return keys_BI.to(like.device)[:, None, None]


def _of_products(grad_scores: Tensor, query_BHRD: Tensor, key_BGKD: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys, from those of their products times the scaling."""
    samples, groups, num_keys, width = key_BGKD.shape
    grouped = grad_scores.reshape(samples, groups, -1, num_keys)
    queries = query_BHRD.to(grad_scores.dtype).reshape(samples, groups, -1, width)
    with torch.autocast(grad_scores.device.type, enabled=False):
        grad_query = (grouped @ key_BGKD.to(grad_scores.dtype)).reshape(query_BHRD.shape)
        grad_key = grouped.mT @ queries
    return grad_query.to(query_BHRD.dtype), grad_key.to(key_BGKD.dtype)


def select_rows(tensor_BHTD: Tensor, rows_BR: Tensor) -> Tensor:
    """The chosen rows of each sample: (sample, head, token, width) → (sample, head, row, width)."""
    index = rows_BR.to(tensor_BHTD.device)[:, None, :, None]
    return tensor_BHTD.gather(2, index.expand(-1, tensor_BHTD.shape[1], -1, tensor_BHTD.shape[-1]))
