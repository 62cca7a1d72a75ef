"""What families of resamplers share: which latent is of which view, and attention kept to patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lavender.grids import KeyLayout

TINY = 1e-12


def latent_layout(
    boxes: Tensor, views: Sequence[Sequence[tuple[int, int]]], latents: int, num_keys: int | None = None
) -> KeyLayout:
    """The layout of keys that are latents, those of a view together.

    Args:
        boxes: float (view, patch, 4), of the patches.
        views: of each sample, in the order of its keys: (index of the view in the batch, index of its picture).
        latents: how many a view has.
        num_keys: how many keys a sample has, the rest padding; by default as many as the sample with most views.
    """
    keys = [torch.tensor(own, dtype=torch.long).view(-1, 2).repeat_interleave(latents, dim=0) for own in views]
    padded = pad_sequence(keys, batch_first=True, padding_value=-1)
    if num_keys is not None:
        padded = torch.nn.functional.pad(padded, (0, 0, 0, num_keys - padded.shape[1]), value=-1)
    return KeyLayout(boxes, padded[..., 1].contiguous(), padded[..., 0].contiguous())


def over_patches(attention: Tensor) -> Tensor:
    """Attention on a view's patches, scaled to sum to 1: float32 (view, latent, patch)."""
    return attention / attention.sum(dim=-1, keepdim=True).clamp_min(TINY)
