"""ERNIE 4.5 VL under the contract: cells of 8 pixels, each of 2 × 2 patches, and experts for text and for pictures."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Ernie4_5_VLMoeImageProcessorPil,
    Ernie4_5_VLMoeProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from families.asking import request_of
from families.by_hand import Keys
from families.contract import Contract
from families.geometry import Family, parameters_zeroed
from families.test_qwen_vl import MERGE, PATCH, SIZES, TEMPLATE, blur, key_states
from lavender.alignment.objective import attach
from lavender.config import AlignmentConfig
from lavender.errors import DataError
from lavender.students.families.ernie4_5_vl import Ernie45VlMoeAdapter
from lavender.students.registry import adapter_for
from lavender.world.student_models import _tokenizer

# transformers' processor turns each row of ids into an array
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
# name in the config and of the processor → token
TOKENS = {
    "image": "<|IMAGE_PLACEHOLDER|>",
    "image_start": "<|IMAGE_START|>",
    "image_end": "<|IMAGE_END|>",
    "video": "<|VIDEO_PLACEHOLDER|>",
    "video_start": "<|VIDEO_START|>",
    "video_end": "<|VIDEO_END|>",
}


class PicturesProcessor(Ernie4_5_VLMoeProcessor):
    """ERNIE's processor without its slot for videos, which needs torchvision."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        for name, token in TOKENS.items():
            setattr(self, f"{name}_token", token)
            setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def build_processor(texts: list[str]) -> PicturesProcessor:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *list(TOKENS.values())[1:])
    tokenizer = _tokenizer(texts, 300, special, TOKENS["image"], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    images = Ernie4_5_VLMoeImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": 48 * 48, "longest_edge": 96 * 96}
    )
    template = TEMPLATE.replace(
        "<|vision_start|><|image_pad|><|vision_end|>",
        "".join(TOKENS[name] for name in ("image_start", "image", "image_end")),
    )
    return PicturesProcessor(images, tokenizer, template)


def config_of(tokenizer) -> Ernie4_5_VLMoeConfig:
    """Two layers that see, three that read; two of four experts per token, but none in the first layer."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 192,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": [64, 32],
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 4, 4]},
    }
    vision = {
        "depth": 2,
        "num_heads": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    tokens = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    return Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, **tokens)


def local_states(model, inputs) -> torch.Tensor:
    """What the first text layer attends to, when patches do not exchange: the tower's attention silenced."""
    model = copy.deepcopy(model)
    for block in model.model.vision_tower.blocks:
        parameters_zeroed(block.attn.proj)
    return key_states(model, inputs)


def patches(inputs) -> torch.Tensor:
    """Pixels of each key: its patches follow one another."""
    images = Ernie4_5_VLMoeImageProcessorPil()
    pixels = inputs["pixel_values"].unflatten(1, (3, PATCH**2)).transpose(1, 2).unflatten(0, (-1, MERGE**2))
    return pixels.flatten(1, 2) * torch.tensor(images.image_std) + torch.tensor(images.image_mean)


class TestErnie45Vl(Contract):
    adapter = Ernie45VlMoeAdapter
    guesses = False
    describes = "a grid of the picture's own shape, cells of 8 px among the text's tokens"
    keys = Keys((135, 120, 72), TOKENS["image"], TOKENS["image_start"], TOKENS["image_end"])

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        processor = build_processor(captions)
        config = config_of(processor.tokenizer)

        def make() -> PreTrainedModel:
            with torch.random.fork_rng():
                torch.manual_seed(5)
                model = Ernie4_5_VLMoeForConditionalGeneration(copy.deepcopy(config)).eval()
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

    def test_experts_of_text_and_of_pictures_get_the_gradient(self, family, model, batch, readings):
        """Of the alignment loss, through the queries and keys of the layer above them."""
        head = attach(model, AlignmentConfig())
        model.train()
        request = request_of(family, model, batch, readings, head.layers)
        model(**batch, attention_request=request).attention_loss.backward()
        mixture = model.model.language_model.layers[1].mlp
        for experts in (mixture.text_moe.experts, mixture.vision_moe.experts):
            assert (experts.gate_up_proj.grad.flatten(1).norm(dim=1) > 0).sum() >= 2  # a token uses two

    def test_videos_are_refused(self, model):
        inputs = {"input_ids": torch.full((2, 40), 5), "video_grid_thw": torch.tensor([[2, 6, 8]] * 2)}
        with pytest.raises(DataError, match="Got a batch with videos. Expected pictures: a map is of one picture"):
            adapter_for(model.config).image_keys(inputs)
