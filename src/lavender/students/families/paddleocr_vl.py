"""PaddleOCR-VL (`PaddlePaddle/PaddleOCR-VL`): one grid of cells of the picture's own shape."""

from __future__ import annotations

from lavender.students.families.qwen_vl import Qwen2VlAdapter


class PaddleOcrVlAdapter(Qwen2VlAdapter):
    """As Qwen2-VL. The tower has its patches row by row, and the projector merges those of a cell."""

    model_type = "paddleocr_vl"
    parts = {  # noqa: RUF012
        "vision_tower": ("model.visual",),
        "connector": ("model.projector",),
        "language_model": ("model.language_model", "lm_head"),
    }
