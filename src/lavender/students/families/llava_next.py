"""LLaVA-NeXT (`llava-hf/llava-v1.6-mistral-7b-hf`, Granite Vision) and LLaVA-OneVision.

A picture's keys are those of the whole picture, squashed to a square, then those of its tiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import ProcessorMixin
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.modeling_llava_next import unpad_image

from lavender.errors import ConfigError, DataError, UnsupportedModelError
from lavender.students.base import padded_keys
from lavender.students.families.llava import STRATEGIES
from lavender.students.families.self_attention import SelfAttentionAdapter
from lavender.students.image_keys import KeyLayout, grid_boxes, key_layout


class Picture(NamedTuple):
    """(height, width) of a picture in pixels, and whether the processor cuts it into tiles."""

    size: tuple[int, int]
    tiled: bool


class LlavaNextAdapter(SelfAttentionAdapter):
    """Image keys: side × side cells of the whole picture, squashed to a square; then the cells of its tiles.

    The tiles form one canvas, whose rows of cells each end in a newline: a token of the same id that shows nothing.
    The canvas is the one of `image_grid_pinpoints` that fits the picture best. The picture is centred on it, with
    padding on two sides; rows or columns of padding alone are left out.
    """

    model_type = "llava_next"
    parts = {  # noqa: RUF012
        "vision_tower": ("model.vision_tower",),
        "connector": ("model.multi_modal_projector", "model.image_newline"),
        "language_model": ("model.language_model", "lm_head"),
    }

    def describe_keys(self) -> str:
        vision = self.config.vision_config
        side, tiles = vision.image_size // vision.patch_size, self.config.image_grid_pinpoints
        most = max(height * width for height, width in tiles) // vision.image_size**2
        return (
            f"the whole picture, {side} × {side} cells, then up to {most} tiles of {vision.image_size} px "
            "without their padding, a newline after each row, among the text's tokens"
        )

    def image_keys(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self._pictures(inputs)
        return padded_keys(inputs["input_ids"] == self.config.image_token_id)

    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        self._check_tiles(processor.image_processor)
        pictures = self._pictures(inputs)
        found = [[picture.size for picture in sample] for sample in pictures]
        expected = [[tuple(size) for size in sizes] for sizes in image_sizes]
        if found != expected:
            raise DataError(
                f"a batch with pictures of {found} px",
                f"{expected}",
                "give the batch and the sizes of the same samples, (height, width)",
            )
        return key_layout([[self._boxes(picture) for picture in sample] for sample in pictures])

    def _boxes(self, picture: Picture) -> Tensor:
        """Boxes of a picture's keys, newlines included: (key, 4)."""
        canvas = select_best_resolution(picture.size, self.config.image_grid_pinpoints)
        return tile_boxes(
            picture.size, canvas, self.config.vision_config.image_size, self.config.vision_config.patch_size
        )

    def _batch_pictures(self, inputs: Mapping[str, Tensor]) -> list[Picture]:
        """All pictures of the batch, in order."""
        sizes = inputs.get("image_sizes")
        return [] if sizes is None else [Picture((height, width), True) for height, width in sizes.tolist()]

    def _pictures(self, inputs: Mapping[str, Tensor]) -> list[list[Picture]]:
        """The pictures of each sample: those of the batch in order, assigned by the samples' numbers of tokens.

        Raises:
            DataError: the tokens of a sample are not those of whole pictures.
        """
        self._check_strategy()
        left, pictures = self._batch_pictures(inputs), []
        for count in (inputs["input_ids"] == self.config.image_token_id).sum(dim=1).tolist():
            sample, expected = [], 0
            while expected < count and left:
                sample.append(left.pop(0))
                expected += len(self._boxes(sample[-1]))
            if expected != count:
                raise DataError(
                    f"{count} picture tokens in a sample",
                    f"{expected}: its pictures have {[picture.size for picture in sample]} px",
                    "raise max_length (or set it to None), which cuts pictures",
                )
            pictures.append(sample)
        if left:
            raise DataError(
                f"{len(left)} pictures without tokens, of {[picture.size for picture in left]} px",
                "tokens in the text for each picture",
                "raise max_length (or set it to None), which cuts pictures",
            )
        return pictures

    def _check_strategy(self) -> None:
        tower, strategy = self.config.vision_config.model_type, self.config.vision_feature_select_strategy
        if STRATEGIES.get(tower, strategy) != strategy:
            raise UnsupportedModelError(
                f"vision_feature_select_strategy={strategy!r} with a {tower}",
                f"{STRATEGIES[tower]!r}, which leaves out class tokens and nothing else",
                "load a model with that strategy",
            )

    def _check_tiles(self, images: Any) -> None:
        """Check that the image processor makes the tiles that the model's config names."""
        size = self.config.vision_config.image_size
        sides = {side for sizes in (images.size, images.crop_size) for side in dict(sizes or {}).values() if side}
        if sides != {size}:
            raise ConfigError(
                f"the image processor's size {dict(images.size)} and crop_size {dict(images.crop_size or {})}",
                f"{size} px for both, the side of the model's tiles",
                "load the model's own processor",
            )
        found, expected = (list(map(list, settings.image_grid_pinpoints)) for settings in (images, self.config))
        if found != expected:
            raise ConfigError(
                f"the image processor's image_grid_pinpoints {found}",
                f"the model's, {expected}",
                "load the model's own processor",
            )


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """As LLaVA-NeXT (`llava-hf/llava-onevision-qwen2-7b-ov-hf`), with two differences.

    The cells of many tiles are interpolated to fewer cells. If a sample has several pictures, none is cut into tiles:
    each is padded to a square, with one newline at its end.
    """

    model_type = "llava_onevision"

    def describe_keys(self) -> str:
        ratio = self.config.vision_aspect_ratio
        return f"{super().describe_keys()}; {ratio} interpolates them to fewer, and several pictures have no tiles"

    def _boxes(self, picture: Picture) -> Tensor:
        vision, most = self.config.vision_config, self.config.vision_aspect_ratio.removeprefix("anyres_max_")
        if not most.isdecimal():
            raise UnsupportedModelError(
                f"vision_aspect_ratio={self.config.vision_aspect_ratio!r}",
                "'anyres_max_' and a number of tiles",
                "set it as the published models have it: 'anyres_max_9'",
            )
        if not picture.tiled:
            return square_boxes(picture.size, vision.image_size, vision.patch_size)
        canvas = select_best_resolution(picture.size, self.config.image_grid_pinpoints)
        return tile_boxes(picture.size, canvas, vision.image_size, vision.patch_size, int(most))

    def _batch_pictures(self, inputs: Mapping[str, Tensor]) -> list[Picture]:
        pictures, counts = super()._batch_pictures(inputs), inputs.get("batch_num_images")
        if counts is None:
            return pictures
        tiled = [count == 1 for count in counts.tolist() for _ in range(count)]
        return [Picture(picture.size, is_tiled) for picture, is_tiled in zip(pictures, tiled, strict=True)]


