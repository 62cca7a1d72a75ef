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
    family = _named(pipeline_class.__name__, f"a {pipeline_class.__name__}")
    if family.pipeline_class is not pipeline_class:
        raise _unsupported(f"a {pipeline_class.__name__} that is not diffusers' own")
    return family


def load_family(path: str, **options: Any) -> TeacherFamily:
    """Load a pipeline folder or hub id of any family, its weights from safetensors only.

    The class is read from the pipeline's own `model_index.json`, before any weight is.
    """
    name = DiffusionPipeline.load_config(path)["_class_name"]
    family = _named(name, f"{path}, a {name}")
    return family(family.pipeline_class.from_pretrained(path, use_safetensors=True, **family.optional_parts, **options))


def _named(name: str, what: str) -> type[TeacherFamily]:
    for family in FAMILIES:
        if family.pipeline_class.__name__ == name:
            return family
    raise _unsupported(what)


def _unsupported(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        what,
        f"one of {', '.join(family.pipeline_class.__name__ for family in FAMILIES)}",
        "use such a teacher, or write a family: one file in lavender/diffusion and one line in its registry",
    )
