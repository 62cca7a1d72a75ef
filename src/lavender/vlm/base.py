"""What a family of vision-language models must tell: where its image attention is, and its geometry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from lavender.errors import ConfigError


class VlmAdapter(ABC):
    """One family of models. Holds no weights; a family is one subclass in one file."""

    model_type: ClassVar[str]
    """`config.model_type` of the family."""

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def usable_layers(self) -> tuple[int, ...]:
        """Decoder layers whose attention on the picture can be captured, in order."""

    @abstractmethod
    def attention_module(self, model: PreTrainedModel, layer: int) -> Any:
        """The attention module of a usable layer."""

    def image_states(self, model: PreTrainedModel) -> Any:
        """The module whose output, or its `pooler_output`, is what the language model gets of the pictures.

        One state an image key, sample by sample; none for padding of `image_keys`.
        """
        return model.model.multi_modal_projector

    @abstractmethod
    def image_keys(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Which of a layer's keys are the picture's: long (sample, key), positions in the sequence.

        Ascending, and 0 after a sample's last where others have more. None where a layer attends to the picture
        alone (cross-attention): then all keys are.
        """

    @abstractmethod
    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[tuple[int, int]], processor: ProcessorMixin
    ) -> Tensor:
        """Boxes of the image keys in each sample's picture (see `lavender.grids`): float (sample, key, 4).

        Empty for keys that show no part of it, padding of `image_keys` too.

        Args:
            inputs: what the processor made of the batch; one picture a sample.
            image_sizes: (height, width) of the pictures, pixels, before the processor.
            processor: the model's; its settings may decide what part of a picture is seen.
        """

    @abstractmethod
    def describe_keys(self) -> str:
        """One line for people: the image keys of a picture and their grid."""

    @abstractmethod
    def image_token_id(self) -> int:
        """The token that stands for the picture in the text."""

    def layers(self, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
        """The wanted layers, checked, or all usable ones."""
        usable = self.usable_layers()
        if wanted is None:
            return usable
        wrong = [layer for layer in wanted if layer not in usable]
        if wrong:
            raise ConfigError(
                f"layers={wanted}, of which {wrong} do not see the picture", f"some of {usable}", "drop them"
            )
        return wanted
