"""VideoLLaMA 3 under the contract: a key per patch of 8 pixels, or per 2 × 2 patches of 4."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
    VideoLlama3ImageProcessorPil,
    VideoLlama3Processor,
)

from families.by_hand import Keys
from families.contract import Contract
from families.core import Core
from families.geometry import Family, Geometry, parameters_zeroed
from families.test_qwen_vl import SIZES, TEMPLATE, key_states
from lavender.errors import ConfigError, DataError, UnsupportedModelError
from lavender.students.families.video_llama_3 import VideoLlama3Adapter
from lavender.students.registry import adapter_for
from lavender.world.student_models import _tokenizer

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|video_pad|>")


class PicturesProcessor(VideoLlama3Processor):
    """VideoLLaMA 3's processor without its slot for videos, which needs torchvision."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def build_processor(texts: list[str], merge: int) -> PicturesProcessor:
    tokenizer = _tokenizer(
        texts, 300, SPECIAL_TOKENS, "<|image_pad|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    images = VideoLlama3ImageProcessorPil(
        patch_size=8 // merge, merge_size=merge, size={"shortest_edge": 48 * 48, "longest_edge": 96 * 96}
    )
    template = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>\n")
    return PicturesProcessor(images, tokenizer, template)


def config_of(tokenizer, patch: int) -> VideoLlama3Config:
    """Two layers that see, three that read."""
    text = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 192,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "patch_size": patch,
    }
    image, video = (tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video"))
    return VideoLlama3Config(text_config=text, vision_config=vision, image_token_id=image, video_token_id=video)


def local_states(model, inputs) -> torch.Tensor:
    """What the first text layer attends to, when patches do not exchange: the tower's attention silenced."""
    model = copy.deepcopy(model)
    for layer in model.model.vision_model.encoder.layers:
        parameters_zeroed(layer.self_attn.out_proj)
    return key_states(model, inputs)


def patches(inputs) -> torch.Tensor:
    """Pixels of each key: its patches follow one another."""
    merge = int(inputs["image_merge_sizes"][0])
    pixels = inputs["pixel_values"].unflatten(1, (3, -1)).transpose(1, 2).unflatten(0, (-1, merge**2))
    return pixels.flatten(1, 2) * 0.5 + 0.5


class VideoLlama3(Geometry):
    """The model and its processor, with a key per merge × merge patches."""

    merge: ClassVar[int] = 1

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        processor = build_processor(captions, cls.merge)
        config = config_of(processor.tokenizer, 8 // cls.merge)

        def make() -> PreTrainedModel:
            with torch.random.fork_rng():
                torch.manual_seed(5)
                model = VideoLlama3ForConditionalGeneration(copy.deepcopy(config)).eval()
            model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
            model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
            return model

        return Family(make, processor, tuple(SIZES), local_states, patches, lambda size: (0.0, 0.0), clear=0.4)

    def test_the_sizes_give_their_grids(self, family, model):
        for size, (rows, cols) in SIZES.items():
            inputs, boxes = self.boxes_of(family, model, size)
            assert inputs["image_grid_thw"].tolist() == [[1, rows * self.merge, cols * self.merge]]
            assert boxes[cols + 1].tolist() == pytest.approx([1 / rows, 1 / cols, 2 / rows, 2 / cols])
            assert boxes[-1, 2:].tolist() == [1, 1]


class TestVideoLlama3(VideoLlama3, Contract):
    adapter = VideoLlama3Adapter
    describes = "a grid of the picture's own shape, cells of merge_size × 8 px among the text's tokens"
    keys = Keys((135, 120, 72), "<|image_pad|>", "user\n", "\n")

    def test_three_patches_per_side_are_refused(self, family, model):
        inputs = {
            "input_ids": torch.full((1, 40), 5),
            "image_grid_thw": torch.tensor([[1, 6, 9]]),
            "image_merge_sizes": torch.tensor([3]),
        }
        with pytest.raises(ConfigError, match="Got merge_size=3 of the image processor, at which the model leaves out"):
            adapter_for(model.config).image_boxes(inputs, [[(48, 72)]], family.processor)

    def test_another_text_model_is_refused(self, model):
        model.config.text_config.model_type = "qwen3"
        with pytest.raises(UnsupportedModelError, match="Got text_config.model_type='qwen3'. Expected 'qwen2'"):
            adapter_for(model.config)

    def test_videos_are_refused(self, model):
        inputs = {"input_ids": torch.full((2, 40), 5), "video_grid_thw": torch.tensor([[2, 6, 8]] * 2)}
        with pytest.raises(DataError, match="Got a batch with videos. Expected pictures: a map is of one picture"):
            adapter_for(model.config).image_keys(inputs)


class TestVideoLlama3OfMergedPatches(VideoLlama3, Core):
    """2 × 2 patches per key, whose states the model takes the mean of."""

    merge = 2
