"""Requests of tests, their rows by transformers' own slow kernel, and what lavender may leave behind in a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from families.geometry import GRID, Family
from lavender.alignment.objective import AlignmentRequest
from lavender.students.capture import AttentionRequest, real_keys, row_tensors
from lavender.students.registry import adapter_for
from lavender.students.word_maps import AnsweredPicture, capturing


def request_of(
    family: Family, model, batch: Mapping[str, Tensor], readings: list[AnsweredPicture], layers
) -> AlignmentRequest:
    """An alignment request of two words a sample (one in the last), rows near the end, random targets."""
    adapter, end = adapter_for(model.config), int(batch["attention_mask"].sum(1).min()) - 2
    words = [[(end, end - 3), (end - 1,)]] * (len(readings) - 1) + [[(end - 2,)]]
    tensors = row_tensors(words)
    targets = torch.rand(*tensors["present"].shape, *GRID, generator=torch.Generator().manual_seed(3))
    sizes = [[(one.image.height, one.image.width)] for one in readings]
    keys = adapter.key_tensors(batch, sizes, family.processor)
    return AlignmentRequest(layers, tensors | {"targets": targets} | keys)


def cast(batch: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch with its floating-point numbers, tensors alone, in another format."""
    return {
        name: one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() else one
        for name, one in batch.items()
    }


def captured(model: PreTrainedModel, batch: Mapping[str, Tensor], layers=None, rows=None) -> AttentionRequest:
    """Rows of three samples, captured: early ones, and late ones, which see the whole picture also if causal."""
    adapter, end = adapter_for(model.config), int(batch["attention_mask"].sum(1).min()) - 2
    rows = torch.tensor([[5, end], [end - 1, 7], [12, end - 3]]) if rows is None else rows
    request = AttentionRequest(rows, layers or adapter.usable_layers(), adapter.image_keys(batch))
    with torch.no_grad(), capturing(model):
        model(**batch, attention_request=request)
    return request


@torch.no_grad()
def eager_rows(model: PreTrainedModel, batch: Mapping[str, Tensor], request: AttentionRequest) -> Tensor:
    """The rows of a request by transformers' own slow kernel: (layer, sample, head, row, key)."""
    eager, keys = copy.deepcopy(model), adapter_for(model.config).image_keys(batch)
    eager.set_attn_implementation("eager")
    every = eager(**batch, output_attentions=True).attentions
    whole = torch.stack([every[layer] for layer in request.layers])
    rows = torch.stack([whole[:, index, :, own] for index, own in enumerate(request.rows_BR)], dim=1)
    if keys is None:
        return rows
    kept = [
        rows[:, index, ..., own] * mask for index, (own, mask) in enumerate(zip(keys, real_keys(keys), strict=True))
    ]
    return torch.stack(kept, dim=1)


def traces(model: PreTrainedModel) -> list:
    """All that lavender could leave behind in a model."""
    hooks = [(name, len(one._forward_hooks), len(one._forward_pre_hooks)) for name, one in model.named_modules()]
    configs = model.config.get_text_config(), model.config.vision_config
    kernels = [repr(one._attn_implementation) for one in configs]  # a capturing kernel's name equals its base's
    return [hooks, list(model.state_dict()), kernels, model.config.to_dict(), model.training]
