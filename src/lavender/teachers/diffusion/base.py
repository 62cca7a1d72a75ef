"""What a family of diffusion models must tell: how it reads text and pictures, and where its attention is.

A family is one subclass in one file and one line in `lavender.teachers.diffusion.registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from torch import Tensor, nn

from lavender.errors import ConfigError, ModelError, UnsupportedModelError

Condition = dict[str, Tensor]
"""What the backbone gets of a text, by name; the first axis of each tensor is the row of the batch."""

LayerWeights = Mapping[str, float | Sequence[float]]


@dataclass(frozen=True)
class Layer:
    """A layer whose image queries attend to the text's keys.

    Attributes:
        name, module: as in the backbone's `named_modules`.
        grid: (rows, cols) of its image queries.
        joint: whether the queries and keys of the image come before those of the text in one attention (MM-DiT).
    """

    name: str
    module: nn.Module
    grid: tuple[int, int]
    joint: bool = False


class TeacherFamily(ABC):
    """One family of diffusion models, around a loaded pipeline whose modules are used as they are.

    Args:
        pipeline: a pipeline of `pipeline_class`, that very class.

    Attributes:
        forwards: forwards of the backbone so far, in rows; a backward counts as two, a stopped forward as one.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    optional_parts: ClassVar[Mapping[str, Any]] = {}
    """Arguments of `from_pretrained` that leave out what a teacher doesn't need."""
    largest_layer: ClassVar[int | None] = None
    """Layers of more than this² cells are not read where a user gives no limit; None reads all."""

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self.forwards = 0
        if not pipeline.tokenizer.is_fast:
            raise UnsupportedModelError(
                f"the slow tokenizer {type(pipeline.tokenizer).__name__}",
                "a fast tokenizer, which knows where in the text a token stands",
                "convert it: CLIPTokenizerFast.from_pretrained(folder) and save it beside the pipeline",
            )

    def check_parts(self) -> None:
        """See that the parts fit each other, as those of one pipeline do.

        Raises:
            ModelError: a length of texts that the text encoder has not, latents or text states of another width.
        """
        places = self.pipeline.text_encoder.config.max_position_embeddings
        latents, wanted = self.pipeline.vae.config.latent_channels, self.in_channels
        if not 2 < self.max_tokens <= places:
            wrong = f"the tokenizer's model_max_length {self.max_tokens} beside a text encoder of {places} tokens"
        elif latents != wanted:
            wrong = f"latents of {latents} channels beside a backbone that takes {wanted}"
        elif (width := self.encode_texts([""])["states"].shape[-1]) != self.text_width:
            wrong = f"text states of width {width} beside a backbone that takes {self.text_width}"
        else:
            return
        raise ModelError(f"{wrong}, in {self.pipeline.name_or_path}", "parts that fit", "get all parts of one pipeline")

    @property
    def in_channels(self) -> int:
        """Channels of the latents that the backbone takes."""
        config: Any = self.backbone.config
        return config.in_channels

    @property
    @abstractmethod
    def text_width(self) -> int:
        """Width of the text's states that the backbone takes."""

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The denoising network."""

    @property
    @abstractmethod
    def side(self) -> int:
        """Height and width of the square that the model was trained on, in pixels."""

    @property
    @abstractmethod
    def unit(self) -> int:
        """Sides of a picture must be multiples of this, in pixels."""

    @property
    def longest(self) -> int:
        """The longest side of a picture, in pixels: so long that the other is one `unit` of as many pixels."""
        return self.side * self.side // self.unit // self.unit * self.unit

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """The conditions of texts that each fit `max_tokens`. Token positions are those of `pipeline.tokenizer`."""

    def empty_condition(self) -> Condition:
        """What guidance steers away from: the empty text's condition, one row."""
        return self.encode_texts([""])

    def denoise(self, latents: Tensor, timesteps: Tensor, condition: Condition, image_size: tuple[int, int]) -> Tensor:
        """`predict`, counted."""
        self.forwards += len(latents)
        return self.predict(latents, timesteps, condition, image_size)

    @abstractmethod
    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition, image_size: tuple[int, int]) -> Tensor:
        """One forward of the backbone.

        Args:
            latents: (row, channel, height, width).
            timesteps: (row,), of 1000.
            image_size: (height, width) of the picture that the latents encode, in pixels.
        """

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of clean latents, each row at its own timestep (row,)."""

    @abstractmethod
    def layers(self, latent_size: tuple[int, int]) -> list[Layer]:
        """Layers that attend to the text, in the order in which they run, for latents of (height, width)."""

    @abstractmethod
    def self_attention(self, latent_size: tuple[int, int]) -> list[Layer]:
        """Layers whose image queries attend to image keys, likewise (a joint layer is one too)."""

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ of each of the 1000 timesteps, for DDIM.

        Raises:
            ConfigError: the family has no such schedule (flow matching).
        """
        raise ConfigError(
            f"DDIM inversion with a {self.pipeline_class.__name__}",
            "a diffusion model with DDIM's schedule",
            "use --mode noise",
        )

    @property
    def predicts_velocity(self) -> bool:
        """Whether the backbone predicts v instead of ε."""
        return False

    def default_weights(self) -> LayerWeights:
        """Weights of layers where a user gives none: by the beginning of a layer's name; {} is all alike."""
        return {}

    @property
    def max_tokens(self) -> int:
        """Tokens that the text encoder takes, special ones included."""
        return self.pipeline.tokenizer.model_max_length

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    def latent_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the latents of a picture of (height, width) pixels."""
        factor = self.pipeline.vae_scale_factor
        return image_size[0] // factor, image_size[1] // factor

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Clean latents of pictures (picture, 3, height, width) in [-1, 1], in the backbone's precision.

        Raises:
            ConfigError: the encoder overflowed (SDXL's does in float16).
        """
        vae = self.pipeline.vae
        pixels = pixels.to(vae.device, vae.dtype)
        if isinstance(vae, AutoencoderTiny):
            latents = vae.encode(pixels).latents
        else:
            latents = vae.encode(pixels).latent_dist.mode()
        shift = vae.config.get("shift_factor") or 0.0
        latents = (latents.float() - shift) * vae.config.scaling_factor
        if not latents.isfinite().all():
            raise ConfigError(
                f"NaN or infinity in the latents, encoded in {str(vae.dtype).removeprefix('torch.')}",
                "finite latents",
                "use --dtype bfloat16 or float32",
            )
        return latents.to(self.device, self.dtype)
