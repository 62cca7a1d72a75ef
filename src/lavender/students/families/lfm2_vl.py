"""LFM2-VL (`LiquidAI/LFM2-VL-1.6B`): small images in their own shape; large ones as square tiles and a thumbnail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import ProcessorMixin

from lavender.students.families.patch_grid import PatchGridAdapter, Shape, image_settings
from lavender.students.families.self_attention import Box, tile_frames

TOO_LARGE = ("max_image_tokens", "encoder_patch_size", "downsample_factor", "max_pixels_tolerance")
"""Settings that decide whether an image is cut into tiles."""
LAYOUT = ("min_tiles", "max_tiles", "tile_size")
"""Settings that decide into which."""


class Lfm2VlAdapter(PatchGridAdapter):
    """Image keys: rows × cols tiles, row by row, then the whole image; of a small image, the whole image alone.

    The image processor squashes an image to whole tiles or whole cells, so the boxes are exact grids. A cell is
    downsample_factor × downsample_factor patches. Views have shapes of their own: `spatial_shapes`, long (view, 2), in
    patches.

    Most decoder layers are convolutions, which have no attention on the image. They are not usable.
    """

    model_type = "lfm2_vl"
    head_norms = ("q_layernorm", "k_layernorm")

    def usable_layers(self) -> tuple[int, ...]:
        kinds = self.config.text_config.layer_types
        return tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")

    def describe_keys(self) -> str:
        cell = self.config.vision_config.patch_size * self.config.downsample_factor
        return f"tiles row by row, then the whole image in its own shape, cells of {cell} px among the text's tokens"

    def view_shapes(self, inputs: Mapping[str, Tensor]) -> list[Shape]:
        shapes = inputs.get("spatial_shapes")
        cells = [] if shapes is None else (shapes // self.config.downsample_factor).tolist()
        return [(rows, cols) for rows, cols in cells]

    def frames(self, image_size: tuple[int, int], processor: ProcessorMixin) -> list[Box]:
        images: Any = processor.image_processor
        height, width = image_size
        cuts, thumbnail = image_settings(processor, "do_image_splitting", "use_thumbnail")
        if not cuts or not images._is_image_too_large(height, width, *image_settings(processor, *TOO_LARGE)):
            return super().frames(image_size, processor)
        cols, rows, *_ = images._get_grid_layout(height, width, *image_settings(processor, *LAYOUT))
        whole = super().frames(image_size, processor) if thumbnail and rows * cols > 1 else []
        return tile_frames(rows, cols, 1.0) + whole
