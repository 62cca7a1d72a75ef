"""InternVL 2.5, 3 and 3.5 in transformers' format (`OpenGVLab/InternVL3-8B-hf`): square tiles, then a thumbnail."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from lavender.errors import ConfigError, DataError, UnsupportedModelError
from lavender.students.base import padded_keys
from lavender.students.families.self_attention import SelfAttentionAdapter, check_view_tokens, tile_frames
from lavender.students.image_keys import KeyLayout, grid_boxes, key_layout


class InternVlAdapter(SelfAttentionAdapter):
    """Image keys: rows × cols tiles, row by row, and a thumbnail last; each view is a square of cells.

    The image processor squashes a picture to whole tiles and crops nothing, so the tiles are an exact grid. A picture
    of one tile has no thumbnail. A cell is 2 × 2 patches at a downsample ratio of 0.5 (pixel shuffle).
    """

    model_type = "internvl"

    def describe_keys(self) -> str:
        size = self.config.vision_config.image_size[0]
        side = self._side(size)
        return f"tiles of {size} px row by row, then a thumbnail, each {side} × {side} cells among the text's tokens"

    def image_keys(self, inputs: Mapping[str, Tensor]) -> Tensor:
        places = inputs["input_ids"] == self.config.image_token_id
        pixels, counts = inputs.get("pixel_values"), places.sum(dim=1).tolist()
        num_views = 0 if pixels is None else len(pixels)
        cells = 1 if pixels is None else self._side(pixels.shape[-1]) ** 2
        check_view_tokens(counts, num_views, cells, "tile or thumbnail", f"tiles and thumbnails of {cells} cells")
        return padded_keys(places)

    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        keys, boxes = self.image_keys(inputs), []
        tile, least, most = tile_settings(processor)
        for positions, sizes in zip(keys.cpu(), image_sizes, strict=True):
            lengths = [len(run) for run in _runs(positions[positions >= 0].tolist())]
            pictures = [self._boxes(size, tile, least, most) for size in sizes]
            expected = list(map(len, pictures))
            if lengths != expected:
                raise DataError(
                    f"pictures of {lengths} tokens in a sample",
                    f"{expected}, for pictures of {sizes} px in {least} to {most} tiles, and no videos: a map is of "
                    "one picture, and frames look like pictures",
                    "drop samples with videos, give the batch and the sizes of the same samples, and set "
                    "crop_to_patches, min_patches and max_patches in processor.images_kwargs and not in the call",
                )
            boxes.append(pictures)
        return key_layout(boxes)

    def _boxes(self, image_size: tuple[int, int], tile: tuple[int, int], least: int, most: int) -> Tensor:
        """Boxes of the keys of a picture of (height, width) pixels: (key, 4)."""
        height, width = tile
        if height != width:
            raise ConfigError(f"tiles of {height} × {width} px", "squares", "load the model's own processor")
        cols, rows = get_optimal_tiled_canvas(image_size, tile, least, most) if most > 1 else (1, 1)
        patch = self.config.vision_config.patch_size[0]
        return tile_boxes((rows, cols), self._side(height), 1 - height % patch / height)

    def _side(self, size: int) -> int:
        """Number of cells along a side of a tile of `size` pixels."""
        config = self.config
        if config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r}",
                "'default', which leaves the class token out",
                "load a model with that strategy",
            )
        return round(size // config.vision_config.patch_size[0] * config.downsample_ratio)


def tile_settings(processor: ProcessorMixin) -> tuple[tuple[int, int], int, int]:
    """A tile's (height, width) in pixels, and the least and most tiles per picture: 1 and 1 if pictures are not cut.

    `images_kwargs` of the processor take precedence over the attributes of its image processor.
    """
    images: Any = processor.image_processor
    size, crop, least, most = (
        processor.images_kwargs.get(name, getattr(images, name))
        for name in ("size", "crop_to_patches", "min_patches", "max_patches")
    )
    tile = (size["height"], size["width"])
    return (tile, least, most) if crop else (tile, 1, 1)


@lru_cache(maxsize=128)
def tile_boxes(grid: tuple[int, int], side: int, seen: float) -> Tensor:
    """Boxes of one picture's keys, float32 (key, 4): tiles row by row, then the thumbnail unless there is one tile.

    Args:
        grid: rows and columns of tiles.
        side: number of cells along a side of a tile.
        seen: share of a tile's side that whole patches cover, from its top or left.
    """
    frames = tile_frames(*grid, seen)
    thumbnail = [(0.0, 0.0, seen, seen)] if len(frames) > 1 else []
    return torch.cat([grid_boxes(side, side, frame) for frame in frames + thumbnail]).float()


def _runs(places: list[int]) -> list[list[int]]:
    """Groups of consecutive positions, one per picture: markers stand between pictures."""
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][-1] == place - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs
