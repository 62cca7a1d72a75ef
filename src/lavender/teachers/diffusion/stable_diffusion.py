"""Teachers with a UNet: Stable Diffusion 1.x and 2.x, and Stable Diffusion XL."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from lavender.errors import CaptureError, ModelError
from lavender.teachers.diffusion.base import Condition, Layer, TeacherFamily

_BLOCK = re.compile(r"(down_blocks|mid_block|up_blocks)\.?(\d*)")


def check_scheduler(pipeline: Any, prediction_types: Sequence[str]) -> None:
    """Check that a pipeline was trained as DDPM, on a schedule of betas, and predicts one of these.

    Raises:
        ModelError: it was trained on another kind of noise, or predicts something else.
    """
    name, scheduler = type(pipeline.scheduler).__name__, pipeline.scheduler
    if not hasattr(scheduler, "alphas_cumprod"):
        got, expected = f"the scheduler {name}", "a scheduler on betas, such as DDIM's or Euler's"
    elif (kind := scheduler.config.get("prediction_type", "epsilon")) not in prediction_types:
        got, expected = f"prediction_type {kind!r}", " or ".join(map(repr, prediction_types))
    else:
        return
    raise ModelError(f"{got} in {pipeline.name_or_path}", expected, "use a teacher that was trained on such noise")


class StableDiffusion(TeacherFamily):
    """Stable Diffusion 1.x (the paper uses 1.4) and 2.x, with ε- or v-prediction."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    optional_parts: ClassVar[Mapping[str, Any]] = {
        "safety_checker": None,
        "requires_safety_checker": False,
        "feature_extractor": None,
        "image_encoder": None,
    }
    largest_layer: ClassVar[int | None] = 32

    def __init__(self, pipeline):
        super().__init__(pipeline)
        # DDIM's defaults of clip_sample and set_alpha_to_one are wrong for latents
        self._scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False
        )

    def check_parts(self) -> None:
        super().check_parts()
        check_scheduler(self.pipeline, ("epsilon", "v_prediction"))
        steps = self.alphas_cumprod
        in_order = (steps[:-1] > 0).all() and (steps >= 0).all() and (steps <= 1).all()  # a NaN fails a comparison
        if len(steps) != 1000 or not in_order:  # the last ᾱ may be 0: zero terminal SNR
            raise ModelError(
                f"a noise schedule of {len(steps)} steps, ᾱ from {steps.max():.3g} to {steps.min():.3g}, in "
                f"{self.pipeline.name_or_path}",
                "1000 steps between 1 and 0",
                "download scheduler_config.json again",
            )

    @property
    def text_width(self) -> int:
        return self.pipeline.unet.config.cross_attention_dim

    @property
    def backbone(self) -> nn.Module:
        return self.pipeline.unet

    @property
    def side(self) -> int:
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def unit(self) -> int:
        return self.pipeline.vae_scale_factor * 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)

    @property
    def alphas_cumprod(self) -> Tensor:
        return self._scheduler.alphas_cumprod

    @property
    def predicts_velocity(self) -> bool:
        return self._scheduler.config.prediction_type == "v_prediction"

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        states, _ = self.pipeline.encode_prompt(list(texts), self.device, 1, do_classifier_free_guidance=False)
        return {"states": states.to(self.dtype)}

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition, image_size: tuple[int, int]) -> Tensor:
        return self.pipeline.unet(latents, timesteps, condition["states"]).sample

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        # the scheduler computes in the type of the latents: in bfloat16 the first steps would have no noise
        return self._scheduler.add_noise(latents.float(), noise.float(), timesteps).to(latents.dtype)

    def layers(self, latent_size: tuple[int, int]) -> list[Layer]:
        layers = self._attentions(latent_size, cross=True)
        if not layers:
            raise CaptureError(
                f"a {type(self.backbone).__name__} without cross-attention",
                "a text-conditioned UNet",
                "choose another teacher",
            )
        return layers

    def self_attention(self, latent_size: tuple[int, int]) -> list[Layer]:
        return self._attentions(latent_size, cross=False)

    def _attentions(self, latent_size: tuple[int, int], cross: bool) -> list[Layer]:
        """The cross-attention or the self-attention layers, in the order in which they run."""
        layers = [
            Layer(name, module, self._grid(name, latent_size))
            for name, module in self.backbone.named_modules()
            if isinstance(module, Attention) and module.is_cross_attention == cross
        ]
        return sorted(layers, key=lambda layer: self._block_order(layer.name))  # stable: keeps the order in a block

    @staticmethod
    def _block_order(name: str) -> tuple[int, int]:
        """Sorts layers by when they run: down blocks, the middle, up blocks (`named_modules` has the middle last)."""
        kind, index = _block_of(name)
        return ("down_blocks", "mid_block", "up_blocks").index(kind), index

    def _grid(self, name: str, latent_size: tuple[int, int]) -> tuple[int, int]:
        """(rows, cols) of a layer: each level of the UNet halves the latents' size, rounding up."""
        kind, index = _block_of(name)
        deepest = len(self.pipeline.unet.config.block_out_channels) - 1
        level = {"down_blocks": index, "mid_block": deepest, "up_blocks": deepest - index}[kind]
        rows, cols = latent_size
        for _ in range(level):
            rows, cols = (rows + 1) // 2, (cols + 1) // 2
        return rows, cols


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: two concatenated text encoders, and the picture's size as a condition."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionXLPipeline
    optional_parts: ClassVar[Mapping[str, Any]] = {
        "add_watermarker": False,
        "feature_extractor": None,
        "image_encoder": None,
    }

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        encoded = self.pipeline.encode_prompt(list(texts), device=self.device, do_classifier_free_guidance=False)
        return {"states": encoded[0].to(self.dtype), "pooled": encoded[2].to(self.dtype)}

    def empty_condition(self) -> Condition:
        empty = self.encode_texts([""])
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return empty
        return {name: torch.zeros_like(tensor) for name, tensor in empty.items()}

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition, image_size: tuple[int, int]) -> Tensor:
        # original size, the crop's top left corner (no crop), target size
        sizes = torch.tensor([*image_size, 0, 0, *image_size], dtype=self.dtype, device=self.device)
        added = {"text_embeds": condition["pooled"], "time_ids": sizes.expand(len(latents), -1)}
        return self.pipeline.unet(latents, timesteps, condition["states"], added_cond_kwargs=added).sample


def _block_of(name: str) -> tuple[str, int]:
    """The kind and index of the block that a layer is in."""
    match = _BLOCK.match(name)
    if match is None:
        raise CaptureError(f"the layer {name!r}", "a layer in down_blocks, mid_block or up_blocks", "report this UNet")
    return match[1], int(match[2] or 0)
