"""Ovis2 (`thisisiron/Ovis2-1B-hf`): a thumbnail, then square tiles; visual tokens from a table of embeddings."""

from __future__ import annotations

from transformers import ProcessorMixin
from transformers.models.ovis2.image_processing_pil_ovis2 import get_min_tile_covering_grid, get_optimal_tiled_canvas

from lavender.errors import UnsupportedModelError
from lavender.students.families.patch_grid import Shape, Square, SquareAdapter, image_settings


class Ovis2Adapter(SquareAdapter):
    """Image keys: the whole image, then rows × cols tiles, row by row; an image of one tile has no thumbnail.

    The image processor squashes an image to whole tiles, so the tiles are an exact grid. A cell is
    hidden_stride × hidden_stride patches. The state of a key is a mean of the embeddings of visual words.
    """

    model_type = "ovis2"
    thumbnail = "first"
    parts = {  # noqa: RUF012
        "vision_tower": ("model.vision_tower",),
        "connector": ("model.visual_embeddings_table",),
        "language_model": ("model.language_model", "lm_head"),
    }

    def square(self) -> Square:
        vision = self.config.vision_config
        patches = vision.image_size // vision.patch_size
        if patches % vision.hidden_stride:
            raise UnsupportedModelError(
                f"hidden_stride={vision.hidden_stride} with {patches} × {patches} patches",
                "a divisor: else the last cells of a tile are part padding",
                "load a model with whole cells",
            )
        return Square(vision.image_size, vision.patch_size, vision.hidden_stride)

    def tiles(self, image_size: tuple[int, int], processor: ProcessorMixin) -> Shape:
        names = "size", "crop_to_patches", "min_patches", "max_patches", "use_covering_area_grid"
        size, crops, least, most, covers = image_settings(processor, *names)
        if not crops or most == 1:
            return 1, 1
        if covers:
            cols, rows = get_min_tile_covering_grid(image_size, size["height"], most)
        else:
            cols, rows = get_optimal_tiled_canvas(image_size, (size["height"], size["width"]), least, most)
        return rows, cols
