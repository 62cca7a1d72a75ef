"""The families of teachers we know, by the class of their pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import AutoencoderTiny, DiffusionPipeline
from diffusers.utils import logging
from torch import nn

from lavender.errors import ModelError, UnsupportedModelError
from lavender.model_files import check_files, load_weights, quiet
from lavender.teachers.diffusion.base import TeacherFamily
from lavender.teachers.diffusion.stable_diffusion import StableDiffusion, StableDiffusionXL
from lavender.teachers.diffusion.stable_diffusion_3 import StableDiffusion3

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

    Raises:
        ModelError: a part is missing, damaged or not finite; inside `lavender.model_files.loading`, all else too.
        UnsupportedModelError: no family of this class.
    """
    check_files(path)
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise ModelError(f"the folder {path}, without model_index.json", "a diffusion pipeline", "name its folder")
    index = DiffusionPipeline.load_config(path)
    name = index.get("_class_name")
    family = _named(str(name), f"{path}, a {name}")
    wanted = {part: value for part, value in family.optional_parts.items() if value is None}
    folder = path
    if not Path(path).is_dir():
        folder = str(DiffusionPipeline.download(path, use_safetensors=True, **wanted))
    parts = {
        part: _load_part(Path(folder) / part, index[part], **options)
        for part, value in index.items()
        if part not in family.optional_parts and isinstance(value, list | tuple) and value[0] is not None
    }
    models = {part: one for part, one in parts.items() if one is not None}
    with quiet(logging):
        return family(family.pipeline_class.from_pretrained(folder, **models, **family.optional_parts, **options))


def load_tiny_vae(path: str, **options: Any) -> AutoencoderTiny:
    """Load a tiny autoencoder in the place of a teacher's own. Raises ModelError as `load_family`."""
    check_files(path)
    return load_weights(AutoencoderTiny, path, _empty(AutoencoderTiny, path), use_safetensors=True, **options)


def _load_part(folder: Path, named: Any, **options: Any) -> nn.Module | None:
    """A part of a pipeline with weights; None for one without, such as a tokenizer, whose files alone are checked."""
    check_files(folder)
    library, name = named
    cls = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), str(name), None)
    if not isinstance(cls, type):
        raise ModelError(f"{library}.{name} as {folder}", "a class of diffusers or transformers", "use another teacher")
    if not issubclass(cls, diffusers.ModelMixin | transformers.PreTrainedModel):
        return None
    if not folder.is_dir():
        raise ModelError(f"no folder {folder}", f"a {name}, which model_index.json names", "get all of the pipeline")
    return load_weights(cls, folder, _empty(cls, folder), use_safetensors=True, **options)


def _empty(cls: Any, path: str | Path) -> Callable[[], nn.Module]:
    """What builds a model of the config at a path."""
    if issubclass(cls, transformers.PreTrainedModel):
        return lambda: cls(cls.config_class.from_pretrained(path))
    return lambda: cls.from_config(cls.load_config(path))


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
