"""LLaVA-NeXT under the contract: a square and tiles of 48 pixels, patches of 8; and Granite Vision, with SigLIP."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    GraniteConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    SiglipVisionConfig,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from families.asking import captured, eager_rows
from families.by_hand import Keys
from families.contract import Contract
from families.core import LEARN
from families.geometry import Family, Geometry, batch_of, parameters_zeroed, picture, reading
from families.training import train_two_steps
from lavender.errors import ConfigError, DataError, UnsupportedModelError
from lavender.students.families.llava_next import LlavaNextAdapter, tile_boxes
from lavender.world.student_models import build_llava_processor

PATCH, SIDE = 8, 6
Strategy = Literal["default", "full"]
# (height, width) → canvas in tiles, rows and columns of cells without padding: by hand
SIZES = {
    (300, 500): ((2, 2), (8, 12)),
    (120, 900): ((1, 3), (2, 18)),
    (200, 200): ((2, 2), (12, 12)),
    (500, 300): ((2, 2), (12, 8)),
    (90, 40): ((2, 1), (12, 6)),
    (40, 90): ((1, 2), (6, 12)),
    (170, 47): ((3, 1), (18, 4)),
    (37, 23): ((1, 2), (6, 4)),
}


def pinpoints(tile: int) -> list[list[int]]:
    """As LLaVA-1.6 has them: rows and columns of tiles, in pixels."""
    return [[rows * tile, cols * tile] for rows, cols in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def build_processor(texts: list[str], tile: int, strategy: Strategy, **images: Any) -> LlavaNextProcessor:
    """With the settings of LLaVA-1.6 ("default") or of Granite Vision ("full"), but for the tile."""
    llava = build_llava_processor(texts, vocabulary=300)
    square = {"height": tile, "width": tile}
    settings: dict[str, Any] = {
        "size": {"shortest_edge": tile} if strategy == "default" else square,
        "crop_size": square,
        "image_grid_pinpoints": pinpoints(tile),
    }
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(**settings | images),
        llava.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"),
        chat_template=llava.chat_template,
    )


def config_of(tokenizer, tile: int, strategy: Strategy) -> LlavaNextConfig:
    """Three layers that see, three that read."""
    sizes: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    seeing: dict[str, Any] = {"hidden_size": 64, "image_size": tile, "patch_size": PATCH}
    reading: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if strategy == "default":
        vision, text, layers = CLIPVisionConfig(**sizes | seeing), LlamaConfig(**sizes | reading), -2
    else:
        vision, layers = SiglipVisionConfig(**sizes | seeing, vision_use_head=False), [-2, -1]
        text = GraniteConfig(**sizes | reading, attention_multiplier=0.2)
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy=strategy,
        vision_feature_layer=layers,
        image_grid_pinpoints=pinpoints(tile),
    )


def local_states(model, inputs) -> torch.Tensor:
    """What the first text layer attends to, when patches do not exchange: the tower's attention silenced."""
    model = copy.deepcopy(model)
    del model.model.language_model.layers[1:]
    for layer in model.model.vision_tower.encoder.layers:
        parameters_zeroed(layer.self_attn.out_proj)
    seen = []
    attention = model.model.language_model.layers[0].self_attn
    handle = attention.k_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(**inputs)
    handle.remove()
    return torch.stack(
        [
            states[ids == model.config.image_token_index]
            for states, ids in zip(seen[0], inputs["input_ids"], strict=True)
        ]
    )


def family_of(texts: list[str], tile: int, strategy: Strategy) -> Family:
    processor = build_processor(texts, tile, strategy)
    config = config_of(processor.tokenizer, tile, strategy)

    def make() -> LlavaNextForConditionalGeneration:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = LlavaNextForConditionalGeneration(copy.deepcopy(config)).eval()
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        return model

    def patches(inputs) -> torch.Tensor:
        """Pixels in place of features, packed by the model's own function; a newline is black."""
        images, pixels = processor.image_processor, inputs["pixel_values"][0].permute(0, 2, 3, 1)
        pixels = pixels * torch.tensor(images.image_std) + torch.tensor(images.image_mean)
        pixels = pixels[:, : SIDE * PATCH, : SIDE * PATCH].unflatten(2, (SIDE, PATCH)).unflatten(1, (SIDE, PATCH))
        cells = pixels.transpose(2, 3).flatten(1, 2).flatten(2)
        packed, _ = LlavaNextModel.pack_image_features(
            cast(Any, SimpleNamespace(config=config)),
            [cells],
            inputs["image_sizes"],
            strategy,
            torch.zeros(cells.shape[-1]),
        )
        return packed[0].unflatten(1, (PATCH * PATCH, 3))

    return Family(make, processor, tuple(SIZES), local_states, patches, blur=lambda size: (0.0, 0.0), clear=0.35)


