"""Paired bootstrap: differences of ratios of sums, with seeded intervals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lavender.errors import DataError
from lavender.evaluation.intervals import paired_difference, ratio


def test_a_score_is_a_ratio_of_sums():
    assert ratio([(3.0, 2), (1.0, 6)]) == 0.5  # not the mean of 1.5 and 1/6
    assert ratio([(0.0, 0), (1.0, 4)]) == 0.25
    assert ratio([(0.0, 0)]) is None
    assert ratio([]) is None


def test_the_interval_is_that_of_all_draws():
    """Of three units there are 27 draws; their quantiles are known, and 10,000 draws find them."""
    first, second = np.array([[2.0, 1], [0.0, 3], [5.0, 2]]), np.array([[1.0, 1], [1.0, 2], [1.0, 4]])
    exact = []
    for chosen in itertools.product(range(3), repeat=3):
        one, other = first[list(chosen)].sum(axis=0), second[list(chosen)].sum(axis=0)
        exact.append(one[0] / one[1] - other[0] / other[1])
    pairs = [[(float(a), float(b)) for a, b in side] for side in (first, second)]
    found = paired_difference(pairs[0], pairs[1], level=0.8)
    assert found is not None
    assert found.difference == pytest.approx(7 / 6 - 3 / 7)
    # 27 draws have few values: the quantiles of the draws are single values of these, not near a jump
    low, high = np.quantile(exact, [0.1, 0.9], method="inverted_cdf")
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.num_units == 3


@pytest.mark.parametrize(("number", "least", "most"), [(60, 180, 199), (10, 168, 192), (5, 156, 185)])
def test_the_covered_share_is_the_level_unless_there_are_few(number, least, most):
    """Of 200 data sets with a true difference of 0.3, about 95 % of the intervals contain it; of 10 samples 90 %, of 5
    85 %, as docs/report.md says. The bounds are about three standard deviations from 190, 180 and 170."""
    draws, hits = np.random.default_rng(1), 0
    for seed in range(200):
        base = draws.normal(size=number)
        gains = draws.normal(0.3, 1.0, size=number)
        found = paired_difference(
            [(float(x), 1) for x in base + gains], [(float(x), 1) for x in base], num_resamples=400, seed=seed
        )
        assert found is not None
        hits += found.low <= 0.3 <= found.high
    assert least <= hits <= most


def test_pairing_removes_what_both_share():
    """Samples differ by 100, models by exactly 1 on each: every draw has the difference 1."""
    samples = [100.0 * index for index in range(9)]
    found = paired_difference([(x + 1, 1) for x in samples], [(x, 1) for x in samples])
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(1), pytest.approx(1))
    assert found.excludes_zero


def test_samples_of_a_picture_are_drawn_together():
    """Five captions per picture are no more evidence than one: the interval is that of the pictures alone."""
    gains = [0.5, -0.2, 0.1, 0.4, -0.1, 0.3, 0.2]
    alone = paired_difference([(gain, 1) for gain in gains], [(0.0, 1)] * 7)
    five = [gain for gain in gains for _ in range(5)]
    units = [f"picture {index}" for index in range(7) for _ in range(5)]
    together = paired_difference([(gain, 1) for gain in five], [(0.0, 1)] * 35, units)
    apart = paired_difference([(gain, 1) for gain in five], [(0.0, 1)] * 35)
    assert alone is not None
    assert together is not None
    assert apart is not None
    assert (together.low, together.high) == (pytest.approx(alone.low), pytest.approx(alone.high))
    assert together.num_units == 7
    some = paired_difference([(1.0, 1), (0.0, 1), (0.0, 0)], [(0.0, 1), (0.0, 1), (0.0, 0)])
    assert some is not None
    assert some.num_units == 2  # the third has no weight
    assert apart.high - apart.low < 0.7 * (alone.high - alone.low)  # 1/√5 of it


def test_the_seed_decides():
    first, second = [(float(x % 5), 1.0) for x in range(23)], [(float(x % 3), 1.0) for x in range(23)]
    one, same, other = (paired_difference(first, second, num_resamples=200, seed=seed) for seed in (3, 3, 4))
    assert one == same != other


def test_what_has_no_difference():
    assert paired_difference([(0.0, 0)], [(1.0, 1)]) is None
    alone = paired_difference([(1.0, 1)], [(0.0, 1)])
    assert alone is not None
    assert alone.difference == 1
    assert np.isnan(alone.low)
    assert not alone.excludes_zero
    twice = [(1.0, 1), (2.0, 1), *[(0.0, 0)] * 3]
    rare = paired_difference(twice, [(0.0, 1)] * 5)  # some draws have no weight at all
    assert rare is not None
    assert (rare.difference, rare.low, rare.high) == (1.5, 1, 2)


def test_one_unit_with_a_weight_is_one_unit():
    """Of five pictures one has a map: every draw has its difference, which says nothing about other pictures."""
    one_of_five, all_five = [(1.0, 1), *[(0.0, 0)] * 4], [(0.0, 1)] * 5
    for first, second in ((one_of_five, one_of_five), (one_of_five, all_five), (all_five, one_of_five)):
        found = paired_difference(first, second)
        assert found is not None
        assert np.isnan([found.low, found.high]).all()
        assert not found.excludes_zero
    samples = paired_difference([(1.0, 1), (1.0, 1), (0.0, 0)], [(0.0, 1)] * 3, ["a", "a", "b"])
    assert samples is not None
    assert np.isnan(samples.low), "two samples of one picture"


def test_models_are_scored_on_the_same_samples():
    with pytest.raises(DataError, match="Got 1 and 2 samples"):
        paired_difference([(1.0, 1)], [(0.0, 1)] * 2)
