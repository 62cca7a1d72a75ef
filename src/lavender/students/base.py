"""What a family of vision-language models must tell: where its image attention is, and its geometry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ProcessorMixin

from lavender.config import LayerChoice
from lavender.errors import ConfigError, DataError
from lavender.model_files import load_weights
from lavender.students.image_keys import KeyLayout

PARTS = ("vision_tower", "connector", "language_model")
"""What can be frozen: what sees, what lies between, and what reads and writes."""


class Removable(Protocol):
    """What is to be undone by `remove`, as a hook's handle."""

    def remove(self) -> None: ...


class VlmAdapter(ABC):
    """One family of models. Holds no weights; a family is one subclass in one file.

    A batch may hold samples without a picture and samples with several. Where the language model gets a resampler's
    latents, which lie nowhere in the picture, a family also overrides `resampler` and `latent_attention`; then a map
    is the attention on the latents times the latents' own attention on the patches.
    """

    model_type: ClassVar[str]
    """`config.model_type` of the family."""
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision_tower": ("model.vision_tower",),
        "connector": ("model.multi_modal_projector",),
        "language_model": ("model.language_model", "lm_head"),
    }
    """Where the parts that can be frozen lie: beginnings of names of modules and weights; the longest one counts."""
    cross_attends: ClassVar[bool] = False
    """Whether its usable layers attend to pictures alone; else pictures are part of the sequence."""

    def __init__(self, config: Any):
        self.config = config

    def part_of(self, name: str) -> str | None:
        """Which of PARTS a module or weight of this name belongs to; None for what holds several."""
        found = [
            (len(begin), part)
            for part, begins in self.parts.items()
            for begin in begins
            if name == begin or name.startswith(f"{begin}.")
        ]
        return max(found)[1] if found else None

    @abstractmethod
    def usable_layers(self) -> tuple[int, ...]:
        """Decoder layers whose attention on the picture can be captured, in order."""

    @abstractmethod
    def attention_module(self, model: PreTrainedModel, layer: int) -> Any:
        """The attention module of a usable layer."""

    def image_states(self, model: PreTrainedModel) -> Any:
        """The module whose output cross-attention gets of the pictures, for `lavender check`.

        One state an image key, sample by sample. Asked only where `image_keys` is None and there is no resampler.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say where the states of its pictures come from")

    @abstractmethod
    def image_keys(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Which of a layer's keys are of the sample's pictures: long (sample, key), positions in the sequence.

        Those of all its pictures, ascending, and -1 after a sample's last where others have more (see `padded_keys`).
        None where a layer attends to pictures alone (cross-attention): then all keys are.
        """

    @abstractmethod
    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        """Where in its own picture each image key lies, and which picture that is; see `KeyLayout`.

        One entry a key of `image_keys`, or of the layer where that is None. For a resampler the boxes are those of
        its patches, and `views` says which of its outputs a key is part of.

        Args:
            inputs: what the processor made of the batch.
            image_sizes: (height, width) of each sample's pictures, pixels, before the processor; [] for a sample
                without a picture.
            processor: the model's; its settings may decide what part of a picture is seen.

        Raises:
            DataError: the inputs have another number of pictures, or of a picture's tokens.
        """

    @abstractmethod
    def describe_keys(self) -> str:
        """One line for people: the image keys of a picture and their grid."""

    @abstractmethod
    def image_token_id(self) -> int:
        """The token that stands for the picture in the text."""

    def processor(self, published: Any) -> Any:
        """The processor to train with, from the model's own: that one, where it takes batches of conversations."""
        return published

    def load(self, auto: Any, path: str, **settings: Any) -> Any:
        """The model, by the Auto class that fits it; `settings` are those of `from_pretrained`.

        Raises:
            ModelError: see `lavender.model_files.load_weights`.
        """
        trust = settings.get("trust_remote_code") is True
        return load_weights(auto, path, lambda: auto.from_config(self.config, trust_remote_code=trust), **settings)

    def num_heads(self) -> int:
        """How many heads a usable layer's attention has."""
        return self.config.get_text_config().num_attention_heads

    def hooks(self, model: PreTrainedModel) -> list[Removable]:
        """What else a model needs to answer requests, in place until it is removed; nothing for most families."""
        return []

    def resampler(self, model: PreTrainedModel) -> nn.Module | None:
        """The module that turns patches into the latents that are the image keys; None where keys are patches."""
        return None

    def latent_attention(
        self, resampler: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor:
        """Where the latents look: float32 (view, latent, patch), mean over the resampler's heads and layers.

        Differentiable. A row sums to 1 over its view's own patches and is 0 at their padding; the patches are in the
        order of the boxes of `image_boxes`. Called in a forward hook of `resampler`, with what that got and gave.
        """
        raise NotImplementedError(f"{type(self).__name__} names a resampler, but not how to read its attention")

    def seen_from(self, inputs: Mapping[str, Tensor], layout: KeyLayout) -> Tensor:
        """Which pictures a token's row can attend to: bool (sample, picture, token).

        Here those that begin at or before it. A family whose `image_keys` is None must override this.
        """
        keys = self.image_keys(inputs)
        assert keys is not None, f"{type(self).__name__} must say which rows see which picture"
        num_pictures = int(layout.pictures.max()) + 1 if layout.pictures.numel() else 0
        own = layout.pictures[:, None].to(keys.device) == torch.arange(num_pictures, device=keys.device)[:, None]
        length = inputs["input_ids"].shape[1]
        first = torch.where(own, keys[:, None], length).amin(dim=2) if keys.shape[1] else keys.new_zeros(len(keys), 0)
        return first[..., None] <= torch.arange(length, device=keys.device)

    def key_tensors(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> dict[str, Tensor]:
        """`image_keys` and `image_boxes` as tensors of an `AlignmentRequest`, and checked against each other."""
        keys, layout = self.image_keys(inputs), self.image_boxes(inputs, image_sizes, processor)
        given = [len(own) for own in image_sizes]
        found = [len(own[own >= 0].unique()) for own in layout.pictures]
        if found != given:
            raise DataError(
                f"boxes of {found} pictures for samples of {given}", "as many", "report this family and processor"
            )
        if keys is not None and not torch.equal((keys >= 0).cpu(), (layout.pictures >= 0).cpu()):
            raise DataError(
                f"{(keys >= 0).sum(dim=1).tolist()} image keys a sample and boxes for "
                f"{(layout.pictures >= 0).sum(dim=1).tolist()}",
                "a box for each key",
                "set max_length=None if it cuts pictures; else report this family and processor",
            )
        tensors = {name: one for name, one in layout._asdict().items() if one is not None}
        return tensors if keys is None else tensors | {"keys": keys}

    def layers(self, wanted: tuple[int, ...] | LayerChoice | None, share: float = 1 / 3) -> tuple[int, ...]:
        """The wanted layers, checked, or all usable ones; "first", "middle" and "last" are a share of these."""
        usable = self.usable_layers()
        if wanted is None or wanted == "all":
            return usable
        if isinstance(wanted, str):
            count = max(1, round(share * len(usable)))
            start = {"first": 0, "middle": (len(usable) - count) // 2, "last": len(usable) - count}[wanted]
            return usable[start : start + count]
        wrong = [layer for layer in wanted if layer not in usable]
        if wrong:
            raise ConfigError(
                f"layers={wanted}, of which {wrong} do not see the picture", f"some of {usable}", "drop them"
            )
        return wanted


def check_pixels(inputs: Mapping[str, Tensor], side: int) -> None:
    """See that the pictures of a batch are squares of `side` pixels, the only ones that the model's tower takes.

    Raises:
        ConfigError: the image processor makes others.
    """
    pixels = inputs.get("pixel_values")
    if pixels is not None and tuple(pixels.shape[-2:]) != (side, side):
        height, width = pixels.shape[-2:]
        raise ConfigError(
            f"an image processor that makes pictures {height} px high and {width} px wide",
            f"{side} × {side} px, as the model's tower takes them",
            "load the model's own processor, or set its sizes (image_processor in a run)",
        )


def padded_keys(places: Tensor) -> Tensor:
    """Positions of what is true in each row of (sample, token): long (sample, key), ascending, padded with -1."""
    return pad_sequence([own.nonzero()[:, 0] for own in places], batch_first=True, padding_value=-1)
