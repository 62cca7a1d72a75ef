"""InternVL under the contract: tiles of 48 pixels, 6 × 6 cells of 2 × 2 patches; text layers of Qwen2 or Qwen3."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from families.asking import captured, eager_rows
from families.by_hand import Keys
from families.contract import Contract
from families.core import LEARN, Core
from families.geometry import Family, Geometry, parameters_zeroed, picture
from families.training import train_two_steps
from lavender.errors import ConfigError, DataError, UnsupportedModelError
from lavender.students.families.internvl import InternVlAdapter, tile_boxes, tile_settings
from lavender.students.registry import adapter_for
from lavender.training.settings import set_image_processor
from lavender.world.student_models import _tokenizer

TILE, PATCH, SIDE = 48, 4, 6
CELLS = SIDE * SIDE
# (height, width) → (rows, cols) of tiles, 1 to 6, by hand: the nearest aspect; of equal ones the one of more tiles,
# if they have at most twice the picture's pixels. 1.67 is nearest to 3:2, 7.5 to 6:1, 1 to 1:1 and 2:2.
SIZES = {
    (300, 500): (2, 3),
    (500, 300): (3, 2),
    (97, 190): (1, 2),
    (120, 900): (1, 6),
    (200, 200): (2, 2),
    (41, 44): (1, 1),
}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<video>")
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}{%- generation %}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"
    "{%- else %}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<IMG_CONTEXT>\n' }}{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


class PicturesProcessor(InternVLProcessor):
    """InternVL's processor without its slot for videos, which needs torchvision."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        self.image_seq_length = CELLS
        self.start_image_token, self.end_image_token = tokenizer.start_image_token, tokenizer.end_image_token
        self.start_image_token_id = tokenizer.start_image_token_id
        self.end_image_token_id = tokenizer.end_image_token_id
        self.image_token, self.image_token_id = tokenizer.context_image_token, tokenizer.context_image_token_id
        self.video_token = tokenizer.video_token
        self.multimodal_pattern = re.compile(f"(?P<image>{self.image_token})|(?P<video>{self.video_token})")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def build_processor(texts: list[str], **images: Any) -> PicturesProcessor:
    roles: Any = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer(
        texts,
        300,
        SPECIAL_TOKENS,
        "<IMG_CONTEXT>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=roles,
    )
    settings: dict[str, Any] = {"size": {"height": TILE, "width": TILE}, "min_patches": 1, "max_patches": 6}
    return PicturesProcessor(GotOcr2ImageProcessorPil(**settings | images), tokenizer, TEMPLATE)


def config_of(tokenizer, kind: str = "qwen2") -> InternVLConfig:
    """Two layers that see, three that read: Qwen2's as in InternVL 2.5 and 3, Qwen3's as in 3.5."""
    text = {
        "model_type": kind,
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "intermediate_size": 256,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": [TILE, TILE],
        "patch_size": [PATCH, PATCH],
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "attention_bias": True,
        "layer_scale_init_value": 1.0,
    }
    return InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=tokenizer.context_image_token_id, image_seq_length=CELLS
    )


def local_states(model, inputs) -> torch.Tensor:
    """What the first text layer attends to, when patches do not exchange: the tower's attention silenced."""
    model = copy.deepcopy(model)
    del model.model.language_model.layers[1:]
    for layer in model.model.vision_tower.encoder.layer:
        parameters_zeroed(layer.attention.projection_layer)
    seen = []
    attention = model.model.language_model.layers[0].self_attn
    handle = attention.k_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model.model(**inputs, use_cache=False)
    handle.remove()
    return torch.stack(
        [states[ids == model.config.image_token_id] for states, ids in zip(seen[0], inputs["input_ids"], strict=True)]
    )


def family_of(
    texts: list[str], kind: str = "qwen2", sizes: tuple[tuple[int, int], ...] = tuple(SIZES), **images
) -> Family:
    processor = build_processor(texts, **images)
    config = config_of(processor.tokenizer, kind)

    def make() -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = InternVLForConditionalGeneration(copy.deepcopy(config)).eval()
            for name, parameter in model.named_parameters():
                if name.endswith(("q_proj.bias", "k_proj.bias")):
                    torch.nn.init.normal_(parameter)  # real ones are large, new ones zero
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    torch.nn.init.uniform_(parameter, 0.5, 1.5)  # new ones are all 1
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        return model

    def patches(inputs) -> torch.Tensor:
        """Pixels of each key: of tiles in order, of a tile's cells row by row."""
        images, cell = processor.image_processor, 2 * PATCH
        pixels = inputs["pixel_values"].permute(0, 2, 3, 1) * torch.tensor(images.image_std)
        pixels = pixels + torch.tensor(images.image_mean)
        pixels = pixels.unflatten(2, (-1, cell)).unflatten(1, (-1, cell))
        return pixels.transpose(2, 3).reshape(-1, cell**2, 3)

    return Family(make, processor, sizes, local_states, patches, blur=blur, clear=0.4)


