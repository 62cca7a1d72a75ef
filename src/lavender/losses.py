"""The alignment loss: how far the student's map of a word is from the teacher's."""

from __future__ import annotations

from torch import Tensor

from lavender.maps import min_max


def per_word_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """‖δ‖² of Eq. 9 as a mean over cells, on min–max maps.

    Args:
        student: Aligner's output, (word, rows, cols) in [0, 1].
        teacher: heat maps, (word, rows, cols); scaled to [0, 1] here.

    Returns:
        (word,), each in [0, 1].
    """
    return (student - min_max(teacher)).square().mean(dim=(-2, -1))
