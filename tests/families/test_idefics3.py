"""Idefics3 and SmolVLM under the contract: at most 3 × 3 tiles of 32 or 60 pixels, and the whole picture last."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedModel,
    ProcessorMixin,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from families.by_hand import Keys
from families.contract import Contract
from families.geometry import Family, Geometry, batch_of, parameters_zeroed, picture
from lavender.errors import DataError
from lavender.students.families.idefics3 import Idefics3Adapter, SmolVlmAdapter, tile_boxes
from lavender.students.registry import adapter_for
from lavender.world.student_models import _tokenizer

MOST = 3  # tiles along the longer side
# (height, width) → (rows, cols) of tiles, by hand: the longer side has three, the other what it needs of its own
SIZES = {
    (300, 500): (2, 3),
    (120, 900): (1, 3),
    (200, 200): (3, 3),
    (500, 300): (3, 2),
    (37, 23): (3, 2),
    (170, 47): (3, 1),
}
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
LABELS = tuple(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7))
TEMPLATE = (  # as SmolVLM has it
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class PicturesProcessor(SmolVLMProcessor):
    """SmolVLM's processor without its slot for videos, which needs torchvision."""

    def __init__(self, image_processor, tokenizer, image_seq_len=169, chat_template=None):
        self.fake_image_token, self.image_token = "<fake_token_around_image>", "<image>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.end_of_utterance_token, self.global_image_token = "<end_of_utterance>", "<global-img>"
        self.image_seq_len, self.video_token = image_seq_len, "<video>"
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def apply_chat_template(self, *args, **kwargs):  # SmolVLM's own reads the slot
        return ProcessorMixin.apply_chat_template(self, *args, **kwargs)


def build_processor(kind: str, texts: list[str], tile: int, cells: int, labels=LABELS, **images: Any):
    """With the real settings, but for the sizes."""
    tokenizer = _tokenizer(
        texts,
        340,
        SPECIAL_TOKENS + labels,
        "<image>",
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
    )
    settings: dict[str, Any] = {
        "size": {"longest_edge": MOST * tile},
        "max_image_size": {"longest_edge": tile},
    } | images
    made = (
        Idefics3Processor(Idefics3ImageProcessorPil(**settings), tokenizer, cells, TEMPLATE)
        if kind == "idefics3"
        else PicturesProcessor(SmolVLMImageProcessorPil(**settings), tokenizer, cells, TEMPLATE)
    )
    return made


def config_of(kind: str, tokenizer, tile: int, patch: int, scale: int) -> Idefics3Config | SmolVLMConfig:
    """Two layers that see, three that read."""
    vision: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": tile // patch * patch,
        "patch_size": patch,
    }
    text: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config_class = Idefics3Config if kind == "idefics3" else SmolVLMConfig
    return config_class(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=scale,
    )


def local_states(model, inputs) -> torch.Tensor:
    """What the first text layer attends to, when patches do not exchange: the tower's attention silenced."""
    model = copy.deepcopy(model)
    del model.model.text_model.layers[1:]
    for layer in model.model.vision_model.encoder.layers:
        parameters_zeroed(layer.self_attn.out_proj)
    seen = []
    attention = model.model.text_model.layers[0].self_attn
    handle = attention.k_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(**inputs)
    handle.remove()
    return torch.stack(
        [states[ids == model.config.image_token_id] for states, ids in zip(seen[0], inputs["input_ids"], strict=True)]
    )


def family_of(kind: str, texts: list[str], tile: int = 32, patch: int = 4, scale: int = 2, **rest) -> Family:
    """Cells of scale × scale patches. `rest`: for the processor."""
    cell = patch * scale
    side = tile // cell
    processor = build_processor(kind, texts, tile, side * side, **rest)
    config = config_of(kind, processor.tokenizer, tile, patch, scale)
    model_class = Idefics3ForConditionalGeneration if kind == "idefics3" else SmolVLMForConditionalGeneration

    def make() -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = model_class(copy.deepcopy(config)).eval()  # ty: ignore[invalid-argument-type]
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        return model

    def patches(inputs) -> torch.Tensor:
        """Pixels of each key: views in their order, in each the cells row-major."""
        images, views = processor.image_processor, inputs["pixel_values"][0].permute(0, 2, 3, 1)
        views = views * torch.tensor(images.image_std) + torch.tensor(images.image_mean)
        views = views[:, : side * cell, : side * cell].unflatten(2, (side, cell)).unflatten(1, (side, cell))
        return views.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    return Family(make, processor, tuple(SIZES), local_states, patches, blur=lambda size: (0.0, 0.0), clear=0.35)


