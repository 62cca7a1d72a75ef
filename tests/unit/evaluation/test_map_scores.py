"""Scores of word maps, worked out by hand. Maps are 5 × 7 on masks of 11 × 13, or as large as their mask."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from lavender.errors import DataError
from lavender.evaluation.map_scores import (
    JudgedMap,
    best_threshold,
    kl_from_mask,
    mass_in_mask,
    pointing,
    resize_map,
    score_maps,
)


def mask_of(*pixels: tuple[int, int], size: tuple[int, int] = (11, 13)) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    for pixel in pixels:
        mask[pixel] = True
    return mask


def heat_of(cells: dict[tuple[int, int], float], grid: tuple[int, int] = (5, 7)) -> torch.Tensor:
    heat = torch.zeros(grid)
    for cell, value in cells.items():
        heat[cell] = value
    return heat


def iou(heat: torch.Tensor, mask: np.ndarray, threshold: float) -> float:
    return best_threshold([JudgedMap(heat, mask, 0)], (threshold,))[1]


def average_precision(heat: torch.Tensor, mask: np.ndarray) -> float:
    return score_maps([JudgedMap(heat, mask, 0)], 0.5).ap


# Four warm pixels of 35; the mask holds the second and third of them, and a cold one.
STEPS = heat_of({(0, 1): 1.0, (2, 3): 0.8, (4, 6): 0.5, (1, 1): 0.2})
STEPS_MASK = mask_of((2, 3), (4, 6), (3, 0), size=(5, 7))


def test_resizing_is_bilinear_with_pixel_centres():
    resized = resize_map(heat_of({(1, 5): 1.0}).bfloat16().requires_grad_(), (11, 13))
    assert resized.shape == (11, 13)
    assert resized.dtype == torch.float32
    assert not resized.requires_grad
    # pixel (3, 10) reads the map at row 3.5 · 5/11 − 0.5 = 1 + 1/11 and column 10.5 · 7/13 − 0.5 = 5 + 2/13
    assert resized[3, 10].item() == pytest.approx(10 / 11 * 11 / 13)
    assert resized.argmax().item() == 3 * 13 + 10


def test_pointing_is_at_the_maximum_without_tolerance():
    heat, elsewhere = heat_of({(1, 5): 1.0}), ~mask_of((3, 10))
    assert pointing(heat, mask_of((3, 10)))
    assert pointing(heat, torch.from_numpy(mask_of((3, 10))))
    assert not pointing(heat, elsewhere)


def test_equal_maxima_point_at_the_first_in_reading_order():
    twice = heat_of({(1, 5): 1.0, (3, 1): 1.0})
    assert pointing(twice, mask_of((1, 5), size=(5, 7)))
    assert not pointing(twice, mask_of((3, 1), size=(5, 7)))


def test_an_empty_map_points_nowhere_and_covers_nothing():
    everywhere = np.ones((11, 13), dtype=bool)
    assert not pointing(torch.zeros(5, 7), everywhere)
    assert iou(torch.zeros(5, 7), everywhere, 0.5) == 0
    assert iou(torch.ones(5, 7), everywhere, 0.5) == 1


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0, 3 / 35), (0.2, 2 / 5), (0.5, 2 / 4), (0.51, 1 / 4), (0.8, 1 / 4), (0.81, 0)]
)
def test_iou_at_a_share_of_the_maximum(threshold: float, expected: float):
    assert iou(STEPS, STEPS_MASK, threshold) == pytest.approx(expected)
    assert iou(7 * STEPS, STEPS_MASK, threshold) == pytest.approx(expected), "the map's scale must not matter"


def test_average_precision_counts_equal_pixels_together():
    # hits at ranks 2 and 3; the 31 cold pixels tie, so the last hit comes at the precision of all 35
    expected = (1 / 2 + 2 / 3 + 3 / 35) / 3
    assert average_precision(STEPS, STEPS_MASK) == pytest.approx(expected)
    assert average_precision(STEPS.flip(0, 1), STEPS_MASK[::-1, ::-1].copy()) == pytest.approx(expected)
    assert average_precision(torch.ones(5, 7), mask_of((0, 0), (10, 12), (5, 5))) == pytest.approx(3 / 143)


def test_auroc_counts_ties_half():
    """Of 32 pixels outside, the mask's three beat 31, 31 and none; the last ties with 30."""
    assert score_maps([JudgedMap(STEPS, STEPS_MASK, 0)], 0.5).auroc == pytest.approx((31 + 31 + 30 / 2) / (3 * 32))
    flat = JudgedMap(torch.ones(5, 7), STEPS_MASK, 0)
    assert score_maps([flat], 0.5).auroc == pytest.approx(0.5)
    everywhere = JudgedMap(STEPS, np.ones((5, 7), dtype=bool), 0)
    assert score_maps([everywhere], 0.5).auroc == 1


