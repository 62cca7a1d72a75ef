"""Idefics3 (`HuggingFaceM4/Idefics3-8B-Llama3`) and SmolVLM (`HuggingFaceTB/SmolVLM-Instruct`).

A picture is cut into square tiles; its keys are those of the tiles, then those of the whole picture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from lavender.errors import DataError
from lavender.students.base import padded_keys
from lavender.students.families.self_attention import SelfAttentionAdapter, tile_frames
from lavender.students.image_keys import KeyLayout, grid_boxes, key_layout

TILE_LABEL = re.compile(r"<row_(\d+)_col_(\d+)>\s*$")
LABEL_TOKENS = 24  # more than a label has, even if the tokenizer spells it out


class Idefics3Adapter(SelfAttentionAdapter):
    """Image keys: rows × cols tiles, row by row, and the whole picture last; each view is a square of cells.

    The image processor squashes a picture to whole tiles and crops nothing, so the tiles are an exact grid. A cell is
    scale × scale patches (pixel shuffle). The grid is read from the labels that the processor writes before each tile,
    `<row_1_col_2>`; the whole picture has no such label.
    """

    model_type = "idefics3"
    parts = {  # noqa: RUF012
        "vision_tower": ("model.vision_model",),
        "connector": ("model.connector",),
        "language_model": ("model.text_model", "lm_head"),
    }

    def attention_module(self, model: PreTrainedModel, layer: int) -> Any:
        return model.model.text_model.layers[layer].self_attn

    def describe_keys(self) -> str:
        size = self.config.vision_config.image_size
        side = self._side(size)
        return (
            f"tiles of {size} px row by row, then the whole picture, each {side} × {side} cells among the text's tokens"
        )

    def image_keys(self, inputs: Mapping[str, Tensor]) -> Tensor:
        places = inputs["input_ids"] == self.config.image_token_id
        counts = places.sum(dim=1).tolist()
        cells = self._num_cells(inputs)
        for count, views in zip(counts, self._num_views(inputs, len(counts)), strict=True):
            if count != views * cells:
                raise DataError(
                    f"{count} picture tokens in a sample",
                    f"{views * cells}: {views} tiles and whole pictures of {cells} cells each",
                    "raise max_length (or set it to None), which cuts pictures",
                )
        return padded_keys(places)

    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        keys, cells, vision, boxes = self.image_keys(inputs), self._num_cells(inputs), self.config.vision_config, []
        for ids, positions, sizes in zip(inputs["input_ids"].cpu(), keys.cpu(), image_sizes, strict=True):
            grids = self._grids(ids, positions[positions >= 0][::cells].tolist(), processor)
            if len(grids) != len(sizes):
                raise DataError(
                    f"{len(grids)} pictures in the tokens of a sample",
                    f"{len(sizes)}, as many as the sample has",
                    "give the batch and the sizes of the same samples, pictures and no videos",
                )
            boxes.append(
                [
                    tile_boxes(grid, inputs["pixel_values"].shape[-1], vision.patch_size, self.config.scale_factor)
                    for grid in grids
                ]
            )
        return key_layout(boxes)

    def _side(self, size: int) -> int:
        """Number of cells along a side of a tile of `size` pixels."""
        return size // self.config.vision_config.patch_size // self.config.scale_factor

    def _num_cells(self, inputs: Mapping[str, Tensor]) -> int:
        pixels = inputs.get("pixel_values")
        return 1 if pixels is None else self._side(pixels.shape[-1]) ** 2

    def _num_views(self, inputs: Mapping[str, Tensor], samples: int) -> list[int]:
        """Number of views of each sample: tiles and whole pictures. Samples are padded to the most of the batch."""
        pixels, mask = inputs.get("pixel_values"), inputs.get("pixel_attention_mask")
        if pixels is None:
            return [0] * samples
        # without a mask, a view of zeros alone is padding, as it is for the model
        is_real = pixels.flatten(2).any(dim=2) if mask is None else mask[:, :, 0, 0] > 0
        return is_real.sum(dim=1).tolist()

    def _grids(self, ids: Tensor, starts: list[int], processor: ProcessorMixin) -> list[tuple[int, int]]:
        """(rows, cols) of the tiles of each picture, (0, 0) if it has none; from the text before each view.

        Args:
            ids: token ids of one sample.
            starts: position of the first token of each view.
        """
        grids, tiles = [], []
        for start in starts:
            label = TILE_LABEL.search(processor.tokenizer.decode(ids[max(0, start - LABEL_TOKENS) : start]))
            if label:
                tiles.append((int(label[1]), int(label[2])))
                continue
            rows, cols = tiles[-1] if tiles else (0, 0)
            if tiles != [(row + 1, col + 1) for row in range(rows) for col in range(cols)]:
                raise DataError(
                    f"tiles labelled {tiles} before a whole picture",
                    "rows and columns in order, none left out",
                    "pass what the model's own processor returns, its truncation off",
                )
            grids.append((rows, cols))
            tiles = []
        return grids


class SmolVlmAdapter(Idefics3Adapter):
    """As Idefics3, with fewer cells per tile. Frames of videos are refused: a map belongs to one picture."""

    model_type = "smolvlm"


@lru_cache(maxsize=128)
def tile_boxes(grid: tuple[int, int], tile_size: int, patch_size: int, scale: int) -> Tensor:
    """Boxes of one picture's keys, float32 ((rows·cols + 1)·side², 4): tiles row by row, the whole picture last.

    A border of a tile that no whole cell covers is not seen.
    """
    side = tile_size // patch_size // scale
    seen = side * scale * patch_size / tile_size
    frames = [*tile_frames(*grid, seen), (0.0, 0.0, seen, seen)]
    return torch.cat([grid_boxes(side, side, frame) for frame in frames]).float()
