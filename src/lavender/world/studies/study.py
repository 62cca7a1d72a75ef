"""What a study is: a question, its arms, and a verdict by rules that were fixed before any result was seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from lavender.world.studies.cells import Arm

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""Arm → metric → one number a seed. Numbers of one seed belong together: same data, same order."""

METRICS: dict[str, str] = {
    "in_domain": "captions, object F1",
    "in_domain_exact_set": "captions, exact set of things",
    "other_backgrounds": "on photographs, object F1",
    "out_of_domain": "in another hand, object F1",
    "held_out_loss": "loss of true captions, nats a token",
    "pointing": "attention points at the thing",
    "wrong_word_pointing": "attention of another word points at it",
    "entropy": "entropy of attention, nats",
    "mask_kl": "KL from the true mask, nats",
}
CAPTIONS = ("in_domain", "other_backgrounds", "out_of_domain")

Outcome = Literal["above", "higher on average", "no clear difference", "lower on average", "below"]


@dataclass(frozen=True)
class Finding:
    """One comparison of a study's verdict.

    Attributes:
        what: "aligned against plain, captions, object F1".
        outcome: see `compare`.
        mean, low, high: of the paired differences, one a seed.
    """

    what: str
    outcome: Outcome
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.what}: {self.outcome} ({self.mean:+.3f}, from {self.low:+.3f} to {self.high:+.3f})"


def compare(scores: Scores, metric: str, arm: str, other: str) -> Finding:
    """One arm against another, seed by seed.

    "above" and "below": the two ranges over seeds do not overlap. "higher (lower) on average": they do, but
    every seed's own difference has this sign. Else "no clear difference". Without spread (one seed, or two arms that
    no seed changes) nothing is above or below.
    """
    ours, theirs = scores[arm][metric], scores[other][metric]
    differences = [one - two for one, two in zip(ours, theirs, strict=True)]
    outcome: Outcome = "no clear difference"
    spread = len({*ours}) > 1 or len({*theirs}) > 1
    if min(differences) > 0:
        outcome = "above" if min(ours) > max(theirs) and spread else "higher on average"
    elif max(differences) < 0:
        outcome = "below" if max(ours) < min(theirs) and spread else "lower on average"
    what = f"{arm} against {other}, {METRICS[metric]}"
    return Finding(what, outcome, fmean(differences), min(differences), max(differences))


@dataclass(frozen=True)
class Study:
    """A study of the built-in world.

    Attributes:
        title, question: for people.
        paper: what the paper says about it, and where.
        arms: name → arm; given whether the study is the quick one.
        judge: the comparisons that make the verdict.
        draw: writes the plot.
    """

    title: str
    question: str
    paper: str
    arms: Callable[[bool], dict[str, Arm]]
    judge: Callable[[Scores], list[Finding]]
    draw: Callable[[dict[str, Any], Path], None]
    metrics: tuple[str, ...] = (*CAPTIONS, "pointing", "wrong_word_pointing")
