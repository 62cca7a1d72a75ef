"""How many samples plain fine-tuning needs for what a recipe reaches, and both against the number of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from statistics import fmean
from typing import Any

from lavender.world.studies.study import METRICS, Scores


def equal_plain_size(plain: Mapping[int, float], score: float) -> float | None:
    """The number of samples with which plain fine-tuning has a score, interpolated linearly in the logarithm.

    Args:
        plain: number of samples → mean score of plain fine-tuning.
        score: the score to reach.

    Returns:
        None if the score is outside those of `plain`.
    """
    for (small, low), (large, high) in pairwise(sorted(plain.items())):
        if low <= score <= high and high > low:
            return math.exp(math.log(small) + (math.log(large) - math.log(small)) * (score - low) / (high - low))
    return None


def efficiency(scores: Scores, metric: str, kinds: tuple[str, str], samples: str) -> list[str]:
    """For each size of the recipe, how many samples plain fine-tuning needs for the same mean score.

    Args:
        scores: those of the study.
        metric: what is compared.
        kinds: plain fine-tuning and the recipe; the arms are named "KIND SIZE".
        samples: what a sample is called, in the plural.
    """
    plain, recipe = (means(scores, kind, metric) for kind in kinds)
    lines = []
    for size, score in recipe.items():
        equal = equal_plain_size(plain, score)
        needed = "has this mean at no size of this study" if equal is None else f"needs about {equal:.0f}"
        lines.append(f"{size} {samples} with the recipe: {METRICS[metric]} {score:.3f}; plain fine-tuning {needed}")
    return lines


def means(scores: Scores, kind: str, metric: str) -> dict[int, float]:
    """Size → mean over seeds, of the arms "KIND SIZE"."""
    return {
        int(arm.removeprefix(f"{kind} ")): fmean(values[metric])
        for arm, values in scores.items()
        if arm.removeprefix(f"{kind} ").isdigit()
    }


def draw_sizes(panel: Any, scores: Scores, metric: str, kinds: tuple[str, str], samples: str) -> None:
    """Plot a metric of plain fine-tuning and the recipe against the number of samples.

    A line goes through the means, with a dot per seed. The arguments are those of `efficiency`, and Matplotlib's axes.
    """
    for kind, colour, label in zip(kinds, ("#777777", "#4b2e83"), ("plain", "recipe"), strict=True):
        by_size = means(scores, kind, metric)
        panel.plot(list(by_size), list(by_size.values()), "-", color=colour, label=label)
        for size in by_size:
            values = scores[f"{kind} {size}"][metric]
            panel.plot([size] * len(values), values, ".", color=colour)
    sizes = sorted({size for kind in kinds for size in means(scores, kind, metric)})
    panel.set(xscale="log", xlabel=samples, title=METRICS[metric])
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.set_xticks([], minor=True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
