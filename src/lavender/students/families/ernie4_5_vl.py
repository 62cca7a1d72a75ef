"""ERNIE 4.5 VL (`baidu/ERNIE-4.5-VL-28B-A3B-PT`): one grid of cells of the picture's own shape."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lavender.students.families.qwen_vl import Qwen2VlAdapter
from lavender.students.rotary import by_neighbours


class Ernie45VlMoeAdapter(Qwen2VlAdapter):
    """As Qwen2-VL. Picture tokens have experts of their own, which attention does not depend on.

    What transformers calls its resampler is a merger: a key shows its cell of patches alone.
    """

    model_type = "ernie4_5_vl_moe"
    parts = {  # noqa: RUF012
        "vision_tower": ("model.vision_tower",),
        "connector": ("model.resampler_model",),
        "language_model": ("model.language_model", "lm_head"),
    }

    def rotate(self, attention: Any, states_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return by_neighbours(states_BHTD, cos, sin)
