"""Teachers with Qwen-Image: joint attention with rotary positions, and words carried by Qwen2.5-VL in a template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, QwenImagePipeline
from torch import Tensor

from lavender.teachers.diffusion.base import Condition, Layer, rectified_flow
from lavender.teachers.diffusion.text_templates import offsets_in_template
from lavender.teachers.diffusion.transformer import PackedFamily

KEYS = 512
"""Text keys, the end of the template included."""


class QwenImage(PackedFamily):
    """Qwen-Image. The text stands in the pipeline's template, whose first tokens are dropped; padding is masked.

    Qwen2.5-VL is causal: a word's token knows the template and the words before it.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = QwenImagePipeline
    takes_tiny_vae: ClassVar[bool] = False

    @property
    def _template(self) -> tuple[str, str]:
        """What stands before and after a text."""
        before, after = self.pipeline.prompt_template_encode.split("{}")
        return before, after

    @property
    def _dropped(self) -> int:
        """How many tokens of the template are no keys."""
        return self.pipeline.prompt_template_encode_start_idx

    @property
    def max_tokens(self) -> int:
        template = self.tokenizer("".join(self._template))["input_ids"]
        return KEYS + self._dropped - len(template) + 2

    @property
    def word_keys(self) -> int:
        return KEYS

    @property
    def text_width(self) -> int:
        return self.pipeline.transformer.config.joint_attention_dim

    @property
    def latent_channels(self) -> int:
        return self.pipeline.vae.config.z_dim

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        before, after = self._template
        tokens = self.tokenizer(
            [before + text + after for text in texts],
            padding=True,
            padding_side="right",
            max_length=KEYS + self._dropped,
            truncation=True,
            return_tensors="pt",
        ).to(self.text_encoder.device)
        mask = tokens["attention_mask"]
        output = self.text_encoder(input_ids=tokens["input_ids"], attention_mask=mask, output_hidden_states=True)
        states, mask = output.hidden_states[-1][:, self._dropped :], mask[:, self._dropped :]
        padding = KEYS - mask.shape[1]
        states = F.pad((states * mask[..., None]).to(self.dtype), (0, 0, 0, padding))
        return {"states": states, "mask": F.pad(mask, (0, padding)).bool()}

    def token_offsets(self, text: str) -> list[tuple[int, int]]:
        before, after = self._template
        return offsets_in_template(self.tokenizer, before, text, after, KEYS + self._dropped)[self._dropped :]

    def scaled_latents(self, pixels: Tensor) -> Tensor:
        """Latents of a video of one frame, normalised per channel."""
        vae = self.pipeline.vae
        latents = vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0].float()
        mean, std = (
            torch.tensor(numbers, device=latents.device)[:, None, None]
            for numbers in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (latents - mean) / std

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition, image_size: tuple[int, int]) -> Tensor:
        rows, channels, height, width = latents.shape
        pipeline: Any = self.pipeline
        packed = pipeline.transformer(
            hidden_states=pipeline._pack_latents(latents, rows, channels, height, width),
            timestep=(timesteps.float() / 1000).to(latents.dtype),
            encoder_hidden_states=condition["states"],
            encoder_hidden_states_mask=condition["mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * rows,
        ).sample
        return pipeline._unpack_latents(packed, *image_size, pipeline.vae_scale_factor)[:, :, 0]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return rectified_flow(latents, noise, timesteps)

    def layers(self, latent_size: tuple[int, int]) -> list[Layer]:
        grid = latent_size[0] // 2, latent_size[1] // 2
        return [
            Layer(f"transformer_blocks.{index}.attn", block.attn, grid, joint=True, text_first=True)
            for index, block in enumerate(self.pipeline.transformer.transformer_blocks)
        ]

    def self_attention(self, latent_size: tuple[int, int]) -> list[Layer]:
        return self.layers(latent_size)
