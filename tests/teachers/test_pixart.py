"""PixArt-Σ under the contract: T5 in cross-attention, its mask, lower case, and DDIM."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from lavender.config import ExtractionConfig
from lavender.teachers.diffusion.teacher import Teacher
from teachers import transformer_pipelines
from teachers.basis import GRID, given_of, plain
from teachers.contract import Contract
from teachers.explicit import Reading
from teachers.pipelines import TEXTS, TOKENS, job, jobs, picture

EIGHTS = {"square": ((64, 64), (16, 16)), "wide": ((150, 70), (10, 24)), "tall": ((60, 110), (22, 12))}


class TestPixArtSigma(Contract):
    counts: ClassVar = ({"zebra": 2, "umbrellas": 2}, {"red": 1, "grasshopper": 2})

    @pytest.fixture(scope="class")
    @classmethod
    def build(cls):
        return transformer_pipelines.pixart_sigma

    @pytest.fixture
    def latent_sizes(self):
        return EIGHTS

    @pytest.fixture
    def readings(self, pipeline):
        return [Reading(pipeline.tokenizer, before=0)]

    def text_mask(self, condition):
        return condition["mask"]

    @torch.no_grad()
    def test_the_backbone_gets_what_the_pipeline_gives_it(self, pipeline, family):
        latents, timesteps, condition, size = given_of(family, (12, 20))
        texts = [TEXTS[0].title(), f" {TEXTS[1]} "]
        states, mask, _, _ = pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        found = family.encode_texts(texts)
        assert torch.equal(found["states"], states)
        assert torch.equal(found["mask"], mask)
        assert torch.equal(condition["states"], states)  # lower case
        expected = pipeline.transformer(
            latents,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        assert torch.equal(family.predict(latents, timesteps, condition, size), expected.chunk(2, dim=1)[0])

    def test_words_in_capitals_have_the_same_tokens(self, pipeline):
        teacher, image = Teacher(pipeline, plain()), picture(64, 64)
        small, large = teacher([job(image, "a red zebra"), job(image, "A RED Zebra")])
        torch.testing.assert_close(small.maps, large.maps, rtol=0, atol=1e-5)
        long = "The RED Zebra in Paris. " * 40
        assert teacher.windows(long) == teacher.windows(long.lower())
        # a letter whose lower case has two characters moves no other word
        assert set(teacher.family.token_offsets("\u0130 dog")) == {(0, 1), (2, 5), (0, 0)}

    def test_noise_is_that_of_ddpm(self, pipeline, family):
        clean, noise = torch.full((1, 1, 1, 1), 8.0), torch.full((1, 1, 1, 1), -4.0)
        kept = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000), dim=0)[250]
        noisy = family.add_noise(clean, noise, torch.tensor([250]))
        torch.testing.assert_close(noisy.squeeze(), 8 * kept.sqrt() - 4 * (1 - kept).sqrt())
        one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
        least = family.add_noise(0 * one, one, torch.tensor([1])).float().squeeze()
        expected = (1 - torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000), dim=0)[1]).sqrt()
        torch.testing.assert_close(least, expected, rtol=0.01, atol=0)  # one rounding; the scheduler's own gives 0

    @pytest.mark.parametrize("mode", ["ddim", "null-text"])
    def test_inversion_runs(self, pipeline, mode):
        own: dict[str, Any] = {"null_text_iterations": 1} if mode == "null-text" else {}
        config = ExtractionConfig(mode=mode, num_steps=2, grid=GRID, **own)
        (found,) = Teacher(pipeline, config)(jobs()[:1])
        assert found.maps.amax(dim=(1, 2)).min() == 1
