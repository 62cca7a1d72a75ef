"""Which pictures a report shows: best, typical and worst, by the difference between two models on each sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lavender.errors import ConfigError, nearest
from lavender.evaluation.eval_files import EvaluatedSample
from lavender.evaluation.score_help import SCORES

GROUPS = ("best", "typical", "worst")
BY = tuple(name for name, score in SCORES.items() if score.better)
"""The scores that pictures can be chosen by: those with a better direction."""


class Chosen(NamedTuple):
    """A sample to show.

    Attributes:
        index: its place among the samples.
        group: one of `GROUPS`.
        gain: by how much the first model is better than the second on this sample; negative if it is worse.
        values: the score of the first model and of the second.
    """

    index: int
    group: str
    gain: float
    values: tuple[float, float]


def choose(
    samples: Sequence[EvaluatedSample], first: str, second: str, by: str, number: int
) -> tuple[list[Chosen], int]:
    """The samples to show, best first, and how many could be chosen from.

    The samples are ordered by `gain`, equal ones as the data have them. A third of those shown are the first of this
    order (best), a third the last (worst), and the rest (typical) are around the middle of the order.

    Args:
        samples: the samples.
        first, second: names of models.
        by: one of `BY`. Samples that have no such score for both models are not chosen.
        number: how many to show.

    Raises:
        ConfigError: `number` is below 1, or `by` is no such score.
    """
    if by not in BY:
        near = nearest(by, BY)
        raise ConfigError(f"--by {by}", f"one of {', '.join(BY)}", f"write {near}" if near else "name one of them")
    if number < 1:
        raise ConfigError(f"--pictures {number}", "at least 1", "give the number of pictures to show")
    sign = 1.0 if SCORES[by].better == "higher" else -1.0
    gains: list[tuple[int, float, tuple[float, float]]] = []
    for index, sample in enumerate(samples):
        tallies = [sample.judged[name].tallies.get(by, (0.0, 0.0)) for name in (first, second)]
        if all(weight for _, weight in tallies):
            one, other = (total / weight for total, weight in tallies)
            gains.append((index, sign * (one - other), (one, other)))
    ordered = sorted(gains, key=lambda entry: -entry[1])
    shown = min(number, len(ordered))
    num_best, num_worst = math.ceil(shown / 3), shown // 3
    num_typical = shown - num_best - num_worst
    begin = max(num_best, min(len(ordered) // 2 - num_typical // 2, len(ordered) - num_worst - num_typical))
    places = {
        "best": range(num_best),
        "typical": range(begin, begin + num_typical),
        "worst": range(len(ordered) - num_worst, len(ordered)),
    }
    chosen = [
        Chosen(ordered[place][0], group, ordered[place][1], ordered[place][2])
        for group in GROUPS
        for place in places[group]
    ]
    return chosen, len(ordered)


def rule(first: str, second: str, by: str, shown: int, choice: int, samples: int) -> str:
    """The rule of `choose` as a sentence for readers."""
    left = f" {samples - choice} have no {by} for both models and are not shown." if samples > choice else ""
    return (
        f"{shown} of {samples} samples, ordered by how much better {first} is than {second} by {by} "
        f"({SCORES[by].direction}): a third with the greatest gain or the least loss (best), a third around the "
        f"middle (typical), and a third with the least gain or the greatest loss (worst).{left}"
    )
