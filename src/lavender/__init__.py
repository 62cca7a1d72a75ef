"""Diffusion Instruction Tuning: word maps of a diffusion model pull a VLM's attention while it is fine-tuned.

Public names are imported when first used, so `import lavender` is quick and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavender.alignment_mixin import AlignmentMixin
    from lavender.arguments import AlignmentArguments
    from lavender.attention import Reading, student_maps
    from lavender.checkpoints import export
    from lavender.config import AlignmentConfig, ExtractionConfig
    from lavender.data import read_samples, to_dataset
    from lavender.diffusion.teacher import Teacher
    from lavender.extraction import extract
    from lavender.maps import WordMaps
    from lavender.store import MapStore
    from lavender.trainer import LavenderConfig, LavenderTrainer

__version__ = version("lavender-vlm")

_HOMES = {
    "AlignmentArguments": "arguments",
    "AlignmentConfig": "config",
    "AlignmentMixin": "alignment_mixin",
    "ExtractionConfig": "config",
    "LavenderConfig": "trainer",
    "LavenderTrainer": "trainer",
    "MapStore": "store",
    "Reading": "attention",
    "Teacher": "diffusion.teacher",
    "WordMaps": "maps",
    "export": "checkpoints",
    "extract": "extraction",
    "read_samples": "data",
    "student_maps": "attention",
    "to_dataset": "data",
}

__all__ = [
    "AlignmentArguments", "AlignmentConfig", "AlignmentMixin", "ExtractionConfig", "LavenderConfig",
    "LavenderTrainer", "MapStore", "Reading", "Teacher", "WordMaps", "__version__", "export", "extract",
    "read_samples", "student_maps", "to_dataset",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lavender' has no attribute {name!r}")
    return getattr(import_module(f"lavender.{_HOMES[name]}"), name)