def blur(size: tuple[int, int]) -> tuple[float, float]:
    """Of the bicubic filter at the picture's border, as for LLaVA: less than 0.03 of a pixel, old or new."""
    return 0.03 / size[0], 0.03 / size[1]


def several(processor: ProcessorMixin, images: list[list[tuple[int, int]]], **kwargs: Any) -> dict[str, torch.Tensor]:
    """A batch with as many pictures a sample as there are sizes."""
    texts = ["<|im_start|>user\n" + "<IMG_CONTEXT>\n" * len(own) + "what is it?<|im_end|>\n" for own in images]
    pictures = [[picture(size, seed) for seed, size in enumerate(own)] for own in images]
    return dict(
        processor(
            images=pictures,
            text=texts,
            padding=True,
            padding_side="right",
            add_special_tokens=False,
            return_tensors="pt",
            **kwargs,
        )
    )


class TestInternVl(Contract):
    adapter = InternVlAdapter
    describes = "tiles of 48 px row by row, then a thumbnail, each 6 × 6 cells among the text's tokens"
    keys = Keys((7 * CELLS, 7 * CELLS, 3 * CELLS), "<IMG_CONTEXT>", "<img>", "</img>")

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(captions, "qwen2")

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

    @torch.no_grad()
    def test_none_one_and_two_pictures(self, family, model):
        sizes = [[], [(300, 500)], [(41, 44), (97, 190)]]
        batch, adapter = several(family.processor, sizes), adapter_for(model.config)
        tensors = adapter.key_tensors(batch, sizes, family.processor)
        pictures = [[-1] * 252, [0] * 252, [0] * 36 + [1] * 108 + [-1] * 108]
        assert tensors["pictures"].tolist() == pictures
        assert tensors["boxes"][2, 36 + 36].tolist() == pytest.approx([0, 0.5, 1 / 6, 0.5 + 1 / 12])
        first, last = tensors["keys"][2, [0, 143]].tolist()
        rows = torch.tensor([[2, 3, 4], [2, 200, 258], [first + 5, first + 60, last + 2]])
        request = captured(model, batch, rows=rows)
        torch.testing.assert_close(request.stacked(), eager_rows(model, batch, request), rtol=0, atol=1e-6)
        assert request.stacked()[:, 0].abs().sum() == 0
        assert request.stacked()[:, 2, :, 2, :144].min() > 0

    @pytest.mark.parametrize("count", [35, 71])
    def test_a_cut_picture_is_refused(self, model, count):
        adapter, ids = adapter_for(model.config), torch.full((2, 100), 5)
        ids[0, 7 : 7 + 36] = ids[1, 3 : 3 + count] = adapter.image_token_id()
        with pytest.raises(DataError) as caught:
            adapter.image_keys({"input_ids": ids, "pixel_values": torch.zeros(2, 3, 48, 48)})
        assert str(caught.value) == (
            f"Got {count} picture tokens in a sample. Expected 36 for each tile or thumbnail. "
            "Do this: raise max_length (or set it to None) if it cuts pictures."
        )

    @pytest.mark.parametrize("tiles", [1, 3])
    def test_tiles_without_their_tokens_are_refused(self, model, tiles):
        adapter, ids = adapter_for(model.config), torch.full((1, 100), 5)
        ids[0, 7 : 7 + 72] = adapter.image_token_id()
        with pytest.raises(DataError) as caught:
            adapter.image_keys({"input_ids": ids, "pixel_values": torch.zeros(tiles, 3, 48, 48)})
        assert str(caught.value) == (
            f"Got 72 picture tokens in a batch. Expected {tiles * 36}: {tiles} tiles and thumbnails of 36 cells. "
            "Do this: raise max_length (or set it to None) if it cuts pictures."
        )

    def test_videos_are_refused(self, family, model):
        """Their frames stand in the text as pictures do; that no picture belongs to them tells."""
        adapter, ids = adapter_for(model.config), torch.full((1, 100), 5)
        ids[0, 7 : 7 + 36] = ids[0, 50 : 50 + 36] = adapter.image_token_id()
        inputs = {"input_ids": ids, "pixel_values": torch.zeros(2, 3, 48, 48)}
        with pytest.raises(DataError) as caught:
            adapter.image_boxes(inputs, [[]], family.processor)
        assert str(caught.value) == (
            "Got pictures of [36, 36] tokens in a sample. Expected [], for pictures of [] px in 1 to 6 tiles, and no "
            "videos: a map is of one picture, and frames look like pictures. Do this: drop samples with videos, give "
            "the batch and the sizes of the same samples, and set crop_to_patches, min_patches and max_patches in "
            "processor.images_kwargs and not in the call."
        )

    def test_settings_in_the_call_are_refused(self, family, model):
        sizes = [[(300, 500)]]
        for settings in ({"crop_to_patches": False}, {"max_patches": 2}):
            batch = several(family.processor, sizes, images_kwargs=settings)
            with pytest.raises(DataError, match=r"Expected \[252\], for pictures of \[\(300, 500\)\] px in 1 to 6"):
                adapter_for(model.config).image_boxes(batch, sizes, family.processor)

    def test_keys_with_a_class_token_are_refused(self, model, batch):
        model.config.vision_feature_select_strategy = "full"
        with pytest.raises(UnsupportedModelError) as caught:
            adapter_for(model.config).image_keys(batch)
        assert str(caught.value) == (
            "Got vision_feature_select_strategy='full'. Expected 'default', which leaves the class token out. "
            "Do this: load a model with that strategy."
        )

    def test_tiles_that_are_no_squares_are_refused(self, family, model, batch):
        processor: Any = copy.copy(family.processor)
        processor.images_kwargs = processor.images_kwargs | {"size": {"height": 48, "width": 96}}
        with pytest.raises(ConfigError) as caught:
            adapter_for(model.config).image_boxes(batch, [[size] for size in SIZES][:3], processor)
        assert str(caught.value) == (
            "Got tiles of 48 × 96 px. Expected squares. Do this: load the model's own processor."
        )


