"""Fine-tuning with the alignment loss: trainers for TRL and transformers, and the export of the tuned model.

The public names are imported when first used; the settings of the loss are `lavender.config.AlignmentConfig`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lavender import lazy_attributes

if TYPE_CHECKING:
    from lavender.training.arguments import AlignmentArguments
    from lavender.training.exporting import export
    from lavender.training.mixin import AlignmentMixin
    from lavender.training.trainer import LavenderConfig, LavenderTrainer

__all__ = ["AlignmentArguments", "AlignmentMixin", "LavenderConfig", "LavenderTrainer", "export"]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "AlignmentArguments": "lavender.training.arguments",
        "AlignmentMixin": "lavender.training.mixin",
        "LavenderConfig": "lavender.training.trainer",
        "LavenderTrainer": "lavender.training.trainer",
        "export": "lavender.training.exporting",
    },
)
