"""The loss of a word, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from lavender.losses import per_word_loss


def test_mean_square_over_cells_of_each_word():
    student = torch.tensor([[[0.5, 1.0, 0.0]], [[1.0, 1.0, 1.0]]])
    teacher = torch.tensor([[[0.1, 0.2, 0.3]], [[0.0, 0.5, 1.0]]])  # min-max: 0, ½, 1 both
    loss = per_word_loss(student, teacher)
    assert loss.tolist() == pytest.approx([(0.25 + 0.25 + 1) / 3, (1 + 0.25 + 0) / 3], abs=1e-5)


def test_equal_maps_cost_nothing_and_opposite_ones_one():
    teacher = (torch.arange(35.0).view(1, 5, 7) >= 18).float()
    assert per_word_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-11)
    assert per_word_loss(1 - teacher, teacher).item() == pytest.approx(1, abs=1e-5)


def test_the_teachers_scale_and_level_do_not_matter():
    student, teacher = torch.rand(2, 5, 7), torch.rand(2, 5, 7)
    torch.testing.assert_close(per_word_loss(student, teacher * 0.3 + 0.2), per_word_loss(student, teacher))


def test_a_flat_teacher_asks_for_nothing_anywhere():
    student = torch.full((1, 5, 7), 0.5)
    assert per_word_loss(student, torch.full((1, 5, 7), 0.7)).item() == pytest.approx(0.25)


def test_no_word_no_loss():
    assert per_word_loss(torch.zeros(0, 5, 7), torch.zeros(0, 5, 7)).shape == (0,)
