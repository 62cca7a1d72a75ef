"""A trainer's loader of training samples with augmented pictures. Evaluation, probe and checks see whole pictures."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
from transformers import Trainer

from lavender.alignment.augment import DRAW, Augment


@contextmanager
def augmented(trainer: Trainer, augment: Augment | None) -> Iterator[None]:
    """Inside, the trainer's collator augments pictures, and each row of its training set has a number of its own.

    Without `augment` nothing changes. A stream has no numbers, so its repeated samples have one view per epoch.
    """
    collator, dataset = trainer.data_collator, trainer.train_dataset
    if augment is not None:
        augmenting: Any = copy.copy(collator)
        augmenting.augment = augment
        trainer.data_collator = augmenting
        if isinstance(dataset, datasets.Dataset):
            numbers = np.arange(len(dataset))
            trainer.train_dataset = dataset.add_column(DRAW, numbers)
    try:
        yield
    finally:
        trainer.data_collator, trainer.train_dataset = collator, dataset
