"""Attention kernels that need another machine, written out: those of the package flash-attn, and flex attention.

The flash functions have the package's names, arguments and shapes. Everything of transformers around them is real: it
chooses the function, and makes lengths of masks and positions. They compute in float64 and return the inputs' format.
"""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from transformers import AttentionInterface, masking_utils, modeling_flash_attention_utils
from transformers.integrations import flex_attention as flex_integration


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Attention of (sample, token, head, width); a window counts the tokens to the left and right of a row's own."""
    query, key, value = (one.double().transpose(1, 2) for one in (q, k, v))
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    scores = query @ key.mT * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None]
    left, right = (k.shape[1] if side < 0 else side for side in window_size)
    seen = (ahead >= -left) & (ahead <= (0 if causal else right))
    attention = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (attention @ value).transpose(1, 2).to(q.dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Attention of samples one behind the other: (token, head, width)."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    cuts = cu_seqlens_q.tolist()
    assert (cuts[0], cuts[-1]) == (0, len(q))
    assert int(max_seqlen_q) == int(max_seqlen_k) == int(cu_seqlens_q.diff().max())
    settings: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
    }
    samples = [
        flash_attn_func(q[None, first:last], k[None, first:last], v[None, first:last], **settings)[0]
        for first, last in pairwise(cuts)
    ]
    return torch.cat(samples)


def use_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers find these functions where it looks for the package flash-attn."""
    pads = modeling_flash_attention_utils._pad_input, modeling_flash_attention_utils._unpad_input

    def imports(implementation: str, *args: object, **kwargs: object) -> tuple:
        assert implementation in ("flash_attention_2", "flash_attention_3")  # never the name of a capturing kernel
        return flash_attn_func, flash_attn_varlen_func, None, *pads

    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", imports)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(modeling_flash_attention_utils, name, None)


def use_flex_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own flex attention without a compiler, which takes about a minute on a CPU."""

    def uncompiled(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **kwargs) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            return flex_attention(query, key, value, **kwargs)

    def blocks(*args: object, _compile: bool, **kwargs: object) -> BlockMask:
        return create_block_mask(*args, **kwargs)  # ty: ignore[invalid-argument-type]

    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", uncompiled)
    monkeypatch.setattr(masking_utils, "create_block_mask", blocks)


def use_flex_with_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flex attention written out: PyTorch's has no backward on a CPU."""

    def attention(module, query, key, value, attention_mask, scaling, softcap=None, **kwargs) -> tuple[Tensor, None]:
        blocks, repeat = attention_mask, query.shape[1] // key.shape[1]
        seen = create_mask(blocks.mask_mod, len(query), 1, query.shape[2], key.shape[2], query.device)
        scores = query @ key.repeat_interleave(repeat, 1).mT * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        attended = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
        return (attended @ value.repeat_interleave(repeat, 1)).transpose(1, 2).contiguous(), None

    use_flex_uncompiled(monkeypatch)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flex_attention", attention)
