"""Gemma 4 under the contract: cells of 3 × 3 patches of 4 pixels; sliding and full layers, of which one reuses keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4Processor, ProcessorMixin
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from families.asking import captured
from families.by_hand import Keys
from families.contract import Contract
from families.core import Core
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
from lavender.errors import DataError
from lavender.students.families.gemma4 import Gemma4Adapter
from lavender.students.registry import adapter_for
from lavender.world.student_models import _tokenizer

PATCH, POOL, WINDOW = 4, 3, 50
CELL = PATCH * POOL
# (height, width) → (rows, cols) of cells of 12 px, by hand: at most 70 · 144 pixels in the image's aspect, each side
# rounded down. 300 × 500 becomes 77.8 × 129.6, 120 × 900 36.7 × 275.0, 97 × 83 108.5 × 92.9.
SIZES = {(300, 500): (6, 10), (500, 300): (10, 6), (120, 900): (3, 22), (97, 83): (9, 7), (200, 200): (8, 8)}
TOKENS = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}


class PicturesProcessor(Gemma4Processor):
    """Gemma 4's processor without its slots for videos, which need torchvision, and for sound."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        self.boi_token, self.eoi_token = tokenizer.boi_token, tokenizer.eoi_token
        self.boa_token, self.eoa_token, self.audio_token = "<|audio>", "<audio|>", "<|audio|>"
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def family_of(texts: list[str], **text: Any) -> Family:
    names = [name for name in TOKENS.values() if name != "<|image|>"]
    roles: Any = ROLES | {"extra_special_tokens": TOKENS}
    tokenizer = _tokenizer(texts, 310, (*SPECIAL_TOKENS, *names), "<|image|>", **roles)
    processor: Any = PicturesProcessor(
        Gemma4ImageProcessorPil(patch_size=PATCH, max_soft_tokens=70, pooling_kernel_size=POOL),
        tokenizer,
        template("<|image|>"),
    )
    layers = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    settings = {
        "num_hidden_layers": 4,
        "layer_types": layers,
        "sliding_window": WINDOW,
        "num_kv_shared_layers": 1,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": len(tokenizer),
    }
    config = Gemma4Config(
        text_config=text_settings(tokenizer, **settings | text),
        vision_config=vision_settings(
            num_key_value_heads=4, head_dim=8, patch_size=PATCH, pooling_kernel_size=POOL, position_embedding_size=128
        ),
        audio_config=None,
        image_token_id=processor.image_token_id,
        video_token_id=len(tokenizer) + 1,
        audio_token_id=tokenizer.audio_token_id,
    )

    def patches(inputs: Mapping[str, Tensor]) -> Tensor:
        """Pixels of each key: of its patches, which have the same column and row divided by three."""
        keys = []
        for pixels, places in zip(inputs["pixel_values"], inputs["image_position_ids"] // POOL, strict=True):
            real = places[:, 0] >= 0
            cols = int(places[:, 0].max()) + 1
            order = (places[real, 1] * cols + places[real, 0]).argsort(stable=True)
            keys.append(pixels[real][order].unflatten(1, (-1, 3)).unflatten(0, (-1, POOL**2)).flatten(1, 2))
        return torch.cat(keys)

    return Family(
        # scores are not scaled: the norms' weights do it
        maker(Gemma4ForConditionalGeneration, config, tokenizer, norms=(0.2, 0.4)),
        processor,
        tuple(SIZES),
        states_at_keys(
            lambda model: [layer.self_attn.o_proj.linear for layer in model.model.vision_tower.encoder.layers]
        ),
        patches,
        bicubic_blur,
        clear=0.4,
    )


class TestGemma4(Contract):
    adapter = Gemma4Adapter
    describes = (
        "a grid of the image's own shape, cells of 12 px among the text's tokens; 2 of 3 layers see only the last 400 "
        "tokens"
    )
    keys = Keys((60, 60, 66), "<|image|>", "<|image>", "<image|>")

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(captions, sliding_window=400)

    def test_the_sizes_give_their_grids(self, family, model):
        for size, (rows, cols) in SIZES.items():
            inputs, boxes = self.boxes_of(family, model, size)
            assert inputs["pixel_values"].shape == (1, 630, 48)
            assert boxes.shape == (rows * cols, 4)
            assert boxes[cols + 1].tolist() == pytest.approx([1 / rows, 1 / cols, 2 / rows, 2 / cols])
            assert boxes[-1, 2:].tolist() == [1, 1]

    def test_layers_that_reuse_keys_are_left_out(self, model):
        assert adapter_for(model.config).usable_layers() == (0, 1, 2)
        assert not hasattr(model.model.language_model.layers[3].self_attn, "k_proj")

    def test_a_cut_image_is_refused(self, model):
        adapter, ids = adapter_for(model.config), torch.full((1, 100), 5)
        ids[0, 7 : 7 + 5] = adapter.image_token_id()
        places = torch.tensor([[[0, 0], [8, 5], [-1, -1]]])
        with pytest.raises(DataError, match=r"Got 5 image tokens in a sample\. Expected 6, for views of \[\(2, 3\)\]"):
            adapter.image_keys({"input_ids": ids, "image_position_ids": places})

    def test_videos_are_refused(self, model):
        inputs = {"input_ids": torch.full((1, 9), 5), "pixel_values_videos": torch.zeros(1, 9, 48)}
        with pytest.raises(DataError, match="Got a batch with videos"):
            adapter_for(model.config).image_keys(inputs)


class TestVision(Core):
    """As the larger models have it: in sliding layers the keys of an image see each other; keys are values too."""

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return family_of(
            captions,
            use_bidirectional_attention="vision",
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            hidden_size_per_layer_input=0,
            num_kv_shared_layers=0,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=32,
        )

    def test_rows_see_what_their_layer_lets_them(self, family, model):
        """In an image both ways in sliding layers alone, and there nothing that is a window or more back."""
        batch, adapter = several(family.processor, "<|image|>", [[(300, 500)]]), Gemma4Adapter(model.config)
        keys = adapter.image_keys(batch)[0]
        places = torch.stack([keys[30], keys[59] + 5])
        inside, after = captured(model, batch, rows=places[None]).stacked()[:, 0].unbind(2)
        assert adapter.usable_layers() == (0, 1, 2, 3)
        for layer in range(4):
            sliding = layer in (0, 2)
            for rows, place, last in ((inside, places[0], 60 if sliding else 31), (after, places[1], 60)):
                seen = (torch.arange(60) < last) & ((keys > place - WINDOW) | torch.tensor(not sliding))
                assert rows[layer, :, seen].min() > 0
                assert rows[layer, :, ~seen].abs().sum() == 0
