"""What a request learns at the whole model: its padding, and where in the picture a resampler's latents look.

The tower does not get the forward keyword that carries a request. So a hook of the whole model says which request
is under way, and one of the resampler stores the latents' attention in it. Checkpointing runs parts again during
backward, when none is under way: then nothing is stored, and the first capture stays the one in the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from lavender.errors import CaptureError
from lavender.students.base import Removable, VlmAdapter
from lavender.students.capture import AttentionRequest
from lavender.students.image_keys import KeyLayout


class MixingCollector:
    """Hooks of a model and its resampler, and those its family asks for; remove `handles` to undo it."""

    def __init__(self, model: PreTrainedModel, adapter: VlmAdapter):
        self._adapter = adapter
        self._request: AttentionRequest | None = None
        begin = model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.handles: list[Removable] = [begin, *adapter.hooks(model)]
        resampler = adapter.resampler(model)
        if resampler is not None:
            self.handles += [
                model.register_forward_hook(self._end, always_call=True),
                resampler.register_forward_hook(self._store, with_kwargs=True),
            ]

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._request = request = kwargs.get("attention_request")
        mask = kwargs.get("attention_mask")
        if request is not None and isinstance(mask, Tensor):
            request.padded = not bool(mask.all())

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._request = None

    def _store(self, resampler: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        request = self._request
        if request is None:
            return
        if request.mixing is not None:
            raise CaptureError(
                f"a second run of {type(resampler).__name__} in one forward",
                "all pictures of a batch in one run",
                "make a new request for each forward; else report this model class",
            )
        request.mixing = self._adapter.latent_attention(resampler, args, kwargs, output)


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
