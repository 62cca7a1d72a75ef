"""The families of teachers we know, by the class of their pipeline."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from lavender.diffusion.base import TeacherFamily
from lavender.diffusion.sd3 import StableDiffusion3
from lavender.diffusion.unet import StableDiffusion, StableDiffusionXL
from lavender.errors import UnsupportedModelError

FAMILIES: tuple[type[TeacherFamily], ...] = (StableDiffusion, StableDiffusionXL, StableDiffusion3)


def family_of(pipeline_class: type[DiffusionPipeline]) -> type[TeacherFamily]:
    """The family of a class of pipelines. Raises UnsupportedModelError for one without."""
    for family in FAMILIES:
        if family.pipeline_class is pipeline_class:
            return family
    known = [family.pipeline_class.__name__ for family in FAMILIES]
    raise UnsupportedModelError(
        f"a {pipeline_class.__name__}",
        f"one of {', '.join(known)}",
        "use such a teacher, or write a family: one file in lavender/diffusion and one line in its registry",
    )


def load_family(path: str, **options: Any) -> TeacherFamily:
    """Load a pipeline folder or hub id of any family, its weights from safetensors only.

    The class is read from the pipeline's own `model_index.json`, before any weight is.
    """
    named = DiffusionPipeline.load_config(path)["_class_name"]
    known = {family.pipeline_class.__name__: family for family in FAMILIES}
    family = known.get(named)
    if family is None:
        raise UnsupportedModelError(
            f"{path}, a {named}", f"one of {', '.join(known)}",
            "use such a teacher, or write a family: one file in lavender/diffusion and one line in its registry",
        )  # fmt: skip
    pipeline = family.pipeline_class.from_pretrained(path, use_safetensors=True, **family.optional_parts, **options)
    return family(pipeline)
