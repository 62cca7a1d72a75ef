"""`TeacherFamily`: what a class of diffusion models must provide to be a teacher. Read this to add a family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from lavender.errors import ConfigError, ModelError, UnsupportedModelError

Condition = dict[str, Tensor]
"""What the backbone gets of the texts, by name. The first axis of each tensor is the row of the batch. "states" (row,
key, width) is required: one row of the layers' text keys per text. Further names are the family's choice."""

LayerWeights = Mapping[str, float | Sequence[float]]
"""Weights by the beginning of a layer's name: one number per layer, or one per head."""


@dataclass(frozen=True)
class Layer:
    """A layer in which image queries attend to text keys, or to image keys.

    Attributes:
        name: as in the backbone's `named_modules`.
        module: calls `torch.nn.functional.scaled_dot_product_attention`; its first call in a forward is read.
        grid: (rows, cols) of the image queries, which must be in row-major order. rows · cols must be their number.
        joint: whether one attention call holds image and text (MM-DiT).
        text_first: whether the text's queries and keys come before the image's in such a call.
    """

    name: str
    module: nn.Module
    grid: tuple[int, int]
    joint: bool = False
    text_first: bool = False


def tokenized(tokenizer: Any, text: str, max_tokens: int) -> list[tuple[int, int]]:
    """The half-open span of characters of each token of a text, truncated to `max_tokens`; (0, 0) for special ones."""
    encoded = tokenizer(text, truncation=True, max_length=max_tokens, return_offsets_mapping=True)
    return [(first, last) for first, last in encoded["offset_mapping"]]


