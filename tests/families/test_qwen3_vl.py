"""Qwen3-VL and its mixture of experts under the contract: patches of 4 pixels, DeepStack from both tower layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
)

from families.asking import request_of
from families.by_hand import Keys
from families.contract import Contract
from families.geometry import Family, parameters_zeroed, reading
from families.test_qwen_vl import MERGE, PATCH, SPECIAL_TOKENS, TEMPLATE, local_states
from lavender.alignment.objective import attach
from lavender.config import AlignmentConfig
from lavender.errors import DataError
from lavender.evaluation.leave_out import logits_keeping
from lavender.students.families.qwen_vl import Qwen3VlAdapter, Qwen3VlMoeAdapter
from lavender.students.registry import adapter_for
from lavender.world.student_models import _tokenizer

# (height, width) → (rows, cols) of keys, by hand, as for Qwen2-VL: cells of 8 px, 36 to 144 of them
SIZES = {
    (300, 500): (9, 15),
    (97, 83): (12, 10),
    (51, 96): (6, 12),
    (120, 900): (4, 32),
    (500, 300): (15, 9),
    (200, 200): (12, 12),
    (37, 23): (8, 5),
}


class PicturesProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without its slot for videos, which needs torchvision."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def build_processor(texts: list[str]) -> PicturesProcessor:
    """With the real one's mean and deviation of 0.5."""
    tokenizer = _tokenizer(
        texts, 300, SPECIAL_TOKENS, "<|image_pad|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        size={"shortest_edge": 48 * 48, "longest_edge": 96 * 96},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return PicturesProcessor(images, tokenizer, TEMPLATE)


def config_of(tokenizer, **text: Any) -> dict[str, Any]:
    """Two layers that see, both of whose states reach the text's; three that read. Heads wider than hidden / heads.

    Args:
        tokenizer: of the processor.
        text: further settings of the text model.
    """
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
        **text,
    }
    vision = {
        "depth": 2,
        "num_heads": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "out_hidden_size": 96,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "num_position_embeddings": 144,
        "deepstack_visual_indexes": [0, 1],
    }
    tokens = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    return {"text_config": text, "vision_config": vision, **tokens}


def family_of(
    processor: PicturesProcessor, make_model: Callable[[], PreTrainedModel], norms: tuple[float, float] = (0.5, 1.5)
) -> Family:
    """The model with the processor's tokens, and norms of heads between `norms`: new ones are all the same."""

    def make() -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = make_model().eval()
            for name, parameter in model.named_parameters():
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    torch.nn.init.uniform_(parameter, *norms)
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        return model

    return Family(make, processor, tuple(SIZES), local_states, patches, lambda size: (0.0, 0.0), clear=0.4)


def patches(inputs) -> torch.Tensor:
    """Pixels of each key: its patches follow one another, and each holds the picture twice, as if in time."""
    keys = inputs["pixel_values"].unflatten(1, (3, 2, PATCH**2))
    assert torch.equal(keys[:, :, 0], keys[:, :, 1])
    return keys[:, :, 0].transpose(1, 2).unflatten(0, (-1, MERGE**2)).flatten(1, 2) * 0.5 + 0.5


