"""Does attention go to the teacher's maps while a student is tuned, and when? (Fig. 8 and 26)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavender.world.studies.cells import Arm
from lavender.world.studies.forms import RECIPE
from lavender.world.studies.over_time import draw_over_time, row_of, steps_of
from lavender.world.studies.study import METRICS, Finding, Scores, Study, compare_pairs

STEPS, SCORINGS = 400, 8
SHOWN = ("pointing", "attention_mass", "mask_kl", "in_domain")
COLOURS = {"plain": "#777777", "published": "#e08214", "recipe": "#4b2e83", "recipe, masks": "#2a9d8f"}
"""Arm → its colour."""


def arms(quick: bool) -> dict[str, Arm]:
    """The base; plain, the published loss, the recipe, and the recipe with true masks, each scored several times."""

    def scored(target: Any, settings: Any = ()) -> Arm:
        return Arm("mllama", "full", target, 800, STEPS, settings, "captions-in-domain", scorings=SCORINGS)

    return {
        "base": Arm("mllama", "none", task="captions-in-domain"),
        "plain": scored(None),
        "published": scored("teacher"),
        "recipe": scored("teacher", RECIPE),
        "recipe, masks": scored("masks", RECIPE),
    }


def judge(scores: Scores) -> list[Finding]:
    """Each form of alignment against plain fine-tuning after as many steps."""
    pairs = [
        (row_of(arm, step), row_of("plain", step))
        for arm in ("published", "recipe", "recipe, masks")
        for step in steps_of(scores, arm)
    ]
    return compare_pairs(scores, SHOWN, pairs)


def draw(results: dict[str, Any], path: Path) -> None:
    """Each metric against the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(SHOWN), 3.4), layout="constrained")
    for panel, metric in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        draw_over_time(panel, results["arms"], COLOURS, metric, METRICS[metric])
    figure.savefig(path, dpi=150)


STUDY = Study(
    title="When does attention follow the teacher?",
    question="One run per arm and seed, scored several times on the way: captions of known names, all weights. "
    "*published*: the authors' loss, λ = 5, words that the student predicts exactly. *recipe*: attention mass on the "
    "teacher's squared map, λ = 0.2, with attention forcing, which ends after 80 % of the steps. *recipe, masks*: the "
    "same with the true masks. The learning rate falls to 0 at the last step. Pointing shows the place of attention's "
    "maximum, the share its level, and the KL divergence its distance from the true mask.",
    paper="VLM attention comes to look like the diffusion model's over the steps (§7.1, Fig. 8, 26; pictures, without "
    "numbers).",
    arms=arms,
    judge=judge,
    draw=draw,
    metrics=SHOWN,
)
