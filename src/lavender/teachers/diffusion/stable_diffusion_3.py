"""Teachers with an MM-DiT: Stable Diffusion 3 and 3.5, whose layers attend to image and text jointly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor

from lavender.errors import ConfigError, ModelError, UnsupportedModelError
from lavender.teachers.diffusion import t5
from lavender.teachers.diffusion.base import Condition, Layer, LayerWeights, rectified_flow
from lavender.teachers.diffusion.transformer import TransformerFamily

T5_TOKENS = 256
"""Keys of T5, or of the zeros in its place."""


class StableDiffusion3(TransformerFamily):
    """Stable Diffusion 3 and 3.5.

    The tokens of the two CLIP encoders are the words' keys, and behind them those of T5 with `ExtractionConfig.t5`. A
    word is then the mean over its tokens of both kinds. The model allows to leave T5 out; its keys are then zeros.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusion3Pipeline
    optional_parts: ClassVar[Mapping[str, Any]] = {
        "text_encoder_3": None,
        "tokenizer_3": None,
        "feature_extractor": None,
        "image_encoder": None,
    }
    t5_parts: ClassVar[tuple[str, ...]] = ("text_encoder_3", "tokenizer_3")

    def check_parts(self) -> None:
        encoder, tokenizer = (getattr(self.pipeline, part) for part in self.t5_parts)
        if (encoder is None) != (tokenizer is None):
            got = "one of text_encoder_3 and tokenizer_3 without the other"
            raise ModelError(got, "both, or none", "load both, or set both to None")
        super().check_parts()

    def check_t5(self, wanted: bool) -> None:
        found = self.pipeline.text_encoder_3 is not None
        if wanted != found:
            raise ConfigError(
                f"t5={wanted} with a pipeline that has {'a' if found else 'no'} T5",
                "the setting that says what the pipeline has",
                f"set t5={found}, or {'leave out' if found else 'load'} text_encoder_3 and tokenizer_3",
            )
        if found and not self.pipeline.tokenizer_3.is_fast:
            raise UnsupportedModelError(
                f"the slow tokenizer {type(self.pipeline.tokenizer_3).__name__}",
                "a fast tokenizer, which knows where in the text a token stands",
                "convert it, and save it beside the pipeline",
            )

    @property
    def word_keys(self) -> int:
        return self.max_tokens + (T5_TOKENS if self.pipeline.text_encoder_3 is not None else 0)

    @property
    def text_width(self) -> int:
        return self.pipeline.transformer.config.joint_attention_dim

    @property
    def longest(self) -> int:
        """As for every family, but at most the number of position embeddings."""
        return min(super().longest, self.pipeline.transformer.config.pos_embed_max_size * self.unit)

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        # in the place of T5 the pipeline appends zeros to the CLIP tokens; they are keys too
        encoded = self.pipeline.encode_prompt(
            list(texts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=T5_TOKENS,
        )
        return {"states": encoded[0].to(self.dtype), "pooled": encoded[2].to(self.dtype)}

    def token_offsets(self, text: str) -> list[tuple[int, int]]:
        clip = super().token_offsets(text)
        if self.pipeline.text_encoder_3 is None:
            return clip
        padding = [(0, 0)] * (self.max_tokens - len(clip))
        return clip + padding + t5.padded_offsets(self.pipeline.tokenizer_3, text, T5_TOKENS)

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition, image_size: tuple[int, int]) -> Tensor:
        return self.pipeline.transformer(
            latents, condition["states"], condition["pooled"], timesteps.to(latents.dtype)
        ).sample

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return rectified_flow(latents, noise, timesteps)

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

    def concept_layers(self, latent_size: tuple[int, int]) -> list[Layer]:
        blocks = self.pipeline.transformer.transformer_blocks
        return [replace(layer, module=block) for layer, block in zip(self.layers(latent_size), blocks, strict=True)]

    def default_weights(self) -> LayerWeights:
        """With 24 blocks, as SD3-medium has, only block 9, whose attention segments best (Seg4Diff); else all blocks.

        The block at the same share of another depth was a bad choice (docs/teachers.md, "Joint attention").
        """
        depth = len(self.pipeline.transformer.transformer_blocks)
        return {"transformer_blocks": 0.0, "transformer_blocks.9.": 1.0} if depth == 24 else {}