class TestQwen3Vl(Contract):
    adapter = Qwen3VlAdapter
    describes = "a grid of the picture's own shape, cells of 8 px among the text's tokens"
    keys = Keys((135, 120, 72), "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        processor = build_processor(captions)
        config = Qwen3VLConfig(**config_of(processor.tokenizer))
        return family_of(processor, lambda: Qwen3VLForConditionalGeneration(copy.deepcopy(config)))

    def test_the_sizes_give_their_grids(self, family, model):
        for size, (rows, cols) in SIZES.items():
            inputs, boxes = self.boxes_of(family, model, size)
            assert inputs["image_grid_thw"].tolist() == [[1, rows * MERGE, cols * MERGE]]
            assert boxes.shape == (rows * cols, 4)
            assert boxes[cols + 1].tolist() == pytest.approx([1 / rows, 1 / cols, 2 / rows, 2 / cols])
            assert boxes[-1, 2:].tolist() == [1, 1]

    @torch.no_grad()
    def test_deepstack_keeps_the_keys_in_place(self, family, model):
        """What the tower adds after the first text layer stands at the keys that show it; its last state is silent."""
        size = (300, 500)
        for block in model.model.visual.blocks:
            parameters_zeroed(block.attn.proj)
        parameters_zeroed(model.model.visual.merger.linear_fc2)
        added = []
        model.model.language_model.layers[1].register_forward_pre_hook(lambda module, args: added.append(args[0]))
        model.model.language_model.layers[0].register_forward_hook(lambda module, args, output: added.append(output))
        seen = []
        for image in (reading(size, "dog").image, reading(size, "dog").image.copy()):
            if seen:  # the cell in row 4 and column 9 of 9 × 15, from 134 to 166 and 300 to 333
                image.paste((255, 255, 255), (302, 136, 331, 164))
            inputs, _ = self.boxes_of(family, model, size, image)
            model(**inputs)
            before, after = added[-2:]
            seen.append((after - before)[inputs["input_ids"] == model.config.image_token_id])
        changed = (seen[1] - seen[0]).norm(dim=-1)
        assert changed.argmax().item() == 4 * 15 + 9
        assert (changed > 1e-3 * changed.max()).sum() <= 9  # the filter's neighbours

    @torch.no_grad()
    def test_the_check_replaces_what_deepstack_adds(self, model, batch, monkeypatch):
        """Nothing of the picture is left when all states are one mean, those of DeepStack too."""
        adapter = adapter_for(model.config)
        places = batch["input_ids"] == adapter.image_token_id()
        none = torch.zeros(int(places.sum()), dtype=torch.bool)
        kept = torch.rand(len(none), generator=torch.Generator().manual_seed(2)) < 0.3
        seen, forward = [], model.model.language_model.forward

        def see(*args, **kwargs):
            seen.append([kwargs["inputs_embeds"][places], *kwargs["deepstack_visual_embeds"]])
            return forward(*args, **kwargs)

        monkeypatch.setattr(model.model.language_model, "forward", see)
        for mask in (None, kept, none):
            logits_keeping(model, adapter, batch, mask)
        for whole, part, mean in zip(*seen, strict=True):
            assert whole.std(dim=0).max() > 1e-3
            torch.testing.assert_close(part[kept], whole[kept], rtol=0, atol=0)
            torch.testing.assert_close(part[~kept], whole.mean(0).expand_as(part[~kept]))
            torch.testing.assert_close(mean, whole.mean(0).expand_as(mean))

    @pytest.mark.parametrize("count", [0, 11, 24])
    def test_another_number_of_picture_tokens_is_refused(self, model, count):
        adapter, ids = adapter_for(model.config), torch.full((2, 40), 5)
        ids[0, 7 : 7 + 12] = ids[1, 3 : 3 + count] = adapter.image_token_id()
        with pytest.raises(DataError, match=f"Got {count + 12} picture tokens in a batch. Expected 24.*max_length"):
            adapter.image_keys({"input_ids": ids, "image_grid_thw": torch.tensor([[1, 6, 8], [1, 8, 6]])})

    def test_videos_are_refused(self, model):
        inputs = {"input_ids": torch.full((2, 40), 5), "video_grid_thw": torch.tensor([[2, 6, 8]] * 2)}
        with pytest.raises(DataError, match="Got a batch with videos. Expected pictures: a map is of one picture"):
            adapter_for(model.config).image_keys(inputs)


@pytest.mark.slow  # the place of its keys is that of the class above
class TestQwen3VlMoe(TestQwen3Vl):
    """Four experts, two of them per token; the second layer has none."""

    adapter = Qwen3VlMoeAdapter

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        processor = build_processor(captions)
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [1]}
        config = Qwen3VLMoeConfig(**config_of(processor.tokenizer, **experts))
        return family_of(processor, lambda: Qwen3VLMoeForConditionalGeneration(copy.deepcopy(config)))

    def test_experts_get_the_gradient(self, family, model, batch, readings):
        """Of the alignment loss, through the queries and keys of the layers above them."""
        head = attach(model, AlignmentConfig())
        model.train()
        model(
            **batch, attention_request=request_of(family, model, batch, readings, head.layers)
        ).attention_loss.backward()
        experts, router = (
            model.model.language_model.layers[0].mlp.experts,
            model.model.language_model.layers[0].mlp.gate,
        )
        assert experts.gate_up_proj.grad.flatten(1).norm(dim=1).min() > 0
        assert router.weight.grad.norm() > 0
