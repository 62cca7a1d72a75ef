"""Aya Vision (`CohereLabs/aya-vision-8b`) and Command A Vision (`CohereLabs/command-a-vision-07-2025`)."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from transformers import ProcessorMixin
from transformers.models.cohere2.modeling_cohere2 import Cohere2Attention

from lavender.students.families.llava import STRATEGIES
from lavender.students.families.patch_grid import (
    Shape,
    Square,
    SquareAdapter,
    check_feature_selection,
    image_settings,
)
from lavender.students.rotary import by_neighbours


class Cohere2VisionAdapter(SquareAdapter):
    """Image keys: rows × cols tiles, row by row, and the whole image last; an image of one tile has no thumbnail.

    The image processor squashes an image to whole tiles, so the tiles are an exact grid. A cell is
    downsample_factor × downsample_factor patches (pixel shuffle). Layers of sliding attention see an image only within
    their window.
    """

    model_type = "cohere2_vision"
    thumbnail = "last"

    def square(self) -> Square:
        vision = self.config.vision_config
        return Square(vision.image_size, vision.patch_size, self.config.downsample_factor)

    def rotate(self, attention: Any, states_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if isinstance(attention, Cohere2Attention) and attention.sliding_window is None:
            return states_BHTD  # Cohere2's full layers know no positions
        return by_neighbours(states_BHTD, cos, sin)

    def tiles(self, image_size: tuple[int, int], processor: ProcessorMixin) -> Shape:
        size, crops, least, most = image_settings(processor, "size", "crop_to_patches", "min_patches", "max_patches")
        if not crops or most == 1:
            return 1, 1
        own: Any = sys.modules[type(processor.image_processor).__module__]  # image processors choose by other rules
        cols, rows = own.get_optimal_tiled_canvas(image_size, (size["height"], size["width"]), least, most)
        return rows, cols


class AyaVisionAdapter(Cohere2VisionAdapter):
    """As Command A Vision."""

    model_type = "aya_vision"

    def square(self) -> Square:
        tower = self.config.vision_config.model_type
        check_feature_selection(self.config.vision_feature_select_strategy, STRATEGIES.get(tower, "default"))
        return super().square()
