"""LLaVA-OneVision under the contract: as Granite Vision, and cells interpolated to fewer, and several pictures."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    ProcessorMixin,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from families.by_hand import Keys
from families.contract import Contract
from families.geometry import BRIGHT, Family, Geometry, coordinates, picture
from families.test_llava_next import local_states
from lavender.errors import DataError, UnsupportedModelError
from lavender.students.families.llava_next import LlavaOnevisionAdapter, square_boxes, tile_boxes
from lavender.students.registry import adapter_for
from lavender.world.student_models import build_llava_processor

TILE, PATCH, SIDE = 50, 8, 6  # a border of 2 pixels that no cell shows
PINPOINTS = [[rows * TILE, cols * TILE] for rows in (1, 2, 3) for cols in (1, 2, 3)]
SIZES = ((300, 500), (120, 900), (200, 200), (500, 300), (37, 23), (40, 90))
FITTING = ((200, 200), (200, 300), (300, 100), (100, 300))  # without padding: a cell that mixes it in is no box


class PicturesProcessor(LlavaOnevisionProcessor):
    """OneVision's processor without its slot for videos, which needs torchvision."""

    def __init__(self, image_processor, tokenizer, vision_aspect_ratio, chat_template=None):
        self.num_image_tokens, self.vision_feature_select_strategy = SIDE * SIDE, "full"
        self.image_token, self.vision_aspect_ratio = "<image>", vision_aspect_ratio
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def family_of(texts: list[str], most: str = "anyres_max_9", sizes=SIZES) -> Family:
    llava = build_llava_processor(texts, vocabulary=300)
    images = LlavaOnevisionImageProcessorPil(
        size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS, image_mean=(0.0, 0.0, 0.0)
    )
    processor = PicturesProcessor(images, llava.tokenizer, most, llava.chat_template)
    layers: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            **layers, hidden_size=64, image_size=TILE, patch_size=PATCH, vision_use_head=False
        ),
        text_config=Qwen2Config(
            **layers,
            vocab_size=len(processor.tokenizer),
            hidden_size=128,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            bos_token_id=None,
            eos_token_id=processor.tokenizer.eos_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
        ),
        image_token_index=processor.image_token_id,
        video_token_index=len(processor.tokenizer) - 2,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=most,
    )

    def make() -> LlavaOnevisionForConditionalGeneration:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = LlavaOnevisionForConditionalGeneration(copy.deepcopy(config)).eval()
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        return model

    def patches(inputs) -> torch.Tensor:
        """Pixels in place of features, packed by the model's own function; a newline is black."""
        pixels = inputs["pixel_values"].permute(0, 1, 3, 4, 2) * torch.tensor(images.image_std)
        pixels = pixels[:, :, : SIDE * PATCH, : SIDE * PATCH].unflatten(3, (SIDE, PATCH)).unflatten(2, (SIDE, PATCH))
        cells = list(pixels.transpose(3, 4).flatten(2, 3).flatten(3))
        if inputs["batch_num_images"].max() > 1:  # then a picture is but a square; what follows is padding
            cells = [one[:1] for one in cells]
        packed, _ = LlavaOnevisionModel.pack_image_features(
            cast(Any, SimpleNamespace(config=config)), cells, inputs["image_sizes"], torch.zeros(3 * PATCH**2), most
        )
        return torch.cat(packed).unflatten(1, (PATCH * PATCH, 3))

    return Family(make, processor, sizes, local_states, patches, blur=lambda size: (0.0, 0.0), clear=0.35)


def inputs_of(family: Family, images) -> dict[str, torch.Tensor]:
    """A batch of samples with these pictures, as TRL's collator makes it."""
    turns = ({"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a dog"})
    collate = DataCollatorForVisionLanguageModeling(family.processor)
    return dict(collate([{"images": own, "messages": [*turns]} for own in images]))