def test_mass_is_the_share_in_the_mask():
    """Of 1 + 0.8 + 0.5 + 0.2, the mask holds 0.8 and 0.5; the map's scale does not matter."""
    for scale in (1.0, 7.0, 1e-6):
        assert mass_in_mask(scale * STEPS, STEPS_MASK) == pytest.approx(1.3 / 2.5, rel=1e-5)
    for numbers in (STEPS_MASK.astype(int), STEPS_MASK.astype(np.uint8), 255 * STEPS_MASK.astype(np.uint8)):
        assert mass_in_mask(STEPS, numbers) == pytest.approx(1.3 / 2.5, rel=1e-5)  # not rows of these numbers
    assert mass_in_mask(STEPS, torch.from_numpy(~STEPS_MASK)) == pytest.approx(1.2 / 2.5, rel=1e-5)
    assert mass_in_mask(torch.ones(5, 7), STEPS_MASK) == pytest.approx(3 / 35, rel=1e-5)  # its share of the picture
    assert mass_in_mask(heat_of({(2, 3): 0.4}), np.ones((11, 13), dtype=bool)) == pytest.approx(1)
    # one of 2 × 3 cells is lit, of 4 × 6 pixels: the pixel in its corner has all of its heat, its neighbours 3/4
    lit = heat_of({(0, 0): 1.0}, (2, 3))
    row = col = np.array([1, 3 / 4, 1 / 4, 0])
    assert mass_in_mask(lit, mask_of((0, 0), (0, 1), size=(4, 6))) == pytest.approx(
        (1 + 3 / 4) / (row.sum() * col.sum()), rel=1e-5
    )


def test_pointing_by_the_size_of_the_mask():
    """Of 35 pixels, 2 are 5.7 %, 3 are 8.6 % and 4 are 11.4 %."""
    masks = [
        mask_of((0, 1), (0, 2), size=(5, 7)),
        STEPS_MASK,
        mask_of((0, 1), *[(3, c) for c in range(3)], size=(5, 7)),
    ]
    scores = score_maps([JudgedMap(STEPS, mask, 0) for mask in masks], 0.5)
    assert scores.pointing_by_size == {"small": 1, "medium": 0, "large": 1}
    assert scores.words_by_size == {"small": 1, "medium": 1, "large": 1}


def test_the_best_threshold_is_the_lowest_of_equals():
    judged = [JudgedMap(STEPS, STEPS_MASK, 0)]
    assert best_threshold(judged) == (0.25, pytest.approx(0.5))
    assert best_threshold(judged, (0.9, 0.6, 0.1)) == (0.1, pytest.approx(0.4))


def test_scores_of_three_maps():
    flat = torch.ones(5, 7)
    spot = heat_of({(2, 3): 1.0})
    centred = mask_of((2, 3), size=(5, 7))
    scores = score_maps(
        [
            JudgedMap(STEPS, STEPS_MASK, order=1, wrong=spot),  # misses; the other word's map hits this word's mask
            JudgedMap(spot, centred, order=0, wrong=STEPS),  # hits; the other map points elsewhere
            JudgedMap(
                flat, mask_of((0, 0), size=(5, 7)), order=1, wrong=spot
            ),  # hits by reading order; the other misses
        ],
        iou_threshold=0.6,
    )
    assert scores.pointing == pytest.approx(2 / 3)
    assert scores.pointing_by_mention == {0: 1.0, 1: 0.5}
    assert list(scores.pointing_by_mention) == [0, 1]
    assert scores.words_by_mention == {0: 1, 1: 2}
    assert scores.iou_fixed == pytest.approx((1 / 4 + 1 + 1 / 35) / 3)
    assert scores.iou_threshold == 0.6
    assert (scores.best_threshold, scores.iou_best) == (0.25, pytest.approx((1 / 2 + 1 + 1 / 35) / 3))
    assert scores.ap == pytest.approx(((1 / 2 + 2 / 3 + 3 / 35) / 3 + 1 + 1 / 35) / 3)
    assert scores.mass == pytest.approx((1.3 / 2.5 + 1 + 1 / 35) / 3)
    assert (scores.wrong_word_pointing, scores.num_wrong) == (pytest.approx(1 / 3), 3)
    assert scores.uniform_pointing == pytest.approx((3 + 1 + 1) / 35 / 3)
    assert scores.centre_pointing == pytest.approx(2 / 3)
    assert scores.num_words == 3
    kept = json.loads(json.dumps(scores.to_dict()))
    assert kept == scores.to_dict()
    assert kept["pointing_by_mention"] == {"0": 1.0, "1": 0.5}