def inputs_of(family: Family, sizes: list[list[tuple[int, int]]]) -> dict[str, torch.Tensor]:
    """A batch of samples with pictures of these sizes, as TRL's collator makes it."""
    turns = ({"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a dog"})
    collate = DataCollatorForVisionLanguageModeling(family.processor)
    return dict(collate([{"images": [picture(one) for one in own], "messages": [*turns]} for own in sizes]))


def cells(size: tuple[int, int]) -> int:
    """How many keys a picture has, by hand: the square, and rows of cells with a newline each."""
    rows, cols = SIZES[size][1]
    return SIDE * SIDE + rows * (cols + 1)


class TestLlavaNext(Contract):
    adapter = LlavaNextAdapter
    describes = (
        "the whole picture, 6 × 6 cells, then up to 4 tiles of 48 px without their padding, a newline after each row, "
        "among the text's tokens"
    )
    keys = Keys((36 + 8 * 13, 36 + 2 * 19, 36 + 12 * 13), "<image>", " ", "\n")

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(captions, 48, "default")

    def test_the_sizes_give_their_tiles(self, family, model):
        for size, (tiles, (rows, cols)) in SIZES.items():
            inputs, boxes = self.boxes_of(family, model, size)
            assert inputs["pixel_values"].shape[1] == 1 + tiles[0] * tiles[1], size
            assert len(boxes) == cells(size), size
            lines = boxes[SIDE * SIDE :].view(rows, cols + 1, 4)
            assert lines[:, -1].abs().sum() == 0, size  # newlines
            assert (lines[:, :-1, 2:] > lines[:, :-1, :2]).all(), size
            assert (boxes[SIDE * SIDE - 1, 2:] == 1).all(), size

    def test_boxes_by_hand(self):
        # 300 × 500 becomes 58 × 96 pixels, with 19 rows of padding above and below: two rows of cells, 16 pixels, go
        boxes = tile_boxes((300, 500), (96, 96), 48, 8)
        assert boxes[7].tolist() == pytest.approx([1 / 6, 1 / 6, 2 / 6, 2 / 6])
        lines = boxes[36:].view(8, 13, 4)
        assert lines[0, 0].tolist() == pytest.approx([-3 / 58, 0, 5 / 58, 8 / 96])
        assert lines[7, 11].tolist() == pytest.approx([53 / 58, 88 / 96, 61 / 58, 1])
        # 500 × 300 becomes 96 × 58
        lines = tile_boxes((500, 300), (96, 96), 48, 8)[36:].view(12, 9, 4)
        assert lines[11, 0].tolist() == pytest.approx([88 / 96, -3 / 58, 1, 5 / 58])
        # tiles of 50 pixels have a border of 2 that no cell shows; 200 × 200 fills the canvas
        boxes = tile_boxes((200, 200), (100, 100), 50, 8)
        assert boxes[35].tolist() == pytest.approx([0.8, 0.8, 0.96, 0.96])
        lines = boxes[36:].view(12, 13, 4)
        assert lines[5, 6].tolist() == pytest.approx([0.40, 0.50, 0.48, 0.58])

    def test_several_pictures_and_none(self, family, model):
        sizes = [[(37, 23), (120, 900)], [], [(40, 90)]]
        inputs = inputs_of(family, sizes)
        layout = LlavaNextAdapter(model.config).image_boxes(inputs, sizes, family.processor)
        counts = [cells(size) for size in ((37, 23), (120, 900), (40, 90))]
        assert layout.pictures[0].tolist() == [0] * counts[0] + [1] * counts[1]
        assert layout.pictures[1].unique().tolist() == [-1]
        assert layout.pictures[2].tolist() == [0] * counts[2] + [-1] * (counts[0] + counts[1] - counts[2])
        alone = [self.boxes_of(family, model, size)[1] for size in ((37, 23), (120, 900), (40, 90))]
        assert torch.equal(layout.boxes[0], torch.cat(alone[:2]))
        assert torch.equal(layout.boxes[2, : counts[2]], alone[2])
        assert layout.boxes[2, counts[2] :].abs().sum() == 0

    def test_text_alone(self, family, model):
        inputs, adapter = inputs_of(family, [[], []]), LlavaNextAdapter(model.config)
        assert "image_sizes" not in inputs
        assert adapter.image_keys(inputs).shape == (2, 0)
        assert adapter.image_boxes(inputs, [[], []], family.processor).boxes.shape == (2, 0, 4)

    @pytest.mark.parametrize(
        ("cut", "message"),
        [
            (1, "Got 139 picture tokens in a sample. Expected 140: its pictures have [(37, 23), (120, 900)] px."),
            (74, "Got 1 pictures without tokens, of [(120, 900)] px. Expected tokens in the text for each picture."),
        ],
    )
    def test_a_cut_picture_is_refused(self, family, model, cut, message):
        inputs = inputs_of(family, [[(37, 23), (120, 900)]])
        places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
        inputs["input_ids"] = inputs["input_ids"][:, : places[-cut]]
        with pytest.raises(DataError) as caught:
            LlavaNextAdapter(model.config).image_keys(inputs)
        assert str(caught.value) == (f"{message} Do this: raise max_length (or set it to None), which cuts pictures.")

    def test_sizes_of_other_pictures_are_refused(self, family, model):
        inputs = inputs_of(family, [[(37, 23)], [(40, 90)]])
        with pytest.raises(DataError) as caught:
            LlavaNextAdapter(model.config).image_boxes(inputs, [[(37, 23)], [(90, 40)]], family.processor)
        assert str(caught.value) == (
            "Got a batch with pictures of [[(37, 23)], [(40, 90)]] px. Expected [[(37, 23)], [(90, 40)]]. Do this: "
            "give the batch and the sizes of the same samples, (height, width)."
        )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"size": {"shortest_edge": 56}},
                "size {'shortest_edge': 56} and crop_size {'height': 48, 'width': 48}. "
                "Expected 48 px for both, the side of the model's tiles. Do this: load the model's own processor.",
            ),
            (
                {"image_grid_pinpoints": [[96, 96]]},
                "image_grid_pinpoints [[96, 96]]. Expected the model's, [[48, 96], "
                "[96, 48], [96, 96], [144, 48], [48, 144]]. Do this: load the model's own processor.",
            ),
        ],
    )
    def test_a_processor_of_another_model_is_refused(self, family, model, captions, settings, message):
        inputs = inputs_of(family, [[(200, 200)]])
        other = build_processor(captions, 48, "default", **settings)
        with pytest.raises(ConfigError) as caught:
            LlavaNextAdapter(model.config).image_boxes(inputs, [[(200, 200)]], other)
        assert str(caught.value) == f"Got the image processor's {message}"

    def test_keys_with_a_class_token_are_refused(self, model, batch):
        model.config.vision_feature_select_strategy = "full"
        with pytest.raises(UnsupportedModelError) as caught:
            LlavaNextAdapter(model.config).image_keys(batch)
        assert str(caught.value) == (
            "Got vision_feature_select_strategy='full' with a clip_vision_model. Expected 'default', which leaves out "
            "class tokens and nothing else. Do this: load a model with that strategy."
        )


