"""Qwen3.5 and its mixture of experts under the contract: two of four decoder layers have linear attention."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from families.asking import eager_rows
from families.by_hand import Keys
from families.contract import Contract
from families.geometry import Family, parameters_zeroed
from families.test_qwen3_vl import SIZES, build_processor, config_of, family_of
from families.test_qwen_vl import MERGE
from lavender.errors import ConfigError, DataError
from lavender.students.capture import AttentionRequest
from lavender.students.families.qwen_vl import Qwen35Adapter, Qwen35MoeAdapter
from lavender.students.registry import adapter_for

# a quarter of each head is rotated: 8 of 32 numbers, in 4 pairs
HYBRID = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.25,
    },
}
NORMS = (-0.5, 0.5)  # transformers adds 1 to them


def settings_of(tokenizer, **text: Any) -> dict[str, Any]:
    """Of Qwen3-VL's tiny model, without DeepStack."""
    settings = config_of(tokenizer, **HYBRID, **text)
    del settings["vision_config"]["deepstack_visual_indexes"]
    return settings


def local_states(model, inputs) -> torch.Tensor:
    """The normalised states that enter the first decoder layer, when patches do not exchange."""
    model = copy.deepcopy(model)
    del model.model.language_model.layers[1:]
    model.model.language_model.config.num_hidden_layers = 1
    for block in model.model.visual.blocks:
        parameters_zeroed(block.attn.proj)
    seen = []
    norm = model.model.language_model.layers[0].input_layernorm
    norm.register_forward_hook(lambda module, args, output: seen.append(output))
    model(**inputs, use_cache=False)
    return torch.stack(
        [states[ids == model.config.image_token_id] for states, ids in zip(seen[0], inputs["input_ids"], strict=True)]
    )


def eager_rows_of_attention_layers(model, batch, request: AttentionRequest) -> torch.Tensor:
    """Transformers returns the attention of the layers that have it, and leaves the others out."""
    layers = [adapter_for(model.config).usable_layers().index(layer) for layer in request.layers]
    return eager_rows(model, batch, AttentionRequest(request.rows_BR, layers, request.keys_BK))


class TestQwen35(Contract):
    adapter = Qwen35Adapter
    guesses = False
    describes = "a grid of the picture's own shape, cells of 8 px among the text's tokens"
    keys = Keys((135, 120, 72), "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        processor = build_processor(captions)
        config = Qwen3_5Config(**settings_of(processor.tokenizer))
        family = family_of(processor, lambda: Qwen3_5ForConditionalGeneration(copy.deepcopy(config)), NORMS)
        return replace(family, local_states=local_states)

    eager_rows = staticmethod(eager_rows_of_attention_layers)

    def test_the_sizes_give_their_grids(self, family, model):
        for size, (rows, cols) in SIZES.items():
            inputs, boxes = self.boxes_of(family, model, size)
            assert inputs["image_grid_thw"].tolist() == [[1, rows * MERGE, cols * MERGE]]
            assert boxes[cols + 1].tolist() == pytest.approx([1 / rows, 1 / cols, 2 / rows, 2 / cols])
            assert boxes[-1, 2:].tolist() == [1, 1]

    def test_layers_of_linear_attention_are_left_out(self, model):
        adapter = adapter_for(model.config)
        assert adapter.usable_layers() == (1, 3)
        assert not hasattr(model.model.language_model.layers[0], "self_attn")
        with pytest.raises(ConfigError, match=r"of which \[0, 2\] do not see the picture"):
            adapter.layers((0, 1, 2))

    def test_queries_have_a_gate_and_a_rotated_quarter(self, model):
        """What a copy of the projections must leave out, and must leave as it is."""
        attention = adapter_for(model.config).attention_module(model, 1)
        assert attention.q_proj.out_features == 2 * 4 * attention.head_dim
        cos, _ = model.model.language_model.rotary_emb(torch.zeros(1, 3, 96), torch.zeros(3, 1, 3, dtype=torch.long))
        assert cos.shape[-1] == attention.head_dim // 4

    def test_videos_are_refused(self, model):
        inputs = {"input_ids": torch.full((2, 40), 5), "video_grid_thw": torch.tensor([[2, 6, 8]] * 2)}
        with pytest.raises(DataError, match="Got a batch with videos. Expected pictures: a map is of one picture"):
            adapter_for(model.config).image_keys(inputs)


@pytest.mark.slow  # the place of its keys is that of the class above
class TestQwen35Moe(TestQwen35):
    """Four experts, two of them per token, and one that all tokens share."""

    adapter = Qwen35MoeAdapter

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        processor = build_processor(captions)
        experts = {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        }
        settings = settings_of(processor.tokenizer, **experts)
        del settings["text_config"]["intermediate_size"]
        config = Qwen3_5MoeConfig(**settings)
        family = family_of(processor, lambda: Qwen3_5MoeForConditionalGeneration(copy.deepcopy(config)), NORMS)
        return replace(family, local_states=local_states)
