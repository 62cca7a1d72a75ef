"""A trainer's loader of training samples with augmented pictures. Evaluation, probe and checks see whole pictures."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer

from lavender.alignment.augment import DRAW, Augment
from lavender.alignment.collator import AlignmentCollator
from lavender.errors import ConfigError
from lavender.training.refused_samples import is_stream


class Numbered(torch.utils.data.Dataset):
    """The rows of a data set, each with its index in the column `DRAW`.

    `datasets.Dataset.add_column` would copy all pictures to disk if rows were left out or repeated before.
    """

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index]) | {DRAW: int(index)}


def own_collator(trainer: Trainer, what: str) -> AlignmentCollator:
    """The trainer's collator. Raises ConfigError if the caller has put another one in its place."""
    collator = trainer.data_collator
    if not isinstance(collator, AlignmentCollator):
        raise ConfigError(
            f"{what} with a data_collator that was replaced after the trainer was made",
            "the trainer's own, which reads the samples",
            "leave the augmentation out" if what == "augmentation" else "replace it after add_replay",
        )
    return collator


@contextmanager
def augmented(trainer: Trainer, augment: Augment | None) -> Iterator[None]:
    """Inside, the trainer's collator augments pictures, and each row of its training set has a number of its own.

    Without `augment` nothing changes. A stream has no numbers, so its repeated samples have one view per epoch.
    """
    collator, dataset = trainer.data_collator, trainer.train_dataset
    if augment is not None:
        own_collator(trainer, "augmentation")
        augmenting: Any = copy.copy(collator)
        augmenting.augment = augment
        trainer.data_collator = augmenting
        if dataset is not None and not is_stream(dataset):
            trainer.train_dataset = Numbered(dataset)
    try:
        yield
    finally:
        trainer.data_collator, trainer.train_dataset = collator, dataset
