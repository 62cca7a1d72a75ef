"""Teachers with Flux 2 Klein: as Flux 1, with words carried by Qwen3 in a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from diffusers import DiffusionPipeline, Flux2KleinPipeline
from torch import Tensor

from lavender.teachers.diffusion.base import Condition, Layer, LayerWeights, TeacherFamily
from lavender.teachers.diffusion.flux import Flux
from lavender.teachers.diffusion.text_templates import offsets_in_template

MARK = "\N{INVISIBLE SEPARATOR}"


class Flux2Klein(Flux):
    """Flux 2 Klein. The text's keys are 512 tokens of the chat template; the state of a token is of three layers.

    Qwen3 is causal: a word's token knows the words before it.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = Flux2KleinPipeline
    takes_tiny_vae: ClassVar[bool] = False

    @property
    def tokenizer(self) -> Any:
        return self.pipeline.tokenizer

    @property
    def text_encoder(self) -> Any:
        return self.pipeline.text_encoder

    @property
    def word_keys(self) -> int:
        return self.pipeline.tokenizer_max_length

    @property
    def max_tokens(self) -> int:
        template = self.tokenizer("".join(self._template))["input_ids"]
        return self.word_keys - len(template) + 2

    @cached_property
    def _template(self) -> tuple[str, str]:
        """What the chat template puts before and after a text."""
        message = [{"role": "user", "content": MARK}]
        whole = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        before, after = whole.split(MARK)
        return before, after

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        states, _ = self.pipeline.encode_prompt(list(texts), device=self.device)
        return {"states": states.to(self.dtype)}

    def token_offsets(self, text: str) -> list[tuple[int, int]]:
        before, after = self._template
        return offsets_in_template(self.tokenizer, before, text, after, self.word_keys)

    def scaled_latents(self, pixels: Tensor) -> Tensor:
        """The autoencoder's latents, whose patches of 2 × 2 are normalised by its running mean and variance."""
        vae, pipeline = self.pipeline.vae, self.pipeline
        patches = pipeline._patchify_latents(vae.encode(pixels).latent_dist.mode().float())
        mean, variance = (one.float()[None, :, None, None] for one in (vae.bn.running_mean, vae.bn.running_var))
        return pipeline._unpatchify_latents((patches - mean) / (variance + vae.config.batch_norm_eps).sqrt())

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition, image_size: tuple[int, int]) -> Tensor:
        pipeline, device = self.pipeline, latents.device
        patches = pipeline._patchify_latents(latents)
        image_ids = pipeline._prepare_latent_ids(patches).to(device)
        packed = pipeline.transformer(
            hidden_states=pipeline._pack_latents(patches),
            timestep=(timesteps.float() / 1000).to(latents.dtype),
            encoder_hidden_states=condition["states"],
            txt_ids=pipeline._prepare_text_ids(condition["states"]).to(device),
            img_ids=image_ids,
        ).sample
        return pipeline._unpatchify_latents(pipeline._unpack_latents_with_ids(packed, image_ids, *patches.shape[2:]))

    def concept_layers(self, latent_size: tuple[int, int]) -> list[Layer]:
        """Refused: text tokens have positions of their own here."""
        return TeacherFamily.concept_layers(self, latent_size)

    def default_weights(self) -> LayerWeights:
        """The double-stream blocks, all alike: no measurement says which are best."""
        return {"single_transformer_blocks": 0.0}
