"""Mistral Small 3.1 and LightOnOCR under the contract: cells of 2 × 2 patches of 4 pixels, images of 160 at most."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LightOnOcrProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from families.asking import traces
from families.by_hand import Keys
from families.contract import Contract
from families.core import LEARN, Core
from families.geometry import Family
from families.grids import (
    ROLES,
    SPECIAL_TOKENS,
    bicubic_blur,
    maker,
    several,
    states_at_keys,
    template,
    text_settings,
    vision_settings,
)
from lavender.alignment.objective import attach
from lavender.config import AlignmentConfig
from lavender.errors import DataError, UnsupportedModelError
from lavender.students.families.pixtral import LightOnOcrAdapter, Mistral3Adapter
from lavender.students.registry import adapter_for
from lavender.world.student_models import _tokenizer

PATCH, MERGE, LONGEST = 4, 2, 160
# (height, width) → (rows, cols) of cells of 8 px, by hand: the longer side at most 160, each rounded up to whole cells
SIZES = {(300, 500): (12, 20), (500, 300): (20, 12), (120, 900): (3, 20), (97, 133): (13, 17), (44, 61): (6, 8)}
TOKENS = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SCALED = ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}  # from position 64 on


def mistral_processor(*args: Any, **kwargs: Any) -> Any:
    """PixtralProcessor.

    Its module imports a function of the image processor that needs torchvision; the module of PIL's has the same one.
    """
    with pytest.MonkeyPatch.context() as patch:
        name = "transformers.models.pixtral.image_processing_pixtral"
        patch.setitem(sys.modules, name, image_processing_pil_pixtral)
        module = importlib.import_module("transformers.models.pixtral.processing_pixtral")
    return module.PixtralProcessor(*args, **kwargs)


def family_of(texts: list[str], kind: Any, config: Any, processor_class: Any, text: str, tower: str) -> Family:
    roles: Any = ROLES | {"extra_special_tokens": TOKENS}
    tokenizer = _tokenizer(texts, 300, (*SPECIAL_TOKENS, "[IMG_BREAK]", "[IMG_END]"), "[IMG]", **roles)
    cell = PATCH * MERGE
    processor = processor_class(
        PixtralImageProcessorPil(size={"longest_edge": LONGEST}, patch_size={"height": cell, "width": cell}),
        tokenizer,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        chat_template=template("[IMG]"),
    )
    made = config(
        text_config=text_settings(tokenizer, model_type=text, rope_parameters=SCALED if text == "ministral3" else ROPE),
        vision_config=vision_settings(model_type="pixtral", patch_size=PATCH, image_size=LONGEST, head_dim=8),
        spatial_merge_size=MERGE,
        image_token_id=processor.image_token_id,
    )

    def patches(inputs: Mapping[str, Tensor]) -> Tensor:
        """Pixels of each key: of the image without the batch's padding, row by row."""
        images, keys = processor.image_processor, []
        for pixels, (height, width) in zip(inputs["pixel_values"], inputs["image_sizes"].tolist(), strict=True):
            image = pixels[:, :height, :width].permute(1, 2, 0) * torch.tensor(images.image_std)
            image = (image + torch.tensor(images.image_mean)).unflatten(1, (-1, cell)).unflatten(0, (-1, cell))
            keys.append(image.transpose(1, 2).reshape(-1, cell**2, 3))
        return torch.cat(keys)

    return Family(
        maker(kind, made, tokenizer),
        processor,
        tuple(SIZES),
        states_at_keys(
            lambda model: [layer.attention.o_proj for layer in getattr(model.model, tower).transformer.layers]
        ),
        patches,
        bicubic_blur,
        clear=0.4,
    )


class OwnGrids(Contract):
    """What both families share. Collected as a subclass only."""

    describes = "a grid of the image's own shape, cells of 8 px among the text's tokens"

    def test_the_sizes_give_their_grids(self, family, model):
        for size, (rows, cols) in SIZES.items():
            inputs, boxes = self.boxes_of(family, model, size)
            assert inputs["image_sizes"].tolist() == [[rows * 8, cols * 8]]
            assert boxes.shape == (rows * cols, 4)
            assert boxes[cols + 1].tolist() == pytest.approx([1 / rows, 1 / cols, 2 / rows, 2 / cols])
            assert boxes[-1, 2:].tolist() == [1, 1]

    def test_the_padding_of_a_batch_shows_nothing(self, family, model):
        sizes = [[(300, 500)], [(44, 61), (500, 300)]]
        batch = several(family.processor, "[IMG]", sizes)
        assert batch["pixel_values"].shape[-2:] == (160, 160)
        tensors = adapter_for(model.config).key_tensors(batch, sizes, family.processor)
        assert tensors["pictures"].tolist() == [[0] * 240 + [-1] * 48, [0] * 48 + [1] * 240]
        assert tensors["boxes"][1, 47].tolist() == pytest.approx([5 / 6, 7 / 8, 1, 1])

    @pytest.mark.parametrize(("count", "views"), [(95, 96), (97, 192)])
    def test_a_cut_image_is_refused(self, model, count, views):
        adapter, ids = adapter_for(model.config), torch.full((1, 300), 5)
        ids[0, 7 : 7 + count] = adapter.image_token_id()
        with pytest.raises(DataError, match=rf"Got {count} image tokens in a sample\. Expected {views}, for views of"):
            adapter.image_keys({"input_ids": ids, "image_sizes": torch.tensor([[64, 96], [96, 64]])})

    def test_an_image_without_tokens_is_refused(self, model):
        adapter, ids = adapter_for(model.config), torch.full((1, 300), 5)
        ids[0, 7 : 7 + 96] = adapter.image_token_id()
        with pytest.raises(DataError, match="Got 1 views of images without tokens"):
            adapter.image_keys({"input_ids": ids, "image_sizes": torch.tensor([[64, 96], [96, 64]])})


