"""The supported families of diffusion models, by their pipeline class, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers import AutoencoderTiny, DiffusionPipeline
from diffusers.utils import logging
from torch import nn

from lavender.config import ExtractionConfig
from lavender.errors import ConfigError, ModelError, UnsupportedModelError
from lavender.model_files import check_files, load_weights, loading, quiet
from lavender.teachers.diffusion.base import TeacherFamily
from lavender.teachers.diffusion.flux import Flux
from lavender.teachers.diffusion.flux_2 import Flux2Klein
from lavender.teachers.diffusion.pixart import PixArtSigma
from lavender.teachers.diffusion.qwen_image import QwenImage
from lavender.teachers.diffusion.sana import Sana
from lavender.teachers.diffusion.stable_diffusion import StableDiffusion, StableDiffusionXL
from lavender.teachers.diffusion.stable_diffusion_3 import StableDiffusion3

FAMILIES: tuple[type[TeacherFamily], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
    Flux,
    Flux2Klein,
    PixArtSigma,
    Sana,
    QwenImage,
)


def family_of(pipeline_class: type[DiffusionPipeline]) -> type[TeacherFamily]:
    """The family of a pipeline class. Raises UnsupportedModelError if no family supports it."""
    family = _family_named(pipeline_class.__name__, f"a {pipeline_class.__name__}")
    if family.pipeline_class is not pipeline_class:
        raise _unsupported_error(f"a {pipeline_class.__name__} that is not diffusers' own")
    return family


def load_family(path: str, t5: bool = False, **options: Any) -> TeacherFamily:
    """Load a pipeline of any family, its weights from safetensors only.

    The class is read from the pipeline's `model_index.json` before any weight is loaded.

    Args:
        path: a folder or hub id.
        t5: see `ExtractionConfig`.
        options: arguments of `from_pretrained`, such as `dtype`.

    Raises:
        ModelError: a part is missing, damaged or not finite. Call it inside `lavender.model_files.loading`, which turns
            the other errors of loading into ModelError too.
        UnsupportedModelError: no family supports this class.
    """
    check_files(path)
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise ModelError(f"the folder {path}, without model_index.json", "a diffusion pipeline", "name its folder")
    index = DiffusionPipeline.load_config(path)
    name = index.get("_class_name")
    family = _family_named(str(name), f"{path}, a {name}")
    optional = {part: value for part, value in family.optional_parts.items() if not (t5 and part in family.t5_parts)}
    left_out = {part: value for part, value in optional.items() if value is None}
    folder = path
    if not Path(path).is_dir():
        folder = str(DiffusionPipeline.download(path, use_safetensors=True, **left_out))
    parts = {
        part: _load_part(Path(folder) / part, index[part], **options)
        for part, value in index.items()
        if part not in optional and isinstance(value, list | tuple) and value[0] is not None
    }
    models = {part: one for part, one in parts.items() if one is not None}
    with quiet(logging):
        return family(family.pipeline_class.from_pretrained(folder, **models, **optional, **options))


def load_tiny_vae(family: TeacherFamily, path: str, **options: Any) -> AutoencoderTiny:
    """Load a tiny autoencoder that replaces the teacher's.

    Raises:
        ConfigError: it cannot, in this family.
        ModelError: it is missing or damaged.
    """
    if not family.takes_tiny_vae:
        got, expected = f"tiny_vae with a {type(family.pipeline).__name__}", "a model whose latents it makes"
        raise ConfigError(got, expected, "leave tiny_vae out")
    with loading("tiny_vae", path, consent=None):
        check_files(path)
        return load_weights(AutoencoderTiny, path, _builder_of(AutoencoderTiny, path), use_safetensors=True, **options)


def _load_part(folder: Path, named: Any, **options: Any) -> nn.Module | None:
    """Load a part that has weights. Of other parts, such as a tokenizer, only check the files, and return None."""
    check_files(folder)
    library, name = named
    cls = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), str(name), None)
    if not isinstance(cls, type):
        raise ModelError(f"{library}.{name} as {folder}", "a class of diffusers or transformers", "use another teacher")
    if not issubclass(cls, diffusers.ModelMixin | transformers.PreTrainedModel):
        return None
    if not folder.is_dir():
        raise ModelError(f"no folder {folder}", f"a {name}, which model_index.json names", "get all of the pipeline")
    return load_weights(cls, folder, _builder_of(cls, folder), use_safetensors=True, **options)


def _builder_of(cls: Any, path: str | Path) -> Callable[[], nn.Module]:
    """A function that builds a model with the config at a path, without its weights."""
    if issubclass(cls, transformers.PreTrainedModel):
        return lambda: cls(cls.config_class.from_pretrained(path))
    return lambda: cls.from_config(cls.load_config(path))


def _family_named(name: str, what: str) -> type[TeacherFamily]:
    for family in FAMILIES:
        if family.pipeline_class.__name__ == name:
            return family
    raise _unsupported_error(what)


def _unsupported_error(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        what,
        f"one of {', '.join(family.pipeline_class.__name__ for family in FAMILIES)}",
        "use one of these, or add a family: see TeacherFamily in lavender/teachers/diffusion/base.py",
    )


def check_pipeline(pipeline: Any, config: ExtractionConfig) -> None:
    """Check that a loaded pipeline stays on one device, and has the autoencoder that the config names.

    Raises:
        ConfigError: it does not.
    """
    if getattr(pipeline, "_offload_device", None) is not None:
        raise ConfigError(
            "a pipeline with offloading, whose parts move between devices",
            "a pipeline on one device",
            "leave enable_model_cpu_offload and enable_sequential_cpu_offload out, and call pipeline.to('cuda')",
        )
    if config.tiny_vae is not None and not isinstance(pipeline.vae, AutoencoderTiny):
        raise ConfigError(
            f"tiny_vae={config.tiny_vae!r} with a pipeline whose vae is a {type(pipeline.vae).__name__}",
            "a pipeline with that autoencoder",
            "set pipeline.vae to the AutoencoderTiny, or load the teacher with Teacher.from_pretrained",
        )
