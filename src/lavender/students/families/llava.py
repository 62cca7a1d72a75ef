"""LLaVA-1.5 (`llava-hf/llava-1.5-7b-hf`): the patches of one square per picture are tokens of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import ProcessorMixin
from transformers.image_processing_backends import TorchvisionBackend

from lavender.errors import ConfigError, DataError, UnsupportedModelError
from lavender.students.base import check_pixels, padded_keys
from lavender.students.families.self_attention import Box, SelfAttentionAdapter
from lavender.students.image_keys import KeyLayout, grid_boxes, key_layout

STRATEGIES = {"clip_vision_model": "default", "siglip_vision_model": "full"}
"""The `vision_feature_select_strategy` that removes the class token of a tower, if it has one: "default" removes the
first state, "full" removes nothing."""
FIXED_TOWERS = tuple(STRATEGIES)
"""Towers that take only pictures of the config's size; others interpolate their position embeddings."""

OWN_SHAPES = "pixtral"
"""The tower whose pictures keep their own shapes; tokens stand between the rows of their patches."""


class LlavaAdapter(SelfAttentionAdapter):
    """Image keys: one grid of patches per picture, row by row, without class token (24 × 24 for LLaVA-1.5).

    The image processor decides which part of a picture the model sees: LLaVA-1.5's crops the centre of the longer
    side; others squash the picture or pad it to a square.
    """

    model_type = "llava"
    packs = True

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

    def image_keys(self, inputs: Mapping[str, Tensor]) -> Tensor:
        (rows, cols), tower = self._grid(inputs), self.config.vision_config.model_type
        if tower == OWN_SHAPES:
            raise UnsupportedModelError(
                f"a LLaVA with the tower of {tower}, which makes a grid of each picture's own shape",
                "a tower that takes all pictures of a batch in one size, such as CLIP's or SigLIP's",
                "choose a model with such a tower, or a Mistral Small 3.1, whose tower is a Pixtral too",
            )
        places = inputs["input_ids"] == self.config.image_token_index
        counts = places.sum(dim=1).tolist()
        cut = [count for count in counts if count % (rows * cols)]
        strategy, needed = self.config.vision_feature_select_strategy, STRATEGIES.get(tower, "default")
        if strategy != needed:
            what = "leaves the class token out" if needed == "default" else "leaves nothing out: it has no class token"
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={strategy!r} with a {tower}",
                f"{needed!r}, which {what}",
                "load a model with that strategy",
            )
        if cut:
            raise DataError(
                f"{cut[0]} picture tokens in a sample",
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

        return key_layout([[boxes(size) for size in sizes] for sizes in image_sizes])

    def _grid(self, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        """(rows, cols) of each picture's patches, from the processor's pixels; from the config without pictures."""
        vision = self.config.vision_config
        if vision.model_type in FIXED_TOWERS:
            check_pixels(inputs, vision.image_size)
        pixels = inputs.get("pixel_values")
        height, width = (vision.image_size, vision.image_size) if pixels is None else pixels.shape[-2:]
        return height // vision.patch_size, width // vision.patch_size


def seen_frame(image_size: tuple[int, int], images: Any, covered: tuple[int, int]) -> Box:
    """The box of the picture that the model's pixels show, as shares of the picture; beyond [0, 1] there is padding.

    Follows the image processor's steps: pad to a square, resize, centre crop. An axis of the picture begins at
    `origin` pixels of the canvas and is `extent` pixels long; a share is (pixel − origin) / extent.

    Args:
        image_size: (height, width) of the picture in pixels, before the processor.
        images: the image processor, of CLIP's or LLaVA's kind.
        covered: (rows, cols) of the model's pixels that whole patches cover, from the top left.

    Raises:
        ConfigError: the image processor pads or resizes in another way.
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
        # of an odd number of rows of padding, torchvision puts the smaller half first, and PIL the larger one
        half = _towards_zero if isinstance(images, TorchvisionBackend) else _downwards
        origin = [value - half(old - new) for value, old, new in zip(origin, canvas, crop, strict=True)]
    top, left = (-value / size for value, size in zip(origin, extent, strict=True))
    bottom, right = ((last - value) / size for last, value, size in zip(covered, origin, extent, strict=True))
    return top, left, bottom, right


def _downwards(number: int) -> int:
    return number // 2


def _towards_zero(number: int) -> int:
    return int(number / 2)


def _resized(canvas: list[int], size: Mapping[str, int]) -> list[int]:
    """(height, width) after the resize: a fixed size, or the shorter side fixed and the aspect kept."""
    target = {key: value for key, value in dict(size).items() if value}
    if set(target) == {"height", "width"}:
        return [target["height"], target["width"]]
    if set(target) != {"shortest_edge"}:
        raise ConfigError(
            f"the image processor's size {target}", "height and width, or shortest_edge alone", "change its size"
        )
    edge = target["shortest_edge"]
    short, long = min(canvas), max(canvas)
    longer = int(edge * long / short)
    return [edge, longer] if canvas[0] <= canvas[1] else [longer, edge]