def rectified_flow(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = (1 − σ)·x + σ·ε with σ = t / 1000, as `TeacherFamily.add_noise` of models that learn this flow."""
    sigma = (timesteps.float() / 1000)[:, None, None, None]
    return ((1 - sigma) * latents.float() + sigma * noise.float()).to(latents.dtype)


class TeacherFamily(ABC):
    """One family of diffusion models, around a loaded pipeline whose modules are used as they are.

    To add a family:

    1. Write a subclass in a file beside this one. It sets `pipeline_class` and implements the abstract methods:
       `text_width`, `backbone`, `side`, `unit`, `encode_texts`, `predict`, `add_noise`, `layers`, `self_attention`. It
       overrides the other methods where their default is wrong for the family.
    2. Add the class to `FAMILIES` in `registry.py`.
    3. Add a tiny pipeline of random weights to `tests/teachers/pipelines.py`, and `tests/teachers/test_FAMILY.py`,
       which subclasses the contract in `tests/teachers/contract.py`.

    Capture, modes, aggregation, long texts and stores are the same for every family, and do not know which it is.

    What goes wrong most easily:

    - **Token positions.** `token_offsets` says which key of "states" carries which characters. Override it where a
      template surrounds the text, keys are dropped, or a second text encoder adds keys. Encoders that are concatenated
      along the width must share the tokenizer.
    - **One row per text.** `encode_texts` must not add rows for classifier-free guidance.
    - **Order of layers.** A forward stops after the last layer that is read, so `layers` must be in the order in which
      they run. `named_modules` may differ: a UNet lists its middle block last.
    - **Grids of non-square pictures.** Compute them from `latent_size`, and round as the backbone rounds.
    - **Joint layers.** Flux has the text's tokens first, Stable Diffusion 3 the image's; see `Layer.text_first`.
    - **Padding of the text.** Pad to a length that no other text of the batch changes.
    - **Heights and widths.** Sizes are (height, width). Pillow's `Image.size` is (width, height).
    - **Random numbers.** Encoding must be deterministic, and a row's output must not depend on the other rows.

    Args:
        pipeline: an instance of `pipeline_class`, not of a subclass.

    Attributes:
        pipeline: the pipeline.
        forwards: forwards of the backbone so far, in rows. A backward pass counts as two, a stopped forward as one.

    Raises:
        ModelError: the pipeline lacks a part that is not in `optional_parts`.
        UnsupportedModelError: the tokenizer is slow, so it does not give the tokens' positions in the text.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    """The pipeline class of diffusers, as `model_index.json` names it."""
    optional_parts: ClassVar[Mapping[str, Any]] = {}
    """Arguments of `from_pretrained` that leave out parts which a teacher does not need. None leaves out a part."""
    t5_parts: ClassVar[tuple[str, ...]] = ()
    """The `optional_parts` that `ExtractionConfig.t5` keeps."""
    takes_tiny_vae: ClassVar[bool] = True
    """Whether an `AutoencoderTiny` can encode the pictures; False where `scaled_latents` needs the pipeline's own."""
    largest_layer: ClassVar[int | None] = None
    """The default of `ExtractionConfig.largest_layer`; None reads layers of any size."""

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self.forwards = 0
        absent = [
            name for name, part in pipeline.components.items() if part is None and name not in self.optional_parts
        ]
        if absent:
            raise ModelError(
                f"a {type(pipeline).__name__} without {' and '.join(absent)}",
                "a pipeline with the parts that encode pictures and texts and remove noise",
                "load it without setting these parts to None",
            )
        if not self.tokenizer.is_fast:
            raise UnsupportedModelError(
                f"the slow tokenizer {type(self.tokenizer).__name__}",
                "a fast tokenizer, which knows where in the text a token stands",
                "convert it: CLIPTokenizerFast.from_pretrained(folder) and save it beside the pipeline",
            )

    def check_parts(self) -> None:
        """Check that the parts of the pipeline fit each other. `Teacher` calls it before any work.

        Raises:
            ModelError: the tokenizer's texts are longer than the text encoder takes, or the latents or text states
                have another width than the backbone takes.
        """
        places = getattr(self.text_encoder.config, "max_position_embeddings", self.max_tokens)
        latents, wanted = self.latent_channels, self.in_channels
        if not 2 < self.max_tokens <= places:
            wrong = f"the tokenizer's model_max_length {self.max_tokens} beside a text encoder of {places} tokens"
        elif latents != wanted:
            wrong = f"latents of {latents} channels beside a backbone that takes {wanted}"
        elif (width := self.encode_texts([""])["states"].shape[-1]) != self.text_width:
            wrong = f"text states of width {width} beside a backbone that takes {self.text_width}"
        else:
            return
        raise ModelError(f"{wrong}, in {self.pipeline.name_or_path}", "parts that fit", "get all parts of one pipeline")

    def check_t5(self, wanted: bool) -> None:
        """Check that `ExtractionConfig.t5` fits the pipeline.

        Raises:
            ConfigError: it is set, and T5 is no choice in this family.
        """
        if wanted:
            raise ConfigError(
                f"t5=True with a {self.pipeline_class.__name__}",
                "Stable Diffusion 3 or 3.5, where T5 can be left out",
                "leave t5 out",
            )

    @property
    def tokenizer(self) -> Any:
        """The tokenizer by which texts are cut into windows."""
        return self.pipeline.tokenizer

    @property
    def text_encoder(self) -> Any:
        """The text encoder of `tokenizer`."""
        return self.pipeline.text_encoder

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the autoencoder makes."""
        return self.pipeline.vae.config.latent_channels

    @property
    def in_channels(self) -> int:
        """Channels of the latents that the backbone takes, before patches of cells are joined into channels."""
        config: Any = self.backbone.config
        return config.in_channels

    @property
    @abstractmethod
    def text_width(self) -> int:
        """Width of the text states that the backbone takes: the last axis of "states"."""

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The denoising network."""

    @property
    @abstractmethod
    def side(self) -> int:
        """Height and width of the square pictures that the model was trained on, in pixels."""

    @property
    @abstractmethod
    def unit(self) -> int:
        """The height and width of a picture must be multiples of this, in pixels.

        At least the autoencoder's factor times the backbone's patch size, or its total downsampling.
        """

    @property
    def longest(self) -> int:
        """The longest side of a picture, in pixels.

        By default a picture of this side and of one `unit` has as many pixels as the square. Override it where the
        backbone's position embeddings end earlier.
        """
        return self.side * self.side // self.unit // self.unit * self.unit

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """Encode texts, each of at most `max_tokens` tokens, for the backbone.

        Returns:
            Tensors of one row per text, in the backbone's precision and on its device. "states" is
            (row, key, `text_width`); `token_offsets` describes its first keys.
        """

    def as_encoded(self, text: str) -> str:
        """The text as the tokenizer gets it, such as in lower case, of the same length."""
        return text

    def token_offsets(self, text: str) -> list[tuple[int, int]]:
        """Which characters of a text each of the first keys of "states" carries.

        By default the first keys are the tokens of `tokenizer`, truncated to `max_tokens`.

        Returns:
            Half-open spans of characters, at most `word_keys`; (0, 0) for special tokens, templates and padding.
        """
        return tokenized(self.tokenizer, text, self.max_tokens)

    def empty_condition(self) -> Condition:
        """The unconditional condition of classifier-free guidance, one row. `mode="null-text"` needs it."""
        return self.encode_texts([""])

    def denoise(self, latents: Tensor, timesteps: Tensor, condition: Condition, image_size: tuple[int, int]) -> Tensor:
        """`predict`, which adds its rows to `forwards`. Code outside the family calls this."""
        self.forwards += len(latents)
        return self.predict(latents, timesteps, condition, image_size)

    @abstractmethod
    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition, image_size: tuple[int, int]) -> Tensor:
        """Run one forward of the backbone.

        Args:
            latents: (row, channel, height, width), noisy.
            timesteps: (row,), from 0 (clean) to 999.
            condition: as `encode_texts` returns it, one row per row of `latents`.
            image_size: (height, width) of the picture that the latents encode, in pixels.

        Returns:
            The backbone's prediction (ε, v or a velocity), shaped like `latents`.
        """

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noisy latents x_t.

        Args:
            latents: (row, channel, height, width), clean.
            noise: like `latents`, standard Gaussian.
            timesteps: (row,), from 0 to 999. Each row has its own.
        """

    @abstractmethod
    def layers(self, latent_size: tuple[int, int]) -> list[Layer]:
        """The layers whose image queries attend to the text, in the order in which they run.

        Args:
            latent_size: (height, width) of the latents; need not be square.
        """

    @abstractmethod
    def self_attention(self, latent_size: tuple[int, int]) -> list[Layer]:
        """The layers whose image queries attend to image keys, in the order in which they run. Used by `refine`.

        A joint layer belongs to both `layers` and `self_attention`.
        """

    def concept_layers(self, latent_size: tuple[int, int]) -> list[Layer]:
        """The blocks of joint attention for `ExtractionConfig.space="output"`, in the order in which they run.

        The `module` of each is the block, which takes its arguments by name and returns the text first; the `name` is
        that of its attention. All text tokens must have the same position.

        Raises:
            ConfigError: the family has none.
        """
        raise ConfigError(
            f"space='output' with a {self.pipeline_class.__name__}",
            "a model with separate streams of image and text, such as Stable Diffusion 3 or Flux 1",
            "use space='attention'",
        )

    def concept_weights(self) -> LayerWeights:
        """The default of `ExtractionConfig.layer_weights` for `concept_layers`: the second half of them."""
        layers = self.concept_layers(self.latent_size((self.side, self.side)))
        return {layer.name: 0.0 for layer in layers[: len(layers) // 2]}

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ of each timestep for DDIM, (1000,), falling. Override it for models that DDIM can sample.

        Raises:
            ConfigError: the family has no such schedule (flow matching), so it has only `mode="noise"`.
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
        """The default of `ExtractionConfig.layer_weights`; {} gives every layer the weight 1."""
        return {}

    @property
    def max_tokens(self) -> int:
        """Tokens of a text that the encoder takes, two of them special. Longer texts are cut into windows."""
        return self.tokenizer.model_max_length

    @property
    def word_keys(self) -> int:
        """How many of the first keys of "states" can carry words."""
        return self.max_tokens

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return cast(ModelMixin, self.backbone).dtype  # of 4-bit weights it is that of the computation

    def latent_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the latents of a picture of (height, width) pixels."""
        factor = self.pipeline.vae_scale_factor
        return image_size[0] // factor, image_size[1] // factor

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Encode pictures to clean latents: the mode of the autoencoder's distribution, scaled and shifted.

        Args:
            pixels: (picture, 3, height, width) in [-1, 1], RGB.

        Returns:
            (picture, channel, height, width), in the backbone's precision and on its device.

        Raises:
            ConfigError: the encoder overflowed (SDXL's does in float16).
        """
        vae = self.pipeline.vae
        latents = self.scaled_latents(pixels.to(vae.device, vae.dtype))
        if not latents.isfinite().all():
            raise ConfigError(
                f"NaN or infinity in the latents, encoded in {str(vae.dtype).removeprefix('torch.')}",
                "finite latents",
                "use --dtype bfloat16 or float32",
            )
        return latents.to(self.device, self.dtype)

    def scaled_latents(self, pixels: Tensor) -> Tensor:
        """What the autoencoder makes of pictures in its precision, scaled and shifted for the backbone; float32."""
        vae = self.pipeline.vae
        if isinstance(vae, AutoencoderTiny):
            latents = vae.encode(pixels).latents
        else:
            latents = vae.encode(pixels).latent_dist.mode()
        mean, std = (vae.config.get(f"latents_{name}") for name in ("mean", "std"))
        if mean is not None and std is not None:
            mean, std = (latents.new_tensor(one).float().view(1, -1, 1, 1) for one in (mean, std))
            return (latents.float() - mean) * vae.config.scaling_factor / std
        shift = vae.config.get("shift_factor") or 0.0
        return (latents.float() - shift) * vae.config.scaling_factor
