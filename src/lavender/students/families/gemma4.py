"""Gemma 4 (`google/gemma-4-e2b-it` …): one grid of soft tokens of the image's own shape."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lavender.errors import DataError
from lavender.students.families.patch_grid import PatchGridAdapter, Shape


class Gemma4Adapter(PatchGridAdapter):
    """Image keys: a grid over the whole image, row by row; a soft token is the mean of k × k patches.

    The image processor squashes an image to whole cells and crops nothing, so the boxes are an exact grid. The images
    of a batch have different grids: `image_position_ids`, long (image, patch, 2), column and row of each patch, -1 for
    padding.

    The last layers may reuse the keys of an earlier layer. They have no key projection, and are not usable.
    """

    model_type = "gemma4"
    parts = {  # noqa: RUF012
        "vision_tower": ("model.vision_tower", "model.audio_tower"),
        "connector": ("model.embed_vision", "model.embed_audio"),
        "language_model": ("model.language_model", "lm_head"),
    }

    def usable_layers(self) -> tuple[int, ...]:
        modes = self.config.text_config.kv_sharing_modes
        return tuple(layer for layer, mode in enumerate(modes) if mode != "reuse")

    def describe_keys(self) -> str:
        vision, text = self.config.vision_config, self.config.text_config
        sliding = [text.layer_types[layer] for layer in self.usable_layers()].count("sliding_attention")
        return (
            f"a grid of the image's own shape, cells of {vision.patch_size * vision.pooling_kernel_size} px among the "
            f"text's tokens; {sliding} of {len(self.usable_layers())} layers see only the last {text.sliding_window} "
            "tokens"
        )

    def view_shapes(self, inputs: Mapping[str, Tensor]) -> list[Shape]:
        if inputs.get("pixel_values_videos") is not None:
            raise DataError("a batch with videos", "images: a map is of one image", "drop the samples with videos")
        places = inputs.get("image_position_ids")
        if places is None:
            return []
        pool = self.config.vision_config.pooling_kernel_size
        return [(rows, cols) for cols, rows in ((places.amax(dim=1) + 1) // pool).tolist()]