class TestMistral3(OwnGrids):
    adapter = Mistral3Adapter
    keys = Keys((12 * 20, 20 * 12, 3 * 20), "[IMG]", "<|im_start|>user\n", "[IMG_END]")

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        parts = Mistral3ForConditionalGeneration, Mistral3Config, mistral_processor
        return family_of(captions, *parts, "mistral", "vision_tower")


class TestMinistral3(Core):
    """As Ministral 3 has it: queries are scaled by their position, and positions count padding."""

    test_padding_side_changes_nothing = None

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        parts = Mistral3ForConditionalGeneration, Mistral3Config, mistral_processor
        return family_of(captions, *parts, "ministral3", "vision_tower")

    @pytest.mark.parametrize("alignment", [{}], ids=["default"])
    def test_checkpointing_without_reentry_gives_equal_gradients(self, family, batch, readings, alignment):
        super().test_checkpointing_without_reentry_gives_equal_gradients(family, batch, readings, alignment)

    def test_learned_projections_are_refused(self, model):
        """They would miss the scale. Nothing is changed."""
        before = traces(model)
        with pytest.raises(UnsupportedModelError) as caught:
            attach(model, AlignmentConfig(**LEARN))
        assert traces(model) == before
        assert str(caught.value) == (
            "Got pooling 'learn' with llama_4_scaling_beta=0.1, which scales queries by their positions. Expected "
            "queries that positions rotate alone. Do this: choose another pooling or loss."
        )


@pytest.mark.parametrize(
    ("size", "made", "end"), [((20, 60), (20, 60), (0.8, 14 / 15)), ((26, 40), (28, 40), (6 / 7, 1))]
)
def test_patches_that_fill_no_cell_are_not_seen(captions, size, made, end):
    """LightOnOCR's processor resizes to whole patches, here of 4 pixels, and the model drops half cells."""
    parts = LightOnOcrForConditionalGeneration, LightOnOcrConfig, LightOnOcrProcessor
    processor: Any = family_of(captions, *parts, "qwen3", "vision_encoder").processor
    processor.image_processor.patch_size = {"height": PATCH, "width": PATCH}
    config: Any = LightOnOcrConfig(
        text_config={"model_type": "qwen3"},
        vision_config=vision_settings(model_type="pixtral", patch_size=PATCH, image_size=LONGEST, head_dim=8),
        spatial_merge_size=MERGE,
        image_token_id=processor.image_token_id,
    )
    inputs = several(processor, "[IMG]", [[size]])
    assert tuple(inputs["image_sizes"][0].tolist()) == made
    boxes = adapter_for(config).key_tensors(inputs, [[size]], processor)["boxes"][0]
    assert boxes[-1, 2:].tolist() == pytest.approx(end)


def test_an_image_without_a_whole_cell_is_named():
    """12 × 400 px become 14 × 406 px, which is one row of patches, and no row of cells of two."""
    config: Any = LightOnOcrConfig(
        text_config={"model_type": "qwen3"}, vision_config={"model_type": "pixtral", "patch_size": 14}, image_token_id=9
    )
    images = PixtralImageProcessorPil(size={"longest_edge": 1540}, patch_size={"height": 14, "width": 14})
    sizes = images(images=[Image.new("RGB", (400, 12))], return_tensors="pt")["image_sizes"]
    assert sizes.tolist() == [[14, 406]]
    with pytest.raises(DataError, match=r"Got an image of 0 × 14 cells.*cells of 28 px.*enlarge such images, or leave"):
        adapter_for(config).image_keys({"input_ids": torch.full((1, 9), 5), "image_sizes": sizes})


@pytest.mark.slow  # the place of its keys is that of the class above
class TestLightOnOcr(OwnGrids):
    adapter = LightOnOcrAdapter
    keys = Keys((12 * 20, 20 * 12, 3 * 20), "[IMG]", "<|im_start|>user\n", "what is it?")

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        parts = LightOnOcrForConditionalGeneration, LightOnOcrConfig, LightOnOcrProcessor
        return family_of(captions, *parts, "qwen3", "vision_encoder")
