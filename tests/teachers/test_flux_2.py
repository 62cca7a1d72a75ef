"""Flux 2 Klein under the contract: a chat template around the text, four axes of positions, normalised latents."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from lavender.config import ExtractionConfig
from lavender.teachers.diffusion.flux_2 import Flux2Klein
from lavender.teachers.diffusion.teacher import Teacher
from teachers import transformer_pipelines
from teachers.basis import given_of
from teachers.contract import Contract
from teachers.explicit import Reading
from teachers.pipelines import TEXTS
from teachers.rotary import image_places, turned

EIGHTS = {"square": ((64, 64), (16, 16)), "wide": ((150, 70), (10, 24)), "tall": ((60, 110), (22, 12))}
BEFORE = "<|im_start|>user\n"


class TestFlux2Klein(Contract):
    rounding: ClassVar = 0.2  # a text encoder of 28 layers
    counts: ClassVar = ({"zebra": 3, "umbrellas": 8}, {"red": 3, "grasshopper": 11})

    @pytest.fixture(autouse=True)
    def a_small_square(self, monkeypatch):
        """The pipeline's own constant is 128 latents."""
        monkeypatch.setattr(Flux2Klein, "side", 64)

    @pytest.fixture(scope="class")
    @classmethod
    def build(cls):
        return transformer_pipelines.flux_2_klein

    @pytest.fixture
    def latent_sizes(self):
        return EIGHTS

    @pytest.fixture
    def readings(self, pipeline):
        return [Reading(pipeline.tokenizer, before=len(pipeline.tokenizer(BEFORE)["input_ids"]), keys=512)]

    @pytest.fixture
    def rotate(self):
        """The text is at (0, 0, 0, place), the image at (0, row, column, 0)."""

        def rotate(heads: Tensor, kind: str, grid: tuple[int, int]) -> Tensor:
            text = torch.stack([torch.zeros(512)] * 3 + [torch.arange(512.0)], dim=1)
            return turned(heads, image_places(grid, 4) if kind == "image" else text, (4, 4, 4, 4), 2000)

        return rotate

    @torch.no_grad()
    def test_the_backbone_gets_what_the_pipeline_gives_it(self, pipeline, family):
        latents, timesteps, condition, size = given_of(family, (12, 20))
        states, text_ids = pipeline.encode_prompt(list(TEXTS[:2]))
        patches = pipeline._patchify_latents(latents)
        packed, image_ids = pipeline.prepare_latents(2, 4, *size, torch.float32, "cpu", None, latents=patches)
        assert packed.shape == (2, 6 * 10, 16)
        expected = pipeline.transformer(
            hidden_states=packed,
            timestep=timesteps / 1000,
            encoder_hidden_states=states,
            txt_ids=text_ids,
            img_ids=image_ids,
        ).sample
        expected = pipeline._unpatchify_latents(pipeline._unpack_latents_with_ids(expected, image_ids))
        found = family.predict(latents, timesteps, condition, size)
        assert torch.equal(found, expected)
        assert found.shape == latents.shape

    @torch.no_grad()
    def test_latents_are_those_of_the_pipeline(self, pipeline, family):
        pixels = torch.rand(1, 3, 48, 80) * 2 - 1
        expected = pipeline._unpatchify_latents(pipeline._encode_vae_image(pixels, None))
        # the square root is taken of the sum here, and of the buffer in its own precision there
        torch.testing.assert_close(family.encode_pixels(pixels), expected, rtol=0, atol=1e-5)

    def test_tokens_of_the_template_carry_no_word(self, family):
        offsets = family.token_offsets("a red")
        assert len(offsets) == 512
        assert [span for span in offsets if span != (0, 0)] == [(0, 1), (1, 3), (3, 4), (4, 5)]

    def test_the_double_blocks_are_the_default(self, pipeline):
        layers = Teacher(pipeline, ExtractionConfig()).layers((64, 96))
        assert [(layer.name, layer.grid) for layer in layers] == [
            ("transformer_blocks.0.attn", (8, 12)),
            ("transformer_blocks.1.attn", (8, 12)),
        ]
