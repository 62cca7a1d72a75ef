"""The three modes: at which noise levels the backbone runs while its attention is read.

`noise` adds noise once and runs one forward. `ddim` reads during DDIM inversion. `null-text` is the paper's recipe:
DDIM inversion, null-text optimisation, guided denoising. The maps of a mode are the mean over its forwards.
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
"""One forward under capture: latents, timesteps (row,), condition, whether the prediction is needed."""


@dataclass
class Batch:
    """Rows of latents with their texts.

    Attributes:
        latents: (row, channel, height, width), clean.
        condition: the condition of the rows' texts.
        image_size: (height, width) in pixels of what the latents encode.
        noise: (row, noise, timestep, channel, height, width); only of `mode="noise"`.
        empty: the condition of the empty text; only of `mode="null-text"`.
        reconstruction: like `latents`, what the denoising of `mode="null-text"` ended with. It equals `latents` if the
            optimisation converged.
    """

    latents: Tensor
    condition: Condition
    image_size: tuple[int, int]
    noise: Tensor | None = None
    empty: Condition | None = None
    reconstruction: Tensor | None = None


def ddim_timesteps(num_steps: int) -> list[int]:
    """Rising timesteps of DDIM, "leading" spacing, with Stable Diffusion's offset of 1: 1, 101, … 901 for 10 steps."""
    return [min(step * (1000 // num_steps) + 1, 999) for step in range(num_steps)]


def ddim_step(family: TeacherFamily, sample: Tensor, output: Tensor, start: int, end: int) -> Tensor:
    """DDIM's deterministic step from one noise level to another, up or down (Song et al. 2021, Eq. 12).

    Args:
        sample: (row, channel, height, width), at the level `start`.
        output: the backbone's prediction.
        start, end: timesteps; below 0 stands for the cleanest level.

    Returns:
        The sample at the level `end`, float32.
    """
    alphas = family.alphas_cumprod.to(sample.device)
    alpha_start, alpha_end = alphas[max(start, 0)], alphas[max(end, 0)]
    sample, output = sample.float(), output.float()
    if family.predicts_velocity:
        clean = alpha_start.sqrt() * sample - (1 - alpha_start).sqrt() * output
        epsilon = alpha_start.sqrt() * output + (1 - alpha_start).sqrt() * sample
    else:
        clean, epsilon = (sample - (1 - alpha_start).sqrt() * output) / alpha_start.sqrt(), output
    return alpha_end.sqrt() * clean + (1 - alpha_end).sqrt() * epsilon


def read_maps(family: TeacherFamily, config: ExtractionConfig, batch: Batch, read: Read) -> None:
    """Run the forwards of `config.mode` on a batch; each forward whose attention is read goes through `read`.

    The caller turns gradients off; null-text turns them on for its own optimisation.
    """
    if config.mode == "noise":
        _read_noised(family, config, batch, read)
    elif config.mode == "ddim":
        invert(batch, ddim_timesteps(config.num_steps), lambda *inputs: read(*inputs, True), family)
    else:
        _read_null_text(family, config, batch, read)


def _read_noised(family: TeacherFamily, config: ExtractionConfig, batch: Batch, read: Read) -> None:
    """One forward of every row with every noise at every timestep, as one batch."""
    assert batch.noise is not None
    repeats = batch.noise.shape[1] * batch.noise.shape[2]
    noise = batch.noise.flatten(1, 2).flatten(0, 1)
    timesteps = torch.tensor(config.timesteps, device=batch.latents.device).repeat(len(noise) // len(config.timesteps))
    clean = batch.latents.repeat_interleave(repeats, dim=0)
    condition = {name: tensor.repeat_interleave(repeats, dim=0) for name, tensor in batch.condition.items()}
    read(family.add_noise(clean, noise.to(clean), timesteps), timesteps, condition, False)


def invert(
    batch: Batch,
    timesteps: list[int],
    predict: Callable[[Tensor, Tensor, Condition], Tensor | None],
    family: TeacherFamily,
) -> dict[int, Tensor]:
    """DDIM inversion with the text and without guidance.

    Args:
        timesteps: the levels to visit, rising.
        predict: a forward of the backbone: latents, timesteps (row,), condition.

    Returns:
        The latents at each visited timestep, float32; the clean ones at -1.
    """
    sample, before = batch.latents, -1
    trajectory = {before: sample.float()}
    for timestep in timesteps:
        output = predict(sample, _same_for_rows(timestep, sample), batch.condition)
        assert output is not None
        trajectory[timestep] = ddim_step(family, sample, output, before, timestep)
        sample, before = trajectory[timestep].to(batch.latents.dtype), timestep
    return trajectory


def _read_null_text(family: TeacherFamily, config: ExtractionConfig, batch: Batch, read: Read) -> None:
    """Invert, then denoise with guidance; the empty text's states are optimised to return along the inversion's path.

    This is null-text inversion (Mokady et al. 2023). With fewer `inversion_steps` than `num_steps` only some timesteps
    have inverted latents as a target; at the others the states stay as they are.
    """
    assert batch.empty is not None
    every = ddim_timesteps(config.num_steps)
    stride = config.num_steps // (config.inversion_steps or config.num_steps)

    def predict(latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return family.denoise(latents, timesteps, condition, batch.image_size)

    path = invert(batch, every[stride - 1 :: stride], predict, family)
    sample = path[every[-1]].to(batch.latents.dtype)
    empty = batch.empty["states"].float().expand(len(sample), -1, -1).clone()
    for index, timestep in enumerate(reversed(every)):
        now, after = _same_for_rows(timestep, sample), ([-1, *every])[len(every) - 1 - index]
        conditional = read(sample, now, batch.condition, True)
        assert conditional is not None
        step = _GuidedStep(family, config, batch, sample, conditional, timestep, after)
        if after in path:
            empty = _optimize_empty(step, empty, path[after], config.null_text_iterations, index)
        sample = step(empty).to(batch.latents.dtype)
    batch.reconstruction = sample


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
        rows = len(self.sample)
        condition = {name: tensor.expand(rows, *tensor.shape[1:]) for name, tensor in self.batch.empty.items()}
        condition["states"] = empty.to(self.sample.dtype)
        now = _same_for_rows(self.timestep, self.sample)
        unconditional = self.family.denoise(self.sample, now, condition, self.batch.image_size).float()
        guided = unconditional + self.config.guidance * (self.conditional.float() - unconditional)
        return ddim_step(self.family, self.sample, guided, self.timestep, self.after)


def _optimize_empty(step: _GuidedStep, empty: Tensor, target: Tensor, iterations: int, index: int) -> Tensor:
    """The states after Adam on ‖step(states) − target‖². Each row stops by itself, so rows stay independent."""
    # null-text inversion's learning rate and threshold depend on the step's index, and were chosen for 50 steps
    with torch.enable_grad(), _frozen(step.family.backbone):
        states = empty.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([states], lr=1e-2 * (1 - index / 100))
        active = torch.ones(len(states), dtype=torch.bool, device=states.device)
        for _ in range(iterations):
            losses = (step(states) - target).square().flatten(1).mean(dim=1)
            step.family.forwards += 2 * len(states)
            # the gradient of a mean over all numbers would vanish in float16
            scale = target[0].numel()
            (gradient,) = torch.autograd.grad(losses.sum() * scale, [states])
            states.grad = gradient / scale
            before = states.detach().clone()
            optimizer.step()
            with torch.no_grad():
                states.copy_(torch.where(active[:, None, None], states, before))
            active = active & (losses.detach() >= 1e-5 + index * 2e-5)
            if not active.any():
                break
    return states.detach()


def _same_for_rows(timestep: int, sample: Tensor) -> Tensor:
    """The timestep of every row of a sample: (row,)."""
    return torch.full((len(sample),), timestep, device=sample.device)


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Inside, no parameter requires a gradient, so that autograd stores nothing for them."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