def inputs_of(family: Family, sizes: list[list[tuple[int, int]]]) -> dict[str, torch.Tensor]:
    """A batch of samples with pictures of these sizes, as TRL's collator makes it."""
    turns = ({"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a dog"})
    collate = DataCollatorForVisionLanguageModeling(family.processor)
    return dict(collate([{"images": [picture(one) for one in own], "messages": [*turns]} for own in sizes]))


class TestIdefics3(Contract):
    adapter = Idefics3Adapter
    describes = "tiles of 32 px row by row, then the whole picture, each 4 × 4 cells among the text's tokens"
    keys = Keys((7 * 16, 4 * 16, 10 * 16), "<image>", "<row_1_col_1>", "<fake_token_around_image>")

    kind, tile, patch, scale, side = "idefics3", 32, 4, 2, 4

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(cls.kind, captions, cls.tile, cls.patch, cls.scale)

    def cells(self, size: tuple[int, int]) -> int:
        """How many keys a picture has, by hand."""
        return (SIZES[size][0] * SIZES[size][1] + 1) * self.side**2

    def test_the_sizes_give_their_tiles(self, family, model):
        for size, (rows, cols) in SIZES.items():
            inputs, boxes = self.boxes_of(family, model, size)
            assert inputs["pixel_values"].shape[1] == rows * cols + 1, size
            assert len(boxes) == self.cells(size), size
            side, tiles = self.side, boxes.view(-1, self.side**2, 4)
            assert tiles[1, 0].tolist() == pytest.approx(  # the second tile is beside the first or below it
                [0, 1 / cols, 1 / rows / side, (1 + 1 / side) / cols]
                if cols > 1
                else [1 / 3, 0, (1 + 1 / side) / 3, 1 / side]
            ), size
            assert tiles[-2, -1, 2:].tolist() == [1, 1], size
            assert tiles[-1, 1].tolist() == pytest.approx([0, 1 / side, 1 / side, 2 / side]), size
            assert tiles[-1, -1, 2:].tolist() == [1, 1], size

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_labels_stand_between_tiles(self, family, model, readings, side):
        """Tiles of 1 × 3, before each its label, a blank line, then the whole."""
        batch, decode, cells = batch_of(family, readings, side), family.processor.tokenizer.decode, self.side**2
        ids, views = batch["input_ids"][1], Idefics3Adapter(model.config).image_keys(batch)[1, : 4 * cells].view(4, -1)
        assert torch.equal(views - views[:, :1], torch.arange(cells).expand(4, cells))
        between = [decode(ids[end + 1 : start]) for end, start in zip(views[:-1, -1], views[1:, 0], strict=True)]
        fake = "<fake_token_around_image>"
        assert between == [f"{fake}<row_1_col_2>", f"{fake}<row_1_col_3>", f"\n\n{fake}<global-img>"]

    def test_several_pictures_and_none(self, family, model):
        sizes = [[(37, 23), (120, 900)], [], [(170, 47)]]
        inputs = inputs_of(family, sizes)
        layout = adapter_for(model.config).image_boxes(inputs, sizes, family.processor)
        counts = [self.cells(size) for size in ((37, 23), (120, 900), (170, 47))]
        assert layout.pictures[0].tolist() == [0] * counts[0] + [1] * counts[1]
        assert layout.pictures[1].unique().tolist() == [-1]
        assert layout.pictures[2].tolist() == [0] * counts[2] + [-1] * (counts[0] + counts[1] - counts[2])
        alone = [self.boxes_of(family, model, size)[1] for size in ((37, 23), (120, 900), (170, 47))]
        assert torch.equal(layout.boxes[0], torch.cat(alone[:2]))
        assert torch.equal(layout.boxes[2, : counts[2]], alone[2])
        assert layout.boxes[2, counts[2] :].abs().sum() == 0

    def test_text_alone(self, family, model):
        inputs, adapter = inputs_of(family, [[], []]), Idefics3Adapter(model.config)
        assert "pixel_values" not in inputs
        assert adapter.image_keys(inputs).shape == (2, 0)
        assert adapter.image_boxes(inputs, [[], []], family.processor).boxes.shape == (2, 0, 4)

    def test_a_batch_without_its_mask(self, family, model):
        """Then padding is told by its pixels, 0 all over, as in the model."""
        sizes = [[(37, 23), (120, 900)], [(170, 47)]]
        inputs, adapter = inputs_of(family, sizes), Idefics3Adapter(model.config)
        whole = adapter.image_boxes(inputs, sizes, family.processor)
        del inputs["pixel_attention_mask"]
        assert torch.equal(adapter.image_boxes(inputs, sizes, family.processor).boxes, whole.boxes)

    def test_a_cut_picture_is_refused(self, family, model):
        inputs = inputs_of(family, [[(37, 23)]])
        places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
        inputs["input_ids"] = inputs["input_ids"][:, : places[-1]]
        each = self.side**2
        with pytest.raises(DataError) as caught:
            adapter_for(model.config).image_keys(inputs)
        assert str(caught.value) == (
            f"Got {7 * each - 1} picture tokens in a sample. Expected {7 * each}: 7 tiles and whole pictures of {each} "
            "cells each. Do this: raise max_length (or set it to None), which cuts pictures."
        )

    def test_another_number_of_pictures_is_refused(self, family, model):
        inputs = inputs_of(family, [[(37, 23)], [(120, 900)]])
        with pytest.raises(DataError) as caught:
            adapter_for(model.config).image_boxes(inputs, [[(37, 23)], []], family.processor)
        assert str(caught.value) == (
            "Got 1 pictures in the tokens of a sample. Expected 0, as many as the sample has. Do this: give the batch "
            "and the sizes of the same samples, pictures and no videos."
        )

    def test_labels_out_of_order_are_refused(self, family, model):
        inputs = inputs_of(family, [[(120, 900)]])
        label = family.processor.tokenizer.convert_tokens_to_ids(["<row_1_col_2>", "<row_2_col_2>"])
        inputs["input_ids"][inputs["input_ids"] == label[0]] = label[1]
        with pytest.raises(DataError) as caught:
            adapter_for(model.config).image_boxes(inputs, [[(120, 900)]], family.processor)
        assert str(caught.value) == (
            "Got tiles labelled [(1, 1), (2, 2), (1, 3)] before a whole picture. Expected rows and columns in order, "
            "none left out. Do this: pass what the model's own processor returns, its truncation off."
        )


