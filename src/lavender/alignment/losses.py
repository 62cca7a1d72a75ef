"""The alignment loss: how far the student's map of a word is from the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from lavender.config import AttentionLoss
from lavender.maps import min_max

FLOOR = 1e-6  # added to every cell before a map becomes a distribution, so that logarithms are finite


def per_word_loss(student: Tensor, teacher: Tensor, kind: AttentionLoss = "min-max") -> Tensor:
    """The loss of each word.

    Args:
        student: Aligner's output, (word, rows, cols) in [0, 1].
        teacher: heat maps, (word, rows, cols); scaled to [0, 1] here.
        kind: "min-max", ‖δ‖² of Eq. 9 as a mean over cells, the authors' form; "min-max-sum", the same summed over
            cells, as Eq. 9 is written; or a divergence of the maps as distributions: "mse" (summed over cells), "kl"
            (teacher ‖ student) and "js" (Jensen–Shannon), in nats.

    Returns:
        (word,); in [0, 1] for "min-max", at most ln 2 for "js".
    """
    teacher = min_max(teacher)
    if kind in ("min-max", "min-max-sum"):
        error = (student - teacher).square()
        return error.mean(dim=(-2, -1)) if kind == "min-max" else error.sum(dim=(-2, -1))
    ours, theirs = _distribution(student), _distribution(teacher)
    if kind == "mse":
        return (ours - theirs).square().sum(dim=(-2, -1))
    if kind == "kl":
        return _kl(theirs, ours)
    middle = (ours + theirs) / 2
    return (_kl(ours, middle) + _kl(theirs, middle)) / 2


def _distribution(maps: Tensor) -> Tensor:
    maps = maps + FLOOR
    return maps / maps.sum(dim=(-2, -1), keepdim=True)


def _kl(truth: Tensor, found: Tensor) -> Tensor:
    return (truth * (torch.log(truth) - torch.log(found))).sum(dim=(-2, -1))
