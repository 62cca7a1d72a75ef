"""Differences between models on the same samples, with paired-bootstrap intervals.

Every score here is a ratio of two sums over samples: a mean over tokens, words or samples, or a micro F1. So a model's
result on a sample is a pair (sum, weight), and the score of any samples is Σ sum / Σ weight.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from lavender.errors import DataError

LEVEL = 0.95
NUM_RESAMPLES = 10_000
SEED = 0
_AT_ONCE = 2**22  # numbers of draws in memory


@dataclass(frozen=True)
class Interval:
    """A difference of a score between two models, and its interval.

    Attributes:
        difference: score of the first model minus score of the second.
        low, high: percentile interval of the difference over resampled data.
        num_units: the number of units with a weight for both models. Of one, nothing is known: low and high are NaN.
    """

    difference: float
    low: float
    high: float
    num_units: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def ratio(tallies: Sequence[tuple[float, float]]) -> float | None:
    """The score of some samples, Σ sum / Σ weight; None if nothing was counted."""
    weight = sum(one[1] for one in tallies)
    return sum(one[0] for one in tallies) / weight if weight else None


def paired_difference(
    first: Sequence[tuple[float, float]],
    second: Sequence[tuple[float, float]],
    units: Sequence[Hashable] | None = None,
    *,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = SEED,
) -> Interval | None:
    """Score of the first model minus score of the second, with a percentile interval of the paired bootstrap.

    As many units as there are, are drawn with replacement, the same ones for both models.

    Examples:
        >>> one, other = [(1.0, 1), (0.0, 1), (1.0, 1)], [(0.0, 1), (0.0, 1), (1.0, 1)]
        >>> found = paired_difference(one, other)
        >>> round(found.difference, 3), found.low, round(found.high, 3), found.num_units
        (0.333, 0.0, 1.0, 3)

    Args:
        first: of the first model, (sum, weight) per sample.
        second: of the second model, in the same order.
        units: per sample, what it belongs to, such as its picture. Samples of one unit are drawn together, since they
            are not independent. None: each sample is a unit.
        level: share of the resampled differences that lies in the interval.
        num_resamples: how many times the units are drawn.
        seed: of the draws. The same seed gives the same interval.

    Returns:
        None if nothing was counted for one of the models.

    Raises:
        DataError: the models were not scored on the same samples.
    """
    sizes = {len(first), len(second), len(first if units is None else units)}
    if len(sizes) != 1:
        raise DataError(
            f"{len(first)} and {len(second)} samples" + ("" if units is None else f" of {len(units)} units"),
            "two models scored on the same samples",
            "score both on the same data with the same limit",
        )
    scores = ratio(first), ratio(second)
    if scores[0] is None or scores[1] is None:
        return None
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))} if units is not None else {}
    places = np.arange(len(first)) if units is None else np.array([numbers[unit] for unit in units])
    sums = np.zeros((int(places.max()) + 1, 4))
    np.add.at(sums, places, np.hstack([np.asarray(first, dtype=float), np.asarray(second, dtype=float)]))
    low = high = float("nan")
    num_counted = int((sums[:, [1, 3]] > 0).all(axis=1).sum())
    if num_counted > 1:
        drawn = _resampled(sums, num_resamples, np.random.default_rng(seed))
        counted = drawn[(drawn[:, 1] > 0) & (drawn[:, 3] > 0)]  # a draw may leave out all that has a weight
        differences = counted[:, 0] / counted[:, 1] - counted[:, 2] / counted[:, 3]
        low, high = (float(end) for end in np.quantile(differences, [(1 - level) / 2, (1 + level) / 2]))
    return Interval(scores[0] - scores[1], low, high, num_counted)


def _resampled(sums: np.ndarray, num_resamples: int, draws: np.random.Generator) -> np.ndarray:
    """The sums (resample, column) over units drawn with replacement, from those of each unit (unit, column)."""
    size, found = len(sums), []
    at_once = max(1, _AT_ONCE // size)
    for start in range(0, num_resamples, at_once):
        chosen = draws.integers(size, size=(min(at_once, num_resamples - start), size))
        counts = np.apply_along_axis(np.bincount, 1, chosen, minlength=size)
        found.append(counts @ sums)
    return np.concatenate(found)
