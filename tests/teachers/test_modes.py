"""The ladder of modes: against diffusers' own schedulers, against its own parts, and its price in forwards.

Pipelines with ε- and v-prediction, and Stable Diffusion XL.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import Tensor

from lavender.config import ExtractionConfig
from lavender.teachers.diffusion.base import Condition, TeacherFamily
from lavender.teachers.diffusion.denoising import Batch, ddim_step, ddim_timesteps, invert, read_maps
from lavender.teachers.diffusion.registry import family_of
from lavender.teachers.diffusion.teacher import Teacher
from teachers import pipelines
from teachers.basis import GRID, same

SCHEDULE: dict[str, Any] = {
    **pipelines.BETAS,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
SIZE = (12, 20)


@pytest.fixture(params=[pipelines.stable_diffusion, pipelines.stable_diffusion_2, pipelines.stable_diffusion_xl])
def family(request) -> TeacherFamily:
    pipeline = pipelines.shared(request.param)
    return family_of(type(pipeline))(pipeline)


def prediction(family: TeacherFamily) -> str:
    return "v_prediction" if family.predicts_velocity else "epsilon"


@torch.no_grad()
def batch_of(family: TeacherFamily, texts=pipelines.TEXTS) -> Batch:
    """Rows that each depend on their text and place in the list of texts alone."""
    latents = torch.stack(
        [torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(pipelines.TEXTS.index(text))) for text in texts]
    )
    return Batch(latents, family.encode_texts(texts), (48, 80), empty=family.empty_condition())


class Log:
    """Reads by running the backbone; keeps what it was given."""

    def __init__(self, family: TeacherFamily, batch: Batch):
        self.family, self.batch = family, batch
        self.latents: list[Tensor] = []
        self.timesteps: list[list[int]] = []
        self.needs_output: list[bool] = []

    def __call__(self, latents: Tensor, timesteps: Tensor, condition: Condition, needs_output: bool) -> Tensor:
        assert not torch.is_grad_enabled()
        self.latents.append(latents)
        self.timesteps.append(timesteps.tolist())
        self.needs_output.append(needs_output)
        return self.family.denoise(latents, timesteps, condition, self.batch.image_size)


def null_text(**settings: Any) -> dict[str, Any]:
    return {"mode": "null-text", "num_steps": 3, "grid": GRID} | settings


@torch.no_grad()
def run(family: TeacherFamily, batch: Batch, **settings: Any) -> Log:
    log = Log(family, batch)
    read_maps(family, ExtractionConfig(**settings), batch, log)
    return log


def test_levels_by_hand():
    assert ddim_timesteps(10) == [1, 101, 201, 301, 401, 501, 601, 701, 801, 901]
    assert ddim_timesteps(3) == [1, 334, 667]
    assert ddim_timesteps(1) == [1]
    assert ddim_timesteps(999)[-1] == 999


@pytest.mark.parametrize("num_steps", [10, 7, 1])
def test_levels_are_those_of_diffusers(num_steps):
    down, up = DDIMScheduler(**SCHEDULE), DDIMInverseScheduler(**SCHEDULE)
    down.set_timesteps(num_steps)
    up.set_timesteps(num_steps)
    assert ddim_timesteps(num_steps) == up.timesteps.tolist() == down.timesteps.tolist()[::-1]


@pytest.mark.parametrize("timestep", [901, 401, 101, 1])
def test_a_step_down_is_that_of_diffusers(family, timestep):
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type=prediction(family))
    scheduler.set_timesteps(10)
    sample, output = torch.randn(2, 4, 5, 7), torch.randn(2, 4, 5, 7)
    torch.testing.assert_close(
        ddim_step(family, sample, output, timestep, timestep - 100),
        scheduler.step(output, timestep, sample, eta=0).prev_sample,
        rtol=0,
        atol=1e-5,
    )


def test_a_step_by_hand(family):
    """A sample made of a known picture and noise, and the right prediction: the step is the other mix of both."""
    alphas = family.alphas_cumprod
    clean, noise = torch.randn(3, 4, 5, 7), torch.randn(3, 4, 5, 7)
    mix = {t: alphas[t].sqrt() * clean + (1 - alphas[t]).sqrt() * noise for t in (101, 501)}
    velocity = alphas[101].sqrt() * noise - (1 - alphas[101]).sqrt() * clean
    output = velocity if family.predicts_velocity else noise
    torch.testing.assert_close(ddim_step(family, mix[101], output, 101, 501), mix[501], rtol=0, atol=1e-5)


@torch.no_grad()
def test_inversion_is_that_of_diffusers(family):
    batch = batch_of(family)
    scheduler = DDIMInverseScheduler(**SCHEDULE, prediction_type=prediction(family))
    scheduler.set_timesteps(10)
    sample, expected = batch.latents, {}
    for timestep in scheduler.timesteps:
        output = family.predict(sample, timestep.expand(3), batch.condition, batch.image_size)
        sample = expected[int(timestep)] = scheduler.step(output, timestep, sample).prev_sample

    def predict(latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return family.denoise(latents, timesteps, condition, batch.image_size)

    found = invert(batch, ddim_timesteps(10), predict, family)
    assert torch.equal(found.pop(-1), batch.latents)
    assert list(found) == list(expected)
    for timestep, latents in found.items():
        torch.testing.assert_close(latents, expected[timestep], rtol=0, atol=1e-4)
    assert (sample - batch.latents).abs().mean() > 0.1


def test_ddim_reads_on_the_way_up(family):
    batch = batch_of(family)
    log = run(family, batch, mode="ddim", num_steps=4)
    assert log.timesteps == [[level] * 3 for level in ddim_timesteps(4)]
    assert torch.equal(log.latents[0], batch.latents)
    assert family.forwards == 4 * 3


# noise


@pytest.mark.parametrize("timesteps", [(300,), (700, 50, 1)])
def test_noise_reads_once_with_every_noise_at_every_timestep(family, timesteps):
    batch = batch_of(family)
    batch.noise = torch.randn(3, 2, len(timesteps), 4, *SIZE)
    log = run(family, batch, timesteps=timesteps, num_noises=2)
    assert log.needs_output == [False]
    assert log.timesteps == [list(timesteps) * 2 * 3]
    assert family.forwards == 3 * 2 * len(timesteps)
    alphas = family.alphas_cumprod[list(timesteps)][:, None, None, None]
    for row, found in enumerate(log.latents[0].unflatten(0, (3, 2, -1))):
        for own, noise in zip(found, batch.noise[row], strict=True):
            expected = alphas.sqrt() * batch.latents[row] + (1 - alphas).sqrt() * noise
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-6)


def raw_maps(family: TeacherFamily, monkeypatch, **settings) -> Tensor:
    """Maps before they become heat, of two jobs of one shape."""
    import lavender.teachers.diffusion.teacher as module

    kept: list[Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "to_heat", lambda maps: kept.append(maps) or maps / maps.amax())
        Teacher(family.pipeline, ExtractionConfig(grid=GRID, **settings))(pipelines.jobs()[:2])
    return torch.cat(kept)


def test_several_noises_and_timesteps_are_the_mean_of_single_ones(family, monkeypatch):
    several = raw_maps(family, monkeypatch, timesteps=(600, 100), num_noises=3, seed=5)
    single = [
        raw_maps(family, monkeypatch, timesteps=(timestep,), seed=seed) for timestep in (600, 100) for seed in (5, 6, 7)
    ]
    torch.testing.assert_close(several, torch.stack(single).mean(dim=0), rtol=0, atol=1e-6)
    assert (single[0] - single[1]).abs().max() > 1e-4
    assert (single[0] - single[3]).abs().max() > 1e-4


def test_the_noise_is_the_pictures_own():
    """A pure function of content and seed: the same at every timestep, another for each seed and picture."""
    pipeline = pipelines.shared(pipelines.stable_diffusion)
    teacher = Teacher(pipeline, ExtractionConfig(timesteps=(9, 8), num_noises=2, seed=3))
    noise = teacher._noise_of(["ab", "ac", "ab"], (4, 16, 16))
    assert noise.shape == (3, 2, 2, 4, 16, 16)
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(noise[:, :, 0], noise[:, :, 1])
    assert not torch.equal(noise[0, 0], noise[0, 1])
    assert not torch.equal(noise[0], noise[1])
    later = Teacher(pipeline, ExtractionConfig(seed=4))._noise_of(["ab"], (4, 16, 16))
    assert torch.equal(later[0, 0, 0], noise[0, 1, 0])
    assert noise.std().item() == pytest.approx(1, abs=0.05)


# null-text


@torch.no_grad()
def test_without_guidance_and_tuning_it_is_plain_ddim(family):
    batch = batch_of(family)
    log = run(family, batch, **null_text(guidance=1.0, null_text_iterations=0))
    up, down = (
        scheduler(**SCHEDULE, prediction_type=prediction(family)) for scheduler in (DDIMInverseScheduler, DDIMScheduler)
    )
    up.set_timesteps(3)
    down.set_timesteps(3)
    sample = batch.latents
    for timestep in up.timesteps:
        output = family.predict(sample, timestep.expand(3), batch.condition, batch.image_size)
        sample = up.step(output, timestep, sample).prev_sample
    assert log.timesteps == [[int(timestep)] * 3 for timestep in down.timesteps]
    assert log.needs_output == [True] * 3
    for latents, timestep in zip(log.latents, down.timesteps, strict=True):
        torch.testing.assert_close(latents, sample, rtol=0, atol=2e-4)
        output = family.predict(sample, timestep.expand(3), batch.condition, batch.image_size)
        sample = down.step(output, timestep, sample, eta=0).prev_sample


def distances(family: TeacherFamily, batch: Batch, log: Log) -> Tensor:
    """How far the re-denoising is from the inversion's path, (step after the first, row)."""

    def predict(latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return family.predict(latents, timesteps, condition, batch.image_size)

    with torch.no_grad():
        path = invert(batch, ddim_timesteps(3), predict, family)
    return torch.stack(
        [
            (latents - path[timesteps[0]]).square().flatten(1).mean(dim=1)
            for latents, timesteps in zip(log.latents[1:], log.timesteps[1:], strict=True)
        ]
    )


def test_tuning_leads_back_to_the_path(family):
    """With guidance the denoising leaves the path; with more optimisation, less."""
    batch = batch_of(family, pipelines.TEXTS[:1])
    none, some, many = (
        distances(family, batch, run(family, batch, **null_text(guidance=7.5, null_text_iterations=iterations)))
        for iterations in (0, 4, 12)
    )
    assert (none > 1e-5).all()
    assert (some < none).all()
    assert (many < some).all()


def test_rows_do_not_depend_on_each_other(family):
    """Adam divides a gradient by its size, and so makes much of the last digit of a small one: guidance is low."""
    together = run(family, batch_of(family), **null_text(guidance=2.0, null_text_iterations=3))
    for index, text in enumerate(pipelines.TEXTS):
        alone = run(family, batch_of(family, (text,)), **null_text(guidance=2.0, null_text_iterations=3))
        for one, other in zip(together.latents, alone.latents, strict=True):
            torch.testing.assert_close(one[index : index + 1], other, rtol=1e-3, atol=5e-4)


def test_a_row_that_is_near_enough_stops_by_itself(family, monkeypatch):
    """Rows whose guided step is right from the start are left alone while others are tuned."""
    import lavender.teachers.diffusion.denoising as module

    targets = []
    tuned = module._optimize_empty

    def watched(step, empty, target, iterations, index):
        with torch.no_grad():
            target = torch.cat([step(empty)[:1], target[1:]])
        result = tuned(step, empty, target, iterations, index)
        targets.append((empty, result))
        return result

    monkeypatch.setattr(module, "_optimize_empty", watched)
    run(family, batch_of(family), **null_text(num_steps=1, null_text_iterations=4))
    ((before, after),) = targets
    steps = (after - before).abs().flatten(1).amax(dim=1)
    assert steps[0] <= 1.01e-2  # the first step is always made, as in null-text inversion
    assert steps[1:].min() > 1.5e-2


def test_parameters_ask_for_gradients_as_before():
    pipeline = pipelines.fresh(pipelines.stable_diffusion)
    family = family_of(type(pipeline))(pipeline)
    parameters = list(family.backbone.parameters())
    for parameter in parameters[::3]:
        parameter.requires_grad_(False)
    before = [parameter.requires_grad for parameter in parameters]
    run(family, batch_of(family), **null_text(null_text_iterations=1))
    assert [parameter.requires_grad for parameter in parameters] == before
    assert all(parameter.grad is None for parameter in parameters)


def test_parameters_ask_for_gradients_as_before_after_an_exception(monkeypatch):
    pipeline = pipelines.fresh(pipelines.stable_diffusion)
    family = family_of(type(pipeline))(pipeline)
    predict = family.predict
    asking = []

    def fail(latents, timesteps, condition, image_size):
        if condition["states"].requires_grad:
            asking.append(any(parameter.requires_grad for parameter in family.backbone.parameters()))
            raise KeyError("mine")
        return predict(latents, timesteps, condition, image_size)

    monkeypatch.setattr(family, "predict", fail)
    with pytest.raises(KeyError, match="mine"):
        run(family, batch_of(family), **null_text())
    assert asking == [False]
    assert all(parameter.requires_grad for parameter in family.backbone.parameters())


@pytest.mark.parametrize(
    ("settings", "inverted", "tuned"),
    [
        ({"null_text_iterations": 2}, 10, 10),  # the two readings of "5 inversion and 10 diffusion steps"
        ({"inversion_steps": 5, "null_text_iterations": 5}, 5, 5),
        ({"null_text_iterations": 0}, 10, 0),
    ],
)
def test_forwards_are_counted(settings, inverted, tuned, monkeypatch):
    """Per row: the inversion, two per denoising step, three per iteration; no row stops early."""
    import lavender.teachers.diffusion.denoising as module

    calls, original = [], module._optimize_empty
    monkeypatch.setattr(module, "_optimize_empty", lambda *args: calls.append(args[3]) or original(*args))
    pipeline = pipelines.shared(pipelines.stable_diffusion_2)  # so far off that no row stops early
    family = family_of(type(pipeline))(pipeline)
    batch = batch_of(family, pipelines.TEXTS[:2])
    log = run(family, batch, mode="null-text", num_steps=10, guidance=30.0, **settings)
    iterations = settings["null_text_iterations"]
    assert len(log.latents) == 10
    assert len([count for count in calls if count]) == tuned
    assert family.forwards == 2 * (inverted + 10 * 2 + 3 * tuned * iterations)


def test_fewer_inversion_steps_skip_levels(family):
    batch = batch_of(family)
    log = run(family, batch, mode="null-text", num_steps=4, inversion_steps=2, null_text_iterations=1)
    assert log.timesteps == [[level] * 3 for level in (751, 501, 251, 1)]

    def predict(latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return family.predict(latents, timesteps, condition, batch.image_size)

    with torch.no_grad():
        path = invert(batch, [251, 751], predict, family)
    torch.testing.assert_close(log.latents[0], path[751], rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"mode": "ddim"}, null_text(null_text_iterations=1, guidance=2.0)])
def test_maps_of_every_mode_do_not_depend_on_the_batch(family, settings):
    config = ExtractionConfig(**{"grid": GRID} | settings | {"num_steps": 2})
    jobs = pipelines.jobs()
    together = Teacher(family.pipeline, config)(jobs)
    for one, job in zip(together, jobs, strict=True):
        same(Teacher(family.pipeline, config)([job])[0], one)
    noise = Teacher(family.pipeline, ExtractionConfig(grid=GRID))(jobs[:1])[0]
    assert (noise.maps - together[0].maps).abs().max() > 1e-3


def test_null_text_in_half_precision_runs():
    pipeline = pipelines.fresh(pipelines.stable_diffusion)
    pipeline.to(torch.bfloat16)
    (found,) = Teacher(pipeline, ExtractionConfig(**null_text(num_steps=2)))(pipelines.jobs()[:1])
    assert found.maps.isfinite().all()
    assert found.maps.amax(dim=(1, 2)).tolist() == [1] * len(found.words)
