"""Ovis2 under the contract: tiles of 48 pixels, 6 × 6 cells of 2 × 2 patches, after the whole image."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Ovis2Processor
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

from families.by_hand import Keys
from families.contract import Contract
from families.geometry import Family, Geometry
from families.grids import (
    ROLES,
    SPECIAL_TOKENS,
    bicubic_blur,
    maker,
    square_patches,
    states_at_keys,
    template,
    text_settings,
    vision_settings,
)
from lavender.errors import UnsupportedModelError
from lavender.students.families.ovis2 import Ovis2Adapter
from lavender.students.registry import adapter_for
from lavender.world.student_models import _tokenizer

TILE, PATCH, STRIDE, SIDE = 48, 4, 2, 6
CELLS = SIDE * SIDE
ATOM = "<IMG_ATOM>"
INDICATORS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
# (height, width) → (rows, cols) of tiles, 1 to 6, as the image processor finds them; the first two by hand: no grid
# keeps 90 % of 300 × 500 px, so the one that keeps most is taken, with the fewest tiles
SIZES = {(300, 500): (3, 2), (500, 300): (2, 3), (60, 70): (2, 2), (120, 900): (6, 1), (41, 44): (1, 1)}


def family_of(texts: list[str], sizes: tuple[tuple[int, int], ...] = tuple(SIZES), **images: Any) -> Family:
    tokenizer = _tokenizer(texts, 300, (*SPECIAL_TOKENS, "<image>", *INDICATORS), ATOM, **ROLES)
    settings: dict[str, Any] = {
        "size": {"height": TILE, "width": TILE},
        "crop_to_patches": True,
        "max_patches": 6,
    }
    processor: Any = Ovis2Processor(
        Ovis2ImageProcessorPil(**settings | images),
        tokenizer,
        chat_template=template("<image>\n"),
        image_seq_length=CELLS,
    )
    config = Ovis2Config(
        text_config=text_settings(tokenizer, model_type="qwen2"),
        vision_config=vision_settings(image_size=TILE, patch_size=PATCH, hidden_stride=STRIDE, vocab_size=60),
        image_token_id=tokenizer.convert_tokens_to_ids(ATOM),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(list(INDICATORS)),
        vocab_size=len(tokenizer),
        hidden_size=64,
    )
    return Family(
        maker(Ovis2ForConditionalGeneration, config, tokenizer),
        processor,
        sizes,
        states_at_keys(
            lambda model: [layer.attention.out_proj for layer in model.model.vision_tower.transformer.encoder.layers]
        ),
        square_patches(processor, PATCH * STRIDE),
        bicubic_blur,
        clear=0.4,
    )


class TestOvis2(Contract):
    adapter = Ovis2Adapter
    describes = "a thumbnail, then tiles of 48 px row by row, each 6 × 6 cells among the text's tokens"
    keys = Keys((7 * CELLS, 7 * CELLS, 5 * CELLS), ATOM, "<IMG_START>", "<IMG_END>")

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(captions)

    def test_the_sizes_give_their_tiles(self, family, model):
        for size, (rows, cols) in SIZES.items():
            inputs, boxes = self.boxes_of(family, model, size)
            views = rows * cols + (rows * cols > 1)
            assert len(inputs["pixel_values"]) == views
            assert boxes.shape == (views * CELLS, 4)
            assert boxes[0].tolist() == pytest.approx([0, 0, 1 / SIDE, 1 / SIDE])
            # the second cell of the second row of the last tile
            last = boxes[-CELLS + SIDE + 1].tolist()
            top, left = (rows - 1 + 1 / SIDE) / rows, (cols - 1 + 1 / SIDE) / cols
            assert last == pytest.approx([top, left, top + 1 / SIDE / rows, left + 1 / SIDE / cols])

    def test_cells_that_are_part_padding_are_refused(self, model, batch):
        model.config.vision_config.hidden_stride = 5
        with pytest.raises(UnsupportedModelError) as caught:
            adapter_for(model.config).image_keys(batch)
        assert str(caught.value) == (
            "Got hidden_stride=5 with 12 × 12 patches. Expected a divisor: else the last cells of a tile are part "
            "padding. Do this: load a model with whole cells."
        )


class TestOtherTiles(Geometry):
    """By the nearest aspect, and none."""

    @pytest.fixture(scope="class", params=["aspect", "off"])
    @classmethod
    def family(cls, captions, request) -> Family:
        if request.param == "off":
            return family_of(captions, crop_to_patches=False)
        return family_of(captions, use_covering_area_grid=False)
