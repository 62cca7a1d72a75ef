"""Softmax attention of selected rows on selected keys, with almost no memory for backward.

Autograd would keep several tensors of size row × all keys per layer. Here backward computes them again from the
queries of the rows, the keys and two numbers per row. The layer keeps the keys anyway, but for `sdpa` with a mask and
shared key heads: it keeps them repeated, and then these come on top. Else only the result stays in memory.

Axis suffixes: B sample, H head, G key head, R row, T token, K key, I kept key, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Heads = Literal["all", "mean", "max"]
MOST_SCORES = 2**24
"""Most scores that are in memory at once, 64 MiB in float32; more rows are computed in parts."""


class Scoring(NamedTuple):
    """How a layer turns the products of queries and keys into scores, and which keys it hides from a row.

    Attributes:
        scaling: factor of q·kᵀ.
        mask: mask at the rows, (sample or 1, head or 1, row, key): bool, True where a row sees a key; or float, added
            to the scores. None: a row sees the keys up to its own position.
        softcap: if given, a score s becomes softcap · tanh(s / softcap) before the mask.
    """

    scaling: float
    mask: Tensor | None = None
    softcap: float | None = None


def attention_rows(
    query_BHRD: Tensor,
    key_BGKD: Tensor,
    rows_BR: Tensor,
    keys_BI: Tensor | None,
    scoring: Scoring,
    heads: Heads = "all",
) -> Tensor:
    """Softmax of the scores over all keys, kept at `keys_BI`: (sample, head, row, kept key).

    Computed in float32, or float64 for such queries. For grouped-query attention the queries are grouped; keys are
    never repeated.

    Args:
        query_BHRD: queries of the selected rows.
        key_BGKD: all keys.
        rows_BR: long, positions of the rows in the sequence.
        keys_BI: long, positions of the keys to keep, padded with -1, where the result is 0. None keeps all keys.
        scoring: how the layer scores its keys.
        heads: "mean" or "max" pools the heads into one; "all" keeps them.
    """
    return _AttentionRows.apply(query_BHRD, key_BGKD, rows_BR, keys_BI, *scoring, heads)


class _AttentionRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, rows, keys, scaling, mask, softcap, heads):
        whole, parts = key.to(_wide(query)), []
        for part in row_parts(query, key):
            scoring = scoring_at(Scoring(scaling, mask, softcap), part)
            scores = scores_of(query[:, :, part], whole, rows[:, part], scoring)
            largest = scores.amax(dim=-1, keepdim=True)
            exponentials = scores.sub_(largest).exp_()
            total = exponentials.sum(dim=-1, keepdim=True)
            kept = _kept(exponentials, keys).div_(total)
            if heads != "all":
                kept = kept.mean(dim=1, keepdim=True) if heads == "mean" else kept.amax(dim=1, keepdim=True)
            parts.append((kept, largest, total))
        kept, largest, total = (torch.cat(pieces, dim=2) for pieces in zip(*parts, strict=True))
        # not their log-sum-exp: in a row that sees nothing, the largest score would swallow the logarithm of the total
        ctx.save_for_backward(query, key, rows, keys, mask, largest, total)
        ctx.scaling, ctx.softcap, ctx.heads = scaling, softcap, heads
        return kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        query, key, rows, keys, mask, largest, total = ctx.saved_tensors
        scoring, whole = Scoring(ctx.scaling, mask, ctx.softcap), key.to(_wide(query))
        grad_query, grad_key = [], torch.zeros_like(whole)
        for part in row_parts(query, key):
            own, places = query[:, :, part], rows[:, part]
            grad_scores = _score_gradients(
                (own, whole, places, scoring_at(scoring, part)),
                keys,
                (largest[:, :, part], total[:, :, part]),
                grad[:, :, part],
                ctx.heads,
            )
            of_query, of_key = _query_and_key_gradients(grad_scores, own, whole)
            grad_query.append(of_query)
            grad_key += of_key
        nothing = (None,) * 6
        return torch.cat(grad_query, dim=2).to(query.dtype), grad_key.to(key.dtype), *nothing


def _score_gradients(
    scored: tuple[Tensor, Tensor, Tensor, Scoring],
    keys: Tensor | None,
    saved: tuple[Tensor, Tensor],
    grad: Tensor,
    heads: Heads,
) -> Tensor:
    """Gradient of q·kᵀ, from that of the kept attention: (sample, head, row, key).

    Args:
        scored: arguments of `scores_of`.
        keys: positions of the kept keys.
        saved: the largest score of each row, and the sum of the exponentials of the scores less that one.
        grad: gradient of the result, with its heads pooled by `heads`.
    """
    (largest, total), scoring = saved, scored[3]
    # 0 for a row that sees nothing: it has no gradient
    normaliser = (largest > hidden_score(scoring.mask, largest) / 2) / total
    exponentials = scores_of(*scored).sub_(largest).exp_()
    kept = _kept(exponentials, keys) * normaliser
    if heads == "mean":
        grad = (grad / kept.shape[1]).expand_as(kept)
    elif heads == "max":
        grad = torch.zeros_like(kept).scatter_(1, kept.argmax(dim=1, keepdim=True), grad)
    # softmax: ∂L/∂s = p · (∂L/∂p − Σ p ∂L/∂p), where ∂L/∂p is 0 for keys that are not kept
    weighted = kept * grad if keys is None else (kept * grad).masked_fill_(_index(keys, grad) < 0, 0)
    grad_scores = exponentials.mul_(-scoring.scaling * normaliser * weighted.sum(dim=-1, keepdim=True))
    if keys is None:
        grad_scores.add_(weighted, alpha=scoring.scaling)
    else:
        index = _index(keys, grad).clamp_min(0).expand_as(weighted)
        grad_scores.scatter_add_(3, index, weighted.mul_(scoring.scaling))
    if scoring.softcap is not None:  # d/ds c·tanh(s/c) = 1 − tanh²(s/c)
        grad_scores.mul_(1 - _products(*scored[:2], scoring.scaling).div_(scoring.softcap).tanh_().square_())
    return grad_scores


def scores_of(query_BHRD: Tensor, key_BGKD: Tensor, rows_BR: Tensor, scoring: Scoring) -> Tensor:
    """Masked scores of the rows and all keys: (sample, head, row, key), in float32 or float64."""
    scores = _products(query_BHRD, key_BGKD, scoring.scaling)
    if scoring.softcap is not None:
        scores = (scores / scoring.softcap).tanh() * scoring.softcap
    least = torch.finfo(scores.dtype).min  # not -inf: a padded row sees nothing, and would become NaN
    if scoring.mask is None:
        later = torch.arange(key_BGKD.shape[2], device=scores.device) > rows_BR.to(scores.device)[:, None, :, None]
        return scores.masked_fill_(later, least)
    if scoring.mask.dtype == torch.bool:
        return scores.masked_fill_(~scoring.mask, least)
    return scores.add_(scoring.mask).clamp_min_(least)


def _products(query_BHRD: Tensor, key_BGKD: Tensor, scaling: float) -> Tensor:
    """q·kᵀ·scaling: (sample, head, row, key), in float32 or float64."""
    dtype = _wide(query_BHRD)
    samples, heads, num_rows, width = query_BHRD.shape
    with torch.autocast(query_BHRD.device.type, enabled=False):
        grouped = (query_BHRD.to(dtype) * scaling).reshape(samples, key_BGKD.shape[1], -1, width)
        return (grouped @ key_BGKD.to(dtype).mT).reshape(samples, heads, num_rows, -1)


def _wide(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def row_parts(query_BHRD: Tensor, key_BGKD: Tensor) -> Iterator[slice]:
    """The rows in parts whose scores fit in memory; one part if all do."""
    samples, heads, num_rows, _ = query_BHRD.shape
    step = max(1, MOST_SCORES // (samples * heads * key_BGKD.shape[2] or 1))
    return (slice(first, first + step) for first in range(0, max(num_rows, 1), step))


def scoring_at(scoring: Scoring, part: slice) -> Scoring:
    """The scoring of a part of the rows."""
    return scoring if scoring.mask is None else scoring._replace(mask=scoring.mask[:, :, part])


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
    return grad_query, grad_key


def select_rows(tensor_BHTD: Tensor, rows_BR: Tensor) -> Tensor:
    """The selected rows of each sample: (sample, head, token, width) → (sample, head, row, width)."""
    index = rows_BR.to(tensor_BHTD.device)[:, None, :, None]
    return tensor_BHTD.gather(2, index.expand(-1, tensor_BHTD.shape[1], -1, tensor_BHTD.shape[-1]))
