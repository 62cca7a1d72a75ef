"""Does alignment keep a student from overfitting a small set? (§7.4)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavender.world.studies.cells import Arm
from lavender.world.studies.forms import RECIPE
from lavender.world.studies.over_time import at_each_step, draw_legend, draw_over_time, row_of, steps_of
from lavender.world.studies.study import METRICS, Finding, Scores, Study, compare_pairs, compare_values

NUM_SCENES, STEPS, SCORINGS = 100, 600, 6
SHOWN = ("in_domain", "held_out_loss", "training_loss", "pointing")
FORMS = ("published", "recipe", "recipe, wrong-word")
COLOURS = {"plain": "#777777", "published": "#e08214", "recipe": "#4b2e83", "recipe, wrong-word": "#c1121f"}


def arms(quick: bool) -> dict[str, Arm]:
    """Plain, the published loss, the recipe, and the recipe with a wrong word's maps, for many epochs of few scenes."""

    def scored(target: Any, settings: Any = ()) -> Arm:
        return Arm("mllama", "full", target, NUM_SCENES, STEPS, settings, "captions-in-domain", scorings=SCORINGS)

    return {
        "plain": scored(None),
        "published": scored("teacher"),
        "recipe": scored("teacher", RECIPE),
        "recipe, wrong-word": scored("wrong-word", RECIPE),
    }


def lost(scores: Scores, arm: str) -> list[float]:
    """Per seed: F1 after the best number of steps minus F1 after the last."""
    by_step = zip(*at_each_step(scores, arm, "in_domain").values(), strict=True)
    return [max(values) - values[-1] for values in by_step]


def risen(scores: Scores, arm: str) -> list[float]:
    """Per seed: loss of held-out captions after the last step minus the smallest one on the way, in nats per token."""
    by_step = zip(*at_each_step(scores, arm, "held_out_loss").values(), strict=True)
    return [values[-1] - min(values) for values in by_step]


def gap(scores: Scores, arm: str) -> list[float]:
    """Per seed: loss of held-out captions minus that of training, after the last step, in nats per token.

    The loss of training is of the last sixth of the steps, when attention forcing has ended.
    """
    row = scores[row_of(arm, steps_of(scores, arm)[-1])]
    return [held_out - seen for held_out, seen in zip(row["held_out_loss"], row["training_loss"], strict=True)]


SIGNS = {
    "F1 lost from the best step to the last": lost,
    "held-out loss risen from the lowest to the last": risen,
    "held-out loss above that of training": gap,
}
"""Sign of overfitting → its size per seed; more is worse."""


def judge(scores: Scores) -> list[Finding]:
    """Each form against plain: by every sign of overfitting, and by scores after the last step."""
    step = steps_of(scores, "plain")[-1]
    findings = [
        compare_values(f"{form} against plain, {what}", sign(scores, form), sign(scores, "plain"))
        for what, sign in SIGNS.items()
        for form in FORMS
    ]
    pairs = [(row_of(form, step), row_of("plain", step)) for form in FORMS]
    return findings + compare_pairs(scores, ("in_domain", "held_out_loss"), pairs)


def draw(results: dict[str, Any], path: Path) -> None:
    """Each metric against the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(SHOWN), 3.6), layout="constrained")
    for panel, metric in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        draw_over_time(panel, results["arms"], COLOURS, metric, METRICS[metric])
    draw_legend(figure)
    figure.savefig(path, dpi=150)


STUDY = Study(
    title="Does alignment keep a student from overfitting?",
    question="Captions of 100 scenes, seen about 96 times each, and scored several times on the way. Three signs of "
    "overfitting: F1 that is lost again, loss of held-out captions that rises again, and its distance from the loss of "
    "training. *recipe, wrong-word*: with maps of other words, which shows what any such loss does.",
    paper="alignment scales better and reduces the overfitting that autoregressive fine-tuning shows on small sets "
    "(§7.4, App. F.2, Fig. 27, 28). The study `scaling` has the sizes.",
    arms=arms,
    judge=judge,
    draw=draw,
    metrics=SHOWN,
)
