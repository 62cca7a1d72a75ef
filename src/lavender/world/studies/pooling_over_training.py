"""Does the learned pooling gain more from long training than the others? (Fig. 20 and 29)"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from lavender.config import Pooling
from lavender.world.studies.cells import Arm
from lavender.world.studies.over_time import draw_legend, draw_over_time, row_of, steps_of
from lavender.world.studies.study import METRICS, Finding, Scores, Study, compare_pairs

POOLINGS: tuple[Pooling, ...] = ("learn", "layer-mean", "layer-max", "max-max", "flow-sum", "flow-multi")
"""The poolings of the paper's Figures 19 and 20."""
QUICK_POOLINGS: tuple[Pooling, ...] = ("learn", "layer-mean", "flow-multi")
STEPS, SCORINGS = 400, 4
SHOWN = ("in_domain", "cider", "pointing")
COLOURS = {
    "plain": "#777777",
    "learn": "#4b2e83",
    "layer-mean": "#2a9d8f",
    "layer-max": "#8ab17d",
    "max-max": "#e9c46a",
    "flow-sum": "#e08214",
    "flow-multi": "#c1121f",
}


def arms(quick: bool) -> dict[str, Arm]:
    """Plain, and the published loss with each pooling, each scored several times."""

    def scored(target: Any, settings: Any = ()) -> Arm:
        return Arm("mllama", "full", target, 800, STEPS, settings, "captions-in-domain", scorings=SCORINGS)

    poolings = QUICK_POOLINGS if quick else POOLINGS
    return {"plain": scored(None)} | {pooling: scored("teacher", (("pooling", pooling),)) for pooling in poolings}


def judge(scores: Scores) -> list[Finding]:
    """Each pooling against plain, and the learned one against each other, after as many steps."""
    poolings, steps = _poolings(scores), steps_of(scores, "plain")
    pairs = [(pooling, "plain") for pooling in poolings] + [("learn", other) for other in poolings if other != "learn"]
    return compare_pairs(
        scores, SHOWN, [(row_of(arm, step), row_of(other, step)) for arm, other in pairs for step in steps]
    )


def ranks(scores: Scores) -> list[str]:
    """The place of the learned pooling among all poolings, by the mean over seeds, after each number of steps."""
    poolings = _poolings(scores)
    lines = []
    for metric in SHOWN:
        places = []
        for step in steps_of(scores, "plain"):
            means = {pooling: fmean(scores[row_of(pooling, step)][metric]) for pooling in poolings}
            places.append(f"{sorted(means, key=means.__getitem__, reverse=True).index('learn') + 1} after {step} steps")
        lines.append(f"place of learn among {len(poolings)} poolings by {METRICS[metric]}: {', '.join(places)}")
    return lines


def _poolings(scores: Scores) -> list[str]:
    return [arm for arm in dict.fromkeys(row.partition(",")[0] for row in scores) if arm != "plain"]


def draw(results: dict[str, Any], path: Path) -> None:
    """Each metric against the steps."""
    from matplotlib.figure import Figure

    scores = results["arms"]
    shown = {arm: COLOURS[arm] for arm in ("plain", *_poolings(scores))}
    figure = Figure(figsize=(4.4 * len(SHOWN), 3.6), layout="constrained")
    for panel, metric in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        draw_over_time(panel, scores, shown, metric, METRICS[metric])
    draw_legend(figure)
    figure.savefig(path, dpi=150)


STUDY = Study(
    title="Does the learned pooling gain from longer training?",
    question="The authors' loss with the poolings of Figure 20. A run is scored after each quarter of 8 epochs, so the "
    "learning rate is higher at the first scores than at the last ones, in every arm alike.",
    paper="learned parallel attention is the second worst after 5 epochs and the best after 20; flow-sum does well "
    "early; flow-multi is worst (§8.1, Fig. 19, 20, 29).",
    arms=arms,
    judge=judge,
    draw=draw,
    metrics=SHOWN,
    extra=ranks,
)
