"""Aya Vision and, where torchvision is, Command A Vision under the contract.

Tiles of 48 pixels, 6 × 6 cells of 2 × 2 patches; sliding and full text layers.
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Cohere2VisionProcessor,
    GotOcr2ImageProcessorPil,
)

from families.by_hand import Keys
from families.contract import Contract
from families.geometry import Family, Geometry
from families.grids import (
    ROLES,
    SPECIAL_TOKENS,
    bicubic_blur,
    maker,
    several,
    square_patches,
    states_at_keys,
    template,
    text_settings,
    vision_settings,
)
from lavender.errors import DataError, UnsupportedModelError
from lavender.students.families.aya_vision import AyaVisionAdapter, Cohere2VisionAdapter
from lavender.students.registry import adapter_for
from lavender.world.student_models import _tokenizer

TILE, PATCH, MERGE, SIDE = 48, 4, 2, 6
CELLS = SIDE * SIDE
# (height, width) → (rows, cols) of tiles, 1 to 6, by hand: the nearest aspect; of equal ones the one of more tiles,
# if they have at most twice the image's pixels. 1.67 is nearest to 3:2, 7.5 to 6:1, 1 to 1:1 and 2:2.
SIZES = {(300, 500): (2, 3), (500, 300): (3, 2), (97, 190): (1, 2), (120, 900): (1, 6), (41, 44): (1, 1)}
PATCH_TOKEN = "<|IMG_PATCH|>"
SETTINGS: dict[str, Any] = {
    "size": {"height": TILE, "width": TILE},
    "min_patches": 1,
    "max_patches": 6,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
VISION = vision_settings(model_type="siglip_vision_model", image_size=TILE, patch_size=PATCH, vision_use_head=False)
LAYERS = {
    "model_type": "cohere2",
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 400,
}
# (height, width) → (rows, cols) of Command A Vision's tiles, by hand: of the grids of at most 6 tiles the one that
# shrinks the image least, or enlarges it least; 41 × 44 fits one tile, 60 × 70 two by two
COMMAND_A_SIZES = {(300, 500): (2, 3), (500, 300): (3, 2), (60, 70): (2, 2), (41, 44): (1, 1)}


def output_projections(model: Any) -> list[Any]:
    return [layer.self_attn.out_proj for layer in model.model.vision_tower.encoder.layers]


def build_processor(texts: list[str], **images: Any) -> AyaVisionProcessor:
    """With the published mean and deviation of 0.5."""
    tokens = (*SPECIAL_TOKENS, "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE_GLOBAL", "TILE")
    return AyaVisionProcessor(
        GotOcr2ImageProcessorPil(**SETTINGS | images),
        _tokenizer(texts, 300, tokens, PATCH_TOKEN, **ROLES),
        patch_size=PATCH,
        img_size=TILE,
        downsample_factor=MERGE,
        chat_template=template("<image>\n"),
    )


def family_of(texts: list[str], sizes: tuple[tuple[int, int], ...] = tuple(SIZES), **images: Any) -> Family:
    processor: Any = build_processor(texts, **images)
    config = AyaVisionConfig(
        text_config=text_settings(processor.tokenizer, **LAYERS),
        vision_config=VISION,
        downsample_factor=MERGE,
        image_token_index=processor.image_token_id,
    )
    return Family(
        maker(AyaVisionForConditionalGeneration, config, processor.tokenizer),
        processor,
        sizes,
        states_at_keys(output_projections),
        square_patches(processor, PATCH * MERGE),
        bicubic_blur,
        clear=0.4,
    )


class TestAyaVision(Contract):
    adapter = AyaVisionAdapter
    describes = "tiles of 48 px row by row, then a thumbnail, each 6 × 6 cells among the text's tokens"
    keys = Keys((7 * CELLS, 7 * CELLS, 3 * CELLS), PATCH_TOKEN, "<|START_OF_IMG|>TILE_1", "<|END_OF_IMG|>")

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
            # the second cell of the second row of the last tile
            last = boxes[rows * cols * CELLS - CELLS + SIDE + 1].tolist()
            top, left = (rows - 1 + 1 / SIDE) / rows, (cols - 1 + 1 / SIDE) / cols
            assert last == pytest.approx([top, left, top + 1 / SIDE / rows, left + 1 / SIDE / cols])
            assert boxes[-CELLS].tolist() == pytest.approx([0, 0, 1 / SIDE, 1 / SIDE])

    def test_settings_in_the_call_are_refused(self, family, model):
        sizes = [[(300, 500)]]
        batch = several(family.processor, "<image>", sizes, images_kwargs={"max_patches": 2})
        with pytest.raises(DataError) as caught:
            adapter_for(model.config).image_boxes(batch, sizes, family.processor)
        assert str(caught.value) == (
            "Got 3 views of images in the tokens of a sample. Expected 7, for images of [(300, 500)] px with the "
            "processor's settings. Do this: give the batch and the sizes of the same samples, images and no videos, "
            "and set how images are cut in the processor and not in the call."
        )

    def test_keys_without_their_first_patch_are_refused(self, model, batch):
        model.config.vision_feature_select_strategy = "default"
        with pytest.raises(UnsupportedModelError) as caught:
            adapter_for(model.config).image_keys(batch)
        assert str(caught.value) == (
            "Got vision_feature_select_strategy='default'. Expected 'full', which leaves out class tokens and nothing "
            "else. Do this: load a model with that strategy."
        )


class TestOtherTiles(Geometry):
    """Other numbers of tiles: the published twelve, and none."""

    @pytest.fixture(scope="class", params=["12", "off", "one"])
    @classmethod
    def family(cls, captions, request) -> Family:
        family = family_of(captions, max_patches={"12": 12, "off": 6, "one": 1}[request.param])
        processor: Any = family.processor
        if request.param == "off":
            processor.images_kwargs = processor.images_kwargs | {"crop_to_patches": False}
        return family


class TestCommandAVision(Contract):
    adapter = Cohere2VisionAdapter
    describes = TestAyaVision.describes
    keys = Keys((7 * CELLS, 7 * CELLS, 5 * CELLS), PATCH_TOKEN, "<|START_OF_IMG|>", "<|IMG_LINE_BREAK|><|END_OF_IMG|>")

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        pytest.importorskip("torchvision", reason="Command A Vision's image processor needs torchvision")
        from transformers.models.cohere2_vision.image_processing_cohere2_vision import Cohere2VisionImageProcessor

        tokens = {
            "image_token": PATCH_TOKEN,
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        }
        roles: Any = ROLES | {"extra_special_tokens": tokens}
        special = (*SPECIAL_TOKENS, *list(tokens.values())[1:])
        tokenizer: Any = _tokenizer(captions, 300, special, PATCH_TOKEN, **roles)
        images: Any = Cohere2VisionImageProcessor(**SETTINGS)
        images.patch_size = SIDE  # cells along a side of a tile, as the published one has it
        processor: Any = Cohere2VisionProcessor(images, tokenizer, chat_template=template(PATCH_TOKEN))
        config = Cohere2VisionConfig(
            text_config=text_settings(tokenizer, **LAYERS),
            vision_config=VISION,
            downsample_factor=MERGE,
            image_token_id=tokenizer.image_token_id,
            alignment_intermediate_size=64,
        )
        return Family(
            maker(Cohere2VisionForConditionalGeneration, config, tokenizer),
            processor,
            tuple(COMMAND_A_SIZES),
            states_at_keys(output_projections),
            square_patches(processor, PATCH * MERGE),
            bicubic_blur,
            clear=0.4,
        )

    def test_the_sizes_give_their_tiles(self, family, model):
        for size, (rows, cols) in COMMAND_A_SIZES.items():
            inputs, boxes = self.boxes_of(family, model, size)
            views = rows * cols + (rows * cols > 1)
            assert len(inputs["pixel_values"]) == views
            last = boxes[rows * cols * CELLS - CELLS].tolist()  # the first cell of the last tile
            assert last[:2] == pytest.approx([(rows - 1) / rows, (cols - 1) / cols])
