"""DeepSeek-VL and Janus under the contract: squares of 80 pixels, 10 × 10 patches, with padding on two sides."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLProcessor,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
)
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from families.by_hand import Keys
from families.contract import Contract
from families.geometry import Family
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
from lavender.errors import ConfigError
from lavender.students.families.deepseek_vl import DeepseekVlAdapter, JanusAdapter
from lavender.students.registry import adapter_for
from lavender.world.student_models import _tokenizer

SQUARE, PATCH = 80, 8
CELLS = (SQUARE // PATCH) ** 2
SIZES = ((300, 500), (500, 300), (150, 400), (200, 200), (37, 23))
TOKENS = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
VISION = {"image_size": SQUARE, "patch_size": PATCH}


def family_of(texts: list[str], kind: Any, processor_kind: Any, image_kind: Any, make_config: Any, out: str) -> Family:
    roles: Any = ROLES | {"extra_special_tokens": TOKENS}
    special = (*SPECIAL_TOKENS, TOKENS["boi_token"], TOKENS["eoi_token"])
    tokenizer = _tokenizer(texts, 300, special, TOKENS["image_token"], **roles)
    images = image_kind(size={"height": SQUARE, "width": SQUARE}, min_size=PATCH, image_mean=[0.5] * 3)
    images.background_color = (0, 0, 0)  # what tells padding from the image
    processor: Any = processor_kind(
        images, tokenizer, chat_template=template(TOKENS["image_token"]), num_image_tokens=CELLS
    )
    config = make_config(text_settings(tokenizer, model_type="llama"), tokenizer.image_token_id)
    return Family(
        maker(kind, config, tokenizer),
        processor,
        SIZES,
        states_at_keys(
            lambda model: [getattr(layer.self_attn, out) for layer in model.model.vision_model.encoder.layers]
        ),
        square_patches(processor, PATCH),
        bicubic_blur,
        clear=0.4,
    )


class PaddedSquares(Contract):
    """What both families share. Collected as a subclass only."""

    describes = "one square of 80 px, 10 × 10 patches among the text's tokens"

    def test_boxes_by_hand(self, family, model):
        """300 × 500 becomes 48 × 80: 16 rows of padding above, two patches. 150 × 400 becomes 30 × 80, 25 above."""
        _, boxes = self.boxes_of(family, model, (300, 500))
        assert boxes[0].tolist() == pytest.approx([-2 / 6, 0, -1 / 6, 0.1])
        assert boxes[20 + 2].tolist() == pytest.approx([0, 0.2, 1 / 6, 0.3])
        _, boxes = self.boxes_of(family, model, (150, 400))
        assert boxes[30].tolist() == pytest.approx([-1 / 30, 0, 7 / 30, 0.1])

    def test_an_image_processor_without_padding_is_refused(self, family, model, batch):
        processor = copy.copy(family.processor)
        processor.image_processor = copy.copy(family.processor.image_processor)
        processor.image_processor.do_pad = False
        with pytest.raises(ConfigError) as caught:
            adapter_for(model.config).image_boxes(batch, [[size] for size in SIZES[:3]], processor)
        assert str(caught.value) == (
            "Got do_resize=True, do_pad=False and size={'height': 80, 'width': 80} of the image processor. Expected "
            "True, True and 80 px, the side of the model's square. Do this: load the model's own processor."
        )


class TestDeepseekVl(PaddedSquares):
    adapter = DeepseekVlAdapter
    keys = Keys((CELLS, CELLS, CELLS), "<image_placeholder>", "<|im_start|>user\n", "what is it?")

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        def config(text: dict[str, Any], image_token_id: int) -> DeepseekVLConfig:
            vision = vision_settings(model_type="siglip_vision_model", vision_use_head=False, **VISION)
            return DeepseekVLConfig(text_config=text, vision_config=vision, image_token_id=image_token_id)

        parts = DeepseekVLForConditionalGeneration, DeepseekVLProcessor, DeepseekVLImageProcessorPil
        return family_of(captions, *parts, config, "out_proj")


@pytest.mark.slow  # the place of its keys is that of the class above
class TestJanus(PaddedSquares):
    adapter = JanusAdapter
    keys = Keys((CELLS, CELLS, CELLS), "<image_placeholder>", "<begin_of_image>", "<end_of_image>")

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        def config(text: dict[str, Any], image_token_id: int) -> JanusConfig:
            vision = vision_settings(projection_dim=64, num_image_tokens=CELLS, **VISION)
            made = {
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "latent_channels": 32,
                "num_embeddings": 16,
                "projection_dim": 64,
                "image_token_embed_dim": 64,
            }
            return JanusConfig(text_config=text, vision_config=vision, vq_config=made, image_token_id=image_token_id)

        return family_of(
            captions, JanusForConditionalGeneration, JanusProcessor, JanusImageProcessorPil, config, "projection_layer"
        )
