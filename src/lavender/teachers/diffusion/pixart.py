"""Teachers with PixArt-Σ: a transformer with ordinary cross-attention on T5's tokens, trained as DDPM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import DDIMScheduler, DiffusionPipeline, PixArtSigmaPipeline
from torch import Tensor

from lavender.teachers.diffusion import t5
from lavender.teachers.diffusion.base import Condition, Layer
from lavender.teachers.diffusion.stable_diffusion import check_scheduler
from lavender.teachers.diffusion.text_templates import lowered, stripped_offsets
from lavender.teachers.diffusion.transformer import TransformerFamily


class PixArtSigma(TransformerFamily):
    """PixArt-Σ. Its texts are in lower case, of at most 300 tokens; padding is masked. It predicts ε."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = PixArtSigmaPipeline

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        # DDIM's defaults of clip_sample and set_alpha_to_one are wrong for latents
        self._scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False
        )

    def check_parts(self) -> None:
        super().check_parts()
        check_scheduler(self.pipeline, ("epsilon",))

    @property
    def max_tokens(self) -> int:
        return min(300, self.tokenizer.model_max_length)

    @property
    def text_width(self) -> int:
        return self.pipeline.transformer.config.caption_channels

    @property
    def alphas_cumprod(self) -> Tensor:
        return self._scheduler.alphas_cumprod

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        prepared = [lowered(text).strip() for text in texts]
        states, mask = t5.encode(self.tokenizer, self.text_encoder, prepared, self.max_tokens, masked=True)
        return {"states": states.to(self.dtype), "mask": mask}

    def as_encoded(self, text: str) -> str:
        return lowered(text)

    def token_offsets(self, text: str) -> list[tuple[int, int]]:
        return stripped_offsets(self.tokenizer, "", lowered(text), self.max_tokens)

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition, image_size: tuple[int, int]) -> Tensor:
        output = self.pipeline.transformer(
            latents,
            encoder_hidden_states=condition["states"],
            encoder_attention_mask=condition["mask"],
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        # further channels are the learned variance
        return output[:, : latents.shape[1]]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        # the scheduler computes in the type of the latents: in bfloat16 the first steps would have no noise
        return self._scheduler.add_noise(latents.float(), noise.float(), timesteps).to(latents.dtype)

    def layers(self, latent_size: tuple[int, int]) -> list[Layer]:
        return self._attentions(latent_size, "attn2")

    def self_attention(self, latent_size: tuple[int, int]) -> list[Layer]:
        return self._attentions(latent_size, "attn1")

    def _attentions(self, latent_size: tuple[int, int], name: str) -> list[Layer]:
        patch = self.pipeline.transformer.config.patch_size
        grid = latent_size[0] // patch, latent_size[1] // patch
        return [
            Layer(f"transformer_blocks.{index}.{name}", getattr(block, name), grid)
            for index, block in enumerate(self.pipeline.transformer.transformer_blocks)
        ]
