"""The adapter of `examples/add_a_family.py` under the contract. Copy this file to test a family of your own.

A family in the library needs neither `EXAMPLE` nor the fixture `registered`: import its adapter instead.
"""

from __future__ import annotations

import copy
import runpy
import sys
from collections.abc import Generator, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedModel,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from families.by_hand import Keys
from families.contract import Contract
from families.geometry import Family, parameters_zeroed
from lavender.errors import DataError
from lavender.students.registry import FAMILIES
from lavender.world.student_models import PATCH_SIZE, SQUARE_SIZE, build_llava_processor

EXAMPLE = Path(__file__).parents[2] / "examples" / "add_a_family.py"
SPEC = spec_from_file_location("add_a_family", EXAMPLE)
assert SPEC is not None
assert SPEC.loader is not None
sys.modules["add_a_family"] = module_from_spec(SPEC)  # under a name: pickle looks for classes there
SPEC.loader.exec_module(sys.modules["add_a_family"])
VipLlavaAdapter = sys.modules["add_a_family"].VipLlavaAdapter

SIDE = SQUARE_SIZE // PATCH_SIZE  # patches along a side of the square
SIZES = ((300, 500), (500, 300), (120, 900), (200, 200), (37, 23))  # upright, lying, very long, square, tiny


def build(texts: list[str]) -> Family:
    """A model of random weights, small enough for a CPU, and the real processor of the family."""
    processor = build_llava_processor(texts, vocabulary=300)  # trains a tokenizer; its image processor squashes
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=SQUARE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = VipLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=SIDE * SIDE,
        vision_feature_layer=[-2, 1],
    )

    def make() -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(5)  # the same weights each time
            model = VipLlavaForConditionalGeneration(copy.deepcopy(config)).eval()
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model

    def patches(inputs: Mapping[str, Tensor]) -> Tensor:
        """The pixels that each key shows, un-normalised to [0, 1]: (key, pixel, 3), row by row."""
        images = processor.image_processor
        square = inputs["pixel_values"][0].permute(1, 2, 0) * torch.tensor(images.image_std)
        square = square + torch.tensor(images.image_mean)
        grid = square.unflatten(1, (SIDE, PATCH_SIZE)).unflatten(0, (SIDE, PATCH_SIZE)).transpose(1, 2)
        return grid.reshape(SIDE * SIDE, PATCH_SIZE**2, 3)

    return Family(make, processor, SIZES, local_states, patches, blur)


@torch.no_grad()
def local_states(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the first decoder layer attends to at each key, if patches do not exchange: (sample, key, width).

    The tower's attention is silenced, so a key's state depends on the pixels of its own patch alone.
    """
    model = copy.deepcopy(model)
    for layer in model.model.vision_tower.encoder.layers:
        parameters_zeroed(layer.self_attn.out_proj)
    seen: list[Tensor] = []
    attention = model.model.language_model.layers[0].self_attn
    attention.k_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**inputs)
    is_key = inputs["input_ids"] == model.config.image_token_id
    return torch.stack([states[mask] for states, mask in zip(seen[0], is_key, strict=True)])


def blur(size: tuple[int, int]) -> tuple[float, float]:
    """The bicubic filter finds nothing beyond the border; it moves the mean of a patch by less than 0.03 pixels."""
    return 0.03 / size[0], 0.03 / size[1]


class TestVipLlava(Contract):
    adapter = VipLlavaAdapter
    describes = "one square of 80 px, 10 × 10 patches among the text's tokens"
    keys = Keys((SIDE * SIDE, SIDE * SIDE, SIDE * SIDE), "<image>", "<s>USER: ", "\n")

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def registered(cls) -> Generator[None, None, None]:
        """What one line in the registry does, for these tests."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(FAMILIES, VipLlavaAdapter.model_type, VipLlavaAdapter)
            yield

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, captions) -> Family:
        return build(captions)

    # What is the family's own follows here, with numbers worked out by hand.

    def test_a_cut_image_is_refused(self, model):
        ids = torch.full((1, 120), 5)
        ids[0, 7 : 7 + SIDE * SIDE - 1] = model.config.image_token_id
        with pytest.raises(DataError, match=r"Got 99 image tokens in a sample\. Expected 100, for views of"):
            VipLlavaAdapter(model.config).image_keys({"input_ids": ids, "pixel_values": torch.zeros(1, 3, 80, 80)})

    def test_boxes_by_hand(self, family, model):
        _, boxes = self.boxes_of(family, model, (300, 500))
        assert boxes[0].tolist() == pytest.approx([0, 0, 1 / 10, 1 / 10])
        assert boxes[10 + 2].tolist() == pytest.approx([1 / 10, 2 / 10, 2 / 10, 3 / 10])  # second row, third column


def test_the_example_runs(capsys, monkeypatch):
    monkeypatch.setitem(FAMILIES, VipLlavaAdapter.model_type, VipLlavaAdapter)  # and takes it away afterwards
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert capsys.readouterr().out.startswith("vipllava: one square of 336 px, 24 × 24 patches")
