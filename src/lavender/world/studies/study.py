"""What a study is: a question, its arms, and comparisons by rules that were fixed before any result was known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from lavender.world.studies.cells import Arm

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""Arm → metric → one number per seed. The n-th numbers of all arms belong to one seed: same data, same order."""

METRICS: dict[str, str] = {
    "in_domain": "captions, object F1",
    "cider": "captions, CIDEr",
    "in_domain_exact_set": "captions, exact set of things",
    "other_backgrounds": "captions on photographs, object F1",
    "out_of_domain": "captions of OpenMoji drawings, object F1",
    "held_out_loss": "loss of true captions, nats per token",
    "pointing": "pointing accuracy of attention",
    "attention_mass": "share of attention on the thing",
    "new_names": "new names, F1",
    "known_names": "known names, F1",
    "all_names": "all names, F1",
    "single_things": "scenes of one thing, F1",
    "known_loss": "loss of captions of known names, nats per token",
    "new_pointing": "pointing accuracy, new names",
    "new_attention_mass": "share of attention on the thing, new names",
    "answers": "answers, exact match",
    "pairs": "pairs of name and colour, F1",
    "right_colours": "right colours of rightly named things",
    "answers_withheld": "answers about withheld pairs, exact match",
    "answers_reworded": "answers to a reworded question, exact match",
    "new_names_photograph": "new names on photographs, F1",
    "new_names_openmoji": "new names in an unseen hand, F1",
    "new_names_outline": "new names in outlines, F1",
    "known_names_photograph": "known names on photographs, F1",
    "known_names_openmoji": "known names in an unseen hand, F1",
    "known_names_outline": "known names in outlines, F1",
    "reading": "words on signs, exact match",
    "reading_withheld": "words on signs that no training sign says, exact match",
    "training_loss": "loss of training, nats per token",
    "training_attention_loss": "alignment loss of training, before λ",
    "wrong_word_pointing": "pointing accuracy of another word's attention",
    "entropy": "entropy of attention, nats",
    "mask_kl": "KL divergence from the true mask, nats",
}
"""Metric → its label in tables, plots and comparisons."""
CAPTIONS = ("in_domain", "other_backgrounds", "out_of_domain")
MAIN_METRICS = ("in_domain", "other_backgrounds", "pointing")

Outcome = Literal["above", "higher on average", "no clear difference", "lower on average", "below"]


@dataclass(frozen=True)
class Finding:
    """One comparison of two arms.

    Attributes:
        what: the arms and the metric, such as "aligned against plain, captions, object F1".
        outcome: see `compare`.
        mean, low, high: mean, smallest and largest of the differences per seed.
    """

    what: str
    outcome: Outcome
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.what}: {self.outcome} ({self.mean:+.3f}, from {self.low:+.3f} to {self.high:+.3f})"


def compare(scores: Scores, metric: str, arm: str, baseline: str) -> Finding:
    """Compare an arm with a baseline arm, seed by seed. See `compare_values`."""
    what = f"{arm} against {baseline}, {METRICS[metric]}"
    return compare_values(what, scores[arm][metric], scores[baseline][metric])


def compare_values(what: str, values: Sequence[float], baseline_values: Sequence[float]) -> Finding:
    """Compare numbers with those of a baseline, one per seed each.

    The outcome is "above" or "below" if the two ranges over seeds do not overlap; "higher (lower) on average" if they
    overlap, but every seed's difference has this sign; otherwise "no clear difference". Without spread over seeds (one
    seed, or two arms that do not depend on the seed) the outcome is never "above" or "below".
    """
    differences = [value - other for value, other in zip(values, baseline_values, strict=True)]
    outcome: Outcome = "no clear difference"
    has_spread = len({*values}) > 1 or len({*baseline_values}) > 1
    if min(differences) > 0:
        outcome = "above" if min(values) > max(baseline_values) and has_spread else "higher on average"
    elif max(differences) < 0:
        outcome = "below" if max(values) < min(baseline_values) and has_spread else "lower on average"
    return Finding(what, outcome, fmean(differences), min(differences), max(differences))


def compare_pairs(scores: Scores, metrics: Iterable[str], pairs: Sequence[tuple[str, str]]) -> list[Finding]:
    """Compare every pair (arm, baseline) by every metric; grouped by metric."""
    return [compare(scores, metric, arm, baseline) for metric in metrics for arm, baseline in pairs]


class Promised(NamedTuple):
    """An arm of which `lavender check` is asked before training.

    Attributes:
        arm, plain: names of the aligned arm and of the plain one.
        metric: what decides whether alignment paid.
    """

    arm: str
    plain: str
    metric: str


@dataclass(frozen=True)
class Study:
    """A study of the built-in world.

    Attributes:
        title, question: what the page begins with.
        paper: what the paper says about the question, and where.
        arms: whether the study is the quick one → its arms by name.
        judge: scores → the comparisons that answer the question.
        draw: results, path → writes the plot there. Besides the content of results.json, the results have
            `entropies`, and `maps` of the first held-out scenes where the task's score gives them: row → one list per
            seed.
        metrics: the columns of the page's table.
        promised: scores → the arms of which `lavender check` is asked.
        extra: scores → further lines of the page, computed from the means.
        seeds: seeds of the full study.
        quick_steps, quick_seeds: optimizer steps (None for those of each arm) and seeds of the quick study.
    """

    title: str
    question: str
    paper: str
    arms: Callable[[bool], dict[str, Arm]]
    judge: Callable[[Scores], list[Finding]]
    draw: Callable[[dict[str, Any], Path], None]
    metrics: tuple[str, ...] = (*CAPTIONS, "pointing", "wrong_word_pointing")
    promised: Callable[[Scores], list[Promised]] = lambda scores: []
    extra: Callable[[Scores], list[str]] = lambda scores: []
    seeds: tuple[int, ...] = (1, 2, 3)
    quick_steps: int | None = 60
    quick_seeds: tuple[int, ...] = (40,)
