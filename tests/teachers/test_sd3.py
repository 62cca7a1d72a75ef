"""Stable Diffusion 3 and 3.5 under the contract; joint attention, rectified flow, and what it can't do."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from lavender.config import ExtractionConfig
from lavender.errors import ConfigError, ModelError
from lavender.teachers.diffusion.teacher import Teacher
from teachers import pipelines, transformer_pipelines
from teachers.basis import GRID, given_of
from teachers.contract import Contract
from teachers.explicit import Reading

EIGHTS = {"square": ((64, 64), (16, 16)), "wide": ((150, 70), (10, 24)), "tall": ((60, 110), (22, 12))}


class TestStableDiffusion3(Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def build(cls):
        return pipelines.stable_diffusion_3

    @pytest.fixture
    def latent_sizes(self):
        """Pictures of (width, height), and latents of (height, width): 64² pixels in the same shape, by eights."""
        return EIGHTS

    @torch.no_grad()
    def test_the_backbone_gets_what_the_pipeline_gives_it(self, pipeline, family):
        latents, timesteps, condition, size = given_of(family, (12, 20))
        texts = list(pipelines.TEXTS[:2])
        states, _, pooled, _ = pipeline.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
        assert states.shape[1] == pipelines.TOKENS + pipelines.PADDING_TOKENS
        expected = pipeline.transformer(latents, states, pooled, timesteps.float()).sample
        assert torch.equal(family.predict(latents, timesteps, condition, size), expected)

    def test_noise_is_that_of_rectified_flow(self, family):
        """By hand: at t = 250 three quarters of the picture and one of the noise."""
        clean, noise = torch.full((2, 1, 1, 1), 8.0), torch.full((2, 1, 1, 1), -4.0)
        noisy = family.add_noise(clean, noise, torch.tensor([250, 1]))
        torch.testing.assert_close(noisy.flatten(), torch.tensor([5.0, 7.988]))

    @pytest.mark.parametrize("mode", ["ddim", "null-text"])
    def test_inversion_is_refused(self, pipeline, mode):
        with pytest.raises(ConfigError) as caught:
            Teacher(pipeline, ExtractionConfig(mode=mode, grid=GRID))(pipelines.jobs()[:1])
        assert str(caught.value) == (
            "Got DDIM inversion with a StableDiffusion3Pipeline. Expected a diffusion model with DDIM's schedule. "
            "Do this: use --mode noise."
        )

    def test_block_9_is_the_default_of_24_blocks_and_all_of_another_depth(self, pipeline, own):
        layers = Teacher(pipeline, ExtractionConfig()).layers((64, 64))
        assert [layer.name for layer in layers] == [f"transformer_blocks.{index}.attn" for index in range(3)]
        blocks = own.backbone.transformer_blocks
        for index in range(3, 24):
            blocks.append(blocks[index % 2])
        for size, grid in (((64, 64), (8, 8)), ((1024, 1024), (128, 128))):
            (layer,) = Teacher(own.pipeline, ExtractionConfig()).layers(size)
            assert (layer.name, layer.grid) == ("transformer_blocks.9.attn", grid)

    def test_the_default_settings_fit_models_of_a_larger_resolution(self, own):
        """SD3-medium's: latents of 128 × 128, 64 × 64 cells."""
        own.backbone.register_to_config(sample_size=128)
        assert Teacher(own.pipeline, ExtractionConfig()).layers((512, 512))[0].grid == (64, 64)


class TestStableDiffusion35(Contract):
    """Queries and keys are normed; in its first block a second attention sees the image alone."""

    @pytest.fixture(scope="class")
    @classmethod
    def build(cls):
        return pipelines.stable_diffusion_35

    @pytest.fixture
    def latent_sizes(self):
        return EIGHTS


class TestStableDiffusion35WithT5(Contract):
    """T5's tokens stand behind CLIP's, and a word has tokens of both."""

    counts: ClassVar = ({"zebra": 5 + 2, "umbrellas": 3 + 2}, {"red": 1 + 1, "grasshopper": 6 + 2})
    settings: ClassVar = {"t5": True}

    @pytest.fixture(scope="class")
    @classmethod
    def build(cls):
        return transformer_pipelines.stable_diffusion_3_t5

    @pytest.fixture
    def latent_sizes(self):
        return EIGHTS

    @pytest.fixture
    def readings(self, pipeline):
        return [Reading(pipeline.tokenizer), Reading(pipeline.tokenizer_3, before=0, keys=pipelines.PADDING_TOKENS)]

    @torch.no_grad()
    def test_t5_is_read(self, pipeline, family):
        """Its keys are its own states, not the zeros that stand in its place."""
        states = family.encode_texts(["a zebra"])["states"]
        tokens = pipeline.tokenizer_3(["a zebra"], padding="max_length", max_length=256, return_tensors="pt")
        assert torch.equal(states[:, pipelines.TOKENS :], pipeline.text_encoder_3(tokens["input_ids"])[0])

    def test_the_setting_must_say_what_the_pipeline_has(self, pipeline):
        with pytest.raises(ConfigError, match="Got t5=False with a pipeline that has a T5.* Do this: set t5=True"):
            Teacher(pipeline, ExtractionConfig())
        other = pipelines.shared(pipelines.stable_diffusion_35)
        with pytest.raises(ConfigError, match="Got t5=True with a pipeline that has no T5.* Do this: set t5=False"):
            Teacher(other, ExtractionConfig(t5=True))
        with pytest.raises(ConfigError, match="Got t5=True with a StableDiffusionPipeline"):
            Teacher(pipelines.shared(pipelines.stable_diffusion), ExtractionConfig(t5=True))

    def test_its_encoder_without_its_tokenizer_is_refused(self, own):
        own.pipeline.tokenizer_3 = None
        with pytest.raises(ModelError, match="Got one of text_encoder_3 and tokenizer_3 without the other"):
            Teacher(own.pipeline, ExtractionConfig(t5=True))

    def test_a_folder_is_loaded_with_and_without(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path / "teacher", safe_serialization=True)
        assert Teacher.from_pretrained(tmp_path / "teacher").pipeline.text_encoder_3 is None
        with_t5 = Teacher.from_pretrained(tmp_path / "teacher", ExtractionConfig(t5=True))
        assert with_t5.pipeline.text_encoder_3 is not None
        assert with_t5.config.identity() != ExtractionConfig().identity()
