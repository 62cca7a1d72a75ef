"""A declarative base for families whose images are grids of patches among the text's tokens.

An image becomes one or several *views*: the whole image, tiles of it, a thumbnail. Each view is a grid of cells, row by
row, and each cell is one token. A family says how a view becomes cells, and which part of the image each view shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import ProcessorMixin

from lavender.errors import DataError, UnsupportedModelError
from lavender.students.base import check_pixels, padded_keys
from lavender.students.families.llava import seen_frame
from lavender.students.families.self_attention import Box, SelfAttentionAdapter, tile_frames
from lavender.students.image_keys import KeyLayout, grid_boxes, key_layout

Shape = tuple[int, int]
"""(rows, cols)."""


class PatchGridAdapter(SelfAttentionAdapter):
    """Base of families whose image keys are grids of cells, the tokens of `image_token_id`.

    A subclass implements two methods: `view_shapes`, from the processor's output, and `frames`, from the processor's
    settings. Other tokens may stand between rows and views. `SquareAdapter` implements both for squares.
    """

    def view_shapes(self, inputs: Mapping[str, Tensor]) -> list[Shape]:
        """(rows, cols) of the cells of each view of the batch, in order."""
        raise NotImplementedError(f"{type(self).__name__} does not override view_shapes")

    def frames(self, image_size: tuple[int, int], processor: ProcessorMixin) -> list[Box]:
        """The part of the image that the cells of each of its views fill, in order. By default one view of it all.

        Args:
            image_size: (height, width) of the image in pixels, before the processor.
            processor: the model's processor.
        """
        return [(0.0, 0.0, 1.0, 1.0)]

    def image_keys(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self._views(inputs)
        return padded_keys(inputs["input_ids"] == self.image_token_id())

    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        boxes = []
        for shapes, sizes in zip(self._views(inputs), image_sizes, strict=True):
            frames = [self.frames(size, processor) for size in sizes]
            expected = sum(map(len, frames))
            if len(shapes) != expected:
                raise DataError(
                    f"{len(shapes)} views of images in the tokens of a sample",
                    f"{expected}, for images of {sizes} px with the processor's settings",
                    "give the batch and the sizes of the same samples, images and no videos, and set how images are "
                    "cut in the processor and not in the call",
                )
            remaining = iter(shapes)
            boxes.append([torch.cat([grid_boxes(*next(remaining), frame) for frame in views]) for views in frames])
        return key_layout(boxes)

    def _views(self, inputs: Mapping[str, Tensor]) -> list[list[Shape]]:
        """The views of each sample: those of the batch in order, assigned by the samples' numbers of tokens.

        Raises:
            DataError: the tokens of a sample are not those of whole views; an image has no whole cell.
        """
        left, samples = self.view_shapes(inputs)[::-1], []
        empty = [shape for shape in left if 0 in shape]
        if empty:
            raise DataError(
                f"an image of {empty[-1][0]} × {empty[-1][1]} cells, as the processor makes it: it is too low or too "
                "narrow for a cell, and has no token",
                f"at least 1 × 1: {self.describe_keys()}",
                "enlarge such images, or leave them out",
            )
        for count in (inputs["input_ids"] == self.image_token_id()).sum(dim=1).tolist():
            sample, expected = [], 0
            while expected < count and left:
                sample.append(left.pop())
                expected += sample[-1][0] * sample[-1][1]
            if expected != count:
                raise DataError(
                    f"{count} image tokens in a sample",
                    f"{expected}, for views of {sample} cells",
                    "raise max_length (or set it to None) if it cuts images",
                )
            samples.append(sample)
        if left:
            raise DataError(
                f"{len(left)} views of images without tokens",
                "tokens in the text for each view",
                "raise max_length (or set it to None) if it cuts images",
            )
        return samples


class Square(NamedTuple):
    """The square that the vision tower takes of each view.

    Attributes:
        size: its side in pixels.
        patch: the side of a patch in pixels.
        merge: a cell is merge × merge patches.
    """

    size: int
    patch: int
    merge: int = 1

    @property
    def side(self) -> int:
        """Number of cells along a side."""
        return self.size // self.patch // self.merge

    @property
    def covered(self) -> int:
        """Pixels along a side that whole cells cover, from the top or left."""
        return self.side * self.merge * self.patch


class SquareAdapter(PatchGridAdapter):
    """Base of families whose views are squares of one size: one per image, or tiles and perhaps a thumbnail.

    A subclass implements `square`. One that cuts images sets `thumbnail` and implements `tiles`. The processor must
    resize an image to whole tiles, without padding; one view alone may be padded or cropped, see `seen_frame`.
    """

    thumbnail: ClassVar[Literal["first", "last"] | None] = None
    """Where the whole image stands beside its tiles, if it has several. None if images are not cut."""

    def square(self) -> Square:
        """What the vision tower takes, from the config."""
        raise NotImplementedError(f"{type(self).__name__} does not override square")

    def tiles(self, image_size: tuple[int, int], processor: ProcessorMixin) -> Shape:
        """(rows, cols) of the tiles of an image of (height, width) pixels; (1, 1) if it is not cut."""
        return 1, 1

    def describe_keys(self) -> str:
        square, what = self.square(), "cells" if self.square().merge > 1 else "patches"
        grid = f"{square.side} × {square.side} {what}"
        if self.thumbnail is None:
            return f"one square of {square.size} px, {grid} among the text's tokens"
        tiles = f"tiles of {square.size} px row by row"
        views = f"a thumbnail, then {tiles}" if self.thumbnail == "first" else f"{tiles}, then a thumbnail"
        return f"{views}, each {grid} among the text's tokens"

    def keys_per_image(self) -> int | None:
        return self.square().side ** 2 if self.thumbnail is None else None

    def view_shapes(self, inputs: Mapping[str, Tensor]) -> list[Shape]:
        square, pixels = self.square(), inputs.get("pixel_values")
        check_pixels(inputs, square.size)
        count = 0 if pixels is None else pixels.flatten(0, -4).shape[0]
        return [(square.side, square.side)] * count

    def frames(self, image_size: tuple[int, int], processor: ProcessorMixin) -> list[Box]:
        square = self.square()
        if self.thumbnail is None:
            return [seen_frame(image_size, processor.image_processor, (square.covered, square.covered))]
        seen = square.covered / square.size
        tiles, whole = tile_frames(*self.tiles(image_size, processor), seen), [(0.0, 0.0, seen, seen)]
        if len(tiles) == 1:
            return tiles
        return whole + tiles if self.thumbnail == "first" else tiles + whole


def image_settings(processor: ProcessorMixin, *names: str) -> list[Any]:
    """Settings of the image processor. `images_kwargs` of the processor take precedence over its attributes."""
    kwargs: dict[str, Any] = getattr(processor, "images_kwargs", {})  # not every processor has them
    return [kwargs.get(name, getattr(processor.image_processor, name)) for name in names]


def check_feature_selection(strategy: str, needed: str) -> None:
    """Check that the model leaves out class tokens and nothing else.

    Raises:
        UnsupportedModelError: the `vision_feature_select_strategy` is another one.
    """
    if strategy != needed:
        raise UnsupportedModelError(
            f"vision_feature_select_strategy={strategy!r}",
            f"{needed!r}, which leaves out class tokens and nothing else",
            "load a model with that strategy",
        )
