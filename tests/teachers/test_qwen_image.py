"""Qwen-Image under the contract: a template that is dropped in part, masked joint attention, centred positions."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from lavender.teachers.diffusion.qwen_image import KEYS, QwenImage
from teachers import transformer_pipelines
from teachers.basis import given_of
from teachers.contract import Contract
from teachers.explicit import Reading
from teachers.pipelines import TEXTS
from teachers.rotary import image_places, turned

EIGHTS = {"square": ((64, 64), (16, 16)), "wide": ((150, 70), (10, 24)), "tall": ((60, 110), (22, 12))}


class TestQwenImage(Contract):
    counts: ClassVar = ({"zebra": 3, "umbrellas": 8}, {"red": 3, "grasshopper": 11})

    @pytest.fixture(autouse=True)
    def a_small_square(self, monkeypatch):
        """The pipeline's own constant is 128 latents."""
        monkeypatch.setattr(QwenImage, "side", 64)

    @pytest.fixture(scope="class")
    @classmethod
    def build(cls):
        return transformer_pipelines.qwen_image

    @pytest.fixture
    def latent_sizes(self):
        return EIGHTS

    @pytest.fixture
    def readings(self, pipeline):
        before = len(pipeline.tokenizer(pipeline.prompt_template_encode.split("{}")[0])["input_ids"])
        return [Reading(pipeline.tokenizer, before=before - pipeline.prompt_template_encode_start_idx, keys=KEYS)]

    @pytest.fixture
    def rotate(self):
        """The image's middle is at (0, 0, 0); the text stands beyond its corner, on the diagonal."""

        def rotate(heads: Tensor, kind: str, grid: tuple[int, int]) -> Tensor:
            rows, cols = grid
            image = image_places(grid, 3) - torch.tensor([0, rows - rows // 2, cols - cols // 2])
            text = (max(rows // 2, cols // 2) + torch.arange(KEYS))[:, None].expand(-1, 3)
            return turned(heads, image if kind == "image" else text, (4, 4, 4), 10000)

        return rotate

    def text_mask(self, condition):
        return condition["mask"]

    @torch.no_grad()
    def test_the_backbone_gets_what_the_pipeline_gives_it(self, pipeline, family):
        latents, timesteps, condition, size = given_of(family, (12, 20))
        states, mask = pipeline.encode_prompt(list(TEXTS[:2]))
        length = mask.shape[1]
        assert torch.equal(condition["states"][:, :length], states)
        assert torch.equal(condition["mask"][:, :length], mask.bool())
        assert not condition["mask"][:, length:].any()
        expected = pipeline.transformer(
            hidden_states=pipeline._pack_latents(latents, 2, 4, 12, 20),
            timestep=timesteps / 1000,
            encoder_hidden_states=states,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, 6, 10)]] * 2,
        ).sample
        expected = pipeline._unpack_latents(expected, *size, 4)[:, :, 0]
        # masked padding changes the order of sums
        torch.testing.assert_close(family.predict(latents, timesteps, condition, size), expected, rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_latents_are_normalised_per_channel(self, pipeline, family):
        pixels = torch.rand(1, 3, 48, 80) * 2 - 1
        raw = pipeline.vae.encode(pixels[:, :, None]).latent_dist.mode()
        found = family.encode_pixels(pixels)
        assert found.shape == (1, 4, 12, 20)
        torch.testing.assert_close(found[0, 1], (raw[0, 1, 0] - 0.1) / 1.4)

    def test_tokens_of_the_template_carry_no_word(self, family):
        offsets = family.token_offsets("a red")
        assert len(offsets) == KEYS
        assert [span for span in offsets if span != (0, 0)] == [(0, 1), (1, 3), (3, 4), (4, 5)]
