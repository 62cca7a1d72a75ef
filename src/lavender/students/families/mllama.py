"""Mllama (`meta-llama/Llama-3.2-11B-Vision-Instruct`, 90B): some text layers cross-attend to tiles of the picture."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.models.mllama.image_processing_pil_mllama import get_image_size_fit_to_canvas
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

from lavender.errors import DataError
from lavender.students.base import VlmAdapter, check_pixels
from lavender.students.image_keys import KeyLayout, grid_boxes, key_layout


class MllamaAdapter(VlmAdapter):
    """Image keys: max_num_tiles × (1 class token + g × g patches) per picture, g = image_size // patch_size.

    Every sample has as many keys as the sample with the most pictures. A row sees the last picture before it, and the
    pictures that stand side by side with that one.
    """

    model_type = "mllama"
    parts = {  # noqa: RUF012
        "vision_tower": ("model.vision_model",),
        "connector": ("model.multi_modal_projector",),
        "language_model": ("model.language_model", "lm_head"),
    }
    cross_attends = True

    def usable_layers(self) -> tuple[int, ...]:
        return tuple(self.config.text_config.cross_attention_layers)

    def attention_module(self, model: PreTrainedModel, layer: int) -> MllamaTextCrossAttention:
        return model.model.language_model.layers[layer].cross_attn

    def image_states(self, model: PreTrainedModel) -> nn.Module:
        return model.model.multi_modal_projector

    def describe_keys(self) -> str:
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        tiles = f"up to {vision.max_num_tiles} tiles of {vision.image_size} px"
        return f"{tiles}, each 1 class token + {side} × {side} patches"

    def keys_per_image(self) -> int:
        vision = self.config.vision_config
        return vision.max_num_tiles * (1 + (vision.image_size // vision.patch_size) ** 2)

    def image_token_id(self) -> int:
        return self.config.image_token_index

    def image_keys(self, inputs: Mapping[str, Tensor]) -> None:
        return None

    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        vision = self.config.vision_config
        check_pixels(inputs, vision.image_size)
        ratios = inputs.get("aspect_ratio_ids", torch.zeros(len(image_sizes), 0, dtype=torch.long))
        found, expected = (ratios > 0).sum(dim=1).tolist(), list(map(len, image_sizes))  # a ratio of 0 is padding
        if found != expected:
            raise DataError(
                f"{found} pictures in the inputs", f"{expected}", "pass the pictures the inputs were made of"
            )
        return key_layout(
            [
                [
                    tile_boxes(
                        size,
                        tuple(vision.supported_aspect_ratios[int(ratio) - 1]),
                        vision.max_num_tiles,
                        vision.image_size,
                        vision.patch_size,
                    )
                    for size, ratio in zip(sizes, ratios_of_sample, strict=False)
                ]
                for sizes, ratios_of_sample in zip(image_sizes, ratios, strict=True)
            ]
        )

    def seen_from(self, inputs: Mapping[str, Tensor], layout: KeyLayout) -> Tensor:
        tokens = inputs["input_ids"]
        mask = inputs.get("cross_attention_mask", torch.zeros(*tokens.shape, 0, 1))
        return (mask > 0).any(dim=-1).transpose(1, 2)


@lru_cache(maxsize=512)
def tile_boxes(
    image_size: tuple[int, int], tiles: tuple[int, int], max_tiles: int, tile_size: int, patch_size: int
) -> Tensor:
    """Boxes of one picture's keys: float64 (max_tiles·(1 + g²), 4), g = tile_size // patch_size.

    The picture is resized to fit `tiles` = (rows, cols), padded at the bottom and right, and cut into tiles row by row.
    The boxes of class tokens and unused tiles are empty; those of padding lie outside the picture.
    """
    height, width = get_image_size_fit_to_canvas(*image_size, tiles[0] * tile_size, tiles[1] * tile_size, tile_size)
    side = tile_size // patch_size
    boxes = torch.zeros(max_tiles, 1 + side * side, 4, dtype=torch.float64)
    covered = side * patch_size  # a border of a tile that no whole patch covers is not seen
    for row in range(tiles[0]):
        for col in range(tiles[1]):
            top, left = row * tile_size, col * tile_size
            frame = (top / height, left / width, (top + covered) / height, (left + covered) / width)
            boxes[row * tiles[1] + col, 1:] = grid_boxes(side, side, frame)
    return boxes.flatten(0, 1)
