"""Families with Pixtral's vision tower: Mistral Small 3.1 and later, and LightOnOCR."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from lavender.students.families.patch_grid import PatchGridAdapter, Shape
from lavender.students.families.self_attention import Box


class Mistral3Adapter(PatchGridAdapter):
    """Image keys: a grid over the whole image, row by row; a key per cell of merge × merge patches.

    The image processor resizes an image to whole cells and crops nothing, so the boxes are an exact grid. After each
    row stands a break token, which is another token and no image key. The images of a batch have different grids:
    `image_sizes`, long (image, 2), in pixels without the padding of the batch.
    """

    model_type = "mistral3"

    def describe_keys(self) -> str:
        return f"a grid of the image's own shape, cells of {self._cell()} px among the text's tokens"

    def view_shapes(self, inputs: Mapping[str, Tensor]) -> list[Shape]:
        sizes = inputs.get("image_sizes")
        return [] if sizes is None else [(rows, cols) for rows, cols in (sizes // self._cell()).tolist()]

    def _cell(self) -> int:
        return self.config.vision_config.patch_size * self.config.spatial_merge_size


class LightOnOcrAdapter(Mistral3Adapter):
    """As Mistral Small 3.1, without break tokens.

    The image processor resizes an image to whole patches, not to whole cells. The model leaves out what does not fill a
    cell, on the right and at the bottom.
    """

    model_type = "lighton_ocr"
    parts = {  # noqa: RUF012
        "vision_tower": ("model.vision_encoder",),
        "connector": ("model.vision_projection",),
        "language_model": ("model.language_model", "lm_head"),
    }

    def frames(self, image_size: tuple[int, int], processor: ProcessorMixin) -> list[Box]:
        height, width = _resized(processor.image_processor, image_size)
        cell = self._cell()
        return [(0.0, 0.0, height // cell * cell / height, width // cell * cell / width)]


@lru_cache(maxsize=4096)
def _resized(image_processor: Any, image_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels to which the image processor resizes an image."""
    height, width = image_size
    blank = image_processor(images=[Image.new("RGB", (width, height))], return_tensors="pt")
    height, width = blank["image_sizes"][0]
    return int(height), int(width)
