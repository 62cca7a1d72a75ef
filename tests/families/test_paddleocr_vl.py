"""PaddleOCR-VL under the contract: cells of 8 pixels, each of 2 × 2 patches that the tower has row by row."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLImageProcessorPil,
    PaddleOCRVLProcessor,
    PreTrainedModel,
)

from families.by_hand import Keys
from families.contract import Contract
from families.geometry import Family, parameters_zeroed
from families.test_qwen_vl import MERGE, PATCH, SIZES, TEMPLATE, blur, key_states
from lavender.students.families.paddleocr_vl import PaddleOcrVlAdapter
from lavender.world.student_models import _tokenizer

IMAGE, START, END = "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>"


def build_processor(texts: list[str]) -> PaddleOCRVLProcessor:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", START, END)
    tokenizer = _tokenizer(texts, 300, special, IMAGE, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.image_token, tokenizer.image_token_id = IMAGE, tokenizer.convert_tokens_to_ids(IMAGE)
    images = PaddleOCRVLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": 48 * 48, "longest_edge": 96 * 96}
    )
    template = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", START + IMAGE + END)
    return PaddleOCRVLProcessor(images, tokenizer, template)


def config_of(tokenizer) -> PaddleOCRVLConfig:
    """Two layers that see, three that read. Heads wider than hidden / heads."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "intermediate_size": 192,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]},
    }
    vision = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "image_size": 48,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    start, end, image = (tokenizer.convert_tokens_to_ids(token) for token in (START, END, IMAGE))
    return PaddleOCRVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )


def local_states(model, inputs) -> torch.Tensor:
    """What the first text layer attends to, when patches do not exchange: the tower's attention silenced."""
    model = copy.deepcopy(model)
    for layer in model.model.visual.vision_model.encoder.layers:
        parameters_zeroed(layer.self_attn.out_proj)
    return key_states(model, inputs)


def patches(inputs) -> torch.Tensor:
    """Pixels of each key of a picture, whose patches stand row by row."""
    images = PaddleOCRVLImageProcessorPil()
    (_, rows, cols), pixels = inputs["image_grid_thw"][0].tolist(), inputs["pixel_values"].flatten(2).transpose(1, 2)
    cells = pixels.unflatten(0, (rows // MERGE, MERGE, cols // MERGE, MERGE)).transpose(1, 2)
    pixels = cells.flatten(0, 1).flatten(1, 3)
    return pixels * torch.tensor(images.image_std) + torch.tensor(images.image_mean)


class TestPaddleOcrVl(Contract):
    adapter = PaddleOcrVlAdapter
    describes = "a grid of the picture's own shape, cells of 8 px among the text's tokens"
    keys = Keys((135, 120, 72), IMAGE, START, END)

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        processor = build_processor(captions)
        config = config_of(processor.tokenizer)

        def make() -> PreTrainedModel:
            with torch.random.fork_rng():
                torch.manual_seed(5)
                model = PaddleOCRVLForConditionalGeneration(copy.deepcopy(config)).eval()
            model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
            model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
            return model

        return Family(make, processor, tuple(SIZES), local_states, patches, blur, clear=0.4)

    def test_the_sizes_give_their_grids(self, family, model):
        for size, (rows, cols) in SIZES.items():
            inputs, boxes = self.boxes_of(family, model, size)
            assert inputs["image_grid_thw"].tolist() == [[1, rows * MERGE, cols * MERGE]]
            assert boxes[cols + 1].tolist() == pytest.approx([1 / rows, 1 / cols, 2 / rows, 2 / cols])
            assert boxes[-1, 2:].tolist() == [1, 1]
