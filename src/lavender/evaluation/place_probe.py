"""A linear reader of image features: which words could be learned from them, before a model is tuned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FOLDS = 5
RIDGE = 0.03
"""Weight of the penalty, relative to features of variance 1. Chosen on development scenes of the world."""


def read_words(features: Tensor, words: Sequence[int], pictures: Sequence[int]) -> Tensor:
    """Which words a linear reader gets right that was fitted on other pictures: float (case,), 0 or 1.

    Ridge regression to one-hot words, cross-validated over pictures: all cases of a picture are in one fold.

    Examples:
        >>> import torch
        >>> from lavender.evaluation.place_probe import read_words
        >>> words, pictures = [0, 1] * 10, range(20)
        >>> read_words(torch.eye(2)[words], words, pictures).mean().item()
        1.0

    Args:
        features: (case, width).
        words: the number of each case's word.
        pictures: the number of each case's picture.
    """
    classes, groups = torch.tensor(words), torch.tensor(pictures)
    folds = torch.unique(groups, return_inverse=True)[1] % FOLDS
    hits = torch.zeros(len(classes))
    for fold in folds.unique():
        test = folds == fold
        if not test.all():
            hits[test] = (_predicted(features[~test], classes[~test], features[test]) == classes[test]).float()
    return hits


def _predicted(train: Tensor, classes: Tensor, test: Tensor) -> Tensor:
    """The word of each row of `test`, (row,). Solved in the space of samples, of which there are few."""
    train, test = train.double(), test.double()
    mean, scale = train.mean(dim=0), train.std(dim=0, correction=0).clamp_min(1e-6)
    train, test = (train - mean) / scale, (test - mean) / scale
    targets = F.one_hot(classes, int(classes.max()) + 1).double()
    shares, width = targets.mean(dim=0), train.shape[1]
    kernel = train @ train.T / width + RIDGE * torch.eye(len(train), dtype=torch.double)
    weights = torch.linalg.solve(kernel, targets - shares)
    return (test @ train.T / width @ weights + shares).argmax(dim=1)
