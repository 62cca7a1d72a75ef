"""Stable Diffusion XL under the contract; its two text encoders and its conditions on size."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from lavender.teachers.diffusion.stable_diffusion import StableDiffusionXL
from lavender.teachers.diffusion.teacher import Teacher
from teachers import pipelines
from teachers.basis import given_of
from teachers.contract import Contract


class TestStableDiffusionXL(Contract):
    @pytest.fixture(scope="class")
    @classmethod
    def build(cls):
        return pipelines.stable_diffusion_xl

    @pytest.fixture
    def latent_sizes(self):
        """Pictures of (width, height), and latents of (height, width): 64² pixels in the same shape, by sixteens."""
        return {"square": ((64, 64), (16, 16)), "wide": ((150, 70), (12, 24)), "tall": ((60, 110), (20, 12))}

    @torch.no_grad()
    def test_the_backbone_gets_what_the_pipeline_gives_it(self, pipeline, family):
        """The same prediction as from the pipeline's own text states and sizes."""
        latents, timesteps, condition, size = given_of(family, (12, 20))
        texts = list(pipelines.TEXTS[:2])
        states, _, pooled, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
        ids = pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, 16).repeat(2, 1)
        expected = pipeline.unet(
            latents, timesteps, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}
        ).sample
        assert torch.equal(family.predict(latents, timesteps, condition, size), expected)

    def test_an_image_encoder_is_not_loaded(self, own, tmp_path):
        """Maps do not use it. Its weights may even be missing."""
        config = CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
        )
        own.pipeline.register_modules(image_encoder=CLIPVisionModelWithProjection(config))
        own.pipeline.save_pretrained(tmp_path, safe_serialization=True)
        (tmp_path / "image_encoder" / "model.safetensors").unlink()
        assert Teacher.from_pretrained(tmp_path).pipeline.image_encoder is None

    def test_layers_come_in_the_order_in_which_they_run(self, family):
        """Two transformer layers at the lowest level, none at the highest."""
        layers = family.layers((16, 24))
        assert [layer.name.partition(".attentions")[0] for layer in layers] == (
            ["down_blocks.1"] + ["down_blocks.2"] * 2 + ["mid_block"] * 2 + ["up_blocks.0"] * 4 + ["up_blocks.1"] * 2
        )
        assert [layer.grid for layer in layers] == [(8, 12)] + [(4, 6)] * 8 + [(8, 12)] * 2

    def test_half_precision_leaves_its_encoder_in_full(self, build, pipeline, tmp_path):
        """SDXL's encoder overflows in float16, and its config says so."""
        from lavender.config import ExtractionConfig
        from lavender.teachers.diffusion.teacher import Teacher

        pipeline.save_pretrained(tmp_path / "teacher", safe_serialization=True)
        teacher = Teacher.from_pretrained(tmp_path / "teacher", ExtractionConfig(), dtype=torch.float16)
        assert isinstance(teacher.family, StableDiffusionXL)
        assert teacher.family.dtype == torch.float16
        assert teacher.family.pipeline.vae.dtype == torch.float32
        assert teacher(pipelines.jobs()[:1])[0].maps.amax(dim=(1, 2)).min() == 1