class TestLlavaOnevision(Contract):
    adapter = LlavaOnevisionAdapter
    describes = (
        "the whole picture, 6 × 6 cells, then up to 9 tiles of 50 px without their padding, a newline after each row, "
        "among the text's tokens; anyres_max_9 interpolates them to fewer, and several pictures have no tiles"
    )
    keys = Keys((36 + 10 * 19, 36 + 2 * 19, 36 + 18 * 19), "<image>", "<s>USER: ", "\n")

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(captions)

    @torch.no_grad()
    def test_several_pictures_are_padded_squares(self, family, model):
        """Their colours are those of their boxes, and a picture alone in its sample still has tiles."""
        sizes = [[(300, 500), (130, 300)], [], [(40, 90)]]
        inputs = inputs_of(family, [[coordinates(one) for one in own] for own in sizes])
        layout = adapter_for(model.config).image_boxes(inputs, sizes, family.processor)
        model(**inputs)  # its check of the number of tokens
        assert layout.pictures[0, :74].tolist() == [0] * 37 + [1] * 37
        assert layout.pictures[1].unique().tolist() == [-1]
        alone = tile_boxes((40, 90), (50, 100), TILE, PATCH, 9)
        assert torch.equal(layout.boxes[2][layout.pictures[2] == 0], alone)
        colours = family.patches(inputs)[:74].double().mean(1) * (255 / BRIGHT)
        boxes = layout.boxes[0, :74]
        whole = (boxes[:, :2] >= 0).all(1) & (boxes[:, 2:] <= 1).all(1) & (boxes[:, 2] > 0)
        assert whole.sum() == 6 * 3 + 6 * 2  # of 300 × 500 the third to fifth row, of 130 × 300 the third and fourth
        middle = boxes[whole].unflatten(1, (2, 2)).mean(1)
        assert (colours[whole][:, [1, 0]] - middle).abs().amax() < 0.01  # the edge of padding is blurred

    def test_square_boxes_by_hand(self):
        # 100 rows of padding above and below 300 × 500; cells of 8 of 50 pixels
        boxes = square_boxes((300, 500), 50, 8)
        assert boxes[0].tolist() == pytest.approx([-100 / 300, 0, (80 - 100) / 300, 80 / 500])
        assert boxes[35].tolist() == pytest.approx([(400 - 100) / 300, 400 / 500, (480 - 100) / 300, 480 / 500])
        assert boxes[36].tolist() == [0, 0, 0, 0]

    def test_a_cut_picture_is_refused(self, family, model):
        inputs = inputs_of(family, [[picture((37, 23)), picture((40, 90))]])
        places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
        inputs["input_ids"] = inputs["input_ids"][:, : places[-1]]
        with pytest.raises(DataError, match="Got 73 picture tokens in a sample. Expected 74: its pictures have"):
            adapter_for(model.config).image_keys(inputs)

    def test_another_aspect_ratio_is_refused(self, model, batch):
        model.config.vision_aspect_ratio = "pad"
        with pytest.raises(UnsupportedModelError) as caught:
            adapter_for(model.config).image_keys(batch)
        assert str(caught.value) == (
            "Got vision_aspect_ratio='pad'. Expected 'anyres_max_' and a number of tiles. Do this: set it as the "
            "published models have it: 'anyres_max_9'."
        )


class TestManyTiles(Geometry):
    """Cells of more tiles than two are interpolated to as many."""

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(captions, "anyres_max_2", FITTING)

    def test_cells_by_hand(self):
        # 18 × 18 cells, the square root of 324 / 72 is 2.12: 8 × 8 cells, the first one's middle at 18/16 old cells
        boxes = tile_boxes((200, 200), (150, 150), TILE, PATCH, 2)
        assert len(boxes) == 36 + 8 * 9
        assert boxes[36].tolist() == pytest.approx([0, 0, 18 / 150, 18 / 150])
        assert len(tile_boxes((200, 300), (100, 150), TILE, PATCH, 2)) == 36 + 6 * 11  # 12 × 18 by 1.73


def test_as_many_keys_as_the_published_processor_writes(captions):
    """OneVision's own settings, pictures of many sizes; in half of them cells are interpolated."""
    pinpoints = [[rows * 384, cols * 384] for rows in range(1, 7) for cols in range(1, 7)]
    processor = cast(PicturesProcessor, family_of(captions).processor)
    processor.image_processor = LlavaOnevisionImageProcessorPil()
    processor.num_image_tokens = 729
    sizes = [tuple(one) for one in np.random.default_rng(3).integers(20, 3000, (300, 2)).tolist()]
    expected = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    found = [len(tile_boxes(one, select_best_resolution(one, pinpoints), 384, 14, 9)) for one in sizes]
    assert found == expected
    plain = [len(tile_boxes(one, select_best_resolution(one, pinpoints), 384, 14)) for one in sizes]
    assert 100 < sum(one != other for one, other in zip(found, plain, strict=True)) < 200
