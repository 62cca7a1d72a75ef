"""Scores of single maps, and of maps that know nothing of the words; worked out by hand, on 5 × 7 pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lavender.errors import DataError
from lavender.evaluation.map_scores import (
    JudgedMap,
    average_precision,
    centre_prior,
    controls,
    iou,
    pointing,
    score_maps,
)

SIZE = (5, 7)


def heat_of(cells: dict[tuple[int, int], float]) -> torch.Tensor:
    heat = torch.zeros(SIZE)
    for cell, value in cells.items():
        heat[cell] = value
    return heat


def mask_of(*pixels: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    for pixel in pixels:
        mask[pixel] = True
    return mask


STEPS = heat_of({(0, 1): 1.0, (2, 3): 0.8, (4, 6): 0.5, (1, 1): 0.2})
MASK = mask_of((2, 3), (4, 6), (3, 0))


def test_the_pointing_game_has_a_tolerance_in_pixels():
    """The maximum at (0, 1) is √(3² + 1²) pixels from (3, 0), √(2² + 2²) from (2, 3)."""
    assert not pointing(STEPS, MASK)
    assert not pointing(STEPS, MASK, tolerance=math.sqrt(8) - 0.01)
    assert pointing(STEPS, MASK, tolerance=math.sqrt(8) + 0.01)
    assert not pointing(torch.zeros(SIZE), MASK, tolerance=100)
    assert not pointing(STEPS, np.zeros(SIZE, dtype=bool), tolerance=100)


@pytest.mark.parametrize(("threshold", "expected"), [(0.2, 2 / 5), (0.5, 2 / 4), (0.8, 1 / 4), (0.81, 0)])
def test_iou_of_one_map(threshold: float, expected: float):
    assert iou(STEPS, MASK, threshold) == pytest.approx(expected)


def test_average_precision_of_one_map():
    assert average_precision(STEPS, MASK) == pytest.approx((1 / 2 + 2 / 3 + 3 / 35) / 3)
    assert average_precision(torch.ones(SIZE), MASK) == pytest.approx(3 / 35)


def test_the_centre_prior_is_a_gaussian_of_a_quarter_of_each_side():
    """A cell's centre in row 0 of 5 is 0.4 of the side from the centre: 1.6 standard deviations."""
    prior = centre_prior(SIZE)
    assert prior.shape == SIZE
    assert prior[2, 3] == 1
    assert prior[0, 3].item() == pytest.approx(math.exp(-(1.6**2) / 2), rel=1e-5)
    assert prior[2, 0].item() == pytest.approx(math.exp(-((12 / 7) ** 2) / 2), rel=1e-5)
    torch.testing.assert_close(prior, prior.flip(0, 1))


def test_controls_of_two_words():
    """Two words in two corners, each with a perfect map: shuffled, each map points at the other's corner."""
    first, second = mask_of((0, 0)), mask_of((4, 6))
    judged = [JudgedMap(heat_of({(0, 0): 1.0}), first, 0), JudgedMap(heat_of({(4, 6): 1.0}), second, 0)]
    scores = controls(judged, 0.5)
    assert list(scores) == ["centre prior", "shuffled words", "uniform"]
    assert score_maps(judged, 0.5).pointing == 1
    assert scores["shuffled words"].pointing == scores["shuffled words"].iou_fixed == 0
    assert scores["centre prior"].pointing == 0
    assert scores["uniform"].pointing == pytest.approx(1 / 35)
    assert scores["uniform"].mass == pytest.approx(1 / 35)
    # the centre prior has corners last, so the mask's pixel comes with the four of its value
    assert scores["centre prior"].ap == pytest.approx(1 / 35)


def test_the_centre_prior_wins_where_things_are_in_the_centre():
    centred = mask_of((2, 3))
    judged = [JudgedMap(heat_of({(0, 0): 1.0}), centred, 0), JudgedMap(heat_of({(2, 3): 1.0}), centred, 0)]
    scores = controls(judged, 0.5)
    assert scores["centre prior"].pointing == scores["centre prior"].ap == 1
    assert scores["shuffled words"].pointing == 0.5


@pytest.mark.parametrize("number", [2, 3, 5, 8])
def test_a_shuffle_leaves_no_map_at_its_place(number: int):
    """Maps of single pixels, each the perfect map of its mask alone."""
    pixels = [(index // 7, index % 7) for index in range(number)]
    judged = [JudgedMap(heat_of({pixel: 1.0}), mask_of(pixel), 0) for pixel in pixels]
    for seed in range(10):
        assert controls(judged, 0.5, seed)["shuffled words"].pointing == 0


def test_one_map_cannot_be_shuffled():
    with pytest.raises(DataError, match=r"Got 1 maps\. Expected at least two, to shuffle them\."):
        controls([JudgedMap(STEPS, MASK, 0)], 0.5)
