"""The loss of a word, worked out by hand."""

from __future__ import annotations

from math import log
from typing import get_args

import pytest
import torch

from lavender.alignment.losses import direct_loss, per_word_loss, prepared
from lavender.config import DIRECT_LOSSES, AttentionLoss
from lavender.maps import min_max

KINDS = pytest.mark.parametrize("kind", [kind for kind in get_args(AttentionLoss) if kind not in DIRECT_LOSSES])
DIVERGENCES = pytest.mark.parametrize("kind", ["published-mse", "published-kl", "published-js"])
STUDENT, TEACHER = torch.tensor([[[1.0, 0], [1, 0]]]), torch.tensor([[[1.0, 0], [0, 0]]])
A = 1e-6  # of FLOOR: cells of the distributions are (1 + a) or a over the sum of all four
LIT, DARK = (1 + A) / (2 + 4 * A), A / (2 + 4 * A)  # of the student: two lit cells
ONE, NONE = (1 + A) / (1 + 4 * A), A / (1 + 4 * A)  # of the teacher: one


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


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("published", 1 / 4),
        ("published-sum", 1),
        # ½, 0, ½, 0 against 1, 0, 0, 0: a quarter twice
        ("published-mse", (LIT - ONE) ** 2 + (LIT - NONE) ** 2 + 2 * (DARK - NONE) ** 2),
        # ln 2, and 10⁻⁶ · −13.1 for the lit cell that should be dark
        ("published-kl", ONE * log(ONE / LIT) + NONE * log(NONE / LIT) + 2 * NONE * log(NONE / DARK)),
        # against ¾, 0, ¼, 0
        (
            "published-js",
            (LIT * log(2 * LIT / (LIT + ONE)) + LIT * log(2 * LIT / (LIT + NONE))) / 2
            + (ONE * log(2 * ONE / (LIT + ONE)) + NONE * log(2 * NONE / (LIT + NONE))) / 2
            + DARK * log(2 * DARK / (DARK + NONE))
            + NONE * log(2 * NONE / (DARK + NONE)),
        ),
    ],
)
def test_each_kind_by_hand(kind, loss):
    """Two lit cells of four where the teacher has one."""
    assert loss == pytest.approx(
        {
            "published": 0.25,
            "published-sum": 1,
            "published-mse": 0.5,
            "published-kl": log(2),
            "published-js": 0.75 * log(4 / 3),
        }[kind],
        abs=2e-5,
    )
    assert per_word_loss(STUDENT, TEACHER, kind).tolist() == pytest.approx([loss], abs=2e-6)


def test_a_missed_place_costs_no_more_than_the_floor_allows():
    """1, 0, 0, 0 against 0, 0, 1, 0: ln 10⁶ = 13.8."""
    found = per_word_loss(TEACHER.flip(1), TEACHER, "published-kl")
    assert found.tolist() == pytest.approx([(ONE - NONE) * log(ONE / NONE)], rel=1e-5)
    assert found.tolist() == pytest.approx([log(1e6)], abs=1e-4)


def test_js_is_symmetric_and_at_most_ln_2():
    ours, theirs = min_max(torch.rand(101, 5, 7) ** 8), min_max(torch.rand(101, 5, 7) ** 8)
    found = per_word_loss(ours, theirs, "published-js")
    torch.testing.assert_close(per_word_loss(theirs, ours, "published-js"), found, rtol=0, atol=1e-5)
    assert 0.2 < found.min() <= found.max() < log(2)
    apart = per_word_loss(TEACHER.flip(1), TEACHER, "published-js")  # no cell in common
    assert log(2) - 1e-4 < apart.item() <= log(2)


@KINDS
def test_zero_for_equal_maps_alone(kind):
    teacher = min_max(torch.rand(7, 5, 3))
    assert per_word_loss(teacher, teacher, kind).tolist() == pytest.approx([0] * 7, abs=1e-6)
    student = teacher.clone()
    student[:, 2, 1] = 1 - student[:, 2, 1]  # one cell of each
    least = (1 - 2 * teacher[:, 2, 1]).abs()
    found = per_word_loss(student, teacher, kind)
    assert (found[least > 0.1] > 1e-5).all()


@DIVERGENCES
def test_a_distribution_has_no_level_of_brightness(kind):
    student, teacher = torch.rand(3, 5, 7) / 2 + 0.25, torch.rand(3, 5, 7)
    torch.testing.assert_close(
        per_word_loss(student * 2, teacher, kind), per_word_loss(student, teacher, kind), rtol=1e-4, atol=1e-6
    )


@KINDS
def test_words_cost_on_their_own(kind):
    student, teacher = torch.rand(3, 5, 7), torch.rand(3, 5, 7)
    whole = per_word_loss(student, teacher, kind)
    assert whole.shape == (3,)
    torch.testing.assert_close(whole[1:2], per_word_loss(student[1:2], teacher[1:2], kind))


@KINDS
def test_no_word_no_loss_of_any_kind(kind):
    student = torch.zeros(0, 5, 7, requires_grad=True)
    loss = per_word_loss(student, torch.zeros(0, 5, 7), kind)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert student.grad is not None


