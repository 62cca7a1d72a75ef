"""What a family's tests bring, and the place of every image key: shown by colours, planted patches and single keys.

Pictures are named by (height, width) in pixels. Boxes are (top, left, bottom, right), shares of the picture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from lavender.students.image_keys import KeyLayout, to_grid
from lavender.students.registry import adapter_for
from lavender.students.word_maps import AnsweredPicture
from lavender.words import words_of

GRID = (11, 13)
WHOLE = (0.0, 0.0, 1.0, 1.0)
BRIGHT = 230  # the most of a colour that shows a place: filters overshoot, and 8 bits cut at 255


@dataclass(frozen=True)
class Family:
    """What a family's tests must bring.

    Attributes:
        make: makes a tiny model of random weights, each time the same, in eval mode.
        processor: its processor.
        sizes: (height, width) of pictures that together use every arrangement the processor knows.
        local_states: from the model and a batch's inputs, one vector for each image key that depends on the
            key's own pixels alone, (sample, key, width), in the order of attention. Found without lavender.
            Of a resampler: for each patch that it gets, in its order.
        patches: from a picture's inputs, the pixels of each image key, un-normalised to [0, 1]:
            (key, pixel, 3), zeros where a key shows none. Found without lavender. Of a resampler: of each patch.
        blur: how far the processor may shift a patch's mean colour, in shares of the picture, of each size.
        spill: how much of a patch's colour may come from beyond it, where padding is resized with the picture.
        clear: how much of what a repainted cell changes must come back there; less where cells are hardly larger
            than patches, since patches at a cell's border change too.
        view: the part of a picture that the processor lets through, a box, by hand; where it cuts nothing, the whole.
    """

    make: Callable[[], PreTrainedModel]
    processor: ProcessorMixin
    sizes: tuple[tuple[int, int], ...]
    local_states: Callable[[PreTrainedModel, Mapping[str, Tensor]], Tensor]
    patches: Callable[[Mapping[str, Tensor]], Tensor]
    blur: Callable[[tuple[int, int]], tuple[float, float]]
    spill: Callable[[tuple[int, int]], float] = lambda size: 0.0
    clear: float = 0.5
    view: Callable[[tuple[int, int]], tuple[float, float, float, float]] = lambda size: WHOLE


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Noise in big dots, so that neighbouring patches differ."""
    dots = np.random.default_rng(seed).integers(256, size=(5, 7, 3), dtype=np.uint8)
    return Image.fromarray(dots).resize((size[1], size[0]), Image.Resampling.NEAREST)


def coordinates(size: tuple[int, int]) -> Image.Image:
    """Red is x and green is y, as shares of the picture and of BRIGHT; blue is BRIGHT, and 0 nowhere but in padding."""
    rows, cols = (np.arange(size[0]) + 0.5) / size[0], (np.arange(size[1]) + 0.5) / size[1]
    x, y = np.broadcast_to(cols, size), np.broadcast_to(rows[:, None], size)
    return Image.fromarray(np.rint(BRIGHT * np.stack([x, y, np.ones(size)], axis=-1)).astype(np.uint8))


def reading(size: tuple[int, int], answer: str, seed: int = 0) -> AnsweredPicture:
    return AnsweredPicture(picture(size, seed), "what is it?", answer, words_of(answer))


def batch_of(family: Family, readings: list[AnsweredPicture], side: str = "right") -> dict[str, Tensor]:
    """The model's inputs for a batch of readings, by the real processor."""
    texts = [family.processor.apply_chat_template(one.messages(), tokenize=False) for one in readings]
    return dict(
        family.processor(
            images=[[one.image] for one in readings],
            text=texts,
            padding=True,
            padding_side=side,
            add_special_tokens=False,
            return_tensors="pt",
        )
    )


