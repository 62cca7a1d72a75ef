"""Idefics3 and SmolVLM: square tiles of the picture, then the whole of it, as tokens seen by every layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from lavender.errors import DataError
from lavender.students.base import VlmAdapter, padded_keys
from lavender.students.image_keys import KeyLayout, grid_boxes, key_layout

TILE_LABEL = re.compile(r"<row_(\d+)_col_(\d+)>\s*$")
LABEL_TOKENS = 24  # more than a label has where a tokenizer spells it out


class Idefics3Adapter(VlmAdapter):
    """Self-attention keys: rows × cols tiles row-major and the whole picture last, each a square of cells.

    The image processor squashes a picture to whole tiles and cuts nothing, so the tiles are an exact grid. A cell is
    scale × scale patches (pixel shuffle). How many tiles there are is read from the labels in the text, which the
    processor writes before each: `<row_1_col_2>`; the whole picture has none of them.
    """

    model_type = "idefics3"
    parts = {  # noqa: RUF012
        "vision_tower": ("model.vision_model",),
        "connector": ("model.connector",),
        "language_model": ("model.text_model", "lm_head"),
    }

    def usable_layers(self) -> tuple[int, ...]:
        return tuple(range(self.config.text_config.num_hidden_layers))

    def attention_module(self, model: PreTrainedModel, layer: int) -> Any:
        return model.model.text_model.layers[layer].self_attn

    def describe_keys(self) -> str:
        size = self.config.vision_config.image_size
        side = self._side(size)
        return (
            f"tiles of {size} px row by row, then the whole picture, each {side} × {side} cells among the text's tokens"
        )

    def image_token_id(self) -> int:
        return self.config.image_token_id

    def image_keys(self, inputs: Mapping[str, Tensor]) -> Tensor:
        places = inputs["input_ids"] == self.config.image_token_id
        found = places.sum(dim=1).tolist()
        views, cells = self._num_views(inputs, len(found)), self._num_cells(inputs)
        for count, own in zip(found, views, strict=True):
            if count != own * cells:
                raise DataError(
                    f"{count} picture tokens in a sample",
                    f"{own * cells}: {own} tiles and whole pictures of {cells} cells each",
                    "raise max_length (or set it to None), which cuts pictures",
                )
        return padded_keys(places)

    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        keys, cells, vision, boxes = self.image_keys(inputs), self._num_cells(inputs), self.config.vision_config, []
        for ids, own, sizes in zip(inputs["input_ids"].cpu(), keys.cpu(), image_sizes, strict=True):
            grids = self._grids(ids, own[own >= 0][::cells].tolist(), processor)
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
        """Cells along a side of a tile of `size` pixels."""
        return size // self.config.vision_config.patch_size // self.config.scale_factor

    def _num_cells(self, inputs: Mapping[str, Tensor]) -> int:
        pixels = inputs.get("pixel_values")
        return 1 if pixels is None else self._side(pixels.shape[-1]) ** 2

    def _num_views(self, inputs: Mapping[str, Tensor], samples: int) -> list[int]:
        """Tiles and whole pictures of each sample; samples of a batch are padded to the most."""
        pixels, mask = inputs.get("pixel_values"), inputs.get("pixel_attention_mask")
        if pixels is None:
            return [0] * samples
        # without a mask padding is what is 0 all over, as for the model
        shown = pixels.flatten(2).any(dim=2) if mask is None else mask[:, :, 0, 0] > 0
        return shown.sum(dim=1).tolist()

    def _grids(self, ids: Tensor, starts: list[int], processor: ProcessorMixin) -> list[tuple[int, int]]:
        """(rows, cols) of tiles of each picture, (0, 0) where there is only the whole, from what precedes each view."""
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
    """As Idefics3, with fewer cells a tile. Frames of videos are refused: a map is of one picture."""

    model_type = "smolvlm"


@lru_cache(maxsize=128)
def tile_boxes(grid: tuple[int, int], tile_size: int, patch_size: int, scale: int) -> Tensor:
    """Boxes of one picture's keys, float32 ((rows·cols + 1)·side², 4): tiles row-major, the whole picture last.

    A border of a tile that no whole patch fits is not seen.
    """
    (rows, cols), side = grid, tile_size // patch_size // scale
    seen = side * scale * patch_size / tile_size
    frames = [
        (row / rows, col / cols, (row + seen) / rows, (col + seen) / cols) for row in range(rows) for col in range(cols)
    ]
    return torch.cat([grid_boxes(side, side, frame) for frame in [*frames, (0.0, 0.0, seen, seen)]]).float()
