"""Image keys that are latents of a resampler: their layout, and their attention on the patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lavender.students.image_keys import KeyLayout

TINY = 1e-12


def latent_layout(
    boxes: Tensor, views: Sequence[Sequence[tuple[int, int]]], latents: int, num_keys: int | None = None
) -> KeyLayout:
    """The `KeyLayout` of keys that are latents. All latents of a view follow each other.

    Args:
        boxes: float (view, patch, 4), the boxes of the patches.
        views: for each sample, in the order of its keys: (index of the view in the batch, index of its picture in the
            sample).
        latents: number of latents per view.
        num_keys: number of keys per sample, including padding. By default that of the sample with the most views.
    """
    indices = [torch.tensor(sample, dtype=torch.long).view(-1, 2).repeat_interleave(latents, dim=0) for sample in views]
    padded = pad_sequence(indices, batch_first=True, padding_value=-1)
    if num_keys is not None:
        padded = torch.nn.functional.pad(padded, (0, 0, 0, num_keys - padded.shape[1]), value=-1)
    return KeyLayout(boxes, padded[..., 1].contiguous(), padded[..., 0].contiguous())


def over_patches(attention: Tensor) -> Tensor:
    """Attention on the patches of a view, scaled so that each row sums to 1: float32 (view, latent, patch)."""
    return attention / attention.sum(dim=-1, keepdim=True).clamp_min(TINY)
