"""The world's teacher with joint attention: at tiny size its loss falls, and what it writes is a teacher."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lavender.config import ExtractionConfig, Space
from lavender.teachers.diffusion.teacher import Teacher
from lavender.world.scenes import scenes
from lavender.world.training import common, teacher
from lavender.world.training.common import scene_batches
from lavender.world.training.joint_teacher import encode, flow_loss, train_joint_teacher


@pytest.mark.slow
def test_the_loss_falls_and_the_folder_is_a_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "LOG_STEPS", 20)
    # the drawings of the training are not shipped; those of the style "plain" are
    monkeypatch.setattr(teacher, "scene_batches", lambda seeds, size: scene_batches(seeds, size, "plain"))
    out = train_joint_teacher(
        tmp_path / "work", tmp_path / "out", steps=160, vae_steps=20, num_scenes=16, batch=4, num_layers=2
    )
    losses = [json.loads(line)["loss"] for line in (tmp_path / "work" / "joint_teacher.jsonl").read_text().splitlines()]
    # smoothed over about 50 steps; a model that predicts nothing has the variance of noise and picture, 2
    assert losses[-1] < 0.9 * losses[0]
    (scene,) = scenes("development", 1, "plain")
    spaces: tuple[Space, ...] = ("attention", "output")
    for space in spaces:
        loaded = Teacher.from_pretrained(out, ExtractionConfig(space=space, grid=(8, 8)))
        maps = loaded.maps(scene.image, "a red dog and a cat")
        assert [word.text for word in maps.words] == ["red", "dog", "cat"]
        assert maps.maps.amax(dim=(1, 2)).tolist() == [1, 1, 1]


def test_the_loss_of_the_right_direction_is_zero():
    clean, noise = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)

    class Right(nn.Module):
        def forward(self, noisy, states, pooled, timesteps):
            share = timesteps[:, None, None, None] / 1000
            torch.testing.assert_close(noisy, (1 - share) * clean + share * noise)
            return type("Output", (), {"sample": noise - clean})

    empty = torch.zeros(2, 1, 1), torch.zeros(2, 1)
    assert flow_loss(Right(), clean, noise, torch.tensor([0.25, 0.75]), empty).item() == 0


def test_texts_are_encoded_as_the_pipeline_does():
    from teachers.pipelines import shared, stable_diffusion_3

    pipeline = shared(stable_diffusion_3)
    tokens = pipeline.tokenizer(["a red dog"], padding="max_length", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        encoders = nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2])
        states, pooled = encode(encoders, tokens, torch.ones_like(tokens))
        encoded = pipeline.encode_prompt(["a red dog"], None, None, do_classifier_free_guidance=False)
    assert torch.equal(states, encoded[0][..., : states.shape[-1]])
    assert torch.equal(pooled, encoded[2])
