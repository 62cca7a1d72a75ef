"""Qwen2-VL and Qwen2.5-VL: pictures of any shape, whose cells stand in the text as tokens seen by every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ProcessorMixin

from lavender.errors import DataError
from lavender.grids import grid_boxes
from lavender.vlm.base import VlmAdapter

DO = "give each sample exactly one picture"


class Qwen2VlAdapter(VlmAdapter):
    """Self-attention keys: a row-major grid over the whole picture, a key for merge × merge patches.

    The image processor squashes a picture to whole cells and cuts nothing, so the boxes are an exact grid. Pictures
    of a batch have different grids: keys are padded with position 0, boxes with empty ones.
    """

    model_type = "qwen2_vl"

    def usable_layers(self) -> tuple[int, ...]:
        return tuple(range(self.config.text_config.num_hidden_layers))

    def attention_module(self, model: PreTrainedModel, layer: int) -> Any:
        return model.model.language_model.layers[layer].self_attn

    def image_states(self, model: PreTrainedModel) -> Any:
        return model.model.visual  # not its merger, whose output Qwen2.5 still has in the order of windows

    def describe_keys(self) -> str:
        vision = self.config.vision_config
        cell = vision.patch_size * vision.spatial_merge_size
        return f"a grid of the picture's own shape, cells of {cell} px among the text's tokens"

    def image_token_id(self) -> int:
        return self.config.image_token_id

    def image_keys(self, inputs: Mapping[str, Tensor]) -> Tensor:
        places = inputs["input_ids"] == self.config.image_token_id
        found, grids = places.sum(dim=1).tolist(), self._grids(inputs)
        if len(grids) != len(found):
            raise DataError(f"{len(grids)} pictures in a batch of {len(found)} samples", "one picture a sample", DO)
        for count, (rows, cols) in zip(found, grids, strict=True):
            if count != rows * cols:
                raise DataError(
                    f"{count} picture tokens in a sample",
                    f"{rows * cols}: one picture of {rows} × {cols} cells",
                    f"{DO}, and raise max_length (or set it to None) if it cuts pictures",
                )
        return pad_sequence([own.nonzero()[:, 0] for own in places], batch_first=True)

    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[tuple[int, int]], processor: ProcessorMixin
    ) -> Tensor:
        grids = self._grids(inputs)
        if len(grids) != len(image_sizes):
            raise DataError(
                f"{len(grids)} pictures in a batch of {len(image_sizes)} samples", "one picture a sample", DO
            )
        return pad_sequence([grid_boxes(rows, cols).float() for rows, cols in grids], batch_first=True)

    def _grids(self, inputs: Mapping[str, Tensor]) -> list[tuple[int, int]]:
        """(rows, cols) of each picture's keys."""
        if inputs.get("video_grid_thw") is not None:
            raise DataError(
                "a batch with videos", "pictures: a map is of one picture, and a key of a video shows several frames",
                "drop the samples with videos",
            )  # fmt: skip
        grids = inputs.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.long))
        cells = grids[:, 1:] // self.config.vision_config.spatial_merge_size
        return [(rows, cols) for rows, cols in cells.tolist()]


class Qwen25VlAdapter(Qwen2VlAdapter):
    """As Qwen2-VL. Its tower looks through windows, and puts the keys back in order at the end."""

    model_type = "qwen2_5_vl"
