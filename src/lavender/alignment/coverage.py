"""How many samples and words have maps, and the reasons why others have none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lavender.alignment.examples import REFUSALS
from lavender.students.locate import BEYOND, CHANGED, UNKNOWN, UNSEEN

NO_PICTURE = "sample without a picture"
NO_MAPS = "sample without maps in the store"
NO_WORDS = "sample none of whose mapped words is aligned"
UNPLACED = "sample whose answer is not found in its tokens"
WITHOUT = (NO_PICTURE, NO_MAPS, NO_WORDS, UNPLACED)
"""Reasons why a sample that is trained on has no mapped word."""
NO_RECORD = "turn without maps in the store"  # counted if questions are aligned, in samples that have other maps
NO_NOUN = "attribute whose noun is not found"
NOUN_WITHOUT = "attribute whose noun has no map"
SUBJECT_WITHOUT = "word about a phrase that has no map"
LEAST_CONFIDENT = "word among the least confident of its text"
OUTSIDE = "word whose map lies in a part of the picture that the model does not see"
NOT_OF_TEXTS = "word of an answer with an entry in the column about, while only questions are aligned"
CROPPED = "word whose place a random crop cut off"
REASONS = (
    *(NO_PICTURE, NO_MAPS, UNSEEN, BEYOND, UNKNOWN, CHANGED, NO_WORDS, UNPLACED),
    *REFUSALS,
    *(NO_RECORD, NO_NOUN, NOUN_WITHOUT, SUBJECT_WITHOUT, LEAST_CONFIDENT, OUTSIDE, NOT_OF_TEXTS),
    CROPPED,
)
"""Reasons why a sample, a turn or a word has no map, in the order of a batch's counts.

Each sample has a mapped word or one reason of `WITHOUT` or `REFUSALS`; the other reasons are of words and turns. New
ones are added at the end, so that the counts of earlier checkpoints can be read.
"""


@dataclass
class Coverage:
    """How many samples and words have maps, and why the others have none.

    Attributes:
        samples: number of samples.
        mapped_samples: number of samples with at least one mapped word.
        words: number of mapped words, of answers and questions. A word with maps on several pictures counts once for
            each; one that is aligned in several rows counts once.
        dropped: number of samples, turns or words for each of `REASONS`.
    """

    samples: int = 0
    mapped_samples: int = 0
    words: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Share of samples with at least one mapped word, among those with a picture that the model takes; 0 to 1."""
        with_picture = self.samples - sum(self.dropped[reason] for reason in (NO_PICTURE, *REFUSALS))
        return self.mapped_samples / with_picture if with_picture else 0.0

    def counts(self) -> Tensor:
        """The numbers as a tensor for a batch: long (3 + reasons,)."""
        assert set(self.dropped) <= set(REASONS)
        return torch.tensor(
            [self.samples, self.mapped_samples, self.words, *(self.dropped[reason] for reason in REASONS)]
        )

    @classmethod
    def of(cls, counts: Tensor) -> Coverage:
        """The coverage of a tensor from `counts`, or of a sum of several."""
        samples, mapped, words, *dropped = counts.tolist()
        return cls(samples, mapped, words, +Counter(dict(zip(REASONS, dropped, strict=True))))
