"""Diffusion Instruction Tuning: word maps of a diffusion model pull a VLM's attention while it is fine-tuned.

Public names are imported when first used, so `import lavender` is quick and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavender.config import AlignmentConfig, ExtractionConfig
    from lavender.data.samples import read_samples, to_dataset
    from lavender.data.store import MapStore
    from lavender.maps import WordMaps
    from lavender.students.word_maps import AnsweredPicture, student_maps
    from lavender.teachers.diffusion.teacher import Teacher
    from lavender.teachers.extract import extract
    from lavender.training.arguments import AlignmentArguments
    from lavender.training.export import export
    from lavender.training.mixin import AlignmentMixin
    from lavender.training.trainer import LavenderConfig, LavenderTrainer

__version__ = version("lavender-vlm")

_HOMES = {
    "AlignmentArguments": "training.arguments",
    "AlignmentConfig": "config",
    "AlignmentMixin": "training.mixin",
    "ExtractionConfig": "config",
    "LavenderConfig": "training.trainer",
    "LavenderTrainer": "training.trainer",
    "MapStore": "data.store",
    "AnsweredPicture": "students.word_maps",
    "Teacher": "teachers.diffusion.teacher",
    "WordMaps": "maps",
    "export": "training.export",
    "extract": "teachers.extract",
    "read_samples": "data.samples",
    "student_maps": "students.word_maps",
    "to_dataset": "data.samples",
}

__all__ = [
    "AlignmentArguments",
    "AlignmentConfig",
    "AlignmentMixin",
    "AnsweredPicture",
    "ExtractionConfig",
    "LavenderConfig",
    "LavenderTrainer",
    "MapStore",
    "Teacher",
    "WordMaps",
    "__version__",
    "export",
    "extract",
    "read_samples",
    "student_maps",
    "to_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lavender' has no attribute {name!r}")
    return getattr(import_module(f"lavender.{_HOMES[name]}"), name)