def test_entropy_is_in_nats_on_32_by_32():
    mask = mask_of((3, 10))
    assert score_maps([JudgedMap(torch.ones(5, 7), mask, 0)], 0.5).entropy == pytest.approx(math.log(1024), abs=1e-4)
    one_cell, four_cells = torch.zeros(32, 32), torch.zeros(64, 64)
    one_cell[7, 11] = 3.0
    four_cells[6:8, 10:14] = 0.3  # eight cells of the finer grid are two of the coarser
    judged = [JudgedMap(one_cell, mask, 0), JudgedMap(four_cells, mask, 0)]
    assert score_maps(judged[:1], 0.5).entropy == pytest.approx(0)
    assert score_maps(judged, 0.5).entropy == pytest.approx(math.log(2) / 2)


# On 32 × 32: a mask of 64 × 96 has cells of 2 × 3 pixels, of which this one fills exactly 2 · 3.
KL_MASK = mask_of(*((row, col) for row in range(10, 14) for col in range(33, 42)), size=(64, 96))


def test_kl_of_a_map_that_knows_nothing_is_the_log_of_the_masks_share():
    share = 6 / 1024
    assert KL_MASK.mean() == share
    for map in (torch.ones(5, 7), torch.full((32, 32), 0.3), torch.zeros(5, 7)):
        assert kl_from_mask(map, KL_MASK) == pytest.approx(math.log(1 / share), abs=1e-5)


def test_kl_of_the_mask_itself_is_nothing_but_the_floor():
    cells = torch.zeros(32, 32)
    cells[5:7, 11:14] = 0.7
    # each of the six cells has (1 − f) / 6 + f / 1024 instead of 1 / 6
    for floor in (1e-4, 0.5):
        expected = -math.log(1 - floor + floor * 6 / 1024)
        assert kl_from_mask(cells, KL_MASK, floor) == pytest.approx(expected, abs=1e-6)
        assert kl_from_mask(cells, torch.from_numpy(KL_MASK), floor) == pytest.approx(expected, abs=1e-6)
    assert 0 < kl_from_mask(cells, KL_MASK) < 1.01e-4
    assert kl_from_mask(torch.from_numpy(KL_MASK).double(), KL_MASK) < 1.01e-4


def test_kl_weighs_cells_by_the_mask():
    # one pixel of two cells each; the map gives them 3/4 and 1/4
    mask = mask_of((4, 5), (9, 30), size=(32, 32))
    heat = heat_of({(4, 5): 0.6, (9, 30): 0.2}, (32, 32))
    assert kl_from_mask(heat, mask, 0.0) == pytest.approx((math.log(2 / 3) + math.log(2)) / 2, abs=1e-6)
    # two of a cell's six pixels, and all six of another: 1/4 and 3/4 of the truth
    mask = mask_of((8, 15), (9, 16), *((row, col) for row in (18, 19) for col in (90, 91, 92)), size=(64, 96))
    assert kl_from_mask(heat, mask, 0.0) == pytest.approx(math.log(1 / 3) / 4 + 3 * math.log(3) / 4, abs=1e-6)


def test_kl_of_a_map_without_heat_on_the_mask_is_large_and_finite():
    heat = heat_of({(0, 0): 1.0}, (32, 32))
    # each of the six cells has the floor alone, 1e-4 / 1024
    assert kl_from_mask(heat, KL_MASK) == pytest.approx(math.log(1024 / 6e-4), abs=1e-5)
    assert kl_from_mask(heat, KL_MASK) > 2 * kl_from_mask(torch.ones(5, 7), KL_MASK)


def test_no_other_word_is_no_score():
    scores = score_maps([JudgedMap(STEPS, STEPS_MASK, 0)], 0.5)
    assert scores.wrong_word_pointing is None
    assert scores.num_wrong == 0


@pytest.mark.parametrize(
    ("heat", "mask", "message"),
    [
        (torch.zeros(2, 5, 7), mask_of((0, 0)), "Expected (rows, cols) maps and a (height, width) mask"),
        (torch.zeros(5, 7), mask_of(), "Got a mask without a pixel"),
        (torch.full((5, 7), torch.nan), mask_of((0, 0)), "Got a map with NaN or infinity"),
    ],
)
def test_what_cannot_be_judged_is_refused(heat: torch.Tensor, mask: np.ndarray, message: str):
    with pytest.raises(DataError) as caught:
        JudgedMap(heat, mask, 0)
    assert message in str(caught.value)


def test_nothing_to_judge_is_refused():
    with pytest.raises(DataError, match="Got no map"):
        score_maps([], 0.5)
    with pytest.raises(DataError, match="Got no map"):
        best_threshold([])
