"""Sana under the contract: an instruction before the text, linear self-attention, and its own autoencoder."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from lavender.config import ExtractionConfig
from lavender.errors import ConfigError
from lavender.teachers.diffusion.sana import INSTRUCTION, KEYS
from lavender.teachers.diffusion.teacher import Teacher
from teachers import transformer_pipelines
from teachers.basis import GRID, given_of, plain
from teachers.contract import Contract
from teachers.explicit import Reading
from teachers.pipelines import TEXTS, jobs

FOURS = {"square": ((64, 64), (16, 16)), "wide": ((150, 70), (11, 23)), "tall": ((60, 110), (22, 12))}


class TestSana(Contract):
    refine: ClassVar = 0
    counts: ClassVar = ({"zebra": 3, "umbrellas": 8}, {"red": 3, "grasshopper": 11})

    @pytest.fixture(scope="class")
    @classmethod
    def build(cls):
        return transformer_pipelines.sana

    @pytest.fixture
    def latent_sizes(self):
        return FOURS

    @pytest.fixture
    def readings(self, pipeline):
        """The start token comes before the text, whose first token holds the instruction's last space."""
        return [Reading(pipeline.tokenizer, before=1, keys=KEYS)]

    def text_mask(self, condition):
        return condition["mask"]

    @torch.no_grad()
    def test_the_backbone_gets_what_the_pipeline_gives_it(self, pipeline, family):
        latents, timesteps, condition, size = given_of(family, (12, 20))
        states, mask, _, _ = pipeline.encode_prompt(
            list(TEXTS[:2]), do_classifier_free_guidance=False, complex_human_instruction=INSTRUCTION.split("\n")
        )
        assert states.shape[1] == KEYS
        assert torch.equal(condition["states"], states)
        assert torch.equal(condition["mask"], mask)
        expected = pipeline.transformer(
            latents, encoder_hidden_states=states, encoder_attention_mask=mask, timestep=timesteps.float()
        ).sample
        assert torch.equal(family.predict(latents, timesteps, condition, size), expected)

    def test_tokens_of_a_text_with_spaces_and_capitals(self, family):
        """By hand: start, then ▁a ▁r e d of the stripped text."""
        offsets = family.token_offsets("  A red ")
        assert len(offsets) == KEYS
        assert [span for span in offsets if span != (0, 0)] == [(2, 3), (3, 5), (5, 6), (6, 7)]

    def test_a_tiny_autoencoder_is_refused(self, pipeline, tmp_path):
        """Its latents are those of another autoencoder."""
        pipeline.save_pretrained(tmp_path / "teacher", safe_serialization=True)
        with pytest.raises(ConfigError, match="Got tiny_vae with a SanaPipeline"):
            Teacher.from_pretrained(tmp_path / "teacher", ExtractionConfig(tiny_vae=str(tmp_path)))

    def test_refinement_is_refused(self, pipeline):
        with pytest.raises(ConfigError, match="Got refine with a SanaPipeline"):
            Teacher(pipeline, plain(refine=1))

    @pytest.mark.parametrize("mode", ["ddim", "null-text"])
    def test_inversion_is_refused(self, pipeline, mode):
        with pytest.raises(ConfigError, match="Got DDIM inversion with a SanaPipeline"):
            Teacher(pipeline, ExtractionConfig(mode=mode, grid=GRID))(jobs()[:1])
