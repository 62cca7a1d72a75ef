"""The mode ladder: how a picture's latents are brought to where the backbone's attention is read.

`noise` noises once · `ddim` reads during DDIM inversion · `null-text` is the paper's recipe: DDIM inversion,
null-text optimisation, guided re-denoising. Each gives the mean over its passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lavender.config import ExtractionConfig
from lavender.teachers.diffusion.base import Condition, TeacherFamily

Read = Callable[[Tensor, Tensor, Condition, bool], Tensor | None]
"""One forward under capture: latents, timesteps (row,), condition, whether the prediction is wanted."""


@dataclass
class Batch:
    """Rows of latents with their texts.

    Attributes:
        latents: (row, channel, height, width), clean.
        condition: of the rows' texts.
        image_size: (height, width) in pixels of what the latents encode.
        noise: (row, noise, timestep, channel, height, width), of `mode="noise"`.
        empty: the condition of the empty text; of `mode="null-text"`.
        led_back: like `latents`, what the way back of `mode="null-text"` ends with; equal to them if it converged.
    """

    latents: Tensor
    condition: Condition
    image_size: tuple[int, int]
    noise: Tensor | None = None
    empty: Condition | None = None
    led_back: Tensor | None = None


def levels(num_steps: int) -> list[int]:
    """Timesteps of DDIM with "leading" spacing and Stable Diffusion's offset of 1, rising: 1, 101, … 901 for 10."""
    return [min(step * (1000 // num_steps) + 1, 999) for step in range(num_steps)]


def ddim_step(family: TeacherFamily, sample: Tensor, output: Tensor, start: int, end: int) -> Tensor:
    """DDIM's deterministic step of a sample from one noise level to another, up or down (Song et al. 2021, Eq. 12).

    Args:
        output: the backbone's prediction.
        start, end: timesteps whose ᾱ the sample has and gets; below 0 stands for the cleanest level.
    """
    alphas = family.alphas_cumprod.to(sample.device)
    here, there = alphas[max(start, 0)], alphas[max(end, 0)]
    sample, output = sample.float(), output.float()
    if family.predicts_velocity:
        clean = here.sqrt() * sample - (1 - here).sqrt() * output
        epsilon = here.sqrt() * output + (1 - here).sqrt() * sample
    else:
        clean, epsilon = (sample - (1 - here).sqrt() * output) / here.sqrt(), output
    return there.sqrt() * clean + (1 - there).sqrt() * epsilon


def read_maps(family: TeacherFamily, config: ExtractionConfig, batch: Batch, read: Read) -> None:
    """Bring a batch's latents through the mode; each capturing forward goes through `read`.

    Gradients are off, but for null-text's own.
    """
    if config.mode == "noise":
        _noise(family, config, batch, read)
    elif config.mode == "ddim":
        invert(config, batch, levels(config.num_steps), lambda *given: read(*given, True), family)
    else:
        _null_text(family, config, batch, read)


def _noise(family: TeacherFamily, config: ExtractionConfig, batch: Batch, read: Read) -> None:
    """One forward of every row with every noise at every timestep, as one batch."""
    assert batch.noise is not None
    repeats = batch.noise.shape[1] * batch.noise.shape[2]
    noise = batch.noise.flatten(1, 2).flatten(0, 1)
    timesteps = torch.tensor(config.timesteps, device=batch.latents.device).repeat(len(noise) // len(config.timesteps))
    clean = batch.latents.repeat_interleave(repeats, dim=0)
    condition = {name: one.repeat_interleave(repeats, dim=0) for name, one in batch.condition.items()}
    read(family.add_noise(clean, noise.to(clean), timesteps), timesteps, condition, False)


def invert(
    config: ExtractionConfig,
    batch: Batch,
    visited: list[int],
    predict: Callable[[Tensor, Tensor, Condition], Tensor | None],
    family: TeacherFamily,
) -> dict[int, Tensor]:
    """DDIM inversion with the text and no guidance: the latents at each visited timestep, and at -1 the clean ones."""
    sample, before = batch.latents, -1
    trajectory = {before: sample.float()}
    for timestep in visited:
        output = predict(sample, _all_at(timestep, sample), batch.condition)
        assert output is not None
        trajectory[timestep] = ddim_step(family, sample, output, before, timestep)
        sample, before = trajectory[timestep].to(batch.latents.dtype), timestep
    return trajectory


def _null_text(family: TeacherFamily, config: ExtractionConfig, batch: Batch, read: Read) -> None:
    """Invert, then denoise with guidance, the empty text's states tuned so that the path leads back (Mokady et al.).

    With fewer `inversion_steps` than `num_steps` only some timesteps have a latent to lead back to; between them
    the states stay as they are.
    """
    assert batch.empty is not None
    every = levels(config.num_steps)
    stride = config.num_steps // (config.inversion_steps or config.num_steps)

    def plain(latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return family.denoise(latents, timesteps, condition, batch.image_size)

    path = invert(config, batch, every[stride - 1 :: stride], plain, family)
    sample = path[every[-1]].to(batch.latents.dtype)
    empty = batch.empty["states"].float().expand(len(sample), -1, -1).clone()
    for index, timestep in enumerate(reversed(every)):
        now, after = _all_at(timestep, sample), ([-1, *every])[len(every) - 1 - index]
        conditional = read(sample, now, batch.condition, True)
        assert conditional is not None
        step = _GuidedStep(family, config, batch, sample, conditional, timestep, after)
        if after in path:
            empty = _tuned(step, empty, path[after], config.null_text_iterations, index)
        sample = step(empty).to(batch.latents.dtype)
    batch.led_back = sample


@dataclass
class _GuidedStep:
    """One denoising step with guidance, as a function of the empty text's states (row, token, width)."""

    family: TeacherFamily
    config: ExtractionConfig
    batch: Batch
    sample: Tensor
    conditional: Tensor
    timestep: int
    after: int

    def __call__(self, empty: Tensor) -> Tensor:
        assert self.batch.empty is not None
        condition = {name: one.expand(len(self.sample), *one.shape[1:]) for name, one in self.batch.empty.items()}
        condition["states"] = empty.to(self.sample.dtype)
        now = _all_at(self.timestep, self.sample)
        plain = self.family.denoise(self.sample, now, condition, self.batch.image_size)
        guided = plain.float() + self.config.guidance * (self.conditional.float() - plain.float())
        return ddim_step(self.family, self.sample, guided, self.timestep, self.after)


def _tuned(step: _GuidedStep, empty: Tensor, target: Tensor, iterations: int, index: int) -> Tensor:
    """The states after Adam on ‖step(states) − target‖²; each row stops by itself, so rows stay independent."""
    # rate and threshold by the step's index are those of null-text inversion, made for 50 steps
    with torch.enable_grad(), _frozen(step.family.backbone):
        states = empty.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([states], lr=1e-2 * (1 - index / 100))
        active = torch.ones(len(states), dtype=torch.bool, device=states.device)
        for _ in range(iterations):
            losses = (step(states) - target).square().flatten(1).mean(dim=1)
            step.family.forwards += 2 * len(states)
            (states.grad,) = torch.autograd.grad(losses.sum(), [states])
            before = states.detach().clone()
            optimizer.step()
            with torch.no_grad():
                states.copy_(torch.where(active[:, None, None], states, before))
            active = active & (losses.detach() >= 1e-5 + index * 2e-5)
            if not active.any():
                break
    return states.detach()


def _all_at(timestep: int, sample: Tensor) -> Tensor:
    return torch.full((len(sample),), timestep, device=sample.device)


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient, so that autograd keeps nothing for them."""
    asking = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