def laid(attention: Tensor, boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention (map, key) on one picture, laid on it: (map, rows, cols)."""
    layout = KeyLayout(boxes[None], torch.zeros(1, len(boxes), dtype=torch.long))
    return to_grid(attention[None, None, None], layout, torch.zeros(1, len(attention), dtype=torch.long), grid)[0, 0, 0]


def parameters_zeroed(module: nn.Module) -> None:
    """Silence a module whose output is added to a residual stream."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


class Geometry:
    """The place of every image key. Collected as a subclass only, which has a fixture `family` of scope "class"."""

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls) -> Family:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def built(cls, family) -> PreTrainedModel:
        """Never run, and never changed."""
        return family.make()

    @pytest.fixture
    def model(self, built) -> PreTrainedModel:
        """A fresh one for each test; a copy takes a third of the time of building."""
        return copy.deepcopy(built)

    def boxes_of(self, family, model, size, image=None) -> tuple[dict[str, Tensor], Tensor]:
        """A picture's inputs and the boxes (key, 4) of its keys; of a resampler, those of its patches."""
        one = AnsweredPicture(picture(size) if image is None else image, "what?", "dog", words_of("dog"))
        inputs = batch_of(family, [one])
        layout = adapter_for(model.config).image_boxes(inputs, [[size]], family.processor)
        return inputs, layout.boxes[0] if layout.views is None else layout.boxes.flatten(0, 1)

    def test_every_patch_shows_what_its_box_says(self, family, model):
        for size in family.sizes:
            inputs, boxes = self.boxes_of(family, model, size, coordinates(size))
            colours = family.patches(inputs).double().mean(1) * (255 / BRIGHT)
            inside = laid(torch.eye(len(boxes)), boxes, (1, 1)).flatten().double()
            # blue is 1 in the picture and 0 in padding: its mean is the share of the box inside the picture
            torch.testing.assert_close(colours[:, 2], inside, rtol=0, atol=1e-5 + family.spill(size), msg=f"{size}")
            half = inside > 0.5 - 1e-6
            assert half.sum() >= 16
            centre = boxes[half].clamp(0, 1).unflatten(1, (2, 2)).mean(1)  # of the part inside
            found = colours[half][:, [1, 0]] / colours[half, 2:]  # green is y, red is x; padding has neither
            error = ((found - centre).abs() * inside[half, None]).amax(dim=0)  # a filter shifts small parts farther
            assert (error <= 0.002 + torch.tensor(family.blur(size))).all(), f"{size}: {error}"

    @torch.no_grad()
    def test_a_planted_patch_comes_back_at_its_cell(self, family, model):
        """Repaint one cell: the keys whose states change are those that lie there, in the order of attention.

        A cell that is cut off changes none. One with less than a quarter in view is passed over: the patches that
        show it show more of its neighbour, and the filter of a resize sees a little beyond what is cut.
        """
        for size in family.sizes:
            image, came_back, view = picture(size), 0, family.view(size)
            top, left, bottom, right = view[0] * 3, view[1] * 5, view[2] * 3, view[3] * 5
            inputs, boxes = self.boxes_of(family, model, size, image)
            before = family.local_states(model, inputs)
            for row, col in ((0, 0), (0, 4), (1, 2), (2, 1), (2, 4)):
                # how much of the cell's height or width; below 0 it is how far away, in cells
                in_view = min(min(row + 1, bottom) - max(row, top), min(col + 1, right) - max(col, left))
                if -0.1 < in_view < 0.25:
                    continue
                (y, x), planted, cell = (size[0] / 3, size[1] / 5), image.copy(), f"cell {row, col} of {size}"
                planted.paste((255, 255, 255), (round(col * x), round(row * y), round(col * x + x), round(row * y + y)))
                changed, _ = self.boxes_of(family, model, size, planted)
                attention = (family.local_states(model, changed) - before)[0].norm(dim=-1)
                assert (attention.max() > 0) == (in_view > 0), cell
                if in_view > 0:
                    maps = laid((attention / attention.sum())[None], boxes, (3, 5)).flatten()
                    assert maps.argmax().item() == row * 5 + col, cell
                    assert maps[row * 5 + col] > family.clear * maps.sum(), cell
                    came_back += 1
            assert came_back == 5 or (came_back and view != WHOLE), size

    def test_attention_on_one_key_comes_back_in_its_box(self, family, model):
        for size in family.sizes:
            _, boxes = self.boxes_of(family, model, size)
            maps = laid(torch.eye(len(boxes)), boxes, GRID)
            middle = boxes.unflatten(1, (2, 2)).mean(1)
            inside = ((middle > 0) & (middle < 1)).all(1)  # the middle of an empty box is 0
            assert inside.any()
            for index in inside.nonzero().flatten().tolist():
                row, col = (middle[index] * torch.tensor(GRID)).int().tolist()
                assert maps[index, row, col] > 0
            assert maps[((boxes[:, :2] >= 1) | (boxes[:, 2:] <= 0)).any(1)].abs().sum() == 0
