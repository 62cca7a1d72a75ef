"""Does a lower alignment loss mean better captions? (Fig. 9)"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from lavender.world.studies.cells import Arm
from lavender.world.studies.over_time import at_each_step, row_of, steps_of
from lavender.world.studies.study import METRICS, Finding, Scores, Study, compare_values

STEPS, SCORINGS = 400, 8
WEIGHTS, QUICK_WEIGHTS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0), (1.0, 5.0, 20.0)
LOSS = "training_attention_loss"
JUDGED = ("in_domain", "cider")
PLAIN = "plain"


def arms(quick: bool) -> dict[str, Arm]:
    """Plain, and the published loss with several λ, each scored several times."""

    def scored(target: Any, settings: Any = ()) -> Arm:
        return Arm("mllama", "full", target, 800, STEPS, settings, "captions-in-domain", scorings=SCORINGS)

    weights = QUICK_WEIGHTS if quick else WEIGHTS
    aligned = {f"λ = {weight:g}": scored("teacher", (("align_weight", weight),)) for weight in weights}
    return {PLAIN: scored(None)} | aligned


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 if one of the two is constant."""
    if len({*first}) == 1 or len({*second}) == 1:
        return 0.0
    return float(spearmanr(first, second).statistic)


def judge(scores: Scores) -> list[Finding]:
    """Rank correlations of loss and score, per seed.

    - Over the steps of a run, against 0. Any two numbers that change with time are correlated, so also against the same
      losses with the scores of plain fine-tuning after as many steps, which the loss cannot have changed.
    - Over λ, after the last step: time is the same in all arms.
    """
    findings = []
    weights = sorted({row.partition(",")[0] for row in scores} - {PLAIN}, key=lambda arm: float(arm.split()[-1]))
    steps = steps_of(scores, PLAIN)
    for metric in JUDGED:
        for arm in weights:
            of_arm = _over_steps(scores, arm, arm, metric)
            what = f"{arm}, rank correlation of {METRICS[metric]} with the alignment loss over the steps"
            findings += [
                compare_values(f"{what}, against 0", of_arm, [0.0] * len(of_arm)),
                compare_values(f"{what}, against plain's scores", of_arm, _over_steps(scores, arm, PLAIN, metric)),
            ]
        last = [row_of(arm, steps[-1]) for arm in weights]
        over_weights = [
            rank_correlation([scores[row][LOSS][seed] for row in last], [scores[row][metric][seed] for row in last])
            for seed in range(len(scores[last[0]][metric]))
        ]
        what = (
            f"rank correlation of {METRICS[metric]} with the alignment loss over λ, after {steps[-1]} steps, against 0"
        )
        findings.append(compare_values(what, over_weights, [0.0] * len(over_weights)))
    return findings


def _over_steps(scores: Scores, arm: str, scored: str, metric: str) -> list[float]:
    """Per seed the rank correlation of an arm's losses with the scores of `scored` after the same steps."""
    losses, values = (list(at_each_step(scores, *of).values()) for of in ((arm, LOSS), (scored, metric)))
    return [rank_correlation(*both) for both in zip(zip(*losses, strict=True), zip(*values, strict=True), strict=True)]


def draw(results: dict[str, Any], path: Path) -> None:
    """Score against loss, a line per λ with a dot per step, means over seeds; as the paper's Figure 9."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    scores = results["arms"]
    weights = [arm for arm in dict.fromkeys(row.partition(",")[0] for row in scores) if arm != PLAIN]
    figure = Figure(figsize=(5.0 * len(JUDGED), 3.8), layout="constrained")
    for panel, metric in zip(figure.subplots(1, len(JUDGED)), JUDGED, strict=True):
        for index, arm in enumerate(weights):
            losses, values = ([np.mean(v) for v in at_each_step(scores, arm, m).values()] for m in (LOSS, metric))
            panel.plot(losses, values, ".-", color=colormaps["viridis"](index / len(weights)), label=arm)
        panel.set(xlabel=METRICS[LOSS], ylabel=METRICS[metric])
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


STUDY = Study(
    title="Does a lower alignment loss mean better captions?",
    question="The authors' loss with several λ, scored several times on the way. Loss falls and score rises in any "
    "run, so two comparisons take time out: the same losses with the scores of *plain* fine-tuning after as many "
    "steps, and the order of the λ after the last step. A correlation below 0 means that a lower loss goes with a "
    "better score.",
    paper="a lower mean squared error goes with better COCO captions, so aligning attention improves them (§7.1, "
    "Fig. 9; without a control of time).",
    arms=arms,
    judge=judge,
    draw=draw,
    metrics=(LOSS, "training_loss", *JUDGED, "pointing"),
)
