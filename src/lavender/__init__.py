"""Diffusion Instruction Tuning: fine-tune a vision-language model with the word maps of a diffusion model.

The public names are imported when first used, so `import lavender` is quick and loads no torch. What fewer users need
is in `lavender.training` and `lavender.config`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavender.config import ExtractionConfig
    from lavender.data.samples import read_samples, to_dataset
    from lavender.data.store import MapStore
    from lavender.maps import WordMaps
    from lavender.students.word_maps import AnsweredPicture, student_maps
    from lavender.teachers.diffusion.teacher import Teacher
    from lavender.teachers.extract import extract
    from lavender.training.exporting import export
    from lavender.training.trainer import LavenderConfig, LavenderTrainer

__version__ = version("lavender-vlm")

__all__ = [
    "AnsweredPicture",
    "ExtractionConfig",
    "LavenderConfig",
    "LavenderTrainer",
    "MapStore",
    "Teacher",
    "WordMaps",
    "export",
    "extract",
    "read_samples",
    "student_maps",
    "to_dataset",
]

_HOMES = {
    "AnsweredPicture": "lavender.students.word_maps",
    "ExtractionConfig": "lavender.config",
    "LavenderConfig": "lavender.training.trainer",
    "LavenderTrainer": "lavender.training.trainer",
    "MapStore": "lavender.data.store",
    "Teacher": "lavender.teachers.diffusion.teacher",
    "WordMaps": "lavender.maps",
    "export": "lavender.training.exporting",
    "extract": "lavender.teachers.extract",
    "read_samples": "lavender.data.samples",
    "student_maps": "lavender.students.word_maps",
    "to_dataset": "lavender.data.samples",
}

_OLD_NAMES = {
    "AlignmentArguments": ("lavender.training", "AlignmentArguments"),
    "AlignmentConfig": ("lavender.config", "AlignmentConfig"),
    "AlignmentMixin": ("lavender.training", "AlignmentMixin"),
    "Reading": ("lavender", "AnsweredPicture"),
}


def lazy_attributes(
    package: str, homes: Mapping[str, str], old_names: Mapping[str, tuple[str, str]] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the module-level `__getattr__` and `__dir__` (PEP 562) of a package that imports its names when first used.

    Args:
        package: the package's `__name__`.
        homes: per public name, the module that defines it. No submodule of the package may have a public name:
            importing it would put the module in the place of the name.
        old_names: per former name, the package and name to use instead. Using one gives a DeprecationWarning.
    """

    def get_attribute(name: str) -> Any:
        if name in homes:
            return getattr(import_module(homes[name]), name)
        if old_names and name in old_names:
            home, new_name = old_names[name]
            warnings.warn(
                f"{package}.{name} is deprecated: use `from {home} import {new_name}`", DeprecationWarning, stacklevel=2
            )
            return getattr(import_module(home), new_name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def list_attributes() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get_attribute, list_attributes


__getattr__, __dir__ = lazy_attributes(__name__, _HOMES, _OLD_NAMES)
