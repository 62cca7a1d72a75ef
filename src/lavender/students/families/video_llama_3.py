"""VideoLLaMA 3 (`lkhl/VideoLLaMA3-2B-Image-HF`): one grid of cells of the picture's own shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lavender.errors import ConfigError, UnsupportedModelError
from lavender.students.families.qwen_vl import Qwen2VlAdapter


class VideoLlama3Adapter(Qwen2VlAdapter):
    """As Qwen2-VL, with one key per patch. The image processor may merge 2 × 2 patches: `image_merge_sizes`."""

    model_type = "video_llama_3"
    parts = {  # noqa: RUF012
        "vision_tower": ("model.vision_model",),
        "connector": ("model.projector",),
        "language_model": ("model.language_model", "lm_head"),
    }

    def __init__(self, config: Any):
        super().__init__(config)
        if config.text_config.model_type != "qwen2":
            raise UnsupportedModelError(
                f"text_config.model_type={config.text_config.model_type!r}",
                "'qwen2', as published",
                "load a model with that text model",
            )

    def describe_keys(self) -> str:
        patch = self.config.vision_config.patch_size
        return f"a grid of the picture's own shape, cells of merge_size × {patch} px among the text's tokens"

    def _merge_sizes(self, inputs: Mapping[str, Tensor]) -> int | Tensor:
        sizes = inputs.get("image_merge_sizes")
        if sizes is None:
            return 1
        # the model interpolates its states: only of 2 × 2 patches is that their mean
        if not ((sizes == 1) | (sizes == 2)).all():
            raise ConfigError(
                f"merge_size={int(sizes.max())} of the image processor, at which the model leaves out patches",
                "1 or 2",
                "load the model's own processor",
            )
        return sizes[:, None]
