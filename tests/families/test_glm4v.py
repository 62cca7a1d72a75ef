"""GLM-4.1V and GLM-4.6V under the contract: cells of 8 pixels, each of 2 × 2 patches, at most 144 of them."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessorPil,
    Glm4vProcessor,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    Glm46VImageProcessorPil,
    Glm46VProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from families.asking import request_of
from families.by_hand import Keys
from families.contract import Contract
from families.core import Core
from families.geometry import Family
from families.test_qwen_vl import MERGE, PATCH, SIZES, blur, local_states, patches
from families.training import train_two_steps
from lavender.alignment.objective import attach
from lavender.config import AlignmentConfig
from lavender.errors import DataError, UnsupportedModelError
from lavender.students.families.glm4v import Glm4vAdapter, Glm46vAdapter
from lavender.students.registry import adapter_for
from lavender.world.student_models import _tokenizer

# transformers' processor turns each row of ids into an array
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<|user|>",
    "<|assistant|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|video|>",
)
# no token ends an answer: the next turn's does
TEMPLATE = (
    "[gMASK]<sop>"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>\n' }}"
    "{%- if message['role'] == 'assistant' %}{%- generation %}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}{%- endif %}"
    "{%- endgeneration %}"
    "{%- elif message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<|begin_of_image|><|image|><|end_of_image|>' }}"
    "{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"
)


def without_videos(published: Any) -> type[ProcessorMixin]:
    """A processor class without its slot for videos, which needs torchvision."""

    class PicturesProcessor(published):
        def __init__(self, image_processor, tokenizer, chat_template=None):
            self.image_token, self.video_token = "<|image|>", "<|video|>"
            for name, token in (
                ("image_token", "<|image|>"),
                ("video_token", "<|video|>"),
                ("video_start", "<|begin_of_video|>"),
                ("video_end", "<|end_of_video|>"),
            ):
                setattr(self, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return PicturesProcessor


def build_processor(texts: list[str], published: Any, images: Any) -> ProcessorMixin:
    """It counts a picture's pixels twice, as two frames, when it compares them with `size`."""
    tokenizer = _tokenizer(texts, 300, SPECIAL_TOKENS, "<|image|>", eos_token="<|user|>", pad_token="<|endoftext|>")
    size = {"shortest_edge": 2 * 48 * 48, "longest_edge": 2 * 96 * 96}
    return without_videos(published)(images(patch_size=PATCH, merge_size=MERGE, size=size), tokenizer, TEMPLATE)


def settings_of(tokenizer, text_type: str) -> dict[str, Any]:
    """Two layers that see, three that read; half of each head is rotated: 12 of 24 numbers."""
    text = {
        "model_type": text_type,
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 192,
        "max_position_embeddings": 1024,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [2, 2, 2],
            "partial_rotary_factor": 0.5,
        },
    }
    if text_type == "glm4v_moe_text":  # the first layer has none, as published
        text |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1}
    vision = {
        "depth": 2,
        "num_heads": 4,
        "hidden_size": 64,
        "out_hidden_size": 96,
        "intermediate_size": 128,
        "image_size": 48,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    tokens = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image"),
            ("video", "video"),
            ("image_start", "begin_of_image"),
            ("image_end", "end_of_image"),
            ("video_start", "begin_of_video"),
            ("video_end", "end_of_video"),
        )
    }
    return {"text_config": text, "vision_config": vision, **tokens}