@lru_cache(maxsize=128)
def tile_boxes(
    image_size: tuple[int, int], canvas: tuple[int, int], tile_size: int, patch_size: int, most_tiles: int | None = None
) -> Tensor:
    """Boxes of one picture's keys in the order of `pack_image_features`: float32 (key, 4), empty for newlines.

    The picture is resized to fit the canvas and centred on it. A border of a tile that no whole patch covers is not
    seen.

    Args:
        image_size: (height, width) of the picture in pixels.
        canvas: (height, width) of all tiles together in pixels.
        tile_size, patch_size: sides in pixels.
        most_tiles: cells of more tiles are interpolated to the cells of so many; None keeps all.
    """
    side = tile_size // patch_size
    seen = side * patch_size / tile_size
    image = torch.empty(3, *image_size, device="meta")
    resized = get_patch_output_size(image, canvas, input_data_format=ChannelDimension.FIRST)
    starts, ends = [], []
    for canvas_length, length in zip(canvas, resized, strict=True):
        cells = torch.arange(side, dtype=torch.float64) * patch_size
        tiles = torch.arange(canvas_length // tile_size)[:, None] * tile_size
        start = (tiles + cells).flatten() - (canvas_length - length) // 2
        starts.append(start / length)
        ends.append((start + patch_size) / length)
    rows, cols = len(starts[0]), len(starts[1])
    boxes = torch.stack(
        [
            starts[0][:, None].expand(rows, cols),
            starts[1].expand(rows, cols),
            ends[0][:, None].expand(rows, cols),
            ends[1].expand(rows, cols),
        ]
    )
    kept = unpad_image(boxes, image_size)
    if most_tiles is not None:
        kept = _interpolated(kept, most_tiles * side**2)
    lines = torch.cat([kept, torch.zeros(4, kept.shape[1], 1)], dim=2).flatten(1).T
    return torch.cat([grid_boxes(side, side, (0.0, 0.0, seen, seen)), lines]).float()


def _interpolated(boxes: Tensor, most: int) -> Tensor:
    """Boxes (4, row, col) of the cells after the model's interpolation, which happens if they are far more than `most`.

    A new cell lies where the interpolation samples, and is as large as its share of the grid.
    """
    rows, cols = boxes.shape[1:]
    ratio = math.sqrt(rows * cols / most)
    if ratio <= 1.1:
        return boxes
    size = [int(rows // ratio), int(cols // ratio)]
    starts, ends = interpolate(boxes[None], size, mode="bilinear")[0].unflatten(0, (2, 2))
    middle, half = (starts + ends) / 2, (ends - starts) / 2
    half = half * torch.tensor([rows / size[0], cols / size[1]])[:, None, None]
    return torch.cat([middle - half, middle + half])


def square_boxes(image_size: tuple[int, int], tile_size: int, patch_size: int) -> Tensor:
    """Boxes of a picture that is padded to a square, float32 (side² + 1, 4); that of the newline is empty."""
    side, longest = tile_size // patch_size, max(image_size)
    covered = side * patch_size / tile_size * longest
    (height, width), (above, before) = image_size, [(longest - length) // 2 for length in image_size]
    frame = (-above / height, -before / width, (covered - above) / height, (covered - before) / width)
    return torch.cat([grid_boxes(side, side, frame), torch.zeros(1, 4)]).float()