@KINDS
@pytest.mark.parametrize(("ours", "theirs"), [(0.0, None), (0.7, None), (None, 0.0), (None, 0.7), (0.0, 0.0)])
def test_flat_maps_give_finite_gradients(kind, ours, theirs):
    student = (torch.rand(2, 5, 7) if ours is None else torch.full((2, 5, 7), ours)).requires_grad_()
    loss = per_word_loss(
        min_max(student), torch.rand(2, 5, 7) if theirs is None else torch.full((2, 5, 7), theirs), kind
    )
    assert loss.isfinite().all()
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


# the losses of the attention itself

QUARTERS = torch.tensor([[[0.1, 0.2, 0.3, 0.4]], [[0.4, 0.4, 0.1, 0.1]]])  # two layers, one word, four keys


@pytest.mark.parametrize(
    ("kind", "heat", "loss"),
    [
        ("mass", [1, 1, 0, 0], -(log(0.3) + log(0.8)) / 2),
        ("mass", [1, 0.5, 0, 0], -(log(0.2) + log(0.6)) / 2),
        ("mass", [1, 1, 1, 1], 0),
        ("kl", [1, 0, 0, 0], -(log(0.1) + log(0.4)) / 2),
        ("kl", [1, 1, 0, 0], (log(0.5 / 0.1) + log(0.5 / 0.2) + 2 * log(0.5 / 0.4)) / 4),
        ("kl", [0.1, 0.2, 0.3, 0.4], (0.1 * log(1 / 4) + 0.2 * log(1 / 2) + 0.3 * log(3) + 0.4 * log(4)) / 2),
    ],
)
@pytest.mark.parametrize("scale", [1, 0.01], ids=["", "of a row that mostly sees text"])
def test_direct_losses_by_hand(kind, heat, loss, scale):
    """The level counts: of the first layer's attention three tenths are on the map, of the second's eight tenths."""
    computed = direct_loss(scale * QUARTERS, torch.tensor([heat], dtype=torch.float32), kind)
    assert computed.tolist() == pytest.approx([loss], abs=2e-5)


def test_direct_losses_fall_as_attention_moves_to_the_map():
    """The published loss of such maps is the same, since each is 0 or 1 in the right place."""
    heat = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    levels = [torch.tensor([[[level / 2, level / 2, (1 - level) / 2, (1 - level) / 2]]]) for level in (0.52, 0.7, 0.95)]
    for kind in ("mass", "kl"):
        losses = [direct_loss(level, heat, kind).item() for level in levels]
        assert losses == sorted(losses, reverse=True)
        assert losses[0] - losses[2] > 0.5
    published = [per_word_loss(min_max(level.view(1, 2, 2)), heat.view(1, 2, 2)).item() for level in levels]
    assert max(published) < 1e-6


def test_what_cannot_be_on_the_map_stays_finite():
    attention = torch.tensor([[[0.0, 0.0, 1.0]]], requires_grad=True)
    for kind in ("mass", "kl"):
        loss = direct_loss(attention, torch.tensor([[1.0, 0.0, 0.0]]), kind).sum()
        (gradient,) = torch.autograd.grad(loss, attention)
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "heat"),
    [
        ({}, [0, 1 / 4, 1 / 2, 1]),
        ({"sharpen": 2}, [0, 1 / 16, 1 / 4, 1]),
        ({"subtract_background": True}, [0, 0, 1 / 3, 1]),
        ({"subtract_background": True, "sharpen": 2}, [0, 0, 1 / 9, 1]),
    ],
)
def test_targets_by_hand(settings, heat):
    """The median of an even number of cells is the lower of the two in the middle: 3."""
    maps = torch.tensor([[[2.0, 3.0], [4.0, 6.0]]])
    torch.testing.assert_close(prepared(maps, **settings).flatten(), torch.tensor(heat), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", [0.0, 0.3, 5.0])
def test_a_map_without_contrast_is_1_everywhere(level):
    for subtract in (False, True):
        assert torch.equal(prepared(torch.full((1, 3, 3), level), 2.0, subtract), torch.ones(1, 3, 3))


def test_the_mask_of_a_large_thing_stays_as_it_is():
    """Its median is its maximum, so that subtracting it would leave nothing."""
    mask = torch.tensor([[[1.0, 1.0, 1.0, 0.0]]])
    assert torch.equal(prepared(mask, subtract_background=True), mask)


@pytest.mark.parametrize("kind", ["mass", "kl"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_attention_that_is_not_finite_is_not_hidden(kind, value):
    attention = torch.tensor([[[0.2, 0.8], [0.5, 0.5]], [[value, 0.1], [0.5, 0.5]]])
    losses = direct_loss(attention, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), kind)
    assert losses.isfinite().tolist() == [False, True]


@pytest.mark.parametrize("kind", ["mass", "kl"])
def test_a_layer_that_does_not_see_the_picture_does_not_count(kind):
    """As a sliding layer far behind the picture: the loss is that of the other layers."""
    heat = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    seen = QUARTERS
    both = torch.cat([seen, torch.zeros_like(seen[:1])])
    torch.testing.assert_close(direct_loss(both, heat, kind), direct_loss(seen, heat, kind))
    assert direct_loss(torch.zeros(2, 1, 4), heat, kind).tolist() == [0]
    other = torch.cat([seen, torch.tensor([[[0.0, 0.0, 0.5, 0.5]]])])  # sees keys of another picture alone
    sees = torch.tensor([[True]] * len(seen) + [[False]])
    torch.testing.assert_close(direct_loss(other, heat, kind, sees), direct_loss(seen, heat, kind))
