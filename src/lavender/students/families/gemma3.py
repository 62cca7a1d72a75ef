"""Gemma 3: a picture squashed to a square of soft tokens, and with pan-and-scan its crops as further squares."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Gemma3ImageProcessorPil, PreTrainedModel, ProcessorMixin

from lavender.errors import ConfigError, DataError
from lavender.students.base import VlmAdapter, check_pixels, padded_keys
from lavender.students.image_keys import KeyLayout, grid_boxes, key_layout

Box = tuple[float, float, float, float]


class PanAndScan(NamedTuple):
    """Settings of pan-and-scan, by their names in the image processor. Sizes are in pixels."""

    pan_and_scan_min_crop_size: int
    pan_and_scan_max_num_crops: int
    pan_and_scan_min_ratio_to_activate: float


class Gemma3Adapter(VlmAdapter):
    """Self-attention keys: for each view, the whole picture or a crop of it, a row-major square of soft tokens.

    A row of a sliding layer sees the keys within its window alone, 0 beyond; within a view keys see one another both
    ways. Both are in the layer's own mask, so the captured rows have them.
    """

    model_type = "gemma3"

    def usable_layers(self) -> tuple[int, ...]:
        return tuple(range(self.config.text_config.num_hidden_layers))

    def attention_module(self, model: PreTrainedModel, layer: int) -> Any:
        return model.model.language_model.layers[layer].self_attn

    def describe_keys(self) -> str:
        side, text = self._side(), self.config.text_config
        sliding = text.layer_types.count("sliding_attention")
        return (
            f"one square of {self.config.vision_config.image_size} px, {side} × {side} soft tokens among the text's, "
            f"and as many for each crop of pan-and-scan; {sliding} of {text.num_hidden_layers} layers see only the "
            f"last {text.sliding_window} tokens"
        )

    def keys_per_image(self) -> int:
        return self.config.mm_tokens_per_image

    def image_token_id(self) -> int:
        return self.config.image_token_id

    def image_keys(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self._num_views(inputs)
        return padded_keys(inputs["input_ids"] == self.config.image_token_id)

    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        check_pixels(inputs, self.config.vision_config.image_size)
        found, whole = self._num_views(inputs), (0.0, 0.0, 1.0, 1.0)
        settings = pan_and_scan_settings(processor)
        boxes = []
        for num_views, sizes in zip(found, image_sizes, strict=True):
            views = [[whole] for _ in sizes]
            if num_views != len(sizes) and settings is not None:
                views = [[whole, *crop_frames(size, settings)] for size in sizes]
            expected = sum(len(own) for own in views)
            if num_views != expected:
                raise DataError(
                    f"{num_views} pictures and crops in the tokens of a sample",
                    f"{expected}, of pictures of {sizes} px with the processor's images_kwargs",
                    "give the batch and the sizes of the same samples, and set pan-and-scan in processor.images_kwargs "
                    "and not in the call",
                )
            boxes.append([torch.cat([self._cells(frame) for frame in own]) for own in views])
        return key_layout(boxes)

    def _cells(self, frame: Box) -> Tensor:
        """Boxes of a view's keys. A border of the square that no whole cell fits is not seen."""
        vision, side = self.config.vision_config, self._side()
        patches = vision.image_size // vision.patch_size // side * side
        seen = patches * vision.patch_size / vision.image_size
        top, left, bottom, right = frame
        return grid_boxes(side, side, (top, left, top + seen * (bottom - top), left + seen * (right - left)))

    def _side(self) -> int:
        return round(self.config.mm_tokens_per_image**0.5)

    def _num_views(self, inputs: Mapping[str, Tensor]) -> list[int]:
        """Pictures and crops of each sample."""
        cells = self.config.mm_tokens_per_image
        counts = (inputs["input_ids"] == self.config.image_token_id).sum(dim=1).tolist()
        pixels = inputs.get("pixel_values")
        given = 0 if pixels is None else len(pixels)
        wrong = [count for count in counts if count % cells]
        if wrong:
            raise DataError(
                f"{wrong[0]} picture tokens in a sample",
                f"{cells} for each picture or crop",
                "raise max_length (or set it to None) if it cuts pictures",
            )
        if sum(counts) != given * cells:
            raise DataError(
                f"{sum(counts)} picture tokens in a batch",
                f"{given * cells}: {given} pictures and crops of {cells}",
                "raise max_length (or set it to None) if it cuts pictures",
            )
        return [count // cells for count in counts]


def pan_and_scan_settings(processor: ProcessorMixin) -> PanAndScan | None:
    """What pan-and-scan of a picture goes by; None where it is off.

    A processor's own `images_kwargs` win over the attributes of its image processor.
    """
    images: Any = processor.image_processor
    given: Mapping[str, Any] = processor.images_kwargs
    if not given.get("do_pan_and_scan", images.do_pan_and_scan):
        return None
    settings = {name: given.get(name, getattr(images, name)) for name in PanAndScan._fields}
    missing = [name for name, value in settings.items() if value is None]
    if missing:
        raise ConfigError(
            f"do_pan_and_scan=True without {missing}", "a number for each", "set them in processor.images_kwargs"
        )
    return PanAndScan(**settings)


@lru_cache(maxsize=512)
def crop_frames(image_size: tuple[int, int], settings: PanAndScan) -> tuple[Box, ...]:
    """Where the crops of a picture lie in it, as shares of (height, width); () where it gets none.

    The image processor cuts two pictures for us whose pixels say which row and which column they are of.
    """
    height, width = image_size
    cut, shape = Gemma3ImageProcessorPil().pan_and_scan, (1, height, width)
    rows = cut(np.broadcast_to(np.arange(height)[:, None], shape), *settings)
    cols = cut(np.broadcast_to(np.arange(width), shape), *settings)
    return tuple(
        (row[0, 0, 0] / height, col[0, 0, 0] / width, (row[0, -1, 0] + 1) / height, (col[0, 0, -1] + 1) / width)
        for row, col in zip(rows, cols, strict=True)
    )
