"""MiniCPM-V 4.6 (`openbmb/MiniCPM-V-4.6`): the whole picture, then slices of it, each a grid of its own shape."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from lavender.errors import ConfigError, DataError, UnsupportedModelError
from lavender.students.base import padded_keys
from lavender.students.families.qwen_vl import full_attention_layers
from lavender.students.families.self_attention import SelfAttentionAdapter, tile_frames
from lavender.students.image_keys import KeyLayout, grid_boxes, key_layout

Run = tuple[int, int]
"""Positions of consecutive picture tokens in a sequence, [start, end)."""


class MiniCpmV46Adapter(SelfAttentionAdapter):
    """Image keys: a grid over the whole picture, and one over each slice of it; a key per cell.

    A large picture is cut into rows × cols slices, after it was resized to whole cells in each. `target_sizes`, long
    (view, 2), has the patches of each view: of a picture, then of its slices. Which view is which is read from the
    tokens: `<image>` begins a picture, `<slice>` a slice, and a newline a row of slices. Mergers merge patches side by
    side, so a key shows its cell alone. This is no resampler, unlike in the models before it.

    The text model is Qwen3.5's: most layers have linear attention, and are left out.
    """

    model_type = "minicpmv4_6"
    gated_queries = True
    parts = {  # noqa: RUF012
        "vision_tower": ("model.vision_tower",),
        "connector": ("model.merger",),
        "language_model": ("model.language_model", "lm_head"),
    }

    def __init__(self, config: Any):
        super().__init__(config)
        if config.text_config.model_type != "qwen3_5_text":
            raise UnsupportedModelError(
                f"text_config.model_type={config.text_config.model_type!r}",
                "'qwen3_5_text', as published",
                "load a model with that text model",
            )

    def usable_layers(self) -> tuple[int, ...]:
        return full_attention_layers(self.config.text_config)

    def describe_keys(self) -> str:
        side = self._cell()[0] * self.config.vision_config.patch_size
        return f"the whole picture, then slices of it row by row, in cells of {side} px among the text's tokens"

    def image_keys(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if inputs.get("pixel_values_videos") is not None:
            raise DataError("a batch with videos", "pictures: a map is of one picture", "drop the samples with videos")
        places = inputs["input_ids"] == self.config.image_token_id
        found, expected = int(places.sum()), sum(rows * cols for rows, cols in self._grids(inputs))
        if found != expected:
            raise DataError(
                f"{found} picture tokens in a batch",
                f"{expected}, a token for each cell of its pictures",
                "raise max_length (or set it to None) if it cuts pictures, and set downsample_mode of the image "
                "processor as in the model's config, and not in the call",
            )
        return padded_keys(places)

    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        images: Any = processor.image_processor
        if not images.do_resize:
            raise ConfigError(
                "an image processor that does not resize pictures, so that its slices do not fill them",
                "do_resize=True",
                "load the model's own processor",
            )
        keys, grids, boxes = self.image_keys(inputs).cpu(), iter(self._grids(inputs)), []
        for ids, positions, sizes in zip(inputs["input_ids"].tolist(), keys, image_sizes, strict=True):
            pictures = views_of(ids, runs_of(positions[positions >= 0]), processor)
            if len(pictures) != len(sizes):
                raise DataError(
                    f"{len(pictures)} pictures in the tokens of a sample",
                    f"{len(sizes)}, as many as the sample has",
                    "give the batch and the sizes of the same samples",
                )
            boxes.append([picture_boxes(views, [next(grids) for _ in views]) for views in pictures])
        return key_layout(boxes)

    def _cell(self) -> tuple[int, int]:
        """Height and width of a key's cell, in patches."""
        config = self.config
        window = (1, 1) if config.downsample_mode == "4x" else config.vision_config.window_kernel_size
        height, width = (
            side * merge**config.merger_times for side, merge in zip(window, config.merge_kernel_size, strict=True)
        )
        return height, width

    def _grids(self, inputs: Mapping[str, Tensor]) -> list[tuple[int, int]]:
        """(rows, cols) of each view's keys."""
        height, width = self._cell()
        sizes = inputs.get("target_sizes", torch.zeros(0, 2, dtype=torch.long))
        return [(rows // height, cols // width) for rows, cols in sizes.tolist()]


def runs_of(positions: Tensor) -> list[Run]:
    """Groups of consecutive positions, which are ascending."""
    breaks = (positions.diff() > 1).nonzero()[:, 0] + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in positions.tensor_split(breaks) if len(run)]


def views_of(ids: list[int], runs: list[Run], processor: Any) -> list[list[Run]]:
    """The views of each picture of a sample: the whole picture, then its slices.

    Args:
        ids: token ids of the sample.
        runs: the runs of its picture tokens, one per view.
        processor: its tokens mark the views.
    """
    picture, part = (
        processor.tokenizer.convert_tokens_to_ids(token)
        for token in (processor.image_start_token, processor.slice_start_token)
    )
    views: list[list[Run]] = []
    for run in runs:
        before = ids[run[0] - 1]
        if before == picture:
            views.append([run])
        elif before == part and views:
            views[-1].append(run)
        else:
            raise DataError(
                f"picture tokens after {processor.tokenizer.decode([before])!r}",
                f"{processor.image_start_token!r}, and {processor.slice_start_token!r} for slices",
                "pass what the model's own processor returns",
            )
    return views


def picture_boxes(views: list[Run], grids: list[tuple[int, int]]) -> Tensor:
    """Boxes of a picture's keys: float64 (key, 4).

    Args:
        views: the runs of the whole picture and of its slices.
        grids: (rows, cols) of the keys of each view.

    Raises:
        DataError: the tokens are of other grids, or the slices do not fill rows.
    """
    slices = views[1:]
    # two markers lie between slices of a row; between rows there is a newline too
    rows = 1 + sum(after[0] - before[1] > 2 for before, after in pairwise(slices))
    counts, expected = [end - start for start, end in views], [height * width for height, width in grids]
    if counts != expected or len(slices) % rows:
        raise DataError(
            f"views of {counts} picture tokens, slices in {rows} rows",
            f"{expected}, and as many slices in each row",
            "pass what the model's own processor returns, its truncation off",
        )
    frames = [(0.0, 0.0, 1.0, 1.0), *tile_frames(rows, len(slices) // rows, 1.0)]
    return torch.cat([grid_boxes(*grid, frame) for grid, frame in zip(grids, frames, strict=True)])
