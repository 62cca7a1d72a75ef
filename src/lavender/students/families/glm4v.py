"""GLM-4.1V and GLM-4.6V (`zai-org/GLM-4.1V-9B-Thinking` …): one grid of cells of the picture's own shape."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lavender.errors import UnsupportedModelError
from lavender.students.families.qwen_vl import Qwen2VlAdapter
from lavender.students.rotary import by_halves, by_neighbours

ROTATIONS = {"glm4v_text": by_neighbours, "glm4v_moe_text": by_halves}
"""`model_type` of a text model → its rotary position embedding, which leaves half of each head as it is."""


class Glm4vAdapter(Qwen2VlAdapter):
    """As Qwen2-VL: an image processor that resizes a picture to whole cells, and a key per cell.

    A strided convolution merges the patches of a cell. Frames of videos have the same token as pictures, so a batch
    with videos is refused.
    """

    model_type = "glm4v"
    parts = {  # noqa: RUF012
        "vision_tower": ("model.visual",),
        "connector": ("model.visual.downsample", "model.visual.merger"),
        "language_model": ("model.language_model", "lm_head"),
    }

    def __init__(self, config: Any):
        super().__init__(config)
        text = config.text_config.model_type
        if text not in ROTATIONS:
            raise UnsupportedModelError(
                f"text_config.model_type={text!r}", f"one of {sorted(ROTATIONS)}", "load a model with such a text model"
            )
        self._rotate = ROTATIONS[text]

    def rotate(self, attention: Any, states_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self._rotate(states_BHTD, cos, sin)


class Glm46vAdapter(Glm4vAdapter):
    """As GLM-4.1V, with its text model or with one that has experts."""

    model_type = "glm46v"
