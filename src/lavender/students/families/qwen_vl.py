"""Qwen2-VL to Qwen3.5 (`Qwen/Qwen2.5-VL-7B-Instruct` …): one grid of cells of the picture's own shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from lavender.errors import DataError
from lavender.students.base import padded_keys
from lavender.students.families.self_attention import SelfAttentionAdapter
from lavender.students.image_keys import KeyLayout, grid_boxes, key_layout


class Qwen2VlAdapter(SelfAttentionAdapter):
    """Image keys: a grid over the whole picture, row by row; a key per cell of merge × merge patches.

    The image processor resizes a picture to whole cells and crops nothing, so the boxes are an exact grid. The pictures
    of a batch have different grids: `image_grid_thw`, long (picture, 3), in patches.
    """

    model_type = "qwen2_vl"
    parts = {  # noqa: RUF012
        "vision_tower": ("model.visual",),
        "connector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
        "language_model": ("model.language_model", "lm_head"),
    }

    def describe_keys(self) -> str:
        vision = self.config.vision_config
        cell = vision.patch_size * vision.spatial_merge_size
        return f"a grid of the picture's own shape, cells of {cell} px among the text's tokens"

    def image_keys(self, inputs: Mapping[str, Tensor]) -> Tensor:
        places = inputs["input_ids"] == self.config.image_token_id
        found, expected = int(places.sum()), sum(rows * cols for rows, cols in self._grids(inputs))
        if found != expected:
            raise DataError(
                f"{found} picture tokens in a batch",
                f"{expected}, a token for each cell of its pictures",
                "raise max_length (or set it to None) if it cuts pictures",
            )
        return padded_keys(places)

    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        grids, expected = self._grids(inputs), sum(map(len, image_sizes))
        if len(grids) != expected:
            raise DataError(
                f"{len(grids)} pictures in the inputs", f"{expected}", "pass the pictures the inputs were made of"
            )
        remaining = iter(grids)
        return key_layout([[grid_boxes(*next(remaining)) for _ in sizes] for sizes in image_sizes])

    def _grids(self, inputs: Mapping[str, Tensor]) -> list[tuple[int, int]]:
        """(rows, cols) of each picture's keys."""
        if inputs.get("video_grid_thw") is not None:
            raise DataError(
                "a batch with videos",
                "pictures: a map is of one picture, and a key of a video shows several frames",
                "drop the samples with videos",
            )
        grids = inputs.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.long))
        cells = grids[:, 1:] // self._merge_sizes(inputs)
        return [(rows, cols) for rows, cols in cells.tolist()]

    def _merge_sizes(self, inputs: Mapping[str, Tensor]) -> int | Tensor:
        """Number of patches along a side of a key's cell: of all pictures, or long (picture, 1)."""
        return self.config.vision_config.spatial_merge_size


class Qwen25VlAdapter(Qwen2VlAdapter):
    """As Qwen2-VL. Its vision tower works in windows, and restores the order of the keys at its end."""

    model_type = "qwen2_5_vl"


class Qwen3VlAdapter(Qwen2VlAdapter):
    """As Qwen2-VL: the same image processor, with patches of 16 px.

    DeepStack adds states of earlier tower layers to the outputs of the first text layers, at the keys' own positions: a
    key still shows the cell that its box says. Videos are refused as for Qwen2-VL.
    """

    model_type = "qwen3_vl"

    def replace_image_states(
        self, decoder_inputs: dict[str, Any], keys: Tensor, replace: Callable[[Tensor], Tensor]
    ) -> dict[str, Any]:
        replaced = super().replace_image_states(decoder_inputs, keys, replace)
        if decoder_inputs.get("deepstack_visual_embeds") is not None:
            replaced["deepstack_visual_embeds"] = [
                replace(states) for states in decoder_inputs["deepstack_visual_embeds"]
            ]
        return replaced


class Qwen3VlMoeAdapter(Qwen3VlAdapter):
    """As Qwen3-VL, with experts in place of one feed-forward network per layer."""

    model_type = "qwen3_vl_moe"


class Qwen35Adapter(Qwen2VlAdapter):
    """As Qwen3-VL without DeepStack. Most decoder layers have linear attention, which has no rows: they are left out.

    The layers with softmax attention multiply their output by a gate, which `q_proj` makes beside the queries.
    """

    model_type = "qwen3_5"
    gated_queries = True

    def usable_layers(self) -> tuple[int, ...]:
        return full_attention_layers(self.config.text_config)


class Qwen35MoeAdapter(Qwen35Adapter):
    """As Qwen3.5, with experts in place of one feed-forward network per layer."""

    model_type = "qwen3_5_moe"


def full_attention_layers(text_config: Any) -> tuple[int, ...]:
    """Indices of the layers with softmax attention on all tokens before, of a text model that has other layers too."""
    return tuple(layer for layer, kind in enumerate(text_config.layer_types) if kind == "full_attention")
