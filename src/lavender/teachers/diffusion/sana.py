"""Teachers with Sana: linear self-attention, ordinary cross-attention, and words carried by Gemma behind a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import ClassVar

from diffusers import DiffusionPipeline, SanaPipeline
from torch import Tensor

from lavender.errors import ConfigError
from lavender.teachers.diffusion.base import Condition, Layer, rectified_flow
from lavender.teachers.diffusion.text_templates import lowered, stripped_offsets
from lavender.teachers.diffusion.transformer import TransformerFamily

INSTRUCTION = "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
"""What the pipeline puts before each text by default."""
KEYS = 300
"""Text keys: the start token, the last token of the instruction, and 298 of the text."""


class Sana(TransformerFamily):
    """Sana. The text is in lower case behind the pipeline's instruction, whose tokens are dropped again.

    Gemma is causal: a word's token knows the instruction and the words before it. Padding is masked.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = SanaPipeline
    takes_tiny_vae: ClassVar[bool] = False

    @property
    def max_tokens(self) -> int:
        return KEYS

    @property
    def text_width(self) -> int:
        return self.pipeline.transformer.config.caption_channels

    @property
    def _length(self) -> int:
        """Tokens of instruction and text together."""
        return len(self.tokenizer.encode(INSTRUCTION)) + KEYS - 2

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        tokens = self.tokenizer(
            [INSTRUCTION + lowered(text).strip() for text in texts],
            padding="max_length",
            padding_side="right",
            max_length=self._length,
            truncation=True,
            return_tensors="pt",
        ).to(self.text_encoder.device)
        states = self.text_encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"])[0]
        kept = [0, *range(1 - KEYS, 0)]
        return {"states": states[:, kept].to(self.dtype), "mask": tokens["attention_mask"][:, kept]}

    def as_encoded(self, text: str) -> str:
        return lowered(text)

    def token_offsets(self, text: str) -> list[tuple[int, int]]:
        offsets = stripped_offsets(self.tokenizer, INSTRUCTION, lowered(text), self._length)
        return [offsets[0], *offsets[1 - KEYS :]]

    def scaled_latents(self, pixels: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return vae.encode(pixels).latent.float() * vae.config.scaling_factor

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition, image_size: tuple[int, int]) -> Tensor:
        output = self.pipeline.transformer(
            latents,
            encoder_hidden_states=condition["states"],
            encoder_attention_mask=condition["mask"],
            timestep=timesteps.to(latents.dtype) * self.pipeline.transformer.config.timestep_scale,
        ).sample
        # further channels are the learned variance
        return output[:, : latents.shape[1]]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return rectified_flow(latents, noise, timesteps)

    def layers(self, latent_size: tuple[int, int]) -> list[Layer]:
        patch = self.pipeline.transformer.config.patch_size
        grid = latent_size[0] // patch, latent_size[1] // patch
        return [
            Layer(f"transformer_blocks.{index}.attn2", block.attn2, grid)
            for index, block in enumerate(self.pipeline.transformer.transformer_blocks)
        ]

    def self_attention(self, latent_size: tuple[int, int]) -> list[Layer]:
        """Linear attention has no softmax along which a map could be spread.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("refine with a SanaPipeline", "a model whose self-attention has a softmax", "use refine=0")
