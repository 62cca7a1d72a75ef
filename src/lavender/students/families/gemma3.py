"""Gemma 3 (`google/gemma-3-4b-it`, 12b, 27b): a square of soft tokens per picture, and per crop of pan-and-scan."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Gemma3ImageProcessorPil, ProcessorMixin

from lavender.errors import ConfigError, DataError
from lavender.students.base import check_pixels, padded_keys
from lavender.students.families.self_attention import Box, SelfAttentionAdapter, check_view_tokens
from lavender.students.image_keys import KeyLayout, grid_boxes, key_layout


class PanAndScan(NamedTuple):
    """Settings of pan-and-scan, named as in the image processor. Sizes are in pixels."""

    pan_and_scan_min_crop_size: int
    pan_and_scan_max_num_crops: int
    pan_and_scan_min_ratio_to_activate: float


class Gemma3Adapter(SelfAttentionAdapter):
    """Image keys: `mm_tokens_per_image` soft tokens (16 × 16) per view, row by row.

    A view is the whole picture, squashed to a square, or one crop of it. A picture's views follow one another, the
    whole picture first. A row of a sliding layer sees only the keys within its window; the keys of a view see each
    other in both directions. The layer's own mask has both, so the captured rows do too.
    """

    model_type = "gemma3"

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

    def counts_tokens(self, processor: ProcessorMixin) -> bool:
        return pan_and_scan_settings(processor) is None  # transformers does not count the crops

    def image_keys(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self._num_views(inputs)
        return padded_keys(inputs["input_ids"] == self.config.image_token_id)

    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        check_pixels(inputs, self.config.vision_config.image_size)
        whole: Box = (0.0, 0.0, 1.0, 1.0)
        settings = pan_and_scan_settings(processor)
        boxes = []
        for num_views, sizes in zip(self._num_views(inputs), image_sizes, strict=True):
            views = [[whole] for _ in sizes]
            if num_views != len(sizes) and settings is not None:
                views = [[whole, *crop_frames(size, settings)] for size in sizes]
            expected = sum(map(len, views))
            if num_views != expected:
                raise DataError(
                    f"{num_views} pictures and crops in the tokens of a sample",
                    f"{expected}, of pictures of {sizes} px with the processor's images_kwargs",
                    "give the batch and the sizes of the same samples, and set pan-and-scan in processor.images_kwargs "
                    "and not in the call",
                )
            boxes.append([torch.cat([self._cell_boxes(frame) for frame in frames]) for frames in views])
        return key_layout(boxes)

    def _cell_boxes(self, frame: Box) -> Tensor:
        """Boxes of the keys of a view of `frame`: (key, 4). A border that no whole cell covers is not seen."""
        vision, side = self.config.vision_config, self._side()
        patches = vision.image_size // vision.patch_size // side * side
        seen = patches * vision.patch_size / vision.image_size
        top, left, bottom, right = frame
        return grid_boxes(side, side, (top, left, top + seen * (bottom - top), left + seen * (right - left)))

    def _side(self) -> int:
        return round(self.config.mm_tokens_per_image**0.5)

    def _num_views(self, inputs: Mapping[str, Tensor]) -> list[int]:
        """Number of views of each sample: pictures and crops."""
        cells = self.config.mm_tokens_per_image
        counts = (inputs["input_ids"] == self.config.image_token_id).sum(dim=1).tolist()
        pixels = inputs.get("pixel_values")
        num_views = 0 if pixels is None else len(pixels)
        check_view_tokens(counts, num_views, cells, "picture or crop", f"pictures and crops of {cells}")
        return [count // cells for count in counts]


def pan_and_scan_settings(processor: ProcessorMixin) -> PanAndScan | None:
    """The processor's settings of pan-and-scan; None if it is off.

    `images_kwargs` of the processor take precedence over the attributes of its image processor.

    Raises:
        ConfigError: pan-and-scan is on, and a setting is missing.
    """
    images: Any = processor.image_processor
    kwargs: Mapping[str, Any] = processor.images_kwargs
    if not kwargs.get("do_pan_and_scan", images.do_pan_and_scan):
        return None
    settings = {name: kwargs.get(name, getattr(images, name)) for name in PanAndScan._fields}
    missing = [name for name, value in settings.items() if value is None]
    if missing:
        raise ConfigError(
            f"do_pan_and_scan=True without {missing}", "a number for each", "set them in processor.images_kwargs"
        )
    return PanAndScan(**settings)


@lru_cache(maxsize=512)
def crop_frames(image_size: tuple[int, int], settings: PanAndScan) -> tuple[Box, ...]:
    """The part of a picture of (height, width) pixels that each crop shows; () if it gets no crops.

    The image processor itself crops two arrays, whose values are their row and column numbers.
    """
    height, width = image_size
    crop, shape = Gemma3ImageProcessorPil().pan_and_scan, (1, height, width)
    rows = crop(np.broadcast_to(np.arange(height)[:, None], shape), *settings)
    cols = crop(np.broadcast_to(np.arange(width), shape), *settings)
    return tuple(
        (row[0, 0, 0] / height, col[0, 0, 0] / width, (row[0, -1, 0] + 1) / height, (col[0, 0, -1] + 1) / width)
        for row, col in zip(rows, cols, strict=True)
    )
