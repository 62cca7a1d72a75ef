"""The alignment loss: how far the student's map of a word is from the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from lavender.config import AttentionLoss
from lavender.maps import min_max

FLOOR = 1e-6  # added to every cell before a map becomes a distribution, so that logarithms are finite


def per_word_loss(student: Tensor, teacher: Tensor, kind: AttentionLoss = "min-max") -> Tensor:
    """The loss of each word.

    Example:
        >>> import torch
        >>> from lavender.alignment.losses import per_word_loss
        >>> per_word_loss(torch.rand(2, 24, 24), torch.rand(2, 24, 24)).shape
        torch.Size([2])

    Args:
        student: the Aligner's output, (word, rows, cols) in [0, 1].
        teacher: the teacher's maps, (word, rows, cols), 0 or more; scaled to [0, 1] here.
        kind: "min-max" is the squared difference of Eq. 9 as a mean over cells, the authors' form. "mse" (summed over
            cells), "kl" (teacher ‖ student) and "js" (Jensen–Shannon) compare the maps as distributions. "min-max-sum",
            only to reproduce the paper, is "min-max" summed over cells, as Eq. 9 is written.

    Returns:
        (word,). "min-max" is in [0, 1]; "kl" and "js" are in nats, "js" at most ln 2.
    """
    teacher = min_max(teacher)
    if kind in ("min-max", "min-max-sum"):
        error = (student - teacher).square()
        return error.mean(dim=(-2, -1)) if kind == "min-max" else error.sum(dim=(-2, -1))
    student, teacher = _distribution(student), _distribution(teacher)
    if kind == "mse":
        return (student - teacher).square().sum(dim=(-2, -1))
    if kind == "kl":
        return _kl(teacher, student)
    middle = (student + teacher) / 2
    return (_kl(student, middle) + _kl(teacher, middle)) / 2


def _distribution(maps: Tensor) -> Tensor:
    maps = maps + FLOOR
    return maps / maps.sum(dim=(-2, -1), keepdim=True)


def _kl(truth: Tensor, estimate: Tensor) -> Tensor:
    return (truth * (torch.log(truth) - torch.log(estimate))).sum(dim=(-2, -1))
