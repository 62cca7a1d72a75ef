"""Teachers with Flux 1: joint attention with rotary positions, text first, and words carried by T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import Tensor

from lavender.teachers.diffusion import t5
from lavender.teachers.diffusion.base import Condition, Layer, LayerWeights, rectified_flow
from lavender.teachers.diffusion.transformer import PackedFamily

GUIDANCE = 1.0
"""The guidance that a distilled model is told: 1 asks for the prediction without guidance."""


class Flux(PackedFamily):
    """Flux 1, both kinds: with guidance distilled into it ("dev", 512 text tokens) and without ("schnell", 256).

    T5's tokens are the text's keys. CLIP gives one vector for the whole text, of its first 77 tokens.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = FluxPipeline
    optional_parts: ClassVar[Mapping[str, Any]] = {"feature_extractor": None, "image_encoder": None}

    @property
    def tokenizer(self) -> Any:
        return self.pipeline.tokenizer_2

    @property
    def text_encoder(self) -> Any:
        return self.pipeline.text_encoder_2

    @property
    def max_tokens(self) -> int:
        trained = 512 if self.pipeline.transformer.config.guidance_embeds else 256
        return min(trained, self.tokenizer.model_max_length)

    @property
    def text_width(self) -> int:
        return self.pipeline.transformer.config.joint_attention_dim

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        states, _ = t5.encode(self.tokenizer, self.text_encoder, texts, self.max_tokens, masked=False)
        clip = self.pipeline.text_encoder
        tokens = self.pipeline.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.pipeline.tokenizer_max_length,
            truncation=True,
            return_tensors="pt",
        )
        pooled = clip(tokens["input_ids"].to(clip.device)).pooler_output
        return {"states": states.to(self.dtype), "pooled": pooled.to(self.dtype)}

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition, image_size: tuple[int, int]) -> Tensor:
        rows, channels, height, width = latents.shape
        pipeline: Any = self.pipeline
        options: dict[str, Any] = {"device": latents.device, "dtype": latents.dtype}
        distilled = pipeline.transformer.config.guidance_embeds
        packed = pipeline.transformer(
            hidden_states=pipeline._pack_latents(latents, rows, channels, height, width),
            timestep=(timesteps.float() / 1000).to(latents.dtype),
            guidance=torch.full((rows,), GUIDANCE, device=latents.device) if distilled else None,
            pooled_projections=condition["pooled"],
            encoder_hidden_states=condition["states"],
            txt_ids=torch.zeros(condition["states"].shape[1], 3, **options),
            img_ids=pipeline._prepare_latent_image_ids(rows, height // 2, width // 2, **options),
        ).sample
        return pipeline._unpack_latents(packed, *image_size, pipeline.vae_scale_factor)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return rectified_flow(latents, noise, timesteps)

    def layers(self, latent_size: tuple[int, int]) -> list[Layer]:
        """The double-stream blocks, then the single-stream blocks."""
        grid = latent_size[0] // 2, latent_size[1] // 2
        return [
            Layer(f"{kind}.{index}.attn", block.attn, grid, joint=True, text_first=True)
            for kind in ("transformer_blocks", "single_transformer_blocks")
            for index, block in enumerate(getattr(self.backbone, kind))
        ]

    def self_attention(self, latent_size: tuple[int, int]) -> list[Layer]:
        return self.layers(latent_size)

    def concept_layers(self, latent_size: tuple[int, int]) -> list[Layer]:
        """The double-stream blocks."""
        blocks = self.pipeline.transformer.transformer_blocks
        attentions = self.layers(latent_size)[: len(blocks)]
        return [replace(layer, module=block) for layer, block in zip(attentions, blocks, strict=True)]

    def default_weights(self) -> LayerWeights:
        """The second half of the double-stream blocks, where ConceptAttention finds the best maps."""
        depth = len(self.pipeline.transformer.transformer_blocks)
        first_half = {f"transformer_blocks.{index}.": 0.0 for index in range(depth // 2)}
        return {"single_transformer_blocks": 0.0, **first_half}
