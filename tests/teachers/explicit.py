"""Word maps worked out the long way: from the projections' own outputs, each softmax written out in float64.

Axis suffixes: B batch row, H head, C cell, K key, T text token, W word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lavender.maps import Word
from lavender.teachers.diffusion.base import Layer
from teachers.pipelines import tokenizer


@contextlib.contextmanager
def projections(layers: Sequence[Layer]) -> Iterator[dict[str, Tensor]]:
    """Inside, outputs of the query and key projections of the layers by name, as `layer.to_q`; the last pass's."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda module, args, output: seen.__setitem__(name, output.detach().double())

    handles = [
        part.register_forward_hook(keep(f"{layer.name}.{name}"))
        for layer in layers
        for name, part in layer.module.named_children()
        if name in ("to_q", "to_k", "add_k_proj")
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def softmax_of(layer: Layer, seen: dict[str, Tensor]) -> Tensor:
    """softmax(QKᵀ/√d) of a layer's image queries over all its keys, those of the text last: (B, H, C, K)."""
    attn: Any = layer.module
    query_BHCD = _normed(_heads(seen[f"{layer.name}.to_q"], attn), attn.norm_q)
    key_BHKD = _normed(_heads(seen[f"{layer.name}.to_k"], attn), attn.norm_k)
    if layer.joint:
        text_BHTD = _normed(_heads(seen[f"{layer.name}.add_k_proj"], attn), attn.norm_added_k)
        key_BHKD = torch.cat([key_BHKD, text_BHTD], dim=2)
    scores_BHCK = query_BHCD @ key_BHKD.transpose(-1, -2) / query_BHCD.shape[-1] ** 0.5
    return scores_BHCK.exp() / scores_BHCK.exp().sum(-1, keepdim=True)


def _heads(tokens: Tensor, attn: Any) -> Tensor:
    return torch.stack(tokens.chunk(attn.heads, dim=-1), dim=1)


def _normed(heads: Tensor, norm: Any) -> Tensor:
    """RMS norm: x / √(mean(x²) + eps) · weight."""
    if norm is None:
        return heads
    return heads / (heads.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


def indicator_of(text: str, words: Sequence[Word], num_tokens: int) -> Tensor:
    """(token, word): 1/n at a word's n tokens, found by counting the tokens of the text before and up to the word."""

    def count(part: str) -> int:
        return len(tokenizer()(part)["input_ids"]) - 2

    found_TW = torch.zeros(num_tokens, len(words), dtype=torch.float64)
    for index, word in enumerate(words):
        first, last = 1 + count(text[: word.start]), 1 + count(text[: word.end])
        found_TW[first:last, index] = 1 / (last - first)
    return found_TW


def heat_of(
    layers: Sequence[Layer], seen: dict[str, Tensor], indicator_TW: Tensor, num_text_keys: int, size: tuple[int, int]
) -> Tensor:
    """The plain mean over rows, layers and heads, resampled to a grid, maximum 1: (word, rows, cols)."""
    total = torch.zeros(indicator_TW.shape[1], *size, dtype=torch.float64)
    for layer in layers:
        softmax_BHCK = softmax_of(layer, seen)
        first = softmax_BHCK.shape[-1] - num_text_keys
        words_CW = softmax_BHCK.mean(dim=(0, 1))[:, first : first + len(indicator_TW)] @ indicator_TW
        maps_Wrc = words_CW.T.unflatten(1, layer.grid)
        total += F.interpolate(maps_Wrc[None], size=size, mode="bilinear")[0] / len(layers)
    return total / total.amax(dim=(1, 2), keepdim=True)