class TestGraniteVision(Geometry):
    """All of a SigLIP's states, of two layers; tiles have a border that no cell shows; Granite reads."""

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(captions, 50, "full")

    def test_rows_are_those_of_eager_attention(self, family, model):
        batch = batch_of(family, [reading(size, "a dog and a cat") for size in list(SIZES)[:3]])
        request = captured(model, batch)
        torch.testing.assert_close(request.stacked(), eager_rows(model, batch, request), rtol=0, atol=1e-6)

    def test_a_class_token_that_is_not_there_is_refused(self, family, model):
        model.config.vision_feature_select_strategy = "default"
        with pytest.raises(UnsupportedModelError, match="'default' with a siglip_vision_model. Expected 'full', which"):
            LlavaNextAdapter(model.config).image_keys(inputs_of(family, [[(200, 200)]]))


@pytest.mark.parametrize(("tile", "strategy"), [(336, "default"), (384, "full")])
def test_as_many_keys_as_published_processors_write(captions, tile, strategy):
    """The settings of LLaVA-1.6 and of Granite Vision, pictures of many sizes."""
    processor = build_processor(captions, tile, strategy)
    processor.patch_size = 14
    sizes = [tuple(one) for one in np.random.default_rng(3).integers(20, 3000, (300, 2)).tolist()]
    expected = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    found = [len(tile_boxes(one, select_best_resolution(one, pinpoints(tile)), tile, 14)) for one in sizes]
    assert found == expected


def test_training_granite_vision(captions, dataset, store_path, tmp_path):
    family = family_of(captions, 48, "full")
    train_two_steps(family.make(), family.processor, dataset, store_path, tmp_path, **LEARN)
