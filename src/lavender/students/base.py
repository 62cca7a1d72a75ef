"""The interface between Lavender and a family of vision-language models. To add a family, subclass `VlmAdapter`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ProcessorMixin

from lavender.config import LayerChoice
from lavender.errors import ConfigError, DataError, UnsupportedModelError
from lavender.model_files import load_weights
from lavender.students.image_keys import KeyLayout
from lavender.students.rotary import by_halves

PARTS = ("vision_tower", "connector", "language_model")
"""Parts of a model that can be frozen or tuned separately. The connector lies between the other two."""


class Removable(Protocol):
    """A change to a model that `remove` undoes, such as the handle of a hook."""

    def remove(self) -> None: ...


class VlmAdapter(ABC):
    """What Lavender needs to know about one family of models. One subclass per family, in `students/families`.

    An adapter holds no weights. It answers from the model's config and from the processor's output. All knowledge
    about a family is here: no other module names a family or compares `model_type`.

    An *image key* is a key of an attention layer that carries information from a picture: a patch, a tile's cell, or
    a latent of a resampler. A batch may hold samples without a picture and samples with several.

    Every family implements `usable_layers`, `attention_module`, `image_keys`, `image_boxes`, `describe_keys` and
    `image_token_id`. In addition:

    - Layers that attend to pictures alone (cross-attention): set `cross_attends`, return None from `image_keys`, and
      override `seen_from`; `image_states` too, unless there is a resampler.
    - Keys that are latents of a resampler: override `resampler` and `latent_attention`. A latent has no place in the
      picture. So a map is the attention on the latents times the latents' attention on the patches.
    """

    model_type: ClassVar[str]
    """`config.model_type` of the family: its key in `lavender.students.registry.FAMILIES`."""
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision_tower": ("model.vision_tower",),
        "connector": ("model.multi_modal_projector",),
        "language_model": ("model.language_model", "lm_head"),
    }
    """For each of `PARTS`, the prefixes of its modules' and parameters' names. The longest matching prefix counts."""
    cross_attends: ClassVar[bool] = False
    """Whether the usable layers attend to pictures alone. If False, the image keys are tokens of the sequence."""
    packs: ClassVar[bool] = False
    """Whether samples may be packed in one row: all that the model needs of a token is its id and one position, and
    its pixels are one list over the batch. See `lavender.alignment.packing`."""
    head_norms: ClassVar[tuple[str, str]] = ("q_norm", "k_norm")
    """Names of the attention module's children that normalise each query head and key head. They need not exist."""
    gated_queries: ClassVar[bool] = False
    """Whether `q_proj` makes two vectors per head: its query, and a gate of its output."""

    def __init__(self, config: Any):
        self.config = config

    # Every family implements these.

    @abstractmethod
    def usable_layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers whose attention on the picture can be captured, ascending."""

    @abstractmethod
    def attention_module(self, model: PreTrainedModel, layer: int) -> Any:
        """The attention module of a usable layer.

        It has `q_proj`, `k_proj`, `head_dim`, `scaling` and `layer_idx`, and calls transformers' `AttentionInterface`.
        """

    @abstractmethod
    def image_keys(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Positions of the image keys in the sequence: long (sample, key), ascending, padded with -1.

        A row holds the keys of all pictures of the sample; see `padded_keys`. None where the layers attend to pictures
        alone: then every key of a layer is an image key.

        Raises:
            DataError: `max_length` has cut a picture.
        """

    @abstractmethod
    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        """The box of each image key in its own picture, and the index of that picture.

        The keys are in the order of `image_keys`, or of the layer's keys where that is None. With a resampler, `boxes`
        are those of its patches, and `views` says which output of the resampler a key belongs to.

        Args:
            inputs: output of the processor for the batch.
            image_sizes: (height, width) in pixels of each sample's pictures, before the processor; [] for a sample
                without a picture.
            processor: the model's processor. Its settings decide which part of a picture the model sees.

        Raises:
            DataError: `inputs` hold another number of pictures, or of tokens per picture.
        """

    @abstractmethod
    def describe_keys(self) -> str:
        """One line for the user: the image keys of a picture and how they tile it."""

    @abstractmethod
    def image_token_id(self) -> int:
        """Id of the token that stands for a picture in the tokenized sequence."""

    # Families override these where the default does not fit.

    def processor(self, published: Any) -> Any:
        """The processor to train with. By default the published one; see `lavender.students.chat_processor`."""
        return published

    def load(self, auto: Any, path: str, **settings: Any) -> Any:
        """Load the model.

        Args:
            auto: the Auto class of transformers that fits the model.
            path: folder or hub id.
            settings: arguments of `from_pretrained`.

        Raises:
            ModelError: see `lavender.model_files.load_weights`.
        """
        trust = settings.get("trust_remote_code") is True
        return load_weights(auto, path, lambda: auto.from_config(self.config, trust_remote_code=trust), **settings)

    def num_heads(self) -> int:
        """Number of attention heads of a usable layer."""
        return self.config.get_text_config().num_attention_heads

    def num_embeddings(self, model: PreTrainedModel) -> int:
        """Number of token ids that the model has an embedding for."""
        table: Any = model.get_input_embeddings()
        return table.num_embeddings

    def keys_per_image(self) -> int | None:
        """Number of image keys per picture, or the most, if the config fixes it. None if it depends on the picture."""
        return None

    def counts_tokens(self, processor: ProcessorMixin) -> bool:
        """Whether the processor tells how many tokens a picture of a size takes, without processing one."""
        return True

    def backbone(self, model: PreTrainedModel) -> nn.Module:
        """The part of a model before its output layer; the model itself if it has none."""
        return model.base_model

    def token_ids(self, inputs: Mapping[str, Any]) -> Tensor:
        """The token ids among the keyword arguments of the model's forward: long (sample, token)."""
        return inputs["input_ids"]

    def check_projections(self) -> None:
        """Check that new query and key projections can stand in for a layer's own, for the pooling "learn".

        The first forward compares a layer's own queries and keys with what its norms and `rotate` make of its
        projections. Here is what that could not see, since a short sample may not show it.

        Raises:
            UnsupportedModelError: queries depend on positions in another way too.
        """
        scale = (getattr(self.config.get_text_config(), "rope_parameters", None) or {}).get("llama_4_scaling_beta")
        if scale:
            raise UnsupportedModelError(
                f"pooling 'learn' with llama_4_scaling_beta={scale}, which scales queries by their positions",
                "queries that positions rotate alone",
                "choose another pooling or loss",
            )

    def rotate(self, attention: Any, states_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply rotary position embedding to queries or keys of an attention module; see `lavender.students.rotary`."""
        return by_halves(states_BHTD, cos, sin)

    def hooks(self, model: PreTrainedModel) -> list[Removable]:
        """Change what a model needs in addition so that its forward works with attention requests.

        Called when capture starts; the result is removed when capture ends. A hook must be a function of a module or a
        bound method, not a closure: closures break `copy.deepcopy` and `torch.save` of the model.
        """
        return []

    def seen_from(self, inputs: Mapping[str, Tensor], layout: KeyLayout) -> Tensor:
        """Which pictures each token can attend to: bool (sample, picture, token).

        By default those that begin at the token or before it. Override it if `image_keys` is None.
        """
        keys = self.image_keys(inputs)
        assert keys is not None, f"{type(self).__name__} must override seen_from, since its image_keys is None"
        num_pictures = int(layout.pictures.max()) + 1 if layout.pictures.numel() else 0
        picture_ids = torch.arange(num_pictures, device=keys.device)
        is_of_picture = layout.pictures[:, None].to(keys.device) == picture_ids[:, None]
        length = inputs["input_ids"].shape[1]
        if keys.shape[1]:
            first = torch.where(is_of_picture, keys[:, None], length).amin(dim=2)
        else:
            first = keys.new_zeros(len(keys), 0)
        return first[..., None] <= torch.arange(length, device=keys.device)

    def resampler(self, model: PreTrainedModel) -> nn.Module | None:
        """The module that turns patches into the latents that are the image keys. None where keys are patches."""
        return None

    def latent_attention(
        self, resampler: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor:
        """Attention of the latents on the patches: float32 (view, latent, patch), mean over heads and layers.

        A view is a picture, or a crop of one, that the resampler turns into latents at once. The patches are in the
        order of `image_boxes`. Each row sums to 1 over the patches of its view, and is 0 at their padding. The result
        must be differentiable.

        Args:
            resampler: the module that `resampler` returned.
            args, kwargs: arguments of its forward.
            output: result of its forward.
        """
        raise NotImplementedError(f"{type(self).__name__} overrides resampler, but not latent_attention")

    def image_states(self, model: PreTrainedModel) -> nn.Module:
        """The module whose output the cross-attention layers get. Needed for `lavender check` only.

        Its output has one state per image key, sample by sample. Called only if `image_keys` is None and there is no
        resampler.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override image_states")

    def replace_image_states(
        self, decoder_inputs: dict[str, Any], keys: Tensor, replace: Callable[[Tensor], Tensor]
    ) -> dict[str, Any]:
        """The decoder's keyword arguments with other states at the image keys. For `lavender check`.

        Args:
            decoder_inputs: keyword arguments of the decoder's forward, with `inputs_embeds`.
            keys: result of `image_keys`, long (sample, key).
            replace: maps the states of all image keys of the batch, (key, width), to the new ones.
        """
        states, is_key = decoder_inputs["inputs_embeds"].clone(), keys >= 0
        samples, positions = is_key.nonzero()[:, 0].to(states.device), keys[is_key].to(states.device)
        states[samples, positions] = replace(states[samples, positions])
        return decoder_inputs | {"inputs_embeds": states}

    # The rest is the same for all families.

    def part_of(self, name: str) -> str | None:
        """Which of `PARTS` a module or parameter belongs to, by its name. None if it holds several parts."""
        matches = [
            (len(prefix), part)
            for part, prefixes in self.parts.items()
            for prefix in prefixes
            if name == prefix or name.startswith(f"{prefix}.")
        ]
        return max(matches)[1] if matches else None

    def key_tensors(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> dict[str, Tensor]:
        """Results of `image_keys` and `image_boxes`, checked against each other, as tensors for an `AlignmentRequest`.

        Returns:
            The fields of `KeyLayout` that are not None, and `keys` if the image keys are tokens of the sequence.

        Raises:
            DataError: the two methods disagree, or disagree with `image_sizes`.
        """
        keys, layout = self.image_keys(inputs), self.image_boxes(inputs, image_sizes, processor)
        expected = [len(sizes) for sizes in image_sizes]
        got = [len(pictures[pictures >= 0].unique()) for pictures in layout.pictures]
        if got != expected:
            raise DataError(
                f"boxes of {got} pictures for samples of {expected}", "as many", "report this family and processor"
            )
        if keys is not None and not torch.equal((keys >= 0).cpu(), (layout.pictures >= 0).cpu()):
            raise DataError(
                f"{(keys >= 0).sum(dim=1).tolist()} image keys per sample and boxes for "
                f"{(layout.pictures >= 0).sum(dim=1).tolist()}",
                "a box for each key",
                "set max_length=None if it cuts pictures; else report this family and processor",
            )
        tensors = {name: tensor for name, tensor in layout._asdict().items() if tensor is not None}
        return tensors if keys is None else tensors | {"keys": keys}

    def layers(self, wanted: tuple[int, ...] | LayerChoice | None, share: float = 1 / 3) -> tuple[int, ...]:
        """The layers to capture.

        Args:
            wanted: indices of layers, or "first", "middle" or "last" for a share of the usable layers. "all" and None
                mean all usable layers.
            share: that share, in (0, 1]. At least one layer is chosen.

        Raises:
            ConfigError: a layer in `wanted` is not usable.
        """
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
    """Check that the processor made squares of `side` pixels, for models that take no other size.

    Raises:
        ConfigError: `pixel_values` have another height or width.
    """
    pixels = inputs.get("pixel_values")
    if pixels is not None and tuple(pixels.shape[-2:]) != (side, side):
        height, width = pixels.shape[-2:]
        raise ConfigError(
            f"an image processor that makes pictures {height} px high and {width} px wide",
            f"{side} × {side} px, as the model's tower takes them",
            "load the model's own processor, or set its sizes (image_processor in a run)",
        )


def padded_keys(is_key: Tensor) -> Tensor:
    """Positions of the True entries of each row of bool (sample, token): long (sample, key), padded with -1."""
    return pad_sequence([row.nonzero()[:, 0] for row in is_key], batch_first=True, padding_value=-1)
