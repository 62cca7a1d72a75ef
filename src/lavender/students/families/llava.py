"""LLaVA-1.5: the picture's patches stand in the text as tokens, and every layer attends to both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from lavender.errors import ConfigError, DataError, UnsupportedModelError
from lavender.students.base import VlmAdapter, check_pixels, padded_keys
from lavender.students.image_keys import KeyLayout, grid_boxes, key_layout

STRATEGIES = {"clip_vision_model": "default", "siglip_vision_model": "full"}
"""Whether a tower's first state is a class token, which the model must leave out: "default" does, "full" does not."""
FIXED_TOWERS = tuple(STRATEGIES)
"""Towers that take pictures of the config's size alone; others interpolate their patches' places."""


class LlavaAdapter(VlmAdapter):
    """Self-attention keys: a row-major grid of patches at the picture's tokens, no class token.

    What part of a picture is seen is the image processor's choice: LLaVA-1.5's own cuts the longer side
    off (centre crop); others pad to a square or squash.
    """

    model_type = "llava"

    def usable_layers(self) -> tuple[int, ...]:
        return tuple(range(self.config.text_config.num_hidden_layers))

    def attention_module(self, model: PreTrainedModel, layer: int) -> Any:
        return model.model.language_model.layers[layer].self_attn

    def describe_keys(self) -> str:
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        if vision.model_type not in FIXED_TOWERS:
            return (
                f"patches of {vision.patch_size} px of what the processor makes of the picture, {side} × {side} if "
                f"that is {vision.image_size} px as in the config, among the text's tokens"
            )
        return f"one square of {vision.image_size} px, {side} × {side} patches among the text's tokens"

    def keys_per_image(self) -> int:
        return (self.config.vision_config.image_size // self.config.vision_config.patch_size) ** 2

    def image_token_id(self) -> int:
        return self.config.image_token_index

    def image_keys(self, inputs: Mapping[str, Tensor]) -> Tensor:
        (rows, cols), tower = self._grid(inputs), self.config.vision_config.model_type
        places = inputs["input_ids"] == self.config.image_token_index
        counts = places.sum(dim=1).tolist()
        wrong = [count for count in counts if count % (rows * cols)]
        strategy, needed = self.config.vision_feature_select_strategy, STRATEGIES.get(tower, "default")
        if strategy != needed:
            what = "leaves the class token out" if needed == "default" else "leaves nothing out: it has no class token"
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={strategy!r} with a {tower}",
                f"{needed!r}, which {what}",
                "load a model with that strategy",
            )
        if wrong:
            raise DataError(
                f"{wrong[0]} picture tokens in a sample",
                f"{rows * cols} for each picture, of {rows} × {cols} patches",
                "raise max_length (or set it to None) if it cuts pictures; else load the model's own processor",
            )
        return padded_keys(places)

    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        (rows, cols), patch = self._grid(inputs), self.config.vision_config.patch_size

        def boxes(size: tuple[int, int]) -> Tensor:
            return grid_boxes(rows, cols, seen_frame(size, processor.image_processor, (rows * patch, cols * patch)))

        return key_layout([[boxes(size) for size in own] for own in image_sizes])

    def _grid(self, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        """(rows, cols) of each picture's patches: of the pixels that the processor made, which a tower may take so."""
        vision = self.config.vision_config
        if vision.model_type in FIXED_TOWERS:
            check_pixels(inputs, vision.image_size)
        pixels = inputs.get("pixel_values")
        height, width = (vision.image_size, vision.image_size) if pixels is None else pixels.shape[-2:]
        return height // vision.patch_size, width // vision.patch_size


def seen_frame(image_size: tuple[int, int], images: Any, covered: tuple[int, int]) -> tuple[float, float, float, float]:
    """Where in the picture the first `covered` rows and columns of the model's pixels lie: (top, left, bottom, right).

    Follows the image processor's steps (pad to a square, resize, centre crop). An axis of the picture
    begins at `origin` pixels of the canvas and is `extent` pixels long; a share is (pixel − origin) / extent.
    """
    canvas, origin, extent = list(image_size), [0.0, 0.0], [float(side) for side in image_size]
    if getattr(images, "do_pad", False):
        if not hasattr(images, "pad_to_square"):
            raise ConfigError(
                f"do_pad=True in {type(images).__name__}, which pads at the end",
                "LLaVA's own image processor",
                "set do_pad=False, or load LlavaImageProcessor",
            )
        square = max(image_size)
        origin = [float((square - side) // 2) for side in image_size]
        canvas = [square, square]
    if images.do_resize:
        resized = _resized(canvas, images.size)
        scales = [new / old for new, old in zip(resized, canvas, strict=True)]
        origin = [value * scale for value, scale in zip(origin, scales, strict=True)]
        extent = [value * scale for value, scale in zip(extent, scales, strict=True)]
        canvas = resized
    if images.do_center_crop:
        crop = (images.crop_size["height"], images.crop_size["width"])
        origin = [value - (old - new) // 2 for value, old, new in zip(origin, canvas, crop, strict=True)]
    top, left = (-value / size for value, size in zip(origin, extent, strict=True))
    bottom, right = ((last - value) / size for last, value, size in zip(covered, origin, extent, strict=True))
    return top, left, bottom, right


def _resized(canvas: list[int], size: Mapping[str, int]) -> list[int]:
    """(height, width) after the resize: a fixed size, or the shorter side given and the aspect kept."""
    given = {key: value for key, value in dict(size).items() if value}
    if set(given) == {"height", "width"}:
        return [given["height"], given["width"]]
    if set(given) != {"shortest_edge"}:
        raise ConfigError(
            f"the image processor's size {given}", "height and width, or shortest_edge alone", "change its size"
        )
    edge = given["shortest_edge"]
    short, long = min(canvas), max(canvas)
    longer = int(edge * long / short)
    return [edge, longer] if canvas[0] <= canvas[1] else [longer, edge]