class TestInternVlQwen3(Core):
    """As InternVL3.5 has it: queries and keys are normalised."""

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(captions, "qwen3")


class TestOtherTiles(Geometry):
    """Other numbers of tiles: InternVL's own, at least two, none (`crop_to_patches` and `max_patches`)."""

    @pytest.fixture(scope="class", params=["12", "2 to 4", "off", "one"])
    @classmethod
    def family(cls, captions, request) -> Family:
        sizes = ((300, 500), (500, 300), (120, 900), (200, 200), (41, 44))
        if request.param == "12":
            return family_of(captions, sizes=sizes, max_patches=12)
        if request.param == "2 to 4":
            return family_of(captions, sizes=sizes, min_patches=2, max_patches=4)
        if request.param == "one":
            return family_of(captions, sizes=sizes, max_patches=1)
        family = family_of(captions, sizes=sizes)
        processor: Any = family.processor
        processor.images_kwargs = processor.images_kwargs | {"crop_to_patches": False}
        return family


@pytest.mark.parametrize(
    ("least", "most", "size", "grid"),
    [
        # 7.5 is as far from 7:1 as from 8:1: the one with more tiles, 8 · 48² · ½ < 120 · 900
        (1, 12, (120, 900), (1, 8)),
        # 1:1, 2:2 and 3:3: 9 tiles, 9 · 48² · ½ < 200²
        (1, 12, (200, 200), (3, 3)),
        (1, 12, (41, 44), (1, 1)),
        # one tile is too few
        (2, 4, (41, 44), (2, 2)),
        # 1.67 is nearest to 2:1
        (1, 4, (300, 500), (1, 2)),
    ],
)
def test_tiles_by_hand(captions, least, most, size, grid):
    processor = build_processor(captions, min_patches=least, max_patches=most)
    adapter = InternVlAdapter(config_of(processor.tokenizer))
    layout = adapter.image_boxes(several(processor, [[size]]), [[size]], processor)
    torch.testing.assert_close(layout.boxes[0], tile_boxes(grid, SIDE, 1.0), rtol=0, atol=0)


def test_settings_of_the_processor_win(captions):
    """As in the call: InternVL's processor cuts pictures, whatever its image processor is set to."""
    processor = build_processor(captions, crop_to_patches=False)
    assert tile_settings(processor) == ((TILE, TILE), 1, 6)
    assert len(several(processor, [[(300, 500)]])["pixel_values"]) == 7
    processor.images_kwargs = {}
    assert tile_settings(processor) == ((TILE, TILE), 1, 1)
    assert len(several(processor, [[(300, 500)]])["pixel_values"]) == 1


def test_a_setting_that_the_processor_overrides_is_refused(captions):
    processor = build_processor(captions)
    with pytest.raises(ConfigError) as caught:
        set_image_processor(processor, {"crop_to_patches": False})
    assert "PicturesProcessor itself sets True" in caught.value.got
    set_image_processor(processor, {"max_patches": 1, "crop_to_patches": True})  # as the advice says
    assert len(several(processor, [[(300, 500)]])["pixel_values"]) == 1


def test_tile_boxes_by_hand():
    """Two tiles side by side and the thumbnail, 2 × 2 cells each, of which a border of 1/8 is not seen."""
    boxes = tile_boxes((1, 2), 2, 0.875)
    assert boxes.shape == (12, 4)
    assert boxes[3].tolist() == [0.4375, 0.21875, 0.875, 0.4375]
    assert boxes[4].tolist() == [0, 0.5, 0.4375, 0.71875]
    assert boxes[8].tolist() == [0, 0, 0.4375, 0.4375]
    assert tile_boxes((1, 1), 2, 0.875).shape == (4, 4)


def test_training_qwen3(captions, dataset, store_path, tmp_path):
    family = family_of(captions, "qwen3")
    train_two_steps(family.make(), family.processor, dataset, store_path, tmp_path, **LEARN)
