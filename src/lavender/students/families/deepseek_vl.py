"""DeepSeek-VL (`deepseek-community/deepseek-vl-1.3b-chat`) and Janus (`deepseek-community/Janus-Pro-1B`)."""

from __future__ import annotations

from transformers import ProcessorMixin

from lavender.errors import ConfigError
from lavender.students.families.patch_grid import Square, SquareAdapter, image_settings
from lavender.students.families.self_attention import Box


class DeepseekVlAdapter(SquareAdapter):
    """Image keys: one square of patches per image, row by row. The image is centred on it, between padding."""

    model_type = "deepseek_vl"
    parts = {  # noqa: RUF012
        "vision_tower": ("model.vision_model",),
        "connector": ("model.aligner",),
        "language_model": ("model.language_model", "lm_head"),
    }

    def square(self) -> Square:
        return Square(self.config.vision_config.image_size, self.config.vision_config.patch_size)

    def frames(self, image_size: tuple[int, int], processor: ProcessorMixin) -> list[Box]:
        resizes, pads, size, least = image_settings(processor, "do_resize", "do_pad", "size", "min_size")
        square = self.square()
        if not (resizes and pads) or size["height"] != square.size:
            raise ConfigError(
                f"do_resize={resizes}, do_pad={pads} and size={dict(size)} of the image processor",
                f"True, True and {square.size} px, the side of the model's square",
                "load the model's own processor",
            )
        scale = square.size / max(image_size)
        lengths = [max(round(length * scale), least) for length in image_size]
        top, left = (-((square.size - length) // 2) / length for length in lengths)
        height, width = (square.covered / length for length in lengths)
        return [(top, left, top + height, left + width)]


class JanusAdapter(DeepseekVlAdapter):
    """As DeepSeek-VL. What makes images (`model.vqmodel` and the like) takes no part."""

    model_type = "janus"
    parts = {  # noqa: RUF012
        "vision_tower": ("model.vision_model",),
        "connector": ("model.aligner",),
        "language_model": (
            *("model.language_model", "lm_head", "model.vqmodel", "model.generation_embeddings"),
            *("model.generation_aligner", "model.generation_head"),
        ),
    }