class Glm:
    """The models and processors of one family."""

    config: ClassVar[type] = Glm4vConfig
    model_class: ClassVar[type] = Glm4vForConditionalGeneration
    text_type: ClassVar[str] = "glm4v_text"
    published: ClassVar[tuple[type[ProcessorMixin], type]] = (Glm4vProcessor, Glm4vImageProcessorPil)

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        processor = build_processor(captions, *cls.published)
        settings = settings_of(processor.tokenizer, cls.text_type)
        if cls.config is not Glm46VConfig:
            del settings["text_config"]["model_type"]
        config = cls.config(**settings)

        def make() -> PreTrainedModel:
            with torch.random.fork_rng():
                torch.manual_seed(5)
                model = cls.model_class(copy.deepcopy(config)).eval()
                for name, parameter in model.named_parameters():
                    if name.endswith("_proj.bias"):
                        torch.nn.init.normal_(parameter, std=0.1)  # new ones are 0
            model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
            model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
            return model

        return Family(make, processor, tuple(SIZES), local_states, patches, blur, clear=0.4)


class TestGlm4v(Glm, Contract):
    adapter = Glm4vAdapter
    describes = "a grid of the picture's own shape, cells of 8 px among the text's tokens"
    keys = Keys((135, 120, 72), "<|image|>", "<|begin_of_image|>", "<|end_of_image|>")

    def test_the_sizes_give_their_grids(self, family, model):
        for size, (rows, cols) in SIZES.items():
            inputs, boxes = self.boxes_of(family, model, size)
            assert inputs["image_grid_thw"].tolist() == [[1, rows * MERGE, cols * MERGE]]
            assert boxes[cols + 1].tolist() == pytest.approx([1 / rows, 1 / cols, 2 / rows, 2 / cols])
            assert boxes[-1, 2:].tolist() == [1, 1]

    def test_half_of_each_head_is_rotated(self, model):
        """What a copy of the projections must leave as it is."""
        cos, _ = model.model.language_model.rotary_emb(torch.zeros(1, 3, 96), torch.zeros(3, 1, 3, dtype=torch.long))
        assert 2 * cos.shape[-1] == adapter_for(model.config).attention_module(model, 0).head_dim

    def test_videos_are_refused(self, model):
        """Their frames have the token of pictures."""
        inputs = {"input_ids": torch.full((2, 40), 5), "video_grid_thw": torch.tensor([[2, 6, 8]] * 2)}
        with pytest.raises(DataError, match="Got a batch with videos. Expected pictures: a map is of one picture"):
            adapter_for(model.config).image_keys(inputs)


class TestGlm46v(TestGlm4v):
    adapter = Glm46vAdapter
    config = Glm46VConfig
    model_class = Glm46VForConditionalGeneration
    published = (Glm46VProcessor, Glm46VImageProcessorPil)

    def test_another_text_model_is_refused(self, model):
        model.config.text_config.model_type = "qwen3"
        with pytest.raises(UnsupportedModelError, match="Got text_config.model_type='qwen3'. Expected one of"):
            adapter_for(model.config)


class TestGlm46vMoe(Glm, Core):
    """The larger GLM-4.6V has experts, and rotates its heads in another way. Four experts, two of them per token."""

    config = Glm46VConfig
    model_class = Glm46VForConditionalGeneration
    text_type = "glm4v_moe_text"
    published = (Glm46VProcessor, Glm46VImageProcessorPil)

    def test_experts_get_the_gradient(self, family, model, batch, readings):
        """Of the alignment loss, through the queries and keys of the layer above them."""
        head = attach(model, AlignmentConfig())
        model.train()
        request = request_of(family, model, batch, readings, head.layers)
        model(**batch, attention_request=request).attention_loss.backward()
        experts = model.model.language_model.layers[1].mlp.experts
        assert (experts.gate_up_proj.grad.flatten(1).norm(dim=1) > 0).sum() >= 2  # a token uses two

    def test_training_without_the_loss_of_the_router(self, family, model, dataset, store_path, tmp_path):
        """TRL asks the config for `num_experts`, which it does not have, unless that loss is off."""
        with pytest.raises(AttributeError, match="'Glm4vMoeTextConfig' object has no attribute 'num_experts'"):
            train_two_steps(copy.deepcopy(model), family.processor, dataset, store_path, tmp_path)
        train_two_steps(model, family.processor, dataset, store_path, tmp_path, router_aux_loss_coef=0.0)
