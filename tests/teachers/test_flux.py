"""Flux 1 under the contract: the text first, rotary positions, T5's tokens, guidance as an input."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from lavender.config import ExtractionConfig
from lavender.errors import ConfigError
from lavender.teachers.diffusion.flux import GUIDANCE, Flux
from lavender.teachers.diffusion.teacher import Teacher
from teachers import transformer_pipelines
from teachers.basis import GRID, given_of
from teachers.contract import Contract
from teachers.explicit import Reading
from teachers.pipelines import TEXTS, TOKENS, jobs
from teachers.rotary import image_places, turned

EIGHTS = {"square": ((64, 64), (16, 16)), "wide": ((150, 70), (10, 24)), "tall": ((60, 110), (22, 12))}


class TestFlux(Contract):
    counts: ClassVar = ({"zebra": 2, "umbrellas": 2}, {"red": 1, "grasshopper": 2})

    @pytest.fixture(autouse=True)
    def a_small_square(self, monkeypatch):
        """The pipeline's own constant is 128 latents."""
        monkeypatch.setattr(Flux, "side", 64)

    @pytest.fixture(scope="class")
    @classmethod
    def build(cls):
        return transformer_pipelines.flux

    @pytest.fixture
    def latent_sizes(self):
        return EIGHTS

    @pytest.fixture
    def readings(self, pipeline):
        return [Reading(pipeline.tokenizer_2, before=0)]

    @pytest.fixture
    def rotate(self):
        """The text is at (0, 0, 0), the image at (0, row, column)."""

        def rotate(heads: Tensor, kind: str, grid: tuple[int, int]) -> Tensor:
            return turned(heads, image_places(grid, 3), (4, 4, 4), 10000) if kind == "image" else heads

        return rotate

    @torch.no_grad()
    def test_the_backbone_gets_what_the_pipeline_gives_it(self, pipeline, family):
        latents, timesteps, condition, size = given_of(family, (12, 20))
        states, pooled, text_ids = pipeline.encode_prompt(list(TEXTS[:2]), max_sequence_length=TOKENS)
        packed, image_ids = pipeline.prepare_latents(2, 4, *size, torch.float32, "cpu", torch.manual_seed(5))
        assert packed.shape == (2, 6 * 10, 16)
        packed = pipeline._pack_latents(latents, 2, 4, 12, 20)
        expected = pipeline.transformer(
            hidden_states=packed,
            timestep=timesteps / 1000,
            guidance=torch.tensor([GUIDANCE, GUIDANCE]) if pipeline.transformer.config.guidance_embeds else None,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=text_ids,
            img_ids=image_ids,
        ).sample
        found = family.predict(latents, timesteps, condition, size)
        assert torch.equal(found, pipeline._unpack_latents(expected, *size, 4))
        assert found.shape == latents.shape

    def test_noise_is_that_of_rectified_flow(self, family):
        clean, noise = torch.full((2, 1, 1, 1), 8.0), torch.full((2, 1, 1, 1), -4.0)
        noisy = family.add_noise(clean, noise, torch.tensor([250, 1]))
        torch.testing.assert_close(noisy.flatten(), torch.tensor([5.0, 7.988]))

    @pytest.mark.parametrize("mode", ["ddim", "null-text"])
    def test_inversion_is_refused(self, pipeline, mode):
        with pytest.raises(ConfigError, match="Got DDIM inversion with a FluxPipeline"):
            Teacher(pipeline, ExtractionConfig(mode=mode, grid=GRID))(jobs()[:1])

    def test_the_second_half_of_the_double_blocks_is_the_default(self, pipeline):
        (layer,) = Teacher(pipeline, ExtractionConfig()).layers((64, 96))
        assert (layer.name, layer.grid) == ("transformer_blocks.1.attn", (8, 12))


class TestFluxSchnell(TestFlux):
    """Without guidance as an input."""

    @pytest.fixture(scope="class")
    @classmethod
    def build(cls):
        return transformer_pipelines.flux_schnell


def test_the_real_square_and_text_lengths():
    """1024 pixels at a factor of 8; 512 tokens of "dev" and 256 of "schnell", if the tokenizer takes them."""
    dev, schnell = (Flux(build()) for build in (transformer_pipelines.flux, transformer_pipelines.flux_schnell))
    assert dev.side == 128 * 4  # the tiny autoencoder's factor is 4
    for family, longest in ((dev, 512), (schnell, 256)):
        assert family.max_tokens == TOKENS
        family.pipeline.tokenizer_2 = transformer_pipelines.t5_tokenizer.__wrapped__()
        family.pipeline.tokenizer_2.model_max_length = 2000
        assert family.max_tokens == longest
