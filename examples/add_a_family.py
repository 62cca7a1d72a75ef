"""How to add a family of vision-language models, shown on VipLLaVA (`llava-hf/vip-llava-7b-hf`).

An adapter answers three questions about a model, and holds no weights:

1. Which decoder layers attend to the image?      `usable_layers`, `attention_module`
2. Which of their keys belong to the image?       `image_keys`, `image_token_id`
3. Which part of the image does each key show?    `image_boxes`

Most families need not answer them one by one. Where an image is a grid of patches among the text's tokens, with or
without tiles, a declaration is enough: `SquareAdapter` for squares, `PatchGridAdapter` for grids of any shape. To add a
family to the library:

- copy `VipLlavaAdapter` to `src/lavender/students/families/NAME.py` and change what differs;
- add the class to the tuple in `src/lavender/students/registry.py`;
- copy `tests/families/test_add_a_family.py`, which runs the contract of all families on a tiny model of random weights.

In a project of your own, `FAMILIES[VipLlavaAdapter.model_type] = VipLlavaAdapter` before the model is loaded does the
same for Python. `docs/add-a-vlm.md` describes every method, other kinds of families, and known traps.
"""

from __future__ import annotations

from transformers import VipLlavaConfig

from lavender.students.families.patch_grid import Square, SquareAdapter
from lavender.students.registry import FAMILIES, adapter_for


class VipLlavaAdapter(SquareAdapter):
    """VipLLaVA: side × side patches per image, row by row, at the image tokens of the text; no class token."""

    # `config.model_type`. The registry finds the adapter by it.
    model_type = "vipllava"

    # `parts` is inherited: the vision tower, the connector and the language model have the names that LLaVA gives them.
    # They decide what `freeze` freezes. `print(model)` shows the names; see the other families for other names.

    def square(self) -> Square:
        # The square that the vision tower takes, and its patches, in pixels. A third number, `merge`, says how many
        # patches a key has along a side. How the image becomes the square (cropped, squashed or padded) is read from
        # the image processor's settings.
        vision = self.config.vision_config
        return Square(vision.image_size, vision.patch_size)

    # A family that cuts images into tiles also sets `thumbnail` and implements `tiles`; see `families/aya_vision.py`.


if __name__ == "__main__":
    FAMILIES[VipLlavaAdapter.model_type] = VipLlavaAdapter
    adapter = adapter_for(VipLlavaConfig())
    print(f"{adapter.model_type}: {adapter.describe_keys()}; layers {adapter.usable_layers()}")
