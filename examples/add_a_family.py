"""How to add a family of vision-language models, shown on VipLLaVA (`llava-hf/vip-llava-7b-hf`).

An adapter answers three questions about a model, and holds no weights:

1. Which decoder layers attend to the image?      `usable_layers`, `attention_module`
2. Which of their keys belong to the image?       `image_keys`, `image_token_id`
3. Which part of the image does each key show?    `image_boxes`

VipLLaVA is the simplest kind of family: the image processor makes one square of each image, the vision tower turns the
square into side × side patches, and each patch stands in the text as one token. To add a family to the library:

- copy `VipLlavaAdapter` to `src/lavender/students/families/NAME.py` and change what differs;
- add the class to the tuple in `src/lavender/students/registry.py`;
- copy `tests/families/test_add_a_family.py`, which runs the contract of all families on a tiny model of random weights.

In a project of your own, `FAMILIES[VipLlavaAdapter.model_type] = VipLlavaAdapter` before the model is loaded does the
same for Python. `docs/add-a-vlm.md` describes every method, other kinds of families, and known traps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin, VipLlavaConfig

from lavender.errors import DataError
from lavender.students.base import VlmAdapter, check_pixels, padded_keys
from lavender.students.families.llava import seen_frame
from lavender.students.image_keys import KeyLayout, grid_boxes, key_layout
from lavender.students.registry import FAMILIES, adapter_for


class VipLlavaAdapter(VlmAdapter):
    """VipLLaVA: side × side patches per image, row by row, at the image tokens of the text; no class token."""

    # `config.model_type`. The registry finds the adapter by it.
    model_type = "vipllava"

    # `parts` is inherited: the vision tower, the connector and the language model have the names that LLaVA gives them.
    # They decide what `freeze` freezes. `print(model)` shows the names; see the other families for other names.

    def usable_layers(self) -> tuple[int, ...]:
        # The image is part of the sequence, so every decoder layer attends to it. `SelfAttentionAdapter` of
        # `families/self_attention.py` has this method, `attention_module` and `image_token_id` as they stand here.
        return tuple(range(self.config.text_config.num_hidden_layers))

    def attention_module(self, model: PreTrainedModel, layer: int) -> Any:
        # The module that has `q_proj`, `k_proj` and `layer_idx`, and calls transformers' `AttentionInterface`.
        return model.model.language_model.layers[layer].self_attn

    def describe_keys(self) -> str:
        # One line for `lavender inspect`.
        side = self._side()
        return (
            f"one square of {self.config.vision_config.image_size} px, {side} × {side} patches among the text's tokens"
        )

    def keys_per_image(self) -> int:
        # For the estimate of memory in `lavender inspect`. Leave it out if the number depends on the image.
        return self._side() ** 2

    def image_token_id(self) -> int:
        # The token at each image key, in the finished sequence.
        return self.config.image_token_id

    def image_keys(self, inputs: Mapping[str, Tensor]) -> Tensor:
        # Positions of all image keys of each sample: long (sample, key), ascending, padded with -1. `padded_keys` makes
        # them from a mask. A sample may have no image, or several. A cut image would get wrong boxes: refuse it.
        positions = inputs["input_ids"] == self.image_token_id()
        per_image = self.keys_per_image()
        cut = [count for count in positions.sum(dim=1).tolist() if count % per_image]
        if cut:
            raise DataError(
                f"{cut[0]} image tokens in a sample",
                f"{per_image} for each image",
                "raise max_length (or set it to None) if it cuts images",
            )
        return padded_keys(positions)

    def image_boxes(
        self, inputs: Mapping[str, Tensor], image_sizes: list[list[tuple[int, int]]], processor: ProcessorMixin
    ) -> KeyLayout:
        # A box is (top, left, bottom, right) as shares of the image *before* the processor: (0, 0, 1, 1) is all of it.
        # `image_sizes` holds (height, width) in pixels of each image of each sample.
        vision, side = self.config.vision_config, self._side()
        check_pixels(inputs, vision.image_size)  # another processor's square would have another grid
        covered = side * vision.patch_size  # pixels of the square that whole patches cover
        images: Any = processor.image_processor

        def boxes(size: tuple[int, int]) -> Tensor:
            # Ask the processor's settings, never assume them: LLaVA-1.5's cuts the longer side off, others squash the
            # image or pad it. `seen_frame` follows these steps and says where in the image the square lies.
            frame = seen_frame(size, images, (covered, covered))
            return grid_boxes(side, side, frame)  # float (side², 4), row by row

        # One entry per key of `image_keys`, in the same order; `key_layout` pads the samples.
        return key_layout([[boxes(size) for size in sizes] for sizes in image_sizes])

    def _side(self) -> int:
        """Patches along a side of the square."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size


if __name__ == "__main__":
    FAMILIES[VipLlavaAdapter.model_type] = VipLlavaAdapter
    adapter = adapter_for(VipLlavaConfig())
    print(f"{adapter.model_type}: {adapter.describe_keys()}; layers {adapter.usable_layers()}")
