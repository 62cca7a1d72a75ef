"""The text encoder T5, whose tokens carry words in Flux, PixArt and Stable Diffusion 3.

Its attention has no causal mask and relative positions, so it sets no limit on the length of a text by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lavender.teachers.diffusion.base import tokenized


def encode(tokenizer: Any, encoder: Any, texts: Sequence[str], length: int, masked: bool) -> tuple[Tensor, Tensor]:
    """Encode texts, each padded or truncated to `length` tokens.

    Args:
        masked: whether the encoder ignores padding. In Flux and Stable Diffusion 3 it reads it.

    Returns:
        States (text, token, width), and the mask of what is no padding (text, token), 1 or 0.
    """
    tokens = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    mask = tokens["attention_mask"].to(encoder.device)
    states = encoder(tokens["input_ids"].to(encoder.device), attention_mask=mask if masked else None)[0]
    return states, mask


def padded_offsets(tokenizer: Any, text: str, length: int) -> list[tuple[int, int]]:
    """`tokenized`, padded to `length` as `encode` pads."""
    offsets = tokenized(tokenizer, text, length)
    return offsets + [(0, 0)] * (length - len(offsets))
