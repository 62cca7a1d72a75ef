"""Word maps worked out the long way: from the projections' own outputs, each softmax written out in float64.

Axis suffixes: B batch row, H head, C cell, K key, T text token, W word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lavender.maps import Word
from lavender.teachers.diffusion.base import Layer
from teachers.pipelines import TOKENS, tokenizer

Rotate = Callable[[Tensor, str, tuple[int, int]], Tensor]
"""Heads (B, H, token, D), "image" or "text", and the grid of the image; the same with their positions turned in."""


@dataclass(frozen=True)
class Reading:
    """One text encoder whose states are keys.

    Attributes:
        tokenizer: of the text.
        before: keys of it before the text's own, such as a start token.
        keys: keys of it in all.
    """

    tokenizer: Any
    before: int = 1
    keys: int = TOKENS

    def count(self, part: str) -> int:
        """Tokens of a part of a text that begins where the text begins."""
        return len(self.tokenizer(part.rstrip(), add_special_tokens=False)["input_ids"])


PARTS = ("to_q", "to_k", "add_k_proj", "to_qkv_mlp_proj")


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
        if name in PARTS
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def softmax_of(
    layer: Layer, seen: dict[str, Tensor], rotate: Rotate | None = None, mask_BK: Tensor | None = None
) -> Tensor:
    """softmax(QKᵀ/√d) of a layer's image queries over all its keys, in the layer's order: (B, H, C, K).

    Args:
        rotate: of rotary positions.
        mask_BK: 1 where a key of the text counts, else 0.
    """
    attn: Any = layer.module
    query, key, text = _tokens(layer, seen)
    turn = rotate or (lambda heads, kind, grid: heads)
    query_BHCD = turn(_normed(_heads(query, attn), attn.norm_q), "image", layer.grid)
    if text is None:
        key_BHKD = _normed(_heads(key, attn), attn.norm_k)
    else:
        norm = attn.norm_added_k if f"{layer.name}.add_k_proj" in seen else attn.norm_k
        image_BHCD = turn(_normed(_heads(key, attn), attn.norm_k), "image", layer.grid)
        text_BHTD = turn(_normed(_heads(text, attn), norm), "text", layer.grid)
        pair = [text_BHTD, image_BHCD] if layer.text_first else [image_BHCD, text_BHTD]
        key_BHKD = torch.cat(pair, dim=2)
    scores_BHCK = query_BHCD @ key_BHKD.transpose(-1, -2) / query_BHCD.shape[-1] ** 0.5
    weights_BHCK = scores_BHCK.exp()
    if mask_BK is not None:
        first = first_text_key(layer)
        weights_BHCK[..., first : first + mask_BK.shape[1]] *= mask_BK[:, None, None].double()
    return weights_BHCK / weights_BHCK.sum(-1, keepdim=True)


def _tokens(layer: Layer, seen: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Projected queries of the image, keys of the image, and keys of the text; in cross-attention only two."""
    fused = seen.get(f"{layer.name}.to_qkv_mlp_proj")
    if fused is None:
        query, key = seen[f"{layer.name}.to_q"], seen[f"{layer.name}.to_k"]
    else:
        query, key = fused.split(layer.module.inner_dim, dim=-1)[:2]
    if not layer.joint:
        return query, key, None
    if f"{layer.name}.add_k_proj" in seen:
        return query, key, seen[f"{layer.name}.add_k_proj"]
    # one stream holds both
    num_text = key.shape[1] - layer.grid[0] * layer.grid[1]
    assert layer.text_first
    return query[:, num_text:], key[:, num_text:], key[:, :num_text]


def first_text_key(layer: Layer) -> int:
    """Where the text's keys begin."""
    return layer.grid[0] * layer.grid[1] if layer.joint and not layer.text_first else 0


def _heads(tokens: Tensor, attn: Any) -> Tensor:
    return torch.stack(tokens.chunk(attn.heads, dim=-1), dim=1)


def _normed(heads: Tensor, norm: Any) -> Tensor:
    """RMS norm: x / √(mean(x²) + eps) · weight."""
    if norm is None:
        return heads
    return heads / (heads.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


def indicator_of(text: str, words: Sequence[Word], readings: Sequence[Reading] | None = None) -> Tensor:
    """(token, word): 1/n at a word's n tokens, found by counting the tokens of the text before and up to the word."""
    readings = [Reading(tokenizer())] if readings is None else readings
    found_TW = torch.zeros(sum(reading.keys for reading in readings), len(words), dtype=torch.float64)
    start = 0
    for reading in readings:
        for index, word in enumerate(words):
            first, last = (start + reading.before + reading.count(text[:end]) for end in (word.start, word.end))
            found_TW[first:last, index] = 1
        start += reading.keys
    return found_TW / found_TW.sum(0)


def _resized(maps: Tensor, target: int) -> Tensor:
    """The second axis from the end in another number of cells: bilinear if it grows, the means of areas if not."""
    source, rest = maps.shape[-2:]
    if source < target:
        return F.interpolate(maps[None], size=(target, rest), mode="bilinear")[0]
    return maps.repeat_interleave(target, dim=-2).unflatten(-2, (target, source)).mean(dim=-2)


def heat_of(
    layers: Sequence[Layer],
    seen: dict[str, Tensor],
    indicator_TW: Tensor,
    size: tuple[int, int],
    rotate: Rotate | None = None,
    mask_BK: Tensor | None = None,
) -> Tensor:
    """The plain mean over rows, layers and heads, resampled to a grid, maximum 1: (word, rows, cols)."""
    total = torch.zeros(indicator_TW.shape[1], *size, dtype=torch.float64)
    for layer in layers:
        softmax_BHCK, first = softmax_of(layer, seen, rotate, mask_BK), first_text_key(layer)
        words_CW = softmax_BHCK.mean(dim=(0, 1))[:, first : first + len(indicator_TW)] @ indicator_TW
        maps_Wrc = words_CW.T.unflatten(1, layer.grid)
        total += _resized(_resized(maps_Wrc, size[0]).mT, size[1]).mT / len(layers)
    return total / total.amax(dim=(1, 2), keepdim=True)
