"""Learned projections beside text models of every kind: they begin as the model's own, or are refused.

A family that loads any text model meets those that rotate neighbours, normalise in another way, or scale queries by
their positions. Rows of projections that are copies must be the model's own rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from lavender.alignment.objective import AlignmentRequest, attach, detach
from lavender.config import AlignmentConfig
from lavender.errors import UnsupportedModelError
from lavender.students.capture import PARALLEL_NAME, row_tensors
from lavender.students.image_keys import grid_boxes, key_layout

IMAGE_TOKEN, TOKENS = 98, 59
LEARN = AlignmentConfig(attention_loss="published", layers="all", pooling="learn")
OWN = AlignmentConfig(attention_loss="published", layers="all")


def student(kind: str, **text: Any) -> LlavaForConditionalGeneration:
    """A square of 4 × 4 patches beside a text model of two layers, with 4 heads and 2 key heads of 16 numbers."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = {"num_key_value_heads": 2, "vocab_size": 99, "hidden_size": 64} | sizes | special | text
    vision = CLIPVisionConfig(**sizes, hidden_size=32, image_size=32, patch_size=8)
    config = LlavaConfig(
        vision_config=vision, text_config=AutoConfig.for_model(kind, **text), image_token_index=IMAGE_TOKEN
    )
    model = LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data.normal_(0, 0.3)  # scores that differ
        elif "layernorm" in name and "self_attn" in name:
            parameter.data.normal_(1, 0.3)
    return model


def rows_of(model: Any, config: AlignmentConfig) -> Tensor:
    """Rows of one forward: (layer, sample, head, row, key). The model stays attached."""
    layers = attach(model, config).layers
    return forward(model, layers)


@torch.no_grad()
def forward(model: Any, layers: tuple[int, ...]) -> Tensor:
    ids = torch.randint(3, 90, (1, TOKENS), generator=torch.Generator().manual_seed(5))
    ids[0, 5:21] = IMAGE_TOKEN
    tensors = row_tensors([[(37,), (47,), (57,)]])
    layout = key_layout([[grid_boxes(4, 4)]])
    tensors |= {"boxes": layout.boxes, "pictures": layout.pictures, "keys": torch.arange(5, 21)[None]}
    request = AlignmentRequest(layers, tensors | {"targets": torch.rand(1, 3, 5, 7)})
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, attention_request=request)
    return request.stacked()


def hooks_of(model: Any) -> int:
    names = ("q_proj", "k_proj")
    return sum(len(one._forward_hooks) for name, one in model.named_modules() if name.endswith(names))


@pytest.mark.parametrize("kind", ["llama", "granite", "qwen3"])
def test_rows_begin_as_the_models_own(kind):
    settings = {"granite": {"attention_multiplier": 0.3}, "qwen3": {"head_dim": 16}}
    model = student(kind, **settings.get(kind, {}))
    own = rows_of(model, OWN)
    detach(model)
    torch.testing.assert_close(rows_of(model, LEARN), own, rtol=0, atol=1e-5)
    assert own.max() > 0.1
    assert hooks_of(model) == 0


@pytest.mark.parametrize("init", ["pretrained", "random"])
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("glm", {"head_dim": 16, "partial_rotary_factor": 0.5}),
        ("cohere", {}),
        ("helium", {"head_dim": 16}),
        ("ernie4_5", {"head_dim": 16}),
        ("phi", {"qk_layernorm": True, "partial_rotary_factor": 0.5}),
        ("smollm3", {"no_rope_layers": [1, 0]}),  # 0: without positions
    ],
)
def test_queries_and_keys_made_in_another_way_are_refused(kind, text, init):
    """They rotate neighbours; normalise under another name; have no positions in the second layer."""
    model = student(kind, **text)
    config = AlignmentConfig(attention_loss="published", layers="all", pooling="learn", parallel_init=init)
    with pytest.raises(UnsupportedModelError, match=r"Attention, which makes queries or keys in another way: they"):
        rows_of(model, config)
    detach(model)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("text", [("olmo2", {}), ("cohere", {"use_qk_norm": True})], ids=lambda text: text[0])
def test_norms_that_are_not_of_each_head_alone_are_refused(text):
    with pytest.raises(UnsupportedModelError, match="Attention, which normalises heads together, or each with a wei"):
        rows_of(student(text[0], **text[1]), LEARN)


@pytest.mark.parametrize(
    ("kind", "text", "got"),
    [
        ("phi3", {}, "Phi3Attention, which has no q_proj and no k_proj"),
        ("ministral3", {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}}, "llama_4_scaling"),
    ],
)
def test_what_a_model_shows_is_refused_before_it_is_changed(kind, text, got):
    model = student(kind, **text)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(UnsupportedModelError, match=got):
        attach(model, LEARN)
    assert [name for name, _ in model.named_modules()] == before
    assert hooks_of(model) == 0


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("before", [False, True])
def test_compiled_layers_are_compared_too(before):
    """Also if a graph without the hooks is there from an earlier forward."""
    torch._dynamo.reset()
    model = student("glm", head_dim=16, partial_rotary_factor=0.5)
    for layer in model.model.language_model.layers:
        layer.compile(backend="aot_eager")
    if before:
        rows_of(model, OWN)
        detach(model)
    with pytest.raises(UnsupportedModelError, match="makes queries or keys in another way"):
        rows_of(model, LEARN)


def test_adapters_that_are_trained_are_part_of_the_models_own():
    """A run that goes on has adapters that change its queries, and its projections are no copies."""
    model = student("llama")
    layers = attach(model, LEARN).layers
    tuned = get_peft_model(model, LoraConfig(target_modules=r".*\.q_proj", r=2, init_lora_weights=False, lora_alpha=64))
    assert (forward(tuned, layers) >= 0).all()
    assert all(one.is_compared for name, one in model.named_modules() if name.endswith(PARALLEL_NAME))
