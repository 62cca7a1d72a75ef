"""Run each picture through a frozen vision tower once.

The language model of a world student is small, so its tower takes most of a step. In a run that freezes the tower, a
picture gives the same states at every epoch.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mllama.modeling_mllama import MllamaVisionModel


class _States:
    """Picture → states of the tower at its present weights."""

    def __init__(self) -> None:
        self.weights = -1
        self.by_picture: dict[bytes, Tensor] = {}


@contextlib.contextmanager
def each_picture_once() -> Iterator[None]:
    """In this context, a `MllamaVisionModel` that needs no gradients keeps the states of each picture in memory.

    A tower that trains runs as ever, and its states are dropped when its weights change. Equal to a run without this
    up to rounding: pictures pass the tower in other batches.
    """
    towers: WeakKeyDictionary[MllamaVisionModel, _States] = WeakKeyDictionary()
    forward = MllamaVisionModel.forward

    def remembered(
        tower: MllamaVisionModel,
        pixel_values: Tensor,
        aspect_ratio_ids: Tensor,
        aspect_ratio_mask: Tensor,
        **options: Any,
    ) -> Any:
        inputs = pixel_values, aspect_ratio_ids, aspect_ratio_mask
        is_training = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters())
        if is_training or options:
            return forward(tower, *inputs, **options)
        return BaseModelOutput(last_hidden_state=_states(towers.setdefault(tower, _States()), forward, tower, inputs))

    with mock.patch.object(MllamaVisionModel, "forward", remembered):
        yield


def _states(known: _States, forward: Any, tower: MllamaVisionModel, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The tower's states of a batch, [picture, ...]; only pictures that are not known pass the tower."""
    weights = sum(parameter._version for parameter in tower.parameters())  # every change in place counts it up
    if known.weights != weights:
        known.weights, known.by_picture = weights, {}
    keys = [_digest([tensor[row] for tensor in inputs]) for row in range(len(inputs[0]))]
    missing = {key: row for row, key in enumerate(keys) if key not in known.by_picture}
    if missing:
        rows = list(missing.values())
        new = forward(tower, *(tensor[rows] for tensor in inputs)).last_hidden_state
        known.by_picture |= dict(zip(missing, new.detach().clone(), strict=True))
    return torch.stack([known.by_picture[key] for key in keys])


def _digest(tensors: list[Tensor]) -> bytes:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).digest()