class TestSmolVlm(TestIdefics3):
    adapter = SmolVlmAdapter
    describes = "tiles of 60 px row by row, then the whole picture, each 5 × 5 cells among the text's tokens"
    keys = Keys((7 * 25, 4 * 25, 10 * 25), "<image>", "<row_1_col_1>", "<fake_token_around_image>")
    kind, tile, patch, scale, side = "smolvlm", 60, 3, 4, 5


class TestOtherTiles(Geometry):
    """Pictures that are not split; labels that the tokenizer spells out; a border of a tile that no cell shows."""

    @pytest.fixture(scope="class", params=["whole", "spelled", "border"])
    @classmethod
    def family(cls, captions, request) -> Family:
        if request.param == "whole":
            return family_of("idefics3", captions, 64, do_image_splitting=False)
        return (
            family_of("smolvlm", captions, labels=())
            if request.param == "spelled"
            else family_of("idefics3", captions, 34)
        )

    def test_the_keys_are_all_in_the_sequence(self, family, model):
        for size in family.sizes:
            inputs, boxes = self.boxes_of(family, model, size)
            assert (
                len(boxes) == len(family.patches(inputs)) == (inputs["input_ids"] == model.config.image_token_id).sum()
            )


def test_boxes_by_hand():
    # a tile of 34 pixels has cells of 8 and a border of 2
    boxes = tile_boxes((1, 2), 34, 4, 2).view(3, 16, 4)
    assert boxes[1, 5].tolist() == pytest.approx([8 / 34, (34 + 8) / 68, 16 / 34, (34 + 16) / 68])
    assert boxes[2, 15].tolist() == pytest.approx([24 / 34, 24 / 34, 32 / 34, 32 / 34])
    assert tile_boxes((0, 0), 32, 4, 2)[0].tolist() == [0, 0, 0.25, 0.25]
