"""Published pipelines that differ from the usual: other noise, half precision, offloading, parts that nobody needs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)

from lavender.config import ExtractionConfig
from lavender.errors import ConfigError, ModelError
from lavender.teachers.diffusion.denoising import _optimize_empty
from lavender.teachers.diffusion.registry import family_of
from lavender.teachers.diffusion.teacher import Teacher
from lavender.teachers.diffusion.views import _sample_boxes
from teachers import pipelines


def saved(build: Any, folder: Path, **parts: Any) -> Path:
    pipeline = pipelines.fresh(build)
    for name, part in parts.items():
        setattr(pipeline, name, part)
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EDMEulerScheduler(), "Got the scheduler EDMEulerScheduler in .*trained on such noise"),
        (DDIMScheduler(prediction_type="sample"), "Got prediction_type 'sample' in .*Expected 'epsilon' or 'v_pred"),
        (EulerDiscreteScheduler(**pipelines.BETAS), None),
        (DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", **pipelines.BETAS), None),
    ],
)
def test_a_model_of_other_noise_is_refused(scheduler, message, tmp_path):
    """Its maps would be wrong. Zero terminal SNR is none: ᾱ of the last step is 0."""
    folder = saved(pipelines.stable_diffusion_xl, tmp_path / "teacher", scheduler=scheduler)
    if message is None:
        assert Teacher.from_pretrained(folder).maps(pipelines.picture(64, 64), "a dog").maps.isfinite().all()
    else:
        with pytest.raises(ModelError, match=message):
            Teacher.from_pretrained(folder)
        with pytest.raises(ModelError, match=message):
            Teacher(StableDiffusionXLPipeline.from_pretrained(folder))


def test_latents_with_a_mean_and_a_deviation():
    family = family_of(type(pipelines.shared(pipelines.stable_diffusion)))(pipelines.fresh(pipelines.stable_diffusion))
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    plain = family.scaled_latents(pixels)
    family.pipeline.vae.register_to_config(latents_mean=[0.5, 0, 0, 1], latents_std=[2.0, 1, 1, 4])
    scaling = family.pipeline.vae.config.scaling_factor
    shift, scale = torch.tensor([0.5, 0, 0, 1]).view(1, 4, 1, 1), torch.tensor([2.0, 1, 1, 4]).view(1, 4, 1, 1)
    torch.testing.assert_close(family.scaled_latents(pixels), (plain - shift * scaling) / scale)


def test_parts_that_no_map_needs_are_not_loaded(tmp_path):
    """Many fine-tunes name a class that transformers no longer has."""
    folder = saved(pipelines.stable_diffusion, tmp_path / "teacher")
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert Teacher.from_pretrained(folder).maps(pipelines.picture(64, 64), "a dog").maps.isfinite().all()


def test_weights_of_a_variant_are_named(tmp_path):
    folder = tmp_path / "teacher"
    pipelines.fresh(pipelines.stable_diffusion).save_pretrained(folder, variant="fp16")
    with pytest.raises(ModelError, match=r"beside \w+\.fp16\.safetensors.*save it without one"):
        Teacher.from_pretrained(folder)


def test_a_tiny_autoencoder_that_is_not_there_is_refused():
    pipeline = pipelines.fresh(pipelines.stable_diffusion)
    config = ExtractionConfig(tiny_vae="taesd")
    with pytest.raises(ConfigError, match="tiny_vae='taesd' with a pipeline whose vae is a AutoencoderKL"):
        Teacher(pipeline, config)
    pipeline.vae = AutoencoderTiny(latent_channels=4)
    Teacher(pipeline, config)


def test_offloading_is_refused():
    pipeline = pipelines.fresh(pipelines.stable_diffusion)
    pipeline._offload_device = torch.device("cuda:0")  # as enable_model_cpu_offload sets it
    with pytest.raises(ConfigError, match="a pipeline with offloading"):
        Teacher(pipeline)


def test_the_type_is_that_of_the_computation():
    """Of 4-bit weights the first parameter holds bytes."""
    family = family_of(type(pipelines.shared(pipelines.stable_diffusion)))(pipelines.fresh(pipelines.stable_diffusion))
    first = next(family.backbone.parameters())
    first.requires_grad_(False)
    first.data = first.data.to(torch.uint8)
    assert family.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "ddim", "timesteps": (50, 100)}, r"timesteps=.* with mode='ddim'\. Expected it with mode noise\."),
        ({"guidance": 3.0}, "guidance=3.0 with mode='noise'. Expected it with mode null-text."),
        ({"num_steps": 20}, "num_steps=20 with mode='noise'. Expected it with mode ddim or null-text."),
        ({"mode": "null-text", "seed": 4}, "seed=4 with mode='null-text'"),
    ],
)
def test_settings_that_the_mode_does_not_read_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ExtractionConfig(**settings)


def test_a_batch_bounds_the_texts_of_a_forward(monkeypatch):
    """Also the windows of one long text."""
    teacher = Teacher(pipelines.shared(pipelines.stable_diffusion), ExtractionConfig(batch_size=2))
    rows, real = [], Teacher._map_rows

    def map_rows(self, jobs, group, views):
        rows.append(len(group))
        return real(self, jobs, group, views)

    monkeypatch.setattr(Teacher, "_map_rows", map_rows)
    text = ". ".join(["a dog and a cat near a tree"] * 20)
    found = teacher([pipelines.job(pipelines.picture(64, 64), text)])[0]
    assert max(rows) == 2
    assert len(rows) > 1
    whole = Teacher(pipelines.shared(pipelines.stable_diffusion), ExtractionConfig(batch_size=64))
    expected = whole([pipelines.job(pipelines.picture(64, 64), text)])[0]
    torch.testing.assert_close(found.maps, expected.maps, rtol=0, atol=1e-4)  # products of other shapes


def test_places_of_64_bits_stay_on_the_cpu(monkeypatch):
    """MPS has no such numbers, so a tensor of them cannot be moved there. Places outside the view are 0."""
    real = torch.Tensor.to

    def to(self: torch.Tensor, *to_what: Any, **settings: Any) -> torch.Tensor:
        if self.dtype == torch.float64 and any(isinstance(one, torch.device) for one in to_what):
            raise TypeError("no float64 on this device")
        return real(self, *to_what, **settings)

    monkeypatch.setattr(torch.Tensor, "to", to)
    found = _sample_boxes(torch.ones(1, 1, 4, 4), [(-0.5, 0.0, 1.0, 1.0)], (4, 4))
    assert found[0, 0, 0].tolist() == [0.0] * 4
    assert found[0, 0, -1].tolist() == [1.0] * 4


def test_the_gradient_of_null_text_does_not_vanish_in_half_precision():
    """Of a mean over 65,536 numbers it is below what float16 can hold: Adam would not move the states."""

    class Step:
        family: Any = SimpleNamespace(backbone=torch.nn.Module(), forwards=0)

        def __init__(self, dtype: torch.dtype):
            self._dtype = dtype

        def __call__(self, states: torch.Tensor) -> torch.Tensor:
            return (states.to(self._dtype) * 1e-3).float()

    states, target = torch.zeros(1, 1, 65_536), torch.full((1, 1, 65_536), 1e-2)
    half, whole = (
        _optimize_empty(cast(Any, Step(dtype)), states, target, iterations=1, index=0)
        for dtype in (torch.float16, torch.float32)
    )
    assert whole.min() > 1e-4
    torch.testing.assert_close(half, whole, rtol=2**-9, atol=0)  # 2⁻¹¹ of a float16, a few times
