"""Teachers with an MM-DiT: Stable Diffusion 3 and 3.5, whose layers attend to image and text jointly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor, nn

from lavender.teachers.diffusion.base import Condition, Layer, LayerWeights, TeacherFamily


class StableDiffusion3(TeacherFamily):
    """Stable Diffusion 3 and 3.5 without T5, which the model allows: the CLIP encoders' tokens are the words' keys."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusion3Pipeline
    optional_parts: ClassVar[Mapping[str, Any]] = {"text_encoder_3": None, "tokenizer_3": None}

    @property
    def text_width(self) -> int:
        return self.pipeline.transformer.config.joint_attention_dim

    @property
    def backbone(self) -> nn.Module:
        return self.pipeline.transformer

    @property
    def side(self) -> int:
        return self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def unit(self) -> int:
        return self.pipeline.transformer.config.patch_size * self.pipeline.vae_scale_factor

    @property
    def longest(self) -> int:
        """As for every family, but at most the number of position embeddings."""
        return min(super().longest, self.pipeline.transformer.config.pos_embed_max_size * self.unit)

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        # in the place of T5 the pipeline appends zeros to the CLIP tokens; they are keys too
        encoded = self.pipeline.encode_prompt(
            list(texts), None, None, device=self.device, do_classifier_free_guidance=False
        )
        return {"states": encoded[0].to(self.dtype), "pooled": encoded[2].to(self.dtype)}

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition, image_size: tuple[int, int]) -> Tensor:
        return self.pipeline.transformer(
            latents, condition["states"], condition["pooled"], timesteps.to(latents.dtype)
        ).sample

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Rectified flow: x_t = (1 − σ)·x + σ·ε, σ = t / 1000."""
        sigma = (timesteps.float() / 1000)[:, None, None, None]
        return ((1 - sigma) * latents.float() + sigma * noise.float()).to(latents.dtype)

    def layers(self, latent_size: tuple[int, int]) -> list[Layer]:
        patch = self.pipeline.transformer.config.patch_size
        grid = latent_size[0] // patch, latent_size[1] // patch
        blocks = self.pipeline.transformer.transformer_blocks
        return [
            Layer(f"transformer_blocks.{index}.attn", block.attn, grid, joint=True)
            for index, block in enumerate(blocks)
        ]

    def self_attention(self, latent_size: tuple[int, int]) -> list[Layer]:
        return self.layers(latent_size)

    def default_weights(self) -> LayerWeights:
        """Only the block whose attention segments best: block 9 of SD3-medium's 24 (Seg4Diff), scaled to the depth."""
        depth = len(self.pipeline.transformer.transformer_blocks)
        return {"transformer_blocks": 0.0, f"transformer_blocks.{round(9 / 24 * depth)}.": 1.0}
