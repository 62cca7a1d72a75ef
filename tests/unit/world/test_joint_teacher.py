"""The world's teacher with joint attention: at tiny size its loss falls, and what it writes is a teacher."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lavender.config import ExtractionConfig, Space
from lavender.teachers.diffusion.teacher import Teacher
from lavender.world.scenes import scenes
from lavender.world.training import common, teacher
from lavender.world.training.common import scene_batches
from lavender.world.training.joint_teacher import (
    T5_KEYS,
    LastKeyRepeats,
    build_transformer,
    encode,
    flow_loss,
    train_joint_teacher,
)


@pytest.mark.slow
def test_the_loss_falls_and_the_folder_is_a_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "LOG_STEPS", 20)
    # the drawings of the training are not shipped; those of the style "plain" are
    monkeypatch.setattr(teacher, "scene_batches", lambda seeds, size: scene_batches(seeds, size, "plain"))
    out = train_joint_teacher(tmp_path / "work", tmp_path / "out", steps=160, num_scenes=16, batch=4, num_layers=2)
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


def test_one_key_that_repeats_is_as_good_as_all_keys_of_t5():
    torch.manual_seed(0)
    transformer, texts = build_transformer(num_layers=3), torch.randn(2, 5, 128)
    clean, noise, pooled = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16), torch.randn(2, 128)
    # random weights begin with projections of zero, which would hide the text
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.1)
    losses, gradients = [], []
    for keys in (T5_KEYS, 1):
        states = F.pad(texts, (0, 0, 0, keys)).requires_grad_()
        with LastKeyRepeats(T5_KEYS // keys):
            loss = flow_loss(transformer, clean, noise, torch.tensor([0.25, 0.75]), (states, pooled))
        (gradient,) = torch.autograd.grad(loss, states)
        losses.append(loss)
        gradients.append(gradient[:, :5])
    # sums of float32 in another order
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
    with torch.no_grad():  # without the weight of all keys it is another loss
        other = flow_loss(transformer, clean, noise, torch.tensor([0.25, 0.75]), (F.pad(texts, (0, 0, 0, 1)), pooled))
    assert abs(other - losses[0]) > 1e-3 * losses[0]


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
